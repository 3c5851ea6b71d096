"""data: URLs, and everything that is none."""

from __future__ import annotations

import base64

import pytest

from tinyllava_edge.runtimes.server.errors import ApiError
from tinyllava_edge.runtimes.server.pictures import read_data_url

from .conftest import data_url


@pytest.mark.parametrize(
    "head", ["data:image/png;base64", "DATA:IMAGE/SVG+XML;BASE64", "data:image/jpeg;name=a.jpg;base64"]
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_bytes_come_back(head: str, size: int) -> None:
    data = bytes(i % 256 for i in range(size))
    assert read_data_url(f"{head},{base64.b64encode(data).decode()}", "url", size) == data


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/cat.png",
        "https://example.com/cat.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        "data:",
        "ftp://x/y",
        "data:text/plain;base64,aGk=",
        "data:image/png,rawbytes",
        "data:;base64,aGk=",
        "blob:http://x/1",
        " data:image/png;base64,aGk=",
        "data:image/png;base64",
        "data:image/png\n;base64,aGk=",
        "\\\\host\\share",
        "data:image/png;charset=x;base64x,aGk=",
        "data:image/" + "a" * 1000 + ";base64,aGk=",
        "\ud800",
    ],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ApiError, match="fetches no address and opens no file") as found:
        read_data_url(url, "url", 1000)
    assert found.value.status == 400 and found.value.code == "unsupported_image_url"
    found.value.message.encode()


@pytest.mark.parametrize(
    "data", ["a", "aGk", "aGk=x", "a Gk=", "aGk=\n", "aG-_", "é", "aGk===", "=", "a=Gk", "\ud800", "%41"]
)
def test_bad_base64(data: str) -> None:
    with pytest.raises(ApiError) as found:
        read_data_url(f"data:image/png;base64,{data}", "url", 1000)
    assert found.value.status == 400 and found.value.code == "invalid_base64"


def test_size() -> None:
    with pytest.raises(ApiError, match="scale it down") as found:
        read_data_url(data_url(b"\0" * 1001), "url", 1000)
    assert found.value.status == 413
    with pytest.raises(ApiError, match="empty picture"):
        read_data_url("data:image/png;base64,", "url", 1000)
