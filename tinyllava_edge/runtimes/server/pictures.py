"""A picture in a request: a data: URL with base64, and nothing else. No address is fetched, no file is read."""

from __future__ import annotations

import base64
import binascii
import re

from .errors import ApiError, bad_request

_HEAD = re.compile(r"data:image/[a-z0-9.+-]{1,40}(;[a-z0-9-]{1,40}=[a-z0-9.-]{1,40}){0,4};base64$", re.IGNORECASE)
_HEAD_LENGTH = 400


def read_data_url(url: str, param: str, max_bytes: int) -> bytes:
    """The picture file inside a data: URL. What the bytes are shows when they are decoded, whatever the URL says.

    Raises:
        ApiError: 400 another kind of URL or bad base64; 413 a larger file than `max_bytes`.
    """
    place = url.find(",", 0, _HEAD_LENGTH)
    if place < 0 or not _HEAD.match(url[:place]):
        shown = url[:40].encode("ascii", "replace").decode()
        raise bad_request(
            f"{param} begins with {shown!r}; only data:image/...;base64, URLs are read: this server fetches no "
            "address and opens no file",
            param,
            "unsupported_image_url",
        )
    if (len(url) - place - 1) * 3 // 4 > max_bytes + 2:
        raise picture_too_large(param, max_bytes)
    try:
        data = base64.b64decode(url[place + 1 :].encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{param} is not valid base64", param, "invalid_base64") from error
    if len(data) > max_bytes:
        raise picture_too_large(param, max_bytes)
    if not data:
        raise bad_request(f"{param} is an empty picture", param, "invalid_image")
    return data


def picture_too_large(param: str, max_bytes: int) -> ApiError:
    """The error of a picture file over the limit."""
    return ApiError(
        413, f"{param} is larger than {max_bytes:,} bytes; scale it down first", code="image_too_large", param=param
    )
