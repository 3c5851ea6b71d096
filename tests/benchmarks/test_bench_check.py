"""benchmarks/bench_check.py on a tiny bundle, and the documents that quote what it measured."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tinyllava_edge.benchmarks.stop_rule import StopRule
from tinyllava_edge.runtimes.edge import open_edge

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/bench-check.json"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_check", ROOT / "benchmarks/bench_check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return found


def test_it_runs_and_its_parts_fit_together(script: ModuleType, tiny_bundle: Path) -> None:
    found = script.check(tiny_bundle, "fp32+q8_0", 2, 1, StopRule(8))
    assert json.loads(json.dumps(found)) == found
    assert 0 < found["overhead_share"] < 0.05 and found["answer_ms"] > 0
    for title in ("equal", "slowed"):
        assert [one["rounds"] for one in found[title]] == [8, 8] and len(found[f"{title}_runs"]) == 1
        assert all(one["method"] == "paired by round" for one in found[title])
        assert all(one["method"] == "stretches of each run" for one in found[f"{title}_runs"])


def test_the_stages_of_an_answer_are_counted(script: ModuleType, tiny_bundle: Path, tmp_path: Path) -> None:
    """Two pictures' worth: reading it, preprocessing, the graph, three stretches of the prompt, the first token."""
    from tinyllava_edge.data.scenes import render
    from tinyllava_edge.runtimes.stopwatch import Stopwatch

    render(seed=0).image.save(tmp_path / "scene.png")
    stage = Stopwatch.stage
    with open_edge(tiny_bundle, "fp32+q8_0", n_threads=1, allow_unverified=True) as runtime:
        assert script.stages_opened(runtime, tmp_path / "scene.png") >= 7
    assert Stopwatch.stage is stage


def test_the_documents_quote_the_stored_figures(script: ModuleType, stored: dict[str, Any]) -> None:
    """Counts, the range of what was caught, the overhead and the answer's time, in words that this test looks for."""
    tries, same, caught = len(stored["equal"]), script.same(stored["equal"]), script.slower(stored["slowed"])
    text = (ROOT / "benchmarks/EVALUATION.md").read_text(encoding="utf-8").partition("`bench` may claim")[2]
    ratios = [100 * (one["ratio"] - 1) for one in stored["slowed"]]
    assert f"{100 * stored['overhead_share']:.3f} % of an answer of {stored['answer_ms']:.1f} ms" in text
    assert f"not distinguishable in {same} of {tries} tries" in text
    assert f"caught in {caught} of {tries}, at {min(ratios):.1f} to {max(ratios):.1f} %" in text
    guide = (ROOT / "docs/bench.md").read_text(encoding="utf-8")
    row = re.search(r"^\| [^|]*bench-check.json[^|]*\|([^|]*)\|([^|]*)\|$", guide, re.MULTILINE)
    assert row and [cell.strip() for cell in row.groups()] == [f"{same} of {tries}", f"{caught} of {tries}"]
    rounds = {one["n"][0] for one in stored["equal"] + stored["slowed"]}
    assert len(rounds) > 1 or f"{rounds.pop()} rounds" in text
