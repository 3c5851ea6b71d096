"""transformers.Trainer with these changes: our order of packs, our saved states, FSDP2 that runs on a CPU too."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import StorageError, UsageError
from .dataset import PackSampler, StageData
from .deal import DealtData
from .engines import Engine, check_launch
from .launch import place_in_run
from .objective import Objective
from .progress import Watch
from .recipes import StageRecipe
from .signals import Agreement, highest
from .spread import Dtensors, Spread, Whole, ZeroParts
from .states import WHOLE, Saved, everything, open_work, write_state

__all__ = ["WHOLE", "StageTrainer", "arguments", "fast_bf16", "newest_state", "open_work"]

LOOPBACK = "127.0.0.1"
WAIT_SECONDS = 7200  # for the others, while the first process reads data or writes a state


def arguments(
    stage: StageRecipe, work: Path, device: str, workers: int, engine: Engine | None = None
) -> TrainingArguments:
    """Trainer's settings for a stage.

    Raises:
        UsageError: the batch can't be split over the devices, or the launcher and the engine don't fit together.
    """
    engine = engine or Engine()
    check_launch(engine)
    world = place_in_run()[1]
    micro = stage.micro_batch or max(1, stage.batch_size // world)
    if stage.batch_size % (micro * world):
        raise UsageError(
            f"batch_size {stage.batch_size} is no multiple of micro_batch {micro} x {world} devices",
            "change batch_size or micro_batch in the recipe",
        )
    _prepare_libraries(engine, device)
    settings = TrainingArguments(
        output_dir=str(work),
        use_cpu=device == "cpu",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.batch_size // (micro * world),
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
        ddp_timeout=WAIT_SECONDS,
        label_names=["labels"],
        deepspeed=dict(engine.deepspeed) or None,
    )
    settings._n_gpu = min(1, settings.n_gpu)  # several GPUs in one process would split packs from their pictures
    return settings


def _prepare_libraries(engine: Engine, device: str) -> None:
    """What must be set before the first product, and before DeepSpeed or a process group is there."""
    # oneDNN keeps kernels for 1,024 shapes by default: gigabytes where every batch has another length
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if importlib.util.find_spec("deepspeed") is not None:  # accelerate imports it too wherever it is installed
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with contextlib.redirect_stdout(sys.stderr):  # its log keeps the stream that it finds, and stdout is data
            import deepspeed
        if engine.deepspeed and device == "cpu":
            if torch.cuda.is_available():
                raise UsageError(
                    f"engine {engine.name} runs on the GPU that is there", "hide it: CUDA_VISIBLE_DEVICES="
                )
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at run time
    if engine.deepspeed:  # it warns that Trainer accumulates gradients itself, which is as it should be
        logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    if engine.deepspeed and "RANK" not in os.environ:  # one process without a launcher, for offloading
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = str(probe.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
        os.environ.update(alone)
    if engine.name == "fsdp" and engine.offload and device != "cpu" and not torch.distributed.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl")  # gradients on the host have a norm too


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

    def __init__(
        self,
        objective: Objective,
        settings: TrainingArguments,
        data: StageData,
        watch: Watch,
        engine: Engine | None = None,
    ) -> None:
        self.engine = engine or Engine()
        batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        self.order = data.sampler(batch, settings.seed)
        dealt = DealtData(data, settings.world_size)
        super().__init__(
            model=objective,
            args=settings,
            train_dataset=dealt,
            data_collator=dealt.batch,
            callbacks=[watch, Agreement(watch), _NewOrder(self.order), _GiveBack()],
        )
        self.remove_callback(PrinterCallback)  # it writes to stdout
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate sets it and leaves it to the next stage
        self.objective = objective

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """Name → what is trained, as the engine holds it."""
        return {name: p for name, p in self.objective.model.named_parameters() if p.requires_grad}

    @property
    def spread(self) -> Spread:
        """Access to whole tensors; there once training has begun."""
        if self.engine.deepspeed:
            return ZeroParts(self.named, self.model_wrapped)
        return (Dtensors if self.engine.name == "fsdp" else Whole)(self.named, self.optimizer)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Every trained weight, whole, float32, on the writing process; nothing on the others. Collective."""
        named, spread, keep = self.named, self.spread, self.args.should_save
        found: dict[str, torch.Tensor] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls what PyTorch has renamed
            for name, parameter in named.items():
                tensor = spread.weight(parameter)
                if keep:
                    found[name] = tensor.float().cpu()
        return found

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.order

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: `_prepare_for_training` reads our states, for every engine."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        saved = Saved(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        if saved is not None:  # before the engine takes the weights
            with torch.no_grad():
                for name, parameter in self.named.items():
                    parameter.copy_(saved(name))
        if self.engine.name == "fsdp":
            _shard(self.objective, self.args, self.engine.offload)
            self.is_distributed_loading_by_transformers = True  # accelerate then leaves the model as it is
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if saved is not None:
            progress = saved.progress()
            self.spread.restore(saved, progress["steps"])
            self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **progress["schedule"]})
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        return prepared

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Gradients are divided after each micro-batch: put off, every process would hold them whole meanwhile."""
        return contextlib.nullcontext()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """None is saved: `_NewOrder` gives each step its own."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        tensors, failure = everything(self.named, self.spread), None
        if self.args.should_save:
            schedule = {key: value for key, value in self.lr_scheduler.state_dict().items() if key != "lr_lambdas"}
            progress = {"steps": self.spread.steps(), "schedule": schedule}
            try:
                write_state(target, tensors, self.state, progress)
            except StorageError as error:
                failure = error
        for _ in tensors:  # the other processes read along, also when writing failed
            pass
        if highest(self.args.device, failure is not None)[0]:
            raise failure or StorageError(f"{target}: the first process couldn't write it", "see what it says")


def _shard(objective: Objective, settings: TrainingArguments, offload: bool) -> None:
    """FSDP2: every layer is divided over all processes, and the rest as one more group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    kinds: dict[str, Any] = {
        "mesh": init_device_mesh(settings.device.type, (settings.world_size,)),
        "offload_policy": CPUOffloadPolicy(pin_memory=settings.device.type == "cuda") if offload else OffloadPolicy(),
    }
    if settings.bf16:  # weights travel in bf16; inputs are left to autocast, counts among them
        kinds["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in objective.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, **kinds)
    fully_shard(objective, **kinds)


class _NewOrder(TrainerCallback):
    """Tells the sampler the epoch, and makes what is random follow from seed, step and process, resumed or not."""

    def __init__(self, order: PackSampler) -> None:
        self.order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.order.set_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        seed = np.random.SeedSequence((args.seed, state.global_step, args.process_index)).generate_state(1)
        torch.manual_seed(int(seed[0]))  # dropout


class _GiveBack(TrainerCallback):
    """Every 20 steps on a processor, what glibc keeps of freed batches of other lengths goes back to the system."""

    def __init__(self) -> None:
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trim is not None and args.device.type == "cpu" and state.global_step % 20 == 0:
            self.trim(0)


def newest_state(work: Path, job: dict[str, Any], resume: bool, settings: TrainingArguments) -> Path | None:
    """`open_work` by the writing process; the others follow it. Collective.

    Raises:
        StorageError: it holds the states of another job, or isn't there for this process.
    """
    found, failure = None, None
    if settings.should_save:
        try:
            found = open_work(work, job, resume)
        except StorageError as error:
            failure = error
    failed, step = highest(settings.device, failure is not None, int(found.name.rpartition("-")[2]) + 1 if found else 0)
    if failed:
        raise failure or StorageError(f"{work}: the first process refused it", "see what it says")
    state = work / f"checkpoint-{step - 1}" if step else None
    if state is not None and not state.is_dir():
        raise StorageError(f"{state} can't be seen from here", "put -o on a file system that all machines see")
    return state
