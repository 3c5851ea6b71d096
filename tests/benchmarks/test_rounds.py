"""The rounds: when they stop, in which order they go, what they keep, what they leave alone."""

from __future__ import annotations

import gc
import itertools
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava_edge.benchmarks.bench_grid import Task
from tinyllava_edge.benchmarks.energy import open_meter
from tinyllava_edge.benchmarks.rounds import Arm, Question, Rounds, StopRule, measure, undisturbed
from tinyllava_edge.benchmarks.stop_rule import MOST
from tinyllava_edge.errors import UsageError
from tinyllava_edge.runtimes.base import Answer, StageTimings

ANSWER = Task("answer", picture=None)


class Clock:
    """Time that passes only when something is answered."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Clocked:
    """Answers in `seconds` of a made-up clock."""

    spec = SimpleNamespace(template="phi")

    def __init__(self, build: str, asked: list[str], clock: Clock, seconds: float = 1.0) -> None:
        self.build, self.asked, self.clock, self.seconds = build, asked, clock, seconds

    def answer(self, *args: object, **options: object) -> Answer:
        assert not gc.isenabled() or len(self.asked) < 6  # warm-up is not timed
        self.asked.append(self.build)
        self.clock.now += self.seconds
        timings = StageTimings(vision_ms=float(len(self.asked)), decode_ms=10.0, total_ms=12.0)
        return Answer("a b c", (1, 2, 3), "stop", 70, 64, timings, token_ms=(5.00004, 5.0))


def run(rule: StopRule, names: str = "abc", **options: Any) -> tuple[str, Rounds]:
    asked: list[str] = []
    clock = Clock()
    arms = [Arm(Clocked(name, asked, clock), name) for name in names]
    found = measure(arms, [ANSWER], Question("?", 8), rule, run="r1", clock=clock, **options)
    return "".join(asked), found


def test_every_round_has_an_order_of_its_own_and_nobody_follows_the_same_one() -> None:
    """A rotation would keep each build's predecessor, and with it what that one leaves in the caches."""
    order, _ = run(StopRule(60))
    rounds = [order[k : k + 3] for k in range(6, len(order), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) == 6
    before = Counter(first for first, then in itertools.pairwise(order[6:]) if then == "b")
    assert min(before["a"], before["c"]) >= 15
    assert run(StopRule(60))[0] == order  # seeded


def test_warm_up_is_not_counted() -> None:
    order, found = run(StopRule(4))
    assert order[:6] == "aabbcc" and len(order) == 18
    vision = [s.value for s in found.samples if s.stage == "vision_ms"]
    assert vision == [float(k) for k in range(7, 19)]  # the six warm-up answers left no sample
    assert {s.value for s in found.samples if s.stage == "decode_tokens_per_s"} == {300.0}  # two and the end in 10 ms
    total = next(s for s in found.samples if s.stage == "total_ms")
    assert total.detail["token_ms"] == [5.0, 5.0] and total.detail["run"] == "r1" and total.detail["order"] == 0
    assert not any(s.stage in ("queue_ms", "image_prefill_ms") for s in found.samples)  # not measured by this runtime
    assert (found.rounds, found.seconds, found.stopped_by) == (4, 12.0, "count and time")


@pytest.mark.parametrize(
    ("rule", "rounds", "why"),
    [
        (StopRule(5), 5, "count and time"),
        (StopRule(2, min_time_s=10.0), 4, "count and time"),  # a round takes 3 s
        (StopRule(2, min_time_s=12.0), 4, "count and time"),
        (StopRule(2, min_time_s=12.5), 5, "count and time"),
        (StopRule(100, max_time_s=7.0), 3, "max-time"),
        (StopRule(100, max_time_s=0.001), 1, "max-time"),  # one round there is
        (StopRule(3, min_time_s=9.0, max_time_s=9.0), 3, "count and time"),
    ],
)
def test_stop_rule_by_count_and_time(rule: StopRule, rounds: int, why: str) -> None:
    order, found = run(rule)
    assert (found.rounds, found.stopped_by) == (rounds, why)
    counts = {name: order[6:].count(name) for name in "abc"}
    assert set(counts.values()) == {rounds}  # decided for all builds together


class Jittery(Clocked):
    """Answers in about 10 ms, off by a random share."""

    spread, draw = 0.2, random.Random(5)

    def answer(self, *args: object, **options: object) -> Answer:
        found = super().answer()
        ms = 10 * self.draw.lognormvariate(0, self.spread)
        return Answer(found.text, found.token_ids, "stop", 70, 64, StageTimings(vision_ms=1.0, total_ms=ms))


@pytest.mark.parametrize(("spread", "why"), [(0.002, "resolution"), (0.08, "resolution"), (1.0, "most rounds")])
@pytest.mark.parametrize("names", ["ab", "a"])
def test_rounds_go_on_until_ten_percent_would_show(spread: float, why: str, names: str) -> None:
    asked: list[str] = []
    clock = Clock()
    arms = [Arm(Jittery(name, asked, clock), name) for name in names]
    for arm in arms:
        arm.runtime.spread = spread
    found = measure(arms, [ANSWER], Question("?"), StopRule(8, resolution=0.1), clock=clock)
    assert found.stopped_by == why and found.resolution is not None
    assert (found.resolution <= 0.1) == (why == "resolution")
    assert (found.rounds == 8) == (spread == 0.002) and found.rounds <= MOST * 8  # bounded however bad it is
    asked.clear()
    for arm in arms:
        arm.runtime.spread = 1.0
    capped = measure(arms, [ANSWER], Question("?"), StopRule(8, 0, 30.0, 0.1), clock=clock)
    assert capped.stopped_by == "max-time" and capped.seconds <= 30.0 + len(names)


def test_too_few_rounds_have_no_resolution() -> None:
    assert run(StopRule(7))[1].resolution is None and run(StopRule(8))[1].resolution == 0.0


@given(
    count=st.integers(1, 50),
    least=st.floats(0, 100),
    cap=st.floats(0.001, 1000),
    seconds=st.floats(0.01, 10),
)
def test_both_minima_are_met_unless_the_cap_was_hit(count: int, least: float, cap: float, seconds: float) -> None:
    if cap < least:
        with pytest.raises(UsageError, match="shorter"):
            StopRule(count, least, cap)
        return
    rule = StopRule(count, least, cap)
    done = 1
    while not rule.verdict(done, done * seconds):
        done += 1
        assert done < 100_000
    before = done - 1
    if rule.verdict(done, done * seconds) == "max-time":
        assert done * seconds >= cap
    else:
        assert done >= count and done * seconds >= least
    assert before < count or before * seconds < least  # not a round too many
    assert before == 0 or before * seconds < cap


@pytest.mark.parametrize(
    "wrong",
    [
        (0,),
        (1, -1.0),
        (1, math.nan),
        (1, math.inf),
        (1, 0.0, 0.0),
        (1, 0.0, -1.0),
        (1, 0.0, 9.0, 1.0),
        (1, 0.0, 9.0, math.nan),
    ],
)
def test_rules_out_of_range(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        StopRule(*wrong)


def test_garbage_collection_waits_and_comes_back() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), undisturbed():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()
    gc.disable()
    try:
        with undisturbed():
            pass
        assert not gc.isenabled()  # it was off before
    finally:
        gc.enable()


def test_energy_is_read_around_each_answer_of_its_target(tmp_path: Path) -> None:
    """A made-up RAPL counter that each answer moves by half a joule; a target without a meter has no energy."""
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    for name, value in (("name", "package-0"), ("energy_uj", "1000000"), ("max_energy_range_uj", "9000000000")):
        (zone / name).write_text(value + "\n")

    class Burning(Clocked):
        def answer(self, *args: object, **options: object) -> Answer:
            counter = zone / "energy_uj"
            counter.write_text(str(int(counter.read_text()) + 500_000))
            return super().answer()

    asked: list[str] = []
    clock = Clock()
    arms = [Arm(Burning(name, asked, clock), name, target="cuda" if name == "c" else "cpu") for name in "abc"]
    with open_meter(tmp_path) as meter:
        found = measure(arms, [ANSWER], Question("?"), StopRule(3), meters={"cpu": meter}, clock=clock)
    energy = [s for s in found.samples if s.kind == "energy"]
    assert sorted((s.build, s.sample) for s in energy) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert all(s.value == pytest.approx(0.5) and s.unit == "J" and "rapl" in s.detail["source"] for s in energy)


def test_a_counter_too_coarse_for_an_answer_gives_no_energy(tmp_path: Path) -> None:
    """It moves in every third answer only."""
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    for name, value in (("name", "package-0"), ("energy_uj", "1000000"), ("max_energy_range_uj", "9000000000")):
        (zone / name).write_text(value + "\n")

    class Stepping(Clocked):
        def answer(self, *args: object, **options: object) -> Answer:
            found = super().answer()
            (zone / "energy_uj").write_text(str(1_000_000 + 1_500_000 * (len(self.asked) // 3)))
            return found

    clock = Clock()
    arms = [Arm(Stepping("a", [], clock), "a")]
    with open_meter(tmp_path) as meter:
        found = measure(arms, [ANSWER], Question("?"), StopRule(9), meters={"cpu": meter}, clock=clock)
    energy = [s for s in found.samples if s.kind == "energy"]
    assert len(energy) == 9 and {s.value for s in energy} == {None}
    assert all("too coarse" in s.detail["reason"] for s in energy)
    assert sum(s.detail["joules"] for s in energy) == pytest.approx(4.5)


def test_unreadable_energy_is_null_with_its_reason_once_per_build(tmp_path: Path) -> None:
    with open_meter(tmp_path) as meter:
        _, found = run(StopRule(3), meters={"cpu": meter})
    energy = [s for s in found.samples if s.kind == "energy"]
    assert [(s.build, s.value) for s in energy] == [("a", None), ("b", None), ("c", None)]
    assert all(s.detail["reason"] for s in energy)


def test_progress_is_thin() -> None:
    lines: list[str] = []
    run(StopRule(4), progress=lines.append)
    assert lines[:3] == ["a: warm", "b: warm", "c: warm"] and lines[-1] == "round 4: done after 12.0 s"
