"""The network of a run: a listener of the server process, and links that end in it.

SimHub and SimLink are `fastim/node/link.py` over simulated wires: what CoreHub and CoreConnection do on
picows, with the same ack table, wheel and frame splitter under them. The other end of a wire is a device's
dialled connection (devices.py).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Final

from fastim._core.acks import AckTable
from fastim._core.cipher import Opener, Sealer
from fastim._core.frame import parse_ack, split
from fastim._core.wheel import Wheel
from fastim.clock import Clock
from fastim.errors import PeerError, UsageError
from fastim.node.limits import NodeLimits
from fastim.node.link import CLOSE_ABORT_MS, LinkOwner
from fastim.node.session import Parcel
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
from tests.simulation.loop import SimLoop
from tests.simulation.wire import END_OF_TCP, End, Pipe

SOFT_BYTES: Final = 262_144
HARD_BYTES: Final = 524_288
AUTH_MS: Final = 5_000
CLOSE_ABNORMAL: Final = 1006
WINDOW_MESSAGES: Final = NodeLimits().window_messages


class SimHub:
    """What the links of one start of the process share."""

    def __init__(
        self,
        loop: SimLoop,
        clock: Clock,
        acks: AckTable,
        wheel: Wheel,
        encode_error: Callable[[int, PeerError], bytes],
    ) -> None:
        self.loop = loop
        self.clock = clock
        self.acks = acks
        self.wheel = wheel
        self.encode_error = encode_error
        self.accept: Callable[[SimLink], LinkOwner] | None = None
        """None: nothing listens; dialling is refused."""
        self.on_acked: Callable[[], None] = lambda: None
        self.on_fatal: Callable[[BaseException], None] = self._raise
        self._links: dict[int, SimLink] = {}
        self._dirty: list[SimLink] = []
        self._gone: list[SimLink] = []
        self._scheduled = False
        self._auth: deque[tuple[int, SimLink]] = deque()
        self._closing: deque[tuple[int, SimLink]] = deque()

    @staticmethod
    def _raise(error: BaseException) -> None:
        raise error

    def now_ms(self) -> int:
        return self.clock.mono_ms()

    def link_at(self, slot: int) -> SimLink | None:
        return self._links.get(slot)

    def links(self) -> list[SimLink]:
        return list(self._links.values())

    def sweep(self, mono_ms: int) -> int:
        ended = 0
        while self._auth and self._auth[0][0] <= mono_ms:
            link = self._auth.popleft()[1]
            if not link.closed and not link.authenticated:
                ended += 1
                link.close(CloseCode.AUTH, "no AUTH in time")
        while self._closing and self._closing[0][0] <= mono_ms:
            link = self._closing.popleft()[1]
            if link.state == "closing":
                ended += 1
                link.finish()
        return ended

    def wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self.tick)

    def tick(self) -> None:
        """The end of a loop tick, in the order of CoreHub: acks, ends, writes."""
        self._scheduled = False
        if self.acks.pending_drain:
            try:
                self.on_acked()
            except Exception as error:
                self.on_fatal(error)
        gone, self._gone = self._gone, []
        for link in gone:
            try:
                link.tell()
            except Exception as error:
                self.on_fatal(error)
        dirty, self._dirty = self._dirty, []
        for link in dirty:
            link.flush()

    # -- from the network

    def arrive(self, link: SimLink) -> None:
        """A socket finished its upgrade."""
        if self.accept is None:
            link.down.cut()
            return
        now = self.now_ms()
        link.slot = self.wheel.add(now)
        link.received_ms = now
        link.state = "open"
        self._links[link.slot] = link
        self._auth.append((now + AUTH_MS, link))
        try:
            link.owner = self.accept(link)
        except Exception as error:
            self.on_fatal(error)
            link.close(CloseCode.INTERNAL)


class SimLink:
    """One connection as the node sees it (fastim.node.link.Link)."""

    def __init__(self, hub: SimHub, peer: str) -> None:
        self.hub = hub
        self.peer = peer
        self.owner: LinkOwner = None  # type: ignore[assignment]
        self.authenticated = False
        self.state = "new"
        self.slot = -1
        self.close_code = 0
        self.down: Pipe = None  # type: ignore[assignment]
        self.received_ms = 0
        self._ack_slot = -1
        self._user_cursor = 0
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._dirty = False
        self._orderly = False

    @property
    def closed(self) -> bool:
        return self.state != "open"

    @property
    def overflow(self) -> bool:
        return self.buffered_bytes() > SOFT_BYTES

    def bind(self, ack_slot: int) -> None:
        if self.closed:
            return
        if ack_slot != -1:
            self.hub.acks.last_tag(ack_slot)
        self._ack_slot = ack_slot

    sealed = False
    """The simulation's node has no keys: it answers REKEY with ERROR, so that nobody calls set_keys."""

    def set_keys(self, key_id: int, sealer: Sealer, opener: Opener) -> None:
        raise UsageError("simulated links do not seal")

    def set_pong(self, user_cursor: int) -> None:
        self._user_cursor = user_cursor

    def send(self, frame: bytes) -> None:
        if self.closed:
            return
        if not 2 <= len(frame) <= MAX_PACKET_BYTES:
            raise UsageError(f"the frame is {len(frame):,} bytes; limits 2 and {MAX_PACKET_BYTES:,}")
        self._out.append(frame)
        self._out_bytes += len(frame)
        if self.down.waiting_bytes and self.buffered_bytes() > HARD_BYTES:
            self.abort()
        elif not self._dirty:
            self._dirty = True
            self.hub._dirty.append(self)
            self.hub.wake()

    def send_msg(self, tag: int, dup: bool, tail: bytes) -> None:
        self.send(encode_msg(tag, dup, tail))

    def flush(self) -> None:
        self._dirty = False
        if self._ack_slot >= 0 and self.hub.acks.unacked(self._ack_slot)[0] > WINDOW_MESSAGES:
            self._count_window()
        packet: list[bytes] = []
        size = 0
        for frame in self._out:
            if packet and (size + len(frame) > MAX_PACKET_BYTES or len(packet) == MAX_FRAMES_PER_PACKET):
                self.down.send(b"".join(packet))
                packet, size = [], 0
            packet.append(frame)
            size += len(frame)
        if packet:
            self.down.send(b"".join(packet))
        self._out.clear()
        self._out_bytes = 0

    def _count_window(self) -> None:
        """SENT, SKIP and LEVEL take no room in the window; messages never exceed it."""
        items = [item for _, item in self.hub.acks.items(self._ack_slot)]
        messages = sum(isinstance(item, Parcel) and item.is_msg for item in items)
        if messages > WINDOW_MESSAGES:
            self.hub.on_fatal(AssertionError(f"{messages} messages are under way to {self.peer}"))

    def close(self, code: int, reason: str = "") -> None:
        if self.closed:
            return
        self.flush()
        self.state = "closing"
        self.close_code = int(code)
        self.down.close(int(code))
        self.hub._closing.append((self.hub.now_ms() + CLOSE_ABORT_MS, self))

    def abort(self) -> None:
        if self.state in ("open", "closing"):
            self.down.cut()
            self._end(self.close_code or CLOSE_ABNORMAL, orderly=False)

    def buffered_bytes(self) -> int:
        return self._out_bytes + self.down.waiting_bytes

    def last_recv_ms(self) -> int:
        return self.received_ms

    # -- the wire's end

    def on_packet(self, packet: bytes) -> None:
        if self.closed:
            return
        hub = self.hub
        self.received_ms = hub.now_ms()
        hub.wheel.touch(self.slot, self.received_ms)
        try:
            frames = split(packet)
        except PeerError as error:
            self._refuse(0, error)
            return
        for op, start, end in frames:
            if self.closed:
                return
            self._frame(op, packet[start:end])

    def _frame(self, op: int, frame: bytes) -> None:
        try:
            if op == Op.PING and self.authenticated:
                last = self.hub.acks.last_tag(self._ack_slot) if self._ack_slot >= 0 else 0
                self.send(encode(Pong(self.hub.clock.wall_ms(), last, self._user_cursor)))
            elif op in (Op.ACK, Op.ACKS) and self._ack_slot >= 0:
                self._acked(op, frame)
            elif op == Op.SEALED:
                self.close(CloseCode.BAD_FRAME)
            elif not self.authenticated and op not in (Op.AUTH, Op.REKEY):
                raise PeerError("unauthenticated", f"op {op} before AUTH")
            else:
                self.owner.on_command(op, frame)
        except PeerError as error:
            self._refuse(op, error)
        except Exception as error:
            self.hub.on_fatal(error)
            self.close(CloseCode.INTERNAL)

    def _acked(self, op: int, frame: bytes) -> None:
        acks = self.hub.acks
        if op == Op.ACK:
            acks.ack_to(self._ack_slot, parse_ack(frame))
        else:
            found = decode(op, frame)
            assert isinstance(found, Acks)
            acks.ack_ids(self._ack_slot, found.msg_ids)
        if acks.pending_drain:
            self.hub.wake()

    def _refuse(self, op: int, error: PeerError) -> None:
        self.send(self.hub.encode_error(op, error))
        if error.code in ("bad_frame", "bad_ack"):
            self.close(CloseCode.BAD_FRAME)
        elif error.code == "unauthenticated" and not self.authenticated:
            self.close(CloseCode.AUTH)

    def on_closed(self, code: int) -> None:
        """The peer's close frame or its end of TCP (both orderly), or a reset (1006)."""
        orderly = code != CLOSE_ABNORMAL
        if self.state == "open":
            self._end(CLOSE_ABNORMAL if code == END_OF_TCP else code, orderly=orderly)
        elif self.state == "closing":
            self._end(self.close_code, orderly=orderly)

    def _end(self, code: int, *, orderly: bool) -> None:
        self.state = "closed"
        hub = self.hub
        if self.slot >= 0:
            hub.wheel.remove(self.slot)
            hub._links.pop(self.slot, None)
            self.slot = -1
        self._ack_slot = -1
        self._out.clear()
        self._out_bytes = 0
        self.close_code = code
        self._orderly = orderly
        hub._gone.append(self)
        hub.wake()

    def finish(self) -> None:
        """The peer took too long over the closing handshake."""
        self.down.cut()
        self._end(self.close_code, orderly=False)

    def tell(self) -> None:
        owner, self.owner = self.owner, None  # type: ignore[assignment]
        if owner is not None:
            owner.on_closed(self.close_code, self._orderly)


class Network:
    """Dialling, and the faults of every open connection."""

    def __init__(self, outside: SimLoop, rng: random.Random) -> None:
        self.outside = outside
        self.rng = rng
        self.hub: SimHub | None = None
        """Of the process that listens now."""
        self.extra_s = 0.0
        """Packets take up to so much longer."""
        self.wires: dict[tuple[str, str], Wire] = {}
        """The newest connection of each device."""
        self._open: list[Wire] = []
        self._count = 0

    def latency(self, rtt_s: float) -> Callable[[], float]:
        rng = self.rng

        def one_way_s() -> float:
            spread = 4.0 if rng.random() < 0.05 else 0.4
            return rtt_s * (0.3 + rng.random() * spread) + self.extra_s * rng.random()

        return one_way_s

    def dial(self, who: tuple[str, str], client: End, rtt_s: float) -> Wire | None:
        """None: nobody listens."""
        hub = self.hub
        if hub is None or hub.accept is None or hub.loop.dead:
            return None
        self._count += 1
        wire = Wire(self, hub, client, f"{who[0]}/{who[1]}#{self._count}", rtt_s)
        self.wires[who] = wire
        self._open = [other for other in self._open if not other.over]
        self._open.append(wire)
        return wire

    def dead(self) -> list[str]:
        """Connections that the server still takes for open, though their peers are gone without a word."""
        return [
            f"the connection of {wire.peer} stands, and its peer is gone"
            for wire in self._open
            if wire.hub is self.hub and wire.link.state == "open" and wire.up.gone
        ]

    def process_died(self, hub: SimHub, *, silently: bool) -> None:
        """The kernel resets the sockets of a killed process; a machine without power says nothing."""
        for wire in self._open:
            if wire.hub is hub:
                if silently:
                    wire.down.lose_silently()
                else:
                    wire.down.cut()
                wire.up.lose_silently()
        if self.hub is hub:
            self.hub = None


class Wire:
    """One connection: the pipe up to the server and the pipe down to the device."""

    def __init__(self, network: Network, hub: SimHub, client: End, peer: str, rtt_s: float) -> None:
        latency = network.latency(rtt_s)
        self.hub = hub
        self.peer = peer
        self.link = SimLink(hub, peer)
        self.down = Pipe(network.outside, client, latency)
        self.up = Pipe(hub.loop, self.link, latency)
        self.link.down = self.down
        # The handshake: the listener sees the socket one trip later, before anything sent on it.
        self.up._later(lambda _epoch: hub.arrive(self.link))

    @property
    def over(self) -> bool:
        return self.link.state == "closed" or (self.up.gone and self.down.gone)

    def cut(self) -> None:
        self.up.cut()
        self.down.cut()

    def half_open(self) -> None:
        self.up.lose_silently()
        self.down.lose_silently()

    def stall(self, stalled: bool) -> None:
        self.down.stall(stalled)
