"""Other people's checkpoints become model directories: `python -m mlx_openelm.convert`.

The package can be called: `mlx_openelm.convert(hf_path, mlx_path)` is the function `convert` in it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def convert(*arguments: Any, **options: Any) -> None:
    """x"""


class _Callable(ModuleType):
    """The type of this package."""

    def __call__(self, *arguments: Any, **options: Any) -> None:
        convert(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
