"""Questions to the cluster that are no traffic: which topics there are, how they are set, how far groups are.

Hides the admin client and one consumer without a group, both connected when the first question comes. Every
question has a deadline; until then it is asked again, whatever the brokers do. What KafkaError says becomes
BusUnavailable here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition  # type: ignore[import-untyped]
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped]
from aiokafka.admin.config_resource import (  # type: ignore[import-untyped]
    ConfigResource,
    ConfigResourceType,
)
from aiokafka.errors import (  # type: ignore[import-untyped]
    GroupCoordinatorNotAvailableError,
    KafkaError,
    NoError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)

from fastim.errors import BusUnavailable, UsageError

T = TypeVar("T")

FAILURES: Final = (KafkaError, OSError, TimeoutError)
"""What aiokafka raises while brokers go away."""
_AGAIN_S: Final = 0.1
_CALM_S: Final = 0.05
_SETTLED_S: Final = 1.0
"""A topic that one broker does not know may be so new that the others have not told it."""


class KafkaSecurity(msgspec.Struct, frozen=True, kw_only=True):
    """How a connection is secured. The default is plain text without a login: loopback and tests."""

    tls: bool = False
    ca_file: str = ""
    """PEM of who signs the brokers' certificates; else the system's."""
    cert_file: str = ""
    key_file: str = ""
    sasl: str = ""
    """PLAIN, SCRAM-SHA-256, SCRAM-SHA-512; empty: no login."""
    user: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"KafkaSecurity(tls={self.tls}, sasl={self.sasl!r}, user={self.user!r})"

    def options(self) -> dict[str, Any]:
        """As every aiokafka client takes them. UsageError for a file that cannot be read."""
        protocol = ("SASL_" if self.sasl else "") + ("SSL" if self.tls else "PLAINTEXT")
        options: dict[str, Any] = {"security_protocol": protocol}
        if self.tls:
            try:
                context = ssl.create_default_context(cafile=self.ca_file or None)
                if self.cert_file:
                    context.load_cert_chain(self.cert_file, self.key_file or None)
            except OSError as error:
                names = ", ".join(name for name in (self.ca_file, self.cert_file, self.key_file) if name)
                raise UsageError(f"TLS for Kafka cannot be set up with {names}: {error}") from None
            options["ssl_context"] = context
        if self.sasl:
            options["sasl_mechanism"] = self.sasl
            options["sasl_plain_username"] = self.user
            options["sasl_plain_password"] = self.password
        return options


class Clerk:
    """options: for every client, with bootstrap_servers and request_timeout_ms."""

    def __init__(self, options: dict[str, Any], patience_s: float) -> None:
        self._options = options
        self._patience_s = patience_s
        self._admin: Any = None
        self._consumer: Any = None
        self._opening = asyncio.Lock()

    async def close(self) -> None:
        admin, self._admin = self._admin, None
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.stop()
        if admin is not None:
            await admin.close()

    async def partitions(self, topic: str) -> int | None:
        """How many; None when the topic does not exist. Asked for a second when it seems not to."""
        deadline = time.monotonic() + _SETTLED_S
        while True:
            found = await self._ask("the topics", lambda: self._describe(topic))
            if found is not None or time.monotonic() > deadline:
                return found
            await asyncio.sleep(_AGAIN_S)

    async def create(self, topic: str, partitions: int, replication: int) -> None:
        """Create the topic and wait until each partition has a leader. Harmless when it is there."""

        async def create() -> None:
            copies = replication or await self._default_replication()
            config = {"cleanup.policy": "delete"}
            if copies >= 3:
                config["min.insync.replicas"] = "2"
            new = NewTopic(topic, partitions, copies, topic_configs=config)
            answer = await self._admin.create_topics([new])
            for _, code, *_ in answer.topic_errors:
                error = for_code(code)
                if error not in (NoError, TopicAlreadyExistsError):
                    raise error(f"creating {topic}")

        await self._ask(f"making {topic}", create)

    async def delete(self, topic: str) -> None:
        """Forget it. Harmless when it is not there."""

        async def delete() -> None:
            answer = await self._admin.delete_topics([topic])
            for _, code in answer.topic_error_codes:
                error = for_code(code)
                if error not in (NoError, UnknownTopicOrPartitionError):
                    raise error(f"deleting {topic}")

        await self._ask(f"deleting {topic}", delete)

    async def retention_ms(self, topic: str) -> int:
        """How long records are kept; 0: for ever, or there is no such topic."""

        async def ask() -> int:
            try:
                return int(await self._read_config(ConfigResourceType.TOPIC, topic, "retention.ms"))
            except UnknownTopicOrPartitionError:
                return 0

        return max(0, await self._ask(f"the settings of {topic}", ask))

    async def ends(self, topic: str, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        """By partition: the first offset that is still there, and the one the next record gets."""
        asked = [TopicPartition(topic, number) for number in partitions]

        async def ask() -> dict[int, tuple[int, int]]:
            starts = await self._consumer.beginning_offsets(asked)
            ends = await self._consumer.end_offsets(asked)
            return {tp.partition: (starts[tp], ends[tp]) for tp in asked}

        return await self._ask(f"the ends of {topic}", ask)

    async def committed(self, topic: str, group: str, partitions: Iterable[int]) -> dict[int, int]:
        """By partition, those that the group has committed."""
        asked = [TopicPartition(topic, number) for number in partitions]

        async def ask() -> dict[int, int]:
            try:
                found = await self._admin.list_consumer_group_offsets(group, partitions=asked)
            except AttributeError:  # aiokafka 0.14 stumbles over an error that the broker told
                raise GroupCoordinatorNotAvailableError(group) from None
            return {tp.partition: at.offset for tp, at in found.items() if at.offset >= 0}

        return await self._ask(f"the offsets of {group}", ask)

    async def _ask(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer. Raises BusUnavailable at the deadline."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._open()
                    return await ask()
            except FAILURES as error:
                if time.monotonic() + _AGAIN_S >= deadline:
                    raise BusUnavailable(f"{what}: no answer in {self._patience_s:g} s: {error!r}") from None
                if getattr(error, "retriable", True) is False and not _is_passing(error):
                    raise BusUnavailable(f"{what}: {error!r}", temporary=False) from None
            await asyncio.sleep(_AGAIN_S)

    async def _open(self) -> None:
        async with self._opening:
            if self._admin is None:
                admin = AIOKafkaAdminClient(**self._options)
                calm(admin._client)
                await _start(admin.start, admin.close)
                self._admin = admin
            if self._consumer is None:
                consumer = AIOKafkaConsumer(**self._options)
                calm(consumer._client)
                await _start(consumer.start, consumer.stop)
                self._consumer = consumer

    async def _describe(self, topic: str) -> int | None:
        (found,) = await self._admin.describe_topics([topic])
        error = for_code(found["error_code"])
        if error is UnknownTopicOrPartitionError:
            return None
        if error is not NoError:
            raise error(topic)
        if any(partition["leader"] < 0 for partition in found["partitions"]):
            raise TimeoutError(f"{topic} has a partition without a leader")
        return len(found["partitions"])

    async def _default_replication(self) -> int:
        """The protocol version that aiokafka speaks has no word for "as the brokers have it"."""
        cluster = await self._admin.describe_cluster()
        node = cluster["brokers"][0]["node_id"]
        return int(
            await self._read_config(ConfigResourceType.BROKER, str(node), "default.replication.factor")
        )

    async def _read_config(self, kind: Any, name: str, key: str) -> str:
        answers = await self._admin.describe_configs([ConfigResource(kind, name, {key: None})])
        for answer in answers:
            for code, message, _, _, entries in answer.resources:
                if code:
                    raise for_code(code)(message)
                for entry in entries:
                    if entry[0] == key:
                        return str(entry[1])
        raise TimeoutError(f"{name} has no {key}")


def calm(client: Any) -> None:
    """Let an aiokafka client ask for metadata once in _CALM_S at most.

    Without it a client spins, at 5,000 requests a second, for as long as a topic it uses has no leader or was
    deleted: its sender and its fetcher ask again as soon as they are answered.
    """
    update = client._metadata_update
    asked_at = -_CALM_S

    async def update_calmly(cluster: Any, topics: Any) -> Any:
        nonlocal asked_at
        await asyncio.sleep(max(0.0, asked_at + _CALM_S - time.monotonic()))
        asked_at = time.monotonic()
        return await update(cluster, topics)

    client._metadata_update = update_calmly


class _Rarely(logging.Filter):
    """One line a second of each kind: aiokafka logs every attempt, and an outage has thousands."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now = str(record.msg), time.monotonic()
        if now - self._said.get(kind, -1.0) < 1.0:
            return False
        self._said[kind] = now
        return True


for _name in (
    "cluster", "conn", "consumer.fetcher", "consumer.group_coordinator", "producer.sender"
):  # fmt: skip
    logging.getLogger(f"aiokafka.{_name}").addFilter(_Rarely())
logging.getLogger("aiokafka").addFilter(_Rarely())  # its client module


def _is_passing(error: BaseException) -> bool:
    """Not marked retriable by aiokafka, and still only a moment's trouble."""
    return not isinstance(error, KafkaError) or type(error) is KafkaError


async def _start(start: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]) -> None:
    """A client that did not come up is closed, else its collection is reported as a leak."""
    try:
        await start()
    except BaseException:
        with contextlib.suppress(*FAILURES):
            await stop()
        raise
