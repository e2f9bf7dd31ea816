"""What all command lines share: errors in one line, exit codes, Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import InputError, OpenELMError
from .files import user_path

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run(command: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace) -> int:
    """Run a command and return its exit status.

    An `OpenELMError` is told in one line: status 2 for bad input, 1 for a failure. So is an error
    that nobody foresaw, with a request to report it; `--debug` shows where it came from.
    """
    try:
        return command(arguments) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OpenELMError as error:
        if arguments.debug:
            raise
        tell(f"error: {error}")
        return error.exit_code
    except Exception as error:
        if arguments.debug:
            raise
        first_line = (str(error).splitlines() or [""])[0]
        tell(f"error: {type(error).__name__}: {first_line} (--debug shows where)")
        return 1


def path(text: str) -> Path:
    """The type of an argument that names a file or directory: see `files.user_path`."""
    try:
        return user_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_debug(parser: argparse._ActionsContainer) -> None:
    """The `--debug` option that `run` looks at."""
    parser.add_argument("--debug", action="store_true", help="on errors, show the traceback")


def tell(message: str) -> None:
    """Say something to the person, beside the output."""
    print(message, file=sys.stderr, flush=True)
