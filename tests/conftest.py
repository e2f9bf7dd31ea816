"""What several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A GPU may multiply float32 matrices in TF32, unless MLX finds this at its first product.
os.environ["MLX_ENABLE_TF32"] = "0"

from mlx_openelm import OpenELM, device, load
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from . import strict

settings.register_profile("a busy machine is no failure", deadline=None)
settings.load_profile("a busy machine is no failure")

# A second run of the suite, with `MLX_OPENELM_POLICY=gpu`: as it is computed on a GPU.
AS_ON_A_GPU = bool(os.environ.get(device.VARIABLE))
if AS_ON_A_GPU:
    strict.install()

# What computes nothing, or doesn't ask for the policy, gives the same in both runs; `cpu` is the
# CPU's own. `atomic` kills processes at Linux's system calls; its tests of macOS's bring a library
# of their own, which works everywhere.
WITHOUT_THE_POLICY = """
    added_tokens architecture atomic chat cpu cpu_arm differential hostile_tokenizers memory
    compare config geometry hub machine names pace packaging progress report results roofline
    safetensors_file sources stopping tokenizer torch_file unpickler workloads
"""
collect_ignore = [f"test_{name}.py" for name in WITHOUT_THE_POLICY.split() if AS_ON_A_GPU]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def demo() -> tuple[OpenELM, Tokenizer]:
    """The bundled model and its tokenizer."""
    return load("demo")


@pytest.fixture
def run() -> Run:
    """Run `python -m MODULE ARGUMENTS…` as a person would; returns what it printed."""

    def call(
        module: str, *arguments: str | Path, stdin: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", module, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, **environment},
            timeout=120,
        )

    return call
