"""mlx-openelm: run Apple's OpenELM language models on Apple silicon, with MLX.

from mlx_openelm import load, generate
model, tokenizer = load("demo")
print(generate(model, tokenizer, "Once upon a time", max_tokens=100))
"""

import time

IMPORTING = time.perf_counter()
"""When the import of this package began, on the clock of `time.perf_counter`."""

from . import start

start.check_python()
start.guard_imports()
start.import_mlx()

from .batching import BatchResponse, BatchStats, batch_generate
from .cache import KVCache
from .checkpoint import load
from .config import OpenELMConfig
from .decoding import GenerationResponse
from .errors import InputError, OpenELMError
from .generate import generate, stream_generate
from .model import OpenELM
from .prompt_cache import PromptCache
from .sampling import make_logits_processors, make_sampler

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
    "generate",
    "load",
    "make_logits_processors",
    "make_sampler",
    "stream_generate",
]
