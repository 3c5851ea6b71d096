"""A stage's data, ready for Trainer: packs, their order, and batches with pictures.

Rows are tokenised once and kept on the disk (token_store), features of a frozen tower too (feature_store). Both stay in
a cache directory, are used again while nothing changed, and may be shared by any number of runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..checkpoint import Checkpoint
from ..data.llava_json import BadRow, check_bad
from ..errors import DataError, UsageError
from ..prompt import get_template
from .collate import Pack, arrange, collate
from .encode import Encoder
from .feature_fill import stored_features
from .feature_store import DTYPES
from .launch import place_in_run
from .pictures import CACHE_BYTES, Pictures, StoredPixels
from .recipes import StageRecipe
from .sampler import PackSampler
from .source import Source, open_source
from .token_build import token_store
from .token_store import BadRows, Packs, TokenStore

__all__ = ["PackSampler", "StageData", "prepare"]


@dataclass(frozen=True)
class StageData(Dataset[Pack]):
    """Everything a stage is trained on."""

    packs: Packs
    """what a batch is made of"""
    pictures: Pictures
    """picture numbers → tensors"""
    pad_id: int
    """id in the padding"""
    bad: Sequence[BadRow] = field(default=())
    """rows that were left out, read from the disk"""
    sha256: str = ""
    """hash of the data files, and of the names and fingerprints of the pictures"""
    pack_length: int = 0
    """positions of a sequence that packs stand in end to end; 0 gives each pack its own"""
    group_by_length: bool = True
    """whether packs of like length come in the same batch"""
    varlen: bool = False
    """whether a batch is one sequence for FlashAttention, without a mask"""
    source: Source | None = None
    """where rows and pictures come from, and how sets are mixed"""

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:
        """A pack; the empty one for the index behind the last, which PackSampler fills gaps with."""
        return self.packs.or_gap(index)

    @property
    def rows(self) -> int:
        """Conversations."""
        return self.packs.kept

    def batch(self, packs: Sequence[Pack]) -> dict[str, Any]:
        """Tensors of some packs: those of `collate`, and `pixel_values` or `image_features` of their pictures."""
        length = 0 if self.varlen else self.pack_length
        pictures = [number for part in arrange(packs, length) for item in part for number in item.images]
        tensors = collate(packs, self.pad_id, pack_length=length, varlen=self.varlen)
        return {**tensors, **(self.pictures(pictures) if pictures else {})}

    def sampler(self, batch: int, seed: int) -> PackSampler:
        """Every epoch's order in batches of `batch` packs over all processes.

        The weight of a set counts packs, so each epoch has the same number of them.
        """
        order = partial(self.source.order, self.packs.sizes, seed) if self.source else None
        found = PackSampler(self.packs.lengths, batch, seed, order=order, group=self.group_by_length)
        if not len(found):
            raise DataError(f"{self.source}: an epoch draws no row", "give the sets larger weights")
        return found


def prepare(
    checkpoint: Checkpoint,
    stage: StageRecipe,
    data: Path | Sequence[Path],
    images: Path | Sequence[Path],
    *,
    max_bad: int | float = 0,
    cache_bytes: int = CACHE_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
    varlen: bool = False,
    feature_dtype: str = "float32",
    say: Callable[[str], None] | None = None,
    alone: bool = False,
) -> StageData:
    """Read, check, tokenise and pack a stage's data; keep tower features when the tower is frozen and they fit.

    Every process of a run may call it at once: one writes the tokens while the others wait, and each computes its share
    of the features. Not under a barrier that lets one process in before the others: they wait for each other here.

    Args:
        cache: where tokens and features are kept; by default a temporary directory of this process, removed with the
            data.
        cache_bytes: the most that features in `cache` may take; beyond it pictures are decoded for each batch.
        varlen: batches for FlashAttention, one sequence without a mask.
        feature_dtype: `float32`, `bfloat16` or `float16`, in which features are kept.
        say: takes one line for people; by default it goes to stderr.
        alone: this process computes all features itself, the others of the run do something else.

    Raises:
        DataError: unusable files, or more than `max_bad` bad rows (unreadable pictures included).
        CheckpointError: the tokenizer lacks the template's end-of-turn token.
        UsageError: `varlen` with packs that share a prefix.
        StorageError: the disk is full.
    """
    if varlen and stage.max_turns > 1:
        raise UsageError(f"max_turns = {stage.max_turns} with varlen attention", "set max_turns = 1 in the recipe")
    if feature_dtype not in DTYPES:
        raise UsageError(f"features in {feature_dtype!r}", f"known: {', '.join(DTYPES)}")
    say = say or _stderr
    spec = checkpoint.spec
    encoder = _encoder(checkpoint, stage)
    temporary = tempfile.mkdtemp(prefix="tinyllava-edge-") if cache is None else None
    try:
        place = Path(temporary) if temporary else Path(cache or "")
        source = open_source(data, images, place)
        store = token_store(source, encoder, place, say)
        check_bad(store.bad, max_bad, len(store) + len(store.bad))  # before hours of features
        pictures: Pictures = StoredPixels(spec, source, store)
        keep: Any = None
        faults: tuple[BadRow, ...] = ()
        if _tower_is_frozen(stage):
            found, unreadable = stored_features(
                checkpoint.model,
                spec,
                StoredPixels(spec, source, store),
                place,
                cache_bytes=cache_bytes,
                dtype=feature_dtype,
                share=(0, 1) if temporary or alone else place_in_run(),  # nobody else sees a temporary directory
                on_progress=on_progress,
                say=say,
            )
            if found is not None:
                pictures = found
                keep, faults = _without(store, unreadable)
        bad = BadRows(store.bad.path, store.bad.stored, faults)
        check_bad(bad, max_bad, len(store) + len(store.bad))
        packs = Packs(store, stage.max_turns, keep)
        if not len(packs):
            raise DataError(f"{source}: no usable row", "give LLaVA JSON with at least one conversation")
        image_id = int(checkpoint.model.config.image_token_id)
        sha256 = hashlib.sha256(f"{store.meta['data']}\n{store.meta['pictures_sha256']}".encode()).hexdigest()
        ready = StageData(
            packs, pictures, int(image_id == 0), bad, sha256, stage.pack_length, stage.group_by_length, varlen, source
        )
        if temporary:
            weakref.finalize(ready, _remove, temporary, os.getpid())
            temporary = None
        return ready
    finally:
        if temporary:
            _remove(temporary, os.getpid())


def check_rows(
    checkpoint: Checkpoint,
    stage: StageRecipe,
    data: Path | Sequence[Path],
    images: Path | Sequence[Path],
    cache: Path,
    *,
    max_bad: int | float = 0,
) -> None:
    """Read, check and tokenise rows that are needed later; pictures are looked up, not decoded.

    Raises:
        DataError: unusable files, or more than `max_bad` bad rows.
    """
    store = token_store(open_source(data, images, cache), _encoder(checkpoint, stage), cache, _stderr)
    check_bad(store.bad, max_bad, len(store) + len(store.bad))
    if not len(store):
        raise DataError(f"{data}: no usable row", "give LLaVA JSON with at least one conversation")


def _encoder(checkpoint: Checkpoint, stage: StageRecipe) -> Encoder:
    spec = checkpoint.spec
    template = get_template(spec.template if stage.template == "model" else stage.template)
    limit = min(stage.max_length or spec.max_length, spec.max_length)
    return Encoder(checkpoint.tokenizer, template, spec.visual_tokens, limit)


def _tower_is_frozen(stage: StageRecipe) -> bool:
    return stage.tower == "frozen"


def _without(store: TokenStore, faults: dict[int, str]) -> tuple[Any, tuple[BadRow, ...]]:
    """Which rows are left when some pictures can't be decoded, and the others as bad rows."""
    if not faults:
        return None, ()
    keep = np.ones(len(store), np.bool_)
    bad = []
    for row, picture in store.rows_with(list(faults)):
        keep[row] = False
        bad.append(store.bad_row(row, faults[picture]))
    return keep, tuple(bad)


def _remove(directory: str, owner: int) -> None:
    """Unless this is a forked worker: the directory is its parent's."""
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)


def _stderr(text: str) -> None:
    print(text, file=sys.stderr)
