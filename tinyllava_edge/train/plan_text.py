"""A plan as text for people, and sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

from ..errors import UsageError
from .memory_plan import Memory
from .plan import Part, Plan, StagePlan

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
MOMENTS = {"tower": "while the tower runs", "backward": "as the backward pass begins", "step": "at the optimiser step"}


def parse_memory(text: str, flag: str = "--device-memory") -> float:
    """Bytes from `24GB` (powers of 1,000) or `24GiB`. Raises UsageError that names the flag for anything else."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmg]i?b)", text.strip().lower(), re.ASCII)
    if not match or float(match[1]) == 0:
        raise UsageError(f"{flag} {text[:60]!r}: not a size", "write 24GB, 80GB or 22.5GiB")
    return float(match[1]) * UNITS[match[2]]


def plan_lines(plan: Plan) -> list[str]:
    """The plan, one line each."""
    machine = plan.machine
    where = f"{_several(machine.devices, 'device')}, {machine.engine}"
    if machine.memory is not None:
        where += f", {_bytes(machine.memory)} each"
    lines = [f"{plan.model} · recipe {plan.recipe} · {where}"]
    for number, stage in enumerate(plan.stages, 1):
        lines += ["", f"stage {number} of {len(plan.stages)}: {stage.name}", *_stage(stage, plan)]
    return [*lines, "", "assumptions:", *(f"  {note}" for note in plan.assumptions)]


def _stage(stage: StagePlan, plan: Plan) -> list[str]:
    devices = plan.machine.devices
    parts = [("part", "parameters", "trainable", "mode", "lr"), *map(_part, stage.parts), _total(stage.parts)]
    rows = "rows unknown (--rows, or --data)" if stage.rows is None else f"{stage.rows:,} rows"
    if stage.packs is not None and stage.packs != stage.rows:
        rows += f" in {stage.packs:,} sequences"
    steps = "" if stage.steps is None else f", {stage.steps:,} steps"
    lines = [f"  {line}" for line in _columns(parts)]
    lines += [
        f"  data    {rows}, {_several(stage.epochs, 'epoch')}{steps}",
        f"  batch   {stage.batch_size} = {stage.micro_batch} micro x {stage.accumulate} accumulated x {devices} "
        f"device{'s' * (devices != 1)}, {stage.precision}"
        + (", gradient checkpointing" if stage.checkpointing else ""),
        f"  tokens  {stage.positions:,.0f} a sequence ({stage.visual_tokens} of a picture), at most {stage.longest:,}; "
        + ("in all: rows unknown" if stage.tokens is None else f"{_count(stage.tokens)} in all"),
        f"          {stage.lengths}",
    ]
    both = (stage.memory, stage.memory_longest)
    table: list[tuple[str, ...]] = [("memory per device", "mean length", "longest")]
    table += [
        (name, *(_bytes(getattr(item, name)) for item in both))
        for name in (field.name for field in fields(Memory))
        if name not in ("peak", "moment") and any(getattr(item, name) for item in both)
    ]
    table.append(("peak", *(_bytes(item.peak) for item in both)))
    lines += [f"  {line}" for line in _columns(table)]
    lines.append(f"  the peak comes {MOMENTS[stage.memory_longest.moment]}; not all parts are alive then")
    if stage.host_features:
        lines.append(f"  tower features are cached: {_bytes(stage.host_features)} on the disk")
    lines.append(f"  time    {_time(stage, plan)}")
    return [*lines, *(f"  warning: {text}" for text in stage.warnings)]


def _part(part: Part) -> tuple[str, ...]:
    rate = "" if part.learning_rate is None else f"{part.learning_rate:g}"
    return part.name, f"{part.parameters:,}", f"{part.trainable:,}", part.mode, rate


def _total(parts: tuple[Part, ...]) -> tuple[str, ...]:
    trainable = sum(part.trainable for part in parts)
    return "all", f"{sum(part.parameters for part in parts):,}", f"{trainable:,}", "", ""


def _time(stage: StagePlan, plan: Plan) -> str:
    if plan.machine.peak_tflops is None:
        work = "" if stage.flop is None else f"{_work(stage.flop)}; "
        return f"{work}give --peak-tflops"
    if stage.seconds is None or stage.flop is None:
        return "rows unknown (--rows, or --data)"
    return f"{_work(stage.flop)}; about {_duration(stage.seconds)}"


def _work(flop: float) -> str:
    return f"{flop / 1e15:,.1f} PFLOP" if flop >= 1e15 else f"{flop / 1e12:,.2f} TFLOP"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _several(count: float, word: str) -> str:
    return f"{count:g} {word}" + ("" if count == 1 else "s")


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            text.rjust(width) if k else text.ljust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
