"""The tokenizer files of a model directory, for us and for the rest of the MLX world."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError
from .tokenizer import CHAT_TEMPLATE
from .vocabulary import SPACE, read_sentencepiece

# Field numbers and values of SentencePiece's `sentencepiece_model.proto`.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MODEL_TYPE, _SPACE_AS_SUFFIX = 3, 24
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_BPE = 2


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


def write_tokenizer_files(model_file: Path, directory: Path, chat: bool) -> str | None:
    """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` into `directory`.

    `model_file` is a SentencePiece model. With `chat`, the configuration holds the chat template
    of the OpenELM Instruct models. The same model always gives the same bytes. Through these
    files transformers, and so mlx-lm, finds the ids that `Tokenizer` finds.

    Returns None, or the reason why there is no `tokenizer.json`: some SentencePiece models have
    no equal there. `load_tokenizer` can use such a directory; mlx-lm would find other ids.

    Raises:
        InputError: when `model_file` can't be read, is no SentencePiece model, or has no BOS or
            EOS token.
    """
    processor = read_sentencepiece(model_file)
    bos, eos, unknown = processor.bos_id(), processor.eos_id(), processor.unk_id()
    if bos < 0 or eos < 0:
        raise InputError(f"{model_file}: has no BOS or no EOS token; OpenELM needs both")
    data = model_file.read_bytes()
    (directory / "tokenizer.model").write_bytes(data)
    model = parse_sentencepiece(data)
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": model.pieces[bos].text,
        "eos_token": model.pieces[eos].text,
        "unk_token": model.pieces[unknown].text,
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        configuration["chat_template"] = CHAT_TEMPLATE
    _write_json(directory / "tokenizer_config.json", configuration)
    reason = _no_equal(model)
    if reason is None:
        _write_json(directory / "tokenizer.json", _tokenizer_json(model, bos, unknown))
    return reason


def _no_equal(model: SentencePieceModel) -> str | None:
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


def _tokenizer_json(model: SentencePieceModel, bos: int, unknown: int) -> dict[str, Any]:
    """A BPE tokenizer of Hugging Face's tokenizers: its parts, in their JSON form."""
    bos_token = model.pieces[bos].text
    bos_step = {"SpecialToken": {"id": bos_token, "type_id": 0}}
    steps_a, steps_b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    prepend = [{"type": "Prepend", "prepend": SPACE}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    leading_space = bool(model.normalizer.get(_DUMMY_PREFIX, 1))
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
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_step, steps_a],
            "pair": [bos_step, steps_a, bos_step, steps_b],
            "special_tokens": {bos_token: {"id": bos_token, "ids": [bos], "tokens": [bos_token]}},
        },
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
            "unk_token": model.pieces[unknown].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == _BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(model.pieces)},
            "merges": _merges(model.pieces),
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


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """The fields of a SentencePiece model file that its own library doesn't give."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == _PIECES:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(_SCORE, bytes(4)))[0]
            pieces.append(Piece(piece[_TEXT].decode(), score, piece.get(_KIND, _NORMAL)))
        elif field == _TRAINER:
            trainer.update(_fields(value))
        elif field == _NORMALIZER:
            normalizer.update(_fields(value))
    return SentencePieceModel(pieces, trainer, normalizer)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values (int for a varint, else bytes) of a protocol buffer message.

    Source: "Encoding", protobuf.dev. The message is one that SentencePiece has parsed before.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        field, wire = key >> 3, key & 7
        if wire == 0:
            yield field, varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            yield field, data[at : at + size]
            at += size


def _write_json(file: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    file.write_text(text + "\n", encoding="utf-8")
