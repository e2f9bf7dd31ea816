"""`openelm-convert upload DIR REPO`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_openelm.checkpoint.directory import load_model
from mlx_openelm.checkpoint.hub import BUNDLED, upload
from mlx_openelm.checkpoint.weight_files import find_weights
from mlx_openelm.command import path
from mlx_openelm.errors import InputError
from mlx_openelm.files import MAX_TEXT, file_size, find_in

from ..card import model_card
from ..outputs import files_in

DESCRIPTION = "Put a model directory on the Hugging Face hub, with a model card. Log in first: "
DESCRIPTION += "hf auth login."
CARD = "README.md"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("directory", type=path, metavar="DIR", help="a model directory")
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
        OpenELMError: when uploading fails.
    """
    if not directory.is_dir():
        if str(directory) in BUNDLED:
            raise InputError(
                f"{directory}: comes with mlx-openelm and is not uploaded; name a directory"
            )
        raise InputError(f"{directory}: no such directory")
    files = _files(directory)
    load_model(directory, lazy=True)
    if CARD not in files:
        files[CARD] = model_card(directory, repo, base_model, license).encode()
    return upload(repo, files, private)


def _files(directory: Path) -> dict[str, Path | bytes]:
    """What belongs to a model directory, by name. Links out of it are refused."""
    weights = find_weights(directory)
    index = weights.index.name if weights.index else None
    files: dict[str, Path | bytes] = {file.name: file for file in weights.files}
    for name in [*files_in(directory), CARD]:
        file = find_in(directory, name)
        of_other_weights = name.endswith(".safetensors") or (
            name.endswith(".safetensors.index.json") and name != index
        )
        if file is not None and not of_other_weights:
            file_size(file, MAX_TEXT)  # of a regular file
            files[name] = file
    return files
