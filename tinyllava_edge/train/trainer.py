"""Train one stage of a recipe (paper §3.2): a checkpoint and LLaVA JSON in, a checkpoint out.

    read and check rows → cache tower features → pack → Trainer on the objective → checkpoint.save

States are saved in `{out}.work` while it trains; the same call goes on from the newest whole one.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from .. import __version__
from .. import checkpoint as checkpoints
from ..data.llava_json import BAD_ROWS_FILE, write_bad_rows
from ..errors import StorageError, TinyLlavaEdgeError
from ..files import sha256_tree, write_json
from .backbones import init_checkpoint
from .dataset import StageData, prepare
from .engine import StageTrainer, arguments, open_work
from .monitor import USUAL, Monitor, attach
from .objective import Objective, freeze
from .pictures import CACHE_BYTES
from .progress import Interrupted, InterruptOnce, Meter, Watch
from .recipes import StageRecipe
from .score import score

__all__ = ["TrainResult", "init_checkpoint", "train", "work_directory"]

LAST = 20  # steps that the final loss is the mean of


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
    """tower, connector, llm → parameters, and those that were trained"""
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


def work_directory(out: Path) -> Path:
    """Where the states of a run that will write `out` are kept until it ends."""
    return out.parent / f"{out.name}.work"


def train(
    checkpoint: Path,
    stage: StageRecipe,
    data: Path | Sequence[Path],
    images: Path,
    out: Path,
    *,
    eval_data: Path | None = None,
    max_bad: int = 0,
    resume: bool = True,
    force: bool = False,
    max_seconds: float | None = None,
    cache_bytes: int = CACHE_BYTES,
    workers: int = 0,
    device: str | None = None,
    progress: bool = True,
    monitor: Monitor = USUAL,
) -> TrainResult:
    """Train one stage and write a checkpoint, whole or not at all.

    Args:
        checkpoint: what to start from: `init_checkpoint`'s output or an earlier stage's.
        data: LLaVA JSON, one file or several.
        images: directory that the rows' pictures are relative to.
        eval_data: held-out rows to score at the end, on pictures in `images` too.
        max_bad: bad rows to accept; they are written to `{out}.bad_rows.jsonl`.
        resume: go on from the newest whole state of the same job; False starts over.
        force: replace `out` if it exists.
        max_seconds: stop training after this time and keep what was learnt; the learning rate is not annealed then.
        cache_bytes: the most that cached tower features may take.
        workers: processes that decode pictures when features are not cached.
        device: `cpu` or `cuda`; by default a GPU where there is one.
        progress: draw a progress line on stderr.
        monitor: what is logged where, and which answers are shown; nothing of it changes what is trained.

    Raises:
        DataError, CheckpointError, UsageError, StorageError: unusable input or output.
        Interrupted: Ctrl-C; the hint says how to go on.
        TinyLlavaEdgeError: the loss is not finite.
    """
    monitor.check()
    if out.exists() and not force:
        raise StorageError(f"{out} exists already", "name another place with -o, or replace it with --force")
    start = checkpoints.load(checkpoint)
    work = work_directory(out)
    settings = arguments(stage, work, device or ("cuda" if torch.cuda.is_available() else "cpu"), workers)
    start.model.to(settings.device)
    progress = progress and settings.should_save  # of several processes, one talks and writes
    meter = Meter(progress)
    prepared = prepare(
        start, stage, data, images, max_bad=max_bad, cache_bytes=cache_bytes,
        on_progress=lambda done, count: meter.show(f"{stage.name}: features of {done}/{count} pictures", done == count),
    )  # fmt: skip
    source_sha256 = sha256_tree(checkpoint)
    job = {"stage": asdict(stage), "data_sha256": prepared.sha256, "source_sha256": source_sha256, "max_bad": max_bad}
    with settings.main_process_first():
        state = open_work(work, job, resume or not settings.should_save)

    watch = Watch(stage.name, stage.batch_size, max_seconds, progress)
    shown = partial(attach, monitor, data=eval_data or data, images=images, out=out)
    trainer = _fit(start, stage, prepared, settings, state, watch, shown)
    seconds, rates = watch.seconds, watch.throughput.whole
    losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    trained = _whole(trainer, start)
    scored = None
    if eval_data is not None and settings.should_save:
        scored = score(trained, stage, eval_data, images, cache_bytes=cache_bytes)
    result = TrainResult(
        checkpoint=str(out),
        source=str(checkpoint),
        source_sha256=source_sha256,
        recipe=asdict(stage),
        precision="bf16" if settings.bf16 else "fp32",
        data=tuple(str(path) for path in ([data] if isinstance(data, Path) else data)),
        data_sha256=prepared.sha256,
        rows=sum(len(item.rows) for item in prepared.packs),
        packs=len(prepared.packs),
        bad_rows=len(prepared.bad),
        steps=trainer.state.global_step,
        resumed_from=watch.first_step,
        seconds=seconds,
        images_per_s=rates.images_per_s,
        tokens_per_s=rates.tokens_per_s,
        mfu=rates.mfu,
        memory_bytes=watch.memory,
        devices=settings.world_size,
        parts=watch.parts,
        final_loss=sum(losses[-LAST:]) / max(1, len(losses[-LAST:])),
        losses=losses,
        stopped_early=watch.reason,
        score=asdict(scored) if scored else None,
        versions={"tinyllava_edge": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )
    if settings.should_save:
        _write(result, trained, prepared, out, force)
        shutil.rmtree(work, ignore_errors=True)
    return result


def _fit(
    start: checkpoints.Checkpoint,
    stage: StageRecipe,
    prepared: StageData,
    settings: TrainingArguments,
    state: Path | None,
    watch: Watch,
    shown: Callable[..., None],
) -> StageTrainer:
    """Train `start.model` in place; `state` is a saved state to go on from."""
    model = start.model
    model.model.language_model.set_attn_implementation("sdpa")  # the one that takes our boolean masks
    freeze(model, stage)
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = StageTrainer(Objective(model), settings, prepared, watch)
    shown(trainer=trainer, watch=watch, start=start, stage=stage)
    try:
        with InterruptOnce(watch), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers warns of its own attributes
            trainer.train(resume_from_checkpoint=str(state) if state else None)
    except KeyboardInterrupt:
        watch.reason = "interrupt"
    finally:
        watch.close()
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if watch.reason == "interrupt" and step < steps:
        raise Interrupted(
            f"stage {stage.name}: interrupted at step {step} of {steps}; states are kept in {settings.output_dir}",
            "run the same command again to go on from there",
        )
    if watch.reason == "loss":
        raise TinyLlavaEdgeError(
            f"stage {stage.name}: the loss at step {step} is {watch.loss}", "lower learning_rate, or train in fp32"
        )
    return trainer


def _whole(trainer: StageTrainer, start: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
    """The trained model as one; where its parameters are spread over devices, the writing process gathers them."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return start
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.args.should_save:
        return start
    model = checkpoints.load(start.root).model
    model.load_state_dict({name.removeprefix("model."): value for name, value in gathered.items()})
    return dataclasses.replace(start, model=model)


def _write(result: TrainResult, trained: checkpoints.Checkpoint, prepared: StageData, out: Path, force: bool) -> None:
    """The checkpoint, then what is said about it, beside it."""
    model = trained.model.cpu().eval()
    if result.recipe["gradient_checkpointing"]:
        model.gradient_checkpointing_disable()
    model.requires_grad_(True)
    checkpoints.save(model, trained.tokenizer, trained.spec, out, force=force)
    if prepared.bad:
        write_bad_rows(out.parent / f"{out.name}.{BAD_ROWS_FILE}", prepared.bad)
    write_json(out.parent / f"{out.name}.train.json", asdict(result))
