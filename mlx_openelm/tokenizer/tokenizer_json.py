"""Checks an untrusted `tokenizer.json` before the tokenizers library parses it.

The `tokenizers` package panics, runs for hours or takes all memory on some files that it accepts.
So every part must be on a list here, which leaves out those that could do that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import InputError
from ..files import shown
from .added_tokens import MAX_TOKENS, AddedToken, read_token
from .sentencepiece_model import SPACE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMALIZERS = (
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Strip"),
    *("Prepend", "Replace"),
)
PRE_TOKENIZERS = ("Metaspace", "Split", "Digits", "WhitespaceSplit")
# Those that amount to: pieces in UTF-8 with U+2581 for a space, bytes as `<0x0A>`, a leading
# space dropped.
DECODERS = ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")
STEPS = {
    "normalizer": ("normalizers", NORMALIZERS),
    "pre_tokenizer": ("pretokenizers", PRE_TOKENIZERS),
    "decoder": ("decoders", DECODERS),
}
MAX_STEPS = 32
MAX_ID = 1 << 24
MAX_GROWTH = 64
"""How many times longer the normalizer's replacements may make a text."""
# Any other may take exponential time. These are what transformers writes for SentencePiece's
# remove_extra_whitespaces.
REGEXES = (r"\A +| +\z", r"^ +| +$", " {2,}")

_T = TypeVar("_T")


class TokenizerJson(NamedTuple):
    """A checked `tokenizer.json`.

    `values` is what of it decides the ids, for the `tokenizers` package; `prefix` and `suffix`
    are the ids around a text.
    """

    values: dict[str, Any]
    prefix: list[int]
    suffix: list[int]
    byte_fallback: bool
    unk_token: str | None
    leading_space: bool


def check(values: Mapping[str, Any], where: str) -> TokenizerJson:
    """The parts that decide the ids.

    Raises:
        InputError: starting with `where`, when a part is malformed or of a kind that isn't used
            with SentencePiece's vocabularies.
    """
    try:
        model = _model(values.get("model"))
        decoder = _steps(values, "decoder")
        added = values.get("added_tokens") or []
        if not isinstance(added, list) or len(added) > MAX_TOKENS:
            raise InputError(f"added_tokens must be a list of at most {MAX_TOKENS} tokens")
        normalizers, pre_tokenizers = _steps(values, "normalizer"), _steps(values, "pre_tokenizer")
        _check_growth(normalizers)
        prefix, suffix = _post_processor(values.get("post_processor"))
        kept = {
            "version": "1.0",
            "added_tokens": [_added(token) for token in added],
            "normalizer": _sequence("normalizer", normalizers),
            "pre_tokenizer": _sequence("pre_tokenizer", pre_tokenizers),
            "model": model,
        }
    except InputError as error:
        raise InputError(f"{where}: not a tokenizer.json that can be used ({error})") from None
    return TokenizerJson(
        kept,
        prefix,
        suffix,
        byte_fallback=bool(model.get("byte_fallback")),
        unk_token=model.get("unk_token"),
        leading_space=any(map(_drops_space, decoder)),
    )


def as_llama(checked: TokenizerJson, settings: Mapping[str, Any]) -> TokenizerJson:
    """What transformers 5 makes of the file where `tokenizer_class` is LLaMA's.

    It takes vocabulary, merges, added tokens and what goes around a text, and nothing else.
    Source: transformers 5, `LlamaTokenizer.__init__`.
    """
    model = checked.values["model"]
    if model["type"] != "BPE":
        return checked
    add_space = settings.get("add_prefix_space")
    leading_space = True if add_space is None else bool(add_space)
    scheme = ("always" if settings.get("legacy") else "first") if leading_space else "never"
    fixed = {"type": "BPE", "fuse_unk": True, "byte_fallback": True}
    metaspace = {"replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return checked._replace(
        values={
            **checked.values,
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", **metaspace},
            "model": {**fixed, "vocab": model["vocab"], "merges": model["merges"]},
        },
        byte_fallback=True,
        unk_token=None,
        leading_space=leading_space,
    )


def build(checked: TokenizerJson, more: list[AddedToken], where: str) -> Tokenizer:
    """The tokenizer, with `more` tokens added to those of the file.

    Raises:
        InputError: starting with `where`, when the `tokenizers` package refuses the file, or
            gives an added token another id than the file says.
    """
    import tokenizers

    text = json.dumps(checked.values)
    tokenizer = guarded(lambda: tokenizers.Tokenizer.from_str(text), where)
    for token in checked.values["added_tokens"]:
        check_id(tokenizer, token["content"], token["id"], where)
    if more:
        tokens = [tokenizers.AddedToken(**token._asdict()) for token in more]
        guarded(lambda: tokenizer.add_tokens(tokens), where)
    return tokenizer


def check_id(tokenizer: Tokenizer, content: str, declared: int, where: str) -> None:
    """Refuse an added token whose id in the file isn't the one that it gets.

    Ids are given in turn; transformers takes no notice of the file's.

    Raises:
        InputError: with both ids.
    """
    found = tokenizer.token_to_id(content)
    if found != declared:
        raise InputError(
            f"{where}: says that the added token {shown(content)} has the id {declared}, but it "
            f"gets {found}; ids of added tokens must follow those of the vocabulary without a gap"
        )


def guarded(call: Callable[[], _T], where: str) -> _T:
    """What a function of the `tokenizers` package returns, its errors and panics as ours.

    Raises:
        InputError: starting with `where`.
    """
    try:
        return call()
    except Exception as error:  # the package raises nothing narrower
        reason = str(error)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = f"the tokenizers package failed: {error}"
    lines = reason.splitlines() or ["no reason given"]
    raise InputError(f"{where}: not a tokenizer.json that can be used ({lines[0][:200]})")


def _model(model: object) -> dict[str, Any]:
    if not isinstance(model, Mapping):
        raise InputError("it has no model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    unknown = model.get("unk_token")
    if unknown is not None and not isinstance(unknown, str):
        raise InputError("model.unk_token must be a string")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise InputError(f"model.{name} isn't used with SentencePiece's vocabularies")
    if kind == "Unigram":
        return _unigram(model)
    if kind != "BPE":
        raise InputError(f"the model is of the kind {shown(kind)}; known are BPE and Unigram")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not vocab:
        raise InputError("model.vocab must be an object with ids")
    if not _are_ids(vocab.values()) or len(set(vocab.values())) < len(vocab):
        raise InputError("the ids in model.vocab must be different non-negative integers")
    if unknown is not None and unknown not in vocab:
        raise InputError(f"model.unk_token {shown(unknown)} is not in the vocabulary")
    if not isinstance(merges, list):
        raise InputError("model.merges must be a list of pairs of pieces")
    flags = {name: model.get(name) or False for name in _FLAGS}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InputError(f"model.{name} must be true or false")
    return {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": unknown, **flags}


_FLAGS = ("fuse_unk", "byte_fallback", "ignore_merges")


def _unigram(model: Mapping[str, Any]) -> dict[str, Any]:
    vocab, unknown = model.get("vocab"), model.get("unk_id")
    if not isinstance(vocab, list) or not vocab or not all(map(_is_scored, vocab)):
        raise InputError("model.vocab must be a list of pieces with scores")
    if len({piece for piece, _ in vocab}) < len(vocab):
        raise InputError("a piece is twice in model.vocab")
    if unknown is not None and not (type(unknown) is int and 0 <= unknown < len(vocab)):
        raise InputError("model.unk_id must be the id of a piece")
    fallback = bool(model.get("byte_fallback"))
    text = None if unknown is None else vocab[unknown][0]
    kept = {"type": "Unigram", "vocab": vocab, "unk_id": unknown, "byte_fallback": fallback}
    return {**kept, "unk_token": text}


def _are_ids(values: Collection[Any]) -> bool:
    return set(map(type, values)) <= {int} and all(0 <= i < MAX_ID for i in values)


def _is_scored(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    piece, score = entry
    return (
        isinstance(piece, str)
        and 0 < len(piece) <= 256
        and isinstance(score, (int, float))
        and math.isfinite(score)
        and abs(score) < 1e9
    )


def _added(value: object) -> dict[str, Any]:
    token = read_token(value, "added_tokens")
    assert isinstance(value, Mapping)
    token_id = value.get("id")
    if not _are_ids([token_id]):
        raise InputError(f"the added token {shown(token.content)} has no id that can be used")
    return {"id": token_id, **token._asdict()}


def _steps(values: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences flattened."""
    inner, known = STEPS[part]
    found: list[dict[str, Any]] = []

    def add(step: object, depth: int) -> None:
        if not isinstance(step, dict) or not isinstance(step.get("type"), str):
            raise InputError(f"a {part} must be an object with a type")
        if step["type"] == "Sequence":
            steps = step.get(inner)
            if not isinstance(steps, list) or depth > 3:
                raise InputError(f"a sequence of a {part} must have a list of {inner}")
            for each in steps:
                add(each, depth + 1)
        elif step["type"] not in known:
            raise InputError(
                f"{part} {step['type'][:40]} is not SentencePiece's; OpenELM's tokenizer is"
            )
        elif len(found) == MAX_STEPS:
            raise InputError(f"more than {MAX_STEPS} steps of a {part}")
        else:
            found.append(step)

    if values.get(part) is not None:
        add(values[part], 0)
    elif part == "decoder":
        raise InputError("decoder none is not SentencePiece's; OpenELM's tokenizer is")
    for step in found:
        if "pattern" in step or step["type"] in ("Replace", "Split"):
            _check_pattern(step.get("pattern"), part)
    return found


def _check_pattern(pattern: object, part: str) -> None:
    if isinstance(pattern, dict) and len(pattern) == 1:
        (kind, text), *_ = pattern.items()
        if kind == "String" and isinstance(text, str) and text:
            return
        if kind == "Regex" and text in REGEXES:
            return
        if kind == "Regex":
            raise InputError(
                f"a {part} has the regular expression {shown(text)}, which could take for ever"
            )
    raise InputError(f"a {part} has no usable pattern")


def _check_growth(normalizers: list[dict[str, Any]]) -> None:
    growth = 1.0
    for step in normalizers:
        content = step.get("prepend" if step["type"] == "Prepend" else "content", "")
        if not isinstance(content, str):
            raise InputError("a normalizer's content must be a string")
        if step["type"] == "Replace":
            text = step["pattern"].get("String", " ")
            growth *= max(1.0, len(content.encode(errors="replace")) / len(text.encode()))
        elif len(content) > 64:
            raise InputError("a normalizer prepends more than 64 characters")
    if growth > MAX_GROWTH:
        raise InputError(f"its normalizer makes a text up to {growth:.0f} times longer")


def _sequence(part: str, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", STEPS[part][0]: steps} if steps else None


def _drops_space(decoder: Mapping[str, Any]) -> bool:
    start = decoder.get("start", 0)
    if decoder["type"] == "Strip":
        return isinstance(start, int) and start > 0
    never: bool = decoder.get("prepend_scheme") == "never"
    return decoder["type"] == "Metaspace" and not never


def _post_processor(processor: object) -> tuple[list[int], list[int]]:
    """The ids before and after a text."""
    if processor is None:
        return [], []
    if not isinstance(processor, Mapping):
        raise InputError("post_processor must be an object")
    kind = processor.get("type")
    if kind == "Sequence":
        parts = processor.get("processors")
        if not isinstance(parts, list) or len(parts) > MAX_STEPS:
            raise InputError("a sequence of a post_processor must have a list of processors")
        if any(isinstance(part, Mapping) and part.get("type") == "Sequence" for part in parts):
            raise InputError("a sequence of post_processors in another one")
        around = [_post_processor(part) for part in parts]
        prefix = [i for before, _ in reversed(around) for i in before]
        return prefix, [i for _, after in around for i in after]
    if kind == "ByteLevel":  # changes offsets only
        return [], []
    if kind != "TemplateProcessing":
        raise InputError(f"post_processor {shown(kind)} isn't used with OpenELM's tokenizer")
    return _template(processor)


def _template(processor: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    tokens, items = processor.get("special_tokens"), processor.get("single")
    if not isinstance(items, list) or not isinstance(tokens, Mapping):
        raise InputError("post_processor needs single and special_tokens")
    sides: tuple[list[int], list[int]] = ([], [])
    side = 0
    for item in items:
        if not isinstance(item, Mapping) or len(item) != 1:
            raise InputError("post_processor.single is malformed")
        (what, value), *_ = item.items()
        if what == "Sequence":
            side += 1
            continue
        name = value.get("id") if isinstance(value, Mapping) else None
        entry = tokens.get(name) if isinstance(name, str) else None
        ids = entry.get("ids") if isinstance(entry, Mapping) else None
        if not isinstance(ids, list) or side > 1 or len(sides[side]) + len(ids) > 64:
            raise InputError("post_processor.single is malformed")
        if not _are_ids(ids):
            raise InputError("post_processor has an id that can't be used")
        sides[side].extend(ids)
    if side != 1:
        raise InputError("post_processor.single must have the text once")
    return sides
