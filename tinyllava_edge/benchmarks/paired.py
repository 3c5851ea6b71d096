"""One build against the reference on one task: the difference, what carries it, and whether chance explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyllava_edge.benchmarks import clusters
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.stats import Interval, align, mcnemar_exact
from tinyllava_edge.errors import DataError, UsageError

MCNEMAR = "exact McNemar"
SIGN_FLIP = "sign-flip permutation over pictures"
NOISE_MARGIN = 1e-3  # top-2 logit margin below which a flip is numeric noise
WORSE, WITHIN, NOT_SHOWN = "worse than allowed", "within", "not shown"
FEW = 30  # pictures below which the bootstrap's lower bound is too high: at 20, 8 % instead of 5 pass at the limit


@dataclass(frozen=True)
class Flip:
    """One answer whose score changed."""

    id: str
    """question"""
    image: str
    """picture's name in the data set"""
    before: str
    """the reference's answer"""
    after: str
    """the build's answer"""
    change: float
    """score of the build minus the reference's, -1..1"""
    margin: float | None
    """logits between the reference's best two tokens where the answers part; None where not recorded"""


@dataclass(frozen=True)
class Noise:
    """What changes when nothing but the machine's set-up does, e.g. the number of threads."""

    of: str
    """the run that was repeated"""
    n: int
    """questions"""
    changed: int
    """answers that differ, after strip and lower"""
    worse: int
    """scores that fell"""
    better: int
    """scores that rose"""


@dataclass(frozen=True)
class Gate:
    """Whether a build stays within an allowed drop, by one-sided bounds that are bootstrapped over pictures."""

    allowed: float
    """drop that is accepted, in points"""
    low: float | None
    """lower bound of the difference, in points; None when there are too few pictures for one"""
    high: float | None
    """upper bound of the difference, in points"""
    verdict: str
    """WORSE: the upper bound lies below the allowed drop; WITHIN: the lower one does not, over FEW pictures or more;
    NOT_SHOWN: neither"""
    needed: int | None
    """NOT_SHOWN: questions at which this difference would be decided with 80 % chance; None when none would do"""


@dataclass(frozen=True)
class Paired:
    """A build's answers beside the reference's on the same questions. Scores and differences are in points, 0..100."""

    task: str
    """benchmark; empty for a LLaVA JSON file"""
    protocol: str
    """id of everything that moves the score"""
    reference: str
    """the reference run"""
    build: str
    """the run that is compared with it"""
    n: int
    """questions"""
    scored: int
    """questions with a score in both runs"""
    pictures: int
    """different pictures"""
    groups: int
    """scored questions that count as one draw each: those of a picture, else of a unit"""
    reference_score: float | None
    """mean score; None without labels"""
    build_score: float | None
    """mean score; None without labels"""
    difference: Interval | None
    """build minus reference with its two-sided interval, bootstrapped over groups, over `clusters.smoothed` ones where
    all change alike; None for fewer than two groups"""
    standard_error: float | None
    """of the difference, clustered by group"""
    test: str
    """MCNEMAR for 0/1 scores, else SIGN_FLIP; empty without labels"""
    p_value: float | None
    """of that test"""
    p_pictures: float | None
    """of SIGN_FLIP, whatever the scores: McNemar takes questions on one picture for independent"""
    p_holm: float | None
    """adjusted for all builds and tasks of the comparison"""
    flips: tuple[Flip, ...]
    """answers whose score changed"""
    changed: int
    """answers that differ after strip and lower"""
    identical: int
    """answers that are equal to the character"""
    detectable: float | None
    """smallest difference that n questions like these show with 80 % chance"""
    needed: int | None
    """questions at which the observed difference would be found with 80 % chance; None for no difference"""
    noise: Noise | None
    """the noise floor, where a repetition was given"""
    gate: Gate | None
    """the allowed drop, where one was given"""
    verdict: str = ""
    """in words, after Holm's adjustment"""

    @property
    def worse(self) -> int:
        """Scores that fell."""
        return sum(flip.change < 0 for flip in self.flips)

    @property
    def better(self) -> int:
        """Scores that rose."""
        return sum(flip.change > 0 for flip in self.flips)

    @property
    def margins(self) -> tuple[int, int]:
        """Flips whose margin is known, and those of them below NOISE_MARGIN."""
        known = [flip.margin for flip in self.flips if flip.margin is not None]
        return len(known), sum(margin < NOISE_MARGIN for margin in known)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the counts included."""
        known, noisy = self.margins
        counts = {"worse": self.worse, "better": self.better, "margins_known": known, "margins_below_1e-3": noisy}
        return {**asdict(self), **counts}


def compare_pair(
    reference: Sequence[AnswerRecord],
    build: Sequence[AnswerRecord],
    *,
    names: tuple[str, str],
    where: str = "",
    confidence: float = 0.95,
    max_drop: float | None = None,
    noise: Noise | None = None,
    seed: int = 0,
) -> Paired:
    """Compare two runs of one task; `p_holm` and `verdict` are filled in by `compare`.

    Args:
        reference: answers of the reference.
        build: answers of the build, joined by id.
        names: what the two are called.
        where: how errors name the build's run; its name by default.
        confidence: of intervals and bounds.
        max_drop: points that the build may lose.
        noise: the noise floor.
        seed: of the bootstrap and the permutations.

    Raises:
        DataError: the runs are empty, differ in their questions, or a question has a score in one of them only.
        DependencyError: scipy or statsmodels is not installed.
    """
    where = where or names[1]
    pairs = align(reference, build, where)
    if not pairs:
        raise DataError(f"{where}: no answers to compare", "evaluate first")
    if (odd := next((old.id for old, new in pairs if (old.value is None) != (new.value is None)), None)) is not None:
        raise DataError(f"{where}: question {odd} has a score in one run only", "judge both runs")
    for record in [record for pair in pairs for record in pair]:
        if not 0 <= (record.score or 0.0) <= 1:
            raise DataError(f"{where}: question {record.id} has score {record.score}", "scores lie between 0 and 1")
    changes = [
        (old, new, new.value - old.value) for old, new in pairs if old.value is not None and new.value is not None
    ]
    common: dict[str, Any] = {
        "task": pairs[0][0].task,
        "protocol": pairs[0][0].protocol,
        "reference": names[0],
        "build": names[1],
        "n": len(pairs),
        "pictures": len({old.image for old, _ in pairs} - {""}),
        "changed": sum(_differ(old, new) for old, new in pairs),
        "identical": sum(old.given == new.given for old, new in pairs),
        "noise": noise,
    }
    return Paired(**common, **_scores(changes, confidence, max_drop, seed))


def noise_floor(run: Sequence[AnswerRecord], again: Sequence[AnswerRecord], of: str) -> Noise:
    """Differences between a run and its repetition. Raises DataError when they answer different questions."""
    pairs = align(run, again, f"the repetition of {of}")
    changes = [new.value - old.value for old, new in pairs if old.value is not None and new.value is not None]
    worse, better = sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    return Noise(of, len(pairs), sum(_differ(old, new) for old, new in pairs), worse, better)


def first_margin(reference: AnswerRecord, build: AnswerRecord) -> float | None:
    """Margin of the reference at the first token that differs; None when the tokens agree or were not recorded."""
    before, after = reference.token_ids, build.token_ids
    if not reference.margins or before == after:
        return None
    place = next((k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    step = min(len(before), len(after)) if place is None else place  # one answer begins with the other: its end token
    return reference.margins[step] if step < len(reference.margins) else None


def gate(groups: clusters.Clusters, allowed: float, confidence: float, seed: int = 0) -> Gate:
    """Judge a drop of `allowed` points. The bounds are those of `clusters.smoothed`. Raises UsageError below 0."""
    if not 0 <= allowed <= 100:
        raise UsageError(f"a drop of {allowed} points", "allow 0 to 100 points")
    if len(groups.sums) < 2:
        return Gate(allowed, None, None, NOT_SHOWN, None)
    wider = clusters.smoothed(groups)
    low, high = (
        100 * float(x) for x in np.quantile(clusters.resampled(wider, seed=seed), (1 - confidence, confidence))
    )
    if high < -allowed:
        return Gate(allowed, low, high, WORSE, None)
    if low >= -allowed and len(groups.sums) >= FEW:
        return Gate(allowed, low, high, WITHIN, None)
    distance = 100 * groups.mean + allowed
    error = 100 * (clusters.standard_error(wider) or 0.0)
    return Gate(allowed, low, high, NOT_SHOWN, clusters.needed(groups.n, error, distance, confidence, one_sided=True))


def _scores(
    changes: Sequence[tuple[AnswerRecord, AnswerRecord, float]], confidence: float, max_drop: float | None, seed: int
) -> dict[str, Any]:
    """The fields of Paired that need labels."""
    names = (
        "reference_score",
        "build_score",
        "difference",
        "standard_error",
        "p_value",
        "p_pictures",
        "detectable",
        "needed",
        "gate",
    )
    found: dict[str, Any] = dict.fromkeys(names) | {"scored": len(changes), "groups": 0, "test": "", "p_holm": None}
    flips = tuple(
        Flip(old.id, old.image, old.given, new.given, change, first_margin(old, new))
        for old, new, change in changes
        if abs(change) > 1e-9
    )
    found["flips"] = flips
    if not changes:
        return found | {"gate": None if max_drop is None else Gate(max_drop, None, None, NOT_SHOWN, None)}
    values = np.array([(old.value, new.value) for old, new, _ in changes], dtype=np.float64)
    groups = clusters.cluster([change for _, _, change in changes], [_group(old) for old, _, _ in changes])
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    fallen = sum(flip.change < 0 for flip in flips)
    found["groups"] = len(groups.sums)
    found["reference_score"], found["build_score"] = (100 * float(x) for x in values.mean(axis=0))
    found["test"] = MCNEMAR if binary else SIGN_FLIP
    found["p_pictures"] = clusters.sign_flip(groups, seed=seed)
    found["p_value"] = mcnemar_exact(fallen, len(flips) - fallen) if binary else found["p_pictures"]
    if max_drop is not None:
        found["gate"] = gate(groups, max_drop, confidence, seed)
    if (error := clusters.standard_error(groups)) is None:
        return found
    spreading = groups if error else clusters.smoothed(groups)  # no change at all is no proof of none
    bounds = np.quantile(clusters.resampled(spreading, seed=seed), ((1 - confidence) / 2, (1 + confidence) / 2))
    found["difference"] = Interval(100 * groups.mean, *(100 * float(bound) for bound in bounds))
    found["standard_error"] = 100 * error
    spread = clusters.standard_error(spreading) or 0.0
    found["detectable"] = 100 * clusters.detectable(spread, confidence)
    found["needed"] = clusters.needed(groups.n, spread, groups.mean, confidence)
    return found


def _differ(old: AnswerRecord, new: AnswerRecord) -> bool:
    return old.given.strip().lower() != new.given.strip().lower()


def _group(record: AnswerRecord) -> tuple[str, str]:
    kind = "image" if record.image else "unit" if record.unit else "id"
    return kind, str(getattr(record, kind))
