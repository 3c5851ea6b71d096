"""One order for a seed and an epoch, whatever the workers and processes, also for a run that goes on in the middle."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.train import engine
from tinyllava_edge.train.collate import EMPTY
from tinyllava_edge.train.dataset import StageData, prepare
from tinyllava_edge.train.progress import Interrupted
from tinyllava_edge.train.recipes import StageRecipe
from tinyllava_edge.train.sampler import PackSampler
from tinyllava_edge.train.trainer import train

from .conftest import Files

STAGE = StageRecipe("finetune", "model", "full", 1e-3, 6, epochs=2, max_turns=2, precision="fp32", save_steps=100)


def test_the_order_is_new_each_epoch_the_same_for_a_seed_and_whole() -> None:
    lengths = [k % 13 for k in range(103)]
    first, again, other = (PackSampler(lengths, 4, seed) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    assert sorted(first) == list(range(104)) and len(first) == 104  # 103 is the gap in the last batch
    before = list(first)
    first.set_epoch(1)
    assert list(first) != before and sorted(first) == list(range(104))
    batches = [before[k : k + 4] for k in range(0, 100, 4)]
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 3  # random batches of four from 0..12 spread over about 8


def test_without_grouping_it_is_the_plain_permutation() -> None:
    plain = list(PackSampler([k % 13 for k in range(40)], 4, 7, group=False))
    assert plain == np.random.default_rng((7, 0)).permutation(40).tolist()


def test_a_mixture_draws_what_it_is_told_in_batches_of_the_same_number() -> None:
    def order(epoch: int) -> Any:
        rng = np.random.default_rng(epoch)
        return rng.permutation(np.concatenate([np.arange(10), np.arange(10), rng.permutation(20)[:5] + 10]))

    sampler = PackSampler(np.arange(30), 4, 0, order=order)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler) == 28
        assert sorted(k for k in drawn if k < 30) == sorted(order(epoch).tolist()) and drawn.count(30) == 3


@given(st.integers(1, 60), st.integers(1, 9), st.booleans(), st.integers(0, 2))
def test_every_pack_comes_once_and_gaps_are_spread(count: int, batch: int, group: bool, epoch: int) -> None:
    sampler = PackSampler([k * 7 % 11 for k in range(count)], batch, 3, group=group)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert sorted(k for k in drawn if k != count) == list(range(count)) and len(drawn) == len(sampler)
    last = drawn[-batch:]
    for parts in range(1, batch + 1):
        if batch % parts == 0 and sum(k != count for k in last) >= parts:  # as many packs as processes: each gets one
            assert all(any(k != count for k in part) for part in np.split(np.array(last), parts))


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_each_step_holds_the_same_packs_on_any_number_of_processes(world: int, micro: int) -> None:
    """accelerate's own split of a batch sampler over processes; 8 packs a step, and a resumed run skips whole steps."""
    lengths = [k % 5 for k in range(43)]
    wanted = [set(step) for step in np.array(list(PackSampler(lengths, 8, 5))).reshape(-1, 8).tolist()]
    for skipped in (0, 3):
        steps: list[set[int]] = [set() for _ in wanted]
        for rank in range(world):
            batches = BatchSampler(PackSampler(lengths, 8, 5), micro, drop_last=False)
            shard = BatchSamplerShard(batches, world, rank)
            each = 8 // (micro * world)
            found = list(SkipBatchSampler(shard, skip_batches=skipped * each))
            assert len(found) == (len(wanted) - skipped) * each
            for k, part in enumerate(found):
                steps[skipped + k // each] |= set(part)
        assert steps[skipped:] == wanted[skipped:]


def test_the_data_set_gives_an_empty_pack_for_the_gap(tiny_checkpoint: Path, files: Files) -> None:
    data = prepare(checkpoints.load(tiny_checkpoint), STAGE, files.mixed, files.images)
    sampler = data.sampler(3, 0)
    assert len(data) == 4 and len(sampler) == 6 and data[4] is EMPTY
    with pytest.raises(IndexError):
        data[5]
    batches = [[data[k] for k in part] for part in np.array(list(sampler)).reshape(2, 3)]
    assert sum(len(item.rows) for part in batches for item in part) == 6
    assert [len(data.batch(part)["input_ids"]) for part in batches] == [3, 1]
    gap = data.batch([EMPTY])
    assert gap["input_ids"].shape == (1, 1) and not {"image_features", "pixel_values"} & set(gap)


@pytest.fixture(scope="module")
def rows(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text alone, pictures, several turns: 26 rows in 17 packs, 3 steps an epoch with a gap."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(json.loads(files.qa.read_text()) + json.loads(files.mixed.read_text())))
    return path


def test_a_run_goes_on_with_the_rows_it_has_not_seen_and_other_workers(
    tiny_checkpoint: Path, files: Files, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 4 of 6 with no workers, it goes on with two; final weights are equal to the last bit."""
    seen: list[list[int]] = []
    real = engine.StageTrainer.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> torch.Tensor:
        seen.append(inputs["labels"][inputs["labels"] >= 0].tolist())
        if stop and self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, model, inputs, *rest)

    monkeypatch.setattr(engine.StageTrainer, "training_step", training_step)
    options: dict[str, Any] = {"progress": False}
    stop = False
    train(tiny_checkpoint, STAGE, rows, files.images, tmp_path / "whole", **options)
    whole, seen[:] = list(seen), []
    stop = True
    with pytest.raises(Interrupted, match="step 4 of 6"):
        train(tiny_checkpoint, STAGE, rows, files.images, tmp_path / "run", workers=0, **options)
    stop = False
    result = train(tiny_checkpoint, STAGE, rows, files.images, tmp_path / "run", workers=2, **options)
    assert result.resumed_from == 4 and len(whole) == 6 and seen == whole
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_data_can_be_sent_to_spawned_workers(tiny_checkpoint: Path, files: Files) -> None:
    import pickle

    loaded = checkpoints.load(tiny_checkpoint)
    for cache_bytes in (0, 1 << 30):
        data = prepare(loaded, STAGE, files.mixed, files.images, cache_bytes=cache_bytes)
        data.batch(data.packs[:2])
        sent = pickle.dumps(data)
        other: StageData = pickle.loads(sent)
        assert len(sent) < 100_000
        for name, tensor in data.batch(data.packs[:6]).items():
            assert torch.equal(other.batch(other.packs[:6])[name], tensor), name
