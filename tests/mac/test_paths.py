"""The commands where `sys.platform` is "darwin", with a GPU's policy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "mlx_openelm" / "demo" / "demo"

STAND_IN = ROOT / "tests" / "mac" / "stand_in"

Mac = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def mac(tmp_path: Path) -> Mac:
    """Runs a module as a Mac would."""
    environment = {**os.environ, "PYTHONPATH": f"{STAND_IN}:{ROOT}", "MLX_OPENELM_POLICY": "gpu"}

    def run(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-W", "error", "-m", module, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result

    return run


def test_generate(mac: Mac) -> None:
    result = mac("mlx_openelm.generate", "--prompt", "Once upon a time", "-m", "8", "--verbose")
    assert result.stdout.strip()
    assert "computing in the dtype of the weights, MLX's kernels, compiled" in result.stderr
    assert "BLAS" not in result.stderr


def test_convert_verify_inspect_export(mac: Mac, tmp_path: Path) -> None:
    model = tmp_path / "model"
    mac("mlx_openelm.convert", DEMO, "-o", model, "-q", "--verify")
    assert "passed" in mac("mlx_openelm.convert", "verify", model, "--against", DEMO).stdout
    assert "4 bits" in mac("mlx_openelm.convert", "inspect", model).stdout
    mac("mlx_openelm.convert", "export", model, "-o", tmp_path / "demo.gguf", "--format", "gguf")


def test_measure(mac: Mac, tmp_path: Path) -> None:
    options = ["--peers", "", "--prompt-tokens", "8", "--gen-tokens", "4", "--trials", "1"]
    mac("mlx_openelm.benchmarks", "run", *options, "--workloads", "decode", "-o", tmp_path / "out")
    assert '"decode"' in (tmp_path / "out" / "results.json").read_text()
