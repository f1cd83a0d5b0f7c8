"""Have a connection: when to dial, what an end means, when to come back, and when not.

 WAITING ──wait over──▶ DIALLING ──AUTH written──▶ OPEN ──ended──▶ judged ─┬─▶ WAITING (jitter)
    ▲                      └──failed───────────────────────────────────────┤
    └────────────── again() ────────────────────────────────── STOPPED ◀───┘ final: refused, kicked, replaced

L3  a refused, kicked or replaced client does not come back by itself      tests/unit/test_client_life.py
L5  a token is renewed before it ends                                      same
Source: docs/protocol.md, "Closing and reconnecting".
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from fastim import protocol as p
from fastim.client.connection import Backoff, Connection
from fastim.client.events import Disconnected
from fastim.client.wire import DialError
from fastim.clock import Clock
from fastim.errors import UsageError
from fastim.protocol import CloseCode, reconnects

TokenSource = str | Callable[[], str | Awaitable[str]]

MAX_REFUSALS: Final = 2
"""Fresh tokens that are tried after a refusal."""
MAX_LATE_AUTHS: Final = 3
"""4501 without an ERROR: our AUTH did not arrive in time."""
REFRESH_AT: Final = 0.8
"""Of a token's life."""
REFRESH_LEAST_S: Final = 1.0


class Ending(msgspec.Struct, frozen=True):
    """How a connection ended, as the worker saw it."""

    code: int
    reason: str
    fault: str
    """Why we ended it: the server broke a rule, or the store is another user's."""
    refusal: p.Error | None
    kicked: p.Kicked | None
    was_live: bool
    final: bool = False
    """We must not come back, whatever the code says."""


class Life:
    """connect: dial and write AUTH; raises DialError, or any OSError. say: tells the app."""

    def __init__(
        self,
        token: TokenSource,
        clock: Clock,
        rng: random.Random,
        connect: Callable[[str], Awaitable[tuple[Connection, asyncio.Future[Ending]]]],
        say: Callable[[Disconnected], None],
    ) -> None:
        if not callable(token) and not isinstance(token, str):
            raise UsageError(f"token is a {type(token).__name__}; must be a str or a function")
        self._source: TokenSource = token
        self._clock = clock
        self._rng = rng
        self._connect = connect
        self._say = say
        self._backoff = Backoff(rng)
        self._leaving = False
        self._nudged = asyncio.Event()
        """again() was called."""
        self._live_since_mono_ms = 0
        self._heartbeat_ms = 0
        self._refusals = 0
        self._late_auths = 0
        self._going = False
        """The server asked us to leave: come back at once."""
        self._refresh_mono_ms = 0
        self._clock_changed = asyncio.Event()
        """A moment to refresh at is known."""

    # -- from the client

    def leave(self) -> None:
        """No more connections."""
        self._leaving = True

    def again(self, token: TokenSource | None) -> None:
        """Connect now, if there is no connection."""
        if token is not None:
            self._source = token
        self._refusals = self._late_auths = 0
        self._backoff.failures = 0
        self._nudged.set()

    def live(self, heartbeat_ms: int) -> None:
        """HELLO has come."""
        self._live_since_mono_ms = self._clock.mono_ms()
        self._heartbeat_ms = heartbeat_ms
        self._refusals = self._late_auths = 0

    def go_away(self, connection: Connection, window_ms: int) -> None:
        """Leave at a random moment of the window."""
        self._going = True
        delay_s = self._rng.uniform(0, window_ms) / 1000
        asyncio.get_running_loop().call_later(delay_s, connection.close, "the server goes away")

    def token_ends(self, left_ms: int) -> None:
        """The token of now holds for so long."""
        wait_ms = max(left_ms * REFRESH_AT, REFRESH_LEAST_S * 1000)
        self._refresh_mono_ms = self._clock.mono_ms() + int(wait_ms)
        self._clock_changed.set()

    # -- the task

    async def run(self) -> None:
        """Until the client leaves."""
        while not self._leaving:
            self._nudged.clear()
            disconnected = await self._once()
            self._say(disconnected)
            if disconnected.final:
                await self._nudged.wait()
            elif disconnected.retry_in_s:
                try:
                    async with asyncio.timeout(disconnected.retry_in_s):
                        await self._nudged.wait()
                except TimeoutError:
                    pass

    async def _once(self) -> Disconnected:
        """One connection, from the token to its end."""
        self._live_since_mono_ms = 0
        self._going = False
        self._refresh_mono_ms = 0
        try:
            token = await self._token()
        except Exception as error:
            return Disconnected(0, f"no token: {error}", False, self._backoff.next_s())
        try:
            connection, settled = await self._connect(token)
        except OSError as error:
            after_s = error.retry_after_s if isinstance(error, DialError) else 0.0
            return Disconnected(0, str(error), False, self._backoff.next_s(after_s))
        if callable(self._source) and (ends_ms := token_ends_ms(token)):
            self.token_ends(ends_ms - self._clock.wall_ms())
        while not settled.done():
            await self._watch(connection, settled)
        await connection.gone()
        if self._live_since_mono_ms:
            lived_ms = self._clock.mono_ms() - self._live_since_mono_ms
            self._backoff.lived(lived_ms, self._heartbeat_ms)
        return self._judge(settled.result())

    async def _token(self) -> str:
        if isinstance(self._source, str):
            return self._source
        token = self._source()
        return await token if inspect.isawaitable(token) else token

    async def _watch(self, connection: Connection, settled: asyncio.Future[Ending]) -> None:
        """Until the end, or until the token is to be renewed."""
        self._clock_changed.clear()
        changed = asyncio.create_task(self._clock_changed.wait(), name="fastim.client.life.watch")
        events: set[asyncio.Future[Any]] = {settled, changed}
        wait_s = None
        if self._refresh_mono_ms:
            wait_s = max(0, self._refresh_mono_ms - self._clock.mono_ms()) / 1000
        try:
            await asyncio.wait(events, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            await asyncio.gather(changed, return_exceptions=True)
        due = self._refresh_mono_ms and self._clock.mono_ms() >= self._refresh_mono_ms
        if not settled.done() and due and callable(self._source):
            self._refresh_mono_ms = 0
            try:
                token = await self._token()
            except Exception:
                self.token_ends(0)  # again soon; the connection holds as long as the old token
            else:
                connection.send([p.Refresh(token)])

    def _judge(self, ending: Ending) -> Disconnected:
        """Whether to come back, and when."""
        code, reason = ending.code, ending.fault or ending.reason
        refusal = ending.refusal
        if ending.final:
            return Disconnected(code, reason, True)
        if refusal is not None:
            words = f"{refusal.code}: {refusal.detail}"
            if refusal.retryable:
                return Disconnected(
                    code, words, False, self._backoff.next_s(refusal.retry_after_ms / 1000), refusal.code
                )
            if refusal.code == "unauthenticated" and self._another_token():
                return Disconnected(code, words, False, self._backoff.next_s(), refusal.code)
            return Disconnected(code, words, True, 0.0, refusal.code)
        if code == CloseCode.AUTH:
            if ending.was_live:
                comes_back = callable(self._source)
            else:
                self._late_auths += 1
                comes_back = self._late_auths < MAX_LATE_AUTHS
            if comes_back:
                return Disconnected(code, reason, False, self._backoff.next_s())
        if ending.kicked is not None:
            reason = ending.kicked.reason
        if not ending.fault and code and not reconnects(code):
            return Disconnected(code, reason, True)
        return Disconnected(code, reason, False, 0.0 if self._going else self._backoff.next_s())

    def _another_token(self) -> bool:
        self._refusals += 1
        return callable(self._source) and self._refusals < MAX_REFUSALS


def token_ends_ms(token: str) -> int:
    """When a JWT says that it ends, unix ms; 0 when it does not say. Nothing is verified here."""
    try:
        claims = token.split(".")[1]
        found = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        return int(found["exp"]) * 1000
    except (ValueError, LookupError, TypeError):
        return 0
