"""One message to many links: framed once, written once per member and batch, without the GIL.

Hides how members are kept, when a batch leaves and what becomes of those who cannot take it. What is published is
appended to a log of ready WebSocket frames. The hub's tick writes it, behind what the links themselves have queued:
one send(2) per member on plain sockets with nothing queued, at most 2,048 sends a tick so that a broadcast does not
hold the loop; everybody else (TLS, sealed, behind) through the link's own bounded queue.

 publish ──▶ log: [batch being written][batch][batch that grows]
                        │ plain, nothing queued ──▶ send(2)──▶ short ──▶ the link's transport has the rest
                        └ else ──▶ room in the link's queue? ──▶ yes: queued │ no: skipped and counted, or high: 4408

A first message leaves at the end of its tick; then budget_ms must pass before the next batch, which gathers what is
published meanwhile. So latency is 0 when idle, and under load there is one send per member and budget.

U1  a member gets every message published while it is one, once and in order, or it is counted as skipped, or closed
U2  nothing is written to who was removed, nor to who takes a slot later
U3  memory is bounded: a log of LOG_BYTES, and per member what a link's queue may hold
                                                    tests/unit/test_fanout.py, tests/property/test_fanout_oracle.py
A new member may also get what was published since the last batch before it came.
Source: performance, "The design that wins"; semantics, "Groups and rooms"; docs/adr/0011.
"""

cimport cython
from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from fastim._core cimport FASTIM_DEBUG
from fastim._core.conn cimport FIRST_OUT, OPEN, Seat
from fastim._core.sealed cimport MAX_INNER_BYTES

from fastim.errors import UsageError

cdef extern from "<sys/socket.h>" nogil:
    Py_ssize_t c_send "send"(int fd, const void* buf, size_t n, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

DEBUG = bool(FASTIM_DEBUG)
globals().update(
    BATCH_BYTES=BATCH_BYTES, LOG_BYTES=LOG_BYTES, NORMAL_BYTES=NORMAL_BYTES, MAX_BUDGET_MS=MAX_BUDGET_MS
)
cdef Py_ssize_t _live_fanouts = 0
cdef Py_ssize_t _live_logs = 0

cdef enum:
    FIRST_MEMBERS = 8
    AT_ONCE = 2_048             # sends between two looks at who was late
    ALONE = 4                   # fewer sends are not worth giving up the GIL
    STEP = 2_048                # how far the start moves with every batch: nobody is always last
    CLOSE_SLOW = 4408


def live() -> dict[str, int]:
    """What is allocated now; zero unless DEBUG."""
    return {"fanouts": _live_fanouts, "logs": _live_logs}


cdef inline uint64_t _now_ms() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>now.tv_nsec // 1_000_000


cdef int _send_round(
    Member* members, uint32_t count, uint32_t start, uint32_t* passed, uint32_t batch,
    const int* fds, const char* p, size_t n, int most, int* late_count, Late* late
) noexcept nogil:
    """Go on in the circle until `most` members were served or it is closed; how many were served.

    Nothing but system calls: no member, link or log changes meanwhile.
    """
    cdef uint32_t at = start + passed[0] if start + passed[0] < count else start + passed[0] - count
    cdef uint32_t left = count - passed[0]
    cdef int served = 0, behind = 0
    cdef int fd
    cdef Py_ssize_t sent
    while left > 0 and served < most:
        if members[at].batch != batch:
            members[at].batch = batch
            served += 1
            fd = fds[members[at].slot]
            sent = c_send(fd, p, n, MSG_DONTWAIT | MSG_NOSIGNAL) if fd >= 0 else -1
            if sent != <Py_ssize_t>n:
                late[behind].slot = members[at].slot
                # After an error nothing was taken; the transport meets the same one and ends the link.
                late[behind].sent = <int32_t>sent
                behind += 1
        left -= 1
        at += 1
        if at == count:
            at = 0
    passed[0] = count - left
    late_count[0] = behind
    return served


@cython.final
cdef class Fanout(Audience):
    """budget_ms: the longest time that a message waits for others under load."""

    def __cinit__(self, CoreHub hub not None, uint32_t budget_ms=0):
        global _live_fanouts
        if FASTIM_DEBUG:
            _live_fanouts += 1
        if budget_ms > MAX_BUDGET_MS:
            raise UsageError(f"budget_ms is {budget_ms:,}; limit {MAX_BUDGET_MS:,}")
        self._hub = hub
        self.budget_ms = budget_ms

    def __dealloc__(self):
        global _live_fanouts, _live_logs
        # The hub keeps it while it has members, so none is left but those of a hub that is garbage itself.
        free(self._members)
        if self._log != NULL:
            free(self._log)
            self._log = NULL
            if FASTIM_DEBUG:
                _live_logs -= 1
        if FASTIM_DEBUG:
            _live_fanouts -= 1

    def __len__(self):
        return self._count

    @property
    def waiting(self) -> int:
        """Bytes that were published and are not yet written to everybody."""
        return self._log_size

    def __contains__(self, CoreConnection link not None):
        return self.number >= 0 and link.hub is self._hub and link._seat_in(self.number) != NULL

    # -- members

    def add(self, CoreConnection link not None) -> None:
        """A no-op for a member and for a link that is closed. O(audiences of the link), allocates as it grows."""
        cdef uint32_t capacity
        cdef void* grown
        if link.hub is not self._hub:
            raise UsageError("the link is of another hub")
        if link._state != OPEN or (self.number >= 0 and link._seat_in(self.number) != NULL):
            return
        if self._count == self._capacity:
            capacity = FIRST_MEMBERS if self._capacity == 0 else self._capacity * 2
            grown = realloc(self._members, capacity * sizeof(Member))
            if grown == NULL:
                raise MemoryError()
            self._members = <Member*>grown
            self._capacity = capacity
        if self.number < 0:
            self._hub._enlist(self)
        try:
            link._sit_down(self.number, self._count)
        except MemoryError:
            if self._count == 0:
                self._hub._delist(self)
            raise
        self._members[self._count].slot = <uint32_t>link.slot
        # What is being written was published before.
        self._members[self._count].batch = self.batches
        self._count += 1

    def remove(self, CoreConnection link not None) -> None:
        """Nothing more is written to it, not even what was published. A no-op unless it is a member."""
        cdef Seat* seat
        cdef uint32_t index
        if self.number < 0 or link.hub is not self._hub:
            return
        seat = link._seat_in(self.number)
        if seat != NULL:
            index = seat.index
            link._get_up(seat)
            self._left(index)

    def clear(self) -> None:
        """Remove everybody and forget what was published."""
        cdef CoreConnection link
        while self._count > 0:
            link = self._hub._links[self._members[self._count - 1].slot]
            link._get_up(link._seat_in(self.number))
            self._left(self._count - 1)

    cdef int _left(self, uint32_t index) except -1:
        """The last member takes the place; another round catches whom this moved past the circle's hand."""
        cdef CoreConnection last
        self._count -= 1
        self._moved = True
        if index != self._count:
            self._members[index] = self._members[self._count]
            last = self._hub._links[self._members[index].slot]
            last._seat_in(self.number).index = index
        if self._count == 0:
            self._forget()
            self._hub._delist(self)
        return 0

    # -- the log

    def publish(self, bytes packet not None, *, bint high=False) -> bool:
        """One packet of whole frames for every member. high: nobody is skipped.

        False when it was refused, because LOG_BYTES wait to be written; the caller tells the sender to come again.
        Raises UsageError outside 2..65,501 bytes, so that it also fits inside a seal. Never calls an owner.
        O(bytes); the members are written by the tick.
        """
        cdef Py_ssize_t n = PyBytes_GET_SIZE(packet)
        if n < 2 or n > MAX_INNER_BYTES:
            raise UsageError(f"the packet is {n:,} bytes; limits 2 and {MAX_INNER_BYTES:,}")
        self.published += 1
        if self._count == 0:
            return True
        if not self._fits(n + 2 if n < 126 else n + 4):
            self.refused += 1
            return False
        self._append(PyBytes_AS_STRING(packet), n, high)
        self._plan()
        return True

    cdef bint _fits(self, Py_ssize_t size) noexcept:
        return self._log_size + size <= LOG_BYTES and (self._batch_count < MAX_BATCHES or self._joins(size))

    cdef bint _joins(self, Py_ssize_t size) noexcept:
        """Whether the last batch may grow by so much."""
        cdef int last = self._batch_count - 1
        cdef int first = 1 if self._writing else 0
        return last >= first and self._batches[last].size + size <= BATCH_BYTES

    cdef int _append(self, const char* p, Py_ssize_t n, bint high) except -1:
        """Write the WebSocket frame behind the log, into the last batch or a new one."""
        cdef Py_ssize_t size = n + 2 if n < 126 else n + 4
        cdef Batch* batch
        cdef char* out
        self._room(size)
        if not self._joins(size):
            memset(&self._batches[self._batch_count], 0, sizeof(Batch))
            self._batch_count += 1
        batch = &self._batches[self._batch_count - 1]
        out = self._log + self._log_size
        out[0] = <char>0x82
        if n < 126:
            out[1] = <char>n
        else:
            out[1] = 126
            out[2] = <char>(n >> 8)
            out[3] = <char>(n & 0xFF)
        memcpy(out + size - n, p, <size_t>n)
        self._log_size += size
        batch.size += <uint32_t>size
        batch.payload += <uint32_t>n
        batch.messages += 1
        batch.high = batch.high or high
        return 0

    cdef int _room(self, Py_ssize_t more) except -1:
        global _live_logs
        cdef Py_ssize_t capacity = self._log_capacity
        cdef void* grown
        if self._log == NULL:
            self._log = self._hub._take_buffer()
            if self._log == NULL:
                raise MemoryError()
            capacity = FIRST_OUT
            self._log_capacity = capacity
            if FASTIM_DEBUG:
                _live_logs += 1
        if self._log_size + more <= capacity:
            return 0
        while capacity < self._log_size + more:
            capacity *= 2
        grown = realloc(self._log, <size_t>capacity)
        if grown == NULL:
            raise MemoryError()
        self._log = <char*>grown
        self._log_capacity = capacity
        return 0

    cdef int _forget(self) except -1:
        """Nobody is left to write to."""
        global _live_logs
        self._log_size = 0
        self._batch_count = 0
        self._writing = False
        self._drop_timer()
        if self._log != NULL:
            self._hub._give_buffer(self._log, self._log_capacity)
            self._log = NULL
            self._log_capacity = 0
            if FASTIM_DEBUG:
                _live_logs -= 1
        return 0

    # -- when

    cdef int _plan(self) except -1:
        """Something waits: have the tick write it, now or when the budget of the batch before is over."""
        cdef uint64_t now_ms
        if self.due:
            return 0
        if self.budget_ms > 0 and self._batch_count == 1:
            if self._timer is not None:
                return 0
            now_ms = _now_ms()
            if now_ms < self._began_ms + self.budget_ms:
                self._timer = self._hub._loop.call_later(
                    (self._began_ms + self.budget_ms - now_ms) / 1000.0, self._on_time
                )
                return 0
        self._hub._make_due(self)
        return 0

    def _on_time(self) -> None:
        self._timer = None
        self._hub._make_due(self)

    cdef int _drop_timer(self) except -1:
        timer = self._timer
        if timer is not None:
            self._timer = None
            timer.cancel()
        return 0

    # -- writing

    cdef int _write_some(self, int most) except -1:
        """Go on with the batch on its way, or begin the next; what remains is planned again."""
        cdef Late[AT_ONCE] late
        cdef CoreHub hub = self._hub
        cdef int served = 0
        if self._batch_count == 0:
            return 0
        if not self._writing:
            self._begin()
        while served < most and self._writing:
            if self._moved:
                # Whoever was moved may be where the hand has passed: once more round, past those who have it.
                self._moved = False
                self._start = 0
                self._passed = 0
            served += self._send(hub, late, most - served if most - served < AT_ONCE else AT_ONCE)
            if self._writing and self._passed == self._count and not self._moved:
                self._finish()
        if self._writing:
            hub._make_due(self)
        return served

    cdef int _send(self, CoreHub hub, Late* late, int most) except -1:
        cdef Batch batch = self._batches[0]
        cdef int behind = 0
        cdef int served
        cdef Member* members = self._members
        cdef uint32_t count = self._count, start = self._start, passed = self._passed, number = self.batches
        cdef const int* fds = hub._fds
        cdef const char* p = self._log
        if count >= ALONE:
            with nogil:
                served = _send_round(
                    members, count, start, &passed, number, fds, p, batch.size, most, &behind, late
                )
        else:
            served = _send_round(
                members, count, start, &passed, number, fds, p, batch.size, most, &behind, late
            )
        self._passed = passed
        self._count_written(hub, &batch, <uint32_t>(served - behind))
        if behind > 0:
            self._bring(hub, late, behind)
        return served

    cdef int _count_written(self, CoreHub hub, const Batch* batch, uint32_t members) except -1:
        cdef uint64_t messages = <uint64_t>members * batch.messages
        self.written += messages
        hub.packets_out += messages
        hub.frames_out += messages
        hub.bytes_out += <uint64_t>members * batch.payload
        return 0

    cdef int _begin(self) except -1:
        self._writing = True
        self._moved = False
        self.batches += 1
        self._start = (self._start + STEP) % self._count
        self._passed = 0
        self._began_ms = _now_ms()
        return self._drop_timer()

    cdef int _finish(self) except -1:
        """Everybody was served: the next batch moves up."""
        cdef int i
        cdef Py_ssize_t size = self._batches[0].size
        self._writing = False
        for i in range(1, self._batch_count):
            self._batches[i - 1] = self._batches[i]
        self._batch_count -= 1
        self._log_size -= size
        if self._batch_count == 0:
            return self._forget()
        memmove(self._log, self._log + size, <size_t>self._log_size)
        return self._plan()

    cdef int _bring(self, CoreHub hub, Late* late, int count) except -1:
        """Those whom send(2) did not serve whole."""
        cdef CoreConnection link
        cdef Batch batch = self._batches[0]
        cdef Py_ssize_t size = batch.size
        cdef Py_ssize_t most = hub.soft_bytes if batch.high else NORMAL_BYTES
        cdef object view = PyMemoryView_FromMemory(self._log, size, PyBUF_READ)
        cdef bint taken
        cdef int i
        for i in range(count):
            link = hub._links[late[i].slot]
            # An error of another link may have run anybody's code.
            if link is None or link._state != OPEN or not self._writing:
                continue
            try:
                taken = True
                if late[i].sent > 0:
                    link._give_transport(self._log + late[i].sent, size - late[i].sent)
                else:
                    taken = link.take_c(self._log, size, view, most)
                if taken:
                    self._count_written(hub, &batch, 1)
                elif batch.high:
                    self.cut += 1
                    link.close_c(CLOSE_SLOW, b"no room for a message that is not skipped")
                else:
                    self.skipped += batch.messages
            except BaseException as error:
                link._broken(error)
        view.release()
        return 0
