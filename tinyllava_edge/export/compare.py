"""Running comparisons of a build with its reference, one object per stage, each ending in a Check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava_edge.export.tolerances import Tolerance

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Check:
    """One stage of one build, over all samples."""

    stage: str
    """pixels, image_features, image_embeds, prompt_ids, first_logits or answer"""
    input: str
    """`reference`: the stage alone; `own`: everything up to it; `spec`: what both say of themselves; `template`: what
    other hosts make of the GGUF's own chat template"""
    passed: bool
    """within the tolerance; true where there is none"""
    gated: bool
    """whether the build's verdict depends on it; the others only explain"""
    max_abs: float | None = None
    """largest absolute difference; pixels in grey levels; none where shapes differ or a value is not finite"""
    mean_abs: float | None = None
    """mean absolute difference"""
    relative: float | None = None
    """relative error of the worst sample"""
    cosine: float | None = None
    """lowest cosine of any row"""
    share: float | None = None
    """share that agrees, see Tolerance.share"""
    equal: float | None = None
    """share of samples that are exactly equal, ties not counted"""
    tolerance: Tolerance = Tolerance()
    """the limits"""
    worst: str = ""
    """sample with the largest difference"""

    def line(self) -> str:
        """The check on one line."""
        names = {"max_abs": "max", "relative": "relative", "cosine": "cosine", "share": "agree", "equal": "equal"}
        numbers = [f"{name} {value:.6g}" for key, name in names.items() if (value := getattr(self, key)) is not None]
        mark = "ok  " if self.passed else "FAIL"
        told = mark if self.gated else "    "
        given = {"reference": "alone", "own": "in line"}.get(self.input, self.input)
        return f"{told} {self.stage:<14} {given:<8}  {'  '.join(numbers)}" + (
            "" if self.passed else f"  (worst: {self.worst})"
        )


class Difference:
    """Running differences between arrays (rows, width) and their references."""

    def __init__(self, limit: Tolerance | None = None) -> None:
        self._limit = limit or Tolerance()
        self.max_abs = self.relative = self._sum = 0.0
        self.cosine = 1.0
        self.worst = ""
        self._values = self._samples = self._agree = 0
        self._logits = False

    def add(self, name: str, ours: Floats, theirs: Floats) -> None:
        """Compare one sample; a wrong shape counts as an infinite difference."""
        wrong = _incomparable(ours, theirs)
        if wrong:
            self.failed(name, wrong)
            return
        self._samples += 1
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        difference = np.abs(a - b)
        relative = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        if relative >= self.relative and np.isfinite(self.relative):
            self.worst = name
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.relative = max(self.relative, relative)
        self.cosine = min(self.cosine, float(np.min((a * b).sum(-1) / np.maximum(norms, 1e-12))))
        self._sum += float(difference.sum())
        self._values += difference.size

    def failed(self, name: str, why: str) -> None:
        """Count a sample that gave nothing as an infinite difference."""
        self._samples += 1
        self.max_abs = self.relative = self._sum = np.inf
        self.cosine, self.worst = -1.0, f"{name}: {why}"

    def add_logits(self, name: str, ours: Floats, theirs: Floats) -> None:
        """Compare logits (vocab,), and whether both prefer the same token, or two that the reference holds tied: closer
        than twice the error that the limit allows one logit."""
        self._logits = True
        if ours.shape == theirs.shape:
            a, b = ours - ours.mean(), theirs - theirs.mean()
            self.add(name, a[None], b[None])
            mine, other = int(a.argmax()), int(b.argmax())
            size = float(np.sqrt(np.mean(b.astype(np.float64) ** 2)))
            tie = 2 * (self._limit.max_abs or (self._limit.relative or 0.0) * size)
            self._agree += float(b[other] - b[mine]) <= tie
        else:
            self.add(name, ours, theirs)

    def check(self, stage: str, given: str, limit: Tolerance | None) -> Check:
        """The verdict; without a limit the numbers only explain."""
        share = self._agree / self._samples if self._logits and self._samples else None
        found: dict[str, Any] = {
            "max_abs": self.max_abs,
            "mean_abs": self._sum / max(1, self._values),
            "relative": self.relative,
            "cosine": self.cosine,
            "share": share,
        }
        if not self._samples:
            found = dict.fromkeys(found)
        return judge(stage, given, limit, found, self.worst, ran=self._samples > 0)


class Pixels:
    """Pixel differences in grey levels: normalised values times 255 and the channel's standard deviation."""

    def __init__(self, std: Sequence[float]) -> None:
        self._scale = 255 * np.asarray(std, dtype=np.float64)[:, None, None]
        self._max = self._sum = 0.0
        self._values = self._within = self._samples = self._equal = 0
        self._worst = ""

    def add(self, name: str, ours: Floats, theirs: Floats) -> None:
        """Compare (3, S, S); a wrong shape counts as an infinite difference."""
        self._samples += 1
        wrong = _incomparable(ours, theirs)
        if wrong:
            self._max, self._worst = np.inf, f"{name}: {wrong}"
            self._values += theirs.size
            return
        levels = np.abs(ours.astype(np.float64) - theirs) * self._scale
        if levels.max() >= self._max:
            self._max, self._worst = float(levels.max()), name
        self._sum += float(levels.sum())
        self._values += levels.size
        self._within += int((levels <= 1.01).sum())  # one level and float32's rounding
        self._equal += bool(levels.max() < 0.01)

    def check(self, stage: str, given: str, limit: Tolerance) -> Check:
        """The verdict."""
        values, samples = max(1, self._values), max(1, self._samples)
        found = {"max_abs": self._max, "mean_abs": self._sum / values, "share": self._within / values}
        ran = self._samples > 0
        return judge(stage, given, limit, {**found, "equal": self._equal / samples}, self._worst, ran)


class Equal:
    """Counts of samples that are equal, or tied."""

    def __init__(self) -> None:
        self._samples = self._same = self._tied = 0
        self._worst = ""

    @property
    def samples(self) -> int:
        """Samples so far."""
        return self._samples

    @property
    def all(self) -> bool:
        """Whether every sample so far was equal."""
        return self._same == self._samples

    def add(self, name: str, equal: bool, tie: bool = False) -> None:
        """Count one sample."""
        self._samples += 1
        self._same += equal
        self._tied += tie and not equal
        if not equal and not tie:
            self._worst = self._worst or name

    def check(self, stage: str, given: str, limit: Tolerance) -> Check:
        """The verdict."""
        samples = max(1, self._samples)
        found = {"share": (self._same + self._tied) / samples, "equal": self._same / samples}
        return judge(stage, given, limit, found, self._worst, ran=self._samples > 0)


def judge(
    stage: str, given: str, limit: Tolerance | None, found: Mapping[str, Any], worst: str, ran: bool = True
) -> Check:
    """Compare the numbers with their limits. A gated stage that could not run did not pass."""
    worst = worst if ran else "it did not run"
    shown: dict[str, Any] = {k: v if v is not None and math.isfinite(v) else None for k, v in found.items()}
    if limit is None:
        return Check(stage, given, True, False, worst=worst, **shown)
    upper = all(
        bound is None or (value is not None and value <= bound)
        for bound, value in ((limit.max_abs, found.get("max_abs")), (limit.relative, found.get("relative")))
    )
    lower = all(
        bound is None or (value is not None and value >= bound)
        for bound, value in ((limit.cosine, found.get("cosine")), (limit.share, found.get("share")))
    )
    return Check(stage, given, ran and upper and lower, True, tolerance=limit, worst=worst, **shown)


def _incomparable(ours: Floats, theirs: Floats) -> str:
    """Why two arrays can't be subtracted; empty when they can."""
    if ours.shape != theirs.shape:
        return f"shape {ours.shape}, {theirs.shape} expected"
    return "" if np.isfinite(ours).all() else "not finite"
