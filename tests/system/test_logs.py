"""No secret is in a log (P21): a server with a webhook, and that the search through all logs can see."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from bench.server import KEPT_LOGS, ROOT, Server
from fastim.auth import Scope
from tests.kill.until import until
from tests.kill.vendor import WebhookServer
from tests.leaks import MARK, planted, search

TOKEN = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"
LEAKS = {
    "a body": f'ts=1 level=info msg="{MARK}"',
    "a body in the middle": f"msg=b'\\x00\\x01{MARK}\\x02'",
    "upper case": MARK.upper(),
    "hex": f"packet={MARK.encode().hex()}",
    "percent-encoded": f"GET /?key={urllib.parse.quote(MARK)}",
    **{f"base64, {n} bytes in": base64.b64encode(bytes(n) + MARK.encode() + b"x").decode() for n in range(4)},
    "base64 for URLs": base64.urlsafe_b64encode(b"\xff\xfe" + MARK.encode()).decode(),
    "a token": f"ts=1 level=info msg={TOKEN}",
    "a token of somebody else": f"  mallory {TOKEN}",
    "a token behind one that is meant": f"  alice {TOKEN} {TOKEN}",
    "the head of a token": "refused eyJhbGciOiJFZERTQSJ9",
    "a header": "authorization: Bearer 0123456789abcdef",
    "a private key": "-----BEGIN PRIVATE KEY-----",
    "another private key": "-----BEGIN EC PRIVATE KEY-----",
}
CLEAN = (
    "ts=1 level=info logger=fastim.app msg=started node=n1 boot=1",
    'ts=1 level=info msg="Authorization: Bearer [redacted]"',
    f"  alice {TOKEN}",
    "-----BEGIN CERTIFICATE-----",
    "Traceback (most recent call last):",
)


@pytest.mark.parametrize("line", LEAKS.values(), ids=LEAKS.keys())
def test_a_leak_is_found_with_its_place(tmp_path: Path, line: str) -> None:
    log = tmp_path / "server.log"
    log.write_text("\n".join([*CLEAN, line, *CLEAN]) + "\n")
    found = search([log])
    assert found.leaks
    assert {(leak.file, leak.line) for leak in found.leaks} == {(log, len(CLEAN) + 1)}
    assert MARK not in str(found.leaks[0])
    assert found.lines == 2 * len(CLEAN) + 1
    log.unlink()


def test_what_is_no_secret_is_no_leak(tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("\n".join(CLEAN))
    assert search([tmp_path / "server.log"]).leaks == []


TESTS = """
import logging, tempfile
from pathlib import Path
from bench.server import keep
from tests.leaks import MARK
from tests.system.served import run_command

def test_of_logging_itself():
    logging.getLogger().handlers.clear()

def test_of_nothing(tmp_path):
    logging.getLogger("fastim.node").info("started")
    (tmp_path / "server.log").write_text("ts=1 level=info msg=started")
"""
PLANTS = """
def test_logger():
    logging.getLogger("fastim.node").info("plant-1 %s", MARK)
    logging.getLogger("fastim.node").debug("plant-2 %s", MARK)
    logging.getLogger("aiokafka").warning("plant-3 %s", MARK)
    logging.getLogger("fastim").error("failed", exc_info=ValueError("plant-4 " + MARK))

def test_server(tmp_path):
    (tmp_path / "server.log").write_text("plant-5 " + MARK)

def test_directory_that_is_gone():
    with tempfile.TemporaryDirectory() as home:
        keep(Path(home) / "server.log")
        (Path(home) / "server.log").write_text("plant-6 " + MARK)

def test_command():
    run_command("serve", "--config", "plant-7 " + MARK, code=2)
"""


@pytest.mark.parametrize(("tests", "leaks"), [(TESTS, 0), (TESTS + PLANTS, 7)])
def test_a_run_fails_when_something_leaked_though_its_tests_pass(
    tmp_path: Path, tests: str, leaks: int
) -> None:
    (tmp_path / "test_it.py").write_text(tests)
    environment = {key: value for key, value in os.environ.items() if key != KEPT_LOGS}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "tests.leaks", "-p", "no:cacheprovider",
            "-c", "/dev/null", "--rootdir", str(tmp_path), "--basetemp", str(tmp_path / "t"), "test_it.py",
        ],
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env=environment | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    for log in tmp_path.rglob("*.log"):
        log.unlink()
    assert f"{6 if leaks else 2} passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == (1 if leaks else 0), done.stdout
    found = [line for line in done.stdout.splitlines() if line.startswith("LEAK ")]
    assert len(found) == leaks
    assert {int(number) for line in found for number in re.findall(r"plant-(\d)", line)} == {
        *range(1, leaks + 1)
    }
    assert MARK not in done.stdout


async def test_the_secrets_of_a_webhook_and_of_what_it_is_told_are_in_no_log(tmp_path: Path) -> None:
    """httpx would log each call with its URL, httpcore its headers."""
    secret = planted("webhook")
    async with WebhookServer(secret.encode()) as vendor:
        url = vendor.url.replace("://", f"://{planted('user')}:{planted('password')}@")
        tables = {
            "push": {"webhook": {"url": f"{url}/{planted('path')}?key={planted('key')}", "secret": secret}},
            "dispatch": {"reconnect_window_ms": 0, "push_backoff_first_ms": 50},
            "log": {"level": "DEBUG"},
        }
        server = Server(tmp_path, tables)
        vendor.fail = True
        try:
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(
                send, server, {"conv": "s:bob", "sender": "shop", "body": planted("body")}
            )
            assert await until(lambda: vendor.failed > 1, 20)
            vendor.fail = False
            assert await until(lambda: bool(vendor.of("bob")), 20)
            assert await asyncio.to_thread(server.stop) == 0
        finally:
            server.end()
    assert search([server.log]).leaks == []
    assert server.log.read_text().count("msg=started") == 1


def send(server: Server, body: dict[str, str]) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.http_port}/v1/messages",
        json.dumps(body).encode(),
        {
            "authorization": f"Bearer {server.token('shop', Scope.SERVICE)}",
            "content-type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 201
