"""Does stock llama.cpp answer as the edge runtime does? Easy-VQA test questions, greedy, answer by answer.

    python benchmarks/stock_agreement.py CHECKPOINT_OR_BUNDLE [--questions 200] [--llm f16] [--mmproj f16]
        [--server build/arm64/llama/llama-server] [--runner "qemu-aarch64-static -L /usr/aarch64-linux-gnu"]
        [--out F.json]

llama-server gets the text GGUF and the mmproj; the edge runtime gets the same GGUF and the float32 vision graph. A
third runtime, llama.cpp's mtmd in this process, tells the two roads' difference from the two processors'. A checkpoint
is exported first, into a temporary directory. For an older core set QEMU_CPU, e.g. cortex-a53. Nothing is timed. Exit
code 1 if fewer than 99 % of the answers equal the edge runtime's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from stock_server import StockServer, check_program, program_facts  # noqa: E402

from tinyllava_edge.benchmarks.evaluation import sample_questions  # noqa: E402
from tinyllava_edge.benchmarks.out_file import check_writable  # noqa: E402
from tinyllava_edge.benchmarks.tasks import find  # noqa: E402
from tinyllava_edge.benchmarks.tasks.base import Question  # noqa: E402
from tinyllava_edge.bundle import MANIFEST, Bundle, read_bundle  # noqa: E402
from tinyllava_edge.errors import BundleError, TinyLlavaEdgeError, UsageError  # noqa: E402
from tinyllava_edge.files import write_json  # noqa: E402
from tinyllava_edge.runtimes.edge import open_edge  # noqa: E402
from tinyllava_edge.runtimes.mtmd import open_mtmd  # noqa: E402
from tinyllava_edge.runtimes.text import default_context  # noqa: E402

LEAST = 0.99
VISION = "fp32"


def open_model(root: Path, llm: str, mmproj: str, scratch: Path) -> Bundle:
    """A bundle as it is, or a checkpoint exported with one text GGUF and one mmproj.

    Raises:
        BundleError: the bundle holds no such files.
    """
    if not (root / MANIFEST).is_file():
        from tinyllava_edge.export.bundle_writer import export_bundle

        return export_bundle(root, scratch / "bundle", llm=(llm,), vision=(VISION,), mmproj=(mmproj,))
    bundle = read_bundle(root)
    held = {(file.role, file.precision) for file in bundle.files}
    for role, precision in (("llm", llm), ("mmproj", mmproj), ("vision", VISION)):
        if (role, precision) not in held:
            raise BundleError(
                f"{root}: holds no {role} of precision {precision}", "export it again with it, or pass the checkpoint"
            )
    bundle.check()
    return bundle


def only_mmproj(bundle: Bundle, precision: str) -> Bundle:
    """The bundle with this one mmproj, which open_mtmd then takes."""
    return replace(bundle, files=tuple(f for f in bundle.files if f.role != "mmproj" or f.precision == precision))


def path_of(bundle: Bundle, role: str, precision: str) -> Path:
    """A file of the bundle."""
    return next(bundle.path(f) for f in bundle.files if (f.role, f.precision) == (role, precision))


def margins(runtime: Any, question: Question, texts: Sequence[str]) -> dict[str, Any]:
    """What the edge runtime's first logits say of a question that was answered in two ways."""
    logits = runtime.probe(question.pictures[0], question.prompt, max_tokens=1).first_logits
    second, first = (float(value) for value in np.sort(logits)[-2:])
    return {"id": question.id, "question": question.prompt, "answers": list(texts), "first_margin": first - second}


def compare(
    bundle: Bundle, llm: str, mmproj: str, program: Path, runner: Sequence[str], limit: int, threads: int = 1
) -> dict[str, Any]:
    """Shares of equal and of right answers, every answer, and where they differ.

    Returns:
        `equal` is the share of answers that equal the edge runtime's, `equal_mtmd` that equal mtmd's in this process,
        `edge_equals_mtmd` the share of those two; `answers` holds id, question, answer, expected, edge and mtmd.
    """
    task = find("easy_vqa")
    questions = sample_questions(task.load(Path()), limit)
    model, tower = path_of(bundle, "llm", llm), path_of(bundle, "mmproj", mmproj)
    pictures = [Path(str(question.pictures[0])).read_bytes() for question in questions]
    build = f"{VISION}+{llm}"
    rows: list[dict[str, str]] = [
        {"id": question.id, "question": question.prompt, "expected": str(question.expected)} for question in questions
    ]
    here = open_mtmd(only_mmproj(bundle, mmproj), build, n_threads=threads, check_hashes=False)
    with contextlib.closing(here) as runtime:
        for row, picture in zip(rows, pictures, strict=True):
            row["mtmd"] = runtime.answer(picture, row["question"], max_tokens=task.max_tokens).text
    context = default_context(bundle.spec)
    with StockServer(program, model, tower, runner=runner, context=context, threads=threads) as server:
        for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
            row["answer"] = server.ask(picture, row["question"], max_tokens=task.max_tokens)
            if (number + 1) % 20 == 0:
                print(f"{number + 1} of {len(rows)} asked", file=sys.stderr, flush=True)
    with contextlib.closing(open_edge(bundle, build, n_threads=threads, allow_unverified=True)) as runtime:
        for row, picture in zip(rows, pictures, strict=True):
            row["edge"] = runtime.answer(picture, row["question"], max_tokens=task.max_tokens).text
        differ = [
            margins(runtime, question, (row["answer"], row["edge"], row["mtmd"]))
            for question, row in zip(questions, rows, strict=True)
            if len({row["answer"], row["edge"], row["mtmd"]}) > 1
        ]
    return {
        "model": bundle.name,
        "bundle_sha256": bundle.sha256,
        "files": {path.name: sha256_in(bundle, path) for path in (model, tower)},
        "llm": llm,
        "mmproj": mmproj,
        "edge_build": build,
        "server": program_facts(program),
        "runner": [Path(word).name for word in runner],
        "QEMU_CPU": os.environ.get("QEMU_CPU"),
        "questions": len(rows),
        "equal": share(rows, "answer", "edge"),
        "equal_mtmd": share(rows, "answer", "mtmd"),
        "edge_equals_mtmd": share(rows, "edge", "mtmd"),
        "right": right(rows, "answer"),
        "edge_right": right(rows, "edge"),
        "differ": differ,
        "answers": rows,
    }


def sha256_in(bundle: Bundle, path: Path) -> str:
    """The manifest's digest of a file."""
    return next(f.sha256 for f in bundle.files if bundle.path(f) == path)


def share(rows: Sequence[dict[str, str]], one: str, other: str) -> float:
    """Share of rows whose two texts are equal, letter by letter."""
    return sum(row[one] == row[other] for row in rows) / len(rows)


def right(rows: Sequence[dict[str, str]], one: str) -> float:
    """Share of rows whose text is the expected one after strip and lower."""
    return sum(row[one].strip().lower() == row["expected"] for row in rows) / len(rows)


def words_of(runner: str) -> list[str]:
    """The runner's words, as a shell splits them. Raises UsageError."""
    try:
        return shlex.split(runner)
    except ValueError as error:
        raise UsageError(f"--runner {runner}: {error}", "quote it as for a shell") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="checkpoint, or bundle with an mmproj")
    parser.add_argument("--server", type=Path, default=HERE.parent / "build/arm64/llama/llama-server")
    parser.add_argument("--runner", default="", help="words in front of the server's program, e.g. qemu-user")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--llm", default="f16", help="which text GGUF")
    parser.add_argument("--mmproj", default="f16", help="which mmproj")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    try:
        if asked.questions < 1:
            raise UsageError(f"--questions {asked.questions}", "ask at least one")
        if asked.threads < 1:
            raise UsageError(f"--threads {asked.threads}", "name at least one")
        if asked.out is not None:
            check_writable(asked.out)
        runner = words_of(asked.runner)
        check_program(asked.server, runner)
        with tempfile.TemporaryDirectory() as scratch:
            bundle = open_model(asked.model, asked.llm, asked.mmproj, Path(scratch))
            found = compare(bundle, asked.llm, asked.mmproj, asked.server, runner, asked.questions, asked.threads)
        if asked.out is not None:
            write_json(asked.out, found)
    except TinyLlavaEdgeError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(
        f"{found['questions']} questions: {found['equal']:.1%} equal to edge {found['edge_build']}, "
        f"{found['equal_mtmd']:.1%} equal to mtmd here; right {found['right']:.1%}, edge {found['edge_right']:.1%}"
    )
    return int(found["equal"] < LEAST)


if __name__ == "__main__":
    sys.exit(main())
