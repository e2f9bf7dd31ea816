"""mlx-openelm: run Apple's OpenELM language models on Apple silicon, with MLX.

from mlx_openelm import load, generate
model, tokenizer = load("demo")
print(generate(model, tokenizer, "Once upon a time", max_tokens=100))
"""

import time
from typing import TYPE_CHECKING

IMPORTING = time.perf_counter()
"""When the import of this package began, on the clock of `time.perf_counter`."""

from . import start

start.check_python()
start.guard_imports()
start.import_mlx()

from .checkpoint.directory import load
from .config import OpenELMConfig
from .errors import InputError, OpenELMError
from .generate import generate, stream_generate
from .generation.batching import BatchResponse, BatchStats, batch_generate
from .generation.decoding import generate_step
from .generation.sampling import make_logits_processors, make_sampler
from .generation.stream import GenerationResponse
from .model.cache import KVCache
from .model.openelm import OpenELM
from .prompt_cache.prompt_cache import PromptCache

if TYPE_CHECKING:
    from .convert import convert
else:
    from . import convert  # the package, which can be called

__version__ = "0.1.0"

__all__ = [
    "BatchResponse",
    "BatchStats",
    "GenerationResponse",
    "InputError",
    "KVCache",
    "OpenELM",
    "OpenELMConfig",
    "OpenELMError",
    "PromptCache",
    "batch_generate",
    "convert",
    "generate",
    "generate_step",
    "load",
    "make_logits_processors",
    "make_sampler",
    "stream_generate",
]
