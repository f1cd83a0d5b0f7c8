"""fastim.api.ingress: a caller waits for his Reply on the memory bus; dispatch is this test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fastim.api.ingress import Ingress
from fastim.bus.base import DISPATCH_GROUP, NODE_GROUP, SUBMIT, Outgoing, Reader, inbox_topic
from fastim.bus.memory import MemoryBus
from fastim.bus.records import Nudge, Refusal, Reply, Submit, decode_submit, encode
from fastim.errors import PeerError
from fastim.protocol import SendItem, SentItem

ITEM = SendItem(b"c" * 16, 1, b"hello")
INBOX = inbox_topic("api", 7)


class World:
    def __init__(self, bus: MemoryBus, ingress: Ingress, submits: Reader) -> None:
        self.bus = bus
        self.ingress = ingress
        self.submits = submits
        self.fatal: list[BaseException] = []

    async def next_submit(self) -> Submit:
        (record,) = await self.submits.read(1)
        self.submits.settle(record)
        submit = decode_submit(record.value)
        assert isinstance(submit, Submit)
        return submit

    async def reply(self, submit: Submit, *refused: Refusal) -> None:
        sent = [] if refused else [SentItem(submit.items[0].client_id, 70, 3, 1_000)]
        reply = Reply(submit.session, submit.sender, submit.conv, 1, sent, list(refused))
        await self.bus.publish([Outgoing(submit.reply_to, submit.session, encode(reply))])


@asynccontextmanager
async def world(
    *, reply_timeout_ms: int = 5_000, max_waiting: int = 10, bound: int = 0, durable: bool = False
) -> AsyncIterator[World]:
    bus = MemoryBus(bound=bound)
    await bus.ensure(SUBMIT)
    fatal: list[BaseException] = []
    ingress = Ingress(
        bus, 7, durable=durable, reply_timeout_ms=reply_timeout_ms, max_waiting=max_waiting,
        on_fatal=fatal.append,
    )  # fmt: skip
    await ingress.start()
    here = World(bus, ingress, bus.reader(SUBMIT, DISPATCH_GROUP, max_unsettled=100))
    here.fatal = fatal
    try:
        yield here
    finally:
        await ingress.stop()
        await here.submits.close()
    assert not fatal


def ask(here: World, conv: str = "p:a:b") -> asyncio.Task[SentItem | None]:
    return asyncio.create_task(here.ingress.submit(conv, "a", ITEM, service=True))


async def refused(task: asyncio.Task[SentItem | None]) -> PeerError:
    with pytest.raises(PeerError) as caught:
        await task
    return caught.value


async def until_settled(bus: MemoryBus) -> None:
    for _ in range(1_000):
        if bus.committed(INBOX, NODE_GROUP) == bus.published(INBOX):
            return
        await asyncio.sleep(0)
    raise AssertionError("a Reply was not settled")


async def test_caller_gets_what_dispatch_stored() -> None:
    async with world() as here:
        task = ask(here)
        submit = await here.next_submit()
        assert (submit.conv, submit.sender, submit.device, submit.service) == ("p:a:b", "a", "", True)
        assert submit.items == [ITEM]
        await here.reply(submit)
        assert await task == SentItem(ITEM.client_id, 70, 3, 1_000)
        assert here.ingress.waiting == 0
        await until_settled(here.bus)


async def test_refusal_reaches_the_caller_with_its_fields() -> None:
    async with world() as here:
        task = ask(here)
        submit = await here.next_submit()
        await here.reply(submit, Refusal(ITEM.client_id, "unavailable", "the store is away", True, 2_000))
        error = await refused(task)
        assert (error.code, error.detail, error.retryable) == ("unavailable", "the store is away", True)
        assert error.retry_after_ms == 2_000


async def test_answers_go_to_whom_they_belong_whatever_their_order() -> None:
    async with world() as here:
        tasks = {f"p:a:{n}": ask(here, f"p:a:{n}") for n in range(5)}
        submits = [await here.next_submit() for _ in range(5)]
        assert len({submit.session for submit in submits}) == 5
        for submit in reversed(submits):
            await here.reply(submit, Refusal(ITEM.client_id, "expired", submit.conv, False))
        for conv, task in tasks.items():
            assert (await refused(task)).detail == conv


async def test_answer_that_does_not_come_is_retryable_and_a_late_one_is_settled() -> None:
    async with world(reply_timeout_ms=10) as here:
        error = await refused(ask(here))
        assert (error.code, error.retryable) == ("unavailable", True)
        assert "10 ms" in error.detail
        assert "same client_id" in error.detail
        assert here.ingress.waiting == 0
        await here.reply(await here.next_submit())
        await until_settled(here.bus)


async def test_one_more_than_may_wait_is_refused_before_it_publishes() -> None:
    async with world(max_waiting=2) as here:
        waiting = [ask(here), ask(here)]
        await asyncio.sleep(0)
        error = await refused(ask(here))
        assert (error.code, error.retryable) == ("unavailable", True)
        assert "2 messages wait" in error.detail
        assert here.bus.published(SUBMIT) == 2
        for _ in waiting:
            await here.reply(await here.next_submit())
        await asyncio.gather(*waiting)


async def test_full_bus_is_retryable() -> None:
    async with world(bound=1) as here:
        first = ask(here)
        await asyncio.sleep(0)
        error = await refused(ask(here))
        assert (error.code, error.retryable) == ("unavailable", True)
        assert "limit 1" in error.detail
        await here.reply(await here.next_submit())
        await first


async def test_stop_tells_those_who_wait_to_repeat() -> None:
    async with world() as here:
        task = ask(here)
        await here.next_submit()
        await here.ingress.stop()
        assert (await refused(task)).retryable
        assert (await refused(ask(here))).retryable


async def test_record_that_is_no_reply_is_settled_and_harms_nobody() -> None:
    async with world() as here:
        await here.bus.publish(
            [Outgoing(INBOX, "x", b"\xc1"), Outgoing(INBOX, "x", encode(Nudge("u", "g:1", 1)))]
        )
        await until_settled(here.bus)
        task = ask(here)
        await here.reply(await here.next_submit())
        assert (await task).seq == 3


async def test_cancelled_caller_leaves_nothing_behind() -> None:
    async with world() as here:
        task = ask(here)
        submit = await here.next_submit()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert here.ingress.waiting == 0
        await here.reply(submit)
        await until_settled(here.bus)


async def test_inbox_that_ends_by_itself_is_fatal() -> None:
    bus = MemoryBus()
    await bus.ensure(SUBMIT)
    fatal: list[BaseException] = []
    ingress = Ingress(bus, 7, reply_timeout_ms=1_000, max_waiting=1, on_fatal=fatal.append)
    await ingress.start()
    await bus.delete(INBOX)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(fatal) == 1
    await ingress.stop()


async def test_on_a_durable_bus_a_late_answer_means_taken() -> None:
    async with world(reply_timeout_ms=20, durable=True) as here:
        task = ask(here)
        await here.next_submit()
        assert await task is None
        assert here.ingress.waiting == 0


async def test_on_a_durable_bus_who_waits_at_the_stop_was_taken() -> None:
    async with world(durable=True) as here:
        task = ask(here)
        await here.next_submit()
        await here.ingress.stop()
        assert await task is None


async def test_a_durable_bus_that_did_not_take_it_says_so() -> None:
    async with world(durable=True) as here:
        await here.bus.delete(SUBMIT)
        error = await refused(ask(here))
        assert (error.code, error.retryable) == ("unavailable", True)
