"""Numbers that can be defended: medians with bootstrap intervals, Wilson intervals, exact McNemar, answer flips.

Means and t-tests are avoided on purpose: latencies are skewed and answers are paired 0/1 scores. What needs scipy or
statsmodels imports them on the call; medians and Wilson intervals need neither, because `eval` runs on devices.
"""

from __future__ import annotations

import math
import operator
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyllava_edge.benchmarks import clusters
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.errors import DataError, DependencyError, UsageError

LEVEL = 0.95  # every interval of this module
_DRAWN = 1 << 22  # values that a bootstrap holds at once
_SAME = "evaluate both on the same questions under the same protocol"
_ASKED = ("task", "protocol", "question", "expected", "image", "unit", "prompt_sha256", "image_sha256")
_asked = operator.attrgetter(*_ASKED)
Z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds."""

    estimate: float
    """point estimate"""
    low: float
    """lower bound"""
    high: float
    """upper bound"""


@dataclass(frozen=True)
class Flips:
    """How a build's answers differ from the reference's on the same questions."""

    n: int
    """questions compared"""
    changed: tuple[str, ...]
    """ids whose answer changed, right or wrong (after strip and lower)"""
    correct_to_wrong: tuple[str, ...]
    """ids that were right and became wrong"""
    wrong_to_correct: tuple[str, ...]
    """ids that were wrong and became right"""
    p_value: float
    """exact two-sided McNemar test on the two lists above"""
    difference: Interval
    """accuracy of the build minus the reference's, in points, bootstrapped over pictures, as in `paired.Paired`"""


def median(values: Sequence[float]) -> float:
    """Middle value. Raises UsageError on an empty list."""
    _need(values)
    return float(statistics.median(values))


def percentile(values: Sequence[float], share: float) -> float:
    """Value below which `share` (0..1) of the samples lie, with linear interpolation."""
    _need(values)
    return float(np.quantile(np.asarray(values, dtype=np.float64), share))


def p90(values: Sequence[float]) -> float:
    """90th percentile. With fewer than 20 samples it is close to the maximum and should be read so."""
    return percentile(values, 0.9)


def mad(values: Sequence[float]) -> float:
    """Median absolute deviation from the median, not scaled to a standard deviation."""
    middle = median(values)
    return median([abs(value - middle) for value in values])


def median_interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Median with a percentile-bootstrap interval; the same values and seed give the same bounds."""
    _need(values)
    data = np.asarray(values, dtype=np.float64)
    chance, rows = np.random.default_rng(seed), max(1, _DRAWN // len(data))  # a few at a time: n may be large
    medians = [
        np.median(data[chance.integers(0, len(data), (min(rows, resamples - done), len(data)))], axis=1)
        for done in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(medians), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(median(values), float(low), float(high))


def wilson(correct: int, n: int) -> Interval:
    """Share of correct answers with Wilson's score interval (Wilson 1927), all in 0..1."""
    if n < 1 or not 0 <= correct <= n:
        raise UsageError(f"{correct} correct of {n}", "pass at least one answer")
    share, z2 = correct / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def mcnemar_exact(worse: int, better: int) -> float:
    """Two-sided exact McNemar test: are `worse` and `better` flips two sides of a fair coin? (McNemar 1947)

    1.0 when there are no flips. Example: 34 worse and 19 better give 0.053. Raises UsageError for negative counts and
    DependencyError without statsmodels.
    """
    if worse < 0 or better < 0:
        raise UsageError(f"{worse} and {better} flips", "counts can't be negative")
    try:
        from statsmodels.stats.contingency_tables import mcnemar
    except ImportError as error:
        raise DependencyError("statsmodels is not installed", "pip install 'tinyllava-edge[compare]'") from error
    return float(mcnemar([[0, worse], [better, 0]], exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p values that belong to one set of questions (Holm 1979), in their order.

    Raises DependencyError without statsmodels.
    """
    if not p_values:
        return []
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError as error:
        raise DependencyError("statsmodels is not installed", "pip install 'tinyllava-edge[compare]'") from error
    return [float(value) for value in multipletests(list(p_values), method="holm")[1]]


def flips(reference: Sequence[AnswerRecord], build: Sequence[AnswerRecord]) -> Flips:
    """Compare two runs over the same questions, joined by id and never by order.

    Raises:
        DataError: an id occurs twice, the id sets differ, or a question, its annotation or its protocol differs.
    """
    pairs = align(reference, build)
    worse = tuple(old.id for old, new in pairs if old.correct and not new.correct)
    better = tuple(old.id for old, new in pairs if new.correct and not old.correct)
    changed = tuple(old.id for old, new in pairs if old.given.strip().lower() != new.given.strip().lower())
    return Flips(len(pairs), changed, worse, better, mcnemar_exact(len(worse), len(better)), _difference(pairs))


def align(
    reference: Sequence[AnswerRecord], build: Sequence[AnswerRecord], where: str = "the build"
) -> list[tuple[AnswerRecord, AnswerRecord]]:
    """Join two runs by id, in the reference's order. `where` names the second run in errors.

    Raises:
        DataError: an id occurs twice, the id sets differ, or a question, its annotation, picture or protocol differs.
    """
    before, after = _by_id(reference, "the reference"), _by_id(build, where)
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))
        raise DataError(
            f"{where}: {len(odd)} questions were answered in one run only, e.g. {odd[0]}",
            "evaluate both on the same set",
        )
    pairs = [(before[name], after[name]) for name in before]
    for old, new in pairs:
        if _asked(old) == _asked(new):
            continue
        for key in _ASKED:
            mine, theirs = getattr(old, key), getattr(new, key)
            known = not key.endswith("sha256") or (mine and theirs)  # a hash is empty where a run did not record it
            if known and mine != theirs:
                raise DataError(f"{where}: {key} of question {old.id} differs from the reference's", _SAME)
    return pairs


def _difference(pairs: Sequence[tuple[AnswerRecord, AnswerRecord]]) -> Interval:
    """Paired difference in points; whole pictures are drawn, because questions on one picture hang together.

    Where all pictures change alike, or there is but one, `clusters.smoothed` ones are drawn, as in `paired`: no change
    at all is no proof of none.
    """
    if not pairs:
        return Interval(0.0, 0.0, 0.0)
    gains = [float(int(new.correct) - int(old.correct)) for old, new in pairs]
    groups = clusters.cluster(gains, [old.image for old, _ in pairs])
    spreading = groups if clusters.standard_error(groups) else clusters.smoothed(groups)
    low, high = np.quantile(clusters.resampled(spreading), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(100 * groups.mean, 100 * float(low), 100 * float(high))


def derangement(n: int, seed: int) -> list[int]:
    """A permutation of 0..n-1 in one cycle, so that nothing stays in its place. Raises UsageError when n < 2."""
    if n < 2:
        raise UsageError(f"{n} pictures can't be shuffled", "evaluate on at least two pictures")
    order = list(range(n))
    random.Random(seed).shuffle(order)
    place = [0] * n
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        place[here] = there
    return place


def _by_id(records: Sequence[AnswerRecord], where: str) -> dict[str, AnswerRecord]:
    table = {record.id: record for record in records}
    if len(table) != len(records):
        twice = next(name for name, count in Counter(record.id for record in records).items() if count > 1)
        raise DataError(f"{where}: question {twice} is answered twice", "join each run's answers once")
    return table


def _need(values: Sequence[float]) -> None:
    if not len(values):
        raise UsageError("no samples", "measure at least once")
