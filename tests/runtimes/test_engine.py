"""The engine that many callers share: same answers as alone, a bounded queue, cancelling, closing."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import tinyllava_edge
from tinyllava_edge.errors import CancelledError, EngineError, MemoryLimitError, QueueFullError, UsageError
from tinyllava_edge.runtimes import memory, memory_limit
from tinyllava_edge.runtimes.edge import EdgeRuntime
from tinyllava_edge.runtimes.engine import Engine, Generation, open_bundle
from tinyllava_edge.runtimes.request import ask

from .conftest import QUESTIONS, Pair, picture


def open_engine(pair: Pair, **options: Any) -> Engine:
    return open_bundle(pair.bundle, "fp32+f32", allow_unverified=True, n_threads=1, **options)


@pytest.fixture(scope="module")
def engine(siglip: Pair) -> Iterator[Engine]:
    with open_engine(siglip) as opened:
        yield opened


def test_the_package_offers_it() -> None:
    assert tinyllava_edge.open_bundle is open_bundle
    with pytest.raises(AttributeError, match="no attribute"):
        _ = tinyllava_edge.open_nothing


def test_many_callers_get_what_one_gets(engine: Engine, edge: EdgeRuntime) -> None:
    """Eight threads, three pictures: every answer is the lone caller's."""
    wanted = {
        (seed, question): edge.answer(picture(seed), question, max_tokens=6).text
        for seed in range(3)
        for question in QUESTIONS[:4]
    }
    wrong: list[Any] = []

    def call(number: int) -> None:
        for step in range(6):
            seed, question = (number + step) % 3, QUESTIONS[(number * step) % 4]
            found = engine.generate(question, image=picture(seed), max_tokens=6).text
            if found != wanted[seed, question]:
                wrong.append((seed, question, found))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and engine.stats()["requests"]["answered"] >= 48


def test_stream_and_conversation(engine: Engine, edge: EdgeRuntime) -> None:
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what?"}]
    generation = engine.generate([{"role": "user", "content": content}], stream=True, max_tokens=20)
    assert isinstance(generation, Generation)
    pieces = list(generation)
    answer = generation.result()
    assert "".join(pieces) == answer.text == edge.answer(picture(1), "what?", max_tokens=20).text and len(pieces) > 3
    assert generation.done and answer.timings.queue_ms >= 0 and answer.timings.ttft_ms > 0
    with pytest.raises(UsageError, match="goes with a question"):
        engine.generate([{"role": "user", "content": "x"}], image=picture(1))


def test_stop_strings(engine: Engine) -> None:
    whole = engine.generate("what?", image=picture(1), max_tokens=40)
    word = whole.text[len(whole.text) // 2 :][:3]
    cut = engine.generate("what?", image=picture(1), max_tokens=40, stop=word)
    assert cut.text == whole.text.split(word)[0].rstrip() and cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)


def test_sampling_is_repeatable(engine: Engine) -> None:
    def draw(seed: int) -> str:
        return engine.generate("what?", temperature=2.0, top_p=0.9, top_k=50, seed=seed, max_tokens=12).text

    assert draw(1) == draw(1) and len({draw(seed) for seed in range(4)}) > 1


def test_cancelling(engine: Engine) -> None:
    """While it decodes, and while it waits; the next answer is whole."""
    before = engine.generate("what?", image=picture(2), max_tokens=8)
    long = engine.generate("what?", image=picture(2), max_tokens=1500, stream=True)
    waiting = engine.generate("why?", image=picture(2), max_tokens=1500, stream=True)
    assert next(iter(long))
    waiting.cancel()
    long.cancel()
    for generation in (long, waiting):
        with pytest.raises(CancelledError):
            generation.result(timeout=20)
    assert engine.generate("what?", image=picture(2), max_tokens=8).text == before.text
    assert engine.stats()["requests"]["cancelled"] >= 2
    with engine.generate("what?", max_tokens=1500, stream=True) as left_early:
        pass
    with pytest.raises(CancelledError):
        left_early.result(timeout=20)


def test_cancelling_during_prefill(siglip: Pair) -> None:
    """A prompt of 2,000 positions takes a while; llama.cpp is stopped inside it."""
    with open_engine(siglip, n_ctx=2048) as fresh:
        question = "red circle " * 900
        start = time.perf_counter()
        fresh.generate(question, max_tokens=1)
        whole = time.perf_counter() - start
        generation = fresh.submit(ask("blue " + question, max_tokens=1))
        time.sleep(whole / 4)
        assert not generation.done
        start = time.perf_counter()
        generation.cancel()
        with pytest.raises(CancelledError):
            generation.result(timeout=20)
        assert time.perf_counter() - start < whole / 2
        assert fresh.generate("blue?", max_tokens=4).text == fresh.generate("blue?", max_tokens=4).text


def test_a_full_queue_refuses(siglip: Pair) -> None:
    with open_engine(siglip, max_queue=2) as small:
        running = small.generate("what?", max_tokens=1500, stream=True)
        assert next(iter(running))
        waiting = [small.submit(ask("what?", max_tokens=2)) for _ in range(2)]
        assert small.stats()["waiting"] == 2 and small.stats()["running"]
        with pytest.raises(QueueFullError, match="2 requests"):
            small.generate("what?")
        waiting[0].cancel()  # its place is free at once
        assert waiting[0].done and small.stats()["waiting"] == 1
        waiting[0] = small.submit(ask("what?", max_tokens=2))
        running.cancel()
        assert [len(generation.result(timeout=20).token_ids) for generation in waiting] == [2, 2]
        assert small.stats()["requests"]["refused"] == 1
    with pytest.raises(UsageError):
        open_engine(siglip, max_queue=0)


def test_errors_belong_to_their_caller(engine: Engine) -> None:
    with pytest.raises(UsageError, match="empty"):
        engine.generate("  ")
    with pytest.raises(EngineError, match="n_ctx"):
        engine.generate("why " * 5000)
    broken = engine.generate("what?", image=b"no picture", stream=True)
    with pytest.raises(Exception, match="picture"):
        list(broken)
    assert engine.generate("what?", max_tokens=2).token_ids


def test_text_alone_never_opens_the_vision_graph(siglip: Pair) -> None:
    with open_engine(siglip) as fresh:
        fresh.generate("what?", max_tokens=2)
        assert fresh.environment()["providers"] == []
        first = fresh.generate("what?", image=picture(1), max_tokens=2)
        assert fresh.environment()["providers"] == ["CPUExecutionProvider"] and first.timings.load_ms > 0
    with open_engine(siglip) as warm:
        warm.warm_up()
        assert warm.environment()["providers"] == ["CPUExecutionProvider"]
        assert warm.stats()["requests"]["answered"] == 0


def test_batches(engine: Engine, edge: EdgeRuntime) -> None:
    found = engine.answer_many(picture(1), QUESTIONS, max_tokens=5)
    assert [a.text for a in found] == [edge.answer(picture(1), q, max_tokens=5).text for q in QUESTIONS]
    assert engine.answer_many(picture(1), []) == []


@pytest.mark.parametrize("drain_s", [0.0, 60.0])
def test_closing(siglip: Pair, drain_s: float) -> None:
    """With time to drain everything is answered, without it everything is cancelled; afterwards nothing is taken."""
    engine = open_engine(siglip)
    generations = [engine.submit(ask("what?", max_tokens=40)) for _ in range(4)]
    closer = threading.Thread(target=engine.close, kwargs={"drain_s": drain_s})
    closer.start()
    closer.join(timeout=60)
    assert not closer.is_alive() and all(generation.done for generation in generations)
    if drain_s:
        assert [len(generation.result().token_ids) for generation in generations] == [40] * 4
    else:
        with pytest.raises(CancelledError):
            generations[-1].result()
    with pytest.raises(EngineError, match="closed"):
        engine.generate("what?")


def test_a_listener_that_fails_hurts_nobody_else(engine: Engine) -> None:
    def fail(piece: str | None) -> None:
        raise ValueError("a listener's own")

    with pytest.raises(ValueError, match="own"):
        engine.submit(ask("what?", max_tokens=2), fail).result(timeout=20)
    quiet = engine.submit(ask("what?", max_tokens=2), lambda piece: fail(piece) if piece is None else None)
    assert quiet.result(timeout=20).token_ids and engine.generate("what?", max_tokens=2).token_ids


def test_a_frame_that_is_overwritten_while_it_waits(engine: Engine) -> None:
    """A camera's buffer: the answer is about the picture that was passed, and its cache entry too."""
    wanted = [engine.generate("what?", image=picture(seed).copy(), max_tokens=6).text for seed in (7, 8)]
    frame = picture(7).copy()
    busy = engine.generate("what?", max_tokens=300, stream=True)
    waiting = engine.generate("what?", image=frame, max_tokens=6, stream=True)
    frame[:] = picture(8)
    busy.cancel()
    assert waiting.result(timeout=20).text == wanted[0]
    assert engine.generate("what?", image=picture(8), max_tokens=6).text == wanted[1]


def test_settings_are_refused_before_anything_runs(engine: Engine) -> None:
    before = engine.stats()["requests"]
    for options in ({"stop": [""]}, {"stop": ["a"] * 9}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(UsageError):
            engine.generate("what?", **options)
    with pytest.raises(UsageError, match="Unicode"):
        engine.generate([{"role": "system", "content": "\ud800"}, {"role": "user", "content": "x"}])
    assert engine.stats()["requests"] == before
    assert engine.generate("what?", max_tokens=2, stop=None).token_ids  # type: ignore[call-overload]


def test_the_rate_counts_what_was_decoded(engine: Engine) -> None:
    whole = engine.generate("what?", image=picture(1), max_tokens=20)
    word = whole.text[len(whole.text) // 2 :][:3]
    cut = engine.generate("what?", image=picture(1), max_tokens=20, stop=word)
    rate = cut.decode_tokens_per_s
    assert cut.stop_string and rate == pytest.approx(1000 * (len(cut.token_ids) - 1) / cut.timings.decode_ms)


def test_a_generation_may_be_read_twice(engine: Engine) -> None:
    generation = engine.generate("what?", max_tokens=4, stream=True)
    assert list(generation) and list(generation) == []


def test_nothing_of_a_request_is_kept(siglip: Pair) -> None:
    """Neither of a good one nor of a failed one, without the garbage collector's help."""
    with open_engine(siglip) as fresh:
        gc.disable()
        try:
            watched = []
            for question in ("what?", "why " * 5000):
                request = ask(question, picture(3), max_tokens=2)
                watched.append(weakref.ref(request))
                with contextlib.suppress(EngineError):
                    fresh.answer(request)
                del request
            deadline = time.monotonic() + 10
            while any(ref() is not None for ref in watched) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [ref() for ref in watched] == [None, None]
        finally:
            gc.enable()


def test_a_build_that_does_not_fit_is_refused(siglip: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = (memory_limit.MemoryLimit(64 << 20, "a made-up group", memory_limit.RESIDENT),)
    monkeypatch.setattr(memory, "memory_limits", lambda: tight)
    with pytest.raises(MemoryLimitError, match="a made-up group leaves 64 MiB"):
        open_engine(siglip)
    with open_engine(siglip, check_memory=False) as engine:
        assert engine.generate("what?", max_tokens=1).token_ids
