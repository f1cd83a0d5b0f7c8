"""What bad clients and disks may not break, shown on the real server: python -m tests.shows.run [PART ...]

silent    a client whose packets vanish while its socket stays open: undelivered <= 9 s after the write,
          parked, the vendor called once <= 10 s after the write; after it reconnects each message is shown
          once, in order
mute      a client that reads and beats but never acknowledges: 7 firings, then parked, then quiet; again
          after each of its reconnects. Attempts, frames and CPU of the quiet time are printed
deadline  lossTime: an expired message is never shown and leaves no hole; 0 is never dropped
fsync     a system-call trace: every SENT leaves after the fsync of its message (needs strace)
disk      a full disk under load: a retryable error, connections stay, it resumes, nothing lost (root)

Each part starts a server of its own, prints its figures, and fails by exit code. --quick shortens the
waiting of `mute` (ack 2 s, retry table a tenth) and of `disk`. --together runs the parts at the same time. A
part that this machine cannot show is skipped with a word, and fails when FASTIM_REQUIRE names what is absent.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence

import uvloop

from bench.server import ServerError
from fastim.store.base import ObligationState
from tests.faults.proxy import Proxy
from tests.kill.ledger import metric, traced
from tests.kill.log import wall_ms
from tests.kill.raw import RawClient
from tests.kill.until import until
from tests.shows.disk import disk
from tests.shows.fsync import fsync
from tests.shows.stage import Broken, Show, Skipped, Stage, finish, stage

UNDELIVERED_LIMIT_MS, VENDOR_LIMIT_MS = 9_000, 10_000
FIRINGS = 7
QUIET_CPU = 0.05
"""Share of a core that the server may use while nothing happens, its own timers included."""


# --------------------------------------------------------------------------------------------- silent


async def silent(show: Show, _quick: bool) -> None:
    conv = "p:ann:bob"
    async with stage() as here, Proxy("127.0.0.1", here.server.ws_port) as proxy:
        ann = await here.phone("ann")
        bob = await here.phone("bob", port=proxy.port)
        first = await ann.send(conv, b"before", 0, 1)
        await here.sent("ann", first)
        show.check(
            await until(lambda: here.shown("bob", conv) == [first], 5), "a message before is shown at once"
        )
        await asyncio.sleep(1.0)  # its ack, and the flush of it
        undelivered = await metric(here.server, "fastim_undelivered_total")
        proxy.drop()
        proxy.refused = True
        lost = [await ann.send(conv, f"into silence {n}".encode(), 0, n) for n in (2, 3, 4)]
        moments = [await here.sent("ann", client_id) for client_id in lost]
        written_ms = moments[0][1]
        moved_ms = 0
        while wall_ms() < written_ms + UNDELIVERED_LIMIT_MS + 3_000 and not here.vendor.of("bob"):
            if not moved_ms and await metric(here.server, "fastim_undelivered_total") > undelivered:
                moved_ms = wall_ms()
            await asyncio.sleep(0.05)
        if not moved_ms and await metric(here.server, "fastim_undelivered_total") > undelivered:
            moved_ms = wall_ms()
        after_ms = moved_ms - written_ms
        show.check(0 < after_ms <= UNDELIVERED_LIMIT_MS, f"undelivered {after_ms} ms after the write")
        await asyncio.sleep(13.0)  # a second call would come at the end of the collapse window
        calls = here.vendor.of("bob", conv)
        rang_ms = calls[0].wall_ms - written_ms if calls else -1
        show.check(len(calls) == 1, f"vendor called {len(calls)} time(s), limit 1, over 13 s")
        show.check(0 < rang_ms <= VENDOR_LIMIT_MS, f"vendor called {rang_ms} ms after the write")
        if calls:
            show.check(calls[0].pending == 3, f"the call says {calls[0].pending} messages wait; 3 do")
        await bob.abort()
        proxy.cut()
        proxy.refused = False
        back = time.monotonic()
        await here.phone("bob", port=proxy.port)
        arrived = await until(lambda: len(here.shown("bob", conv)) >= 4, 10)
        took = time.monotonic() - back
        await asyncio.sleep(2.0)
        screen = here.shown("bob", conv)
        show.check(
            arrived and screen == [first, *lost], f"after the reconnect ({took:.2f} s) shown once, in order"
        )
        await asyncio.sleep(1.5)
        show.check(len(here.vendor.of("bob")) == len(calls), "no further vendor call")
        await finish(show, here)
        for (msg_id, _), number in zip(moments, (2, 3, 4), strict=True):
            trace = await traced(here.server.data, msg_id)
            parked = [row.ts_ms - written_ms for row in trace.fates if row.fate == ObligationState.PARKED]
            states = {ob.user: ob.state.name for ob in trace.obligations}
            show.check(
                len(parked) == 1 and states == {"bob": "ACKED"},
                f"message {number}: parked {parked} ms after the write, now {states}",
            )


# ----------------------------------------------------------------------------------------------- mute


async def mute(show: Show, quick: bool) -> None:
    conv = "p:ann:mum"
    share = 10 if quick else 1
    backoff_ms = [ms // share for ms in (1_000, 2_000, 4_000, 8_000, 16_000, 30_000)]
    ack_s = 2.0 if quick else 8.0
    node = {"ack_timeout_ms": int(ack_s * 1_000), "probe_ms": 1_000 if quick else 3_000}
    table_s = ack_s + 2 + sum(backoff_ms) / 1_000 * 1.2
    async with stage({"dispatch": {"backoff_ms": backoff_ms}, "node": node}) as here:
        token = here.server.token("mum")
        async with RawClient("127.0.0.1", here.server.ws_port, token, "d0", ping_s=2.0) as mum:
            ann = await here.phone("ann")
            for n in range(3):
                await here.sent("ann", await ann.send(conv, f"hello {n}".encode(), 0, n))
            start = time.monotonic()
            parked = await until(lambda: bool(here.vendor.of("mum")), table_s + 10)
            took = time.monotonic() - start
            nudges = await metric(here.server, "fastim_nudges_total")
            # 6 nudges stream the messages again; the 7th firing parks.
            show.check(parked, f"parked and the vendor called after {took:.1f} s")
            show.check(
                nudges == FIRINGS - 1, f"{nudges:.0f} nudges, then parked: {nudges + 1:.0f} firings; 7"
            )
            show.say(f"{len(mum.messages(conv))} MSG frames for 3 messages, {_dups(mum)} marked dup")
            await quiet(show, here, mum, conv, "after parking", 4.0 if quick else 20.0)
        for again in range(1, 3 if quick else 4):
            await _reconnect(show, here, token, conv, again, table_s)
        await ann.close()
        here.phones.clear()
        await finish(show, here)


async def _reconnect(show: Show, here: Stage, token: str, conv: str, again: int, table_s: float) -> None:
    """A new session gets everything once more; whatever the attempts are then, they end, and it is quiet."""
    before, cpu = await metric(here.server, "fastim_nudges_total"), here.server.cpu_s()
    rang = len(here.vendor.of("mum"))
    async with RawClient("127.0.0.1", here.server.ws_port, token, "d0", ping_s=2.0) as mum:
        await asyncio.sleep(table_s)
        used = (here.server.cpu_s() - cpu) / table_s
        nudges = await metric(here.server, "fastim_nudges_total") - before
        frames = len(mum.messages(conv))
        show.check(
            3 <= frames <= 3 * FIRINGS and nudges < FIRINGS and used <= QUIET_CPU,
            f"reconnect {again}: {frames} MSG frames, {nudges:.0f} nudges, {used:.1%} CPU in {table_s:.0f} s",
        )
        show.say(f"the vendor was called {len(here.vendor.of('mum')) - rang} time(s) meanwhile")
        await quiet(show, here, mum, conv, f"after reconnect {again}", 3.0 if table_s < 15 else 10.0)


def _dups(client: RawClient) -> int:
    return sum(1 for frame in client.messages() if frame.dup)


async def quiet(show: Show, here: Stage, client: RawClient, conv: str, when: str, for_s: float) -> None:
    frames, cpu = len(client.messages(conv)), here.server.cpu_s()
    await asyncio.sleep(for_s)
    more, used = len(client.messages(conv)) - frames, (here.server.cpu_s() - cpu) / for_s
    show.check(
        more == 0 and used <= QUIET_CPU and not client.close_code,
        f"quiet {when}: {more} MSG frames, {used:.1%} CPU of one core over {for_s:.0f} s, still connected",
    )


# ------------------------------------------------------------------------------------------- deadline


async def deadline(show: Show, _quick: bool) -> None:
    conv = "p:ann:bob"
    async with stage() as here, Proxy("127.0.0.1", here.server.ws_port) as proxy:
        ann = await here.phone("ann")
        bob = await here.phone("bob", port=proxy.port)
        await bob.close()
        await until(lambda: not bob.connected, 5)
        # Into absence: 60 messages, every third dies before bob is back.
        kept, dead = [], []
        for n in range(60):
            mortal = n % 3 == 2
            client_id = await ann.send(conv, f"{n}".encode(), wall_ms() + 1_500 if mortal else 0, n)
            (dead if mortal else kept).append(client_id)
        for client_id in (*kept, *dead):
            await here.sent("ann", client_id)
        past = await ann.send(conv, b"too late", wall_ms() - 1, 60)
        sub = here.logs["ann"].record.submitted[past]
        await until(lambda: bool(sub.refused or sub.msg_id), 5)
        show.check(sub.refused == "expired" and not sub.msg_id, f"a SEND past its deadline: {sub.refused!r}")
        await asyncio.sleep(2.0)
        await here.phone("bob", port=proxy.port)
        await until(lambda: len(here.shown("bob", conv)) >= len(kept), 10)
        await asyncio.sleep(1.0)
        screen = here.shown("bob", conv)
        ghosts = len(set(screen) & set(dead))
        show.check(
            screen == kept,
            f"offline: {len(screen)} of {len(kept)} with lossTime 0 shown, in order; of 20 expired {ghosts}",
        )
        # Into a stalled socket: written before the deadline, read after it.
        proxy.stall()
        stalled = [
            await ann.send(conv, b"dies on the wire", wall_ms() + 800, 61),
            await ann.send(conv, b"lives", 0, 62),
        ]
        for client_id in stalled:
            await here.sent("ann", client_id)
        await asyncio.sleep(1.5)
        start = time.monotonic()
        proxy.flow()
        await until(lambda: stalled[1] in here.shown("bob", conv), 5)
        took = time.monotonic() - start
        screen = here.shown("bob", conv)
        show.check(
            stalled[0] not in screen and screen[-1:] == [stalled[1]],
            f"stalled: expired on the wire is not shown, the next one is ({took * 1000:.0f} ms after flow)",
        )
        # No hole is left: the next message is shown without a pull.
        start = time.monotonic()
        last = await ann.send(conv, b"last", 0, 63)
        shown = await until(lambda: last in here.shown("bob", conv), 5)
        took = time.monotonic() - start
        show.check(shown and took < 0.4, f"no hole: the next message is shown after {took * 1000:.0f} ms")
        await asyncio.sleep(1.5)
        await finish(show, here)
        states = [
            (await traced(here.server.data, here.logs["ann"].record.submitted[client_id].msg_id))
            .obligations[0]
            .state
            for client_id in dead
        ]
        show.check(
            all(state == ObligationState.EXPIRED for state in states),
            f"the ledger counts {sum(state == ObligationState.EXPIRED for state in states)} of 20 as expired",
        )


PARTS: dict[str, Callable[[Show, bool], Awaitable[None]]] = {
    "silent": silent,
    "mute": mute,
    "deadline": deadline,
    "fsync": fsync,
    "disk": disk,
}


async def run_part(name: str, quick: bool) -> list[str]:
    """The failures of one part."""
    show = Show(name)
    start = time.monotonic()
    try:
        await PARTS[name](show, quick)
    except Skipped as skipped:
        show.say(f"skipped: {skipped}")
        return []
    except Exception as error:
        if not isinstance(error, Broken | ServerError):
            traceback.print_exc()
        show.check(False, f"went on to its end: {type(error).__name__}: {error}")
    show.say(f"{'failed' if show.failures else 'passed'} in {time.monotonic() - start:.0f} s")
    return show.failures


async def run_parts(names: Sequence[str], *, quick: bool, together: bool) -> list[str]:
    """All failures, each with the name of its part."""
    failures: list[str] = []
    for group in [names] if together else [[name] for name in names]:
        for name, found in zip(
            group, await asyncio.gather(*(run_part(n, quick) for n in group)), strict=True
        ):
            failures += [f"{name}: {text}" for text in found]
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--together", action="store_true")
    args = parser.parse_args(arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        names = args.parts or list(PARTS)
        failures = runner.run(run_parts(names, quick=args.quick, together=args.together))
    for text in failures:
        print(f"FAILED {text}")
    print(f"shows: {len(names)} parts, {len(failures)} figures missed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
