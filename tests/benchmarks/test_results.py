"""results.jsonl: round trip, and refusal of everything else."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks.results import AnswerRecord, Sample, read_results, to_line, write_results
from tinyllava_edge.errors import DataError

SAMPLE = Sample("latency", "edge", "fp32+f16", "ttft_ms", 12.5, "ms", 3, "e1", detail={"order": 1})


def test_round_trip(samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, samples)
    assert read_results([path]) == samples
    assert all(json.loads(line)["schema"] == 1 for line in path.read_text(encoding="utf-8").splitlines())
    assert len(read_results([path, path])) == 2 * len(samples)


def test_answer_record_survives(tmp_path: Path) -> None:
    record = AnswerRecord("q1", "a.png", "wo?\n<b>", "Köln", " köln ", "city", "hard")
    assert record.correct
    path = tmp_path / "r.jsonl"
    write_results(path, [record.to_sample("edge", "fp32+f16", "picture", 0, "e1")])
    (sample,) = read_results([path])
    assert sample.value == 1.0
    assert AnswerRecord.from_sample(sample) == record
    with pytest.raises(DataError, match="lacks"):
        AnswerRecord.from_sample(Sample("answer", detail={"id": "1"}))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json}", "not valid JSON"),
        ("[1, 2]", "not a result"),
        (to_line(SAMPLE).replace('"schema": 1', '"schema": 2'), "not a result"),
        (to_line(SAMPLE).replace('"latency"', '"gossip"'), "not a result"),
        (to_line(SAMPLE).replace('"unit"', '"units"'), "keys differ"),
        (to_line(SAMPLE).replace("12.5", '"12.5"'), "wrong type"),
        (to_line(SAMPLE).replace("12.5", "true"), "wrong type"),
        (to_line(SAMPLE).replace('"sample": 3', '"sample": 3.5'), "wrong type"),
        ("[" * 100_000, "not valid JSON"),
        (to_line(SAMPLE).replace("12.5", "NaN"), "not valid JSON"),
        (to_line(SAMPLE).replace("12.5", "-1e999"), "not valid JSON"),
        (to_line(SAMPLE).replace("12.5", "1e18"), "below 1e18"),
        (to_line(SAMPLE).replace("12.5", "1" + "0" * 17 + "0"), "below 1e18"),
        (to_line(SAMPLE).replace('"order": 1', f'"order": [{{"a": {2**63}}}]'), "beyond 64 bits"),
        (to_line(SAMPLE).replace('"sample": 3', f'"sample": -{2**63}'), "beyond 64 bits"),
        (to_line(SAMPLE).replace('"order": 1', '"order": 1' + "0" * 400), "beyond 64 bits"),
        (to_line(SAMPLE).replace('"e1"', '"\\ud800"'), "surrogates not allowed"),
        (to_line(Sample("bundle", detail={"verified": []})), "`verified` or `sha256`"),
        (to_line(Sample("bundle", detail={"sha256": 7})), "`verified` or `sha256`"),
    ],
)
def test_other_lines_are_refused_by_number(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(to_line(SAMPLE) + line.rstrip("\n") + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=says) as caught:
        read_results([path])
    assert f"{path}:2" in caught.value.message


def test_missing_file_and_cut_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_results([tmp_path / "none.jsonl"])
    path = tmp_path / "r.jsonl"
    path.write_text(to_line(SAMPLE) + to_line(SAMPLE)[:40], encoding="utf-8")
    assert read_results([path], tolerate_cut=True) == [SAMPLE]
    with pytest.raises(DataError):
        read_results([path])


def test_line_separators_and_a_kill_inside_a_character_are_survived(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    answer = Sample("answer", detail={"given": "one\u2028two\x85 Köln"})
    assert to_line(answer).isascii()
    raw = (json.dumps(answer.to_dict(), ensure_ascii=False) + "\n").encode()
    path.write_bytes(raw + raw[: raw.index("ö".encode()) + 1])
    assert read_results([path], tolerate_cut=True) == [answer]
    with pytest.raises(DataError, match="not valid JSON") as caught:
        read_results([path])
    assert f"{path}:2" in caught.value.message


def test_numbers_that_json_lacks_are_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_line(Sample("latency", value=float("nan")))


def test_the_largest_whole_number_is_read(tmp_path: Path) -> None:
    sample = Sample("latency", detail={"most": 2**63 - 1, "least": -(2**63) + 1, "sha256": "1" * 64, "float": 1e300})
    write_results(tmp_path / "r.jsonl", [sample])
    assert read_results([tmp_path / "r.jsonl"]) == [sample]


def test_half_characters_are_written_out(tmp_path: Path) -> None:
    """A file name that is no UTF-8 comes as such; the file that it is written to can be read again."""
    odd = os.fsdecode(b"caf\xe9.png")
    sample = Sample("command", build=odd, detail={"command": odd, odd: [{"a": "\ud800x"}], "whole": "café 😀"})
    write_results(tmp_path / "r.jsonl", [sample])
    (found,) = read_results([tmp_path / "r.jsonl"])
    shown = "caf\\udce9.png"
    assert found.build == shown and found.detail["command"] == shown and found.detail[shown] == [{"a": "\\ud800x"}]
    assert found.detail["whole"] == "café 😀"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    def waited(number: int, frame: object) -> None:
        raise AssertionError("it waits for somebody to write")

    os.mkfifo(tmp_path / "pipe")
    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(5)
    try:
        for path in (tmp_path / "pipe", tmp_path):
            with pytest.raises(DataError, match="no regular file"):
                read_results([path])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
