"""What is shown and logged of a training: it changes nothing, survives a resume, and says what the runtimes say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.errors import TinyLlavaEdgeError, UsageError
from tinyllava_edge.runtimes.reference import open_reference
from tinyllava_edge.train import samples
from tinyllava_edge.train.dataset import StageData
from tinyllava_edge.train.engines import Engine
from tinyllava_edge.train.monitor import Monitor, attach
from tinyllava_edge.train.progress import Watch
from tinyllava_edge.train.recipes import PRESETS
from tinyllava_edge.train.samples import MAX_TOKENS, answer, choose, prompts, undisturbed
from tinyllava_edge.train.source import open_source
from tinyllava_edge.train.throughput import Throughput
from tinyllava_edge.train.trainer import TrainResult, train

from .conftest import Files

ANSWERS = replace(
    PRESETS["base-nano"].stages[1], batch_size=2, epochs=4.0, learning_rate=2e-3, max_turns=4, precision="fp32"
)
SHARE = replace(PRESETS["share-nano"].stages[1], tower="from-1", batch_size=4, precision="fp32")
BLIND = Monitor(track=(), samples=0)


def run(start: Path, stage: Any, data: Path, files: Files, out: Path, monitor: Monitor, **options: Any) -> TrainResult:
    return train(start, stage, data, files.images, out, monitor=monitor, **{"progress": False, **options})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def seen(tiny_checkpoint: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    """A training that answers samples every 3 steps."""
    out = tmp_path_factory.mktemp("seen") / "run"
    monitor = Monitor(samples=5, sample_every=3, peak_tflops=0.5)
    return run(tiny_checkpoint, ANSWERS, files.qa, files, out, monitor), out


def test_nothing_of_it_changes_what_is_trained(
    tiny_checkpoint: Path, files: Files, tmp_path: Path, seen: tuple[TrainResult, Path]
) -> None:
    """Every weight is bit-equal with samples and trackers and without; with a trained tower too."""
    plain = run(tiny_checkpoint, ANSWERS, files.qa, files, tmp_path / "plain", BLIND)
    pairs = [(seen[0], plain, seen[1], tmp_path / "plain")]
    shares = [
        run(tiny_checkpoint, SHARE, files.captions, files, tmp_path / f"share-{k}", monitor)
        for k, monitor in enumerate((BLIND, Monitor(samples=2, sample_every=1)))
    ]
    pairs.append((shares[0], shares[1], tmp_path / "share-0", tmp_path / "share-1"))
    for one, other, first, second in pairs:
        assert one.losses == other.losses
        a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
        assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in left if name.startswith("plain")} == {"plain", "plain.train.json"}
    assert {"share-1.samples.jsonl", "share-1.log.jsonl", "share-1.tensorboard"} < left


def test_samples_are_what_the_reference_answers(seen: tuple[TrainResult, Path], files: Files) -> None:
    result, out = seen
    found = lines(out.parent / "run.samples.jsonl")
    steps = [*range(3, result.steps, 3), result.steps]
    assert [(entry["step"], entry["sample"]) for entry in found] == [(step, k) for step in steps for k in range(5)]
    assert list(found[0]) == ["step", "sample", "question", "expected", "answer", "picture"]
    assert any(entry["answer"] != last["answer"] for entry, last in zip(found[:5], found[-5:], strict=True))
    runtime = open_reference(out, n_ctx=2048)
    for entry in found[-5:]:
        said = runtime.answer(files.images / entry["picture"], entry["question"], max_tokens=MAX_TOKENS)
        assert entry["answer"] == said.text and entry["answer"]


def test_rows_without_a_picture_and_captions_are_asked_too(tiny_checkpoint: Path, files: Files, tmp_path: Path) -> None:
    start = checkpoints.load(tiny_checkpoint)
    source = open_source(files.mixed, files.images, tmp_path)
    rows = choose(source, 100)
    asked = prompts(start, ANSWERS, rows, source)
    assert [entry.question for entry in asked][-2:] == ["what color?", "hello"] and asked[-1].picture == ""
    runtime = open_reference(tiny_checkpoint)
    template = samples.get_template(start.spec.template)
    said = answer(start.model, start.tokenizer, template, asked[-1])
    assert said == runtime.answer(None, "hello", max_tokens=MAX_TOKENS).text
    told = open_source(files.captions, files.images, tmp_path)
    captions = prompts(start, SHARE, choose(told, 2), told)
    assert [entry.ids.count(int(start.model.config.image_token_id)) for entry in captions] == [64, 64]
    assert len(captions[0].ids) == 65 and captions[0].expected == "a red square."
    assert "\n" not in answer(start.model, start.tokenizer, samples.get_template("pretrain"), captions[0])


def test_modes_and_random_numbers_come_back(tiny_checkpoint: Path) -> None:
    model = checkpoints.load(tiny_checkpoint).model.train()
    model.model.vision_tower.eval()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
        _ = 1 / 0
    assert torch.equal(before, torch.get_rng_state()) and modes == [module.training for module in model.modules()]


def test_the_log_and_the_result_tell_the_same(seen: tuple[TrainResult, Path]) -> None:
    result, out = seen
    log = lines(out.parent / "run.log.jsonl")
    assert [entry["step"] for entry in log] == [*range(1, result.steps + 1)]
    assert [entry["loss"] for entry in log] == [*result.losses]
    assert all(0 < entry["mfu"] < 1 and entry["mfu"] == entry["hfu"] and entry["grad_norm"] > 0 for entry in log)
    assert all(entry["memory_bytes"] > 50e6 and entry["tokens_per_s"] > entry["images_per_s"] > 0 for entry in log)
    assert log[0]["lr"] == 0 < log[-1]["lr"] < log[2]["lr"] and log[-1]["epoch"] == 4.0
    assert [entry["seconds"] for entry in log] == sorted(entry["seconds"] for entry in log)
    saved = json.loads((out.parent / "run.train.json").read_text())
    assert 0 < saved["mfu"] < 1 and saved["devices"] == 1 and saved["tokens_per_s"] > saved["images_per_s"] > 0
    assert saved["parts"]["tower"]["trainable"] == 0 < saved["parts"]["llm"]["trainable"]


def test_a_resumed_run_has_each_step_once(
    tiny_checkpoint: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: tuple[TrainResult, Path]
) -> None:
    """Ended at once, without a state of the last steps: they are done and logged again."""
    out, calls, real = tmp_path / "run", [0], StageData.batch

    def batch(self: StageData, packs: list[Any]) -> Any:
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return real(self, packs)

    stage, monitor = replace(ANSWERS, save_steps=5), Monitor(track=("jsonl",), samples=5, sample_every=3)
    monkeypatch.setattr(StageData, "batch", batch)
    with pytest.raises((TinyLlavaEdgeError, KeyboardInterrupt)):
        run(tiny_checkpoint, stage, files.qa, files, out, monitor)
    assert max(entry["step"] for entry in lines(tmp_path / "run.log.jsonl")) > 5
    result = run(tiny_checkpoint, stage, files.qa, files, out, monitor)
    assert result.resumed_from == 5
    for name in ("log", "samples"):
        again, whole = lines(tmp_path / f"run.{name}.jsonl"), lines(seen[1].parent / f"run.{name}.jsonl")
        assert [entry["step"] for entry in again] == [entry["step"] for entry in whole]
        key = "loss" if name == "log" else "answer"
        assert [entry[key] for entry in again] == pytest.approx([entry[key] for entry in whole], abs=1e-6) or (
            key == "answer" and [entry[key] for entry in again] == [entry[key] for entry in whole]
        )


def test_a_sample_that_fails_is_said_once_and_training_goes_on(
    tiny_checkpoint: Path,
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> str:
        raise torch.OutOfMemoryError("no room on the device")

    monkeypatch.setattr(samples, "answer", full)
    stage = replace(ANSWERS, epochs=1.0)
    monitor = Monitor(track=(), sample_every=1)
    result = run(tiny_checkpoint, stage, files.qa, files, tmp_path / "run", monitor, progress=True)
    assert result.steps == 4
    assert capsys.readouterr().err.count("no more sample answers: no room on the device") == 1


def test_samples_on_stderr_are_plain_text(
    tiny_checkpoint: Path, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out rows where there are any; what they hold can't steer a terminal."""
    talk = [{"from": "human", "value": "<image>\n\x1b[31mred\x07?"}, {"from": "gpt", "value": "y" * 99}]
    held = tmp_path / "held.json"
    held.write_text(json.dumps([{"id": "1", "image": "0.png", "conversations": talk}]))
    stage = replace(SHARE, epochs=1.0)
    options: dict[str, Any] = {"progress": True, "eval_data": held}
    run(tiny_checkpoint, stage, files.captions, files, tmp_path / "run", Monitor(track=()), **options)
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if "expected" in line]
    assert line.startswith("  step 2  0.png   [31mred ? → ") or "[31mred ?" in line
    assert "\x1b[31m" not in error and "\x07" not in error and "y" * 60 not in line and "y" * 59 + "…" in line
    (kept,) = lines(tmp_path / "run.samples.jsonl")
    assert kept["question"] == "\x1b[31mred\x07?" and kept["step"] == 2


def test_spread_weights_are_not_asked_and_this_is_said(
    tiny_checkpoint: Path, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = checkpoints.load(tiny_checkpoint)
    settings = SimpleNamespace(bf16=False, world_size=2, should_save=True, device=start.model.device)
    source = open_source(files.qa, files.images, tmp_path)
    for engine in ("fsdp", "zero2"):
        fake = SimpleNamespace(args=settings, model=start.model, engine=Engine(engine), callbacks=[])
        fake.add_callback = fake.callbacks.append
        counts = Throughput.of(start.model, start.spec, ANSWERS)
        attach(Monitor(), fake, Watch("s", 1, None, True), start, ANSWERS, source, tmp_path / "x", counts)
        assert fake.callbacks == [] and "weights are spread over devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"track": ("csv",)}, {"samples": -1}, {"sample_every": 1 << 31}, {"peak_tflops": 0.0}]
)
def test_settings_are_checked_before_anything_is_loaded(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        train(tmp_path / "none", ANSWERS, tmp_path / "none", tmp_path, tmp_path / "out", monitor=Monitor(**wrong))


TWO = """
import json, sys
from dataclasses import replace
from pathlib import Path
from tinyllava_edge.train.monitor import Monitor
from tinyllava_edge.train.recipes import PRESETS
from tinyllava_edge.train.trainer import train
start, data, images, out = map(Path, sys.argv[1:])
stage = replace(PRESETS["base-nano"].stages[1], batch_size=4, epochs=1.0, max_turns=1, precision="fp32")
train(start, stage, data, images, out, device="cpu", monitor=Monitor(samples=1))
"""


def test_two_processes_talk_once_and_their_counts_are_summed(
    tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    places = [str(path) for path in (tiny_checkpoint, files.qa, files.images, tmp_path / "run")]
    done = subprocess.run([*launcher, *places], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    log, saved = lines(tmp_path / "run.log.jsonl"), json.loads((tmp_path / "run.train.json").read_text())
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5] and saved["devices"] == 2
    assert done.stderr.count(" in all") == 1 and done.stderr.count("expected:") == 1
    assert len(lines(tmp_path / "run.samples.jsonl")) == 1
    took = [late["seconds"] - early["seconds"] for early, late in zip(log, log[1:], strict=False)]
    for entry, seconds in zip(log[1:4], took, strict=False):  # 4 pictures a step, 2 on each process
        assert entry["images_per_s"] * seconds == pytest.approx(4, rel=0.02)
