"""A grid runs for real on a few pictures: failures stay with their cell, and finished work is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyllava_edge.ablate import run as runs
from tinyllava_edge.ablate.compare import summarise
from tinyllava_edge.ablate.grid_toml import read_grid
from tinyllava_edge.ablate.work import Outcome
from tinyllava_edge.benchmarks.results import AnswerRecord, read_results
from tinyllava_edge.errors import StorageError, TinyLlavaEdgeError

# `identity` can't join a tower of 192 to a language model of 256
GRID = """
[grid]
towers = ["siglip"]
llms = ["nano"]
connectors = ["linear", "identity"]
recipes = ["base-nano", "share-nano"]
data = ["mine"]
[data.mine]
pretrain = "captions.json"
finetune = "qa.json"
images = "images"
[scale]
steps = 2
[scale.every]
batch_size = 2
precision = "fp32"
[eval]
tasks = ["qa.json"]
images = "images"
limit = 6
"""


def row(name: str, picture: str, question: str, answer: str) -> dict[str, object]:
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": picture, "conversations": talk}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grid")
    (root / "images").mkdir()
    captions, qa = [], []
    for k, (name, rgb) in enumerate((("red", (255, 0, 0)), ("blue", (0, 0, 255)), ("teal", (0, 128, 128)))):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[10:40, 10:40] = rgb
        Image.fromarray(pixels).save(root / "images" / f"{k}.png")
        captions.append(row(f"c{k}", f"{k}.png", "describe", f"a {name} square."))
        qa += [row(f"q{k}", f"{k}.png", "what color is it?", name), row(f"r{k}", f"{k}.png", "is it big?", "yes")]
    (root / "captions.json").write_text(json.dumps(captions))
    (root / "qa.json").write_text(json.dumps(qa))
    (root / "grid.toml").write_text(GRID)
    return root


def test_a_dry_run_prints_cells_steps_and_time_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    estimates = runs.dry_run(read_grid(folder / "grid.toml"), tmp_path / "out")
    assert [item.state for item in estimates] == ["to do"] * 4 and not (tmp_path / "out").exists()
    assert estimates[0].steps == {"pretrain": 2, "finetune": 2}
    assert estimates[1].steps == {"pretrain": 2, "share-pretrain": 2, "finetune": 2}
    assert all(item.seconds > 0 for item in estimates)


@pytest.mark.parametrize("changed", ["batch_size = 0", 'learning_rate = "fast"'])
def test_a_dry_run_of_what_can_not_be_done_fails(
    changed: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinyllava_edge.cli_ablate import ablate

    (folder / "wrong.toml").write_text(GRID.replace("batch_size = 2", changed))
    with pytest.raises(TinyLlavaEdgeError, match=r"4 cells .* first siglip\.nano\.linear.*stage pretrain: ") as caught:
        ablate(folder / "wrong.toml", tmp_path / "out", dry_run=True, as_json=True)
    assert caught.value.exit_code == 1 and not (tmp_path / "out").exists()
    told = json.loads(capsys.readouterr().out)
    assert [item["failed"] for item in told] == [True] * 4 and changed.split()[0] in told[0]["state"]


def test_one_failing_cell_costs_no_other_and_finished_work_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, said = read_grid(folder / "grid.toml"), []
    samples = runs.run_grid(grid, tmp_path, command="typed", progress=said.append)
    failed = {sample.build: sample.detail["error"] for sample in runs.failures(samples)}
    assert set(failed) == {f"siglip.nano.identity.{recipe}.mine@0" for recipe in ("base-nano", "share-nano")}
    assert all("192" in text and "256" in text for text in failed.values())
    assert read_results([tmp_path / "results.jsonl"]) == samples
    records = [AnswerRecord.from_sample(sample) for sample in samples if sample.kind == "answer"]
    assert len(records) == 2 * 6 and {record.expected for record in records} == {"red", "blue", "teal", "yes"}
    found = summarise(samples)
    assert [cell.axes["recipe"] for cell in found.cells] == ["base-nano", "share-nano"]
    assert found.cells[0].parameters > 1e6 and [item.axis for item in found.effects] == ["recipe"]
    for cell in found.cells:
        place = tmp_path / "cells" / cell.name / "seed-0"
        log = json.loads((place / "checkpoint.train.json").read_text())
        assert log["steps"] == 2 and (place / "checkpoint" / "model.safetensors").is_file()
        assert not list(place.glob("*.work")) and not list(place.glob("answers-*"))
    stages = sorted(p.name.split("-")[0] for p in (tmp_path / "stages").iterdir() if p.is_dir())
    assert stages == ["init", "pretrain", "share"]  # base and share have their first stage in common
    assert any("about" in line and "left" in line for line in said)

    done: list[str] = []

    def note(unit: object, *rest: object) -> Outcome:
        done.append(unit.label)  # type: ignore[attr-defined]
        return Outcome(unit.key, 0.0, error="again")  # type: ignore[attr-defined]

    monkeypatch.setattr(runs, "do_unit", note)
    again = runs.run_grid(grid, tmp_path, command="typed", progress=said.append)
    assert done == ["siglip.nano.identity.base-nano.mine@0: new model"]  # its twin waits for the same model
    assert [s for s in again if s.kind == "answer"] == [s for s in samples if s.kind == "answer"]
    assert len(runs.failures(again)) == 2
    states = {item.run: item.state for item in runs.dry_run(grid, tmp_path)}
    assert list(states.values())[:2] == ["done", "done"]


def test_a_cell_of_another_grid_is_not_taken_for_this_one(folder: Path, tmp_path: Path) -> None:
    grid = read_grid(folder / "grid.toml")
    other = folder / "other.toml"
    other.write_text(GRID.replace("steps = 2", "steps = 3"))
    place = tmp_path / "cells" / grid.cells()[0].name / "seed-0"
    place.mkdir(parents=True)
    (place / "cell.json").write_text('{"units": ["something else"]}')
    with pytest.raises(StorageError, match=r"siglip\.nano\.linear\.base-nano\.mine with another recipe"):
        runs.run_grid(read_grid(other), tmp_path, command="", progress=lambda line: None)


def test_a_killed_grid_goes_on_from_its_training_state_and_exits_with_1_for_its_failed_cell(
    folder: Path, tmp_path: Path
) -> None:
    """SIGKILL in the last stage, once a state is whole: the second run goes on there and keeps the first stage."""
    (folder / "long.toml").write_text(
        GRID.replace(', "share-nano"', "").replace("steps = 2", "steps = { pretrain = 2, finetune = 40 }")
    )
    command = [sys.executable, "-m", "tinyllava_edge.cli", "ablate", str(folder / "long.toml"), "-o", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("cells/*/seed-0/checkpoint.work/checkpoint-*/whole.json")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (log,) = tmp_path.glob("stages/pretrain-*.train.json")
    before = log.stat().st_mtime_ns
    second = subprocess.run([*command, "--jobs", "2"], env=environment, capture_output=True, text=True)
    assert second.returncode == 1, second.stderr
    assert "error: 1 cells and seeds failed, first siglip.nano.identity.base-nano.mine@0" in second.stderr
    assert "hint:" in second.stderr and "finished work is kept" in second.stderr
    assert log.stat().st_mtime_ns == before
    (trained,) = tmp_path.glob("cells/*/seed-0/checkpoint.train.json")
    assert json.loads(trained.read_text())["resumed_from"] in (10, 20, 30)
    assert len(summarise(read_results([tmp_path / "results.jsonl"])).cells) == 1
    for name in ("ABLATION.md", "ablation.html"):
        assert (tmp_path / name).stat().st_size > 500
