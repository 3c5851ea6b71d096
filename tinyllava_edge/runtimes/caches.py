"""What the device runtime keeps between answers, and how much memory and disk that may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .embedding_cache import EmbeddingCache


@dataclass(frozen=True)
class Caches:
    """Bounds of the caches. Answers are the same with and without them, up to rounding of the last bits."""

    image_bytes: int = 64 << 20
    """most memory for image embeddings; 6 MB a picture at 729 tokens of width 2048"""
    image_dir: Path | None = None
    """directory that keeps image embeddings between runs; none by default"""
    image_dir_bytes: int = 1 << 30
    """most disk space of that directory"""
    prefix_bytes: int = 128 << 20
    """most memory for saved KV prefixes: TinyLlama takes 17 MB for a picture of 729 tokens, Phi-2 239 MB; 0 computes
    every prompt whole"""
    overlap: bool = True
    """whether pictures are encoded while text in front of them is decoded"""

    def __post_init__(self) -> None:
        """Raises UsageError for a negative bound."""
        if min(self.image_bytes, self.image_dir_bytes, self.prefix_bytes) < 0:
            raise UsageError("a cache's bound is negative", "0 turns a cache off")

    @property
    def bytes(self) -> int:
        """Most memory that the caches may take together."""
        return self.image_bytes + self.prefix_bytes

    def embeddings(self) -> EmbeddingCache | None:
        """The embedding cache; None where it is turned off."""
        if not self.image_bytes and self.image_dir is None:
            return None
        return EmbeddingCache(max_bytes=self.image_bytes, directory=self.image_dir, max_disk_bytes=self.image_dir_bytes)


NO_CACHES = Caches(image_bytes=0, prefix_bytes=0, overlap=False)
