"""The public SDK as a person's phone: what it shows, hands over and learns goes into the log, line by line.

The log is the person; the SDK is the app. So a message is written down as submitted before the SDK has it,
and as shown when the SDK hands it over. An app that was killed may get one message again (`again`): it looks
into its log, as an app would look at what it has drawn. What it learnt of its own messages and could not
write down any more is read from the local store when it is opened again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

from bench.server import Server
from fastim.api.shapes import new_client_id
from fastim.client import (
    Client,
    Connected,
    Delivery,
    Disconnected,
    Event,
    Gone,
    Message,
    SqliteLocalStore,
    StateChanged,
)
from fastim.client.wire import Receiver, Wire, check_url, dial
from fastim.errors import Unavailable
from tests.kill.log import ClientLog, Submitted, wall_ms

_IMPATIENT_S = (0.1, 2.0)
"""The person opens the app instead of waiting for the SDK's own backoff of up to 20 s."""
_PAGE = 500


class Phone:
    """One life of the app. `port` leads somewhere else than to the server, to a proxy for one."""

    def __init__(
        self, server: Server, token: str, device: str, store: Path, log: ClientLog, *, port: int = 0
    ) -> None:
        self._url = check_url(f"ws://127.0.0.1:{port or server.ws_port}")
        self._store = SqliteLocalStore(store)
        self._log = log
        self._wire: Wire | None = None
        self._hurry: asyncio.TimerHandle | None = None
        self._ended = False
        self._client = Client(
            self._url, token, device, store=self._store, on_event=self._on_event, dial=self._dial
        )

    @property
    def connected(self) -> bool:
        return self._client.connected

    async def start(self) -> None:
        await self._client.start()
        await self._remember()

    async def send(self, conv: str, body: bytes, loss_time_ms: int, n: int) -> str:
        """Hand a message over; returns its client_id. Whether a killed app took it, its next life says."""
        client_id = new_client_id(wall_ms())
        self._log.write("submit", client_id=client_id.hex(), conv=conv, n=n, loss=loss_time_ms)
        with contextlib.suppress(Unavailable):
            await self._client.send(conv, body, loss_time_ms=loss_time_ms, client_id=client_id)
        return client_id.hex()

    def cut(self) -> None:
        """The network resets the connection; the app goes on."""
        if self._wire is not None:
            self._wire.abort()

    async def abort(self) -> None:
        """The app is killed."""
        self._end()
        await self._client.abort()

    async def close(self) -> None:
        """The app is closed in order."""
        self._end()
        await self._client.close()

    def _end(self) -> None:
        self._ended = True
        if self._hurry is not None:
            self._hurry.cancel()

    async def _dial(self, receiver: Receiver) -> Wire:
        self._wire = await dial(self._url, receiver, None)
        return self._wire

    def _on_event(self, event: Event) -> None:
        match event:
            case Message():
                self._show(event)
            case Gone():
                self._log.write(
                    "gone", conv=event.conv, seq=event.from_seq, to=event.to_seq, reason=event.reason
                )
            case StateChanged(client_id, conv, Delivery.SENT, seq, msg_id):
                self._log.write("sent", client_id=client_id.hex(), conv=conv, msg_id=msg_id, seq=seq)
            case StateChanged(client_id, conv, Delivery.REFUSED):
                self._log.write("refused", client_id=client_id.hex(), conv=conv, code=event.code)
            case Connected():
                self._log.write("life", what="connected", resumed=event.resumed)
            case Disconnected():
                self._log.write("life", what="lost", code=event.code, reason=event.reason, final=event.final)
                self._be_impatient(event)
            case _:
                pass

    def _show(self, message: Message) -> None:
        if message.again and any(
            (seen.conv, seen.seq) == (message.conv, message.seq) for seen in self._log.record.shown
        ):
            return
        self._log.write(
            "shown", conv=message.conv, seq=message.seq, msg_id=message.msg_id,
            client_id=message.client_id.hex(), sender=message.sender, loss=message.loss_time_ms,
        )  # fmt: skip

    def _be_impatient(self, event: Disconnected) -> None:
        if event.final or self._ended or event.retry_in_s <= _IMPATIENT_S[1]:
            return
        wait_s = random.uniform(*_IMPATIENT_S)
        self._hurry = asyncio.get_running_loop().call_later(wait_s, self._client.reconnect)

    async def _remember(self) -> None:
        """What became of messages whose answer the last life did not write down.

        Neither in the outbox nor in the timeline: the app was killed before the SDK had taken it.
        """
        waiting = {one.client_id.hex(): one for one in self._client.unsent()}
        for sub in self._log.record.submitted.values():
            if sub.msg_id or sub.refused:
                continue
            one = waiting.get(sub.client_id)
            if one is None:
                await self._look_up(sub)
            elif one.code:
                self._log.write("refused", client_id=sub.client_id, conv=sub.conv, code=one.code)

    async def _look_up(self, sub: Submitted) -> None:
        below = 1 << 53
        while page := await self._store.page(sub.conv, 0, below, _PAGE):
            for message in page:
                if message.client_id.hex() == sub.client_id:
                    self._log.write(
                        "sent", client_id=sub.client_id, conv=sub.conv, msg_id=message.msg_id, seq=message.seq
                    )
                    return
            below = min(message.seq for message in page)
        self._log.write("refused", client_id=sub.client_id, conv=sub.conv, code="never_taken")
