"""A PEFT LoRA adapter merged into its base: W + scale · B · A, in float32, rounded once to W's type."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_spec import read_json
from ..errors import CheckpointError
from ..weights import TensorSource, Weights
from .lazy import Lazy, Tensors, lazy
from .pickled import Pickled

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# Fields that don't change what the stored matrices mean once training is over.
IGNORED = (
    *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
)


def merge(root: Path, tensors: Tensors, rename: Callable[[str], str | None]) -> Tensors:
    """The tensors with the adapter of a directory merged in.

    Args:
        root: directory with adapter_config.json and its weights.
        tensors: in-memory name → base tensor.
        rename: name in the base layout → in-memory name.

    Raises:
        CheckpointError: the adapter isn't plain LoRA (the option is named), lacks half of a pair, has a shape that
            doesn't fit its base, or names a layer that isn't there.
    """
    config = _config(root / CONFIG)
    source = _open(root)
    pairs: dict[str, dict[str, Lazy]] = {}
    for name, half in lazy(source).items():
        module, which = _split(name, half.file)
        base = rename(f"{module}.weight")
        if base is None or base not in tensors:
            raise CheckpointError(f"{half.file}: {name} adapts a layer that the model hasn't", "get the whole adapter")
        pairs.setdefault(base, {})[which] = half
    merged = dict(tensors)
    for base, halves in pairs.items():
        if set(halves) != {"A", "B"}:
            only = next(iter(halves.values()))
            raise CheckpointError(f"{only.file}: {only.name} lacks its other half", "get the whole adapter")
        merged[base] = _merged(tensors[base], halves["A"], halves["B"], config)
    return merged


def _merged(base: Lazy, a: Lazy, b: Lazy, config: Mapping[str, Any]) -> Lazy:
    """W (out, in), A (r, in), B (out, r) → (out, in)."""
    good = len(base.shape) == len(a.shape) == len(b.shape) == 2
    if not good or (b.shape[0], a.shape[1]) != base.shape or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"{a.file}: {a.name} {list(a.shape)} and B {list(b.shape)} don't fit {list(base.shape)}",
            "get the adapter that belongs to this base",
        )
    module = a.name.removeprefix(PREFIX).rsplit(".lora_A.", 1)[0]
    rank = a.shape[0]
    told = _for_module(config["rank_pattern"], module, config["r"])
    if told != rank:
        raise CheckpointError(f"{a.file}: {a.name} has rank {rank}, {CONFIG} says {told}", "restore the file")
    alpha = _for_module(config["alpha_pattern"], module, config["lora_alpha"])
    scale = alpha / (rank**0.5 if config["use_rslora"] else rank)

    def change(weight: torch.Tensor) -> torch.Tensor:
        update = b.read().float() @ a.read().float()
        if not torch.isfinite(update).all():
            raise CheckpointError(f"{a.file}: {a.name} or its B holds NaN or infinity", "get the adapter again")
        merged: torch.Tensor = (weight.float() + scale * update).to(weight.dtype)
        return merged

    return base.with_change(change)


def _for_module(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule for per-layer ranks and alphas: a key is a regular expression for the end of the layer's name."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{CONFIG}: {key[:80]!r} is no pattern ({error})", "restore the file") from error
    return default


def _split(name: str, file: Path) -> tuple[str, str]:
    """Layer and half (`A`, `B`) of an adapter tensor; PEFT leaves the adapter's name out when it saves."""
    for which in ("A", "B"):
        for suffix in (f".lora_{which}.weight", f".lora_{which}.default.weight"):
            if name.startswith(PREFIX) and name.endswith(suffix):
                return name.removeprefix(PREFIX).removesuffix(suffix), which
    raise CheckpointError(f"{file}: {name} is no LoRA matrix of a linear layer", "merge this adapter with PEFT first")


def _open(root: Path) -> TensorSource:
    if (root / "adapter_model.safetensors").is_file():
        return Weights([root / "adapter_model.safetensors"])
    return Pickled([root / "adapter_model.bin"])


def _config(path: Path) -> dict[str, Any]:
    """The fields that merging needs. Raises CheckpointError that names an option which plain LoRA doesn't have."""
    value = read_json(path)
    if value.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {str(value.get('peft_type'))[:40]!r}", "only LORA can be merged")
    strange = [key for key, given in value.items() if key not in IGNORED and given and (key, given) != ("bias", "none")]
    if strange:
        raise CheckpointError(
            f"{path}: option {strange[0]}={str(value[strange[0]])[:80]!r} is not plain LoRA",
            "merge the adapter with PEFT and import the merged model",
        )
    config = {
        "r": value.get("r", 8),
        "lora_alpha": value.get("lora_alpha", 8),
        "use_rslora": bool(value.get("use_rslora", False)),
        "rank_pattern": value.get("rank_pattern") or {},
        "alpha_pattern": value.get("alpha_pattern") or {},
    }
    ranks = [config["r"], *_values(config["rank_pattern"], path)]
    alphas = [config["lora_alpha"], *_values(config["alpha_pattern"], path)]
    if any(type(rank) is not int or rank < 1 for rank in ranks):
        raise CheckpointError(f"{path}: rank {ranks}", "restore the file")
    if any(type(alpha) not in (int, float) for alpha in alphas):
        raise CheckpointError(f"{path}: alpha {alphas}", "restore the file")
    return config


def _values(pattern: Any, path: Path) -> list[Any]:
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{path}: a pattern is {type(pattern).__name__}, not an object", "restore the file")
    return list(pattern.values())
