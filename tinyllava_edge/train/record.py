"""What a stage did, as it is kept beside its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import write_json


@dataclass(frozen=True)
class TrainResult:
    """What a stage did; saved as `{out}.train.json`."""

    checkpoint: str
    """directory that was written"""
    source: str
    """checkpoint that it started from"""
    source_sha256: str
    """hash of that checkpoint's files"""
    recipe: dict[str, Any]
    """the resolved stage recipe"""
    precision: str
    """what ran: `bf16`, or `fp32` where the recipe or the processor wants it"""
    data: tuple[str, ...]
    """JSON files"""
    data_sha256: str
    """hash of the JSON files, and of the names and sizes of the pictures"""
    rows: int
    """conversations trained on"""
    packs: int
    """sequences that they were packed into"""
    bad_rows: int
    """rows left out; `{out}.bad_rows.jsonl` names them"""
    steps: int
    """optimiser steps in all"""
    resumed_from: int
    """step that this call went on from; 0 for a fresh start"""
    seconds: float
    """time of training in this call, without loading and caching"""
    images_per_s: float
    """pictures per second of training in this call, without saving states and answering samples"""
    tokens_per_s: float
    """positions per second likewise, picture slots included, padding not"""
    mfu: float | None
    """model FLOPs utilisation in this call, 0 to 1, recomputation not counted; None where the peak isn't known"""
    memory_bytes: int
    """a GPU's largest reserved memory, or the process's at the end; of the process that writes"""
    devices: int
    """processes that trained, one device each"""
    parts: dict[str, dict[str, int]]
    """tower, connector, llm → `parameters`, and `trainable` ones, adapters among them"""
    final_loss: float
    """mean loss over the last 20 steps, in nats per answer token"""
    losses: tuple[float, ...]
    """loss of each step, resumed ones included"""
    stopped_early: str
    """`time` when max_seconds ended it, else empty"""
    score: dict[str, Any] | None
    """loss and exact answers on the held-out rows, when there were any"""
    versions: dict[str, str]
    """versions of this package, torch and transformers"""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the loss of each step."""
        return {name: value for name, value in asdict(self).items() if name != "losses"}

    def write(self, out: Path) -> None:
        """Beside the checkpoint `out`, with the loss of each step."""
        write_json(record_path(out), asdict(self))


def record_path(out: Path) -> Path:
    """Where the record of the run that writes `out` is kept."""
    return out.parent / f"{out.name}.train.json"


def read_record(out: Path) -> TrainResult | None:
    """The record of the run that wrote `out`; None where there is none, or not a whole one."""
    try:
        value = json.loads(record_path(out).read_text(encoding="utf-8"))
        return TrainResult(**{**value, "data": tuple(value["data"]), "losses": tuple(value["losses"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
