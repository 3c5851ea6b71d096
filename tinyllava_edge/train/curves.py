"""What trainings left beside their checkpoints, read back for a report: records, logs and sample answers.

Needs neither torch nor the checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError
from .lines import whole_lines

END, LOG, SAMPLES = ".train.json", ".log.jsonl", ".samples.jsonl"
MAX_BYTES = 1 << 28  # of one file
MAX_TEXT = 4000  # characters of a sample that are kept
# what the record of a finished training must hold
NEEDED: dict[str, type | tuple[type, ...]] = {
    "checkpoint": str,
    "source": str,
    "recipe": dict,
    "precision": str,
    "data": list,
    "rows": int,
    "packs": int,
    "bad_rows": int,
    "steps": int,
    "seconds": (int, float),
    "images_per_s": (int, float),
    "final_loss": (int, float),
    "losses": list,
    "stopped_early": str,
    "score": (dict, type(None)),
    "versions": dict,
}


@dataclass(frozen=True)
class Sample:
    """One answer at one step."""

    step: int
    """optimiser step"""
    number: int
    """which of the questions"""
    question: str
    """what was asked"""
    expected: str
    """the answer in the data"""
    answer: str
    """the greedy answer at this step"""
    picture: str
    """name of the picture; empty without one"""


@dataclass(frozen=True)
class Training:
    """One stage of training, finished or not."""

    path: Path
    """the file that was named"""
    label: str
    """name for people, different from all others'"""
    record: Mapping[str, Any]
    """what `{out}.train.json` holds; empty while training runs"""
    log: tuple[Mapping[str, float | None], ...]
    """figures of each step, as `track_files.FIGURES` names them; those of an old record have `step` and `loss` alone"""
    samples: tuple[Sample, ...]
    """answers, by step"""
    run: str = ""
    """label of the training that its chain ends with: stages of one run share it"""

    @property
    def stage(self) -> str:
        """Stage name; empty while training runs."""
        return str(self.record["recipe"]["name"]) if self.record else ""

    def series(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Two figures over the steps at which both are known and finite."""
        points = [(entry.get(x), entry.get(y)) for entry in self.log]
        known = [(a, b) for a, b in points if a is not None and b is not None]
        return [a for a, _ in known], [b for _, b in known]


def read_trainings(paths: Sequence[Path]) -> tuple[Training, ...]:
    """Read what was named, and the earlier stages of it that lie in the same directory; first stages first.

    Args:
        paths: `{out}.train.json` of finished trainings, `{out}.log.jsonl` of running ones.

    Raises:
        UsageError: another file name, or the same file twice.
        DataError: a file that can't be read, or that lacks something.
    """
    if len({path.resolve() for path in paths}) != len(paths):
        raise UsageError("a training's file is named twice", "name each file once")
    found: dict[Path, Training] = {}
    for path in paths:
        chain = _read_chain(path)
        found |= {one.path.resolve(): one for one in chain if one.path.resolve() not in found}
    labelled = _labels(list(found.values()))
    return tuple(replace(one, run=", ".join(sorted(_ends(one, labelled)))) for one in labelled)


def _read_chain(path: Path) -> list[Training]:
    """A training behind the earlier stages that it started from, as far as they lie beside it."""
    chain = [_read(path)]
    while chain[0].record and len(chain) < 16:
        before = path.parent / (Path(chain[0].record["source"]).name + END)
        if not before.is_file() or before in [one.path for one in chain]:
            break
        chain.insert(0, _read(before))
    return chain


def _read(path: Path) -> Training:
    stem = next((path.name.removesuffix(end) for end in (END, LOG) if path.name.endswith(end)), "")
    if not stem:
        raise UsageError(f"{path}: no training's file", f"name a checkpoint's {END} file, or {LOG} while it is trained")
    _check_size(path)
    record = _record(path) if path.name.endswith(END) else {}
    log = _log(path.parent / (stem + LOG))
    if record and not _belongs(log, record):  # an older version's, or another training's
        losses = [value for value in record["losses"] if isinstance(value, int | float)]
        log = tuple({"step": k, "loss": _number(value)} for k, value in enumerate(losses, 1))
    if not record and not log:
        raise DataError(f"{path}: holds no step", "wait for the first one")
    return Training(path, stem, record, log, _samples(path.parent / (stem + SAMPLES)))


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})", "check the path given to --training") from error
    if size > MAX_BYTES:
        raise DataError(f"{path}: {size:,} bytes", f"at most {MAX_BYTES:,} bytes are read")


def _record(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})", "train again, or leave it out") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds no record of a training", "name the file that `train` wrote")
    for key, kind in NEEDED.items():
        if not isinstance(value.get(key), kind) or isinstance(value.get(key), bool):
            raise DataError(f"{path}: {key} is missing or of another type", "name the file that `train` wrote")
    if not isinstance(value["recipe"].get("name"), str):
        raise DataError(f"{path}: its recipe has no name", "name the file that `train` wrote")
    return value


def _log(path: Path) -> tuple[Mapping[str, float | None], ...]:
    if not path.is_file():
        return ()
    _check_size(path)
    kept: list[Mapping[str, float | None]] = []
    for _, value in whole_lines(path):
        if not kept or value["step"] > (kept[-1]["step"] or 0):
            kept.append({str(key): _number(given) for key, given in value.items()})
    return tuple(kept)


def _belongs(log: Sequence[Mapping[str, float | None]], record: Mapping[str, Any]) -> bool:
    """Whether a log tells of the very training, by its last step."""
    last = (record["steps"], _number(record["losses"][-1])) if record["losses"] else ()
    return bool(log) and (log[-1]["step"], log[-1].get("loss")) == last


def _samples(path: Path) -> tuple[Sample, ...]:
    if not path.is_file():
        return ()
    _check_size(path)
    kept = []
    for _, value in whole_lines(path):
        texts = [value.get(key) for key in ("question", "expected", "answer", "picture")]
        if type(value.get("sample")) is int and all(isinstance(text, str) for text in texts):
            kept.append(Sample(value["step"], value["sample"], *(str(text)[:MAX_TEXT] for text in texts)))
    return tuple(kept)


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if good and math.isfinite(value) else None


def _labels(found: Sequence[Training]) -> list[Training]:
    """Names of the checkpoints, with as many directories in front as tell them apart."""
    labels = [one.label for one in found]
    for depth in range(1, 16):
        twice = {label for label in labels if labels.count(label) > 1}
        if not twice:
            break
        parts = [one.path.resolve().parent.parts for one in found]
        labels = [
            "/".join([*part[-depth:], one.label]) if label in twice else label
            for label, part, one in zip(labels, parts, found, strict=True)
        ]
    return [replace(one, label=label) for one, label in zip(found, labels, strict=True)]


def _ends(one: Training, found: Sequence[Training], depth: int = 0) -> set[str]:
    """Labels of the trainings that went on from one, over any number of stages, and from which none went on."""
    later = [other for other in found if other is not one and other.record and _same(one, other)] if one.record else []
    if not later or depth > 16:
        return {one.label}
    return set().union(*(_ends(other, found, depth + 1) for other in later))


def _same(earlier: Training, later: Training) -> bool:
    """Whether one's checkpoint is what the other started from; the two may have been named from other directories."""
    made, taken = Path(earlier.record["checkpoint"]), Path(later.record["source"])
    beside = earlier.path.resolve().parent == later.path.resolve().parent
    return made == taken or (beside and made.name == taken.name)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred means over `window` values, an odd number; fewer at the ends, so that nothing lags."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half, n = window // 2, len(values)
    ends = [(max(0, k - half), min(n, k + half + 1)) for k in range(n)]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]


def thin(x: Sequence[float], y: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most about `most` points: of each stretch the lowest and the highest, so that spikes stay."""
    if len(x) <= most:
        return list(x), list(y)
    size = math.ceil(2 * len(x) / most)
    kept: list[int] = []
    for begin in range(0, len(x), size):
        part = range(begin, min(begin + size, len(x)))
        kept += sorted({min(part, key=y.__getitem__), max(part, key=y.__getitem__)})
    return [x[k] for k in kept], [y[k] for k in kept]
