# Who has been silent for too long: one u32 per slot, scanned. See wheel.pyx.

cimport cython
from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    FREE = 0                    # stamp of a slot nobody holds
    REPORTED = 0xFFFFFFFF       # stamp of a slot a sweep has reported and nobody touched since
    NEWEST = 0xFFFFFFF0         # greatest stamp of a touch
    REBASE_MS = 0x80000000      # 24.8 days: base moves up when time is this far from it ...
    KEEP_MS = 0x40000000        # ... to this far before now; so idle_ms may be 12.4 days at most


@cython.final
cdef class Wheel:
    cdef:
        # Slots. A stamp is 1 + the ms from _base to the last touch.
        uint32_t* _stamps
        uint32_t* _free
        uint32_t _capacity
        uint32_t _top           # no slot at or above it was ever given out
        uint32_t _free_count
        readonly int count      # slots held

        # Time.
        uint64_t _base_ms
        uint64_t _last_ms       # newest time of add, sweep, grace
        uint64_t _swept_ms      # of the last sweep or grace
        bint _started
        bint _swept
        readonly uint64_t stall_ms

    cdef int add_c(self, uint64_t mono_ms) except -1
    cdef int remove_c(self, int slot) except -1
    cdef int sweep_c(self, uint64_t mono_ms, uint64_t idle_ms, uint32_t* out, int cap) except -1
    cdef int grace_c(self, uint64_t mono_ms) except -1

    # A slot that is not held is left alone: a late touch must not revive it.
    cdef inline void touch_c(self, int slot, uint64_t mono_ms) noexcept nogil:
        cdef uint64_t stamp = mono_ms - self._base_ms + 1 if mono_ms > self._base_ms else 1
        if <uint32_t>slot < self._top and self._stamps[slot] != FREE:
            self._stamps[slot] = <uint32_t>stamp if stamp < NEWEST else NEWEST

    cdef int _check(self, int slot) except -1
    cdef int _advance(self, uint64_t mono_ms) except -1
    cdef int _grow(self) except -1
    cdef void _rebase(self, uint64_t mono_ms) noexcept nogil
    cdef void _shift(self, uint64_t by_ms, uint64_t mono_ms) noexcept nogil
