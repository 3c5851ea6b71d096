"""results.jsonl: one JSON object per line, raw samples only; every summary is computed from them.

Keys of every line:

    schema          1
    kind            `environment`, `bundle`, `latency`, `memory`, `size`, `answer`, `accuracy`, `verify` or `command`
    target          where it ran: `cpu`, later `gpu`, `ssh://host`, `browser`
    runtime         `edge` or `reference`; empty for lines about the machine
    build           build name, or the checkpoint's precision
    stage           what was measured, see below
    value, unit     the number and its unit; value is null for lines that carry only `detail`
    sample          number of the repetition, from 0
    environment_id  names the `environment` line that the sample belongs to
    detail          whatever else belongs to that kind

| kind | stage | unit | detail |
|---|---|---|---|
| environment | – | – | machine, libraries, threads (environment.capture) |
| bundle | – | – | name, sha256, files with hashes and tensor types |
| latency | a stage of StageTimings, e.g. `ttft_ms`, `vision_ms` | ms | `order`: place in the round |
| latency | `load_ms`, `cold_ttft_ms`: the first answer after opening | ms | – |
| latency | `decode_tokens_per_s`: tokens 2..n | tokens/s | – |
| memory | `peak_rss`, `after_load`, `anon` | bytes | – |
| size | `preprocess`, `vision`, `llm`, `total` | bytes | – |
| answer | `picture`, or `blind` (pictures shuffled) | correct | the fields of AnswerRecord |
| accuracy | name of a public benchmark's score | % | protocol, n |
| verify | – | – | one build's record of the verify report |
| command | – | – | `command`: what was typed |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinyllava_edge.errors import DataError
from tinyllava_edge.files import new_file

SCHEMA = 1
KINDS = ("environment", "bundle", "latency", "memory", "size", "answer", "accuracy", "verify", "command")


@dataclass(frozen=True)
class Sample:
    """One line of results.jsonl."""

    kind: str
    """one of KINDS"""
    runtime: str = ""
    """`edge` or `reference`"""
    build: str = ""
    """build name, or the checkpoint's precision"""
    stage: str = ""
    """what was measured"""
    value: float | None = None
    """the raw value"""
    unit: str = ""
    """its unit"""
    sample: int = 0
    """number of the repetition"""
    environment_id: str = ""
    """the environment line it belongs to"""
    target: str = "cpu"
    """where it ran"""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """what else belongs to this kind"""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, `schema` first."""
        return {"schema": SCHEMA, **asdict(self)}


@dataclass(frozen=True)
class AnswerRecord:
    """One question, what was expected and what was said."""

    id: str
    """unique within the evaluation set"""
    image: str
    """picture's name below the image directory; the right one, also in a blind run"""
    question: str
    """the words asked"""
    expected: str
    """the annotated answer"""
    given: str
    """the runtime's answer"""
    question_type: str = ""
    """e.g. `yes/no`"""
    tier: str = ""
    """difficulty, where the set has tiers"""

    @property
    def correct(self) -> bool:
        """Exact match after strip and lower."""
        return self.given.strip().lower() == self.expected.strip().lower()

    def to_sample(self, runtime: str, build: str, stage: str, number: int, environment_id: str) -> Sample:
        """The `answer` line of this record."""
        value = float(self.correct)
        return Sample("answer", runtime, build, stage, value, "correct", number, environment_id, detail=asdict(self))

    @classmethod
    def from_sample(cls, sample: Sample) -> AnswerRecord:
        """The record in an `answer` line. Raises DataError when a key is missing."""
        try:
            return cls(**{name: str(sample.detail[name]) for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise DataError(f"an answer line lacks {error}", "measure again with this version") from error


def write_results(path: Path, samples: Iterable[Sample]) -> None:
    """Write a results file, whole or not at all."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for sample in samples:
            handle.write(to_line(sample))


def to_line(sample: Sample) -> str:
    """One JSON line with its newline."""
    return json.dumps(sample.to_dict(), ensure_ascii=True, allow_nan=False) + "\n"  # a kill can't halve a character


def read_results(paths: Sequence[Path], *, tolerate_cut: bool = False) -> list[Sample]:
    """Read and join results files.

    Args:
        paths: files, joined in this order.
        tolerate_cut: drop a last line without newline, which a killed run leaves.

    Raises:
        DataError: a missing file, a line that is not JSON, another schema, an unknown kind or a value out of range; the
            line is named.
    """
    samples: list[Sample] = []
    for path in paths:
        try:
            lines = path.read_bytes().split(b"\n")  # an answer may hold other line breaks
        except OSError as error:
            raise DataError(
                f"{path}: can't be read ({error})", "name a results.jsonl that `bench` or `eval` wrote"
            ) from error
        for number, line in enumerate(lines, 1):
            if tolerate_cut and number == len(lines):  # empty, unless the last newline is missing
                continue
            if line.strip():
                samples.append(_parse(line, f"{path}:{number}"))
    return samples


def _parse(line: bytes, where: str) -> Sample:
    try:
        value = json.loads(line.decode("utf-8"))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")  # refuses lone surrogates and NaN
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})", "remove the line, or measure again") from error
    if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA or value.get("kind") not in KINDS:
        raise DataError(f"{where}: not a result of schema {SCHEMA}", "measure again with this version")
    wanted = Sample.__dataclass_fields__
    if set(value) != set(wanted):
        raise DataError(
            f"{where}: keys differ from schema {SCHEMA}: {sorted(set(value) ^ set(wanted))}", "measure again"
        )
    number = value["value"]
    numeric = number is None or (isinstance(number, int | float) and not isinstance(number, bool))
    texts = all(
        isinstance(value[key], str) for key in ("runtime", "build", "stage", "unit", "environment_id", "target")
    )
    if not (numeric and texts and type(value["sample"]) is int and isinstance(value["detail"], dict)):
        raise DataError(f"{where}: a value has the wrong type", "measure again with this version")
    if number is not None and not abs(number) < 1e18:
        raise DataError(f"{where}: value is not a number below 1e18", "remove the line, or measure again")
    if value["kind"] == "bundle":
        detail = value["detail"]
        if not isinstance(detail.get("verified", {}), dict) or not isinstance(detail.get("sha256", ""), str):
            raise DataError(f"{where}: `verified` or `sha256` has the wrong type", "measure again with this version")
    return Sample(**value)
