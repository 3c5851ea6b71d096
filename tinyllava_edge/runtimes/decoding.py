"""The two halves of an answer on llama.cpp: the prompt through the decoder, then token after token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from .base import OnText
from .cancel import Cancel
from .constrain import Constraint
from .llama import Llama
from .prefix_cache import Key, PrefixCache
from .request import Request
from .sampling import Sampler
from .spans import Span
from .stops import StopStrings
from .stopwatch import Stopwatch
from .text import TextStream, take

Floats = npt.NDArray[np.float32]


class Chooser:
    """Chooses the tokens of one answer: by the sampler, among those that the grammar allows."""

    def __init__(self, sampler: Sampler | None = None, constraint: Constraint | None = None) -> None:
        self._sampler = sampler or Sampler()
        self._constraint = constraint

    def pick(self, logits: Floats) -> int:
        """(vocab,) → token id."""
        if self._constraint is None:
            return self._sampler.pick(logits)
        return self._constraint.pick(logits, self._sampler.pick)


class Decoding:
    """Sequence 0 of a decoder; what it computes is told to the prefix cache."""

    def __init__(self, llama: Llama, prefix: PrefixCache) -> None:
        self._llama, self._prefix = llama, prefix

    def prefill(
        self,
        left: Sequence[Span],
        n_cached: int,
        keys: list[Key],
        embeddings: Mapping[int, Callable[[], Floats]],
        watch: Stopwatch,
        cancel: Cancel,
    ) -> Floats:
        """A prompt's positions that are not in the KV cache yet → logits (vocab,) of its last position.

        Args:
            left: stretches that end after n_cached.
            n_cached: positions that sequence 0 holds.
            keys: what stands at every position of the prompt.
            embeddings: number of a picture → a call that gives its image embeddings (t, d).
            watch: decoding is added to `prefill_ms`, and to `image_prefill_ms` or `text_prefill_ms`.
            cancel: looked at before every stretch; llama.cpp looks inside.
        """
        logits: Floats | None = None
        waits = bool(self._llama.settings["gpu"])  # a GPU computes on until logits are asked for
        for span in left:
            skip = max(0, n_cached - span.start)
            wanted = [span.length - skip - 1] if waits or span.end == len(keys) else []
            embeds = None if span.picture is None else embeddings[span.picture]()
            cancel.check()
            with watch.stage("prefill_ms", "text_prefill_ms" if embeds is None else "image_prefill_ms"):
                if embeds is None:
                    places = range(span.start + skip, span.end)
                    logits = self._llama.decode_tokens(span.tokens[skip:], places, wanted=wanted)
                else:
                    logits = self._llama.decode_embeddings(embeds[skip:], span.start + skip, wanted=wanted)
            self._prefix.hold(keys[span.start + skip : span.end])
        if logits is None or not len(logits):
            raise EngineError("the prompt is empty")
        last: Floats = logits[0]
        return last

    def generate(
        self,
        n_prompt: int,
        logits: Floats,
        request: Request,
        chooser: Chooser,
        stops: Collection[int],
        on_text: OnText | None,
        watch: Stopwatch,
        cancel: Cancel,
    ) -> tuple[list[int], str, str, bool]:
        """The answer after a prompt of n_prompt positions, up to one of the ids `stops` or a text of `request.stop`.

        Returns:
            Ids without the end token, finish reason, text, and whether a stop string ended it.
        """
        ids, stream = list[int](), TextStream(on_text, StopStrings(request.stop) if request.stop else None)
        place = n_prompt
        with watch.stage("first_token_ms"):
            token = chooser.pick(logits)
        watch.first_token()
        limit = min(request.max_tokens, self._llama.n_ctx - n_prompt + 1)
        while not (finish := take(ids, token, limit, stops)):
            stream.push(self._llama.piece(token))
            if stream.stopped:
                break
            cancel.check()
            start = time.perf_counter()
            logits = self._llama.decode_tokens([token], [place], wanted=[0])[0]
            self._prefix.hold([token])
            token = chooser.pick(logits)
            watch.token(1000 * (time.perf_counter() - start))
            place += 1
        if finish == "length":
            stream.push(self._llama.piece(token))
        text = stream.finish()
        watch.last_token()
        return ids, "stop" if stream.stopped else finish, text, stream.stopped
