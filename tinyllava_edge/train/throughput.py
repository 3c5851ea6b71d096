"""What training works off: pictures, positions and operations of each step, and the share of the device's peak."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UsageError
from ..model import TinyLlava
from ..spec import ModelSpec
from .collate import IGNORED
from .plan_data import Lengths
from .plan_shape import model_shape, sequence_flop, tower_flop
from .recipes import StageRecipe

RECENT = 50  # steps that the shown rates are taken over

# Dense peaks of one device in 10¹² operations per second, (bf16 with float32 sums, fp32 without TF32), by the exact
# torch.cuda.get_device_name. From NVIDIA's data sheets, whose figures "with sparsity" are twice these.
PEAKS: dict[str, tuple[float | None, float]] = {
    "NVIDIA B200": (2250.0, 75.0),
    "NVIDIA H200": (989.4, 66.9),
    "NVIDIA H100 80GB HBM3": (989.4, 66.9),
    "NVIDIA H100 PCIe": (756.0, 51.2),
    "NVIDIA A100-SXM4-40GB": (312.0, 19.5),
    "NVIDIA A100-SXM4-80GB": (312.0, 19.5),
    "NVIDIA A100-PCIE-40GB": (312.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 19.5),
    "NVIDIA A40": (149.7, 37.4),
    "NVIDIA L4": (121.0, 30.3),
    "NVIDIA L40": (181.0, 90.5),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA RTX A6000": (154.8, 38.7),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "Tesla V100-SXM2-16GB": (None, 15.7),
    "Tesla V100-SXM2-32GB": (None, 15.7),
    "Tesla T4": (None, 8.1),
}


@dataclass(frozen=True)
class Rates:
    """What one step, or several, worked off, over all processes."""

    seconds: float = 0.0
    """time, without saving states and answering samples"""
    pictures: float = 0.0
    """pictures"""
    positions: float = 0.0
    """positions of the language model, picture slots included, padding not"""
    flop: float | None = 0.0
    """operations that the model asks for; None where there is no formula for it"""
    flop_done: float | None = 0.0
    """operations that were done: with the activations that gradient checkpointing computes again"""
    peak: float | None = None
    """operations per second that all devices together can do; None where nobody knows"""

    def __add__(self, other: Rates) -> Rates:
        """Both, one after the other."""
        return Rates(
            self.seconds + other.seconds,
            self.pictures + other.pictures,
            self.positions + other.positions,
            None if self.flop is None or other.flop is None else self.flop + other.flop,
            None if self.flop_done is None or other.flop_done is None else self.flop_done + other.flop_done,
            other.peak,
        )

    @property
    def images_per_s(self) -> float:
        """Pictures per second."""
        return self.pictures / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Positions per second, padding not counted."""
        return self.positions / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, 0 to 1: recomputation is no work (Chowdhery et al. 2022, appendix B)."""
        return self._share(self.flop)

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs utilisation, 0 to 1: recomputation counts as work."""
        return self._share(self.flop_done)

    def _share(self, flop: float | None) -> float | None:
        return flop / (self.peak * self.seconds) if flop is not None and self.peak and self.seconds else None


@dataclass(frozen=True)
class Cost:
    """Operations of a stage, forwards and backwards, taken apart."""

    position: float
    """of one position in the language model's layers"""
    square: float
    """of attention: times the squared length of each sequence"""
    answer: float
    """of one answer token in the head"""
    connected: float
    """of one picture in the connector"""
    seen: float
    """of one picture in the tower"""

    @classmethod
    def of(cls, model: TinyLlava, spec: ModelSpec, stage: StageRecipe) -> Cost | None:
        """For a model that `freeze` marked, from the plan's formulas; None where they don't know its layers."""
        try:
            shape = model_shape(model, spec, stage)
        except UsageError:
            return None

        def cost(positions: float = 0.0, answers: float = 0.0, pictures: float = 0.0) -> float:
            found = Lengths(1, 1, 1, pictures, positions, 0, answers, 0, 0, "")
            return sequence_flop(model, shape, found, stage)

        square = (cost(2) - 2 * cost(1)) / 2  # the formula is a · n + b · n²
        return cls(cost(1) - square, square, cost(0, 1), cost(0, 0, 1), tower_flop(model, shape, stage))

    def total(self, counted: Mapping[str, float]) -> float:
        """Operations of what `Throughput` counted."""
        return sum(getattr(self, name) * counted[name] for name in COUNTED)


COUNTED = ("position", "square", "answer", "connected", "seen")


class Throughput:
    """Counts the batches that an objective is fed: `objective.register_forward_pre_hook(t.count, with_kwargs=True)`."""

    def __init__(self, cost: Cost | None, done: Cost | None, peak: float | None, pictures: float = 0.0) -> None:
        self.cost, self.done, self.peak = cost, done, peak
        self.pictures = pictures  # of a step in which no batch was counted
        self.pending: torch.Tensor | None = None  # in the order of COUNTED, on the batches' device: read once a step
        self.recent: deque[Rates] = deque(maxlen=RECENT)
        self.whole = Rates(flop=0.0 if cost else None, flop_done=0.0 if done else None, peak=peak)

    @classmethod
    def of(cls, model: TinyLlava, spec: ModelSpec, stage: StageRecipe) -> Throughput:
        """For a model that `freeze` marked, before adapters are put in; nobody knows the peak yet."""
        done = Cost.of(model, spec, stage)
        cost = Cost.of(model, spec, replace(stage, gradient_checkpointing=False))
        return cls(cost, done, None)

    def set_peak(self, tflops: float | None, devices: int) -> None:
        """The dense peak of one device; None where nobody knows."""
        self.peak = None if tflops is None else tflops * 1e12 * devices
        self.whole = replace(self.whole, peak=self.peak)

    def count(self, module: Any, args: Any, batch: Mapping[str, Any]) -> None:
        """Take note of one batch from `collate`."""
        found = count(batch)
        self.pending = found if self.pending is None else self.pending + found

    def step(self, seconds: float, device: torch.device | str = "cpu") -> Rates:
        """What was counted since the last call; with several processes each must call it, with its own device."""
        nothing = torch.zeros(len(COUNTED), dtype=torch.float64, device=device)
        pending = nothing if self.pending is None else self.pending
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(pending)
        counted = dict(zip(COUNTED, pending.tolist(), strict=True))
        rates = Rates(
            seconds,
            counted["connected"] if self.pending is not None else self.pictures,
            counted["position"],
            self.cost.total(counted) if self.cost else None,
            self.done.total(counted) if self.done else None,
            self.peak,
        )
        self.pending = None
        self.recent.append(rates)
        self.whole += rates
        return rates

    def lately(self) -> Rates:
        """The last steps together."""
        return sum(list(self.recent)[1:], self.recent[0]) if self.recent else Rates()


def count(batch: Mapping[str, Any]) -> torch.Tensor:
    """What a batch holds, as COUNTED names it, float64 (5,).

    Positions count up from 0 in every sequence and are 0 in the padding, so a 0 with a 1 behind it starts a sequence.
    """
    places = batch["position_ids"].long()  # (b, n)
    starts = torch.zeros_like(places, dtype=torch.bool)
    starts[:, :-1] = (places[:, :-1] == 0) & (places[:, 1:] == 1)
    real = ((places > 0) | starts).flatten()
    number = starts.flatten().cumsum(0)[real]  # of the sequence that each position belongs to, from 1
    lengths = torch.zeros(places.numel() + 1, dtype=torch.float64, device=places.device)
    lengths.index_add_(0, number, torch.ones_like(number, dtype=torch.float64))
    seen = batch.get("pixel_values")
    pictures = seen if seen is not None else batch.get("image_features")
    values = [lengths.sum(), lengths.square().sum(), (batch["labels"] != IGNORED).sum()]
    counts = [0 if found is None else len(found) for found in (pictures, seen)]
    return torch.stack([*(value.double() for value in values), *lengths.new_tensor(counts)])


def device_peak(precision: str, given: float | None, device: torch.device) -> float | None:
    """Dense peak of a device in 10¹² operations per second; None where nobody knows, as for a processor.

    Args:
        precision: `bf16` or `fp32`, what runs.
        given: what the user says; it goes before the table.
        device: what is trained on.

    Raises:
        UsageError: a peak out of range.
    """
    if given is not None:
        if not 0 < given < 1e9:
            raise UsageError(f"--peak-tflops {given:g}", "give the dense peak of one device, e.g. 312")
        return given
    if device.type != "cuda" or (precision == "fp32" and torch.get_float32_matmul_precision() != "highest"):
        return None
    bf16, fp32 = PEAKS.get(torch.cuda.get_device_name(device), (None, None))
    return bf16 if precision == "bf16" else fp32


def memory_bytes(device: torch.device) -> int:
    """A GPU's largest reserved memory, or what the process holds now; of this process alone."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    from ..benchmarks.peak_rss import status

    found = status()
    return found.get("VmRSS") or found.get("VmHWM", 0)
