"""results.jsonl of a grid → scores per cell, each cell beside the baseline, and each axis over everything else.

Scores are means over seeds. Tests and intervals are over pictures (`benchmarks.paired`), so they say whether a
difference would hold on other pictures; whether it would hold for another training, the seeds' own differences show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..benchmarks import clusters
from ..benchmarks.paired import Paired, compare_pair
from ..benchmarks.results import AnswerRecord, Sample
from ..benchmarks.scoring import JSON_TASK
from ..benchmarks.stats import LEVEL, Interval, holm
from ..errors import DataError
from .grid import AXES
from .work import CELL, FAILED, GRID

ALPHA = 0.05
BETTER, WORSE, NOT_SHOWN, SCATTER = "better", "worse", "not shown", "within the seeds' scatter"


@dataclass(frozen=True)
class CellScore:
    """What was measured of one cell."""

    name: str
    """axes' names joined by dots"""
    axes: Mapping[str, str]
    """axis → entry"""
    parameters: int
    """of the whole model"""
    seconds: float
    """of training, all stages, mean over seeds"""
    scores: Mapping[str, Mapping[int, float]]
    """task → seed → the benchmark's published figure"""
    records: Mapping[str, Mapping[int, tuple[AnswerRecord, ...]]]
    """task → seed → answers"""

    def score(self, task: str) -> float:
        """Mean over seeds."""
        found = self.scores[task].values()
        return sum(found) / len(found)

    def interval(self, task: str) -> Interval | None:
        """The score with a 95 % interval bootstrapped over pictures; None where it is no mean over questions."""
        merged = merge(self.records[task])
        if any(record.value is None for record in merged):
            return None
        values = [100 * float(record.value or 0.0) for record in merged]
        if abs(sum(values) / len(values) - self.score(task)) > 1e-6:
            return None
        groups = clusters.cluster(values, [record.image or record.id for record in merged])
        if len(groups.sums) < 2:
            return None
        low, high = np.quantile(clusters.resampled(groups), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return Interval(self.score(task), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """One thing beside another on one task, in points of the answers' mean score."""

    axis: str
    """axis that is compared; empty for whole cells"""
    before: str
    """the baseline cell, or the axis's baseline entry"""
    after: str
    """the other one"""
    task: str
    """benchmark"""
    pairs: int
    """cells on each side"""
    paired: Paired
    """on the same questions, scores averaged over cells and seeds"""
    by_seed: tuple[float, ...]
    """difference of each seed both sides have"""
    p_holm: float | None
    """adjusted for all differences of its kind"""

    @property
    def verdict(self) -> str:
        """In words; a difference that changes its sign from seed to seed is not called one."""
        if self.p_holm is None or self.p_holm >= ALPHA or self.paired.difference is None:
            return NOT_SHOWN
        gain = self.paired.difference.estimate
        if any(value * gain <= 0 for value in self.by_seed):
            return SCATTER
        return BETTER if gain > 0 else WORSE


@dataclass(frozen=True)
class Ablation:
    """Everything that tables and figures show."""

    facts: Mapping[str, Any]
    """the `grid` line: command, axes, scale, questions"""
    levels: Mapping[str, tuple[str, ...]]
    """axis → entries that finished cells have, in the grid's order"""
    tasks: tuple[str, ...]
    """in the order asked"""
    units: Mapping[str, str]
    """task → unit of its score"""
    seeds: tuple[int, ...]
    """of the finished cells"""
    cells: tuple[CellScore, ...]
    """finished ones, in the grid's order"""
    baseline: str
    """cell compared with"""
    versus: tuple[Difference, ...]
    """each cell against the baseline"""
    effects: tuple[Difference, ...]
    """each entry of an axis against the baseline's, over all cells that have both"""
    failed: Mapping[str, str]
    """run → why"""
    machine: Mapping[str, Any]
    """a line of the environment"""


def summarise(samples: Sequence[Sample]) -> Ablation:
    """Compute everything from raw lines. Raises DataError when there is no finished cell or no grid."""
    grids = [sample for sample in samples if sample.kind == "command" and sample.stage == GRID]
    if len(grids) != 1:
        raise DataError(f"the results hold {len(grids)} grids", "name the results.jsonl that one `ablate` wrote")
    facts = grids[0].detail
    cells = _cells(samples)
    failed = {s.build: str(s.detail.get("error", "")) for s in samples if s.kind == "command" and s.stage == FAILED}
    if not cells:
        raise DataError("no cell is finished: nothing to draw", next(iter(failed.values()), "run the grid first"))
    tasks = tuple(dict.fromkeys(task for cell in cells for task in cell.scores))
    levels = {axis: _present(facts, axis, cells) for axis in AXES}
    known = {cell.name: cell for cell in cells}
    baseline = str(facts.get("baseline", ""))
    axes = known[baseline].axes if baseline in known else cells[0].axes
    return Ablation(
        facts=facts,
        levels=levels,
        tasks=tasks,
        units={
            s.stage.split("/")[0]: s.unit for s in samples if s.kind == "accuracy" and s.detail.get("headline") is True
        },
        seeds=tuple(sorted({seed for cell in cells for by in cell.scores.values() for seed in by})),
        cells=cells,
        baseline=baseline,
        versus=_adjusted(_versus(cells, known.get(baseline), tasks)),
        effects=_adjusted(_effects(cells, levels, axes, tasks)),
        failed=failed,
        machine=next((s.detail for s in samples if s.kind == "environment"), {}),
    )


def merge(runs: Mapping[int, Sequence[AnswerRecord]]) -> list[AnswerRecord]:
    """One record per question with its mean score; questions that only some runs have are left out."""
    return _mean([list(records) for records in runs.values()])


def _mean(runs: Sequence[Sequence[AnswerRecord]]) -> list[AnswerRecord]:
    tables = [{record.id: record for record in records} for records in runs]
    merged = []
    for record in runs[0]:
        found = [table.get(record.id) for table in tables]
        values = [other.value for other in found if other is not None]
        if len(values) < len(tables):
            continue
        known = [value for value in values if value is not None]
        score = sum(known) / len(known) if len(known) == len(values) else None
        merged.append(replace(record, score=score, given="\n".join(other.given for other in found if other)))
    return merged


def _cells(samples: Sequence[Sample]) -> tuple[CellScore, ...]:
    answers: dict[str, dict[str, list[AnswerRecord]]] = {}
    scores: dict[str, dict[str, float]] = {}
    for sample in samples:
        if sample.kind == "answer":
            record = AnswerRecord.from_sample(sample)
            answers.setdefault(sample.build, {}).setdefault(record.task or JSON_TASK, []).append(record)
        elif sample.kind == "accuracy" and sample.detail.get("headline") is True and sample.value is not None:
            scores.setdefault(sample.build, {})[sample.stage.split("/")[0]] = sample.value
    runs: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.kind == "command" and sample.stage == CELL:
            _check(sample)
            runs.setdefault(str(sample.detail.get("cell")), []).append(sample)
    found = []
    for name, lines in runs.items():
        tasks = [task for task in scores.get(lines[0].build, {}) if task in answers.get(lines[0].build, {})]
        whole = [s for s in lines if all(t in scores.get(s.build, {}) and t in answers.get(s.build, {}) for t in tasks)]
        if not tasks:
            raise DataError(f"cell {name} has answers but no score", "its questions have no labels")
        found.append(
            CellScore(
                name,
                lines[0].detail["axes"],
                lines[0].detail.get("parameters", 0),
                sum(_seconds(s) for s in whole) / len(whole),
                {task: {s.detail["seed"]: scores[s.build][task] for s in whole} for task in tasks},
                {task: {s.detail["seed"]: tuple(answers[s.build][task]) for s in whole} for task in tasks},
            )
        )
    return tuple(found)


def _check(line: Sample) -> None:
    """Raise DataError unless the line of a cell holds what is read of it."""
    axes, stages = line.detail.get("axes"), line.detail.get("stages", [])
    wrong = [
        name
        for name, right in (
            ("axes", isinstance(axes, dict) and set(axes) == set(AXES) and all(type(v) is str for v in axes.values())),
            ("seed", type(line.detail.get("seed")) is int),
            ("parameters", type(line.detail.get("parameters", 0)) is int),
            ("stages", isinstance(stages, list) and all(map(_timed, stages))),
        )
        if not right
    ]
    if wrong:
        raise DataError(f"the line of cell {line.build}: no usable {', '.join(wrong)}", "run the grid again")


def _timed(stage: Any) -> bool:
    return isinstance(stage, dict) and isinstance(stage.get("seconds", 0.0), int | float)


def _seconds(line: Sample) -> float:
    return sum(float(stage.get("seconds", 0.0)) for stage in line.detail.get("stages", []))


def _present(facts: Mapping[str, Any], axis: str, cells: Sequence[CellScore]) -> tuple[str, ...]:
    named = facts.get("axes", {}).get(axis, []) if isinstance(facts.get("axes"), dict) else []
    there = list(dict.fromkeys(cell.axes[axis] for cell in cells))
    return tuple([name for name in named if name in there] + [name for name in there if name not in named])


def _versus(cells: Sequence[CellScore], base: CellScore | None, tasks: Iterable[str]) -> list[Difference]:
    if base is None:
        return []
    others = [cell for cell in cells if cell is not base]
    return [
        _difference("", base.name, cell.name, task, [(base, cell)])
        for task in tasks
        for cell in others
        if task in base.scores and task in cell.scores and set(base.scores[task]) & set(cell.scores[task])
    ]


def _effects(
    cells: Sequence[CellScore], levels: Mapping[str, Sequence[str]], base: Mapping[str, str], tasks: Sequence[str]
) -> list[Difference]:
    place = {tuple(cell.axes[axis] for axis in AXES): cell for cell in cells}
    found = []
    for axis in AXES:
        for level in levels[axis]:
            if level == base[axis]:
                continue
            for task in tasks:
                pairs = []
                for cell in cells:
                    twin = place.get(tuple(level if a == axis else cell.axes[a] for a in AXES))
                    both = cell.axes[axis] == base[axis] and twin is not None
                    if both and twin is not None and _seeds(cell, twin, task):
                        pairs.append((cell, twin))
                if pairs:
                    found.append(_difference(axis, base[axis], level, task, pairs))
    return found


def _seeds(one: CellScore, two: CellScore, task: str) -> list[int]:
    return sorted(set(one.scores.get(task, {})) & set(two.scores.get(task, {})))


def _difference(
    axis: str, before: str, after: str, task: str, pairs: Sequence[tuple[CellScore, CellScore]]
) -> Difference:
    sides: tuple[list[Sequence[AnswerRecord]], list[Sequence[AnswerRecord]]] = ([], [])
    by_seed: dict[int, list[float]] = {}
    for one, two in pairs:
        for seed in _seeds(one, two, task):
            old, new = one.records[task][seed], two.records[task][seed]
            sides[0].append(old)
            sides[1].append(new)
            by_seed.setdefault(seed, []).append(100 * (_average(new) - _average(old)))
    paired = compare_pair(_mean(sides[0]), _mean(sides[1]), names=(before, after), where=after)
    means = tuple(sum(values) / len(values) for _, values in sorted(by_seed.items()))
    return Difference(axis, before, after, task, len(pairs), paired, means, None)


def _average(records: Sequence[AnswerRecord]) -> float:
    return sum(record.value or 0.0 for record in records) / len(records)


def _adjusted(found: Sequence[Difference]) -> tuple[Difference, ...]:
    tested = [item for item in found if item.paired.p_value is not None]
    adjusted = dict(zip(map(id, tested), holm([float(item.paired.p_value or 0.0) for item in tested]), strict=True))
    return tuple(replace(item, p_holm=adjusted.get(id(item))) for item in found)
