"""Training speed: our stages beside the same model in a plain transformers Trainer, in turns, round after round.

    python benchmarks/train_throughput.py [--rounds 3] [--out FILE.json]                      # nano model, this CPU
    python benchmarks/train_throughput.py --model TinyLLaVA-base-Sig-Phi --device cuda \
        --peak-tflops 989 --out FILE.json                                                     # one H100, random weights

Cases: base's stage 1 (connector), base's stage 2 (connector and language model) and share's (tower layers too). Both
sides see the same conversations. The peer decodes every picture, pads each batch in random order to its longest row
and computes all logits, as a plain Trainer does; on a GPU in float16 with gradient checkpointing and 8 workers, as
TinyLLaVA Factory's scripts do. Ours is what `train` runs by the recipe: kept tower features where the tower is frozen,
logits of answers alone, frozen weights in bf16, on a GPU FlashAttention where it is installed; at nano scale rows that
share a picture's prefix, in batches of 24 pictures against 64 rows of the peer.

Reading and checking rows and computing features comes before the steps and is not in their rate: a last column counts
it into one epoch of ours. The peer reads its rows in no time.

Rates are of rows and of their positions, each row by itself, without padding, over steps after the first ones. MFU
counts what a side has to compute, nothing recomputed, no padding, over the peak: --peak-tflops, or on a CPU the rate of
a large product in the same run. A prefix that rows share and a kept feature are not computed, so they don't count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.checkpoint import Checkpoint
from tinyllava_edge.train import recipes
from tinyllava_edge.train.collate import IGNORED
from tinyllava_edge.train.dataset import StageData, prepare
from tinyllava_edge.train.engine import StageTrainer, arguments, fast_bf16
from tinyllava_edge.train.objective import Objective, attention_of
from tinyllava_edge.train.parts import freeze, halve_frozen
from tinyllava_edge.train.plan_data import Lengths
from tinyllava_edge.train.plan_shape import model_shape, sequence_flop, tower_flop
from tinyllava_edge.train.progress import Watch
from tinyllava_edge.train.recipes import StageRecipe

NANO = "TinyLLaVA-base-NanoSig-Nano"
WORKERS = {"cpu": 0, "cuda": 8}  # processes that decode pictures, on both sides; Factory's scripts have 8
SKIPPED = 3  # steps before the clock starts
# case → recipe's stage, which rows
CASES = {
    "base stage 1": ("base", "pretrain", "captions"),
    "base stage 2": ("base", "finetune", "answers"),
    "share stage 2": ("share", "share-pretrain", "captions"),
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """One side of one round, per second."""

    rows: float
    """conversations"""
    tokens: float
    """positions of those rows, each by itself, without padding"""
    steps: int
    """measured optimiser steps"""
    seconds: float
    """their time"""


class Clock(TrainerCallback):
    """Times the measured steps; `work` tells the rows and positions of a step by its number, from 0."""

    def __init__(self, device: str, seconds: float, work: Callable[[int], tuple[int, int]]) -> None:
        self.device, self.limit, self.work = device, seconds, work
        self.steps = 0
        self.began = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start, count, or stop."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step == SKIPPED:
            self.began = now
        elif state.global_step > SKIPPED:
            self.steps, self.seconds = state.global_step - SKIPPED, now - self.began
            control.should_training_stop = self.seconds > self.limit

    def rates(self) -> Rates:
        """What was measured. Raises RuntimeError when nothing was."""
        if not self.steps:
            raise RuntimeError("too few steps to measure: give more rows or a longer time")
        done = [self.work(SKIPPED + k) for k in range(self.steps)]
        rows, tokens = (sum(item[k] for item in done) for k in (0, 1))
        return Rates(rows / self.seconds, tokens / self.seconds, self.steps, self.seconds)


def ours(start: Checkpoint, stage: StageRecipe, data: StageData, device: str, seconds: float) -> Rates:
    """`train`'s own trainer on prepared rows."""
    order = data.sampler(stage.batch_size, stage.seed)
    steps: list[tuple[int, int]] = []

    def work(step: int) -> tuple[int, int]:
        while step >= len(steps):
            order.set_epoch(len(steps) * stage.batch_size // len(order))
            packs = [data[k] for k in order]
            for k in range(0, len(packs), stage.batch_size):
                rows = [row for item in packs[k : k + stage.batch_size] for row in item.rows]
                steps.append((len(rows), sum(len(row.ids) for row in rows)))
        return steps[step]

    clock = Clock(device, seconds, work)
    freeze(start.model, stage)
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(stage, Path(folder), device, WORKERS[device])
        settings.save_strategy = "no"
        start.model.model.language_model.set_attn_implementation(attention_of(stage, settings.device, settings.bf16))
        start.model.to(settings.device)
        if settings.bf16:
            halve_frozen(start.model)
        _checkpointing(start.model, stage)
        trainer = StageTrainer(Objective(start.model), settings, data, Watch(stage.name, stage.batch_size, None, False))
        trainer.add_callback(clock)
        trainer.train()
    start.model.float()
    return clock.rates()


class Plain(nn.Module):
    """Stock Llava under a plain Trainer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss over all logits, as transformers computes it."""
        return {"loss": self.model(**batch).loss}


def peer(start: Checkpoint, stage: StageRecipe, data: StageData, device: str, seconds: float) -> Rates:
    """The same model and rows: one row a sequence, padding, pixels, all logits."""
    mean = float(np.mean(data.packs.lengths))
    clock = Clock(device, seconds, lambda step: (stage.batch_size, round(stage.batch_size * mean)))

    def collated(packs: Sequence[Any]) -> dict[str, torch.Tensor]:
        rows = [item.rows[0] for item in packs]
        n = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), n), data.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for k, row in enumerate(rows):
            found = torch.from_numpy(np.array(row.ids)).long()
            ids[k, : len(found)], mask[k, : len(found)] = found, 1
            labels[k, : len(found)] = torch.where(torch.from_numpy(np.array(row.is_answer)), found, IGNORED)
        pictures = [number for item in packs for number in item.images]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **data.pictures(pictures)}

    freeze(start.model, stage)
    start.model.model.language_model.set_attn_implementation("sdpa")
    micro = stage.micro_batch or stage.batch_size
    with tempfile.TemporaryDirectory() as work:
        settings = TrainingArguments(
            output_dir=work,
            use_cpu=device == "cpu",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=max(1, stage.batch_size // micro),
            num_train_epochs=100,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            bf16=device == "cpu" and fast_bf16(device),
            fp16=device == "cuda",
            dataloader_num_workers=WORKERS[device],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10**6,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        start.model.to(settings.device)
        _checkpointing(start.model, dataclasses.replace(stage, gradient_checkpointing=device == "cuda"))
        trainer = Trainer(
            model=Plain(start.model).train(), args=settings, train_dataset=data, data_collator=collated,
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return clock.rates()


def _checkpointing(model: Any, stage: StageRecipe) -> None:
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def stage_of(case: str, nano: bool) -> StageRecipe:
    """The recipe's stage; epochs and rate are the benchmark's, the learning rate must not spoil the weights."""
    name, stage, _ = CASES[case]
    chosen = recipes.load(f"{name}-nano" if nano else name).stage(stage)
    changes = {"epochs": 100.0, "learning_rate": 1e-6, "lr_scheduler": "constant"}
    return recipes.override(chosen, changes)


def nano_data(root: Path, pictures: int) -> dict[str, tuple[Path, Path]]:
    """easy-VQA as the demo takes it: rows → file, picture directory."""
    from tinyllava_edge.data import easy_vqa

    made = easy_vqa.convert(root / "easy-vqa")
    found = {}
    for name, path in (("captions", made.train_captions), ("answers", made.train_qa)):
        rows = json.loads(path.read_text(encoding="utf-8"))
        kept = set(list(dict.fromkeys(row["image"] for row in rows))[:pictures])
        (root / f"{name}.json").write_text(json.dumps([row for row in rows if row["image"] in kept]))
        found[name] = (root / f"{name}.json", root / "easy-vqa" / "images")
    return found


def made_up_data(root: Path, pictures: int) -> dict[str, tuple[Path, Path]]:
    """Photograph-sized noise with captions of 20 to 60 words, and talks of 1 to 8 turns of 10 to 120 words."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    words = ["red", "circle", "the", "image", "blue", "there", "is", "a", "large", "triangle", "yes", "small"]
    rows: dict[str, list[Any]] = {"captions": [], "answers": []}

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words, int(rng.integers(low, high))))

    for k in range(pictures):
        coarse = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480)).save(root / "images" / f"{k}.jpg", quality=90)
        for name, turns, low, high in (("captions", 1, 20, 60), ("answers", int(rng.integers(1, 9)), 10, 120)):
            talk = []
            for turn in range(turns):
                mark = "<image>\n" if turn == 0 else ""
                talk += [{"from": "human", "value": mark + text(5, 20)}, {"from": "gpt", "value": text(low, high)}]
            rows[name].append({"id": k, "image": f"{k}.jpg", "conversations": talk})
    for name, made in rows.items():
        (root / f"{name}.json").write_text(json.dumps(made))
    return {name: (root / f"{name}.json", root / "images") for name in rows}


def row_flop(start: Checkpoint, stage: StageRecipe, data: StageData, kept: bool) -> float:
    """Operations for a row of these packs, nothing recomputed, the mean; with kept features the tower's are none."""
    plain = dataclasses.replace(stage, gradient_checkpointing=False, micro_batch=1)
    freeze(start.model, plain)
    shape = model_shape(start.model, start.spec, plain)
    total = rows = 0.0
    for k in range(0, len(data.packs), max(1, len(data.packs) // 200)):
        item = data.packs[k]
        n, answers = item.length, sum(int(np.sum(row.is_answer)) for row in item.rows)
        with_picture = float(bool(item.images))
        found = Lengths(1, 1, 1, with_picture, n, n, answers, answers, 0, "measured")
        total += sequence_flop(start.model, shape, found, plain)
        total += 0.0 if kept else with_picture * tower_flop(start.model, shape, plain)
        rows += len(item.rows)
    return total / rows


def product_rate(device: str, precision: torch.dtype, seconds: float = 2.0) -> float:
    """Operations per second of a large product, for the peak of a CPU."""
    a = torch.randn(2048, 2048, device=device, dtype=precision)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ a
        best = max(best, 2.0 * 2048**3 / (time.perf_counter() - began))
    return best


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Every case in turns."""
    nano = args.model == NANO
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = nano_data(root, args.pictures) if nano else made_up_data(root, args.pictures)
        if nano:
            from tinyllava_edge.train.trainer import init_checkpoint

            init_checkpoint(NANO, root / "start")
        else:
            from random_checkpoint import write_checkpoint  # beside this file

            write_checkpoint(args.model, root / "start", say=say)
        start = checkpoints.load(root / "start")
        precision = torch.bfloat16 if fast_bf16(args.device) else torch.float32
        peak = args.peak_tflops * 1e12 if args.peak_tflops else product_rate(args.device, precision)
        found: dict[str, Any] = {
            "model": args.model, "device": _device(args.device), "threads": torch.get_num_threads(),
            "precision": str(precision).removeprefix("torch."), "peak_flops": peak, "rounds": args.rounds,
            "command": " ".join(["python", "benchmarks/train_throughput.py", *sys.argv[1:]]), "cases": {},
        }  # fmt: skip
        for case in args.cases or CASES:
            stage, (rows, images) = stage_of(case, nano), made[CASES[case][2]]
            start.model.to(args.device)
            began = time.perf_counter()
            varlen = attention_of(stage, start.model.device, fast_bf16(args.device)) != "sdpa"
            kept = prepare(
                start, stage, rows, images, cache=root / f"cache-{len(found['cases'])}", cache_bytes=args.cache_bytes,
                varlen=varlen,
            )  # fmt: skip
            prepared = time.perf_counter() - began
            alone = dataclasses.replace(stage, max_turns=1, batch_size=64 if nano else stage.batch_size)
            plain = prepare(start, alone, rows, images, cache=root / "cache", cache_bytes=0)
            cached = "image_features" in kept.batch([kept.packs[0]])
            flop = {"ours": row_flop(start, stage, kept, cached), "peer": row_flop(start, alone, plain, False)}
            sides: dict[str, list[Rates]] = {"ours": [], "peer": []}
            for number in range(args.rounds):
                for side, run in (("ours", ours), ("peer", peer)):
                    given = (stage, kept) if side == "ours" else (alone, plain)
                    sides[side].append(run(start, *given, args.device, args.seconds))
                    one = sides[side][-1]
                    say(f"{case}: round {number + 1}: {side}: {one.rows:.1f} rows/s, {one.tokens:.0f} tokens/s")
            found["cases"][case] = {
                "flop_per_row": flop,
                "prepare_s": prepared,
                "rows": kept.rows,
                "batch": {"ours": stage.batch_size, "peer": alone.batch_size},
                **{side: [dataclasses.asdict(one) for one in rates] for side, rates in sides.items()},
            }
    return found


def _device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def table(found: dict[str, Any]) -> str:
    """Markdown: a line a case."""
    lines = [
        "| case | ours, rows/s | tokens/s | MFU | plain Trainer, rows/s | tokens/s | MFU "
        "| ratio of a round, median (range) | one epoch, preparing included |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, value in found["cases"].items():
        cells = [case]
        for side in ("ours", "peer"):
            rows = statistics.median(one["rows"] for one in value[side])
            tokens = statistics.median(one["tokens"] for one in value[side])
            cells += [
                f"{rows:.1f}",
                f"{tokens:.0f}",
                f"{100 * rows * value['flop_per_row'][side] / found['peak_flops']:.0f} %",
            ]
        ratios = [a["rows"] / b["rows"] for a, b in zip(value["ours"], value["peer"], strict=True)]
        cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
        ours, peer_ = (statistics.median(one["rows"] for one in value[side]) for side in ("ours", "peer"))
        cells.append(f"{value['rows'] / peer_ / (value['rows'] / ours + value['prepare_s']):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=NANO, help="variant")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="*", choices=CASES, help="all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time of a side in a round")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures of the data set")
    parser.add_argument("--cache-bytes", type=int, default=64 << 30, help="the most that kept features may take")
    parser.add_argument("--peak-tflops", type=float, help="dense peak of the device in its precision")
    parser.add_argument("--out", type=Path, help="where raw rates go as JSON")
    args = parser.parse_args()
    if args.device == "cuda" and args.peak_tflops is None:
        parser.error("--peak-tflops is needed on a GPU: the dense peak of its data sheet")
    found = measure(args, lambda text: print(text, file=sys.stderr))
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
