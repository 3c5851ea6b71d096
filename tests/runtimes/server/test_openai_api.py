"""Every field of a request: taken, passed over, or refused by name."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.prompt import Turn
from tinyllava_edge.runtimes.sampling import Sampling
from tinyllava_edge.runtimes.server import openai_api
from tinyllava_edge.runtimes.server.errors import ApiError
from tinyllava_edge.runtimes.server.openai_api import read_chat
from tinyllava_edge.runtimes.server.options import ServerOptions

from .conftest import data_url, png, shown

OPTIONS = ServerOptions()


def read(options: ServerOptions = OPTIONS, **fields: Any) -> Any:
    data = {"messages": [{"role": "user", "content": "what?"}], **fields}
    return read_chat(json.dumps(data).encode(), options, "tiny")


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as found:
        read(**fields)
    return found.value


def test_defaults() -> None:
    found = read()
    assert found.request.turns == (Turn("what?"),) and found.request.pictures == () and found.request.system is None
    assert found.request.max_tokens == OPTIONS.default_max_tokens
    assert found.request.sampling == Sampling() and found.request.stop == ()
    assert not found.stream and not found.include_usage


def test_values_arrive() -> None:
    found = read(
        model="tiny",
        temperature=0.5,
        top_p=0.25,
        top_k=9,
        seed=3,
        max_tokens=5,
        max_completion_tokens=7,
        stop="a",
        stream=True,
        stream_options={"include_usage": True},
        grammar="root ::= [a-z]",
    )
    assert found.request.sampling == Sampling(0.5, 0.25, 9, 3)
    assert found.request.max_tokens == 7 and found.request.stop == ("a",) and found.request.grammar == "root ::= [a-z]"
    assert found.stream and found.include_usage
    assert read(seed=-1).request.sampling.seed == 2**64 - 1 and read(top_p=0).request.sampling.top_p > 0
    schema = {"type": "object", "properties": {}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert read(response_format=form).request.json_schema == schema
    assert read(response_format={"type": "json_object"}).request.json_schema == {"type": "object"}
    assert read(response_format={"type": "text"}).request.json_schema is None


def test_null_is_as_good_as_absent() -> None:
    names = openai_api.READ - {"messages"} | openai_api.IGNORED | set(openai_api.NEUTRAL)
    assert read(**dict.fromkeys(names)) == read()


def test_pictures_come_as_bytes_in_order() -> None:
    messages = [
        {"role": "user", "content": shown(png(1), png(2))},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": shown(png(3), text="and?")},
    ]
    request = read(messages=messages).request
    assert request.pictures == (png(1), png(2), png(3))
    assert request.turns == (Turn("what color?", "red", 2), Turn("and?", images=1))


@pytest.mark.parametrize("name", sorted(openai_api.IGNORED))
def test_harmless_fields_are_passed_over(name: str) -> None:
    assert read(**{name: {"any": ["thing"]}}) == read()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("functions", [{}]),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("logit_bias", {"1": 5}),
        ("frequency_penalty", 0.1),
        ("presence_penalty", -1),
        ("tool_choice", "required"),
        ("verbosity", "low"),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("n", True),
        ("n", "1"),
        ("logprobs", 0),
    ],
)
def test_what_would_change_the_answer_is_refused(name: str, value: Any) -> None:
    error = refused(**{name: value})
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")


@pytest.mark.parametrize("name", ["min_p", "Temperature", "", "\u202e", "x" * 10_000])
def test_unknown_fields_are_refused(name: str) -> None:
    error = refused(**{name: 1})
    assert error.code == "unknown_parameter" and len(error.message) < 200


def test_wrong_values_name_their_field() -> None:
    """Every field with every kind of JSON value: taken, or refused with 400 and the field's name."""
    values = [
        True,
        False,
        0,
        -1,
        1,
        10**400,
        1.5,
        -0.0,
        1e308,
        "",
        "x",
        "\ud800",
        "\0",
        [],
        [1],
        ["a"],
        [[]],
        {},
        {"a": 1},
    ]
    for name in sorted(openai_api.READ | set(openai_api.NEUTRAL)):
        taken = 0
        for value in values:
            try:
                read(**{"stream": True, name: value})
                taken += 1
            except (ApiError, UsageError) as error:
                if isinstance(error, ApiError):
                    assert error.status == (404 if (name, type(value)) == ("model", str) else 400), (name, value)
                    assert error.param and error.param.startswith((name.split("_")[0], name)), (
                        name,
                        value,
                        error.param,
                    )
        assert taken < len(values), name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].image_url.url",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content[0].text"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"temperature": "0"}, "temperature"),
        ({"top_k": 1.0}, "top_k"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": ["text"]}}, "response_format.type"),
        ({"grammar": "x", "response_format": {"type": "json_object"}}, "grammar"),
        ({"grammar": "x" * 100_000}, "grammar"),
    ],
)
def test_refusals(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert (error.status, error.param) == (400, param) and "\n" not in error.message
    assert error.body()["error"]["type"] == "invalid_request_error"


def test_the_conversations_order_is_checked() -> None:
    user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    for messages in ([assistant], [user, assistant], [user, user], [user, {"role": "system", "content": "z"}, user]):
        with pytest.raises(UsageError, match="messages"):
            read(messages=messages)


def test_limits() -> None:
    small = ServerOptions(max_messages=3, max_pictures=2, max_picture_mb=1)
    user = {"role": "user", "content": "x"}
    assert refused(messages=[user] * 10_000).message.startswith("10,000 messages, limit 256")
    assert refused(options=small, messages=[user] * 4).param == "messages"
    assert refused(options=small, messages=[{"role": "user", "content": shown(*[png()] * 3)}]).code == "too_many_images"
    assert refused(messages=[{"role": "user", "content": "x" * (1 << 21)}]).code == "context_length_exceeded"
    assert refused(messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}]).status == 400
    big = [{"type": "image_url", "image_url": {"url": data_url(b"\0" * (1 << 21))}}]
    error = refused(options=small, messages=[{"role": "user", "content": big}])
    assert (error.status, error.code) == (413, "image_too_large")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe{}",
        b"{}}",
        b'{"messages": NaN}',
        b'{"seed": 1e999999}x',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"[" * 70 + b"]" * 70,
        b'{"messages":' + b"[" * 70 + b"]" * 70 + b"}",
        b"[" + b"[]," * 300_000 + b"[]]",
        '{"é": "\ud800"}'.encode("utf-16-le", "surrogatepass"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_broken_json(body: bytes) -> None:
    with pytest.raises(ApiError) as found:
        read_chat(body, OPTIONS, "tiny")
    assert (found.value.status, found.value.code) == (400, "invalid_json")


def test_mutations_never_raise_anything_else() -> None:
    """Random damage to a good request: it is read, or refused by one of ours."""
    draw = random.Random(0)
    good = json.dumps(
        {
            "model": "tiny",
            "temperature": 0.5,
            "stop": ["a", "b"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_object"},
            "seed": 5,
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": shown(b"\x89PNG", text="q")}],
        }
    ).encode()
    pieces = [
        b"",
        b"\0",
        b"\xff",
        b"[",
        b"{",
        b'"',
        b",",
        b"1e99",
        b"null",
        b"true",
        b"\\ud800",
        b"-",
        b"[[]]",
        b"user",
    ]
    for _ in range(4000):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 6)] = draw.choice(pieces)
        with contextlib.suppress(ApiError, UsageError):
            read_chat(bytes(data), OPTIONS, "tiny")
