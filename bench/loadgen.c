/* Drive many fastim clients from one spinning thread and measure what they see.
 *
 *   loadgen HOST PORT PATH PLAN [--warm-s N] [--closed-s N] [--open-s N] [--rate R] [--window W]
 *           [--body BYTES] [--cpu N] [--pids P,P] [--drain-s N] [--origin TEXT] [--calls-s N --calls-event ID]
 *
 * PLAN lines:  c <device> <token>     a connection; the first is number 0
 *              v <conv> <a> <b>       a 1:1 conversation between connections a and b
 *
 * Every SEND frame carries one message. A body begins with the intended send time (16 hex digits, ns of
 * CLOCK_MONOTONIC), the sender's counter in this conversation (8 hex digits) and the sender's side (a digit), so
 * that the receiver knows the latency from the moment the message was meant to leave, and sees every hole,
 * repetition and inversion by itself. Acks are cumulative, every 32 tagged frames or 200 ms.
 *
 * One JSON line per phase on stdout; exit 1 when a client was lost or anything was lost, repeated or out of order.
 * The server's CPU time is read from /proc/<pid>/stat when a phase begins and when everything of it is acked; what
 * neither it nor we used meanwhile is "others_cores". The system calls of the server's threads are counted in a
 * closed phase of its own, for counting costs something; ID is the kernel's number of raw_syscalls:sys_enter. Where
 * the kernel does not let us count, there is none of it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <dirent.h>
#include <fcntl.h>
#include <linux/perf_event.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

enum {
    MAX_CONNS = 20000,
    MAX_PIDS = 64,
    MAX_THREADS = 1024,
    READ_BYTES = 1 << 18,
    PACKET_BYTES = 65536 + 64,
    ACK_FRAMES = 32,
    BODY_HEAD = 25,
    HISTOGRAM = 64 * 64,
};
static const uint64_t ACK_NS = 200000000ull, BEAT_NS = 9000000000ull;

/* ------------------------------------------------------------------------------------------------- state */

typedef struct {
    uint64_t *items;
    uint32_t head, used, room;
} Ring; /* intended send times that wait for their turn */

typedef struct {
    Ring waiting;
    bool outstanding;
    uint64_t intended_ns;      /* of the outstanding message */
    uint32_t counter;          /* messages this side has sent */
    uint32_t peer_next;        /* the peer's next counter */
    uint64_t seqs, sum, square; /* over all seqs that this side has seen, in SENT or MSG */
    uint64_t last_msg, last_sent, top;
} Side;

typedef struct {
    char *name;
    uint32_t length;
    int conn[2];
    Side side[2];
} Conv;

typedef struct {
    int fd;
    enum { IDLE, CONNECTING, UPGRADING, AUTHENTICATING, READY, CLOSED } state;
    char *token, *device;
    uint32_t *convs; /* conversation number * 2 + side */
    uint32_t n_convs, next_conv;
    uint8_t *in;
    uint32_t in_used, in_room;
    uint8_t *out;
    uint32_t out_used, out_room;
    bool dirty, want_write;
    uint32_t tag, acked_tag, unacked;
    uint64_t unacked_since, last_write;
    uint32_t outstanding;
} Conn;

static Conn *conns;
static int n_conns;
static Conv *convs;
static uint32_t n_convs, conv_mask, *conv_index;
static int epoll_fd;
static int *dirty_list, n_dirty;
static uint32_t body_bytes = 128, window = 1;
static bool closed_loop, sending;
static uint64_t mono_now;
static int ready_conns, lost_conns;
static uint64_t random_state = 0x9e3779b97f4a7c15ull;

static struct {
    uint64_t offered, sent, accepted, delivered, acks, packets_out, packets_in;
    uint64_t dup_wire, echoes, skips;
    uint32_t sent_ns[HISTOGRAM], msg_ns[HISTOGRAM];
} count, zero;
/* Never set back: one of these spoils the whole run, also during a warm-up. */
static struct {
    uint64_t errors, repeats, holes, inversions;
} fault;
/* Totals over all phases, for "everything sent has arrived". */
static uint64_t total_sent, total_accepted, total_delivered;

static void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("loadgen: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

static void *grow(void *memory, size_t bytes)
{
    void *grown = realloc(memory, bytes);
    if (!grown)
        die("out of memory (%zu bytes)", bytes);
    return grown;
}

static uint64_t random64(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

/* ------------------------------------------------------------------- latency histogram: 64 steps an octave */

static uint32_t bucket_of(uint64_t ns)
{
    if (ns < 64)
        return (uint32_t)ns;
    int octave = 63 - __builtin_clzll(ns);
    uint32_t bucket = (uint32_t)(octave - 5) * 64 + (uint32_t)((ns >> (octave - 6)) & 63);
    return bucket < HISTOGRAM ? bucket : HISTOGRAM - 1;
}

static double bucket_ms(uint32_t bucket)
{
    if (bucket < 64)
        return bucket / 1e6;
    int octave = (int)(bucket / 64) + 5;
    return (double)((1ull << octave) + (uint64_t)(bucket % 64 + 1) * (1ull << (octave - 6))) / 1e6;
}

static double quantile_ms(const uint32_t *histogram, double share)
{
    uint64_t all = 0, seen = 0;
    for (int i = 0; i < HISTOGRAM; i++)
        all += histogram[i];
    for (uint32_t i = 0; i < HISTOGRAM; i++) {
        seen += histogram[i];
        if (all && (double)seen >= share * (double)all)
            return bucket_ms(i);
    }
    return 0;
}

static void ring_push(Ring *ring, uint64_t value)
{
    if (ring->used == ring->room) {
        uint32_t room = ring->room ? ring->room * 2 : 4;
        uint64_t *items = grow(NULL, room * sizeof *items);
        for (uint32_t i = 0; i < ring->used; i++)
            items[i] = ring->items[(ring->head + i) % ring->room];
        free(ring->items);
        ring->items = items;
        ring->head = 0;
        ring->room = room;
    }
    ring->items[(ring->head + ring->used++) % ring->room] = value;
}

static uint64_t ring_pop(Ring *ring)
{
    uint64_t value = ring->items[ring->head];
    ring->head = (ring->head + 1) % ring->room;
    ring->used--;
    return value;
}

/* ------------------------------------------------------------------------------------------------ output */

static void mark_dirty(Conn *c)
{
    if (!c->dirty) {
        c->dirty = true;
        dirty_list[n_dirty++] = (int)(c - conns);
    }
}

static void queue_raw(Conn *c, const void *bytes, size_t length)
{
    if (c->out_used + length > c->out_room) {
        c->out_room = (uint32_t)(c->out_used + length) * 2;
        c->out = grow(c->out, c->out_room);
    }
    memcpy(c->out + c->out_used, bytes, length);
    c->out_used += (uint32_t)length;
    mark_dirty(c);
}

static void queue_ws(Conn *c, int opcode, const uint8_t *payload, size_t length)
{
    uint8_t head[14], *at = head;
    *at++ = (uint8_t)(0x80 | opcode);
    if (length < 126) {
        *at++ = (uint8_t)(0x80 | length);
    } else if (length < 65536) {
        *at++ = 0x80 | 126;
        *at++ = (uint8_t)(length >> 8);
        *at++ = (uint8_t)length;
    } else {
        die("packet of %zu bytes; limit 65535", length);
    }
    uint32_t mask = (uint32_t)random64();
    memcpy(at, &mask, 4);
    queue_raw(c, head, (size_t)(at + 4 - head));
    uint32_t start = c->out_used;
    queue_raw(c, payload, length);
    const uint8_t *key = (const uint8_t *)&mask;
    for (size_t i = 0; i < length; i++)
        c->out[start + i] ^= key[i & 3];
    c->last_write = mono_now;
    count.packets_out++;
}

static void watch(Conn *c, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u32 = (uint32_t)(c - conns)};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

static void drop(Conn *c, const char *why)
{
    if (c->state == CLOSED)
        return;
    if (c->state == READY)
        ready_conns--;
    lost_conns++;
    if (lost_conns <= 5)
        fprintf(stderr, "loadgen: connection %d lost: %s\n", (int)(c - conns), why);
    c->state = CLOSED;
    close(c->fd);
}

static void flush_conn(Conn *c)
{
    c->dirty = false;
    if (c->state == CLOSED || !c->out_used)
        return;
    ssize_t n = send(c->fd, c->out, c->out_used, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        drop(c, strerror(errno));
        return;
    }
    if (n < 0)
        n = 0;
    c->out_used -= (uint32_t)n;
    memmove(c->out, c->out + n, c->out_used);
    bool want = c->out_used > 0;
    if (want != c->want_write) {
        c->want_write = want;
        watch(c, EPOLLIN | (want ? EPOLLOUT : 0u));
    }
}

static void flush_dirty(void)
{
    for (int i = 0; i < n_dirty; i++)
        flush_conn(&conns[dirty_list[i]]);
    n_dirty = 0;
}

static void send_ack(Conn *c)
{
    uint8_t frame[8], *at = frame;
    *at++ = 0x92;
    *at++ = ACK;
    at = put_uint(at, c->tag);
    queue_ws(c, 2, frame, (size_t)(at - frame));
    c->acked_tag = c->tag;
    c->unacked = 0;
    count.acks++;
}

static void send_message(Conn *c, Conv *v, int side)
{
    static uint8_t frame[PACKET_BYTES];
    static uint64_t wall_offset;
    Side *s = &v->side[side];
    if (!wall_offset)
        wall_offset = clock_ns(CLOCK_REALTIME) - clock_ns(CLOCK_MONOTONIC);
    s->intended_ns = ring_pop(&s->waiting);
    s->outstanding = true;
    c->outstanding++;
    uint8_t *at = frame;
    *at++ = 0x93;
    *at++ = SEND;
    at = put_text(at, v->name, v->length);
    *at++ = 0x91;
    *at++ = 0x93;
    at = put_bin_head(at, 16);
    uint64_t ms = (mono_now + wall_offset) / 1000000, low = random64(), high = random64();
    for (int i = 0; i < 6; i++)
        *at++ = (uint8_t)(ms >> (40 - 8 * i));
    *at++ = (uint8_t)(0x70 | (high & 0x0f));
    *at++ = (uint8_t)(high >> 8);
    *at++ = (uint8_t)(0x80 | ((high >> 16) & 0x3f));
    for (int i = 0; i < 7; i++)
        *at++ = (uint8_t)(low >> (8 * i));
    *at++ = 1; /* kind text */
    at = put_bin_head(at, body_bytes);
    char head[BODY_HEAD + 1];
    snprintf(head, sizeof head, "%016llx%08x%d", (unsigned long long)s->intended_ns, s->counter, side);
    memcpy(at, head, BODY_HEAD);
    memset(at + BODY_HEAD, 'x', body_bytes - BODY_HEAD);
    at += body_bytes;
    s->counter++;
    count.sent++;
    total_sent++;
    queue_ws(c, 2, frame, (size_t)(at - frame));
}

/* A message is meant to leave connection c now (or was, a moment ago). */
static void offer(Conn *c, uint64_t intended_ns)
{
    if (c->state != READY || !c->n_convs)
        return;
    uint32_t which = c->convs[c->next_conv];
    c->next_conv = (c->next_conv + 1) % c->n_convs;
    Conv *v = &convs[which >> 1];
    Side *s = &v->side[which & 1];
    count.offered++;
    ring_push(&s->waiting, intended_ns);
    if (!s->outstanding)
        send_message(c, v, (int)(which & 1));
}

/* ------------------------------------------------------------------------------------------------- input */

static Conv *find_conv(const uint8_t *name, uint32_t length)
{
    uint64_t hash = 1469598103934665603ull;
    for (uint32_t i = 0; i < length; i++)
        hash = (hash ^ name[i]) * 1099511628211ull;
    for (uint32_t slot = (uint32_t)(hash ^ hash >> 32) & conv_mask;; slot = (slot + 1) & conv_mask) {
        if (!conv_index[slot])
            return NULL;
        Conv *v = &convs[conv_index[slot] - 1];
        if (v->length == length && !memcmp(v->name, name, length))
            return v;
    }
}

static void tagged(Conn *c, uint64_t tag)
{
    if (!tag)
        return;
    if (tag > c->tag)
        c->tag = (uint32_t)tag;
    if (!c->unacked++)
        c->unacked_since = mono_now;
}

static void saw_seq(Side *s, uint64_t seq)
{
    s->seqs++;
    s->sum += seq;
    s->square += seq * seq;
    if (seq > s->top)
        s->top = seq;
}

static void on_msg(Conn *c, Reader *r)
{
    uint32_t length, client_length, body_length;
    uint64_t tag = read_uint(r), dup = read_uint(r);
    read_uint(r); /* msg_id */
    const uint8_t *name = read_bytes(r, &length);
    uint64_t seq = read_uint(r);
    read_uint(r); /* cseq */
    read_uint(r); /* epoch */
    skip_value(r, 0); /* sender */
    read_bytes(r, &client_length);
    read_uint(r); /* kind */
    read_uint(r); /* ts */
    read_uint(r); /* loss_time */
    read_uint(r); /* flags */
    const uint8_t *body = read_bytes(r, &body_length);
    if (r->bad)
        return;
    tagged(c, tag);
    Conv *v = find_conv(name, length);
    if (!v || body_length < BODY_HEAD) {
        fault.errors++;
        return;
    }
    char head[BODY_HEAD + 1];
    memcpy(head, body, BODY_HEAD);
    head[BODY_HEAD] = 0;
    int sender = head[24] - '0', mine = conns + v->conn[0] == c ? 0 : 1;
    head[24] = 0;
    uint32_t counter = (uint32_t)strtoul(head + 16, NULL, 16);
    head[16] = 0;
    uint64_t intended = strtoull(head, NULL, 16);
    if (sender == mine) {
        count.echoes++;
        return;
    }
    Side *s = &v->side[mine];
    if (seq <= s->last_msg) {
        if (dup)
            count.dup_wire++;
        else
            fault.repeats++;
        return;
    }
    if (counter > s->peer_next)
        fault.holes += counter - s->peer_next;
    else if (counter < s->peer_next)
        fault.inversions++;
    s->peer_next = counter + 1;
    s->last_msg = seq;
    saw_seq(s, seq);
    count.delivered++;
    total_delivered++;
    count.msg_ns[bucket_of(mono_now - intended)]++;
}

static void on_sent(Conn *c, Reader *r)
{
    uint32_t length, client_length;
    uint64_t tag = read_uint(r);
    const uint8_t *name = read_bytes(r, &length);
    read_uint(r); /* epoch */
    uint32_t items = read_array(r);
    if (r->bad)
        return;
    tagged(c, tag);
    Conv *v = find_conv(name, length);
    if (!v) {
        fault.errors++;
        return;
    }
    int mine = conns + v->conn[0] == c ? 0 : 1;
    Side *s = &v->side[mine];
    while (items-- && !r->bad) {
        uint32_t fields = read_array(r);
        read_bytes(r, &client_length);
        read_uint(r); /* msg_id */
        uint64_t seq = read_uint(r);
        for (uint32_t i = 3; i < fields; i++)
            skip_value(r, 0);
        if (r->bad)
            return;
        if (!s->outstanding || seq <= s->last_sent) {
            fault.repeats++;
            continue;
        }
        s->last_sent = seq;
        saw_seq(s, seq);
        s->outstanding = false;
        c->outstanding--;
        count.accepted++;
        total_accepted++;
        count.sent_ns[bucket_of(mono_now - s->intended_ns)]++;
        if (s->waiting.used)
            send_message(c, v, mine);
        if (closed_loop && sending && c->outstanding < window)
            offer(c, mono_now);
    }
}

static void on_frame(Conn *c, Reader *r)
{
    const uint8_t *start = r->at;
    uint32_t fields = read_array(r);
    uint64_t op = read_uint(r);
    if (r->bad || !fields) {
        drop(c, "unreadable frame");
        return;
    }
    switch (op) {
    case MSG:
        on_msg(c, r);
        break;
    case SENT:
        on_sent(c, r);
        break;
    case SKIP:
        count.skips++;
        tagged(c, read_uint(r));
        break;
    case HELLO:
        if (c->state == AUTHENTICATING) {
            c->state = READY;
            ready_conns++;
        }
        break;
    case ERROR: {
        uint32_t length;
        read_uint(r);
        const uint8_t *code = read_bytes(r, &length);
        if (!fault.errors++)
            fprintf(stderr, "loadgen: connection %d got ERROR %.*s\n", (int)(c - conns), (int)length,
                    (const char *)code);
        break;
    }
    case LEVEL:
    case HEAD:
        tagged(c, read_uint(r));
        break;
    case PROBE: {
        static const uint8_t ping[] = {0x91, PING};
        queue_ws(c, 2, ping, sizeof ping);
        break;
    }
    default: /* PONG, CHANGES, READ_MARK, GOAWAY ... */
        break;
    }
    r->at = start;
    r->bad = false;
    skip_value(r, 0);
    if (r->bad)
        drop(c, "unreadable frame");
}

/* Read what is complete in bytes[0..length); returns how much was used. */
static uint32_t on_input(Conn *c, const uint8_t *bytes, uint32_t length)
{
    uint32_t used = 0;
    if (c->state == UPGRADING) {
        const uint8_t *end = memmem(bytes, length, "\r\n\r\n", 4);
        if (!end)
            return 0;
        if (length < 12 || memcmp(bytes, "HTTP/1.1 101", 12)) {
            fprintf(stderr, "loadgen: %.*s\n", (int)(end - bytes), (const char *)bytes);
            drop(c, "upgrade refused");
            return length;
        }
        used = (uint32_t)(end - bytes) + 4;
        c->state = AUTHENTICATING;
        static uint8_t frame[PACKET_BYTES];
        uint8_t *at = frame;
        *at++ = 0x96;
        *at++ = AUTH;
        *at++ = 1;
        *at++ = 1;
        at = put_text(at, c->token, strlen(c->token));
        at = put_text(at, c->device, strlen(c->device));
        at = put_text(at, "app", 3);
        queue_ws(c, 2, frame, (size_t)(at - frame));
    }
    while (length - used >= 2 && c->state != CLOSED) {
        const uint8_t *p = bytes + used;
        uint64_t size = p[1] & 0x7f;
        uint32_t head = 2;
        if (size == 126) {
            if (length - used < 4)
                break;
            size = (uint64_t)p[2] << 8 | p[3];
            head = 4;
        } else if (size == 127) {
            drop(c, "packet above 64 KiB");
            break;
        }
        if (length - used < head + size)
            break;
        int opcode = p[0] & 0x0f;
        if (!(p[0] & 0x80) || (p[1] & 0x80)) {
            drop(c, "fragmented or masked packet");
        } else if (opcode == 2) {
            Reader r = {p + head, p + head + size, false};
            count.packets_in++;
            while (r.at < r.end && c->state != CLOSED)
                on_frame(c, &r);
        } else if (opcode == 9) {
            queue_ws(c, 10, p + head, (size_t)size);
        } else if (opcode == 8) {
            char why[64];
            unsigned code = size >= 2 ? (unsigned)p[head] << 8 | p[head + 1] : 0;
            snprintf(why, sizeof why, "closed by the server with %u", code);
            drop(c, why);
        }
        used += head + (uint32_t)size;
    }
    if (c->unacked >= ACK_FRAMES && c->state == READY)
        send_ack(c);
    return used;
}

static void on_readable(Conn *c)
{
    static uint8_t buffer[READ_BYTES + PACKET_BYTES * 2];
    memcpy(buffer, c->in, c->in_used);
    ssize_t n = recv(c->fd, buffer + c->in_used, READ_BYTES, 0);
    mono_now = clock_ns(CLOCK_MONOTONIC);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        drop(c, n ? strerror(errno) : "end of stream");
        return;
    }
    uint32_t length = c->in_used + (uint32_t)n, used = on_input(c, buffer, length);
    c->in_used = length - used;
    if (c->in_used > PACKET_BYTES * 2) {
        drop(c, "unfinished packet too large");
        c->in_used = 0;
    }
    if (c->in_used > c->in_room) {
        c->in_room = c->in_used * 2;
        c->in = grow(c->in, c->in_room);
    }
    if (c->in_used)
        memcpy(c->in, buffer + used, c->in_used);
}

/* -------------------------------------------------------------------------------------------------- loop */

static uint64_t busy_ns;
static double drain_s = 20;

static void turn(int wait_ms)
{
    static struct epoll_event events[1024];
    mono_now = clock_ns(CLOCK_MONOTONIC);
    uint64_t start = mono_now;
    int n = epoll_wait(epoll_fd, events, 1024, wait_ms);
    bool worked = n > 0;
    if (worked) {
        mono_now = clock_ns(CLOCK_MONOTONIC);
        if (wait_ms)
            start = mono_now;
    }
    for (int i = 0; i < n; i++) {
        Conn *c = &conns[events[i].data.u32];
        if (c->state == CONNECTING && (events[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP))) {
            int error = 0;
            socklen_t size = sizeof error;
            getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
            if (error) {
                drop(c, strerror(error));
                continue;
            }
            c->state = UPGRADING;
            watch(c, EPOLLIN);
            mark_dirty(c);
            continue;
        }
        if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP) && c->state != CLOSED)
            on_readable(c);
        if (events[i].events & EPOLLOUT && c->state != CLOSED)
            mark_dirty(c);
    }
    worked |= n_dirty > 0;
    flush_dirty();
    if (worked)
        busy_ns += clock_ns(CLOCK_MONOTONIC) - start;
}

/* Acks that are 200 ms old and beats, over all connections, 50 times a second. */
static void sweep(void)
{
    static uint64_t next;
    if (mono_now < next)
        return;
    uint64_t start = clock_ns(CLOCK_MONOTONIC);
    next = mono_now + SECOND / 50;
    for (int i = 0; i < n_conns; i++) {
        Conn *c = &conns[i];
        if (c->state != READY)
            continue;
        if (c->unacked && mono_now - c->unacked_since >= ACK_NS - SECOND / 50)
            send_ack(c);
        if (mono_now - c->last_write > BEAT_NS) {
            static const uint8_t ping[] = {0x91, PING};
            queue_ws(c, 2, ping, sizeof ping);
        }
    }
    flush_dirty();
    busy_ns += clock_ns(CLOCK_MONOTONIC) - start;
}

static void start_connect(Conn *c, const struct sockaddr_in *address, const char *host, int port,
                          const char *path, const char *origin)
{
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        die("socket: %s", strerror(errno));
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    (void)!setsockopt(c->fd, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
    c->state = CONNECTING;
    if (connect(c->fd, (const struct sockaddr *)address, sizeof *address) && errno != EINPROGRESS)
        die("connect: %s", strerror(errno));
    struct epoll_event event = {.events = EPOLLOUT, .data.u32 = (uint32_t)(c - conns)};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
    char request[1024];
    int n = snprintf(request, sizeof request,
                     "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
                     "Sec-WebSocket-Protocol: fastim.v1\r\n%s%s%s\r\n",
                     path, host, port, *origin ? "Origin: " : "", origin, *origin ? "\r\n" : "");
    if (c->out_room < (uint32_t)n) {
        c->out_room = 4096;
        c->out = grow(c->out, c->out_room);
    }
    memcpy(c->out, request, (size_t)n);
    c->out_used = (uint32_t)n;
}

static void connect_all(const char *host, int port, const char *path, const char *origin)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        die("%s is not an IPv4 address", host);
    uint64_t end = clock_ns(CLOCK_MONOTONIC) + 60 * SECOND;
    int started = 0;
    while (ready_conns + lost_conns < n_conns) {
        while (started < n_conns && started - ready_conns - lost_conns < 64)
            start_connect(&conns[started++], &address, host, port, path, origin);
        turn(1);
        sweep();
        if (mono_now > end)
            die("%d of %d connections ready after 60 s", ready_conns, n_conns);
    }
    if (lost_conns)
        die("%d of %d connections failed", lost_conns, n_conns);
}

/* ------------------------------------------------------------------------------------------------ phases */

static int pids[MAX_PIDS], n_pids;

/* utime + stime of all threads of the server's processes, in microseconds. */
static uint64_t server_cpu_us(void)
{
    uint64_t ticks = 0;
    for (int i = 0; i < n_pids; i++) {
        char path[64], text[1024];
        snprintf(path, sizeof path, "/proc/%d/stat", pids[i]);
        FILE *file = fopen(path, "r");
        if (!file)
            die("the server (process %d) is gone", pids[i]);
        size_t n = fread(text, 1, sizeof text - 1, file);
        fclose(file);
        text[n] = 0;
        char *at = strrchr(text, ')');
        unsigned long utime = 0, stime = 0;
        if (!at || sscanf(at + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &utime, &stime) != 2)
            die("%s is not readable", path);
        ticks += utime + stime;
    }
    return ticks * 1000000ull / (uint64_t)sysconf(_SC_CLK_TCK);
}

/* What all processors were busy with, in microseconds: without idle, waiting for the disk, and what was stolen. */
static uint64_t machine_cpu_us(void)
{
    unsigned long long user, nice, sys, idle, wait, irq, soft;
    FILE *file = fopen("/proc/stat", "r");
    int n = file ? fscanf(file, "cpu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &sys, &idle, &wait, &irq,
                          &soft) : 0;
    if (file)
        fclose(file);
    return n == 7 ? (user + nice + sys + irq + soft) * 1000000ull / (uint64_t)sysconf(_SC_CLK_TCK) : 0;
}

static uint64_t own_cpu_us(void) { return clock_ns(CLOCK_PROCESS_CPUTIME_ID) / 1000; }

static int counters[MAX_THREADS], n_counters;

/* Begin to count the event in every thread of the server, and in those that they start; false: we may not. */
static bool count_calls(uint64_t event)
{
    for (int i = 0; i < n_pids; i++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/task", pids[i]);
        DIR *tasks = opendir(path);
        if (!tasks)
            die("the server (process %d) is gone", pids[i]);
        for (struct dirent *entry; (entry = readdir(tasks));) {
            struct perf_event_attr attr = {
                .type = PERF_TYPE_TRACEPOINT, .size = sizeof attr, .config = event, .inherit = 1};
            int tid = atoi(entry->d_name);
            if (tid <= 0 || n_counters == MAX_THREADS)
                continue;
            long fd = syscall(SYS_perf_event_open, &attr, tid, -1, -1, PERF_FLAG_FD_CLOEXEC);
            if (fd < 0) {
                fprintf(stderr, "loadgen: system calls cannot be counted: %s\n", strerror(errno));
                closedir(tasks);
                return false;
            }
            counters[n_counters++] = (int)fd;
        }
        closedir(tasks);
    }
    return true;
}

/* How many there were; ends the count. */
static uint64_t counted_calls(void)
{
    uint64_t sum = 0, n;
    for (; n_counters > 0; close(counters[n_counters]))
        if (read(counters[--n_counters], &n, sizeof n) == sizeof n)
            sum += n;
    return sum;
}

static void run_for(uint64_t ns, uint64_t rate, uint64_t *first_offer)
{
    uint64_t start = clock_ns(CLOCK_MONOTONIC), end = start + ns, offered = *first_offer;
    mono_now = start;
    sending = true;
    closed_loop = !rate;
    if (closed_loop)
        for (int i = 0; i < n_conns; i++)
            for (uint32_t w = conns[i].outstanding; w < window; w++)
                offer(&conns[i], mono_now);
    flush_dirty();
    while (mono_now < end) {
        if (rate) {
            uint64_t due = (mono_now - start) * rate / SECOND + *first_offer;
            uint64_t before = offered;
            for (; offered < due; offered++)
                offer(&conns[offered % (uint64_t)n_conns],
                      start + (offered - *first_offer) * SECOND / rate);
            if (before != due) {
                uint64_t began = clock_ns(CLOCK_MONOTONIC);
                flush_dirty();
                busy_ns += clock_ns(CLOCK_MONOTONIC) - began;
            }
        }
        turn(0);
        sweep();
    }
    *first_offer = offered;
    sending = false;
}

static bool drain(void)
{
    uint64_t end = clock_ns(CLOCK_MONOTONIC) + (uint64_t)(drain_s * 1e9);
    bool level = false;
    while (mono_now < end && !level) {
        turn(1);
        sweep();
        level = total_sent == total_accepted && total_delivered == total_sent;
        for (uint32_t i = 0; level && i < n_convs; i++)
            level = !convs[i].side[0].waiting.used && !convs[i].side[1].waiting.used;
    }
    /* One more second: the last acks leave, and the server flushes its cursors. */
    for (end = clock_ns(CLOCK_MONOTONIC) + SECOND; mono_now < end;) {
        turn(1);
        sweep();
    }
    return level;
}

static bool phase(const char *name, double warm_s, double seconds, uint64_t rate, uint64_t calls_event,
                  double *reached)
{
    uint64_t first = 0;
    count = zero;
    if (warm_s > 0)
        run_for((uint64_t)(warm_s * 1e9), rate, &first);
    count = zero;
    busy_ns = 0;
    if (calls_event && !count_calls(calls_event))
        return true;
    uint64_t others = machine_cpu_us() - own_cpu_us();
    uint64_t cpu_start = server_cpu_us(), start = clock_ns(CLOCK_MONOTONIC);
    run_for((uint64_t)(seconds * 1e9), rate, &first);
    uint64_t cpu_end = server_cpu_us(), took = clock_ns(CLOCK_MONOTONIC) - start, busy = busy_ns;
    others = machine_cpu_us() - own_cpu_us() - others - (cpu_end - cpu_start);
    uint64_t calls = counted_calls();
    uint64_t accepted = count.accepted, delivered = count.delivered;
    bool drained = drain();
    uint64_t cpu_drained = server_cpu_us();
    uint64_t lost = 0, uneven = 0;
    for (uint32_t i = 0; i < n_convs; i++)
        for (int k = 0; k < 2; k++) {
            Side *s = &convs[i].side[k];
            uint64_t n = s->top;
            lost += convs[i].side[1 - k].counter - s->peer_next;
            uneven += s->seqs != n || s->sum != n * (n + 1) / 2 || s->square != n * (n + 1) * (2 * n + 1) / 6;
        }
    bool good = drained && !lost && !uneven && !lost_conns && !fault.repeats && !fault.holes &&
                !fault.inversions && !fault.errors && accepted;
    *reached = (double)accepted / ((double)took / 1e9);
    printf("{\"phase\":\"%s\",\"rate\":%llu,\"seconds\":%.3f,\"accepted\":%llu,\"delivered\":%llu,"
           "\"messages_per_s\":%.0f,\"cpu_us_per_message\":%.2f,\"cpu_us_until_acked\":%.2f,"
           "\"server_cores\":%.3f,\"others_cores\":%.3f,\"calls_per_message\":%.3f,"
           "\"sent_p50_ms\":%.3f,\"sent_p99_ms\":%.3f,\"msg_p50_ms\":%.3f,\"msg_p99_ms\":%.3f,"
           "\"msg_p999_ms\":%.3f,\"generator_busy\":%.3f,\"packets_in\":%llu,\"packets_out\":%llu,"
           "\"acks\":%llu,\"connections\":%d,\"drained\":%s,\"lost\":%llu,\"uneven\":%llu,\"repeats\":%llu,"
           "\"holes\":%llu,\"inversions\":%llu,\"errors\":%llu,\"wire_dups\":%llu,\"echoes\":%llu,"
           "\"skips\":%llu,\"good\":%s}\n",
           name, (unsigned long long)rate, (double)took / 1e9, (unsigned long long)accepted,
           (unsigned long long)delivered, *reached,
           accepted ? (double)(cpu_end - cpu_start) / (double)accepted : 0,
           count.accepted ? (double)(cpu_drained - cpu_start) / (double)count.accepted : 0,
           (double)(cpu_end - cpu_start) * 1e3 / (double)took, (double)(int64_t)others * 1e3 / (double)took,
           accepted ? (double)calls / (double)accepted : 0,
           quantile_ms(count.sent_ns, 0.5), quantile_ms(count.sent_ns, 0.99), quantile_ms(count.msg_ns, 0.5),
           quantile_ms(count.msg_ns, 0.99), quantile_ms(count.msg_ns, 0.999), (double)busy / (double)took,
           (unsigned long long)count.packets_in, (unsigned long long)count.packets_out,
           (unsigned long long)count.acks, ready_conns, drained ? "true" : "false", (unsigned long long)lost,
           (unsigned long long)uneven, (unsigned long long)fault.repeats, (unsigned long long)fault.holes,
           (unsigned long long)fault.inversions, (unsigned long long)fault.errors,
           (unsigned long long)count.dup_wire, (unsigned long long)count.echoes,
           (unsigned long long)count.skips, good ? "true" : "false");
    fflush(stdout);
    return good;
}

/* ------------------------------------------------------------------------------------------------- plan */

static void read_plan(const char *path)
{
    FILE *file = fopen(path, "r");
    if (!file)
        die("%s: %s", path, strerror(errno));
    char *line = NULL;
    size_t room = 0;
    conns = calloc(MAX_CONNS, sizeof *conns);
    uint32_t conv_room = 0;
    while (getline(&line, &room, file) > 0) {
        char first[256], second[8300];
        int a, b;
        if (sscanf(line, "c %255s %8299s", first, second) == 2) {
            if (n_conns == MAX_CONNS)
                die("more than %d connections", MAX_CONNS);
            conns[n_conns].device = strdup(first);
            conns[n_conns++].token = strdup(second);
        } else if (sscanf(line, "v %255s %d %d", first, &a, &b) == 3) {
            if (a < 0 || b < 0 || a >= n_conns || b >= n_conns)
                die("conversation %s names connection %d or %d of %d", first, a, b, n_conns);
            if (n_convs == conv_room) {
                conv_room = conv_room ? conv_room * 2 : 1024;
                convs = grow(convs, conv_room * sizeof *convs);
            }
            Conv *v = &convs[n_convs];
            memset(v, 0, sizeof *v);
            v->name = strdup(first);
            v->length = (uint32_t)strlen(first);
            v->conn[0] = a;
            v->conn[1] = b;
            for (int k = 0; k < 2; k++) {
                Conn *c = &conns[v->conn[k]];
                c->convs = grow(c->convs, (c->n_convs + 1) * sizeof *c->convs);
                c->convs[c->n_convs++] = n_convs * 2 + (uint32_t)k;
            }
            n_convs++;
        }
    }
    free(line);
    fclose(file);
    if (!n_conns || !n_convs)
        die("%s holds %d connections and %u conversations", path, n_conns, n_convs);
    for (conv_mask = 1; conv_mask < n_convs * 2; conv_mask *= 2)
        ;
    conv_index = calloc(conv_mask, sizeof *conv_index);
    dirty_list = calloc((size_t)n_conns, sizeof *dirty_list);
    if (!conv_index || !dirty_list)
        die("out of memory");
    conv_mask--;
    for (uint32_t i = 0; i < n_convs; i++) {
        uint64_t hash = 1469598103934665603ull;
        for (uint32_t k = 0; k < convs[i].length; k++)
            hash = (hash ^ (uint8_t)convs[i].name[k]) * 1099511628211ull;
        uint32_t slot = (uint32_t)(hash ^ hash >> 32) & conv_mask;
        while (conv_index[slot])
            slot = (slot + 1) & conv_mask;
        conv_index[slot] = i + 1;
    }
}

int main(int argc, char **argv)
{
    if (argc < 5)
        die("usage: loadgen HOST PORT PATH PLAN [--warm-s N] [--closed-s N] [--open-s N] [--rate R] ...");
    double warm_s = 1, closed_s = 5, open_s = 0, calls_s = 0, reached = 0, unused;
    uint64_t rate = 0, calls_event = 0;
    int cpu = -1;
    const char *origin = "";
    for (int i = 5; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];
        if (!strcmp(argv[i], "--warm-s"))
            warm_s = atof(value);
        else if (!strcmp(argv[i], "--closed-s"))
            closed_s = atof(value);
        else if (!strcmp(argv[i], "--open-s"))
            open_s = atof(value);
        else if (!strcmp(argv[i], "--calls-s"))
            calls_s = atof(value);
        else if (!strcmp(argv[i], "--calls-event"))
            calls_event = (uint64_t)atoll(value);
        else if (!strcmp(argv[i], "--rate"))
            rate = (uint64_t)atoll(value);
        else if (!strcmp(argv[i], "--window"))
            window = (uint32_t)atoi(value);
        else if (!strcmp(argv[i], "--body"))
            body_bytes = (uint32_t)atoi(value);
        else if (!strcmp(argv[i], "--cpu"))
            cpu = atoi(value);
        else if (!strcmp(argv[i], "--drain-s"))
            drain_s = atof(value);
        else if (!strcmp(argv[i], "--origin"))
            origin = value;
        else if (!strcmp(argv[i], "--pids")) {
            for (char *text = strtok(argv[i + 1], ","); text && n_pids < MAX_PIDS; text = strtok(NULL, ","))
                pids[n_pids++] = atoi(text);
        } else
            die("unknown option %s", argv[i]);
    }
    if (body_bytes < BODY_HEAD + 1 || body_bytes > 60000)
        die("--body is %u; must be %d-60000", body_bytes, BODY_HEAD + 1);
    if (cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set))
            die("cpu %d: %s", cpu, strerror(errno));
    }
    random_state ^= clock_ns(CLOCK_REALTIME);
    struct rlimit files = {MAX_CONNS, MAX_CONNS};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    epoll_fd = epoll_create1(0);
    read_plan(argv[4]);
    connect_all(argv[1], atoi(argv[2]), argv[3], origin);
    bool good = true;
    if (closed_s > 0)
        good = phase("closed", warm_s, closed_s, 0, 0, &reached);
    if (good && open_s > 0) {
        if (!rate)
            rate = (uint64_t)(reached / 2);
        good = phase("open", warm_s / 2, open_s, rate, 0, &unused);
    }
    if (good && calls_s > 0 && calls_event)
        good = phase("calls", warm_s / 4, calls_s, 0, calls_event, &unused);
    for (int i = 0; i < n_conns; i++) {
        static const uint8_t normal[] = {0x03, 0xe8};
        if (conns[i].state == READY)
            queue_ws(&conns[i], 8, normal, sizeof normal);
    }
    flush_dirty();
    return good ? 0 : 1;
}
