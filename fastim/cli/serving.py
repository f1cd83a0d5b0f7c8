"""`fastim serve`, `node`, `dispatch`, `api`: flags into a configuration, then the process."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import fastim
from fastim.app import App
from fastim.app import run as run_process
from fastim.app.supervisor import as_worker, supervise
from fastim.cli.tokens import mint_token
from fastim.cli.where import own_name
from fastim.config import Role, load, shown

DEV_USERS: Final = ("alice", "bob")
DEV_TOKEN_S: Final = 7 * 86_400


def run(flags: Mapping[str, Any], file: Path | None, role: Role = "serve") -> int:
    """flags: dotted names; None where the command line said nothing. Returns the exit code."""
    config = load(_nested(flags), file, role)

    def announce(app: App) -> None:
        lines = announcement(app, file) if role == "serve" else [presence_line(app)]
        print("\n".join(lines), flush=True)

    return run_process(config, announce, role)


def run_node(flags: Mapping[str, Any], file: Path | None, worker: int) -> int:
    """worker 0: the node itself, or the supervisor of several; else the number of one of them."""
    config = load(_nested(flags), file, "node")
    if config.node.workers == 1:
        return run(flags, file, "node")
    if not worker:
        return supervise(config, _worker_command)

    def announce(app: App) -> None:
        print(presence_line(app), flush=True)

    return run_process(as_worker(config, worker), announce, "node", supervised=True)


def _worker_command(number: int, address: str) -> Sequence[str]:
    """This very command again, for one worker."""
    return [sys.executable, "-m", "fastim", *sys.argv[1:], "--worker", str(number), "--listen", address]


def _nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flags.items():
        if value is not None:
            table, _, key = name.rpartition(".")
            (nested.setdefault(table, {}) if table else nested)[key] = value
    return nested


def presence_line(app: App) -> str:
    """One line of a process of a cluster: who it is, where it listens, what it works on."""
    config = app.config
    where = ""
    if app.role == "node":
        where = f" listens on {_socket(app)}"
    elif app.role == "api":
        where = f" listens on {_rest(app)}"
    return (
        f"fastim {app.role} {app.name}, boot {app.boot},{where or ' works'} "
        f"({shown(config.bus_url)}, {shown(config.presence_url)}, "
        f"{len(config.store_urls)} PostgreSQL database{'s' if len(config.store_urls) > 1 else ''})"
    )


def _socket(app: App) -> str:
    scheme = "ws" if app.listener.config.tls is None else "wss"
    return f"{scheme}://{_address(app.listener.addresses[0])}/v1/ws"


def _rest(app: App) -> str:
    return f"{'https' if app.config.api.tls_cert else 'http'}://{_address(app.http.addresses[0])}"


def announcement(app: App, file: Path | None) -> list[str]:
    """Addresses; with --dev also tokens, and what to type next."""
    socket, rest = _socket(app), _rest(app)
    lines = [
        f"fastim {fastim.__version__}, data in {app.config.data_path}",
        f"  WebSocket  {socket}",
        f"  REST       {rest}",
    ]
    if app.node.seals is not None:
        lines += [f"  Seal key   {key}" for key in app.node.seals.public]
    if app.dev_key is None:
        return lines
    lines += ["", "Development tokens, good for 7 days:"]
    for user in DEV_USERS:
        token = mint_token(
            app.dev_key, user, ["client"], audience=app.config.auth.audience, ttl_s=DEV_TOKEN_S
        )
        lines.append(f"  {user:<6}{token}")
    where = f" --config {file}" if file is not None else ""
    if str(app.config.data_path) != "fastim-data":
        where += f" --data {app.config.data_path}"
    if socket != "wss://127.0.0.1:8443/v1/ws":
        where += f" --url {socket}"
    lines += ["", "Talk, each in a terminal of its own:"]
    lines += [f"  {own_name()} chat {user}{where}" for user in DEV_USERS]
    return lines


def _address(bound: tuple[str, int]) -> str:
    host, port = bound
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
