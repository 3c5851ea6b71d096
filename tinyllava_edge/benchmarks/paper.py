"""The published tables with measured scores beside them, as Markdown or as one page of HTML.

A cell is filled from what it says it is: published cells from `paper_scores.json`, measured ones from `accuracy` lines.
What nobody measured stays empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks import tasks
from tinyllava_edge.benchmarks.out_file import check_target, without_companions
from tinyllava_edge.benchmarks.results import Sample, read_results
from tinyllava_edge.errors import DataError, UsageError
from tinyllava_edge.files import write_text

HEAD = ("model", "LLM", "size", "px", "recipe")
LEGEND = "A star: the benchmark's training images were seen in training. Empty: not published, or not measured."


@dataclass(frozen=True)
class Published:
    """One row of a published table."""

    model: str
    """as printed; of TinyLLaVA Factory its two backbones"""
    names: tuple[str, ...]
    """names of models with the same recipe and parts: their measured scores stand beside this row"""
    vision: str | None
    """vision backbone where the table names it"""
    llm: str
    """language model as printed"""
    size: str | None
    """parameters as printed"""
    resolution: int
    """side of the picture in pixels"""
    recipe: str | None
    """training recipe, where known"""
    scores: dict[str, float]
    """task → score as printed, % or points"""
    seen: tuple[str, ...]
    """tasks whose training images were seen"""
    source: str
    """where it is printed"""


@dataclass(frozen=True)
class PublishedTable:
    """One published table."""

    name: str
    """key"""
    title: str
    """what it shows"""
    source: str
    """where it is printed"""
    tasks: tuple[str, ...]
    """its columns"""
    rows: tuple[Published, ...]
    """in the order of the source"""


@dataclass(frozen=True)
class Measured:
    """One headline score of our own."""

    model: str
    """name of the model"""
    build: str
    """build, or runtime and precision"""
    task: str
    """benchmark"""
    column: str
    """where it stands: the task, and another judge than the published one"""
    title: str
    """heading of that column"""
    value: float
    """the score"""
    unit: str
    """`%` or `points`"""
    n: int
    """questions answered"""
    protocol: str
    """id of everything that moves the score"""
    judge: str
    """the judge that spoke; empty for none"""


@dataclass(frozen=True)
class PaperTable:
    """A table ready to print."""

    title: str
    """what it shows"""
    source: str
    """where the published rows are printed; empty for none"""
    head: tuple[str, ...]
    """headings: those of HEAD, then the benchmarks"""
    lines: tuple[tuple[bool, tuple[str, ...]], ...]
    """whether the line was measured here, and its cells"""


@dataclass(frozen=True)
class PaperReport:
    """All tables and what the measured cells rest on."""

    tables: tuple[PaperTable, ...]
    """published tables, then the models that stand in none of them"""
    measured: tuple[Measured, ...]
    """every measured score"""


@cache
def published_tables() -> tuple[PublishedTable, ...]:
    """Tables of the paper and of TinyLLaVA Factory, from `paper_scores.json`."""
    tables = []
    for table in _data()["tables"]:
        rows = tuple(
            Published(**{**row, "names": tuple(row["names"]), "seen": tuple(row["seen"])}) for row in table["rows"]
        )
        tables.append(PublishedTable(table["name"], table["title"], table["source"], tuple(table["tasks"]), rows))
    return tuple(tables)


def measured_scores(samples: Iterable[Sample]) -> list[Measured]:
    """The headline scores among `accuracy` lines, blind runs left out; a line that occurs twice counts once.

    Raises:
        DataError: a headline without model, protocol or n, of an unknown task, or two different scores for one cell.
    """
    found: dict[tuple[str, str, str], Measured] = {}
    for sample in samples:
        if sample.kind != "accuracy" or sample.stage.startswith("blind/"):
            continue
        score = _measured(sample)
        if score is None:
            continue
        key = (score.model, score.build, score.column)
        if found.setdefault(key, score) != score:
            raise DataError(
                f"two scores of {score.model} {score.build} on {score.column}",
                "leave out the file of the older run",
            )
    return list(found.values())


def paper_tables(measured: Sequence[Sample]) -> PaperReport:
    """Set measured scores beside the published ones. Raises DataError, see `measured_scores`."""
    scores = measured_scores(measured)
    tables = [_table(table, scores) for table in published_tables()]
    listed = {name for table in published_tables() for row in table.rows for name in row.names}
    rest = [score for score in scores if score.model not in listed]
    if rest:
        columns = list(dict.fromkeys(score.column for score in rest))
        lines = [
            line for model in dict.fromkeys(score.model for score in rest) for line in _lines(model, rest, columns)
        ]
        head = (*HEAD, *(_title(column, rest) for column in columns))
        tables.append(PaperTable("Measured models that no published table has", "", head, tuple(lines)))
    return PaperReport(tuple(tables), tuple(scores))


def write_paper_report(results: Sequence[Path], out: Path) -> PaperReport:
    """Read results files and write the tables.

    Args:
        results: files that `eval` wrote; none for the published rows alone.
        out: `.md` or `.html`.

    Raises:
        UsageError: another ending, or `out` is one of the results files.
        DataError: see `read_results` and `measured_scores`.
    """
    from tinyllava_edge.benchmarks.paper_text import html, markdown

    writers = {".md": markdown, ".html": html}
    if out.suffix not in writers:
        raise UsageError(f"{out}: unknown ending", f"known: {', '.join(writers)}")
    check_target(out, results)
    report = paper_tables(read_results(without_companions(results)))
    write_text(out, writers[out.suffix](report))
    return report


def _measured(sample: Sample) -> Measured | None:
    task, _, metric = sample.stage.partition("/")
    try:
        known = tasks.find("" if task == "llava_json" else task)
    except UsageError as error:
        raise DataError(f"an accuracy line of the unknown task {task!r}", "measure again with this version") from error
    if not sample.detail.get("headline", metric == known.headline):
        return None
    values = {key: sample.detail.get(key) for key in ("model", "protocol", "n")}
    for key, kind in (("model", str), ("protocol", str), ("n", int)):
        if not isinstance(values[key], kind) or not values[key] or values[key] is True:
            raise DataError(
                f"the accuracy line {sample.stage} has no usable {key!r}", "measure again with this version"
            )
    if sample.value is None:
        raise DataError(f"the accuracy line {sample.stage} has no value", "measure again with this version")
    judge, column, title = str(sample.detail.get("judge", "")), task, known.title
    if judge and known.judging is not None and judge != known.judging.official_model:
        column, title = f"{task} judged by {judge}", f"{title}, judged by {judge}"
    build = sample.build if sample.runtime == "edge" else f"{sample.runtime} {sample.build}".strip()
    rest = (float(sample.value), sample.unit, int(values["n"] or 0), str(values["protocol"]), judge)
    return Measured(str(values["model"]), build, task, column, title, *rest)


def _table(table: PublishedTable, scores: Sequence[Measured]) -> PaperTable:
    """A published table; under each row the builds that were measured, in columns of their own where they differ."""
    names = {name for row in table.rows for name in row.names}
    own = [score for score in scores if score.model in names]
    columns = list(dict.fromkeys([*table.tasks, *(score.column for score in own)]))
    lines: list[tuple[bool, tuple[str, ...]]] = []
    for row in table.rows:
        facts = (row.model, row.llm, row.size or "", str(row.resolution), row.recipe or "")
        lines.append((False, (*facts, *(_printed(row, column) for column in columns))))
        for name in row.names:
            lines += _lines(name, own, columns, row.model)
    titles = {task: facts["title"] for task, facts in _data()["tasks"].items()}
    head = (*HEAD, *(titles.get(column) or _title(column, own) for column in columns))
    return PaperTable(table.title, table.source, head, tuple(lines))


def _lines(
    model: str, scores: Sequence[Measured], columns: Sequence[str], above: str = ""
) -> list[tuple[bool, tuple[str, ...]]]:
    """One line per measured build of a model; `above` is the model that the line above names."""
    own = [score for score in scores if score.model == model]
    lines = []
    for build in dict.fromkeys(score.build for score in own):
        cells = {score.column: _cell(score) for score in own if score.build == build}
        label = f"measured: {build}" if model == above else f"measured: {model}, {build}"
        facts = (label, "", "", "", "")
        lines.append((True, (*facts, *(cells.get(column, "") for column in columns))))
    return lines


def _printed(row: Published, column: str) -> str:
    value = row.scores.get(column)
    return "" if value is None else f"{value}{'*' if column in row.seen else ''}"


def _cell(score: Measured) -> str:
    whole = _data()["tasks"].get(score.task, {}).get("n", score.n)
    return f"{score.value:.1f} (n = {score.n:,}{f' of {whole:,}' if score.n < whole else ''})"


def _title(column: str, scores: Sequence[Measured]) -> str:
    return next(score.title for score in scores if score.column == column)


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((Path(__file__).parent / "paper_scores.json").read_text(encoding="utf-8"))
    return data
