"""GGUFs in several files, as llama.cpp names and loads them: `name-00001-of-00003.gguf` and so on.

The first shard holds the metadata; llama.cpp is given its name and finds the others by theirs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf

from ..errors import ExportError
from ..files import is_full, no_space, storage_errors

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def shards_of(path: Path) -> list[Path]:
    """Files that make up a GGUF: `path` itself, or its shards in order, whether `path` is their common name or one.

    Raises:
        ExportError: a shard is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None and not path.is_file():
        first = sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
        match = _SHARD.fullmatch(first[0].name) if first else None
    if match is None:
        return [path]
    count = int(match["count"])
    found = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    lost = [shard for shard in found if not shard.is_file()]
    if lost:
        raise ExportError(f"{lost[0]}: missing", "export again")
    return found


@contextlib.contextmanager
def new_gguf(target: Path) -> Iterator[Path]:
    """A name to write a GGUF or its shards to; they take their final names when the block ends well, the first last.

    Raises:
        StorageError: the disk is full.
    """
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        room = target.parent / f".{target.name}.tmp-{os.getpid()}"
        shutil.rmtree(room, ignore_errors=True)
        try:
            room.mkdir()
            yield room / target.name
            for path in sorted(room.iterdir(), reverse=True):
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
                path.replace(target.parent / path.name)
        except OSError as error:
            if error.errno is None and is_full(target):  # numpy's own words for a short write
                raise no_space(target) from error
            raise
        finally:
            shutil.rmtree(room, ignore_errors=True)


def split_gguf(path: Path, max_bytes: int) -> list[Path]:
    """Replace a GGUF that holds more than `max_bytes` of tensors by shards, copied tensor by tensor.

    Returns:
        The files that make it up now.

    Raises:
        StorageError: the disk is full; the file is then as it was.
    """
    reader = gguf.GGUFReader(path)
    if sum(int(tensor.n_bytes) for tensor in reader.tensors) <= max_bytes or len(reader.tensors) < 2:
        return [path]
    architecture = str(reader.fields["general.architecture"].contents())
    with new_gguf(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture, split_max_size=max_bytes)
        try:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kind, *_, item = (*field.types, None) if len(field.types) == 1 else field.types
                    writer.add_key_value(field.name, field.contents(), kind, item)
            for tensor in reader.tensors:
                data = tensor.data
                writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, raw_dtype=tensor.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in reader.tensors:
                writer.write_tensor_data(tensor.data)
        finally:
            writer.close()
    path.unlink()
    return shards_of(path)
