"""Vision towers f of Eq. 1, by exact name: one entry here, and one small file where Hugging Face's class isn't enough.

Data alone: importing this loads neither torch nor transformers, and the device runtime reads it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DINOv2
MOF_TYPE = "tinyllava_edge_mof"


@dataclass(frozen=True)
class Tower:
    """An entry of the tower table: what every stage must know of a family."""

    model_type: str
    """`model_type` of the picture tower's own configuration"""
    model_class: str
    """class of transformers that opens the tower's directory; empty for a mixture"""
    processor: str
    """image processor of transformers, Pillow backend"""
    mean: tuple[float, float, float]
    """per-channel mean of the family's own processor"""
    std: tuple[float, float, float]
    """per-channel standard deviation of the family's own processor"""
    policy: str
    """what the family's own processor does to a picture: `warp` or `crop`"""
    resample: str
    """filter of the family's own processor"""
    class_token: bool = False
    """whether a token that is no patch stands first in `hidden_states`"""
    tokens_per_patch: int = 1
    """features of one patch: 2 in a mixture of two towers"""
    container: str = ""
    """`model_type` of a whole two-tower model (pictures and text) that may hold the tower; empty for none"""
    last_norm: str = "post_layernorm"
    """norm behind the last layer, which the feature layers never reach"""
    nested: bool = False
    """whether files put `vision_model.` in front of the tower's names"""
    stock: bool = True
    """whether stock Llava computes the same from the configuration"""
    fixed_positions: bool = True
    """whether pictures must have the one size that the position table is made for; else it is resized to them"""
    pooling_head: bool = False
    """whether files may hold a pooling head behind the last layer, which `vision_use_head` switches off"""
    size_in_config: bool = True
    """whether a checkpoint's configuration names the size of its pictures, and not of another position table"""
    crop_size: int = 0
    """side in pixels that pictures are cut to where nobody says: 0 takes the configuration's `image_size`"""
    crop_resize: int = 0
    """side in pixels that the shortest edge is brought to before that cut; 0 for the same"""
    build: Callable[[Any], Any] | None = None
    """configuration → module that takes (b, 3, s, s); none: transformers' own class does"""


def _square_siglip2(config: Any) -> Any:
    from .siglip2 import SquareSiglip2

    return SquareSiglip2._from_config(config)


def _without_registers(config: Any) -> Any:
    from .dinov2_registers import PlainDinov2WithRegisters

    return PlainDinov2WithRegisters._from_config(config)


def _mixture(config: Any) -> Any:
    from .mof import MixtureOfFeatures

    return MixtureOfFeatures._from_config(config)


TOWERS: dict[str, Tower] = {
    "clip": Tower(
        "clip_vision_model",
        "CLIPVisionModel",
        "CLIPImageProcessorPil",
        CLIP_MEAN,
        CLIP_STD,
        "crop",
        "bicubic",
        class_token=True,
        container="clip",
        nested=True,
    ),
    "siglip": Tower(  # SigLIP 2's towers of one resolution, too: their configurations are plain SigLIP ones
        "siglip_vision_model",
        "SiglipVisionModel",
        "SiglipImageProcessorPil",
        SIGLIP_MEAN,
        SIGLIP_STD,
        "warp",
        "bicubic",
        container="siglip",
        pooling_head=True,
        nested=True,
    ),
    "siglip2": Tower(  # NaFlex
        "siglip2_vision_model",
        "Siglip2VisionModel",
        "SiglipImageProcessorPil",
        SIGLIP_MEAN,
        SIGLIP_STD,
        "warp",
        "bilinear",
        container="siglip2",
        fixed_positions=False,
        pooling_head=True,
        stock=False,
        build=_square_siglip2,
    ),
    "dinov2": Tower(
        "dinov2",
        "Dinov2Model",
        "BitImageProcessorPil",
        IMAGENET_MEAN,
        IMAGENET_STD,
        "crop",
        "bicubic",
        class_token=True,
        last_norm="layernorm",
        fixed_positions=False,
        size_in_config=False,
        crop_size=224,
        crop_resize=256,
    ),
    "dinov2_registers": Tower(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        "BitImageProcessorPil",
        IMAGENET_MEAN,
        IMAGENET_STD,
        "crop",
        "bicubic",
        class_token=True,
        last_norm="layernorm",
        stock=False,
        fixed_positions=False,
        size_in_config=False,
        crop_size=224,
        crop_resize=256,
        build=_without_registers,
    ),
    "mof": Tower(  # pictures are prepared by the first tower's numbers, as upstream does
        MOF_TYPE,
        "",
        "CLIPImageProcessorPil",
        CLIP_MEAN,
        CLIP_STD,
        "crop",
        "bicubic",
        tokens_per_patch=2,
        stock=False,
        fixed_positions=False,
        size_in_config=False,
        build=_mixture,
    ),
}
FAMILIES = {tower.model_type: name for name, tower in TOWERS.items()}  # model_type → key of TOWERS
CONTAINERS = {tower.container: tower.model_type for tower in TOWERS.values() if tower.container}


def find_tower(model_type: Any) -> Tower:
    """The entry of a configuration's `model_type`. Raises CheckpointError that lists the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"vision tower {str(model_type)[:40]!r}", f"known: {', '.join(FAMILIES)}")
    return TOWERS[FAMILIES[model_type]]
