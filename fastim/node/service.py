"""One access node: its parts, its tasks, its start and its end (seed: access-server).

 NEW ──start(): inbox, lease──▶ READY ──go_away()──▶ DRAINING ──sockets closed──▶ stop(): flush ──▶ STOPPED
                                  ├── adopted ──▶ FENCED: no reader, no sockets; on_fenced(error) ──▶ stop()
                                  └── a task dies ──▶ on_fatal(error): the app drains the process

Hides the tasks: one reader of the inbox, one flusher, one publisher of sends, a few streams, one lease, one
sweep every 250 ms. There is no task and no timer per connection; a login, a question and a detach are tasks
while they last.

O1  nothing is accepted before the inbox and the lease exist                tests/system/test_node.py
O2  a lease that is missing is registered again, and every session synced   same
O3  a task that dies is fatal, loudly                                       same
O4  a boot that was adopted closes its sockets and reads nothing any more, whatever its lease says
                                                                            tests/system/test_fence.py
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from fastim import observe
from fastim._core.acks import AckTable
from fastim._core.wheel import Wheel
from fastim.auth import Identity
from fastim.bus.base import NODE_GROUP, Bus, Reader, inbox_topic
from fastim.clock import Clock
from fastim.errors import (
    BusUnavailable,
    Fenced,
    InternalError,
    PeerError,
    PresenceUnavailable,
    StoreUnavailable,
    Unavailable,
)
from fastim.model import DEFAULT_KINDS, KindRule
from fastim.node.catchup import Catchup
from fastim.node.commands import Commands
from fastim.node.delivery import Delivery
from fastim.node.fence import Fence
from fastim.node.flush import Flusher
from fastim.node.handshake import Handshake
from fastim.node.limits import NodeLimits
from fastim.node.link import Hub, Link
from fastim.node.pool import ConnPool
from fastim.node.session import Session
from fastim.presence.base import PresenceStore
from fastim.protocol import Auth, CloseCode, Error, Goaway, Op, Rekey, decode, encode
from fastim.sealing import REFUSED, SealKeys
from fastim.store.base import Behind, MessageStore

_log = logging.getLogger("fastim.node")
_TOKEN_SWEEPS = 20
"""Tokens are looked at every so many sweeps: 5 s."""
_STOP_FLUSH_MS = 5_000


def encode_error(op: int, error: PeerError) -> bytes:
    """The ERROR frame of a refusal that names no client_id."""
    observe.ERRORS_SENT.labels(error.code).inc()
    return encode(Error(op, error.code, error.detail, error.retryable, error.retry_after_ms))


_REKEY: Final = int(Op.REKEY)
_NO_SEALS: Final = "this server has no keys to seal with (node.seal_keys)"


class _Connection:
    """What the node sets per link (link.LinkOwner)."""

    __slots__ = ("agreed_mono_ms", "joining", "key_id", "link", "node", "session")

    def __init__(self, node: Node, link: Link) -> None:
        self.node = node
        self.link = link
        self.session: Session | None = None
        self.joining = False
        self.key_id = 0
        self.agreed_mono_ms = 0
        """When, and under which id, the newest keys were agreed."""

    def on_command(self, op: int, frame: bytes) -> None:
        session = self.session
        if op == _REKEY:
            self._rekey(frame, live=session is not None and session.link is self.link)
            return
        if session is not None and session.link is self.link:
            self.node.commands.take(session, op, frame)
            return
        try:
            if op != Op.AUTH or self.joining:
                raise PeerError("unauthenticated", "AUTH is the first frame, once; wait for HELLO")
            seals = self.node.seals
            if seals is not None and seals.required and not self.link.sealed:
                raise PeerError("seal_required", "this server takes AUTH inside SEALED only")
            auth = decode(op, frame)
            assert isinstance(auth, Auth)
            identity = self.node.handshake.check(auth)
        except PeerError as error:
            self._refuse(op, error)
            return
        self.joining = True
        # The peer has shown who it is: a backend that is slow now is neither late nor wrong on its side.
        self.link.authenticated = True
        self.node.spawn(self._login(auth, identity), f"login {identity.user}")

    def _rekey(self, frame: bytes, *, live: bool) -> None:
        """Agree on keys, as the first thing of a connection, or on new ones inside a sealed session."""
        link, seals = self.link, self.node.seals
        if seals is None and live:
            raise PeerError("unsupported", _NO_SEALS)
        try:
            if seals is None:
                raise PeerError("unsupported", _NO_SEALS)
            rekey = decode(_REKEY, frame)
            assert isinstance(rekey, Rekey)
            mono_ms = self.node.mono_ms()
            if not self._may_agree(rekey.key_id, mono_ms, live=live):
                raise PeerError("bad_seal", REFUSED)
            keys, agreed = seals.answer(rekey)
        except PeerError as error:
            observe.SEALED.labels("refused").inc()
            self._refuse(_REKEY, error)
            return
        observe.SEALED.labels("renewed" if link.sealed else "new").inc()
        self.key_id, self.agreed_mono_ms = rekey.key_id, mono_ms
        link.send(encode(keys))
        link.set_keys(keys.key_id, *agreed.server(seals.frames))

    def _may_agree(self, key_id: int, mono_ms: int, *, live: bool) -> bool:
        """X25519 is dear: once before AUTH, and then not often."""
        if not self.link.sealed:
            return not live and not self.joining
        late_enough = mono_ms - self.agreed_mono_ms >= self.node.limits.rekey_least_ms
        return live and late_enough and key_id > self.key_id

    def _refuse(self, op: int, error: PeerError) -> None:
        """Before HELLO every refusal is the end: there is no session to go on with. So are keys that fail."""
        self.link.send(encode_error(op, error))
        self.link.close(_REFUSALS.get(error.code, CloseCode.AUTH), error.code)

    async def _login(self, auth: Auth, identity: Identity) -> None:
        try:
            self.session = await self.node.handshake.login(self.link, auth, identity)
        except PeerError as error:
            self._refuse(Op.AUTH, error)
        except Exception:
            self.link.close(CloseCode.INTERNAL)
            raise

    def on_closed(self, code: int, orderly: bool) -> None:
        session = self.session
        if session is not None and session.link is self.link:
            self.node.handshake.closed(session, orderly=orderly)


_REFUSALS: Mapping[str, int] = {
    "bad_ack": CloseCode.BAD_FRAME,
    "bad_frame": CloseCode.BAD_FRAME,
    "bad_id": CloseCode.BAD_FRAME,
    "bad_seal": CloseCode.BAD_FRAME,
    "bad_version": CloseCode.BAD_FRAME,
    "seal_required": CloseCode.BAD_FRAME,
    "unsupported": CloseCode.BAD_FRAME,
    "too_many_devices": CloseCode.KICKED,
}


class Node:
    """The access node of one process. See the module; the parts are public for tests.

    adoptable  the bus outlives this process: a dispatcher adopts the inbox when it dies
    on_fenced  called once, on the loop, when that happened while it lives: stop() this Node and start one
               with a new boot, on the same hub if the process goes on. None: it is fatal
    """

    def __init__(
        self,
        name: str,
        boot: int,
        *,
        store: MessageStore,
        bus: Bus,
        presence: PresenceStore,
        hub: Hub,
        acks: AckTable,
        wheel: Wheel,
        verify: Callable[[str], Identity],
        clock: Clock,
        rng: random.Random,
        limits: NodeLimits | None = None,
        kinds: Mapping[int, KindRule] = DEFAULT_KINDS,
        seals: SealKeys | None = None,
        adoptable: bool = False,
        on_fatal: Callable[[BaseException], None],
        on_fenced: Callable[[Fenced], None] | None = None,
    ) -> None:
        self.name = name
        self.seals = seals
        """None: REKEY is not supported."""
        self.mono_ms = clock.mono_ms
        self.boot = boot
        self.limits = limits = limits or NodeLimits()
        self.inbox = inbox_topic(name, boot)
        self._bus = bus
        self._presence = presence
        self._hub = hub
        self._wheel = wheel
        self._clock = clock
        self._on_fatal = on_fatal
        self._on_fenced = on_fenced or on_fatal
        self._fence = fence = Fence(store, name, boot, adoptable=adoptable)
        self.pool = pool = ConnPool()
        self.flusher = Flusher(name, store, bus, clock, rng, limits, self._on_gap)
        self.catchup = catchup = Catchup(store, clock, limits, kinds)
        self.handshake = handshake = Handshake(
            name, boot, store, bus, presence, fence, verify, pool, catchup, clock, rng, limits, self.spawn
        )
        self.delivery = Delivery(
            pool, acks, self.flusher, catchup, clock, limits, handshake.lose, handshake.kick
        )
        self.commands = Commands(self.inbox, store, bus, verify, catchup, clock, limits, kinds, self.spawn)
        handshake.delivery = self.delivery
        catchup.window = self.delivery
        self._reader: Reader | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._short: set[asyncio.Task[None]] = set()
        self._failed = False
        self._draining = False
        self._fenced = False
        self._leased = False
        self._grace_until_mono_ms = 0
        self._swept_mono_ms = 0
        self._sweeps = 0

    # --------------------------------------------------------------------------------------------- life

    @property
    def ready(self) -> bool:
        return bool(self._tasks) and self._leased and not self._draining and not self._failed

    @property
    def sessions(self) -> int:
        """Connected, or waiting to be resumed."""
        return len(self.pool)

    @property
    def connections(self) -> int:
        return self.pool.connections

    async def start(self) -> None:
        """Inbox, lease, tasks; then links are taken. Raises Unavailable, and Fenced if that took too long."""
        await self._fence.begin()
        await self._bus.ensure(self.inbox)
        await self._presence.open_lease(self.name, self.boot, self.limits.lease_ms)
        try:
            await self._fence.clear_lease()
        except Fenced:
            # We stood still for seconds on the way here. Nobody was attached, so nobody sent here.
            await self._presence.end_lease(self.name, self.boot)
            await self._bus.delete(self.inbox)
            raise
        self._leased = True
        self._reader = self._bus.reader(self.inbox, NODE_GROUP, max_unsettled=self.limits.max_unsettled)
        self.flusher.reader = self._reader
        self._keep("inbox", self._read_inbox(self._reader))
        self._keep("flush", self.flusher.run())
        self._keep("sends", self.commands.run())
        for number in range(self.limits.catchup_workers):
            self._keep(f"catchup {number}", self.catchup.run())
        self._keep("lease", self._hold_lease())
        if self._fence.adoptable:
            self._keep("fence", self._watch_fence())
        self._keep("sweep", self._sweep())
        self._hub.on_acked = self.delivery.on_acked
        self._hub.on_fatal = self._fatal
        self._hub.accept = self.accept

    def accept(self, link: Link) -> _Connection:
        """A link that finished its upgrade."""
        if self._draining:
            link.close(CloseCode.DRAINING if self._fenced else CloseCode.RESTART, "going away")
        return _Connection(self, link)

    def go_away(self, window_ms: int, reason: str = "restart") -> None:
        """Ask every client to connect elsewhere, at a moment of its own within window_ms."""
        self._draining = True
        frame = encode(Goaway(window_ms, reason))
        for session in self.pool:
            if session.link is not None and not session.joining:
                session.link.send(frame)

    async def stop(self) -> None:
        """Flush what was acknowledged, due rows for what was not, give the rest back. Safe to call twice."""
        self._draining = True
        self._close_all()
        while self._short:
            await asyncio.wait(self._short, timeout=1.0)
            self.handshake.stopping = True
            for task in self._short:
                task.cancel()
        self._close_all()  # whoever was between AUTH and HELLO
        if self._reader is not None and not self._fenced:
            # Its loop ends; what is handed out stays ours to settle until the last flush.
            await self._drain_inbox(self._reader)
        tasks, self._tasks = self._tasks, []
        await self.flusher.stop(_STOP_FLUSH_MS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._reader is not None:
            await self._reader.close()
            self._reader = None
        self._leased = False
        try:
            await self._presence.end_lease(self.name, self.boot)
        except PresenceUnavailable:
            _log.warning("the lease could not be ended; it ends by itself")

    def _close_all(self) -> None:
        code = CloseCode.DRAINING if self._fenced else CloseCode.RESTART
        for session in self.pool:
            link = session.link
            if link is not None:
                self.handshake.closed(session, orderly=True)
                link.bind(-1)
                link.close(code, "going away")

    def _adopted(self, error: Fenced) -> None:
        """Somebody else answers for the inbox. What was acknowledged is still flushed: marks move forward."""
        if self._fenced:
            return
        _log.warning("%s", error)
        self._fenced = self._draining = True
        self._leased = False
        observe.EVICTIONS.labels("fenced").inc(self.pool.connections)
        self._close_all()
        self.spawn(self._let_go(), "let go")
        self._on_fenced(error)

    async def _let_go(self) -> None:
        if self._reader is not None:
            await self._reader.close()
        try:
            await self._presence.end_lease(self.name, self.boot)
        except PresenceUnavailable:
            _log.warning("the lease could not be ended; it ends by itself")

    async def _read_inbox(self, reader: Reader) -> None:
        try:
            await self.delivery.run(reader)
        except BusUnavailable as error:
            if error.temporary:
                raise
        if not self._draining:
            # Nobody but an adopter deletes an inbox.
            self._adopted(Fenced(f"{self.inbox} is gone; its node takes a new boot"))

    async def _drain_inbox(self, reader: Reader) -> None:
        """What has come until now meets no connection any more: due rows, and the mark may pass it."""
        deadline_ms = self._clock.mono_ms() + self.limits.stall_ms
        while self._clock.mono_ms() < deadline_ms:
            try:
                if not await self._bus.lag(self.inbox, NODE_GROUP):
                    return
            except BusUnavailable:
                return  # whoever adopts the inbox takes up what is in it
            await asyncio.sleep(0.01)

    def revoke(self, token_id: str) -> None:
        """Close the sockets of a token that was revoked."""
        self.handshake.revoke(token_id)

    # -------------------------------------------------------------------------------------------- tasks

    def _keep(self, name: str, work: Coroutine[None, None, None]) -> None:
        self._tasks.append(asyncio.create_task(self._guard(work), name=f"node.{name}"))

    async def _guard(self, work: Coroutine[None, None, None]) -> None:
        """A task of the node ends only with the node."""
        try:
            await work
            if not self._draining:
                raise InternalError("a task of the node ended by itself")
        except Exception as error:
            self._fatal(error)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """A task that ends by itself."""
        task = asyncio.create_task(self._guard_short(work), name=f"node.{name}")
        self._short.add(task)
        task.add_done_callback(self._short.discard)

    async def _guard_short(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._fatal(error)

    def _fatal(self, error: BaseException) -> None:
        if not self._failed:
            self._failed = True
            self._on_fatal(error)

    # ------------------------------------------------------------------------------------------- timers

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.limits.sweep_ms / 1000)
            self.sweep(self._clock.mono_ms())

    def sweep(self, mono_ms: int) -> None:
        """Everything that is late, every 250 ms. A process that stood still gives its clients time first."""
        limits = self.limits
        stood_still = self._sweeps and mono_ms - self._swept_mono_ms - limits.sweep_ms > limits.stall_ms
        self._swept_mono_ms = mono_ms
        self._sweeps += 1
        if stood_still:
            # What arrived meanwhile is still in the sockets; its acks must be read before they are late.
            self._grace_until_mono_ms = mono_ms + limits.stall_ms
        self._hub.sweep(mono_ms)
        for slot in self._wheel.sweep(mono_ms, limits.idle_ms, max(1, self._wheel.count)):
            link = self._hub.link_at(slot)
            if link is not None:
                observe.EVICTIONS.labels("idle").inc()
                link.close(CloseCode.IDLE, f"no frame for {limits.idle_ms:,} ms")
        if mono_ms >= self._grace_until_mono_ms:
            self.delivery.sweep(mono_ms)
        self.catchup.sweep()
        self.handshake.sweep(mono_ms)
        if self._sweeps % _TOKEN_SWEEPS == 0:
            self.handshake.sweep_tokens()

    async def _hold_lease(self) -> None:
        while not self._fenced:
            await asyncio.sleep(self.limits.renew_ms / 1000)
            await self.renew_lease()

    async def renew_lease(self) -> None:
        """Every 2 s. A lease that is missing is registered again, and every session synced; sockets stay.

        Only a fence ends them.
        """
        lease_ms = self.limits.lease_ms
        try:
            if self._leased and await self._presence.renew(self.name, self.boot, lease_ms):
                return
            self._leased = False
            self._fence.lost_lease()
            await self._fence.ask()
            _log.warning("the presence lease is missing; registering again")
            await self._presence.open_lease(self.name, self.boot, lease_ms)
            await self._fence.clear_lease()
            for session in self.pool:
                await self._register_again(session)
            self._leased = True
        except Fenced as error:
            self._adopted(error)
        except Unavailable as error:
            _log.warning("%s did not answer: %s", error.backend, error.detail)

    def look_again(self) -> None:
        """Records of the inbox were lost before they were read: every session catches up from the store."""
        _log.warning("records of the inbox were lost; every session is synced")
        for session in self.pool:
            if session.link is not None and not session.joining:
                self.catchup.sync(session, session.level_version)

    async def _watch_fence(self) -> None:
        """Beside the lease, so that a store that is slow to answer does not end it."""
        while not self._fenced:
            await asyncio.sleep(self.limits.renew_ms / 1000)
            await self.ask_fence()

    async def ask_fence(self) -> None:
        """Every 2 s, also while the lease lives."""
        try:
            await self._fence.ask()
        except Fenced as error:
            self._adopted(error)
        except StoreUnavailable as error:
            _log.warning("the store did not answer: %s", error.detail)

    async def _register_again(self, session: Session) -> None:
        """Also between AUTH and HELLO: it may have been registered under the lease that is gone."""
        link = session.link
        if link is None:
            return
        try:
            await self.handshake.register(session)
        except Unavailable:
            if session.link is link:
                raise
            return  # it ended meanwhile, and holds nobody up
        if not session.joining:
            self.catchup.sync(session, session.level_version)

    def _on_gap(self, user: str, device: str, behind: Behind) -> None:
        self.delivery.on_gap(user, device, behind.conv, behind.head)

    def flows(self) -> dict[str, int]:
        """Counters of this node; they only grow."""
        flusher, delivery, catchup, commands = self.flusher, self.delivery, self.catchup, self.commands
        return {
            "acked": flusher.acked,
            "expired": flusher.expired,
            "due_requests": flusher.due_requests,
            "flushes": flusher.flushes,
            "store_failures": flusher.store_failures + catchup.store_failures,
            "bus_failures": flusher.bus_failures + commands.bus_failures,
            "delivered": delivery.delivered,
            "streamed": catchup.streamed,
            "skipped": catchup.skipped,
            "syncs": catchup.syncs,
            "moved": delivery.moved,
            "malformed": delivery.malformed,
            "probes": delivery.probes,
            "late": delivery.late,
            "submitted": commands.submitted,
        }
