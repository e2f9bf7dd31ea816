"""The options that say which weights are meant, and what they stand for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_openelm.command import tell
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.hub import resolve_source

from ..geometry import infer_config
from ..names import map_names
from ..sources import LazyTensor, Source, open_source


@dataclass(frozen=True)
class Checkpoint:
    """A source with its tensors by the names of a model directory, and the geometry."""

    source: Source
    tensors: dict[str, LazyTensor]
    config: OpenELMConfig
    notes: list[str]


def add_source_options(p: argparse._ActionsContainer) -> None:
    """The options that `open_checkpoint` looks at."""
    p.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="CoreNet's training YAML or a config.json, where the checkpoint has none "
        "(default: inferred from the tensors' shapes)",
    )
    p.add_argument(
        "--ema", action="store_true", help="of a full training checkpoint, the averaged weights"
    )
    p.add_argument("--revision", help="branch, tag or commit on the Hugging Face hub")


def open_checkpoint(
    name: str, args: argparse.Namespace, known: OpenELMConfig | None = None
) -> Checkpoint:
    """Open the file, directory or Hugging Face id `name`. Reads headers only.

    `known` is the geometry, but for the vocabulary, where neither the checkpoint nor `args` say.

    Raises:
        InputError: when it is not an OpenELM checkpoint, damaged, or hostile.
        OpenELMError: when the hub can't be reached.
    """
    source = open_source(resolve_source(name, args.revision), ema=args.ema)
    tensors, notes = map_names(source.tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config, more = _config(args.config, source, shapes, known)
    return Checkpoint(source, tensors, config, [*more, *notes])


def tell_notes(notes: list[str]) -> None:
    """Say each note in a line."""
    for note in notes:
        tell(note)


def _config(
    given: Path | None,
    source: Source,
    shapes: dict[str, tuple[int, ...]],
    known: OpenELMConfig | None,
) -> tuple[OpenELMConfig, list[str]]:
    if given is not None:
        yaml = given.suffix.lower() in (".yaml", ".yml")
        read = OpenELMConfig.from_corenet_yaml if yaml else OpenELMConfig.from_json
        return read(given), []
    if source.config is not None:
        return source.config, []
    config = infer_config(shapes)
    if known is not None:
        return replace(known, vocab_size=config.vocab_size), []
    note = (
        f"geometry inferred from the tensors: {config.num_transformer_layers} layers, width "
        f"{config.model_dim}, vocabulary {config.vocab_size}; a context of "
        f"{config.max_context_length} tokens and RoPE's base {config.rope_freq_constant:g} are "
        "taken from the published models (--config says otherwise)"
    )
    return config, [note]
