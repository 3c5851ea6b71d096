"""Does the page in a browser answer as the edge runtime does? Easy-VQA test questions, greedy, answer by answer.

    python benchmarks/browser_agreement.py BUNDLE [--questions 200] [--precision fp32,q4] [--build fp32+f16]
        [--out F.json]

Every precision of the bundle's web files is compared with the edge runtime's most exact build (or --build), and with
the annotated answers. Exit code 1 if a float precision agrees on less than 99 %. Quantised ones are different models:
their share says what the quantisation changes, and how the right answers move says whether that matters.

--out keeps every answer, so that other runtimes can be set beside them: `answers` lists for each question its id,
words, picture, right answer, and what `edge` and each precision said.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.evaluation import sample_questions
from tinyllava_edge.benchmarks.out_file import check_writable
from tinyllava_edge.benchmarks.targets.browser_page import BrowserPage
from tinyllava_edge.benchmarks.targets.browser_runtime import WebRuntime
from tinyllava_edge.benchmarks.tasks import find
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import TinyLlavaEdgeError, UsageError
from tinyllava_edge.files import write_json
from tinyllava_edge.runtimes.edge import open_edge

LEAST = 0.99
FLOAT = ("fp32", "fp16")


def answers(runtime: Any, questions: Sequence[Question], max_tokens: int) -> list[str]:
    """Texts in order."""
    return [runtime.answer(q.pictures[0], q.prompt, max_tokens=max_tokens).text for q in questions]


def compare(bundle: Path, build: str | None, precisions: Sequence[str], limit: int) -> dict[str, Any]:
    """Shares of equal and of right answers of each precision, and every answer.

    Raises:
        BundleError: not a bundle, or one without web files.
        DependencyError: what the page needs is missing.
        EngineError: a side ended with an error.
        UsageError: the bundle has no such build, or no web files of such a precision.
    """
    task = find("easy_vqa")
    opened = read_bundle(bundle)
    held = [web.precision for web in opened.web_builds().values()]
    for precision in precisions:
        if precision not in held:
            raise UsageError(f"{bundle}: no web files of precision {precision}", f"it has: {', '.join(held) or 'none'}")
    questions = sample_questions(task.load(Path()), limit)
    gold = [str(question.expected) for question in questions]
    with BrowserPage(bundle) as page:  # first, so that a missing browser is said before anything is asked
        with contextlib.closing(open_edge(bundle, build, allow_unverified=True)) as edge:
            wanted = answers(edge, questions, task.max_tokens)
        found: dict[str, Any] = {
            "bundle_sha256": opened.sha256,
            "edge": edge.build,
            "questions": len(questions),
            "edge_right": right(wanted, gold),
            "environment": page.environment(),
        }
        kept: list[dict[str, str]] = [
            {"id": q.id, "question": q.prompt, "image": q.image, "expected": expected, "edge": answer}
            for q, expected, answer in zip(questions, gold, wanted, strict=True)
        ]
        for precision in dict.fromkeys(precisions or held):
            runtime = WebRuntime(page, opened, precision)
            given = answers(runtime, questions, task.max_tokens)
            runtime.close()
            for line, answer in zip(kept, given, strict=True):
                line[precision] = answer
            differ = [line["id"] for line in kept if line[precision] != line["edge"]]
            found[precision] = {
                "equal": 1 - len(differ) / len(questions),
                "right": right(given, gold),
                "provider": runtime.facts["provider"],
                "self_test": runtime.facts["self_test"],
                "differ": differ,
            }
            print(
                f"{precision}: {found[precision]['equal']:.1%} equal, {found[precision]['right']:.1%} right", flush=True
            )
    found["answers"] = kept
    return found


def right(given: Sequence[str], gold: Sequence[str]) -> float:
    """Share of answers that match exactly after strip and lower."""
    pairs = zip(given, gold, strict=True)
    return sum(answer.strip().lower() == expected.strip().lower() for answer, expected in pairs) / len(gold)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--precision", default="", help="comma list; all of the bundle by default")
    parser.add_argument("--build", default=None, help="edge build to compare with; the most exact by default")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    chosen = [word for word in asked.precision.split(",") if word]
    try:
        if asked.questions < 1:
            raise UsageError(f"--questions {asked.questions}", "ask at least one")
        if asked.out is not None:
            check_writable(asked.out)
        found = compare(asked.bundle, asked.build, chosen, asked.questions)
        if asked.out is not None:
            write_json(asked.out, found)
    except TinyLlavaEdgeError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"edge {found['edge']}: {found['edge_right']:.1%} right, {found['questions']} questions")
    return int(any(found[name]["equal"] < LEAST for name in FLOAT if name in found))


if __name__ == "__main__":
    sys.exit(main())
