"""`python -m mlx_openelm.convert`: other people's checkpoints -> a model directory, and back."""

from __future__ import annotations

import argparse
import os
import sys
from difflib import get_close_matches
from importlib import import_module
from textwrap import fill
from typing import Any

from mlx_openelm import __version__
from mlx_openelm.command import Parser, add_debug, interruptible, run, terminal_columns
from mlx_openelm.errors import InputError

PROGRAM = "openelm-convert"
# Commands beside converting itself, each a module of `commands`
COMMANDS = {
    "inspect": "say what a checkpoint is, and what would be made of it",
    "verify": "compare a model directory with its source",
    "export": "write a model directory in another runtime's format",
    "upload": "put a model directory on the Hugging Face hub",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    # Merged adapters, trial runs and `verify` need float32, and a GPU may multiply it in TF32. MLX
    # looks at its first product.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    return run(_command, argv)


def _command(arguments: list[str]) -> int | None:
    name = arguments[0] if arguments and arguments[0] in COMMANDS else None
    if name is None and len(arguments) > 1:
        _check_spelling(arguments[0])
    module = import_module(f".commands.{name or 'convert'}", __package__)
    args = parser(name, module).parse_args(arguments[bool(name) :])
    with interruptible():
        status: int | None = module.command(args)
    return status


def _check_spelling(word: str) -> None:
    """Refuse what is nearly the name of a command and no file, instead of converting it."""
    meant = get_close_matches(word, COMMANDS, n=1, cutoff=0.75)
    if meant and not os.path.lexists(word):
        raise InputError(f"{word}: no such command or file; did you mean {PROGRAM} {meant[0]}?")


def parser(name: str | None, command: Any) -> argparse.ArgumentParser:
    """The parser of one of `COMMANDS`, or without a name of converting."""
    others = "".join(f"\n  {PROGRAM} {name:<8} {does}" for name, does in COMMANDS.items())
    p = Parser(
        prog=f"{PROGRAM} {name}" if name else PROGRAM,
        description=fill(command.DESCRIPTION, terminal_columns() - 2),
        epilog=None if name else f"other commands (each has its --help):{others}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(p)
    p.add_argument("--version", action="version", version=f"mlx-openelm {__version__}")
    add_debug(p)
    return p


if __name__ == "__main__":
    sys.exit(main())
