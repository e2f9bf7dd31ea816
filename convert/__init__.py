"""Other people's checkpoints become model directories: `python -m mlx_openelm.convert`."""
