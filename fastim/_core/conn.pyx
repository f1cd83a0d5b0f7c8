"""One WebSocket connection: bytes in, frames up; frames down, bytes out.

What fastim.node.link promises, on picows. Hides RFC 6455 beyond picows' parser (fragments, control frames, the
closing handshake), the output buffer, and which operations never reach Python: PING, and ACK and ACKS of a bound
link. Nothing is allocated per frame, and nothing is kept by an idle connection but this object.

    socket ──picows──▶ _received ──fragments──▶ _packet_in ──open, split──▶ _frame_in ──▶ C answer | owner.on_command
    socket ◀──one write a tick── _flush ◀── _out: whole WebSocket frames, the last packet grows ◀── send

Once keys were agreed, a packet is opened in place before it is split, and sealed in place when its header is
written: until then it can still grow or be dropped, from then on only the link's end keeps it from being sent, so
the counter of its frames has no holes.

N1  the owner is called from picows' callbacks and from the tick only, never from send, close or abort
                                                                          tests/unit/test_conn.py
N2  on_closed is the last call, once per link that was accepted                     same
N3  what the peer does can end its own link and nothing else                         same (the fuzz)
N4  while the transport holds bytes of ours nothing is handed to it; queued bytes are bounded       same
N5  with keys, nothing that is not sealed is taken or sent but WebSocket's own control frames
                                                                          tests/unit/test_conn_sealed.py
N6  an audience writes behind what a link has queued, and forgets a link when it stops being OPEN
                                                                          tests/unit/test_fanout.py
Calling the owner can do anything to this link, its end included: so every loop below looks at _state again after
each call, and buffers that are being read are first taken out of the object.
Source: RFC 6455; fastim.node.link; docs/adr/0010.
"""

cimport cython
from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove
from picows.picows cimport WSMsgType
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec

from fastim._core cimport FASTIM_DEBUG
from fastim._core.cipher cimport TAG_BYTES, Opener, Sealer
from fastim._core.frame cimport (
    MAX_ACK_IDS,
    MAX_FRAMES,
    MAX_PACKET_BYTES,
    MSG_PREFIX_BYTES,
    OP_ACK,
    OP_ACKS,
    OP_PING,
    OP_SEALED,
    PONG_BYTES,
    SEALED_HEADER_BYTES,
    frame_span,
    msg_prefix_c,
    parse_ack_c,
    parse_acks_c,
    pong_c,
    split_c,
)
from fastim._core.sealed cimport MAX_INNER_BYTES, SealedStream

import picows

from fastim.errors import PeerError, UsageError

cdef extern from "<sys/socket.h>" nogil:
    Py_ssize_t c_send "send"(int fd, const void* buf, size_t n, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef extern from *:
    """
    #ifndef FASTIM_PICOWS
    #error "setup.py defines FASTIM_PICOWS: the picows whose .pxd this was built against"
    #endif
    #ifndef FASTIM_ECHO
    #define FASTIM_ECHO 0
    #endif
    """
    const char* FASTIM_PICOWS
    # The conformance build (docs/adr/0041): TEXT is taken, and whole messages are sent back. A macro: the C
    # compiler drops every branch of it from what ships.
    enum: FASTIM_ECHO

DEBUG = bool(FASTIM_DEBUG)
ECHO = bool(FASTIM_ECHO)
PICOWS = FASTIM_PICOWS.decode()
if picows.__version__.rpartition(".")[0] != PICOWS.rpartition(".")[0]:
    raise ImportError(
        f"fastim was built against picows {PICOWS} and finds {picows.__version__}: another minor has another"
        " memory layout; build fastim again"
    )

cdef Py_ssize_t _live_connections = 0
cdef Py_ssize_t _live_hubs = 0
cdef Py_ssize_t _live_buffers = 0

cdef enum:
    POOLED = 512                # buffers kept: 1 MiB
    EARLY_BYTES = 65_536        # queued so many, a link is written before the tick
    FIRST_PART = 2_048
    WRITES_AT_ONCE = 64
    ALONE = 4                   # fewer writes are not worth giving up the GIL
    PONGS_AT_ONCE = 32          # of a tick; RFC 6455 5.5.3 lets us answer the newest only
    SWEPT_AT_ONCE = 256
    FIRST_SEATS = 2
    SPARE_BYTES = 6             # a packet of 65,536 bytes has a longer header than its gap
    BEHIND_BYTES = 22           # SPARE_BYTES and TAG_BYTES; a sum does not translate with overflow checks

    READ_BUFFER = 2_048         # picows' least; what the listener must ask for, see _unfinished

    CLOSE_PROTOCOL = 1002
    CLOSE_TEXT = 1003
    CLOSE_NO_CODE = 1005
    CLOSE_ABNORMAL = 1006
    CLOSE_NOT_UTF8 = 1007       # FASTIM_ECHO only
    CLOSE_TOO_BIG = 1009
    CLOSE_INTERNAL = 1011
    CLOSE_SLOW = 4408
    CLOSE_KEYS_ENDED = 4411
    CLOSE_AUTH = 4501
    CLOSE_BAD_FRAME = 4509

READ_BUFFER_BYTES = READ_BUFFER


def live() -> dict[str, int]:
    """What is allocated now; zero unless DEBUG."""
    return {"connections": _live_connections, "hubs": _live_hubs, "buffers": _live_buffers}


cdef inline void _count_buffer(int by) noexcept nogil:
    global _live_buffers
    if FASTIM_DEBUG:
        _live_buffers += by


cdef inline uint64_t _clock_ms(int clock) noexcept nogil:
    cdef timespec now
    clock_gettime(clock, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>now.tv_nsec // 1_000_000


cdef inline void _send(Write* write) noexcept nogil:
    """What the kernel takes now. After an error nothing: the transport meets the same one and ends the link."""
    cdef Py_ssize_t sent = c_send(write.fd, write.p, <size_t>write.size, MSG_DONTWAIT | MSG_NOSIGNAL)
    write.sent = sent if sent > 0 else 0


cdef inline bint _is_close_code(int code) noexcept nogil:
    """Whether a close frame may carry it: assigned by the RFC or its registry, or a library's or application's."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


cdef class Audience:
    """Links that are written together. The hub knows it while it has members, and so do they."""

    def __cinit__(self):
        self.number = -1

    cdef int _left(self, uint32_t index) except -1:
        """The member at `index` is no longer OPEN."""
        raise NotImplementedError

    cdef int _write_some(self, int most) except -1:
        """Called by the tick, once for every _make_due, behind everything that links have queued.

        At most so many sends; returns how many it took.
        """
        raise NotImplementedError


@cython.final
cdef class CoreHub:
    """What the links of a node share: ack table, wheel, the tick, bounds and counters."""

    def __cinit__(
        self,
        object loop not None,
        AckTable acks not None,
        Wheel wheel not None,
        *,
        object encode_error not None,
        uint64_t auth_ms=5_000,
        uint64_t fragment_ms=10_000,
        uint64_t close_ms=1_000,
        uint64_t keys_ms=7_200_000,
        Py_ssize_t soft_bytes=262_144,
        Py_ssize_t hard_bytes=524_288,
        int sends_a_tick=2_048,
    ):
        global _live_hubs
        if FASTIM_DEBUG:
            _live_hubs += 1
        if not MAX_PACKET_BYTES <= soft_bytes <= hard_bytes <= 1 << 30:
            raise UsageError(
                f"soft_bytes is {soft_bytes:,} and hard_bytes {hard_bytes:,};"
                f" limits {MAX_PACKET_BYTES:,} <= soft <= hard <= {1 << 30:,}"
            )
        if sends_a_tick < 1:
            raise UsageError(f"sends_a_tick is {sends_a_tick}; at least 1")
        self._loop = loop
        self._acks = acks
        self._wheel = wheel
        self._encode_error = encode_error
        self.auth_ms = auth_ms
        self.fragment_ms = fragment_ms
        self.close_ms = close_ms
        self.keys_ms = keys_ms
        self.soft_bytes = soft_bytes
        self.hard_bytes = hard_bytes
        self.sends_a_tick = sends_a_tick
        self._links = []
        self._audiences = []
        self._numbers = []
        self._dirty = []
        self._gone = []
        self._due = []
        self._pool = <char**>malloc(POOLED * sizeof(char*))
        if self._pool == NULL:
            raise MemoryError()

    def __dealloc__(self):
        global _live_hubs
        cdef int i
        for i in range(self._pooled):
            free(self._pool[i])
            _count_buffer(-1)
        free(self._pool)
        free(self._deadlines)
        free(self._fds)
        if FASTIM_DEBUG:
            _live_hubs -= 1

    def now_ms(self) -> int:
        """The monotonic clock."""
        return _clock_ms(CLOCK_MONOTONIC)

    def link_at(self, Py_ssize_t slot) -> CoreConnection | None:
        """The link that holds a wheel slot, until its socket has ended."""
        if not 0 <= slot < len(self._links):
            return None
        return self._links[slot]

    def counters(self) -> dict[str, int]:
        """What was counted since the start; none goes down."""
        return {
            "frames_in": self.frames_in,
            "frames_out": self.frames_out,
            "packets_in": self.packets_in,
            "packets_out": self.packets_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "pings": self.pings,
            "ack_frames": self.ack_frames,
            "overflows": self.overflows,
            "bad_seals": self.bad_seals,
        }

    def sweep(self, uint64_t mono_ms) -> int:
        """End the links that are late with AUTH, an unfinished message or closing; how many that were.

        Call it every 250 ms. O(slots ever held at once), 8 bytes each; a link is looked at every fragment_ms.
        """
        cdef uint32_t[SWEPT_AT_ONCE] slots
        cdef int found = SWEPT_AT_ONCE
        cdef int ended = 0
        cdef int i
        cdef CoreConnection link
        while found == SWEPT_AT_ONCE:
            with nogil:
                found = self._sweep(mono_ms, slots, SWEPT_AT_ONCE)
            for i in range(found):
                link = self._links[slots[i]]
                if link is None:
                    continue
                try:
                    ended += link._late(mono_ms)
                except BaseException as error:
                    link._broken(error)
        return ended

    cdef int _sweep(self, uint64_t mono_ms, uint32_t* out, int cap) noexcept nogil:
        """Write the slots that are late into `out` and take their deadlines away; 0..cap, cap: call again."""
        cdef Py_ssize_t slot
        cdef int found = 0
        for slot in range(self._capacity):
            if 0 < self._deadlines[slot] <= mono_ms:
                if found == cap:
                    break
                self._deadlines[slot] = 0
                out[found] = <uint32_t>slot
                found += 1
        return found

    # -- slots

    cdef int _enter(self, CoreConnection link, uint64_t mono_ms) except -1:
        cdef int slot = self._wheel.add_c(mono_ms)
        cdef Py_ssize_t capacity = self._capacity
        cdef void* grown
        while len(self._links) <= slot:
            self._links.append(None)
        if slot >= capacity:
            capacity = 64 if capacity == 0 else capacity
            while capacity <= slot:
                capacity *= 2
            grown = realloc(self._deadlines, <size_t>capacity * sizeof(uint64_t))
            if grown == NULL:
                self._wheel.remove_c(slot)
                raise MemoryError()
            self._deadlines = <uint64_t*>grown
            grown = realloc(self._fds, <size_t>capacity * sizeof(int))
            if grown == NULL:
                self._wheel.remove_c(slot)
                raise MemoryError()
            self._fds = <int*>grown
            while self._capacity < capacity:
                self._deadlines[self._capacity] = 0
                self._fds[self._capacity] = -1
                self._capacity += 1
        self._links[slot] = link
        link.slot = slot
        return 0

    cdef int _leave(self, CoreConnection link) except -1:
        """Take the slot back and have the owner told."""
        self._links[link.slot] = None
        self._deadlines[link.slot] = 0
        self._fds[link.slot] = -1
        self._wheel.remove_c(link.slot)
        link.slot = -1
        self._gone.append(link)
        self._wake()
        return 0

    # -- the tick

    cdef int _wake(self) except -1:
        if not self._scheduled:
            self._loop.call_soon(self._tick)
            self._scheduled = True
        return 0

    def _tick(self) -> None:
        """Everything that waits for the end of the loop tick: acks, ends, writes."""
        cdef CoreConnection link
        cdef list links
        self._scheduled = False
        if self._acks.pending_drain_c() and self.on_acked is not None:
            try:
                self.on_acked()
            except BaseException as error:
                self._fatal(error)
        links = self._gone
        self._gone = []
        for link in links:
            try:
                link._tell()
            except BaseException as error:
                self._fatal(error)
        links = self._dirty
        self._dirty = []
        self._write_all(links)
        if self._due:
            self._write_due()

    # -- audiences

    cdef int _enlist(self, Audience audience) except -1:
        """Its first member comes."""
        if self._numbers:
            audience.number = self._numbers.pop()
            self._audiences[audience.number] = audience
        else:
            self._audiences.append(audience)
            audience.number = <int>len(self._audiences) - 1
        return 0

    cdef int _delist(self, Audience audience) except -1:
        """Its last member has left, so no seat names the number."""
        self._audiences[audience.number] = None
        self._numbers.append(audience.number)
        audience.number = -1
        return 0

    cdef int _make_due(self, Audience audience) except -1:
        if not audience.due:
            self._due.append(audience)
            audience.due = True
            self._wake()
        return 0

    cdef int _write_due(self) except -1:
        """As much as a tick may send; whoever is not done goes on in the next one, behind those who waited."""
        cdef Audience audience
        cdef list due = self._due
        cdef list waiting = []
        cdef int left = self.sends_a_tick
        self._due = []
        for audience in due:
            if left <= 0:
                waiting.append(audience)
                continue
            audience.due = False
            try:
                left -= audience._write_some(left)
            except BaseException as error:
                self._fatal(error)
        if waiting:
            self._due = waiting + self._due
        if self._due:
            self._wake()
        return 0

    # -- writing

    cdef int _write_all(self, list links) except -1:
        """Write each link once, plain sockets in groups without the GIL. The list keeps the links alive."""
        cdef Write[WRITES_AT_ONCE] writes
        cdef CoreConnection link
        cdef int count = 0
        for link in links:
            link._dirty = False
            try:
                if link._fd < 0:
                    link._flush(False)
                elif link._take_output(&writes[count], False):
                    count += 1
            except BaseException as error:
                link._broken(error)
            if count == WRITES_AT_ONCE:
                self._write_group(writes, count)
                count = 0
        return self._write_group(writes, count)

    cdef int _write_group(self, Write* writes, int count) except -1:
        """Nothing but system calls until all are done, so that no link changes while others are written."""
        cdef CoreConnection link
        cdef list failed = None
        cdef int i
        if count >= ALONE:
            with nogil:
                for i in range(count):
                    _send(&writes[i])
        else:
            for i in range(count):
                _send(&writes[i])
        for i in range(count):
            link = <CoreConnection>writes[i].link
            try:
                link._hand_over(&writes[i])
            except BaseException as error:
                failed = failed or []
                failed.append((link, error))
        if failed is not None:
            for link, error in failed:
                link._broken(error)
        return 0

    cdef char* _take_buffer(self) noexcept nogil:
        """FIRST_OUT bytes, or NULL."""
        cdef char* buffer
        if self._pooled > 0:
            # Not += : without the GIL, Cython's None check of the debug build refuses it.
            self._pooled = self._pooled - 1
            return self._pool[self._pooled]
        buffer = <char*>malloc(FIRST_OUT)
        if buffer != NULL:
            _count_buffer(1)
        return buffer

    cdef void _give_buffer(self, char* buffer, Py_ssize_t capacity) noexcept nogil:
        if capacity == FIRST_OUT and self._pooled < POOLED:
            self._pool[self._pooled] = buffer
            self._pooled = self._pooled + 1
        else:
            free(buffer)
            _count_buffer(-1)

    cdef void _fatal(self, object error) noexcept:
        """Whatever this raises goes to sys.unraisablehook: there is nobody else to tell."""
        if self.on_fatal is None:
            raise error
        self.on_fatal(error)


@cython.final
cdef class CoreConnection(WSListener):
    """fastim.node.link.Link on a picows transport."""

    def __cinit__(self, CoreHub hub not None, str peer not None):
        global _live_connections
        if FASTIM_DEBUG:
            _live_connections += 1
        self.hub = hub
        self.peer = peer
        self.slot = -1
        self._ack_slot = -1
        self._fd = -1

    def __dealloc__(self):
        global _live_connections
        if self._out != NULL:
            free(self._out)
            _count_buffer(-1)
        self._drop_part()
        free(self._seats)
        if FASTIM_DEBUG:
            _live_connections -= 1

    # -- what the node uses (fastim.node.link)

    @property
    def authenticated(self) -> bool:
        """False until the session says otherwise; until then only AUTH and REKEY are let through."""
        return self._authenticated

    @authenticated.setter
    def authenticated(self, bint value):
        self._authenticated = value
        if value:
            self._auth_by_ms = 0
        if self._state == OPEN:
            self._set_deadline(_clock_ms(CLOCK_MONOTONIC))

    @property
    def closed(self) -> bool:
        """True from close(), abort() or the end of the socket on."""
        return self._state != OPEN

    @property
    def overflow(self) -> bool:
        """True while more than hub.soft_bytes wait to be written."""
        cdef Py_ssize_t queued = self._out_size - self._out_start
        if not self._blocked:
            return queued > self.hub.soft_bytes
        return queued + self._handed > self.hub.soft_bytes and self._waiting() > self.hub.soft_bytes

    @property
    def peer_ended(self) -> bool:
        """The peer ended TCP; set by whoever sees that, picows tells its listener nothing."""
        return self._peer_ended

    @peer_ended.setter
    def peer_ended(self, bint value):
        self._peer_ended = value
        if value and self._state == OPEN:
            self._state = CLOSING
            self._leave_audiences()
            self._drop_out()
            self._drop_part()
            self._set_deadline(_clock_ms(CLOCK_MONOTONIC))

    def bind(self, int ack_slot) -> None:
        """From now on ACK and ACKS resolve in this ack slot without Python; -1 unbinds.

        Raises UsageError for a slot that is not open. Unbind before the slot is closed.
        """
        if self._state != OPEN:
            return
        if ack_slot != -1:
            self.hub._acks._open_slot(ack_slot)
        self._ack_slot = ack_slot

    def set_keys(self, uint32_t key_id, Sealer sealer not None, Opener opener not None) -> None:
        """Seal what is sent from now on. Call it right behind the send of KEYS, which stays outside, and under the
        keys of before if there are any. The first keys hold at once for what is received; later ones from the peer's
        first frame under them. Raises UsageError while the change before is not finished.
        """
        if self._state != OPEN:
            return
        self._seal()
        if self._stream is None:
            self._stream = SealedStream(key_id, sealer, opener, client=False)
        else:
            self._stream.renew_c(key_id, sealer, opener)
        self.sealed = True
        self._keys_since_ms = _clock_ms(CLOCK_MONOTONIC)
        self._offer()

    def set_pong(self, uint64_t user_cursor) -> None:
        """What PONG says about the user's change index."""
        self._user_cursor = user_cursor

    def send(self, bytes frame not None) -> None:
        """Queue one encoded frame for the end of this tick. Raises UsageError outside 2..65,536 bytes."""
        self.send_c(NULL, 0, PyBytes_AS_STRING(frame), PyBytes_GET_SIZE(frame))

    def send_msg(self, uint32_t tag, bint dup, bytes tail not None) -> None:
        """Queue a MSG built from the shared tail (`protocol.encode_msg_tail`)."""
        cdef uint8_t[MSG_PREFIX_BYTES] prefix
        msg_prefix_c(prefix, tag, dup)
        self.send_c(prefix, MSG_PREFIX_BYTES, PyBytes_AS_STRING(tail), PyBytes_GET_SIZE(tail))

    def close(self, int code, str reason not None="") -> None:
        """Write what is queued, then a close frame; abort close_ms later if the peer is not done. Idempotent.

        A reason above 123 bytes is cut. Raises UsageError for a code that no close frame may carry.
        """
        if self._state != OPEN:
            return
        if not _is_close_code(code):
            raise UsageError(f"close code is {code}; limits 1000-1003, 1007-1014 and 3000-4999")
        self.close_c(code, reason.encode("utf-8", "replace"))

    def abort(self) -> None:
        """Drop the socket and what is queued."""
        self.abort_c(False)

    def buffered_bytes(self) -> int:
        """What is queued here plus the transport's write buffer."""
        return self._waiting()

    def last_recv_ms(self) -> int:
        """Monotonic ms of the last frame received, of any kind."""
        return self._received_ms

    # -- what picows calls; nothing escapes

    cpdef on_ws_connected(self, WSTransport transport):
        try:
            self._open(transport)
        except BaseException as error:
            self._broken(error)

    cpdef on_ws_frame(self, WSTransport transport, WSFrame frame):
        try:
            self._received(frame)
        except BaseException as error:
            self._broken(error)

    cpdef on_ws_disconnected(self, WSTransport transport):
        try:
            if self._state == NEW:
                self._state = ENDED
                self.close_code = CLOSE_ABNORMAL
            else:
                self._end(self.close_code or CLOSE_ABNORMAL, self._peer_closed or self._peer_ended)
        except BaseException as error:
            self._broken(error)

    cpdef pause_writing(self):
        # With a high-water mark of 0: the transport could not write everything.
        self._blocked = True
        self._offer()

    cpdef resume_writing(self):
        self._blocked = False
        self._handed = 0
        self._offer()
        try:
            if self._state == OPEN and (self._out != NULL or self._late_ping is not None):
                self._mark()
        except BaseException as error:
            self._broken(error)

    def parser_failed(self, int code, str reason not None="") -> None:
        """picows found bytes that are no WebSocket frame; it hangs up in 10 ms.

        Called by whoever hears that: what is queued and our close frame go out first, and reading stops, because
        picows would parse the same bytes again with every read and its buffer would grow.
        """
        try:
            if self._state != OPEN:
                return
            if not _is_close_code(code):
                code = CLOSE_PROTOCOL
            handshake = self._transport.close_handshake
            if handshake is not None and handshake.recv is not None:
                # picows looks one frame ahead, so it keeps the peer's CLOSE before these bytes to itself. Behind
                # that they mean nothing.
                self._peer_says_close_code(handshake.recv.code)
                return
            self.close_c(code, reason.encode("utf-8", "replace"))
            if self._state == CLOSING:
                self._transport.underlying_transport.pause_reading()
        except BaseException as error:
            self._broken(error)

    cdef int _open(self, WSTransport transport) except -1:
        cdef uint64_t now = _clock_ms(CLOCK_MONOTONIC)
        if self._state != NEW:
            raise UsageError(f"the link of {self.peer} is used for a second connection")
        self._transport = transport
        if not transport.is_secure:
            self._fd = transport._socket
        # 2.5 KB per connection that nobody reads any more.
        transport.request = None
        transport.response = None
        self.hub._enter(self, now)
        self._state = OPEN
        self._received_ms = now
        self._auth_by_ms = now + self.hub.auth_ms
        self._set_deadline(now)
        self._offer()
        transport.underlying_transport.set_write_buffer_limits(0)
        if self.hub.accept is None:
            self.abort_c(False)
            return 0
        self.owner = self.hub.accept(self)
        return 0

    cdef void _broken(self, object error) noexcept:
        """Our bug: report it, and end this link only."""
        self.hub._fatal(error)
        try:
            if self._state == OPEN:
                self.close_c(CLOSE_INTERNAL, b"")
            elif self._state == NEW and self._transport is not None:
                self._transport.underlying_transport.abort()
        except BaseException as again:
            self.hub._fatal(again)
            self.abort_c(False)

    # -- in: WebSocket frames

    cdef int _received(self, WSFrame frame) except -1:
        cdef int kind = frame.msg_type
        if self._state == CLOSING and kind == WSMsgType.CLOSE and not self._peer_closed:
            self._peer_closed = True
            self._transport.underlying_transport.close()
            return 0
        if self._state != OPEN:
            return 0
        self._received_ms = _clock_ms(CLOCK_MONOTONIC)
        self.hub._wheel.touch_c(self.slot, self._received_ms)
        if frame.rsv1 or frame.rsv2 or frame.rsv3:
            return self.close_c(CLOSE_PROTOCOL, b"reserved bits are set; no extension was negotiated")
        if FASTIM_ECHO and (kind == WSMsgType.TEXT or kind == WSMsgType.BINARY):
            if self._fragments == 0:
                self._kind = <uint8_t>kind
            kind = WSMsgType.BINARY
        if kind == WSMsgType.BINARY and frame.fin and self._fragments == 0:
            return self._packet_in(<const uint8_t*>frame.payload_ptr, frame.payload_size)
        if kind == WSMsgType.BINARY or kind == WSMsgType.CONTINUATION:
            return self._fragment(frame)
        if kind == WSMsgType.TEXT:
            return self.close_c(CLOSE_TEXT, b"text; frames are binary")
        if kind == WSMsgType.CLOSE:
            return self._peer_says_close(frame)
        if frame.payload_size > MAX_CONTROL_BYTES or not frame.fin:
            return self.close_c(CLOSE_PROTOCOL, b"a control frame is fragmented or above 125 bytes")
        if kind == WSMsgType.PING:
            return self._ping(frame)
        if kind != WSMsgType.PONG:
            return self.close_c(CLOSE_PROTOCOL, b"unknown opcode")
        return 0

    cdef int _fragment(self, WSFrame frame) except -1:
        """One piece of a message of several; the last one hands the message on."""
        cdef bint first = frame.msg_type != WSMsgType.CONTINUATION
        cdef Py_ssize_t size = self._part_size + frame.payload_size
        cdef Py_ssize_t capacity
        cdef uint8_t* message
        cdef void* grown
        if first != (self._fragments == 0):
            return self.close_c(
                CLOSE_PROTOCOL,
                b"a message starts inside another" if first else b"a continuation of no message",
            )
        if size > MAX_PACKET_BYTES and not FASTIM_ECHO:
            return self.close_c(CLOSE_TOO_BIG, b"the message is above 65,536 bytes")
        if self._fragments == MAX_FRAGMENTS and not FASTIM_ECHO:
            return self.close_c(CLOSE_TOO_BIG, b"the message has more than 64 fragments")
        if size > self._part_capacity:
            capacity = FIRST_PART
            while capacity < size:
                capacity *= 2
            grown = realloc(self._part, <size_t>capacity)
            if grown == NULL:
                raise MemoryError()
            if self._part == NULL:
                _count_buffer(1)
            self._part = <uint8_t*>grown
            self._part_capacity = <uint32_t>capacity
        if frame.payload_size > 0:
            memcpy(self._part + self._part_size, frame.payload_ptr, <size_t>frame.payload_size)
        self._part_size = <uint32_t>size
        self._fragments += 1
        if first:
            self._part_since_ms = self._received_ms
            self._set_deadline(self._received_ms)
        if not frame.fin:
            return 0
        message = self._part
        self._part = NULL
        self._drop_part()
        try:
            return self._packet_in(message, size)
        finally:
            if message != NULL:
                free(message)
                _count_buffer(-1)

    cdef void _drop_part(self) noexcept nogil:
        if self._part != NULL:
            free(self._part)
            self._part = NULL
            _count_buffer(-1)
        self._part_size = 0
        self._part_capacity = 0
        self._fragments = 0

    cdef int _ping(self, WSFrame frame) except -1:
        if self._pongs < PONGS_AT_ONCE:
            self._pongs += 1
            self._control(WSMsgType.PONG, frame.payload_ptr, frame.payload_size)
        else:
            self._late_ping = PyBytes_FromStringAndSize(frame.payload_ptr, frame.payload_size)
        return self._mark()

    cdef int _peer_says_close(self, WSFrame frame) except -1:
        """picows has refused a payload of one byte, a reason that is not UTF-8 and most bad codes."""
        cdef const uint8_t* p = <const uint8_t*>frame.payload_ptr
        cdef int code = 0
        if frame.payload_size >= 2:
            code = (<int>p[0] << 8) | p[1]
            if code == 0:
                code = CLOSE_ABNORMAL       # as little a code that may be sent
        return self._peer_says_close_code(code)

    cdef int _peer_says_close_code(self, int code) except -1:
        """Answer the peer's close frame with its code (0: it had none), behind what is queued, and hang up."""
        self._peer_closed = True
        if code == 0 or _is_close_code(code):
            self.close_c(code, b"")
        else:
            self.close_c(CLOSE_PROTOCOL, b"the close code is not assigned")
        if self._transport is not None:
            self._transport.underlying_transport.close()
        return 0

    # -- in: packets and frames

    cdef int _packet_in(self, const uint8_t* p, Py_ssize_t n) except -1:
        cdef frame_span[MAX_FRAMES] spans
        cdef CoreHub hub = self.hub
        cdef SealedStream stream = self._stream
        cdef Py_ssize_t start = 0
        cdef int count, i
        hub.packets_in += 1
        hub.bytes_in += <uint64_t>n
        if FASTIM_ECHO:
            return self._echo(p, n)
        if stream is not None:
            try:
                # The bytes are picows' or a reassembled message's, read by nobody after this.
                n = stream.open_c(<uint8_t*>p, n, &start)
            except PeerError:
                return self._bad_seal()
            p += start
            if stream.left_c() == 0:
                return self.close_c(CLOSE_KEYS_ENDED, b"")
        try:
            count = split_c(p, n, spans, MAX_FRAMES)
        except PeerError as error:
            return self._refuse(0, error)
        for i in range(count):
            if self._state != OPEN:
                break
            if self._stream is not stream:
                # REKEY in clear was not the last frame of its packet.
                return self._bad_seal()
            hub.frames_in += 1
            self._frame_in(spans[i].op, p + spans[i].start, spans[i].end - spans[i].start)
        return 0

    cdef int _echo(self, const uint8_t* p, Py_ssize_t n) except -1:
        """Send a message back as one WebSocket frame."""
        cdef uint8_t* head
        cdef int i
        if self._kind == WSMsgType.TEXT:
            try:
                PyUnicode_DecodeUTF8(<const char*>p, n, NULL)
            except UnicodeDecodeError:
                return self.close_c(CLOSE_NOT_UTF8, b"text that is not UTF-8")
        self._room(n + 10)
        head = <uint8_t*>self._out + self._out_size
        head[0] = 0x80 | self._kind
        if n < 126:
            head[1] = <uint8_t>n
            head += 2
        elif n < 65_536:
            head[1] = 126
            head[2] = <uint8_t>(n >> 8)
            head[3] = <uint8_t>(n & 0xFF)
            head += 4
        else:
            head[1] = 127
            for i in range(8):
                head[2 + i] = <uint8_t>((n >> (56 - 8 * i)) & 0xFF)
            head += 10
        if n > 0:
            memcpy(head, p, <size_t>n)
        self._out_size = <uint32_t>(head - <uint8_t*>self._out + n)
        return self._mark()

    cdef int _frame_in(self, int op, const uint8_t* p, Py_ssize_t n) except -1:
        cdef uint8_t[PONG_BYTES] pong
        cdef CoreHub hub = self.hub
        cdef uint32_t last_tag = 0
        try:
            if op == OP_PING and self._authenticated:
                hub.pings += 1
                if self._ack_slot >= 0:
                    last_tag = hub._acks.last_tag_c(self._ack_slot)
                self.send_c(
                    pong, pong_c(pong, _clock_ms(CLOCK_REALTIME), last_tag, self._user_cursor), NULL, 0
                )
            elif (op == OP_ACK or op == OP_ACKS) and self._ack_slot >= 0:
                self._acked(op, p, n)
            elif op == OP_SEALED or (op == OP_REKEY and self._changing()):
                self._bad_seal()
            elif not self._authenticated and op != OP_AUTH and op != OP_REKEY:
                raise PeerError("unauthenticated", f"op {op} before AUTH")
            else:
                self.owner.on_command(op, PyBytes_FromStringAndSize(<const char*>p, n))
        except PeerError as error:
            self._refuse(op, error)
        return 0

    cdef int _acked(self, int op, const uint8_t* p, Py_ssize_t n) except -1:
        cdef uint64_t[MAX_ACK_IDS] msg_ids
        cdef CoreHub hub = self.hub
        cdef int count, i
        hub.ack_frames += 1
        if op == OP_ACK:
            hub._acks.ack_to_c(self._ack_slot, <uint32_t>parse_ack_c(p, n))
        else:
            count = parse_acks_c(p, n, msg_ids)
            for i in range(count):
                hub._acks.ack_id_c(self._ack_slot, msg_ids[i])
        if hub._acks.pending_drain_c():
            hub._wake()
        return 0

    cdef int _refuse(self, int op, object error) except -1:
        """The peer broke a rule: an ERROR frame, and for some rules the end."""
        code = error.code
        self.send(self.hub._encode_error(op, error))
        if self._state != OPEN:
            return 0
        if code == "bad_frame" or code == "bad_ack":
            return self.close_c(CLOSE_BAD_FRAME, code.encode())
        if code == "unauthenticated" and not self._authenticated:
            return self.close_c(CLOSE_AUTH, b"unauthenticated")
        return 0

    cdef bint _changing(self) noexcept:
        """Whether the peer was given new keys and has not used them."""
        return self._stream is not None and self._stream._next is not None

    cdef int _bad_seal(self) except -1:
        """A code and nothing else: whoever forges, repeats or cuts frames is not told what gave him away."""
        self.hub.bad_seals += 1
        return self.close_c(CLOSE_BAD_FRAME, b"")

    # -- out: the buffer

    cdef int send_c(
        self, const void* head, Py_ssize_t head_bytes, const void* body, Py_ssize_t body_bytes
    ) except -1:
        """Queue one frame made of two parts; a no-op unless OPEN. Raises UsageError outside 2..65,536 bytes (65,501
        once keys were agreed).

        Never calls the owner. O(bytes), allocates only when the buffer grows.
        """
        cdef Py_ssize_t n = head_bytes + body_bytes
        cdef Py_ssize_t most = MAX_PACKET_BYTES, gap = GAP_BYTES
        cdef Py_ssize_t queued
        if self._state != OPEN:
            return 0
        if self._stream is not None:
            most = MAX_INNER_BYTES
            gap += SEALED_HEADER_BYTES
        if n < 2 or n > most:
            raise UsageError(f"the frame is {n:,} bytes; limits 2 and {most:,}")
        if self._packet != 0 and (self._packet_frames == MAX_FRAMES or self._out_size - self._packet + n > most):
            self._seal()
        if self._packet == 0 and self._stream is not None and self._stream.left_c() == 0:
            # The peer did not ask for new keys, twice as long as it should.
            return self.close_c(CLOSE_KEYS_ENDED, b"")
        self._room(n + gap)
        if self._packet == 0:
            self._out_size += <uint32_t>gap
            self._packet = self._out_size
            self._packet_frames = 0
        if head_bytes > 0:
            memcpy(self._out + self._out_size, head, <size_t>head_bytes)
        if body_bytes > 0:
            memcpy(self._out + self._out_size + head_bytes, body, <size_t>body_bytes)
        self._out_size += <uint32_t>n
        self._packet_frames += 1
        queued = self._out_size - self._out_start
        if not self._blocked:
            if queued >= EARLY_BYTES:
                return self._flush(False)
            return self._mark()
        if queued + self._handed > self.hub.hard_bytes and self._waiting() > self.hub.hard_bytes:
            self.hub.overflows += 1
            return self.abort_c(False)
        return 0

    cdef int _room(self, Py_ssize_t more) except -1:
        """Make room for `more` bytes, and for a tag and a long header."""
        cdef Py_ssize_t need = self._out_size + more + BEHIND_BYTES
        cdef Py_ssize_t capacity = self._out_capacity
        cdef void* grown
        if need <= capacity:
            return 0
        if self._out == NULL and need <= FIRST_OUT:
            self._out = self.hub._take_buffer()
            if self._out == NULL:
                raise MemoryError()
            self._out_capacity = FIRST_OUT
            return 0
        capacity = FIRST_OUT if capacity < FIRST_OUT else capacity
        while capacity < need:
            capacity *= 2
        grown = realloc(self._out, <size_t>capacity)
        if grown == NULL:
            raise MemoryError()
        if self._out == NULL:
            _count_buffer(1)
        self._out = <char*>grown
        self._out_capacity = <uint32_t>capacity
        return 0

    cdef int _seal(self) except -1:
        """Write the header of the growing packet into its gap, and close the gap where it is too wide.

        With keys, first the packet becomes the content of a box, where it is. Its counter is then spent.
        """
        cdef Py_ssize_t n
        cdef uint8_t* gap
        if self._packet == 0:
            return 0
        n = self._out_size - self._packet
        if self._stream is not None:
            self._stream.seal_c(<uint8_t*>self._out + self._packet, n)
            self._packet -= SEALED_HEADER_BYTES
            self._out_size += TAG_BYTES
            n += SEALED_HEADER_BYTES + TAG_BYTES
        gap = <uint8_t*>self._out + self._packet - GAP_BYTES
        if n < 126:
            if self._packet - GAP_BYTES == self._out_start:
                self._out_start += 2
                gap += 2
            else:
                memmove(gap + 2, gap + GAP_BYTES, <size_t>n)
                self._out_size -= 2
            gap[0] = 0x82
            gap[1] = <uint8_t>n
        elif n < 65_536:
            gap[0] = 0x82
            gap[1] = 126
            gap[2] = <uint8_t>(n >> 8)
            gap[3] = <uint8_t>(n & 0xFF)
        else:
            # Exactly 65,536; _room left SPARE_BYTES behind the tag for this.
            memmove(gap + GAP_BYTES + SPARE_BYTES, gap + GAP_BYTES, <size_t>n)
            self._out_size += SPARE_BYTES
            memcpy(gap, b"\x82\x7f\0\0\0\0\0\1\0\0", GAP_BYTES + SPARE_BYTES)
        self.hub.packets_out += 1
        self.hub.frames_out += self._packet_frames
        self.hub.bytes_out += <uint64_t>n
        self._packet = 0
        return 0

    cdef int _control(self, int opcode, const char* p, Py_ssize_t n) except -1:
        """Queue a control frame of at most 125 bytes behind what is queued."""
        self._seal()
        self._room(2 + n)
        self._out[self._out_size] = <char>(0x80 | opcode)
        self._out[self._out_size + 1] = <char>n
        if n > 0:
            memcpy(self._out + self._out_size + 2, p, <size_t>n)
        self._out_size += <uint32_t>(2 + n)
        return 0

    cdef int _mark(self) except -1:
        """Have the tick write this link."""
        if not self._dirty and not self._blocked:
            self.hub._dirty.append(self)
            self._dirty = True
            self.hub._wake()
        return 0

    cdef void _offer(self) noexcept:
        """Tell the hub whether an audience may write to the socket past this link, once its queue is written."""
        cdef bint free_to_write = self._state == OPEN and not self._blocked and self._stream is None
        if self.slot >= 0:
            self.hub._fds[self.slot] = self._fd if free_to_write else -1

    cdef int _flush(self, bint force) except -1:
        """Write everything queued with one call, unless the transport is behind; `force`: even then."""
        cdef Write write
        if not self._take_output(&write, force):
            return 0
        if write.fd >= 0:
            _send(&write)
        return self._hand_over(&write)

    cdef bint _take_output(self, Write* write, bint force) except -1:
        """Move what is queued into `write`; False when there is nothing or the transport is behind."""
        cdef bytes ping = self._late_ping
        if self._transport is None or (self._blocked and not force):
            return False
        if ping is not None:
            self._late_ping = None
            self._control(WSMsgType.PONG, PyBytes_AS_STRING(ping), PyBytes_GET_SIZE(ping))
        self._pongs = 0
        if self._out == NULL:
            return False
        self._seal()
        write.link = <PyObject*>self
        write.fd = -1 if self._blocked else self._fd
        write.out = self._out
        write.capacity = self._out_capacity
        write.p = self._out + self._out_start
        write.size = self._out_size - self._out_start
        write.sent = 0
        self._out = NULL
        self._out_capacity = 0
        self._out_start = 0
        self._out_size = 0
        return True

    cdef int _hand_over(self, Write* write) except -1:
        """Give the transport what the kernel did not take, which it copies; free the buffer."""
        cdef Py_ssize_t rest = write.size - write.sent
        if rest > 0 and self._transport is not None:
            try:
                self._give_transport(write.p + write.sent, rest)
            finally:
                self.hub._give_buffer(write.out, write.capacity)
        else:
            self.hub._give_buffer(write.out, write.capacity)
        return 0

    cdef int _give_transport(self, const char* p, Py_ssize_t n) except -1:
        self._handed += n
        if self._transport._is_aiofn_transport and not self._blocked:
            self._transport._tr_write(PyMemoryView_FromMemory(<char*>p, n, PyBUF_READ))
        else:
            self._transport._tr_write(PyBytes_FromStringAndSize(p, n))
        if not self._blocked:
            self._handed = 0
        return 0

    cdef Py_ssize_t _waiting(self) except -1:
        cdef Py_ssize_t queued = self._out_size - self._out_start
        if self._blocked and self._transport is not None:
            self._handed = self._transport._tr_get_write_buffer_size()
            queued += self._handed
        return queued

    cdef void _drop_out(self) noexcept nogil:
        if self._out != NULL:
            self.hub._give_buffer(self._out, self._out_capacity)
            self._out = NULL
        self._out_capacity = 0
        self._out_start = 0
        self._out_size = 0
        self._packet = 0

    # -- audiences

    cdef bint take_c(self, const char* p, Py_ssize_t n, object view, Py_ssize_t most) except -1:
        """Write or queue whole BINARY frames behind what is queued, unless more than `most` bytes would wait.

        False when they would; nothing was taken then. `view` are the same bytes; p is not kept. Never calls the
        owner.
        """
        cdef Py_ssize_t at = 0, size = 0
        if self._state != OPEN:
            return True
        if self._out_size - self._out_start + self._handed + n > most and self._waiting() + n > most:
            return False
        if self._stream is not None:
            while at < n and self._state == OPEN:
                size = <uint8_t>p[at + 1]
                at += 2
                if size == 126:
                    size = (<Py_ssize_t><uint8_t>p[at] << 8) | <uint8_t>p[at + 1]
                    at += 2
                # Nothing joins it: it may hold as many frames as a packet can.
                self._seal()
                self.send_c(NULL, 0, p + at, size)
                self._seal()
                at += size
        elif self._blocked or self._out != NULL:
            self._seal()
            self._room(n)
            memcpy(self._out + self._out_size, p, <size_t>n)
            self._out_size += <uint32_t>n
        elif self._transport._is_aiofn_transport:
            self._handed += n
            self._transport._tr_write(view)
            if not self._blocked:
                self._handed = 0
            return True
        else:
            self._give_transport(p, n)
            return True
        if self._state == OPEN and not self._blocked:
            self._flush(False)
        return True

    cdef Seat* _seat_in(self, int audience) noexcept:
        """NULL when it is no member. O(audiences of this link)."""
        cdef uint32_t i
        for i in range(self._seat_count):
            if self._seats[i].audience == audience:
                return &self._seats[i]
        return NULL

    cdef int _sit_down(self, int audience, uint32_t index) except -1:
        """Become the member at `index`; the caller knows that it is none."""
        cdef uint32_t capacity
        cdef void* grown
        if self._seat_count == self._seat_capacity:
            capacity = FIRST_SEATS if self._seat_capacity == 0 else self._seat_capacity * 2
            grown = realloc(self._seats, capacity * sizeof(Seat))
            if grown == NULL:
                raise MemoryError()
            self._seats = <Seat*>grown
            self._seat_capacity = capacity
        self._seats[self._seat_count].audience = audience
        self._seats[self._seat_count].index = index
        self._seat_count += 1
        return 0

    cdef void _get_up(self, Seat* seat) noexcept:
        """Give a seat back; the audience is told by the caller."""
        self._seat_count -= 1
        seat[0] = self._seats[self._seat_count]
        if self._seat_count == 0:
            free(self._seats)
            self._seats = NULL
            self._seat_capacity = 0

    cdef int _leave_audiences(self) except -1:
        cdef Seat seat
        self._offer()
        while self._seat_count > 0:
            seat = self._seats[self._seat_count - 1]
            self._get_up(&self._seats[self._seat_count - 1])
            (<Audience>self.hub._audiences[seat.audience])._left(seat.index)
        return 0

    # -- the end

    cdef int close_c(self, int code, bytes reason) except -1:
        """Write what is queued and a close frame; code 0: a frame without one. A no-op unless OPEN.

        The caller knows that the code may be sent. Never calls the owner.
        """
        cdef char[2 + MAX_REASON_BYTES] payload
        cdef Py_ssize_t n = PyBytes_GET_SIZE(reason)
        cdef const uint8_t* p = <const uint8_t*>PyBytes_AS_STRING(reason)
        if self._state != OPEN:
            return 0
        if n > MAX_REASON_BYTES:
            n = MAX_REASON_BYTES
            while n > 0 and p[n] & 0xC0 == 0x80:    # not in the middle of a character
                n -= 1
        payload[0] = <char>(code >> 8)
        payload[1] = <char>(code & 0xFF)
        memcpy(payload + 2, p, <size_t>n)
        self._control(WSMsgType.CLOSE, payload, 2 + n if code != 0 else 0)
        self._state = CLOSING
        self._leave_audiences()
        self.close_code = code if code != 0 else CLOSE_NO_CODE
        self._set_deadline(_clock_ms(CLOCK_MONOTONIC))
        self._drop_part()
        # picows must send nothing behind it.
        self._transport.is_close_frame_sent = True
        return self._flush(True)

    cdef int abort_c(self, bint orderly) except -1:
        """Never calls the owner."""
        cdef WSTransport transport = self._transport
        if self._state == OPEN or self._state == CLOSING:
            self._end(self.close_code or CLOSE_ABNORMAL, orderly)
            transport.underlying_transport.abort()
        return 0

    cdef void _set_deadline(self, uint64_t mono_ms) noexcept nogil:
        """When the sweep looks at this link next; late by itself, or it finds nothing and sets the next time."""
        cdef uint64_t at_ms = mono_ms + self.hub.fragment_ms
        if self._state == CLOSING:
            # Who did not read for ten seconds will not read this either.
            at_ms = mono_ms + (self.hub.close_ms // 4 if self.close_code == CLOSE_SLOW else self.hub.close_ms)
        else:
            if self._fragments > 0 and self._part_since_ms + self.hub.fragment_ms < at_ms:
                at_ms = self._part_since_ms + self.hub.fragment_ms
            if 0 < self._auth_by_ms < at_ms:
                at_ms = self._auth_by_ms
        self.hub._deadlines[self.slot] = at_ms

    cdef int _late(self, uint64_t mono_ms) except -1:
        """The deadline is past: 1 when this link was ended for it, else 0."""
        if self._state == CLOSING:
            self.abort_c(self._peer_closed or self._peer_ended)
            return 1
        if self._state != OPEN:
            return 0
        if 0 < self._auth_by_ms <= mono_ms:
            self.close_c(CLOSE_AUTH, b"no AUTH in time")
            return 1
        if self._fragments > 0 and self._part_since_ms + self.hub.fragment_ms <= mono_ms:
            self.close_c(CLOSE_SLOW, b"a message was not finished in time")
            return 1
        if self._stream is not None and self._keys_since_ms + self.hub.keys_ms <= mono_ms:
            self.close_c(CLOSE_KEYS_ENDED, b"")
            return 1
        if self._received_ms + self.hub.fragment_ms <= mono_ms and self._unfinished():
            # Nobody knows when this half frame began, so it gets one more round.
            if self._stuck_ms == self._received_ms:
                self.close_c(CLOSE_SLOW, b"a frame was not finished in time")
                return 1
            self._stuck_ms = self._received_ms
        self._set_deadline(mono_ms)
        return 0

    cdef bint _unfinished(self) except -1:
        """Whether picows holds the beginning of a WebSocket frame: its read buffer is not all free.

        Free it is 256 bytes less than READ_BUFFER_BYTES, doubled as often as it had to grow. Exactly half a buffer
        passes for free; such a peer is left to the wheel.
        """
        cdef Py_ssize_t whole = READ_BUFFER - 256
        cdef Py_ssize_t free_bytes = len(self._transport.underlying_transport.get_protocol().get_buffer(-1))
        while whole < free_bytes:
            whole *= 2
        return free_bytes != whole

    cdef int _end(self, int code, bint orderly) except -1:
        """The socket is gone, or given up: free everything and have the owner told."""
        if self._state != OPEN and self._state != CLOSING:
            return 0
        self._state = ENDED
        self._leave_audiences()
        self.close_code = code
        self._orderly = orderly
        self._ack_slot = -1
        self._fd = -1
        self._blocked = False
        self._handed = 0
        self._transport = None
        self._stream = None
        self._late_ping = None
        self._drop_out()
        self._drop_part()
        return self.hub._leave(self)

    cdef int _tell(self) except -1:
        owner = self.owner
        self.owner = None
        if owner is not None:
            owner.on_closed(self.close_code, self._orderly)
        return 0
