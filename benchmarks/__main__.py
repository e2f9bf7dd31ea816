"""`python -m mlx_openelm.benchmarks COMMAND`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from mlx_openelm import __version__
from mlx_openelm.command import add_debug, run

# Command -> its module, and what it measures
COMMANDS = {
    "run": ("run", "workloads on a model, against its peers"),
    "startup": ("startup", "process start to first token, against mlx_lm.generate"),
    "convert": ("conversion", "converting a checkpoint, against PyTorch"),
    "report": ("report", "one report over several machines or runs"),
    "compare": ("compare", "what got faster or slower between two runs"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlx_openelm.benchmarks", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mlx-openelm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, (module, what) in COMMANDS.items():
        modules[name] = import_module(f".{module}", __package__)
        p = commands.add_parser(name, help=what, description=modules[name].DESCRIPTION)
        modules[name].add_arguments(p)
        add_debug(p)
    args = parser.parse_args(argv)
    return run(modules[args.command].command, args)


if __name__ == "__main__":
    sys.exit(main())
