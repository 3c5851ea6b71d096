"""The comparison of importance matrices: runs on a tiny model, and its numbers mean what the table says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "imatrix_ab.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("imatrix_ab", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["imatrix_ab"] = module
    spec.loader.exec_module(module)
    return module


def test_it_runs(
    script: ModuleType,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Five files of two types; the float file stands for itself, and q2_k is further from it than q8_0."""
    out = tmp_path / "ab.jsonl"
    arguments = ["--types", "q8_0", "q2_k", "iq2_xs", "--rows", "4", "--samples", "2", "-o", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tiny_checkpoint), *arguments])
    script.main()
    head, *lines = (json.loads(line) for line in out.read_text().splitlines())
    assert head["calibration_rows"] == 2 and 0.3 < head["image_share"] < 0.9 and head["held_out"] == "easy-vqa test"
    assert len(lines) == (3 + 3 + 2) * 4
    mean = {
        (kind, name): np.mean(
            [v for line in lines if (line["type"], line["imatrix"]) == (kind, name) for v in line["kld"]]
        )
        for kind, name in {(line["type"], line["imatrix"]) for line in lines}
    }
    assert ("iq2_xs", "none") not in mean
    assert 0 < mean["q8_0", "none"] < 0.1 * mean["q2_k", "none"]
    assert mean["q8_0", "none"] == mean["q8_0", "image+text"]  # 8 bits take no importance matrix
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 3 + 3 + 2 and table[2].startswith("| q8_0 | none |") and "| +0% [+0%, +0%] |" in table[3]


def test_kld(script: ModuleType) -> None:
    """Against the textbook: 0.5 ln(0.5/0.75) + 0.5 ln(0.5/0.25); an interval of equal pictures is a point."""
    case = script.Case("1", "a", np.zeros(1), np.zeros((1, 1)), 0, (0,))
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    (score,) = script.compare("q4_0", "none", [case], [p], [q])
    assert score.kld == pytest.approx((0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75),))
    assert script.interval([score, score], 50) == pytest.approx((score.kld[0],) * 3)
    assert script.interval([score], 50, [score]) == pytest.approx((0, 0, 0))
