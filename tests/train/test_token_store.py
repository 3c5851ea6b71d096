"""Rows on the disk equal what the encoder gives; what is damaged or half written is noticed and written again."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyllava_edge.checkpoint import load_tokenizer
from tinyllava_edge.data.row import BadRow, Row
from tinyllava_edge.errors import StorageError
from tinyllava_edge.prompt import IMAGE_MARKER, TEMPLATES, Turn
from tinyllava_edge.tokenizer_files import factory_special_tokens, fast_tokenizer
from tinyllava_edge.train.collate import group
from tinyllava_edge.train.encode import Compact, Encoded, Encoder, expand
from tinyllava_edge.train.source import Source, open_source
from tinyllava_edge.train.token_build import token_store
from tinyllava_edge.train.token_store import ARRAYS, BAD, META, Packs, TokenStore

from .. import tiny_tokenizers as tiny
from .conftest import message

SLOTS = 5
MANY = 16_000  # rows that take a second or so
TALKS = [
    [("<image>\nwhat color?", "red")],
    [("<image>\nwhat color?", "red"), ("sure?", "yes, naïve 😀")],
    [("hello </s> <s>", "hi <image there")],
    [("is <image> there?", '"quoted" 12')],
]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for k in range(3):
        Image.fromarray(np.full((8, 8, 3), 40 * k, np.uint8)).save(root / f"ä{k}.png")
    return root


def write_rows(path: Path, talks: list[list[tuple[str, str]]], copies: int = 3) -> Path:
    rows: list[dict[str, Any]] = []
    for k in range(copies):
        for j, talk in enumerate(talks):
            spoken = [message(who, text) for turn in talk for who, text in zip(("human", "gpt"), turn, strict=True)]
            row = {"id": f"{k}-{j}", "conversations": spoken}
            if any(IMAGE_MARKER in question for question, _ in talk):
                row["image"] = f"ä{k % 3}.png"
            rows.append(row)
    path.write_text(json.dumps(rows))
    return path


def same(found: Encoded, wanted: Encoded) -> None:
    assert found.ids.dtype == np.int32 and found.is_answer.dtype == np.bool_
    assert found.ids.tolist() == wanted.ids.tolist() and found.is_answer.tolist() == wanted.is_answer.tolist()
    assert (found.shared, found.images) == (wanted.shared, wanted.images)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> Encoder:
    return Encoder(load_tokenizer(tiny_checkpoint), TEMPLATES["llama"], SLOTS, 2048)


@pytest.mark.parametrize("kind", [*tiny.KINDS, "pretrain"])
def test_what_is_read_is_what_the_encoder_gives(kind: str, images: Path, tmp_path: Path, said: list[str]) -> None:
    template = TEMPLATES["pretrain" if kind == "pretrain" else tiny.KINDS[kind][0]]
    kind = "llama" if kind == "pretrain" else kind
    fast = fast_tokenizer(tiny.KINDS[kind][1](tmp_path))
    if kind == "qwen2_instruct":
        fast.eos_token = "<|im_end|>"
    factory_special_tokens(fast, {"phi": "phi", "gemma": "gemma"}.get(kind, "llama" if "llama" in kind else "qwen2"))
    fast.add_tokens([IMAGE_MARKER], special_tokens=True)
    encoder = Encoder(fast, template, SLOTS, 200)
    source = open_source(write_rows(tmp_path / "rows.json", TALKS), images, tmp_path)
    store = token_store(source, encoder, tmp_path / "cache", said.append)
    rows = [row for _, row in source.rows() if isinstance(row, Row) and (row.image or not template.caption_only)]
    assert len(store) == len(rows) and len(store.bad) == 12 - len(rows) and not said
    for number, row in enumerate(rows):
        same(store.encoded(number), encoder.encode(row))
        assert tuple(store.picture(k) for k in store.images(number)) == tuple((0, n) for n in row.images)
        assert store.row_id(number) == row.id
    assert store.pictures == 3
    assert store.column("length").tolist() == [len(encoder.encode(row).ids) for row in rows]
    assert store.column("answers").tolist() == [int(encoder.encode(row).is_answer.sum()) for row in rows]


def test_rows_are_cut_in_front_of_a_picture_that_does_not_fit(encoder: Encoder) -> None:
    """The second picture's slots would be cut through: it is left out, with what follows."""
    row = Row("r", ("a.png", "b.png"), (Turn("<image>\nwhat?", "red"), Turn("<image>\nand now?", "blue")))
    whole = encoder.encode(row)
    place = int(np.flatnonzero(whole.ids == encoder.image_id)[SLOTS])  # the second picture's first slot
    assert whole.images == 2 and whole.shared == 0
    for limit, images in ((place, 1), (place + SLOTS - 1, 1), (place + SLOTS, 2), (len(whole.ids), 2)):
        cut = Encoder(encoder.tokenizer, TEMPLATES["llama"], SLOTS, limit).encode(row)
        length = limit if images == 2 else place
        assert cut.images == images and cut.ids.tolist() == whole.ids[:length].tolist()
        assert cut.is_answer.tolist() == whole.is_answer[:length].tolist()


def test_it_is_used_again_until_something_changes(
    encoder: Encoder, images: Path, tmp_path: Path, said: list[str]
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    source = open_source(write_rows(tmp_path / "rows.json", TALKS), folder, tmp_path)
    cache = tmp_path / "cache"
    first = token_store(source, encoder, cache, said.append)
    written = (first.root / META).stat().st_mtime_ns
    again = token_store(source, encoder, cache, said.append)
    assert again.root == first.root and (first.root / META).stat().st_mtime_ns == written and not said
    # a picture of another size
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "ä1.png")
    token_store(source, encoder, cache, said.append)
    assert len(said) == 1 and "pictures were changed" in said[0]
    # another limit, template, or data
    others = [Encoder(encoder.tokenizer, TEMPLATES["llama"], SLOTS, 60)]
    others += [Encoder(encoder.tokenizer, TEMPLATES["pretrain"], SLOTS, 2048)]
    roots = {token_store(source, other, cache, said.append).root for other in others}
    write_rows(tmp_path / "rows.json", TALKS, copies=4)
    roots.add(token_store(source, encoder, cache, said.append).root)
    assert len(roots | {first.root}) == 4 and len(said) == 1


def test_a_picture_that_comes_later_makes_its_rows_good(
    encoder: Encoder, images: Path, tmp_path: Path, said: list[str]
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "ä1.png").rename(tmp_path / "aside.png")
    source = open_source(write_rows(tmp_path / "rows.json", TALKS), folder, tmp_path)
    store = token_store(source, encoder, tmp_path / "cache", said.append)
    assert len(store) == 9 and [row.row for row in store.bad] == [5, 6, 8] and "ä1.png" in store.bad[0].reason
    token_store(source, encoder, tmp_path / "cache", said.append)
    assert not said
    (tmp_path / "aside.png").rename(folder / "ä1.png")
    store = token_store(source, encoder, tmp_path / "cache", said.append)
    assert len(store) == 12 and len(store.bad) == 0 and len(said) == 1


@pytest.mark.parametrize("spoil", ["cut", "flip", "gone"])
@pytest.mark.parametrize("name", [*ARRAYS, BAD, META])
def test_a_damaged_file_is_named_and_made_again(
    name: str, spoil: str, encoder: Encoder, images: Path, tmp_path: Path, said: list[str]
) -> None:
    rows = [*TALKS, [("<image>\nwhat?", "red"), ("<image>\nagain?", "yes")]]  # the last is bad: two places, one picture
    source = open_source(write_rows(tmp_path / "rows.json", rows), images, tmp_path)
    store = token_store(source, encoder, tmp_path / "cache", said.append)
    wanted = [store.encoded(k) for k in range(len(store))]
    path = store.root / name
    whole = path.read_bytes()
    if spoil == "gone":
        path.unlink()
    elif spoil == "cut":
        path.write_bytes(whole[:-2])
    else:
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
    store = token_store(source, encoder, tmp_path / "cache", said.append)
    assert len(said) == 1 and str(path) in said[0] and "again" in said[0]
    assert path.read_bytes() == whole and len(store.bad) == 3
    for number, row in enumerate(wanted):
        same(store.encoded(number), row)


def in_child(work: Callable[[], object]) -> Any:
    """A forked process, so that nothing has to be imported anew."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    talks = [[(f"question {k}?", f"answer {k}")] for k in range(MANY)]
    return write_rows(tmp_path_factory.mktemp("many") / "rows.json", talks, copies=1)


@pytest.mark.parametrize("moment", ["lock", "directory", "ids", "meta"])
def test_killed_at_any_moment_it_is_written_by_the_next_run(
    moment: str, many: Path, encoder: Encoder, images: Path, tmp_path: Path, said: list[str]
) -> None:
    source = open_source(many, images, tmp_path)
    cache = tmp_path / "cache"
    child = in_child(lambda: token_store(source, encoder, cache, said.append))
    patterns = {"lock": ".*.lock", "directory": ".*.tmp-*", "ids": ".*.tmp-*/ids.bin", "meta": "tokens-*"}
    deadline = time.monotonic() + 60
    while not any(moment != "ids" or path.stat().st_size for path in cache.glob(patterns[moment])):
        assert time.monotonic() < deadline and (child.is_alive() or moment == "meta")
        time.sleep(0.001)
    child.kill()
    child.join()
    store = token_store(source, encoder, cache, said.append)
    assert not said and len(store) == MANY
    same(store.encoded(5000), encoder.encode(Row("", (), (Turn("question 5000?", "answer 5000"),))))
    assert sorted(path.name for path in cache.iterdir()) == [f".{store.root.name}.lock", store.root.name]


def test_of_several_processes_one_writes_and_the_others_wait(
    many: Path, encoder: Encoder, images: Path, tmp_path: Path
) -> None:
    source = open_source(many, images, tmp_path)

    def work() -> None:
        said: list[str] = []
        store = token_store(source, encoder, tmp_path / "cache", said.append)
        text = {"rows": len(store), "said": said, "inode": (store.root / META).stat().st_ino}
        (tmp_path / f"{os.getpid()}.json").write_text(json.dumps(text))

    children = [in_child(work) for _ in range(3)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert [one["rows"] for one in found] == [MANY] * 3 and len({one["inode"] for one in found}) == 1
    waited = [one["said"] for one in found if one["said"]]
    assert len(waited) == 2 and all("waiting" in lines[0] and len(lines) == 1 for lines in waited)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB; without the right to mount one, a limit on file sizes."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=300k tmpfs {place} 2>/dev/null") == 0:
        yield place
        assert os.system(f"umount {place}") == 0  # no file is left open
        return
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, before[1]))
    yield place
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_and_nothing_is_left(
    many: Path, encoder: Encoder, images: Path, tmp_path: Path, small_disk: Path, said: list[str]
) -> None:
    with pytest.raises(StorageError, match="no space left") as full:
        token_store(open_source(many, images, tmp_path), encoder, small_disk, said.append)
    assert str(small_disk) in full.value.message and full.value.hint
    assert not [path for path in small_disk.iterdir() if path.suffix != ".lock"]


def test_a_limit_on_file_sizes_is_a_full_disk(
    many: Path, encoder: Encoder, images: Path, tmp_path: Path, said: list[str]
) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, before[1]))
    try:
        with pytest.raises(StorageError, match="no space left|can't be written"):
            token_store(open_source(many, images, tmp_path), encoder, tmp_path / "cache", said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


class Given(Encoder):
    """Stands in for the tokenizer: the ids of a row are in its question."""

    def __init__(self, encoder: Encoder, slots: int) -> None:
        self.__dict__.update(encoder.__dict__)
        self.visual_tokens = slots

    def compact(self, row: Row) -> Compact:
        pairs = json.loads(row.turns[0].question)
        ids = np.array([index for index, _ in pairs], np.int32)
        images = int((ids == self.image_id).sum())
        shared = int(np.flatnonzero(ids == self.image_id)[0]) + 1 if images == 1 and len(pairs) % 2 else 0
        return Compact(ids, np.array([bool(mark) for _, mark in pairs], np.bool_), shared, images)


class Streamed(Source):
    """Rows from memory or a generator, with as many pictures as their ids say."""

    rows_: Any = None

    def picture_fingerprint(self, number: int, name: str) -> str:
        return name

    def fingerprint(self) -> str:
        return "given"

    def rows(self) -> Iterator[tuple[int, Row | BadRow]]:
        yield from ((0, row) for row in self.rows_())


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=20), max_size=25),
    st.integers(1, 7),
    st.integers(1, 4),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_any_rows_come_back(
    encoder: Encoder, tmp_path_factory: pytest.TempPathFactory, rows: list[Any], slots: int, most: int
) -> None:
    """Ids 0 to 6, of which 5 is the picture's here; marks of any number, so bytes end anywhere."""
    given_ = Given(encoder, slots)
    given_.image_id = 5
    rows = [[(index, mark and index != 5) for index, mark in row] for row in rows]  # a picture is no answer
    rows = [[pair for k, pair in enumerate(row) if pair[0] != 5 or k == 0] for row in rows]  # one, in front
    out = tmp_path_factory.mktemp("any")
    source = Streamed((), ())
    made = [
        Row(f"ü{k}", (f"{k % 3}.png",) if row[0][0] == 5 else (), (Turn(json.dumps(row)),))
        for k, row in enumerate(rows)
    ]
    object.__setattr__(source, "rows_", lambda: iter(made))
    store = token_store(source, given_, out, lambda text: None)
    assert len(store) == len(rows)
    for k, row in enumerate(made):
        compact = given_.compact(row)
        naive_ids = [i for i in compact.ids.tolist() for _ in range(slots if i == 5 else 1)]
        naive_marks = [
            m for i, m in zip(compact.ids.tolist(), compact.is_answer.tolist(), strict=True)
            for _ in range(slots if i == 5 else 1)
        ]  # fmt: skip
        found = store.encoded(k)
        assert found.ids.tolist() == naive_ids and found.is_answer.tolist() == naive_marks
        same(found, expand(compact, 5, slots))
        assert [store.picture(n)[1] for n in store.images(k)] == list(row.images)
    packs = Packs(store, most)
    assert packs.lengths.tolist() == [item.length for item in packs]
    assert sum(len(item.rows) for item in packs) == packs.kept == len(rows)
    order, _ = group(store.shareable(), most)
    assert packs.rows.tolist() == order.tolist()


def test_memory_does_not_grow_with_the_rows(encoder: Encoder, tmp_path: Path) -> None:
    """40,000 rows of 60 ids are 9.6 MB; written with less than 5 MB and 32 bytes a picture."""
    question = json.dumps([(5, 0)] + [(1, 1)] * 59)
    given_ = Given(encoder, 2)
    given_.image_id = 5
    compact = given_.compact(Row("", ("a.png",), (Turn(question),)))
    given_.compact = lambda row: compact  # type: ignore[method-assign]
    source = Streamed((), ())
    turns = (Turn(question),)
    object.__setattr__(source, "rows_", lambda: (Row(str(k), (f"{k % 50}.png",), turns) for k in range(40_000)))
    token_store(source, given_, tmp_path / "warm", lambda text: None)
    tracemalloc.start()
    store = token_store(source, given_, tmp_path / "cache", lambda text: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(store) == 40_000 and (store.root / "ids.bin").stat().st_size == 9_600_000
    assert peak < (5 << 20) + 32 * 40_000, peak


def test_a_store_can_be_sent_to_another_process(
    encoder: Encoder, images: Path, tmp_path: Path, said: list[str]
) -> None:
    import pickle

    store = token_store(open_source(write_rows(tmp_path / "r.json", TALKS), images, tmp_path), encoder, tmp_path, print)
    sent = pickle.dumps(store)
    assert len(sent) < 500
    other = pickle.loads(sent)
    assert isinstance(other, TokenStore)
    same(other.encoded(2), store.encoded(2))
