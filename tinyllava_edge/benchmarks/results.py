"""results.jsonl: one JSON object per line, raw samples only; every summary is computed from them.

Keys of every line:

    schema          1
    kind            one of KINDS
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
| latency | a stage of StageTimings, e.g. `ttft_ms`; `@t2` marks a grid point | ms | `order`, `run`, `n_threads` |
| latency | `load_ms`, `cold_ttft_ms`: the first answer after opening | ms | – |
| latency | `load_cold_ms`, `load_warm_ms`: opening in a fresh process, files out of the page cache or in | ms | – |
| latency | `total_ms`: request to last token | ms | `token_ms`: each decoding step |
| latency | `decode_tokens_per_s`: tokens 2..n | tokens/s | – |
| latency | `pp512`, `tg128` …: llama-bench's tests | tokens/s | – |
| memory | `peak_rss`, `after_load`, `anon`, `file`, `gpu` | bytes | – |
| energy | `answer` | J | `source`; value null with a `reason` where nothing can be read |
| condition | `before`, `after` | – | temperatures, frequencies, governor, throttling, load |
| ceiling | `copy_gb_per_s`, `gemm_f32_gflop_per_s`, `gemm_int8_gop_per_s` | its unit | – |
| size | `preprocess`, `vision`, `llm`, `total` | bytes | – |
| answer | `picture`, or `blind` (pictures shuffled) | correct | the fields of AnswerRecord |
| run | – | – | one evaluation: task, protocol, questions, their hash, shard |
| accuracy | name of a benchmark's score, e.g. `pope/f1` | % | protocol, n, and the judge where one spoke |
| divergence | cause, e.g. `llm`, `vision` | nats | mean KL per answer token of one question; see divergence.py |
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
from tinyllava_edge.files import has_huge_integer, new_file

SCHEMA = 1
KINDS = (
    "environment",
    "bundle",
    "latency",
    "memory",
    "energy",
    "condition",
    "ceiling",
    "size",
    "run",
    "answer",
    "accuracy",
    "divergence",
    "verify",
    "command",
)


def answered_on(runtime: str) -> str:
    """Target of the answers that a runtime gives here: `browser` for the page, else `cpu`."""
    return "browser" if runtime == "web" else "cpu"


@dataclass(frozen=True)
class Sample:
    """One line of results.jsonl."""

    kind: str
    """one of KINDS"""
    runtime: str = ""
    """`edge`, `mtmd`, `web` or `reference`"""
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
    """One question, what was expected, what was said, what that became."""

    id: str
    """unique within the evaluation set"""
    image: str
    """picture's name in the data set; the right one, also in a blind run"""
    question: str
    """the words asked"""
    expected: str
    """the annotated answer, for people to read"""
    given: str
    """the runtime's answer"""
    question_type: str = ""
    """e.g. `yes/no`"""
    tier: str = ""
    """difficulty, where the set has tiers"""
    task: str = ""
    """benchmark; empty for a LLaVA JSON file"""
    protocol: str = ""
    """everything that moves the score, as one id"""
    parsed: str = ""
    """what the answer counts as"""
    score: float | None = None
    """0..1; None: exact match decides, or no label is known where `task` is set"""
    unit: str = ""
    """questions that only count together"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """what else the task's metrics need"""
    prompt_sha256: str = ""
    """of the whole prompt as text, template included"""
    image_sha256: str = ""
    """of the picture's bytes"""
    n_prompt_tokens: int = 0
    """prompt positions, image embeddings included"""
    token_ids: tuple[int, ...] = ()
    """generated ids, the end token excluded"""
    margins: tuple[float, ...] = ()
    """logit of the chosen token minus the next best one's, per decoding step, the end token's step included"""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    """stage timings of the call that gave this answer; empty where another answer of the same call carries them"""

    @property
    def correct(self) -> bool:
        """Full score, or an exact match after strip and lower where there is no task."""
        if self.score is not None or self.task:
            return self.score is not None and self.score >= 1
        return self.given.strip().lower() == self.expected.strip().lower()

    @property
    def value(self) -> float | None:
        """The score, 0..1; None where no label is known."""
        return self.score if self.score is not None or self.task else float(self.correct)

    def to_sample(self, runtime: str, build: str, stage: str, number: int, environment_id: str) -> Sample:
        """The `answer` line of this record."""
        detail = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        detail = {name: value for name, value in detail.items() if name in _REQUIRED or value not in _EMPTY}
        place = answered_on(runtime)
        return Sample("answer", runtime, build, stage, self.value, "correct", number, environment_id, place, detail)

    @classmethod
    def from_sample(cls, sample: Sample) -> AnswerRecord:
        """The record in an `answer` line; keys that are absent have their defaults. Raises DataError."""
        detail = sample.detail
        found: dict[str, Any] = {}
        for name, meant in cls.__dataclass_fields__.items():
            if name not in detail:
                if name in _REQUIRED:
                    raise DataError(f"an answer line lacks {name!r}", "measure again with this version")
                continue
            value = detail[name]
            if not isinstance(value, _TYPES[str(meant.type)]):
                raise DataError(f"an answer line's {name!r} is a {type(value).__name__}", "measure again")
            found[name] = tuple(value) if isinstance(value, list) else value
        return cls(**found)


_REQUIRED = ("id", "image", "question", "expected", "given", "question_type", "tier")
_HALF = "\\ud"  # JSON's escape of any surrogate begins so
_EMPTY: tuple[Any, ...] = ("", [], {}, None)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float | None": (float, int, type(None)),
    "Mapping[str, Any]": dict,
    "Mapping[str, float]": dict,
    "tuple[int, ...]": (list, tuple),
    "tuple[float, ...]": (list, tuple),
}


def write_results(path: Path, samples: Iterable[Sample]) -> None:
    """Write a results file, whole or not at all."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for sample in samples:
            handle.write(to_line(sample))


def to_line(sample: Sample) -> str:
    """One JSON line with its newline. Half characters, as odd file names bring, become visible escapes."""
    value = sample.to_dict()
    line = json.dumps(value, ensure_ascii=True, allow_nan=False)  # a kill can't halve a character
    if _HALF in line:
        line = json.dumps(_whole_text(value), ensure_ascii=True, allow_nan=False)
    return line + "\n"


def _whole_text(value: Any) -> Any:
    """The JSON value with UTF-8 texts only: a surrogate that stands alone is written out, e.g. as `\\udce9`."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_whole_text(key): _whole_text(inner) for key, inner in value.items()}
    return [_whole_text(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_results(paths: Sequence[Path], *, tolerate_cut: bool = False) -> list[Sample]:
    """Read and join results files.

    Args:
        paths: files, joined in this order.
        tolerate_cut: drop a last line without newline, which a killed run leaves.

    Raises:
        DataError: a missing file, a pipe or a device, a line that is not JSON, another schema, an unknown kind or a
            value out of range; the line is named.
    """
    samples: list[Sample] = []
    for path in paths:
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise OSError("no regular file")
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
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")  # lone surrogates can't be
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
    if has_huge_integer(value, text):
        raise DataError(f"{where}: a whole number beyond 64 bits", "remove the line, or measure again")
    if value["kind"] == "bundle":
        detail = value["detail"]
        if not isinstance(detail.get("verified", {}), dict) or not isinstance(detail.get("sha256", ""), str):
            raise DataError(f"{where}: `verified` or `sha256` has the wrong type", "measure again with this version")
    return Sample(**value)
