"""Budgets: reading them, and builds beside them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava_edge.benchmarks.budget import check, check_measured, parse_budget
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.errors import UsageError


def test_units() -> None:
    found = parse_budget("ttft=500ms, total=2s,rss=1.2GB ,size=900MiB,energy=500mJ,drop=0.5points")
    assert dict(found.limits) == {
        "ttft_ms": 500.0,
        "total_ms": 2000.0,
        "peak_rss": 1.2e9,
        "size": 900 * 2**20,
        "energy": 0.5,
        "drop": 0.5,
    }
    assert dict(parse_budget("rss=5KiB,size=7 kb,ttft=.5S,drop=0").limits) == {
        "peak_rss": 5120.0, "size": 7000.0, "ttft_ms": 500.0, "drop": 0.0}  # fmt: skip
    assert dict(parse_budget("size=12B,rss=3GiB").limits) == {"size": 12.0, "peak_rss": 3.0 * 2**30}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "''"),
        ("ttft", "'ttft'"),
        ("ttft=", "'ttft='"),
        ("ttft=500", "'ttft=500'"),  # no unit
        ("ttft=500MB", "'ttft=500MB'"),
        ("rss=1.2GB,ttft=-5ms", "'ttft=-5ms'"),
        ("rss=1e9B", "'rss=1e9B'"),
        ("rss=0MB", "'rss=0MB'"),
        ("size=1GB,,ttft=5ms", "''"),
        ("size=1GB,size=2GB", "'size=2GB'"),
        ("Size=1GB", "'Size=1GB'"),
        ("speed=5ms", "'speed=5ms'"),
        ("ttft=nanms", "'ttft=nanms'"),
        ("ttft=infs", "'ttft=infs'"),
        ("ttft=٣ms", "'ttft=٣ms'"),
    ],
)
def test_the_part_that_cant_be_read_is_named(text: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert part in caught.value.message and caught.value.hint


@given(st.text(max_size=30))
def test_any_text_is_a_budget_or_an_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_budget(text).limits


def lines(values: list[float], stage: str = "ttft_ms", build: str = "a", target: str = "cpu") -> list[Sample]:
    return [Sample("latency", "edge", build, stage, v, "ms", n, "e", target) for n, v in enumerate(values)]


def test_a_median_beside_its_limit() -> None:
    values = [100.0, 101.0, 99.0, 400.0, 100.0]
    [found] = check(parse_budget("ttft=100ms"), lines(values))
    assert found.passed and found.value == 100.0 and found.bound is not None and found.bound > 100
    assert "ttft 100.0 ms (95 % bound " in found.line() and "ok, but its bound is over the limit" in found.line()
    [failed] = check(parse_budget("ttft=99.9ms"), lines(values))
    assert not failed.passed and failed.line().endswith("limit 99.9 ms: FAIL")


def test_every_build_and_target_is_beside_every_limit_and_other_pictures_are_not() -> None:
    measured = lines([1.0, 2.0, 3.0]) + lines([9.0, 9.0], target="ssh://x/y") + lines([500.0], "ttft_ms@640x480")
    measured += [Sample("memory", "edge", "a", "peak_rss", size, "bytes", 0, "e") for size in (5e6, 7e6)]
    found = {(c.target, c.name): c for c in check(parse_budget("ttft=5ms,rss=6MB"), measured)}
    assert found["cpu", "ttft"].passed and found["cpu", "ttft"].value == 2.0
    assert found["cpu", "rss"].value == 7e6 and not found["cpu", "rss"].passed  # the largest peak counts
    assert not found["ssh://x/y", "ttft"].passed
    assert found["ssh://x/y", "rss"].value is None and not found["ssh://x/y", "rss"].passed
    assert "not measured (not part of this run)" in found["ssh://x/y", "rss"].line()


def test_what_cant_be_read_doesnt_pass() -> None:
    null = Sample("energy", "edge", "a", "answer", None, "J", 0, "e", detail={"reason": "RAPL: not there"})
    [found] = check(parse_budget("energy=5J"), [null])
    assert not found.passed and "energy not measured (RAPL: not there), limit 5.000 J: FAIL" in found.line()


def test_accuracy_is_for_the_report() -> None:
    with pytest.raises(UsageError, match="drop"):
        check(parse_budget("drop=1"), [])


@pytest.mark.parametrize(
    ("text", "answers", "memory", "words"),
    [
        ("rss=1GB", True, False, "rss with --no-memory"),
        ("size=1GB,ttft=5ms", False, True, "ttft with -p or -n alone"),
        ("total=5ms", False, True, "total with -p or -n alone"),
        ("energy=5J", False, True, "energy with -p or -n alone"),
        ("drop=1", True, True, "drop"),
    ],
)
def test_what_a_run_will_not_measure_is_refused_before(text: str, answers: bool, memory: bool, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_measured(parse_budget(text), answers=answers, memory=memory)


def test_what_a_run_will_measure_is_not_refused() -> None:
    check_measured(parse_budget("rss=1GB,ttft=5ms,total=9ms,energy=5J,size=1MB"), answers=True, memory=True)
    check_measured(parse_budget("size=1MB"), answers=False, memory=False)


def test_a_median_of_a_coarse_counter_does_not_pass() -> None:
    still = {"source": "battery: B", "reason": "battery: B: the counter did not move"}
    lines = [Sample("energy", "edge", "a", "answer", None, "J", n, "e", detail=still) for n in range(9)]
    lines.append(Sample("energy", "edge", "a", "answer", 3.0, "J", 9, "e", detail={"source": "battery: B"}))
    [found] = check(parse_budget("energy=5J"), lines)
    assert not found.passed and found.value is None and "too coarse" in found.reason
