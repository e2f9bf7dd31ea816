"""`python -m mlx_openelm.convert`, run as a person runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import OpenELMConfig, load
from mlx_openelm.checkpoint.directory import load_model, read_arrays
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.tokenizer.tokenizer import CHAT_TEMPLATE

from . import bounds, reference
from .conftest import Run

FIXTURES = Path(__file__).parent / "fixtures"
DEMO = BUNDLED["demo"]
MODULE = "mlx_openelm.convert"
BLOCKER = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"


def expected(name: str, prefix: str = "") -> dict[str, np.ndarray]:
    """A fixture's tensors, as PyTorch had them, by the names of a model directory."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {
            "transformer." + key.removeprefix(prefix): file[key]
            for key in file.files
            if key != "dtypes" and key.startswith(prefix)
        }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "model"


def nothing_is_left(out: Path) -> bool:
    return not out.parent.exists() or list(out.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_corenet_state_dict_keeps_its_values(run: Run, out: Path, name: str) -> None:
    result = run(MODULE, FIXTURES / f"{name}.pt", "-o", out, "--dtype", name)
    assert result.returncode == 0, result.stderr
    assert "geometry inferred from the tensors: 2 layers" in result.stderr
    assert "no tokenizer found" in result.stderr
    arrays, _ = read_arrays(out)
    wanted = expected(name)
    assert arrays.keys() == wanted.keys()
    for key, array in arrays.items():
        assert str(array.dtype) == f"mlx.core.{name}"
        assert np.array_equal(np.array(array.astype(mx.float32)), wanted[key]), key
    model = load_model(out)
    tokens = np.arange(10)[None]
    logits = reference.logits(model.config, wanted, tokens)
    bounds.assert_near(model(mx.array(tokens)), logits, model.config.num_transformer_layers)


def test_no_pytorch_is_needed(run: Run, out: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    result = run(MODULE, FIXTURES / "float32.pt", "-o", out, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_sixteen_bit_weights_stay_and_others_become_bfloat16(run: Run, tmp_path: Path) -> None:
    kept = {"float32": mx.bfloat16, "float16": mx.float16, "bfloat16": mx.bfloat16}
    for name, dtype in kept.items():
        run(MODULE, FIXTURES / f"{name}.pt", "-o", tmp_path / name)
        assert {a.dtype for a in read_arrays(tmp_path / name)[0].values()} == {dtype}


def test_of_a_training_checkpoint_the_model_is_taken(run: Run, out: Path) -> None:
    source = FIXTURES / "training_checkpoint_last.pt"
    assert run(MODULE, source, "-o", out, "--dtype", "float32").returncode == 0
    arrays, _ = read_arrays(out)
    for key, value in expected("training_checkpoint_last", "model_state_dict/").items():
        assert np.array_equal(np.array(arrays[key]), value)


def test_a_config_is_used_and_must_fit(run: Run, out: Path, tmp_path: Path) -> None:
    run(MODULE, FIXTURES / "float32.pt", "-o", tmp_path / "inferred")
    config = OpenELMConfig.from_json(tmp_path / "inferred" / "config.json")
    values = {**config.to_dict(), "max_context_length": 77}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    result = run(MODULE, FIXTURES / "float32.pt", "-o", out, "--config", file)
    assert result.returncode == 0, result.stderr
    assert "inferred" not in result.stderr
    assert load_model(out).config.max_context_length == 77
    file.write_text(json.dumps({**values, "vocab_size": 12}))
    result = run(MODULE, FIXTURES / "float32.pt", "-o", out, "--config", file, "--force")
    assert result.returncode == 2
    assert "token_embeddings.weight has the shape [10, 8]; the config says [12, 8]" in result.stderr
    assert load_model(out).config.max_context_length == 77  # untouched


def test_a_directory_whose_config_disagrees_with_its_tensors(
    run: Run, huggingface: Path, out: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(huggingface, tmp_path / "source"))
    values = json.loads((source / "config.json").read_text())
    for field, message in (
        ({"vocab_size": 4097}, "[4096, 192]; the config says [4097, 192]"),
        ({"model_dim": 128}, "[4096, 192]; the config says [4096, 128]"),
        ({"num_query_heads": [4] * 8}, "qkv_proj.weight has the shape [256, 192]"),
        ({"num_query_heads": [2] * 7}, "num_query_heads"),
        ({"share_input_output_layers": False}, "lm_head.weight [4096, 192] is missing"),
    ):
        (source / "config.json").write_text(json.dumps({**values, **field}))
        for command in ([MODULE, source, "-o", out], [MODULE, "inspect", source]):
            result = run(*command)
            assert result.returncode == 2
            assert message in result.stderr.splitlines()[-1]
            assert nothing_is_left(out)


def test_a_corenet_yaml_names_a_published_size(run: Run, out: Path, tmp_path: Path) -> None:
    file = tmp_path / "openelm.yaml"
    file.write_text(
        "model:\n  language_modeling:\n    general_gpt:\n"
        "      model_name: OpenELM-270M\n      vocab_size: 10\n"
    )
    result = run(MODULE, FIXTURES / "float32.pt", "-o", out, "--config", file)
    assert result.returncode == 2
    assert "the config says [10, 1280]" in result.stderr
    assert nothing_is_left(out)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as a Hugging Face repository has it: no tokenizer.json, float32."""
    directory = tmp_path_factory.mktemp("huggingface")
    arrays, _ = read_arrays(DEMO)
    floats = {name: array.astype(mx.float32) for name, array in arrays.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), floats, {"format": "pt"})
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(DEMO / name, directory)
    return directory


def test_a_hugging_face_directory_becomes_the_demo_bit_for_bit(
    run: Run, huggingface: Path, out: Path
) -> None:
    result = run(MODULE, huggingface, "-o", out, "--dtype", "float16")
    assert result.returncode == 0, result.stderr
    assert "bits per weight  16.00" in result.stdout
    assert {file.name for file in out.iterdir()} == {file.name for file in DEMO.iterdir()}
    for file in DEMO.iterdir():
        if file.name == "conversion.json":  # says what it was made from
            continue
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        (["--bits", "4"], 4.5),
        (["--bits", "8", "--group-size", "32"], 9.0),
        (["--mode", "mxfp4"], 4.25),
    ],
)
def test_quantizing(
    run: Run, huggingface: Path, out: Path, options: list[str], bits: float
) -> None:
    result = run(MODULE, huggingface, "-o", out, "-q", "--dtype", "float16", *options)
    assert result.returncode == 0, result.stderr
    told = float(result.stdout.split("bits per weight")[1].split()[0])
    assert told == pytest.approx(bits, abs=0.05)
    model, tokenizer = load(out)
    assert model.quantization is not None
    tokens = mx.array([tokenizer.encode("Once upon a time there was a king")])
    wanted = bounds.numbers(load(DEMO)[0](tokens))
    error = bounds.rms(bounds.numbers(model(tokens)) - wanted) / bounds.rms(wanted)
    assert 0 < error < (0.5 if bits < 5 else 0.05)


def test_columns_that_do_not_divide_are_kept(run: Run, out: Path) -> None:
    result = run(MODULE, FIXTURES / "float32.pt", "-o", out, "-q", "--group-size", "32")
    assert result.returncode == 0, result.stderr
    assert "qkv_proj: 8 columns don't divide into groups; kept" in result.stderr
    config = json.loads((out / "config.json").read_text())
    assert "quantization" not in config
    assert load_model(out).parameters().keys() == expected("float32").keys()


def test_instruct_models_get_their_chat_format(run: Run, huggingface: Path, tmp_path: Path) -> None:
    instruct = Path(shutil.copytree(huggingface, tmp_path / "Tiny-Instruct"))
    run(MODULE, instruct, "-o", tmp_path / "a")
    run(MODULE, huggingface, "-o", tmp_path / "b", "--chat")
    run(MODULE, huggingface, "-o", tmp_path / "c")
    for name, has in (("a", True), ("b", True), ("c", False)):
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert (config.get("chat_template") == CHAT_TEMPLATE) is has
        assert load(tmp_path / name)[1].has_chat_template is has


def test_a_head_that_repeats_the_embeddings_is_left_out(
    run: Run, huggingface: Path, tmp_path: Path, out: Path
) -> None:
    source = Path(shutil.copytree(huggingface, tmp_path / "source"))
    arrays, _ = read_arrays(huggingface)
    for change, status in ((0, 0), (1, 2)):
        head = arrays["transformer.token_embeddings.weight"] + change
        file = str(source / "model.safetensors")
        mx.save_safetensors(file, {**arrays, "lm_head.weight": head})
        result = run(MODULE, source, "-o", out, "--force")
        assert result.returncode == status
        assert "lm_head.weight" in result.stderr
        assert "lm_head.weight" not in read_arrays(out)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nothing.pt"], "./nothing.pt: no such file or directory"),
        ([FIXTURES / "legacy.pt"], "legacy.pt"),
        ([FIXTURES / "torchscript.pt"], "torchscript.pt"),
        ([FIXTURES / "layouts.pt"], "unknown tensors"),
        ([FIXTURES / "float32.npz"], "float32.npz"),
        ([FIXTURES], "fixtures"),
        ([FIXTURES / "float32.pt", "--config", "./none.json"], "none.json: No such file"),
        ([FIXTURES / "float32.pt", "--tokenizer", "./none"], "./none: no such file"),
        (
            [FIXTURES / "float32.pt", "--tokenizer", DEMO],
            "the tokenizer has 4096 pieces, the model only 10 embedding rows",
        ),
        ([FIXTURES / "float32.pt", "--bits", "4"], "--bits, --group-size and --mode go with -q"),
        ([FIXTURES / "float32.pt", "-q", "--bits", "7"], "bits of mode affine must be 2, 3, 4"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_status_2_and_nothing_left(
    run: Run, out: Path, arguments: list[str | Path], message: str
) -> None:
    result = run(MODULE, *arguments, "-o", out)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert nothing_is_left(out)


def test_a_truncated_file_leaves_nothing(run: Run, out: Path, tmp_path: Path) -> None:
    content = (FIXTURES / "float32.pt").read_bytes()
    for share in (0.1, 0.5, 0.99):
        file = tmp_path / "cut.pt"
        file.write_bytes(content[: int(len(content) * share)])
        result = run(MODULE, file, "-o", out)
        assert result.returncode == 2
        assert "cut.pt" in result.stderr.splitlines()[-1]
        assert nothing_is_left(out)


def test_values_that_float16_cannot_hold_are_refused(
    run: Run, huggingface: Path, tmp_path: Path, out: Path
) -> None:
    source = Path(shutil.copytree(huggingface, tmp_path / "source"))
    arrays, _ = read_arrays(huggingface)
    for value, words in ((1e5, "more than float16"), (np.nan, "is not finite")):
        arrays["transformer.norm.weight"] = mx.full((192,), value)
        mx.save_safetensors(str(source / "model.safetensors"), arrays)
        result = run(MODULE, source, "-o", out, "--dtype", "float16")
        assert result.returncode == 2
        assert words in result.stderr
        assert nothing_is_left(out)


def test_what_is_there_is_not_overwritten_unasked(run: Run, out: Path) -> None:
    assert run(MODULE, FIXTURES / "float32.pt", "-o", out).returncode == 0
    made = sorted(f.name for f in out.iterdir())
    assert made == ["config.json", "conversion.json", "model.safetensors"]
    result = run(MODULE, FIXTURES / "float32.pt", "-o", out)
    assert result.returncode == 2
    assert "exists and is not empty (--force replaces it)" in result.stderr
    result = run(MODULE, FIXTURES / "float32.pt", "-o", out, "--force", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert sorted(f.name for f in out.iterdir()) == made
    assert read_arrays(out)[0]["transformer.norm.weight"].dtype == mx.float32
    assert [f.name for f in out.parent.iterdir()] == [out.name]


def test_an_empty_directory_and_a_file(run: Run, out: Path) -> None:
    out.mkdir(parents=True)
    assert run(MODULE, FIXTURES / "float32.pt", "-o", out).returncode == 0
    result = run(MODULE, FIXTURES / "float32.pt", "-o", out / "config.json", "--force")
    assert result.returncode == 2
    assert "exists and is not a directory" in result.stderr


def test_the_help_says_which_bits_each_mode_has(run: Run) -> None:
    text = " ".join(run(MODULE, "--help", COLUMNS="200").stdout.split())
    assert "default: 4 with affine; affine: 2, 3, 4, 5, 6, 8; mxfp4: 4; mxfp8: 8; nvfp4: 4" in text
    assert "default: 64 with affine; affine: 32, 64, 128; mxfp4: 32; mxfp8: 32; nvfp4: 16" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-q", "--bits", "7"], "bits of mode affine must be 2, 3, 4, 5, 6, 8, not 7"),
        (["-q", "--bits", "0"], "bits of mode affine must be 2, 3, 4, 5, 6, 8, not 0"),
        (["-q", "--group-size", "0"], "group_size of mode affine must be 32, 64, 128, not 0"),
        (["-q", "--mode", "mxfp4", "--bits", "8"], "bits of mode mxfp4 must be 4, not 8"),
        (["--bits", "0"], "--bits, --group-size and --mode go with -q"),
        (["--keep-embeddings"], "--keep-embeddings goes with -q or --recipe"),
    ],
)
def test_options_that_do_not_fit(run: Run, out: Path, options: list[str], message: str) -> None:
    result = run(MODULE, DEMO, "-o", out, *options)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert nothing_is_left(out)


def test_keeping_the_embeddings_says_nothing_of_a_recipe(run: Run, out: Path) -> None:
    result = run(MODULE, DEMO, "-o", out, "-q", "--keep-embeddings")
    assert (result.returncode, result.stderr) == (0, "")


def test_every_option_that_names_a_file_knows_the_home_directory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(DEMO, tmp_path / "home" / "demo")
    (tmp_path / "home" / "recipe.json").write_text("{}")
    home = {"HOME": str(tmp_path / "home")}
    for arguments in (
        ("export", "~/demo", "--out=~/demo.pt", "--format=corenet"),
        (
            "~/demo.pt",
            "--out=~/out",
            "--config=~/demo/config.json",
            "--recipe=~/recipe.json",
            "--tokenizer=~/demo/tokenizer.model",
        ),
        ("inspect", "~/demo.pt", "--config=~/demo/config.json"),
        ("verify", "~/out", "--against=~/demo.pt", "--config=~/demo/config.json"),
    ):
        result = run(MODULE, *arguments, **home)
        assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == [
        "demo",
        "demo.pt",
        "out",
        "recipe.json",
    ]
    result = run(MODULE, "upload", "~/nowhere", "someone/new", **home)
    assert f"{tmp_path / 'home' / 'nowhere'}: no such directory" in result.stderr
    assert list((tmp_path / "here").iterdir()) == []
