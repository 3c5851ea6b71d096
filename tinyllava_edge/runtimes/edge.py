"""The device runtime: ONNX Runtime turns the picture into embeddings, llama.cpp answers; no torch, no transformers.

A prompt is three decoder calls: tokens before the picture, its embeddings (`llama_batch.embd`), tokens after it.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..bundle import Build, Bundle, open_bundle
from ..errors import EngineError, UsageError
from ..prompt import Turn, get_template
from .base import IMAGE_PLACE, Answer, OnText, Picture, Probe
from .batch import decode_group, pack
from .llama import Llama, llama_facts
from .picture import read_picture
from .sampling import GREEDY, Sampler, Sampling
from .stopwatch import Stopwatch
from .text import (
    TextStream,
    Vocabulary,
    check_max_tokens,
    conversation_ids,
    count_positions,
    default_context,
    prompt_ids,
    split_at_image,
    take,
)
from .vision import CPU, Vision, onnxruntime_version

Floats = npt.NDArray[np.float32]


class EdgeRuntime:
    """One build of a bundle, loaded. Answers take turns: calls from several threads wait for each other."""

    name = "edge"

    def __init__(
        self, bundle: Bundle, build: Build, vision: Vision, llama: Llama, facts: dict[str, Any], load_ms: float
    ) -> None:
        self.build = build.name
        self.spec = bundle.spec
        self.n_ctx = llama.n_ctx
        self._vision, self._llama = vision, llama
        self._template = get_template(self.spec.template)
        end = self._template.end_of_turn
        self._vocabulary = Vocabulary(llama.tokenize, llama.bos, llama.special_id(end) if end else llama.eos, llama.eos)
        self._facts = facts
        self._load_ms = load_ms
        self._lock = threading.RLock()

    def answer(
        self,
        image: Picture | None,
        question: str,
        *,
        max_tokens: int = 128,
        on_text: OnText | None = None,
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """Answer one question, about a picture or without one.

        Args:
            image: a path, a file's bytes, RGB uint8 (height, width, 3), or None.
            question: plain text; special-token strings in it stay plain text.
            max_tokens: most tokens to generate.
            on_text: receives each piece of text as soon as it is certain; the pieces joined are the answer's text.
            sampling: how tokens are chosen; greedy by default.

        Raises:
            UsageError: an empty question or a setting out of range.
            ContextError: the prompt doesn't fit in n_ctx.
            ImageError: the picture can't be used.
            EngineError: ONNX Runtime or llama.cpp refused.
        """
        return self.chat(image, [Turn(question)], max_tokens=max_tokens, on_text=on_text, sampling=sampling)

    def chat(
        self,
        image: Picture | None,
        turns: Sequence[Turn],
        *,
        max_tokens: int = 128,
        on_text: OnText | None = None,
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """Answer a conversation's open last turn; the picture belongs to its first turn. Raises what `answer` does."""
        check_max_tokens(max_tokens)
        with self._lock:
            watch = Stopwatch()
            with watch.stage("prefill_ms"):
                ids = conversation_ids(turns, self._template, self._vocabulary, has_image=image is not None)
            count_positions(ids, self.spec, self.n_ctx)
            embeds = None if image is None else self._embed(image, watch)
            logits = self._prefill(ids, embeds, watch)
            return self._generate(ids, logits, max_tokens, on_text, sampling, watch)

    def answer_many(self, image: Picture, questions: Sequence[str], *, max_tokens: int = 16) -> list[Answer]:
        """Independent greedy answers to several questions on one picture.

        The system prompt and the picture are decoded once; up to 15 questions then share those cells and are decoded
        side by side. Answers equal single ones unless two tokens' logits differ by less than rounding: a batch adds up
        in another order. Timings are of the whole call and stand on the first answer; the others' are zero.

        Raises:
            What `answer` raises, before anything is computed where the cause is a question.
        """
        check_max_tokens(max_tokens)
        if self._template.caption_only:  # the question is dropped, so there is nothing to batch
            return [self.answer(image, question, max_tokens=max_tokens) for question in questions]
        if not questions:
            return []
        with self._lock:
            watch = Stopwatch()
            with watch.stage("prefill_ms"):
                prompts = [prompt_ids(q, self._template, self._vocabulary, has_image=True) for q in questions]
            for ids in prompts:
                count_positions(ids, self.spec, self.n_ctx)
            prefix, _ = split_at_image(prompts[0])
            suffixes = [split_at_image(ids)[1] or [] for ids in prompts]
            embeds = self._embed(image, watch)
            start = len(prefix) + len(embeds)
            with watch.stage("prefill_ms"):
                self._llama.clear()
                if prefix:
                    self._llama.decode_tokens(prefix, range(len(prefix)))
                self._llama.decode_embeddings(embeds, len(prefix))
            sizes = [len(suffix) + max_tokens for suffix in suffixes]
            answers: list[Answer] = []
            for group in pack(sizes, self.n_ctx - start):
                chosen = [suffixes[i] for i in group]
                found = decode_group(self._llama, chosen, start, max_tokens, self._vocabulary.stops, watch)
                for suffix, (new, finish) in zip(chosen, found, strict=True):
                    answers.append(Answer(self._text(new), tuple(new), finish, start + len(suffix), len(embeds)))
            watch.add("load_ms", self._take_load_ms())
            return [replace(answers[0], timings=watch.timings()), *answers[1:]]

    def answer_pictures(
        self, items: Iterable[tuple[Picture, Sequence[str]]], *, max_tokens: int = 16
    ) -> Iterator[list[Answer]]:
        """`answer_many` for picture after picture, as they are asked for."""
        for image, questions in items:
            yield self.answer_many(image, questions, max_tokens=max_tokens)

    def probe(self, image: Picture, question: str, *, max_tokens: int = 16) -> Probe:
        """Every stage's output for one picture and question, greedy. Raises what `answer` raises."""
        check_max_tokens(max_tokens)
        with self._lock:
            watch = Stopwatch()
            ids = prompt_ids(question, self._template, self._vocabulary, has_image=True)
            count_positions(ids, self.spec, self.n_ctx)
            pixels = self._pixels(image, watch)
            with watch.stage("vision_ms"):
                embeds, features = self._vision.encode(pixels)
            logits = self._prefill(ids, embeds, watch)
            answer = self._generate(ids, logits, max_tokens, None, GREEDY, watch)
            return Probe(pixels, features, embeds, ids, logits, answer)

    def warm_up(self) -> None:
        """Run the vision graph, a short prefill and a decode step, so that the first answer isn't the slow one."""
        with self._lock:
            side = self.spec.image_size
            self._vision.embed(self._vision.pixel_values(np.full((side, side, 3), 127, np.uint8)))
            load_ms = self._take_load_ms()
            self.answer(None, "Hello", max_tokens=2)
            self._load_ms = load_ms

    def environment(self) -> dict[str, Any]:
        """Versions, the providers that really run, threads and the bundle's identity, as JSON values."""
        return {**self._facts, "providers": self._vision.providers}

    def close(self) -> None:
        """Free what llama.cpp holds; a second call does nothing."""
        with self._lock:
            self._llama.close()

    def __enter__(self) -> EdgeRuntime:
        """The runtime itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def _pixels(self, image: Picture, watch: Stopwatch) -> Floats:
        with watch.stage("decode_image_ms"):
            rgb = read_picture(image, self.spec)
        with watch.stage("preprocess_ms"):
            return self._vision.pixel_values(rgb)

    def _embed(self, image: Picture, watch: Stopwatch) -> Floats:
        pixels = self._pixels(image, watch)
        with watch.stage("vision_ms"):
            return self._vision.embed(pixels)

    def _prefill(self, ids: Sequence[int], embeds: Floats | None, watch: Stopwatch) -> Floats:
        """The whole prompt through the decoder → logits (vocab,) of its last position."""
        before, after = split_at_image(ids)
        with watch.stage("prefill_ms"):
            self._llama.clear()
            place = 0
            logits: Floats | None = None
            if before:
                logits = self._llama.decode_tokens(
                    before, range(len(before)), wanted=[] if after else [len(before) - 1]
                )
                place = len(before)
            if embeds is not None:
                logits = self._llama.decode_embeddings(embeds, place, wanted=[] if after else [len(embeds) - 1])
                place += len(embeds)
            if after:
                logits = self._llama.decode_tokens(after, range(place, place + len(after)), wanted=[len(after) - 1])
        if logits is None or not len(logits):
            raise EngineError("the prompt is empty")
        last: Floats = logits[0]
        return last

    def _generate(
        self,
        prompt: Sequence[int],
        logits: Floats,
        max_tokens: int,
        on_text: OnText | None,
        sampling: Sampling,
        watch: Stopwatch,
    ) -> Answer:
        sampler, stream, ids = Sampler(sampling), TextStream(on_text), list[int]()
        place = n_prompt = count_positions(prompt, self.spec, self.n_ctx)
        with watch.stage("first_token_ms"):
            token = sampler.pick(logits)
        limit = min(max_tokens, self.n_ctx - n_prompt + 1)
        while not (finish := take(ids, token, limit, self._vocabulary.stops)):
            stream.push(self._llama.piece(token))
            with watch.stage("decode_ms"):
                token = sampler.pick(self._llama.decode_tokens([token], [place], wanted=[0])[0])
            place += 1
        if finish == "length":
            stream.push(self._llama.piece(token))
        n_image = self.spec.visual_tokens if IMAGE_PLACE in prompt else 0
        watch.add("load_ms", self._take_load_ms())
        return Answer(stream.finish(), tuple(ids), finish, n_prompt, n_image, watch.timings())

    def _text(self, ids: Sequence[int]) -> str:
        stream = TextStream()
        for token in ids:
            stream.push(self._llama.piece(token))
        return stream.finish()

    def _take_load_ms(self) -> float:
        load_ms, self._load_ms = self._load_ms, 0.0
        return load_ms


def open_edge(
    bundle: str | Path | Bundle,
    build: str | None = None,
    *,
    n_threads: int | None = None,
    n_ctx: int | None = None,
    allow_unverified: bool = False,
    check_hashes: bool = True,
    providers: Sequence[str] = (CPU,),
    n_gpu_layers: int = 0,
    flash_attention: bool = False,
) -> EdgeRuntime:
    """Load one build of a bundle.

    Args:
        bundle: directory, or an opened bundle.
        build: name such as `int8+q4_k_m`; the bundle's first build by default.
        n_threads: CPU threads of both engines; the cores this process may use by default.
        n_ctx: positions that fit; min(the model's max_length, 2048) by default.
        allow_unverified: run a build without a `verified` stamp; recorded in `environment()`.
        check_hashes: compare the files' SHA-256 first; otherwise llama.cpp at least looks for NaN in the weights.
        providers: ONNX Runtime execution providers of the vision graph.
        n_gpu_layers: decoder layers on a GPU, where llama.cpp was built for one.
        flash_attention: llama.cpp's fused attention, see `Llama`.

    Raises:
        BundleError: the bundle is incomplete, changed, or not a bundle.
        UnverifiedError: the build carries no stamp and `allow_unverified` is off.
        UsageError: an unknown build, or a setting out of range.
        EngineError: ONNX Runtime or llama.cpp refused, or the files belong to different models.
        DependencyError: onnxruntime isn't installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    chosen = opened.build(build)
    threads = n_threads if n_threads is not None else _cores()
    context = n_ctx if n_ctx is not None else default_context(opened.spec)
    for option, value, most in (("n_threads", threads, 1024), ("n_ctx", context, 1 << 20)):
        if not 1 <= value <= most:
            raise UsageError(f"{option}={value} is outside 1..{most}")
    opened.require_verified(chosen, allow_unverified)
    if check_hashes:
        opened.check(chosen)
    start = time.perf_counter()
    vision = Vision(
        opened.path(chosen.preprocess), opened.path(chosen.vision), opened.spec, n_threads=threads, providers=providers
    )
    llama = Llama(
        opened.path(chosen.llm),
        n_ctx=context,
        n_threads=threads,
        n_gpu_layers=n_gpu_layers,
        flash_attention=flash_attention,
        check_tensors=not check_hashes,
    )
    try:
        if llama.n_embd != opened.spec.embedding_dim:
            raise EngineError(
                f"{llama.path}: takes embeddings of width {llama.n_embd}, {opened.spec.embedding_dim} expected",
                "the GGUF belongs to another model; export the bundle again",
            )
        load_ms = 1000 * (time.perf_counter() - start)
        facts = _facts(opened, chosen, check_hashes, llama)
        return EdgeRuntime(opened, chosen, vision, llama, facts, load_ms)
    except BaseException:
        llama.close()
        raise


def _facts(bundle: Bundle, build: Build, hashes_checked: bool, llama: Llama) -> dict[str, Any]:
    return {
        "runtime": EdgeRuntime.name,
        "bundle": bundle.name,
        "bundle_sha256": bundle.sha256,
        "build": build.name,
        "files": {file.path: file.sha256 for file in (build.preprocess, build.vision, build.llm)},
        "verified": bundle.is_verified(build),
        "hashes_checked": hashes_checked,
        **llama.settings,
        "tinyllava_edge": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime_version(),
        **llama_facts(),
    }


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
