"""CoreNet's form: a state dict as `torch.save` writes it, without PyTorch.

A zip of stored members under one folder, their data aligned to 64 bytes: `data.pkl`, a pickle of
protocol 2 whose tensors name their storages, and `data/N`, the storages' bytes. Source of the
format: `torch/serialization.py` and `caffe2/serialize/inline_container.cc`.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mlx_openelm.checkpoint.names import LAYOUTS
from mlx_openelm.checkpoint.shards import raw
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.model.shapes import tensor_shapes
from mlx_openelm.tokenizer.tokenizer import load_tokenizer

from ..atomic import new_files
from ..checkpoint import Checkpoint
from ..floats import cast
from ..outputs import starts_like
from ..published import published_name
from ..sources.lazy import DTYPES

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_FOLDER = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER = 30  # bytes, before name and extra field
_PADDING = 0x4246  # id of the extra field that torch.save pads with, "FB"

_YAML = """\
model:
  language_modeling:
    name: general_gpt
    general_gpt:
      model_name: {name}
      vocab_size: {vocab_size}
      max_context_length: {context}
"""


WHY_NOT_PT = starts_like(
    "a .pt that mlx-openelm wrote", lambda start: start[30:].startswith(b"archive/data.pkl")
)
WHY_NOT_YAML = starts_like(
    "a YAML that mlx-openelm wrote",
    lambda start: (
        re.fullmatch(
            _YAML.format(name=r"\S+", vocab_size=r"\d+", context=r"\d+"),
            start.decode("utf-8", "replace"),
        )
        is not None
    ),
)


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str


def write_corenet(model: Checkpoint, out: Path, dtype: str | None, force: bool) -> list[str]:
    """Write a `.pt`, and beside it the YAML that names the geometry, if it is a published one."""
    names = {canonical: name for name, canonical in LAYOUTS["CoreNet"].items()}
    tensors = {
        name: _Tensor(_corenet_name(name, names), shape, dtype or model.tensors[name].dtype)
        for name, shape in tensor_shapes(model.config).items()
    }
    text, notes = _yaml(model.config)
    outs = {out: WHY_NOT_PT}
    if text is not None:
        if out.suffix == ".yaml":
            raise InputError(f"{out}: the YAML beside it would have the same name; call it .pt")
        outs[out.with_suffix(".yaml")] = WHY_NOT_YAML
    with new_files(outs, force, [model.source.path]) as [path, *yaml]:
        with zipfile.ZipFile(path, "w") as file:
            _write_zip(file, tensors, model)
        for beside in yaml:
            beside.write_text(text or "", encoding="utf-8")
    return [*notes, *_lost_ends(model)]


def _lost_ends(model: Checkpoint) -> list[str]:
    """A note when more ids end a text than the tokenizer's own: CoreNet has no place for them."""
    if model.source.tokenizer is None:
        return []
    tokenizer = load_tokenizer(model.source.path)
    ends = sorted(tokenizer.eos_token_ids - {tokenizer.eos_token_id})
    return [f"CoreNet's files don't say that the tokens {ends} end a text, too"] if ends else []


def _write_zip(file: zipfile.ZipFile, tensors: dict[str, _Tensor], model: Checkpoint) -> None:
    _add(file, "data.pkl", [_pickle(tensors.values())])
    _add(file, "byteorder", [b"little"])
    for i, (name, tensor) in enumerate(tensors.items()):
        mlx_dtype = DTYPES[tensor.dtype][1]
        blocks = (
            raw(cast(rows, mlx_dtype, name, rows.dtype == mlx_dtype))
            for rows in model.tensors[name].blocks()
        )
        size = math.prod(tensor.shape) * mlx_dtype.size
        _add(file, f"data/{i}", blocks, size)
    _add(file, "version", [b"3\n"])


def _corenet_name(name: str, names: dict[str, str]) -> str:
    prefix, layers, rest = name.partition("layers.")
    index, _, part = rest.partition(".")
    if not layers:
        return names[name]
    return names[f"{prefix}layers.{{i}}.{part}"].replace("{i}", index)


def _yaml(config: OpenELMConfig) -> tuple[str | None, list[str]]:
    """The YAML that names a published geometry; None, and a note, for any other."""
    name = published_name(config)
    if name is None:
        return None, [
            "CoreNet's YAML can only name published sizes, and this is none: no .yaml written"
        ]
    values = {"name": name, "vocab_size": config.vocab_size, "context": config.max_context_length}
    return _YAML.format(**values), []


def _add(
    file: zipfile.ZipFile, name: str, blocks: Iterable[bytes | memoryview], size: int = 0
) -> None:
    """Add a member whose data begins at a multiple of `_ALIGNMENT`."""
    info = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    large = size >= zipfile.ZIP64_LIMIT
    zip64_field = 20 if large else 0  # zipfile puts it before ours
    at = file.fp.tell() + _LOCAL_HEADER + len(info.filename) + zip64_field + 4  # type: ignore[union-attr]
    fill = -at % _ALIGNMENT
    info.extra = struct.pack("<2H", _PADDING, fill) + b"Z" * fill
    with file.open(info, "w", force_zip64=large) as member:
        for block in blocks:
            member.write(block)


def _pickle(tensors: Iterable[_Tensor]) -> bytes:
    """A dict from name to tensor, tensor number N in storage "N"."""
    return b"".join([b"\x80\x02}(", *_items(tensors), b"u."])


def _items(tensors: Iterable[_Tensor]) -> Iterator[bytes]:
    for key, tensor in enumerate(tensors):
        yield _text(tensor.name)
        yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
        yield _text("storage") + b"ctorch\n" + STORAGES[tensor.dtype].encode() + b"\n"
        yield _text(str(key)) + _text("cpu") + _integer(math.prod(tensor.shape)) + b"tQ"
        yield _integer(0)
        yield _tuple(tensor.shape)
        yield _tuple(
            tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
        )
        yield b"\x89ccollections\nOrderedDict\n)RtR"


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
