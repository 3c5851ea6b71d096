"""A grid as values: what is crossed, at which scale, on which questions. `grid_toml.read_grid` makes one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..train.recipes import Recipe

AXES = ("tower", "llm", "connector", "recipe", "data")  # in the order of a cell's name


@dataclass(frozen=True)
class Backbone:
    """A tower or a language model."""

    name: str
    """as in the grid"""
    like: str
    """key of VISION_BACKBONES or LLM_BACKBONES: family, normalisation, template"""
    path: Path
    """Hugging Face directory"""


@dataclass(frozen=True)
class Connector:
    """A connector with its options."""

    name: str
    """as in the grid"""
    kind: str
    """key of CONNECTORS"""
    options: Mapping[str, int] = field(default_factory=dict)
    """as `build_connector`"""


@dataclass(frozen=True)
class Data:
    """Training data. Files that are empty stand for a built-in set of that name."""

    name: str
    """as in the grid"""
    pretrain: tuple[Path, ...] = ()
    """LLaVA JSON of stages on captions"""
    finetune: tuple[Path, ...] = ()
    """LLaVA JSON of stages on conversations"""
    images: Path | None = None
    """directory that image paths start from"""


@dataclass(frozen=True)
class Scale:
    """How much of everything; what is absent is left as the recipe and the data have it."""

    pictures: int | None = None
    """pictures taken of each training file, from its front"""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """stage name → epochs; the empty name stands for all stages"""
    steps: Mapping[str, int] = field(default_factory=dict)
    """stage name → optimiser steps; the empty name stands for all stages"""
    every: Mapping[str, Any] = field(default_factory=dict)
    """fields of StageRecipe to change in all stages"""
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """stage name → fields of StageRecipe to change, after `every`"""
    seeds: tuple[int, ...] = (0,)
    """each cell is trained once with each"""


@dataclass(frozen=True)
class EvalPlan:
    """What every cell is asked."""

    tasks: tuple[str, ...]
    """benchmark names, or paths of LLaVA JSON files"""
    limit: int | None = None
    """fixed sample of so many questions of each task"""
    data: Path | None = None
    """data directory of the benchmarks"""
    images: Path | None = None
    """picture directory of LLaVA JSON files"""


@dataclass(frozen=True)
class Cell:
    """One combination."""

    tower: Backbone
    """vision tower"""
    llm: Backbone
    """language model"""
    connector: Connector
    """what joins them"""
    recipe: Recipe
    """stages"""
    data: Data
    """what it is trained on"""

    @property
    def axes(self) -> dict[str, str]:
        """Axis → the entry's name."""
        return {axis: getattr(self, axis).name for axis in AXES}

    @property
    def name(self) -> str:
        """The names of its entries, joined by dots."""
        return ".".join(self.axes.values())


@dataclass(frozen=True)
class Grid:
    """Everything that a grid file says."""

    towers: tuple[Backbone, ...]
    """vision towers"""
    llms: tuple[Backbone, ...]
    """language models"""
    connectors: tuple[Connector, ...]
    """connectors"""
    recipes: tuple[Recipe, ...]
    """recipes, named as in the grid"""
    data: tuple[Data, ...]
    """training sets"""
    scale: Scale
    """how much of everything"""
    eval: EvalPlan
    """what is asked"""
    baseline: str
    """cell that the others are compared with"""

    def cells(self) -> list[Cell]:
        """The product, the last axis running fastest."""
        return [
            Cell(*found)
            for found in itertools.product(self.towers, self.llms, self.connectors, self.recipes, self.data)
        ]

    def facts(self) -> dict[str, Any]:
        """JSON values for a results file: names, scale and questions, without paths of this machine."""
        return {
            "baseline": self.baseline,
            "axes": {
                "tower": [item.name for item in self.towers],
                "llm": [item.name for item in self.llms],
                "connector": [item.name for item in self.connectors],
                "recipe": [item.name for item in self.recipes],
                "data": [item.name for item in self.data],
            },
            "scale": {**asdict(self.scale), "seeds": list(self.scale.seeds)},
            "tasks": [Path(task).name for task in self.eval.tasks],
            "limit": self.eval.limit,
        }
