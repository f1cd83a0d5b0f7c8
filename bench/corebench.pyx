"""Loops over the core's C functions, for bench/core.py: what Python cannot time. Never part of the product.

Every function does `count` operations or so and returns nanoseconds per operation.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from fastim._core.acks cimport AckTable, Entry
from fastim._core.cipher cimport TAG_BYTES, Opener, Sealer
from fastim._core.fanout cimport Fanout
from fastim._core.frame cimport MAX_FRAMES, frame_span, msg_prefix_c, parse_ack_c, pong_c, split_c
from fastim._core.sealed cimport SealedStream
from fastim._core.wheel cimport Wheel

ENTRY_BYTES = sizeof(Entry)
cdef volatile int64_t sink = 0


cdef inline double now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <double>now.tv_sec * 1e9 + <double>now.tv_nsec


cdef inline uint64_t dice(uint64_t* state) noexcept nogil:
    state[0] ^= state[0] << 13
    state[0] ^= state[0] >> 7
    state[0] ^= state[0] << 17
    return state[0]


cdef uint32_t* shuffled(uint32_t n) except NULL:
    """The numbers below n, in disorder."""
    cdef uint32_t* order = <uint32_t*>malloc(n * sizeof(uint32_t))
    cdef uint64_t state = 0x9E3779B97F4A7C15
    cdef uint32_t i, other, kept
    if order == NULL:
        raise MemoryError()
    for i in range(n):
        order[i] = i
    for i in range(n - 1, 0, -1):
        other = <uint32_t>(dice(&state) % (i + 1))
        kept = order[i]
        order[i] = order[other]
        order[other] = kept
    return order


# ------------------------------------------------------------------------------------------------ C1: frame


def split(bytes packet, int count) -> float:
    """Find the frames of a packet."""
    global sink
    cdef frame_span[MAX_FRAMES] spans
    cdef const uint8_t* p = <const uint8_t*>PyBytes_AS_STRING(packet)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(packet)
    cdef double start = now_ns()
    cdef int i
    for i in range(count):
        sink += split_c(p, n, spans, MAX_FRAMES)
    return (now_ns() - start) / count


def parse_ack(bytes frame, int count) -> float:
    global sink
    cdef const uint8_t* p = <const uint8_t*>PyBytes_AS_STRING(frame)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(frame)
    cdef double start = now_ns()
    cdef int i
    for i in range(count):
        sink += parse_ack_c(p, n)
    return (now_ns() - start) / count


def msg_head(int count) -> float:
    """The head of MSG, which every recipient has his own of."""
    global sink
    cdef uint8_t[16] out
    cdef double start = now_ns()
    cdef int i
    for i in range(count):
        msg_prefix_c(out, <uint32_t>i, i & 1)
        sink += out[8] + out[5]
    return (now_ns() - start) / count


def pong(int count) -> float:
    global sink
    cdef uint8_t[64] out
    cdef double start = now_ns()
    cdef int i
    for i in range(count):
        sink += pong_c(out, 1_790_000_000_000 + i, <uint32_t>i, 77)
    return (now_ns() - start) / count


# ----------------------------------------------------------------------------------------------- C2: cipher


def seal(Sealer sealer, int size, int count) -> float:
    cdef uint8_t[65_536] box
    cdef uint8_t[19] aad
    cdef double start = now_ns()
    cdef int i
    for i in range(count):
        sealer.seal_c(box, aad, 19, box, size)
    return (now_ns() - start) / count


def seal_and_open(Sealer sealer, Opener opener, int size, int count) -> float:
    """Both: a box can be opened once, by who has its counter."""
    cdef uint8_t[65_536] box
    cdef uint8_t[19] aad
    cdef double start = now_ns()
    cdef int i
    for i in range(count):
        sealer.seal_c(box, aad, 19, box, size)
        opener.open_c(box, sealer.counter, aad, 19, box, size + TAG_BYTES)
    return (now_ns() - start) / count


def seal_packet(SealedStream stream, int size, int count) -> float:
    """With its header, as a connection does."""
    cdef uint8_t[65_536 + 64] room
    cdef double start = now_ns()
    cdef int i
    for i in range(count):
        stream.seal_c(room + 32, size)
    return (now_ns() - start) / count


# ------------------------------------------------------------------------------------------------- C3: acks


cdef class InFlight:
    """An ack table with a window of `each` entries for each of `slots` sessions; sessions come in disorder."""

    cdef AckTable table
    cdef uint32_t slots
    cdef uint32_t* order
    cdef uint64_t at_ms
    cdef object item

    def __cinit__(self, uint32_t slots, uint32_t each):
        cdef uint32_t i
        self.table = AckTable()
        self.slots = slots
        self.order = shuffled(slots)
        self.at_ms = 1_000_000
        self.item = object()
        for i in range(slots):
            self.table.open_c()
        for i in range(each):
            self.insert()

    def __dealloc__(self):
        free(self.order)

    def entries(self) -> int:
        cdef uint32_t i
        cdef uint64_t sum = 0
        for i in range(self.slots):
            sum += self.table.unacked_c(<int>i)
        return sum

    def insert(self) -> float:
        """One more for everybody."""
        cdef AckTable table = self.table
        cdef uint32_t i
        cdef int slot
        cdef double start = now_ns()
        self.at_ms += 1
        for i in range(self.slots):
            slot = <int>self.order[i]
            table.insert_c(slot, table.last_tag_c(slot) + 1, self.at_ms, self.item, 128, self.at_ms)
        return (now_ns() - start) / self.slots

    def ack(self) -> float:
        """Everybody's oldest; the drain ring is emptied outside the time."""
        cdef AckTable table = self.table
        cdef uint32_t i = 0, until
        cdef int slot
        cdef double start, spent = 0
        while i < self.slots:
            until = i + 1_000 if i + 1_000 < self.slots else self.slots
            start = now_ns()
            while i < until:
                slot = <int>self.order[i]
                table.ack_to_c(slot, table.last_tag_c(slot) - table.unacked_c(slot) + 1)
                i += 1
            spent += now_ns() - start
            table.drain_c()
        return spent / self.slots

    def expire(self, uint32_t each) -> float:
        """Everybody's `each` oldest: find the sessions, take the entries, in order."""
        cdef AckTable table = self.table
        cdef uint32_t* late = <uint32_t*>malloc(self.slots * sizeof(uint32_t))
        cdef uint64_t mono_ms = self.at_ms - table.unacked_c(0) + each
        cdef double start = now_ns()
        cdef int found = table.overdue_c(mono_ms, late, <int>self.slots)
        cdef Py_ssize_t taken = 0
        cdef int i
        for i in range(found):
            taken += len(table.take_overdue_c(<int>late[i], mono_ms))
        start = now_ns() - start
        free(late)
        assert taken == self.slots * each, (taken, self.slots, each)
        return start / taken

    def take_all(self) -> float:
        """Close every session; per entry. The table is empty afterwards."""
        cdef Py_ssize_t taken = 0
        cdef uint32_t i
        cdef double start = now_ns()
        for i in range(self.slots):
            taken += len(self.table.close_c(<int>self.order[i]))
        return (now_ns() - start) / taken


# ------------------------------------------------------------------------------------------------ C4: wheel


cdef class Full:
    """A wheel with `slots` held."""

    cdef Wheel wheel
    cdef uint32_t slots
    cdef uint32_t* order
    cdef uint64_t mono_ms

    def __cinit__(self, uint32_t slots):
        cdef uint32_t i
        self.wheel = Wheel(stall_ms=1_000_000_000)
        self.slots = slots
        self.order = shuffled(slots)
        self.mono_ms = 1_000_000
        for i in range(slots):
            self.wheel.add_c(self.mono_ms)

    def __dealloc__(self):
        free(self.order)

    def touch(self) -> float:
        """Everybody, in disorder."""
        cdef Wheel wheel = self.wheel
        cdef uint32_t i
        cdef double start
        self.mono_ms += 1
        start = now_ns()
        for i in range(self.slots):
            wheel.touch_c(<int>self.order[i], self.mono_ms)
        return (now_ns() - start) / self.slots

    def sweep_ms(self) -> float:
        """One sweep that finds nobody, in milliseconds."""
        cdef uint32_t[64] out
        cdef double start
        self.mono_ms += 250
        self.touch()
        start = now_ns()
        assert self.wheel.sweep_c(self.mono_ms + 29_000, 30_000, out, 64) == 0
        self.mono_ms += 29_000
        return (now_ns() - start) / 1e6


# ----------------------------------------------------------------------------------------------- C5: fan-out


def publish(Fanout fan, bytes packet) -> tuple[float, int]:
    """Until the log is full: ns each, and how many were taken."""
    cdef int taken = 0
    cdef double start = now_ns()
    while fan.publish(packet):
        taken += 1
    return (now_ns() - start) / (taken + 1), taken
