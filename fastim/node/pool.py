"""The sessions of this node, by id and by user (seed: ClientsPool).

Hides the indexes. A device has at most one session here; a session without a connection waits in the order in
which the connections were lost, so that expiry costs only what has expired.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastim.node.session import Session

_NOBODY: dict[str, Session] = {}


class ConnPool:
    """Which devices of which users are here."""

    def __init__(self) -> None:
        self._by_id: dict[str, Session] = {}
        self._by_user: dict[str, dict[str, Session]] = {}
        self._detached: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_id.values()))

    def add(self, session: Session) -> None:
        """Its device must have no other session here."""
        self._by_id[session.id] = session
        self._by_user.setdefault(session.user, {})[session.device] = session

    def remove(self, session: Session) -> None:
        if self._by_id.pop(session.id, None) is None:
            return
        self._detached.pop(session.id, None)
        devices = self._by_user[session.user]
        if devices.get(session.device) is session:
            del devices[session.device]
        if not devices:
            del self._by_user[session.user]

    def find(self, session_id: str) -> Session | None:
        return self._by_id.get(session_id)

    def of_user(self, user: str) -> dict[str, Session]:
        """device -> session; empty for a user who is not here. Not to be changed."""
        return self._by_user.get(user, _NOBODY)

    def of_device(self, user: str, device: str) -> Session | None:
        return self._by_user.get(user, _NOBODY).get(device)

    def detached(self, session: Session, mono_ms: int) -> None:
        """The session has lost its connection."""
        session.detached_mono_ms = mono_ms
        self._detached[session.id] = session

    def attached(self, session: Session) -> None:
        """It has one again."""
        self._detached.pop(session.id, None)

    def expired(self, detached_before_mono_ms: int) -> list[Session]:
        """Sessions without a connection since that moment or longer."""
        found = []
        for session in self._detached.values():
            if session.detached_mono_ms > detached_before_mono_ms:
                break
            found.append(session)
        return found

    @property
    def connections(self) -> int:
        """Sessions that have a connection."""
        return len(self._by_id) - len(self._detached)
