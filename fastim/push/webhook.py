"""The generic vendor: notifications as signed JSON to one HTTP endpoint.

    POST <url>
    content-type: application/json
    x-fastim-timestamp: <unix seconds>
    x-fastim-signature: sha256=<hex of HMAC-SHA256(secret, timestamp "." body)>

    {"notifications": [{"push_id", "user", "conv", "msg_id", "sender", "preview", "badge", "pending",
                        "expires_ms"}]}

Answers, for the whole request:
 2xx                        OK; or per item, in order:
                            {"results": [{"outcome": "ok" | "gone" | "retry", "retry_after_ms"?}]}
 404, 410                   GONE
 any other, or no answer    RETRY, after Retry-After if that is given; the caller bounds the attempts

The receiver checks the signature and that the timestamp is recent, and drops push_ids that it has seen.
"""

from __future__ import annotations

import email.utils
import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

import httpx
import msgspec

from fastim.clock import Clock
from fastim.errors import UsageError
from fastim.push.base import Notification, PushOutcome, PushResult

TIMESTAMP_HEADER: Final = "x-fastim-timestamp"
SIGNATURE_HEADER: Final = "x-fastim-signature"
MIN_SECRET_BYTES: Final = 32
_MAX_ANSWER_BYTES: Final = 1 << 20
_MAX_RETRY_AFTER_MS: Final = 3_600_000
_GONE_STATUSES: Final = frozenset({404, 410})


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """What x-fastim-signature holds. Receivers compare it with hmac.compare_digest."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class _Item(msgspec.Struct, frozen=True):
    outcome: str
    retry_after_ms: int = 0
    detail: str = ""


class _Answer(msgspec.Struct, frozen=True):
    results: list[_Item] | None = None


class _Request(msgspec.Struct, frozen=True):
    notifications: Sequence[Notification]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Answer).decode
_OUTCOMES: Final = {"ok": PushOutcome.OK, "gone": PushOutcome.GONE, "retry": PushOutcome.RETRY}


class WebhookVendor:
    """A PushVendor that posts to a URL.

    secret: at least 32 bytes. client: for tests; by default one of its own, without redirects and proxies.
    """

    name = "webhook"

    def __init__(
        self,
        url: str,
        secret: bytes,
        clock: Clock,
        *,
        deadline_ms: int = 10_000,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        if not url.startswith(("https://", "http://")):
            # The rest of it may hold a secret.
            scheme, mark, _ = url.partition("://")
            shown = f"begins with {scheme[:20]!r}" if mark else "has no scheme"
            raise UsageError(f"the webhook url {shown}; must start with https:// or http://")
        if len(secret) < MIN_SECRET_BYTES:
            raise UsageError(f"the webhook secret is {len(secret)} bytes; at least {MIN_SECRET_BYTES}")
        self._url = url
        self._secret = secret
        self._clock = clock
        self._client = client or httpx.AsyncClient(
            timeout=deadline_ms / 1000, follow_redirects=False, trust_env=False
        )

    async def send(self, batch: Sequence[Notification]) -> list[PushResult]:
        if not batch:
            return []
        body = _encode(_Request(batch))
        timestamp = str(self._clock.wall_ms() // 1000)
        headers = {
            "content-type": "application/json",
            TIMESTAMP_HEADER: timestamp,
            SIGNATURE_HEADER: signature(self._secret, timestamp, body),
        }
        try:
            response = await self._client.post(self._url, content=body, headers=headers)
        except httpx.HTTPError as error:
            result = PushResult(PushOutcome.RETRY, detail=type(error).__name__)
            return [result] * len(batch)
        return self._results(response, len(batch))

    async def close(self) -> None:
        await self._client.aclose()

    def _results(self, response: httpx.Response, count: int) -> list[PushResult]:
        status = response.status_code
        if response.is_success:
            return _per_item(response.content, count)
        detail = f"status {status}"
        if status in _GONE_STATUSES:
            return [PushResult(PushOutcome.GONE, detail=detail)] * count
        retry_after_ms = self._retry_after_ms(response.headers.get("retry-after", ""))
        return [PushResult(PushOutcome.RETRY, retry_after_ms, detail)] * count

    def _retry_after_ms(self, value: str) -> int:
        """Seconds or an HTTP date; 0 for anything else."""
        value = value.strip()
        if value.isascii() and value.isdigit() and len(value) <= 9:
            return min(int(value) * 1000, _MAX_RETRY_AFTER_MS)
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0
        wanted_ms = round(moment.timestamp() * 1000) - self._clock.wall_ms()
        return min(max(0, wanted_ms), _MAX_RETRY_AFTER_MS)


def _per_item(content: bytes, count: int) -> list[PushResult]:
    """OK for all, unless the body says otherwise for each."""
    ok = [PushResult(PushOutcome.OK)] * count
    if not content or len(content) > _MAX_ANSWER_BYTES:
        return ok
    try:
        items = _decode(content).results
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ok
    if items is None or len(items) != count:
        return ok
    return [
        PushResult(
            _OUTCOMES.get(item.outcome, PushOutcome.OK),
            min(max(0, item.retry_after_ms), _MAX_RETRY_AFTER_MS),
            item.detail[:200],
        )
        for item in items
    ]
