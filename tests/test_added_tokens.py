"""Tokens that a directory's files add: the same ids as transformers, before and after writing."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_openelm import InputError
from mlx_openelm.checkpoint.hub import DEMO
from mlx_openelm.tokenizer.files import carry_tokenizer, write_tokenizer_files
from mlx_openelm.tokenizer.tokenizer import load_tokenizer

MODEL = DEMO / "demo"
SIZE = 4096  # pieces of the demo's tokenizer
CONTENTS = ("<x>", "<x><y>", "<|im_start|>", "the", " the", "x", "Ünï", "<s", "<tool>", "ab", "b c")
WORDS = (*CONTENTS, "<s>", "</s>", "<unk>", " ", "  ", "\n", "a", "king", "é", "e\u0301", "<y>")
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def added_tokens(kinds: tuple[str, ...] = FLAGS) -> st.SearchStrategy[list[dict[str, Any]]]:
    token = st.fixed_dictionaries(
        {"content": st.sampled_from(CONTENTS), **{flag: st.booleans() for flag in kinds}}
    )
    return st.lists(token, min_size=1, max_size=5, unique_by=lambda token: token["content"])


texts = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


def auto_tokenizer(directory: Path) -> Any:
    """As mlx-lm loads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


def assert_same(directory: Path, theirs: Any, found: list[str]) -> None:
    ours = load_tokenizer(directory)
    for text in found:
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == expected, (text, special)
    assert ours.get_vocab() == theirs.get_vocab()


def with_ids(tokens: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tokens with the ids that they get: those of their pieces, or the next ones."""
    vocab = json.loads((MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    following = iter(range(SIZE, SIZE + len(tokens)))
    return {
        str(vocab[t["content"]] if t["content"] in vocab else next(following)): t for t in tokens
    }


def write(directory: Path, where: str, tokens: list[dict[str, Any]], kind: str) -> None:
    """A tokenizer.json whose tokens are added in one of the places where files say so."""
    values = json.loads((MODEL / "tokenizer.json").read_text())
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    config: dict[str, Any] = {"tokenizer_class": kind, **named}
    if where == "tokenizer.json":
        values["added_tokens"] += [{"id": int(i), **t} for i, t in with_ids(tokens).items()]
    elif where == "added_tokens_decoder":
        config["added_tokens_decoder"] = with_ids(tokens)
    elif where == "extra":
        config["additional_special_tokens"] = [token["content"] for token in tokens]
    elif where == "special_tokens_map.json":
        (directory / where).write_text(
            json.dumps({**named, "cls_token": tokens[0], "mask_token": tokens[-1]["content"]})
        )
    else:
        plain = {token["content"]: int(i) for i, token in with_ids(tokens).items()}
        (directory / "added_tokens.json").write_text(json.dumps(plain))
        config["mask_token"] = tokens[0]["content"]
    (directory / "tokenizer.json").write_text(json.dumps(values))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


PLACES = (
    *("tokenizer.json", "added_tokens_decoder", "extra"),
    *("special_tokens_map.json", "added_tokens.json"),
)


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("where", PLACES)
@settings(max_examples=6, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tokens=added_tokens(), found=st.lists(texts, min_size=20, max_size=20))
def test_ids_are_those_of_transformers(
    where: str, kind: str, tokens: list[dict[str, Any]], found: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory, carried, written = Path(name) / "a", Path(name) / "b", Path(name) / "c"
        for path in (directory, carried, written):
            path.mkdir()
        write(directory, where, tokens, kind)
        shutil.copy(MODEL / "tokenizer.model", directory)  # it comes second
        theirs = auto_tokenizer(directory)
        assert_same(directory, theirs, found)
        carry_tokenizer(directory, carried)
        assert write_tokenizer_files(directory, written, chat=True) is None
        for copy in (carried, written):
            for file in directory.iterdir():
                assert (copy / file.name).read_bytes() == file.read_bytes()
            assert_same(copy, theirs, found[:5])


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json", "extra"])
@settings(max_examples=6, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tokens=added_tokens(), found=st.lists(texts, min_size=20, max_size=20))
def test_a_sentencepiece_model_with_added_tokens(
    where: str, tokens: list[dict[str, Any]], found: list[str]
) -> None:
    """What is written beside it makes transformers find the ids that we find without it."""
    with tempfile.TemporaryDirectory() as name:
        directory, written = Path(name) / "a", Path(name) / "b"
        directory.mkdir()
        written.mkdir()
        write(directory, where, tokens, "LlamaTokenizer")
        (directory / "tokenizer.json").unlink()
        shutil.copy(MODEL / "tokenizer.model", directory)
        ours = load_tokenizer(directory)
        assert ours.vocab_size == SIZE + sum(int(i) >= SIZE for i in with_ids(tokens))
        assert write_tokenizer_files(directory, written, chat=False) is None
        theirs = auto_tokenizer(written)
        assert_same(written, theirs, found)
        for text in found:
            assert ours.encode(text) == theirs.encode(text), text
        for file in directory.iterdir():
            if file.name != "tokenizer_config.json":
                assert (written / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"legacy": True},
        {"legacy": False},
        {"legacy": None, "add_bos_token": False, "add_eos_token": True},
        {"add_prefix_space": False},
        {"split_special_tokens": True},
    ],
)
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", None])
def test_settings_are_those_of_transformers(
    kind: str | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    tokens = [{"content": "<x>", "special": True}, {"content": "<y>", "rstrip": True}]
    write(tmp_path, "added_tokens_decoder", tokens, "PreTrainedTokenizerFast")
    file = tmp_path / "tokenizer_config.json"
    values = {**json.loads(file.read_text()), "tokenizer_class": kind, **settings}
    file.write_text(json.dumps({key: value for key, value in values.items() if key != kind}))
    texts = ["a <x> b", "  a", "<y>  a <s>", "a</s>b", "", " ", "\n a", "é <x><y>"]
    assert_same(tmp_path, auto_tokenizer(tmp_path), texts)


def test_added_tokens_are_matched_before_each_part_gets_its_space(tmp_path: Path) -> None:
    shutil.copy(MODEL / "tokenizer.model", tmp_path)
    plain = load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": SIZE, "<y>": SIZE + 1}))
    tokenizer = load_tokenizer(tmp_path)
    king = plain.encode("king", add_special_tokens=False)
    assert tokenizer.encode("king<x>king<y>") == [1, *king, SIZE, *king, SIZE + 1]
    assert tokenizer.decode([SIZE, *king]) == "<x> king"
    assert len(tokenizer) == SIZE + 2


def test_special_tokens_are_silent_unless_asked_for(tmp_path: Path) -> None:
    tokens = [{"content": "<x>", "special": True, "normalized": False}, {"content": "<y>"}]
    write(tmp_path, "added_tokens_decoder", tokens, "PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a<x>b<y></s>")
    assert tokenizer.decode(ids) == "a b<y>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> a<x> b<y></s>"
    assert tokenizer.decode(SIZE, skip_special_tokens=False) == "<x>"


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({}, [1, "king"]),
        ({"add_bos_token": False}, ["king"]),
        ({"add_eos_token": True}, [1, "king", 2]),
    ],
)
def test_what_goes_around_a_text(tmp_path: Path, config: dict[str, Any], ids: list[Any]) -> None:
    """With SentencePiece's file; a tokenizer.json says it itself."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(MODEL / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    king = tokenizer.encode("king", add_special_tokens=False)
    expected = [i for part in ids for i in (king if part == "king" else [part])]
    assert tokenizer.encode("king") == expected
    write_tokenizer_files(tmp_path, out, chat=False)
    assert load_tokenizer(out).encode("king") == expected == auto_tokenizer(out).encode("king")


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("added_tokens.json", {"<x>": SIZE + 5}, f"has the id {SIZE + 5}, but it gets {SIZE}"),
        ("added_tokens.json", {"<x>": 5}, f"has the id 5, but it gets {SIZE}"),
        ("added_tokens.json", {"<x>": 2**31}, "can't be the id"),
        ("added_tokens.json", {"<x>": "5x"}, "can't be the id"),
        ("added_tokens.json", {"x" * 2000: SIZE}, "can't be an added token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "a"}}}, "the id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": "a"}}, "needs a content"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "must be an object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(SIZE): {"content": "a", "special": 1}}},
            "special of token 'a' must be true or false",
        ),
        ("tokenizer_config.json", {"pad_token": 7}, "needs a content"),
    ],
)
@pytest.mark.parametrize("base", ["tokenizer.json", "tokenizer.model"])
def test_what_is_refused(
    tmp_path: Path, base: str, name: str, values: dict[str, Any], reason: str
) -> None:
    shutil.copy(MODEL / base, tmp_path)
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(InputError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_without_an_equal_takes_no_added_tokens(tmp_path: Path) -> None:
    from .test_tokenizer import train

    (tmp_path / "tokenizer.model").write_bytes(train(model_type="unigram"))
    load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 460}))
    with pytest.raises(InputError, match=r"tokens can't be added to it, because .* BPE kind"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    tokens = [{"content": "<x>", "special": True, "normalized": False}]
    write(tmp_path, "added_tokens_decoder", tokens, "PreTrainedTokenizerFast")
    expected = load_tokenizer(tmp_path).encode("a<x>é")
    for file in tmp_path.iterdir():
        text = file.read_text().replace("{", "{\r\n", 1)
        file.write_bytes(text.encode(encoding))
    assert load_tokenizer(tmp_path).encode("a<x>é") == expected
