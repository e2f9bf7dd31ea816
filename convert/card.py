"""The model card of a converted directory: what it is, what it was made from, how to run it."""

from __future__ import annotations

from pathlib import Path

from mlx_openelm.checkpoint.stored_quantization import stored_quantization
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.files import find_in, read_json

from .outputs import RECORD

_CARD = """\
---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- openelm
{front}---

# {repo}

An OpenELM model for [MLX](https://github.com/ml-explore/mlx), {weights}{origin}.

    openelm-generate --model {repo} --prompt "Once upon a time"
    mlx_lm.generate --model {repo} --prompt "Once upon a time"

| | |
| --- | --- |
| layers | {layers} |
| width | {width} |
| vocabulary | {vocabulary:,} |
| context | {context:,} tokens |
"""


def model_card(directory: Path, repo: str, base_model: str | None, licence: str | None) -> str:
    """The text of a README.md for the directory as a Hugging Face repository.

    Raises:
        InputError: when the directory has no usable `config.json`.
    """
    file, record = directory / "config.json", find_in(directory, RECORD)
    values = read_json(file)
    config = OpenELMConfig.from_dict(values, str(file))
    quantization = stored_quantization(values, str(file))
    made = read_json(record) if record else {}
    dtype = made.get("options", {}).get("dtype")
    weights = f"weights in {dtype}" if dtype else "converted"
    if quantization is not None:
        scheme = quantization.default
        weights = f"quantized to {scheme.bits} bits ({scheme.mode}, groups of {scheme.group_size})"
    base_model = base_model or made.get("source", {}).get("repo")
    front = f"license: {licence}\n" if licence else ""
    front += f"base_model: {base_model}\n" if base_model else ""
    what = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else None
    what = what or made.get("source", {}).get("kind")
    origin = f", made from {what}" if what else ""
    origin += f" with mlx-openelm {made['versions']['mlx-openelm']}" if "versions" in made else ""
    return _CARD.format(
        front=front,
        repo=repo,
        weights=weights,
        origin=origin,
        layers=config.num_transformer_layers,
        width=config.model_dim,
        vocabulary=config.vocab_size,
        context=config.max_context_length,
    )
