# One message to many links: built once, written without the GIL. See fanout.pyx.

cimport cython
from libc.stdint cimport int32_t, uint32_t, uint64_t

from fastim._core.conn cimport Audience, CoreConnection, CoreHub


cdef enum:
    BATCH_BYTES = 65_536        # written at once; one packet more than this is a batch of its own
    LOG_BYTES = 262_144         # of a log; what does not fit is refused
    MAX_BATCHES = 12            # two neighbours are above BATCH_BYTES together, so the log is full before
    NORMAL_BYTES = 65_536       # while more wait for a member, what may be skipped is; the rest up to hub.soft_bytes
    MAX_BUDGET_MS = 10_000


cdef struct Member:
    uint32_t slot               # of the hub's wheel
    uint32_t batch              # the newest that it was written, or must not get


cdef struct Late:
    # Who did not take a batch whole.
    uint32_t slot
    int32_t sent                # bytes that the kernel took; -1: none, or nobody asked it


cdef struct Batch:
    # Whole WebSocket frames, back to back in the log.
    uint32_t size
    uint32_t payload            # of it
    uint32_t messages
    bint high                   # one of them may not be skipped


@cython.final
cdef class Fanout(Audience):
    cdef:
        CoreHub _hub
        readonly uint32_t budget_ms

        # Members, dense. Where a link sits is in its Seat.
        Member* _members
        uint32_t _count
        uint32_t _capacity

        # What was published and is not written: the batches, back to back. NULL when there is nothing.
        char* _log
        Py_ssize_t _log_size
        Py_ssize_t _log_capacity
        Batch[MAX_BATCHES] _batches
        int _batch_count

        # The first batch on its way. Members are passed in a circle; whoever moved is caught by another round.
        bint _writing
        bint _moved
        readonly uint32_t batches   # begun so far: the number of that batch, or the last one
        uint32_t _start
        uint32_t _passed
        uint64_t _began_ms
        object _timer

        # Counters, in messages; none goes down.
        readonly uint64_t published, refused
        readonly uint64_t written, skipped      # times members
        readonly uint64_t cut                   # members closed for want of room

    cdef int _append(self, const char* p, Py_ssize_t n, bint high) except -1
    cdef bint _fits(self, Py_ssize_t size) noexcept
    cdef bint _joins(self, Py_ssize_t size) noexcept
    cdef int _room(self, Py_ssize_t more) except -1
    cdef int _plan(self) except -1
    cdef int _begin(self) except -1
    cdef int _finish(self) except -1
    cdef int _drop_timer(self) except -1
    cdef int _forget(self) except -1
    cdef int _send(self, CoreHub hub, Late* late, int most) except -1
    cdef int _count_written(self, CoreHub hub, const Batch* batch, uint32_t members) except -1
    cdef int _bring(self, CoreHub hub, Late* late, int count) except -1
