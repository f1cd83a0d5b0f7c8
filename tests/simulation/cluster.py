"""One run of a cluster: two nodes, two dispatchers and an ingress as processes, over one store, one presence
and one log bus, with the devices, callers and judges of the single process (world.py).

    draw(seed) ─▶ warm-up ─▶ sends + faults until end_s ─▶ everything back, wait for rest ─▶ Facts ─▶ check

Beside the common judges these see the cluster's own promises (checkers.py's kinds):

fence      a boot was fenced though its process was there all the time
zombie     a process whose boot is fenced kept its sockets
adopters   two dispatchers read one dead inbox at once
offsets    a committed offset went back
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any, Final

from fastim.bus.base import DISPATCH_GROUP, NODE_GROUP, inbox_topic
from fastim.dispatch.ledger import audit
from fastim.errors import BusUnavailable, PresenceUnavailable, StoreUnavailable
from fastim.presence.memory import MemoryPresence
from fastim.store.sqlite import SqliteStore
from tests.simulation.checkers import Facts, Submission
from tests.simulation.devices import Device
from tests.simulation.logbus import INBOX, Broker, LogReader
from tests.simulation.loop import SimLoop
from tests.simulation.network import End, Network, SimHub, Wire
from tests.simulation.planted import Planted
from tests.simulation.processes import DispatchProcess, Ingress, NodeProcess, Process
from tests.simulation.scenario import WARM_UP_S, FaultPlan, Plan
from tests.simulation.servers import Outage
from tests.simulation.world import SERVICE_PATIENCE_S, World

RESTART_S: Final = 0.4
SEEN_MISSING_S: Final = 3.4
"""Before a fence the node must have been unable to renew for about so long."""
ROUGH_AFTER_S: Final = 20.0
FENCE_PATIENCE_S: Final = 3.5
NODES: Final = ("n1", "n2")
DISPATCHERS: Final = ("d1", "d2")


class ClusterNetwork(Network):
    """Several listeners; a device dials any of them, as a balancer would have it."""

    def __init__(self, outside: SimLoop, rng: random.Random) -> None:
        super().__init__(outside, rng)
        self.hubs: dict[str, SimHub] = {}
        self.placed: dict[str, str] = {}

    def dial(self, who: tuple[str, str], client: End, rtt_s: float) -> Wire | None:
        listening = {name: hub for name, hub in self.hubs.items() if hub.accept is not None}
        anywhere = self.rng.choice(list(listening.values())) if listening else None
        self.hub = listening.get(self.placed.get(who[0], ""), anywhere)
        return super().dial(who, client, rtt_s)

    def dead(self) -> list[str]:
        live = list(self.hubs.values())
        return [
            f"the connection of {wire.peer} stands, and its peer is gone"
            for wire in self._open
            if wire.hub in live and wire.link.state == "open" and wire.up.gone
        ]

    def process_died(self, hub: SimHub, *, silently: bool) -> None:
        super().process_died(hub, silently=silently)
        self.hubs = {name: known for name, known in self.hubs.items() if known is not hub}


class Cluster(World):
    """The run of one plan."""

    def __init__(self, plan: Plan, planted: Planted | None, verbose: bool) -> None:
        super().__init__(plan, planted, verbose)
        self.network: ClusterNetwork = ClusterNetwork(self.outside, random.Random(f"network {plan.seed}"))
        self.network.placed = plan.placed
        self.servers = self.scheduler.loop("servers")
        self.store_outage = Outage(StoreUnavailable, may_be_done=False)
        self.presence_outage = Outage(PresenceUnavailable, may_be_done=True)
        self.bus_outage = Outage(BusUnavailable, may_be_done=True)
        self.presence = MemoryPresence(self.clock)
        self.broker = Broker(self.servers, self._offset_went_back)
        self.broker.on_open = self._inbox_opened
        self.store: Any = None
        self.processes: dict[str, Process] = {}
        self.starts: dict[str, int] = {}
        self.boots: dict[tuple[str, int], NodeProcess] = {}
        self.ended: list[Process] = []
        self.adopting: list[tuple[str, Process]] = []
        """(inbox, dispatcher) of the inbox readers that dispatchers have opened."""
        self.seen: list[str] = []
        """Violations that only show while they happen."""
        self._adopter = ""
        self._presence_left_at = -1e9
        self._traps: dict[SimLoop, tuple[int, Process]] = {}
        self._zombies: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------ the processes

    def start_process(self, name: str) -> None:
        if name in self.processes:
            return
        self.starts[name] = number = self.starts.get(name, 0) + 1
        kinds: dict[str, type[Process]] = {"n": NodeProcess, "d": DispatchProcess, "a": Ingress}
        self.say(f"{name} start {number}")
        process = self.processes[name] = kinds[name[0]](self, name, number)
        process.launch()

    def kill(self, process: Process) -> None:
        """kill -9, or the end of an orderly stop. The next start comes RESTART_S later."""
        if self.processes.get(process.name) is not process:
            return
        self.say(f"{process.name} is gone")
        self.figures["kills"] += not process.stopping
        del self.processes[process.name]
        self._traps.pop(process.loop, None)
        process.loop.paused = False
        self.scheduler.kill(process.loop)
        process.lost()
        self.ended.append(process)
        self._later(self.restart_s(process.name), self.start_process, process.name)

    def restart_s(self, name: str) -> float:
        return RESTART_S + (self.rng.choice((0.0, 0.0, 3.0, 14.0)) if name in NODES else 0.0)

    def _before(self, loop: SimLoop) -> None:
        trap = self._traps.get(loop)
        if trap is not None:
            left, process = trap
            if left <= 0:
                self.kill(process)
            else:
                self._traps[loop] = (left - 1, process)

    # ------------------------------------------------------------------------------------------ judges

    def _offset_went_back(self, text: str) -> None:
        self.say(f"OFFSETS {text}")
        self.seen.append(f"offsets: {text}")

    def _inbox_opened(self, reader: LogReader) -> None:
        owner = next((one for one in self.processes.values() if one.bus is reader.bus), None)
        if not isinstance(owner, DispatchProcess):
            return
        self.figures["adoptions"] += 1
        for topic, other in self.adopting:
            open_still = any(one.bus is other.bus and not one.closed for one in self.broker.readers[topic])
            running = self.processes.get(other.name) is other and other.stood_still_s > 1.0
            if topic == reader.topic and other is not owner and open_still and running:
                self.seen.append(f"adopters: {other.name} and {owner.name} read {topic} at once")
        self.adopting.append((reader.topic, owner))

    def _fence(self, inner: Any) -> Any:
        """The store's fence(), watched: was the node really away?"""

        async def fence(node: str, boot: int, holder: str, now_ms: int, claim_ms: int) -> bool:
            known = await self.store.fenced(node, boot)
            done = bool(await inner(node, boot, holder, now_ms, claim_ms))
            if done:
                self._adopter = holder.partition(".")[0]
            if done and not known:
                self.say(f"{holder} fences {node} boot {boot}")
                if self.presence_outage.away and self.scheduler.now > self._presence_left_at + 1.0:
                    self.seen.append(f"fence: {node} boot {boot} was fenced while presence did not answer")
                process = self.boots.get((node, boot))
                there = process is not None and self.processes.get(node) is process and process.boot == boot
                if there and process is not None and process.ready and self._was_there(process):
                    self.seen.append(f"fence: {node} boot {boot} was fenced and was there all the time")
            return done

        return fence

    def _was_there(self, process: Process) -> bool:
        """Running, and nothing kept it from renewing."""
        now = self.scheduler.now
        rough = max(one.rough_until_s for one in (self.presence_outage, self.store_outage))
        return process.stood_still_s > ROUGH_AFTER_S and now > rough + SEEN_MISSING_S

    async def watch_zombies(self) -> None:
        """A process that runs knows of its fence within a few seconds, and then has no sockets."""
        while True:
            await asyncio.sleep(0.5)
            now = self.scheduler.now
            for name in NODES:
                process = self.processes.get(name)
                if not isinstance(process, NodeProcess) or process.hub is None or process.loop.paused:
                    self._zombies.pop(name, None)
                    continue
                inner = self.store._reader.nodes.fenced if self.store._reader is not None else None
                is_fenced = inner is not None and inner(name, process.boot)
                serving = is_fenced and any(link.authenticated for link in process.hub.links())
                away = max(self.store_outage.rough_until_s, 0.0) > now
                if not serving or away:
                    self._zombies.pop(name, None)
                elif now - self._zombies.setdefault(name, max(now, process.continued_at)) > FENCE_PATIENCE_S:
                    self.seen.append(f"zombie: {name} boot {process.boot} is fenced and keeps its sockets")
                    self._zombies[name] = 1e9

    # ------------------------------------------------------------------------------------------ faults

    def _strike(self, fault: FaultPlan) -> None:
        if fault.kind.endswith("pause"):
            self.rough_until_s = max(self.rough_until_s, self.scheduler.now + fault.for_s + 15.0)
        super()._strike(fault)

    def _one_of(self, names: tuple[str, ...], fault: FaultPlan) -> Process | None:
        return self.processes.get(names[fault.number % len(names)])

    def _crash(self, process: Process | None, callbacks: int) -> None:
        if process is not None:
            self._traps[process.loop] = (callbacks, process)

    def fault_node_kill(self, fault: FaultPlan) -> None:
        self._crash(self._one_of(NODES, fault), fault.number * 2)

    def fault_dispatch_kill(self, fault: FaultPlan) -> None:
        self._crash(self._one_of(DISPATCHERS, fault), fault.number * 2)

    def fault_adopter_kill(self, fault: FaultPlan) -> None:
        self._crash(self.processes.get(self._adopter), fault.number * 2)

    def _pause(self, process: Process | None, for_s: float) -> None:
        if process is not None and not process.loop.paused:
            process.loop.paused = True
            process.paused_at = self.scheduler.now
            self.figures["pauses"] += 1
            self._later(for_s, self._go_on, process)

    def _go_on(self, process: Process) -> None:
        if process.loop.paused:
            self.say(f"{process.name} goes on")
            process.loop.paused = False
            process.continued_at = self.scheduler.now

    def fault_node_pause(self, fault: FaultPlan) -> None:
        self._pause(self._one_of(NODES, fault), fault.for_s)

    def fault_dispatch_pause(self, fault: FaultPlan) -> None:
        self._pause(self._one_of(DISPATCHERS, fault), fault.for_s)

    def fault_node_stop(self, fault: FaultPlan) -> None:
        process = self._one_of(NODES, fault)
        if process is not None:
            self.figures["stops"] += 1
            process.stop()

    def fault_dispatch_stop(self, fault: FaultPlan) -> None:
        process = self._one_of(DISPATCHERS, fault)
        if process is not None:
            self.figures["stops"] += 1
            process.stop()

    def fault_presence_flush(self, fault: FaultPlan) -> None:
        self.presence.flush()

    def fault_flush_while_paused(self, fault: FaultPlan) -> None:
        """FLUSHALL while a node stands still: nobody but the store remembers it."""
        self._pause(self._one_of(NODES, fault), fault.for_s)
        self._later(min(1.0, fault.for_s / 2), self.fault_presence_flush, fault)

    def _outage(self, outage: Outage, name: str, value: Any, fault: FaultPlan) -> None:
        setattr(outage, name, value)
        until = self.scheduler.now + fault.for_s
        outage.rough_until_s = max(outage.rough_until_s, until)
        self._later(fault.for_s, setattr, outage, name, type(value)())

    def fault_store_away(self, fault: FaultPlan) -> None:
        self._outage(self.store_outage, "away", True, fault)

    def fault_presence_away(self, fault: FaultPlan) -> None:
        self._presence_left_at = self.scheduler.now
        self._outage(self.presence_outage, "away", True, fault)

    def fault_bus_away(self, fault: FaultPlan) -> None:
        self._outage(self.bus_outage, "away", True, fault)

    def fault_slow_store(self, fault: FaultPlan) -> None:
        self._outage(self.store_outage, "delay_s", 0.3, fault)

    def fault_slow_presence(self, fault: FaultPlan) -> None:
        self._outage(self.presence_outage, "delay_s", 0.2 + 0.02 * fault.number, fault)

    def fault_slow_bus(self, fault: FaultPlan) -> None:
        self._outage(self.bus_outage, "delay_s", 0.2 + 0.02 * fault.number, fault)

    # ------------------------------------------------------------------------------------------ the run

    async def _service(self, sub: Submission) -> None:
        """The same client_id until there is an answer."""
        ingress = self.processes["api"]
        assert isinstance(ingress, Ingress)
        while not sub.accepted and not sub.refused:
            answer: asyncio.Future[Any] = self.outside.create_future()
            ingress.submit(sub, answer)
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

    async def _open_servers(self) -> None:
        self.store = await SqliteStore.open(Path(self.directory), runner=self._inline, synchronous="OFF")
        self.store.fence = self._fence(self.store.fence)
        for conv, members in self.plan.groups.items():
            await self.store.create_group(
                conv.removeprefix("g:"), members[0], list(members), self.clock.wall_ms()
            )

    async def _inline(self, work: Any) -> Any:
        await self.breath()
        return work()

    async def main(self) -> None:
        opening = self.servers.spawn(self._open_servers(), "open")
        while not opening.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        opening.result()
        for name in (*NODES, *DISPATCHERS, "api"):
            self.start_process(name)
        while not all(process.ready for process in self.processes.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for plan in self.plan.devices:
            self.devices[plan.user, plan.device] = Device(self, plan)
        for device in self.devices.values():
            device.launch()
        watch = self.outside.spawn(self.watch_zombies(), "zombies")
        await self._until(WARM_UP_S)
        nemesis = self.outside.spawn(self.nemesis(), "nemesis")
        await self.sender()
        await nemesis
        await self._until(self.plan.end_s)
        self._calm()
        await self._rest()
        watch.cancel()

    def _calm(self) -> None:
        self.say("calm")
        self._traps.clear()
        self.network.extra_s = 0.0
        for wire in self.network.wires.values():
            wire.stall(False)
        for outage in (self.store_outage, self.presence_outage, self.bus_outage):
            outage.calm()
        for process in self.processes.values():
            self._go_on(process)
        for device in self.devices.values():
            device.calm()

    async def _rest(self) -> None:
        quiet = 0
        deadline = self.scheduler.now + self.plan.settle_s
        why = ["never asked"]
        while quiet < 3 and self.scheduler.now < deadline:
            await asyncio.sleep(2.0)
            why = self._restless()
            if not why:
                task = self.servers.spawn(self._still_moving(), "rest")
                while not task.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                why = task.result()
            quiet = 0 if why else quiet + 1
        self.why_not_at_rest = why
        self.say(f"rest: {why or 'reached'}")

    def _processes_up(self) -> list[str]:
        names = (*NODES, *DISPATCHERS)
        return [
            f"{name} is not up"
            for name in names
            if name not in self.processes or not self.processes[name].ready
        ]

    async def _still_moving(self) -> list[str]:
        why = []
        for topic in self.broker.topics:
            group = NODE_GROUP if topic.startswith(INBOX) else DISPATCH_GROUP
            group = "api" if topic.startswith(f"{INBOX}api.") else group
            if lag := self.broker.lag(topic, group):
                why.append(f"{topic} holds {lag} unsettled records")
        live = {(name, self.processes[name].boot) for name in NODES}
        open_boots = {(found.node, found.boot) for found in await self.store.open_boots()}
        if open_boots != live:
            why.append(f"open boots are {sorted(open_boots)}, live ones {sorted(live)}")
        inboxes = {inbox_topic(*start) for start in live}
        left = {topic for topic in self.broker.topics if topic.startswith(INBOX)} - inboxes
        if [topic for topic in left if not topic.startswith(f"{INBOX}api.")]:
            why.append(f"inboxes of nobody: {sorted(left)}")
        now_ms = self.clock.wall_ms()
        if due_ms := await self.store.next_due_ms():
            why.append(f"a due row waits, {due_ms - now_ms} ms from now")
        if push_ms := await self.store.next_push_ms():
            why.append(f"a push waits, {push_ms - now_ms} ms from now")
        report = await audit(self.store, now_ms)
        if report.in_flight:
            why.append(f"{report.in_flight} obligations are in flight: {report.states}")
        return why

    def facts(self) -> Facts:
        facts = Facts(submissions=self.submissions, rang=self.vendor.rang, failures=self.failures)
        facts.seen = self.seen
        facts.devices = [device.log for device in self.devices.values()]
        facts.unsettled = self.why_not_at_rest
        facts.wall_end_ms = self.clock.wall_ms()
        task = self.servers.spawn(self._collect(facts), "collect")
        self.scheduler.run(task, self.scheduler.now + 60.0)
        for process in self.processes.values():
            self.scheduler.kill(process.loop)
        closing = self.servers.spawn(self.store.close(), "close")
        self.scheduler.run(closing, self.scheduler.now + 60.0)
        return facts

    async def _collect(self, facts: Facts) -> None:
        after = 0
        while page := await self.store.scan(after, 500):
            facts.timeline += page
            after = page[-1].msg_id
        for conv in {message.conv for message in facts.timeline}:
            facts.members[conv] = tuple(member.user for member in await self.store.members(conv))
        # Nothing is under way: what has neither a fate nor a due row now is lost.
        if after:
            await self.store.settle(after)
        after = 0
        while True:
            found, after = await self.store.obligations(after, 500, facts.wall_end_ms)
            facts.obligations += found
            if not after:
                break
        report = await audit(self.store, facts.wall_end_ms)
        facts.failures += [f"audit: {text}" for text in report.violations]
        for user in self.plan.users():
            for conv, stored, counted in await self.store.recount(user):
                facts.failures.append(f"recount: {user} in {conv}: {stored} stored, {counted} counted")

    def _restless(self) -> list[str]:
        why = self._processes_up()
        for device in self.devices.values():
            why += device.restless()
        why += self.network.dead()
        why += [
            f"no answer for a send of {s.sender}"
            for s in self.submissions
            if not s.accepted and not s.refused
        ]
        return why

    def _bury(self) -> None:
        for loop in list(self.scheduler.loops):
            self.scheduler.kill(loop)
        for process in (*self.ended, *self.processes.values()):
            process.loop.bury()
            process.__dict__.clear()
        self.servers.bury()
        self.outside.bury()
        shutil.rmtree(self.directory, ignore_errors=True)
