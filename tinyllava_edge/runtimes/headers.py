"""What a file says of itself, read before native code opens it.

llama.cpp ends the process on some inconsistent headers, and ONNX Runtime follows references to other files. Both are
looked for here, in plain Python, on a read-only map of the file; weights are never touched.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BundleError
from .gguf_front import AGAIN, Damaged, damage, opened, read_front

ARCHITECTURES = ("llama", "phi2", "stablelm", "qwen2", "qwen3", "gemma")
_WHOLE_HEADS = ("llama", "qwen2", "qwen3")  # llama.cpp asserts that they rotate every channel
_MAX_SHARDS = 1024
_WHAT = "a GGUF"
# Of models with experts and other extras: llama.cpp asserts that their numbers fit together.
_FOREIGN = (
    *("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count", "nextn_predict_layers"),
    *("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa", "attention.sliding_window"),
)

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


def check_gguf(path: Path) -> dict[str, Any]:
    """Check a GGUF's header against what makes llama.cpp end the process; of a file in shards, all of them.

    Args:
        path: the file, or the first of its shards.

    Returns:
        Its metadata: numbers, bytes, lists of bytes; other arrays as their length.

    Raises:
        BundleError: missing, not a GGUF, truncated, another architecture, sizes that contradict each other, or shards
            that don't belong together.
    """
    pairs, tensors = _front(path)
    shards = gguf_shards(path, pairs)
    with damage(path, _WHAT):
        _check_pairs(pairs)
        for number, shard in enumerate(shards[1:], 1):
            with damage(shard, _WHAT):
                others, more = _front(shard)
                if [others.get(key) for key in ("split.no", "split.count")] != [number, len(shards)]:
                    raise Damaged(f"not shard {number + 1} of {len(shards)}")
                if tensors & more:
                    raise Damaged(f"tensor {min(tensors & more)!r} is in another shard too")
            tensors |= more
        if len(shards) > 1 and pairs.get("split.tensors.count") != len(tensors):
            raise Damaged(f"{pairs.get('split.tensors.count')!r} tensors announced, {len(tensors)} in its shards")
    return pairs


def gguf_shards(path: Path, pairs: dict[str, Any]) -> list[Path]:
    """Files that llama.cpp opens when it is given `path` with this metadata: `path` alone, or all shards in order.

    Raises:
        BundleError: not the first shard, or not named as one.
    """
    count = pairs.get("split.count", 1)
    with damage(path, _WHAT):
        if not isinstance(count, int) or not 0 <= count <= _MAX_SHARDS:
            raise Damaged(f"split.count is {count!r}")
        if count <= 1:
            return [path]
        suffix = f"-00001-of-{count:05d}.gguf"
        if pairs.get("split.no") != 0 or not path.name.endswith(suffix):
            raise Damaged(f"not the first of {count} shards; its name would end in {suffix}")
    stem = path.name.removesuffix(suffix)
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _front(path: Path) -> tuple[dict[str, Any], set[str]]:
    """A GGUF's metadata, and the names of its tensors."""
    with opened(path) as data, damage(path, _WHAT):
        front = read_front(data)
    return dict(front.pairs), set(front.tensors)


def check_onnx(path: Path, parts: frozenset[str] = frozenset()) -> None:
    """Check where an ONNX file keeps its weights: in itself, or in files beside it that it was shipped with.

    Args:
        path: the graph.
        parts: names of files in the same directory that it may read weights from.

    Raises:
        BundleError: missing, not ONNX, truncated, or it refers to another file, or to a place outside a part.
    """
    with opened(path) as data:
        try:
            for entry in _external(data, 0, len(data), "model", 0):
                _check_external(path, entry, parts)
        except (Damaged, IndexError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: truncated or not an ONNX file ({error})", AGAIN) from error


def _check_external(path: Path, entry: dict[str, str], parts: frozenset[str]) -> None:
    location = entry.get("location", "")
    if location not in parts or location != Path(location).name:
        raise BundleError(
            f"{path}: refers to weights in another file ({location[:80]!r})",
            "export the bundle again, with the weights inside",
        )
    part = path.with_name(location)
    if not part.is_file() or part.resolve().parent != path.parent.resolve():
        raise BundleError(f"{part}: missing, or a link out of its directory", "copy the whole bundle again")
    offset, length = (entry.get(key, "0") for key in ("offset", "length"))
    if not (offset.isascii() and offset.isdigit() and length.isascii() and length.isdigit()):
        raise Damaged(f"weights at {offset[:20]!r}, {length[:20]!r} bytes")
    if len(offset) > 18 or len(length) > 18 or int(offset) + int(length) > part.stat().st_size:
        raise BundleError(f"{part}: shorter than {path.name} says", "copy the whole bundle again")


def _check_pairs(pairs: dict[str, Any]) -> None:
    architecture = _text(pairs, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise Damaged(f"architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    width = _number(pairs, f"{architecture}.embedding_length", 1, 65536)
    _number(pairs, f"{architecture}.block_count", 1, 512)
    _number(pairs, f"{architecture}.context_length", 1, 1 << 31)
    heads = _number(pairs, f"{architecture}.attention.head_count", 1, width)
    groups = _number(pairs, f"{architecture}.attention.head_count_kv", 1, heads, heads)
    side = _number(pairs, f"{architecture}.attention.key_length", 2, 4096, width // heads)
    rotated = _number(pairs, f"{architecture}.rope.dimension_count", 2, side, side)
    value = _number(pairs, f"{architecture}.attention.value_length", 2, 4096, width // heads)
    if value != side or (architecture in _WHOLE_HEADS and rotated != side):
        raise Damaged(f"heads of {side} key and {value} value channels, {rotated} of them rotated")
    for key in _FOREIGN:
        if pairs.get(f"{architecture}.{key}", 0) != 0:
            raise Damaged(f"{architecture}.{key} is {pairs[f'{architecture}.{key}']!r}")
    if pairs.get(f"{architecture}.rope.scaling.type", b"none") not in (b"none", b"linear", b"yarn"):
        raise Damaged(f"{architecture}.rope.scaling.type is {pairs[f'{architecture}.rope.scaling.type']!r}")
    if (
        (f"{architecture}.attention.key_length" not in pairs and width % heads)
        or heads % groups
        or side % 2
        or rotated % 2
    ):
        raise Damaged(f"width {width}, {heads} heads, {groups} key heads and {rotated} rotated channels don't divide")
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base"):
        value = pairs.get(f"{architecture}.{key}", 1.0)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise Damaged(f"{architecture}.{key} is {value!r}")
    tokens = pairs.get("tokenizer.ggml.tokens")
    if _text(pairs, "tokenizer.ggml.model") in ("none", "no_vocab") or not isinstance(tokens, list) or not tokens:
        raise Damaged("no vocabulary")
    if len(set(tokens)) != len(tokens):
        raise Damaged("two tokens have the same text")
    kind = _text(pairs, "tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise Damaged(f"tokenizer.ggml.model is {kind!r}; known: llama, gpt2")
    if kind == "llama":
        known = set(tokens)
        gone = next((byte for byte in range(256) if f"<0x{byte:02X}>".encode() not in known), None)
        if gone is not None:
            raise Damaged(f"no token <0x{gone:02X}>, without which llama.cpp ends the process on a rare character")
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if pairs.get(key, len(tokens)) != len(tokens):
            raise Damaged(f"{key} has another length than the vocabulary")


def _text(pairs: dict[str, Any], key: str) -> str:
    value = pairs.get(key)
    if not isinstance(value, bytes):
        raise Damaged(f"no {key}")
    return value.decode("utf-8")


def _number(pairs: dict[str, Any], key: str, low: int, high: int, default: int | None = None) -> int:
    value = pairs.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise Damaged(f"{key} is {value!r}")
    return value


def _external(data: mmap.mmap, place: int, end: int, message: str, depth: int) -> Iterator[dict[str, str]]:
    """Walk the protobuf fields that lead to tensors; of each tensor that lies elsewhere, where it lies."""
    if depth > 64:
        raise Damaged("nested too deeply")
    entry: dict[str, str] = {}
    elsewhere = False
    while place < end:
        field, wire, start, place = onnx_field(data, place, end)
        if wire == 0:
            elsewhere |= message == "tensor" and field == _DATA_LOCATION and start > 0
        elif wire == 2 and message == "tensor" and field == _EXTERNAL_DATA:
            elsewhere = True
            key, value = _pair(data, start, place)
            if key in entry:  # readers differ in which one they believe
                raise Damaged(f"a tensor's {key[:20]!r} is given twice")
            entry[key] = value
        elif wire == 2 and (inner := _ONNX[message].get(field)) is not None:
            yield from _external(data, start, place, inner, depth + 1)
    if elsewhere:
        yield entry


def onnx_field(data: mmap.mmap, place: int, end: int) -> tuple[int, int, int, int]:
    """Number and wire type of the field at `place`, its value if it is a number, else its start; and where it ends."""
    tag, place = _varint(data, place)
    wire = tag & 7
    if wire == 0:
        value, place = _varint(data, place)
        return tag >> 3, wire, value, place
    if wire == 2:
        size, place = _varint(data, place)
    elif wire in (1, 5):
        size = 8 if wire == 1 else 4
    else:
        raise Damaged(f"wire type {wire}")
    if place + size > end:
        raise Damaged("a field runs past the end")
    return tag >> 3, wire, place, place + size


def _pair(data: mmap.mmap, place: int, end: int) -> tuple[str, str]:
    """One key and value of a tensor's external data."""
    texts = {1: "", 2: ""}
    while place < end:
        field, wire, start, place = onnx_field(data, place, end)
        if wire == 2 and field in texts:
            texts[field] = data[start:place].decode("utf-8")
    return texts[1], texts[2]


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7
    raise Damaged("a number has more than 10 bytes")
