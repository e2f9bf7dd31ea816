"""`openelm-convert export DIR -o OUT --format hf|corenet|gguf`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from mlx_openelm.checkpoint.hub import resolve
from mlx_openelm.command import path

from ..checkpoint import open_directory
from ..export import FORMATS, write
from .checkpoint import tell_notes
from .progress import progress, size, watched

DESCRIPTION = "Write a model directory in another format: " + "; ".join(
    f"{name}, {format.what}" for name, format in FORMATS.items()
)
DESCRIPTION += "."


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("directory", metavar="DIR", help="a model directory")
    p.add_argument("--out", "-o", type=path, required=True, metavar="OUT", help="what to make")
    p.add_argument("--format", required=True, choices=list(FORMATS))
    dtypes = dict.fromkeys(dtype for format in FORMATS.values() for dtype in format.dtypes)
    p.add_argument("--dtype", choices=list(dtypes), help="default: as stored")
    p.add_argument("--force", action="store_true", help="replace an earlier output")


def command(args: argparse.Namespace) -> int:
    """Export, say what was made."""
    model = open_directory(resolve(args.directory))
    with progress(size(model.tensors)) as report:
        model = replace(model, tensors=watched(model.tensors, report))
        notes = write(model, args.out, args.format, args.dtype, args.force)
    tell_notes(notes)
    files = [args.out] if args.out.is_file() else args.out.iterdir()
    print(f"{args.out}: {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")
    return 0
