"""Values in an adapter's settings, checked."""

from __future__ import annotations

import math

from ..errors import InputError
from ..files import shown

CONFIG = "adapter_config.json"


def text(value: object) -> str | None:
    """A text that isn't empty; None for anything else."""
    return value if isinstance(value, str) and value else None


def number(value: object, where: str) -> float:
    """A finite number.

    Raises:
        InputError: starting with `where`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where} is {shown(value)}, not a number")
    return float(value)
