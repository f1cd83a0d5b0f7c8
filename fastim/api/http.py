"""Serve an ASGI application in this loop, with bounds that uvicorn leaves open.

Hides uvicorn: only its HTTP/1.1 protocol is used, on sockets that are ours, without its server, its signal
handlers and ten wake-ups a second. A request is bounded in every direction.

    accepted ──head ≤ 16 KiB, 100 headers, in time──▶ application ──answered and read in time──▶ idle ≤ 5 s
        │              └ 400, 408, 431, closed                           └ cut off
        └ more than max_connections: dropped

H1  a head that is too large, too slow or no HTTP is answered and closed       tests/system/test_rest_http.py
H2  a peer that does not read its answer is cut off                            same
H3  a request that is none keeps the order of answers                          tests/system/test_rest_http.py
H4  stop() lets requests in hand finish, and no longer than its deadline       same
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from uvicorn import Config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from fastim.api.problems import raw_problem
from fastim.errors import UsageError

_log = logging.getLogger("fastim.api.http")

MAX_HEAD_BYTES: Final = 16_384
MAX_HEADERS: Final = 100
MAX_DISCARDED_BYTES: Final = 1_048_576
"""Of a body that nobody reads any more."""
KEEP_ALIVE_S: Final = 5
LINGER_S: Final = 1.0
SNDBUF_BYTES: Final = 65_536

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class HttpServer:
    """One listening address.

    request_timeout_ms: for a request's head. answer_timeout_ms: from there to the end of its answer.
    """

    def __init__(
        self,
        application: Application,
        *,
        tls: ssl.SSLContext | None,
        max_connections: int,
        request_timeout_ms: int,
        answer_timeout_ms: int,
    ) -> None:
        self._application = application
        self._tls = tls
        self._state = ServerState()
        self.max_connections = max_connections
        self.request_timeout_s = request_timeout_ms / 1000
        self.answer_timeout_s = answer_timeout_ms / 1000
        self._servers: list[asyncio.AbstractServer] = []
        self.addresses: list[tuple[str, int]] = []
        self._config = Config(
            self._answer, http=_Protocol, ws="none", lifespan="off", interface="asgi3", log_config=None,
            access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_S,
        )  # fmt: skip

    @property
    def connections(self) -> int:
        return len(self._state.connections)

    async def start(self, host: str, port: int) -> None:
        """Bind and listen. Raises UsageError."""
        self._config.load()
        # What peers do wrong would fill the log; what we do wrong is logged by _answer.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        loop = asyncio.get_running_loop()
        try:
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}") from None
        for family, address in dict.fromkeys((info[0], info[4]) for info in infos):
            sock = _bind(family, (address[0], port, *address[2:]))
            port = sock.getsockname()[1]
            self.addresses.append((str(sock.getsockname()[0]), port))
            self._servers.append(
                await loop.create_server(
                    lambda: _Protocol(self._config, self._state, {}, owner=self),
                    sock=sock,
                    ssl=self._tls,
                    ssl_handshake_timeout=self.request_timeout_s if self._tls else None,
                )
            )

    async def stop(self, deadline_s: float) -> None:
        """Stop accepting, let the requests in hand finish, then cut off what is left. Safe to call twice."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=deadline_s)
        late = list(self._state.tasks)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for connection in list(self._state.connections):
            connection.transport.abort()
        for _ in range(100):  # their connection_lost comes with the next turns of the loop
            if not self._state.connections:
                break
            await asyncio.sleep(0)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, with an end: whoever does not read his answer holds memory for no longer."""
        try:
            async with asyncio.timeout(self.answer_timeout_s):
                await self._application(scope, receive, send)
        except TimeoutError:
            scope["state"]["abort"]()
        except Exception:
            _log.exception("a request ended without an answer")
            scope["state"]["abort"]()


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, bounded."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], *, owner: HttpServer
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._owner = owner
        self._reading_head = True
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._discarded_bytes = 0
        self._refused = False
        self._farewell = b""
        """What is written behind the answer to the request in hand."""
        self._running: RequestResponseCycle | None = None
        """The request that the application has; `cycle` is the one that is read, which may wait behind it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._owner.max_connections:
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._running is not None:
            self._abandon(self._running)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        super().data_received(data)
        if self._reading_head and not self._refused:
            # Only what is still incomplete is counted here; a head that came whole is counted below.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._reading_head:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        size = len(self.url) + sum(len(key) + len(text) + 4 for key, text in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse_head()
            raise ValueError("head")

    def on_headers_complete(self) -> None:
        self._reading_head = False
        self._disarm()
        self.scope["state"]["abort"] = self.transport.abort
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:
            # Read on for a while: closing with unread bytes would reset the answer before it is read.
            self._discarded_bytes += len(body)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.close()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle.response_complete:
            self._disarm()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._farewell:
            self._unset_keepalive_if_required()
            self._end_with(self._farewell)
        elif self.cycle.more_body and not self.transport.is_closing():
            self._disarm()
            self._timer = self.loop.call_later(self._owner.request_timeout_s, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        self._answer_raw(400, "bad_request", "this is not an HTTP/1.1 request")

    @staticmethod
    def _abandon(cycle: RequestResponseCycle) -> None:
        """Tell the application that nobody reads its answer; what it still writes goes nowhere."""
        cycle.disconnected = True
        cycle.message_event.set()

    def _await_head(self) -> None:
        self._reading_head = True
        self._head_bytes = 0
        self._disarm()
        self._timer = self.loop.call_later(self._owner.request_timeout_s, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self._head_bytes and not self._refused:
            ms = round(self._owner.request_timeout_s * 1000)
            self._answer_raw(408, "timeout", f"no whole head within {ms:,} ms (api.request_timeout_ms)")
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse_head(self) -> None:
        detail = f"the head of a request is at most {MAX_HEAD_BYTES:,} bytes and {MAX_HEADERS} headers"
        self._answer_raw(431, "too_big", detail)

    def _answer_raw(self, status: int, code: str, detail: str) -> None:
        """Answer what is no request, behind the answer to the one that the application has, and end."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._disarm()
        self.pipeline.clear()
        answer = raw_problem(status, code, detail)
        running = self._running
        if running is not None and not running.response_complete:
            if running is not self.cycle or not running.more_body or running.response_started:
                self._farewell = answer
                return
            self._abandon(running)  # what is refused is its own body
        self._end_with(answer)

    def _end_with(self, answer: bytes) -> None:
        """Write and end, but read on for a second: see on_body."""
        if self.transport.is_closing():
            return
        self.transport.write(answer)
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._timer = self.loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()


def _bind(family: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SNDBUF_BYTES)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen on {address[0]} port {address[1]}: {error.strerror}") from None
    return sock
