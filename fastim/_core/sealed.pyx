"""The sealed stream of one connection: every packet one frame, numbered, under the key of its moment.

    packet ──seal──▶ [op, key_id, counter, box]        the bytes before the box are its associated data

Hides the layout of SEALED and SEALED_DOWN and when a key ends. The counter numbers the frames of a direction from
1 and goes on when the key changes, so that the first frame under a new key proves that none of the old was dropped:

    server  seals under the new key from the frame behind KEYS on, opens under the old until the peer's first new one
    client  does both from the frame behind KEYS on

D1  a frame is taken only under the key of its moment, and only with the counter after the last
D2  after the first frame under a new key the old one is gone
D3  whatever is wrong with a frame, the words are the same
    tests/unit/test_sealed_stream.py, tests/property/test_sealed_oracle.py
Source: semantics, "Encryption"; docs/protocol.md, "Sealing"; docs/adr/0031.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy

from fastim._core cimport FASTIM_DEBUG
from fastim._core.frame cimport (
    OP_SEALED,
    OP_SEALED_DOWN,
    parse_sealed_c,
    sealed_header_c,
    sealed_span,
)

from fastim.errors import PeerError, UsageError

DEBUG = bool(FASTIM_DEBUG)
cdef Py_ssize_t _live_streams = 0


def live() -> dict[str, int]:
    """What is allocated now; zero unless DEBUG."""
    return {"streams": _live_streams}


@cython.final
cdef class SealedStream:
    """client: which end this is. Both of the keys are new, and the stream's own from now on."""

    def __cinit__(self, uint32_t key_id, Sealer sealer not None, Opener opener not None, *, bint client):
        global _live_streams
        if FASTIM_DEBUG:
            _live_streams += 1
        sealer.start_c(0)
        opener.start_c(0)
        self._sealer = sealer
        self._opener = opener
        self.key_id = key_id
        self.open_key_id = key_id
        self._client = client
        self._op_out = OP_SEALED if client else OP_SEALED_DOWN
        self._op_in = OP_SEALED_DOWN if client else OP_SEALED

    def __dealloc__(self):
        global _live_streams
        if FASTIM_DEBUG:
            _live_streams -= 1

    @property
    def pending(self) -> bool:
        """The peer was given a new key and has not used it yet."""
        return self._next is not None

    @property
    def left(self) -> int:
        """Frames until a key ends, in the direction that is nearer to it."""
        return self.left_c()

    @property
    def used(self) -> int:
        """Frames under the keys of now, in the direction that has more."""
        return max(self._sealer.frames - self._sealer.left, self._opener.frames - self._opener.left)

    def seal(self, bytes packet not None) -> bytes:
        """The frame of a packet. Raises UsageError above MAX_INNER_BYTES, and when the key has ended."""
        cdef Py_ssize_t n = PyBytes_GET_SIZE(packet)
        cdef bytes frame = PyBytes_FromStringAndSize(NULL, SEALED_HEADER_BYTES + n + TAG_BYTES)
        cdef uint8_t* inner = <uint8_t*>PyBytes_AS_STRING(frame) + SEALED_HEADER_BYTES
        memcpy(inner, PyBytes_AS_STRING(packet), <size_t>n)
        self.seal_c(inner, n)
        return frame

    def open(self, bytes frame not None) -> bytes:
        """The packet of a frame. Raises PeerError("bad_seal"); the connection is then to be closed."""
        cdef Py_ssize_t n = PyBytes_GET_SIZE(frame)
        cdef bytes copy = PyBytes_FromStringAndSize(PyBytes_AS_STRING(frame), n)
        cdef uint8_t* p = <uint8_t*>PyBytes_AS_STRING(copy)
        cdef Py_ssize_t start = 0
        n = self.open_c(p, n, &start)
        return PyBytes_FromStringAndSize(<const char*>p + start, n)

    def renew(self, uint32_t key_id, Sealer sealer not None, Opener opener not None) -> None:
        """Change to new keys: at the server when KEYS was the last frame sealed, at the client when it came.

        Raises UsageError while the keys of the change before are still pending.
        """
        self.renew_c(key_id, sealer, opener)

    cdef int renew_c(self, uint32_t key_id, Sealer sealer, Opener opener) except -1:
        if self._next is not None:
            raise UsageError(f"key {self.open_key_id} is still in use; one change at a time")
        if key_id <= self.key_id:
            raise UsageError(f"key_id is {key_id}; must be above {self.key_id}")
        sealer.start_c(self._sealer.counter)
        self._sealer = sealer
        self.key_id = key_id
        if self._client:
            opener.start_c(self._opener.counter)
            self._opener = opener
            self.open_key_id = key_id
        else:
            self._next = opener
        return 0

    cdef uint64_t left_c(self) noexcept:
        cdef uint64_t out = self._sealer._end - self._sealer.counter
        cdef uint64_t within = self._opener._end - self._opener.counter
        return out if out < within else within

    cdef int seal_c(self, uint8_t* packet, Py_ssize_t n) except -1:
        """Turn the packet into its frame, in place: SEALED_HEADER_BYTES before it, TAG_BYTES behind it are ours.

        Raises as seal().
        """
        cdef uint8_t* header = packet - SEALED_HEADER_BYTES
        if n > MAX_INNER_BYTES:
            raise UsageError(f"the packet is {n:,} bytes; limit {MAX_INNER_BYTES:,} inside a seal")
        sealed_header_c(
            header, self._op_out, self.key_id, self._sealer.counter + 1, <unsigned short>(n + TAG_BYTES)
        )
        return self._sealer.seal_c(packet, header, SEALED_HEADER_BYTES, packet, n)

    cdef Py_ssize_t open_c(self, uint8_t* p, Py_ssize_t n, Py_ssize_t* start) except -1:
        """Open a packet that must be one frame, in place: its content is at p + start. Returns its size.

        Raises PeerError("bad_seal"); `p` is then as it was.
        """
        cdef sealed_span span
        cdef Opener opener
        if parse_sealed_c(p, n, self._op_in, &span) != 0:
            raise PeerError("bad_seal", "")
        if span.key_id == self.open_key_id:
            opener = self._opener
        elif self._next is not None and span.key_id == self.key_id:
            opener = self._next
            if opener.counter != self._opener.counter:
                opener.start_c(self._opener.counter)
        else:
            raise PeerError("bad_seal", "")
        try:
            opener.open_c(p + span.box, span.counter, p, span.box, p + span.box, span.size)
        except PeerError:
            raise PeerError("bad_seal", "") from None
        if opener is self._next:
            self._opener = opener
            self.open_key_id = self.key_id
            self._next = None
        start[0] = span.box
        return span.size - TAG_BYTES


globals().update(MAX_INNER_BYTES=MAX_INNER_BYTES)
