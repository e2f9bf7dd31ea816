"""Strangers' tokenizer files: one line, within seconds, no panic of the tokenizers package."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_openelm import InputError
from mlx_openelm.checkpoint.hub import DEMO
from mlx_openelm.tokenizer.files import write_tokenizer_files
from mlx_openelm.tokenizer.tokenizer import load_tokenizer

from .checkpoints import EDITS, mutated

MODEL, JSON = DEMO / "demo/tokenizer.model", DEMO / "demo/tokenizer.json"
TEXTS = ("Once upon <s>  a time \u0301é 😀", "x" * 60, " " * 300, "<unk>\n\t\0")
Change = Callable[[dict[str, Any]], object]


def use(directory: Path) -> None:
    """Load and use a tokenizer; an error is one line of ours."""
    try:
        tokenizer = load_tokenizer(directory)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert all(0 <= token < tokenizer.vocab_size for token in ids)
            tokenizer.decode(ids)
            tokenizer.decode(ids, skip_special_tokens=False)
        for token in range(min(tokenizer.vocab_size, 5000)):
            tokenizer.decode([token])
    except InputError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600


def regex(where: str) -> Change:
    step = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated"}
    if where == "pre_tokenizer":
        return lambda v: v.update(pre_tokenizer=split)
    return lambda v: v["normalizer"]["normalizers"].append(step)


def growing(v: dict[str, Any]) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    v["normalizer"]["normalizers"] += [step] * 20


def added(**values: Any) -> Change:
    token = {"id": 4096, "content": "<x>", **values}
    return lambda v: v["added_tokens"].append(token)


HOSTILE: dict[str, tuple[Change, str]] = {
    "prefix": (lambda v: v["model"].update(continuing_subword_prefix="▁"), "isn't used with"),
    "suffix": (lambda v: v["model"].update(end_of_word_suffix="</w>"), "isn't used with"),
    "no model": (lambda v: v.pop("model"), "no model"),
    "another model": (lambda v: v["model"].update(type="WordPiece"), "'WordPiece'"),
    "no vocabulary": (lambda v: v["model"].update(vocab={}), "model.vocab must"),
    "ids that aren't": (lambda v: v["model"]["vocab"].update(a=[1]), "different non-negative"),
    "huge ids": (lambda v: v["model"]["vocab"].update(a=2**31), "different non-negative"),
    "the same id": (lambda v: v["model"]["vocab"].update(zz=5), "different non-negative"),
    "unknown is unknown": (lambda v: v["model"].update(unk_token="zzz"), "not in the vocabulary"),
    "merges of what isn't there": (lambda v: v["model"]["merges"].append("q 漢"), "漢"),
    "malformed merges": (lambda v: v["model"]["merges"].append(["a"]), "can be used"),
    "decoder without type": (lambda v: v["decoder"]["decoders"][0].pop("type"), "with a type"),
    "decoder of a type": (lambda v: v["decoder"]["decoders"][0].update(type={}), "with a type"),
    "a decoder": (lambda v: v.update(decoder=[1]), "with a type"),
    "deep sequence": (
        lambda v: v.update(
            normalizer=json.loads('{"type":"Sequence","normalizers":[' * 9 + "]}" * 9)
        ),
        "must have a list",
    ),
    "precompiled": (
        lambda v: v.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "Precompiled",
    ),
    "regular expression": (regex("normalizer"), "could take for ever"),
    "regular expression that splits": (regex("pre_tokenizer"), "could take for ever"),
    "empty pattern": (
        lambda v: v["normalizer"]["normalizers"].append(
            {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
        ),
        "no usable pattern",
    ),
    "a text that grows": (growing, "times longer"),
    "many steps": (
        lambda v: v.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99}),
        "more than 32",
    ),
    "an added token's id": (added(id=2**40), "no id that can be used"),
    "another added token's id": (added(id=5), "but it gets 4096"),
    "a gap": (added(id=2**23), "but it gets 4096"),
    "an added token's text": (added(content=7), "needs a content"),
    "a long added token": (added(content="x" * 5000), "needs a content"),
    "an added token's flag": (added(lstrip="yes"), "must be true or false"),
    "post-processor": (lambda v: v.update(post_processor={"type": "Bert"}), "isn't used with"),
    "ids around a text": (
        lambda v: v["post_processor"]["special_tokens"]["<s>"].update(ids=[99999]),
        "has the id 99999",
    ),
    "no text in it": (lambda v: v["post_processor"].update(single=[]), "the text once"),
    "an unknown token around a text": (
        lambda v: v["post_processor"].update(special_tokens={}),
        "malformed",
    ),
}


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(JSON.read_text())
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_json(
    name: str, values: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, reason = HOSTILE[name]
    changed = copy.deepcopy(values)
    change(changed)
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    start = time.monotonic()
    with pytest.raises(InputError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert time.monotonic() - start < 5
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
    assert "panicked" not in capfd.readouterr().err


def test_a_unigram_tokenizer_json_is_read(values: dict[str, Any], tmp_path: Path) -> None:
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["▁", -2.0], ["a", -1.0], ["aa", -1.5]]
    model = {"type": "Unigram", "vocab": pieces, "unk_id": 0, "byte_fallback": False}
    changed = {**values, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("aaa") == [1, 3, 4, 5]
    for wrong in ([["a", float("inf")]], [["", 0.0]], [["a", 0.0], ["a", 0.0]], [["a"]], []):
        changed = {**values, "model": {**model, "vocab": wrong}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match="not a tokenizer.json"):
            load_tokenizer(tmp_path)


PARTS: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**31, 2**40, 1.5, "", "a", "▁", "<s>", "\ud800", "x" * 2000, [], {}),
    *([1], {"a": 1}, {"type": "NFC"}, {"String": "a"}, {"Regex": "(x+x+)+y"}, "Sequence"),
    *("Replace", "Prepend", "Metaspace", "Strip", "Fuse", "Unigram", "ByteLevel", "Precompiled"),
)


def changed_somewhere(values: dict[str, Any], rng: random.Random) -> None:
    node: Any = values
    for _ in range(rng.randint(1, 6)):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys if len(keys) < 50 else keys[:4] + keys[-4:])
        if isinstance(node[key], (dict, list)) and rng.random() < 0.75:
            node = node[key]
        elif rng.random() < 0.2:
            del node[key]
            return
        else:
            node[key] = rng.choice(PARTS)
            return


def test_mutated_tokenizer_jsons(
    values: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = copy.deepcopy(values)  # with few merges, a file is read in a millisecond
    small["model"]["merges"] = small["model"]["merges"][:20]
    text = json.dumps({**small, "model": {**small["model"], "vocab": few(small)}})
    rng = random.Random(20)
    for _ in range(600):
        changed = json.loads(text)
        for _ in range(rng.randint(1, 3)):
            changed_somewhere(changed, rng)
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        use(tmp_path)
    assert "panicked" not in capfd.readouterr().err


def few(values: dict[str, Any]) -> dict[str, int]:
    """The first pieces and what the merges need, with ids in turn."""
    vocab = values["model"]["vocab"]
    merges = [merge.split(" ") for merge in values["model"]["merges"]]
    needed = {text for a, b in merges for text in (a, b, a + b)}
    kept = [text for i, text in enumerate(vocab) if i < 270 or text in needed]
    return {text: i for i, text in enumerate(kept)}


def test_mutated_sentencepiece_models(tmp_path: Path) -> None:
    data, rng = MODEL.read_bytes(), random.Random(21)
    file = tmp_path / "tokenizer.model"
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(400):
        edge = rng.choice([rng.randrange(len(data)), rng.randrange(300), -rng.randrange(1, 400)])
        edits = [(rng.choice(EDITS), edge, rng.randrange(1, 40), rng.randrange(1 << 16))]
        file.write_bytes(mutated(data, edits))
        use(tmp_path)
        try:
            write_tokenizer_files(file, out, chat=False)
        except InputError as error:
            assert "\n" not in str(error)


def number(value: int) -> bytes:
    digits = b""
    while value > 127:
        digits, value = digits + bytes([value & 127 | 128]), value >> 7
    return digits + bytes([value])


def message(field: int, data: bytes) -> bytes:
    return number(field << 3 | 2) + number(len(data)) + data


def piece(text: str | bytes, score: float = 0.0, kind: int = 1) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    values = b"\x15" + struct.pack("<f", score) + b"\x18" + number(kind)
    return message(1, message(1, encoded) + values)


PIECES = [
    *(piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)),
    *(piece(letter, -i) for i, letter in enumerate("▁abcdefgh")),
]
END = message(2, b"\x18\x02") + message(3, message(1, b"identity") + message(2, b"") + b"\x20\0")
MODELS = {
    "sound": b"",
    "a group": b"\x53\x54",
    "a piece of bytes that are no text": piece(b"\xff\xfe"),
    "a score of another type": message(1, message(1, b"zz") + b"\x10\x05"),
    "a kind of another type": message(1, message(1, b"zz") + message(3, b"\x01")),
    "an empty piece": piece(""),
    "a piece without text": message(1, b"\x18\x01"),
    "a piece twice": piece("a"),
    "a score that is no number": piece("ab", float("nan")),
    "an infinite score": piece("ab", float("inf")),
    "a malformed byte": piece("<0xZZ>", 0, 6),
    "a kind that isn't": piece("ab", 0, 9),
    "a long number": b"\x08" + b"\xff" * 20 + b"\x01",
    "a size beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
    "a truncated number": b"\x0a\xff",
    "a piece that is a number": b"\x08\x05",
    "a trainer that is a number": b"\x10\x05",
}


@pytest.mark.parametrize("name", MODELS)
def test_handmade_sentencepiece_models(name: str, tmp_path: Path) -> None:
    end = b"" if "end" in name or "truncated" in name else END
    file, out = tmp_path / "tokenizer.model", tmp_path / "out"
    out.mkdir()
    file.write_bytes(b"".join(PIECES) + MODELS[name] + end)
    use(tmp_path)
    try:
        write_tokenizer_files(file, out, chat=False)
    except InputError as error:
        assert name != "sound" and "\n" not in str(error)


PLACES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    "additional_chat_templates/a.jinja",
)


@pytest.mark.parametrize("kind", ["fifo", "sparse", "link", "directory"])
@pytest.mark.parametrize("name", PLACES)
def test_strange_files_in_every_place(name: str, kind: str, tmp_path: Path) -> None:
    directory, secret = tmp_path / "model", tmp_path / "secret"
    (directory / name).parent.mkdir(parents=True)
    if name != "tokenizer.model":
        (directory / "tokenizer.json").write_bytes(JSON.read_bytes())
    secret.write_text("{}")
    path = directory / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(secret)
    elif kind == "directory":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(20 << 30)
    start = time.monotonic()
    with pytest.raises(InputError, match=str(path)):
        load_tokenizer(directory)
    assert time.monotonic() - start < 5
