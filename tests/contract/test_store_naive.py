"""The reference keeps the store contract: an oracle that does not would prove nothing."""

from __future__ import annotations

import msgspec

from fastim.store.base import MessageStore
from tests.contract.store import StoreContract
from tests.reference.naive_store import NaiveStore


def naive(store: MessageStore) -> NaiveStore:
    assert isinstance(store, NaiveStore)
    return store


class TestNaiveStore(StoreContract):
    async def open(self) -> MessageStore:
        return NaiveStore()

    async def reopen(self, store: MessageStore) -> MessageStore:
        await store.close()
        return NaiveStore(naive(store).state)

    async def set_membership(self, store: MessageStore, conv: str, user: str, join: int, leave: int) -> None:
        members = naive(store).state.memberships[conv]
        for number, member in enumerate(members):
            if member.user == user:
                members[number] = msgspec.structs.replace(member, join_seq=join, leave_seq=leave)

    async def recall(self, store: MessageStore, msg_id: int) -> None:
        messages = naive(store).state.messages
        for number, message in enumerate(messages):
            if message.msg_id == msg_id:
                messages[number] = msgspec.structs.replace(message, recalled=True)
