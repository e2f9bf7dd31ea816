"""Output that is complete or not there: written beside its place, renamed at the end."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_openelm.errors import InputError, OpenELMError


@contextmanager
def new_directory(out: Path, force: bool) -> Iterator[Path]:
    """A directory beside `out` to write to, which takes `out`'s place at the end, all on disk.

    After an error nothing is left of it, and `out` is as it was. What a process left that was
    killed is removed by the next one with the same `out`: as long as a process lives, it holds a
    lock on its directory.

    Raises:
        InputError: when `out` is a file, or isn't empty and `force` isn't given.
        OpenELMError: when it can't be written.
    """
    check_target(out, force)
    out = out.absolute()
    with _beside(out) as partial:
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if out.is_dir():
            old = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
            lock = _lock(out)  # which goes along
            try:
                out.rename(old)
                try:
                    partial.rename(out)
                except OSError:
                    old.rename(out)
                    raise
                shutil.rmtree(old)
            finally:
                if lock is not None:
                    os.close(lock)
        else:
            partial.rename(out)


@contextmanager
def new_file(out: Path, force: bool) -> Iterator[Path]:
    """A file beside `out` to write to, which takes `out`'s place at the end, as `new_directory`.

    Raises:
        InputError: when `out` is a directory, or exists and `force` isn't given.
        OpenELMError: when it can't be written.
    """
    with _looking_into(out):
        if out.is_dir():
            raise InputError(f"{out} is a directory; a file is to be written")
        if out.exists() and not force:
            raise InputError(f"{out} exists (--force replaces it)")
    with _beside(out) as partial:
        yield partial / out.name
        _sync(partial / out.name)
        (partial / out.name).rename(out)


def check_target(out: Path, force: bool) -> None:
    """Refuse a directory to make that is a file, or that would be overwritten unasked.

    Raises:
        InputError: saying which.
    """
    with _looking_into(out):
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise InputError(f"{out} exists and is not a directory")
        if out.is_dir() and any(out.iterdir()) and not force:
            raise InputError(f"{out} exists and is not empty (--force replaces it)")


@contextmanager
def _looking_into(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{out}: can't be looked into ({error.strerror})") from None


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A locked directory beside `out`, which is gone at the end unless it was renamed."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_remains(out)
        partial, lock = _make(out)
        partial.chmod(0o777 & ~_umask())
    except OSError as error:
        raise OpenELMError(f"{out}: can't be written ({error.strerror})") from None
    try:
        yield partial
        _sync(out.parent)
    except OSError as error:
        raise OpenELMError(f"{out}: can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _make(out: Path) -> tuple[Path, int | None]:
    """A directory beside `out`, and its lock; None on a file system without locks.

    Until it is locked, another process may take it for remains and remove it: then there is a new
    one.
    """
    for _ in range(10):
        partial = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        lock = _lock(partial)
        if lock is not None:
            if partial.exists():
                return partial, lock
            os.close(lock)
    partial.mkdir(exist_ok=True)
    return partial, None


def _remove_remains(out: Path) -> None:
    for remains in out.parent.glob(f"{glob.escape(_prefix(out))}*"):
        lock = _lock(remains)
        if lock is not None:
            shutil.rmtree(remains, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock; None: another process does, or it is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
