"""What can be said about a scene: its objects, its caption, and its questions with their answers.

Everything is derived from the list of objects alone, so that the same facts serve pictures (`scenes.py`) and text-only
pretraining (`train/nano/pretrain_lm.py`). The phrasings of easy-VQA (github.com/vzhou842/easy-VQA) all occur here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

SHAPES: tuple[str, ...] = ("circle", "rectangle", "triangle")
COLORS: dict[str, tuple[int, int, int]] = {  # easy-VQA's own RGB values
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "brown": (165, 42, 42),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
SIZES: tuple[str, ...] = ("small", "large")
CHARACTER = "character"  # the `shape` of a drawn digit or letter
TIERS: tuple[str, ...] = (
    "colour", "shape", "size", "position", "exists", "count", "left_right", "ocr", "letter", "relation",
)  # fmt: skip
PICTURE_SIZE = 64
MIDDLE_BAND = 5.0  # no position question about an object whose centre is this near to the middle line (pixels)

IS_THERE = ("is there a {}?", "is there a {} in the image?", "is a {} present?", "does the image contain a {}?")
IS_THERE_NOT = (
    "is there not a {}?", "is there not a {} in the image?", "is no {} present?", "does the image not contain a {}?",
)  # fmt: skip
COLOR_OF = ("what color is the {}?", "what is the color of the {}?")
ONLY_SHAPE = ("what shape is in the image?", "what shape does the image contain?", "what shape is present?")
SHAPE_OF = "what is the {} shape?"


@dataclass(frozen=True)
class SceneObject:
    """One drawn thing: a shape, or one character of the scene's number or word."""

    shape: str
    """`circle`, `rectangle`, `triangle`, or `character`."""
    color: str
    """A key of COLORS."""
    size: str
    """`small` or `large`."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels; right and bottom are exclusive."""
    character: str = ""
    """The digit or letter, for `shape == "character"`."""
    font_size: int = 0
    """Size in points of Pillow's default font, for `shape == "character"`."""

    @property
    def center(self) -> tuple[float, float]:
        """Centre of the box, x then y, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def name(self) -> str:
        """Colour and shape, e.g. `red circle`."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """Quadrant of the centre, e.g. `top left`."""
        x, y = self.center
        return f"{'top' if y < PICTURE_SIZE / 2 else 'bottom'} {'left' if x < PICTURE_SIZE / 2 else 'right'}"


@dataclass(frozen=True)
class Turn:
    """A question and its one-word answer."""

    question: str
    """Lower case (but for option letters), ends in a question mark."""
    answer: str
    """One word, number or option letter."""
    tier: str
    """One of TIERS."""


def shapes_of(objects: tuple[SceneObject, ...]) -> list[SceneObject]:
    """The objects that aren't characters."""
    return [o for o in objects if o.shape != CHARACTER]


def text_of(objects: tuple[SceneObject, ...]) -> str:
    """The drawn number or word, or an empty string."""
    return "".join(o.character for o in objects)


def caption_of(objects: tuple[SceneObject, ...]) -> str:
    """One sentence that names every object from the top down, e.g. `a small red triangle at the top left.`"""
    parts = []
    text = text_of(objects)
    if text:
        first = next(o for o in objects if o.shape == CHARACTER)
        parts.append(f"the {'number' if text.isdigit() else 'word'} {text} in {first.color}")
    ordered = sorted(shapes_of(objects), key=lambda o: (o.center[1], o.center[0]))
    parts += [f"a {o.size} {o.name} at the {o.place}" for o in ordered]
    return ", ".join(parts) + "."


def turns_of(objects: tuple[SceneObject, ...], rng: random.Random, tier: str | None = None) -> tuple[Turn, ...]:
    """Questions about the objects in random order, at most a few per tier; only those of `tier` when it is given."""
    shapes, turns = shapes_of(objects), []
    makers = {
        "colour": _colour, "shape": _shape, "size": _size, "position": _position, "exists": _exists,
        "count": _count, "left_right": _left_right, "letter": _letter, "relation": _relation,
    }  # fmt: skip
    if shapes:
        for name in [tier] if tier else list(makers):
            if name in makers:
                turns += [Turn(q, a, name) for q, a in makers[name](shapes, rng)]
    text = text_of(objects)
    if text and tier in (None, "ocr"):
        kind = "number" if text.isdigit() else "word"
        question = rng.choice([f"what {kind} is shown?", f"what {kind} is in the image?", f"what is the {kind}?"])
        turns.append(Turn(question, text, "ocr"))
    rng.shuffle(turns)
    return tuple(turns)


Pairs = Iterator[tuple[str, str]]


def _colour(shapes: list[SceneObject], rng: random.Random) -> Pairs:
    counts = Counter(o.shape for o in shapes)
    if len(shapes) == 1:
        yield rng.choice(COLOR_OF).format("shape"), shapes[0].color
    for o in rng.sample(shapes, len(shapes))[:2]:
        if counts[o.shape] == 1:
            yield rng.choice(COLOR_OF).format(o.shape), o.color


def _shape(shapes: list[SceneObject], rng: random.Random) -> Pairs:
    counts = Counter(o.color for o in shapes)
    if len(shapes) == 1:
        yield rng.choice(ONLY_SHAPE), shapes[0].shape
    for o in rng.sample(shapes, len(shapes))[:2]:
        if counts[o.color] == 1:
            yield SHAPE_OF.format(o.color), o.shape


def _size(shapes: list[SceneObject], rng: random.Random) -> Pairs:
    o = rng.choice(shapes)
    yield rng.choice(["is the {} small or large?", "what size is the {}?"]).format(o.name), o.size


def _position(shapes: list[SceneObject], rng: random.Random) -> Pairs:
    o = rng.choice(shapes)
    if abs(o.center[1] - PICTURE_SIZE / 2) >= MIDDLE_BAND:
        yield f"is the {o.name} at the top or at the bottom?", o.place.split()[0]


def _left_right(shapes: list[SceneObject], rng: random.Random) -> Pairs:
    o = rng.choice(shapes)
    if abs(o.center[0] - PICTURE_SIZE / 2) >= MIDDLE_BAND:
        yield f"is the {o.name} on the left or on the right?", o.place.split()[1]


def _exists(shapes: list[SceneObject], rng: random.Random) -> Pairs:
    colors, kinds, names = {o.color for o in shapes}, {o.shape for o in shapes}, {o.name for o in shapes}
    near = [n for n in (f"{c} {s}" for c in colors for s in kinds) if n not in names]  # hard: parts seen, pair not
    near += [f"{c} {o.shape}" for c in COLORS for o in shapes if f"{c} {o.shape}" not in names]
    near += [f"{o.color} {s}" for s in SHAPES for o in shapes if f"{o.color} {s}" not in names]
    for pool, present in (
        ([f"{c} shape" for c in COLORS], {f"{c} shape" for c in colors}),
        (list(SHAPES), kinds),
        (sorted(near), names),
    ):
        for wanted in rng.sample([True, False], 2)[: rng.randint(1, 2)]:
            thing = rng.choice(sorted(present) if wanted else [t for t in pool if t not in present] or sorted(present))
            negated = rng.random() < 0.5
            question = rng.choice(IS_THERE_NOT if negated else IS_THERE).format(thing)
            yield question, "yes" if (thing in present) != negated else "no"


def _count(shapes: list[SceneObject], rng: random.Random) -> Pairs:
    yield rng.choice(["how many shapes are there?", "how many shapes are in the image?"]), str(len(shapes))
    kind = rng.choice(SHAPES)
    yield f"how many {kind}s are there?", str(sum(o.shape == kind for o in shapes))
    color = rng.choice([rng.choice(shapes).color, rng.choice(list(COLORS))])
    yield f"how many {color} shapes are there?", str(sum(o.color == color for o in shapes))


def _letter(shapes: list[SceneObject], rng: random.Random) -> Pairs:
    o = rng.choice(shapes)
    if sum(other.shape == o.shape for other in shapes) > 1:
        return
    options = rng.sample([c for c in COLORS if c != o.color], 3) + [o.color]
    rng.shuffle(options)
    listed = " ".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    yield f"{listed}: which letter is the color of the {o.shape}?", "ABCD"[options.index(o.color)]


def _relation(shapes: list[SceneObject], rng: random.Random) -> Pairs:
    if len(shapes) < 2:
        return
    a, b = rng.sample(shapes, 2)
    (ax, ay), (bx, by) = a.center, b.center
    if abs(ax - bx) >= 2 * MIDDLE_BAND:
        word = rng.choice(["left of", "right of"])
        yield f"is the {a.name} {word} the {b.name}?", "yes" if (ax < bx) == (word == "left of") else "no"
    if abs(ay - by) >= 2 * MIDDLE_BAND:
        word = rng.choice(["above", "below"])
        yield f"is the {a.name} {word} the {b.name}?", "yes" if (ay < by) == (word == "above") else "no"
