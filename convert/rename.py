"""Renames that Python lacks: one that never replaces, and one that exchanges two names."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXCLUSIVE, EXCHANGE = "exclusive", "exchange"

_AT_FDCWD = -100
# Platform -> flags, and the call that takes them. Sources: renameat2(2); renamex_np(2) and
# macOS's <sys/stdio.h>.
_FLAGS: dict[str, dict[str, int]] = {
    "linux": {EXCLUSIVE: 1, EXCHANGE: 2},
    "darwin": {EXCLUSIVE: 4, EXCHANGE: 2},
}
_CALLS: dict[str, Callable[[Any, bytes, bytes, int], int]] = {
    "linux": lambda library, a, b, flag: library.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, flag),
    "darwin": lambda library, a, b, flag: library.renamex_np(a, b, flag),
}
# What a file system answers that can't do it
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def create(made: Path, out: Path) -> None:
    """Rename `made` to `out`, which must not exist. An empty directory may give way to another.

    Raises:
        FileExistsError: when `out` exists; it is as it was.
        OSError: when it can't be renamed.
    """
    if made.is_dir():
        _create_directory(made, out)
    elif not _renamed(made, out, EXCLUSIVE):
        _create_file(made, out)


def exchange(a: Path, b: Path, aside: Path) -> None:
    """Exchange what two names stand for, at once where the system can.

    Elsewhere `b` goes to `aside`, a free name, then `a` to `b`, then `aside` to `a`.

    Raises:
        FileExistsError: when something else appeared at `b` meanwhile; then its earlier content
            may be left at `aside`.
        OSError: when they can't be renamed.
    """
    if _renamed(a, b, EXCHANGE):
        return
    os.rename(b, aside)
    try:
        create(a, b)
    except BaseException:
        create(aside, b)
        raise
    os.rename(aside, a)


def _create_directory(made: Path, out: Path) -> None:
    try:
        os.rename(made, out)  # replaces nothing but an empty directory
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out)) from None
        raise


def _create_file(made: Path, out: Path) -> None:
    try:
        os.link(made, out)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.close(os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(made, out)
    else:
        os.unlink(made)


def _renamed(a: Path, b: Path, how: str) -> bool:
    """Whether the system renamed; False where it, or the file system, has no such rename."""
    try:
        call, flag = _CALLS[sys.platform], _FLAGS[sys.platform][how]
        failed = call(_library(), os.fsencode(a), os.fsencode(b), flag)
    except (KeyError, AttributeError):  # another platform, or a C library without the function
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)
