"""`openelm-convert verify DIR --against SOURCE`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_openelm.checkpoint.hub import resolve
from mlx_openelm.errors import InputError

from ..checkpoint import Checkpoint, open_directory
from ..verify import TOKENS, Verdict, verify
from ..writer import without_redundant_head
from .checkpoint import add_source_options, checkpoint_of, tell_notes
from .progress import progress, size, watched

DESCRIPTION = "Compare a model directory with the checkpoint that it was made from: their tensors, "
DESCRIPTION += "and what both compute from the same tokens, in float32. Exit status 0: within the "
DESCRIPTION += "bounds; 1: beyond one."


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("directory", metavar="DIR", help="a model directory")
    p.add_argument("--against", required=True, metavar="SOURCE", help="what it was made from")
    p.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"default: {TOKENS}")
    add_source_options(p.add_argument_group("which weights of SOURCE"))


def command(args: argparse.Namespace) -> int:
    """Compare, print, and tell by the exit status."""
    if args.tokens < 1:
        raise InputError(f"--tokens must be at least 1, not {args.tokens}")
    converted = open_directory(resolve(args.directory))
    checkpoint = checkpoint_of(args.against, args, converted.config)
    tell_notes([*converted.notes, *checkpoint.notes])
    return compare(converted, checkpoint, args.tokens)


def compare_with_source(directory: Path, checkpoint: Checkpoint) -> int:
    """Compare a directory that was just made with what it was made from; as `compare`."""
    return compare(open_directory(directory), checkpoint, TOKENS)


def compare(converted: Checkpoint, checkpoint: Checkpoint, count: int) -> int:
    """Compare a model directory with a source; prints the verdict, returns the exit status."""
    source, _ = without_redundant_head(checkpoint.tensors, checkpoint.config)
    # Each tensor is read twice: to compare it, and to run the model.
    with progress(2 * (size(source) + size(converted.tensors))) as read:
        verdict = verify(
            watched(source, read),
            checkpoint.config,
            watched(converted.tensors, read),
            converted.config,
            converted.source.quantization,
            count=count,
        )
    print(report(verdict, count))
    return 0 if verdict.passed else 1


def report(verdict: Verdict, count: int) -> str:
    """The verdict, in lines."""
    lines = [f"{name:<12} {apart:.2e}" for name, apart in verdict.stages]
    return "\n".join(
        [
            f"relative difference after each stage, {count} tokens:",
            *lines,
            f"first apart: {verdict.first_apart or 'nowhere'}",
            f"logits: largest difference {verdict.largest:.3g}, mean {verdict.mean:.3g}; KL "
            f"divergence {verdict.divergence:.3g} nats; same likeliest token at "
            f"{verdict.agreement:.0%} of positions",
            _last_line(verdict),
        ]
    )


def _last_line(verdict: Verdict) -> str:
    if verdict.damaged:
        name, apart, bound = verdict.damaged[0]
        more = f", and {len(verdict.damaged) - 1} more" if len(verdict.damaged) > 1 else ""
        return f"FAILED: {name} differs by {apart:.2e}, rounding by at most {bound:g}{more}"
    if not verdict.passed:
        return f"FAILED: beyond {verdict.bound:g}, first at {verdict.parting}"
    return f"passed: {verdict.stages[-1][1]:.2e} is within {verdict.bound:g}"
