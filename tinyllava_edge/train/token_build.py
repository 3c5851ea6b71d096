"""Write a token store in one pass over the rows, or find the one that an earlier run wrote.

Memory while it is written: 32 bytes for each picture of each row, to number them; the rest is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..data.llava_json import BadRow, Row, bad_row
from ..errors import DataError, StorageError
from ..files import new_directory, no_space, write_json
from .encode import Encoder
from .locks import alone
from .source import Source
from .token_store import ARRAYS, BAD, FORMAT, META, TokenStore, check, fault

CHUNK = 1 << 11  # rows between two writes
Say = Callable[[str], None]


def token_store(source: Source, encoder: Encoder, cache: Path, say: Say) -> TokenStore:
    """The rows of `source` as `encoder` makes them, from `cache` or written there.

    Several processes may call it at once: one writes, the others wait for it.

    Raises:
        DataError: files that can't be used.
        StorageError: the disk is full; nothing is left behind.
    """
    facts = {
        "format": FORMAT,
        "data": source.fingerprint(),
        "tokenizer": _tokenizer_hash(encoder.tokenizer),
        "template": asdict(encoder.template),
        "visual_tokens": encoder.visual_tokens,
        "max_length": encoder.max_length,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    root = cache / f"tokens-{key[:32]}"
    with alone(
        cache / f".{root.name}.lock", lambda: say(f"{root}: another process writes it; waiting until it is done")
    ):
        if root.exists():
            reason = fault(root) or _changed(root, source)
            if reason is None:
                return TokenStore(root)
            say(f"{reason}; the rows are tokenised again")
        with _write_errors(root), new_directory(root, force=True) as temporary:
            _write(source, encoder, facts, temporary)
        return TokenStore(root)


def pictures_hash(store: TokenStore, source: Source) -> str:
    """Hex SHA-256 over the names and fingerprints of a store's pictures."""
    digest = hashlib.sha256()
    for number in range(store.pictures):
        of, name = store.picture(number)
        digest.update(f"{of}\0{name}\0{source.picture_fingerprint(of, name)}\n".encode())
    return digest.hexdigest()


def _changed(root: Path, source: Source) -> str | None:
    """Whether pictures changed since the store was written, or some that lacked then are there now."""
    store = TokenStore(root)
    if pictures_hash(store, source) != store.meta["pictures_sha256"]:
        return f"{root}: pictures were changed since, or lie elsewhere"
    if store.meta["refused"] and store.meta["refused"] != _refused(source):
        return f"{root}: other rows are bad now"
    return None


def _refused(source: Source) -> str:
    digest = hashlib.sha256()
    for _, row in source.rows():
        if isinstance(row, BadRow):
            digest.update(_line(row))
    return digest.hexdigest()


def _line(row: BadRow) -> bytes:
    return json.dumps(asdict(row), ensure_ascii=True).encode() + b"\n"


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of the tokenizer's rules, and of the settings that the encoder looks at."""
    settings = [tokenizer.bos_token_id, tokenizer.unk_token, repr(tokenizer.init_kwargs.get("legacy", True))]
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(settings)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _write_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:  # the process's own limit on file sizes
            raise no_space(root) from error
        raise StorageError(f"{root}: can't be written ({error.strerror})", "choose another place") from error


class _File:
    """One array that grows, and its hash."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle
        self.digest, self.size = hashlib.sha256(), 0

    def add(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.handle.write(view) :]
        self.digest.update(data)
        self.size += len(data)

    def facts(self) -> list[Any]:
        return [self.size, self.digest.hexdigest()]


class _Writer:
    """Buffers rows and writes them in chunks."""

    def __init__(self, handles: Mapping[str, BinaryIO]) -> None:
        self.files = {name: _File(handle) for name, handle in handles.items()}
        self.ids: list[Any] = []
        self.marks: list[Any] = []
        self.rows: list[tuple[int, ...]] = []
        self.row_ids: list[bytes] = []
        self.names: list[bytes] = []
        self.hashes: list[bytes] = []
        self.bits = np.zeros(0, np.bool_)  # marks that don't fill a byte yet
        self.id_end = self.image_end = self.name_end = 0
        self.occurrences: list[Any] = []  # (·, 4) uint64: two halves of the name's hash, its end in names.bin, its set
        self.ends: list[tuple[int, int]] = []
        self.text_end = self.count = 0
        self.file_numbers: dict[str, int] = {}

    def add(self, of: int, row: Row, encoder: Encoder) -> None:
        """Encode a row and keep it. Raises DataError when it can't be trained on."""
        found = encoder.compact(row)
        extra = found.images * (encoder.visual_tokens - 1)
        name = row.id.encode("utf-8", "surrogatepass")  # JSON can hold half of a pair
        self.id_end += len(found.ids)
        self.image_end += found.images
        self.name_end += len(name)
        shared = found.shared + encoder.visual_tokens - 1 if found.shared else 0
        file = self.file_numbers.setdefault(row.file, len(self.file_numbers))
        self.rows.append(
            (
                self.id_end,
                self.image_end,
                self.name_end,
                row.number,
                file,
                of,
                len(found.ids) + extra,
                shared,
                int(np.count_nonzero(found.is_answer)),
            )
        )
        self.ids.append(found.ids)
        self.marks.append(found.is_answer)
        self.row_ids.append(name)
        for picture in row.images[: found.images]:
            text = picture.encode()
            self.hashes.append(hashlib.blake2b(b"%d\0%b" % (of, text), digest_size=16).digest())
            self.names.append(text)
            self.text_end += len(text)
            self.ends.append((self.text_end, of))
        self.count += 1
        if len(self.rows) >= CHUNK:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        if not self.rows:
            return
        self.files["ids.bin"].add(np.concatenate(self.ids).astype("<i4").tobytes())
        bits = np.concatenate([self.bits, *self.marks])
        whole = len(bits) // 8 * 8
        self.files["marks.bin"].add(np.packbits(bits[:whole]).tobytes())
        self.bits = bits[whole:]
        self.files["rows.bin"].add(np.array(self.rows, "<i8").tobytes())
        self.files["row_ids.bin"].add(b"".join(self.row_ids))
        self.files["names.bin"].add(b"".join(self.names))
        halves = np.frombuffer(b"".join(self.hashes), "<u8").reshape(-1, 2)
        self.occurrences.append(np.column_stack([halves, np.array(self.ends, "<u8").reshape(-1, 2)]))
        for buffer in (self.ids, self.marks, self.rows, self.row_ids, self.names, self.hashes, self.ends):
            buffer.clear()

    def finish(self) -> tuple[int, dict[str, list[Any]]]:
        """Write the rest: the last marks, and the pictures in the order in which they come."""
        self.flush()
        self.files["marks.bin"].add(np.packbits(self.bits).tobytes())
        found = np.concatenate(self.occurrences) if self.occurrences else np.zeros((0, 4), "<u8")
        numbers, first = _numbered(found[:, 0], found[:, 1])
        ends = found[:, 2].astype("<i8")
        starts = np.concatenate([[0], ends[:-1]]).astype("<i8") if len(ends) else ends
        self.files["images.bin"].add(numbers.astype("<i4").tobytes())
        table = np.column_stack([starts[first], ends[first], found[first, 3]])
        self.files["pictures.bin"].add(table.astype("<i8").tobytes())
        return len(first), {name: file.facts() for name, file in self.files.items()}


def _numbered(high: Any, low: Any) -> tuple[Any, Any]:
    """For each occurrence its number in the order of first appearance, and the place of each number's first one."""
    order = np.lexsort((low, high))
    new = np.ones(len(order), np.bool_)
    new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    first = order[new]  # lexsort is stable: the smallest place of each group
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    numbers = np.empty(len(order), np.int64)
    numbers[order] = rank[np.cumsum(new) - 1]
    return numbers, np.sort(first)


def _write(source: Source, encoder: Encoder, facts: Mapping[str, Any], root: Path) -> None:
    refused, bad, from_source = hashlib.sha256(), 0, 0
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context((root / name).open("wb", buffering=0)) for name in (*ARRAYS, BAD)}
        writer = _Writer(opened)
        for of, row in source.rows():
            if isinstance(row, BadRow):
                refused.update(_line(row))
                from_source += 1
            else:
                try:
                    writer.add(of, row, encoder)
                    continue
                except DataError as error:
                    row = bad_row(row, error.message)
            writer.files[BAD].add(_line(row))
            bad += 1
        pictures, files = writer.finish()
    meta = {
        **facts,
        "image_id": encoder.image_id,
        "rows": writer.count,
        "pictures": pictures,
        "bad": bad,
        "refused": refused.hexdigest() if from_source else "",
        "files": list(writer.file_numbers),
        "bytes": files,
        "pictures_sha256": "",
    }
    meta["check"] = check(meta)
    write_json(root / META, meta)
    meta["pictures_sha256"] = pictures_hash(TokenStore(root), source)
    meta["check"] = check(meta)
    write_json(root / META, meta)
