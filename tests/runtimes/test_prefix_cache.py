"""A prompt that begins like an earlier one is computed in part, and the answer is the same. Float32 throughout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllava_edge.errors import ImageError
from tinyllava_edge.prompt import Turn
from tinyllava_edge.runtimes.base import Answer
from tinyllava_edge.runtimes.caches import Caches
from tinyllava_edge.runtimes.edge import EdgeRuntime, open_edge
from tinyllava_edge.runtimes.prefix_cache import common
from tinyllava_edge.runtimes.request import Request, ask

from .conftest import Pair, picture

A, B, C = (picture(seed) for seed in (1, 2, 3))


def said(answer: Answer) -> tuple[Any, ...]:
    return answer.text, answer.token_ids, answer.finish_reason, answer.n_prompt_tokens, answer.n_image_tokens


def open_cached(pair: Pair, prefix_bytes: int = 64 << 20, **options: Any) -> EdgeRuntime:
    caches = Caches(prefix_bytes=prefix_bytes, **options)
    return open_edge(pair.bundle, "fp32+f32", allow_unverified=True, n_threads=1, caches=caches)


@pytest.fixture(scope="module")
def cached(siglip: Pair) -> Iterator[EdgeRuntime]:
    with open_cached(siglip) as runtime:
        yield runtime


def chat(*turns: Turn, pictures: tuple[Any, ...] = ()) -> Request:
    return Request(turns, pictures, max_tokens=9)


PROMPTS = [
    ask("what color is it?", A, max_tokens=9),
    ask("is it small?", A, max_tokens=9),
    ask("what color is it?", B, max_tokens=9),
    ask("how many?", None, max_tokens=9),
    ask("what color is it?", A, max_tokens=9),
    ask("compare them", [A, B], max_tokens=9),
    ask("compare them", [B, A], max_tokens=9),
    chat(Turn("first", "red", 1), Turn("and now?"), pictures=(A,)),
    chat(Turn("first", "red", 1), Turn("and now?", "blue"), Turn("and this?", images=1), pictures=(A, C)),
    replace(ask("what color is it?", A, max_tokens=9), system="Be brief."),
    ask("how many?", None, max_tokens=9),
    ask("compare them", [A, B], max_tokens=9),
]


def test_answers_are_the_same_as_without_a_cache(cached: EdgeRuntime, edge: EdgeRuntime) -> None:
    for request in PROMPTS * 2:
        ours, plain = cached.run(request), edge.run(request)
        assert said(ours) == said(plain) and plain.n_cached_tokens == 0
    counts = cached.cache_stats()
    assert counts["prefix"]["hits"] > 12 and counts["prefix"]["restored"] > 3 and counts["images"]["hits"] > 0


def test_what_is_computed_again(cached: EdgeRuntime) -> None:
    n_image = cached.spec.visual_tokens
    cached.run(ask("what color is it?", C, max_tokens=2))
    second = cached.run(ask("is it big and round?", C, max_tokens=2))
    assert second.n_cached_tokens > n_image and second.timings.vision_ms == second.timings.preprocess_ms == 0
    again = cached.run(ask("is it big and round?", C, max_tokens=2))
    assert again.n_cached_tokens == second.n_cached_tokens and said(again) == said(second)
    going_on = cached.run(chat(Turn("is it big and round?", again.text, 1), Turn("why?"), pictures=(C,)))
    assert going_on.n_cached_tokens >= again.n_cached_tokens


@pytest.mark.parametrize("build", ["fp32+f16", "int8+q4_k_m"])
def test_single_questions_are_the_same_to_the_last_bit(tiny_bundle: Path, build: str) -> None:
    """Also where rounding would flip a near tie: whatever came before, a prompt is computed in the same stretches."""
    questions = [ask(text, image, max_tokens=12) for text in ("what is it?", "what color?") for image in (A, B, None)]
    with open_edge(tiny_bundle, build, n_threads=2) as plain:
        wanted = [(said(plain.run(request)), plain.llama.last_logits().copy()) for request in questions]
    with open_edge(tiny_bundle, build, n_threads=2, caches=Caches()) as cached:
        for number in [*range(6), *range(5, -1, -1), 0, 2, 4, 1, 3, 5]:
            found = cached.run(questions[number])
            assert said(found) == wanted[number][0]
            assert np.array_equal(cached.llama.last_logits(), wanted[number][1])
        assert cached.cache_stats()["prefix"]["restored"] > 0


def test_chat_turns_prefill_only_what_is_new(cached: EdgeRuntime, edge: EdgeRuntime) -> None:
    """After three turns, what is prefilled is the last answer's re-tokenised text at most and the new question."""
    turns: list[Turn] = [Turn("what color is it?", images=1)]
    for question in ("is it small?", "is there a circle?", "why?"):
        request = Request(tuple(turns), (B,), max_tokens=6)
        answer = cached.run(request)
        assert said(answer) == said(edge.run(request))
        turns[-1] = replace(turns[-1], answer=answer.text)
        turns.append(Turn(question))
    last = cached.run(Request(tuple(turns), (B,), max_tokens=2))
    assert last.n_prompt_tokens - last.n_cached_tokens < 40


def test_memory_is_bounded(siglip: Pair, edge: EdgeRuntime) -> None:
    one = 0
    with open_cached(siglip) as roomy:
        for seed in range(3):
            roomy.run(ask("what?", picture(seed), max_tokens=2))
        one = roomy.cache_stats()["prefix"]["bytes"] // 2
    assert one > 0
    with open_cached(siglip, prefix_bytes=int(2.5 * one)) as small:
        for seed in [*range(6), *range(6)]:
            request = ask("what?", picture(seed), max_tokens=4)
            assert said(small.run(request)) == said(edge.run(request))
            assert small.cache_stats()["prefix"]["bytes"] <= 2.5 * one
        assert small.cache_stats()["prefix"]["evictions"] > 0


def test_a_failure_leaves_the_cache_right(cached: EdgeRuntime, edge: EdgeRuntime, tmp_path: Path) -> None:
    """A second picture that is none: the first was decoded already."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        cached.run(ask("compare them", [C, broken]))
    for request in PROMPTS[:4]:
        assert said(cached.run(request)) == said(edge.run(request))
    assert len(cached.answer_many(A, ["what?", "why?"], max_tokens=3)) == 2  # uses the same cells for its own
    for request in PROMPTS[:4]:
        assert said(cached.run(request)) == said(edge.run(request))


def test_without_overlap(siglip: Pair, edge: EdgeRuntime) -> None:
    with open_cached(siglip, overlap=False) as runtime:
        for request in PROMPTS[:7]:
            assert said(runtime.run(request)) == said(edge.run(request))


def test_common_beginning() -> None:
    assert common([], [1], 5) == 0 and common([1, "a", "a"], [1, "a", "b"], 5) == 2
    assert common([1, 2, 3], [1, 2, 3], 2) == 2 and common([1, 2], [1, 2, 3], 9) == 2
