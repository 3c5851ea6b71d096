"""Logs of a training: whole lines, each step once after a resume, TensorBoard reads back, other trackers for real."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.train import tracking
from tinyllava_edge.train.lines import Lines
from tinyllava_edge.train.track_files import FIGURES, Run
from tinyllava_edge.train.tracking import TRACKERS, Trackers, check_trackers

RECIPE = {"name": "pretrain", "learning_rate": 1e-3, "micro_batch": 0}


def run(out: Path, resumed_from: int = 0) -> Run:
    return Run(out, "checkpoint pretrain", RECIPE, resumed_from)


def log(trackers: Trackers, steps: range, scale: float = 1.0) -> None:
    for k in steps:
        trackers.step(k, {"loss": scale / k, "lr": 1e-3, "mfu": None, "seconds": 2.0 * k})
    trackers.text(steps[-1], "samples/0", "question: what?\nanswer: that")
    trackers.close()


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_go_on_after_the_saved_step_and_hold_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "c.log.jsonl"
    log(Trackers(("jsonl",), run(tmp_path / "c")), range(1, 8))
    assert [line["step"] for line in lines(path)] == [*range(1, 8)]
    assert list(lines(path)[0]) == [*FIGURES, "seconds"] and lines(path)[0]["mfu"] is None
    with path.open("a") as file:  # what a killed run may leave
        file.write('{"step": 3, "loss": 9}\nnot JSON\n[1]\n{"step": 8, "lo')
    log(Trackers(("jsonl",), run(tmp_path / "c", 5)), range(6, 10), 100.0)
    assert [line["step"] for line in lines(path)] == [*range(1, 10)]
    assert lines(path)[6]["loss"] == pytest.approx(100 / 7)
    assert lines(path)[5]["seconds"] == 10.0 + 12.0  # of earlier calls, and of this one
    log(Trackers(("jsonl",), run(tmp_path / "c")), range(1, 3))
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_numbers_that_json_has_no_word_for_become_null(tmp_path: Path) -> None:
    Lines(tmp_path / "x.jsonl", 0).add({"step": 1, "loss": float("nan"), "lr": float("inf"), "text": "half \ud800"})
    assert lines(tmp_path / "x.jsonl") == [{"step": 1, "loss": None, "lr": None, "text": "half ?"}]


KILLED = """
import sys
from pathlib import Path
from tinyllava_edge.train.lines import Lines
file = Lines(Path(sys.argv[1]), 0)
for k in range(10**9):
    file.add({"step": k, "text": "x" * 3000})
"""


def test_a_killed_run_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)])
    try:
        deadline = time.monotonic() + 60
        while not path.is_file() or path.stat().st_size < 1_000_000:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert path.read_bytes().endswith(b"}\n")
    assert [line["step"] for line in lines(path)] == [*range(len(lines(path)))]


FULL = """
import resource, signal, sys
from pathlib import Path
from tinyllava_edge.train.track_files import Run
from tinyllava_edge.train.tracking import Trackers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trackers = Trackers(("jsonl",), Run(Path(sys.argv[1]), "x", {}, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for k in range(1, 50):
    trackers.step(k, {"loss": 1.0, "seconds": 1.0})
print("went on")
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on file sizes")
def test_a_log_that_can_t_be_written_is_given_up_and_training_goes_on(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "c")], capture_output=True, text=True)
    assert done.stdout == "went on\n" and done.stderr.count("tracker jsonl is left out from here on") == 1
    kept = lines(tmp_path / "c.log.jsonl")
    assert 3 < len(kept) < 20 and [line["step"] for line in kept] == [*range(1, len(kept) + 1)]


def test_tensorboard_reads_back_and_drops_steps_that_were_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(Trackers(("tensorboard",), run(tmp_path / "c")), range(1, 8))
    log(Trackers(("tensorboard",), run(tmp_path / "c", 5)), range(6, 10), 100.0)
    found = EventAccumulator(str(tmp_path / "c.tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"train/loss", "train/lr", "train/seconds"}
    events = found.Scalars("train/loss")
    assert [event.step for event in events] == [*range(1, 10)]
    assert events[4].value == pytest.approx(1 / 5) and events[5].value == pytest.approx(100 / 6)
    text = found.Tensors("samples/0/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text == "question: what?\nanswer: that"
    assert "learning_rate" in found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    log(Trackers(("tensorboard",), run(tmp_path / "c")), range(1, 3))
    found = EventAccumulator(str(tmp_path / "c.tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2]


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown tracker 'neptune'") as wrong:
        check_trackers(("jsonl", "neptune"))
    assert "wandb" in wrong.value.hint and wrong.value.exit_code == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--track wandb: wandb is not installed") as wrong:
        check_trackers(("jsonl", "wandb"))
    assert wrong.value.hint == "pip install 'tinyllava-edge[wandb]'"


def test_a_tracker_that_fails_is_left_out_and_one_that_can_t_be_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    trackers = Trackers(("jsonl", "tensorboard"), run(tmp_path / "c"), said.append)
    trackers.open["tensorboard"].close()
    monkeypatch.setattr(trackers.open["tensorboard"], "step", lambda *_: 1 / 0)
    log(trackers, range(1, 4))
    assert said == ["tracker tensorboard is left out from here on: division by zero"]
    assert len(lines(tmp_path / "c.log.jsonl")) == 3
    known = tracking.Known(lambda _: 1 / 0, "", "")  # type: ignore[arg-type, return-value]
    monkeypatch.setitem(TRACKERS, "jsonl", known)
    with pytest.raises(UsageError, match="--track jsonl: division by zero"):
        Trackers(("jsonl",), run(tmp_path / "c"))


SERVICE = """
import sys
from pathlib import Path
from tinyllava_edge.train.track_files import Run
from tinyllava_edge.train.tracking import Trackers
name, out = sys.argv[1], Path(sys.argv[2])
for first, steps in ((0, range(1, 6)), (3, range(4, 7))):
    trackers = Trackers((name,), Run(out, "checkpoint pretrain", {"learning_rate": 1e-3, "tower": None}, first))
    for k in steps:
        trackers.step(k, {"loss": 1 / k, "lr": 1e-3, "mfu": None, "seconds": 2.0 * k})
    trackers.text(steps[-1], "samples/0", "question: <b>what</b>?")
    assert list(trackers.open) == [name]
    trackers.close()
"""


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_other_trackers_for_real_and_without_a_network(name: str, tmp_path: Path) -> None:
    """Each in a process of its own, for they change the process that they run in; stdout stays clean."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    settings = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SERVICE, name, str(tmp_path / "c")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **settings}, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    if name == "wandb":
        assert len(list(tmp_path.glob("c.wandb/wandb/offline-run-*/run-*.wandb"))) >= 1
    elif name == "mlflow":
        (first, second) = sorted(tmp_path.glob("c.mlflow/*/*/metrics/train/loss"), key=lambda p: p.stat().st_mtime_ns)
        assert [line.split()[2] for line in first.read_text().splitlines()] == ["1", "2", "3", "4", "5"]
        assert [line.split()[2] for line in second.read_text().splitlines()] == ["4", "5", "6"]
    else:
        import sqlite3

        (store,) = (tmp_path / "trackio").glob("*.db")
        with sqlite3.connect(store) as db:
            found = [json.loads(text) for (text,) in db.execute("select metrics from metrics order by step, id")]
        assert [entry["train/loss"] for entry in found if "train/loss" in entry][:2] == [1.0, 0.5]
