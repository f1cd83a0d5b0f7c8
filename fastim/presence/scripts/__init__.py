"""Lua that Redis runs whole: each script is one decision, on one key, with the cluster's keys of one slot.

A script is called by its hash; a server that does not know it (restarted, flushed, promoted) gets the text.
Entries are texts with | between their fields, so that scripts and people read them without a decoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Final


class Script:
    """A script and how to call it."""

    __slots__ = ("hash", "text")

    def __init__(self, name: str) -> None:
        self.text = resources.files(__name__).joinpath(f"{name}.lua").read_bytes()
        self.hash = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


NAMES: Final = (
    "lease_open", "lease_renew", "lease_end", "lease_read", "admit", "attach", "detach", "enter", "leave",
    "epoch",
)  # fmt: skip
SCRIPTS: Final[Mapping[str, Script]] = {name: Script(name) for name in NAMES}
