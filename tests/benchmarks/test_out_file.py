"""Targets that must not be overwritten, companions that patterns find, damaged shards, and flags that contradict."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinyllava_edge import cli_eval
from tinyllava_edge.benchmarks.compare import compare_files, read_runs
from tinyllava_edge.benchmarks.evaluation import evaluate
from tinyllava_edge.benchmarks.explain import explain
from tinyllava_edge.benchmarks.out_file import (
    append_results,
    check_replaceable,
    check_target,
    check_writable,
    without_companions,
)
from tinyllava_edge.benchmarks.paper import write_paper_report
from tinyllava_edge.benchmarks.results import Sample, read_results, write_results
from tinyllava_edge.benchmarks.run_file import Shard
from tinyllava_edge.benchmarks.scoring import finish_file, merge_files
from tinyllava_edge.benchmarks.tasks import find
from tinyllava_edge.benchmarks.tasks.llava_json import EXACT
from tinyllava_edge.errors import DataError, ImageError, StorageError, UsageError

from .test_evaluation import Scripted, rows


def shards(folder: Path) -> list[Path]:
    paths = []
    for index in range(2):
        paths.append(folder / f"{index}.jsonl")
        found = evaluate(Scripted(at_once=2), rows(4), shard=Shard(index, 2), out=paths[-1])
        finish_file(paths[-1], EXACT, found, "m")
    return paths


def changed(path: Path, kind: str, change: Any) -> None:
    """Rewrite the first line of a kind."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(next(line for line in lines if line["kind"] == kind), lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_pipe_or_a_directory_is_not_replaced(tmp_path: Path) -> None:
    """A rename would put a file in the place of a device: /dev/null, for whoever runs as root."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path):
        with pytest.raises(UsageError, match="no regular file"):
            check_target(place)
        with pytest.raises(UsageError, match="no regular file"):
            evaluate(Scripted(), rows(2), out=place)
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_what_is_read_is_not_overwritten(tmp_path: Path) -> None:
    given = tmp_path / "r.submission.json"
    given.write_text("x")
    for out in (given, tmp_path / "r.jsonl"):  # the second one's submission would be written to the first
        with pytest.raises(UsageError, match="would overwrite"):
            check_target(out, [given])
    check_target(tmp_path / "s.jsonl", [given])


def test_given_answers_beside_the_results_stay_as_they_are(tmp_path: Path) -> None:
    from tinyllava_edge.eval_commands import write_official

    given, out = tmp_path / "r.answers.jsonl", tmp_path / "r.jsonl"
    given.write_text("as it came")
    result = evaluate(Scripted(), rows(1, 1))
    assert write_official(EXACT, result, out, "m", print, whole=True, given=given) == []
    assert given.read_text() == "as it came"
    assert write_official(EXACT, result, out, "m", print, whole=True) == [given]
    assert json.loads(given.read_text())["model_id"] == "m"


def test_only_our_own_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    check_replaceable(path, lambda samples: False)
    path.write_text("precious\n")
    with pytest.raises(DataError, match="no results file"):
        check_replaceable(path, lambda samples: True)
    write_results(path, [Sample("command", detail={"command": "x"})])
    with pytest.raises(DataError, match="another run"):
        check_replaceable(path, lambda samples: False)
    check_replaceable(path, lambda samples: [sample.kind for sample in samples] == ["command"])


def test_a_pattern_finds_companions_which_are_left_out(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    beside = [tmp_path / f"{k}{end}" for k in range(2) for end in (".answers.jsonl", ".replies.jsonl")]
    for path in beside:
        path.write_text('{"question_id": 1, "text": "x"}\n')
    alone = tmp_path / "elsewhere.answers.jsonl"
    assert without_companions([*beside, *paths, alone]) == [*paths, alone]
    _, run, records = merge_files(sorted([*beside, *paths]))
    assert run.shard is None and len(records) == run.asked
    write_paper_report(sorted([*beside, *paths]), tmp_path / "paper.md")
    with pytest.raises(UsageError, match="would overwrite"):
        write_paper_report([tmp_path / "paper.md"], tmp_path / "paper.md")
    with pytest.raises(DataError, match="answers without scores"):
        read_runs(alone if alone.write_text('{"question_id": 1}\n') else alone)


def test_a_question_twice_and_another_missing_is_no_score(tmp_path: Path) -> None:
    paths = shards(tmp_path)

    def repeat(first: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        first["detail"] = [line for line in lines if line["kind"] == "answer"][1]["detail"]

    changed(paths[1], "answer", repeat)
    with pytest.raises(DataError, match=r"1.jsonl: question .* twice"):
        merge_files(paths)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("answer", {"build": "other"}, "1.jsonl: answer .* another run"),
        ("answer", {"detail": {"task": "gqa"}}, "1.jsonl: answer .* another run"),
        ("answer", {"detail": {"protocol": "other"}}, "1.jsonl: answer .* another run"),
        ("answer", {"detail": {"given": 5}}, "1.jsonl: an answer line's 'given'"),
        ("answer", {"sample": 10**9}, "1.jsonl: question .* out of place"),
        ("run", {"detail": {"shard": "x"}}, "1.jsonl: a run line is damaged"),
        ("run", {"detail": {"n": "7"}}, "1.jsonl: a run line is damaged"),
    ],
)
def test_damaged_shards_are_named(kind: str, change: dict[str, Any], says: str, tmp_path: Path) -> None:
    paths = shards(tmp_path)

    def apply(line: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        detail = {**line["detail"], **change.get("detail", {})}
        line.update({**change, "detail": detail})

    changed(paths[1], kind, apply)
    with pytest.raises(DataError, match=says):
        merge_files(paths)


def test_a_shard_that_was_cut_in_a_line_is_said_to_be_unfinished(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-9])
    with pytest.raises(DataError, match="11 of 12 answers") as caught:
        merge_files(paths)
    assert "the same command resumes it" in caught.value.hint


class Blind(Scripted):
    """Can't read a picture."""

    def answer_pictures(self, items: Any, *, max_tokens: int) -> Iterator[Any]:
        raise ImageError("image of 4 bytes: not a picture in a known format", "give a PNG")


def test_a_picture_inside_the_set_is_named_by_its_question() -> None:
    questions = [replace(question, pictures=(b"junk",)) for question in rows(1, 1)]
    with pytest.raises(ImageError, match=f"picture of question {questions[0].id}: image of 4 bytes"):
        evaluate(Blind(), questions)


def lines(*values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return iter([("line", value) for value in values])


@pytest.mark.parametrize("answers", [5, {"a": 1}, [[]], [], ["a", "b"]])
@pytest.mark.parametrize("name", ["easy_vqa", ""])
def test_an_annotation_of_another_type_is_not_scored(name: str, answers: Any) -> None:
    with pytest.raises(DataError, match="answers"):
        list(explain(find(name), lines({"text": "a", "answers": answers})))


def test_without_an_annotation_nothing_is_scored() -> None:
    for line in ({"text": "a"}, {"text": "", "answers": None}):
        (found,) = explain(find("easy_vqa"), lines(line))
        assert found["score"] is None
    (found,) = explain(find("easy_vqa"), lines({"text": "", "answers": ""}))
    assert found["score"] == 1


@pytest.mark.parametrize("line", [{"answers": []}, {"answers": "Z", "options": ["x"]}])
def test_mmmu_names_an_annotation_that_can_not_be(line: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="none of the options"):
        list(explain(find("mmmu"), lines({"text": "B", **line})))


def test_strict_needs_a_drop(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="strict"):
        compare_files(tmp_path / "a.jsonl", [], strict=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", ",", "--answers", "a"], "names no task"),
        (["--task", "pope", "--explain", "-", "-o", "x.jsonl"], "only shows"),
        (["--task", "pope", "--explain", "-", "--limit", "3"], "only shows"),
        (["--task", "pope", "--answers", "a", "--build", "int8"], "without --build"),
        (["--task", "easy_vqa", "--answers", "a", "--judge-replies", "r", "-o", "x"], "no task here is judged"),
    ],
)
def test_flags_that_would_have_no_effect_are_refused(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(cli_eval.eval_app, arguments)
    assert isinstance(done.exception, UsageError) and says in str(done.exception)


def test_a_mistyped_file_is_named() -> None:
    done = CliRunner().invoke(cli_eval.eval_app, ["nowhere.jsonl", "--task", "pope", "--explain"])
    assert isinstance(done.exception, DataError) and "nowhere.jsonl" in str(done.exception)


def test_a_judge_without_a_place_for_its_replies_is_refused_before_anything_is_asked() -> None:
    from tinyllava_edge.benchmarks.judge import ReplayJudge
    from tinyllava_edge.eval_commands import Asking, check_judge

    judge = ReplayJudge(Path("r.jsonl"))
    with pytest.raises(UsageError, match="beside the answers"):
        check_judge([find("mmvet"), find("pope")], Asking(judge=judge))
    check_judge([find("mmvet"), find("pope")], Asking(judge=judge, out=Path("x.jsonl")))
    with pytest.raises(UsageError, match="no task here"):
        check_judge([find("pope")], Asking(judge=judge, out=Path("x.jsonl")))


LINE = Sample("latency", "edge", "b", "ttft_ms", 1.0, "ms")


def test_lines_of_two_processes_both_stay(tmp_path: Path) -> None:
    """Each reads what stands there when it writes, not when it began."""
    import multiprocessing

    target = tmp_path / "new" / "run.jsonl"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.starmap(append_results, [(target, [replace(LINE, sample=n)]) for n in range(12)])
    assert sorted(sample.sample for sample in read_results([target])) == list(range(12))


@pytest.mark.parametrize("spelled", ["file/run.jsonl", "pipe", "."])
def test_impossible_places_are_refused_before(tmp_path: Path, spelled: str) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((UsageError, StorageError), match=r"file|pipe|regular"):
        check_writable(tmp_path / spelled)
    check_writable(tmp_path / "a" / "b" / "run.jsonl")
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
        and (tmp_path / "file").read_text() == "mine"
    )


def test_what_cannot_be_written_is_kept_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text("no results\n")
    with pytest.raises(DataError) as caught:
        append_results(tmp_path / "run.jsonl", [LINE])
    rescue = Path(caught.value.hint.rpartition("kept in ")[2])
    assert read_results([rescue]) == [LINE] and (tmp_path / "run.jsonl").read_text() == "no results\n"
    rescue.unlink()
