"""Errors that the commands report in one line."""


class OpenELMError(Exception):
    """Something failed. The message says what, where, and what to do; exit status 1."""

    exit_code = 1


class InputError(OpenELMError, ValueError):
    """What was given can't be used: a file, a value, an option; exit status 2."""

    exit_code = 2
