"""Find the connections that have been silent for too long.

One u32 per connection, scanned as a whole: a million slots take 0.13 ms, a third of what a hashed wheel took,
and a touch is one store. Hides how time is kept: ms since a base that a sweep moves up, so nothing wraps for as
long as a sweep runs at least once in 24 days.

    free --add--> held --sweep--> reported --touch--> held;  held, reported --remove--> free

W1  a sweep reports exactly the held slots whose last touch is <= now - idle, each once
                                                                    tests/property/test_wheel_oracle.py
W2  a silent slot is reported within [idle, idle + time between sweeps]            same
W3  time in which this process stood still counts as nobody's silence              same
Source: semantics, "Heartbeat, resume, sync".
"""

cimport cython
from libc.stdint cimport UINT32_MAX
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from fastim._core cimport FASTIM_DEBUG

from fastim.errors import UsageError

DEBUG = bool(FASTIM_DEBUG)
cdef Py_ssize_t _live_wheels = 0


def live() -> dict[str, int]:
    """What is allocated now; zero unless DEBUG."""
    return {"wheels": _live_wheels}


@cython.final
cdef class Wheel:
    """Slots with the time of their last touch.

    stall_ms: a gap between two sweeps above this means that this process stood still; it is given to every slot
    as grace. A loop whose every gap is longer evicts nobody: sweep more often than stall_ms.
    """

    def __cinit__(self, *, uint64_t stall_ms=1000):
        global _live_wheels
        if stall_ms == 0:
            raise UsageError("stall_ms is 0; at least 1")
        self.stall_ms = stall_ms
        if FASTIM_DEBUG:
            _live_wheels += 1

    def __dealloc__(self):
        global _live_wheels
        free(self._stamps)
        free(self._free)
        if FASTIM_DEBUG and self.stall_ms != 0:
            _live_wheels -= 1

    def __len__(self):
        return self.count

    # -- slots

    def add(self, uint64_t mono_ms) -> int:
        """A slot, touched now. Freed slots are used again, the last first."""
        return self.add_c(mono_ms)

    cdef int add_c(self, uint64_t mono_ms) except -1:
        """As add. Raises UsageError when time goes backwards. O(1), but for growing."""
        cdef uint32_t slot
        self._advance(mono_ms)
        if self._free_count > 0:
            self._free_count -= 1
            slot = self._free[self._free_count]
        else:
            if self._top == self._capacity:
                self._grow()
            slot = self._top
            self._top += 1
        self._stamps[slot] = <uint32_t>(mono_ms - self._base_ms + 1)
        self.count += 1
        return <int>slot

    def touch(self, int slot, uint64_t mono_ms) -> None:
        """Something came in. Raises UsageError for a slot that is not held; touch_c leaves it alone."""
        self._check(slot)
        self.touch_c(slot, mono_ms)

    def remove(self, int slot) -> None:
        """Give the slot back. Raises UsageError when it is not held."""
        self.remove_c(slot)

    cdef int remove_c(self, int slot) except -1:
        self._check(slot)
        self._stamps[slot] = FREE
        self._free[self._free_count] = <uint32_t>slot
        self._free_count += 1
        self.count -= 1
        return 0

    cdef int _check(self, int slot) except -1:
        if <uint32_t>slot >= self._top or self._stamps[slot] == FREE:
            raise UsageError(f"slot {slot} is not held")
        return 0

    # -- the sweep

    def sweep(self, uint64_t mono_ms, uint64_t idle_ms, int cap) -> list[int]:
        """Slots whose last touch is <= mono_ms - idle_ms, at most cap, each once until touched or removed.

        Nothing when this process stood still since the last sweep. Raises UsageError (a ValueError) when time
        goes backwards, when cap < 1, when idle_ms is 0 or above 12 days.
        """
        cdef uint32_t* out
        cdef int found, i
        if cap < 1:
            raise UsageError(f"cap is {cap}; at least 1")
        # No more than `count` can be found, so a generous cap allocates nothing to match.
        cap = cap if cap < self.count else self.count
        out = <uint32_t*>malloc(<size_t>(cap if cap > 0 else 1) * sizeof(uint32_t))
        if out == NULL:
            raise MemoryError()
        try:
            found = self.sweep_c(mono_ms, idle_ms, out, cap)
            return [out[i] for i in range(found)]
        finally:
            free(out)

    cdef int sweep_c(self, uint64_t mono_ms, uint64_t idle_ms, uint32_t* out, int cap) except -1:
        """Write what sweep returns into `out` (caller-owned, room for cap); 0..cap, cap means "call again".

        O(slots ever held at once), allocates nothing.
        """
        cdef uint64_t swept_ms = self._swept_ms
        cdef bint swept = self._swept
        cdef uint32_t limit, slot
        cdef int found = 0
        if not 0 < idle_ms <= KEEP_MS:
            raise UsageError(f"idle_ms is {idle_ms:,}; limits 1 and {<uint64_t>KEEP_MS:,}")
        self._advance(mono_ms)
        self._swept = True
        self._swept_ms = mono_ms
        if swept and mono_ms - swept_ms > self.stall_ms:
            self._shift(mono_ms - swept_ms, mono_ms)
            return 0
        if mono_ms - self._base_ms < idle_ms:
            return 0
        # stamp - 1 is the time of the touch; FREE and REPORTED become the greatest values and fail the test.
        limit = <uint32_t>(mono_ms - self._base_ms - idle_ms) + 1
        for slot in range(self._top):
            if <uint32_t>((self._stamps[slot] + <uint64_t>UINT32_MAX) & UINT32_MAX) < limit:
                if found == cap:
                    break
                out[found] = slot
                found += 1
                self._stamps[slot] = REPORTED
        return found

    def grace(self, uint64_t mono_ms) -> None:
        """Count every held slot as touched now, so that nobody is reported for a whole idle_ms.

        A reported slot stays reported. Raises UsageError when time goes backwards.
        """
        self.grace_c(mono_ms)

    cdef int grace_c(self, uint64_t mono_ms) except -1:
        self._advance(mono_ms)
        self._swept = True
        self._swept_ms = mono_ms
        self._shift(KEEP_MS * <uint64_t>4, mono_ms)
        return 0

    # -- time and memory

    cdef int _advance(self, uint64_t mono_ms) except -1:
        """Take note of the time; move the base when it is far behind."""
        if not self._started:
            self._started = True
            self._base_ms = mono_ms
        elif mono_ms < self._last_ms:
            raise UsageError(f"mono_ms is {mono_ms}, which is before {self._last_ms}")
        self._last_ms = mono_ms
        if mono_ms - self._base_ms > REBASE_MS:
            self._rebase(mono_ms)
        return 0

    cdef void _rebase(self, uint64_t mono_ms) noexcept nogil:
        # A touch before the new base becomes a touch at the base, which any idle_ms still finds too old.
        cdef uint64_t by = mono_ms - self._base_ms - KEEP_MS
        cdef uint32_t slot, stamp
        for slot in range(self._top):
            stamp = self._stamps[slot]
            if stamp != FREE and stamp != REPORTED:
                self._stamps[slot] = stamp - <uint32_t>by if stamp > by else 1
        self._base_ms = self._base_ms + by

    cdef void _shift(self, uint64_t by_ms, uint64_t mono_ms) noexcept nogil:
        """Move the last touch of every held, unreported slot forward, but not beyond now."""
        cdef uint64_t now = mono_ms - self._base_ms + 1
        cdef uint32_t slot, stamp
        for slot in range(self._top):
            stamp = self._stamps[slot]
            if stamp != FREE and stamp != REPORTED:
                self._stamps[slot] = <uint32_t>(stamp + by_ms if stamp + by_ms < now else now)

    cdef int _grow(self) except -1:
        cdef uint32_t capacity = 64 if self._capacity == 0 else self._capacity * 2
        cdef void* grown
        if capacity > 1 << 30:
            raise UsageError(f"{self.count:,} slots are held; limit {1 << 30:,}")
        grown = realloc(self._stamps, capacity * sizeof(uint32_t))
        if grown == NULL:
            raise MemoryError()
        self._stamps = <uint32_t*>grown
        memset(self._stamps + self._capacity, FREE, (capacity - self._capacity) * sizeof(uint32_t))
        # As long as the stamps, so that giving a slot back never allocates.
        grown = realloc(self._free, capacity * sizeof(uint32_t))
        if grown == NULL:
            raise MemoryError()
        self._free = <uint32_t*>grown
        self._capacity = capacity
        return 0
