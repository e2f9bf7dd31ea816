"""Model directories in the formats of others, checked with the others' own tools."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import OpenELM, OpenELMConfig, config, generate
from mlx_openelm.checkpoint.directory import load_model, read_arrays, save_config, save_model
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.checkpoint.names import map_names
from mlx_openelm.convert.__main__ import main
from mlx_openelm.convert.export import export
from mlx_openelm.convert.sources import open_source
from mlx_openelm.errors import InputError, OpenELMError
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from .conftest import Run
from .models import CONFIGS, random_model

MODULE = "mlx_openelm.convert"
DEMO = BUNDLED["demo"]
FLOATS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def directory_of(name: str, dtype: str, where: Path) -> Path:
    model = random_model(CONFIGS[name])
    where.mkdir()
    arrays = {key: array.astype(FLOATS[dtype]) for key, array in model.parameters().items()}
    save_model(where, model.config, arrays)
    return where


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and bool(mx.array_equal(a[name], b[name]).item())
        for name in a
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["scaled", "untied", "no GLU", "no q/k norm"])
@pytest.mark.parametrize("format", ["hf", "corenet"])
def test_there_and_back_is_the_identity(
    run: Run, tmp_path: Path, format: str, name: str, dtype: str
) -> None:
    directory = directory_of(name, dtype, tmp_path / "model")
    out = tmp_path / "exported"
    notes = export(directory, out, format)
    assert any("can only name published sizes" in note for note in notes) is (format == "corenet")
    config = [] if format == "hf" else ["--config", str(directory / "config.json")]
    result = run(MODULE, out, "-o", tmp_path / "again", "--dtype", dtype, *config)
    assert result.returncode == 0, result.stderr
    assert same(read_arrays(directory)[0], read_arrays(tmp_path / "again")[0])
    assert load_model(tmp_path / "again").config == load_model(directory).config


def test_pytorch_opens_what_is_written_for_corenet(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for dtype in FLOATS:
        directory = directory_of("untied", dtype, tmp_path / dtype)
        export(directory, tmp_path / f"{dtype}.pt", "corenet")
        state = torch.load(tmp_path / f"{dtype}.pt", weights_only=True)
        arrays = read_arrays(directory)[0]
        assert len(state) == len(arrays)
        for name, array in arrays.items():
            theirs = name.removeprefix("transformer.").replace("lm_head", "classifier")
            assert str(state[theirs].dtype) == f"torch.{dtype}"
            wanted = np.array(array.astype(mx.float32))
            assert np.array_equal(state[theirs].to(torch.float32).numpy(), wanted), name
        assert torch.load(tmp_path / f"{dtype}.pt", weights_only=True, mmap=True).keys()


def test_its_members_are_aligned_and_sound(tmp_path: Path) -> None:
    export(DEMO, tmp_path / "demo.pt", "corenet")
    with zipfile.ZipFile(tmp_path / "demo.pt") as file:
        assert file.testzip() is None
        raw = (tmp_path / "demo.pt").read_bytes()
        for info in file.infolist():
            name, extra = (
                int.from_bytes(raw[info.header_offset + at :][:2], "little") for at in (26, 28)
            )
            assert (info.header_offset + 30 + name + extra) % 64 == 0, info.filename


def test_a_file_too_large_for_a_plain_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20_000)  # of 2 GiB
    export(DEMO, tmp_path / "demo.pt", "corenet")
    raw = (tmp_path / "demo.pt").read_bytes()
    assert b"PK\x06\x06" in raw[-200:]  # the end of a zip64 directory
    demo, found = read_arrays(DEMO)[0], open_source(tmp_path / "demo.pt").tensors
    assert same(demo, {f"transformer.{name}": tensor.read() for name, tensor in found.items()})
    torch = pytest.importorskip("torch")
    assert len(torch.load(tmp_path / "demo.pt", weights_only=True)) == len(demo)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, OpenELMConfig]:
    """A model directory of a size that counts as published."""
    tiny = {"num_transformer_layers": 2, "model_dim": 64, "head_dim": 16}
    monkeypatch.setitem(config.PUBLISHED, "OpenELM-Tiny", tiny)
    geometry = OpenELMConfig.from_name("OpenELM-Tiny", 50)
    model = OpenELM(geometry)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", geometry, model.parameters())
    return tmp_path / "model", geometry


def test_a_published_geometry_has_its_yaml(
    published: tuple[Path, OpenELMConfig], tmp_path: Path
) -> None:
    directory, geometry = published
    for force in (False, True):
        assert export(directory, tmp_path / "tiny.pt", "corenet", force=force) == []
        assert OpenELMConfig.from_corenet_yaml(tmp_path / "tiny.yaml") == geometry


@pytest.mark.parametrize("force", [False, True])
def test_a_persons_yaml_stays_and_then_there_is_no_pt_either(
    published: tuple[Path, OpenELMConfig], tmp_path: Path, force: bool
) -> None:
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text("optim:\n  lr: 0.1\n")
    with pytest.raises(InputError, match=r"tiny\.yaml"):
        export(published[0], tmp_path / "tiny.pt", "corenet", force=force)
    assert yaml.read_text() == "optim:\n  lr: 0.1\n"
    assert sorted(os.listdir(tmp_path)) == ["model", "tiny.yaml"]
    with pytest.raises(InputError, match="would have the same name"):
        export(published[0], tmp_path / "other.yaml", "corenet", force=force)


def test_when_the_yaml_cannot_be_written_there_is_no_pt_either(
    published: tuple[Path, OpenELMConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OpenELMError, match="No space left on device"):
        export(published[0], tmp_path / "tiny.pt", "corenet")
    assert os.listdir(tmp_path) == ["model"]


def test_hugging_faces_config_gives_the_same_heads_by_apples_formula(tmp_path: Path) -> None:
    for i, name in enumerate(("OpenELM-270M", "OpenELM-3B")):
        config = OpenELMConfig.from_name(name, 8)
        tiny = replace(config, ffn_multipliers=(0.01,) * config.num_transformer_layers)
        assert tiny.num_query_heads == config.num_query_heads
        from mlx_openelm.convert.export.huggingface import _config

        values = _config(config, {"float32"})
        assert (values["num_gqa_groups"], values["qkv_multipliers"]) == (4, [0.5, 1.0]), i
    export(DEMO, tmp_path / "hf", "hf")
    found = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (found["num_gqa_groups"], found["torch_dtype"]) == (2, "float16")
    assert {f.name for f in (tmp_path / "hf").iterdir()} == {
        f.name for f in DEMO.iterdir() if f.name != "conversion.json"
    }


APPLES = """
from transformers import PretrainedConfig
class OpenELMConfig(PretrainedConfig):
    model_type = "openelm"
"""


def test_transformers_finds_apples_code_for_it(tmp_path: Path) -> None:
    """In a hub cache that has such a file: what Apple publishes isn't here."""
    pytest.importorskip("transformers")
    [note] = export(DEMO, tmp_path / "hf", "hf")
    assert "trust_remote_code=True: it fetches Apple's code from apple/OpenELM-270M" in note
    cached = tmp_path / "cache" / "hub" / "models--apple--OpenELM-270M"
    for name, text in (
        ("refs/main", "0" * 40),
        (f"snapshots/{'0' * 40}/configuration_openelm.py", APPLES),
    ):
        (cached / name).parent.mkdir(parents=True)
        (cached / name).write_text(text)
    code = "import sys; from transformers import AutoConfig; "
    code += "c = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True); "
    code += "print(type(c).__module__, c.num_gqa_groups)"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "hf"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0].endswith("configuration_openelm")
    assert done.stdout.split()[1] == "2"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CONFIGS["uneven"], "no two qkv_multipliers give these heads"),
        (replace(CONFIGS["scaled"], rms_norm_eps=1e-5), "its RMSNorm has an epsilon of 1e-06"),
        (
            replace(
                CONFIGS["scaled"],
                num_transformer_layers=2,
                num_query_heads=(4, 4),
                num_kv_heads=(1, 1),
                ffn_multipliers=(0.5, 1.2815),
                ffn_dim_divisor=2,
            ),
            "it rounds the two ffn_multipliers",
        ),
    ],
)
def test_what_apples_code_cannot_load(tmp_path: Path, config: OpenELMConfig, reason: str) -> None:
    save_model(tmp_path, config, random_model(config).parameters())
    [note] = export(tmp_path, tmp_path / "hf", "hf")
    assert f"Apple's modelling code can't load it: {reason}" in note
    assert "auto_map" not in json.loads((tmp_path / "hf" / "config.json").read_text())


# ---------------------------------------------------------------------------------------------
# llama.cpp


def gguf_tensors(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    gguf = pytest.importorskip("gguf")
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = values.reshape(tuple(tensor.shape[::-1]))
    return found


def as_gguf(arrays: dict[str, mx.array]) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of a model directory by llama.cpp's names, written down independently."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, array in arrays.items():
        values = np.array(array.astype(mx.float32))
        name = name.replace("transformer.layers.", "blk.").replace("attn.", "attn_")
        name = name.replace("transformer.norm", "output_norm")
        name = name.replace("transformer.token_embeddings", "token_embd")
        name = name.replace("attn_out_proj", "attn_output").replace("qkv_proj", "qkv")
        if "ffn.proj_1" in name:
            gate, up = np.split(values, 2)
            found[name.replace("ffn.proj_1", "ffn_gate")] = gate
            found[name.replace("ffn.proj_1", "ffn_up")] = up
        else:
            found[name.replace("ffn.proj_2", "ffn_down")] = values
    return found


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "q8_0"])
def test_the_values_in_a_gguf(tmp_path: Path, dtype: str | None) -> None:
    export(DEMO, tmp_path / "demo.gguf", "gguf", dtype)
    found, wanted = gguf_tensors(tmp_path / "demo.gguf"), as_gguf(read_arrays(DEMO)[0])
    assert found.keys() == wanted.keys()
    tolerance = {"bfloat16": 2**-8, "q8_0": 1 / 127}.get(dtype or "", 0.0)
    for name, values in wanted.items():
        exact = tolerance == 0 or values.ndim == 1
        largest = np.abs(values).max()
        assert np.abs(found[name] - values).max() <= (0 if exact else tolerance * largest), name


def test_bfloat16_goes_exactly_and_is_not_forced_into_float16(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DEMO, tmp_path / "model"))
    arrays = {name: array.astype(mx.bfloat16) for name, array in read_arrays(DEMO)[0].items()}
    name = "transformer.layers.0.ffn.proj_2.weight"
    arrays[name] = mx.concatenate([mx.full((1, arrays[name].shape[1]), 1e5), arrays[name][1:]])
    arrays[name] = arrays[name].astype(mx.bfloat16)
    save_model(directory, load_model(DEMO).config, arrays)
    export(directory, tmp_path / "demo.gguf", "gguf")
    found = gguf_tensors(tmp_path / "demo.gguf")
    for key, values in as_gguf(arrays).items():
        assert np.array_equal(found[key], values), key
    with pytest.raises(InputError, match="proj_2.weight holds 9.984e.04, more than float16"):
        export(directory, tmp_path / "half.gguf", "gguf", "float16")


@pytest.mark.parametrize("group", ["32", "64", "128"])
def test_four_bits_are_q4_1_exactly(run: Run, tmp_path: Path, group: str) -> None:
    options = ("-q", "--group-size", group, "--dtype", "float16")
    if group == "128":  # doesn't divide the demo's 192 columns, some matrices stay float16
        options = (*options, "--recipe", tmp_path / "recipe.json")
        (tmp_path / "recipe.json").write_text("{}")
    result = run(MODULE, DEMO, "-o", tmp_path / "four", *options)
    assert result.returncode == 0, result.stderr
    export(tmp_path / "four", tmp_path / "four.gguf", "gguf")
    found = gguf_tensors(tmp_path / "four.gguf")
    arrays, wanted = read_arrays(tmp_path / "four")[0], {}
    for name, array in arrays.items():
        module, _, part = name.rpartition(".")
        if f"{module}.scales" not in arrays:
            wanted[name] = array
        elif part == "weight":
            scales, biases = (
                arrays[f"{module}.{end}"].astype(mx.float32) for end in ("scales", "biases")
            )
            wanted[name] = mx.dequantize(array, scales, biases, int(group), 4)
    for name, values in as_gguf(wanted).items():
        # llama.cpp's own arithmetic may fuse the multiplication and the addition
        assert np.abs(found[name] - values).max() <= 2**-23 * np.abs(values).max(), name


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """llama.cpp with the demo in float32, computed as it is here."""
    xllamacpp = pytest.importorskip("xllamacpp")
    file = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    export(DEMO, file, "gguf", "float32")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


@pytest.mark.parametrize(
    "prompt", ["Once upon a time", '"What is that?" asked the king', "  Two  spaces\n\nand lines"]
)
def test_llama_cpp_says_the_same(
    llama_cpp: Any, demo: tuple[OpenELM, Tokenizer], prompt: str
) -> None:
    model, tokenizer = demo  # in float16, near ties part
    in_float32 = OpenELM(model.config, model.parameters(), dtype=mx.float32)
    ours = generate(in_float32, tokenizer, prompt, max_tokens=40)
    asked = {"prompt": prompt, "n_predict": 40, "temperature": 0, "cache_prompt": False}
    answer = llama_cpp.handle_completions(asked)
    assert answer["choices"][0]["text"] == ours
    assert answer["usage"]["prompt_tokens"] == len(demo[1].encode(prompt))


def test_llama_cpp_sees_the_same_tokens(llama_cpp: Any, demo: tuple[OpenELM, Tokenizer]) -> None:
    texts = [
        "Once upon a time",
        " leading",
        "  two",
        "a\nb\n\nc",
        "1234 5",
        "naïve café",
        "日本",
        "🦊!",
    ]
    for text in texts:
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(
            llama_cpp.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer)["tokens"] == demo[1].encode(text), text


def test_rows_without_a_token_are_unused_ones(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    wide = Path(shutil.copytree(DEMO, tmp_path / "wide"))
    arrays = dict(read_arrays(DEMO)[0])
    name = "transformer.token_embeddings.weight"
    arrays[name] = mx.concatenate([arrays[name], mx.zeros((3, 192), mx.float16)])
    mx.eval(arrays)
    save_model(wide, replace(load_model(DEMO).config, vocab_size=4099), arrays)
    [note] = export(wide, tmp_path / "wide.gguf", "gguf")
    assert note == "3 embedding rows have no token: marked as unused"
    fields = gguf.GGUFReader(tmp_path / "wide.gguf").fields
    assert fields["tokenizer.ggml.token_type"].contents()[-4:] == [1, 5, 5, 5]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("untied", "has an output matrix of its own"),
        ("no GLU", "has no gate"),
        ("no q/k norm", "doesn't normalise queries and keys"),
        ("scaled", "no tokenizer.model in it"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    directory = directory_of(name, "float32", tmp_path / "model")
    with pytest.raises(InputError, match=reason):
        export(directory, tmp_path / "out.gguf", "gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-q", "--bits", "8"], "is affine with 8 bits; GGUF's q4_1 holds affine with 4 bits"),
        (["-q", "--mode", "mxfp4"], "is mxfp4 with 4 bits"),
        (["-q", "--dtype", "float32"], "values that float16 doesn't have"),
        ([], "isn't quantized; q4_1 is for models of 4 bits"),
    ],
)
def test_what_q4_1_cannot_hold(run: Run, tmp_path: Path, options: list[str], reason: str) -> None:
    run(MODULE, DEMO, "-o", tmp_path / "q", *options)
    arguments = ("export", tmp_path / "q", "-o", tmp_path / "q.gguf", "--format", "gguf")
    result = run(MODULE, *arguments, "--dtype", "q4_1")
    assert result.returncode == 2
    assert reason in result.stderr.splitlines()[-1]
    assert not (tmp_path / "q.gguf").exists()
    if options:  # but dequantized it goes
        result = run(MODULE, *arguments, "--dtype", "float16")
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("format", ["hf", "corenet"])
def test_what_is_not_finite_goes_as_it_is_but_is_not_cast(tmp_path: Path, format: str) -> None:
    model = random_model(CONFIGS["uneven"])
    arrays = dict(model.parameters())
    arrays["transformer.norm.weight"] = mx.full((32,), float("inf"))
    save_model(tmp_path, model.config, arrays)
    export(tmp_path, tmp_path / "out", format)
    tensors, _ = map_names(open_source(tmp_path / "out").tensors)
    assert tensors["transformer.norm.weight"].read().tolist() == [float("inf")] * 32
    with pytest.raises(InputError, match="norm.weight holds a value that is not finite"):
        export(tmp_path, tmp_path / "half", format, "float16")


def test_what_is_there_stays_without_force(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "demo.pt"
    out.write_text("mine")
    (tmp_path / "demo.yaml").write_text("mine too")  # which only a published geometry has
    arguments = ("export", DEMO, "-o", out, "--format", "corenet")
    result = run(MODULE, *arguments)
    assert (result.returncode, out.read_text()) == (2, "mine")
    assert "--force replaces it" in result.stderr.splitlines()[-1]
    result = run(MODULE, *arguments, "--force")
    assert (result.returncode, out.read_text()) == (2, "mine")
    assert "isn't a .pt that mlx-openelm wrote" in result.stderr.splitlines()[-1]
    out.unlink()
    for _ in range(2):
        assert run(MODULE, *arguments, "--force").returncode == 0
    assert (tmp_path / "demo.yaml").read_text() == "mine too"
    assert len(list(tmp_path.iterdir())) == 2
    result = run(MODULE, "export", DEMO, "-o", tmp_path, "--format", "gguf", "--force")
    assert result.returncode == 2
    assert "is a directory; a file is to be written" in result.stderr


@pytest.mark.parametrize(
    ("format", "name"),
    [("hf", "tokenizer.model"), ("hf", "tokenizer_config.json"), ("gguf", "tokenizer.model")],
)
def test_links_out_of_the_directory_are_not_followed(
    tmp_path: Path, format: str, name: str
) -> None:
    directory = Path(shutil.copytree(DEMO, tmp_path / "stranger"))
    (directory / name).rename(tmp_path / "outside")
    (directory / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="a link to a file outside its directory"):
        export(directory, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    (directory / name).unlink()
    shutil.copy(tmp_path / "outside", directory / f"inside.{name}")
    (directory / name).symlink_to(f"inside.{name}")
    export(directory, tmp_path / "out", format)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    arrays = read_arrays(DEMO)[0]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    with pytest.raises(InputError, match="no config.json in it"):
        export(tmp_path, tmp_path / "out", "hf")
    save_config(tmp_path, load_model(DEMO).config)
    with pytest.raises(InputError, match="hf has no dtype 'q8_0'"):
        export(tmp_path, tmp_path / "out", "hf", "q8_0")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("how", ["hf", "convert"])
def test_a_byte_order_mark_is_not_carried(tmp_path: Path, encoding: str, how: str) -> None:
    """transformers and mlx-lm can't read one."""
    texts = {
        "tokenizer.json": (DEMO / "tokenizer.json").read_text(),
        "tokenizer_config.json": (DEMO / "tokenizer_config.json").read_text(),
        "generation_config.json": '{"eos_token_id":\r\n[2, 5]}',
        "chat_template.jinja": "{{ messages[0]['content'] }} é\r\n",
    }
    directory = Path(shutil.copytree(DEMO, tmp_path / "source"))
    for name, text in texts.items():
        mark = "\ufeff" if encoding == "utf-16-be" else ""
        (directory / name).write_bytes((mark + text).encode(encoding))
    out = tmp_path / "out"
    if how == "hf":
        export(directory, out, "hf")
    else:
        assert main([str(directory), "-o", str(out)]) == 0
    for name, text in texts.items():
        assert (out / name).read_bytes() == text.encode(), name
    data = (DEMO / "tokenizer.model").read_bytes()
    assert (out / "tokenizer.model").read_bytes() == data
