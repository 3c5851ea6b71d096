"""Data sets and mixtures of them: what is read, from where, and in which order.

[[sets]]                        # mixture.toml
data = "llava.json"             # JSON, JSON lines, shards ("shards/{000..099}.tar") or a folder; a list of them too
images = ["coco.zip", "gqa/"]   # folders, .zip and .tar files
weight = 0.5                    # half of its rows each epoch, another half each time
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, UsageError
from ..toml_files import read_toml
from .json_rows import json_rows
from .llava_json import PictureCheck, checked_row
from .paths import expand
from .picture_store import PictureStore
from .row import BadRow, Row
from .samples import data_sources, folder_rows, shard_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_KEYS = ("data", "images", "weight", "name")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz", ".xz", ".txz", ".zst")
MAX_WEIGHT = 1000.0


@dataclass(frozen=True)
class DataSet:
    """Rows that are read together, and where their pictures are."""

    data: tuple[Path, ...]
    """JSON files, JSON lines, .tar shards and folders of pictures, patterns expanded"""
    images: tuple[Path, ...]
    """folders, .zip and .tar files that pictures are looked up in; shards and folders of `data` come last"""
    weight: float = 1.0
    """how often its rows are drawn in each epoch: 0.5 is half of them, 2 each row twice"""
    name: str = ""
    """what messages call it"""


def read_sets(data: Sequence[Path], images: Sequence[Path]) -> tuple[DataSet, ...]:
    """The sets that `--data` and `--images` name.

    Args:
        data: files, shards and folders, ranges and patterns allowed, which make one set; or one .toml file with
            `[[sets]]`, whose paths are relative to it.
        images: folders and archives; in a .toml file those of sets that name none.

    Raises:
        UsageError: no data, or a .toml file beside other data.
        DataError: a .toml file that can't be used, a pattern that fits nothing, or two shards with one name.
    """
    if not data:
        raise UsageError("no data", "name a file, shards or a folder with --data")
    toml = [path for path in data if path.suffix.lower() == ".toml"]
    if not toml:
        return (_set(data, images),)
    if len(data) > 1:
        raise UsageError(f"{toml[0]} beside other data", "name all of them in the .toml file")
    return _from_toml(toml[0], images)


def rows(dataset: DataSet, store: PictureStore) -> Iterator[Row | BadRow]:
    """Every row of a set in the order of its files, checked; memory holds one at a time.

    Args:
        store: `open_store(dataset.images, …)`.

    Raises:
        DataError: a file is missing, truncated, damaged, or of a form that can't be read.
    """
    check = PictureCheck(store)
    for path in dataset.data:
        suffix = path.suffix.lower()
        if path.is_dir():
            yield from folder_rows(path, store)
        elif not path.is_file():
            raise DataError(f"{path}: no such file", "check the path given to --data")
        elif suffix == ".tar":
            yield from shard_rows(path, store)
        elif suffix in _COMPRESSED:
            raise DataError(f"{path}: compressed", "unpack it, or pack shards again as plain .tar files")
        elif suffix == ".zip":
            raise DataError(f"{path}: a zip file as data", "give JSON, .tar shards or a folder; zip files to --images")
        else:
            for number, value in json_rows(path):
                yield checked_row(value, check, str(path), number)


def epoch_order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> NDArray[np.int64]:
    """Which rows an epoch draws, and in which order; the same in every process.

    A set of n rows and weight w gives round(w · n) draws: floor(w) whole copies, and a part. The parts of successive
    epochs are neighbouring windows of one fixed permutation, so that no row comes twice before all came once, and no
    row twice within a part.

    Args:
        sizes: rows of each set.
        weights: of each set, 0 to MAX_WEIGHT.
        seed, epoch: not below zero; they alone decide the order.

    Returns:
        int64 (Σ round(w · n),): row numbers, those of a set behind those of the sets before it.

    Raises:
        UsageError: as many weights as sizes are needed, none below zero.
    """
    import numpy as np

    if len(sizes) != len(weights) or any(size < 0 for size in sizes) or seed < 0 or epoch < 0:
        raise UsageError(
            f"{len(sizes)} sizes, {len(weights)} weights, seed {seed}, epoch {epoch}",
            "give as many weights as sizes; nothing is below zero",
        )
    drawn: list[NDArray[np.int64]] = []
    start = 0
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        _check_weight(weight, "epoch_order")
        copies = math.floor(weight)
        part = round(weight * size) - copies * size
        drawn += [np.arange(start, start + size, dtype=np.int64)] * copies
        if part:
            fixed = np.random.default_rng((seed, number, 1)).permutation(size)
            window = (np.arange(part, dtype=np.int64) + epoch * part) % size
            drawn.append(start + fixed[window].astype(np.int64))
        start += size
    order = np.concatenate([np.zeros(0, np.int64), *drawn])
    np.random.default_rng((seed, epoch, 2)).shuffle(order)
    return order


def _set(data: Sequence[Path], images: Sequence[Path], weight: float = 1.0, name: str = "") -> DataSet:
    found = tuple(path for given in data for path in expand(given))
    own = data_sources(found)
    names: set[str] = set()
    for path in own:
        if not path.is_dir() and path.name in names:
            raise DataError(f"{path}: another shard of this set has that name", "rename one, or make two sets of them")
        names.add(path.name)
    sources = [path for given in images for path in expand(given, "--images")]
    return DataSet(found, tuple(dict.fromkeys([*sources, *own])), weight, name)


def _from_toml(path: Path, images: Sequence[Path]) -> tuple[DataSet, ...]:
    if not path.exists():
        raise DataError(f"{path}: no such file", "check the path given to --data")
    value = read_toml(path, "see docs/data.md for an example", DataError)
    sets = value.get("sets")
    if set(value) != {"sets"} or not isinstance(sets, list) or not sets:
        raise DataError(f"{path}: holds something else than [[sets]]", "see docs/data.md for an example")
    found: list[DataSet] = []
    for number, entry in enumerate(sets, 1):
        where = f"{path}: set {number}"
        if not isinstance(entry, dict) or not set(entry) <= set(_KEYS):
            raise DataError(f"{where}: unknown keys", f"known: {', '.join(_KEYS)}")
        weight, name = entry.get("weight", 1.0), entry.get("name", "")
        if not isinstance(name, str):
            raise DataError(f"{where}: name is no text", "leave it out, or give a text")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
            raise DataError(f"{where}: weight {str(weight)[:40]}", f"a number above 0, up to {MAX_WEIGHT:g}")
        inside = _paths(entry.get("data"), path.parent, where, "data")
        if not inside:
            raise DataError(f"{where}: no data", 'e.g. data = "llava.json"')
        given = _paths(entry["images"], path.parent, where, "images") if "images" in entry else list(images)
        found.append(_set(inside, given, float(weight), name or inside[0].stem))
    return tuple(found)


def _paths(value: Any, root: Path, where: str, key: str) -> list[Path]:
    """Paths of the file, relative to it; users may name any place of theirs."""
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v and "\0" not in v for v in values):
        raise DataError(f"{where}: {key} is neither a path nor a list of paths", f'e.g. {key} = ["a", "b"]')
    return [root / v for v in values]


def _check_weight(weight: float, where: str) -> None:
    if not 0 <= weight <= MAX_WEIGHT:
        raise UsageError(f"{where}: weight {weight}", f"a number from 0 to {MAX_WEIGHT:g}")
