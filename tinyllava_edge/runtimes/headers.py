"""What a file says of itself, read before native code opens it.

llama.cpp ends the process on some inconsistent headers, and ONNX Runtime follows references to other files. Both are
looked for here, in plain Python, on a read-only map of the file; weights are never touched.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BundleError

ARCHITECTURES = ("llama", "phi2", "stablelm", "qwen2")
_MAX_PAIRS = 4096
_MAX_ITEMS = 4 << 20
_AGAIN = "copy the file again, or export the bundle again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Of onnx.proto: which fields of which message lead to a tensor.
_ONNX: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14


class _Damaged(Exception):
    """The header contradicts itself or runs past the file's end."""


def check_gguf(path: Path) -> dict[str, Any]:
    """Check a GGUF's header against what makes llama.cpp end the process.

    Returns:
        Its metadata: numbers, bytes, lists of bytes; other arrays as their length.

    Raises:
        BundleError: missing, not a GGUF, truncated, another architecture, or sizes that contradict each other.
    """
    with _opened(path) as data:
        try:
            pairs = _pairs(data)
            _check_pairs(pairs)
            return pairs
        except _Damaged as error:
            raise BundleError(f"{path}: not a GGUF that can be run ({error})", _AGAIN) from error
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise BundleError(f"{path}: truncated or damaged GGUF header", _AGAIN) from error


def check_onnx(path: Path) -> None:
    """Check that an ONNX file holds all its weights itself.

    Raises:
        BundleError: missing, not ONNX, truncated, or it refers to another file.
    """
    with _opened(path) as data:
        try:
            external = _has_external(data, 0, len(data), "model", 0)
        except (_Damaged, IndexError) as error:
            raise BundleError(f"{path}: truncated or not an ONNX file", _AGAIN) from error
    if external:
        raise BundleError(
            f"{path}: refers to weights in another file", "export the bundle again, with the weights inside"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    if not path.is_file():
        raise BundleError(f"{path}: missing", "copy the whole bundle again, or export it again")
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror})", "check the file's permissions") from error
    except ValueError as error:
        raise BundleError(f"{path}: empty file", _AGAIN) from error


def _pairs(data: mmap.mmap) -> dict[str, Any]:
    """Key-value pairs at a GGUF's front."""
    magic, version, _, count = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise _Damaged(f"starts with {magic!r}, version {version}")
    if count > _MAX_PAIRS:
        raise _Damaged(f"{count} metadata entries")
    place, pairs = 24, {}
    for _ in range(count):
        key, place = _string(data, place)
        (kind,) = struct.unpack_from("<I", data, place)
        pairs[key.decode("utf-8")], place = _value(data, place + 4, kind)
    return pairs


def _value(data: mmap.mmap, place: int, kind: int) -> tuple[Any, int]:
    if kind in _SCALARS:
        form = "<" + _SCALARS[kind]
        return struct.unpack_from(form, data, place)[0], place + struct.calcsize(form)
    if kind == _STRING:
        return _string(data, place)
    if kind != _ARRAY:
        raise _Damaged(f"metadata type {kind}")
    item, count = struct.unpack_from("<IQ", data, place)
    if count > _MAX_ITEMS:
        raise _Damaged(f"an array of {count} items")
    place += 12
    if item in _SCALARS:
        place += count * struct.calcsize("<" + _SCALARS[item])
        if place > len(data):
            raise _Damaged("an array runs past the end")
        return count, place
    if item != _STRING:
        raise _Damaged(f"an array of type {item}")
    strings = []
    for _ in range(count):
        text, place = _string(data, place)
        strings.append(text)
    return strings, place


def _string(data: mmap.mmap, place: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, place)
    end = place + 8 + length
    if end > len(data):
        raise _Damaged("a string runs past the end")
    return data[place + 8 : end], end


def _check_pairs(pairs: dict[str, Any]) -> None:
    architecture = _text(pairs, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise _Damaged(f"architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    width = _number(pairs, f"{architecture}.embedding_length", 1, 65536)
    _number(pairs, f"{architecture}.block_count", 1, 512)
    _number(pairs, f"{architecture}.context_length", 1, 1 << 31)
    heads = _number(pairs, f"{architecture}.attention.head_count", 1, width)
    groups = _number(pairs, f"{architecture}.attention.head_count_kv", 1, heads, heads)
    side = _number(pairs, f"{architecture}.attention.key_length", 2, 4096, width // heads)
    rotated = _number(pairs, f"{architecture}.rope.dimension_count", 2, side, side)
    if width % heads or heads % groups or side % 2 or rotated % 2:
        raise _Damaged(f"width {width}, {heads} heads, {groups} key heads and {rotated} rotated channels don't divide")
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base"):
        value = pairs.get(f"{architecture}.{key}", 1.0)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise _Damaged(f"{architecture}.{key} is {value!r}")
    tokens = pairs.get("tokenizer.ggml.tokens")
    if _text(pairs, "tokenizer.ggml.model") in ("none", "no_vocab") or not isinstance(tokens, list) or not tokens:
        raise _Damaged("no vocabulary")
    if len(set(tokens)) != len(tokens):
        raise _Damaged("two tokens have the same text")
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if pairs.get(key, len(tokens)) != len(tokens):
            raise _Damaged(f"{key} has another length than the vocabulary")


def _text(pairs: dict[str, Any], key: str) -> str:
    value = pairs.get(key)
    if not isinstance(value, bytes):
        raise _Damaged(f"no {key}")
    return value.decode("utf-8")


def _number(pairs: dict[str, Any], key: str, low: int, high: int, default: int | None = None) -> int:
    value = pairs.get(key, default)
    if not isinstance(value, int) or not low <= value <= high:
        raise _Damaged(f"{key} is {value!r}")
    return value


def _has_external(data: mmap.mmap, place: int, end: int, message: str, depth: int) -> bool:
    """Walk the protobuf fields that lead to tensors."""
    if depth > 64:
        raise _Damaged("nested too deeply")
    while place < end:
        tag, place = _varint(data, place)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            if message == "tensor" and field == _DATA_LOCATION and value:
                return True
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _Damaged(f"wire type {wire}")
        if place + size > end:
            raise _Damaged("a field runs past the end")
        if wire == 2 and message == "tensor" and field == _EXTERNAL_DATA:
            return True
        inner = _ONNX[message].get(field) if wire == 2 else None
        if inner is not None and _has_external(data, place, place + size, inner, depth + 1):
            return True
        place += size
    return False


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7
    raise _Damaged("a number has more than 10 bytes")
