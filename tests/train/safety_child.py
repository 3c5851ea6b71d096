"""Trains once for each moment and dies there, then again to the end: `safety_child.py JOB.json`.

Everything is imported once, and each training is a forked process: what kills it is a real SIGKILL.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge import files
from tinyllava_edge.errors import TinyLlavaEdgeError
from tinyllava_edge.train import states, trainer
from tinyllava_edge.train.dataset import StageData
from tinyllava_edge.train.pictures import Pixels
from tinyllava_edge.train.recipes import recipe_from

HARD = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with contextlib.suppress(ImportError), contextlib.redirect_stdout(sys.stderr):
    importlib.import_module("deepspeed")  # accelerate would, in every fork


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, act: Callable[..., None]) -> None:
    """The call of that number does `act` in front of the real thing."""
    real, calls = getattr(owner, name), 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act(*args)
        return real(*args, **options)

    setattr(owner, name, called)


def half_a_file(shards: Any) -> None:
    """A file of the state is cut in the middle, in its temporary place."""
    path = shards.folder / f"{shards.stem}.safetensors"
    path.write_bytes(os.urandom(1000))
    die()


def tiny_disk(*_: Any) -> None:
    """From here on no file may be larger than 100 kB, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, HARD))


MOMENTS: dict[str, Callable[[], None]] = {
    "caching features": lambda: at_call(Pixels, "decode", 4, die),
    "before the first state": lambda: at_call(StageData, "batch", 2, die),
    "writing the first state": lambda: at_call(states._Shards, "flush", 2, half_a_file),
    "writing the second state": lambda: at_call(states._Shards, "flush", 4, half_a_file),
    "before a state gets its name": lambda: at_call(files, "_swap", 3, die),
    "between two states": lambda: at_call(StageData, "batch", 8, die),
    "dropping an old state": lambda: at_call(states, "states_in", 4, die),
    "saving the checkpoint": lambda: at_call(checkpoints, "save_tokenizer", 1, die),
    "tidying up": lambda: at_call(trainer, "tidy", 1, die),
    "full disk": lambda: at_call(states._Shards, "flush", 4, tiny_disk),
}


def training(job: dict[str, Any], out: Path, moment: str) -> int:
    """Train in a forked process; returns what waitpid says."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 9
    with contextlib.suppress(BaseException):
        if moment:
            MOMENTS[moment]()
        (recipe,) = recipe_from({"name": "x", "stages": [job["stage"]]}, "test").stages
        said: dict[str, Any] = {}
        try:
            result = trainer.train(
                Path(job["start"]), recipe, Path(job["data"]), Path(job["images"]), out, progress=False
            )
            said, code = {"resumed_from": result.resumed_from, "losses": result.losses}, 0
        except TinyLlavaEdgeError as error:
            said, code = {"error": error.message, "hint": error.hint, "kind": type(error).__name__}, error.exit_code
        resource.setrlimit(resource.RLIMIT_FSIZE, (HARD, HARD))
        out.with_name(f"{out.name}.said.json").write_text(json.dumps(said))
    os._exit(code)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[1]).parent
    gc.freeze()  # a fork's collector needn't look at what was imported
    training(job, folder / "whole", "")
    for moment in MOMENTS:
        out = folder / moment.replace(" ", "-")
        first = training(job, out, moment)
        record = {
            "signal": os.WTERMSIG(first) if os.WIFSIGNALED(first) else 0,
            "exit": os.waitstatus_to_exitcode(first),
        }
        said = out.with_name(f"{out.name}.said.json")
        record |= {"said": json.loads(said.read_text()) if said.exists() else None, "existed": out.exists()}
        work = out.with_name(f"{out.name}.work")
        record["states"] = sorted(p.name for p in work.glob("checkpoint-*")) if work.exists() else []
        record["second"] = os.waitstatus_to_exitcode(training(job, out, ""))
        record["again"] = json.loads(said.read_text()) if said.exists() else None
        record["left"] = sorted(p.name for p in folder.glob(f"*{out.name}*"))
        (folder / f"{out.name}.record.json").write_text(json.dumps(record))
