"""The slow twin of fastim._core.acks: a dict of lists."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastim.errors import PeerError, UsageError


@dataclass
class Sent:
    tag: int
    msg_id: int
    item: object
    nbytes: int
    deadline_ms: int


@dataclass
class Session:
    last_tag: int = 0
    window: list[Sent] = field(default_factory=list)


class AckTable:
    def __init__(self) -> None:
        self.sessions: dict[int, Session] = {}
        self.resolved: list[tuple[int, object]] = []

    def session(self, slot: int) -> Session:
        if slot not in self.sessions:
            raise UsageError("not open")
        return self.sessions[slot]

    def open(self, slot: int) -> None:
        """Takes the slot that the table under test chose."""
        assert slot not in self.sessions
        self.sessions[slot] = Session()

    def close(self, slot: int) -> list[object]:
        window = self.session(slot).window
        del self.sessions[slot]
        return [sent.item for sent in window]

    def insert(self, slot: int, tag: int, msg_id: int, item: object, nbytes: int, deadline_ms: int) -> None:
        session = self.session(slot)
        if tag == 0 or (session.last_tag and tag != session.last_tag + 1):
            raise UsageError("out of turn")
        session.last_tag = tag
        session.window.append(Sent(tag, msg_id, item, nbytes, deadline_ms))

    def take(self, slot: int, chosen: list[Sent]) -> list[object]:
        session = self.session(slot)
        session.window = [sent for sent in session.window if sent not in chosen]
        return [sent.item for sent in chosen]

    def resolve(self, slot: int, chosen: list[Sent]) -> int:
        self.resolved += [(slot, item) for item in self.take(slot, chosen)]
        return len(chosen)

    def ack_to(self, slot: int, tag: int) -> int:
        session = self.session(slot)
        if tag > session.last_tag:
            raise PeerError("bad_ack", "never sent")
        return self.resolve(slot, [sent for sent in session.window if sent.tag <= tag])

    def ack_ids(self, slot: int, msg_ids: list[int]) -> int:
        return sum(
            self.resolve(slot, [sent for sent in self.session(slot).window if sent.msg_id == msg_id])
            for msg_id in msg_ids
            if msg_id != 0
        )

    def drain(self) -> list[tuple[int, object]]:
        out, self.resolved = self.resolved, []
        return out

    def overdue(self, mono_ms: int, cap: int) -> list[int]:
        return [slot for slot in sorted(self.sessions) if 0 < self.oldest_deadline(slot) <= mono_ms][:cap]

    def take_overdue(self, slot: int, mono_ms: int) -> list[object]:
        return self.take(slot, [sent for sent in self.session(slot).window if sent.deadline_ms <= mono_ms])

    def unacked(self, slot: int) -> tuple[int, int]:
        window = self.session(slot).window
        return len(window), sum(sent.nbytes for sent in window)

    def items(self, slot: int) -> list[tuple[int, object]]:
        return [(sent.tag, sent.item) for sent in self.session(slot).window]

    def oldest_deadline(self, slot: int) -> int:
        return min((sent.deadline_ms for sent in self.session(slot).window), default=0)

    def last_tag(self, slot: int) -> int:
        return self.session(slot).last_tag
