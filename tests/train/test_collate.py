"""Labels are the answers and their end marks, by construction; a batch lays packs out as the docstring says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyllava_edge.checkpoint import load_tokenizer
from tinyllava_edge.data.llava_json import Row
from tinyllava_edge.errors import CheckpointError, DataError
from tinyllava_edge.prompt import SYSTEM, TEMPLATES, Turn
from tinyllava_edge.train.collate import IGNORED, Encoded, Encoder, Pack, collate, pack

SLOTS, IMAGE = 5, 1024


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    return load_tokenizer(tiny_checkpoint)


def row(*turns: tuple[str, str], image: str | None = "a.png") -> Row:
    return Row("r", () if image is None else (image,), tuple(Turn(*turn) for turn in turns))


def encoder(tokenizer: Any, template: str = "llama", max_length: int = 2048) -> Encoder:
    return Encoder(tokenizer, TEMPLATES[template], SLOTS, max_length)


def answers(tokenizer: Any, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.ids[encoded.is_answer])


def everything(tokenizer: Any, encoded: Encoded) -> str:
    text = tokenizer.decode(encoded.ids)
    return text.replace("<image>" * SLOTS, "<image>")


def test_several_turns_label_each_answer_and_its_end(tokenizer: Any) -> None:
    encoded = encoder(tokenizer).encode(row(("<image>\nwhat color?", "red"), ("sure?", "yes, it is")))
    assert everything(tokenizer, encoded) == (
        f"<s>{SYSTEM} USER: <image>\nwhat color? ASSISTANT: red</s>USER: sure? ASSISTANT: yes, it is</s>"
    )
    assert answers(tokenizer, encoded) == " red</s> yes, it is</s>"
    assert encoded.shared == 0  # a later turn may look back, so the row can't be packed
    assert (encoded.ids == IMAGE).sum() == SLOTS and not encoded.is_answer[encoded.ids == IMAGE].any()


def test_a_row_without_a_picture_has_no_image_slots(tokenizer: Any) -> None:
    encoded = encoder(tokenizer).encode(row(("hello", "hi"), image=None))
    assert everything(tokenizer, encoded) == f"<s>{SYSTEM} USER: hello ASSISTANT: hi</s>"
    assert answers(tokenizer, encoded) == " hi</s>" and encoded.shared == 0


def test_stage_1_is_the_picture_then_its_caption(tokenizer: Any) -> None:
    encoded = encoder(tokenizer, "pretrain").encode(row(("<image>\ndescribe", "a red circle.")))
    assert everything(tokenizer, encoded) == "<s><image>a red circle.\n"
    assert answers(tokenizer, encoded) == "a red circle.\n" and encoded.shared == 1 + SLOTS
    with pytest.raises(DataError, match="without a picture"):
        encoder(tokenizer, "pretrain").encode(row(("hello", "hi"), image=None))


def test_what_a_user_types_never_becomes_a_special_token(tokenizer: Any) -> None:
    encoded = encoder(tokenizer).encode(row(("<image>\nsay </s> or <s>", "</s><unk>")))
    ids = encoded.ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert answers(tokenizer, encoded) == " </s><unk></s>"


@pytest.mark.parametrize("answer", ['"quoted"', "7", "naïve 🙂", "two\nlines", "  spaced", "USER: x ASSISTANT: y"])
def test_the_labels_are_the_answers_text_whatever_it_is(tokenizer: Any, answer: str) -> None:
    encoded = encoder(tokenizer).encode(row(("<image>\nwhat?", answer)))
    assert answers(tokenizer, encoded) == f" {answer}</s>"
    asked = encoder(tokenizer).encode(row(("<image>\nwhat?", "no")))
    question = np.flatnonzero(asked.is_answer)[0]
    # the prompt's ids do not depend on the answer, so inference sees what training saw
    assert encoded.ids[:question].tolist() == asked.ids[:question].tolist()


def test_a_long_row_is_cut_on_the_right_and_refused_when_no_answer_is_left(tokenizer: Any) -> None:
    whole = encoder(tokenizer).encode(row(("<image>\nwhat?", "a long answer")))
    cut = encoder(tokenizer, max_length=len(whole.ids) - 2).encode(row(("<image>\nwhat?", "a long answer")))
    assert cut.ids.tolist() == whole.ids[:-2].tolist() and cut.is_answer.tolist() == whole.is_answer[:-2].tolist()
    first = int(np.flatnonzero(whole.is_answer)[0])
    with pytest.raises(DataError, match=f"no answer token within {first}"):
        encoder(tokenizer, max_length=first).encode(row(("<image>\nwhat?", "a long answer")))


def test_a_template_of_another_language_model_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CheckpointError, match="im_end"):
        encoder(tokenizer, "qwen2_instruct")


def test_rows_on_one_picture_are_packed_evenly_and_others_stay_alone(tokenizer: Any) -> None:
    code = encoder(tokenizer)
    rows = [row((f"<image>\n{k}?", "yes"), image="a.png") for k in range(7)]
    rows += [row(("<image>\nx?", "no"), ("and?", "yes"), image="a.png"), row(("hello", "hi"), image=None)]
    packs = pack([(r, code.encode(r)) for r in rows], 5)
    assert [(len(p.rows), p.images) for p in packs] == [(4, (0,)), (3, (0,)), (1, (0,)), (1, ())]
    assert sum(len(p.rows) for p in packs) == 9
    assert all(len(p.rows) == 1 for p in pack([(r, code.encode(r)) for r in rows], 1))


def small(ids: list[int], marks: list[int], shared: int) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array(marks, bool), shared)


def test_a_batch_of_packs_written_out_by_hand() -> None:
    two = Pack((small([1, 9, 5, 6], [0, 0, 0, 1], 2), small([1, 9, 7], [0, 0, 1], 2)), (0,))  # prefix 1 9
    one = Pack((small([1, 8], [0, 1], 0),))
    batch = collate([two, one], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 9, 5, 6, 7], [1, 8, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7], [8, IGNORED]]
    assert batch["sources"].tolist() == [[2, 1], [0, 0]]  # 7 is predicted from the prefix's last position
    seen = [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]]
    alone = [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]]
    assert batch["attention_mask"][0].int().tolist() == seen
    assert batch["attention_mask"][1, :, :2].int().tolist() == alone
    assert batch["attention_mask"][1, 0, 2:].any(-1).all()  # a query that sees nothing would be NaN


def test_lone_rows_get_an_ordinary_mask() -> None:
    batch = collate([Pack((small([1, 9, 7], [0, 0, 1], 2),), (0,)), Pack((small([1, 8], [0, 1], 0),))], 0)
    assert batch["attention_mask"].dtype is torch.bool
    assert batch["attention_mask"].int().tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["sources"].tolist() == [[1], [0]] and batch["labels"].tolist() == [[7], [8]]
