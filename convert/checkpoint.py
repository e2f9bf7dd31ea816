"""Weights by the names of a model directory, with the geometry that they have."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_openelm.checkpoint.adapter_files import is_adapter, open_adapter
from mlx_openelm.checkpoint.adapter_peft import Scale, alpha_over_rank, split
from mlx_openelm.checkpoint.hub import resolve_source
from mlx_openelm.checkpoint.names import EMBEDDINGS, HEAD, map_names, with_embeddings
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.files import user_path
from mlx_openelm.tokenizer.files import tokenizer_file

from .adapters import corenet_adapter, corenet_scale, merge_adapter
from .geometry import infer_config
from .sources import LazyTensor, Source, open_bin, open_safetensors, open_source
from .writer import check_shapes, without_redundant_head

READERS = {".safetensors": open_safetensors, ".bin": open_bin}
_MAX_CHAIN = 8  # adapters, each the base of the one before


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


def open_checkpoint(
    source: str | Path,
    *,
    config: Path | None = None,
    base: str | Path | None = None,
    lora_alpha: float | None = None,
    ema: bool = False,
    revision: str | None = None,
    known: OpenELMConfig | None = None,
) -> Checkpoint:
    """Open a checkpoint, an adapter merged into its base. Reads headers only.

    Args:
        source: a file, a directory, or a Hugging Face id.
        config: CoreNet's training YAML or a `config.json`, where the checkpoint has none.
        base: what an adapter is merged into; None: what its settings name.
        lora_alpha: of an adapter, in place of what its settings say.
        ema: of a full training checkpoint, the averaged weights.
        revision: of the Hugging Face repository.
        known: the geometry, but for the vocabulary, where neither the checkpoint nor `config`
            has it.

    Raises:
        InputError: when it is not an OpenELM checkpoint, damaged, or hostile.
        OpenELMError: when the hub can't be reached.
    """
    config = None if config is None else user_path(config)
    opened = _Opening(config, known)
    return opened.open(resolve_source(source, revision), base, lora_alpha, ema)


@dataclass(frozen=True)
class _Opening:
    """What holds for a checkpoint and for its base alike; `chain`: the adapters so far."""

    config: Path | None
    known: OpenELMConfig | None
    chain: tuple[Path, ...] = ()

    def open(
        self,
        path: Path,
        base: str | Path | None = None,
        lora_alpha: float | None = None,
        ema: bool = False,
    ) -> Checkpoint:
        if is_adapter(path):
            if ema:
                raise InputError(f"{path}: an adapter, which has no averaged weights (--ema)")
            return self._adapter(path, base, lora_alpha)
        source = open_source(path, ema=ema)
        plain, parts = split(source.tensors)
        tensors, notes = map_names(plain)
        notes = [*source.notes, *notes]
        if not parts and (base is not None or lora_alpha is not None):
            raise InputError(f"{path}: has no adapter; --base and --lora-alpha are for those")
        if not parts or EMBEDDINGS in tensors:
            whole = self._whole(source, tensors, notes)
        else:
            if base is None:
                raise InputError(
                    f"{path}: an adapter without its base weights; name them with --base"
                )
            found = self._base(path, base, None)
            notes = [*found.notes, *notes]
            whole = Checkpoint(found.source, found.tensors | tensors, found.config, notes)
        if not parts:
            return whole
        scale, why = self._corenet_scale(lora_alpha)
        merged, geometry, more = merge_adapter(
            _without_head(whole), corenet_adapter(path, parts, scale), whole.config
        )
        kind = f"{source.kind} with a LoRA or DoRA adapter"
        source = replace(whole.source, kind=kind)
        return Checkpoint(source, merged, geometry, [*whole.notes, *why, *more])

    def _adapter(self, path: Path, base: str | Path | None, lora_alpha: float | None) -> Checkpoint:
        adapter = open_adapter(path, READERS, lora_alpha)
        if base is None and adapter.base is None:
            raise InputError(f"{path}: doesn't say what it was trained on; use --base")
        revision = adapter.revision if base is None else None
        found = self._base(path, base or adapter.base or "", revision)
        tensors, config, notes = merge_adapter(_without_head(found), adapter, found.config)
        source = replace(
            found.source,
            kind=f"{adapter.kind}, merged into its base",
            tokenizer=tokenizer_file(path) or found.source.tokenizer,
            adapters=(path, *found.source.adapters),
        )
        return Checkpoint(source, tensors, config, [*found.notes, *notes])

    def _base(self, path: Path, base: str | Path, revision: str | None) -> Checkpoint:
        chain = (*self.chain, path)
        found = resolve_source(base, revision)
        if any(os.path.samefile(found, adapter) for adapter in chain):
            names = " -> ".join(map(str, (*chain, found)))
            raise InputError(
                f"{path}: its base leads back to an adapter ({names}); name the model that it was "
                "trained on with --base"
            )
        if len(chain) > _MAX_CHAIN:
            raise InputError(f"{path}: more than {_MAX_CHAIN} adapters, each the base of another")
        return replace(self, chain=chain).open(found)

    def _corenet_scale(self, alpha: float | None) -> tuple[Scale, list[str]]:
        if alpha is not None:
            return alpha_over_rank(alpha), []
        yaml = self.config if self.config is not None and _is_yaml(self.config) else None
        scale = corenet_scale(yaml) if yaml else None
        if scale is not None:
            return scale, []
        return lambda module, rank: 1.0, [
            "the file doesn't say the adapter's alpha: taken to be its rank, as in CoreNet's own "
            "recipes (--lora-alpha, or the training YAML as --config, says otherwise)"
        ]

    def _whole(
        self, source: Source, tensors: dict[str, LazyTensor], notes: list[str]
    ) -> Checkpoint:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        stored = [tensors[name].name for name in (EMBEDDINGS, HEAD) if name in tensors]
        if len(stored) > len(set(stored)):  # one tensor by two names: tied
            del shapes[HEAD]
        config, more = self._geometry(source, shapes)
        tensors = with_embeddings(tensors, config.share_input_output_layers)
        return Checkpoint(source, tensors, config, [*more, *notes])

    def _geometry(
        self, source: Source, shapes: dict[str, tuple[int, ...]]
    ) -> tuple[OpenELMConfig, list[str]]:
        if self.config is not None:
            yaml = _is_yaml(self.config)
            read = OpenELMConfig.from_corenet_yaml if yaml else OpenELMConfig.from_json
            return read(self.config), []
        if source.config is not None:
            return source.config, []
        config = infer_config(shapes)
        if self.known is not None:
            return replace(self.known, vocab_size=config.vocab_size), []
        note = (
            f"geometry inferred from the tensors: {config.num_transformer_layers} layers, width "
            f"{config.model_dim}, vocabulary {config.vocab_size}; a context of "
            f"{config.max_context_length} tokens and RoPE's base {config.rope_freq_constant:g} "
            "are taken from the published models (--config says otherwise)"
        )
        return config, [note]


def _without_head(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    return without_redundant_head(checkpoint.tensors, checkpoint.config)[0]


def _is_yaml(path: Path) -> bool:
    return path.suffix.lower() in (".yaml", ".yml")
