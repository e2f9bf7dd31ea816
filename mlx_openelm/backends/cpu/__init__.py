"""The network's step on a CPU: one call of a C library (src/), without MLX's graph.

MLX's CPU backend on Linux multiplies with a reference BLAS, has no vector code for half precision,
and dispatches every small operation. The library computes a whole step on the memory of evaluated
arrays. It knows nothing of MLX and Python: it fits every version of both.
"""

from .library import missing
from .step import PACKED_BITS, Network, can_multiply, multiply

__all__ = ["PACKED_BITS", "Network", "can_multiply", "missing", "multiply"]
