"""Types of llama.cpp's KV cache, and the combinations that it would refuse, or compute wrongly without a word.

A value takes 4 bytes as f32, 2 as f16 and bf16, 1.06 as q8_0, 0.75 and 0.69 as q5_1 and q5_0, 0.63 as q4_1, and 0.56
as q4_0 and iq4_nl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError

# Name → ggml_type; the names are those of llama.cpp's -ctk and -ctv.
KV_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q5_1": 7,
    "q5_0": 6,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_nl": 20,
}
PLAIN = ("f32", "f16", "bf16")  # one value at a time; the others are blocks
_BLOCK = 32  # channels of a quantised block


def check_kv_types(header: Mapping[str, Any], type_k: str, type_v: str, flash_attention: bool) -> None:
    """Refuse what this model and attention can't do.

    A head's channels must be whole blocks of 32. Without flash attention llama.cpp 0.3.36 opens such a K cache all the
    same and then reads from the middle of blocks: with Phi-2's 80 channels the logits become NaN.

    Args:
        header: what `check_gguf` returned.
        type_k: key of KV_TYPES.
        type_v: key of KV_TYPES.
        flash_attention: whether the context will use it.

    Raises:
        UsageError: an unknown type, a head that isn't whole blocks wide, or a quantised V without flash attention.
    """
    for option, name in (("type_k", type_k), ("type_v", type_v)):
        if name not in KV_TYPES:
            raise UsageError(f"unknown KV-cache type {option}={name!r}", f"known: {', '.join(KV_TYPES)}")
    for option, name, width in zip(("type_k", "type_v"), (type_k, type_v), head_widths(header), strict=True):
        if name not in PLAIN and width % _BLOCK:
            raise UsageError(
                f"{option}={name} needs heads of a multiple of {_BLOCK} channels, this model's have {width}",
                f"take one of {', '.join(PLAIN)}; this model's KV cache can't be quantised",
            )
    if type_v not in PLAIN and not flash_attention:
        raise UsageError(
            f"type_v={type_v} needs flash attention", "turn flash attention on (-fa), or quantise only K (type_k)"
        )


def head_widths(header: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of one head's key and value, as llama.cpp takes them from a GGUF's header."""
    architecture = header["general.architecture"].decode()
    default = header[f"{architecture}.embedding_length"] // header[f"{architecture}.attention.head_count"]
    found = [header.get(f"{architecture}.attention.{part}_length") for part in ("key", "value")]
    key, value = (int(width) if isinstance(width, int) else int(default) for width in found)
    return key, value
