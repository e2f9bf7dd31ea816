"""The table of figures: what it says of its trials, and that rows are measured again one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_openelm.benchmarks import speed
from mlx_openelm.benchmarks.speed import FIGURES, Figure, Outcome
from mlx_openelm.benchmarks.statistics import ratio
from mlx_openelm.errors import InputError

from .conftest import Run

MODULE = "mlx_openelm.benchmarks"
MACHINE: dict[str, Any] = {"chip": "a chip", "cores": 2, "blas": "a BLAS"}


def outcome(name: str, *pairs: tuple[float, float], least: float = 2.0) -> Outcome:
    found = ratio(*zip(*pairs, strict=True)) if pairs else None
    return Outcome(name, "mlx-lm", least, found, list(pairs))


def test_the_verdict_follows_from_the_trials() -> None:
    assert outcome("a", (4, 2), (4.2, 2), (4.4, 2)).verdict == "pass"
    assert outcome("a", (3.8, 2), (3.9, 2), (4.4, 2)).verdict == "short"
    assert outcome("a").verdict == "not measured"


def test_rows_that_are_measured_again_replace_the_old_ones(tmp_path: Path) -> None:
    speed.write([outcome("a", (2, 1)), outcome("b", (3, 1))], MACHINE, tmp_path)
    speed.write([outcome("b", (5, 1)), outcome("c", (7, 1))], MACHINE, tmp_path)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["name"], row["ratio"][0]) for row in rows] == [("a", 2), ("b", 5), ("c", 7)]
    table = (tmp_path / "speed.md").read_text()
    assert table.count("| pass |") == 3
    with pytest.raises(InputError, match="is of another machine"):
        speed.write([], {**MACHINE, "chip": "another"}, tmp_path)


def test_a_figure_is_measured_in_turns() -> None:
    figure = Figure("x", "plain", 0.1, "demo", speed.decode, "repeating", 8)
    figure.options["prompt_lookup"] = True
    [found] = speed.measure(figure, 2)
    assert len(found.trials) == 2
    assert found.ratio is not None
    assert "acceptance" in found.note


def test_the_slowest_passage_is_not_measured_by_the_trials_that_chose_it() -> None:
    steady = [(1.0, 1.0)] * 6
    unlucky = [(0.5, 1.0), (1.1, 1.0)] * 3
    assert speed.slowest_of([steady, unlucky, steady]) == [(1.1, 1.0)] * 3
    assert speed.slowest_of([[(2.0, 1.0)], [(1.0, 1.0)]]) == [(1.0, 1.0)]


def test_two_rows_whose_names_begin_alike_are_told_apart() -> None:
    chosen = [f for f in FIGURES if "prefill 512, 270M, float32, against torch" in str(f)]
    assert [figure.against for figure in chosen] == ["torch"]


def test_a_peer_that_fails_has_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "is_installed", lambda peer: peer != "mlx-lm")
    [found] = speed.measure(FIGURES[0], 1)
    assert found.verdict == "not measured"
    assert found.note == "mlx-lm is not installed"


def test_dispatches_are_counted_where_a_step_has_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm")
    monkeypatch.setattr(speed, "TINY", "demo:float32")
    found = speed.dispatches("x", 1)
    assert found.ratio is not None
    assert found.ratio.value > 1


def test_a_row_with_openblas_is_not_measured_without_it() -> None:
    figure = Figure("x", "mlx-lm", 1, "demo", speed.decode, 8, 4, environment={"LD_PRELOAD": ""})
    [found] = speed.measure(figure, 1)
    assert found.verdict == "not measured"


def test_bad_input(run: Run) -> None:
    result = run(MODULE, "speed", "--only", "teleportation")
    assert result.returncode == 2
    assert "no row has 'teleportation' in its name; there are: decode, 28 layers" in result.stderr
    assert run(MODULE, "speed", "--trials", "0").returncode == 2
