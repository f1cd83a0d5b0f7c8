"""The bus port: ordered topics between nodes, dispatchers and the api.

The bus is transport, not truth: the store holds every accepted message before the bus carries it onwards.
tests/contract/bus.py proves these promises against every implementation:

B1  records of the same (topic, key) are read in publish order
B2  kafka: once publish returned, kill -9 of any one process loses nothing; memory: a record lives as long
    as the process, and the system's promise rests on the store's settled mark
B3  a record that was not settled when its reader closed is read again by the group's next reader
B4  settling out of order never commits past an unsettled record
B5  at most max_unsettled records are out at one reader
B6  two groups each see every record; within one group each record is seen once (barring B3)
B7  publish raises BusUnavailable and nothing else; the records may then exist
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from fastim.bus.records import Payload

SUBMIT: Final = "submit"
UNDELIVERED: Final = "undelivered"
DISPATCH_GROUP: Final = "dispatch"
"""Reads submit and undelivered."""
NODE_GROUP: Final = "node"
"""Reads an inbox: what it has committed there, the settled mark may pass."""


def inbox_topic(node: str, boot: int) -> str:
    """The one ordered queue of one start of a node (seed: kafka.mq.S1)."""
    return f"inbox.{node}.{boot}"


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """A record to publish."""

    topic: str
    key: str
    value: Payload


class Record(msgspec.Struct, frozen=True, gc=False):
    """A record as read. Offsets grow by one per (topic, partition)."""

    topic: str
    partition: int
    offset: int
    key: str
    value: Payload


class Reader(Protocol):
    """One member of a group reading one topic."""

    async def read(self, max_records: int) -> list[Record]:
        """Wait until at least one record may be handed out, return up to max_records in order.

        Raises BusUnavailable for what does not pass by itself: the topic does not exist, another reader has
        taken an inbox over, records are gone for good. An outage is waited out. Returns [] once closed.
        """
        ...

    def settle(self, record: Record) -> None:
        """The record's next step is durable. Synchronous; once per record (UsageError for a second time).

        No effect once the reader has closed, the topic is gone, or the group took the partition away: then
        the record was given back, even if the partition returns to this reader.
        """
        ...

    def settle_all(self, records: Sequence[Record]) -> None:
        """settle() of each, for the price of one: a batch that has come to its end."""
        ...

    async def close(self) -> None:
        """Give the unsettled records back to the group."""
        ...


class Bus(Protocol):
    """Ordered, partitioned topics."""

    async def ensure(self, topic: str, partitions: int = 1) -> None:
        """Create the topic; nothing happens if it exists with the same count, UsageError if with another."""
        ...

    async def publish(self, records: Sequence[Outgoing]) -> None:
        """Append all records; see B1, B2, B7. A topic that does not exist: BusUnavailable, not temporary."""
        ...

    def reader(self, topic: str, group: str, *, max_unsettled: int) -> Reader:
        """Join `group`; reads start behind the group's committed offset (0 for a new group).

        The readers of a group share the partitions. A topic that does not exist: BusUnavailable, not
        temporary, here or from the first read().
        """
        ...

    async def lag(self, topic: str, group: str) -> int:
        """Published minus committed, over all partitions."""
        ...

    async def ends(self, topic: str) -> tuple[int, ...]:
        """The offset that the next record of each partition will get; () for a topic that does not exist."""
        ...

    async def passed(self, topic: str, group: str, ends: Sequence[int]) -> bool:
        """Whether everything below these offsets is settled for the group. A topic that is gone: if there was
        nothing below them."""
        ...

    def published(self, topic: str) -> int:
        """The offset the next record of partition 0 will get; 0 for an unknown topic.

        Between processes: behind the last record that this process published. lag() knows them all.
        """
        ...

    def committed(self, topic: str, group: str) -> int:
        """Everything below this offset of partition 0 is settled for the group.

        Between processes: by this process, or as the last lag() saw it.
        """
        ...

    async def delete(self, topic: str) -> None:
        """Forget the topic; its readers end."""
        ...
