"""Who may ask: checks of a request's Host, Origin and key, before anything else is read."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket

from .errors import ApiError
from .exchange import Exchange
from .options import ServerOptions

_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253})(:\d{1,5})?$")
_REQUESTED = re.compile(r"[A-Za-z0-9, _-]{1,1000}$")


class Guard:
    """The checks of one server."""

    def __init__(self, options: ServerOptions, key: str | None) -> None:
        self._key = None if key is None else key.encode()
        self._origins = frozenset(origin.rstrip("/").lower() for origin in options.allowed_origins)
        # Behind a key and beyond loopback any name will do: a page that rebinds a name has no key.
        self._any_host = key is not None and not is_loopback(options.host)
        own = socket.gethostname().lower()
        names = ("localhost", own, f"{own}.local", options.host, *options.allowed_hosts)
        self._hosts = frozenset(name.lower().rstrip(".") for name in names)

    def check_host(self, exchange: Exchange) -> None:
        """Refuse foreign names: a web page may let its own name point here and so pass for this server's page.

        Raises:
            ApiError: 403. An IP address always passes, since no name stands behind it.
        """
        host = exchange.header("host") or ""
        match = _HOST.match(host)
        name = match["name"].lower().rstrip(".") if match else ""
        if not name or not (self._any_host or name in self._hosts or _address(name)):
            raise ApiError(
                403,
                f"Host {host[:80]!r} is not this server's name; --allowed-hosts adds names",
                code="host_not_allowed",
                keep_open=False,
            )

    def check_origin(self, exchange: Exchange) -> None:
        """Refuse other sites' pages, unless they are listed; a listed one gets CORS headers. Raises ApiError 403."""
        origin = exchange.header("origin")
        if origin is None:
            return
        if origin.lower() in self._origins or "*" in self._origins:
            exchange.reply_headers.update(
                {
                    "access-control-allow-origin": origin,
                    "vary": "Origin",
                    "access-control-expose-headers": "retry-after",
                }
            )
        elif origin.lower().partition("://")[2] != (exchange.header("host") or "").lower():
            raise ApiError(
                403,
                f"pages of {origin[:80]!r} may not use this server; --allowed-origins adds some",
                code="origin_not_allowed",
                keep_open=False,
            )

    def preflight(self, exchange: Exchange) -> dict[str, str]:
        """Headers of the reply to a browser's question whether it may send a request."""
        if "access-control-allow-origin" not in exchange.reply_headers:
            return {}
        asked = exchange.header("access-control-request-headers") or ""
        return {
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": asked if _REQUESTED.match(asked) else "authorization, content-type",
            "access-control-max-age": "600",
        }

    def check_key(self, exchange: Exchange) -> None:
        """Compare the key in constant time. Raises ApiError 401."""
        if self._key is None:
            return
        scheme, _, given = (exchange.header("authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            return
        message = "wrong API key" if given else "this server needs an API key: Authorization: Bearer KEY"
        headers = {"www-authenticate": "Bearer"}
        raise ApiError(401, message, code="invalid_api_key", headers=headers, keep_open=False)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
