"""The device runtime against the torch reference, and against itself: batches, streams, contexts, threads."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinyllava_edge.errors import ContextError, UsageError
from tinyllava_edge.prompt import Turn
from tinyllava_edge.runtimes.base import IMAGE_PLACE, Answer
from tinyllava_edge.runtimes.edge import EdgeRuntime, open_edge
from tinyllava_edge.runtimes.reference import ReferenceRuntime, open_reference
from tinyllava_edge.runtimes.sampling import Sampling

from .conftest import QUESTIONS, Pair, picture


def said(answer: Answer) -> tuple[Any, ...]:
    """Everything but the timings."""
    return answer.text, answer.token_ids, answer.finish_reason, answer.n_prompt_tokens, answer.n_image_tokens


@pytest.mark.parametrize("name", ["siglip", "clip", "factory"])
def test_equals_the_reference(name: str, request: pytest.FixtureRequest) -> None:
    """Stage by stage on pictures that need no resizing; f16 within 5e-2 on logits, f32 within 1e-3, ids equal."""
    pair: Pair = request.getfixturevalue(name)
    reference = open_reference(pair.checkpoint, n_threads=1)
    limits = {"fp32+f32": 1e-3, "fp32+f16": 5e-2}
    for build, limit in limits.items():
        with open_edge(pair.bundle, build, allow_unverified=True, n_threads=1) as edge:
            for seed, question in enumerate(QUESTIONS[:3]):
                ours, theirs = (runtime.probe(picture(seed), question) for runtime in (edge, reference))
                assert ours.prompt_ids == theirs.prompt_ids and ours.prompt_ids.count(IMAGE_PLACE) == 1
                assert ours.image_embeds.shape == (edge.spec.visual_tokens, edge.spec.embedding_dim)
                np.testing.assert_allclose(ours.pixel_values, theirs.pixel_values, atol=1e-5)
                np.testing.assert_allclose(ours.image_features, theirs.image_features, atol=1e-3)
                np.testing.assert_allclose(ours.image_embeds, theirs.image_embeds, atol=1e-3)
                np.testing.assert_allclose(ours.first_logits, theirs.first_logits, atol=limit)
                if build == "fp32+f32":
                    assert said(ours.answer) == said(theirs.answer)


def test_resized_pictures(edge: EdgeRuntime, reference: ReferenceRuntime) -> None:
    """Resizing may differ by one grey level in a few places, 2/255 after normalisation."""
    for seed, size in enumerate([(200, 31), (17, 90), (1, 1), (333, 333)]):
        ours, theirs = (runtime.probe(picture(seed, *size), "what?") for runtime in (edge, reference))
        np.testing.assert_allclose(ours.pixel_values, theirs.pixel_values, atol=2.1 / 255)
        np.testing.assert_allclose(ours.first_logits, theirs.first_logits, atol=0.1)


def test_padded_pictures(factory: Pair) -> None:
    """`pad` policy: both runtimes centre the same oblong picture on the same square."""
    reference = open_reference(factory.checkpoint, n_threads=1)
    with open_edge(factory.bundle, "fp32+f32", allow_unverified=True, n_threads=1) as edge:
        ours, theirs = (runtime.probe(picture(3, 64, 40), "what?") for runtime in (edge, reference))
        np.testing.assert_allclose(ours.pixel_values, theirs.pixel_values, atol=2.1 / 255)
        assert np.ptp(ours.pixel_values[:, :, :8]) == 0  # the padding is one colour


def test_the_picture_matters(edge: EdgeRuntime) -> None:
    first, second = (edge.probe(picture(seed), "what?").first_logits for seed in (1, 2))
    assert np.abs(first - second).max() > 0.1


def test_without_a_picture(edge: EdgeRuntime, reference: ReferenceRuntime) -> None:
    ours, theirs = (runtime.answer(None, "hello <image> there", max_tokens=12) for runtime in (edge, reference))
    assert said(ours) == said(theirs) and ours.n_image_tokens == 0
    assert ours.timings.vision_ms == ours.timings.preprocess_ms == 0 < ours.timings.prefill_ms


def test_several_turns(edge: EdgeRuntime, reference: ReferenceRuntime, image: Any) -> None:
    turns = [Turn("what color?", "red"), Turn("are you </s> sure?", "yes"), Turn("why?")]
    ours, theirs = (runtime.chat(image, turns, max_tokens=12) for runtime in (edge, reference))
    assert said(ours) == said(theirs)
    assert ours.n_prompt_tokens > edge.answer(image, "why?", max_tokens=1).n_prompt_tokens


@pytest.mark.parametrize("n_ctx", [2048, 400])
def test_many_equal_single_ones(siglip: Pair, image: Any, n_ctx: int) -> None:
    """17 questions make two groups; a small context makes more. Float32, so that no near tie can flip."""
    with open_edge(siglip.bundle, "fp32+f32", allow_unverified=True, n_threads=1, n_ctx=n_ctx) as edge:
        many = edge.answer_many(image, QUESTIONS, max_tokens=9)
        single = [edge.answer(image, question, max_tokens=9) for question in QUESTIONS]
        assert [said(a) for a in many] == [said(a) for a in single]
        assert edge.answer_many(image, []) == []
        pairs = [(picture(1), QUESTIONS[:2]), (picture(2), QUESTIONS[2:3])]
        found = list(edge.answer_pictures(pairs, max_tokens=4))
        assert [len(answers) for answers in found] == [2, 1]
        assert said(found[1][0]) == said(edge.answer(picture(2), QUESTIONS[2], max_tokens=4))


def test_the_end_token_ends(edge: EdgeRuntime, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model hardly ever says `</s>`; its third token is made the end token instead."""
    whole = edge.answer(image, "what?", max_tokens=8)
    end = whole.token_ids[2]
    monkeypatch.setattr(edge, "_vocabulary", replace(edge._vocabulary, end_of_turn=end))
    cut = edge.answer(image, "what?", max_tokens=8)
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(end)] and cut.finish_reason == "stop"
    assert whole.finish_reason == "length" and len(whole.token_ids) == 8
    assert said(edge.answer_many(image, ["what?"], max_tokens=8)[0]) == said(cut)


def test_stream(edge: EdgeRuntime, image: Any) -> None:
    pieces: list[str] = []
    answer = edge.answer(image, "what?", max_tokens=60, on_text=pieces.append)
    assert "".join(pieces) == answer.text == answer.text.strip() and len(pieces) > 10 and all(pieces)


def test_context_end(siglip: Pair, image: Any) -> None:
    with open_edge(siglip.bundle, "fp32+f32", allow_unverified=True, n_threads=1, n_ctx=300) as wide:
        n_prompt = wide.answer(image, "what?", max_tokens=1).n_prompt_tokens
        long = wide.answer(image, "what?", max_tokens=1000)
        assert len(long.token_ids) == 300 - n_prompt + 1 and long.finish_reason == "length"
        assert said(wide.answer_many(image, ["what?"], max_tokens=1000)[0]) == said(long)
    with open_edge(siglip.bundle, "fp32+f32", allow_unverified=True, n_threads=1, n_ctx=n_prompt) as exact:
        assert exact.answer(image, "what?", max_tokens=9).token_ids == long.token_ids[:1]
    with open_edge(siglip.bundle, "fp32+f32", allow_unverified=True, n_threads=1, n_ctx=n_prompt - 1) as short:
        with pytest.raises(ContextError, match=f"prompt of {n_prompt} positions does not fit n_ctx={n_prompt - 1}"):
            short.answer(image, "what?")
        with pytest.raises(ContextError):
            short.answer_many(image, ["what?"])
        with pytest.raises(ContextError, match="does not fit"):
            short.answer(image, "word " * 100_000)
        assert short.answer(None, "what?", max_tokens=2).token_ids  # still alive


def test_questions_that_are_none(edge: EdgeRuntime, image: Any) -> None:
    for question in ("", "  \n\t ", "<image>", "<image>\n"):
        with pytest.raises(UsageError, match="empty"):
            edge.answer(image, question)
        with pytest.raises(UsageError, match="empty"):
            edge.answer_many(image, ["what?", question])
    with pytest.raises(UsageError, match="Unicode"):
        edge.answer(image, "broken \ud800 half")
    with pytest.raises(UsageError, match="max_tokens=0"):
        edge.answer(image, "what?", max_tokens=0)


def test_odd_questions(edge: EdgeRuntime, reference: ReferenceRuntime, image: Any) -> None:
    """Control characters, null bytes and other scripts are text like any other."""
    for question in ("a\0b", "\x1b[0m", "日本語 العربية", "\u200b?", "</s>", "{{ 7 * 7 }} %s"):
        ours, theirs = (runtime.probe(image, question, max_tokens=1) for runtime in (edge, reference))
        assert ours.prompt_ids == theirs.prompt_ids and edge._vocabulary.eos not in ours.prompt_ids


def test_sampling(edge: EdgeRuntime, image: Any) -> None:
    warm = Sampling(temperature=1.0, seed=7)
    first, second = (edge.answer(image, "what?", max_tokens=12, sampling=warm) for _ in range(2))
    greedy = edge.answer(image, "what?", max_tokens=12)
    assert said(first) == said(second) != said(greedy)
    narrow = edge.answer(image, "what?", max_tokens=12, sampling=Sampling(temperature=1.0, top_k=1))
    assert said(narrow) == said(greedy)


def test_timings_and_environment(siglip: Pair, image: Any) -> None:
    with open_edge(siglip.bundle, allow_unverified=True, n_threads=1) as edge:
        assert edge.build == "fp32+f32"
        edge.warm_up()
        first, second = (edge.answer(image, "what?", max_tokens=6) for _ in range(2))
        assert first.timings.load_ms > 0 == second.timings.load_ms
        stages = second.timings.to_dict()
        assert all(ms > 0 for stage, ms in stages.items() if stage not in ("load_ms", "queue_ms"))
        assert stages["ttft_ms"] < sum(stages.values()) - stages["ttft_ms"]
        rate = second.decode_tokens_per_s
        assert rate is not None and rate == pytest.approx(5000 / second.timings.decode_ms)
        environment = json.loads(json.dumps(edge.environment()))
        assert environment["providers"] == ["CPUExecutionProvider"] and environment["verified"] is False
        assert environment["n_threads"] == 1 and environment["kv_cache"] == "f32"
        assert "CPU" in environment["llama_cpp_system_info"] and len(environment["files"]) == 3


def test_threads_take_turns(edge: EdgeRuntime) -> None:
    """Four threads on one runtime: each gets the answer that it would get alone."""
    alone = [said(edge.answer(picture(seed), QUESTIONS[seed], max_tokens=8)) for seed in range(4)]
    together: dict[int, tuple[Any, ...]] = {}

    def ask(seed: int) -> None:
        together[seed] = said(edge.answer(picture(seed), QUESTIONS[seed], max_tokens=8))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(4)] == alone


def test_nothing_is_printed(siglip: Pair, image: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with open_edge(siglip.bundle, "fp32+f16", allow_unverified=True, n_threads=1) as edge:
        edge.answer(image, "what?", max_tokens=2)
        with pytest.raises(ContextError):
            edge.answer(image, "word " * 3000)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_picture_files(edge: EdgeRuntime, image: Any, tmp_path: Any, kind: str) -> None:
    from PIL import Image

    path = tmp_path / "cat.png"
    Image.fromarray(image).save(path)
    from_file = edge.answer(path if kind == "path" else path.read_bytes(), "what?", max_tokens=6)
    assert said(from_file) == said(edge.answer(image, "what?", max_tokens=6))
    assert from_file.timings.decode_image_ms > 0
