"""`python -m mlx_openelm.benchmarks [COMMAND]`.

Without a command: the bundled model and a random 270M, within two minutes.
"""

from __future__ import annotations

import sys
from importlib import import_module

from mlx_openelm import __version__
from mlx_openelm.command import Parser, add_debug, interruptible, run

# Command -> its module, and what it does
COMMANDS = {
    "run": ("run", "workloads on a model, against its peers"),
    "paper": ("paper", "the OpenELM paper's protocol: four sizes in 16 and in 4 bits"),
    "report": ("report", "one report over several machines or runs"),
    "compare": ("compare", "what got faster or slower between two runs"),
    "speed": ("speed", "this project's figures: ratios to its peers"),
    "startup": ("startup", "process start to first token, against mlx_lm.generate"),
    "convert": ("conversion", "converting a checkpoint, against PyTorch"),
}
DEFAULT = "default"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Only its own module is imported."""
    return run(_command, argv)


def _command(given: list[str]) -> int | None:
    chosen = next((word for word in given if word in COMMANDS), None)
    parser = Parser(prog="python -m mlx_openelm.benchmarks", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mlx-openelm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    module = import_module(f".{COMMANDS[chosen][0] if chosen else DEFAULT}", __package__)
    if not chosen:
        module.add_arguments(parser)
        add_debug(parser)
    for name, (_, what) in COMMANDS.items():
        p = commands.add_parser(name, help=what)
        if name == chosen:
            p.description = module.DESCRIPTION
            module.add_arguments(p)
            add_debug(p)
    args = parser.parse_args(given)
    with interruptible():
        status: int | None = module.command(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
