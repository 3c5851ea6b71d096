"""The official client, unmodified, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tinyllava_edge.runtimes.engine import Engine
from tinyllava_edge.runtimes.server.serve import Server

from .conftest import png, served, shown

KEY = "a-key-of-enough-length"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as opened:
        yield opened


def said(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def test_chat(client: openai.OpenAI, engine: Engine) -> None:
    reply = client.chat.completions.create(model=engine.name, messages=said("what color?"), max_tokens=12)
    wanted = engine.generate("what color?", max_tokens=12)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.model == engine.name
    assert reply.choices[0].message.role == "assistant" and reply.choices[0].message.content == wanted.text
    assert reply.choices[0].finish_reason == wanted.finish_reason == "length"
    assert reply.usage is not None and reply.usage.completion_tokens == 12
    assert reply.usage.prompt_tokens == wanted.n_prompt_tokens
    assert reply.usage.total_tokens == wanted.n_prompt_tokens + 12
    assert reply.system_fingerprint == f"fp_{engine.environment()['bundle_sha256'][:12]}_{engine.build}"
    again = client.chat.completions.create(model=engine.name, messages=said("what color?"), max_tokens=12)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == 0  # one stretch, which is computed whole
    assert again.id != reply.id
    timings = reply.model_extra["timings"]  # type: ignore[index]
    assert timings["prefill_ms"] > 0 and timings["decode_ms"] > 0 and timings["ttft_ms"] >= timings["prefill_ms"]
    assert timings["decode_tokens_per_s"] > 0 and timings["vision_ms"] == 0


def test_stream_equals_the_whole_answer(client: openai.OpenAI, engine: Engine) -> None:
    options: dict[str, Any] = {"model": engine.name, "messages": said(shown(png(1))), "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content == engine.generate("what color?", image=png(1), max_tokens=24).text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24 and chunks[-1].usage.prompt_tokens > engine.spec.visual_tokens
    assert len({c.id for c in chunks}) == 1
    assert chunks[-2].model_extra["timings"]["decode_ms"] > 0  # type: ignore[index]
    without = list(client.chat.completions.create(**options, stream=True))
    assert all(c.usage is None for c in without)


def test_several_pictures_over_several_turns(client: openai.OpenAI, engine: Engine) -> None:
    pictures = [png(2), png(3), png(4, kind="JPEG")]
    messages: list[Any] = [
        {"role": "developer", "content": "Answer briefly."},
        {"role": "user", "content": shown(pictures[0], pictures[1], text="compare them")},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "and"}, *shown(pictures[2], text="this?")]},
    ]
    reply = client.chat.completions.create(model=engine.name, messages=messages, max_tokens=12)
    wanted = engine.generate(
        [
            {"role": "system", "content": "Answer briefly."},
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": p} for p in pictures[:2]),
                    {"type": "text", "text": "compare them"},
                ],
            },
            {"role": "assistant", "content": "red"},
            {
                "role": "user",
                "content": [{"type": "image", "image": pictures[2]}, {"type": "text", "text": "and\nthis?"}],
            },
        ],
        max_tokens=12,
    )
    assert reply.choices[0].message.content == wanted.text and reply.usage is not None
    assert reply.usage.prompt_tokens == wanted.n_prompt_tokens > 3 * engine.spec.visual_tokens


def test_sampling_stop_and_extras(client: openai.OpenAI, engine: Engine) -> None:
    options: dict[str, Any] = {"model": engine.name, "messages": said("what color?"), "max_completion_tokens": 16}
    warm = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "extra_body": {"top_k": 40}}
    first, second = (client.chat.completions.create(**options, **warm).choices[0].message.content for _ in range(2))
    wanted = engine.generate("what color?", max_tokens=16, temperature=1.5, top_p=0.9, top_k=40, seed=7).text
    greedy = engine.generate("what color?", max_tokens=16).text
    assert first == second == wanted != greedy
    word = greedy.split()[2]
    cut = client.chat.completions.create(**options, stop=[word, "never"])
    assert cut.choices[0].message.content == greedy[: greedy.index(word)].rstrip()
    assert cut.choices[0].finish_reason == "stop"
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "logprobs": False, "presence_penalty": 0}
    assert client.chat.completions.create(**options, **harmless).choices[0].message.content == greedy


def test_json(client: openai.OpenAI, engine: Engine) -> None:
    options: dict[str, Any] = {"model": engine.name, "messages": said("what color?"), "max_tokens": 200}
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green", "blue"]}, "round": {"type": "boolean"}},
        "required": ["color", "round"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "shape", "strict": True, "schema": schema}}
    found = json.loads(client.chat.completions.create(**options, response_format=form).choices[0].message.content or "")
    assert found["color"] in ("red", "green", "blue") and found["round"] in (True, False) and len(found) == 2
    grammar = {"grammar": 'root ::= "yes" | "no"'}
    assert client.chat.completions.create(**options, extra_body=grammar).choices[0].message.content in ("yes", "no")
    reply = client.chat.completions.create(**options, response_format={"type": "json_object"}).choices[0]
    assert (reply.message.content or "").startswith("{")
    if reply.finish_reason == "stop":
        assert isinstance(json.loads(reply.message.content or ""), dict)


def test_models(client: openai.OpenAI, engine: Engine) -> None:
    listed = list(client.models.list())
    assert [m.id for m in listed] == [engine.name] and listed[0].object == "model"
    assert client.models.retrieve(engine.name).model_extra["meta"]["n_ctx"] == engine.n_ctx  # type: ignore[index]
    with pytest.raises(openai.NotFoundError, match="this server runs"):
        client.models.retrieve("other")


def test_errors_become_the_clients_classes(client: openai.OpenAI, engine: Engine) -> None:
    def create(**fields: Any) -> Any:
        return client.chat.completions.create(**{"model": engine.name, "messages": said("what?"), **fields})

    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o'") as found:
        create(model="gpt-4o")
    assert found.value.code == "model_not_found" and found.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature must be from 0 to 2") as wrong:
        create(temperature=3)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="fetches no address") as fetch:
        create(messages=said([{"type": "image_url", "image_url": {"url": "http://example.com/cat.png"}}]))
    assert fetch.value.code == "unsupported_image_url"
    with pytest.raises(openai.BadRequestError, match="not a picture in a known format") as picture:
        create(messages=said(shown(b"hello")), stream=True)  # known only in the engine, still before the stream starts
    assert picture.value.code == "invalid_image"
    with pytest.raises(openai.BadRequestError, match="does not fit n_ctx") as long:
        create(messages=said("word " * 5000))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        create(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_key(engine: Engine) -> None:
    with served(engine, {"TINYLLAVA_EDGE_API_KEY": KEY}) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as right:
            assert right.chat.completions.create(model=engine.name, messages=said("what?"), max_tokens=1).choices
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY + "x", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError, match="wrong API key"):
                wrong.models.list()
            big = said(shown(b"\0" * (8 << 20)))  # its body is not read, and still the client gets to see why
            with pytest.raises(openai.AuthenticationError, match="wrong API key"):
                wrong.chat.completions.create(model=engine.name, messages=big)


def test_key_from_a_file(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    with (
        served(engine, api_key_file=tmp_path / "key") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        assert [m.id for m in client.models.list()] == [engine.name]


def test_async_client(server: Server, engine: Engine) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=engine.name, messages=said(shown(png(5))), max_tokens=8, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    assert asyncio.run(ask()) == engine.generate("what color?", image=png(5), max_tokens=8).text
