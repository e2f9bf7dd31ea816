"""What runs without a command: the bundled model and a random 270M, within two minutes."""

from __future__ import annotations

import argparse

from .models import target
from .peers import OURS
from .run import add_output, measure
from .workloads import Plan

MODELS = ("demo", "random:OpenELM-270M")
PEERS = (OURS, "mlx-lm")
SECONDS = 100.0  # and some for what can't be cut short: making the model, the report
PLAN = Plan(
    kinds=("cold", "prefill", "decode", "batch", "speculative", "lookup"),
    prompt_tokens=(32, 512),
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The options."""
    add_output(p)


def command(args: argparse.Namespace) -> int:
    """Measure, print a table, write the results."""
    return measure([target(name) for name in MODELS], PEERS, PLAN, SECONDS, args.output)
