"""The place of mlx-lm's `models`: only `cache` is here."""
