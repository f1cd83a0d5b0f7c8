/* The least that a 1:1 server can do: what SEND brings goes to the peer as MSG and back as SENT, in order, and is
 * forgotten. One thread, one send(2) per connection and turn of the loop, no Python, no bus, no store.
 *
 *   relay PORT
 *
 * It is what loadgen must outpace: a row in which the generator could not drive this server 1.5 times as fast as it
 * drove ours says nothing about ours. Tokens are u000000, u000001 ...; conversations p:u000000:u000001. It says
 * {"ready":true} when it listens, and ends with its standard input.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "wire.h"

enum { MAX_CONNS = 20000, READ_BYTES = 1 << 18, PACKET_BYTES = 65536, USER_BYTES = 7, TABLE = 1 << 18 };
#define LISTENER UINT32_MAX
#define STDIN (UINT32_MAX - 1)

typedef struct {
    int fd;
    bool up, dirty;
    uint32_t tag;
    uint8_t *in, *out;
    size_t in_used, out_used, out_room;
} Conn;

static Conn conns[MAX_CONNS];
static int by_user[MAX_CONNS], unused[MAX_CONNS], n_unused, dirty[MAX_CONNS], n_dirty;
/* Open addressing: a pair of users (never 0, for the second is the greater) and the seq it has reached. */
static struct {
    uint64_t pair, seq;
} convs[TABLE];
static uint64_t msg_id;
static int poll_fd;

static void die(const char *what) __attribute__((noreturn));
static void die(const char *what)
{
    fprintf(stderr, "relay: %s: %s\n", what, errno ? strerror(errno) : "failed");
    exit(2);
}

static void watch(int fd, uint32_t number)
{
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = number};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &e) < 0)
        die("epoll");
}

static void queue(int i, const void *p, size_t n)
{
    Conn *c = &conns[i];
    if (c->out_used + n > c->out_room) {
        c->out_room = (c->out_used + n) * 2;
        c->out = realloc(c->out, c->out_room);
        if (c->out == NULL)
            die("out of memory");
    }
    memcpy(c->out + c->out_used, p, n);
    c->out_used += n;
    if (!c->dirty) {
        c->dirty = true;
        dirty[n_dirty++] = i;
    }
}

static void queue_packet(int i, const uint8_t *p, size_t n)
{
    uint8_t head[4] = {0x82, (uint8_t)n, 0, 0};
    if (n >= 126)
        head[1] = 126, head[2] = (uint8_t)(n >> 8), head[3] = (uint8_t)n;
    queue(i, head, n < 126 ? 2 : 4);
    queue(i, p, n);
}

static void flush(void)
{
    for (int k = 0; k < n_dirty; k++) {
        Conn *c = &conns[dirty[k]];
        size_t at = 0;
        while (c->fd >= 0 && at < c->out_used) {
            ssize_t n = send(c->fd, c->out + at, c->out_used - at, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n < 0 && errno != EAGAIN)
                break; /* the next read sees the end */
            at += n > 0 ? (size_t)n : 0;
        }
        c->out_used = 0;
        c->dirty = false;
    }
    n_dirty = 0;
}

static int user_of(const uint8_t *name)
{
    int number = 0;
    for (int k = 1; k < USER_BYTES; k++)
        number = number * 10 + (name[k] - '0');
    if (number < 0 || number >= MAX_CONNS)
        errno = 0, die("a user's name is not u000000 or the like");
    return number;
}

static uint64_t next_seq(int a, int b)
{
    uint64_t pair = (uint64_t)a << 32 | (uint32_t)b;
    for (uint64_t slot = pair * 0x9e3779b97f4a7c15ull >> 46;; slot = (slot + 1) & (TABLE - 1)) {
        if (convs[slot].pair == 0)
            convs[slot].pair = pair;
        if (convs[slot].pair == pair)
            return ++convs[slot].seq;
    }
}

static void on_send(int i, Reader *r)
{
    static uint8_t frame[PACKET_BYTES];
    uint32_t conv_bytes, id_bytes, body_bytes;
    const uint8_t *conv = read_bytes(r, &conv_bytes);
    for (uint32_t items = read_array(r); items > 0 && !r->bad; items--) {
        read_array(r);
        const uint8_t *id = read_bytes(r, &id_bytes);
        uint64_t kind = read_uint(r), now_ms = clock_ns(CLOCK_REALTIME) / 1000000;
        const uint8_t *body = read_bytes(r, &body_bytes);
        if (r->bad || conv_bytes != 3 + 2 * USER_BYTES || id_bytes != 16 || body_bytes > PACKET_BYTES / 2)
            errno = 0, die("a SEND is not as loadgen writes it");
        int a = user_of(conv + 2), b = user_of(conv + 3 + USER_BYTES);
        int peer = by_user[a] == i ? by_user[b] : by_user[a];
        uint64_t seq = next_seq(a, b);
        const uint8_t *sender = by_user[a] == i ? conv + 2 : conv + 3 + USER_BYTES;
        msg_id++;
        uint8_t *at = frame;
        *at++ = 0x9f, *at++ = MSG;
        at = put_uint(at, ++conns[peer].tag);
        *at++ = 0xc2;
        at = put_uint(at, msg_id);
        at = put_text(at, (const char *)conv, conv_bytes);
        at = put_uint(put_uint(at, seq), seq);
        *at++ = 1; /* epoch */
        at = put_text(at, (const char *)sender, USER_BYTES);
        at = put_bin_head(at, 16);
        memcpy(at, id, 16);
        at = put_uint(at + 16, kind);
        at = put_uint(at, now_ms);
        *at++ = 0, *at++ = 0; /* loss time, flags */
        at = put_bin_head(at, body_bytes);
        memcpy(at, body, body_bytes);
        queue_packet(peer, frame, (size_t)(at + body_bytes - frame));
        at = frame;
        *at++ = 0x95, *at++ = SENT;
        at = put_uint(at, ++conns[i].tag);
        at = put_text(at, (const char *)conv, conv_bytes);
        *at++ = 1, *at++ = 0x91, *at++ = 0x94;
        at = put_bin_head(at, 16);
        memcpy(at, id, 16);
        at = put_uint(put_uint(put_uint(at + 16, msg_id), seq), now_ms);
        queue_packet(i, frame, (size_t)(at - frame));
    }
}

static void on_packet(int i, const uint8_t *p, size_t n)
{
    static const uint8_t hello[] = {0x91, HELLO};
    Reader r = {p, p + n, false};
    uint32_t bytes;
    read_array(&r);
    switch (read_uint(&r)) {
    case AUTH:
        read_uint(&r), read_uint(&r);
        const uint8_t *token = read_bytes(&r, &bytes);
        if (r.bad || bytes != USER_BYTES)
            errno = 0, die("a token is not u000000 or the like");
        by_user[user_of(token)] = i;
        queue_packet(i, hello, sizeof hello);
        break;
    case SEND:
        on_send(i, &r);
        break;
    default: /* ACK, PING: read, and that is all */
        break;
    }
}

static void leave(int i)
{
    Conn *c = &conns[i];
    close(c->fd);
    c->fd = -1;
    c->in_used = c->out_used = 0;
    unused[n_unused++] = i;
}

static void upgrade(int i, size_t used)
{
    static const char answer[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                                 "Connection: Upgrade\r\nSec-WebSocket-Protocol: fastim.v1\r\n"
                                 "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    Conn *c = &conns[i];
    if (used < 4 || memcmp(c->in + used - 4, "\r\n\r\n", 4))
        return;
    c->up = true;
    c->in_used = 0;
    queue(i, answer, sizeof answer - 1);
}

/* Everything that is whole; `in` keeps the beginning of what is not. */
static void on_readable(int i)
{
    static uint8_t buffer[READ_BYTES + PACKET_BYTES];
    Conn *c = &conns[i];
    memcpy(buffer, c->in, c->in_used);
    ssize_t got = recv(c->fd, buffer + c->in_used, READ_BYTES, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0) {
        leave(i);
        return;
    }
    size_t used = c->in_used + (size_t)got, at = 0;
    while (c->up && used - at >= 6) {
        uint8_t *p = buffer + at;
        size_t size = p[1] & 127, head = 6;
        if (size == 126)
            size = (size_t)p[2] << 8 | p[3], head = 8;
        if (used - at < head + size)
            break;
        const uint8_t *mask = p + head - 4;
        for (size_t b = 0; b < size; b++)
            p[head + b] ^= mask[b & 3];
        if ((p[0] & 15) == 2)
            on_packet(i, p + head, size);
        at += head + size;
    }
    c->in_used = used - at;
    if (c->in_used > PACKET_BYTES)
        errno = 0, die("a packet is too large");
    memcpy(c->in, buffer + at, c->in_used);
    if (!c->up)
        upgrade(i, c->in_used);
}

static void accept_all(int listener)
{
    int one = 1;
    for (int fd; n_unused > 0 && (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        int i = unused[--n_unused];
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        conns[i].fd = fd;
        conns[i].up = false;
        conns[i].tag = 0;
        if (conns[i].in == NULL && (conns[i].in = malloc(PACKET_BYTES)) == NULL)
            die("out of memory");
        watch(fd, (uint32_t)i);
    }
}

static int listen_on(int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(fd, 4096) < 0)
        die("listen");
    return fd;
}

int main(int argc, char **argv)
{
    static struct epoll_event found[1024];
    struct rlimit files;
    if (argc != 2)
        errno = 0, die("usage: relay PORT");
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    for (int i = MAX_CONNS - 1; i >= 0; i--)
        unused[n_unused++] = i;
    poll_fd = epoll_create1(0);
    int listener = listen_on(atoi(argv[1]));
    watch(listener, LISTENER);
    watch(STDIN_FILENO, STDIN);
    puts("{\"ready\":true}");
    fflush(stdout);
    while (true) {
        int ready = epoll_wait(poll_fd, found, 1024, -1);
        for (int e = 0; e < ready; e++) {
            uint32_t i = found[e].data.u32;
            if (i == STDIN)
                return 0;
            if (i == LISTENER)
                accept_all(listener);
            else if (conns[i].fd >= 0)
                on_readable((int)i);
        }
        flush();
    }
}
