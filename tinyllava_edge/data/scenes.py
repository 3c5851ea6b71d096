"""Generated pictures of shapes, numbers and words, with captions, questions and per-pixel truth.

    scene = render(seed=7)                      # any kind of scene
    scene = render(seed=7, tier="count")        # a scene that suits the tier, with that tier's questions only
    write_split("data/scenes", n_pictures=1000, seed=0, split="eval")

numpy and Pillow only. The same seed gives the same scene on every machine with the same Pillow.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tinyllava_edge.data.scene_text import (
    CHARACTER,
    COLORS,
    PICTURE_SIZE,
    SHAPES,
    TIERS,
    SceneObject,
    Turn,
    caption_of,
    shapes_of,
    turns_of,
)

SMALL, LARGE = (5, 15), (20, 31)  # longest side in pixels, both ends included
SPLIT_START = {"train": 0, "eval": 1 << 40}  # first scene seed of each split
SEED_STRIDE = 1 << 20  # scene seeds that one split seed owns, so at most this many pictures per split
MIN_CONTRAST = 75.0  # RGB distance between an object and its background
SUPERSAMPLE = 4
WORD_LIST = """
act add age air ant arm art bag bat bed bee big bin box boy bus buy cab can cap car cat cow cup cut day dog dot dry
ear eat egg elf end eye fan far fig fit fix fly fog fox fun gap gem gum gym hat hen hop hot hub ice ink jam jar jet
job joy key kid kit lab law leg lid lip log lot low map mix mud mug nap net new nod now nut oak oil old one owl pan
paw pen pet pie pig pin pot pub rag ram rat raw ray red rib rim rob row rug run sad saw sea see set sew she sit six
sky son spy sun tap tax tea ten tie tip top toy tub two van vet wax way web wet win wig wow yak yes zip zoo
"""
WORDS: tuple[str, ...] = tuple(WORD_LIST.split())


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is true of it."""

    image: Image.Image
    """RGB, 64 x 64."""
    objects: tuple[SceneObject, ...]
    """What was drawn, characters in reading order first."""
    caption: str
    """One sentence that names every object."""
    turns: tuple[Turn, ...]
    """Independent questions about this picture."""
    ids: NDArray[np.uint8]
    """(64, 64): 0 for background, k for the pixels of `objects[k - 1]`; a character fills the box of its ink."""


def layout(rng: random.Random, tier: str | None = None) -> tuple[SceneObject, ...]:
    """Objects of a random scene that suits `tier`: 1-4 shapes, or a number or word with perhaps one shape."""
    if tier is not None and tier not in TIERS:
        raise ValueError(f"unknown tier {tier!r}; known: {', '.join(TIERS)}")
    placed: list[SceneObject] = []
    if tier == "ocr" or (tier is None and rng.random() < 0.3):
        placed += _place_text(rng)
        n_shapes = int(rng.random() < 0.35)
    else:
        n_shapes = rng.choices((1, 2, 3, 4), (40, 25, 20, 15))[0]
        n_shapes = max(n_shapes, 2) if tier == "relation" else n_shapes
    while not placed or len(shapes_of(tuple(placed))) < n_shapes:
        taken = {o.name for o in placed}
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        size = "large" if rng.random() < 0.5 and len(placed) < 3 else "small"
        w, h = _extent(shape, size, rng)
        for _ in range(40):
            x, y = rng.randint(0, PICTURE_SIZE - w), rng.randint(0, PICTURE_SIZE - h)
            box = (x, y, x + w, y + h)
            if f"{color} {shape}" not in taken and not any(_near(box, o.box) for o in placed):
                placed.append(SceneObject(shape, color, size, box))
                break
        else:
            if f"{color} {shape}" not in taken:
                n_shapes = max(n_shapes - 1, 1)  # the picture is full
    return tuple(placed)


def render(seed: int, tier: str | None = None) -> Scene:
    """The scene of `seed`; with `tier`, one that suits it and has at least one of its questions."""
    rng = random.Random(seed)
    objects = layout(rng, tier)
    turns = turns_of(objects, rng, tier)
    while not turns and tier is not None:
        objects = layout(rng, tier)
        turns = turns_of(objects, rng, tier)
    image, ids = draw(objects, rng)
    return Scene(image, objects, caption_of(objects), turns, ids)


def draw(objects: tuple[SceneObject, ...], rng: random.Random) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Picture (RGB, 64 x 64) and object-id map (64, 64) of `objects` on a random background."""
    image = _background([COLORS[o.color] for o in objects], rng)
    ids = np.zeros((PICTURE_SIZE, PICTURE_SIZE), np.uint8)
    for k, o in enumerate(objects, start=1):
        left, top, right, bottom = o.box
        if o.shape == CHARACTER:
            mask = _glyph(o.character, o.font_size)
            ids[top:bottom, left:right] = k
        else:
            mask = _shape_mask(o.shape, right - left, bottom - top)
            ids[top:bottom, left:right][np.asarray(mask) >= 128] = k
        image.paste(COLORS[o.color], (left, top), mask)
    return image, ids


def write_split(
    directory: str | Path, n_pictures: int, seed: int, split: str = "train", tiers: tuple[str, ...] | None = None
) -> Path:
    """Write `n_pictures` PNGs under `directory`/images and the questions as LLaVA JSON; returns the JSON's path.

    Args:
        directory: created when missing.
        n_pictures: at most SEED_STRIDE.
        seed: 0 or more. No scene of one (split, seed) is in another.
        split: `train` or `eval`; names the JSON too.
        tiers: make the pictures suit these tiers in turn and ask only their questions; None asks everything.
    """
    if split not in SPLIT_START:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLIT_START)}")
    if not 0 <= n_pictures <= SEED_STRIDE or not 0 <= seed < SEED_STRIDE:
        raise ValueError(f"n_pictures={n_pictures} and seed={seed} must lie between 0 and {SEED_STRIDE}")
    directory = Path(directory)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for i in range(n_pictures):
        scene = render(scene_seed(split, seed, i), tiers[i % len(tiers)] if tiers else None)
        name = f"{split}-{seed}-{i:06d}"
        scene.image.save(directory / "images" / f"{name}.png")
        for k, turn in enumerate(scene.turns):
            talk = [
                {"from": "human", "value": f"<image>\n{turn.question}"},
                {"from": "gpt", "value": turn.answer},
            ]
            rows.append({"id": f"{name}-{k}", "image": f"{name}.png", "conversations": talk, "tier": turn.tier})
    path = directory / f"{split}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path


def scene_seed(split: str, seed: int, index: int) -> int:
    """Seed of the `index`-th scene of a split; the ranges of two splits never meet."""
    return SPLIT_START[split] + seed * SEED_STRIDE + index


def _extent(shape: str, size: str, rng: random.Random) -> tuple[int, int]:
    low, high = SMALL if size == "small" else LARGE
    longest = rng.randint(low, high)
    if shape == "circle":
        return longest, longest
    if shape == "triangle":
        return longest, max(4, round(longest * rng.uniform(0.8, 0.9)))
    other = rng.randint(max(5, longest // 3), longest)
    return (longest, other) if rng.random() < 0.5 else (other, longest)


def _near(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] + 2 and b[0] < a[2] + 2 and a[1] < b[3] + 2 and b[1] < a[3] + 2


def _place_text(rng: random.Random) -> list[SceneObject]:
    text = str(rng.randint(0, 99)) if rng.random() < 0.6 else rng.choice(WORDS)
    color, points = rng.choice(list(COLORS)), rng.randint(14, 34 if len(text) < 3 else 27)
    font = _font(points)
    boxes, pen = [], 0.0
    for character in text:
        left, top, right, bottom = font.getbbox(character)
        boxes.append([round(pen), int(top), round(pen) + int(right - left), int(bottom)])
        pen += max(font.getlength(character), right - left + 1)
    width, top = boxes[-1][2], min(b[1] for b in boxes)
    height = max(b[3] for b in boxes) - top
    x, y = rng.randint(0, max(0, PICTURE_SIZE - width)), rng.randint(0, PICTURE_SIZE - height)
    size = "small" if points < 20 else "large"
    return [
        SceneObject(CHARACTER, color, size, (b[0] + x, b[1] - top + y, b[2] + x, b[3] - top + y), c, points)
        for c, b in zip(text, boxes, strict=True)
    ]


@cache
def _font(points: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=points)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, so numbers and words cannot be drawn")
    return font


@cache
def _glyph(character: str, points: int) -> Image.Image:
    left, top, right, bottom = (int(v) for v in _font(points).getbbox(character))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), character, fill=255, font=_font(points))
    return mask


@cache
def _shape_mask(shape: str, width: int, height: int) -> Image.Image:
    w, h = width * SUPERSAMPLE, height * SUPERSAMPLE
    mask = Image.new("L", (w, h))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((0, 0, w - 1, h - 1), fill=255)
    elif shape == "triangle":
        pen.polygon([(w / 2, 0), (0, h - 1), (w - 1, h - 1)], fill=255)
    else:
        pen.rectangle((0, 0, w, h), fill=255)
    return mask.reduce(SUPERSAMPLE)


def _background(colors: list[tuple[int, int, int]], rng: random.Random) -> Image.Image:
    """Plain light as in easy-VQA, or a gradient, noise or a mid-tone; far enough in colour from every object."""
    kind = rng.choices(("plain", "gradient", "noise", "mid"), (55, 15, 15, 15))[0]
    if kind == "plain":
        return Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), tuple(rng.randint(230, 255) for _ in range(3)))
    low = 200 if kind != "mid" else 60
    ends = [_contrasting(colors, low, rng) for _ in range(2 if kind == "gradient" else 1)]
    steps = np.linspace(0.0, 1.0, PICTURE_SIZE, dtype=np.float32)[:, None]
    ramp = np.asarray(ends[0], np.float32) * (1 - steps) + np.asarray(ends[-1], np.float32) * steps
    pixels = np.broadcast_to(ramp[:, None], (PICTURE_SIZE, PICTURE_SIZE, 3))
    if rng.random() < 0.5:
        pixels = pixels.transpose(1, 0, 2)
    if kind == "noise":
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(pixels.shape, dtype=np.float32)
        pixels = pixels + noise * rng.uniform(3, 16)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _contrasting(colors: list[tuple[int, int, int]], low: int, rng: random.Random) -> tuple[int, int, int]:
    while True:
        shade = (rng.randint(low, 255), rng.randint(low, 255), rng.randint(low, 255))
        if all(sum((a - b) ** 2 for a, b in zip(shade, c, strict=True)) >= MIN_CONTRAST**2 for c in colors):
            return shade
