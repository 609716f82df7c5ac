# SPDX-License-Identifier: Apache-2.0
"""What the head of an HTTP response says (RFC 9110); whatever is not written as it has to be counts as not said."""

from __future__ import annotations

import datetime
import http
import re
from email.utils import parsedate_to_datetime

import urllib3.util
from urllib3.exceptions import InvalidHeader
from urllib3.response import HTTPResponse

__all__ = [
    "content_range",
    "etag",
    "is_date",
    "is_etag",
    "last_modified",
    "length",
    "retry_after",
    "status_text",
    "validator",
]

_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.ASCII | re.IGNORECASE)
# RFC 9110, section 8.8.3, in ASCII and with a limit, as it is recorded and sent back; and the one form of dates that
# servers may generate (section 5.6.7).
_ETAG = re.compile(r'(W/)?"[\x21\x23-\x7e]{0,256}"')
_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT", re.ASCII)
# By how many seconds the server's clock must be ahead of Last-Modified before the date identifies the content, even
# if two clocks were at work (RFC 9110, section 8.8.2.2).
_DATE_MARGIN = 60.0


def status_text(status: int) -> str:
    """Return a status with its standard phrase, and not the server's own, which may be anything."""
    try:
        return f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return f"{status}"


def length(response: HTTPResponse) -> int | None:
    """Return how many bytes the body is announced to have."""
    text = response.headers.get("Content-Length", "").strip()
    return int(text) if _NUMBER.fullmatch(text) and not response.chunked else None


def content_range(response: HTTPResponse) -> tuple[int, int, int]:
    """Return the first and the last byte that are sent, and how many there are in all; -1: not said."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    return (int(match[1]), int(match[2]), int(match[3])) if match else (-1, -1, -1)


def retry_after(response: HTTPResponse) -> float:
    """Return for how many seconds the server wants to be left alone."""
    try:
        return max(0.0, urllib3.util.Retry().parse_retry_after(response.headers.get("Retry-After", "0")))
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0


def is_etag(text: str) -> bool:
    """Tell whether a text is an entity tag."""
    return _ETAG.fullmatch(text) is not None


def etag(response: HTTPResponse) -> str | None:
    """Return the entity tag, as it is written."""
    text = response.headers.get("ETag", "").strip()
    return text if is_etag(text) else None


def is_date(text: str) -> bool:
    """Tell whether a text is a date of HTTP."""
    return _date(text) is not None


def last_modified(response: HTTPResponse) -> str | None:
    """Return the date of the last change, as it is written."""
    text = response.headers.get("Last-Modified", "").strip()
    return text if is_date(text) else None


def validator(response: HTTPResponse) -> str | None:
    """Return what identifies these very bytes, and can be sent as If-Range."""
    tag = etag(response)
    if tag and not tag.startswith("W/"):
        return tag
    modified, now = _date(last_modified(response) or ""), _date(response.headers.get("Date", ""))
    if modified and now and (now - modified).total_seconds() >= _DATE_MARGIN:
        return last_modified(response)
    return None


def _date(text: str) -> datetime.datetime | None:
    if not _DATE.fullmatch(text):
        return None
    try:
        return parsedate_to_datetime(text).replace(tzinfo=datetime.UTC)
    except ValueError:
        return None
