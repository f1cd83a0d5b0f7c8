"""deploy/dev/servers: what it starts answers, what it stops is gone, and compose.yml says the same."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
import yaml

from tests.servers import SCRIPT, Servers

sys.path.append(str(SCRIPT.parent))
from kinds import shared_settings

COMPOSE = SCRIPT.parents[1] / "compose.yml"


def ask_redis(url: str, command: str, timeout_s: float = 2.0) -> str:
    at = urlsplit(url)
    with closing(socket.create_connection((at.hostname, at.port), timeout_s)) as conn:
        conn.sendall(f"{command}\r\n".encode())
        return conn.recv(65536).decode()


def processes_of(servers: Servers) -> list[str]:
    """Names of everything that works in the directory, or below it."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(servers.directory) in os.readlink(entry / "cwd"):
                found.append((entry / "comm").read_text().strip())
        except OSError:
            continue
    return found


def test_a_started_server_answers_and_a_stopped_one_is_gone(own_servers: Servers) -> None:
    url = own_servers.start("redis")["FASTIM_REDIS"]
    assert ask_redis(url, "PING") == "+PONG\r\n"
    assert processes_of(own_servers) == ["redis-server"]
    own_servers.stop("redis")
    assert processes_of(own_servers) == []
    with pytest.raises(ConnectionRefusedError):
        ask_redis(url, "PING")


def test_starting_again_leaves_the_running_server_alone(own_servers: Servers) -> None:
    first = own_servers.start("redis")
    ask_redis(first["FASTIM_REDIS"], "SET here 1")
    assert own_servers.start("redis") == first
    assert ask_redis(first["FASTIM_REDIS"], "EXISTS here") == ":1\r\n"


def test_a_killed_server_comes_back_at_the_same_address(own_servers: Servers) -> None:
    first = own_servers.start("redis")
    own_servers.kill("redis")
    assert processes_of(own_servers) == []
    assert own_servers.start("redis") == first


def test_a_paused_server_is_silent_until_it_is_resumed(own_servers: Servers) -> None:
    url = own_servers.start("redis")["FASTIM_REDIS"]
    own_servers.pause("redis")
    with pytest.raises(TimeoutError):
        ask_redis(url, "PING", timeout_s=0.2)
    own_servers.resume("redis")
    assert ask_redis(url, "PING") == "+PONG\r\n"


def test_a_paused_server_can_be_stopped(own_servers: Servers) -> None:
    own_servers.start("redis")
    own_servers.pause("redis")
    own_servers.stop("redis")
    assert processes_of(own_servers) == []


def test_what_cannot_start_says_so_with_the_end_of_its_log(own_servers: Servers) -> None:
    own_servers.start("redis")
    own_servers.stop("redis")
    config = own_servers.directory / "redis" / "server.conf"
    config.unlink()
    config.mkdir()
    with pytest.raises(AssertionError, match=r"server\.conf"):
        own_servers.start("redis")


def test_a_taken_port_is_named(own_servers: Servers) -> None:
    url = own_servers.start("redis")["FASTIM_REDIS"]
    own_servers.stop("redis")
    at = urlsplit(url)
    with closing(socket.create_server((at.hostname or "", at.port or 0))), pytest.raises(
        AssertionError, match=f"redis cannot have {at.hostname}:{at.port}"
    ):  # fmt: skip
        own_servers.start("redis")


async def test_postgres_keeps_its_data_when_its_processes_are_killed(own_servers: Servers) -> None:
    urls = own_servers.start("postgres")
    for name in ("FASTIM_POSTGRES", "FASTIM_POSTGRES2"):
        conn = await asyncpg.connect(urls[name])
        await conn.execute("CREATE TABLE kept AS SELECT 1 AS one")
        own_servers.kill("postgres")
        conn.terminate()
        own_servers.start("postgres")
        conn = await asyncpg.connect(urls[name])
        assert await conn.fetchval("SELECT one FROM kept") == 1
        await conn.close()


def test_the_valkey_cluster_serves_every_slot_again_after_a_node_was_killed(own_servers: Servers) -> None:
    url = own_servers.start("valkey")["FASTIM_VALKEY"]
    first = "redis://" + urlsplit(url).netloc.partition(",")[0]
    assert "cluster_slots_ok:16384" in ask_redis(first, "CLUSTER INFO")
    own_servers.kill("valkey.2")
    own_servers.start("valkey")
    assert "cluster_state:ok" in ask_redis(first, "CLUSTER INFO")


def test_a_name_that_is_no_server_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "start", "mysql", "--dir", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no server mysql; there are kafka, kafka3.1" in done.stderr


def test_compose_and_the_script_give_the_broker_the_same_settings() -> None:
    services: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    environment = services["kafka"]["environment"]
    written = {name: str(value) for name, value in shared_settings(1).items()}
    in_compose = {name: environment.get(f"KAFKA_{name.upper().replace('.', '_')}") for name in written}
    assert in_compose == written


def test_compose_and_the_pom_bring_the_same_kafka() -> None:
    (version,) = re.findall("<kafka>(.*)</kafka>", (SCRIPT.parent / "pom.xml").read_text())
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert services["kafka"]["image"] == f"apache/kafka:{version}"


def test_everything_in_compose_listens_on_loopback_only() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for name, service in services.items():
        if service.get("network_mode") == "host":
            command = service["command"]
            assert command[0] == "sh" or command[command.index("--bind") + 1] == "127.0.0.1", name
        else:
            assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
