"""One checkpoint in every runtime, side by side: torch, this machine, ARM64, stock llama.cpp, a real browser.

    python benchmarks/arm64_agreement.py   BUNDLE --out arm64.json
    python benchmarks/stock_agreement.py   BUNDLE --runner "qemu-aarch64-static -L /usr/aarch64-linux-gnu" --out s.json
    python benchmarks/browser_agreement.py BUNDLE --out browser.json
    python benchmarks/every_runtime.py CHECKPOINT BUNDLE arm64.json s.json browser.json
        --out benchmarks/results/mobile-nano.json --write benchmarks/MOBILE.md
    python benchmarks/every_runtime.py --stored benchmarks/results/mobile-nano.json --write benchmarks/MOBILE.md

The records, made on this machine, hold every answer to the same easy-VQA questions; the checkpoint answers them here,
in torch. Refused are records of another bundle, and a bundle of another checkpoint. Nothing is timed: two of the
runtimes are emulated. Exit code 1 if a runtime of float files agrees with the checkpoint on less than 99 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.evaluation import sample_questions
from tinyllava_edge.benchmarks.out_file import check_writable
from tinyllava_edge.benchmarks.tasks import find
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import DataError, TinyLlavaEdgeError, UsageError
from tinyllava_edge.files import sha256_tree, write_json, write_text
from tinyllava_edge.runtimes.reference import open_reference

LEAST = 0.99
REFERENCE = "torch reference"
EXAMPLES = 6  # questions whose answers are shown


def read_object(path: Path, key: str) -> dict[str, Any]:
    """A script's JSON, which holds a list or table of this name. Raises DataError where it doesn't."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no record of answers ({error})", "run its script again with --out") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), (list, dict)):
        raise DataError(f"{path}: no record of answers (it lacks {key!r})", "run its script again with --out")
    return value


def read_record(path: Path, sha256: str) -> dict[str, Any]:
    """An agreement script's JSON. Raises DataError: not one, or of another bundle."""
    value = read_object(path, "answers")
    if value.get("bundle_sha256") != sha256:
        raise DataError(f"{path}: made with another bundle", "run its script again with this one")
    return value


@contextlib.contextmanager
def shape_of(path: Path) -> Iterator[None]:
    """Whatever is missing or of another kind inside a record is said of its file. Raises DataError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no record of answers ({error!r})", "run its script again with --out") from error


def runtimes(record: Mapping[str, Any]) -> dict[tuple[str, str, str], dict[str, str]]:
    """(runtime, place, files) → question id → answer, of any of the three records."""
    answers: Any = record["answers"]
    machine = platform.machine()
    if "cores" in record:  # arm64_agreement.py: build → rows
        return {
            ("edge", machine if core == "here" else f"ARM64, {core}", build): {row["id"]: row[core] for row in rows}
            for build, rows in answers.items()
            for core in ("here", *record["cores"])
        }
    if "server" in record:  # stock_agreement.py
        files = f"{record['llm']} + mmproj {record['mmproj']}"
        emulated = any("aarch64" in word for word in record["runner"])
        place = f"ARM64, {record['QEMU_CPU'] or 'max'}" if emulated else machine
        return {("llama-server", place, files): {row["id"]: row["answer"] for row in answers}}
    names = [key for key in record if isinstance(record[key], dict) and "provider" in record[key]]
    browser = record["environment"]["user_agent"].partition("Chrome/")[2].split(" ")[0].split(".")[0]
    return {
        (f"Chromium {browser}", f"{machine}, {record[name]['provider']}", f"web-{name}"): {
            row["id"]: row[name] for row in answers
        }
        for name in names
    }


def compare(checkpoint: Path, bundle: Path, records: Sequence[Path]) -> dict[str, Any]:
    """Every answer of every runtime, the checkpoint's own first.

    Raises:
        DataError: a record of another bundle, or of other questions.
        UsageError: the bundle comes from another checkpoint.
    """
    opened = read_bundle(bundle)
    if opened.source.get("sha256") != sha256_tree(checkpoint):
        raise UsageError(f"{bundle}: exported from another checkpoint than {checkpoint}", "name the one it came from")
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for path in records:
        record = read_record(path, opened.sha256)
        with shape_of(path):
            more = runtimes(record)
        if set(more) & set(found):
            twice = ", ".join(min(set(more) & set(found)))
            raise DataError(f"{path}: {twice} is in another record, too", "leave one out")
        found |= more
    asked = {frozenset(answers) for answers in found.values()}
    if len(asked) != 1:
        raise DataError("the records hold other questions", "give all scripts the same --questions")
    task = find("easy_vqa")
    questions = sample_questions(task.load(Path()), len(next(iter(asked))))
    if {question.id for question in questions} != next(iter(asked)):
        raise DataError("the records hold other questions than this version asks", "run the scripts again")
    runtime = open_reference(checkpoint)
    said = [runtime.answer(q.pictures[0], q.prompt, max_tokens=task.max_tokens).text for q in questions]
    runtime.close()
    every = {
        (REFERENCE, platform.machine(), "float32"): {q.id: text for q, text in zip(questions, said, strict=True)},
        **found,
    }
    return {
        "model": opened.name,
        "checkpoint_sha256": opened.source["sha256"],
        "bundle_sha256": opened.sha256,
        "runtimes": [dict(zip(("runtime", "place", "files"), key, strict=True)) for key in every],
        "questions": [
            {
                "id": q.id,
                "image": q.image,
                "question": q.prompt,
                "expected": str(q.expected),
                "answers": [answers[q.id] for answers in every.values()],
            }
            for q in questions
        ],
    }


def shares(found: Mapping[str, Any], column: int) -> tuple[int, int]:
    """How many answers of a runtime equal the checkpoint's, letter by letter, and how many are right."""
    rows = found["questions"]
    equal = sum(row["answers"][column] == row["answers"][0] for row in rows)
    right = sum(row["answers"][column].strip().lower() == row["expected"].strip().lower() for row in rows)
    return equal, right


def page(found: Mapping[str, Any]) -> str:
    """MOBILE.md."""
    rows, columns = found["questions"], found["runtimes"]
    lines = ["| runtime | where | files | answers equal to the checkpoint's | right |", "|---|---|---|---:|---:|"]
    for number, column in enumerate(columns):
        equal, right = shares(found, number)
        share = "" if number == 0 else f"{equal} of {len(rows)}"
        lines.append(
            f"| {column['runtime']} | {column['place']} | {column['files']} | {share} | {right / len(rows):.1%} |"
        )
    names = [f"{column['runtime']}, {column['place']}, {column['files']}" for column in columns]
    shown = examples(rows)
    heads = [f"{row['image']}: {row['question']}" for row in shown]
    table = [f"| runtime | {' | '.join(heads)} |", "|---|" + "---|" * len(shown)]
    table += [f"| {name} | {' | '.join(row['answers'][k] for row in shown)} |" for k, name in enumerate(names)]
    differ = [row for row in rows if len(set(row["answers"])) > 1]
    odd = [f"- `{row['id']}`, {row['question']} ({row['expected']}): {said(row, names)}" for row in differ]
    words = f"""\
        One checkpoint, {found["model"]} as `make demo` trains it, in every runtime: {len(rows)} questions of easy-VQA's
        test set, greedy, answer by answer. "Equal" is equal letter by letter to what the checkpoint says in torch.
        ARM64 is qemu's user mode, so nothing is timed; `cortex-a53` is a core without the dot products and half floats
        of Armv8.2. llama-server is llama.cpp's own, cross-built ([runtimes/native](../runtimes/native)), with the
        bundle's two GGUFs. The browser is real, its processor is this machine's. No phone, board or GPU was at hand.

        The questions are easy for this model, so equal answers say that nothing is broken; how far the numbers behind
        them are apart stands in [docs/arm64.md](../docs/arm64.md) and in what `verify` prints.

        Made by `python benchmarks/every_runtime.py`, whose first lines show all commands; every answer is in
        [results/mobile-nano.json](results/mobile-nano.json)."""
    paragraphs = [textwrap.fill(part, 120, break_on_hyphens=False) for part in textwrap.dedent(words).split("\n\n")]
    text = ["# The same answers everywhere?", *paragraphs, "\n".join(lines), "## Some of the answers", "\n".join(table)]
    text += ["## Where they differ", "\n".join(odd) if odd else "Nowhere."]
    return "\n\n".join(text) + "\n"


def examples(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first question of each right answer that hasn't been shown."""
    first = {row["expected"]: row for row in reversed(rows)}
    return sorted(first.values(), key=rows.index)[:EXAMPLES]


def said(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Who said what, the checkpoint's answer first."""
    groups: dict[str, list[str]] = {}
    for name, answer in zip(names, row["answers"], strict=True):
        groups.setdefault(answer, []).append(name)
    first, *others = groups.items()
    return f"“{first[0]}”; " + "; ".join(f"“{answer}” in {' and '.join(who)}" for answer, who in others)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("records", type=Path, nargs="*", help="what the agreement scripts wrote")
    parser.add_argument("--stored", type=Path, default=None, help="make the page anew from this record")
    parser.add_argument("--out", type=Path, default=None, help="JSON with every answer")
    parser.add_argument("--write", type=Path, default=None, help="Markdown page")
    asked = parser.parse_args()
    try:
        for path in (asked.out, asked.write):
            if path is not None:  # before the answers are asked for
                check_writable(path)
        if asked.stored is not None:
            found = read_object(asked.stored, "runtimes")
            with shape_of(asked.stored):
                page(found)
        elif asked.bundle is None or not asked.records:
            raise UsageError("a checkpoint, a bundle and records are needed", "or a record of them: --stored F.json")
        else:
            found = compare(asked.checkpoint, asked.bundle, asked.records)
        if asked.out is not None:
            write_json(asked.out, found)
        if asked.write is not None:
            write_text(asked.write, page(found))
    except TinyLlavaEdgeError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    failed = False
    for number, column in enumerate(found["runtimes"]):
        equal, right = shares(found, number)
        total = len(found["questions"])
        print(f"{' · '.join(column.values())}: {equal} of {total} equal, {right / total:.1%} right")
        exact = column["files"].replace("web-", "") in ("fp32+f16", "f16 + mmproj f16", "fp32", "fp16", "float32")
        failed |= exact and equal < LEAST * total
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
