"""benchmarks/ABLATION.md says what the stored answers say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_page_follows_from_the_stored_answers(tmp_path: Path) -> None:
    if not (BENCHMARKS / "results" / "ablate-nano.jsonl").is_file():
        pytest.skip("no grid is published")
    spec = importlib.util.spec_from_file_location("ablation", BENCHMARKS / "ablation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render(module.RESULTS, tmp_path) == (BENCHMARKS / "ABLATION.md").read_text(encoding="utf-8")
    docs = BENCHMARKS.parent / "docs"
    for path in tmp_path.glob("*.png"):
        assert (docs / path.name).is_file(), path.name
