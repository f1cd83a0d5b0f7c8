"""Send a message for a caller without a connection, and wait until it is stored.

Hides the bus: the api has an inbox of its own, `inbox.<name>.<boot>`, to which dispatch answers as it answers
a node. A caller whose answer does not come in time is told to repeat under the same client_id; what became of
the first try, the repeat learns (Store.S2). On a durable bus the record is safe by then and will be stored or
refused whatever happens: the caller is told that it was taken, and the trace tells the rest.

    submit ─▶ WAITING ──Reply──▶ stored | refused        late Replies find nobody and are settled
                 └──deadline, stop──▶ durable bus: taken (None) │ memory: unavailable, retryable

G1  at most max_waiting callers wait; one more is refused before it publishes    tests/unit/test_ingress.py
G2  a Reply is settled whether or not somebody still waits for it                same
No task per message: the caller's own waits on one future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from fastim import observe
from fastim.bus.base import NODE_GROUP, SUBMIT, Bus, Outgoing, Reader, Record, inbox_topic
from fastim.bus.records import MALFORMED, Reply, Submit, decode_inbox
from fastim.errors import BusUnavailable, InternalError, PeerError
from fastim.protocol import SendItem, SentItem

RETRY_AFTER_MS: Final = 1_000
_BATCH: Final = 256


class Ingress:
    """One per process.

    durable: what the bus has taken outlives every process. on_fatal is called if the inbox can no longer be
    read: every later caller would wait for nothing.
    """

    def __init__(
        self,
        bus: Bus,
        boot: int,
        *,
        name: str = "api",
        durable: bool = False,
        reply_timeout_ms: int,
        max_waiting: int,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._bus = bus
        self._topic = inbox_topic(name, boot)
        self._name = name
        self._boot = boot
        self._durable = durable
        self._reply_timeout_ms = reply_timeout_ms
        self._max_waiting = max_waiting
        self._on_fatal = on_fatal
        self._waiting: dict[str, asyncio.Future[Reply | None]] = {}
        self._count = 0
        self._reader: Reader | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Callers whose message is on its way."""
        return len(self._waiting)

    async def start(self) -> None:
        await self._bus.ensure(self._topic)
        self._reader = self._bus.reader(self._topic, NODE_GROUP, max_unsettled=4 * _BATCH)
        self._task = asyncio.create_task(self._read(self._reader), name="api.inbox")

    async def submit(self, conv: str, sender: str, item: SendItem, *, service: bool) -> SentItem | None:
        """Authorised and within limits; returns once it is stored, or None: taken for good, not stored yet.

        Raises PeerError: dispatch's refusal, or "unavailable" (retryable under the same client_id) when no
        answer came within the reply timeout, too many wait, or the bus did not take it.
        """
        if self._closed or self._reader is None:
            raise _unavailable("the server is stopping")
        if len(self._waiting) >= self._max_waiting:
            raise _unavailable(f"{self._max_waiting:,} messages wait to be stored; limit api.max_waiting")
        self._count += 1
        request = f"{self._name}-{self._boot}-{self._count}"
        future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        self._waiting[request] = future
        try:
            submit = Submit(conv, sender, "", request, self._topic, [item], 0, service)
            await self._bus.publish([Outgoing(SUBMIT, conv, submit)])
            observe.SUBMITTED.labels("rest").inc()
            async with asyncio.timeout(self._reply_timeout_ms / 1000):
                reply = await future
        except BusUnavailable as error:
            raise _unavailable(error.detail) from None
        except TimeoutError:
            if self._durable:
                return None
            raise _unavailable(
                f"not stored within {self._reply_timeout_ms:,} ms (api.reply_timeout_ms); send it again with "
                f"the same client_id"
            ) from None
        finally:
            self._waiting.pop(request, None)
        return _outcome(reply) if reply is not None else None

    async def stop(self) -> None:
        """Tell who still waits that it was taken, or to repeat; give the inbox back. Safe to call twice."""
        self._closed = True
        for future in self._waiting.values():
            if future.done():
                continue
            if self._durable:
                future.set_result(None)
            else:
                detail = "the server is stopping; send it again with the same client_id"
                future.set_exception(_unavailable(detail))
        if self._reader is not None:
            await self._reader.close()
        if self._task is not None:
            await self._task

    async def _read(self, reader: Reader) -> None:
        try:
            while records := await reader.read(_BATCH):
                for record in records:
                    self._take(record)
                reader.settle_all(records)
            if not self._closed:
                raise InternalError(f"{self._topic} ended by itself")
        except Exception as error:
            if not self._closed:
                self._on_fatal(error)

    def _take(self, record: Record) -> None:
        try:
            reply = decode_inbox(record.value)
        except MALFORMED:
            return  # of another version; its caller repeats
        if isinstance(reply, Reply):
            future = self._waiting.get(reply.session)
            if future is not None and not future.done():
                future.set_result(reply)


def _outcome(reply: Reply) -> SentItem:
    if reply.sent:
        return reply.sent[0]
    refused = reply.refused[0]
    raise PeerError(
        refused.code, refused.detail, retryable=refused.retryable, retry_after_ms=refused.retry_after_ms
    )


def _unavailable(detail: str) -> PeerError:
    return PeerError("unavailable", detail, retryable=True, retry_after_ms=RETRY_AFTER_MS)
