"""Operators spelled out before a graph is lowered, where a converter would change or scatter them.

ExecuTorch 1.5's XNNPACK backend reads no `approximate` of GELU: tanh-GELU becomes erf-GELU. And it decomposes attention
into a softmax that is safe for rows without any key, which no tower has; half of those steps no XNNPACK kernel takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def tanh_gelu(x: torch.Tensor, *, approximate: str = "none") -> Any:
    """GELU's tanh form as sums and products; the erf form is left to the converter."""
    if approximate != "tanh":
        return NotImplemented
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """(b, h, n, e), (b, h, m, e), (b, h, m, e) → (b, h, n, e); what a tower doesn't use is left to the converter."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return NotImplemented
    size = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(query @ key.transpose(-2, -1) * size, dim=-1) @ value


REWRITES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.gelu.default: tanh_gelu,
    torch.ops.aten.scaled_dot_product_attention.default: plain_attention,
}


def spelled_out(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with REWRITES applied, and nothing else decomposed."""
    return program.run_decompositions(dict(REWRITES))
