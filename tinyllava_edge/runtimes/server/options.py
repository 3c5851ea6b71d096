"""What a server can be told: the flags of `tinyllava-edge serve`. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UsageError

KEY_VARIABLE = "TINYLLAVA_EDGE_API_KEY"
_MIN_KEY = 16  # characters
_MAX_KEY = 512


def _option(default: Any, metavar: str, text: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": text})


@dataclass(frozen=True)
class ServerOptions:
    """Everything about a server but its bundle. A field `a_b` is the flag `--a-b`."""

    host: str = _option("127.0.0.1", "HOST", "Address to listen on. Other than loopback needs an API key.")
    """an IP address, or a name that resolves to one"""
    port: int = _option(8080, "PORT", "Port to listen on; 0 takes a free one.")
    """0..65535"""
    api_key_file: Path | None = _option(
        None, "FILE", f"File holding the API key that clients must send; else the variable {KEY_VARIABLE}."
    )
    """read once, at the start; a key on the command line would stand in the list of processes"""
    insecure_no_key: bool = _option(False, "", "Listen on other addresses than loopback without an API key.")
    """whoever reaches the port may then use the model"""
    allowed_hosts: tuple[str, ...] = _option(
        (), "NAMES", "More names that a request's Host header may carry, comma list."
    )
    """IP addresses, localhost and this machine's own name are always allowed"""
    allowed_origins: tuple[str, ...] = _option(
        (), "ORIGINS", "Web pages from elsewhere that may call the API (CORS), comma list, e.g. https://app.example."
    )
    """`*` allows every page; none by default"""
    page: bool = _option(True, "", "Serve the chat page at /.")
    """the API alone where this is off"""
    web: bool = _option(False, "", "Serve the page that runs the bundle in the browser; no model runs here.")
    """files only: the page of `make web` and what the bundle's manifest names"""
    web_dist: Path | None = _option(None, "DIR", "Directory of that page; runtimes/web/dist of the source by default.")
    """made by `make web`"""
    default_max_tokens: int = _option(512, "N", "Most tokens of an answer where the request doesn't say.")
    """a request's own max_tokens may be larger; the context's end bounds both"""
    max_body_mb: int = _option(64, "MIB", "Largest request body.")
    """MiB; a conversation carries all its pictures in every request, as base64"""
    max_memory_mb: int = _option(256, "MIB", "Most memory for the bodies of all requests together.")
    """MiB; a request that would pass it is told to come back later"""
    max_picture_mb: int = _option(20, "MIB", "Largest picture file.")
    """MiB, after base64 is undone; its pixels have their own limit"""
    max_pictures: int = _option(16, "N", "Most pictures in one request.")
    """over all messages"""
    max_messages: int = _option(256, "N", "Most messages in one request.")
    """the system message included"""
    max_connections: int = _option(128, "N", "Most open connections.")
    """further ones get 503"""
    request_timeout_s: float = _option(600.0, "SECONDS", "Longest time for one answer, waiting included.")
    """seconds from the whole request to the whole answer"""
    read_timeout_s: float = _option(20.0, "SECONDS", "Longest time for a request's head, and for a client that stalls.")
    """seconds; a body gets one second more for each 16 KiB that has arrived"""
    keep_alive_s: float = _option(30.0, "SECONDS", "How long an idle connection stays open.")
    """seconds"""
    grace_s: float = _option(20.0, "SECONDS", "After SIGTERM or Ctrl-C: time for running answers to end.")
    """seconds; then they are cancelled"""
    warm_up: bool = _option(True, "", "Run every part once before the first request.")
    """else the first answer waits for what is loaded lazily"""
    log_requests: bool = _option(False, "", "One line per request on stderr: time, path, status; never what was said.")
    """no prompt, picture or answer is ever logged"""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        if not 0 <= self.port <= 65_535:
            raise UsageError(f"port={self.port} is outside 0..65535")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if type(value) in (int, float) and item.name != "port" and not 0 < value <= 1_000_000:
                raise UsageError(f"{item.name}={value} is outside 1..1,000,000")


FIELDS = {item.name: item for item in dataclasses.fields(ServerOptions)}


def flag(name: str) -> str:
    """Flag of a field."""
    return f"--{name.replace('_', '-')}"


def help_text(name: str) -> str:
    """Help of a field's flag."""
    return str(FIELDS[name].metadata["help"])


def read_key(options: ServerOptions, environ: Mapping[str, str]) -> str | None:
    """The API key from the file or the environment; None where there is neither.

    Raises:
        UsageError: the file can't be read, or the key is short, long or holds white space or control characters.
    """
    if options.api_key_file is not None:
        name = str(options.api_key_file)
        try:
            with options.api_key_file.open(encoding="utf-8") as handle:
                key = handle.read(2 * _MAX_KEY).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{name}: the API key can't be read ({error})", "check --api-key-file") from error
    elif KEY_VARIABLE in environ:
        name, key = KEY_VARIABLE, environ[KEY_VARIABLE].strip()
    else:
        return None
    if not _MIN_KEY <= len(key) <= _MAX_KEY or not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            f"{name}: an API key is {_MIN_KEY} to {_MAX_KEY} printable ASCII characters without spaces",
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    return key
