"""The embedded store: SQLite with one writer and group commit (docs/adr/0020)."""

from fastim.store.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
