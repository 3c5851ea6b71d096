"""WebDataset shards and folders of pictures as data: a picture, and beside it what is said about it.

    000.tar: a.jpg a.json  b.png b.txt        pets/: a.jpg a.json  b.png b.txt

`.json` holds one LLaVA or `messages` row, `.txt` a caption. Without a row in the `.json` (downloaders put other facts
there) the caption counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from posixpath import splitext
from typing import Any

from ..errors import DataError
from ..prompt import IMAGE_MARKER
from .archive_index import plain_name
from .llava_json import PictureCheck, checked_row
from .picture_sources import fingerprint_of
from .picture_store import PictureStore
from .row import NAME_LIMIT, BadRow, Row, RowFault
from .tar_members import tar_members
from .zip_members import Member

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
CAPTION_PROMPT = "Describe the image."  # the human's words of a caption row; stage 1 drops them
MAX_TEXT = 16 << 20  # bytes of a .json or .txt
MAX_MEMBERS = 256  # files of one sample


@dataclass
class _Sample:
    """Files with one stem."""

    stem: str
    pictures: list[str] = field(default_factory=list)
    json: Callable[[], bytes] | None = None
    text: Callable[[], bytes] | None = None
    fault: str = ""

    def add(self, name: str, picture: str, size: int, read: Callable[[], bytes]) -> None:
        """Take a file in.

        Args:
            name: the file's own.
            picture: what the store calls it, should it be a picture.
            size: bytes.
            read: gives its bytes.
        """
        suffix = splitext(name)[1].lower()
        if suffix in PICTURES:
            if picture in self.pictures:
                self.fault = f"has {name[:NAME_LIMIT]!r} twice"
            self.pictures.append(picture)
        elif suffix in (".json", ".txt"):
            if size > MAX_TEXT:
                self.fault = f"{suffix} of {size:,} bytes, limit {MAX_TEXT:,}"
            if (self.json if suffix == ".json" else self.text) is not None:
                self.fault = f"has two {suffix} files"
            if suffix == ".json":
                self.json = read
            else:
                self.text = read
        if len(self.pictures) > MAX_MEMBERS:
            self.fault = f"more than {MAX_MEMBERS} pictures"
            self.pictures.pop()

    def row(self, check: PictureCheck, file: str, number: int) -> Row | BadRow:
        """The sample as a row."""
        try:
            return checked_row(self._value(), check, file, number, own=self.pictures, id=self.stem)
        except RowFault as error:
            fault = str(error)
        except (OSError, ValueError, RecursionError) as error:
            fault = f"can't be read ({error})"
        return BadRow(file, number, self.stem[:NAME_LIMIT], fault)

    def _value(self) -> Any:
        """What `checked_row` takes."""
        if self.fault:
            raise RowFault(self.fault)
        value = None if self.json is None else json.loads(self.json().decode("utf-8-sig"))
        is_row = not isinstance(value, dict) or bool({"conversations", "messages"} & value.keys())
        if self.json is not None and is_row:
            return value
        if self.text is None:
            if self.json is not None:
                raise RowFault("its .json holds neither `conversations` nor `messages`, and there is no .txt")
            raise RowFault("a picture without .json or .txt" if self.pictures else "holds no picture, .json or .txt")
        if not self.pictures:
            raise RowFault("a caption without a picture")
        caption = self.text().decode("utf-8-sig").strip()
        question = f"{IMAGE_MARKER}\n{CAPTION_PROMPT}"
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]}


def shard_rows(shard: Path, store: PictureStore) -> Iterator[Row | BadRow]:
    """The samples of a tar file in its order.

    A sample's members stand together and share what is in front of the first dot, as WebDataset has it; so `a.0.jpg`
    and `a.1.jpg` are two pictures of one sample. A link or device counts as a bad sample.

    Args:
        store: holds the shard itself; the pictures are called `SHARD.tar/MEMBER`.

    Raises:
        DataError: truncated or damaged.
    """
    check = PictureCheck(store)
    file = str(shard)
    with shard.open("rb") as handle:

        def reader(member: Member) -> Callable[[], bytes]:
            def read() -> bytes:
                return os.pread(handle.fileno(), member.size, member.offset)

            return read

        for number, (key, members) in enumerate(groupby(tar_members(shard), _key), 1):
            sample = _Sample(key)
            others: dict[str, str] = {}  # picture → its fingerprint
            for member in members:
                if isinstance(member, str):
                    sample.fault = f"{member[:NAME_LIMIT]!r} is a link or a device"
                elif (plain := plain_name(member.name)) is None:
                    sample.fault = f"{member.name[:NAME_LIMIT]!r} leaves the shard"
                else:
                    picture = f"{shard.name}/{plain}"
                    sample.add(plain, picture, member.size, reader(member))
                    if len(others) <= MAX_MEMBERS:
                        others[picture] = fingerprint_of(member)
            found = sample.row(check, file, number)
            if isinstance(found, Row):
                for name in set(found.images) & others.keys():
                    if store.origin(name) != shard or store.fingerprint(name) != others[name]:
                        found = BadRow(file, number, found.id[:NAME_LIMIT], f"{name!r} is the name of two pictures")
                        break
            yield found


def folder_rows(folder: Path, store: PictureStore) -> Iterator[Row | BadRow]:
    """The samples of a directory and those below it, sorted by name; links are followed.

    A sample's files share all but the last suffix. Files of other kinds, and those whose name begins with a dot, are
    no samples.

    Args:
        store: holds the directory itself; the pictures are called as they are from there.

    Raises:
        DataError: the directory can't be read.
    """
    check = PictureCheck(store)
    number = 0
    for below, names in _files(folder):
        for stem, group in groupby(names, _stem):
            number += 1
            sample = _Sample((below / stem).as_posix())
            for name in group:
                path, picture = folder / below / name, (below / name).as_posix()
                if not path.is_file():
                    sample.fault = f"{name[:NAME_LIMIT]!r} is no regular file"
                    continue
                sample.add(name, picture, path.stat().st_size, path.read_bytes)
                if picture in sample.pictures and store.origin(picture) not in (None, folder):
                    sample.fault = f"another source holds a picture that is called {picture!r} too"
            yield sample.row(check, str(folder), number)


def _key(member: Member | str) -> str:
    """What a member's sample is called."""
    name = member if isinstance(member, str) else plain_name(member.name) or member.name
    start, slash, last = name.rpartition("/")
    stem = last.split(".", 1)[0]
    return f"{start}{slash}{stem}" if stem else name


def _stem(name: str) -> str:
    return splitext(name)[0]


def _files(folder: Path) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """Directories from `folder` on, and the names in them that samples are made of, a stem's together."""
    known = {*PICTURES, ".json", ".txt"}
    seen: set[str] = set()  # a link may lead in a circle
    for root, directories, names in os.walk(folder, followlinks=True, onerror=_refuse):
        seen.add(os.path.realpath(root))
        directories[:] = sorted(
            name
            for name in directories
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) not in seen
        )
        chosen = [n for n in names if not n.startswith(".") and splitext(n)[1].lower() in known]
        yield PurePosixPath(Path(root).relative_to(folder)), sorted(chosen, key=lambda name: (_stem(name), name))


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: can't be read ({error.strerror})", "check the directory's permissions")


def data_sources(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Those of a set's data that hold pictures themselves: shards and directories."""
    return tuple(path for path in paths if path.suffix.lower() == ".tar" or path.is_dir())
