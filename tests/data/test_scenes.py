"""The generator: same seed, same scene; splits never meet; every answer follows from the objects."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyllava_edge.data import easy_vqa
from tinyllava_edge.data.scene_text import COLORS, SHAPES, TIERS, shapes_of, text_of, turns_of
from tinyllava_edge.data.scenes import layout, render, scene_seed, write_split

SCENES = [render(seed) for seed in range(150)]
ONE_WORD = {*COLORS, *SHAPES, "yes", "no", "small", "large", "top", "bottom", "left", "right", *"01234ABCD"}


def test_same_seed_same_scene() -> None:
    first, again = render(11), render(11)
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.objects, first.caption, first.turns) == (again.objects, again.caption, again.turns)
    assert first.image.tobytes() != render(12).image.tobytes()


def test_pictures_and_id_maps_agree() -> None:
    for scene in SCENES:
        assert scene.image.size == (64, 64) and scene.image.mode == "RGB"
        assert scene.ids.shape == (64, 64) and int(scene.ids.max()) <= len(scene.objects) <= 4
        pixels = np.asarray(scene.image).astype(int)
        for k, o in enumerate(scene.objects, start=1):
            left, top, right, bottom = o.box
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            inside = pixels[scene.ids == k]
            assert (inside == COLORS[o.color]).all(-1).any() or o.character  # thin strokes may have no full pixel
            ys, xs = np.nonzero(scene.ids == k)
            assert left <= xs.min() and xs.max() < right and top <= ys.min() and ys.max() < bottom


def test_objects_do_not_overlap_and_are_nameable() -> None:
    for scene in SCENES:
        shapes = shapes_of(scene.objects)
        assert len({o.name for o in shapes}) == len(shapes)
        for i, a in enumerate(scene.objects):
            for b in shapes:
                if a is not b and a not in scene.objects[:i]:
                    apart = a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]
                    assert apart, (a, b)


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_can_be_asked_for(tier: str) -> None:
    for seed in range(20):
        turns = render(seed, tier).turns
        assert turns and {t.tier for t in turns} == {tier}
        assert all(t.question.endswith("?") and (t.answer in ONE_WORD or tier == "ocr") for t in turns)


def test_unknown_tier_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown tier 'color'"):
        render(0, "color")


def test_answers_follow_from_the_objects() -> None:
    checked = 0
    for seed in range(400):
        rng = random.Random(seed)
        objects = layout(rng)
        shapes = shapes_of(objects)
        names, colors, kinds = {o.name for o in shapes}, {o.color for o in shapes}, {o.shape for o in shapes}
        for turn in turns_of(objects, rng):
            words = turn.question.rstrip("?").replace("shapes", "shape").split()
            color = next((w for w in words if w in COLORS), None)
            shape = next((w for w in words if w in SHAPES), None)
            if turn.tier == "exists":
                here = f"{color} {shape}" in names if color and shape else color in colors if color else shape in kinds
                truth = "yes" if here != ("not" in words or "no" in words) else "no"
            elif turn.tier == "colour":
                truth = next(o.color for o in shapes if shape in (None, o.shape))
            elif turn.tier == "shape":
                truth = next(o.shape for o in shapes if color in (None, o.color))
            elif turn.tier == "ocr":
                truth = text_of(objects)
            elif turn.tier == "letter":
                options = dict(zip(turn.question.split()[1:8:2], "ABCD", strict=True))
                truth = {v: k.rstrip(":") for k, v in options.items()}[turn.answer]
                assert truth == next(o.color for o in shapes if o.shape == words[-1])
                continue
            else:
                continue
            assert turn.answer == truth, (turn, objects)
            checked += 1
    assert checked > 1000


def test_counts_places_and_relations() -> None:
    for seed in range(60):
        scene = render(seed, "relation")
        by_name = {o.name: o.center for o in shapes_of(scene.objects)}
        for turn in scene.turns:
            a, b = (by_name[n] for n in sorted(by_name, key=turn.question.find) if turn.question.find(n) >= 0)
            axis = 0 if "left" in turn.question or "right" in turn.question else 1
            before = "left" in turn.question or "above" in turn.question
            assert turn.answer == ("yes" if (a[axis] < b[axis]) == before else "no")
        counted = {t.question: t.answer for t in render(seed, "count").turns}
        total = str(len(shapes_of(render(seed, "count").objects)))
        assert all(a == total for q, a in counted.items() if q.startswith("how many shapes"))


def test_phrasings_of_easy_vqa_occur() -> None:
    theirs = {q for q, _, _ in easy_vqa.questions("train")}
    ours: set[str] = set()
    for seed in range(6000):
        rng = random.Random(seed)
        ours |= {t.question for t in turns_of(layout(rng), rng)}
    assert theirs <= ours


def test_splits_never_meet() -> None:
    biggest = 1 << 20
    assert scene_seed("train", biggest - 1, biggest - 1) < scene_seed("eval", 0, 0)
    assert scene_seed("train", 0, biggest - 1) < scene_seed("train", 1, 0)
    pictures = [{render(scene_seed(s, 0, i)).image.tobytes() for i in range(200)} for s in ("train", "eval")]
    assert not pictures[0] & pictures[1]


def test_write_split(tmp_path: Path) -> None:
    path = write_split(tmp_path, n_pictures=6, seed=3, split="eval", tiers=("count", "ocr"))
    rows = json.loads(path.read_text())
    assert path.name == "eval.json" and {row["tier"] for row in rows} == {"count", "ocr"}
    assert len({row["image"] for row in rows}) == 6 and len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        human, reply = row["conversations"]
        assert human["value"].startswith("<image>\n") and reply["from"] == "gpt"
        with Image.open(tmp_path / "images" / row["image"]) as image:
            assert image.size == (64, 64)
    with pytest.raises(ValueError, match="known: train, eval"):
        write_split(tmp_path, 1, 0, split="test")
