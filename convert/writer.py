"""A source's tensors -> a model directory, complete or not there at all."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_openelm import __version__
from mlx_openelm.checkpoint.directory import METADATA, check_vocabulary, save_config
from mlx_openelm.checkpoint.names import EMBEDDINGS, HEAD
from mlx_openelm.checkpoint.safetensors import check_float
from mlx_openelm.checkpoint.shards import Spec, new_shards, raw, write_json
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.dtypes import dtype_name
from mlx_openelm.errors import InputError
from mlx_openelm.files import find_in
from mlx_openelm.model.quantization import Quantization, Scheme, quantize
from mlx_openelm.model.shapes import parameter_count, tensor_shapes
from mlx_openelm.tokenizer.files import (
    carry_generation_config,
    find_tokenizer,
    write_tokenizer_files,
)
from mlx_openelm.tokenizer.tokenizer import Tokenizer, load_tokenizer

from .atomic import new_directory
from .behind import behind
from .floats import cast, choose_dtype
from .outputs import RECORD
from .recipe import KEEP_ALL, Recipe, plan
from .sources import LazyTensor
from .targets import check_directory

# Called with a tensor's name, and how many more bytes of the source have been done with
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Options:
    """What the person chose.

    Attributes:
        dtype: "float32", "float16" or "bfloat16"; None: `floats.choose_dtype` decides.
        recipe: which matrices are quantized.
        trim_vocab: drop the embedding rows beyond the tokenizer's vocabulary.
        chat: write the Instruct models' chat format for other runtimes.
        allow_nonfinite: take NaN, infinities and overflow as they are.
        hashes: of every tensor read and written, in `conversion.json`.
    """

    dtype: str | None = None
    recipe: Recipe = KEEP_ALL
    trim_vocab: bool = False
    chat: bool = False
    allow_nonfinite: bool = False
    hashes: bool = True


@dataclass
class Conversion:
    """What was done, for the closing lines."""

    config: OpenELMConfig
    dtype: mx.Dtype
    quantization: Quantization | None
    parameters: int
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0
    hashing_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter, scales and biases included."""
        return 8 * self.bytes_after / self.parameters


def convert(
    tensors: Mapping[str, LazyTensor],
    config: OpenELMConfig,
    out: Path,
    options: Options,
    *,
    tokenizer: Path | None = None,
    chat_template: str | Mapping[str, str] | None = None,
    generation_config: Path | None = None,
    source: Mapping[str, Any] | None = None,
    reads: Iterable[Path] = (),
    force: bool = False,
    progress: Progress = lambda name, done: None,
) -> Conversion:
    """Write a model directory; no more than some blocks of rows are in memory at once.

    Args:
        tensors: by the names of a model directory.
        config: the geometry.
        out: the directory to make.
        options: what to make of them.
        tokenizer: a directory with a tokenizer, a SentencePiece file or a tokenizer.json, to put
            beside the weights.
        chat_template: takes the place of the tokenizer's; several by their names.
        generation_config: a directory whose `generation_config.json`, if any, is carried.
        source: what the tensors came from, for `conversion.json`.
        reads: the files and directories that the tensors and options came from, which are never
            replaced.
        force: replace `out` if it is a directory that this program wrote.
        progress: called after every block.

    Raises:
        InputError: when the tensors aren't those of `config`, when a value isn't finite or
            doesn't fit into the dtype, when the tokenizer has too many pieces, or when `out`
            must not be replaced (see `targets.check_directory`).
        OpenELMError: when `out` can't be written.
    """
    start = time.perf_counter()
    reads = [*reads, *([tokenizer] if tokenizer else [])]
    check_directory(out, force, reads)
    tensors, notes = without_redundant_head(tensors, config)
    check_shapes(tensors, config)
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        pieces = loaded.vocab_size
        check_vocabulary(pieces, config.vocab_size, str(tokenizer))
        config = _with_token_ids(config, loaded)
    if options.trim_vocab:
        if tokenizer is None:
            raise InputError("--trim-vocab needs the tokenizer, which says how many rows to keep")
        notes += [f"vocabulary trimmed from {config.vocab_size} to {pieces} rows"]
        tensors, config = trim_vocabulary(tensors, config, pieces)
    dtype, more = choose_dtype(tensors, config, options.dtype, options.allow_nonfinite)
    quantization, most = plan(config, options.recipe)
    layout = output_layout(config, dtype, quantization)
    specs = {part: spec for parts in layout.values() for part, spec in parts.items()}
    done = Conversion(
        config,
        dtype,
        quantization,
        parameters=parameter_count(config),
        bytes_before=sum(t.nbytes for t in tensors.values()),
        bytes_after=sum(spec.nbytes for spec in specs.values()),
        notes=[*notes, *more, *most],
    )
    with new_directory(out, force, reads) as directory:
        hashes = _Hashes() if options.hashes else None
        with new_shards(directory, specs, METADATA) as write:
            _stream(tensors, done, options.allow_nonfinite, write, hashes, progress)
        save_config(directory, config, quantization)
        if tokenizer is not None:
            reason = write_tokenizer_files(tokenizer, directory, options.chat, chat_template)
            if reason is not None:
                done.notes.append(f"no tokenizer.json, which other runtimes need: {reason}")
        if generation_config is not None:
            carry_generation_config(generation_config, directory)
        if hashes is not None:
            done.hashing_seconds = hashes.seconds
            record = _record(done, options, source or {}, tensors, layout, hashes, tokenizer)
            write_json(directory / RECORD, record)
    done.seconds = time.perf_counter() - start
    return done


def check_shapes(tensors: Mapping[str, LazyTensor], config: OpenELMConfig) -> None:
    """Refuse tensors that are missing, too many, not floats, or of the wrong shape.

    Raises:
        InputError: naming one of them, with the shape expected and found.
    """
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"tensor {name} {list(shape)} is missing")
        found = tensors[name]
        check_float(found)
        if found.shape != shape:
            raise InputError(
                f"tensor {found.name} has the shape {list(found.shape)}; the config says "
                f"{list(shape)}"
            )
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise InputError(f"tensor {tensors[extra[0]].name} is not part of a model of this config")


def without_redundant_head(
    tensors: Mapping[str, LazyTensor], config: OpenELMConfig
) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors without an `lm_head.weight` that repeats tied embeddings, and a note.

    Raises:
        InputError: when it differs from them.
    """
    if not config.share_input_output_layers or HEAD not in tensors or EMBEDDINGS not in tensors:
        return dict(tensors), []
    head, embeddings = tensors[HEAD], tensors[EMBEDDINGS]
    if head.shape != embeddings.shape or not all(
        mx.array_equal(a, b, stream=mx.cpu).item()
        for a, b in zip(head.blocks(), embeddings.blocks(), strict=False)
    ):
        raise InputError(
            f"tensor {head.name} differs from {embeddings.name}, but the config says that they "
            "are shared (share_input_output_layers)"
        )
    left = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    return left, [f"{head.name} repeats the embeddings: left out"]


def trim_vocabulary(
    tensors: Mapping[str, LazyTensor], config: OpenELMConfig, rows: int
) -> tuple[dict[str, LazyTensor], OpenELMConfig]:
    """The tensors and config with the first `rows` of the embeddings (and of an untied head)."""
    trimmed = {
        name: replace(t, shape=(rows, *t.shape[1:])) if name in (EMBEDDINGS, HEAD) else t
        for name, t in tensors.items()
    }
    return trimmed, replace(config, vocab_size=rows)


def output_layout(
    config: OpenELMConfig, dtype: mx.Dtype, quantization: Quantization | None
) -> dict[str, dict[str, Spec]]:
    """What is stored of each tensor of the network, in its order: itself, or its packed parts."""
    layout: dict[str, dict[str, Spec]] = {}
    for name, shape in tensor_shapes(config).items():
        scheme = _scheme(name, shape, quantization)
        if scheme is None:
            layout[name] = {name: Spec(dtype, shape)}
        else:
            parts = _parts(name, mx.zeros((1, shape[1]), dtype), scheme)
            layout[name] = {part: Spec(a.dtype, (shape[0], *a.shape[1:])) for part, a in parts}
    return layout


def _scheme(name: str, shape: tuple[int, ...], quantization: Quantization | None) -> Scheme | None:
    if quantization is None or len(shape) != 2:
        return None
    return quantization.scheme(name.removesuffix(".weight"))


def _parts(name: str, rows: mx.array, scheme: Scheme | None) -> list[tuple[str, mx.array]]:
    if scheme is None:
        return [(name, rows)]
    module = name.removesuffix(".weight")
    return [(f"{module}.{part}", array) for part, array in quantize(rows, scheme).arrays()]


def _stream(
    tensors: Mapping[str, LazyTensor],
    done: Conversion,
    allow_nonfinite: bool,
    write: Callable[[str, memoryview], None],
    hashes: _Hashes | None,
    progress: Progress,
) -> None:
    """Read and convert block by block here, hash and write on another thread."""
    with behind() as submit:
        for name, shape in tensor_shapes(done.config).items():
            tensor, scheme = tensors[name], _scheme(name, shape, done.quantization)
            for rows in tensor.blocks():
                values = cast(rows, done.dtype, tensor.name, allow_nonfinite)
                parts = [(part, raw(array)) for part, array in _parts(name, values, scheme)]
                if hashes is not None:
                    submit(partial(hashes.add, [(f"source {name}", raw(rows)), *parts]))
                for part, data in parts:
                    submit(partial(write, part, data))
                progress(name, rows.nbytes)


def _with_token_ids(config: OpenELMConfig, tokenizer: Tokenizer) -> OpenELMConfig:
    """The config with the tokenizer's BOS and EOS, where the source names none."""
    return replace(
        config,
        bos_token_id=tokenizer.bos_token_id if config.bos_token_id is None else config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id,
    )


class _Hashes:
    """SHA-256 of tensors' bytes, and the time it took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._hashes: dict[str, Any] = {}

    def add(self, blocks: Iterable[tuple[str, memoryview]]) -> None:
        start = time.perf_counter()
        for name, data in blocks:
            self._hashes.setdefault(name, hashlib.sha256()).update(data)
        self.seconds += time.perf_counter() - start

    def __getitem__(self, name: str) -> str:
        found: str = self._hashes[name].hexdigest()
        return found


def _record(
    done: Conversion,
    options: Options,
    source: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    layout: Mapping[str, Iterable[str]],
    hashes: _Hashes,
    tokenizer: Path | None,
) -> dict[str, Any]:
    """`conversion.json`: no times, no paths, so that the same input gives the same bytes."""
    made = {
        name: {
            "source": tensors[name].name,
            "source_dtype": tensors[name].dtype,
            "source_sha256": hashes[f"source {name}"],
            "sha256": {part: hashes[part] for part in parts},
        }
        for name, parts in layout.items()
    }
    return {
        "source": dict(source),
        "options": {
            "dtype": dtype_name(done.dtype),
            "quantization": done.quantization.to_dict() if done.quantization else None,
            "trim_vocab": options.trim_vocab,
            "chat": options.chat,
            "allow_nonfinite": options.allow_nonfinite,
        },
        "versions": {"mlx-openelm": __version__, "mlx": version("mlx")},
        "tokenizer_sha256": _sha256(_tokenizer_file(tokenizer)) if tokenizer else None,
        "tensors": made,
    }


def _tokenizer_file(tokenizer: Path) -> Path:
    """The SentencePiece model where there is one: what a tokenizer.json was made from."""
    if not tokenizer.is_dir():
        return tokenizer
    return find_in(tokenizer, "tokenizer.model") or find_tokenizer(tokenizer)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
