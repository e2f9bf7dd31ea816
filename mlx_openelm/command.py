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
from shutil import get_terminal_size
from textwrap import fill
from types import FrameType

from . import start, streams
from .errors import InputError, OpenELMError
from .files import user_path


def run(command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a command with `argv` (default: the process's arguments) and return its exit status.

    An `OpenELMError` is reported in one line: status 2 for bad input, 1 for a failure. So is an
    unexpected error; `--debug` shows its traceback. A closed pipe at standard output is no error.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        status, message = _outcome(command, arguments)
        streams.finish()  # before the message
    except streams.OutputError as error:
        streams.drop_output()
        if isinstance(error.__cause__, BrokenPipeError):
            return 0
        status, message = 1, f"standard output can't be written ({error})"
    if message:
        tell("error: " + streams.shortened(" ".join(message.splitlines())))
    return status


def _outcome(command: Callable[[list[str]], int | None], arguments: list[str]) -> tuple[int, str]:
    """Exit status and message of an error, after running the command."""
    try:
        streams.prepare()
        return command(arguments) or 0, ""
    except streams.OutputError:
        raise
    except SystemExit:  # of argparse
        streams.finish()
        raise
    except KeyboardInterrupt as error:
        return exit_status(error), ""
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _described(error)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP raise `KeyboardInterrupt`; a second one ends at once.

    For what leaves something to save or to remove. Elsewhere a command just ends: an exception in
    the middle of an import, say, can leave a lock that another thread waits for. What is ignored
    stays so (`nohup`), and what a program has set that calls `main`.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, start.end):
                before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Parser(argparse.ArgumentParser):
    """Its help is never wider than the terminal: argparse doesn't wrap usages that it indents."""

    def format_help(self) -> str:
        """The help, wrapped."""
        return wrapped(super().format_help())

    def format_usage(self) -> str:
        """The usage, wrapped."""
        return wrapped(super().format_usage())


def terminal_columns() -> int:
    """The terminal's width, or what COLUMNS says; at least one that text can be wrapped to."""
    return max(get_terminal_size().columns, 16)


def wrapped(text: str) -> str:
    """Lines that are wider than the terminal, wrapped with at least part of their indentation."""
    columns = terminal_columns()
    lines = []
    for line in text.splitlines():
        if len(line) > columns and "\x1b" not in line:  # of Python 3.14's colours
            indent = " " * min(len(line) - len(line.lstrip()), columns // 4)
            line = fill(
                line.strip(), columns, initial_indent=indent, subsequent_indent=indent + "  "
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


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


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, start.end)
    raise KeyboardInterrupt(number)
