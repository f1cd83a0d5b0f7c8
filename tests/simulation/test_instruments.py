"""The simulation's own instruments: a clock, a kill, a disk and a wire that behave as they say."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from collections.abc import Iterator

import apsw
import pytest

from tests.simulation.checkers import DeviceLog, Facts, Shown, Submission, check
from tests.simulation.disk import Disk, ram_directory
from tests.simulation.loop import RealWorld, Scheduler, SimClock, Stuck
from tests.simulation.wire import Pipe


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(random.Random(1))


def test_an_hour_of_waiting_costs_no_time(scheduler: Scheduler) -> None:
    clock = SimClock(scheduler)
    start = clock.mono_ms(), clock.wall_ms()

    async def wait() -> str:
        await asyncio.sleep(3_600)
        return "done"

    assert scheduler.run(scheduler.loop("a").spawn(wait()), 1e5) == "done"
    assert (clock.mono_ms() - start[0], clock.wall_ms() - start[1]) == (3_600_000, 3_600_000)


def test_waiting_for_nothing_is_an_error_and_not_a_hang(scheduler: Scheduler) -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match="nothing is ready"):
        scheduler.run(scheduler.loop("a").spawn(wait()), 1e5)


def test_spinning_in_one_instant_is_an_error(scheduler: Scheduler) -> None:
    async def spin() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match="spins"):
        scheduler.run(scheduler.loop("a").spawn(spin()), 1e5)


def test_a_killed_loop_runs_nothing_any_more_not_even_finally(scheduler: Scheduler) -> None:
    victim, outside = scheduler.loop("victim"), scheduler.loop("outside")
    ran: list[str] = []

    async def work() -> None:
        try:
            while True:
                await asyncio.sleep(1.0)
                ran.append("tick")
        finally:
            ran.append("finally")

    async def main() -> list[str]:
        await asyncio.sleep(3.5)
        scheduler.kill(victim)
        await asyncio.sleep(10)
        return ran.copy()

    task = victim.spawn(work())
    assert scheduler.run(outside.spawn(main()), 1e5) == ["tick"] * 3
    del task


def test_a_stopped_process_gets_all_its_late_timers_at_once_when_it_continues(scheduler: Scheduler) -> None:
    process, outside = scheduler.loop("process"), scheduler.loop("outside")
    fired: list[tuple[int, float]] = []
    for second in range(1, 6):
        process.call_at(second, lambda second=second: fired.append((second, scheduler.now)))

    async def main() -> None:
        await asyncio.sleep(1.5)
        process.paused = True
        await asyncio.sleep(10)
        process.paused = False
        await asyncio.sleep(0.1)

    scheduler.run(outside.spawn(main()), 1e5)
    assert fired == [(1, 1.0), (2, 11.5), (3, 11.5), (4, 11.5), (5, 11.5)]


def test_real_input_and_output_are_refused(scheduler: Scheduler) -> None:
    async def thread() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RealWorld):
        scheduler.run(scheduler.loop("a").spawn(thread()), 1e5)


def test_a_failed_task_that_nobody_awaits_is_reported(scheduler: Scheduler) -> None:
    heard: list[str] = []
    scheduler.on_failure = lambda text, error: heard.append(text)

    async def fail() -> None:
        raise ValueError("planted")

    async def main() -> None:
        task = asyncio.create_task(fail())
        await asyncio.sleep(1)
        assert task.done()

    scheduler.run(scheduler.loop("a").spawn(main()), 1e5)
    assert len(heard) == 1
    assert "planted" in heard[0]


# ---------------------------------------------------------------------------------------------- the disk


@pytest.fixture
def directories() -> Iterator[list[str]]:
    made: list[str] = []
    yield made
    for path in made:
        shutil.rmtree(path, ignore_errors=True)


def commits_until_the_power_fails(
    synchronous: str, seed: int, directories: list[str], end: str = "cut"
) -> tuple[int, int]:
    """(committed before, found after)"""
    rng = random.Random(seed)
    directories += [ram_directory(), ram_directory()]
    disk = Disk(directories[-2])
    db = apsw.Connection(str(disk.directory / "a.db"), vfs=disk.vfs)
    db.pragma("journal_mode", "wal")
    db.execute(f"pragma synchronous = {synchronous}")
    db.execute("create table t (n integer primary key, b)")
    disk.trap = (rng.randrange(80), lambda: setattr(disk, "dead", True))
    committed = 0
    try:
        while True:
            db.execute("insert into t values (?, ?)", (committed + 1, "x" * 3_000))
            committed += 1
    except apsw.Error:
        pass
    (disk.cut(rng, directories[-1]) if end == "cut" else disk.copy(directories[-1]))
    after = Disk(directories[-1])
    again = apsw.Connection(str(after.directory / "a.db"), vfs=after.vfs)
    try:
        found = again.execute("select count(*) from t").get
        assert again.pragma("integrity_check") == "ok"
    except apsw.SQLError:
        found = 0
    again.close()
    with contextlib.suppress(apsw.Error):
        db.close()
    disk.remove()
    after.remove()
    return committed, found


def test_a_power_cut_never_loses_a_full_commit(directories: list[str]) -> None:
    for seed in range(30):
        before, after = commits_until_the_power_fails("full", seed, directories)
        assert after >= before


def test_a_power_cut_loses_what_was_not_synced(directories: list[str]) -> None:
    runs = [commits_until_the_power_fails("normal", seed, directories) for seed in range(30)]
    assert any(after < before for before, after in runs)


def test_a_kill_loses_nothing_that_was_written(directories: list[str]) -> None:
    for seed in range(10):
        before, after = commits_until_the_power_fails("normal", seed, directories, end="kill")
        assert after >= before


# ---------------------------------------------------------------------------------------------- the wire


class Ear:
    """Hears what a pipe delivers."""

    def __init__(self) -> None:
        self.heard: list[bytes | int] = []

    def on_packet(self, packet: bytes) -> None:
        self.heard.append(packet)

    def on_closed(self, code: int) -> None:
        self.heard.append(code)


def heard_after(scheduler: Scheduler, act: object) -> list[bytes | int]:
    loop, ear = scheduler.loop("a"), Ear()
    rng = random.Random(3)
    pipe = Pipe(loop, ear, lambda: rng.random())

    async def main() -> None:
        act(pipe)  # type: ignore[operator]
        await asyncio.sleep(10)

    scheduler.run(loop.spawn(main()), 1e5)
    return ear.heard


def test_a_wire_keeps_its_order_whatever_the_latency(scheduler: Scheduler) -> None:
    def act(pipe: Pipe) -> None:
        for number in range(20):
            pipe.send(bytes([number]))
        pipe.close(4000)
        pipe.send(b"after the close frame")

    assert heard_after(scheduler, act) == [*(bytes([number]) for number in range(20)), 4000]


def test_a_cut_wire_says_so_and_a_half_open_one_does_not(scheduler: Scheduler) -> None:
    def cut(pipe: Pipe) -> None:
        pipe.send(b"under way")
        pipe.cut()

    def half_open(pipe: Pipe) -> None:
        pipe.send(b"under way")
        pipe.lose_silently()
        pipe.close(1000)

    assert heard_after(scheduler, cut) == [1006]
    assert heard_after(scheduler, half_open) == []


# ---------------------------------------------------------------------------------------------- the judges


def shown(seq: int, client: int = 0, loss_time_ms: int = 0) -> Shown:
    return Shown("p:a:b", seq, 100 + seq, bytes([client or seq] * 16), "a", b"x", loss_time_ms, 1_000)


def kinds(facts: Facts) -> set[str]:
    return {text.split(":")[0] for text in check(facts)}


def test_the_judges_see_order_duplicates_and_inventions() -> None:
    log = DeviceLog("b", "d0", shown=[shown(2), shown(1), shown(1)])
    assert {"order", "duplicate", "loss"} <= kinds(Facts(devices=[log]))


def test_the_judges_see_an_accepted_message_that_is_gone() -> None:
    sub = Submission(bytes(16), "a", "d0", "p:a:b", b"x", 0, msg_id=5, seq=1)
    assert kinds(Facts(submissions=[sub])) == {"loss"}


def test_the_judges_have_nothing_to_say_about_nothing() -> None:
    assert check(Facts()) == []
