"""`fastim serve`: flags into a configuration, then the process; and what is printed when it listens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import fastim
from fastim.app import App
from fastim.app import run as run_process
from fastim.cli.tokens import mint_token
from fastim.cli.where import own_name
from fastim.config import load

DEV_USERS: Final = ("alice", "bob")
DEV_TOKEN_S: Final = 7 * 86_400


def run(flags: Mapping[str, Any], file: Path | None) -> int:
    """flags: dotted names; None where the command line said nothing. Returns the exit code."""
    nested: dict[str, Any] = {}
    for name, value in flags.items():
        if value is not None:
            table, _, key = name.rpartition(".")
            (nested.setdefault(table, {}) if table else nested)[key] = value
    config = load(nested, file)

    def announce(app: App) -> None:
        print("\n".join(announcement(app, file)), flush=True)

    return run_process(config, announce)


def announcement(app: App, file: Path | None) -> list[str]:
    """Addresses; with --dev also tokens, and what to type next."""
    socket = (
        f"{'ws' if app.listener.config.tls is None else 'wss'}://{_address(app.listener.addresses[0])}/v1/ws"
    )
    rest = f"{'https' if app.config.api.tls_cert else 'http'}://{_address(app.http.addresses[0])}"
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
