"""Hand inbox records to local connections and see each to its end (seed: 消息可达性, 回包).

A Deliver is written to every session of its users that is LEVEL and has room; everywhere else the
conversation goes BEHIND and a due row stands for it. Each such end is a hold of its record: an acknowledged
frame, or a due request, in the flush that commits it (flush.Flusher settles the record with the last one).

 Deliver ─┬─ LEVEL, room ──▶ MSG, Parcel in the ack table ─┬─ ACK ────────▶ Settled ──┐
          │                                                ├─ 8 s, traffic ▶ due row ─┤
          │                                                ├─ 8 s, silence ▶ lost ────┼──▶ flush ──▶ settle
          ├─ BEHIND, no room, expired ─────────────────────┴──────────────▶ due row ──┤
          └─ nobody here ─────────────────────────────────────────────────▶ due row ──┘

I1  settle() is called once per record, after its next step is durable    tests/system/test_delivery.py
I2  nothing overtakes inside a conversation                               same, and the simulation
I3  a frame that timed out is never written again by the timer            same
Source: docs/design.md; semantics, "Deliver and ack", "Retry".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from fastim import observe
from fastim._core.acks import AckTable
from fastim.bus.base import Reader, Record
from fastim.bus.records import (
    MALFORMED,
    Deliver,
    InboxRecord,
    Kick,
    Mark,
    Nudge,
    Refusal,
    Reply,
    decode_inbox,
)
from fastim.clock import Clock
from fastim.errors import PeerError, UsageError
from fastim.model import FIRST_EVENT_KIND, Fate, Message, is_expired
from fastim.node.catchup import Catchup
from fastim.node.flush import Flusher
from fastim.node.limits import NodeLimits
from fastim.node.link import Link
from fastim.node.pool import ConnPool
from fastim.node.session import CURSOR, Entry, Heard, Parcel, Session
from fastim.protocol import (
    MSG_PREFIX_BYTES,
    CloseCode,
    Error,
    Op,
    Probe,
    ReadMark,
    Sent,
    SentItem,
    encode,
)

_PROBE: Final = encode(Probe())
_ACKED: Final = Fate.ACKED


class Delivery:
    """The live half of a node. `lose` ends a connection whose peer is gone or too slow."""

    def __init__(
        self,
        pool: ConnPool,
        acks: AckTable,
        flusher: Flusher,
        catchup: Catchup,
        clock: Clock,
        limits: NodeLimits,
        lose: Callable[[Session, int, str], None],
        kick: Callable[[Session, int, str], None],
    ) -> None:
        self._pool = pool
        self._acks = acks
        self._flusher = flusher
        self._catchup = catchup
        self._clock = clock
        self._limits = limits
        self._lose = lose
        self._kick = kick
        self._by_slot: dict[int, Session] = {}
        self._retrying: set[Session] = set()
        self.delivered = 0
        """MSG frames written live."""
        self.moved = 0
        """Deliveries to users who are not here."""
        self.malformed = 0
        self.probes = 0
        self.late = 0
        """Frames whose ack timed out."""

    # ------------------------------------------------------------------------------------------- inbox

    async def run(self, reader: Reader) -> None:
        """Until the reader is closed."""
        while records := await reader.read(self._limits.inbox_batch):
            wall_ms, mono_ms = self._clock.wall_ms(), self._clock.mono_ms()
            reader.settle_all([one for one in records if not self._take(one, wall_ms, mono_ms)])
            if len(records) == self._limits.inbox_batch:
                # A reader with a backlog never waits: acks must be read, or every window is full for nothing.
                await asyncio.sleep(0)

    def _take(self, record: Record, wall_ms: int, mono_ms: int) -> bool:
        """One record. False: nothing is to be waited for, it may be settled."""
        try:
            found: InboxRecord = decode_inbox(record.value)
        except MALFORMED:
            self.malformed += 1
            return False
        if type(found) is Deliver:
            entry = Entry(record)
            self._deliver(entry, found, wall_ms, mono_ms)
            return entry.holds > 0
        if type(found) is Reply:
            self._reply(found, mono_ms)
        elif type(found) is Nudge:
            self._nudge(found)
        elif type(found) is Mark:
            self._mark(found)
        elif type(found) is Kick:
            self._kick_out(found)
        return False

    # ------------------------------------------------------------------------------------------ deliver

    def _deliver(self, entry: Entry, found: Deliver, wall_ms: int, mono_ms: int) -> None:
        expired = found.loss_time_ms != 0 and is_expired(found.loss_time_ms, wall_ms)
        for user in found.users:
            own = user == found.sender
            covered = waits = False
            for session in self._pool.of_user(user).values():
                if session.id == found.skip_session:
                    continue
                if not expired and self._writable(session, found):
                    self._write(entry, session, found, own, mono_ms)
                    covered = True
                else:
                    waits = waits or session.link is not None
                    self._put_behind(session, found, mono_ms)
            if own or covered:
                continue
            if not waits:
                self.moved += 1
            entry.holds += 1
            # Expired, or moved elsewhere: dispatch decides now. Otherwise the stream is on its way, and the
            # row only stands in for it.
            due_at_ms = wall_ms if expired or not waits else wall_ms + self._limits.ack_timeout_ms
            self._flusher.ask_due(user, found.conv, found.seq, due_at_ms, urgent=expired or not waits)
            self._flusher.release(entry)

    def _writable(self, session: Session, found: Deliver) -> bool:
        if session.syncing or found.conv in session.behind:
            return False
        return self.has_room(session, len(found.tail) + MSG_PREFIX_BYTES)

    def _write(self, entry: Entry, session: Session, found: Deliver, own: bool, mono_ms: int) -> None:
        tag = session.tag = session.tag + 1
        link = session.link
        assert link is not None
        link.send_msg(tag, False, found.tail)
        parcel = Parcel(
            session, found.conv, found.seq, found.seq, found.msg_id, None if own else _ACKED, found.tail,
            is_msg=True, entry=entry,
        )  # fmt: skip
        entry.holds += 1
        self.delivered += 1
        self._acks.insert(
            session.ack_slot, tag, found.msg_id, parcel, len(found.tail) + MSG_PREFIX_BYTES,
            mono_ms + self._limits.ack_timeout_ms,
        )  # fmt: skip

    def _put_behind(self, session: Session, found: Deliver, mono_ms: int) -> None:
        """Everything before found.seq was written live when the conversation is LEVEL on a connection."""
        if session.note_live(found.conv, found.seq):
            heard = session.behind[found.conv]
            idle = heard.paused and not heard.retry_mono_ms and session.link is not None
            if idle and self._watched_here(session):
                # The repeats had ended; what is new begins them again.
                session.retries.pop(found.conv, None)
                self._repeat_later(session, found.conv, heard, mono_ms)
            return
        known = session.link is not None and not session.syncing
        session.put_behind(found.conv, found.seq, found.seq - 1 if known else CURSOR)
        if known:
            observe.BEHIND.labels("window").inc()
            if session.full_since_mono_ms == 0 and not self.has_room(session):
                session.full_since_mono_ms = mono_ms
            self._catchup.wake(session)

    def has_room(self, session: Session, more_bytes: int = 0) -> bool:
        """Whether one more frame may be under way to this session. An empty window takes any."""
        link = session.link
        if link is None or link.overflow:
            return False
        messages, size = self._acks.unacked(session.ack_slot)
        limits = self._limits
        fits = size + more_bytes <= limits.window_bytes or messages == 0
        return messages < limits.window_messages and fits

    # -------------------------------------------------------------------------------------- other records

    def _reply(self, found: Reply, mono_ms: int) -> None:
        """SENT and refusals, for the session that sent; if it is gone, its resend brings them again."""
        session = self._pool.find(found.session)
        link = None if session is None or session.user != found.user else session.open_link
        if session is None or link is None:
            return
        for run in _contiguous(found.sent) if len(found.sent) > 1 else (found.sent,) if found.sent else ():
            if session.syncing or found.conv in session.behind:
                self._sent_behind(session, link, found, run)
            else:
                self.post(session, _sent(session, found.conv, found.epoch, run), mono_ms)
        for refusal in found.refused:
            refuse(link, found.conv, refusal)

    def _sent_behind(self, session: Session, link: Link, found: Reply, run: list[SentItem]) -> None:
        """SENT of a conversation that is BEHIND has no tag; the stream brings the message itself under one.

        The client holds it until the stream has come so far. With a tag it would hold back the cumulative ack
        of that very stream: a full window, and nobody could move.
        """
        link.send(encode(Sent(0, found.conv, found.epoch, run)))
        if not session.note_live(found.conv, run[-1].seq):
            session.put_behind(found.conv, run[-1].seq, CURSOR)
            self._catchup.wake(session)

    def post(self, session: Session, parcel: Parcel, mono_ms: int) -> None:
        """Write a tagged frame that is not a MSG; parcel.data was encoded with the session's newest tag."""
        link = session.link
        assert link is not None
        link.send(parcel.data)
        self._acks.insert(
            session.ack_slot, session.tag, parcel.msg_id, parcel, len(parcel.data),
            mono_ms + self._limits.ack_timeout_ms,
        )  # fmt: skip

    def write_stream(self, session: Session, message: Message, tail: bytes, *, dup: bool) -> None:
        """Write a stored message of a conversation that is BEHIND; has_room was asked."""
        link = session.link
        assert link is not None
        tag = session.next_tag()
        link.send_msg(tag, dup, tail)
        obliged = message.sender != session.user and message.kind < FIRST_EVENT_KIND
        parcel = Parcel(
            session, message.conv, message.seq, message.seq, message.msg_id,
            _ACKED if obliged else None, tail, is_msg=True,
        )  # fmt: skip
        self._acks.insert(
            session.ack_slot, tag, message.msg_id, parcel, len(tail) + MSG_PREFIX_BYTES,
            self._clock.mono_ms() + self._limits.ack_timeout_ms,
        )  # fmt: skip

    def _nudge(self, found: Nudge) -> None:
        for session in self._pool.of_user(found.user).values():
            heard = session.behind.get(found.conv)
            under_way = self._under_way(session, found.conv) if heard is None else 0
            if under_way:
                # Its acks, or their absence, tell soon enough; a hole below shows when they are flushed.
                # What is above may never have been heard of here.
                session.put_behind(found.conv, 0, under_way)
            elif heard is None or heard.paused or session.link is None:
                session.put_behind(found.conv, 0, CURSOR, dup=True)
                observe.BEHIND.labels("nudge").inc()
            self._catchup.wake(session)

    def _under_way(self, session: Session, conv: str) -> int:
        """The highest seq of the conversation that is written and not acknowledged, 0 for none. O(window)."""
        if session.link is None:
            return 0
        parcels = self._acks.items(session.ack_slot)
        return max(
            (
                item.to_seq
                for _, item in parcels
                if isinstance(item, Parcel) and item.conv == conv and item.is_msg
            ),
            default=0,
        )

    def _mark(self, found: Mark) -> None:
        frame = encode(ReadMark(found.conv, found.user, found.seq))
        for user in found.to_users:
            for session in self._pool.of_user(user).values():
                if session.link is not None and not session.joining and session.id != found.skip_session:
                    session.link.send(frame)

    def _kick_out(self, found: Kick) -> None:
        session = self._pool.find(found.session)
        if session is not None and session.generation <= found.generation:
            self._kick(session, found.code, found.reason)

    # --------------------------------------------------------------------------------------------- acks

    def on_acked(self) -> None:
        """Once per tick: what the core resolved goes into the next flush."""
        settled = self._flusher.settled
        woken: dict[Session, None] = {}
        for _, item in self._acks.drain():
            assert isinstance(item, Parcel)
            settled(item)
            session = item.session
            if item.version > session.level_version:
                session.level_version = item.version
            woken[session] = None
        self._flusher.wake()
        for session in woken:
            session.full_since_mono_ms = 0
            if session.behind:
                self._resume_paused(session)
                self._catchup.wake(session)

    def _resume_paused(self, session: Session) -> None:
        """Progress: the peer acknowledges after all."""
        session.retries.clear()
        self._retrying.discard(session)
        for conv, heard in session.behind.items():
            if heard.paused:
                session.put_behind(conv, heard.upto, CURSOR)

    def on_gap(self, user: str, device: str, conv: str, head: int) -> None:
        """The store could not move the cursor: something below was never acknowledged."""
        session = self._pool.of_device(user, device)
        if session is not None and conv not in session.behind:
            session.put_behind(conv, head, CURSOR, dup=True)
            observe.BEHIND.labels("gap").inc()
            self._catchup.wake(session)

    # -------------------------------------------------------------------------------- connections come and go

    def attach(self, session: Session, link: Link, acked_tag: int) -> None:
        """Give the session a connection; what its ring holds above acked_tag is written again.

        Raises PeerError("bad_ack") for a tag that was never sent; the session is then unchanged.
        """
        if acked_tag > session.tag:
            raise PeerError("bad_ack", f"tag is {acked_tag}; the last one sent was {session.tag}")
        slot = self._acks.open()
        mono_ms = self._clock.mono_ms()
        ring, session.ring = session.ring, []
        try:
            self._refill(session, slot, ring, mono_ms)
            if acked_tag:
                self._acks.ack_to(slot, acked_tag)
        except BaseException:
            session.ring = ring
            self._acks.close(slot)
            raise
        session.ack_slot = slot
        session.link = link
        session.probed_mono_ms = session.asked_mono_ms = 0
        session.full_since_mono_ms = 0
        session.replayed.clear()
        for _, parcel in ring:
            if parcel.conv:
                session.replayed.setdefault(parcel.conv, []).append((parcel.from_seq, parcel.to_seq))
        self._by_slot[slot] = session

    def _refill(self, session: Session, slot: int, ring: list[tuple[int, Parcel]], mono_ms: int) -> None:
        """Tags are consecutive in the table: those that were acknowledged one by one become holes.

        A hole leaves the window at once; it is there so that an ack of its tag, late or repeated, is known.
        """
        if session.tag == 0:
            return
        deadline_ms = mono_ms + self._limits.ack_timeout_ms
        held = dict(ring)
        for tag in range(ring[0][0] if ring else session.tag, session.tag + 1):
            parcel = held.get(tag)
            if parcel is None:
                hole = Parcel(session, "", 0, 0, 0, None, b"", is_msg=False)
                self._acks.insert(slot, tag, 0, hole, 0, mono_ms)
            else:
                self._acks.insert(slot, tag, parcel.msg_id, parcel, len(parcel.data), deadline_ms)
        self._acks.take_overdue(slot, mono_ms)

    def replay(self, session: Session) -> int:
        """Write what is under way once more, after HELLO; returns how many frames."""
        link = session.link
        assert link is not None
        count = 0
        for tag, item in self._acks.items(session.ack_slot):
            assert isinstance(item, Parcel)
            if item.is_msg:
                link.send_msg(tag, True, item.data)
            elif item.data:
                link.send(item.data)
            else:
                continue
            count += 1
        return count

    def detach(self, session: Session, due_at_ms: int, reason: str, *, urgent: bool) -> None:
        """The connection is gone: what was under way is kept for a replay and stands in due rows."""
        slot = session.ack_slot
        session.link = None
        session.ack_slot = -1
        del self._by_slot[slot]
        self._retrying.discard(session)
        # Without LEVEL: the list before it had no tag and may be lost. The next sync tells both.
        session.ring = [
            (tag, item) for tag, item in self._acks.items(slot) if isinstance(item, Parcel) and item.conv
        ]
        self._acks.close(slot)
        parcels = [parcel for _, parcel in session.ring]
        self._move(session, parcels, due_at_ms, reason, urgent=urgent, tell=urgent)

    def _move(
        self,
        session: Session,
        parcels: list[Parcel],
        due_at_ms: int,
        reason: str,
        *,
        urgent: bool,
        tell: bool,
    ) -> dict[str, int]:
        """Due rows for what was not acknowledged. Returns conversation -> highest seq."""
        flusher = self._flusher
        lowest: dict[str, int] = {}
        highest: dict[str, int] = {}
        for parcel in parcels:
            conv = parcel.conv
            if conv:
                highest[conv] = max(parcel.to_seq, highest.get(conv, 0))
                if parcel.fate is not None:
                    lowest[conv] = min(parcel.from_seq, lowest.get(conv, parcel.from_seq))
        for conv, from_seq in lowest.items():
            flusher.ask_due(session.user, conv, from_seq, due_at_ms, urgent=urgent)
            if tell:
                flusher.tell_undelivered(session.user, session.device, conv, from_seq, reason)
        for parcel in parcels:
            if parcel.entry is not None:
                flusher.release(parcel.entry)
                parcel.entry = None
        return highest

    # ------------------------------------------------------------------------------------------- timers

    def sweep(self, mono_ms: int) -> None:
        """Late acks, slow peers, and repeats for devices that only the node watches over."""
        limits = self._limits
        ahead_ms = limits.ack_timeout_ms - limits.probe_ms
        if self._acks.count:
            for slot in self._acks.overdue(mono_ms + ahead_ms, self._acks.count):
                session = self._by_slot.get(slot)
                if session is None or session.link is None:
                    raise UsageError(f"ack slot {slot} is late and no connected session holds it")
                if not session.joining:
                    self._look(session, session.link, mono_ms)
        for session in list(self._by_slot.values()):
            full_since_ms = session.full_since_mono_ms
            if full_since_ms and mono_ms - full_since_ms >= limits.slow_ms:
                observe.EVICTIONS.labels("slow").inc()
                self._lose(session, CloseCode.SLOW, "slow")
        for session in list(self._retrying):
            self._retry(session, mono_ms)

    def _look(self, session: Session, link: Link, mono_ms: int) -> None:
        """A frame of the session has waited for its ack for probe_ms or longer."""
        limits = self._limits
        if session.asked_mono_ms and link.last_recv_ms() >= session.asked_mono_ms:
            session.asked_mono_ms = 0
        late = self._acks.oldest_deadline(session.ack_slot) <= mono_ms
        patience_ms = limits.ack_timeout_ms - limits.probe_ms - (2 * limits.sweep_ms if late else 0)
        if session.asked_mono_ms and mono_ms - session.asked_mono_ms >= patience_ms:
            # Nothing came, not even an answer to the probe: the peer is gone, whatever TCP believes. What it
            # said before the probe is no sign of life: the ack of an earlier message crosses this one.
            observe.EVICTIONS.labels("half_open").inc()
            self._lose(session, CloseCode.HALF_OPEN, "half_open")
            return
        if mono_ms - session.probed_mono_ms >= limits.probe_ms:
            session.probed_mono_ms = mono_ms
            session.asked_mono_ms = session.asked_mono_ms or mono_ms
            self.probes += 1
            link.send(_PROBE)
        if late:
            self._late(session, mono_ms)
            self._catchup.wake(session)  # the window has room for other conversations now

    def _late(self, session: Session, mono_ms: int) -> None:
        """The peer lives and does not acknowledge: due rows, and its conversations pause."""
        late = self._acks.take_overdue(session.ack_slot, mono_ms)
        parcels = [item for item in late if isinstance(item, Parcel)]
        self.late += len(parcels)
        now_ms = self._clock.wall_ms()
        parcels = [parcel for parcel in parcels if not self._covered(session, parcel)]
        # Not urgent: a row that stands keeps its back-off, or every late frame would cost an attempt.
        moved = self._move(session, parcels, now_ms, "timeout", urgent=False, tell=True)
        for conv, highest in moved.items():
            heard = session.put_behind(conv, highest, CURSOR, dup=True, paused=True)
            owed = [parcel.from_seq for parcel in parcels if parcel.conv == conv and parcel.fate is not None]
            heard.covered = min(filter(None, (heard.covered, *owed)), default=0)
            session.replayed.pop(conv, None)
            observe.BEHIND.labels("timeout").inc()
            if self._watched_here(session):
                self._repeat_later(session, conv, heard, mono_ms)

    def _covered(self, session: Session, parcel: Parcel) -> bool:
        """Whether the row that was asked for when its conversation was paused covers a late frame too.

        One for each would be the store's whole work: 4,000 a second for a thousand peers that do not read.
        """
        heard = session.behind.get(parcel.conv)
        if heard is None or not heard.covered or parcel.from_seq < heard.covered:
            return False
        heard.upto = max(heard.upto, parcel.to_seq)
        if parcel.entry is not None:
            self._flusher.release(parcel.entry)
            parcel.entry = None
        return True

    def _repeat_later(self, session: Session, conv: str, heard: Heard, mono_ms: int) -> None:
        retries = session.retries.get(conv, 0)
        if retries < len(self._limits.backoff_ms):
            session.retries[conv] = retries + 1
            heard.retry_mono_ms = mono_ms + self._limits.backoff_ms[retries]
            self._retrying.add(session)

    def _watched_here(self, session: Session) -> bool:
        """Another device of the user may have acknowledged: no due row will nudge this one."""
        return any(
            other is not session and other.link is not None
            for other in self._pool.of_user(session.user).values()
        )

    def _retry(self, session: Session, mono_ms: int) -> None:
        waits = False
        for conv, heard in session.behind.items():
            if heard.paused and heard.retry_mono_ms:
                if heard.retry_mono_ms <= mono_ms:
                    heard.retry_mono_ms = 0
                    session.put_behind(conv, heard.upto, CURSOR, dup=True)
                    self._catchup.wake(session)
                else:
                    waits = True
        if not waits:
            self._retrying.discard(session)


def _contiguous(sent: list[SentItem]) -> list[list[SentItem]]:
    """A frame's results by runs of seqs without a hole: repeated ones may stand apart."""
    runs: list[list[SentItem]] = []
    for item in sent:
        if runs and runs[-1][-1].seq + 1 == item.seq:
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def _sent(session: Session, conv: str, epoch: int, items: list[SentItem]) -> Parcel:
    tag = session.next_tag()
    frame = encode(Sent(tag, conv, epoch, items))
    return Parcel(session, conv, items[0].seq, items[-1].seq, 0, None, frame, is_msg=False)


def refuse(link: Link, conv: str, refusal: Refusal) -> None:
    """The ERROR frame for one message of a SEND."""
    observe.ERRORS_SENT.labels(refusal.code).inc()
    link.send(
        encode(
            Error(
                int(Op.SEND), refusal.code, refusal.detail, refusal.retryable, refusal.retry_after_ms,
                refusal.client_id, 0, conv,
            )
        )
    )  # fmt: skip
