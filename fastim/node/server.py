"""Listen, upgrade, and refuse: from an accepted socket to a link that the node owns.

Hides sockets, TLS transports and picows' protocol object. Every refusal happens before 101 and before a link
exists, so nothing has to be undone.

    accepted ──[PROXY,] TLS ≤ 5 s──▶ request ≤ 5 s ──checks──▶ 101, link ──AUTH ≤ 5 s──▶ session
                                │             └─▶ 4xx, 5xx          └─▶ 4501
                                └─▶ closed without an answer

V1  an upgrade never raises into the library and never leaves a link behind     tests/system/test_listener.py
V2  only failures are limited per address; whoever authenticates is never counted        same
V3  plain sockets listen on loopback (dev) or talk to listed balancers only              same
V4  a bad certificate pair never replaces a good one              tests/system/test_tls.py
Which requests are taken is upgrade.py's, certificates are tls.py's. Source: promises, "Limits to ship";
docs/adr/0040.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import msgspec
from picows import WSAutoPingStrategy, WSUpgradeRequest, WSUpgradeResponse, WSUpgradeResponseWithListener
from picows.picows import WSProtocol  # type: ignore[attr-defined]

from fastim import observe
from fastim._core.conn import READ_BUFFER_BYTES, CoreConnection, CoreHub
from fastim.clock import Clock
from fastim.errors import UsageError
from fastim.node.proxied import Source
from fastim.node.tls import Handshakes, dev_certificate, make_server_context, reload_certificate
from fastim.node.upgrade import (
    HEALTH_PATH,
    RETRY,
    Address,
    Balancers,
    FailureLimit,
    Refusal,
    address_of,
    check_request,
)
from fastim.protocol import MAX_PACKET_BYTES, CloseCode

__all__ = [
    "FailureLimit", "Listener", "ListenerConfig", "attach_core_metrics", "dev_certificate",
    "make_server_context", "reload_certificate",
]  # fmt: skip

_log = logging.getLogger("fastim.node.server")

_OVERSHOOT: Final = 1_024
"""Sockets above max_connections that may be in their handshake; more are dropped unanswered."""
_CLOSE_POLL_S: Final = 0.05
_CLOSE_POLLS: Final = 30
"""close_all waits so long, 1.5 s, for the sockets it closed; the sweep aborts them after a second."""

_FAULTS: Final = frozenset(
    {CloseCode.PROTOCOL, CloseCode.TEXT_REFUSED, 1007, CloseCode.TOO_BIG, CloseCode.AUTH, CloseCode.BAD_FRAME}
)
"""Closing with one of these before AUTH succeeded counts against the address."""
_LABELLED: Final = frozenset(int(code) for code in CloseCode) | {1005, 1006, 1007, 1008}
"""Close codes that are labels of their own; peers may choose among 2,000 others."""


class ListenerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One listening address."""

    host: str = "127.0.0.1"
    port: int = 8443
    tls: ssl.SSLContext | None = None
    dev: bool = False
    """Allow plain ws on loopback addresses."""
    balancers: tuple[str, ...] = ()
    """Addresses or networks that terminate TLS and whose X-Forwarded-For is believed."""
    proxy_protocol: bool = False
    """Balancers begin with a PROXY header, version 1 or 2. Nobody else may, and they must."""
    origins: frozenset[str] = frozenset()
    """Origins that browsers may come from, compared exactly; a request without Origin is no browser's."""
    max_connections: int = 20_000
    failures_per_minute: int = 100
    """Failed handshakes and authentications per address (IPv6: per /64)."""
    handshake_timeout_s: float = 5.0
    tls_timeout_s: float = 5.0
    sndbuf_bytes: int = 61_440
    """The kernel doubles it and goes a buffer beyond: 124 KiB for a peer that does not read."""
    backlog: int = 4_096
    reuse_port: bool = False


class _Ear:
    """What picows takes for its logger, one per socket: here it says what it tells nobody else.

    Peers can provoke its lines, so only its own failures are written. It knows its socket only while that is
    connected: otherwise every refused socket would be a cycle for the collector.
    """

    __slots__ = ("sock",)

    def __init__(self) -> None:
        self.sock: _Socket | None = None

    def isEnabledFor(self, level: int) -> bool:
        return False

    def debug(self, *args: object, **options: object) -> None:
        pass

    warning = log = debug

    def info(self, message: str, *args: object) -> None:
        if self.sock is not None and message.startswith("Handshake timeout"):
            self.sock.refused = "timeout"

    def error(self, message: str, *args: Any) -> None:
        """Bytes that are no WebSocket frame: the argument is (close code, text)."""
        if message.startswith("WS parser error"):
            code, text = args[0]
            self._hangs_up(int(code), str(text))
        else:
            _log.error(message, *args)

    def exception(self, message: str, *args: object) -> None:
        _log.exception(message, *args)
        self._hangs_up(CloseCode.INTERNAL, "")

    def _hangs_up(self, code: int, text: str) -> None:
        if self.sock is not None and self.sock.link is not None:
            self.sock.link.parser_failed(code, text)

    def upgrade(self, request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        assert self.sock is not None
        return self.sock.upgrade(request)


class _Socket(WSProtocol):  # type: ignore[misc]
    """picows' protocol, plus what it does not tell its listener: the address, and how the socket ended."""

    __slots__ = (
        "_ear", "_listener", "_source", "address", "balanced", "left", "link", "peer_text", "refused",
    )  # fmt: skip

    def __init__(self, listener: Listener, source: Source | None = None) -> None:
        self._ear = _Ear()
        super().__init__(
            None, None, False, self._ear.upgrade, self._ear, True, listener.config.handshake_timeout_s,
            False, 20, 20, WSAutoPingStrategy.PING_WHEN_IDLE,
            False,  # auto-pong: it would hide PING frames from the wheel, the RSV check and the write bound
            MAX_PACKET_BYTES, None, READ_BUFFER_BYTES,
        )  # fmt: skip
        self._listener = listener
        self._source = source
        """Whom a PROXY header named."""
        self.balanced = False
        """A listed balancer opened the socket."""
        self.link: CoreConnection | None = None
        self.address: Address | None = None
        """Whom failures are counted against; None: nobody."""
        self.peer_text = "?"
        self.left = False
        """The peer went by itself."""
        self.refused = ""
        """Why, once refused through a fault of the peer."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._ear.sock = self
        super().connection_made(transport)
        name = transport.get_extra_info("peername")
        if name:
            self.set_peer(address_of(name[0]), name[1])
            self.balanced = self.address is not None and self.address in self._listener.balancers
        if self._source is not None:
            self.set_peer(address_of(self._source[0]), self._source[1])
        if not self._listener.admit(self):
            transport.abort()

    def set_peer(self, address: Address | None, port: int) -> None:
        self.address = address
        self.peer_text = f"[{address}]:{port}" if address and address.version == 6 else f"{address}:{port}"

    def eof_received(self) -> bool:
        self.left = True
        if self.link is not None:
            self.link.peer_ended = True
        super().eof_received()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if error is None and self.link is not None and not self.link.closed:
            # Over TLS an end of TCP without close_notify is told in no other way.
            self.link.peer_ended = True
        super().connection_lost(error)
        self.left = self.left or error is not None
        self._ear.sock = None
        self._listener.lost(self)

    def upgrade(self, request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        try:
            return self._listener.upgrade(self, request)
        except Refusal as refusal:
            observe.UPGRADES_REFUSED.labels(refusal.reason).inc()
            self.refused = refusal.reason if refusal.fault else ""
            response = WSUpgradeResponse.create_error_response(
                refusal.status, f"{refusal.detail}\n".encode(), refusal.headers
            )
        except Exception:
            # The library would send the text of the exception to the peer.
            observe.UPGRADES_REFUSED.labels("internal").inc()
            _log.exception("upgrade failed", extra={"peer": self.peer_text})
            response = WSUpgradeResponse.create_error_response(500, b"internal error\n")
        return WSUpgradeResponseWithListener(response, None)


class Listener:
    """One listening address of a node; accepted links get their owner from the hub's `accept`.

    failures: shared with other ways in, so that one address has one allowance.
    """

    def __init__(
        self, config: ListenerConfig, hub: CoreHub, clock: Clock, failures: FailureLimit | None = None
    ) -> None:
        self.config = config
        self._hub = hub
        self._limit = FailureLimit(config.failures_per_minute, clock) if failures is None else failures
        self.balancers = Balancers(config.balancers)
        self._sockets: set[_Socket] = set()
        self._doors: list[asyncio.AbstractServer | Handshakes] = []
        self._handshakes: list[Handshakes] = []
        self._links = 0
        self._accepting = False
        self.addresses: list[tuple[str, int]] = []
        self.draining = False
        """/health answers 503, upgrades are refused: balancers look elsewhere."""

    # -- life

    async def start(self) -> None:
        """Bind and listen. Raises UsageError, for a plain socket that the internet could reach too."""
        loop = asyncio.get_running_loop()
        try:
            infos = await loop.getaddrinfo(
                self.config.host or None, self.config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise UsageError(f"node.host is {self.config.host!r}: {error.strerror}") from None
        targets = list(dict.fromkeys((family, address) for family, _, _, _, address in infos))
        self._check_exposure([str(address[0]) for _, address in targets])
        self._accepting = True
        port = self.config.port
        try:
            for family, address in targets:
                # With port 0, every family listens on the port that the first was given.
                sock = self._bind(family, (address[0], port, *address[2:]))
                port = sock.getsockname()[1]
                self.addresses.append((sock.getsockname()[0], port))
                await self._serve(sock)
        except BaseException:
            self.stop_accepting()
            raise

    def _check_exposure(self, hosts: list[str]) -> None:
        if self.config.tls is not None or self.balancers:
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
        except (OSError, OverflowError) as error:
            sock.close()
            why = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"cannot listen on {address[0]} port {address[1]}: {why}") from None
        return sock

    async def _serve(self, sock: socket.socket) -> None:
        if self.config.tls is None and not self.config.proxy_protocol:
            # 5 KB a connection less than aiofastnet's transport, and sends go straight to send(2) either way.
            server = await asyncio.get_running_loop().create_server(
                lambda: _Socket(self), sock=sock, backlog=self.config.backlog
            )
            self._doors.append(server)
            return
        handshakes = Handshakes(
            sock,
            self.config.tls,
            lambda source: _Socket(self, source),
            timeout_s=self.config.tls_timeout_s,
            proxied=self._begins_with_proxy,
            admit=self._may_shake_hands,
            failed=self._handshake_failed,
        )
        self._doors.append(handshakes)
        self._handshakes.append(handshakes)
        handshakes.start(self.config.backlog)

    def stop_accepting(self) -> None:
        """Close the listening sockets; open connections stay. Idempotent."""
        self._accepting = False
        self.draining = True
        for door in self._doors:
            door.close()
        self._doors.clear()

    async def close_all(self, code: int, reason: str = "", window_ms: int = 0) -> None:
        """Close every connection, spread evenly over `window_ms`, and return when all sockets are gone.

        So the clients of a draining node do not come back in one storm. Whoever does not finish the closing
        handshake is aborted a second later. When it returns, every owner has been told.
        """
        for handshakes in self._handshakes:
            handshakes.hang_up()
        waiting = list(self._sockets)
        steps = max(1, min(window_ms // 50, len(waiting)))
        for step in range(steps):
            for sock in waiting[step::steps]:
                if sock.link is not None:
                    sock.link.close(code, reason)
                elif sock in self._sockets:
                    sock.transport.underlying_transport.abort()
            if step + 1 < steps:
                await asyncio.sleep(window_ms / 1000 / steps)
        for _ in range(_CLOSE_POLLS):
            if not self._sockets and not self._pending:
                break
            await asyncio.sleep(_CLOSE_POLL_S)
        for sock in list(self._sockets):
            sock.transport.underlying_transport.abort()
        # An abort takes a turn of the loop, what it makes of a link two.
        for _ in range(3):
            await asyncio.sleep(0)

    @property
    def connections(self) -> int:
        """Links that are open or closing."""
        return self._links

    @property
    def _pending(self) -> int:
        return sum(map(len, self._handshakes))

    # -- called by Handshakes

    def _begins_with_proxy(self, text: str) -> bool:
        address = address_of(text)
        return self.config.proxy_protocol and address is not None and address in self.balancers

    def _may_shake_hands(self, text: str) -> bool:
        """A TLS handshake costs as much as a hundred messages: none for an address that failed too often."""
        if self._pending + len(self._sockets) >= self.config.max_connections + _OVERSHOOT:
            observe.UPGRADES_REFUSED.labels("overload").inc()
            return False
        address = address_of(text)
        if address is not None and address not in self.balancers and self._limit.blocked(address):
            observe.UPGRADES_REFUSED.labels("rate").inc()
            return False
        return True

    def _handshake_failed(self, text: str, reason: str, left: bool) -> None:
        observe.UPGRADES_REFUSED.labels(reason).inc()
        address = address_of(text)
        if not left and address is not None and address not in self.balancers:
            self._limit.failed(address)

    # -- called by _Socket

    def admit(self, sock: _Socket) -> bool:
        """Whether a fresh socket may talk at all."""
        if not self._accepting or len(self._sockets) >= self.config.max_connections + _OVERSHOOT:
            return False
        self._sockets.add(sock)
        return True

    def lost(self, sock: _Socket) -> None:
        """A socket has ended."""
        if sock not in self._sockets:
            return
        self._sockets.discard(sock)
        link = sock.link
        if link is None:
            if sock.transport.request is None and not sock.left and self._accepting:
                # Late, or what came was no request; the library said why, or nothing.
                sock.refused = sock.refused or "header"
                observe.UPGRADES_REFUSED.labels(sock.refused).inc()
            fault = sock.refused != ""
        else:
            self._links -= 1
            sock.link = None
            code = link.close_code
            observe.CONNECTIONS.dec()
            observe.CONNECTIONS_CLOSED.labels(str(code) if code in _LABELLED else "other").inc()
            # Whoever had keys made and did not say who it is cost a third of a TLS handshake.
            fault = not link.authenticated and (code in _FAULTS or link.sealed)
        if fault and sock.address is not None and sock.address not in self.balancers:
            self._limit.failed(sock.address)

    def upgrade(self, sock: _Socket, request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        """Answer one request. Raises Refusal."""
        if request.path.partition(b"?")[0] == HEALTH_PATH:
            return self._health()
        self._find_source(sock, request)
        if sock.address is not None and self._limit.blocked(sock.address):
            raise Refusal(
                HTTPStatus.TOO_MANY_REQUESTS,
                "rate",
                f"more than {self.config.failures_per_minute} failures a minute from this address",
                headers=RETRY,
                fault=False,
            )
        if self.draining or self._links >= self.config.max_connections or self._hub.accept is None:
            raise _busy()
        headers = check_request(request, self.config.origins)
        response = WSUpgradeResponse.create_101_response(headers)
        link = CoreConnection(self._hub, sock.peer_text)
        answer = WSUpgradeResponseWithListener(response, link)
        sock.link = link
        self._links += 1
        observe.CONNECTIONS.inc()
        observe.CONNECTIONS_OPENED.inc()
        return answer

    def _health(self) -> WSUpgradeResponseWithListener:
        if self.draining or self._hub.accept is None:
            raise _busy()
        return WSUpgradeResponseWithListener(WSUpgradeResponse.create_ok_response(b"ok\n"), None)

    def _find_source(self, sock: _Socket, request: WSUpgradeRequest) -> None:
        """Behind a balancer, take the address that the balancer saw; nobody else's word counts."""
        if not self.balancers or sock.address is None:
            return
        if sock.address in self.balancers:
            # Itself a balancer's even if a PROXY header named it: one balancer may stand behind another.
            address = self.balancers.client(request.headers)
            if address is not None:
                sock.set_peer(address, 0)
        elif self.config.tls is None and not sock.balanced:
            raise Refusal(HTTPStatus.FORBIDDEN, "source", "plain connections are taken from balancers only")


def _busy() -> Refusal:
    return Refusal(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "overload",
        "this node takes no connections now",
        headers=RETRY,
        fault=False,
    )


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
        observe.BAD_SEALS: "bad_seals",
    }
    for tally, name in tallies.items():
        tally.attach(hub, lambda name=name: hub.counters()[name])  # type: ignore[misc]

    def detach() -> None:
        for tally in tallies:
            tally.detach(hub)

    return detach
