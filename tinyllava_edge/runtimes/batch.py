"""Several questions on one picture, side by side in llama.cpp: they share the picture's cells of the KV buffer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from .llama import MAX_SEQUENCES, Floats, Llama
from .stopwatch import Stopwatch
from .text import take


def pack(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices in order, grouped so that a group's sizes fit in `room`; one that is too large stands alone."""
    groups: list[list[int]] = []
    used = 0
    for index, size in enumerate(sizes):
        if not groups or used + size > room or len(groups[-1]) == MAX_SEQUENCES - 1:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += size
    return groups


def top_margins(logits: Floats) -> list[float]:
    """Largest minus second largest of every row (r, vocab): how close the choice was."""
    best = np.partition(logits, -2, axis=1)[:, -2:].astype(np.float64)
    return [float(high - low) for low, high in best]


def decode_group(
    llama: Llama,
    suffixes: Sequence[Sequence[int]],
    start: int,
    max_tokens: int,
    stops: Collection[int],
    watch: Stopwatch,
) -> list[tuple[list[int], str, list[float]]]:
    """Greedy answers to questions whose common prefix lies in sequence 0; question i runs in sequence i + 1.

    Args:
        llama: the decoder; sequence 0 holds positions 0..start-1.
        suffixes: ids of each question, after the picture.
        start: first position of a suffix.
        max_tokens: most tokens of one answer.
        stops: ids that end an answer.
        watch: prefill, first token and decoding are added to it.

    Returns:
        Per question: generated ids without the end token, the finish reason, and each step's margin.

    Raises:
        ContextError: the group doesn't fit together.
    """
    rows = range(len(suffixes))
    with watch.stage("prefill_ms", "text_prefill_ms"):
        for row in rows:
            llama.copy(0, row + 1)
        logits = llama.decode_tokens(
            [token for suffix in suffixes for token in suffix],
            [start + i for suffix in suffixes for i in range(len(suffix))],
            [row + 1 for row in rows for _ in suffixes[row]],
            wanted=[int(end) - 1 for end in np.cumsum([len(suffix) for suffix in suffixes])],
        )
    with watch.stage("first_token_ms"):
        tokens = [int(token) for token in logits.argmax(axis=1)]
        margins = [[margin] for margin in top_margins(logits)]
    places = [start + len(suffix) for suffix in suffixes]
    limits = [min(max_tokens, llama.n_ctx - place + 1) for place in places]
    ids: list[list[int]] = [[] for _ in rows]
    finish = [take(ids[row], tokens[row], limits[row], stops) for row in rows]
    with watch.stage("decode_ms"):
        while active := [row for row in rows if not finish[row]]:
            logits = llama.decode_tokens(
                [tokens[row] for row in active],
                [places[row] for row in active],
                [row + 1 for row in active],
                wanted=range(len(active)),
            )
            for row, token, margin in zip(active, logits.argmax(axis=1), top_margins(logits), strict=True):
                tokens[row] = int(token)
                margins[row].append(margin)
                places[row] += 1
                finish[row] = take(ids[row], tokens[row], limits[row], stops)
    for row in rows:
        llama.remove(row + 1)
    return list(zip(ids, finish, margins, strict=True))
