"""Train one stage of a recipe (paper §3.2): a checkpoint and conversations in, a checkpoint out.

    read and check rows → keep tower features → pack → Trainer on the objective → checkpoint.save

States are saved in `{out}.work` while it trains; the same call goes on from the newest whole one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .. import __version__
from .. import checkpoint as checkpoints
from ..data.llava_json import BAD_ROWS_FILE, write_bad_rows
from ..errors import StorageError, TinyLlavaEdgeError, UsageError
from ..files import sha256_tree
from . import adapters
from .backbones import init_checkpoint
from .dataset import StageData, check_rows, prepare
from .engine import StageTrainer, arguments, newest_state
from .engines import Engine
from .faults import AGAIN, explained
from .launch import is_first
from .monitor import USUAL, Monitor, attach
from .objective import Objective, attention_of
from .parts import adapts, count_parts, freeze, halve_frozen, modes, recompute
from .pictures import CACHE_BYTES
from .places import adapter_directory, cache_directory, check_places, claimed, tidy, work_directory
from .progress import Interrupted, Meter, Watch
from .recipes import StageRecipe
from .record import TrainResult, read_record
from .score import score
from .signals import Signals
from .source import open_source
from .states import JOB, read_json
from .throughput import Throughput

__all__ = ["TrainResult", "init_checkpoint", "train", "work_directory"]

LAST = 20  # steps that the final loss is the mean of


def train(
    checkpoint: Path,
    stage: StageRecipe,
    data: Path | Sequence[Path],
    images: Path | Sequence[Path],
    out: Path,
    *,
    eval_data: Path | None = None,
    adapter: Path | None = None,
    max_bad: int | float = 0,
    resume: bool = True,
    force: bool = False,
    max_seconds: float | None = None,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    feature_dtype: str = "float32",
    workers: int = 0,
    device: str | None = None,
    engine: Engine | None = None,
    progress: bool = True,
    monitor: Monitor = USUAL,
) -> TrainResult:
    """Train one stage and write a checkpoint, whole or not at all.

    Args:
        checkpoint: what to start from: `init_checkpoint`'s output or an earlier stage's.
        data: conversations: JSON files, shards, or a mixture's TOML file (docs/data.md).
        images: folders and archives that the rows' pictures are looked up in.
        eval_data: held-out rows to score at the end, on pictures in `images` too.
        adapter: what adapters of this checkpoint are trained further from; `{out}.adapter` of an earlier run.
        max_bad: bad rows to accept, or their share below 1; they are written to `{out}.bad_rows.jsonl`.
        resume: go on from the newest whole state of the same job; False starts over.
        force: replace `out` if it exists.
        max_seconds: stop training after this time and keep what was learnt; the learning rate is not annealed then.
        cache: where tokens and features of a frozen tower are kept for other runs too; `{out}.cache`, which is removed
            at the end, by default.
        cache_bytes: the most that cached tower features may take.
        feature_dtype: `float32`, `bfloat16` or `float16`, in which they are kept.
        workers: processes that decode pictures when features are not cached.
        device: `cpu` or `cuda`; by default a GPU where there is one.
        engine: how states are divided over processes, from `engines.choose`; `ddp` by default.
        progress: draw a progress line on stderr.
        monitor: what is logged where, and which answers are shown; nothing of it changes what is trained.

    Raises:
        DataError, CheckpointError, UsageError, StorageError: unusable input or output.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1; the hint says how to go on.
        TinyLlavaEdgeError: the loss is not finite, or another process of the run died.
    """
    monitor.check()
    files = [data] if isinstance(data, Path) else list(data)
    folders = [images] if isinstance(images, Path) else list(images)
    check_places(out, [*files, *folders, checkpoint, adapter, eval_data, cache])
    with claimed(out):
        return _train(
            checkpoint, stage, files, folders, out, eval_data=eval_data, adapter=adapter, max_bad=max_bad,
            resume=resume, force=force, max_seconds=max_seconds, cache=cache, cache_bytes=cache_bytes,
            feature_dtype=feature_dtype, workers=workers, device=device, engine=engine or Engine(), progress=progress,
            monitor=monitor,
        )  # fmt: skip


def _train(
    checkpoint: Path,
    stage: StageRecipe,
    data: list[Path],
    images: list[Path],
    out: Path,
    *,
    eval_data: Path | None,
    adapter: Path | None,
    max_bad: int | float,
    resume: bool,
    force: bool,
    max_seconds: float | None,
    cache: Path | None,
    cache_bytes: int,
    feature_dtype: str,
    workers: int,
    device: str | None,
    engine: Engine,
    progress: bool,
    monitor: Monitor,
) -> TrainResult:
    work, kept, names = work_directory(out), adapter_directory(out), tuple(map(str, data))
    source_sha256 = sha256_tree(checkpoint)
    if out.exists() and not force and (found := _finished(out, stage, source_sha256, names)):
        if is_first():
            tidy(out, cache is None)
        return found
    if adapter is not None:
        adapters.check_origin(adapter, checkpoint, source_sha256)
    for path in (out, kept) if adapts(stage) and not work.exists() else (out,):
        if path.exists() and not force:
            raise StorageError(f"{path} exists already", "name another place with -o, or replace it with --force")
    start = checkpoints.load(checkpoint)
    settings = arguments(stage, work, device or ("cuda" if torch.cuda.is_available() else "cpu"), workers, engine)
    if engine.name in ("zero3", "fsdp") and any(mode.kind == "qlora" for mode in modes(stage).values()):
        raise UsageError(
            f"stage {stage.name}: qlora with engine {engine.name}, which divides weights; those in 4 bits stay whole",
            "use ddp or zero2, or lora",
        )
    attention = attention_of(stage, settings.device, settings.bf16)
    start.model.to(settings.device)
    progress = progress and settings.should_save  # of several processes, one talks and writes
    meter = Meter(progress)
    place = cache or cache_directory(out)
    prepared = prepare(
        start, stage, data, images, max_bad=max_bad, cache=place, cache_bytes=cache_bytes,
        feature_dtype=feature_dtype, varlen=attention != "sdpa", say=meter.say,
        on_progress=lambda done, count: meter.show(f"{stage.name}: features of {done}/{count} pictures", done == count),
    )  # fmt: skip
    if eval_data is not None:
        check_rows(start, stage, eval_data, images, place, max_bad=max_bad)
    job = {
        "stage": asdict(stage),
        "data_sha256": prepared.sha256,
        "source_sha256": source_sha256,
        "max_bad": max_bad,
        "weights": [item.weight for item in prepared.source.sets] if prepared.source else [],
        "feature_dtype": feature_dtype,
    }
    if adapter is not None:
        job["adapter_sha256"] = sha256_tree(adapter)
    state = newest_state(work, job, resume, settings)
    watch = Watch(stage.name, stage.batch_size, max_seconds, progress)
    asked = open_source(data if eval_data is None else eval_data, images, place)
    shown = partial(attach, monitor, source=asked, out=out)
    parts = count_parts(start.model, stage)
    trainer = _fit(start, stage, prepared, settings, state, watch, engine, attention, adapter, shown)
    losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    origin = {"source": str(checkpoint), "source_sha256": source_sha256}
    trained = _whole(trainer, start, stage, origin, kept)
    scored = None
    if eval_data is not None and settings.should_save:
        try:
            scored = score(trained, stage, eval_data, images, max_bad=max_bad, cache_bytes=cache_bytes, cache=place)
        except TinyLlavaEdgeError as error:  # hours of training are not lost for it
            meter.say(f"{stage.name}: not scored: {error.message}")
    rates = watch.throughput.whole
    result = TrainResult(
        checkpoint=str(out),
        source=str(checkpoint),
        source_sha256=source_sha256,
        recipe=asdict(stage),
        precision="bf16" if settings.bf16 else "fp32",
        data=names,
        data_sha256=prepared.sha256,
        rows=prepared.rows,
        packs=len(prepared.packs),
        bad_rows=len(prepared.bad),
        steps=trainer.state.global_step,
        resumed_from=watch.first_step,
        seconds=watch.seconds,
        images_per_s=rates.images_per_s,
        tokens_per_s=rates.tokens_per_s,
        mfu=rates.mfu,
        memory_bytes=watch.memory,
        devices=settings.world_size,
        parts=parts,
        final_loss=sum(losses[-LAST:]) / max(1, len(losses[-LAST:])),
        losses=losses,
        stopped_early=watch.reason,
        score=asdict(scored) if scored else None,
        versions={"tinyllava_edge": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )
    if settings.should_save:
        _write(result, trained, prepared, out, force)
        tidy(out, cache is None)
    return result


def _finished(out: Path, stage: StageRecipe, source_sha256: str, names: tuple[str, ...]) -> TrainResult | None:
    """The record of this very run, if it was killed when all but the tidying was done.

    Of several processes the first one tidies, which the others may find done already.
    """
    found, job = read_record(out), read_json(work_directory(out) / JOB)
    if found is None or (found.source_sha256, found.recipe, found.data) != (source_sha256, asdict(stage), names):
        return None
    if isinstance(job, dict):
        return found if job.get("data_sha256") == found.data_sha256 and job.get("stage") == found.recipe else None
    return None if is_first() else found


def _fit(
    start: checkpoints.Checkpoint,
    stage: StageRecipe,
    prepared: StageData,
    settings: TrainingArguments,
    state: Path | None,
    watch: Watch,
    engine: Engine,
    attention: str,
    adapter: Path | None,
    shown: Callable[..., None],
) -> StageTrainer:
    """Train `start.model` in place; `state` is a saved state to go on from."""
    model = start.model
    model.model.language_model.set_attn_implementation(attention)
    freeze(model, stage)
    throughput = Throughput.of(model, start.spec, stage)
    adapters.put_in(model, stage, "bf16" if settings.bf16 else "fp32")
    freeze(model, stage)
    if adapter is not None:
        adapters.load(model, adapter, stage)
    if settings.bf16 and engine.name == "ddp":  # the others have ways of their own
        halve_frozen(model)
    if stage.gradient_checkpointing:
        recompute(model, True)
    if stage.compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True)
    trainer = StageTrainer(Objective(model), settings, prepared, watch, engine)
    shown(trainer=trainer, watch=watch, start=start, stage=stage, throughput=throughput)
    signals = Signals(watch)
    try:
        with signals, explained(stage.name, Path(settings.output_dir)), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers warns of its own attributes
            trainer.train(resume_from_checkpoint=str(state) if state else None)
    except KeyboardInterrupt:
        watch.reason = "interrupt"
    finally:
        watch.close()
        unset_hf_deepspeed_config()  # under ZeRO-3 the next checkpoint that is loaded would be divided too
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if watch.reason == "interrupt" and step < steps:
        raise Interrupted(
            f"stage {stage.name}: interrupted at step {step} of {steps} by {signals.name()}; states are kept in "
            f"{settings.output_dir}",
            AGAIN,
        )
    if watch.reason == "loss":
        raise TinyLlavaEdgeError(
            f"stage {stage.name}: the loss at step {step} is {watch.loss}", "lower learning_rate, or train in fp32"
        )
    return trainer


def _whole(
    trainer: StageTrainer, start: checkpoints.Checkpoint, stage: StageRecipe, origin: Mapping[str, str], kept: Path
) -> checkpoints.Checkpoint:
    """The trained model as one: gathered where an engine divides it, adapters saved and merged."""
    if trainer.engine.name == "ddp" and not adapts(stage) and not trainer.args.bf16:
        return start
    gathered = trainer.whole_weights()
    if not trainer.args.should_save:
        return start
    model = checkpoints.load(start.root).model
    if adapts(stage):
        adapters.save(gathered, stage, kept, origin, force=True)
        adapters.merge(model, kept)
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gathered:
                    parameter.copy_(gathered[name])
    device = trainer.args.device
    if device.type == "cuda":  # for scoring, if there is room beside the parts
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] > 1.5 * sum(p.numel() * p.element_size() for p in model.parameters()):
            model.to(device)
    return dataclasses.replace(start, model=model)


def _write(result: TrainResult, trained: checkpoints.Checkpoint, prepared: StageData, out: Path, force: bool) -> None:
    """What is said about the checkpoint, beside it, then the checkpoint: a run is over when that is there."""
    model = trained.model.cpu().eval()
    if result.recipe["gradient_checkpointing"]:
        recompute(model, False)
    model.requires_grad_(True)
    if prepared.bad:
        write_bad_rows(out.parent / f"{out.name}.{BAD_ROWS_FILE}", prepared.bad)
    result.write(out)
    checkpoints.save(model, trained.tokenizer, trained.spec, out, force=force)
