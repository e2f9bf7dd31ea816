"""The C library for CPUs (mlx_openelm/backends/cpu/src); all else is in pyproject.toml.

It needs a C++ compiler, and neither Python's headers nor MLX's. Where it can't be compiled, the
package is installed without it. On a Mac nothing but setuptools is needed.
"""

import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = "-std=c++17 -O3 -g0 -fno-strict-aliasing -fvisibility=hidden"
SOURCES = Path("mlx_openelm/backends/cpu/src")

runpy.run_path(str(Path(__file__).parent / "scripts" / "supported.py"), run_name="__main__")


class BuildLibrary(build_ext):
    """Names the library without Python's version: it fits every one."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file of an extension, from the package's root."""
        return f"{fullname.replace('.', '/')}.so"


library = Extension(
    "mlx_openelm.backends.cpu.libopenelm",
    sources=[str(file) for file in sorted(SOURCES.glob("*.cpp"))],
    depends=[str(file) for file in (*SOURCES.glob("*.h"), *SOURCES.glob("*.inc"))],
    extra_compile_args=[*FLAGS.split(), "-pthread", "-Wno-psabi"],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)

setup(
    ext_modules=[library] if sys.platform == "linux" else [],
    cmdclass={"build_ext": BuildLibrary},
)
