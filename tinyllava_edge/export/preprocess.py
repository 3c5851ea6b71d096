"""Preprocessing as a graph: uint8 RGB of any size → `pixel_values`, so that every host feeds the tower the same pixels.

Equal to the Hugging Face processors on Pillow (of SigLIP, CLIP, and DINOv2's BitImageProcessorPil). Three facts:
Resize runs on uint8, so each pass rounds and clamps to 0..255 as Pillow's does; there is one Resize per axis, because
Pillow resamples one axis after the other; and the order of the axes follows Pillow 13's rule (ImagingResample). Older
Pillow runs the horizontal pass first for nearly every picture, which moves tall ones by a few levels of 255.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser

from ..errors import ExportError
from ..spec import ModelSpec
from . import onnx_io

OPSET = 19  # the first with uint8 Resize on chosen axes, and old enough for every ONNX Runtime in use
IR_VERSION = 9

# Pillow's filters: support widened when shrinking, weights renormalised at the borders; bicubic with a = -0.5.
_FILTERS = {
    "bicubic": 'mode = "cubic", cubic_coeff_a = -0.5, exclude_outside = 1, antialias = 1',
    "bilinear": 'mode = "linear", exclude_outside = 1, antialias = 1',
}
_FILTER, _SOURCE = "FILTER", "SOURCE"  # stand for one of these in the texts below

# ONNX Runtime 1.31 would move the transposition behind a bilinear Resize and then lose its size; a Reshape to the
# same shape stops that.
_SOURCES = {
    "bicubic": "  source = Identity (planes)\n",
    "bilinear": "  planes_shape = Shape (planes)\n  source = Reshape (planes, planes_shape)\n",
}

_LAYOUT = """
  planes = Transpose <perm = [0, 3, 1, 2]> (image)
"""

_PAD = """
  planes_in = Transpose <perm = [0, 3, 1, 2]> (image)
  height_in = Shape <start = 2, end = 3> (planes_in)
  width_in = Shape <start = 3, end = 4> (planes_in)
  side = Max (height_in, width_in)
  rows = Sub (side, height_in)
  columns = Sub (side, width_in)
  top = Div (rows, two)
  left = Div (columns, two)
  bottom = Sub (rows, top)
  right = Sub (columns, left)
  top_shape = Concat <axis = 0> (one, three, top, width_in)
  bottom_shape = Concat <axis = 0> (one, three, bottom, width_in)
  left_shape = Concat <axis = 0> (one, three, side, left)
  right_shape = Concat <axis = 0> (one, three, side, right)
  top_band = Expand (pad_color, top_shape)
  bottom_band = Expand (pad_color, bottom_shape)
  left_band = Expand (pad_color, left_shape)
  right_band = Expand (pad_color, right_shape)
  tall = Concat <axis = 2> (top_band, planes_in, bottom_band)
  planes = Concat <axis = 3> (left_band, tall, right_band)
"""

_WARP_SIZE = """
  new_height = Identity (size)
  new_width = Identity (size)
"""

_CROP_SIZE = """
  short = Min (height, width)
  scaled_height = Mul (resize, height)
  scaled_width = Mul (resize, width)
  new_height = Div (scaled_height, short)
  new_width = Div (scaled_width, short)
"""

# Pillow resamples vertically first when the height shrinks by more than twice what the width does. Rather than a
# branch, the vertical pass stands on both sides; the one that is not wanted has equal sizes and copies.
_RESIZE = f"""
  rows_lost = Sub (height, new_height)
  columns_lost = Sub (width, new_width)
  columns_lost_twice = Mul (columns_lost, two)
  shrinks = Greater (rows_lost, zero)
  shrinks_most = Greater (rows_lost, columns_lost_twice)
  vertical_first = And (shrinks, shrinks_most)
  first_height = Where (vertical_first, new_height, height)
  pass_1 = Resize <axes = [2], {_FILTER}> (source, , , first_height)
  pass_2 = Resize <axes = [3], {_FILTER}> (pass_1, , , new_width)
"""

_WARP_LAST = f"""
  square = Resize <axes = [2], {_FILTER}> (pass_2, , , new_height)
"""

# Columns outside the crop are dropped before the last pass: it treats each column alone, so nothing changes but memory.
_CROP_LAST = f"""
  extra_width = Sub (new_width, size)
  crop_left = Div (extra_width, two)
  crop_right = Add (crop_left, size)
  kept_columns = Slice (pass_2, crop_left, crop_right, axis_width)
  pass_3 = Resize <axes = [2], {_FILTER}> (kept_columns, , , new_height)
  extra_height = Sub (new_height, size)
  crop_top = Div (extra_height, two)
  crop_bottom = Add (crop_top, size)
  square = Slice (pass_3, crop_top, crop_bottom, axis_height)
"""

_SIZES = f"""
{_SOURCE}  height = Shape <start = 2, end = 3> (planes)
  width = Shape <start = 3, end = 4> (planes)
"""

_NORMALISE = """
  levels = Cast <to = 1> (square)
  scaled = Mul (levels, level)
  centred = Sub (scaled, mean)
  pixel_values = Div (centred, std)
"""

_POLICIES = {
    "warp": _LAYOUT + _SIZES + _WARP_SIZE + _RESIZE + _WARP_LAST + _NORMALISE,
    "crop": _LAYOUT + _SIZES + _CROP_SIZE + _RESIZE + _CROP_LAST + _NORMALISE,
    "pad": _PAD + _SIZES + _WARP_SIZE + _RESIZE + _WARP_LAST + _NORMALISE,
}


def preprocess_graph(spec: ModelSpec) -> onnx.ModelProto:
    """Graph `image` uint8 (1, H, W, 3) → `pixel_values` float32 (1, 3, S, S), for the spec's image policy.

    `warp` resizes to S x S; `crop` brings the shortest edge to S, or to `crop_resize` (DINOv2: 256 for S = 224), and
    cuts the centre; `pad` centres the picture on a square of `pad_color` (LLaVA's expand2square) and resizes that.

    Raises:
        ExportError: the policy or the resize filter has no graph.
    """
    if spec.image_policy not in _POLICIES:
        known = ", ".join(_POLICIES)
        raise ExportError(f"{spec.name}: no graph for image policy {spec.image_policy!r}", f"known: {known}")
    if spec.resample not in _FILTERS:
        raise ExportError(f"{spec.name}: no graph for filter {spec.resample!r}", f"known: {', '.join(_FILTERS)}")
    side = spec.image_size
    resize = f'{_FILTERS[spec.resample]}, coordinate_transformation_mode = "half_pixel"'
    text = _POLICIES[spec.image_policy].replace(_SOURCE, _SOURCES[spec.resample]).replace(_FILTER, resize)
    model: onnx.ModelProto = onnx.parser.parse_model(
        f'<ir_version: {IR_VERSION}, opset_import: ["": {OPSET}], producer_name: "tinyllava_edge">\n'
        f"preprocess (uint8[1, H, W, 3] image) => (float[1, 3, {side}, {side}] pixel_values)\n"
        f"{{{text}}}"
    )
    used = {name for node in model.graph.node for name in node.input}
    for name, value in _constants(spec).items():
        if name in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def write_preprocess(spec: ModelSpec, target: Path) -> dict[str, int]:
    """Write the graph, whole or not at all. Returns type → number of tensors, read back from the file."""
    onnx_io.save(preprocess_graph(spec), target)
    return onnx_io.tensor_types(target)


def _constants(spec: ModelSpec) -> dict[str, npt.NDArray[np.generic]]:
    """Every constant that a policy's text may name."""
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3, "axis_height": 2, "axis_width": 3}
    numbers |= {"size": spec.image_size, "resize": spec.crop_resize or spec.image_size}
    return {
        **{name: np.array([value], dtype=np.int64) for name, value in numbers.items()},
        "pad_color": np.array(spec.pad_color, dtype=np.uint8).reshape(1, 3, 1, 1),
        "level": np.array(1 / 255, dtype=np.float32),
        "mean": np.array(spec.image_mean, dtype=np.float32).reshape(1, 3, 1, 1),
        "std": np.array(spec.image_std, dtype=np.float32).reshape(1, 3, 1, 1),
    }
