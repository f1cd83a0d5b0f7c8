"""What the harnesses ask of the server's ledger: its audit, its due rows, its metrics, one message's story.

Also the proof that the audit can see: one due row is deleted from a copy of the data, and `fastim audit`
has to fail on that copy and name the obligation that nothing stands for any more.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import apsw

from bench.server import Server, ServerError, laid_over
from fastim.store.base import Trace
from fastim.store.sqlite import SqliteStore
from fastim.store.sqlite.files import DATABASE
from tests.kill.check import AuditLine
from tests.kill.log import wall_ms


def server_settings(
    vendor_url: str, secret: str, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A webhook as the only vendor, nobody slowed down by the rate limit of people, and `settings` on top."""
    base = {
        "push": {"webhook": {"url": vendor_url, "secret": secret}},
        "node": {"rate_per_s": 100_000, "rate_burst": 100_000},
    }
    return laid_over(base, settings or {})


def due_rows(data: Path) -> int:
    """How many due rows the database holds now, also while the server runs or after a kill."""
    connection = apsw.Connection(str(data / DATABASE), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.set_busy_timeout(5_000)
        return int(next(connection.execute("SELECT count(*) FROM due"))[0])
    finally:
        connection.close()


def read_audit(
    server: Server, ids: Path, data: Path | None = None
) -> tuple[int, dict[str, Any], list[AuditLine]]:
    """(exit code, totals, every obligation) of `fastim audit` on stopped data."""
    code, totals = server.audit(data, ids)
    lines = []
    for text in ids.read_text().splitlines():
        row = json.loads(text)
        lines.append(AuditLine(row["msg_id"], row["user"], row["state"], row["conv"], row["seq"]))
    return code, totals, lines


async def metric(server: Server, name: str) -> float:
    """The sum over all labels of a counter or gauge at this moment."""
    return await asyncio.to_thread(_metric, server, name)


def _metric(server: Server, name: str) -> float:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise ServerError(f"/metrics: {error}\n{server.log_tail()}") from None
    found = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith((f"{name} ", f"{name}{{"))
    ]
    return sum(found)


async def traced(data: Path, msg_id: int) -> Trace:
    """One message's whole story, from the store itself."""
    store = await SqliteStore.open(data, read_only=True)
    try:
        trace = await store.trace(msg_id, wall_ms())
    finally:
        await store.close()
    if trace is None:
        raise LookupError(f"msg_id {msg_id} is not in {data}")
    return trace


class Sabotage:
    """Delete one due row by hand, once, in a copy, and look whether the audit sees it.

    done: a row was found that an obligation stood on alone. seen: the audit failed and called just this
    obligation lost.
    """

    def __init__(self, directory: Path) -> None:
        self._copy = directory
        self.done = False
        self.seen = False
        self.why_not = "no kill left a due row"
        self.text = "-"

    def attempt(self, server: Server) -> None:
        """Call it while the server is dead."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(server.data, self._copy)
        ids = self._copy.parent / "copy.jsonl"
        code, totals, lines = read_audit(server, ids, self._copy)
        if code:
            self.done, self.why_not = True, f"the audit of the untouched copy ends with {code}: {totals}"
            return
        mark = totals["settled_mark"]
        # Above the mark an obligation is in flight without any row.
        standing = [line for line in lines if line.state == "due" and line.msg_id <= mark]
        if not standing:
            self.why_not = "no obligation below the settled mark stood on a due row"
            return
        victim = standing[0]
        self._delete(victim.user, victim.conv)
        code, totals, lines = read_audit(server, ids, self._copy)
        lost = {(line.msg_id, line.user) for line in lines if line.state == "lost"}
        self.done = True
        self.seen = bool(code) and (victim.msg_id, victim.user) in lost
        self.text = f"exit {code}, {len(lost)} lost"
        self.why_not = "" if self.seen else f"{self.text}; deleted the row of {victim}; {totals}"
        shutil.rmtree(self._copy)

    def _delete(self, user: str, conv: str) -> None:
        connection = apsw.Connection(str(self._copy / DATABASE))
        try:
            connection.execute(
                "DELETE FROM due WHERE pair = (SELECT id << 32 FROM person WHERE name = ?) "
                "| (SELECT id FROM conv WHERE name = ?)",
                (user, conv),
            )
            if connection.changes() != 1:
                raise LookupError(f"{connection.changes()} due rows of {user} in {conv} were deleted")
        finally:
            connection.close()
