"""Rows with several pictures, `messages`, archives and mixtures of sets, from the files to the batches."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.checkpoint import Checkpoint
from tinyllava_edge.data.row import Row
from tinyllava_edge.errors import DataError
from tinyllava_edge.prompt import SYSTEM, TEMPLATES
from tinyllava_edge.train.dataset import StageData, prepare
from tinyllava_edge.train.encode import Encoder
from tinyllava_edge.train.objective import Objective
from tinyllava_edge.train.recipes import StageRecipe, override
from tinyllava_edge.train.source import open_source

from .conftest import Files, message

STAGE = StageRecipe("finetune", "model", "full", 1e-3, 4, precision="fp32", max_turns=4)
TALK = [message("human", "<image>\n<image>\nwhich is red?"), message("gpt", "the first")]
LATER = [message("human", "<image>\nand this?"), message("gpt", "blue")]
SPOKEN: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which is red?"}]},
    {"role": "assistant", "content": "the first"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
]


@pytest.fixture(scope="module")
def start(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def rows(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures in two turns, two in one turn, one picture in shared packs, and text alone."""
    path = tmp_path_factory.mktemp("several") / "rows.json"
    made: list[dict[str, Any]] = [
        {"id": "three", "image": ["2.png", "0.png", "5.png"], "conversations": [*TALK, *LATER]},
        {"id": "two", "image": ["1.png", "3.png"], "conversations": TALK},
    ]
    path.write_text(json.dumps([*made, *json.loads(files.mixed.read_text())]))
    return path


def loss(start: Checkpoint, batch: dict[str, Any]) -> float:
    with torch.no_grad():
        return float(Objective(start.model).eval()(**batch, num_items_in_batch=1)["loss"])


def whole(data: StageData) -> dict[str, Any]:
    return data.batch([data[k] for k in range(len(data))])


def test_both_forms_of_a_row_give_the_same_ids_and_answers(start: Checkpoint, files: Files, tmp_path: Path) -> None:
    names = ["2.png", "0.png", "5.png"]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "a", "image": names, "conversations": [*TALK, *LATER]}]))
    (tmp_path / "messages.json").write_text(json.dumps([{"messages": SPOKEN, "images": names}]))
    encoder = Encoder(start.tokenizer, TEMPLATES["llama"], 3, 2048)
    found = []
    for name in ("llava", "messages"):
        ((_, row),) = open_source(tmp_path / f"{name}.json", files.images, tmp_path).rows()
        assert isinstance(row, Row) and row.images == tuple(names)
        found.append(encoder.encode(row))
    first, second = found
    assert first.ids.tolist() == second.ids.tolist() and first.is_answer.tolist() == second.is_answer.tolist()
    text = start.tokenizer.decode(first.ids).replace("<image>" * 3, "<image>")
    assert text == (
        f"<s>{SYSTEM} USER: <image>\n<image>\nwhich is red? ASSISTANT: the first</s>"
        "USER: <image>\nand this? ASSISTANT: blue</s>"
    )
    assert start.tokenizer.decode(first.ids[first.is_answer]) == " the first</s> blue</s>"
    assert first.images == 3 and first.shared == 0


def test_pictures_come_in_the_order_of_their_slots(start: Checkpoint, files: Files, rows: Path, tmp_path: Path) -> None:
    """Every row by itself against all of them, padded, packed and shared. float32 to 1e-5."""
    for turns, length in ((1, 0), (4, 0), (1, 1200), (4, 1200)):
        stage = override(STAGE, {"max_turns": turns, "pack_length": length})
        data = prepare(start, stage, rows, files.images, cache=tmp_path)
        assert data.rows == 8 and len(data) == (8 if turns == 1 else 6)
        alone = sum(loss(start, data.batch([data[k]])) for k in range(len(data)))
        assert loss(start, whole(data)) == pytest.approx(alone, rel=1e-5)
    three = data[0]
    assert [data.packs.store.picture(k)[1] for k in three.images] == ["2.png", "0.png", "5.png"]
    batch = data.batch([three])
    right = loss(start, batch)
    assert abs(loss(start, {**batch, "image_features": batch["image_features"].flip(0)}) - right) > 1e-3
    live = prepare(start, STAGE, rows, files.images, cache_bytes=0)
    assert loss(start, whole(live)) == pytest.approx(loss(start, whole(data)), rel=1e-5)


def test_a_caption_row_has_one_picture(start: Checkpoint, files: Files, rows: Path) -> None:
    stage = override(STAGE, {"template": "pretrain", "max_turns": 1})
    with pytest.raises(DataError, match="several pictures.*3 bad rows, 0 allowed"):
        prepare(start, stage, rows, files.images)
    assert len(prepare(start, stage, rows, files.images, max_bad=0.4)) == 5


def test_a_mixture_keeps_the_weights_and_the_sets_apart(start: Checkpoint, files: Files, tmp_path: Path) -> None:
    """The sets call different pictures by the same names; one lies in a zip file."""
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as packed:
        for k in range(8):
            packed.write(files.images / f"{k}.png", f"{7 - k}.png")
    (tmp_path / "mixture.toml").write_text(
        f'[[sets]]\ndata = "{files.qa}"\nimages = "{files.images}"\nweight = 0.5\n'
        f'[[sets]]\ndata = "{files.captions}"\nimages = "other.zip"\nweight = 2\n'
    )
    stage = override(STAGE, {"max_turns": 1, "group_by_length": False})
    data = prepare(start, stage, tmp_path / "mixture.toml", [], cache=tmp_path / "cache")
    assert data.packs.sizes == [20, 8] and data.packs.store.pictures == 16
    features = data.pictures(range(16))["image_features"]
    named = {data.packs.store.picture(k): features[k] for k in range(16)}
    assert torch.equal(named[0, "2.png"], named[1, "5.png"]) and not torch.equal(named[0, "2.png"], named[1, "2.png"])
    sampler = data.sampler(4, 3)
    drawn: list[int] = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = [k for k in sampler if k < len(data)]
        assert len(order) == 10 + 16 and len(sampler) == 28
        assert sorted(k for k in order if k >= 20) == sorted([*range(20, 28)] * 2)
        drawn += [k for k in order if k < 20]
    assert sorted(drawn) == list(range(20))  # halves of two epochs are the whole set


def test_a_folder_with_links_in_a_circle_and_to_nowhere(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes((files.images / "0.png").read_bytes())
    (folder / "a.txt").write_text("a red square")
    source = open_source(folder, [], tmp_path / "index")
    before = source.fingerprint()
    (folder / "again").symlink_to(folder)
    (folder / "README").symlink_to(folder / "nowhere")
    assert source.fingerprint() == before
    (folder / "a.txt").write_text("a red square.")
    assert source.fingerprint() != before
