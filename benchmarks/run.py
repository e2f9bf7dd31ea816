"""`run`: workloads on models, by this project and its peers in turns."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mlx_openelm.command import exit_status, path, tell
from mlx_openelm.errors import InputError, OpenELMError
from mlx_openelm.files import make_directory

from . import calibration, machine, report, results
from .measuring import measure_model
from .models import Target, check_memory, target
from .peers import OURS, PEERS
from .progress import progress
from .session import Session, busy, installed
from .workloads import KINDS, Plan

DESCRIPTION = "Measure workloads on a model, by this project and by its peers, in turns."
SHARE = 0.35  # of the time that is left, for a model that isn't the last
DRAFTS = {"demo": "demo-draft"}  # bundled model -> the draft that was distilled from it


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    defaults = Plan()
    p.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="a directory, a Hugging Face id, random:OpenELM-270M[:STORED] or demo[:STORED] "
        "(float32, bfloat16, 4bit, mxfp4, …); may be given several times (default: demo)",
    )
    p.add_argument(
        "--prompt-tokens",
        type=_numbers,
        default=defaults.prompt_tokens,
        metavar="N,…",
        help=f"lengths of the prompts (default: {','.join(map(str, defaults.prompt_tokens))})",
    )
    p.add_argument(
        "--gen-tokens", type=int, default=defaults.gen_tokens, metavar="N", help="default: 128"
    )
    p.add_argument(
        "--long-tokens",
        type=int,
        default=defaults.long_tokens,
        metavar="N",
        help="tokens of the long generation (default: %(default)s)",
    )
    p.add_argument(
        "--batch",
        type=_numbers,
        default=defaults.batches,
        metavar="N,…",
        help="sequences at once (default: 4)",
    )
    p.add_argument("--trials", type=int, default=defaults.trials, metavar="N", help="default: 5")
    p.add_argument(
        "--peers",
        type=names,
        default=(),
        metavar="NAME,…",
        help=f"to compare with: {', '.join(p for p in PEERS if p != OURS)}",
    )
    p.add_argument(
        "--workloads",
        type=names,
        default=tuple(KINDS),
        metavar="NAME,…",
        help=f"default: all, which are {', '.join(KINDS)}",
    )
    p.add_argument("--draft-model", metavar="DIR", help="for speculative (the demo has its own)")
    p.add_argument(
        "--time", type=float, metavar="SECONDS", help="end within; lengths shrink to fit"
    )
    add_output(p)


def add_output(p: argparse.ArgumentParser) -> None:
    """Where the results go."""
    p.add_argument(
        "-o",
        "--output",
        type=path,
        metavar="OUT",
        help="directory for results.json, report.md and report.html",
    )


def command(args: argparse.Namespace) -> int:
    """Measure, print a table, write the results."""
    plan = Plan(
        kinds=args.workloads,
        prompt_tokens=args.prompt_tokens,
        gen_tokens=args.gen_tokens,
        batches=args.batch,
        long_tokens=args.long_tokens,
        trials=args.trials,
        draft_model=args.draft_model,
    )
    targets = [target(name) for name in args.model or ["demo"]]
    return measure(targets, with_ours(args.peers), plan, args.time, args.output)


def with_ours(peers: Sequence[str]) -> list[str]:
    """This project, and the peers that were asked for.

    Raises:
        InputError: for one that isn't known; lists those that are.
    """
    for peer in peers:
        if peer not in PEERS:
            raise InputError(f"no peer {peer!r}; known are {', '.join(PEERS)}")
    return [OURS, *(peer for peer in peers if peer != OURS)]


def measure(
    targets: Sequence[Target],
    peers: Sequence[str],
    plan: Plan,
    seconds: float | None,
    output: Path | None,
) -> int:
    """Measure `targets` one after the other, within `seconds`; print and write what was found.

    Returns:
        The exit status: 130 after Ctrl-C, which leaves results that are marked partial.
    """
    if seconds is not None and not seconds > 0:
        raise InputError(f"--time must be more than 0 seconds, not {seconds:g}")
    if output:
        make_directory(output)
    start = time.monotonic()
    deadline = None if seconds is None else start + seconds
    command = ["python", "-m", __package__, *sys.argv[1:]]
    session = Session(command, machine.describe(), deadline)
    session.notes += busy(os.getloadavg()[0], session.machine.cores)
    peers = installed(session, peers)
    check_memory(targets, peers, session.machine.memory_bytes)
    status = 0
    try:
        with progress() as begin:
            begin("calibration", 1)()
            session.calibration.append(calibration.full())
            for i, one in enumerate(targets):
                last = i == len(targets) - 1
                budget = None if seconds is None else session.left() * (1 if last else SHARE)
                draft = plan.draft_model or DRAFTS.get(one.model.name.partition(":")[0])
                full = Plan(**{**vars(plan), "draft_model": draft})
                measure_model(session, one, peers, full, begin, budget)
                if output:
                    results.write(session.results(partial=True), output / "results.json")
            session.look_again()
    except KeyboardInterrupt as interrupt:
        status = exit_status(interrupt)
        tell("interrupted; what was measured is kept")
    found = session.results(partial=status != 0)
    report.table(found, Console())
    if output:
        _write(found, output)
    return status


def _write(found: results.Results, output: Path) -> None:
    results.write(found, output / "results.json")
    report.write_markdown([found], output / "report.md")
    tell(f"wrote {output / 'results.json'} and {output / 'report.md'}")
    try:
        report.write_html([found], output / "report.html")
        tell(f"wrote {output / 'report.html'}")
    except OpenELMError as error:  # a package that only the page needs
        tell(str(error))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, as 32,512") from None


def names(text: str) -> tuple[str, ...]:
    """What an option lists: `a,b`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
