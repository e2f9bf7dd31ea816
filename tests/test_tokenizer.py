"""Tokenizer, streaming detokenizer, chat format, and the files written for mlx-lm.

With OPENELM_TEST_TOKENIZER set to a real `tokenizer.model`, the comparisons run on it too.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_openelm import InputError
from mlx_openelm.tokenizer.files import write_tokenizer_files
from mlx_openelm.tokenizer.tokenizer import (
    CHAT_TEMPLATE,
    StreamingDetokenizer,
    Tokenizer,
    load_tokenizer,
)
from mlx_openelm.tokenizer.vocabulary import from_sentencepiece

SENTENCES = """
Once upon a time there was a little girl who lived near the forest with her grandmother.
The king said to his three sons: whoever brings me the golden bird shall have the kingdom.
Then the fox said, "I will help you, but you must do exactly as I tell you."
    In 1812 the brothers had collected 86 tales; by 1857 there were 210.
        So they walked on and on, until it was night, and saw a light among the trees.
Es war einmal ein König, der hatte eine schöne Tochter. Où est la forêt ? Ça, c'est l'été.
She said no. He said yes. They went into the house, and the door was shut behind them.
""".strip("\n").splitlines()

LLAMA = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "byte_fallback": True,
    "pad_id": -1,
    "allow_whitespace_only_pieces": True,
}

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}

REAL = os.environ.get("OPENELM_TEST_TOKENIZER")

MESSAGES = [
    {"role": "system", "content": "Be  brief."},
    {"role": "user", "content": " What is </s> and <s>?\n"},
    {"role": "assistant", "content": "Ein König 👑"},
    {"role": "user", "content": ""},
]


def train(**flags: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        vocab_size=460,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**LLAMA, **flags},
    )
    return model.getvalue()


def with_equal_scores(model: bytes, pieces: str) -> bytes:
    """The model, with LLaMA's lowest score for all pieces that match a pattern."""
    pattern = b"(?s)(\n.(?:" + pieces.encode() + b")\x15)...."
    return re.sub(pattern, lambda found: found[1] + struct.pack("<f", -1e9), model)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with LLaMA's flags; runs of spaces have one score, as in LLaMA's."""
    file = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    model = with_equal_scores(train(), "(?:▁)+")
    assert model.count(struct.pack("<f", -1e9)) >= 3
    file.write_bytes(model)
    return file


@pytest.fixture(scope="session", params=["tiny", "real"] if REAL else ["tiny"])
def model_file(request: pytest.FixtureRequest, tiny: Path) -> Path:
    return tiny if request.param == "tiny" else Path(str(REAL))


@pytest.fixture(scope="session")
def directory(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What conversion of an Instruct model writes."""
    path = tmp_path_factory.mktemp("model")
    assert write_tokenizer_files(model_file, path, chat=True) is None
    return path


@pytest.fixture(scope="session")
def mlx_lm_tokenizer(directory: Path) -> Any:
    return pytest.importorskip("mlx_lm.tokenizer_utils").load(directory)


@pytest.fixture(scope="session")
def both(directory: Path) -> list[Tokenizer]:
    """The tokenizer from `tokenizer.json`, and that from `tokenizer.model`."""
    found = [load_tokenizer(directory), load_tokenizer(directory / "tokenizer.model")]
    found[1].chat_template = CHAT_TEMPLATE
    return found


def many_strings() -> list[str]:
    fixed = [
        *(
            "",
            " ",
            "  ",
            "\n",
            "\n\n",
            "\t",
            " \n ",
            "\r\n",
            "\0",
            "\x7f",
            "\u2581",
            "\u00a0\u3000",
        ),
        *("a", " a", "  a", "a ", "a  ", "a  b", "a   b", "a\n  b", "\n a", "\ta", "1234567890"),
        *("3.14 and 2024", "<s>", "</s>", "<unk>", "<s> a", "a<s>", "a </s> b", "</s>\n", "<0x0A>"),
        *("<s></s><unk><unk>", "< s>", "<<s>>", "</s", "s>", "<|user|>\nHi</s>\n<|assistant|>\n"),
        *("<s>\u0338", "<\u0338s>", "</s>\u0301e", "e\u0301", "é", "\u1100\u1161\u11a8", "각"),
        *("a\u0323\u0302", "a\u0302\u0323", "\u212b", "ﬁ", "שׁ", "한국어", "日本語と漢字", "हिन्दी"),
        *("😀", "👩‍👧", "👍🏽", "🇩🇪", "☃\ufe0f", "😀😀 😀", "Ünïcödé", "Ça", "\ufeffa", "\ufffd"),
        *(" " * n for n in range(3, 40)),
        *("x" + " " * n + "the" for n in range(3, 20)),
    ]
    alphabets = [
        *(
            "ab ",
            "the and ",
            " \n\t",
            "0123456789 .,",
            "éàüñçßøæ ",
            "日本語漢字 ",
            "한국어",
            "😀👩‍👧🏽 ",
        ),
        *(
            "e\u0301a\u0308o\u0323\u0302",
            "\u0338<>s/",
            "▁ a",
            "אבגשׁ",
            "\0\x01\u00a0\u2028\u3000\ufeff",
        ),
        *SENTENCES,
    ]
    rng = random.Random(7)
    shuffled = [
        "".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 30))) for _ in range(300)
    ]
    spelled = ["<s>", "</s>", "<unk>", " ", "a", "  the", "\n", "é", "\u0301", "\u0338"]
    mixed = ["".join(rng.choices(spelled, k=rng.randint(1, 8))) for _ in range(100)]
    return [*fixed, *SENTENCES, *shuffled, *mixed]


# Ids


def test_ids_are_those_of_mlx_lm(both: list[Tokenizer], mlx_lm_tokenizer: Any) -> None:
    strings = many_strings()
    assert len(strings) > 500
    for text in strings:
        for special in (True, False):
            expected = mlx_lm_tokenizer.encode(text, add_special_tokens=special)
            for tokenizer in both:
                assert tokenizer.encode(text, add_special_tokens=special) == expected, repr(text)


def test_what_mlx_lm_knows_of_the_tokenizer(both: list[Tokenizer], mlx_lm_tokenizer: Any) -> None:
    for tokenizer in both:
        for name in ("vocab_size", "bos_token", "eos_token", "bos_token_id", "eos_token_id"):
            assert getattr(tokenizer, name) == getattr(mlx_lm_tokenizer, name), name
        assert tokenizer.eos_token_ids == mlx_lm_tokenizer.eos_token_ids == {2}


def test_mlx_lms_other_names(both: list[Tokenizer], mlx_lm_tokenizer: Any) -> None:
    for tokenizer in both:
        assert tokenizer.get_vocab() == mlx_lm_tokenizer.get_vocab()
        assert len(tokenizer) == len(mlx_lm_tokenizer)
        for name in ("unk_token", "pad_token", "unk_token_id", "pad_token_id", "has_chat_template"):
            assert getattr(tokenizer, name) == getattr(mlx_lm_tokenizer, name), name
        assert (tokenizer.has_thinking, tokenizer.has_tool_calling) == (False, False)
        tokens = ["</s>", "▁the", "<0x0A>", "no such token"]
        for asked in (*tokens, tokens):
            expected = mlx_lm_tokenizer.convert_tokens_to_ids(asked)
            assert tokenizer.convert_tokens_to_ids(asked) == expected
        for ids in (5, 1, [1, 5, 300, 2]):
            expected = mlx_lm_tokenizer.convert_ids_to_tokens(ids)
            assert tokenizer.convert_ids_to_tokens(ids) == expected
        assert tokenizer.convert_ids_to_tokens([1, 300, 2], skip_special_tokens=True) == [
            tokenizer.convert_ids_to_tokens(300)
        ]
        ids = tokenizer.encode("the king </s> and")
        for skip in (True, False):
            expected = mlx_lm_tokenizer.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_bos_in_front_and_spelled_control_tokens(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        assert tokenizer.encode("") == [1]
        assert tokenizer.encode("", add_special_tokens=False) == []
        assert tokenizer.encode("<s></s><unk>", add_special_tokens=False) == [1, 2, 0]
        (front, eos, back) = (
            tokenizer.encode(t, add_special_tokens=False) for t in ("a", "</s>", "b")
        )
        assert tokenizer.encode("a</s>b") == [1, *front, *eos, *back]


def test_text_is_normalised_to_nfc(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        assert tokenizer.encode("e\u0301te\u0301") == tokenizer.encode("été")


def test_half_a_surrogate_pair_is_refused(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        with pytest.raises(InputError, match="character 3 is a surrogate"):
            tokenizer.encode("abc\ud83d")


def test_a_directory_as_mlx_lm_convert_leaves_it(
    directory: Path, mlx_lm_tokenizer: Any, both: list[Tokenizer], tmp_path: Path
) -> None:
    mlx_lm_tokenizer._tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.has_chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, {2})
    for text in many_strings()[:200]:
        assert tokenizer.encode(text) == both[0].encode(text)
    assert tokenizer.apply_chat_template(MESSAGES) == both[0].apply_chat_template(MESSAGES)


# Text


@settings(deadline=None, derandomize=True, max_examples=150)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_decoding_gives_back_the_text(both: list[Tokenizer], text: str) -> None:
    assume(not re.search("<s>|</s>|<unk>|\u2581", text))
    for tokenizer in both:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def token_ids(most: int) -> st.SearchStrategy[list[int]]:
    """Ids with many control tokens and bytes (the first 259) among them."""
    one = st.integers(0, most - 1) | st.integers(0, 2) | st.integers(3, 258)
    character = st.characters(min_codepoint=128, exclude_categories=["Cs"])
    whole = character.map(lambda c: [3 + byte for byte in c.encode()])
    part = whole.flatmap(lambda ids: st.integers(1, len(ids)).map(lambda n: ids[:n]))
    groups = st.lists(one.map(lambda i: [i]) | whole | part, max_size=20)
    return groups.map(lambda found: [i for group in found for i in group])


def expected_text(model: Path, ids: list[int]) -> str:
    """From SentencePiece's own piece types: nothing of ours."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    text, after_bos = b"", False
    for i in ids:
        if processor.is_byte(i):
            piece = bytes([i - 3])
        elif i < 3:
            piece = b""
        else:
            piece = processor.id_to_piece(i).replace("\u2581", " ").encode()
        text += piece[1:] if after_bos and piece.startswith(b" ") else piece
        after_bos = i == 1
    return text.decode("utf-8", "replace")


@settings(deadline=None, derandomize=True, max_examples=300)
@given(ids=token_ids(460))
def test_the_segments_are_the_text(both: list[Tokenizer], model_file: Path, ids: list[int]) -> None:
    expected = expected_text(model_file, ids)
    for tokenizer in both:
        detokenizer, text = tokenizer.detokenizer, ""
        for token in ids:
            detokenizer.add_token(token)
            text += detokenizer.last_segment
            assert detokenizer.text == text
            assert expected.startswith(text)
        detokenizer.finalize()
        assert text + detokenizer.last_segment == detokenizer.text == expected
        assert tokenizer.decode(ids) == expected


def test_a_character_comes_out_with_its_last_byte(both: list[Tokenizer]) -> None:
    ids = [3 + byte for byte in "你x🜂".encode()]
    for tokenizer in both:
        detokenizer, segments = tokenizer.detokenizer, []
        for token in ids:
            detokenizer.add_token(token)
            segments.append(detokenizer.last_segment)
        assert segments == ["", "", "你", "x", "", "", "", "🜂"]


def test_bytes_that_are_no_character(both: list[Tokenizer]) -> None:
    start, letter = 3 + 0xE4, 3 + ord("x")
    for tokenizer in both:
        assert tokenizer.decode([start, letter, start, start]) == "\ufffdx\ufffd\ufffd"
        detokenizer = tokenizer.detokenizer
        detokenizer.add_token(start)
        assert detokenizer.last_segment == ""
        detokenizer.finalize()
        assert detokenizer.last_segment == "\ufffd"


def test_a_continuation_keeps_its_leading_space(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        ids = tokenizer.encode("the king", add_special_tokens=False)
        assert tokenizer.decode(ids) == " the king"
        assert tokenizer.decode([1, *ids]) == "the king"
        assert tokenizer.decode([*ids, 1, *ids]) == " the kingthe king"
        assert tokenizer.decode([2, *ids]) == tokenizer.decode([0, *ids]) == " the king"
        detokenizer = tokenizer.detokenizer
        detokenizer.add_token(ids[0])
        assert detokenizer.last_segment.startswith(" t")


def test_no_space_is_dropped_where_none_is_added(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(add_dummy_prefix=False))
    assert write_tokenizer_files(tmp_path / "tokenizer.model", tmp_path, chat=False) is None
    for file in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(file)
        assert tokenizer.decode(tokenizer.encode(" the king")) == " the king"
        assert tokenizer.decode(tokenizer.encode("the king")) == "the king"


def test_ids_outside_of_the_vocabulary_are_refused(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(
                InputError, match=f"{wrong} is not in .* of {tokenizer.vocab_size}$"
            ):
                tokenizer.decode([1, wrong])


def test_detokenizers_are_independent_and_can_be_reset(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        first, second = tokenizer.detokenizer, tokenizer.detokenizer
        for token in (3 + ord("a"), 1, 3 + 0xE4):
            first.add_token(token)
        assert (first.text, second.text) == ("a", "")
        first.reset()
        first.add_token(tokenizer.encode("the")[1])
        first.finalize()
        assert first.last_segment == first.text == tokenizer.decode(tokenizer.encode("the")[1:2])


def test_a_token_is_looked_at_once(tiny: Path) -> None:
    vocabulary, seen = from_sentencepiece(tiny), []

    def piece(token: int) -> bytes:
        seen.append(token)
        return vocabulary.piece(token)

    detokenizer = StreamingDetokenizer(dataclasses.replace(vocabulary, piece=piece), 1)
    for token in range(3, 103):
        detokenizer.add_token(token)
        assert len(detokenizer.last_segment) <= 2
    assert seen == list(range(3, 103))


# Chat


def test_the_chat_format(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        text = tokenizer.apply_chat_template(MESSAGES[1:3], tokenize=False)
        assert text == (
            "<s><|user|>\n What is </s> and <s>?\n</s>\n"
            "<|assistant|>\nEin König 👑</s>\n<|assistant|>\n"
        )
        assert tokenizer.apply_chat_template(MESSAGES) == tokenizer.encode(
            tokenizer.apply_chat_template(MESSAGES, tokenize=False), add_special_tokens=False
        )


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_prompts_are_those_of_mlx_lm(
    both: list[Tokenizer], mlx_lm_tokenizer: Any, add_generation_prompt: bool
) -> None:
    assert mlx_lm_tokenizer.has_chat_template
    for count in range(1, len(MESSAGES) + 1):
        for tokenize in (True, False):
            expected = mlx_lm_tokenizer.apply_chat_template(
                MESSAGES[:count], tokenize=tokenize, add_generation_prompt=add_generation_prompt
            )
            for tokenizer in both:
                found: Any = tokenizer.apply_chat_template(
                    MESSAGES[:count], add_generation_prompt, tokenize=tokenize
                )
                assert found == expected


def test_where_a_chat_template_is_found(tiny: Path, tmp_path: Path) -> None:
    write_tokenizer_files(tiny, tmp_path, chat=False)
    assert not load_tokenizer(tmp_path).has_chat_template
    configuration = tmp_path / "tokenizer_config.json"
    configuration.write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert load_tokenizer(tmp_path).has_chat_template
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}]
    configuration.write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).has_chat_template
    configuration.unlink()
    assert not load_tokenizer(tmp_path).has_chat_template
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert load_tokenizer(tmp_path).has_chat_template


def foreign(tiny: Path, directory: Path, template: str) -> Tokenizer:
    write_tokenizer_files(tiny, directory, chat=True)
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


def test_another_template_is_rendered_by_jinja(tiny: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}\n[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}\n"
    )
    tokenizer = foreign(tiny, tmp_path, template)
    text = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False)
    assert text == "[system] Be  brief.</s>\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% for %}", "template can't be used"),
        ("{{ messages[9].content.x }}", "template can't be used"),
        ("{{ 1 + 'a' }}", "template can't be used"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails(tiny: Path, tmp_path: Path, template: str, reason: str) -> None:
    tokenizer = foreign(tiny, tmp_path, template)
    with pytest.raises(InputError, match=reason):
        tokenizer.apply_chat_template(MESSAGES)


def test_openelms_own_template_needs_no_jinja(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # it is imported only when needed
    assert foreign(tiny, tmp_path, CHAT_TEMPLATE).apply_chat_template(MESSAGES)[0] == 1


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "message 0 needs a 'content'"),
        ([{"role": "user", "content": None}], "message 0 needs a 'content'"),
        ([MESSAGES[0], {"content": "Hi"}], "message 1 needs a 'role'"),
        (["Hi"], "message 0 is 'Hi', not a dictionary"),
        ([{"role": "tool", "content": "Hi"}], "'tool', not one of user, system, assistant"),
    ],
)
def test_messages_that_cannot_be_used(tiny: Path, messages: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_tokenizer(tiny).apply_chat_template(messages, chat_template=CHAT_TEMPLATE)


# Files


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], bytes]:
    def edit(values: dict[str, Any]) -> bytes:
        change(values)
        return json.dumps(values).encode()

    return edit


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.model", lambda model: b"", "not a SentencePiece model"),
        ("tokenizer.model", lambda model: b"version https://git-lfs", "not a SentencePiece model"),
        ("tokenizer.model", lambda model: model[: len(model) // 2], "not a SentencePiece model"),
        ("tokenizer.model", lambda model: train(bos_id=-1), "no piece '<s>'"),
        ("tokenizer.json", lambda values: b"{", "not a JSON file"),
        ("tokenizer.json", lambda values: b"[]", "a JSON list"),
        ("tokenizer.json", lambda values: b"{}", r"not a tokenizer\.json"),
        (
            "tokenizer.json",
            edited(lambda v: v.update(decoder=BYTE_LEVEL)),
            "decoder ByteLevel is not SentencePiece's",
        ),
        (
            "tokenizer.json",
            edited(lambda v: v.pop("decoder")),
            "decoder none is not SentencePiece's",
        ),
        ("tokenizer_config.json", lambda values: b'{"eos_token": 7}', "needs a content"),
        ("tokenizer_config.json", lambda values: b"{", "not a JSON file"),
    ],
)
def test_files_that_cannot_be_used(
    tiny: Path, tmp_path: Path, name: str, content: Callable[[Any], bytes], reason: str
) -> None:
    write_tokenizer_files(tiny, tmp_path, chat=False)
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tokenizer_config.json").unlink()
    file = tmp_path / name
    old = file.read_bytes() if name == "tokenizer.model" else json.loads(file.read_text())
    file.write_bytes(content(old))
    with pytest.raises(InputError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.model or tokenizer\.json; .*--tokenizer"):
        load_tokenizer(tmp_path)
    for name in ("missing.model", "missing.json"):
        with pytest.raises(InputError, match=f"{name}: No such file"):
            load_tokenizer(tmp_path / name)


def test_a_directory_adds_eos_ids_and_names(tiny: Path, tmp_path: Path) -> None:
    write_tokenizer_files(tiny, tmp_path, chat=False)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(tmp_path).eos_token_ids == {2, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9, -1]}')
    assert load_tokenizer(tmp_path).eos_token_ids == {2, 8, 9}
    names = {"bos_token": {"content": "</s>"}, "eos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token_id) == ("</s>", 2, 1)
    assert load_tokenizer(tmp_path / "tokenizer.model").eos_token_ids == {2}


def test_the_same_model_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tokenizer_files(tiny, tmp_path / name, chat=True)
        written.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert written[0]["tokenizer.model"] == tiny.read_bytes()
    assert "chat_template" in json.loads(written[0]["tokenizer_config.json"])


def test_a_model_with_control_symbols_is_mirrored(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(control_symbols="<sep>", pad_id=3))
    assert write_tokenizer_files(tmp_path / "tokenizer.model", tmp_path, chat=False) is None
    tokenizers = [load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")]
    for tokenizer in tokenizers:
        ids = tokenizer.encode("a<sep>b<pad> c")
        assert 3 in ids and 4 in ids
        assert ids == tokenizers[0].encode("a<sep>b<pad> c")
        assert tokenizer.decode(ids) == "a b  c"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: train(model_type="unigram"), "not of the BPE kind"),
        (lambda: train(model_type="char"), "not of the BPE kind"),
        (lambda: train(normalization_rule_name="nfkc"), "normalises"),
        (lambda: train(remove_extra_whitespaces=True), "normalises"),
        (lambda: train(treat_whitespace_as_suffix=True), "front of a word"),
        (lambda: train(user_defined_symbols="<sep>"), "user-defined"),
        (lambda: with_equal_scores(train(), "he|in"), "equal score"),
    ],
)
def test_a_model_without_an_equal(tmp_path: Path, model: Callable[[], bytes], reason: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model())
    found = write_tokenizer_files(tmp_path / "tokenizer.model", tmp_path, chat=True)
    assert found is not None and reason in found
    assert not (tmp_path / "tokenizer.json").exists()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode("the king")).strip() == "the king"


def test_what_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "x.model"
    with pytest.raises(InputError, match="No such file"):
        write_tokenizer_files(file, tmp_path, chat=False)
    file.write_bytes(b"garbage")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        write_tokenizer_files(file, tmp_path, chat=False)
    file.write_bytes(train(eos_id=-1))
    with pytest.raises(InputError, match="no BOS or no EOS"):
        write_tokenizer_files(file, tmp_path, chat=False)
    assert [f.name for f in tmp_path.iterdir()] == ["x.model"]


def test_nothing_heavy_is_imported(tiny: Path) -> None:
    script = (
        "import sys, mlx_openelm.tokenizer.tokenizer as t\n"
        "heavy = {'sentencepiece', 'tokenizers', 'transformers', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "t.load_tokenizer(sys.argv[1]).encode('a')\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script, str(tiny)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["[]", "['sentencepiece']"]
