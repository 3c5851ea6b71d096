"""Collecting an importance matrix over pictures and text, in torch.

llama.cpp's own collector has no pictures, though in this model's prompts most positions hold image embeddings. Here
conversations run through the checkpoint with their embeddings in place, and a hook on each linear layer of the language
model adds up the squares of what flows into it: one number per input channel, so memory stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

from ..checkpoint import Checkpoint, load
from ..data.easy_vqa import package_data, questions
from ..data.llava_json import Row, read
from ..errors import ExportError, UsageError
from ..files import sha256_tree
from ..model import TinyLlava
from ..prompt import IMAGE_MARKER, Turn, get_template, take_image_marker
from ..train.collate import Encoder
from ..train.pictures import Pixels
from .imatrix import Imatrix, check_values
from .llm_architectures import architecture_of

Progress = Callable[[str], None]
DEFAULT_SAMPLES = 128
EASY_VQA = "easy-vqa train"


@dataclass(frozen=True)
class CalibrationData:
    """Conversations to run, with their pictures."""

    rows: tuple[Row, ...]
    """questions with reference answers"""
    images: Path
    """directory that the rows' pictures lie in"""
    name: str
    """where they come from, for the file's metadata"""


def calibration_rows(
    path: Path | None = None, images: Path | None = None, limit: int = DEFAULT_SAMPLES
) -> CalibrationData:
    """Rows to calibrate on: of a LLaVA JSON file, or easy-VQA's training questions; the same ones at every call.

    Args:
        path: LLaVA JSON; None takes easy-VQA, which fits models of the demo's kind and no others.
        images: directory that its `image` entries are relative to; only with `path`.
        limit: most rows, taken in even steps through the file. 128 rows of a 700-position prompt are 90,000 positions,
            more than the 50,000 that are usual for text.

    Raises:
        UsageError: `path` without `images`, or a limit below one.
        DataError: unusable rows, or the easy-vqa package is missing.
    """
    if limit < 1:
        raise UsageError(f"{limit} calibration rows", "take at least one")
    if path is not None:
        if images is None:
            raise UsageError(f"{path} needs the directory of its pictures", "give it with --images")
        return CalibrationData(_spread(read(path, images).rows, limit), images, path.name)
    asked = questions("train")
    rows = tuple(
        Row(f"train-{k}", (f"{number}.png",), (Turn(f"{IMAGE_MARKER}\n{question}", answer),))
        for k, (question, answer, number) in enumerate(asked)
    )
    return CalibrationData(_spread(rows, limit), package_data() / "train" / "images", EASY_VQA)


def collect(
    checkpoint: Path | Checkpoint,
    data: CalibrationData,
    *,
    text_only: bool = False,
    progress: Progress | None = None,
) -> Imatrix:
    """Run conversations through a checkpoint and add up the squares of every linear layer's input.

    Prompts are those of training: the model's template, reference answers included, cut at its `max_length`. Each row
    is one sequence of its own, so there is no padding to leave out. Every position counts once, as in llama.cpp's
    collector; fused layers do not occur, and layers that share an input get equal entries. Columns of a matrix are the
    same in the GGUF, because only rows are reordered for the rotation there.

    Args:
        checkpoint: directory, or a loaded checkpoint.
        data: what to run.
        text_only: leave the pictures out, for comparison: what a text-only collection would see.
        progress: told each step.

    Raises:
        ExportError: a layer without a GGUF name, or an input that is not finite.
        CheckpointError, DataError, ImageError: the checkpoint, a row or a picture can't be used.
    """
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load(checkpoint)
    model, spec = loaded.model, loaded.spec
    encoder = Encoder(loaded.tokenizer, get_template(spec.template), spec.visual_tokens, spec.max_length)
    pixels = Pixels(spec, data.images)
    positions = image_positions = 0
    with torch.inference_mode(), _watched(model.model.language_model, gguf_names(model)) as watched:
        for done, row in enumerate(data.rows, 1):
            row = without_picture(row) if text_only else row
            ids = torch.from_numpy(encoder.encode(row).ids).long()[None]  # (1, n)
            features = model.tower_features(pixels(row.images)["pixel_values"]) if row.images else None
            model.model.language_model(inputs_embeds=model.embed(ids, features), use_cache=False)
            positions += ids.shape[1]
            image_positions += spec.visual_tokens * len(row.images)
            if progress:
                progress(f"importance matrix: conversation {done} of {len(data.rows)}")
    if not positions:
        raise ExportError(f"{data.name}: no conversation to calibrate on", "give rows with answers")
    imatrix = Imatrix(
        sums={name: layer.sums.numpy().astype(np.float32) for name, layer in watched.items()},
        counts={name: layer.count for name, layer in watched.items()},
        datasets=(data.name + (" (text only)" if text_only else ""),),
        image_share=image_positions / positions,
        samples=len(data.rows),
        checkpoint_sha256=sha256_tree(loaded.root),
    )
    check_values(imatrix, str(loaded.root))
    return imatrix


def without_picture(row: Row) -> Row:
    """The same conversation as a text-only row."""
    turns = tuple(replace(t, question=take_image_marker(t.question)[0], images=0) for t in row.turns)
    return replace(row, images=(), turns=turns)


def gguf_names(model: TinyLlava) -> dict[str, str]:
    """Linear layer of a TinyLlava's language model → its weight's name in the GGUF.

    Raises:
        ExportError: a layer that llama.cpp has no name for.
    """
    config = model.config.text_config
    names = gguf.get_tensor_name_map(architecture_of(config).gguf_arch, config.num_hidden_layers)
    found: dict[str, str] = {}
    for layer, module in model.model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            name = names.get_name(f"model.{layer}.weight", try_suffixes=(".weight",))
            if name is None:
                raise ExportError(
                    f"{config.model_type}: layer {layer} has no GGUF name", "export a model of the stock architecture"
                )
            found[layer] = name
    return found


class _Layer:
    """Running sum of one linear layer."""

    def __init__(self, width: int) -> None:
        self.sums, self.count = torch.zeros(width, dtype=torch.float64), 0

    def see(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook: (…, width) adds to the sums."""
        rows = inputs[0].flatten(0, -2)
        self.sums += rows.square().sum(0, dtype=torch.float64)
        self.count += len(rows)


@contextmanager
def _watched(language_model: nn.Module, names: dict[str, str]) -> Iterator[dict[str, _Layer]]:
    """GGUF name → running sum, while the block lasts."""
    modules = dict(language_model.named_modules())
    layers = {name: _Layer(modules[layer].in_features) for layer, name in names.items()}
    hooks = [modules[layer].register_forward_pre_hook(layers[name].see) for layer, name in names.items()]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def _spread(rows: Sequence[Row], limit: int) -> tuple[Row, ...]:
    """At most `limit` rows in even steps, the same ones every time."""
    if len(rows) <= limit:
        return tuple(rows)
    return tuple(rows[k * len(rows) // limit] for k in range(limit))
