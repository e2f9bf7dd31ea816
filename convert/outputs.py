"""What this program writes: the names of its files, and how its earlier output is known."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_openelm.errors import InputError
from mlx_openelm.files import file_size, find_in, parse_json, read_json, read_range
from mlx_openelm.tokenizer.chat_files import LEGACY_FILE, TEMPLATE_DIRECTORY, TEMPLATE_FILE
from mlx_openelm.tokenizer.files import CARRIED, GENERATION

PROGRAM = "mlx-openelm"
MARK = {"writer": PROGRAM}
"""In the metadata of the safetensors files of an export, which has no `conversion.json`."""

RECORD = "conversion.json"
FILES = (
    "config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    *CARRIED,
    GENERATION,
    TEMPLATE_FILE,
    LEGACY_FILE,
    RECORD,
)
_TEMPLATE = "*.jinja"
_FINDER = ".DS_Store"  # which macOS puts into directories that were looked at

_MAX_HEADER = 8 << 20  # bytes


def files_in(directory: Path) -> list[str]:
    """The names of the files in a directory that are named as this program names its own.

    Those in `additional_chat_templates/` are named with it. Nothing is opened.

    Raises:
        InputError: when that is a link out of the directory.
    """
    found = [name for name in sorted(os.listdir(directory)) if _named(name)]
    templates = find_in(directory, TEMPLATE_DIRECTORY)
    if templates is not None and templates.is_dir():
        inside = sorted(os.listdir(templates))
        found += [f"{TEMPLATE_DIRECTORY}/{name}" for name in inside if fnmatchcase(name, _TEMPLATE)]
    return found


def why_not_ours(directory: Path) -> str | None:
    """Why a directory isn't one that this program wrote, in words; None: it is, or it is empty.

    All its entries must be regular files with names of `FILES` (or `additional_chat_templates`
    with templates in it), and there must be our `conversion.json`, or the mark in the weights.

    Raises:
        OSError: when it can't be listed.
    """
    if directory.is_symlink() or not directory.is_dir():
        return "isn't a directory"
    entries = [entry for entry in os.scandir(directory) if entry.name != _FINDER]
    for entry in entries:
        if entry.name == TEMPLATE_DIRECTORY and entry.is_dir(follow_symlinks=False):
            if any(
                not (fnmatchcase(inside.name, _TEMPLATE) and inside.is_file(follow_symlinks=False))
                for inside in os.scandir(entry.path)
            ):
                return f"holds {TEMPLATE_DIRECTORY} with other files than templates"
        elif not (_named(entry.name) and entry.is_file(follow_symlinks=False)):
            return f"holds {entry.name!a}, which {PROGRAM} doesn't write"
    if entries and not (_is_marked(directory) or _has_record(directory)):
        return f"holds files that {PROGRAM} hasn't written"
    return None


def starts_like(what: str, fits: Callable[[bytes], bool]) -> Callable[[Path], str | None]:
    """Why a file isn't `what`, judged by its first 4096 bytes; None: it is, or it is empty."""

    def why_not(file: Path) -> str | None:
        if file.is_symlink() or not file.is_file():
            return "isn't a regular file"
        start = read_range(file, 0, min(file_size(file), 4096))
        return None if not start or fits(start) else f"isn't {what}"

    return why_not


def remove(made: Path) -> None:
    """Remove a file; or a directory's files that this program writes, and it if it is empty then.

    Raises:
        OSError: when it can't be removed, or holds something else.
    """
    if made.is_symlink() or not made.is_dir():
        made.unlink()
        return
    for entry in list(os.scandir(made)):
        if entry.name == TEMPLATE_DIRECTORY and entry.is_dir(follow_symlinks=False):
            for template in Path(entry.path).glob(_TEMPLATE):
                template.unlink()
            os.rmdir(entry.path)
        elif _named(entry.name) or entry.name == _FINDER:
            os.unlink(entry.path)
    made.rmdir()


def _named(name: str) -> bool:
    name = name.removeprefix("._")  # where macOS keeps attributes on foreign file systems
    return any(fnmatchcase(name, pattern) for pattern in FILES)


def _is_marked(directory: Path) -> bool:
    weights = sorted(directory.glob("model*.safetensors"))
    return bool(weights) and all(map(_file_is_marked, weights))


def _file_is_marked(file: Path) -> bool:
    with suppress(InputError):
        size = int.from_bytes(read_range(file, 0, 8), "little")
        if size <= _MAX_HEADER:
            header = parse_json(read_range(file, 8, size), str(file))
            metadata = header.get("__metadata__")
            return isinstance(metadata, dict) and metadata.items() >= MARK.items()
    return False


def _has_record(directory: Path) -> bool:
    with suppress(InputError):
        record = read_json(directory / RECORD)
        versions = record.get("versions")
        return isinstance(versions, dict) and PROGRAM in versions and "tensors" in record
    return False
