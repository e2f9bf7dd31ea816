"""Adapters, merged: files that PEFT wrote (whose layers CoreNet's are), and the formulas."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm.checkpoint.adapter_files import open_adapter
from mlx_openelm.checkpoint.adapter_peft import alpha_over_rank, split
from mlx_openelm.checkpoint.directory import load_model, read_arrays
from mlx_openelm.checkpoint.names import map_names
from mlx_openelm.convert.adapters import corenet_adapter, merge_adapter
from mlx_openelm.convert.checkpoint import READERS
from mlx_openelm.convert.sources import LazyTensor, open_source
from mlx_openelm.errors import InputError

from .conftest import Run
from .models import CONFIGS

MODULE = "mlx_openelm.convert"
FIXTURES = Path(__file__).parent / "fixtures"
BASE = FIXTURES / "float32.pt"


def expected(name: str) -> dict[str, np.ndarray]:
    """What PEFT merged, by the names of a model directory, and the base's head if it is untied."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        merged = {f"transformer.{k}": file[k] for k in file.files if k != "dtypes"}
    if name.endswith("lora"):
        base = map_names(open_source(BASE).tensors)[0]
        embeddings = np.array(base["transformer.token_embeddings.weight"].read())
        assert not np.allclose(merged["transformer.token_embeddings.weight"], embeddings)
        merged["lm_head.weight"] = embeddings
    return merged


def check(out: Path, name: str) -> None:
    found, wanted = read_arrays(out)[0], expected(name)
    assert found.keys() == wanted.keys()
    for key, array in found.items():
        assert np.abs(np.array(array) - wanted[key]).max() < 2e-6, key
    assert load_model(out).config.share_input_output_layers is ("lm_head.weight" not in wanted)


@pytest.mark.parametrize(
    ("name", "options"), [("lora", []), ("lora", ["--lora-alpha", "3"]), ("dora", ["yaml"])]
)
def test_corenets_checkpoints(run: Run, tmp_path: Path, name: str, options: list[str]) -> None:
    if options == ["yaml"]:
        (tmp_path / "openelm_dora.yaml").write_text(YAML)
    options = ["--lora-alpha", "6"] if options == ["yaml"] else options
    out = tmp_path / "out"
    result = run(MODULE, FIXTURES / f"{name}.pt", "-o", out, "--dtype", "float32", *options)
    assert result.returncode == 0, result.stderr
    assert ("taken to be its rank" in result.stderr) is (options == [])
    assert ("the merged model has both" in result.stderr) is (name == "lora")
    check(out, name)


YAML = """
model:
  language_modeling.general_gpt: {model_name: OpenELM-270M, vocab_size: 10}
  lora:
    use_lora: true
    config:
      - regex: '.*token_embedding.*'
        params: {adapter_name: lora, r: 3, lora_alpha: 100, use_rslora: false}
      - regex: '.*proj.*'
        params: {adapter_name: lora, r: 3, lora_alpha: 6, use_rslora: false}
"""


def test_alpha_comes_from_the_training_yaml(tmp_path: Path) -> None:
    from mlx_openelm.convert.adapters import corenet_scale

    file = tmp_path / "train.yaml"
    file.write_text(YAML)
    scale = corenet_scale(file)
    assert scale is not None
    assert scale("layers.0.attn.qkv_proj", 3) == 2
    assert scale("token_embeddings", 4) == 25
    with pytest.raises(InputError, match="doesn't say the lora_alpha of 'norm'"):
        scale("norm", 3)
    file.write_text(YAML.replace("use_rslora: false}\n      -", "use_rslora: true}\n      -"))
    stable = corenet_scale(file)
    assert stable is not None
    assert stable("token_embeddings", 4) == 50
    file.write_text("model: {}")
    assert corenet_scale(file) is None


@pytest.mark.parametrize("name", ["peft_lora", "peft_dora"])
@pytest.mark.parametrize("base", ["--base", "its config", "float16"])
def test_pefts_directories(run: Run, tmp_path: Path, name: str, base: str) -> None:
    adapter, options = FIXTURES / name, ["--base", str(BASE)]
    if base == "its config":
        adapter = Path(shutil.copytree(adapter, tmp_path / name))
        edit(adapter, base_model_name_or_path=str(BASE))
        options = []
    out = tmp_path / "out"
    dtype = "float16" if base == "float16" else "float32"
    result = run(MODULE, adapter, "-o", out, "--dtype", dtype, *options)
    assert result.returncode == 0, result.stderr
    if dtype == "float32":
        check(out, name)
    record = json.loads((out / "conversion.json").read_text())
    assert record["source"]["kind"].startswith("PEFT adapter")


def edit(directory: Path, **values: object) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def lazy(name: str, array: np.ndarray) -> LazyTensor:
    return LazyTensor(name, array.shape, "float32", lambda a, b: mx.array(array[a:b]))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("module", ["layers.1.ffn.proj_2", "token_embeddings"])
def test_the_formulas_by_rows(module: str, dora: bool) -> None:
    rng = np.random.default_rng(0)
    embedding = module == "token_embeddings"
    w = rng.normal(size=(12, 7)).astype(np.float32)
    rows, columns = w.shape
    a = rng.normal(size=(3, rows if embedding else columns)).astype(np.float32)
    b = rng.normal(size=(columns if embedding else rows, 3)).astype(np.float32)
    m = rng.normal(size=columns if embedding else rows).astype(np.float32)
    prefix = "lora_embedding_" if embedding else "lora_"
    tensors = {
        f"{module}.base_layer.weight": lazy("w", w),
        f"{module}.{prefix}A.any": lazy("a", a),
        f"{module}.{prefix}B.any": lazy("b", b),
    }
    if dora:
        tensors[f"{module}.lora_magnitude_vector.any"] = lazy("m", m)
    plain, parts = split(tensors)
    adapter = corenet_adapter(Path("x"), parts, alpha_over_rank(6))
    merged, _, _ = merge_adapter(map_names(plain)[0], adapter, CONFIGS["untied"])
    [tensor] = merged.values()
    double = (x.astype(np.float64) for x in (w, a, b))
    w64, a64, b64 = double
    wanted = w64 + 2 * ((b64 @ a64).T if embedding else b64 @ a64)
    if dora:
        # PEFT's embeddings are a linear layer's matrix transposed
        wanted *= (
            m / np.linalg.norm(wanted, axis=0)
            if embedding
            else ((m / np.linalg.norm(wanted, axis=1))[:, None])
        )
    for start, stop in ((0, 12), (5, 9)):
        assert np.abs(np.array(tensor.rows(start, stop)) - wanted[start:stop]).max() < 1e-5


A, B = "layers.0.attn.qkv_proj.lora_A.lora.weight", "layers.0.attn.qkv_proj.lora_B.lora.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A), "'layers.0.attn.qkv_proj' has no lora_A"),
        (lambda t: t.pop(B), "'layers.0.attn.qkv_proj' has no lora_B"),
        (lambda t: t.update({A: t[B]}), "which don't fit a matrix of"),
        (lambda t: t.update({A.replace("lora.w", "two.w"): t[A]}), "several adapters"),
        (lambda t: t.update({"norm.lora_B.lora.weight": t[B]}), "'norm' has no lora_A"),
        (
            lambda t: t.update({"other.lora_A.weight": t[A], "other.lora_B.weight": t[B]}),
            "'other' has no matrix",
        ),
        (lambda t: t.update({"layers.0.attn.qkv_proj.lora_C.x": t[A]}), "kind that isn't known"),
    ],
)
def test_adapters_that_do_not_fit(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    tensors = dict(open_source(FIXTURES / "lora.pt").tensors)
    change(tensors)

    def read() -> None:
        plain, parts = split(tensors)
        adapter = corenet_adapter(Path("x"), parts, alpha_over_rank(3))
        merge_adapter(map_names(plain)[0], adapter, CONFIGS["scaled"])

    with pytest.raises(InputError) as error:
        read()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"lora_bias": True}, "lora_bias is 'True'"),
        ({"lora_alpha": float("nan")}, "alpha of 'base_model.model."),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_alpha": "8"}, "alpha of 'base_model.model."),
        ({"r": 4}, "says '4'"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "the regular expression '(a+)+$'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is '[1]', not an object"),
    ],
)
def test_settings_that_are_refused(
    run: Run, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    adapter = Path(shutil.copytree(FIXTURES / "peft_lora", tmp_path / "adapter"))
    edit(adapter, **settings)
    result = run(MODULE, adapter, "-o", tmp_path / "out", "--base", BASE)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (BASE, ["--base", BASE], "float32.pt: has no adapter; --base and --lora-alpha are"),
        (BASE, ["--lora-alpha", "8"], "float32.pt: has no adapter; --base and --lora-alpha are"),
        (FIXTURES / "peft_lora", ["--base", BASE, "--ema"], "which has no averaged weights"),
    ],
)
def test_options_that_do_not_apply(
    run: Run, tmp_path: Path, source: Path, options: list[str], message: str
) -> None:
    result = run(MODULE, source, "-o", tmp_path / "out", *options)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]


def test_what_an_adapter_alone_needs(run: Run, tmp_path: Path) -> None:
    result = run(MODULE, FIXTURES / "peft_lora", "-o", tmp_path / "out")
    assert "doesn't say what it was trained on; use --base" in result.stderr
    adapter = Path(shutil.copytree(FIXTURES / "peft_lora", tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors or adapter_model\.bin"):
        open_adapter(adapter, READERS)


def test_a_corenet_adapter_alone_is_merged_into_its_base(run: Run, tmp_path: Path) -> None:
    safetensors = tmp_path / "adapter.safetensors"
    tensors = open_source(FIXTURES / "lora.pt").tensors
    alone = {name: t.read() for name, t in tensors.items() if "lora_" in name}
    mx.save_safetensors(str(safetensors), alone)
    result = run(MODULE, safetensors, "-o", tmp_path / "out", "--dtype", "float32")
    assert result.returncode == 2
    assert "an adapter without its base weights; name them with --base" in result.stderr
    options = ("--dtype", "float32", "--base", BASE, "--verify")
    result = run(MODULE, safetensors, "-o", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    check(tmp_path / "out", "lora")
