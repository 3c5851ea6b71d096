"""Answers that a model judges: asking it, keeping every raw reply, and scoring from the kept replies alone.

Nothing is sent anywhere unless an endpoint is named. Each reply is appended to a replies file as soon as it is there:
a killed run goes on where it stopped, and a score can be worked out again, by anybody, without the endpoint. A kept
reply counts only for the very prompt, answer included, that it was given to.

The replies file is only ever appended to, one JSON object per line:

    task            benchmark
    id              question
    try             number of the try, from 0
    judge           model that replied
    temperature     that it was asked at
    prompt_sha256   of system message, NUL, user message: the answer is in it
    answer_sha256   of the judged answer
    reply           as it came
    time            UTC, ISO 8601
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import JudgeRequest, Judging, Question, Task
from tinyllava_edge.errors import DataError, DependencyError, StorageError, UsageError
from tinyllava_edge.files import storage_errors

if TYPE_CHECKING:
    from openai import OpenAI

_SILENT = 3  # answers in a row with nothing but empty replies: the judge doesn't answer, whatever it is asked
_EVERY_S = 2.0  # between two progress lines
_NO_KEY = "none"  # the client insists on one
_WRONG = "name the address of an OpenAI-compatible endpoint; most end in /v1"
_KINDS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "id": str,
    "try": int,
    "judge": str,
    "temperature": (int, float),
    "prompt_sha256": str,
    "answer_sha256": str,
    "reply": str,
    "time": str,
}
_START = b'{"task": "'  # of every line that `append` writes


class AskedJudge(Protocol):
    """A model that can be asked."""

    @property
    def model(self) -> str:
        """Its name, kept with every reply and score."""

    def ask(self, request: JudgeRequest) -> str:
        """One reply as it came."""


@dataclass(frozen=True)
class EndpointJudge:
    """A model that is asked over HTTP. The key is read from the environment and kept nowhere else.

    Raises:
        UsageError: an address that isn't http(s), or that carries a password; no model; no time.
    """

    base_url: str
    """e.g. `http://localhost:8000/v1`; there is no default, so nothing is sent unasked"""
    model: str
    """as the endpoint calls it"""
    api_key_env: str = "OPENAI_API_KEY"
    """environment variable that holds the key; unset for an endpoint that wants none"""
    timeout_s: float = 120.0
    """for one reply"""
    max_retries: int = 6
    """after a busy or failing endpoint, each time waiting longer, or as long as it asks for"""

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.base_url)
            good = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:
            good = False
        if not good:
            raise UsageError("the judge's address is not an http or https URL", "e.g. http://localhost:8000/v1")
        if url.username or url.password or url.query:  # it would be printed with every error
            raise UsageError("the judge's address carries a password or a query", "put the key into the environment")
        if not self.model.strip():
            raise UsageError("the judge has no model name", "name the model that the endpoint serves")
        if not self.timeout_s > 0 or self.max_retries < 0:
            raise UsageError(
                f"timeout {self.timeout_s} s, {self.max_retries} retries", "more than 0 s, and 0 retries or more"
            )

    def ask(self, request: JudgeRequest) -> str:
        """One reply as it came; empty where the endpoint gives no text.

        Raises:
            UsageError: the endpoint is not there, refuses the key, doesn't know the model, or refuses the request.
            DataError: it stays busy, fails, is too slow, or answers with something else than a chat completion.
            DependencyError: the package `openai` is not installed.
        """
        client = self._client
        import openai

        messages: list[Any] = [{"role": "system", "content": request.system}] if request.system else []
        messages.append({"role": "user", "content": request.prompt})
        where = f"judge {self.model!r} at {self.base_url}"
        try:
            response: Any = client.chat.completions.create(
                model=self.model,
                messages=messages,
                temperature=request.temperature,
                max_tokens=request.max_tokens,
            )
        except openai.APITimeoutError as error:
            raise DataError(f"{where}: no reply within {self.timeout_s:g} s", "run it again later") from error
        except openai.APIConnectionError as error:
            raise UsageError(
                f"{where}: can't be reached ({_line(error.__cause__ or error)})", "check the address, and that it runs"
            ) from error
        except openai.APIStatusError as error:
            raise self._refusal(where, error.status_code, _line(error, client.api_key)) from error
        except (openai.OpenAIError, ValueError) as error:
            raise DataError(f"{where}: not a chat completion ({_line(error)})", _WRONG) from error
        try:
            content = response.choices[0].message.content
        except (AttributeError, LookupError, TypeError) as error:
            raise DataError(f"{where}: not a chat completion", _WRONG) from error
        if content is not None and not isinstance(content, str):
            raise DataError(f"{where}: the reply is a {type(content).__name__}, not a text", _WRONG)
        return content or ""

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise DependencyError("openai is not installed", "pip install 'tinyllava-edge[judge]'") from error
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):  # the HTTP client would print it in its error
            raise UsageError(f"${self.api_key_env} holds characters that no key has", "set it again")
        return OpenAI(
            base_url=self.base_url, api_key=key or _NO_KEY, timeout=self.timeout_s, max_retries=self.max_retries
        )

    def _refusal(self, where: str, status: int, text: str) -> UsageError | DataError:
        """The error for an HTTP status."""
        if status in (401, 403):
            given = "is" if os.environ.get(self.api_key_env) else "is not"
            return UsageError(f"{where}: refuses the key ({status})", f"check ${self.api_key_env}, which {given} set")
        if status == 404:
            return UsageError(f"{where}: no such model or address ({status})", "check both; most addresses end in /v1")
        if status == 429:
            return DataError(f"{where}: still busy after {self.max_retries} retries ({text})", "run it again later")
        if status < 500:
            return UsageError(
                f"{where}: refuses the request ({status}: {text})", "see what it says, or change the model"
            )
        return DataError(f"{where}: fails ({status}: {text})", "run it again later; replies so far are kept")


def _line(error: BaseException, key: str = "") -> str:
    """An error's first words on one line, without the key, which some servers repeat."""
    text = str(error).replace(key, "(key)") if key and key != _NO_KEY else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


@dataclass(frozen=True)
class ReplayJudge:
    """Replies that were given before."""

    path: Path
    """replies file"""
    model: str = ""
    """whose replies; empty: the only judge in the file"""


Judge = AskedJudge | ReplayJudge


def judge_records(
    task: Task,
    questions: Sequence[Question],
    records: Sequence[AnswerRecord],
    judge: Judge,
    replies: Path,
    *,
    progress: Callable[[str], None] | None = None,
) -> list[AnswerRecord]:
    """Have answers judged.

    Args:
        task: a task with `judging`.
        questions: its questions; those without a record are passed over.
        records: the answers, in any order.
        judge: whom to ask, or whose kept replies to take.
        replies: where replies are kept; not touched when they are replayed from their own file.
        progress: receives a line now and then.

    Returns:
        The records in the same order with `parsed` and `score` by the judge, and `replies` and `judge` in their facts.

    Raises:
        UsageError: the task isn't judged by a model, or the endpoint refuses.
        DataError: records that don't fit the questions, a replies file that isn't one, a reply that replay lacks, or a
            judge that stays silent.
        StorageError: `replies` can't be written.
    """
    judging = task.judging
    if judging is None:
        raise UsageError(f"task {task.name} is not judged by a model", "score it without a judge")
    pairs = _pairs(task, questions, records)
    place = judge.path if isinstance(judge, ReplayJudge) else replies
    kept = [reply for reply in read_replies(place, needed=isinstance(judge, ReplayJudge)) if reply.task == task.name]
    if isinstance(judge, ReplayJudge):
        name = judge.model or _only_judge(kept, place, task.name)
        known = _lookup(kept, name)
        _check_complete(judging, pairs, known, kept, f"{place}: of judge {name!r}")
    else:
        name, known = judge.model, _lookup(kept, judge.model)
    judged: list[AnswerRecord] = []
    silent, told = 0, time.monotonic()
    for number, (question, record) in enumerate(pairs, 1):
        heard: list[str] = []
        while _due(judging, heard):
            request = _request(judging, question, record, len(heard))
            key = (question.id, len(heard), prompt_hash(request))
            if key not in known and not isinstance(judge, ReplayJudge):
                make_ready(place)  # before a reply is paid for
                reply = _clean(judge.ask(request))
                known[key] = reply
                answer, when = text_hash(record.given), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                append(place, Reply(task.name, *key[:2], name, request.temperature, key[2], answer, reply, when))
            heard.append(known[key])
        silent = 0 if any(reply.strip() for reply in heard) else silent + 1
        if silent == min(_SILENT, len(pairs)):
            raise DataError(
                f"judge {name!r} gave empty replies only, last to {question.id!r} ({place})",
                f"name one that replies within {request.max_tokens} tokens, without thinking first, and a new file",
            )
        mark = judging.mark(question, record.given, heard)
        facts = {**record.facts, "replies": heard, "judge": name}
        judged.append(replace(record, parsed=mark.parsed, score=mark.score, facts=facts))
        now = time.monotonic()
        if progress is not None and (number == len(pairs) or now - told >= _EVERY_S):
            told = now
            progress(f"{task.name} judged by {name}: {number} of {len(pairs)} answers")
    return judged


def _pairs(
    task: Task, questions: Sequence[Question], records: Sequence[AnswerRecord]
) -> list[tuple[Question, AnswerRecord]]:
    """Each record with its question. Raises DataError for one of another task, an unknown id or a repeated one."""
    asked = {question.id: question for question in questions}
    seen: set[str] = set()
    for record in records:
        where = f"{task.name}: answer {record.id!r}"
        if record.task not in ("", task.name):
            raise DataError(f"{where} belongs to task {record.task!r}", "judge the answers of one task")
        if record.id not in asked:
            raise DataError(f"{where} has no question", "use the data set that the answers were given to")
        if record.id in seen:
            raise DataError(f"{where} occurs twice", "judge one run at a time")
        seen.add(record.id)
    return [(asked[record.id], record) for record in records]


def _due(judging: Judging, heard: Sequence[str]) -> bool:
    """Whether another reply is wanted."""
    return not heard or (len(heard) < judging.tries and judging.read(heard[-1]) is None)


def _request(judging: Judging, question: Question, record: AnswerRecord, number: int) -> JudgeRequest:
    request = judging.request(question, record.given, number)
    try:
        f"{request.system}{request.prompt}".encode()
    except UnicodeEncodeError as error:
        raise DataError(f"answer {record.id!r} is not valid text ({error})", "answer the question again") from error
    return request


def _clean(reply: str) -> str:
    """A reply that UTF-8 can hold: half a surrogate pair would spoil the results."""
    return reply.encode("utf-8", "replace").decode("utf-8")


def _only_judge(kept: Sequence[Reply], place: Path, task: str) -> str:
    """The judge that a file's replies come from. Raises DataError when it isn't one."""
    names = sorted({reply.judge for reply in kept})
    if not names:
        raise DataError(f"{place}: holds no replies for {task}", "name the task's replies file, or a judge's endpoint")
    if len(names) > 1:
        raise DataError(f"{place}: replies of several judges: {', '.join(names)}", "name one of these as the model")
    return names[0]


def _lookup(kept: Sequence[Reply], judge: str) -> dict[tuple[str, int, str], str]:
    """Replies of one judge by question, try and prompt."""
    return {(reply.id, reply.number, reply.prompt_sha256): reply.reply for reply in kept if reply.judge == judge}


def _check_complete(
    judging: Judging,
    pairs: Sequence[tuple[Question, AnswerRecord]],
    known: Mapping[tuple[str, int, str], str],
    kept: Sequence[Reply],
    where: str,
) -> None:
    """Raise DataError that names the first answer without its replies and counts all of them."""
    missing: list[str] = []
    for question, record in pairs:
        heard: list[str] = []
        while _due(judging, heard):
            reply = known.get((question.id, len(heard), prompt_hash(_request(judging, question, record, len(heard)))))
            if reply is None:
                missing.append(question.id)
                break
            heard.append(reply)
    if missing:
        other = any(reply.id == missing[0] for reply in kept)
        why = (
            "what is there belongs to another judge, answer or prompt, or a try is lacking" if other else "none at all"
        )
        raise DataError(
            f"{where} no reply to {missing[0]!r} ({why}); {len(missing)} of {len(pairs)} answers lack one",
            "replay the answers that were judged, or name the judge's endpoint to ask for the rest",
        )


@dataclass(frozen=True)
class Reply:
    """One reply of a judge."""

    task: str
    """benchmark"""
    id: str
    """question"""
    number: int
    """of the try, from 0"""
    judge: str
    """model that replied"""
    temperature: float
    """that it was asked at"""
    prompt_sha256: str
    """prompt_hash of the request"""
    answer_sha256: str
    """of the judged answer"""
    reply: str
    """as it came"""
    time: str
    """UTC, ISO 8601"""


def text_hash(text: str) -> str:
    """Hex SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def prompt_hash(request: JudgeRequest) -> str:
    """Hex SHA-256 of system message, NUL, user message."""
    return text_hash(f"{request.system}\0{request.prompt}")


def read_replies(path: Path, *, needed: bool = True) -> list[Reply]:
    """Read a replies file; a last line that a kill cut in half is left out.

    Raises:
        DataError: a line that isn't a reply, two different replies to one try, or no such file where one is needed.
    """
    if not needed and not path.exists():
        return []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error})", "name a file of a judge's replies") from error
    whole, tail = _split(data, path)
    found: dict[tuple[str, ...], Reply] = {}
    for number, line in enumerate((whole + tail).split(b"\n"), 1):
        if not line.strip():
            continue
        reply = _parse(line, f"{path}:{number}")
        key = (reply.task, reply.id, str(reply.number), reply.judge, reply.prompt_sha256)
        if found.setdefault(key, reply).reply != reply.reply:
            raise DataError(
                f"{path}:{number}: another reply to try {reply.number} of {reply.id!r}", "remove one of the two lines"
            )
    return list(found.values())


def append(path: Path, reply: Reply) -> None:
    """Add a reply at the end; what a kill left of a line there is cut off first. Raises StorageError."""
    line = dict(zip(_KINDS, astuple(reply), strict=True))
    data = json.dumps(line, ensure_ascii=True).encode("ascii") + b"\n"
    make_ready(path)
    with storage_errors(path), path.open("ab", buffering=0) as handle:
        handle.write(data)  # one write: the reply is there, or it is the cut last line


def make_ready(path: Path) -> None:
    """Make a replies file that can be added to: created if absent, cut back to its last whole line.

    Raises:
        StorageError: it can't be written.
        DataError: the end of the file isn't a reply's.
    """
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            _mend(path)
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror})", "name another replies file") from error


def _split(data: bytes, path: Path) -> tuple[bytes, bytes]:
    """Whole lines, and a last line that lacks only its newline; what else stands behind the last newline is dropped.

    Raises DataError for a rest that isn't the start of a reply: then this isn't a replies file.
    """
    cut = data.rfind(b"\n") + 1
    whole, tail = data[:cut], data[cut:]
    if not tail.strip():
        return whole, b""
    try:
        json.loads(tail.decode("utf-8"))
        return whole, tail
    except (ValueError, RecursionError) as error:
        if tail.startswith(_START) or _START.startswith(tail):
            return whole, b""
        raise DataError(f"{path}: the last line is not a judge's reply ({error})", "name another file") from error


def _mend(path: Path) -> None:
    """Make the file end with a whole line, so that the next one doesn't begin inside it."""
    if path.stat().st_size == 0:
        return
    with path.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        if handle.read(1) == b"\n":
            return
        handle.seek(0)
        whole, tail = _split(handle.read(), path)
        handle.truncate(len(whole) + len(tail))
        if tail:
            handle.seek(0, os.SEEK_END)
            handle.write(b"\n")


def _parse(line: bytes, where: str) -> Reply:
    try:
        value: Any = json.loads(line.decode("utf-8"))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")  # refuses lone surrogates and NaN
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON line ({error})", "remove the line, or name another file") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object", "name a file of a judge's replies")
    for key, kind in _KINDS.items():
        if not isinstance(value.get(key), kind) or isinstance(value[key], bool):
            raise DataError(
                f"{where}: `{key}` is missing or of another type",
                "remove the line, or name a file of a judge's replies",
            )
    return Reply(*(value[key] for key in _KINDS))
