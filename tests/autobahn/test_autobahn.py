"""The echo build, how the suite's verdicts are read, and the suite itself where a Python 2.7 is found."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.autobahn import __main__ as command
from tests.autobahn import suite
from tests.autobahn.suite import ROOT, Verdict
from tests.unit.conn_world import BINARY, CLOSE, CONT, PING, PONG, REQUEST, TEXT, Client, ws, ws_close


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    command.build_echo()
    with command.echo_server() as number:
        yield number


async def dial(port: int) -> Client:
    client = Client(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 25))
    client.raw(REQUEST + b"\r\n")
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    return client


async def test_messages_of_every_size_come_back_as_they_were(port: int) -> None:
    client = await dial(port)
    for size in (0, 1, 125, 126, 127, 65_535, 65_536, 1 << 20):
        client.raw(ws(BINARY, b"\xfe" * size))
        assert await client.frame() == (BINARY, b"\xfe" * size)
        client.raw(ws(TEXT, b"*" * size))
        assert await client.frame() == (TEXT, b"*" * size)
    await client.close()


async def test_more_fragments_than_the_product_takes_come_back_as_one_message(port: int) -> None:
    client = await dial(port)
    client.raw(
        ws(TEXT, b"a", fin=False) + ws(CONT, b"b", fin=False) * 1_000 + ws(PING, b"?") + ws(CONT, b"c")
    )
    assert await client.frame() == (PONG, b"?")
    assert await client.frame() == (TEXT, b"a" + b"b" * 1_000 + b"c")
    await client.close()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (ws(TEXT, b"\xce\xba\xed\xa0\x80"), 1007),
        (ws(TEXT, b"\xce", fin=False) + ws(CONT, b"\xce"), 1007),
        (ws(CONT, b"x"), 1002),
        (ws(TEXT, b"x", fin=False) + ws(TEXT, b"y"), 1002),
        (ws(TEXT, b"x", rsv=4), 1002),
        (ws(3, b"x"), 1002),
        (ws(PING, b"x" * 126), 1002),
        (ws_close(1000, b"bye"), 1000),
        (ws_close(0), 1002),
        (ws_close(1006), 1002),
        (ws_close(1000) + ws_close(None), 1000),
    ],
)
async def test_what_breaks_a_rule_ends_the_connection_at_once(port: int, sent: bytes, code: int) -> None:
    client = await dial(port)
    client.raw(sent)
    kind, payload = await client.frame()
    assert kind == CLOSE
    assert struct.unpack(">H", payload[:2]) == (code,)
    await client.eof()
    await client.close()


def case(behaviour: str, close: str = "OK") -> dict[str, object]:
    return {"behavior": behaviour, "behaviorClose": close}


def test_a_verdict_counts_a_bad_close_as_a_failure_too() -> None:
    verdict = Verdict(
        {
            "1.1.1": case("OK"), "3.2": case("NON-STRICT"), "7.1.6": case("INFORMATIONAL", "INFORMATIONAL"),
            "7.9.1": case("OK", "FAILED BY CLIENT"), "5.1": case("FAILED"), "5.2": case("OK", "UNCLEAN"),
        }
    )  # fmt: skip
    assert verdict.failed == ["5.1", "5.2", "7.9.1"]
    assert verdict.not_strict == ["3.2"]
    assert verdict.cases == 6


def test_without_python_2_the_command_says_so_and_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    git = shutil.which("git")
    assert git is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(git)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYTHON2", str(tmp_path / "nothing"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(suite, "HOME", tmp_path / "home")
    monkeypatch.setattr(suite, "ENV", tmp_path / "home" / "env")
    monkeypatch.setattr(sys, "argv", ["autobahn"])
    assert command.main() == 2
    assert "no Python 2.7 was found" in capsys.readouterr().err


@pytest.mark.timeout(400)
def test_the_suite_finds_nothing_wrong(need: Callable[..., None]) -> None:
    """Without section 9, the large ones: `make autobahn` runs all of it."""
    need("python2.7", present=suite.find_python2() is not None)
    environment = {key: value for key, value in os.environ.items() if key != "FASTIM_BUILD"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.autobahn", "--quick"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("autobahn: 494 cases of 494, 0 failed\n")
