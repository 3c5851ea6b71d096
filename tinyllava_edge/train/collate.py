"""Rows → packs → batches: turns about one picture share its prefix, and packs may stand end to end in a sequence.

A pack is one row, or several single-turn rows about one picture: the prefix (beginning of sequence, system text, image)
stands once, each turn sees the prefix and itself only, and its positions restart after the prefix. So the loss of a
pack is the sum of its rows' losses, while the picture and the system text are computed once. With `pack_length` a
sequence holds several packs; each sees itself only and its positions restart, so losses and gradients stay as they are.

Legend: p packs, b sequences, n positions, a answer tokens of the fullest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..data.llava_json import Row
from ..errors import UsageError
from .encode import Encoded, Encoder

__all__ = ["EMPTY", "IGNORED", "Encoded", "Encoder", "Pack", "arrange", "collate", "group", "pack", "without_answers"]

IGNORED = -100  # the label that no loss counts
Ids = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pack:
    """Rows that are trained as one sequence."""

    rows: tuple[Encoded, ...]
    """one row, or several that share their first `shared` ids; none fills a gap at the end of an epoch"""
    images: tuple[int, ...] = ()
    """their pictures, as places in the data set's list, in the order of the slots"""

    @property
    def length(self) -> int:
        """Positions of the sequence."""
        shared = self.rows[0].shared if len(self.rows) > 1 else 0
        return shared + sum(len(row.ids) - shared for row in self.rows)


EMPTY = Pack(())


def without_answers(item: Pack) -> Pack:
    """The same positions and pictures, but nothing that a loss counts: for batches that only need to be filled."""
    return replace(item, rows=tuple(replace(row, is_answer=np.zeros_like(row.is_answer)) for row in item.rows))


def group(pictures: Places, max_turns: int) -> tuple[Places, Places]:
    """Put single-turn rows about one picture together, up to `max_turns` a pack in packs of even size.

    Args:
        pictures: (rows,) the picture whose prefix a row can share, or -1 for a row that stays alone.

    Returns:
        Row numbers, pack after pack in the order of their first rows; and (p,) the end of each pack in them.
    """
    count = len(pictures)
    numbers = np.arange(count)
    if max_turns <= 1 or not count:
        return numbers, numbers + 1
    first = np.arange(count)  # the first row of each row's pack
    able = np.flatnonzero(pictures >= 0)
    able = able[np.argsort(pictures[able], kind="stable")]  # picture by picture, rows in order
    if len(able):
        starts = np.flatnonzero(np.diff(pictures[able], prepend=-1))
        sizes = np.diff(starts, append=len(able))
        packs = -(-sizes // max_turns)
        place = np.arange(len(able)) - np.repeat(starts, sizes)
        first[able] = able[np.repeat(starts, sizes) + place % np.repeat(packs, sizes)]
    rows = np.argsort(first, kind="stable")
    return rows, np.flatnonzero(np.diff(first[rows], append=-1)) + 1


def pack(rows: Sequence[tuple[Row, Encoded]], max_turns: int) -> list[Pack]:
    """Packs of rows that are in memory, as `group` makes them; pictures are numbered as they come."""
    numbers: dict[str, int] = {}
    images = [
        tuple(numbers.setdefault(name, len(numbers)) for name in row.images[: encoded.images]) for row, encoded in rows
    ]
    able = [found[0] if encoded.shared else -1 for found, (_, encoded) in zip(images, rows, strict=True)]
    order, ends = group(np.array(able, np.int64), max_turns)
    return [Pack(tuple(rows[k][1] for k in part), images[part[0]]) for part in np.split(order, ends[:-1]) if len(part)]


def arrange(packs: Sequence[Pack], pack_length: int) -> list[list[Pack]]:
    """Which packs stand in which sequence: best-fit decreasing, so that few positions are padding.

    Args:
        pack_length: the most positions of a sequence; a longer pack stands alone, and 0 leaves every pack alone.
    """
    packs = [item for item in packs if item.rows]
    if not pack_length:
        return [[item] for item in packs]
    sequences: list[list[Pack]] = []
    left: list[int] = []
    for item in sorted(packs, key=lambda item: -item.length):
        length = item.length
        fitting = [k for k, space in enumerate(left) if space >= length]
        if fitting:
            best = min(fitting, key=lambda k: left[k])
            sequences[best].append(item)
            left[best] -= length
        else:
            sequences.append([item])
            left.append(pack_length - length)
    return sequences


def collate(packs: Sequence[Pack], pad_id: int, *, pack_length: int = 0, varlen: bool = False) -> dict[str, Any]:
    """Tensors of some packs. Pictures belong in the order of `arrange`.

    Args:
        pack_length: as `arrange`.
        varlen: one sequence of all packs for FlashAttention instead, without a mask; no pack may share a prefix.

    Returns:
        input_ids (b, n), padded on the right; position_ids (b, n); attention_mask, bool, (b, n) for ordinary causal
        rows or (b, 1, n, n) where a sequence holds several turns or packs; labels (b, a): the answer tokens, then -100;
        sources (b, a): the position whose hidden state predicts each label. With `varlen`, instead of the mask:
        cu_seq_lens_q and cu_seq_lens_k, int32 (p + 1,), and max_length_q and max_length_k, whole numbers, by the names
        of transformers' FlashAttentionKwargs.

    Raises:
        UsageError: `varlen`, and a pack shares a prefix.
    """
    sequences = [[item for item in packs if item.rows]] if varlen else arrange(packs, pack_length)
    laid = [_join([_lay_out(item) for item in sequence]) for sequence in sequences if sequence] or [_nothing(pad_id)]
    n = max(len(item.ids) for item in laid)
    a = max(1, *(len(item.sources) for item in laid))
    ids = np.full((len(laid), n), pad_id, np.int64)
    positions = np.zeros((len(laid), n), np.int64)
    turns = np.full((len(laid), n), -1, np.int64)
    numbers = np.zeros((len(laid), n), np.int64)
    sources = np.zeros((len(laid), a), np.int64)
    labels = np.full((len(laid), a), IGNORED, np.int64)
    for k, item in enumerate(laid):
        ids[k, : len(item.ids)] = item.ids
        positions[k, : len(item.ids)] = item.positions
        turns[k, : len(item.ids)] = item.turns
        numbers[k, : len(item.ids)] = item.packs
        sources[k, : len(item.sources)] = item.sources
        labels[k, : len(item.sources)] = item.labels
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "sources": torch.from_numpy(sources),
        "labels": torch.from_numpy(labels),
    }
    if varlen:
        if turns.any():
            raise UsageError("varlen attention can't share a prefix between turns", "set max_turns = 1 in the recipe")
        return batch | _boundaries(numbers[0])
    of = torch.from_numpy(numbers) if numbers.any() else None
    several = of is not None or turns.max() > 0
    batch["attention_mask"] = _block_mask(torch.from_numpy(turns), of) if several else torch.from_numpy(turns >= 0)
    return batch


@dataclass(frozen=True)
class _Sequence:
    ids: Ids
    positions: Ids
    turns: Ids  # 0 for the prefix and for lone rows, then 1, 2 … for the turns
    packs: Ids  # number of the pack within the sequence
    sources: Ids
    labels: Ids


def _nothing(pad_id: int) -> _Sequence:
    """One position and no answer, for a micro-batch that holds gaps only."""
    zero, none = np.zeros(1, np.int32), np.zeros(0, np.int32)
    return _Sequence(np.array([pad_id], np.int32), zero, zero, zero, none, none)


def _lay_out(item: Pack) -> _Sequence:
    shared = item.rows[0].shared if len(item.rows) > 1 else 0
    first = item.rows[0]
    ids, positions, turns = [first.ids[:shared]], [np.arange(shared)], [np.zeros(shared)]
    sources, labels, offset = [], [], shared
    for number, row in enumerate(item.rows, 1):
        own = len(row.ids) - shared
        answers = np.flatnonzero(row.is_answer[shared:])
        answers = answers[answers + shared > 0]  # the very first position has nothing to be predicted from
        ids.append(row.ids[shared:])
        positions.append(shared + np.arange(own))
        turns.append(np.full(own, number if shared else 0))
        sources.append(np.where(answers == 0, shared, offset + answers) - 1)  # a turn's first token follows the prefix
        labels.append(row.ids[shared + answers])
        offset += own
    joined = [np.concatenate(part).astype(np.int32) for part in (ids, positions, turns, sources, labels)]
    return _Sequence(joined[0], joined[1], joined[2], np.zeros(offset, np.int32), joined[3], joined[4])


def _join(parts: Sequence[_Sequence]) -> _Sequence:
    """Packs end to end."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.ids) for part in parts[:-1])])
    return _Sequence(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.turns for part in parts]),
        np.concatenate([part.packs + k for k, part in enumerate(parts)]),
        np.concatenate([part.sources + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.labels for part in parts]),
    )


def _boundaries(numbers: Places) -> dict[str, Any]:
    """FlashAttention's arguments for packs that stand end to end; `numbers` (n,) rises by one from pack to pack."""
    lengths = np.bincount(numbers)
    ends = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": longest, "max_length_k": longest}


def _block_mask(turns: torch.Tensor, packs: torch.Tensor | None) -> torch.Tensor:
    """Who sees whom: (b, n) twice → bool (b, 1, n, n); no `packs` where a sequence is one.

    Causal, within a pack, and there within a turn or towards the prefix; padding sees itself.
    """
    n = turns.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    query, key = turns.unsqueeze(2), turns.unsqueeze(1)  # (b, n, 1), (b, 1, n)
    seen = causal & (key >= 0) & ((key == 0) | (key == query))
    if packs is not None:
        seen &= packs.unsqueeze(2) == packs.unsqueeze(1)
    return (seen | torch.eye(n, dtype=torch.bool)).unsqueeze(1)
