"""The stages of an answer: what adds up, what is the clock's, and what each decoding step took."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.stopwatch import Stopwatch


def test_a_part_and_its_whole_get_the_same_time() -> None:
    watch = Stopwatch()
    with watch.stage("prefill_ms", "text_prefill_ms"):
        time.sleep(0.002)
    with watch.stage("prefill_ms", "image_prefill_ms"):
        time.sleep(0.001)
    watch.token(3.0)
    watch.token(4.0)
    watch.last_token()
    found = watch.timings()
    assert found.prefill_ms == found.text_prefill_ms + found.image_prefill_ms >= 3
    assert found.decode_ms == 7.0 and watch.token_ms == [3.0, 4.0]
    assert found.total_ms >= found.prefill_ms


def test_a_stage_that_fails_is_timed_all_the_same() -> None:
    watch = Stopwatch()
    with pytest.raises(ValueError, match="x"), watch.stage("vision_ms"):
        raise ValueError("x")
    assert watch.timings().vision_ms > 0


def test_stages_of_a_real_answer(tiny_bundle: Path) -> None:
    picture = np.full((40, 50, 3), 99, np.uint8)
    with open_edge(tiny_bundle, "fp32+f16", n_threads=1) as runtime:
        runtime.warm_up()
        for image in (picture, None):
            start = time.perf_counter()
            answer = runtime.answer(image, "what color is it?", max_tokens=6)
            wall = 1000 * (time.perf_counter() - start)
            t = answer.timings
            assert t.prefill_ms == pytest.approx(t.image_prefill_ms + t.text_prefill_ms)
            assert (t.image_prefill_ms > 0) == (image is not None) and t.text_prefill_ms > 0
            assert len(answer.token_ms) == len(answer.token_ids) - 1 + answer.ended_by_token
            assert sum(answer.token_ms) == pytest.approx(t.decode_ms)
            assert t.ttft_ms + t.decode_ms <= t.total_ms <= wall
            assert {"image_prefill_ms", "text_prefill_ms", "total_ms", "ttft_ms"} <= set(t.to_dict())


def test_many_questions_on_one_picture_are_timed_as_one(tiny_bundle: Path) -> None:
    picture = np.full((40, 50, 3), 99, np.uint8)
    with open_edge(tiny_bundle, "fp32+f16", n_threads=1) as runtime:
        first, second = runtime.answer_many(picture, ["what?", "what color?"], max_tokens=3)
    t = first.timings
    assert t.prefill_ms == pytest.approx(t.image_prefill_ms + t.text_prefill_ms) and t.image_prefill_ms > 0
    assert t.total_ms >= t.prefill_ms + t.decode_ms and second.timings.total_ms == 0


def test_the_reference_times_its_steps_too(tiny_checkpoint: Path) -> None:
    from tinyllava_edge.runtimes.reference import open_reference

    runtime = open_reference(tiny_checkpoint)
    answer = runtime.answer(np.full((40, 50, 3), 99, np.uint8), "what?", max_tokens=4)
    t = answer.timings
    assert t.image_prefill_ms == t.text_prefill_ms == 0 < t.prefill_ms  # one pass takes the whole prompt
    assert len(answer.token_ms) >= 3 and sum(answer.token_ms) == pytest.approx(t.decode_ms)
    assert t.total_ms >= t.ttft_ms + t.decode_ms
