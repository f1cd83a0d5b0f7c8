"""What the harnesses do with the server's configuration and ports."""

from __future__ import annotations

import socket
import tomllib
from pathlib import Path

import pytest

from bench.server import free_ports, laid_over, to_toml


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"dev": True, "data_dir": '/tmp/with "quotes" and \\ in it'},
        {
            "node": {"plain": True, "listen": "127.0.0.1:1"},
            "dispatch": {"backoff_ms": [1, 2], "backoff_jitter": 0.5},
        },
        {"push": {"webhook": {"url": "http://127.0.0.1:9/push", "secret": "s"}}},
        {"top": 1, "a": {"b": {"c": "deep"}, "d": 2}, "e": {"f": 3}},
    ],
)
def test_toml_reads_back_as_it_was(tables: dict[str, object]) -> None:
    assert tomllib.loads(to_toml(tables)) == tables


def test_settings_are_laid_over_table_by_table() -> None:
    base = {"node": {"plain": True, "rate_per_s": 1}, "dev": False}
    changed = laid_over(base, {"node": {"rate_per_s": 2}, "api": {"plain": True}})
    assert changed == {"node": {"plain": True, "rate_per_s": 2}, "dev": False, "api": {"plain": True}}
    assert base == {"node": {"plain": True, "rate_per_s": 1}, "dev": False}


def test_free_ports_are_below_those_that_the_kernel_gives_to_clients() -> None:
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = free_ports(4)
    assert len(set(ports)) == 4
    assert max(ports) < low
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()
