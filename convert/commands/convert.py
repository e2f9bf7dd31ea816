"""`openelm-convert SOURCE -o DIR`."""

from __future__ import annotations

import argparse
import os
import resource
import sys
from dataclasses import astuple
from pathlib import Path

from mlx_openelm.checkpoint.hub import origin, resolve_tokenizer
from mlx_openelm.command import path, tell
from mlx_openelm.errors import InputError
from mlx_openelm.files import find_in, user_path
from mlx_openelm.model.quantization import MODES, Scheme
from mlx_openelm.tokenizer.files import GENERATION, first_template

from ..floats import DTYPES
from ..recipe import KEEP_EMBEDDINGS, Recipe, make_scheme, read_recipe
from ..sources import Source
from ..writer import Conversion, Options, convert
from .checkpoint import add_source_options, checkpoint_of, tell_notes
from .progress import progress, size
from .verify import compare_with_source

DESCRIPTION = "Convert an OpenELM checkpoint to a model directory that mlx-openelm, mlx-lm and "
DESCRIPTION += "other MLX runtimes load."


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument(
        "source",
        metavar="SOURCE",
        help="a CoreNet .pt, a directory of Hugging Face or MLX, or a Hugging Face id",
    )
    p.add_argument("--out", "-o", type=path, required=True, metavar="DIR", help="directory to make")
    p.add_argument(
        "--tokenizer",
        metavar="PATH_OR_REPO",
        help="SentencePiece tokenizer.model to put into the directory",
    )
    p.add_argument(
        "--chat",
        action="store_true",
        help="an Instruct model, with OpenELM's chat template (default: if SOURCE's name says so)",
    )
    p.add_argument("--force", action="store_true", help="replace an earlier output")
    p.add_argument("--verify", action="store_true", help="compare the result with the source")

    add_source_options(p.add_argument_group("which weights"))

    group = p.add_argument_group("what to make of them")
    group.add_argument(
        "--dtype", choices=list(DTYPES), help="default: float16 stays, if it's safe; else bfloat16"
    )
    group.add_argument("--quantize", "-q", action="store_true", help="quantize the matrices")
    group.add_argument("--bits", type=int, metavar="N", help=f"bits per weight ({_choices(1)})")
    group.add_argument(
        "--group-size", type=int, metavar="N", help=f"weights per scale ({_choices(0)})"
    )
    group.add_argument("--mode", choices=list(MODES), default="affine", help="default: affine")
    group.add_argument(
        "--keep-embeddings", action="store_true", help="don't quantize the embeddings"
    )
    group.add_argument(
        "--recipe",
        type=path,
        metavar="FILE",
        help='JSON: module pattern to {"bits", "group_size", "mode"} or "keep"; the first that '
        "fits decides, before -q",
    )
    group.add_argument(
        "--trim-vocab",
        action="store_true",
        help="drop the embedding rows beyond the tokenizer's vocabulary",
    )
    group.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="take NaN, infinities, and what overflows float16",
    )
    group.add_argument(
        "--strict", action="store_true", help="refuse weights that have been quantized already"
    )


def _choices(which: int) -> str:
    """What each mode has: of group sizes (0) or bits (1), the default of affine first."""
    default = astuple(Scheme())[which]
    listed = "; ".join(
        f"{mode}: {', '.join(map(str, values[which]))}" for mode, values in MODES.items()
    )
    return f"default: {default} with affine; {listed}"


def command(args: argparse.Namespace) -> int:
    """Open the source, convert it, say what was done."""
    recipe = _recipe(args)
    checkpoint = checkpoint_of(args.source, args)
    tell_notes([*checkpoint.notes, *_quantized_already(checkpoint.source, args.strict)])
    tokenizer = tokenizer_of(args.tokenizer, checkpoint.source)
    options = Options(
        dtype=args.dtype,
        recipe=recipe,
        trim_vocab=args.trim_vocab,
        chat=args.chat or is_instruct(args.source),
        allow_nonfinite=args.allow_nonfinite,
    )
    with progress(size(checkpoint.tensors)) as report:
        done = convert(
            checkpoint.tensors,
            checkpoint.config,
            args.out,
            options,
            tokenizer=tokenizer,
            chat_template=chat_template_of(args.tokenizer, checkpoint.source),
            generation_config=generation_config_of(checkpoint.source),
            source=_source(args, checkpoint.source),
            reads=_reads(args, checkpoint.source),
            force=args.force,
            progress=report,
        )
    tell_notes(done.notes)
    if tokenizer is None:
        tell(
            "no tokenizer found: run the model with --tokenizer PATH_OR_REPO, or convert again "
            "with it to have it in the directory"
        )
    print(_closing(args.out, done))
    return compare_with_source(args.out, checkpoint) if args.verify else 0


def _reads(args: argparse.Namespace, source: Source) -> list[Path]:
    """What is read and lies on this machine, which must not be replaced."""
    named = (args.source, args.base, args.tokenizer, args.config, args.recipe)
    paths = [
        source.path,
        *source.adapters,
        *(user_path(name) for name in named if name is not None),
    ]
    return [path for path in paths if os.path.exists(path)]


def _source(args: argparse.Namespace, source: Source) -> dict[str, object]:
    """What the record says of the source: nothing that depends on where it lies here."""
    found: dict[str, object] = {"kind": source.kind}
    if hub := origin(source.path):
        found["repo"], found["commit"] = hub
    if args.lora_alpha is not None:
        found["lora_alpha"] = args.lora_alpha
    return found


def _quantized_already(source: Source, strict: bool) -> list[str]:
    if source.quantization is None:
        return []
    bits = source.quantization.default.bits
    if strict:
        raise InputError(
            f"{source.path}: its weights are quantized to {bits} bits already (--strict); convert "
            "the checkpoint that it was made from"
        )
    return [f"dequantized from {bits} bits: what that lost, stays lost"]


def _closing(out: Path, done: Conversion) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    rows = {
        "parameters": f"{done.parameters:,}",
        "bits per weight": f"{done.bits_per_weight:.2f}",
        "size": f"{done.bytes_before / 1e6:,.1f} MB -> {done.bytes_after / 1e6:,.1f} MB",
        "time": f"{done.seconds:.1f} s",
        "peak memory": f"{peak_bytes / 1e6:,.0f} MB",
    }
    return "\n".join([str(out), *(f"  {name:<16} {value}" for name, value in rows.items())])


def _recipe(args: argparse.Namespace) -> Recipe:
    scheme = None
    if args.quantize:
        scheme = make_scheme(args.mode, args.bits, args.group_size)
    elif args.bits is not None or args.group_size is not None or args.mode != "affine":
        raise InputError("--bits, --group-size and --mode go with -q")
    recipe = read_recipe(args.recipe, scheme) if args.recipe else Recipe(scheme)
    if args.keep_embeddings:
        if not recipe.rules and scheme is None:
            raise InputError("--keep-embeddings goes with -q or --recipe")
        return Recipe(recipe.default, (*KEEP_EMBEDDINGS, *recipe.rules))
    return recipe


def tokenizer_of(given: str | None, source: Source) -> Path | None:
    """The directory or file of the tokenizer to put beside the weights."""
    if given is not None:
        return resolve_tokenizer(given)
    return None if source.tokenizer is None else source.tokenizer.parent


def is_instruct(name: str) -> bool:
    """Whether a checkpoint's name says that it is an Instruct model."""
    return "instruct" in name.lower()


def chat_template_of(given: str | None, source: Source) -> str | dict[str, str] | None:
    """The template that takes the place of the tokenizer's: an adapter's, if there is one."""
    if not source.adapters:
        return None
    base = [source.path] if given is None and source.path.is_dir() else []
    return first_template([*source.adapters, *base])


def generation_config_of(source: Source) -> Path:
    """The directory whose `generation_config.json` is carried."""
    found = (path for path in source.adapters if find_in(path, GENERATION))
    return next(found, source.path)
