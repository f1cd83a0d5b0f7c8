"""What a device makes of the server's frames and the app's wishes. Sans-I/O: frames and clocks go in, a batch
for the local store and frames for the server come out.

Hides the rules of docs/protocol.md: order, acks, tags, resuming, lists, read marks. One turn of the client is

    take(frame)… add(unsent)… tick()  ─▶  drain(): Batch  ─▶  store.commit  ─▶  committed()  ─▶  out: frames

What is applied in memory and could not be committed is void: the client throws the device away and makes a
new one from the store.

V1  nothing is acknowledged before its batch is committed                  tests/unit/test_client_device.py
V2  user_cursor is stored only when nothing of what came before is missing     same
V3  a SEND leaves only when its messages are committed                     same
V4  tags that the server sent and this device never saw end the session        same
Source: docs/protocol.md; semantics.
"""

from __future__ import annotations

import random
from typing import Final

import msgspec

from fastim import protocol as p
from fastim.client import rows
from fastim.client.events import (
    Connected,
    ConvChanged,
    Delivery,
    Event,
    Gone,
    Message,
    ReadMark,
    StateChanged,
)
from fastim.client.localstore import Batch, ConvRow, Reset, Snapshot, Ticket
from fastim.client.ordering import Ordering, Outcome
from fastim.client.outbox import Outbox, Unsent
from fastim.client.tags import Tags
from fastim.clock import Clock
from fastim.errors import Unavailable
from fastim.model import SkipReason, is_expired

ACK_DELAY_MS: Final = 100
"""Well below the 200 ms of the protocol: the rest belongs to the disk and the network."""
ACK_EVERY: Final = 32
CONVS_RETRY_MS: Final = 5_000
MAX_PARKED: Final = 1_024
"""The server's window (128) keeps it far below; a server that ignores its window only costs disk."""


class Own(msgspec.Struct, frozen=True, gc=False):
    """An accepted message of this device on its way into the order."""

    unsent: Unsent
    item: p.SentItem


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """Something that takes a place in a conversation, and the tag that waits for it (0: none)."""

    tag: int
    what: p.Msg | p.Skip | Own | None
    """None: only the seq is known."""


class Device:
    """One device of one user, from a snapshot of its store on."""

    def __init__(self, snapshot: Snapshot, clock: Clock, rng: random.Random) -> None:
        self._clock = clock
        self.ticket = snapshot.ticket
        self.rows = {row.conv: row for row in snapshot.convs}
        self.reads: dict[str, dict[str, int]] = {}
        for conv, user, seq in snapshot.reads:
            self.reads.setdefault(conv, {})[user] = seq
        self.ordering: Ordering[Arrival] = Ordering()
        for row in snapshot.convs:
            self.ordering.load(row.conv, row.epoch, row.last)
        self.outbox = Outbox(rng, p.MAX_PACKET_BYTES)
        self.refused: dict[bytes, Unsent] = {}
        """Waiting for the app to look at them."""
        for unsent in snapshot.outbox:
            if unsent.refused:
                self.refused[unsent.client_id] = unsent
            else:
                self.outbox.add(unsent)
        self.sends = max((unsent.n for unsent in snapshot.outbox), default=0)
        self.tags = Tags(self.ticket.tag)

        self.live = False
        self.level = False
        """Everything that the server had for this device at its last LEVEL is stored."""
        self.clogged = False
        """The client says: the socket does not take more. Nothing new is sent."""
        self.heartbeat_ms = 0
        self.wrong_store = False
        """The token is of another user than the store."""
        self.fault = ""
        """Why this connection cannot go on, "" while it can."""
        self.refusal: p.Error | None = None
        """The ERROR that refused AUTH."""
        self.kicked: p.Kicked | None = None
        self.goaway: p.Goaway | None = None
        self.token_ends_ms = 0
        self.out: list[p.Frame] = []
        self.signals: list[Event] = []
        """For the app, after the commit. Messages are not in here: they are in the feed."""
        self.answers: list[tuple[int, p.HistoryPage | p.Error]] = []
        """(req, answer), after the commit."""
        self.recounts: set[str] = set()
        """Conversations whose unread count only the store can tell, after the commit."""

        self._full = False
        """The client says: the app is too far behind. Messages wait here, unacknowledged."""
        self._parked: list[p.Msg | p.Skip] = []
        self._batch = Batch()
        self._server_ahead_of_mono_ms: int | None = None
        self._committed_tag = self.ticket.tag
        self._acked_tag = self.ticket.tag
        self._ack_due_ms = 0
        self._level_seen = self.ticket.user_cursor
        self._level_waiting = -1
        """A LEVEL that is not stored yet; its cursor is 0 for a user of whom nothing is known."""
        self._behind_beats = 0
        self._asked_convs_ms = 0
        self._convs_req = 0
        self._pages_from = 0
        self._reqs = 0
        self._pages: dict[int, str] = {}
        """req -> conversation of HISTORY requests that extend what is held downwards."""
        self._tell_reads: set[str] = {row.conv for row in snapshot.convs if row.read > row.read_told}
        self._retry_reads_ms = 0

    # ------------------------------------------------------------------------------------------ for the app

    @property
    def user(self) -> str:
        return self.ticket.user

    def server_now_ms(self) -> int:
        """The server's clock; before the first HELLO, this machine's."""
        if self._server_ahead_of_mono_ms is None:
            return self._clock.wall_ms()
        return self._clock.mono_ms() + self._server_ahead_of_mono_ms

    def keep_time(self, other: Device) -> None:
        """The server's clock as another device of this client knew it."""
        self._server_ahead_of_mono_ms = other._server_ahead_of_mono_ms

    def add(self, unsent: Unsent) -> None:
        """A message of the app; it is sent once it is committed."""
        self._batch.queued.append(unsent)

    def entries(self) -> list[Unsent]:
        """The outbox, refused messages included, oldest first."""
        return sorted((*self.outbox.entries(), *self.refused.values()), key=lambda unsent: unsent.n)

    def discard(self, client_id: bytes) -> Unsent | None:
        """Take a message out of the outbox. It may have been stored by the server all the same."""
        unsent = self.outbox.remove(client_id) or self.refused.pop(client_id, None)
        if unsent is not None:
            self._batch.closed.append(client_id)
        return unsent

    def read(self, conv: str, seq: int, *, private: bool) -> None:
        """The user has seen everything up to seq, on this device. Only forward, and to what is here."""
        row = self.rows[conv]
        seq = min(seq, row.last)
        if seq > row.read:
            row.read, row.read_private = seq, private
            self._tell_reads.add(conv)
            self._count_above(row, -1)
            self._changed(row)

    def _count_above(self, row: ConvRow, told: int) -> None:
        if rows.count_above(row, told):
            self.recounts.add(row.conv)

    def recounted(self, conv: str, unread: int) -> None:
        """The answer to `recounts`."""
        row = self.rows[conv]
        if row.unread != unread:
            row.unread = unread
            self._changed(row)

    def ask_history(self, conv: str, before_seq: int, limit: int) -> int:
        """Returns the req under which the answer comes. Raises Unavailable when there is no connection."""
        if not self.live:
            raise Unavailable("server", "not connected")
        self._reqs += 1
        row = self.rows.get(conv)
        if row is not None and before_seq == row.start + 1:
            self._pages[self._reqs] = conv
        self.out.append(p.History(self._reqs, conv, before_seq, 0, 0, 0, limit))
        return self._reqs

    # ------------------------------------------------------------------------------------------- connection

    def auth(self, token: str, device: str, device_class: str, agent: str) -> p.Auth:
        """The first frame of a connection."""
        ticket = self.ticket
        self._pages_from = ticket.user_cursor
        return p.Auth(
            p.VERSION, p.VERSION, token, device, device_class, ticket.session,
            ticket.tag if ticket.session else 0, ticket.user_cursor, agent,
        )  # fmt: skip

    def lost(self) -> None:
        """The connection is gone, and everything that came on it was taken."""
        if self.live and self.tags.floor > self.ticket.tag:
            self._ticket().tag = self.tags.floor
        self.live = self.level = False
        self.clogged = False
        self.fault = ""
        self.refusal = None
        self.kicked = None
        self.goaway = None
        self.out.clear()
        self._ack_due_ms = 0
        self._pages.clear()
        self._parked.clear()
        self._level_waiting = -1
        self.ordering.lost()

    def forget_session(self) -> None:
        """The next AUTH asks for a new session: this one has lost frames."""
        self._ticket().session = ""

    def take(self, frame: p.Frame) -> None:
        """One frame of the server, in order."""
        match frame:
            case p.Msg() | p.Skip():
                self._tagged(frame.tag)
                if self._full and len(self._parked) < MAX_PARKED:
                    self._parked.append(frame)
                else:
                    self._content(frame)
            case p.Sent():
                self._sent(frame)
            case p.Level():
                self._level(frame)
            case p.Pong():
                self._pong(frame)
            case p.ReadMark():
                self._read_mark(frame)
            case p.Changes():
                self._changes(frame)
            case p.Error():
                self._error(frame)
            case p.Hello():
                self._hello(frame)
            case p.HistoryPage():
                self._history_page(frame)
            case p.Head():
                self._tagged(frame.tag)
                self._heard(frame.conv, 0, frame.seq, Arrival(frame.tag, None))
            case p.Goaway():
                self.goaway = frame
            case p.Kicked():
                self.kicked = frame
            case p.Refreshed():
                self.token_ends_ms = frame.expires_ms
            case _:
                self.unknown()

    def unknown(self) -> None:
        """A frame that this version does not know; it may have carried a tag."""
        self.tags.unknown()

    def _hello(self, frame: p.Hello) -> None:
        ticket = self.ticket
        if ticket.user and ticket.user != frame.user:
            self.fault = f"the local store belongs to {ticket.user!r}; the token is of {frame.user!r}"
            self.wrong_store = True
            return
        self.live = True
        self._server_time(frame.server_ms)
        self.heartbeat_ms = frame.heartbeat_ms
        hot = frame.resumed == 1
        changed = self._ticket()
        changed.user, changed.session = frame.user, frame.session
        if not hot:
            changed.tag = 0
        self.tags.begin(changed.tag, hot=hot)
        self._committed_tag = self._acked_tag = changed.tag
        self._behind_beats = 0
        self._convs_req = 0
        self.outbox.max_frame_bytes = min(frame.max_packet_bytes, p.MAX_PACKET_BYTES)
        self.outbox.connected(self._clock.mono_ms())
        self._tell_reads.update(row.conv for row in self.rows.values() if row.read > row.read_told)
        self.signals.append(Connected(frame.user, frame.session, frame.resumed))

    def _server_time(self, server_ms: int) -> None:
        self._server_ahead_of_mono_ms = server_ms - self._clock.mono_ms()

    def _pong(self, frame: p.Pong) -> None:
        self._server_time(frame.server_ms)
        if not self.tags.complete(frame.last_tag):
            self.fault = f"frames were lost: tag {self.tags.seen} of {frame.last_tag} arrived"
        for conv, seq in frame.heads:
            self._heard(conv, 0, seq, None)
        quiet = self.tags.quiet()
        if frame.user_cursor <= self._level_seen or not quiet:
            self._behind_beats = 0
            return
        self._behind_beats += 1
        if self._behind_beats >= 2:
            # Something changed and for a whole beat nothing came of it.
            self._behind_beats = 0
            self._pages_from = self.ticket.user_cursor
            self.out.append(p.Sync(self.ticket.user_cursor))

    # ------------------------------------------------------------------------------------------------ order

    def _tagged(self, tag: int) -> None:
        if not self.tags.received(tag):
            self.fault = f"frames were lost: tag {tag} came after {self.tags.seen}"

    def _content(self, frame: p.Msg | p.Skip) -> None:
        first, last = (frame.seq, frame.seq) if isinstance(frame, p.Msg) else (frame.from_seq, frame.to_seq)
        self._place(frame.conv, frame.epoch, first, last, Arrival(frame.tag, frame))

    def set_full(self, full: bool) -> None:
        """Whether the app is too far behind. What waited for it is taken when it is not."""
        self._full = full
        if not full and self._parked:
            parked, self._parked = self._parked, []
            for frame in parked:
                self._content(frame)

    @property
    def full(self) -> bool:
        return self._full

    def _place(self, conv: str, epoch: int, from_seq: int, to_seq: int, arrival: Arrival) -> None:
        known = self.ordering.last(conv) is not None
        out = self.ordering.offer(conv, epoch, from_seq, to_seq, arrival, self._clock.mono_ms())
        self._outcome(conv, out)
        if not known and self.ordering.last(conv) is None:
            self._ask_convs()

    def _heard(self, conv: str, epoch: int, seq: int, arrival: Arrival | None) -> None:
        self._outcome(conv, self.ordering.heard(conv, epoch, seq, arrival, self._clock.mono_ms()))

    def _outcome(self, conv: str, out: Outcome[Arrival]) -> None:
        row = self.rows.get(conv)
        if out.reset and row is not None:
            self._batch.feed.append(Reset(conv))
            self._batch.pages = [message for message in self._batch.pages if message.conv != conv]
            rows.restart(row)
        for arrival in out.done:
            self.tags.stored(arrival.tag)
            if isinstance(arrival.what, Own):
                self._batch.closed.append(arrival.what.unsent.client_id)
        last = self.ordering.last(conv)
        if last is None:
            return
        if row is None:
            row = self._new_row(conv, out.applied[0][0] - 1 if out.applied else last)
        for from_seq, to_seq, arrival in out.applied:
            self._apply(row, from_seq, to_seq, arrival)
        if out.applied or out.reset:
            row.epoch = self.ordering.epoch(conv)
            self._changed(row)

    def _new_row(self, conv: str, start: int) -> ConvRow:
        row = ConvRow(conv, self.ordering.epoch(conv), start, start, counted=start, head=start)
        self.rows[conv] = row
        return row

    def _changed(self, row: ConvRow) -> None:
        self._batch.convs[row.conv] = row
        self.signals.append(ConvChanged(row.conv))

    def _apply(self, row: ConvRow, from_seq: int, to_seq: int, arrival: Arrival) -> None:
        """from_seq..to_seq is next: into the batch, for the feed."""
        what = arrival.what
        self.tags.stored(arrival.tag)
        row.last = to_seq
        row.head = max(row.head, to_seq)
        match what:
            case p.Msg():
                self._outgoing_arrived(what)
                message = Message(
                    row.conv, what.seq, what.msg_id, what.sender, what.client_id, what.kind, what.body,
                    what.ts_ms, what.loss_time_ms, what.flags, tuple(what.mentions), what.epoch, what.cseq,
                )  # fmt: skip
            case Own():
                unsent, item = what.unsent, what.item
                self._batch.closed.append(unsent.client_id)
                message = Message(
                    row.conv, item.seq, item.msg_id, self.user, unsent.client_id, unsent.kind, unsent.body,
                    item.ts_ms, unsent.loss_time_ms, unsent.flags, unsent.mentions,
                    self.ordering.epoch(row.conv),
                )  # fmt: skip
            case p.Skip():
                self._batch.feed.append(Gone(row.conv, from_seq, to_seq, what.reason))
                return
            case None:
                return
        if is_expired(message.loss_time_ms, self.server_now_ms()):
            self._batch.feed.append(Gone(row.conv, from_seq, to_seq, SkipReason.EXPIRED))
        else:
            self._batch.feed.append(message)
        rows.note_message(row, message, self.user)

    # -------------------------------------------------------------------------------------------- own sends

    def _sent(self, frame: p.Sent) -> None:
        self._tagged(frame.tag)
        items = sorted(frame.items, key=lambda item: item.seq)
        for number, item in enumerate(items, 1):
            tag = frame.tag if number == len(items) else 0
            unsent = self._accepted(item.client_id, frame.conv, item.seq, item.msg_id)
            if unsent is None:
                # Answered before, or of a life whose store is gone: then its body has to be pulled.
                self._heard(frame.conv, frame.epoch, item.seq, Arrival(tag, None))
            else:
                arrival = Arrival(tag, Own(unsent, item))
                self._place(frame.conv, frame.epoch, item.seq, item.seq, arrival)

    def _accepted(self, client_id: bytes, conv: str, seq: int, msg_id: int) -> Unsent | None:
        unsent = self.outbox.remove(client_id) or self.refused.pop(client_id, None)
        if unsent is not None:
            self.signals.append(StateChanged(client_id, conv, Delivery.SENT, seq, msg_id))
        return unsent

    def _outgoing_arrived(self, what: p.Msg) -> None:
        """An own message that comes as MSG: of another device, or its SENT was lost."""
        if what.sender == self.user:
            self._accepted(what.client_id, what.conv, what.seq, what.msg_id)
            self._batch.closed.append(what.client_id)

    def _error(self, frame: p.Error) -> None:
        match frame.op:
            case p.Op.AUTH:
                self.refusal = frame
            case p.Op.SEND:
                for unsent in self.outbox.refused(frame, self._clock.mono_ms()):
                    self.refused[unsent.client_id] = unsent
                    self._batch.refused.append(unsent)
                    self.signals.append(
                        StateChanged(
                            unsent.client_id,
                            unsent.conv,
                            Delivery.REFUSED,
                            code=frame.code,
                            detail=frame.detail,
                        )
                    )
            case p.Op.HISTORY:
                self._pages.pop(frame.req, None)
                self.answers.append((frame.req, frame))
            case p.Op.CONVS:
                self._convs_req = 0
            case p.Op.READ if frame.retryable:
                self._tell_reads.add(frame.conv)
                self._retry_reads_ms = self._clock.mono_ms() + max(frame.retry_after_ms, 1_000)
            case p.Op.READ:
                row = self.rows.get(frame.conv)
                if row is not None:
                    row.read_told = row.read
                    self._batch.convs[row.conv] = row
            case _:
                pass

    # -------------------------------------------------------------------------------- lists and read marks

    def _level(self, frame: p.Level) -> None:
        self._tagged(frame.tag)
        self.tags.stored(frame.tag)
        self._level_seen = max(self._level_seen, frame.user_cursor)
        self._level_waiting = max(self._level_waiting, frame.user_cursor)
        if self.ticket.list_cursor < frame.user_cursor:
            self._ask_convs()

    def _ask_convs(self) -> None:
        """The list from where it is known, once at a time."""
        now_ms = self._clock.mono_ms()
        if self._convs_req and now_ms < self._asked_convs_ms + CONVS_RETRY_MS:
            return
        self._asked_convs_ms = now_ms
        self._reqs += 1
        self._convs_req = self._reqs
        self.out.append(p.Convs(self._convs_req, self.ticket.list_cursor))

    def _changes(self, frame: p.Changes) -> None:
        for item in frame.items:
            self._change(item)
        if frame.req and frame.req != self._convs_req:
            return
        if frame.req == 0 and self._pages_from > self.ticket.list_cursor:
            return  # these pages began above what the list has
        if frame.user_cursor > self.ticket.list_cursor:
            self._ticket().list_cursor = frame.user_cursor
        if frame.req:
            self._convs_req = 0
            if frame.more:
                self._ask_convs()

    def _change(self, item: p.ConvChange) -> None:
        conv, mono_ms = item.conv, self._clock.mono_ms()
        if self.ordering.last(conv) is None:
            self._outcome(conv, self.ordering.start(conv, item.epoch, item.cursor, mono_ms))
        elif item.epoch and self.ordering.epoch(conv) not in (0, item.epoch):
            self._outcome(conv, self.ordering.heard(conv, item.epoch, item.head, None, mono_ms))
        row = self.rows.get(conv) or self._new_row(conv, self.ordering.last(conv) or 0)
        if item.limited and item.cursor > row.last:
            gap = p.Skip(0, conv, row.last + 1, item.cursor, SkipReason.RETENTION, item.epoch)
            self._place(conv, item.epoch, row.last + 1, item.cursor, Arrival(0, gap))
        if rows.merge(row, item):
            row.epoch = self.ordering.epoch(conv)
            self._changed(row)

    def _read_mark(self, frame: p.ReadMark) -> None:
        row = self.rows.get(frame.conv)
        if frame.user != self.user:
            marks = self.reads.setdefault(frame.conv, {})
            if frame.seq > marks.get(frame.user, 0):
                marks[frame.user] = frame.seq
                self._batch.reads[frame.conv, frame.user] = frame.seq
                self.signals.append(ReadMark(frame.conv, frame.user, frame.seq))
            return
        if row is None:
            return
        row.read_told = max(row.read_told, frame.seq)
        if frame.seq >= row.read:
            moved = frame.seq > row.read
            row.read = frame.seq
            self._count_above(row, frame.unread)
            if moved:
                self.signals.append(ReadMark(frame.conv, frame.user, frame.seq))
            self._changed(row)

    def _history_page(self, frame: p.HistoryPage) -> None:
        conv = self._pages.pop(frame.req, "")
        row = self.rows.get(conv)
        if row is not None and all(
            item.epoch == row.epoch and item.seq <= row.start for item in frame.messages
        ):
            self._batch.pages += [history_message(item) for item in frame.messages]
            if not frame.more:
                row.start = 0
            elif frame.messages:
                row.start = frame.messages[0].seq - 1
            self._batch.convs[conv] = row
        self.answers.append((frame.req, frame))

    # ------------------------------------------------------------------------------------------------- turn

    def _ticket(self) -> Ticket:
        """The ticket, to be changed: it goes into the batch."""
        self._batch.ticket = self.ticket
        return self.ticket

    def drain(self) -> Batch:
        """Everything since the last call; false when there is nothing to store."""
        if self._level_waiting >= 0 and self.ordering.level and not self._parked:
            if self._level_waiting > self.ticket.user_cursor:
                self._ticket().user_cursor = self._level_waiting
            self._level_waiting = -1
            self.level = self.live
        if self.live and self.tags.floor > self.ticket.tag:
            self._ticket().tag = self.tags.floor
        batch, self._batch = self._batch, Batch()
        return batch

    def committed(self, batch: Batch) -> None:
        """The batch is stored: its frames may be acknowledged, its messages sent."""
        for unsent in batch.queued:
            self.outbox.add(unsent)
        if self.live:
            self._committed_tag = self.ticket.tag

    def tick(self) -> None:
        """Whatever is due now goes to `out`."""
        if not self.live:
            return
        mono_ms = self._clock.mono_ms()
        if not self._full:
            for conv, from_seq, to_seq in self.ordering.pulls(mono_ms):
                self.out.append(p.Pull(conv, from_seq, to_seq))
        unacked = self._committed_tag - self._acked_tag
        if unacked > 0 and not self._ack_due_ms:
            self._ack_due_ms = mono_ms + ACK_DELAY_MS
        if unacked >= ACK_EVERY or (self._ack_due_ms and mono_ms >= self._ack_due_ms):
            self.ack()
        if self._tell_reads and mono_ms >= self._retry_reads_ms:
            for conv in self._tell_reads:
                row = self.rows[conv]
                self.out.append(p.Read(conv, row.read, row.read_private))
            self._tell_reads.clear()
        if not self.clogged:
            self.out += self.outbox.due(mono_ms)

    def ack(self) -> None:
        """Acknowledge everything that is committed."""
        self._ack_due_ms = 0
        if self._committed_tag > self._acked_tag:
            self._acked_tag = self._committed_tag
            self.out.append(p.Ack(self._acked_tag))

    def next_due_ms(self) -> int | None:
        """When to tick again, on the monotonic clock; a moment that has passed means at once."""
        if not self.live:
            return None
        due = [
            None if self._full else self.ordering.next_due_ms(),
            None if self.clogged else self.outbox.next_due_ms(),
            self._ack_due_ms or None,
            self._retry_reads_ms if self._tell_reads else None,
        ]
        return min((moment for moment in due if moment is not None), default=None)


def history_message(item: p.HistoryItem) -> Message:
    return Message(
        item.conv, item.seq, item.msg_id, item.sender, item.client_id, item.kind, item.body, item.ts_ms,
        item.loss_time_ms, item.flags, tuple(item.mentions), item.epoch, item.cseq,
    )  # fmt: skip
