"""Which ids end a text: every way to say it, through every way to write a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert.export import export
from convert.sources import open_source
from convert.writer import Options, convert
from mlx_openelm import InputError, load
from mlx_openelm.checkpoint.hub import DEMO
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.tokenizer.tokenizer import load_tokenizer

from .conftest import Run

OWN = 2  # the EOS of the demo's tokenizer
NEWLINE = 13  # `<0x0A>`


def source(
    directory: Path,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """The demo, with other values in its files."""
    directory.mkdir()
    for file in (DEMO / "demo").iterdir():
        if file.name not in without and file.name != "conversion.json":
            shutil.copy(file, directory)
    for name, values in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer),
    ):
        if values is not None:
            file = directory / name
            old = json.loads(file.read_text()) if file.exists() else {}
            merged = {key: value for key, value in {**old, **values}.items() if value != "absent"}
            file.write_text(json.dumps(merged))
    return directory


SAID: dict[str, tuple[dict[str, Any], set[int]]] = {
    "one id": ({"config": {"eos_token_id": OWN}}, {OWN}),
    "another id": ({"config": {"eos_token_id": 13}}, {OWN, 13}),
    "a list": ({"config": {"eos_token_id": [OWN, 13, 14]}}, {OWN, 13, 14}),
    "an empty list": ({"config": {"eos_token_id": []}}, {OWN}),
    "null": ({"config": {"eos_token_id": None}}, {OWN}),
    "absent": ({"config": {"eos_token_id": "absent"}}, {OWN}),
    "-1": ({"config": {"eos_token_id": -1}}, {OWN}),
    "lists with a BOS": (
        {"config": {"bos_token_id": [1], "eos_token_id": [OWN, 13]}},
        {OWN, 13},
    ),
    "generation_config.json": ({"generation": {"eos_token_id": [OWN, 13]}}, {OWN, 13}),
    "generation_config.json before config.json": (
        {"generation": {"eos_token_id": 13}, "config": {"eos_token_id": 14}},
        {OWN, 13},
    ),
    "generation_config.json without": (
        {"generation": {"temperature": 1.0}, "config": {"eos_token_id": 14}},
        {OWN, 14},
    ),
    "the tokenizer's": (
        {"tokenizer": {"eos_token": "<0x0A>"}, "config": {"eos_token_id": None}},
        {NEWLINE},
    ),
    "all three": (
        {
            "tokenizer": {"eos_token": "<0x0A>"},
            "config": {"eos_token_id": 14},
            "generation": {"eos_token_id": [15, 16]},
        },
        {NEWLINE, 15, 16},
    ),
    "a tokenizer.model alone": (
        {"config": {"eos_token_id": [13]}, "without": ("tokenizer.json",)},
        {OWN, 13},
    ),
    "a tokenizer.model with a configuration": (
        {"tokenizer": {"eos_token": "<0x0A>"}, "without": ("tokenizer.json",)},
        {NEWLINE, OWN},
    ),
}


def converted(directory: Path, out: Path) -> Path:
    opened = open_source(directory)
    assert opened.config is not None
    convert(
        opened.tensors,
        opened.config,
        out,
        Options(dtype="float16", hashes=False),
        tokenizer=directory,
        generation_config=directory,
    )
    return out


def exported(directory: Path, out: Path) -> Path:
    export(directory, out, "hf")
    return out


WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "as it is": lambda directory, out: directory,
    "converted": converted,
    "exported": exported,
    "converted and exported": lambda directory, out: exported(
        converted(directory, out.with_name("between")), out
    ),
    "exported and converted": lambda directory, out: converted(
        exported(directory, out.with_name("between")), out
    ),
}


def by_mlx_lm(directory: Path) -> set[int]:
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    config = mlx_lm.load_config(directory)
    ids: set[int] = mlx_lm.load_tokenizer(
        directory, eos_token_ids=config.get("eos_token_id")
    ).eos_token_ids
    return {token for token in ids if token >= 0}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("said", SAID)
def test_the_ids_that_end_a_text(said: str, writer: str, tmp_path: Path) -> None:
    files, expected = SAID[said]
    directory = source(tmp_path / "source", **files)
    out = WRITERS[writer](directory, tmp_path / "out")
    assert load_tokenizer(out).eos_token_ids == expected
    if (out / "tokenizer.json").exists():
        assert by_mlx_lm(out) == expected
    generation = directory / "generation_config.json"
    if generation.exists():
        assert (out / generation.name).read_bytes() == generation.read_bytes()


@pytest.mark.parametrize(
    "given", [DEMO / "demo", DEMO / "demo/tokenizer.model", DEMO / "demo/tokenizer.json"]
)
def test_another_tokenizer_keeps_what_the_model_says(given: Path, tmp_path: Path) -> None:
    directory = source(tmp_path / "a", {"eos_token_id": 13}, tokenizer={"eos_token": "<0x0B>"})
    assert load(directory)[1].eos_token_ids == {13, 14}
    assert load(directory, tokenizer=given)[1].eos_token_ids == {OWN, 13}
    (directory / "generation_config.json").write_text('{"eos_token_id": [15]}')
    assert load(directory, tokenizer=given)[1].eos_token_ids == {OWN, 15}


def test_an_export_without_a_place_for_them_says_so(tmp_path: Path) -> None:
    directory = source(tmp_path / "a", {"eos_token_id": [OWN, 13]})
    assert any(
        "[13] end a text" in note for note in export(directory, tmp_path / "b.pt", "corenet")
    )
    directory = source(tmp_path / "c", {"eos_token_id": OWN})
    notes = export(directory, tmp_path / "d.pt", "corenet")
    assert not any("end a text" in note for note in notes)


def test_ids_can_be_added_and_set() -> None:
    tokenizer = load_tokenizer(DEMO / "demo")
    tokenizer.add_eos_token("<0x0A>")
    tokenizer.add_eos_token("17")
    assert tokenizer.eos_token_ids == {OWN, NEWLINE, 17}
    tokenizer.eos_token_ids = [5]  # type: ignore[assignment]
    assert tokenizer.eos_token_ids == {5}
    with pytest.raises(InputError, match="not a token"):
        tokenizer.add_eos_token("no such")
    again = load_tokenizer(DEMO / "demo", tokenizer_config={"eos_token": "<0x0A>"})
    assert again.eos_token_ids == {OWN, NEWLINE}


@pytest.mark.parametrize("value", ["2", 2.0, True, [True], ["2"], {"a": 1}, [[2]], 2**31])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_values_that_are_no_ids(name: str, value: Any, tmp_path: Path) -> None:
    key = "config" if name == "config.json" else "generation"
    directory = source(tmp_path / "a", **{key: {"eos_token_id": value}})
    with pytest.raises(InputError, match=r"eos_token_id must be a token's id") as caught:
        load_tokenizer(directory)
    assert str(caught.value).startswith(str(directory / name))


def test_a_config_keeps_its_ids() -> None:
    values = {**json.loads((DEMO / "demo/config.json").read_text())}
    for ids in ([1, 5], 7, -1, None):
        changed = {**values, "bos_token_id": ids, "eos_token_id": ids}
        written = OpenELMConfig.from_dict(changed).to_dict()
        assert (written["bos_token_id"], written["eos_token_id"]) == (ids, ids)


def test_a_model_that_cannot_be_loaded_does_not_abort(run: Run, tmp_path: Path) -> None:
    """The tokenizer is read on another thread, which must have ended when the program does."""
    directory = source(tmp_path / "a", {"eos_token_id": "x"}, without=("tokenizer.json",))
    for _ in range(3):
        result = run("mlx_openelm.generate", "--model", directory, "-p", "Hi", "-m", "1")
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
