"""Does the page in a browser answer as the edge runtime does? Easy-VQA test questions, greedy, answer by answer.

    python benchmarks/browser_agreement.py BUNDLE [--questions 200] [--precision fp32,q4] [--build fp32+f16]
        [--out F.json]

Every precision of the bundle's web files is compared with the edge runtime's most exact build (or --build), and with
the annotated answers. Exit code 1 if a float precision agrees on less than 99 %. Quantised ones are different models:
their share says what the quantisation changes, and how the right answers move says whether that matters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.evaluation import sample_questions
from tinyllava_edge.benchmarks.targets.browser_page import BrowserPage
from tinyllava_edge.benchmarks.targets.browser_runtime import WebRuntime
from tinyllava_edge.benchmarks.tasks import find
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.server.web_files import web_precisions

LEAST = 0.99
FLOAT = ("fp32", "fp16")


def answers(runtime: Any, questions: Sequence[Question], max_tokens: int) -> list[str]:
    """Texts in order."""
    return [runtime.answer(q.pictures[0], q.prompt, max_tokens=max_tokens).text for q in questions]


def compare(bundle: Path, build: str | None, precisions: Sequence[str], limit: int) -> dict[str, Any]:
    """Shares of equal and of right answers of each precision, and where they differ."""
    task = find("easy_vqa")
    questions = sample_questions(task.load(Path()), limit)
    gold = [str(question.expected) for question in questions]
    edge = open_edge(bundle, build, allow_unverified=True)
    wanted = answers(edge, questions, task.max_tokens)
    found: dict[str, Any] = {"edge": edge.build, "questions": len(questions), "edge_right": right(wanted, gold)}
    edge.close()
    with BrowserPage(bundle) as page:
        found["environment"] = page.environment()
        for precision in precisions or web_precisions(read_bundle(bundle)):
            runtime = WebRuntime(page, read_bundle(bundle), precision)
            given = answers(runtime, questions, task.max_tokens)
            runtime.close()
            pairs = zip(questions, wanted, given, strict=True)
            differ = [
                [question.id, question.prompt, ours, theirs] for question, ours, theirs in pairs if ours != theirs
            ]
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
    found = compare(asked.bundle, asked.build, chosen, asked.questions)
    print(f"edge {found['edge']}: {found['edge_right']:.1%} right, {found['questions']} questions")
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(found[name]["equal"] < LEAST for name in FLOAT if name in found))


if __name__ == "__main__":
    sys.exit(main())
