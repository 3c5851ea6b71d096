"""How a stage's states are divided over processes: four engines as plain values.

ddp     every process holds everything; gradients are averaged
zero2   DeepSpeed: gradients and optimiser states are divided
zero3   DeepSpeed: weights too
fsdp    PyTorch's FSDP2: as zero3, without DeepSpeed

The files in `train/deepspeed/` hold the same numbers for reading and copying.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DependencyError, UsageError
from .launch import place_in_run

LAUNCH = "torchrun --nproc-per-node N -m tinyllava_edge train …"
# Launchers' own switches: they would wrap the model a second time.
SWITCHES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


@dataclass(frozen=True)
class Engine:
    """An engine and how it is set."""

    name: str = "ddp"
    """`ddp`, `zero2`, `zero3` or `fsdp`"""
    offload: bool = False
    """keep optimiser states (zero3 and fsdp: weights too) in the host's memory"""
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """DeepSpeed's configuration; `auto` values are taken from the recipe; empty for ddp and fsdp"""


# The optimiser is torch's AdamW in every engine, so that the curves are the same and nothing is compiled at run time.
_COMMON: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1_000_000_000,
}
_ZERO_2: dict[str, Any] = {
    "stage": 2,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
}
_ZERO_3: dict[str, Any] = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1_000_000_000,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_gather_16bit_weights_on_model_save": False,
}
_HOST: dict[str, Any] = {"device": "cpu", "pin_memory": True}

DEEPSPEED: dict[str, dict[str, Any]] = {
    "zero2": {**_COMMON, "zero_optimization": _ZERO_2},
    "zero2_offload": {**_COMMON, "zero_optimization": {**_ZERO_2, "offload_optimizer": _HOST}},
    "zero3": {**_COMMON, "zero_optimization": _ZERO_3},
    "zero3_offload": {
        **_COMMON,
        "zero_optimization": {**_ZERO_3, "offload_optimizer": _HOST, "offload_param": _HOST},
    },
}
ENGINES = ("ddp", "zero2", "zero3", "fsdp")


def choose(name: str = "ddp", *, offload: bool = False, config: Path | None = None) -> Engine:
    """An engine by its exact name, with the shipped settings or those of one's own DeepSpeed file.

    Args:
        name: `ddp`, `zero2`, `zero3` or `fsdp`.
        offload: the host's memory holds what is divided.
        config: a DeepSpeed JSON file, for zero2 and zero3; its `zero_optimization.stage` must be the engine's.

    Raises:
        UsageError: unknown name, a file or `offload` that the engine has no use for, an unreadable file.
        DependencyError: DeepSpeed is not installed.
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}", f"known: {', '.join(ENGINES)}")
    if name in ("ddp", "fsdp"):
        if config is not None:
            raise UsageError(
                f"{config}: engine {name} takes no file", "the file is DeepSpeed's: --engine zero2 or zero3"
            )
        if offload and name == "ddp":
            raise UsageError("engine ddp divides nothing, so --offload has no use", "--engine zero2, zero3 or fsdp")
        return Engine(name, offload)
    if importlib.util.find_spec("deepspeed") is None:
        raise DependencyError(f"engine {name} needs DeepSpeed", "pip install 'tinyllava-edge[deepspeed]'")
    if config is None:
        return Engine(name, offload, copy.deepcopy(DEEPSPEED[f"{name}_offload" if offload else name]))
    if offload:
        raise UsageError(f"{config}: says itself what is offloaded", "leave --offload out")
    return Engine(name, False, _own(config, name))


def _own(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: can't be read as JSON ({error})", "compare with the files in train/deepspeed"
        ) from error
    zero = value.get("zero_optimization") if isinstance(value, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if f"zero{stage}" != name:
        raise UsageError(
            f"{path}: zero_optimization.stage is {stage!r}, the engine is {name}",
            "set the stage to 2 or 3, as --engine zero2 or zero3 says",
        )
    for key in ("optimizer", "scheduler"):
        if key in value:
            raise UsageError(f"{path}: {key} is the recipe's to say", f"take {key} out of the file")
    if isinstance(value.get("fp16"), dict) and value["fp16"].get("enabled") not in (None, False):
        raise UsageError(f"{path}: fp16 is not supported", 'use "bf16": {"enabled": "auto"}')
    return value


def check_launch(engine: Engine) -> None:
    """Raises UsageError where the launcher and the engine don't fit together."""
    switched = [name for name in SWITCHES if os.environ.get(name, "").lower() in ("1", "true")]
    if switched:
        raise UsageError(
            f"{switched[0]} is set by the launcher's configuration",
            "choose the engine with --engine, and launch with torchrun or train/accelerate/*.yaml",
        )
    if engine.name == "fsdp" and place_in_run()[1] == 1:
        raise UsageError("engine fsdp divides over several processes, and this is one", LAUNCH)
