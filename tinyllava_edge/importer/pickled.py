"""`pytorch_model.bin` behind the TensorSource protocol, through torch's weights-only path: a pickle never runs code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_spec import read_json
from ..errors import CheckpointError
from ..weights import INDEX, SINGLE, TensorInfo, TensorSource, open_weights

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Pickled:
    """Tensors of one or several torch files, mapped into memory and paged in when they are read."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Open the files.

        Raises:
            CheckpointError: a file is missing or truncated, holds anything but dense tensors by name, or would need
                its pickle to be run.
        """
        self.infos: dict[str, TensorInfo] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            for name, tensor in _load(file).items():
                if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                    raise CheckpointError(f"{file}: entry {str(name)[:80]!r} is no tensor", "save a plain state dict")
                if tensor.layout != torch.strided or tensor.device.type != "cpu":
                    raise CheckpointError(f"{file}: tensor {name} is not a dense one", "save it in float16 or float32")
                if name in self.infos:
                    raise CheckpointError(f"{file}: tensor {name} is in {self.infos[name].file.name} too")
                self.infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, file)
                self._tensors[name] = tensor.detach()

    def get(self, name: str) -> torch.Tensor:
        """One tensor in its type on disk. Raises CheckpointError."""
        if name not in self._tensors:
            raise CheckpointError(f"no tensor {name}", "restore the checkpoint")
        return self._tensors[name]


def has_weights(root: Path) -> bool:
    """Whether a directory holds weights under one of the names that Hugging Face writes."""
    return any((root / name).is_file() for name in (INDEX, SINGLE, PICKLED_INDEX, PICKLED))


def open_any(root: Path) -> TensorSource:
    """Weights of a directory, safetensors before torch files. Raises CheckpointError if there are none."""
    if any((root / name).is_file() for name in (INDEX, SINGLE)):
        return open_weights(root)
    index = root / PICKLED_INDEX
    if index.is_file():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise CheckpointError(f"{index}: not an index of weights", "copy the file again")
        files = sorted({str(file) for file in placed.values()})
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{index}: names {file!r}, which leaves the directory", "get the model again")
        source = Pickled([root / file for file in files])
        lost = [name for name in placed if name not in source.infos]
        if lost:
            raise CheckpointError(f"{index}: lists {lost[0]}, which no file holds", "copy the whole checkpoint again")
        return source
    if (root / PICKLED).is_file():
        return Pickled([root / PICKLED])
    raise CheckpointError(f"{root}: no {SINGLE} and no {PICKLED}", "name a directory with weights")


def _load(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing", "copy the whole checkpoint again")
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # torch before 1.6 wrote plain pickles, which can't be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on old formats
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # pickle, zip and torch each raise their own on damage or refusal
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if "weights_only" in reason:  # torch goes on to advise the unsafe way
            reason = "it holds more than tensors"
        raise CheckpointError(
            f"{path}: torch's weights-only loader refuses it ({reason})",
            "copy the file again; a pickle that needs more than tensors is never run: get the model as safetensors",
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not tensors by name", "save a plain state dict")
    return value
