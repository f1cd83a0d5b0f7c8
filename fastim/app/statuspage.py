"""/health, /ready and /metrics of a process that has no REST interface. Its address is for operators only."""

from __future__ import annotations

from fastim.api.http import Receive, Scope, Send
from fastim.api.rest import Status

_TEXT = b"text/plain; version=0.0.4; charset=utf-8"


class StatusPage:
    """An ASGI application."""

    def __init__(self, status: Status) -> None:
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        code, body = await self._answer(scope["path"])
        if scope["method"] not in ("GET", "HEAD"):
            code, body = 405, b"GET and HEAD are possible here\n"
        headers = [(b"content-type", _TEXT), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, path: str) -> tuple[int, bytes]:
        status = self._status
        if path == "/metrics":
            return 200, await status.metrics()
        if path not in ("/health", "/ready"):
            return 404, b"there are /health, /ready and /metrics here\n"
        if status.draining:
            return 503, f"{status.draining}\n".encode()
        if path == "/ready" and (absent := status.waiting_for()):
            return 503, f"waiting for {', '.join(absent)}\n".encode()
        return 200, b"ok\n"
