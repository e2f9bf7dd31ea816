"""Tokens that a directory's files add to its tokenizer, as transformers finds them.

Source: transformers 5, `PreTrainedTokenizerBase._from_pretrained` and
`TokenizersBackend.__init__`. The order of the tokens decides their ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import shown

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
MAX_LENGTH = 1024  # characters of a token
MAX_TOKENS = 1 << 17


class AddedToken(NamedTuple):
    """A token that is found in the text before it is tokenized.

    `single_word` matches only between word boundaries, `lstrip` and `rstrip` take the spaces
    beside it, `normalized` matches in the normalized text.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


def special(content: str) -> AddedToken:
    """A special token without further flags."""
    return AddedToken(content, special=True, normalized=False)


class Declared(NamedTuple):
    """What the files say: tokens by name (`bos_token` …), further ones, and those with an id."""

    named: dict[str, AddedToken | str]
    extra: list[AddedToken | str]
    by_id: dict[int, AddedToken]


def read_token(value: object, where: str, **defaults: bool) -> AddedToken:
    """A token as a JSON object.

    Raises:
        InputError: when it isn't one; starts with `where`.
    """
    if not isinstance(value, Mapping) or not _is_content(value.get("content")):
        raise InputError(f"{where}: an added token needs a content, a string")
    flags: dict[str, bool] = {}
    for name in AddedToken._fields[1:]:
        flag = value.get(name, defaults.get(name))
        if flag is not None:
            if not isinstance(flag, bool):
                raise InputError(
                    f"{where}: {name} of token {shown(value['content'])} must be true or false, "
                    f"not {shown(flag)}"
                )
            flags[name] = flag
    flags.setdefault("normalized", not flags.get("special", False))
    return AddedToken(value["content"], **flags)


def declared(
    settings: Mapping[str, Any],
    where: str,
    special_tokens_map: Mapping[str, Any],
    added_tokens: Mapping[str, Any],
) -> Declared:
    """What `tokenizer_config.json` declares, and the older files where it has no
    `added_tokens_decoder`.

    Raises:
        InputError: starting with `where`, when a token is malformed.
    """
    values = dict(settings)
    _rename_extra(values)
    by_id: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in values:
        listed = values["added_tokens_decoder"]
        if not isinstance(listed, Mapping):
            raise InputError(f"{where}: added_tokens_decoder must be an object")
        for key, value in listed.items():
            by_id[_token_id(key, where)] = read_token(value, where)
    else:
        values |= {
            name: {**value, "special": True} if isinstance(value, Mapping) else value
            for name, value in special_tokens_map.items()
        }
        known = {content(values.get(name)) for name in NAMES}
        known |= {content(token) for token in _listed(values.get("extra_special_tokens"))}
        _rename_extra(values)
        for text, token_id in added_tokens.items():
            if not _is_content(text):
                raise InputError(f"{where}: {shown(text)} can't be an added token")
            is_special = text in known
            by_id[_token_id(token_id, where)] = AddedToken(
                text, special=is_special, normalized=not is_special
            )
    if len(by_id) > MAX_TOKENS:
        raise InputError(f"{where}: has {len(by_id)} added tokens; {MAX_TOKENS} are the limit")

    by_content = {token.content: token for token in by_id.values()}
    named: dict[str, AddedToken | str] = {}
    listed = values.get("extra_special_tokens")
    more = listed if isinstance(listed, Mapping) else {}
    own = [name for name in values if name.endswith("_token") and name not in NAMES]
    for name, value in [
        *((name, values.get(name)) for name in NAMES),
        *((name, values[name]) for name in own if isinstance(values[name], str)),
        *more.items(),
    ]:
        token = _token(value, f"{where}: {name}")
        if token is not None:
            text = token if isinstance(token, str) else token.content
            named[name] = by_content.get(text, token) if name in NAMES else token
    extra = [_token(value, where) for value in _listed(listed)]
    return Declared(named, [token for token in extra if token is not None], by_id)


def to_add(found: Declared, own: list[AddedToken]) -> list[AddedToken]:
    """The tokens that a tokenizer with added tokens of its `own` still lacks, in their order."""
    missing = [token for _, token in sorted(found.by_id.items()) if token not in own]
    known = {token.content for token in [*own, *missing]}
    names = {content(token) for token in found.named.values()}
    added = list(missing)
    for token in [*found.named.values(), *found.extra]:
        if content(token) not in known:
            added.append(special(token) if isinstance(token, str) else token)
    return [
        token._replace(special=True) if token.content in names else token
        for token in dict.fromkeys(added)
    ]


def content(token: Any) -> str | None:
    """The text of a token: a string, an object that has it as `content`, or an `AddedToken`."""
    if isinstance(token, AddedToken):
        return token.content
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def _token(value: object, where: str) -> AddedToken | str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        if not _is_content(value):
            raise InputError(f"{where}: {shown(value)} can't be a token")
        return value
    return read_token(value, where)


def _rename_extra(values: dict[str, Any]) -> None:
    if values.get("additional_special_tokens") and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens")


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _token_id(value: object, where: str) -> int:
    """An id, also as a JSON key."""
    if isinstance(value, str) and value.isdecimal() and len(value) <= 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise InputError(f"{where}: {shown(value)} can't be the id of a token")
    return value


def _is_content(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_LENGTH
