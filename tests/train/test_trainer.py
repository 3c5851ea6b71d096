"""Stages train what they say, stop and go on without a trace, repeat exactly, and describe what they did."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.errors import DataError, StorageError, TinyLlavaEdgeError
from tinyllava_edge.train import engine
from tinyllava_edge.train.dataset import StageData
from tinyllava_edge.train.engine import WHOLE
from tinyllava_edge.train.monitor import Monitor
from tinyllava_edge.train.recipes import StageRecipe, override
from tinyllava_edge.train.trainer import TrainResult, train, work_directory

from .conftest import Files

CAPTIONS = StageRecipe("pretrain", "pretrain", "frozen", 2e-3, 4, precision="fp32")
ANSWERS = StageRecipe(
    "finetune", "model", "full", 1e-3, 2, max_turns=4, precision="fp32", save_steps=5, adam_beta2=0.98
)


def run(start: Path, stage: StageRecipe, data: Path, files: Files, out: Path, **options: object) -> TrainResult:
    quiet = {"progress": False, "monitor": Monitor(track=(), samples=0)}
    return train(start, stage, data, files.images, out, **{**quiet, **options})  # type: ignore[arg-type]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_stage_1_changes_the_connector_alone_and_says_what_it_did(
    tiny_checkpoint: Path, files: Files, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "one"
    result = train(tiny_checkpoint, CAPTIONS, files.captions, files.images, out)
    before, after = tensors(tiny_checkpoint), tensors(out)
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name} and len(changed) == 4
    captured = capfd.readouterr()
    assert captured.out == "" and "loss" in captured.err and "images/s" in captured.err
    saved = json.loads((tmp_path / "one.train.json").read_text())
    assert saved["precision"] == ("bf16" if CAPTIONS.precision == "bf16" and engine.fast_bf16("cpu") else "fp32")
    assert saved["recipe"] == {**CAPTIONS.__dict__} and saved["steps"] == result.steps == 2
    assert (saved["rows"], saved["packs"], saved["bad_rows"], len(saved["losses"])) == (8, 8, 0, 2)
    assert saved["images_per_s"] > 0 and len(saved["data_sha256"]) == 64 and saved["source"] == str(tiny_checkpoint)
    assert not work_directory(out).exists()
    assert checkpoints.load(out).spec == checkpoints.load_spec(tiny_checkpoint)


def test_stage_2_learns_a_small_set_by_heart_and_leaves_the_tower(
    tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    stage = override(ANSWERS, {"epochs": 10, "learning_rate": 2e-3})
    result = run(tiny_checkpoint, stage, files.qa, files, tmp_path / "two", eval_data=files.qa)
    assert result.losses[0] > 5 and result.final_loss < 0.6
    assert result.score is not None and result.score["rows"] == 20
    assert result.score["exact"] >= 16 and result.score["loss"] < 0.5
    before, after = tensors(tiny_checkpoint), tensors(tmp_path / "two")
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == ("vision_tower" in name), name


def test_a_processor_without_bf16_trains_in_fp32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Emulated it takes tens of times as long."""
    for name, wanted in (("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True, "cpu_name": "x"})
        settings = engine.arguments(override(LONG, {"precision": "bf16"}), tmp_path, "cpu", 0)
        assert settings.bf16 is wanted
    assert engine.fast_bf16("cuda")


def test_bf16_follows_fp32(
    tiny_checkpoint: Path,
    files: Files,
    tmp_path: Path,
    uninterrupted: tuple[TrainResult, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bf16 keeps 8 bits: 3 % on the first losses of a random model, which are about 8 nats. Emulated where need be."""
    monkeypatch.setattr("tinyllava_edge.train.engine.fast_bf16", lambda device: True)
    result = run(tiny_checkpoint, override(LONG, {"precision": "bf16", "epochs": 1}), files.qa, files, tmp_path / "run")
    assert result.precision == "bf16" and uninterrupted[0].precision == "fp32"
    assert result.losses[:2] != uninterrupted[0].losses[:2]
    assert result.losses[:2] == pytest.approx(uninterrupted[0].losses[:2], rel=0.03)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler for C++ on a processor")
def test_compiled_layers_train_the_same(tiny_checkpoint: Path, files: Files, tmp_path: Path) -> None:
    """torch.compile with dynamic lengths; kernels of another order of sums, so 1e-4."""
    stage = override(ANSWERS, {"epochs": 1, "max_turns": 1, "batch_size": 8})
    plain = run(tiny_checkpoint, stage, files.qa, files, tmp_path / "plain")
    compiled = run(tiny_checkpoint, override(stage, {"compile": True}), files.qa, files, tmp_path / "compiled")
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert set(tensors(tmp_path / "compiled")) == set(tensors(tmp_path / "plain"))


@pytest.mark.parametrize("changes", [{"llm": "frozen"}, {"llm": "lora", "lora_rank": 8}, {"tower": "from-1"}])
def test_frozen_weights_in_bf16_change_nothing(
    changes: dict[str, object], tiny_checkpoint: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what autocast makes of them at every step; the checkpoint keeps them in float32."""
    monkeypatch.setattr("tinyllava_edge.train.engine.fast_bf16", lambda device: True)
    stage = override(ANSWERS, {"precision": "bf16", "epochs": 1, **changes})
    half = run(tiny_checkpoint, stage, files.qa, files, tmp_path / "half", cache_bytes=0)
    monkeypatch.setattr("tinyllava_edge.train.trainer.halve_frozen", lambda model: None)
    whole = run(tiny_checkpoint, stage, files.qa, files, tmp_path / "whole", cache_bytes=0)
    assert half.losses == whole.losses
    start, one, two = (tensors(path) for path in (tiny_checkpoint, tmp_path / "half", tmp_path / "whole"))
    assert all(torch.equal(one[name], two[name]) and one[name].dtype is torch.float32 for name in two)
    frozen = [name for name in start if "vision_tower" in name and ".layers.0." in name]
    assert frozen and all(torch.equal(start[name], one[name]) for name in frozen)


def test_the_same_seed_gives_the_same_losses_and_another_does_not(
    tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    runs = [
        run(tiny_checkpoint, override(ANSWERS, {"seed": seed}), files.qa, files, tmp_path / f"{k}")
        for k, seed in enumerate((1, 1, 2))
    ]
    assert runs[0].losses == runs[1].losses != runs[2].losses
    first, second = tensors(tmp_path / "0"), tensors(tmp_path / "1")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulated_micro_batches_are_the_batch(tiny_checkpoint: Path, files: Files, tmp_path: Path) -> None:
    whole = run(tiny_checkpoint, override(ANSWERS, {"batch_size": 4}), files.qa, files, tmp_path / "whole")
    parts = run(
        tiny_checkpoint, override(ANSWERS, {"batch_size": 4, "micro_batch": 1}), files.qa, files, tmp_path / "parts"
    )
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


LONG = override(ANSWERS, {"epochs": 7})  # 4 steps an epoch, 28 in all, states after 5, 10 …
KILLED = """
import json, sys, torch
from pathlib import Path
from tinyllava_edge.train.recipes import recipe_from
from tinyllava_edge.train.trainer import train
start, stage, data, images, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # sums split over other threads would differ by rounding
(recipe,) = recipe_from({"name": "x", "stages": [json.loads(stage)]}, "test").stages
train(Path(start), recipe, Path(data), Path(images), Path(out), progress=False)
"""


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_checkpoint: Path, files: Files, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return run(tiny_checkpoint, LONG, files.qa, files, out), tensors(out)


def same_end(result: TrainResult, out: Path, whole: tuple[TrainResult, dict[str, torch.Tensor]]) -> None:
    """On one machine the kernels repeat, so the weights are equal but for rounding of saved moments: 1e-6."""
    assert result.resumed_from > 0 and result.steps == whole[0].steps
    assert result.losses == pytest.approx(whole[0].losses, abs=1e-6)
    for name, tensor in tensors(out).items():
        torch.testing.assert_close(tensor, whole[1][name], atol=1e-6, rtol=0)


def test_a_killed_run_goes_on_from_the_last_whole_state(
    tiny_checkpoint: Path,
    files: Files,
    tmp_path: Path,
    uninterrupted: tuple[TrainResult, dict[str, torch.Tensor]],
) -> None:
    out = tmp_path / "run"
    work = work_directory(out)
    stage = json.dumps({key: value for key, value in LONG.__dict__.items() if value is not None})
    threads = str(torch.get_num_threads())
    arguments = [str(tiny_checkpoint), stage, str(files.qa), str(files.images), str(out), threads]
    child = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not list(work.glob(f"checkpoint-*/{WHOLE}")):
            assert child.poll() is None, child.stderr and child.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL and not out.exists()
    # a state that was being written when the power went, and one that lost its tail
    newest = max(work.glob(f"checkpoint-*/{WHOLE}"), key=lambda p: p.stat().st_mtime).parent
    for step, spoil in ((26, "unmarked"), (27, "cut")):
        state = work / f"checkpoint-{step}"
        shutil.copytree(newest, state)
        if spoil == "unmarked":
            (state / WHOLE).unlink()
        else:
            (state / "model.safetensors").write_bytes((state / "model.safetensors").read_bytes()[:-1000])
    result = run(tiny_checkpoint, LONG, files.qa, files, out)
    assert result.resumed_from < 26
    same_end(result, out, uninterrupted)


def test_ctrl_c_saves_the_step_and_the_same_call_goes_on(
    tiny_checkpoint: Path,
    files: Files,
    tmp_path: Path,
    uninterrupted: tuple[TrainResult, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, calls, real, before = tmp_path / "run", [0], StageData.batch, signal.getsignal(signal.SIGINT)

    def batch(self: StageData, packs: list[object]) -> object:
        calls[0] += 1
        if calls[0] == 8:  # in the second epoch, between two saved states
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, packs)  # type: ignore[arg-type]

    monkeypatch.setattr(StageData, "batch", batch)
    with pytest.raises(TinyLlavaEdgeError, match="interrupted at step") as stopped:
        run(tiny_checkpoint, LONG, files.qa, files, out)
    assert stopped.value.exit_code == 1 and "again" in stopped.value.hint and not out.exists()
    assert signal.getsignal(signal.SIGINT) is before
    result = run(tiny_checkpoint, LONG, files.qa, files, out)
    assert 5 < result.resumed_from <= 9
    same_end(result, out, uninterrupted)


def test_states_of_another_job_are_refused_unless_told_to_start_over(
    tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(tiny_checkpoint, ANSWERS, files.qa, files, out)
    with pytest.raises(StorageError, match="exists already"):
        run(tiny_checkpoint, ANSWERS, files.qa, files, out)
    work = work_directory(out)
    work.mkdir()
    (work / "job.json").write_text('{"stage": "another"}')
    with pytest.raises(StorageError, match="another recipe, data or start"):
        run(tiny_checkpoint, ANSWERS, files.qa, files, out, force=True)
    result = run(tiny_checkpoint, ANSWERS, files.qa, files, out, force=True, resume=False)
    assert result.resumed_from == 0 and not work.exists()


def test_a_time_limit_keeps_what_was_learnt(tiny_checkpoint: Path, files: Files, tmp_path: Path) -> None:
    result = run(tiny_checkpoint, LONG, files.qa, files, tmp_path / "run", max_seconds=0.0)
    assert (result.stopped_early, result.steps) == ("time", 1)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_loss_that_is_not_finite_ends_the_run(tiny_checkpoint: Path, files: Files, tmp_path: Path) -> None:
    loaded = checkpoints.load(tiny_checkpoint)
    with torch.no_grad():
        loaded.model.lm_head.weight[5, 5] = float("inf")
    checkpoints.save(loaded.model, loaded.tokenizer, loaded.spec, tmp_path / "broken")
    with pytest.raises(TinyLlavaEdgeError, match=r"the loss at step 1 is (nan|inf)"):
        run(tmp_path / "broken", ANSWERS, files.qa, files, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_rows_and_broken_pictures_are_named_counted_and_left_out(
    tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(files.images, images)
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:300])
    rows = json.loads(files.qa.read_text())
    rows[0]["conversations"][1]["value"] = ""
    data = tmp_path / "bad.json"
    data.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"bad.json: row 1 .*message 2 is empty; 1 bad rows, 0 allowed"):
        train(tiny_checkpoint, ANSWERS, data, images, tmp_path / "run", progress=False)
    with pytest.raises(DataError, match="4 bad rows, 1 allowed"):
        train(tiny_checkpoint, ANSWERS, data, images, tmp_path / "run", progress=False, max_bad=1)
    result = train(tiny_checkpoint, ANSWERS, data, images, tmp_path / "run", progress=False, max_bad=4)
    assert (result.bad_rows, result.rows) == (4, 16)
    named = [json.loads(line) for line in (tmp_path / "run.bad_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in named] == [1, 8, 9, 10] and "3.png" in named[1]["reason"]
