"""The server of `bench fanout`: the node's own hub, listener and fan-out on uvloop, without sessions.

    python -m bench.fanout_node PORT CONNS BYTES MEMO [CERT KEY]

Everybody who is upgraded becomes a member. Takes the commands of floor.c's fanout and answers with its names,
so that the two are told the same in turns; `paced` publishes one message at a time and leaves the gathering
to the budget of the fan-out.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from bench.floors import Memo
from fastim._core.acks import AckTable
from fastim._core.conn import CoreConnection, CoreHub
from fastim._core.fanout import Fanout
from fastim._core.wheel import Wheel
from fastim.clock import SystemClock
from fastim.node.server import Listener, ListenerConfig
from fastim.node.service import encode_error
from fastim.node.tls import make_server_context

PATIENCE_S = 5.0


class CubicListener(Listener):
    """As the floors: bbr, where it is the default, paces by timers."""

    def _bind(self, family: int, address: tuple[Any, ...]) -> socket.socket:
        sock = super()._bind(family, address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        return sock


class Silent:
    """Owner of every link: nobody says anything."""

    def on_command(self, op: int, frame: bytes) -> None:
        pass

    def on_closed(self, code: int, orderly: bool) -> None:
        pass


class Bench:
    """One hub, its members, and a fan-out per budget."""

    def __init__(self, port: int, conns: int, size: int, memo: Path, pair: tuple[Path, Path] | None):
        self._loop = asyncio.get_running_loop()
        self._hub = CoreHub(self._loop, AckTable(), Wheel(), encode_error=encode_error)
        self._hub.accept = self._accept
        self._hub.on_fatal = self._fatal
        config = ListenerConfig(
            port=port, dev=True, max_connections=20_000, tls=make_server_context(*pair) if pair else None,
            tls_timeout_s=60.0, handshake_timeout_s=60.0,
        )  # fmt: skip
        self._listener = CubicListener(config, self._hub, SystemClock())
        self._links: list[CoreConnection] = []
        self._conns = conns
        # The header of what floor.c calls BYTES: 4 of them from 128 bytes on.
        self._packet = b"x" * (size - (4 if size > 127 else 2))
        self._size = size
        self._memo = Memo(memo)

    def _accept(self, link: CoreConnection) -> Silent:
        link.authenticated = True
        self._links.append(link)
        return Silent()

    def _fatal(self, error: BaseException) -> None:
        raise SystemExit(f"the core failed: {error!r}")

    async def run(self) -> None:
        await self._listener.start()
        await until(lambda: self._memo["ready"] == len(self._links) == self._conns, 0.01)
        gc.collect()
        gc.freeze()
        say({"conns": len(self._links), "cipher": self._cipher()})
        reader = asyncio.StreamReader()
        await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            word, *numbers = line.split()
            say(await (self.rounds if word == b"rounds" else self.paced)(*map(int, numbers)))
        self._listener.stop_accepting()
        for link in self._links:
            link.abort()

    def _cipher(self) -> str:
        sock = next(iter(self._listener._sockets))
        found = sock.transport.underlying_transport.get_extra_info("cipher")
        return found[0] if found else ""

    def _fan(self, budget_ms: int) -> Fanout:
        fan = Fanout(self._hub, budget_ms)
        for link in self._links:
            fan.add(link)
        return fan

    async def rounds(self, rounds: int, k: int) -> dict[str, Any]:
        """Each when the one before has arrived; CPU from publish until everybody is written to."""
        fan, memo = self._fan(0), self._memo
        base, each = memo["received"], k * self._size * self._conns
        behind, cpu_ns, took = 0, 0, []
        memo["on"] = 1
        begin = time.monotonic_ns()
        for number in range(1, rounds + 1):
            since, before = time.monotonic_ns(), time.process_time_ns()
            for _ in range(k):
                fan.publish(self._packet)
            await until(lambda: not fan.waiting)
            cpu_ns += time.process_time_ns() - before
            behind += not arrived(memo, base + number * each)
            took.append(time.monotonic_ns() - since)
        wall_ns = time.monotonic_ns() - begin
        memo["on"] = 0
        return self._answer(fan, cpu_ns, wall_ns, behind, sorted(took), behind == 0)

    async def paced(self, rounds: int, k: int, pause_us: int, budget_ms: int) -> dict[str, Any]:
        """rounds * k messages, one every pause_us / k; CPU of everything."""
        fan, memo = self._fan(budget_ms), self._memo
        base, count = memo["received"], rounds * k
        memo["on"] = 1
        done = self._loop.create_future()
        begin, before = self._loop.time(), time.process_time_ns()
        published = 0

        def publish() -> None:
            nonlocal published
            now = self._loop.time()
            while published < count and begin + published * pause_us / k / 1e6 <= now + 0.0005:
                fan.publish(self._packet)
                published += 1
            if published == count:
                done.set_result(None)
            else:
                self._loop.call_at(begin + published * pause_us / k / 1e6, publish)

        publish()
        await done
        await until(lambda: not fan.waiting, 0.001)
        cpu_ns = time.process_time_ns() - before
        wall_ns = int((self._loop.time() - begin) * 1e9)
        drained = arrived(memo, base + count * self._size * self._conns)
        memo["on"] = 0
        return self._answer(fan, cpu_ns, wall_ns, 0, [], drained)

    def _answer(
        self, fan: Fanout, cpu_ns: int, wall_ns: int, behind: int, took: list[int], drained: bool
    ) -> dict[str, Any]:
        answer = {
            "cpu_us_per_send": round(cpu_ns / 1e3 / fan.batches / self._conns, 4),
            "cpu_us_per_delivery": round(cpu_ns / 1e3 / fan.published / self._conns, 4),
            "wall_s": round(wall_ns / 1e9, 4),
            "k": round(fan.published / fan.batches, 3),
            "batches": fan.batches,
            "members": len(fan),
            "missed": fan.skipped + fan.cut + fan.refused,
            "behind": behind,
            "drained": drained,
            "p50_ms": round(took[len(took) // 2] / 1e6, 3) if took else 0.0,
            "p99_ms": round(took[(len(took) - 1) * 99 // 100] / 1e6, 3) if took else 0.0,
        }
        fan.clear()
        return answer


async def until(condition: Callable[[], bool], pause_s: float = 0.0) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(pause_s)


def arrived(memo: Memo, wanted: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while memo["received"] < wanted:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.00005)
    return True


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


async def main(words: list[str]) -> None:
    port, conns, size, memo = int(words[0]), int(words[1]), int(words[2]), Path(words[3])
    pair = (Path(words[4]), Path(words[5])) if len(words) > 4 else None
    await Bench(port, conns, size, memo, pair).run()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
