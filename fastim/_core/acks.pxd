# What was sent and is not acknowledged: a window of 32-byte entries per session. See acks.pyx.

cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport uint32_t, uint64_t


cdef enum EntryState:
    #  UNACKED --ack_to, ack_ids--> DONE (item on the drain ring)
    #     `------take_overdue-----> DONE (item handed to the caller)
    DONE = 0
    UNACKED = 1


cdef enum:
    REBASE_MS = 0x80000000      # 24.8 days: base moves up when time is this far from it ...
    KEEP_MS = 0x40000000        # ... to this far before now


cdef struct Entry:
    uint32_t tag
    uint32_t deadline           # 1 + ms from the table's base
    uint32_t nbytes
    uint32_t state
    uint64_t msg_id             # 0: not a message, cannot be acked by id
    PyObject* item              # owned while UNACKED, NULL afterwards


cdef struct Slot:
    Entry* ring                 # capacity is mask + 1, a power of two; NULL until the first insert
    uint32_t mask
    uint32_t head               # index of the oldest entry, which is UNACKED unless size is 0
    uint32_t size               # entries from the oldest UNACKED to last_tag, DONE ones between included
    uint32_t last_tag           # 0: nothing was inserted
    uint32_t unacked
    uint32_t newest_deadline    # greatest of the entries in the ring
    bint is_open
    bint ascending              # deadlines in the ring grow with the tag, so the oldest is the head's
    uint64_t unacked_bytes


cdef struct Resolved:
    uint32_t slot
    PyObject* item              # owned


@cython.final
cdef class AckTable:
    cdef:
        # Slots; _oldest is apart so that a scan reads 4 bytes per slot.
        Slot* _slots
        uint32_t* _oldest       # oldest deadline of the slot's UNACKED entries, 0 when there is none
        uint32_t* _free
        uint32_t _capacity
        uint32_t _top           # no slot at or above it was ever given out
        uint32_t _free_count
        readonly int count      # open slots

        # The drain ring.
        Resolved* _resolved
        Py_ssize_t _resolved_count
        Py_ssize_t _resolved_capacity

        # Time.
        uint64_t _base_ms
        bint _started

        object _gc              # never set: an object attribute gives the type a place in the collector

    cdef int open_c(self) except -1
    cdef list close_c(self, int slot)
    cdef int insert_c(
        self, int slot, uint32_t tag, uint64_t msg_id, object item, uint32_t nbytes, uint64_t deadline_ms
    ) except -1
    cdef int ack_to_c(self, int slot, uint32_t tag) except -1
    cdef int ack_id_c(self, int slot, uint64_t msg_id) except -1
    cdef list drain_c(self)
    cdef int overdue_c(self, uint64_t mono_ms, uint32_t* out, int cap) except -1
    cdef list take_overdue_c(self, int slot, uint64_t mono_ms)

    cdef inline bint pending_drain_c(self) noexcept nogil:
        return self._resolved_count > 0

    # Of an open slot; the caller knows that it is.
    cdef inline uint32_t last_tag_c(self, int slot) noexcept nogil:
        return self._slots[slot].last_tag

    cdef inline uint32_t unacked_c(self, int slot) noexcept nogil:
        return self._slots[slot].unacked

    cdef inline uint64_t unacked_bytes_c(self, int slot) noexcept nogil:
        return self._slots[slot].unacked_bytes

    cdef Slot* _open_slot(self, int slot) except NULL
    cdef void _forget(self, Slot* s, Entry* entry) noexcept nogil
    cdef void _resolve(self, uint32_t slot, Entry* entry) noexcept nogil
    cdef void _settle(self, uint32_t slot) noexcept nogil
    cdef int _reserve(self, Py_ssize_t more) except -1
    cdef int _grow_ring(self, Slot* s) except -1
    cdef int _grow_slots(self) except -1
    cdef uint32_t _stamp(self, uint64_t mono_ms) noexcept nogil
    cdef uint32_t _limit(self, uint64_t mono_ms) noexcept nogil
    cdef uint32_t _due(self, Slot* s, uint64_t mono_ms) noexcept nogil
    cdef void _rebase(self, uint64_t mono_ms) noexcept nogil
    cdef void _release(self) noexcept
