"""The kernel that MLX's CPU backend multiplies few rows with; all else is in pyproject.toml.

It is a plain shared library, loaded with ctypes: no Python API, so one build serves every Python.
Where it can't be compiled, the package is installed without it.
"""

import sys
import sysconfig

from setuptools import Extension, setup

# A Python without the GIL has no stable ABI, and setuptools refuses to name one for it
stable = not sysconfig.get_config_var("Py_GIL_DISABLED")

kernel = Extension(
    "mlx_openelm._sgemm",
    sources=["mlx_openelm/sgemm.c"],
    extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
    py_limited_api=stable,
    optional=True,
)

if sys.platform == "linux":
    options = {"bdist_wheel": {"py_limited_api": "cp310"}} if stable else {}
    setup(ext_modules=[kernel], options=options)
else:
    setup()
