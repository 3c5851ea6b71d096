"""The rounds of a measurement: warm up, then every build answers once a round, in an order that rotates.

A B C, B C A, C A B …: what a machine does over minutes, growing hot or being used by others, meets all builds alike.
Whether another round follows is decided once for all builds, by their number and by the clock; no sample is dropped.
While an answer is made nothing else runs here: no thread polls, and Python's garbage collector waits.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinyllava_edge import prompt
from tinyllava_edge.benchmarks.bench_grid import ANSWER, Task, decoder_test, spelled
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.errors import UsageError
from tinyllava_edge.files import sha256_file

if TYPE_CHECKING:
    from tinyllava_edge.benchmarks.energy import Meter
    from tinyllava_edge.runtimes.base import Answer

WARM_UP = 2  # whole answers, each with the vision graph, and decoder tests; the first answer is kept as the cold one
IDLE = ("load_ms", "queue_ms")  # not part of a warm answer that nobody else waits for
OPTIONAL = ("image_prefill_ms", "text_prefill_ms", "total_ms")  # 0 where a runtime doesn't measure them
_TALK_S = 1.0  # a line of progress at most so often
Progress = Callable[[str], None] | None


@dataclass(frozen=True)
class StopRule:
    """Rounds go on until both minima are met, or the cap is hit."""

    repetitions: int = 20
    """rounds at least; medians need 10 or more to mean something"""
    min_time_s: float = 0.0
    """seconds of measuring at least, warm-up not counted"""
    max_time_s: float = math.inf
    """seconds after which no further round begins, even if a minimum isn't met"""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        if self.repetitions < 1:
            raise UsageError(f"{self.repetitions} repetitions", "give --repetitions 1 or more")
        if not 0 <= self.min_time_s < math.inf or not self.max_time_s > 0:
            raise UsageError(
                f"--min-time {self.min_time_s}, --max-time {self.max_time_s}", "give seconds, the cap above 0"
            )
        if self.max_time_s < self.min_time_s:
            raise UsageError(
                f"--max-time {self.max_time_s:g} is shorter than --min-time {self.min_time_s:g}", "raise the cap"
            )

    def verdict(self, rounds: int, seconds: float) -> str:
        """Why to stop after so many rounds and seconds; empty to go on."""
        if rounds >= self.repetitions and seconds >= self.min_time_s:
            return "count and time"
        return "max-time" if seconds >= self.max_time_s else ""


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
    max_tokens: int = 16
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
    """`count and time`, or `max-time` where the cap came first"""


def measure(
    arms: Sequence[Arm],
    tasks: Sequence[Task],
    question: Question,
    rule: StopRule,
    *,
    run: str = "",
    meter: Meter | None = None,
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
        meter: energy counters, read around each answer; None doesn't measure energy.
        progress: receives a line now and then, between answers.
        clock: seconds, for the stop rule.
    """
    samples: list[Sample] = []
    facts = {task: _facts(task, question, arms[0].runtime) for task in tasks}
    for arm in arms:
        samples += _warm_up(arm, tasks, question)
        _say(progress, f"{arm.label}: warm")
    blind = meter is not None and meter.source == ""
    if meter is not None and blind:
        reading = {"source": "", "reason": meter.reason}
        samples += [_line(arm, "energy", "answer", None, "J", 0, reading) for arm in arms if not arm.mark]
    start = last_said = clock()
    done, stopped_by, spent = 0, "", 0.0
    while not stopped_by:
        for task in tasks:
            turn = done % len(arms)
            for order, arm in enumerate([*arms[turn:], *arms[:turn]]):
                detail = {"order": order, "run": run, "n_threads": arm.n_threads}
                if task.picture_size:
                    detail["image_size"] = spelled(task.picture_size)
                samples += _one(arm, task, question, done, detail, facts[task], None if blind else meter)
        done += 1
        now = clock()
        spent = now - start
        stopped_by = rule.verdict(done, spent)
        if stopped_by or now - last_said >= _TALK_S:
            last_said = now
            _say(progress, f"round {done}" + (f": done after {spent:.1f} s" if stopped_by else f", {spent:.0f} s"))
    return Rounds(samples, done, spent, stopped_by)


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
        told = {"source": reading.source} | ({"reason": reading.reason} if reading.reason else {})
        samples.append(_line(arm, "energy", f"answer{mark}", reading.joules, "J", number, told))
    return samples


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
