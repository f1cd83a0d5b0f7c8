"""Kafka: the brokers, and the topics that all processes share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped]
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType  # type: ignore[import-untyped]
from aiokafka.errors import for_code  # type: ignore[import-untyped]

from fastim.app.backends import kafka_security
from fastim.app.doctor.report import DEADLINE_S, Finding
from fastim.bus.base import SUBMIT, UNDELIVERED
from fastim.config import Config

_SUBJECT: Final = "bus"
_LEAST_RETENTION_MS: Final = 24 * 3_600_000
"""Kafka deletes what nobody has read yet without a word: a day is time to notice and to mend."""
_ENOUGH_COPIES: Final = 3
_READ: Final = ("retention.ms", "retention.bytes", "min.insync.replicas", "cleanup.policy",
                "unclean.leader.election.enable")  # fmt: skip


async def examine_kafka(config: Config) -> AsyncIterator[Finding]:
    """Brokers, their defaults, submit and undelivered."""
    admin = AIOKafkaAdminClient(
        bootstrap_servers=config.bus_url.removeprefix("kafka://").rstrip("/"), client_id="fastim-doctor",
        request_timeout_ms=round(DEADLINE_S * 1000), **kafka_security(config).options(),
    )  # fmt: skip
    try:
        await admin.start()
        cluster = await admin.describe_cluster()
        brokers = cluster["brokers"]
        names = ", ".join(f"{broker['host']}:{broker['port']}" for broker in brokers)
        yield Finding(True, _SUBJECT, f"{len(brokers)} broker{'s' if len(brokers) != 1 else ''} up: {names}")
        async for finding in _defaults(admin, str(brokers[0]["node_id"]), len(brokers), config):
            yield finding
        wanted = {SUBMIT: config.bus.submit_partitions, UNDELIVERED: config.bus.undelivered_partitions}
        for topic, partitions in wanted.items():
            async for finding in _topic(admin, topic, partitions, len(brokers)):
                yield finding
    finally:
        await admin.close()


async def _defaults(admin: Any, broker: str, brokers: int, config: Config) -> AsyncIterator[Finding]:
    """What the brokers do with topics that nobody described, inboxes above all."""
    found = await _settings(
        admin, ConfigResourceType.BROKER, broker,
        ("auto.create.topics.enable", "default.replication.factor", "log.retention.ms"),
    )  # fmt: skip
    if found.get("auto.create.topics.enable") == "true":
        text = (
            "auto.create.topics.enable is true: the inbox of a node that is gone would come back; set false"
        )
        yield Finding(False, _SUBJECT, text)
    copies = config.bus.replication or int(found.get("default.replication.factor", "1"))
    yield _copies(f"new topics get {copies} cop{'y' if copies == 1 else 'ies'}", copies, brokers, config.dev)


async def _topic(admin: Any, topic: str, partitions: int, brokers: int) -> AsyncIterator[Finding]:
    subject = f"{_SUBJECT} {topic}"
    (found,) = await admin.describe_topics([topic])
    error = for_code(found["error_code"])
    if error.__name__ == "UnknownTopicOrPartitionError":
        yield Finding(True, subject, "is not there yet: the first dispatcher makes it")
        return
    if found["error_code"]:
        yield Finding(False, subject, f"cannot be described: {error.__name__}")
        return
    rows = found["partitions"]
    text = f"{len(rows)} partitions"
    if len(rows) != partitions:
        text += f", but bus.{topic}_partitions is {partitions}: they never change; write {len(rows)}"
        yield Finding(False, subject, text)
    leaderless = [row["partition"] for row in rows if row["leader"] < 0]
    short = [row["partition"] for row in rows if len(row["isr"]) < len(row["replicas"])]
    if leaderless:
        yield Finding(
            False, subject, f"partitions {_few(leaderless)} have no leader: too many brokers are away"
        )
    copies = min(len(row["replicas"]) for row in rows)
    settings = await _settings(admin, ConfigResourceType.TOPIC, topic, _READ)
    insync = int(settings.get("min.insync.replicas", "1"))
    text = f"{text}, {copies} cop{'y' if copies == 1 else 'ies'}, min.insync.replicas {insync}"
    if short:
        yield Finding(False, subject, f"{text}; partitions {_few(short)} are not in sync everywhere")
    elif brokers >= _ENOUGH_COPIES and (copies < _ENOUGH_COPIES or not 2 <= insync < copies):
        yield Finding(False, subject, f"{text}: one broker lost may lose records; 3 copies, 2 in sync")
    elif len(rows) == partitions:
        yield Finding(True, subject, text)
    yield _kept(subject, settings)


def _kept(subject: str, settings: dict[str, str]) -> Finding:
    """What may vanish before it is read."""
    if settings.get("cleanup.policy", "delete") != "delete":
        policy = settings["cleanup.policy"]
        return Finding(False, subject, f"cleanup.policy is {policy}: it drops records that wait; set delete")
    if settings.get("unclean.leader.election.enable") == "true":
        return Finding(False, subject, "unclean.leader.election.enable is true: it loses records; set false")
    kept_ms, kept_bytes = int(settings.get("retention.ms", "-1")), int(settings.get("retention.bytes", "-1"))
    if 0 <= kept_ms < _LEAST_RETENTION_MS:
        text = (
            f"retention.ms is {kept_ms:,}, at least {_LEAST_RETENTION_MS:,}: unread records are deleted then"
        )
        return Finding(False, subject, text)
    if kept_bytes >= 0:
        text = f"retention.bytes is {kept_bytes:,}: unread records are deleted above it; set -1"
        return Finding(False, subject, text)
    return Finding(
        True, subject, f"records are kept for {'ever' if kept_ms < 0 else f'{kept_ms // 3_600_000:,} h'}"
    )


def _copies(text: str, copies: int, brokers: int, dev: bool) -> Finding:
    if copies < _ENOUGH_COPIES and not dev:
        return Finding(False, _SUBJECT, f"{text}: 3 on {max(brokers, 3)} brokers, so that one may be lost")
    if copies > brokers:
        return Finding(False, _SUBJECT, f"{text} and there are {brokers} brokers: none can be made")
    return Finding(True, _SUBJECT, text)


async def _settings(admin: Any, kind: Any, name: str, keys: Iterable[str]) -> dict[str, str]:
    answers = await admin.describe_configs([ConfigResource(kind, name, dict.fromkeys(keys))])
    return {
        entry[0]: str(entry[1])
        for answer in answers
        for _, _, _, _, entries in answer.resources
        for entry in entries
        if entry[1] is not None
    }


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
