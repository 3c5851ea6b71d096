"""Nothing is lost: kill -9 at any moment, full disk, changed byte, dead worker or process, a scheduler's signal."""

from __future__ import annotations

import contextlib
import dataclasses
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

import tinyllava_edge
from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.errors import DataError, StorageError, TinyLlavaEdgeError, UsageError
from tinyllava_edge.train import signals, spread, states
from tinyllava_edge.train.dataset import StageData, prepare
from tinyllava_edge.train.deal import DealtData
from tinyllava_edge.train.faults import explained
from tinyllava_edge.train.recipes import StageRecipe, override
from tinyllava_edge.train.trainer import train, work_directory

from .conftest import Files, message

CHILD = Path(__file__).with_name("safety_child.py")
ROOT = Path(__file__).parents[2]
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
    "tidying up": 0,  # all is done: the record of the run that was killed is given
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
    assert record["signal"] == signal.SIGKILL and record["existed"] == (moment == "tidying up")
    assert record["second"] == 0 and record["again"]["resumed_from"] == KILLED[moment]
    assert record["again"]["losses"] == json.loads((moments / "whole.said.json").read_text())["losses"]
    equal_files(moments / name, moments / "whole")
    kept = [".log.jsonl", ".said.json", ".samples.jsonl", ".tensorboard", ".train.json"]
    assert record["left"] == [name, *(name + suffix for suffix in kept)]


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


def test_what_a_state_cannot_hold_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    for kind, options in ((torch.optim.AdamW, {}), (torch.optim.AdamW, {"amsgrad": True}), (torch.optim.SGD, {})):
        optimizer = kind([weight], lr=0.1, **options, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        weight.grad = torch.ones(3)
        optimizer.step()
        whole = spread.Whole({"w": weight}, optimizer)
        if kind is torch.optim.AdamW and not options:
            assert set(whole.moments(weight)) == {"exp_avg", "exp_avg_sq"} and whole.steps() == {"w": 1}
        else:
            with pytest.raises(UsageError, match="max_exp_avg_sq|momentum_buffer"):
                whole.moments(weight)


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


def test_signals_ask_once_and_a_second_ctrl_c_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch:
        reason = ""

    before = {number: signal.getsignal(number) for number in signals.ASKED}
    for number, name in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")):
        watch = Watch()
        with signals.Signals(watch) as asked:
            assert asked.name() == "another process"
            for _ in range(3):  # a terminal and a launcher both send it
                os.kill(os.getpid(), number)
            assert (watch.reason, asked.name()) == ("interrupt", name)
            monkeypatch.setattr(signals, "AGAIN_SECONDS", -1.0)
            with pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext():
                os.kill(os.getpid(), number)
            monkeypatch.undo()
    assert {number: signal.getsignal(number) for number in signals.ASKED} == before


def test_text_alone_is_trained_and_gone_on_with(
    tiny_checkpoint: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connector gets no gradient then, and has no moments to save. Several processes refuse it."""
    rows = [
        {"id": word, "conversations": [message("human", f"say {word}"), message("gpt", word)]}
        for word in ("one", "two", "three", "four", "five", "six")
    ]
    data = tmp_path / "text.json"
    data.write_text(json.dumps(rows))
    text = dataclasses.replace(files, qa=data)
    whole = train(tiny_checkpoint, STAGE, data, files.images, tmp_path / "whole", progress=False)
    interrupted(tiny_checkpoint, text, tmp_path / "run", monkeypatch, 4)
    result = train(tiny_checkpoint, STAGE, data, files.images, tmp_path / "run", progress=False)
    assert 0 < result.resumed_from < 6 and result.losses == whole.losses
    equal_files(tmp_path / "whole", tmp_path / "run")
    prepared = prepare(checkpoints.load(tiny_checkpoint), STAGE, data, files.images)
    dealt = DealtData(prepared, 2)
    with pytest.raises(DataError, match="no row has a picture"):
        dealt.batch([dealt[0]])


def test_processes_make_a_thing_one_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tinyllava_edge.train import launch\n"
        "target = Path(sys.argv[1]) / 'made'\n"
        "with launch.one_at_a_time(target):\n"
        "    if not target.exists():\n"
        "        time.sleep(0.3); target.touch(exist_ok=False); print('made', launch.is_first())\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**ENVIRONMENT, "RANK": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [child.communicate(timeout=60)[0] for child in children]
    assert sorted(said) == ["", "", "made False\n"] and [child.returncode for child in children] == [0, 0, 0]


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


SHIMS = {  # Slurm isn't there: two "machines" on this one, and signals that reach every process of the step
    "srun": """#!/bin/bash
echo $$ > "$SHIMS/step"
while [[ "$1" == --* ]]; do shift; done
for ((k = 0; k < SLURM_NNODES; k++)); do "$@" & done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
""",
    "scancel": f"""#!{sys.executable}
import os, psutil, signal, sys
assert sys.argv[1:] == ["--signal=USR1", "77"], sys.argv
step = psutil.Process(int(open(os.environ["SHIMS"] + "/step").read()))
for process in step.children(recursive=True):
    process.send_signal(signal.SIGUSR1)
""",
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo localhost && exit\necho "$@" >> "$SHIMS/scontrol.log"\n',
}


def test_a_slurm_job_saves_before_its_time_is_up_and_is_put_back_in_the_queue(
    tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    """The script itself runs two torchruns with a process each: USR1 to it, a whole state, exit code 1, a requeue."""
    for name, text in SHIMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    stage = override(STAGE, {"epochs": 500.0, "save_steps": 4, "micro_batch": 1})
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain(stage).items()]
    (tmp_path / "recipe.toml").write_text("\n".join(['name = "x"', "[[stages]]", *lines]))
    job = str(10_000 + os.getpid() % 10_000)  # the port follows from it
    (tmp_path / "scancel").write_text(SHIMS["scancel"].replace('"77"', f'"{job}"'))
    slurm = {"JOB_ID": job, "GPUS_ON_NODE": "1", "CPUS_PER_TASK": "1", "NNODES": "2", "JOB_NODELIST": "localhost"}
    environment = {
        **{name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"},
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SHIMS": str(tmp_path),
    }
    child = subprocess.Popen(
        [
            *["bash", str(ROOT / "train" / "slurm" / "many_nodes.sbatch")],
            *["--recipe", str(tmp_path / "recipe.toml"), "--stage", "s", "--checkpoint", str(tiny_checkpoint)],
            *["--data", str(files.qa), "--images", str(files.images), "-o", str(tmp_path / "run")],
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    work = work_directory(tmp_path / "run")
    tree = psutil.Process(child.pid)
    try:
        wait_for(child, lambda: states.states_in(work))
        child.send_signal(signal.SIGUSR1)
        out, said = child.communicate(timeout=60)
    finally:
        for process in [*tree.children(recursive=True), tree] if child.poll() is None else []:
            process.kill()
    assert child.returncode == 1 and out == "", said
    assert "interrupted at step" in said and "by SIGUSR1" in said
    kept = states.states_in(work)
    assert states.fault_of(kept[-1]) == "" and len(kept) <= 2 and not (tmp_path / "run").exists()
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job}\n"


def test_both_slurm_scripts_wait_and_requeue_alike() -> None:
    folder = ROOT / "train" / "slurm"
    one, many = ((folder / f"{name}.sbatch").read_text() for name in ("one_node", "many_nodes"))
    assert one.partition("step=$!")[2].replace(" # the trap ended the first wait", "") == many.partition("step=$!")[2]
    for text in (one, many):
        assert "trap 'warned=1; scancel --signal=USR1 \"$SLURM_JOB_ID\"' USR1\n" in text
        assert "#SBATCH --signal=B:USR1@600" in text and "#SBATCH --requeue" in text
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_accelerates_files_can_be_read() -> None:
    """Its launcher needs GPUs for them, so that they are only parsed here."""
    from accelerate.commands.config.config_args import load_config_from_file

    for name, machines in (("one_node", 1), ("many_nodes", 2)):
        config = load_config_from_file(str(ROOT / "train" / "accelerate" / f"{name}.yaml"))
        assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
        assert config.distributed_type == "MULTI_GPU" and config.mixed_precision == "no"


def wait_for(child: subprocess.Popen[str], there: Any) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert child.poll() is None, child.stderr and child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
