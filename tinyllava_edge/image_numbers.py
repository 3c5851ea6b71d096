"""How pictures are prepared, read from an image processor's own file; what it doesn't say is as the tower's family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_spec import read_json
from .errors import CheckpointError
from .spec import FILTERS
from .towers import TOWERS

PREPROCESSOR = "preprocessor_config.json"
_NAMES = (PREPROCESSOR, "processor_config.json")  # the second is the whole processor's, as transformers 5 writes it
# What the preprocess graph computes.
_FOLLOWED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}


def find_processor(root: Path) -> Path | None:
    """The file with the image processor's numbers in a model's directory; None where there is none."""
    return next((root / name for name in _NAMES if (root / name).is_file()), None)


def image_numbers(processor: Path | None, vision: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Fields of a ModelSpec that say how pictures are prepared: size, mean, deviation, policy, resize and filter.

    Args:
        processor: preprocessor_config.json, if there is one; else the family's own numbers are taken.
        vision: the tower's configuration.
        family: key of TOWERS.

    Raises:
        CheckpointError: a setting that the device files can't follow, or no size of a picture.
    """
    tower = TOWERS[family]
    mean, std, policy, resample = tower.mean, tower.std, tower.policy, tower.resample
    size = tower.crop_size or vision.get("image_size")
    resize = tower.crop_resize
    given = read_json(processor) if processor else {}
    where = processor or Path("config.json")
    inner = given.get("image_processor", given)
    given = inner if isinstance(inner, dict) else {}
    for key, known in _FOLLOWED.items():
        if given.get(key, known) != known:
            raise CheckpointError(f"{where}: {key} {str(given[key])[:40]} can't be followed", f"known: {known}")
    kernel = given.get("resample", FILTERS[resample])
    kernels = {number: name for name, number in FILTERS.items()}
    if type(kernel) is not int or kernel not in kernels:
        raise CheckpointError(f"{where}: resample {str(kernel)[:40]} can't be followed", f"known: {kernels}")
    if given:
        mean, std = triple(where, given, "image_mean", mean), triple(where, given, "image_std", std)
        sides = given.get("size")
        if not isinstance(sides, dict):
            sides = {"height": sides, "shortest_edge": sides} if sides else {}
        if given.get("do_center_crop"):
            crop = given.get("crop_size")
            size = crop.get("height", size) if isinstance(crop, dict) else crop or size
            policy, resize = "crop", sides.get("shortest_edge", 0)
        elif "height" in sides:
            policy, size, resize = "warp", sides["height"], 0
        if given.get("do_pad"):
            policy = "pad"
    size = integer(where, "image size", size)
    resize = 0 if resize == size else resize
    return {
        "image_size": size,
        "image_mean": mean,
        "image_std": std,
        "image_policy": policy,
        "crop_resize": integer(where, "shortest_edge", resize, least=0),
        "resample": kernels[kernel],
    }


def triple(where: Path, given: Mapping[str, Any], key: str, default: Any) -> tuple[float, float, float]:
    """Three numbers of a JSON object. Raises CheckpointError."""
    value = given.get(key, default)
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(x) in (int, float) for x in value):
        raise CheckpointError(f"{where}: {key} {str(value)[:80]}", "restore the file")
    return (value[0], value[1], value[2])


def integer(where: Path, key: str, value: Any, least: int = 1) -> int:
    """An integer of a JSON object in `least` … 2²². Raises CheckpointError."""
    if type(value) is not int or not least <= value <= 1 << 22:
        raise CheckpointError(f"{where}: {key} {str(value)[:40]!r} is no such number", "restore the file")
    return value
