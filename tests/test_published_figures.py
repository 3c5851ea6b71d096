"""The figures of README.md and of benchmarks' pages are those of the stored raw samples."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def test_the_figures_are_those_of_the_stored_results() -> None:
    command = [sys.executable, "benchmarks/publish.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_throughput_is_told_round_by_round() -> None:
    """The machine was four times as fast in the last round, for one side a round earlier: 2 x, and never 4 or 1 x."""
    throughput = script("eval_throughput")
    rates = {throughput.BASE: [10.0, 10.0, 40.0], "ours": [20.0, 40.0, 80.0]}
    facts = {"equal_answers": 9, "questions": 9, "pictures": 3}
    found = {name: {"questions_per_s": values, **facts} for name, values in rates.items()}
    assert throughput.ratios(found, "ours") == [2, 4, 2]
    assert "| ours | 40.0 | 2.0 (2.0 to 4.0) | 9 of 9 |" in throughput.table(found)
    assert "2.0 to 2.0 times as fast" in throughput.sentence(found) and "2.0 to 4.0)" in throughput.sentence(found)


def test_the_stored_rates_are_the_pages() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "eval-throughput.json").read_text(encoding="utf-8"))
    throughput = script("eval_throughput")
    assert throughput.table(stored) in (ROOT / "benchmarks" / "EVALUATION.md").read_text(encoding="utf-8")
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert throughput.sentence(stored) in words
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert "TTFT, ratio" in text and "medians of 15 answers" in text
    starred = any("\\*" in line for line in text.splitlines() if line.startswith("|"))
    assert ("\\*: coefficient of variation" in text) == starred  # a quiet machine has none to explain


def test_a_page_without_marks_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    publish = script("publish")
    with pytest.raises(SystemExit, match="marks around figures"):
        publish.between(Path("README.md"), "no marks", "figures", "text")
    page = f"a\n{publish.BEGIN.format('x')}\nold\n{publish.END.format('x')}\nb\n"
    assert publish.between(Path("p"), page, "x", "new\n") == page.replace("old", "new")


def test_the_tables_of_training_are_those_of_the_stored_records(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "benchmarks" / "TRAINING.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    found = json.loads((results / "train-throughput-nano.json").read_text(encoding="utf-8"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # dataclasses look their module up
    assert importlib.import_module("train_throughput").table(found) in page
    files = {
        "all pretrain": "stage-1",
        "base finetune": "base-finetune",
        "share share-pretrain": "share-share-pretrain",
        "share finetune": "share-finetune",
        "lora finetune": "lora-finetune",
        "qlora finetune": "qlora-finetune",
    }
    records = {
        name: json.loads((results / "training-nano" / f"{file}.train.json").read_text(encoding="utf-8"))
        for name, file in files.items()
    }
    assert importlib.import_module("train_family").table(records) in page


def test_mobile_is_the_stored_answers() -> None:
    """MOBILE.md's shares and answers are counted from the record, and the record holds what must be shown."""
    runtimes = script("every_runtime")
    stored = json.loads((ROOT / "benchmarks" / "results" / "mobile-nano.json").read_text(encoding="utf-8"))
    assert runtimes.page(stored) == (ROOT / "benchmarks" / "MOBILE.md").read_text(encoding="utf-8")
    kinds = {(column["runtime"].split(" ")[0], column["place"].split(",")[0]) for column in stored["runtimes"]}
    assert {("torch", "x86_64"), ("edge", "x86_64"), ("edge", "ARM64"), ("llama-server", "ARM64")} <= kinds
    assert any(name == "Chromium" for name, _ in kinds) and len(stored["questions"]) == 200


def test_a_changed_answer_is_counted_and_named() -> None:
    """One runtime says another word once: its share falls by one, and the page says where."""
    runtimes = script("every_runtime")
    columns = [{"runtime": name, "place": "here", "files": "f32"} for name in ("torch reference", "other")]
    rows = [
        {"id": str(k), "image": "a.png", "question": "what?", "expected": "Red", "answers": ["red", "red"]}
        for k in range(3)
    ]
    rows[1]["answers"] = ["red", "green"]
    found = {"model": "m", "runtimes": columns, "questions": rows}
    assert runtimes.shares(found, 0) == (3, 3) and runtimes.shares(found, 1) == (2, 2)
    text = runtimes.page(found)
    assert "| other | here | f32 | 2 of 3 | 66.7% |" in text and "“green” in other, here, f32" in text


def test_records_that_are_none_are_refused(tmp_path: Path) -> None:
    """One line that names the file, exit code 1 or 2."""
    (tmp_path / "odd.json").write_text('{"a": 1}')
    (tmp_path / "half.json").write_text('{"runtimes": [], "model": "m"}')
    for name in ("odd.json", "half.json", "missing.json"):
        command = [sys.executable, "benchmarks/every_runtime.py", "--stored", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode in (1, 2) and name in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "inside",
    [
        {"answers": {}},
        {"answers": [], "cores": 1},
        {"answers": {"a": 1}, "cores": {"m": {}}},
        {"answers": [{}], "server": {}},
        {"answers": [{"id": 1}], "q4": {"provider": "wasm"}, "environment": {"user_agent": "Chrome/1"}},
    ],
)
def test_what_is_missing_in_a_record_is_said_of_its_file(inside: dict[str, Any], tmp_path: Path) -> None:
    runtimes = script("every_runtime")
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"bundle_sha256": "0", **inside}))
    with pytest.raises(runtimes.DataError, match="odd.json: no record"), runtimes.shape_of(path):
        runtimes.runtimes(runtimes.read_record(path, "0"))
