"""Names of a Llava model's tensors: every Hugging Face nesting → the one that transformers 5 uses in memory.

Four nestings exist: before 4.52 (`language_model.model.*`, `vision_tower.vision_model.*`), since 4.52
(`model.language_model.*`, `model.vision_tower.vision_model.*`), in memory in 5 (no `vision_model`), and what 5 writes
(`model.language_model.model.*`).
"""

from __future__ import annotations

import re

from .towers import TOWERS

TEXT = "model.language_model."
HEAD = "lm_head."
TOWER = "model.vision_tower."
CONNECTOR = "model.multi_modal_projector."
# Longest first within a part: the first prefix that fits is taken.
_PREFIXES = (
    ("model.language_model.model.", TEXT),
    ("model.language_model.lm_head.", HEAD),
    ("model.language_model.", TEXT),
    ("language_model.model.", TEXT),
    ("language_model.lm_head.", HEAD),
    ("language_model.", TEXT),
    ("lm_head.", HEAD),
    ("model.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.", TOWER),
    ("vision_tower.vision_model.", TOWER),
    ("vision_tower.", TOWER),
    ("model.multi_modal_projector.", CONNECTOR),
    ("multi_modal_projector.", CONNECTOR),
)


# DINOv2's names in every released file → those that transformers 5.23 uses in memory; it writes the old ones.
_DINOV2 = (
    (re.compile(r"(\.layer\.\d+\.attention)\.attention\.query\."), r"\1.q_proj."),
    (re.compile(r"(\.layer\.\d+\.attention)\.attention\.key\."), r"\1.k_proj."),
    (re.compile(r"(\.layer\.\d+\.attention)\.attention\.value\."), r"\1.v_proj."),
    (re.compile(r"(\.layer\.\d+\.attention)\.output\.dense\."), r"\1.o_proj."),
    (re.compile(r"(\.layer\.\d+\.mlp)\.weights_out\."), r"\1.down_proj."),
)
_JOINED = ".mlp.weights_in."  # gate above up, in one tensor


def in_memory(name: str) -> str | None:
    """Name in `TinyLlava.state_dict()` of a tensor in any Hugging Face Llava file; None for a foreign name."""
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            renamed = ours + name.removeprefix(prefix)
            return modern(renamed) if ours == TOWER else renamed
    return None


def modern(name: str) -> str:
    """Name in memory of a tower's tensor that has an older one in its file: DINOv2's attention, and the end of its
    gated MLP; see `halves` for that MLP's first layer."""
    for pattern, replacement in _DINOV2:
        name = pattern.sub(replacement, name)
    return name


def halves(name: str) -> tuple[str, str] | None:
    """Names in memory of the upper and lower rows of a tensor that is one in files (DINOv2's gated MLP), else None."""
    if not name.startswith(TOWER) or _JOINED not in name:
        return None
    return name.replace(_JOINED, ".mlp.gate_proj."), name.replace(_JOINED, ".mlp.up_proj.")


def on_disk(name: str, vision_family: str) -> str:
    """Name in the files that we write: the nesting since 4.52, which transformers 4.52 to 5, vLLM and we read alike."""
    if name.startswith(TOWER) and TOWERS[vision_family].nested:
        return f"{TOWER}vision_model.{name.removeprefix(TOWER)}"
    return name


def stand_alone(name: str) -> str | None:
    """Name in the language model's own files (`model.layers.0…`, `lm_head.weight`) of an in-memory name, else None."""
    if name.startswith(TEXT):
        return f"model.{name.removeprefix(TEXT)}"
    return name if name.startswith(HEAD) else None
