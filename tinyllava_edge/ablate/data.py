"""Training data of a grid: built-in sets are made, large ones are cut to the scale, and their packs are counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import new_directory, sha256_file, write_json
from .grid import Data

SCENES = 1500  # generated pictures of `easy-vqa+scenes`, as in the demo


@dataclass(frozen=True)
class DataFiles:
    """Data that is there."""

    name: str
    """as in the grid"""
    pretrain: tuple[Path, ...]
    """LLaVA JSON of stages on captions"""
    finetune: tuple[Path, ...]
    """LLaVA JSON of stages on conversations"""
    images: Path
    """directory that image paths start from"""

    def of(self, template: str) -> tuple[Path, ...]:
        """Files of a stage with this template."""
        return self.pretrain if template == "pretrain" else self.finetune

    def key(self, template: str) -> list[str]:
        """Hashes of those files."""
        return [sha256_file(path) for path in self.of(template)]


def prepare_data(data: Data, out: Path, pictures: int | None) -> DataFiles:
    """Make the files of a set below `out`, or find them made.

    Args:
        data: an entry of the grid.
        out: directory for made and cut files; untouched where files are given and not cut.
        pictures: taken of each file from its front; rows without a picture are left out then.

    Raises:
        DataError: a file that is no LLaVA JSON, or a built-in set whose package is missing.
    """
    if data.images is None:
        data = _built_in(data.name, out / data.name)
    images = data.images or out
    if pictures is None:
        return DataFiles(data.name, data.pretrain, data.finetune, images)
    cut = out / f"{data.name}.{pictures}-pictures"
    return DataFiles(
        data.name,
        tuple(_cut(path, cut / f"pretrain-{k}.json", pictures) for k, path in enumerate(data.pretrain)),
        tuple(_cut(path, cut / f"finetune-{k}.json", pictures) for k, path in enumerate(data.finetune)),
        images,
    )


def count_packs(paths: Sequence[Path], max_turns: int) -> tuple[int, int, int]:
    """Packs that a stage trains on (`collate.pack`), different pictures, and answers."""
    packs = answers = 0
    by_picture: dict[str, int] = {}
    names = set()
    for path in paths:
        for row in _rows(path):
            turns, image = row.get("conversations"), row.get("image")
            answers += len(turns) // 2 if isinstance(turns, list) else 1
            if isinstance(image, str):
                names.add(image)
            if isinstance(image, str) and isinstance(turns, list) and len(turns) == 2 and max_turns > 1:
                by_picture[image] = by_picture.get(image, 0) + 1
            else:
                packs += 1
    return packs + sum(-(-turns // max_turns) for turns in by_picture.values()), len(names), answers


def _built_in(name: str, out: Path) -> Data:
    """easy-VQA from its package; `easy-vqa+scenes` mixes generated scenes into the conversations, as the demo does."""
    captions, conversations = out / "train_captions.json", [out / "train_qa.json"]
    if name == "easy-vqa+scenes":
        conversations.append(out / "train.json")
    if not out.is_dir():
        from ..data import easy_vqa, scenes

        with new_directory(out) as temporary:
            easy_vqa.convert(temporary)
            if name == "easy-vqa+scenes":
                scenes.write_split(temporary, SCENES, seed=1, split="train")
    return Data(name, (captions,), tuple(conversations), out / "images")


def _cut(path: Path, out: Path, pictures: int) -> Path:
    rows = [row for row in _rows(path) if isinstance(row.get("image"), str)]
    kept = set(list(dict.fromkeys(row["image"] for row in rows))[:pictures])
    chosen = [row for row in rows if row["image"] in kept]
    if not chosen:
        raise DataError(f"{path}: no row with a picture", "drop `pictures` from [scale], or give rows with pictures")
    write_json(out, chosen)
    return out


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows as they stand; the trainer checks them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        whole = text.lstrip().startswith("[")
        found = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not LLaVA JSON ({error})", "give a list of conversations, or one a line") from error
    if not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path}: a row is no object", "give a list of conversations, or one a line")
    return list(found)
