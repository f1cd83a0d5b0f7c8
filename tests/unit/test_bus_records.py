"""Records of the bus survive the trip, and a record of the next version is still readable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import msgspec
import pytest

from fastim.bus import records as r
from fastim.protocol import SendItem, SentItem

CID = bytes(range(16))
ITEM = SendItem(CID, 1, b"hi", 1_790_000_000_000, 3, ["bob"])

SUBMITS: list[r.BusRecord] = [
    r.Submit("p:alice:bob", "alice", "phone", "s1", "inbox.n1.1", [ITEM]),
    r.Submit("s:zoe", "billing", "", "req-1", "inbox.api.1", [ITEM, ITEM], 7, True, "trace-1"),
    r.ReadNotice("p:alice:bob", "alice", 12, "s1", True),
]
UNDELIVERED: list[r.BusRecord] = [r.Undelivered("bob", "phone", "p:alice:bob", 12, 3, "timeout")]
INBOX: list[r.BusRecord] = [
    r.Deliver("g:team", 12, 2**53 - 1, 0, "alice", ["bob", "carol"], "s1", b"\x00tail"),
    r.Reply(
        "s1", "alice", "p:alice:bob", 1, [SentItem(CID, 9, 12, 5)], [r.Refusal(CID, "expired", "late", False)]
    ),
    r.Reply("s1", "alice", "p:alice:bob", 0, [], []),
    r.Nudge("bob", "p:alice:bob", 4),
    r.Mark("p:alice:bob", "alice", 12, ["alice", "bob"], "s1"),
    r.Kick("bob", "phone", "s2", 2**40, 4507, "replaced"),
]
ALL: list[tuple[r.BusRecord, Callable[[bytes], Any]]] = [
    *((record, r.decode_submit) for record in SUBMITS),
    *((record, r.decode_undelivered) for record in UNDELIVERED),
    *((record, r.decode_inbox) for record in INBOX),
]
every_record = pytest.mark.parametrize(
    ("record", "decode"), ALL, ids=[f"{n}-{type(record).__name__}" for n, (record, _) in enumerate(ALL)]
)


@every_record
def test_a_record_survives_the_trip(record: r.BusRecord, decode: Callable[[bytes], Any]) -> None:
    found = decode(r.encode(record))
    assert type(found) is type(record)
    assert found == record


@every_record
def test_a_record_of_a_later_version_loses_only_what_is_new(
    record: r.BusRecord, decode: Callable[[bytes], Any]
) -> None:
    values = msgpack.unpackb(r.encode(record))
    assert decode(msgpack.packb([*values, {"later": 1}, None])) == record


def test_a_record_of_an_earlier_version_is_filled_with_defaults() -> None:
    short = msgpack.packb([1, "p:alice:bob", "alice", "phone", "s1", "inbox.n1.1", [[CID, 1, b"hi"]]])
    assert r.decode_submit(short) == r.Submit(
        "p:alice:bob", "alice", "phone", "s1", "inbox.n1.1", [SendItem(CID, 1, b"hi")]
    )


def test_every_kind_of_record_is_covered_and_has_a_number_of_its_own() -> None:
    kinds = {kind for kind in vars(r).values() if isinstance(kind, type) and issubclass(kind, r.BusRecord)}
    assert {type(record) for record, _ in ALL} == kinds - {r.BusRecord}
    assert len({type(record).__struct_config__.tag for record, _ in ALL}) == len(kinds) - 1


@pytest.mark.parametrize("decode", [r.decode_submit, r.decode_undelivered, r.decode_inbox])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x91\x63",
        b"\x92\x01\xa1",
        b"garbage",
        b"\x91\x01",
        b"\x94\x06\xa1\xff\xa1a\x01",
    ],
)
def test_what_is_no_record_is_refused(decode: Callable[[bytes], Any], data: bytes) -> None:
    with pytest.raises(r.MALFORMED):
        decode(data)


def test_a_topic_takes_only_its_own_records() -> None:
    for record in INBOX:
        with pytest.raises(msgspec.MsgspecError):
            r.decode_submit(r.encode(record))
    for record in SUBMITS:
        with pytest.raises(msgspec.MsgspecError):
            r.decode_inbox(r.encode(record))
