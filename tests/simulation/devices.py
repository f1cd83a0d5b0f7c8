"""A device outside: a phone with storage that survives app restarts, written from docs/protocol.md alone.

It is a second implementation of the client's rules, small enough to read beside them: order per conversation,
hold a hole 500 ms and pull it, acknowledge only what is stored, one SEND outstanding per conversation, the
same client_id until there is an answer. So it also checks that the rules are enough.

 OFFLINE ──dial──▶ AUTH sent ──HELLO──▶ LIVE ──closed, silent, restarted──▶ OFFLINE (back after a drawn time)

`Phone` is the storage. Everything else is lost with the app.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Final

from fastim import protocol as p
from fastim._core.frame import split
from fastim.model import Kind, SkipReason, is_expired
from tests.simulation.checkers import DeviceLog, Shown, Submission
from tests.simulation.network import Wire
from tests.simulation.scenario import DevicePlan
from tests.simulation.wire import END_OF_TCP

if TYPE_CHECKING:
    from tests.simulation.world import World

HOLD_S: Final = 0.5
ACK_DELAY_S: Final = 0.1
RESEND_S: Final = (2.0, 4.0, 8.0, 16.0, 30.0)
RECONNECT_S: Final = (0.2, 3.0)
HELLO_PATIENCE_S: Final = 5.0
SILENCE_S: Final = 22.0
FRAME_BYTES: Final = 62_000
ITEM_BYTES: Final = 100


class Phone:
    """What survives the app: positions, epochs, the outbox, the resume ticket."""

    def __init__(self) -> None:
        self.last: dict[str, int] = defaultdict(int)
        """conv -> everything up to here is stored and shown, or will never be shown."""
        self.epoch: dict[str, int] = {}
        self.user_cursor = 0
        self.outbox: dict[str, deque[Submission]] = defaultdict(deque)
        self.session = ""
        self.tag = 0


class Held:
    """Frames of one conversation above the next seq, by seq, each with the tags under which it came."""

    def __init__(self) -> None:
        self.frames: dict[int, tuple[list[int], p.Msg | p.Skip | p.SentItem]] = {}
        self.pulled = False


class Sending:
    """The SEND of a conversation that is under way."""

    def __init__(self, subs: list[Submission]) -> None:
        self.subs = subs
        self.tries = 0
        self.open = {sub.client_id for sub in subs}
        """Not answered yet, by SENT or ERROR."""
        self.wait_s = 0.0
        """How long the refusals say to wait before what is left is sent again."""


class Device:
    """One device: its phone, its plan, and the connection it has now."""

    def __init__(self, world: World, plan: DevicePlan) -> None:
        self.world = world
        self.plan = plan
        self.rng = random.Random(f"device {world.plan.seed} {plan.user} {plan.device}")
        self.log = DeviceLog(plan.user, plan.device, acks=plan.acks, returns=plan.returns)
        self.phone = Phone()
        self.app: App | None = None
        self.calmed = False
        self.heard_of: dict[str, Submission] = {}

    @property
    def name(self) -> str:
        return f"{self.plan.user}/{self.plan.device}"

    def launch(self) -> None:
        self.world.outside.spawn(self._life(), self.name)

    async def _life(self) -> None:
        """Connect whenever the plan says so, for ever."""
        now = self.world.scheduler
        while True:
            gap = next((g for g in self.plan.offline if g[0] <= now.now < g[1]), None)
            if gap is not None and not (self.calmed and self.plan.returns):
                if self.calmed:
                    return
                await asyncio.sleep(min(0.5, max(0.01, gap[1] - now.now)))
                continue
            self.app = App(self)
            await self.app.run()
            self.app = None
            await asyncio.sleep(self.rng.uniform(*RECONNECT_S))

    def wants_to_be_offline(self) -> bool:
        now = self.world.scheduler.now
        return not (self.calmed and self.plan.returns) and any(a <= now < b for a, b in self.plan.offline)

    def send(self, sub: Submission) -> None:
        self.phone.outbox[sub.conv].append(sub)
        if self.app is not None:
            self.app.pump(sub.conv)

    def restart(self) -> None:
        """The app is killed by its system: memory is gone, storage stays, the socket is reset."""
        if self.app is not None:
            self.world.say(f"{self.name} app restarts")
            self.app.killed()

    def calm(self) -> None:
        self.calmed = True

    def restless(self) -> list[str]:
        why = []
        if self.plan.returns and (self.app is None or not self.app.connected):
            why.append(f"{self.name} is not connected")
        if any(self.phone.outbox.values()) and self.plan.returns:
            why.append(f"{self.name} has unsent messages")
        if self.app is not None and self.plan.returns and any(h.frames for h in self.app.held.values()):
            why.append(f"{self.name} holds frames behind a hole")
        return why


class App:
    """One connection of a device, from dial to end."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.phone = device.phone
        self.world = device.world
        self.live = False
        self.over = asyncio.Event()
        self.wire: Wire | None = None
        self.held: dict[str, Held] = defaultdict(Held)
        self.seen_tag = 0
        self.pending: dict[int, bool] = {}
        """tag -> stored, of what was received and is above stored_tag, in order."""
        self.stored_tag = 0
        """Everything up to it is stored."""
        self.single: list[int] = []
        """msg_ids to be acknowledged one by one."""
        self.tags_may_miss = False
        """After a hot resume: tags that were acknowledged one by one do not come again."""
        self.ahead_ms: deque[int] = deque([0], maxlen=5)
        """Samples of how far the server's clock is ahead. One that was held up on its way is too small."""
        self.heard_s = self.sent_s = 0.0
        self.leaves_s = 0.0
        """When to leave a server that goes away; 0: it does not."""
        self.outstanding: dict[str, Sending] = {}
        self._ack_set = False
        self._work: deque[bytes] = deque()
        self._working = False

    # ------------------------------------------------------------------------------------------ connection

    async def run(self) -> None:
        device, plan = self.device, self.device.plan
        self.wire = self.world.network.dial((plan.user, plan.device), self, plan.rtt_s)
        if self.wire is None:
            return
        phone = self.phone
        self._send(
            p.Auth(
                1, 1, f"token {plan.user}", plan.device, "app", phone.session, phone.tag, phone.user_cursor
            )
        )
        now = self.world.scheduler
        self.heard_s = now.now
        beat_s = now.now + 10.0 * device.rng.random()
        while not self.over.is_set():
            try:
                async with asyncio.timeout(0.5):
                    await self.over.wait()
            except TimeoutError:
                pass
            if now.now - self.heard_s > (SILENCE_S if self.live else HELLO_PATIENCE_S):
                self._leave("silence", orderly=False)
            elif device.wants_to_be_offline():
                self._leave("plan", orderly=device.rng.random() < 0.5)
            elif self.leaves_s and now.now >= self.leaves_s:
                self._leave("goaway", orderly=True)
            elif self.live and now.now >= beat_s:
                self._send(p.Ping())
                beat_s = now.now + 10.0
        self.live = False

    @property
    def connected(self) -> bool:
        """In truth: a device whose connection is half-open does not know yet that it is not."""
        return self.live and self.wire is not None and not self.wire.over

    def _leave(self, why: str, orderly: bool) -> None:
        """By a close frame, or by going silent (the radio is off): the server has to find out."""
        assert self.wire is not None
        self.world.say(f"{self.device.name} leaves: {why}")
        if orderly:
            self.wire.up.close(1000)
        elif why == "plan":
            self.wire.half_open()
        else:
            self.wire.cut()
        self.over.set()

    def killed(self) -> None:
        """The phone's kernel ends the connection, with a goodbye or a reset."""
        assert self.wire is not None
        if self.device.rng.random() < 0.5:
            self.wire.up.close(END_OF_TCP)
        else:
            self.wire.cut()
        self.over.set()

    def _send(self, frame: p.Frame) -> None:
        if self.wire is not None and not self.over.is_set():
            self.wire.up.send(p.encode(frame))
            self.sent_s = self.world.scheduler.now

    def on_closed(self, code: int) -> None:
        if not self.over.is_set():
            self.world.say(f"{self.device.name} closed {code}")
            if not p.reconnects(code) and code != p.CloseCode.REPLACED:
                self.world.failures.append(f"{self.device.name} was closed with {code}")
            if code in (p.CloseCode.IDLE, p.CloseCode.HALF_OPEN) and self._alive():
                self.world.failures.append(f"{self.device.name} is alive and was closed with {code}")
            if self.wire is not None and code != 1006:
                self.wire.up.close(code)
            self.over.set()

    def _alive(self) -> bool:
        """Whether it beats, answers, and its network is in order."""
        now_s = self.world.scheduler.now
        swift = self.device.plan.slow_s == 0 and now_s > self.world.rough_until_s
        return swift and self.live and now_s - self.sent_s < 12.0 and not self.wire_is_silent

    @property
    def wire_is_silent(self) -> bool:
        return self.wire is None or self.wire.up.gone

    def on_packet(self, packet: bytes) -> None:
        """Read in order; a slow device takes its time over each packet, and storing takes a moment."""
        self.heard_s = self.world.scheduler.now
        self._work.append(packet)
        if not self._working:
            self._working = True
            self._read_soon()

    def _read_soon(self) -> None:
        delay = self.device.plan.slow_s + self.device.rng.choice((0.0, 0.0, 0.001, 0.01))
        self.world.outside.call_later(delay, self._read)

    def _read(self) -> None:
        if self.over.is_set():
            return
        packet = self._work.popleft()
        for op, start, end in split(packet):
            self._frame(p.decode(op, packet[start:end]))
        if self._work:
            self._read_soon()
        else:
            self._working = False

    # ------------------------------------------------------------------------------------------ frames

    def _frame(self, frame: p.Frame) -> None:
        if not self.live and not isinstance(frame, p.Hello | p.Error):
            self.world.failures.append(f"{self.device.name} got a {type(frame).__name__} before HELLO")
        match frame:
            case p.Hello():
                self._hello(frame)
            case p.Msg():
                self.seen(frame.tag)
                self.ordered(frame.conv, frame.epoch, frame.seq, frame.tag, frame)
            case p.Skip():
                self.seen(frame.tag)
                self.ordered(frame.conv, frame.epoch, frame.from_seq, frame.tag, frame)
            case p.Sent():
                self.seen(frame.tag)
                self.sent(frame)
            case p.Level():
                self.seen(frame.tag)
                self.level(frame)
            case p.Changes():
                self._changes(frame)
            case p.Goaway():
                window_s = frame.window_ms / 1000
                self.leaves_s = self.world.scheduler.now + window_s * self.device.rng.random()
            case p.Pong():
                self._pong(frame)
            case p.Probe():
                self._send(p.Ping())
            case p.Error():
                self.refused(frame)
            case _:
                pass

    def _hello(self, frame: p.Hello) -> None:
        self.live = True
        self.ahead_ms.clear()
        self.ahead_ms.append(frame.server_ms - self.world.clock.wall_ms())
        self.world.say(f"{self.device.name} hello resumed={frame.resumed}")
        if frame.resumed == 1:
            self.tags_may_miss = True
        else:
            self.phone.tag = 0
        self.seen_tag = self.stored_tag = self.phone.tag
        self.phone.session = frame.session
        if self.stored_tag and self.device.rng.random() < 0.5:
            self._ack_soon()  # a repeated ack is harmless
        for conv in list(self.phone.outbox):
            self.pump(conv)

    def _changes(self, frame: p.Changes) -> None:
        """A conversation never heard of starts at this device's cursor: older ones are history."""
        for item in frame.items:
            if item.conv not in self.phone.last:
                self.phone.last[item.conv] = item.cursor
                self.device.log.start[item.conv] = item.cursor

    def _pong(self, frame: p.Pong) -> None:
        self.ahead_ms.append(frame.server_ms - self.world.clock.wall_ms())
        if frame.last_tag > self.seen_tag and not self.tags_may_miss:
            self.world.failures.append(f"{self.device.name} missed tags {self.seen_tag}..{frame.last_tag}")

    def seen(self, tag: int) -> None:
        if tag:
            if tag > self.seen_tag + 1 and not self.tags_may_miss:
                self.world.failures.append(f"{self.device.name} saw tag {tag} after {self.seen_tag}")
            self.seen_tag = max(self.seen_tag, tag)
            if tag > self.stored_tag:
                self.pending.setdefault(tag, False)

    # ------------------------------------------------------------------------------------------ order

    def ordered(self, conv: str, epoch: int, seq: int, tag: int, what: p.Msg | p.Skip | p.SentItem) -> None:
        """Apply what is next, drop what is known, hold what is early."""
        phone = self.phone
        if epoch and phone.epoch.setdefault(conv, epoch) != epoch:
            phone.epoch[conv] = epoch
            phone.last[conv] = 0
        last = what.to_seq if isinstance(what, p.Skip) else seq
        if last <= phone.last[conv]:
            self.stored(tag)
            return
        if seq > phone.last[conv] + 1:
            held = self.held[conv]
            held.frames.setdefault(seq, ([], what))[0].append(tag)
            if not held.pulled:
                held.pulled = True
                self.world.outside.call_later(HOLD_S, self._pull, conv)
            return
        self.apply(conv, [tag], what)
        self._apply_held(conv)

    def _apply_held(self, conv: str) -> None:
        held = self.held.get(conv)
        while held is not None and held.frames:
            seq = min(held.frames)
            if seq > self.phone.last[conv] + 1:
                return
            tags, what = held.frames.pop(seq)
            last = what.to_seq if isinstance(what, p.Skip) else seq
            if last > self.phone.last[conv]:
                self.apply(conv, tags, what)
            else:
                for tag in tags:
                    self.stored(tag)

    def apply(self, conv: str, tags: list[int], what: p.Msg | p.Skip | p.SentItem) -> None:
        """Show and store, then the tag may be acknowledged."""
        phone, log = self.phone, self.device.log
        if isinstance(what, p.Skip):
            log.stored[conv].update(range(phone.last[conv] + 1, what.to_seq + 1))
            phone.last[conv] = what.to_seq
            if what.reason not in (SkipReason.EXPIRED, SkipReason.NOT_MEMBER):
                self.world.failures.append(f"{self.device.name} got a SKIP of reason {what.reason}")
        else:
            phone.last[conv] = what.seq
            log.stored[conv].add(what.seq)
            self.show(conv, what)
            if isinstance(what, p.Msg) and self.device.plan.acks_single:
                self.single.append(what.msg_id)
        for tag in tags:
            self.stored(tag)

    def show(self, conv: str, what: p.Msg | p.SentItem) -> None:
        clock, log = self.world.clock, self.device.log
        if isinstance(what, p.SentItem):
            sub = self.device.heard_of[what.client_id.hex()]
            fields = (sub.sender, sub.body, 0)
        else:
            if what.kind >= Kind.MEMBER:
                return
            if is_expired(what.loss_time_ms, clock.wall_ms() + max(self.ahead_ms)):
                return
            fields = (what.sender, what.body, what.loss_time_ms)
        log.shown.append(Shown(conv, what.seq, what.msg_id, what.client_id, *fields, clock.wall_ms()))
        self.world.say(f"{self.device.name} shows {conv}/{what.seq}")

    def _pull(self, conv: str) -> None:
        held = self.held[conv]
        held.pulled = False
        if self.over.is_set() or not held.frames:
            return
        first = min(held.frames)
        last = self.phone.last[conv]
        if first > last + 1:
            self.world.figures["pulls"] += 1
            self._send(p.Pull(conv, last + 1, first - 1))
            held.pulled = True
            self.world.outside.call_later(HOLD_S * 8, self._pull, conv)

    def level(self, frame: p.Level) -> None:
        """A place to resume from once everything before it is stored, which is when nothing is held."""
        if self.device.plan.acks and not any(held.frames for held in self.held.values()):
            self.phone.user_cursor = max(self.phone.user_cursor, frame.user_cursor)
            self.world.say(f"{self.device.name} is level")
        self.stored(frame.tag)

    # ------------------------------------------------------------------------------------------ acks

    def stored(self, tag: int) -> None:
        """The frame of this tag is in the phone's storage; so is the tag up to which all are."""
        if not tag or self.over.is_set():
            return
        if tag in self.pending:
            self.pending[tag] = True
        for received, is_stored in list(self.pending.items()):
            if not is_stored:
                break
            self.stored_tag = received
            del self.pending[received]
        if self.device.plan.acks:
            self.phone.tag = self.stored_tag
            self._ack_soon()

    def _ack_soon(self) -> None:
        if not self._ack_set and self.device.plan.acks:
            self._ack_set = True
            self.world.outside.call_later(ACK_DELAY_S * self.device.rng.random(), self.ack)

    def ack(self) -> None:
        self._ack_set = False
        if self.over.is_set():
            return
        if self.single:
            for start in range(0, len(self.single), p.MAX_ACK_IDS):
                self._send(p.Acks(self.single[start : start + p.MAX_ACK_IDS]))
            self.single.clear()
            if self.device.rng.random() < 0.7:
                self._ack_soon()  # the rest with a later one
                return
        if self.stored_tag:
            self._send(p.Ack(self.stored_tag))

    # ------------------------------------------------------------------------------------------ the outbox

    def pump(self, conv: str) -> None:
        """One SEND per conversation under way."""
        box = self.phone.outbox[conv]
        if not self.live or self.over.is_set() or conv in self.outstanding or not box:
            return
        subs: list[Submission] = []
        room = FRAME_BYTES
        for sub in list(box)[: self.device.rng.choice((1, 4, p.MAX_SEND_BATCH))]:
            room -= len(sub.body) + ITEM_BYTES
            if subs and room < 0:
                break
            subs.append(sub)
        sending = Sending(subs)
        self.outstanding[conv] = sending
        self._transmit(conv, sending)

    def _transmit(self, conv: str, sending: Sending) -> None:
        """The same client_ids until there is an answer for each.

        A message that was refused for now goes along: its answer may belong to an earlier copy of this frame.
        """
        if self.over.is_set() or self.outstanding.get(conv) is not sending:
            return
        box = self.phone.outbox[conv]
        waiting = [sub for sub in sending.subs if sub in box]
        for sub in waiting:
            self.device.heard_of[sub.client_id.hex()] = sub
        items = [p.SendItem(s.client_id, Kind.TEXT, s.body, s.loss_time_ms, s.flags) for s in waiting]
        read_seq = self.phone.last.get(conv, 0) if self.device.rng.random() < 0.2 else 0
        self._send(p.Send(conv, items, read_seq))
        delay_s = RESEND_S[min(sending.tries, len(RESEND_S) - 1)] * (0.5 + self.device.rng.random() / 2)
        sending.tries += 1
        self.world.outside.call_later(delay_s, self._transmit, conv, sending)

    def sent(self, frame: p.Sent) -> None:
        box = self.phone.outbox[frame.conv]
        for item in frame.items:
            sub = self.device.heard_of.get(item.client_id.hex())
            if sub is not None:
                if sub.accepted and (sub.msg_id, sub.seq) != (item.msg_id, item.seq):
                    self.world.failures.append(f"{self.device.name} got two results for one client_id")
                sub.msg_id, sub.seq = item.msg_id, item.seq
                if sub in box:
                    box.remove(sub)
        items = sorted(frame.items, key=lambda item: item.seq)
        for number, item in enumerate(items, 1):
            self.ordered(frame.conv, frame.epoch, item.seq, frame.tag if number == len(items) else 0, item)
        self._answered(frame.conv, [item.client_id for item in frame.items])

    def refused(self, frame: p.Error) -> None:
        if frame.op != p.Op.SEND:
            if not frame.retryable:
                self.world.failures.append(f"{self.device.name} got ERROR {frame.code}: {frame.detail}")
            return
        sub = self.device.heard_of.get(frame.client_id.hex())
        if sub is None or sub.accepted:
            return
        if not frame.retryable:
            sub.refused = frame.code
            box = self.phone.outbox[sub.conv]
            if sub in box:
                box.remove(sub)
        self._answered(sub.conv, [sub.client_id], frame.retry_after_ms / 1000)

    def _answered(self, conv: str, client_ids: list[bytes], wait_s: float = 0.0) -> None:
        """When the SEND under way is answered as a whole, the next one may go: what is left, in order."""
        sending = self.outstanding.get(conv)
        if sending is None:
            return
        sending.open.difference_update(client_ids)
        sending.wait_s = max(sending.wait_s, wait_s)
        if not sending.open:
            del self.outstanding[conv]
            if sending.wait_s:
                self.world.outside.call_later(sending.wait_s, self.pump, conv)
            else:
                self.pump(conv)
