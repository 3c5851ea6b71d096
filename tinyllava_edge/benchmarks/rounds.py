"""The rounds of a measurement: warm up, then every build answers once a round, in an order drawn anew each round.

What a machine does over minutes, growing hot or being used by others, so meets all builds alike, and no build always
follows the same one, whose traces in the caches it would inherit. The draw is seeded. Whether another round follows is
decided once for all builds (see stop_rule); no sample is dropped.
While an answer is made nothing else runs here: no thread polls, and Python's garbage collector waits.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinyllava_edge import prompt
from tinyllava_edge.benchmarks.bench_grid import ANSWER, MAX_TOKENS, Task, decoder_test, spelled
from tinyllava_edge.benchmarks.energy import whole_readings
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.stop_rule import Seen
from tinyllava_edge.benchmarks.stop_rule import StopRule as StopRule
from tinyllava_edge.files import sha256_file

if TYPE_CHECKING:
    from tinyllava_edge.benchmarks.energy import Meter
    from tinyllava_edge.runtimes.base import Answer

WARM_UP = 2  # whole answers, each with the vision graph, and decoder tests; the first answer is kept as the cold one
IDLE = ("load_ms", "queue_ms")  # not part of a warm answer that nobody else waits for
OPTIONAL = ("image_prefill_ms", "text_prefill_ms", "total_ms")  # 0 where a runtime doesn't measure them
SEED = 0  # of the orders
_TALK_S = 1.0  # a line of progress at most so often
Progress = Callable[[str], None] | None


@dataclass(frozen=True)
class Arm:
    """A build on a device with a number of threads, opened."""

    runtime: Any
    """what answers, an EdgeRuntime"""
    build: str
    """its name"""
    environment_id: str = ""
    """its environment line"""
    target: str = "cpu"
    """where it runs"""
    mark: str = ""
    """what is appended to the stages' names; empty for the grid's first number of threads"""
    n_threads: int | None = None
    """its CPU threads"""

    @property
    def label(self) -> str:
        """What progress lines call it."""
        return f"{self.build}{self.mark}" + ("" if self.target == "cpu" else f" on {self.target}")


@dataclass(frozen=True)
class Question:
    """What is asked in every answer."""

    text: str
    """the question"""
    max_tokens: int = MAX_TOKENS
    """longest answer"""


@dataclass(frozen=True)
class Rounds:
    """What a measurement gave, and how it ended."""

    samples: list[Sample] = field(default_factory=list)
    """cold answers, then every stage of every round"""
    rounds: int = 0
    """rounds that were measured"""
    seconds: float = 0.0
    """how long they took"""
    stopped_by: str = ""
    """`count and time`, `resolution`, or the cap that came first: `most rounds`, `max-time`"""
    resolution: float | None = None
    """change between two builds that four of five such measurements would find, 0.05 is 5 %; the worst of all builds
    and tests; None with too few rounds"""


def measure(
    arms: Sequence[Arm],
    tasks: Sequence[Task],
    question: Question,
    rule: StopRule,
    *,
    run: str = "",
    meters: Mapping[str, Meter] | None = None,
    progress: Progress = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Warm up every arm, then measure in rounds.

    Args:
        arms: the builds; each meets every task once a round.
        tasks: answers and decoder tests.
        question: what is asked in answers.
        rule: when to stop.
        run: names this run in the samples' details, so that rounds can be paired later.
        meters: target → energy counters, read around each answer; energy isn't measured for other targets.
        progress: receives a line now and then, between answers.
        clock: seconds, for the stop rule.
    """
    samples: list[Sample] = []
    facts = {task: _facts(task, question, arms[0].runtime) for task in tasks}
    for arm in arms:
        samples += _warm_up(arm, tasks, question)
        _say(progress, f"{arm.label}: warm")
    given = meters or {}
    blind = [(arm, given[arm.target]) for arm in arms if arm.target in given and not given[arm.target].source]
    for arm, meter in blind:
        if not arm.mark:
            samples.append(_line(arm, "energy", "answer", None, "J", 0, {"source": "", "reason": meter.reason}))
    seeing = {target: meter for target, meter in given.items() if meter.source}
    draw, seen = random.Random(SEED), Seen(_groups(arms))
    start = last_said = clock()
    done, stopped_by, spent = 0, "", 0.0
    while not stopped_by:
        for task in tasks:
            for order, place in enumerate(draw.sample(range(len(arms)), len(arms))):
                arm = arms[place]
                detail = {"order": order, "run": run, "n_threads": arm.n_threads}
                if task.picture_size:
                    detail["image_size"] = spelled(task.picture_size)
                found = _one(arm, task, question, done, detail, facts[task], seeing.get(arm.target))
                seen.add(f"{task.name}{task.mark}", place, _whole_ms(found))
                samples += found
        done += 1
        now = clock()
        spent = now - start
        known = seen.look(done) if rule.resolution and rule.minima(done, spent) else None
        stopped_by = rule.verdict(done, spent, known)
        if stopped_by or now - last_said >= _TALK_S:
            last_said = now
            _say(progress, f"round {done}" + (f": done after {spent:.1f} s" if stopped_by else f", {spent:.0f} s"))
    return Rounds(whole_readings(samples), done, spent, stopped_by, seen.resolution())


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep Python's garbage collector from running inside, and leave it as it was."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def answer_samples(
    arm: Arm, answer: Answer, number: int, detail: Mapping[str, Any], facts: Mapping[str, Any], mark: str = ""
) -> list[Sample]:
    """One line for each stage of an answer.

    Hashes (`facts`) stand on the two whole times only, and the steps on the total.
    """
    counts = {**detail, "prompt_tokens": answer.n_prompt_tokens, "image_tokens": answer.n_image_tokens}
    whole = {"ttft_ms": {**counts, **facts}, "total_ms": {**counts, **facts, "token_ms": _rounded(answer.token_ms)}}
    samples = []
    for stage, value in answer.timings.to_dict().items():
        if stage not in IDLE and (value or stage not in OPTIONAL):
            told = whole.get(stage, counts)
            samples.append(_line(arm, "latency", f"{stage}{mark}", value, "ms", number, told))
    rate = answer.decode_tokens_per_s
    if rate is not None:
        samples.append(_line(arm, "latency", f"decode_tokens_per_s{mark}", rate, "tokens/s", number, counts))
    return samples


def _warm_up(arm: Arm, tasks: Sequence[Task], question: Question) -> list[Sample]:
    """Whole answers, vision graph included, and every decoder test; returns the cold answer's lines."""
    samples: list[Sample] = []
    for task in tasks:
        for number in range(WARM_UP if task.kind == ANSWER else 1):
            if task.kind != ANSWER:
                decoder_test(arm.runtime.llama, task)
                continue
            answer = arm.runtime.answer(task.picture, question.text, max_tokens=question.max_tokens)
            if number == 0 and not task.mark:
                cold = (("load_ms", answer.timings.load_ms), ("cold_ttft_ms", answer.timings.ttft_ms))
                samples += [_line(arm, "latency", f"{stage}{arm.mark}", ms, "ms", 0, {}) for stage, ms in cold]
    return samples


def _one(
    arm: Arm,
    task: Task,
    question: Question,
    number: int,
    detail: Mapping[str, Any],
    facts: Mapping[str, Any],
    meter: Meter | None,
) -> list[Sample]:
    mark = f"{task.mark}{arm.mark}"
    if task.kind != ANSWER:
        with undisturbed():
            ms = decoder_test(arm.runtime.llama, task)
        rate = 1000 * task.size / ms
        return [_line(arm, "latency", f"{task.name}{mark}", rate, "tokens/s", number, {**detail, "ms": ms})]
    with undisturbed(), contextlib.nullcontext() if meter is None else meter.measure() as reading:
        answer = arm.runtime.answer(task.picture, question.text, max_tokens=question.max_tokens)
    samples = answer_samples(arm, answer, number, detail, facts, mark)
    if reading is not None:
        told: dict[str, Any] = {"source": reading.source} | ({"reason": reading.reason} if reading.reason else {})
        told |= {"stood_still": True} if reading.stood_still else {}
        samples.append(_line(arm, "energy", f"answer{mark}", reading.joules, "J", number, told))
    return samples


def _groups(arms: Sequence[Arm]) -> list[list[int]]:
    """Places of the arms that differ in nothing but the build."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, arm in enumerate(arms):
        found.setdefault((arm.target, arm.mark), []).append(place)
    return list(found.values())


def _whole_ms(found: Sequence[Sample]) -> float:
    """How long an answer took to its last token, or a decoder test."""
    stages = {sample.stage.partition("@")[0]: sample for sample in found if sample.kind == "latency"}
    for name in ("total_ms", "ttft_ms"):
        if name in stages:
            return stages[name].value or 0.0
    return float(next((sample.detail["ms"] for sample in stages.values() if "ms" in sample.detail), 0.0))


def _facts(task: Task, question: Question, runtime: Any) -> dict[str, Any]:
    """What was asked: hashes of the whole prompt as text and of the picture's bytes, the picture's size."""
    if task.kind != ANSWER:
        return {}
    shape = prompt.get_template(runtime.spec.template)
    words = prompt.render(
        prompt.build([prompt.Turn(question.text, images=int(task.picture is not None))], shape), shape
    )
    return {
        "prompt_sha256": hashlib.sha256(words.encode()).hexdigest(),
        "max_tokens": question.max_tokens,
        "image_sha256": sha256_file(task.picture) if task.picture and task.picture.is_file() else "",
    }


def _line(
    arm: Arm, kind: str, stage: str, value: float | None, unit: str, number: int, detail: Mapping[str, Any]
) -> Sample:
    return Sample(kind, "edge", arm.build, stage, value, unit, number, arm.environment_id, arm.target, detail)


def _rounded(steps: Sequence[float]) -> list[float]:
    """To a tenth of a microsecond, which keeps the lines short."""
    return [round(ms, 4) for ms in steps]


def _say(progress: Progress, line: str) -> None:
    if progress:
        progress(line)
