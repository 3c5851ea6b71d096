"""The training part of a report: recipe and result of each stage, curves of several runs overlaid, sample answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks import report_training_draw as draw
from tinyllava_edge.benchmarks.out_file import check_target
from tinyllava_edge.benchmarks.report_formats import NONE, mega, number
from tinyllava_edge.errors import DataError, UsageError
from tinyllava_edge.files import write_text
from tinyllava_edge.train.curves import Sample, Training, read_trainings

MAX_STEPS, MAX_SAMPLES = 5, 12  # columns and rows of a table of sample answers
PARTS = {"tower": "tower", "connector": "connector", "llm": "language model"}


@dataclass(frozen=True)
class Answers:
    """Sample answers of one training as a table."""

    label: str
    """the training"""
    steps: tuple[int, ...]
    """columns"""
    rows: tuple[tuple[Sample, tuple[Sample | None, ...]], ...]
    """a question, and its answers at the steps"""
    left_out: int
    """questions beyond the table"""


def training_section(paths: Sequence[Path]) -> dict[str, Any]:
    """What `report_training.html` shows.

    Args:
        paths: as `read_trainings`.

    Raises:
        UsageError, DataError: as `read_trainings`.
        DependencyError: matplotlib is not installed.
    """
    found = read_trainings(paths)
    key = draw.colors(found)
    facts = _facts(found)
    versions = set(dict(facts).get("versions", []))
    if len(versions) == 1:
        facts = [(name, cells) for name, cells in facts if name != "versions"]
    stages = list(dict.fromkeys(one.stage for one in found))
    return {
        "trainings": found,
        "title": ", ".join(one.label for one in found if one.run == one.label),
        "facts": facts,
        "versions": versions.pop() if len(versions) == 1 else "",
        "key": key if len(key) > 1 else {},
        "stages": [
            (stage, draw.figures([one for one in found if one.stage == stage], key, f"s{k}"))
            for k, stage in enumerate(stages)
        ],
        "answers": [_answers(one) for one in found if one.samples],
        "recomputes": any(one.record.get("recipe", {}).get("gradient_checkpointing") for one in found),
    }


def write_training_page(paths: Sequence[Path], out: Path) -> str:
    """A page about trainings alone; returns a sentence for people.

    Raises:
        UsageError: `out` is no HTML file's name, or one of the files that are read.
        DataError, DependencyError: as `training_section`.
    """
    from tinyllava_edge.benchmarks.report import page

    if out.suffix != ".html":
        raise UsageError(f"{out} is no HTML file's name", "name a file that ends in .html")
    check_target(out, paths)
    training = training_section(paths)
    write_text(out, page("training.html", training=training))
    last = training["trainings"][-1]
    return f"{last.label}: {_result(last)}"


def _facts(found: Sequence[Training]) -> list[tuple[str, list[str]]]:
    """The table: a line per fact, a column per training; lines that nobody can fill are left out."""
    lines = {name: [_fact(function, one) for one in found] for name, function in FACTS.items()}
    return [(name, cells) for name, cells in lines.items() if any(cell not in ("", NONE) for cell in cells)]


def _fact(function: Any, one: Training) -> str:
    if not one.record:
        return NONE
    try:
        return str(function(one.record))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{one.path}: lacks something: {error}", "name the file that `train` wrote") from error


def _part(name: str) -> Any:
    def text(record: Mapping[str, Any]) -> str:
        part = record.get("parts", {}).get(name)
        if part is None:
            return NONE
        if not part["trainable"]:
            return f"frozen ({_count(part['parameters'])})" if part["parameters"] else NONE
        trained, whole = _count(part["trainable"]), _count(part["parameters"])
        mode = record["recipe"].get(name)
        if mode in ("lora", "qlora"):
            return f"{mode}: {trained} beside {whole}"
        return f"trained ({whole})" if trained == whole else f"{trained} of {whole} trained"

    return text


def _count(value: float) -> str:
    """Parameters for people."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _data(record: Mapping[str, Any]) -> str:
    return ", ".join(Path(str(name)).name for name in record["data"])


def _steps(record: Mapping[str, Any]) -> str:
    notes = [f"resumed at {record['resumed_from']:,}"] if record.get("resumed_from") else []
    notes += ["ended by the time limit"] if record["stopped_early"] == "time" else []
    return f"{record['steps']:,}" + (f" ({', '.join(notes)})" if notes else "")


def _batch(record: Mapping[str, Any]) -> str:
    recipe, devices = record["recipe"], record.get("devices", 1)
    micro = recipe.get("micro_batch") or 0
    notes = [f"{micro} at once"] if micro else []
    notes += [f"{devices} devices"] if devices > 1 else []
    return f"{recipe['batch_size']}" + (f" ({', '.join(notes)})" if notes else "")


def _score(record: Mapping[str, Any]) -> str:
    score = record["score"]
    if score is None:
        return NONE
    share = 100 * score["exact"] / score["rows"] if score["rows"] else 0.0
    return f"{share:.1f} % ({score['exact']:,} of {score['rows']:,})"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _memory(record: Mapping[str, Any]) -> str:
    found = record.get("memory_bytes")
    return f"{mega(found)} MB" if found else NONE


FACTS: dict[str, Any] = {
    "stage": lambda r: r["recipe"]["name"],
    "started from": lambda r: Path(r["source"]).name,
    **{title: _part(name) for name, title in PARTS.items()},
    "learning rate": lambda r: f"{r['recipe']['learning_rate']:g}, {r['recipe']['lr_scheduler']}",
    "batch": _batch,
    "epochs": lambda r: f"{r['recipe']['epochs']:g}",
    "steps": _steps,
    "precision": lambda r: r["precision"],
    "data": _data,
    "rows": lambda r: f"{r['rows']:,} in {r['packs']:,} sequences",
    "bad rows": lambda r: f"{r['bad_rows']:,}",
    "time": lambda r: _clock(r["seconds"]),
    "images/s": lambda r: number(r["images_per_s"]),
    "tokens/s": lambda r: number(r.get("tokens_per_s")),
    "MFU": lambda r: _share(r.get("mfu")),
    "memory": _memory,
    "final loss": lambda r: f"{r['final_loss']:.3f}",
    "held-out loss": lambda r: NONE if r["score"] is None else f"{r['score']['loss']:.3f}",
    "held-out exact": _score,
    "versions": lambda r: ", ".join(f"{name} {version}" for name, version in r["versions"].items()),
}


def _answers(one: Training) -> Answers:
    steps = sorted({sample.step for sample in one.samples})
    if len(steps) > MAX_STEPS:  # evenly spread, the first and the last among them
        steps = [steps[round(k * (len(steps) - 1) / (MAX_STEPS - 1))] for k in range(MAX_STEPS)]
    at = {(sample.number, sample.step): sample for sample in one.samples}
    numbers = sorted({sample.number for sample in one.samples})
    rows = []
    for number_ in numbers[:MAX_SAMPLES]:
        cells = tuple(at.get((number_, step)) for step in steps)
        first = next((cell for cell in cells if cell is not None), None)
        rows += [(first, cells)] if first is not None else []
    return Answers(one.label, tuple(steps), tuple(rows), len(numbers) - len(rows))


def _result(one: Training) -> str:
    if not one.record:
        return f"{one.log[-1]['step']:,.0f} steps so far"
    score = _score(one.record)
    return f"loss {one.record['final_loss']:.3f}" + ("" if score == NONE else f", held-out answers exact: {score}")
