"""`ssh://user@host[:port]/dir`, read strictly: nothing in it may reach ssh as an option or a shell as a word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from tinyllava_edge.errors import UsageError

_HINT = "write ssh://user@host[:port]/dir; /~/dir lies below the user's home"
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,32})?\]")
_PORT = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True)
class Address:
    """One directory on one machine."""

    host: str
    """name or address, IPv6 without brackets; an alias of ssh_config is fine"""
    directory: str
    """absolute, or below the home when it begins with `~/`"""
    user: str = ""
    """empty: ssh_config decides"""
    port: int | None = None
    """None: ssh_config decides"""

    @property
    def place(self) -> str:
        """user@host[:port], for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}"[not self.user :] + (f":{self.port}" if self.port else "")

    @property
    def url(self) -> str:
        """The address again, in one spelling."""
        path = quote(self.directory, safe="/~")
        return f"ssh://{self.place}{path if path.startswith('/') else f'/{path}'}"

    def arguments(self) -> list[str]:
        """What `ssh` is given; the host stands behind `--`."""
        user = ["-l", self.user] if self.user else []
        port = ["-p", str(self.port)] if self.port else []
        return [*user, *port, "--", self.host]


def parse_address(url: str) -> Address:
    """Read an address.

    Raises:
        UsageError: another scheme, a password, a part with characters that no host, user or path needs, or no
            directory of its own. A password is not repeated in the message.
    """
    if not url.isprintable() or len(url) > 4096:
        raise UsageError(f"target {ascii(url[:80])}: unprintable or too long", _HINT)
    scheme, mark, rest = url.partition("://")
    if scheme != "ssh" or not mark:
        raise UsageError(f"target {url[:80]!r} is not an ssh address", _HINT)
    authority, _, path = rest.partition("/")
    login, at, place = authority.rpartition("@")
    user, colon, _ = login.partition(":")
    if colon:
        raise UsageError("the address holds a password", "leave it out and log in with a key: ssh-copy-id user@host")
    if at and not _USER.fullmatch(user):
        raise UsageError(f"target {url[:80]!r}: user {user[:40]!r} has odd characters", _HINT)
    host, port = _split_port(place)
    if not _HOST.fullmatch(host):
        raise UsageError(f"target {url[:80]!r}: host {host[:40]!r} has odd characters", _HINT)
    if port is not None and not (_PORT.fullmatch(port) and 0 < int(port) < 65536):
        raise UsageError(f"target {url[:80]!r}: port {port[:40]!r}", "a port is a number from 1 to 65535")
    return Address(host.strip("[]"), _directory(path), user, int(port) if port else None)


def _split_port(place: str) -> tuple[str, str | None]:
    if place.startswith("["):
        host, bracket, after = place.partition("]")
        return host + bracket, after[1:] if after.startswith(":") else (after or None)
    host, colon, port = place.partition(":")
    return host, port if colon else None


def _directory(path: str) -> str:
    try:
        text = unquote(path, errors="strict")
    except UnicodeDecodeError as error:
        raise UsageError("the target directory is not UTF-8", _HINT) from error
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not parts or parts == ["~"]:
        raise UsageError("the target names no directory", _HINT)
    if ".." in parts or not text.isprintable() or any(len(part.encode()) > 255 for part in parts):
        raise UsageError(f"target directory {ascii(text[:80])}: `..`, control characters or too long", _HINT)
    if parts[0] == "~":
        return "/".join(parts)
    if parts[0].startswith("~"):
        raise UsageError(f"target directory {text[:80]!r}: another user's home", _HINT)
    return "/" + "/".join(parts)
