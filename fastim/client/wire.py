"""One WebSocket: dial, packets in, packets out, how it ended. The boundary to sockets, on picows.

Hides TLS, HTTP and WebSocket. Whoever puts something else in its place (the simulation) keeps these:

W1  on_packet is called once per packet, in order; never after on_closed
W2  on_closed is called exactly once for a wire that `dial` returned, never from inside send, close or abort
W3  after close, abort or on_closed, sending is a no-op
W4  a dial that is cancelled or late leaves no socket behind       tests/unit/test_client_wire.py
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl as ssl_module
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from socket import SHUT_RDWR, SOCK_STREAM, socket
from typing import Final, Protocol
from urllib.parse import urlsplit

from picows import (
    WSCloseCode,
    WSError,
    WSFrame,
    WSHandshakeError,
    WSListener,
    WSMsgType,
    WSParsedURL,
    WSTransport,
    ws_connect,
)

from fastim.errors import UsageError
from fastim.protocol import MAX_PACKET_BYTES, SUBPROTOCOL, CloseCode

_log = logging.getLogger("fastim.client.wire")

WS_PATH: Final = "/v1/ws"
DIAL_TIMEOUT_S: Final = 10.0
UPGRADE_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 1.0
MAX_FRAGMENTS: Final = 64
ABNORMAL: Final = 1006
NO_STATUS: Final = 1005

Trust = ssl_module.SSLContext | str | Path | None


class Receiver(Protocol):
    """Who reads a wire."""

    def on_packet(self, packet: bytes) -> None: ...

    def on_closed(self, code: int, reason: str) -> None:
        """code: of the peer's close frame, ours if we closed first; 1006 without any."""
        ...


class Wire(Protocol):
    """An open connection."""

    max_packet_bytes: int
    """The largest packet that may be sent."""

    def send(self, packet: bytes) -> None: ...

    def close(self, code: int) -> None:
        """Say goodbye; the socket is dropped a second later if the peer does not answer."""
        ...

    def abort(self) -> None: ...

    def pause(self) -> None:
        """Read no more from the socket."""
        ...

    def resume(self) -> None: ...

    def buffered_bytes(self) -> int:
        """Waiting to be written."""
        ...

    async def gone(self) -> None:
        """Until the socket is closed for good."""
        ...


Dial = Callable[[Receiver], Awaitable[Wire]]


class DialError(ConnectionError):
    """No connection came about. retry_after_s: the server's wish, 0 if it had none."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def check_url(url: str) -> str:
    """The URL with its path. Raises UsageError for anything but wss://, and ws:// on loopback."""
    parts = urlsplit(url)
    if parts.scheme not in ("wss", "ws") or not parts.hostname:
        raise UsageError(f"url is {url!r}; must be wss://<host>[:<port>]")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise UsageError("url must hold no query, fragment or credentials; the token goes into AUTH")
    if parts.scheme == "ws" and not _is_loopback(parts.hostname):
        raise UsageError(f"url is {url!r}; plain ws is for loopback only, use wss")
    path = parts.path if parts.path not in ("", "/") else WS_PATH
    return f"{parts.scheme}://{parts.netloc}{path}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tls_context(trust: Trust) -> ssl_module.SSLContext:
    """TLS 1.2 and up, the server's name and certificate verified.

    trust: a context of the caller's, used as it is; a file of CA certificates (a development server's own
    certificate, for one) in place of the system's; None for the system's.
    """
    if isinstance(trust, ssl_module.SSLContext):
        return trust
    context = ssl_module.create_default_context(cafile=None if trust is None else str(trust))
    context.minimum_version = ssl_module.TLSVersion.TLSv1_2
    return context


class _Listener(WSListener):
    """picows' callbacks, and everything picows leaves to its user."""

    max_packet_bytes = MAX_PACKET_BYTES

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._transport: WSTransport | None = None
        self._parts: list[bytes] = []
        self._code = 0
        self._reason = ""
        self._closing = False
        self._watching: asyncio.Task[None] | None = None
        self.connected = False
        """The upgrade was seen through; from then on on_closed says how it ended."""

    # -- from picows

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport
        self.connected = True

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        kind = frame.msg_type
        if kind == WSMsgType.BINARY or kind == WSMsgType.CONTINUATION:
            # picows goes on parsing for a moment after it has found a frame too big.
            if self._closing or transport.is_close_frame_sent:
                return
            if frame.fin and not self._parts and kind == WSMsgType.BINARY:
                self._receiver.on_packet(frame.get_payload_as_bytes())
            else:
                self._fragment(kind == WSMsgType.BINARY, frame)
        elif kind == WSMsgType.CLOSE:
            self._on_close(transport, frame.get_payload_as_bytes())
        elif kind == WSMsgType.TEXT:
            self._fail(CloseCode.TEXT_REFUSED, "the server sent TEXT")

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._transport = None
        self._closing = True
        self._receiver.on_closed(self._code or ABNORMAL, self._reason)

    # -- inside

    def _fragment(self, first: bool, frame: WSFrame) -> None:
        if first is bool(self._parts):
            self._fail(CloseCode.PROTOCOL, "a fragment out of turn")
            return
        self._parts.append(frame.get_payload_as_bytes())
        if len(self._parts) > MAX_FRAGMENTS or sum(map(len, self._parts)) > MAX_PACKET_BYTES:
            self._fail(CloseCode.TOO_BIG, f"a message of more than {MAX_PACKET_BYTES:,} bytes")
        elif frame.fin:
            packet = b"".join(self._parts)
            self._parts.clear()
            self._receiver.on_packet(packet)

    def _on_close(self, transport: WSTransport, payload: bytes) -> None:
        if not self._code and transport.is_close_frame_sent:
            self._code, self._reason = ABNORMAL, "the server broke a rule of WebSocket"  # picows saw it
        elif not self._code:
            self._code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else NO_STATUS
            self._reason = payload[2:].decode(errors="replace")
        if not transport.is_close_frame_sent:
            transport.send_close(WSCloseCode.OK)
        self._closing = True
        transport.disconnect()

    def _fail(self, code: int, reason: str) -> None:
        """The server broke a rule of WebSocket. It hears which; for us the connection just broke."""
        self._reason = reason
        self.close(code)
        self._code = ABNORMAL

    # -- Wire

    def send(self, packet: bytes) -> None:
        if self._transport is not None and not self._closing:
            self._transport.send(WSMsgType.BINARY, packet)

    def close(self, code: int) -> None:
        transport = self._transport
        if transport is None or self._closing:
            return
        self._closing = True
        self._code = code
        transport.send_close(code)  # type: ignore[arg-type]  # any number is a code
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self.abort)

    def abort(self) -> None:
        self._closing = True
        if self._transport is not None:
            self._transport.disconnect(False)

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.underlying_transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None:
            self._transport.underlying_transport.resume_reading()

    def buffered_bytes(self) -> int:
        if self._transport is None:
            return 0
        return self._transport.underlying_transport.get_write_buffer_size()

    async def gone(self) -> None:
        if self._watching is not None:
            await asyncio.wait([self._watching])

    def watch(self, transport: WSTransport) -> None:
        """picows keeps what it found wrong in a future; asyncio complains if nobody asks for it."""

        async def ask() -> None:
            with suppress(Exception):
                await transport.wait_disconnected()

        self._watching = asyncio.create_task(ask(), name="fastim.client.wire")

    def pause_writing(self) -> None:
        """The client looks at buffered_bytes; picows would log a warning."""

    def resume_writing(self) -> None:
        pass


async def _connect(host: str, port: int, opened: list[socket]) -> socket:
    """A TCP connection to the first address that answers. Everything opened is in `opened`."""
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(host, port, type=SOCK_STREAM)
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, proto, _, address in infos:
        sock = socket(family, kind, proto)
        sock.setblocking(False)
        opened.append(sock)
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S / 2 / len(infos)):
                await loop.sock_connect(sock, address)
            return sock
        except (OSError, TimeoutError) as error:
            failure = error if isinstance(error, OSError) else OSError(f"{address[0]} did not answer")
            sock.close()
            opened.remove(sock)
        except BaseException:
            sock.close()
            raise
    raise failure


async def dial(url: str, receiver: Receiver, context: ssl_module.SSLContext | None) -> Wire:
    """Connect and upgrade. Raises DialError with the reason."""
    listener = _Listener(receiver)
    opened: list[socket] = []

    async def connect(parsed: WSParsedURL) -> socket:
        return await _connect(parsed.host, parsed.port, opened)

    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            transport, _ = await ws_connect(
                lambda *_: listener,
                url,
                ssl_context=context,
                websocket_handshake_timeout=UPGRADE_TIMEOUT_S,
                logger_name=_log,
                max_frame_size=MAX_PACKET_BYTES,
                extra_headers={"Sec-WebSocket-Protocol": SUBPROTOCOL},
                max_redirects=0,
                socket_factory=connect,
            )
    except BaseException as error:
        # picows leaves a cancelled handshake to its own timer; the end of the socket ends it at once.
        for sock in opened:
            with suppress(OSError):
                sock.shutdown(SHUT_RDWR)
        if isinstance(error, WSHandshakeError):
            raise _refused(error) from None
        if isinstance(error, WSError):
            raise DialError(str(error)) from None
        if isinstance(error, TimeoutError):
            raise DialError("the server did not answer in time") from None
        if isinstance(error, OSError):
            raise DialError(str(error) or type(error).__name__) from None
        raise
    listener.watch(transport)
    if not listener.connected:
        await listener.gone()
        raise DialError("the server closed the connection during the upgrade")
    return listener


def _refused(error: WSHandshakeError) -> DialError:
    response = error.response
    if response is None:
        return DialError(str(error))
    after = response.headers.get("Retry-After", "0")
    return DialError(
        f"the server answered HTTP {int(response.status)}", float(after) if after.isdigit() else 0.0
    )
