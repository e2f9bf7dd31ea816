"""What is measured, and what is read off the answers."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_openelm import OpenELM, load
from mlx_openelm.benchmarks import models, workloads
from mlx_openelm.benchmarks.fitting import SIZES, Speeds, fit, shrink
from mlx_openelm.benchmarks.models import check_memory, model_directory, target
from mlx_openelm.benchmarks.peers import OURS, PEERS, Workload, is_installed, llama_cpp, ours
from mlx_openelm.benchmarks.results import Work
from mlx_openelm.benchmarks.workloads import PROMPTS, Plan, Task, read_off, series, tasks
from mlx_openelm.checkpoint.hub import DEMO
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError, OpenELMError
from mlx_openelm.generation.decoding import generate_step
from mlx_openelm.tokenizer.tokenizer import Tokenizer

CONFIG = OpenELMConfig.from_json(DEMO / "demo" / "config.json")


def kinds(found: list[Task]) -> list[str]:
    return [work.kind for task in found for work in task.works]


def test_a_plan_for_a_model_with_a_tokenizer(demo: tuple[OpenELM, Tokenizer]) -> None:
    plan = Plan(prompt_tokens=(32, 1000, 2048), gen_tokens=64, draft_model="demo-draft")
    found, notes = tasks(plan, CONFIG, demo[1])
    assert "no prompts of 2048 tokens: the context is 1024" in notes
    assert kinds(found)[:2] == ["load", "cold"]
    first, last = (t for t in found if t.works[0].kind == "prefill")
    assert [w.gen_tokens for w in first.works] == [0, 64]
    assert [w.gen_tokens for w in last.works] == [0, 25]  # the context ends there
    for task in found:
        if task.workload is not None:
            work = task.works[-1]
            assert work.text in {f.stem for f in PROMPTS.iterdir()}
            lengths = {len(prompt) for prompt in task.workload.prompts}
            assert lengths == {work.prompt_tokens}
            assert len(task.workload.prompts) == work.batch
            assert work.prompt_tokens + task.workload.gen_tokens <= CONFIG.max_context_length + 1


def test_drafted_tokens_are_measured_beside_plain_ones(demo: tuple[OpenELM, Tokenizer]) -> None:
    drafted_kinds = ("speculative", "lookup")
    plan = Plan(kinds=drafted_kinds, prompt_tokens=(8,), draft_model="demo-draft")
    found, _ = tasks(plan, CONFIG, demo[1])
    assert kinds(found) == ["decode", "speculative", "decode", "lookup"]
    plain, drafted, _, lookup = found
    assert plain.workload is not None and drafted.workload is not None
    assert lookup.workload is not None
    assert drafted.workload == replace(plain.workload, options={"draft_model": "demo-draft"})
    assert lookup.workload.options == {"prompt_lookup": True}
    assert all(task.fits(OURS) and not task.fits("mlx-lm") for task in found)
    found, notes = tasks(replace(plan, draft_model=None), CONFIG, demo[1])
    assert kinds(found) == ["decode", "lookup"]
    assert notes == ["no speculative: name a draft model with --draft-model"]


def test_without_a_tokenizer_tokens_are_random() -> None:
    found, notes = tasks(Plan(batches=(1, 3)), OpenELMConfig.from_name("OpenELM-270M"), None)
    assert "cold" not in kinds(found)
    assert notes == ["no drafted tokens: with random weights they'd say nothing"]
    works = [w for task in found for w in task.works]
    assert {w.text for w in works} == {"random tokens"}
    [batch] = [task for task in found if task.works[0].kind == "batch"]
    assert batch.workload is not None
    assert len({tuple(p) for p in batch.workload.prompts}) == 3
    assert [batch.fits(p) for p in PEERS] == [True, True, False, False]
    assert tasks(Plan(batches=(1, 3)), OpenELMConfig.from_name("OpenELM-270M"), None)[0] == found


def test_the_long_prompt_is_long_enough(demo: tuple[OpenELM, Tokenizer]) -> None:
    text = (PROMPTS / f"{workloads.TEXT}.txt").read_text()
    assert len(text.split()) > 2048  # LLaMA's tokenizer makes more tokens than words
    [prompt] = workloads.text_prompts(demo[1], workloads.TEXT, 2048, 1)
    assert demo[1].decode(prompt).strip() in text


def test_the_repeating_prompt_repeats(demo: tuple[OpenELM, Tokenizer]) -> None:
    text = (PROMPTS / f"{workloads.REPEATING}.txt").read_text().rstrip()
    refrain = " and the king said, I will go; and the queen said, I will go;"
    assert text.endswith(refrain * 6)
    [prompt] = workloads.text_prompts(demo[1], workloads.REPEATING, 1000, 1)
    assert demo[1].decode(prompt).strip() == text


MEASURED = {
    "prefill_seconds": 0.5,
    "decode_seconds": 2.0,
    "tokens": [[1] * 21],
    "times": [0.5 + 0.1 * i for i in range(21)],
    "peak_bytes": 7,
    "statistics": {"from draft": 0.5},
}


@pytest.mark.parametrize(
    ("work", "value", "seconds"),
    [
        (Work("prefill", 100), 200, 0.5),
        (Work("decode", 100, 21), 10, 2),  # the first token belongs to the prompt
        (Work("lookup", 100, 21), 10, 2),
        (Work("batch", 100, 21, 1), 21 / 2.5, 2.5),
    ],
)
def test_what_is_read_off(work: Work, value: float, seconds: float) -> None:
    trial, further = read_off(work, 3, MEASURED)
    assert (trial.turn, trial.value, trial.seconds) == (3, pytest.approx(value), seconds)
    assert trial.peak_bytes == 7
    assert trial.series == []
    assert further == {"from draft": 0.5}


def test_a_long_generation_tells_its_drift() -> None:
    trial, _ = read_off(Work("long", 100, 21), 0, MEASURED)
    assert trial.series == [pytest.approx(10)] * 10
    slowing = series([0.0, 1, 2, 3, 4, 5, 7, 9, 11, 13, 15])
    assert slowing == [1.0] * 5 + [0.5] * 5
    assert series([0.0, 1.0]) == []


@pytest.mark.parametrize(
    "wrong",
    [{"trials": 0}, {"gen_tokens": 1}, {"prompt_tokens": (8, 0)}, {"kinds": ("sleep",)}],
)
def test_a_plan_that_makes_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Plan(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# Lengths that fit


def planned(plan: Plan) -> list[Task]:
    return tasks(plan, CONFIG, None)[0]


def test_lengths_shrink_to_the_time() -> None:
    plan = Plan(kinds=("prefill", "decode"))
    rich = fit(plan, planned, {OURS: Speeds(1e-5, 1e-4, 0.1)}, 30).plan
    assert rich == shrink(plan, *SIZES[0])
    slow = {OURS: Speeds(0.01, 0.1, 2.0)}
    middle, works = fit(plan, planned, slow, 120)
    assert 8 < middle.gen_tokens < 128
    assert works[OURS] == {task.works for task in planned(middle)}
    poor, works = fit(plan, planned, slow, 1)
    assert poor == shrink(plan, *SIZES[-1])
    assert works[OURS] == set()


def test_a_slow_runtime_does_what_it_has_time_for() -> None:
    plan = Plan(kinds=("prefill", "decode"), prompt_tokens=(32, 512))
    speeds = {"mlx-lm": Speeds(0.01, 0.02, 1.0), OURS: Speeds(1e-5, 1e-4, 0.1)}
    chosen, works = fit(plan, planned, speeds, 60)
    assert chosen == shrink(plan, *SIZES[0])
    short, long = (task.works for task in planned(chosen))
    assert works == {OURS: {short, long}, "mlx-lm": {short}}
    _, works = fit(plan, planned, speeds, 120)
    assert works == {OURS: {short, long}, "mlx-lm": {short, long}}
    chosen, works = fit(plan, planned, speeds, 0.9)
    assert works["mlx-lm"] == set()


def test_nothing_grows_by_shrinking() -> None:
    small = Plan(prompt_tokens=(8,), gen_tokens=4, long_tokens=12, trials=1)
    assert shrink(small, *SIZES[0]) == small
    assert shrink(Plan(prompt_tokens=(512, 1024)), *SIZES[-1]).prompt_tokens == (512,)


# ---------------------------------------------------------------------------------------------
# Models


def test_a_model_is_known_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("random:28x64:float32", "demo:4bit", "demo-draft:bfloat16", "wide-demo:8bit"):
        before = target(name)
        assert not list(tmp_path.rglob(f"*{before.model.stored}*"))
        made = target(str(model_directory(name)))
        assert made.config == before.config
        for field in ("stored", "parameters", "bytes"):
            assert getattr(made.model, field) == getattr(before.model, field), field
    assert target("random:28x64").model.random and not before.model.random


def test_a_published_shape_is_recognised(tmp_path: Path) -> None:
    demo = target("demo")
    assert (demo.model.shape, demo.model.stored) == ("demo", "float16")
    assert models._same_shape("OpenELM-270M", OpenELMConfig.from_name("OpenELM-270M", 32128))
    assert not models._same_shape("OpenELM-450M", OpenELMConfig.from_name("OpenELM-270M"))


def test_the_wide_demo_says_what_the_demo_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "TIMES", 2)
    directories = [model_directory(f"{name}:float32") for name in ("demo", "wide-demo")]
    demo, wide = (load(directory)[0] for directory in directories)
    tokens = mx.array([[1 + 7 * i for i in range(40)]])
    assert mx.abs(wide(tokens) - demo(tokens)).max().item() < 1e-4
    name = "transformer.layers.3.ffn.proj_1.weight"
    assert [model.parameters()[name].shape[0] for model in (demo, wide)] == [768, 2 * 768]


def test_what_does_not_fit_into_memory_is_refused_from_the_sizes() -> None:
    big = target("random:OpenELM-3B:float32")
    with pytest.raises(InputError) as caught:
        check_memory([big], [OURS, "torch"], 16 << 30)
    assert str(caught.value).startswith(
        "random:OpenELM-3B:float32: 24.3 GB for mlx-openelm and torch, which stay loaded "
        "together, and this machine has 17.2 GB"
    )
    check_memory([big], [OURS], 16 << 30)
    check_memory([big], [OURS, "torch"], None)


# ---------------------------------------------------------------------------------------------
# llama.cpp

TINY = [[1, 400, 401, 402, 403, 404]]


def greedy(demo: tuple[OpenELM, Tokenizer], prompt: list[int], count: int) -> list[int]:
    import mlx.core as mx

    return [t for t, *_ in generate_step(mx.array(prompt), demo[0], max_tokens=count)]


def test_llama_cpp_gives_our_greedy_tokens(
    demo: tuple[OpenELM, Tokenizer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime = llama_cpp.load(model_directory("demo:float32"))
    for _ in range(2):  # a prompt that it has seen is processed again
        measured = runtime.run(Workload(TINY, 24))
    assert measured.tokens == [greedy(demo, TINY[0], 24)]
    assert measured.prefill_seconds > 0
    assert measured.decode_seconds > 0
    assert llama_cpp.version().startswith("xllamacpp ")
    written = llama_cpp.gguf_of(model_directory("demo:float32"))
    before = written.stat().st_mtime_ns
    assert llama_cpp.gguf_of(model_directory("demo:float32")).stat().st_mtime_ns == before


def test_our_own_in_every_way(demo: tuple[OpenELM, Tokenizer]) -> None:
    runtime = ours.load(DEMO / "demo")
    wanted = greedy(demo, TINY[0], 12)
    plain = runtime.run(Workload(TINY, 12))
    assert plain.tokens == [wanted]
    assert len(plain.times) == 12
    assert plain.statistics == {}
    batch = runtime.run(Workload([TINY[0], TINY[0][::-1]], 12))
    assert batch.tokens == [wanted, greedy(demo, TINY[0][::-1], 12)]
    for options in ({"draft_model": "demo-draft"}, {"prompt_lookup": True}):
        drafted = runtime.run(Workload(TINY, 12, options))
        assert drafted.tokens == [wanted]
        assert drafted.statistics["tokens per step"] >= 1
        assert 0 <= drafted.statistics["acceptance"] <= 1


BENCH = """#!/bin/sh
# What llama-bench prints with -o json, shortened; half a millisecond for each token asked for
echo "$@" >> "{log}"
while [ $# -gt 0 ]; do
  case "$1" in -p) p=$2;; -n) n=$2;; esac; shift
done
[ "$n" = 666 ] && {{ echo "error: model failed to load" >&2; exit 1; }}
echo "[{{\\"n_prompt\\": $p, \\"n_gen\\": $n, \\"avg_ns\\": $(( (p + n) * 500000 ))}}]"
"""


def test_llama_bench_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(BENCH.format(log=tmp_path / "log"))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    monkeypatch.setattr(llama_cpp, "gguf_of", lambda directory: tmp_path / "model.gguf")
    runtime = llama_cpp.load(tmp_path)
    measured = runtime.run(Workload([[1] * 10], 5))
    assert (measured.prefill_seconds, measured.decode_seconds) == (0.005, 0.002)
    assert measured.tokens == [[]]
    prompt, generation = (tmp_path / "log").read_text().splitlines()
    assert "-p 10 -n 0" in prompt
    assert "-p 0 -n 4 -d 10" in generation
    assert "-ctk f32 -ctv f32 -fa 0" in generation
    trial, _ = read_off(Work("decode", 10, 5), 0, json.loads(json.dumps(vars(measured))))
    assert trial.value == 2000
    with pytest.raises(OpenELMError, match="llama-bench: error: model failed to load"):
        runtime.run(Workload([[1] * 10], 667))


def test_a_peer_without_its_package_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_openelm.benchmarks import peers

    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    assert not is_installed("llama.cpp")
    monkeypatch.setattr(peers.shutil, "which", lambda name: "/bin/" + name)
    assert is_installed("llama.cpp")
    assert not is_installed("torch")


@pytest.mark.parametrize("peer", ["mlx_lm", "torch"])
def test_peers_give_our_greedy_tokens(
    peer: str,
    demo: tuple[OpenELM, Tokenizer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pytest.importorskip(peer)
    from importlib import import_module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module = import_module(f"mlx_openelm.benchmarks.peers.{peer}")
    runtime = module.load(model_directory("demo:float32"))
    measured = runtime.run(Workload(TINY, 12))
    assert measured.tokens == [greedy(demo, TINY[0], 12)]
    assert len(measured.times) == 12
    if peer == "mlx_lm":
        batch = runtime.run(Workload([TINY[0], TINY[0][::-1]], 6))
        assert batch.tokens[0] == measured.tokens[0][:6]
        assert [len(tokens) for tokens in batch.tokens] == [6, 6]
