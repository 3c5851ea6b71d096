"""Failures as OpenAI's API tells them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import (
    CancelledError,
    ContextError,
    ImageError,
    QueueFullError,
    TinyLlavaEdgeError,
    UsageError,
)

RETRY_AFTER_S = 2
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# What the request itself caused; its message is fit for whoever sent it. First match counts.
_STATUS: tuple[tuple[type[TinyLlavaEdgeError], int, str], ...] = (
    (ImageError, 400, "invalid_image"),
    (ContextError, 400, "context_length_exceeded"),
    (UsageError, 400, "invalid_value"),
    (QueueFullError, 429, "queue_full"),
    (CancelledError, 503, "cancelled"),
)


class ApiError(TinyLlavaEdgeError):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        keep_open: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if not keep_open:  # the rest of the request was not read
            self.headers["connection"] = "close"
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER_S))
        elif status >= 500:
            self.headers["x-should-retry"] = "false"  # OpenAI's clients would compute the same failure three times

    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400."""
    return ApiError(400, message, code=code, param=param)


def to_api_error(error: BaseException) -> ApiError | None:
    """The reply to a failure; None for one that the request didn't cause, which is logged and answered with 500."""
    if isinstance(error, ApiError):
        return error
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            message = f"{error.message}; {error.hint}" if error.hint else error.message
            return ApiError(status, message, code=code, param="messages" if status == 400 else None)
    return None


def internal_error() -> ApiError:
    """A 500 that tells nothing of the inside: paths and versions belong into the log."""
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")
