"""Pictures → image embeddings, computed at most once per picture while the cache holds them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..bundle import Build
from ..image import check_array, read_bytes
from ..spec import ModelSpec
from .base import Picture
from .cancel import Cancel
from .embedding_cache import EmbeddingCache, cache_key, file_digest, picture_digest, vision_facts
from .picture import read_picture
from .stopwatch import Stopwatch
from .vision import Vision

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Opened:
    """A picture whose bytes were read, so that what is hashed is what is encoded."""

    source: Picture
    """bytes or RGB"""
    name: str
    """what messages call it"""
    key: str
    """cache key; different pictures, models and vision files never share one"""


class PictureEncoder:
    """A build's vision side: reading, preprocessing, tower and connector, behind the embedding cache.

    Args:
        vision: the graphs.
        spec: the model's.
        cache: None encodes every picture anew.
        build: whose files they are.
    """

    def __init__(self, vision: Vision, spec: ModelSpec, cache: EmbeddingCache | None, build: Build) -> None:
        self._vision, self._spec, self._cache = vision, spec, cache
        self._graphs = (file_digest(build.preprocess), file_digest(build.vision))
        self._worker: ThreadPoolExecutor | None = None
        self._futures: list[Future[Floats]] = []
        self._opened = 0

    def open(self, picture: Picture) -> Opened:
        """Read a picture's bytes and name them by their hash. Raises ImageError."""
        name: str
        source: Picture
        if isinstance(picture, np.ndarray):
            name, source = "image", check_array(picture)
        else:
            name, source = read_bytes(picture)
        if self._cache is None:
            self._opened += 1
            return Opened(source, name, f"picture {self._opened}")
        facts = vision_facts(*self._vision.settings)
        return Opened(source, name, cache_key(picture_digest(source), *self._graphs, facts))

    def embed(self, picture: Opened, watch: Stopwatch, cancel: Cancel) -> Floats:
        """Image embeddings (t, d). Raises ImageError, EngineError, CancelledError."""
        cancel.check()
        found = None if self._cache is None else self._cache.get(picture.key)
        if found is not None:
            return found
        with watch.stage("decode_image_ms"):
            rgb = read_picture(picture.source, self._spec, picture.name)
        self.load(watch)
        with watch.stage("preprocess_ms"):
            pixels = self._vision.pixel_values(rgb)
        with watch.stage("vision_ms"):
            embeds = self._vision.embed(pixels, cancel)
        if self._cache is not None:
            self._cache.put(picture.key, embeds)
        return embeds

    def load(self, watch: Stopwatch) -> None:
        """Open the graphs, unless they are open."""
        if not self._vision.providers:
            with watch.stage("load_ms"):
                self._vision.load()

    def start(self, pictures: Sequence[Opened], watch: Stopwatch, cancel: Cancel) -> list[Future[Floats]]:
        """Encode pictures one after the other in a thread of its own, while the caller's thread does something else."""
        self.load(watch)  # here, so that loading overlaps with nothing and can be told from the answer's own time
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="vision")
        self._futures = [self._worker.submit(self.embed, picture, watch, cancel) for picture in pictures]
        return self._futures

    def drop(self) -> None:
        """Take back what `start` began and nobody will wait for."""
        for future in self._futures:
            future.cancel()
        self._futures = []

    def stats(self) -> dict[str, int]:
        """Counts of the embedding cache; empty where there is none."""
        return {} if self._cache is None else self._cache.stats()

    def close(self) -> None:
        """End the thread, close the graphs and forget the pictures."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._vision.close()
        self._cache = None
