"""The device runtime: ONNX Runtime turns the picture into embeddings, llama.cpp answers; no torch, no transformers.

A prompt is a few decoder calls: tokens before a picture, its embeddings (`llama_batch.embd`), tokens after it. What the
KV cache holds of an earlier prompt is not computed again, and pictures are encoded while text is decoded.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..bundle import MANIFEST, Build, Bundle, read_bundle
from ..errors import BundleError, EngineError, UsageError
from ..prompt import Turn, get_template
from ..spec import ModelSpec
from .base import IMAGE_PLACE, Answer, OnText, Picture, Probe
from .batch import decode_group, pack
from .caches import NO_CACHES, Caches
from .cancel import Cancel
from .constrain import Constraint, from_gbnf, from_json_schema
from .constrain import Vocabulary as GrammarVocabulary
from .decoding import Chooser, Decoding
from .devices import ON_CPU, DevicePlan, backend_truth
from .encoder import Opened, PictureEncoder
from .headers import gguf_shards
from .llama import Llama
from .memory import MemorySettings, preflight
from .picture import read_picture
from .prefix_cache import PrefixCache
from .request import Request, as_pictures, ask
from .sampling import GREEDY, Sampler, Sampling
from .spans import Span, position_keys, spans
from .stopwatch import Stopwatch
from .text import (
    TextStream,
    check_max_tokens,
    conversation_ids,
    count_positions,
    default_context,
    gguf_vocabulary,
    prompt_ids,
    split_at_image,
)
from .vision import Vision

Floats = npt.NDArray[np.float32]


class EdgeRuntime:
    """One build of a bundle, loaded. Answers take turns: calls from several threads wait for each other."""

    name = "edge"
    pictures_at_once = 1

    def __init__(
        self,
        bundle: Bundle,
        build: Build,
        vision: Vision,
        llama: Llama,
        plan: DevicePlan,
        caches: Caches,
        facts: dict[str, Any],
        load_ms: float,
    ) -> None:
        self.build = build.name
        self.spec = bundle.spec
        self.n_ctx = llama.n_ctx
        self._vision, self._llama, self._plan = vision, llama, plan
        self._template = get_template(self.spec.template)
        end = self._template.end_of_turn
        stop = llama.special_id(end) if end else llama.eos
        self._vocabulary = gguf_vocabulary(llama.tokenize, llama.header, llama.bos, stop, llama.eos)
        self._encoder = PictureEncoder(vision, self.spec, caches.embeddings(), build)
        self._prefix = PrefixCache(llama, caches.prefix_bytes)
        self._decoding = Decoding(llama, self._prefix)
        self._overlap = caches.overlap
        self._tokens: GrammarVocabulary | None = None
        self._facts = facts
        self._load_ms = load_ms
        self._lock = threading.RLock()

    @property
    def vision(self) -> Vision:
        """The build's graphs, for `verify`, which feeds them one by one."""
        return self._vision

    @property
    def llama(self) -> Llama:
        """The build's decoder, likewise."""
        return self._llama

    def answer(
        self,
        image: Picture | None,
        question: str,
        *,
        max_tokens: int = 128,
        on_text: OnText | None = None,
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """Answer one question, about a picture or without one; see `run` for what is raised.

        Args:
            image: a path, a file's bytes, RGB uint8 (height, width, 3), or None.
            question: plain text; special-token strings in it stay plain text.
            max_tokens: most tokens to generate.
            on_text: receives each piece of text as soon as it is certain; the pieces joined are the answer's text.
            sampling: how tokens are chosen; greedy by default.
        """
        return self.run(ask(question, image, max_tokens=max_tokens, sampling=sampling), on_text=on_text)

    def chat(
        self,
        image: Picture | None,
        turns: Sequence[Turn],
        *,
        max_tokens: int = 128,
        on_text: OnText | None = None,
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """Answer a conversation's open last turn; the picture belongs to its first turn. Raises what `run` does."""
        pictures = as_pictures(image)
        placed = tuple(replace(turn, images=0 if n else len(pictures)) for n, turn in enumerate(turns))
        return self.run(Request(placed, pictures, max_tokens=max_tokens, sampling=sampling), on_text=on_text)

    def run(self, request: Request, *, on_text: OnText | None = None, cancel: Cancel | None = None) -> Answer:
        """Make one answer.

        Args:
            request: the conversation and how to answer it.
            on_text: receives each piece of text as soon as it is certain; the pieces joined are the answer's text.
            cancel: a switch that stops the answer within one token, wherever it is.

        Raises:
            UsageError: an empty question, a setting out of range, a grammar that llama.cpp can't read.
            ContextError: the prompt doesn't fit in n_ctx.
            ImageError: a picture can't be used.
            CancelledError: `cancel` was thrown.
            EngineError: ONNX Runtime or llama.cpp refused.
        """
        switch = cancel or Cancel()
        with self._lock:
            try:
                with switch.tells(self._llama.abort):
                    return self._run(request, on_text, switch)
            except BaseException:
                self._encoder.drop()
                self._llama.resume()
                self._prefix.cut()
                raise
            finally:
                self._llama.resume()

    def _run(self, request: Request, on_text: OnText | None, cancel: Cancel) -> Answer:
        watch = Stopwatch()
        with watch.stage("prefill_ms", "text_prefill_ms"):
            template = self._template if request.system is None else replace(self._template, system=request.system)
            ids = conversation_ids(request.turns, template, self._vocabulary)
        if ids.count(IMAGE_PLACE) != len(request.pictures):  # a captioning template always has one
            raise UsageError("this model describes one picture", "pass one picture, e.g. with --image")
        n_prompt = count_positions(ids, self.spec, self.n_ctx)
        chooser = self._chooser(request)
        with watch.stage("decode_image_ms"):
            pictures = [self._encoder.open(picture) for picture in request.pictures]
        stretches = spans(ids, self.spec.visual_tokens, self._vocabulary.end_of_turn)
        keys = position_keys(stretches, [picture.key for picture in pictures])
        n_cached = self._prefix.reuse(keys, [span.start for span in stretches])
        left = [span for span in stretches if span.end > n_cached]
        embeddings = self._embeddings(left, pictures, watch, cancel)
        logits = self._decoding.prefill(left, n_cached, keys, embeddings, watch, cancel)
        stops = self._vocabulary.stops
        found = self._decoding.generate(n_prompt, logits, request, chooser, stops, on_text, watch, cancel)
        new, finish, text, stopped = found
        watch.add("load_ms", self._take_load_ms())
        n_image = ids.count(IMAGE_PLACE) * self.spec.visual_tokens
        steps = tuple(watch.token_ms)
        return Answer(text, tuple(new), finish, n_prompt, n_image, watch.timings(), n_cached, stopped, token_ms=steps)

    def answer_many(
        self, image: Picture, questions: Sequence[str], *, max_tokens: int = 16, cancel: Cancel | None = None
    ) -> list[Answer]:
        """Independent greedy answers to several questions on one picture.

        The system prompt and the picture are decoded once; up to 15 questions then share those cells and are decoded
        side by side. Answers equal single ones unless two tokens' logits differ by less than rounding: a batch adds up
        in another order. Timings are of the whole call and stand on the first answer; the others' are zero.

        Raises:
            What `run` raises, before anything is computed where the cause is a question.
        """
        check_max_tokens(max_tokens)
        if self._template.caption_only:  # the question is dropped, so there is nothing to batch
            return [self.answer(image, question, max_tokens=max_tokens) for question in questions]
        if not questions:
            return []
        with self._lock:
            watch, switch = Stopwatch(), cancel or Cancel()
            with watch.stage("prefill_ms", "text_prefill_ms"):
                prompts = [prompt_ids(q, self._template, self._vocabulary, has_image=True) for q in questions]
            for ids in prompts:
                count_positions(ids, self.spec, self.n_ctx)
            try:
                with switch.tells(self._llama.abort):
                    return self._answer_many(image, prompts, max_tokens, watch, switch)
            finally:
                self._llama.resume()
                self._prefix.forget()  # these sequences are not the prefix cache's

    def _answer_many(
        self, image: Picture, prompts: Sequence[Sequence[int]], max_tokens: int, watch: Stopwatch, cancel: Cancel
    ) -> list[Answer]:
        prefix, _ = split_at_image(prompts[0])
        suffixes = [split_at_image(ids)[1] or [] for ids in prompts]
        embeds = self._encoder.embed(self._encoder.open(image), watch, cancel)
        start = len(prefix) + len(embeds)
        with watch.stage("prefill_ms", "text_prefill_ms"):
            self._llama.clear()
            if prefix:
                self._llama.decode_tokens(prefix, range(len(prefix)))
        with watch.stage("prefill_ms", "image_prefill_ms"):
            self._llama.decode_embeddings(embeds, len(prefix))
        sizes = [len(suffix) + max_tokens for suffix in suffixes]
        answers: list[Answer] = []
        for group in pack(sizes, self.n_ctx - start):
            chosen = [suffixes[i] for i in group]
            found = decode_group(self._llama, chosen, start, max_tokens, self._vocabulary.stops, watch)
            for suffix, (new, finish, margins) in zip(chosen, found, strict=True):
                answer = Answer(self._text(new), tuple(new), finish, start + len(suffix), len(embeds))
                answers.append(replace(answer, margins=tuple(margins)))
        watch.last_token()
        watch.add("load_ms", self._take_load_ms())
        return [replace(answers[0], timings=watch.timings()), *answers[1:]]

    def answer_pictures(
        self, items: Iterable[tuple[Picture, Sequence[str]]], *, max_tokens: int = 16
    ) -> Iterator[list[Answer]]:
        """`answer_many` for picture after picture, as they are asked for."""
        for image, questions in items:
            yield self.answer_many(image, questions, max_tokens=max_tokens)

    def probe(self, image: Picture, question: str, *, max_tokens: int = 16) -> Probe:
        """Every stage's output for one picture and question, greedy; no cache is used. Raises what `run` raises."""
        request = ask(question, image, max_tokens=max_tokens)
        with self._lock:
            try:
                watch, cancel = Stopwatch(), Cancel()
                ids = conversation_ids(request.turns, self._template, self._vocabulary)
                n_prompt = count_positions(ids, self.spec, self.n_ctx)
                with watch.stage("decode_image_ms"):
                    rgb = read_picture(image, self.spec)
                with watch.stage("preprocess_ms"):
                    pixels = self._vision.pixel_values(rgb)
                with watch.stage("vision_ms"):
                    embeds, features = self._vision.encode(pixels)
                self._prefix.forget()
                stretches = spans(ids, self.spec.visual_tokens, self._vocabulary.end_of_turn)
                keys = position_keys(stretches, ["picture"])
                logits = self._decoding.prefill(stretches, 0, keys, {0: lambda: embeds}, watch, cancel)
                stops = self._vocabulary.stops
                found = self._decoding.generate(n_prompt, logits, request, Chooser(), stops, None, watch, cancel)
                new, finish, text, _ = found
                answer = Answer(text, tuple(new), finish, n_prompt, len(embeds), watch.timings())
                return Probe(pixels, features, embeds, ids, logits, answer)
            finally:
                self._prefix.forget()

    def warm_up(self) -> Answer:
        """Run the vision graph, a short prefill and a decode step, so that the first answer isn't the slow one."""
        with self._lock:
            watch = Stopwatch()
            self._encoder.load(watch)
            grey = np.full((self.spec.image_size, self.spec.image_size, 3), 127, np.uint8)
            self._vision.embed(self._vision.pixel_values(grey))
            load_ms = self._take_load_ms() + watch.timings().load_ms
            answer = self.answer(grey if self._template.caption_only else None, "Hello", max_tokens=2)
            self._load_ms = load_ms
            return answer

    def environment(self) -> dict[str, Any]:
        """Versions, the providers that really run, threads and the bundle's identity, as JSON values."""
        return {**self._facts, **backend_truth(self._vision, self._llama, self._plan)}

    def cache_stats(self) -> dict[str, dict[str, int]]:
        """Counts of the embedding cache and of the prefix cache."""
        return {"images": self._encoder.stats(), "prefix": self._prefix.stats()}

    def close(self) -> None:
        """Free what llama.cpp holds; a second call does nothing."""
        with self._lock:
            self._encoder.close()
            self._prefix.close()
            self._llama.close()

    def __enter__(self) -> EdgeRuntime:
        """The runtime itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def _embeddings(
        self, left: Sequence[Span], pictures: Sequence[Opened], watch: Stopwatch, cancel: Cancel
    ) -> dict[int, Callable[[], Floats]]:
        """Number of each picture that must be computed → its embeddings, waited for when they are asked for.

        Where there is something else to compute meanwhile, pictures are encoded in a thread of their own.
        """
        needed = [span.picture for span in left if span.picture is not None]
        if self._overlap and needed and (left[0].picture is None or len(needed) > 1):
            futures = self._encoder.start([pictures[n] for n in needed], watch, cancel)
            return {n: future.result for n, future in zip(needed, futures, strict=True)}
        return {n: partial(self._encoder.embed, pictures[n], watch, cancel) for n in needed}

    def _chooser(self, request: Request) -> Chooser:
        sampler = Sampler(request.sampling)
        if request.grammar is None and request.json_schema is None:
            return Chooser(sampler)
        if self._tokens is None:
            self._tokens = self._llama.vocabulary(self._vocabulary.stops)
        schema, gbnf = request.json_schema, request.grammar
        grammar = from_json_schema(schema) if schema is not None else from_gbnf(gbnf or "")
        return Chooser(sampler, Constraint(self._tokens, grammar))

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
    plan: DevicePlan = ON_CPU,
    flash_attention: bool = False,
    type_k: str | None = None,
    type_v: str | None = None,
    caches: Caches = NO_CACHES,
    memory: MemorySettings | None = None,
    lazy: bool = False,
) -> EdgeRuntime:
    """Load one build of a bundle.

    Args:
        bundle: directory, or an opened bundle.
        build: name such as `int8+q4_k_m`; the bundle's first build by default.
        n_threads: CPU threads of both engines; the cores this process may use by default.
        n_ctx: positions that fit; min(the model's max_length, 2048) by default.
        allow_unverified: run a build without a `verified` stamp; recorded in `environment()`.
        check_hashes: compare the files' SHA-256 first; otherwise llama.cpp at least looks for NaN in the weights.
        plan: where the engines run, see devices.choose_device.
        flash_attention: llama.cpp's fused attention, see `Llama`.
        type_k: type of the cached keys, e.g. `q8_0`; see kv_cache.KV_TYPES for what goes with what.
        type_v: type of the cached values; a quantised one needs flash attention.
        caches: what is kept between answers; nothing by default, so that every answer is computed whole.
        memory: refuse a build that, opened so, needs more memory than this process may have; None doesn't look.
        lazy: open the vision graph with the first picture.

    Raises:
        BundleError: the bundle is incomplete, changed, or not a bundle.
        UnverifiedError: the build carries no stamp and `allow_unverified` is off.
        UsageError: an unknown build, or a setting out of range.
        MemoryLimitError: it would not fit; the message says what would.
        EngineError: ONNX Runtime or llama.cpp refused, or the files belong to different models.
        DependencyError: onnxruntime isn't installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    chosen = opened.build(build)
    threads, context = sizes(opened.spec, n_threads, n_ctx)
    opened.require_verified(chosen, allow_unverified)
    if check_hashes:
        opened.check(chosen)
    if memory is not None:
        preflight(opened, chosen, memory)
    start = time.perf_counter()
    vision = Vision(
        opened.path(chosen.preprocess),
        opened.path(chosen.vision),
        opened.spec,
        n_threads=threads,
        providers=plan.vision_providers(chosen.vision.precision),
        parts=[Path(part.path).name for part in chosen.vision.parts],
        lazy=lazy,
    )
    llama = Llama(
        opened.path(chosen.llm),
        n_ctx=context,
        n_threads=threads,
        n_gpu_layers=plan.n_gpu_layers,
        flash_attention=flash_attention,
        type_k=type_k,
        type_v=type_v,
        check_tensors=not check_hashes,
    )
    try:
        listed = list(opened.paths(chosen.llm))
        if gguf_shards(llama.path, llama.header) != listed:  # llama.cpp finds shards by name, hashed or not
            raise BundleError(f"{llama.path}: has other shards than {MANIFEST} lists", "export the bundle again")
        if llama.n_embd != opened.spec.embedding_dim:
            raise EngineError(
                f"{llama.path}: takes embeddings of width {llama.n_embd}, {opened.spec.embedding_dim} expected",
                "the GGUF belongs to another model; export the bundle again",
            )
        load_ms = 1000 * (time.perf_counter() - start)
        facts = _facts(opened, chosen, check_hashes)
        return EdgeRuntime(opened, chosen, vision, llama, plan, caches, facts, load_ms)
    except BaseException:
        llama.close()
        raise


def _facts(bundle: Bundle, build: Build, hashes_checked: bool) -> dict[str, Any]:
    return {
        "runtime": EdgeRuntime.name,
        "bundle": bundle.name,
        "bundle_sha256": bundle.sha256,
        "build": build.name,
        "files": {entry.path: entry.sha256 for file in build.files for entry in file.entries},
        "verified": bundle.is_verified(build),
        "hashes_checked": hashes_checked,
        "tinyllava_edge": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def sizes(spec: ModelSpec, n_threads: int | None, n_ctx: int | None) -> tuple[int, int]:
    """Threads and context, with their defaults where None is given. Raises UsageError for one out of range."""
    threads = _cores() if n_threads is None else n_threads
    context = default_context(spec) if n_ctx is None else n_ctx
    for option, value, most in (("n_threads", threads, 1024), ("n_ctx", context, 1 << 20)):
        if not 1 <= value <= most:
            raise UsageError(f"{option}={value} is outside 1..{most}")
    return threads, context


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
