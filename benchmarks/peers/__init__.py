"""The runtimes that are compared, one file each: the same weights, prompts and number of tokens.

Each module has `INSTALL`, how to get it, `version()`, and `load(directory)`, which returns a
function from a `Workload` to what was measured. Greedy; nothing but the number of tokens ends a
run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

# Name -> the module in here, and the package that it needs
PEERS = {
    "mlx-openelm": ("ours", "mlx"),
    "mlx-lm": ("mlx_lm", "mlx_lm"),
    "torch": ("torch", "torch"),
}


@dataclass(frozen=True)
class Workload:
    """Token ids to continue, all prompts of one length; how many tokens to make of each."""

    prompts: list[list[int]]
    gen_tokens: int
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Seconds until the first token, seconds from there to the last, and the tokens."""

    prefill_seconds: float
    decode_seconds: float
    tokens: list[list[int]]


Run = Callable[[Workload], Measured]


def is_installed(peer: str) -> bool:
    """Whether the package that a peer needs is there."""
    return find_spec(PEERS[peer][1]) is not None
