"""easy-VQA as LLaVA JSON: all rows, honest captions, and no test picture in a training file."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from tinyllava_edge.data import easy_vqa
from tinyllava_edge.data.scene_text import COLORS, SHAPES
from tinyllava_edge.errors import DataError

pytest.importorskip("easy_vqa")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> easy_vqa.Paths:
    return easy_vqa.convert(tmp_path_factory.mktemp("easy-vqa"))


def test_every_row_is_there(paths: easy_vqa.Paths) -> None:
    train, test, captions = (json.loads(p.read_text()) for p in (paths.train_qa, paths.test_qa, paths.train_captions))
    assert (len(train), len(test), len(captions)) == (38_575, 9_673, 4_000)
    assert Counter(row["question_type"] for row in test) == {"yes/no": 7136, "color": 1280, "shape": 1257}
    first = train[0]["conversations"]
    assert first[0] == {"from": "human", "value": "<image>\nwhat is the blue shape?"}
    assert first[1] == {"from": "gpt", "value": "rectangle"}
    for row in (*train[::500], *test[::500], *captions[::500]):
        assert (paths.images / row["image"]).is_file()


def test_no_test_picture_in_a_training_file(paths: easy_vqa.Paths) -> None:
    used = {row["image"] for p in (paths.train_qa, paths.train_captions) for row in json.loads(p.read_text())}
    assert all(name.startswith("train-") for name in used)
    digests = {
        split: {hashlib.sha256(p.read_bytes()).digest() for p in paths.images.glob(f"{split}-*.png")}
        for split in ("train", "test")
    }
    assert not digests["train"] & digests["test"]


def test_captions_agree_with_the_answers(paths: easy_vqa.Paths) -> None:
    captions = {row["image"]: row["conversations"][1]["value"] for row in json.loads(paths.train_captions.read_text())}
    assert captions["train-0.png"] == "a large blue rectangle at the bottom right."
    for row in json.loads(paths.train_qa.read_text()):
        answer = row["conversations"][1]["value"]
        if answer in COLORS or answer in SHAPES:
            assert f" {answer} " in captions[row["image"]]


def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(easy_vqa, "files", missing)
    with pytest.raises(DataError, match="not installed") as caught:
        easy_vqa.package_data()
    assert caught.value.hint == "pip install easy-vqa"
