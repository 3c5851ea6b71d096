"""Bring the features of a data set's pictures into the feature store: each process computes its share."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import processor_config
from ..errors import ImageError
from ..model import TinyLlava, is_dead
from ..spec import ModelSpec
from .feature_store import DTYPES, Features, FeatureStore, open_store
from .pictures import StoredPixels

BATCH = 64  # pictures per forward pass of the tower
POLL = 0.2  # seconds between two looks at what other processes wrote
PATIENCE = 60.0  # seconds without anything new from them, after which a process computes their share itself
Progress = Callable[[int, int], None]
Say = Callable[[str], None]


def stored_features(
    model: TinyLlava,
    spec: ModelSpec,
    pixels: StoredPixels,
    cache: Path,
    *,
    cache_bytes: int,
    dtype: str = "float32",
    share: tuple[int, int] = (0, 1),
    on_progress: Progress | None = None,
    say: Say = lambda text: None,
) -> tuple[Features | None, dict[int, str]]:
    """Features of every picture of a token store, from the disk or computed and kept there.

    Args:
        cache_bytes: the most that all feature stores in `cache` may take.
        dtype: what is kept, a key of DTYPES.
        share: number of this process and of all; each takes every n-th picture, then waits for the rest.
        on_progress: called with the pictures done and their number.

    Returns:
        The features, or None where they don't fit or there are no pictures; and for each picture that can't be
        decoded the reason.

    Raises:
        StorageError: the disk is full.
    """
    count = pixels.store.pictures
    if not count or not cache_bytes:
        return None, {}
    shape = _shape(model, spec)
    needed = count * shape[0] * shape[1] * DTYPES[dtype].itemsize
    if needed > cache_bytes:  # known before any picture is read
        say(
            f"features of {count:,} pictures take {needed / 1e9:.1f} GB, {cache_bytes / 1e9:.1f} are allowed: they are "
            "computed for each batch (--cache-size)"
        )
        return None, {}
    faults: dict[int, str] = {}
    digests = [_digest(pixels, number, faults) for number in range(count)]
    wanted = [digest for digest in digests if digest]
    store = open_store(cache, _key(model, spec, dtype), shape, dtype, wanted, cache_bytes)
    if store is None:
        say(f"{cache}: no room for these features within {cache_bytes:,} bytes; computing them per batch")
        return None, {}
    filler = _Filler(model, pixels, store, digests, faults, on_progress, say)
    filler.fill(share)
    places = np.array([store.place.get(digest, -1) if digest else -1 for digest in digests], np.int64)
    places[list(faults)] = -1
    return Features(store, places), faults


class _Filler:
    def __init__(
        self,
        model: TinyLlava,
        pixels: StoredPixels,
        store: FeatureStore,
        digests: Sequence[bytes],
        faults: dict[int, str],
        on_progress: Progress | None,
        say: Say,
    ) -> None:
        self.model, self.pixels, self.store, self.digests = model, pixels, store, digests
        self.faults, self.on_progress, self.say = faults, on_progress, say
        self.waiting = self._lacking()

    def fill(self, share: tuple[int, int]) -> None:
        """Compute what this process is to compute, and wait for the others."""
        rank, world = share
        tower = self.model.model.vision_tower
        mode = tower.training
        tower.eval()
        try:
            self._compute([number for number in self.waiting if number % world == rank])
            last = time.monotonic()
            while self.waiting:
                self.store.refresh()
                before = len(self.waiting)
                self._forget_whole()
                refused = [number for number in self.waiting if self.digests[number] in self.store.refused]
                self._compute(refused)  # to learn why
                if len(self.waiting) < before:
                    last = time.monotonic()
                elif time.monotonic() - last > PATIENCE:
                    self.say(f"{self.store.root}: nothing new from other processes; computing the rest here")
                    self._compute(list(self.waiting))
                elif self.waiting:
                    time.sleep(POLL)
        finally:
            tower.train(mode)
        self._show()

    def _lacking(self) -> dict[int, None]:
        """The first picture of each content that has no whole record."""
        lacking: dict[bytes, int] = {}
        damaged = 0
        for number, digest in enumerate(self.digests):
            if not digest or digest in lacking:
                continue
            if not self.store.is_whole(digest):
                lacking[digest] = number
                damaged += digest in self.store.place
        if damaged:
            self.say(f"{self.store.root}: {damaged} damaged records; their features are computed again")
        return dict.fromkeys(lacking.values())

    def _forget_whole(self) -> None:
        for number in [number for number in self.waiting if self.store.is_whole(self.digests[number])]:
            del self.waiting[number]

    def _compute(self, numbers: Sequence[int]) -> None:
        device = next(self.model.model.vision_tower.parameters()).device
        for start in range(0, len(numbers), BATCH):
            decoded: dict[int, torch.Tensor] = {}
            part = numbers[start : start + BATCH]
            for number in part:
                try:
                    decoded[number] = self.pixels.one(number)
                except ImageError as error:
                    self._refuse(number, error.message)
            features = torch.zeros(0, *self.store.shape)
            if decoded:
                with torch.no_grad():
                    features = self.model.tower_features(torch.stack(list(decoded.values())).to(device)).float().cpu()
            refused = [self.digests[number] for number in part if number not in decoded]
            self.store.add([self.digests[number] for number in decoded], features, refused)
            for number in part:
                self.waiting.pop(number, None)
            self._show()

    def _refuse(self, number: int, reason: str) -> None:
        """The same file under several names is refused under each."""
        for same, digest in enumerate(self.digests):
            if digest == self.digests[number]:
                self.faults[same] = reason.replace(self.pixels.name(number), self.pixels.name(same))

    def _show(self) -> None:
        if self.on_progress is not None:
            self.on_progress(len(self.digests) - len(self.waiting), len(self.digests))


def _digest(pixels: StoredPixels, number: int, faults: dict[int, str]) -> bytes:
    """SHA-256 of a picture's file; empty, and a fault noted, where it can't be read."""
    try:
        return hashlib.sha256(pixels.read(number)).digest()
    except ImageError as error:
        faults[number] = error.message
        return b""


def _shape(model: TinyLlava, spec: ModelSpec) -> tuple[int, int]:
    """(p, v), by asking the tower."""
    parameter = next(model.model.vision_tower.parameters())
    blank = torch.zeros(1, 3, spec.image_size, spec.image_size, device=parameter.device)
    with torch.no_grad():
        found = model.tower_features(blank)
    return int(found.shape[1]), int(found.shape[2])


def _key(model: TinyLlava, spec: ModelSpec, dtype: str) -> str:
    """Hash of all that features depend on besides the picture: weights that are used, preprocessing, libraries."""
    import PIL
    import transformers

    layers, layer = int(model.config.vision_config.num_hidden_layers), int(model.config.vision_feature_layer)
    digest = hashlib.sha256()
    device = "cpu"
    for name, tensor in sorted(model.named_parameters()):
        if ".vision_tower." in name and not is_dead(name, layer, layers):
            device = tensor.device.type
            plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
            digest.update(plain.data)
    facts: dict[str, Any] = {
        "tower": digest.hexdigest(),
        "config": model.config.vision_config.to_dict(),
        "layer": layer,
        "select": spec.select_strategy,
        "processor": processor_config(spec),
        "policy": [spec.image_policy, list(spec.pad_color)],
        "versions": [PIL.__version__, torch.__version__, transformers.__version__],
        "device": device,
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
