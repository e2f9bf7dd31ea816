"""Make the `.pt` files that the tests read: written by real PyTorch, a few kB each.

    python scripts/make_fixtures.py [tests/fixtures]

Beside each FILE.pt stands FILE.npz with what is in it: the values of every tensor in float32, and
`dtypes`, a list of "name=dtype". Needs PyTorch, and PEFT for the adapters.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model.shapes import tensor_shapes

CONFIG = OpenELMConfig.scaled(
    vocab_size=10,
    model_dim=8,
    head_dim=2,
    num_transformer_layers=2,
    num_gqa_groups=2,
    ffn_multipliers=(0.5, 1.0),
    ffn_dim_divisor=4,
)


class Network(nn.Module):
    """Parameters under CoreNet's names, so that `state_dict()` is a real one."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in tensor_shapes(CONFIG).items():
            *path, last = name.removeprefix("transformer.").split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.randn(shape)))


def layouts() -> dict[str, Tensor]:
    """Every way in which a tensor can lie in a storage, and every way in which it is pickled."""
    base = torch.arange(48, dtype=torch.float32)
    half = torch.randn(6, 4).to(torch.bfloat16)
    noted = nn.Parameter(torch.randn(3))
    noted.note = "pickled with state"  # type: ignore[attr-defined]
    return {
        "whole": base,
        "offset": base[5:17],
        "rows": base.view(6, 8)[2:4],
        "columns": base.view(6, 8)[:, 3:6],
        "strided": base[1::3],
        "transposed": base.view(6, 8).t(),
        "permuted": base.view(2, 3, 8).permute(2, 0, 1),
        "half_transposed": half.t(),
        "half": half,
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "parameter_with_state": noted,
        "scalar": torch.tensor(2.5),
        "one_column": base.view(6, 8)[:, 2:3],
        "double": torch.randn(3, dtype=torch.float64),
        "long": torch.tensor([-1, 2**24]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "unsigned": torch.arange(4).to(torch.uint16),  # a storage of bytes, `_rebuild_tensor_v3`
        "chars": torch.tensor([-3, 4], dtype=torch.int8),
    }


def training_checkpoint() -> dict[str, object]:
    """As CoreNet's trainer saves it, after one step of AdamW."""
    network = Network()
    ema = {name: value * 0.5 for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters())
    sum(p.square().sum() for p in network.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return {
        "iterations": 1,
        "epoch": 0,
        "model_state_dict": network.state_dict(),
        "optim_state_dict": optimizer.state_dict(),
        "best_metric": np.float64(3.25),
        "gradient_scalar_state_dict": {"scale": 65536.0, "_growth_tracker": 1},
        "ema_state_dict": OrderedDict(ema),
        "scheduler": {"milestones": Counter([3, 5]), "names": {"a"}, "device": torch.device("cpu")},
        "shape": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
    }


class Adaptable(nn.Module):
    """The network with modules that PEFT knows, so that it can adapt and merge them."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in tensor_shapes(CONFIG).items():
            *path, last = name.removeprefix("transformer.").removesuffix(".weight").split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            made: nn.Module = nn.LayerNorm(shape, bias=False)
            if last == "token_embeddings":
                made = nn.Embedding(*shape)
            elif len(shape) == 2:
                made = nn.Linear(shape[1], shape[0], bias=False)
            module.add_module(last, made)
        # what PEFT asks a model of transformers for
        self.config = {"model_type": "openelm", "vocab_size": CONFIG.vocab_size}

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings, whose output matrix they are too."""
        return self.get_submodule("token_embeddings")

    def get_output_embeddings(self) -> None:
        """None: tied."""


def adapted(
    adapter: str, new_tokens: int = 0, **options: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network with a random adapter of PEFT's, and its tensors once that is merged."""
    from peft import LoraConfig, get_peft_model

    base = Adaptable()
    base.load_state_dict(torch.load("tests/fixtures/float32.pt", weights_only=True))
    if new_tokens:
        weight = base.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        rows = torch.cat([weight, torch.randn(new_tokens, weight.shape[1])])
        base.add_module("token_embeddings", nn.Embedding.from_pretrained(rows))
    config = LoraConfig(r=3, bias="none", **options)
    model = get_peft_model(base, config, adapter_name=adapter)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3 + 0.1
    merged = deepcopy(model).merge_and_unload()  # type: ignore[operator]
    return model, merged.state_dict()


LINEAR = ["qkv_proj", "out_proj", "proj_1", "proj_2"]


def adapters(directory: Path) -> None:
    """CoreNet's LoRA and DoRA checkpoints, and PEFT's directories, with what they merge to.

    CoreNet's layers are PEFT's, adapted, and have its names; its magnitudes were parameters.
    """
    from peft import PeftModel

    torch.manual_seed(1)
    for name, options in {
        "lora": {"target_modules": [*LINEAR, "token_embeddings"], "lora_alpha": 3},
        "dora": {"target_modules": LINEAR, "lora_alpha": 6, "use_dora": True},
    }.items():
        model, merged = adapted("lora", **options)
        state = {
            key.removeprefix("base_model.model.").replace(
                "lora_magnitude_vector.lora.weight", "lora_magnitude_vector.lora"
            ): value
            for key, value in model.state_dict().items()
        }
        save(directory / f"{name}.pt", OrderedDict(state), merged)
    for name, options in {
        "peft_lora": {
            "target_modules": [*LINEAR, "token_embeddings"],
            "modules_to_save": ["attn_norm"],
            "lora_alpha": 5,
            "use_rslora": True,
            "alpha_pattern": {"layers.1.attn.qkv_proj": 7},
            "rank_pattern": {"layers.0.ffn.proj_1": 2},
        },
        "peft_dora": {"target_modules": LINEAR, "lora_alpha": 4, "use_dora": True},
    }.items():
        model, merged = adapted("default", **options)
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.data = parameter.data + 1
        merged = deepcopy(model).merge_and_unload().state_dict()  # type: ignore[operator]
        assert isinstance(model, PeftModel)
        model.save_pretrained(directory / name)
        (directory / name / "README.md").unlink()
        values = {key: value.numpy() for key, value in merged.items()}
        np.savez_compressed(directory / f"{name}.npz", **values)


def more_adapters(directory: Path) -> None:
    """PEFT's directories with more than LoRA in them, and what they merge to."""
    torch.manual_seed(2)
    for name, options in {
        "peft_resized": {"new_tokens": 2, "target_modules": ["qkv_proj"]},
        "peft_resized_lora": {"new_tokens": 2, "target_modules": ["token_embeddings"]},
        "peft_tokens": {
            "new_tokens": 0,
            "target_modules": LINEAR,
            "trainable_token_indices": [9, 2],
            "alpha_pattern": {r"^layers\.[01]\.ffn\.proj_.*": 9, "(out|qkv)_proj": 5},
        },
        "peft_tokens_resized": {
            "new_tokens": 3,
            "target_modules": ["out_proj"],
            "trainable_token_indices": {"token_embeddings": [9, 2, 11]},
        },
        "peft_embedding_dora": {"target_modules": ["token_embeddings"], "use_dora": True},
        "peft_parameters": {
            "target_modules": ["qkv_proj"],
            "target_parameters": ["out_proj.weight"],
            "modules_to_save": ["norm", "token_embeddings"],
        },
    }.items():
        model, _ = adapted("default", lora_alpha=4, **options)  # type: ignore[arg-type]
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.data = parameter.data + 1
        merged = deepcopy(model).merge_and_unload().state_dict()  # type: ignore[operator]
        embeddings = "new_tokens" in options and bool(options["new_tokens"])
        model.save_pretrained(directory / name, save_embedding_layers=embeddings)  # type: ignore[operator]
        (directory / name / "README.md").unlink()
        np.savez_compressed(
            directory / f"{name}.npz", **{key: value.numpy() for key, value in merged.items()}
        )


def save(path: Path, content: object, tensors: dict[str, Tensor]) -> None:
    """Save `content`, and beside it the tensors that are to be found in it."""
    torch.save(content, path)
    dtypes = [
        f"{name}={str(value.dtype).removeprefix('torch.')}" for name, value in tensors.items()
    ]
    values = {name: value.detach().to(torch.float32).numpy() for name, value in tensors.items()}
    np.savez_compressed(path.with_suffix(".npz"), dtypes=np.array(dtypes), **values)


def main(directory: Path) -> None:
    """Write all of them."""
    torch.manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state = Network().to(dtype).state_dict()
        name = str(dtype).removeprefix("torch.")
        save(directory / f"{name}.pt", state, state)
    tensors = layouts()
    save(directory / "layouts.pt", tensors, tensors)
    checkpoint = training_checkpoint()
    prefixed = {
        f"{key}/{name}": value
        for key in ("model_state_dict", "ema_state_dict")
        for name, value in checkpoint[key].items()  # type: ignore[attr-defined]
    }
    save(directory / "training_checkpoint_last.pt", checkpoint, prefixed)

    torch.save({"expanded": torch.ones(1).expand(1000)}, directory / "expanded.pt")
    torch.save(tensors, directory / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), directory / "torchscript.pt")
    torch.serialization.set_crc32_options(False)
    torch.save({"ones": torch.ones(3)}, directory / "no_crc.pt")
    torch.serialization.set_crc32_options(True)
    adapters(directory)
    more_adapters(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures"))
