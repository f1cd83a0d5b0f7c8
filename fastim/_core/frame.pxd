# The wire codec's C half: split a packet into frames, read ACK, write the head of MSG. See frame.pyx.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef enum:
    # Ops that never reach Python; tests/unit/test_frame.py holds them to fastim.protocol.
    OP_PING = 2
    OP_ACK = 3
    OP_ACKS = 4
    OP_MSG = 32
    OP_PONG = 36
    OP_SEALED = 24
    OP_SEALED_DOWN = 51

    # Limits; the depth counts the frame's own array.
    MAX_PACKET_BYTES = 65536
    MAX_FRAMES = 64
    MAX_DEPTH = 8
    MAX_ARRAY = 256
    MAX_MAP = 64
    MAX_OP = 127
    MAX_ACK_IDS = 256

    # MSG: array16 of 16, op, tag as uint32, dup as bool; the shared tail of 13 elements follows.
    MSG_ELEMENTS = 16
    MSG_PREFIX_BYTES = 10

    # SEALED and SEALED_DOWN as written here: fixarray of 4, op, key_id as uint32, counter as uint64, bin16.
    SEALED_ELEMENTS = 4
    SEALED_HEADER_BYTES = 19

    # PONG: fixarray of 5, op, three integers of at most 9 bytes, an empty list of heads.
    PONG_BYTES = 30


ctypedef struct frame_span:
    int32_t op
    int32_t start   # of the frame's array header in the packet
    int32_t end     # one past the frame's last byte


ctypedef struct sealed_span:
    uint32_t key_id
    uint64_t counter
    int32_t box     # where it starts; what stands before it is its associated data, and nothing behind it
    int32_t size    # of the box


cdef int split_c(const uint8_t* p, Py_ssize_t n, frame_span* out, int cap) except -1
cdef int64_t parse_ack_c(const uint8_t* p, Py_ssize_t n) except -1
cdef int parse_acks_c(const uint8_t* p, Py_ssize_t n, uint64_t* out) except -1
cdef int parse_sealed_c(const uint8_t* p, Py_ssize_t n, int op, sealed_span* out) noexcept nogil
cdef void sealed_header_c(uint8_t* out, int op, uint32_t key_id, uint64_t counter, uint16_t size) noexcept nogil
cdef int pong_c(uint8_t* out, uint64_t server_ms, uint32_t last_tag, uint64_t user_cursor) noexcept nogil


cdef inline void msg_prefix_c(uint8_t* out, uint32_t tag, bint dup) noexcept nogil:
    # `out` has room for MSG_PREFIX_BYTES.
    out[0] = 0xDC
    out[1] = 0
    out[2] = MSG_ELEMENTS
    out[3] = OP_MSG
    out[4] = 0xCE
    out[5] = <uint8_t>(tag >> 24)
    out[6] = <uint8_t>((tag >> 16) & 0xFF)
    out[7] = <uint8_t>((tag >> 8) & 0xFF)
    out[8] = <uint8_t>(tag & 0xFF)
    out[9] = 0xC3 if dup else 0xC2
