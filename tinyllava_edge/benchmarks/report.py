"""results.jsonl → one report.html that needs no network and no script: the decision first, then what carries it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge import __version__
from tinyllava_edge.benchmarks import report_draw as draw
from tinyllava_edge.benchmarks import report_formats as formats
from tinyllava_edge.benchmarks import report_machine as machine
from tinyllava_edge.benchmarks import report_plots as plots
from tinyllava_edge.benchmarks import report_speed as speed
from tinyllava_edge.benchmarks import report_tables as tables
from tinyllava_edge.benchmarks import report_time as timing
from tinyllava_edge.benchmarks.decision import Budget
from tinyllava_edge.benchmarks.evaluation import accuracy
from tinyllava_edge.benchmarks.quant_map import quantisation_map, tensor_grids
from tinyllava_edge.benchmarks.report_flips import MAX_FLIPS, gallery
from tinyllava_edge.benchmarks.report_tables import markdown_table
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary import Summary, headline, summarise
from tinyllava_edge.benchmarks.summary_types import BuildSummary, by_target, on_target
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import write_text

__all__ = ["FILTERS", "html", "inline", "markdown_table", "page", "render_report", "typed_commands"]
FILTERS = {name: getattr(formats, name) for name in formats.__all__}


def render_report(
    samples: Sequence[Sample],
    out: Path,
    *,
    images: Path | None = None,
    markdown: Path | None = None,
    png: Path | None = None,
    budget: Budget | None = None,
    command: str = "",
    training: Mapping[str, Any] | None = None,
) -> Summary:
    """Write the report and, on request, its table as Markdown and its plots as PNG.

    Args:
        samples: what `results.read_results` read.
        out: report.html.
        images: where the evaluated pictures lie; without it the flips are shown without pictures.
        markdown: table for a README.
        png: Pareto plots for a README.
        budget: limits of the decision in base units, see `decision.COSTS`.
        command: how to make this very page; shown below the commands of the results.
        training: what `training_section` made of the files of trainings.

    Raises:
        DataError: runs are not comparable.
        UsageError: the budget names something unknown.
        DependencyError: matplotlib is not installed.
    """
    summary = summarise(samples, budget)
    write_text(out, html(samples, summary, images, command, training))
    if markdown:
        write_text(markdown, markdown_table(summary))
    if png and (found := plots.plots(summary)):
        draw.write_png(found, png)
    return summary


def html(
    samples: Sequence[Sample],
    summary: Summary,
    images: Path | None = None,
    command: str = "",
    training: Mapping[str, Any] | None = None,
) -> str:
    """The whole page. Every string from the results is escaped by the template engine.

    Raises:
        DataError: a line that lacks something, or divergence lines that can't be summarised.
    """
    bundles = list({s.detail.get("sha256"): s.detail for s in samples if s.kind == "bundle"}.values())
    waterfall = timing.waterfall(summary.builds, timing.roofline_shares(samples))
    several = len({row.target for row in summary.rows}) > 1
    tests, loading = timing.tests(summary.rows), timing.loading(summary.builds)
    energy = machine.energy(summary.builds)
    return page(
        "report.html",
        title=bundles[0].get("name") if bundles else "",
        summary=summary,
        decisions=[_decision(summary, k) for k in range(len(summary.decisions))],
        allowed_loss=f"{summary.allowed_loss:g}",
        separate_runs=max((row.runs for row in summary.builds), default=1),
        rows=summary.rows,
        ranking=by_target(summary.rows, several),
        **_plots(summary),
        waterfall=by_target(waterfall, several),
        totals=any(row["row"].total for row in waterfall),
        scattered=any(bar["noisy"] for row in waterfall for bar in row["bars"]),
        roofline=any(bar["share"] is not None for row in waterfall for bar in row["bars"]),
        roofline_notes=timing.roofline_notes(samples),
        waterfall_key=timing.stages_shown(waterfall),
        tests={**tests, "groups": by_target(tests["rows"], several)},
        loading={**loading, "groups": by_target(loading["rows"], several)},
        energy={**energy, "groups": by_target(energy["rows"], several)},
        speeds=(speeds := speed.speeds(summary)),
        how=speed.how(speeds),
        groups=tables.groups(summary),
        blind=accuracy(headline(summary.blind)) if summary.blind else None,
        comparison=tables.comparison(samples, summary),
        divergence=tables.divergence(samples),
        gallery=gallery(samples, summary, images),
        max_flips=MAX_FLIPS,
        parity=_parity(summary),
        quantisation=quantisation_map(samples, [row.build for row in summary.builds]),
        tensors=tensor_grids(samples, [row.build for row in summary.builds]),
        bundles=bundles,
        machines=machine.machines(samples),
        conditions=machine.conditions(samples),
        scores=[s for s in samples if s.kind == "accuracy" and s.detail.get("headline", True)],
        commands=list(dict.fromkeys([*typed_commands(samples), *([command] if command else [])])),
        lines=len(samples),
        training=training,
    )


def page(template: str, **values: Any) -> str:
    """Fill in one of the package's templates. Raises DataError where a result line lacks what the page shows."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tinyllava_edge", "benchmarks"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= FILTERS
    css = markupsafe.Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8"))
    try:
        return environment.get_template(template).render(version=__version__, css=css, **values)
    except (jinja2.UndefinedError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"a result line lacks something: {error}", "measure again with this version") from error


def inline(svg: str) -> Any:
    """A drawing that goes into the page as it is; its texts were escaped when it was drawn."""
    import markupsafe

    return markupsafe.Markup(svg)


def _decision(summary: Summary, number: int) -> dict[str, Any]:
    decision = summary.decisions[number]
    rows = on_target(summary.builds, decision.target)
    return {
        "id": f"decision{number or ''}",
        "of": decision,
        "row": summary.chosen(decision.target),
        "place": decision.target if len(summary.targets) > 1 else "",
        "largest": max((row.bytes or 0 for row in rows), default=0),
        "budget": tables.budget_table(summary, decision.target),
        "why_not": {**decision.rejected, **decision.passed_over},
    }


def _plots(summary: Summary) -> dict[str, Any]:
    found = plots.plots(summary)
    key = plots.Key.of(found) if found else None
    drawn = [(plot, inline(draw.svg(plot, key))) for plot in found]
    by_target: dict[str, list[Any]] = {}
    for plot, drawing in drawn:
        by_target.setdefault(plot.target, []).append(drawing)
    ring = any(point.chosen for plot in found for point in plot.points)
    return {"plots": by_target, "key": key, "ring": ring, "limited": any(plot.limit is not None for plot in found)}


def _parity(summary: Summary) -> list[dict[str, Any]]:
    records: dict[str, BuildSummary] = {}
    for row in summary.builds:
        if row.verify:
            records.setdefault(row.build, row)
    shipped = {decision.build for decision in summary.decisions}
    return [{"name": n, "record": row.verify, "shipped": n in shipped} for n, row in records.items() if _checked(row)]


def _checked(row: BuildSummary) -> bool:
    """Whether the stamp holds its checks; a stamp without has no table. Raises DataError for checks of another form."""
    checks = row.verify.get("checks")
    if checks is not None and not (isinstance(checks, list) and all(isinstance(check, dict) for check in checks)):
        raise DataError(f"the verify line of {row.build} lacks something: its checks", "run `verify` again")
    return checks is not None


def typed_commands(samples: Sequence[Sample]) -> list[str]:
    """What was typed, each once and in order; first what verified the builds, which their stamps tell."""
    stamps = [s.detail.get("verified") for s in samples if s.kind == "bundle"]
    records = [record for stamp in stamps if isinstance(stamp, dict) for record in stamp.values()]
    records += [s.detail for s in samples if s.kind == "command"]
    typed = [str(record.get("command", "")) for record in records if isinstance(record, dict)]
    return [line for line in dict.fromkeys(typed) if line]
