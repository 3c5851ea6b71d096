"""How an imported model must be fed: picture, feature layer, template and length by the conventions it came with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..image_numbers import image_numbers, integer
from ..model import tower_layer
from ..prompt import get_template
from ..spec import ModelSpec
from ..tensor_names import TOWER
from ..towers import FAMILIES, TOWERS
from .configs import TEMPLATES
from .layouts import COMPAT, Source
from .lazy import Tensors

_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_LENGTH = 2048  # positions, where the source names none


def describe(
    source: Source,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    *,
    processor: Path | None,
    template: str | None,
    name: str,
) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec, and the tower's configuration with as many layers as the tower has.

    Args:
        source: the opened model, tower included.
        text: the language model's configuration.
        vision: the tower's configuration.
        processor: preprocessor_config.json, if there is one.
        template: key of prompt.TEMPLATES; by default the one that upstream pairs with the language model.
        name: label of the model.

    Raises:
        CheckpointError: a setting that the device files can't follow, named.
        UsageError: unknown template.
    """
    where = source.root / "config.json"
    family, mixture = FAMILIES[vision["model_type"]], vision
    vision = vision.get("first", vision)  # pictures and sizes of a mixture are its first tower's
    numbers = image_numbers(processor, vision, FAMILIES[vision["model_type"]])
    policy, strategy = _policy(source, where, numbers), _strategy(source, where, family)
    if policy == "pad" and numbers["crop_resize"]:
        raise CheckpointError(f"{where}: pictures are padded and then cut", "no policy of the device files does that")
    layer, depth = _layer(source, where, vision)
    patch = integer(where, "patch_size", vision.get("patch_size"))
    tokens = (numbers["image_size"] // patch) ** 2 * TOWERS[family].tokens_per_patch
    tokens += TOWERS[family].class_token - (strategy == "default")
    if source.connector == "resampler":
        tokens = source.options.get("num_queries", 128)
    spec = ModelSpec(
        name=name,
        vision_family=family,
        llm_family=str(text["model_type"]),
        patch_size=patch,
        pad_color=tuple(int(255 * mean) for mean in numbers["image_mean"]),  # type: ignore[arg-type]
        feature_layer=layer,
        select_strategy=strategy,
        visual_tokens=tokens,
        embedding_dim=int(text["hidden_size"]),
        connector=source.connector,
        template=get_template(template or TEMPLATES[str(text["model_type"])]).name,
        max_length=_length(source, where, text),
        compat=COMPAT[source.layout],
        **{**numbers, "image_policy": policy, "crop_resize": numbers["crop_resize"] if policy == "crop" else 0},
    )
    spec = ModelSpec.from_dict(spec.to_dict(), str(where))
    return spec, dict(mixture) if family == "mof" else {**vision, "num_hidden_layers": depth}


def _policy(source: Source, where: Path, numbers: Mapping[str, Any]) -> str:
    """`square` means the processor alone; `pad` pads first. Legacy models were trained with `pad`."""
    own = str(numbers["image_policy"])
    if source.layout == "llava":
        return own
    ratio = source.config.get("image_aspect_ratio", "square")
    policies = {"square": own, "pad": "pad", "None": own}
    if str(ratio) not in policies:
        raise CheckpointError(f"{where}: image_aspect_ratio {str(ratio)[:40]!r}", "known: square, pad")
    return policies[str(ratio)]


def _strategy(source: Source, where: Path, family: str) -> str:
    """Factory drops the first token of every tower, SigLIP's first patch too; legacy drops CLIP's class token only."""
    if source.layout == "llava":
        strategy = source.config.get("vision_feature_select_strategy", "default")
        if strategy not in ("default", "full"):
            raise CheckpointError(f"{where}: vision_feature_select_strategy {str(strategy)[:40]!r}")
        return str(strategy)
    legacy = source.layout == "legacy"
    key = "mm_vision_select_feature" if legacy else "vision_feature_select_strategy"
    selected = str(source.config.get(key, "patch"))
    if selected not in _STRATEGIES:
        raise CheckpointError(f"{where}: {key} {str(selected)[:40]!r}", f"known: {', '.join(_STRATEGIES)}")
    if family == "mof" and selected != "patch":
        raise CheckpointError(f"{where}: {key} {selected!r} of a mixture of two towers", "known: patch")
    whole = family == "mof" or (legacy and not TOWERS[family].class_token)
    return "full" if whole else _STRATEGIES[selected]


def _layer(source: Source, where: Path, vision: Mapping[str, Any]) -> tuple[int, int]:
    """Feature layer counted from the end of the tower that is there, and that tower's number of layers.

    Legacy files hold a SigLIP that lost its last layer: -2 of 27 became -1 of 26.
    """
    key = "mm_vision_select_layer" if source.layout == "legacy" else "vision_feature_layer"
    layer = source.config.get(key, -2)
    if type(layer) is not int:
        raise CheckpointError(f"{where}: {key} {str(layer)[:40]!r}", "only one layer can be followed")
    told = int(vision["num_hidden_layers"])
    depth = layers(source.tensors) if source.layout == "legacy" else told
    index = layer + told + 1 if layer < 0 else layer
    if not 0 < index <= depth or depth > told:
        raise CheckpointError(
            f"{where}: {key} {layer} of {told} layers, {depth} are there", "give the tower's own config with --vision"
        )
    return index - depth - 1, depth


def layers(tensors: Tensors) -> int:
    """Encoder layers of the tower among the tensors."""
    return max((1 + (tower_layer(name) or 0) for name in tensors if name.startswith(TOWER)), default=0)


def _length(source: Source, where: Path, text: Mapping[str, Any]) -> int:
    length = source.config.get("tokenizer_model_max_length")
    if length is None:
        length = min(_LENGTH, int(text["max_position_embeddings"]))
    return integer(where, "tokenizer_model_max_length", length)
