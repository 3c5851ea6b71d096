"""`report` with files: joined, side by side, with a budget; what a browser shows on a phone and in print."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinyllava_edge.benchmarks import side_by_side as sides
from tinyllava_edge.benchmarks import side_draw
from tinyllava_edge.benchmarks.budget import QUANTITIES, parse_budget
from tinyllava_edge.benchmarks.report_commands import summary_lines, write_report
from tinyllava_edge.benchmarks.results import Sample, write_results
from tinyllava_edge.benchmarks.summary import summarise
from tinyllava_edge.errors import DataError, UsageError

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x^{2$&amp;{{ 7*7 }}"


def again(samples: list[Sample], slower: float = 1.0, build: str = "int8+q8_0", seed: int = 5) -> list[Sample]:
    """The same measurements once more, with noise of their own; one build slower by a factor."""
    rng = random.Random(seed)
    return [
        replace(s, value=(s.value or 0.0) * rng.lognormvariate(0, 0.02) * (slower if s.build == build else 1.0))
        if s.kind == "latency"
        else s
        for s in samples
    ]


@pytest.fixture(scope="module")
def files(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs, the second slower in one build; and the first in two halves."""
    root = tmp_path_factory.mktemp("runs")
    wrong = next(s for s in samples if s.kind == "answer" and s.build == "int8+f16")
    changed = {**wrong.detail, "given": "something else", "id": wrong.detail["id"]}
    worse = [replace(s, detail=changed) if s is wrong else s for s in again(samples, 1.15)]
    parts = {
        "a": samples,
        "b": [s for s in worse if s.build != "fp32+q8_0"],
        "answers": [s for s in samples if s.kind == "answer"],
        "times": [s for s in samples if s.kind != "answer"],
    }
    for name, lines in parts.items():
        write_results(root / f"{name}.jsonl", lines)
    return {name: root / f"{name}.jsonl" for name in parts}


def test_files_that_complete_each_other_are_joined(
    files: dict[str, Path], samples: list[Sample], tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    assert write_report([files["answers"], files["times"]], out) == "ship int8+q8_0"
    text = out.read_text(encoding="utf-8")
    assert (
        "tinyllava-edge report answers.jsonl times.jsonl -o report.html\n" in text
        and str(files["a"].parent) not in text
    )
    assert out.with_suffix(".md").is_file() and out.with_suffix(".png").is_file()
    assert f"Computed from {len(samples):,} raw samples" in text


def test_nothing_that_is_read_or_foreign_is_overwritten(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("run.md", "run.html", "run.png"):
        source = tmp_path / name
        shutil.copy(files["a"], source)
        with pytest.raises(UsageError, match="would overwrite"):
            write_report([source], tmp_path / "run.html")
        assert source.read_bytes() == files["a"].read_bytes()
        source.unlink()
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"README\.md: stands there"):
        write_report([files["a"]], tmp_path / "README.html")
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "README.html").exists()


def test_a_stamp_without_checks_has_no_parity_table(samples: list[Sample], tmp_path: Path) -> None:
    def stripped(sample: Sample) -> Sample:
        return replace(sample, detail={"passed": True}) if sample.kind == "verify" else sample

    write_results(tmp_path / "plain.jsonl", [stripped(sample) for sample in samples])
    assert write_report([tmp_path / "plain.jsonl"], tmp_path / "report.html") == "ship int8+q8_0"
    assert 'id="parity"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_budget_decides(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    spoken = "ttft=19ms,size=10MB,drop=0.5,rss=0.135GB"
    assert write_report([files["a"]], out, budget=spoken) == "ship int8+q8_0"
    text = " ".join(out.read_text(encoding="utf-8").split())
    assert "time to first token ≤ 19.0 ms" in text and "For this budget" in text
    assert "<dt>fp32+f16</dt> <dd>time to first token 26.4 ms, allowed 19.0 ms; size on disk 12.0 MB" in text
    assert "--budget ttft=19ms,size=10MB,drop=0.5,rss=0.135GB" in text
    assert write_report([files["a"]], out, budget=parse_budget("size=1MB")) == "ship none"
    assert write_report([files["a"]], out, budget={"energy": 5.0}) == "ship none"
    assert "its energy of an answer was not measured" in out.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="budget part 'speed=3'"):
        write_report([files["a"]], out, budget="speed=3")
    with pytest.raises(UsageError, match="budget names 'speed'"):
        write_report([files["a"]], out, budget={"speed": 3.0})


def test_two_runs_are_seen_as_two_runs(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    said = write_report([files["a"], files["b"]], out)
    assert re.search(r"int8\+q8_0 slower by 1[3-7]\.\d % to the first token", said)
    text = " ".join(out.read_text(encoding="utf-8").split())
    assert "B is worse in places" in text and "both hold latency of" in text and "a.jsonl → b.jsonl" in text
    assert "Only in A: fp32+q8_0" in text and "1 of 600 answers differ" in text
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| int8+q8_0 | slower by" in table and "the same answers" in table
    named = write_report([files["a"]], tmp_path / "against.html", against=files["b"])
    assert named == said and out.with_suffix(".png").is_file()
    assert "Shown side by side because" not in (tmp_path / "against.html").read_text(encoding="utf-8")


def test_the_same_build_measured_twice_is_not_distinguishable(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the runs the machine became 2 % slower, which test and interval see: only the margin holds it back."""
    rng = random.Random(3)
    quiet = [
        replace(s, value=20 * rng.lognormvariate(0, 0.002)) if s.kind == "latency" and s.stage == "ttft_ms" else s
        for s in samples
    ]
    slower = [
        replace(s, value=20.4 * rng.lognormvariate(0, 0.002)) if s.kind == "latency" and s.stage == "ttft_ms" else s
        for s in samples
    ]
    found = sides.side_by_side(quiet, slower, names=("A", "B"))
    assert len(found.changes) == 6 and found.alone == ((), ()) and found.setting == ()
    verdicts = {change.times["ttft_ms"].verdict for change in found.changes if "ttft_ms" in change.times}
    assert verdicts == {"not distinguishable"} and len(side_draw.timed(found)) == 5
    monkeypatch.setattr("tinyllava_edge.benchmarks.latency_compare.MARGIN", 0.0)
    bare = sides.side_by_side(quiet, slower, names=("A", "B"))
    called = [change.times["ttft_ms"].verdict for change in bare.changes if "ttft_ms" in change.times]
    assert len(called) == 5 and all(verdict.startswith("slower by") for verdict in called)
    assert {pair.verdict for change in found.changes for pair in change.answers} == {"the same answers"}


def test_answers_are_paired_and_adjusted(samples: list[Sample]) -> None:
    """B's int8+f16 answers as q4_k_m did: 3 points worse, and Holm counts all six rows."""
    other = {s.detail["id"]: s.detail for s in samples if s.kind == "answer" and s.build == "int8+q4_k_m"}
    lost = [
        replace(s, detail=other[s.detail["id"]]) if s.kind == "answer" and s.build == "int8+f16" else s for s in samples
    ]
    lost = [replace(s, value=None) if s.kind == "answer" else s for s in lost]
    found = sides.side_by_side(samples, lost)
    (pair,) = next(change for change in found.changes if change.b.build == "int8+f16").answers
    assert pair.verdict == "worse" and pair.difference is not None and pair.difference.estimate < -2
    assert pair.p_value is not None and pair.p_holm == pytest.approx(6 * pair.p_value)


def test_what_cannot_be_compared_is_said(samples: list[Sample]) -> None:
    few = [s for s in samples if s.kind != "answer" or s.detail["id"] not in ("q1", "q2")]
    few = [s for s in few if s.stage != "ttft_ms" or s.sample == 0 or s.build != "fp32+f16"]
    machine = next(s for s in samples if s.kind == "environment")
    other = replace(machine, detail={**machine.detail, "cpu": {"model": HOSTILE}})
    found = sides.side_by_side(samples, [other if s.kind == "environment" else s for s in few])
    notes = [note for change in found.changes for note in change.notes]
    assert sum("answered in one run only" in note for note in notes) == 6
    assert any(note.startswith("first token: 1 latencies") for note in notes)
    assert found.setting[0][0] == "cpu" and HOSTILE in found.setting[0][2]


def test_times_of_unlike_runs_are_marked(files: dict[str, Path], samples: list[Sample], tmp_path: Path) -> None:
    bigger = [
        replace(s, detail={**s.detail, "image_size": "640x480"}) if s.stage == "ttft_ms" else s for s in again(samples)
    ]
    machine = next(s for s in samples if s.kind == "environment")
    four = replace(machine, detail={**machine.detail, "runtime": {"n_threads": 4}})
    write_results(tmp_path / "b.jsonl", [four if s.kind == "environment" else s for s in bigger])
    said = write_report([files["a"], tmp_path / "b.jsonl"], tmp_path / "r.html")
    assert said.endswith(
        "Beware: threads, picture's size differ between the runs, so their times are not like for like."
    )
    other = [
        replace(s, detail={**s.detail, "prompt_sha256": "ab"}) if s.stage == "ttft_ms" else s for s in again(samples)
    ]
    asked = [replace(s, detail={**s.detail, "prompt_sha256": "cd"}) if s.stage == "ttft_ms" else s for s in samples]
    assert sides.unlike(sides.side_by_side(asked, other)) == ["question"]


def test_a_busier_machine_is_named(samples: list[Sample]) -> None:
    """The load before or after one of the runs was another one; a small difference is none."""

    def loaded(lines: list[Sample], before: float, after: float) -> list[Sample]:
        spans = (("before", before), ("after", after))
        return [*lines, *(Sample("condition", stage=s, detail={"load_average": [load, 1.0, 1.0]}) for s, load in spans)]

    few = [s for s in samples if s.kind in ("environment", "latency") and s.build in ("", "int8+f16")]
    calm = loaded(few, 0.2, 1.1)
    busy = sides.side_by_side(calm, loaded(again(few), 5.3, 6.0))
    assert ("load", "0.20 → 1.10", "5.30 → 6.00") in busy.setting and sides.unlike(busy) == ["load"]
    assert sides.unlike(sides.side_by_side(calm, loaded(again(few), 0.4, 1.3))) == []
    assert any("load differ between the runs" in line for line in summary_lines(busy))


def test_too_few_rounds_are_said(samples: list[Sample]) -> None:
    few = [s for s in samples if s.kind == "latency" and s.build == "int8+f16" and s.sample < 3]
    (words, *_) = summary_lines(sides.side_by_side(few, again(few, 2.0, "int8+f16")))
    assert words == "Times of 1 build: too few rounds to tell in 1 of 1 comparisons."


def test_what_the_drawing_shows(samples: list[Sample]) -> None:
    """A ratio of medians, or of rounds: the axis claims neither."""
    few = [s for s in samples if s.kind == "latency" and s.build == "int8+f16"]
    drawing = side_draw.ratio_svg(sides.side_by_side(few, again(few)))
    assert "change of the time from A to B" in drawing and "median" not in drawing


def test_the_page_says_how_it_was_made(files: dict[str, Path], samples: list[Sample], tmp_path: Path) -> None:
    """Every flag that shapes it, and what verified the builds; where files lie stays unsaid."""
    verified = {"int8+f16": {"passed": True, "checks": [], "samples": 1, "command": "tinyllava-edge verify B"}}
    lines = [
        replace(s, detail={**s.detail, "verified": verified}) if s.kind == "bundle" else s
        for s in samples
        if s.kind in ("bundle", "command", "environment", "size")
    ]
    (tmp_path / "my pictures").mkdir()
    write_results(tmp_path / "a.jsonl", lines)
    write_report([tmp_path / "a.jsonl"], tmp_path / "my.html", tmp_path / "my pictures", budget="size=9MB")
    text = (tmp_path / "my.html").read_text(encoding="utf-8")
    typed = text.partition("<h3>Every command</h3>")[2].partition("</pre>")[0]
    own = "tinyllava-edge report a.jsonl --images &#39;my pictures&#39; --budget size=9MB -o my.html\n"
    assert own in typed and str(tmp_path) not in typed
    assert typed.index("tinyllava-edge verify B") < typed.index("tinyllava-edge bench") < typed.index(own)


def test_help_names_every_limit_of_a_budget() -> None:
    from tinyllava_edge.cli import app

    said = CliRunner().invoke(app, ["report", "--help"]).output
    assert all(f"{name}=" in said for name in QUANTITIES)


def test_overlap_is_of_the_same_measurement(samples: list[Sample]) -> None:
    times = [s for s in samples if s.kind == "latency"]
    assert sides.overlap(times, again(times)) == "both hold latency of fp32+f16 on cpu"
    assert sides.overlap(times, [replace(s, target="ssh://pi") for s in times]) == ""
    answers = [s for s in samples if s.kind == "answer"]
    assert sides.overlap(answers[::2], answers[1::2]) == ""  # shards of one run
    assert sides.overlap(answers[:5], answers[4:]) == "both hold answers of the reference on cpu"
    assert sides.overlap([s for s in samples if s.kind in ("size", "bundle", "verify")], samples) == ""


def test_refusals(files: dict[str, Path], samples: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    third = tmp_path / "c.jsonl"
    write_results(third, samples)
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([files["a"]], {"out": tmp_path / "r.txt"}, "no HTML file's name"),
        ([], {}, "no results file"),
        ([files["a"], files["a"]], {}, "named twice"),
        ([files["a"]], {"against": files["a"]}, "named twice"),
        ([files["a"], files["b"], third], {}, "can't be joined: both hold latency"),
        ([files["a"], files["b"]], {"against": third}, "can't be joined"),
    ]
    for results, more, words in cases:
        with pytest.raises(UsageError, match=words):
            write_report(results, **{"out": out, **more})
    write_results(third, [replace(s, build=f"{s.build}x") if s.build else s for s in samples])
    with pytest.raises(UsageError, match="no build in common"):
        write_report([files["a"]], out, against=third)
    third.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.jsonl:1"):
        write_report([files["a"]], out, against=third)
    assert not out.exists()


def test_hostile_strings_side_by_side(samples: list[Sample], tmp_path: Path) -> None:
    evil = [replace(s, build=s.build.replace("q8_0", HOSTILE), target=HOSTILE) for s in samples]
    evil = [replace(s, detail={"command": HOSTILE}) if s.kind == "command" else s for s in evil]
    one, two = tmp_path / "<b>&.jsonl", tmp_path / "`|`.jsonl"
    write_results(one, evil)
    write_results(two, again(evil, 1.3, build=f"int8+{HOSTILE}"))
    write_report([one, two], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "<b>&" not in text and "{{ 7*7 }}" in text
    rows = (tmp_path / "r.md").read_text(encoding="utf-8").splitlines()
    assert "<script" not in "".join(rows)
    assert len({re.sub(r"\\.", "", row).count("|") for row in rows if row.startswith("|")}) == 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(files: dict[str, Path], pictures: Path) -> dict[str, Path]:
    """A report with a budget and one of two runs."""
    found = {name: files["a"].with_name(f"{name}.html") for name in ("report", "sides")}
    write_report([files["a"]], found["report"], images=pictures, budget="ttft=19ms,size=10MB,drop=0.5,rss=0.135GB")
    write_report([files["a"], files["b"]], found["sides"])
    return found


@pytest.mark.parametrize("name", ["report", "sides"])
@pytest.mark.parametrize(("width", "media"), [(360, "screen"), (1200, "screen"), (680, "print")])
def test_no_page_scrolls_sideways(browser: Any, pages: dict[str, Path], name: str, width: int, media: str) -> None:
    """On a phone, a laptop and A4 the page is no wider than its sheet; wide tables scroll inside their frame."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.emulate_media(media=media)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[name].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    if media == "print":  # what stands in a frame that scrolls would be cut off on paper
        cut = page.evaluate("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > innerWidth).length")
        assert cut == 0 and page.evaluate("document.querySelectorAll('details.data').length") == (name == "report") * 6
        assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()


def test_the_decision_is_on_the_first_screen_and_frames_take_the_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 640})
    page.goto(pages["report"].as_uri())
    assert page.locator("#decision").bounding_box()["y"] < 400
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll')].every(e => e.tabIndex == 0 && e.getAttribute('role'))"
    )
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    named = page.evaluate(
        "[...document.querySelectorAll('[aria-labelledby]')].map(e => e.getAttribute('aria-labelledby'))"
    )
    assert len(set(ids)) == len(ids) and set(named) <= set(ids)
    marks = page.locator("svg title").all_text_contents()
    assert any(text.startswith("int8+q8_0: 96.0 %") for text in marks)
    page.close()


def test_the_summary_of_a_joined_file_is_that_of_its_parts(files: dict[str, Path], samples: list[Sample]) -> None:
    parts = [s for s in samples if s.kind == "answer"] + [s for s in samples if s.kind != "answer"]
    assert summarise(parts).decision == summarise(samples).decision
