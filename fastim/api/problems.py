"""An error as application/problem+json (RFC 9457), in the words of docs/protocol.md.

    {"type", "title", "status", "code", "detail", "retryable", "retry_after_ms"?, "client_id"?}

`code` is what programs look at: the same word that an ERROR frame carries. `detail` is for people and shows
the value and the limit; nothing of an exception that is our own fault is ever in it.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Final

import msgspec
from blacksheep import Content, Response

from fastim import observe
from fastim.errors import PeerError

STATUS: Final[dict[str, int]] = {
    "bad_request": 400,
    "bad_id": 400,
    "bad_conv": 400,
    "bad_client_id": 400,
    "unknown_kind": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "not_member": 403,
    "not_found": 404,
    "unknown_user": 404,
    "unknown_group": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "conflict": 409,
    "expired": 410,
    "too_big": 413,
    "unsupported_media_type": 415,
    "rate_limited": 429,
    "internal": 500,
    "unsupported": 501,
    "unavailable": 503,
    "draining": 503,
    "not_ready": 503,
}
"""Codes that are not listed are the peer's fault: 400."""

MEDIA_TYPE: Final = b"application/problem+json"


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error body."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    retryable: bool = False
    retry_after_ms: int = 0
    client_id: str = ""
    """Of a send: the key to repeat it under."""


def status_of(code: str) -> int:
    return STATUS.get(code, 400)


def problem_of(error: PeerError, client_id: str = "") -> Problem:
    status = status_of(error.code)
    return Problem(
        f"urn:fastim:error:{error.code}", HTTPStatus(status).phrase, status, error.code, error.detail,
        error.retryable, error.retry_after_ms, client_id,
    )  # fmt: skip


def problem_response(error: PeerError, client_id: str = "") -> Response:
    """Count it, and make the answer with the headers that belong to its status."""
    observe.ERRORS_SENT.labels(error.code).inc()
    problem = problem_of(error, client_id)
    headers: list[tuple[bytes, bytes]] = []
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after_ms:
        headers.append((b"retry-after", str(math.ceil(error.retry_after_ms / 1000)).encode()))
    return Response(problem.status, headers, Content(MEDIA_TYPE, msgspec.json.encode(problem)))


def raw_problem(status: int, code: str, detail: str) -> bytes:
    """A whole HTTP/1.1 answer, for requests that never become one; closes the connection."""
    observe.ERRORS_SENT.labels(code).inc()
    title = HTTPStatus(status).phrase
    body = msgspec.json.encode(Problem(f"urn:fastim:error:{code}", title, status, code, detail))
    return (
        f"HTTP/1.1 {status} {title}\r\ncontent-type: {MEDIA_TYPE.decode()}\r\ncontent-length: {len(body)}\r\n"
        f"connection: close\r\n\r\n"
    ).encode() + body
