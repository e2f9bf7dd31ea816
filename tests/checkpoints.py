"""Checkpoint files made by hand, byte by byte, so that any part of them can be wrong."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
DEFLATED, ENCRYPTED = 8, 1


@dataclass(frozen=True)
class Global:
    """A global that a pickle names: "module name"."""

    name: str


@dataclass(frozen=True)
class Call:
    function: object
    arguments: object


@dataclass(frozen=True)
class Persistent:
    identity: object


def pickled(value: object) -> bytes:
    """`value` as a pickle of protocol 2, by hand: nothing has to exist to be named."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: object) -> bytes:
    if isinstance(value, Global):
        module, name = value.name.rsplit(" ", 1)
        return b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    if isinstance(value, Call):
        return _pickled(value.function) + _pickled(value.arguments) + b"R"
    if isinstance(value, Persistent):
        return _pickled(value.identity) + b"Q"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"L" + str(value).encode() + b"L\n"
    if isinstance(value, str):
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_pickled, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_pickled, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickled(k) + _pickled(v) for k, v in value.items()) + b"u"
    raise TypeError(value)


def tensor(
    key: str = "0",
    size: object = 6,
    offset: object = 0,
    shape: object = (2, 3),
    stride: object = (3, 1),
    kind: str = "torch FloatStorage",
) -> Call:
    """A tensor as torch.save writes it; `size` is the number of elements of its storage."""
    storage = Persistent(("storage", Global(kind), key, "cpu", size))
    hooks = Call(Global("collections OrderedDict"), ())
    rebuild = Global("torch._utils _rebuild_tensor_v2")
    return Call(rebuild, (storage, offset, shape, stride, False, hooks))


@dataclass
class Member:
    """A member of a zip; what isn't given is as it should be. `packed` is its compressed size."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    offset: int | None = None
    local_name: str | None = None


def zipped(members: list[Member], *, zip64: bool = False, count: int | None = None) -> bytes:
    """A zip file; with `zip64` every size and offset is in its zip64 field, not the first one."""
    body, directory = b"", b""
    for m in members:
        name, local_name = m.name.encode(), (m.local_name or m.name).encode()
        crc = zlib.crc32(m.data) if m.crc is None else m.crc
        offset = len(body) if m.offset is None else m.offset
        size = len(m.data) if m.size is None else m.size
        packed = len(m.data) if m.packed is None else m.packed
        extra = comment = b""
        if zip64:
            extra = struct.pack("<2H3s2H3Q", 0xCAFE, 3, b"any", 1, 24, size, packed, offset)
            comment = b"a comment"
            size = packed = offset = 0xFFFFFFFF
        common = (20, m.flags, m.method, 0, 0, crc)
        body += struct.pack("<4s5H3L2H", b"PK\3\4", *common, packed, size, len(local_name), 0)
        body += local_name + m.data
        directory += struct.pack(
            *("<4s6H3L5H2L", b"PK\1\2", 20, *common, packed, size, len(name), len(extra)),
            *(len(comment), 0, 0, 0, offset),
        )
        directory += name + extra + comment
    count = len(members) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    if zip64:
        at = len(body) + len(directory)
        end = (
            struct.pack(
                *("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0),
                *(count, count, len(directory), len(body)),
            )
            + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
            + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
        )
    return body + directory + end


def torch_members(content: object, storages: dict[str, bytes]) -> list[Member]:
    """The members of what torch.save makes of `content` (a value for `pickled`, or a pickle)."""
    pickle = content if isinstance(content, bytes) else pickled(content)
    data = [Member(f"model/data/{key}", value) for key, value in storages.items()]
    return [Member("model/data.pkl", pickle), Member("model/byteorder", b"little"), *data]


def torch_file(path: Path, content: object, storages: dict[str, bytes] | None = None) -> Path:
    """Write such a file; by default it has one storage "0", of the float32 numbers 0 to 5."""
    storages = {"0": np.arange(6, dtype="<f4").tobytes()} if storages is None else storages
    path.write_bytes(zipped(torch_members(content, storages)))
    return path


def unzipped(data: bytes) -> dict[str, bytes]:
    """Name → bytes of the stored members of a sound zip file."""
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `header` is JSON's object or its bytes."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(encoded) if length is None else length
    return struct.pack("<Q", length) + encoded + data


def raw(array: mx.array) -> bytes:
    """The bytes of an array's elements."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array).tobytes()


def mutated(data: bytes, edits: list[tuple[str, int, int, int]]) -> bytes:
    """`data` with bytes flipped, cut out or copied elsewhere; positions wrap around."""
    changed = bytearray(data)
    for kind, at, length, value in edits:
        if not changed:
            break
        at %= len(changed)
        if kind == "flip":
            changed[at] ^= value % 255 + 1
        elif kind == "set":
            changed[at : at + length % 9] = bytes([value % 256]) * (length % 9)
        elif kind == "cut":
            del changed[at : at + length]
        elif kind == "truncate":
            del changed[at:]
        else:
            source = value % len(changed)
            piece = changed[source : source + length]
            if kind == "overwrite":
                changed[at : at + len(piece)] = piece
            else:
                changed[at:at] = piece
    return bytes(changed)


EDITS = ("flip", "set", "cut", "truncate", "overwrite", "insert")
