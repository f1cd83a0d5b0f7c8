"""The webhook vendor keeps the vendor contract against a real HTTP server; its signature and its answers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest

from fastim.clock import SystemClock
from fastim.errors import UsageError
from fastim.push.base import Notification, PushOutcome, PushVendor
from fastim.push.webhook import WebhookVendor
from tests.contract.push import PushVendorContract, Served, notification

SECRET = bytes(range(32))

_ANSWERS = {
    "ok": "200 OK\r\n",
    "gone": "410 Gone\r\n",
    "missing": "404 Not Found\r\n",
    "retry": "503 Service Unavailable\r\n",
    "retry-after": "429 Too Many Requests\r\nretry-after: 7\r\n",
    "error": "500 Internal Server Error\r\n",
    "forbidden": "403 Forbidden\r\n",
    "moved": "302 Found\r\nlocation: http://127.0.0.1:1/\r\n",
    "date": "503 Service Unavailable\r\nretry-after: Wed, 01 Jan 2020 00:00:00 GMT\r\n",
    "nonsense": "429 Too Many Requests\r\nretry-after: soon\r\n",
}


class Receiver:
    """An HTTP/1.1 server of the smallest kind: one answer from the script per request."""

    def __init__(self, script: Sequence[str], body: bytes = b"") -> None:
        self.script = list(script)
        self.body = body
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.batches: list[list[Notification]] = []
        self._waiting: set[asyncio.Task[None]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")[1:-2]
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                body = await reader.readexactly(int(headers["content-length"]))
                self.requests.append((headers, body))
                found = json.loads(body)["notifications"]
                self.batches.append(msgspec.convert(found, list[Notification]))
                word = self.script.pop(0)
                if word == "cut":
                    break
                if word == "hang":
                    await asyncio.Event().wait()
                answer = f"HTTP/1.1 {_ANSWERS[word]}content-length: {len(self.body)}\r\n\r\n"
                writer.write(answer.encode() + self.body)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._waiting.discard(task)

    async def stop(self) -> None:
        waiting = list(self._waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@asynccontextmanager
async def webhook(script: Sequence[str], body: bytes = b"") -> AsyncIterator[tuple[PushVendor, Receiver]]:
    receiver = Receiver(script, body)
    server = await asyncio.start_server(receiver.handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    vendor = WebhookVendor(f"http://127.0.0.1:{port}/push", SECRET, SystemClock(), deadline_ms=300)
    try:
        yield vendor, receiver
    finally:
        await vendor.close()
        await receiver.stop()
        server.close()
        await server.wait_closed()


class TestWebhookVendor(PushVendorContract):
    @asynccontextmanager
    async def serve(self, script: Sequence[str]) -> AsyncIterator[Served]:
        async with webhook(script) as (vendor, receiver):
            yield vendor, receiver.batches

    async def test_the_signature_covers_timestamp_and_body(self) -> None:
        async with webhook(["ok"]) as (vendor, receiver):
            await vendor.send([notification()])
            ((headers, body),) = receiver.requests
            signed = headers["x-fastim-timestamp"].encode() + b"." + body
            expected = "sha256=" + hmac.new(SECRET, signed, hashlib.sha256).hexdigest()
            assert headers["x-fastim-signature"] == expected
            assert abs(int(headers["x-fastim-timestamp"]) * 1000 - SystemClock().wall_ms()) < 5_000

    async def test_the_answer_may_name_an_outcome_per_item(self) -> None:
        results = [{"outcome": "ok"}, {"outcome": "gone"}, {"outcome": "retry", "retry_after_ms": 1234}]
        body = json.dumps({"results": results}).encode()
        async with webhook(["ok"], body) as (vendor, _):
            found = await vendor.send([notification(1), notification(2), notification(3)])
            outcomes = [(result.outcome, result.retry_after_ms) for result in found]
            assert outcomes == [(PushOutcome.OK, 0), (PushOutcome.GONE, 0), (PushOutcome.RETRY, 1234)]

    @pytest.mark.parametrize(
        "body",
        [
            b"hello",
            b"\xff",
            b'{"results": 7}',
            b'{"results": [{"outcome": "gone"}]}',
            b'{"results": [{"outcome": "\xff"}]}',
        ],
    )
    async def test_a_success_with_an_unusable_body_is_ok(self, body: bytes) -> None:
        async with webhook(["ok"], body) as (vendor, _):
            found = await vendor.send([notification(1), notification(2)])
            assert [result.outcome for result in found] == [PushOutcome.OK] * 2

    async def test_a_missing_target_is_gone(self) -> None:
        async with webhook(["missing"]) as (vendor, _):
            (result,) = await vendor.send([notification()])
            assert (result.outcome, result.detail) == (PushOutcome.GONE, "status 404")

    @pytest.mark.parametrize("word", ["forbidden", "moved"])
    async def test_a_misconfigured_target_is_tried_again(self, word: str) -> None:
        async with webhook([word]) as (vendor, _):
            (result,) = await vendor.send([notification()])
            assert result.outcome is PushOutcome.RETRY

    @pytest.mark.parametrize("word", ["date", "nonsense"])
    async def test_a_useless_retry_after_leaves_the_back_off_to_the_caller(self, word: str) -> None:
        async with webhook([word]) as (vendor, _):
            (result,) = await vendor.send([notification()])
            assert (result.outcome, result.retry_after_ms) == (PushOutcome.RETRY, 0)

    async def test_nobody_listening_is_retry(self) -> None:
        vendor = WebhookVendor("http://127.0.0.1:9/push", SECRET, SystemClock(), deadline_ms=300)
        (result,) = await vendor.send([notification()])
        assert result.outcome is PushOutcome.RETRY
        await vendor.close()

    def test_a_short_secret_is_refused(self) -> None:
        with pytest.raises(UsageError, match="31 bytes"):
            WebhookVendor("https://example.org/push", b"x" * 31, SystemClock())

    def test_a_url_of_another_scheme_is_refused(self) -> None:
        for url, shown in (("ftp://example.org/S3CRET", "ftp"), ("example.org/S3CRET", "no scheme")):
            with pytest.raises(UsageError, match=shown) as caught:
                WebhookVendor(url, SECRET, SystemClock())
            assert "S3CRET" not in str(caught.value), "its path may be a secret"
