"""Reads what `torch.save` wrote (PyTorch 1.6 and later), without PyTorch, running nothing in it.

The file is a zip of stored members under one folder: `data.pkl` describes the tensors,
`data/<key>` is a storage's raw bytes, `byteorder` says which way they run (absent in files from
before PyTorch 2.1: little). Source of the format: `torch/serialization.py`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_openelm.checkpoint.safetensors import MAX_HEADER, check_shape
from mlx_openelm.errors import InputError
from mlx_openelm.files import file_size, read_range, shown

from .lazy import DTYPES, LazyTensor, item_size, to_array
from .unpickler import StoredTensor, unpickle
from .zip_directory import Member, read_directory

ZIP = b"PK\x03\x04"
# Pickled by torch.save before 1.6: protocol 2, then the long integer 0x1950a86a20f9469cfc6c.
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_CHUNK = 1 << 20
_GAP = 1 << 16  # bytes between a strided tensor's elements that are read rather than skipped
_SHARED = 4  # times a file's size that its tensors may have, where storages are shared


@dataclass
class Checked:
    """How much of a member has gone into its checksum so far, and whether it was right."""

    size: int = 0
    crc: int = 0
    sound: bool = False

    def add(self, raw: bytes) -> None:
        """Count the next bytes."""
        self.size += len(raw)
        self.crc = zlib.crc32(raw, self.crc)


@dataclass(frozen=True)
class TorchFile:
    """An opened file: `content` is what was saved, with a `StoredTensor` for every tensor.

    `members` are those of its zip, without the common folder; `checked`, how far each one's
    checksum has been computed.
    """

    path: Path
    content: object
    members: dict[str, Member]
    checked: dict[str, Checked] = field(default_factory=dict)


def open_torch(path: Path) -> TorchFile:
    """Open a file of `torch.save`. Reads its directory and its pickle, no tensor.

    Raises:
        InputError: when it is damaged, of another kind, or names anything but tensors and plain
            data; the message says which.
    """
    start = read_range(path, 0, min(file_size(path), len(LEGACY)))
    if start == LEGACY:
        raise InputError(
            f"{path}: in PyTorch's format from before 1.6; save it again with a newer one: "
            "torch.save(torch.load(FILE, weights_only=True), OUT)"
        )
    if not start.startswith(ZIP):
        raise InputError(
            f"{path}: neither a checkpoint of PyTorch (a zip file) nor a safetensors file; it may "
            "be damaged"
        )
    members = read_directory(path)
    folders = {name.split("/", 1)[0] for name in members}
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if not pickles:
        raise InputError(f"{path}: a zip file, but not torch.save's (no data.pkl in it)")
    if len(folders) > 1:
        raise InputError(f"{path}: its members lie in {len(folders)} folders; torch.save has one")
    members = {name.partition("/")[2]: member for name, member in members.items()}
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        raise InputError(
            f"{path}: a TorchScript archive, not a checkpoint; save its weights with "
            "torch.save(torch.jit.load(FILE).state_dict(), OUT)"
        )
    packed = next((name for name, member in members.items() if not member.stored), None)
    if packed:
        raise InputError(
            f"{path}: member {shown(packed)} is compressed, which torch.save never does; unpack "
            "the file and zip it again without compression (zip -0)"
        )
    file = TorchFile(path, None, members)
    if "byteorder" in members and _small_member(file, "byteorder") != b"little":
        raise InputError(f"{path}: written on a big-endian machine; save it again on another")
    pickle = _small_member(file, "data.pkl")
    try:
        content = unpickle(pickle)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return TorchFile(path, content, members, file.checked)


def lazy_tensors(file: TorchFile, state: Mapping[Any, object]) -> dict[str, LazyTensor]:
    """The tensors of a state dict in `file.content`, checked against the storages they lie in.

    Raises:
        InputError: when an entry isn't a tensor, or its storage is missing or too short for it.
    """
    tensors = {}
    for name, stored in state.items():
        where = f"{file.path}: tensor {shown(name)}"
        if not isinstance(name, str):
            raise InputError(f"{where}: its name is not text; not a state dict")
        if not isinstance(stored, StoredTensor):
            raise InputError(f"{where}: is a {type(stored).__name__}; not a state dict")
        _check(file, stored, where)
        rows = partial(_rows, file, name, stored)
        tensors[name] = LazyTensor(name, stored.shape, stored.dtype, rows)
    total, size = sum(tensor.nbytes for tensor in tensors.values()), file_size(file.path)
    if total > _SHARED * size + _CHUNK:
        raise InputError(
            f"{file.path}: its tensors have {total} bytes, the file {size}: many share a storage; "
            "save them apart (clone them)"
        )
    return tensors


def _check(file: TorchFile, tensor: StoredTensor, where: str) -> None:
    check_shape(tensor.shape, where)
    storage = tensor.storage
    promised = storage.size * item_size(storage.dtype or "uint8")
    member = file.members.get(f"data/{storage.key}")
    if member is None:
        raise InputError(f"{where}: its storage {shown(storage.key)} is not in the file")
    if not 0 <= promised <= member.size:
        raise InputError(
            f"{where}: its storage {shown(storage.key)} should have {storage.size} elements but "
            f"has {member.size} bytes; the file is damaged"
        )
    if tensor.offset < 0 or any(n < 0 for n in tensor.stride):
        raise InputError(f"{where}: has a negative offset or stride; the file is damaged")
    available = promised // item_size(tensor.dtype)
    if math.prod(tensor.shape) and tensor.offset + _span(tensor) > available:
        raise InputError(
            f"{where}: reaches to element {tensor.offset + _span(tensor)} of a storage of "
            f"{available}; the file is damaged"
        )
    if math.prod(tensor.shape) > available:
        raise InputError(
            f"{where}: has {math.prod(tensor.shape)} elements in a storage of {available} (an "
            "expanded tensor); save it contiguous (clone it)"
        )


def _span(tensor: StoredTensor) -> int:
    """Elements of the storage from the tensor's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))


def _rows(file: TorchFile, name: str, tensor: StoredTensor, start: int, stop: int) -> mx.array:
    member_name = f"data/{tensor.storage.key}"
    member, size = file.members[member_name], item_size(tensor.dtype)
    if not tensor.shape:
        part = replace(tensor, shape=(1,), stride=(1,))
    else:
        begin = tensor.offset + start * tensor.stride[0]
        part = replace(tensor, offset=begin, shape=(stop - start, *tensor.shape[1:]))
    offset, count = member.offset + part.offset * size, math.prod(part.shape)
    if _is_contiguous(part) or not count:
        raw = read_range(file.path, offset, count * size)
        whole = math.prod(tensor.shape) * size == member.size
        _check_crc(file, member_name, raw if whole else b"", part.offset * size)
    else:
        _check_crc(file, member_name)
        raw = _gather(file.path, offset, part)
    return to_array(raw, tensor.dtype, part.shape, name)


def _is_contiguous(tensor: StoredTensor) -> bool:
    expected = 1
    for n, step in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if n > 1 and step != expected:
            return False
        expected *= n
    return True


def _gather(path: Path, offset: int, tensor: StoredTensor) -> bytes:
    """The elements of a strided tensor, in order; what lies far between them isn't read."""
    dtype = np.dtype(DTYPES[tensor.dtype][0])
    gathered = np.empty(tensor.shape, dtype)

    def fill(out: np.ndarray[Any, Any], at: int) -> None:
        steps = [step if n > 1 else 0 for n, step in zip(out.shape, tensor.stride, strict=True)]
        span = 1 + sum((n - 1) * step for n, step in zip(out.shape, steps, strict=True))
        axis = int(np.argmax(steps))
        if out.shape[axis] == 1 or span * dtype.itemsize <= 2 * out.nbytes + _GAP:
            raw = read_range(path, offset + at * dtype.itemsize, span * dtype.itemsize)
            strides = [step * dtype.itemsize for step in steps]
            values = np.frombuffer(raw, dtype)
            out[...] = np.lib.stride_tricks.as_strided(values, out.shape, strides, writeable=False)
        else:
            half = out.shape[axis] // 2
            before = (slice(None),) * axis
            fill(out[(*before, slice(half))], at)
            fill(out[(*before, slice(half, None))], at + half * steps[axis])

    fill(gathered, 0)
    return gathered.tobytes()


def _small_member(file: TorchFile, name: str) -> bytes:
    member = file.members[name]
    if member.size > MAX_HEADER:
        raise InputError(
            f"{file.path}: {name} has {member.size} bytes, more than any checkpoint needs"
        )
    raw = read_range(file.path, member.offset, member.size)
    _check_crc(file, name, raw)
    return raw


def _check_crc(file: TorchFile, name: str, raw: bytes = b"", at: int = 0) -> None:
    """Compare a member's checksum, once.

    `raw` are bytes of it from offset `at`, when all will be read. While they come in order they
    are counted as they come, and compared at the end; else the whole member is read for it here.
    0 means that no checksum was computed (`torch.serialization.set_crc32_options(False)`).
    """
    member = file.members[name]
    if not member.crc:
        return
    checked = file.checked.setdefault(name, Checked())
    if checked.sound:
        return
    if raw and at == checked.size:
        checked.add(raw)
    else:
        checked.size = checked.crc = 0
        while checked.size < member.size:
            length = min(_CHUNK, member.size - checked.size)
            checked.add(read_range(file.path, member.offset + checked.size, length))
    if checked.size == member.size:
        if checked.crc != member.crc:
            raise InputError(
                f"{file.path}: {name} is damaged (its checksum is wrong); get it again"
            )
        checked.sound = True
