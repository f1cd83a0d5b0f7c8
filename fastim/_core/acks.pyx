"""The ack table of a node: what each session was sent and has not acknowledged.

A slot per session holds a ring of 32-byte entries; tags are consecutive, so a tag is an index. Resolved items
wait on one ring for the whole table, which Python drains once per loop tick. Hides memory, reference counts and
how deadlines are kept: ms since a base that `overdue` moves up, so nothing wraps while it runs at least once in
24 days.

A1  every inserted item leaves exactly once: by drain, take_overdue or close
                                                                     tests/property/test_acks_oracle.py
A2  an ack never resolves what was not sent, and a repeated one resolves nothing          same
A3  the table owns one reference per item from insert until it leaves                     tests/unit/test_acks.py
A4  an item may reach the table again: the collector sees through it                      same
Handing out or dropping an item can run any Python code, which may use this table. So every loop below first takes
an item out of the table and makes the table whole, and only then touches the item's reference count or allocates.
Source: semantics, "Deliver and ack"; performance, C3.
"""

cimport cython
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.object cimport PyTypeObject, inquiry, traverseproc
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from fastim._core cimport FASTIM_DEBUG

from fastim.errors import PeerError, UsageError

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment, size_t size)

DEBUG = bool(FASTIM_DEBUG)
cdef Py_ssize_t _live_tables = 0
cdef Py_ssize_t _live_items = 0     # references the tables own
cdef Py_ssize_t _live_rings = 0

cdef enum:
    FIRST_RING = 8              # entries; 256 bytes, kept by an idle session once it was sent something
    KEPT_RING = 32              # a larger ring is freed when the session has acked everything
    KEPT_RESOLVED = 4096        # likewise the drain ring
    MAX_RING = 1_048_576        # entries; the window of a session is 128, this bounds a caller's mistake
    MAX_SLOTS = 16_777_216
    LINE_BYTES = 64
    MAX_STAMP = 0xFFFFFFF0


def live() -> dict[str, int]:
    """What is allocated now; zero unless DEBUG."""
    return {"tables": _live_tables, "items": _live_items, "rings": _live_rings}


cdef inline void _take_reference(object item) noexcept:
    global _live_items
    Py_INCREF(item)
    if FASTIM_DEBUG:
        _live_items += 1


cdef inline void _gave_reference() noexcept nogil:
    global _live_items
    if FASTIM_DEBUG:
        _live_items -= 1


cdef inline Entry* _at(Slot* s, uint32_t offset) noexcept nogil:
    """The entry `offset` after the oldest; offset < size."""
    return &s.ring[(s.head + offset) & s.mask]


cdef void _free_ring(Slot* s) noexcept nogil:
    global _live_rings
    if s.ring != NULL:
        free(s.ring)
        s.ring = NULL
        s.mask = 0
        s.head = 0
        if FASTIM_DEBUG:
            _live_rings -= 1


@cython.final
cdef class AckTable:
    """See the module; slots are reused, the last freed first."""

    def __cinit__(self):
        global _live_tables
        if FASTIM_DEBUG:
            _live_tables += 1

    def __dealloc__(self):
        global _live_tables
        self._release()
        free(self._slots)
        free(self._oldest)
        free(self._free)
        if FASTIM_DEBUG:
            _live_tables -= 1

    def __len__(self):
        return self.count

    # -- slots

    def open(self) -> int:
        """An empty slot."""
        return self.open_c()

    cdef int open_c(self) except -1:
        cdef uint32_t slot
        if self._free_count > 0:
            self._free_count -= 1
            slot = self._free[self._free_count]
        else:
            if self._top == self._capacity:
                self._grow_slots()
            slot = self._top
            self._top += 1
        memset(&self._slots[slot], 0, sizeof(Slot))
        self._slots[slot].is_open = True
        self._slots[slot].ascending = True
        self._oldest[slot] = 0
        self.count += 1
        return <int>slot

    def close(self, int slot) -> list:
        """Free the slot; its unacked items, oldest first. What it resolved before stays on the drain ring."""
        return self.close_c(slot)

    cdef list close_c(self, int slot):
        cdef Slot* s = self._open_slot(slot)
        cdef Slot closed
        cdef Entry* entry
        cdef list out
        cdef uint32_t offset
        cdef Py_ssize_t filled = 0
        cdef uint32_t unacked
        while True:
            unacked = s.unacked
            out = PyList_New(unacked)
            # A collection inside PyList_New may have used this slot.
            s = self._open_slot(slot)
            if s.unacked == unacked:
                break
        closed = s[0]
        memset(s, 0, sizeof(Slot))
        self._oldest[slot] = 0
        self._free[self._free_count] = <uint32_t>slot
        self._free_count += 1
        self.count -= 1
        for offset in range(closed.size):
            entry = _at(&closed, offset)
            if entry.state == UNACKED:
                PyList_SET_ITEM(out, filled, <object>entry.item)  # takes over the table's reference
                _gave_reference()
                filled += 1
        _free_ring(&closed)
        return out

    cdef Slot* _open_slot(self, int slot) except NULL:
        if <uint32_t>slot >= self._top or not self._slots[slot].is_open:
            raise UsageError(f"ack slot {slot} is not open")
        return &self._slots[slot]

    # -- entries

    def insert(
        self, int slot, uint32_t tag, uint64_t msg_id, object item, uint32_t nbytes, uint64_t deadline_ms
    ) -> None:
        """Remember that `item` was sent under `tag`: the slot's last tag + 1, or any for its first.

        msg_id 0 means that it can only be acked by tag; nbytes is what counts against the window.
        Raises UsageError for a tag out of turn, a full ring, a deadline of 0 or 24 days ahead.
        """
        self.insert_c(slot, tag, msg_id, item, nbytes, deadline_ms)

    cdef int insert_c(
        self, int slot, uint32_t tag, uint64_t msg_id, object item, uint32_t nbytes, uint64_t deadline_ms
    ) except -1:
        """As insert. O(1), allocates when the ring grows; its capacity stays between sends."""
        cdef Slot* s = self._open_slot(slot)
        cdef Entry* entry
        cdef uint32_t deadline
        if tag == 0 or (s.last_tag != 0 and tag != <uint64_t>s.last_tag + 1):
            raise UsageError(f"tag {tag} does not follow {s.last_tag}, the last tag of ack slot {slot}")
        if deadline_ms == 0:
            raise UsageError("deadline_ms is 0; at least 1")
        if not self._started:
            self._started = True
            self._base_ms = deadline_ms - KEEP_MS if deadline_ms > KEEP_MS else 0
        if deadline_ms > self._base_ms and deadline_ms - self._base_ms >= MAX_STAMP:
            raise UsageError(f"deadline_ms is {deadline_ms:,}; limit {self._base_ms + MAX_STAMP - 1:,}")
        if s.ring == NULL or s.size > s.mask:
            self._grow_ring(s)
        deadline = self._stamp(deadline_ms)
        if deadline >= s.newest_deadline:
            s.newest_deadline = deadline
        else:
            s.ascending = False
        if self._oldest[slot] == 0 or deadline < self._oldest[slot]:
            self._oldest[slot] = deadline
        entry = _at(s, s.size)
        entry.tag = tag
        entry.deadline = deadline
        entry.nbytes = nbytes
        entry.state = UNACKED
        entry.msg_id = msg_id
        entry.item = <PyObject*>item
        _take_reference(item)
        s.size += 1
        s.last_tag = tag
        s.unacked += 1
        s.unacked_bytes += nbytes
        return 0

    def ack_to(self, int slot, uint32_t tag) -> int:
        """Resolve everything up to and including `tag`; how many that were, 0 for an old tag.

        Raises PeerError("bad_ack") for a tag that was never sent.
        """
        return self.ack_to_c(slot, tag)

    cdef int ack_to_c(self, int slot, uint32_t tag) except -1:
        """As ack_to. O(resolved); the oldest deadline costs O(window) only if deadlines went down."""
        cdef Slot* s = self._open_slot(slot)
        cdef uint32_t first, offset
        cdef uint32_t unacked = s.unacked
        cdef Entry* entry
        if tag > s.last_tag:
            raise PeerError("bad_ack", f"tag {tag} was never sent; last {s.last_tag}")
        if s.size == 0:
            return 0
        first = s.last_tag - s.size + 1
        if tag < first:
            return 0
        self._reserve(unacked)
        for offset in range(tag - first + 1):
            entry = _at(s, offset)
            if entry.state == UNACKED:
                self._resolve(<uint32_t>slot, entry)
        self._settle(<uint32_t>slot)
        return <int>(unacked - s.unacked)

    def ack_ids(self, int slot, list msg_ids not None) -> int:
        """Resolve single messages, in any order; how many entries that were.

        An id that is not in the window counts 0: the entry may have been acked, or taken, just before.
        """
        cdef int resolved = 0
        self._open_slot(slot)
        for msg_id in msg_ids:
            resolved += self.ack_id_c(slot, msg_id)
        return resolved

    cdef int ack_id_c(self, int slot, uint64_t msg_id) except -1:
        """Resolve every unacked entry of one message. O(window)."""
        cdef Slot* s = self._open_slot(slot)
        cdef uint32_t offset
        cdef uint32_t unacked = s.unacked
        cdef Entry* entry
        if msg_id == 0 or unacked == 0:
            return 0
        self._reserve(unacked)
        for offset in range(s.size):
            entry = _at(s, offset)
            if entry.state == UNACKED and entry.msg_id == msg_id:
                self._resolve(<uint32_t>slot, entry)
        if s.unacked != unacked:
            self._settle(<uint32_t>slot)
        return <int>(unacked - s.unacked)

    # -- the drain ring

    @property
    def pending_drain(self) -> bool:
        """Whether drain would return something."""
        return self.pending_drain_c()

    def drain(self) -> list[tuple[int, object]]:
        """(slot, item) of everything resolved since the last drain, in the order it was resolved.

        A slot may have been closed, and opened for another session, since.
        """
        return self.drain_c()

    cdef list drain_c(self):
        cdef Resolved* taken = self._resolved
        cdef Py_ssize_t count = self._resolved_count
        cdef Py_ssize_t capacity = self._resolved_capacity
        cdef Py_ssize_t i = 0
        cdef list out = []
        if count != self._resolved_count:   # a collection in the line above resolved more
            taken = self._resolved
            count = self._resolved_count
            capacity = self._resolved_capacity
        if count == 0:
            return out
        self._resolved = NULL
        self._resolved_count = 0
        self._resolved_capacity = 0
        try:
            while i < count:
                out.append((taken[i].slot, <object>taken[i].item))
                i += 1
                _gave_reference()
                Py_DECREF(<object>taken[i - 1].item)
        finally:
            # Only after a MemoryError is something left; dropping it costs a repeat, keeping it the order.
            while i < count:
                i += 1
                _gave_reference()
                Py_DECREF(<object>taken[i - 1].item)
            if self._resolved == NULL and capacity <= KEPT_RESOLVED:
                self._resolved = taken
                self._resolved_capacity = capacity
            else:
                free(taken)
        return out

    # -- deadlines

    def overdue(self, uint64_t mono_ms, int cap) -> list[int]:
        """At most cap slots with an unacked entry whose deadline is <= mono_ms, lowest slot first.

        A slot is reported until its overdue entries are taken or acked, or it is closed.
        Raises UsageError when cap < 1.
        """
        cdef uint32_t* out
        cdef int found, i
        if cap < 1:
            raise UsageError(f"cap is {cap}; at least 1")
        cap = cap if cap < self.count else self.count
        out = <uint32_t*>malloc(<size_t>(cap if cap > 0 else 1) * sizeof(uint32_t))
        if out == NULL:
            raise MemoryError()
        try:
            found = self.overdue_c(mono_ms, out, cap)
            return [out[i] for i in range(found)]
        finally:
            free(out)

    cdef int overdue_c(self, uint64_t mono_ms, uint32_t* out, int cap) except -1:
        """Write what overdue returns into `out` (caller-owned, room for cap). O(slots ever open at once)."""
        cdef uint32_t limit, slot
        cdef int found = 0
        if not self._started:
            return 0
        if mono_ms > self._base_ms and mono_ms - self._base_ms > REBASE_MS:
            self._rebase(mono_ms)
        limit = self._limit(mono_ms)
        for slot in range(self._top):
            if found == cap:
                break
            if 0 < self._oldest[slot] <= limit:
                out[found] = slot
                found += 1
        return found

    def take_overdue(self, int slot, uint64_t mono_ms) -> list:
        """Remove the unacked entries whose deadline is <= mono_ms; their items, oldest tag first.

        They do not go to the drain ring; a later ack of their tag resolves nothing.
        """
        return self.take_overdue_c(slot, mono_ms)

    cdef list take_overdue_c(self, int slot, uint64_t mono_ms):
        cdef Slot* s = self._open_slot(slot)
        cdef Entry* entry
        cdef list out
        cdef uint32_t offset, due, limit
        cdef Py_ssize_t filled = 0
        while True:
            due = self._due(s, mono_ms)
            out = PyList_New(due)
            # A collection inside PyList_New may have used this slot.
            s = self._open_slot(slot)
            if self._due(s, mono_ms) == due:
                break
        if due == 0:
            return out
        limit = self._limit(mono_ms)
        for offset in range(s.size):
            entry = _at(s, offset)
            if entry.state == UNACKED and entry.deadline <= limit:
                PyList_SET_ITEM(out, filled, <object>entry.item)  # takes over the table's reference
                _gave_reference()
                filled += 1
                self._forget(s, entry)
                if filled == due:
                    break
        self._settle(<uint32_t>slot)
        return out

    # -- looking

    def unacked(self, int slot) -> tuple[int, int]:
        """(entries, bytes) of the slot's window."""
        cdef Slot* s = self._open_slot(slot)
        return (s.unacked, s.unacked_bytes)

    def items(self, int slot) -> list[tuple[int, object]]:
        """(tag, item) of the unacked entries, in the order of their tags."""
        cdef Slot* s
        cdef Entry* entry
        cdef list out = []
        cdef uint64_t tag = 0
        while True:
            # Every append may run a collection, so the slot is looked up anew.
            s = self._open_slot(slot)
            if tag + s.size <= s.last_tag:
                tag = <uint64_t>s.last_tag - s.size + 1
            if s.size == 0 or tag > s.last_tag:
                return out
            entry = _at(s, <uint32_t>(tag + s.size - 1 - s.last_tag))
            if entry.state == UNACKED:
                out.append((tag, <object>entry.item))
            tag += 1

    def oldest_deadline(self, int slot) -> int:
        """The earliest deadline of the unacked entries, 0 when there is none."""
        self._open_slot(slot)
        if self._oldest[slot] == 0:
            return 0
        return self._base_ms + self._oldest[slot] - 1

    def last_tag(self, int slot) -> int:
        """The newest tag inserted, 0 when none was."""
        return self._open_slot(slot).last_tag

    # -- inside

    cdef void _forget(self, Slot* s, Entry* entry) noexcept nogil:
        """The entry is done and its item has left it; call _settle afterwards."""
        entry.item = NULL
        entry.state = DONE
        s.unacked -= 1
        s.unacked_bytes -= entry.nbytes

    cdef void _resolve(self, uint32_t slot, Entry* entry) noexcept nogil:
        """Move the item to the drain ring, which has room (_reserve)."""
        self._resolved[self._resolved_count].slot = slot
        self._resolved[self._resolved_count].item = entry.item
        # Not += : without the GIL, Cython's None check of the debug build refuses it.
        self._resolved_count = self._resolved_count + 1
        self._forget(&self._slots[slot], entry)

    cdef void _settle(self, uint32_t slot) noexcept nogil:
        """After entries became DONE: drop those at the head, find the oldest deadline."""
        cdef Slot* s = &self._slots[slot]
        cdef Entry* entry
        cdef uint32_t offset, oldest
        while s.size > 0 and s.ring[s.head].state == DONE:
            s.head = (s.head + 1) & s.mask
            s.size -= 1
        if s.size == 0:
            self._oldest[slot] = 0
            s.newest_deadline = 0
            s.ascending = True
            if s.mask >= KEPT_RING:
                _free_ring(s)
        elif s.ascending:
            self._oldest[slot] = s.ring[s.head].deadline
        else:
            oldest = MAX_STAMP
            for offset in range(s.size):
                entry = _at(s, offset)
                if entry.state == UNACKED and entry.deadline < oldest:
                    oldest = entry.deadline
            self._oldest[slot] = oldest

    cdef int _reserve(self, Py_ssize_t more) except -1:
        cdef Py_ssize_t capacity = self._resolved_capacity
        cdef void* grown
        if self._resolved_count + more <= capacity:
            return 0
        capacity = 64 if capacity == 0 else capacity
        while capacity < self._resolved_count + more:
            capacity *= 2
        grown = realloc(self._resolved, <size_t>capacity * sizeof(Resolved))
        if grown == NULL:
            raise MemoryError()
        self._resolved = <Resolved*>grown
        self._resolved_capacity = capacity
        return 0

    cdef int _grow_ring(self, Slot* s) except -1:
        global _live_rings
        cdef uint32_t capacity = FIRST_RING if s.ring == NULL else (s.mask + 1) * 2
        cdef uint32_t behind
        cdef Entry* grown
        if capacity > MAX_RING:
            raise UsageError(f"{s.size:,} entries wait for an ack; limit {MAX_RING:,}")
        # No entry lies across two cache lines: of a million in flight every one is a miss.
        grown = <Entry*>aligned_alloc(LINE_BYTES, capacity * sizeof(Entry))
        if grown == NULL:
            raise MemoryError()
        if s.ring == NULL:
            if FASTIM_DEBUG:
                _live_rings += 1
        else:
            # Full, so the entries are head..capacity and then 0..head.
            behind = s.mask + 1 - s.head
            memcpy(grown, s.ring + s.head, behind * sizeof(Entry))
            memcpy(grown + behind, s.ring, s.head * sizeof(Entry))
            free(s.ring)
        s.ring = grown
        s.mask = capacity - 1
        s.head = 0
        return 0

    cdef int _grow_slots(self) except -1:
        cdef uint32_t capacity = 64 if self._capacity == 0 else self._capacity * 2
        cdef void* grown
        if capacity > MAX_SLOTS:
            raise UsageError(f"{self.count:,} ack slots are open; limit {MAX_SLOTS:,}")
        grown = realloc(self._slots, capacity * sizeof(Slot))
        if grown == NULL:
            raise MemoryError()
        self._slots = <Slot*>grown
        grown = realloc(self._oldest, capacity * sizeof(uint32_t))
        if grown == NULL:
            raise MemoryError()
        self._oldest = <uint32_t*>grown
        # As long as the slots, so that closing one never allocates.
        grown = realloc(self._free, capacity * sizeof(uint32_t))
        if grown == NULL:
            raise MemoryError()
        self._free = <uint32_t*>grown
        self._capacity = capacity
        return 0

    cdef uint32_t _stamp(self, uint64_t mono_ms) noexcept nogil:
        # A deadline before the base becomes one at the base: it is overdue either way.
        return <uint32_t>(mono_ms - self._base_ms + 1) if mono_ms > self._base_ms else 1

    cdef uint32_t _limit(self, uint64_t mono_ms) noexcept nogil:
        """The greatest stamp that is overdue; 0 when none can be."""
        if mono_ms < self._base_ms:
            return 0
        if mono_ms - self._base_ms >= MAX_STAMP:
            return MAX_STAMP
        return <uint32_t>(mono_ms - self._base_ms) + 1

    cdef uint32_t _due(self, Slot* s, uint64_t mono_ms) noexcept nogil:
        cdef uint32_t limit = self._limit(mono_ms)
        cdef uint32_t due = 0, offset
        cdef Entry* entry
        for offset in range(s.size):
            entry = _at(s, offset)
            if entry.deadline > limit:
                if s.ascending:
                    break
            elif entry.state == UNACKED:
                due += 1
        return due

    cdef void _rebase(self, uint64_t mono_ms) noexcept nogil:
        cdef uint64_t by = mono_ms - self._base_ms - KEEP_MS
        cdef uint32_t slot, offset
        cdef Slot* s
        cdef Entry* entry
        for slot in range(self._top):
            s = &self._slots[slot]
            for offset in range(s.size):
                entry = _at(s, offset)
                entry.deadline = _moved(entry.deadline, by)
            s.newest_deadline = _moved(s.newest_deadline, by)
            self._oldest[slot] = _moved(self._oldest[slot], by)
        self._base_ms = self._base_ms + by

    cdef void _release(self) noexcept:
        """Drop everything; the table is then as new, but for its memory."""
        cdef Slot* s
        cdef Entry* entry
        cdef PyObject* item
        cdef uint32_t slot
        # One item at a time, and the table is whole whenever a reference is dropped.
        while self._resolved_count > 0:
            self._resolved_count -= 1
            item = self._resolved[self._resolved_count].item
            _gave_reference()
            Py_DECREF(<object>item)
        free(self._resolved)
        self._resolved = NULL
        self._resolved_capacity = 0
        slot = 0
        while slot < self._top:
            s = &self._slots[slot]
            if s.size == 0:
                _free_ring(s)
                slot += 1
                continue
            entry = &s.ring[s.head]
            item = entry.item
            if entry.state == UNACKED:
                self._forget(s, entry)
            else:
                item = NULL
            self._settle(slot)
            if item != NULL:
                _gave_reference()
                Py_DECREF(<object>item)


cdef inline uint32_t _moved(uint32_t stamp, uint64_t by) noexcept nogil:
    """A stamp after the base moved up; 0 stays "none"."""
    if stamp == 0:
        return 0
    return <uint32_t>(stamp - by) if stamp > by else 1


# -- the collector sees the items: Cython's own slots know object attributes only

ctypedef int (*visit_t)(PyObject*, void*) noexcept
ctypedef int (*traverse_t)(PyObject*, visit_t, void*) noexcept
ctypedef int (*clear_t)(PyObject*) noexcept

cdef traverse_t _cython_traverse = <traverse_t>(<PyTypeObject*>AckTable).tp_traverse
cdef clear_t _cython_clear = <clear_t>(<PyTypeObject*>AckTable).tp_clear


cdef int _traverse(PyObject* self, visit_t visit, void* arg) noexcept:
    cdef Slot* s
    cdef PyObject* item
    cdef uint32_t slot, offset
    cdef Py_ssize_t i
    cdef int stop = _cython_traverse(self, visit, arg)
    if stop != 0:
        return stop
    for i in range((<AckTable>self)._resolved_count):
        stop = visit((<AckTable>self)._resolved[i].item, arg)
        if stop != 0:
            return stop
    for slot in range((<AckTable>self)._top):
        s = &(<AckTable>self)._slots[slot]
        for offset in range(s.size):
            item = _at(s, offset).item
            if item != NULL:
                stop = visit(item, arg)
                if stop != 0:
                    return stop
    return 0


cdef int _clear(PyObject* self) noexcept:
    (<AckTable>self)._release()
    return _cython_clear(self)


(<PyTypeObject*>AckTable).tp_traverse = <traverseproc><void*>_traverse
(<PyTypeObject*>AckTable).tp_clear = <inquiry><void*>_clear
