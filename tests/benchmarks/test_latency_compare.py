"""Comparing latencies: what is the same stays indistinguishable, what is a tenth slower is found."""

from __future__ import annotations

import random
import statistics

import pytest

from tinyllava_edge.benchmarks.latency_compare import (
    BLOCKS,
    PAIRED,
    SAME,
    TOO_FEW,
    compare_latency,
    compare_samples,
    drift,
    pair_resolution,
    run_resolution,
)
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.errors import UsageError


def noisy(rng: random.Random, n: int, scale: float, level: float = 100.0) -> list[float]:
    """Latencies on a busy machine: autocorrelated load, and now and then an answer that takes twice as long."""
    load, found = 0.0, []
    for _ in range(n):
        load = 0.8 * load + rng.gauss(0, 0.02)
        spike = rng.expovariate(1.5) if rng.random() < 0.08 else 0.0
        found.append(level * scale * (1 + abs(load) + spike) * rng.lognormvariate(0, 0.02))
    return found


def pairs(rng: random.Random, n: int, slower: float) -> tuple[list[float], list[float]]:
    """Two builds in rounds: the load of a round meets both."""
    load, first, second = 0.0, [], []
    for _ in range(n):
        load = 0.9 * load + rng.gauss(0, 0.1)
        common = 1 + abs(load)
        first.append(100 * common * rng.lognormvariate(0, 0.03))
        second.append(100 * slower * common * rng.lognormvariate(0, 0.03))
    return first, second


def test_the_same_build_twice_is_not_distinguishable() -> None:
    rng = random.Random(1)
    same = [compare_latency(*pairs(rng, 20, 1.0), paired=True).distinguishable for _ in range(20)]
    assert sum(same) <= 1
    same = [compare_latency(noisy(rng, 30, 1.0), noisy(rng, 30, 1.0)).distinguishable for _ in range(20)]
    assert sum(same) <= 1


def test_a_tenth_slower_is_found() -> None:
    rng = random.Random(2)
    found = [compare_latency(*pairs(rng, 20, 1.1), paired=True) for _ in range(12)]
    assert sum(one.distinguishable for one in found) >= 10
    assert all(one.method == PAIRED and one.margin == 0 and one.ratio.low <= one.ratio.estimate for one in found)
    assert all("slower by" in one.verdict for one in found if one.distinguishable)


def apart(rng: random.Random, change: float, drifts: float, n: int = 40) -> list[str]:
    """Verdicts on 20 pairs of runs, each run at a level of its own: what the machine did between them."""
    levels = [(100 * rng.lognormvariate(0, drifts), 100 * rng.lognormvariate(0, drifts)) for _ in range(20)]
    found = [compare_latency(noisy(rng, n, 1.0, a), noisy(rng, n, change, b)) for a, b in levels]
    assert all(one.method == BLOCKS for one in found)
    return [one.verdict for one in found]


def test_two_runs_tell_a_tenth_while_the_machine_drifts_less_than_the_margin() -> None:
    rng = random.Random(4)
    assert sum(verdict != SAME for verdict in apart(rng, 1.0, 0.005)) <= 1
    assert sum(verdict.startswith("slower") for verdict in apart(rng, 1.1, 0.005)) >= 14


def test_two_runs_on_a_machine_that_drifts_by_a_tenth_are_not_to_be_trusted() -> None:
    """What the guide says: nothing in either run shows it, so equal builds are called different. Pairs are not."""
    rng = random.Random(5)
    assert sum(verdict != SAME for verdict in apart(rng, 1.0, 0.1)) >= 5
    paired = [compare_latency(*pairs(rng, 60, 1.0), paired=True).verdict for _ in range(20)]
    assert sum(verdict != SAME for verdict in paired) <= 1


def test_the_resolution_is_found_by_four_of_five() -> None:
    """A change of that size is called in about 80 % of 60 measurements, half of it in far fewer."""
    rng, n = random.Random(20), 20
    told = [pair_resolution(*pairs(rng, n, 1.0)) for _ in range(20)]
    typical = statistics.median(one for one in told if one is not None)
    found = sum(compare_latency(*pairs(rng, n, 1 + typical), paired=True).distinguishable for _ in range(60))
    half = sum(compare_latency(*pairs(rng, n, 1 + typical / 2), paired=True).distinguishable for _ in range(60))
    assert 36 <= found <= 59 and half <= 24
    one = compare_latency(*pairs(rng, n, 1.05), paired=True)
    assert one.resolution and typical / 2 < one.resolution < 2 * typical


def test_the_resolution_between_runs_is_more_than_the_margin() -> None:
    rng = random.Random(7)
    told = run_resolution(noisy(rng, 60, 1.0))
    assert told is not None and 0.03 < told < 0.15
    assert run_resolution([5.0] * 60) == pytest.approx(0.03) and pair_resolution([5.0] * 9, [6.0] * 9) == 0
    assert run_resolution([5.0] * 4) is None and pair_resolution([5.0] * 7, [6.0] * 7) is None


def test_nothing_is_called_the_same_where_nothing_could_be_called_different() -> None:
    """Seven pairs can't reach p < 0.01 however far apart they lie, nor can four samples of each of two runs."""
    for n, paired in ((7, True), (4, False)):
        found = compare_latency([1.0] * n, [2.0] * n, paired=paired)
        assert found.verdict == TOO_FEW and found.resolution is None and found.to_dict()["resolution"] is None
    for n, paired in ((8, True), (5, False)):
        low, high = [1.0 + k / 1000 for k in range(n)], [2.0 + k / 900 for k in range(n)]
        found = compare_latency(low, high, paired=paired)
        assert found.verdict.startswith("slower") and found.resolution is not None


def test_faster_and_its_numbers() -> None:
    a, b = [100.0 + k % 3 for k in range(30)], [90.0 + k % 3 for k in range(30)]
    found = compare_latency(a, b)
    assert found.verdict == "faster by 9.9 %" and found.p_value < 0.01 and found.n == (30, 30)
    assert found.to_dict()["verdict"] == found.verdict and compare_latency(a, b) == found  # seeded
    back = compare_latency(b, a)
    assert back.verdict.startswith("slower") and back.ratio.estimate == pytest.approx(1 / found.ratio.estimate)


def test_a_run_that_drifts_can_only_tell_more_than_its_drift() -> None:
    """The machine became 15 % slower in the middle of the first run: 10 % between runs says nothing."""
    first = [100.0 + k % 2 for k in range(20)] + [115.0 + k % 2 for k in range(20)]
    second = [126.0 + k % 2 for k in range(40)]
    found = compare_latency(first, second)
    assert found.margin == pytest.approx(0.149, abs=0.01) and drift(second) < 0.01
    assert compare_latency([v for v in first if v < 110], second).verdict.startswith("slower by 25")


def test_two_percent_between_runs_is_not_called_but_between_pairs_it_is() -> None:
    a = [100.0 + 0.1 * (k % 5) for k in range(40)]
    b = [value * 1.02 for value in a]
    assert compare_latency(a, b).verdict == "not distinguishable"
    assert compare_latency(a, b, paired=True).verdict == "slower by 2.0 %"


def test_equal_values() -> None:
    assert compare_latency([5.0, 5.0], [5.0, 5.0]).p_value == 1.0
    assert compare_latency([5.0] * 9, [5.0] * 9, paired=True).verdict == "not distinguishable"


@pytest.mark.parametrize("wrong", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_wrong_values_are_refused(wrong: list[float]) -> None:
    with pytest.raises(UsageError):
        compare_latency(wrong, [1.0, 2.0])


def test_unequal_pairs_are_refused() -> None:
    with pytest.raises(UsageError, match="no pairs"):
        compare_latency([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)


def lines(values: list[float], build: str, run: str, unit: str = "ms") -> list[Sample]:
    return [
        Sample("latency", "edge", build, "ttft_ms", v, unit, n, "e", detail={"run": run}) for n, v in enumerate(values)
    ]


def test_lines_of_one_run_are_paired_and_of_two_are_not() -> None:
    a, b = pairs(random.Random(3), 20, 1.1)
    one = compare_samples(lines(a, "a", "r1"), lines(b, "b", "r1")[::-1])  # joined by round, not by place
    assert one == compare_latency(a, b, paired=True)
    assert compare_samples(lines(a, "a", "r1"), lines(b, "a", "r2")).method == BLOCKS
    assert compare_samples(lines(a, "a", ""), lines(b, "a", "")).method == BLOCKS  # files that don't name their run
    assert compare_samples(lines(a, "a", "r1"), lines(b[:-1], "b", "r1")).method == BLOCKS


def test_a_higher_rate_is_faster() -> None:
    a = lines([10.0 + 0.01 * k for k in range(20)], "a", "r", "tokens/s")
    b = lines([12.0 + 0.01 * k for k in range(20)], "b", "r", "tokens/s")
    assert compare_samples(a, b).verdict.startswith("faster")
