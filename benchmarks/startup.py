"""Process start to first token, against `mlx_lm.generate` on the same directory.

    python -m mlx_openelm.benchmarks startup [--model DIR] [--trials 10]

The two take turns, so that whatever else the machine does meets both. The clock runs from the
process's creation to the first byte of generated text on its standard output.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from threading import Timer

from mlx_openelm.checkpoint.hub import resolve
from mlx_openelm.errors import InputError, OpenELMError

PROMPT = "Once upon a time"
# What each prints before the text.
COMMANDS = {
    "mlx-openelm": (["mlx_openelm.generate", "--quiet"], b""),
    "mlx-lm": (["mlx_lm", "generate"], b"=" * 10 + b"\n"),
}


def seconds_to_first_token(
    module: list[str], preamble: bytes, model: Path, time_limit: float = 300.0
) -> float:
    """Run one of the `COMMANDS` once; seconds until its text begins.

    Raises:
        OpenELMError: when it ends without one, or is ended since `time_limit` seconds are over.
    """
    options = ["--model", str(model), "--prompt", PROMPT, "--max-tokens", "4", "--temp", "0"]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", *module, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        timer = Timer(time_limit, process.kill)
        timer.start()
        try:
            seen = b""
            while len(seen) <= len(preamble):
                piece = process.stdout.read(len(preamble) + 1 - len(seen))
                if not piece:
                    reason = process.stderr.read().decode().strip().splitlines()[-1:]
                    raise OpenELMError(f"{' '.join(module)} printed no text: {''.join(reason)}")
                seen += piece
            seconds = time.perf_counter() - start
            process.communicate()
        finally:
            timer.cancel()
    return seconds


DESCRIPTION = "Process start to first token, against mlx_lm.generate on the same directory."


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("--model", default="demo", metavar="DIR", help="default: the demo")
    p.add_argument("--trials", type=int, default=10, metavar="N", help="default: 10")


def command(args: argparse.Namespace) -> int:
    """Measure in turns and print a table."""
    if args.trials < 1:
        raise InputError(f"--trials must be at least 1, not {args.trials}")
    model = resolve(args.model)
    installed = {"mlx-openelm": True, "mlx-lm": find_spec("mlx_lm") is not None}
    names = [name for name in COMMANDS if installed[name]]
    for name in names:
        seconds_to_first_token(*COMMANDS[name], model)  # warms the disk cache
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.trials):
        for name in names:
            times[name].append(seconds_to_first_token(*COMMANDS[name], model))
    print(f"{platform.platform()}, {platform.processor() or platform.machine()}; {model.name}")
    for name, values in times.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:12} {statistics.median(values):6.2f} s  ({spread}, {len(values)} trials)")
    if len(names) == 2:
        ours, theirs = (times[name] for name in names)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        middle = statistics.median(ratios)
        print(f"{middle:.1f} times sooner ({min(ratios):.1f} to {max(ratios):.1f} pair by pair)")
    else:
        print("mlx-lm is not installed; to compare: pip install mlx-lm")
    return 0
