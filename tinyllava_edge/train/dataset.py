"""A stage's data, ready for Trainer: packs, their order, and batches with pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..checkpoint import Checkpoint
from ..data.llava_json import BadRow, Row, bad_row, check_bad, read
from ..errors import DataError
from ..files import sha256_file
from ..prompt import get_template
from .collate import Encoded, Encoder, Pack, collate, pack
from .pictures import CACHE_BYTES, Pictures, Pixels, cache_features, cache_size
from .recipes import StageRecipe

GROUP = 16  # batches that are sorted by length together, so that little padding is computed


@dataclass(frozen=True)
class StageData(Dataset[Pack]):
    """Everything a stage is trained on."""

    packs: Sequence[Pack]
    """what a batch is made of"""
    pictures: Pictures
    """picture names → tensors"""
    pad_id: int
    """id in the padding"""
    bad: Sequence[BadRow] = field(default=())
    """rows that were left out"""
    sha256: str = ""
    """hash of the JSON files, and of the names and sizes of the pictures"""

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:
        return self.packs[index]

    def batch(self, packs: Sequence[Pack]) -> dict[str, torch.Tensor]:
        """Tensors of some packs: those of `collate`, and `pixel_values` or `image_features` of their pictures."""
        names = [item.image for item in packs if item.image is not None]
        return {**collate(packs, self.pad_id), **(self.pictures(names) if names else {})}


def prepare(
    checkpoint: Checkpoint,
    stage: StageRecipe,
    data: Path | Sequence[Path],
    images: Path,
    *,
    max_bad: int = 0,
    cache_bytes: int = CACHE_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> StageData:
    """Read, check, tokenise and pack a stage's data; cache tower features when the tower is frozen and they fit.

    Raises:
        DataError: unusable files, or more than `max_bad` bad rows (unreadable pictures included).
        CheckpointError: the tokenizer lacks the template's end-of-turn token.
    """
    paths = [data] if isinstance(data, Path) else list(data)
    found = read(paths, images, max_bad=max_bad)
    bad = list(found.bad)
    spec = checkpoint.spec
    template = get_template(spec.template if stage.template == "model" else stage.template)
    limit = min(stage.max_length or spec.max_length, spec.max_length)
    encoder = Encoder(checkpoint.tokenizer, template, spec.visual_tokens, limit)
    encoded: list[tuple[Row, Encoded]] = []
    for row in found.rows:
        try:
            encoded.append((row, encoder.encode(row)))
        except DataError as error:
            bad.append(bad_row(row, error.message))
    pictures: Pictures = Pixels(spec, images)
    names = sorted({row.image for row, _ in encoded if row.image is not None})
    if stage.tower == "frozen" and cache_size(checkpoint.model, spec, len(names)) <= cache_bytes:
        pictures, faults = cache_features(checkpoint.model, Pixels(spec, images), names, on_progress)
        bad += [bad_row(row, faults[row.image]) for row, _ in encoded if row.image in faults]
        encoded = [(row, ids) for row, ids in encoded if row.image not in faults]
    check_bad(bad, max_bad)
    if not encoded:
        raise DataError(
            f"{', '.join(map(str, paths))}: no usable row", "give LLaVA JSON with at least one conversation"
        )
    image_id = int(checkpoint.model.config.image_token_id)
    return StageData(
        pack(encoded, stage.max_turns), pictures, int(image_id == 0), tuple(bad), _hash(paths, images, names)
    )


def _hash(paths: Sequence[Path], images: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{sha256_file(path)}\n".encode())
    for name in names:
        digest.update(f"{name}\0{(images / name).stat().st_size}\n".encode())
    return digest.hexdigest()


class PackSampler(Sampler[int]):
    """A new order every epoch, given by the seed alone; packs of like length come in the same batch."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.size, self.seed, self.epoch = np.asarray(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order `__iter__` gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        window = self.size * GROUP
        sorted_windows = [
            part[np.argsort(-self.lengths[part], kind="stable")]
            for part in (order[start : start + window] for start in range(0, len(order), window))
        ]
        joined = np.concatenate(sorted_windows)
        full = len(joined) // self.size
        batches = joined[: full * self.size].reshape(full, self.size)
        yield from (int(k) for k in batches[rng.permutation(full)].reshape(-1))
        yield from (int(k) for k in joined[full * self.size :])  # the short last batch stays last
