"""The processes of a cluster run: access nodes, dispatchers and an ingress, each on a loop of its own.

Put together as the app does. Whatever an earlier start left is in the servers (servers.py, logbus.py).
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, Final

from fastim._core.acks import AckTable
from fastim._core.wheel import Wheel
from fastim.bus.base import SUBMIT, Outgoing, inbox_topic
from fastim.bus.records import Reply, Submit, decode_inbox, encode
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.service import Dispatch
from fastim.errors import BusUnavailable, FastimError, Fenced
from fastim.model import Kind
from fastim.node.link import CLOSE_ABORT_MS
from fastim.node.service import Node, encode_error
from fastim.protocol import CloseCode, SendItem
from tests.simulation.checkers import Submission
from tests.simulation.logbus import LogBus
from tests.simulation.network import SimHub
from tests.simulation.server import DRAIN_MS, identity_of
from tests.simulation.servers import Line, Remote

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

PARTITIONS: Final = 3
CLUSTER_LIMITS: Final = DispatchLimits(
    submit_partitions=PARTITIONS, undelivered_partitions=PARTITIONS, mark_interval_ms=0
)
API_GROUP: Final = "api"


class Process:
    """What dies and stands still together."""

    def __init__(self, world: Cluster, name: str, start: int) -> None:
        self.world = world
        self.name = name
        self.loop = world.scheduler.loop(f"{name}#{start}")
        self.rng = random.Random(f"{name} {world.plan.seed} {start}")
        self.ready = False
        self.stopping = False
        self.boot = 0
        self.paused_at = self.continued_at = -1e9
        self.store: Any = Remote(world.store, Line(self.loop, world.servers, world.store_outage, self.rng))
        self.presence: Any = Remote(
            world.presence, Line(self.loop, world.servers, world.presence_outage, self.rng)
        )
        self.bus = LogBus(world.broker, self.loop, world.bus_outage, self.rng)

    def launch(self) -> None:
        self.loop.spawn(self._main(), self.name)

    async def _main(self) -> None:
        while True:
            try:
                self.boot = await self.store.next_boot(self.name)
                await self._start()
            except FastimError as error:
                # The process would exit and be started again by its supervisor.
                self.world.say(f"{self.name} cannot start: {error}")
                await asyncio.sleep(0.5)
            else:
                self.ready = True
                self.world.say(f"{self.name} ready, boot {self.boot}")
                return

    async def _start(self) -> None:
        raise NotImplementedError

    def on_fatal(self, error: BaseException) -> None:
        self.world._on_failure(f"{self.name}: fatal: {error!r}", error)

    def stop(self) -> None:
        """SIGTERM; then the supervisor starts another."""
        if self.ready and not self.stopping:
            self.stopping = True
            self.ready = False
            self.loop.spawn(self._stop_all(), "stop")

    async def _stop_all(self) -> None:
        await self._stop()
        self.world.outside.call_soon(self.world.kill, self)

    async def _stop(self) -> None:
        raise NotImplementedError

    def lost(self) -> None:
        """Killed: whom the outside must tell."""

    @property
    def stood_still_s(self) -> float:
        """How long since it last stood still; 0 while it does."""
        return 0.0 if self.loop.paused else self.world.scheduler.now - self.continued_at


class NodeProcess(Process):
    hub: SimHub | None = None
    node: Any = None

    async def _start(self) -> None:
        world = self.world
        acks, wheel = AckTable(), Wheel()
        self.hub = SimHub(self.loop, world.clock, acks, wheel, encode_error)
        await self._open(self.hub)
        world.network.hubs[self.name] = self.hub

    async def _open(self, hub: SimHub) -> None:
        self.node = Node(
            self.name, self.boot, store=self.store, bus=self.bus, presence=self.presence, hub=hub,
            acks=hub.acks, wheel=hub.wheel, verify=identity_of, clock=self.world.clock, rng=self.rng,
            adoptable=True, on_fatal=self.on_fatal, on_fenced=self._on_fenced,
        )  # fmt: skip
        await self.node.start()
        self.world.boots[self.name, self.boot] = self

    def _on_fenced(self, error: Fenced) -> None:
        self.world.say(f"{self.name} boot {self.boot} was fenced")
        self.world.figures["fenced"] += 1
        if not self.stopping:
            self.ready = False
            self.loop.spawn(self._come_back(), "come back")

    async def _come_back(self) -> None:
        """The same hub and listener, under a new boot."""
        assert self.hub is not None
        await self.node.stop()
        while not self.stopping:
            try:
                self.boot = await self.store.next_boot(self.name)
                await self._open(self.hub)
            except FastimError as error:
                self.world.say(f"{self.name} cannot come back: {error}")
                await asyncio.sleep(0.5)
            else:
                self.ready = True
                self.world.say(f"{self.name} is back, boot {self.boot}")
                return

    async def _stop(self) -> None:
        node, hub = self.node, self.hub
        assert hub is not None
        node.go_away(DRAIN_MS, "restart")
        self.world.network.hubs.pop(self.name, None)
        links = hub.links()
        for link in links:
            await asyncio.sleep(DRAIN_MS / 1000 / len(links))
            link.close(CloseCode.RESTART, "going away")
        deadline_ms = hub.now_ms() + 2 * CLOSE_ABORT_MS
        while hub.links() and hub.now_ms() < deadline_ms:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for link in hub.links():
            link.abort()
        await asyncio.sleep(0)
        await node.stop()

    def lost(self) -> None:
        if self.hub is not None:
            self.world.network.process_died(self.hub, silently=False)


class DispatchProcess(Process):
    dispatch: Any = None

    async def _start(self) -> None:
        world = self.world
        self.dispatch = Dispatch(
            self.store, self.bus, self.presence, [world.vendor], clock=world.clock, rng=self.rng,
            limits=CLUSTER_LIMITS, holder=f"{self.name}.{self.boot}", on_fatal=self.on_fatal,
        )  # fmt: skip
        await self.dispatch.start()

    async def _stop(self) -> None:
        await self.dispatch.stop()


class Ingress(Process):
    """Where callers of the REST api come in. Nothing kills it: its own road is in the api's tests."""

    async def _start(self) -> None:
        self._answers: dict[str, asyncio.Future[Reply]] = {}
        self._requests = 0
        self._topic = inbox_topic("api", self.boot)
        await self.bus.ensure(self._topic)
        self.loop.spawn(self._read(), "api")

    def submit(self, sub: Submission, answer: asyncio.Future[Reply]) -> None:
        self.loop.call_later(0.002, self._submit, sub, answer)

    def _submit(self, sub: Submission, answer: asyncio.Future[Reply]) -> None:
        if self.ready:
            self._requests += 1
            name = f"req-{self._requests}"
            self._answers[name] = answer
            self.loop.spawn(self._publish(sub, name), name)

    async def _publish(self, sub: Submission, name: str) -> None:
        item = SendItem(sub.client_id, Kind.TEXT, sub.body, sub.loss_time_ms, sub.flags)
        submit = Submit(sub.conv, sub.sender, "", name, self._topic, [item], 0, True)
        try:
            await self.bus.publish([Outgoing(SUBMIT, sub.conv, encode(submit))])
        except BusUnavailable as error:
            self.world.say(f"{name}: {error}")

    async def _read(self) -> None:
        reader = self.bus.reader(self._topic, API_GROUP, max_unsettled=1_000)
        while records := await reader.read(100):
            for record in records:
                reply = decode_inbox(record.value)
                assert isinstance(reply, Reply)
                answer = self._answers.pop(reply.session, None)
                if answer is not None:
                    self.world.outside.call_later(0.002, _answer, answer, reply)
                reader.settle(record)


def _answer(future: asyncio.Future[Reply], value: Reply) -> None:
    if not future.done():
        future.set_result(value)
