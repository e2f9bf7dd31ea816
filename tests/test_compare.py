"""Compare: a slowdown of 10 % is found, the same code is a tie, whatever the machine does."""

from __future__ import annotations

import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_openelm import OpenELMConfig
from mlx_openelm.benchmarks.checkpoints import random_checkpoint
from mlx_openelm.benchmarks.compare import AS_MEASURED, Change, compare, conclusion, control, show
from mlx_openelm.benchmarks.peers import Workload
from mlx_openelm.benchmarks.results import Machine, Measurement, Results, Trial, Work, write
from mlx_openelm.benchmarks.runner import Worker
from mlx_openelm.convert.writer import Options, convert

from . import measured
from .conftest import Run
from .models import EVEN

MODULE = "mlx_openelm.benchmarks"
ROOT = Path(__file__).parent.parent


def pair(seed: int, slowdown: float = 1.0, **noise: float) -> tuple[Results, Results]:
    """Two runs on the same machine at different times, the second maybe of slower code."""
    before, after = (measured.Machinery(2 * seed + i, **noise) for i in (0, 1))
    what: dict[str, Any] = {"models": [measured.DEMO], "runtimes": ["mlx-openelm", "mlx-lm"]}
    return (
        measured.results(**what, machinery=before),
        measured.results(**what, machinery=after, slowdown=slowdown),
    )


def ours(changes: list[Change]) -> dict[str, list[str]]:
    """Kind of work -> the verdicts on this project."""
    found: dict[str, list[str]] = {}
    for change in changes:
        if change.before.ours:
            found.setdefault(change.before.work.kind, []).append(change.verdict)
    return found


# ---------------------------------------------------------------------------------------------
# On a machine that drifts (and isn't measured)


NOISE = {
    "a steady machine": {"drift": 0.0, "noise": 0.01},
    "a machine that drifts": {"drift": 0.06, "noise": 0.02},
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=list(NOISE))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_slowdown_of_10_percent_in_generation_is_found(
    seed: int, noise: dict[str, float]
) -> None:
    a, b = pair(seed, 1.1, **noise)
    assert ours(compare(a, b)) == {
        "prefill": ["a tie"] * 3,
        "decode": ["slower"] * 2,
        "batch": ["a tie"],
    }
    assert ours(compare(b, a))["decode"] == ["faster"] * 2


@pytest.mark.parametrize("noise", NOISE.values(), ids=list(NOISE))
def test_the_same_code_is_a_tie_in_19_of_20_comparisons(noise: dict[str, float]) -> None:
    alarms = 0
    for seed in range(20):
        verdicts = ours(compare(*pair(100 + seed, **noise)))
        alarms += any(verdict != "a tie" for some in verdicts.values() for verdict in some)
    assert alarms <= 2  # 1 is what the level promises


def test_without_calibration_the_drift_would_be_taken_for_a_difference() -> None:
    """Else the tests above would show nothing."""

    def bare(results: Results) -> Results:
        found = [
            replace(m, trials=[replace(t, calibration=None) for t in m.trials])
            for m in results.measurements
        ]
        return replace(results, measurements=found, calibration=[])

    verdicts: Counter[str] = Counter()
    for seed in range(10):
        changes = compare(*map(bare, pair(seed)))
        assert {change.divided_by for change in changes} == {AS_MEASURED}
        verdicts.update(verdict for some in ours(changes).values() for verdict in some)
    assert verdicts["a tie"] < 0.7 * verdicts.total()


def test_drift_is_divided_out_by_what_explains_it() -> None:
    """Bandwidth halves within the run, and the workload with it; the matmul rate stays."""

    def run(speed: float, levels: list[float]) -> Results:
        trials = []
        for turn, level in enumerate(levels):
            calibration = replace(
                measured.Machinery(turn).calibration(), bandwidth=level, matmul={"float32": 1e9}
            )
            value = speed * level * (1 + 0.001 * turn)
            trials.append(Trial(turn, value, 1.0, calibration=calibration))
        found = Measurement("demo", "mlx-openelm", measured.DECODE, "tokens/s", trials)
        return Results("", [], Machine(), [measured.DEMO], [found])

    levels = [8.0, 7.0, 6.0, 5.0, 4.0]
    [change] = compare(run(1.0, levels), run(0.9, [level / 2 for level in levels]))
    assert change.divided_by == "bandwidth"
    assert change.ratio.value == pytest.approx(0.9)
    assert change.verdict == "slower"
    [change] = compare(run(1.0, levels), run(1.0, [level / 2 for level in levels]))
    assert change.verdict == "a tie"


def test_a_change_between_two_steady_runs_may_be_the_machines() -> None:
    """Nothing tells a slower machine from slower code, if neither run drifts; so it is a tie."""
    a = measured.results(models=[measured.DEMO], machinery=measured.Machinery(1, 0, 0.01))
    throttled = measured.Machinery(2, 0, 0.01)
    throttled.level -= 0.3
    b = measured.results(models=[measured.DEMO], machinery=throttled)
    assert {v for some in ours(compare(a, b)).values() for v in some} == {"a tie"}


def test_a_workload_that_the_machine_does_not_move_is_not_divided_into_a_difference() -> None:
    def run(seed: int, level: float) -> Results:
        machinery = measured.Machinery(seed, 0.0, 0.01)
        machinery.level = level
        found = measured.measure(machinery, measured.DEMO, measured.DECODE, {"mlx-openelm": 1.0})
        trials = [
            replace(t, value=100 * (1 + 0.01 * math.sin(seed + t.turn))) for t in found[0].trials
        ]
        return Results("", [], Machine(), [measured.DEMO], [replace(found[0], trials=trials)])

    [change] = compare(run(1, 0.0), run(2, -0.4))
    assert change.verdict == "a tie"


def test_seconds_turn_the_verdict_round() -> None:
    def run(seconds: float) -> Results:
        machinery = measured.Machinery(3, 0.0, 0.01)
        speeds = {"mlx-openelm": seconds}
        found = measured.measure(machinery, measured.DEMO, Work("load"), speeds, unit="s")
        return Results("", [], Machine(), [measured.DEMO], found)

    [change] = compare(run(1.0), run(2.0))
    assert change.verdict == "slower"
    assert change.ratio.value == pytest.approx(0.5, rel=0.05)


def test_a_difference_too_small_for_a_word_is_a_tie() -> None:
    a, b = pair(1, 1.02, drift=0.0, noise=0.0001)
    assert ours(compare(a, b))["decode"] == ["a tie"] * 2


def test_three_trials_are_too_few_to_say() -> None:
    a, b = (
        measured.results(machinery=measured.Machinery(seed), slowdown=1 + seed, trials=3)
        for seed in (0, 1)
    )
    assert {v for some in ours(compare(a, b)).values() for v in some} == {"too few"}
    assert conclusion(compare(a, b)) == "mlx-openelm: 12 with too few trials to say (4 a run)."


def test_only_the_same_work_is_compared() -> None:
    a, b = pair(1)
    other = [m for m in b.measurements if m.work != measured.DECODE]
    changes = compare(a, replace(b, measurements=other))
    assert len(changes) == len(a.measurements) - 2
    failed = [replace(m, trials=[], error="crashed") for m in b.measurements]
    assert compare(a, replace(b, measurements=failed)) == []


# ---------------------------------------------------------------------------------------------
# Measured


SITE = """
import os, time
import mlx_openelm.generation.decoding as decoding

real = decoding.generate_step

def slow(*arguments, **options):
    "Tokens come when a clock says: a slower network, but repeatable on a busy machine."
    for i, item in enumerate(real(*arguments, **options)):
        if i == 0:
            start = time.perf_counter()
        time.sleep(max(0.0, start + i * float(os.environ["PACE"]) - time.perf_counter()))
        yield item

decoding.generate_step = slow
"""


@pytest.fixture
def measure(tmp_path: Path) -> Callable[[float], Results]:
    """Run a tiny model through the runner, with a token every so many seconds."""
    config = OpenELMConfig.scaled(num_transformer_layers=2, **EVEN)
    directory = tmp_path / "model"
    options = Options(dtype="float32", hashes=False)
    convert(random_checkpoint(config).tensors, config, directory, options)
    (tmp_path / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])

    def run(pace: float) -> Results:
        worker = Worker("mlx-openelm", directory, {"PYTHONPATH": path, "PACE": str(pace)})
        try:
            answers = [worker.run(Workload([[1, 2, 3]], 6)) for _ in range(8)][1:]
        finally:
            worker.close()
        trials = [
            Trial(turn, 5 / answer["decode_seconds"], answer["decode_seconds"])
            for turn, answer in enumerate(answers)
        ]
        work = Work("decode", 3, 6)
        found = Measurement("demo", "mlx-openelm", work, "tokens/s", trials)
        return Results("", [], Machine(), [measured.DEMO], [found])

    return run


def test_an_injected_slowdown_is_found_in_a_measured_run(
    measure: Callable[[float], Results],
) -> None:
    a, b, slower = measure(0.060), measure(0.060), measure(0.066)
    assert ours(compare(a, b)) == {"decode": ["a tie"]}
    assert ours(compare(a, slower)) == {"decode": ["slower"]}
    [change] = compare(a, slower)
    assert change.ratio.value == pytest.approx(1 / 1.1, abs=0.05)


# ---------------------------------------------------------------------------------------------
# What is said


def said(a: Results, b: Results, width: int = 80) -> str:
    from rich.console import Console

    out = io.StringIO()
    show(a, b, compare(a, b), Console(file=out, width=width))
    assert max(map(len, out.getvalue().splitlines())) <= width
    return " ".join(out.getvalue().split())


def test_the_conclusion_counts() -> None:
    changes = compare(*pair(1, 1.1))
    assert conclusion(changes).startswith("mlx-openelm: 2 of 6 slower, by ")
    same = conclusion(compare(*pair(1)))
    assert re.fullmatch(r"mlx-openelm: 6 a tie, where about \d\.\d % would have shown\.", same)
    assert "no difference beyond noise, as it should be" in control(compare(*pair(1)))
    a, b = pair(1)
    faster = [
        replace(m, trials=[replace(t, value=2 * t.value) for t in m.trials])
        if m.runtime == "mlx-lm"
        else m
        for m in b.measurements
    ]
    assert control(compare(a, replace(b, measurements=faster))).startswith("mlx-lm changed too")


def test_what_to_doubt_is_said() -> None:
    a, b = pair(1)
    assert "Two machines" in said(a, replace(b, machine=measured.LAPTOP))
    assert "another BLAS" in said(a, replace(b, machine=replace(b.machine, blas="MKL")))
    newer = replace(b, machine=replace(b.machine, versions={"mlx": "0.33"}))
    older = replace(a, machine=replace(a.machine, versions={"mlx": "0.32"}))
    assert "Other versions: mlx 0.32, then 0.33." in said(older, newer)
    assert "Nothing to compare" in said(a, replace(b, measurements=[]))
    assert "partial" in said(a, replace(b, partial=True))
    half = replace(b, measurements=b.measurements[:6])
    assert "6 of A's measurements are not in B" in said(a, half)


def test_the_command(run: Run, tmp_path: Path) -> None:
    a, b = pair(1, 1.1)
    write(a, tmp_path / "a.json")
    write(b, tmp_path / "b.json")
    done = run(MODULE, "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    assert "slower" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    fail = "--fail-on-slower"
    assert run(MODULE, "compare", tmp_path / "a.json", tmp_path / "b.json", fail).returncode == 1
    assert run(MODULE, "compare", tmp_path / "b.json", tmp_path / "a.json", fail).returncode == 0


def test_the_command_refuses_another_version_in_one_line(run: Run, tmp_path: Path) -> None:
    write(pair(1)[0], tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"schema": 7}')
    done = run(MODULE, "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path / 'b.json'}: schema version 7; this version of mlx-openelm reads 1\n"
    )
