"""What the Kafka bus does while brokers are away, and that it goes on by itself when they are back.

Every test has brokers of its own, to kill and to stop; the first ones have none at all.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fastim.bus.base import Outgoing
from fastim.bus.kafka import KafkaBus, KafkaSecurity
from fastim.errors import BusUnavailable
from tests.contract.bus import fresh_topic, outgoing, read_exactly, values
from tests.servers import Servers

RESUMED_S = 10.0
"""The promise: seconds from a server's return to the first record."""


def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"kafka://127.0.0.1:{probe.getsockname()[1]}"


async def refused_after(publishing: asyncio.Future[None] | asyncio.Task[None]) -> float:
    """Seconds until BusUnavailable, which may pass."""
    began = time.monotonic()
    with pytest.raises(BusUnavailable) as error:
        await publishing
    assert error.value.temporary
    return time.monotonic() - began


class Traffic:
    """One publisher that repeats what was refused, one reader that settles; both keep what they saw."""

    def __init__(self, bus: KafkaBus, topic: str, keys: int = 1) -> None:
        self.acked: list[int] = []
        self.read: list[int] = []
        self.refusals: list[float] = []
        """How long each publish that was refused took."""
        self.longest_gap_s = 0.0
        self._bus, self._topic, self._keys = bus, topic, keys
        self._stop = False
        self._reader = bus.reader(topic, "g", max_unsettled=5000)
        self._tasks = [asyncio.create_task(self._publish()), asyncio.create_task(self._take())]

    async def _publish(self) -> None:
        number = 0
        acked_at = time.monotonic()
        while not self._stop:
            began = time.monotonic()
            batch = range(number, number + 20)
            records = [Outgoing(self._topic, f"k{n % self._keys}", str(n).encode()) for n in batch]
            try:
                await self._bus.publish(records)
            except BusUnavailable:
                self.refusals.append(time.monotonic() - began)
                await asyncio.sleep(0.05)
                continue
            self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - acked_at)
            acked_at = time.monotonic()
            self.acked += batch
            number += 20
            await asyncio.sleep(0.005)

    async def _take(self) -> None:
        while records := await self._reader.read(1000):
            self.read += [int(record.value) for record in records]
            self._reader.settle_all(records)

    async def grows(self, deadline_s: float = RESUMED_S) -> float:
        """Wait until something new was acknowledged and read; returns the seconds."""
        began = time.monotonic()
        acked, last = len(self.acked), self.read[-1] if self.read else -1
        while len(self.acked) == acked or self.read[-1:] in ([], [last]):
            assert time.monotonic() - began < deadline_s, (
                f"it does not go on by itself: {len(self.acked) - acked} acknowledged, "
                f"{len(self.refusals)} refused, {len(self.read)} read, last {self.read[-1:]} and {last}"
            )
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def refused(self, times: int) -> None:
        """Wait until publish() was refused so often."""
        wanted, deadline = len(self.refusals) + times, time.monotonic() + 20
        while len(self.refusals) < wanted:
            assert time.monotonic() < deadline, "publish() is not refused"
            await asyncio.sleep(0.05)

    async def end(self) -> None:
        """Stop publishing, read what is left, and check that nothing is lost or out of order."""
        self._stop = True
        await self._tasks[0]
        deadline = time.monotonic() + 20
        while set(self.acked) - set(self.read):
            assert time.monotonic() < deadline, f"lost: {sorted(set(self.acked) - set(self.read))[:10]}"
            await asyncio.sleep(0.05)
        await self._reader.close()
        await self._tasks[1]
        first_seen = list(dict.fromkeys(self.read))
        for key in range(self._keys):
            of_key = [n for n in first_seen if n % self._keys == key]
            assert of_key == sorted(of_key)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def in_traffic(bus: KafkaBus, topic: str, keys: int, play: Callable[[Traffic], object]) -> Traffic:
    traffic = Traffic(bus, topic, keys)
    try:
        await traffic.grows(30)
        await play(traffic)  # type: ignore[misc]
        await traffic.end()
    finally:
        await traffic.cancel()
    return traffic


# ------------------------------------------------------------------------------------------ nobody there


async def test_without_a_broker_everything_but_read_ends_within_its_bound() -> None:
    bus = KafkaBus(nobody(), publish_timeout_s=0.5)
    reader = bus.reader("submit", "dispatch", max_unsettled=10)
    reading = asyncio.ensure_future(reader.read(1))
    for call in (bus.ensure("t"), bus.publish(outgoing("t", "a")), bus.lag("t", "g"), bus.delete("t")):
        assert await refused_after(asyncio.ensure_future(call)) < 1.0
    assert not reading.done()
    began = time.monotonic()
    await bus.close()
    assert await reading == []
    assert time.monotonic() - began < 2.0


async def test_what_waits_behind_a_refused_record_is_refused_with_it(own_servers: Servers) -> None:
    url = (await asyncio.to_thread(own_servers.start, "kafka"))["FASTIM_KAFKA"]
    topic = fresh_topic()
    bus = KafkaBus(url, publish_timeout_s=1.0, request_timeout_s=1.0, max_pending_bytes=1_000_000)
    try:
        await bus.ensure(topic)
        await bus.publish(outgoing(topic, "before"))
        await asyncio.to_thread(own_servers.kill, "kafka")
        on_its_way = asyncio.ensure_future(bus.publish(outgoing(topic, "on its way")))
        await asyncio.sleep(0.2)
        first = asyncio.ensure_future(bus.publish(outgoing(topic, "first")))
        await asyncio.sleep(0.7)
        behind = asyncio.ensure_future(bus.publish(outgoing(topic, "behind")))
        await refused_after(on_its_way)
        await refused_after(first)
        assert await refused_after(behind) < 0.9, "it waited for its own deadline"

        crowd = [asyncio.ensure_future(bus.publish([Outgoing(topic, "k", bytes(200_000))])) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(BusUnavailable, match="bytes wait to be published; limit 1,000,000"):
            await bus.publish(outgoing(topic, "too much"))
        await asyncio.gather(*crowd, return_exceptions=True)
    finally:
        await bus.close()
    assert bus.writer.pending_bytes == 0


# ------------------------------------------------------------------------------- one broker, gone and back


async def test_a_broker_that_was_killed_or_stood_still_comes_back_to_a_bus_that_goes_on(
    own_servers: Servers,
) -> None:
    url = (await asyncio.to_thread(own_servers.start, "kafka"))["FASTIM_KAFKA"]
    topic = fresh_topic()
    bus = KafkaBus(url, publish_timeout_s=2.0, request_timeout_s=2.0)

    async def play(traffic: Traffic) -> None:
        for gone, back in ((own_servers.kill, own_servers.start), (own_servers.pause, own_servers.resume)):
            await asyncio.to_thread(gone, "kafka")
            await traffic.refused(2)
            await asyncio.to_thread(back, "kafka")
            print(f"goes on {await traffic.grows():.1f} s after its return")

    try:
        await bus.ensure(topic, 2)
        traffic = await in_traffic(bus, topic, 2, play)
        assert max(traffic.refusals) < 2.5, "publish() has a bound"
    finally:
        await bus.close()


# ------------------------------------------------------------------------------------------- three brokers


async def test_a_leader_killed_under_load_costs_seconds_and_no_record(own_servers: Servers) -> None:
    url = (await asyncio.to_thread(own_servers.start, "kafka3"))["FASTIM_KAFKA3"]
    topic = fresh_topic()
    bus = KafkaBus(url)

    async def play(traffic: Traffic) -> None:
        (found,) = await bus.clerk._admin.describe_topics([topic])
        leader = f"kafka3.{found['partitions'][0]['leader']}"
        await asyncio.to_thread(own_servers.kill, leader)
        print(f"{leader} killed: goes on after {await traffic.grows(20):.1f} s")
        await asyncio.to_thread(own_servers.start, leader)
        await traffic.grows()

    try:
        await bus.ensure(topic)
        (found,) = await bus.clerk._admin.describe_topics([topic])
        assert len(found["partitions"][0]["replicas"]) == 3
        traffic = await in_traffic(bus, topic, 1, play)
        print(f"{len(traffic.acked)} acknowledged, longest silence {traffic.longest_gap_s:.1f} s")
    finally:
        await bus.close()


# ------------------------------------------------------------------------------------------------ security


def certificate(directory: Path) -> tuple[Path, Path]:
    """(what clients trust, what the broker shows: key and certificate) for 127.0.0.1."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fastim test broker")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    trusted, shown = directory / "ca.pem", directory / "broker.pem"
    trusted.write_bytes(pem)
    shown.write_bytes(secret + pem)
    return trusted, shown


async def test_a_broker_that_wants_tls_and_a_password_gets_both(own_servers: Servers, tmp_path: Path) -> None:
    trusted, shown = certificate(tmp_path)
    plain = (await asyncio.to_thread(own_servers.start, "kafka"))["FASTIM_KAFKA"]
    await asyncio.to_thread(own_servers.stop, "kafka")
    port = int(plain.rpartition(":")[2])
    secure = port + 4  # within the ports of this world, and nobody else's
    login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    (own_servers.directory / "kafka.properties").write_text(
        f"listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{port + 1},"
        f"SECURE://127.0.0.1:{secure}\n"
        f"advertised.listeners=PLAINTEXT://127.0.0.1:{port},SECURE://127.0.0.1:{secure}\n"
        "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL\n"
        "ssl.keystore.type=PEM\n"
        f"ssl.keystore.location={shown}\n"
        "sasl.enabled.mechanisms=PLAIN\n"
        f'listener.name.secure.plain.sasl.jaas.config={login} user_fastim="a secret";\n'
    )
    await asyncio.to_thread(own_servers.start, "kafka")
    url = f"kafka://127.0.0.1:{secure}"
    topic = fresh_topic()
    right = KafkaSecurity(tls=True, ca_file=str(trusted), sasl="PLAIN", user="fastim", password="a secret")
    bus = KafkaBus(url, security=right)
    try:
        await bus.ensure(topic)
        await bus.publish(outgoing(topic, "a"))
        assert values(await read_exactly(bus.reader(topic, "g", max_unsettled=10), 1)) == ["a"]
    finally:
        await bus.close()

    for wrong in (
        KafkaSecurity(tls=True, ca_file=str(trusted), sasl="PLAIN", user="fastim", password="another"),
        KafkaSecurity(tls=True, sasl="PLAIN", user="fastim", password="a secret"),  # who signed it?
        KafkaSecurity(sasl="PLAIN", user="fastim", password="a secret"),
    ):
        bus = KafkaBus(url, security=wrong, publish_timeout_s=1.0, request_timeout_s=1.0)
        with pytest.raises(BusUnavailable):
            await bus.publish(outgoing(topic, "b"))
        with suppress(BusUnavailable):
            await bus.close()
