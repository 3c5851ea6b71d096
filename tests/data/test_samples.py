"""Shards and folders: each sample becomes one row whose picture is its own; whatever is wrong with one is counted."""

from __future__ import annotations

import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from tinyllava_edge.data.llava_json import PictureCheck
from tinyllava_edge.data.picture_store import open_store
from tinyllava_edge.data.row import BadRow, Row
from tinyllava_edge.data.sets import DataSet, read_sets, rows
from tinyllava_edge.errors import DataError
from tinyllava_edge.prompt import Turn

from .archives import link, make_tar, make_zip, png, talk

WHAT = Turn("<image>\nWhat?", "A cat.")


def read(*data: Path, images: tuple[Path, ...] = ()) -> tuple[list[Row], list[BadRow]]:
    (dataset,) = read_sets(data, images)
    found = list(rows(dataset, open_store(dataset.images, data[0].parent / "index")))
    return [row for row in found if isinstance(row, Row)], [row for row in found if isinstance(row, BadRow)]


def messages(*parts: object) -> bytes:
    said = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    return json.dumps({"messages": [*said, {"role": "assistant", "content": "A cat."}]}).encode()


GOOD: dict[str, bytes] = {
    "s/a.jpg": png(1),
    "s/a.json": talk(),
    "b.txt": "  Ein Bär. \n".encode(),
    "b.PNG": png(2),
    "c.json": messages({"type": "image"}),
    "c.webp": png(3),
    "d.jpg": png(4),
    "d.json": b'{"url": "http://example.org/d.jpg", "caption": "no"}',
    "d.txt": b"A dog.",
    "e.json": json.dumps({"id": 17, "image": "long/ago.jpg", **json.loads(talk())}).encode(),
    "e.jpeg": png(5),
    "f.json": talk("Hi"),
}


@pytest.mark.parametrize("kind", ["shard", "folder"])
def test_every_kind_of_sample(kind: str, tmp_path: Path) -> None:
    if kind == "shard":
        data, prefix = make_tar(tmp_path / "000.tar", GOOD), "000.tar/"
    else:
        data, prefix = tmp_path / "pets", ""
        for name, content in GOOD.items():
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).write_bytes(content)
    good, bad = read(data)
    assert not bad
    by_id = {row.id: row for row in good}
    assert set(by_id) == {"s/a", "b", "c", "d", "17", "f"} and {row.file for row in good} == {str(data)}
    assert by_id["s/a"].images == (f"{prefix}s/a.jpg",) and by_id["s/a"].turns == (WHAT,) == by_id["c"].turns
    assert by_id["b"].images == (f"{prefix}b.PNG",)
    assert by_id["b"].turns == (Turn("<image>\nDescribe the image.", "Ein Bär."),)
    assert by_id["d"].turns[0].answer == "A dog." and by_id["17"].images == (f"{prefix}e.jpeg",)
    assert by_id["f"].images == () and by_id["f"].turns == (Turn("Hi", "A cat."),)
    assert sorted(row.number for row in good) == [1, 2, 3, 4, 5, 6]
    assert kind == "folder" or [row.number for row in good] == [1, 2, 3, 4, 5, 6]
    (dataset,) = read_sets([data], [])
    store = open_store(dataset.images, tmp_path / "index")
    assert [store.read(by_id[name].images[0]) for name in ("s/a", "b", "c", "d", "17")] == [png(k) for k in range(1, 6)]


def test_shards_by_range_pattern_and_list_with_json_beside_them(tmp_path: Path) -> None:
    for k in range(12):
        make_tar(tmp_path / f"{k:03d}.tar", {"a.png": png(k), "a.txt": str(k).encode()})
    (tmp_path / "more.jsonl").write_text(json.dumps({"id": 1, "image": "x.png", **json.loads(talk())}))
    archive = make_zip(tmp_path / "x.zip", {"x.png": png(99)})
    for data in ([tmp_path / "{000..011}.tar"], [tmp_path / "0*.tar"], [tmp_path / f"{k:03d}.tar" for k in range(12)]):
        good, bad = read(*data, tmp_path / "more.jsonl", images=(archive,))
        assert not bad and [row.turns[0].answer for row in good] == [*map(str, range(12)), "A cat."]
        assert [row.images[0] for row in good] == [*(f"{k:03d}.tar/a.png" for k in range(12)), "x.png"]
        assert good[3].file == str(tmp_path / "003.tar") and good[3].number == 1


def test_several_pictures_of_a_sample_keep_the_shard_s_order(tmp_path: Path) -> None:
    asked = talk("<image><image>\nWhich?", "The first.")
    shard = make_tar(tmp_path / "x.tar", {"a.right.png": png(), "a.json": asked, "a.left.png": png(), "b.png": png()})
    good, bad = read(shard)
    assert good[0].images == ("x.tar/a.right.png", "x.tar/a.left.png") and good[0].turns[0].images == 2
    assert [(b.row, b.id, b.reason) for b in bad] == [(2, "b", "a picture without .json or .txt")]


BAD: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no text": ([("a.jpg", b"x")], "a picture without .json or .txt"),
    "no picture": ([("a.txt", b"x")], "a caption without a picture"),
    "neither": ([("a.cls", b"x")], "holds no picture, .json or .txt"),
    "empty caption": ([("a.jpg", b"x"), ("a.txt", b" \n")], "message 2 is empty"),
    "caption with a marker": ([("a.jpg", b"x"), ("a.txt", b"<image>")], "an answer that holds"),
    "two pictures, one caption": ([("a.0.jpg", b"x"), ("a.1.jpg", b"x"), ("a.txt", b"x")], "1 <image> marker(s) for 2"),
    "no marker": ([("a.jpg", b"x"), ("a.json", talk("What?"))], "0 <image> marker(s) for 1"),
    "facts alone": ([("a.jpg", b"x"), ("a.json", b'{"url": "x"}')], "neither `conversations` nor `messages`"),
    "a list": ([("a.jpg", b"x"), ("a.json", b"[1]")], "is a list"),
    "cut json": ([("a.jpg", b"x"), ("a.json", b'{"conv')], "can't be read"),
    "deep json": ([("a.jpg", b"x"), ("a.json", b"[" * 100_000)], "can't be read"),
    "not UTF-8": ([("a.jpg", b"x"), ("a.txt", b"\xff\xff")], "can't be read"),
    "17 MB of text": ([("a.jpg", b"x"), ("a.txt", b"x" * (17 << 20))], "limit 16,777,216"),
    "a name twice": ([("a.jpg", b"x"), ("a.jpg", b"y"), ("a.txt", b"x")], "'a.jpg' twice"),
    "two texts": ([("a.jpg", b"x"), ("a.txt", b"x"), ("a.txt", b"y")], "two .txt files"),
    "out of the shard": ([("../a.jpg", b"x"), ("../a.txt", b"y")], "leaves the shard"),
    "absolute": ([("/a.jpg", b"x"), ("/a.txt", b"y")], "leaves the shard"),
    "many pictures": ([*((f"a.{k}.jpg", b"x") for k in range(300)), ("a.txt", b"x")], "more than 256 pictures"),
    "another picture by name": (
        [("a.json", json.dumps({"image": "z.png", **json.loads(talk())}).encode())],
        "is not in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_counted_with_its_reason(case: str, tmp_path: Path) -> None:
    files, reason = BAD[case]
    shard = make_tar(tmp_path / "x.tar", [("0.jpg", b"x"), ("0.txt", b"ok"), *files, ("1.jpg", b"x"), ("1.txt", b"ok")])
    good, bad = read(shard)
    assert [row.number for row in good] == [1, 3]
    assert [(row.file, row.row) for row in bad] == [(str(shard), 2)] and reason in bad[0].reason


def test_links_and_devices_are_bad_samples(tmp_path: Path) -> None:
    files = {"a.jpg": b"x", "a.txt": b"ok"}
    others = [link("b.jpg", "/etc/passwd"), link("b.txt", "a.txt", tarfile.LNKTYPE), link("c.jpg", "", tarfile.CHRTYPE)]
    good, bad = read(make_tar(tmp_path / "x.tar", files, others))
    assert len(good) == 1 and [row.id for row in bad] == ["b", "c"]
    assert all("is a link or a device" in row.reason for row in bad)


def test_a_name_that_comes_again_later_never_lends_its_picture(tmp_path: Path) -> None:
    files = [
        ("a.jpg", b"one"),
        ("a.txt", b"one"),
        ("b.jpg", b"x"),
        ("b.txt", b"x"),
        ("a.jpg", b"two"),
        ("a.txt", b"two"),
    ]
    good, bad = read(make_tar(tmp_path / "x.tar", files))
    assert [row.turns[0].answer for row in good] == ["x", "two"]
    assert [row.row for row in bad] == [1] and "the name of two pictures" in bad[0].reason


def test_another_source_never_lends_its_picture(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "x.tar", {"a.jpg": b"shard", "a.txt": b"x"})
    (tmp_path / "other").mkdir()
    twin = make_tar(tmp_path / "other" / "x.tar", {"a.jpg": b"other", "a.txt": b"x"})
    _, bad = read(shard, images=(twin,))
    assert "the name of two pictures" in bad[0].reason
    with pytest.raises(DataError, match="another shard of this set has that name"):
        read_sets([shard, twin], [])
    for name in ("p", "q"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(name.encode())
        (tmp_path / name / "a.txt").write_bytes(name.encode())
    good, bad = read(tmp_path / "p", tmp_path / "q")
    assert [row.turns[0].answer for row in good] == ["p"] and "another source holds" in bad[0].reason


def test_a_cut_shard_is_refused_by_name(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "x.tar", {"a.jpg": b"x" * 5000, "a.txt": b"ok", "b.txt": b"x", "c.jpg": b"x" * 5000})
    shard.write_bytes(shard.read_bytes()[:10_000])
    with pytest.raises(DataError, match=r"x\.tar: truncated or damaged tar file"):
        read(shard)
    store = open_store([], tmp_path / "index")
    found = []
    with pytest.raises(DataError, match=r"x\.tar: truncated"):
        for row in rows(DataSet((shard,), ()), store):
            found.append(row)
    assert len(found) == 1


def test_a_folder_follows_links_once_and_leaves_other_files_alone(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    (root / "sub").mkdir(parents=True)
    for name in ("a.b.jpg", "a.b.txt", "README.md", ".hidden.jpg", "sub/c.jpg"):
        (root / name).write_bytes(b"x")
    (root / "sub" / "round").symlink_to(root)
    (tmp_path / "c.txt").write_bytes(b"x")
    (root / "sub" / "c.txt").symlink_to(tmp_path / "c.txt")
    good, bad = read(root)
    assert not bad and [(row.id, row.images[0]) for row in good] == [("a.b", "a.b.jpg"), ("sub/c", "sub/c.jpg")]


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    os.mkfifo(tmp_path / "pets" / "a.json")
    good, bad = read(tmp_path / "pets")
    assert not good and "no regular file" in bad[0].reason


def test_memory_does_not_grow_with_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tarfile's own list would take 5 MB here."""
    monkeypatch.setattr(PictureCheck, "_KEPT", 10)
    files = {f"{k}.{kind}": b"caption" for k in range(1500) for kind in ("jpg", "txt")}
    shard = make_tar(tmp_path / "x.tar", files)
    (dataset,) = read_sets([shard], [])
    read(make_tar(tmp_path / "warm.tar", GOOD))
    tracemalloc.start()
    store = open_store(dataset.images, tmp_path / "index")
    assert sum(isinstance(row, Row) for row in rows(dataset, store)) == 1500
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
