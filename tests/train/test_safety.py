"""Nothing is lost: kill -9 at any moment, full disk, changed byte, dead worker or process, a scheduler's signal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import tinyllava_edge
from tinyllava_edge.errors import StorageError, TinyLlavaEdgeError
from tinyllava_edge.train import states
from tinyllava_edge.train.dataset import StageData
from tinyllava_edge.train.faults import explained
from tinyllava_edge.train.recipes import StageRecipe, override
from tinyllava_edge.train.trainer import train, work_directory

from .conftest import Files

CHILD = Path(__file__).with_name("safety_child.py")
ENGINES_CHILD = Path(__file__).with_name("engines_child.py")
# 20 rows in packs of up to 4 turns: 8 packs, 4 steps an epoch, 8 in all, states after 3, 6 and 8
STAGE = StageRecipe(
    "s", "model", "full", 1e-3, 2, epochs=2.0, max_turns=4, precision="fp32", save_steps=3, max_length=128
)
KILLED = {  # moment → step that the same call goes on from
    "caching features": 0,
    "before the first state": 0,
    "writing the first state": 0,
    "writing the second state": 3,
    "before a state gets its name": 3,
    "between two states": 6,
    "dropping an old state": 8,
    "saving the checkpoint": 8,
}
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(tinyllava_edge.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


def plain(stage: StageRecipe) -> dict[str, Any]:
    return {key: value for key, value in stage.__dict__.items() if value is not None}


def equal_files(first: Path, second: Path) -> None:
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def moments(tiny_checkpoint: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moments")
    job = {"stage": plain(STAGE), "start": str(tiny_checkpoint), "data": str(files.qa), "images": str(files.images)}
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder / "job.json")], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("moment", KILLED)
def test_a_kill_loses_at_most_the_steps_since_the_last_state(moments: Path, moment: str) -> None:
    """The same call goes on, and its checkpoint is that of a run that nobody killed, to the last bit."""
    name = moment.replace(" ", "-")
    record = json.loads((moments / f"{name}.record.json").read_text())
    assert record["signal"] == signal.SIGKILL and not record["existed"]
    assert record["second"] == 0 and record["again"]["resumed_from"] == KILLED[moment]
    assert record["again"]["losses"] == json.loads((moments / "whole.said.json").read_text())["losses"]
    equal_files(moments / name, moments / "whole")
    assert record["left"] == [name, f"{name}.said.json", f"{name}.train.json"]


def test_a_full_disk_is_said_and_the_state_before_is_kept(moments: Path) -> None:
    record = json.loads((moments / "full-disk.record.json").read_text())
    assert record["exit"] == 1 and record["said"]["kind"] == "StorageError"
    assert "checkpoint-6" in record["said"]["error"] and "same command again" in record["said"]["hint"]
    assert record["states"] == ["checkpoint-3"]
    assert record["second"] == 0 and record["again"]["resumed_from"] == 3
    equal_files(moments / "full-disk", moments / "whole")


def test_dropout_is_the_same_after_going_on(
    tiny_checkpoint: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing random is saved: it follows from seed and step."""
    start = tmp_path / "start"
    shutil.copytree(tiny_checkpoint, start)
    config = json.loads((start / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (start / "config.json").write_text(json.dumps(config))
    whole = train(start, STAGE, files.qa, files.images, tmp_path / "whole", progress=False)
    without = train(tiny_checkpoint, STAGE, files.qa, files.images, tmp_path / "without", progress=False)
    assert whole.losses != without.losses
    interrupted(start, files, tmp_path / "run", monkeypatch, 5)
    result = train(start, STAGE, files.qa, files.images, tmp_path / "run", progress=False)
    assert 0 < result.resumed_from < 8 and result.losses == whole.losses
    equal_files(tmp_path / "whole", tmp_path / "run")


def interrupted(start: Path, files: Files, out: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> Path:
    """Train until a SIGTERM comes in a batch of that number; returns the directory of states."""
    calls, real = [0], StageData.batch

    def batch(self: StageData, packs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, packs)

    with monkeypatch.context() as patch:
        patch.setattr(StageData, "batch", batch)
        with pytest.raises(TinyLlavaEdgeError, match="by SIGTERM") as stopped:
            train(start, STAGE, files.qa, files.images, out, progress=False)
    assert stopped.value.exit_code == 1
    return work_directory(out)


def test_a_changed_byte_is_noticed_and_the_state_before_is_taken(
    tiny_checkpoint: Path,
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    whole = train(tiny_checkpoint, STAGE, files.qa, files.images, tmp_path / "whole", progress=False)
    work = interrupted(tiny_checkpoint, files, tmp_path / "run", monkeypatch, 8)
    assert signal.getsignal(signal.SIGTERM) is before
    kept = states.states_in(work)
    assert [state.name for state in kept] == ["checkpoint-6", "checkpoint-7"]  # 3 was dropped
    assert not [path for path in work.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    path = kept[-1] / "moments.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    result = train(tiny_checkpoint, STAGE, files.qa, files.images, tmp_path / "run", progress=False)
    said = capfd.readouterr().err
    assert "checkpoint-7: moments.safetensors was changed" in said and "the state before it is taken" in said
    assert result.resumed_from == 6 and result.losses == whole.losses
    equal_files(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "progress.json", "whole.json"])
@pytest.mark.parametrize("spoil", ["cut", "gone", "text"])
def test_a_spoilt_state_is_never_taken(tmp_path: Path, name: str, spoil: str) -> None:
    work = tmp_path / "work"
    named = {"w": torch.nn.Parameter(torch.arange(6.0))}

    class State:
        def save_to_json(self, path: str) -> None:
            Path(path).write_text("{}")

    for step in (1, 2, 3):
        tensors = iter([("model", "w", named["w"])])
        states.write_state(work / f"checkpoint-{step}", tensors, State(), {"steps": {"w": step}, "schedule": {}})
    assert [state.name for state in states.states_in(work)] == ["checkpoint-2", "checkpoint-3"]
    path = work / "checkpoint-3" / name
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif spoil == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\xff{" + path.read_bytes()[2:])
    found = states.open_work(work, {"stage": 1}, True)
    assert found == work / "checkpoint-2" and not (work / "checkpoint-3").exists()
    with pytest.raises(StorageError, match="another recipe"):
        states.open_work(work, {"stage": 2}, True)
    assert states.open_work(work, {"stage": 2}, False) is None


def test_large_states_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "SHARD_BYTES", 100)
    shards = states._Shards(tmp_path, "model")
    tensors = {f"w{k}": torch.randn(20) for k in range(5)}
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    shards.flush()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-2.safetensors",
        "model-3.safetensors",
        "model.safetensors",
    ]
    saved = states.Saved(tmp_path)
    assert all(torch.equal(saved(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(TinyLlavaEdgeError, match="lacks w9"):
        saved("w9")


def test_a_dead_worker_is_named(
    tiny_checkpoint: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, here = StageData.batch, os.getpid()

    def batch(self: StageData, packs: Any) -> Any:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, packs)

    monkeypatch.setattr(StageData, "batch", batch)
    with pytest.raises(TinyLlavaEdgeError, match=r"a process that reads the data ended \(DataLoader worker") as dead:
        train(tiny_checkpoint, STAGE, files.qa, files.images, tmp_path / "run", progress=False, workers=1)
    assert "same command again" in dead.value.hint and dead.value.exit_code == 1


def test_other_errors_are_not_explained_away(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="something else"), explained("s", tmp_path):
        raise RuntimeError("something else")


def torchrun(*command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]


def test_a_dead_process_ends_all_and_the_same_command_goes_on(
    tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    """Rank 1 is killed between two steps; what is there is gone on from with one process alone."""
    stage = override(STAGE, {"epochs": 50.0, "save_steps": 2, "micro_batch": 1})
    common = {"start": str(tiny_checkpoint), "data": str(files.qa), "images": str(files.images), "engine": "ddp"}
    case = {**common, "stage": plain(stage), "out": str(tmp_path / "run"), "pids": str(tmp_path)}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    child = subprocess.Popen(
        torchrun(str(ENGINES_CHILD), str(tmp_path / "cases.json"), str(tmp_path / "results.json")),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    work = work_directory(tmp_path / "run")
    wait_for(child, lambda: len(states.states_in(work)) == 2)
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 1 and "-9" in said
    (first,) = json.loads((tmp_path / "results.0.json").read_text())
    assert "another process of this run is gone" in first["error"] and "same command again" in first["hint"]
    done = train(tiny_checkpoint, stage, files.qa, files.images, tmp_path / "run", progress=False, max_seconds=0.0)
    assert done.resumed_from >= 4 and len(done.losses) == done.resumed_from + 1


def test_a_schedulers_signal_to_every_process_saves_and_leaves(
    tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    """As Slurm does with --signal=USR1@…: the launcher of train/slurm/*.sbatch ignores it, the processes save."""
    stage = override(STAGE, {"epochs": 500.0, "save_steps": 1000, "micro_batch": 1})
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain(stage).items()]
    (tmp_path / "recipe.toml").write_text("\n".join(['name = "x"', "[[stages]]", *lines]))
    command = torchrun(
        *["-m", "tinyllava_edge", "train", "--recipe", str(tmp_path / "recipe.toml"), "--stage", "s"],
        *["--data", str(files.qa), "--images", str(files.images), "--checkpoint", str(tiny_checkpoint)],
        *["-o", str(tmp_path / "run")],
    )
    child = subprocess.Popen(
        ["bash", "-c", 'trap "" USR1; exec "$@"', "bash", *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    work = work_directory(tmp_path / "run")
    wait_for(child, lambda: (work / states.JOB).is_file())
    time.sleep(3)  # training has begun
    launcher = psutil.Process(child.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        process.send_signal(signal.SIGUSR1)
    try:
        out, said = child.communicate(timeout=60)
    finally:
        for process in [*launcher.children(recursive=True), launcher] if child.poll() is None else []:
            process.kill()
    assert child.returncode == 1 and out == ""
    assert "interrupted at step" in said and "by SIGUSR1" in said and "same command again" in said
    (state,) = states.states_in(work)
    assert states.fault_of(state) == "" and not (tmp_path / "run").exists()
    assert load_file(state / "model.safetensors")


def wait_for(child: subprocess.Popen[str], there: Any) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert child.poll() is None, child.stderr and child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
