"""Shards, resuming a piece that was not finished, merging, and the file's figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks.evaluation import EvalResult, evaluate, pieces_of
from tinyllava_edge.benchmarks.results import AnswerRecord, read_results, write_results
from tinyllava_edge.benchmarks.run_file import Shard, parse_shard
from tinyllava_edge.benchmarks.scoring import finish_file, merge_files
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.benchmarks.tasks.llava_json import EXACT
from tinyllava_edge.benchmarks.tasks.mmvet import TASK as MMVET
from tinyllava_edge.errors import DataError, UsageError

from .test_evaluation import Scripted, rows


def shards(folder: Path, count: int, questions: list[Question], at_once: int = 2) -> list[Path]:
    paths = []
    for index in range(count):
        path = folder / f"{index}.jsonl"
        found = evaluate(Scripted(at_once=at_once), questions, shard=Shard(index, count), out=path)
        assert finish_file(path, EXACT, found, "m") == {}  # a part has no score
        paths.append(path)
    return paths


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_merged_shards_equal_one_run(count: int, tmp_path: Path) -> None:
    questions = rows(9)
    questions[4] = replace(questions[4], expected="something else")
    whole = evaluate(Scripted(at_once=2), questions, out=tmp_path / "whole.jsonl")
    figures = finish_file(tmp_path / "whole.jsonl", EXACT, whole, "m")
    samples, run, records = merge_files(shards(tmp_path, count, questions))
    assert tuple(records) == whole.records and run == whole.run
    write_results(tmp_path / "merged.jsonl", samples)
    merged = EvalResult("edge", "fp32+f16", "picture", tuple(records), {}, run)
    assert finish_file(tmp_path / "merged.jsonl", EXACT, merged, "m") == figures
    assert figures["accuracy"] == 100 * 26 / 27
    lines = [read_results([tmp_path / name]) for name in ("whole.jsonl", "merged.jsonl")]
    kinds = ("answer", "accuracy")
    assert [s for s in lines[0] if s.kind in kinds] == [s for s in lines[1] if s.kind in kinds]


def test_a_piece_is_computed_together_wherever_it_runs() -> None:
    """The reference computes pictures in groups, and an answer's last bits depend on the group."""
    whole = Scripted(at_once=4)
    evaluate(whole, rows(10))
    parts = [Scripted(at_once=4) for _ in range(3)]
    for index, part in enumerate(parts):
        evaluate(part, rows(10), shard=Shard(index, 3))
    assert sorted(whole.calls) == sorted(call for part in parts for call in part.calls)
    assert [len(call) for call in whole.calls] == [4, 4, 2]


def test_an_unfinished_piece_is_asked_again_whole(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    first = evaluate(Scripted(at_once=3), rows(6), out=out)
    text = out.read_text().splitlines(keepends=True)
    out.write_text("".join(text[: 2 + 9 + 4]))  # environment, run, a piece of nine answers, four of the next
    again = Scripted(at_once=3)
    assert evaluate(again, rows(6), out=out).records == first.records
    assert again.calls == [["3.png", "4.png", "5.png"]]
    finish_file(out, EXACT, first, "m")
    ids = [s.detail["id"] for s in read_results([out]) if s.kind == "answer"]
    assert ids == [question.id for question in rows(6)]


def test_a_judges_scores_outlast_the_same_command_without_a_judge(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    facts = {"capability": ["rec"]}
    questions = [replace(question, gold="g", facts=facts) for question in rows(2, 1)]
    first = evaluate(Scripted(), questions, MMVET, out=out)
    spoken = {"judge": "j", "replies": ["x", "0.5"]}
    judged = tuple(replace(r, parsed="0.5", score=0.5, facts={**r.facts, **spoken}) for r in first.records)
    figures = finish_file(out, MMVET, replace(first, records=judged), "m")
    again = evaluate(Scripted(), questions, MMVET, out=out)
    assert again.records == judged and figures["total"] == 50
    assert finish_file(out, MMVET, again, "m") == figures


def test_what_can_not_be_merged(tmp_path: Path) -> None:
    paths = shards(tmp_path, 3, rows(9))
    with pytest.raises(DataError, match="another count than the 2 files"):
        merge_files(paths[:2])
    with pytest.raises(DataError, match="the same shard"):
        merge_files([paths[0], paths[1], paths[1]])
    other = evaluate(Scripted(), rows(8), shard=Shard(2, 3), out=tmp_path / "other.jsonl")
    assert other.records
    with pytest.raises(DataError, match="another evaluation"):
        merge_files([*paths[:2], tmp_path / "other.jsonl"])
    paths[2].write_text("".join(paths[2].read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="26 of 27 answers"):
        merge_files(paths)
    evaluate(Scripted(), rows(3), out=tmp_path / "whole.jsonl")
    with pytest.raises(DataError, match="is no shard"):
        merge_files([tmp_path / "whole.jsonl"])


def test_shards_of_two_models_with_one_name_are_not_merged(tmp_path: Path) -> None:
    """A build's name says how it was made, not of what: another bundle has the same ones."""
    paths = shards(tmp_path, 2, rows(4))
    paths[1].unlink()
    evaluate(Scripted(at_once=2, model="m2"), rows(4), shard=Shard(1, 2), out=paths[1])
    with pytest.raises(DataError, match="1.jsonl: answers of another model than .*0.jsonl"):
        merge_files(paths)


def test_a_question_without_a_picture_stands_alone() -> None:
    names = ("a", "text", "b", "c")
    groups = {name: [Question(name, "?", pictures=(b"x",) if name != "text" else ())] for name in names}
    shown = {name: None if name == "text" else b"x" for name in groups}
    assert pieces_of(groups, shown, 8) == [["a"], ["text"], ["b", "c"]]
    found = evaluate(Scripted(), [Question("t", "what?"), *rows(1)])
    assert [record.given for record in found.records][0] == "no picture" and found.records[0].image_sha256 == ""


def test_records_say_what_was_asked_and_shown() -> None:
    import hashlib

    record = evaluate(Scripted(), rows(1)).records[0]
    system = "A chat between a curious user and an artificial intelligence assistant. "
    system += "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    asked = system + "USER: <image>\nquestion 0? ASSISTANT:"
    assert record.prompt_sha256 == hashlib.sha256(asked.encode()).hexdigest()
    assert record.image_sha256 == hashlib.sha256(b"0.png").hexdigest()
    assert (record.parsed, record.score, record.n_prompt_tokens, record.token_ids) == ("0.png", 1.0, 1, (1,))
    assert AnswerRecord.from_sample(record.to_sample("edge", "b", "picture", 0, "e")) == record


@pytest.mark.parametrize(
    ("text", "environment", "found"),
    [
        ("", {}, None),
        ("0/1", {}, Shard(0, 1)),
        ("3/4", {}, Shard(3, 4)),
        ("auto", {"RANK": "2", "WORLD_SIZE": "8"}, Shard(2, 8)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "5"}, Shard(3, 5)),
        (
            "auto",
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"},
            Shard(2, 3),
        ),
        ("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Shard(1, 2)),
    ],
)
def test_parse_shard(text: str, environment: dict[str, str], found: Shard | None) -> None:
    assert parse_shard(text, environment) == found


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "a/b", "1/0", "1/4/2", "auto", "½/2", "0x1/2"])
def test_parse_shard_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="--shard"):
        parse_shard(text, {})


def test_every_figure_has_its_own_unit() -> None:
    from tinyllava_edge.benchmarks.scoring import score_samples
    from tinyllava_edge.benchmarks.tasks import find

    task = replace(find("mme"), metrics=lambda records: {"perception": 1500.0, "OCR/acc+": 50.0, "tasks": 14.0})
    records = [AnswerRecord("1", "a.png", "?", "yes", "yes", task="mme", score=1.0)]
    found = score_samples(task, records, "edge", "b", "picture", "e", "m")
    assert [sample.unit for sample in found] == ["points", "%", "tasks"]
