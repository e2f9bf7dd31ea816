"""Limits on the texts, lists and numbers that an untrusted chat template makes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import InputError

MAX_TEXT = 4 << 20
"""Characters of a text, entries of a list, bits of a number."""
FAILED = "the model's chat template can't be used"

# Filters and methods of str whose numbers say how long the result is
_PADDING = (
    *("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "batch", "slice"),
    *("wordwrap", "truncate", "format", "format_map"),
)
_T = TypeVar("_T")


def check_size(size: float) -> None:
    """Refuse a size beyond `MAX_TEXT`.

    Raises:
        InputError: saying so.
    """
    if size > MAX_TEXT:
        raise InputError(f"{FAILED}: it makes a text or list of more than {MAX_TEXT} parts")


def check_result(value: _T) -> _T:
    """The value, if it isn't too large."""
    if isinstance(value, (str, bytes, list, tuple, dict)):
        check_size(len(value))
    return value


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse operators whose result would be too large."""
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                check_size(len(many) * times)
        if isinstance(left, int) and isinstance(right, int):
            check_size(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        check_size(left.bit_length() * right)
    elif operator == "%" and isinstance(left, str):
        _check_format(left)


def check_arguments(
    name: str, text: object, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Refuse a call of a filter or of a method of `text` whose result would be too large."""
    if name in _PADDING:
        times = len(text) if name in ("expandtabs", "indent") and isinstance(text, str) else 1
        for number in (*args, *kwargs.values()):
            if isinstance(number, int):
                check_size(number * times)
        if isinstance(text, str) and name.startswith("format"):
            _check_format(text)
    elif name == "replace" and isinstance(text, str):
        old, new, *_ = [*args, *kwargs.values(), "", ""]
        if isinstance(old, str) and isinstance(new, str):
            check_size(len(text) + text.count(old) * len(new))
    elif name == "translate" and isinstance(text, str) and args and isinstance(args[0], dict):
        check_size(len(text) * max((len(str(new)) for new in args[0].values()), default=0))
    elif name == "join" and isinstance(text, str) and args and isinstance(args[0], (list, tuple)):
        check_size(len(text) * len(args[0]) + sum(len(str(part)) for part in args[0]))


def limited(name: str, function: Callable[..., _T]) -> Callable[..., _T]:
    """A filter that refuses to make anything too large."""
    skipped = 2 if hasattr(function, "jinja_pass_arg") else 1

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> _T:
        text = args[skipped - 1] if len(args) >= skipped else None
        check_arguments(name, text, args[skipped:], kwargs)
        return check_result(function(*args, **kwargs))

    return call


def _check_format(format: str) -> None:
    """Refuse a width that the format takes from elsewhere, or of more than four digits."""
    if re.search(r"%[-+ #0]*\*|\d{5}|\{[^}]*:[^}]*\{", format):
        raise InputError(f"{FAILED}: a format with a width")
