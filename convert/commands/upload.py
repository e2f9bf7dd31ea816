"""`openelm-convert upload DIR REPO`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_openelm.checkpoint import load_model
from mlx_openelm.errors import InputError
from mlx_openelm.files import find_in
from mlx_openelm.hub import MODEL_FILES, upload
from mlx_openelm.weight_files import find_weights

from ..card import model_card

DESCRIPTION = "Put a model directory on the Hugging Face hub, with a model card. Log in first: "
DESCRIPTION += "hf auth login."
CARD = "README.md"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("directory", type=Path, metavar="DIR", help="a model directory")
    p.add_argument("repo", metavar="REPO", help="such as someone/OpenELM-270M-4bit")
    p.add_argument("--base-model", metavar="REPO", help="what it was made from, for the card")
    p.add_argument("--license", metavar="NAME", help="as the hub calls it, for the card")
    p.add_argument("--private", action="store_true", help="if the repository is new: not public")


def command(args: argparse.Namespace) -> int:
    """Check the directory, upload it in one commit, print the address."""
    print(upload_directory(args.directory, args.repo, args.base_model, args.license, args.private))
    return 0


def upload_directory(
    directory: Path,
    repo: str,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
) -> str:
    """Check a model directory and upload it in one commit; returns the commit's address.

    Raises:
        InputError: when it isn't a model directory, or nobody may write to `repo`.
        OpenELMError: when the hub can't be reached.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    load_model(directory, lazy=True)
    files: dict[str, Path | bytes] = dict(_files(directory))
    if CARD not in files:
        files[CARD] = model_card(directory, repo, base_model, license).encode()
    return upload(repo, files, private)


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """What belongs to the model, by name: its weights, and what is beside them."""
    weights = find_weights(directory)
    for path in weights.files:
        yield path.name, path
    for name in sorted(os.listdir(directory)):
        stale = name.endswith(".safetensors.index.json") and (
            weights.index is None or name != weights.index.name
        )
        wanted = any(fnmatchcase(name, pattern) for pattern in (*MODEL_FILES, CARD))
        if wanted and not stale and not name.endswith(".safetensors"):
            yield name, find_in(directory, name) or directory / name
