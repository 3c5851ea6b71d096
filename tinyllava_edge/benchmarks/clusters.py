"""Differences between two runs when questions on one picture hang together: error, bootstrap, sign flips, power.

A cluster is what was drawn as one thing, a picture with all its questions. All functions take the clusters' sums of
paired differences (build minus reference, one question counts -1..1) and their sizes in questions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava_edge.errors import DependencyError, UsageError

RESAMPLES = 2000
PERMUTATIONS = 9999
POWER = 0.8  # chance of finding a difference that is there, for which sample sizes are given
_CELLS = 1 << 20  # cluster draws held at once

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Clusters:
    """Paired differences, summed by cluster."""

    sums: Floats
    """sum of the differences of each cluster"""
    sizes: Floats
    """questions of each cluster"""

    @property
    def n(self) -> int:
        """Questions."""
        return int(self.sizes.sum())

    @property
    def mean(self) -> float:
        """Mean difference of a question."""
        return float(self.sums.sum() / self.sizes.sum())


def cluster(differences: Sequence[float], keys: Sequence[Hashable]) -> Clusters:
    """Sum the differences by key. Raises UsageError when there are none or the lengths differ."""
    if not differences or len(differences) != len(keys):
        raise UsageError(f"{len(differences)} differences of {len(keys)} questions", "pass one per question")
    place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    index = np.array([place[key] for key in keys])
    sums = np.bincount(index, np.asarray(differences, dtype=np.float64), len(place))
    sizes = np.bincount(index, minlength=len(place))
    return Clusters(np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64))


def smoothed(clusters: Clusters) -> Clusters:
    """One lost and one gained question more, as Bonett and Price (2012) do for paired proportions.

    Without them a run in which nothing happened to change would look free of any uncertainty, three questions included.
    """
    return Clusters(np.append(clusters.sums, [-1.0, 1.0]), np.append(clusters.sizes, [1.0, 1.0]))


def standard_error(clusters: Clusters) -> float | None:
    """Standard error of the mean difference, clustered (Miller 2024, arXiv 2411.00640, equation 4); None for one."""
    if len(clusters.sums) < 2:
        return None
    apart = clusters.sums - clusters.sizes * clusters.mean
    return float(math.sqrt(float(apart @ apart)) / clusters.n)


def resampled(clusters: Clusters, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Mean differences of bootstrap samples: whole clusters are drawn. Needs two clusters; the seed fixes the draw."""
    if len(clusters.sums) < 2:
        raise UsageError("one cluster can't be resampled", "evaluate on at least two pictures")

    def mean(sums: Floats, sizes: Floats, axis: int) -> Floats:
        return np.asarray(sums.sum(axis=axis) / sizes.sum(axis=axis))

    found = scipy_stats().bootstrap(
        (clusters.sums, clusters.sizes),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CELLS // len(clusters.sums)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return np.asarray(found.bootstrap_distribution, dtype=np.float64)


def sign_flip(clusters: Clusters, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Two-sided p of the sign-flip test: were the two runs' answers swapped picture by picture, how often as far apart?

    Exact where few clusters differ, else over `permutations` random swaps; never 0. With one 0/1 question per cluster
    it is McNemar's exact test.
    """
    moved = clusters.sums[np.abs(clusters.sums) > 1e-9]  # the others stay where they are
    if len(moved) < 2:
        return 1.0

    def total(sums: Floats, axis: int) -> Floats:
        return np.asarray(np.round(sums.sum(axis=axis), 9))  # scores such as .3 and .6 must tie exactly

    found = scipy_stats().permutation_test(
        (moved,),
        total,
        permutation_type="samples",
        vectorized=True,
        n_resamples=permutations,
        batch=max(1, _CELLS // len(moved)),
        rng=np.random.default_rng(seed),
    )
    return float(min(1.0, found.pvalue))


def detectable(error: float, confidence: float) -> float:
    """Smallest difference that the two-sided test finds with 80 % chance, in the unit of `error`."""
    return _factor((1 + confidence) / 2) * error


def needed(n: int, error: float, difference: float, confidence: float, *, one_sided: bool = False) -> int | None:
    """Questions at which `difference` would be found with 80 % chance; None for a difference of 0.

    n ((z + z_0.8) error / difference)^2: the standard error at n falls with the root of the sample.
    """
    if not difference:
        return None
    value = n * (_factor(confidence if one_sided else (1 + confidence) / 2) * error / difference) ** 2
    return math.ceil(value) if value < 1e12 else None


def scipy_stats() -> Any:
    """scipy.stats. Raises DependencyError."""
    try:
        from scipy import stats
    except ImportError as error:
        raise DependencyError("scipy is not installed", "pip install 'tinyllava-edge[compare]'") from error
    return stats


def _factor(share: float) -> float:
    normal = statistics.NormalDist()
    return normal.inv_cdf(share) + normal.inv_cdf(POWER)
