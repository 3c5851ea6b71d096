"""Answers of a random model held to grammars and schemas; hostile ones are refused, and quickly."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.runtimes.constrain import from_gbnf, from_json_schema
from tinyllava_edge.runtimes.engine import Engine, open_bundle

from .conftest import Pair, picture

PERSON = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(siglip: Pair) -> Iterator[Engine]:
    with open_bundle(siglip.bundle, "fp32+f32", allow_unverified=True, n_threads=1) as opened:
        yield opened


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_follow_their_schema(engine: Engine, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "seed": 1, "max_tokens": 60}
    found = engine.generate("what?", image=picture(1), json_schema=PERSON, **options)
    value = json.loads(found.text)
    assert value["colour"] in ("red", "blue") and 0 <= value["n"] <= 99 and len(value) == 2
    assert found.finish_reason == "stop" and found.text == json.dumps(value)
    choice = engine.generate("what?", image=picture(1), json_schema={"enum": ["yes", "no"]}, **options)
    assert json.loads(choice.text) in ("yes", "no")
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
    flags = json.loads(engine.generate("what?", json_schema=schema, **options).text)
    assert 2 <= len(flags) <= 3 and all(isinstance(flag, bool) for flag in flags)


def test_grammars(engine: Engine) -> None:
    plain = engine.generate("what?", image=picture(2), max_tokens=12)
    words = engine.generate("what?", image=picture(2), grammar='root ::= "red" | "dark " ("green" | "blue")')
    assert words.text in ("red", "dark green", "dark blue") and words.finish_reason == "stop"
    number = engine.generate("what?", grammar="root ::= [0-9]{2,4}", temperature=1.0, seed=3).text
    assert re.fullmatch("[0-9]{2,4}", number)
    umlaut = engine.generate("what?", grammar='root ::= "größer 😀"').text
    assert umlaut == "größer 😀"  # characters that no token holds whole
    free = engine.generate("what?", image=picture(2), grammar="root ::= [^\\x00]*", max_tokens=12)
    assert free.token_ids[:5] == plain.token_ids[:5]  # nothing is forbidden but bytes that are no text
    cut = engine.generate("what?", grammar='root ::= "a"*', max_tokens=5)
    assert set(cut.text) <= {"a"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "root ::= x",
        "x ::= y",
        "root ::= root",
        'root ::= "unclosed',
        "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
        'root ::= "a"{1,100000000}' * 3,
        "root ::= " + " | ".join(f'"{n}"' for n in range(20_000)),
        "x" * (65 << 10),
    ],
)
def test_grammars_that_are_refused(engine: Engine, text: str) -> None:
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        engine.generate("what?", grammar=text, max_tokens=4)
    assert caught.value.hint and len(caught.value.message) < 400 and time.monotonic() - start < 30


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"type": "nonsense"},
        {"type": "string", "pattern": "("},
        {"enum": []},
        {"enum": ["x" * 70_000]},
        {"type": 3},
        nested(400),
        nested(5000),
        {"x": {1, 2}},
    ],
    ids=["url", "file", "nowhere", "itself", "type", "pattern", "none", "long", "number", "deep", "deeper", "set"],
)
def test_schemas_that_are_refused(engine: Engine, schema: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        engine.generate("what?", json_schema=schema, max_tokens=4)
    assert len(caught.value.message) < 400


def test_the_engine_goes_on(engine: Engine) -> None:
    """A schema with cycles is fine, and after all of the above plain answers still come."""
    cycle = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 1}}}
    found = engine.generate("what?", json_schema=cycle, max_tokens=80).text
    assert found.startswith("[")
    assert engine.generate("what?", max_tokens=4).token_ids
    assert json.loads(from_json_schema({}))["grammars"][1]["json_schema"] and "lark" in from_gbnf('root ::= "a"')
