"""Flip, cut and splice bytes of valid checkpoints, and read what comes out.

    python scripts/fuzz_readers.py 100000 [SEED]

Every input must give tensors or an `InputError`, within 10 seconds and 1 GiB of memory. An input
that does anything else is kept as fuzz-failure.bin, and the status is 1.
"""

from __future__ import annotations

import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlx_openelm.convert.sources import open_source
from mlx_openelm.errors import InputError
from tests.checkpoints import EDITS, FIXTURES, Member, mutated, raw, unzipped, zipped

SECONDS, MEMORY = 10, 1 << 30


def with_pickle(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The same checkpoint with its pickle changed, and the checksum put right."""
    members = unzipped(data)
    name = next(name for name in members if name.endswith("/data.pkl"))
    members[name] = change(members[name])
    return zipped([Member(name, member) for name, member in members.items()])


def outcome(path: Path, tensors: dict[str, bytes]) -> str:
    """What a mutated file gives: the tensors of the valid one, other ones, or a refusal."""
    try:
        found = {name: raw(lazy.read()) for name, lazy in open_source(path).tensors.items()}
    except InputError as error:
        return "refused" if "\n" not in str(error) else "refused in more than one line"
    assert sum(map(len, found.values())) <= 100 * path.stat().st_size
    return "the same" if found == tensors else "other tensors"


def limit_memory() -> None:
    """Let the process grow by `MEMORY` bytes of address space, no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main(count: int, seed: int) -> int:
    """Try `count` inputs; returns the exit status."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "input"
        mx.save_safetensors(f"{path}.safetensors", {"a": mx.ones((2, 3)), "b": mx.zeros(4)})
        names = ("layouts.pt", "float16.pt", "training_checkpoint_last.pt")
        valid = [*(FIXTURES / name for name in names), Path(f"{path}.safetensors")]
        tensors = {}
        for file in valid:
            tensors[file] = {n: raw(t.read()) for n, t in open_source(file).tensors.items()}
        contents = {file: file.read_bytes() for file in valid}
        limit_memory()
        outcomes: Counter[str] = Counter()
        slowest = 0.0
        for _ in range(count):
            file = chance.choice(valid)
            edits = [
                (chance.choice(EDITS), *(chance.randrange(n) for n in (1 << 20, 65, 1 << 20)))
                for _ in range(chance.randint(1, 4))
            ]
            kind = file.name
            if file.suffix == ".pt" and chance.random() < 0.6:
                kind += ", pickle"
                data = with_pickle(contents[file], lambda pickle: mutated(pickle, edits))  # noqa: B023
            else:
                data = mutated(contents[file], edits)
            path.write_bytes(data)
            start = time.perf_counter()
            signal.alarm(SECONDS)
            try:
                outcomes[f"{kind}: {outcome(path, tensors[file])}"] += 1
            except BaseException:
                Path("fuzz-failure.bin").write_bytes(data)
                print(f"fuzz-failure.bin, made from {kind}, breaks the reader", file=sys.stderr)
                raise
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - start)
    for what, times in sorted(outcomes.items()):
        print(f"{times:8} {what}")
    print(f"{count} inputs, seed {seed}, the slowest took {slowest:.2f} s")
    return 0


def too_slow(*_: object) -> None:
    raise SystemExit(f"more than {SECONDS} s")  # no Exception: a reader must not catch it


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, too_slow)
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(arguments + [10_000, 0][len(arguments) :])))
