"""One start of the server process: the real parts, put together as the app does, on a loop that can be
killed.

Whatever an earlier start left behind is on the disk it is given, and nowhere else.
"""

from __future__ import annotations

import asyncio
import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fastim._core.acks import AckTable
from fastim._core.wheel import Wheel
from fastim.auth import Identity, Scope
from fastim.bus.base import DISPATCH_GROUP, NODE_GROUP, SUBMIT, UNDELIVERED, Outgoing, inbox_topic
from fastim.bus.records import Reply, Submit, decode_inbox, encode
from fastim.dispatch.ledger import audit
from fastim.dispatch.service import Dispatch
from fastim.errors import BusUnavailable, FastimError, PeerError, StoreUnavailable
from fastim.model import MAX_SAFE_INT, Kind
from fastim.node.link import CLOSE_ABORT_MS
from fastim.node.service import Node, encode_error
from fastim.protocol import CloseCode, SendItem
from fastim.store.sqlite import SqliteStore, files
from tests.simulation.checkers import Facts, Submission
from tests.simulation.disk import Disk, ram_directory
from tests.simulation.faults import FlakyBus, FlakyPresence
from tests.simulation.network import SimHub

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")
NODE: Final = "n1"
API_GROUP: Final = "api"
DRAIN_MS: Final = 1_000
STEPPED_MS: Final = 600_000


class Server:
    """Everything that dies together."""

    def __init__(self, world: World, number: int, disk: Disk) -> None:
        self.world = world
        self.number = number
        self.disk = disk
        self.loop = world.scheduler.loop(f"server{number}")
        self.rng = random.Random(f"server {world.plan.seed} {number}")
        self.disk_delay_s = 0.0
        self.ready = False
        self.boot = 0
        self.hub: SimHub | None = None
        self.bus: FlakyBus | None = None
        self.presence: FlakyPresence | None = None
        self.store: Any = None
        self.dispatch: Dispatch | None = None
        self.node: Any = None
        self._answers: dict[str, asyncio.Future[Reply]] = {}
        self._requests = 0
        self._reply_topic = inbox_topic("api", number)
        self._stopping = False

    # ------------------------------------------------------------------------------------------ lifecycle

    def launch(self) -> None:
        self.loop.spawn(self._main(), "app")

    async def _main(self) -> None:
        try:
            await self._start()
        except FastimError as error:
            # The app would exit and be started again by its supervisor.
            self.world.say(f"start failed: {error}")
            self.world.outside.call_later(0.5, self._start_again)

    def _start_again(self) -> None:
        if self.world.server is self:
            self.world.kill_server(power=False)

    async def _start(self) -> None:
        world, clock = self.world, self.world.clock
        self.store = await open_store(self)
        if not world.groups_made:
            await make_groups(self.store, world)
            world.groups_made = True
        self.boot = await self.store.next_boot(NODE)
        self.bus = FlakyBus(random.Random(f"bus {world.plan.seed} {self.number}"))
        self.presence = FlakyPresence(clock, self.boot << 32, self.breath)
        self.dispatch = Dispatch(
            self.store,
            self.bus,
            self.presence,
            [world.vendor],
            clock=clock,
            rng=self.rng,
            holder=f"dispatch.{self.boot}",
            on_fatal=self.on_fatal,
        )
        await self.bus.ensure(self._reply_topic)
        await self.dispatch.start()
        await start_node(self)
        self.loop.spawn(self._api(), "api")
        self.ready = True
        world.say(f"server ready, boot {self.boot}")

    def on_fatal(self, error: BaseException) -> None:
        """A bug, or a store that is gone for good. With the power off anything may happen."""
        if not self.disk.dead:
            self.world._on_failure(f"server{self.number}: fatal: {error!r}", error)

    async def breath(self) -> None:
        await self.world.breath()

    async def run_inline(self, work: Callable[[], T]) -> T:
        """Where the store has a thread: the work itself cannot be interrupted, the process can, around it."""
        await self.breath()
        if self.disk_delay_s:
            await asyncio.sleep(self.disk_delay_s)
        result = work()
        await self.breath()
        return result

    def stop(self, done: Any) -> None:
        if self.ready and not self._stopping:
            self._stopping = True
            self.ready = False
            self.loop.spawn(self._stop(done), "stop")

    async def _stop(self, done: Any) -> None:
        assert self.dispatch is not None
        try:
            await stop_node(self)
            await self.dispatch.stop()
            await self.dispatch.move_mark()
            await self.store.close()
        except StoreUnavailable as error:
            self.world.say(f"stop: {error}")
        self.world.outside.call_soon(done)

    def lost(self) -> None:
        """Killed: what the outside waits for from here never comes."""
        self.ready = False
        self._answers.clear()

    def bury(self) -> None:
        self.loop.bury()
        self.disk.remove()
        for slot in ("node", "dispatch", "store", "presence", "bus", "hub"):
            setattr(self, slot, None)

    # ------------------------------------------------------------------------------------------ faults

    def flush_presence(self) -> None:
        if self.presence is not None:
            self.presence.flush()

    def calm(self) -> None:
        self.disk.full = False
        self.disk.trap = None
        self.disk_delay_s = 0.0
        if self.presence is not None:
            self.presence.away = False
            self.presence.delay_s = 0.0
        if self.bus is not None:
            self.bus.away = False

    # ------------------------------------------------------------------------------------------ the ingress

    def submit(self, sub: Submission, answer: asyncio.Future[Reply]) -> None:
        """A request of a service caller, one trip away."""
        self.loop.call_later(0.002, self._submit, sub, answer)

    def _submit(self, sub: Submission, answer: asyncio.Future[Reply]) -> None:
        if self.ready:
            self._requests += 1
            name = f"req-{self.number}-{self._requests}"
            self._answers[name] = answer
            self.loop.spawn(self._publish(sub, name), name)

    async def _publish(self, sub: Submission, name: str) -> None:
        assert self.bus is not None
        item = SendItem(sub.client_id, Kind.TEXT, sub.body, sub.loss_time_ms, sub.flags)
        submit = Submit(sub.conv, sub.sender, "", name, self._reply_topic, [item], 0, True)
        try:
            await self.bus.publish([Outgoing(SUBMIT, sub.conv, encode(submit))])
        except BusUnavailable as error:
            self.world.say(f"{name}: {error}")

    async def _api(self) -> None:
        assert self.bus is not None
        reader = self.bus.reader(self._reply_topic, API_GROUP, max_unsettled=1_000)
        while records := await reader.read(100):
            for record in records:
                reply = decode_inbox(record.value)
                assert isinstance(reply, Reply)
                answer = self._answers.pop(reply.session, None)
                if answer is not None:
                    self.world.outside.call_later(0.002, _answer, answer, reply)
                reader.settle(record)

    # ------------------------------------------------------------------------------------------ at rest

    def ask_rest(self, asked: asyncio.Future[list[str]]) -> None:
        self.loop.spawn(self._ask_rest(asked), "ask rest")

    async def _ask_rest(self, asked: asyncio.Future[list[str]]) -> None:
        why = await self._restless()
        self.world.outside.call_soon(_answer, asked, why)

    async def _restless(self) -> list[str]:
        """Everything that still moves, as sentences."""
        assert self.bus is not None
        why = []
        inbox = inbox_topic(NODE, self.boot)
        groups = {SUBMIT: DISPATCH_GROUP, UNDELIVERED: DISPATCH_GROUP, inbox: NODE_GROUP}
        groups[self._reply_topic] = API_GROUP
        for topic, group in groups.items():
            if lag := await self.bus.lag(topic, group):
                why.append(f"{topic} holds {lag} unsettled records")
        try:
            if due_ms := await self.store.next_due_ms():
                wait_ms = due_ms - self.world.clock.wall_ms()
                # Rows follow a clock that is set back. But one whose moment was computed before the step and
                # that was written after it keeps that moment; nothing of it is lost, so it is let pass.
                if not self.world.wall_jumped or wait_ms < STEPPED_MS:
                    why.append(f"a due row waits, {wait_ms} ms from now")
            if push_ms := await self.store.next_push_ms():
                why.append(f"a push waits, {push_ms - self.world.clock.wall_ms()} ms from now")
            mark, head = await self.store.settled_mark(), await self.store.head_msg_id()
            if mark != head:
                why.append(f"the settled mark {mark} is not at the head {head}")
            report = await audit(self.store, self.world.clock.wall_ms())
            if report.in_flight and not self.world.wall_jumped:
                why.append(f"{report.in_flight} obligations are in flight: {report.states}")
        except StoreUnavailable as error:
            why.append(str(error))
        return why

    def collect(self, facts: Facts) -> None:
        """Read the store's own facts, after the run."""
        task = self.loop.spawn(self._collect(facts), "collect")
        self.world.scheduler.run(task, self.world.scheduler.now + 60.0)

    async def _collect(self, facts: Facts) -> None:
        after = 0
        while page := await self.store.scan(after, 500):
            facts.timeline += page
            after = page[-1].msg_id
        for conv in {message.conv for message in facts.timeline}:
            facts.members[conv] = tuple(member.user for member in await self.store.members(conv))
        after = 0
        while True:
            found, after = await self.store.obligations(after, 500, facts.wall_end_ms)
            facts.obligations += found
            if not after:
                break
        report = await audit(self.store, facts.wall_end_ms)
        facts.failures += [f"audit: {text}" for text in report.violations]
        for user in self.world.plan.users():
            for conv, stored, counted in await self.store.recount(user):
                facts.failures.append(f"recount: {user} in {conv}: {stored} stored, {counted} counted")


def _answer(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


# --------------------------------------------------------------------------- how the real parts are opened


async def open_store(server: Server) -> SqliteStore:
    return await SqliteStore.open(server.disk.directory, runner=server.run_inline, vfs=server.disk.vfs)


@functools.cache
def _empty_store() -> bytes:
    """A database with the schema in it: migrations have tests of their own."""
    directory = Path(ram_directory())
    try:
        db = files.open_writer(directory, "", "OFF")
        files.migrate(db)
        db.close()
        return (directory / files.DATABASE).read_bytes()
    finally:
        shutil.rmtree(directory)


def prepare_disk(directory: str) -> None:
    (Path(directory) / files.DATABASE).write_bytes(_empty_store())


async def make_groups(store: Any, world: World) -> None:
    """Before the first send. Tried at each start until one has done it."""
    for conv, members in world.plan.groups.items():
        await store.create_group(conv.removeprefix("g:"), members[0], list(members), world.clock.wall_ms())


async def start_node(server: Server) -> None:
    """What the app does: the node first, then the listener."""
    world = server.world
    assert server.bus is not None
    assert server.presence is not None
    acks, wheel = AckTable(), Wheel()
    server.hub = SimHub(server.loop, world.clock, acks, wheel, encode_error)
    server.node = Node(
        NODE,
        server.boot,
        store=server.store,
        bus=server.bus,
        presence=server.presence,
        hub=server.hub,
        acks=acks,
        wheel=wheel,
        verify=identity_of,
        clock=world.clock,
        rng=server.rng,
        on_fatal=server.on_fatal,
    )
    await server.node.start()
    world.network.hub = server.hub


async def stop_node(server: Server) -> None:
    """Drain: GOAWAY, no new sockets, 1012 to the old ones spread over the window, then the node itself."""
    node, hub = server.node, server.hub
    assert hub is not None
    node.go_away(DRAIN_MS, "restart")
    server.world.network.hub = None
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


def identity_of(token: str) -> Identity:
    """The simulation's issuer: "token <user>"."""
    word, _, user = token.partition(" ")
    if word != "token" or not user:
        raise PeerError("unauthenticated", "the token is not valid")
    return Identity(user, frozenset({Scope.CLIENT}), MAX_SAFE_INT, "simulation", token)
