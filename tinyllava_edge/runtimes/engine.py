"""The on-device engine: one build of a bundle, any number of callers.

    with open_bundle("bundle", build="int8+q4_k_m") as engine:
        print(engine.generate("What is this?", image="cat.jpg").text)
        for piece in engine.generate("And its colour?", image="cat.jpg", stream=True):
            print(piece, end="", flush=True)

Requests wait in a bounded queue and are answered by one thread in order of arrival: a device has one processor to give,
and an answer then is the same whoever else is asking.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

from ..bundle import Bundle, read_bundle
from ..errors import CancelledError, EngineError, QueueFullError, UsageError
from .base import Answer, Picture
from .caches import Caches
from .cancel import Cancel
from .devices import choose_device
from .edge import EdgeRuntime, open_edge, sizes
from .memory import MemorySettings
from .providers import CPU
from .request import Message, Request, ask, converse
from .sampling import Sampling

Job = Callable[[EdgeRuntime, "Generation"], Answer]
# Receives each piece of text, then None: in the engine's thread or that of whoever cancels, so briefly.
Listener = Callable[[str | None], None]
MAX_QUEUE = 32
_SLICE_S = 0.2
_LOG = logging.getLogger("tinyllava_edge.engine")


class Generation:
    """One request on its way: iterate over it for the text as it comes, or wait for the whole answer.

    As a context manager it cancels on leaving, unless it is done.
    """

    def __init__(
        self, listener: Listener | None = None, leave_queue: Callable[[Generation], None] | None = None
    ) -> None:
        self.cancel_switch = Cancel()
        self._listener = listener
        self._leave_queue = leave_queue
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._answer: Answer | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether the answer, or its error, is there."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Stop it within one token; `result` then raises CancelledError. Nothing happens if it is done."""
        self.cancel_switch.throw()
        if self._leave_queue is not None:
            self._leave_queue(self)

    def __iter__(self) -> Iterator[str]:
        """Pieces of the text as soon as they are certain; raises what `result` raises. For one reader."""
        while True:
            try:
                piece = self._pieces.get(timeout=_SLICE_S)
            except queue.Empty:  # looked up now and then, because some systems let Ctrl-C wait for an untimed wait
                continue
            if piece is None:
                break
            yield piece
        self._pieces.put(None)  # a second reader finds the end, too
        self.result()

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer.

        Raises:
            TimeoutError: it is not there after `timeout` seconds; it goes on.
            CancelledError: it was cancelled.
            What EdgeRuntime.run raises.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self._done.wait(min(_SLICE_S, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no answer after {timeout} s")
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the error's frame would hold us, and we the error
        if self._answer is None:
            raise EngineError("the request ended without an answer")
        return self._answer

    def put(self, piece: str) -> None:
        """Hand over a piece of text; the engine's side."""
        if self._listener is None:
            self._pieces.put(piece)
        else:
            self._listener(piece)

    def finish(self, answer: Answer | None, error: BaseException | None = None) -> None:
        """Hand over the end; the engine's side."""
        self._answer, self._error = answer, error
        self._done.set()
        self._pieces.put(None)
        if self._listener is not None:
            try:
                self._listener(None)
            except Exception:  # a listener's failure is not the engine's
                _LOG.exception("a listener failed")

    def __enter__(self) -> Generation:
        """The generation itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel it, unless it is done."""
        self.cancel()


@dataclass(frozen=True)
class _Waiting:
    job: Job
    generation: Generation
    counted: int
    since: float


class Engine:
    """Answers requests to one build in order of arrival. Every method may be called from any thread."""

    def __init__(self, runtime: EdgeRuntime, name: str, max_queue: int = MAX_QUEUE) -> None:
        self.name = name
        self.build, self.spec, self.n_ctx = runtime.build, runtime.spec, runtime.n_ctx
        self._runtime = runtime
        self._max_queue = max_queue
        self._jobs: deque[_Waiting] = deque()
        self._running: Generation | None = None
        self._state = threading.Condition()
        self._closing = False
        self._counts = {"answered": 0, "failed": 0, "cancelled": 0, "refused": 0}
        self._tokens = {"prompt": 0, "image": 0, "cached": 0, "generated": 0}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @overload
    def generate(
        self,
        messages: str | Sequence[Message],
        *,
        image: Picture | Sequence[Picture] | None = None,
        stream: Literal[False] = False,
        max_tokens: int = 128,
        stop: str | Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
    ) -> Answer: ...
    @overload
    def generate(
        self,
        messages: str | Sequence[Message],
        *,
        image: Picture | Sequence[Picture] | None = None,
        stream: Literal[True],
        max_tokens: int = 128,
        stop: str | Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
    ) -> Generation: ...
    def generate(
        self,
        messages: str | Sequence[Message],
        *,
        image: Picture | Sequence[Picture] | None = None,
        stream: bool = False,
        max_tokens: int = 128,
        stop: str | Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
    ) -> Answer | Generation:
        """Answer a question or continue a conversation.

        Args:
            messages: a question, or a list of messages as `request.converse` takes them.
            image: picture or pictures that a question is about; messages carry their own.
            stream: return a Generation at once instead of waiting for the answer.
            max_tokens: most tokens to generate.
            stop: one or several strings; the answer ends before the first of them.
            temperature: 0 takes the most likely token, above it tokens are drawn.
            top_p: draw among the most likely tokens whose probabilities reach this sum.
            top_k: draw among this many most likely tokens; 0 is no limit.
            seed: of the draws; None takes a fresh one.
            grammar: GBNF that the answer must follow.
            json_schema: JSON schema that the answer must follow.

        Raises:
            QueueFullError: too many requests wait.
            UsageError: a setting or a message is off; the rest is what EdgeRuntime.run raises.
        """
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "stop": (stop,) if isinstance(stop, str) else tuple(stop or ()),
            "sampling": Sampling(temperature, top_p, top_k, seed),
            "grammar": grammar,
            "json_schema": json_schema,
        }
        if not isinstance(messages, str) and image is not None:
            raise UsageError("`image` goes with a question", "put pictures of a conversation into its messages")
        request = ask(messages, image, **options) if isinstance(messages, str) else converse(messages, **options)
        return self.submit(request) if stream else self.answer(request)

    def answer(self, request: Request) -> Answer:
        """Queue a request and wait for its answer; whatever interrupts the wait (Ctrl-C, say) cancels it."""
        return wait(self.submit(request))

    def submit(self, request: Request, listener: Listener | None = None) -> Generation:
        """Queue a request and return at once.

        Args:
            request: what to answer.
            listener: receives the pieces of text, and None at the end, instead of whoever iterates.

        Raises:
            QueueFullError: too many requests wait.
            EngineError: the engine is closing.
        """

        def job(runtime: EdgeRuntime, generation: Generation) -> Answer:
            return runtime.run(request, on_text=generation.put, cancel=generation.cancel_switch)

        return self._submit(job, listener)

    def answer_many(self, image: Picture, questions: Sequence[str], *, max_tokens: int = 16) -> list[Answer]:
        """Independent greedy answers to several questions on one picture, side by side in one context."""
        found: list[Answer] = []

        def job(runtime: EdgeRuntime, generation: Generation) -> Answer:
            found.extend(runtime.answer_many(image, questions, max_tokens=max_tokens, cancel=generation.cancel_switch))
            return found[0]

        if questions:
            wait(self._submit(job, counted=len(questions)))
        return found

    def warm_up(self) -> None:
        """Load what is loaded lazily and run every part once, the vision graph included."""

        def job(runtime: EdgeRuntime, generation: Generation) -> Answer:
            generation.cancel_switch.check()
            return runtime.warm_up()

        wait(self._submit(job, counted=0))

    def environment(self) -> dict[str, Any]:
        """Versions, what really runs where, threads, hashes: JSON values."""
        return self._runtime.environment()

    def stats(self) -> dict[str, Any]:
        """Counts since the start: requests by outcome, tokens, cache use; and how many wait now."""
        with self._state:
            waiting, running = len(self._jobs), self._running is not None
            counts, tokens = dict(self._counts), dict(self._tokens)
        caches = self._runtime.cache_stats()
        return {"requests": counts, "tokens": tokens, "waiting": waiting, "running": running, "caches": caches}

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that are here go on for `drain_s` seconds, cancel the rest, free memory."""
        deadline = time.monotonic() + drain_s
        with self._state:
            self._closing = True
            while (self._jobs or self._running) and (left := deadline - time.monotonic()) > 0:
                self._state.wait(left)
            left_over = [waiting.generation for waiting in self._jobs]
            if self._running is not None:
                left_over.append(self._running)
            self._state.notify_all()
        for generation in left_over:
            generation.cancel()
        self._thread.join()
        self._runtime.close()

    def __enter__(self) -> Engine:
        """The engine itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def _submit(self, job: Job, listener: Listener | None = None, *, counted: int = 1) -> Generation:
        generation = Generation(listener, self._leave)
        with self._state:
            if self._closing:
                raise EngineError("the engine is closed", "open the bundle again")
            if len(self._jobs) >= self._max_queue:
                self._counts["refused"] += 1
                raise QueueFullError(
                    f"{len(self._jobs)} requests are waiting already", "try again in a moment, or raise max_queue"
                )
            self._jobs.append(_Waiting(job, generation, counted, time.perf_counter()))
            self._state.notify_all()
        return generation

    def _leave(self, generation: Generation) -> None:
        """A request that is cancelled while it waits gives its place back at once."""
        with self._state:
            found = next((waiting for waiting in self._jobs if waiting.generation is generation), None)
            if found is None:
                return
            self._jobs.remove(found)
            self._counts["cancelled"] += found.counted
            self._state.notify_all()
        generation.finish(None, CancelledError("the request was cancelled"))

    def _work(self) -> None:
        while True:
            with self._state:
                while not self._jobs and not self._closing:
                    self._state.wait()
                if not self._jobs:
                    return
                waiting = self._jobs.popleft()
                self._running = waiting.generation
            self._answer(waiting)
            del waiting  # an idle engine keeps no pictures
            with self._state:
                self._running = None
                self._state.notify_all()

    def _answer(self, waiting: _Waiting) -> None:
        answer: Answer | None = None
        failure: BaseException | None = None
        queue_ms = 1000 * (time.perf_counter() - waiting.since)
        try:
            answer = waiting.job(self._runtime, waiting.generation)
            answer = replace(answer, timings=replace(answer.timings, queue_ms=queue_ms))
        except BaseException as error:  # whatever it is, it is the caller's; the thread goes on
            let_go(error)
            failure = error
        outcome = "answered" if answer else "cancelled" if isinstance(failure, CancelledError) else "failed"
        with self._state:
            self._counts[outcome] += waiting.counted
            if answer is not None and waiting.counted:
                self._tokens["prompt"] += answer.n_prompt_tokens
                self._tokens["image"] += answer.n_image_tokens
                self._tokens["cached"] += answer.n_cached_tokens
                self._tokens["generated"] += len(answer.token_ids)
        waiting.generation.finish(answer, failure)
        del waiting, failure  # the error's traceback holds this frame


def let_go(error: BaseException | None) -> None:
    """Empty the frames of an error and of what caused it: their variables would keep pictures in memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def wait(generation: Generation) -> Answer:
    """The whole answer; whatever interrupts the wait (Ctrl-C, say) cancels the request."""
    try:
        return generation.result()
    finally:
        generation.cancel()
        del generation  # an error's traceback holds this frame


def open_bundle(
    path: str | Path | Bundle,
    build: str | None = None,
    *,
    device: str = "cpu",
    n_gpu_layers: int | None = None,
    n_threads: int | None = None,
    n_ctx: int | None = None,
    max_queue: int = MAX_QUEUE,
    caches: Caches | None = None,
    allow_unverified: bool = False,
    check_hashes: bool = True,
    check_memory: bool = True,
    flash_attention: bool = False,
    type_k: str | None = None,
    type_v: str | None = None,
) -> Engine:
    """Open one build of a bundle for answering; its vision graph is loaded with the first picture.

    Args:
        path: directory, or a bundle that was read.
        build: name such as `int8+q4_k_m`; the bundle's first build by default.
        device: `cpu`; `cuda`, an error unless both engines run on it; `auto`, the best that each engine has.
        n_gpu_layers: layers of the language model on a GPU; all of them by default where the device has one.
        n_threads: CPU threads of both engines; the cores this process may use by default.
        n_ctx: positions that fit; min(the model's max_length, 2048) by default.
        max_queue: requests that may wait; one more is refused.
        caches: bounds of the image-embedding cache and of saved KV prefixes.
        allow_unverified: run a build without a `verified` stamp; recorded in `environment()`.
        check_hashes: compare the files' SHA-256 first; without it, image embeddings are not kept on disk.
        check_memory: refuse a build that needs more than this process may have; not looked at where a GPU takes part.
        flash_attention: llama.cpp's fused attention, see `Llama`.
        type_k: type of the cached keys, see kv_cache.KV_TYPES.
        type_v: type of the cached values; a quantised one needs flash attention.

    Raises:
        MemoryLimitError: the build needs more memory than this process may have; the message says what would fit.
        What `open_edge` raises.
    """
    if max_queue < 1:
        raise UsageError(f"max_queue={max_queue}", "let at least one request wait")
    bundle = path if isinstance(path, Bundle) else read_bundle(path)
    plan = choose_device(device, n_gpu_layers)
    kept = caches or Caches()
    if not check_hashes:
        kept = replace(kept, image_dir=None)  # its keys are the manifest's hashes
    threads, context = sizes(bundle.spec, n_threads, n_ctx)
    memory = None
    if check_memory and plan.n_gpu_layers == 0 and list(plan.providers) == [CPU]:
        memory = MemorySettings(
            context, type_k, type_v, flash_attention, n_threads=threads, caches_bytes=kept.bytes, lazy=True
        )
    runtime = open_edge(
        bundle,
        build,
        n_threads=threads,
        n_ctx=context,
        allow_unverified=allow_unverified,
        check_hashes=check_hashes,
        plan=plan,
        flash_attention=flash_attention,
        type_k=type_k,
        type_v=type_v,
        caches=kept,
        memory=memory,
        lazy=True,
    )
    return Engine(runtime, bundle.name, max_queue)
