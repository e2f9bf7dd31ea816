"""The libraries that help MLX's CPU backend on Linux; all else is in pyproject.toml.

Where they can't be compiled, the package is installed without them. On a Mac there are none, and
nothing but setuptools is needed.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

runpy.run_path(str(Path(__file__).parent / "scripts" / "supported.py"), run_name="__main__")


def library(name: str, sources: str, *options: str, **more: object) -> Extension:
    """`name` in the package, of those sources."""
    return Extension(
        f"mlx_openelm.{name}",
        sources=[f"mlx_openelm/cpu/{source}" for source in sources.split()],
        depends=[f"mlx_openelm/cpu/{file}.h" for file in ("chunks", "kernels", "pool", "vectors")],
        extra_compile_args=[*options, "-g0", "-fvisibility=hidden", "-pthread"],
        extra_link_args=["-pthread"],
        optional=True,
        **more,
    )


def folders(package: str) -> list[Path]:
    """Where `package` is installed, without importing it."""
    spec = find_spec(package)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


# Loaded with ctypes, before MLX
libraries = [
    library("_sgemm", "sgemm.c pool.c", "-O3", "-std=gnu11", language="c"),
    library("_allocator", "allocator.cpp", "-O2", "-std=c++17", language="c++"),
]
# An extension of MLX: it shares MLX's Python types, hence the domain
for mlx in [folder for folder in folders("mlx") if (folder / "include").exists()]:
    for nanobind in folders("nanobind"):
        include = [mlx / "include", nanobind / "include", nanobind / "src"]
        include.append(nanobind / "ext" / "robin_map" / "include")
        libraries.append(
            library(
                "_kernels",
                "primitives.cpp layers.cpp attention.cpp quantized.cpp",
                *("-O3", "-std=c++20", "-fno-strict-aliasing", "-Wno-psabi"),
                language="c++",
                define_macros=[("NB_DOMAIN", "mlx")],
                include_dirs=[str(folder) for folder in include],
                libraries=["mlx"],
                library_dirs=[str(mlx / "lib")],
            )
        )

setup(ext_modules=libraries if sys.platform == "linux" else [])
