"""The one who changes things: in turns, takes what came and what the app wants, stores it, then speaks.

A turn: frames, sends and wishes into the device ─▶ one commit ─▶ acks, SENDs, PULLs out, events to the feed.
Nothing else changes the device, so what a commit holds is what was applied. When the store fails, the device
is thrown away with the connection, and everything begins again from what the store holds.

 IDLE ──wake──▶ TURN ──▶ IDLE          TURN ──StoreUnavailable──▶ RECOVER (store open again) ──▶ IDLE

L4  a local store that fails costs the connection, never a message    tests/unit/test_client_worker.py
L6  an app that does not take its events costs bounded memory         same
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Final

from fastim import protocol as p
from fastim.client.connection import Connection
from fastim.client.device import Device
from fastim.client.events import StateChanged
from fastim.client.feed import Feed
from fastim.client.life import Ending, Life
from fastim.client.localstore import LocalStore
from fastim.client.outbox import Unsent
from fastim.clock import Clock
from fastim.errors import PeerError, StoreUnavailable, Unavailable

_log = logging.getLogger("fastim.client")

FRAMES_PER_TURN: Final = 256
CLOGGED_LOOK_MS: Final = 250

_Wish = tuple[Callable[[], object], asyncio.Future[None]]
_Want = tuple[Unsent, asyncio.Future[None]]


class Worker:
    """Owns the device, its store and its feed. `on_state` hears what became of own messages."""

    def __init__(
        self,
        store: LocalStore,
        device_id: str,
        clock: Clock,
        rng: random.Random,
        life: Life,
        on_state: Callable[[StateChanged], None],
    ) -> None:
        self._store = store
        self._device_id = device_id
        self._clock = clock
        self._rng = rng
        self._life = life
        self._on_state = on_state
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._wanted: list[_Want] = []
        self._wishes: list[_Wish] = []
        self._requests: dict[int, asyncio.Future[p.HistoryPage]] = {}
        self._connection: Connection | None = None
        self._settled: asyncio.Future[Ending] | None = None
        self._sound = asyncio.Event()
        """The device is what the store holds."""
        self._stopping = False
        self._given_up: Exception | None = None
        self.became_live = asyncio.Event()
        self.became_level = asyncio.Event()
        self.device: Device
        self.feed: Feed

    async def open(self) -> None:
        """Read the store. Raises StoreUnavailable, UsageError."""
        snapshot = await self._store.open(self._device_id)
        self.device = Device(snapshot, self._clock, self._rng)
        self.feed = Feed(self._store, snapshot, lambda: self.device.server_now_ms())
        self.feed.on_progress = self._on_progress
        self._sound.set()

    # ------------------------------------------------------------------------------------------- for the app

    @property
    def wanted(self) -> list[Unsent]:
        """Messages that are on their way into the outbox."""
        return [unsent for unsent, _ in self._wanted]

    async def add(self, unsent: Unsent) -> None:
        """Put it into the outbox; returns when it is stored."""
        stored = self._promise()
        self._wanted.append((unsent, stored))
        self._wake.set()
        await stored

    def _promise(self) -> asyncio.Future[None]:
        if self._given_up is not None:
            raise self._given_up
        return asyncio.get_running_loop().create_future()

    async def wish(self, act: Callable[[], object]) -> None:
        """Let `act` change the device between two batches; returns when that is stored.

        Raises what `act` raises.
        """
        stored = self._promise()
        self._wishes.append((act, stored))
        self._wake.set()
        await stored

    async def ask_history(self, conv: str, before_seq: int, limit: int, timeout_s: float) -> p.HistoryPage:
        """One page from the server. Raises PeerError, Unavailable."""
        answer: asyncio.Future[p.HistoryPage] = asyncio.get_running_loop().create_future()
        req = 0

        def ask() -> None:
            nonlocal req
            req = self.device.ask_history(conv, before_seq, limit)
            self._requests[req] = answer

        await self.wish(ask)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise Unavailable("server", f"no answer within {timeout_s:g} s") from None
        finally:
            self._requests.pop(req, None)

    async def attach(self, connection: Connection, auth: Callable[[], p.Auth]) -> asyncio.Future[Ending]:
        """Serve this connection from now on; done when everything that came on it was taken."""
        await self._sound.wait()
        connection.send([auth()])
        self._connection = connection
        self._settled = asyncio.get_running_loop().create_future()
        self._wake.set()
        return self._settled

    def wake(self) -> None:
        """Something came."""
        self._wake.set()

    def _on_progress(self) -> None:
        if self.device.full:
            self._wake.set()

    # ------------------------------------------------------------------------------------------------- life

    def stop(self) -> None:
        """`run` ends after the turn of now."""
        self._stopping = True
        self._wake.set()

    def give_up(self, why: Exception) -> None:
        """Nobody gets an answer any more, now or later."""
        self._given_up = self._given_up or why
        futures: list[asyncio.Future[None] | asyncio.Future[p.HistoryPage]] = [
            *(future for _, future in self._wanted),
            *(future for _, future in self._wishes),
            *self._requests.values(),
        ]
        self._wanted.clear()
        self._wishes.clear()
        for future in futures:
            if not future.done():
                future.set_exception(why)
        if self._timer is not None:
            self._timer.cancel()

    async def run(self) -> None:
        """One turn after the other."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            wanted, wishes = self._wanted, self._wishes
            self._wanted, self._wishes = [], []
            try:
                await self._turn(wanted, wishes)
            except StoreUnavailable as error:
                self._answer(wanted, wishes, error)
                if not error.temporary:
                    raise
                await self._recover(error)
            except BaseException as error:
                self._answer(wanted, wishes, Unavailable("client", f"it stopped: {error!r}"))
                raise
            if self._stopping:
                return

    @staticmethod
    def _answer(wanted: list[_Want], wishes: list[_Wish], error: Exception | None) -> None:
        for _, future in (*wanted, *wishes):
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    # ------------------------------------------------------------------------------------------------- a turn

    async def _turn(self, wanted: list[_Want], wishes: list[_Wish]) -> None:
        device, connection = self.device, self._connection
        self._set_full(device)
        for unsent, _ in wanted:
            device.add(unsent)
        for act, future in wishes:
            try:
                act()
            except Exception as error:
                future.set_exception(error)
        ending = self._take(device, connection) if connection is not None else None
        await self._store_all(device)
        self._answer(wanted, wishes, None)
        if ending is not None:
            self._end_connection(ending)
        elif connection is not None:
            device.clogged = connection.clogged
            device.tick()
            connection.send(device.out)
            device.out.clear()
            if device.fault:
                connection.abort(device.fault)
        self._arm(device)

    def _set_full(self, device: Device) -> None:
        """Too much waits for the app, until half of it is taken."""
        most = self._store.max_waiting
        if most:
            waiting = self.feed.waiting
            device.set_full(waiting > most // 2 if device.full else waiting >= most)

    def _take(self, device: Device, connection: Connection) -> Ending | None:
        """The frames that have come. After the last ones of a connection: how it ended."""
        was_live = device.live
        for op, frame in connection.take(FRAMES_PER_TURN if not device.fault else 0):
            try:
                device.take(p.decode(op, frame))
            except PeerError as error:
                if error.code == "unsupported":
                    device.unknown()
                else:
                    device.fault = f"the server sent a bad frame: {error.detail}"
            if device.fault:
                break
        if device.live and not was_live:
            connection.live(device.heartbeat_ms)
            self._life.live(device.heartbeat_ms)
            self.became_live.set()
        if device.goaway is not None:
            self._life.go_away(connection, device.goaway.window_ms)
            device.goaway = None
        if device.token_ends_ms:
            self._life.token_ends(device.token_ends_ms - device.server_now_ms())
            device.token_ends_ms = 0
        if not (connection.ended or (connection.code and device.fault)):
            if connection.waiting and not device.fault:
                self._wake.set()
            return None
        ending = Ending(
            connection.code, connection.reason, device.fault, device.refusal, device.kicked, device.live,
            device.wrong_store,
        )  # fmt: skip
        if device.fault and not device.wrong_store:
            device.forget_session()
        device.lost()
        return ending

    async def _store_all(self, device: Device) -> None:
        """Commit, then let everybody know; again when a count had to be asked for."""
        while True:
            batch = device.drain()
            if batch:
                self.feed.committed(await self._store.commit(batch))
            device.committed(batch)
            if device.level:
                self.became_level.set()
            signals, device.signals = device.signals, []
            for signal in signals:
                if isinstance(signal, StateChanged):
                    self._on_state(signal)
            self.feed.publish(signals)
            answers, device.answers = device.answers, []
            for req, answer in answers:
                self._answer_request(req, answer)
            if not device.recounts:
                return
            recounts, device.recounts = device.recounts, set()
            for conv in recounts:
                above = device.rows[conv].read
                device.recounted(conv, await self._store.count(conv, above, device.user))

    def _answer_request(self, req: int, answer: p.HistoryPage | p.Error) -> None:
        future = self._requests.get(req)
        if future is None or future.done():
            return
        if isinstance(answer, p.HistoryPage):
            future.set_result(answer)
        else:
            wait_ms = answer.retry_after_ms
            error = PeerError(answer.code, answer.detail, retryable=answer.retryable, retry_after_ms=wait_ms)
            future.set_exception(error)

    def _end_connection(self, ending: Ending) -> None:
        self._connection = None
        settled, self._settled = self._settled, None
        if settled is not None and not settled.done():
            settled.set_result(ending)
        for future in self._requests.values():
            if not future.done():
                future.set_exception(Unavailable("server", "the connection was lost"))

    def _arm(self, device: Device) -> None:
        """Wake when something is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_ms = self._clock.mono_ms()
        due_ms = device.next_due_ms()
        if device.clogged:
            look_ms = now_ms + CLOGGED_LOOK_MS
            due_ms = look_ms if due_ms is None else min(due_ms, look_ms)
        if due_ms is not None:
            wait_s = max(0, due_ms - now_ms) / 1000
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._wake.set)

    # ---------------------------------------------------------------------------------------------- failures

    async def _recover(self, error: StoreUnavailable) -> None:
        """What is in memory and not in the store is void. Begin again from what the store holds."""
        _log.warning("the local store failed: %s", error)
        self._sound.clear()
        connection = self._connection
        self._end_connection(Ending(0, f"the local store failed: {error}", "", None, None, False))
        if connection is not None:
            connection.abort("the local store failed")
        self.device.live = False
        tries = 0
        while not self._stopping:
            tries += 1
            await asyncio.sleep(self._rng.uniform(0.1, min(5.0, 0.2 * 2 ** min(tries, 8))))
            self._answer(self._wanted, self._wishes, error)
            self._wanted, self._wishes = [], []
            try:
                snapshot = await self._store.open(self._device_id)
            except StoreUnavailable as again:
                if not again.temporary:
                    raise
                continue
            device = Device(snapshot, self._clock, self._rng)
            device.keep_time(self.device)
            self.device = device
            self.feed.reload(snapshot)
            self._sound.set()
            self._wake.set()
            return
