"""Answers as OpenAI's API gives them: whole, or as chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from ..base import Answer

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"  # a comment: clients pass over it, and a dead connection shows


class Reply:
    """One answer's identity, and its JSON."""

    def __init__(self, model: str, fingerprint: str) -> None:
        self._common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        before, content, self._after = self._chunk({"content": ""}, None).rpartition(b'"content":""')
        self._before = before + content[:-2]

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The reply to a request without `stream`."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        return {**self._common, "choices": [choice], "usage": usage(answer), "timings": timings(answer)}

    def first(self) -> bytes:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, text: str) -> bytes:
        """A chunk with more text."""
        return self._before + json.dumps(text, ensure_ascii=False).encode() + self._after  # the rest never changes

    def last(self, answer: Answer, include_usage: bool) -> bytes:
        """What ends a stream: the finish reason with the timings, the counts if wanted, and `[DONE]`."""
        end = self._chunk({}, answer.finish_reason, timings=timings(answer))
        if include_usage:
            chunk = {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)}
            end += event(chunk)
        return end + DONE

    def _chunk(self, delta: dict[str, Any], finish: str | None, **extra: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**self._common, "object": "chat.completion.chunk", "choices": [choice], **extra})


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(answer: Answer) -> dict[str, Any]:
    """Token counts; a picture counts with all its embeddings."""
    return {
        "prompt_tokens": answer.n_prompt_tokens,
        "completion_tokens": len(answer.token_ids),
        "total_tokens": answer.n_prompt_tokens + len(answer.token_ids),
        "prompt_tokens_details": {"cached_tokens": answer.n_cached_tokens},
    }


def timings(answer: Answer) -> dict[str, float | None]:
    """Stage timings in milliseconds, and the rate of decoding in tokens per second."""
    stages = {name: round(ms, 3) for name, ms in answer.timings.to_dict().items()}
    rate = answer.decode_tokens_per_s
    return {**stages, "decode_tokens_per_s": None if rate is None else round(rate, 2)}


def model_object(name: str, created: int, meta: dict[str, Any]) -> dict[str, Any]:
    """An entry of /v1/models; `meta` is an extra, as in llama-server."""
    return {"id": name, "object": "model", "created": created, "owned_by": "tinyllava-edge", "meta": meta}
