"""Standard input, output and error of the command lines."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from typing import Any, TextIO

from .errors import InputError, OpenELMError
from .files import MAX_TEXT, decode_text

MAX_LINE = 1000  # characters of an error


class OutputError(Exception):
    """Standard output can't be written; handled by `command.run` alone."""


class _Output(io.TextIOWrapper):
    """Standard output. What its encoding lacks is written as backslash escapes."""

    def __init__(self, replaced: TextIO) -> None:
        super().__init__(
            os.fdopen(replaced.fileno(), "wb", closefd=False),
            encoding=replaced.encoding,
            errors="backslashreplace",
            line_buffering=replaced.isatty(),
        )

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(error.strerror) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputError(error.strerror) from error


def prepare() -> None:
    """Make printing safe: no character and no closed stream may end the command.

    Raises:
        OpenELMError: when standard output is closed.
    """
    # A file opened later must not get the number of a closed stream.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise OpenELMError("standard output is closed; send it to a file, or to /dev/null")
    original = sys.__stdout__
    if original is not None and sys.stdout is original:
        original.flush()
        sys.stdout = _Output(original)


def finish() -> None:
    """Flush standard output.

    Raises:
        OutputError: when it can't be written.
    """
    if sys.stdout is not None:
        sys.stdout.flush()


def drop_output() -> None:
    """Forget what couldn't be written, and what follows."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def print_json(value: Any) -> None:
    """Print a value as JSON, in ASCII where standard output isn't Unicode."""
    unicode = _codec(sys.stdout.encoding).startswith("utf")
    print(json.dumps(value, ensure_ascii=not unicode))


def read_stdin() -> str:
    """The text on standard input: UTF-8, UTF-16 with a byte order mark, else the locale's encoding.

    Line ends become `\\n`; one at the end is dropped.

    Raises:
        InputError: when it is closed, empty, too large, or not such a text.
    """
    where = "standard input"
    if sys.stdin is None:
        raise InputError(f"{where} is closed")
    try:
        data = sys.stdin.buffer.read(MAX_TEXT + 1)
    except OSError as error:
        raise InputError(f"{where} can't be read ({error.strerror})") from None
    if len(data) > MAX_TEXT:
        raise InputError(f"{where}: more than {MAX_TEXT >> 20} MiB of text")
    try:
        text = decode_text(data, where)
    except InputError:
        encoding = _codec(sys.stdin.encoding)
        if encoding in ("utf-8", "ascii"):
            raise
        text = data.decode(encoding, "replace").replace("\r\n", "\n")
    text = text.removesuffix("\n")
    if not text:
        raise InputError(f"{where} is empty")
    if "\0" in text:
        raise InputError(f"{where}: holds null characters; save the text as UTF-8")
    return text


def printable(text: str) -> str:
    """The text with backslash escapes for line breaks and for what moves a cursor or hides."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shortened(text: str) -> str:
    """Beginning and end of a text of more than `MAX_LINE` characters."""
    if len(text) <= MAX_LINE:
        return text
    return f"{text[: MAX_LINE * 2 // 3]} … {text[-MAX_LINE // 3 :]}"


def _codec(encoding: str) -> str:
    return codecs.lookup(encoding).name
