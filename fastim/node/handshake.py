"""From AUTH to a session, and from a lost connection to the session's end.

 AUTH ─verify─▶ ┬─ session known here, same device, within resume_ttl ──▶ HOT: ack up to tag, replay the rest
                └─ otherwise ──▶ new session, attach ──▶ NEW (nothing asked for) | COLD
 either ─▶ attach in presence ─▶ HELLO ─▶ replay ─▶ sync (one follows every registration of presence)
 closed ─▶ detach in presence, parcels into due rows, wait resume_ttl ─▶ ended

The session is in the pool before presence knows of it, so that a message that is routed here finds it; it is
`syncing` then, so nothing is written live before the pages of its sync are read (race B of the design).

H1  the same device id replaces silently, the older connection closes (4507)  tests/system/test_handshake.py
H2  a resume is hot, cold or new; nothing is missing or shown twice after it   same
H3  a detach that presence did not take is tried again until it is             same
Source: semantics, "Heartbeat, resume, sync", "Devices and kick".
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastim import observe
from fastim.auth import Action, Identity, authorise
from fastim.bus.base import Bus, Outgoing, inbox_topic
from fastim.bus.records import Kick
from fastim.clock import Clock
from fastim.errors import BusUnavailable, PeerError, PresenceUnavailable, StoreUnavailable, Unavailable
from fastim.model import DeviceClass, check_id
from fastim.node.catchup import Catchup
from fastim.node.delivery import Delivery
from fastim.node.fence import Fence
from fastim.node.limits import NodeLimits
from fastim.node.link import Link
from fastim.node.pool import ConnPool
from fastim.node.session import Session
from fastim.presence.base import Attachment, PresenceStore
from fastim.protocol import (
    MAX_PACKET_BYTES,
    MAX_SEALED_BYTES,
    VERSION,
    Auth,
    CloseCode,
    Hello,
    Kicked,
    encode,
)
from fastim.store.base import MessageStore

RESUMED_NEW: Final = 0
RESUMED_HOT: Final = 1
RESUMED_COLD: Final = 2

Spawn = Callable[[Coroutine[Any, Any, None], str], None]


class Handshake:
    """Births and ends of sessions."""

    def __init__(
        self,
        name: str,
        boot: int,
        store: MessageStore,
        bus: Bus,
        presence: PresenceStore,
        fence: Fence,
        verify: Callable[[str], Identity],
        pool: ConnPool,
        catchup: Catchup,
        clock: Clock,
        rng: random.Random,
        limits: NodeLimits,
        spawn: Spawn,
    ) -> None:
        self._name = name
        self._boot = boot
        self._store = store
        self._bus = bus
        self._presence = presence
        self._fence = fence
        self._verify = verify
        self._pool = pool
        self._catchup = catchup
        self._clock = clock
        self._rng = rng
        self._limits = limits
        self._spawn = spawn
        self.delivery: Delivery = None  # type: ignore[assignment]  # the two know each other
        self._entering: dict[Link, str] = {}
        """Logins under way -> the id of their token: they are in no pool yet."""
        self.stopping = False

    # ------------------------------------------------------------------------------------------- birth

    def check(self, auth: Auth) -> Identity:
        """Who it is. Raises PeerError: unauthenticated, bad_id, bad_version, forbidden."""
        identity = self._verify(auth.token)
        authorise(identity, Action.CONNECT)
        if not auth.version_min <= VERSION <= auth.version_max:
            raise PeerError(
                "bad_version",
                f"versions {auth.version_min}-{auth.version_max} offered; this node has {VERSION}",
            )
        device = check_id("device", auth.device)
        if identity.device and identity.device != device:
            raise PeerError("unauthenticated", "the token is not valid")
        if auth.device_class not in DeviceClass.__members__.values():
            known = " ".join(DeviceClass)
            raise PeerError("bad_id", f"device_class is {auth.device_class!r}; must be one of {known}")
        return identity

    async def login(self, link: Link, auth: Auth, identity: Identity) -> Session | None:
        """See AUTH through. None when the link was closed on the way, by us with a reason or by the peer."""
        self._entering[link] = identity.token_id
        try:
            async with asyncio.timeout(self._limits.login_ms / 1000):
                session, resumed = await self._enter(link, auth, identity)
        except (Unavailable, TimeoutError) as error:
            # The client's turn: it comes back with jitter. A node that cannot register may not serve.
            observe.SESSIONS_OPENED.labels("unavailable").inc()
            away = error.backend if isinstance(error, Unavailable) else "a backend"
            link.close(CloseCode.TRY_LATER, f"{away} is away")
            return None
        finally:
            del self._entering[link]
        if link.closed:
            self.closed(session, orderly=False)
            return None
        observe.SESSIONS_OPENED.labels(("new", "hot", "cold")[resumed]).inc()
        link.bind(session.ack_slot)
        link.set_pong(session.level_version)
        self._hello(session, link, resumed)
        if resumed == RESUMED_HOT:
            self.delivery.replay(session)
        session.joining = False
        self._catchup.wake(session)
        return session

    async def _enter(self, link: Link, auth: Auth, identity: Identity) -> tuple[Session, int]:
        """A session with this link, attached in presence."""
        user, device = identity.user, auth.device
        since = auth.user_cursor
        hot = self._known(auth, user) is not None
        if not hot:
            now_ms = self._clock.wall_ms()
            known_device = await self._store.register_device(user, device, auth.device_class, now_ms)
            # The device may have stored a LEVEL whose ack died with its node, and so did the acks before it:
            # what they were for is not above the version of that LEVEL, but it is above the cursors.
            since = min(since, known_device.level)
        await self._check_devices(user, device)
        if link.closed:
            raise PresenceUnavailable("the connection ended before its session began")
        known = self._known(auth, user)
        if hot and known is None:
            raise PresenceUnavailable("the session ended while it was resumed")
        older = self._pool.of_device(user, device)
        if older is not None:
            self._supersede(older)
        if known is not None:
            session = known
        else:
            if older is not None:
                self._end(older)
            self._make_room(user)
            session = Session(f"{self._rng.getrandbits(128):032x}", identity, device, auth.device_class)
            self._pool.add(session)
        session.believe(identity)
        session.level_version = max(session.level_version, since)
        session.joining = True
        # Nothing is written live until the sync that follows has been paged.
        self._catchup.sync(session, since)
        try:
            self.delivery.attach(session, link, auth.tag if hot else 0)
        except PeerError:
            self._end(session)
            raise
        self._pool.attached(session)
        try:
            await self.register(session)
            try:
                session.badge = (await self._store.unread(user))[0]
                session.head_version = await self._store.version(user)
            except StoreUnavailable:
                # A hot resume needs no store: what HELLO tells of it is then as old as the last one.
                if not hot:
                    raise
        except BaseException:
            # Whatever it was, this link will not be served.
            if session.link is link and hot:
                self.closed(session, orderly=False)
            elif session.link is link:
                self._end(session)
            raise
        if session.link is not link:
            raise PresenceUnavailable("a newer connection of this device was faster")
        return session, RESUMED_HOT if hot else RESUMED_COLD if auth.session else RESUMED_NEW

    def _known(self, auth: Auth, user: str) -> Session | None:
        """The session that AUTH resumes hot."""
        known = self._pool.find(auth.session) if auth.session else None
        return known if known is not None and (known.user, known.device) == (user, auth.device) else None

    def _make_room(self, user: str) -> None:
        """A user who comes with ever new devices leaves no more sessions behind than he may have devices."""
        waiting = [session for session in self._pool.of_user(user).values() if session.link is None]
        if len(waiting) >= self._limits.devices_per_user:
            self._end(min(waiting, key=lambda session: session.detached_mono_ms))

    async def _check_devices(self, user: str, device: str) -> None:
        limit = self._limits.devices_per_user
        located = (await self._presence.locate([user])).get(user)
        others = [a for a in located.attachments if a.device != device] if located is not None else []
        if len(others) >= limit:
            raise PeerError(
                "too_many_devices",
                f"{len(others)} other devices are connected; limit {limit} (node.devices_per_user)",
            )

    async def register(self, session: Session) -> None:
        """Attach in presence; what that replaced elsewhere is told to close. Raises PresenceUnavailable."""
        self._fence.require_clear()
        attachment, replaced = await self._presence.attach(
            session.user, session.device, session.device_class, self._name, self._boot, session.id
        )
        if session.link is None:
            # Nobody would ever take this attachment back.
            self._spawn(self._take_back(session, attachment.generation), f"detach {session.id[:8]}")
            raise PresenceUnavailable("the connection ended while it was registered")
        # Two connections of one session, answered in the wrong order: the newer attachment stands.
        session.generation = max(session.generation, attachment.generation)
        records = [
            self._kick_record(old, attachment)
            for old in replaced
            if old.session != session.id and (old.node, old.boot) != (self._name, self._boot)
        ]
        if records:
            # One that is not told is fenced by its generation all the same.
            with contextlib.suppress(BusUnavailable):
                await self._bus.publish(records)

    async def _take_back(self, session: Session, generation: int) -> None:
        """Detach, unless a newer connection of the device is here: ours may have replaced its attachment."""
        tried = 0
        while not self.stopping:
            newer = self._pool.of_device(session.user, session.device)
            if newer is None or newer.link is None:
                await self._detach(session, generation, 0)
                return
            try:
                await self.register(newer)
            except PresenceUnavailable:
                tried = await self._back_off(tried)
                continue
            if not newer.joining:
                self._catchup.sync(newer, newer.level_version)
            return

    def _kick_record(self, old: Attachment, new: Attachment) -> Outgoing:
        kick = Kick(old.user, old.device, old.session, new.generation, CloseCode.REPLACED, "replaced")
        return Outgoing(inbox_topic(old.node, old.boot), old.user, kick)

    def _hello(self, session: Session, link: Link, resumed: int) -> None:
        limits = self._limits
        link.send(
            encode(
                Hello(
                    VERSION, session.id, session.user, session.device, self._clock.wall_ms(), resumed,
                    limits.heartbeat_ms, limits.idle_ms, limits.resume_ttl_ms, limits.window_messages,
                    limits.window_bytes, MAX_SEALED_BYTES if link.sealed else MAX_PACKET_BYTES,
                    session.badge, session.head_version,
                )
            )
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------- end

    def _supersede(self, session: Session) -> None:
        """A newer connection of the same device takes over; the older one is closed silently."""
        link = session.link
        if link is not None:
            observe.KICKS.labels("replaced").inc()
            link.send(encode(Kicked("replaced", session.device)))
            self._unlink(session, self._clock.wall_ms() + self._limits.reset_due_ms, "replaced", urgent=False)
            link.bind(-1)
            link.close(CloseCode.REPLACED, "replaced by a newer connection of this device")

    def closed(self, session: Session, *, orderly: bool) -> None:
        """The connection ended. A goodbye gives the user grace before vendor push."""
        if session.link is None:
            return
        grace_ms = self._limits.grace_ms if orderly else self._limits.reset_due_ms
        until_ms = self._clock.wall_ms() + grace_ms
        self._unlink(session, until_ms, "closed", urgent=False)
        self._leave(session, until_ms if orderly else 0)

    def lose(self, session: Session, code: int, reason: str) -> None:
        """Half-open or too slow: close, move what is under way to dispatch at once, no grace."""
        link = session.link
        if link is None:
            return
        generation, session.generation = session.generation, 0
        self._unlink(session, self._clock.wall_ms(), reason, urgent=True)
        link.bind(-1)
        link.close(code, reason)
        if generation:
            self._spawn(self._detach(session, generation, 0), f"detach {session.id[:8]}")

    def kick(self, session: Session, code: int, reason: str) -> None:
        """Policy ends the session: a resume is not possible."""
        link = session.link
        if link is not None:
            observe.KICKS.labels(reason).inc()
            link.send(encode(Kicked(reason)))
            self._unlink(session, self._clock.wall_ms() + self._limits.reset_due_ms, reason, urgent=False)
            link.bind(-1)
            link.close(code, reason)
        self._leave(session, 0)
        self._end(session)

    def _unlink(self, session: Session, due_at_ms: int, reason: str, *, urgent: bool) -> None:
        self.delivery.detach(session, due_at_ms, reason, urgent=urgent)
        self._pool.detached(session, self._clock.mono_ms())

    def _leave(self, session: Session, grace_until_ms: int) -> None:
        generation, session.generation = session.generation, 0
        if generation:
            self._spawn(self._detach(session, generation, grace_until_ms), f"detach {session.id[:8]}")

    async def _detach(self, session: Session, generation: int, grace_until_ms: int) -> None:
        tried = 0
        while not self.stopping:
            try:
                await self._presence.detach(session.user, session.device, generation, grace_until_ms)
                return
            except PresenceUnavailable:
                tried = await self._back_off(tried)

    async def _back_off(self, tried: int) -> int:
        longest = min(self._limits.retry_first_ms << min(tried, 20), self._limits.retry_most_ms)
        await asyncio.sleep(longest * (0.5 + self._rng.random() / 2) / 1000)
        return tried + 1

    def _end(self, session: Session) -> None:
        """Nothing can be resumed any more."""
        if session.link is not None:
            self._unlink(session, self._clock.wall_ms() + self._limits.reset_due_ms, "ended", urgent=False)
        self._leave(session, 0)
        session.ended = True
        session.ring.clear()
        session.behind.clear()
        session.sync = None
        self._pool.remove(session)

    def sweep(self, mono_ms: int) -> None:
        """End what nobody has resumed in time, and connections whose token has ended."""
        for session in self._pool.expired(mono_ms - self._limits.resume_ttl_ms):
            self._end(session)

    def sweep_tokens(self) -> None:
        """O(sessions); call every few seconds."""
        now_ms = self._clock.wall_ms()
        for session in self._pool:
            if session.identity.expires_ms <= now_ms and session.link is not None:
                self.kick(session, CloseCode.AUTH, "token_expired")

    def revoke(self, token_id: str) -> None:
        """Close the sockets of one token (4505)."""
        for link, entering in list(self._entering.items()):
            if entering == token_id:
                link.close(CloseCode.REVOKED, "revoked")
        for session in self._pool:
            if session.identity.token_id == token_id:
                self.kick(session, CloseCode.REVOKED, "revoked")
