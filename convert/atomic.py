"""Output that is complete or not there: written beside its place, renamed at the end.

Nothing is removed or replaced that this program hasn't written. A killed run leaves the old
output or the new one at its place; without the system's exchange of two names, or in the work
directory beside it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from mlx_openelm.command import tell
from mlx_openelm.errors import InputError, OpenELMError
from mlx_openelm.files import sync

from . import outputs
from .rename import create, exchange
from .targets import WhyNot, check_directory, check_file, check_ours, name_of

_MARKER = "mlx-openelm-partial"
"""A file in a work directory, as long as all that is in there may be removed."""
_NEW, _ASIDE = "new", "old"
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def new_directory(out: Path, force: bool, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """A directory beside `out` to write to, which takes `out`'s place at the end, all on disk.

    After an error nothing is left of it, and `out` is as it was.

    Args:
        out: where it goes; may be an empty directory.
        force: replace `out` if it is a directory that this program wrote.
        reads: files and directories that are being read, which must not be replaced.

    Raises:
        InputError: see `check_directory`; also when something appears at `out` meanwhile.
        OpenELMError: when it can't be written.
    """
    place = check_directory(out, force, reads)
    with _work(out, place) as work:
        made = work / _NEW / place.name
        made.mkdir()
        yield made
        _sync_tree(made)
        _put(work, {place: outputs.why_not_ours}, force)


@contextmanager
def new_files(
    outs: Mapping[Path, WhyNot], force: bool, reads: Iterable[Path] = ()
) -> Iterator[list[Path]]:
    """Files beside `outs` to write to, which take their places at the end: all of them or none.

    Args:
        outs: where they go, all in one directory; each with why what is there can't be replaced.
        force: replace those that exist.
        reads: as in `new_directory`.

    Raises:
        InputError: see `check_file`; also when something appears there meanwhile.
        OpenELMError: when they can't be written.
    """
    reads = list(reads)
    places = {check_file(out, force, why, reads): why for out, why in outs.items()}
    with _work(next(iter(outs)), next(iter(places))) as work:
        made = [work / _NEW / place.name for place in places]
        yield made
        for file in made:
            _sync(file)
        _put(work, places, force)


@contextmanager
def _work(out: Path, place: Path) -> Iterator[Path]:
    """A locked work directory beside `place`, which is gone at the end."""
    with ExitStack() as stack:
        try:
            _make_parents(place.parent, stack)
            _remove_remains(place)
            work, lock = _make(place)
        except OSError as error:
            raise OpenELMError(f"{name_of(out)}: can't be written ({error.strerror})") from None
        if lock is not None:
            stack.callback(os.close, lock)
        stack.callback(_discard, work)
        try:
            yield work
            _sync(place.parent)
        except OSError as error:
            reason = error.strerror or error
            raise OpenELMError(f"{name_of(out)}: can't be written ({reason})") from None


def _make_parents(parent: Path, stack: ExitStack) -> None:
    """Make what is missing; those that are empty at the end are removed."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        stack.callback(_remove_empty, path)


def _put(work: Path, places: Mapping[Path, WhyNot], force: bool) -> None:
    """Give the new files, or the directory, their places: all of them, or after an error none."""
    undo: list[Callable[[], None]] = []
    try:
        for place, why_not in places.items():
            made = work / _NEW / place.name
            try:
                create(made, place)
                undo.append(partial(create, place, made))
            except FileExistsError:
                if not force:
                    raise InputError(
                        f"{name_of(place)}: something appeared there meanwhile, which stays; the "
                        "new output was not written"
                    ) from None
                _replace(work, made, place, why_not)
                undo.append(partial(exchange, made, place, work / _ASIDE))
    except BaseException:
        for step in reversed(undo):
            step()
        if not os.path.lexists(work / _ASIDE):
            (work / _MARKER).touch()
        raise
    (work / _MARKER).touch()


def _replace(work: Path, made: Path, place: Path, why_not: WhyNot) -> None:
    """Exchange both; without its marker, no later run removes the work directory meanwhile."""
    check_ours(place, place, why_not)
    (work / _MARKER).unlink(missing_ok=True)
    exchange(made, place, work / _ASIDE)
    try:
        check_ours(made, place, why_not)
    except BaseException:
        exchange(made, place, work / _ASIDE)
        raise


def _prefix(place: Path) -> str:
    return f".{place.name[:40]}.partial-"


def _make(place: Path) -> tuple[Path, int | None]:
    """A work directory beside `place`, and its lock; None on a file system without locks.

    Until it is locked, another process may take it for remains and remove it: then there is a new
    one.
    """
    for _ in range(10):
        work = Path(tempfile.mkdtemp(prefix=_prefix(place), dir=place.parent))
        try:
            lock = _lock(work)
            if lock is None:
                continue
        except OSError:
            lock = None
        try:
            (work / _MARKER).touch()
            (work / _NEW).mkdir()
        except FileNotFoundError:
            if lock is not None:
                os.close(lock)
            continue
        return work, lock
    raise OSError(errno.EBUSY, "other runs remove what this one makes")


def _remove_remains(place: Path) -> None:
    """Remove what killed runs left; say so where it may be an earlier output."""
    for remains in place.parent.glob(f"{glob.escape(_prefix(place))}????????"):
        if remains.is_symlink() or not remains.is_dir():
            continue
        try:
            lock = _lock(remains)
        except OSError:
            continue
        if lock is None:
            continue
        try:
            _discard(remains)
            if (remains / _NEW).is_dir():
                tell(
                    f"{name_of(remains)}: left by a run that was killed while it replaced its "
                    "output; has the old one or the new one: look, then delete it"
                )
        finally:
            os.close(lock)


def _discard(work: Path) -> None:
    """Remove a work directory that is marked or empty; what this program doesn't write stays."""
    with suppress(OSError):
        if (work / _MARKER).is_file():
            if (work / _NEW).is_dir():
                for made in (work / _NEW).iterdir():
                    outputs.remove(made)
                (work / _NEW).rmdir()
            (work / _MARKER).unlink()
        work.rmdir()


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock; None: another process does, or it is gone.

    Raises:
        OSError: when the file system has no locks.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    """Flush a file or a directory; some file systems can't flush a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
