"""What clients write down while the server is killed under them: one file of JSON lines per device.

A line is written before the client goes on, so the file is what the person in front of the device saw. It is
kept across restarts of the client, never truncated.

    submit   client_id conv n loss     the app handed a message over; n counts per (device, conv)
    sent     client_id conv msg_id seq the server accepted it
    refused  client_id conv code       the server will never accept it
    shown    conv seq msg_id client_id sender loss    on the screen
    gone     conv seq to reason        never shown: expired on the device, or a SKIP
    life     what                      connected, lost, restart, offline, deaf, mute ...
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Submitted:
    """A message as its sender handed it over, and what became of it."""

    client_id: str
    sender: str
    device: str
    """"" for a REST caller."""
    conv: str
    n: int
    loss_time_ms: int
    msg_id: int = 0
    seq: int = 0
    refused: str = ""
    at_ms: int = 0
    sent_ms: int = 0


@dataclass
class Seen:
    """A message on a screen."""

    conv: str
    seq: int
    msg_id: int
    client_id: str
    sender: str
    loss_time_ms: int
    at_ms: int


@dataclass
class DeviceRecord:
    """Everything one device (or REST caller) wrote down."""

    user: str
    device: str
    submitted: dict[str, Submitted] = field(default_factory=dict)
    shown: list[Seen] = field(default_factory=list)
    gone: list[tuple[str, int, int, str]] = field(default_factory=list)
    """(conv, from, to, reason)"""
    strange: list[str] = field(default_factory=list)
    """Lines that cannot be: a second, different SENT, for one."""
    lives: list[tuple[int, str]] = field(default_factory=list)
    """(moment, what) of every `life` line."""


class ClientLog:
    """Appends to <directory>/<user>.<device>.jsonl, and keeps the same facts in memory."""

    def __init__(self, directory: Path, user: str, device: str) -> None:
        name = f"{user}.{device or 'rest'}.jsonl"
        self.path = directory / name
        self._file = self.path.open("a", buffering=1)
        self.record = DeviceRecord(user, device)

    def write(self, kind: str, **fields: Any) -> None:
        line = {"t": wall_ms(), "kind": kind, **fields}
        self._file.write(json.dumps(line) + "\n")
        apply(self.record, line)

    def close(self) -> None:
        self._file.close()


def apply(record: DeviceRecord, line: dict[str, Any]) -> None:
    """Take one line into the record."""
    match line["kind"]:
        case "submit":
            record.submitted[line["client_id"]] = Submitted(
                line["client_id"], record.user, record.device, line["conv"], line["n"], line["loss"],
                at_ms=line["t"],
            )  # fmt: skip
        case "sent":
            sub = record.submitted.get(line["client_id"])
            if sub is None:
                record.strange.append(f"SENT for {line['client_id']}, which was never submitted")
            elif sub.msg_id and (sub.msg_id, sub.seq) != (line["msg_id"], line["seq"]):
                record.strange.append(
                    f"{line['client_id']} was accepted twice: {sub.msg_id}/{sub.seq} and "
                    f"{line['msg_id']}/{line['seq']}"
                )
            elif not sub.msg_id:
                sub.msg_id, sub.seq, sub.sent_ms = line["msg_id"], line["seq"], line["t"]
                if sub.refused:
                    record.strange.append(
                        f"{line['client_id']} was refused ({sub.refused}) and then accepted"
                    )
        case "refused":
            sub = record.submitted.get(line["client_id"])
            if sub is not None:
                if sub.msg_id:
                    record.strange.append(
                        f"{line['client_id']} was accepted and then refused: {line['code']}"
                    )
                sub.refused = line["code"]
        case "shown":
            record.shown.append(
                Seen(
                    line["conv"],
                    line["seq"],
                    line["msg_id"],
                    line["client_id"],
                    line["sender"],
                    line["loss"],
                    line["t"],
                )
            )
        case "gone":
            record.gone.append((line["conv"], line["seq"], line["to"], line["reason"]))
        case "life":
            record.lives.append((line["t"], line["what"]))


def read_logs(directory: Path) -> list[DeviceRecord]:
    """The records of all files of a run; a torn last line is left out."""
    records = []
    for path in sorted(directory.glob("*.jsonl")):
        user, device = path.name.removesuffix(".jsonl").rsplit(".", 1)
        record = DeviceRecord(user, "" if device == "rest" else device)
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            apply(record, line)
        records.append(record)
    return records
