"""Is one build faster than another, or one run than the last? A ratio, its bootstrap interval, a permutation test.

Two builds of one run met the same conditions round by round, so their rounds are pairs. The ratio is the typical one of
a round (mean of the middle 60 % of the logarithms); the bootstrap draws rounds, and the test swaps the two builds round
by round and adds up signed ranks. Two runs at different times share nothing, and inside each the samples hang together
(a machine that is slow now is slow in a moment). Their ratio is that of the medians; the bootstrap draws stretches of
neighbouring samples, and the test permutes the ranks of the stretches' medians. What a machine does between two runs
can't be seen in either of them, so a difference between runs must also exceed a margin: 3 %, or how far apart the two
halves of either run lie, whichever is more.

Where even values that lie wholly apart could not reach the test's level, the verdict is `too few rounds`: 8 pairs, or 5
samples of each of two runs, are needed. `resolution` is the true change that four of five such measurements would call.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava_edge.benchmarks.clusters import POWER, scipy_stats
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.stats import Interval
from tinyllava_edge.errors import UsageError

CONFIDENCE = 0.99  # of intervals and tests: with several builds and stages, one in twenty would be wrong too often
TRIM = 0.2  # share of the lowest and of the highest ratios of a round that the typical one leaves out
MARGIN = 0.03  # between two runs: smaller differences aren't called, because machines drift that much
RESAMPLES = 4000
PERMUTATIONS = 9999
MIN_BLOCKS = 5  # stretches a run must have for its test to reach CONFIDENCE
PAIRED, BLOCKS = "paired by round", "stretches of each run"
SAME, TOO_FEW = "not distinguishable", "too few rounds"  # verdicts besides `slower by …` and `faster by …`

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LatencyComparison:
    """How the second of two sets of latencies differs from the first."""

    ratio: Interval
    """time of the second over time of the first, with its 99 % bootstrap interval"""
    p_value: float
    """two-sided permutation test of ranks"""
    margin: float
    """change below which nothing is called; 0 for pairs"""
    method: str
    """PAIRED or BLOCKS"""
    n: tuple[int, int]
    """samples of the first and the second"""

    @property
    def enough(self) -> bool:
        """Whether the test could reach its level at all with so many samples, had they lain wholly apart."""
        return _least_p(self.method, self.n) < 1 - CONFIDENCE

    @property
    def resolution(self) -> float | None:
        """A true change (0.05 is 5 %) that four of five such measurements would call; None with too few rounds."""
        return _resolution(self.ratio, self.margin) if self.enough else None

    @property
    def distinguishable(self) -> bool:
        """Whether test and interval agree that there is a difference, and it exceeds the margin."""
        outside = self.ratio.low > 1 or self.ratio.high < 1
        return self.p_value < 1 - CONFIDENCE and outside and abs(self.ratio.estimate - 1) > self.margin

    @property
    def verdict(self) -> str:
        """`too few rounds`, `not distinguishable`, `slower by 10.2 %` or `faster by 4.0 %`."""
        if not self.enough:
            return TOO_FEW
        if not self.distinguishable:
            return SAME
        change = 100 * (self.ratio.estimate - 1)
        return f"{'slower' if change > 0 else 'faster'} by {abs(change):.1f} %"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "ratio": self.ratio.estimate,
            "low": self.ratio.low,
            "high": self.ratio.high,
            "p_value": self.p_value,
            "margin": self.margin,
            "resolution": self.resolution,
            "method": self.method,
            "n": list(self.n),
            "verdict": self.verdict,
        }


def compare_latency(
    a: Sequence[float], b: Sequence[float], *, paired: bool = False, seed: int = 0
) -> LatencyComparison:
    """How b differs from a.

    Args:
        a: latencies of the first, in the order in which they were measured; any unit, the same for both.
        b: latencies of the second, likewise.
        paired: a[k] and b[k] were measured in the same round of the same run.
        seed: of the bootstrap and the permutations; the same values and seed give the same result.

    Raises:
        UsageError: fewer than two samples, one that isn't a positive number, or pairs of unequal number.
        DependencyError: scipy isn't installed.
    """
    first, second = _checked(a), _checked(b)
    if paired and len(first) != len(second):
        raise UsageError(f"{len(first)} and {len(second)} samples are no pairs", "compare them as separate runs")
    if paired:
        estimate = float(_typical(np.log(second / first)))
        low, high = _bounds(_paired_ratios(first, second, seed))
        return LatencyComparison(
            Interval(estimate, low, high), _swap_test(first, second, seed), 0.0, PAIRED, (len(first), len(second))
        )
    estimate = float(np.median(second) / np.median(first))
    low, high = _bounds(_block_ratios(first, second, seed))
    margin = max(MARGIN, drift(first), drift(second))
    p_value = _block_test(first, second, seed)
    return LatencyComparison(Interval(estimate, low, high), p_value, margin, BLOCKS, (len(first), len(second)))


def compare_samples(a: Sequence[Sample], b: Sequence[Sample], *, seed: int = 0) -> LatencyComparison:
    """How one build's lines of one stage differ from another's; paired where both are of the same run.

    Args:
        a: latency lines of one build and stage.
        b: likewise; a rate (tokens/s) is turned over, so that more is faster.
        seed: see compare_latency.

    Raises:
        What compare_latency raises.
    """
    first, second = _by_round(a), _by_round(b)
    same = first.keys() == second.keys() and len(first) == len(a) and len(second) == len(b)
    if same and all(run for run, _ in first):
        keys = list(first)
        return compare_latency([first[k] for k in keys], [second[k] for k in keys], paired=True, seed=seed)
    return compare_latency([_latency(s) for s in a], [_latency(s) for s in b], seed=seed)


def pair_resolution(a: Sequence[float], b: Sequence[float], seed: int = 0) -> float | None:
    """`resolution` of pairs, without the test: how small a change would be called after so many rounds.

    Args:
        a: latencies of one build, round by round.
        b: of the other one, in the same rounds.
        seed: of the bootstrap.

    Returns:
        The change, 0.05 for 5 %; None with too few rounds.

    Raises:
        What compare_latency raises, but for DependencyError: scipy isn't needed.
    """
    first, second = _checked(a), _checked(b)
    if len(first) != len(second):
        raise UsageError(f"{len(first)} and {len(second)} samples are no pairs", "compare them as separate runs")
    if _least_p(PAIRED, (len(first), len(second))) >= 1 - CONFIDENCE:
        return None
    return _resolution(Interval(1.0, *_bounds(_paired_ratios(first, second, seed))), 0.0)


def run_resolution(values: Sequence[float], seed: int = 0) -> float | None:
    """`resolution` of a run beside a second one just like it; None with too few rounds. Raises UsageError."""
    data = _checked(values)
    if _least_p(BLOCKS, (len(data), len(data))) >= 1 - CONFIDENCE:
        return None
    rng = np.random.default_rng(seed)
    ratios = _block_medians(data, rng) / _block_medians(data, rng)
    return _resolution(Interval(1.0, *_bounds(np.asarray(ratios))), max(MARGIN, drift(data)))


def drift(values: Sequence[float] | Floats) -> float:
    """How far apart the medians of a run's halves lie, as a share of the smaller one; 0 for fewer than 4 samples."""
    half = len(values) // 2
    if half < 2:
        return 0.0
    early, late = float(np.median(values[:half])), float(np.median(values[half:]))
    return max(early, late) / min(early, late) - 1


def _checked(values: Sequence[float]) -> Floats:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) < 2 or not np.isfinite(data).all() or (data <= 0).any():
        raise UsageError(f"{len(values)} latencies, of which two or more must be there, all above 0", "measure again")
    return data


def _by_round(samples: Sequence[Sample]) -> Mapping[tuple[str, int], float]:
    return {(str(s.detail.get("run", "")), s.sample): _latency(s) for s in samples}


def _latency(sample: Sample) -> float:
    value = sample.value or math.nan
    return 1 / value if sample.unit == "tokens/s" else value


def _bounds(ratios: Floats) -> tuple[float, float]:
    low, high = np.quantile(ratios, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def _resolution(interval: Interval, margin: float) -> float:
    """The change whose estimate lies beyond both the interval's half-width and the margin in POWER of all cases."""
    normal = statistics.NormalDist()
    edge = normal.inv_cdf((1 + CONFIDENCE) / 2)
    error = math.log(interval.high / interval.low) / 2 / edge  # standard error of the ratio's logarithm
    return math.expm1(max(edge * error, math.log1p(margin)) + normal.inv_cdf(POWER) * error)


def _least_p(method: str, n: tuple[int, int]) -> float:
    """The smallest p value that the test can give: both extreme orders of all that it tells apart."""
    if method == PAIRED:
        return 2.0 ** (1 - min(n[0], 1000))
    blocks = [count // _stretch(count) for count in n]
    return 2 / math.comb(sum(blocks), blocks[0])


def _paired_ratios(a: Floats, b: Floats, seed: int) -> Floats:
    draws = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    return np.asarray(_typical(np.log(b / a)[draws]))


def _typical(logs: Floats) -> Floats:
    """(…, n) logarithms of ratios → (…): the ratio of their trimmed mean."""
    n = logs.shape[-1]
    cut = int(TRIM * n)
    return np.asarray(np.exp(np.sort(logs, axis=-1)[..., cut : n - cut].mean(axis=-1)))


def _swap_test(a: Floats, b: Floats, seed: int) -> float:
    """Were the two names swapped at random in each round, how often would the signed ranks add up to as much?"""
    gaps = np.round(np.log(b / a), 12)
    if not gaps.any():
        return 1.0
    ranks = np.sign(gaps) * scipy_stats().rankdata(np.abs(gaps))
    return _permuted((ranks,), lambda values, axis: np.asarray(values.sum(axis=axis)), "samples", seed)


def _stretch(n: int) -> int:
    """Neighbouring samples that are kept together: about n^(1/3), fewer where else the test had too few of them."""
    length: int = min(max(1, round(n ** (1 / 3))), max(1, n // MIN_BLOCKS))
    return length


def _block_medians(values: Floats, rng: np.random.Generator) -> Floats:
    """Medians of bootstrap samples made of stretches, which may begin anywhere and wrap around."""
    n, length = len(values), _stretch(len(values))
    starts = rng.integers(0, n, (RESAMPLES, -(-n // length), 1))
    places = (starts + np.arange(length)) % n
    return np.asarray(np.median(values[places.reshape(RESAMPLES, -1)[:, :n]], axis=1))


def _block_ratios(a: Floats, b: Floats, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    return np.asarray(_block_medians(b, rng) / _block_medians(a, rng))


def _block_test(a: Floats, b: Floats, seed: int) -> float:
    """Were the stretches of both runs shuffled, how often would the ranks of their medians lie as far apart?"""
    cut = [np.array_split(values, len(values) // _stretch(len(values))) for values in (a, b)]
    medians = [np.array([np.median(stretch) for stretch in stretches]) for stretches in cut]
    ranks = scipy_stats().rankdata(np.concatenate(medians))
    if np.ptp(ranks) == 0:
        return 1.0

    def apart(first: Floats, second: Floats, axis: int) -> Floats:
        return np.asarray(second.mean(axis=axis) - first.mean(axis=axis))

    return _permuted((ranks[: len(medians[0])], ranks[len(medians[0]) :]), apart, "independent", seed)


def _permuted(data: tuple[Floats, ...], statistic: Callable[..., Floats], kind: str, seed: int) -> float:
    found = scipy_stats().permutation_test(
        data,
        statistic,
        permutation_type=kind,
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(seed),
    )
    return float(min(1.0, found.pvalue))
