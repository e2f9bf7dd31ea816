"""The roofline by hand, and the graph's primitives counted."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_openelm import device
from mlx_openelm.backends import cpu
from mlx_openelm.benchmarks import roofline
from mlx_openelm.benchmarks.calibration import bandwidth, matmul, short
from mlx_openelm.benchmarks.models import target
from mlx_openelm.benchmarks.results import Calibration, Limit, Model, Work
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model.quantization import Matrix

# Two layers; by hand: matrices 40·64 + 2·(64·(2+2)·16 + 2·16·64 + 2·64·64 + 64·64)
CONFIG = OpenELMConfig(
    vocab_size=40,
    model_dim=64,
    head_dim=16,
    num_transformer_layers=2,
    num_query_heads=(2, 2),
    num_kv_heads=(1, 1),
    ffn_multipliers=(1.0, 1.0),
    ffn_dim_divisor=64,
)
MATRICES = 40 * 64 + 2 * (64 * 64 + 32 * 64 + 128 * 64 + 64 * 64)
POSITION = 2 * (1 + 1) * 16 * 4  # keys and values, float32
MODEL = Model("made", "made", "float32", MATRICES, 4 * MATRICES)


def limit(work: Work, bandwidth: float, rate: float, config: OpenELMConfig = CONFIG) -> Limit:
    found = roofline.limit(config, MODEL, work, Calibration(bandwidth, {"float32": rate}))
    assert found is not None
    return found


def test_generation_reads_the_weights_and_what_it_remembers() -> None:
    found = limit(Work("decode", 100, 20), 1e6, 1e12)
    assert found.bytes_per_token == 4 * MATRICES + 110 * POSITION
    assert found.operations_per_token == 2 * MATRICES + 4 * (2 + 2) * 16 * 110
    assert found.tokens_per_second == pytest.approx(1e6 / found.bytes_per_token)


def test_a_batch_shares_the_weights_only() -> None:
    found = limit(Work("batch", 100, 20, batch=4), 1e6, 1e12)
    assert found.bytes_per_token == MATRICES + 110 * POSITION


def test_a_prompt_shares_them_among_its_tokens() -> None:
    found = limit(Work("prefill", 100), 1e12, 1e6)
    head = 40 * 64
    assert found.bytes_per_token == 4 * MATRICES / 100 + POSITION
    assert found.operations_per_token == (
        2 * (MATRICES - head) + 2 * head / 100 + 4 * (2 + 2) * 16 * 50
    )
    assert found.tokens_per_second == pytest.approx(1e6 / found.operations_per_token)


def test_an_embedding_of_its_own_is_looked_up() -> None:
    values = CONFIG.to_dict() | {"share_input_output_layers": False}
    untied = OpenELMConfig.from_dict(values)
    model = Model("made", "made", "float32", MATRICES + 40 * 64, 4 * (MATRICES + 40 * 64))
    found = roofline.limit(untied, model, Work("decode", 0, 0), Calibration(1e6, {"float32": 1e12}))
    assert found is not None
    assert found.bytes_per_token == pytest.approx(4 * MATRICES)


@pytest.mark.parametrize("kind", ["load", "cold", "speculative", "lookup"])
def test_no_limit_where_a_token_is_no_step(kind: str) -> None:
    calibration = Calibration(1e6, {"float32": 1e6})
    assert roofline.limit(CONFIG, MODEL, Work(kind, 8, 8), calibration) is None


def test_quantized_weights_may_be_dequantized() -> None:
    found = Calibration(1e9, {"float32": 5.0, "4bit": 3.0})
    assert roofline.rate("4bit", mx.float32, found) == 5
    found.matmul["4bit"] = 7.0
    assert roofline.rate("4bit", mx.float32, found) == 7
    assert roofline.rate("float32", mx.float32, found) == 5


def test_medians_of_calibrations_that_differ_in_what_they_have() -> None:
    found = roofline.median(
        [
            Calibration(1.0, {"float32": 10.0, "4bit": 4.0}),
            Calibration(3.0, {"float32": 30.0}),
            Calibration(2.0, {"float32": 20.0}),
        ]
    )
    assert found == Calibration(2.0, {"float32": 20.0, "4bit": 4.0})


def test_primitives_are_counted() -> None:
    a, b = mx.ones((3, 4)), mx.ones((4, 2))
    mx.eval(a, b)
    assert roofline.count_primitives([a]) == 0
    assert roofline.count_primitives([mx.tanh(a @ b)]) == 2
    shared = mx.tanh(a)
    assert roofline.count_primitives([shared + shared, mx.exp(shared)]) == 3


def test_a_step_is_built_without_being_computed() -> None:
    state = [mx.zeros((2,))]

    def step() -> list[mx.array]:
        state[0] = mx.exp(-state[0])
        return state

    found = roofline.graph(step)
    assert found.primitives == 2
    assert 0 < found.host_seconds < 1


def test_calibration_gives_figures_a_machine_can_have() -> None:
    found = short(["float32", "4bit"])
    assert 1e8 < found.bandwidth < 1e14
    assert found.matmul.keys() == {"float32", "4bit"}
    assert all(1e7 < rate < 1e17 for rate in found.matmul.values())


def test_products_are_calibrated_by_what_computes_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not device.policy().native:
        pytest.skip("MLX computes the network")
    calls: list[object] = []

    def multiply(x: mx.array, matrix: Matrix) -> mx.array:
        calls.append(matrix)
        return x

    monkeypatch.setattr(cpu, "multiply", multiply)
    for dtype in ("float32", "float16", "4bit"):
        matmul(dtype, 0.001)
        assert calls
        calls.clear()


def test_calibrating_again_counts_on_the_same_buffers() -> None:
    assert bandwidth(0.01) > 0
    held = mx.get_active_memory()
    bandwidth(0.01)
    matmul("float32", 0.01)
    assert mx.get_active_memory() <= held + (32 << 20)


def test_the_published_models() -> None:
    one = target("random:OpenELM-270M:4bit")
    assert one.model.parameters == 271_527_168
    assert one.model.bytes / one.model.parameters == pytest.approx(4.5 / 8, rel=0.001)
    found = roofline.limit(
        one.config,
        one.model,
        Work("decode", 32, 128),
        Calibration(100e9, {"float32": 1e12, "float16": 1e12}),
    )
    assert found is not None
    assert 500 < found.tokens_per_second < 660  # 153 MB of weights at 100 GB/s
