"""Text that is generated, as it comes. Names, arguments and responses are mlx-lm's."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from ..errors import InputError
from ..model.cache import KVCache
from ..model.openelm import OpenELM
from ..model.token_ids import as_prompt
from ..prompt_cache.prompt_cache import PromptCache
from .decoding import plain_steps, token_limit
from .options import Keywords, Options
from .stopping import StopStrings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..tokenizer.tokenizer import Tokenizer
    from .speculative.loop import Speculation

Prompt = str | Sequence[int] | mx.array


@dataclass(frozen=True)
class GenerationResponse:
    """One generated token.

    Attributes:
        text: the text that is now certain; may be empty.
        token: its id.
        logprobs: log-probabilities of all tokens, [vocab]; not computed until used.
        from_draft: whether a draft model, or prompt lookup, proposed it.
        prompt_tokens, generation_tokens: counts; the latter includes this token.
        prompt_tps: prompt tokens per second until the first token.
        generation_tps: generated tokens per second since the first.
        peak_memory: the most that MLX has held so far, in GB (1e9 bytes).
        finish_reason: "stop" after an end-of-sequence token or a stop string, "length" when
            `max_tokens` or the context is used up, None while there is more.
        cached_tokens: those of the prompt that a `PromptCache` held already.
        speculation: statistics of speculative decoding so far; None without drafts.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    cached_tokens: int = 0
    speculation: Speculation | None = None


def stream_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_tokens: int = 256,
    draft_model: OpenELM | None = None,
    stream: None = None,
    **options: Unpack[Keywords],
) -> Generator[GenerationResponse, None, None]:
    """Continue a prompt; one response per token, the last one with a `finish_reason`.

    Args:
        prompt: text (a `<s>` is put in front unless it is there) or token ids (taken as is).
        max_tokens: how many tokens at most; -1: until the context is full.
        draft_model: a smaller model with the same tokenizer, which drafts several tokens a step.
        stream: of mlx-lm; only None.
        options: see `Options`.

    Raises:
        InputError: at the call, when the prompt is empty or an argument is out of its range; with
            the first token, when the prompt is too long.
        TypeError: for an argument of another name.
    """
    if max_tokens == 0:
        raise InputError("max_tokens must be at least 1 (or -1: no limit), not 0")
    checked = Options(max_tokens=max_tokens, draft_model=draft_model, stream=stream, **options)
    stop = checked.stop
    strings = StopStrings((stop,) if isinstance(stop, str) else stop)
    ids = encode_prompt(tokenizer, prompt, model.config.vocab_size)
    return _stream(model, tokenizer, ids, strings, checked, checked.cache(model))


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int) -> mx.array:
    """Token ids [L], int32, of text or of ids.

    Raises:
        InputError: when there is no text, or what isn't a token of the model.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("the prompt is empty")
        bos = tokenizer.bos_token
        prompt = tokenizer.encode(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))
    return as_prompt(prompt, vocab_size)


class TextStream:
    """One sequence's tokens as text: whole characters, up to a stop string, and why it ended.

    `limit`: how many tokens there are at most; None: any number.
    """

    def __init__(self, tokenizer: Tokenizer, stop: StopStrings, limit: int | None) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._eos, self._stop, self._left = tokenizer.eos_token_ids, stop, limit

    def add(self, token: int) -> tuple[str, str | None]:
        """The text that is certain with one more token; the `finish_reason` if it is the last."""
        if self._left is not None:
            self._left -= 1
        ended, full = token in self._eos, self._left == 0
        if not ended:
            self._detokenizer.add_token(token)
        if ended or full:
            self._detokenizer.finalize()
        text = self._stop.feed(self._detokenizer.last_segment)
        if not (ended or full or self._stop.found):
            return text, None
        reason = "stop" if ended or self._stop.found else "length"
        return text + self._stop.finish(), reason


def _stream(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: mx.array,
    stop: StopStrings,
    options: Options,
    cache: KVCache,
) -> Generator[GenerationResponse, None, None]:
    start = time.perf_counter()
    prompt_size, reused, texts = prompt.size, 0, options.prompt_cache
    use, cached_tokens = None, list[int]()
    if isinstance(texts, PromptCache):
        tokens = cast("list[int]", prompt.tolist())
        reused, cache = texts.begin(tokens), texts.cache
        cached_tokens, prompt = tokens[:reused], prompt[reused:]
        use = cache.begin_use(new_text=prompt.size, appends=False)
    output = TextStream(tokenizer, stop, token_limit(cache, prompt.size, options.max_tokens))
    speculation = None
    if options.drafts:
        from .speculative.loop import Speculation, drafted_steps

        speculation = Speculation()
        steps = drafted_steps(
            prompt,
            model,
            options,
            cache,
            use=use,
            cached_tokens=cached_tokens,
            vocab_size=tokenizer.vocab_size,
            statistics=speculation,
        )
    else:
        steps = _undrafted(
            plain_steps(
                prompt,
                model,
                options,
                cache,
                use=use,
                cached_tokens=cached_tokens,
                vocab_size=tokenizer.vocab_size,
            )
        )
    first = start
    with closing(steps):
        for count, (token, logprobs, from_draft) in enumerate(steps, 1):
            now = time.perf_counter()
            if count == 1:
                first = now
            if isinstance(texts, PromptCache):
                texts.tokens.append(token)
            text, finish_reason = output.add(token)
            if finish_reason:
                steps.close()  # the cache then holds what was given, and nothing beyond
            yield GenerationResponse(
                text=text,
                token=token,
                logprobs=logprobs,
                from_draft=from_draft,
                prompt_tokens=prompt_size,
                prompt_tps=prompt_size / (first - start),
                generation_tokens=count,
                generation_tps=(count - 1) / (now - first) if count > 1 else 0.0,
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
                cached_tokens=reused,
                speculation=speculation,
            )
            if finish_reason:
                return


def _undrafted(
    steps: Generator[tuple[int, mx.array], None, None],
) -> Generator[tuple[int, mx.array, bool], None, None]:
    with closing(steps):
        for token, logprobs in steps:
            yield token, logprobs, False


def generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    verbose: bool = False,
    max_tokens: int = 256,
    draft_model: OpenELM | None = None,
    **options: Unpack[Keywords],
) -> str:
    """The text that continues a prompt.

    Args:
        verbose: print the text as it comes, and the speed.
        max_tokens, draft_model, options: see `stream_generate`.
    """
    text = ""
    for response in stream_generate(model, tokenizer, prompt, max_tokens, draft_model, **options):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(f"\n{summary(response)}")
    return text


def summary(response: GenerationResponse) -> str:
    """The speeds of a finished generation, in mlx-lm's lines, and what drafts have brought."""
    speculation, cached = response.speculation, response.cached_tokens
    kept = f" ({cached} from the prompt cache)" if cached else ""
    drafts = (
        f"\nDrafts: {speculation.acceptance:.0%} of {speculation.drafted} tokens accepted, "
        f"{speculation.tokens_per_step:.2f} tokens per step"
        if speculation
        else ""
    )
    return (
        f"Prompt: {response.prompt_tokens} tokens{kept}, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB{drafts}"
    )
