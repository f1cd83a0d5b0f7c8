"""The checkers of the kill run see what they are there to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kill.check import AuditLine, compare_audit, judge
from tests.kill.log import ClientLog, DeviceRecord, apply, read_logs

MEMBERS = {"p:a:b": ("a", "b")}
END_MS = 100_000
LEVEL = [("a", "d0"), ("b", "d0")]


def sender(*, losses: tuple[int, ...] = (0, 0, 0), order: tuple[int, ...] = (1, 2, 3)) -> DeviceRecord:
    """a/d0 sent three messages into p:a:b; message n became seq order[n - 1], msg_id 10 + n."""
    record = DeviceRecord("a", "d0")
    for n, (loss, seq) in enumerate(zip(losses, order, strict=True), 1):
        fields = {"t": 50_000, "client_id": f"c{n}", "conv": "p:a:b"}
        apply(record, {**fields, "kind": "submit", "n": n, "loss": loss})
        apply(record, {**fields, "kind": "sent", "msg_id": 10 + n, "seq": seq})
    return record


def reader(*seqs: int, at_ms: int = 50_000, loss: int = 0, device: str = "d0") -> DeviceRecord:
    """b showed these seqs in this order."""
    record = DeviceRecord("b", device)
    for seq in seqs:
        line = {"kind": "shown", "conv": "p:a:b", "seq": seq, "msg_id": 10 + seq, "client_id": f"c{seq}"}
        apply(record, {**line, "sender": "a", "loss": loss, "t": at_ms})
    return record


def kinds(*records: DeviceRecord) -> dict[str, int]:
    verdict = judge(records, MEMBERS, LEVEL, END_MS)
    return {kind: len(found) for kind, found in verdict.found.items() if found}


def test_good_run_is_good() -> None:
    assert kinds(sender(), reader(1, 2, 3)) == {}


def test_missing_message_is_lost() -> None:
    assert kinds(sender(), reader(1, 3)) == {"lost": 1}


def test_second_device_must_show_everything_too() -> None:
    verdict = judge(
        [sender(), reader(1, 2, 3), reader(1, device="d1")], MEMBERS, [*LEVEL, ("b", "d1")], END_MS
    )
    assert verdict.count("lost") == 2


def test_expired_message_may_be_missing_but_only_after_its_deadline() -> None:
    assert kinds(sender(losses=(0, 60_000, 0)), reader(1, 3)) == {}
    assert kinds(sender(losses=(0, END_MS + 1, 0)), reader(1, 3)) == {"lost": 1}


def test_message_shown_after_its_deadline_is_seen() -> None:
    assert kinds(sender(), reader(1, 2, 3, at_ms=50_000, loss=40_000)) == {"expiry": 3}


def test_message_shown_twice_is_seen() -> None:
    assert kinds(sender(), reader(1, 2, 2, 3)) == {"duplicates": 1}


def test_inversion_on_a_screen_is_seen() -> None:
    assert kinds(sender(), reader(1, 3, 2)) == {"inversions": 1}


def test_sender_order_is_checked() -> None:
    assert kinds(sender(order=(2, 1, 3)), reader(1, 2, 3))["inversions"] == 1


def test_two_results_for_one_client_id_are_seen() -> None:
    record = sender()
    apply(record, {"t": 1, "kind": "sent", "client_id": "c1", "conv": "p:a:b", "msg_id": 99, "seq": 9})
    assert kinds(record, reader(1, 2, 3)) == {"duplicates": 1}


AUDIT = [AuditLine(11, "b", "acked"), AuditLine(12, "b", "acked"), AuditLine(13, "b", "acked")]


@pytest.mark.parametrize(
    ("audit", "shown", "level", "wrong"),
    [
        (AUDIT, (1, 2, 3), LEVEL, 0),
        (AUDIT, (1, 2), LEVEL, 1),  # acked, but no device stored it
        (AUDIT[:2], (1, 2, 3), LEVEL, 1),  # an obligation is missing
        ([*AUDIT, AUDIT[0]], (1, 2, 3), LEVEL, 1),  # listed twice
        ([*AUDIT[:2], AuditLine(13, "b", "lost")], (1, 2, 3), LEVEL, 1),
        ([*AUDIT[:2], AuditLine(13, "b", "due")], (1, 2), [], 1),
        ([*AUDIT[:2], AuditLine(13, "b", "parked")], (1, 2), [], 0),
        ([*AUDIT[:2], AuditLine(13, "b", "parked")], (1, 2), LEVEL, 1),  # parked beside a level device
        ([*AUDIT[:2], AuditLine(13, "b", "parked")], (1, 2, 3), [], 1),  # parked, but on a screen
        ([*AUDIT[:2], AuditLine(13, "b", "expired")], (1, 2), LEVEL, 1),  # expired without a deadline
    ],
)
def test_audit_is_compared_id_by_id(
    audit: list[AuditLine], shown: tuple[int, ...], level: list[tuple[str, str]], wrong: int
) -> None:
    records = [sender(), reader(*shown)]
    assert compare_audit(audit, records, MEMBERS, level, END_MS).count("ledger") == wrong


def test_expired_obligation_needs_a_passed_deadline() -> None:
    records = [sender(losses=(0, 0, 60_000)), reader(1, 2)]
    audit = [*AUDIT[:2], AuditLine(13, "b", "expired")]
    assert compare_audit(audit, records, MEMBERS, LEVEL, END_MS).good
    assert not compare_audit(audit, records, MEMBERS, LEVEL, 59_000).good


@pytest.mark.parametrize(("lost_ms", "wrong"), [(50_100, 0), (49_000, 0), (52_000, 1), (0, 1)])
def test_expired_but_shown_is_wrong_unless_no_ack_could_be_heard(lost_ms: int, wrong: int) -> None:
    screen = reader(1, 2, 3)  # at 50,000
    apply(screen, {"t": 1, "kind": "life", "what": "connected"})
    if lost_ms:
        apply(screen, {"t": lost_ms, "kind": "life", "what": "lost"})
        apply(screen, {"t": 53_000, "kind": "life", "what": "connected"})
    audit = [*AUDIT[:2], AuditLine(13, "b", "expired")]
    records = [sender(losses=(0, 0, 60_000)), screen]
    assert compare_audit(audit, records, MEMBERS, LEVEL, END_MS).count("ledger") == wrong


def test_log_survives_a_restart_and_a_torn_line(tmp_path: Path) -> None:
    for n in (1, 2):
        log = ClientLog(tmp_path, "u.1", "d0")
        log.write("submit", client_id=f"c{n}", conv="p:a:b", n=n, loss=0)
        log.close()
    with (tmp_path / "u.1.d0.jsonl").open("a") as file:
        file.write('{"t": 1, "kind": "su')
    (record,) = read_logs(tmp_path)
    assert (record.user, record.device) == ("u.1", "d0")
    assert list(record.submitted) == ["c1", "c2"]
