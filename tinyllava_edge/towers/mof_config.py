"""Configuration of a mixture of two towers, apart from the model: reading it loads no model class."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..errors import CheckpointError
from . import MOF_TYPE, find_tower

SAME = ("hidden_size", "num_hidden_layers")


class MofConfig(PreTrainedConfig):
    """The two towers' configurations; a size that others ask for is the first one's.

    Raises:
        CheckpointError: a part that is no plain tower, or parts of different width or depth.
    """

    model_type = MOF_TYPE
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "first": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "second": SubConfigSpec(config_class=AutoConfig, model_type="dinov2"),
    }

    first: Any = None
    """the tower whose numbers prepare the pictures, tokens 0, 2, 4 …"""
    second: Any = None
    """the other tower, tokens 1, 3, 5 …"""

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("first", "second"):
            part = getattr(self, name)
            if part is None:  # transformers builds one of defaults, to leave them out of what it writes
                continue
            kind = part.get("model_type") if isinstance(part, dict) else getattr(part, "model_type", None)
            if kind == MOF_TYPE or not find_tower(kind).model_class:
                raise CheckpointError(f"mixture of towers: {name} is a mixture itself", "name two plain towers")
        super().__post_init__(**kwargs)
        for key in SAME:
            sizes = [getattr(part, key) for part in (self.first, self.second)]
            if sizes[0] != sizes[1]:
                raise CheckpointError(
                    f"a mixture of towers with {key} {sizes[0]} and {sizes[1]}",
                    f"towers that are mixed have the same {' and '.join(SAME)}",
                )

    @property
    def hidden_size(self) -> int:
        """Width v of both towers."""
        return int(self.first.hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of each tower."""
        return int(self.first.num_hidden_layers)

    @property
    def num_attention_heads(self) -> int:
        """Heads of the first tower."""
        return int(self.first.num_attention_heads)

    @property
    def patch_size(self) -> int:
        """Side of the first tower's patches, in pixels."""
        return int(self.first.patch_size)

    @property
    def image_size(self) -> int:
        """Side of the first tower's pictures, in pixels."""
        return int(self.first.image_size)
