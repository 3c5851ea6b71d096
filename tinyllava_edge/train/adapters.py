"""Low-rank adapters (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314) by PEFT: put in, saved, merged, trained further.

An adapter is a directory as PEFT writes it, so `PeftModel.from_pretrained` loads it: the adapters' matrices, and whole
what a stage trained whole beside them, the connector above all. Merging adds B·A·alpha/rank to the weights of the
checkpoint that training started from; with QLoRA too, so the 4-bit weights are gone from the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, UsageError
from ..files import new_directory, write_json
from ..model import TinyLlava
from .parts import ADAPTERS, adapted, layer_of, modes, part_of
from .recipes import StageRecipe

WEIGHTS, CONFIG, ORIGIN = "adapter_model.safetensors", "adapter_config.json", "origin.json"
PREFIX = "base_model.model."  # of every key in PEFT's files
NAME = ".default"  # PEFT's name of the only adapter, in parameters but not in files


def put_in(model: TinyLlava, stage: StageRecipe, precision: str = "fp32") -> None:
    """Replace linear layers by adapted ones, those of `qlora` parts by 4-bit ones first; none if the stage has none.

    Args:
        model: where it will be trained: 4-bit weights are made on the device that the model is on.
        precision: `bf16` or `fp32`: what 4-bit layers compute in.

    Raises:
        UsageError: the stage wants 4-bit weights, and bitsandbytes is not installed or doesn't run here.
    """
    targets = adapted(model, stage)
    for part, mode in modes(stage).items():
        if mode.adapts and not any(part_of(name) == part for name in targets):
            raise UsageError(
                f"stage {stage.name}: {part} = {mode.kind!r}, and it has no linear layer to adapt", "train it full"
            )
    if not targets:
        return
    widest = max(max(module.in_features, module.out_features) for module in targets.values())
    if stage.lora_rank > widest:
        raise UsageError(
            f"stage {stage.name}: lora_rank = {stage.lora_rank}", f"at most {widest}, the width of the widest layer"
        )
    from peft import LoraConfig, inject_adapter_in_model

    wanted = modes(stage)
    quantised = [name for name in targets if wanted[part_of(name)].kind == "qlora"]
    if quantised:
        _quantise(model, quantised, precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.seed)  # the same in every process, and when the run is taken up again
        inject_adapter_in_model(LoraConfig(**_settings(stage, list(targets))), model)


def _settings(stage: StageRecipe, targets: list[str]) -> dict[str, Any]:
    return {
        "r": stage.lora_rank,
        "lora_alpha": stage.lora_alpha,
        "lora_dropout": stage.lora_dropout,
        "target_modules": targets,
        "bias": "none",
    }


def _quantise(model: TinyLlava, names: list[str], precision: str) -> None:
    """NF4 with quantised constants: 4.127 bits a weight (QLoRA, §3)."""
    try:
        import bitsandbytes as bnb
    except Exception as error:  # a build for another GPU raises whatever its libraries raise
        raise UsageError(
            f"qlora needs bitsandbytes ({str(error)[:120]})", "pip install 'tinyllava-edge[qlora]', or train with lora"
        ) from error
    for name in names:
        linear = model.get_submodule(name)
        device = linear.weight.device
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None,
            compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        packed.weight = bnb.nn.Params4bit(
            linear.weight.detach().cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        packed.bias = linear.bias
        packed.support_avx512bf16_for_cpu = False  # else an answer in between repacks it for good, without gradients
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, packed.to(device))
    model.is_loaded_in_4bit = True  # PEFT asks for it before it takes its 4-bit layer


def save(
    tensors: Mapping[str, torch.Tensor], stage: StageRecipe, out: Path, origin: Mapping[str, Any], *, force: bool
) -> None:
    """Write an adapter directory, whole or not at all.

    Args:
        tensors: name in the model → trained tensor.
        origin: `source` and `source_sha256` of the checkpoint that it belongs to.

    Raises:
        StorageError: `out` exists and `force` is off, or the disk is full.
    """
    from safetensors.torch import save_file

    targets = sorted({name.partition(".lora_")[0] for name in tensors if is_adapter(name)})
    whole = sorted({_module_of(name) for name in tensors if not is_adapter(name)})
    settings = _settings(stage, targets)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(origin["source"]),
        "inference_mode": True,
        "modules_to_save": whole or None,
        **settings,
    }
    kept = {PREFIX + name.replace(NAME, ""): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with new_directory(out, force=force, ours=CONFIG) as temporary:
        save_file(kept, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, config)
        write_json(temporary / ORIGIN, dict(origin))


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's matrix."""
    return any(mark in name for mark in ADAPTERS)


def _module_of(name: str) -> str:
    """The module that PEFT must take whole for this tensor: the connector, a layer, or the tensor's own."""
    mark = "multi_modal_projector"
    if mark in name:
        return name[: name.index(mark) + len(mark)]
    layer = layer_of(name)
    if layer is not None:
        for word in (f".layers.{layer}.", f".layer.{layer}."):
            if word in name:
                return name[: name.index(word) + len(word) - 1]
    return name.rpartition(".")[0]


def load(model: TinyLlava, folder: Path, stage: StageRecipe) -> None:
    """Put an adapter's values into a model that `put_in` has prepared with the same rank and parts, to train on.

    Raises:
        CheckpointError: the directory is damaged, or was made for other parts, ranks, layers or another scale.
    """
    tensors, config = read(folder)
    scale, wanted_scale = config["lora_alpha"] / config["r"], stage.lora_alpha / stage.lora_rank
    if not math.isclose(scale, wanted_scale):
        raise CheckpointError(
            f"{folder}: scaled by {scale:g} (lora_alpha / r), the stage's by {wanted_scale:g}",
            "train on with the recipe that made it: the same lora_alpha and lora_rank",
        )
    own = {name.replace(NAME, ""): parameter for name, parameter in model.named_parameters()}
    wanted = {name for name, parameter in own.items() if parameter.requires_grad}
    wrong = sorted(wanted ^ set(tensors)) or [name for name, value in tensors.items() if own[name].shape != value.shape]
    if wrong:
        raise CheckpointError(
            f"{folder}: doesn't fit what the stage trains: {wrong[0]}",
            "train on with the recipe that made it: the same parts, modes and lora_rank",
        )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by their name in the model, without PEFT's additions, and the settings.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        rank, alpha = config["r"], config["lora_alpha"]
        good = type(rank) is int and rank > 0 and type(alpha) in (int, float) and 0 < alpha < 1e9
        good = good and all(value.shape[0] == rank for name, value in tensors.items() if ".lora_A." in name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not an adapter ({str(error)[:200]})", "give the whole directory") from error
    if not good or any(not name.startswith(PREFIX) for name in tensors):
        raise CheckpointError(f"{folder}: not a LoRA adapter of a whole model", "give one that `train` wrote")
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} holds something else than finite numbers", "train it again"
            )
    if config.get("use_dora") or config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise CheckpointError(f"{folder / CONFIG}: DoRA, rsLoRA or ranks by layer", "merge it with PEFT instead")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}, config


def merge(model: TinyLlava, folder: Path) -> None:
    """Add an adapter to the weights of the model that it was trained on, in float32.

    Raises:
        CheckpointError: the directory is damaged, or a tensor has no place in the model.
    """
    tensors, config = read(folder)
    own: dict[str, nn.Parameter] = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            target, _, matrix = name.partition(".lora_")
            if matrix == "A.weight":
                other = tensors.get(f"{target}.lora_B.weight")
                weight = own.get(f"{target}.weight")
                if (
                    other is None
                    or weight is None
                    or weight.shape != (other.shape[0], value.shape[1])
                    or (other.shape[1] != value.shape[0])
                ):
                    raise CheckpointError(f"{folder}: {name} has no place in the model", "give the model it belongs to")
                delta = (other.float() @ value.float()) * (config["lora_alpha"] / config["r"])
                weight.add_(delta.to(weight.device))
            elif not matrix:
                if name not in own or own[name].shape != value.shape:
                    raise CheckpointError(f"{folder}: {name} has no place in the model", "give the model it belongs to")
                own[name].copy_(value)


def merge_checkpoint(checkpoint: Path, folder: Path, out: Path, *, force: bool = False) -> None:
    """Checkpoint + adapter → checkpoint.

    Raises:
        CheckpointError: either is damaged, or the adapter was trained on another checkpoint.
        StorageError: `out` exists and `force` is off.
    """
    from .. import checkpoint as checkpoints
    from ..files import sha256_tree

    check_origin(folder, checkpoint, sha256_tree(checkpoint))
    start = checkpoints.load(checkpoint)
    merge(start.model, folder)
    checkpoints.save(start.model, start.tokenizer, start.spec, out, force=force)


def check_origin(folder: Path, checkpoint: Path, sha256: str) -> None:
    """Raise CheckpointError if the adapter says that it was trained on another checkpoint than this one."""
    origin = folder / ORIGIN
    if not origin.is_file():  # PEFT's own directories say nothing
        return
    try:
        known = json.loads(origin.read_text(encoding="utf-8")).get("source_sha256")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{origin}: can't be read ({error})", "give the whole directory") from error
    if known != sha256:
        raise CheckpointError(
            f"{folder}: was not trained on {checkpoint}", "give the checkpoint that its origin.json names"
        )
