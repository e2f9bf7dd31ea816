"""A model directory: found, read, written, checked."""

from .directory import load, load_draft, load_model, read_arrays, save_config, save_model

__all__ = ["load", "load_draft", "load_model", "read_arrays", "save_config", "save_model"]
