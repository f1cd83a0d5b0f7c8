"""SENT after fsync, by a system-call trace of the running server (promise P2); trace.py judges the order."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from functools import partial

from fastim import protocol
from fastim.api.shapes import new_client_id
from fastim.model import Kind
from tests.kill.log import wall_ms
from tests.kill.raw import RawClient
from tests.kill.until import until
from tests.shows.stage import Show, Stage, require, stage
from tests.shows.trace import CALLS, read_trace

CLIENTS = 8


async def fsync(show: Show, quick: bool) -> None:
    """CLIENTS raw clients, one message under way each, so that commits hold one message and many."""
    require("strace", shutil.which("strace") is not None)
    messages = 15 if quick else 60
    async with stage() as here:
        out = here.directory / "trace"
        tracer = await asyncio.create_subprocess_exec(
            "strace", "-f", "-y", "-xx", "-s", "70000", "-e", f"trace={','.join(CALLS)}", "-o", str(out),
            "-p", str(here.server.pid), stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert tracer.stderr is not None
        first = await tracer.stderr.readline()
        require("ptrace", b"attached" in first)
        drained = asyncio.create_task(tracer.stderr.read())
        try:
            sent = await asyncio.gather(*(_send(here, n, messages) for n in range(CLIENTS)))
        finally:
            if tracer.returncode is None:
                os.kill(tracer.pid, signal.SIGINT)
            await tracer.wait()
            await drained
        order = await asyncio.to_thread(read_trace, out)
        wanted = {client_id for ids in sent for client_id in ids}
        found = len(wanted & order.sent.keys())
        show.check(
            found == CLIENTS * messages,
            f"{found} of {CLIENTS * messages} SENTs are in the trace, and {order.synced} syncs",
        )
        show.check(order.synced > 0, f"{len(wanted) / max(order.synced, 1):.1f} messages per sync")
        show.check(not order.bad, f"{len(order.bad)} SENTs left before the sync of their message; 0")
        for text in order.bad[:5]:
            show.say(text)


async def _send(here: Stage, number: int, messages: int) -> list[bytes]:
    """One client of a pair sends to the other, each message after the last one's SENT."""
    me, other = f"c{number}", f"c{number ^ 1}"
    conv = f"p:{min(me, other)}:{max(me, other)}"
    port = here.server.ws_port
    done: list[bytes] = []
    async with RawClient("127.0.0.1", port, here.server.token(me), "d0") as client:
        for _ in range(messages):
            client_id = new_client_id(wall_ms())
            for _ in range(20):  # the other one may not be known yet
                client.send(protocol.Send(conv, [protocol.SendItem(client_id, int(Kind.TEXT), b"traced")]))
                if await until(partial(_accepted, client, client_id), 0.5):
                    done.append(client_id)
                    break
            client.ack()
    return done


def _accepted(client: RawClient, client_id: bytes) -> bool:
    return any(
        isinstance(frame, protocol.Sent) and any(item.client_id == client_id for item in frame.items)
        for frame in client.frames
    )
