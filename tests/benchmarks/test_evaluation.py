"""Rows from LLaVA JSON, sampling, the blind baseline, resuming; then a real runtime on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinyllava_edge.benchmarks.evaluation import accuracy, evaluate, sample_questions
from tinyllava_edge.benchmarks.results import AnswerRecord, read_results
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.benchmarks.tasks.llava_json import load_rows
from tinyllava_edge.errors import DataError
from tinyllava_edge.runtimes.base import Answer


class Scripted:
    """Answers with the picture that it was shown, or fails after so many pictures."""

    name, build, pictures_at_once = "edge", "fp32+f16", 1
    spec = SimpleNamespace(template="phi")

    def __init__(self, fail_after: int = 10**9, model: str = "m1", at_once: int = 1) -> None:
        self.shown: list[str] = []
        self.calls: list[list[str]] = []
        self.pictures_at_once = at_once
        self._fail_after, self._model = fail_after, model

    def answer(self, image: None, question: str, *, max_tokens: int = 16) -> Answer:
        assert image is None
        return Answer("no picture", (1,), "stop", 1, 0)

    def answer_many(self, image: bytes, questions: Sequence[str], *, max_tokens: int = 16) -> list[Answer]:
        if len(self.shown) == self._fail_after:
            raise KeyboardInterrupt
        self.shown.append(image.decode())
        return [Answer(f" {image.decode().upper()}", (1,), "stop", 1, 1) for _ in questions]

    def answer_pictures(
        self, items: Iterable[tuple[bytes, Sequence[str]]], *, max_tokens: int = 16
    ) -> Iterator[list[Answer]]:
        listed = list(items)
        self.calls.append([image.decode() for image, _ in listed])
        return (self.answer_many(image, questions, max_tokens=max_tokens) for image, questions in listed)

    def environment(self) -> dict[str, Any]:
        return {"runtime": self.name, "bundle_sha256": self._model}


def rows(pictures: int = 6, each: int = 3) -> list[Question]:
    """Questions whose right answer is the picture's bytes."""
    return [
        Question(
            id=f"{p}-{k}",
            prompt=f"question {k}?",
            pictures=(f"{p}.png".encode(),),
            image=f"{p}.png",
            expected=f"{p}.png",
            kind=("a", "b", "c")[k],
            facts={"tier": "easy"},
        )
        for p in range(pictures)
        for k in range(each)
    ]


def entry(**changes: Any) -> dict[str, Any]:
    talk = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": "red "}]
    return {"id": "r1", "image": "a/b.png", "conversations": talk, **changes}


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_load_rows_splits_turns(tmp_path: Path) -> None:
    more = [{"from": "human", "value": "and the shape?"}, {"from": "gpt", "value": "circle"}]
    path = write(
        tmp_path / "d.json",
        [
            entry(tier="hard", question_type="color"),
            entry(id=7, tier=None, question_type=None, conversations=entry()["conversations"] + more),
        ],
    )
    got = load_rows(path, tmp_path)
    assert [(r.id, r.prompt, r.expected, r.kind, r.facts.get("tier", "")) for r in got] == [
        ("r1", "what color?", "red", "color", "hard"),
        ("7", "what color?", "red", "", ""),
        ("7#1", "and the shape?", "circle", "", ""),
    ]
    assert got[0].pictures == (tmp_path / "a/b.png",)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "not a list with at least one row"),
        ({"a": 1}, "not a list"),
        ([entry(), entry()], "occurs twice"),
        ([entry(image=None)], "needs `id` and `image`"),
        ([entry(conversations=[{"from": "human", "value": "?"}])], "row 0"),
        ([entry(), entry(id="2", conversations=list(reversed(entry()["conversations"])))], "row 1"),
        ([entry(conversations="hello")], "row 0"),
        ([entry(image="/etc/a.png")], "plain path below the image directory"),
        ([entry(image="../a.png")], "plain path below the image directory"),
        ([entry(image="a/../../b.png")], "plain path below the image directory"),
        ([entry(image=".")], "plain path below the image directory"),
        ([entry(image="c:\\a.png")], "plain path below the image directory"),
        ([entry(id="\ud800")], "surrogates not allowed"),
        ([entry(image="")], "needs `id` and `image`"),
        (["text"], "row 0"),
    ],
)
def test_bad_rows_are_named(value: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        load_rows(write(tmp_path / "d.json", value), tmp_path)


def test_not_json(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("nope")
    with pytest.raises(DataError, match="not readable JSON"):
        load_rows(tmp_path / "d.json", tmp_path)


def test_samples_are_nested_and_take_whole_pictures() -> None:
    all_rows = rows(10)
    small, large = sample_questions(all_rows, 6), sample_questions(all_rows, 15)
    assert len(small) == 6 and large[:6] == small
    assert len({row.image for row in small}) == 2
    assert sample_questions(list(reversed(all_rows)), 6)[0].image == small[0].image  # the file's order does not matter
    assert sample_questions(all_rows, None) == all_rows


def test_evaluate_asks_each_picture_once_and_scores_by_type() -> None:
    runtime = Scripted()
    result = evaluate(runtime, rows())
    assert runtime.shown == [f"{p}.png" for p in range(6)]
    assert result.accuracy.estimate == 1.0 and result.stage == "picture"
    assert {name: score.estimate for name, score in result.by_type.items()} == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert list(result.by_tier) == ["easy"]
    assert [record.id for record in result.records] == [row.id for row in rows()]


def test_blind_run_shows_every_picture_to_another_ones_questions() -> None:
    runtime = Scripted()
    result = evaluate(runtime, rows(), shuffle_pictures_seed=0)
    assert sorted(runtime.shown) == [f"{p}.png" for p in range(6)]
    assert result.accuracy.estimate == 0.0 and result.stage == "blind"
    assert all(record.image == f"{record.id[0]}.png" for record in result.records)


def test_a_cut_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scripted(fail_after=4), rows(), out=out)
    with out.open("a") as handle:
        handle.write('{"schema": 1, "kind": "ans')  # a kill in the middle of a line
    rest = Scripted()
    result = evaluate(rest, rows(), out=out)
    assert rest.shown == ["4.png", "5.png"]
    assert len(result.records) == 18 and result.accuracy.estimate == 1.0
    stored = [AnswerRecord.from_sample(s) for s in read_results([out]) if s.kind == "answer"]
    assert stored == list(result.records)
    again = Scripted()
    assert evaluate(again, rows(), out=out).records == result.records and not again.shown


def test_another_models_answers_are_not_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    evaluate(Scripted(), rows(2), out=out)
    with pytest.raises(DataError, match="another model"):
        evaluate(Scripted(model="m2"), rows(2), out=out)
    with pytest.raises(DataError, match="another model"):
        evaluate(Scripted(), rows(2), out=out, shuffle_pictures_seed=1)


@pytest.mark.parametrize(
    "change", [{"prompt": "else?"}, {"expected": "x"}, {"image": "x.png"}, {"facts": {"tier": "hard"}}, {"id": "new"}]
)
def test_answers_to_other_questions_are_not_resumed(change: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    evaluate(Scripted(), rows(2), out=out)
    with out.open("a") as handle:
        handle.write('{"schema": 1, "kind": "ans')
    before = out.read_bytes()
    other = rows(2)
    other[0] = replace(other[0], **change)
    with pytest.raises(DataError, match="holds answers to other questions"):
        evaluate(Scripted(), other, out=out)
    assert out.read_bytes() == before  # refused before anything is rewritten


def test_a_smaller_limit_reuses_the_answers(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    evaluate(Scripted(), rows(), out=out)
    again = Scripted()
    assert len(evaluate(again, rows(), limit=6, out=out).records) == 6 and not again.shown


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        evaluate(Scripted(), [])


def test_samples_carry_their_environment() -> None:
    samples = evaluate(Scripted(), rows(2)).samples()
    assert samples[0].kind == "environment" and samples[0].detail["runtime"]["bundle_sha256"] == "m1"
    assert {s.environment_id for s in samples} == {samples[0].environment_id}
    assert accuracy(AnswerRecord.from_sample(s) for s in samples[1:]).estimate == 1.0


def test_reference_and_edge_agree_on_real_answers(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The same rows through torch and through ONNX Runtime + llama.cpp in float32: equal answers, joined by id."""
    from PIL import Image

    from tinyllava_edge.benchmarks.stats import flips
    from tinyllava_edge.runtimes.edge import open_edge
    from tinyllava_edge.runtimes.reference import open_reference

    data = []
    for k, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{color}.png")
        data += [entry(id=f"{k}-{q}", image=f"{color}.png") for q in range(2)]
    loaded = load_rows(write(tmp_path / "d.json", data), tmp_path)
    runs = []
    for runtime in (open_reference(tiny_checkpoint), open_edge(tiny_bundle, n_threads=1, allow_unverified=True)):
        runs.append(evaluate(runtime, loaded, out=tmp_path / f"{runtime.name}.jsonl"))
        runtime.close()
    assert [run.runtime for run in runs] == ["reference", "edge"]
    assert all(record.given for run in runs for record in run.records)
    assert flips(runs[0].records, runs[1].records).changed == ()


def test_a_picture_that_changed_is_not_passed_for_the_one_that_was_shown(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    evaluate(Scripted(), rows(2), out=out)
    swapped = [replace(row, pictures=(b"another",)) if row.image == "1.png" else row for row in rows(2)]
    with pytest.raises(DataError, match="1.png: the picture changed since 1-0 was answered"):
        evaluate(Scripted(), swapped, out=out)


def test_a_refused_file_says_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    evaluate(Scripted(), rows(2), out=out)
    with pytest.raises(DataError, match=r"\(differs: bundle_sha256\)"):
        evaluate(Scripted(model="m2"), rows(2), out=out)
