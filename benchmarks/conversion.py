"""Converting a float32 `.pt` to bfloat16 safetensors: this project against PyTorch.

    python -m mlx_openelm.benchmarks convert [--model OpenELM-270M] [--trials 5]

PyTorch's way is `torch.load`, a cast, and safetensors' `save_file`. Each trial is a process of its
own; all take turns. The file is read once before each trial, so that it lies in the page cache
(where memory allows), and all end with their output flushed to the disk (fsync). The clock runs
from the end of the imports; the whole process is told apart. Hashing, which only this project does,
is left out of the comparison and measured by itself. "Reading and writing" converts nothing: it
reads all bytes and writes as many as the result has, so it is what the disk alone takes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_openelm.command import path
from mlx_openelm.config import PUBLISHED, OpenELMConfig
from mlx_openelm.errors import InputError, OpenELMError
from mlx_openelm.files import make_directory

from .machine import describe
from .statistics import ratio, summarize

OURS, HASHED, DISK, TORCH = (
    "mlx-openelm",
    "mlx-openelm, with hashes",
    "reading and writing",
    "PyTorch",
)
STATE = "file read before each trial (page cache), output fsynced, trials in turns"
VOCAB_SIZE = 32128  # of CoreNet's checkpoints
DESCRIPTION = "Convert a random float32 checkpoint to bfloat16, in turns with PyTorch."


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("--model", default="OpenELM-270M", choices=list(PUBLISHED), help="its shape")
    p.add_argument("--trials", type=int, default=5, metavar="N", help="default: 5")
    p.add_argument(
        "--dir", type=path, metavar="DIR", help="where the files go (default: a temporary folder)"
    )
    p.add_argument("--json", type=path, metavar="FILE", help="write the numbers here too")


def command(args: argparse.Namespace) -> int:
    """Make the checkpoint, measure in turns, print a table."""
    if args.trials < 1:
        raise InputError(f"--trials must be at least 1, not {args.trials}")
    config = OpenELMConfig.from_name(args.model, VOCAB_SIZE)
    for folder in filter(None, (args.dir, args.json and args.json.parent)):
        make_directory(folder)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        results = measure(config, Path(folder), args.trials)
    machine = describe()
    print(f"{args.model}: float32 .pt of {results['bytes'] / 1e6:,.0f} MB to bfloat16")
    print(f"{machine.chip}, {machine.cores} cores, {machine.os}; {STATE}")
    for name, trials in results["trials"].items():
        print(_row(name, trials))
    if TORCH in results["trials"]:
        print(_ratio(results["trials"]))
    else:
        print("PyTorch is not installed; to compare: pip install torch safetensors")
    if args.json:
        about = {"model": args.model, "state": STATE, "machine": asdict(machine)}
        args.json.write_text(json.dumps(about | results, indent=2) + "\n")
    return 0


def measure(config: OpenELMConfig, folder: Path, trials: int) -> dict[str, Any]:
    """{"bytes": of the checkpoint, "trials": contestant -> the trials' numbers}.

    Raises:
        OpenELMError: when a contestant fails; says why.
    """
    from .checkpoints import write_pt

    source, out = folder / "random.pt", folder / "out"
    write_pt(config, source)
    names = [OURS, HASHED, DISK]
    if find_spec("torch") and find_spec("safetensors"):
        names.append(TORCH)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(trials):
        for name in names:
            _read_through(source)
            results[name].append(_trial(name, source, out))
            shutil.rmtree(out)
    return {"bytes": source.stat().st_size, "trials": results}


def _read_through(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        while opened.read(1 << 24):
            pass


def _trial(name: str, source: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, name, str(source), str(out)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    whole = time.perf_counter() - start
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise OpenELMError(f"{name} failed: {reason}")
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers | {"process_seconds": whole}


def _row(name: str, trials: list[dict[str, float]]) -> str:
    def middle(key: str) -> float:
        return summarize([trial[key] for trial in trials]).median

    times = summarize([trial["seconds"] for trial in trials])
    return (
        f"{name:25} {times.median:6.2f} s ({times.least:.2f} to {times.most:.2f}), "
        f"whole process {middle('process_seconds'):6.2f} s, "
        f"peak memory {middle('peak_bytes') / 1e6:7,.0f} MB, {len(trials)} trials"
    )


def _ratio(results: dict[str, list[dict[str, float]]]) -> str:
    def against_torch(key: str) -> tuple[list[float], list[float]]:
        theirs, ours = results[TORCH], results[OURS]
        return [trial[key] for trial in theirs], [trial[key] for trial in ours]

    faster, memory = ratio(*against_torch("seconds")), ratio(*against_torch("peak_bytes"))
    return f"PyTorch's time over ours: {faster}; memory: {memory.value:.1f}x"


# ---------------------------------------------------------------------------------------------
# The contestants, each in a process of its own


def with_mlx_openelm(source: Path, out: Path, hashes: bool) -> float:
    """Convert with this project; returns seconds."""
    from mlx_openelm.checkpoint.names import map_names
    from mlx_openelm.convert.sources import open_source
    from mlx_openelm.convert.writer import Options, convert

    start = time.perf_counter()
    tensors, _ = map_names(open_source(source).tensors)
    config = OpenELMConfig.from_corenet_yaml(source.with_suffix(".yaml"))
    convert(tensors, config, out, Options(dtype="bfloat16", hashes=hashes))
    return time.perf_counter() - start


def with_pytorch(source: Path, out: Path) -> float:
    """Convert with PyTorch; returns seconds."""
    import torch
    from safetensors.torch import save_file

    start = time.perf_counter()
    state = torch.load(source, weights_only=True)
    out.mkdir()
    save_file({k: v.to(torch.bfloat16) for k, v in state.items()}, out / "model.safetensors")
    with (out / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def by_copying(source: Path, out: Path) -> float:
    """Read all, write half as many bytes; returns seconds."""
    buffer = memoryview(bytearray(8 << 20))
    start = time.perf_counter()
    out.mkdir()
    with (
        source.open("rb", buffering=0) as read,
        (out / "copy").open("wb", buffering=0) as written,
    ):
        while count := read.readinto(buffer):
            written.write(buffer[: count // 2])
        os.fsync(written.fileno())
    return time.perf_counter() - start


def main(name: str, source: Path, out: Path) -> None:
    """Run one contestant; prints JSON."""
    if name == TORCH:
        seconds = with_pytorch(source, out)
    elif name == DISK:
        seconds = by_copying(source, out)
    else:
        seconds = with_mlx_openelm(source, out, hashes=name == HASHED)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
