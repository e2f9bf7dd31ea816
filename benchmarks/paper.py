"""The OpenELM paper's protocol (arXiv 2404.14619, section 4): four sizes, 16-bit and 4-bit.

A prompt of 35 to 36 tokens, 1,024 tokens generated, one sequence, key/value cache on; prompt
processing and generation told apart, after a run that doesn't count.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from mlx_openelm.command import tell
from mlx_openelm.config import PUBLISHED
from mlx_openelm.errors import InputError

from . import machine
from .models import Target, check_memory, target
from .peers import OURS, PEERS
from .run import add_output, measure, names, with_ours
from .workloads import Plan

DESCRIPTION = "The OpenELM paper's protocol: four sizes in 16 and in 4 bits, random weights."
STORED = ("bfloat16", "4bit")
PROMPT_TOKENS, GEN_TOKENS = 36, 1024


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument(
        "--sizes", type=names, default=tuple(PUBLISHED), metavar="NAME,…", help="default: all"
    )
    p.add_argument("--gen-tokens", type=int, default=GEN_TOKENS, metavar="N", help="default: 1024")
    p.add_argument("--trials", type=int, default=5, metavar="N", help="default: 5")
    p.add_argument(
        "--peers",
        type=names,
        default=(),
        metavar="NAME,…",
        help=f"to compare with: {', '.join(p for p in PEERS if p != OURS)}",
    )
    p.add_argument(
        "--time", type=float, metavar="SECONDS", help="end within; lengths shrink to fit"
    )
    add_output(p)


def command(args: argparse.Namespace) -> int:
    """Measure what fits into memory, print a table, write the results."""
    for size in args.sizes:
        if size not in PUBLISHED:
            raise InputError(f"no size {size!r}; known are {', '.join(PUBLISHED)}")
    peers = with_ours(args.peers)
    plan = Plan(
        kinds=("prefill", "decode"),
        prompt_tokens=(PROMPT_TOKENS,),
        gen_tokens=args.gen_tokens,
        trials=args.trials,
    )
    targets = [target(f"random:{size}:{stored}") for size in args.sizes for stored in STORED]
    fitting = list(_fitting(targets, peers))
    if not fitting:
        raise InputError("none of these models fits into this machine's memory")
    return measure(fitting, peers, plan, args.time, args.output)


def _fitting(targets: Sequence[Target], peers: Sequence[str]) -> Iterator[Target]:
    memory = machine.describe().memory_bytes
    for one in targets:
        try:
            check_memory([one], peers, memory)
        except InputError as error:
            tell(f"left out: {error}")
        else:
            yield one
