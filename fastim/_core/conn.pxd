# One WebSocket connection as the node sees it, and what all connections of a node share. See conn.pyx.

cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from picows.picows cimport WSFrame, WSListener, WSTransport

from fastim._core.acks cimport AckTable
from fastim._core.sealed cimport SealedStream
from fastim._core.wheel cimport Wheel


cdef enum LinkState:
    #  NEW --upgrade--> OPEN --close(), peer's CLOSE, end of TCP--> CLOSING --socket gone, late--> ENDED
    #                     `------------abort(), socket gone----------------------------------------^
    NEW
    OPEN                # the only state in which anything is sent or received
    CLOSING             # our CLOSE is written or nothing can be written; waiting for the peer or for close_ms
    ENDED               # holds no slot and no memory; on_closed is called at the end of the tick


cdef enum:
    OP_AUTH = 1         # tests/unit/test_conn.py holds these to fastim.protocol
    OP_REKEY = 25
    MAX_FRAGMENTS = 64
    MAX_CONTROL_BYTES = 125
    MAX_REASON_BYTES = 123
    GAP_BYTES = 4       # in front of a packet: the header of 126 to 65,535 bytes
    FIRST_OUT = 2_048   # bytes of a pooled output buffer


cdef struct Write:
    # One link's output on its way to the kernel; owns `out`.
    PyObject* link      # borrowed
    int fd              # -1: the transport has to take it
    char* out
    Py_ssize_t capacity
    const char* p       # into out
    Py_ssize_t size
    Py_ssize_t sent


cdef struct Seat:
    # A link's place in an audience.
    int audience        # its number at the hub
    uint32_t index      # of the link among the members


cdef class CoreConnection
cdef class CoreHub


cdef class Audience:
    # Links that are written together, as the hub and its links know it. See fanout.pyx.
    cdef:
        int number      # at the hub; -1 while it has no member
        bint due        # the tick has to write

    cdef int _left(self, uint32_t index) except -1
    cdef int _write_some(self, int most) except -1


@cython.final
cdef class CoreHub:
    cdef:
        # What the links use.
        object _loop
        AckTable _acks
        Wheel _wheel
        object _encode_error
        public object accept
        public object on_acked
        public object on_fatal

        # Bounds.
        readonly uint64_t auth_ms
        readonly uint64_t fragment_ms
        readonly uint64_t close_ms
        readonly uint64_t keys_ms
        readonly Py_ssize_t soft_bytes
        readonly Py_ssize_t hard_bytes
        readonly int sends_a_tick   # of all audiences together: 7 ms, and then others have their turn

        # By slot of the wheel: the link or None, and when something is late (0: nothing can be).
        list _links
        uint64_t* _deadlines
        int* _fds               # where whole frames may be written past a link that has no queue; -1: ask it
        Py_ssize_t _capacity

        # Audiences with members, by their number; free numbers.
        list _audiences
        list _numbers

        # The tick.
        list _dirty             # links with something to write
        list _gone              # links that ended and whose owner does not know
        list _due               # audiences with something to write
        bint _scheduled

        # Free output buffers, so that a burst does not go through malloc.
        char** _pool
        int _pooled

        # Counters.
        uint64_t frames_in, frames_out, packets_in, packets_out, bytes_in, bytes_out
        uint64_t pings, ack_frames, overflows, bad_seals

    cdef int _enter(self, CoreConnection link, uint64_t mono_ms) except -1
    cdef int _leave(self, CoreConnection link) except -1
    cdef int _wake(self) except -1
    cdef int _enlist(self, Audience audience) except -1
    cdef int _delist(self, Audience audience) except -1
    cdef int _make_due(self, Audience audience) except -1
    cdef int _write_due(self) except -1
    cdef int _write_all(self, list links) except -1
    cdef int _write_group(self, Write* writes, int count) except -1
    cdef char* _take_buffer(self) noexcept nogil
    cdef void _give_buffer(self, char* buffer, Py_ssize_t capacity) noexcept nogil
    cdef int _sweep(self, uint64_t mono_ms, uint32_t* out, int cap) noexcept nogil
    cdef void _fatal(self, object error) noexcept


@cython.final
cdef class CoreConnection(WSListener):
    cdef:
        readonly CoreHub hub
        readonly str peer
        public object owner
        WSTransport _transport
        int _fd                 # of a plain socket; -1 under TLS

        # Life.
        uint8_t _state
        bint _authenticated
        bint _peer_closed       # its CLOSE came
        bint _peer_ended        # its end of TCP came
        bint _orderly           # once ENDED
        readonly int slot
        readonly int close_code

        # Answers given in C.
        int _ack_slot
        uint64_t _user_cursor
        uint64_t _received_ms
        uint64_t _auth_by_ms    # 0 once authenticated
        uint64_t _stuck_ms      # _received_ms when the sweep saw half a WebSocket frame

        # Sealing: None until keys were agreed, and then every packet is one frame of it.
        SealedStream _stream
        readonly bint sealed    # keys were agreed
        uint64_t _keys_since_ms

        # A fragmented message; _fragments is 0 when there is none.
        uint8_t* _part
        uint32_t _part_size
        uint32_t _part_capacity
        uint64_t _part_since_ms
        uint32_t _fragments
        uint8_t _kind           # FASTIM_ECHO: the opcode of the message

        # Output: whole WebSocket frames from _start on, the last of which may be a packet that still grows and
        # has its header to come. Offsets in _out.
        char* _out
        uint32_t _out_capacity
        uint32_t _out_start
        uint32_t _out_size
        uint32_t _packet        # where the growing packet's payload starts; 0: there is none
        uint8_t _packet_frames
        uint8_t _pongs          # WebSocket pongs queued since the last write
        bint _dirty
        bint _blocked           # the transport holds bytes; it says so when it has written them
        Py_ssize_t _handed      # at most so many
        bytes _late_ping        # the newest ping beyond those answered one by one

        # Audiences it is a member of.
        Seat* _seats
        uint32_t _seat_count
        uint32_t _seat_capacity

    cdef int send_c(self, const void* head, Py_ssize_t head_bytes, const void* body, Py_ssize_t body_bytes) except -1
    cdef int close_c(self, int code, bytes reason) except -1
    cdef int abort_c(self, bint orderly) except -1
    cdef bint take_c(self, const char* p, Py_ssize_t n, object view, Py_ssize_t most) except -1

    # What an audience uses.
    cdef Seat* _seat_in(self, int audience) noexcept
    cdef int _sit_down(self, int audience, uint32_t index) except -1
    cdef void _get_up(self, Seat* seat) noexcept
    cdef int _leave_audiences(self) except -1

    cdef int _open(self, WSTransport transport) except -1
    cdef void _broken(self, object error) noexcept
    cdef int _received(self, WSFrame frame) except -1
    cdef int _fragment(self, WSFrame frame) except -1
    cdef int _peer_says_close(self, WSFrame frame) except -1
    cdef int _peer_says_close_code(self, int code) except -1
    cdef int _ping(self, WSFrame frame) except -1
    cdef int _packet_in(self, const uint8_t* p, Py_ssize_t n) except -1
    cdef int _echo(self, const uint8_t* p, Py_ssize_t n) except -1
    cdef int _frame_in(self, int op, const uint8_t* p, Py_ssize_t n) except -1
    cdef int _acked(self, int op, const uint8_t* p, Py_ssize_t n) except -1
    cdef int _refuse(self, int op, object error) except -1
    cdef int _bad_seal(self) except -1
    cdef bint _changing(self) noexcept
    cdef void _drop_part(self) noexcept nogil
    cdef void _set_deadline(self, uint64_t mono_ms) noexcept nogil

    cdef int _room(self, Py_ssize_t more) except -1
    cdef int _seal(self) except -1
    cdef int _control(self, int opcode, const char* p, Py_ssize_t n) except -1
    cdef int _mark(self) except -1
    cdef void _offer(self) noexcept
    cdef int _flush(self, bint force) except -1
    cdef bint _take_output(self, Write* write, bint force) except -1
    cdef int _hand_over(self, Write* write) except -1
    cdef int _give_transport(self, const char* p, Py_ssize_t n) except -1
    cdef void _drop_out(self) noexcept nogil
    cdef Py_ssize_t _waiting(self) except -1
    cdef int _late(self, uint64_t mono_ms) except -1
    cdef bint _unfinished(self) except -1
    cdef int _end(self, int code, bint orderly) except -1
    cdef int _tell(self) except -1
