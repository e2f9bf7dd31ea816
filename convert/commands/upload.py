"""`openelm-convert upload DIR REPO`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_openelm.checkpoint import load_model
from mlx_openelm.errors import InputError
from mlx_openelm.hub import MODEL_FILES, upload

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
    files: dict[str, Path | bytes] = {
        path.name: path
        for pattern in (*MODEL_FILES, CARD)
        for path in sorted(directory.glob(pattern))
    }
    if CARD not in files:
        files[CARD] = model_card(directory, repo, base_model, license).encode()
    return upload(repo, files, private)
