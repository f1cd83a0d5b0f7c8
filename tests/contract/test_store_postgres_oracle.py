"""The cluster's store answers every call as the naive one does, whatever came before.

The same random life as the embedded store's (tests/property/test_store_oracle.py), over two databases. What
one batch stores in several conversations has no order there that anybody is promised, so lists of messages
are compared by conversation, and the settled mark moves to the end of a batch.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fastim.model import Message
from fastim.store.base import MessageStore
from fastim.store.postgres import PostgresStore, projection
from tests.contract.postgres import store_urls, urls
from tests.property.test_store_oracle import CONVS, NOW, USERS, Pair

__all__ = ["store_urls", "urls"]


def by_conversation(answer: Any) -> Any:
    if isinstance(answer, list) and answer and isinstance(answer[0], Message):
        return sorted(answer, key=lambda one: (one.conv, one.seq))
    return answer


class PostgresPair(Pair):
    def __init__(self, real: PostgresStore, rng: random.Random, urls: list[str]) -> None:
        super().__init__(real, rng, Path())  # type: ignore[arg-type]
        self.urls = urls
        self.ends: list[tuple[int, int]] = []
        """(head of the real store, head of the naive one) after each batch"""

    async def both(
        self, call: Callable[[MessageStore], Awaitable[Any]], same: bool = True
    ) -> tuple[Any, Any]:
        async def sorted_call(store: MessageStore) -> Any:
            return by_conversation(await call(store))

        return await super().both(sorted_call, same)

    async def append(self) -> None:
        await super().append()
        self.ends.append((await self.real.head_msg_id(), await self.naive.head_msg_id()))

    async def mark(self) -> None:
        if self.ends:
            real, naive = self.rng.choice(self.ends)
            await self.real.settle(real)
            await self.naive.settle(naive)

    async def reopen(self) -> None:
        await self.real.close()
        self.real = await PostgresStore.open(self.urls)  # type: ignore[assignment]

    async def states(self, store: MessageStore) -> list[Any]:
        return sorted(await super().states(store))

    async def traces(self, store: MessageStore) -> list[Any]:
        return sorted(await super().traces(store), key=lambda found: found[:2])


async def compare(urls: list[str], seed: int, steps: int) -> None:
    rng = random.Random(seed)
    with (
        mock.patch.object(projection, "ROUND_MESSAGES", rng.choice((1, 3, 2_000))),
        mock.patch.object(projection, "FOLLOW_S", rng.choice((0.001, 0.5))),
    ):
        pair = PostgresPair(await PostgresStore.open(urls), rng, urls)
        try:
            for user in USERS[: rng.choice((2, 4))]:
                await pair.both(lambda store, user=user: store.register_device(user, "phone", "app", NOW))  # type: ignore[misc]
            await pair.both(lambda store: store.create_group("team", "bob", CONVS["g:team"], NOW))
            for step in range(steps):
                await pair.act()
                if step % 20 == 19:
                    await pair.look()
            await pair.look()
        finally:
            await pair.real.close()


@pytest.mark.parametrize("seed", range(6))
def test_the_clusters_store_answers_like_the_naive_one(urls: list[str], seed: int) -> None:
    asyncio.run(compare(urls, seed, 80))
