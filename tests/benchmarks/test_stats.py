"""Statistics against SciPy and against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tinyllava_edge.benchmarks import stats
from tinyllava_edge.benchmarks.paired import compare_pair
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.errors import DataError, UsageError


def record(name: str, given: str, image: str = "a.png", expected: str = "yes") -> AnswerRecord:
    return AnswerRecord(name, image, "is it?", expected, given)


@pytest.mark.parametrize(("worse", "better"), [(34, 19), (0, 0), (1, 0), (5, 5), (10, 0), (3, 17)])
def test_mcnemar_is_scipys_binomial_test(worse: int, better: int) -> None:
    n = worse + better
    wanted = scipy_stats.binomtest(better, n).pvalue if n else 1.0
    assert stats.mcnemar_exact(worse, better) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_of_34_and_19_is_just_not_significant() -> None:
    # a t-test on the same 600 pairs says p = .039: the test's name decides
    assert stats.mcnemar_exact(34, 19) == pytest.approx(0.0534, abs=5e-5)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(UsageError):
        stats.mcnemar_exact(-1, 2)


@pytest.mark.parametrize(("correct", "n"), [(90, 100), (0, 10), (10, 10), (1, 3), (9673, 9700)])
def test_wilson_is_scipys(correct: int, n: int) -> None:
    wanted = scipy_stats.binomtest(correct, n).proportion_ci(method="wilson")
    got = stats.wilson(correct, n)
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert got.estimate == correct / n


def test_wilson_needs_answers() -> None:
    with pytest.raises(UsageError):
        stats.wilson(0, 0)


def test_order_statistics() -> None:
    values = [5.0, 1.0, 100.0, 3.0, 2.0]
    assert stats.median(values) == 3.0
    assert stats.mad(values) == 2.0
    assert stats.p90(values) == pytest.approx(np.quantile(values, 0.9))
    with pytest.raises(UsageError):
        stats.median([])


def test_median_interval_holds_the_median_and_repeats_itself() -> None:
    values = list(np.random.default_rng(1).lognormal(3, 0.2, 15))
    first, second = stats.median_interval(values), stats.median_interval(values)
    assert first == second
    assert first.low < first.estimate < first.high
    assert min(values) <= first.low and first.high <= max(values)


def test_median_interval_takes_little_memory() -> None:
    """2,000 resamples of 200,000 values would be 6 GB at once; in pieces the draws are the same."""
    import tracemalloc

    values = list(np.random.default_rng(1).normal(10, 1, 20_000))
    tracemalloc.start()
    found = stats.median_interval(values, resamples=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6 and found.low < found.estimate < found.high
    draws = np.random.default_rng(0).integers(0, 20_000, (400, 20_000))
    bounds = np.quantile(np.median(np.asarray(values)[draws], axis=1), (0.025, 0.975))
    assert np.allclose((found.low, found.high), bounds)


def test_median_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = sum(
        (found := stats.median_interval(list(rng.normal(10, 1, 25)), resamples=400)).low <= 10 <= found.high
        for _ in range(200)
    )
    assert 0.88 <= hits / 200 <= 0.99


def test_flips_are_counted_by_id_and_in_both_directions() -> None:
    before = [record("1", "yes"), record("2", "yes"), record("3", "no"), record("4", "no"), record("5", "Yes ")]
    after = [record("5", "yes"), record("4", "maybe"), record("3", "yes"), record("2", "no"), record("1", "yes")]
    found = stats.flips(before, after)
    assert found.correct_to_wrong == ("2",)
    assert found.wrong_to_correct == ("3",)
    assert found.changed == ("2", "3", "4")  # 4 went from wrong to wrong; 5 differs in case and space only
    assert (found.n, found.p_value, found.difference.estimate) == (5, 1.0, 0.0)


def test_flips_refuse_runs_that_are_not_comparable() -> None:
    base = [record("1", "yes"), record("2", "no")]
    with pytest.raises(DataError, match="one run only"):
        stats.flips(base, base[:1])
    with pytest.raises(DataError, match="twice"):
        stats.flips(base, [base[0], base[0]])
    with pytest.raises(DataError, match="differs"):
        stats.flips(base, [base[0], record("2", "no", expected="no")])


def test_difference_is_bootstrapped_over_pictures() -> None:
    """Ten answers that fall together on one picture of ten say less than ten that fall on ten pictures."""
    before = [record(str(k), "yes", image=f"{k // 10}.png") for k in range(100)]
    together = [record(str(k), "no" if k < 10 else "yes", image=f"{k // 10}.png") for k in range(100)]
    spread = [record(str(k), "no" if k % 10 == 0 else "yes", image=f"{k // 10}.png") for k in range(100)]
    one, ten = stats.flips(before, together).difference, stats.flips(before, spread).difference
    assert one.estimate == ten.estimate == pytest.approx(-10)
    assert -15 < ten.low < -10 < ten.high < -5  # all pictures changed alike, which is no proof that the next one will
    assert one.low < -20 and one.high == 0


@pytest.mark.parametrize("pictures", [1, 3, 100])
def test_no_flip_is_no_proof_of_none(pictures: int) -> None:
    """The interval has a width, the narrower the more pictures, and is the one that `paired` gives."""
    answers = [record(str(k), "yes", image=f"{k % pictures}.png") for k in range(100)]
    gap = stats.flips(answers, answers).difference
    assert gap.low < gap.estimate == 0 < gap.high and gap.low == pytest.approx(-gap.high, abs=1)
    if pictures > 1:
        other = compare_pair(answers, answers, names=("a", "b")).difference
        assert other is not None and (gap.low, gap.high) == pytest.approx((other.low, other.high))


@pytest.mark.parametrize("n", [2, 3, 17, 100])
def test_derangement_moves_everything_and_repeats_itself(n: int) -> None:
    for seed in range(20):
        place = stats.derangement(n, seed)
        assert sorted(place) == list(range(n))
        assert all(place[k] != k for k in range(n))
        assert place == stats.derangement(n, seed)
    with pytest.raises(UsageError):
        stats.derangement(1, 0)
