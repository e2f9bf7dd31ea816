"""`openelm-convert upload DIR REPO`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_openelm.checkpoint import load_model
from mlx_openelm.command import path
from mlx_openelm.errors import InputError
from mlx_openelm.files import file_size, find_in
from mlx_openelm.hub import BUNDLED, upload
from mlx_openelm.weight_files import find_weights

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
    if not args.directory.is_dir():
        if str(args.directory) in BUNDLED:
            raise InputError(
                f"{args.directory}: comes with mlx-openelm and is not uploaded; name a directory"
            )
        raise InputError(f"{args.directory}: no such directory")
    files = _files(args.directory)
    load_model(args.directory, lazy=True)
    if CARD not in files:
        card = model_card(args.directory, args.repo, args.base_model, args.license)
        files[CARD] = card.encode()
    print(upload(args.repo, files, args.private))
    return 0


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
            file_size(file)  # of a regular file
            files[name] = file
    return files
