"""What `bench` says below its table: what the run can tell, the machine's load, shares of the roofline."""

from __future__ import annotations

import pytest

from tinyllava_edge.benchmarks import bench_notes
from tinyllava_edge.benchmarks.results import Sample


def ended(resolution: float | None, asked: float = 0.05, target: str = "cpu") -> list[Sample]:
    told = {"rounds": 40, "stopped_by": "most rounds", "resolution": resolution, "resolution_asked": asked}
    return [Sample("condition", stage="after", target=target, detail=told)]


@pytest.mark.parametrize(
    ("samples", "words", "absent"),
    [
        (ended(0.043), "a change of 4.3 % would be found by four of five such runs.", "asked for"),
        (ended(0.07), "5 % were asked for", "over 10 %"),
        (ended(0.123), "That is over 10 %: smaller differences stay unseen", "asked for"),
        (ended(None), "too few to compare anything", "would be found"),
        (ended(0.02, target="ssh://pi@pi/x"), "40 rounds on ssh://pi@pi/x, ended by most rounds", "over"),
    ],
)
def test_the_resolution_is_said(samples: list[Sample], words: str, absent: str) -> None:
    text = bench_notes.resolution(samples)
    assert words in text and absent not in text


def test_runs_that_were_measured_before_say_nothing() -> None:
    assert bench_notes.resolution([Sample("condition", stage="after", detail={"rounds": 3})]) == ""


@pytest.mark.parametrize(("load", "said"), [(0.4, False), (1.4, True), (None, False)])
def test_a_busy_machine_is_said(load: float | None, said: bool) -> None:
    machine = Sample("environment", environment_id="e", detail={"cpu": {"cores": 64, "affinity": [0, 1]}})
    state = {"load_average": None if load is None else [load, 9.0, 9.0]}
    text = bench_notes.load([machine, Sample("condition", stage="before", detail=state)])
    assert bool(text) == said and (not said or "load average was 1.4 on 2 cores" in text)


def test_builds_without_a_share_are_one_line_with_the_reason() -> None:
    lines = [
        Sample("latency", "edge", build, stage, 5.0, "ms", 0, "e", target)
        for target in ("cpu", "cuda")
        for build in ("a", "b")
        for stage in ("vision_ms", "decode_image_ms")
    ]
    rows = bench_notes.roofline(lines).splitlines()[3:]
    assert len(rows) == 4 and all("| a, b | " in row and "| – |  |  | " in row for row in rows)
    assert sum("bundle line holds none" in row for row in rows) == 2
    assert bench_notes.roofline([]) == ""
