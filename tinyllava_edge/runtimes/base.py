"""What every runtime gives: an answer with its stage timings and counts, and a probe that `verify` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..spec import ModelSpec

Picture = str | Path | bytes | npt.NDArray[np.uint8]  # a path, a file's bytes, or RGB (height, width, 3)
OnText = Callable[[str], None]


@dataclass(frozen=True)
class StageTimings:
    """Milliseconds of one answer, each measured directly; a stage that did not run is 0."""

    load_ms: float = 0.0
    """opening the graphs and the GGUF; counted in the first answer only"""
    queue_ms: float = 0.0
    """waiting for requests that came earlier"""
    decode_image_ms: float = 0.0
    """file bytes → RGB"""
    preprocess_ms: float = 0.0
    """RGB → pixel_values"""
    vision_ms: float = 0.0
    """pixel_values → image embeddings"""
    prefill_ms: float = 0.0
    """the whole prompt, image embeddings included, through the decoder; tokenising it counts, too"""
    image_prefill_ms: float = 0.0
    """of it: the image embeddings; 0 where one call takes the whole prompt"""
    text_prefill_ms: float = 0.0
    """of it: the text; 0 where one call takes the whole prompt"""
    first_token_ms: float = 0.0
    """sampling the first token from the prefill's logits"""
    decode_ms: float = 0.0
    """tokens 2..n"""
    clock_ms: float = 0.0
    """first token by the clock, from the request's start on; stages overlap, so it may be less than their sum; 0 where
    stages follow each other"""
    total_ms: float = 0.0
    """the whole answer by the clock, from the request's start to its last token; loading and the queue left out"""

    @property
    def ttft_ms(self) -> float:
        """Time to first token with everything loaded: image decoding to the first token; the queue is not counted."""
        stages = self.decode_image_ms + self.preprocess_ms + self.vision_ms + self.prefill_ms + self.first_token_ms
        return self.clock_ms or stages

    def to_dict(self) -> dict[str, float]:
        """Stage name → milliseconds, `ttft_ms` included."""
        stages = {name: value for name, value in vars(self).items() if name != "clock_ms"}
        return {**stages, "ttft_ms": self.ttft_ms}


@dataclass(frozen=True)
class Answer:
    """What a runtime says, and what it took."""

    text: str
    """decoded text without special tokens, stripped"""
    token_ids: tuple[int, ...]
    """generated ids, the end token excluded"""
    finish_reason: str
    """`stop` (end-of-turn token or a stop string) or `length` (max_tokens or the context's end)"""
    n_prompt_tokens: int
    """prompt positions, image embeddings included"""
    n_image_tokens: int
    """image embeddings among them"""
    timings: StageTimings = field(default_factory=StageTimings)
    """stage timings"""
    n_cached_tokens: int = 0
    """prompt positions that the KV cache held already"""
    stop_string: bool = False
    """whether the answer ended before a stop string; its tokens are among `token_ids`"""
    margins: tuple[float, ...] = ()
    """logit of the chosen token minus the next best one's at each decoding step, the end token's step included; only
    where several questions were answered together"""
    token_ms: tuple[float, ...] = ()
    """milliseconds of each decoding step, the end token's included; none where questions are decoded together"""

    @property
    def ended_by_token(self) -> bool:
        """Whether the model ended the answer, which took a decoding step that gave no token."""
        return self.finish_reason == "stop" and not self.stop_string

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Rate of tokens 2..n (the end token's step included); None when none was decoded."""
        steps = len(self.token_ids) - 1 + (1 if self.ended_by_token else 0)
        return 1000 * steps / self.timings.decode_ms if steps > 0 and self.timings.decode_ms > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values: text, counts, finish reason, stage timings in milliseconds, decode rate in tokens per second."""
        return {
            "answer": self.text,
            "finish_reason": self.finish_reason,
            "n_prompt_tokens": self.n_prompt_tokens,
            "n_image_tokens": self.n_image_tokens,
            "n_cached_tokens": self.n_cached_tokens,
            "n_generated_tokens": len(self.token_ids),
            "timings_ms": self.timings.to_dict(),
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


@dataclass(frozen=True)
class Probe:
    """What each stage produced for one picture and one question, for `verify`."""

    pixel_values: npt.NDArray[np.float32]
    """(3, S, S)"""
    image_features: npt.NDArray[np.float32]
    """(T, V): selected tower features, before the connector"""
    image_embeds: npt.NDArray[np.float32]
    """(T, D): after the connector"""
    prompt_ids: tuple[int, ...]
    """ids of the text pieces in order; the image's place is marked by one -200"""
    first_logits: npt.NDArray[np.float32]
    """(vocab,): logits after the whole prompt"""
    answer: Answer
    """greedy answer"""


IMAGE_PLACE = -200  # upstream's marker of the picture's place among the ids


class Runtime(Protocol):
    """An adapter that opens a bundle's build or a checkpoint and answers."""

    name: str
    """`edge` or `reference`"""
    build: str
    """build name, or the checkpoint's precision"""
    spec: ModelSpec
    """how the model is fed"""
    pictures_at_once: int
    """pictures that `answer_pictures` computes together; an answer's last bits depend on which"""

    def answer(
        self, image: Picture | None, question: str, *, max_tokens: int = 128, on_text: OnText | None = None
    ) -> Answer:
        """Greedy answer to one question; `on_text` receives each new piece of text as it is decoded."""
        ...

    def answer_many(self, image: Picture, questions: Sequence[str], *, max_tokens: int = 16) -> list[Answer]:
        """Independent greedy answers to several questions on one picture; the shared prefix is computed once."""
        ...

    def answer_pictures(
        self, items: Iterable[tuple[Picture, Sequence[str]]], *, max_tokens: int = 16
    ) -> Iterator[list[Answer]]:
        """`answer_many` for picture after picture, in order; a runtime may compute several pictures together."""
        ...

    def probe(self, image: Picture, question: str, *, max_tokens: int = 16) -> Probe:
        """Every stage's output for one picture and question."""
        ...

    def environment(self) -> dict[str, Any]:
        """Versions, providers that really run, threads: JSON values stored with every result."""
        ...

    def close(self) -> None:
        """Free what native code holds."""
        ...
