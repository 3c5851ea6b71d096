"""How much work each stage of a build is, counted from its files: operations of matrix products, bytes per token.

A multiply-add counts as two operations. Only what has to be done is counted: an engine that does more has less of a
share.

    vision     tower: 2 · t · k · n of each weight (k, n), the patches likewise; 4 · t² · v of each layer's attention;
               connector: 2 · its rows · k · n; the resampler's attention likewise. Elementwise work is left out
    prefill    2 · parameters of the blocks per position, 2 · those of the head once;
               attention: 2 · layers · heads · (key + value width) per pair of a position and one at or before it
    decode     bytes of every weight but the looked-up embedding table, and of the cached positions' keys and values

Legend: t tower tokens (class token included), v tower width.
"""

from __future__ import annotations

import itertools
import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tinyllava_edge.bundle import Bundle
from tinyllava_edge.errors import BundleError
from tinyllava_edge.runtimes.gguf_front import AGAIN, Damaged, damage, opened, read_front
from tinyllava_edge.runtimes.gguf_sizes import EMBEDDING, HEAD
from tinyllava_edge.runtimes.headers import check_gguf, gguf_shards, onnx_field
from tinyllava_edge.runtimes.kv_cache import head_widths
from tinyllava_edge.spec import ModelSpec
from tinyllava_edge.towers import TOWERS

_FLOAT_KINDS = (0, 1, 30)  # ggml's f32, f16, bf16; products with all others are made in int8
_KV_BYTES = 2  # of one cached value: f16, llama.cpp's default
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")
_PRODUCTS = {"MatMul": "float", "Gemm": "float", "MatMulInteger": "int8", "DynamicQuantizeMatMul": "int8"}


@dataclass(frozen=True)
class BuildWork:
    """Work of one build."""

    vision_float: int
    """operations on floats for one picture"""
    vision_int8: int
    """operations on 8-bit integers for one picture"""
    body_float: int
    """operations on floats for one position, attention and head left out"""
    body_int8: int
    """operations on 8-bit integers, likewise"""
    head_float: int
    """operations on floats for one position's logits"""
    head_int8: int
    """operations on 8-bit integers, likewise"""
    pair: int
    """operations of attention for one pair of positions, on floats"""
    token_bytes: int
    """bytes of the weights that one decoding step reads"""
    position_bytes: int
    """bytes of keys and values that a decoding step reads per cached position, as f16"""
    vocab: int
    """logits of one step"""
    pixel_bytes: int
    """bytes of pixel_values"""

    def to_dict(self) -> dict[str, int]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: object) -> BuildWork | None:
        """What `to_dict` gave; None for anything else, such as an older file's."""
        names = set(cls.__dataclass_fields__)
        if not isinstance(value, Mapping) or set(value) != names:
            return None
        good = all(type(number) is int and 0 <= number < 1 << 62 for number in value.values())
        return cls(**value) if good else None


def bundle_work(bundle: Bundle) -> dict[str, BuildWork]:
    """Build name → its work.

    Raises:
        BundleError: a file is missing or damaged.
    """
    builds = bundle.builds()
    visions = {b.vision.path: vision_work(bundle.path(b.vision), bundle.spec) for b in builds.values()}
    llms = {b.llm.path: llm_work(bundle.path(b.llm)) for b in builds.values()}
    pixels = 4 * 3 * bundle.spec.image_size**2
    found = {}
    for name, build in builds.items():
        vision = visions[build.vision.path]
        found[name] = BuildWork(vision["float"], vision["int8"], **llms[build.llm.path], pixel_bytes=pixels)
    return found


def llm_work(path: Path) -> dict[str, int]:
    """The language model's part of BuildWork, from a GGUF's header. Raises BundleError."""
    pairs = check_gguf(path)
    operations = dict.fromkeys(("body_float", "body_int8", "head_float", "head_int8"), 0)
    sizes: dict[str, int] = {}
    kinds: dict[str, tuple[int, tuple[int, ...]]] = {}
    for file in gguf_shards(path, pairs):
        with opened(file) as data, damage(file, "a GGUF"):
            front = read_front(data)
            places = sorted({entry.offset for entry in front.tensors.values()} | {len(data) - front.start})
            follows = dict(itertools.pairwise(places))
            for name, entry in front.tensors.items():
                sizes[name] = follows.get(entry.offset, entry.offset) - entry.offset
                kinds[name] = (entry.kind, entry.sizes)
    head = HEAD if HEAD in kinds else EMBEDDING
    for name, (kind, shape) in kinds.items():
        if len(shape) == 2 and (name == head or name != EMBEDDING):
            part = "head" if name == head else "body"
            operations[f"{part}_{'float' if kind in _FLOAT_KINDS else 'int8'}"] += 2 * math.prod(shape)
    architecture = pairs["general.architecture"].decode()
    layers, heads = pairs[f"{architecture}.block_count"], pairs[f"{architecture}.attention.head_count"]
    key_heads = pairs.get(f"{architecture}.attention.head_count_kv", heads)
    width = sum(head_widths(pairs))
    read = sum(size for name, size in sizes.items() if name == head or name != EMBEDDING)
    return {
        **operations,
        "pair": 2 * layers * heads * width,
        "token_bytes": read,
        "position_bytes": _KV_BYTES * layers * key_heads * width,
        "vocab": len(pairs["tokenizer.ggml.tokens"]),
    }


def vision_work(path: Path, spec: ModelSpec) -> dict[str, int]:
    """Operations on floats (`float`) and on 8-bit integers (`int8`) of a vision graph for one picture.

    Raises:
        BundleError: missing, truncated, or not an ONNX file.
    """
    with opened(path) as data:
        try:
            return _vision(data, spec)
        except (Damaged, IndexError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: truncated or not an ONNX file ({error})", AGAIN) from error


def _vision(data: mmap.mmap, spec: ModelSpec) -> dict[str, int]:
    shapes: dict[str, tuple[int, ...]] = {}
    nodes: list[tuple[str, list[str], dict[str, int]]] = []
    for _, start, end in (child for child in _children(data, 0, len(data)) if child[0] == 7):
        for field, first, last in _children(data, start, end):
            if field == 5:
                name, shape = _tensor(data, first, last)
                shapes[name] = shape
            elif field == 1:
                nodes.append(_node(data, first, last))
    tokens = spec.patches + TOWERS[spec.vision_family].class_token  # a mixture's, which the spec doesn't tell, left out
    found, width, layers = {"float": 0, "int8": 0}, 0, set[str]()
    for operator, inputs, attributes in nodes:
        weight = next((name for name in inputs[1:2] if name in shapes), "")
        shape = shapes.get(weight, ())
        if operator == "Conv" and shape:
            ours = weight.startswith("connector.")  # LDPv2's positions
            width = width if ours else shape[0]
            found["float"] += 2 * (spec.visual_tokens if ours else spec.patches) * math.prod(shape)
        kind = _PRODUCTS.get(operator, "")
        if operator == "MatMulNBits" and shape:  # 4: the activations are quantised, too
            kind = "int8" if attributes.get("accuracy_level") == 4 else "float"
            shape = (attributes.get("K", 0), attributes.get("N", 0))
        if not kind or len(shape) != 2:
            continue
        found[kind] += 2 * _rows(weight, tokens, spec) * math.prod(shape)
        if ".to_q." in weight:  # the resampler's attention
            found["float"] += 4 * spec.visual_tokens * (spec.feature_tokens + spec.visual_tokens) * shape[1]
        if ".attention.query." in weight and weight.startswith("connector."):  # the Q-Former's
            keys = spec.feature_tokens if ".crossattention." in weight else spec.visual_tokens
            found["float"] += 4 * spec.visual_tokens * keys * shape[1]
        layer = None if weight.startswith("connector.") else _LAYER.match(weight)
        layers |= {layer[0]} if layer else set()
    found["float"] += len(layers) * 4 * tokens**2 * width
    return found


def _rows(weight: str, tokens: int, spec: ModelSpec) -> int:
    """Rows that are multiplied by a weight."""
    if not weight.startswith("connector."):
        return tokens
    if weight.startswith(("connector.first.", "connector.second.")):  # of a mixture's two towers each sees its own
        return spec.visual_tokens // 2
    if ".to_kv." in weight:  # the resampler's queries look at themselves, too
        return spec.feature_tokens + spec.visual_tokens
    whole = weight.startswith(("connector.linear.", "connector.mlp."))  # before the tokens are reduced
    whole = whole or (".crossattention." in weight and (".key." in weight or ".value." in weight))
    return spec.feature_tokens if whole else spec.visual_tokens


def _tensor(data: mmap.mmap, place: int, end: int) -> tuple[str, tuple[int, ...]]:
    """Name and shape of a TensorProto."""
    name, shape = "", list[int]()
    while place < end:
        field, wire, start, place = onnx_field(data, place, end)
        if field == 1 and wire == 0:
            shape.append(start)
        elif field == 1 and wire == 2:
            shape += _packed(data[start:place])
        elif field == 8 and wire == 2:
            name = data[start:place].decode("utf-8")
    return name, tuple(shape)


def _node(data: mmap.mmap, place: int, end: int) -> tuple[str, list[str], dict[str, int]]:
    """Operator, inputs and whole-number attributes of a NodeProto."""
    operator, inputs, attributes = "", list[str](), dict[str, int]()
    for field, start, last in _children(data, place, end):
        if field == 1:
            inputs.append(data[start:last].decode("utf-8"))
        elif field == 4:
            operator = data[start:last].decode("utf-8")
        elif field == 5:
            name, value, at = "", None, start
            while at < last:
                inner, wire, begin, at = onnx_field(data, at, last)
                if inner == 1 and wire == 2:
                    name = data[begin:at].decode("utf-8")
                elif inner == 3 and wire == 0:
                    value = begin
            if value is not None:
                attributes[name] = value
    return operator, inputs, attributes


def _children(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that has a length."""
    while place < end:
        field, wire, start, place = onnx_field(data, place, end)
        if wire == 2:
            yield field, start, place


def _packed(data: bytes) -> list[int]:
    found, value, shift = list[int](), 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            found.append(value)
            value = shift = 0
    return found
