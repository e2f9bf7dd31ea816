"""The runtimes that are compared, one file each: the same weights, prompts and number of tokens.

Each module has `version()` and `load(directory)`, which returns a `Runtime`. Greedy; nothing but
the number of tokens ends a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import mlx.core as mx


class Peer(NamedTuple):
    """A runtime that can be measured.

    `module` is in here, `package` is what it imports or, failing that, `program` what it starts;
    `batches`: whether several prompts can be given to it at once.
    """

    module: str
    package: str
    install: str
    batches: bool = False
    program: str = ""


PEERS = {
    "mlx-openelm": Peer("ours", "mlx", "", batches=True),
    "mlx-lm": Peer("mlx_lm", "mlx_lm", "pip install mlx-lm", batches=True),
    "llama.cpp": Peer("llama_cpp", "xllamacpp", "pip install xllamacpp gguf", False, "llama-bench"),
    "torch": Peer("torch", "torch", "pip install torch"),
}
OURS = "mlx-openelm"


@dataclass(frozen=True)
class Workload:
    """Token ids to continue, all prompts of one length; how many tokens to make of each.

    `options` are further arguments of this project's `generate_step` (a `draft_model` is a
    directory); others don't know them.
    """

    prompts: list[list[int]]
    gen_tokens: int
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Seconds until the first token, seconds from there to the last, and the tokens.

    `times`: seconds from the start to each token of a single sequence, where they are known;
    `statistics`: acceptance and the like.
    """

    prefill_seconds: float
    decode_seconds: float
    tokens: list[list[int]]
    times: list[float] = field(default_factory=list)
    statistics: dict[str, float] = field(default_factory=dict)


Run = Callable[[Workload], Measured]


class Runtime(NamedTuple):
    """A model that is loaded.

    `step` returns the unevaluated results of a next decode step, for runtimes on MLX; `note` says
    what isn't as stored ("weights dequantized to float32").
    """

    run: Run
    step: Callable[[], list[mx.array]] | None = None
    note: str = ""


def is_installed(peer: str) -> bool:
    """Whether what a peer needs is there."""
    needed = PEERS[peer]
    return find_spec(needed.package) is not None or (
        bool(needed.program) and shutil.which(needed.program) is not None
    )
