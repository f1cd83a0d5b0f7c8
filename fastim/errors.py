"""The four kinds of error, told apart by who has to act.

PeerError      the other side's fault: becomes an ERROR frame, a problem+json body or a close code
UsageError     the caller's fault inside this program (also a ValueError)
Unavailable    a backend cannot answer now; `temporary` says whether trying again can help
InternalError  our bug; never caught below `fastim.app`, which takes the process to draining

Errors carry fields, not sentences. A message shows the value and the limit:
"body is 70,000 bytes; limit 61,440 (node.max_body_bytes)".
"""

from __future__ import annotations


class FastimError(Exception):
    """Base of every error that fastim raises on purpose."""


class PeerError(FastimError):
    """The peer broke a rule.

    code            one of the words in docs/protocol.md, e.g. "bad_frame", "unknown_user", "rate_limited"
    detail          shows the value and the limit
    retryable       the same request may succeed later, unchanged
    retry_after_ms  0 when unknown
    """

    def __init__(self, code: str, detail: str, *, retryable: bool = False, retry_after_ms: int = 0) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.retryable = retryable
        self.retry_after_ms = retry_after_ms


class UsageError(FastimError, ValueError):
    """A caller inside this program passed something that can never work."""


class Unavailable(FastimError):
    """A backend did not take or answer the request; the request may or may not have happened."""

    def __init__(self, backend: str, detail: str, *, temporary: bool = True) -> None:
        super().__init__(f"{backend} is unavailable: {detail}")
        self.backend = backend
        self.detail = detail
        self.temporary = temporary


class BusUnavailable(Unavailable):
    """The only error `Bus.publish` raises; the record may then exist (promise Bus.B7)."""

    def __init__(self, detail: str, *, temporary: bool = True) -> None:
        super().__init__("bus", detail, temporary=temporary)


class StoreUnavailable(Unavailable):
    """The store could not commit: disk full, I/O error, closed."""

    def __init__(self, detail: str, *, temporary: bool = True) -> None:
        super().__init__("store", detail, temporary=temporary)


class PresenceUnavailable(Unavailable):
    """Presence did not answer; nobody may be taken for offline because of it."""

    def __init__(self, detail: str, *, temporary: bool = True) -> None:
        super().__init__("presence", detail, temporary=temporary)


class Fenced(FastimError):
    """This node's boot was adopted by a dispatcher: it must close its sockets and take a new boot."""


class InternalError(FastimError):
    """A state that the code says cannot happen."""
