"""Runtimes in processes of their own: in turns, and the rest goes on when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from mlx_openelm.benchmarks import calibration, default, measuring, paper, results
from mlx_openelm.benchmarks.__main__ import main
from mlx_openelm.benchmarks.measuring import measure_model, parting
from mlx_openelm.benchmarks.models import target
from mlx_openelm.benchmarks.peers import OURS, PEERS, Workload
from mlx_openelm.benchmarks.results import Calibration, Machine, Results, Trial
from mlx_openelm.benchmarks.runner import Worker
from mlx_openelm.benchmarks.session import Session, busy, conditions
from mlx_openelm.benchmarks.startup import seconds_to_first_token
from mlx_openelm.benchmarks.workloads import Plan
from mlx_openelm.errors import OpenELMError

from .conftest import Run
from .fake_peers import CHATTY, CRASHING, HANGING, OTHER, RAISING, STILLBORN

MODULE = "mlx_openelm.benchmarks"
WORK = Workload([[1, 2, 3]], 4)
NOW = Calibration(1e9, {"float32": 1e9, "float16": 1e9})
NOWHERE = Path("nowhere")


def test_noise_does_not_get_between_the_answers() -> None:
    with closing(Worker(CHATTY, NOWHERE)) as worker:
        assert worker.ready["note"] == "chats"
        measured = worker.run(WORK)
        assert measured["tokens"] == [[5, 6, 7, 8]]
        assert measured["peak_bytes"] > 1e7
        assert measured["mlx_peak_bytes"] is None
        assert worker.graph() == {}


def test_a_crash_is_told_with_its_last_words() -> None:
    with closing(Worker(CRASHING, NOWHERE)) as worker:
        worker.run(WORK)
        for _ in range(2):  # and it stays told
            with pytest.raises(OpenELMError, match="crashing: out of luck"):
                worker.run(WORK)


def test_a_hang_is_ended() -> None:
    with closing(Worker(HANGING, NOWHERE)) as worker:
        start = time.monotonic()
        with pytest.raises(OpenELMError, match=r"hanging: took longer than 0.3 s"):
            worker.run(WORK, 0.3)
        assert time.monotonic() - start < 5


def test_an_interrupt_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    with closing(Worker(CHATTY, NOWHERE)) as worker:
        assert worker._process.stdout is not None
        monkeypatch.setattr(worker._process.stdout, "readline", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker.run(WORK)
    assert not [
        t
        for t in threading.enumerate()
        if isinstance(t, threading.Timer) and not t.finished.is_set()
    ]


def test_a_refusal_is_told_and_can_be_followed_by_more() -> None:
    with closing(Worker(RAISING, NOWHERE)) as worker:
        for _ in range(2):
            with pytest.raises(OpenELMError, match="raising: ValueError: no such thing"):
                worker.run(WORK)


def test_what_cannot_load_says_why() -> None:
    with pytest.raises(OpenELMError, match="stillborn: MemoryError: no room"):
        Worker(STILLBORN, NOWHERE)


def measured(monkeypatch: pytest.MonkeyPatch, model: str, *peers: str) -> Results:
    """A short session, with `CHATTY` in the place of this project."""
    monkeypatch.setattr(calibration, "short", lambda dtypes: NOW)
    monkeypatch.setattr(measuring, "OURS", CHATTY)
    found = Session(["run"], Machine())
    plan = Plan(kinds=("prefill", "decode"), prompt_tokens=(8, 16), gen_tokens=4, trials=3)
    measure_model(found, target(model), [CHATTY, *peers], plan, lambda what, steps: lambda: None)
    return found.results(partial=False)


def test_what_fails_has_a_row_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = measured(monkeypatch, "demo", CRASHING, STILLBORN)
    results.write(found, tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == found
    whole = [m for m in found.measurements if m.runtime == CHATTY]
    assert [(m.work.kind, m.work.prompt_tokens) for m in whole] == [
        ("prefill", 8),
        ("decode", 8),
        ("prefill", 16),
        ("decode", 16),
    ]
    assert all([t.turn for t in m.trials] == [0, 1, 2] for m in whole)
    assert all(t.calibration == NOW for m in whole for t in m.trials)
    assert whole[0].trials[0].value == pytest.approx(8 / 0.01)
    assert whole[1].trials[0].value == pytest.approx(3 / 0.003)
    failed = {m.runtime: m.error for m in found.measurements if m.error}
    assert failed.keys() == {CRASHING, STILLBORN}
    assert "out of luck" in str(failed[CRASHING])
    assert "no room" in str(failed[STILLBORN])
    assert sum(m.runtime == CRASHING for m in found.measurements) == 2  # of the first task only
    assert sum("left out" in note for note in found.notes) == 2
    assert all(m.differs is None for m in found.measurements)  # the demo isn't float32


def test_other_tokens_are_flagged_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, "demo:float32", OTHER)
    flagged = {m.runtime: m.differs for m in found.measurements if m.work.prompt_tokens == 8}
    assert flagged == {CHATTY: None, OTHER: "token 3 is 0, not 7"}


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([[3, 4, 2, 9]], None),  # what follows the end isn't compared
        ([[3, 4, 5, 6]], None),
        ([[3, 5, 2, 6]], "token 2 is 5, not 4"),
        ([[3]], "token 2 is nothing, not 4"),
    ],
)
def test_where_tokens_part(theirs: list[list[int]], said: str | None) -> None:
    assert parting([[3, 4, 2, 6]], theirs, end=2) == said


def test_the_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "short", lambda dtypes: NOW)
    found = Session(["run"], Machine(), deadline=time.monotonic() + 2)
    plan = Plan(kinds=("decode",), prompt_tokens=(8,), gen_tokens=4, trials=3)

    def begin(what: str, steps: int) -> Callable[[], None]:
        return lambda: None

    start = time.monotonic()
    measure_model(found, target("demo"), [HANGING], plan, begin)
    assert time.monotonic() - start < 10
    assert found.results(partial=False).measurements == []
    assert "the time was up before all was measured" in found.notes


def test_what_makes_one_doubt() -> None:
    steady = [Calibration(1e10 + i, {}) for i in range(8)]
    wild = [Calibration(1e10 * (1 + i % 2), {}) for i in range(8)]
    assert conditions(Machine(), steady) == []
    [noisy] = conditions(Machine(), wild)
    assert noisy.startswith("the machine was noisy: its bandwidth went from 10.0 to 20.0 GB/s")
    hot = Machine(power_source="battery", low_power_mode="on", thermal_pressure="limited to 62 %")
    assert len(conditions(hot, steady)) == 3
    [said] = busy(1.5, 2)
    assert said.startswith("the machine was busy before the run began: load average 1.5 on 2 cores")
    assert busy(0.2, 2) == busy(9.0, None) == []
    cool = Machine(power_source="AC power", low_power_mode="off", thermal_pressure="none")
    assert conditions(cool, steady) == []


def test_ctrl_c_leaves_a_valid_partial_file(tmp_path: Path) -> None:
    options = ["--workloads", "decode", "--prompt-tokens", "8", "--gen-tokens", "4"]
    command = [sys.executable, "-m", MODULE, "run", *options, "--trials", "100000"]
    with subprocess.Popen(
        [*command, "-o", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        start_new_session=True,
        # A shell's background job ignores the signal, and so would what this starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "decode" in line:
                    break
            time.sleep(2)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of the group
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    found = results.read(tmp_path / "results.json")
    assert found.partial
    [measurement] = found.measurements
    assert measurement.runtime == OURS
    assert measurement.trials
    assert isinstance(measurement.trials[0], Trial)
    assert measurement.limit
    assert "PARTIAL" in out
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--peers", "vllm"], f"no peer 'vllm'; known are {', '.join(PEERS)}"),
        (["--workloads", "decode,sleep"], "no workload 'sleep'; known are load, cold, prefill"),
        (["--model", "random:OpenELM-7B"], "no shape 'OpenELM-7B'; known are OpenELM-270M"),
        (["--model", "random:28x64:5.5bit"], "stored as '5.5bit'? Known are float32"),
        (["--model", "nowhere"], "nowhere: no such file or directory"),
        (["--trials", "0"], "--trials: 0 is too few"),
        (["--gen-tokens", "1"], "--gen-tokens: 1 is too few"),
        (["--prompt-tokens", "32,0"], "--prompt-tokens: 0 is too few"),
        (["--batch", "a"], "'a' is no list of numbers"),
    ],
)
def test_bad_input(run: Run, options: list[str], reason: str) -> None:
    result = run(MODULE, "run", *options)
    assert result.returncode == 2
    assert reason in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_help_is_quick_and_imports_one_command(run: Run) -> None:
    result = run(MODULE, "--help")
    assert result.returncode == 0
    for name in ("run", "paper", "report", "compare", "startup", "convert"):
        assert f"    {name} " in result.stdout
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", MODULE, "compare", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    ).stderr
    assert "mlx_openelm.benchmarks.report" in loaded
    assert "mlx_openelm.benchmarks.session" not in loaded


def test_the_paper_leaves_out_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[object, ...]] = []
    monkeypatch.setattr(paper, "measure", lambda *given: measured.append(given) or 0)
    monkeypatch.setattr(paper.machine, "describe", lambda: Machine(memory_bytes=2 << 30))
    assert main(["paper", "--trials", "2", "--time", "60"]) == 0
    [(targets, peers, plan, seconds, _)] = measured
    names = [one.model.name for one in targets]  # type: ignore[attr-defined]
    assert "random:OpenELM-270M:4bit" in names
    assert "random:OpenELM-3B:bfloat16" not in names
    assert "left out: random:OpenELM-3B:bfloat16: " in capsys.readouterr().err
    assert (peers, seconds) == ([OURS], 60)
    assert (plan.prompt_tokens, plan.gen_tokens, plan.trials) == ((36,), 1024, 2)  # type: ignore[attr-defined]
    assert main(["paper", "--sizes", "OpenELM-7B"]) == 2
    monkeypatch.setattr(paper.machine, "describe", lambda: Machine(memory_bytes=1 << 20))
    assert main(["paper"]) == 2
    assert "none of these models fits" in capsys.readouterr().err


def test_without_a_command_it_is_the_demo_and_a_270m(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[object, ...]] = []
    monkeypatch.setattr(default, "measure", lambda *given: measured.append(given) or 0)
    assert main([]) == 0
    assert main(["-o", "somewhere"]) == 0
    [(targets, peers, _, seconds, output), second] = measured
    assert [one.model.name for one in targets] == ["demo", "random:OpenELM-270M"]  # type: ignore[attr-defined]
    assert OURS in peers  # type: ignore[operator]
    assert 60 < seconds < 120  # type: ignore[operator]
    assert (output, second[-1]) == (None, Path("somewhere"))


def test_a_cold_start_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hangs.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(OpenELMError, match="hangs printed no text"):
        seconds_to_first_token(["hangs"], b"", tmp_path, 0.5)


def test_loading_is_measured_in_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "short", lambda dtypes: NOW)
    found = Session(["run"], Machine())
    plan = Plan(kinds=("load",), trials=2)
    peers = [CHATTY, STILLBORN]
    measure_model(found, target("demo"), peers, plan, lambda what, steps: lambda: None)
    loaded, failed = found.results(partial=False).measurements
    assert loaded.unit == "s"
    assert len(loaded.trials) == 2
    assert all(0 < t.value < 60 and t.peak_bytes for t in loaded.trials)
    assert failed.error == f"{STILLBORN}: MemoryError: no room"
