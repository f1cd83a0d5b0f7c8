"""The product's listener on the echo build of its core (setup.py, "echo"): what comes is sent back.

    FASTIM_BUILD=echo python setup.py build
    PYTHONPATH=build/echo/lib python -m tests.autobahn.echo [CERT KEY]

Prints its port, serves until its standard input ends, and exits with 1 if anything was our own fault. Only
what the suite needs beyond 64 KiB is opened here: the size of a message, and how much may wait to be written.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, Final

import uvloop

from fastim._core import conn
from fastim._core.acks import AckTable
from fastim._core.conn import CoreConnection, CoreHub
from fastim._core.wheel import Wheel
from fastim.clock import SystemClock
from fastim.errors import PeerError
from fastim.node import server
from fastim.node.server import Listener, ListenerConfig
from fastim.node.tls import make_server_context

MESSAGE_BYTES: Final = 16 * 1_048_576
"""The largest that the suite sends."""
SWEEP_S: Final = 0.25


class Echo:
    """Owner of every link: the core answers by itself."""

    def on_command(self, op: int, frame: bytes) -> None:
        raise AssertionError(f"op {op}: this is no echo build")

    def on_closed(self, code: int, orderly: bool) -> None:
        pass


def encode_error(op: int, error: PeerError) -> bytes:
    raise AssertionError(f"{error}: this is no echo build")


def accept(link: CoreConnection) -> Echo:
    link.authenticated = True
    return Echo()


async def serve(config: ListenerConfig) -> list[Any]:
    """Returns what was our own fault."""
    loop = asyncio.get_running_loop()
    faults: list[Any] = []
    loop.set_exception_handler(lambda _loop, context: faults.append(context))
    hub = CoreHub(
        loop, AckTable(), Wheel(), encode_error=encode_error,
        soft_bytes=1 << 28, hard_bytes=1 << 28,
    )  # fmt: skip
    hub.accept = accept
    hub.on_fatal = faults.append
    listener = Listener(config, hub, SystemClock())
    await listener.start()
    print(listener.addresses[0][1], flush=True)
    ended = loop.run_in_executor(None, sys.stdin.read)
    while not ended.done():
        await asyncio.wait([ended], timeout=SWEEP_S)
        hub.sweep(hub.now_ms())
    listener.stop_accepting()
    await listener.close_all(1001)
    hub.accept = None
    return faults


def main(pair: list[str]) -> int:
    if not conn.ECHO:
        sys.exit(f"{conn.__file__} is no echo build: FASTIM_BUILD=echo python setup.py build, and PYTHONPATH")
    server.MAX_PACKET_BYTES = MESSAGE_BYTES  # type: ignore[misc]
    tls = make_server_context(Path(pair[0]), Path(pair[1])) if pair else None
    config = ListenerConfig(port=0, tls=tls, dev=True, failures_per_minute=1_000_000)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        faults = runner.run(serve(config))
    for fault in faults:
        print(f"our fault: {fault!r}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
