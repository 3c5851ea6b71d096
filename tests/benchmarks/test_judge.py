"""The judge: a real client against a real HTTP server with scripted replies, kept replies, replay, killed runs."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllava_edge.benchmarks.judge import (
    EndpointJudge,
    ReplayJudge,
    Reply,
    append,
    judge_records,
    prompt_hash,
    read_replies,
    text_hash,
)
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import JudgeRequest, Question
from tinyllava_edge.benchmarks.tasks.llava_wild import TASK as WILD
from tinyllava_edge.benchmarks.tasks.mmvet import TASK as MMVET
from tinyllava_edge.errors import DataError, DependencyError, StorageError, TinyLlavaEdgeError, UsageError

KEY = "sk-very-secret"
QUESTIONS = [
    Question(f"v1_{k}", f"question {k}?", gold=f"gold {k}", expected=f"gold {k}", facts={"capability": ["rec"]})
    for k in range(4)
]
RECORDS = [
    AnswerRecord(q.id, "p.png", q.prompt, q.expected, f"answer {q.id}", task="mmvet", facts=q.facts) for q in QUESTIONS
]
REQUEST = JudgeRequest("be fair", "rate this", 0.5, 3)


class Server:
    """An endpoint that answers with what a test scripts, and notes what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Message] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] = lambda body: (200, completion("1"))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append(self.headers)
                status, value = outer.answer(body)
                text = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if text.startswith(b"<") else "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def script(self, replies: dict[str, list[str]]) -> None:
        """Replies by question id, in the order of the tries."""
        left = {id_: list(texts) for id_, texts in replies.items()}

        def answer(body: dict[str, Any]) -> tuple[int, Any]:
            prompt = body["messages"][-1]["content"]
            (question,) = [q for q in QUESTIONS if q.prompt in prompt]
            return 200, completion(left[question.id].pop(0))

        self.answer = answer


def completion(content: Any, **more: Any) -> dict[str, Any]:
    """A chat completion as an endpoint sends it."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], **more}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = Server()
    yield found
    found.close()


class Scripted:
    """A judge without HTTP: the next reply of a list, or whatever is raised."""

    model = "scripted"

    def __init__(self, *replies: str | Exception) -> None:
        self.replies = list(replies)
        self.requests: list[JudgeRequest] = []

    def ask(self, request: JudgeRequest) -> str:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


def test_what_is_sent(server: Server) -> None:
    judge = EndpointJudge(server.url, "gpt-4-0613")
    assert judge.ask(REQUEST) == "1"
    assert judge.ask(replace(REQUEST, system="", temperature=0.0)) == "1"
    assert server.bodies[0] == {
        "model": "gpt-4-0613", "temperature": 0.5, "max_tokens": 3,
        "messages": [{"role": "system", "content": "be fair"}, {"role": "user", "content": "rate this"}],
    }  # fmt: skip
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "rate this"}]
    assert server.bodies[1]["temperature"] == 0.0
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(judge) and KEY not in repr(vars(judge))


def test_another_key_variable_and_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "other")
    EndpointJudge(server.url, "m", "MY_KEY").ask(REQUEST)
    monkeypatch.delenv("MY_KEY")
    EndpointJudge(server.url, "m", "MY_KEY").ask(REQUEST)
    assert [head["Authorization"] for head in server.headers] == ["Bearer other", "Bearer none"]


@pytest.mark.parametrize("reply", ["", "nan", "1e9", "8, 9", "٠.٥", "é\n漢\u2028", "x" * 10_000, " 0.5 "])
def test_replies_come_as_they_are(server: Server, reply: str) -> None:
    server.answer = lambda body: (200, completion(reply))
    assert EndpointJudge(server.url, "m").ask(REQUEST) == reply


def test_no_text_is_an_empty_reply(server: Server) -> None:
    server.answer = lambda body: (200, completion(None))
    assert EndpointJudge(server.url, "m").ask(REQUEST) == ""


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, UsageError, r"refuses the key \(401\)"),
        (403, UsageError, r"refuses the key \(403\)"),
        (404, UsageError, "no such model"),
        (400, UsageError, "refuses the request"),
        (429, DataError, "still busy after 1 retries"),
        (500, DataError, "fails"),
        (503, DataError, "fails"),
    ],
)
def test_refusals(server: Server, status: int, kind: type[TinyLlavaEdgeError], message: str) -> None:
    server.answer = lambda body: (status, {"error": {"message": f"no, {KEY}\nis bad", "type": "x", "code": "y"}})
    judge = EndpointJudge(server.url, "some-model", max_retries=1)
    with pytest.raises(kind, match=message) as error:
        judge.ask(REQUEST)
    assert type(error.value) is kind and error.value.hint
    assert "some-model" in error.value.message and "\n" not in error.value.message
    assert KEY not in error.value.message + error.value.hint
    assert len(server.bodies) == (2 if status in (429, 500, 503) else 1)


def test_a_busy_endpoint_is_asked_again(server: Server) -> None:
    server.answer = lambda body: (429, {"error": {}}) if len(server.bodies) < 4 else (200, completion("0.5"))
    assert EndpointJudge(server.url, "m").ask(REQUEST) == "0.5"
    assert len(server.bodies) == 4


@pytest.mark.parametrize(
    "value",
    [
        b"<html>hello</html>", b"", b'{"choices": [', {}, [], "text", 3, {"choices": []},
        {"choices": None}, {"choices": [{}]},
        {"choices": {"0": 1}}, {"choices": [{"message": None}]}, completion(["a"]), completion(5), completion({"a": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_something_else_than_a_completion(server: Server, value: Any) -> None:
    server.answer = lambda body: (200, value)
    with pytest.raises(DataError, match="judge 'm' at http://127"):
        EndpointJudge(server.url, "m", max_retries=0).ask(REQUEST)


def test_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UsageError, match="can't be reached"):
        EndpointJudge(f"http://127.0.0.1:{port}/v1", "m", max_retries=0).ask(REQUEST)


def test_too_slow(server: Server) -> None:
    waiting = threading.Event()
    server.answer = lambda body: (200, completion("1")) if waiting.wait(5) else (500, {})
    with pytest.raises(DataError, match=r"no reply within 0\.2 s"):
        EndpointJudge(server.url, "m", timeout_s=0.2, max_retries=0).ask(REQUEST)
    waiting.set()


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "file:///etc/passwd", "http://", "http://[::1", "http://x:99999/v1", "ftp://x"]
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(UsageError, match="not an http or https URL"):
        EndpointJudge(url, "m")


def test_secrets_in_an_address_are_refused_unprinted() -> None:
    for url in ("http://me:pass@host/v1", "http://host/v1?key=pass", "http://pass@host/v1"):
        with pytest.raises(UsageError) as error:
            EndpointJudge(url, "m")
        assert "pass@" not in str(error.value) and "=pass" not in str(error.value)


def test_bad_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for more in ({"model": " "}, {"timeout_s": 0}, {"timeout_s": float("nan")}, {"max_retries": -1}):
        with pytest.raises(UsageError):
            EndpointJudge(**{"base_url": "http://host/v1", "model": "m", **more})
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nX: y")
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as error:
        EndpointJudge("http://127.0.0.1:1/v1", "m").ask(REQUEST)
    assert "secret" not in str(error.value)


def test_without_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(DependencyError) as error:
        EndpointJudge("http://127.0.0.1:1/v1", "m").ask(REQUEST)
    assert error.value.hint == "pip install 'tinyllava-edge[judge]'"


SCRIPT = {"v1_0": ["0.5"], "v1_1": ["x", " 1", "0.7 ok"], "v1_2": ["a", "b", "c", "", "nan"], "v1_3": ["1.0"]}


def test_judging_and_replay(server: Server, tmp_path: Path) -> None:
    server.script(SCRIPT)
    kept = tmp_path / "new" / "replies.jsonl"
    told: list[str] = []
    judged = judge_records(MMVET, QUESTIONS, RECORDS, EndpointJudge(server.url, "m"), kept, progress=told.append)
    assert [record.score for record in judged] == [0.5, 0.7, 0.0, 1.0]
    assert [record.parsed for record in judged] == ["0.5", "0.7", "unreadable", "1.0"]
    assert [record.facts["replies"] for record in judged] == list(SCRIPT.values())
    assert {record.facts["judge"] for record in judged} == {"m"} and judged[0].facts["capability"] == ["rec"]
    assert MMVET.metrics(judged)["total"] == 55.0
    assert [body["temperature"] for body in server.bodies] == [0, 0, 0, 0.5, 0, 0, 0.5, 1.0, 1.5, 0]
    assert told[-1] == "mmvet judged by m: 4 of 4 answers"

    text = kept.read_bytes()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["id"], row["try"]) for row in rows[:4]] == [("v1_0", 0), ("v1_1", 0), ("v1_1", 1), ("v1_1", 2)]
    keys = ["task", "id", "try", "judge", "temperature", "prompt_sha256", "answer_sha256", "reply", "time"]
    assert all(list(row) == keys for row in rows) and KEY.encode() not in text
    assert rows[0]["answer_sha256"] == text_hash("answer v1_0")

    asked = len(server.bodies)
    again = judge_records(MMVET, QUESTIONS, RECORDS, EndpointJudge(server.url, "m"), kept)
    replayed = judge_records(MMVET, QUESTIONS, RECORDS, ReplayJudge(kept), tmp_path / "unused")
    backwards = judge_records(MMVET, QUESTIONS, RECORDS[::-1], ReplayJudge(kept, "m"), kept)
    assert judged == again == replayed == backwards[::-1]
    assert len(server.bodies) == asked and kept.read_bytes() == text and not (tmp_path / "unused").exists()


@pytest.mark.parametrize("cut", [0, 1, 5, 60, 200, 290])
def test_a_killed_run_goes_on(tmp_path: Path, cut: int) -> None:
    """Stopped after three replies, `cut` bytes of the last line lost: nothing is asked twice but the lost one."""
    kept = tmp_path / "replies.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judge_records(MMVET, QUESTIONS, RECORDS, _Killed("0.5", "x", "y"), kept)
    whole = kept.read_bytes()
    assert whole.count(b"\n") == 3 and len(whole.splitlines()[2]) > 290
    kept.write_bytes(whole[: len(whole) - cut])
    rest = ["0.7", *SCRIPT["v1_2"], "1"]
    judge = Scripted(*(["y"] if cut > 1 else []), *rest)
    judged = judge_records(MMVET, QUESTIONS, RECORDS, judge, kept)
    assert [record.score for record in judged] == [0.5, 0.7, 0.0, 1.0] and judge.replies == []
    assert [len(record.facts["replies"]) for record in judged] == [1, 3, 5, 1]
    assert judge_records(MMVET, QUESTIONS, RECORDS, ReplayJudge(kept), kept) == judged
    assert kept.read_bytes().startswith(whole) if cut < 2 else kept.read_bytes().count(b"\n") == 10


class _Killed(Scripted):
    model = "scripted"

    def ask(self, request: JudgeRequest) -> str:
        if not self.replies:
            raise KeyboardInterrupt
        return super().ask(request)


def test_an_error_keeps_the_replies_so_far(tmp_path: Path) -> None:
    kept = tmp_path / "r.jsonl"
    with pytest.raises(DataError, match="busy"):
        judge_records(MMVET, QUESTIONS, RECORDS, Scripted("1", DataError("busy")), kept)
    judge = Scripted("0", "1", "1")
    assert [r.score for r in judge_records(MMVET, QUESTIONS, RECORDS, judge, kept)] == [1.0, 0.0, 1.0, 1.0]


def test_a_reply_counts_for_its_prompt_and_judge_only(tmp_path: Path) -> None:
    kept = tmp_path / "r.jsonl"
    first = RECORDS[:1]
    judge_records(MMVET, QUESTIONS, first, Scripted("1"), kept)
    changed = [replace(first[0], given="something else")]
    with pytest.raises(DataError, match=r"no reply to 'v1_0' \(what is there .*; 1 of 1 answers lack one"):
        judge_records(MMVET, QUESTIONS, changed, ReplayJudge(kept), kept)
    assert judge_records(MMVET, QUESTIONS, changed, Scripted("0.2"), kept)[0].score == 0.2
    other = Scripted("0.3")
    other.model = "other"
    assert judge_records(MMVET, QUESTIONS, first, other, kept)[0].score == 0.3
    with pytest.raises(DataError, match="several judges: other, scripted"):
        judge_records(MMVET, QUESTIONS, first, ReplayJudge(kept), kept)
    assert judge_records(MMVET, QUESTIONS, first, ReplayJudge(kept, "other"), kept)[0].score == 0.3
    assert judge_records(MMVET, QUESTIONS, first, ReplayJudge(kept, "scripted"), kept)[0].score == 1.0


def test_replay_counts_what_is_missing(tmp_path: Path) -> None:
    kept = tmp_path / "r.jsonl"
    judge_records(MMVET, QUESTIONS, RECORDS[:2], Scripted("1", "x", "0.5"), kept)
    with pytest.raises(DataError, match=r"'v1_2' \(none at all\); 2 of 4 answers"):
        judge_records(MMVET, QUESTIONS, RECORDS, ReplayJudge(kept), kept)
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:2]))  # the second try of v1_1 is gone
    with pytest.raises(DataError, match="'v1_1' .*a try is lacking"):
        judge_records(MMVET, QUESTIONS, RECORDS[:2], ReplayJudge(kept), kept)
    with pytest.raises(DataError, match="holds no replies for llava_in_the_wild"):
        judge_records(WILD, [], [], ReplayJudge(kept), kept)
    with pytest.raises(DataError, match="can't be read"):
        judge_records(MMVET, QUESTIONS, RECORDS, ReplayJudge(tmp_path / "absent"), kept)


def test_one_reply_of_llava_bench(tmp_path: Path) -> None:
    """An unreadable pair isn't asked for again."""
    gold = {"reference": "ref", "context": "c"}
    questions = [Question(str(k), "q", gold=gold, kind="conv") for k in range(3)]
    records = [AnswerRecord(q.id, "", q.prompt, "", "a", q.kind, task=WILD.name) for q in questions]
    judge = Scripted("8 6\nbecause", "8, 9", "9 7")
    judged = judge_records(WILD, questions, records, judge, tmp_path / "r")
    assert [record.score for record in judged] == [0.6, 0.0, 0.7] and len(judge.requests) == 3
    assert WILD.metrics(judged)["relative"] == 75.0
    with pytest.raises(DataError, match="has not been judged"):
        WILD.metrics(records)


def test_a_silent_judge(tmp_path: Path) -> None:
    """A model that thinks first has nothing left to say within three tokens; scoring all that as 0 would mislead."""
    kept = tmp_path / "r.jsonl"
    with pytest.raises(DataError, match="empty replies only, last to 'v1_2'"):
        judge_records(MMVET, QUESTIONS, RECORDS, Scripted(*[""] * 4, "  ", *[""] * 10), kept)
    for judge in (Scripted(), ReplayJudge(kept)):  # the kept replies give no score either
        with pytest.raises(DataError, match="empty replies only"):
            judge_records(MMVET, QUESTIONS, RECORDS[:3], judge, kept)
    once = judge_records(MMVET, QUESTIONS, RECORDS, Scripted(*[""] * 10, "1", "1"), tmp_path / "s")
    assert [record.score for record in once] == [0.0, 0.0, 1.0, 1.0]


def test_records_that_do_not_fit(tmp_path: Path) -> None:
    bad = [
        ([replace(RECORDS[0], task="pope")], "belongs to task 'pope'"),
        ([replace(RECORDS[0], id="v1_99")], "'v1_99' has no question"),
        ([RECORDS[0], RECORDS[0]], "'v1_0' occurs twice"),
        ([replace(RECORDS[0], given="\ud800")], "not valid text"),
    ]
    for records, message in bad:
        with pytest.raises(DataError, match=message):
            judge_records(MMVET, QUESTIONS, records, Scripted("1"), tmp_path / "r")
    with pytest.raises(UsageError, match="not judged"):
        judge_records(replace(MMVET, judging=None), QUESTIONS, RECORDS, Scripted(), tmp_path / "r")
    assert judge_records(MMVET, QUESTIONS, [], Scripted(), tmp_path / "r") == [] and not (tmp_path / "r").exists()


def test_a_lone_surrogate_in_a_reply(tmp_path: Path) -> None:
    judged = judge_records(MMVET, QUESTIONS, RECORDS[:1], Scripted("1 \udc80"), tmp_path / "r")
    assert judged[0].facts["replies"] == ["1 ?"] == [reply.reply for reply in read_replies(tmp_path / "r")]


GOOD = Reply("mmvet", "v1_0", 0, "m", 0.0, "ab", "cd", "1", "2026-01-01T00:00:00Z")


def line(**more: Any) -> str:
    row = {"task": "mmvet", "id": "v1_0", "try": 0, "judge": "m", "temperature": 0, "prompt_sha256": "ab"}
    return json.dumps({**row, "answer_sha256": "cd", "reply": "1", "time": "t", **more}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]\n", "r:1: not a JSON object"),
        (line() + "\n\n{\n", "r:4: not a JSON line"),
        (line() + "x" * 50, "the last line is not a judge's reply"),
        ('{"a": 1', "the last line is not a judge's reply"),
        ('{"a": 1}', "r:1: `task`"),
        (line() + line(reply="2"), "r:2: another reply to try 0 of 'v1_0'"),
        (line(reply=None), "`reply`"),
        (line(id=0), "`id`"),
        (line(**{"try": True}), "`try`"),
        (line(**{"try": 0.0}), "`try`"),
        (line(temperature="0"), "`temperature`"),
        (line(temperature=float("nan")), "r:1: not a JSON line"),
        (line(reply="\ud800"), "r:1: not a JSON line"),
        ("[" * 100_000 + "\n", "r:1: not a JSON line"),
        ("\xff\n", "r:1: not a JSON"),
    ],
)
def test_hostile_replies_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r").write_text(text, encoding="latin-1")
    before = (tmp_path / "r").read_bytes()
    with pytest.raises(DataError, match=message) as error:
        judge_records(MMVET, QUESTIONS, RECORDS[:1], Scripted("1"), tmp_path / "r")
    assert "\n" not in error.value.message and (tmp_path / "r").read_bytes() == before  # nobody's file is spoilt


def test_the_same_reply_twice_is_no_contradiction(tmp_path: Path) -> None:
    (tmp_path / "r").write_text(line() + line(time="u") + line(task="other", reply="2"), encoding="utf-8")
    assert [(reply.task, reply.reply) for reply in read_replies(tmp_path / "r")] == [("mmvet", "1"), ("other", "2")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4), st.integers(0, 400))
def test_append_mends_any_cut(tmp_path: Path, texts: list[str], cut: int) -> None:
    """However much of the end is lost, what is left reads back, and the next line is whole."""
    path = tmp_path / "r"
    path.unlink(missing_ok=True)
    replies = [replace(GOOD, number=number, reply=text) for number, text in enumerate(texts)]
    for reply in replies:
        append(path, reply)
    assert read_replies(path) == replies
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)])
    left = read_replies(path)
    assert left == replies[: len(left)]
    last = replace(GOOD, number=99)
    append(path, last)
    assert read_replies(path) == [*left, last] and path.read_bytes().endswith(b"\n")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    with pytest.raises(TinyLlavaEdgeError):
        judge_records(MMVET, QUESTIONS, RECORDS[:1], Scripted("1"), tmp_path / "r")
    (tmp_path / "file").write_text("", encoding="utf-8")
    judge = Scripted("1")
    with pytest.raises(StorageError, match="can't be written"):
        judge_records(MMVET, QUESTIONS, RECORDS[:1], judge, tmp_path / "file" / "r")
    assert judge.requests == []  # no reply is paid for that can't be kept


def test_the_hash_separates_system_and_prompt() -> None:
    assert prompt_hash(JudgeRequest("a", "b", 0, 1)) == prompt_hash(JudgeRequest("a", "b", 1, 2)) == text_hash("a\0b")
    assert prompt_hash(JudgeRequest("ab", "", 0, 1)) != prompt_hash(JudgeRequest("a", "b", 0, 1))
