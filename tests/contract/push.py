"""What every PushVendor must keep: one result per item, never an exception for one, safe to repeat.

A vendor's test module inherits PushVendorContract and gives `serve(script)`: a vendor whose service answers
each request with the next word of the script: ok, gone, retry, retry-after, error, hang, cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import pytest

from fastim.push.base import Notification, PushOutcome, PushVendor

Served = tuple[PushVendor, list[list[Notification]]]
"""A vendor, and the batches its service has received."""


def notification(number: int = 1) -> Notification:
    return Notification(
        f"push-{number}",
        f"user{number}",
        "p:alice:bob",
        number,
        "alice",
        "hello 你好",
        3,
        2,
        1_790_000_000_000,
    )


class PushVendorContract:
    """Inherit, and give `serve()`."""

    def serve(self, script: Sequence[str]) -> AbstractAsyncContextManager[Served]:
        raise NotImplementedError

    async def test_an_accepted_batch_is_ok_item_by_item(self) -> None:
        async with self.serve(["ok"]) as (vendor, _):
            results = await vendor.send([notification(1), notification(2), notification(3)])
            assert [result.outcome for result in results] == [PushOutcome.OK] * 3

    async def test_what_is_sent_arrives(self) -> None:
        async with self.serve(["ok"]) as (vendor, received):
            await vendor.send([notification(1), notification(2)])
            assert received == [[notification(1), notification(2)]]

    async def test_an_empty_batch_has_no_results(self) -> None:
        async with self.serve([]) as (vendor, received):
            assert await vendor.send([]) == []
            assert received == []

    async def test_a_dead_target_is_gone(self) -> None:
        async with self.serve(["gone"]) as (vendor, _):
            assert [r.outcome for r in await vendor.send([notification()])] == [PushOutcome.GONE]

    async def test_a_busy_service_says_when_to_come_back(self) -> None:
        async with self.serve(["retry-after"]) as (vendor, _):
            (result,) = await vendor.send([notification()])
            assert result.outcome is PushOutcome.RETRY
            assert result.retry_after_ms == 7_000

    @pytest.mark.parametrize("trouble", ["retry", "error", "hang", "cut"])
    async def test_trouble_is_retry_never_an_exception(self, trouble: str) -> None:
        async with self.serve([trouble]) as (vendor, _):
            results = await vendor.send([notification(1), notification(2)])
            assert [result.outcome for result in results] == [PushOutcome.RETRY] * 2

    async def test_the_same_notification_may_be_sent_again(self) -> None:
        async with self.serve(["retry", "ok"]) as (vendor, received):
            await vendor.send([notification()])
            (result,) = await vendor.send([notification()])
            assert result.outcome is PushOutcome.OK
            assert [batch[0].push_id for batch in received] == ["push-1", "push-1"]
