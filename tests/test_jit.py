"""MLX's fused CPU kernels: a first run doesn't wait for them, and takes them up later."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_openelm import OpenELM, device, generate, jit
from mlx_openelm.tokenizer import Tokenizer

from .conftest import Run
from .models import CONFIGS, random_model

POLICY = device.Policy("CPU", mx.float32, fast_kernels=False, fused_by_jit=True)
on_cpu = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="kernels are made for a CPU only"
)


def test_a_run_without_kernels_starts_making_them_and_takes_them_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = False
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command))
    monkeypatch.setattr(jit, "ready", lambda: there)
    model = random_model(CONFIGS["uneven"], POLICY)
    cache = model.make_cache()
    found = []
    for i in range(6):
        there = i >= 3
        found.append(model(mx.array([[7]]), cache)[0, 0].tolist())
    assert len(started) == 1
    assert model.traces == 3 + 1  # uncompiled at every step, then once
    whole = random_model(CONFIGS["uneven"])(mx.array([[7] * 6]))[0]
    assert mx.abs(mx.array(found) - whole).max().item() < 1e-5


@on_cpu
def test_the_background_process_makes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is run here with a compiler that fails, so as to see that it gets as far as compiling."""
    started: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command, **_: started.append(command))
        jit.build_in_background()
    [command] = started
    asked = tmp_path / "asked"
    compiler = tmp_path / jit.COMPILER
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\ntouch {asked}\nexit 1\n')
    compiler.chmod(0o755)
    monkey = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=monkey, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert asked.exists()
    assert not list(tmp_path.glob("mlx/*/cpu/openelm-*"))


@on_cpu
def test_where_they_are_and_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which(jit.COMPILER) is None:
        pytest.skip("without a compiler there is nothing to wait for")
    assert jit.ready()  # made for this test session
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert not jit.ready()
    marker = jit._marker()
    marker.parent.mkdir(parents=True)
    marker.touch()
    assert jit.ready()
    monkeypatch.setenv(jit.VARIABLE, "0")
    assert not jit.ready()
    monkeypatch.delenv(jit.VARIABLE)
    marker.unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    assert jit.ready()  # MLX leaves operations unfused then


@on_cpu
def test_uncompiled_text_is_the_same(run: Run, demo: tuple[OpenELM, Tokenizer]) -> None:
    environment = {jit.VARIABLE: "0"}
    options = ("-p", "Once upon a time", "-m", "20")
    result = run("mlx_openelm.generate", *options, "-v", **environment)
    assert result.stdout == generate(*demo, "Once upon a time", max_tokens=20) + "\n"
    assert "not compiled" in result.stderr


@on_cpu
def test_one_set_of_kernels_serves_every_model(demo: tuple[OpenELM, Tokenizer]) -> None:
    """No C++ is compiled for a model, a batch or a length that was not there before."""
    if shutil.which(jit.COMPILER) is None:
        pytest.skip("without a compiler there are no kernels")
    folder = jit._marker().parent
    before = set(folder.glob("*.so"))
    for model in (demo[0], random_model(CONFIGS["untied"]), random_model(CONFIGS["no q/k norm"])):
        for lengths in (None, [4, 9, 9], [4, 4]):
            for length in (1, 3, 4, 20, 100):
                cache = model.make_cache(lengths=lengths)
                tokens = mx.ones((len(lengths or [1]), length), mx.int32)
                mx.eval(model(tokens, cache), model(tokens[:, :1], cache, last_only=True))
    assert set(folder.glob("*.so")) == before
    assert sys.platform == "darwin" or before
