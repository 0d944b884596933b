"""Reads the pictures that a request refers to, in data URLs or at hosts that are allowed. No file is opened."""

import base64
import binascii
import re

from llava.serve.errors import ApiError
from llava.serve.fetch import MediaFetcher
from llava.serve.limits import Limits

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*(?P<base64>;base64)?,", re.ASCII)


def read_picture(url: str, limits: Limits, fetcher: MediaFetcher | None) -> bytes:
    """Returns the contents of a picture. Raises ApiError. fetcher: None fetches nothing."""
    if fetcher and not url.startswith("data:"):
        return fetcher.fetch(url)
    return read_data_url(url, limits)


def read_data_url(url: str, limits: Limits) -> bytes:
    """Returns the contents of a data URL. Raises ApiError, whose text does not repeat what the client sent."""
    start = _DATA_URL.match(url)
    if start is None:
        message = "image_url: expected a data URL, such as data:image/png;base64,…; this server fetches no addresses"
        raise ApiError(400, message, param="messages", code="invalid_image_url")
    kind = start["type"] or "text/plain"
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise ApiError(415, "image_url: the data URL is not of an image type, such as image/png", param="messages")
    if not start["base64"]:
        raise ApiError(400, "image_url: the data URL is not base64; write ;base64 before the comma", param="messages")
    encoded = url[start.end() :]
    if len(encoded) * 3 // 4 > limits.picture_bytes + 3:
        message = f"a picture has more than {limits.picture_bytes} bytes; send a smaller one"
        raise ApiError(413, message, param="messages")
    try:
        contents = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "image_url: the data URL is not valid base64", param="messages") from None
    if not contents:
        raise ApiError(400, "image_url: the data URL is empty", param="messages")
    return contents
