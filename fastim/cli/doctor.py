"""`fastim doctor`: one line for each thing that a process depends on."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from fastim import observe
from fastim.app.doctor import Finding, examine
from fastim.config import Role, load

_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"


def run_doctor(flags: dict[str, Any], file: Path | None, role: Role, *, as_json: bool) -> int:
    """0 if all is well. Raises ConfigError for a configuration that no process would start with."""
    observe.set_up_logging("CRITICAL")
    return asyncio.run(_examine(flags, file, role, as_json))


async def _examine(flags: dict[str, Any], file: Path | None, role: Role, as_json: bool) -> int:
    config = load(flags, file, role)
    bad = 0
    async for finding in examine(config, role):
        bad += not finding.good
        print(msgspec.json.encode(finding).decode() if as_json else _line(finding), flush=True)
    return 1 if bad else 0


def _line(finding: Finding) -> str:
    mark = "good" if finding.good else "BAD "
    if sys.stdout.isatty():
        mark = f"{_GREEN if finding.good else _RED}{mark}{_PLAIN}"
    return f"{mark}  {finding.subject:<18} {finding.text}"
