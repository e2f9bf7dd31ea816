"""Reads files that a user names, and files in untrusted directories.

Everything that is read from such a place goes through here: the path is expanded, the kind and
the size of the file are checked before a byte is read, and text may have any of the encodings
that editors write.
"""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError

MAX_TEXT = 64 << 20
"""Bytes. The largest text file that is read: a `tokenizer.json` of 256,000 pieces has 35 MB."""

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def user_path(path: str | Path) -> Path:
    """A path as a user gives it: `~` and `~name` stand for home directories.

    Raises:
        InputError: when the path is empty, holds a null byte, or names an unknown user's home.
    """
    text = os.fspath(path)
    if not text:
        raise InputError("an empty path was given; name a file or a directory")
    if "\0" in text:
        raise InputError(f"{shown(text)}: a path can't hold a null byte")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{text}: there is no such user's home directory") from None


def find_in(directory: Path, name: str) -> Path | None:
    """`directory / name` if there is such an entry, else None.

    Links are followed as long as they end inside the directory, or in the blobs of the hub's
    cache when the directory is a snapshot there (`models--OWNER--NAME/snapshots/COMMIT`).

    Raises:
        InputError: when the entry is a link to anything else: an untrusted directory must not
            make this program read, copy or upload other files of the user.
    """
    path = directory / name
    try:
        if not os.path.lexists(path):
            return None
        real = path.resolve(strict=True)
        root = directory.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise _unreadable(path, error) from None
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(
            f"{path}: a link to a file outside its directory, which isn't followed; put a copy "
            "of the file there if you trust it"
        )
    return path


def open_file(path: Path, limit: int | None = None) -> BinaryIO:
    """A regular file, opened for reading, unbuffered kinds refused at once.

    Args:
        path: the file.
        limit: bytes; a larger file is refused.

    Raises:
        InputError: when there is no such file, it isn't a regular one (a FIFO, a device, a
            directory), or it is too large.
    """
    try:
        # A FIFO without a writer would block in open() for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        status = os.fstat(descriptor)
        _check(path, status, limit)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def file_size(path: Path, limit: int | None = None) -> int:
    """Bytes of a regular file, at most `limit`.

    Raises:
        InputError: as `open_file`.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    _check(path, status, limit)
    return status.st_size


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` (both in bytes; the range must lie in the file).

    Raises:
        InputError: when the file can't be read, or has become shorter.
    """
    try:
        with open_file(path) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(data) < size:
        raise InputError(f"{path}: ends at byte {offset + len(data)}; it is truncated")
    return data


def read_bytes(path: Path, limit: int = MAX_TEXT) -> bytes:
    """All of a regular file.

    Raises:
        InputError: as `open_file`; and when reading fails.
    """
    try:
        with open_file(path, limit) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(data) > limit:
        raise InputError(f"{path}: has grown beyond {limit} bytes while it was read")
    return data


def decode_text(data: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 with one; line ends become `\\n`.

    Raises:
        InputError: starting with `where`, when the bytes are none of these.
    """
    encoding = "utf-8"
    for bom, name in _BOMS:
        if data.startswith(bom):
            data, encoding = data[len(bom) :], name
            break
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not {encoding.upper()} at byte {error.start}; save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def without_bom(data: bytes, where: str) -> bytes:
    """Text as UTF-8 without a byte order mark, which few programs read; other bytes as they are.

    Raises:
        InputError: starting with `where`, when what follows the mark isn't in its encoding.
    """
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            try:
                return data[len(bom) :].decode(encoding).encode()
            except UnicodeError:
                raise InputError(f"{where}: not {encoding.upper()}; save it as UTF-8") from None
    return data


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """The text in a file (see `decode_text`).

    Raises:
        InputError: when it can't be read, is too large, or isn't text.
    """
    return decode_text(read_bytes(path, limit), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in bytes; stricter than `json`: no key twice, no huge integers.

    Raises:
        InputError: starting with `where`.
    """
    text = decode_text(data, where)
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise InputError(f"{where}: not a JSON file (nested too deeply)") from None
    except ValueError as error:
        raise InputError(f"{where}: not a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: holds a JSON {type(values).__name__}, not an object")
    return values


def read_json(path: Path, limit: int = MAX_TEXT) -> dict[str, Any]:
    """The JSON object in a file (see `parse_json`).

    Raises:
        InputError: when it can't be read, is too large, or holds something else.
    """
    return parse_json(read_bytes(path, limit), str(path))


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, plain values only.

    Raises:
        InputError: when it can't be read.
    """
    import yaml

    text = read_text(path, 1 << 20)
    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a YAML file ({reason})") from None


def sync(descriptor: int) -> None:
    """Flush an open file or directory to the disk itself.

    On macOS fsync leaves the data in the drive's cache; F_FULLFSYNC flushes that too, on file
    systems that have it. Source: fsync(2) of macOS.

    Raises:
        OSError: when it can't be flushed.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
        except OSError:  # a network's file system, mostly
            pass
        else:
            return
    os.fsync(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path`, on the disk, when the block ends without an error.

    Until then it has a random name in the same directory, so that threads and processes may write
    the same file, and what a killed process left disturbs nobody. If `path` is a link, the file
    that it leads to is replaced.

    Raises:
        InputError: when something other than a regular file is there.
        OSError: when it can't be written.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file")
    path = path.resolve()
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        sync(directory)
    finally:
        os.close(directory)


def make_directory(path: Path) -> None:
    """Make a directory for output, and those above it; one that is there is kept.

    Raises:
        InputError: when it can't be made, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{path}: is a file, not a directory") from None
    except OSError as error:
        raise InputError(f"{path}: can't be made ({error.strerror})") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: nothing can be written there")


def shown(text: object) -> str:
    """An untrusted text (a name, say), quoted and fit for one line of an error message."""
    text = str(text)
    return repr(text if len(text) <= 100 else text[:100] + "…")


def brief(value: object) -> str:
    """An untrusted value (a number, a list), fit for one line of an error message."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"


def _check(path: Path, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    if limit is not None and status.st_size > limit:
        raise InputError(
            f"{path}: has {status.st_size} bytes; no such file needs more than {limit}"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{shown(key)} is there twice")
        values[key] = value
    return values


def _integer(digits: str) -> int:
    if len(digits) > 100:  # transformers writes a model_max_length of 31
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: No such file or directory")
    reason = (isinstance(error, OSError) and error.strerror) or error
    return InputError(f"{path}: can't be read ({reason})")
