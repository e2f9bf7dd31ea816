"""The options that say which weights are meant, and what they stand for."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from mlx_openelm.command import tell
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.hub import resolve_source
from mlx_openelm.names import HEAD, map_names, with_embeddings

from ..adapters import EMBEDDINGS, Scale, alpha_over_rank, corenet_scale, merge, split
from ..checkpoint import Checkpoint
from ..geometry import infer_config
from ..sources import Source, open_source
from ..sources.peft import PeftAdapter, is_peft, open_peft


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


def open_checkpoint(
    name: str, args: argparse.Namespace, known: OpenELMConfig | None = None
) -> Checkpoint:
    """Open the file, directory or Hugging Face id `name`. Reads headers only.

    `known` is the geometry, but for the vocabulary, where neither the checkpoint nor `args` say.

    Raises:
        InputError: when it is not an OpenELM checkpoint, damaged, or hostile.
        OpenELMError: when the hub can't be reached.
    """
    path = resolve_source(name, args.revision)
    if is_peft(path):
        if args.ema:
            raise InputError(f"{path}: an adapter, which has no averaged weights (--ema)")
        return _with_peft(open_peft(path), args, known)
    source = open_source(path, ema=args.ema)
    plain, adapters = split(source.tensors)
    tensors, notes = map_names(plain)
    notes = [*source.notes, *notes]
    if not adapters and (args.base is not None or args.lora_alpha is not None):
        raise InputError(f"{path}: has no adapter; --base and --lora-alpha are for those")
    if adapters and EMBEDDINGS not in tensors:
        if args.base is None:
            raise InputError(f"{path}: an adapter without its base weights; name them with --base")
        base = _base(args.base, args, known)
        tensors, config, notes = base.tensors | tensors, base.config, [*base.notes, *notes]
        source = replace(source, tokenizer=base.source.tokenizer)
    else:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        stored = [tensors[name].name for name in (EMBEDDINGS, HEAD) if name in tensors]
        if len(stored) > len(set(stored)):  # one tensor by two names: tied
            del shapes[HEAD]
        config, more = _config(args.config, source, shapes, known)
        tensors = with_embeddings(tensors, config.share_input_output_layers)
        notes = [*more, *notes]
    if adapters:
        scale, why = _corenet_scale(args)
        tensors, config, merged = merge(tensors, adapters, scale, config)
        kind = f"{source.kind} with a LoRA or DoRA adapter"
        source, notes = replace(source, kind=kind), [*notes, *why, *merged]
    return Checkpoint(source, tensors, config, notes)


def _with_peft(
    adapter: PeftAdapter, args: argparse.Namespace, known: OpenELMConfig | None
) -> Checkpoint:
    name = args.base or adapter.base
    if name is None:
        raise InputError(f"{adapter.path}: doesn't say what it was trained on; use --base")
    base = _base(name, args, known)
    plain, adapters = split(adapter.tensors)
    saved, notes = map_names(plain)
    scale = adapter.scale if args.lora_alpha is None else alpha_over_rank(args.lora_alpha)
    tensors, config, merged = merge(base.tensors | saved, adapters, scale, base.config)
    source = replace(base.source, kind="PEFT adapter, merged into its base")
    return Checkpoint(source, tensors, config, [*base.notes, *notes, *merged])


def _base(name: str, args: argparse.Namespace, known: OpenELMConfig | None) -> Checkpoint:
    ours = {"base": None, "lora_alpha": None, "revision": None, "ema": False}
    return open_checkpoint(name, argparse.Namespace(**{**vars(args), **ours}), known)


def _corenet_scale(args: argparse.Namespace) -> tuple[Scale, list[str]]:
    if args.lora_alpha is not None:
        return alpha_over_rank(args.lora_alpha), []
    scale = corenet_scale(args.config) if _is_yaml(args.config) else None
    if scale is not None:
        return scale, []
    return lambda module, rank: 1.0, [
        "the file doesn't say the adapter's alpha: taken to be its rank, as in CoreNet's own "
        "recipes (--lora-alpha, or the training YAML as --config, says otherwise)"
    ]


def _is_yaml(path: Path | None) -> TypeGuard[Path]:
    return path is not None and path.suffix.lower() in (".yaml", ".yml")


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
        read = OpenELMConfig.from_corenet_yaml if _is_yaml(given) else OpenELMConfig.from_json
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
