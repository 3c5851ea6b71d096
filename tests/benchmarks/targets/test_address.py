"""Addresses: what is read, and that nothing else gets through to ssh."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllava_edge.benchmarks.targets import is_remote, run
from tinyllava_edge.benchmarks.targets.address import Address, parse_address
from tinyllava_edge.errors import UsageError


@pytest.mark.parametrize(
    "url,expected",
    [
        ("ssh://pi@raspberry.local/home/pi/bench", Address("raspberry.local", "/home/pi/bench", "pi")),
        ("ssh://u0_a12@10.0.0.7:8022/~/bench", Address("10.0.0.7", "~/bench", "u0_a12", 8022)),
        ("ssh://board/~/a/./b//c", Address("board", "~/a/b/c")),
        ("ssh://[fe80::1%eth0]:22/x", Address("fe80::1%eth0", "/x", "", 22)),
        ("ssh://me@h/with%20space/it's;$x", Address("h", "/with space/it's;$x", "me")),
    ],
)
def test_reads(url: str, expected: Address) -> None:
    assert parse_address(url) == expected
    assert parse_address(expected.url) == expected


def test_what_ssh_is_given() -> None:
    assert parse_address("ssh://a@h:7/d").arguments() == ["-l", "a", "-p", "7", "--", "h"]
    assert parse_address("ssh://[::1]/d").arguments() == ["--", "::1"]


@pytest.mark.parametrize(
    "url,says",
    [
        ("ssh://-oProxyCommand=touch%20x/d", "host"),
        ("ssh://-l@host/d", "user"),
        ("ssh://a b@host/d", "user"),
        ("ssh://$(id)/d", "host"),
        ("ssh://host;id/d", "host"),
        ("ssh:///d", "host"),
        ("ssh://host:0/d", "port"),
        ("ssh://host:65536/d", "port"),
        ("ssh://host:22x/d", "port"),
        ("ssh://[::1]x/d", "port"),
        ("ssh://host:/d", "port"),
        ("ssh://host", "no directory"),
        ("ssh://host/", "no directory"),
        ("ssh://host/~", "no directory"),
        ("ssh://host/~root/x", "another user"),
        ("ssh://host/a/../../etc", r"\.\."),
        ("ssh://host/a%2f..%2fb", r"\.\."),
        ("ssh://host/a%0ab", "control"),
        ("ssh://host/a\nb", "unprintable"),
        ("ssh://host/%ff", "UTF-8"),
        ("sftp://host/d", "not an ssh address"),
        ("host:/d", "not an ssh address"),
    ],
)
def test_refuses(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_address(url)
    assert caught.value.message.isprintable() and caught.value.hint


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(UsageError, match="password") as caught:
        parse_address("ssh://me:hunter2@host/d")
    assert "hunter2" not in caught.value.message + caught.value.hint


@given(st.text(max_size=60).map("ssh://{}".format) | st.text(max_size=40))
@example("ssh://a@b@-c/d")
@example("ssh://a/%00")
def test_nothing_but_an_address_or_an_error(url: str) -> None:
    try:
        address = parse_address(url)
    except UsageError:
        return
    assert not address.host.startswith("-") and not address.user.startswith("-")
    assert "\0" not in address.directory and ".." not in address.directory.split("/")
    assert parse_address(address.url) == address


def test_only_known_schemes(tmp_path: object) -> None:
    assert is_remote("ssh://h/d") and not is_remote("cpu") and not is_remote("ssh") and not is_remote("ftp://h/d")
    with pytest.raises(UsageError, match="ftp"):
        run("ftp://h/d", tmp_path, {})  # type: ignore[arg-type]
