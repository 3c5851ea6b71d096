"""A dry run reads data of any size: the figures of a sample are close to those of all rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tinyllava_edge.errors import DataError
from tinyllava_edge.prompt import TEMPLATES
from tinyllava_edge.train import plan_data
from tinyllava_edge.train.plan_data import Lengths, measure

from .conftest import Files, message


def lengths(data: Path, images: Path) -> Lengths:
    return measure(data, images, TEMPLATES["llama"], None, 16, 2048, 4)


def test_a_sample_stands_for_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for k in range(400):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{k}.png")
        for j in range(3):
            talk = [message("human", "<image>\nwhat is it?"), message("gpt", "a word " * (1 + (k + j) % 5))]
            rows.append({"id": f"{k}-{j}", "image": f"{k}.png", "conversations": talk})
    rows += [{"id": f"t{k}", "conversations": [message("human", "hi"), message("gpt", "hello")]} for k in range(200)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    whole = lengths(path, tmp_path)
    assert (whole.rows, whole.pictures, whole.packs) == (1400, 400, 600) and "of 1,400" not in whole.source
    monkeypatch.setattr(plan_data, "SAMPLE", 200)
    part = lengths(path, tmp_path)
    assert part.rows == 1400 and "350 of" not in part.source and " of 1,400 rows" in part.source
    for name in ("pictures", "packs", "positions", "answers", "with_picture"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.25), name


def test_what_training_would_refuse_is_counted(files: Files) -> None:
    found = measure(files.mixed, files.images, TEMPLATES["pretrain"], None, 16, 2048, 1)
    assert (found.rows, found.refused, found.with_picture) == (5, 1, 1.0)


def test_bad_rows_beyond_the_limit_end_it(files: Files, tmp_path: Path) -> None:
    rows = json.loads(files.qa.read_text())
    rows[2]["conversations"][1]["value"] = ""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="row 3 .*1 bad rows, 0 allowed"):
        lengths(tmp_path / "rows.json", files.images)
