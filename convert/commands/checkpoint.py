"""The options that say which weights are meant, and what they stand for."""

from __future__ import annotations

import argparse

from mlx_openelm.command import path, tell
from mlx_openelm.config import OpenELMConfig

from ..checkpoint import Checkpoint, open_checkpoint


def add_source_options(p: argparse._ActionsContainer) -> None:
    """The options that `checkpoint_of` looks at."""
    p.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help="CoreNet's training YAML or a config.json, where the checkpoint has none "
        "(default: inferred from the tensors' shapes)",
    )
    p.add_argument(
        "--ema", action="store_true", help="of a full training checkpoint, the averaged weights"
    )
    p.add_argument(
        "--base", metavar="SOURCE", help="the weights that an adapter is to be merged into"
    )
    p.add_argument(
        "--lora-alpha",
        type=float,
        metavar="N",
        help="of a LoRA or DoRA adapter (default: from its config, or the training YAML)",
    )
    p.add_argument("--revision", help="branch, tag or commit on the Hugging Face hub")


def checkpoint_of(
    source: str, args: argparse.Namespace, known: OpenELMConfig | None = None
) -> Checkpoint:
    """The checkpoint that a name and these options stand for (see `open_checkpoint`)."""
    return open_checkpoint(
        source,
        config=args.config,
        base=args.base,
        lora_alpha=args.lora_alpha,
        ema=args.ema,
        revision=args.revision,
        known=known,
    )


def tell_notes(notes: list[str]) -> None:
    """Say each note in a line."""
    for note in notes:
        tell(note)
