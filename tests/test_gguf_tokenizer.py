"""llama.cpp sees the tokens that our tokenizer gives, for every model that is written as GGUF."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mlx_openelm import OpenELM, OpenELMConfig, generate
from mlx_openelm.checkpoint.directory import save_model
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.convert.export import export, gguf
from mlx_openelm.errors import InputError
from mlx_openelm.tokenizer.tokenizer import Tokenizer, load_tokenizer

from .test_tokenizer import SENTENCES, train

UNIGRAM: dict[str, Any] = {"model_type": "unigram", "byte_fallback": False}
NFKC: dict[str, Any] = {
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
}
EQUAL: dict[str, dict[str, Any]] = {
    "BPE": {},
    "BPE, no dummy prefix": {"add_dummy_prefix": False},
    "BPE, other ids": {"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2},
    "BPE, control symbols": {"control_symbols": ["<|user|>", "<|end|>"]},
    "BPE, user-defined symbols": {"user_defined_symbols": ["<|user|>"], "add_dummy_prefix": False},
    "unigram": {**UNIGRAM, **NFKC},
    "unigram, no dummy prefix": {**UNIGRAM, "add_dummy_prefix": False},
    "unigram, user-defined symbols": {
        **UNIGRAM,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<|user|>"],
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "user-defined symbols": ({"user_defined_symbols": ["<|user|>"]}, "has user-defined pieces and"),
    "with spaces": (
        {"user_defined_symbols": ["▁▁▁"], "add_dummy_prefix": False},
        "has user-defined pieces with spaces",
    ),
    "overlapping symbols": ({"control_symbols": ["<a><b", "<b><c>"]}, "pieces that overlap"),
    "spaces removed": ({"remove_extra_whitespaces": True}, "normalises its text"),
    "NFKC": ({"normalization_rule_name": "nmt_nfkc"}, "normalises its text"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "doesn't mark a space at the front"),
    "no bytes": ({"byte_fallback": False}, "has no pieces for bytes"),
    "unigram with bytes": ({**UNIGRAM, "byte_fallback": True}, "doesn't use"),
    "unigram, spaces kept": (UNIGRAM, "treats spaces at the ends"),
    "characters": ({"model_type": "char"}, "is neither BPE nor unigram"),
}
TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " leading",
    "trailing ",
    "1234",
    "a\tb",
    "😀",
    "日本",
    "ﬁne ½",
]
TEXTS += ["x</s>y", "<s> hi</s>", "a <unk> b", "<|user|>hi", "a<|user|>b", "<0x0A>", "[UNUSED0]"]


def random_texts(count: int) -> list[str]:
    """Words, spaces and what is special, in NFC: ours makes it so, llama.cpp doesn't."""
    chosen = random.Random(12)
    words = [word for sentence in SENTENCES for word in sentence.split()]
    atoms = [" ", "  ", "\n", "é", "日", "1", "</s>", "<unk>", "\u00a0", "ﬁ", ".", "<|user|>", "_"]
    return [
        unicodedata.normalize(
            "NFC",
            "".join(
                chosen.choice(atoms) if chosen.random() < 0.5 else chosen.choice(words) + " "
                for _ in range(chosen.randint(1, 8))
            ),
        )
        for _ in range(count)
    ]


def model_with(directory: Path, sentencepiece: bytes) -> Path:
    """A tiny model directory with this tokenizer, and three rows more than it has pieces."""
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(sentencepiece)
    rows = load_tokenizer(directory / "tokenizer.model").vocab_size + 3
    config = OpenELMConfig.scaled(
        vocab_size=rows, model_dim=32, head_dim=32, num_transformer_layers=1
    )
    save_model(directory, config, OpenELM(config).parameters())
    return directory


def serve(file: Path) -> Any:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def tokens(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True}).encode()
    request = urllib.request.Request(
        server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        found: list[int] = json.load(answer)["tokens"]
    return found


@pytest.mark.parametrize("name", EQUAL)
def test_llama_cpp_sees_the_same_tokens(tmp_path: Path, name: str) -> None:
    directory = model_with(tmp_path / "model", train(**EQUAL[name]))
    export(directory, tmp_path / "model.gguf", "gguf")
    server, tokenizer = serve(tmp_path / "model.gguf"), load_tokenizer(directory)
    for text in [*TEXTS, *SENTENCES[:5], *random_texts(60)]:
        assert tokens(server, text) == tokenizer.encode(text), repr(text)


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_see_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    flags, reason = REFUSED[name]
    directory = model_with(tmp_path / "model", train(**flags))
    with pytest.raises(InputError, match=reason):
        export(directory, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_tokenizer_that_its_sentencepiece_model_does_not_equal_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a directory's tokenizer.json may be."""
    directory = model_with(tmp_path / "model", train())
    (tmp_path / "other.model").write_bytes(train(add_dummy_prefix=False))
    other = load_tokenizer(tmp_path / "other.model")
    assert other.vocab_size == load_tokenizer(directory).vocab_size
    monkeypatch.setattr(gguf, "load_tokenizer", lambda path: other)
    with pytest.raises(InputError, match="gives other ids than its tokenizer.model for 'Once upon"):
        export(directory, tmp_path / "model.gguf", "gguf")


def test_llama_cpp_sees_added_tokens(tmp_path: Path) -> None:
    directory = model_with(tmp_path / "model", train())
    pieces = load_tokenizer(directory).vocab_size
    listed = {
        str(pieces + i): {"content": text, "special": special, "normalized": False}
        for i, (text, special) in enumerate([("<|im_start|>", True), ("[tool]", False)])
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.vocab_size == pieces + 2
    export(directory, tmp_path / "model.gguf", "gguf")
    server = serve(tmp_path / "model.gguf")
    for text in (*TEXTS, *random_texts(30), "<|im_start|>a", "a<|im_start|> b", "x[tool]y [tool]"):
        assert tokens(server, text) == tokenizer.encode(text), repr(text)
    listed[str(pieces)]["lstrip"] = True
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    with pytest.raises(InputError, match="gives other ids than its tokenizer.model for 'a <.im"):
        export(directory, tmp_path / "other.gguf", "gguf")


def test_a_row_without_a_token_gets_a_text_of_its_own(tmp_path: Path) -> None:
    """llama.cpp aborts when two tokens have the same text."""
    directory = model_with(tmp_path / "model", train(control_symbols=["[UNUSED1]"]))
    export(directory, tmp_path / "model.gguf", "gguf")
    reader = pytest.importorskip("gguf").GGUFReader
    fields = reader(tmp_path / "model.gguf").fields
    texts = fields["tokenizer.ggml.tokens"].contents()
    assert len(set(texts)) == len(texts)
    assert texts[-3:] == ["[UNUSED0]", "[[UNUSED1]]", "[UNUSED2]"]
    server, tokenizer = serve(tmp_path / "model.gguf"), load_tokenizer(directory)
    assert tokens(server, "a[UNUSED1]b") == tokenizer.encode("a[UNUSED1]b")


def test_a_byte_that_is_spelled_by_pieces_is_refused(tmp_path: Path) -> None:
    sentencepiece = train(user_defined_symbols=["<0x0A"], add_dummy_prefix=False)
    kind = sentencepiece.index(b"<0x0A\x15") + len(b"<0x0A") + 5
    assert sentencepiece[kind : kind + 2] == b"\x18\x04"  # user-defined; now a normal piece
    changed = sentencepiece[:kind] + b"\x18\x01" + sentencepiece[kind + 2 :]
    directory = model_with(tmp_path / "model", changed)
    with pytest.raises(InputError, match="spell the name of a byte"):
        export(directory, tmp_path / "model.gguf", "gguf")


@pytest.mark.parametrize("count", [2, 3])
def test_llama_cpp_ends_where_ours_does(
    demo: tuple[OpenELM, Tokenizer], tmp_path: Path, count: int
) -> None:
    """The demo with further end tokens: those of its third and its sixth word."""
    directory = Path(shutil.copytree(BUNDLED["demo"], tmp_path / "model"))
    prompt = "Once upon a time"
    text = generate(*demo, prompt, max_tokens=30)
    ids = demo[1].encode(text, add_special_tokens=False)
    further = sorted({ids[12], ids[6]}, reverse=True)[: count - 1]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *further]}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_token_ids == {2, *further}
    ours = generate(demo[0], tokenizer, prompt, max_tokens=30)
    assert 0 < len(ours) < len(text)
    assert export(directory, tmp_path / "model.gguf", "gguf", "float32") == []
    asked = {"prompt": prompt, "n_predict": 30, "temperature": 0, "cache_prompt": False}
    [choice] = serve(tmp_path / "model.gguf").handle_completions(asked)["choices"]
    assert choice["finish_reason"] == "stop"
    # llama.cpp shows the end token's text, where it has one
    end = demo[1].encode(text, add_special_tokens=False)[len(demo[1].encode(ours)) - 1]
    assert end in further
    assert choice["text"] == ours + demo[1].decode([end])


def test_more_ends_than_a_gguf_names_are_told(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(BUNDLED["demo"], tmp_path / "model"))
    ends = {"eos_token_id": [2, 10, 11, 12, 13]}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    assert export(directory, tmp_path / "model.gguf", "gguf") == [
        "llama.cpp won't end at [12, 13]: a GGUF names three end tokens"
    ]
