"""What a process needs of its own machine."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fastim.app.doctor.report import Finding
from fastim.config import Config, Role

_SPARE_DESCRIPTORS: Final = 256
"""Beside clients: backends, files, listening sockets."""
_LEAST_FREE_BYTES: Final = 1 << 30


def examine_local(config: Config, role: Role) -> Iterator[Finding]:
    """File descriptors and the data directory."""
    wanted = _SPARE_DESCRIPTORS
    if role in ("serve", "node"):
        wanted += config.node.max_connections
    if role in ("serve", "api"):
        wanted += config.api.max_connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if soft == resource.RLIM_INFINITY else soft
    text = f"{most:,} file descriptors, {wanted:,} needed for node.max_connections and api.max_connections"
    if most != resource.RLIM_INFINITY and most < wanted:
        yield Finding(False, "descriptors", f"{text}; raise ulimit -n (LimitNOFILE) or lower those")
    else:
        yield Finding(True, "descriptors", text)
    if role in ("serve", "node") or config.dev:
        yield _directory("data_dir", config.data_path)


def examine_sqlite(config: Config) -> Iterator[Finding]:
    """Where the embedded store is."""
    if config.store_path != config.data_path:
        yield _directory("store", config.store_path)
    yield Finding(True, "backends", "all three are embedded in this process; nothing else is needed")


def _directory(subject: str, path: Path) -> Finding:
    there = path if path.is_dir() else path.absolute().parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(False, subject, f"{path} cannot be written; give it to the user that runs fastim")
    free = shutil.disk_usage(there).free
    text = f"{path} can be written, {free / (1 << 30):,.1f} GiB are free"
    if free < _LEAST_FREE_BYTES:
        return Finding(False, subject, f"{text}; at least 1")
    return Finding(True, subject, text)
