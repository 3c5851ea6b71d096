"""What `report` does with its files: one report of all of them, or two runs side by side."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinyllava_edge.benchmarks import report_formats as formats
from tinyllava_edge.benchmarks import side_by_side as sides
from tinyllava_edge.benchmarks import side_draw
from tinyllava_edge.benchmarks.budget import Budget, parse_budget
from tinyllava_edge.benchmarks.latency_compare import LatencyComparison
from tinyllava_edge.benchmarks.out_file import check_target
from tinyllava_edge.benchmarks.report import inline, page, render_report, typed_commands
from tinyllava_edge.benchmarks.report_training import training_section, write_training_page
from tinyllava_edge.benchmarks.results import Sample, read_results
from tinyllava_edge.benchmarks.summary_types import WHOLE
from tinyllava_edge.errors import UsageError
from tinyllava_edge.files import write_text


def write_report(
    results: Sequence[Path],
    out: Path,
    images: Path | None = None,
    budget: str | Budget | Mapping[str, float] | None = None,
    against: Path | None = None,
    training: Sequence[Path] = (),
) -> str:
    """Draw report.html, its table as Markdown and its plots as PNG from results files.

    Several files are joined. Two files that hold the same measurements are two runs: joining would pool them, so they
    are shown side by side, A first, as with `against`.

    Args:
        results: results.jsonl files.
        out: HTML file to write; .md and .png go beside it.
        images: pictures that were evaluated, to show flips.
        budget: `ttft=500ms,rss=1.2GB,size=900MB,total=2s,energy=5J,drop=0.5`, or what `parse_budget` made of it.
        against: results of another run, shown beside `results` (A) as B.
        training: files of trainings as `read_trainings` takes them; without results the page is about them alone.

    Returns:
        A sentence for people: which build to ship, or what changed.

    Raises:
        UsageError: `out` is no HTML file's name, or a file that is read or no report's stands in a place; an unknown
            budget, the same file twice, more than two files that hold the same measurements, or two runs without a
            build in common.
        DataError: a file that can't be read, or runs that are not comparable.
        DependencyError: matplotlib, scipy or statsmodels is not installed.
    """
    if out.suffix != ".html":
        raise UsageError(f"{out} is no HTML file's name", "name a file that ends in .html; .md and .png go beside it")
    if training and not results:
        if budget or against or images:
            raise UsageError("--training alone takes no other option than -o", "name results too, or drop the others")
        return write_training_page(training, out)
    limits = _limits(budget)
    files = [*results, *([against] if against is not None else [])]
    if not results:
        raise UsageError("no results file", "name a results.jsonl that `bench` or `eval` wrote")
    if len({path.resolve() for path in files}) != len(files):
        raise UsageError("one results file is named twice", "name each file once")
    if against is not None:
        _no_training(training)
    _check_places(out, [*files, *training])
    read = {path: read_results([path]) for path in files}
    text = budget.text if isinstance(budget, Budget) else budget if isinstance(budget, str) else ""
    if against is not None:
        first = [sample for path in results for sample in read[path]]
        _no_pooling(results, read)
        return _write_sides(first, read[against], (_title(results), _title([against])), out, limits, "", text, files)
    why = _no_pooling(results, read) if len(results) != 2 else sides.overlap(*read.values())
    if why:
        _no_training(training)
        a, b = results
        names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
        return _write_sides(read[a], read[b], names, out, limits, why, text, files)
    command = _command(files, text, out, images=images, training=training)
    samples = [sample for path in results for sample in read[path]]
    markdown, png = out.with_suffix(".md"), out.with_suffix(".png")
    shown = training_section(training) if training else None
    found = render_report(
        samples, out, images=images, markdown=markdown, png=png, budget=limits, command=command, training=shown
    )
    ships = [f"{d.build or 'none'}" + (f" on {d.target}" if len(found.decisions) > 1 else "") for d in found.decisions]
    return f"ship {', '.join(ships)}"


def _check_places(out: Path, files: Sequence[Path]) -> None:
    """Refuse to write over what is read, or over a table or picture that no earlier report can have left there."""
    for place in (out, out.with_suffix(".md"), out.with_suffix(".png")):
        check_target(place, files)
        if place != out and place.exists() and not out.exists():
            raise UsageError(
                f"{place}: stands there, and {out.name} doesn't, so it is no earlier report's",
                f"move it, or name another file with -o: {place.suffix} is written beside the .html",
            )


def _write_sides(
    a: Sequence[Sample],
    b: Sequence[Sample],
    names: tuple[str, str],
    out: Path,
    limits: Mapping[str, float],
    why: str,
    budget: str,
    files: Sequence[Path],
) -> str:
    found = sides.side_by_side(a, b, names=names, budget=limits, why=why)
    lines = summary_lines(found)
    typed = typed_commands([*a, *b])
    command = _command(files[:-1], budget, out, against=files[-1])
    drawn = side_draw.timed(found)
    stages = {stage: name for stage, name in sides.TIMED.items() if any(stage in c.times for c in found.changes)}
    text = page(
        "side_by_side.html",
        found=found,
        drawing=inline(side_draw.ratio_svg(found)) if drawn else "",
        whole={stage: name for stage, name in stages.items() if stage in WHOLE},
        stages={stage: name for stage, name in stages.items() if stage not in WHOLE},
        powered=any(change.a.energy and change.b.energy for change in found.changes),
        medians=medians,
        step=sides.step,
        summary_lines=lines,
        commands=[line for line in dict.fromkeys([*typed, command]) if line],
        **{kind: bool(found_) for kind, found_ in moved(found).items()},
    )
    write_text(out, text)
    write_text(out.with_suffix(".md"), sides.markdown(found))
    if drawn:
        side_draw.write_png(found, out.with_suffix(".png"))
    return " ".join(lines)


def moved(found: sides.SideBySide) -> dict[str, list[str]]:
    """Builds that are shown to be slower, faster, worse or better in B."""
    table: dict[str, list[str]] = {"slower": [], "faster": [], "worse": [], "better": []}
    for change in found.changes:
        for stage in WHOLE:
            one = change.times.get(stage)
            if one is not None and one.distinguishable:
                kind = "slower" if one.ratio.estimate > 1 else "faster"
                table[kind].append(f"{change.label} {one.verdict} to the {sides.TIMED[stage]}")
        for pair in change.answers:
            word = pair.verdict.partition(",")[0]
            if word in ("worse", "better"):
                task = f" on {pair.task}" if pair.task else ""
                gap = formats.points(pair.difference.estimate if pair.difference else None)
                table[word].append(f"{change.label} {word} by {gap} points{task}")
    return table


def summary_lines(found: sides.SideBySide) -> list[str]:
    """What changed, in sentences."""
    table = moved(found)
    timed = sum(bool(change.times) for change in found.changes)
    answered = sum(bool(change.answers) for change in found.changes)
    few = sum(one.verdict.startswith("too few") for change in found.changes for one in _whole(change))
    unclear = f"too few rounds to tell in {few} of {sum(len(_whole(change)) for change in found.changes)} comparisons"
    lines = []
    for (bad, good), n, what, none in (
        (("slower", "faster"), timed, "Times", unclear if few else "not distinguishable in any"),
        (("worse", "better"), answered, "Answers", "not distinguishable in any"),
    ):
        words = table[bad] + table[good]
        if not n:
            lines.append(f"{what}: no build was measured in both runs.")
        else:
            builds = "build" if n == 1 else "builds"
            lines.append(f"{what} of {n} {builds}: {'; '.join(words) or none}.")
    if timed and (other := sides.unlike(found)):
        lines.append(f"Beware: {', '.join(other)} differ between the runs, so their times are not like for like.")
    return lines


def _whole(change: sides.Change) -> list[LatencyComparison]:
    return [one for stage, one in change.times.items() if stage in WHOLE]


def medians(change: sides.Change, stage: str) -> str:
    """Medians of one stage from A to B, in ms; a rate as the time of one token."""
    values = [row.stages.get(stage) for row in (change.a, change.b)]
    if stage == "decode_tokens_per_s":
        values = [1000 / value if value else None for value in values]
    return " → ".join(formats.ms(value) for value in values)


def _no_pooling(results: Sequence[Path], read: Mapping[Path, Sequence[Sample]]) -> str:
    """Raise UsageError if joining the files would pool two runs of one measurement; else nothing to say."""
    for k, path in enumerate(results):
        for other in results[:k]:
            if why := sides.overlap(read[other], read[path]):
                raise UsageError(
                    f"{other} and {path} can't be joined: {why}",
                    "name these two alone, or one of them with --against, to see them side by side",
                )
    return ""


def _no_training(training: Sequence[Path]) -> None:
    if training:
        raise UsageError("--training goes with one run's results", "for the trainings alone leave the results out")


def _limits(budget: str | Budget | Mapping[str, float] | None) -> Mapping[str, float]:
    parsed = parse_budget(budget) if isinstance(budget, str) and budget else budget
    return parsed.limits if isinstance(parsed, Budget) else parsed if isinstance(parsed, Mapping) else {}


def _title(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _command(
    files: Sequence[Path],
    budget: str,
    out: Path,
    images: Path | None = None,
    against: Path | None = None,
    training: Sequence[Path] = (),
) -> str:
    """How to make this page again; files by their names, for where they lie is nobody's business."""
    words = ["tinyllava-edge", "report", *(path.name for path in files)]
    words += ["--against", against.name] if against is not None else []
    words += ["--images", images.resolve().name or "."] if images is not None else []
    words += [word for path in training for word in ("--training", path.name)]
    words += ["--budget", budget] if budget else []
    return shlex.join([*words, "-o", out.name])
