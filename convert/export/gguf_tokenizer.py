"""A SentencePiece model as llama.cpp's tokenizer: one that gives the same ids, or none.

llama.cpp has SentencePiece's BPE as "llama" and its unigram model as "t5". Both put a space in
front of every part of a text between special tokens. Source: `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

from mlx_openelm.errors import InputError
from mlx_openelm.tokenizer.sentencepiece_model import (
    SPACE,
    Piece,
    SentencePieceModel,
    parse_sentencepiece,
)
from mlx_openelm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Field numbers and values of SentencePiece's `sentencepiece_model.proto`
_MODEL_TYPE, _SPACE_AS_SUFFIX = 3, 24
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPLIT_AT = (_UNKNOWN, _CONTROL, _USER_DEFINED)
_UNIGRAM, _BPE = 1, 2

_KINDS = {_BPE: "llama", _UNIGRAM: "t5"}
_LOWEST_SCORE = -1000.0

# Texts of which tokenizers that differ make different ids
TRIED = (
    "",
    "Once upon a time",
    " leading",
    "two  spaces ",
    "a\nb\tc",
    "1234",
    "naïve café 日本 😀",
)
AROUND_A_TOKEN = ("{0}", "a{0}b", "a {0} b", "{0}{0}")
_BYTES = 256


def add_tokenizer(
    writer: GGUFWriter, model: SentencePieceModel, tokenizer: Tokenizer, rows: int
) -> list[str]:
    """Write the tokenizer's metadata; returns notes.

    Args:
        writer: of the GGUF.
        model: the SentencePiece model.
        tokenizer: the same with what its directory adds: BOS, EOS and chat template.
        rows: of the embeddings; those without a token get an unused one.
    """
    normalizer = model.normalizer
    tokens, notes = _fill(model.pieces, rows)
    writer.add_tokenizer_model(_KINDS[_model_type(model)])
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text for piece in tokens])
    writer.add_token_scores([piece.score for piece in tokens])
    writer.add_token_types([piece.kind for piece in tokens])
    writer.add_add_space_prefix(bool(normalizer.get(_DUMMY_PREFIX, 1)))
    writer.add_remove_extra_whitespaces(bool(normalizer.get(_REMOVE_SPACES, 1)))
    if normalizer.get(_CHARSMAP):
        writer.add_precompiled_charsmap(normalizer[_CHARSMAP])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_unk_token_id(next(i for i, p in enumerate(tokens) if p.kind == _UNKNOWN))
    around = tokenizer.encode("")
    writer.add_add_bos_token(tokenizer.bos_token_id in around)
    writer.add_add_eos_token(tokenizer.eos_token_id in around)
    if isinstance(tokenizer.chat_template, dict):
        templates = tokenizer.chat_template.items()
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates])
    elif tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    return notes + _add_ends(writer, tokenizer, rows)


def check_tokenizer(data: bytes, tokenizer: Tokenizer, where: str) -> SentencePieceModel:
    """Refuse a tokenizer of which llama.cpp would make other tokens.

    Args:
        data: of the SentencePiece model file.
        tokenizer: the directory's, which may have other files too.
        where: the directory.

    Returns:
        The SentencePiece model.

    Raises:
        InputError: starting with `where`, saying why.
    """
    model = parse_sentencepiece(data, where)
    reason = _why_not(model)
    model = _with_added(model, tokenizer)
    if reason is None and _overlap({p.text for p in model.pieces if p.kind in _SPLIT_AT}, set()):
        reason = "has added tokens that overlap"
    if reason is None:
        different = _first_difference(data, model, tokenizer)
        reason = different and f"gives other ids than its tokenizer.model for {different!r}"
    if reason is not None:
        raise InputError(f"{where}: its tokenizer {reason}; llama.cpp would see other tokens")
    return model


def _with_added(model: SentencePieceModel, tokenizer: Tokenizer) -> SentencePieceModel:
    """The model with the tokens that the directory adds, and pieces that it makes special."""
    pieces = list(model.pieces)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.convert_ids_to_tokens(token)
        special = tokenizer.convert_ids_to_tokens([token], skip_special_tokens=True) == []
        if token >= len(pieces):
            kind = _CONTROL if special else _USER_DEFINED
            pieces.append(
                Piece(text, 0.0, kind) if text else _unused(token, {piece.text for piece in pieces})
            )
        elif special and pieces[token].kind == _NORMAL:
            pieces[token] = pieces[token]._replace(kind=_CONTROL)
    return model._replace(pieces=pieces)


def _first_difference(data: bytes, model: SentencePieceModel, tokenizer: Tokenizer) -> str | None:
    """The first text of which llama.cpp would make other ids than the tokenizer; None: none."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    own = processor.get_piece_size()
    special = {
        p.text: i
        for i, p in enumerate(model.pieces)
        if p.kind in _SPLIT_AT and (i >= own or p.kind != _USER_DEFINED)
    }
    longest_first = sorted(special, key=len, reverse=True)
    spelled = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(text: str) -> list[int]:
        parts = spelled.split(text)
        ids = [[special[p]] if p in special else processor.encode(p) for p in parts if p]
        return list(chain.from_iterable(ids))

    texts = chain(TRIED, (form.format(token) for token in special for form in AROUND_A_TOKEN))
    return next((text for text in texts if tokenizer.encode(text, False) != encode(text)), None)


def _why_not(model: SentencePieceModel) -> str | None:
    texts = {
        kind: {piece.text for piece in model.pieces if piece.kind == kind}
        for kind in range(_NORMAL, _BYTE + 1)
    }
    prefix = model.normalizer.get(_DUMMY_PREFIX, 1)
    one_space = model.normalizer.get(_REMOVE_SPACES, 1)
    if model.trainer.get(_SPACE_AS_SUFFIX, 0) or not model.normalizer.get(_ESCAPE_SPACES, 1):
        return "doesn't mark a space at the front of a word"
    if texts[_UNUSED]:
        return "has unused pieces"
    if texts[_USER_DEFINED] and prefix:
        return "has user-defined pieces and puts a space in front of a text, but not after them"
    if any(SPACE in text for text in texts[_USER_DEFINED]):
        return "has user-defined pieces with spaces"
    if _overlap(texts[_CONTROL] | texts[_UNKNOWN], texts[_USER_DEFINED]):
        return "has special pieces that overlap"
    if _model_type(model) == _BPE:
        if one_space or model.normalizer.get(_CHARSMAP):
            return "normalises its text, which llama.cpp's BPE doesn't"
        if len(texts[_BYTE]) != _BYTES:
            return "has no pieces for bytes, which llama.cpp's BPE needs"
        if any(_may_be_joined(text, texts[_NORMAL]) for text in texts[_BYTE]):
            return "has pieces that spell the name of a byte"
        return None
    if _model_type(model) != _UNIGRAM:
        return "is neither BPE nor unigram"
    if texts[_BYTE]:
        return "is unigram with pieces for bytes, which llama.cpp doesn't use"
    if bool(one_space) != bool(prefix) or (one_space and not model.normalizer.get(_CHARSMAP)):
        return "treats spaces at the ends of a text otherwise than llama.cpp's unigram"
    return None


def _model_type(model: SentencePieceModel) -> int:
    return int(model.trainer.get(_MODEL_TYPE, _UNIGRAM))


def _overlap(spelled: set[str], user_defined: set[str]) -> bool:
    """Whether it depends on the order of the search which special pieces a text has."""
    everything = spelled | user_defined
    starts = {text[:cut]: text for text in everything for cut in range(1, len(text))}
    overlaps = (
        starts.get(text[cut:], text) != text for text in everything for cut in range(1, len(text))
    )
    return any(overlaps) or any(a in b for a in spelled for b in user_defined)


def _may_be_joined(text: str, normal: set[str]) -> bool:
    """Whether llama.cpp's BPE could make this token from two others."""
    halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
    return any(all(len(half) == 1 or half in normal for half in pair) for pair in halves)


def _fill(pieces: list[Piece], rows: int) -> tuple[list[Piece], list[str]]:
    """A token for every row: unused ones, that no text has, for those without a piece."""
    tokens, missing = list(pieces), rows - len(pieces)
    taken = {piece.text for piece in pieces}
    for i in range(missing):
        tokens.append(_unused(i, taken))
        taken.add(tokens[-1].text)
    return tokens, [f"{missing} embedding rows have no token: marked as unused"] if missing else []


def _unused(number: int, taken: set[str]) -> Piece:
    text = f"[UNUSED{number}]"
    while text in taken or _may_be_joined(text, taken):
        text = f"[{text}]"
    return Piece(text, _LOWEST_SCORE, _UNUSED)


def _add_ends(writer: GGUFWriter, tokenizer: Tokenizer, rows: int) -> list[str]:
    """The ids that end a text: llama.cpp has a place for three."""
    first = tokenizer.eos_token_id
    others = sorted(i for i in tokenizer.eos_token_ids if i != first and 0 <= i < rows)
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(adders, (first, *others), strict=False):
        add(token)
    left = others[len(adders) - 1 :]
    return [f"llama.cpp won't end at {left}: a GGUF names three end tokens"] if left else []
