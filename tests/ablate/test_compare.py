"""Known differences are found with their size, chance is not called one, and what can't be compared is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.ablate.compare import BETTER, NOT_SHOWN, SCATTER, WORSE, merge, summarise
from tinyllava_edge.ablate.page import PAGE, TABLE, as_json, draw
from tinyllava_edge.ablate.plots import figures, svg
from tinyllava_edge.ablate.table import markdown
from tinyllava_edge.errors import DataError

from .conftest import Results, name_of, records

TASK = "llava_json"


@pytest.mark.parametrize(
    ("key", "value"),
    [("parameters", None), ("parameters", "7"), ("stages", [1]), ("stages", [{"seconds": "x"}]), ("seed", "1")],
)
def test_a_damaged_cell_is_named(results: Results, key: str, value: Any) -> None:
    samples = results({("linear", "base"): {0: [0]}, ("mlp", "base"): {0: [0]}})
    lines = [
        dataclasses.replace(s, detail={**s.detail, key: value}) if s.kind == "command" and "cell" in s.detail else s
        for s in samples
    ]
    with pytest.raises(DataError, match=key):
        summarise(lines)


def every(step: int, start: int = 0) -> list[int]:
    return list(range(start, 240, step))


def test_scores_differences_and_verdicts(results: Results) -> None:
    """linear is wrong at 80 of 240, mlp at 48: 13.3 points; the recipe changes nothing."""
    wrong = {
        ("linear", "base"): {0: every(3)},
        ("linear", "share"): {0: every(3)},
        ("mlp", "base"): {0: every(5)},
        ("mlp", "share"): {0: every(5)},
    }
    found = summarise(results(wrong))
    assert [cell.name for cell in found.cells] == [name_of(*key) for key in wrong]
    assert [round(cell.score(TASK), 2) for cell in found.cells] == [66.67, 66.67, 80.0, 80.0]
    interval = found.cells[0].interval(TASK)
    assert interval is not None and interval.low < 66.67 < interval.high
    by = {item.axis: item for item in found.effects}
    assert set(by) == {"connector", "recipe"} and by["connector"].pairs == 2
    difference = by["connector"].paired.difference
    assert difference is not None and difference.estimate == pytest.approx(100 * (80 - 48) / 240)
    assert by["connector"].verdict == BETTER and by["recipe"].verdict == NOT_SHOWN
    assert by["recipe"].paired.difference is not None and by["recipe"].paired.difference.estimate == 0
    assert [item.verdict for item in found.versus] == [NOT_SHOWN, BETTER, BETTER]
    assert all(item.p_holm is not None and item.paired.p_value is not None for item in found.versus)
    assert all((item.p_holm or 0) >= (item.paired.p_value or 0) for item in found.versus)


def test_the_other_way_round_is_worse(results: Results) -> None:
    found = summarise(results({("mlp", "base"): {0: every(5)}, ("linear", "base"): {0: every(3)}}))
    assert [item.verdict for item in (*found.effects, *found.versus)] == [WORSE, WORSE]


def test_a_difference_that_one_seed_turns_round_is_not_one(results: Results) -> None:
    """+40 points with seed 0, -5 with seed 1: significant over pictures, but not over trainings."""
    wrong = {
        ("linear", "base"): {0: every(2), 1: every(20)},
        ("mlp", "base"): {0: every(10), 1: every(10)},
    }
    found = summarise(results(wrong))
    (item,) = found.effects
    assert item.by_seed == pytest.approx((40.0, -5.0)) and (item.p_holm or 1) < 0.05
    assert item.verdict == SCATTER
    assert found.seeds == (0, 1) and found.cells[0].scores[TASK] == pytest.approx({0: 50.0, 1: 95.0})


def test_seeds_are_averaged_per_question_so_that_answers_are_not_counted_twice() -> None:
    merged = merge({0: records([0, 1]), 1: records([1])})
    assert [record.value for record in merged[:3]] == [0.5, 0.0, 1.0] and len(merged) == 240


def test_a_missing_twin_leaves_its_pair_out_and_a_missing_baseline_is_said(results: Results) -> None:
    wrong = {
        ("linear", "base"): {0: every(3)},
        ("linear", "share"): {0: every(4)},
        ("mlp", "base"): {0: every(5)},
    }
    lines = results(wrong, failed=["siglip.nano.mlp.share.d@0"])
    found = summarise(lines)
    assert {item.axis: item.pairs for item in found.effects} == {"connector": 1, "recipe": 1}
    assert found.failed == {"siglip.nano.mlp.share.d@0": "the loss is nan"}
    text = markdown(found)
    assert "the loss is nan" in text and "| baseline |" in text
    base = f"{name_of('linear', 'base')}@0"
    rest = summarise([line for line in lines if line.build != base])
    assert not rest.versus and "is not finished, so nothing is compared with it" in markdown(rest)


def test_no_finished_cell_and_no_grid_are_errors(results: Results) -> None:
    lines = results({("linear", "base"): {0: []}})
    with pytest.raises(DataError, match="no cell is finished"):
        summarise(lines[:1])
    with pytest.raises(DataError, match="0 grids"):
        summarise(lines[1:])
    broken = [dataclasses.replace(line, detail={**line.detail, "axes": {}}) for line in lines[1:2]]
    with pytest.raises(DataError, match="no usable axes"):
        summarise([lines[0], *broken, *lines[2:]])


def test_files_are_drawn_and_the_same_results_draw_the_same(results: Results, tmp_path: Path) -> None:
    wrong = {
        ("linear", "base"): {0: every(3), 1: every(4)},
        ("mlp", "base"): {0: every(5), 1: every(6)},
    }
    lines = results(wrong)
    found = draw(lines, tmp_path / "one")
    draw(lines, tmp_path / "two")
    for name in (TABLE, PAGE, "figures/connector.png", "figures/overall.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "one" / "figures").iterdir()) == ["connector.png", "overall.png"]
    html = (tmp_path / "one" / PAGE).read_text()
    assert html.count("<svg") == 2 and "http://" not in html.replace("http://www.w3.org", "") and "<script" not in html
    table = (tmp_path / "one" / TABLE).read_text()
    assert "![Ablation of connectors (paper: Figure 6)](figures/connector.png)" in table
    assert "| connector | linear | mlp |" in table and "tinyllava-edge ablate grid.toml -o out" in table
    assert as_json(found)["effects"][0]["verdict"] == BETTER


def test_one_seed_says_what_it_cannot_say(results: Results, tmp_path: Path) -> None:
    """Table and page: a verdict from one training is about these models."""
    once = {("linear", "base"): {0: every(3)}, ("mlp", "base"): {0: every(5)}}
    twice = {key: {**seeds, 1: every(4)} for key, seeds in once.items()}
    for name, wrong, alone in (("one", once, True), ("two", twice, False)):
        draw(results(wrong), tmp_path / name)
        for file in (TABLE, PAGE):
            text = " ".join((tmp_path / name / file).read_text().replace("&#39;", "'").split())
            assert ("one seed can't say" in text) is alone, (name, file)
            assert ("the same sign with every seed" in text) is not alone, (name, file)


def test_names_that_look_like_markup_stay_text(results: Results, tmp_path: Path) -> None:
    lines = results({("<b>$x_1$", "base"): {0: every(3)}, ("mlp", "base"): {0: every(5)}})
    draw(lines, tmp_path)
    assert "<b>$x_1$" not in (tmp_path / PAGE).read_text()


def test_bars_show_scores_intervals_and_seeds(results: Results) -> None:
    wrong = {("linear", "base"): {0: every(3), 1: every(4)}, ("mlp", "base"): {0: every(5), 1: every(6)}}
    found = summarise(results(wrong))
    figure = figures(found)[0]
    axes = figure.draw().axes[0]
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([c.score(TASK) for c in found.cells])
    points = sorted(y for line in axes.lines if line.get_marker() == "o" for y in line.get_ydata())
    assert points == pytest.approx(sorted(v for cell in found.cells for v in cell.scores[TASK].values()))
    assert svg(figure).startswith("<svg")
