"""Sets from flags and from TOML; an epoch's order is one permutation, the same everywhere, even over the epochs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllava_edge.data.picture_store import open_store
from tinyllava_edge.data.row import BadRow
from tinyllava_edge.data.sets import DataSet, epoch_order, read_sets, rows
from tinyllava_edge.errors import DataError, UsageError

from .archives import make_tar, png, talk

SETS = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 3.5)), min_size=1, max_size=4)


def split(order: np.ndarray, sizes: list[int]) -> list[Counter[int]]:
    """How often each row of each set was drawn."""
    starts = np.cumsum([0, *sizes])
    return [Counter(order[(order >= a) & (order < b)].tolist()) for a, b in zip(starts, starts[1:], strict=False)]


@settings(max_examples=100, deadline=None)
@given(sets=SETS, seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_an_epoch_holds_whole_copies_and_a_part(sets: list[tuple[int, float]], seed: int, epoch: int) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    order = epoch_order(sizes, weights, seed, epoch)
    assert order.dtype == np.int64 and len(order) == sum(round(w * n) for n, w in sets)
    assert np.array_equal(order, epoch_order(sizes, weights, seed, epoch))
    for (size, weight), drawn in zip(sets, split(order, sizes), strict=True):
        assert sum(drawn.values()) == round(weight * size)
        assert set(drawn.values()) <= {int(weight), int(weight) + 1} and (weight < 1 or len(drawn) == size)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 30), weight=st.floats(0.05, 2.5), seed=st.integers(0, 99), epochs=st.integers(1, 40))
def test_over_the_epochs_no_row_is_drawn_twice_before_all_came_once(
    size: int, weight: float, seed: int, epochs: int
) -> None:
    drawn: Counter[int] = Counter(range(size))
    for epoch in range(epochs):
        drawn.update(epoch_order([size], [weight], seed, epoch).tolist())
        assert max(drawn.values()) - min(drawn.values()) <= 1


def test_orders_differ_by_epoch_and_seed_and_parts_too() -> None:
    one = epoch_order([1000, 500], [1.0, 0.5], 1, 0)
    assert not np.array_equal(one, epoch_order([1000, 500], [1.0, 0.5], 1, 1))
    assert not np.array_equal(one, epoch_order([1000, 500], [1.0, 0.5], 2, 0))
    parts = [set(epoch_order([500], [0.5], 1, epoch).tolist()) for epoch in (0, 1)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 500
    assert abs(np.corrcoef(np.arange(1000), epoch_order([1000], [1.0], 0, 0))[0, 1]) < 0.1
    positions = np.flatnonzero(one >= 1000)  # the second set is spread over the epoch
    assert 400 < positions[len(positions) // 2] < 850


def test_every_process_gets_the_same_order() -> None:
    code = "from tinyllava_edge.data.sets import epoch_order; print(epoch_order([9, 7], [1.5, 0.4], 3, 2).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(other) == epoch_order([9, 7], [1.5, 0.4], 3, 2).tolist()


@pytest.mark.parametrize(
    ("sizes", "weights"), [([1], []), ([1], [-0.1]), ([1], [float("nan")]), ([1], [float("inf")]), ([-1], [1.0])]
)
def test_impossible_mixtures_are_refused(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(UsageError):
        epoch_order(sizes, weights, 0, 0)


# sets


def test_flags_make_one_set_and_toml_several(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    for k in (8, 9, 10):
        make_tar(tmp_path / f"{k:02d}.tar", {})
    shards = tuple(tmp_path / f"{k:02d}.tar" for k in (8, 9, 10))
    (one,) = read_sets([tmp_path / "a.json", tmp_path / "{08..10}.tar", tmp_path / "pets"], [tmp_path / "x.zip"])
    assert one == DataSet(
        (tmp_path / "a.json", *shards, tmp_path / "pets"), (tmp_path / "x.zip", *shards, tmp_path / "pets")
    )
    toml = tmp_path / "mix.toml"
    toml.write_text(
        '[[sets]]\ndata = "a.json"\nimages = ["x.zip", "/abs"]\nweight = 2\n'
        '[[sets]]\nname = "b"\ndata = ["*.tar"]\nweight = 0.5\n[[sets]]\ndata = "c.json"\nimages = []\n'
    )
    first, second, third = read_sets([toml], [tmp_path / "given"])
    assert first == DataSet((tmp_path / "a.json",), (tmp_path / "x.zip", Path("/abs")), 2.0, "a")
    assert second == DataSet(shards, (tmp_path / "given", *shards), 0.5, "b") and third.images == ()


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "": "something else than",
        "x = [": "TOML",
        "sets = 3": "something else than",
        "[[sets]]": "no data",
        '[[sets]]\ndata = ""': "neither a path nor a list",
        "[[sets]]\ndata = 3": "neither a path nor a list",
        '[[sets]]\ndata = "a\\u0000"': "neither a path nor a list",
        '[[sets]]\ndata = "a"\nweigth = 1': "unknown keys",
        '[[sets]]\ndata = "a"\nweight = 0': "weight 0",
        '[[sets]]\ndata = "a"\nweight = nan': "weight nan",
        '[[sets]]\ndata = "a"\nweight = true': "weight True",
        '[[sets]]\ndata = "a"\nweight = 1e9': "weight",
        '[[sets]]\ndata = "a"\nname = 1': "name is no text",
        '[[sets]]\ndata = "a"\n[other]\nx = 1': "something else than",
        '[[sets]]\ndata = "none*.json"': "no such file",
    }.items(),
)
def test_a_toml_file_that_can_not_be_used_is_named(text: str, words: str, tmp_path: Path) -> None:
    toml = tmp_path / "mix.toml"
    toml.write_text(text)
    with pytest.raises(DataError, match=words) as error:
        read_sets([toml], [])
    assert str(tmp_path) in error.value.message and error.value.hint


def test_data_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    store = open_store([], tmp_path / "index")
    for name in ("none.json", "{1..3}.tar", "x.tar.gz", "x.zip"):
        if name.startswith("x"):
            (tmp_path / name).write_bytes(b"x")
        (dataset,) = read_sets([tmp_path / name], [])
        with pytest.raises(DataError, match=r"none\.json|1\.tar|compressed|a zip file as data"):
            list(rows(dataset, store))
    with pytest.raises(UsageError):
        read_sets([], [])
    with pytest.raises(UsageError, match="beside other data"):
        read_sets([tmp_path / "a.toml", tmp_path / "b.json"], [])
    with pytest.raises(DataError, match="more than"):
        read_sets([tmp_path / "{1..9999}{1..9999}.tar"], [])
    with pytest.raises(DataError, match="no such file"):
        read_sets([tmp_path / "mix.toml"], [])


def test_rows_of_json_are_checked_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    values = [{"id": k, "image": name, **json.loads(talk())} for k, name in enumerate(["a.png", "no.png", "a.png"])]
    (tmp_path / "a.json").write_text(json.dumps(values)[:-1] + ", oops]")
    (dataset,) = read_sets([tmp_path / "a.json"], [tmp_path])
    found = rows(dataset, open_store(dataset.images, tmp_path / "index"))
    assert [isinstance(next(found), BadRow) for _ in values] == [False, True, False]
    with pytest.raises(DataError, match="row 4"):
        next(found)
