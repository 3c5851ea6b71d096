"""What `train` does between the command line and the trainer: which model, which stage, which numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from .train.new_model import NewModel
    from .train.recipes import Recipe


FEATURE_TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """What is trained, and how."""

    checkpoint: Path | None
    """checkpoint to continue from; None for a new model"""
    adapter: Path | None
    """adapter of it to train further"""
    variant: str
    """variant of a new model; empty for the default"""
    vision: tuple[Path, ...]
    """directory of a new model's tower, or of both towers of a mixture"""
    llm: Path | None
    """directory of a new model's language model"""
    recipe: str
    """name or file; empty for the variant's own"""
    stage: str
    """stage name; empty for `finetune`"""
    changes: tuple[str, ...] = ()
    """KEY=VALUE changes of the stage"""
    connector: str = ""
    """a new model's connector"""
    template: str = ""
    """a new model's conversation template"""
    name: str = ""
    """a new model's name"""
    max_length: int = 0
    """a new model's longest sequence"""
    image_policy: str = ""
    """how a new model's pictures become square"""

    def new(self) -> NewModel:
        """The new model."""
        from .train.new_model import new_model

        return new_model(
            self.variant, self.vision, self.llm, connector=self.connector, template=self.template, name=self.name,
            max_length=self.max_length, image_policy=self.image_policy,
        )  # fmt: skip

    def check(self) -> None:
        """Raises UsageError for flags that exclude each other."""
        own = self.vision or self.llm or self.connector or self.template or self.name or self.max_length
        if self.checkpoint is not None and (self.variant or own or self.image_policy):
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
    except (ValueError, RecursionError):
        parsed = value  # a word, such as bf16
    return key.strip(), parsed


def ending(record: Mapping[str, Any]) -> str:
    """What a person is told when a stage is over."""
    out, recipe, score = record["checkpoint"], record["recipe"], record["score"]
    lines = []
    if score is not None:
        lines.append(f"held-out: {score['exact']} of {score['rows']} exact, {score['loss']:.4f} nats a token")
    if any("lora" in recipe[part] for part in ("tower", "connector", "llm")):
        lines.append(f"adapter: {out}.adapter, merged into the checkpoint")
    following = "tinyllava-edge export" if recipe["template"] == "model" else "tinyllava-edge train --checkpoint"
    return "\n".join([*lines, f"checkpoint: {out} (next: {following} {out} …)"])


def parse_bad(text: str) -> int | float:
    """A number of rows, or a share below 1 from `1%`. Raises UsageError."""
    number = text.removesuffix("%").strip()
    try:
        if text.endswith("%"):
            share = float(number) / 100
            if 0 <= share < 1:
                return share
        elif 0 <= int(number) < 1 << 40:
            return int(number)
    except ValueError:
        pass
    raise UsageError(f"--max-bad-rows {text!r}", "give a number of rows, or a share such as 1%")


def train_stage(
    source: Source,
    out: Path | None,
    data: tuple[Path, ...],
    images: tuple[Path, ...],
    *,
    eval_data: Path | None,
    max_bad: int | float,
    workers: int,
    max_seconds: float | None,
    force: bool,
    cache: Path | None,
    cache_size: str,
    feature_type: str,
    monitor: Mapping[str, Any],
    engine: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Train one stage of a recipe from a checkpoint, or from the parts of a new model.

    Args:
        monitor: fields of train.monitor.Monitor; `track` holds what comes beside the usual.
        engine: arguments of train.engines.choose.

    Returns:
        The record as JSON values; None in all processes of a run but the first.
    """
    if out is None or not data:
        lacking = [flag for flag, value in (("--out", out), ("--data", data)) if not value]
        raise UsageError(f"training needs {', '.join(lacking)}", "or see what it would do, with --dry-run")
    from .train.launch import is_first, one_at_a_time, quiet_libraries

    quiet_libraries()
    from .train.engines import choose
    from .train.monitor import Monitor
    from .train.places import check_places, start_directory
    from .train.plan_text import parse_memory
    from .train.tracking import DEFAULT
    from .train.trainer import train

    source.check()
    name = source.stage or "finetune"
    chosen = source.recipe_of((name,)).stage(name)
    checkpoint = source.checkpoint
    check_places(
        out,
        [*data, *images, checkpoint, source.adapter, eval_data, cache, *source.vision, source.llm, engine["config"]],
    )
    chosen_engine, bytes_ = choose(**engine), int(parse_memory(cache_size, "--cache-size"))
    watched = Monitor(**{**monitor, "track": (*DEFAULT, *monitor["track"])})
    watched.check()
    if feature_type not in FEATURE_TYPES:
        raise UsageError(f"--feature-type {feature_type!r}", f"known: {', '.join(FEATURE_TYPES)}")
    if checkpoint is None:
        new = source.new()
        checkpoint = start_directory(out)
        with one_at_a_time(checkpoint):
            new.write(checkpoint)
    record = train(
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
        cache=cache,
        cache_bytes=bytes_,
        feature_dtype=feature_type,
        engine=chosen_engine,
        monitor=watched,
    )
    return record.to_dict() if is_first() else None


def plan_training(
    source: Source,
    data: tuple[Path, ...],
    images: tuple[Path, ...],
    *,
    max_bad: int | float,
    rows: int | None,
    text_tokens: int,
    machine: Mapping[str, Any],
    cache_size: str,
    feature_type: str,
) -> tuple[dict[str, Any], list[str]]:
    """What training would do, as JSON values and as lines for people; needs no weights.

    Args:
        machine: fields of train.plan.Machine, `memory` as text.
    """
    from .spec import DEFAULT_VARIANT
    from .train.plan import Machine, make_plan
    from .train.plan_source import checkpoint_model, data_lengths, plan_tokenizer
    from .train.plan_text import parse_memory, plan_lines

    source.check()
    if images and not data:
        raise UsageError("--images without --data", "give both to measure rows, or none")
    stages = (source.stage or "finetune",) if data or source.stage else ()  # data are one stage's
    chosen = source.recipe_of(stages)
    if source.checkpoint is not None:
        model, spec = checkpoint_model(source.checkpoint)
    else:
        new = source.new()
        model, spec = new.without_weights(), new.spec
    lengths = None
    if data:
        tokenizer = plan_tokenizer(source.checkpoint, source.llm, source.variant or DEFAULT_VARIANT)
        lengths = data_lengths(data, images, spec, tokenizer, max_bad=max_bad)
    memory = machine.get("memory")
    plan = make_plan(
        model,
        spec,
        chosen,
        Machine(**{**machine, "memory": parse_memory(memory, "--device-memory") if memory else None}),
        stages=stages,
        rows=rows,
        text_tokens=text_tokens,
        lengths=lengths,
        cache_bytes=int(parse_memory(cache_size, "--cache-size")),
        feature_bytes=4 if feature_type == "float32" else 2,
    )
    return plan.to_dict(), plan_lines(plan)
