"""What a tokenizer file holds: SentencePiece's `tokenizer.model`, or `tokenizer.json`."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import parse_json, read_bytes
from .added_tokens import AddedToken, Declared, special, to_add
from .sentencepiece_model import (
    MAX_FILE,
    SPACE,
    parse_sentencepiece,
    to_tokenizer_json,
    why_no_tokenizer_json,
)
from .tokenizer_json import TokenizerJson, as_llama, build, check, check_id, guarded

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer file provides: the same for both formats.

    Attributes:
        size: one more than the highest id.
        leading_space: whether encoding puts a space in front of the text.
        encode: text to ids, without what goes around a text; the spelling of a control token or
            an added token becomes that token.
        prefix: ids in front of a text.
        suffix: ids after a text.
        piece: what a token adds to the text, in UTF-8: part of a character for a byte-fallback
            piece, nothing for a special token.
        token: a token's spelling; None: there is no such id.
        id_of: the token of a spelling.
        special: ids of the special tokens.
        defaults: special tokens by name, where nothing else names them.
    """

    size: int
    leading_space: bool
    encode: Callable[[str], list[int]]
    prefix: list[int]
    suffix: list[int]
    piece: Callable[[int], bytes]
    token: Callable[[int], str | None]
    id_of: Callable[[str], int | None]
    special: frozenset[int]
    defaults: Mapping[str, str]


def read_sentencepiece(file: Path) -> tuple[bytes, SentencePieceProcessor]:
    """A SentencePiece model file, and its contents as its own library sees them.

    Raises:
        InputError: when the file can't be read or is no such model.
    """
    from sentencepiece import SentencePieceProcessor

    data = read_bytes(file, MAX_FILE)
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
        ids = list(range(processor.get_piece_size()))
        pieces = processor.id_to_piece(ids)
        byte = processor.is_byte(ids)
    except (RuntimeError, UnicodeDecodeError):
        raise InputError(f"{file}: not a SentencePiece model, or a damaged one") from None
    for text, is_byte in zip(pieces, byte, strict=True):
        if not text or (is_byte and not _BYTE.fullmatch(text)):
            raise InputError(f"{file}: a damaged SentencePiece model (piece {text[:20]!r})")
    return data, processor


def from_sentencepiece(
    file: Path, found: Declared | None = None, settings: Mapping[str, Any] | None = None
) -> Vocabulary:
    """The vocabulary in a SentencePiece model file, and the tokens that are added to it.

    Encoding puts BOS in front of a text, unless `settings`, from `tokenizer_config.json`, say
    otherwise (`add_bos_token`, `add_eos_token`).

    Raises:
        InputError: see `read_sentencepiece`; and when tokens are added to a model that no
            `tokenizer.json` equals.
    """
    data, processor = read_sentencepiece(file)
    settings = settings or {}
    size = processor.get_piece_size()
    ids = list(range(size))
    control, unknown = processor.is_control(ids), processor.is_unknown(ids)
    plain = {processor.id_to_piece(i): i for i in ids if control[i] or unknown[i]}
    bos = settings.get("add_bos_token", True) is not False
    eos = settings.get("add_eos_token", False) is True
    defaults = _named_pieces(processor)

    if found and any(token.content not in plain or _has_flags(token) for token in _asked(found)):
        model = parse_sentencepiece(data, str(file))
        reason = why_no_tokenizer_json(model)
        if reason is not None:
            raise InputError(f"{file}: tokens can't be added to it, because {reason}")
        values = to_tokenizer_json(model, bos, eos)
        values["added_tokens"] = added_to_sentencepiece(values, found, str(file))
        checked = check(values, str(file))
        return _from_checked(checked, [], found, str(file), defaults)

    longest_first = sorted(plain, key=len, reverse=True)
    spelled = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for part in spelled.split(text) if plain else [text]:
            if part in plain:
                found.append(plain[part])
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

    return Vocabulary(
        size=size,
        leading_space=processor.normalize("a").startswith(SPACE),
        encode=encode,
        prefix=[processor.bos_id()] if bos and processor.bos_id() >= 0 else [],
        suffix=[processor.eos_id()] if eos and processor.eos_id() >= 0 else [],
        piece=piece,
        token=lambda token: processor.id_to_piece(token) if 0 <= token < size else None,
        id_of=id_of,
        special=frozenset(plain.values()),
        defaults=defaults,
    )


def added_to_sentencepiece(
    values: Mapping[str, Any], found: Declared, where: str
) -> list[dict[str, Any]]:
    """All `added_tokens` of a `tokenizer.json` that a SentencePiece model was made into.

    Each part of a text between added tokens gets its own leading space, as in transformers: so
    they are matched in the text as it is, not in the normalized one.

    Raises:
        InputError: starting with `where`, when the files give a token another id than it gets.
    """
    own = [_added_token(token) for token in values["added_tokens"]]
    added = [token._replace(normalized=False) for token in to_add(found, own)]
    tokenizer = build(check(values, where), added, where)
    for token_id, token in found.by_id.items():
        check_id(tokenizer, token.content, token_id, where)
    by_content = {token.content: token for token in (*own, *added)}
    return [
        {"id": tokenizer.token_to_id(token.content), **token._asdict()}
        for token in by_content.values()
    ]


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(**{name: entry[name] for name in AddedToken._fields})


def _asked(found: Declared) -> list[AddedToken]:
    named = [special(t) if isinstance(t, str) else t for t in (*found.named.values(), *found.extra)]
    return [*found.by_id.values(), *named]


def _has_flags(token: AddedToken) -> bool:
    return token.lstrip or token.rstrip or token.single_word


def from_tokenizer_json(
    file: Path, found: Declared | None = None, settings: Mapping[str, Any] | None = None
) -> Vocabulary:
    """The vocabulary in a `tokenizer.json`, and the tokens that are added to it.

    The ids are those of transformers' `AutoTokenizer` for the directory: where `settings`, from
    `tokenizer_config.json`, name LLaMA's class, that isn't all that the file says (`as_llama`).

    Raises:
        InputError: when the file can't be read or is not of SentencePiece's kind.
    """
    where = str(file)
    settings = settings or {}
    checked = check(parse_json(read_bytes(file), where), where)
    defaults: dict[str, str] = {}
    if is_llama_class(settings):
        checked = as_llama(checked, settings)
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = found or Declared({}, [], {})
    found = found._replace(named={**defaults, **found.named})
    own = [_added_token(token) for token in checked.values["added_tokens"]]
    if "added_tokens_decoder" not in settings:  # the file's own come before older files' tokens
        ids = {token["id"] for token in checked.values["added_tokens"]}
        found = found._replace(by_id={i: t for i, t in found.by_id.items() if i not in ids})
    encode_special = settings.get("split_special_tokens") is True
    return _from_checked(checked, to_add(found, own), found, where, defaults, encode_special)


def is_llama_class(settings: Mapping[str, Any]) -> bool:
    """Whether `tokenizer_config.json` names the class that has its own idea of the file."""
    return settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")


def _from_checked(
    checked: TokenizerJson,
    added: list[AddedToken],
    found: Declared,
    where: str,
    defaults: Mapping[str, str],
    encode_special: bool = False,
) -> Vocabulary:
    tokenizer = build(checked, added, where)
    for token_id, token in found.by_id.items():
        check_id(tokenizer, token.content, token_id, where)
    tokenizer.encode_special_tokens = encode_special
    decoder = tokenizer.get_added_tokens_decoder()
    pieces = checked.values["model"]["vocab"]
    vocab: dict[str, int] = (
        {**pieces} if isinstance(pieces, dict) else {text: i for i, (text, _) in enumerate(pieces)}
    )
    vocab |= {flags.content: token for token, flags in decoder.items()}
    silent = {token for token, flags in decoder.items() if flags.special}
    if checked.unk_token is not None:
        silent.add(vocab[checked.unk_token])
    spellings = {token: text for text, token in vocab.items()}

    @functools.cache
    def piece(token: int) -> bytes:
        text = spellings.get(token)
        if text is None or token in silent:
            return b""
        is_byte = checked.byte_fallback and _BYTE.fullmatch(text) is not None
        return _piece_bytes(text, is_byte)

    def encode(text: str) -> list[int]:
        def call() -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        return guarded(call, where)

    size = max(vocab.values(), default=-1) + 1
    beyond = [i for i in (*checked.prefix, *checked.suffix) if i >= size]
    if beyond:
        raise InputError(f"{where}: post_processor has the id {beyond[0]}, of {size}")
    return Vocabulary(
        size=size,
        leading_space=checked.leading_space,
        encode=encode,
        prefix=checked.prefix,
        suffix=checked.suffix,
        piece=piece,
        token=spellings.get,
        id_of=vocab.get,
        special=frozenset(silent),
        defaults=defaults,
    )


def _named_pieces(processor: SentencePieceProcessor) -> dict[str, str]:
    ids: Iterable[tuple[str, int]] = (
        ("bos_token", processor.bos_id()),
        ("eos_token", processor.eos_id()),
        ("unk_token", processor.unk_id()),
    )
    return {name: processor.id_to_piece(i) for name, i in ids if i >= 0}


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    if is_byte:
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode("utf-8", "replace")
