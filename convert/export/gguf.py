"""GGUF, for llama.cpp: through the `gguf` package, with the names and metadata of its OpenELM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_openelm.checkpoint.shards import raw
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError, OpenELMError
from mlx_openelm.files import find_in, read_bytes
from mlx_openelm.model.quantization import Quantization, Scheme
from mlx_openelm.model.shapes import tensor_shapes
from mlx_openelm.tokenizer.tokenizer import load_tokenizer

from ..atomic import new_files
from ..checkpoint import Checkpoint
from ..floats import DTYPES, cast
from ..outputs import starts_like
from ..sources import LazyTensor
from ..sources.huggingface import open_parts
from .gguf_tokenizer import add_tokenizer, check_tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# Ends of names in a model directory -> in a GGUF; `ffn.proj_1` is two there, gate and up
NAMES = {
    "transformer.token_embeddings": "token_embd",
    "transformer.norm": "output_norm",
    "attn_norm": "attn_norm",
    "attn.qkv_proj": "attn_qkv",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.out_proj": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn.proj_2": "ffn_down",
}
GATE_AND_UP = ("ffn.proj_1", ("ffn_gate", "ffn_up"))
QUANTIZED = {"q8_0": "Q8_0", "q4_1": "Q4_1"}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", **QUANTIZED}
BLOCK = 32  # weights that share scale (and minimum) in Q8_0 and Q4_1
WHY_NOT = starts_like(
    "a GGUF of an OpenELM", lambda start: start[:4] == b"GGUF" and b"openelm" in start
)


@dataclass(frozen=True)
class Part:
    """A tensor of the file: rows `start` to `stop` of a matrix, or a vector."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    nbytes: int
    blocks: Callable[[], Iterator[np.ndarray[Any, Any]]]

    def tofile(self, file: BinaryIO) -> None:
        """What the writer asks of an array: write the bytes. They are made block by block."""
        for block in self.blocks():
            file.write(np.ascontiguousarray(block).data)


def write_gguf(model: Checkpoint, out: Path, dtype: str | None, force: bool) -> list[str]:
    """Write one file; without `dtype`, as stored: 4-bit affine weights as q4_1."""
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise OpenELMError("GGUF needs a package: pip install gguf") from None
    check_expressible(model)
    chosen = dtype or _stored_type(model)
    parts = _parts(model, chosen)
    data = _sentencepiece(model)
    tokenizer = load_tokenizer(model.source.path)
    sentencepiece = check_tokenizer(data, tokenizer, str(model.source.path))
    with new_files({out: WHY_NOT}, force, [model.source.path]) as [path]:
        writer = GGUFWriter(path, "openelm")
        _add_geometry(writer, model.config, chosen)
        notes = add_tokenizer(writer, sentencepiece, tokenizer, model.config.vocab_size)
        for part in parts:
            writer.add_tensor_info(
                part.name, part.shape, np.dtype(np.float32), part.nbytes, part.type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            writer.write_tensor_data(part)  # type: ignore[arg-type]
        writer.close()
    return notes


def check_expressible(model: Checkpoint) -> None:
    """Refuse what llama.cpp's OpenELM has no place for.

    Raises:
        InputError: saying what.
    """
    config = model.config
    for holds, what in (
        (not config.share_input_output_layers, "has an output matrix of its own"),
        (not config.ffn_with_glu, "has no gate in its FFN (ffn_with_glu is false)"),
        (not config.normalize_qk_projections, "doesn't normalise queries and keys"),
    ):
        if holds:
            raise InputError(f"{model.source.path}: {what}, which llama.cpp's OpenELM can't do")


def _sentencepiece(model: Checkpoint) -> bytes:
    """The SentencePiece model file in a directory."""
    file = find_in(model.source.path, "tokenizer.model")
    if file is None:
        raise InputError(
            f"{model.source.path}: no tokenizer.model in it, which a GGUF has to contain; convert "
            "the model again with --tokenizer"
        )
    return read_bytes(file)


def _stored_type(model: Checkpoint) -> str:
    if model.source.quantization is None:
        return next(iter(model.tensors.values())).dtype
    return "q4_1"


def _parts(model: Checkpoint, chosen: str) -> list[Part]:
    packed = _packed(model) if chosen == "q4_1" else {}
    parts: list[Part] = []
    for name, shape in tensor_shapes(model.config).items():
        module = name.removesuffix(".weight")
        rows = shape[0]
        if module.endswith(GATE_AND_UP[0]):
            ranges = zip(GATE_AND_UP[1], ((0, rows // 2), (rows // 2, rows)), strict=True)
        else:
            ending = next(end for end in NAMES if module.endswith(end))
            ranges = zip((NAMES[ending],), ((0, rows),), strict=True)
        for theirs, (start, stop) in ranges:
            layer = module.split(".")[2] if ".layers." in module else None
            full = f"{theirs}.weight" if layer is None else f"blk.{layer}.{theirs}.weight"
            if module in packed:
                parts.append(_q4_1(full, packed[module], start, stop))
            else:
                parts.append(_plain(full, model.tensors[name], start, stop, chosen))
    return parts


def _plain(name: str, tensor: LazyTensor, start: int, stop: int, chosen: str) -> Part:
    from gguf import GGMLQuantizationType, quants

    shape = (stop - start, *tensor.shape[1:])
    wanted = chosen if len(shape) == 2 else "float32"  # llama.cpp wants norms in float32
    if wanted in QUANTIZED and (chosen == "q4_1" or shape[1] % BLOCK):
        wanted = "float16"
    kind = GGMLQuantizationType[TYPES[wanted]]
    rows_at_once = max(1, (8 << 20) // (4 * (shape[1] if len(shape) == 2 else 1)))

    def blocks() -> Iterator[np.ndarray[Any, Any]]:
        for first in range(start, stop, rows_at_once):
            rows = tensor.rows(first, min(first + rows_at_once, stop))
            if wanted in QUANTIZED:
                yield quants.quantize(np.array(rows.astype(mx.float32, stream=mx.cpu)), kind)
            else:
                dtype = DTYPES[wanted]
                yield np.asarray(raw(cast(rows, dtype, tensor.name, rows.dtype == dtype)))

    size, per = _block_size(kind)
    count = int(np.prod(shape))
    return Part(name, shape, kind, count // per * size, blocks)


def _block_size(kind: GGMLQuantizationType) -> tuple[int, int]:
    """(bytes, elements) of a block of this type."""
    from gguf.constants import GGML_QUANT_SIZES

    elements, size = GGML_QUANT_SIZES[kind]
    return size, elements


def _packed(model: Checkpoint) -> dict[str, tuple[LazyTensor, LazyTensor, LazyTensor, Scheme]]:
    """The 4-bit affine matrices of a quantized directory: weight, scales, biases, scheme.

    Raises:
        InputError: when the directory isn't quantized in a way that Q4_1 has.
    """
    path, quantization = model.source.path, model.source.quantization
    if quantization is None:
        raise InputError(
            f"{path}: isn't quantized; q4_1 is for models of 4 bits (openelm-convert -q), others "
            "can be q8_0"
        )
    stored = open_parts(path, model.config.share_input_output_layers)
    found = {}
    for name in stored:
        if not name.endswith(".scales"):
            continue
        module = name.removesuffix(".scales")
        scheme = _q4_1_scheme(path, module, quantization)
        parts = (stored[f"{module}.weight"], stored[name], stored[f"{module}.biases"])
        for part in parts[1:]:
            _check_float16(part, path)
        found[module] = (*parts, scheme)
    return found


def _q4_1_scheme(path: Path, module: str, quantization: Quantization) -> Scheme:
    scheme = quantization.scheme(module)
    if scheme is None or scheme.mode != "affine" or scheme.bits != 4 or scheme.group_size % BLOCK:
        how = f"{scheme.mode} with {scheme.bits} bits" if scheme else "not quantized"
        raise InputError(
            f"{path}: {module} is {how}; GGUF's q4_1 holds affine with 4 bits exactly, others "
            "have to be dequantized: --dtype float16 or q8_0"
        )
    return scheme


def _check_float16(part: LazyTensor, path: Path) -> None:
    if part.dtype == "float16":
        return
    values = part.read().astype(mx.float32)
    if not mx.array_equal(values.astype(mx.float16).astype(mx.float32), values).item():
        raise InputError(
            f"{path}: {part.name} is {part.dtype} with values that float16 doesn't have, as q4_1 "
            "needs; quantize with --dtype float16"
        )


def _q4_1(
    name: str, packed: tuple[LazyTensor, LazyTensor, LazyTensor, Scheme], start: int, stop: int
) -> Part:
    from gguf import GGMLQuantizationType

    weight, scales, biases, scheme = packed
    columns = scales.shape[1] * scheme.group_size
    make = partial(_q4_1_rows, weight, scales, biases, scheme, columns)
    rows_at_once = max(1, (8 << 20) // columns)

    def blocks() -> Iterator[np.ndarray[Any, Any]]:
        for first in range(start, stop, rows_at_once):
            yield make(first, min(first + rows_at_once, stop))

    shape = (stop - start, columns)
    kind = GGMLQuantizationType.Q4_1
    size, per = _block_size(kind)
    return Part(name, shape, kind, shape[0] * columns // per * size, blocks)


def _q4_1_rows(
    weight: LazyTensor,
    scales: LazyTensor,
    biases: LazyTensor,
    scheme: Scheme,
    columns: int,
    start: int,
    stop: int,
) -> np.ndarray[Any, Any]:
    """Blocks of scale, minimum (float16) and 16 bytes: weight i in the low half of byte i, weight
    i + 16 in its high half. MLX's words hold eight weights, the first in the lowest bits."""
    rows, groups = stop - start, columns // BLOCK
    words = np.array(weight.rows(start, stop))
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    values = ((words[..., None] >> shifts) & 15).astype(np.uint8).reshape(rows, groups, 2, 16)
    nibbles = values[:, :, 0] | values[:, :, 1] << 4
    repeat = scheme.group_size // BLOCK
    halves = [
        np.repeat(np.array(part.rows(start, stop).astype(mx.float16)), repeat, axis=1)
        for part in (scales, biases)
    ]
    pair = np.stack(halves, axis=-1).view(np.uint8)
    return np.concatenate([pair, nibbles], axis=-1).reshape(rows, -1)


def _add_geometry(writer: GGUFWriter, config: OpenELMConfig, chosen: str) -> None:
    from gguf import LlamaFileType

    writer.add_block_count(config.num_transformer_layers)
    writer.add_context_length(config.max_context_length)
    writer.add_embedding_length(config.model_dim)
    writer.add_head_count(list(config.num_query_heads))
    writer.add_head_count_kv(list(config.num_kv_heads))
    writer.add_feed_forward_length(list(config.ffn_dims))
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_freq_constant)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kind = "ALL_F32" if chosen == "float32" else f"MOSTLY_{TYPES[chosen]}"
    writer.add_file_type(LlamaFileType[kind])
    writer.add_quantization_version(2)
