"""Where messages go: presence in, inbox records, parks and due rows out.

`route` is pure and gives every obligation of a batch exactly one next step:

 live               Deliver in the inbox of the node         one per message and node, never per member
 nowhere            park, and push if the kind wants it      one per (user, conv) of the batch
 in grace, held     due row at the end of it                 same
 presence is away   due row soon: nobody is taken for offline
 expired meanwhile  due row now: the store clears it into its fate

The sender has no obligation; his other sessions get a Deliver, the sending one is skipped. A due row stands
for a user and goes with the first of his devices. So while presence or the bus is away everybody is owed a
Nudge that leaves when both are back: the other devices of users and sender hear of it too.
`Router` is the same with the backends attached. A record for an inbox that does not exist (any more) means
that its users have moved: due rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from fastim.bus.base import Bus, Outgoing, inbox_topic
from fastim.bus.records import Deliver, Nudge, Submit, decode_inbox
from fastim.clock import Clock
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Patience, Stopped
from fastim.dispatch.policy import absent_until_ms, nodes_of
from fastim.errors import BusUnavailable, PresenceUnavailable
from fastim.model import Message, is_expired
from fastim.presence.base import NOWHERE, Location, PresenceStore
from fastim.protocol import encode_msg_tail
from fastim.store.base import DueRequest, Park

Pair = tuple[str, str]
"""(user, conv)"""


class Routable(msgspec.Struct, frozen=True, gc=False):
    """The newly stored messages of one Submit. pushes: whether any of them may ring a phone."""

    submit: Submit
    members: tuple[str, ...]
    messages: list[Message]
    pushes: bool


class Plan:
    """What a batch turned into."""

    __slots__ = ("delivers", "due", "expired", "obligations", "owed", "parks")

    def __init__(self) -> None:
        self.delivers: list[Outgoing] = []
        self.parks: dict[Pair, tuple[int, int, bool]] = {}
        """(from_seq, to_seq, push)"""
        self.due: dict[Pair, DueRequest] = {}
        self.owed: dict[Pair, None] = {}
        """Whose sessions could not be told."""
        self.obligations = 0
        self.expired = 0

    def park(self, user: str, conv: str, from_seq: int, to_seq: int, push: bool) -> None:
        known = self.parks.get((user, conv))
        if known is not None:
            from_seq, to_seq, push = min(known[0], from_seq), max(known[1], to_seq), known[2] or push
        self.parks[user, conv] = (from_seq, to_seq, push)

    def ask_due(self, user: str, conv: str, from_seq: int, due_at_ms: int, urgent: bool = False) -> None:
        known = self.due.get((user, conv))
        if known is not None:
            from_seq, due_at_ms = min(known.from_seq, from_seq), min(known.due_at_ms, due_at_ms)
            urgent = urgent or known.urgent
        self.due[user, conv] = DueRequest(user, conv, from_seq, due_at_ms, urgent)


def route(
    batch: Sequence[Routable],
    located: dict[str, Location] | None,
    now_ms: int,
    hold_push_until_ms: int,
    limits: DispatchLimits,
) -> Plan:
    """One next step for every obligation of the batch. located None: presence did not answer."""
    plan = Plan()
    topics: dict[tuple[str, int], str] = {}
    for item in batch:
        submit, messages = item.submit, item.messages
        conv, sender = submit.conv, submit.sender
        first, last = messages[0].seq, messages[-1].seq
        obliged = len(item.members) - (sender in item.members)
        plan.obligations += obliged * len(messages)
        live = messages
        for message in messages:
            if message.loss_time_ms and is_expired(message.loss_time_ms, now_ms):
                live = _expire(plan, item, now_ms)
                break
        if located is None:
            for user in item.members:
                if user != sender:
                    plan.ask_due(user, conv, first, now_ms + limits.first_due_ms)
                plan.owed[user, conv] = None
            continue
        nodes: dict[tuple[str, int], list[str]] = {}
        for user in item.members:
            location = located.get(user, NOWHERE)
            if user == sender:
                _add_nodes(nodes, user, location, submit.session)
            elif location.attachments:
                _add_nodes(nodes, user, location, "")
            elif until_ms := absent_until_ms(location, now_ms, hold_push_until_ms):
                plan.ask_due(user, conv, first, until_ms)
            else:
                plan.park(user, conv, first, last, item.pushes)
        if nodes and live:
            _deliver(plan.delivers, topics, submit, live, nodes)
    return plan


def _expire(plan: Plan, item: Routable, now_ms: int) -> list[Message]:
    """Leave the expired to the store. Returns the others."""
    submit, messages = item.submit, item.messages
    live = [message for message in messages if not is_expired(message.loss_time_ms, now_ms)]
    for user in item.members:
        if user != submit.sender:
            plan.expired += len(messages) - len(live)
            plan.ask_due(user, submit.conv, messages[0].seq, now_ms, urgent=True)
    return live


def _add_nodes(
    nodes: dict[tuple[str, int], list[str]], user: str, location: Location, skip_session: str
) -> None:
    for attachment in location.attachments:
        if attachment.session == skip_session:
            continue
        where = (attachment.node, attachment.boot)
        users = nodes.get(where)
        if users is None:
            nodes[where] = [user]
        elif users[-1] != user:
            users.append(user)


def _deliver(
    delivers: list[Outgoing],
    topics: dict[tuple[str, int], str],
    submit: Submit,
    messages: list[Message],
    nodes: dict[tuple[str, int], list[str]],
) -> None:
    """The tail is encoded once per message, the record once per node."""
    conv = submit.conv
    for message in messages:
        tail = encode_msg_tail(message)
        for where, users in nodes.items():
            topic = topics.get(where)
            if topic is None:
                topic = topics[where] = inbox_topic(*where)
            record = Deliver(
                conv, message.seq, message.msg_id, message.loss_time_ms, message.sender, users,
                submit.session, tail,
            )  # fmt: skip
            delivers.append(Outgoing(topic, conv, record))


def nudges(user: str, conv: str, nodes: Iterable[tuple[str, int]], attempt: int) -> list[Outgoing]:
    """One Nudge per node."""
    value = Nudge(user, conv, attempt)
    return [Outgoing(inbox_topic(*where), user, value) for where in nodes]


class Router:
    """Presence and bus as dispatch uses them."""

    def __init__(
        self,
        bus: Bus,
        presence: PresenceStore,
        clock: Clock,
        limits: DispatchLimits,
        patience: Patience,
        flows: Flows,
    ) -> None:
        self._bus = bus
        self._presence = presence
        self._clock = clock
        self._limits = limits
        self._patience = patience
        self._flows = flows
        self._owed: dict[Pair, None] = {}
        self._hold_push_until_mono_ms = 0

    @property
    def hold_push_until_ms(self) -> int:
        """Wall clock: nobody is parked before, because everybody is reconnecting; 0: no hold.

        Kept on the monotonic clock: one that starts years ahead and is set back must not hold for years.
        """
        left_ms = self._hold_push_until_mono_ms - self._clock.mono_ms()
        return self._clock.wall_ms() + left_ms if left_ms > 0 else 0

    @hold_push_until_ms.setter
    def hold_push_until_ms(self, wall_ms: int) -> None:
        self._hold_push_until_mono_ms = self._clock.mono_ms() + wall_ms - self._clock.wall_ms()

    async def locate(self, users: Iterable[str]) -> dict[str, Location] | None:
        """Where they are, in one call; None when presence did not answer."""
        try:
            return await self._presence.locate(list(users))
        except PresenceUnavailable:
            self._flows.presence_failures += 1
            return None

    async def deliver(self, plan: Plan, asked_mono_ms: int) -> set[str]:
        """Publish the plan's Delivers. Returns the topics that took them.

        Users whose inbox took none get a due row in the plan instead. asked_mono_ms: before presence was
        asked; when that is too long ago, an inbox may have been adopted, read to its end and deleted
        meanwhile, and nobody can say on which side of the end a record came: due rows for all of them.
        """
        topics = {out.topic for out in plan.delivers}
        self._flows.delivers += len(plan.delivers)
        missed = await self.publish(plan.delivers)
        topics.difference_update(out.topic for out in missed)
        if self._clock.mono_ms() - asked_mono_ms > self._limits.publish_window_ms:
            missed = plan.delivers
        now_ms = self._clock.wall_ms()
        for out in missed:
            record = decode_inbox(out.value)
            assert isinstance(record, Deliver)
            for user in record.users:
                if user != record.sender:
                    due_at_ms = now_ms + self._limits.first_due_ms
                    plan.ask_due(user, record.conv, record.seq, due_at_ms, urgent=True)
                plan.owed[user, record.conv] = None
        self._owe(plan.owed)
        return topics

    def _owe(self, pairs: Iterable[Pair]) -> None:
        """Bounded: who is forgotten lags until his next message or sync."""
        self._owed.update(dict.fromkeys(pairs))
        while len(self._owed) > self._limits.most_owed:
            del self._owed[next(iter(self._owed))]

    async def nudge_owed(self) -> None:
        """Tell sessions of what they could not be told. Costs nothing when nothing is owed."""
        if not self._owed:
            return
        owed, self._owed = self._owed, {}
        located = await self.locate({user for user, _ in owed})
        if located is None:
            self._owe(owed)
            return
        records: list[Outgoing] = []
        for user, conv in owed:
            records += nudges(user, conv, nodes_of(located.get(user, NOWHERE).attachments), 0)
        self._flows.nudges += len(records)
        for out in await self.publish(records):
            missed = decode_inbox(out.value)
            assert isinstance(missed, Nudge)
            self._owe([(missed.user, missed.conv)])

    async def nudge_arrived(self, parked: Sequence[tuple[str, str, int]]) -> None:
        """Race A: after parking, look again; who has come meanwhile gets a Nudge.

        parked: (user, conv, generation that the session must be above). Where presence is away nothing is
        due: every registration is followed by a sync.
        """
        if not parked:
            return
        located = await self.locate({user for user, _, _ in parked})
        if located:
            records = []
            for user, conv, above_generation in parked:
                location = located.get(user)
                if location is not None:
                    records += nudges(user, conv, nodes_of(location.attachments, above_generation), 0)
            self._flows.nudges += len(records)
            await self.publish(records)

    async def publish(self, records: list[Outgoing]) -> list[Outgoing]:
        """Publish to inboxes. Returns the records that no inbox took, in order; they may exist all the same.

        An inbox that does not exist gives up at once, a bus that is away after bus_patience_ms.
        """
        if not records:
            return []
        try:
            await self._bus.publish(records)
        except BusUnavailable:
            self._flows.bus_failures += 1
        else:
            return []
        by_topic: dict[str, list[Outgoing]] = {}
        for out in records:
            by_topic.setdefault(out.topic, []).append(out)
        left = [out for topic in by_topic.values() for out in await self._publish_to_one(topic)]
        self._flows.moved += len(left)
        return left

    async def _publish_to_one(self, records: list[Outgoing]) -> list[Outgoing]:
        give_up_mono_ms = self._clock.mono_ms() + self._limits.bus_patience_ms
        tried = 0
        while True:
            try:
                await self._bus.publish(records)
                return []
            except BusUnavailable as error:
                if not error.temporary or self._clock.mono_ms() >= give_up_mono_ms:
                    return records
            tried += 1
            try:
                await self._patience.back_off(tried)
            except Stopped:
                return records

    def parks(self, plan: Plan, now_ms: int) -> list[Park]:
        """The plan's parks as the store takes them."""
        collapse_ms = self._limits.push_collapse_ms
        return [
            Park(user, conv, from_seq, to_seq, push, now_ms, collapse_ms)
            for (user, conv), (from_seq, to_seq, push) in plan.parks.items()
        ]
