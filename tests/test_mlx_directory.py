"""MLX's directories as sources: mlx-lm's, quantized or not, and those of Apple's 2024 example."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import OpenELMConfig, config, load
from mlx_openelm.checkpoint.directory import load_model, read_arrays
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.checkpoint.names import map_names
from mlx_openelm.convert.sources import open_source
from mlx_openelm.errors import InputError
from mlx_openelm.model.quantization import MODES, Quantization, Scheme, quantize
from mlx_openelm.model.shapes import tensor_shapes

from .conftest import Run

MODULE = "mlx_openelm.convert"
DEMO = BUNDLED["demo"]
SCHEMES = [
    Scheme(group, bits, mode)
    for mode, (groups, all_bits) in MODES.items()
    for group in groups
    for bits in all_bits
]


def plain(arrays: dict[str, mx.array], quantization: Quantization) -> dict[str, mx.array]:
    """The tensors, dequantized by MLX's own function."""
    found = {}
    for name, array in arrays.items():
        module, _, part = name.rpartition(".")
        if part != "weight":
            continue
        if f"{module}.scales" in arrays:
            scheme = quantization.scheme(module)
            assert scheme is not None
            scales, biases = arrays[f"{module}.scales"], arrays.get(f"{module}.biases")
            dtype = scales.dtype if biases is not None else mx.bfloat16
            array = mx.dequantize(array, scales, biases, **scheme.to_dict(), dtype=dtype)
        found[name] = array
    return found


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a, b).item())


@pytest.fixture
def quantized(run: Run, tmp_path: Path) -> Callable[..., Path]:
    """Converts the demo with options."""

    def make(*options: str) -> Path:
        directory = tmp_path / "quantized"
        result = run(MODULE, DEMO, "-o", directory, "-q", *options)
        assert result.returncode == 0, result.stderr
        return directory

    return make


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_is_dequantized_as_mlx_does(scheme: Scheme, tmp_path: Path) -> None:
    matrix = quantize(mx.random.normal((6, 256)).astype(mx.float16), scheme)
    arrays = {f"a.{part}": array for part, array in matrix.arrays()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    values = OpenELMConfig.from_name("OpenELM-270M").to_dict()
    quantization = {"quantization": scheme.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(values | quantization))
    source = open_source(tmp_path)
    assert source.quantization is not None
    assert source.quantization.default == scheme
    wanted = plain(arrays, Quantization(scheme))["a.weight"]
    assert list(source.tensors) == ["a.weight"]
    tensor = source.tensors["a.weight"]
    assert tensor.shape == (6, 256)
    assert same(tensor.read(), wanted)
    assert same(mx.concatenate(list(tensor.blocks(2 * 512))), wanted)


@pytest.mark.parametrize("options", [{}, {"quantize": True}, {"quantize": True, "q_bits": 8}])
def test_what_mlx_lm_wrote(run: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    convert = pytest.importorskip("mlx_lm").convert
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    convert(str(DEMO), str(theirs), dtype="float16", **options)
    result = run(MODULE, theirs, "-o", out, "--verify")
    assert result.returncode == 0, result.stderr
    assert ("what that lost, stays lost" in result.stderr) is bool(options)
    model = load_model(theirs)
    wanted = plain(read_arrays(theirs)[0], model.quantization or Quantization(Scheme()))
    found = read_arrays(out)[0]
    assert found.keys() == wanted.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)
    # it has only a tokenizer.json, which came along
    text = "Once upon a time\n there was  a king"
    assert load(out)[1].encode(text) == load(DEMO)[1].encode(text)


def test_a_quantized_source_is_refused_when_asked(
    run: Run, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    result = run(MODULE, quantized(), "-o", tmp_path / "out", "--strict")
    assert result.returncode == 2
    assert "quantized to 4 bits already" in result.stderr.splitlines()[-1]
    assert run(MODULE, DEMO, "-o", tmp_path / "out", "--strict").returncode == 0


@pytest.mark.parametrize(
    "options", [["--bits", "8"], ["--bits", "4"], ["--bits", "2"], ["--mode", "mxfp4"]], ids=str
)
def test_a_quantized_model_is_verified_within_its_bound(
    run: Run, quantized: Callable[..., Path], options: list[str]
) -> None:
    directory = quantized(*options)
    result = run(MODULE, "verify", directory, "--against", DEMO)
    assert result.returncode == 0, result.stdout
    if options == ["--bits", "8"]:  # a matrix whose scales are doubled
        file = directory / "model.safetensors"
        arrays = read_arrays(directory)[0]
        mx.eval(arrays)
        for part in ("scales", "biases"):
            arrays[f"transformer.layers.2.ffn.proj_1.{part}"] *= 2
        mx.save_safetensors(str(file), arrays)
        result = run(MODULE, "verify", directory, "--against", DEMO)
        assert result.returncode == 1
        assert "transformer.layers.2.ffn.proj_1.weight differs" in result.stdout


def test_the_chat_template_stays(run: Run, tmp_path: Path) -> None:
    run(MODULE, DEMO, "-o", tmp_path / "a", "--chat")
    run(MODULE, tmp_path / "a", "-o", tmp_path / "b")
    assert load(tmp_path / "b")[1].has_chat_template


PACKED = "transformer.layers.0.attn.qkv_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(f"{PACKED}.biases"), "qkv_proj.biases' is missing"),
        (lambda a: a.pop(f"{PACKED}.weight"), "qkv_proj.weight' is missing"),
        (lambda a: a.pop(f"{PACKED}.scales"), "unknown tensors"),
        (lambda a: a.update({f"{PACKED}.weight": mx.zeros((256, 24))}), "holds float32"),
        (
            lambda a: a.update({f"{PACKED}.weight": mx.zeros((256, 12), mx.uint32)}),
            "packed as [256, 12] with scales [256, 3], which is not 4 bits in groups of 64",
        ),
        (lambda a: a.update({f"{PACKED}.other": mx.zeros((1,))}), "belongs to no quantized"),
        (
            lambda a: a.update({f"{PACKED}.biases": mx.zeros((256, 3))}),
            "doesn't go with affine",
        ),
    ],
)
def test_parts_that_do_not_fit(
    run: Run,
    quantized: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[dict[str, mx.array]], Any],
    message: str,
) -> None:
    directory = quantized()
    arrays = read_arrays(directory)[0]
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(directory / "model.safetensors"), arrays)
    with pytest.raises(InputError) as error:
        map_names(open_source(directory).tensors)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "quantization", [None, 4, "four", {"bits": 7}, {"mode": {}}, {"bits": 4.0}, [4]]
)
def test_a_config_that_does_not_say_how(
    quantized: Callable[..., Path], quantization: object
) -> None:
    directory = quantized()
    values = json.loads((directory / "config.json").read_text())
    del values["quantization_config"]
    (directory / "config.json").write_text(json.dumps(values | {"quantization": quantization}))
    with pytest.raises(InputError, match="config.json"):
        open_source(directory)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_apples_directories_of_2024(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int | None
) -> None:
    """As CoreNet's `mlx_examples/open_elm` wrote them: CoreNet's names, embeddings unquantized."""
    tiny = {"num_transformer_layers": 3, "model_dim": 128, "head_dim": 32}
    monkeypatch.setitem(config.PUBLISHED, "OpenELM-Tiny", tiny)
    values: dict[str, Any] = {"model_name": "OpenELM-Tiny", "vocab_size": 50}
    values |= {"max_context_length": 2048}
    geometry = OpenELMConfig.from_name("OpenELM-Tiny", 50)
    rng = np.random.default_rng(0)
    arrays: dict[str, mx.array] = {}
    for name, shape in tensor_shapes(geometry).items():
        array = mx.array(rng.normal(size=shape)).astype(mx.float16)
        name = name.removeprefix("transformer.")
        if bits and len(shape) == 2 and name != "token_embeddings.weight":
            parts = quantize(array, Scheme(64, bits)).arrays()
            arrays |= {f"{name.removesuffix('.weight')}.{part}": a for part, a in parts}
        else:
            arrays[name] = array
    if bits:
        values["quantization"] = {"group_size": 64, "bits": bits}
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), arrays)
    (tmp_path / "config.json").write_text(json.dumps(values))
    source = open_source(tmp_path)
    assert source.kind.startswith("MLX directory of Apple's example (weights.safetensors")
    assert source.config == geometry
    wanted = plain(arrays, Quantization(Scheme(64, bits or 4)))
    found, notes = map_names(source.tensors)
    assert notes == []
    assert found.keys() == tensor_shapes(geometry).keys()
    for name, tensor in found.items():
        assert same(tensor.read(), wanted[name.removeprefix("transformer.")]), name


def test_a_head_quantized_like_the_embeddings_is_left_out(
    run: Run, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    directory, out = quantized(), tmp_path / "out"
    arrays = read_arrays(directory)[0]
    mx.eval(arrays)
    for part in ("weight", "scales", "biases"):
        arrays[f"lm_head.{part}"] = arrays[f"transformer.token_embeddings.{part}"]
    mx.save_safetensors(str(directory / "model.safetensors"), arrays)
    result = run(MODULE, directory, "-o", out)
    assert result.returncode == 0, result.stderr
    assert "lm_head.weight repeats the embeddings" in result.stderr
    shutil.rmtree(out)
