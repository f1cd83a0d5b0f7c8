"""The store of a cluster: several PostgreSQL databases with partitioned tables (docs/adr/0095)."""

from fastim.store.postgres.databases import Deadlines
from fastim.store.postgres.store import PostgresStore

__all__ = ["Deadlines", "PostgresStore"]
