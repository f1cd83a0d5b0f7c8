"""The schemas of the stores, as numbered steps that are never edited once released.

`<backend>_<number>_<what>.sql` takes a database from version number - 1 to number, in one transaction.
"""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple


class Step(NamedTuple):
    """One step: the version it leads to, its name, its statements."""

    version: int
    name: str
    sql: str


def steps(backend: str) -> list[Step]:
    """All steps of a backend, from version 1 on, without a hole."""
    found = []
    for file in resources.files(__name__).iterdir():
        owner, _, rest = file.name.removesuffix(".sql").partition("_")
        if owner == backend and file.name.endswith(".sql"):
            number, _, name = rest.partition("_")
            found.append(Step(int(number), name, file.read_text()))
    found.sort()
    assert [step.version for step in found] == list(range(1, len(found) + 1))
    return found
