"""The asyncio client SDK: one device of one user.

Client, its local stores, and the values it hands out. Everything else in here is inside.
"""

from fastim.client.client import Client, Events, Outgoing
from fastim.client.events import (
    Connected,
    ConvChanged,
    Conversation,
    Delivery,
    Disconnected,
    Event,
    Gone,
    HistoryPage,
    Message,
    ReadMark,
    StateChanged,
)
from fastim.client.localstore import LocalStore, MemoryLocalStore
from fastim.client.sqlitestore import SqliteLocalStore
from fastim.sealing import SealKey, SharedKey

__all__ = [
    "Client",
    "Connected",
    "ConvChanged",
    "Conversation",
    "Delivery",
    "Disconnected",
    "Event",
    "Events",
    "Gone",
    "HistoryPage",
    "LocalStore",
    "MemoryLocalStore",
    "Message",
    "Outgoing",
    "ReadMark",
    "SealKey",
    "SharedKey",
    "SqliteLocalStore",
    "StateChanged",
]
