"""Which runs of a build may be pooled: those of the same machine, versions and settings as the first one.

A results file grows by appending. A second run on another machine under the same target name, with other library
versions, another commit, other threads, another picture or another question measures something else.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllava_edge.benchmarks.results import Sample

FACTS = ("image_size", "image_sha256", "prompt_sha256", "max_tokens")  # runs that differ in them are never pooled
MACHINE = (
    "cpu",
    "memory_bytes",
    "limits",
    "system",
    "libraries",
    "git_commit",
)  # nor those of other machines, versions
ENGINE = ("providers", "kv_cache", "llama_cpp_system_info", "ggml_commit", "onnxruntime_build")  # of its runtime
DEVICE_KINDS = ("latency", "memory", "energy")  # what belongs to a target alone
_OWN_THREADS = re.compile(r"@t\d+$")  # a grid's further numbers of threads, told by the stage's name


@dataclass(frozen=True)
class Setting:
    """What an `environment` line says of a measurement."""

    machine: str = ""
    """values of MACHINE and ENGINE as JSON; empty without an environment line"""
    threads: Any = None
    """threads of the runtime"""


def settings_by_environment(samples: Iterable[Sample]) -> dict[str, Setting]:
    """Environment id → setting."""
    found = {}
    for sample in samples:
        if sample.kind == "environment":
            runtime = sample.detail.get("runtime")
            runtime = runtime if isinstance(runtime, dict) else {}
            facts = [*(sample.detail.get(name) for name in MACHINE), *(runtime.get(name) for name in ENGINE)]
            machine = json.dumps(facts, sort_keys=True, default=str)
            found[sample.environment_id] = Setting(machine, runtime.get("n_threads"))
    return found


def pooled_runs(own: Sequence[Sample], settings: Mapping[str, Setting]) -> tuple[list[Sample], int, int]:
    """A build's lines without those of runs that differ from the first one.

    Args:
        own: lines of one build on one target.
        settings: see settings_by_environment.

    Returns:
        The lines, how many runs they pool, and how many runs are left out.
    """
    asked: dict[tuple[str, str], list[str]] = {}
    plain = set[tuple[str, str]]()  # runs that have stages under their plain names
    for sample in own:
        if sample.kind == "latency" and (sample.stage == "ttft_ms" or "run" in sample.detail):
            facts = asked.setdefault(_run(sample), [])
            if not _OWN_THREADS.search(sample.stage):
                plain.add(_run(sample))
            if sample.stage == "ttft_ms" and not facts:  # decoder tests have no picture: their runs go with any
                facts += [json.dumps(sample.detail.get(name)) for name in FACTS]
    first = settings.get(next(iter(asked), ("", ""))[0], Setting())
    known = next((facts for facts in asked.values() if facts), [])

    def elsewhere(environment_id: str) -> bool:
        return bool(asked) and settings.get(environment_id, Setting()).machine != first.machine

    others = {
        run
        for run, facts in asked.items()
        if elsewhere(run[0])
        or (run in plain and settings.get(run[0], Setting()).threads != first.threads)
        or (facts and facts != known)
    }
    kept = [
        s
        for s in own
        if s.kind not in DEVICE_KINDS or not (elsewhere(s.environment_id) or (s.kind != "memory" and _run(s) in others))
    ]
    repeats = Counter((_run(s), s.sample) for s in kept if s.kind == "latency" and s.stage == "ttft_ms")
    timed = {_run(s) for s in kept if s.kind == "latency" and s.stage == "ttft_ms"}
    return kept, max(len(timed), *repeats.values(), 1), len(others)


def _run(sample: Sample) -> tuple[str, str]:
    return sample.environment_id, str(sample.detail.get("run", ""))
