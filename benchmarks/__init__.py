"""What the runtime does in a second, and how near that is to what the machine could do.

Installed as `mlx_openelm.benchmarks`.
"""
