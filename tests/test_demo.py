"""The demo's road in miniature: every step runs for real on little data, resumes, and says when it is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.demo import Size, run_demo
from tinyllava_edge.errors import StorageError

MINI = Size(
    scenes_train=12,
    scenes_eval=10,
    train_pictures=48,
    training=0.5,
    reference_questions=40,
    build_questions=20,
    repetitions=2,
)
KEYS = [
    "accuracy",
    "accuracy_reference",
    "flips",
    "ttft_ms",
    "decode_tokens_per_s",
    "bundle_bytes",
    "peak_rss_bytes",
    "verified",
]


def test_the_whole_road_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run stops after training, the next one goes on from there, the third finds everything done."""
    out = tmp_path / "demo"
    said: list[str] = []

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tinyllava_edge.demo._export", stop)
        with pytest.raises(KeyboardInterrupt):
            run_demo(out, size=MINI, progress=said.append)
    state = json.loads((out / "state.json").read_text())
    assert list(state["seconds"]) == ["data", "model", "stage 1", "stage 2"]
    trained = (out / "checkpoint" / "model.safetensors").stat().st_mtime_ns

    said.clear()
    summary = run_demo(out, size=MINI, progress=said.append)
    assert (out / "checkpoint" / "model.safetensors").stat().st_mtime_ns == trained
    assert not any("stage 1" in line for line in said) and said[-1] == f"report: {out / 'report.html'}"
    assert summary == json.loads((out / "summary.json").read_text())
    assert set(summary["builds"]) == set(read_bundle(out / "bundle").builds()) and len(summary["builds"]) == 6
    for build in summary["builds"].values():
        assert set(KEYS) <= set(build)
        assert build["ttft_ms"] > 0 and build["peak_rss_bytes"] > 20e6 and build["bundle_bytes"] > 1e6
    exact = summary["builds"]["fp32+f16"]
    assert exact["verified"] and exact["n"] == 20 and exact["accuracy"] == exact["accuracy_reference"]
    assert summary["reference"]["n"] == 40 and 0 <= summary["blind_accuracy"] <= 1
    page = (out / "report.html").read_text()
    assert "fp32+f16" in page and "<html" in page

    said.clear()
    again = run_demo(out, size=MINI, progress=said.append)
    assert said[0].startswith("everything is done") and again == summary


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    for force in (False, True):
        with pytest.raises(StorageError, match="no demo made"):
            run_demo(tmp_path, force=force, size=MINI, progress=lambda _: None)
    (tmp_path / "state.json").write_text('{"terraform": 1}')
    with pytest.raises(StorageError, match="no demo made"):
        run_demo(tmp_path, force=True, size=MINI, progress=lambda _: None)
    assert (tmp_path / "precious").read_text() == "x"
