"""An answer's end before its time: the client goes, time is up, the queue is full; and what other clients notice."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tinyllava_edge.runtimes.engine import Engine, Generation
from tinyllava_edge.runtimes.request import ask as request_of
from tinyllava_edge.runtimes.server.serve import Server

from .conftest import CHAT, ask, call, chat_bytes, png, raw, served, shown, until

# A grammar that keeps the model talking past 1,900 tokens: without it the answer might end by itself.
ENDLESS = {"grammar": "root ::= " + 6 * " [a-z ]{2000}", "max_tokens": 1900}


def cancelled(engine: Engine) -> int:
    return int(engine.stats()["requests"]["cancelled"])


def idle(engine: Engine) -> bool:
    found = engine.stats()
    return not found["running"] and not found["waiting"]


def block(engine: Engine) -> Generation:
    """A request that keeps the engine busy."""
    until(lambda: idle(engine))
    found = engine.submit(request_of("x", max_tokens=1900, grammar=ENDLESS["grammar"]))
    until(lambda: engine.stats()["running"])
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_the_engine(server: Server, engine: Engine, stream: bool) -> None:
    before = cancelled(engine)
    connection = raw(server, chat_bytes(stream=stream, **ENDLESS))
    if stream:
        while b"content" not in connection.recv(4096):
            pass
    else:
        until(lambda: engine.stats()["running"])
    connection.close()
    begin = time.monotonic()
    until(lambda: cancelled(engine) == before + 1 and idle(engine))
    assert time.monotonic() - begin < 1


def test_it_stops_within_a_few_tokens(server: Server, engine: Engine) -> None:
    """Tokens are counted by a whole answer of the same length beside it: the cut one must take far less time."""
    begin = time.monotonic()
    assert ask(server, **ENDLESS)[1]["usage"]["completion_tokens"] == 1900
    whole_s = time.monotonic() - begin
    connection = raw(server, chat_bytes(stream=True, **ENDLESS))
    while b"content" not in connection.recv(4096):
        pass
    connection.close()
    begin = time.monotonic()
    until(lambda: idle(engine))
    assert time.monotonic() - begin < max(0.1, whole_s / 10)


def test_a_waiting_client_that_goes_costs_nothing(server: Server, engine: Engine) -> None:
    first = raw(server, chat_bytes(stream=True, **ENDLESS))
    until(lambda: engine.stats()["running"])
    second = raw(server, chat_bytes(**ENDLESS))
    until(lambda: engine.stats()["waiting"] == 1)
    before = cancelled(engine)
    second.close()
    first.close()
    until(lambda: idle(engine) and cancelled(engine) == before + 2)


def test_time_is_up(engine: Engine) -> None:
    with served(engine, request_timeout_s=0.2) as server:
        status, reply, headers = ask(server, **ENDLESS)
        assert status == 504 and reply["error"]["code"] == "timeout" and headers["x-should-retry"] == "false"
        status, text, _ = ask(server, stream=True, **ENDLESS)
        events = [line for line in text.decode().split("\n\n") if line]
        assert status == 200 and json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert "[DONE]" not in text.decode() and "content" in events[1]
        fields: dict[str, Any] = {"model": engine.name, "messages": [{"role": "user", "content": "x"}]}
        fields |= {"max_tokens": 1900, "extra_body": {"grammar": ENDLESS["grammar"]}}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=2) as client:
            begin = time.monotonic()
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(**fields)
            assert time.monotonic() - begin < 1.5  # it wasn't tried three times
            with pytest.raises(openai.APIError, match="took too long"):
                list(client.chat.completions.create(**fields, stream=True))
    until(lambda: idle(engine))


def test_waiting_counts_too(engine: Engine) -> None:
    """One that waits behind another is told in time, though the engine hasn't come to it."""
    with served(engine, request_timeout_s=0.3) as server:
        blocker = block(engine)
        begin = time.monotonic()
        status, reply, _ = ask(server)
        waited = time.monotonic() - begin
        blocker.cancel()
        assert status == 504 and reply["error"]["code"] == "timeout" and waited < 1.0
    until(lambda: idle(engine))


def test_a_full_queue(server: Server, engine: Engine) -> None:
    blocker = block(engine)
    waiting = [engine.submit(request_of("x", max_tokens=1)) for _ in range(32)]
    status, reply, headers = ask(server)
    blocker.cancel()
    assert status == 429 and reply["error"]["type"] == "rate_limit_error" and reply["error"]["code"] == "queue_full"
    assert int(headers["retry-after"]) >= 1
    for generation in waiting:
        generation.result(20)
    assert ask(server, max_tokens=1)[0] == 200


def test_the_client_comes_back_by_itself(server: Server, engine: Engine) -> None:
    """The official client waits for Retry-After and asks again."""
    blocker = block(engine)
    waiting = [engine.submit(request_of("x", max_tokens=1)) for _ in range(32)]
    threading.Timer(0.5, blocker.cancel).start()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=2) as client:
        reply = client.chat.completions.create(
            model=engine.name, messages=[{"role": "user", "content": "x"}], max_tokens=2
        )
    assert reply.choices[0].message.content is not None
    for generation in waiting:
        generation.result(20)


def test_16_clients_get_what_one_gets(server: Server, engine: Engine) -> None:
    wanted = {seed: engine.generate("what color?", image=png(seed), max_tokens=24).text for seed in range(4)}

    def once(number: int) -> tuple[int, str]:
        fields: dict[str, Any] = {"max_tokens": 24, "stream": bool(number % 2)}
        status, reply, _ = ask(server, shown(png(number % 4)), **fields)
        assert status == 200
        if not fields["stream"]:
            return number % 4, reply["choices"][0]["message"]["content"]
        chunks = [json.loads(line[6:]) for line in reply.decode().split("\n\n") if line and "[DONE]" not in line]
        return number % 4, "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        assert all(text == wanted[seed] for seed, text in pool.map(once, range(64)))


def test_the_loop_is_free_while_the_engine_works(server: Server, engine: Engine) -> None:
    """Health is told within moments while an answer runs that takes a second."""
    with raw(server, chat_bytes(**ENDLESS)) as connection:
        until(lambda: engine.stats()["running"])
        times = []
        while engine.stats()["running"] and len(times) < 20:
            begin = time.monotonic()
            assert call(server, "GET", "/health")[0] == 200
            times.append(time.monotonic() - begin)
        assert len(times) > 3 and sorted(times)[len(times) // 2] < 0.1
        connection.close()
    until(lambda: idle(engine))


def test_a_client_that_does_not_read(engine: Engine, unhurried: pytest.MonkeyPatch) -> None:
    """Its stream fills the buffers and stalls; then the connection is dropped and the engine is free."""
    unhurried.setattr(engine, "name", "x" * 100_000)  # in every chunk: a few dozen of them fill all buffers
    with served(engine, read_timeout_s=1) as server:
        body = chat_bytes(stream=True, **ENDLESS)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(body)
        until(lambda: engine.stats()["running"])
        until(lambda: idle(engine))
        until(lambda: b'answers_total{outcome="gone"} 1.0' in call(server, "GET", "/metrics")[1])
        connection.close()


def test_metrics(engine: Engine) -> None:
    with served(engine) as server:
        reply = ask(server, shown(png(9)), max_tokens=5)[1]
        ask(server, temperature=9)
        call(server, "GET", "/nowhere")
        raw(server, chat_bytes(**ENDLESS)).close()
        until(lambda: b'answers_total{outcome="gone"} 1.0' in call(server, "GET", "/metrics")[1])
        status, text, headers = call(server, "GET", "/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = text.decode().splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    prefix = "tinyllava_edge_"
    assert values[prefix + 'http_requests_total{route="/v1/chat/completions",status="200"}'] == 1
    assert values[prefix + 'http_requests_total{route="/v1/chat/completions",status="400"}'] == 1
    assert values[prefix + 'http_requests_total{route="other",status="404"}'] == 1
    assert values[prefix + f'answers_total{{outcome="{reply["choices"][0]["finish_reason"]}"}}'] == 1
    assert values[prefix + "time_to_first_token_seconds_count"] == values[prefix + "answer_seconds_count"] == 1
    assert values[prefix + 'tokens_total{kind="generated"}'] == engine.stats()["tokens"]["generated"] >= 5
    assert values[prefix + "waiting"] == 0 and values[prefix + "cache_images_bytes"] > 0
    assert values[prefix + "cache_prefix_hits_total"] >= 0
    assert CHAT not in "".join(line for line in lines if "nowhere" in line)
