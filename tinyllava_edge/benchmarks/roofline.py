"""Each stage as a share of what this machine could do at best: its least work over the ceilings measured in that run.

    vision, prefill    the longer of: operations, each kind (float, int8) at its own GEMM rate, added up; and bytes of
                       the weights (and of the prompt's keys and values), once, at the read bandwidth
    decode, load       bytes at the read bandwidth; preprocess at the copy bandwidth
    share              least possible time / median time, in percent

Ceilings are the CPU's, for each number of threads that was measured with. A GPU has none here, so its rows have a note.
Over 100 % means that the ceiling doesn't bind: a small model's weights stay in a cache, or llama.cpp's products beat
ONNX Runtime's, which the ceiling was measured with. All work is in work.py; it stands in the results' `bundle` line.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.work import BuildWork

NO_CEILING = {
    "decode_image_ms": "the file's compression decides, which no ceiling stands for",
    "load_cold_ms": "the disk decides, which isn't measured",
}
_TEST = re.compile(r"(pp|tg)([1-9]\d{0,8})")
_SIZE = re.compile(r"([1-9]\d{0,8})x([1-9]\d{0,8})")
_IN_CACHE = "over 100 %: what it reads stays in a cache"
_FASTER = "over 100 %: its kernels beat the measured product"
_NO_MACHINE = "no ceilings were measured for this target and number of threads"
_NO_WORK = "the build's work isn't known: its bundle line holds none"
_UNKNOWN = "what it takes isn't known: a ceiling, the picture's size or the prompt's length wasn't recorded"


@dataclass(frozen=True)
class Share:
    """One stage of one build."""

    target: str
    """where it ran"""
    runtime: str
    """`edge` or `reference`"""
    build: str
    """build name"""
    stage: str
    """as in the latency lines, e.g. `vision_ms`, `decode_tokens_per_s`, `pp512`; with a grid's mark: `vision_ms@t4`"""
    ms: float
    """median time of the stage; of one token where it is a rate"""
    work: float | None
    """least work, in `unit`; None where no ceiling stands for the stage"""
    unit: str
    """`GOP` (operations / 1e9) or `GB` (bytes / 1e9)"""
    ceiling: float | None
    """`unit` per second that the machine can do"""
    share_percent: float | None
    """share of the ceiling"""
    note: str = ""
    """why there is no share, or what one over 100 % means"""


@dataclass(frozen=True)
class _Case:
    """What the work of a stage depends on besides the build."""

    work: BuildWork
    ceilings: Mapping[str, float]
    size: float | None
    """bytes of the build's files"""
    vision: float
    """bytes of its vision graph; 0 where they aren't known"""
    prompt: int
    image: int
    steps: float
    """decoding steps of the median answer"""
    picture: str


_Least = tuple[float, str, float]  # work, its unit, least seconds


def shares(samples: Sequence[Sample]) -> list[Share]:
    """Shares of every build, stage by stage, in the samples' order; a stage without one has a row with the reason."""
    works, ceilings = _works(samples), _ceilings(samples)
    sizes = {(s.target, s.build, s.stage): s.value for s in samples if s.kind == "size"}
    groups: dict[tuple[str, str, str, str, str], dict[str, list[Sample]]] = {}
    for sample in samples:
        if sample.kind == "latency" and sample.value is not None and sample.value > 0:
            mark = sample.stage.partition("@")[2]
            key = (sample.target, sample.environment_id, sample.runtime, sample.build, mark)
            groups.setdefault(key, {}).setdefault(sample.stage, []).append(sample)
    rows = []
    for (target, environment, runtime, build, _), stages in groups.items():
        work = works.get((environment, build)) or works.get(("", build))
        rates = ceilings.get((target, environment))
        if work is None or not rates:
            for stage, found in stages.items():
                if _known(plain := stage.partition("@")[0]):
                    told = NO_CEILING.get(plain) or (_NO_WORK if work is None else _NO_MACHINE)
                    rows.append(Share(target, runtime, build, stage, _ms(plain, found), None, "", None, None, told))
            continue
        details = [s.detail for found in stages.values() for s in found]
        case = _Case(
            work,
            rates,
            sizes.get((target, build, "total")),
            sizes.get((target, build, "vision")) or 0.0,
            prompt=int(_median(_whole(detail.get("prompt_tokens")) for detail in details)),
            image=int(_median(_whole(detail.get("image_tokens")) for detail in details)),
            steps=_median(len(d["token_ms"]) for d in details if isinstance(d.get("token_ms"), list)),
            picture=next((d["image_size"] for d in details if isinstance(d.get("image_size"), str)), ""),
        )
        for stage, found in stages.items():
            if _known(plain := stage.partition("@")[0]):
                rows.append(Share(target, runtime, build, stage, *_share(plain, _ms(plain, found), case)))
    return rows


def _known(stage: str) -> bool:
    """Whether this is a stage that does work; whole answers are made of several."""
    return stage in NO_CEILING or stage in _STAGES or _TEST.fullmatch(stage) is not None


def _ms(stage: str, found: Sequence[Sample]) -> float:
    """The median in ms: of the stage, of a whole `pp` test, of one token of a `tg` test and of an answer."""
    value = statistics.median(float(s.value) for s in found if s.value is not None)
    test = _TEST.fullmatch(stage)
    if test:
        return 1000 * int(test[2]) / value if test[1] == "pp" else 1000 / value
    return 1000 / value if stage == "decode_tokens_per_s" else value


def _share(stage: str, ms: float, case: _Case) -> tuple[float, float | None, str, float | None, float | None, str]:
    if stage in NO_CEILING:
        return ms, None, "", None, None, NO_CEILING[stage]
    test = _TEST.fullmatch(stage)
    least = _LEAST[test[1]](case, int(test[2])) if test else _STAGES[stage](case)
    if least is None or least[0] <= 0 or least[2] <= 0:
        return ms, None, "", None, None, _UNKNOWN
    amount, unit, seconds = least
    percent = 100_000 * seconds / ms
    note = "" if percent <= 100 else _IN_CACHE if unit == "GB" else _FASTER
    return ms, amount, unit, amount / seconds, percent, note


def _vision(case: _Case) -> _Least | None:
    return _longer(
        _operations(case, case.work.vision_float, case.work.vision_int8), _bytes(case, case.vision, "read_gb_per_s")
    )


def _prefill(case: _Case, rows: int, pairs: float, heads: int) -> _Least | None:
    """Operations of so many positions; or the weights once, and each position's keys and values."""
    if rows <= 0:
        return None
    work = case.work
    counted = _operations(
        case,
        rows * work.body_float + heads * work.head_float + pairs * work.pair,
        rows * work.body_int8 + heads * work.head_int8,
    )
    read = (work.token_bytes if heads else _body_bytes(work)) + rows * work.position_bytes
    return _longer(counted, _bytes(case, read, "read_gb_per_s"))


def _body_bytes(work: BuildWork) -> float:
    """Bytes of the weights but the head, at least: one of the head's has 4 bytes at most, quantised 34/32 (Q8_0)."""
    return max(0.0, work.token_bytes - 4 * work.head_float / 2 - 34 / 32 * work.head_int8 / 2)


def _longer(counted: _Least | None, read: _Least | None) -> _Least | None:
    """What takes longer; operations must be known, since bytes alone would make a small share of most stages."""
    return counted if counted is None or read is None or counted[2] >= read[2] else read


def _pairs(positions: int) -> float:
    """Pairs of a position and one at or before it."""
    return positions * (positions + 1) / 2


def _whole_prompt(case: _Case) -> _Least | None:
    return _prefill(case, case.prompt, _pairs(case.prompt), 1)


def _image_prefill(case: _Case) -> _Least | None:
    """As if the picture came first: the few tokens before it are counted with the text."""
    return _prefill(case, case.image, _pairs(case.image), 0)


def _text_prefill(case: _Case) -> _Least | None:
    return _prefill(case, case.prompt - case.image, _pairs(case.prompt) - _pairs(case.image), 1)


def _decode(case: _Case) -> _Least | None:
    return _token(case, case.prompt + case.steps / 2)


def _token(case: _Case, cached: float) -> _Least | None:
    return _bytes(case, case.work.token_bytes + cached * case.work.position_bytes, "read_gb_per_s")


def _first_token(case: _Case) -> _Least | None:
    return _bytes(case, 4 * case.work.vocab, "read_gb_per_s")


def _preprocess(case: _Case) -> _Least | None:
    size = _SIZE.fullmatch(case.picture)
    if size is None:
        return None
    return _bytes(case, 3 * int(size[1]) * int(size[2]) + case.work.pixel_bytes, "copy_gb_per_s")


def _load(case: _Case) -> _Least | None:
    return None if case.size is None else _bytes(case, case.size, "read_gb_per_s")


_STAGES: Mapping[str, Callable[[_Case], _Least | None]] = {
    "preprocess_ms": _preprocess,
    "vision_ms": _vision,
    "image_prefill_ms": _image_prefill,
    "text_prefill_ms": _text_prefill,
    "prefill_ms": _whole_prompt,
    "first_token_ms": _first_token,
    "decode_tokens_per_s": _decode,
    "load_warm_ms": _load,
}
_LEAST: Mapping[str, Callable[[_Case, int], _Least | None]] = {
    "pp": lambda case, count: _prefill(case, count, _pairs(count), 1),
    "tg": lambda case, count: _token(case, count / 2),
}


def _operations(case: _Case, floats: float, integers: float) -> _Least | None:
    seconds = 0.0
    for amount, name in ((floats, "gemm_f32_gflop_per_s"), (integers, "gemm_int8_gop_per_s")):
        if amount and not case.ceilings.get(name):
            return None
        seconds += amount / 1e9 / case.ceilings[name] if amount else 0
    return (floats + integers) / 1e9, "GOP", seconds


def _bytes(case: _Case, amount: float, ceiling: str) -> _Least | None:
    rate = case.ceilings.get(ceiling)
    return (amount / 1e9, "GB", amount / 1e9 / rate) if rate else None


def _works(samples: Iterable[Sample]) -> dict[tuple[str, str], BuildWork]:
    """(environment, build) → work; also under no environment where all bundle lines agree, for a grid's other ones."""
    found: dict[tuple[str, str], BuildWork] = {}
    unsure = set[str]()
    for sample in samples:
        table = sample.detail.get("work") if sample.kind == "bundle" else None
        for build, value in table.items() if isinstance(table, Mapping) else ():
            work = BuildWork.from_dict(value)
            if work is not None:
                found[sample.environment_id, build] = work
                if found.setdefault(("", build), work) != work:
                    unsure.add(build)
    return {key: work for key, work in found.items() if key[0] or key[1] not in unsure}


def _ceilings(samples: Iterable[Sample]) -> dict[tuple[str, str], dict[str, float]]:
    """(target, environment) → name → the best value."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for sample in samples:
        if sample.kind == "ceiling" and sample.value is not None and sample.value > 0:
            table = found.setdefault((sample.target, sample.environment_id), {})
            table[sample.stage] = max(table.get(sample.stage, 0.0), float(sample.value))
    return found


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 31 else None


def _median(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else 0.0
