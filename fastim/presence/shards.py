"""Which server holds a key, and asking several at once.

Hides one server or a cluster: addresses from a URL, the slots of a cluster and how they move, scripts that a
server does not know, and that an answer may have to be fetched elsewhere. A call is one round trip per
server; it is asked again only where a server said that it did nothing (NOSCRIPT, MOVED, ASK, TRYAGAIN,
CLUSTERDOWN).

 redis://user:password@host:6379/0                one server; rediss:// with TLS
 redis+cluster://user:password@h1:6379,h2:6379    a cluster, by any of its servers; rediss+cluster:// with TLS
 ?prefix=im:  &ssl_ca_certs= &ssl_certfile= &ssl_keyfile= &ssl_check_hostname=

I1  a call ends by its deadline with every reply, or PresenceUnavailable and nothing else
                                                          tests/presence/test_redis_outages.py
I2  slots that move or fail over are followed             tests/presence/test_redis_cluster.py
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar, cast
from urllib.parse import parse_qs, unquote, urlsplit

from hiredis import pack_command
from redis.asyncio.connection import Connection, SSLConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)

from fastim.errors import PresenceUnavailable, UsageError
from fastim.presence.lane import Lane
from fastim.presence.scripts import Script

Address = tuple[str, int]

_SCHEMES: Final = ("redis", "rediss", "redis+cluster", "rediss+cluster")
_TLS_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_AGAIN_S: Final = 0.05
"""Between two tries while slots move or the cluster elects."""
_MOST_TAGS: Final = 200_000
"""Enough to meet every single slot with near certainty; a server has many, so a few are tried."""
pack: Final = cast("Callable[[tuple[bytes | str | int, ...]], bytes]", pack_command)
_ASKING: Final = pack((b"ASKING",))
_SLOTS: Final = pack((b"CLUSTER", b"SLOTS"))
_MEANWHILE: Final = (MovedError, TryAgainError, ClusterDownError, ReadOnlyError)
"""The server did nothing, because the slot is, or will be, somewhere else."""

T = TypeVar("T")


class Command:
    """Something to ask of the server that holds `key`."""

    __slots__ = ("arguments", "key", "script", "verb")

    def __init__(self, verb: bytes, key: bytes, *arguments: bytes | str | int) -> None:
        self.verb = verb
        self.key = key
        self.arguments = arguments
        self.script: Script | None = None

    @classmethod
    def of(cls, script: Script, key: bytes, *arguments: bytes | str | int) -> Command:
        command = cls(b"EVALSHA", key, *arguments)
        command.script = script
        return command

    def packed(self, whole: bool) -> bytes:
        """whole: with the script's text instead of its hash."""
        if self.script is None:
            words: tuple[bytes | str | int, ...] = (self.verb, self.key, *self.arguments)
        elif whole:
            words = (b"EVAL", self.script.text, 1, self.key, *self.arguments)
        else:
            words = (self.verb, self.script.hash, 1, self.key, *self.arguments)
        return pack(words)


class Target:
    """What a URL says. Raises UsageError for one that it cannot follow."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES:
            raise UsageError(f"the scheme of presence.url is {parts.scheme!r}; must be one of {_SCHEMES}")
        self.cluster = parts.scheme.endswith("+cluster")
        self.tls = parts.scheme.startswith("rediss")
        credentials, _, hosts = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        self.user, self.password = unquote(user) or None, unquote(password) or None
        self.seeds = [_address(host) for host in hosts.split(",")]
        if not self.cluster and len(self.seeds) > 1:
            raise UsageError(f"presence.url has {len(self.seeds)} servers; more than 1 is redis+cluster://")
        database = parts.path.strip("/") or "0"
        if not database.isdigit() or (self.cluster and database != "0"):
            raise UsageError(
                f"the database of presence.url is {database!r}; must be a number, 0 in a cluster"
            )
        self.database = int(database)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self.prefix = query.pop("prefix", "fastim:")
        self.tls_options: dict[str, Any] = {name: query.pop(name) for name in _TLS_FILES if name in query}
        if "ssl_check_hostname" in query:
            self.tls_options["ssl_check_hostname"] = query.pop("ssl_check_hostname") != "false"
        if query or (self.tls_options and not self.tls):
            raise UsageError(f"presence.url has unknown settings: {', '.join(query or self.tls_options)}")

    def connection(self, address: Address, deadline_s: float) -> Connection:
        """Not connected yet. RESP2: what the server pushes comes only where it was subscribed."""
        options: dict[str, Any] = {
            "host": address[0], "port": address[1], "db": self.database, "username": self.user,
            "password": self.password, "socket_timeout": None, "socket_connect_timeout": deadline_s,
            "protocol": 2, "client_name": "fastim-presence", "driver_info": None,
        }  # fmt: skip
        return SSLConnection(**options, **self.tls_options) if self.tls else Connection(**options)


def _address(text: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, "6379"
    if not host or not port.isdigit():
        raise UsageError(f"a server of presence.url is {text!r}; must be host:port")
    return host.strip("[]"), int(port)


class Shards:
    """All servers of one URL."""

    def __init__(self, target: Target, deadline_s: float) -> None:
        self.target = target
        self._deadline_s = deadline_s
        self._lanes: dict[Address, Lane] = {}
        self._slots: list[Address | None] = []
        """By slot; one entry for a single server; empty: not known yet."""
        self._tags: dict[int, Address] = {}
        self._version = 0
        """Of _slots and _tags."""
        self._doubtful = False
        self._learning = asyncio.Lock()
        self._closed = False
        if not target.cluster:
            self._learn([target.seeds[0]])

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The reply to each. Raises PresenceUnavailable: any may then have been carried out."""
        return await self._in_time(self._ask(commands))

    async def masters(self) -> dict[int, Address]:
        """Every server that holds keys, by the least n for which a key named with {n} is there.

        Raises PresenceUnavailable.
        """
        await self._known()
        return self._tags

    async def address_of(self, key: bytes) -> Address:
        """Raises PresenceUnavailable."""
        await self._known()
        return self._address_of(key)

    def doubt(self) -> None:
        """Something did not fit: look at the cluster's slots again before the next call."""
        self._doubtful = True

    def connection(self, address: Address) -> Connection:
        return self.target.connection(address, self._deadline_s)

    def flows(self) -> dict[str, int]:
        """Counters; they only grow."""
        names = ("round_trips", "commands", "abandoned")
        return {name: sum(getattr(lane, name) for lane in self._lanes.values()) for name in names}

    async def close(self) -> None:
        self._closed = True
        for lane in list(self._lanes.values()):
            await lane.close()

    # ------------------------------------------------------------------------------------------- asking

    async def _ask(self, commands: Sequence[Command]) -> list[Any]:
        replies: list[Any] = [None] * len(commands)
        whole: set[int] = set()
        asked_at: dict[int, Address] = {}
        left: Sequence[int] = range(len(commands))
        while left:
            await self._know()
            groups: dict[Address, list[int]] = {}
            for at in left:
                groups.setdefault(asked_at.get(at) or self._address_of(commands[at].key), []).append(at)
            futures = []
            for address, members in groups.items():
                pieces = [
                    (_ASKING if at in asked_at else b"") + commands[at].packed(at in whole) for at in members
                ]
                count = len(members) + sum(at in asked_at for at in members)
                futures.append(self._lane(address).ask(b"".join(pieces), count))
            await self._all(futures)
            again: list[int] = []
            pause = False
            for members, future in zip(groups.values(), futures, strict=True):
                answers = iter(future.result())
                for at in members:
                    if asked_at.pop(at, None) is not None:
                        next(answers)
                    answer = next(answers)
                    if isinstance(answer, RedisError):
                        again.append(at)
                        pause |= self._redirect(answer, at, whole, asked_at)
                    else:
                        replies[at] = answer
            if pause:
                await asyncio.sleep(_AGAIN_S)
            left = again
        return replies

    def _redirect(self, error: RedisError, at: int, whole: set[int], asked_at: dict[int, Address]) -> bool:
        """Make the next try reach its goal; True: not at once. Raises PresenceUnavailable if none can."""
        if isinstance(error, NoScriptError) and at not in whole:
            whole.add(at)
            return False
        if self.target.cluster and isinstance(error, AskError) and not isinstance(error, MovedError):
            asked_at[at] = error.node_addr
            return False
        if self.target.cluster and isinstance(error, _MEANWHILE):
            self._doubtful = True
            return True
        raise PresenceUnavailable(f"{type(error).__name__}: {error}")

    async def _all(self, futures: Sequence[asyncio.Future[list[Any]]]) -> None:
        """Wait for all, then raise what the first of them failed with."""
        try:
            if len(futures) == 1:
                await futures[0]
            else:
                await asyncio.wait(futures)
        except asyncio.CancelledError:
            for future in futures:
                future.cancel()
            raise
        except PresenceUnavailable:
            self._doubtful = True
            raise
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        if failures:
            self._doubtful = True
            raise failures[0]

    async def _in_time(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await work
        except TimeoutError:
            self._doubtful = True
            limit_ms = self._deadline_s * 1000
            raise PresenceUnavailable(f"no answer within {limit_ms:,.0f} ms") from None

    def _lane(self, address: Address) -> Lane:
        lane = self._lanes.get(address)
        if lane is None:
            if self._closed:
                raise PresenceUnavailable("closed")
            name = f"{address[0]}:{address[1]}"
            lane = self._lanes[address] = Lane(name, self.connection(address), self._deadline_s)
        return lane

    # ------------------------------------------------------------------------------------- which server

    async def _known(self) -> None:
        await self._in_time(self._know())

    async def _know(self) -> None:
        """Have slots that nothing speaks against. One look at a time; who waited for it takes its result."""
        if not self._doubtful and self._slots:
            return
        if not self.target.cluster:
            self._doubtful = False
            return
        version = self._version
        async with self._learning:
            if version == self._version:
                await self._look()

    async def _look(self) -> None:
        known = list(dict.fromkeys([*self._tags.values(), *self.target.seeds]))
        random.shuffle(known)
        why = ""
        for address in known:
            try:
                async with asyncio.timeout(self._deadline_s / 3):
                    (answer,) = await self._lane(address).ask(_SLOTS, 1)
            except (PresenceUnavailable, TimeoutError) as error:
                why = str(error)
                continue
            if not isinstance(answer, list) or not answer:
                why = f"{address[0]}:{address[1]} says of its slots: {answer}"
                continue
            slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
            for first, last, master, *_replicas in answer:
                host = master[0].decode() if master[0] else address[0]
                slots[first : last + 1] = [(host, int(master[1]))] * (last + 1 - first)
            self._learn(slots)
            return
        raise PresenceUnavailable(f"no server of the cluster tells its slots: {why}")

    def _learn(self, slots: list[Address | None]) -> None:
        untagged = set(slots) - {None}
        tags: dict[int, Address] = {}
        for n in range(_MOST_TAGS):
            address = slots[key_slot(b"{%d}" % n) % len(slots)]
            if address is not None and address in untagged:
                untagged.discard(address)
                tags[n] = address
                if not untagged:
                    break
        self._slots, self._tags, self._doubtful = slots, tags, False
        self._version += 1

    def _address_of(self, key: bytes) -> Address:
        slots = self._slots
        address = slots[0] if len(slots) == 1 else slots[key_slot(key)]
        if address is None:
            self._doubtful = True
            raise PresenceUnavailable(f"no server has the slot of {key.decode()}")
        return address
