"""`profile.json` in a bundle: the device it was made for, what its builds need there, and what to type on it.

Read on the device by `info`, so nothing heavy is imported. The line to type isn't in the file: it is put together from
checked values when the file is read, for people will paste it into a shell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle import WEB, Bundle, BundleFile, describe_file
from ..errors import BundleError
from ..files import write_json
from .profiles import DEVICES, PROFILE_NAME, DeviceProfile, is_description

RECORD = "profile.json"
MAX_BYTES = 1 << 16
WEB_NAME = re.compile(r"[a-z0-9]{1,16}")
_KEYS: dict[str, type] = {
    "name": str,
    "description": str,
    "device": str,
    "memory_bytes": int,
    "budget_bytes": int,
    "n_ctx": int,
    "n_threads": int,
    "max_visual_tokens": int,
    "builds": dict,
    "web": dict,
    "preferred": str,
}


def write_record(
    root: Path,
    profile: DeviceProfile,
    n_ctx: int,
    preferred: str,
    builds: Mapping[str, int],
    web: Mapping[str, int],
) -> BundleFile:
    """Write the record into a bundle under construction.

    Args:
        root: the bundle.
        profile: the device.
        n_ctx: positions to run with.
        preferred: build to run.
        builds: build → bytes that it needs resident.
        web: precision → bytes that the page's graphs need.
    """
    values = {key: getattr(profile, key) for key in _KEYS if hasattr(profile, key) and key != "web"}
    values |= {"n_ctx": n_ctx, "builds": dict(builds), "web": dict(web), "preferred": preferred}
    write_json(root / RECORD, values)
    return describe_file(root, RECORD, "text", "text", {})


def run_command(device: str, n_threads: int, n_ctx: int, build: str) -> str:
    """What to type on the device; the words in capitals are the user's to fill."""
    if device == "web":
        return "tinyllava-edge serve --web BUNDLE"
    flag = f" --device {device}" if device != "cpu" else ""
    numbers = f"-t {n_threads} -c {n_ctx}"
    return f'tinyllava-edge run BUNDLE --build {build} {numbers}{flag} --image PICTURE "QUESTION"'


def read_record(bundle: Bundle) -> dict[str, Any] | None:
    """A bundle's record, and under `run` what to type; None where it was exported without a profile.

    Raises:
        BundleError: a record that isn't ours or was changed, or that names a build which the bundle doesn't have.
    """
    file = next((file for file in bundle.files if (file.path, file.role) == (RECORD, "text")), None)
    if file is None:
        return None
    path, hint = bundle.path(file), "copy the file again, or export the bundle again"
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise BundleError(f"{path}: missing, or too large for a profile's record", hint)
    bundle.check_files((file,))
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON ({error})", hint) from error
    if not isinstance(value, dict) or {key: type(item) for key, item in value.items()} != _KEYS:
        raise BundleError(f"{path}: not a profile's record", hint)
    numbers = [*value["builds"].values(), *value["web"].values(), *(n for n in value.values() if isinstance(n, int))]
    plain = PROFILE_NAME.fullmatch(value["name"]) and is_description(value["description"])
    plain = plain and value["device"] in DEVICES and all(WEB_NAME.fullmatch(name) for name in value["web"])
    if not plain or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise BundleError(f"{path}: holds a value that no profile gives", hint)
    builds, pages = bundle.builds(), bundle.web_builds()
    unknown = not set(value["builds"]) <= set(builds) or not {WEB + name for name in value["web"]} <= set(pages)
    if unknown or value["preferred"] not in value["builds"] or (value["device"] == "web" and not value["web"]):
        raise BundleError(f"{path}: names a build that the bundle doesn't have", hint)
    command = run_command(value["device"], value["n_threads"], value["n_ctx"], value["preferred"])
    return {**value, "run": command}


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that stands twice, of which other readers may take the other one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
