"""A program that sends by REST: each message under one client_id, repeated until it is answered.

One message per conversation is under way, so that what it wrote first is stored first. An answer is 200 or
a refusal that is final; everything else (no connection, a reset, 503, silence) is tried again unchanged,
which is what the server promises to bear.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import httpx

from bench.server import Server
from fastim.api.shapes import new_client_id
from fastim.auth import Scope
from tests.kill.log import ClientLog, wall_ms
from tests.kill.people import Cast
from tests.leaks import MARK

_TIMEOUT_S = 8.0
_PAUSE_S = (0.02, 0.05, 0.1, 0.2)


class Caller:
    """One service with a token of its own; it writes to the s: conversations of the cast."""

    def __init__(self, server: Server, name: str, cast: Cast, logs: Path) -> None:
        self.name = name
        self.convs = [conv for conv in cast.members if conv[0] == "s"]
        self.log = ClientLog(logs, name, "")
        self.again = 0
        """Requests that were repeated."""
        token = server.token(name, Scope.SERVICE)
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.http_port}",
            headers={"authorization": f"Bearer {token}"},
            timeout=_TIMEOUT_S,
            trust_env=False,
        )
        self._lines: dict[str, deque[tuple[str, str, int]]] = {conv: deque() for conv in self.convs}
        self._work = {conv: asyncio.Event() for conv in self.convs}
        self._tasks: list[asyncio.Task[None]] = []
        self._count = 0

    def offer(self, conv: str, loss_time_ms: int) -> bool:
        """Queue a message; it is written down at once."""
        self._count += 1
        client_id = new_client_id(wall_ms()).hex()
        self.log.write("submit", client_id=client_id, conv=conv, n=self._count, loss=loss_time_ms)
        self._lines[conv].append((client_id, f"{MARK} {self.name} {self._count}", loss_time_ms))
        self._work[conv].set()
        return True

    def live(self) -> None:
        self._tasks = [
            asyncio.create_task(self._send_all(conv), name=f"{self.name} {conv}") for conv in self.convs
        ]

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()
        self.log.close()

    async def create_group(self, conv: str, members: Sequence[str]) -> None:
        """`g:<name>`; the first member owns it. Repeating it changes nothing."""
        body = {"group": conv.removeprefix("g:"), "owner": members[0], "members": list(members)}
        answer = await self._insist("/v1/groups", body)
        if not answer.is_success:
            raise RuntimeError(f"{conv} was not created: {answer.status_code} {answer.text}")

    async def _send_all(self, conv: str) -> None:
        line, work = self._lines[conv], self._work[conv]
        while True:
            await work.wait()
            work.clear()
            while line:
                client_id, text, loss_time_ms = line[0]
                body = {
                    "conv": conv, "sender": self.name, "client_id": client_id, "body": text,
                    "loss_time_ms": loss_time_ms,
                }  # fmt: skip
                answer = await self._insist("/v1/messages", body)
                found = answer.json()
                if answer.is_success:
                    self.log.write(
                        "sent", client_id=client_id, conv=conv, msg_id=found["msg_id"], seq=found["seq"]
                    )
                else:
                    self.log.write("refused", client_id=client_id, conv=conv, code=found["code"])
                line.popleft()

    async def _insist(self, path: str, body: dict[str, object]) -> httpx.Response:
        """Until somebody answers with something final."""
        tries = 0
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = await self._http.post(path, json=body)
                if answer.is_success or (answer.is_client_error and not answer.json().get("retryable")):
                    return answer
            await asyncio.sleep(_PAUSE_S[min(tries, len(_PAUSE_S) - 1)])
            tries += 1
            self.again += 1
