"""What a client may ask of its session, frame by frame.

Hides who is asked: SEND goes to the bus, a batch per loop turn; READ, HISTORY and CONVS go to the store; PULL
and SYNC only put conversations BEHIND. Everything is authorised here and refused here; an answer never blocks
the next frame, and a session has at most requests_per_session questions under way.

M1  a SEND that was taken is answered by SENT or ERROR, or by nothing at all (then it is sent again)
M2  a refused SEND names every client_id in it
    tests/system/test_commands.py
Source: semantics, "Send", "Read, unread, badge"; promises, "Limits to ship".
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from fastim import observe
from fastim import protocol as p
from fastim.auth import Action, Identity, authorise
from fastim.bus.base import SUBMIT, Bus, Outgoing
from fastim.bus.records import ReadNotice, Refusal, Submit
from fastim.clock import Clock
from fastim.errors import BusUnavailable, PeerError, Unavailable
from fastim.model import KindRule, Message
from fastim.node.catchup import Catchup
from fastim.node.delivery import refuse
from fastim.node.limits import NodeLimits
from fastim.node.link import Link
from fastim.node.session import Session
from fastim.store.base import MessageStore

_PAGE_BYTES: Final = 60_000
"""Of a HISTORY_PAGE: a frame holds 64 KiB."""
_BUCKETS: Final = 65_536
_DUST: Final = 1e-6
"""Of a message: what sums of floats may be off by."""
_UNAVAILABLE_RETRY_MS: Final = 1_000

Spawn = Callable[[Coroutine[Any, Any, None], str], None]


class SendRate:
    """A token bucket per user: rate_per_s, at most rate_burst at once. Remembers the users seen last."""

    def __init__(self, clock: Clock, per_s: int, burst: int) -> None:
        self._clock = clock
        self._per_ms = per_s / 1_000
        self._burst = float(burst)
        self._buckets: dict[str, list[float]] = {}
        """user -> [level, when that was]"""
        self._most = _BUCKETS

    def take(self, user: str, count: int) -> int:
        """0: taken. Otherwise after how many ms there will be room; nothing was taken."""
        now_ms, burst = self._clock.mono_ms(), self._burst
        bucket = self._buckets.get(user)
        if bucket is None:
            bucket = self._add(user, now_ms)
        level = bucket[0] + (now_ms - bucket[1]) * self._per_ms
        if level > burst:
            level = burst
        # A frame larger than the burst passes when the bucket is full.
        wanted = count if count < burst else burst
        if wanted - level > _DUST:
            return math.ceil((wanted - level - _DUST) / self._per_ms)
        bucket[0] = level - wanted if level > wanted else 0.0
        bucket[1] = now_ms
        return 0

    def _add(self, user: str, now_ms: int) -> list[float]:
        """A full bucket. Others that have filled again say nothing and go: memory is for who sent lately."""
        if len(self._buckets) >= self._most:
            for name, (level, at_ms) in list(self._buckets.items()):
                if level + (now_ms - at_ms) * self._per_ms >= self._burst:
                    del self._buckets[name]
            self._most = max(_BUCKETS, 2 * len(self._buckets))
        bucket = self._buckets[user] = [self._burst, now_ms]
        return bucket


class _Question:
    """A frame that is to be answered, on the connection that asked: a later one knows nothing of its req."""

    __slots__ = ("conv", "link", "op", "req")

    def __init__(self, link: Link, op: int, req: int, conv: str) -> None:
        self.link = link
        self.op = op
        self.req = req
        self.conv = conv

    @property
    def named(self) -> bool:
        return bool(self.req or self.conv)

    def refuse(self, error: PeerError) -> None:
        observe.ERRORS_SENT.labels(error.code).inc()
        refusal = p.Error(
            self.op, error.code, error.detail, error.retryable, error.retry_after_ms, b"", self.req, self.conv
        )
        self.link.send(p.encode(refusal))


class Commands:
    """The cold half of a session's protocol."""

    def __init__(
        self,
        inbox: str,
        store: MessageStore,
        bus: Bus,
        verify: Callable[[str], Identity],
        catchup: Catchup,
        clock: Clock,
        limits: NodeLimits,
        kinds: Mapping[int, KindRule],
        spawn: Spawn,
    ) -> None:
        self._inbox = inbox
        self._store = store
        self._bus = bus
        self._verify = verify
        self._catchup = catchup
        self._clock = clock
        self._limits = limits
        self._kinds = kinds
        self._spawn = spawn
        self._rate = SendRate(clock, limits.rate_per_s, limits.rate_burst)
        self._sends: list[tuple[Session, p.Send]] = []
        self._work = asyncio.Event()
        self.submitted = 0
        """Messages handed to the bus."""
        self.bus_failures = 0

    def take(self, session: Session, op: int, frame: bytes) -> None:
        """One frame of an authenticated connection. Raises PeerError; the core answers with ERROR."""
        link = session.link
        assert link is not None
        found = p.decode(op, frame)
        if type(found) is p.Send:
            self._send(session, found)
            return
        question = _Question(link, op, getattr(found, "req", 0), getattr(found, "conv", ""))
        try:
            self._take(session, question, found)
        except PeerError as error:
            if not question.named:
                raise
            question.refuse(error)

    def _take(self, session: Session, question: _Question, found: p.Frame) -> None:
        op = question.op
        if op in p.RESERVED:
            raise PeerError("unsupported", f"op {op} ({p.Op(op).name}) is not supported by this server yet")
        match found:
            case p.Read():
                authorise(session.identity, Action.READ, conv=found.conv)
                self._ask(session, question, self._read(session, question, found))
            case p.Pull():
                self._pull(session, found)
            case p.History():
                authorise(session.identity, Action.READ, conv=found.conv)
                self._check_page(found.limit, p.MAX_HISTORY_LIMIT)
                self._ask(session, question, self._history(session, question, found))
            case p.Convs():
                self._check_page(found.limit, self._limits.page_conversations)
                self._ask(session, question, self._convs(session, question, found))
            case p.Sync():
                self._catchup.sync(session, found.user_cursor)
            case p.Refresh():
                self._refresh(session, found)
            case p.Auth():
                raise PeerError(
                    "already_authenticated", f"this connection belongs to {session.user!r} already"
                )
            case _:
                raise PeerError("unsupported", f"op {op} is not a client's")

    @staticmethod
    def _check_page(limit: int, most: int) -> None:
        if not 1 <= limit <= most:
            raise PeerError("bad_limit", f"limit is {limit:,}; must be 1-{most}")

    # -------------------------------------------------------------------------------------------- send

    def _send(self, session: Session, found: p.Send) -> None:
        try:
            if found.conv not in session.may_send:
                authorise(session.identity, Action.SEND, conv=found.conv)
                session.note_may_send(found.conv)
            self._check_items(found)
            wait_ms = self._rate.take(session.user, len(found.items))
            if wait_ms:
                limits = self._limits
                raise PeerError(
                    "rate_limited",
                    f"more than {limits.rate_per_s} messages a second (burst {limits.rate_burst})",
                    retryable=True,
                    retry_after_ms=wait_ms,
                )
        except PeerError as error:
            self._refuse(session, found, error)
            return
        self._sends.append((session, found))
        self._work.set()

    def _check_items(self, found: p.Send) -> None:
        """What dispatch would refuse anyway, but a node can say at once."""
        for item in found.items:
            rule = self._kinds.get(item.kind)
            if rule is None:
                raise PeerError("unknown_kind", f"kind is {item.kind}; known: {_listed(self._kinds)}")
            if len(item.body) > rule.max_body_bytes:
                raise PeerError(
                    "too_big",
                    f"body is {len(item.body):,} bytes; limit {rule.max_body_bytes:,} for {rule.name}",
                )

    @staticmethod
    def _refuse(session: Session, found: p.Send, error: PeerError) -> None:
        if session.link is not None:
            for item in found.items:
                refusal = Refusal(
                    item.client_id, error.code, error.detail, error.retryable, error.retry_after_ms
                )
                refuse(session.link, found.conv, refusal)

    async def run(self) -> None:
        """Hand what has come to the bus, a batch at a time."""
        most = self._limits.max_publish
        while True:
            while not self._sends:
                self._work.clear()
                await self._work.wait()
            batch, self._sends = self._sends[:most], self._sends[most:]
            records = [self._record(session, found) for session, found in batch]
            try:
                await self._bus.publish(records)
            except BusUnavailable as error:
                self.bus_failures += 1
                wait_ms = _UNAVAILABLE_RETRY_MS
                refused = PeerError("unavailable", str(error), retryable=True, retry_after_ms=wait_ms)
                for session, found in batch:
                    self._refuse(session, found, refused)
            else:
                self.submitted += sum(len(found.items) for _, found in batch)

    def _record(self, session: Session, found: p.Send) -> Outgoing:
        submit = Submit(
            found.conv, session.user, session.device, session.id, self._inbox, found.items, found.read_seq
        )
        return Outgoing(SUBMIT, found.conv, submit)

    # --------------------------------------------------------------------------------------- questions

    def _ask(self, session: Session, question: _Question, work: Coroutine[Any, Any, None]) -> None:
        """Let a question wait for its answer without holding up the frames behind it."""
        limit = self._limits.requests_per_session
        if session.requests >= limit:
            work.close()
            detail = f"{session.requests} requests are under way; limit {limit}"
            raise PeerError("busy", detail, retryable=True, retry_after_ms=100)
        session.requests += 1
        self._spawn(self._guarded(session, question, work), f"op {question.op} of {session.id[:8]}")

    async def _guarded(self, session: Session, question: _Question, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except PeerError as error:
            question.refuse(error)
        except Unavailable as error:
            wait_ms = _UNAVAILABLE_RETRY_MS
            question.refuse(PeerError("unavailable", str(error), retryable=True, retry_after_ms=wait_ms))
        finally:
            session.requests -= 1

    async def _read(self, session: Session, question: _Question, found: p.Read) -> None:
        mark, unread = await self._store.read(session.user, found.conv, found.seq, self._clock.wall_ms())
        question.link.send(p.encode(p.ReadMark(found.conv, session.user, mark, unread)))
        notice = ReadNotice(found.conv, session.user, mark, session.id, found.private)
        try:
            await self._bus.publish([Outgoing(SUBMIT, found.conv, notice)])
        except BusUnavailable:
            # The mark is stored and answered; who is not told learns it with the next sync.
            self.bus_failures += 1

    async def _history(self, session: Session, question: _Question, found: p.History) -> None:
        messages, more = await self._store.history(
            session.user, found.conv, before_seq=found.before_seq, after_seq=found.after_seq,
            from_ms=found.from_ms, to_ms=found.to_ms, limit=found.limit, now_ms=self._clock.wall_ms(),
        )  # fmt: skip
        newest_first = found.after_seq == 0
        kept, cut = _fitting(messages, newest_first=newest_first)
        page = p.HistoryPage(found.req, found.conv, [p.history_item(m) for m in kept], more or cut)
        question.link.send(p.encode(page))

    async def _convs(self, session: Session, question: _Question, found: p.Convs) -> None:
        page = await self._store.conversations(
            session.user, session.device, found.user_cursor, found.limit, self._clock.wall_ms()
        )
        changes = [self._catchup.change(item) for item in page.items]
        question.link.send(p.encode(p.Changes(found.req, changes, page.version, page.more)))

    def _pull(self, session: Session, found: p.Pull) -> None:
        authorise(session.identity, Action.READ, conv=found.conv)
        if not 1 <= found.from_seq <= found.to_seq:
            raise PeerError("bad_range", f"seqs {found.from_seq:,}-{found.to_seq:,}; must be 1 <= from <= to")
        waiting = len(session.behind)
        if waiting >= self._limits.pulls_waiting and found.conv not in session.behind:
            # Names of conversations cost a client nothing, so it could invent them faster than they are read.
            detail = f"{waiting:,} conversations wait to be streamed; limit {self._limits.pulls_waiting:,}"
            raise PeerError("busy", detail, retryable=True, retry_after_ms=1_000)
        heard = session.put_behind(found.conv, 0, found.from_seq - 1, dup=True)
        if heard.position != found.from_seq - 1:
            # The client has what is below, acknowledged or not: what it holds above keeps its ACK back.
            # From the cursor the same window would be repeated for ever.
            heard.position = found.from_seq - 1
            heard.version += 1
        observe.BEHIND.labels("pull").inc()
        self._catchup.wake(session)

    def _refresh(self, session: Session, found: p.Refresh) -> None:
        identity = self._verify(found.token)
        authorise(identity, Action.CONNECT)
        if identity.user != session.user or (identity.device and identity.device != session.device):
            raise PeerError("forbidden", "the new token is for somebody else")
        session.believe(identity)
        if session.link is not None:
            session.link.send(p.encode(p.Refreshed(identity.expires_ms)))


def _listed(kinds: Mapping[int, KindRule]) -> str:
    return " ".join(f"{rule.kind}={rule.name}" for rule in kinds.values())


def _fitting(messages: list[Message], *, newest_first: bool) -> tuple[list[Message], bool]:
    """What fits into a frame, from the end that was asked for; and whether something was left out."""
    size = 0
    count = 0
    for message in reversed(messages) if newest_first else messages:
        size += len(message.body) + len(message.conv) + 160 + 66 * len(message.mentions)
        if size > _PAGE_BYTES and count:
            break
        count += 1
    if count == len(messages):
        return messages, False
    return (messages[len(messages) - count :] if newest_first else messages[:count]), True
