"""Bring a device level with the timeline: stream what lies above its position, in seq order.

First sync, cold resume, hole pull, nudge, slow reader and ack timeout differ only in how a conversation came
to be BEHIND (session.Session.put_behind); here is the one way out. A few workers take sessions that want
something, one page of one conversation at a time, round robin, and stop when the window is full; an ack wakes
the session.

 wake(session) ─▶ queue ─▶ worker: a page of the change index │ a page of one conversation ─▶ MSG, SKIP ─▶ …
                                                                                        level of all ─▶ LEVEL

C1  what is written for a conversation is contiguous from its position      tests/system/test_catchup.py
C2  LEVEL(version) leaves after everything that changed up to version       same
C3  a store that is away delays, and costs nothing else                     same
Source: docs/design.md, "A session on a node"; semantics, "Heartbeat, resume, sync".
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Final, Protocol

from fastim.clock import Clock
from fastim.errors import PeerError, StoreUnavailable
from fastim.model import Fate, KindRule, Message, SkipReason, preview
from fastim.node.limits import NodeLimits
from fastim.node.link import Link
from fastim.node.session import CURSOR, Heard, Parcel, Session, Sync
from fastim.protocol import MSG_PREFIX_BYTES, Changes, ConvChange, Level, Skip, encode, encode_msg_tail
from fastim.store.base import ConvState, Gap, MessageStore, StreamPage

_SKIP_FATES: Final = {SkipReason.EXPIRED: Fate.EXPIRED, SkipReason.RECALLED: Fate.RECALLED}
"""What the ack of a SKIP settles; for any other reason it only moves the cursor."""
_PREVIEW_CHARS: Final = 80


class Window(Protocol):
    """What delivery knows about the room of a session."""

    def has_room(self, session: Session, more_bytes: int = 0) -> bool: ...

    def write_stream(self, session: Session, message: Message, tail: bytes, *, dup: bool) -> None: ...

    def post(self, session: Session, parcel: Parcel, mono_ms: int) -> None: ...


class Catchup:
    """The pull half of a node."""

    def __init__(
        self, store: MessageStore, clock: Clock, limits: NodeLimits, kinds: Mapping[int, KindRule]
    ) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits
        self._kinds = kinds
        self._queue: deque[Session] = deque()
        self._work = asyncio.Event()
        self._stalled: set[Session] = set()
        self.window: Window | None = None
        self.streamed = 0
        """MSG frames written from the store."""
        self.skipped = 0
        """Seqs covered by SKIP frames."""
        self.syncs = 0
        self.store_failures = 0

    # -- what wants to be streamed

    def wake(self, session: Session) -> None:
        """Look at the session soon. Cheap; call whenever something may have become possible."""
        if session.queued or session.busy or session.stalled or not session.wants_stream():
            return
        session.queued = True
        self._queue.append(session)
        self._work.set()

    def sync(self, session: Session, since: int) -> None:
        """Find what changed after `since`, tell and stream it; then LEVEL. A sync under way starts again."""
        if session.sync is not None:
            since = min(since, session.sync.since)
        session.sync = Sync(since)
        self.wake(session)

    def sweep(self) -> None:
        """Try again what waited for the store or for an emptier socket."""
        stalled, self._stalled = self._stalled, set()
        for session in stalled:
            session.stalled = False
            self.wake(session)

    # -- the workers

    async def run(self) -> None:
        """One worker; start a few."""
        while True:
            while not self._queue:
                self._work.clear()
                await self._work.wait()
            session = self._queue.popleft()
            session.queued = False
            session.busy = True
            try:
                more = await self._step(session)
            except StoreUnavailable as error:
                if not error.temporary:
                    raise
                self.store_failures += 1
                self._stall(session)
                more = False
            finally:
                session.busy = False
            if more:
                self.wake(session)

    def _stall(self, session: Session) -> None:
        session.stalled = True
        self._stalled.add(session)

    async def _step(self, session: Session) -> bool:
        """One page. False: the session waits for an ack, the next sweep, or nothing at all."""
        link = session.link
        if link is None or not session.wants_stream():
            return False
        if session.sync is not None and not session.sync.paged:
            if link.buffered_bytes() > self._limits.page_backlog_bytes:
                self._stall(session)
                return False
            await self._page(session, link, session.sync)
            return True
        if not self._window().has_room(session):
            self._full(session, choked=link.overflow)
            return False
        for conv, heard in session.behind.items():
            if heard.paused:
                continue
            if heard.dup and link.buffered_bytes() > self._limits.page_backlog_bytes:
                # What was written before is still here, so writing it again would only hold it twice.
                self._full(session, choked=True)
                return False
            self._unchoke(session)
            return await self._stream(session, link, conv, heard)
        self._unchoke(session)
        return False

    def _full(self, session: Session, *, choked: bool) -> None:
        """Nothing more fits; the next ack wakes the session. choked: room in its write buffer does, too."""
        if session.full_since_mono_ms == 0:
            session.full_since_mono_ms = self._clock.mono_ms()
        if choked:
            session.choked = True
            self._stall(session)  # no ack may come to tell that the buffer has drained

    @staticmethod
    def _unchoke(session: Session) -> None:
        if session.choked:
            session.choked = False
            session.full_since_mono_ms = 0

    def _window(self) -> Window:
        assert self.window is not None
        return self.window

    # -- one conversation

    async def _stream(self, session: Session, link: Link, conv: str, heard: Heard) -> bool:
        """One page. False: it did not fit."""
        version = heard.version
        position = heard.position
        try:
            if position == CURSOR:
                position = (await self._store.position(session.user, session.device, conv)).cursor
            page = await self._store.stream(
                session.user, conv, position, self._clock.wall_ms(),
                limit=self._limits.page_messages, max_bytes=self._limits.page_bytes,
            )  # fmt: skip
        except PeerError:
            # Not (or no longer) a member: there is nothing to be had.
            if session.link is link and session.behind.get(conv) is heard:
                self._level(session, conv)
            return True
        if session.link is not link or session.behind.get(conv) is not heard or heard.version != version:
            return True
        reached = self._write(session, conv, page, position, heard.dup)
        heard.position = reached
        if reached < page.to_seq:
            self._full(session, choked=link.overflow)
            return False
        stale = page.to_seq <= position and not page.entries
        if page.to_seq >= page.head and (page.to_seq >= heard.upto or stale):
            self._level(session, conv)
        else:
            del session.behind[conv]
            session.behind[conv] = heard
        return True

    def _write(self, session: Session, conv: str, page: StreamPage, position: int, dup: bool) -> int:
        """As much of the page as the window takes. Returns the seq that was reached."""
        window = self._window()
        reached = position
        for entry in page.entries:
            if isinstance(entry, Gap):
                if not window.has_room(session):
                    return reached
                self._skip(session, conv, entry, page.epoch)
                reached = entry.to_seq
            else:
                tail = encode_msg_tail(entry)
                if not window.has_room(session, len(tail) + MSG_PREFIX_BYTES):
                    return reached
                window.write_stream(session, entry, tail, dup=dup)
                self.streamed += 1
                reached = entry.seq
        return max(reached, page.to_seq)

    def _skip(self, session: Session, conv: str, gap: Gap, epoch: int) -> None:
        tag = session.next_tag()
        frame = encode(Skip(tag, conv, gap.from_seq, gap.to_seq, gap.reason, epoch))
        fate = _SKIP_FATES.get(SkipReason(gap.reason))
        parcel = Parcel(session, conv, gap.from_seq, gap.to_seq, 0, fate, frame, is_msg=False)
        self.skipped += gap.to_seq - gap.from_seq + 1
        self._window().post(session, parcel, self._clock.mono_ms())

    def _level(self, session: Session, conv: str) -> None:
        del session.behind[conv]
        sync = session.sync
        if sync is not None:
            sync.waiting.discard(conv)
            self._finish(session, sync)

    # -- what changed

    async def _page(self, session: Session, link: Link, sync: Sync) -> None:
        """One page of the change index: list entries, and which conversations are BEHIND.

        The entries are told after a hot resume too: LEVEL says that everything up to its version was, and
        another device may have read what this one had.
        """
        page = await self._store.conversations(
            session.user, session.device, max(sync.since, sync.reached), self._limits.page_conversations,
            self._clock.wall_ms(),
        )  # fmt: skip
        if session.link is not link or session.sync is not sync:
            return
        link.send(encode(Changes(0, [self.change(item) for item in page.items], page.version, page.more)))
        for item in page.items:
            # Under way from a replay counts as written: its acks close the distance to the cursor.
            reached = session.reached(item.conv, item.cursor)
            if item.head > reached:
                heard = session.put_behind(item.conv, 0, CURSOR, dup=session.tag > 0)
                if reached > item.cursor:
                    heard.position = reached
                sync.waiting.add(item.conv)
        sync.reached = page.version
        if not page.more:
            sync.paged = True
            session.replayed.clear()
            self._finish(session, sync)

    def _finish(self, session: Session, sync: Sync) -> None:
        """LEVEL, once everything of the sync was streamed."""
        if session.sync is not sync or not sync.paged or sync.waiting:
            return
        session.sync = None
        tag = session.next_tag()
        frame = encode(Level(tag, sync.reached))
        parcel = Parcel(session, "", 0, 0, 0, None, frame, is_msg=False, version=sync.reached)
        self._window().post(session, parcel, self._clock.mono_ms())
        if session.link is not None:
            session.link.set_pong(sync.reached)
        self.syncs += 1

    def change(self, state: ConvState) -> ConvChange:
        """A list entry as clients see it."""
        last = state.last
        shown = preview(last.kind, last.flags, last.body, self._kinds, _PREVIEW_CHARS) if last else ""
        return ConvChange(
            state.conv, state.version, state.head, state.epoch, state.read, state.unread, state.mention_seq,
            False,
            last.sender if last else "", last.kind if last else 0, last.ts_ms if last else 0,
            shown, state.cursor,
        )  # fmt: skip
