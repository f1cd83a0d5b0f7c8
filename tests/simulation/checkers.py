"""What must be true of a run, decided from outside: client logs, vendor calls, and the store's own facts.

Nothing here looks into the node or dispatch. Each checker returns sentences that begin with the kind of the
violation, so that a planted error can name the kind by which it must be caught:

loss        an accepted message is missing from the timeline, or was never shown to a device that came back
order       a device showed a conversation out of order, or a sender's messages were stored out of order
duplicate   a device showed a message twice, or the timeline holds one twice
expiry      shown after its deadline, or dropped without one
ledger      an obligation is LOST, in flight at rest, or acked though no device of the user stored it
settle      the system did not come to rest after the faults stopped
push        nobody rang a phone that waits, or it rang twice inside a collapse window
error       an exception reached a loop's handler or killed a task
fence, zombie, adopters, offsets    what the run of a cluster sees while it happens (cluster.py)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from fastim.model import Flag, Message, is_expired
from fastim.store.base import Obligation, ObligationState

SHOWN_LATE_MS: Final = 2_000
"""How far a client's idea of the server's clock may lag: one latency of a live connection, with room."""


@dataclass
class Submission:
    """One logical send: by a client device, or by a service through the bus."""

    client_id: bytes
    sender: str
    device: str
    """"" for a service."""
    conv: str
    body: bytes
    loss_time_ms: int
    flags: int = 0
    msg_id: int = 0
    seq: int = 0
    refused: str = ""

    @property
    def accepted(self) -> bool:
        return self.msg_id != 0


@dataclass
class Shown:
    """A message as a device put it on its screen (and into its durable store)."""

    conv: str
    seq: int
    msg_id: int
    client_id: bytes
    sender: str
    body: bytes
    loss_time_ms: int
    wall_ms: int


@dataclass
class DeviceLog:
    """The facts one device leaves behind, app restarts included."""

    user: str
    device: str
    shown: list[Shown] = field(default_factory=list)
    stored: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """conv -> seqs the device persisted or knows it will never show (SKIP, expired)."""
    start: dict[str, int] = field(default_factory=dict)
    """conv -> seq up to which the device holds nothing by right (it was registered later)."""
    acks: bool = True
    returns: bool = True
    """Whether it is connected when the faults have stopped."""


@dataclass
class Rang:
    """One call of the push vendor for one notification."""

    push_id: str
    user: str
    conv: str
    msg_id: int
    wall_ms: int


@dataclass
class Facts:
    """Everything the checkers judge."""

    submissions: list[Submission] = field(default_factory=list)
    devices: list[DeviceLog] = field(default_factory=list)
    rang: list[Rang] = field(default_factory=list)
    timeline: list[Message] = field(default_factory=list)
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    obligations: list[Obligation] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)
    """Why the system is not at rest; empty when it is."""
    failures: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    """Violations that only show while they happen, each with its kind."""
    wall_end_ms: int = 0
    collapse_ms: int = 10_000
    wall_jumped: bool = False
    """The wall clock was moved; deadlines and windows are then judged loosely."""


def check(facts: Facts) -> list[str]:
    """Every violation, at most 20 of a kind."""
    found: list[str] = []
    for judge in (
        _failures, _seen, _timeline, _views, _complete, _sender_order, _ledger, _push, _settled,
    ):  # fmt: skip
        sentences = list(judge(facts))
        found.extend(sentences[:20])
    return found


def _by_conv(messages: Sequence[Message]) -> dict[str, list[Message]]:
    convs: dict[str, list[Message]] = defaultdict(list)
    for message in messages:
        convs[message.conv].append(message)
    for rows in convs.values():
        rows.sort(key=lambda m: m.seq)
    return convs


def _failures(facts: Facts) -> Iterable[str]:
    for text in facts.failures:
        yield f"error: {text}"


def _seen(facts: Facts) -> Iterable[str]:
    yield from facts.seen


def _timeline(facts: Facts) -> Iterable[str]:
    stored: dict[tuple[str, str, bytes], Message] = {}
    for conv, rows in _by_conv(facts.timeline).items():
        for want, message in enumerate(rows, 1):
            if message.seq != want:
                yield f"loss: {conv} has seq {message.seq} where {want} was due (hole or repeat)"
                break
        ids = [m.msg_id for m in rows]
        if ids != sorted(set(ids)):
            yield f"order: msg_id does not grow with seq in {conv}"
        for message in rows:
            if message.kind >= 32:
                continue
            key = (message.sender, conv, message.client_id)
            if key in stored:
                first = stored[key].seq
                yield f"duplicate: {conv} stores one client_id at {first} and {message.seq}"
            stored[key] = message
    known = set()
    for sub in facts.submissions:
        key = (sub.sender, sub.conv, sub.client_id)
        known.add(key)
        message = stored.get(key)
        if sub.accepted:
            if message is None:
                yield f"loss: accepted {sub.conv}/{sub.seq} of {sub.sender} is not in the timeline"
            elif (message.seq, message.msg_id) != (sub.seq, sub.msg_id):
                yield f"loss: accepted {sub.conv}/{sub.seq} of {sub.sender} is stored as seq {message.seq}"
        if message is not None and message.body != sub.body:
            yield f"loss: {sub.conv}/{message.seq} holds another body than was sent"
        if sub.refused == "expired" and sub.loss_time_ms == 0:
            yield f"expiry: {sub.conv} of {sub.sender} was refused as expired though it has no deadline"
    for key, message in stored.items():
        if key not in known:
            yield f"duplicate: {message.conv}/{message.seq} was never sent by anybody"


def _views(facts: Facts) -> Iterable[str]:
    truth = {(m.conv, m.seq): m for m in facts.timeline}
    for log in facts.devices:
        who = f"{log.user}/{log.device}"
        last: dict[str, int] = defaultdict(int)
        seen: set[tuple[str, int]] = set()
        ids: set[bytes] = set()
        for item in log.shown:
            key = (item.conv, item.seq)
            if key in seen or (item.client_id in ids and item.client_id != bytes(16)):
                yield f"duplicate: {who} showed {item.conv}/{item.seq} twice"
            elif item.seq <= last[item.conv]:
                yield f"order: {who} showed {item.conv}/{item.seq} after {last[item.conv]}"
            seen.add(key)
            ids.add(item.client_id)
            last[item.conv] = max(last[item.conv], item.seq)
            message = truth.get(key)
            if message is None:
                yield f"loss: {who} showed {item.conv}/{item.seq}, which the timeline does not hold"
            elif (message.msg_id, message.body, message.client_id) != (
                item.msg_id,
                item.body,
                item.client_id,
            ):
                yield f"loss: {who} showed another message than {item.conv}/{item.seq}"
            late = facts.wall_end_ms if facts.wall_jumped else item.wall_ms - SHOWN_LATE_MS
            if item.sender != log.user and not facts.wall_jumped and is_expired(item.loss_time_ms, late):
                after_ms = late - item.loss_time_ms
                yield f"expiry: {who} showed {item.conv}/{item.seq} {after_ms} ms after its deadline"


def _complete(facts: Facts) -> Iterable[str]:
    for log in facts.devices:
        if not log.returns or not log.acks:
            # Whoever acknowledges nothing gets a window full, and is then left alone.
            continue
        have = {(s.conv, s.seq) for s in log.shown}
        for message in facts.timeline:
            if message.kind >= 32 or log.user not in facts.members.get(message.conv, ()):
                continue
            key = (message.conv, message.seq)
            if key in have or message.seq <= log.start.get(message.conv, 0):
                continue
            if is_expired(message.loss_time_ms, facts.wall_end_ms):
                continue
            if facts.wall_jumped and message.loss_time_ms:
                # It was past its deadline for whoever looked at the wrong moment.
                continue
            kind = (
                "expiry" if message.seq in log.stored[message.conv] and message.loss_time_ms == 0 else "loss"
            )
            who = f"{log.user}/{log.device}"
            yield f"{kind}: {who} never showed {message.conv}/{message.seq} of {message.sender}"


def _sender_order(facts: Facts) -> Iterable[str]:
    last: dict[tuple[str, str, str], int] = {}
    seqs = {(m.sender, m.conv, m.client_id): m.seq for m in facts.timeline}
    for sub in facts.submissions:
        seq = seqs.get((sub.sender, sub.conv, sub.client_id))
        if seq is None or not sub.device:
            # Two calls of a service are two requests: nothing orders them.
            continue
        key = (sub.sender, sub.device, sub.conv)
        if seq < last.get(key, 0):
            yield f"order: {sub.sender}/{sub.device} sent {sub.conv}/{seq} after what is at {last[key]}"
        last[key] = max(seq, last.get(key, 0))


def _ledger(facts: Facts) -> Iterable[str]:
    stored: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    logs: dict[str, list[DeviceLog]] = defaultdict(list)
    for log in facts.devices:
        logs[log.user].append(log)
        for conv, seqs in log.stored.items():
            stored[log.user][conv] |= seqs
    truth = {(m.conv, m.seq): m for m in facts.timeline}
    owed = {
        (m.conv, m.seq, user)
        for m in facts.timeline
        if m.kind < 32
        for user in facts.members.get(m.conv, ())
        if user != m.sender
    }
    counted = {(o.conv, o.seq, o.user) for o in facts.obligations if truth[o.conv, o.seq].kind < 32}
    for conv, seq, user in sorted(owed ^ counted)[:20]:
        what = "missing" if (conv, seq, user) in owed else "invented"
        yield f"ledger: obligation {conv}/{seq} of {user} is {what}"
    for o in facts.obligations:
        what = f"{o.conv}/{o.seq} for {o.user}"
        message = truth[o.conv, o.seq]
        if o.state == ObligationState.LOST:
            yield f"ledger: {what} is LOST"
        elif o.state in (ObligationState.DUE, ObligationState.UNSETTLED):
            if not facts.wall_jumped:
                yield f"ledger: {what} is still {o.state.name}"
        elif o.state == ObligationState.ACKED:
            if o.seq not in stored[o.user][o.conv] and message.kind < 32:
                yield f"ledger: {what} counts as acked, and no device of the user stored it"
        elif o.state == ObligationState.EXPIRED:
            if not is_expired(message.loss_time_ms, facts.wall_end_ms) and not facts.wall_jumped:
                yield f"expiry: {what} counts as expired; its deadline is {message.loss_time_ms}"
        elif o.state == ObligationState.PARKED:
            if any(log.acks and log.returns for log in logs[o.user]):
                yield f"ledger: {what} is still parked though the user came back and acks"
        else:
            yield f"ledger: {what} is {o.state.name}, which nothing in this run can cause"


def _push(facts: Facts) -> Iterable[str]:
    last: dict[tuple[str, str], Rang] = {}
    newest: dict[tuple[str, str], int] = defaultdict(int)
    for rang in facts.rang:
        key = (rang.user, rang.conv)
        before = last.get(key)
        if (
            before is not None
            and before.push_id != rang.push_id
            and rang.wall_ms - before.wall_ms < facts.collapse_ms - 1
            and not facts.wall_jumped
        ):
            apart_ms = rang.wall_ms - before.wall_ms
            yield f"push: {rang.user} was rung twice for {rang.conv} within {apart_ms} ms"
        last[key] = rang
        newest[key] = max(newest[key], rang.msg_id)
    # A message that stays parked for a user who never comes back must have rung the phone at least once,
    # and the last ring must know of the newest such message.
    waiting: dict[tuple[str, str], int] = defaultdict(int)
    back = {log.user for log in facts.devices if log.returns or not log.acks}
    truth = {m.msg_id: m for m in facts.timeline}
    for o in facts.obligations:
        if o.state != ObligationState.PARKED or o.user in back:
            continue
        message = truth[o.msg_id]
        if message.kind < 32 and message.loss_time_ms == 0 and not message.flags & Flag.NO_PUSH:
            waiting[o.user, o.conv] = max(waiting[o.user, o.conv], o.msg_id)
    for (user, conv), msg_id in waiting.items():
        if newest[user, conv] < msg_id:
            said = "never rang" if not newest[user, conv] else "rang before, not for the newest one"
            yield f"push: {user} is away with messages parked in {conv}, and the phone {said}"


def _settled(facts: Facts) -> Iterable[str]:
    for text in facts.unsettled:
        yield f"settle: {text}"
