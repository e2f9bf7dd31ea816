"""The benchmarks run, and what they say follows from what they measured. (No speed is tested.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_openelm import config
from mlx_openelm.benchmarks import conversion
from mlx_openelm.benchmarks.checkpoints import random_checkpoint
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.convert.sources import open_source
from mlx_openelm.model.shapes import tensor_shapes

from .conftest import Run

MODULE = "mlx_openelm.benchmarks"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PEERS = RESULTS / "peers-amd-epyc-2cores" / "results.json"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> OpenELMConfig:
    """A published model of 60 kB."""
    shape = {"num_transformer_layers": 2, "model_dim": 64, "head_dim": 16}
    monkeypatch.setitem(config.PUBLISHED, "OpenELM-270M", shape)
    return OpenELMConfig.from_name("OpenELM-270M", 50)


def test_a_random_checkpoint_has_the_models_tensors(tiny: OpenELMConfig) -> None:
    tensors = random_checkpoint(tiny).tensors
    assert {name: t.shape for name, t in tensors.items()} == tensor_shapes(tiny)
    embeddings = tensors["transformer.token_embeddings.weight"].read()
    assert 0.015 < embeddings.square().mean().item() ** 0.5 < 0.025


def test_the_contestants_convert_the_same(tiny: OpenELMConfig, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from mlx_openelm.benchmarks.checkpoints import write_pt

    write_pt(tiny, tmp_path / "random.pt")
    assert conversion.with_pytorch(tmp_path / "random.pt", tmp_path / "a") > 0
    read = open_source(tmp_path / "random.pt").tensors
    theirs = open_source(tmp_path / "a" / "model.safetensors").tensors
    assert theirs.keys() == read.keys()
    assert {t.dtype for t in theirs.values()} == {"bfloat16"}
    (tmp_path / "random.yaml").write_text(YAML)
    conversion.with_mlx_openelm(tmp_path / "random.pt", tmp_path / "b", hashes=False)
    ours = open_source(tmp_path / "b").tensors
    for name, tensor in theirs.items():
        assert tensor.read().tolist() == ours[f"transformer.{name}"].read().tolist()


YAML = """
model:
  language_modeling:
    general_gpt: {model_name: OpenELM-270M, vocab_size: 50}
"""


def test_what_is_said_of_the_numbers() -> None:
    fast, slow = {"seconds": 2.0, "peak_bytes": 1e8}, {"seconds": 3.0, "peak_bytes": 2e9}
    said = conversion._ratio({"mlx-openelm": [fast, fast], "PyTorch": [slow, slow]})
    assert said == "PyTorch's time over ours: 1.50x (1.50 to 1.50); memory: 20.0x"


@pytest.mark.parametrize("command", ["run", "speed", "report", "convert"])
def test_where_it_cannot_write_it_does_not_begin(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    given = {
        "run": ["--workloads", "long", "-o", tmp_path / "file"],
        "speed": ["-o", tmp_path / "file"],
        "report": [PEERS, "-o", tmp_path / "file"],
        "convert": ["--json", tmp_path / "file" / "numbers.json"],
    }[command]
    result = run("mlx_openelm.benchmarks", command, *given)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path / 'file'}: is a file, not a directory\n"


def test_startup_prints_its_table(run: Run) -> None:
    result = run(MODULE, "startup", "--trials", "1")
    assert result.returncode == 0, result.stderr
    assert "mlx-openelm " in result.stdout
    assert " s  (" in result.stdout


@pytest.mark.parametrize("name", ["startup", "convert"])
def test_no_trials_make_no_sense(run: Run, name: str) -> None:
    result = run(MODULE, name, "--trials", "0")
    assert result.returncode == 2
    assert "--trials must be at least 1" in result.stderr
