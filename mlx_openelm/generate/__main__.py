"""`python -m mlx_openelm.generate`: text from a prompt, printed as it comes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from .. import (
    IMPORTING,
    InputError,
    OpenELM,
    OpenELMError,
    PromptCache,
    __version__,
    make_logits_processors,
    make_sampler,
)
from ..checkpoint.directory import load, load_draft
from ..checkpoint.hub import BUNDLED
from ..command import Parser, add_debug, exit_status, interruptible, path, run, tell, unicode
from ..generation.stream import GenerationResponse, stream_generate, summary
from ..streams import print_json, read_stdin
from ..tokenizer.chat import CHAT_TEMPLATE


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = Parser(
        prog="openelm-generate",
        description="Continue a prompt with an OpenELM model. The text goes to standard output.",
    )
    p.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="model directory or Hugging Face id (default: the small bundled demo)",
    )
    p.add_argument(
        "--prompt",
        "-p",
        type=unicode,
        required=True,
        metavar="TEXT",
        help="the text to continue; - reads stdin",
    )
    p.add_argument(
        "--chat", action="store_true", help="the prompt is a message to an Instruct model"
    )
    p.add_argument(
        "--max-tokens", "-m", type=int, default=100, metavar="N", help="at most N (default: 100)"
    )
    sampling = p.add_argument_group("sampling")
    sampling.add_argument(
        "--temp", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token"
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest tokens that together have probability P",
    )
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens"
    )
    sampling.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="only tokens at least P times as likely as the likeliest",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1: recent tokens become less likely",
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="draw the same text every time")
    sampling.add_argument(
        "--stop",
        type=unicode,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT (repeatable)",
    )
    drafts = p.add_argument_group("speculative decoding: the same text in less time")
    drafts.add_argument(
        "--draft-model",
        metavar="DIR_OR_REPO",
        help="a smaller model with the same tokenizer proposes tokens",
    )
    drafts.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="propose tokens by copying from the text so far",
    )
    drafts.add_argument(
        "--num-draft-tokens",
        type=int,
        default=16,
        metavar="N",
        help="propose at most N at once (default: 16; fewer where that is faster)",
    )
    more = p.add_argument_group("more")
    more.add_argument(
        "--max-kv-size",
        type=int,
        metavar="N",
        help="keep at most N tokens in the cache (sliding window)",
    )
    more.add_argument("--kv-bits", type=int, metavar="N", help="quantize the cache to 8 or 4 bits")
    more.add_argument(
        "--prompt-cache-file",
        type=path,
        metavar="FILE",
        help="keep the cache in FILE, for the next prompt that begins with the same tokens",
    )
    more.add_argument("--tokenizer", metavar="PATH_OR_REPO", help="for a model without one")
    more.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit on the Hugging Face hub"
    )
    more.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    loudness = more.add_mutually_exclusive_group()
    loudness.add_argument("--verbose", "-v", action="store_true", help="show speed and memory")
    loudness.add_argument("--quiet", "-q", action="store_true", help="nothing but the text")
    more.add_argument("--version", action="version", version=f"mlx-openelm {__version__}")
    add_debug(more)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(lambda arguments: command(parser().parse_args(arguments)), argv)


def command(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    prompt = _stdin(args.quiet) if args.prompt == "-" else args.prompt
    options: dict[str, Any] = {
        "max_tokens": args.max_tokens,
        "stop": args.stop,
        "max_kv_size": args.max_kv_size,
        "kv_bits": args.kv_bits,
        "sampler": make_sampler(
            args.temp, args.top_p, args.min_p, top_k=args.top_k, seed=args.seed
        ),
        "logits_processors": make_logits_processors(repetition_penalty=args.repetition_penalty),
        "prompt_lookup": args.prompt_lookup,
        "num_draft_tokens": args.num_draft_tokens,
    }
    if args.model is None and not args.quiet:
        tell(
            "no --model: using the bundled demo, a small model trained on fairy tales (for a "
            "published one: --model apple/OpenELM-270M-Instruct --tokenizer "
            "meta-llama/Llama-2-7b-hf)"
        )
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    model, tokenizer = load(
        args.model or BUNDLED["demo"],
        tokenizer=args.tokenizer,
        revision=args.revision,
        seconds=seconds,
    )
    if args.draft_model is not None:
        options["draft_model"] = load_draft(args.draft_model, tokenizer)
    if args.prompt_cache_file is not None:
        options["prompt_cache"] = _prompt_cache(args, model)
    loaded = time.perf_counter()
    if args.chat and prompt:
        if tokenizer.chat_template is None:
            tell("the model has no chat template: that of OpenELM's Instruct models is used")
            tokenizer.chat_template = CHAT_TEMPLATE
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True)

    texts: list[str] = []
    tokens: list[int] = []
    last: GenerationResponse | None = None  # all of them would keep all logits
    status, failure = 0, None
    first = loaded
    try:
        with interruptible():
            for response in stream_generate(model, tokenizer, prompt, **options):
                if last is None:
                    first = time.perf_counter()
                last = response
                texts.append(response.text)
                tokens.append(response.token)
                if not args.json:
                    print(response.text, end="", flush=True)
    except KeyboardInterrupt as interrupt:
        status = exit_status(interrupt)
    except OpenELMError as error:
        if last is None:
            raise
        failure = error  # after the text that there is
    context_full = bool(last and _context_full(last, args.max_tokens))
    if args.json:
        report = {
            "text": "".join(texts),
            "tokens": tokens,
            **_report(last),
            "context_full": context_full,
        }
        if failure or status:
            report["finish_reason"] = "error" if failure else "interrupted"
        print_json(report)
    else:
        print(flush=True)
    if failure:
        raise failure
    if args.prompt_cache_file is not None:
        options["prompt_cache"].save(args.prompt_cache_file)
    if context_full and last and args.max_tokens > 0 and not args.quiet:
        tell(
            f"the context of {model.config.max_context_length:,} tokens is full: "
            f"{last.prompt_tokens:,} of the prompt and {last.generation_tokens:,} generated, not "
            f"{args.max_tokens:,} (--max-kv-size N goes on without the oldest tokens)"
        )
    if args.verbose and last:
        tell(str(model.policy))
        tell(
            f"Start: imports {start - IMPORTING:.3f} s, loading {loaded - start:.3f} s (weights "
            f"{seconds['weights']:.3f} s, beside them the tokenizer {seconds['tokenizer']:.3f} s), "
            f"prompt and first token after {first - loaded:.3f} s more"
        )
        tell(summary(last))
    return status


def _stdin(quiet: bool) -> str:
    if sys.stdin is not None and sys.stdin.isatty() and not quiet:
        tell("type the prompt; Ctrl-D on an empty line ends it")
    return read_stdin()


def _context_full(last: GenerationResponse, max_tokens: int) -> bool:
    """Whether the text ended because there was no room for more, before `max_tokens`."""
    return last.finish_reason == "length" and last.generation_tokens != max_tokens


def _prompt_cache(args: argparse.Namespace, model: OpenELM) -> PromptCache:
    file: Path = args.prompt_cache_file
    if args.max_kv_size is not None:
        raise InputError("--prompt-cache-file can't be combined with --max-kv-size")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such directory")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"{file.parent}: not writable, so {file.name} can't be written there")
    if not file.exists():
        return PromptCache(model, kv_bits=args.kv_bits)
    cache = PromptCache.load(file, model)
    if cache.kv_bits != args.kv_bits:
        kept = "without --kv-bits" if cache.kv_bits is None else f"with --kv-bits {cache.kv_bits}"
        raise InputError(f"{file}: was written {kept}")
    return cache


def _report(last: GenerationResponse | None) -> dict[str, Any]:
    return {
        **{
            field: last and getattr(last, field)
            for field in (
                "finish_reason",
                "prompt_tokens",
                "cached_tokens",
                "prompt_tps",
                "generation_tokens",
                "generation_tps",
                "peak_memory",
            )
        },
        **({"drafts": last.speculation.report()} if last and last.speculation else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
