"""Where output may go: nothing that this program hasn't written is replaced, nor what is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_openelm.checkpoint.hub import MODEL_FILES, PICKLED_FILES
from mlx_openelm.errors import InputError
from mlx_openelm.files import shown

from .outputs import why_not_ours

WhyNot = Callable[[Path], str | None]
"""Why what is at a path can't be replaced, in words; None: it can."""


def check_directory(out: Path, force: bool, reads: Iterable[Path] = ()) -> Path:
    """Refuse a directory to make that is something else, or that must not be replaced.

    Returns:
        The path without links.

    Raises:
        InputError: when it is a link, a file or a mount point; the current directory, the home
            directory, or one that holds them or anything of `reads`; when it holds what this
            program hasn't written; or when it isn't empty and `force` isn't given.
    """
    with _looking_into(out):
        place = _resolved(out)
        if not os.path.lexists(place):
            return place
        if not place.is_dir():
            raise InputError(f"{name_of(out)} exists and is not a directory")
        if os.path.ismount(place):
            raise InputError(f"{name_of(out)}: a mount point; name a directory in it")
        _refuse_above(out, place, reads)
        check_ours(place, out, why_not_ours)
        if any(place.iterdir()) and not force:
            raise InputError(f"{name_of(out)} exists and is not empty (--force replaces it)")
        return place


def check_file(out: Path, force: bool, why_not: WhyNot, reads: Iterable[Path] = ()) -> Path:
    """Refuse a file to make that is something else, or that must not be replaced.

    Returns:
        The path without links.

    Raises:
        InputError: when it is a link, a directory or no regular file; one of `reads`, or a
            model's file in one of them; when `why_not` gives a reason; or when it exists and
            `force` isn't given.
    """
    with _looking_into(out):
        place = _resolved(out)
        if not os.path.lexists(place):
            return place
        if place.is_dir():
            raise InputError(f"{name_of(out)} is a directory; a file is to be written")
        if not place.is_file():
            raise InputError(f"{name_of(out)} exists and is not a regular file")
        if _identity(place) in set(map(_identity, _files_of(reads))):
            raise InputError(f"{name_of(out)}: is being read; choose another name")
        if not force:
            raise InputError(f"{name_of(out)} exists (--force replaces it)")
        check_ours(place, out, why_not)
        return place


def _resolved(out: Path) -> Path:
    if out.is_symlink():
        raise InputError(f"{name_of(out)}: a symbolic link; name what is to be written itself")
    try:
        place = out.resolve()
    except RuntimeError:
        raise InputError(f"{name_of(out)}: its links go in a circle") from None
    if not place.name:
        raise InputError(f"{name_of(out)}: is the root directory; choose another name")
    return place


def _refuse_above(out: Path, place: Path, reads: Iterable[Path]) -> None:
    """Refuse a directory that is, or holds, the current one, the home or anything of `reads`."""
    here = _identity(place)
    for what, paths in (
        ("the current directory", _existing(os.getcwd)),
        ("the home directory", _existing(lambda: os.path.expanduser("~"))),
        ("what is being read", _files_of(reads)),
    ):
        for path in paths:
            for real in {Path(os.path.abspath(path)), Path(os.path.realpath(path))}:
                if here in map(_identity, (real, *real.parents)):
                    raise InputError(
                        f"{name_of(out)}: is, or holds, {what} ({name_of(path)}); choose "
                        "another name"
                    )


def _existing(find: Callable[[], str]) -> list[Path]:
    try:
        return [Path(find())]
    except OSError:  # the current directory was removed
        return []


def _files_of(reads: Iterable[Path]) -> Iterator[Path]:
    """The paths themselves, and a directory's files that a model may be read from."""
    for path in reads:
        yield path
        if path.is_dir():
            for pattern in {*MODEL_FILES, *PICKLED_FILES}:
                yield from path.glob(pattern)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode: the same for every spelling of a path."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _looking_into(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{name_of(out)}: can't be looked into ({error.strerror})") from None


def check_ours(path: Path, place: Path, why_not: WhyNot) -> None:
    """Refuse to replace what is at `path` and is, or was, at `place`.

    Raises:
        InputError: with the reason that `why_not` gives.
    """
    reason = why_not(path)
    if reason is not None:
        raise InputError(f"{name_of(place)}: {reason}; it is never replaced: choose another name")


def name_of(path: Path) -> str:
    """A path in an error message: one line, whatever characters it has."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 300 else shown(text)
