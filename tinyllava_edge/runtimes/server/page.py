"""The chat page's files, read once: what isn't in this table can't be asked for, so no path leads out of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/pictures.js": ("pictures.js", "text/javascript; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@dataclass(frozen=True)
class StaticFile:
    """One file of the page."""

    body: bytes
    """what is sent"""
    content_type: str
    """its media type"""
    etag: str
    """changes with the bytes, so that a browser asks again after an update and loads nothing otherwise"""


def load_page() -> dict[str, StaticFile]:
    """Path → file."""
    root = resources.files(__package__) / "page"
    found = {path: ((root / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
    return {
        path: StaticFile(body, kind, f'"{hashlib.sha256(body).hexdigest()[:16]}"')
        for path, (body, kind) in found.items()
    }
