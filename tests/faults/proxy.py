"""A TCP proxy that can delay, stall, cut and swallow, per connection.

    flow     bytes pass, `delay_s` late
    stalled  nothing is read on either side: both peers see an open socket whose window fills
    dropped  everything is read and thrown away, both ways: both peers see an open socket that takes all they
             write and never says anything, as behind a lost radio or a middlebox that forgot the connection
    cut      both sockets are reset

A stalled or dropped connection stays so for ever: resuming after bytes were thrown away would corrupt the
stream. `flow()` starts stalled ones again. New connections are `refused` when told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Final, Self

_CHUNK: Final = 65_536


class Link:
    """One proxied connection. `up` and `down` count the bytes that were passed on."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client, self._server = client, server
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: list[asyncio.Task[None]] = []
        self.delay_s = 0.0
        self.dropped = False
        self.closed = asyncio.Event()
        self.up = self.down = self.thrown_away = 0

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._pump(self._client, self._server, up=True), name="proxy-up"),
            asyncio.create_task(self._pump(self._server, self._client, up=False), name="proxy-down"),
        ]

    async def _pump(self, source: socket.socket, target: socket.socket, *, up: bool) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._open.wait()
                data = await loop.sock_recv(source, _CHUNK)
                if not data:
                    break
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._open.wait()
                if self.dropped:
                    self.thrown_away += len(data)
                    continue
                await loop.sock_sendall(target, data)
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
            if not self.dropped:
                target.shutdown(socket.SHUT_WR)
        except OSError:
            self.cut()
        finally:
            mine = asyncio.current_task()
            if not self.dropped and all(task.done() or task is mine for task in self._tasks):
                self._close()

    def stall(self) -> None:
        """Stop reading both ways; sockets stay open."""
        self._open.clear()

    def flow(self) -> None:
        """Go on after stall()."""
        self._open.set()

    def drop(self) -> None:
        """From now on swallow everything, both ways; sockets stay open until cut() or stop()."""
        self.dropped = True
        self._open.set()

    def cut(self) -> None:
        """Reset both sockets."""
        if self.closed.is_set():
            return
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._close()

    def _close(self) -> None:
        self._client.close()
        self._server.close()
        self.closed.set()

    async def stop(self) -> None:
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Proxy:
    """Listens on a loopback port of its own and forwards to host:port.

    async with Proxy("127.0.0.1", 9000) as proxy: connect to 127.0.0.1:proxy.port
    """

    def __init__(self, host: str, port: int, *, delay_s: float = 0.0) -> None:
        self._target = (host, port)
        self._server: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self.delay_s = delay_s
        self.refused = False
        self.links: list[Link] = []
        """All connections so far, the newest last."""
        self.port = 0

    async def __aenter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        listener.setblocking(False)
        self._server, self.port = listener, listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(listener), name="proxy-accept")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        for link in self.links:
            await link.stop()
        if self._server is not None:
            self._server.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            client.setblocking(False)
            if self.refused:
                client.close()
                continue
            server = socket.socket()
            server.setblocking(False)
            try:
                await loop.sock_connect(server, self._target)
            except OSError:
                client.close()
                server.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(client, server)
            link.delay_s = self.delay_s
            self.links.append(link)
            link.start()

    def live(self) -> list[Link]:
        """Connections that are neither closed nor dropped."""
        return [link for link in self.links if not link.closed.is_set() and not link.dropped]

    def drop(self) -> int:
        """Swallow everything on all present connections; returns how many."""
        links = self.live()
        for link in links:
            link.drop()
        return len(links)

    def stall(self) -> None:
        for link in self.live():
            link.stall()

    def flow(self) -> None:
        for link in self.live():
            link.flow()

    def cut(self) -> int:
        """Reset all present connections, the dropped ones too; returns how many."""
        links = [link for link in self.links if not link.closed.is_set()]
        for link in links:
            link.cut()
        return len(links)
