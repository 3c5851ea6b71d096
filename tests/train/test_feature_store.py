"""Kept features equal computed ones; what is damaged, half written or another tower's is computed again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.checkpoint import Checkpoint
from tinyllava_edge.errors import StorageError
from tinyllava_edge.train import feature_fill
from tinyllava_edge.train.dataset import StageData, prepare
from tinyllava_edge.train.feature_store import ENTRY, INDEX, RECORDS, USED, Features
from tinyllava_edge.train.pictures import StoredPixels
from tinyllava_edge.train.recipes import StageRecipe

from .conftest import Files, message

ANSWERS = StageRecipe("finetune", "model", "full", 1e-3, 4, max_turns=4, precision="fp32")
RECORD = 64 * 192 * 4  # bytes of a picture's features in float32


@pytest.fixture(scope="module")
def start(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def computed(start: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures that the tower was run on, but for the one that asks for the shape."""
    counts: list[int] = []
    real = start.model.tower_features

    def tower_features(pixels: torch.Tensor) -> torch.Tensor:
        if pixels.any():
            counts.append(len(pixels))
        return real(pixels)

    monkeypatch.setattr(start.model, "tower_features", tower_features)
    return counts


def features(data: StageData) -> torch.Tensor:
    assert isinstance(data.pictures, Features)
    return data.pictures(range(data.packs.store.pictures))["image_features"]


def live(start: Checkpoint, data: StageData) -> torch.Tensor:
    """What the tower makes of the pictures now."""
    pixels = StoredPixels(start.spec, data.source, data.packs.store)(range(data.packs.store.pictures))
    with torch.no_grad():
        return start.model.tower_features(pixels["pixel_values"])


def store_of(cache: Path) -> Path:
    (found,) = cache.glob("features-*")
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 1e-3)])
def test_they_are_computed_once_and_used_by_other_runs(
    dtype: str, tolerance: float, start: Checkpoint, files: Files, tmp_path: Path, computed: list[int], said: list[str]
) -> None:
    """Tolerance relative to the largest feature: half precision keeps 8 or 11 bits."""
    data = prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path, feature_dtype=dtype, say=said.append)
    assert sum(computed) == 8
    expected = live(start, data)
    computed.clear()
    torch.testing.assert_close(features(data), expected, atol=tolerance * float(expected.abs().max()), rtol=0)
    assert features(data).dtype is torch.float32
    assert (store_of(tmp_path) / RECORDS).stat().st_size == 8 * RECORD // (1 if dtype == "float32" else 2)
    captions = StageRecipe("pretrain", "pretrain", "frozen", 1e-3, 4)
    other = prepare(start, captions, files.captions, files.images, cache=tmp_path, feature_dtype=dtype, say=said.append)
    assert torch.equal(features(other), features(data)) and not computed and not said


def test_a_picture_is_known_by_its_content(
    start: Checkpoint, files: Files, tmp_path: Path, computed: list[int]
) -> None:
    """Another name for the same file costs nothing; another file of the same size under an old name is noticed."""
    images = tmp_path / "images"
    shutil.copytree(files.images, images)
    prepare(start, ANSWERS, files.qa, images, cache=tmp_path / "cache")
    assert sum(computed) == 8
    one, two = (images / "1.png").read_bytes(), (images / "2.png").read_bytes()
    (images / "1.png").write_bytes(two)
    (images / "2.png").write_bytes(one)
    data = prepare(start, ANSWERS, files.qa, images, cache=tmp_path / "cache")
    assert sum(computed) == 8
    torch.testing.assert_close(features(data), live(start, data), atol=1e-4, rtol=1e-5)


def test_another_tower_has_its_own(
    start: Checkpoint, files: Files, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path)
    layers = start.model.model.vision_tower.encoder.layers
    before = [layers[k].mlp.fc1.bias.detach().clone() for k in (1, 2)]
    with torch.no_grad():
        layers[2].mlp.fc1.bias += 1  # the last layer never reaches the features
    prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path)
    assert sum(computed) == 8 and len(list(tmp_path.glob("features-*"))) == 1
    with torch.no_grad():
        layers[1].mlp.fc1.bias += 1
    try:
        data = prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path)
        assert sum(computed) == 16 and len(list(tmp_path.glob("features-*"))) == 2
        torch.testing.assert_close(features(data), live(start, data), atol=1e-4, rtol=1e-5)
    finally:
        with torch.no_grad():
            layers[1].mlp.fc1.bias.copy_(before[0])
            layers[2].mlp.fc1.bias.copy_(before[1])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 8
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE: dict[str, tuple[Callable[[Path], None], int, bool]] = {  # what happens, pictures computed again, a line said
    "a record's byte": (lambda root: flip(root / RECORDS, 2 * RECORD + 77), 1, True),
    "two records' bytes": (lambda root: (flip(root / RECORDS, 0), flip(root / RECORDS, 8 * RECORD - 1)), 2, True),  # type: ignore[dict-item]
    "half of the records": (lambda root: cut(root / RECORDS, 5 * RECORD - 1), 4, True),
    "all records": (lambda root: (root / RECORDS).unlink(), 8, True),
    "an entry's picture": (lambda root: flip(root / INDEX, 3 * ENTRY.size), 1, False),
    "an entry's checksum": (lambda root: flip(root / INDEX, 3 * ENTRY.size + 33), 1, False),
    "an entry's tail": (lambda root: cut(root / INDEX, 8 * ENTRY.size - 5), 1, False),
    "the index": (lambda root: (root / INDEX).unlink(), 8, False),
}


@pytest.fixture(scope="module")
def filled(start: Checkpoint, files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A cache that holds everything, and the features."""
    cache = tmp_path_factory.mktemp("filled")
    return cache, features(prepare(start, ANSWERS, files.qa, files.images, cache=cache)).clone()


@pytest.mark.parametrize("case", list(DAMAGE))
def test_what_is_damaged_is_computed_again(
    case: str,
    start: Checkpoint,
    files: Files,
    tmp_path: Path,
    computed: list[int],
    said: list[str],
    filled: tuple[Path, torch.Tensor],
) -> None:
    spoil, again, told = DAMAGE[case]
    shutil.copytree(filled[0], tmp_path, dirs_exist_ok=True)
    spoil(store_of(tmp_path))
    data = prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path, say=said.append)
    assert sum(computed) == again
    torch.testing.assert_close(features(data), filled[1], atol=1e-5, rtol=1e-5)
    assert len(said) == told and all(str(store_of(tmp_path)) in text and "damaged" in text for text in said)
    computed.clear()
    prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path, say=said.append)
    assert not computed and len(said) == told


def test_what_does_not_fit_is_decoded_per_batch(start: Checkpoint, files: Files, tmp_path: Path) -> None:
    most = 8 * (RECORD + ENTRY.size)
    data = prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path, cache_bytes=most - 1)
    assert isinstance(data.pictures, StoredPixels) and "pixel_values" in data.batch(data.packs[:1])
    data = prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path, cache_bytes=most)
    assert isinstance(data.pictures, Features)


def test_stores_that_nobody_uses_make_room(start: Checkpoint, files: Files, tmp_path: Path, said: list[str]) -> None:
    most = 12 * RECORD + 16 * ENTRY.size

    def get(dtype: str) -> StageData:
        options: dict[str, Any] = {"cache": tmp_path, "feature_dtype": dtype, "say": said.append}
        return prepare(start, ANSWERS, files.qa, files.images, cache_bytes=most, **options)

    first = get("float32")
    kept = features(first).clone()
    second = get("bfloat16")  # 4 records' worth: both fit
    assert isinstance(second.pictures, Features) and len(list(tmp_path.glob("features-*"))) == 2 and not said
    third = get("float16")  # nothing is free, and both are in use
    assert isinstance(third.pictures, StoredPixels) and "no room" in said[0]
    assert torch.equal(features(first), kept)
    del second, third
    third = get("float16")
    assert isinstance(third.pictures, Features) and len(list(tmp_path.glob("features-*"))) == 2
    assert torch.equal(features(first), kept)


def test_records_of_other_pictures_make_room(start: Checkpoint, files: Files, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in files.images.iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(images / path.name)
    most = 9 * (RECORD + ENTRY.size)
    cache = tmp_path / "cache"
    for folder in (files.images, images, files.images):
        data = prepare(start, ANSWERS, files.qa, folder, cache=cache, cache_bytes=most)
        torch.testing.assert_close(features(data), live(start, data), atol=1e-4, rtol=1e-5)
        assert (store_of(cache) / RECORDS).stat().st_size <= most
        assert (store_of(cache) / USED).exists()
        del data


def test_a_broken_picture_is_named_under_each_name(start: Checkpoint, files: Files, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(files.images, images)
    broken = (images / "3.png").read_bytes()[:300]
    (images / "3.png").write_bytes(broken)
    (images / "5.png").write_bytes(broken)
    for _ in range(2):  # the second time the store says that they were refused
        data = prepare(start, ANSWERS, files.qa, images, cache=tmp_path / "cache", max_bad=6)
        assert len(data.bad) == 6 and data.rows == 14 == sum(len(item.rows) for item in data.packs)
        assert [("3.png" in row.reason, "5.png" in row.reason) for row in data.bad] == [(True, False)] * 3 + [
            (False, True)
        ] * 3
        named = {data.packs.store.picture(n)[1] for item in data.packs for n in item.images}
        assert named == {f"{k}.png" for k in (0, 1, 2, 4, 6, 7)}
        batch = data.batch(list(data.packs))
        assert torch.isfinite(batch["image_features"]).all()
    shutil.copy(files.images / "3.png", images / "3.png")
    shutil.copy(files.images / "5.png", images / "5.png")
    assert len(prepare(start, ANSWERS, files.qa, images, cache=tmp_path / "cache").bad) == 0


def test_a_full_disk_keeps_what_is_whole(
    start: Checkpoint, files: Files, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size={(5 * RECORD >> 10) + 60}k tmpfs {place} 2>/dev/null") != 0:
        pytest.skip("no right to mount a small disk")
    monkeypatch.setattr(feature_fill, "BATCH", 2)
    try:
        with pytest.raises(StorageError, match="no space left") as full:
            prepare(start, ANSWERS, files.qa, files.images, cache=place)
        assert RECORDS in full.value.message
        computed.clear()
        os.system(f"mount -o remount,size={10 * RECORD >> 10}k {place}")
        data = prepare(start, ANSWERS, files.qa, files.images, cache=place)
        assert 0 < sum(computed) <= 4
        torch.testing.assert_close(features(data), live(start, data), atol=1e-4, rtol=1e-5)
        del data
    finally:
        os.system(f"umount -l {place}")


FILL = """
import json, os, sys, time
from pathlib import Path
from tinyllava_edge import checkpoint
from tinyllava_edge.train import feature_fill
from tinyllava_edge.train.dataset import prepare
from tinyllava_edge.train.recipes import StageRecipe
start, data, images, cache, pause = sys.argv[1:]
rank, world = 0, int(os.environ.get("WORLD_SIZE", "1"))
while rank + 1 < world and not os.fork():  # one import for all
    rank += 1
os.environ["RANK"] = str(rank)
loaded = checkpoint.load(Path(start))
real, count = loaded.model.tower_features, [0]
def tower_features(pixels):
    count[0] += len(pixels) if pixels.any() else 0
    time.sleep(float(pause))
    return real(pixels)
loaded.model.tower_features = tower_features
feature_fill.BATCH = 4
stage = StageRecipe("finetune", "model", "full", 1e-3, 4, precision="fp32")
found = prepare(loaded, stage, Path(data), Path(images), cache=Path(cache))
total = found.pictures(range(found.packs.store.pictures))["image_features"].double().sum()
(Path(cache) / f"{rank}.json").write_text(json.dumps([count[0], float(total)]))
if rank + 1 < world:
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """40 pictures."""
    root = tmp_path_factory.mktemp("more")
    rng = np.random.default_rng(0)
    rows = []
    for k in range(40):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{k}.png")
        talk = [message("human", "<image>\nwhat?"), message("gpt", "noise")]
        rows.append({"id": str(k), "image": f"{k}.png", "conversations": talk})
    (root / "rows.json").write_text(json.dumps(rows))
    return root / "rows.json", root


def fill(start: Path, data: tuple[Path, Path], cache: Path, pause: float, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FILL, str(start), *map(str, data), str(cache), str(pause)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_keeps_what_was_done(
    start: Checkpoint, files: Files, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_fill, "BATCH", 2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    monkeypatch.setattr(
        feature_fill._Filler, "_show", lambda self: os.kill(os.getpid(), signal.SIGINT) if sum(computed) == 6 else None
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    whole = (store_of(tmp_path) / INDEX).stat().st_size // ENTRY.size
    counts: list[tuple[int, int]] = []
    data = prepare(
        start, ANSWERS, files.qa, files.images, cache=tmp_path, on_progress=lambda *done: counts.append(done)
    )
    assert whole == 6 and counts[0] == (8, 8)
    torch.testing.assert_close(features(data), live(start, data), atol=1e-4, rtol=1e-5)


def test_a_killed_run_keeps_what_it_did(
    tiny_checkpoint: Path, start: Checkpoint, more: tuple[Path, Path], tmp_path: Path, computed: list[int]
) -> None:
    child = fill(tiny_checkpoint, more, tmp_path, 0.15)
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size >= 12 * ENTRY.size for path in tmp_path.glob(f"features-*/{INDEX}")):
            assert child.poll() is None and time.monotonic() < deadline, child.stderr and child.stderr.read()
            time.sleep(0.01)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    data = prepare(start, ANSWERS, more[0], more[1], cache=tmp_path)
    assert 0 < sum(computed) <= 28
    torch.testing.assert_close(features(data), live(start, data), atol=1e-4, rtol=1e-5)


def test_several_processes_each_compute_their_share(
    tiny_checkpoint: Path, more: tuple[Path, Path], tmp_path: Path
) -> None:
    child = fill(tiny_checkpoint, more, tmp_path, 0.05, WORLD_SIZE="2")
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    found = [json.loads((tmp_path / f"{k}.json").read_text()) for k in range(2)]
    assert sorted(count for count, _ in found) == [20, 20] and found[0][1] == found[1][1]
    assert (store_of(tmp_path) / INDEX).stat().st_size == 40 * ENTRY.size


def test_the_share_of_a_process_that_is_gone_is_computed_here(
    start: Checkpoint,
    files: Files,
    tmp_path: Path,
    computed: list[int],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_fill, "PATIENCE", 0.1)
    monkeypatch.setattr(feature_fill, "POLL", 0.02)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    data = prepare(start, ANSWERS, files.qa, files.images, cache=tmp_path, say=said.append)
    assert computed[0] == 3 and sum(computed) == 8 and "nothing new from other processes" in said[0]
    torch.testing.assert_close(features(data), live(start, data), atol=1e-4, rtol=1e-5)
