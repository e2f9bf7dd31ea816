"""The figures this project sets itself: its speed against others', on this machine, in turns.

    python -m mlx_openelm.benchmarks speed [--only WORDS] [-o OUT]

Every row is a ratio of two contestants that take turns, each in a process that stays up. "with
OpenBLAS": the system's OpenBLAS is preloaded for mlx-lm; otherwise each runs as it is installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from ctypes.util import find_library
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_openelm.command import path
from mlx_openelm.errors import InputError, OpenELMError
from mlx_openelm.files import make_directory, read_json
from mlx_openelm.tokenizer.tokenizer import load_tokenizer

from . import machine, startup
from .models import model_directory
from .peers import OURS, Workload, is_installed
from .runner import Worker
from .statistics import Ratio, ratio
from .tables import show
from .workloads import PROMPTS, REPEATING, random_prompts

DESCRIPTION = "This project's figures: its speed against mlx-lm, PyTorch and itself, in turns."
# A peer with the system's OpenBLAS in place of the reference BLAS of MLX's wheel; "": there is none
OPENBLAS = {"LD_PRELOAD": find_library("openblas") or ""}
DEMO, WIDE, TINY, LARGE = (
    "demo:float32",
    "wide-demo:float32",
    "random:28x64:float32",
    "random:OpenELM-270M",
)
SPEED = "speed.json"
TIME_LIMIT = 600.0  # seconds for one trial: reference BLAS takes minutes for a prompt

Value = Callable[[dict[str, Any], Workload], float]


@dataclass(frozen=True)
class Figure:
    """One row: a ratio of which at least `least` is wanted.

    `against` is a peer, or "plain" for this project without the workload's options. `value` reads
    from a measurement what is compared; more is better.
    """

    name: str
    against: str
    least: float
    model: str
    value: Value
    prompts: str | int  # the name of a text, or how many random tokens
    gen_tokens: int
    batch: int = 1
    options: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)  # of the other contestant
    trials: int = 9

    def __str__(self) -> str:
        return f"{self.name}, against {self.against}"


@dataclass(frozen=True)
class Outcome:
    """A row, measured; `trials` are pairs of (ours, theirs), in tokens/s, 1/s or 1/byte.

    `measured`: when, in UTC.
    """

    name: str
    against: str
    least: float
    ratio: Ratio | None
    trials: list[tuple[float, float]]
    note: str = ""
    measured: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    @property
    def verdict(self) -> str:
        """Whether the figure is reached."""
        if self.ratio is None:
            return "not measured"
        return "pass" if self.ratio.value >= self.least else "short"


def decode(measured: dict[str, Any], work: Workload) -> float:
    """Generated tokens per second, after the first."""
    return (work.gen_tokens - 1) * len(work.prompts) / float(measured["decode_seconds"])


def prefill(measured: dict[str, Any], work: Workload) -> float:
    """Prompt tokens per second, until the first token."""
    return sum(map(len, work.prompts)) / float(measured["prefill_seconds"])


def total(measured: dict[str, Any], work: Workload) -> float:
    """Generated tokens of all sequences per second of the whole run."""
    seconds = measured["prefill_seconds"] + measured["decode_seconds"]
    return work.gen_tokens * len(work.prompts) / float(seconds)


def memory(measured: dict[str, Any], work: Workload) -> float:
    """1 / bytes of resident memory, at the most."""
    return 1 / float(measured["peak_bytes"])


FIGURES = (
    Figure(
        "decode, 28 layers of model_dim 64, float32, each by default",
        "mlx-lm",
        3.5,
        TINY,
        decode,
        8,
        100,
    ),
    Figure(
        "decode, 28 layers of model_dim 64, float32, with OpenBLAS",
        "mlx-lm",
        3.5,
        TINY,
        decode,
        8,
        100,
        environment=OPENBLAS,
    ),
    Figure(
        "decode, demo, float32, each by default",
        "mlx-lm",
        2.2,
        DEMO,
        decode,
        8,
        100,
    ),
    Figure(
        "decode, demo, float32, with OpenBLAS",
        "mlx-lm",
        2.2,
        DEMO,
        decode,
        8,
        100,
        environment=OPENBLAS,
    ),
    Figure(
        "decode, 270M, float32, with OpenBLAS",
        "mlx-lm",
        1.05,
        LARGE + ":float32",
        decode,
        8,
        24,
        environment=OPENBLAS,
    ),
    Figure(
        "decode, 270M, 4-bit, each by default",
        "mlx-lm",
        8,
        LARGE + ":4bit",
        decode,
        2,
        4,
        trials=3,
    ),
    Figure(
        "prefill 512, 270M, float32, each by default",
        "mlx-lm",
        20,
        LARGE + ":float32",
        prefill,
        512,
        1,
        trials=2,
    ),
    Figure(
        "decode, 270M, float32, each by default",
        "mlx-lm",
        2,
        LARGE + ":float32",
        decode,
        8,
        16,
        trials=5,
    ),
    Figure(
        "prefill 512, 270M, float32",
        "torch",
        1,
        LARGE + ":float32",
        prefill,
        512,
        1,
        trials=5,
    ),
    Figure("decode, 270M, float32", "torch", 0.8, LARGE + ":float32", decode, 8, 24),
    Figure(
        "prefill 512, demo, each by default",
        "mlx-lm",
        1.2,
        DEMO,
        prefill,
        512,
        1,
    ),
    Figure(
        "prefill 512, demo, with OpenBLAS",
        "mlx-lm",
        1.2,
        DEMO,
        prefill,
        512,
        1,
        environment=OPENBLAS,
    ),
    Figure(
        "8 sequences at once, demo, each by default",
        "mlx-lm",
        1.5,
        DEMO,
        total,
        32,
        64,
        8,
    ),
    Figure(
        "8 sequences at once, demo, with OpenBLAS",
        "mlx-lm",
        1.5,
        DEMO,
        total,
        32,
        64,
        8,
        environment=OPENBLAS,
    ),
    Figure(
        "speculative, demo with demo-draft, held-out tales",
        "plain",
        1.3,
        DEMO,
        decode,
        "held_out",
        128,
        options={"draft_model": "demo-draft"},
        trials=30,
    ),
    Figure(
        "speculative, demo with zeros to 65 M parameters, with demo-draft",
        "plain",
        1.3,
        WIDE,
        decode,
        "held_out",
        128,
        options={"draft_model": "demo-draft"},
        trials=9,
    ),
    Figure(
        "prompt lookup, a text that repeats",
        "plain",
        2,
        DEMO,
        decode,
        REPEATING,
        128,
        options={"prompt_lookup": True},
    ),
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument(
        "--only", metavar="WORDS", default="", help="only rows with WORDS in 'NAME, against PEER'"
    )
    p.add_argument("--trials", type=int, metavar="N", help="of every row (default: 2 to 30)")
    p.add_argument("-o", "--output", type=path, metavar="OUT", help="write speed.json and .md here")


def command(args: argparse.Namespace) -> int:
    """Measure every row, print the table."""
    if args.trials is not None and args.trials < 1:
        raise InputError(f"--trials must be at least 1, not {args.trials}")
    chosen = [figure for figure in FIGURES if args.only in str(figure)]
    further = [(name, row) for name, row in FURTHER.items() if args.only in name]
    if not chosen and not further:
        names = "; ".join([*map(str, FIGURES), *FURTHER])
        raise InputError(f"no row has {args.only!r} in its name; there are: {names}")
    found = machine.describe()
    if args.output:  # before the minutes that measuring takes
        make_directory(args.output)
        _earlier(args.output / SPEED, asdict(found))
    tell = Console(stderr=True)
    outcomes: list[Outcome] = []
    for figure in chosen:
        tell.print(str(figure), style="dim")
        outcomes += measure(figure, args.trials or figure.trials)
    for name, row in further:
        tell.print(name, style="dim")
        outcomes.append(row(name, args.trials or 7))
    title = f"{found.chip}, {found.cores} cores, BLAS: {found.blas}"
    show(Console(), table(outcomes, title))
    if args.output:
        write(outcomes, asdict(found), args.output)
    return 0


def measure(figure: Figure, trials: int) -> list[Outcome]:
    """One outcome; for a text of several passages one more, of the slowest of them."""
    if figure.against != "plain" and not is_installed(figure.against):
        return [_outcome(figure, [], f"{figure.against} is not installed")]
    if "" in figure.environment.values():
        return [_outcome(figure, [], "the system has no OpenBLAS")]
    directory = model_directory(figure.model)
    works = _workloads(figure, directory)
    pairs: list[list[tuple[float, float]]] = [[] for _ in works]
    said: list[dict[str, float]] = []
    with ExitStack() as stack:

        def start(peer: str, environment: dict[str, str]) -> Worker:
            worker = Worker(peer, directory, environment, TIME_LIMIT)
            stack.callback(worker.close)
            return worker

        try:
            ours = start(OURS, {})
            plain = figure.against == "plain"
            theirs = ours if plain else start(figure.against, figure.environment)
            for turn in range(-1, trials):
                for work, found in zip(works, pairs, strict=True):
                    other = Workload(work.prompts, work.gen_tokens) if plain else work
                    if turn < 0:
                        if trials > 3:  # where a trial takes minutes, warming up shows in none
                            ours.run(work), theirs.run(other)
                        continue
                    mine, its = ours.run(work), theirs.run(other)
                    if plain and mine["tokens"] != its["tokens"]:
                        raise OpenELMError("drafting changed the tokens")
                    found.append((figure.value(mine, work), figure.value(its, other)))
                    said.append(mine["statistics"])
        except OpenELMError as error:
            return [_outcome(figure, [], str(error))]
    outcomes = [_outcome(figure, [pair for found in pairs for pair in found], _middle(said))]
    if len(works) > 1:
        slowest = slowest_of(pairs)
        worst = Figure(f"{figure.name}: the slowest passage", figure.against, 0.95, *_REST)
        outcomes.append(_outcome(worst, slowest, ""))
    return outcomes


def slowest_of(passages: Sequence[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Trials of the slowest of several passages: every other trial says which it is, and the rest
    are returned, since the trials that made it the slowest would make it slower than it is."""
    chosen = min(passages, key=lambda pairs: ratio(*zip(*pairs[::2], strict=True)).value)
    return chosen[1::2] or chosen


_REST: tuple[Any, ...] = ("", decode, 0, 0)


def _workloads(figure: Figure, directory: Path) -> list[Workload]:
    """A workload for every passage of a text, or one of random tokens."""
    if isinstance(figure.prompts, int):
        prompts = random_prompts(_vocab_size(directory), figure.prompts, figure.batch)
        return [Workload(prompts, figure.gen_tokens, figure.options)]
    text = (PROMPTS / f"{figure.prompts}.txt").read_text(encoding="utf-8").rstrip()
    passages = [text] if figure.prompts == REPEATING else text.split("\n\n")
    tokenizer = load_tokenizer(directory)
    return [Workload([tokenizer.encode(p)], figure.gen_tokens, figure.options) for p in passages]


def _vocab_size(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text())
    return int(config["vocab_size"])


def _outcome(figure: Figure, pairs: Sequence[tuple[float, float]], note: str) -> Outcome:
    found = ratio(*zip(*pairs, strict=True)) if pairs else None
    return Outcome(figure.name, figure.against, figure.least, found, list(pairs), note)


def _middle(said: Sequence[dict[str, float]]) -> str:
    """Mean statistics of the trials, in words."""
    names = said[0] if said else ()
    means = {name: sum(one[name] for one in said) / len(said) for name in names}
    return ", ".join(f"{name} {value:.2f}" for name, value in means.items())


# ---------------------------------------------------------------------------------------------
# Rows that aren't a workload's speed


def start(name: str, trials: int) -> Outcome:
    """Process start to first token."""
    directory = model_directory("demo")
    pairs = []
    for _ in range(trials):
        seconds = {
            p: startup.seconds_to_first_token(*c, directory) for p, c in startup.COMMANDS.items()
        }
        pairs.append((1 / seconds[OURS], 1 / seconds["mlx-lm"]))
    return _outcome(Figure(name, "mlx_lm.generate", 6, *_REST), pairs, "")


def dispatches(name: str, trials: int) -> Outcome:
    """Nodes of MLX's graph per decoded token, a call of the C library counting as one.

    Exact, so once is enough.
    """
    counts = []
    for peer in (OURS, "mlx-lm"):
        worker = Worker(peer, model_directory(TINY))
        counts.append(worker.graph().get("primitives", 1))
        worker.close()
    pair = (1 / counts[0], 1 / counts[1])
    note = f"{counts[0]:,} against {counts[1]:,}"
    return _outcome(Figure(name, "mlx-lm", 3, *_REST), [pair], note)


def resident(name: str, trials: int) -> Outcome:
    """Resident memory of a process that has decoded; the same at every trial, so two are enough."""
    directory = model_directory(DEMO)
    work = Workload(random_prompts(_vocab_size(directory), 8, 1), 100)
    pairs, sizes = [], []
    for _ in range(min(trials, 2)):
        pair = []
        for peer in (OURS, "mlx-lm"):
            worker = Worker(peer, directory)
            pair.append(worker.run(work))
            worker.close()
        pairs.append((memory(pair[0], work), memory(pair[1], work)))
        sizes.append([measured["peak_bytes"] / 1e6 for measured in pair])
    note = f"{sizes[-1][0]:,.0f} MB against {sizes[-1][1]:,.0f} MB"
    return _outcome(Figure(name, "mlx-lm", 2, *_REST), pairs, note)


FURTHER: dict[str, Callable[[str, int], Outcome]] = {
    "process start to first token, demo": start,
    "dispatches per decoded token, 28 layers": dispatches,
    "resident memory, demo, while decoding": resident,
}


# ---------------------------------------------------------------------------------------------
# The table


def table(outcomes: Sequence[Outcome], title: str) -> Table:
    """For the terminal."""
    made = Table(title=title, title_justify="left")
    for column in ("figure", "against", "at least", "measured", "", "note"):
        made.add_column(column, overflow="fold")
    for outcome in outcomes:
        made.add_row(*_cells(outcome))
    return made


def _cells(outcome: Outcome) -> list[str]:
    measured = str(outcome.ratio) if outcome.ratio else "–"
    least = f"{outcome.least:g}x"
    return [outcome.name, outcome.against, least, measured, outcome.verdict, outcome.note]


def write(outcomes: Sequence[Outcome], found: dict[str, Any], folder: Path) -> None:
    """`speed.json` with every trial, and the table as `speed.md`.

    Rows that the folder has of an earlier run on this machine stay, unless they were measured anew.
    """
    file = folder / SPEED
    known = {outcome.name: outcome for outcome in outcomes}
    rows = list((_earlier(file, found) | known).values())
    values = [asdict(outcome) | {"verdict": outcome.verdict} for outcome in rows]
    text = json.dumps({"machine": found, "rows": values}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    lines = [
        f"{found['chip']}, {found['cores']} cores, BLAS: {found['blas']}",
        "",
        "| figure | against | at least | measured (95 % interval) | | | when (UTC) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join([*_cells(outcome), outcome.measured[:16]])} |" for outcome in rows),
    ]
    (folder / "speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _earlier(file: Path, found: dict[str, Any]) -> dict[str, Outcome]:
    """Name → row of the file that is there, if it is of the same machine."""
    if not file.exists():
        return {}
    values = read_json(file)
    machine_then = values.get("machine")
    if not isinstance(machine_then, dict) or not isinstance(values.get("rows"), list):
        raise InputError(f"{file}: not written by this command; choose another folder")
    if any(machine_then.get(name) != found[name] for name in ("chip", "cores", "blas")):
        raise InputError(f"{file}: is of another machine or BLAS; choose another folder")
    rows = {}
    for row in values["rows"]:
        fields = {name: value for name, value in row.items() if name != "verdict"}
        fields["ratio"] = fields["ratio"] and Ratio(*fields["ratio"])
        rows[row["name"]] = Outcome(**fields)
    return rows
