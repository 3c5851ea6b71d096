"""Which build is faster: decided round by round, in the decision, the page and the Markdown table."""

from __future__ import annotations

import html
import random
from dataclasses import replace

import pytest

from tinyllava_edge.benchmarks import report, report_speed, report_tables
from tinyllava_edge.benchmarks.latency_compare import PAIRED
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary import Summary, summarise

FACTORS = {"int8+q8_0": 1.0, "int8+f16": 0.95}  # of the two builds that this is about; all others take twice as long


def measured(samples: list[Sample], rounds: int = 40, factor: float = FACTORS["int8+f16"]) -> list[Sample]:
    """Two builds of one run on a machine that is up to twice as slow in one round as in another."""
    rng = random.Random(11)
    pace = [rng.lognormvariate(0, 0.35) for _ in range(rounds)]
    kept = [s for s in samples if s.kind != "latency"]
    for build in {s.build: None for s in samples if s.kind == "latency"}:
        scale = {**FACTORS, "int8+f16": factor}.get(build, 2.0)
        for number, slow in enumerate(pace):
            for stage, ms in (("ttft_ms", 20.0), ("total_ms", 50.0)):
                value = ms * slow * scale * rng.lognormvariate(0, 0.01)
                kept.append(Sample("latency", "edge", build, stage, value, "ms", number, "e1", detail={"run": "r1"}))
    return kept


@pytest.fixture(scope="module")
def summary(samples: list[Sample]) -> Summary:
    return summarise(measured(samples))


def test_overlapping_intervals_hide_nothing(summary: Summary) -> None:
    """The decision names the build that is 5 % faster, though the rounds scatter by a third."""
    rows = {row.build: row for row in summary.builds}
    slow, quick = rows["int8+q8_0"].ttft, rows["int8+f16"].ttft
    assert slow is not None and quick is not None and quick.high > slow.low  # what single intervals can't tell
    assert summary.decision.build == "int8+q8_0"
    said = next(reason for reason in summary.decision.reasons if "first token" in reason)
    assert said.startswith("int8+f16 is faster by ")
    percent = float(said.removeprefix("int8+f16 is faster by ").split()[0])
    assert 4 < percent < 6


def test_equal_builds_are_not_called(samples: list[Sample]) -> None:
    equal = summarise(measured(samples, factor=1.0)).decision.reasons[-1]
    assert equal.startswith("None of them is measurably faster: ") and "99 % interval" in equal
    slower = summarise(measured(samples, factor=1.1)).decision.reasons[-1]
    assert slower.startswith("It is also the fastest of them: ")


def test_three_rounds_say_nothing(samples: list[Sample]) -> None:
    few = summarise(measured(samples, rounds=3, factor=0.5))
    assert few.decision.reasons[-1].startswith("Too few answers were timed")
    assert not any("faster" in reason for reason in few.decision.reasons)
    assert "too few rounds" in report_tables.markdown_table(few)
    one = summarise(measured(samples, rounds=1))
    assert one.decision.reasons[-1].startswith("Too few answers") and report_speed.how(report_speed.speeds(one)) == ""
    assert "ratio" not in report_tables.markdown_table(one)


def test_every_row_stands_beside_the_build_to_ship(samples: list[Sample], summary: Summary) -> None:
    found = report_speed.speeds(summary)
    base = found["cpu", "edge", "int8+q8_0"]
    assert base.is_base and base.cell() == "base" and {speed.base for speed in found.values()} == {"int8+q8_0"}
    other = found["cpu", "edge", "int8+f16"].times["ttft_ms"]
    assert other.method == PAIRED and other.n == (40, 40) and other.ratio.estimate == pytest.approx(0.95, abs=0.01)
    lines = report_tables.markdown_table(summary).splitlines()
    place = [cell.strip() for cell in lines[0].split("|")].index("TTFT, ratio")
    cells = {line.split("|")[1].strip(" *"): line.split("|")[place].strip() for line in lines[2:]}
    assert cells["int8+q8_0"] == "base" and cells["int8+f16"].endswith("%") and "faster by" in cells["int8+f16"]
    assert "), slower by 9" in cells["fp32+f16"] or "), slower by 10" in cells["fp32+f16"]
    page = html.unescape(report.html(measured(samples), summary))
    assert "against the base" in page and "first token faster by" in page and "last token slower by" in page
    assert "take each answer for independent" in page
    words = " ".join(report_tables.legend(summary))
    assert "medians of 40 answers" in words and "over that of int8+q8_0" in words and "\\*: coefficient" in words


def test_without_a_build_to_ship_the_first_one_is_the_base(samples: list[Sample]) -> None:
    bare = [s for s in measured(samples) if s.kind in ("latency", "environment")]
    assert {speed.base for speed in report_speed.speeds(summarise(bare)).values()} == {"fp32+f16"}
    board = [*bare, *(replace(s, target="ssh://pi", value=9 * (s.value or 0)) for s in bare if s.kind == "latency")]
    found = report_speed.speeds(summarise(board))
    assert [key for key, speed in found.items() if speed.is_base] == [
        ("cpu", "edge", "fp32+f16"),
        ("ssh://pi", "edge", "fp32+f16"),
    ]
