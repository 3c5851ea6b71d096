"""What `prepare` gives is whole: packs end to end with their pictures, a cache that is shared, nothing left behind."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.checkpoint import Checkpoint
from tinyllava_edge.errors import DataError, UsageError
from tinyllava_edge.train.dataset import StageData, prepare
from tinyllava_edge.train.objective import Objective
from tinyllava_edge.train.recipes import StageRecipe, override

from .conftest import Files

STAGE = StageRecipe("finetune", "model", "full", 1e-3, 4, precision="fp32")


@pytest.fixture(scope="module")
def start(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint)


def loss(start: Checkpoint, data: StageData) -> float:
    with torch.no_grad():
        batch = data.batch([data[k] for k in range(len(data) + 1)])  # the gap too
        return float(Objective(start.model).eval()(**batch, num_items_in_batch=1)["loss"])


@pytest.mark.parametrize("turns", [1, 4])
def test_packs_end_to_end_keep_their_pictures_and_their_loss(
    turns: int, start: Checkpoint, files: Files, tmp_path: Path
) -> None:
    """Shortest packs last: pictures come in another order than the packs do. float32 to 1e-5."""
    stage = override(STAGE, {"max_turns": turns})
    alone = prepare(start, stage, files.mixed, files.images, cache=tmp_path)
    packed = prepare(start, override(stage, {"pack_length": 300}), files.mixed, files.images, cache=tmp_path)
    batch = packed.batch([packed[k] for k in range(len(packed))])
    assert 1 < len(batch["input_ids"]) < len(packed) and batch["input_ids"].shape[1] <= 300
    assert loss(start, packed) == pytest.approx(loss(start, alone), rel=1e-5)
    wrong = {**batch, "image_features": batch["image_features"].roll(1, 0)}
    with torch.no_grad():
        spoilt = float(Objective(start.model).eval()(**wrong, num_items_in_batch=1)["loss"])
    assert abs(spoilt - loss(start, alone)) > 1e-2


def test_varlen_batches_name_boundaries_and_refuse_shared_prefixes(start: Checkpoint, files: Files) -> None:
    data = prepare(start, STAGE, files.mixed, files.images, varlen=True)
    batch = data.batch([data[k] for k in range(len(data))])
    assert batch["cu_seq_lens_q"].diff().tolist() == data.packs.lengths.tolist()
    assert len(batch["image_features"]) == 5 and "attention_mask" not in batch
    with pytest.raises(UsageError, match="max_turns = 4"):
        prepare(start, override(STAGE, {"max_turns": 4}), files.mixed, files.images, varlen=True)


def test_the_temporary_cache_goes_with_the_data(
    start: Checkpoint, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")  # the other process has its own: nothing to wait for
    data = prepare(start, STAGE, files.mixed, files.images)
    assert len(list(tmp_path.glob("*/features-*"))) == 1 and data.packs.store.pictures == 2
    del data
    gc.collect()
    assert not list(tmp_path.iterdir())
    rows = json.loads(files.mixed.read_text())
    rows[0]["conversations"][1]["value"] = ""
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="1 bad rows, 0 allowed"):
        prepare(start, STAGE, tmp_path / "bad.json", files.images)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_what_is_made_again_is_said_on_stderr(
    start: Checkpoint, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepare(start, STAGE, files.mixed, files.images, cache=tmp_path)
    (data.packs.store.root / "ids.bin").write_bytes(b"")
    prepare(start, STAGE, files.mixed, files.images, cache=tmp_path)
    captured = capsys.readouterr()
    assert captured.out == "" and "ids.bin: 0 bytes instead of" in captured.err


def test_rows_packs_and_bad_rows_can_be_counted_without_reading_them(start: Checkpoint, files: Files) -> None:
    data = prepare(start, override(STAGE, {"max_turns": 4}), [files.qa, files.mixed], files.images)
    assert data.rows == 26 == sum(len(item.rows) for item in data.packs) and len(data.bad) == 0
    assert data.packs.lengths.tolist() == [item.length for item in data.packs]
    shown = [item.length for item in data.packs if item.images]
    place = data.packs.shortest_with_picture()
    assert place is not None and data.packs[place].images and data.packs[place].length == min(shown)
    assert data.packs[-1].length == data.packs[len(data) - 1].length
