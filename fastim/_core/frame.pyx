"""The wire codec's C half: find the frames of a packet without building anything from them.

A packet is 1 to 64 frames back to back; a frame is a msgpack array whose first element is the op. Hides
msgpack's byte layout. The walk is iterative and its memory is constant, so a hostile packet costs no more than
its own length. UTF-8 and the layout of a frame are the business of fastim.protocol.

F1  accepts exactly what the oracle accepts, with the same spans     tests/property/test_frame_oracle.py
F2  no byte at or beyond `n` is read, whatever the input             same, on the asan build
Source: msgpack spec, "Formats"; docs/protocol.md.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport INT64_MAX, int8_t, int16_t
from libc.string cimport memcpy

from fastim._core cimport FASTIM_DEBUG

from fastim.errors import PeerError, UsageError

DEBUG = bool(FASTIM_DEBUG)
cdef int64_t MAX_ID = (1LL << 53) - 1


cdef enum Broken:
    FINE = 0
    TRUNCATED
    NOT_AN_ARRAY
    NO_OP
    OP_NOT_AN_INTEGER
    OP_RANGE
    ARRAY_SIZE
    MAP_SIZE
    DEPTH
    EXTENSION
    RESERVED


cdef struct Fault:
    Broken what
    Py_ssize_t at       # offset of the offending value
    uint64_t value      # what it asks for


def live() -> dict[str, int]:
    """What is allocated now: this module holds nothing."""
    return {}


# -- reading big-endian integers; the caller has compared the length

cdef inline uint32_t _u16(const uint8_t* p) noexcept nogil:
    return (<uint32_t>p[0] << 8) | p[1]


cdef inline uint32_t _u32(const uint8_t* p) noexcept nogil:
    return (_u16(p) << 16) | _u16(p + 2)


cdef inline uint64_t _u64(const uint8_t* p) noexcept nogil:
    return (<uint64_t>_u32(p) << 32) | _u32(p + 4)


cdef Py_ssize_t _fail(Fault* fault, Broken what, Py_ssize_t at, uint64_t value) noexcept nogil:
    fault.what = what
    fault.at = at
    fault.value = value
    return -1


cdef inline Py_ssize_t _enter(
    const uint8_t* p, Py_ssize_t at, Py_ssize_t n, uint32_t* items, Fault* fault
) noexcept nogil:
    """Read the array header at `at` (< n); the offset after it, -1 with fault. At most MAX_ARRAY items."""
    cdef uint8_t lead = p[at]
    cdef Py_ssize_t size = 1
    if 0x90 <= lead <= 0x9F:
        items[0] = lead & 0x0F
    elif lead == 0xDC or lead == 0xDD:
        size = 3 if lead == 0xDC else 5
        if n - at < size:
            return _fail(fault, TRUNCATED, at, <uint64_t>size)
        items[0] = _u16(p + at + 1) if lead == 0xDC else _u32(p + at + 1)
        if items[0] > MAX_ARRAY:
            return _fail(fault, ARRAY_SIZE, at, items[0])
    else:
        return _fail(fault, NOT_AN_ARRAY, at, lead)
    return at + size


cdef Py_ssize_t _integer(
    const uint8_t* p, Py_ssize_t at, Py_ssize_t n, int64_t* value, Fault* fault
) noexcept nogil:
    """Read an integer of any width at `at`; the offset after it, -1 with fault. Above int64: INT64_MAX."""
    cdef uint8_t lead
    cdef Py_ssize_t size
    cdef uint64_t raw
    if at >= n:
        return _fail(fault, TRUNCATED, at, 1)
    lead = p[at]
    if lead <= 0x7F:
        value[0] = lead
        return at + 1
    if lead >= 0xE0:
        value[0] = <int64_t>lead - 256
        return at + 1
    if 0xCC <= lead <= 0xCF:
        size = 1 << (lead - 0xCC)
    elif 0xD0 <= lead <= 0xD3:
        size = 1 << (lead - 0xD0)
    else:
        return _fail(fault, OP_NOT_AN_INTEGER, at, lead)
    if n - at - 1 < size:
        return _fail(fault, TRUNCATED, at, <uint64_t>(1 + size))
    if size == 1:
        raw = p[at + 1]
    elif size == 2:
        raw = _u16(p + at + 1)
    elif size == 4:
        raw = _u32(p + at + 1)
    else:
        raw = _u64(p + at + 1)
    if lead <= 0xCF:
        value[0] = <int64_t>raw if raw <= <uint64_t>INT64_MAX else INT64_MAX
    elif size == 1:
        value[0] = <int8_t><uint8_t>raw
    elif size == 2:
        value[0] = <int16_t><uint16_t>raw
    elif size == 4:
        value[0] = <int32_t><uint32_t>raw
    else:
        value[0] = <int64_t>raw
    return at + 1 + size


cdef Py_ssize_t _skip(
    const uint8_t* p, Py_ssize_t at, Py_ssize_t n, uint32_t items, Fault* fault
) noexcept nogil:
    """Step over `items` values that sit inside one array; the offset after them, -1 with fault."""
    cdef uint32_t[MAX_DEPTH] left
    cdef int depth = 1
    cdef uint8_t lead
    cdef uint64_t size      # of the value's header and, unless it is a container, of its payload
    cdef uint32_t inside    # values inside a container
    cdef bint container
    left[0] = items
    while depth > 0:
        if left[depth - 1] == 0:
            depth -= 1
            continue
        left[depth - 1] -= 1
        if at >= n:
            return _fail(fault, TRUNCATED, at, 1)
        lead = p[at]
        container = False
        inside = 0
        if lead <= 0x7F or lead >= 0xE0:                    # fixint
            size = 1
        elif lead <= 0x8F:                                  # fixmap
            size = 1
            inside = 2 * <uint32_t>(lead & 0x0F)
            container = True
        elif lead <= 0x9F:                                  # fixarray
            size = 1
            inside = lead & 0x0F
            container = True
        elif lead <= 0xBF:                                  # fixstr
            size = 1 + <uint64_t>(lead & 0x1F)
        elif lead == 0xC0 or lead == 0xC2 or lead == 0xC3:  # nil, false, true
            size = 1
        elif lead == 0xC1:
            return _fail(fault, RESERVED, at, lead)
        elif lead == 0xC4 or lead == 0xD9:                  # bin8, str8
            if n - at < 2:
                return _fail(fault, TRUNCATED, at, 2)
            size = 2 + <uint64_t>p[at + 1]
        elif lead == 0xC5 or lead == 0xDA:                  # bin16, str16
            if n - at < 3:
                return _fail(fault, TRUNCATED, at, 3)
            size = 3 + <uint64_t>_u16(p + at + 1)
        elif lead == 0xC6 or lead == 0xDB:                  # bin32, str32
            if n - at < 5:
                return _fail(fault, TRUNCATED, at, 5)
            size = 5 + <uint64_t>_u32(p + at + 1)
        elif lead == 0xCA:                                  # float32
            size = 5
        elif lead == 0xCB:                                  # float64
            size = 9
        elif 0xCC <= lead <= 0xCF:                          # uint8 to uint64
            size = 1 + (<uint64_t>1 << (lead - 0xCC))
        elif 0xD0 <= lead <= 0xD3:                          # int8 to int64
            size = 1 + (<uint64_t>1 << (lead - 0xD0))
        elif lead == 0xDC or lead == 0xDE:                  # array16, map16
            if n - at < 3:
                return _fail(fault, TRUNCATED, at, 3)
            size = 3
            inside = _u16(p + at + 1)
            container = True
        elif lead == 0xDD or lead == 0xDF:                  # array32, map32
            if n - at < 5:
                return _fail(fault, TRUNCATED, at, 5)
            size = 5
            inside = _u32(p + at + 1)
            container = True
        else:                                               # ext8-32, fixext1-16
            return _fail(fault, EXTENSION, at, lead)
        if lead == 0xDE or lead == 0xDF:
            if inside > MAX_MAP:
                return _fail(fault, MAP_SIZE, at, inside)
            inside *= 2
        elif inside > MAX_ARRAY:
            return _fail(fault, ARRAY_SIZE, at, inside)
        if <uint64_t>(n - at) < size:
            return _fail(fault, TRUNCATED, at, size)
        at += <Py_ssize_t>size
        if container:
            if depth >= MAX_DEPTH:
                return _fail(fault, DEPTH, at, <uint64_t>depth + 1)
            left[depth] = inside
            depth += 1
    return at


cdef Py_ssize_t _frame(
    const uint8_t* p, Py_ssize_t at, Py_ssize_t n, frame_span* out, Fault* fault
) noexcept nogil:
    """Walk the frame that starts at `at` (< n); the offset after it, -1 with fault."""
    cdef uint32_t items = 0
    cdef int64_t op = 0
    cdef Py_ssize_t end
    end = _enter(p, at, n, &items, fault)
    if end < 0:
        return -1
    if items == 0:
        return _fail(fault, NO_OP, at, 0)
    end = _integer(p, end, n, &op, fault)
    if end < 0:
        return -1
    if op < 0 or op > MAX_OP:
        return _fail(fault, OP_RANGE, at, <uint64_t>op)
    end = _skip(p, end, n, items - 1, fault)
    if end < 0:
        return -1
    out.op = <int32_t>op
    out.start = <int32_t>at
    out.end = <int32_t>end
    return end


cdef object _error(const Fault* fault, Py_ssize_t n):
    cdef uint64_t value = fault.value
    where = f"at byte {fault.at}"
    if fault.what == TRUNCATED:
        detail = f"the value {where} is {value:,} bytes; {n - fault.at:,} are left"
    elif fault.what == NOT_AN_ARRAY:
        detail = f"a frame starts with 0x{value:02x} {where}; must be an array"
    elif fault.what == NO_OP:
        detail = f"the frame {where} has 0 elements; at least 1, the op"
    elif fault.what == OP_NOT_AN_INTEGER:
        detail = f"0x{value:02x} {where} is not an integer"
    elif fault.what == OP_RANGE:
        detail = f"the op of the frame {where} is {<int64_t>value}; limits 0 and {MAX_OP}"
    elif fault.what == ARRAY_SIZE:
        detail = f"the array {where} has {value:,} elements; limit {MAX_ARRAY}"
    elif fault.what == MAP_SIZE:
        detail = f"the map {where} has {value:,} entries; limit {MAX_MAP}"
    elif fault.what == DEPTH:
        detail = f"nesting {where} is {value} deep; limit {MAX_DEPTH}"
    elif fault.what == EXTENSION:
        detail = f"0x{value:02x} {where} is an extension type; none is allowed"
    else:
        detail = f"0x{value:02x} {where} is no msgpack type"
    return PeerError("bad_frame", detail)


# -- what others call

cdef int split_c(const uint8_t* p, Py_ssize_t n, frame_span* out, int cap) except -1:
    """Write the frames of a packet into `out` (caller-owned, room for cap); their number, 1..min(cap, 64).

    Raises PeerError("bad_frame"); `out` then holds nothing of use. O(n), allocates nothing.
    """
    cdef Fault fault
    cdef Py_ssize_t at = 0
    cdef int count = 0
    cdef int limit = cap if cap < MAX_FRAMES else MAX_FRAMES
    if n > MAX_PACKET_BYTES:
        raise PeerError("bad_frame", f"the packet is {n:,} bytes; limit {MAX_PACKET_BYTES:,}")
    if n <= 0:
        raise PeerError("bad_frame", "the packet has 0 frames; at least 1")
    while at < n:
        if count >= limit:
            raise PeerError("bad_frame", f"the packet has {count + 1} frames or more; limit {limit}")
        at = _frame(p, at, n, &out[count], &fault)
        if at < 0:
            raise _error(&fault, n)
        count += 1
    return count


cdef int64_t parse_ack_c(const uint8_t* p, Py_ssize_t n) except -1:
    """The tag of one ACK frame, 0..2**32-1. Raises PeerError("bad_frame")."""
    cdef Fault fault
    cdef uint32_t items = 0
    cdef int64_t op = 0, tag = 0
    cdef Py_ssize_t at
    if n <= 0:
        raise PeerError("bad_frame", "the frame is 0 bytes")
    # [3, tag] with a fixarray header and a fixint op, which is how every encoder writes it
    if n >= 3 and p[0] == 0x92 and p[1] == OP_ACK:
        if p[2] <= 0x7F:
            return p[2]
        if p[2] == 0xCD and n >= 5:
            return _u16(p + 3)
        if p[2] == 0xCE and n >= 7:
            return _u32(p + 3)
        at = 2
    else:
        at = _enter(p, 0, n, &items, &fault)
        if at >= 0:
            if items < 2:
                raise PeerError("bad_frame", f"ACK has {items} elements; at least 2")
            at = _integer(p, at, n, &op, &fault)
        if at < 0:
            raise _error(&fault, n)
        if op != OP_ACK:
            raise PeerError("bad_frame", f"the op is {op}; must be {OP_ACK}, ACK")
    if _integer(p, at, n, &tag, &fault) < 0:
        raise _error(&fault, n)
    if tag < 0 or tag > 0xFFFFFFFF:
        raise PeerError("bad_frame", f"ACK's tag is {tag}; limits 0 and {0xFFFFFFFF}")
    return tag


cdef int parse_acks_c(const uint8_t* p, Py_ssize_t n, uint64_t* out) except -1:
    """Write the ids of one ACKS frame into `out` (caller-owned, room for MAX_ACK_IDS); their number.

    Raises PeerError("bad_frame"); `out` then holds nothing of use. O(ids), allocates nothing.
    """
    cdef Fault fault
    cdef uint32_t items = 0, count = 0, i
    cdef int64_t op = 0, msg_id = 0
    cdef Py_ssize_t at
    if n <= 0:
        raise PeerError("bad_frame", "the frame is 0 bytes")
    at = _enter(p, 0, n, &items, &fault)
    if at >= 0:
        if items < 2:
            raise PeerError("bad_frame", f"ACKS has {items} elements; at least 2")
        at = _integer(p, at, n, &op, &fault)
    if at < 0:
        raise _error(&fault, n)
    if op != OP_ACKS:
        raise PeerError("bad_frame", f"the op is {op}; must be {OP_ACKS}, ACKS")
    if at >= n:
        raise PeerError("bad_frame", "the frame ends before the ids of ACKS")
    at = _enter(p, at, n, &count, &fault)
    if at < 0 and fault.what == NOT_AN_ARRAY:
        raise PeerError("bad_frame", f"the ids of ACKS start with 0x{fault.value:02x}; must be an array")
    if at < 0:
        raise _error(&fault, n)
    if count > MAX_ACK_IDS:
        raise PeerError("bad_frame", f"ACKS has {count} ids; limit {MAX_ACK_IDS}")
    for i in range(count):
        at = _integer(p, at, n, &msg_id, &fault)
        if at < 0:
            raise _error(&fault, n)
        if msg_id < 0 or msg_id > MAX_ID:
            raise PeerError("bad_frame", f"an id of ACKS is {msg_id}; limits 0 and {MAX_ID}")
        out[i] = <uint64_t>msg_id
    return <int>count


cdef int parse_sealed_c(const uint8_t* p, Py_ssize_t n, int op, sealed_span* out) noexcept nogil:
    """Read a packet that is one SEALED (or SEALED_DOWN, as `op` says) and nothing more; 0, or -1: it is not.

    Not a word about why: whoever forges frames learns nothing. The box is the last element and ends the packet,
    for what stood behind it would be proved by nothing.
    """
    cdef Fault fault
    cdef uint32_t items = 0
    cdef int64_t found = 0, key_id = 0, counter = 0
    cdef Py_ssize_t at
    cdef uint64_t size
    if n <= 0 or n > MAX_PACKET_BYTES:
        return -1
    at = _enter(p, 0, n, &items, &fault)
    if at < 0 or items != SEALED_ELEMENTS:
        return -1
    at = _integer(p, at, n, &found, &fault)
    if at < 0 or found != op:
        return -1
    at = _integer(p, at, n, &key_id, &fault)
    if at < 0 or key_id < 0 or key_id >> 32 != 0:
        return -1
    at = _integer(p, at, n, &counter, &fault)
    if at < 0 or counter < 0 or counter > MAX_ID:
        return -1
    if n - at >= 2 and p[at] == 0xC4:
        size = p[at + 1]
        at += 2
    elif n - at >= 3 and p[at] == 0xC5:
        size = _u16(p + at + 1)
        at += 3
    elif n - at >= 5 and p[at] == 0xC6:
        size = _u32(p + at + 1)
        at += 5
    else:
        return -1
    if <uint64_t>(n - at) != size:
        return -1
    out.key_id = <uint32_t>key_id
    out.counter = <uint64_t>counter
    out.box = <int32_t>at
    out.size = <int32_t>size
    return 0


cdef void sealed_header_c(uint8_t* out, int op, uint32_t key_id, uint64_t counter, uint16_t size) noexcept nogil:
    """Write the SEALED_HEADER_BYTES in front of a box of `size` bytes. One width, so that its place is known early."""
    cdef int i
    out[0] = 0x90 | SEALED_ELEMENTS
    out[1] = <uint8_t>op
    out[2] = 0xCE
    for i in range(4):
        out[3 + i] = <uint8_t>((key_id >> (24 - 8 * i)) & 0xFF)
    out[7] = 0xCF
    for i in range(8):
        out[8 + i] = <uint8_t>((counter >> (56 - 8 * i)) & 0xFF)
    out[16] = 0xC5
    out[17] = <uint8_t>(size >> 8)
    out[18] = <uint8_t>(size & 0xFF)


cdef inline int _put_uint(uint8_t* out, uint64_t value) noexcept nogil:
    """Write the shortest form of an unsigned integer; its length."""
    cdef int size, i
    if value <= 0x7F:
        out[0] = <uint8_t>value
        return 1
    if value <= 0xFF:
        out[0] = 0xCC
        size = 1
    elif value <= 0xFFFF:
        out[0] = 0xCD
        size = 2
    elif value >> 32 == 0:
        out[0] = 0xCE
        size = 4
    else:
        out[0] = 0xCF
        size = 8
    for i in range(size):
        out[1 + i] = <uint8_t>((value >> (8 * (size - 1 - i))) & 0xFF)
    return 1 + size


cdef int pong_c(uint8_t* out, uint64_t server_ms, uint32_t last_tag, uint64_t user_cursor) noexcept nogil:
    """Write a PONG without heads into `out` (room for PONG_BYTES); its length."""
    cdef int at = 2
    out[0] = 0x95
    out[1] = OP_PONG
    at += _put_uint(out + at, server_ms)
    at += _put_uint(out + at, last_tag)
    at += _put_uint(out + at, user_cursor)
    out[at] = 0x90
    return at + 1


def split(data: bytes | bytearray | memoryview) -> list[tuple[int, int, int]]:
    """(op, start, end) of each frame of a packet. Raises PeerError("bad_frame")."""
    cdef frame_span[MAX_FRAMES] spans
    cdef Py_buffer view
    cdef int count, i
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        count = split_c(<const uint8_t*>view.buf, view.len, spans, MAX_FRAMES)
    finally:
        PyBuffer_Release(&view)
    return [(spans[i].op, spans[i].start, spans[i].end) for i in range(count)]


def parse_ack(data: bytes | bytearray | memoryview) -> int:
    """The tag of one ACK frame. Raises PeerError("bad_frame")."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return parse_ack_c(<const uint8_t*>view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


def parse_acks(data: bytes | bytearray | memoryview) -> list[int]:
    """The ids of one ACKS frame. Raises PeerError("bad_frame")."""
    cdef uint64_t[MAX_ACK_IDS] ids
    cdef Py_buffer view
    cdef int count, i
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        count = parse_acks_c(<const uint8_t*>view.buf, view.len, ids)
    finally:
        PyBuffer_Release(&view)
    return [ids[i] for i in range(count)]


def pong(uint64_t server_ms, uint32_t last_tag, uint64_t user_cursor) -> bytes:
    """A whole PONG frame without heads."""
    cdef uint8_t[PONG_BYTES] out
    return PyBytes_FromStringAndSize(<char*>out, pong_c(out, server_ms, last_tag, user_cursor))


def msg_prefix(tag: int, dup: bool) -> bytes:
    """The MSG_PREFIX_BYTES of a MSG that differ per recipient. Raises UsageError for a tag that is no u32."""
    return build_msg(tag, dup, b"")


def build_msg(tag: int, dup: bool, bytes tail not None) -> bytes:
    """A whole MSG frame: prefix and the shared tail (its 13 elements, encoded). One copy of the tail."""
    cdef bytes out
    cdef uint8_t* at
    if not 0 <= tag <= 0xFFFFFFFF:
        raise UsageError(f"tag is {tag}; limits 0 and {0xFFFFFFFF}")
    out = PyBytes_FromStringAndSize(NULL, MSG_PREFIX_BYTES + PyBytes_GET_SIZE(tail))
    at = <uint8_t*>PyBytes_AS_STRING(out)
    msg_prefix_c(at, <uint32_t>tag, dup)
    memcpy(at + MSG_PREFIX_BYTES, PyBytes_AS_STRING(tail), PyBytes_GET_SIZE(tail))
    return out


def ranges(list values not None) -> list[tuple[int, int]]:
    """Compress ascending unique u64 values to inclusive (from, to) ranges.

    Raises UsageError when a value is not above the one before it, or is no u64. O(values).
    """
    cdef list out = []
    cdef uint64_t first = 0, last = 0, value
    cdef bint started = False
    for item in values:
        if not 0 <= item <= 0xFFFFFFFFFFFFFFFF:
            raise UsageError(f"value is {item}; limits 0 and {0xFFFFFFFFFFFFFFFF}")
        value = item
        if not started:
            first = value
            started = True
        elif value <= last:
            raise UsageError(f"value {value} follows {last}; must be ascending and unique")
        elif value - last != 1:
            out.append((first, last))
            first = value
        last = value
    if started:
        out.append((first, last))
    return out


globals().update(
    OP_PING=OP_PING, OP_ACK=OP_ACK, OP_ACKS=OP_ACKS, OP_MSG=OP_MSG, OP_PONG=OP_PONG,
    OP_SEALED=OP_SEALED, OP_SEALED_DOWN=OP_SEALED_DOWN, SEALED_HEADER_BYTES=SEALED_HEADER_BYTES,
    MAX_ACK_IDS=MAX_ACK_IDS, MAX_PACKET_BYTES=MAX_PACKET_BYTES, MAX_FRAMES=MAX_FRAMES,
    MAX_DEPTH=MAX_DEPTH, MAX_ARRAY=MAX_ARRAY, MAX_MAP=MAX_MAP, MAX_OP=MAX_OP,
    MSG_PREFIX_BYTES=MSG_PREFIX_BYTES,
)
