"""fastim.node.link.Hub and Link without sockets: what CoreHub and CoreConnection do, by hand.

The other end of a link is whatever `client` is: its packets are taken, its frames are handed to `receive`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from fastim._core.acks import AckTable
from fastim._core.cipher import Opener, Sealer
from fastim._core.frame import parse_ack, split
from fastim._core.sealed import SealedStream
from fastim._core.wheel import Wheel
from fastim.clock import Clock
from fastim.errors import PeerError
from fastim.node.link import CLOSE_ABORT_MS, LinkOwner
from fastim.node.service import encode_error
from fastim.protocol import (
    MAX_FRAMES_PER_PACKET,
    MAX_PACKET_BYTES,
    Acks,
    CloseCode,
    Op,
    Pong,
    decode,
    encode,
    encode_msg,
)

SOFT_BYTES = 262_144
HARD_BYTES = 524_288
AUTH_MS = 5_000


class Client(Protocol):
    """Who sits at the other end."""

    dead: bool
    """The network swallows everything."""
    close_code: int
    close_reason: str

    def take(self, packet: bytes) -> None: ...


class FakeHub:
    """What the links of one node share."""

    def __init__(self, clock: Clock, acks: AckTable, wheel: Wheel) -> None:
        self.clock = clock
        self.acks = acks
        self.wheel = wheel
        self.accept: Callable[[Any], LinkOwner] | None = None
        self.on_acked: Callable[[], None] = lambda: None
        self.on_fatal: Callable[[BaseException], None] = lambda error: None
        self.links: dict[int, FakeLink] = {}
        self.gone: list[FakeLink] = []
        self.dirty: list[FakeLink] = []
        self.scheduled = False

    def now_ms(self) -> int:
        return self.clock.mono_ms()

    def link_at(self, slot: int) -> FakeLink | None:
        return self.links.get(slot)

    def sweep(self, mono_ms: int) -> int:
        ended = 0
        for link in list(self.links.values()):
            if link.state == "closing" and link.close_by_ms <= mono_ms:
                link.end(link.close_code, orderly=False)
                ended += 1
            elif link.state == "open" and not link.authenticated and link.auth_by_ms <= mono_ms:
                link.close(CloseCode.AUTH, "no AUTH in time")
                ended += 1
        return ended

    def wake(self) -> None:
        if not self.scheduled:
            self.scheduled = True
            asyncio.get_running_loop().call_soon(self.tick)

    def tick(self) -> None:
        self.scheduled = False
        if self.acks.pending_drain:
            self.guarded(self.on_acked)
        gone, self.gone = self.gone, []
        for link in gone:
            self.guarded(link.tell)
        dirty, self.dirty = self.dirty, []
        for link in dirty:
            link.flush()

    def guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.on_fatal(error)

    def open(self, client: Client) -> FakeLink:
        """A socket finished its upgrade."""
        assert self.accept is not None, "nothing is accepted yet"
        link = FakeLink(self, client)
        link.owner = self.accept(link)
        return link


class FakeLink:
    """One connection, as the node sees it."""

    def __init__(self, hub: FakeHub, client: Client) -> None:
        now_ms = hub.now_ms()
        self.hub = hub
        self.client = client
        self.owner: LinkOwner = None  # type: ignore[assignment]
        self.authenticated = False
        self.state = "open"
        self.close_code = 0
        self.orderly = False
        self.told = 0
        self.auth_by_ms = now_ms + AUTH_MS
        self.close_by_ms = 0
        self.ack_slot = -1
        self.user_cursor = 0
        self.received_ms = now_ms
        self.out: list[bytes] = []
        self.out_bytes = 0
        self.stuck = False
        """The peer does not read."""
        self.stream: SealedStream | None = None
        self.slot = hub.wheel.add(now_ms)
        hub.links[self.slot] = self

    peer = "test:1"

    @property
    def closed(self) -> bool:
        return self.state != "open"

    @property
    def overflow(self) -> bool:
        return self.out_bytes > SOFT_BYTES

    def buffered_bytes(self) -> int:
        return self.out_bytes

    def last_recv_ms(self) -> int:
        return self.received_ms

    def bind(self, ack_slot: int) -> None:
        if self.state == "open":
            if ack_slot != -1:
                self.hub.acks.unacked(ack_slot)  # raises for a slot that is not open
            self.ack_slot = ack_slot

    @property
    def sealed(self) -> bool:
        return self.stream is not None

    def set_keys(self, key_id: int, sealer: Sealer, opener: Opener) -> None:
        self.flush()
        if self.stream is None:
            self.stream = SealedStream(key_id, sealer, opener, client=False)
        else:
            self.stream.renew(key_id, sealer, opener)

    def set_pong(self, user_cursor: int) -> None:
        self.user_cursor = user_cursor

    def send(self, frame: bytes) -> None:
        if self.closed:
            return
        assert 2 <= len(frame) <= MAX_PACKET_BYTES
        self.out.append(frame)
        self.out_bytes += len(frame)
        if self.stuck and self.out_bytes > HARD_BYTES:
            self.abort()
        elif self not in self.hub.dirty:
            self.hub.dirty.append(self)
            self.hub.wake()

    def send_msg(self, tag: int, dup: bool, tail: bytes) -> None:
        self.send(encode_msg(tag, dup, tail))

    def flush(self) -> None:
        if self.stuck:
            return
        out, self.out, self.out_bytes = self.out, [], 0
        while out:
            packet = b""
            count = 0
            while out and count < MAX_FRAMES_PER_PACKET and len(packet) + len(out[0]) <= MAX_PACKET_BYTES:
                packet += out.pop(0)
                count += 1
            self.client.take(self.stream.seal(packet) if self.stream is not None else packet)

    def unstick(self) -> None:
        """The peer reads again."""
        self.stuck = False
        self.flush()

    def close(self, code: int, reason: str = "") -> None:
        if self.state != "open":
            return
        self.flush()
        self.state = "closing"
        self.close_code = int(code)
        self.close_by_ms = self.hub.now_ms() + CLOSE_ABORT_MS
        if not self.client.dead and not self.stuck:
            self.client.close_code = int(code)
            self.client.close_reason = reason
            asyncio.get_running_loop().call_soon(lambda: self.end(self.close_code, orderly=True))

    def abort(self) -> None:
        self.end(self.close_code or 1006, orderly=False)

    def end(self, code: int, *, orderly: bool) -> None:
        """The socket is gone."""
        if self.state == "ended":
            return
        self.state = "ended"
        self.close_code, self.orderly = code, orderly
        self.client.close_code = self.client.close_code or code
        self.out, self.out_bytes = [], 0
        del self.hub.links[self.slot]
        self.hub.wheel.remove(self.slot)
        self.slot = self.ack_slot = -1
        self.hub.gone.append(self)
        self.hub.wake()

    def tell(self) -> None:
        self.told += 1
        self.owner.on_closed(self.close_code, self.orderly)

    def receive(self, packet: bytes) -> None:
        """What the core does with a packet."""
        if self.closed:
            return
        self.received_ms = self.hub.now_ms()
        self.hub.wheel.touch(self.slot, self.received_ms)
        try:
            if self.stream is not None:
                packet = self.stream.open(packet)
            spans = split(packet)
        except PeerError as error:
            if error.code == "bad_seal":
                self.close(CloseCode.BAD_FRAME)
                return
            self._refuse(0, error)
            return
        for op, start, end in spans:
            if self.closed:
                return
            try:
                self._frame(op, packet[start:end])
            except PeerError as error:
                self._refuse(op, error)
            except Exception as error:
                self.hub.on_fatal(error)
                self.close(CloseCode.INTERNAL)

    def _frame(self, op: int, frame: bytes) -> None:
        acks = self.hub.acks
        if op == Op.PING and self.authenticated:
            last = acks.last_tag(self.ack_slot) if self.ack_slot >= 0 else 0
            self.send(encode(Pong(self.hub.clock.wall_ms(), last, self.user_cursor)))
        elif op == Op.ACK and self.ack_slot >= 0:
            acks.ack_to(self.ack_slot, parse_ack(frame))
            self.hub.wake()
        elif op == Op.ACKS and self.ack_slot >= 0:
            found = decode(op, frame)
            assert isinstance(found, Acks)
            acks.ack_ids(self.ack_slot, found.msg_ids)
            self.hub.wake()
        elif op == Op.SEALED:
            self.close(CloseCode.BAD_FRAME)
        elif not self.authenticated and op not in (Op.AUTH, Op.REKEY):
            raise PeerError("unauthenticated", f"op {op} before AUTH")
        else:
            self.owner.on_command(op, frame)

    def _refuse(self, op: int, error: PeerError) -> None:
        self.send(encode_error(op, error))
        if error.code in ("bad_frame", "bad_ack"):
            self.close(CloseCode.BAD_FRAME, error.code)
        elif error.code == "unauthenticated" and not self.authenticated:
            self.close(CloseCode.AUTH, error.code)
