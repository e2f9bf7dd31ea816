"""The policy: what it says, and how it is overridden."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_openelm import InputError, device
from mlx_openelm.checkpoint.hub import BUNDLED

from .conftest import Run


def test_a_cpu_computes_as_a_gpu_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.VARIABLE, "gpu")
    policy = device.policy()
    assert (policy.dtype, policy.native, policy.compiled, policy.memory) == (None, False, True, 0)
    assert device.compute_dtype(mx.bfloat16) == mx.bfloat16
    assert str(policy).endswith("computing in the dtype of the weights, MLX's kernels, compiled")


@pytest.mark.parametrize("value", ["cpu", "GPU", "1"])
def test_other_values_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(device.VARIABLE, value)
    with pytest.raises(InputError, match=f"MLX_OPENELM_POLICY={value}: the only value is gpu"):
        device.policy()


def test_subprocesses_follow(run: Run) -> None:
    arguments = ("mlx_openelm.generate", "--model", BUNDLED["demo"], "--prompt", "a", "-m", "2")
    told = run(*arguments, "--verbose", MLX_OPENELM_POLICY="gpu")
    assert "computing in the dtype of the weights" in told.stderr
    wrong = run(*arguments, MLX_OPENELM_POLICY="metal")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
