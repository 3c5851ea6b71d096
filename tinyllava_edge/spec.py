"""The family as data: backbones with their full architecture, variants by name, and what a checkpoint needs to be fed.

Nothing here imports torch or transformers, and nothing is fetched: the `config` of a backbone is the whole Hugging Face
configuration of the paper's model (Table 1), so that it can be built, counted and exported without a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError, UsageError
from .towers import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, TOWERS


@dataclass(frozen=True)
class VisionBackbone:
    """A vision tower of Table 1 or a nano one."""

    abbr: str
    """name used inside a variant's name, e.g. `Sig`"""
    hub_id: str
    """where the pretrained weights are published, or `nano/siglip` for the shipped ones"""
    size_paper: float
    """nominal size of Table 1, in billions of parameters"""
    family: str
    """one of VISION_FAMILIES: which Hugging Face vision class the config belongs to"""
    image_mean: tuple[float, float, float]
    """per-channel mean that `pixel_values` are normalised with"""
    image_std: tuple[float, float, float]
    """per-channel standard deviation that `pixel_values` are normalised with"""
    image_policy: str
    """what the model's own processor does to a picture: `warp` (SigLIP) or `crop` (CLIP)"""
    config: Mapping[str, Any]
    """the whole vision configuration"""

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return int(self.config["image_size"])

    @property
    def patches(self) -> int:
        """Patches of one picture: (image_size // patch_size) squared; CLIP's class token is not a patch."""
        return (self.image_size // int(self.config["patch_size"])) ** 2


@dataclass(frozen=True)
class LlmBackbone:
    """A small-scale language model of Table 1 or the nano one."""

    abbr: str
    """name used inside a variant's name, e.g. `Phi`"""
    hub_id: str
    """where the pretrained weights are published, or `nano/llm` for the shipped one"""
    size_paper: float
    """nominal size of Table 1, in billions of parameters"""
    template: str
    """conversation template in `prompt.TEMPLATES`"""
    head_bias: bool
    """whether the output head has a bias (Phi-2), which stock Llava would drop"""
    config: Mapping[str, Any]
    """the whole text configuration, `model_type` included"""


@dataclass(frozen=True)
class Variant:
    """A member of the family, named as in Table A1."""

    name: str
    """`TinyLLaVA-{recipe}-{vision}-{llm}`"""
    recipe: str
    """`base` or `share` (Figure 3)"""
    vision: str
    """key of VISION_BACKBONES"""
    llm: str
    """key of LLM_BACKBONES"""
    size_paper: float | None
    """size printed in Table A1, in billions; none for the nano variants"""


@dataclass(frozen=True)
class ModelSpec:
    """How a checkpoint must be fed. Saved as `model_spec.json` in a checkpoint and inside `bundle.json`."""

    name: str
    """variant or user-given name"""
    vision_family: str
    """one of VISION_FAMILIES"""
    llm_family: str
    """`model_type` of the language model, e.g. `llama`"""
    image_size: int
    """side of the square input in pixels"""
    patch_size: int
    """side of a patch in pixels"""
    image_mean: tuple[float, float, float]
    """per-channel mean of the normalisation"""
    image_std: tuple[float, float, float]
    """per-channel standard deviation of the normalisation"""
    image_policy: str
    """`warp`, `crop` (shortest edge, then centre crop) or `pad` (to a square with `pad_color`)"""
    pad_color: tuple[int, int, int]
    """RGB of the padding, used by `pad` only"""
    feature_layer: int
    """index into the tower's hidden states; -2 in the paper's models"""
    select_strategy: str
    """`full` keeps every token, `default` drops the first (CLIP's class token; Factory's SigLIP patch)"""
    visual_tokens: int
    """image embeddings that one picture becomes"""
    embedding_dim: int
    """width of an image embedding = hidden size of the language model"""
    connector: str
    """connector name, e.g. `mlp2x_gelu`, or `ldpv2-144` where it ends in the visual tokens"""
    template: str
    """conversation template in `prompt.TEMPLATES`"""
    max_length: int
    """longest sequence, image tokens included, that the model was trained for"""
    compat: str
    """`native`, `factory` or `legacy`: whose conventions the weights were trained with"""
    crop_resize: int = 0
    """`crop` only: side in pixels that the shortest edge is brought to before the cut; 0 for image_size"""
    resample: str = "bicubic"
    """filter of the resize, as Pillow names it: `bicubic`, or `bilinear` (SigLIP 2's processors)"""

    @property
    def patches(self) -> int:
        """Patches of one picture: (image_size // patch_size) squared."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def feature_tokens(self) -> int:
        """Tower tokens that the connector reads: the patches and a class token, less a dropped first."""
        tower = TOWERS[self.vision_family]
        return tower.tokens_per_patch * self.patches + tower.class_token - (self.select_strategy == "default")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Any, where: str) -> ModelSpec:
        """Read and check a spec.

        Args:
            value: what `json` parsed.
            where: file named in errors.

        Raises:
            CheckpointError: a key is missing, unknown, of the wrong type or out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        optional = {name for name, field in fields.items() if field.default is not dataclasses.MISSING}
        keys = {str(key) for key in value} if isinstance(value, dict) else set()
        lacking, unknown = set(fields) - optional - keys, keys - set(fields)
        if not isinstance(value, dict) or lacking or unknown:
            raise CheckpointError(
                f"{where}: model spec lacks {sorted(lacking)} and has unknown {sorted(unknown)}",
                "export or import the model again with this version",
            )
        kinds = {"str": str, "int": int}
        clean: dict[str, Any] = {}
        for name in [name for name in fields if name in value]:
            given, field = value[name], fields[name]
            kind = kinds.get(str(field.type))
            if kind is not None:
                good = isinstance(given, kind) and not isinstance(given, bool)
                good = good and (not isinstance(given, str) or (given.isprintable() and len(given) <= 255))
            else:
                good = (
                    isinstance(given, list | tuple) and len(given) == 3 and all(type(x) in (int, float) for x in given)
                )
            if not good:
                raise CheckpointError(
                    f"{where}: model spec key {name!r} has the wrong type: {str(given)[:80]!r}", "restore the file"
                )
            clean[name] = tuple(given) if kind is None else given
        spec = cls(**clean)
        _check_spec(spec, where)
        return spec


POLICIES = ("warp", "crop", "pad")
STRATEGIES = ("full", "default")
VISION_FAMILIES = tuple(TOWERS)
COMPATS = ("native", "factory", "legacy")
FILTERS = {"bilinear": 2, "bicubic": 3}  # filter → Pillow's number


def named_tokens(connector: str) -> int | None:
    """Visual tokens that a connector's name ends in: 144 of `ldpv2-144`; none of a name without."""
    stem, _, count = connector.rpartition("-")
    good = stem and count.isascii() and count.isdigit() and len(count) <= 5 and count[0] != "0"
    return int(count) if good else None


def _check_spec(spec: ModelSpec, where: str) -> None:
    limits = {
        "image_size": 4096,
        "patch_size": 4096,
        "visual_tokens": 65536,
        "embedding_dim": 65536,
        "max_length": 1 << 22,
    }
    for name, limit in limits.items():
        if not 0 < getattr(spec, name) <= limit:
            raise CheckpointError(f"{where}: {name}={getattr(spec, name)} is outside 1..{limit}", "restore the file")
    if named_tokens(spec.connector) not in (None, spec.visual_tokens):
        raise CheckpointError(
            f"{where}: visual_tokens={spec.visual_tokens} with the connector {spec.connector!r}", "restore the file"
        )
    if not 0 <= spec.crop_resize <= 4096 or 0 < spec.crop_resize < spec.image_size:
        raise CheckpointError(
            f"{where}: crop_resize={spec.crop_resize} for pictures of {spec.image_size}", "restore the file"
        )
    if spec.vision_family == "mof" and spec.select_strategy != "full":
        raise CheckpointError(
            f"{where}: select_strategy={spec.select_strategy!r} of a mixture, which has no class tokens", "say full"
        )
    for name, known in (
        ("image_policy", POLICIES),
        ("select_strategy", STRATEGIES),
        ("vision_family", VISION_FAMILIES),
        ("compat", COMPATS),
        ("resample", tuple(FILTERS)),
    ):
        if getattr(spec, name) not in known:
            raise CheckpointError(
                f"{where}: {name}={getattr(spec, name)!r}; known: {', '.join(known)}", "restore the file"
            )


def _clip(image: int, patch: int, hidden: int, inter: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "image_size": image,
        "patch_size": patch,
        "num_channels": 3,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def _siglip(image: int, patch: int, hidden: int, inter: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "image_size": image,
        "patch_size": patch,
        "num_channels": 3,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


def _rope(theta: float, partial: float | None = None) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    return rope if partial is None else {**rope, "partial_rotary_factor": partial}


VISION_BACKBONES: dict[str, VisionBackbone] = {
    "C": VisionBackbone(
        "C",
        "openai/clip-vit-large-patch14-336",
        0.3,
        "clip",
        CLIP_MEAN,
        CLIP_STD,
        "crop",
        _clip(336, 14, 1024, 4096, 24, 16),
    ),
    "Sig": VisionBackbone(
        "Sig",
        "google/siglip-so400m-patch14-384",
        0.4,
        "siglip",
        SIGLIP_MEAN,
        SIGLIP_STD,
        "warp",
        _siglip(384, 14, 1152, 4304, 27, 16),
    ),
    "NanoC": VisionBackbone(
        "NanoC", "nano/clip", 0.002, "clip", CLIP_MEAN, CLIP_STD, "crop", _clip(64, 8, 192, 512, 5, 6)
    ),
    "NanoSig": VisionBackbone(
        "NanoSig", "nano/siglip", 0.002, "siglip", SIGLIP_MEAN, SIGLIP_STD, "warp", _siglip(64, 8, 192, 512, 5, 6)
    ),
}

LLM_BACKBONES: dict[str, LlmBackbone] = {
    "TL": LlmBackbone(
        "TL",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        1.1,
        "llama",
        False,
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(10000.0),
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "SLM": LlmBackbone(
        "SLM",
        "stabilityai/stablelm-2-zephyr-1_6b",
        1.6,
        "phi",
        False,
        {
            "model_type": "stablelm",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 100352,
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "rope_parameters": _rope(10000.0, 0.25),
            "use_qkv_bias": True,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 100257,
            "eos_token_id": 100257,
        },
    ),
    "Phi": LlmBackbone(
        "Phi",
        "microsoft/phi-2",
        2.7,
        "phi",
        True,
        {
            "model_type": "phi",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 51200,
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "rope_parameters": _rope(10000.0, 0.4),
            "hidden_act": "gelu_new",
            "tie_word_embeddings": False,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
    ),
    "Nano": LlmBackbone(
        "Nano",
        "nano/llm",
        0.003,
        "llama",
        False,
        {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(10000.0),
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}

# Table A1, in its order; the nano variants follow.
_SIZES = {
    ("C", "TL"): 1.4,
    ("Sig", "TL"): 1.5,
    ("C", "SLM"): 1.9,
    ("Sig", "SLM"): 2.0,
    ("C", "Phi"): 3.0,
    ("Sig", "Phi"): 3.1,
}
VARIANTS: dict[str, Variant] = {
    name: Variant(name, recipe, vision, llm, size)
    for recipe in ("base", "share")
    for (vision, llm), size in _SIZES.items()
    for name in [f"TinyLLaVA-{recipe}-{vision}-{llm}"]
}
NANO_VARIANTS: dict[str, Variant] = {
    name: Variant(name, "base", vision, "Nano", None)
    for vision in ("NanoC", "NanoSig")
    for name in [f"TinyLLaVA-base-{vision}-Nano"]
}
DEFAULT_VARIANT = "TinyLLaVA-base-NanoSig-Nano"


def variant(name: str) -> Variant:
    """Look a variant up by its exact name. Raises UsageError that lists the known names."""
    known = {**VARIANTS, **NANO_VARIANTS}
    if name not in known:
        raise UsageError(f"unknown variant {name!r}", f"known: {', '.join(known)}")
    return known[name]


# Longest sequence of a recipe's models, as Factory's scripts train them. Phi-2 and TinyLlama have 2,048 positions of
# their own: rotary ones, which go on.
MAX_LENGTHS = {"base": 2048, "share": 3072}


def model_spec(name: str, max_length: int = 0) -> ModelSpec:
    """The spec of a variant trained by us (`native`): every patch kept, a class token dropped.

    Args:
        name: of the variant.
        max_length: longest sequence, picture included; 0 takes the recipe's (MAX_LENGTHS).
    """
    chosen = variant(name)
    vision, llm = VISION_BACKBONES[chosen.vision], LLM_BACKBONES[chosen.llm]
    return ModelSpec(
        name=name,
        vision_family=vision.family,
        llm_family=str(llm.config["model_type"]),
        image_size=vision.image_size,
        patch_size=int(vision.config["patch_size"]),
        image_mean=vision.image_mean,
        image_std=vision.image_std,
        image_policy=vision.image_policy,
        pad_color=tuple(int(255 * mean) for mean in vision.image_mean),  # type: ignore[arg-type]
        feature_layer=-2,
        select_strategy="default" if TOWERS[vision.family].class_token else "full",
        visual_tokens=vision.patches,
        embedding_dim=int(llm.config["hidden_size"]),
        connector="mlp2x_gelu",
        template=llm.template,
        max_length=max_length or MAX_LENGTHS[chosen.recipe],
        compat="native",
    )
