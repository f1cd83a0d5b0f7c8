"""One connection to one Redis server, shared by everybody who asks it something.

Hides batching, reconnecting and cancellation. Requests that come while a batch is under way wait and go
together in the next one: one write, one round trip, however many callers. Only the lane reads the socket, and
it reads every reply that it asked for, whether or not somebody still waits for it; so a cancelled caller can
neither get nor leave behind somebody else's reply. A batch without all its replies by its deadline ends the
connection, and with it every reply that could still come.

 IDLE ──ask──▶ BUSY: connect if need be ─▶ send ─▶ read all ─▶ more waiting? again : IDLE

I1  a reply goes to the request it answers, or nowhere      tests/presence/cancels.py, test_lane.py
I2  what was cancelled before its batch left is never sent  tests/presence/test_lane.py
I3  every request ends: with its replies or PresenceUnavailable      same
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

from fastim.errors import PresenceUnavailable

_log: Final = logging.getLogger(__name__)
_MOST_COMMANDS: Final = 2_000
"""In one batch: what waits behind it is not late for long."""


class _Request:
    __slots__ = ("answer", "count", "packed")

    def __init__(self, packed: bytes, count: int, answer: asyncio.Future[list[Any]]) -> None:
        self.packed = packed
        self.count = count
        self.answer = answer


class Lane:
    """Ask one server."""

    def __init__(self, name: str, connection: AbstractConnection, deadline_s: float) -> None:
        """connection: not connected yet, and from now on the lane's alone."""
        self.name = name
        self._connection = connection
        self._deadline_s = deadline_s
        self._waiting: deque[_Request] = deque()
        self._work: asyncio.Task[None] | None = None
        self._closed = False
        self.round_trips = 0
        self.commands = 0
        self.abandoned = 0
        """Requests whose replies came after their caller had gone."""

    def ask(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
        """The replies to `count` packed commands, in order; an error reply is a ResponseError among them.

        The future fails with PresenceUnavailable; the commands may then have been carried out. It may be
        cancelled at any moment.
        """
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if self._closed:
            answer.set_exception(PresenceUnavailable(f"{self.name}: closed"))
            return answer
        self._waiting.append(_Request(packed, count, answer))
        if self._work is None:
            self._work = asyncio.create_task(self._run(), name=f"presence.lane {self.name}")
        return answer

    async def close(self) -> None:
        self._closed = True
        work = self._work
        if work is not None:
            work.cancel()
            await asyncio.wait([work])
        self._fail(self._waiting, "closed")
        self._waiting.clear()
        await self._disconnect()

    async def _run(self) -> None:
        try:
            while batch := self._next_batch():
                await self._carry(batch)
        finally:
            self._work = None

    def _next_batch(self) -> list[_Request]:
        batch: list[_Request] = []
        count = 0
        while self._waiting and count < _MOST_COMMANDS:
            request = self._waiting.popleft()
            if not request.answer.done():
                batch.append(request)
                count += request.count
        return batch

    async def _carry(self, batch: Sequence[_Request]) -> None:
        """See every request of the batch to its end."""
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._exchange(batch)
        except TimeoutError:
            await self._lost(batch, f"no answer within {self._deadline_s * 1000:,.0f} ms")
        except asyncio.CancelledError:
            await self._lost(batch, "closed")
            raise
        except Exception as error:
            # RuntimeError is uvloop's word for a transport that was closed under us.
            if not isinstance(error, RedisError | OSError | RuntimeError):
                _log.exception("%s: a reply that cannot be read", self.name)
            await self._lost(batch, str(error) or type(error).__name__)

    async def _exchange(self, batch: Sequence[_Request]) -> None:
        connection = self._connection
        if connection.is_connected and await connection.can_read():
            # Nothing was asked, so this is the end of the stream: the server went away while nobody looked.
            await connection.disconnect(nowait=True)
        if not connection.is_connected:
            await connection.connect()  # type: ignore[no-untyped-call]
        self.round_trips += 1
        self.commands += sum(request.count for request in batch)
        await connection.send_packed_command([request.packed for request in batch], check_health=False)
        for request in batch:
            replies: list[Any] = []
            for _ in range(request.count):
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except ResponseError as error:
                    replies.append(error)
            if request.answer.done():
                self.abandoned += 1
            else:
                request.answer.set_result(replies)

    async def _lost(self, batch: Sequence[_Request], why: str) -> None:
        self._fail(batch, why)
        await self._disconnect()

    def _fail(self, requests: Sequence[_Request] | deque[_Request], why: str) -> None:
        for request in requests:
            if not request.answer.done():
                request.answer.set_exception(PresenceUnavailable(f"{self.name}: {why}"))

    async def _disconnect(self) -> None:
        if self._connection.is_connected:
            await self._connection.disconnect(nowait=True)
