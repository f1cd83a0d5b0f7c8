"""Listen, upgrade, and refuse: from an accepted socket to a link that the node owns.

Hides HTTP and TLS: which upgrades are taken, what a refusal looks like, where certificates come from. Every
refusal happens before 101 and before a link exists, so nothing has to be undone.

    accepted ──TLS ≤ 5 s──▶ request ≤ 5 s ──checks──▶ 101, link ──AUTH ≤ 5 s──▶ session
                                │             └─▶ 4xx, 5xx          └─▶ 4501
                                └─▶ closed without an answer

V1  an upgrade never raises into the library and never leaves a link behind     tests/system/test_listener.py
V2  only failures are limited per address; whoever authenticates is never counted        same
V3  plain sockets listen on loopback (dev) or talk to listed balancers only              same
V4  a bad certificate pair never replaces a good one              tests/system/test_tls.py
Source: promises, "Limits to ship"; docs/adr/0040.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiofastnet
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from fastim._core.conn import CoreConnection, CoreHub
from picows import WSAutoPingStrategy, WSUpgradeRequest, WSUpgradeResponse, WSUpgradeResponseWithListener
from picows.picows import WSProtocol, _validate_upgrade_request

from fastim import observe
from fastim.clock import Clock
from fastim.errors import UsageError
from fastim.protocol import MAX_PACKET_BYTES, SUBPROTOCOL, CloseCode

_log = logging.getLogger("fastim.node.server")

WS_PATH: Final = b"/v1/ws"
HEALTH_PATH: Final = b"/health"
READ_BUFFER_BYTES: Final = 2_048
RETRY_AFTER_S: Final = 5
_OVERSHOOT: Final = 1_024
"""Sockets above max_connections that may be in their handshake; more are dropped unanswered."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ListenerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One listening address."""

    host: str = "127.0.0.1"
    port: int = 8443
    tls: ssl.SSLContext | None = None
    dev: bool = False
    """Allow plain ws on loopback addresses."""
    balancers: tuple[str, ...] = ()
    """Addresses or networks that terminate TLS and whose X-Forwarded-For is believed."""
    origins: frozenset[str] = frozenset()
    """Origins that browsers may come from, compared exactly; a request without Origin is no browser's."""
    max_connections: int = 20_000
    failures_per_minute: int = 100
    """Failed handshakes and authentications per address (IPv6: per /64)."""
    handshake_timeout_s: float = 5.0
    tls_timeout_s: float = 5.0
    sndbuf_bytes: int = 65_536
    backlog: int = 4_096
    reuse_port: bool = False


# ------------------------------------------------------------------------------------------ certificates


def make_server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """A server context: TLS 1.2 and up, forward secrecy, no compression, no renegotiation."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    # A phone that loses its network sends no close_notify; that is an end of TCP, not an attack on frames
    # that carry their own length.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_IGNORE_UNEXPECTED_EOF
    context.set_alpn_protocols(["http/1.1"])
    reload_certificate(context, cert, key)
    return context


def reload_certificate(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Use the pair for the next handshakes; open connections keep theirs. For SIGHUP.

    Raises UsageError, and leaves `context` as it was, when the pair cannot be loaded: the pair is tried on a
    scratch context first, because OpenSSL takes the certificate before it finds that the key does not fit.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"certificate {cert} with key {key} cannot be used: {error}") from None
    context.load_cert_chain(cert, key)


def dev_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for this machine in `directory`: (certificate, key), made when missing.

    Made again when it ends within a week or does not name this host.
    """
    cert_path, key_path = directory / "dev-tls-cert.pem", directory / "dev-tls-key.pem"
    host = socket.gethostname()
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    if host != "localhost" and len(host) <= 64 and host.isascii():
        names.append(x509.DNSName(host))
    names += [x509.IPAddress(ipaddress.ip_address(text)) for text in ("127.0.0.1", "::1")]
    if _still_good(cert_path, key_path, names, now):
        return cert_path, key_path
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fastim development")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key_path.unlink(missing_ok=True)
    with os.fdopen(os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return cert_path, key_path


def _still_good(cert: Path, key: Path, names: list[x509.GeneralName], now: datetime.datetime) -> bool:
    try:
        found = x509.load_pem_x509_certificate(cert.read_bytes())
        covered = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ValueError, x509.ExtensionNotFound, ssl.SSLError):
        return False
    return set(names) <= set(covered) and now + datetime.timedelta(days=7) < found.not_valid_after_utc


# ------------------------------------------------------------------------------------------------ limits


class FailureLimit:
    """A token bucket of failures per address: empty means refused until it has filled a little.

    Only failures take tokens: a carrier puts a city behind one address. Forgets full buckets, so memory is
    bounded by who failed within the last minute.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._capacity = float(per_minute)
        self._per_ms = per_minute / 60_000
        self._clock = clock
        self._buckets: dict[int, tuple[float, int]] = {}

    @staticmethod
    def key(address: Address) -> int:
        """IPv6 hosts own a /64; IPv4 sits below 2^32, and a v6 prefix shifted above it."""
        if isinstance(address, ipaddress.IPv6Address):
            if address.ipv4_mapped is not None:
                return int(address.ipv4_mapped)
            return (int(address) >> 64) + (1 << 32)
        return int(address)

    def blocked(self, address: Address) -> bool:
        key = self.key(address)
        return key in self._buckets and self._level(key) < 1.0

    def failed(self, address: Address) -> None:
        """Take a token."""
        key = self.key(address)
        self._buckets[key] = (max(0.0, self._level(key) - 1.0), self._clock.mono_ms())
        if len(self._buckets) > 65_536:
            self.forget()

    def forget(self) -> None:
        """Drop full buckets. O(addresses that failed lately)."""
        for key in [key for key in self._buckets if self._level(key) >= self._capacity]:
            del self._buckets[key]

    def _level(self, key: int) -> float:
        level, at_ms = self._buckets.get(key, (self._capacity, 0))
        return min(self._capacity, level + (self._clock.mono_ms() - at_ms) * self._per_ms)


# ----------------------------------------------------------------------------------------------- sockets


class _Refusal(Exception):
    """An answer instead of 101."""

    def __init__(
        self,
        status: HTTPStatus,
        reason: str,
        *,
        headers: tuple[tuple[str, str], ...] = (),
        fault: bool = True,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = headers
        self.fault = fault
        """Whether it counts against the address."""


class _Quiet:
    """What picows logs to. Peers can provoke its lines, so only its own failures are written."""

    def isEnabledFor(self, level: int) -> bool:
        return False

    def debug(self, *args: object, **options: object) -> None:
        pass

    info = warning = error = log = debug

    def exception(self, message: str, *args: object) -> None:
        _log.exception(message, *args)


_QUIET: Final = _Quiet()


class _Socket(WSProtocol):
    """picows' protocol, plus what it does not tell its listener: the address, and how the socket ended."""

    __slots__ = ("_listener", "address", "fault", "link", "peer_ended", "peer_text")

    def __init__(self, listener: Listener) -> None:
        config = listener.config
        super().__init__(
            None, None, False, self._upgrade, _QUIET, True, config.handshake_timeout_s,
            False, 20, 20, WSAutoPingStrategy.PING_WHEN_IDLE,
            False,  # auto-pong: it would hide PING frames from the wheel, the RSV check and the write bound
            MAX_PACKET_BYTES, None, READ_BUFFER_BYTES,
        )  # fmt: skip
        self._listener = listener
        self.link: CoreConnection | None = None
        self.address: Address | None = None
        self.peer_text = "?"
        self.peer_ended = False
        self.fault = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        name = transport.get_extra_info("peername")
        if name:
            self.set_peer(_address(name[0]), name[1])
        if not self._listener.admit(self):
            transport.abort()

    def set_peer(self, address: Address | None, port: int) -> None:
        self.address = address
        self.peer_text = f"[{address}]:{port}" if address and address.version == 6 else f"{address}:{port}"

    def eof_received(self) -> bool:
        self.peer_ended = True
        if self.link is not None:
            self.link.peer_ended = True
        super().eof_received()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._listener.lost(self)

    def _upgrade(self, request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        try:
            return self._listener.upgrade(self, request)
        except _Refusal as refusal:
            observe.UPGRADES_REFUSED.labels(refusal.reason).inc()
            self.fault = refusal.fault
            headers = (("Content-Length", "0"), *refusal.headers)
            response = WSUpgradeResponse.create_error_response(refusal.status, None, headers)
        except Exception:
            # The library would send the text of the exception to the peer.
            observe.UPGRADES_REFUSED.labels("internal").inc()
            _log.exception("upgrade failed", extra={"peer": self.peer_text})
            response = WSUpgradeResponse.create_error_response(500, None, (("Content-Length", "0"),))
        return WSUpgradeResponseWithListener(response, None)


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


_FAULTS: Final = frozenset(
    {CloseCode.PROTOCOL, CloseCode.TEXT_REFUSED, 1007, CloseCode.TOO_BIG, CloseCode.AUTH, CloseCode.BAD_FRAME}
)
"""Closing with one of these before AUTH succeeded counts against the address."""


class Listener:
    """One listening address of a node.

    accepted links get their owner from the hub's `accept`; the node calls `expire_unauthenticated` every
    250 ms.
    """

    def __init__(self, config: ListenerConfig, hub: CoreHub, clock: Clock) -> None:
        self.config = config
        self._hub = hub
        self._limit = FailureLimit(config.failures_per_minute, clock)
        self._balancers = _networks(config.balancers)
        self._sockets: set[_Socket] = set()
        self._servers: list[asyncio.AbstractServer] = []
        self._links = 0
        self._accepting = False
        self.addresses: list[tuple[str, int]] = []
        self.draining = False
        """/health answers 503, upgrades are refused: balancers look elsewhere."""

    # -- life

    async def start(self) -> None:
        """Bind and listen. Raises UsageError for a plain socket that the internet could reach."""
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(
            self.config.host or None, self.config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        targets = list(dict.fromkeys((family, address) for family, _, _, _, address in infos))
        self._check_exposure([str(address[0]) for _, address in targets])
        self._accepting = True
        port = self.config.port
        for family, address in targets:
            # With port 0, every family listens on the port that the first was given.
            sock = self._bind(family, (address[0], port, *address[2:]))
            port = sock.getsockname()[1]
            self.addresses.append((sock.getsockname()[0], port))
            self._servers.append(await self._serve(sock))

    def _check_exposure(self, hosts: list[str]) -> None:
        if self.config.tls is not None or self._balancers:
            return
        if not self.config.dev:
            raise UsageError(
                "plain ws needs --dev (loopback only) or node.balancers (who end TLS); otherwise set node.tls"
            )
        open_to_all = [host for host in hosts if not ipaddress.ip_address(host.partition("%")[0]).is_loopback]
        if open_to_all:
            raise UsageError(f"--dev allows plain ws on loopback only; {self.config.host!r} is {open_to_all}")

    def _bind(self, family: int, address: tuple[Any, ...]) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self.config.reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Accepted sockets inherit both. The kernel would else take 3.7 MB for a peer that never reads.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.config.sndbuf_bytes)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind(address)
        except OSError as error:
            sock.close()
            raise UsageError(f"cannot listen on {address[0]} port {address[1]}: {error.strerror}") from None
        return sock

    async def _serve(self, sock: socket.socket) -> asyncio.AbstractServer:
        loop = asyncio.get_running_loop()
        if self.config.tls is None:
            # 5 KB a connection less than aiofastnet's transport, and sends go straight to send(2) either way.
            return await loop.create_server(lambda: _Socket(self), sock=sock, backlog=self.config.backlog)
        server: asyncio.AbstractServer = await aiofastnet.create_server(
            loop,
            lambda: _Socket(self),
            sock=sock,
            backlog=self.config.backlog,
            ssl=self.config.tls,
            ssl_handshake_timeout=self.config.tls_timeout_s,
            ssl_shutdown_timeout=1.0,
        )
        return server

    def stop_accepting(self) -> None:
        """Close the listening sockets; open connections stay. Idempotent."""
        self._accepting = False
        self.draining = True
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def close_all(self, code: int, reason: str = "", window_ms: int = 0) -> None:
        """Close every connection, spread evenly over `window_ms`, and return when all sockets are gone.

        So the clients of a draining node do not come back in one storm. Whoever does not finish the closing
        handshake is aborted a second later.
        """
        waiting = list(self._sockets)
        steps = max(1, min(window_ms // 50, len(waiting)))
        for step in range(steps):
            for sock in waiting[step::steps]:
                if sock.link is not None and not sock.link.closed:
                    sock.link.close(code, reason)
                elif sock.link is None:
                    sock.transport.underlying_transport.abort()
            if step + 1 < steps:
                await asyncio.sleep(window_ms / 1000 / steps)
        for _ in range(30):
            if not self._sockets:
                return
            await asyncio.sleep(0.05)
        for sock in list(self._sockets):
            sock.transport.underlying_transport.abort()
        await asyncio.sleep(0)

    def expire_unauthenticated(self, mono_ms: int) -> int:
        """Every 250 ms: end links late with AUTH, fragments or closing; returns how many."""
        self._limit.forget()
        return self._hub.sweep(mono_ms)

    @property
    def connections(self) -> int:
        """Links that are open or closing."""
        return self._links

    # -- called by _Socket

    def admit(self, sock: _Socket) -> bool:
        """Whether a fresh socket may talk at all."""
        self._sockets.add(sock)
        return self._accepting and len(self._sockets) <= self.config.max_connections + _OVERSHOOT

    def lost(self, sock: _Socket) -> None:
        """A socket has ended."""
        self._sockets.discard(sock)
        link = sock.link
        if link is None:
            # No request was read and the peer did not leave by itself: late, or an endless header.
            fault = sock.fault or (sock.transport.request is None and not sock.peer_ended and self._accepting)
            if fault and not sock.fault:
                observe.UPGRADES_REFUSED.labels("timeout").inc()
        else:
            self._links -= 1
            sock.link = None
            observe.CONNECTIONS.dec()
            observe.CONNECTIONS_CLOSED.labels(str(link.close_code)).inc()
            fault = not link.authenticated and link.close_code in _FAULTS
        if fault and sock.address is not None:
            self._limit.failed(sock.address)

    def upgrade(self, sock: _Socket, request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        """Answer one request. Raises _Refusal."""
        path, question, _ = request.path.partition(b"?")
        if path == HEALTH_PATH:
            return self._health()
        self._check_source(sock, request)
        if sock.address is not None and self._limit.blocked(sock.address):
            raise _Refusal(HTTPStatus.TOO_MANY_REQUESTS, "rate", headers=_RETRY, fault=False)
        if self.draining or self._links >= self.config.max_connections:
            raise _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "overload", headers=_RETRY, fault=False)
        if path != WS_PATH:
            raise _Refusal(HTTPStatus.NOT_FOUND, "path")
        if question:
            # Query strings end in logs of proxies; a token belongs into AUTH.
            raise _Refusal(HTTPStatus.BAD_REQUEST, "query")
        protocols = self._check_headers(request)
        link = CoreConnection(self._hub, sock.peer_text)
        chosen = (("Sec-WebSocket-Protocol", SUBPROTOCOL),) if SUBPROTOCOL in protocols else ()
        answer = WSUpgradeResponseWithListener(WSUpgradeResponse.create_101_response(chosen), link)
        sock.link = link
        self._links += 1
        observe.CONNECTIONS.inc()
        observe.CONNECTIONS_OPENED.inc()
        return answer

    def _health(self) -> WSUpgradeResponseWithListener:
        if self.draining:
            raise _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "overload", headers=_RETRY, fault=False)
        return WSUpgradeResponseWithListener(WSUpgradeResponse.create_ok_response(b"ok\n"), None)

    def _check_source(self, sock: _Socket, request: WSUpgradeRequest) -> None:
        """Behind a balancer, take the address that the balancer saw; nobody else's word counts."""
        if not self._balancers or sock.address is None:
            return
        if not _listed(sock.address, self._balancers):
            if self.config.tls is None:
                raise _Refusal(HTTPStatus.FORBIDDEN, "source")
            return
        hops = [hop.strip() for hop in ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")]
        for hop in reversed(hops):
            address = _address(hop)
            if address is None:
                return
            if not _listed(address, self._balancers):
                sock.set_peer(address, 0)
                return

    def _check_headers(self, request: WSUpgradeRequest) -> list[str]:
        """The checks of RFC 6455 4.2.1 and ours; returns the offered subprotocols."""
        headers = request.headers
        origins = headers.getall("Origin", [])
        if origins and (len(origins) > 1 or origins[0] not in self.config.origins):
            raise _Refusal(HTTPStatus.FORBIDDEN, "origin")
        if len(headers.getall("Host", [])) != 1 or len(headers.getall("Sec-WebSocket-Key", [])) > 1:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "header")
        if "websocket" not in _words(headers.getall("Upgrade", [])) or "upgrade" not in _words(
            headers.getall("Connection", [])
        ):
            raise _Refusal(
                HTTPStatus.UPGRADE_REQUIRED, "method", headers=(("Upgrade", "websocket"), *_VERSION)
            )
        if headers.getall("Sec-WebSocket-Version", []) != ["13"]:
            raise _Refusal(HTTPStatus.UPGRADE_REQUIRED, "version", headers=_VERSION)
        # picows compares the whole header; Firefox sends "keep-alive, Upgrade".
        headers["Connection"] = "Upgrade"
        headers["Upgrade"] = "websocket"
        try:
            _validate_upgrade_request(request)
        except RuntimeError:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "header") from None
        return _words(headers.getall("Sec-WebSocket-Protocol", []), lower=False)


_RETRY: Final = (("Retry-After", str(RETRY_AFTER_S)),)
_VERSION: Final = (("Sec-WebSocket-Version", "13"),)


def _words(values: Iterable[str], *, lower: bool = True) -> list[str]:
    words = [word.strip() for value in values for word in value.split(",")]
    return [word.lower() for word in words] if lower else words


def _networks(texts: Iterable[str]) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise UsageError(f"node.balancers: {error}") from None


def _listed(address: Address, networks: tuple[Network, ...]) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks)


def attach_core_metrics(hub: CoreHub) -> Callable[[], None]:
    """Let the scrape read what the hub counts; returns what takes it back."""
    tallies = {
        observe.FRAMES_IN: "frames_in",
        observe.FRAMES_OUT: "frames_out",
        observe.PACKETS_IN: "packets_in",
        observe.PACKETS_OUT: "packets_out",
        observe.BYTES_IN: "bytes_in",
        observe.BYTES_OUT: "bytes_out",
        observe.PINGS: "pings",
        observe.ACK_FRAMES: "ack_frames",
        observe.OVERFLOWS: "overflows",
    }
    for tally, name in tallies.items():
        tally.attach(hub, lambda name=name: hub.counters()[name])  # type: ignore[misc]

    def detach() -> None:
        for tally in tallies:
            tally.detach(hub)

    return detach
