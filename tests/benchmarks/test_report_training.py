"""The training part of a report: runs overlaid, values from the files alone, hostile files, phone, laptop and paper."""

from __future__ import annotations

import html.parser
import json
import math
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava_edge.benchmarks.report_commands import write_report
from tinyllava_edge.benchmarks.report_training import training_section, write_training_page
from tinyllava_edge.benchmarks.report_training_draw import window
from tinyllava_edge.benchmarks.results import Sample, write_results
from tinyllava_edge.errors import DataError, UsageError
from tinyllava_edge.train.curves import read_trainings, smooth, thin

HOSTILE = "<script>alert(1)</script>\"'><img src=http://x/y onerror=alert(2)>$x^{2$&amp;{{ 7*7 }}\x1b[31m"


def training(out: Path, source: str, stage: str, steps: int = 120, start: float = 3.0, **changes: Any) -> Path:
    """Files of a finished training, as `train` writes them."""
    rng = random.Random(out.name + stage)
    out.parent.mkdir(parents=True, exist_ok=True)
    losses = [start * math.exp(-4 * k / steps) + 0.1 + 0.05 * rng.random() for k in range(steps)]
    recipe = {"name": stage, "learning_rate": 1e-3, "lr_scheduler": "cosine", "batch_size": 24, "epochs": 2.0}
    recipe |= {"micro_batch": 8, "gradient_checkpointing": stage == "finetune"}
    record = {
        "checkpoint": str(out), "source": source, "source_sha256": "0" * 64, "recipe": recipe, "precision": "bf16",
        "data": ["/secret/place/answers.json"], "data_sha256": "1" * 64, "rows": 48248, "packs": 4000, "bad_rows": 7,
        "steps": steps, "resumed_from": 40, "seconds": 4000.0, "images_per_s": 250.4, "tokens_per_s": 31000.0,
        "mfu": 0.382, "memory_bytes": 21_500_000_000, "devices": 2, "final_loss": losses[-1], "losses": losses,
        "parts": {"tower": {"parameters": 2_000_000, "trainable": 0},
                  "connector": {"parameters": 115_000, "trainable": 115_000},
                  "llm": {"parameters": 2_920_000, "trainable": 693_000}},
        "stopped_early": "", "score": {"rows": 200, "exact": 191, "loss": 0.0421},
        "versions": {"tinyllava_edge": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    } | changes  # fmt: skip
    write(out, "train.json", json.dumps(record))
    entries = [
        {"step": k, "epoch": k / 60, "loss": loss, "lr": 1e-3 * (1 - k / steps), "grad_norm": 1.0,
         "images_per_s": 250.0, "tokens_per_s": 31000 + 500 * rng.random(), "mfu": 0.38,
         "hfu": 0.5, "memory_bytes": 1e9, "seconds": 2.0 * k}
        for k, loss in enumerate(losses, 1)
    ]  # fmt: skip
    write(out, "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    answers = [
        {"step": step, "sample": k, "question": f"what color is {k}?", "expected": "red", "picture": f"{k}.png",
         "answer": "red" if step > 40 * k else f"blue at {step}"}
        for step in range(10, steps + 1, 10) for k in range(3)
    ]  # fmt: skip
    write(out, "samples.jsonl", "".join(json.dumps(entry) + "\n" for entry in answers))
    return out.parent / f"{out.name}.train.json"


def write(out: Path, name: str, text: str) -> None:
    (out.parent / f"{out.name}.{name}").write_text(text, encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.names: list[str] = []
        self.words = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data

    @property
    def text(self) -> str:
        return " ".join(self.words.split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """base and share: both from one stage 1, which lies beside base; share's own middle stage lies beside share."""
    root = tmp_path_factory.mktemp("runs")
    training(root / "base" / "stage-1", "base/init", "pretrain", score=None, checkpoint="base/stage-1")
    base = training(root / "base" / "out", "base/stage-1", "finetune", checkpoint="base/out")
    training(root / "share" / "stage-2", "base/stage-1", "share-pretrain", checkpoint="share/stage-2")
    share = training(root / "share" / "out", "share/stage-2", "finetune", 200, checkpoint="share/out")
    return [base, share]


def test_earlier_stages_are_found_and_runs_are_told_apart(runs: list[Path]) -> None:
    found = read_trainings(runs)
    assert [(one.label, one.stage, one.run) for one in found] == [
        ("stage-1", "pretrain", "base/out, share/out"),
        ("base/out", "finetune", "base/out"),
        ("stage-2", "share-pretrain", "share/out"),
        ("share/out", "finetune", "share/out"),
    ]
    assert [len(one.log) for one in found] == [120, 120, 120, 200]


def test_a_page_says_what_the_files_say(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "training.html"
    said = write_training_page(runs, out)
    page = Page(out)
    assert said.startswith("share/out: loss 0.1") and said.endswith("held-out answers exact: 95.5 % (191 of 200)")
    for words in (
        "base/out, share/out", "1 h 06 min", "48,248 in 4,000 sequences", "bad rows7", "24 (8 at once, 2 devices)",
        "frozen (2 M)", "trained (115 k)", "693 k of 2.92 M trained", "250", "31,000", "38.2 %", "21,500 MB", "0.042",
        "120 (resumed at 40)", "tinyllava_edge 0.1.0, torch 2.13.0", "expected: red", "blue at 10", "answers.json",
        "computes again are no work here", "step 200",
    ):  # fmt: skip
        assert words in page.text, words
    assert "/secret/" not in page.source
    drawings = [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page.source, re.S)]
    assert len(drawings) == 3 * 4  # loss, learning rate, throughput and the loss over logarithmic steps
    titles = [node.text or "" for node in drawings[4].iter("{http://www.w3.org/2000/svg}title")]
    assert [title.partition(":")[0] for title in titles] == ["base/out", "share/out"]
    colors = set(re.findall(r"stroke: var\(--(series\d)\)", page.source))
    assert colors == {"series0", "series1", "series2"}
    assert not re.search(r"#fe[0-9a-f]{4}", page.source)
    assert not {"script", "link", "iframe", "object", "img", "base"} & set(page.tags)
    assert not [name for name in page.names if name.startswith("on") or name in ("src", "action", "data")]


def test_it_stands_in_a_report_of_results(samples: list[Sample], runs: list[Path], tmp_path: Path) -> None:
    results, out = tmp_path / "results.jsonl", tmp_path / "report.html"
    write_results(results, samples)
    assert write_report([results], out, training=runs[:1]) == "ship int8+q8_0"
    text = Page(out).text
    assert text.index("Accuracy by kind of question") < text.index("Sample answers of out") < text.index("SHA-256")
    assert "--training out.train.json" in text
    assert write_report([], tmp_path / "alone.html", training=runs[:1]).startswith("out: loss")
    with pytest.raises(UsageError, match="--training alone"):
        write_report([], tmp_path / "alone.html", training=runs[:1], budget="drop=1")
    with pytest.raises(UsageError, match="one run's results"):
        write_report([results], out, against=runs[0], training=runs[:1])


def test_a_running_training_and_an_old_record(tmp_path: Path) -> None:
    path = training(tmp_path / "c", "init", "pretrain")
    record = json.loads(path.read_text())
    path.unlink()
    (running,) = read_trainings([tmp_path / "c.log.jsonl"])
    assert (running.stage, running.record, len(running.log)) == ("", {}, 120)
    out = tmp_path / "t.html"
    assert write_training_page([tmp_path / "c.log.jsonl"], out) == "c: 120 steps so far"
    assert "c (running)" in Page(out).text
    (tmp_path / "c.log.jsonl").unlink()
    with pytest.raises(DataError, match=r"c\.log\.jsonl: can't be read"):
        read_trainings([tmp_path / "c.log.jsonl"])
    old = {key: record[key] for key in record if key not in ("tokens_per_s", "mfu", "memory_bytes", "devices", "parts")}
    path.write_text(json.dumps(old))
    (one,) = read_trainings([path])
    assert [entry["loss"] for entry in one.log] == record["losses"]
    write_training_page([path], out)
    text = Page(out).text
    assert "MFU 38" not in text and "final loss" in text and "tokens/s –" not in text


def test_the_log_of_another_training_is_not_taken(tmp_path: Path) -> None:
    path = training(tmp_path / "c", "init", "pretrain", 50)
    log = (tmp_path / "c.log.jsonl").read_text()
    training(tmp_path / "c", "init", "pretrain", 50, 5.0)
    (tmp_path / "c.log.jsonl").write_text(log)
    (one,) = read_trainings([path])
    assert one.log[0]["loss"] == json.loads(path.read_text())["losses"][0] and "lr" not in one.log[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "no record of a training"),
        ("[" * 100_000, "not valid JSON"),
        ('{"checkpoint": 3}', "checkpoint is missing or of another type"),
    ],
)
def test_files_that_are_no_records(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.train.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as wrong:
        read_trainings([path])
    assert "c.train.json" in wrong.value.message and wrong.value.hint


def test_other_misuse(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training's file"):
        read_trainings([tmp_path / "results.jsonl"])
    with pytest.raises(UsageError, match="named twice"):
        read_trainings([runs[0], runs[0].parent / "." / runs[0].name])
    with pytest.raises(UsageError, match="no HTML file"):
        write_training_page(runs, tmp_path / "x.pdf")
    path = training(tmp_path / "c", "init", "pretrain", parts={"tower": 3})
    with pytest.raises(DataError, match=r"c\.train\.json: lacks something"):
        training_section([path])
    circle = training(tmp_path / "d", "d", "pretrain")
    assert len(read_trainings([circle])) == 1


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    path = training(tmp_path / "<b>&'", f"x/{HOSTILE}", HOSTILE, precision=HOSTILE, data=[HOSTILE])
    answer = {"step": 120, "sample": 0, "question": HOSTILE, "expected": HOSTILE, "answer": HOSTILE, "picture": HOSTILE}
    wrong = [{**answer, "sample": "x"}, {**answer, "answer": 7}, {"step": True}, {"step": 120, "sample": 1}]
    write(tmp_path / "<b>&'", "samples.jsonl", "\n".join(map(json.dumps, [answer, *wrong])) + '\n{"step": 1')
    log = (tmp_path / "<b>&'.log.jsonl").read_text().splitlines()
    log.insert(5, '{"step": 5, "loss": "x", "lr": 1e999}')
    write(tmp_path / "<b>&'", "log.jsonl", "\n".join(log))
    write_training_page([path], tmp_path / "t.html")
    page = Page(tmp_path / "t.html")
    assert not {"script", "img", "b"} & set(page.tags) and "onerror" not in page.names
    assert page.text.count("<script>alert(1)</script>") >= 6 and "{{ 7*7 }}" in page.text


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(0, 20))
def test_smoothing_is_a_centred_mean(values: list[float], half: int) -> None:
    found = smooth(values, 2 * half + 1)
    for k, value in enumerate(found):
        part = values[max(0, k - half) : k + half + 1]
        assert value == pytest.approx(sum(part) / len(part), abs=1e-6 * max(1.0, *map(abs, values)))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(10, 600))
def test_thinning_keeps_spikes_and_order(values: list[float], most: int) -> None:
    x, y = thin(range(len(values)), values, most)
    assert len(x) <= most + 2 and x == sorted(set(x)) and [values[int(k)] for k in x] == y
    assert min(y) == min(values) and max(y) == max(values)


def test_windows_are_odd() -> None:
    assert [window(n) for n in (0, 19, 40, 120, 1000)] == [1, 1, 3, 7, 51]


def test_reading_needs_no_torch(runs: list[Path]) -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    code += "from pathlib import Path\nfrom tinyllava_edge.benchmarks.report_training import training_section\n"
    code += f"print(len(training_section([Path({str(runs[0])!r})])['trainings']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


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


@pytest.mark.parametrize(("width", "media"), [(360, "screen"), (1200, "screen"), (680, "print")])
def test_the_page_fits_a_phone_a_laptop_and_paper(
    browser: Any, runs: list[Path], tmp_path: Path, width: int, media: str
) -> None:
    out = tmp_path / "training.html"
    write_training_page(runs, out)
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.emulate_media(media=media)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(out.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    small = "[...document.querySelectorAll('.plots svg')].filter(e => e.getBoundingClientRect().width < 180).length"
    assert page.evaluate(small) == 0
    if media == "print":
        cut = page.evaluate("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > innerWidth).length")
        assert cut == 0 and page.pdf(format="A4").startswith(b"%PDF")
    else:
        page.click("summary >> nth=0")
        assert page.evaluate("document.querySelector('details figure svg').getBoundingClientRect().width") > 200
    page.close()
