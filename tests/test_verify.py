"""Comparing a converted model with its source, and looking into a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm.checkpoint.directory import load_model, read_arrays, save_model
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.checkpoint.names import EMBEDDINGS, HEAD
from mlx_openelm.convert.__main__ import main
from mlx_openelm.convert.floats import trial_tokens
from mlx_openelm.convert.forward import stages
from mlx_openelm.convert.sources import open_source
from mlx_openelm.model.quantization import Matrix

from . import reference
from .conftest import Run
from .models import CONFIGS, random_model

MODULE = "mlx_openelm.convert"
FIXTURES = Path(__file__).parent / "fixtures"
DEMO = BUNDLED["demo"]


TF32 = """
import os, sys
from mlx_openelm.convert.__main__ import main
before = os.environ.get("MLX_ENABLE_TF32")
main(["inspect", sys.argv[1]])
print(before, os.environ["MLX_ENABLE_TF32"])
"""


@pytest.mark.parametrize(("given", "printed"), [(None, "None 0"), ("1", "1 1")])
def test_the_converter_computes_in_full_float32(given: str | None, printed: str) -> None:
    """Importing changes nothing, and neither does the command what a person has set."""
    environment = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    if given:
        environment["MLX_ENABLE_TF32"] = given
    command = [sys.executable, "-c", TF32, str(DEMO)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == printed


@pytest.mark.parametrize("name", CONFIGS)
def test_the_streamed_network_is_the_references(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    save_model(tmp_path, model.config, model.parameters())
    weights = {key: np.array(array) for key, array in model.parameters().items()}
    tokens = trial_tokens(model.config, 20)
    found = list(stages(open_source(tmp_path).tensors, model.config, tokens))
    assert [stage.name for stage in found] == [
        "embeddings",
        *(f"layer {i}" for i in range(model.config.num_transformer_layers)),
        "logits",
    ]
    wanted = reference.logits(model.config, weights, np.array([tokens]))
    assert np.abs(np.array(found[-1].hidden) - wanted).max() < 1e-4
    assert found[-1].largest >= np.abs(wanted).max() - 1e-4


def test_the_largest_value_is_seen_inside_a_layer(tmp_path: Path) -> None:
    model = random_model(CONFIGS["uneven"])
    layer = model.weights.layers[1]
    object.__setattr__(layer, "proj_1", Matrix(layer.proj_1.weight * 1e4))
    object.__setattr__(layer, "proj_2", Matrix(layer.proj_2.weight * 1e-8))
    save_model(tmp_path, model.config, model.parameters())
    found = list(stages(open_source(tmp_path).tensors, model.config, [1, 2, 3]))
    assert found[2].largest > 100 * mx.max(mx.abs(found[2].hidden)).item()


def test_what_was_converted_passes(run: Run, tmp_path: Path) -> None:
    source = FIXTURES / "float32.pt"
    for dtype in ("float32", "float16", "bfloat16"):
        result = run(MODULE, source, "-o", tmp_path / dtype, "--dtype", dtype, "--verify")
        assert result.returncode == 0, result.stderr
        assert "passed: " in result.stdout
        again = run(MODULE, "verify", tmp_path / dtype, "--against", source)
        assert again.returncode == 0, again.stderr
        assert again.stdout in result.stdout
    same = run(MODULE, "verify", tmp_path / "float32", "--against", source).stdout
    assert "first apart: nowhere\nlogits: largest difference 0," in same


def test_what_was_damaged_fails_and_the_layer_is_named(run: Run, tmp_path: Path) -> None:
    arrays = read_arrays(DEMO)[0]
    name = "transformer.layers.3.ffn.proj_1.weight"
    arrays[name] = mx.concatenate([arrays[name][192:], arrays[name][:192]])  # up and gate swapped
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    save_model(damaged, load_model(DEMO).config, arrays)
    result = run(MODULE, "verify", damaged, "--against", DEMO)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith(f"FAILED: {name} differs by 1.4")
    assert "first apart: layer 3\n" in result.stdout
    shutil.rmtree(damaged)


FORMATS = [["--bits", str(bits)] for bits in (8, 6, 5, 4, 3, 2)]
FORMATS += [["--mode", mode] for mode in ("mxfp4", "mxfp8", "nvfp4")]


@pytest.mark.parametrize("options", FORMATS, ids=" ".join)
def test_a_swapped_matrix_fails_in_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    made = str(tmp_path / "made")
    assert main([str(DEMO), "-o", made, "-q", *options, "--verify"]) == 0
    arrays = read_arrays(tmp_path / "made")[0]
    one, other = (f"transformer.layers.{i}.attn.qkv_proj." for i in (1, 2))
    for part in ("weight", "scales", "biases"):
        if one + part in arrays:
            arrays[one + part], arrays[other + part] = arrays[other + part], arrays[one + part]
    mx.save_safetensors(made + "/other", arrays)
    os.replace(made + "/other.safetensors", made + "/model.safetensors")
    assert main(["verify", made, "--against", str(DEMO)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"FAILED: {one}weight differs by 1.4") and last.endswith(", and 1 more")


def test_norms_that_are_swapped_or_lost_fail(tmp_path: Path, run: Run) -> None:
    model = load_model(DEMO)
    one, other = (f"transformer.layers.{i}.ffn_norm.weight" for i in (3, 4))
    for name in ("swapped", "lost"):
        arrays = read_arrays(DEMO)[0]
        arrays[one] = arrays[other] if name == "swapped" else mx.zeros_like(arrays[one])
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, model.config, arrays)
        result = run(MODULE, "verify", tmp_path / name, "--against", DEMO)
        assert result.returncode == 1, result.stdout
        assert f"FAILED: {one} differs by" in result.stdout


def test_tied_and_untied_are_compared_by_what_the_output_matrix_is(
    tmp_path: Path, run: Run
) -> None:
    model = load_model(DEMO)
    config = replace(model.config, share_input_output_layers=False)
    arrays = read_arrays(DEMO)[0]
    for name, factor in (("same", 1), ("other", -1)):
        head = {HEAD: arrays[EMBEDDINGS] * factor}
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, config, {**arrays, **head})
    for a, b in ((DEMO, tmp_path / "same"), (tmp_path / "same", DEMO)):
        assert run(MODULE, "verify", a, "--against", b).returncode == 0
    for a, b in ((DEMO, tmp_path / "other"), (tmp_path / "other", DEMO)):
        result = run(MODULE, "verify", a, "--against", b)
        assert result.returncode == 1
        assert "FAILED: lm_head.weight differs by 2" in result.stdout


def test_the_geometry_of_the_directory_stands_for_that_of_a_bare_source(
    run: Run, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    run(MODULE, FIXTURES / "float32.pt", "-o", tmp_path / "a")
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    config.write_text(json.dumps({**values, "rms_norm_eps": 1.0}))
    run(MODULE, FIXTURES / "float32.pt", "-o", tmp_path / "b", "--config", config)
    result = run(MODULE, "verify", tmp_path / "b", "--against", FIXTURES / "float32.pt")
    assert result.returncode == 0, result.stdout
    other = run(MODULE, "verify", tmp_path / "a", "--against", tmp_path / "b")
    assert other.returncode == 1
    assert "first at layer 0" in other.stdout


def test_different_models_are_not_compared(run: Run) -> None:
    result = run(MODULE, "verify", BUNDLED["demo-draft"], "--against", DEMO)
    assert result.returncode == 2
    assert "not the same model: 8 layers of width 192 and 2 of 128" in result.stderr


def test_inspect_says_what_it_is_and_what_would_become_of_it(run: Run) -> None:
    text = run(MODULE, "inspect", FIXTURES / "training_checkpoint_last.pt")
    assert text.returncode == 0, text.stderr
    assert "CoreNet training checkpoint (model_state_dict)" in text.stdout
    assert "not one of the published sizes" in text.stdout
    found = json.loads(run(MODULE, "inspect", DEMO, "--json", "--tensors").stdout)
    model = load_model(DEMO)
    assert found["parameters"] == 3_739_840
    assert found["dtypes"] == {"float16": 66}
    assert found["would_be"] == {"dtype": "float16", "bytes": 2 * 3_739_840}
    assert list(found["tensors"]) == list(model.parameters())
    assert found["query_heads"] == list(model.config.num_query_heads)


def test_inspect_says_that_quantized_weights_are_dequantized(run: Run, tmp_path: Path) -> None:
    assert run(MODULE, DEMO, "-q", "-o", tmp_path / "q").returncode == 0
    text = run(MODULE, "inspect", tmp_path / "q").stdout
    assert "  dequantized   float16 (66 tensors), 7.5 MB" in text
    assert "stored as" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", FIXTURES / "layouts.pt"], "unknown tensors"),
        (["inspect", "./nothing"], "no such file or directory"),
        (["inspct", DEMO], "inspct: no such command or file; did you mean openelm-convert inspect"),
        (["verify", "./nothing", "--against", DEMO], "no such file or directory"),
        (["verify", DEMO, "--against", DEMO, "--tokens", "0"], "--tokens must be at least 1"),
    ],
)
def test_bad_input(run: Run, arguments: list[str | Path], message: str) -> None:
    result = run(MODULE, *arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
