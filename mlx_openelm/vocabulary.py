"""What a tokenizer file holds: SentencePiece's `tokenizer.model`, or `tokenizer.json`."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .files import read_json

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer file provides: the same for both formats."""

    size: int
    bos_token: str
    eos_token: str
    leading_space: bool
    """Whether encoding puts a space in front of the text."""
    encode: Callable[[str], list[int]]
    """Text to ids, without BOS; the spelling of a control token becomes that token."""
    piece: Callable[[int], bytes]
    """What a token adds to the text, in UTF-8: part of a character for a byte-fallback piece,
    nothing for a control token."""
    id_of: Callable[[str], int | None]


def read_sentencepiece(file: Path) -> SentencePieceProcessor:
    """A SentencePiece model file, as its own library sees it.

    Raises:
        InputError: when the file can't be read or is no such model.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except RuntimeError:
        raise InputError(f"{file}: not a SentencePiece model, or a damaged one") from None
    return processor


def from_sentencepiece(file: Path) -> Vocabulary:
    """The vocabulary in a SentencePiece model file.

    Raises:
        InputError: see `read_sentencepiece`.
    """
    processor = read_sentencepiece(file)
    size = processor.get_piece_size()
    ids = list(range(size))
    control, unknown = processor.is_control(ids), processor.is_unknown(ids)
    special = {processor.id_to_piece(i): i for i in ids if control[i] or unknown[i]}
    longest_first = sorted(special, key=len, reverse=True)
    spelled = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for part in spelled.split(text):
            if part in special:
                found.append(special[part])
            elif part:
                found += processor.encode(unicodedata.normalize("NFC", part))
        return found

    @functools.cache
    def piece(token: int) -> bytes:
        if control[token] or unknown[token]:
            return b""
        return _piece_bytes(processor.id_to_piece(token), processor.is_byte(token))

    def id_of(token: str) -> int | None:
        found = processor.piece_to_id(token)
        return found if processor.id_to_piece(found) == token else None

    def token_at(token_id: int, default: str) -> str:
        return processor.id_to_piece(token_id) if token_id >= 0 else default

    return Vocabulary(
        size=size,
        bos_token=token_at(processor.bos_id(), "<s>"),
        eos_token=token_at(processor.eos_id(), "</s>"),
        leading_space=processor.normalize("a").startswith(SPACE),
        encode=encode,
        piece=piece,
        id_of=id_of,
    )


# The steps of a `tokenizer.json` decoder that amount to: pieces in UTF-8 with U+2581 for a
# space, bytes as `<0x0A>`, a leading space dropped.
_SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def from_tokenizer_json(file: Path) -> Vocabulary:
    """The vocabulary in a `tokenizer.json`, whose normalizer and merges are taken as they stand.

    Raises:
        InputError: when the file can't be read or is not of SentencePiece's kind.
    """
    import tokenizers

    values = read_json(file)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise InputError(f"{file}: not a tokenizer.json that can be used ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    decoder = values.get("decoder") or {"type": "none"}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if not steps.keys() <= _SENTENCEPIECE_STEPS:
        kinds = ", ".join(steps.keys() - _SENTENCEPIECE_STEPS)
        raise InputError(f"{file}: decoder {kinds} is not SentencePiece's; OpenELM's tokenizer is")
    stripped = steps.get("Strip", {}).get("start", 0) > 0
    metaspace = steps.get("Metaspace", {"prepend_scheme": "never"})

    vocab = tokenizer.get_vocab(with_added_tokens=True)
    model, added = values["model"], values.get("added_tokens") or []
    silent = {token["content"] for token in added if token["special"]} | {model.get("unk_token")}
    fallback = bool(model.get("byte_fallback"))
    byte = re.compile("<0x[0-9A-F]{2}>")
    pieces = {
        token: _piece_bytes(text, fallback and byte.fullmatch(text) is not None)
        for text, token in vocab.items()
        if text not in silent
    }

    return Vocabulary(
        size=max(vocab.values(), default=-1) + 1,
        bos_token="<s>",
        eos_token="</s>",
        leading_space=stripped or metaspace.get("prepend_scheme", "always") != "never",
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        piece=lambda token: pieces.get(token, b""),
        id_of=tokenizer.token_to_id,
    )


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()
