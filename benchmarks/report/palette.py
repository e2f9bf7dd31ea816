"""One colour and one shape for each runtime, the same in every chart of every report.

The colours are those of M. Okabe and K. Ito, "Color Universal Design" (2008), which people with
any common colour blindness tell apart; darkened or lightened until they stand out on the ground.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

KNOWN = ("mlx-openelm", "mlx-lm", "llama.cpp", "torch")


class Look(NamedTuple):
    """A colour on a light and on a dark ground, and matplotlib's letter for a shape."""

    light: str
    dark: str
    shape: str


LOOKS = (
    Look("#0063a8", "#5bb8f0", "o"),  # blue
    Look("#b34700", "#f28c42", "s"),  # vermilion
    Look("#00785a", "#2cc79c", "^"),  # bluish green
    Look("#a0447c", "#e08fbd", "D"),  # reddish purple
    Look("#7a6400", "#d9bd3a", "v"),  # yellow
    Look("#3d4f8f", "#9cabea", "P"),  # indigo
    Look("#5c5c5c", "#b4b4b4", "X"),  # grey
)


def slots(series: Iterable[str]) -> dict[str, int]:
    """Name -> which of the `LOOKS`: the known runtimes have theirs, others take turns after."""
    names = dict.fromkeys(series)
    rest = [name for name in names if name not in KNOWN]
    places = {name: i for i, name in enumerate(KNOWN) if name in names}
    spare = len(LOOKS) - len(KNOWN)
    return places | {name: len(KNOWN) + i % spare for i, name in enumerate(rest)}
