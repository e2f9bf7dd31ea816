"""`mlx_openelm.convert(...)`, and that the package of the name is still one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_openelm
from mlx_openelm import InputError, OpenELM, generate, load
from mlx_openelm.checkpoint.hub import DEMO
from mlx_openelm.tokenizer.tokenizer import Tokenizer

SOURCE = DEMO / "demo"
IMPORTS = """
import mlx_openelm
import mlx_openelm.convert.floats as floats
from mlx_openelm import convert
from mlx_openelm.convert import convert as function
from mlx_openelm.convert.floats import cast
import mlx_openelm.convert.floats
assert mlx_openelm.convert.floats.cast is floats.cast is cast
assert convert is mlx_openelm.convert and callable(convert) and callable(function)
"""


def test_the_function_and_the_package_share_the_name() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


def test_conversion_keeps_the_text(demo: tuple[OpenELM, Tokenizer], tmp_path: Path) -> None:
    mlx_openelm.convert(SOURCE, str(tmp_path / "out"), dtype="float16")
    model, tokenizer = load(tmp_path / "out")
    assert generate(model, tokenizer, "The king", max_tokens=9) == generate(
        *demo, "The king", max_tokens=9
    )


def test_a_predicate_decides_for_each_matrix(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        shapes[path] = module.weight.shape
        if "ffn" in path:
            return {"bits": 8, "group_size": 32}
        return "embeddings" not in path

    mlx_openelm.convert(SOURCE, tmp_path / "out", True, quant_predicate=predicate)
    model, _ = load(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (stored["bits"], stored["group_size"]) == (4, 64)
    assert stored["transformer.layers.0.ffn.proj_1"]["bits"] == 8
    assert stored["transformer.token_embeddings"] is False
    config = model.config
    assert shapes["transformer.token_embeddings"] == (config.vocab_size, config.model_dim)
    assert shapes["transformer.layers.0.ffn.proj_2"] == (config.model_dim, config.ffn_dims[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": True, "dequantize": True}, "quantize and dequantize can't be combined"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"quantize": True, "quant_predicate": "mixed_2_6"}, "quant_predicate='mixed_2_6'"),
        ({"quantize": True, "q_bits": 7}, "bits of mode affine must be"),
        ({"quantize": True, "q_mode": "fp4"}, "mode must be one of"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        mlx_openelm.convert(SOURCE, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_quantized_weights_are_taken_only_to_dequantize_them(tmp_path: Path) -> None:
    mlx_openelm.convert(SOURCE, tmp_path / "four", quantize=True)
    for options in ({}, {"quantize": True}):
        with pytest.raises(InputError, match="quantized to 4 bits already; pass dequantize=True"):
            mlx_openelm.convert(tmp_path / "four", tmp_path / "out", **options)
    mlx_openelm.convert(tmp_path / "four", tmp_path / "out", dequantize=True, dtype="float32")
    assert load(tmp_path / "out")[0].parameters()["transformer.norm.weight"].dtype == mx.float32


def test_load_takes_values_of_config_json() -> None:
    model, _, config = load(SOURCE, model_config={"max_context_length": 64}, return_config=True)
    assert config["max_context_length"] == model.config.max_context_length == 64
    with pytest.raises(InputError, match="has no 'max_contxt_length'"):
        load(SOURCE, model_config={"max_contxt_length": 64})
