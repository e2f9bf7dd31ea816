"""Logits that aren't finite end every loop with an error that says where they began."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

from mlx_openelm import InputError, OpenELM, OpenELMError, load, make_sampler
from mlx_openelm.benchmarks.roofline import count_primitives
from mlx_openelm.checkpoint.directory import save_model
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.device import Policy
from mlx_openelm.generation.batching import batch_generate_step
from mlx_openelm.generation.choosing import begin, choose
from mlx_openelm.generation.decoding import generate_step
from mlx_openelm.generation.speculative.loop import speculative_generate_step
from mlx_openelm.model.quantization import Quantization, Scheme, quantize
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from . import reference
from .models import CONFIGS, UNEVEN, random_model
from .test_speculative import Always

Demo = tuple[OpenELM, Tokenizer]
Arrays = dict[str, mx.array]
CONFIG = CONFIGS["untied"]
GPU = Policy("a GPU", compiled=False)
PROMPT = mx.array([1, 5, 9])
SAMPLERS = {"greedy": None, "drawn": make_sampler(0.8), "seeded": make_sampler(0.8, seed=1)}


def arrays() -> Arrays:
    weights = reference.random_weights(CONFIG, seed=0)
    return {name: mx.array(value) for name, value in weights.items()}


def loops(model: OpenELM, **options: Any) -> dict[str, Iterator[Any]]:
    good = random_model(CONFIG, seed=1)
    return {
        "plain": iter(generate_step(PROMPT, model, max_tokens=6, **options)),
        "batch": batch_generate_step([PROMPT[:1], PROMPT], model, [6, 6], **options),
        "lookup": speculative_generate_step(
            PROMPT, model, prompt_lookup=True, max_tokens=6, **options
        ),
        "draft": speculative_generate_step(
            PROMPT, model, good, max_tokens=6, pace=Always(2), **options
        ),
    }


def change(arrays: Arrays, name: str, value: float, scale: float = 1.0) -> None:
    array = arrays[name] * scale
    array[(0,) * array.ndim] = value
    arrays[name] = array


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "transformer.layers.1.ffn.proj_2.weight",
        "transformer.layers.0.attn.q_norm.weight",
        "transformer.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("loop", ["plain", "batch", "lookup", "draft"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weights_that_are_not_finite_are_named(
    name: str, value: float, loop: str, sampler: str
) -> None:
    weights = arrays()
    change(weights, name, value)
    model = OpenELM(CONFIG, weights)
    with pytest.raises(OpenELMError, match=f"tensor {name} holds values that are NaN") as found:
        next(loops(model, sampler=SAMPLERS[sampler])[loop])
    assert not isinstance(found.value, InputError)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("loop", ["plain", "batch", "lookup", "draft"])
def test_float16_that_overflows_is_told_with_the_layer(layer: int, loop: str) -> None:
    weights = arrays()
    for part in ("proj_1", "proj_2"):
        name = f"transformer.layers.{layer}.ffn.{part}.weight"
        weights[name] = weights[name] * 300
    model = OpenELM(CONFIG, weights, dtype=mx.float16, policy=GPU)
    wanted = rf"it began in layer {layer} \(of 0 to 2\); activations overflow float16; .*bfloat16"
    with pytest.raises(OpenELMError, match=wanted):
        list(loops(model)[loop])
    list(loops(OpenELM(CONFIG, weights, dtype=mx.bfloat16, policy=GPU))[loop])


def test_an_overflow_of_the_output_projection() -> None:
    weights = arrays()
    weights["lm_head.weight"] *= 1e4
    weights["transformer.norm.weight"] *= 100
    model = OpenELM(CONFIG, weights, dtype=mx.float16, policy=GPU)
    with pytest.raises(OpenELMError, match="it began in the output projection; activations over"):
        list(generate_step(PROMPT, model))


def test_a_logit_of_minus_infinity_is_not_taken_for_a_mask() -> None:
    weights = arrays()
    weights["lm_head.weight"][7] = mx.array(-3e38)
    weights["lm_head.weight"] *= 1.0
    model = OpenELM(CONFIG, weights)
    raw = model(PROMPT[None])[0, -1]
    weights["lm_head.weight"][7] = mx.where(raw[7] < 0, 1.0, -1.0) * mx.inf
    with pytest.raises(OpenELMError, match="tensor lm_head.weight"):
        next(iter(generate_step(PROMPT, OpenELM(CONFIG, weights))))


def test_a_quantized_model() -> None:
    values = {**UNEVEN, "ffn_dim_divisor": 32, "head_dim": 16}
    config = CONFIG.__class__(**values, share_input_output_layers=False)
    stored: Arrays = {}
    for name, value in reference.random_weights(config, seed=0).items():
        array, module = mx.array(value), name.removesuffix(".weight")
        parts = quantize(array, Scheme(32, 4)).arrays() if array.ndim == 2 else [("weight", array)]
        stored |= {f"{module}.{part}": a for part, a in parts}
    change(stored, "transformer.layers.2.attn.out_proj.scales", float("nan"))
    model = OpenELM(config, stored, Quantization(Scheme(32, 4)))
    with pytest.raises(OpenELMError, match="tensor transformer.layers.2.attn.out_proj"):
        next(iter(generate_step(PROMPT, model)))


@pytest.mark.parametrize("loop", ["plain", "batch", "lookup", "draft"])
def test_activations_that_overflow_after_some_tokens(loop: str) -> None:
    """Only where token 7 is read, which processors force as the third token after the prompt."""
    weights = arrays()
    weights["transformer.token_embeddings.weight"][7] = mx.array(6e4)
    weights["transformer.layers.0.attn.out_proj.weight"] *= 1e4
    model = OpenELM(CONFIG, weights, dtype=mx.float16, policy=GPU)

    def force(tokens: mx.array, logits: mx.array) -> mx.array:
        token = 7 if tokens[-2:].tolist() == [3, 3] else 3
        return mx.where(mx.arange(logits.shape[-1]) == token, logits, -mx.inf)

    given: list[Any] = []
    with pytest.raises(OpenELMError, match="it began in layer 0 .* overflow float16"):
        given.extend(loops(model, logits_processors=[force])[loop])
    tokens = [step[0][1] if loop == "batch" else step[0] for step in given]
    # A draft is computed with the token before it: those of the step aren't given out.
    assert tokens == ([3] if loop == "draft" else [3, 3, 7])


@pytest.mark.parametrize("loop", ["plain", "batch", "lookup", "draft"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-mx.inf, "the logits processors leave no token that is possible"),
        (mx.nan, "a logits processor made a logit NaN or infinite"),
        (mx.inf, "a logits processor made a logit NaN or infinite"),
    ],
)
def test_processors_that_leave_nothing(loop: str, sampler: str, value: float, message: str) -> None:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.full(logits.shape, value) if tokens.size > 4 else logits

    steps = loops(random_model(CONFIG), sampler=SAMPLERS[sampler], logits_processors=[process])
    with pytest.raises(OpenELMError, match=message):
        list(steps[loop])


@pytest.mark.parametrize("loop", ["plain", "batch", "lookup", "draft"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_possible_token_is_enough(loop: str, sampler: str) -> None:
    """Also where a draft that doesn't hold would leave no token possible after it."""

    def only_11(tokens: mx.array, logits: mx.array) -> mx.array:
        after = mx.all(tokens[3:] == 11) if loop != "batch" else mx.array(True)
        allowed = (mx.arange(logits.shape[-1]) == 11) & after
        return mx.where(allowed, logits, -mx.inf)

    steps = loops(random_model(CONFIG), sampler=SAMPLERS[sampler], logits_processors=[only_11])
    tokens = [step[0] for step in steps[loop]]
    assert tokens == [11] * 6 if loop != "batch" else tokens == [(0, 11)] * 6


def test_a_draft_model_whose_weights_are_not_finite() -> None:
    weights = arrays()
    change(weights, "transformer.layers.1.ffn.proj_2.weight", float("nan"))
    draft = OpenELM(CONFIG, weights)
    for sampler in SAMPLERS.values():
        steps = speculative_generate_step(
            PROMPT, random_model(CONFIG), draft, sampler=sampler, pace=Always(3)
        )
        with pytest.raises(OpenELMError, match="tensor transformer.layers.1.ffn.proj_2.weight"):
            list(steps)


def test_a_cache_that_is_not_finite() -> None:
    model = random_model(CONFIG)
    cache = model.make_cache()
    model(PROMPT[None], cache)
    cache.buffers = [tuple(array * mx.nan for array in buffer) for buffer in cache.buffers]
    with pytest.raises(OpenELMError, match="keys and values in the cache are damaged"):
        next(iter(generate_step(PROMPT, model, prompt_cache=cache)))


def test_the_command_ends_with_status_1_and_no_text(run: Callable[..., Any], tmp_path: Any) -> None:
    model, _ = load("demo")
    weights = model.parameters()
    change(weights, "transformer.layers.0.ffn.proj_2.weight", float("nan"))
    save_model(tmp_path, model.config, weights)
    for file in BUNDLED["demo"].glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    for more in ([], ["--json"], ["--prompt-lookup"], ["--temp", "0.7"]):
        found = run("mlx_openelm.generate", "--model", tmp_path, "-p", "The", "-q", *more)
        assert found.returncode == 1
        assert found.stdout.strip() == ""
        assert "transformer.layers.0.ffn.proj_2.weight" in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1


def test_the_check_costs_a_greedy_step_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """logsumexp, beside the argmax; log-probabilities are computed when they are used."""
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: None)
    logits = mx.zeros((1, 96))
    mx.eval(logits)
    choice = choose(logits, begin(None))
    assert count_primitives([choice.tokens]) == count_primitives([mx.argmax(logits, axis=-1)])
    extra = count_primitives([choice.tokens, choice.norms]) - count_primitives([choice.tokens])
    assert extra == count_primitives([mx.max(logits, axis=-1)])
