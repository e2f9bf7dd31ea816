"""The libraries that help MLX's CPU backend; all else is in pyproject.toml.

They are plain shared libraries, loaded with ctypes: no Python API, so one build serves every
Python. Where they can't be compiled, the package is installed without them.
"""

import sys
import sysconfig

from setuptools import Extension, setup

# A Python without the GIL has no stable ABI, and setuptools refuses to name one for it
stable = not sysconfig.get_config_var("Py_GIL_DISABLED")


def library(name: str, source: str, *options: str, language: str) -> Extension:
    """`name` in the package, of one source file of it."""
    return Extension(
        f"mlx_openelm.{name}",
        sources=[f"mlx_openelm/{source}"],
        extra_compile_args=[*options, "-fvisibility=hidden", "-pthread"],
        extra_link_args=["-pthread"],
        language=language,
        py_limited_api=stable,
        optional=True,
    )


libraries = [
    library("_sgemm", "sgemm.c", "-O3", "-std=gnu11", language="c"),
    library("_allocator", "allocator.cpp", "-O2", "-std=c++17", language="c++"),
]

if sys.platform == "linux":
    options = {"bdist_wheel": {"py_limited_api": "cp310"}} if stable else {}
    setup(ext_modules=libraries, options=options)
else:
    setup()
