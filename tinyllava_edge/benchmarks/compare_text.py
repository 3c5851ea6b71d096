"""A comparison as a table for people."""

from __future__ import annotations

from tinyllava_edge.benchmarks.compare import Comparison
from tinyllava_edge.benchmarks.paired import MCNEMAR, NOT_SHOWN, SIGN_FLIP, Paired

NONE = "–"
_SCORES = "score: mean over the questions, not the benchmark's headline (F1, circular accuracy, MME's points)"
_HEAD = (
    "task",
    "build",
    "n",
    "groups",
    "score",
    "change",
    "interval",
    "SE",
    "flips",
    "changed",
    "identical",
    "p",
    "Holm",
)


def comparison_text(comparison: Comparison) -> str:
    """One line per build and task, then what each line means. Scores and changes are in points of percent."""
    rows = [_cells(row) for row in comparison.rows]
    widths = [max(len(line[k]) for line in [_HEAD, *rows]) for k in range(len(_HEAD))]
    lines = [f"reference: {comparison.reference}; intervals at {100 * comparison.confidence:g} %", _SCORES, ""]
    lines += ["  ".join(_pad(cell, width, k) for k, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
              for line in [_HEAD, *rows]]  # fmt: skip
    lines.append("")
    for row in comparison.rows:
        lines.append(f"{_name(row)}: {row.verdict}")
        lines += [f"  {note}" for note in notes(row)]
    lines += [f"not compared: {sentence}" for sentence in comparison.absent]
    return "\n".join(lines) + "\n"


def notes(row: Paired) -> list[str]:
    """What else is known of a row: its test, the allowed drop, the margins of the flips, the noise floor."""
    found = []
    if row.reference_score is not None:
        found.append(
            f"reference {row.reference_score:.2f}; {row.test}, Holm over all lines; protocol {row.protocol or NONE}"
        )
        if row.test == MCNEMAR and row.groups < row.scored:
            found.append(
                f"several questions a picture, which {MCNEMAR} ignores: {SIGN_FLIP} gives p {_p(row.p_pictures)}"
            )
    if row.gate is not None:
        bounds = f"one-sided bounds {_signed(row.gate.low)} and {_signed(row.gate.high)}"
        found.append(f"a drop of {row.gate.allowed:g} points: {row.gate.verdict} ({bounds})")
        if row.gate.verdict == NOT_SHOWN:
            found[-1] += (
                f"; {row.gate.needed:,} questions would decide" if row.gate.needed else "; too few pictures or labels"
            )
    known, noisy = row.margins
    if known:
        found.append(f"{noisy} of {known} flips start at a token whose margin is below 0.001: numeric noise")
    if row.noise is not None:
        floor = row.noise
        found.append(f"noise floor, {floor.of} twice: {floor.changed} of {floor.n:,} answers changed, "
                     f"{floor.worse} worse, {floor.better} better")  # fmt: skip
    return found


def _cells(row: Paired) -> tuple[str, ...]:
    gap = row.difference
    labelled = row.build_score is not None
    return (
        row.task or NONE,
        row.build,
        f"{row.n:,}",
        f"{row.groups:,}" if labelled else NONE,
        f"{row.build_score:.2f}" if row.build_score is not None else NONE,
        _signed(gap.estimate if gap else None),
        f"{_signed(gap.low)} to {_signed(gap.high)}" if gap else NONE,
        f"{row.standard_error:.2f}" if row.standard_error is not None else NONE,
        f"{row.worse} worse, {row.better} better" if labelled else NONE,
        f"{100 * row.changed / row.n:.1f} %",
        f"{100 * row.identical / row.n:.1f} %",
        _p(row.p_value),
        _p(row.p_holm),
    )


def _name(row: Paired) -> str:
    return f"{row.task} {row.build}" if row.task else row.build


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _signed(value: float | None) -> str:
    if value is None:
        return NONE
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", "−")


def _p(value: float | None) -> str:
    return NONE if value is None else "<.001" if value < 0.001 else f"{value:.3f}"
