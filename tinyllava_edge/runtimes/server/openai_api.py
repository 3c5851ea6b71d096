"""POST /v1/chat/completions: JSON → Request. Every field is checked; one that would be ignored wrongly is refused.

The fields are those of OpenAI's chat completions API, with llama-server's extras `top_k` and `grammar`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..request import Request, converse
from ..sampling import Sampling
from .body import MIB
from .errors import ApiError, bad_request
from .options import ServerOptions
from .pictures import read_data_url

# They change no answer here.
IGNORED = frozenset(
    (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "prediction",
    )
)  # fmt: skip
# They would change the answer, so only values that change nothing pass.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "audio": (),
    "web_search_options": (),
}
READ = frozenset(
    (
        "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop",
        "stream", "stream_options", "response_format", "grammar",
    )
)  # fmt: skip
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_VALUES = 200_000  # JSON values in a body: Python takes up to 60 bytes for a value of 3
MAX_DEPTH = 64
MAX_TEXT = 1 << 20  # characters of all messages; far more than any context holds
MAX_RULES = 64 << 10  # characters of a grammar or a schema
MAX_STOPS, MAX_STOP = 8, 200
MAX_SEED = 1 << 64


@dataclass(frozen=True)
class ChatRequest:
    """What a client asks for."""

    request: Request
    """for the engine"""
    stream: bool
    """answer piece by piece"""
    include_usage: bool
    """token counts in a last piece of their own"""


def read_chat(body: bytes, options: ServerOptions, model: str) -> ChatRequest:
    """Parse and check a request. Raises ApiError or UsageError that names the field."""
    data = parse(body)
    _refuse_unsupported(data)
    asked = _get(data, "model", str, "text")
    if asked not in (None, model):
        raise ApiError(
            404, f"no model {asked[:80]!r}; this server runs {model!r}", code="model_not_found", param="model"
        )
    stream = bool(_get(data, "stream", bool, "true or false"))
    include_usage = _stream_options(data, stream)
    grammar, schema = _constraint(data)
    request = converse(
        _messages(data.get("messages"), options),
        max_tokens=_max_tokens(data, options),
        stop=_stop(data.get("stop")),
        sampling=_sampling(data),
        grammar=grammar,
        json_schema=schema,
    )
    return ChatRequest(request, stream, include_usage)


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object, bounded in depth and in number of values before they cost memory. Raises ApiError."""
    values = body.count(b",") + body.count(b"[") + body.count(b"{")
    if values > MAX_VALUES:
        raise bad_request(f"the request holds more than {MAX_VALUES:,} JSON values", code="invalid_json")
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad_request("the request is not UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number out of range"
        raise bad_request(f"the request is not JSON: {reason}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise bad_request("the request is not a JSON object", code="invalid_json")
    _check_depth(data)
    return data


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        children = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [child for group in children for child in group if isinstance(child, dict | list)]


def _too_deep() -> ApiError:
    return bad_request(f"the request is nested deeper than {MAX_DEPTH} levels", code="invalid_json")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if value is None or name in READ or name in IGNORED:
            continue
        shown = name[:80]
        if name not in NEUTRAL:
            raise bad_request(f"unknown parameter {shown!r}", shown, "unknown_parameter")
        if not any(isinstance(value, bool) == isinstance(good, bool) and value == good for good in NEUTRAL[name]):
            raise bad_request(f"{name} is not supported by this server", name, "unsupported_parameter")


def _get(data: Mapping[str, Any], name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    """A field's value or None; JSON's true and false are no numbers."""
    value = data.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise bad_request(f"{name} must be {wanted}", name, "invalid_type")
    return value


def _max_tokens(data: Mapping[str, Any], options: ServerOptions) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value = _get(data, name, int, "a whole number")
        if value is not None:
            if value < 1:
                raise bad_request(f"{name} must be at least 1", name)
            return int(min(value, 1 << 20))
    return options.default_max_tokens


def _sampling(data: Mapping[str, Any]) -> Sampling:
    """Greedy unless the request says otherwise, as `run` is; OpenAI's own default is a temperature of 1."""
    temperature = _ranged(data, "temperature", (int, float), 0, 2, 0.0)
    top_p = _ranged(data, "top_p", (int, float), 0, 1, 1.0)
    top_k = _ranged(data, "top_k", int, 0, 1 << 20, 0)
    seed = _get(data, "seed", int, "a whole number")
    if seed is not None:
        seed %= MAX_SEED  # OpenAI allows negative ones
    return Sampling(float(temperature), max(float(top_p), 1e-9), int(top_k), seed)


def _ranged(
    data: Mapping[str, Any], name: str, kind: type | tuple[type, ...], low: float, high: float, default: float
) -> Any:
    value = _get(data, name, kind, "a whole number" if kind is int else "a number")
    if value is None:
        return default
    if not low <= value <= high:
        raise bad_request(f"{name} must be from {low} to {high}", name)
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad_request("stop must be text or a list of texts", "stop", "invalid_type")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP for stop in stops):
        raise bad_request(f"stop takes up to {MAX_STOPS} texts of 1 to {MAX_STOP} characters", "stop")
    for stop in stops:
        _check_text(stop, "stop")
    return tuple(stops)


def _stream_options(data: Mapping[str, Any], stream: bool) -> bool:
    given = _get(data, "stream_options", dict, "an object")
    if given is None:
        return False
    if not stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    unknown = set(given) - {"include_usage", "include_obfuscation"}
    if unknown:
        raise bad_request(f"unknown parameter {min(unknown)[:80]!r}", "stream_options", "unknown_parameter")
    return bool(_get(given, "include_usage", bool, "true or false"))


def _constraint(data: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any] | None]:
    """GBNF and JSON schema that the answer must follow; at most one of them."""
    grammar = _get(data, "grammar", str, "text in GBNF")
    if grammar is not None:
        _check_text(grammar, "grammar")
        if not 0 < len(grammar) <= MAX_RULES:
            raise bad_request(f"grammar must have 1 to {MAX_RULES:,} characters", "grammar")
    form = _get(data, "response_format", dict, "an object")
    schema = None if form is None else _FORMATS.get(str(form.get("type")), _unknown_format)(form)
    if grammar is not None and schema is not None:
        raise bad_request("grammar and response_format exclude each other", "grammar")
    return grammar, schema


def _json_schema(form: Mapping[str, Any]) -> Mapping[str, Any]:
    param = "response_format.json_schema"
    inner = form.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise bad_request(f"{param} must be an object with an object `schema`", param, "invalid_type")
    if len(json.dumps(schema)) > MAX_RULES:
        raise bad_request(f"{param} is longer than {MAX_RULES:,} characters", param)
    return schema


def _unknown_format(form: Mapping[str, Any]) -> Mapping[str, Any] | None:
    message = f"response_format.type must be one of {', '.join(_FORMATS)}"
    raise bad_request(message, "response_format.type")


_FORMATS: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any] | None]] = {
    "text": lambda form: None,
    "json_object": lambda form: {"type": "object"},
    "json_schema": _json_schema,
}


def _messages(value: Any, options: ServerOptions) -> list[dict[str, Any]]:
    """OpenAI's messages → `converse`'s, with every picture as bytes."""
    if not isinstance(value, list) or not value:
        raise bad_request("messages must be a non-empty list", "messages", "invalid_type")
    if len(value) > options.max_messages:
        raise bad_request(f"{len(value):,} messages, limit {options.max_messages:,}", "messages")
    read = [_message(message, f"messages[{number}]", options) for number, message in enumerate(value)]
    parts = [part for message in read for part in message["content"]]
    pictures = sum(part["type"] == "image" for part in parts)
    if pictures > options.max_pictures:
        raise bad_request(f"{pictures} pictures, limit {options.max_pictures}", "messages", "too_many_images")
    if sum(len(part.get("text", "")) for part in parts) > MAX_TEXT:
        message = f"the messages hold more than {MAX_TEXT:,} characters"
        raise bad_request(message, "messages", "context_length_exceeded")
    return read


def _message(message: Any, param: str, options: ServerOptions) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad_request(f"{param} must be an object", param, "invalid_type")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_request(f"{param}.role must be one of {', '.join(ROLES)}", f"{param}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise bad_request(f"{param}.{name} is not supported by this server", f"{param}.{name}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise bad_request(f"{param}.content must be text or a list of parts", f"{param}.content", "invalid_type")
    if len(parts) > options.max_messages + options.max_pictures:
        raise bad_request(f"{param}.content has too many parts", f"{param}.content")
    return {"role": ROLES[role], "content": [_part(p, f"{param}.content[{i}]", options) for i, p in enumerate(parts)]}


def _part(part: Any, param: str, options: ServerOptions) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{param}.text must be text", f"{param}.text", "invalid_type")
        return {"type": "text", "text": _check_text(part["text"], f"{param}.text")}
    if kind == "image_url":
        place = f"{param}.image_url.url"
        inner = part.get("image_url")
        url = inner.get("url") if isinstance(inner, dict) else None
        if not isinstance(url, str):
            raise bad_request(f"{place} must be text", place, "invalid_type")
        return {"type": "image", "image": read_data_url(url, place, options.max_picture_mb * MIB)}
    raise bad_request(f"{param}.type must be text or image_url", f"{param}.type")


def _check_text(text: str, param: str) -> str:
    """JSON can spell halves of surrogate pairs, which are no text; llama.cpp's strings end at NUL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad_request(f"{param} is not valid Unicode", param) from error
    if "\0" in text:
        raise bad_request(f"{param} holds a NUL character", param)
    return text
