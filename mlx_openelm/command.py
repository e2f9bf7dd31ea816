"""What all command lines share: types of arguments, errors in one line, exit statuses, signals."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from . import start, streams
from .errors import InputError, OpenELMError
from .files import user_path


def run(command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a command with `argv` (default: the process's arguments) and return its exit status.

    An `OpenELMError` is reported in one line: status 2 for bad input, 1 for a failure. So is an
    error that nobody foresaw; `--debug` shows its traceback. Ctrl-C, SIGTERM and SIGHUP end with
    128 + the signal's number. A reader of standard output that has had enough is no error.
    """
    arguments = sys.argv[1:] if argv is None else argv
    status, message, leaving = 0, "", None
    try:
        streams.prepare()
        with start.interruptible(), _signals():
            status = command(arguments) or 0
    except SystemExit as error:  # of argparse
        leaving = error
    except KeyboardInterrupt as error:
        status = exit_status(error)
    except Exception as error:
        if "--debug" in arguments:
            raise
        status, message = _described(error)
    failure = streams.finish()
    if isinstance(failure, BrokenPipeError):
        return 0
    if failure is not None:
        status, message = 1, f"standard output can't be written ({failure.strerror})"
    elif leaving is not None:
        raise leaving
    if message:
        tell("error: " + streams.shortened(" ".join(message.splitlines())))
    return status


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """128 + the signal's number, as shells have it: 130 for Ctrl-C."""
    return 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)


def path(text: str) -> Path:
    """The type of an argument that names a file or directory: see `files.user_path`."""
    try:
        return user_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(streams.printable(str(error))) from None


def unicode(text: str) -> str:
    """The type of an argument that is text. Its bytes are UTF-8 in a locale that has less, too."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that the locale's encoding lacks are surrogates
        try:
            return os.fsencode(text).decode()
        except UnicodeError as error:
            raise argparse.ArgumentTypeError(f"not valid UTF-8 ({error})") from None
    return text


def add_debug(parser: argparse._ActionsContainer) -> None:
    """The `--debug` option that `run` looks at."""
    parser.add_argument("--debug", action="store_true", help="on errors, show the traceback")


def tell(message: str) -> None:
    """Print a message to standard error, its control characters escaped."""
    lines = [streams.printable(line) for line in message.split("\n")]
    with suppress(OSError):  # a terminal that was closed
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _described(error: Exception) -> tuple[int, str]:
    """Exit status and message of an error."""
    if isinstance(error, OpenELMError):
        return error.exit_code, str(error)
    if isinstance(error, ModuleNotFoundError):
        return 1, f"a package is missing ({error}); install mlx-openelm with its dependencies"
    first_line = (str(error).splitlines() or [""])[0]
    return 1, f"{type(error).__name__}: {first_line} (--debug shows where)"


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: what is half-written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)
