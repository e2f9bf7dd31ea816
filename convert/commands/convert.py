"""`openelm-convert SOURCE -o DIR`."""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

from mlx_openelm.command import tell
from mlx_openelm.errors import InputError
from mlx_openelm.hub import origin, resolve_tokenizer
from mlx_openelm.quantization import MODES
from mlx_openelm.tokenizer import find_tokenizer, load_tokenizer

from ..floats import DTYPES
from ..recipe import KEEP_EMBEDDINGS, Recipe, make_scheme, read_recipe
from ..sources import Source
from ..writer import CHAT_FILE, Conversion, Options, convert
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
    p.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="directory to make")
    p.add_argument(
        "--tokenizer",
        metavar="PATH_OR_REPO",
        help="SentencePiece tokenizer.model to put into the directory",
    )
    p.add_argument("--chat", action="store_true", help="an Instruct model, though its name isn't")
    p.add_argument("--force", action="store_true", help="replace the directory if it exists")
    p.add_argument("--verify", action="store_true", help="compare the result with the source")

    add_source_options(p.add_argument_group("which weights"))

    group = p.add_argument_group("what to make of them")
    group.add_argument(
        "--dtype", choices=list(DTYPES), help="default: float16 stays, if it's safe; else bfloat16"
    )
    group.add_argument("--quantize", "-q", action="store_true", help="quantize the matrices")
    group.add_argument("--bits", type=int, metavar="N", help="bits per weight (default: 4)")
    group.add_argument("--group-size", type=int, metavar="N", help="weights per scale (default 64)")
    group.add_argument("--mode", choices=list(MODES), default="affine", help="default: affine")
    group.add_argument(
        "--keep-embeddings", action="store_true", help="don't quantize the embeddings"
    )
    group.add_argument(
        "--recipe",
        type=Path,
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


def command(args: argparse.Namespace) -> int:
    """Open the source, convert it, say what was done."""
    recipe = _recipe(args)
    checkpoint = checkpoint_of(args.source, args)
    tell_notes([*checkpoint.notes, *_quantized_already(checkpoint.source, args.strict)])
    tokenizer = _tokenizer(args.tokenizer, checkpoint.source)
    options = Options(
        dtype=args.dtype,
        recipe=recipe,
        trim_vocab=args.trim_vocab,
        chat=args.chat or _chats(args.source, checkpoint.source),
        allow_nonfinite=args.allow_nonfinite,
    )
    with progress(size(checkpoint.tensors)) as report:
        done = convert(
            checkpoint.tensors,
            checkpoint.config,
            args.out,
            options,
            tokenizer=tokenizer,
            files=checkpoint.source.files,
            source=_source(args, checkpoint.source),
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
    elif args.bits or args.group_size or args.mode != "affine":
        raise InputError("--bits, --group-size and --mode go with -q")
    recipe = read_recipe(args.recipe, scheme) if args.recipe else Recipe(scheme)
    if args.keep_embeddings:
        return Recipe(recipe.default, (*KEEP_EMBEDDINGS, *recipe.rules))
    return recipe


def _tokenizer(given: str | None, source: Source) -> Path | None:
    if given is None:
        return source.tokenizer
    path = resolve_tokenizer(given)
    return find_tokenizer(path) if path.is_dir() else path


def _chats(name: str, source: Source) -> bool:
    """Whether this is an Instruct model: its name says so, or it has a chat template."""
    if "instruct" in name.lower():
        return True
    return source.tokenizer is not None and (
        CHAT_FILE in source.files or load_tokenizer(source.tokenizer.parent).has_chat_template
    )
