"""Counts of a batch against the packs it was made of, operations against the plan's, rates, and the progress line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.errors import UsageError
from tinyllava_edge.train import progress, throughput
from tinyllava_edge.train.collate import Encoded, Pack, collate
from tinyllava_edge.train.dataset import prepare
from tinyllava_edge.train.parts import count_parts, freeze
from tinyllava_edge.train.plan_data import Lengths
from tinyllava_edge.train.plan_shape import model_shape, sequence_flop, tower_flop
from tinyllava_edge.train.progress import Watch
from tinyllava_edge.train.recipes import PRESETS
from tinyllava_edge.train.throughput import COUNTED, Cost, Rates, Throughput, count, device_peak

from .conftest import Files

ANSWERS = replace(PRESETS["base-nano"].stages[1], max_turns=4)
SHARE = replace(PRESETS["share-nano"].stages[1], tower="from-1", gradient_checkpointing=True)


def counted(batch: dict[str, torch.Tensor]) -> dict[str, float]:
    return dict(zip(COUNTED, count(batch).tolist(), strict=True))


@pytest.mark.parametrize("max_turns", [1, 4])
def test_a_batch_counts_as_the_packs_that_it_holds(tiny_checkpoint: Path, files: Files, max_turns: int) -> None:
    """Rows of several lengths, with and without a picture, padded: in packs with a block mask and without."""
    start = checkpoints.load(tiny_checkpoint)
    data = prepare(start, replace(ANSWERS, max_turns=max_turns), files.mixed, files.images)
    packs = [data[k] for k in range(len(data))]
    assert len({item.length for item in packs}) > 2 and any(not item.images for item in packs)
    found = counted(data.batch(packs))
    assert found["position"] == sum(item.length for item in packs)
    assert found["square"] == sum(item.length**2 for item in packs)
    assert found["answer"] == sum(int(row.is_answer.sum()) for item in packs for row in item.rows)
    assert found["connected"] == sum(len(item.images) for item in packs) and found["seen"] == 0  # cached
    raw = prepare(start, replace(ANSWERS, max_turns=max_turns), files.mixed, files.images, cache_bytes=0)
    assert counted(raw.batch(packs)) == {**found, "seen": found["connected"]}


def test_sequences_that_are_laid_end_to_end_count_one_by_one() -> None:
    lengths = (5, 2, 9)
    places = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(4, dtype=torch.long)])[None]
    labels = torch.full((1, 3), -100)
    found = counted({"position_ids": places, "labels": labels, "pixel_values": torch.zeros(2, 3, 4, 4)})
    assert found == {"position": 16, "square": 25 + 4 + 81, "answer": 0, "connected": 2, "seen": 2}


@pytest.mark.parametrize("stage", [ANSWERS, PRESETS["base-nano"].stages[0], SHARE], ids=lambda stage: stage.name)
def test_operations_are_the_plans(tiny_checkpoint: Path, stage: Any) -> None:
    """Taken apart and put together again, for two batches of unlike lengths; with and without recomputation."""
    start = checkpoints.load(tiny_checkpoint)
    model, spec = start.model, start.spec
    freeze(model, stage)
    shape, image = model_shape(model, spec, stage), spec.visual_tokens
    made = Throughput.of(model, spec, stage)
    made.set_peak(1e-3, 2)
    want = {"flop": 0.0, "flop_done": 0.0}
    for n, answers in ((image + 40, 7), (image + 90, 31)):
        marks = np.arange(n) >= n - answers
        batch = collate([Pack((Encoded(np.full(n, 5, np.int32), marks, 0),), (0,))] * 2, 0)
        made.count(None, (), {**batch, "pixel_values": torch.zeros(2, 3, 64, 64)})
        for key, again in (("flop", False), ("flop_done", stage.gradient_checkpointing)):
            same = replace(stage, gradient_checkpointing=again)
            found = Lengths(1, 1, 1, 1.0, n, n, answers, answers, 0, "")
            want[key] += 2 * (sequence_flop(model, shape, found, same) + tower_flop(model, shape, same))
    rates = made.step(2.0)
    assert (rates.flop, rates.flop_done) == (pytest.approx(want["flop"]), pytest.approx(want["flop_done"]))
    assert rates.mfu == pytest.approx(want["flop"] / (2.0 * 2 * 1e9))
    assert (rates.hfu or 0) / (rates.mfu or 1) == pytest.approx(1.3 if stage is SHARE else 1.0, abs=0.06)
    assert rates.images_per_s == 2.0 and rates.tokens_per_s == 2 * image + 130
    assert made.step(1.0) == Rates(1.0, 0, 0, 0.0, 0.0, 2e9) and made.whole.pictures == 4 and made.whole.seconds == 3


def test_a_model_without_a_formula_has_no_mfu(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise UsageError("no memory formula")

    start = checkpoints.load(tiny_checkpoint)
    monkeypatch.setattr(throughput, "model_shape", unknown)
    assert Cost.of(start.model, start.spec, ANSWERS) is None
    made = Throughput.of(start.model, start.spec, ANSWERS)
    made.set_peak(1.0, 1)
    assert made.step(1.0).mfu is None and made.whole.hfu is None


def test_parts_add_up(tiny_checkpoint: Path) -> None:
    model = checkpoints.load(tiny_checkpoint).model
    freeze(model, PRESETS["base-nano"].stages[0])
    found = count_parts(model, PRESETS["base-nano"].stages[0])
    assert sum(part["parameters"] for part in found.values()) == sum(p.numel() for p in model.parameters())
    assert [part["trainable"] > 0 for part in found.values()] == [False, True, False]
    assert found["connector"]["trainable"] == found["connector"]["parameters"]


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user says, then the table by exact name; an unknown device, TF32 and a processor have none."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for wrong in (0.0, -1.0, 1e9, float("nan")):
        with pytest.raises(UsageError, match="--peak-tflops"):
            device_peak("bf16", wrong, gpu)
    assert device_peak("bf16", None, cpu) is None and device_peak("fp32", 0.4, cpu) == 0.4
    for name, bf16, fp32 in (("NVIDIA H100 80GB HBM3", 989.4, 66.9), ("Tesla T4", None, 8.1), ("H100", None, None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert (device_peak("bf16", None, gpu), device_peak("fp32", None, gpu)) == (bf16, fp32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert (device_peak("bf16", None, gpu), device_peak("fp32", None, gpu)) == (989.4, None)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_the_progress_line_and_what_its_rates_leave_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten steps of 2 s; saving and answering samples take 100 s more, which no rate counts."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    watch = Watch("finetune", 24, None, True)
    state, control = SimpleNamespace(global_step=0, max_steps=4000), SimpleNamespace(should_save=False)
    arguments: Any = (SimpleNamespace(device=torch.device("cpu")), state, control)
    watch.on_train_begin(*arguments)
    for step in range(1, 11):
        state.global_step, clock.now = step, clock.now + 2.0
        if step == 5:
            clock.now += 40.0
            watch.pause(40.0)
        watch.on_step_end(*arguments)
        watch.on_log(*arguments, logs={"loss": 1.5, "learning_rate": 9.8e-4, "epoch": 0.1})
        if step == 7:
            clock.now += 60.0
            watch.on_save(*arguments)
    watch.on_log(*arguments, logs={"train_runtime": 1.0})
    watch.on_train_end(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert re.fullmatch(
        r"finetune: step 10/4000, 13:18:00 left  loss 1\.5000  lr 9\.8e-04  12 images/s  0 tokens/s  \d+\.\d\d GB",
        lines[9],
    )
    assert re.fullmatch(
        r"finetune: step 10/4000, 2:00 in all  loss 1\.5000  12 images/s  0 tokens/s  \d+\.\d\d GB", lines[10]
    )
    assert watch.throughput.whole.seconds == pytest.approx(20.0)
