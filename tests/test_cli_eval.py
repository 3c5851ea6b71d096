"""`eval`, `eval merge`, `compare`, `divergence` as people type them, on a tiny bundle and three-picture data sets."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinyllava_edge.benchmarks.results import read_results

PROGRAM = [sys.executable, "-m", "tinyllava_edge.cli"]
COLORS = ("red", "green", "blue")


def call(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300, input=text)


def found(*arguments: object) -> Any:
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA's layout with three pictures and six questions a split."""
    root = tmp_path_factory.mktemp("data") / "pope"
    (root / "val2014").mkdir(parents=True)
    (root / "coco").mkdir()
    questions: list[dict[str, Any]] = []
    for offset, split in ((0, "adversarial"), (10_000_000, "random"), (20_000_000, "popular")):
        labels = []
        for k in range(6):
            name = f"COCO_val2014_{k // 2:012d}.jpg"
            Image.new("RGB", (80, 60), COLORS[k // 2]).save(root / "val2014" / name)
            text = f"Is there a {split} thing number {k} in the image?"
            labels.append({"question_id": k + 1, "image": name, "text": text, "label": "yes" if k % 2 else "no"})
            suffix = "\nAnswer the question using a single word or phrase."
            questions.append({"question_id": offset + k + 1, "image": name, "text": text + suffix, "category": split})
        (root / "coco" / f"coco_pope_{split}.json").write_text("".join(json.dumps(x) + "\n" for x in labels))
    (root / "llava_pope_test.jsonl").write_text("".join(json.dumps(x) + "\n" for x in questions))
    return root


def test_a_task_on_a_bundle_a_checkpoint_and_a_file_of_answers(
    tiny_bundle: Path, tiny_checkpoint: Path, pope: Path, tmp_path: Path
) -> None:
    build = tmp_path / "build.jsonl"
    options = ["--task", "pope", "--data", pope, "-t", "1"]
    scored = found("eval", tiny_bundle, *options, "--build", "fp32+f16", "--allow-unverified", "-o", build)
    entry = scored["results"]["pope"]["fp32+f16"]
    assert entry["n"] == 18 and entry["protocol"].startswith("pope") and 0 <= entry["scores"]["f1"] <= 100
    # the answers, written in LLaVA's format, score the same as a file from elsewhere
    again = found("eval", "--answers", tmp_path / "build.answers.jsonl", "--task", "pope", "--data", pope.parent)
    assert again["results"]["pope"]["build.answers"]["scores"] == entry["scores"]
    # a cut run goes on: nothing is asked twice
    text = build.read_text().splitlines(keepends=True)
    first = [line for line in text[2:] if "COCO_val2014_000000000000.jpg" in line]
    build.write_text("".join(text[:2] + first) + text[5][:40])
    command = ["eval", tiny_bundle, *options, "--build", "fp32+f16", "--allow-unverified", "-o", build]
    resumed = call(*command)
    assert resumed.returncode == 0 and "2 of 2 pictures" in resumed.stderr, resumed.stderr
    kept = [s.detail["id"] for s in read_results([build]) if s.kind == "answer"]
    lines = (tmp_path / "build.answers.jsonl").read_text().splitlines()
    assert kept == [str(json.loads(line)["question_id"]) for line in lines] and len(first) == 6
    typed = [s.detail["command"] for s in read_results([build]) if s.kind == "command"]
    assert shlex.join(["tinyllava-edge", *map(str, command)]) in typed and len(typed) == len(set(typed))
    # the checkpoint, compared with the build
    reference = tmp_path / "reference.jsonl"
    found("eval", tiny_checkpoint, *options, "-o", reference)
    compared = call("compare", reference, build, "--max-drop", "0.5", "--confidence", "0.95")
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "pope" in compared.stdout and "fp32+f16" in compared.stdout
    page = tmp_path / "paper.md"
    assert call("report", build, "--paper", "-o", page).returncode == 0
    assert "fp32+f16" in page.read_text()  # POPE's column is there without any score


def test_a_build_that_lost_too_much_fails_the_gate(tmp_path: Path, pope: Path) -> None:
    """Answers made by hand: all right against nearly all wrong."""
    labels = [json.loads(line) for split in ("adversarial", "random", "popular")
              for line in (pope / "coco" / f"coco_pope_{split}.json").read_text().splitlines()]  # fmt: skip
    asked = [json.loads(line) for line in (pope / "llava_pope_test.jsonl").read_text().splitlines()]
    paths = {}
    says = {True: "Yes", False: "No"}
    for name, right in (("good", True), ("bad", False)):
        answers = [
            {"question_id": q["question_id"], "prompt": q["text"], "text": says[(row["label"] == "yes") == right]}
            for q, row in zip(asked, labels, strict=True)
        ]
        path = tmp_path / f"{name}.answers.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in answers))
        paths[name] = tmp_path / f"{name}.jsonl"
        entry = found("eval", "--answers", path, "--task", "pope", "--data", pope, "-o", paths[name])
        assert entry["results"]["pope"][f"{name}.answers"]["scores"]["f1"] == (100 if right else 0)
    gate = ["--max-drop", "0.5", "--confidence", "0.95"]
    assert call("compare", paths["good"], paths["good"], *gate).returncode == 0
    failed = call("compare", paths["good"], paths["bad"], *gate)
    assert failed.returncode == 1 and "worse than allowed" in failed.stdout, failed.stdout


def test_shards_merge_to_the_same_scores(tiny_bundle: Path, pope: Path, tmp_path: Path) -> None:
    options = ["--task", "pope", "--data", pope, "-t", "1", "--build", "fp32+f16", "--allow-unverified"]
    whole = found("eval", tiny_bundle, *options, "-o", tmp_path / "whole.jsonl")
    parts = []
    for index in range(2):
        parts.append(tmp_path / f"part-{index}.jsonl")
        part = found("eval", tiny_bundle, *options, "--shard", f"{index}/2", "-o", parts[-1])
        assert part["results"]["pope"]["fp32+f16"]["scores"] == {}
    merged = found("eval", "merge", *parts, "-o", tmp_path / "merged.jsonl")
    assert merged["scores"] == whole["results"]["pope"]["fp32+f16"]["scores"]
    answers = [(tmp_path / f"{name}.answers.jsonl").read_text() for name in ("whole", "merged")]
    assert answers[0] == answers[1]
    typed = [s.detail["command"] for s in read_results([tmp_path / "merged.jsonl"]) if s.kind == "command"]
    assert len(typed) == 3 and sum("--shard" in line for line in typed) == 2 and "eval merge" in " ".join(typed)


def test_explain_reads_files_and_stdin(tmp_path: Path) -> None:
    lines = '{"text": "Yes. No", "answers": "yes"}\n{"text": "", "answers": "no"}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    ways = [
        call("eval", "--task", "pope", "--explain", "-", "--json", text=lines),
        call("eval", "--task", "pope", "--explain", "--json", text=lines),
        call("eval", "--task", "pope", "--json", "--explain", text=lines),
        call("eval", "--task", "pope", "--explain", tmp_path / "a.jsonl", "--json"),
        call("eval", tmp_path / "a.jsonl", "--task", "pope", "--explain", "--json"),
    ]
    assert len({done.stdout for done in ways}) == 1, [done.stderr for done in ways]
    values = [json.loads(line) for line in ways[0].stdout.splitlines()]
    assert [(v["parsed"], v["score"]) for v in values] == [("yes", 1.0), ("yes", 0.0)]
    shown = call("eval", "--task", "pope", "--explain", "-", text=lines).stdout.splitlines()
    assert shown[0].endswith("score 1") and "'Yes. No'" in shown[0]


def test_divergence(tiny_bundle: Path, tiny_checkpoint: Path, pope: Path, tmp_path: Path) -> None:
    out = tmp_path / "kl.jsonl"
    options = ["--against", tiny_checkpoint, "--task", "pope", "--data", pope, "--limit", "4", "-n", "3", "-o", out]
    value = found("divergence", tiny_bundle, *options, "--allow-unverified")
    causes = {sample.stage for sample in read_results([out]) if sample.kind == "divergence"}
    assert {"again", "preprocess", "llm", "vision", "both"} <= causes == {row["cause"] for row in value["rows"]}
    (typed,) = [s.detail["command"] for s in read_results([out]) if s.kind == "command"]
    assert typed.startswith(f"tinyllava-edge divergence {tiny_bundle} --against")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["eval"], 2, "merge"),
        (["eval", "run"], 2, "nothing to score"),
        (["eval", "nowhere", "--task", "nope"], 2, "unknown task"),
        (["eval", "nowhere", "--task", "pope"], 2, "llava_pope_test.jsonl"),
        (["eval", "nowhere", "--task", "pope", "--data", "nowhere"], 1, "nowhere: no directory"),
        (["eval", "nowhere", "--task", "pope", "--data", "."], 1, "github.com"),
        (["eval", "nowhere", "--shard", "2/2"], 2, "counted from 0"),
        (["eval", "nowhere", "--judge-model", "m"], 2, "--judge-url"),
        (["eval", "nowhere", "--judge-url", "http://x"], 2, "--judge-model"),
        (["eval", "nowhere", "--runtime", "tpu"], 2, "unknown runtime"),
        (["eval", "--answers", "nowhere", "--task", "pope,mme"], 2, "one task"),
        (["eval", "--answers", "nowhere"], 1, "nowhere"),
        (["eval", "--task", "pope", "--explain", "nowhere"], 1, "nowhere"),
        (["eval", "merge", "nowhere", "-o", "x.jsonl"], 1, "nowhere"),
        (["compare", "nowhere"], 1, "nowhere"),
        (["divergence", "nowhere", "--against", "nowhere"], 1, "nowhere"),
    ],
)
def test_what_is_refused_is_named(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "Traceback" not in done.stderr and says in done.stdout + done.stderr, done.stdout + done.stderr
    assert done.returncode == code, done.stderr


def test_tasks_are_listed_with_their_sources() -> None:
    listed = found("eval", "tasks")
    assert len(listed) >= 13 and all(entry["protocol"] for entry in listed)
    assert len({entry["protocol"] for entry in listed}) == len(listed)
    assert all(file["source"] for entry in listed for file in entry["files"])


def test_a_data_directory_can_be_checked_before_there_is_a_model(pope: Path) -> None:
    done = call("eval", "--task", "pope", "--data", pope)
    assert done.returncode == 0 and "pope: complete, 18 questions" in done.stderr, done.stderr
    done = call("eval", "--task", "pope,mme", "--data", pope)
    assert done.returncode == 1 and "MME's 14 task directories" in done.stderr and "Traceback" not in done.stderr
