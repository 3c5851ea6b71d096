"""Shared by the nano scripts: learning-rate schedule, progress line, resumable state without pickle."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

SAVE_EVERY = 60.0  # seconds between two saves


@dataclass
class Clock:
    """Where a run stands, by steps or by minutes, whichever ends first."""

    steps: int
    """Steps of the whole run."""
    minutes: float
    """Wall-clock limit of the whole run, 0 for none."""
    step: int = 0
    """Steps done."""
    spent: float = 0.0
    """Seconds spent by earlier, interrupted runs."""
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, over all resumed runs."""
        return self.spent + time.monotonic() - self.began

    @property
    def progress(self) -> float:
        """0 to 1."""
        by_time = self.elapsed / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.step / self.steps, by_time))

    def rate(self, peak: float, warmup: int = 150) -> float:
        """Learning rate: linear warm-up, then cosine to 2 % of the peak."""
        return peak * min((self.step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * self.progress)))

    def line(self, loss: float, items: int, unit: str) -> str:
        """Progress line; `items` were handled per step."""
        left = self.elapsed * (1 / self.progress - 1) if self.progress else 0.0
        speed = items * self.step / self.elapsed
        return f"step {self.step}/{self.steps}  loss {loss:.4f}  {speed:.0f} {unit}/s  {left / 60:.1f} min left"


def optimizer_for(modules: nn.Module, decay: float = 0.05) -> torch.optim.AdamW:
    """Fused AdamW; no decay on vectors."""
    parameters = [p for p in modules.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_state(path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """Everything needed to go on: `path`/state.safetensors and `path`/state.json."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in modules.state_dict().items()}
    for k, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{k}.{name}": torch.as_tensor(value) for name, value in state.items()}
    save_file(tensors, path / "state.tmp")
    (path / "state.tmp").replace(path / "state.safetensors")
    (path / "state.json").write_text(json.dumps({"step": clock.step, "spent": clock.elapsed}) + "\n")


def load_state(path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock) -> bool:
    """Go on where `save_state` stopped; False when there is nothing to go on from."""
    if not (path / "state.json").exists():
        return False
    tensors = load_file(path / "state.safetensors")
    modules.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    meta = json.loads((path / "state.json").read_text())
    clock.step, clock.spent = int(meta["step"]), float(meta["spent"])
    return True
