"""Made-up results of a grid of two connectors and two recipes, with known differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tinyllava_edge.ablate.work import CELL, FAILED, GRID
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample
from tinyllava_edge.benchmarks.scoring import score_samples
from tinyllava_edge.benchmarks.tasks.llava_json import EXACT

PICTURES, PER_PICTURE = 60, 4
Results = Callable[..., list[Sample]]


def axes_of(connector: str, recipe: str) -> dict[str, str]:
    return {"tower": "siglip", "llm": "nano", "connector": connector, "recipe": recipe, "data": "d"}


def name_of(connector: str, recipe: str) -> str:
    return ".".join(axes_of(connector, recipe).values())


def records(wrong: Sequence[int]) -> list[AnswerRecord]:
    """Answers, wrong at these numbers."""
    return [
        AnswerRecord(
            id=f"q{k}",
            image=f"{k // PER_PICTURE}.png",
            question="what?",
            expected="red",
            given="blue" if k in set(wrong) else "red",
            question_type="color",
            protocol=EXACT.protocol,
            score=float(k not in set(wrong)),
        )
        for k in range(PICTURES * PER_PICTURE)
    ]


@pytest.fixture
def results() -> Results:
    """wrong[(connector, recipe)][seed] → lines of results.jsonl."""

    def make(wrong: dict[tuple[str, str], dict[int, Sequence[int]]], failed: Sequence[str] = ()) -> list[Sample]:
        connectors = list(dict.fromkeys(connector for connector, _ in wrong))
        recipes = list(dict.fromkeys(recipe for _, recipe in wrong))
        grid = {
            "command": "tinyllava-edge ablate grid.toml -o out",
            "baseline": name_of(connectors[0], recipes[0]),
            "axes": {"tower": ["siglip"], "llm": ["nano"], "connector": connectors, "recipe": recipes, "data": ["d"]},
            "scale": {"pictures": 1000},
        }
        lines = [Sample("command", stage=GRID, detail=grid)]
        for (connector, recipe), by_seed in wrong.items():
            for seed, numbers in by_seed.items():
                name = f"{name_of(connector, recipe)}@{seed}"
                detail = {
                    "command": "x",
                    "axes": axes_of(connector, recipe),
                    "cell": name_of(connector, recipe),
                    "seed": seed,
                    "parameters": 4_000_000 + 100_000 * connectors.index(connector),
                    "stages": [{"name": "finetune", "seconds": 12.5}],
                }
                found = records(numbers)
                lines.append(Sample("command", "reference", name, CELL, detail=detail))
                lines += [r.to_sample("reference", name, "picture", k, "e") for k, r in enumerate(found)]
                lines += score_samples(EXACT, found, "reference", name, "picture", "e", name)
        return lines + [
            Sample(
                "command", "reference", name, FAILED, detail={"command": "x", "error": "the loss is nan", "hint": ""}
            )
            for name in failed
        ]

    return make
