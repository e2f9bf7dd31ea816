"""`python -m mlx_openelm.convert`: other people's checkpoints -> a model directory."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mlx_openelm import __version__
from mlx_openelm.command import add_debug, run, tell
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.hub import resolve_source, resolve_tokenizer
from mlx_openelm.quantization import MODES, Scheme

from .geometry import infer_config
from .names import map_names
from .sources import Source, open_source
from .writer import DTYPES, convert


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="openelm-convert",
        description="Convert an OpenELM checkpoint to a model directory that mlx-openelm, mlx-lm "
        "and other MLX runtimes load.",
    )
    p.add_argument(
        "source",
        metavar="SOURCE",
        help="a CoreNet .pt, a Hugging Face directory, or a Hugging Face id",
    )
    p.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="directory to make")
    p.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="CoreNet's training YAML or a config.json, where the checkpoint has none "
        "(default: inferred from the tensors' shapes)",
    )
    p.add_argument(
        "--tokenizer",
        metavar="PATH_OR_REPO",
        help="SentencePiece tokenizer.model to put into the directory",
    )
    p.add_argument("--chat", action="store_true", help="an Instruct model, though its name isn't")
    p.add_argument("--dtype", choices=list(DTYPES), help="default: 16-bit as it is, else bfloat16")
    p.add_argument("--quantize", "-q", action="store_true", help="quantize the matrices")
    p.add_argument("--bits", type=int, metavar="N", help="bits per weight (default: 4)")
    p.add_argument("--group-size", type=int, metavar="N", help="weights per scale (default: 64)")
    p.add_argument("--mode", choices=list(MODES), default="affine", help="default: affine")
    p.add_argument("--revision", help="branch, tag or commit on the Hugging Face hub")
    p.add_argument("--force", action="store_true", help="replace the directory if it exists")
    p.add_argument("--version", action="version", version=f"mlx-openelm {__version__}")
    add_debug(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(command, parser().parse_args(argv))


def command(args: argparse.Namespace) -> int:
    """Open the source, convert it, say what was done."""
    start = time.perf_counter()
    scheme = _scheme(args)
    source = open_source(resolve_source(args.source, args.revision))
    tensors, notes = map_names(source.tensors)
    config = _config(args.config, source, {n: t.shape for n, t in tensors.items()})
    tokenizer = _tokenizer(args.tokenizer, source)
    done = convert(
        tensors,
        config,
        args.out,
        tokenizer=tokenizer,
        chat=args.chat or "instruct" in args.source.lower(),
        dtype=args.dtype,
        scheme=scheme,
        force=args.force,
    )
    for note in (*notes, *done.notes):
        tell(note)
    if tokenizer is None:
        tell(
            "no tokenizer found: run the model with --tokenizer PATH_OR_REPO, or convert again "
            "with it to have it in the directory"
        )
    print(
        f"{args.out}: {done.parameters:,} parameters, {done.bits_per_weight:.2f} bits per weight, "
        f"{done.bytes_before / 1e6:.1f} MB -> {done.bytes_after / 1e6:.1f} MB, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return 0


def _scheme(args: argparse.Namespace) -> Scheme | None:
    if not args.quantize:
        if args.bits or args.group_size or args.mode != "affine":
            raise InputError("--bits, --group-size and --mode go with -q")
        return None
    groups, bits = MODES[args.mode]
    default = Scheme() if args.mode == "affine" else Scheme(groups[0], bits[0], args.mode)
    return Scheme(args.group_size or default.group_size, args.bits or default.bits, args.mode)


def _config(
    given: Path | None, source: Source, shapes: dict[str, tuple[int, ...]]
) -> OpenELMConfig:
    if given is None and source.config is not None:
        return source.config
    if given is None:
        config = infer_config(shapes)
        tell(
            f"geometry inferred from the tensors: {config.num_transformer_layers} layers, width "
            f"{config.model_dim}, vocabulary {config.vocab_size}; a context of "
            f"{config.max_context_length} tokens and RoPE's base {config.rope_freq_constant:g} are "
            "taken from the published models (--config says otherwise)"
        )
        return config
    if given.suffix.lower() in (".yaml", ".yml"):
        return OpenELMConfig.from_corenet_yaml(given)
    return OpenELMConfig.from_json(given)


def _tokenizer(given: str | None, source: Source) -> Path | None:
    if given is None:
        return source.tokenizer
    path = resolve_tokenizer(given)
    if path.is_dir():
        path = path / "tokenizer.model"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a SentencePiece tokenizer.model is needed")
    return path


if __name__ == "__main__":
    sys.exit(main())
