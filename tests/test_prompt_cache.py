"""What a text has in common with the one before it is not computed again, in memory and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm import (
    InputError,
    OpenELM,
    PromptCache,
    generate,
    make_logits_processors,
    stream_generate,
)
from mlx_openelm.decoding import prefill
from mlx_openelm.prompt_cache import fingerprint
from mlx_openelm.tokenizer import Tokenizer

from .conftest import Run
from .models import CONFIGS, random_model

Demo = tuple[OpenELM, Tokenizer]
TALE = "Once upon a time there was a king who had a daughter. One day she went into the forest"
texts = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def filled(model: OpenELM, tokens: list[int]) -> PromptCache:
    cache = PromptCache(model)
    assert cache.begin(tokens) == 0
    prefill(model, mx.array(tokens), cache.cache)
    return cache


@pytest.mark.parametrize("options", [{}, {"prompt_lookup": True}])
def test_a_text_that_begins_alike_gives_what_it_gives_alone(
    demo: Demo, options: dict[str, Any]
) -> None:
    model, tokenizer = demo
    cache = PromptCache(model)
    prompts = (TALE, TALE + " and found", TALE[:40] + " a queen", "The king", TALE, TALE)
    for prompt in prompts:
        before = cache.held
        ids = tokenizer.encode(prompt)
        responses = list(
            stream_generate(model, tokenizer, prompt, 12, prompt_cache=cache, **options)
        )
        assert "".join(r.text for r in responses) == generate(
            model, tokenizer, prompt, max_tokens=12
        )
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b),
            min(len(before), len(ids)),
        )
        assert responses[-1].cached_tokens == min(shared, len(ids) - 1)
        assert responses[-1].prompt_tokens == len(ids)
        assert cache.tokens == ids + [r.token for r in responses]


def test_an_answer_is_reused_too(demo: Demo) -> None:
    model, tokenizer = demo
    cache = PromptCache(model)
    ids = tokenizer.encode(TALE)
    answer = [r.token for r in stream_generate(model, tokenizer, ids, 10, prompt_cache=cache)]
    more = [*ids, *answer, 40, 41]
    last = list(stream_generate(model, tokenizer, more, 5, prompt_cache=cache))[-1]
    assert last.cached_tokens >= len(ids) + 9


def test_text_that_is_left_half_way_can_be_gone_on_with(demo: Demo) -> None:
    model, tokenizer = demo
    for options in ({}, {"prompt_lookup": True}):
        cache = PromptCache(model)
        steps = stream_generate(model, tokenizer, TALE, 50, prompt_cache=cache, **options)  # type: ignore[arg-type]
        for _ in range(7):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
        again = generate(model, tokenizer, TALE, max_tokens=30, prompt_cache=cache)
        assert again == generate(model, tokenizer, TALE, max_tokens=30)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(texts, min_size=2, max_size=5))
def test_logits_after_any_texts_are_those_of_the_last(prompts: list[list[int]]) -> None:
    model = random_model(CONFIGS["uneven"])
    cache = PromptCache(model)
    for tokens in prompts:
        reused = cache.begin(tokens)
        logits = prefill(model, mx.array(tokens[reused:]), cache.cache)
    wanted = model(mx.array([tokens]), last_only=True)[:, 0]
    assert mx.abs(logits - wanted).max().item() < 1e-4
    assert cache.held == tokens


def test_processors_see_the_reused_tokens(demo: Demo) -> None:
    model, tokenizer = demo
    options = {"logits_processors": make_logits_processors(frequency_penalty=2.0)}
    wanted = generate(model, tokenizer, TALE, max_tokens=10, **options)
    for extra in ({}, {"prompt_lookup": True}):
        cache = PromptCache(model)
        for _ in range(2):
            text = generate(
                model, tokenizer, TALE, max_tokens=10, prompt_cache=cache, **options, **extra
            )
            assert text == wanted


def test_a_context_that_slides_is_reused_or_read_anew(demo: Demo) -> None:
    model, tokenizer = demo
    cache = PromptCache(model, max_kv_size=32)
    ids = tokenizer.encode(TALE * 8)
    answer = [r.token for r in stream_generate(model, tokenizer, ids, 5, prompt_cache=cache)]
    assert cache.cache.offset > cache.cache.ring  # type: ignore[operator]
    longer = [*ids, *answer]
    last = list(stream_generate(model, tokenizer, longer, 3, prompt_cache=cache))[-1]
    assert last.cached_tokens == len(longer) - 1
    for beyond, cached in ((9, len(ids) - 10), (70, 0)):
        other = list(stream_generate(model, tokenizer, ids[:-beyond], 8, prompt_cache=cache))
        assert other[-1].cached_tokens == cached
        alone = list(stream_generate(model, tokenizer, ids[:-beyond], 8, max_kv_size=32))
        assert [r.token for r in other] == [r.token for r in alone]
    with pytest.raises(InputError, match="slides .max_kv_size. can't be saved"):
        cache.save("never")


# In a file


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_file_holds_the_same_cache(demo: Demo, tmp_path: Path, kv_bits: int | None) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode(TALE * 20)
    cache = PromptCache(model, kv_bits=kv_bits)
    text = generate(model, tokenizer, ids, max_tokens=8, prompt_cache=cache)
    cache.save(tmp_path / "cache")
    loaded = PromptCache.load(tmp_path / "cache", model)
    assert loaded.held == cache.held
    assert loaded.cache.offset == cache.cache.offset
    for name, array in cache.cache.state.items():
        assert mx.array_equal(loaded.cache.state[name], array).item()
    assert generate(model, tokenizer, ids, max_tokens=8, prompt_cache=loaded) == text
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_an_empty_cache_can_be_saved(tmp_path: Path) -> None:
    model = random_model(CONFIGS["uneven"])
    PromptCache(model).save(tmp_path / "empty")
    assert PromptCache.load(tmp_path / "empty", model).tokens == []


def test_the_fingerprint_changes_with_any_weight_and_with_the_configuration() -> None:
    config = CONFIGS["uneven"]
    model = random_model(config)
    arrays = model.parameters()
    first = fingerprint(model)
    assert fingerprint(OpenELM(config, arrays)) == first
    seen = {first}
    for name, array in arrays.items():
        flat = array.flatten()
        flat[5] = 0.5
        seen.add(fingerprint(OpenELM(config, {**arrays, name: flat.reshape(array.shape)})))
    swapped = arrays["transformer.token_embeddings.weight"][::-1]
    seen.add(
        fingerprint(OpenELM(config, {**arrays, "transformer.token_embeddings.weight": swapped}))
    )
    seen.add(fingerprint(OpenELM(config, arrays, dtype=mx.float16)))
    assert len(seen) == 3 + len(arrays)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    model = random_model(CONFIGS["uneven"])
    filled(model, [1, 2, 3]).save(tmp_path / "cache")
    arrays = model.parameters()
    arrays["transformer.norm.weight"] = arrays["transformer.norm.weight"] * 1.001
    with pytest.raises(InputError, match="cache: the prompt cache of another model"):
        PromptCache.load(tmp_path / "cache", OpenELM(model.config, arrays))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model = random_model(CONFIGS["uneven"])
    file = tmp_path / "cache"
    filled(model, [1, 2, 3, 4]).save(file)
    whole = file.read_bytes()
    for i in range(0, len(whole), 61):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(InputError, match=f"^{file}: "):
            PromptCache.load(file, model)
    for size in (0, 5, 300, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"^{file}: "):
            PromptCache.load(file, model)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(3)})
    with pytest.raises(InputError, match="not a prompt cache that this version has written"):
        PromptCache.load(tmp_path / "other.safetensors", model)


def test_a_file_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    cache = filled(random_model(CONFIGS["uneven"]), [1, 2])
    with pytest.raises(InputError, match="can't be written .No such file or directory"):
        cache.save(tmp_path / "nowhere" / "cache")
    with pytest.raises(InputError, match="missing: No such file"):
        PromptCache.load(tmp_path / "missing", cache.model)


def test_the_command_skips_what_the_file_has(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    module, options = "mlx_openelm.generate", ("-q", "-m", "8", "--json")
    alone = json.loads(run(module, "-p", TALE, *options).stdout)
    kept = ("--prompt-cache-file", str(file))
    first, second = (json.loads(run(module, "-p", TALE, *options, *kept).stdout) for _ in range(2))
    assert alone["text"] == first["text"] == second["text"]
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == second["prompt_tokens"] - 1
    told = run(module, "-p", TALE + " again", "-m", "3", "-v", *kept).stderr
    assert "from the prompt cache), " in told
    for arguments, message in (
        ((*kept, "--model", "demo-draft"), f"{file}: the prompt cache of another model"),
        (("--prompt-cache-file", __file__), "not a prompt cache"),
        (("--prompt-cache-file", str(tmp_path / "no" / "x")), "no: no such directory"),
        ((*kept, "--kv-bits", "8"), f"{file}: was written without --kv-bits"),
        ((*kept, "--max-kv-size", "64"), "--prompt-cache-file can't be combined"),
    ):
        result = run(module, "-p", TALE, "-q", *arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
