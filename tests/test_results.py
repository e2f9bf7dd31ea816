"""results.json: what is written can be read, and what can't be read is refused in one line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm.benchmarks.results import SCHEMA, Results, read, write
from mlx_openelm.errors import InputError

from . import measured

finite = st.floats(allow_nan=False, allow_infinity=False)
st.register_type_strategy(float, finite)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write(measured.results(), file)
    assert read(file) == measured.results()
    assert [f.name for f in tmp_path.iterdir()] == ["results.json"]


@settings(max_examples=50, deadline=None)
@given(results=st.builds(Results, schema=st.just(SCHEMA)))
def test_any_results_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, results: Results
) -> None:
    file = tmp_path_factory.mktemp("any") / "results.json"
    write(results, file)
    assert read(file) == results


def test_unknown_fields_are_left_out(tmp_path: Path) -> None:
    values = asdict(measured.results()) | {"mood": "good"}
    values["machine"]["colour"] = "space grey"
    assert read(_file(tmp_path, values)) == measured.results()


def test_a_results_file_without_what_has_a_default(tmp_path: Path) -> None:
    values = asdict(measured.results())
    del values["notes"], values["partial"], values["machine"]["chip"]
    results = read(_file(tmp_path, values))
    assert (results.notes, results.partial, results.machine.chip) == ([], False, "unknown")


def _change(path: str, value: Any) -> dict[str, Any]:
    """A results file with one field, named by its path, of another value; `...` takes it out."""
    values = asdict(measured.results())
    *way, last = path.split(".")
    place: Any = values
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("schema", 2, "schema version 2; this version of mlx-openelm reads 1"),
        ("schema", "1", "schema version '1'"),
        ("schema", True, "schema version True"),
        ("created", ..., "created is missing"),
        ("machine", ..., "machine is missing"),
        ("machine", [], "machine should be an object"),
        ("machine.cores", "two", "machine.cores should be of type int, not 'two'"),
        ("machine.cores", True, "machine.cores should be of type int, not True"),
        ("machine.versions", {"mlx": 32}, "machine.versions.mlx should be of type str, not 32"),
        ("models.0.parameters", 1.5, "models[0].parameters should be of type int, not 1.5"),
        ("models.1.bytes", ..., "models[1].bytes is missing"),
        ("measurements", None, "measurements should be of type list"),
        ("measurements.0.work.kind", 3, "measurements[0].work.kind should be of type str"),
        ("measurements.2.unit", ..., "measurements[2].unit is missing"),
        ("measurements.0.trials.1.value", "9", "measurements[0].trials[1].value should be of type"),
        ("measurements.0.trials.1.value", None, "measurements[0].trials[1].value should be of"),
        ("measurements.0.trials.1.value", float("nan"), "measurements[0].trials[1].value"),
        ("measurements.0.trials.1.value", float("inf"), "measurements[0].trials[1].value"),
        ("measurements.0.trials.1.value", 10**400, "a number has 401 digits"),
        ("measurements.0.statistics", {"acceptance": []}, "measurements[0].statistics.acceptance"),
        ("calibration.0.matmul", [1], "calibration[0].matmul should be of type dict"),
        ("notes.0", 1, "notes[0] should be of type str, not 1"),
        ("partial", "no", "partial should be of type bool, not 'no'"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, path: str, value: Any, said: str) -> None:
    values = _change(path, value) if path != "notes.0" else _change("notes", [value])
    file = _file(tmp_path, values)
    with pytest.raises(InputError) as raised:
        read(file)
    message = str(raised.value)
    assert message.startswith(f"{file}: ")
    assert said in message
    assert "\n" not in message
    assert "__init__" not in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_an_editor_saved_is_read(tmp_path: Path, encoding: str) -> None:
    results = measured.results()
    file = tmp_path / "results.json"
    write(results, file)
    file.write_bytes(file.read_text().replace("\n", "\r\n").encode(encoding))
    assert read(file) == results


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"results", "Expecting value"),
        (b"\xff\xfe{}", "not a JSON file"),
        (b"[]", "holds a JSON list, not an object"),
        (b"{}", "not a results file"),
        (b'{"model_type": "openelm"}', "not a results file"),
        (b"[" * 100_000, "nested"),
        (b'{"schema": 1}', "created is missing"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.json: No such file"):
        read(tmp_path / "missing.json")
    with pytest.raises(InputError, match="not a regular file"):
        read(tmp_path)


def _file(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "results.json"
    file.write_text(json.dumps(values))
    return file
