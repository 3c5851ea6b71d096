"""Gemma's embedding scale: what old transformers did to image embeddings goes into the connector's last layer.

Until 5.4 transformers multiplied every input embedding of Gemma by the square root of its width, image embeddings too;
since then only looked-up tokens are. TinyLLaVA Factory trained with 4.40, so its image embeddings meet the decoder
larger than today's forward would make them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..tensor_names import CONNECTOR
from .layouts import COMPAT, Source
from .lazy import Tensors

CHANGED_IN = (5, 4)
# Connector → its last layers, below the connector's name; every parameter of those scales the output.
LAST_LAYER = {
    "linear": ("",),
    "mlp1x_gelu": ("layers.0.",),
    "mlp2x_gelu": ("linear_2.",),
    "mlp3x_gelu": ("layers.4.",),
    "mlp4x_gelu": ("layers.6.",),
    "mof_mlp": ("first.linear_2.", "second.linear_2."),
    "resampler": ("norm.",),
}


def scale_pictures(source: Source, text: Mapping[str, Any], tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The tensors with the scale folded in where the source was made with it, and a note that says so.

    Raises:
        CheckpointError: a connector without a last layer to carry the scale.
    """
    if text["model_type"] != "gemma" or not _scaled(source):
        return tensors, []
    if source.connector not in LAST_LAYER:
        raise CheckpointError(
            f"{source.root}: connector {source.connector!r} can't carry Gemma's embedding scale",
            f"connectors that can: {', '.join(LAST_LAYER)}",
        )
    prefixes = tuple(CONNECTOR + layer for layer in LAST_LAYER[source.connector])
    scale = float(text["hidden_size"]) ** 0.5
    changed = {
        name: tensor.with_change(lambda t: (t.float() * scale).to(t.dtype))
        for name, tensor in tensors.items()
        if name.startswith(prefixes)
    }
    return {**tensors, **changed}, [
        f"connector's last layer times {scale:.6g}: Gemma's image embeddings were scaled by its time's transformers"
    ]


def _scaled(source: Source) -> bool:
    """Factory and legacy releases always; a Llava file if it names an older transformers."""
    if COMPAT[source.layout] != "native":
        return True
    found = re.match(r"(\d+)\.(\d+)", str(source.config.get("transformers_version", "")))
    return found is not None and (int(found[1]), int(found[2])) < CHANGED_IN
