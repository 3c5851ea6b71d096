"""easy-VQA's test split (PyPI `easy-vqa`, MIT): 9,673 questions on 1,000 pictures, straight from the package."""

from __future__ import annotations

from pathlib import Path

from tinyllava_edge.benchmarks.tasks.base import DataFile, Question, Task
from tinyllava_edge.benchmarks.tasks.llava_json import MAX_TOKENS, exact_line, exact_match, exact_metrics
from tinyllava_edge.data import easy_vqa


def load(root: Path) -> list[Question]:
    """The package's test questions; the data directory is not looked at. Raises DataError without the package."""
    folder = easy_vqa.package_data() / "test" / "images"
    return [
        Question(
            id=f"test-{number}",
            prompt=question,
            pictures=(folder / f"{picture}.png",),
            image=f"test-{picture}.png",
            gold=answer,
            expected=answer,
            kind=easy_vqa.question_type(answer),
        )
        for number, (question, answer, picture) in enumerate(easy_vqa.questions("test"))
    ]


TASK = Task(
    name="easy_vqa",
    title="easy-VQA",
    protocol=f"easy-vqa-1.0-test/as-is/exact-match/{MAX_TOKENS}",
    folder="",
    files=(DataFile((), "questions and pictures come with the Python package", "PyPI easy-vqa", needed=False),),
    max_tokens=MAX_TOKENS,
    headline="accuracy",
    load=load,
    from_line=exact_line,
    mark=exact_match,
    metrics=exact_metrics,
)
