"""What `train` does between the command line and the trainer: which model, which stage, which numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from .train.recipes import Recipe


@dataclass(frozen=True)
class Source:
    """What is trained, and how."""

    checkpoint: Path | None
    """checkpoint to continue from; None for a new model"""
    adapter: Path | None
    """adapter of it to train further"""
    variant: str
    """variant of a new model; empty for the default"""
    vision: Path | None
    """directory of a new model's tower"""
    llm: Path | None
    """directory of a new model's language model"""
    recipe: str
    """name or file; empty for the variant's own"""
    stage: str
    """stage name; empty for `finetune`"""
    changes: tuple[str, ...] = ()
    """KEY=VALUE changes of the stage"""

    def check(self) -> None:
        """Raises UsageError for flags that exclude each other."""
        if self.checkpoint is not None and (self.variant or self.vision or self.llm):
            raise UsageError("--variant starts a new model and --checkpoint continues one", "give one of the two")
        if self.adapter is not None and self.checkpoint is None:
            raise UsageError(f"{self.adapter} belongs to a checkpoint", "name it with --checkpoint")

    def recipe_of(self, stages: tuple[str, ...]) -> Recipe:
        """The recipe with the changes made in those stages; in all of them if none is named."""
        import dataclasses

        from .train import recipes

        chosen = recipes.load(self.recipe or recipe_of(self.variant))
        changes = dict(_change(text) for text in self.changes)
        if not changes:
            return chosen
        built = tuple(
            recipes.override(stage, changes) if not stages or stage.name in stages else stage for stage in chosen.stages
        )
        return dataclasses.replace(chosen, stages=built)


def recipe_of(variant: str) -> str:
    """The recipe in a paper variant's name; base-nano for everything else."""
    from .spec import VARIANTS

    return VARIANTS[variant].recipe if variant in VARIANTS else "base-nano"


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text!r}", "write a key of the recipe and its value, e.g. --set epochs=3")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value  # a word, such as bf16
    return key.strip(), parsed


def train_stage(
    source: Source,
    out: Path | None,
    data: tuple[Path, ...],
    images: Path | None,
    *,
    eval_data: Path | None,
    max_bad: int,
    workers: int,
    max_seconds: float | None,
    force: bool,
) -> dict[str, Any]:
    """Train one stage of a recipe from a checkpoint, or from the backbones of a variant."""
    if out is None or not data or images is None:
        given = (("--out", out), ("--data", data), ("--images", images))
        lacking = [flag for flag, value in given if not value]
        raise UsageError(f"training needs {', '.join(lacking)}", "or see what it would do, with --dry-run")
    from .checkpoint_spec import load_spec
    from .spec import DEFAULT_VARIANT
    from .spec import variant as find_variant
    from .train.trainer import init_checkpoint, train

    source.check()
    name = source.stage or "finetune"
    chosen = source.recipe_of((name,)).stage(name)
    checkpoint = source.checkpoint
    if checkpoint is not None and checkpoint.resolve() == out.resolve():
        raise UsageError(f"{out} is the checkpoint to start from", "name another place with -o")
    if checkpoint is None:
        new = find_variant(source.variant or DEFAULT_VARIANT).name
        checkpoint = out.parent / f"{out.name}.init"
        if not checkpoint.exists() or load_spec(checkpoint).name != new:
            init_checkpoint(new, checkpoint, vision_dir=source.vision, llm_dir=source.llm, force=True)
    return train(
        checkpoint,
        chosen,
        data,
        images,
        out,
        eval_data=eval_data,
        adapter=source.adapter,
        max_bad=max_bad,
        workers=workers,
        max_seconds=max_seconds,
        force=force,
    ).to_dict()


def plan_training(
    source: Source,
    data: tuple[Path, ...],
    images: Path | None,
    *,
    max_bad_rows: int,
    rows: int | None,
    text_tokens: int,
    machine: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """What training would do, as JSON values and as lines for people; needs no weights.

    Args:
        machine: fields of train.plan.Machine, `memory` as text.
    """
    from .spec import DEFAULT_VARIANT
    from .train.plan import Machine, make_plan
    from .train.plan_source import checkpoint_model, data_lengths, plan_tokenizer, variant_model
    from .train.plan_text import parse_memory, plan_lines

    source.check()
    if (not data) != (images is None):
        raise UsageError("--data and --images belong together", "give both to measure rows, or none")
    if data and not source.stage:
        raise UsageError(f"{data[0]} holds the rows of one stage", "name it with --stage")
    stages = (source.stage,) if source.stage else ()
    chosen = source.recipe_of(stages)
    name = source.variant or DEFAULT_VARIANT
    model, spec = variant_model(name) if source.checkpoint is None else checkpoint_model(source.checkpoint)
    lengths = None
    if data and images is not None:
        tokenizer = plan_tokenizer(source.checkpoint, source.llm, name)
        lengths = data_lengths(list(data), images, spec, tokenizer, max_bad=max_bad_rows)
    memory = machine.get("memory")
    plan = make_plan(
        model,
        spec,
        chosen,
        Machine(**{**machine, "memory": parse_memory(memory) if memory else None}),
        stages=stages,
        rows=rows,
        text_tokens=text_tokens,
        lengths=lengths,
    )
    return plan.to_dict(), plan_lines(plan)
