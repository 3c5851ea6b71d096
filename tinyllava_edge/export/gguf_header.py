"""What a GGUF says of itself, as the exporters need it: types by name, sizes in bytes, shards taken together.

Read by runtimes/gguf_front.py, because PyPI gguf's reader walks every array item in Python: a small file can keep it
busy for minutes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from ..errors import BundleError, ExportError
from ..runtimes.gguf_front import Damaged, Length, opened, read_front
from .gguf_shards import shards_of


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table."""

    shape: tuple[int, ...]
    """sizes as llama.cpp lists them: columns first"""
    type: str
    """ggml type in lower case"""
    offset: int
    """place of the first byte in the file"""
    bytes: int
    """bytes of data"""
    file: Path
    """file that holds it"""


@dataclass(frozen=True)
class GgufHeader:
    """Front of a GGUF."""

    values: Mapping[str, Any]
    """numbers, texts, lists of texts; other arrays as None"""
    tensors: Mapping[str, GgufTensor]
    """name → where its data lies, in the file's order"""


def read_header(path: Path) -> GgufHeader:
    """Read one file. Raises ExportError: missing, not a GGUF, truncated, or counts that the file can't hold."""
    again = "get or make the file again"
    try:
        with opened(path) as data:
            front, tensors = read_front(data), {}
            for name, entry in front.tensors.items():
                kind, size = _size(entry.sizes, entry.kind)
                if front.start + entry.offset + size > len(data):
                    raise Damaged(f"tensor {name} runs past the end")
                tensors[name] = GgufTensor(entry.sizes, kind, front.start + entry.offset, size, path)
    except BundleError as error:
        reason = error.message.removeprefix(f"{path}: ")
        raise ExportError(f"{path}: not a sound GGUF file ({reason})", again) from error
    except (Damaged, ValueError, struct.error, KeyError, OverflowError) as error:
        raise ExportError(f"{path}: not a sound GGUF file ({error})", again) from error
    return GgufHeader({key: _plain(value) for key, value in front.pairs.items()}, tensors)


def read_shards(path: Path) -> GgufHeader:
    """Read a GGUF in one file or several (see gguf_shards); metadata are the first one's. Raises ExportError."""
    headers = [read_header(shard) for shard in shards_of(path)]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    return GgufHeader(headers[0].values, tensors)


def matrices(header: GgufHeader) -> dict[str, GgufTensor]:
    """The tensors that llama.cpp quantises: weights with rows and columns that aren't norms, embedding and head too."""
    return {
        name: tensor
        for name, tensor in header.tensors.items()
        if len(tensor.shape) > 1 and name.endswith(".weight") and not name.endswith("_norm.weight")
    }


def _plain(value: Any) -> Any:
    """Texts as text; arrays of numbers, whose values nobody asks for, as None."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, Length) else value


def _size(shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    """Type's name and bytes of a tensor. Raises ValueError for an unknown type."""
    known = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[known]
    return known.name.lower(), math.prod(shape) // block * block_bytes
