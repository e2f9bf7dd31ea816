"""What several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from mlx_openelm import OpenELM, load
from mlx_openelm.tokenizer import Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("a busy machine is no failure", deadline=None)
settings.load_profile("a busy machine is no failure")

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
