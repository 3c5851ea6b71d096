"""Connectors P of Eq. 1, by exact name: what turns tower features into the language model's embeddings.

One file per connector, one entry here. A name of CONNECTORS is the whole name. A name of COUNTED is followed by the
visual tokens that a picture becomes: `ldpv2-144`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..spec import named_tokens
from . import avgpool, ldpv2, mlp, mof_mlp, pixel_shuffle, plain, qformer, resampler
from .avgpool import AvgPoolConnector
from .base import Part, Sizes
from .ldpv2 import LdpV2Connector
from .mlp import DeepMlpConnector, MlpConnector
from .mof_mlp import MofMlpConnector
from .pixel_shuffle import PixelShuffleConnector
from .qformer import QFormerConnector
from .resampler import HEAD_WIDTH, HEADS, QUERIES, RESAMPLER_LAYERS, PerceiverAttention, ResamplerConnector

__all__ = [
    "CONNECTORS",
    "COUNTED",
    "HEADS",
    "HEAD_WIDTH",
    "MIXED",
    "OPTIONS",
    "QUERIES",
    "RESAMPLER_LAYERS",
    "AvgPoolConnector",
    "DeepMlpConnector",
    "LdpV2Connector",
    "MlpConnector",
    "MofMlpConnector",
    "PerceiverAttention",
    "PixelShuffleConnector",
    "QFormerConnector",
    "ResamplerConnector",
    "build_connector",
    "connector_options",
    "connector_tokens",
    "find_connector",
]

MAX_FEATURES = 65536  # of one picture

CONNECTORS: dict[str, Part] = {
    "identity": Part(plain.identity),
    "linear": Part(plain.linear),
    "mlp1x_gelu": Part(mlp.mlp(1)),
    "mlp2x_gelu": Part(mlp.mlp2),
    "mlp3x_gelu": Part(mlp.mlp(3)),
    "mlp4x_gelu": Part(mlp.mlp(4)),
    "mof_mlp": Part(mof_mlp.mof_mlp),
    "resampler": Part(resampler.resampler, resampler.OPTIONS),
}
MIXED = ("mof_mlp",)  # read a mixture of two towers only
COUNTED: dict[str, Part] = {
    "pixelshuffle": Part(pixel_shuffle.pixel_shuffle),
    "ldpv2": Part(ldpv2.ldpv2),
    "avgpool": Part(avgpool.avgpool),
    "qformer": Part(qformer.qformer, qformer.OPTIONS),
}
OPTIONS: dict[str, tuple[str, ...]] = {name: tuple(part.options) for name, part in CONNECTORS.items() if part.options}


def find_connector(name: Any) -> Part:
    """The table's entry of a whole name. Raises CheckpointError that lists the known names."""
    if isinstance(name, str):
        tokens = named_tokens(name)
        part = CONNECTORS.get(name) if tokens is None else COUNTED.get(name.rpartition("-")[0])
        if part is not None:
            return part
    known = ", ".join([*CONNECTORS, *(f"{stem}-N" for stem in COUNTED)])
    raise CheckpointError(f"unknown connector {str(name)[:80]!r}", f"known: {known} (N: visual tokens of a picture)")


def connector_options(name: Any) -> tuple[str, ...]:
    """Options that a connector knows. Raises CheckpointError for an unknown name."""
    return tuple(find_connector(name).options)


def connector_tokens(name: str, features: int, options: Mapping[str, int] | None = None) -> int:
    """Visual tokens of one picture: what the name says, a resampler's queries, else one per tower token.

    Raises:
        CheckpointError: unknown name.
    """
    find_connector(name)
    if name == "resampler":
        return (options or {}).get("num_queries", QUERIES)
    return named_tokens(name) or features


def build_connector(
    name: Any, vision_width: int, text_width: int, options: Any = None, features: Any = None
) -> nn.Module:
    """A connector with random weights.

    Args:
        name: key of CONNECTORS, or key of COUNTED with the number of visual tokens.
        vision_width: width of the tower's features.
        text_width: hidden size of the language model.
        options: `connector_options` of config.json; which, says the table.
        features: `feature_tokens` of config.json: tower tokens that the connector reads. Those that reduce a grid
            must know it.

    Raises:
        CheckpointError: unknown name or option, an option out of range, or sizes that the connector can't join.
    """
    part = find_connector(name)
    options = {} if options is None else options
    if not isinstance(options, Mapping) or any(key not in part.options for key in options):
        raise CheckpointError(
            f"connector {name}: options {str(options)[:80]}",
            f"known: {', '.join(part.options) or 'none for this connector'}",
        )
    for key, value in options.items():
        if type(value) is not int or not 1 <= value <= part.options[key]:
            raise CheckpointError(f"connector {name}: {key}={str(value)[:80]} is not in 1..{part.options[key]}")
    if features is not None and (type(features) is not int or not 1 <= features <= MAX_FEATURES):
        raise CheckpointError(f"connector {name}: feature_tokens={str(features)[:80]} is not in 1..{MAX_FEATURES}")
    return part.build(Sizes(name, vision_width, text_width, options, features, named_tokens(name) or 0))
