"""One run: a server process on a disk, devices and callers outside, a nemesis, and the verdict.

    draw(seed) ─▶ warm-up ─▶ sends + faults until end_s ─▶ everything back, wait for rest ─▶ Facts ─▶ check

Two loops: "server" dies and comes back, "outside" lives through the run.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fastim.bus.records import Refusal, Reply
from tests.simulation.checkers import Facts, Submission, check
from tests.simulation.devices import Device
from tests.simulation.disk import Disk, ram_directory
from tests.simulation.faults import RecordingVendor
from tests.simulation.loop import Scheduler, SimClock, SimLoop, Stuck
from tests.simulation.network import Network
from tests.simulation.planted import Planted
from tests.simulation.scenario import WARM_UP_S, FaultPlan, Plan, SendPlan
from tests.simulation.server import Server, prepare_disk

RESTART_S = 0.4
SERVICE_PATIENCE_S = 4.0
ROUGH_S = 15.0


@dataclass
class Outcome:
    seed: int
    violations: list[str]
    figures: Counter[str]
    digest: str
    trace: list[str] = field(default_factory=list)


class World:
    """The run of one plan."""

    def __init__(self, plan: Plan, planted: Planted | None, verbose: bool) -> None:
        self.plan = plan
        self.planted = planted
        self.verbose = verbose
        self.rng = random.Random(f"world {plan.seed}")
        self.scheduler = Scheduler(self.rng)
        self.outside = self.scheduler.loop("outside")
        self.clock = SimClock(self.scheduler)
        self.network = Network(self.outside, random.Random(f"network {plan.seed}"))
        self.vendor = RecordingVendor(self.clock, random.Random(f"vendor {plan.seed}"), self.breath)
        self.directory = ram_directory()
        prepare_disk(self.directory)
        self.server: Server | None = None
        self.buried: list[Server] = []
        self.devices: dict[tuple[str, str], Device] = {}
        self.submissions: list[Submission] = []
        self.failures: list[str] = []
        self.trace: list[str] = []
        self.figures: Counter[str] = Counter()
        self.groups_made = False
        self.rough_until_s = 0.0
        """Until then a connection may look dead that is not."""
        self.wall_jumped = False
        self._digest = hashlib.blake2b(digest_size=8)
        self._trap: tuple[int, str] | None = None
        self._next_trap: tuple[int, str] | None = None
        self._disk_count = 0
        self.scheduler.on_failure = self._on_failure
        self.scheduler.before_callback = self._before

    # ------------------------------------------------------------------------------------------ telling

    def say(self, text: str) -> None:
        line = f"{self.scheduler.now:9.4f}  {text}"
        self._digest.update(line.encode())
        if self.verbose:
            self.trace.append(line)
        for trigger in self.plan.triggers:
            if trigger.told in text and self.scheduler.now < self.plan.end_s:
                trigger.nth -= 1
                if trigger.nth == 0:
                    self._later(trigger.fault.at_s, self._strike, trigger.fault)

    def _on_failure(self, text: str, error: BaseException | None) -> None:
        if self.verbose and error is not None:
            import traceback

            text += "\n" + "".join(traceback.format_exception(error))
        self.say(f"FAILURE {text}")
        self.failures.append(text)

    async def breath(self) -> None:
        """One short wait of a seeded length: a place where things can interleave and a process can die."""
        await asyncio.sleep(self.rng.choice((0.0, 0.0, 0.0005, 0.002, 0.01)))

    # ------------------------------------------------------------------------------------------ the process

    def start_server(self) -> None:
        assert self.server is None
        self._disk_count += 1
        self.say(f"server start {self._disk_count}")
        self.server = Server(self, self._disk_count, Disk(self.directory))
        self._trap, self._next_trap = self._next_trap, None
        self.server.launch()

    def kill_server(self, power: bool) -> None:
        """kill -9, or a power cut of its machine. The next start comes RESTART_S later."""
        server = self.server
        if server is None:
            return
        self.say("power cut" if power else "kill -9")
        self.figures["kills"] += 1
        self.server = None
        self._trap = None
        self.scheduler.kill(server.loop)
        self.directory = ram_directory()
        if power:
            server.disk.cut(self.rng, self.directory)
        else:
            server.disk.copy(self.directory)
        if server.hub is not None:
            self.network.process_died(server.hub, silently=power and self.rng.random() < 0.3)
        server.lost()
        self.buried.append(server)
        self.outside.call_later(RESTART_S, self.start_server)

    def _before(self, loop: SimLoop) -> None:
        if self._trap is not None and self.server is not None and loop is self.server.loop:
            left, kind = self._trap
            if left <= 0:
                self._trap = None
                self.kill_server(kind == "power")
            else:
                self._trap = (left - 1, kind)

    # ------------------------------------------------------------------------------------------ faults

    async def nemesis(self) -> None:
        for fault in self.plan.faults:
            await self._until(fault.at_s)
            self._strike(fault)

    def _strike(self, fault: FaultPlan) -> None:
        self.figures["faults"] += 1
        if fault.kind in ("pause", "stall", "jitter"):
            self.rough_until_s = max(self.rough_until_s, self.scheduler.now + fault.for_s + ROUGH_S)
        self.say(f"fault {fault}")
        getattr(self, f"fault_{fault.kind}")(fault)

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.scheduler.now))

    def _later(self, after_s: float, what: Any, *args: Any) -> None:
        self.outside.call_later(after_s, what, *args)

    def fault_cut(self, fault: FaultPlan) -> None:
        wire = self.network.wires.get(fault.device or ("", ""))
        if wire is not None:
            wire.cut()

    def fault_half_open(self, fault: FaultPlan) -> None:
        wire = self.network.wires.get(fault.device or ("", ""))
        if wire is not None:
            wire.half_open()

    def fault_stall(self, fault: FaultPlan) -> None:
        wire = self.network.wires.get(fault.device or ("", ""))
        if wire is not None:
            wire.stall(True)
            self._later(fault.for_s, wire.stall, False)

    def fault_restart_app(self, fault: FaultPlan) -> None:
        assert fault.device is not None
        self.devices[fault.device].restart()

    def fault_crash(self, fault: FaultPlan) -> None:
        """After a drawn number of callbacks of the process: any await is as likely as any other."""
        self._trap = (fault.number * 3, "kill")

    def fault_power(self, fault: FaultPlan) -> None:
        self._trap = (fault.number * 3, "power")

    def fault_crash_again(self, fault: FaultPlan) -> None:
        """Killed, and again while it starts and recovers."""
        self._trap = (0, "kill")
        self._next_trap = (fault.number, "kill" if fault.number % 2 else "power")

    def fault_crash_in_commit(self, fault: FaultPlan) -> None:
        """The power goes off at the n-th write to the disk from now."""
        server = self.server
        if server is not None:

            def off() -> None:
                server.disk.dead = True
                self._trap = (0, "power")

            server.disk.trap = (fault.number % 12, off)

    def fault_pause(self, fault: FaultPlan) -> None:
        server = self.server
        if server is not None:
            server.loop.paused = True
            self._later(fault.for_s, self._continue, server)

    def _continue(self, server: Server) -> None:
        server.loop.paused = False

    def fault_presence_flush(self, fault: FaultPlan) -> None:
        if self.server is not None:
            self.server.flush_presence()

    def fault_presence_away(self, fault: FaultPlan) -> None:
        server = self.server
        if server is not None and server.presence is not None:
            server.presence.away = True
            self._later(fault.for_s, setattr, server.presence, "away", False)

    def fault_slow_presence(self, fault: FaultPlan) -> None:
        server = self.server
        if server is not None and server.presence is not None:
            server.presence.delay_s = 0.2 + 0.02 * fault.number
            self._later(fault.for_s, setattr, server.presence, "delay_s", 0.0)

    def fault_bus_away(self, fault: FaultPlan) -> None:
        server = self.server
        if server is not None and server.bus is not None:
            server.bus.away = True
            self._later(fault.for_s, setattr, server.bus, "away", False)

    def fault_disk_full(self, fault: FaultPlan) -> None:
        server = self.server
        if server is not None:
            server.disk.full = True
            self._later(fault.for_s, setattr, server.disk, "full", False)

    def fault_slow_disk(self, fault: FaultPlan) -> None:
        server = self.server
        if server is not None:
            server.disk_delay_s = 0.3
            self._later(fault.for_s, setattr, server, "disk_delay_s", 0.0)

    def fault_jitter(self, fault: FaultPlan) -> None:
        """Packets take up to 2 s longer, each connection by itself: what was sent later arrives earlier."""
        self.network.extra_s = 2.0
        self._later(fault.for_s, setattr, self.network, "extra_s", 0.0)

    def fault_clock_jump(self, fault: FaultPlan) -> None:
        """The wall clock of everybody jumps; the monotonic one does not."""
        hour_ms = 3_600_000
        year_ms = 365 * 24 * hour_ms
        self.clock.jump_ms += (hour_ms, -hour_ms, 10 * year_ms, -10 * year_ms)[fault.number % 4]
        self.wall_jumped = True

    def fault_stop(self, fault: FaultPlan) -> None:
        """SIGTERM: an orderly stop, then a new start on the same disk."""
        server = self.server
        if server is not None:
            self.figures["stops"] += 1
            server.stop(lambda: self._stopped(server))

    def _stopped(self, server: Server) -> None:
        if self.server is server:
            self.say("server stopped")
            self.kill_server(power=True)

    # ------------------------------------------------------------------------------------------ the workload

    async def sender(self) -> None:
        number = 0
        for send in self.plan.sends:
            await self._until(send.at_s)
            for _ in range(send.count):
                number += 1
                self._send(send, number)

    def _send(self, send: SendPlan, number: int) -> None:
        client_id = number.to_bytes(16, "big")
        loss = self.clock.wall_ms() + send.loss_after_ms if send.loss_after_ms else 0
        body = f"{send.sender} {number}".encode().ljust(send.size, b".")
        device = "" if send.device is None else send.device[1]
        sub = Submission(client_id, send.sender, device, send.conv, body, loss, send.flags)
        self.submissions.append(sub)
        self.figures["messages"] += 1
        if send.device is None:
            self.outside.spawn(self._service(sub), f"service {number}")
        else:
            self.devices[send.device].send(sub)

    async def _service(self, sub: Submission) -> None:
        """A caller of the REST ingress: the same client_id until there is an answer."""
        while not sub.accepted and not sub.refused:
            server = self.server
            answer: asyncio.Future[Reply] = self.outside.create_future()
            if server is not None:
                server.submit(sub, answer)
            try:
                async with asyncio.timeout(SERVICE_PATIENCE_S):
                    reply = await answer
            except TimeoutError:
                continue
            for item in reply.sent:
                sub.msg_id, sub.seq = item.msg_id, item.seq
            for refusal in reply.refused:
                self._refused(sub, refusal)
            await asyncio.sleep(0.5)

    def _refused(self, sub: Submission, refusal: Refusal) -> None:
        if not refusal.retryable:
            sub.refused = refusal.code

    # ------------------------------------------------------------------------------------------ the run

    async def main(self) -> None:
        self.start_server()
        while self.server is None or not self.server.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for plan in self.plan.devices:
            self.devices[plan.user, plan.device] = Device(self, plan)
        for device in self.devices.values():
            device.launch()
        await self._until(WARM_UP_S)
        nemesis = self.outside.spawn(self.nemesis(), "nemesis")
        await self.sender()
        await nemesis
        await self._until(self.plan.end_s)
        self._calm()
        await self._rest()

    def _calm(self) -> None:
        """The faults stop: everything that returns, returns."""
        self.say("calm")
        self._trap = self._next_trap = None
        self.network.extra_s = 0.0
        for wire in self.network.wires.values():
            wire.stall(False)
        if self.server is not None:
            self.server.loop.paused = False
            self.server.calm()
        for device in self.devices.values():
            device.calm()

    async def _rest(self) -> None:
        """Until the system says it is at rest, three times in a row."""
        quiet = 0
        deadline = self.scheduler.now + self.plan.settle_s
        why = ["never asked"]
        while quiet < 3 and self.scheduler.now < deadline:
            await asyncio.sleep(2.0)
            why = self._restless()
            if not why and self.server is not None:
                asked: asyncio.Future[list[str]] = self.outside.create_future()
                self.server.ask_rest(asked)
                try:
                    async with asyncio.timeout(5.0):
                        why = await asked
                except TimeoutError:
                    why = ["the server does not answer"]
            quiet = 0 if why else quiet + 1
        self.why_not_at_rest = why
        self.say(f"rest: {why or 'reached'}")

    def _restless(self) -> list[str]:
        why = []
        if self.server is None or not self.server.ready:
            why.append("the server is not up")
        for device in self.devices.values():
            why += device.restless()
        why += self.network.dead()
        why += [
            f"no answer for a send of {s.sender}"
            for s in self.submissions
            if not s.accepted and not s.refused
        ]
        return why

    def facts(self) -> Facts:
        assert self.server is not None
        facts = Facts(submissions=self.submissions, rang=self.vendor.rang, failures=self.failures)
        facts.devices = [device.log for device in self.devices.values()]
        facts.unsettled = self.why_not_at_rest
        facts.wall_end_ms = self.clock.wall_ms()
        facts.wall_jumped = self.wall_jumped
        self.server.collect(facts)
        return facts

    def run(self) -> Outcome:
        violations: list[str] = []
        limit_s = self.plan.end_s + self.plan.settle_s + 60.0
        try:
            try:
                self.scheduler.run(self.outside.spawn(self.main(), "main"), limit_s)
                facts = self.facts()
            except Stuck as error:
                violations = [f"settle: {error}", *(f"error: {text}" for text in self.failures[:5])]
            else:
                violations = check(facts)
        finally:
            self.scheduler.before_callback = None
            self._bury()
        self.figures["virtual_s"] += int(self.scheduler.now)
        self.figures["callbacks"] += self.scheduler.callbacks
        return Outcome(self.plan.seed, violations, self.figures, self._digest.hexdigest(), self.trace)

    def _bury(self) -> None:
        for loop in list(self.scheduler.loops):
            self.scheduler.kill(loop)
        servers = [*self.buried, *([self.server] if self.server is not None else [])]
        for server in servers:
            server.bury()
        self.outside.bury()
