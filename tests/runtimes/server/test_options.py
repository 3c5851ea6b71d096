"""Options and the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.runtimes.server.options import FIELDS, ServerOptions, flag, help_text, read_key

KEY = "0123456789abcdef"


def test_every_field_has_a_flag_and_help() -> None:
    for name in FIELDS:
        assert flag(name).startswith("--") and help_text(name).endswith(".") and len(help_text(name)) < 110
    assert flag("api_key_file") == "--api-key-file" and ServerOptions().host == "127.0.0.1"
    assert not any(isinstance(getattr(ServerOptions(), name), str) and "key" in name for name in FIELDS)


@pytest.mark.parametrize(
    "values", [{"port": -1}, {"port": 70_000}, {"max_body_mb": 0}, {"grace_s": -1.0}, {"max_pictures": 10**9}]
)
def test_out_of_range(values: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="outside"):
        ServerOptions(**values)  # type: ignore[arg-type]


def test_key_from_file_or_environment(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"  {KEY}\n")
    assert read_key(ServerOptions(), {}) is None
    assert read_key(ServerOptions(), {"TINYLLAVA_EDGE_API_KEY": KEY}) == KEY
    assert read_key(ServerOptions(api_key_file=path), {"TINYLLAVA_EDGE_API_KEY": "x" * 20}) == KEY


@pytest.mark.parametrize(
    "key", ["", "short-key", "x" * 600, "with space in the mid", "tabs\tin\tthe\tmiddle", "é" * 20]
)
def test_unfit_keys(key: str, tmp_path: Path) -> None:
    (tmp_path / "k").write_text(key)
    for options, environ in (
        (ServerOptions(api_key_file=tmp_path / "k"), {}),
        (ServerOptions(), {"TINYLLAVA_EDGE_API_KEY": key}),
    ):
        with pytest.raises(UsageError, match="16 to 512") as found:
            read_key(options, environ)
        assert not key or key not in found.value.message.rpartition(":")[2]


def test_a_key_file_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="can't be read"):
            read_key(ServerOptions(api_key_file=path), {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 20)
    with pytest.raises(UsageError, match="can't be read"):
        read_key(ServerOptions(api_key_file=tmp_path / "binary"), {})
