"""A MessageStore in plain lists and loops: slow, without a disk, and obviously right.

The contract runs on it too, and the property test compares the real store with it, call by call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from fastim.errors import PeerError, StoreUnavailable
from fastim.model import (
    EPOCH_MS,
    MAX_GROUP_MEMBERS,
    MAX_SAFE_INT,
    Fate,
    Flag,
    Kind,
    Message,
    Role,
    SkipReason,
)
from fastim.store.base import (
    Appended,
    AppendedFrame,
    AppendFrame,
    AppendItem,
    AppendStatus,
    Behind,
    BehindPage,
    ConvPage,
    ConvState,
    Device,
    DueFiring,
    DueRequest,
    DueRow,
    FateRow,
    Flush,
    FlushResult,
    Gap,
    Member,
    Obligation,
    ObligationState,
    OpenBoot,
    OpenRange,
    Park,
    PushRow,
    StreamPage,
    Trace,
)

_CLOSED = (Fate.ACKED, Fate.RECALLED, Fate.EXPIRED, Fate.UNDELIVERABLE)
_KNOWN = (AppendStatus.STORED, AppendStatus.REPEATED)


@dataclass
class Due:
    from_seq: int
    due_at_ms: int
    attempt: int = 0
    holder: str = ""
    claim_until_ms: int = 0

    @property
    def ready_ms(self) -> int:
        return self.claim_until_ms if self.holder else self.due_at_ms


@dataclass
class Push:
    serial: int = 1
    ready_ms: int = 0
    """0: nothing to push."""
    attempt: int = 0
    holder: str = ""
    again_ms: int = 0
    collapse_ms: int = 0
    last_ms: int = 0


@dataclass
class Fence:
    holder: str
    claim_until_ms: int


@dataclass
class State:
    """Everything that a disk would hold."""

    messages: list[Message] = field(default_factory=list)
    items: dict[int, AppendItem] = field(default_factory=dict)
    """msg_id -> as it was sent"""
    memberships: dict[str, list[Member]] = field(default_factory=dict)
    devices: dict[tuple[str, str], Device] = field(default_factory=dict)
    cursors: dict[tuple[str, str, str], int] = field(default_factory=dict)
    reads: dict[tuple[str, str], int] = field(default_factory=dict)
    versions: dict[tuple[str, str], int] = field(default_factory=dict)
    fates: list[FateRow] = field(default_factory=list)
    due: dict[tuple[str, str], Due] = field(default_factory=dict)
    push: dict[tuple[str, str], Push] = field(default_factory=dict)
    boots: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    fences: dict[tuple[str, int], Fence] = field(default_factory=dict)
    open_boots: set[tuple[str, int]] = field(default_factory=set)
    last_id: int = 0
    settled: int = 0


class NaiveStore:
    """state: what an earlier one left, for a test that opens again."""

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()
        self._closed = False

    async def close(self) -> None:
        self._closed = True

    def _open(self) -> State:
        if self._closed:
            raise StoreUnavailable("it is closed", temporary=False)
        return self.state

    # ------------------------------------------------------------------------------------------- looking

    def _mint(self, now_ms: int) -> int:
        floor = (now_ms - EPOCH_MS) << 12
        if floor > MAX_SAFE_INT:
            raise StoreUnavailable("no ids are left")
        wanted = max(floor, self.state.last_id + 1)
        if wanted & 0xFC0:
            wanted = ((wanted >> 12) + 1) << 12
        self.state.last_id = wanted
        return wanted

    def _of(self, conv: str) -> list[Message]:
        return [message for message in self.state.messages if message.conv == conv]

    def _head(self, conv: str) -> int:
        return len(self._of(conv))

    def _members(self, conv: str) -> list[Member]:
        if conv.startswith("p:"):
            return [Member(user, Role.MEMBER, 1, 0) for user in conv[2:].split(":")]
        if conv.startswith("s:"):
            return [Member(conv[2:], Role.MEMBER, 1, 0)]
        return self.state.memberships.get(conv, [])

    def _sees(self, user: str, conv: str, seq: int) -> bool:
        return any(
            m.user == user and m.join_seq <= seq and (m.leave_seq == 0 or seq < m.leave_seq)
            for m in self._members(conv)
        )

    def _check_member(self, user: str, conv: str) -> None:
        if user not in [member.user for member in self._members(conv)]:
            raise PeerError("forbidden", f"{user} is not in {conv}")

    def _convs(self, user: str) -> list[str]:
        """Conversations of the user that hold something."""
        found = dict.fromkeys(message.conv for message in self.state.messages)
        return sorted(conv for conv in found if user in [m.user for m in self._members(conv)])

    def _known(self, user: str) -> bool:
        return any(owner == user for owner, _ in self.state.devices)

    def _furthest(self, user: str, conv: str) -> int:
        cursors = self.state.cursors.items()
        return max((seq for (u, _, c), seq in cursors if (u, c) == (user, conv)), default=0)

    def _fates(self, user: str, conv: str, seq: int) -> list[Fate]:
        return [
            row.fate
            for row in self.state.fates
            if row.user == user and row.conv == conv and row.from_seq <= seq <= row.to_seq
        ]

    def _obliged(self, user: str, message: Message) -> bool:
        return (
            message.sender != user
            and message.kind < 32
            and not message.recalled
            and self._sees(user, message.conv, message.seq)
        )

    def _owed(self, user: str, conv: str, from_seq: int = 0, to_seq: int = MAX_SAFE_INT) -> Iterator[Message]:
        """Above the furthest cursor, and no fate but PARKED."""
        above = self._furthest(user, conv)
        for message in self._of(conv):
            if (
                message.seq > above
                and from_seq <= message.seq <= to_seq
                and self._obliged(user, message)
                and not any(fate in _CLOSED for fate in self._fates(user, conv, message.seq))
            ):
                yield message

    def _is_open(self, user: str, conv: str, now_ms: int) -> bool:
        return any(not message.expired(now_ms) for message in self._owed(user, conv))

    # -------------------------------------------------------------------------------------------- append

    async def append(self, frames: Sequence[AppendFrame], now_ms: int) -> list[AppendedFrame]:
        state = self._open()
        if (now_ms - EPOCH_MS) << 12 > MAX_SAFE_INT:
            raise StoreUnavailable("no ids are left")
        return [self._append(state, frame, now_ms) for frame in frames]

    def _append(self, state: State, frame: AppendFrame, now_ms: int) -> AppendedFrame:
        members = tuple(member.user for member in self._members(frame.conv) if member.leave_seq == 0)
        refusal = self._refusal(frame, members)
        results: list[Appended] = []
        for item in frame.items:
            if results and results[-1].status not in _KNOWN:
                results.append(Appended(AppendStatus.NOT_REACHED))
                continue
            results.append(self._append_one(state, frame, item, refusal, now_ms))
        stored = [result for result in results if result.status == AppendStatus.STORED]
        for member in members if stored else ():
            state.versions[member, frame.conv] = stored[-1].msg_id
        if frame.read_seq and refusal is None and frame.sender in members:
            self._move_read(state, frame.sender, frame.conv, frame.read_seq, now_ms, mint=not stored)
        known = self._of(frame.conv) or refusal is None
        return AppendedFrame(frame.conv, 1 if known else 0, tuple(results), members if known else ())

    def _refusal(self, frame: AppendFrame, members: tuple[str, ...]) -> AppendStatus | None:
        if not members:
            return AppendStatus.UNKNOWN_GROUP
        if frame.sender not in members and not frame.conv.startswith("s:"):
            return AppendStatus.NOT_MEMBER
        others = [user for user in members if user != frame.sender]
        if frame.require_known and not frame.conv.startswith("g:") and not all(map(self._known, others)):
            return AppendStatus.UNKNOWN_USER
        return None

    def _append_one(
        self, state: State, frame: AppendFrame, item: AppendItem, refusal: AppendStatus | None, now_ms: int
    ) -> Appended:
        for message in self._of(frame.conv):
            if (message.sender, message.client_id) == (frame.sender, item.client_id):
                first = state.items[message.msg_id]
                if (item.kind, item.body, item.loss_time_ms, item.flags, item.mentions) != (
                    first.kind, first.body, first.loss_time_ms, first.flags, first.mentions,
                ):  # fmt: skip
                    return Appended(AppendStatus.CONFLICT)
                return _appended(AppendStatus.REPEATED, message)
        if refusal is not None:
            return Appended(refusal)
        if item.loss_time_ms and now_ms > item.loss_time_ms:
            return Appended(AppendStatus.EXPIRED)
        deadline_ms = item.loss_time_ms or (now_ms + item.ttl_ms if item.ttl_ms else 0)
        before = self._of(frame.conv)
        cseq = (before[-1].cseq if before else 0) + item.countable
        message = Message(
            frame.conv, len(before) + 1, self._mint(now_ms), cseq, 1, frame.sender, item.client_id, item.kind,
            item.flags, now_ms, deadline_ms, item.body, item.mentions,
        )  # fmt: skip
        state.messages.append(message)
        state.items[message.msg_id] = item
        return _appended(AppendStatus.STORED, message)

    # ------------------------------------------------------------------------------------------- reading

    async def stream(
        self, user: str, conv: str, after_seq: int, now_ms: int, *, limit: int, max_bytes: int
    ) -> StreamPage:
        self._open()
        self._check_member(user, conv)
        messages = self._of(conv)
        position = min(max(after_seq, 0), len(messages))
        entries: list[Message | Gap] = []
        left, size = max(limit, 1), 0
        while position < len(messages) and left > 0:
            message = messages[position]
            reason = self._skip_reason(user, message, now_ms)
            if reason == 0:
                if size + len(message.body) > max_bytes and any(isinstance(e, Message) for e in entries):
                    break
                size += len(message.body)
                entries.append(message)
                position += 1
                left -= 1
                continue
            first = message.seq
            position += 1
            if reason == SkipReason.NOT_MEMBER:
                # The whole stretch costs one entry.
                while position < len(messages) and not self._sees(user, conv, position + 1):
                    position += 1
            left -= 1
            last = entries[-1] if entries else None
            if isinstance(last, Gap) and last.reason == reason:
                first = last.from_seq
                entries.pop()
            entries.append(Gap(conv, first, position, reason))
        return StreamPage(tuple(entries), position, len(messages), 1)

    def _skip_reason(self, user: str, message: Message, now_ms: int) -> int:
        if not self._sees(user, message.conv, message.seq):
            return SkipReason.NOT_MEMBER
        if message.recalled:
            return SkipReason.RECALLED
        return SkipReason.EXPIRED if message.expired(now_ms) else 0

    async def history(
        self,
        user: str,
        conv: str,
        *,
        before_seq: int,
        after_seq: int,
        from_ms: int,
        to_ms: int,
        limit: int,
        now_ms: int,
    ) -> tuple[list[Message], bool]:
        self._open()
        self._check_member(user, conv)
        found = [
            message
            for message in self._of(conv)
            if self._skip_reason(user, message, now_ms) == 0
            and message.seq > after_seq
            and (not before_seq or message.seq < before_seq)
            and (not from_ms or message.ts_ms >= from_ms)
            and (not to_ms or message.ts_ms <= to_ms)
        ]
        limit = max(limit, 1)
        page = found[:limit] if after_seq and not before_seq else found[-limit:]
        return page, len(found) > limit

    async def find(self, *, msg_id: int = 0, client_id: bytes = b"", sender: str = "") -> Message | None:
        for message in reversed(self._open().messages):
            if msg_id:
                found = message.msg_id == msg_id
            else:
                found = message.client_id == client_id and sender in ("", message.sender)
            if found:
                return message
        return None

    async def scan(self, after_msg_id: int, limit: int) -> list[Message]:
        return [m for m in self._open().messages if m.msg_id > after_msg_id][: max(limit, 1)]

    # --------------------------------------------------------------------------------------- catching up

    def _changed(self, user: str, since: int) -> list[tuple[int, str]]:
        versions = self.state.versions.items()
        return sorted((version, conv) for (u, conv), version in versions if u == user and version > since)

    async def version(self, user: str) -> int:
        self._open()
        return max((version for version, _ in self._changed(user, -1)), default=0)

    async def behind(self, user: str, device: str, since_version: int, limit: int) -> BehindPage:
        self._open()
        found = [
            (version, where)
            for version, conv in self._changed(user, since_version)
            if (where := self._behind(user, device, conv)).head > where.cursor
        ]
        more = len(found) > limit
        version = found[limit - 1][0] if more else await self.version(user)
        return BehindPage(tuple(where for _, where in found[:limit]), version, more)

    def _behind(self, user: str, device: str, conv: str) -> Behind:
        return Behind(conv, self.state.cursors.get((user, device, conv), 0), self._head(conv), 1)

    async def position(self, user: str, device: str, conv: str) -> Behind:
        self._open()
        self._check_member(user, conv)
        return self._behind(user, device, conv)

    async def conversations(
        self, user: str, device: str, since_version: int, limit: int, now_ms: int
    ) -> ConvPage:
        self._open()
        found = self._changed(user, since_version)
        more = len(found) > limit
        version = found[limit - 1][0] if more else await self.version(user)
        items = tuple(self._conv_state(user, device, conv, v, now_ms) for v, conv in found[:limit])
        return ConvPage(items, version, more)

    def _conv_state(self, user: str, device: str, conv: str, version: int, now_ms: int) -> ConvState:
        messages = self._of(conv)
        read = self.state.reads.get((user, conv), 0)
        shown = [m for m in messages[-100:] if m.kind < 32 and not self._skip_reason(user, m, now_ms)]
        mentions = [
            m.seq
            for m in messages
            if m.seq > read
            and m.sender != user
            and not m.recalled
            and not m.expired(now_ms)
            and (user in m.mentions or m.flags & Flag.MENTION_ALL)
        ]
        cursor = self.state.cursors.get((user, device, conv), 0)
        unread = self._unread(user, conv)
        last = shown[-1] if shown else None
        mention = mentions[-1] if mentions else 0
        return ConvState(conv, version, len(messages), 1, read, unread, mention, cursor, last)

    # ------------------------------------------------------------------------------------- read and unread

    def _unread(self, user: str, conv: str) -> int:
        mark = self.state.reads.get((user, conv), 0)
        counted = 0
        cseq = 0
        for message in self._of(conv):
            countable, cseq = message.cseq > cseq, message.cseq
            if message.seq > mark and countable and message.sender != user and not message.recalled:
                counted += self._sees(user, conv, message.seq)
        return counted

    def _move_read(self, state: State, user: str, conv: str, seq: int, now_ms: int, mint: bool) -> None:
        seq = min(seq, self._head(conv))
        if seq > state.reads.get((user, conv), 0):
            state.reads[user, conv] = seq
            if mint:
                state.versions[user, conv] = self._mint(now_ms)

    async def read(self, user: str, conv: str, seq: int, now_ms: int) -> tuple[int, int]:
        state = self._open()
        self._check_member(user, conv)
        self._move_read(state, user, conv, seq, now_ms, mint=True)
        return state.reads.get((user, conv), 0), self._unread(user, conv)

    async def unread(self, user: str, conv: str | None = None) -> tuple[int, list[tuple[str, int]]]:
        self._open()
        counts = [(name, self._unread(user, name)) for name in self._convs(user)]
        badge = sum(count for _, count in counts)
        return badge, [item for item in counts if item[1] and conv in (None, item[0])]

    async def recount(self, user: str) -> list[tuple[str, int, int]]:
        self._open()
        return []

    # --------------------------------------------------------------------------------------------- flush

    async def flush(self, flush: Flush) -> FlushResult:
        state = self._open()
        moved: set[tuple[str, str]] = set()
        settled = [one for one in flush.settled if one.from_seq <= one.to_seq and self._of(one.conv)]
        for one in settled:
            state.devices.setdefault(
                (one.user, one.device), Device(one.user, one.device, "", flush.now_ms, flush.now_ms)
            )
            if not one.own:
                self._add_fate(
                    FateRow(
                        one.user, one.device, one.conv, one.from_seq, one.to_seq, one.fate, flush.node,
                        one.attempt, flush.now_ms,
                    )
                )  # fmt: skip
        gaps: dict[tuple[str, str, str], None] = {}
        for one in sorted(settled, key=lambda one: one.from_seq):
            key = (one.user, one.device, one.conv)
            cursor = state.cursors.get(key, 0)
            if one.from_seq - 1 > cursor:
                gaps[key] = None
            elif one.to_seq > cursor:
                state.cursors[key] = one.to_seq
                moved.add((one.user, one.conv))
        for pair in {(one.user, one.conv) for one in settled}:
            if pair in state.due and self._keep_due(pair, flush.now_ms, flush.node) and pair in moved:
                state.due[pair].attempt = 0
        for request in flush.due:
            self._request(state, request, flush)
        for leveled in flush.levels:
            device = state.devices.get((leveled.user, leveled.device))
            if device is not None:
                newest = max(device.level, leveled.version)
                state.devices[device.user, device.device] = msgspec.structs.replace(device, level=newest)
        return FlushResult(tuple((u, d, self._behind(u, d, c)) for u, d, c in gaps))

    def _add_fate(self, row: FateRow) -> None:
        for known in self.state.fates:
            if msgspec.structs.replace(known, node="", attempt=0, ts_ms=0) == msgspec.structs.replace(
                row, node="", attempt=0, ts_ms=0
            ):
                return
        self.state.fates.append(row)

    def _keep_due(self, pair: tuple[str, str], now_ms: int, node: str, attempt: int = 0) -> bool:
        """Whether something is open; if not, the expired get their fate and the row goes."""
        user, conv = pair
        if self._is_open(user, conv, now_ms):
            return True
        self._expire(list(self._owed(user, conv)), user, now_ms, node, attempt)
        self.state.due.pop(pair, None)
        return False

    def _expire(self, messages: list[Message], user: str, now_ms: int, node: str, attempt: int) -> None:
        for m in messages:
            self._add_fate(FateRow(user, "", m.conv, m.seq, m.seq, Fate.EXPIRED, node, attempt, now_ms))

    def _request(self, state: State, request: DueRequest, flush: Flush) -> None:
        pair = (request.user, request.conv)
        if not self._keep_due(pair, flush.now_ms, flush.node):
            return
        row = state.due.get(pair)
        if row is None:
            state.due[pair] = Due(request.from_seq, request.due_at_ms)
            return
        row.from_seq = min(row.from_seq, request.from_seq)
        if request.urgent:
            row.due_at_ms = min(row.due_at_ms, request.due_at_ms)

    # ------------------------------------------------------------------------------------------ due rows

    async def next_due_ms(self) -> int:
        return min((row.ready_ms for row in self._open().due.values()), default=0)

    async def claim_due(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[DueRow]:
        state = self._open()
        ready = sorted(
            ((row.ready_ms, pair) for pair, row in state.due.items() if row.ready_ms <= now_ms),
            key=lambda item: item[0],
        )
        found = []
        for _, pair in ready[:limit]:
            row = state.due[pair]
            if self._keep_due(pair, now_ms, holder, row.attempt):
                row.holder, row.claim_until_ms = holder, now_ms + claim_ms
                found.append(DueRow(*pair, row.from_seq, row.due_at_ms, row.attempt))
        return found

    async def fire_due(self, holder: str, firings: Sequence[DueFiring], now_ms: int) -> list[bool]:
        state = self._open()
        results = []
        for firing in firings:
            pair = (firing.user, firing.conv)
            row = state.due.get(pair)
            if row is None or row.holder != holder or not self._keep_due(pair, now_ms, holder, row.attempt):
                results.append(False)
                continue
            row.attempt = min(firing.attempt, row.attempt + 1)
            row.due_at_ms, row.holder = firing.next_due_ms, ""
            results.append(True)
        return results

    async def park(self, parks: Sequence[Park], now_ms: int) -> list[bool]:
        state = self._open()
        return [self._park(state, park, now_ms) for park in parks]

    def _park(self, state: State, park: Park, now_ms: int) -> bool:
        user, conv = pair = (park.user, park.conv)
        due = state.due.get(pair)
        from_seq = min(park.from_seq, due.from_seq) if due else park.from_seq
        owed = list(self._owed(user, conv, from_seq, park.to_seq))
        self._expire([m for m in owed if m.expired(now_ms)], user, now_ms, "", park.attempt)
        fresh = [m for m in owed if not m.expired(now_ms) and not self._fates(user, conv, m.seq)]
        for m in fresh:
            self._add_fate(FateRow(user, "", conv, m.seq, m.seq, Fate.PARKED, "", park.attempt, now_ms))
        if due:
            left = list(self._owed(user, conv, park.to_seq + 1))
            alive = [m.seq for m in left if not m.expired(now_ms) and not self._fates(user, conv, m.seq)]
            if alive:
                due.from_seq = alive[0]
            else:
                self._expire([m for m in left if m.expired(now_ms)], user, now_ms, "", 0)
                del state.due[pair]
        if fresh and (park.push or fresh[0].seq < park.from_seq):
            self._ask_push(state, pair, park, now_ms)
        return bool(fresh)

    # ---------------------------------------------------------------------------------------------- push

    def _ask_push(self, state: State, pair: tuple[str, str], park: Park, now_ms: int) -> None:
        row = state.push.get(pair)
        if row is None:
            state.push[pair] = Push(ready_ms=park.push_at_ms, collapse_ms=park.collapse_ms)
            return
        at_ms = park.push_at_ms
        if row.last_ms:
            began_ms = row.last_ms if row.last_ms <= now_ms + park.collapse_ms else now_ms
            at_ms = max(at_ms, began_ms + park.collapse_ms)
        if not row.ready_ms:
            row.serial += 1
            row.ready_ms, row.attempt, row.collapse_ms = at_ms, 0, park.collapse_ms
        elif row.holder or row.attempt:
            row.again_ms, row.collapse_ms = at_ms, park.collapse_ms
        else:
            row.ready_ms = min(row.ready_ms, at_ms)

    async def next_push_ms(self) -> int:
        return min((row.ready_ms for row in self._open().push.values() if row.ready_ms), default=0)

    async def claim_push(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[PushRow]:
        state = self._open()
        ready = sorted((row.ready_ms, pair) for pair, row in state.push.items() if 0 < row.ready_ms <= now_ms)
        found = []
        for _, (user, conv) in ready[:limit]:
            row = state.push[user, conv]
            pending = [m for m in self._owed(user, conv) if not m.expired(now_ms)]
            if not pending:
                self._rest_push(row)
                continue
            row.holder, row.ready_ms = holder, now_ms + claim_ms
            m = pending[-1]
            badge, _ = await self.unread(user)
            found.append(
                PushRow(
                    user, conv, m.msg_id, m.sender, m.kind, m.flags, m.body, len(pending), badge,
                    m.loss_time_ms, row.attempt, f"{user}.{conv}.{row.serial}",
                )
            )  # fmt: skip
        return found

    def _rest_push(self, row: Push) -> None:
        row.holder, row.ready_ms, row.attempt, row.again_ms = "", 0, 0, 0

    async def finish_push(self, holder: str, row: PushRow, now_ms: int, *, retry_at_ms: int) -> None:
        kept = self._open().push.get((row.user, row.conv))
        if kept is None or kept.holder != holder or row.push_id != f"{row.user}.{row.conv}.{kept.serial}":
            return
        if retry_at_ms:
            kept.holder, kept.ready_ms = "", retry_at_ms
            kept.attempt += 1
            return
        kept.last_ms = now_ms
        if kept.again_ms:
            kept.serial += 1
            kept.holder, kept.attempt = "", 0
            kept.ready_ms, kept.again_ms = max(kept.again_ms, now_ms + kept.collapse_ms), 0
        else:
            self._rest_push(kept)

    # --------------------------------------------------------------------------------- recovery and audit

    async def settled_mark(self) -> int:
        return self._open().settled

    async def settle(self, msg_id: int) -> None:
        state = self._open()
        state.settled = max(state.settled, min(msg_id, await self.head_msg_id()))

    async def head_msg_id(self) -> int:
        messages = self._open().messages
        return messages[-1].msg_id if messages else 0

    async def unsettled(self, upto_msg_id: int) -> list[OpenRange]:
        state = self._open()
        found = []
        for conv in dict.fromkeys(message.conv for message in state.messages):
            above = [m for m in self._of(conv) if state.settled < m.msg_id <= upto_msg_id]
            senders = {message.sender for message in above}
            users = {
                member.user
                for member in self._members(conv)
                if senders != {member.user} and any(self._sees(member.user, conv, m.seq) for m in above)
            }
            if users and any(message.kind < 32 for message in above):
                found.append(OpenRange(conv, above[0].seq, above[-1].seq, tuple(sorted(users))))
        return found

    def _state_of(self, user: str, message: Message, now_ms: int) -> ObligationState:
        fates = self._fates(user, message.conv, message.seq)
        if fates:
            strongest = min(fates)
            if strongest == Fate.PARKED and message.expired(now_ms):
                return ObligationState.EXPIRED
            return ObligationState(strongest)
        due = self.state.due.get((user, message.conv))
        if due and due.from_seq <= message.seq:
            return ObligationState.DUE
        return ObligationState.UNSETTLED if message.msg_id > self.state.settled else ObligationState.LOST

    def _obligations_of(self, message: Message, now_ms: int) -> list[Obligation]:
        if message.kind >= 32:
            return []
        return [
            Obligation(
                message.msg_id, message.conv, message.seq, message.client_id, message.sender, user,
                self._state_of(user, message, now_ms),
            )
            for user in dict.fromkeys(member.user for member in self._members(message.conv))
            if user != message.sender and self._sees(user, message.conv, message.seq)
        ]  # fmt: skip

    async def obligations(
        self, after_msg_id: int, limit_messages: int, now_ms: int
    ) -> tuple[list[Obligation], int]:
        page = await self.scan(after_msg_id, limit_messages)
        reached = page[-1].msg_id if len(page) == max(limit_messages, 1) else 0
        return [one for message in page for one in self._obligations_of(message, now_ms)], reached

    async def trace(self, msg_id: int, now_ms: int) -> Trace | None:
        state = self._open()
        message = await self.find(msg_id=msg_id)
        if message is None:
            return None
        conv, seq = message.conv, message.seq
        users = list(dict.fromkeys(member.user for member in self._members(conv)))
        fates = [
            r for r in state.fates if r.conv == conv and r.user in users and r.from_seq <= seq <= r.to_seq
        ]
        due = [
            DueRow(user, conv, row.from_seq, row.due_at_ms, row.attempt)
            for user in users
            if (row := state.due.get((user, conv))) and row.from_seq <= seq
        ]
        cursors = [
            (user, device, state.cursors.get((user, device, conv), 0))
            for user in users
            for owner, device in sorted(state.devices)
            if owner == user
        ]
        fates.sort(key=lambda row: row.ts_ms)
        return Trace(
            message, tuple(self._obligations_of(message, now_ms)), tuple(fates), tuple(due), tuple(cursors)
        )

    # ---------------------------------------------------------------------------------- groups and devices

    async def create_group(self, group: str, owner: str, members: Sequence[str], now_ms: int) -> int:
        state = self._open()
        conv = f"g:{group}"
        users = list(dict.fromkeys((owner, *members)))
        if len(users) > MAX_GROUP_MEMBERS:
            raise PeerError("too_big", f"{len(users)} members")
        wanted = [Member(user, Role.OWNER if user == owner else Role.MEMBER, 1, 0) for user in users]
        if conv in state.memberships:
            if sorted(state.memberships[conv], key=lambda m: m.user) != sorted(wanted, key=lambda m: m.user):
                raise PeerError("conflict", f"{conv} exists")
            return 1
        state.memberships[conv] = wanted
        msg_id = self._mint(now_ms)
        body = msgspec.msgpack.encode({"event": "created", "by": owner, "members": users})
        client_id = msg_id.to_bytes(16, "big")
        state.messages.append(
            Message(conv, 1, msg_id, 0, 1, owner, client_id, Kind.MEMBER, 0, now_ms, 0, body)
        )
        for user in users:
            state.versions[user, conv] = msg_id
        return 1

    async def members(self, conv: str) -> list[Member]:
        self._open()
        return self._members(conv)

    async def register_device(self, user: str, device: str, device_class: str, now_ms: int) -> Device:
        state = self._open()
        known = state.devices.get((user, device))
        if known is None:
            for conv in self._convs(user):
                if furthest := self._furthest(user, conv):
                    state.cursors[user, device, conv] = furthest
            known = Device(user, device, device_class, now_ms, now_ms)
        seen_ms = max(known.last_seen_ms, now_ms)
        state.devices[user, device] = Device(
            user, device, device_class, known.first_seen_ms, seen_ms, known.level
        )
        return state.devices[user, device]

    async def devices(self, user: str) -> list[Device]:
        return [device for (owner, _), device in self._open().devices.items() if owner == user]

    # --------------------------------------------------------------------------------------------- nodes

    async def next_boot(self, node: str) -> int:
        self._open().boots[node] += 1
        return self.state.boots[node]

    async def open_boot(self, node: str, boot: int) -> None:
        self._open().open_boots.add((node, boot))

    async def open_boots(self) -> list[OpenBoot]:
        fences = self._open().fences
        return [OpenBoot(*found, found in fences) for found in sorted(self.state.open_boots)]

    async def end_boot(self, node: str, boot: int) -> None:
        self._open().open_boots.discard((node, boot))

    async def fence(self, node: str, boot: int, holder: str, now_ms: int, claim_ms: int) -> bool:
        known = self._open().fences.get((node, boot))
        if known and known.holder != holder and known.claim_until_ms > now_ms:
            return False
        self.state.fences[node, boot] = Fence(holder, now_ms + claim_ms)
        return True

    async def fenced(self, node: str, boot: int) -> bool:
        return (node, boot) in self._open().fences


def _appended(status: AppendStatus, message: Message) -> Appended:
    return Appended(status, message.msg_id, message.seq, message.cseq, message.ts_ms, message.loss_time_ms)
