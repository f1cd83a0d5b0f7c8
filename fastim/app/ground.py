"""What the parts of one process stand on, and how they are taken down again.

Ends     what undoes the start so far, run backwards: nothing is closed before what uses it has ended
Ground   configuration, clock, backends, who may log in, certificates
"""

from __future__ import annotations

import logging
import random
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastim import observe
from fastim.auth import Authenticator, SigningKey, create_dev_key
from fastim.bus.base import Bus
from fastim.clock import Clock
from fastim.config import Config
from fastim.errors import UsageError
from fastim.node.tls import make_server_context, reload_certificate
from fastim.node.upgrade import FailureLimit
from fastim.presence.base import PresenceStore
from fastim.store.base import MessageStore

_log = logging.getLogger("fastim.app")


class Ends:
    """What undoes a start."""

    def __init__(self) -> None:
        self._ends: list[tuple[str, Callable[[], Awaitable[Any]]]] = []

    def push(self, name: str, end: Callable[[], Awaitable[Any]]) -> None:
        self._ends.append((name, end))

    async def run(self) -> bool:
        """Newest first; False if one could not end well. The others are ended all the same."""
        good = True
        while self._ends:
            name, end = self._ends.pop()
            try:
                await end()
            except Exception:
                # What it could not finish, the next start takes up: it is in the store, or was not accepted.
                good = False
                _log.exception("%s did not end well", name)
        return good


class Ground:
    """Made once per process; the backends are set by the App as soon as they are open."""

    store: MessageStore
    bus: Bus
    presence: PresenceStore

    def __init__(self, config: Config, clock: Clock, on_fatal: Callable[[BaseException], None]) -> None:
        self.config = config
        self.clock = clock
        self.on_fatal = on_fatal
        self.rng = random.Random()
        self.ends = Ends()
        self.failures = FailureLimit(config.node.failures_per_minute, clock)
        """Of one address, by whichever way it comes in."""
        self.dev_key: SigningKey | None = None
        self._authenticator: Authenticator | None = None
        self._certificates: list[tuple[ssl.SSLContext, Path, Path]] = []

    def make_directory(self) -> None:
        config = self.config
        try:
            config.data_path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if config.embedded:
                config.store_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"data_dir is {str(config.data_path)!r}: {error.strerror}") from None

    @property
    def authenticator(self) -> Authenticator:
        """Whom tokens are believed to speak for. Raises UsageError at the first use."""
        if self._authenticator is None:
            keys = self.config.token_keys()
            if self.config.dev:
                self.dev_key = create_dev_key(self.config.data_path)
                keys.append(self.dev_key.verifier())
            self._authenticator = Authenticator(
                keys, self.config.auth.audience, self.clock,
                on_failure=lambda reason: observe.AUTH_REFUSED.labels(reason).inc(),
            )  # fmt: skip
        return self._authenticator

    def tls(self, cert: str, key: str) -> ssl.SSLContext | None:
        """A server's context; None without a certificate."""
        if not cert:
            return None
        context = make_server_context(Path(cert), Path(key))
        self._certificates.append((context, Path(cert), Path(key)))
        return context

    def reload_certificates(self) -> None:
        """Read every certificate again. One that cannot be used is reported, and the old one stays."""
        for context, cert, key in self._certificates:
            try:
                reload_certificate(context, cert, key)
            except UsageError as error:
                _log.error("the certificate was not replaced", extra={"reason": str(error)})
            else:
                _log.info("the certificate was read again", extra={"file": str(cert)})


def named(section: Any, limits: Any) -> dict[str, Any]:
    """The section's values that the limits have under the same name."""
    return {name: getattr(section, name) for name in limits.__struct_fields__ if hasattr(section, name)}
