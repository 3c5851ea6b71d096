"""Trained weights and AdamW's moments as whole tensors, however an engine divides them over the processes.

Whole       plain training and DDP: every process holds everything
Dtensors    FSDP2: each tensor is a DTensor, cut along its first dimension
ZeroParts   DeepSpeed ZeRO-2 and 3: flat float32 partitions, read and written through DeepSpeed's own accessors

Every method that reads is collective: all processes call it in the same order, one tensor at a time, so that no device
ever holds more than one whole tensor besides its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import UsageError

MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[str], torch.Tensor]  # key → whole tensor, float32, on the CPU


class Spread(Protocol):
    """Access to what an engine has divided."""

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """A trained weight, whole."""

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Its moments, whole; none before the first step."""

    def steps(self) -> dict[str, int]:
        """Name → optimiser steps that the parameter has taken."""

    def restore(self, read: Read, steps: Mapping[str, int]) -> None:
        """Put weights and moments back. `read` takes `NAME`, or `NAME|MOMENT`."""


def moment_key(name: str, moment: str) -> str:
    """Name of a moment in a state's files."""
    return f"{name}|{moment}"


class Whole:
    """Every process holds everything."""

    def __init__(self, named: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        self.named, self.optimizer = named, optimizer

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.detach()

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.optimizer.state.get(parameter) or {}
        unknown = set(state) - {"step", *MOMENTS}
        if unknown:  # leaving it out would change what follows
            raise UsageError(f"the optimiser keeps {', '.join(sorted(unknown))}, which no state holds", "use AdamW")
        return {key: self.join(state[key]) for key in MOMENTS if key in state}

    def steps(self) -> dict[str, int]:
        found = {name: self.optimizer.state.get(p) or {} for name, p in self.named.items()}
        return {name: int(state["step"]) for name, state in found.items() if "step" in state}

    def restore(self, read: Read, steps: Mapping[str, int]) -> None:
        names = {id(p): name for name, p in self.named.items()}
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for place, parameter in enumerate(order):
            name = names[id(parameter)]
            if name in steps:
                moments = {key: self.cut(read(moment_key(name, key)), parameter) for key in MOMENTS}
                state[place] = {"step": torch.tensor(float(steps[name])), **moments}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def join(self, tensor: torch.Tensor) -> torch.Tensor:
        """Part → whole."""
        return tensor.detach()

    def cut(self, tensor: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
        """Whole → part."""
        return tensor


class Dtensors(Whole):
    """FSDP2."""

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        return self.join(parameter)

    def join(self, tensor: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        whole = tensor.detach()
        return whole.full_tensor() if isinstance(whole, DTensor) else whole

    def cut(self, tensor: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor):
            return tensor
        # every process has read the whole tensor itself, so that nothing is sent
        here = tensor.to(like.device_mesh.device_type)
        return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


class ZeroParts:
    """DeepSpeed. `engine` is what `deepspeed.initialize` returned."""

    def __init__(self, named: Mapping[str, nn.Parameter], engine: Any) -> None:
        self.named, self.zero = named, engine.optimizer
        if self._steps():
            self._link()

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach()

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self._steps():
            return {}
        return {key: safe_get_full_optimizer_state(parameter, key).detach() for key in MOMENTS}

    def steps(self) -> dict[str, int]:
        return dict.fromkeys(self.named, self._steps()) if self._steps() else {}

    def restore(self, read: Read, steps: Mapping[str, int]) -> None:
        taken = max(steps.values(), default=0)
        if taken:
            self._make_moments(taken)
        for name, parameter in self.named.items():
            self._put(parameter, read(name), "")
            for key in MOMENTS if taken else ():
                # what another engine has never stepped is zero
                value = read(moment_key(name, key)) if name in steps else torch.zeros(1).expand(self._shape(parameter))
                self._put(parameter, value, key)

    def _flat(self) -> list[torch.Tensor]:
        """The float32 partitions that the inner optimiser steps."""
        stage_3 = hasattr(self.zero, "fp32_partitioned_groups_flat")
        return list(self.zero.fp32_partitioned_groups_flat if stage_3 else self.zero.single_partition_of_fp32_groups)

    def _steps(self) -> int:
        return max((int(self.zero.optimizer.state.get(flat, {}).get("step", 0)) for flat in self._flat()), default=0)

    def _make_moments(self, taken: int) -> None:
        """DeepSpeed makes them at the first step; here they are needed before it."""
        for flat in self._flat():
            self.zero.optimizer.state[flat] = {
                "step": torch.tensor(float(taken), device=flat.device),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        self._link()

    def _link(self) -> None:
        """ZeRO-2's accessors see the moments of the first parameter group only, unless they are linked again."""
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    @staticmethod
    def _shape(parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    @staticmethod
    def _put(parameter: nn.Parameter, value: torch.Tensor, key: str) -> None:
        from deepspeed import utils

        if not hasattr(parameter, "ds_id"):  # ZeRO-2
            here = value.contiguous().to(parameter.device)
            if key:
                utils.safe_set_full_optimizer_state(parameter, here, key)
            else:
                utils.safe_set_full_fp32_param(parameter, here)
            return
        get = utils.safe_get_local_optimizer_state if key else utils.safe_get_local_fp32_param
        part = get(parameter, key).clone() if key else get(parameter).clone()
        rank = torch.distributed.get_rank()
        mine = value.flatten()[rank * part.numel() : (rank + 1) * part.numel()]
        part.zero_()  # the last part is padded
        part.flatten()[: mine.numel()].copy_(mine)
        if key:
            utils.safe_set_local_optimizer_state(parameter, part, key)
        else:
            utils.safe_set_local_fp32_param(parameter, part)
