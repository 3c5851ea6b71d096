"""The paper's tables as Markdown and as a page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinyllava_edge import __version__
from tinyllava_edge.benchmarks.paper import HEAD, LEGEND, PaperReport

BASIS = ("model", "build", "benchmark", "score", "n", "protocol", "judge")


def basis(report: PaperReport) -> list[tuple[str, ...]]:
    """What each measured score rests on, in the order of BASIS."""
    return [
        (s.model, s.build, s.task, f"{s.value:.2f} {s.unit}".strip(), f"{s.n:,}", s.protocol, s.judge)
        for s in report.measured
    ]


def markdown(report: PaperReport) -> str:
    """GitHub's Markdown; measured lines in italics."""
    parts = ["# Published scores, and measured ones beside them", LEGEND]
    for table in report.tables:
        lines = [
            [f"*{_escape(c)}*" if measured and c else _escape(c) for c in cells] for measured, cells in table.lines
        ]
        parts += [f"## {_escape(table.title)}", _grid(table.head, lines, len(HEAD))]
        if table.source:
            parts.append(f"Source: {_escape(table.source)}")
    if report.measured:
        rows = [[_escape(cell) for cell in row] for row in basis(report)]
        parts += ["## What the measured scores rest on", _grid(BASIS, rows, len(BASIS))]
    return "\n\n".join(parts) + "\n"


def html(report: PaperReport) -> str:
    """One page that needs no network and no script; every string is escaped by the template engine."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tinyllava_edge", "benchmarks"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("paper.html").render(
        version=__version__,
        css=markupsafe.Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),
        report=report,
        facts=len(HEAD),
        legend=LEGEND,
        basis_head=BASIS,
        basis=basis(report),
    )


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose columns from `left` on are set to the right."""
    marks = ["---" if k < left else "---:" for k in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in ([_escape(cell) for cell in head], marks, *rows))


def _escape(text: str) -> str:
    clean = " ".join(text.split()).replace("\\", "\\\\")
    for mark in "|*_<`[":
        clean = clean.replace(mark, f"\\{mark}")
    return clean
