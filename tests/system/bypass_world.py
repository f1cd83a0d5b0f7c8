"""A running server with three issuers of tokens, and somebody who tries to get past it over ws and REST.

The server logs at DEBUG. When its tests are over it is told to read its certificate again, it is stopped, and
its log is searched for everything that was tried (P21). Failures are limited per address elsewhere, not here.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import secrets
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgpack
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.server import Server, to_toml
from fastim.protocol import Op
from tests.leaks import planted
from tests.unit.conn_world import BINARY, REQUEST, ws

NOW: Final = int(time.time())
MARK: Final = planted("bypass")
"""In every forged token, name and body: it must be in no line of the log."""
REFUSED_WS: Final = [
    Op.ERROR, int(Op.AUTH), "unauthenticated", "the token is not valid", False, 0, b"", 0, "",
]  # fmt: skip
CLOSED_WS: Final = (4501, b"unauthenticated")
REFUSED_REST: Final = json.dumps(
    {
        "type": "urn:fastim:error:unauthenticated", "title": "Unauthorized", "status": 401,
        "code": "unauthenticated", "detail": "the token is not valid",
    },
    separators=(",", ":"),
).encode()  # fmt: skip


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class World:
    """The server, its keys, and what was tried. alice, bob and mallory are known to it."""

    def __init__(self, directory: Path) -> None:
        self.a, self.ops, self.stranger = (Ed25519PrivateKey.generate() for _ in range(3))
        self.secret = planted("key")
        self.tried: list[str] = []
        node = {"origins": ["https://chat.example"], "failures_per_minute": 1_000_000}
        self.server = Server(directory, {"node": node, "log": {"level": "DEBUG"}})
        ed, scopes = {"algorithm": "EdDSA"}, ["service", "admin"]
        issuers = [
            {"issuer": "https://a.example", "kid": "k1", "key": self.pem(self.a)} | ed,
            {"issuer": "https://b.example", "kid": "k1", "algorithm": "HS256", "key": self.secret},
            {"issuer": "https://ops.example", "kid": "ops", "key": self.pem(self.ops), "scopes": scopes} | ed,
        ]
        with self.server.config.open("a") as file:
            file.writelines(to_toml(issuer, "[auth.issuers]") for issuer in issuers)
        self.secret_msg_id = self.team_msg_id = 0
        """Of what alice wrote to bob, and to the group of the two."""

    def start(self) -> None:
        self.server.start()
        for user in ("alice", "bob", "mallory"):
            with self.dial() as one:
                one.auth(self.token(sub=user))
                assert one.get(Op.HELLO)[3] == user
        body = {"group": "team", "owner": "alice", "members": ["alice", "bob"]}
        assert self.ask("POST", "/v1/groups", self.operations("service"), body)[0] == 201
        with self.dial() as alice:
            alice.auth(self.token(sub="alice"))
            self.secret_msg_id = alice.say("p:alice:bob", MARK.encode())
            self.team_msg_id = alice.say("g:team", MARK.encode())

    def finish(self) -> None:
        """Stop in order; nothing that was tried is in the log, and nothing went wrong."""
        assert self.server.process is not None
        self.server.process.send_signal(signal.SIGHUP)
        assert self.server.stop() == 0
        lines = [line for line in self.server.log.read_text().splitlines() if line.startswith("ts=")]
        assert any("msg=started" in line for line in lines)
        logged = "\n".join(lines)
        assert MARK not in logged
        assert self.secret not in logged
        assert "eyJ" not in logged
        for token in self.tried:
            part = max(token.split("."), key=len)
            assert len(part) < 12 or part not in logged
        assert [line for line in lines if "level=error" in line or "level=critical" in line] == []

    # -- tokens

    @staticmethod
    def pem(key: Ed25519PrivateKey) -> str:
        return key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()  # fmt: skip

    def claims(self, **more: Any) -> dict[str, Any]:
        base = {
            "iss": "https://a.example", "aud": "fastim", "sub": "alice", "exp": NOW + 3_600,
            "scope": "client", "mark": MARK,
        }  # fmt: skip
        return {name: value for name, value in (base | more).items() if value is not ...}

    def token(self, header: dict[str, Any] | None = None, *, key: Any = None, **claims: Any) -> str:
        """Signed rightly with `key` (a.example's), whatever it says. `...` leaves a member out."""
        head = {"alg": "EdDSA", "kid": "k1", "typ": "JWT"} | (header or {})
        head = {name: value for name, value in head.items() if value is not ...}
        return self.sign(json.dumps(head), json.dumps(self.claims(**claims)), key)

    def sign(self, header: str, claims: str, key: Any = None) -> str:
        text = f"{b64(header.encode())}.{b64(claims.encode())}"
        key = self.a if key is None else key
        if isinstance(key, bytes):
            return f"{text}.{b64(hmac.new(key, text.encode(), hashlib.sha256).digest())}"
        return f"{text}.{b64(key.sign(text.encode()))}"

    def operations(self, scope: str) -> str:
        """A good token of a service or an admin."""
        return self.token({"kid": "ops"}, key=self.ops, iss="https://ops.example", sub="ops", scope=scope)

    # -- ways in

    def dial(self, head: bytes = REQUEST + b"\r\n") -> WebSocket:
        return WebSocket(self.server.ws_port, head)

    def session(self, user: str, device: str = "phone") -> WebSocket:
        """With HELLO behind it."""
        one = self.dial()
        one.auth(self.token(sub=user), device)
        assert one.get(Op.HELLO)[3] == user
        return one

    def ask(
        self, method: str, path: str, token: str = "", body: Any = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of one REST request."""
        status, data = self.raw_ask(method, path, token, body, **headers)
        return status, json.loads(data) if data else {}

    def raw_ask(
        self, method: str, path: str, token: str = "", body: Any = None, **headers: str
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.http_port, timeout=10)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["authorization"] = f"Bearer {token}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def raw_http(self, request: bytes) -> bytes:
        """Bytes in, bytes out, to the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.server.http_port), timeout=10) as sock:
            sock.sendall(request)
            answer = b""
            try:
                while part := sock.recv(65_536):
                    answer += part
            except ConnectionError:
                pass
            return answer


class WebSocket:
    """One connection, blocking."""

    def __init__(self, port: int, head: bytes) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._sock.sendall(head)
        self._buffer = b""
        self._came: deque[Any] = deque()
        answer = self._until(b"\r\n\r\n")
        self.status = int(answer[9:12]) if answer else 0

    def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            part = self._sock.recv(65_536)
            if not part:
                return b""
            self._buffer += part
        found, _, self._buffer = self._buffer.partition(end)
        return found

    def send(self, *frames: list[Any]) -> None:
        """One packet."""
        self._sock.sendall(ws(BINARY, b"".join(msgpack.packb(frame) for frame in frames)))

    def raw(self, data: bytes) -> None:
        self._sock.sendall(data)

    def auth(self, token: str, device: str = "phone", *more: Any) -> None:
        self.send(auth(token, device, *more))

    def say(self, conv: str, body: bytes) -> int:
        """Send a message, which is taken; its msg_id."""
        self.send([int(Op.SEND), conv, [[secrets.token_bytes(16), 1, body]]])
        return int(self.get(Op.SENT)[4][0][1])

    def frames(self) -> Iterator[Any]:
        """What comes, to the end; the close frame last, as (code, reason)."""
        while True:
            while self._came:
                yield self._came.popleft()
            while len(self._buffer) < 2 or len(self._buffer) < self._whole():
                part = self._sock.recv(65_536)
                if not part:
                    return
                self._buffer += part
            whole, first = self._whole(), self._buffer[0]
            payload = self._buffer[self._head() : whole]
            self._buffer = self._buffer[whole:]
            if first == 0x88:
                yield struct.unpack(">H", payload[:2])[0], payload[2:]
                return
            unpacker = msgpack.Unpacker()
            unpacker.feed(payload)
            self._came.extend(unpacker)

    def _head(self) -> int:
        return {126: 4, 127: 10}.get(self._buffer[1], 2)

    def _whole(self) -> int:
        size, head = self._buffer[1], self._head()
        if len(self._buffer) < head:
            return head
        return head + (int.from_bytes(self._buffer[2:head], "big") if head > 2 else size)

    def get(self, op: int) -> Any:
        """The next frame of this op."""
        for frame in self.frames():
            if frame[0] == op:
                return frame
        raise AssertionError(f"no op {op}")

    def settled(self) -> list[Any]:
        """What came until now: everything in front of the answer to a PING, and for a while behind it."""
        found = []
        for _ in range(5):
            self.send([int(Op.PING)])
            for frame in self.frames():
                if frame[0] == Op.PONG:
                    break
                found.append(frame)
            time.sleep(0.02)
        return found

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def auth(token: str, device: str = "phone", *more: Any) -> list[Any]:
    return [int(Op.AUTH), 1, 1, token, device, *more]


def running(directory: Path) -> Iterator[World]:
    """The body of a fixture."""
    world = World(directory)
    try:
        world.start()
        yield world
        world.finish()
    finally:
        world.server.end()
