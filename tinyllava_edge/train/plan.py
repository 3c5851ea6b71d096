"""What a recipe would do with a model, before anything is loaded: `tinyllava-edge train --dry-run`.

The architecture is built on the meta device, so there are shapes but no weights; `freeze` then marks what each stage
trains, as it does for the real run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError
from ..model import TinyLlava
from ..spec import ModelSpec
from .memory_plan import ENGINES, FLOAT, Load, Memory, estimate
from .parts import PARTS, adapter_size, freeze, part_of
from .pictures import CACHE_BYTES
from .plan_data import Lengths
from .plan_shape import model_shape, sequence_flop, tower_flop
from .recipes import Recipe, StageRecipe


@dataclass(frozen=True)
class Machine:
    """What a recipe is planned for."""

    devices: int = 1
    """devices, one process each"""
    memory: float | None = None
    """bytes of each device; None where it doesn't matter"""
    engine: str = "ddp"
    """key of ENGINES; `ddp` on one device is plain training"""
    peak_tflops: float | None = None
    """dense peak of one device in the stage's precision, in 10¹² operations per second"""
    mfu: float = 0.4
    """share of the peak that training reaches, recomputation counted as work; an assumption"""


@dataclass(frozen=True)
class Part:
    """One part of the model in one stage."""

    name: str
    """`tower`, `connector` or `llm`"""
    mode: str
    """`frozen`, `full`, `from-K`, `lora` or `qlora`"""
    parameters: int
    """all of its parameters, adapters not counted"""
    trainable: int
    """those that the stage trains"""
    learning_rate: float | None
    """peak learning rate; None for a frozen part"""


@dataclass(frozen=True)
class StagePlan:
    """One stage of the plan."""

    name: str
    """stage name"""
    parts: tuple[Part, ...]
    """tower, connector, language model"""
    rows: int | None
    """conversations; None where nobody said"""
    packs: int | None
    """sequences that they are packed into"""
    epochs: float
    """passes over the data"""
    steps: int | None
    """optimiser steps, as Trainer counts them"""
    batch_size: int
    """sequences per optimiser step: micro_batch x accumulate x devices"""
    micro_batch: int
    """sequences per device and pass"""
    accumulate: int
    """passes per optimiser step"""
    precision: str
    """`bf16` or `fp32`, as in the recipe"""
    checkpointing: bool
    """whether activations are computed again in the backward pass"""
    visual_tokens: int
    """positions of a picture"""
    positions: float
    """mean length of a sequence, picture included"""
    longest: int
    """length of the longest sequence: measured, or the limit that rows are cut at"""
    answers: float
    """mean answer tokens of a sequence"""
    lengths: str
    """where the lengths come from, in words"""
    tokens: float | None
    """positions in the whole stage, padding aside"""
    flop: float | None
    """floating-point operations in the whole stage, over all devices"""
    seconds: float | None
    """time of the whole stage; None without rows or without the devices' peak"""
    memory: Memory
    """per device, for sequences of mean length"""
    memory_longest: Memory
    """per device, for a batch of the longest sequences: the sampler puts like lengths together, so there is one"""
    host_features: int
    """bytes of cached tower features in host memory, per process"""
    warnings: tuple[str, ...]
    """what will fail, or isn't as the recipe says"""


@dataclass(frozen=True)
class Plan:
    """All stages, and what was assumed."""

    model: str
    """variant or checkpoint"""
    recipe: str
    """recipe name"""
    machine: Machine
    """what it is planned for"""
    stages: tuple[StagePlan, ...]
    """stages in order"""
    assumptions: tuple[str, ...]
    """what the figures rest on and nobody measured"""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def make_plan(
    model: TinyLlava,
    spec: ModelSpec,
    recipe: Recipe,
    machine: Machine,
    *,
    stages: Sequence[str] = (),
    rows: int | None = None,
    text_tokens: int,
    lengths: Callable[[StageRecipe, int], Lengths] | None = None,
    cache_bytes: int = CACHE_BYTES,
    feature_bytes: int = FLOAT,
) -> Plan:
    """Plan a recipe for a model, weights not needed.

    Args:
        model: on any device, `meta` included; its `requires_grad` flags are overwritten.
        stages: names of the stages to plan; all by default.
        rows: conversations, in place of the recipe's own.
        text_tokens: tokens of a row besides the picture; used where no data is measured.
        lengths: called with a stage and the positions after which its rows are cut; measures data.
        cache_bytes: as `train`: the most that cached tower features may take.
        feature_bytes: of a number in them.

    Raises:
        UsageError: an unknown stage or engine, or a value out of range.
        DataError: as `lengths` does.
    """
    _check(machine, rows, text_tokens)
    chosen = [recipe.stage(name) for name in stages] or list(recipe.stages)
    known = dict(zip((stage.name for stage in recipe.stages), recipe.rows, strict=False))
    plans = []
    for stage in chosen:
        limit = min(stage.max_length or spec.max_length, spec.max_length)
        measured = lengths(stage, limit) if lengths else None
        count = rows if rows is not None else known.get(stage.name)
        found = measured or _assumed(stage, spec, limit, count, text_tokens)
        if rows is not None and measured is not None:
            found = _scaled(measured, rows)
        plans.append(_stage(model, spec, stage, found, limit, machine, cache_bytes, feature_bytes))
    return Plan(
        spec.name, recipe.name, machine, tuple(plans), _assumptions(plans, machine, recipe, rows, bool(lengths))
    )


def _check(machine: Machine, rows: int | None, text_tokens: int) -> None:
    if machine.engine not in ENGINES:
        raise UsageError(f"unknown engine {machine.engine!r}", f"known: {', '.join(ENGINES)}")
    if not 1 <= machine.devices <= 1 << 20:
        raise UsageError(f"{machine.devices} devices", "at least one device is needed")
    if not 0 < machine.mfu <= 1:
        raise UsageError(f"--mfu {machine.mfu:g}", "a share of the peak between 0 and 1 is needed, e.g. 0.4")
    if machine.peak_tflops is not None and not 0 < machine.peak_tflops < 1e9:
        raise UsageError(f"--peak-tflops {machine.peak_tflops:g}", "give the dense peak of one device, e.g. 312")
    if rows is not None and not 1 <= rows < 1 << 40:
        raise UsageError(f"--rows {rows}", "at least one row is needed")
    if not 1 <= text_tokens < 1 << 22:
        raise UsageError(f"--text-tokens {text_tokens}", "at least one token is needed")


def _assumed(stage: StageRecipe, spec: ModelSpec, limit: int, rows: int | None, text_tokens: int) -> Lengths:
    """Every row one picture and `text_tokens`, all of them answer tokens: an upper bound for the logits."""
    positions = min(limit, spec.visual_tokens + text_tokens)
    count = -1 if rows is None else rows
    most = max(1, limit - spec.visual_tokens)
    source = f"assumed: a picture and {text_tokens} text tokens a row"
    return Lengths(count, count, count, 1.0, positions, limit, min(text_tokens, most), most, 0, source)


def _scaled(found: Lengths, rows: int) -> Lengths:
    share = rows / found.rows
    values = {name: round(getattr(found, name) * share) for name in ("packs", "pictures")}
    return Lengths(**{**asdict(found), "rows": rows, **values})


def _stage(
    model: TinyLlava,
    spec: ModelSpec,
    stage: StageRecipe,
    found: Lengths,
    limit: int,
    machine: Machine,
    cache_bytes: int,
    feature_bytes: int,
) -> StagePlan:
    freeze(model, stage)
    rows, packs = (None, None) if found.rows < 0 else (found.rows, found.packs)
    micro = stage.micro_batch or max(1, stage.batch_size // machine.devices)
    accumulate = max(1, math.ceil(stage.batch_size / (micro * machine.devices)))
    shape = model_shape(model, spec, stage)
    features = 0
    if stage.tower == "frozen" and rows is not None:
        size = found.pictures * spec.feature_tokens * shape.tower.hidden * feature_bytes
        features = size if size <= cache_bytes else 0
    load = Load(micro, found.positions, found.answers, accumulate, features > 0)
    longest = Load(micro, found.longest, found.most_answers, accumulate, features > 0)
    engine = ENGINES[machine.engine]
    memory, most = (
        estimate(shape, item, stage.precision, engine, machine.devices, stage.gradient_checkpointing)
        for item in (load, longest)
    )
    seen = None if packs is None else packs * stage.epochs
    flop = None
    if seen is not None:
        tower_runs = found.pictures if features else seen * found.with_picture
        flop = seen * sequence_flop(model, shape, found, stage) + tower_runs * tower_flop(model, shape, stage)
    rate = machine.peak_tflops and machine.peak_tflops * 1e12 * machine.mfu * machine.devices
    return StagePlan(
        name=stage.name,
        parts=tuple(_part(model, name, stage) for name in PARTS),
        rows=rows,
        packs=packs,
        epochs=stage.epochs,
        steps=None if packs is None else count_steps(packs, stage.epochs, micro, accumulate, machine.devices),
        batch_size=micro * accumulate * machine.devices,
        micro_batch=micro,
        accumulate=accumulate,
        precision=stage.precision,
        checkpointing=stage.gradient_checkpointing,
        visual_tokens=spec.visual_tokens,
        positions=found.positions,
        longest=found.longest,
        answers=found.answers,
        lengths=found.source,
        tokens=None if seen is None else seen * found.positions,
        flop=flop,
        seconds=flop / rate if flop is not None and rate else None,
        memory=memory,
        memory_longest=most,
        host_features=features,
        warnings=tuple(_warnings(stage, spec, found, machine, micro, memory, most)),
    )


def count_steps(packs: int, epochs: float, micro: int, accumulate: int, devices: int) -> int:
    """Optimiser steps as Trainer counts them: batches are dealt to the devices, a short last step counts."""
    per_device = math.ceil(math.ceil(packs / micro) / devices)
    return math.ceil(epochs * max(1, math.ceil(per_device / accumulate)))


def _part(model: TinyLlava, name: str, stage: StageRecipe) -> Part:
    own = [p for key, p in model.named_parameters() if part_of(key) == name]
    trainable = sum(p.numel() for p in own if p.requires_grad) + adapter_size(model, stage, name)
    mode = getattr(stage, name)
    return Part(name, mode, sum(p.numel() for p in own), trainable, stage.learning_rate if trainable else None)


def _warnings(
    stage: StageRecipe,
    spec: ModelSpec,
    found: Lengths,
    machine: Machine,
    micro: int,
    memory: Memory,
    most: Memory,
) -> list[str]:
    warnings = []
    if stage.batch_size % (micro * machine.devices):
        warnings.append(
            f"batch_size {stage.batch_size} is no multiple of micro_batch {micro} x {machine.devices} devices: "
            "training will refuse; change the recipe"
        )
    if stage.max_length > spec.max_length:
        warnings.append(
            f"max_length {stage.max_length} is more than the model's own {spec.max_length}: rows are cut there "
            "(--max-length gives a new model another)"
        )
    if found.refused:
        warnings.append(f"{found.refused:,} rows will be refused by this stage; see --max-bad-rows")
    if found.positions > found.longest or found.longest < spec.visual_tokens:
        warnings.append(f"a picture takes {spec.visual_tokens} positions, rows are cut after {found.longest}")
    if machine.memory is not None and most.peak > machine.memory:
        whole = memory.peak > machine.memory
        what = "does not fit" if whole else "fits sequences of mean length, not a batch of the longest"
        remedies = ["lower micro_batch"] if micro > 1 else []
        remedies += [] if stage.gradient_checkpointing else ["turn on gradient_checkpointing"]
        divided = machine.engine in ("zero3", "fsdp") and machine.devices > 1
        remedies += [] if divided else ["divide over several --devices with --engine zero3 or fsdp"]
        remedies += ["train adapters: --recipe qlora"] if stage.llm not in ("frozen", "qlora") else []
        warnings.append(
            f"{what}: {most.peak / 1e9:.1f} GB of {machine.memory / 1e9:.1f} GB; "
            + (", or ".join(remedies) or "more devices or memory are needed")
        )
    return warnings


def _assumptions(
    plans: Sequence[StagePlan], machine: Machine, recipe: Recipe, rows: int | None, measured: bool
) -> tuple[str, ...]:
    notes = []
    if not measured:
        notes.append(f"lengths: {plans[0].lengths.removeprefix('assumed: ')} (--text-tokens, or --data to measure)")
        notes.append("answer tokens: all text tokens, an upper bound")
        if rows is None and recipe.rows:
            notes.append("rows: the recipe's own data sets, rounded as in the paper's table (--rows, or --data)")
    if any(stage.precision == "bf16" for stage in plans):
        notes.append("bf16: the device has instructions for it; a processor without them trains in float32")
    notes.append("memory: without the driver's context, communication buffers and the allocator's gaps")
    if machine.peak_tflops:
        notes.append(f"time: {machine.mfu:.0%} of {machine.peak_tflops:g} TFLOPS (--mfu), data loading not waited for")
    return tuple(notes)
