"""lmms-eval's logs of single answers, `<date>_samples_<task>.jsonl`, as records that can be compared.

What is read was taken from the writer of lmms-eval 0.7: `input` is the context, `filtered_resps` the answer that was
scored, a string where there is one, and every metric has a key of its own. `doc` and `arguments`, which other versions
write, are read where they stand. The scores are lmms-eval's own and are not computed again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import read_json, read_lines
from tinyllava_edge.errors import DataError

_HINT = "name a *_samples_<task>.jsonl as lmms-eval wrote it with --log_samples"
_EXACT = ("exact_match",)
_JUDGED_LATER = ("gpt_eval_score",)  # a mapping without a score: lmms-eval judges all answers at the end

# task → keys of which a line has one; the metric that says how right one answer was
METRICS: dict[str, tuple[str, ...]] = {
    "pope": ("pope_accuracy",),
    "pope_adv": ("pope_accuracy",),
    "pope_pop": ("pope_accuracy",),
    "pope_random": ("pope_accuracy",),
    "mme": ("mme_perception_score", "mme_cognition_score"),
    "gqa": _EXACT,
    "gqa_lite": _EXACT,
    "textvqa_val": _EXACT,
    "textvqa_val_lite": _EXACT,
    "vqav2_val": _EXACT,
    "vqav2_val_lite": _EXACT,
    "vizwiz_vqa_val": _EXACT,
    "vizwiz_vqa_val_lite": _EXACT,
    "ok_vqa_val2014": _EXACT,
    "ok_vqa_val2014_lite": _EXACT,
    "scienceqa": _EXACT,
    "scienceqa_img": _EXACT,
    "mmvet": ("gpt_eval_score",),
    "mmbench_en_dev": _JUDGED_LATER,
    "mmbench_en_dev_lite": _JUDGED_LATER,
    "mmbench_en_dev_static": _JUDGED_LATER,
    "mmbench_cn_dev": _JUDGED_LATER,
    "mmbench_cn_dev_lite": _JUDGED_LATER,
    "mmbench_cn_cc": _JUDGED_LATER,
    "mmbench_ko_dev": _JUDGED_LATER,
    "mmbench_ru_dev": _JUDGED_LATER,
}
_NO_METRIC = {
    "doc_id",
    "doc",
    "target",
    "arguments",
    "input",
    "resps",
    "filtered_resps",
    "filter",
    "token_counts",
    "input_media",
    "doc_hash",
    "prompt_hash",
    "target_hash",
    "submission",
}
_IMAGE_KEYS = ("image_id", "imageId", "image_source", "image", "image_path")
_LOG_LIKELIHOOD = re.compile(r"-?(\d+(\.\d*)?(e[+-]?\d+)?|inf|nan)")


def read_lmms_samples(path: Path, task: str | None = None) -> list[AnswerRecord]:
    """Read one task's log.

    The score is that of the task's metric in METRICS. Of a task that isn't there, it is the first metric that every
    line has with a value in 0..1. It is None where the log has none, for instance where a judge spoke at the end.
    `facts` names the metric.

    Args:
        path: the log. A `<date>_results.json` beside it gives lmms-eval's version and the number of samples.
        task: its name; by default what follows `_samples_` in the file's name.

    Returns:
        Records in the file's order, with `doc_id` as id.

    Raises:
        DataError: a line that is broken or of another shape, a doc_id that occurs twice, a metric out of range, no
            lines, or fewer than the run had; file and line are named.
    """
    stamp, mark, rest = path.stem.partition("_samples_")
    name = task or (rest if mark else "")
    if not name:
        raise DataError(f"{path}: its name tells no task", "keep lmms-eval's file name: <date>_samples_<task>.jsonl")
    lines = list(read_lines(path))
    if not lines:
        raise DataError(f"{path}: holds no samples", _HINT)
    version = _check_run(path.with_name(f"{stamp}_results.json"), path, name, len(lines)) if mark else ""
    protocol = "/".join(part for part in ("lmms-eval", version, name) if part)
    keys = METRICS[name] if name in METRICS else _common_metric([line for _, line in lines])
    records: list[AnswerRecord] = []
    seen: set[str] = set()
    for where, line in lines:
        record = _record(line, where, keys, name, protocol)
        if record.id in seen:
            raise DataError(
                f"{where}: doc_id {record.id} occurs twice",
                "keep one run and one filter per file: lmms-eval appends to a file that is there",
            )
        seen.add(record.id)
        records.append(record)
    return records


def _record(line: Mapping[str, Any], where: str, keys: Sequence[str], task: str, protocol: str) -> AnswerRecord:
    doc_id = line.get("doc_id")
    if isinstance(doc_id, bool) or not isinstance(doc_id, int | str):
        raise DataError(f"{where}: `doc_id` is a {type(doc_id).__name__}", _HINT)
    key = next((key for key in keys if key in line), None)
    value = line[key] if key is not None else None
    detail: Mapping[str, Any] = value if isinstance(value, dict) else {}
    return AnswerRecord(
        id=str(doc_id),
        image=_image(line, detail, task),
        question=_question(line, where),
        expected=_expected(line, where),
        given=_given(line, where),
        question_type=_text(detail.get("category")),
        task=task,
        protocol=protocol,
        parsed=_text(detail.get("prediction")),
        score=_score(value, where, key),
        unit=_text(detail.get("question_id")) if task == "mme" else "",
        facts={} if key is None else {"metric": key},
    )


def _given(line: Mapping[str, Any], where: str) -> str:
    """The scored answer; of several (repeats), the first, which lmms-eval scores too."""
    found = line.get("filtered_resps")
    while isinstance(found, list) and found:
        pair = [str(item) for item in found]
        if len(pair) == 2 and pair[1] in ("True", "False") and _LOG_LIKELIHOOD.fullmatch(pair[0].lower()):
            raise DataError(f"{where}: holds log-likelihoods, not answers", "choose a task that generates text")
        found = found[0]
    if not isinstance(found, str):
        raise DataError(f"{where}: `filtered_resps` holds no answer but a {type(found).__name__}", _HINT)
    return found


def _question(line: Mapping[str, Any], where: str) -> str:
    found = line["input"] if "input" in line else line.get("arguments")
    while isinstance(found, list) and found:
        found = found[0]
    if not isinstance(found, str):
        raise DataError(f"{where}: neither `input` nor `arguments` begins with the question", _HINT)
    return found


def _expected(line: Mapping[str, Any], where: str) -> str:
    if "target" not in line:
        raise DataError(f"{where}: lacks `target`", _HINT)
    target = line["target"]
    return target if isinstance(target, str) else json.dumps(target, ensure_ascii=False)


def _score(value: Any, where: str, key: str | None) -> float | None:
    if isinstance(value, dict):
        if "score" not in value:
            return None
        value = value["score"]
    if value is None:
        return None
    if not _is_share(value):
        raise DataError(f"{where}: `{key}` is {str(value)[:40]!r}, not a number in 0..1", "write the log again")
    return float(value)


def _is_share(value: Any) -> bool:
    """Whether this is a number in 0..1; truth values count as 0 and 1."""
    return isinstance(value, int | float) and 0 <= value <= 1


def _plain(value: Any) -> Any:
    return value.get("score") if isinstance(value, dict) else value


def _common_metric(lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The first metric that every line has with a value in 0..1: one that changes from line to line says nothing."""
    names = (key for key in lines[0] if key not in _NO_METRIC)
    found = next((key for key in names if all(_is_share(_plain(line.get(key))) for line in lines)), None)
    return () if found is None else (found,)


def _image(line: Mapping[str, Any], detail: Mapping[str, Any], task: str) -> str:
    """The picture's name, where the log has it: questions on one picture hang together."""
    found = line.get("doc")
    doc = found if isinstance(found, dict) else {}
    for key in _IMAGE_KEYS:
        if name := _text(doc.get(key)):
            return name
    if task == "mme":  # its question_id is the picture's path
        return _text(detail.get("question_id"))
    media = line.get("input_media")
    if not isinstance(media, list) or len(media) != 1 or str(media[0]).startswith("data:"):
        return ""
    name = _text(media[0])
    return "/".join(name.split("/")[-2:]) if name.startswith("/") else name  # the rest is one machine's directory


def _text(value: Any) -> str:
    """A name or number as text; empty for anything else."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _check_run(results: Path, log: Path, task: str, n: int) -> str:
    """lmms-eval's version (branch@commit), empty where unknown. Raises DataError when the log lacks samples."""
    if not results.is_file():
        return ""
    found = read_json(results)
    if not isinstance(found, dict):
        raise DataError(f"{results}: not a results file of lmms-eval", "put the right one there, or take it away")
    counts = found.get("n-samples")
    count = counts.get(task) if isinstance(counts, dict) else None
    wanted = count.get("effective") if isinstance(count, dict) else None
    config = found.get("config")
    offset = config.get("offset") if isinstance(config, dict) else None
    if type(wanted) is int and not offset and n < wanted:
        raise DataError(f"{log}: {n:,} of {wanted:,} samples", "the log was cut: copy it whole, or run again")
    version = found.get("lmms_eval_version")
    if not isinstance(version, str) or version.startswith("unknown@") or version.endswith("@unknown"):
        return ""
    return version
