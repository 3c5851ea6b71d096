"""A grid → the units of work behind it: untrained models, stages, evaluations; each once, however many cells share it.

A unit's key is a hash of everything that goes into it, so a stage that two recipes have in common is trained once, and
a changed grid meets no stale file: the paper's `share` starts from the very connector that `base` trained.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TinyLlavaEdgeError
from ..spec import ModelSpec
from ..train.recipes import StageRecipe, override
from .backbones import cell_spec, text_config, tree_sha256, vision_config
from .data import DataFiles, count_packs
from .grid import Cell, EvalPlan, Grid, Scale

RESULTS = "results.jsonl"
QUESTION_TOKENS = 40  # positions of a question with its answer; for estimates only
INIT_FLOP = 3e10  # writing an untrained model takes about as long as this; for estimates only


@dataclass(frozen=True)
class Init:
    """Write an untrained model."""

    cell: Cell
    """whose backbones and connector"""
    spec: ModelSpec
    """of the model"""
    seed: int
    """of the connector's weights"""


@dataclass(frozen=True)
class Train:
    """Train one stage."""

    source: Path
    """checkpoint to start from"""
    stage: StageRecipe
    """with the grid's scale"""
    data: tuple[Path, ...]
    """LLaVA JSON"""
    images: Path
    """directory that image paths start from"""
    steps: int
    """optimiser steps"""


@dataclass(frozen=True)
class Evaluate:
    """Ask a trained model the grid's questions."""

    cell: Cell
    """what is evaluated"""
    seed: int
    """that it was trained with"""
    checkpoint: Path
    """the trained model"""
    stages: tuple[Path, ...]
    """checkpoints of all its stages, in order"""
    plan: EvalPlan
    """what is asked"""


@dataclass(frozen=True)
class Unit:
    """One piece of work, whole or not done."""

    key: str
    """hash of everything that goes into it"""
    out: Path
    """checkpoint or results file that it writes; it is done when this is there"""
    label: str
    """for people: cell and stage"""
    after: str
    """key of the unit that must be done first; empty for none"""
    flop: float
    """estimate of its floating-point operations"""
    work: Init | Train | Evaluate
    """what to do"""

    @property
    def done(self) -> bool:
        """Whether its output is there; a stage's log is written after its checkpoint."""
        log = self.out.parent / f"{self.out.name}.train.json"
        return self.out.exists() and (not isinstance(self.work, Train) or log.exists())


@dataclass(frozen=True)
class Run:
    """One cell trained with one seed."""

    cell: Cell
    """the combination"""
    seed: int
    """seed of connector, data order and everything random"""
    directory: Path
    """its directory"""
    units: tuple[str, ...]
    """keys of its units in order"""

    @property
    def name(self) -> str:
        """Cell and seed; also the build's name in results files."""
        return f"{self.cell.name}@{self.seed}"


@dataclass(frozen=True)
class Plan:
    """Everything that there is to do."""

    runs: tuple[Run, ...]
    """in the grid's order, seeds within a cell"""
    units: Mapping[str, Unit]
    """by key, in an order in which they could be done"""
    refused: Mapping[str, TinyLlavaEdgeError]
    """run's name → why it can't even be planned"""


def make_plan(grid: Grid, data: Mapping[str, DataFiles], questions: int, out: Path) -> Plan:
    """Units and runs of a grid.

    Args:
        grid: what is crossed.
        data: entry of `grid.data` → its files.
        questions: asked of each model, for the estimate.
        out: the grid's directory.
    """
    runs: list[Run] = []
    units: dict[str, Unit] = {}
    refused: dict[str, TinyLlavaEdgeError] = {}
    for cell in grid.cells():
        for seed in grid.scale.seeds:
            directory = out / "cells" / cell.name / f"seed-{seed}"
            try:
                found = _units(cell, seed, grid, data[cell.data.name], questions, out, directory)
            except TinyLlavaEdgeError as error:
                refused[f"{cell.name}@{seed}"] = error
                found = []
            units |= {unit.key: unit for unit in found if unit.key not in units}
            runs.append(Run(cell, seed, directory, tuple(unit.key for unit in found)))
    return Plan(tuple(runs), units, refused)


def scaled(stage: StageRecipe, scale: Scale, seed: int, packs: int) -> tuple[StageRecipe, int]:
    """The stage at the grid's scale, and its optimiser steps. Raises UsageError for a field out of range."""
    changes = {**scale.every, **scale.stages.get(stage.name, {})}
    for name in ("", stage.name):
        if name in scale.epochs:
            changes["epochs"] = float(scale.epochs[name])
    stage = override(stage, changes)
    micro = stage.micro_batch or stage.batch_size
    per_epoch = max(1, math.ceil(math.ceil(packs / micro) / (stage.batch_size // micro)))
    wanted = scale.steps.get(stage.name, scale.steps.get(""))
    if wanted is not None:
        stage = override(stage, {"epochs": (wanted - 0.5) / per_epoch})  # Trainer rounds the steps up
    steps = math.ceil(stage.epochs * per_epoch)
    saves = min(stage.save_steps, max(10, steps // 4))  # so that a killed stage loses a quarter of itself at most
    return replace(stage, seed=stage.seed + seed, save_steps=saves), steps


def _units(
    cell: Cell, seed: int, grid: Grid, data: DataFiles, questions: int, out: Path, directory: Path
) -> list[Unit]:
    spec = cell_spec(cell)
    name = f"{cell.name}@{seed}"
    facts = [tree_sha256(cell.tower.path), tree_sha256(cell.llm.path), dict(cell.connector.options), spec.to_dict()]
    key = _key(*facts, seed)
    first = Unit(key, out / "stages" / f"init-{key}", f"{name}: new model", "", INIT_FLOP, Init(cell, spec, seed))
    units, checkpoints = [first], []
    costs = _Costs.of(cell, spec)
    for number, stage in enumerate(cell.recipe.stages, 1):
        files = data.of(stage.template)
        packs, pictures, answers = count_packs(files, stage.max_turns)
        stage, steps = scaled(stage, grid.scale, seed, packs)
        before = units[-1]
        last = number == len(cell.recipe.stages)
        key = _key(before.key, asdict(stage), data.key(stage.template), cell.name if last else "")
        place = directory / "checkpoint" if last else out / "stages" / f"{stage.name}-{key}"
        work = Train(before.out, stage, files, data.images, steps)
        flop = costs.stage(stage, steps, packs, pictures, answers)
        units.append(Unit(key, place, f"{name}: {stage.name}", before.key, flop, work))
        checkpoints.append(place)
    before = units[-1]
    ask = Evaluate(cell, seed, before.out, tuple(checkpoints), grid.eval)
    key = _key(before.key, [Path(task).name for task in grid.eval.tasks], grid.eval.limit)
    flop = costs.questions(questions)
    return [*units, Unit(key, directory / RESULTS, f"{name}: eval", before.key, flop, ask)]


@dataclass(frozen=True)
class _Costs:
    """Parameters of a cell's parts, roughly."""

    tower: float
    llm: float
    patches: int
    visual_tokens: int

    @classmethod
    def of(cls, cell: Cell, spec: ModelSpec) -> _Costs:
        vision, text = vision_config(cell.tower), text_config(cell.llm)

        def size(config: Mapping[str, Any], matrices: int) -> float:
            width = float(config["hidden_size"])
            inner = float(config.get("intermediate_size", 4 * width))
            return float(config["num_hidden_layers"]) * (4 * width**2 + matrices * width * inner)

        return cls(size(vision, 2), size(text, 3), spec.patches, spec.visual_tokens)

    def stage(self, stage: StageRecipe, steps: int, packs: int, pictures: int, answers: int) -> float:
        """2 per parameter and position forwards, as much again backwards for the inputs, and for what is trained."""
        seen = steps * stage.batch_size
        positions = self.visual_tokens + QUESTION_TOKENS * answers / max(1, packs)
        llm = seen * positions * 2 * self.llm * (3 if stage.llm != "frozen" else 2)
        tuned = stage.tower != "frozen"
        tower = (3 * seen if tuned else pictures) * self.patches * 2 * self.tower
        return llm + tower

    def questions(self, count: int) -> float:
        """A picture has about ten questions."""
        return count * (2 * self.llm * (QUESTION_TOKENS + self.visual_tokens / 10) + self.patches * self.tower / 5)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def waiting(plan: Plan, done: Sequence[str] = ()) -> list[Unit]:
    """Units that a run still needs; what only leads to a finished unit is not needed."""
    needed: set[str] = set()
    for run in plan.runs:
        for key in reversed(run.units):
            if key in done or plan.units[key].done:
                break
            needed.add(key)
    return [unit for key, unit in plan.units.items() if key in needed]
