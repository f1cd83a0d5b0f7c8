"""TLS at the listener: certificates, their reload, and peers that do not finish a handshake."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import resource
import socket
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
import websockets
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fastim import observe
from fastim.errors import UsageError
from fastim.node import tls
from fastim.node.server import dev_certificate, make_server_context, reload_certificate
from fastim.protocol import Ping, Pong, Probe, decode, encode
from tests.unit.conn_world import AUTH, PATIENCE_S, REQUEST, Client, World, until, ws


@pytest.fixture(autouse=True)
def no_debug_records(caplog: pytest.LogCaptureFixture) -> None:
    """aiofastnet logs its transports; a record kept until the teardown would keep the world of a test."""
    caplog.set_level(logging.WARNING)


def write_pair(directory: Path, name: str, *, kind: str = "ec") -> tuple[Path, Path]:
    """A self-signed pair for localhost whose subject is `name`."""
    private: Any
    if kind == "ec":
        private = ec.generate_private_key(ec.SECP256R1())
    else:
        private = rsa.generate_private_key(65_537, 2_048)
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(private, hashes.SHA256())
    )
    cert, key = directory / f"{name}-cert.pem", directory / f"{name}-key.pem"
    cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return cert, key


def client_context(cert: Path | None = None, *, newest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=cert)
    if cert is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if newest is not None:
        context.maximum_version = newest
    return context


async def served_name(port: int) -> str:
    """The subject of the certificate that a new handshake meets."""
    _, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=client_context(), server_hostname="localhost"
    )
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    name = x509.load_der_x509_certificate(found).subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    assert isinstance(name, str)
    return name


async def secure(world: World, *, before: bytes = b"") -> Client:
    """An upgraded, authenticated connection over TLS. before: said in clear in front of it."""
    sock = socket.socket()
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", world.port))
    await loop.sock_sendall(sock, before)
    reader, writer = await asyncio.open_connection(
        sock=sock, ssl=client_context(), server_hostname="localhost", limit=1 << 22
    )
    client = Client(reader, writer)
    world.clients.append(client)
    known = len(world.owners)
    client.raw(REQUEST + b"\r\n" + ws(2, AUTH))
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    await until(lambda: len(world.owners) > known and world.owners[known].link.authenticated)
    client.owner = world.owners[known]
    return client


# -------------------------------------------------------------------------------------------- handshakes


async def test_a_balancer_that_passes_tls_on_says_in_front_of_it_whom_it_speaks_for(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "one")
    config: dict[str, Any] = {"balancers": ("127.0.0.1",), "proxy_protocol": True, "failures_per_minute": 1}
    async with World(config=config | {"tls": make_server_context(*pair)}) as world:
        client = await secure(world, before=b"PROXY TCP4 203.0.113.9 10.0.0.1 40000 443\r\n")
        assert client.owner.link.peer == "203.0.113.9:40000"
        client.send(encode(Ping()))
        assert isinstance(await client.message(), Pong)
        # Noise instead of a handshake is the client's fault, and from then on only its own loss.
        noise = b"PROXY TCP4 203.0.113.8 10.0.0.1 1 443\r\n" + bytes(100)
        for _ in range(2):
            await (await world.dial(request=noise)).eof()
        with pytest.raises(ConnectionError):
            await secure(world, before=b"PROXY TCP4 203.0.113.8 10.0.0.1 2 443\r\n")
        with pytest.raises(ConnectionError):
            await secure(world)
        await secure(world, before=b"PROXY TCP6 2001:db8::7 2001:db8::1 2 443\r\n")


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_an_independent_client_connects_with_a_verified_certificate(
    tmp_path: Path, newest: ssl.TLSVersion
) -> None:
    cert, key = dev_certificate(tmp_path)
    async with (
        World(config={"tls": make_server_context(cert, key)}) as world,
        websockets.connect(
            f"wss://localhost:{world.port}/v1/ws",
            ssl=client_context(cert, newest=newest),
            host="127.0.0.1",
            proxy=None,
        ) as client,
    ):
        await client.send(AUTH)
        await client.send(encode(Ping()))
        async with asyncio.timeout(PATIENCE_S):
            packet = await client.recv()
        assert isinstance(packet, bytes)
        assert isinstance(decode(36, packet), Pong)
        world.owners[0].link.send(bytes(65_536))
        async with asyncio.timeout(PATIENCE_S):
            assert await client.recv() == bytes(65_536)
        await client.close(1000)
        await until(lambda: world.owners[0].closed)
        assert world.owners[0].closed == [(1000, True)]


async def test_old_tls_and_plain_text_are_refused(tmp_path: Path) -> None:
    async with World(config={"tls": make_server_context(*write_pair(tmp_path, "one"))}) as world:
        context = client_context()
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            context.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", world.port, ssl=context)
        plain = await world.dial()
        await plain.eof()
        assert world.owners == []


async def test_a_peer_that_does_not_finish_its_handshake_is_dropped(tmp_path: Path) -> None:
    context = make_server_context(*write_pair(tmp_path, "one"))
    async with World(config={"tls": context, "tls_timeout_s": 0.5}) as world:
        for data in (b"", b"\x16\x03\x01"):
            client = await world.dial(request=data)
            await client.eof()
        assert world.listener._sockets == set()
        good = await secure(world)
        await asyncio.sleep(0.1)
        assert not good.owner.link.closed


async def test_failed_handshakes_are_limited_and_quiet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_server_context(*write_pair(tmp_path, "one"))
    async with World(config={"tls": context, "failures_per_minute": 3}) as world:
        for _ in range(5):
            left = await world.dial(request=b"")
            left.writer.write_eof()
            await left.eof()
            left = await world.dial(request=b"\x16\x03\x01")
            await asyncio.sleep(0.01)
            left.reset()
        good = await secure(world)
        for _ in range(3):
            await (await world.dial(request=b"GET / HTTP/1.1\r\n\r\n")).eof()
        before = observe.UPGRADES_REFUSED.labels("rate")._value.get()
        with pytest.raises(OSError):  # noqa: PT011 - a reset or an end, as it comes
            await secure(world)
        assert observe.UPGRADES_REFUSED.labels("rate")._value.get() == before + 1
        good.send(encode(Ping()))
        assert isinstance(await good.message(), Pong)
    assert caplog.records == []


async def test_the_door_rests_when_descriptors_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_server_context(*write_pair(tmp_path, "one"))
    monkeypatch.setattr(tls, "_REST_S", 0.05)
    async with World(config={"tls": context}) as world:
        await secure(world)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = socket.socket()
        waiting.setblocking(False)
        spare: list[int] = []
        try:
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, limits[1]))
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.dup(waiting.fileno()))
            await asyncio.get_running_loop().sock_connect(waiting, ("127.0.0.1", world.port))
            await until(lambda: caplog.records)
            await asyncio.sleep(0.12)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            waiting.close()
            for descriptor in spare:
                os.close(descriptor)
        assert {record.message for record in caplog.records} == {"accept failed"}
        assert len(caplog.records) <= 6, "it did not spin"
        await secure(world)


async def test_close_all_ends_handshakes_too(tmp_path: Path) -> None:
    context = make_server_context(*write_pair(tmp_path, "one"))
    async with World(config={"tls": context}) as world:
        for data in (b"", b"\x16\x03\x01"):
            await world.dial(request=data)
        await until(lambda: world.listener._pending == 2)
        world.listener.stop_accepting()
        await world.listener.close_all(1012)
        assert world.listener._pending == 0
        for client in world.clients:
            await client.eof()


async def test_a_request_is_awaited_no_longer_behind_tls_than_in_the_open(tmp_path: Path) -> None:
    context = make_server_context(*write_pair(tmp_path, "one"))
    async with World(config={"tls": context, "handshake_timeout_s": 0.05}) as world:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port, ssl=client_context())
        client = Client(reader, writer)
        world.clients.append(client)
        await client.eof()
        await until(lambda: not world.listener._sockets)


# ---------------------------------------------------------------------------------------- links over TLS


async def test_what_waits_for_a_slow_reader_is_bounded_and_arrives_in_order(tmp_path: Path) -> None:
    context = make_server_context(*write_pair(tmp_path, "one"))
    async with World(config={"tls": context}) as world:
        client = await secure(world)
        link = client.owner.link
        client.writer.transport.pause_reading()
        sent = 0
        while not link.overflow:
            assert not link.closed
            link.send(sent.to_bytes(2, "big") + bytes(8_190))
            sent += 1
            if sent % 4 == 0:
                await asyncio.sleep(0)
        assert link.buffered_bytes() <= 300_000
        link.send(encode(Probe()))
        link.close(4408, "slow")
        client.writer.transport.resume_reading()
        got = b""
        while len(got) < sent * 8_192 + 2:
            got += await client.packet()
        assert [int.from_bytes(got[i * 8_192 : i * 8_192 + 2], "big") for i in range(sent)] == list(
            range(sent)
        )
        assert got.endswith(encode(Probe()))
        assert await client.closing() == (4408, b"slow")


async def test_beyond_the_hard_bound_a_link_is_aborted(tmp_path: Path) -> None:
    context = make_server_context(*write_pair(tmp_path, "one"))
    async with World(config={"tls": context}) as world:
        client = await secure(world)
        client.writer.transport.pause_reading()
        for _ in range(1_000):
            client.owner.quietly(client.owner.link.send, bytes(8_192))
            if client.owner.link.closed:
                break
            await asyncio.sleep(0)
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(1006, False)]
        assert world.hub.counters()["overflows"] == 1


async def test_ends_over_tls_are_told_apart(tmp_path: Path) -> None:
    context = make_server_context(*write_pair(tmp_path, "one"))
    async with World(config={"tls": context}) as world:
        ours, peers, ended, reset = [await secure(world) for _ in range(4)]
        ours.owner.link.close(4000, "idle")
        assert await ours.closing() == (4000, b"idle")
        ours.raw(ws(8, b"\x0f\xa0"))
        peers.raw(ws(8, b"\x03\xe9"))
        assert await peers.closing() == (1001, b"")
        # The bare end of TCP: no close frame, no close_notify.
        with socket.socket(fileno=os.dup(ended.writer.get_extra_info("socket").fileno())) as bare:
            bare.shutdown(socket.SHUT_WR)
        reset.reset()
        for client, expected in (
            (ours, (4000, True)), (peers, (1001, True)), (ended, (1006, True)), (reset, (1006, False)),
        ):  # fmt: skip
            await until(lambda client=client: client.owner.closed)  # type: ignore[misc]
            assert client.owner.closed == [expected]
        assert world.later(60_000) == 0


async def test_malformed_frames_over_tls_are_refused_with_their_code(tmp_path: Path) -> None:
    context = make_server_context(*write_pair(tmp_path, "one"))
    async with World(config={"tls": context}) as world:
        for bad, code in ((ws(3, b"x"), 1002), (ws(1, b"x"), 1003), (ws(2, b"x", mask=None), 1002)):
            client = await secure(world)
            client.owner.link.send(encode(Probe()))
            client.raw(bad)
            assert await client.packet() == encode(Probe())
            assert (await client.closing())[0] == code
            await client.close()


# ------------------------------------------------------------------------------------------ certificates


async def test_a_reload_serves_the_newer_pair_and_keeps_open_connections(tmp_path: Path) -> None:
    context = make_server_context(*write_pair(tmp_path, "old"))
    async with World(config={"tls": context}) as world:
        client = await secure(world)
        assert await served_name(world.port) == "old"
        reload_certificate(context, *write_pair(tmp_path, "new"))
        assert await served_name(world.port) == "new"
        client.send(encode(Ping()))
        assert isinstance(await client.message(), Pong)


async def test_a_bad_pair_never_replaces_a_good_one(tmp_path: Path) -> None:
    cert, key = write_pair(tmp_path, "good")
    other_cert, other_key = write_pair(tmp_path, "other")
    rsa_cert, rsa_key = write_pair(tmp_path, "rsa", kind="rsa")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    context = make_server_context(cert, key)
    async with World(config={"tls": context}) as world:
        for bad_cert, bad_key, said in (
            (other_cert, key, "cannot be used"),
            (cert, other_key, "cannot be used"),
            (garbage, key, "cannot be used"),
            (cert, garbage, "cannot be used"),
            (tmp_path / "missing.pem", key, "No such file"),
            (cert, tmp_path / "missing.pem", "No such file"),
            (rsa_cert, rsa_key, "restart to change it"),
        ):
            with pytest.raises(UsageError, match=said):
                reload_certificate(context, bad_cert, bad_key)
            assert await served_name(world.port) == "good"
        reload_certificate(context, other_cert, other_key)
        assert await served_name(world.port) == "other"


def test_a_server_does_not_start_on_a_bad_pair(tmp_path: Path) -> None:
    cert, _ = write_pair(tmp_path, "one")
    _, key = write_pair(tmp_path, "two")
    with pytest.raises(UsageError, match="cannot be used"):
        make_server_context(cert, key)


def test_a_dev_certificate_is_made_once_and_again_when_it_is_no_good(tmp_path: Path) -> None:
    cert, key = dev_certificate(tmp_path)
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    first = cert.read_bytes()
    assert dev_certificate(tmp_path) == (cert, key)
    assert cert.read_bytes() == first
    found = x509.load_pem_x509_certificate(first)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    for broken in (b"garbage", write_pair(tmp_path, "foreign")[0].read_bytes()):
        cert.write_bytes(broken)
        dev_certificate(tmp_path)
        second = cert.read_bytes()
        assert second not in (first, broken)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    key.unlink()
    dev_certificate(tmp_path)
    assert cert.read_bytes() != second
