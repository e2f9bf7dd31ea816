"""PyTorch, eager: the network in plain torch, with a key/value cache written in place.

A quantized model is dequantized. What is measured is what PyTorch does well with this network, not
Apple's published code, which concatenates its cache at every token.
"""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.convert.checkpoint import open_directory

from . import Measured, Runtime, Workload


def version() -> str:
    """Of the package."""
    return metadata.version("torch")


def load(directory: Path) -> Runtime:
    """On the GPU of a Mac (MPS) if there is one, else on the CPU.

    In float32, but for MPS with weights that are stored in half precision or quantized: float16.
    """
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    checkpoint = open_directory(directory)
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    half = device == "mps" and stored != {"float32"}
    weights = {}
    for name, tensor in checkpoint.tensors.items():
        values = torch.from_numpy(np.array(tensor.read().astype(_float32())))
        weights[name] = values.to(device, torch.float16 if half else torch.float32)

    torch.set_grad_enabled(False)

    def run(workload: Workload) -> Measured:
        [prompt] = workload.prompts
        start = time.perf_counter()
        length = len(prompt) + workload.gen_tokens
        network = Network(torch, checkpoint.config, weights, length)
        tokens = [network.next_token(torch.tensor(prompt, device=device))]
        times = [time.perf_counter() - start]
        for _ in range(workload.gen_tokens - 1):
            tokens.append(network.next_token(torch.tensor(tokens[-1:], device=device)))
            times.append(time.perf_counter() - start)
        return Measured(times[0], times[-1] - times[0], [tokens], times)

    dtype = "float16" if half else "float32"
    quantized = checkpoint.source.quantization is not None
    note = f"weights dequantized to {dtype}" if quantized else f"computes in {dtype}"
    return Runtime(run, note=note)


def _float32() -> Any:
    import mlx.core as mx

    return mx.float32


class Network:
    """The network and one sequence's cache, of `length` positions."""

    def __init__(
        self, torch: Any, config: OpenELMConfig, weights: dict[str, Any], length: int
    ) -> None:
        self.torch, self.config, self.weights = torch, config, weights
        like = weights["transformer.norm.weight"]
        self.cache = [
            like.new_zeros((2, 1, heads, length, config.head_dim)) for heads in config.num_kv_heads
        ]
        pairs = torch.arange(config.head_dim // 2, device=like.device) * 2 / config.head_dim
        positions = torch.arange(length, device=like.device)
        angles = torch.outer(positions, config.rope_freq_constant**-pairs).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
        self.seen = 0

    def next_token(self, ids: Any) -> int:
        """The likeliest token after `ids` [L], which continue what has been seen."""
        return int(self.logits(ids)[-1].argmax())

    def logits(self, ids: Any) -> Any:
        """Of the last of `ids` [L]: [1, vocab_size]."""
        w, functional = self.weights, self.torch.nn.functional
        x = w["transformer.token_embeddings.weight"][ids][None]
        for i in range(self.config.num_transformer_layers):
            layer = f"transformer.layers.{i}."
            x = x + self._attention(i, layer, self._norm(x, layer + "attn_norm"))
            h = functional.linear(self._norm(x, layer + "ffn_norm"), w[layer + "ffn.proj_1.weight"])
            if self.config.ffn_with_glu:
                gate, up = h.chunk(2, -1)
                h = functional.silu(gate) * up
            else:
                h = functional.silu(h)
            x = x + functional.linear(h, w[layer + "ffn.proj_2.weight"])
        self.seen += len(ids)
        x = self._norm(x[:, -1:], "transformer.norm")
        tied = self.config.share_input_output_layers
        head = "transformer.token_embeddings.weight" if tied else "lm_head.weight"
        return functional.linear(x, w[head])[0]

    def _attention(self, i: int, layer: str, x: Any) -> Any:
        config, functional = self.config, self.torch.nn.functional
        heads, kv_heads = config.num_query_heads[i], config.num_kv_heads[i]
        length, end = x.shape[1], self.seen + x.shape[1]
        qkv = functional.linear(x, self.weights[layer + "attn.qkv_proj.weight"])
        qkv = qkv.view(1, length, -1, config.head_dim).transpose(1, 2)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
        if config.normalize_qk_projections:
            q, k = self._norm(q, layer + "attn.q_norm"), self._norm(k, layer + "attn.k_norm")
        q, k = self._rotated(q, end), self._rotated(k, end)
        self.cache[i][0, :, :, self.seen : end] = k
        self.cache[i][1, :, :, self.seen : end] = v
        k, v = self.cache[i][:, :, :, :end]
        y = functional.scaled_dot_product_attention(
            q, k, v, is_causal=length > 1 and self.seen == 0, enable_gqa=True
        )
        y = y.transpose(1, 2).reshape(1, length, -1)
        return functional.linear(y, self.weights[layer + "attn.out_proj.weight"])

    def _rotated(self, x: Any, end: int) -> Any:
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[self.seen : end], self.sin[self.seen : end]
        return x * cos + self.torch.cat([-b, a], -1) * sin

    def _norm(self, x: Any, name: str) -> Any:
        weight = self.weights[name + ".weight"]
        return self.torch.nn.functional.rms_norm(
            x, (x.shape[-1],), weight, self.config.rms_norm_eps
        )
