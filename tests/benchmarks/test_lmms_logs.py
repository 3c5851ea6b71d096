"""lmms-eval's logs, in the shape that lmms-eval 0.7's EvaluationTracker writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllava_edge.benchmarks.lmms_logs import METRICS, read_lmms_samples
from tinyllava_edge.benchmarks.stats import align
from tinyllava_edge.errors import DataError

STAMP = "20261127_041000"


def line(number: int, answer: Any = "yes", **metrics: Any) -> dict[str, Any]:
    """One sample as 0.7 writes it: flattened, without `doc` and `arguments`."""
    return {
        "doc_id": number,
        "target": "yes",
        "filtered_resps": answer,
        "token_counts": [{"input_tokens": 109, "output_tokens": 8}],
        "doc_hash": "74234e98",
        **metrics,
        "input": f"Is there a dog? {number}\nAnswer the question using a single word or phrase.",
    }


def pope(number: int, answer: str, score: float) -> dict[str, Any]:
    value = {"question_id": str(number), "score": score, "prediction": answer.lower(), "ground_truth": "yes"}
    return line(number, answer, **{f"pope_{name}": value for name in ("accuracy", "precision", "recall", "f1_score")})


def write(folder: Path, lines: list[Any], task: str = "pope", results: Any = None) -> Path:
    path = folder / f"{STAMP}_samples_{task}.jsonl"
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in lines), encoding="utf-8")
    if results is not None:
        (folder / f"{STAMP}_results.json").write_text(json.dumps(results))
    return path


def run(n: int, task: str = "pope", version: str = "main@1a2b3c4d", offset: int = 0) -> dict[str, Any]:
    return {
        "lmms_eval_version": version,
        "config": {"offset": offset},
        "n-samples": {task: {"original": 9000, "effective": n}},
    }


def test_pope(tmp_path: Path) -> None:
    path = write(tmp_path, [pope(0, "Yes", 1.0), pope(1, "Yes.", 0.0)], results=run(2))
    first, second = read_lmms_samples(path)
    assert first.id == "0"
    assert first.question == "Is there a dog? 0\nAnswer the question using a single word or phrase."
    assert (first.given, first.parsed, first.expected, first.score) == ("Yes", "yes", "yes", 1.0)
    assert (first.task, first.protocol) == ("pope", "lmms-eval/main@1a2b3c4d/pope")
    assert first.facts == {"metric": "pope_accuracy"}
    assert (second.score, second.correct) == (0.0, False)


@pytest.mark.parametrize("version", ["unknown@unknown", "main@unknown", None])
def test_a_version_that_is_not_known_is_left_out(tmp_path: Path, version: Any) -> None:
    path = write(tmp_path, [pope(0, "Yes", 1.0)], results={**run(1), "lmms_eval_version": version})
    assert read_lmms_samples(path)[0].protocol == "lmms-eval/pope"


def test_the_two_mme_metrics_share_one_file(tmp_path: Path) -> None:
    def mme(number: int, kind: str, category: str) -> dict[str, Any]:
        value = {"question_id": f"{category}/0002.png", "category": category, "score": 1.0}
        return line(number, **{f"mme_{kind}_score": value})

    path = write(tmp_path, [mme(0, "perception", "color"), mme(1, "cognition", "code_reasoning")], "mme")
    first, second = read_lmms_samples(path)
    assert (first.score, second.score) == (1.0, 1.0)
    assert [r.facts["metric"] for r in (first, second)] == ["mme_perception_score", "mme_cognition_score"]
    assert (first.image, first.unit, first.question_type) == ("color/0002.png", "color/0002.png", "color")


@pytest.mark.parametrize("task", ["gqa", "textvqa_val", "vqav2_val", "scienceqa_img", "vizwiz_vqa_val"])
def test_exact_match(tmp_path: Path, task: str) -> None:
    path = write(tmp_path, [line(0, exact_match=0.3), line(1, exact_match=1)], task)
    assert [record.score for record in read_lmms_samples(path)] == [0.3, 1.0]


def test_a_judge_that_speaks_at_the_end_leaves_no_score(tmp_path: Path) -> None:
    value = {"index": 7, "question": "?", "answer": "A", "prediction": "A", "category": "ocr", "A": "one", "hint": ""}
    path = write(tmp_path, [line(0, gpt_eval_score=value, submission=value)], "mmbench_en_dev")
    (record,) = read_lmms_samples(path)
    assert (record.score, record.parsed, record.question_type) == (None, "A", "ocr")


def test_a_judge_that_speaks_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, [line(0, gpt_eval_score={"score": 0.4, "pred_answer": "a dog"})], "mmvet")
    assert read_lmms_samples(path)[0].score == 0.4


def test_an_unknown_task_takes_the_first_metric_that_holds_on_every_line(tmp_path: Path) -> None:
    lines = [
        line(0, length=1, acc_score={"score": 1.0}, format_score=1.0),
        line(1, length=37, acc_score={"score": 0.5}, format_score=0.0),
    ]
    records = read_lmms_samples(write(tmp_path, lines, "ours"))
    assert [record.score for record in records] == [1.0, 0.5]
    assert records[0].facts == {"metric": "acc_score"}


@pytest.mark.parametrize(
    "metrics",
    [{}, {"loss": 3.5}, {"note": "1.0"}, {"odd": {"score": {"score": 1}}}, {"value": float("nan")}, {"submission": 1}],
)
def test_an_unknown_task_without_a_share_has_no_score(tmp_path: Path, metrics: dict[str, Any]) -> None:
    (record,) = read_lmms_samples(write(tmp_path, [line(0, **metrics)], "ours"))
    assert record.score is None
    assert record.facts == {}


def test_a_task_named_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path, [pope(0, "Yes", 1.0)]).rename(tmp_path / "peer.jsonl")
    with pytest.raises(DataError, match="tells no task"):
        read_lmms_samples(path)
    assert read_lmms_samples(path, "pope")[0].score == 1.0


def test_a_task_name_with_the_mark_in_it(tmp_path: Path) -> None:
    assert read_lmms_samples(write(tmp_path, [line(0)], "a_samples_b"))[0].task == "a_samples_b"


@pytest.mark.parametrize(
    ("extra", "image"),
    [
        ({"doc": {"imageId": 2405722}}, "2405722"),
        ({"doc": {"image_id": "0a1b", "image": {"height": 3}}}, "0a1b"),
        ({"doc": {"image_source": "COCO_val2014_000000310196", "category": "random"}}, "COCO_val2014_000000310196"),
        ({"doc": {"image": {"height": 3}, "imageId": True}}, ""),
        ({"doc": None, "input_media": ["val/a.png"]}, "val/a.png"),
        ({"input_media": ["/home/me/set/val/a.png"]}, "val/a.png"),
        ({"input_media": ["data:image/png;base64,AAAA"]}, ""),
        ({"input_media": ["a.png", "b.png"]}, ""),
        ({}, ""),
    ],
)
def test_the_picture_where_the_log_names_one(tmp_path: Path, extra: dict[str, Any], image: str) -> None:
    assert read_lmms_samples(write(tmp_path, [{**line(0), **extra}], "ours"))[0].image == image


def test_other_versions_keep_lists_and_arguments(tmp_path: Path) -> None:
    old = line(0, ["red"], exact_match=1.0)
    old["arguments"] = [[old.pop("input"), {"until": ["\n\n"]}, 0, "gqa", "testdev"]]
    old["target"] = ["red", "crimson"]
    (record,) = read_lmms_samples(write(tmp_path, [old], "gqa"))
    assert record.given == "red"
    assert record.question.startswith("Is there a dog? 0")
    assert record.expected == '["red", "crimson"]'


def test_of_repeated_answers_the_first_counts(tmp_path: Path) -> None:
    assert read_lmms_samples(write(tmp_path, [line(0, ["yes", "no", "yes"])], "ours"))[0].given == "yes"


@pytest.mark.parametrize("answer", [["-3.25", "True"], [["-0.5", "False"], ["-inf", "True"]], ["-1e-05", "False"]])
def test_log_likelihoods_are_no_answers(tmp_path: Path, answer: Any) -> None:
    with pytest.raises(DataError, match=r"ours\.jsonl:1: holds log-likelihoods"):
        read_lmms_samples(write(tmp_path, [line(0, answer)], "ours"))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"doc_id": True}, "`doc_id` is a bool"),
        ({"doc_id": None}, "`doc_id` is a NoneType"),
        ({"doc_id": 0.5}, "`doc_id` is a float"),
        ({"doc_id": 0}, "doc_id 0 occurs twice"),
        ({"doc_id": "0"}, "doc_id 0 occurs twice"),
        ({"filtered_resps": []}, "holds no answer but a list"),
        ({"filtered_resps": [None]}, "holds no answer but a NoneType"),
        ({"filtered_resps": {"a": 1}}, "holds no answer but a dict"),
        ({"filtered_resps": 3}, "holds no answer but a int"),
        ({"input": 3}, "neither `input` nor `arguments`"),
        ({"input": []}, "neither `input` nor `arguments`"),
        ({"pope_accuracy": 1.5}, "`pope_accuracy` is '1.5', not a number in 0..1"),
        ({"pope_accuracy": -1}, "not a number in 0..1"),
        ({"pope_accuracy": {"score": "1.0"}}, "not a number in 0..1"),
        ({"pope_accuracy": {"score": float("nan")}}, "not a number in 0..1"),
        ({"pope_accuracy": {"score": {"score": False}}}, "not a number in 0..1"),
        ({"pope_accuracy": [1]}, "not a number in 0..1"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    path = write(tmp_path, [pope(0, "Yes", 1.0), {**pope(1, "Yes", 1.0), **broken}])
    with pytest.raises(DataError) as caught:
        read_lmms_samples(path)
    assert f"{path}:2: " in caught.value.message
    assert message in caught.value.message


@pytest.mark.parametrize("key", ["doc_id", "target", "filtered_resps", "input"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    lacking = pope(0, "Yes", 1.0)
    del lacking[key]
    with pytest.raises(DataError, match=rf"pope\.jsonl:1: .*`{key}`"):
        read_lmms_samples(write(tmp_path, [lacking]))


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b'{"doc_id": 0', ":1: not a JSON line"),
        (b"[1]\n", ":1: not a JSON object"),
        (b"\xff\xfe\n", ":1: not a JSON line"),
        (b"[" * 100_000, ":1: not a JSON line"),
        (b'{"doc_id": 0, "filtered_resps": "\\ud800"}\n', ":1: not a JSON line"),
        (b"", ": holds no samples"),
        (b"\n \n", ": holds no samples"),
    ],
)
def test_damaged_files(tmp_path: Path, data: bytes, where: str) -> None:
    path = tmp_path / f"{STAMP}_samples_pope.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_lmms_samples(path)
    assert caught.value.message.startswith(f"{path}{where}")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_lmms_samples(tmp_path / f"{STAMP}_samples_pope.jsonl")


def test_a_log_that_was_cut_between_two_lines(tmp_path: Path) -> None:
    path = write(tmp_path, [pope(0, "Yes", 1.0)], results=run(3))
    with pytest.raises(DataError, match="1 of 3 samples"):
        read_lmms_samples(path)
    write(tmp_path, [pope(2, "Yes", 1.0)], results=run(3, offset=2))  # n-samples doesn't count what --offset left out
    assert len(read_lmms_samples(path)) == 1


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_damaged_results_file(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, [pope(0, "Yes", 1.0)])
    (tmp_path / f"{STAMP}_results.json").write_text(text)
    with pytest.raises(DataError, match=r"_results\.json: not"):
        read_lmms_samples(path)


@pytest.mark.parametrize("results", [{}, {"n-samples": 3, "config": []}, {"n-samples": {"pope": None}, "config": None}])
def test_a_results_file_that_says_little(tmp_path: Path, results: Any) -> None:
    assert len(read_lmms_samples(write(tmp_path, [pope(0, "Yes", 1.0)], results=results))) == 1


def test_two_runs_are_joined_by_doc_id(tmp_path: Path) -> None:
    """Several processes leave their samples one after the other."""
    (tmp_path / "b").mkdir()
    one = write(tmp_path, [pope(n, "Yes", 1.0) for n in (0, 1, 2)])
    other = write(tmp_path / "b", [pope(n, "No", 0.0) for n in (0, 2, 1)])
    pairs = align(read_lmms_samples(one), read_lmms_samples(other))
    assert [(a.id, b.id) for a, b in pairs] == [("0", "0"), ("1", "1"), ("2", "2")]


def test_line_breaks_inside_answers(tmp_path: Path) -> None:
    path = write(tmp_path, [line(0, "a\u2028b\nc\x85d")], "ours")
    assert read_lmms_samples(path)[0].given == "a\u2028b\nc\x85d"


def test_every_metric_of_the_table_is_read(tmp_path: Path) -> None:
    for task, keys in METRICS.items():
        for key in keys:
            (record,) = read_lmms_samples(write(tmp_path, [line(0, **{key: {"score": 0.5}})], task))
            assert (record.score, record.facts) == (0.5, {"metric": key})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["score", "category", "x"]), inner),
    max_leaves=6,
)
KEYS = st.sampled_from([*line(0), "doc", "arguments", "input_media", "pope_accuracy", "exact_match"])


@settings(max_examples=300, deadline=None)
@given(task=st.sampled_from(["pope", "mme", "ours"]), changes=st.lists(st.tuples(KEYS, VALUES), max_size=4))
def test_any_line_is_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, task: str, changes: list[tuple[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / f"{STAMP}_samples_{task}.jsonl"
    path.write_text(json.dumps({**pope(0, "Yes", 1.0), **dict(changes)}) + "\n", encoding="utf-8")
    try:
        (record,) = read_lmms_samples(path)
    except DataError as error:
        assert error.message.startswith(f"{path}:1: ")
        assert "\n" not in error.message
    else:
        assert record.score is None or 0 <= record.score <= 1
        assert all(isinstance(v, str) for v in (record.given, record.question, record.expected, record.image))
