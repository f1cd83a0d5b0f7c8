"""What a command finds by itself on this machine: the configuration, the addresses, its own name."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from fastim.config import Config, load, split_address
from fastim.errors import UsageError


def client_config(file: Path | None, data: Path | None) -> Config:
    """The configuration as a client needs it: where things are. It need not be good enough to serve."""
    flags: dict[str, Any] = {"dev": True}
    if data is not None:
        flags["data_dir"] = str(data)
    return load(flags, file, "client")


def rest_url(config: Config, url: str) -> str:
    """The REST base address, without a slash at the end. Raises UsageError."""
    if url:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--url is {url[:200]!r}; must start with http:// or https://")
        return url.rstrip("/")
    scheme = "https" if config.api.tls_cert else "http"
    return f"{scheme}://{_reachable(config.api.listen)}"


def socket_url(config: Config, url: str) -> str:
    """The WebSocket address. Raises UsageError."""
    if url:
        if not url.startswith(("ws://", "wss://")):
            raise UsageError(f"--url is {url[:200]!r}; must start with ws:// or wss://")
        return url
    scheme = "ws" if config.node.plain else "wss"
    return f"{scheme}://{_reachable(config.node.listen)}/v1/ws"


def _reachable(listen: str) -> str:
    """A listening address as one connects to it."""
    host, port = split_address(listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_name() -> str:
    """How this program is called from here."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{_short(Path(sys.executable))} -m fastim"
    found = shutil.which(called.name)
    return called.name if found and os.path.samefile(found, called) else _short(called)


def _short(path: Path) -> str:
    """Relative where that is shorter to type."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
