# The sealed stream of one connection: both directions, and the change from a key to the next. See sealed.pyx.

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastim._core.cipher cimport TAG_BYTES, Opener, Sealer
from fastim._core.frame cimport MAX_PACKET_BYTES, SEALED_HEADER_BYTES


cdef enum:
    # What one SEALED holds at most, so that it is a packet itself: MAX_PACKET_BYTES - SEALED_HEADER_BYTES - TAG_BYTES.
    MAX_INNER_BYTES = 65_501    # written out: a sum does not translate with overflow checks


@cython.final
cdef class SealedStream:
    cdef:
        Sealer _sealer
        Opener _opener
        Opener _next            # from KEYS on until the peer uses it; None: there is none
        readonly uint32_t key_id        # what is sealed under
        readonly uint32_t open_key_id   # what is opened under
        bint _client
        uint8_t _op_out
        uint8_t _op_in

    cdef int seal_c(self, uint8_t* packet, Py_ssize_t n) except -1
    cdef Py_ssize_t open_c(self, uint8_t* p, Py_ssize_t n, Py_ssize_t* start) except -1
    cdef uint64_t left_c(self) noexcept
    cdef int renew_c(self, uint32_t key_id, Sealer sealer, Opener opener) except -1
