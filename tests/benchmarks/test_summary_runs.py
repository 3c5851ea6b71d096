"""Which runs are pooled: a second one on another machine, or that was asked something else, never is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.benchmarks import rounds, side_by_side
from tinyllava_edge.benchmarks.bench_grid import ANSWER, Task
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary import summarise
from tinyllava_edge.benchmarks.summary_runs import FACTS, pooled_runs, settings_by_environment
from tinyllava_edge.bundle import read_bundle

MACHINE: dict[str, Any] = {
    "cpu": {"model": "one", "governor": None},
    "memory_bytes": 8e9,
    "limits": {"cpu": None, "memory": None},
    "system": "Linux",
    "libraries": {"onnxruntime": "1.31.0"},
    "git_commit": "abc",
    "runtime": {"runtime": "edge", "n_threads": 2, "build": "b", "llama_cpp_system_info": "AVX2 = 1"},
}


def run(name: str, environment: str, ms: float, mark: str = "", **facts: object) -> list[Sample]:
    """Three answers, the cold one, memory and energy of one run."""
    detail = {"run": name, **facts}
    common = {"runtime": "edge", "build": "b", "environment_id": environment}
    return [
        Sample("latency", stage=f"cold_ttft_ms{mark}", value=3 * ms, unit="ms", **common),
        *(
            Sample("latency", stage=f"{stage}{mark}", value=ms + k, unit="ms", sample=k, detail=detail, **common)
            for k in range(3)
            for stage in ("ttft_ms", "vision_ms")
        ),
        Sample("memory", stage="peak_rss", value=1e6 * ms, unit="bytes", **common),
        *(Sample("energy", stage="answer", value=ms, unit="J", sample=k, **common) for k in range(3)),
    ]


def machine(name: str, **other: object) -> Sample:
    return Sample("environment", environment_id=name, detail={**MACHINE, **other})


@pytest.mark.parametrize("other", [
    {"cpu": {"model": "two", "governor": None}},
    {"cpu": {"model": "one", "governor": "powersave"}},
    {"limits": {"cpu": "50000 100000", "memory": None}},
    {"libraries": {"onnxruntime": "1.30.0"}},
    {"git_commit": "abd"},
    {"memory_bytes": 16e9},
    {"runtime": {**MACHINE["runtime"], "llama_cpp_system_info": "AVX2 = 0"}},
    {"runtime": {**MACHINE["runtime"], "n_threads": 4}},
])  # fmt: skip
def test_another_machine_under_the_same_name_is_left_out(other: dict[str, Any]) -> None:
    first = [machine("e1"), *run("r1", "e1", 10)]
    both = [*first, machine("e2", **other), *run("r2", "e2", 80)]
    (row,), (alone,) = summarise(both).builds, summarise(first).builds
    assert (row.ttft, row.stages["vision_ms"], row.runs, row.left_out) == (alone.ttft, 11, 1, 1)
    if other.get("runtime", {}).get("n_threads") != 4:  # of other threads only the timed answers are another thing
        assert (row.stages, row.memory, row.energy) == (alone.stages, alone.memory, alone.energy)


def test_a_counter_that_stood_still_has_no_typical_value() -> None:
    """A battery that counts in steps of 36 J: two of twenty answers moved it, and their 36 J are not an answer's."""
    common = {"kind": "energy", "runtime": "edge", "build": "b", "stage": "answer", "environment_id": "e1", "unit": "J"}
    source = {"source": "battery: BAT0 (energy)"}
    still = {**source, "reason": "battery: BAT0 (energy): the counter did not move; its steps are too coarse"}
    steps = [
        Sample(value=None if k % 10 else 36.0, sample=k, detail=still if k % 10 else source, **common)
        for k in range(20)
    ]
    (row,) = summarise([machine("e1"), *run("r1", "e1", 10)[:-3], *steps]).builds
    assert row.energy is None and len(row.energy_notes) == 1 and "too coarse" in row.energy_notes[0]
    (row,) = summarise([machine("e1"), *run("r1", "e1", 10)[:-3], *(s for s in steps if s.value)]).builds
    assert row.energy is not None and row.energy.estimate == 36 and row.energy_notes == ("battery: BAT0 (energy)",)


def test_what_does_not_matter_is_pooled() -> None:
    """Another build's files, another time and load: the same machine and settings."""
    runtime = {**MACHINE["runtime"], "build": "c", "files": {"x": "y"}}
    both = [machine("e1"), *run("r1", "e1", 10), machine("e2", runtime=runtime, time="later"), *run("r2", "e2", 12)]
    (row,) = summarise(both).builds
    assert (row.samples, row.runs, row.left_out, row.memory["peak_rss"]) == (6, 2, 0, 12_000_000)


def test_further_numbers_of_threads_stay_beside_the_first() -> None:
    """A grid's `@t2` stages have an environment of their own and are no other run."""
    four = machine("e2", runtime={**MACHINE["runtime"], "n_threads": 4})
    lines = [machine("e1"), *run("r1", "e1", 10), four, *run("r1", "e2", 6, "@t4")]
    (row,) = summarise(lines).builds
    assert (row.stages["ttft_ms"], row.stages["ttft_ms@t4"], row.left_out) == (11, 7, 0)
    later = [*lines, machine("e3", cpu={"model": "two"}), *run("r2", "e3", 50, "@t4")]
    assert summarise(later).builds[0].stages["ttft_ms@t4"] == 7


def test_another_question_is_another_run(tiny_bundle: Path) -> None:
    """By the hashes that a measurement really writes."""
    bundle = read_bundle(tiny_bundle)  # carries the spec, which is all that the hashes need
    asked = [rounds._facts(Task(ANSWER), rounds.Question(text), bundle) for text in ("what?", "who?", "what?")]
    assert set(FACTS) == {*asked[0], "image_size"} and asked[0] == asked[2] != asked[1]
    assert set(side_by_side.ASKED.values()) == {*FACTS, "n_threads"}
    first, other, again = (run(f"r{k}", "e1", 10 + k, **facts) for k, facts in enumerate(asked))
    settings = settings_by_environment([machine("e1")])
    kept, runs, left_out = pooled_runs([*first, *other, *again], settings)
    assert (runs, left_out) == (2, 1)
    assert {s.detail.get("run") for s in kept if s.stage == "ttft_ms"} == {"r0", "r2"}
    (row,) = summarise([machine("e1"), *first, *other]).builds
    assert (row.samples, row.left_out) == (3, 1)
    lines = [machine("e1"), *(replace(s, detail={**s.detail, "run": "r1"}) for s in run("r1", "e1", 10, **asked[1]))]
    found = side_by_side.side_by_side([machine("e1"), *first], lines)
    assert side_by_side.unlike(found) == ["question"]
