"""The system's BLAS is used where there is one, and computes the same."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mlx_openelm import blas

LOGITS = """
import json
from mlx_openelm import blas, load
import mlx.core as mx
model, _ = load("demo")
logits = model(mx.array([list(range(3, 43))]))
print(json.dumps([blas.in_use, logits[0, -1].tolist()]))
"""


def python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture(scope="module")
def openblas() -> str:
    """The name of the system's OpenBLAS."""
    for name in blas.SONAMES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    pytest.skip("no OpenBLAS on this system")


def test_it_is_found_and_agrees_with_mlxs_own(openblas: str) -> None:
    found, fast = json.loads(python(LOGITS, "-W", "error", MLX_OPENELM_BLAS="").stdout)
    none, slow = json.loads(python(LOGITS, "-W", "error", MLX_OPENELM_BLAS="0").stdout)
    assert (found, none) == (openblas, None)
    difference = np.abs(np.array(fast) - np.array(slow)).max()
    assert 0 < difference < 1e-4  # another order of additions, no other mathematics


def test_too_late_is_told_and_nothing_fails(openblas: str) -> None:
    result = python("import mlx.core, mlx_openelm\n" + LOGITS)
    assert result.returncode == 0
    assert json.loads(result.stdout)[0] is None
    assert result.stderr.count("RuntimeWarning: mlx was imported before mlx_openelm") == 1
    quiet = python("import mlx.core, mlx_openelm", MLX_OPENELM_BLAS="0")
    assert quiet.stderr == ""


def test_a_library_can_be_named(openblas: str) -> None:
    result = python("import mlx_openelm.blas as b; print(b.in_use)", MLX_OPENELM_BLAS=openblas)
    assert result.stdout.strip() == openblas
    wrong = python("import mlx_openelm.blas as b; print(b.in_use)", MLX_OPENELM_BLAS="./none.so")
    assert wrong.returncode == 0
    assert wrong.stdout.strip() == "None"
    assert "MLX_OPENELM_BLAS=./none.so" in wrong.stderr
    other = python("import mlx_openelm.blas as b; print(b.in_use)", MLX_OPENELM_BLAS="libm.so.6")
    assert other.stdout.strip() == "None"
