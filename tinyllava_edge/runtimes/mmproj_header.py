"""What an mmproj GGUF says of itself, read before llama.cpp's mtmd opens it.

mtmd ends the process on matrices that don't fit together, and on a few numbers of the header. Both are looked for here,
in plain Python, on a read-only map of the file; weights are never touched. Only files of a Llava model pass: a CLIP or
SigLIP tower with two linear layers behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gguf_front import Damaged, Front, damage, opened, read_front

_MAX_LISTED = 64  # longest array whose values are read
# GGUF's number of a tensor type → values in a block, bytes of a block.
_TYPES = {0: (1, 4), 1: (1, 2), 30: (1, 2), 8: (32, 34), 2: (32, 18), 6: (32, 22), 12: (256, 144), 14: (256, 210)}
_FLOATS = (0, 1)
_VECTOR = 0  # what ggml adds to float32 results must be float32


@dataclass(frozen=True)
class MmprojHeader:
    """The numbers that decide what a file computes."""

    image_size: int
    """side of the square picture in pixels"""
    patches: int
    """image embeddings that mtmd makes of one picture: (image_size // patch_size) squared"""
    tower_width: int
    """width of the tower"""
    width: int
    """width of an image embedding"""
    has_class_token: bool
    """CLIP's: stock mtmd puts it in the wrong place"""
    clip_workaround: bool
    """whether the position embeddings were turned to make up for that"""
    warps: bool
    """whether mtmd stretches a picture to the square; else it keeps the aspect and pads with a colour of its own"""
    file_type: int
    """llama.cpp's number of the type that most matrices have"""


def read_mmproj_header(path: Path) -> MmprojHeader:
    """Check an mmproj GGUF against what makes mtmd end the process.

    Raises:
        BundleError: missing, not an mmproj of a Llava model, truncated, or sizes that contradict each other.
    """
    with opened(path) as data, damage(path, "an mmproj"):
        front = read_front(data, _MAX_LISTED)
        _check_places(front, len(data))
        return _check(front.pairs, {name: (entry.kind, entry.sizes) for name, entry in front.tensors.items()})


def _check_places(front: Front, size: int) -> None:
    """Every tensor is of a type that is known here and lies inside the file."""
    for name, entry in front.tensors.items():
        if entry.kind not in _TYPES:
            raise Damaged(f"tensor {name!r} is of type {entry.kind}")
        block, block_bytes = _TYPES[entry.kind]
        if max(entry.sizes) >= 1 << 31 or entry.sizes[0] % block:
            raise Damaged(f"tensor {name!r} of sizes {entry.sizes}")
        if front.start + entry.offset + math.prod(entry.sizes) // block * block_bytes > size:
            raise Damaged("a tensor runs past the end")


def _check(keys: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...]]]) -> MmprojHeader:
    for key, value in (("general.architecture", b"clip"), ("clip.has_vision_encoder", True)):
        if keys.get(key) != value:
            raise Damaged(f"{key} is {keys.get(key)!r}")
    if keys.get("clip.projector_type") != b"mlp":
        raise Damaged(f"clip.projector_type is {keys.get('clip.projector_type')!r}; known: mlp")
    if keys.get("clip.has_audio_encoder"):
        raise Damaged("it hears too")
    warps = keys.get("clip.vision.image_grid_pinpoints")
    if warps not in (None, [0, 0]):  # other ones cut the picture in tiles
        raise Damaged(f"clip.vision.image_grid_pinpoints is {str(warps)[:80]}")
    image = _number(keys, "image_size", 1, 4096)
    patch = _number(keys, "patch_size", 1, image)
    width = _number(keys, "embedding_length", 1, 65536)
    inner = _number(keys, "feed_forward_length", 1, 1 << 20)
    heads = _number(keys, "attention.head_count", 1, width)
    layers = _number(keys, "block_count", 1, 512)
    if width % heads:
        raise Damaged(f"width {width} and {heads} heads don't divide")
    for name in ("image_mean", "image_std"):
        values = keys.get(f"clip.vision.{name}")
        if (
            not isinstance(values, list)
            or len(values) != 3
            or not all(type(v) is float and math.isfinite(v) for v in values)
        ):
            raise Damaged(f"clip.vision.{name} is {values!r}")
    epsilon = keys.get("clip.vision.attention.layer_norm_epsilon")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise Damaged(f"layer_norm_epsilon is {epsilon!r}")
    stops = keys.get("clip.vision.feature_layer", [layers - 1])
    if not isinstance(stops, list) or len(stops) != 1 or type(stops[0]) is not int or not 1 <= stops[0] <= layers:
        raise Damaged(f"clip.vision.feature_layer is {stops!r} of {layers} layers")
    has_class = "v.class_embd" in tensors
    patches = (image // patch) ** 2
    text = tensors.get("mm.2.weight", (0, (0, 0)))[1][-1]
    wanted = _wanted(width, patch, patches, text, has_class)
    for layer in range(layers):
        wanted |= {f"v.blk.{layer}.{name}": sizes for name, sizes in _block(width, inner).items()}
    for name, sizes in wanted.items():
        _require(tensors, name, sizes)
    unknown = sorted(set(tensors) - set(wanted) - {"v.patch_embd.bias", "v.pre_ln.weight", "v.pre_ln.bias"})
    if unknown:
        raise Damaged(f"unknown tensor {unknown[0][:80]!r}")
    for name in sorted(set(tensors) - set(wanted)):
        _require(tensors, name, (width,))
    worked_around = keys.get("tinyllava_edge.clip_workaround") is True
    file_type = keys.get("general.file_type")
    if not isinstance(file_type, int):
        raise Damaged(f"general.file_type is {file_type!r}")
    return MmprojHeader(image, patches, width, text, has_class, worked_around, warps is not None, file_type)


def _wanted(width: int, patch: int, patches: int, text: int, has_class: bool) -> dict[str, tuple[int, ...]]:
    """Sizes of what every file holds, innermost first."""
    wanted: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (patch, patch, 3, width),
        "v.position_embd.weight": (width, patches + has_class),
        "mm.0.weight": (width, text),
        "mm.0.bias": (text,),
        "mm.2.weight": (text, text),
        "mm.2.bias": (text,),
    }
    return wanted | ({"v.class_embd": (width,)} if has_class else {})


def _block(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Sizes of one layer's tensors."""
    square = {name: (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_out")}
    matrices = {**square, "ffn_up": (width, inner), "ffn_down": (inner, width)}
    vectors = {f"{name}.bias": (sizes[1],) for name, sizes in matrices.items()}
    norms = {f"{name}.{part}": (width,) for name in ("ln1", "ln2") for part in ("weight", "bias")}
    return {**{f"{name}.weight": sizes for name, sizes in matrices.items()}, **vectors, **norms}


def _require(tensors: Mapping[str, tuple[int, tuple[int, ...]]], name: str, sizes: tuple[int, ...]) -> None:
    if name not in tensors:
        raise Damaged(f"no tensor {name}")
    kind, found = tensors[name]
    if found != sizes:
        raise Damaged(f"{name} is of sizes {found}, {sizes} expected")
    if (len(sizes) == 1 and kind != _VECTOR) or (len(sizes) == 4 and kind not in _FLOATS):
        raise Damaged(f"{name} is of type {kind}")


def _number(keys: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = keys.get(f"clip.vision.{key}")
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Damaged(f"clip.vision.{key} is {value!r}")
    return value
