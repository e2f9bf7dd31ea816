"""The C library on ARM: compiled by Debian's cross compiler, run by qemu."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import OpenELM, OpenELMConfig, device
from mlx_openelm.backends import cpu
from mlx_openelm.backends.cpu import library
from mlx_openelm.dtypes import dtype_name
from mlx_openelm.model.cache import KVCache
from mlx_openelm.model.quantization import Matrix, Quantization, Scheme, quantize
from mlx_openelm.model.weights import random_arrays

SOURCES = Path(library.__file__).parent / "src"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-pthread", "-Wno-psabi", f"-I{SOURCES}"]
CONFIG = OpenELMConfig(
    vocab_size=40,
    model_dim=128,
    head_dim=32,
    num_transformer_layers=2,
    num_query_heads=(4, 6),
    num_kv_heads=(2, 3),
    ffn_multipliers=(0.5, 1.0),
    ffn_dim_divisor=64,
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if not (shutil.which(COMPILER) and shutil.which(EMULATOR)):
        pytest.skip(f"needs {COMPILER} and {EMULATOR}")
    program = tmp_path_factory.mktemp("arm") / "driver"
    sources = [*SOURCES.glob("*.cpp"), Path(__file__).parent / "step_driver.cpp"]
    command = [COMPILER, *FLAGS, "-static", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    return [EMULATOR, str(program)]


def packed(*parts: object) -> bytes:
    """Integers and arrays end to end, each from a multiple of eight bytes."""
    written = b""
    for part in parts:
        data = np.int32(part).tobytes() if isinstance(part, int) else np.array(part).tobytes()
        written += data + bytes(-len(data) % 8)
    return written


def matrix(m: Matrix) -> bytes:
    rows, columns = m.weight.shape
    if m.scheme is None:
        kind = library.KINDS[dtype_name(m.weight.dtype)]
        raw = m.weight if kind == 0 else m.weight.view(mx.uint16)
        return packed(kind, 1, rows, columns, raw)
    bits = m.scheme.bits
    sizes = (library.KINDS[bits], m.scheme.group_size, rows, columns * 32 // bits)
    return packed(*sizes, m.weight, m.scales, m.biases)


def case(model: OpenELM, tokens: mx.array, cache: KVCache) -> bytes:
    """What step_driver.cpp reads."""
    config, weights = model.config, model.weights
    bits, group = (cache.scheme.bits, cache.scheme.group_size) if cache.scheme else (32, 1)
    sizes = (len(weights.layers), config.model_dim, config.head_dim, int(config.ffn_with_glu))
    data = packed(*sizes, *tokens.shape, 64, bits, group, np.float32(config.rms_norm_eps))
    data += packed(np.float64(config.rope_freq_constant)) + matrix(weights.token_embeddings)
    data += packed(weights.norm)
    for layer, heads, kv_heads in zip(
        weights.layers, config.num_query_heads, config.num_kv_heads, strict=True
    ):
        norms = (layer.attn_norm, layer.ffn_norm, layer.q_norm, layer.k_norm)
        data += packed(heads, kv_heads, *norms)
        data += b"".join(map(matrix, (layer.qkv_proj, layer.out_proj, layer.proj_1, layer.proj_2)))
    return data + packed(tokens)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", 4, 8])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_arm_computes_the_same_logits(
    stored: str | int, kv_bits: int | None, driver: list[str], tmp_path: Path
) -> None:
    """As x86-64, which is held to the reference by test_model.py."""
    if cpu.missing():
        pytest.skip(str(cpu.missing()))
    mx.random.seed(0)
    arrays = {k: v * 3 if v.ndim == 2 else v for k, v in random_arrays(CONFIG).items()}
    quantization = None
    if isinstance(stored, int):
        quantization = Quantization(Scheme(64, stored))
        plain, arrays = arrays, {}
        for name, array in plain.items():
            if array.ndim == 1:
                arrays[name] = array
                continue
            module = name.removesuffix(".weight")
            parts = quantize(array, quantization.default).arrays()
            arrays |= {f"{module}.{part}": a for part, a in parts}
    else:
        arrays = {k: v.astype(getattr(mx, stored)) for k, v in arrays.items()}
    policy = device.Policy("CPU", mx.float32, native=True)
    model = OpenELM(CONFIG, arrays, quantization, policy=policy)
    tokens = mx.random.randint(0, CONFIG.vocab_size, (2, 13)).astype(mx.int32)
    cache = model.make_cache(kv_bits=kv_bits)
    file = tmp_path / "case"
    file.write_bytes(case(model, tokens, cache))
    prompt, token = model(tokens, cache), model(tokens[:, :1], cache)
    done = subprocess.run([*driver, str(file)], check=True, capture_output=True)
    found = np.frombuffer(done.stdout, np.float32)
    wanted = np.concatenate([np.array(prompt).ravel(), np.array(token).ravel()])
    # 8 bits of a key may round differently where it lies between two values
    assert np.abs(found - wanted).max() < (1e-4 if kv_bits is None else 2e-2)
    assert np.abs(wanted).max() > 1
