"""The easy-VQA data set (github.com/vzhou842/easy-VQA, MIT) as LLaVA JSON, from the installed `easy-vqa` package.

    paths = convert("data/easy-vqa")    # train_qa.json, test_qa.json, train_captions.json, images/

Captions are made here: colour and shape from a picture's training questions, size and place from its pixels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tinyllava_edge.data.scene_text import COLORS, SHAPES, SceneObject, caption_of
from tinyllava_edge.errors import DataError

LARGE_FROM = 18  # longest side in pixels from which a caption says `large`
CAPTION_PROMPT = "Describe the image."
Row = tuple[str, str, int]  # question, answer, picture number


@dataclass(frozen=True)
class Paths:
    """What `convert` wrote."""

    train_qa: Path
    """38,575 single-turn rows."""
    test_qa: Path
    """9,673 single-turn rows, each with a `question_type`."""
    train_captions: Path
    """4,000 rows, one per training picture."""
    images: Path
    """PNG files, `train-{number}.png` and `test-{number}.png`."""


def package_data() -> Path:
    """Directory of the installed package's data, with `train` and `test` inside."""
    try:
        root = Path(str(files("easy_vqa"))) / "data"
    except ModuleNotFoundError as error:
        raise DataError("the easy-vqa package is not installed", hint="pip install easy-vqa") from error
    for name in ("train/questions.json", "test/questions.json", "train/images", "test/images"):
        if not (root / name).exists():
            raise DataError(f"{root / name} is missing", hint="pip install --force-reinstall easy-vqa")
    return root


def questions(split: str) -> list[Row]:
    """Rows of `train` or `test` in the package's order."""
    path = package_data() / split / "questions.json"
    try:
        return [(str(q), str(a), int(i)) for q, a, i in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} can't be read: {error}", hint="pip install --force-reinstall easy-vqa") from error


def picture(split: str, number: int) -> Image.Image:
    """One picture, RGB 64 x 64."""
    path = package_data() / split / "images" / f"{number}.png"
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}", hint="pip install --force-reinstall easy-vqa") from error


def question_type(answer: str) -> str:
    """`yes/no`, `color` or `shape`."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "color" if answer in COLORS else "shape"


def describe(image: Image.Image, rows: Iterable[Row]) -> tuple[SceneObject, NDArray[np.bool_]]:
    """The one object of a picture and the mask (64, 64) of its pixels.

    Colour and shape come from the picture's questions; where these leave several, from the pixels.
    """
    pixels = np.asarray(image, np.int32)  # (64, 64, 3)
    told = [(q.removesuffix("?").split(), a) for q, a, _ in rows]
    color = _told(told, tuple(COLORS)) or max(COLORS, key=lambda c: int(_equal(pixels, COLORS[c]).sum()))
    core = _equal(pixels, COLORS[color])
    if not core.any():
        raise DataError(f"a picture has no {color} pixel, but its questions say {color}", hint="reinstall easy-vqa")
    ys, xs = np.nonzero(core)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    filled = float(core.sum()) / (width * height)
    guess = "rectangle" if filled > 0.9 else "circle" if filled > 0.66 else "triangle"
    size = "large" if max(width, height) >= LARGE_FROM else "small"
    return SceneObject(_told(told, SHAPES) or guess, color, size, box), core


def convert(out_dir: str | Path) -> Paths:
    """Copy the pictures and write the three JSON files under `out_dir`."""
    out, root = Path(out_dir), package_data()
    paths = Paths(out / "train_qa.json", out / "test_qa.json", out / "train_captions.json", out / "images")
    paths.images.mkdir(parents=True, exist_ok=True)
    by_split = {split: questions(split) for split in ("train", "test")}
    for split, rows in by_split.items():
        for number in sorted({i for _, _, i in rows}):
            shutil.copyfile(root / split / "images" / f"{number}.png", paths.images / f"{split}-{number}.png")
    _write(paths.train_qa, [_qa_row("train", k, row) for k, row in enumerate(by_split["train"])])
    _write(
        paths.test_qa,
        [{**_qa_row("test", k, row), "question_type": question_type(row[1])} for k, row in enumerate(by_split["test"])],
    )
    of_picture: dict[int, list[Row]] = {}
    for row in by_split["train"]:
        of_picture.setdefault(row[2], []).append(row)
    _write(paths.train_captions, [_caption_row(number, rows) for number, rows in sorted(of_picture.items())])
    return paths


def _told(told: list[tuple[list[str], str]], values: tuple[str, ...]) -> str | None:
    """The one of `values` that the questions allow, or None when they leave several."""
    possible = set(values)
    for words, answer in told:
        if answer in values:
            return answer
        named = [w for w in words if w in values]
        if not named:
            continue
        if answer not in ("yes", "no"):  # "what is the red shape?": it is red
            return named[0]
        negated = "not" in words or "no" in words
        if (answer == "yes") != negated:
            return named[0]
        possible.discard(named[0])
    return possible.pop() if len(possible) == 1 else None


def _equal(pixels: NDArray[np.int32], color: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.asarray((pixels == np.asarray(color)).all(-1))


def _qa_row(split: str, k: int, row: Row) -> dict[str, object]:
    question, answer, number = row
    return _row(f"{split}-{k}", f"{split}-{number}.png", question, answer)


def _caption_row(number: int, rows: list[Row]) -> dict[str, object]:
    found, _ = describe(picture("train", number), rows)
    return _row(f"caption-{number}", f"train-{number}.png", CAPTION_PROMPT, caption_of((found,)))


def _row(name: str, image: str, prompt: str, reply: str) -> dict[str, object]:
    talk = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": reply}]
    return {"id": name, "image": image, "conversations": talk}


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
