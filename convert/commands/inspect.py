"""`openelm-convert inspect SOURCE`."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from typing import Any

from mlx_openelm.checkpoint.names import EMBEDDINGS, HEAD
from mlx_openelm.model.shapes import tensor_shapes

from ..checkpoint import Checkpoint
from ..published import published_name
from ..writer import check_shapes
from .checkpoint import add_source_options, checkpoint_of

DESCRIPTION = "Say what a checkpoint is, and what converting would make of it. Reads headers only."


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("source", metavar="SOURCE", help="a file, a directory, or a Hugging Face id")
    p.add_argument("--tensors", action="store_true", help="list every tensor")
    p.add_argument("--json", action="store_true", help="print JSON")
    add_source_options(p.add_argument_group("which weights"))


def command(args: argparse.Namespace) -> int:
    """Print what is found; refuses what couldn't be converted, with the same words."""
    checkpoint = checkpoint_of(args.source, args)
    found = describe(checkpoint)
    if not args.tensors:
        del found["tensors"]
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(as_text(args.source, found))
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the checkpoint is, in values that JSON has.

    Raises:
        InputError: when its tensors aren't those of its geometry.
    """
    source, config = checkpoint.source, checkpoint.config
    tensors = checkpoint.tensors
    if config.share_input_output_layers:
        tensors = {name: t for name, t in tensors.items() if name != HEAD}
    check_shapes(tensors, config)
    parameters = sum(math.prod(t.shape) for t in tensors.values())
    dtypes = Counter(t.dtype for t in tensors.values())
    kept = dtypes.keys() == {"float16"}
    return {
        "kind": source.kind,
        "quantized": source.quantization is not None,
        "model": published_name(config),
        "layers": config.num_transformer_layers,
        "width": config.model_dim,
        "query_heads": list(config.num_query_heads),
        "kv_heads": list(config.num_kv_heads),
        "ffn_widths": list(config.ffn_dims),
        "vocabulary": tensors[EMBEDDINGS].shape[0],
        "context": config.max_context_length,
        "parameters": parameters,
        "bytes": sum(t.nbytes for t in tensors.values()),
        "dtypes": dict(dtypes),
        "tokenizer": str(source.tokenizer) if source.tokenizer else None,
        "would_be": {"dtype": "float16" if kept else "bfloat16", "bytes": 2 * parameters},
        "notes": checkpoint.notes,
        "tensors": {
            name: {"source": t.name, "dtype": t.dtype, "shape": list(t.shape)}
            for name, t in ((name, tensors[name]) for name in tensor_shapes(config))
        },
    }


def as_text(name: str, found: dict[str, Any]) -> str:
    """The description, in lines."""
    heads, widths = found["query_heads"], found["ffn_widths"]
    dtypes = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in found["dtypes"].items())
    would_be = found["would_be"]
    rows = {
        "kind": found["kind"],
        "model": found["model"] or "not one of the published sizes",
        "geometry": f"{found['layers']} layers of width {found['width']}, "
        f"{heads[0]} to {heads[-1]} query heads, FFN widths {widths[0]} to {widths[-1]}",
        "vocabulary": f"{found['vocabulary']:,} rows",
        "context": f"{found['context']:,} tokens",
        "parameters": f"{found['parameters']:,}",
        "dequantized"
        if found["quantized"]
        else "stored as": f"{dtypes}, {found['bytes'] / 1e6:,.1f} MB",
        "tokenizer": found["tokenizer"] or "none (--tokenizer PATH_OR_REPO gives one)",
        "would become": f"{would_be['dtype']}, {would_be['bytes'] / 1e6:,.1f} MB",
    }
    lines = [name, *(f"  {key:<13} {value}" for key, value in rows.items())]
    lines += [f"  note          {note}" for note in found["notes"]]
    for tensor, what in found.get("tensors", {}).items():
        lines.append(f"  {tensor}  {what['dtype']} {what['shape']}  from {what['source']}")
    return "\n".join(lines)
