"""transformers.Trainer with three changes: our order of packs, states of trained tensors only, a mark when whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CheckpointError, StorageError, UsageError
from ..files import storage_errors, write_json
from .dataset import PackSampler, StageData
from .objective import Objective
from .progress import Watch
from .recipes import StageRecipe

WHOLE = "whole.json"  # written last into a saved state; a state without it is ignored
JOB = "job.json"


def arguments(stage: StageRecipe, work: Path, device: str, workers: int) -> TrainingArguments:
    """Trainer's settings for a stage. Raises UsageError if the batch can't be split over the devices."""
    settings = TrainingArguments(
        output_dir=str(work),
        use_cpu=device == "cpu",
        num_train_epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[
            stage.lr_scheduler
        ],
        warmup_steps=stage.warmup_ratio,
        weight_decay=stage.weight_decay,
        adam_beta2=stage.adam_beta2,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bf16" and fast_bf16(device),
        save_strategy="steps",
        save_steps=stage.save_steps,
        save_total_limit=2,  # a kill while the newest is written leaves the one before
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        seed=stage.seed,
        data_seed=stage.seed,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
        label_names=["labels"],
    )
    micro = stage.micro_batch or max(1, stage.batch_size // settings.world_size)
    if stage.batch_size % (micro * settings.world_size):
        raise UsageError(
            f"batch_size {stage.batch_size} is no multiple of micro_batch {micro} x {settings.world_size} devices",
            "change batch_size or micro_batch in the recipe",
        )
    settings.per_device_train_batch_size = micro
    settings.gradient_accumulation_steps = stage.batch_size // (micro * settings.world_size)
    settings._n_gpu = min(1, settings.n_gpu)  # several GPUs in one process would split packs from their pictures
    return settings


def fast_bf16(device: str) -> bool:
    """Whether bf16 is worth it there. A CPU without instructions for it emulates: tens of times slower on AVX2."""
    if device != "cpu":
        return True
    if not hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class StageTrainer(Trainer):
    """Trainer for an Objective and a StageData."""

    def __init__(self, objective: Objective, settings: TrainingArguments, data: StageData, watch: Watch) -> None:
        batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        self.order = PackSampler([item.length for item in data.packs], batch, settings.seed)
        super().__init__(
            model=objective,
            args=settings,
            train_dataset=data,
            data_collator=data.batch,
            callbacks=[watch, _NewOrder(self.order)],
        )
        self.remove_callback(PrinterCallback)  # it writes to stdout
        self.trained = {f"model.{name}" for name in objective.trainable()}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.order

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Trained tensors only; the frozen ones are in the checkpoint that training started from."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        whole = self.model.state_dict() if state_dict is None else state_dict
        tensors = {name: whole[name].detach().cpu().contiguous() for name in sorted(self.trained)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with storage_errors(folder):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}
                write_json(folder / WHOLE, {"step": self.state.global_step, "bytes": sizes})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        lost = set(load_result.missing_keys) & self.trained
        if lost or load_result.unexpected_keys:
            raise CheckpointError(
                f"{self.args.output_dir}: state lacks {sorted(lost)[:3]}, holds {load_result.unexpected_keys[:3]}",
                "delete the directory and train again",
            )


class _NewOrder(TrainerCallback):
    """Tells the sampler the epoch, on a resumed run too."""

    def __init__(self, order: PackSampler) -> None:
        self.order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.order.set_epoch(int(state.epoch or 0))


def open_work(work: Path, job: Mapping[str, Any], resume: bool) -> Path | None:
    """Make or reopen the directory of saved states; returns the newest whole state of this very job, if any.

    Raises:
        StorageError: it holds the states of another job.
    """
    if work.exists() and not resume:
        shutil.rmtree(work)
    record = work / JOB
    if record.is_file() and _read(record) != job:
        raise StorageError(
            f"{work}: holds a run with another recipe, data or start", f"delete {work}, or write to another -o"
        )
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        write_json(record, dict(job))
    states = sorted(
        work.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]) if p.name[11:].isdigit() else -1
    )
    whole = [state for state in states if _is_whole(state)]
    for state in states:
        if state not in whole:
            shutil.rmtree(state, ignore_errors=True)
    return whole[-1] if whole else None


def _is_whole(state: Path) -> bool:
    record = _read(state / WHOLE)
    sizes = record.get("bytes") if isinstance(record, dict) else None
    if not isinstance(sizes, dict) or not sizes:
        return False
    return all((state / name).is_file() and (state / name).stat().st_size == size for name, size in sizes.items())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
