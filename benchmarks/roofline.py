"""The limit of a workload: bytes that have to move and operations that have to be done.

S. Williams, A. Waterman, D. Patterson, "Roofline", 2009: nothing is faster than the slower of the
two. Bytes are those of the weights as stored, though a CPU computes with them in float32, and of
keys and values in the dtype that is computed in.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_openelm import device
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.dtypes import dtype_name
from mlx_openelm.model.shapes import tensor_shapes

from .results import Calibration, Graph, Limit, Model, Work

_BUILDS = 20  # decode steps that are built to time the building


def limit(config: OpenELMConfig, model: Model, work: Work, found: Calibration) -> Limit | None:
    """Of one workload; None where a token isn't a step (drafted tokens) or there is no token."""
    if work.kind not in ("prefill", "decode", "long", "batch"):
        return None
    dtype = compute_dtype(model.stored)
    position = position_bytes(config, dtype)
    head = config.vocab_size * config.model_dim
    embeddings = 0 if config.share_input_output_layers else head
    matrices = matrix_parameters(config) - embeddings  # an embedding is looked up, not read
    weights = model.bytes * matrices / (matrices + embeddings)
    if work.kind == "prefill":
        length = work.prompt_tokens
        moved = weights / (length * work.batch) + position
        operations = 2 * (matrices - head) + 2 * head / length + attention(config, length / 2)
    else:
        context = work.prompt_tokens + work.gen_tokens / 2
        moved = weights / work.batch + position * context
        operations = 2 * matrices + attention(config, context)
    seconds = max(moved / found.bandwidth, operations / rate(model.stored, dtype, found))
    return Limit(moved, operations, 1 / seconds)


def median(calibrations: Sequence[Calibration]) -> Calibration:
    """Figure by figure, of those calibrations that have it."""
    names = {name for one in calibrations for name in one.matmul}
    return Calibration(
        statistics.median(one.bandwidth for one in calibrations),
        {
            name: statistics.median(c.matmul[name] for c in calibrations if name in c.matmul)
            for name in sorted(names)
        },
    )


def compute_dtype(stored: str) -> mx.Dtype:
    """What this project computes in; quantized weights of the benchmarks have float16 scales."""
    plain = getattr(mx, stored) if stored in ("float32", "float16", "bfloat16") else mx.float16
    return device.compute_dtype(plain)


def rate(stored: str, dtype: mx.Dtype, found: Calibration) -> float:
    """Operations a second; quantized weights may be dequantized first, where that is faster."""
    name = dtype_name(dtype)
    plain = found.matmul[name]
    return plain if stored == name else max(plain, found.matmul.get("4bit", plain))


def matrix_parameters(config: OpenELMConfig) -> int:
    """Entries of all matrices."""
    return sum(s[0] * s[1] for s in tensor_shapes(config).values() if len(s) == 2)


def position_bytes(config: OpenELMConfig, dtype: mx.Dtype) -> int:
    """Bytes of the keys and values of one position."""
    return 2 * sum(config.num_kv_heads) * config.head_dim * dtype.size


def attention(config: OpenELMConfig, context: float) -> float:
    """Operations of one token's attention: a product with every key and every value."""
    return 4 * sum(config.num_query_heads) * config.head_dim * context


def graph(step: Callable[[], list[mx.array]]) -> Graph:
    """What one decode step costs beside arithmetic: its primitives, and the time to build it.

    `step` returns the unevaluated results of the next decode step.
    """
    mx.eval(step())
    primitives = count_primitives(step())
    times = []
    for _ in range(_BUILDS):
        start = time.perf_counter()
        built = step()
        times.append(time.perf_counter() - start)
        mx.eval(built)
    return Graph(primitives, statistics.median(times))


def count_primitives(arrays: Sequence[mx.array]) -> int:
    """Nodes of the graph that would be computed: the boxes that `mx.export_to_dot` draws."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.dot"
        mx.export_to_dot(str(file), *arrays)
        return file.read_text().count("shape=rectangle")
