"""Judge a run from what the clients wrote down, and compare the audit with it id by id. Pure.

lost         accepted, and a device that is level never showed it though it was not expired
duplicates   shown twice by one device, or accepted twice under one client_id
inversions   shown out of seq order, or stored in another order than their sender sent them
expiry       shown after its deadline
ledger       the audit's state of an obligation contradicts the clients' logs
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from tests.kill.log import DeviceRecord, Submitted

LATE_MS: Final = 1_500
"""How far a device's idea of the server's clock may be behind when it shows a message."""

UNHEARD_MS: Final = 1_500
"""A cumulative ack waits 100 ms, and as long as a hole in any conversation is held (500 ms) and pulled. This
long before its connection ends, a device may show what the server never hears of."""


@dataclass
class Verdict:
    """Sentences by kind; `sizes` are figures of the run itself."""

    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    sizes: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str) -> int:
        return len(self.found.get(kind, ()))

    @property
    def good(self) -> bool:
        return not any(self.found.values())


@dataclass(frozen=True)
class AuditLine:
    """One obligation as `fastim audit --ids` prints it; state in lower case."""

    msg_id: int
    user: str
    state: str
    conv: str = ""
    seq: int = 0


def accepted(records: Iterable[DeviceRecord]) -> dict[int, Submitted]:
    """Everything the server said SENT to, by msg_id."""
    return {sub.msg_id: sub for record in records for sub in record.submitted.values() if sub.msg_id}


def judge(
    records: Sequence[DeviceRecord],
    members: Mapping[str, Sequence[str]],
    level: Iterable[tuple[str, str]],
    end_ms: int,
) -> Verdict:
    """members: of every conversation. level: the (user, device) that are connected and level at end_ms."""
    verdict = Verdict()
    _accepted_once(records, verdict)
    for record in records:
        _screen(record, verdict)
    _sender_order(records, verdict)
    _complete(records, members, set(level), end_ms, verdict)
    return verdict


def _accepted_once(records: Sequence[DeviceRecord], verdict: Verdict) -> None:
    places: dict[tuple[str, int], str] = {}
    ids: dict[int, str] = {}
    for record in records:
        for text in record.strange:
            verdict.found["duplicates"].append(f"{record.user}/{record.device}: {text}")
        for sub in record.submitted.values():
            verdict.sizes["submitted"] += 1
            if sub.refused and not sub.msg_id:
                verdict.sizes[f"refused {sub.refused}"] += 1
            if not sub.msg_id:
                continue
            verdict.sizes["accepted"] += 1
            for taken, key in ((places, (sub.conv, sub.seq)), (ids, sub.msg_id)):
                other = taken.setdefault(key, sub.client_id)  # type: ignore[call-overload]
                if other != sub.client_id:
                    verdict.found["duplicates"].append(f"{key} was given to {other} and {sub.client_id}")


def _screen(record: DeviceRecord, verdict: Verdict) -> None:
    who = f"{record.user}/{record.device}"
    top: dict[str, int] = {}
    seqs: set[tuple[str, int]] = set()
    clients: set[tuple[str, str]] = set()
    for seen in record.shown:
        verdict.sizes["shown"] += 1
        if (seen.conv, seen.seq) in seqs or (seen.conv, seen.client_id) in clients:
            verdict.found["duplicates"].append(f"{who} showed {seen.conv} seq {seen.seq} twice")
            continue
        seqs.add((seen.conv, seen.seq))
        clients.add((seen.conv, seen.client_id))
        if seen.seq < top.get(seen.conv, 0):
            verdict.found["inversions"].append(
                f"{who} showed {seen.conv} seq {seen.seq} after {top[seen.conv]}"
            )
        top[seen.conv] = max(seen.seq, top.get(seen.conv, 0))
        if seen.loss_time_ms and seen.at_ms > seen.loss_time_ms + LATE_MS:
            verdict.found["expiry"].append(
                f"{who} showed {seen.conv} seq {seen.seq} {seen.at_ms - seen.loss_time_ms} ms too late"
            )


def _sender_order(records: Sequence[DeviceRecord], verdict: Verdict) -> None:
    for record in records:
        by_conv: dict[str, list[Submitted]] = defaultdict(list)
        for sub in record.submitted.values():
            if sub.msg_id:
                by_conv[sub.conv].append(sub)
        for conv, subs in by_conv.items():
            subs.sort(key=lambda s: s.n)
            for before, after in pairwise(subs):
                if after.seq < before.seq:
                    verdict.found["inversions"].append(
                        f"{record.user}/{record.device} sent {conv} n {before.n} before {after.n}; "
                        f"stored as seq {before.seq} and {after.seq}"
                    )


def _complete(
    records: Sequence[DeviceRecord],
    members: Mapping[str, Sequence[str]],
    level: set[tuple[str, str]],
    end_ms: int,
    verdict: Verdict,
) -> None:
    taken = accepted(records)
    by_conv: dict[str, list[Submitted]] = defaultdict(list)
    for sub in taken.values():
        by_conv[sub.conv].append(sub)
    for record in records:
        if (record.user, record.device) not in level:
            continue
        seen = {(shown.conv, shown.seq): shown.client_id for shown in record.shown}
        for conv, subs in by_conv.items():
            if record.user not in members[conv]:
                continue
            for sub in subs:
                if (sub.sender, sub.device) == (record.user, record.device):
                    continue
                client_id = seen.get((conv, sub.seq))
                if client_id is None:
                    if sub.loss_time_ms and end_ms > sub.loss_time_ms:
                        verdict.sizes["not shown because expired"] += 1
                        continue
                    verdict.found["lost"].append(
                        f"{record.user}/{record.device} never showed {conv} seq {sub.seq} "
                        f"(msg_id {sub.msg_id}, client_id {sub.client_id})"
                    )
                elif client_id != sub.client_id:
                    verdict.found["lost"].append(
                        f"{record.user}/{record.device} showed {client_id} as {conv} seq {sub.seq}; "
                        f"accepted was {sub.client_id}"
                    )


def _deaf_spans(record: DeviceRecord) -> list[tuple[int, int]]:
    """From a moment before each end of a connection or of the app until the next HELLO."""
    spans: list[tuple[int, int]] = []
    end_ms = 0
    for at_ms, what in record.lives:
        if what == "connected":
            if end_ms:
                spans.append((end_ms - UNHEARD_MS, at_ms))
            end_ms = 0
        elif not end_ms:
            end_ms = at_ms
    if end_ms:
        spans.append((end_ms - UNHEARD_MS, 1 << 62))
    return spans


def _within(at_ms: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(first <= at_ms <= last for first, last in spans)


def compare_audit(
    audit: Sequence[AuditLine],
    records: Sequence[DeviceRecord],
    members: Mapping[str, Sequence[str]],
    level: Iterable[tuple[str, str]],
    end_ms: int,
) -> Verdict:
    """Every obligation of every accepted message once, with the state that the clients' logs imply.

    acked    exactly those that some device of the user stored: shown, or found expired by the device
    expired  only with a deadline that has passed, and on no screen; or shown when no ack could be heard any
             more (the connection or the server was about to end): then the server never learnt of it
    parked   on no screen, and no device of the user is level
    """
    verdict = Verdict()
    taken = accepted(records)
    level_users = {user for user, _ in level}
    shown: set[tuple[int, str]] = set()
    heard: set[tuple[int, str]] = set()
    gone: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for record in records:
        shown.update((seen.msg_id, record.user) for seen in record.shown)
        spans = _deaf_spans(record)
        heard.update((seen.msg_id, record.user) for seen in record.shown if not _within(seen.at_ms, spans))
        for conv, first, last, _ in record.gone:
            gone[record.user, conv].append((first, last))
    states = {(line.msg_id, line.user): line.state for line in audit}
    for (msg_id, user), times in Counter((line.msg_id, line.user) for line in audit).items():
        if times > 1:
            verdict.found["ledger"].append(f"the audit lists {msg_id} for {user} {times} times")
    for msg_id, sub in taken.items():
        for user in members[sub.conv]:
            if user == sub.sender:
                continue
            verdict.sizes["obligations"] += 1
            state = states.pop((msg_id, user), "missing")
            verdict.sizes[state] += 1
            was_shown = (msg_id, user) in shown
            found_gone = any(first <= sub.seq <= last for first, last in gone[user, sub.conv])
            expired = bool(sub.loss_time_ms) and end_ms > sub.loss_time_ms
            unheard = was_shown and (msg_id, user) not in heard
            if state == "expired" and unheard:
                verdict.sizes["expired, shown when the connection ended"] += 1
            good = {
                "acked": was_shown or (expired and found_gone),
                "expired": expired and (not was_shown or unheard),
                "parked": not was_shown and user not in level_users,
            }.get(state, False)
            if not good:
                verdict.found["ledger"].append(
                    f"{sub.conv} seq {sub.seq} (msg_id {msg_id}) for {user} is {state}; on a screen: "
                    f"{was_shown}, skipped: {found_gone}, deadline passed: {expired}, a device is level: "
                    f"{user in level_users}"
                )
    for (msg_id, user), state in states.items():
        verdict.sizes["obligations whose SENT no client saw"] += 1
        if state in ("lost", "due", "unsettled", "missing"):
            verdict.found["ledger"].append(f"msg_id {msg_id} for {user}, whose SENT was not seen, is {state}")
    return verdict
