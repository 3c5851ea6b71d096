"""What a bundle and its checkpoint say of themselves, field by field, each difference at the stage that it spoils.

An export that reads a field wrongly writes graphs that agree with its own spec, so only the checkpoint's spec can tell.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..spec import ModelSpec
from .compare import Check, Equal
from .tolerances import SPEC

STAGES = ("pixels", "image_features", "image_embeds", "prompt_ids", "first_logits", "answer")  # in the road's order
MAX_TOKENS = 16  # of an answer

# Field of ModelSpec → the first stage whose output depends on it. The name is only a name.
SPOILS: dict[str, str | None] = {
    "name": None,
    "image_size": "pixels",
    "image_mean": "pixels",
    "image_std": "pixels",
    "image_policy": "pixels",
    "pad_color": "pixels",
    "crop_resize": "pixels",
    "resample": "pixels",
    "vision_family": "image_features",
    "patch_size": "image_features",
    "feature_layer": "image_features",
    "select_strategy": "image_features",
    "visual_tokens": "image_features",
    "embedding_dim": "image_embeds",
    "connector": "image_embeds",
    "template": "prompt_ids",
    "compat": "prompt_ids",
    "max_length": "prompt_ids",
    "llm_family": "first_logits",
}


def spec_checks(bundle: ModelSpec, checkpoint: ModelSpec) -> list[Check]:
    """One check per stage that has fields, its input called `spec`; `worst` names the first field that differs."""
    ours, theirs = _read(bundle), _read(checkpoint)
    counts = {stage: Equal() for stage in STAGES if stage in SPOILS.values()}
    for field, stage in SPOILS.items():
        if stage is not None:
            told = f"{field} {ours[field]!r}, the checkpoint says {theirs[field]!r}"
            counts[stage].add(told, ours[field] == theirs[field])
    return [count.check(stage, "spec", SPEC) for stage, count in counts.items()]


def _read(spec: ModelSpec) -> dict[str, Any]:
    """The fields, those that the image policy never looks at levelled out."""
    fields = dataclasses.asdict(spec)
    if spec.image_policy != "pad":
        fields["pad_color"] = None
    fields["crop_resize"] = (spec.crop_resize or spec.image_size) if spec.image_policy == "crop" else None
    return fields
