"""Scripts for mlx-lm, with the name of the package changed, print the same here.

Each script is run by mlx-lm with `mlx_lm` in the place of PACKAGE, and by this project with
`mlx_openelm`. DIR is a model directory; WORK a directory to write to.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from mlx_openelm.checkpoint.hub import DEMO

pytest.importorskip("mlx_lm")

HEAD = """
import mlx.core as mx
from PACKAGE import load, generate, stream_generate, batch_generate
model, tokenizer = load(DIR)
text = "Once upon a time there was a king"
ids = tokenizer.encode(text)
"""

SCRIPTS = {
    "generate": """
print(generate(model, tokenizer, prompt=text, max_tokens=20, verbose=False))
print(generate(model, tokenizer, ids, max_tokens=20))
print(generate(model, tokenizer, prompt=text, max_tokens=9, prefill_step_size=4))
""",
    "load": """
model, tokenizer = load(DIR, tokenizer_config={"trust_remote_code": True}, lazy=True)
model, tokenizer, config = load(DIR, return_config=True)
print(config["model_type"], config["vocab_size"])
model, tokenizer = load(DIR, {}, {"rope_freq_constant": 500.0}, None, False, False, None)
print(generate(model, tokenizer, text, max_tokens=10))
""",
    "stream": """
for r in stream_generate(model, tokenizer, text, max_tokens=6):
    print(r.token, r.from_draft, r.prompt_tokens, r.generation_tokens, r.finish_reason)
    print(int(mx.argmax(r.logprobs)), r.prompt_tps > 0, r.peak_memory > 0)
print("".join(r.text for r in stream_generate(model, tokenizer, text, max_tokens=20)))
""",
    "generate_step": """
from PACKAGE.generate import generate_step
for token, logprobs in generate_step(mx.array(ids), model, max_tokens=5):
    print(token, round(logprobs[token].item(), 1))
print([t for t, _ in generate_step(mx.array(ids), model, max_tokens=3, sampler=lambda x:
       mx.argmax(x, axis=-1), prefill_step_size=512)])
""",
    "sample_utils": """
from PACKAGE.sample_utils import make_sampler, make_logits_processors
sampler = make_sampler(temp=0.0, top_p=0.9, min_p=0.05, min_tokens_to_keep=1, top_k=20)
processors = make_logits_processors(repetition_penalty=1.3, repetition_context_size=20)
print(generate(model, tokenizer, text, max_tokens=20, sampler=sampler,
               logits_processors=processors))
processors = make_logits_processors({5: 3.0, 400: 2.0}, None, 20, 0.5, 30, 0.3, 30)
print(generate(model, tokenizer, text, max_tokens=20, logits_processors=processors))
make_sampler(0.7, 0.9, 0.05, 1, 20, 0.1, 0.1, [2])
make_sampler(0.7, xtc_probability=0.5, xtc_threshold=0.2, xtc_special_tokens=[1, 2])
""",
    "apply": """
from PACKAGE.sample_utils import (apply_min_p, apply_top_k, apply_top_p, apply_xtc,
    categorical_sampling, make_frequency_penalty, make_presence_penalty, make_repetition_penalty)
probs = mx.array([[0.4, 0.3, 0.15, 0.1, 0.05]])
logits = mx.log(probs)
def kept(x): print([i for i, v in enumerate(x[0].tolist()) if v > -1e9])
for k in (1, 3, 4): kept(apply_top_k(logits, k))
for p in (0.05, 0.3, 0.5, 0.99): kept(apply_top_p(logits, p))
for p in (0.2, 0.3, 1.0): kept(apply_min_p(logits, p))
kept(apply_min_p(logits, 1.0, 3))
kept(apply_xtc(logits, 1.0, 0.1, []))
kept(apply_xtc(logits, 1.0, 0.2, [0]))
kept(apply_xtc(logits, 1.0, 0.5, []))
kept(apply_xtc(logits, 0.0, 0.1, []))
print(categorical_sampling(apply_top_k(logits, 1), 1.3).tolist())
for make in (make_repetition_penalty, make_presence_penalty, make_frequency_penalty):
    new = make(1.5, 3)(mx.array([4, 0, 1, 1]), logits + 1)
    print([round(v, 4) for v in new[0].tolist()])
""",
    "bad values": """
from PACKAGE.sample_utils import apply_min_p, apply_top_k, apply_xtc
logits = mx.zeros((1, 5))
for call in (lambda: apply_top_k(logits, 0), lambda: apply_top_k(logits, 5),
             lambda: apply_min_p(logits, 1.5), lambda: apply_min_p(logits, 0.1, 0),
             lambda: apply_xtc(logits, 0.5, 0.6, []), lambda: apply_xtc(logits, 1.5, 0.1, [])):
    try: call(); print("taken")
    except ValueError: print("refused")
""",
    "processor": """
seen = []
def spy(tokens, logits):
    seen.append(tokens.tolist()); return logits
print(generate(model, tokenizer, text, max_tokens=4, logits_processors=[spy]))
print(seen[:4])  # mlx-lm computes one step more than it needs
""",
    "seed": """
from PACKAGE.sample_utils import make_sampler
def draw():
    mx.random.seed(7)
    return generate(model, tokenizer, text, max_tokens=12, sampler=make_sampler(0.8, top_p=0.9))
print(draw() == draw())
""",
    "kv cache": """
print(generate(model, tokenizer, text, max_tokens=12, kv_group_size=64, quantized_kv_start=0))
print(generate(model, tokenizer, text, max_tokens=5, kv_bits=8, kv_group_size=64,
               quantized_kv_start=2000))
print(len(generate(model, tokenizer, text, max_tokens=12, kv_bits=8, kv_group_size=64,
                   quantized_kv_start=0)) > 0)
print(generate(model, tokenizer, text, max_tokens=12, max_kv_size=4096))
""",
    "progress": """
calls = []
generate(model, tokenizer, text, max_tokens=2,
         prompt_progress_callback=lambda done, total: calls.append((done, total)))
print(calls[0], calls[-1] == (len(ids), len(ids)))
""",
    "drafts": """
print(generate(model, tokenizer, text, max_tokens=20, draft_model=model, num_draft_tokens=3))
print(len(list(stream_generate(model, tokenizer, text, 12, model))))
""",
    "conversation": """
from PACKAGE.models.cache import make_prompt_cache
cache = make_prompt_cache(model)
for turn in (text, " and a queen.", " One day", " she went"):
    print(generate(model, tokenizer, tokenizer.encode(turn, add_special_tokens=turn is text),
                   max_tokens=15, prompt_cache=cache))
    print(cache[0].offset)
""",
    "conversation with drafts": """
from PACKAGE.models.cache import make_prompt_cache
cache = make_prompt_cache(model) + make_prompt_cache(model)
for turn in (text, " and a queen."):
    print(generate(model, tokenizer, tokenizer.encode(turn, add_special_tokens=turn is text),
                   max_tokens=15, prompt_cache=cache, draft_model=model, num_draft_tokens=2))
""",
    "cache that slides": """
from PACKAGE.models.cache import can_trim_prompt_cache, make_prompt_cache
cache = make_prompt_cache(model, max_kv_size=256)
print(generate(model, tokenizer, ids, max_tokens=15, prompt_cache=cache))
print(cache[0].offset, can_trim_prompt_cache(cache))
""",
    "cache in a file": """
from PACKAGE.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from PACKAGE.generate import generate_step
cache = make_prompt_cache(model)
for _ in generate_step(mx.array(ids), model, max_tokens=0, prompt_cache=cache): pass
print(cache[0].offset)
mx.eval([c.state for c in cache])
save_prompt_cache(WORK + "/cache.safetensors", cache, metadata={"model": "demo", "n": "1"})
cache = load_prompt_cache(WORK + "/cache.safetensors")
print(cache[0].offset)
cache, metadata = load_prompt_cache(WORK + "/cache.safetensors", return_metadata=True)
print(metadata)
more = tokenizer.encode(" who had", add_special_tokens=False)
print(generate(model, tokenizer, more, max_tokens=20, prompt_cache=cache))
""",
    "trimming": """
from PACKAGE.models.cache import (can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache)
import copy
cache = make_prompt_cache(model)
print(trim_prompt_cache(cache, 3))
generate(model, tokenizer, text, max_tokens=12, prompt_cache=cache)
other = copy.deepcopy(cache)
print(can_trim_prompt_cache(cache), trim_prompt_cache(cache, 14), cache[0].offset)
more = tokenizer.encode(" who had", add_special_tokens=False)
print(generate(model, tokenizer, more, max_tokens=20, prompt_cache=cache))
print(other[0].offset, generate(model, tokenizer, more, max_tokens=9, prompt_cache=other))
print(trim_prompt_cache(cache, 10_000), cache[0].offset, cache[0].is_trimmable())
""",
    "model and cache": """
from PACKAGE.models.cache import make_prompt_cache
cache = make_prompt_cache(model)
logits = model(mx.array([ids]), cache=cache)
print(logits.shape, cache[0].offset, cache[0].size(), cache[0].empty(), cache[0].nbytes > 0)
print(mx.argmax(logits[0, -1]).item())
print(mx.argmax(model(mx.array([ids]))[0, -1]).item())
""",
    "batch": """
prompts = [tokenizer.encode(p) for p in (text, "The", "There was a poor woodcutter who")]
r = batch_generate(model, tokenizer, prompts, max_tokens=10, verbose=False)
print(r.texts)
r = batch_generate(model, tokenizer, prompts, None, [3, 9, 6], False)
print(r.texts, r.caches, r.logprobs)
r = batch_generate(model, tokenizer, prompts, max_tokens=6, return_token_ids=True,
                   return_logprobs=True)
print(r.token_ids, [[round(x, 1) for x in row] for row in r.logprobs])
r = batch_generate(model, tokenizer, prompts, max_tokens=6, completion_batch_size=2,
                   prefill_batch_size=2, prefill_step_size=16)
print(r.texts, r.stats.generation_tokens)
""",
    "batch that goes on": """
from PACKAGE.models.cache import make_prompt_cache
prompts = [tokenizer.encode(p) for p in (text, "The", "There was a poor woodcutter who")]
r = batch_generate(model, tokenizer, prompts, max_tokens=[4, 9, 6], return_prompt_caches=True)
print(r.texts, [c[0].offset for c in r.caches])
more = [tokenizer.encode(p, add_special_tokens=False) for p in (" and", " who had", " said")]
again = batch_generate(model, tokenizer, more, prompt_caches=r.caches, max_tokens=8)
print(again.texts, [c[0].offset for c in r.caches])
print(generate(model, tokenizer, more[1], max_tokens=8, prompt_cache=r.caches[1]))
""",
    "end of sequence": """
from PACKAGE.sample_utils import make_logits_processors
end = make_logits_processors({tokenizer.eos_token_id: 1e4})
last = list(stream_generate(model, tokenizer, text, 9, logits_processors=end))[-1]
print(last.finish_reason, repr(last.text), last.token, last.generation_tokens)
r = batch_generate(model, tokenizer, [ids], max_tokens=4, logits_processors=end,
                   return_token_ids=True)
print(r.texts, r.token_ids)
""",
    "convert": """
from PACKAGE import convert
convert(DIR, WORK + "/plain", dtype="float32")
convert(DIR, mlx_path=WORK + "/four", quantize=True, q_bits=4, q_group_size=64, dtype="float32")
convert(DIR, WORK + "/mixed", True, 64, 4, "affine", "float32", None, None, False,
        lambda path, module: {"bits": 8, "group_size": 64} if "ffn" in path
        else hasattr(module, "to_quantized") and "embeddings" not in path)
convert(WORK + "/four", WORK + "/again", dequantize=True, dtype="float32")
for name in ("plain", "four", "mixed", "again"):
    model, tokenizer = load(WORK + "/" + name)
    print(name, generate(model, tokenizer, text, max_tokens=20))
try: convert(DIR, WORK + "/plain")
except ValueError: print("exists")
""",
}

RUNNER = """
import contextlib, io, json, sys, traceback, warnings
warnings.simplefilter("ignore")
package, head, scripts, values = sys.argv[1], *map(json.loads, sys.argv[2:])
__import__(package)
for name, script in scripts.items():
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec((head + script).replace("PACKAGE", package), dict(values))
    except BaseException:
        printed.write(traceback.format_exc())
    lines = [line for line in printed.getvalue().splitlines() if not line.startswith("[INFO]")]
    print(json.dumps([name, lines]), flush=True)
"""


SPACE_IN_FRONT = re.compile(r"(^|[' ]) +")
"""Of a text that continues another one; mlx-lm drops it."""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What each script prints, by package."""
    found = {}
    for package in ("mlx_lm", "mlx_openelm"):
        values = {"DIR": str(DEMO / "demo"), "WORK": str(tmp_path_factory.mktemp(package))}
        arguments = (package, *map(json.dumps, (HEAD, SCRIPTS, values)))
        result = subprocess.run(
            [sys.executable, "-c", RUNNER, *arguments],
            capture_output=True,
            encoding="utf-8",
            cwd=values["WORK"],
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
        found[package] = dict(map(json.loads, lines))
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_what_it_prints_with_mlx_lm(
    printed: dict[str, dict[str, list[str]]], script: str
) -> None:
    wanted, found = (
        [SPACE_IN_FRONT.sub(r"\1", line) for line in printed[package][script]]
        for package in ("mlx_lm", "mlx_openelm")
    )
    assert "Traceback (most recent call last):" not in wanted
    assert found == wanted
