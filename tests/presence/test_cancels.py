"""Cancelled calls never mix replies: a short storm; the whole one is `python -m tests.presence.cancels`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from fastim.presence import shards
from fastim.presence.lane import Lane
from tests.presence.cancels import QUICK, storm


class ForgetfulLane(Lane):
    """The error that the storm is there to find: a cancelled request's reply is left for the next."""

    async def _exchange(self, batch: Sequence[Any]) -> None:
        connection = self._connection
        if not connection.is_connected:
            await connection.connect()
        await connection.send_packed_command([request.packed for request in batch], check_health=False)
        await asyncio.sleep(0)
        for request in batch:
            if request.answer.done():
                continue
            replies = [await connection.read_response() for _ in range(request.count)]
            if not request.answer.done():
                request.answer.set_result(replies)


async def test_ten_thousand_cancels_mix_no_reply(redis_server: str) -> None:
    counts, _ = await storm(redis_server, QUICK, seed=2)
    assert counts.mixed == []


async def test_ten_thousand_cancels_and_lost_connections_mix_no_reply(redis_server: str) -> None:
    counts, _ = await storm(redis_server, QUICK, seed=3, cut_s=0.05)
    assert counts.mixed == []
    assert counts.away > 0


async def test_ten_thousand_cancels_in_a_cluster_mix_no_reply(valkey: str) -> None:
    counts, _ = await storm(valkey, QUICK, seed=4)
    assert counts.mixed == []


async def test_the_storm_finds_a_lane_that_does_not_read_what_was_cancelled(
    redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "Lane", ForgetfulLane)
    counts, _ = await storm(redis_server, QUICK, seed=5)
    assert counts.mixed
