"""Flip, cut and splice bytes of valid checkpoints of every kind, and read what comes out.

    python scripts/fuzz_readers.py 100000 [SEED]

Of a directory one file is changed. Pickles inside zip files, and JSON (of a directory, or in the
header of a safetensors file) are also changed as such, so that what is around them stays valid.
Every input must give tensors or an `InputError`, within 10 seconds and 1 GiB of memory; what can
be read is converted too. Meanwhile Python itself watches (audit hooks, PEP 578): no stranger's
module may be imported, nothing started or connected to, and nothing written outside of the folder
that this script works in. An input that does anything else is kept as fuzz-failure, and the
status is 1.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent.parent))


from mlx_openelm import OpenELM
from mlx_openelm.backends import cpu
from mlx_openelm.checkpoint.adapter_files import is_adapter, open_adapter, read_safetensors
from mlx_openelm.checkpoint.adapter_peft import alpha_over_rank, split
from mlx_openelm.checkpoint.adapters import apply_adapter
from mlx_openelm.checkpoint.names import map_names
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.convert.adapters import corenet_adapter, merge_adapter
from mlx_openelm.convert.checkpoint import READERS, open_checkpoint
from mlx_openelm.convert.geometry import infer_config
from mlx_openelm.convert.sources import LazyTensor, open_source
from mlx_openelm.convert.writer import Options, convert
from mlx_openelm.errors import InputError
from mlx_openelm.model.quantization import Scheme, quantize
from mlx_openelm.model.shapes import tensor_shapes
from tests.checkpoints import EDITS, FIXTURES, Member, mutated, raw, safetensors, unzipped, zipped

SECONDS, MEMORY = 10, 1 << 30
TINY = OpenELMConfig.scaled(
    vocab_size=12, model_dim=64, head_dim=16, num_transformer_layers=2, ffn_dim_divisor=64
)
VALUES = (None, True, -1, 0, 1, 7, 64, 2**31, 2**63, 1e308, float("nan"), "", "x", "\n", [], {})


def write_kinds(parent: Path) -> list[Path]:
    """A valid checkpoint of every kind, a file or a directory each."""
    arrays = {
        name: mx.random.normal(shape, key=mx.random.key(i)).astype(mx.float16)
        for i, (name, shape) in enumerate(tensor_shapes(TINY).items())
    }
    config = TINY.to_dict()
    paths = {name: parent / name for name in ("sharded", "bin", "mlx", "mxfp4", "apple")}
    for path in paths.values():
        path.mkdir()
    paths["mlx_lora"] = parent / "mlx_lora"
    mx.save_safetensors(str(parent / "file.safetensors"), {"a": mx.ones((2, 3)), "b": mx.zeros(4)})

    halves = dict(list(arrays.items())[:9]), dict(list(arrays.items())[9:])
    for file, half in zip("ab", halves, strict=True):
        mx.save_safetensors(str(paths["sharded"] / f"{file}.safetensors"), half, {"format": "pt"})
    weight_map = {n: f"{f}.safetensors" for f, half in zip("ab", halves, strict=True) for n in half}
    write_json(paths["sharded"] / "model.safetensors.index.json", {"weight_map": weight_map})
    shutil.copy(FIXTURES / "float32.pt", paths["bin"] / "pytorch_model.bin")

    schemes = {"mlx": Scheme(32, 4), "mxfp4": Scheme(32, 4, "mxfp4"), "apple": Scheme()}
    for name, scheme in schemes.items():
        stored = packed(arrays, scheme, embeddings=name != "apple")
        file = "model" if name != "apple" else "weights"
        mx.save_safetensors(str(paths[name] / f"{file}.safetensors"), stored, {"format": "mlx"})
    override = {"transformer.layers.0.attn.qkv_proj": schemes["mlx"].to_dict()}
    configs = {
        "sharded": config,
        "bin": infer(base()).to_dict(),
        "mlx": {**config, "quantization": {**schemes["mlx"].to_dict(), **override}},
        "mxfp4": {**config, "quantization": schemes["mxfp4"].to_dict()},
        "apple": {
            "model_name": "OpenELM-270M",
            "vocab_size": 12,
            "max_context_length": 64,
            "quantization": {"group_size": 64, "bits": 4},
        },
    }
    for name, values in configs.items():
        write_json(paths[name] / "config.json", values)
    paths["mlx_lora"].mkdir()
    module = "transformer.layers.0.attn.out_proj"
    parts = {f"{module}.lora_a": mx.ones((4, 2)), f"{module}.lora_b": mx.ones((2, 8))}
    mx.save_safetensors(str(paths["mlx_lora"] / "adapters.safetensors"), parts)
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}}
    write_json(paths["mlx_lora"] / "adapter_config.json", settings)
    fixtures = ("layouts.pt", "float16.pt", "training_checkpoint_last.pt")
    adapters = ("lora.pt", "dora.pt", "peft_lora", "peft_dora", "peft_tokens_resized")
    return [
        *(FIXTURES / name for name in (*fixtures, *adapters)),
        parent / "file.safetensors",
        *paths.values(),
    ]


def packed(arrays: dict[str, mx.array], scheme: Scheme, embeddings: bool) -> dict[str, mx.array]:
    """The arrays as MLX stores them; without `embeddings`, as Apple's example names them."""
    stored: dict[str, mx.array] = {}
    for name, array in arrays.items():
        module = name.removesuffix(".weight").removeprefix("" if embeddings else "transformer.")
        if array.ndim == 2 and (embeddings or module != "token_embeddings"):
            stored |= {f"{module}.{part}": a for part, a in quantize(array, scheme).arrays()}
        else:
            stored[f"{module}.weight"] = array
    return stored


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))


def base() -> dict[str, LazyTensor]:
    """The base of the adapters among the fixtures."""
    return map_names(open_source(FIXTURES / "float32.pt").tensors)[0]


def with_pickle(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The same checkpoint with its pickle changed, and the checksum put right."""
    members = unzipped(data)
    name = next(name for name in members if name.endswith("/data.pkl"))
    members[name] = change(members[name])
    return zipped([Member(name, member) for name, member in members.items()])


def with_json(data: bytes, chance: random.Random) -> bytes:
    """JSON, or a safetensors file, with some of its values or keys replaced."""
    bare = data.startswith((b"{", b"["))
    length = len(data) if bare else 8 + int.from_bytes(data[:8], "little")
    document = json.loads(data[0 if bare else 8 : length])
    for _ in range(chance.randint(1, 3)):
        change_json(document, chance)
    return json.dumps(document).encode() if bare else safetensors(document, data[length:])


def change_json(node: Any, chance: random.Random) -> None:
    """Replace, rename or remove something somewhere below `node`."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key = chance.choice(keys)
    if isinstance(node[key], (dict, list)) and node[key] and chance.random() < 0.7:
        change_json(node[key], chance)
        return
    how = chance.choice(("replace", "copy", "nudge", "rename", "remove"))
    if how == "replace":
        node[key] = chance.choice(VALUES)
    elif how == "copy":
        node[key] = node[chance.choice(keys)]
    elif how == "nudge" and isinstance(node[key], (int, float)):
        node[key] = chance.choice((node[key] + 1, node[key] - 1, node[key] * 2, node[key] // 2))
    elif how == "rename" and isinstance(node, dict):
        node[chance.choice((f"{key}\n", str(key)[:-1], "x", chance.choice(keys)))] = node.pop(key)
    else:
        del node[key]


def changed(data: bytes, name: str, chance: random.Random) -> tuple[str, bytes]:
    """How a file was changed, in a word, and its bytes."""
    edits = [
        (chance.choice(EDITS), *(chance.randrange(n) for n in (1 << 20, 65, 1 << 20)))
        for _ in range(chance.randint(1, 4))
    ]
    inside = chance.random() < 0.6
    if inside and data.startswith(b"PK"):
        return "pickle", with_pickle(data, lambda pickle: mutated(pickle, edits))
    if inside and name.endswith((".json", ".safetensors")):
        return "JSON", with_json(data, chance)
    return "bytes", mutated(data, edits)


def read(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, of an adapter those of the merged model."""
    if is_adapter(path):
        weights = base()
        tensors, _, _ = merge_adapter(weights, open_adapter(path, READERS), infer(weights))
        in_memory(path, weights)
    else:
        tensors, parts = split(open_source(path).tensors)
        if parts:
            weights = map_names(tensors)[0]
            adapter = corenet_adapter(path, parts, alpha_over_rank(3))
            tensors, _, _ = merge_adapter(weights, adapter, infer(weights))
    found = {name: raw(lazy.read()) for name, lazy in tensors.items()}
    assert sum(map(len, found.values())) <= 100 * (size(path) + size(FIXTURES / "float32.pt"))
    return found


def in_memory(path: Path, weights: dict[str, LazyTensor]) -> None:
    """Merge an adapter as the runtime does when it loads a model."""
    arrays = {name: tensor.read() for name, tensor in weights.items()}
    adapter = open_adapter(path, {".safetensors": read_safetensors})
    merged, config, _ = apply_adapter(adapter, arrays, infer(weights), None)
    OpenELM(config, merged)


def infer(tensors: dict[str, LazyTensor]) -> OpenELMConfig:
    """The geometry of these tensors."""
    return infer_config({name: tensor.shape for name, tensor in tensors.items()})


def size(path: Path) -> int:
    """Bytes of a file, or of all in a directory."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def outcome(path: Path, tensors: dict[str, bytes]) -> str:
    """What a changed checkpoint gives: the tensors of the valid one, other ones, or a refusal."""
    try:
        found = read(path)
    except InputError as error:
        check(error)
        return "refused"
    kind = "the same" if found == tensors else "other tensors"
    try:
        convert_all(path)
    except InputError as error:
        check(error)
        return f"{kind}, not converted"
    return f"{kind}, converted"


def convert_all(path: Path) -> None:
    """Make a model directory of it, beside it."""
    adapter = is_adapter(path) or split(open_source(path).tensors)[1]
    checkpoint = open_checkpoint(path, base=FIXTURES / "float32.pt" if adapter else None)
    out = path.with_name("output")
    convert(checkpoint.tensors, checkpoint.config, out, Options(), force=True)


def check(error: InputError) -> None:
    """A refusal is one short line."""
    assert "\n" not in str(error) and len(str(error)) <= 2000, error


FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn")
FORBIDDEN += ("socket.connect", "pickle.find_class", "code.__new__")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
OURS = ("mlx_openelm", "mlx", "numpy")


def watch(folder: Path) -> Callable[[bool], None]:
    """From now on, end the script when anything is done that reading must not do.

    Returns:
        A switch for it.
    """
    on = True

    def inside(path: object) -> bool:
        return not isinstance(path, str) or Path(path).absolute().is_relative_to(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not on:
            return
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            allowed = not writes or inside(path)
        elif event in CHANGES:  # a path under a descriptor has been opened, that is, checked
            allowed = arguments[-1] != -1 or all(map(inside, arguments))
        elif event == "import":
            top = arguments[0].partition(".")[0]
            allowed = top in OURS or top in sys.stdlib_module_names
        elif event == "ctypes.dlopen":
            allowed = arguments[0] is None  # this process, for the system's rename
        else:
            allowed = event not in FORBIDDEN
        if not allowed:
            raise SystemExit(f"{event} {arguments}")  # no Exception, as in `too_slow`

    def switch(value: bool) -> None:
        nonlocal on
        on = value

    sys.addaudithook(hook)
    return switch


def limit_memory() -> None:
    """Let the process grow by `MEMORY` bytes of address space, no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main(count: int, seed: int) -> int:
    """Try `count` inputs; returns the exit status."""
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    slowest, which = 0.0, ""
    with tempfile.TemporaryDirectory() as directory:
        kinds = write_kinds(Path(directory))
        tensors = {kind: read(kind) for kind in kinds}
        files = {kind: sorted(kind.iterdir()) if kind.is_dir() else [kind] for kind in kinds}
        contents = {file: file.read_bytes() for group in files.values() for file in group}
        cpu.missing()  # loads the C library, with which trial runs compute
        limit_memory()
        watching = watch(Path(directory))
        for _ in range(count):
            kind = chance.choice(kinds)
            file = chance.choice(files[kind])
            how, data = changed(contents[file], file.name, chance)
            path = Path(directory) / "input"
            if kind.is_dir():
                path.mkdir(exist_ok=True)
                for other in files[kind]:
                    (path / other.name).write_bytes(data if other == file else contents[other])
            else:
                path.write_bytes(data)
            what = f"{kind.name}, {how}"
            start = time.perf_counter()
            signal.alarm(SECONDS)
            try:
                outcomes[f"{what}: {outcome(path, tensors[kind])}"] += 1
            except BaseException:
                watching(False)
                shutil.rmtree("fuzz-failure", ignore_errors=True)
                shutil.move(path, "fuzz-failure")
                print(f"fuzz-failure, made from {what} of {file.name}, breaks", file=sys.stderr)
                raise
            finally:
                signal.alarm(0)
            seconds = time.perf_counter() - start
            if seconds > slowest:
                slowest, which = seconds, what
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for what, times in sorted(outcomes.items()):
        print(f"{times:8} {what}")
    print(f"{count} inputs, seed {seed}, the slowest took {slowest:.2f} s ({which})")
    return 0


def too_slow(*_: object) -> None:
    raise SystemExit(f"more than {SECONDS} s")  # no Exception: a reader must not catch it


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, too_slow)
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(arguments + [10_000, 0][len(arguments) :])))
