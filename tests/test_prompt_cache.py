"""What a text has in common with the one before it is not computed again, in memory and on disk."""

from __future__ import annotations

import copy
import errno
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm import (
    InputError,
    OpenELM,
    OpenELMConfig,
    PromptCache,
    generate,
    make_logits_processors,
    stream_generate,
)
from mlx_openelm.checkpoint.hub import DEMO
from mlx_openelm.generation.decoding import generate_step, prefill
from mlx_openelm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_openelm.prompt_cache import cache_file
from mlx_openelm.prompt_cache.prompt_cache import fingerprint
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from .conftest import Run
from .models import CONFIGS, UNEVEN, random_model
from .test_model import POLICIES

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


def changes(arrays: dict[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """Simple changes of weights, by name: each another model."""
    layer = "transformer.layers.1."
    matrix, other = layer + "attn.out_proj.weight", "transformer.layers.2.attn.out_proj.weight"
    table, norm = "transformer.token_embeddings.weight", layer + "attn_norm.weight"
    q_norm, k_norm = layer + "attn.q_norm.weight", layer + "attn.k_norm.weight"
    w, size = arrays[matrix], arrays[matrix].shape[0]
    square = w[:, :size]
    two = mx.array(w)
    two[0, 0], two[0, 1] = w[0, 1], w[0, 0]
    opposite = mx.array(w)
    opposite[0, 0] += 0.5
    opposite[1, 0] -= 0.5
    rectangle = mx.array(w)  # keeps the sums of all rows and columns
    for row, column, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
        rectangle[row, column] += sign * 0.25
    changed = {
        "another sign": {matrix: -w},
        "the sign of a row": {matrix: mx.concatenate([-w[:1], w[1:]])},
        "the sign of two columns": {matrix: mx.concatenate([-w[:, :2], w[:, 2:]], axis=1)},
        "rows in another order": {matrix: w[::-1]},
        "columns in another order": {matrix: w[:, ::-1]},
        "rows of the embeddings": {table: arrays[table][::-1]},
        "two values swapped": {matrix: two},
        "two changes that cancel": {matrix: opposite},
        "four changes that cancel": {matrix: rectangle},
        "twice a row": {matrix: mx.concatenate([2 * w[:1], w[1:]])},
        "a square transposed": {matrix: mx.concatenate([square.T, w[:, size:]], axis=1)},
        "two norms swapped": {q_norm: arrays[k_norm] * 2, k_norm: arrays[q_norm]},
        "a norm reversed": {norm: (arrays[norm] * mx.arange(arrays[norm].size))[::-1]},
        "rolled": {matrix: mx.roll(w, 1, axis=1)},
        "a zero's sign": {norm: mx.zeros_like(arrays[norm])},
        "another zero's sign": {norm: -mx.zeros_like(arrays[norm])},
    }
    if arrays[other].shape == w.shape:
        changed["two layers swapped"] = {matrix: arrays[other], other: w}
    return {name: {**arrays, **new} for name, new in changed.items()}


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
    seen.add(fingerprint(OpenELM(config, arrays, dtype=mx.float16)))
    more = replace(config, rope_freq_constant=20000.0)
    seen.add(fingerprint(OpenELM(more, arrays)))
    assert len(seen) == 3 + len(arrays)


def test_no_simple_change_of_weights_keeps_the_fingerprint() -> None:
    even = OpenELMConfig(
        **{**UNEVEN, "num_query_heads": (4,) * 3, "num_kv_heads": (2,) * 3}  # type: ignore[arg-type]
    )
    for config in (CONFIGS["uneven"], even):
        model = random_model(config)
        seen = {"nothing": fingerprint(model)}
        for name, arrays in changes(model.parameters()).items():
            seen[name] = fingerprint(OpenELM(config, arrays))
        assert len(set(seen.values())) == len(seen)
    assert "two layers swapped" in seen


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    model = random_model(CONFIGS["uneven"])
    filled(model, [1, 2, 3]).save(tmp_path / "cache")
    arrays = model.parameters()
    arrays["transformer.norm.weight"] = arrays["transformer.norm.weight"] * 1.001
    with pytest.raises(InputError, match="cache: the prompt cache of another model"):
        PromptCache.load(tmp_path / "cache", OpenELM(model.config, arrays))


@pytest.mark.parametrize("config", ["[8, 64]", "null", "5", '"x"', "{}", "{"])
def test_a_file_whose_geometry_is_none_is_refused(config: str, tmp_path: Path) -> None:
    model, file = random_model(CONFIGS["uneven"]), tmp_path / "cache"
    filled(model, [1, 2, 3, 4]).save(file)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"]["config"] = config
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + length :])
    with pytest.raises(InputError, match="a damaged prompt cache"):
        PromptCache.load(file, model)


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
    file.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="a damaged prompt cache"):
        PromptCache.load(file, model)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(3)})
    with pytest.raises(InputError, match="not a prompt cache that this version has written"):
        PromptCache.load(tmp_path / "other.safetensors", model)


Header = dict[str, Any]


def header_of(file: Path) -> tuple[Header, bytes]:
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def signed(header: Header, data: bytes) -> bytes:
    """A file that says so, with the digest that its writer would have given it."""
    values = header["__metadata__"]
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    values.pop("sha256", None)
    parts = {n: data[slice(*e["data_offsets"])] for n, e in entries.items()}
    values["sha256"] = cache_file._digest(values, entries, parts)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(header: Header) -> Any:
    return header["layers.1.0"]


HOSTILE: dict[str, Callable[[Header], object]] = {
    "a shape": lambda h: entry(h).update(shape=[1, 4, 4, 8_000_000]),
    "a shape of the same size": lambda h: entry(h).update(shape=[1, 4, 8, 4]),
    "a negative shape": lambda h: entry(h).update(shape=[1, -4, -4, 8]),
    "a dtype": lambda h: entry(h).update(dtype="F16"),
    "an unknown dtype": lambda h: entry(h).update(dtype="X9"),
    "offsets beyond the end": lambda h: entry(h).update(data_offsets=[1 << 40, (1 << 40) + 512]),
    "offsets that overlap": lambda h: entry(h).update(data_offsets=[0, 512]),
    "offsets backwards": lambda h: entry(h).update(data_offsets=[512, 0]),
    "an array too many": lambda h: h.update({"layers.3.0": dict(entry(h))}),
    "an array missing": lambda h: h.pop("layers.1.0"),
    "tokens beyond the vocabulary": lambda h: h["__metadata__"].update(tokens="[1, 2, 3, 96]"),
    "a negative token": lambda h: h["__metadata__"].update(tokens="[1, 2, 3, -1]"),
    "too few tokens": lambda h: h["__metadata__"].update(tokens="[1, 2, 3]"),
    "tokens that are none": lambda h: h["__metadata__"].update(tokens='"abcd"'),
    "a length": lambda h: h["__metadata__"].update(length="999999999999"),
    "no length": lambda h: h["__metadata__"].pop("length"),
    "kv": lambda h: h["__metadata__"].update(kv="[8, 64]"),
    "kv that is none": lambda h: h["__metadata__"].update(kv="{}[", length="4"),
    "nesting": lambda h: h["__metadata__"].update(kv="[" * 100_000),
    "a configuration": lambda h: h["__metadata__"].update(config="{}"),
    "metadata": lambda h: h["__metadata__"].update(metadata="[1]"),
    "metadata that aren't text": lambda h: h["__metadata__"].update(metadata='{"a": 1}'),
    "metadata of the header": lambda h: h.update(__metadata__=[]),
    "a model that is a number": lambda h: h["__metadata__"].update(model=5),
    "integers": lambda h: (
        h["__metadata__"].update(dtype="U32"),
        [h[f"layers.{i}.0"].update(dtype="U32") for i in range(3)],
    ),
    "a number for a text": lambda h: h["__metadata__"].update(config=5),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(tmp_path: Path, change: str) -> None:
    model = random_model(CONFIGS["uneven"])
    file = tmp_path / "cache"
    filled(model, [1, 2, 3, 4]).save(file)
    header, data = header_of(file)
    assert signed(json.loads(json.dumps(header)), data)
    file.write_bytes(signed(json.loads(json.dumps(header)), data))
    PromptCache.load(file, model)  # as the writer would have written it
    HOSTILE[change](header)
    try:
        content = signed(header, data)
    except (AttributeError, TypeError):  # not even signed
        encoded = json.dumps(header).encode()
        content = len(encoded).to_bytes(8, "little") + encoded + data
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        PromptCache.load(file, model)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_header_that_is_too_long_or_no_file_is_refused(tmp_path: Path) -> None:
    model = random_model(CONFIGS["uneven"])
    file = tmp_path / "cache"
    for content in (b"\xff" * 8 + b"{}", (1 << 40).to_bytes(8, "little"), b"\0" * 8, b"[]"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="not a prompt cache"):
            PromptCache.load(file, model)
    os.mkfifo(tmp_path / "fifo")
    cache = filled(model, [1, 2])
    for name in ("fifo", "."):
        with pytest.raises(InputError, match="not a regular file"):
            PromptCache.load(tmp_path / name, model)
        with pytest.raises(InputError, match="not a regular file"):
            cache.save(tmp_path / name)


def test_threads_save_to_the_same_file(tmp_path: Path) -> None:
    model = random_model(CONFIGS["uneven"])
    caches = [filled(model, [1 + i, 2, 3, 4 + i]) for i in range(4)]
    for cache in caches:
        mx.eval(cache.cache.buffers)
    file = tmp_path / "cache"
    errors: list[BaseException] = []

    def save(cache: PromptCache) -> None:
        try:
            for _ in range(10):
                cache.save(file)
                PromptCache.load(file, model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(cache,)) for cache in caches * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert PromptCache.load(file, model).held in [cache.held for cache in caches]


def test_saving_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(CONFIGS["uneven"])
    file = tmp_path / "cache"
    filled(model, [1, 2]).save(file)
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="can't be written .No space left"):
        filled(model, [3, 4]).save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_link_is_kept_and_its_file_replaced(tmp_path: Path) -> None:
    model = random_model(CONFIGS["uneven"])
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "cache")
    filled(model, [1, 2]).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert PromptCache.load(tmp_path / "there" / "cache", model).held == [1, 2]


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
        (("--prompt-cache-file", str(DEMO / "demo" / "model.safetensors")), "not a prompt cache"),
        (("--prompt-cache-file", str(tmp_path / "no" / "x")), "no: no such directory"),
        ((*kept, "--kv-bits", "8"), f"{file}: was written without --kv-bits"),
        ((*kept, "--max-kv-size", "64"), "--prompt-cache-file can't be combined"),
    ):
        result = run(module, "-p", TALE, "-q", *arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", ["generate", "load", "copy"])
def test_a_cache_goes_from_thread_to_thread(policy: str, way: str, tmp_path: Path) -> None:
    """MLX computes on a thread only what that thread has begun: nothing may be left to compute."""
    model = random_model(CONFIGS["uneven"], POLICIES[policy])
    model.prepare()
    cache = make_prompt_cache(model)

    def tokens() -> int:
        return len(list(generate_step(mx.array([1, 2]), model, max_tokens=3, prompt_cache=cache)))

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(tokens).result() == 3
    if way == "load":
        save_prompt_cache(tmp_path / "cache", cache)
        cache = load_prompt_cache(tmp_path / "cache")
    if way == "copy":
        cache = copy.deepcopy(cache)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(tokens).result() == 3


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": None}])
def test_metadata_that_could_not_be_read_again_are_not_written(
    metadata: Any, tmp_path: Path
) -> None:
    cache = make_prompt_cache(random_model(CONFIGS["uneven"]))
    save_prompt_cache(tmp_path / "cache", cache, {"a": "before"})
    with pytest.raises(InputError, match="must be strings"):
        save_prompt_cache(tmp_path / "cache", cache, metadata)
    assert load_prompt_cache(tmp_path / "cache", return_metadata=True)[1] == {"a": "before"}
