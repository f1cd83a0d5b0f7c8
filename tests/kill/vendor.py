"""A push vendor's HTTP endpoint that checks signatures and remembers every call with its moment."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from fastim.push.webhook import SIGNATURE_HEADER, TIMESTAMP_HEADER, signature


@dataclass(frozen=True)
class Call:
    """One notification as the vendor received it."""

    push_id: str
    user: str
    conv: str
    msg_id: int
    pending: int
    badge: int
    wall_ms: int


class WebhookServer:
    """Answers 200 to every signed POST; `fail` makes it answer 503 instead.

    async with WebhookServer(secret) as vendor: configure the server with vendor.url
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.calls: list[Call] = []
        self.bad: list[str] = []
        self.fail = False
        self.failed = 0
        """How often it answered 503."""
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/push"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.close()
        await asyncio.sleep(0)

    def of(self, user: str, conv: str = "") -> list[Call]:
        """Calls about a user, in a conversation if one is named."""
        return [call for call in self.calls if call.user == user and conv in ("", call.conv)]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                headers = {
                    name.strip().lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in lines[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                status = self._take(headers, body)
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n".encode())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    def _take(self, headers: dict[str, str], body: bytes) -> int:
        if self.fail:
            self.failed += 1
            return 503
        timestamp = headers.get(TIMESTAMP_HEADER, "")
        wanted = signature(self._secret, timestamp, body)
        if not hmac.compare_digest(wanted, headers.get(SIGNATURE_HEADER, "")):
            self.bad.append("signature")
            return 401
        now = time.time_ns() // 1_000_000
        for item in json.loads(body)["notifications"]:
            self.calls.append(
                Call(
                    item["push_id"], item["user"], item["conv"], item["msg_id"], item["pending"],
                    item["badge"], now,
                )
            )  # fmt: skip
        return 200
