"""`fastim audit` and `fastim why`: what the store itself says became of messages.

Both open the store for reading only, beside a server or without one. Nothing is a remainder: see
fastim.dispatch.ledger.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from fastim.api import shapes
from fastim.app.backends import open_store
from fastim.cli.remote import ask
from fastim.cli.tokens import token_for
from fastim.cli.where import rest_url
from fastim.config import Config, shown
from fastim.dispatch.ledger import AuditReport, audit
from fastim.errors import PeerError, UsageError
from fastim.model import check_id, client_id_text
from fastim.store.base import MessageStore

T = TypeVar("T")
_PAGE = 1_000


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


def reading(config: Config, work: Callable[[MessageStore], Awaitable[T]]) -> T:
    """Run `work` on the store, opened for reading only."""
    if not config.on_servers["store"] and not config.store_path.is_dir():
        raise UsageError(f"{config.store_path} is no data directory; name it with --data")

    async def opened() -> T:
        store = await open_store(config, read_only=True)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(opened())


# ------------------------------------------------------------------------------------------------- audit


class Line(msgspec.Struct):
    """One obligation in the file of --ids."""

    msg_id: int
    conv: str
    seq: int
    client_id: str
    sender: str
    user: str
    state: str


def run_audit(config: Config, *, as_json: bool, ids: Path | None) -> int:
    """0 if every obligation is accounted for."""
    report = reading(config, lambda store: audit(store, wall_ms()))
    if ids is not None:
        try:
            reading(config, lambda store: write_ids(store, ids))
        except OSError as error:
            raise UsageError(f"{ids}: {error.strerror}") from None
    if as_json:
        print(msgspec.json.encode(_report(report)).decode())
    else:
        _show_report(report)
    return 0 if report.ok else 1


async def write_ids(store: MessageStore, path: Path) -> None:
    encode = msgspec.json.Encoder().encode
    after = 0
    with path.open("wb") as file:
        while True:
            page, after = await store.obligations(after, _PAGE, wall_ms())
            for one in page:
                line = Line(
                    one.msg_id, one.conv, one.seq, client_id_text(one.client_id), one.sender, one.user,
                    one.state.name.lower(),
                )  # fmt: skip
                file.write(encode(line) + b"\n")
            if not after:
                return


def _report(report: AuditReport) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "obligations": report.obligations,
        "states": report.states,
        "in_flight": report.in_flight,
        "repeated": report.repeated,
        "settled_mark": report.settled_mark,
        "head_msg_id": report.head_msg_id,
        "violations": list(report.violations),
        "lost": [
            {"msg_id": one.msg_id, "conv": one.conv, "seq": one.seq, "user": one.user} for one in report.lost
        ],
    }


def _show_report(report: AuditReport) -> None:
    console = Console(highlight=False)
    table = Table("obligations", f"{report.obligations:,}", box=None)
    for state, count in report.states.items():
        table.add_row(state, f"{count:,}")
    console.print(table)
    for one in report.lost:
        console.print(f"LOST: msg_id {one.msg_id} ({one.conv} seq {one.seq}) for {one.user}", soft_wrap=True)
    for sentence in report.violations:
        console.print(f"VIOLATION: {sentence}", soft_wrap=True)
    if report.ok:
        console.print("every obligation is accounted for")


# --------------------------------------------------------------------------------------------------- why


def explain(config: Config, message: str, user: str, *, url: str, token: str, as_json: bool) -> None:
    """Print a message's trace, from the store here or from a server."""
    if url or token:
        answer = ask(
            "GET",
            f"{rest_url(config, url)}/v1/messages/{message}/trace",
            token=token_for(config, token, "operator", "admin"),
            query={"user": user} if user else None,
        )
        trace = msgspec.convert(answer, shapes.TraceAnswer)
    else:
        trace = reading(config, lambda store: _trace(store, config, message, user))
    if as_json:
        print(msgspec.json.encode(trace).decode())
    else:
        _show_trace(trace)


async def _trace(store: MessageStore, config: Config, text: str, user: str) -> shapes.TraceAnswer:
    try:
        if user:
            check_id("user", user)
        if text.isascii() and text.isdigit() and len(text) <= 16:
            found = await store.find(msg_id=int(text))
        else:
            found = await store.find(client_id=shapes.read_client_id(text))
    except PeerError as error:
        raise UsageError(error.detail) from None
    trace = await store.trace(found.msg_id, wall_ms()) if found is not None else None
    if trace is None:
        where = ", ".join(map(shown, config.store_urls)) if config.on_servers["store"] else config.store_path
        raise PeerError("not_found", f"the store in {where} has no message {text[:80]!r}")
    return shapes.show_trace(trace, config.kind_rules, user)


def _moment(ms: int) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(ms / 1000))}.{ms % 1000:03d}"


def _show_trace(trace: shapes.TraceAnswer) -> None:
    console = Console(highlight=False)
    message = trace.message
    expiry = f", expires {_moment(message.loss_time_ms)}" if message.loss_time_ms else ""
    console.print(
        f"msg_id {message.msg_id}, client_id {message.client_id}\n"
        f"{message.kind} of {message.body_bytes:,} bytes by {message.sender} in {message.conv}, "
        f"seq {message.seq}\n"
        f"stored {_moment(message.ts_ms)}{expiry}{', recalled' if message.recalled else ''}\n",
        soft_wrap=True,
    )
    people = Table("user", "state", "device", "has up to seq", box=None)
    cursors = {one.user: [row for row in trace.cursors if row.user == one.user] for one in trace.obligations}
    for one in trace.obligations:
        rows = cursors[one.user] or [shapes.TracedCursor(one.user, "-", 0)]
        for number, row in enumerate(rows):
            first = (one.user, one.state) if number == 0 else ("", "")
            people.add_row(*first, row.device, str(row.cursor or "-"))
    console.print(people if trace.obligations else "it was for nobody")
    if trace.fates or trace.due:
        events = Table("when", "user", "device", "what", "seqs", "by", box=None)
        for fate in sorted(trace.fates, key=lambda fate: fate.ts_ms):
            what = fate.fate + (f" (attempt {fate.attempt})" if fate.attempt else "")
            seqs = f"{fate.from_seq}-{fate.to_seq}" if fate.to_seq > fate.from_seq else str(fate.from_seq)
            events.add_row(_moment(fate.ts_ms), fate.user, fate.device or "-", what, seqs, fate.node)
        for due in trace.due:
            what = f"next try, after {due.attempt}"
            events.add_row(_moment(due.due_at_ms), due.user, "-", what, f"{due.from_seq}-", "")
        console.print()
        console.print(events)
