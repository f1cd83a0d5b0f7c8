"""The client: one device of one user, as an app uses it.

    store = SqliteLocalStore("chat.db")
    async with Client("wss://chat.example.org", token, "phone-1", store=store) as client:
        outgoing = await client.send("p:alice:bob", "hello")
        await outgoing.accepted()
        async for event in client.events():
            ...

Hides everything between a call and the server: the local store, the connection, order, acks, retries. Two
tasks do the work, and a third calls on_event when there is one:

 worker  frames, sends, reads ─▶ Device ─▶ LocalStore.commit ─▶ acks, SENDs, events     (client/worker.py)
 life    token ─▶ dial ─▶ AUTH ─▶ until closed ─▶ judge ─▶ wait with jitter, or stop    (client/life.py)

L1  a message is shown once, in order, across kills of this process    tests/system/test_client_kill.py
L2  what `send` returned for is sent until it is answered, same id     same
Source: docs/adr/0050; docs/writing-a-client.md.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Self
from weakref import WeakValueDictionary

from fastim import __version__
from fastim import protocol as p
from fastim.client.connection import Connection
from fastim.client.device import Device, history_message
from fastim.client.events import (
    Conversation,
    Delivery,
    Event,
    HistoryPage,
    Message,
    StateChanged,
)
from fastim.client.feed import Feed
from fastim.client.life import Ending, Life, TokenSource
from fastim.client.localstore import LocalStore, MemoryLocalStore
from fastim.client.outbox import Unsent
from fastim.client.sealed import sealed_dial
from fastim.client.wire import Dial, Receiver, Trust, Wire, check_url, dial, tls_context
from fastim.client.worker import Worker
from fastim.clock import Clock, SystemClock
from fastim.errors import PeerError, Unavailable, UsageError
from fastim.model import DEFAULT_KINDS, MAX_BODY_BYTES, Flag, check_id, is_expired, parse_conv
from fastim.sealing import SealKey

_log = logging.getLogger("fastim.client")

REQUEST_TIMEOUT_S: Final = 15.0
MAX_REQUESTS: Final = 4
CLOSE_TIMEOUT_S: Final = 1.5
_KINDS: Final = {rule.name: int(kind) for kind, rule in DEFAULT_KINDS.items()}


class Outgoing:
    """A message that is in the outbox, or was. Compare by client_id."""

    def __init__(self, client: Client, unsent: Unsent) -> None:
        self._client = client
        self.client_id = unsent.client_id
        self.conv = unsent.conv
        self.seq = 0
        """Its place in the conversation once it is accepted."""
        self.msg_id = 0
        self.code = unsent.refused
        """Why it was refused, "" otherwise."""
        self.detail = unsent.detail
        self._settled = asyncio.Event()
        if self.code:
            self._settled.set()

    @property
    def state(self) -> Delivery:
        """queued, sent, refused, or read: somebody else's read mark is at or above it."""
        if self.code:
            return Delivery.REFUSED
        if not self.seq:
            return Delivery.QUEUED
        marks = self._client.read_marks(self.conv).values()
        return Delivery.READ if any(mark >= self.seq for mark in marks) else Delivery.SENT

    async def accepted(self) -> Outgoing:
        """Wait for the server's answer, across reconnects.

        Raises PeerError when it is refused for good; Unavailable when the client is closed before.
        """
        await self._settled.wait()
        if self.code:
            raise PeerError(self.code, self.detail)
        if not self.seq:
            raise Unavailable("client", "it was closed before the message was accepted; it is in the outbox")
        return self

    def _settle(self, seq: int, msg_id: int, code: str, detail: str) -> None:
        self.seq, self.msg_id, self.code, self.detail = seq, msg_id, code, detail
        self._settled.set()


class Events:
    """`async for event in client.events()`. Asking for the next event says that the one before is done."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        event = await self._feed.next()
        if event is None:
            raise StopAsyncIteration
        return event


class Client:
    """One device of one user. Use it as a context manager, or `start` and `close`.

    url           wss://host[:port]; ws:// for loopback only
    token         an access token, or a function that returns a fresh one (may be async): asked at every
                  connect, and before the token ends
    device        id of this installation, kept for ever: 1-64 of A-Za-z0-9_.@-
    store         what survives; MemoryLocalStore() forgets with the process
    device_class  app, web, desktop or pad
    ssl           an SSLContext; or a file of CA certificates to trust (a development server's certificate);
                  None: the system's. Verification cannot be switched off here
    seal          the server's static key (SealKey): every packet is encrypted once more, for networks in
                  which somebody else ends TLS. The server reads everything: this is not end-to-end
    on_event      called with every event, in order, instead of events(); may be async. An app that wants no
                  events passes one that does nothing
    clock, rng, dial   for tests and simulations

    It connects in the background and works offline: `send` and `read` are kept and go out later.
    Raises UsageError for arguments that can never work.
    """

    def __init__(
        self,
        url: str,
        token: TokenSource,
        device: str,
        *,
        store: LocalStore | None = None,
        device_class: str = "app",
        ssl: Trust = None,
        seal: SealKey | None = None,
        on_event: Callable[[Event], Awaitable[None] | None] | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        dial: Dial | None = None,
        max_outbox: int = 10_000,
    ) -> None:
        self._url = check_url(url)
        self._device_id = check_id("device", device)
        self._device_class = device_class
        self._tls = tls_context(ssl) if self._url.startswith("wss:") else None
        self._store: LocalStore = store if store is not None else MemoryLocalStore()
        self._on_event = on_event
        self._clock: Clock = clock or SystemClock()
        self._rng = rng or random.SystemRandom()
        self._dial: Dial = dial or self._dial_picows
        if seal is not None:
            self._dial = sealed_dial(self._dial, seal, self._clock)
        self._max_outbox = max_outbox
        self._life = Life(
            token, self._clock, self._rng, self._connect, lambda gone: self._worker.feed.publish([gone])
        )
        self._worker = Worker(
            self._store, self._device_id, self._clock, self._rng, self._life, self._on_state
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._outgoing: WeakValueDictionary[bytes, Outgoing] = WeakValueDictionary()
        self._request_room = asyncio.Semaphore(MAX_REQUESTS)
        self._connection: Connection | None = None
        """The newest one, closed or not."""
        self._started = False
        self._closed = False
        self._sends = 0

    # --------------------------------------------------------------------------------------------- life

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Open the store and begin to connect. Raises StoreUnavailable, UsageError (another's store)."""
        if self._started or self._closed:
            raise UsageError("a client is started once; make a new one")
        await self._worker.open()
        self._started = True
        self._sends = self._worker.device.sends
        self._spawn(self._worker.run(), "worker")
        self._spawn(self._life.run(), "life")
        if self._on_event is not None:
            self._spawn(self._pump(self._on_event), "events")
        self._worker.wake()

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Leave in good order: acknowledge what is stored, say goodbye. The outbox stays in the store.

        drain_s: wait so long for the outbox to become empty. Idempotent.
        """
        if self._closed or not self._started:
            self._closed = True
            return
        if drain_s:
            await self._drained(drain_s)
        self._closed = True
        self._life.leave()
        self._worker.stop()
        await asyncio.wait([task for task in self._tasks if task.get_name() == "fastim.client.worker"])
        connection, device = self._connection, self._worker.device
        if connection is not None and not connection.code:
            device.ack()
            connection.send(device.out)
            connection.close()
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await connection.closed.wait()
            except TimeoutError:
                connection.abort("closed")
        await self._end(orderly=True)

    async def abort(self) -> None:
        """Stop as a kill would: nothing more is stored, acknowledged or said. For tests."""
        if self._closed or not self._started:
            self._closed = True
            return
        self._closed = True
        self._life.leave()
        if self._connection is not None:
            self._connection.abort("aborted")
        await self._end(orderly=False)

    async def _end(self, *, orderly: bool) -> None:
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connection is not None:
            # A life that was cancelled between dialling and attaching leaves an open one.
            self._connection.abort("closed")
            await self._connection.gone()
        self._worker.feed.close(orderly=orderly)
        self._worker.give_up(Unavailable("client", "it is closed", temporary=False))
        for outgoing in list(self._outgoing.values()):
            outgoing._settled.set()
        self._worker.became_live.set()
        self._worker.became_level.set()
        await self._store.close()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"fastim.client.{name}")
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task of the client fails only for a bug, or a store that is gone for good."""
        failure = None if task.cancelled() else task.exception()
        if isinstance(failure, Exception):
            _log.error("%s failed", task.get_name(), exc_info=failure)
            self._life.leave()
            if self._connection is not None:
                self._connection.abort("the client failed")
            self._worker.feed.fail(failure)
            self._worker.give_up(failure)

    async def _drained(self, drain_s: float) -> None:
        try:
            async with asyncio.timeout(drain_s):
                while waiting := [one for one in self.unsent() if not one.code]:
                    await waiting[-1]._settled.wait()
        except TimeoutError:
            pass

    # ------------------------------------------------------------------------------------------- for the app

    @property
    def user(self) -> str:
        """The user of the token; "" until this store has been connected once."""
        return self._need().ticket.user

    @property
    def connected(self) -> bool:
        """Whether the server has said HELLO on the connection of now."""
        return self._started and not self._closed and self._worker.device.live

    async def wait_connected(self) -> None:
        """Until there is a connection. Not while the client may not connect: use a timeout.

        Raises Unavailable when the client is closed.
        """
        await self._until(lambda device: device.live, self._worker.became_live)

    async def wait_level(self) -> None:
        """Until everything that the server had for this device when it connected is stored here.

        Not while there is no connection: use a timeout. Raises Unavailable when the client is closed.
        """
        await self._until(lambda device: device.level, self._worker.became_level)

    async def _until(self, condition: Callable[[Device], bool], became: asyncio.Event) -> None:
        while not condition(self._need()) or self._closed:
            if self._closed:
                raise Unavailable("client", "it is closed", temporary=False)
            became.clear()
            await became.wait()

    def reconnect(self, token: TokenSource | None = None) -> None:
        """Connect now: after a final Disconnected, with a new token if given, or instead of waiting."""
        self._life.again(token)

    def server_now_ms(self) -> int:
        """The server's clock, as of the last HELLO or PONG."""
        return self._need().server_now_ms()

    def events(self) -> Events:
        """What happens, once and in order; ends when the client is closed. One consumer at a time.

        Message and Gone are kept in the store until they are taken; of everything else an app that comes
        late gets the newest state.
        """
        if self._on_event is not None:
            raise UsageError("this client hands its events to on_event")
        self._need()
        return Events(self._worker.feed)

    async def send(
        self,
        conv: str,
        body: str | bytes,
        kind: str | int = "text",
        *,
        loss_time_ms: int = 0,
        ttl_ms: int = 0,
        flags: int = 0,
        mentions: Iterable[str] = (),
        read_seq: int = 0,
        client_id: bytes = b"",
    ) -> Outgoing:
        """Put a message into the outbox; returns when it is stored there, connected or not.

        loss_time_ms or ttl_ms: a deadline, absolute or from now; 0 = never lost. read_seq: what the screen
        had shown, moves the read mark. client_id: 16 bytes, for an app that mints its own.
        Raises UsageError for what no server would take, StoreUnavailable, Unavailable (outbox full, closed).
        """
        device = self._need()
        wanted = self._worker.wanted
        if len(device.outbox) + len(wanted) >= self._max_outbox:
            raise Unavailable(
                "outbox", f"it holds {len(device.outbox):,} messages; limit {self._max_outbox:,}"
            )
        if ttl_ms:
            loss_time_ms = self.server_now_ms() + ttl_ms
        raw = body.encode() if isinstance(body, str) else bytes(body)
        unsent = Unsent(
            self._sends + 1, client_id or self._mint_id(), conv, _kind(kind), raw, loss_time_ms, int(flags),
            tuple(mentions), read_seq, self._clock.wall_ms(),
        )  # fmt: skip
        _check(unsent)
        if client_id and any(one.client_id == client_id for one in (*wanted, *device.entries())):
            raise UsageError(f"client_id {client_id.hex()} is in the outbox already")
        self._sends += 1
        outgoing = self._outgoing[unsent.client_id] = Outgoing(self, unsent)
        await self._worker.add(unsent)
        return outgoing

    def unsent(self) -> list[Outgoing]:
        """Everything in the outbox: waiting, or refused and not discarded, oldest first."""
        device = self._need()
        return [self._outgoing_of(unsent) for unsent in device.entries()]

    async def discard(self, client_id: bytes) -> None:
        """Take a message out of the outbox. One that waits may have reached the server all the same."""
        self._need()
        await self._worker.wish(lambda: self._worker.device.discard(client_id))

    def conversations(self) -> list[Conversation]:
        """The list, newest first."""
        rows = sorted(self._need().rows.values(), key=lambda row: (-row.last_ts_ms, row.conv))
        return [
            Conversation(
                row.conv, row.head, row.read, row.unread, row.mention_seq, row.limited, row.last_sender,
                row.last_kind, row.last_ts_ms, row.preview,
            )
            for row in rows
        ]  # fmt: skip

    async def history(self, conv: str, before_seq: int = 0, limit: int = 50) -> HistoryPage:
        """The newest `limit` messages below before_seq (0: the newest of all), from here, then the server.

        A page may be shorter. Raises PeerError (forbidden, ...), Unavailable when nothing is here and the
        server cannot be asked, UsageError for a limit outside 1-200.
        """
        device = self._need()
        parse_conv(conv)
        if not 1 <= limit <= p.MAX_HISTORY_LIMIT or before_seq < 0:
            raise UsageError(f"limit is {limit}; must be 1-{p.MAX_HISTORY_LIMIT}, and before_seq >= 0")
        row = device.rows.get(conv)
        here: list[Message] = []
        if row is not None and before_seq <= row.last + 1:
            below = before_seq or row.last + 1
            start = max(row.start, self._store.floor(conv))
            here = await self._store.page(conv, start, below, limit)
            if len(here) == limit or start == 0:
                return self._page(here, bool(here) and here[0].seq > 1 and len(here) == limit)
            before_seq = min(below, start + 1)
        if not self.connected:
            if here:
                return self._page(here, True)
            raise Unavailable("server", "not connected, and older history is not here")
        async with self._request_room:
            rest = limit - len(here)
            page = await self._worker.ask_history(conv, before_seq, rest, REQUEST_TIMEOUT_S)
        return self._page([history_message(item) for item in page.messages] + here, page.more)

    async def read(self, conv: str, seq: int, *, private: bool = False) -> None:
        """The user has seen everything up to seq. Returns when it is stored here; the server is told.

        Only moves forward, never above what this device has. private: peers are not told.
        Raises UsageError for a conversation that this device does not know.
        """
        if conv not in self._need().rows:
            raise UsageError(f"conversation {conv!r} is not known to this device")
        await self._worker.wish(lambda: self._worker.device.read(conv, seq, private=private))

    def read_marks(self, conv: str) -> Mapping[str, int]:
        """user -> seq: how far the others have read, as far as the server told."""
        return dict(self._need().reads.get(conv, {}))

    # ---------------------------------------------------------------------------------------------- inside

    def _need(self) -> Device:
        if not self._started:
            raise UsageError("the client is not started; use `async with`, or start()")
        return self._worker.device

    def _page(self, messages: list[Message], more: bool) -> HistoryPage:
        now_ms = self.server_now_ms()
        return HistoryPage([m for m in messages if not is_expired(m.loss_time_ms, now_ms)], more)

    def _outgoing_of(self, unsent: Unsent) -> Outgoing:
        outgoing = self._outgoing.get(unsent.client_id)
        if outgoing is None:
            outgoing = self._outgoing[unsent.client_id] = Outgoing(self, unsent)
        return outgoing

    def _mint_id(self) -> bytes:
        """A UUIDv7."""
        stamp = self._clock.wall_ms() & ((1 << 48) - 1)
        noise = self._rng.getrandbits(74)
        value = stamp << 80 | 7 << 76 | (noise >> 62) << 64 | 2 << 62 | noise & ((1 << 62) - 1)
        return value.to_bytes(16, "big")

    async def _pump(self, on_event: Callable[[Event], Awaitable[None] | None]) -> None:
        async for event in Events(self._worker.feed):
            try:
                done = on_event(event)
                if inspect.isawaitable(done):
                    await done
            except Exception:
                _log.exception("on_event failed for %s", type(event).__name__)

    async def _dial_picows(self, receiver: Receiver) -> Wire:
        return await dial(self._url, receiver, self._tls)

    async def _connect(self, token: str) -> tuple[Connection, asyncio.Future[Ending]]:
        """For Life: a connection with AUTH written, and the future of its end."""
        worker = self._worker
        connection = Connection(self._clock, self._rng, worker.wake)
        connection.open(await self._dial(connection))
        self._connection = connection
        agent = f"fastim-python/{__version__}"
        settled = await worker.attach(
            connection, lambda: worker.device.auth(token, self._device_id, self._device_class, agent)
        )
        return connection, settled

    def _on_state(self, signal: StateChanged) -> None:
        outgoing = self._outgoing.get(signal.client_id)
        if outgoing is not None:
            outgoing._settle(signal.seq, signal.msg_id, signal.code, signal.detail)


def _kind(kind: str | int) -> int:
    if isinstance(kind, str):
        number = _KINDS.get(kind)
        if number is None:
            raise UsageError(f"kind is {kind!r}; must be one of {' '.join(_KINDS)}, or a number")
        return number
    return kind


def _check(unsent: Unsent) -> None:
    """What every server refuses. Raises UsageError."""
    try:
        conv = parse_conv(unsent.conv)
        for user in unsent.mentions:
            check_id("mention", user)
    except PeerError as error:
        raise UsageError(error.detail) from None
    if not conv.is_stored:
        raise UsageError(f"{unsent.conv} is a room; rooms are not stored")
    if len(unsent.client_id) != 16:
        raise UsageError(f"client_id is {len(unsent.client_id)} bytes; must be 16")
    if len(unsent.body) > MAX_BODY_BYTES:
        raise UsageError(f"body is {len(unsent.body):,} bytes; limit {MAX_BODY_BYTES:,}")
    if len(unsent.mentions) > p.MAX_MENTIONS:
        raise UsageError(f"{len(unsent.mentions)} mentions; limit {p.MAX_MENTIONS}")
    if not 0 <= unsent.loss_time_ms < 1 << 53:
        raise UsageError(f"loss_time_ms is {unsent.loss_time_ms}; must be 0 to 2^53 - 1")
    if unsent.flags & ~int(Flag.NO_PUSH | Flag.SILENT | Flag.MENTION_ALL | Flag.SEALED):
        raise UsageError(f"flags is {unsent.flags:#x}; unknown bits")
