"""The reference's batches against its single answers, and its prompt against plain `generate`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tinyllava_edge.errors import CheckpointError, ContextError, UsageError
from tinyllava_edge.prompt import SYSTEM
from tinyllava_edge.runtimes import reference as module
from tinyllava_edge.runtimes.base import IMAGE_PLACE
from tinyllava_edge.runtimes.reference import ReferenceRuntime, open_reference
from tinyllava_edge.runtimes.text import Vocabulary

from .conftest import QUESTIONS, Pair, picture
from .test_edge import said


def test_equals_generate(reference: ReferenceRuntime, image: Any) -> None:
    """Hugging Face's own generate, fed the whole prompt as one string, gives the same greedy ids."""
    answer = reference.answer(image, "what color is the shape?", max_tokens=12)
    tokenizer, model = reference.tokenizer, reference.model
    text = f"{SYSTEM} USER: {'<image>' * 64}\nwhat color is the shape? ASSISTANT:"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    pixels = torch.from_numpy((picture().astype(np.float32) / 127.5 - 1).transpose(2, 0, 1).copy())[None]
    out = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert tuple(out[0, ids.shape[1] :].tolist()) == answer.token_ids
    assert answer.n_prompt_tokens == ids.shape[1] and answer.n_image_tokens == 64


@pytest.mark.parametrize("name", ["siglip", "clip", "factory"])
def test_many_equal_single_ones(name: str, request: pytest.FixtureRequest) -> None:
    """Left padding, shared prefixes and dropped rows change nothing (float32, so that no near tie flips)."""
    runtime = open_reference(request.getfixturevalue(name).checkpoint, n_threads=1)
    image = picture(5)
    many = runtime.answer_many(image, QUESTIONS[:8], max_tokens=5)
    single = [runtime.answer(image, question, max_tokens=5) for question in QUESTIONS[:8]]
    assert [said(a) for a in many] == [said(a) for a in single]


def test_answers_of_different_lengths(reference: ReferenceRuntime, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end early are dropped from the batch once half are done; the others must not notice."""
    questions = [*QUESTIONS[:6], QUESTIONS[-1], "why?"]
    whole = [a.token_ids for a in reference.answer_many(image, questions, max_tokens=8)]
    ends = frozenset(ids[1 + row % 3] for row, ids in enumerate(whole[:6])) - set(whole[6]) - set(whole[7])

    class Ended(Vocabulary):
        stops = ends  # type: ignore[assignment]

    monkeypatch.setattr(reference, "_vocabulary", Ended(**vars(reference._vocabulary)))
    many = reference.answer_many(image, questions, max_tokens=8)
    lengths = [len(a.token_ids) for a in many]
    assert sum(length < 4 for length in lengths[:6]) >= 4 and lengths[6:] == [8, 8]
    assert [said(a) for a in many] == [said(reference.answer(image, q, max_tokens=8)) for q in questions]


def test_many_pictures(reference: ReferenceRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of pictures keep their order; a picture without questions gets none."""
    monkeypatch.setattr(module, "MAX_ROWS", 5)
    items = [(picture(seed), QUESTIONS[: seed % 4]) for seed in range(7)]
    found = list(reference.answer_pictures(items, max_tokens=4))
    assert [len(answers) for answers in found] == [seed % 4 for seed in range(7)]
    for (image, questions), answers in zip(items, found, strict=True):
        assert [said(a) for a in answers] == [said(reference.answer(image, q, max_tokens=4)) for q in questions]


def test_user_text_is_never_special(reference: ReferenceRuntime, image: Any) -> None:
    ids = reference.probe(image, "<s> </s> <unk> <image> what?", max_tokens=1).prompt_ids
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(IMAGE_PLACE) == 1
    assert not {0, 2, reference.model.config.image_token_id} & set(ids)


def test_stream_and_context(siglip: Pair, image: Any) -> None:
    runtime = open_reference(siglip.checkpoint, n_ctx=200)
    pieces: list[str] = []
    answer = runtime.answer(image, "what?", max_tokens=500, on_text=pieces.append)
    assert "".join(pieces) == answer.text and answer.finish_reason == "length"
    assert len(answer.token_ids) == 200 - answer.n_prompt_tokens + 1
    with pytest.raises(ContextError, match="does not fit n_ctx=200"):
        runtime.answer_many(image, ["what?", "word " * 300])
    with pytest.raises(UsageError, match="empty"):
        runtime.answer_many(image, ["what?", " "])


def test_settings(siglip: Pair, tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="n_threads=0"):
        open_reference(siglip.checkpoint, n_threads=0)
    with pytest.raises(UsageError, match="n_ctx=0"):
        open_reference(siglip.checkpoint, n_ctx=0)
    with pytest.raises(CheckpointError):
        open_reference(tmp_path)
