"""What every MessageStore must keep (promises S1-S13 of fastim.store.base).

A backend's test module inherits StoreContract and gives `open()`, `reopen()`, and two hooks for what no call
of the port can do yet: `set_membership` and `recall`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from fastim.errors import PeerError, StoreUnavailable
from fastim.model import EPOCH_MS, MAX_SAFE_INT, Fate, Flag, Kind, Message, SkipReason
from fastim.store.base import (
    Appended,
    AppendedFrame,
    AppendFrame,
    AppendItem,
    AppendStatus,
    DueFiring,
    DueRequest,
    Flush,
    Gap,
    Leveled,
    MessageStore,
    ObligationState,
    OpenBoot,
    Park,
    PushRow,
    Settled,
    shard_of,
)

NOW = 1_790_000_000_000
DAY_MS = 86_400_000
CONV = "p:alice:bob"
TEAM = "g:team"
EVERYBODY = ("alice", "bob", "carol", "dave")


def text(
    number: int,
    body: bytes = b"hi",
    *,
    loss: int = 0,
    ttl: int = 0,
    flags: int = 0,
    kind: int = Kind.TEXT,
    countable: bool = True,
    mentions: tuple[str, ...] = (),
) -> AppendItem:
    return AppendItem(number.to_bytes(16, "big"), kind, body, loss, flags, mentions, ttl, countable)


async def send(
    store: MessageStore, conv: str, sender: str, *items: AppendItem, now: int = NOW, read: int = 0
) -> list[Appended]:
    """One frame; its results."""
    (result,) = await store.append([AppendFrame(conv, sender, items, read)], now)
    return list(result.items)


async def fill(store: MessageStore, count: int, conv: str = CONV, sender: str = "alice") -> None:
    """`count` messages with client_ids 1, 2, 3 ..."""
    results = await send(store, conv, sender, *(text(number) for number in range(1, count + 1)))
    assert [result.status for result in results] == [AppendStatus.STORED] * count


def acked(
    user: str,
    from_seq: int,
    to_seq: int,
    *,
    conv: str = CONV,
    device: str = "phone",
    fate: Fate = Fate.ACKED,
    own: bool = False,
) -> Settled:
    return Settled(user, device, conv, from_seq, to_seq, fate, own)


async def flush(
    store: MessageStore, *settled: Settled, due: Sequence[DueRequest] = (), now: int = NOW
) -> list[tuple[str, str, int]]:
    """(user, device, cursor) of each gap."""
    result = await store.flush(Flush(settled, tuple(due), "n1", now))
    return [(user, device, where.cursor) for user, device, where in result.gaps]


async def cursor(store: MessageStore, user: str, conv: str = CONV, device: str = "phone") -> int:
    return (await store.position(user, device, conv)).cursor


async def states(store: MessageStore, now: int = NOW) -> dict[tuple[str, int, str], ObligationState]:
    """(conv, seq, user) -> state, of all obligations."""
    found, after = {}, 0
    while True:
        page, after = await store.obligations(after, 3, now)
        for one in page:
            key = (one.conv, one.seq, one.user)
            assert key not in found
            found[key] = one.state
        if not after:
            return found


async def state_names(store: MessageStore, now: int = NOW) -> list[str]:
    """The states of all obligations in append order."""
    return [state.name for state in (await states(store, now)).values()]


def seqs(entries: Sequence[Message | Gap]) -> list[int | tuple[int, int, int]]:
    """Messages as their seq, gaps as (from, to, reason)."""
    return [
        entry.seq if isinstance(entry, Message) else (entry.from_seq, entry.to_seq, entry.reason)
        for entry in entries
    ]


async def streamed(
    store: MessageStore, user: str, after: int = 0, conv: str = CONV, now: int = NOW, limit: int = 100
) -> list[int | tuple[int, int, int]]:
    page = await store.stream(user, conv, after, now, limit=limit, max_bytes=1 << 20)
    return seqs(page.entries)


def due(user: str, from_seq: int, at: int, *, conv: str = CONV, urgent: bool = False) -> DueRequest:
    return DueRequest(user, conv, from_seq, at, urgent)


def park(
    user: str,
    from_seq: int = 1,
    to_seq: int = MAX_SAFE_INT,
    *,
    conv: str = CONV,
    push: bool = True,
    at: int = NOW,
) -> Park:
    return Park(user, conv, from_seq, to_seq, push, at, 10_000)


class StoreContract:
    """Inherit, and give the four methods below."""

    async def open(self) -> MessageStore:
        raise NotImplementedError

    async def reopen(self, store: MessageStore) -> MessageStore:
        """Close it and open what it left."""
        raise NotImplementedError

    async def set_membership(self, store: MessageStore, conv: str, user: str, join: int, leave: int) -> None:
        raise NotImplementedError

    async def recall(self, store: MessageStore, msg_id: int) -> None:
        raise NotImplementedError

    @asynccontextmanager
    async def opened(self, *users: str, group: Sequence[str] = ()) -> AsyncIterator[MessageStore]:
        """A store that knows `users` (default: everybody), with a group of `group` if given."""
        store = await self.open()
        try:
            for user in users or EVERYBODY:
                await store.register_device(user, "phone", "app", NOW)
            if group:
                assert await store.create_group("team", group[0], list(group), NOW) == 1
            yield store
        finally:
            await store.close()

    # --------------------------------------------------------------------------------------- S1: ids and seqs

    async def test_s1_seqs_are_contiguous_per_conversation(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await fill(store, 5)
            await fill(store, 3, TEAM, "carol")
            results = await send(store, CONV, "bob", text(1), text(2))
            assert [result.seq for result in results] == [6, 7]
            assert [m.seq for m in await store.scan(0, 100) if m.conv == TEAM] == [1, 2, 3, 4]

    async def test_s1_holds_under_concurrent_appends(self) -> None:
        async with self.opened() as store:
            convs = [CONV, "p:alice:carol", "p:bob:carol"]
            numbers = itertools.count(1)

            async def one(conv: str, sender: str) -> None:
                for _ in range(20):
                    await send(store, conv, sender, text(next(numbers)), text(next(numbers)))

            await asyncio.gather(*(one(conv, user) for conv in convs for user in conv[2:].split(":")))
            for conv in convs:
                found = [m for m in await store.scan(0, 1_000) if m.conv == conv]
                assert [m.seq for m in found] == list(range(1, 81))
                assert [m.cseq for m in found] == list(range(1, 81))

    async def test_s1_a_batch_may_append_to_one_conversation_several_times(self) -> None:
        async with self.opened() as store:
            frames = [AppendFrame(CONV, user, (text(n),)) for n, user in enumerate(("alice", "bob", "alice"))]
            results = await store.append(frames, NOW)
            assert [result.items[0].seq for result in results] == [1, 2, 3]

    async def test_s1_seqs_and_ids_go_on_after_a_restart(self) -> None:
        store = await self.open()
        await store.register_device("bob", "phone", "app", NOW)
        before = await send(store, CONV, "alice", text(1), text(2))
        store = await self.reopen(store)
        after = await send(store, CONV, "alice", text(3), now=NOW - DAY_MS)
        assert [result.seq for result in after] == [3]
        assert after[0].msg_id > before[-1].msg_id
        await store.close()

    async def test_s1_ids_grow_whatever_the_clock_does(self) -> None:
        async with self.opened() as store:
            ids = []
            for number, now in enumerate((NOW, NOW - 3_600_000, NOW + 10 * 365 * DAY_MS, 0, NOW, NOW + 1)):
                items = [text(number * 100 + extra) for extra in range(70)]
                ids += [result.msg_id for result in await send(store, CONV, "alice", *items, now=now)]
            assert ids == sorted(set(ids))
            assert ids[-1] <= MAX_SAFE_INT

    async def test_s1_an_id_holds_the_time_and_stays_below_2_53(self) -> None:
        async with self.opened() as store:
            (result,) = await send(store, CONV, "alice", text(1))
            assert (result.msg_id >> 12) + EPOCH_MS == NOW
            assert 0 < result.msg_id <= MAX_SAFE_INT

    async def test_s1_a_clock_beyond_all_ids_stores_nothing_and_does_no_harm(self) -> None:
        async with self.opened() as store:
            with pytest.raises(StoreUnavailable):
                await send(store, CONV, "alice", text(1), now=EPOCH_MS + (1 << 41))
            (result,) = await send(store, CONV, "alice", text(1))
            assert (result.status, result.seq) == (AppendStatus.STORED, 1)

    # ---------------------------------------------------------------------------------------- S2: idempotency

    async def test_s2_the_same_send_gets_the_first_result_again(self) -> None:
        async with self.opened() as store:
            (first,) = await send(store, CONV, "alice", text(1, ttl=1_000))
            (again,) = await send(store, CONV, "alice", text(1, ttl=9_999), now=NOW + 7 * DAY_MS, read=1)
            assert again.status == AppendStatus.REPEATED
            assert (again.msg_id, again.seq, again.cseq, again.ts_ms, again.loss_time_ms) == (
                first.msg_id, 1, 1, NOW, NOW + 1_000,
            )  # fmt: skip
            assert len(await store.scan(0, 10)) == 1

    async def test_s2_holds_across_a_restart(self) -> None:
        store = await self.open()
        await store.register_device("bob", "phone", "app", NOW)
        (first,) = await send(store, CONV, "alice", text(1))
        store = await self.reopen(store)
        (again,) = await send(store, CONV, "alice", text(1))
        assert (again.status, again.msg_id) == (AppendStatus.REPEATED, first.msg_id)
        await store.close()

    @pytest.mark.parametrize(
        "other",
        [
            text(1, b"other"),
            text(1, kind=Kind.CARD),
            text(1, loss=NOW + 1),
            text(1, flags=Flag.NO_PUSH),
            text(1, mentions=("bob",)),
        ],
    )
    async def test_s2_other_content_under_a_known_client_id_is_a_conflict(self, other: AppendItem) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            (result,) = await send(store, CONV, "alice", other)
            assert result == Appended(AppendStatus.CONFLICT)
            assert [m.body for m in await store.scan(0, 10)] == [b"hi"]

    async def test_s2_a_client_id_is_the_senders_own_and_the_conversations(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            (other_sender,) = await send(store, CONV, "bob", text(1, b"x"))
            (other_conv,) = await send(store, "p:alice:carol", "alice", text(1, b"y"))
            assert (other_sender.status, other_conv.status) == (AppendStatus.STORED, AppendStatus.STORED)

    async def test_s2_a_repeat_inside_one_batch_is_seen(self) -> None:
        async with self.opened() as store:
            frames = [AppendFrame(CONV, "alice", (text(1), text(1), text(2)))] * 2
            first, second = await store.append(frames, NOW)
            assert [(item.status.name, item.seq) for item in first.items] == [
                ("STORED", 1), ("REPEATED", 1), ("STORED", 2),
            ]  # fmt: skip
            assert [(item.status.name, item.seq) for item in second.items] == [
                ("REPEATED", 1), ("REPEATED", 1), ("REPEATED", 2),
            ]  # fmt: skip

    async def test_s2_repeats_and_new_ones_mix_in_a_batch(self) -> None:
        async with self.opened() as store:
            await fill(store, 2)
            frames = [
                AppendFrame("p:alice:carol", "alice", (text(7), text(8))),
                AppendFrame(CONV, "alice", (text(1), text(3), text(2))),
                AppendFrame(CONV, "bob", (text(9),)),
            ]
            results = await store.append(frames, NOW)
            assert [[(item.status.name, item.seq) for item in result.items] for result in results] == [
                [("STORED", 1), ("STORED", 2)],
                [("REPEATED", 1), ("STORED", 3), ("REPEATED", 2)],
                [("STORED", 4)],
            ]

    # -------------------------------------------------------------------------------- S2: prefix and refusals

    async def test_s2_a_conflict_stores_the_prefix(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(2))
            results = await send(store, CONV, "alice", text(1), text(2, b"other"), text(3))
            assert [(r.status.name, r.seq) for r in results] == [
                ("STORED", 2), ("CONFLICT", 0), ("NOT_REACHED", 0),
            ]  # fmt: skip

    async def test_s2_expiry_is_decided_after_the_look_up(self) -> None:
        async with self.opened() as store:
            (first,) = await send(store, CONV, "alice", text(1, loss=NOW + 10))
            late = NOW + 11
            results = await send(
                store, CONV, "alice", text(1, loss=NOW + 10), text(2, loss=NOW + 10), now=late
            )
            assert [(r.status.name, r.msg_id) for r in results] == [
                ("REPEATED", first.msg_id),
                ("EXPIRED", 0),
            ]
            assert len(await store.scan(0, 10)) == 1

    async def test_s2_a_message_may_come_in_the_last_millisecond_of_its_life(self) -> None:
        async with self.opened() as store:
            results = await send(store, CONV, "alice", text(1, loss=NOW), text(2, loss=NOW - 1), text(3))
            assert [r.status.name for r in results] == ["STORED", "EXPIRED", "NOT_REACHED"]

    async def test_s2_a_time_to_live_becomes_a_deadline_once(self) -> None:
        async with self.opened() as store:
            results = await send(
                store, CONV, "alice", text(1, ttl=500), text(2, loss=NOW + 9, ttl=500), text(3)
            )
            assert [r.loss_time_ms for r in results] == [NOW + 500, NOW + 9, 0]

    @pytest.mark.parametrize(
        ("conv", "sender", "status"),
        [
            ("p:alice:bob", "mallory", AppendStatus.NOT_MEMBER),
            ("p:alice:ghost", "alice", AppendStatus.UNKNOWN_USER),
            ("g:nowhere", "alice", AppendStatus.UNKNOWN_GROUP),
            (TEAM, "dave", AppendStatus.NOT_MEMBER),
            ("s:ghost", "billing", AppendStatus.UNKNOWN_USER),
        ],
    )
    async def test_s2_who_may_not_send_is_refused(self, conv: str, sender: str, status: AppendStatus) -> None:
        async with self.opened(group=("alice", "bob")) as store:
            results = await send(store, conv, sender, text(1), text(2))
            assert results == [Appended(status), Appended(AppendStatus.NOT_REACHED)]
            assert [m.kind for m in await store.scan(0, 10)] == [Kind.MEMBER]

    async def test_s2_a_refused_frame_leaves_the_rest_of_the_batch_alone(self) -> None:
        async with self.opened() as store:
            frames = [
                AppendFrame(CONV, "alice", (text(1),)),
                AppendFrame("g:nowhere", "alice", (text(2),)),
                AppendFrame(CONV, "alice", (text(3),)),
            ]
            results = await store.append(frames, NOW)
            assert [result.items[0].seq for result in results] == [1, 0, 2]

    async def test_s2_a_service_reaches_whom_nobody_has_seen(self) -> None:
        async with self.opened() as store:
            frames = [
                AppendFrame(conv, "billing", (text(1),), 0, False) for conv in ("s:zoe", "p:billing:yan")
            ]
            results = await store.append(frames, NOW)
            assert [(result.items[0].seq, result.members) for result in results] == [
                (1, ("zoe",)), (1, ("billing", "yan")),
            ]  # fmt: skip

    async def test_s2_a_known_send_is_answered_even_to_a_recipient_who_is_unknown(self) -> None:
        async with self.opened() as store:
            await store.append([AppendFrame("p:alice:yan", "alice", (text(1),), 0, False)], NOW)
            results = await send(store, "p:alice:yan", "alice", text(1), text(2))
            assert [r.status.name for r in results] == ["REPEATED", "UNKNOWN_USER"]

    async def test_s2_a_recipient_is_known_from_the_first_device_on(self) -> None:
        async with self.opened() as store:
            assert (await send(store, "p:alice:zoe", "alice", text(1)))[0].status == AppendStatus.UNKNOWN_USER
            await store.register_device("zoe", "pad", "pad", NOW)
            assert (await send(store, "p:alice:zoe", "alice", text(1)))[0].status == AppendStatus.STORED

    async def test_append_says_who_the_members_are(self) -> None:
        async with self.opened(group=("carol", "alice", "bob")) as store:
            result: list[AppendedFrame] = await store.append(
                [AppendFrame(TEAM, "bob", (text(1),)), AppendFrame(CONV, "bob", (text(2),))], NOW
            )
            assert [(r.conv, r.members) for r in result] == [
                (TEAM, ("carol", "alice", "bob")), (CONV, ("alice", "bob")),
            ]  # fmt: skip

    async def test_only_countable_messages_count(self) -> None:
        async with self.opened() as store:
            results = await send(store, CONV, "alice", text(1), text(2, countable=False), text(3))
            assert [r.cseq for r in results] == [1, 1, 2]

    # ----------------------------------------------------------------------------------------- S3: durability

    async def test_s3_everything_is_there_after_a_restart(self) -> None:
        store = await self.open()
        for user in EVERYBODY:
            await store.register_device(user, "phone", "app", NOW)
        await store.create_group("team", "alice", ["bob"], NOW)
        await fill(store, 4)
        await flush(store, acked("bob", 1, 2), due=[due("bob", 3, NOW + 1_000)])
        await store.read("bob", CONV, 2, NOW)
        await store.settle((await store.scan(0, 10))[2].msg_id)
        assert await store.next_boot("n1") == 1
        assert await store.fence("n0", 7, "d", NOW, 1_000)
        await store.open_boot("n0", 7)

        async def everything() -> list[object]:
            return [
                await store.scan(0, 10), await states(store), await store.settled_mark(),
                await store.next_due_ms(), await store.unread("bob"), await store.version("bob"),
                await store.conversations("bob", "phone", 0, 10, NOW),
                await store.members(TEAM), await store.devices("bob"),
            ]  # fmt: skip

        before = await everything()
        store = await self.reopen(store)
        assert await everything() == before
        assert await store.next_boot("n1") == 2
        assert await store.fenced("n0", 7)
        assert await store.open_boots() == [OpenBoot("n0", 7, True)]
        await store.close()

    async def test_a_closed_store_says_so(self) -> None:
        store = await self.open()
        await store.close()
        await store.close()
        for call in (
            store.append([], NOW),
            store.head_msg_id(),
            store.next_due_ms(),
            store.next_push_ms(),
            store.flush(Flush((), (), "n1", NOW)),
        ):
            with pytest.raises(StoreUnavailable) as raised:
                await call
            assert not raised.value.temporary

    # --------------------------------------------------------------------------------------------- S4: paging

    async def test_s4_pages_backwards_neither_repeat_nor_hide_while_messages_come(self) -> None:
        async with self.opened() as store:
            await fill(store, 25)
            found: list[int] = []
            before, more, number = 0, True, 1_000
            while more:
                page, more = await store.history(
                    "bob", CONV, before_seq=before, after_seq=0, from_ms=0, to_ms=0, limit=4, now_ms=NOW
                )
                found[:0] = [m.seq for m in page]
                before = page[0].seq
                number += 1
                await send(store, CONV, "alice", text(number))
            assert found == list(range(1, 26))

    async def test_s4_pages_forwards_reach_what_came_meanwhile(self) -> None:
        async with self.opened() as store:
            await fill(store, 10)
            found: list[int] = []
            after, more = 0, True
            while more:
                page, more = await store.history(
                    "bob",
                    CONV,
                    before_seq=0,
                    after_seq=max(after, 1),
                    from_ms=0,
                    to_ms=0,
                    limit=3,
                    now_ms=NOW,
                )
                found += [m.seq for m in page]
                after = page[-1].seq
                if after == 4:
                    await send(store, CONV, "alice", text(99))
            assert found == list(range(2, 12))

    async def test_s4_a_page_between_two_moments(self) -> None:
        async with self.opened() as store:
            for number in range(1, 7):
                await send(store, CONV, "alice", text(number), now=NOW + number * 10)
            page, more = await store.history(
                "bob", CONV, before_seq=0, after_seq=0, from_ms=NOW + 20, to_ms=NOW + 40, limit=10, now_ms=NOW
            )
            assert ([m.seq for m in page], more) == ([2, 3, 4], False)
            page, more = await store.history(
                "bob", CONV, before_seq=0, after_seq=0, from_ms=NOW + 20, to_ms=0, limit=2, now_ms=NOW
            )
            assert ([m.seq for m in page], more) == ([5, 6], True)

    async def test_s4_a_time_range_is_right_whatever_the_clock_did(self) -> None:
        rng = random.Random(4)
        async with self.opened() as store:
            sent: list[tuple[int, int]] = []
            now = NOW
            for number in range(60):
                now += rng.choice((1, 5, 400, -300, 3_600_000, -3_600_000))
                (result,) = await send(store, CONV, "alice", text(number), now=now)
                sent.append((result.seq, now))
            for _ in range(60):
                low, high = sorted(rng.choices([at for _, at in sent], k=2))
                page, _ = await store.history(
                    "bob", CONV, before_seq=0, after_seq=0, from_ms=low, to_ms=high, limit=99, now_ms=now
                )
                assert [m.seq for m in page] == [seq for seq, at in sent if low <= at <= high]

    async def test_s4_the_expired_and_the_recalled_are_left_out(self) -> None:
        async with self.opened() as store:
            results = await send(store, CONV, "alice", text(1), text(2, loss=NOW + 5), text(3), text(4))
            await self.recall(store, results[2].msg_id)
            page, more = await store.history(
                "bob", CONV, before_seq=0, after_seq=0, from_ms=0, to_ms=0, limit=2, now_ms=NOW + 6
            )
            assert ([m.seq for m in page], more) == ([1, 4], False)

    async def test_s4_a_stranger_learns_nothing(self) -> None:
        async with self.opened(group=("alice", "bob")) as store:
            await fill(store, 1)
            told = []
            for conv in (CONV, TEAM, "g:nowhere", "s:alice"):
                calls = (
                    store.history(
                        "carol", conv, before_seq=0, after_seq=0, from_ms=0, to_ms=0, limit=1, now_ms=NOW
                    ),
                    store.stream("carol", conv, 0, NOW, limit=1, max_bytes=1),
                    store.position("carol", "phone", conv),
                    store.read("carol", conv, 1, NOW),
                )
                for call in calls:
                    with pytest.raises(PeerError) as raised:
                        await call
                    told.append((raised.value.code, raised.value.detail.replace(conv, "it")))
            assert len(set(told)) == 1
            assert told[0][0] == "forbidden"

    async def test_s4_ones_own_conversation_may_be_empty(self) -> None:
        async with self.opened() as store:
            page = await store.history(
                "bob", CONV, before_seq=0, after_seq=0, from_ms=0, to_ms=0, limit=5, now_ms=NOW
            )
            assert page == ([], False)
            assert (await store.stream("bob", CONV, 0, NOW, limit=5, max_bytes=100)).entries == ()
            assert await store.read("bob", CONV, 5, NOW) == (0, 0)
            assert (await store.position("bob", "phone", CONV)).head == 0

    # ---------------------------------------------------------------------------------- S5: marks and cursors

    async def test_s5_a_cursor_moves_only_over_what_is_contiguous(self) -> None:
        async with self.opened() as store:
            await fill(store, 6)
            assert await flush(store, acked("bob", 1, 2)) == []
            assert await flush(store, acked("bob", 4, 5)) == [("bob", "phone", 2)]
            assert await cursor(store, "bob") == 2
            assert await flush(store, acked("bob", 2, 4)) == []
            assert await cursor(store, "bob") == 4

    async def test_s5_acks_out_of_order_in_one_flush_leave_no_gap(self) -> None:
        async with self.opened() as store:
            await fill(store, 4)
            assert await flush(store, acked("bob", 3, 3), acked("bob", 2, 2), acked("bob", 1, 1)) == []
            assert await cursor(store, "bob") == 3

    async def test_s5_a_gap_is_reported_once_per_device_with_where_it_stands(self) -> None:
        async with self.opened() as store:
            await fill(store, 6)
            await store.register_device("bob", "pad", "pad", NOW)
            result = await store.flush(
                Flush(
                    (acked("bob", 3, 3), acked("bob", 5, 5), acked("bob", 1, 1, device="pad")), (), "n1", NOW
                )
            )
            ((user, device, where),) = result.gaps
            assert (user, device, where.conv, where.cursor, where.head) == ("bob", "phone", CONV, 0, 6)
            assert await cursor(store, "bob", device="pad") == 1

    async def test_s5_a_cursor_never_goes_back(self) -> None:
        async with self.opened() as store:
            await fill(store, 5)
            await flush(store, acked("bob", 1, 4))
            await flush(store, acked("bob", 1, 1), acked("bob", 2, 3))
            assert await cursor(store, "bob") == 4

    async def test_s5_a_read_mark_never_goes_back_nor_beyond_the_head(self) -> None:
        async with self.opened() as store:
            await fill(store, 5)
            assert await store.read("bob", CONV, 3, NOW) == (3, 2)
            assert await store.read("bob", CONV, 1, NOW) == (3, 2)
            assert await store.read("bob", CONV, 99, NOW) == (5, 0)

    async def test_s5_a_new_device_starts_at_the_furthest_cursor_of_the_others(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await fill(store, 5)
            await fill(store, 2, TEAM)
            await store.register_device("bob", "pad", "pad", NOW)
            await flush(store, acked("bob", 1, 3), acked("bob", 1, 4, device="pad"))
            await flush(store, acked("bob", 1, 1, conv=TEAM))
            await store.register_device("bob", "web", "web", NOW)
            assert await cursor(store, "bob", device="web") == 4
            assert await cursor(store, "bob", TEAM, "web") == 1
            await store.register_device("bob", "phone", "app", NOW + 1)
            assert await cursor(store, "bob") == 3

    async def test_s5_a_device_remembers_the_newest_level_that_it_acknowledged(self) -> None:
        async with self.opened() as store:
            assert (await store.register_device("bob", "phone", "app", NOW)).level == 0
            for version in (7, 5):
                await store.flush(Flush((), (), "n1", NOW, (Leveled("bob", "phone", version),)))
            assert (await store.register_device("bob", "phone", "app", NOW)).level == 7
            assert {device.device: device.level for device in await store.devices("bob")}["phone"] == 7

    async def test_s5_the_first_device_of_a_user_gets_everything(self) -> None:
        async with self.opened("alice") as store:
            await store.append([AppendFrame("s:zoe", "billing", (text(1), text(2)), 0, False)], NOW)
            await store.register_device("zoe", "phone", "app", NOW)
            assert await streamed(store, "zoe", await cursor(store, "zoe", "s:zoe"), "s:zoe") == [1, 2]

    # --------------------------------------------------------------------------------------------- S6: unread

    async def test_s6_own_messages_are_not_unread(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1), text(2))
            await send(store, CONV, "bob", text(3))
            await send(store, CONV, "alice", text(4, countable=False), text(5))
            assert await store.unread("bob") == (3, [(CONV, 3)])
            assert await store.unread("alice") == (1, [(CONV, 1)])
            assert await store.read("bob", CONV, 2, NOW) == (2, 1)
            assert await store.read("bob", CONV, 4, NOW) == (4, 1)
            assert await store.recount("bob") == []

    async def test_s6_sending_moves_no_read_mark_but_read_seq_does(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1), text(2), text(3))
            await send(store, CONV, "bob", text(4))
            assert await store.unread("bob") == (3, [(CONV, 3)])
            await send(store, CONV, "bob", text(5), read=2)
            assert await store.unread("bob") == (1, [(CONV, 1)])
            await send(store, CONV, "bob", text(6), read=1)
            await send(store, CONV, "bob", text(6), read=99)
            assert await store.unread("bob") == (0, [])
            assert await store.recount("bob") == []

    async def test_s6_the_badge_is_the_sum_over_conversations(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await fill(store, 2)
            await fill(store, 3, TEAM, "carol")
            assert await store.unread("bob") == (5, [(TEAM, 3), (CONV, 2)])
            assert await store.unread("bob", TEAM) == (5, [(TEAM, 3)])
            await store.read("bob", TEAM, 99, NOW)
            assert await store.unread("bob") == (2, [(CONV, 2)])

    async def test_s6_a_recalled_message_is_not_unread(self) -> None:
        async with self.opened() as store:
            results = await send(store, CONV, "alice", text(1), text(2), text(3))
            await self.recall(store, results[1].msg_id)
            assert await store.unread("bob") == (2, [(CONV, 2)])
            assert await store.recount("bob") == []

    async def test_s6_what_came_before_a_member_joined_is_not_unread(self) -> None:
        async with self.opened(group=("alice", "bob")) as store:
            await fill(store, 5, TEAM)
            await self.set_membership(store, TEAM, "bob", 4, 0)
            assert await store.unread("bob") == (3, [(TEAM, 3)])
            assert await store.recount("bob") == []

    async def test_s6_unread_is_exact_whatever_happens(self) -> None:
        rng = random.Random(6)
        async with self.opened(group=("alice", "bob", "carol")) as store:
            for number in range(300):
                conv, members = rng.choice(((CONV, ("alice", "bob")), (TEAM, ("alice", "bob", "carol"))))
                sender = rng.choice(members)
                if rng.random() < 0.25:
                    await store.read(sender, conv, rng.randint(1, number + 1), NOW)
                else:
                    read = rng.choice((0, 0, rng.randint(0, number)))
                    await send(store, conv, sender, text(number, countable=rng.random() < 0.8), read=read)
                if number % 20 == 0:
                    for user in ("alice", "bob", "carol"):
                        assert await store.recount(user) == []

    # --------------------------------------------------------------------------------------------- S7: stream

    async def test_s7_stream_is_what_lies_above_the_position_oldest_first(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1), text(2))
            await send(store, CONV, "bob", text(3))
            assert await streamed(store, "bob") == [1, 2, 3]
            assert await streamed(store, "bob", 2) == [3]
            page = await store.stream("bob", CONV, 3, NOW, limit=9, max_bytes=9)
            assert (page.entries, page.to_seq, page.head) == ((), 3, 3)
            page = await store.stream("bob", CONV, 99, NOW, limit=9, max_bytes=9)
            assert (page.entries, page.to_seq, page.head) == ((), 3, 3)

    async def test_s7_a_streamed_message_is_whole(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            item = text(
                7, b"body", loss=NOW + 9, flags=Flag.SILENT, mentions=("bob", "carol"), countable=False
            )
            (stored,) = await send(store, TEAM, "alice", item)
            page = await store.stream("bob", TEAM, 1, NOW, limit=9, max_bytes=99)
            assert page.entries == (
                Message(
                    TEAM, 2, stored.msg_id, 0, page.epoch, "alice", item.client_id, Kind.TEXT, Flag.SILENT,
                    NOW, NOW + 9, b"body", ("bob", "carol"),
                ),
            )  # fmt: skip
            assert await store.find(msg_id=stored.msg_id) == page.entries[0]

    async def test_s7_pages_join_without_a_hole(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", *(text(n, loss=(NOW + 1) * (n % 3 == 0)) for n in range(1, 30)))
            after, covered = 0, []
            while True:
                page = await store.stream("bob", CONV, after, NOW + 2, limit=4, max_bytes=1 << 20)
                for entry in page.entries:
                    low, high = (
                        (entry.seq,) * 2 if isinstance(entry, Message) else (entry.from_seq, entry.to_seq)
                    )
                    assert isinstance(entry, Message) == (low % 3 != 0)
                    covered += list(range(low, high + 1))
                after = page.to_seq
                if after == page.head:
                    break
                assert page.entries
            assert covered == list(range(1, 30))

    async def test_s7_a_page_ends_before_it_grows_too_large_but_holds_one_message(self) -> None:
        async with self.opened() as store:
            await send(
                store, CONV, "alice", text(1, b"x" * 100), text(2, b"x" * 10), text(3, b"x" * 10), text(4)
            )
            page = await store.stream("bob", CONV, 0, NOW, limit=9, max_bytes=50)
            assert (seqs(page.entries), page.to_seq, page.head) == ([1], 1, 4)
            page = await store.stream("bob", CONV, 1, NOW, limit=9, max_bytes=20)
            assert seqs(page.entries) == [2, 3]

    async def test_s7_what_is_never_shown_is_skipped_in_runs(self) -> None:
        async with self.opened() as store:
            items = [text(n, loss=NOW + 1 if n in (2, 3, 7) else 0) for n in range(1, 9)]
            results = await send(store, CONV, "alice", *items)
            for seq in (4, 5):
                await self.recall(store, results[seq - 1].msg_id)
            expired, recalled = int(SkipReason.EXPIRED), int(SkipReason.RECALLED)
            assert await streamed(store, "bob", now=NOW + 2) == [
                1, (2, 3, expired), (4, 5, recalled), 6, (7, 7, expired), 8,
            ]  # fmt: skip

    async def test_s7_a_member_sees_his_time_in_the_group_and_skips_the_rest(self) -> None:
        async with self.opened(group=("alice", "bob")) as store:
            await fill(store, 9, TEAM)
            await self.set_membership(store, TEAM, "bob", 4, 8)
            outside = int(SkipReason.NOT_MEMBER)
            assert await streamed(store, "bob", conv=TEAM) == [(1, 3, outside), 4, 5, 6, 7, (8, 10, outside)]
            assert await streamed(store, "bob", 8, conv=TEAM) == [(9, 10, outside)]

    async def test_s7_control_events_are_streamed_and_owe_nothing(self) -> None:
        async with self.opened(group=("alice", "bob")) as store:
            assert await streamed(store, "bob", conv=TEAM) == [1]
            assert await states(store) == {}
            assert await flush(store, acked("bob", 1, 1, conv=TEAM)) == []
            assert await cursor(store, "bob", TEAM) == 1

    # ------------------------------------------------------------------------------ S8: seen by the next read

    async def test_s8_every_write_is_seen_by_the_next_read(self) -> None:
        async with self.opened() as store:
            for number in range(1, 30):
                await send(store, CONV, "alice", text(number))
                assert (await store.position("bob", "phone", CONV)).head == number
                assert (await store.behind("bob", "phone", 0, 9)).items[0].head == number
                await flush(store, acked("bob", number, number))
                assert (await store.behind("bob", "phone", 0, 9)).items == ()

    async def test_s8_a_membership_change_is_seen_by_the_next_read(self) -> None:
        async with self.opened(group=("alice", "bob")) as store:
            await fill(store, 2, TEAM)
            assert await streamed(store, "bob", 1, TEAM) == [2, 3]
            await self.set_membership(store, TEAM, "bob", 1, 3)
            assert await streamed(store, "bob", 1, TEAM) == [2, (3, 3, int(SkipReason.NOT_MEMBER))]

    async def test_s8_a_user_is_behind_in_what_changed_since(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await fill(store, 2)
            since = await store.version("bob")
            await fill(store, 2, "p:bob:carol", "carol")
            page = await store.behind("bob", "phone", since, 10)
            assert [(item.conv, item.cursor, item.head) for item in page.items] == [("p:bob:carol", 0, 2)]
            assert (page.version, page.more) == (await store.version("bob"), False)
            page = await store.behind("bob", "phone", 0, 10)
            assert [item.conv for item in page.items] == [TEAM, CONV, "p:bob:carol"]

    async def test_s8_pages_of_behind_hide_nothing_while_messages_come(self) -> None:
        async with self.opened() as store:
            convs = {f"p:alice:x{n}" for n in range(12)}
            for conv in convs:
                await store.append([AppendFrame(conv, conv[8:], (text(1),), 0, False)], NOW)
            seen: set[str] = set()
            since, more, number = 0, True, 50
            while more:
                page = await store.behind("alice", "phone", since, 3)
                seen.update(item.conv for item in page.items)
                since, more = page.version, page.more
                number += 1
                if number < 60:
                    await store.append([AppendFrame("p:alice:x3", "x3", (text(number),), 0, False)], NOW)
            assert seen == convs

    async def test_s8_the_conversation_list_says_what_changed(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await send(store, CONV, "alice", text(1), text(2, mentions=("bob",)), text(3, loss=NOW + 1))
            await flush(store, acked("bob", 1, 1))
            page = await store.conversations("bob", "phone", 0, 10, NOW + 5)
            team, pair = page.items
            assert (team.conv, team.head, team.unread, team.last) == (TEAM, 1, 0, None)
            assert (pair.conv, pair.head, pair.read, pair.unread, pair.mention_seq, pair.cursor) == (
                CONV, 3, 0, 3, 2, 1,
            )  # fmt: skip
            assert pair.last is not None
            assert pair.last.seq == 2
            assert team.version < pair.version == page.version
            await store.read("bob", CONV, 2, NOW)
            later = await store.conversations("bob", "phone", page.version, 10, NOW + 5)
            assert [(item.conv, item.read, item.unread, item.mention_seq) for item in later.items] == [
                (CONV, 2, 1, 0)
            ]
            assert later.version > page.version

    async def test_s8_a_mention_of_all_is_everybodys_but_the_senders(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await send(store, TEAM, "carol", text(1), text(2, flags=Flag.MENTION_ALL), text(3))
            for user, seq in (("bob", 3), ("carol", 0)):
                (item,) = (await store.conversations(user, "phone", 0, 10, NOW)).items
                assert item.mention_seq == seq

    async def test_s8_the_list_comes_in_pages(self) -> None:
        async with self.opened() as store:
            for n in range(7):
                await store.append([AppendFrame(f"p:bob:x{n}", f"x{n}", (text(1),), 0, False)], NOW + n)
            found, since, more = [], 0, True
            while more:
                page = await store.conversations("bob", "phone", since, 3, NOW)
                found += [item.conv for item in page.items]
                since, more = page.version, page.more
            assert found == [f"p:bob:x{n}" for n in range(7)]
            assert (await store.conversations("bob", "phone", since, 3, NOW)).items == ()

    async def test_s8_a_read_on_one_device_is_news_for_the_others_only_once(self) -> None:
        async with self.opened() as store:
            await fill(store, 3)
            since = await store.version("bob")
            await store.read("bob", CONV, 3, NOW)
            moved = await store.version("bob")
            assert moved > since
            await store.read("bob", CONV, 3, NOW)
            assert await store.version("bob") == moved
            assert await store.version("alice") == since

    async def test_s8_versions_grow_over_a_restart(self) -> None:
        store = await self.open()
        await store.register_device("bob", "phone", "app", NOW)
        await send(store, CONV, "alice", text(1))
        await store.read("bob", CONV, 1, NOW)
        before = await store.version("bob")
        store = await self.reopen(store)
        assert await store.version("bob") == before
        await send(store, CONV, "alice", text(2))
        assert await store.version("bob") > before
        assert (await store.behind("bob", "phone", before, 9)).items[0].head == 2
        await store.close()

    async def test_a_user_nobody_knows_has_nothing(self) -> None:
        async with self.opened() as store:
            assert (await store.behind("zoe", "d", 0, 9)).items == ()
            assert (await store.conversations("zoe", "d", 0, 9, NOW)).items == ()
            assert await store.version("zoe") == 0
            assert await store.unread("zoe") == (0, [])
            assert await store.recount("zoe") == []
            assert await store.devices("zoe") == []

    # ---------------------------------------------------------------------------------- S9, S10: shards, scan

    def test_s9_the_shard_of_a_conversation_never_changes(self) -> None:
        golden = {"p:alice:bob": 21, "g:team": 37, "s:zoe": 62, "p:a:b": 13, "g:1": 52}
        assert {conv: shard_of(conv) for conv in golden} == golden

    async def test_s10_scan_gives_every_message_once_in_append_order(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            rng = random.Random(10)
            numbers = itertools.count(1)

            async def one(conv: str, sender: str) -> None:
                for _ in range(10):
                    await send(store, conv, sender, *(text(next(numbers)) for _ in range(rng.randint(1, 4))))

            await asyncio.gather(
                one(CONV, "alice"), one(CONV, "bob"), one(TEAM, "carol"), one("p:carol:dave", "dave")
            )
            found: list[Message] = []
            while page := await store.scan(found[-1].msg_id if found else 0, 7):
                found += page
            assert [m.msg_id for m in found] == sorted({m.msg_id for m in found})
            assert len(found) == next(numbers)
            assert found[-1].msg_id == await store.head_msg_id()

    async def test_find_by_id_and_by_client_id(self) -> None:
        async with self.opened() as store:
            (first,) = await send(store, CONV, "alice", text(1))
            (second,) = await send(store, CONV, "bob", text(1))
            for wanted, found in (
                (first.msg_id, await store.find(msg_id=first.msg_id)),
                (second.msg_id, await store.find(client_id=text(1).client_id)),
                (first.msg_id, await store.find(client_id=text(1).client_id, sender="alice")),
            ):
                assert found is not None
                assert found.msg_id == wanted
            assert await store.find(msg_id=7) is None
            assert await store.find(client_id=bytes(16)) is None
            assert await store.find(client_id=text(1).client_id, sender="carol") is None

    # -------------------------------------------------------------------------------------------- obligations

    async def test_an_obligation_per_member_but_the_sender(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await send(store, TEAM, "bob", text(1))
            assert set(await states(store)) == {(TEAM, 2, user) for user in ("alice", "carol", "dave")}

    async def test_the_first_device_that_acks_settles_the_obligation(self) -> None:
        async with self.opened() as store:
            await store.register_device("bob", "pad", "pad", NOW)
            await fill(store, 2)
            await flush(store, acked("bob", 1, 1, device="pad"))
            assert await state_names(store) == ["ACKED", "UNSETTLED"]
            assert await cursor(store, "bob") == 0

    async def test_a_range_beyond_a_gap_is_acked_all_the_same(self) -> None:
        async with self.opened() as store:
            await fill(store, 4)
            await flush(store, acked("bob", 3, 4))
            assert await state_names(store) == ["UNSETTLED", "UNSETTLED", "ACKED", "ACKED"]

    async def test_own_messages_move_the_cursor_and_write_no_fate(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            (own,) = await send(store, CONV, "bob", text(2))
            await send(store, CONV, "alice", text(3))
            await flush(store, acked("bob", 1, 1), acked("bob", 2, 2, own=True), acked("bob", 3, 3))
            assert await cursor(store, "bob") == 3
            trace = await store.trace(own.msg_id, NOW)
            assert trace is not None
            assert trace.fates == ()

    async def test_what_is_below_the_mark_and_nowhere_is_lost(self) -> None:
        async with self.opened() as store:
            await fill(store, 3)
            await flush(store, acked("bob", 1, 1))
            await store.settle((await store.scan(0, 9))[1].msg_id)
            assert await state_names(store) == ["ACKED", "LOST", "UNSETTLED"]

    async def test_the_strongest_fate_counts(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            for fate, name in (
                (Fate.PARKED, "PARKED"),
                (Fate.UNDELIVERABLE, "UNDELIVERABLE"),
                (Fate.EXPIRED, "EXPIRED"),
                (Fate.RECALLED, "RECALLED"),
                (Fate.ACKED, "ACKED"),
                (Fate.PARKED, "ACKED"),
            ):
                await flush(store, acked("bob", 1, 1, fate=fate))
                assert await state_names(store) == [name]

    async def test_a_parked_message_past_its_deadline_has_expired(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1, loss=NOW + 10))
            assert await store.park([park("bob")], NOW) == [True]
            assert await state_names(store, NOW + 10) == ["PARKED"]
            assert await state_names(store, NOW + 11) == ["EXPIRED"]

    async def test_a_long_range_is_one_fact(self) -> None:
        async with self.opened() as store:
            for start in range(0, 2_500, 500):
                items = [text(start + n) for n in range(500)]
                await send(store, CONV, "alice", *items)
            await flush(store, acked("bob", 1, 2_500))
            assert await cursor(store, "bob") == 2_500
            found, _ = await store.obligations(0, 5_000, NOW)
            assert {one.state for one in found} == {ObligationState.ACKED}
            assert len(found) == 2_500

    async def test_a_trace_tells_the_whole_story(self) -> None:
        async with self.opened(group=("alice", "bob", "carol")) as store:
            (sent,) = await send(store, TEAM, "alice", text(1))
            await flush(store, acked("bob", 1, 2, conv=TEAM), due=[due("carol", 2, NOW + 9, conv=TEAM)])
            trace = await store.trace(sent.msg_id, NOW)
            assert trace is not None
            assert (trace.message.seq, trace.message.sender) == (2, "alice")
            assert {one.user: one.state.name for one in trace.obligations} == {"bob": "ACKED", "carol": "DUE"}
            assert [
                (f.user, f.device, f.from_seq, f.to_seq, f.fate, f.node, f.ts_ms) for f in trace.fates
            ] == [("bob", "phone", 1, 2, Fate.ACKED, "n1", NOW)]
            assert [(row.user, row.from_seq, row.due_at_ms) for row in trace.due] == [("carol", 2, NOW + 9)]
            assert trace.cursors == (("alice", "phone", 0), ("bob", "phone", 2), ("carol", "phone", 0))
            assert await store.trace(7, NOW) is None

    # ----------------------------------------------------------------------------------------------- due rows

    async def test_a_due_row_is_written_only_for_something_open(self) -> None:
        async with self.opened() as store:
            await fill(store, 2)
            await flush(store, acked("bob", 1, 2), due=[due("bob", 1, NOW), due("alice", 1, NOW)])
            await flush(store, due=[due("carol", 1, NOW), due("zoe", 1, NOW), due("bob", 1, NOW, conv="g:x")])
            assert await store.next_due_ms() == 0

    async def test_a_second_request_folds_into_the_row(self) -> None:
        async with self.opened() as store:
            await fill(store, 5)
            await flush(store, due=[due("bob", 4, NOW + 500)])
            await flush(store, due=[due("bob", 2, NOW + 100)])
            await flush(store, due=[due("bob", 3, NOW + 900, urgent=True)])
            assert await store.next_due_ms() == NOW + 500
            await flush(store, due=[due("bob", 5, NOW + 200, urgent=True)])
            assert await store.next_due_ms() == NOW + 200
            (row,) = await store.claim_due("d", NOW + 200, 1_000, 9)
            assert (row.user, row.conv, row.from_seq, row.attempt) == ("bob", CONV, 2, 0)

    async def test_a_row_goes_when_nothing_is_open_above_the_furthest_cursor(self) -> None:
        async with self.opened() as store:
            await store.register_device("bob", "pad", "pad", NOW)
            await fill(store, 2)
            await flush(store, due=[due("bob", 1, NOW)])
            await flush(store, acked("bob", 1, 1))
            assert await store.next_due_ms() == NOW
            await flush(store, acked("bob", 1, 2, device="pad"))
            assert await store.next_due_ms() == 0
            assert await state_names(store) == ["ACKED", "ACKED"]

    async def test_acks_out_of_order_clear_the_row_too(self) -> None:
        async with self.opened() as store:
            await fill(store, 2)
            await flush(store, due=[due("bob", 1, NOW)])
            await flush(store, acked("bob", 2, 2))
            assert await store.next_due_ms() == NOW
            await flush(store, acked("bob", 1, 1))
            assert await store.next_due_ms() == 0

    async def test_the_expired_get_their_fate_when_the_row_goes(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1, loss=NOW + 5), text(2))
            await flush(store, due=[due("bob", 1, NOW)])
            await flush(store, acked("bob", 2, 2), now=NOW + 6)
            assert await store.next_due_ms() == 0
            assert await state_names(store, NOW + 6) == ["EXPIRED", "ACKED"]

    async def test_a_request_for_what_has_expired_writes_its_fate_and_no_row(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1, loss=NOW + 5), text(2, loss=NOW + 5))
            await flush(store, due=[due("bob", 1, NOW)], now=NOW + 6)
            assert await store.next_due_ms() == 0
            assert await state_names(store, NOW + 6) == ["EXPIRED", "EXPIRED"]

    async def test_attempts_start_again_when_the_cursor_moves(self) -> None:
        async with self.opened() as store:
            await fill(store, 3)
            await flush(store, due=[due("bob", 1, NOW)])
            at = NOW
            for attempt in (1, 2, 3):
                assert await store.claim_due("d", at, 1_000, 9)
                assert await store.fire_due("d", [DueFiring("bob", CONV, attempt, at + 50)], at) == [True]
                at += 50
            await flush(store, acked("bob", 2, 2), now=at)
            (row,) = await store.claim_due("d", at, 1_000, 9)
            assert row.attempt == 3
            await flush(store, acked("bob", 1, 1), now=at)
            assert await store.fire_due("d", [DueFiring("bob", CONV, 4, at + 50)], at) == [True]
            (row,) = await store.claim_due("d", at + 50, 1_000, 9)
            assert row.attempt == 1

    async def test_the_senders_own_messages_between_keep_nothing_open(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            await send(store, CONV, "bob", text(2), text(3))
            await flush(store, due=[due("bob", 1, NOW)])
            await flush(store, acked("bob", 1, 1))
            assert await store.next_due_ms() == 0

    async def test_a_row_covers_one_conversation_only(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            await fill(store, 1, "p:bob:carol", "carol")
            await flush(store, due=[due("bob", 1, NOW + 5), due("bob", 1, NOW + 7, conv="p:bob:carol")])
            await flush(store, acked("bob", 1, 1))
            assert await store.next_due_ms() == NOW + 7

    # -------------------------------------------------------------------------------------------- S11: claims

    async def test_s11_a_due_row_is_claimed_by_one_holder_until_its_claim_ends(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            await flush(store, due=[due("bob", 1, NOW + 10)])
            assert await store.claim_due("d1", NOW + 9, 1_000, 9) == []
            assert len(await store.claim_due("d1", NOW + 10, 1_000, 9)) == 1
            assert await store.claim_due("d2", NOW + 11, 1_000, 9) == []
            assert await store.claim_due("d1", NOW + 11, 1_000, 9) == []
            assert await store.next_due_ms() == NOW + 1_010
            assert len(await store.claim_due("d2", NOW + 1_010, 1_000, 9)) == 1
            assert await store.fire_due("d1", [DueFiring("bob", CONV, 1, NOW + 5_000)], NOW + 1_011) == [
                False
            ]
            assert await store.fire_due("d2", [DueFiring("bob", CONV, 1, NOW + 5_000)], NOW + 1_011) == [True]
            assert await store.next_due_ms() == NOW + 5_000

    async def test_s11_concurrent_claims_share_the_rows(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await send(store, TEAM, "alice", text(1))
            await flush(store, due=[due(user, 2, NOW, conv=TEAM) for user in EVERYBODY])
            found = await asyncio.gather(*(store.claim_due(f"d{n}", NOW, 1_000, 2) for n in range(4)))
            assert sorted(row.user for rows in found for row in rows) == ["bob", "carol", "dave"]

    async def test_s11_rows_with_nothing_open_are_cleared_on_the_way(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1, loss=NOW + 5))
            await flush(store, due=[due("bob", 1, NOW)])
            assert await store.claim_due("d", NOW + 6, 1_000, 9) == []
            assert await store.next_due_ms() == 0
            assert await state_names(store, NOW + 6) == ["EXPIRED"]

    async def test_s11_firing_asks_again_what_is_open(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            await flush(store, due=[due("bob", 1, NOW)])
            await store.claim_due("d", NOW, 1_000, 9)
            await flush(store, acked("bob", 1, 1))
            assert await store.fire_due("d", [DueFiring("bob", CONV, 1, NOW + 9)], NOW) == [False]
            assert await store.next_due_ms() == 0

    async def test_s11_a_wait_counts_no_attempt(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            await flush(store, due=[due("bob", 1, NOW)])
            (row,) = await store.claim_due("d", NOW, 1_000, 9)
            assert await store.fire_due("d", [DueFiring("bob", CONV, row.attempt, NOW + 9)], NOW) == [True]
            (row,) = await store.claim_due("d", NOW + 9, 1_000, 9)
            assert row.attempt == 0

    async def test_s11_a_request_during_a_claim_folds_and_does_not_break_it(self) -> None:
        async with self.opened() as store:
            await fill(store, 3)
            await flush(store, due=[due("bob", 3, NOW)])
            await store.claim_due("d1", NOW, 1_000, 9)
            await flush(store, due=[due("bob", 1, NOW - 5, urgent=True)])
            assert await store.claim_due("d2", NOW + 1, 1_000, 9) == []
            assert await store.fire_due("d1", [DueFiring("bob", CONV, 1, NOW + 9)], NOW + 1) == [True]
            (row,) = await store.claim_due("d2", NOW + 9, 1_000, 9)
            assert (row.from_seq, row.attempt) == (1, 1)

    # ------------------------------------------------------------------------------------------- S13: parking

    async def test_s13_a_park_is_fate_push_and_no_due_row_at_once(self) -> None:
        async with self.opened() as store:
            await fill(store, 3)
            await flush(store, acked("bob", 1, 1), due=[due("bob", 2, NOW)])
            assert await store.park([park("bob", 2)], NOW) == [True]
            assert await state_names(store) == ["ACKED", "PARKED", "PARKED"]
            assert (await store.next_due_ms(), await store.next_push_ms()) == (0, NOW)

    async def test_s13_only_what_is_open_is_parked(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1), text(2, loss=NOW + 1), text(3))
            await send(store, CONV, "bob", text(4))
            await flush(store, acked("bob", 3, 3), now=NOW + 2)
            assert await store.park([park("bob"), park("alice", 1, 3), park("carol")], NOW + 2) == [
                True, False, False,
            ]  # fmt: skip
            assert await states(store, NOW + 2) == {
                (CONV, 1, "bob"): ObligationState.PARKED,
                (CONV, 2, "bob"): ObligationState.EXPIRED,
                (CONV, 3, "bob"): ObligationState.ACKED,
                (CONV, 4, "alice"): ObligationState.UNSETTLED,
            }

    async def test_s13_a_park_takes_along_what_its_due_row_covers_further_down(self) -> None:
        async with self.opened() as store:
            await fill(store, 3)
            await flush(store, due=[due("bob", 1, NOW + 4_000)])
            await store.settle(await store.head_msg_id())
            assert await store.park([park("bob", 3, 3, push=False)], NOW) == [True]
            assert await state_names(store) == ["PARKED"] * 3
            assert (await store.next_due_ms(), await store.next_push_ms()) == (0, NOW)

    async def test_s13_what_a_due_row_covers_further_up_stays_due(self) -> None:
        async with self.opened() as store:
            await fill(store, 3)
            await flush(store, due=[due("bob", 1, NOW + 4_000)])
            await store.settle(await store.head_msg_id())
            assert await store.park([park("bob", 1, 2)], NOW) == [True]
            assert await state_names(store) == ["PARKED", "PARKED", "DUE"]

    async def test_s13_a_parked_message_is_due_again_when_a_device_does_not_ack_it(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            await store.park([park("bob")], NOW)
            await flush(store, due=[due("bob", 1, NOW + 5)])
            (row,) = await store.claim_due("d", NOW + 5, 1_000, 9)
            assert (row.from_seq, row.attempt) == (1, 0)
            assert await state_names(store) == ["PARKED"]

    async def test_s13_parking_the_parked_rings_nobody(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            await store.park([park("bob")], NOW)
            (row,) = await store.claim_push("d", NOW, 1_000, 9)
            await store.finish_push("d", row, NOW, retry_at_ms=0)
            await flush(store, due=[due("bob", 1, NOW + 5)])
            assert await store.park([park("bob", at=NOW + 60_000)], NOW + 60_000) == [False]
            assert (await store.next_due_ms(), await store.next_push_ms()) == (0, 0)

    async def test_s13_a_parked_message_is_acked_by_a_later_sync(self) -> None:
        async with self.opened() as store:
            await fill(store, 2)
            await store.park([park("bob")], NOW)
            await flush(store, acked("bob", 1, 2))
            assert await state_names(store) == ["ACKED", "ACKED"]

    async def test_s13_a_park_without_a_push_rings_nobody(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            assert await store.park([park("bob", push=False)], NOW) == [True]
            assert await store.next_push_ms() == 0

    # --------------------------------------------------------------------------------------------------- push

    async def push(self, store: MessageStore, now: int, holder: str = "d") -> list[PushRow]:
        return await store.claim_push(holder, now, 1_000, 9)

    async def test_a_push_says_what_waits(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await fill(store, 2, TEAM, "carol")
            await send(store, CONV, "alice", text(1, b"one"), text(2, b"two", loss=NOW + 9), text(3, b"3"))
            await store.park([park("bob", 1, 2)], NOW)
            (row,) = await self.push(store, NOW)
            assert (row.user, row.conv, row.sender, row.kind, row.body) == (
                "bob",
                CONV,
                "alice",
                Kind.TEXT,
                b"3",
            )
            assert (row.pending, row.badge, row.expires_ms, row.attempt) == (3, 5, 0, 0)
            assert row.msg_id == await store.head_msg_id()

    async def test_an_expired_message_does_not_wait(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1, b"one"), text(2, b"two", loss=NOW + 9))
            await store.park([park("bob")], NOW)
            (row,) = await self.push(store, NOW + 10)
            assert (row.body, row.pending) == (b"one", 1)

    async def test_a_push_for_what_was_acked_meanwhile_is_dropped(self) -> None:
        async with self.opened() as store:
            await fill(store, 2)
            await store.park([park("bob", at=NOW + 5)], NOW)
            assert await store.next_push_ms() == NOW + 5
            assert await self.push(store, NOW + 4) == []
            await flush(store, acked("bob", 1, 2))
            assert await self.push(store, NOW + 5) == []
            assert await store.next_push_ms() == 0

    async def test_a_push_that_expired_meanwhile_is_dropped(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1, loss=NOW + 5))
            await store.park([park("bob")], NOW)
            assert await self.push(store, NOW + 6) == []
            assert await store.next_push_ms() == 0

    async def test_s11_a_push_row_is_claimed_by_one_holder_until_its_claim_ends(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            await store.park([park("bob")], NOW)
            (first,) = await self.push(store, NOW, "d1")
            assert await self.push(store, NOW + 999, "d2") == []
            (second,) = await self.push(store, NOW + 1_000, "d2")
            assert second.push_id == first.push_id
            await store.finish_push("d1", first, NOW + 1_000, retry_at_ms=0)
            assert await store.next_push_ms() == NOW + 2_000
            await store.finish_push("d2", second, NOW + 1_001, retry_at_ms=0)
            assert await store.next_push_ms() == 0

    async def test_a_push_inside_the_collapse_window_waits_for_its_end(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            await store.park([park("bob")], NOW)
            (row,) = await self.push(store, NOW)
            await store.finish_push("d", row, NOW + 100, retry_at_ms=0)
            await send(store, CONV, "alice", text(2))
            await store.park([park("bob", 2, at=NOW + 200)], NOW + 200)
            assert await store.next_push_ms() == NOW + 10_100
            (later,) = await self.push(store, NOW + 10_100)
            assert (later.pending, later.push_id != row.push_id) == (2, True)

    async def test_a_push_after_the_window_leaves_at_once(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            await store.park([park("bob")], NOW)
            (row,) = await self.push(store, NOW)
            await store.finish_push("d", row, NOW, retry_at_ms=0)
            await send(store, CONV, "alice", text(2))
            await store.park([park("bob", 2, at=NOW + 10_001)], NOW + 10_001)
            assert await store.next_push_ms() == NOW + 10_001

    async def test_a_park_while_the_push_is_out_rings_again_after_the_window(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            await store.park([park("bob")], NOW)
            (row,) = await self.push(store, NOW)
            await send(store, CONV, "alice", text(2))
            await store.park([park("bob", 2, at=NOW + 10)], NOW + 10)
            await store.finish_push("d", row, NOW + 20, retry_at_ms=0)
            assert await store.next_push_ms() == NOW + 10_020
            (again,) = await self.push(store, NOW + 10_020)
            assert again.push_id != row.push_id

    async def test_a_park_while_the_push_is_out_is_kept_when_that_claim_ends_by_itself(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            await store.park([park("bob")], NOW)
            (lost,) = await self.push(store, NOW)
            await send(store, CONV, "alice", text(2))
            await store.park([park("bob", 2, at=NOW + 10)], NOW + 10)
            (row,) = await self.push(store, NOW + 1_000)
            assert row.push_id == lost.push_id
            await store.finish_push("d", row, NOW + 1_001, retry_at_ms=0)
            (again,) = await self.push(store, NOW + 11_001)
            assert again.push_id != row.push_id

    @pytest.mark.parametrize("parked_at", [10, 1_500], ids=["while it is out", "before it is tried again"])
    async def test_what_is_parked_after_a_push_that_may_have_rung_gets_a_push_of_its_own(
        self, parked_at: int
    ) -> None:
        """The vendor's answer was late, so the push is repeated; the vendor rings once per push_id."""
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            await store.park([park("bob")], NOW)
            (row,) = await self.push(store, NOW)
            await send(store, CONV, "alice", text(2))
            for now in sorted((parked_at, 1_000)):
                if now == parked_at:
                    await store.park([park("bob", 2, at=NOW + now)], NOW + now)
                else:
                    await store.finish_push("d", row, NOW + now, retry_at_ms=NOW + 2_000)
            (repeated,) = await self.push(store, NOW + 2_000)
            assert repeated.push_id == row.push_id
            await store.finish_push("d", repeated, NOW + 2_001, retry_at_ms=0)
            assert await store.next_push_ms() == NOW + 12_001
            (again,) = await self.push(store, NOW + 12_001)
            assert again.push_id != row.push_id

    async def test_no_two_pushes_have_one_id_however_long_they_are_apart(self) -> None:
        async with self.opened() as store:
            ids = []
            for number in range(5):
                now = NOW + number * DAY_MS
                await send(store, CONV, "alice", text(number))
                await store.park([park("bob", at=now)], now)
                (row,) = await self.push(store, now)
                ids.append(row.push_id)
                await store.finish_push("d", row, now, retry_at_ms=0)
                assert await self.push(store, now + DAY_MS // 2) == []
            assert len(set(ids)) == 5

    async def test_two_parks_before_the_push_are_one_push(self) -> None:
        async with self.opened() as store:
            await fill(store, 2)
            await store.park([park("bob", 1, 1, at=NOW + 50), park("bob", 2, 2, at=NOW + 20)], NOW)
            assert await store.next_push_ms() == NOW + 20
            (row,) = await self.push(store, NOW + 20)
            assert row.pending == 2

    async def test_a_push_is_tried_again_under_the_same_id(self) -> None:
        async with self.opened() as store:
            await fill(store, 1)
            await store.park([park("bob")], NOW)
            (row,) = await self.push(store, NOW)
            await store.finish_push("d", row, NOW, retry_at_ms=NOW + 3_000)
            assert await self.push(store, NOW + 2_999) == []
            (again,) = await self.push(store, NOW + 3_000)
            assert (again.push_id, again.attempt) == (row.push_id, 1)

    async def test_a_clock_that_went_back_does_not_silence_a_phone(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            await store.park([park("bob")], NOW)
            (row,) = await self.push(store, NOW)
            await store.finish_push("d", row, NOW + DAY_MS, retry_at_ms=0)
            await send(store, CONV, "alice", text(2))
            await store.park([park("bob", 2)], NOW)
            assert await store.next_push_ms() == NOW + 10_000

    async def test_a_caller_that_waited_does_not_shorten_the_collapse_window(self) -> None:
        async with self.opened() as store:
            await send(store, CONV, "alice", text(1))
            await store.park([park("bob")], NOW)
            (row,) = await self.push(store, NOW)
            await store.finish_push("d", row, NOW + 500, retry_at_ms=0)
            await send(store, CONV, "alice", text(2))
            await store.park([park("bob", 2)], NOW)
            assert await store.next_push_ms() == NOW + 10_500

    # ----------------------------------------------------------------------------------------------- recovery

    async def test_the_settled_mark_moves_only_forward_and_not_beyond_the_head(self) -> None:
        async with self.opened() as store:
            await fill(store, 3)
            ids = [m.msg_id for m in await store.scan(0, 9)]
            await store.settle(ids[1])
            await store.settle(ids[0])
            assert await store.settled_mark() == ids[1]
            await store.settle(MAX_SAFE_INT)
            assert await store.settled_mark() == ids[2]

    async def test_unsettled_is_what_lies_above_the_mark_by_conversation(self) -> None:
        async with self.opened(group=EVERYBODY) as store:
            await fill(store, 4)
            await store.settle((await store.scan(0, 9))[2].msg_id)
            await send(store, TEAM, "bob", text(1))
            await send(store, CONV, "bob", text(2))
            last = await send(store, "p:carol:dave", "dave", text(3))
            found = await store.unsettled(last[0].msg_id - 1)
            assert sorted((r.conv, r.from_seq, r.to_seq, sorted(r.members)) for r in found) == [
                (TEAM, 2, 2, ["alice", "carol", "dave"]),
                (CONV, 3, 5, ["alice", "bob"]),
            ]
            assert len(await store.unsettled(last[0].msg_id)) == 3

    async def test_nothing_is_above_the_mark_of_an_empty_store(self) -> None:
        async with self.opened() as store:
            assert (await store.head_msg_id(), await store.settled_mark()) == (0, 0)
            assert await store.unsettled(MAX_SAFE_INT) == []
            assert await store.obligations(0, 10, NOW) == ([], 0)

    # ------------------------------------------------------------------------------------------------- groups

    async def test_a_group_is_created_once(self) -> None:
        async with self.opened() as store:
            for _ in range(2):
                assert await store.create_group("team", "alice", ["bob", "alice", "carol"], NOW) == 1
            found = await store.members(TEAM)
            assert [(m.user, m.join_seq, m.leave_seq) for m in found] == [
                ("alice", 1, 0), ("bob", 1, 0), ("carol", 1, 0),
            ]  # fmt: skip
            assert len({m.role for m in found}) == 2
            (event,) = await store.scan(0, 9)
            assert (event.conv, event.seq, event.cseq, event.sender, event.kind) == (
                TEAM, 1, 0, "alice", Kind.MEMBER,
            )  # fmt: skip

    async def test_the_same_name_with_other_members_is_a_conflict(self) -> None:
        async with self.opened(group=("alice", "bob")) as store:
            for owner, members in (("alice", ["carol"]), ("bob", ["alice"]), ("alice", ["bob", "carol"])):
                with pytest.raises(PeerError) as raised:
                    await store.create_group("team", owner, members, NOW)
                assert raised.value.code == "conflict"
            assert len(await store.members(TEAM)) == 2
            await fill(store, 1, TEAM)

    async def test_a_group_is_bounded(self) -> None:
        async with self.opened() as store:
            users = [f"u{n}" for n in range(500)]
            with pytest.raises(PeerError) as raised:
                await store.create_group("team", "alice", users, NOW)
            assert "501" in raised.value.detail
            assert await store.members(TEAM) == []
            assert await store.create_group("team", "alice", users[:-1], NOW) == 1
            await fill(store, 2, TEAM)
            assert len(await states(store)) == 2 * 499

    async def test_the_members_of_a_pair_are_in_its_name(self) -> None:
        async with self.opened() as store:
            assert [m.user for m in await store.members("p:x:y")] == ["x", "y"]
            assert [m.user for m in await store.members("s:x")] == ["x"]
            assert await store.members("g:nowhere") == []

    # ----------------------------------------------------------------------------------------- devices, nodes

    async def test_a_device_is_remembered_from_its_first_day(self) -> None:
        async with self.opened() as store:
            await store.register_device("zoe", "pad", "pad", NOW)
            await store.register_device("zoe", "web", "web", NOW + 5)
            again = await store.register_device("zoe", "pad", "desktop", NOW + 9)
            assert (again.first_seen_ms, again.last_seen_ms, again.device_class) == (NOW, NOW + 9, "desktop")
            assert [d.device for d in await store.devices("zoe")] == ["pad", "web"]

    async def test_boots_are_counted_per_node(self) -> None:
        async with self.opened() as store:
            assert [await store.next_boot("n1") for _ in range(3)] == [1, 2, 3]
            assert await store.next_boot("n2") == 1

    async def test_s12_an_open_boot_is_listed_until_it_is_ended(self) -> None:
        async with self.opened() as store:
            assert await store.open_boots() == []
            for node, boot in (("n2", 1), ("n1", 10), ("n1", 9), ("n1", 10)):
                await store.open_boot(node, boot)
            await store.fence("n1", 9, "d", NOW, 1_000)
            await store.fence("n3", 4, "d", NOW, 1_000)
            listed = [OpenBoot("n1", 9, True), OpenBoot("n1", 10, False), OpenBoot("n2", 1, False)]
            assert await store.open_boots() == listed
            await store.end_boot("n1", 9)
            await store.end_boot("n1", 9)
            await store.end_boot("n3", 4)
            assert await store.open_boots() == listed[1:]
            assert await store.fenced("n1", 9)

    async def test_s12_a_fence_is_for_ever_and_its_adoption_is_one_holders(self) -> None:
        async with self.opened() as store:
            assert not await store.fenced("n1", 1)
            found = await asyncio.gather(*(store.fence("n1", 1, f"d{n}", NOW, 1_000) for n in range(5)))
            assert found.count(True) == 1
            holder, other = f"d{found.index(True)}", f"d{found.index(False)}"
            assert await store.fence("n1", 1, holder, NOW + 900, 1_000)
            assert not await store.fence("n1", 1, other, NOW + 1_899, 1_000)
            assert await store.fence("n1", 1, other, NOW + 1_900, 1_000)
            assert not await store.fence("n1", 1, holder, NOW + 1_901, 1_000)
            assert await store.fenced("n1", 1)
            assert not await store.fenced("n1", 2)
