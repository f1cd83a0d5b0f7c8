"""What watchers are still to be told: the union of changes since each last asked.

Hides how a change finds its watchers and how a late one is kept from growing: a watcher holds names, each
once, of what it watches, so its memory is bounded by that (tests/contract/presence.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Literal

from fastim.errors import PresenceUnavailable
from fastim.presence.base import Change

Kind = Literal["user", "room"]
Subject = tuple[Kind, str]


class Interest:
    """The watchers of a backend by what they watch.

    on_unwatched: called when the last watcher of a subject let go of it.
    """

    def __init__(self, on_unwatched: Callable[[Subject], None] | None = None) -> None:
        self._on_unwatched = on_unwatched
        self._watchers: dict[Subject, set[Box]] = {}
        self._boxes: set[Box] = set()

    def changed(self, kind: Kind, name: str) -> None:
        for box in self._watchers.get((kind, name), ()):
            box.tell(kind, name)

    def resync(self) -> None:
        """Changes may have been missed."""
        for box in self._boxes:
            box.tell_resync()

    def close(self) -> None:
        for box in list(self._boxes):
            box.close()

    def subjects(self) -> list[Subject]:
        """All that is watched by anybody."""
        return list(self._watchers)

    def watched(self, subject: Subject) -> bool:
        return subject in self._watchers

    def add(self, box: Box, subject: Subject) -> None:
        self._watchers.setdefault(subject, set()).add(box)

    def drop(self, box: Box, subject: Subject) -> None:
        watchers = self._watchers.get(subject)
        if watchers is None or box not in watchers:
            return
        watchers.remove(box)
        if not watchers:
            del self._watchers[subject]
            if self._on_unwatched is not None:
                self._on_unwatched(subject)

    def opened(self, box: Box) -> None:
        self._boxes.add(box)

    def closed(self, box: Box) -> None:
        self._boxes.discard(box)


class Box:
    """A watcher without its `watch`: what it watches, and the changes that it has not been told of."""

    def __init__(self, interest: Interest) -> None:
        self._interest = interest
        interest.opened(self)
        self._watched: set[Subject] = set()
        self._told: dict[Kind, set[str]] = {"user": set(), "room": set()}
        self._resync = False
        self._closed = False
        self._news = asyncio.Event()

    def add(self, subjects: Iterable[Subject]) -> None:
        if self._closed:
            raise PresenceUnavailable("this watcher is closed")
        for subject in subjects:
            self._watched.add(subject)
            self._interest.add(self, subject)

    def forget(self, users: Iterable[str] = (), rooms: Iterable[str] = ()) -> None:
        self._drop([*(("user", user) for user in users), *(("room", room) for room in rooms)])

    def _drop(self, subjects: Iterable[Subject]) -> None:
        for subject in subjects:
            self._watched.discard(subject)
            kind, name = subject
            self._told[kind].discard(name)
            self._interest.drop(self, subject)

    def tell(self, kind: Kind, name: str) -> None:
        self._told[kind].add(name)
        self._news.set()

    def tell_resync(self) -> None:
        self._resync = True
        self._news.set()

    async def changes(self) -> Change:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._closed:
                self._news.set()
                raise PresenceUnavailable("this watcher is closed")
            users, rooms = self._told["user"], self._told["room"]
            if users or rooms or self._resync:
                change = Change(frozenset(users), frozenset(rooms), self._resync)
                self._told = {"user": set(), "room": set()}
                self._resync = False
                return change

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._drop(list(self._watched))
        self._interest.closed(self)
        self._news.set()


def subjects_of(users: Iterable[str], rooms: Iterable[str]) -> list[Subject]:
    found: list[Subject] = [("user", user) for user in users]
    found += [("room", room) for room in rooms]
    return found
