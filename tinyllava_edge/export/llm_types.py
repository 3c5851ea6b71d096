"""The types of a language model's GGUF: names for `--llm`, and what llama.cpp needs to know of each.

Bits are those of the main tensor type, scales included; a file's mean is a little higher, because the head and some
matrices get more. Files from 4 bits down gain most from an importance matrix; where it is needed llama.cpp refuses
to work without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class LlmType:
    """What a whole file is quantised to: a main type, and llama.cpp's own mixture of others around it."""

    ftype: int
    """number in llama.cpp's `llama_ftype`"""
    tensor_type: str
    """type that most matrices get, a key of TENSOR_TYPES"""
    needs_imatrix: bool = False
    """whether llama.cpp refuses to write it without an importance matrix"""

    @property
    def block(self) -> int:
        """Columns that share scales: a matrix whose width isn't a multiple gets another type."""
        return TENSOR_TYPES[self.tensor_type].block

    @property
    def bits(self) -> float:
        """Bits per weight of the main type."""
        return TENSOR_TYPES[self.tensor_type].bits


@dataclass(frozen=True)
class TensorType:
    """One type of a single tensor."""

    ggml_type: int
    """number in ggml's `ggml_type`"""
    block: int
    """columns in a block"""
    bits: float
    """bits per weight, scales included"""
    needs_imatrix: bool = False
    """whether llama.cpp refuses to write a block's matrix in it without an importance matrix"""


TENSOR_TYPES: dict[str, TensorType] = {
    "f32": TensorType(0, 1, 32),
    "f16": TensorType(1, 1, 16),
    "bf16": TensorType(30, 1, 16),
    "q8_0": TensorType(8, 32, 8.5),
    "q6_k": TensorType(14, 256, 6.5625),
    "q5_k": TensorType(13, 256, 5.5),
    "q5_1": TensorType(7, 32, 6.0),
    "q5_0": TensorType(6, 32, 5.5),
    "q4_k": TensorType(12, 256, 4.5),
    "q4_1": TensorType(3, 32, 5.0),
    "q4_0": TensorType(2, 32, 4.5),
    "iq4_nl": TensorType(20, 32, 4.5),
    "iq4_xs": TensorType(23, 256, 4.25),
    "q3_k": TensorType(11, 256, 3.4375),
    "iq3_s": TensorType(21, 256, 3.4375),
    "iq3_xxs": TensorType(18, 256, 3.0625, needs_imatrix=True),
    "q2_k": TensorType(10, 256, 2.625),
    "iq2_s": TensorType(22, 256, 2.5625, needs_imatrix=True),
    "iq2_xs": TensorType(17, 256, 2.3125, needs_imatrix=True),
    "iq2_xxs": TensorType(16, 256, 2.0625, needs_imatrix=True),
}

# From the highest precision to the lowest: bundles list their builds in this order.
LLM_TYPES: dict[str, LlmType] = {
    "f32": LlmType(0, "f32"),
    "f16": LlmType(1, "f16"),
    "bf16": LlmType(32, "bf16"),
    "q8_0": LlmType(7, "q8_0"),
    "q6_k": LlmType(18, "q6_k"),
    "q5_k_m": LlmType(17, "q5_k"),
    "q5_k_s": LlmType(16, "q5_k"),
    "q5_1": LlmType(9, "q5_1"),
    "q5_0": LlmType(8, "q5_0"),
    "q4_k_m": LlmType(15, "q4_k"),
    "q4_k_s": LlmType(14, "q4_k"),
    "q4_1": LlmType(3, "q4_1"),
    "iq4_nl": LlmType(25, "iq4_nl"),
    "iq4_xs": LlmType(30, "iq4_xs"),
    "q4_0": LlmType(2, "q4_0"),
    "q3_k_l": LlmType(13, "q3_k"),
    "q3_k_m": LlmType(12, "q3_k"),
    "iq3_m": LlmType(27, "iq3_s"),
    "iq3_s": LlmType(26, "iq3_s"),
    "q3_k_s": LlmType(11, "q3_k"),
    "iq3_xs": LlmType(22, "iq3_s", needs_imatrix=True),
    "iq3_xxs": LlmType(23, "iq3_xxs", needs_imatrix=True),
    "q2_k": LlmType(10, "q2_k"),
    "q2_k_s": LlmType(21, "q2_k", needs_imatrix=True),
    "iq2_m": LlmType(29, "iq2_s", needs_imatrix=True),
    "iq2_s": LlmType(28, "iq2_xs", needs_imatrix=True),
    "iq2_xs": LlmType(20, "iq2_xs", needs_imatrix=True),
    "iq2_xxs": LlmType(19, "iq2_xxs", needs_imatrix=True),
}
FLOAT_LLM_TYPES = ("f32", "bf16", "f16")  # what can be quantised

# llama.cpp's types that are not offered, and why.
LEFT_OUT: dict[str, str] = {
    "iq1_s": "below 2 bits nothing is left of a model this small",
    "iq1_m": "below 2 bits nothing is left of a model this small",
    "tq1_0": "for models that were trained with ternary weights",
    "tq2_0": "for models that were trained with ternary weights",
    "q1_0": "for models that were trained with 1-bit weights",
    "q2_0": "for models that were trained with 2-bit weights",
    "mxfp4": "for experts of models that were trained with it",
    "nvfp4": "for models that were trained with it",
}
IMATRIX_HINT = "collect one with `tinyllava-edge imatrix CKPT -o calib.gguf` and pass --imatrix calib.gguf"


def llm_type(name: str) -> LlmType:
    """Look a file type up by its exact name. Raises UsageError with the reason, or with the known names."""
    _require("LLM type", name, LLM_TYPES)
    return LLM_TYPES[name]


def tensor_type(name: str) -> TensorType:
    """Look a tensor's type up by its exact name. Raises UsageError with the reason, or with the known names."""
    _require("tensor type", name, TENSOR_TYPES)
    return TENSOR_TYPES[name]


def _require(what: str, name: str, table: Mapping[str, object]) -> None:
    if name in LEFT_OUT:
        raise UsageError(f"{what} {name!r} is not offered: {LEFT_OUT[name]}", f"known: {', '.join(table)}")
    if name not in table:
        raise UsageError(f"unknown {what} {name!r}", f"known: {', '.join(table)}")
