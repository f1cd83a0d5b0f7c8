"""The boundary "bytes in, bytes out" between a node and its sockets.

Above it: sessions, delivery, catch-up, in Python, which never see a socket. Below it: fastim._core.conn on
picows, or the simulation's fake. Whoever implements Link keeps these:

L1  frames leave in the order of send() and send_msg(), joined into packets of at most 64 KiB and 64 frames,
    at the latest at the end of the loop tick
L2  on_command is called once per frame, in order; PING, and ACK and ACKS of a bound link, never reach it
L3  on_closed is called exactly once per link, after the last on_command, and never from inside send,
    send_msg, close or abort
L4  after close or abort, and after the socket ended, nothing is sent, nothing more is received, and every
    method is a no-op
L5  before `authenticated` is set only AUTH and REKEY reach on_command; SEALED never does
L6  from set_keys on every packet is sealed both ways; what does not open, or comes in clear, ends the link
    with 4509 and nothing else

Source: architecture, "The core's rule"; tests/unit/test_conn.py, tests/system/test_listener.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fastim._core.cipher import Opener, Sealer

CLOSE_ABORT_MS = 1_000
"""How long a peer may take to finish the closing handshake before its socket is aborted."""


class LinkOwner(Protocol):
    """The cold half: what the node sets per connection."""

    def on_command(self, op: int, frame: bytes) -> None:
        """One frame that the core does not answer itself.

        May raise PeerError: the core answers with an ERROR frame, and closes for "bad_frame", "bad_ack"
        (4509) and, while not authenticated, "unauthenticated" (4501). Anything else is a bug: the hub's
        on_fatal gets it and the link is closed with 1011.
        """
        ...

    def on_closed(self, code: int, orderly: bool) -> None:
        """The link is gone, exactly once.

        code: of the close frame that ended it, ours if we closed first, else the peer's (1005 when it
        carried none); 1006 when neither side sent one. orderly: the peer said goodbye, by a close frame or
        by an end of TCP; False for resets, aborts and time-outs.
        """
        ...


class Link(Protocol):
    """One client connection, as the node's Python code sees it."""

    owner: LinkOwner
    authenticated: bool
    """False until the session says otherwise; until then only AUTH and REKEY are let through."""

    @property
    def peer(self) -> str:
        """`ip:port`, for logs."""
        ...

    @property
    def slot(self) -> int:
        """Its slot in the hub's wheel; -1 once closed."""
        ...

    @property
    def closed(self) -> bool:
        """True from close(), abort() or the end of the socket on."""
        ...

    @property
    def overflow(self) -> bool:
        """True while more than the soft bound (256 KiB) waits to be written."""
        ...

    @property
    def sealed(self) -> bool:
        """Keys were agreed."""
        ...

    def set_keys(self, key_id: int, sealer: Sealer, opener: Opener) -> None:
        """Seal what is sent from now on; call it right behind the send of KEYS.

        The first keys hold at once for what is received, later ones from the peer's first frame under them.
        """
        ...

    def bind(self, ack_slot: int) -> None:
        """From now on ACK and ACKS resolve in this ack slot without Python; -1 unbinds."""
        ...

    def set_pong(self, user_cursor: int) -> None:
        """What PONG says about the user's change index."""
        ...

    def send(self, frame: bytes) -> None:
        """Queue one encoded frame (at most 64 KiB) for the end of this tick."""
        ...

    def send_msg(self, tag: int, dup: bool, tail: bytes) -> None:
        """Queue a MSG built from the shared tail (`protocol.encode_msg_tail`)."""
        ...

    def close(self, code: int, reason: str = "") -> None:
        """Write what is queued, then a close frame; abort 1 s later if the peer is not done. Idempotent."""
        ...

    def abort(self) -> None:
        """Drop the socket and what is queued."""
        ...

    def buffered_bytes(self) -> int:
        """What is queued here plus the transport's write buffer."""
        ...

    def last_recv_ms(self) -> int:
        """Monotonic ms of the last frame received, of any kind."""
        ...


class Hub(Protocol):
    """One per node: what its links share."""

    accept: Callable[[Any], LinkOwner] | None
    """Gives a link that finished its upgrade its owner; None: nothing is taken yet."""
    on_acked: Callable[[], None]
    """Called at most once per tick when the ack table has something to drain."""
    on_fatal: Callable[[BaseException], None]
    """An exception that is our bug."""

    def now_ms(self) -> int:
        """The monotonic clock."""
        ...

    def link_at(self, slot: int) -> Link | None:
        """The open link that holds a wheel slot."""
        ...

    def sweep(self, mono_ms: int) -> int:
        """Call every 250 ms: ends links that are late with AUTH, with a fragmented message or with closing.

        Returns how many were ended.
        """
        ...
