"""Saved states of a run: trained weights, the optimiser's moments, the trainer's counters. safetensors and JSON only.

{out}.work/
    job.json                        what is trained, on what, from where: another job's states are refused
    checkpoint-{step}/
        model.safetensors …         trained weights, float32, whole
        moments.safetensors …       AdamW's two moments of each, whole
        trainer_state.json          steps, epoch, loss of each step (transformers)
        progress.json               optimiser steps of each weight, learning-rate schedule
        whole.json                  size and SHA-256 of every file; written last

A state doesn't know which engine wrote it, nor on how many processes: any engine goes on from it on any number. Nothing
random is saved: what is random follows from seed, step and process.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError, StorageError
from ..files import is_full, new_directory, no_space, sha256_file, storage_errors, write_json
from .spread import Spread, moment_key

WHOLE = "whole.json"
JOB = "job.json"
PROGRESS = "progress.json"
TRAINER_STATE = "trainer_state.json"
KEPT = 2  # a kill while the newest is written leaves the one before
SHARD_BYTES = 2 << 30  # the writing process holds no more of the moments at a time


class _Shards:
    """Tensors in safetensors files of bounded size: `stem.safetensors`, `stem-2.safetensors` …"""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem, self.number = folder, stem, 0
        self.waiting: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        # a copy: the weights' own memory goes on being trained, and shared memory isn't saved
        self.waiting[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        if sum(t.numel() * 4 for t in self.waiting.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        self.number += 1
        name = f"{self.stem}.safetensors" if self.number == 1 else f"{self.stem}-{self.number}.safetensors"
        save_file(self.waiting, self.folder / name, metadata={"format": "pt"})
        self.waiting = {}


class Saved:
    """The tensors of a saved state, read one at a time."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.files: dict[str, Any] = {}
        whole = read_json(state / WHOLE)
        listed = whole.get("files", {}) if isinstance(whole, dict) else [path.name for path in state.iterdir()]
        for path in sorted(state / name for name in listed if name.endswith(".safetensors")):
            handle = safe_open(path, framework="pt", device="cpu")
            self.files |= dict.fromkeys(handle.keys(), handle)

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def __call__(self, key: str) -> torch.Tensor:
        """A tensor by its key. Raises CheckpointError that names the state if it isn't there."""
        if key not in self.files:
            raise CheckpointError(f"{self.state}: lacks {key}", "delete the directory and run the same command again")
        tensor: torch.Tensor = self.files[key].get_tensor(key)
        return tensor

    def progress(self) -> dict[str, Any]:
        """What `progress.json` says."""
        value = read_json(self.state / PROGRESS)
        if not isinstance(value, dict) or not isinstance(value.get("steps"), dict):
            raise CheckpointError(f"{self.state / PROGRESS}: can't be read", "delete the directory and run again")
        return value


Tensors = Iterator[tuple[str, str, torch.Tensor]]  # file stem, key, whole tensor


def everything(named: Mapping[str, torch.nn.Parameter], spread: Spread) -> Tensors:
    """What a state holds, one whole tensor at a time. Collective."""
    for name, parameter in named.items():
        yield "model", name, spread.weight(parameter)
    for name, parameter in named.items():
        for key, tensor in spread.moments(parameter).items():
            yield "moments", moment_key(name, key), tensor


def write_state(target: Path, tensors: Tensors, trainer_state: Any, progress: Mapping[str, Any]) -> None:
    """Write a state, whole or not at all, then drop the oldest.

    Raises:
        StorageError: it can't be written; the states before are kept.
    """
    with _writing(target), new_directory(target, force=True) as folder:
        shards = {stem: _Shards(folder, stem) for stem in ("model", "moments")}
        for stem, key, tensor in tensors:
            shards[stem].add(key, tensor)
        for shard in shards.values():
            shard.flush()
        trainer_state.save_to_json(str(folder / TRAINER_STATE))
        write_json(folder / PROGRESS, dict(progress))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(folder.iterdir())}
        write_json(folder / WHOLE, {"files": files})
    for old in states_in(target.parent)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn whatever a failed write raises into a StorageError that names the state."""
    try:
        with storage_errors(target):
            yield
    except (OSError, SafetensorError, StorageError) as error:
        if is_full(target):
            raise no_space(target) from error
        raise StorageError(
            error.message if isinstance(error, StorageError) else f"{target}: can't be written ({error})",
            f"make room in {target.parent}, then run the same command again: it goes on from the state before",
        ) from error


def open_work(work: Path, job: Mapping[str, Any], resume: bool) -> Path | None:
    """Make or reopen the directory of saved states; returns the newest whole state of this very job, if any.

    A state that is not whole, or whose bytes have changed since, is said on stderr, removed, and the one before taken.

    Raises:
        StorageError: it holds the states of another job.
    """
    if work.exists() and not resume:
        shutil.rmtree(work)
    record = work / JOB
    if record.is_file() and read_json(record) != job:
        raise StorageError(
            f"{work}: holds a run with another recipe, data or start", f"delete {work}, or write to another -o"
        )
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        if not record.is_file():
            write_json(record, dict(job))
    for state in reversed(states_in(work)):
        fault = fault_of(state)
        if not fault:
            return state
        print(f"{state}: {fault}; the state before it is taken", file=sys.stderr)
        shutil.rmtree(state, ignore_errors=True)
    return None


def states_in(work: Path) -> list[Path]:
    """Directories of saved states, oldest first."""
    found = {p: p.name.removeprefix("checkpoint-") for p in work.glob("checkpoint-*") if p.is_dir()}
    return sorted((p for p, step in found.items() if step.isdigit()), key=lambda p: int(found[p]))


def fault_of(state: Path) -> str:
    """What is wrong with a saved state; empty when every file has the size and the hash that were recorded."""
    record = read_json(state / WHOLE)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not files:
        return f"{WHOLE} is missing or can't be read"
    for name, facts in files.items():
        path = state / name
        if Path(name).name != name or not isinstance(facts, dict) or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes instead of {facts.get('bytes')}"
        if sha256_file(path) != facts.get("sha256"):
            return f"{name} was changed since it was written"
    return ""


def read_json(path: Path) -> Any:
    """JSON of a file, or None if it can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
