"""Where the members of a zip file lie: for files that are read in place, nothing unpacked.

Stricter than `zipfile`, as suits an untrusted file: members have unique, relative names and don't
overlap. Format: PKWARE's APPNOTE 6.3, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mlx_openelm.checkpoint.safetensors import MAX_HEADER
from mlx_openelm.errors import InputError
from mlx_openelm.files import file_size, read_range, shown

_END = struct.Struct("<4s4H2LH")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_MAX_MEMBERS = 20_000  # the full training checkpoint of OpenELM-3B has 1,500
_IN_EXTRA = 0xFFFFFFFF  # the value is in the zip64 extra field
_ENCRYPTED, _STORED = 1, 0


class Member(NamedTuple):
    """Where a member's bytes are: offset and size in bytes; their CRC-32 if they are stored.

    What isn't `stored` is compressed or encrypted.
    """

    offset: int
    size: int
    crc: int
    stored: bool


def read_directory(path: Path) -> dict[str, Member]:
    """Name → place of every member. Reads the zip's directory and headers only.

    Raises:
        InputError: when the file isn't a sound zip.
    """
    size = file_size(path)
    try:
        start, length, count = _find_directory(path, size)
        if length > MAX_HEADER:
            raise InputError(f"its directory has {length} bytes, more than any checkpoint needs")
        if start + length > size:
            raise InputError("its directory lies beyond its end")
        members: dict[str, Member] = {}
        ends: list[tuple[int, int, str]] = []
        for name, local, entry in _entries(read_range(path, start, length), count):
            if name in members:
                raise InputError(f"member {shown(name)} is there twice")
            offset = _data_offset(path, name, local, start)
            if offset + entry.size > start:
                raise InputError(f"member {shown(name)} lies beyond its end")
            members[name] = entry._replace(offset=offset)
            ends.append((local, offset + entry.size, name))
        ends.sort()
        for (_, end, name), (begin, _, other) in pairwise(ends):
            if end > begin:
                raise InputError(f"members {shown(name)} and {shown(other)} overlap")
        return members
    except (InputError, struct.error, UnicodeDecodeError) as error:
        reason = error if isinstance(error, InputError) else "its directory is damaged"
        raise InputError(f"{path}: damaged or truncated zip file: {reason}") from None


def _find_directory(path: Path, size: int) -> tuple[int, int, int]:
    """Offset and length in bytes of the central directory, and its number of entries."""
    tail_start = max(0, size - _END.size - _MAX_COMMENT)
    tail = read_range(path, tail_start, size - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise InputError("its end is missing")
    _, disk, directory_disk, here, count, length, start, comment = _END.unpack_from(tail, at)
    if disk or directory_disk or here != count:
        raise InputError("it is split over several files")
    if at + _END.size + comment != len(tail):
        raise InputError("something follows its end")
    locator = tail_start + at - _END_64_LOCATOR.size
    if locator >= 0:
        signature, _, end_64, _ = _END_64_LOCATOR.unpack(
            read_range(path, locator, _END_64_LOCATOR.size)
        )
        if signature == b"PK\x06\x07":
            if end_64 + _END_64.size > locator:
                raise InputError("its end is missing")
            values = _END_64.unpack(read_range(path, end_64, _END_64.size))
            if values[0] != b"PK\x06\x06":
                raise InputError("its end is missing")
            count, length, start = values[7:]
    return start, length, count


def _entries(directory: bytes, count: int) -> list[tuple[str, int, Member]]:
    """Name, offset of the local header, and size and CRC of every entry."""
    if count > _MAX_MEMBERS:
        raise InputError(f"it has {count} members, more than any checkpoint needs")
    found: list[tuple[str, int, Member]] = []
    at = 0
    while at < len(directory) and len(found) <= count:
        fields = _ENTRY.unpack_from(directory, at)
        signature, _, _, flags, method, _, _, crc, packed, size = fields[:10]
        name_length, extra_length, comment_length, _, _, _, local = fields[10:]
        if signature != b"PK\x01\x02":
            raise InputError("its directory is damaged")
        at += _ENTRY.size
        extra_at = at + name_length
        name = directory[at:extra_at].decode("utf-8")
        if len(directory) < extra_at + extra_length + comment_length:
            raise InputError("its directory is damaged")
        extra = directory[extra_at : extra_at + extra_length]
        at = extra_at + extra_length + comment_length
        size, packed, local = _with_extra(extra, [size, packed, local])
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise InputError(f"member {shown(name)} has a path that leads out of it")
        stored = method == _STORED and packed == size and not flags & _ENCRYPTED
        found.append((name, local, Member(0, packed, crc, stored)))
    if len(found) != count:
        raise InputError(f"its directory has {len(found)} entries and claims {count}")
    return found


def _with_extra(extra: bytes, values: list[int]) -> list[int]:
    """`values` with those replaced that the zip64 extra field (id 1) holds."""
    at = 0
    while at < len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(wide, value) if value == _IN_EXTRA else value for value in values]
        at += 4 + length
    return values


def _data_offset(path: Path, name: str, local: int, end: int) -> int:
    if local + _LOCAL.size > end:
        raise InputError(f"member {shown(name)} lies beyond its end")
    encoded = name.encode("utf-8")
    size = min(_LOCAL.size + len(encoded), end - local)
    header = read_range(path, local, size)
    fields = _LOCAL.unpack_from(header)
    if fields[0] != b"PK\x03\x04" or header[_LOCAL.size :] != encoded:
        raise InputError(f"member {shown(name)} is not where the directory says")
    name_length, extra_length = fields[-2:]
    if name_length != len(encoded):
        raise InputError(f"member {shown(name)} is not where the directory says")
    return local + _LOCAL.size + int(name_length) + int(extra_length)
