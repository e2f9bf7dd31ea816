"""Weights by the names of a model directory, with the geometry that they have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.names import map_names, with_embeddings

from .sources import LazyTensor, Source, open_source
from .writer import check_shapes, without_redundant_head


@dataclass(frozen=True)
class Checkpoint:
    """A source with its tensors by the names of a model directory, the geometry, and notes."""

    source: Source
    tensors: dict[str, LazyTensor]
    config: OpenELMConfig
    notes: list[str]


def open_directory(path: Path) -> Checkpoint:
    """A model directory, its tensors checked against its config. Reads headers only.

    Raises:
        InputError: when it isn't one, or is damaged.
    """
    source = open_source(path)
    if source.config is None:
        raise InputError(f"{path}: no config.json in it; this is not a model directory")
    tensors, notes = map_names(source.tensors)
    tensors = with_embeddings(tensors, source.config.share_input_output_layers)
    tensors, more = without_redundant_head(tensors, source.config)
    check_shapes(tensors, source.config)
    return Checkpoint(source, tensors, source.config, [*source.notes, *notes, *more])
