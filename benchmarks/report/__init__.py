"""Results, once measured, as people read them: on the terminal, as Markdown, as a page, as PNGs.

    python -m mlx_openelm.benchmarks report OUT/*.json -o FOLDER

`wording` has the words and numbers, `findings` what follows from the trials, `charts` what the
charts show; the other files put that into one form each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_openelm.command import path, tell
from mlx_openelm.errors import InputError
from mlx_openelm.files import make_directory

from ..results import read
from .html import write_html
from .markdown import write_markdown
from .png import write_pngs
from .terminal import table

__all__ = ["table", "write_html", "write_markdown", "write_pngs"]

DESCRIPTION = "One report over several machines or runs: report.html and report.md."


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("results", type=path, nargs="+", metavar="FILE", help="a results.json")
    p.add_argument("-o", "--output", type=path, required=True, metavar="FOLDER")
    p.add_argument("--png", action="store_true", help="the charts as PNGs too")


def command(args: argparse.Namespace) -> int:
    """Read all files, then write; says where."""
    results = [read(file) for file in args.results]
    folder: Path = args.output
    make_directory(folder)
    try:
        write_markdown(results, folder / "report.md")
        write_html(results, folder / "report.html")
        written = [folder / "report.html", folder / "report.md"]
        if args.png:
            written += write_pngs(results, folder)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from None
    for file in written:
        tell(f"wrote {file}")
    return 0
