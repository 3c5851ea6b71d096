"""What a plan starts from: a model without weights, a tokenizer where there is one, and data to measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint as checkpoints
from ..checkpoint_spec import load_spec
from ..errors import CheckpointError
from ..model import TinyLlava
from ..prompt import IMAGE_MARKER, get_template
from ..spec import LLM_BACKBONES, ModelSpec, variant
from ..tokenizer_files import fast_tokenizer
from .plan_data import Lengths, measure
from .recipes import StageRecipe

PACKAGE = Path(__file__).resolve().parent.parent


def checkpoint_model(root: Path) -> tuple[TinyLlava, ModelSpec]:
    """A checkpoint's architecture on the meta device, from its configuration alone. Raises CheckpointError."""
    spec = load_spec(root)
    config = checkpoints.load_config(root)
    with torch.device("meta"):
        return TinyLlava(config), spec


def plan_tokenizer(checkpoint: Path | None, llm: Path | None, name: str) -> Any | None:
    """The checkpoint's, `llm`'s or a nano variant's tokenizer with an `<image>` token; None where there is none.

    Raises:
        CheckpointError: there should be one, and it can't be read.
    """
    if checkpoint is not None:
        return checkpoints.load_tokenizer(checkpoint)
    if llm is None:
        hub_id = LLM_BACKBONES[variant(name).llm].hub_id
        if not hub_id.startswith("nano/"):
            return None
        llm = PACKAGE / hub_id
    if not llm.is_dir():
        raise CheckpointError(f"{llm}: no such directory", "give --llm a Hugging Face model directory")
    tokenizer = fast_tokenizer(llm)
    tokenizer.add_tokens([IMAGE_MARKER], special_tokens=True)
    return tokenizer


def data_lengths(
    data: Path | Sequence[Path],
    images: Path | Sequence[Path],
    spec: ModelSpec,
    tokenizer: Any | None,
    *,
    max_bad: int | float = 0,
) -> Callable[[StageRecipe, int], Lengths]:
    """A function that measures the data for a stage whose rows are cut at some length, as `make_plan` takes it."""

    def lengths(stage: StageRecipe, limit: int) -> Lengths:
        template = get_template(spec.template if stage.template == "model" else stage.template)
        return measure(data, images, template, tokenizer, spec.visual_tokens, limit, stage.max_turns, max_bad=max_bad)

    return lengths
