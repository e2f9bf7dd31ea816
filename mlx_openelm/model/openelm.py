"""A network with its weights: tokens in, logits out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import mlx.core as mx

from .. import device
from ..backends import cpu
from ..config import OpenELMConfig
from ..errors import InputError, OpenELMError
from . import network
from .buffers import Buffer, view
from .cache import KVCache
from .quantization import Quantization, Scheme
from .shapes import parameter_count
from .token_ids import check_tokens
from .weights import dequantize, make_weights, named, random_arrays

# Lengths that a compiled step is made for; in between, tokens are padded. Of short ones there are
# many, since verifying k drafted tokens is a step of k + 1.
LENGTHS = (1, 2, 3, 5, 9, 17, 32, 64, 96, 128, 192, 256, 384, 512)

SHORT = 64  # tokens of a step that takes less time than tracing it


class OpenELM:
    """A network with its weights: `model(tokens, cache) -> logits`.

    Args:
        config: the geometry.
        arrays: tensors by their name on disk (`transformer.layers.0.attn.qkv_proj.weight`, …; a
            quantized matrix has `.scales` and perhaps `.biases` beside its `.weight`). Without
            it the weights are random.
        quantization: the schemes of the quantized matrices.
        dtype: what to compute in; floating-point tensors are cast to it.
        policy: how to compute (default: what suits the device).

    Raises:
        InputError: when a tensor is missing, too many, or of the wrong shape or dtype; names it.
    """

    def __init__(
        self,
        config: OpenELMConfig,
        arrays: Mapping[str, mx.array] | None = None,
        quantization: Quantization | None = None,
        dtype: mx.Dtype = mx.float32,
        policy: device.Policy | None = None,
    ) -> None:
        self._process = os.getpid()
        self.config = config
        self.quantization = quantization
        self.dtype = dtype
        self.policy = policy or device.policy()
        if arrays is None:
            arrays = random_arrays(config)
        self._native = native = self.policy.native and dtype == mx.float32
        self.weights = make_weights(config, arrays, quantization, dtype, as_stored=native)
        if quantization is not None and (native or self.policy.dequantize(parameter_count(config))):
            multiplies = cpu.can_multiply if native else network.multiplies
            self.weights = dequantize(self.weights, dtype, multiplies)
        self.traces = 0  # steps that took longer because the policy compiles: once a shape, or so
        self._steps: dict[tuple[Scheme | None, bool, bool], Callable[..., _Out]] = {}
        self._short_steps: Counter[int] = Counter()  # that weren't compiled, by length

    def __call__(
        self,
        tokens: mx.array,
        cache: KVCache | Sequence[KVCache] | None = None,
        last_only: bool = False,
    ) -> mx.array:
        """Logits of the tokens that follow. Waits for `tokens`, to check them.

        Args:
            tokens: [B, L] integers.
            cache: of the B sequences; the tokens continue what it holds and are added to it. (Or
                a list of one, as `make_prompt_cache` returns it.)
            last_only: only the last position's logits, so that no [L, vocab_size] matrix is made.

        Returns:
            [B, L, vocab_size], or [B, 1, vocab_size], in `dtype`.

        Raises:
            InputError: when `tokens` aren't ids of the model's vocabulary, or don't fit into its
                context; when the cache is of a model of another geometry.
        """
        check_tokens(tokens, self.config.vocab_size)
        return self.step(tokens, cache, last_only)

    def step(
        self,
        tokens: mx.array,
        cache: KVCache | Sequence[KVCache] | None = None,
        last_only: bool = False,
    ) -> mx.array:
        """As a call, for tokens that are known to be ids: doesn't check or wait for them.

        Raises:
            InputError: when they don't fit into the context, or the cache is another model's.
        """
        if os.getpid() != self._process:
            raise OpenELMError(
                "the model was loaded in the process that this one was forked from, and MLX's "
                "threads don't exist here: load it in this process, or start processes with spawn"
            )
        if cache is None:
            cache = self.make_cache()
        elif not isinstance(cache, KVCache):
            (cache,) = cache
        if cache.config is not self.config and cache.config != self.config:
            raise InputError("the cache is of a model of another geometry")
        batch, length = tokens.shape
        if self._native:
            cache.reserve(batch, length)
            logits = self._network(tokens, cache, last_only)
            cache.offset += length
            return logits
        # What pads a step is overwritten by the next one; a ring would lose old tokens to it.
        padded = length
        # A context that slides takes steps of many lengths, which would each be traced.
        compiled = self.policy.compiled and (cache.ring is None or length == 1)
        if compiled and cache.ring is None:
            padded = next((n for n in LENGTHS if n >= length), length)
            if 1 < padded <= SHORT and self._short_steps[padded] < self.policy.compile_after:
                self._short_steps[padded] += 1
                padded, compiled = length, False
        cache.reserve(batch, length, padded)
        if padded > length:
            tokens = mx.pad(tokens, [(0, 0), (0, padded - length)])
        step = self._step(cache.scheme, last_only and padded > 1, compiled)
        ring = None if cache.max_size is None else mx.array(cache.max_size)
        logits, cache.buffers = step(
            tokens,
            cache.buffers,
            mx.array(cache.offset),
            mx.array([length - 1]),
            cache.starts,
            ring,
        )
        cache.offset += length
        return logits if last_only or padded == length else logits[:, :length]

    def prepare(self) -> None:
        """Read the weights now, and not in the first step."""
        mx.eval(self.parameters())
        if self._native:
            self._network  # noqa: B018

    @cached_property
    def _network(self) -> cpu.Network:
        return cpu.Network(self.config, self.weights)

    def _step(self, scheme: Scheme | None, last_only: bool, compiled: bool) -> Callable[..., _Out]:
        key = (scheme, last_only, compiled)
        if key in self._steps:
            return self._steps[key]
        run: network.Step = network.make_step(self.config, self.weights, scheme)

        def step(
            tokens: mx.array,
            buffers: list[Buffer],
            offset: mx.array,
            last: mx.array,
            starts: mx.array | None,
            max_size: mx.array | None,
        ) -> _Out:
            self.traces += self.policy.compiled
            seen = view(offset, tokens.shape[1], buffers[0][0].shape[2], max_size, starts)
            return run(tokens, buffers, seen, last if last_only else None)

        if compiled:
            mx.eval(self.parameters())  # what isn't evaluated would be traced, and done every time
            step = mx.compile(step)
        self._steps[key] = step
        return step

    def make_cache(
        self,
        max_size: int | None = None,
        kv_bits: int | None = None,
        lengths: Sequence[int] | None = None,
        *,
        group_size: int | None = None,
        quantized_from: int = 0,
    ) -> KVCache:
        """An empty cache for this model.

        Args:
            max_size: let the context slide (see `KVCache`).
            kv_bits: quantize keys and values to 8 or 4 bits.
            lengths: of sequences that will be padded in front to the longest.
            group_size, quantized_from: of `kv_bits` (see `KVCache`).

        Raises:
            InputError: when the model or the cache can't have that.
        """
        cache = KVCache(
            self.config,
            max_size,
            self.dtype,
            kv_bits,
            lengths,
            group_size=group_size,
            quantized_from=quantized_from,
        )
        cache.made_for = self
        return cache

    def parameters(self) -> dict[str, mx.array]:
        """All tensors by their name on disk, as they are held in memory."""
        return dict(named(self.config, self.weights))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as held in memory."""
        return sum(array.nbytes for array in self.parameters().values())


_Out = tuple[mx.array, list[Buffer]]
