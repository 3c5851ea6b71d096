"""The report: what it says, that it loads nothing, that it escapes everything, and that a browser can show it."""

from __future__ import annotations

import html.parser
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks import report, report_draw, report_flips, report_formats, report_plots
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.stats import Interval
from tinyllava_edge.benchmarks.summary import summarise
from tinyllava_edge.errors import DataError

HOSTILE = "<script>alert(1)</script>\"'><img src=http://x/y onerror=alert(2)>$x^{2$&amp;{{ 7*7 }}"


class Page(html.parser.HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster", "background"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def outside(self) -> list[str]:
        return [a for a in self.addresses if not a.startswith(("data:image/png;base64,", "#"))]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(samples: list[Sample], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    report.render_report(samples, out, images=pictures, markdown=out.with_name("t.md"), png=out.with_name("p.png"))
    return out


def test_the_decision_comes_first(page: Path) -> None:
    text = " ".join(Page(page.read_text(encoding="utf-8")).text.split())
    order = [text.index(words) for words in (
        "Ship int8+q8_0", "Accuracy against cost", "Builds", "Where the time goes",
        "Accuracy by kind of question", "pictures shuffled", "Answers that changed", "Parity with the checkpoint",
        "SHA-256", "Machine and method", "tinyllava-edge bench BUNDLE")]  # fmt: skip
    assert order == sorted(order)
    assert "int8+q4_k_m loses 3.0 points of accuracy" in text
    assert "21 turned wrong, 3 turned right" in text
    assert "12 F16, 3 Q6_K" in text and "Example CPU" in text


def test_it_loads_nothing_and_runs_nothing(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    found = Page(source)
    assert found.outside() == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags) and not found.handlers
    assert "default-src 'none'" in source and "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    assert len(source) < 1_000_000


def test_flips_carry_their_pictures(page: Path, samples: list[Sample], pictures: Path) -> None:
    source = page.read_text(encoding="utf-8")
    assert source.count('<img src="data:image/png;base64,') == 2 + 3 + 4 + 21 + 3
    bare = report.html(samples, summarise(samples))
    assert "<img" not in bare and bare.count("picture not at hand") == 33


def test_only_pictures_below_the_directory_are_embedded(pictures: Path, tmp_path: Path) -> None:
    assert report_flips.thumbnail(pictures, "test-0.png").startswith("data:image/png;base64,")
    inner = tmp_path / "inner"
    inner.mkdir()
    shutil.copy(pictures / "test-0.png", tmp_path / "secret.png")
    assert (
        report_flips.thumbnail(inner, "../secret.png")
        == ""
        == report_flips.thumbnail(inner, str(tmp_path / "secret.png"))
    )
    (inner / "text.png").write_text("not a picture")
    assert report_flips.thumbnail(inner, "text.png") == "" == report_flips.thumbnail(inner, "none.png")


def test_hostile_strings_stay_text(samples: list[Sample]) -> None:
    def poison(sample: Sample) -> Sample:
        sample = replace(sample, build=sample.build.replace("q8_0", HOSTILE))
        if sample.kind == "answer":
            return replace(sample, detail={**sample.detail, "question": HOSTILE, "question_type": HOSTILE})
        if sample.kind == "verify":
            checks = [{**check, "worst": HOSTILE, "stage": HOSTILE} for check in sample.detail["checks"]]
            return replace(sample, detail={**sample.detail, "checks": checks, "first_divergence": HOSTILE})
        if sample.kind in ("bundle", "command"):
            return replace(sample, detail={**sample.detail, "name": HOSTILE, "command": HOSTILE})
        if sample.kind == "environment":
            return replace(sample, detail={**sample.detail, "cpu": {**sample.detail["cpu"], "model": HOSTILE}})
        return sample

    poisoned = [poison(sample) for sample in samples]
    source = report.html(poisoned, summarise(poisoned))
    found = Page(source)
    assert "script" not in found.tags and "img" not in found.tags and not found.handlers and not found.outside()
    assert found.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in found.text


def test_a_report_of_little(samples: list[Sample]) -> None:
    """Any subset of the results gives a page: only latency, only answers, nothing at all."""
    for kinds in (("latency", "size"), ("answer",), ("environment", "memory"), ()):
        some = [s for s in samples if s.kind in kinds]
        text = Page(report.html(some, summarise(some))).text
        assert "Ship none of these builds" in text
    damaged = [replace(s, detail={"cpu": {}}) if s.kind == "environment" else s for s in samples]
    with pytest.raises(DataError, match="lacks something"):
        report.html(damaged, summarise(damaged))


def test_markdown_and_png(page: Path) -> None:
    lines = page.with_name("t.md").read_text(encoding="utf-8").splitlines()
    row = "| **int8+q8_0** | yes | 96.0 % (94.1 to 97.3) | 0.0 (−0.7 to +0.7) | 2 worse, 2 better |"
    assert len(lines) == 2 + 6 and lines[6].startswith(row)
    assert len({line.count("|") for line in lines}) == 1
    from PIL import Image

    with Image.open(page.with_name("p.png")) as picture:
        assert picture.format == "PNG" and picture.width > 3 * 600


def test_frontier_keeps_what_no_other_build_beats() -> None:
    def point(name: str, x: float, y: float) -> report_plots.Point:
        return report_plots.Point(name, "q", "v", Interval(x, x, x), Interval(y, y, y), False)

    points = [
        point("slow", 9, 90),
        point("best", 5, 95),
        point("tie", 5, 94),
        point("small", 1, 80),
        point("dear", 6, 95),
    ]
    assert [p.label for p in report_plots.frontier(points)] == ["small", "best"]


def test_plots_name_every_build_and_follow_the_pages_colors(samples: list[Sample]) -> None:
    found = report_plots.plots(summarise(samples))
    assert [plot.name for plot in found] == ["ttft", "size", "memory"]
    for plot in found:
        text = report_draw.svg(plot)
        root = ET.fromstring(text)
        titles = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}title")]
        assert [title.split(":")[0] for title in titles] == [point.label for point in plot.points]
        assert "var(--series0)" in text and not re.search(r"#fe[0-9a-f]{4}", text)
        assert text == report_draw.svg(plot)


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (report_formats.points(-0.04), "0.0"),
        (report_formats.points(-1.25), "−1.2"),
        (report_formats.share(0.99999), "99.99"),
        (report_formats.share(1.0), "100"),
        (report_formats.tiny(1.2e-7), "1.2e-7"),
        (report_formats.tiny(0.0), "0"),
        (report_formats.ms(7.123), "7.12"),
        (report_formats.ms(1234.5), "1,234"),
        (report_formats.mega(None), "–"),
    ],
)
def test_formats(got: str, wanted: str) -> None:
    assert got == wanted
