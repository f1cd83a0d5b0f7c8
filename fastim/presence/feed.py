"""Hearing of changes from Redis, and knowing when something was not heard.

Hides subscriptions. The scripts publish on the channel that is named like the key they changed, in the key's
own shard; the feed subscribes to what is watched, on one connection per server. While a *session* lasts,
everything is subscribed and everything published comes in. What ends a session (a connection lost, an error,
a channel taken away because its slot moved, no sign of life) is a gap: the next one subscribes to all of it
again, and then says `resync`. What vanishes without a word (a lease that ran out, a server flushed or
restarted) is seen by comparing `state` once per poll, and is a gap too; so is a word on the alarm channel.

 nothing watched ──follow─▶ OPENING: connect and subscribe to all ─▶ LIVE ──trouble─▶ wait ─▶ OPENING

I1  watch() returns after its subscription stands, so nothing after it is missed    tests/contract/presence.py
I2  every gap is followed by resync       tests/presence/test_redis_outages.py, test_redis_cluster.py
Source: docs/adr/0091-watching.md
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from redis.asyncio.connection import Connection
from redis.exceptions import RedisError

from fastim.errors import PresenceUnavailable
from fastim.presence.changes import Interest, Subject
from fastim.presence.shards import Address, Shards, pack

_log: Final = logging.getLogger(__name__)
_PING: Final = pack((b"PING",))
_AGAIN_S: Final = 0.1
_AGAIN_MOST_S: Final = 1.0
_SILENT_POLLS: Final = 3


class _Trouble(Exception):
    """The session cannot go on."""


_TROUBLES: Final = (_Trouble, PresenceUnavailable, RedisError, OSError, RuntimeError)
"""RuntimeError is uvloop's word for a transport that was closed under us."""


class Feed:
    """The changes of everything that anybody in this process watches."""

    def __init__(
        self,
        shards: Shards,
        channel: Callable[[Subject], bytes],
        alarm: bytes,
        state: Callable[[], Awaitable[set[tuple[object, ...]]]],
        poll_s: float,
        deadline_s: float,
    ) -> None:
        """alarm: a channel on which a message means that anything may have changed.

        state: what, when any of it is gone later, means the same.
        """
        self.interest = Interest(self._unfollow)
        self._shards = shards
        self._channel = channel
        self._state = state
        self._poll_s = poll_s
        self._deadline_s = deadline_s
        self._subjects: dict[bytes, Subject | None] = {alarm: None}
        """Of every channel that is to be heard."""
        self._heard: set[bytes] = set()
        """Channels that are subscribed."""
        self._asked: set[bytes] = set()
        """Channels whose subscription is to be confirmed."""
        self._wanted = asyncio.Event()
        """There may be channels that are neither."""
        self._taps: dict[Address, Connection] = {}
        """Of the session; empty between sessions."""
        self._left: list[bytes] = []
        """Channels to unsubscribe at the next poll."""
        self._turn = asyncio.Event()
        """Set, and replaced, when channels have been confirmed."""
        self._live = False
        """All was subscribed, and `state` is being compared."""
        self._gap = False
        self._why = ""
        self._work: asyncio.Task[None] | None = None
        self._closed = False

    async def follow(self, subjects: Iterable[Subject]) -> None:
        """From the return on the interest is told of every change. Raises PresenceUnavailable."""
        channels = {self._channel(subject): subject for subject in subjects}
        self._subjects.update(channels)
        if self._closed:
            raise PresenceUnavailable("closed")
        if self._work is None:
            self._work = asyncio.create_task(self._run(), name="presence.feed")
        try:
            async with asyncio.timeout(self._deadline_s):
                while not self._live or channels.keys() - self._heard:
                    self._wanted.set()
                    await self._turn.wait()
        except TimeoutError:
            limit_ms, why = self._deadline_s * 1000, self._why or "no answer"
            raise PresenceUnavailable(f"not subscribed within {limit_ms:,.0f} ms: {why}") from None

    def _unfollow(self, subject: Subject) -> None:
        channel = self._channel(subject)
        if self._subjects.pop(channel, None) is not None:
            self._heard.discard(channel)
            self._asked.discard(channel)
            self._left.append(channel)

    async def close(self) -> None:
        self._closed = True
        self.interest.close()
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work])
            self._work = None

    # ---------------------------------------------------------------------------------------- sessions

    async def _run(self) -> None:
        pause_s = _AGAIN_S
        while not self._closed:  # a task group that fails while it is cancelled forgets the cancellation
            try:
                await self._session()
            except* Exception as troubles:
                why = str(troubles.exceptions[0])
                unknown = troubles.split(_TROUBLES)[1]
                if why != self._why or unknown:
                    _log.warning("presence changes are not heard: %s", why, exc_info=unknown)
                pause_s = _AGAIN_S if self._live else min(2 * pause_s, _AGAIN_MOST_S)
                self._why = why
            finally:
                await self._end_session()
            self._gap = True
            self._shards.doubt()
            if not self._closed:
                await asyncio.sleep(pause_s)

    async def _session(self) -> None:
        """Runs until there is trouble."""
        servers = set((await self._shards.masters()).values())
        taps = {address: self._shards.connection(address) for address in servers}
        self._taps = {}
        try:
            async with asyncio.timeout(self._deadline_s):
                for tap in taps.values():
                    await tap.connect()  # type: ignore[no-untyped-call]
        except BaseException as error:
            for tap in taps.values():
                await tap.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise _Trouble(f"no connection within {self._deadline_s * 1000:,.0f} ms") from None
            raise
        self._taps = taps
        async with asyncio.TaskGroup() as group:
            for address, tap in taps.items():
                group.create_task(self._read(address, tap), name="presence.feed read")
            group.create_task(self._subscribe(), name="presence.feed subscribe")
            before = await self._settled()
            group.create_task(self._watch_state(before), name="presence.feed poll")

    async def _settled(self) -> set[tuple[object, ...]]:
        """Once all is subscribed: what is true then is what later states are compared with."""
        try:
            async with asyncio.timeout(self._deadline_s):
                while self._subjects.keys() - self._heard:
                    await self._turn.wait()
        except TimeoutError:
            raise _Trouble("not all subscriptions were confirmed in time") from None
        before = await self._state()
        self._why = ""
        self._live = True
        self._turned()
        if self._gap:
            self._gap = False
            self.interest.resync()
        return before

    async def _end_session(self) -> None:
        taps, self._taps = self._taps, {}
        self._live = False
        self._heard.clear()
        self._asked.clear()
        self._left.clear()
        for tap in taps.values():
            await tap.disconnect(nowait=True)

    def _turned(self) -> None:
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()

    # -------------------------------------------------------------------------------- inside a session

    async def _subscribe(self) -> None:
        """Ask for channels that are to be heard and are not yet."""
        while True:
            self._wanted.clear()
            by_server: dict[Address, list[bytes]] = {}
            for channel in self._subjects.keys() - self._heard - self._asked:
                by_server.setdefault(await self._shards.address_of(channel), []).append(channel)
            for address, channels in by_server.items():
                tap = self._taps.get(address)
                if tap is None:
                    raise _Trouble(f"{address[0]}:{address[1]} is new in the cluster")
                self._asked.update(channels)
                # One each: in a cluster the channels of one command would have to share a slot.
                await _send(tap, [pack((b"SSUBSCRIBE", channel)) for channel in channels])
            await self._wanted.wait()

    async def _read(self, address: Address, tap: Connection) -> None:
        silent_s = _SILENT_POLLS * self._poll_s + self._deadline_s
        while True:
            reply = await tap.read_response(disable_decoding=True, timeout=silent_s)
            if reply is None:
                raise _Trouble(f"{address[0]}:{address[1]} was silent for {silent_s:.1f} s")
            self._take(reply)

    def _take(self, reply: Any) -> None:
        if not isinstance(reply, list):
            return  # PONG where nothing is subscribed
        kind, channel = reply[0], reply[1]
        if kind == b"smessage":
            if channel not in self._subjects:
                return  # forgotten meanwhile
            subject = self._subjects[channel]
            if subject is None:
                self.interest.resync()
            else:
                self.interest.changed(*subject)
        elif kind == b"ssubscribe":
            self._asked.discard(channel)
            if channel in self._subjects:
                self._heard.add(channel)
            if not self._asked:
                self._turned()
        elif kind == b"sunsubscribe" and channel in self._heard:
            raise _Trouble(f"the slot of {channel.decode()} moved")

    async def _watch_state(self, before: set[tuple[object, ...]]) -> None:
        missed = False
        while True:
            await asyncio.sleep(self._poll_s)
            left, self._left = self._left, []
            by_server: dict[Address, list[bytes]] = {address: [_PING] for address in self._taps}
            for channel in left:
                if channel not in self._subjects:
                    address = await self._shards.address_of(channel)
                    by_server.setdefault(address, []).append(pack((b"SUNSUBSCRIBE", channel)))
            for address, packed in by_server.items():
                if address in self._taps:
                    await _send(self._taps[address], packed)
            try:
                now = await self._state()
            except PresenceUnavailable:
                missed = True  # not known is not gone, but may have come and gone
                continue
            if missed or before - now:
                self.interest.resync()
            before, missed = now, False


async def _send(tap: Connection, packed: list[bytes]) -> None:
    await tap.send_packed_command(packed, check_health=False)
