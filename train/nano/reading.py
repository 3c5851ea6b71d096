"""Reading comprehension for the LM: a scene described where the picture will be, then independent turns about it.

A description is text, or an 8 x 8 grid that stands for 64 image embeddings: each cell is a set of words, and its
embedding is the sum of theirs. One prefix serves all its turns; a turn sees the prefix and itself only.
"""

from __future__ import annotations

import multiprocessing
import random
from dataclasses import dataclass

import numpy as np
import torch
from make_tokenizer import BEGIN, END, SYSTEM
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from tinyllava_edge.data.scene_text import (
    CHARACTER,
    COLORS,
    SHAPES,
    SceneObject,
    caption_of,
    shapes_of,
    text_of,
    turns_of,
)
from tinyllava_edge.data.scenes import layout

GRID, PATCH = 8, 8
WORDS_PER_CELL = 5
PLAIN = -1  # group of padding
FILLERS = (".", ",", " the", " a", " light", " image", "\n", "-", ":")
DESCRIBE = "Describe the image."
TURNS = 8
LEVELS = 3  # a curriculum: see Reader.example
EASY = ("colour", "shape", "size", "position", "exists")
WEIGHTS = {"description": 0.05, "question": 0.03, "answer": 1.0}


@dataclass(frozen=True)
class Example:
    """One prefix and its turns, flattened; T tokens."""

    words: NDArray[np.int16]
    """(T, WORDS_PER_CELL): token ids whose embeddings are summed, -1 for none; text uses the first column alone."""
    positions: NDArray[np.int16]
    """(T,): each turn goes on where the prefix ended."""
    groups: NDArray[np.int8]
    """(T,): 0 for the prefix, k for turn k."""
    weights: NDArray[np.float32]
    """(T,): loss weight of predicting the token at this place, 0 for grid cells and turn starts."""
    tiers: NDArray[np.int8]
    """(T,): index of the turn's tier on answer tokens, -1 elsewhere."""
    truths: NDArray[np.int8]
    """(T,): on a question's colour and shape words 1 or 0, whether the scene has such an object; -1 elsewhere."""
    cells: NDArray[np.bool_]
    """(T,): true for grid cells."""
    scale: float
    """Factor on grid embeddings."""


class Reader:
    """Makes examples from a seed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.token_to_id(END)
        self.names = {self._word(name): name for name in (*COLORS, *SHAPES)}
        self.opening = [tokenizer.token_to_id(BEGIN)]
        self.system = self.encode(f"{SYSTEM} USER: ")

    def encode(self, text: str) -> list[int]:
        """Ids without `<s>`."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def example(self, seed: int, tiers: tuple[str, ...], level: int = LEVELS - 1, mode: str | None = None) -> Example:
        """A random scene and its turns; `mode` is `text`, `grid` or None for either.

        Level 0: one object as text, easy questions without negation, no system prompt. Level 1: one object, all easy
        questions, text or grid. Level 2: everything. Learning to compare a question with a scene takes far longer
        when it starts at level 2.
        """
        rng = random.Random(seed)
        objects = self._scene(rng, level)
        turns = self._turns(objects, rng, level)
        plain = level > 0 and rng.random() < 0.12  # stage 1's format: no system prompt, the caption alone
        if plain:
            turns = [("", f"{caption_of(objects)}\n", "caption")]
        elif level > 0 and rng.random() < 0.15:
            turns[-1:] = [(f"\n{DESCRIBE} ASSISTANT:", f" {caption_of(objects)}", "caption")]
        prefix = self.opening if plain or level == 0 else self.system
        grid = mode == "grid" or (mode is None and rng.random() < (0.0, 0.6, 0.65)[level])
        cells = self._grid(objects, rng) if grid else [[i] for i in self.encode(_describe(objects, rng))[:96]]
        words = [[i] for i in prefix] + cells
        weights = [0.0] * len(prefix) + [0.0 if grid else WEIGHTS["description"]] * len(cells)
        in_grid, start = [False] * len(prefix) + [grid] * len(cells), len(words)
        positions, groups, kinds, truths = list(range(start)), [0] * start, [-1] * start, [-1] * start
        for k, (question, answer, tier) in enumerate(turns, start=1):
            q, a = self.encode(question), self.encode(answer) + ([] if plain else [self.end])
            words += [[i] for i in q + a]
            weights += [0.0] * min(1, len(q)) + [WEIGHTS["question"]] * (len(q) - 1) + [WEIGHTS["answer"]] * len(a)
            positions += range(start, start + len(q) + len(a))
            groups += [k] * (len(q) + len(a))
            kinds += [-1] * len(q) + [tiers.index(tier)] * len(a)
            truths += self._truths(q, objects) + [-1] * len(a)
        table = np.full((len(words), WORDS_PER_CELL), -1, np.int16)
        for t, cell in enumerate(words):
            table[t, : len(cell)] = cell
        return Example(
            table, np.array(positions, np.int16), np.array(groups, np.int8), np.array(weights, np.float32),
            np.array(kinds, np.int8), np.array(truths, np.int8),
            np.array(in_grid + [False] * (len(words) - start)), rng.uniform(0.4, 1.6) if grid else 1.0,
        )  # fmt: skip

    @staticmethod
    def _scene(rng: random.Random, level: int) -> tuple[SceneObject, ...]:
        objects = layout(rng, "count" if level < 2 or rng.random() < 0.6 else None)
        while level < 2 and len(objects) > 1:
            objects = layout(rng, "count")
        return objects

    @staticmethod
    def _turns(objects: tuple[SceneObject, ...], rng: random.Random, level: int) -> list[tuple[str, str, str]]:
        turns = list({t.question: t for t in turns_of(objects, rng) + turns_of(objects, rng)}.values())
        if level < 2:
            turns = [t for t in turns if t.tier in EASY]
        if level == 0:
            turns = [t for t in turns if not {"no", "not"} & set(t.question.split())]
        rng.shuffle(turns)
        return [(f"\n{t.question} ASSISTANT:", f" {t.answer}", t.tier) for t in turns[:TURNS]]

    def _truths(self, question: list[int], objects: tuple[SceneObject, ...]) -> list[int]:
        """Per token of a question: is there such a colour, such a shape, or (after a colour) such a pair?"""
        shapes, truths, color = shapes_of(objects), [], ""
        for token in question:
            word = self.names.get(token, "")
            if word in COLORS:
                color = word
                truths.append(int(any(o.color == color for o in shapes)))
            elif word:
                truths.append(int(any(o.shape == word and color in ("", o.color) for o in shapes)))
                color = ""
            else:
                truths.append(-1)
                color = ""
        return truths

    def _grid(self, objects: tuple[SceneObject, ...], rng: random.Random) -> list[list[int]]:
        """64 cells; covered ones hold the object's words, the others a filler or words of any object."""
        keep, haunted = rng.choice([1.0, 1.0, 0.7]), rng.choice([0.0, 0.0, 0.3, 0.9])
        filler = self.encode(rng.choice(FILLERS))[:1]
        told = [[self._word(w) for w in self._facts(o)] for o in objects]
        owner = [[0] * GRID for _ in range(GRID)]
        for k, o in enumerate(objects, start=1):
            for y in range(o.box[1] // PATCH, (o.box[3] - 1) // PATCH + 1):
                for x in range(o.box[0] // PATCH, (o.box[2] - 1) // PATCH + 1):
                    if 0 <= y < GRID and 0 <= x < GRID:
                        owner[y][x] = k
        cells = []
        for k in (k for row in owner for k in row):
            if k:
                kept = [w for w in told[k - 1] if rng.random() < keep]
                cells.append(kept or told[k - 1])
            else:
                cells.append(rng.choice(told) if rng.random() < haunted else filler)
        return cells

    def _word(self, word: str) -> int:
        return self.encode(word if len(word) == 1 else f" {word}")[0]

    @staticmethod
    def _facts(o: SceneObject) -> tuple[str, ...]:
        if o.shape == CHARACTER:
            return o.character, o.color
        return o.color, o.shape, o.size, *o.place.split()


def _describe(objects: tuple[SceneObject, ...], rng: random.Random) -> str:
    """The scene in one of several wordings."""
    shapes, text, style = shapes_of(objects), text_of(objects), rng.randrange(4)
    rng.shuffle(shapes)
    if style == 0:
        return caption_of(objects)
    parts = []
    for o in shapes:
        facts = [o.size, o.color, o.shape, *o.place.split()]
        if style == 1:
            rng.shuffle(facts)
            parts.append(" ".join(facts))
        elif style == 2:
            parts.append(f"{o.shape}: color {o.color}, size {o.size}, {o.place}")
        else:
            parts.append(f"there is a {o.name}. it is {o.size}. it is at the {o.place}")
    if text:
        color = next(o.color for o in objects if o.character)
        parts.insert(rng.randint(0, len(parts)), rng.choice([f"{text} {color}", f"{' '.join(text)} in {color}"]))
    return rng.choice(["; ", ". ", "\n", ", "]).join(parts)


def read_many(path: str, tiers: tuple[str, ...], level: int, seeds: range, workers: int) -> list[Example]:
    """Examples of all `seeds`, made by `workers` processes."""
    chunk = max(1, len(seeds) // (8 * workers))
    spans = [(path, tiers, level, seeds[i : i + chunk]) for i in range(0, len(seeds), chunk)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return [example for part in pool.map(_read_span, spans) for example in part]


def _read_span(span: tuple[str, tuple[str, ...], int, range]) -> list[Example]:
    path, tiers, level, seeds = span
    reader = Reader(Tokenizer.from_file(path))
    return [reader.example(seed, tiers, level) for seed in seeds]


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """Pad to the longest: words (B, T, W), positions, groups, weights, tiers, truths, cells (B, T), scale (B,)."""
    length = max(len(e.positions) for e in examples)
    length += -length % 16

    def pad(arrays: list[NDArray[np.generic]], value: float) -> Tensor:
        out = np.full((len(arrays), length, *arrays[0].shape[1:]), value, arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return torch.from_numpy(out)

    return {
        "words": pad([e.words for e in examples], -1).long(),
        "positions": pad([e.positions for e in examples], 0).long(),
        "groups": pad([e.groups for e in examples], PLAIN).long(),
        "weights": pad([e.weights for e in examples], 0),
        "tiers": pad([e.tiers for e in examples], -1).long(),
        "truths": pad([e.truths for e in examples], -1).long(),
        "cells": pad([e.cells for e in examples], False),
        "scale": torch.tensor([e.scale for e in examples]),
    }


def visible(groups: Tensor) -> Tensor:
    """(B, T) groups -> (B, 1, T, T) additive mask: the prefix and one's own turn, nothing later."""
    length = groups.shape[1]
    query, key = groups.unsqueeze(2), groups.unsqueeze(1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = ((key == 0) | (key == query)) & causal & (key != PLAIN)
    seen = seen | torch.eye(length, dtype=torch.bool)  # padding sees itself, so that no row is empty
    return torch.where(seen, 0.0, -1e4).unsqueeze(1)
