"""llama.cpp, on the GGUF that the converter exports: through `xllamacpp`, else a `llama-bench`.

Its key/value cache is float32 and flash attention off, so that in float32 its tokens are ours; its
own clock is read. `llama-bench` tells no tokens, only times, and loads the model for each trial.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import urllib.request
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.convert.export import export
from mlx_openelm.errors import OpenELMError

from ..models import cache_directory
from . import PEERS, Measured, Runtime, Workload

_PROGRAM = PEERS["llama.cpp"].program


def version() -> str:
    """Of the package that it is in."""
    if find_spec("xllamacpp"):
        return f"xllamacpp {metadata.version('xllamacpp')}"
    done = subprocess.run([_PROGRAM, "--version"], capture_output=True, text=True)
    return ((done.stdout + done.stderr).strip().splitlines() or [_PROGRAM])[0]


def load(directory: Path) -> Runtime:
    """One sequence at a time."""
    file = gguf_of(directory)
    if not find_spec("xllamacpp"):
        return Runtime(partial(_bench, file), note="llama-bench, which tells no tokens")
    return _server(file, OpenELMConfig.from_json(directory / "config.json").max_context_length)


def gguf_of(directory: Path) -> Path:
    """The model as a GGUF, made if it isn't in the cache."""
    files = [f for f in sorted(directory.iterdir()) if f.suffix in (".safetensors", ".json")]
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((str(directory.resolve()), state)).encode()).hexdigest()[:16]
    out = cache_directory() / f"{directory.name}-{key}.gguf"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        export(directory, out, "gguf")
    return out


def _server(file: Path, context: int) -> Runtime:
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = context + 1, 1, False
    params.cpuparams.n_threads = _cores()
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(params)

    def run(workload: Workload) -> Measured:
        [prompt] = workload.prompts
        asked = {
            "prompt": prompt,
            "n_predict": workload.gen_tokens,
            "temperature": 0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
        }
        answer = _ask(server.listening_address, asked)
        timings = answer["timings"]  # milliseconds; predicted_ms begins with the first token
        done, wanted = (
            (timings["prompt_n"], len(answer["tokens"])),
            (len(prompt), workload.gen_tokens),
        )
        if done != wanted:
            raise OpenELMError(f"llama.cpp: {done} tokens of prompt and answer, not {wanted}")
        prefill, decode = timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000
        return Measured(prefill, decode, [answer["tokens"]])

    return Runtime(run)


def _ask(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    body, headers = json.dumps(asked).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/completion", body, headers)
    with urllib.request.urlopen(request) as answer:
        result: dict[str, Any] = json.load(answer)
        return result


def _bench(file: Path, workload: Workload) -> Measured:
    [prompt] = workload.prompts
    prefill = _bench_seconds(file, "-p", len(prompt), "-n", 0)
    count = workload.gen_tokens - 1
    decode = _bench_seconds(file, "-p", 0, "-n", count, "-d", len(prompt)) if count else 0.0
    return Measured(prefill, decode, [[]])


def _bench_seconds(file: Path, *options: str | int) -> float:
    command: Sequence[str | int] = (
        *(_PROGRAM, "-m", str(file), "-r", 1, "-o", "json", "-t", _cores()),
        *("-ctk", "f32", "-ctv", "f32", "-fa", 0, *options),
    )
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    try:
        return float(json.loads(done.stdout)[0]["avg_ns"]) / 1e9
    except (ValueError, LookupError, TypeError):
        said = (done.stderr.strip().splitlines() or ["no result"])[-1]
        raise OpenELMError(f"{_PROGRAM}: {said}") from None


def _cores() -> int:
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available else (os.cpu_count() or 1)
