"""SentencePiece model files: parsed, and as the `tokenizer.json` that gives the same ids."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import InputError

# Field numbers and values of SentencePiece's `sentencepiece_model.proto`.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MODEL_TYPE, _SPACE_AS_SUFFIX, _BOS_PIECE, _EOS_PIECE = 3, 24, 46, 47
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_BPE = 2

SPACE = "\u2581"
MAX_FILE = 16 << 20
"""Bytes. LLaMA's has half a megabyte, one of 256,000 pieces four."""
MAX_CHARACTERS = 4 << 20
"""Of all pieces together: every one is a place where a piece may have to be cut in two."""
_BYTE_TEXT = re.compile("<0x[0-9A-F]{2}>")


class Piece(NamedTuple):
    """A token of a SentencePiece model; `kind` is 1 normal, 2 unknown, 3 control, 4 user-defined,
    5 unused, 6 byte."""

    text: str
    score: float
    kind: int


class SentencePieceModel(NamedTuple):
    """A SentencePiece model file; `trainer` and `normalizer` by field number."""

    pieces: list[Piece]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]

    @property
    def bos_id(self) -> int:
        """Id of the control piece that begins a text; -1: there is none."""
        return self._control(_BOS_PIECE, b"<s>")

    @property
    def eos_id(self) -> int:
        """Id of the control piece that ends a text; -1: there is none."""
        return self._control(_EOS_PIECE, b"</s>")

    @property
    def unk_id(self) -> int:
        """Id of the piece for what no other piece can express; -1: there is none."""
        return next((i for i, piece in enumerate(self.pieces) if piece.kind == _UNKNOWN), -1)

    @property
    def leading_space(self) -> bool:
        """Whether encoding puts a space in front of the text."""
        return bool(self.normalizer.get(_DUMMY_PREFIX, 1))

    def _control(self, field: int, default: bytes) -> int:
        text = self.trainer.get(field, default)
        ids = (
            i
            for i, piece in enumerate(self.pieces)
            if piece.kind == _CONTROL and piece.text.encode() == text
        )
        return next(ids, -1)


def why_no_tokenizer_json(model: SentencePieceModel) -> str | None:
    """Why no `tokenizer.json` gives the ids that this model gives, or None."""
    if model.trainer.get(_MODEL_TYPE) != _BPE:
        return "the SentencePiece model is not of the BPE kind"
    if model.normalizer.get(_CHARSMAP) or model.normalizer.get(_REMOVE_SPACES, 1):
        return "the SentencePiece model normalises its text itself"
    if model.trainer.get(_SPACE_AS_SUFFIX, 0) or not model.normalizer.get(_ESCAPE_SPACES, 1):
        return "the SentencePiece model does not mark a space at the front of a word"
    if any(piece.kind in (_USER_DEFINED, _UNUSED) for piece in model.pieces):
        return "the SentencePiece model has user-defined or unused pieces"
    normal = {piece.text for piece in model.pieces if piece.kind == _NORMAL}
    if not normal.issuperset("".join(normal)):
        return "the SentencePiece model has no piece for a character of another piece"
    equals: dict[float, list[str]] = {}
    for piece in model.pieces:
        if piece.kind == _NORMAL and len(piece.text) > 1:
            equals.setdefault(piece.score, []).append(piece.text)
    if any(len(texts) > 1 and len(set("".join(texts))) > 1 for texts in equals.values()):
        return "the SentencePiece model has different pieces of equal score"
    return None


def to_tokenizer_json(
    model: SentencePieceModel, add_bos: bool = True, add_eos: bool = False
) -> dict[str, Any]:
    """A BPE tokenizer of Hugging Face's tokenizers, in its JSON form.

    `add_bos` and `add_eos` say what encoding puts around a text. The model has BOS, EOS and
    unknown pieces, and `why_no_tokenizer_json` gives None for it.
    """
    prepend = [{"type": "Prepend", "prepend": SPACE}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    leading_space = model.leading_space
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, piece in enumerate(model.pieces)
            if piece.kind in (_UNKNOWN, _CONTROL)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                *(prepend if leading_space else []),
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _post_processor(model, add_bos, add_eos),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *(strip if leading_space else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == _BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(model.pieces)},
            "merges": _merges(model.pieces),
        },
    }


def _post_processor(model: SentencePieceModel, add_bos: bool, add_eos: bool) -> dict[str, Any]:
    ids = {"bos": model.bos_id if add_bos else -1, "eos": model.eos_id if add_eos else -1}
    tokens = {name: model.pieces[i].text for name, i in ids.items() if i >= 0}
    bos, eos = (
        [{"SpecialToken": {"id": tokens[name], "type_id": 0}}] if name in tokens else []
        for name in ids
    )
    a, b = ([*bos, {"Sequence": {"id": name, "type_id": 0}}, *eos] for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": a,
        "pair": [*a, *b],
        "special_tokens": {
            token: {"id": token, "ids": [ids[name]], "tokens": [token]}
            for name, token in tokens.items()
        },
    }


def _merges(pieces: list[Piece]) -> list[str]:
    """Every pair of pieces that makes a third, the one of the highest score first.

    SentencePiece stores no merges: it joins the neighbours that make the piece of the highest
    score, and of equal ones the leftmost. LLaMA's runs of spaces all have the same score, so a
    long run grows from the left: the same as when the longest has precedence.
    """
    normal = {p.text: p.score for p in pieces if p.kind == _NORMAL}
    longer = (text for text in normal if len(text) > 1)
    by_score = sorted(longer, key=lambda text: (-normal[text], -len(text)))
    return [
        f"{text[:cut]} {text[cut:]}"
        for text in by_score
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]


def parse_sentencepiece(data: bytes, where: str = "the SentencePiece model") -> SentencePieceModel:
    """The fields of a SentencePiece model file that its own library doesn't give.

    Raises:
        InputError: starting with `where`, when the file is damaged, or is one that different
            readers could read differently.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(data):
            if field == _PIECES:
                pieces.append(_piece(value))
            elif field == _TRAINER:
                trainer.update(_fields(_bytes(value)))
            elif field == _NORMALIZER:
                normalizer.update(_fields(_bytes(value)))
        characters = sum(len(piece.text) for piece in pieces)
        if characters > MAX_CHARACTERS:
            raise ValueError(f"its pieces have {characters} characters")
    except ValueError as error:
        raise InputError(
            f"{where}: not a SentencePiece model, or a damaged one ({error})"
        ) from None
    return SentencePieceModel(pieces, trainer, normalizer)


def _piece(value: object) -> Piece:
    """A piece's message. Raises ValueError."""
    fields = dict(_fields(_bytes(value)))
    text = _bytes(fields.get(_TEXT, b"")).decode()
    score = _bytes(fields.get(_SCORE, bytes(4)))
    kind = fields.get(_KIND, _NORMAL)
    if not text or len(score) != 4 or kind not in range(_NORMAL, _BYTE + 1):
        raise ValueError("a piece is malformed")
    number = struct.unpack("<f", score)[0]
    if not math.isfinite(number):
        raise ValueError(f"the score of piece {text[:20]!r} is {number}")
    if kind == _BYTE and not _BYTE_TEXT.fullmatch(text):
        raise ValueError(f"the byte piece {text[:20]!r} is none")
    return Piece(text, number, kind)


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is of another type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values (int for a varint, else bytes) of a protocol buffer message.

    Source: "Encoding", protobuf.dev. Groups, which it deprecates, are refused.

    Raises:
        ValueError: when the message is malformed.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                raise ValueError("it ends in the middle of a number")
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at += 1
            if byte < 0x80:
                return value
        raise ValueError("a number has more than 64 bits")

    while at < len(data):
        key = varint()
        field, wire = key >> 3, key & 7
        if wire == 0:
            yield field, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"a field has the wire type {wire}")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if size > len(data) - at:
            raise ValueError("it is truncated")
        yield field, data[at : at + size]
        at += size
