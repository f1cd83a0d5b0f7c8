"""The whole server: composed in this process, and run as one that gets signals."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastim.app import App
from fastim.app.process import Process
from fastim.auth import Algorithm, SigningKey, mint
from fastim.client import Client
from fastim.config import load
from fastim.dispatch.ledger import audit
from fastim.errors import InternalError, UsageError
from fastim.model import Kind
from fastim.node.tls import dev_certificate
from fastim.protocol import Ping, Pong, Send, SendItem
from fastim.store.sqlite import SqliteStore
from tests.kill.raw import RawClient, Refused
from tests.leaks import MARK
from tests.system.served import Served, environment, run_command


def flags(directory: Path, **tables: Any) -> dict[str, Any]:
    """A development server on free ports."""
    base: dict[str, Any] = {
        "dev": True,
        "data_dir": str(directory / "data"),
        "node": {"listen": "127.0.0.1:0", "plain": True, "drain_window_ms": 200},
        "api": {"listen": "127.0.0.1:0"},
    }
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table} if isinstance(table, dict) else table
    return base


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FASTIM_")]:
        if name not in ("FASTIM_BUILD", "FASTIM_REQUIRE"):
            monkeypatch.delenv(name)


async def fetch(url: str) -> tuple[int, bytes]:
    def get() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    return await asyncio.to_thread(get)


# ----------------------------------------------------------------------------------------- in this process


async def test_app_starts_serves_and_stops_leaving_nothing_open(tmp_path: Path) -> None:
    fatal: list[BaseException] = []
    app = App(load(flags(tmp_path)), on_fatal=fatal.append)
    await app.start()
    port = app.http.addresses[0][1]
    assert await fetch(f"http://127.0.0.1:{port}/ready") == (200, b'{"status":"ready"}')
    assert (await fetch(f"http://127.0.0.1:{app.listener.addresses[0][1]}/health"))[0] == 200
    assert b"fastim_bus_lag" in (await fetch(f"http://127.0.0.1:{port}/metrics"))[1]
    assert await app.stop()
    assert await app.stop()
    assert fatal == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)


async def test_boot_grows_with_every_start(tmp_path: Path) -> None:
    boots = []
    for _ in range(3):
        app = App(load(flags(tmp_path)), on_fatal=lambda error: None)
        await app.start()
        boots.append(app.boot)
        await app.stop(window_ms=0)
    assert boots == [1, 2, 3]


@pytest.mark.parametrize("taken", ["node", "api"])
async def test_start_that_fails_leaves_nothing_open(tmp_path: Path, taken: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        listen = f"127.0.0.1:{held.getsockname()[1]}"
        app = App(load(flags(tmp_path, **{taken: {"listen": listen}})), on_fatal=lambda error: None)
        with pytest.raises(UsageError, match="cannot listen"):
            await app.start()
    app = App(load(flags(tmp_path)), on_fatal=lambda error: None)
    await app.start()
    await app.stop(window_ms=0)


async def test_second_server_of_one_directory_is_refused(tmp_path: Path) -> None:
    app = App(load(flags(tmp_path)), on_fatal=lambda error: None)
    await app.start()
    with pytest.raises(UsageError, match="in use"):
        await App(load(flags(tmp_path)), on_fatal=lambda error: None).start()
    await app.stop(window_ms=0)


async def test_clients_are_told_and_closed_when_the_app_stops(tmp_path: Path) -> None:
    app = App(load(flags(tmp_path)), on_fatal=lambda error: None)
    await app.start()
    assert app.dev_key is not None
    token = mint(app.dev_key, "alice", audience="fastim", ttl_s=60, now_s=int(time.time()))
    port = app.listener.addresses[0][1]
    async with RawClient("127.0.0.1", port, token, "d0") as client:
        assert await app.stop()
        assert await client.wait_for(lambda: bool(client.close_code))
        assert client.close_code == 1012
        assert "Goaway" in {type(frame).__name__ for frame in client.frames}


async def test_what_was_acknowledged_before_a_stop_is_settled_after_it(tmp_path: Path) -> None:
    app = App(load(flags(tmp_path)), on_fatal=lambda error: None)
    await app.start()
    assert app.dev_key is not None
    port, now_s = app.listener.addresses[0][1], int(time.time())
    tokens = [mint(app.dev_key, user, audience="fastim", ttl_s=60, now_s=now_s) for user in ("alice", "bob")]
    async with (
        RawClient("127.0.0.1", port, tokens[0], "d0") as alice,
        RawClient("127.0.0.1", port, tokens[1], "d0") as bob,
    ):
        items = [SendItem(bytes([n]) * 16, int(Kind.TEXT), MARK.encode()) for n in range(10)]
        alice.send(Send("p:alice:bob", items))
        assert await bob.wait_for(lambda: len(bob.messages()) == 10)
        bob.ack()
        bob.send(Ping())
        assert await bob.wait_for(lambda: any(isinstance(frame, Pong) for frame in bob.frames))
        assert await app.stop(window_ms=0)
    store = await SqliteStore.open(tmp_path / "data", read_only=True)
    report = await audit(store, now_s * 1000)
    assert (report.states["acked"], report.in_flight, report.obligations) == (10, 0, 10)
    assert await store.settled_mark() == await store.head_msg_id()
    await store.close()


async def test_development_certificate_is_made_and_used(tmp_path: Path) -> None:
    app = App(load(flags(tmp_path, node={"plain": False})), on_fatal=lambda error: None)
    await app.start()
    assert app.dev_cert is not None
    context = ssl.create_default_context(cafile=str(app.dev_cert))
    port = app.listener.addresses[0][1]
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    app.reload_certificates()
    app.dev_cert.write_text("rubbish")
    app.reload_certificates()
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    writer.close()
    await app.stop(window_ms=0)
    assert os.stat(tmp_path / "data").st_mode & 0o077 == 0


async def test_production_configuration_serves_tls_on_both_ports(tmp_path: Path) -> None:
    cert, key = dev_certificate(tmp_path)
    secret = secrets.token_hex(32)
    issuer = {"issuer": "login", "kid": "k1", "algorithm": "HS256", "key": secret}
    pair = {"tls_cert": str(cert), "tls_key": str(key)}
    config = load(
        flags(tmp_path, dev=False, auth={"issuers": [issuer]}, node={"plain": False, **pair}, api=pair)
    )
    app = App(config, on_fatal=lambda error: None)
    await app.start()
    assert app.dev_key is None
    assert not (tmp_path / "data" / "dev-key.pem").exists()
    signing = SigningKey("login", "k1", Algorithm.HS256, secret.encode())
    token = mint(signing, "alice", audience="fastim", ttl_s=60, now_s=int(time.time()))
    url = f"wss://localhost:{app.listener.addresses[0][1]}"
    async with Client(url, token, "d0", ssl=str(cert)) as client, asyncio.timeout(10):
        await client.wait_connected()
    trust = ssl.create_default_context(cafile=str(cert))
    async with httpx.AsyncClient(verify=trust, trust_env=False) as http:
        base = f"https://localhost:{app.http.addresses[0][1]}"
        answer = await http.get(f"{base}/v1/users/alice/unread", headers={"authorization": f"Bearer {token}"})
        assert answer.json()["badge"] == 0
        with pytest.raises(httpx.HTTPError):
            await http.get(base.replace("https", "http"))
    await app.stop(window_ms=0)


async def test_one_address_has_one_allowance_of_failures_over_both_ports(tmp_path: Path) -> None:
    config = load(flags(tmp_path, node={"failures_per_minute": 2}))
    app = App(config, on_fatal=lambda error: None)
    await app.start()
    headers = {"authorization": "Bearer x.y.z"}
    async with httpx.AsyncClient(trust_env=False, headers=headers) as http:
        rest = f"http://127.0.0.1:{app.http.addresses[0][1]}/v1/users/a/unread"
        assert [(await http.get(rest)).status_code for _ in range(3)] == [401, 401, 429]
    with pytest.raises(Refused, match="429"):
        async with RawClient("127.0.0.1", app.listener.addresses[0][1], "x.y.z", "d0"):
            pass
    await app.stop(window_ms=0)


async def test_failing_socket_is_not_fatal_and_a_failing_task_is(tmp_path: Path) -> None:
    process = Process(load(flags(tmp_path)), lambda app: None)
    loop = asyncio.get_running_loop()
    process._on_loop_error(loop, {"message": "SSL error", "exception": ssl.SSLError("bad record")})
    process._on_loop_error(loop, {"message": "Fatal write error", "exception": TimeoutError("timed out")})
    assert not process._ended.is_set()
    process._on_loop_error(
        loop, {"message": "never retrieved", "exception": OSError("x"), "task": asyncio.current_task()}
    )
    assert process._ended.is_set()


async def test_exception_in_a_callback_is_fatal(tmp_path: Path) -> None:
    process = Process(load(flags(tmp_path)), lambda app: None)
    process._on_loop_error(
        asyncio.get_running_loop(), {"message": "in a callback", "exception": KeyError("k")}
    )
    assert process._ended.is_set()
    assert process._failed


# ----------------------------------------------------------------------------------------------- as a process


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path)
    yield server
    server.end()


def test_development_server_prints_addresses_tokens_and_what_to_type(served: Served) -> None:
    text = served.announced()
    assert f"wss://127.0.0.1:{served.ws_port}/v1/ws" in text
    assert f"http://127.0.0.1:{served.http_port}" in text
    tokens = re.findall(r"^  (alice|bob) +(\S+)$", text, re.MULTILINE)
    assert [user for user, _ in tokens] == ["alice", "bob"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.http_port}/v1/users/alice/unread",
        headers={"authorization": f"Bearer {tokens[0][1]}"},
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert json.loads(answer.read())["user"] == "alice"
    assert served.signal(signal.SIGTERM) == 0
    assert "eyJ" not in served.logged()


def test_hangup_reads_certificates_again_and_ends_nothing(served: Served) -> None:
    served.announced()
    served.process.send_signal(signal.SIGHUP)
    assert served.health() == 200
    assert served.signal(signal.SIGTERM) == 0
    assert "the certificate was read again" in served.logged()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_server_in_order(served: Served, number: signal.Signals) -> None:
    served.announced()
    start = time.monotonic()
    assert served.signal(number) == 0
    assert time.monotonic() - start < 30
    assert "clean=True" in served.logged()


def test_message_survives_kill_9_and_its_story_is_told(served: Served, tmp_path: Path) -> None:
    served.announced()
    sent = served.send("bob", "keep me", "alice")
    served.signal(signal.SIGKILL)
    why = run_command("why", str(sent["msg_id"]), "--data", str(served.data), "--json")
    story = json.loads(why.stdout)
    assert (story["message"]["conv"], story["message"]["seq"]) == ("p:alice:bob", 1)
    again = Served(tmp_path)
    try:
        again.announced()
        repeated = again.send("bob", "keep me too", "alice")
        assert repeated["seq"] == 2
        asked = run_command(
            "why", sent["client_id"], "bob", "--url", again.rest, "--data", str(again.data), "--json"
        )
        assert [one["user"] for one in json.loads(asked.stdout)["obligations"]] == ["bob"]
        assert "health ok, ready ready" in run_command("health", "--url", again.rest).stdout
        assert (
            "of 7 bytes by alice" in run_command("why", sent["client_id"], "--data", str(again.data)).stdout
        )
        # Beside the running server.
        report = json.loads(run_command("audit", "--data", str(again.data), "--json").stdout)
        assert report["ok"]
        assert report["obligations"] == 2
        ids = tmp_path / "ids.jsonl"
        run_command("audit", "--data", str(again.data), "--json", "--ids", str(ids))
        lines = [json.loads(line) for line in ids.read_text().splitlines()]
        assert [(line["msg_id"], line["user"], line["seq"]) for line in lines] == [
            (sent["msg_id"], "bob", 1), (repeated["msg_id"], "bob", 2),
        ]  # fmt: skip
        assert again.signal(signal.SIGTERM) == 0
    finally:
        again.end()


def test_audit_fails_when_something_is_lost(served: Served) -> None:
    served.announced()
    served.send("bob", "x", "alice")
    assert served.signal(signal.SIGTERM) == 0
    database = served.data / "store.db"
    with sqlite3.connect(database) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table in tables & {"fate", "due"}:
            connection.execute(f"DELETE FROM {table}")
    connection.close()
    assert "LOST" in run_command("audit", "--data", str(served.data), code=1).stdout


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    config = tmp_path / "slow.toml"
    config.write_text("[node]\nplain = true\ndrain_window_ms = 15000\n")
    server = Served(tmp_path, "--config", str(config))
    try:
        text = server.announced()
        found = re.search(r"^  alice +(\S+)$", text, re.MULTILINE)
        assert found is not None

        async def hold_and_signal() -> int:
            async with (
                RawClient("127.0.0.1", server.ws_port, found[1], "d0"),
                RawClient("127.0.0.1", server.ws_port, found[1], "d1"),
            ):
                server.process.send_signal(signal.SIGTERM)
                for _ in range(100):
                    if await asyncio.to_thread(server.health) == 503:
                        break
                    await asyncio.sleep(0.05)
                assert server.process.poll() is None
                return await asyncio.to_thread(server.signal, signal.SIGTERM)

        start = time.monotonic()
        assert asyncio.run(hold_and_signal()) == 128 + signal.SIGTERM
        assert time.monotonic() - start < 10
    finally:
        server.end()


_FATAL = """
import asyncio, sys
from fastim.app import run
from fastim.config import load
from fastim.dispatch.ledger import audit
from fastim.errors import InternalError

def announce(app):
    print(app.http.addresses[0][1], flush=True)
    asyncio.get_running_loop().call_later(0.2, app._on_fatal, InternalError("planted"))

sys.exit(run(load({flags!r}), announce))
"""


def test_fatal_error_is_logged_and_the_exit_is_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FATAL.format(flags=flags(tmp_path))], capture_output=True, text=True,
        timeout=60, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "level=critical" in done.stderr
    assert "planted" in done.stderr
    assert InternalError.__name__ in done.stderr
