"""A data set's rows as ids on the disk: written once, mapped into memory, used again while nothing changed.

A directory `tokens-{key}` holds plain arrays, and `meta.json` with the size and SHA-256 of each:

    ids.bin       int32    compact ids of all rows, one `<image>` id for each picture
    marks.bin     bits     which of them are answers, eight a byte, the first in the highest bit
    rows.bin      int64    (rows, 9), the columns of COLUMNS
    row_ids.bin   UTF-8    the rows' own names, for messages
    images.bin    int32    picture numbers of all rows
    pictures.bin  int64    (pictures, 3): start and end of the name in names.bin, number of the set
    names.bin     UTF-8
    bad.jsonl              rows that were left out

Memory: nothing per row while it is read (the system's page cache aside).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..data.llava_json import BadRow
from ..errors import StorageError
from ..files import sha256_file
from .collate import EMPTY, Pack, Places, group
from .encode import Compact, Encoded, expand

FORMAT = 1
META, BAD = "meta.json", "bad.jsonl"
COLUMNS = ("id_end", "image_end", "name_end", "number", "file", "set", "length", "shared", "answers")
# ends in ids, images and row_ids; place in its file; file; set; positions, shared ones and answer tokens when expanded
ARRAYS = {"ids.bin": "<i4", "marks.bin": "u1", "rows.bin": "<i8", "row_ids.bin": "u1", "images.bin": "<i4"}
ARRAYS |= {"pictures.bin": "<i8", "names.bin": "u1"}


class TokenStore:
    """Rows by number; opened anew in every process that it is sent to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.meta: dict[str, Any] = json.loads((root / META).read_text(encoding="utf-8"))
        parts = {name: _map(root / name, kind) for name, kind in ARRAYS.items()}
        self._ids, self._marks, self._images = parts["ids.bin"], parts["marks.bin"], parts["images.bin"]
        self._rows = parts["rows.bin"].reshape(-1, len(COLUMNS))
        self._pictures = parts["pictures.bin"].reshape(-1, 3)
        self._row_ids, self._names = parts["row_ids.bin"], parts["names.bin"]
        self.image_id, self.visual_tokens = int(self.meta["image_id"]), int(self.meta["visual_tokens"])
        self.bad = BadRows(root / BAD, int(self.meta["bad"]))

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.root,)

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """(rows,) one of COLUMNS, mapped."""
        return self._rows[:, COLUMNS.index(name)]

    def _span(self, row: int, column: int) -> slice:
        return slice(int(self._rows[row - 1, column]) if row else 0, int(self._rows[row, column]))

    def compact(self, row: int) -> Compact:
        """A row as it is stored."""
        span = self._span(row, 0)
        first = span.start // 8
        bits = np.unpackbits(self._marks[first : -(-span.stop // 8)])
        marks = bits[span.start - 8 * first : span.stop - 8 * first].view(np.bool_)
        images = self._span(row, 1)
        shared = int(self._rows[row, 7])
        return Compact(
            self._ids[span], marks, shared - self.visual_tokens + 1 if shared else 0, images.stop - images.start
        )

    def encoded(self, row: int) -> Encoded:
        """A row as `Encoder.encode` gave it."""
        return expand(self.compact(row), self.image_id, self.visual_tokens)

    def images(self, row: int) -> tuple[int, ...]:
        """Numbers of a row's pictures."""
        return tuple(self._images[self._span(row, 1)].tolist())

    def row_id(self, row: int) -> str:
        """The row's own name."""
        return bytes(self._row_ids[self._span(row, 2)]).decode("utf-8", "surrogatepass")

    @property
    def pictures(self) -> int:
        """Number of different pictures."""
        return len(self._pictures)

    def picture(self, number: int) -> tuple[int, str]:
        """Set and name of a picture."""
        start, end, of = self._pictures[number].tolist()
        return of, bytes(self._names[start:end]).decode()

    def shareable(self) -> Places:
        """(rows,) the picture of single-turn rows about one, else -1: what `group` takes."""
        found = np.full(len(self), -1, np.int64)
        able = np.flatnonzero(self.column("shared"))
        found[able] = self._images[self.column("image_end")[able] - 1]
        return found

    def rows_with(self, pictures: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Rows that show one of the pictures, with the first such picture."""
        places = np.flatnonzero(np.isin(self._images, np.array(pictures, np.int32)))
        rows = np.searchsorted(self.column("image_end"), places, side="right")
        chosen, first = np.unique(rows, return_index=True)
        yield from zip(chosen.tolist(), self._images[places[first]].tolist(), strict=True)

    def bad_row(self, row: int, reason: str) -> BadRow:
        """A row of the store as one that is left out."""
        number, file = int(self._rows[row, 3]), int(self._rows[row, 4])
        return BadRow(self.meta["files"][file], number, self.row_id(row)[:200], reason)


class Packs(Sequence[Pack]):
    """The packs of a store, made when they are asked for.

    Args:
        keep: (rows,) rows to use; all by default.

    Memory: 8 bytes a row, 12 a pack.
    """

    def __init__(self, store: TokenStore, max_turns: int, keep: npt.NDArray[np.bool_] | None = None) -> None:
        chosen = np.arange(len(store)) if keep is None else np.flatnonzero(keep)
        rows, self.ends = group(store.shareable()[chosen], max_turns)
        self.store, self.rows = store, chosen[rows]
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64) if len(self.ends) else self.ends
        own = store.column("length")[self.rows]
        several = np.repeat(np.diff(self.ends, prepend=0) > 1, np.diff(self.ends, prepend=0))
        own = own - np.where(several, store.column("shared")[self.rows], 0)
        lengths = np.add.reduceat(own, starts) if len(starts) else own
        first = self.rows[starts]
        lengths += np.where(np.diff(self.ends, prepend=0) > 1, store.column("shared")[first], 0)
        self.lengths = lengths.astype(np.int32)
        self.sizes = np.bincount(store.column("set")[first], minlength=1).tolist() if len(first) else [0]
        self.kept = len(chosen)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Pack: ...

    @overload
    def __getitem__(self, index: slice) -> list[Pack]: ...

    def __getitem__(self, index: int | slice) -> Pack | list[Pack]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = self.rows[self.ends[index - 1] if index else 0 : self.ends[index]].tolist()
        return Pack(tuple(self.store.encoded(row) for row in rows), self.store.images(rows[0]))

    def shortest_with_picture(self) -> int | None:
        """The pack of fewest positions that shows a picture; None if none does."""
        ends = self.store.column("image_end")
        first = self.rows[np.concatenate([[0], self.ends[:-1]]).astype(np.int64)]
        places = np.flatnonzero(ends[first] > np.where(first > 0, ends[first - 1], 0))
        return int(places[np.argmin(self.lengths[places])]) if len(places) else None

    def or_gap(self, index: int) -> Pack:
        """The pack, or the empty one for the index behind the last."""
        return EMPTY if index == len(self) else self[index]


class BadRows(Sequence[BadRow]):
    """Rows that were left out, read from their file when asked for, and a few more in memory."""

    def __init__(self, path: Path, count: int, more: Sequence[BadRow] = ()) -> None:
        self.path, self.stored, self.more = path, count, tuple(more)

    def __len__(self) -> int:
        return self.stored + len(self.more)

    def __iter__(self) -> Iterator[BadRow]:
        if self.stored:
            with self.path.open(encoding="utf-8") as lines:
                yield from (BadRow(**json.loads(line)) for line in lines)
        yield from self.more

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index] if index else next(iter(self))


def fault(root: Path) -> str | None:
    """What is wrong with a store on the disk, naming the file; None when it is whole."""
    path = root / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        files = meta["bytes"]
        if meta["check"] != check(meta) or meta["format"] != FORMAT:
            return f"{path}: altered"
        for name in (*ARRAYS, BAD):
            size, digest = files[name]
            if not (root / name).is_file():
                return f"{root / name}: missing"
            if (root / name).stat().st_size != size:
                return f"{root / name}: {(root / name).stat().st_size:,} bytes instead of {size:,}"
            if sha256_file(root / name) != digest:
                return f"{root / name}: altered"
    except OSError as error:
        return f"{path}: can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{path}: damaged"
    return None


def check(meta: dict[str, Any]) -> str:
    """Hash of everything else in `meta`."""
    rest = {key: value for key, value in meta.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _map(path: Path, kind: str) -> npt.NDArray[Any]:
    try:
        if not path.stat().st_size:
            return np.zeros(0, kind)
        return np.memmap(path, kind, "r").view(np.ndarray)
    except OSError as error:
        raise StorageError(f"{path}: can't be read ({error.strerror})", "run the same command again") from error
