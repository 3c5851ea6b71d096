"""Published tables: the data, and that measured cells hold measured scores only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tinyllava_edge import spec
from tinyllava_edge.benchmarks import tasks
from tinyllava_edge.benchmarks.paper import (
    HEAD,
    PaperTable,
    measured_scores,
    paper_tables,
    published_tables,
    write_paper_report,
)
from tinyllava_edge.benchmarks.paper_text import html, markdown
from tinyllava_edge.benchmarks.results import Sample, write_results
from tinyllava_edge.errors import DataError, UsageError

MODEL = "TinyLLaVA-base-C-TL"


def score(stage: str, value: float, build: str = "int8+q4_k_m", runtime: str = "edge", **detail: object) -> Sample:
    facts = {"model": MODEL, "protocol": "gqa/p1", "n": 12578, "headline": True, **detail}
    return Sample("accuracy", runtime, build, stage, value, "%", detail=facts)


def table(samples: list[Sample], name: str) -> PaperTable:
    place = [published.name for published in published_tables()].index(name)
    return paper_tables(samples).tables[place]


def rows(found: PaperTable) -> dict[str, dict[str, str]]:
    return {cells[0]: dict(zip(found.head, cells, strict=True)) for _, cells in found.lines}


def test_cells_read_off_the_sources_by_hand() -> None:
    three, a1, factory = published_tables()
    assert [len(found.rows) for found in (three, a1, factory)] == [10, 12, 14]
    llava = three.rows[2]
    assert (llava.model, llava.llm, llava.size, llava.resolution) == ("LLaVA-1.5", "V-7B", "7B", 336)
    assert llava.scores["mme"] == 1510.7 and llava.seen == ("vqav2_test", "gqa")
    assert "pope" not in three.rows[0].scores and three.rows[-1].scores["mmbench_en_dev"] == 66.9
    assert [row.model for row in a1.rows] == list(spec.VARIANTS)
    assert a1.rows[0].scores == dict(zip(a1.tasks, (74.0, 58.1, 60.2, 45.8, 20.6, 85.9, 55.8), strict=True))
    assert factory.rows[-1].scores["textvqa_val_ocr"] == 60.3 and factory.rows[-1].recipe == "share"
    assert factory.rows[0].scores["mmmu_val"] == 23.9


def test_every_column_is_a_task_and_every_row_names_its_source() -> None:
    for published in published_tables():
        for name in published.tasks:
            assert tasks.find(name).name == name
        for row in published.rows:
            assert set(row.scores) <= set(published.tasks) and set(row.seen) <= set(row.scores)
            assert row.source and all(value > 0 for value in row.scores.values())


def test_a_name_stands_for_one_row_of_a_table() -> None:
    for published in published_tables():
        names = [name for row in published.rows for name in row.names]
        assert len(names) == len(set(names))


def test_nothing_measured_leaves_the_published_rows_alone() -> None:
    report = paper_tables([])
    assert len(report.tables) == 3 and not report.measured
    assert not any(measured for found in report.tables for measured, _ in found.lines)


def test_a_measured_score_stands_under_its_model_and_the_rest_stays_empty() -> None:
    found = rows(table([score("gqa/accuracy", 57.94)], "paper-A1"))
    line = found["measured: int8+q4_k_m"]
    assert line["GQA"] == "57.9 (n = 12,578)"
    assert {key for key, cell in line.items() if cell} == {"model", "GQA"}
    assert found[MODEL]["GQA"] == "58.1"
    names = [cells[0] for _, cells in table([score("gqa/accuracy", 57.94)], "paper-A1").lines]
    assert names[:2] == [MODEL, "measured: int8+q4_k_m"] and len(names) == 13
    assert "measured: int8+q4_k_m" not in rows(table([score("gqa/accuracy", 57.94)], "paper-3"))
    assert f"measured: {MODEL}, int8+q4_k_m" in rows(table([score("gqa/accuracy", 57.94)], "factory"))


def test_seen_training_images_keep_their_star() -> None:
    found = rows(table([], "paper-3"))
    assert found["LLaVA-1.5"]["VQAv2"] == "78.5*" and found["LLaVA-1.5"]["POPE"] == "85.9"
    assert found["InstructBLIP"]["VQAv2"] == "" and found["InstructBLIP"]["MMBench"] == "36"


def test_another_protocol_has_its_own_column() -> None:
    samples = [
        score("vqav2_val/overall", 73.2, protocol="vqav2-val2014/p"),
        score("textvqa_val/accuracy", 44.0, n=5000),
        score("mmvet/total", 21.0, n=218, judge="gpt-4o"),
        score("mmvet/total", 20.4, "fp32", "reference", n=218, judge="gpt-4-0613"),
    ]
    found = table(samples, "paper-A1")
    assert found.head[len(HEAD) + 7 :] == (
        "VQAv2 (val2014)", "TextVQA (no OCR tokens)", "MM-Vet, judged by gpt-4o",
    )  # fmt: skip
    edge, reference = rows(found)["measured: int8+q4_k_m"], rows(found)["measured: reference fp32"]
    assert edge["VQAv2"] == edge["TextVQA"] == edge["MM-Vet"] == ""
    assert edge["VQAv2 (val2014)"] == "73.2 (n = 12,578)" and edge["MM-Vet, judged by gpt-4o"] == "21.0 (n = 218)"
    assert reference["MM-Vet"] == "20.4 (n = 218)" and reference["MM-Vet, judged by gpt-4o"] == ""
    assert rows(found)[MODEL]["VQAv2 (val2014)"] == ""


def test_a_part_of_the_questions_is_called_a_part() -> None:
    found = rows(table([score("gqa/accuracy", 60.0, n=500)], "paper-A1"))
    assert found["measured: int8+q4_k_m"]["GQA"] == "60.0 (n = 500 of 12,578)"


def test_models_of_no_table_are_listed_apart() -> None:
    report = paper_tables([score("easy_vqa/accuracy", 91.0, model="Mine")])
    assert len(report.tables) == 4 and report.tables[-1].head[-1] == "easy-VQA"
    assert report.tables[-1].lines == ((True, ("measured: Mine, int8+q4_k_m", "", "", "", "", "91.0 (n = 12,578)")),)
    assert not any(measured for found in report.tables[:3] for measured, _ in found.lines)


def test_only_headlines_of_runs_with_pictures_count() -> None:
    old = score("pope/f1", 85.0)
    old = replace(old, detail={key: value for key, value in old.detail.items() if key != "headline"})
    samples = [
        score("pope/random/f1", 86.0, headline=False),
        score("blind/pope/f1", 30.0, headline=False),
        replace(old, stage="blind/pope/f1"),
        replace(old, stage="pope/random/f1"),
        old,
        old,
    ]
    assert [found.value for found in measured_scores(samples)] == [85.0]


def test_two_scores_for_one_cell_are_refused() -> None:
    with pytest.raises(DataError, match="two scores of TinyLLaVA-base-C-TL"):
        measured_scores([score("gqa/accuracy", 57.9), score("gqa/accuracy", 58.0)])


@pytest.mark.parametrize(
    "bad",
    [{"model": None}, {"model": ""}, {"n": "many"}, {"n": True}, {"n": 0}, {"protocol": 3}],
)
def test_headlines_that_lack_something_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(DataError, match=next(iter(bad))):
        measured_scores([score("gqa/accuracy", 57.9, **bad)])


def test_unknown_tasks_and_empty_values_are_refused() -> None:
    with pytest.raises(DataError, match="unknown task 'nope'"):
        measured_scores([score("nope/accuracy", 1.0)])
    with pytest.raises(DataError, match="no value"):
        measured_scores([replace(score("gqa/accuracy", 1.0), value=None)])


def test_markdown_and_html_escape_and_show_the_protocol(tmp_path: Path) -> None:
    evil = "<script>|*x*"
    results = tmp_path / "results.jsonl"
    write_results(results, [score("gqa/accuracy", 57.9, evil, model=evil), score("gqa/accuracy", 57.9)])
    report = write_paper_report([results], tmp_path / "paper.html")
    page = (tmp_path / "paper.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;|*x*" in page and "gqa/p1" in page
    assert page == html(report)
    write_paper_report([results], tmp_path / "paper.md")
    text = (tmp_path / "paper.md").read_text(encoding="utf-8")
    assert text == markdown(report) and "gqa/p1" in text
    assert "\\<script>\\|\\*x\\*" in text
    grids = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in grids}
    assert widths == {len(HEAD) + 9 + 1, len(HEAD) + 7 + 1, len(HEAD) + 8 + 1, len(HEAD) + 1 + 1, 7 + 1}


def test_endings_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="paper.pdf"):
        write_paper_report([], tmp_path / "paper.pdf")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"schema": 1}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="bad.jsonl:1"):
        write_paper_report([bad], tmp_path / "paper.md")
    assert not (tmp_path / "paper.md").exists()
