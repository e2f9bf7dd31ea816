"""Which weights a directory has: the runtime and the converter give the same answer, or refuse."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm.checkpoint.directory import load_model, save_config
from mlx_openelm.checkpoint.weight_files import find_weights
from mlx_openelm.convert.checkpoint import open_directory
from mlx_openelm.convert.sources import open_source
from mlx_openelm.convert.sources.huggingface import open_parts
from mlx_openelm.errors import InputError
from mlx_openelm.model.quantization import Quantization, Scheme, quantize

from .checkpoints import tensor, torch_file
from .conftest import Run
from .models import CONFIGS, random_model

Arrays = dict[str, mx.array]
CONFIG = CONFIGS["uneven"]
EMBEDDINGS, NORM = "transformer.token_embeddings.weight", "transformer.norm.weight"
QKV = "transformer.layers.0.attn.qkv_proj"
HALVES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def weights(seed: int = 0, name: str = "uneven") -> Arrays:
    return random_model(CONFIGS[name], seed=seed).parameters()


def write(file: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> None:
    mx.save_safetensors(str(file), arrays, metadata or {"format": "pt"})


def write_halves(directory: Path, arrays: Arrays, names: tuple[str, str] = HALVES) -> None:
    items = sorted(arrays.items())
    for name, half in zip(names, (items[::2], items[1::2]), strict=True):
        write(directory / name, dict(half))


def write_index(directory: Path, arrays: Arrays, names: tuple[str, ...] = HALVES) -> None:
    places = {name: names[i % len(names)] for i, name in enumerate(sorted(arrays))}
    file = directory / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": places}))


def edit_config(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a config and no weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_config(directory, CONFIG)
    return directory


def runtime(directory: Path) -> Arrays:
    return load_model(directory).parameters()


def converter(directory: Path) -> Arrays:
    return {name: t.read() for name, t in open_directory(directory).tensors.items()}


READERS = (runtime, converter)


def check_both(directory: Path, wanted: Arrays) -> None:
    """Both readers find these weights."""
    for read in READERS:
        found = read(directory)
        assert found.keys() == wanted.keys()
        assert all(mx.array_equal(found[name], wanted[name]).item() for name in wanted)


def check_refused(directory: Path, message: str) -> None:
    """Both readers refuse, with this in one line of bounded length."""
    for read in READERS:
        with pytest.raises(InputError, match=message) as caught:
            read(directory)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


# Which files


@pytest.mark.parametrize(
    "name",
    [
        "cache.safetensors",
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "adapters.safetensors",
        "optimizer.safetensors",
        "weights.safetensors",
        ".model.safetensors",
        "Model.safetensors",
        "model.safetensors.part",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tokenizer.safetensors",
    ],
)
def test_other_files_do_not_matter(
    model: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(model / "model.safetensors", weights())
    (model / name).write_bytes(b"not even read")
    check_both(model, weights())
    assert caplog.records == []


def stale_index(directory: Path) -> None:
    write_halves(directory, weights(1))
    write_index(directory, weights(1))


@pytest.mark.parametrize(
    ("others", "named"),
    [
        (stale_index, HALVES[0]),
        (lambda d: write_halves(d, weights(1)), HALVES[1]),
        (lambda d: write(d / "model.fp16.safetensors", weights(1)), "model.fp16.safetensors"),
        (lambda d: write(d / "model-old.safetensors", weights(1)), "model-old.safetensors"),
    ],
)
def test_what_mlx_lm_would_mix_in_is_reported(
    model: Path, others: Callable[[Path], None], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(model / "model.safetensors", weights())
    others(model)
    check_both(model, weights())
    [record] = caplog.records
    [note] = open_source(model).notes
    assert record.getMessage() == note
    assert record.levelno == logging.WARNING
    assert f"{named!r}" in note
    assert "\n" not in note


def test_a_file_beside_the_shards_of_an_index_is_reported(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stale_index(model)
    write(model / "model-00003-of-00003.safetensors", weights())
    check_both(model, weights(1))
    assert "'model-00003-of-00003.safetensors' is not" in caplog.text


@pytest.mark.parametrize("index", ["complete", "without its shards"])
def test_an_index_that_names_nothing_else_is_no_contradiction(
    model: Path, index: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(model / "model.safetensors", weights())  # mlx-lm writes an index beside one file, too
    write_index(model, weights(), ("model.safetensors",) if index == "complete" else HALVES)
    check_both(model, weights())
    assert caplog.records == []


@pytest.mark.parametrize(
    "names",
    [
        HALVES,
        ("model-1-of-2.safetensors", "model-2-of-2.safetensors"),
        ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"),
    ],
)
def test_shards_without_an_index(model: Path, names: tuple[str, str]) -> None:
    write_halves(model, weights(), names)
    check_both(model, weights())
    (model / names[1]).rename(model / "elsewhere.safetensors")
    check_refused(model, f"the shard '{names[1]}' is missing; download it too")


def test_shards_that_do_not_belong_together(model: Path) -> None:
    write_halves(model, weights())
    shutil.copy(model / HALVES[0], model / "model-00001-of-00003.safetensors")
    check_refused(model, "could all be its weights")
    (model / "model-00001-of-00003.safetensors").rename(model / "model-1-of-00002.safetensors")
    check_refused(model, "are not 00002 shards")
    (model / "model-1-of-00002.safetensors").unlink()
    shutil.copy(model / HALVES[0], model / HALVES[1])
    check_refused(model, r"is in model-00001-of-00002\.safetensors too")


def test_an_only_variant_is_taken_and_of_two_none(model: Path) -> None:
    write(model / "model.fp16.safetensors", weights())
    check_both(model, weights())
    write(model / "model.bf16.safetensors", weights(1))
    check_refused(model, r"'model.bf16.safetensors', 'model.fp16.safetensors' could all be")


def test_apples_file_of_2024_is_read_by_both(model: Path) -> None:
    arrays = weights()
    write(
        model / "weights.safetensors",
        {n.removeprefix("transformer."): a for n, a in arrays.items()},
    )
    check_both(model, arrays)


def test_weights_of_another_name_or_none(model: Path) -> None:
    check_refused(model, "no model.safetensors in it")
    write(model / "openelm.safetensors", weights())
    check_refused(model, "if 'openelm.safetensors' is the model, rename it")


def test_pytorchs_weights_have_to_be_converted(model: Path) -> None:
    torch_file(model / "pytorch_model.bin", {})
    with pytest.raises(InputError, match="convert it: openelm-convert"):
        load_model(model)


def test_shards_of_pytorch_without_an_index(model: Path) -> None:
    for i in (1, 2):
        tensors = {f"{i}": tensor()}
        torch_file(model / f"pytorch_model-0000{i}-of-00002.bin", tensors)
    assert list(open_source(model).tensors) == ["1", "2"]
    (model / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(InputError, match="'pytorch_model-00001-of-00002.bin' is missing"):
        open_source(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", HALVES[1]])
@pytest.mark.parametrize("kind", ["fifo", "sparse", "directory", "link", "dangling"])
def test_strange_files_are_refused_at_once(model: Path, name: str, kind: str) -> None:
    if name.startswith("model-"):
        write_halves(model, weights())
        write_index(model, weights())
    else:
        write(model / "model.safetensors", weights())
    (model / name).rename(model.parent / "outside")
    if kind == "fifo":
        os.mkfifo(model / name)
    elif kind == "sparse":
        with (model / name).open("w") as file:
            file.truncate(20 << 30)
    elif kind == "directory":
        (model / name).mkdir()
    else:
        target = model.parent / ("outside" if kind == "link" else "nothing")
        (model / name).symlink_to(target)
    check_refused(model, f"{name}: ")


# Which names


WRAPPERS = {
    "DDP": "module.{}",
    "torch.compile": "_orig_mod.{}",
    "Lightning": "model.{}",
    "Fabric": "_forward_module.{}",
    "FSDP": "_fsdp_wrapped_module.{}",
    "PEFT": "base_model.model.{}",
    "DDP of compiled Lightning": "module._orig_mod.model.{}",
    "twice": "module.module.{}",
}
INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


def wrapped_layers(name: str) -> str:
    """A name with wrappers around every layer and every matrix."""
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 2
        parts[at:at] = [INNER[int(parts[at - 1]) % len(INNER)], "_fsdp_wrapped_module"]
    return ".".join([*parts[:-1], "_orig_mod", parts[-1]])


@pytest.mark.parametrize("layout", ["Hugging Face", "CoreNet"])
@pytest.mark.parametrize("wrapper", [*WRAPPERS, "layers"])
def test_wrapped_names_are_read_by_both(model: Path, wrapper: str, layout: str) -> None:
    arrays = weights()

    def stored(name: str) -> str:
        name = name.removeprefix("transformer.") if layout == "CoreNet" else name
        return wrapped_layers(name) if wrapper == "layers" else WRAPPERS[wrapper].format(name)

    write(model / "model.safetensors", {stored(name): a for name, a in arrays.items()})
    check_both(model, arrays)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("_orig_mod.transformer.norm.weight", "are the same"),
        ("norm.weight", "are the same"),
        ("transformer.layers.0._orig_mod.attn.qkv_proj.weight", "are the same"),
        ("ema.norm.weight", "unknown tensors: 'ema.norm.weight'"),
        ("x" * 10_000, "unknown tensors: 'xxx"),
        (f"{'module.' * 10_000}transformer.norm.weight", "unknown tensors: 'module.module"),
        ("module._flat_param", "save a full state dict"),
        (f"{QKV}.qweight", "quantized by GPTQ or AWQ"),
    ],
)
def test_names_that_are_ambiguous_or_unknown(model: Path, more: str, message: str) -> None:
    write(model / "model.safetensors", weights() | {more: mx.ones(32)})
    check_refused(model, message)


def test_what_is_computed_is_left_out_by_both(model: Path) -> None:
    more = {
        "transformer.layers.0.attn.pos_embedding.inv_freq": mx.ones(4),
        "transformer.causal_mask": mx.ones((4, 4), mx.bool_),
        "n_averaged": mx.array(7),
    }
    write(model / "model.safetensors", weights() | more)
    check_both(model, weights())


def test_a_wrapped_quantized_directory(model: Path) -> None:
    """Its overrides may have the wrapped names or a model directory's."""
    default, other = Scheme(32, 4), Scheme(32, 8)
    arrays = weights()
    packed: Arrays = {}
    for name, array in arrays.items():
        module = name.removesuffix(".weight")
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            scheme = other if module == QKV else default
            packed |= {f"{module}.{p}": a for p, a in quantize(array, scheme).arrays()}
        else:
            packed[name] = array
    write(model / "model.safetensors", {f"module._orig_mod.{n}": a for n, a in packed.items()})
    for key in (QKV, f"module._orig_mod.{QKV}", QKV.removeprefix("transformer.")):
        values = {**default.to_dict(), key: other.to_dict()}
        edit_config(model, quantization=values)
        loaded = load_model(model)
        assert isinstance(loaded.quantization, Quantization)
        assert loaded.quantization.exceptions == {QKV: other}
        found = open_directory(model).tensors[f"{QKV}.weight"].read()
        wanted = quantize(arrays[f"{QKV}.weight"], other).dequantize(mx.float32).weight
        assert mx.allclose(found, wanted, atol=1e-6).item()
    assert open_parts(model, tied=True).keys() == packed.keys()
    clash = {**default.to_dict(), QKV: other.to_dict(), f"module.{QKV}": default.to_dict()}
    edit_config(model, quantization=clash)
    check_refused(model, "is there twice")


# Tied weights of which one name is stored


def test_tied_embeddings_stored_as_the_head(model: Path) -> None:
    arrays = weights()
    stored = {"lm_head.weight" if name == EMBEDDINGS else name: a for name, a in arrays.items()}
    for metadata in ({"format": "pt"}, {EMBEDDINGS: "lm_head.weight", "format": "pt"}):
        write(model / "model.safetensors", stored, metadata)
        check_both(model, arrays)
    classifier = {"classifier.weight" if n == EMBEDDINGS else n: a for n, a in arrays.items()}
    write(model / "model.safetensors", classifier)
    check_both(model, arrays)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_save_model_of_safetensors(model: Path, prefix: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_model

    arrays = weights()

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def state_dict(self, *_: object, **__: object) -> dict[str, Any]:
            state = {f"{prefix}{n}": torch.tensor(a.tolist()) for n, a in arrays.items()}
            return state | {f"{prefix}lm_head.weight": state[prefix + EMBEDDINGS]}

    save_model(Net(), str(model / "model.safetensors"))
    assert prefix + EMBEDDINGS not in mx.load(str(model / "model.safetensors"))
    check_both(model, arrays)


def test_an_alias_of_an_untied_model_is_read_by_both_names(model: Path) -> None:
    arrays = weights(name="untied")
    edit_config(model, share_input_output_layers=False)
    stored = {name: a for name, a in arrays.items() if name != EMBEDDINGS}
    write(model / "model.safetensors", stored)
    check_refused(model, rf"{EMBEDDINGS}.* is missing")
    write(model / "model.safetensors", stored, {EMBEDDINGS: "lm_head.weight"})
    check_both(model, arrays | {EMBEDDINGS: arrays["lm_head.weight"]})


@pytest.mark.parametrize(
    "metadata", [{EMBEDDINGS: "nothing"}, {EMBEDDINGS: EMBEDDINGS}, {"format": NORM}]
)
def test_metadata_that_names_nothing(model: Path, metadata: dict[str, str]) -> None:
    arrays = weights()
    write(model / "model.safetensors", arrays, metadata)
    check_both(model, arrays)


# Which dtypes


@pytest.mark.parametrize(
    "dtype", ["int8", "int32", "int64", "uint8", "uint16", "uint32", "bool_", "complex64"]
)
@pytest.mark.parametrize("name", [f"{QKV}.weight", NORM])
def test_integers_are_refused_by_both(model: Path, dtype: str, name: str) -> None:
    arrays = weights()
    arrays[name] = arrays[name].astype(getattr(mx, dtype))
    write(model / "model.safetensors", arrays)
    check_refused(model, rf"{name}'? is of {dtype.removesuffix('_')}; weights have to be")


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("F8_E4M3", [32], "is of float8_e4m3fn; weights have to be"),
        ("F8_E5M2", [32], "is of float8_e5m2; weights have to be"),
        ("F8_E8M0", [32], "is of float8_e8m0fnu; weights have to be"),
        ("F4", [64], "is of float4_e2m1fn; weights have to be"),
        ("F6_E2M3", [4, 8], "32 bytes are not float6_e2m3"),
        ("F8_E4M3", [33], "32 bytes are not float8_e4m3fn"),
    ],
)
def test_floats_of_8_bits_or_fewer_are_refused_by_both(
    model: Path, dtype: str, shape: list[int], message: str
) -> None:
    file = model / "model.safetensors"
    write(file, weights() | {NORM: mx.zeros(32, mx.uint8)})
    edit_header(file, lambda header: header[NORM].update(dtype=dtype, shape=shape))
    check_refused(model, message)


def test_float64_has_to_be_converted(model: Path) -> None:
    arrays = weights()
    save_file = pytest.importorskip("safetensors.numpy").save_file
    wide = {name: np.array(array).astype(np.float64) for name, array in arrays.items()}
    save_file(wide, model / "model.safetensors")
    with pytest.raises(InputError, match="is of float64; convert it"):
        load_model(model)
    assert {t.dtype for t in open_directory(model).tensors.values()} == {"float64"}


# Whose quantization


FOREIGN: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes before 0.40": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "GPTQ": {"bits": 4, "group_size": -1, "quant_method": "gptq"},
    "AWQ": {"bits": 4, "group_size": 128, "quant_method": "awq"},
    "FP8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "HQQ": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
    "'new-method": {"quant_method": "new-method"},
    "'xxxxx": {"quant_method": "x" * 5000},
    "\"{'a'": {"quant_method": {"a": "b"}},
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_float_weights_with_a_leftover_of_quantization(model: Path, name: str, key: str) -> None:
    write(model / "model.safetensors", weights())
    edit_config(model, **{key: FOREIGN[name]})
    check_both(model, weights())
    source = open_source(model)
    assert source.kind == "Hugging Face directory (model.safetensors)"
    assert source.quantization is None


@pytest.mark.parametrize("name", FOREIGN)
def test_packed_weights_are_refused_by_name(model: Path, name: str) -> None:
    edit_config(model, quantization_config=FOREIGN[name])
    arrays = weights()
    packed = {f"{QKV}.weight": mx.zeros((64, 1), mx.uint8), f"{QKV}.weight.absmax": mx.zeros(8)}
    gptq = {f"{QKV}.qweight": mx.zeros((4, 64), mx.int32), f"{QKV}.scales": mx.zeros((1, 64))}
    for more in (packed, gptq):
        write(model / "model.safetensors", arrays | more)
        check_refused(model, f"quantized by {name.split(' ')[0]}.*which can't be read")


def test_mlxs_quantization_decides_over_a_leftover(model: Path) -> None:
    arrays = weights()
    packed = {n: a for n, a in arrays.items() if n != f"{QKV}.weight"}
    scheme = Scheme(32, 4)
    packed |= {f"{QKV}.{p}": a for p, a in quantize(arrays[f"{QKV}.weight"], scheme).arrays()}
    write(model / "model.safetensors", packed)
    edit_config(model, quantization=scheme.to_dict(), quantization_config=FOREIGN["GPTQ"])
    for read in READERS:
        read(model)


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("scales", mx.ones((32, 1), mx.int32), "doesn't go with affine"),
        ("scales", mx.ones((32, 2)), "doesn't go with affine"),
        ("biases", mx.ones((32, 1), mx.float16), "doesn't go with affine"),
        ("biases", None, "biases' is missing"),
        ("weight", None, "weight' is missing"),
        ("weight", mx.ones((32, 4), mx.int32), "holds int32 and float32"),
        ("weight", mx.ones((32, 5), mx.uint32), r"is packed as \[32, 5\] with scales \[32, 1\]"),
        ("weight", mx.ones((32, 4)), "holds float32 and float32"),
    ],
)
def test_packed_parts_must_be_what_the_scheme_says(
    model: Path, part: str, array: mx.array | None, message: str
) -> None:
    scheme = Scheme(32, 4)
    arrays = weights()
    matrix = arrays.pop(f"{QKV}.weight")
    arrays |= {f"{QKV}.{p}": a for p, a in quantize(matrix, scheme).arrays()}
    if array is None:
        del arrays[f"{QKV}.{part}"]
    else:
        arrays[f"{QKV}.{part}"] = array
    write(model / "model.safetensors", arrays)
    edit_config(model, quantization=scheme.to_dict())
    check_refused(model, message)


def test_scales_of_integers_are_refused(model: Path) -> None:
    arrays = weights()
    matrix = arrays.pop(f"{QKV}.weight")
    arrays |= {f"{QKV}.{p}": a for p, a in quantize(matrix, Scheme(32, 4)).arrays()}
    for part in ("scales", "biases"):
        arrays[f"{QKV}.{part}"] = arrays[f"{QKV}.{part}"].astype(mx.int32)
    write(model / "model.safetensors", arrays)
    edit_config(model, quantization=Scheme(32, 4).to_dict())
    check_refused(model, "holds uint32 and int32, which is not affine quantization")


# Files that change or lie


def test_a_file_that_gets_shorter_while_it_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model / "model.safetensors"
    write(file, weights())
    load = mx.load

    def load_and_truncate(*arguments: Any) -> Any:
        found = load(*arguments)
        os.truncate(file, 4096)
        return found

    monkeypatch.setattr(mx, "load", load_and_truncate)
    with pytest.raises(InputError, match="truncated"):
        load_model(model)
    write(file, weights())
    tensors = open_directory(model).tensors
    os.truncate(file, 4096)
    last = [tensor for tensor in tensors.values() if tensor.name == EMBEDDINGS]
    with pytest.raises(InputError, match="truncated"):
        last[0].read()


def test_overlapping_tensors_are_refused_by_both(model: Path) -> None:
    file = model / "model.safetensors"
    write(file, weights())

    def overlap(header: dict[str, Any]) -> None:
        first = "transformer.layers.0.attn_norm.weight"
        header[first]["data_offsets"] = header[NORM]["data_offsets"]

    edit_header(file, overlap)
    check_refused(model, "has a gap before it|overlaps the one before")


VALUES: list[Any] = [0, -1, 32, 2**31, 2**63, 2**64, 1.5, True, None, "F16", "F8_E4M3", [], {}, [0]]


def test_headers_that_lie_are_refused_by_both(model: Path) -> None:
    """Or read by both, where a change makes no difference: MLX sees no header that is damaged."""
    file, rng, loaded = model / "model.safetensors", random.Random(0), 0
    write(file, weights())
    good = file.read_bytes()

    def change(header: dict[str, Any]) -> None:
        names = [name for name in header if name != "__metadata__"]
        name, other = rng.sample(names, 2)
        field, value = rng.choice(("dtype", "shape", "data_offsets")), rng.choice(VALUES)
        kind = rng.randrange(5)
        if kind == 0:
            header[name] = value
        elif kind == 1:
            header[name][field] = value
        elif kind == 2:
            header[name][field] = header[other][field]
        elif kind == 3:
            header[name]["data_offsets"][rng.randrange(2)] = value
        else:
            header["__metadata__"] = rng.choice(({name: other}, {"lm_head.weight": name}, value))

    for _ in range(300):
        file.write_bytes(good)
        edit_header(file, change)
        outcomes = []
        for read in READERS:
            try:
                outcomes.append(sorted(read(model)))
            except InputError as error:
                assert "\n" not in str(error)
                outcomes.append([])
        assert outcomes[0] == outcomes[1]
        loaded += bool(outcomes[0])
    assert 10 < loaded < 150


def test_the_list_has_the_files_in_order(model: Path) -> None:
    write_halves(model, weights())
    write_index(model, weights())
    found = find_weights(model)
    assert [file.name for file in found.files] == list(HALVES)
    assert found.notes == []


def test_one_tensor_by_two_names_is_tied_without_a_config(tmp_path: Path, run: Run) -> None:
    arrays = weights()
    stored = {"lm_head.weight" if n == EMBEDDINGS else n: a for n, a in arrays.items()}
    write(tmp_path / "alone.safetensors", stored, {EMBEDDINGS: "lm_head.weight"})
    result = run("mlx_openelm.convert", tmp_path / "alone.safetensors", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert load_model(tmp_path / "out").config.share_input_output_layers
    assert load_model(tmp_path / "out").parameters().keys() == arrays.keys()


def test_the_commands_report_what_they_do_not_read(model: Path, tmp_path: Path, run: Run) -> None:
    write(model / "model.safetensors", weights())
    stale_index(model)
    out = tmp_path / "out"
    for command in (
        ("inspect", model),
        (model, "-o", out, "--dtype", "float32"),
        ("verify", out, "--against", model),
        ("verify", model, "--against", out),
    ):
        result = run("mlx_openelm.convert", *command)
        assert result.returncode == 0, result.stderr
        lines = (result.stderr + result.stdout).splitlines()
        assert sum("mlx-lm would mix them" in line for line in lines) == 1
    check_both(out, weights())
