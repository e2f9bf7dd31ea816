"""MLX's fused CPU kernels: whether they are there, and making them.

On a CPU `mx.compile` fuses by writing C++ and running the system's compiler, a second for each
kernel, once on a machine: the libraries stay in the temporary directory. A first run must not stall
for that. So until they are there, steps run uncompiled, and another process makes them in the
background. Without a C++ compiler MLX leaves operations unfused, and nothing has to be made.
"""

from __future__ import annotations

import os
import shutil
import sys
import zlib
from pathlib import Path

import mlx.core as mx

VARIABLE = "MLX_OPENELM_JIT"  # "0": steps are never compiled on a CPU
COMPILER = "g++" if sys.platform == "linux" else "clang++"
# (lengths of a batch's prompts, length, max_size) of steps whose kernels differ
_VARIANTS = (
    ((3,), 1, None),
    ((3,), 3, None),
    ((3,), 64, None),
    ((3,), 1, 8),
    ((3, 3), 3, None),
    ((1, 2), 1, None),
    ((1, 2), 3, None),
    ((1, 2), 64, None),
)
_SOURCES = ("elementwise.py", "exponential.py", "cache.py", "model.py", "jit.py")


def ready() -> bool:
    """Whether a step can be compiled without running a C++ compiler."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return True
    if os.environ.get(VARIABLE) == "0":
        return False
    return _marker().exists() or shutil.which(COMPILER) is None


def _marker() -> Path:
    """A file beside the kernels; its name changes with the code that they come from."""
    here = Path(__file__).parent
    made_of = zlib.crc32(b"".join((here / name).read_bytes() for name in _SOURCES))
    # As C++'s temp_directory_path finds it
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    temporary = next((os.environ[name] for name in names if name in os.environ), "/tmp")
    version: str = mx.__version__  # type: ignore[attr-defined]
    return Path(temporary) / "mlx" / version / "cpu" / f"openelm-{made_of:08x}"


def build_in_background() -> None:
    """Start making the kernels in another process, which goes on when this one ends."""
    if os.environ.get(VARIABLE) == "0":
        return
    import subprocess

    subprocess.Popen(
        [sys.executable, "-c", f"import os, {__name__} as jit; os.nice(10); jit.build()"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def build() -> None:
    """Make the kernels, unless they are there or another process is making them."""
    if ready():
        return
    import fcntl

    from .config import OpenELMConfig
    from .device import Policy
    from .model import OpenELM

    marker = _marker()
    marker.parent.mkdir(parents=True, exist_ok=True)
    with marker.with_name("openelm.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        config = OpenELMConfig.scaled(
            vocab_size=64, model_dim=64, head_dim=32, num_transformer_layers=2
        )
        model = OpenELM(config, policy=Policy("CPU", mx.float32, fast_kernels=False))
        for lengths, length, max_size in _VARIANTS:
            batched = lengths if len(lengths) > 1 else None
            cache = model.make_cache(max_size, lengths=batched)
            for last_only in (True, False):
                tokens = mx.zeros((len(lengths), length), mx.int32)
                mx.eval(model(tokens, cache, last_only), cache.buffers)
        marker.touch()
