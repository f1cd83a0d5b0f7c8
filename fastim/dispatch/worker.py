"""Take sends from `submit`, a batch at a time: store, answer, route, and only then settle.

    read ≤ 512 ─▶ one append ─▶ Replies ─▶ one locate ─▶ Delivers │ due rows │ parks ─▶ settle

W1  a record is settled only when its messages are stored (or refused to their sender) and their routing is
    durable: Delivers published, due rows and parks committed       tests/system/test_dispatch.py
W2  a batch read again gives every sender the first result, and asks for a due row instead of delivering a
    second time; the store writes it only if something is still open            same
W3  a message that was refused because the store is away may be sent again under the same client_id: whatever
    happened, the sender learns it then                                         same
No task, future or commit per message. Source: docs/design.md, "One road".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from fastim import observe
from fastim.bus.base import Outgoing, Record, inbox_topic
from fastim.bus.records import MALFORMED, Mark, ReadNotice, Refusal, Reply, Submit, decode_submit
from fastim.clock import Clock
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Intake, Patience, Stopped
from fastim.dispatch.policy import nodes_of
from fastim.dispatch.router import Plan, Routable, Router, route
from fastim.dispatch.settled import SettledMark
from fastim.errors import PeerError, StoreUnavailable
from fastim.model import Conv, Flag, KindRule, Message, check_id, parse_conv
from fastim.presence.base import NOWHERE, Location
from fastim.protocol import SendItem, SentItem
from fastim.store.base import (
    AppendedFrame,
    AppendFrame,
    AppendItem,
    AppendStatus,
    Flush,
    MessageStore,
)

_CODES: Final = {
    AppendStatus.CONFLICT: ("conflict", "this client_id was used for another content"),
    AppendStatus.EXPIRED: ("expired", "loss_time_ms has passed"),
    AppendStatus.NOT_MEMBER: ("not_member", "the sender is not a member of the conversation"),
    AppendStatus.UNKNOWN_USER: ("unknown_user", "nobody has ever seen the recipient"),
    AppendStatus.UNKNOWN_GROUP: ("unknown_group", "there is no such group"),
}
_NOT_REACHED: Final = "an earlier message of the frame was refused"
# Plain integers: `&` with an IntFlag costs 1.5 µs, and these run once per message.
_SILENT: Final = int(Flag.SILENT)
_NO_PUSH: Final = int(Flag.NO_PUSH)
_STORED: Final = AppendStatus.STORED
_REPEATED: Final = AppendStatus.REPEATED


@functools.lru_cache(maxsize=16_384)
def _parsed(conv: str) -> Conv:
    return parse_conv(conv)


class _Work(msgspec.Struct, gc=False):
    """One Submit on its way: what to append, and what is refused already."""

    submit: Submit
    frame: AppendFrame | None
    refused: list[Refusal]
    result: AppendedFrame | None = None


class SubmitWorker:
    """The only writer of conversations."""

    def __init__(
        self,
        store: MessageStore,
        router: Router,
        mark: SettledMark,
        kinds: Mapping[int, KindRule],
        clock: Clock,
        limits: DispatchLimits,
        patience: Patience,
        flows: Flows,
        holder: str,
    ) -> None:
        self._store = store
        self._router = router
        self._mark = mark
        self._kinds = kinds
        self._ringing = frozenset(kind for kind, rule in kinds.items() if rule.push)
        self._clock = clock
        self._limits = limits
        self._patience = patience
        self._flows = flows
        self._holder = holder
        self._down_since_mono_ms: int | None = None

    async def run(self, intake: Intake) -> None:
        """Until the intake ends, or dispatch stops while the store is away."""
        try:
            while batch := await intake.next():
                began_mono_ms = self._clock.mono_ms()
                await self.take(batch)
                intake.settle(batch)
                if len(batch) < self._limits.linger_below:
                    # The price is per commit, not per message: at 6,000 messages/s a batch a millisecond
                    # would cost twice the CPU. After a pause the first message never waits.
                    spent_ms = self._clock.mono_ms() - began_mono_ms
                    await self._patience.pause(self._limits.linger_ms - spent_ms)
        except Stopped:
            pass
        finally:
            await intake.close()

    async def take(self, records: Sequence[Record]) -> None:
        """See one batch to its end. On return everything in it may be settled."""
        work: list[_Work] = []
        notices: list[ReadNotice] = []
        for record in records:
            try:
                decoded = decode_submit(record.value)
            except MALFORMED:
                self._flows.malformed += 1
                continue
            if isinstance(decoded, Submit):
                work.append(self._check(decoded))
            else:
                notices.append(decoded)
        if work:
            await self._append(work)
            await self._router.publish([_reply(one) for one in work if one.submit.reply_to])
            await self._route(work)
        if notices:
            await self._tell(notices)

    # ------------------------------------------------------------------------------------------- 0 check

    def _check(self, submit: Submit) -> _Work:
        """The node checked all this; a record of another version or an api may not have."""
        try:
            conv = _parsed(submit.conv)
            if conv.members is None or submit.sender not in conv.members:
                check_id("sender", submit.sender)
            if conv.type == "r":
                raise PeerError("bad_conv", f"{submit.conv} is a room; rooms are not stored")
            if conv.type == "s" and not submit.service:
                raise PeerError("forbidden", f"only services send to {submit.conv}")
        except PeerError as error:
            return self._refuse(submit, [], error)
        kinds = self._kinds
        items: list[AppendItem] = []
        for item in submit.items:
            rule = kinds.get(item.kind)
            if rule is None:
                return self._refuse(submit, items, PeerError("unknown_kind", f"kind is {item.kind}"))
            if len(item.body) > rule.max_body_bytes:
                detail = f"body is {len(item.body):,} bytes; limit {rule.max_body_bytes:,} for {rule.name}"
                return self._refuse(submit, items, PeerError("too_big", detail))
            countable = rule.countable and not item.flags & _SILENT
            mentions = tuple(item.mentions)
            loss_time_ms, flags = item.loss_time_ms, item.flags
            items.append(
                AppendItem(
                    item.client_id,
                    item.kind,
                    item.body,
                    loss_time_ms,
                    flags,
                    mentions,
                    rule.ttl_ms,
                    countable,
                )
            )
        return _Work(submit, self._frame(submit, items), [])

    def _frame(self, submit: Submit, items: list[AppendItem]) -> AppendFrame:
        known = self._limits.refuse_unknown and not submit.service
        return AppendFrame(submit.conv, submit.sender, tuple(items), submit.read_seq, require_known=known)

    def _refuse(self, submit: Submit, items: list[AppendItem], error: PeerError) -> _Work:
        """items: the prefix that is all right and goes on."""
        bad = submit.items[len(items)]
        refused = [Refusal(bad.client_id, error.code, error.detail, error.retryable, error.retry_after_ms)]
        self._count_refusals(error.code, 1)
        refused += self._not_reached(submit.items[len(items) + 1 :])
        return _Work(submit, self._frame(submit, items) if items else None, refused)

    def _not_reached(self, items: Sequence[SendItem]) -> list[Refusal]:
        if items:
            self._count_refusals("not_reached", len(items))
        return [Refusal(item.client_id, "not_reached", _NOT_REACHED, True) for item in items]

    def _count_refusals(self, code: str, count: int) -> None:
        self._flows.refused[code] = self._flows.refused.get(code, 0) + count

    # ------------------------------------------------------------------------------------------ 1 append

    async def _append(self, work: list[_Work]) -> None:
        """One transaction. A store that stays away: every sender is refused, retryable."""
        wanted = [one for one in work if one.frame is not None]
        if not wanted:
            return
        results = await self._append_patiently([one.frame for one in wanted if one.frame is not None])
        if results is None:
            detail = f"the store did not answer for {self._limits.store_patience_ms:,} ms"
            retry_ms = self._limits.unavailable_retry_ms
            for one in wanted:
                count = len(one.submit.items) - len(one.refused)
                self._count_refusals("unavailable", count)
                one.refused[:0] = [
                    Refusal(item.client_id, "unavailable", detail, True, retry_ms)
                    for item in one.submit.items[:count]
                ]
            return
        self._flows.batches += 1
        for one, result in zip(wanted, results, strict=True):
            one.result = result
            if result.items[-1].status not in (_STORED, _REPEATED):
                one.refused[:0] = self._refusals(one.submit, result)

    async def _append_patiently(self, frames: list[AppendFrame]) -> list[AppendedFrame] | None:
        """None: the store has been away for longer than store_patience_ms, counted over all batches."""
        tried = 0
        while True:
            try:
                with observe.APPEND_SECONDS.time():
                    results = await self._store.append(frames, self._clock.wall_ms())
            except StoreUnavailable as error:
                if not error.temporary:
                    raise
                self._flows.store_failures += 1
            else:
                self._down_since_mono_ms = None
                observe.STORE_BATCH.observe(len(frames))
                return results
            mono_ms = self._clock.mono_ms()
            if self._down_since_mono_ms is None:
                self._down_since_mono_ms = mono_ms
            if mono_ms - self._down_since_mono_ms >= self._limits.store_patience_ms:
                return None
            tried += 1
            await self._patience.back_off(tried)

    def _refusals(self, submit: Submit, result: AppendedFrame) -> list[Refusal]:
        refused = []
        for item, appended in zip(submit.items, result.items, strict=False):
            if appended.status in (_STORED, _REPEATED):
                continue
            if appended.status is AppendStatus.NOT_REACHED:
                refused += self._not_reached([item])
                continue
            code, detail = _CODES[appended.status]
            self._count_refusals(code, 1)
            refused.append(Refusal(item.client_id, code, detail, False))
        return refused

    # ------------------------------------------------------------------------------------------- 2 route

    async def _route(self, work: list[_Work]) -> None:
        batch: list[Routable] = []
        repeated: list[_Work] = []
        users: set[str] = set()
        newest = 0
        for one in work:
            result = one.result
            if result is None:
                continue
            messages = _stored_messages(one.submit, result)
            if messages:
                batch.append(Routable(one.submit, result.members, messages, self._may_push(messages)))
                users.update(result.members)
                newest = max(newest, messages[-1].msg_id)
                self._flows.stored += len(messages)
            if len(messages) < len(result.items):
                repeated.append(one)
        asked_mono_ms = self._clock.mono_ms()
        located = await self._router.locate(users) if batch else {}
        now_ms = self._clock.wall_ms()
        plan = route(batch, located, now_ms, self._router.hold_push_until_ms, self._limits)
        self._flows.created += plan.obligations
        self._flows.expired_early += plan.expired
        for one in repeated:
            self._ask_again(plan, one, now_ms)
        topics = await self._router.deliver(plan, asked_mono_ms)
        await self._make_durable(plan, now_ms)
        if newest:
            self._mark.routed(newest, topics)

    def _may_push(self, messages: list[Message]) -> bool:
        for message in messages:  # noqa: SIM110 - any() costs a generator, once per message
            if message.kind in self._ringing and not message.flags & _NO_PUSH:
                return True
        return False

    def _ask_again(self, plan: Plan, one: _Work, now_ms: int) -> None:
        """W2: the first time may have ended between append and routing, or long ago; the store knows."""
        assert one.result is not None
        seqs = [appended.seq for appended in one.result.items if appended.status is _REPEATED]
        self._flows.repeated += len(seqs)
        if not seqs:
            return
        for user in one.result.members:
            if user != one.submit.sender:
                due_at_ms = now_ms + self._limits.first_due_ms
                plan.ask_due(user, one.submit.conv, min(seqs), due_at_ms)

    async def _make_durable(self, plan: Plan, now_ms: int) -> None:
        if plan.due:
            due = tuple(plan.due.values())
            self._flows.due_requests += len(due)
            flush = Flush((), due, self._holder, now_ms)
            await self._patience.persist(self._store.flush, flush)
        if plan.parks:
            parks = self._router.parks(plan, now_ms)
            parked = await self._patience.persist(self._store.park, parks, now_ms)
            self._flows.parked += sum(parked)
            await self._router.nudge_arrived(
                [(park.user, park.conv, 0) for park, done in zip(parks, parked, strict=True) if done]
            )

    # --------------------------------------------------------------------------------------- read marks

    async def _tell(self, notices: list[ReadNotice]) -> None:
        """READ_MARKs are hints (the mark itself is stored): where presence is away, nobody is told."""
        audience = [_audience(notice) for notice in notices]
        located = await self._router.locate({user for users in audience for user in users})
        if located is None:
            return
        records = []
        for notice, users in zip(notices, audience, strict=True):
            records += _marks(notice, users, located)
        self._flows.marks += len(records)
        await self._router.publish(records)


def _reply(one: _Work) -> Outgoing:
    submit, result = one.submit, one.result
    sent: list[SentItem] = []
    epoch = 0
    if result is not None:
        epoch = result.epoch
        for item, appended in zip(submit.items, result.items, strict=False):
            if appended.seq:
                sent.append(SentItem(item.client_id, appended.msg_id, appended.seq, appended.ts_ms))
    reply = Reply(submit.session, submit.sender, submit.conv, epoch, sent, one.refused)
    return Outgoing(submit.reply_to, submit.session, reply)


def _stored_messages(submit: Submit, result: AppendedFrame) -> list[Message]:
    """The messages that this append made; repeated ones were routed by their first."""
    return [
        Message(
            submit.conv, appended.seq, appended.msg_id, appended.cseq, result.epoch, submit.sender,
            item.client_id, item.kind, item.flags, appended.ts_ms, appended.loss_time_ms, item.body,
            tuple(item.mentions),
        )
        for item, appended in zip(submit.items, result.items, strict=False)
        if appended.status is _STORED
    ]  # fmt: skip


def _audience(notice: ReadNotice) -> tuple[str, ...]:
    """The user himself, and in a 1:1 conversation his peer unless the mark is private."""
    if notice.private or not notice.conv.startswith("p:"):
        return (notice.user,)
    first, second = _parsed(notice.conv).members or ("", "")
    return (notice.user, second if notice.user == first else first)


def _marks(notice: ReadNotice, users: Sequence[str], located: dict[str, Location]) -> list[Outgoing]:
    by_node: dict[tuple[str, int], list[str]] = {}
    for user in users:
        attachments = located.get(user, NOWHERE).attachments
        for where in nodes_of(tuple(a for a in attachments if a.session != notice.session)):
            by_node.setdefault(where, []).append(user)
    return [
        Outgoing(
            inbox_topic(*where), notice.conv,
            Mark(notice.conv, notice.user, notice.seq, to_users, notice.session),
        )
        for where, to_users in by_node.items()
    ]  # fmt: skip
