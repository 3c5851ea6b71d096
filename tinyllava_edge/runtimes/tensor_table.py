"""Every weight of a bundle's file and the type that it is stored in, from headers alone; weights are not touched."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import BundleError
from .gguf_front import AGAIN, Damaged, damage, opened, read_front
from .headers import check_gguf, gguf_shards
from .onnx_sizes import initializers

# ggml's numbers of its types (ggml.h); a newer one is given as its number.
GGML_TYPES = {
    **dict(enumerate(("f32", "f16", "q4_0", "q4_1"))),
    **dict(enumerate(("q5_0", "q5_1", "q8_0", "q8_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_k"), 6)),
    **dict(enumerate(("iq2_xxs", "iq2_xs", "iq3_xxs", "iq1_s", "iq4_nl", "iq3_s", "iq2_s", "iq4_xs"), 16)),
    **dict(enumerate(("i8", "i16", "i32", "i64", "f64", "iq1_m", "bf16"), 24)),
    34: "tq1_0",
    35: "tq2_0",
    39: "mxfp4",
    40: "nvfp4",
    41: "q1_0",
}
# TensorProto.DataType of onnx.proto, what a weight may be.
_ONNX_TYPES = {1: "float", 2: "uint8", 3: "int8", 6: "int32", 10: "float16", 11: "double", 16: "bfloat16"}
_HELPERS = re.compile(r"_(?:scales?|zero_points?)$")  # of a quantised tensor, which is listed itself
_PACKED = re.compile(r"_w([48])$")  # blocks of 4 or 8 bits in bytes, see export/vision_quantize.py


def tensor_table(path: Path) -> dict[str, str]:
    """Name → type of each weight in a GGUF (all of its shards) or an ONNX graph, in the file's order.

    A quantised ONNX tensor has its plain name, its scales and zero points are not listed; single numbers, shapes and
    flags neither. `w4` and `w8` are blocks of 4 and 8 bits.

    Raises:
        BundleError: missing, truncated, or of another form.
    """
    if path.suffix == ".onnx":
        return _onnx_table(path)
    table: dict[str, str] = {}
    for file in gguf_shards(path, check_gguf(path)):
        with opened(file) as data, damage(file, "a GGUF"):
            for name, entry in read_front(data).tensors.items():
                table[name] = GGML_TYPES.get(entry.kind, str(entry.kind))
    return table


def _onnx_table(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    with opened(path) as data:
        try:
            for name, kind, count in initializers(data):
                if kind not in _ONNX_TYPES or count < 2 or _HELPERS.search(name):
                    continue
                packed = _PACKED.search(name)
                plain = name[: packed.start()] if packed else name.removesuffix("_quantized")
                table[plain] = f"w{packed[1]}" if packed else _ONNX_TYPES[kind]
        except (Damaged, IndexError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: truncated or not an ONNX file ({error})", AGAIN) from error
    return table
