"""`python -m mlx_openelm [COMMAND]`: the commands of the package, or one of them."""

from __future__ import annotations

import sys
from importlib import import_module
from textwrap import dedent

from . import __version__
from .command import run, wrapped
from .errors import InputError

COMMANDS = {
    "generate": "continue a prompt",
    "convert": "convert, inspect, verify, export or upload a model",
    "benchmarks": "measure the speed",
}
USAGE = """\
    usage: python -m mlx_openelm COMMAND ...

    commands (each has its --help):
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names, else print which there are."""
    return run(_command, argv)


def _command(arguments: list[str]) -> int | None:
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(f"mlx-openelm {__version__}")
    elif name in ("-h", "--help"):
        listed = "".join(f"  {name:<10}  {does}\n" for name, does in COMMANDS.items())
        print(wrapped(dedent(USAGE) + listed), end="")
    elif name in COMMANDS:
        status: int = import_module(f".{name}.__main__", __package__).main(arguments[1:])
        return status
    else:
        raise InputError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
