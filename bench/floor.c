/* What the kernel itself costs: the floors beside which every fan-out, echo and connection figure stands.
 *
 *   floor fanout PORT CONNS BYTES MEMO [CERT KEY]   a server: rounds of K frames in one send to every connection
 *   floor echo   PORT [CERT KEY]                    a server: accepts, upgrades, and what comes goes back
 *   floor drain  PORT CONNS MEMO [tls]              a client: CONNS connections that read and count
 *   floor pound  PORT CONNS SECONDS BYTES [tls]     a client: one message under way per connection
 *   floor sit    PORT PLAN FIRST COUNT BEAT_MS SOURCES WINDOW [tls] [echo]
 *                                                   a client: COUNT connections that log in and then beat
 *
 * fanout, echo and sit take commands, a line each, on stdin, answer each with a line of JSON, and end with stdin:
 *
 *   fanout   rounds R K         R rounds, each when the one before has arrived; CPU of the sends alone
 *            paced R K US       R rounds, one every US microseconds; CPU of everything
 *   echo     anything           what was counted since the start
 *   sit      connect            dial whoever is not connected; answers when all are in
 *            silence K          the first K say nothing more
 *            talk R             from now on R messages a second, by those whose line names a conversation, in turns
 *            drop               end every connection without a word
 *            report             what was seen since the last report
 *
 * MEMO is a file that fanout and drain share: what was received, so that no send meets a full buffer. While it says
 * that a round is on, drain spins. CPU is the process's own. TLS is 1.3; FLOOR_CONGESTION names the congestion
 * control of our sockets (cubic unless set; empty: the system's).
 *
 * PLAN holds a line per connection: AUTH in hex, without its array header, up to and with the device class; then the
 * session, the tag and the cursor that the server told follow (docs/protocol.md). A conversation may stand behind it.
 * A message's latency is from the moment it was meant to leave until its MSG, by whoever of us gets it. With `echo`
 * the server is ours.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef FLOOR_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#else
typedef struct ssl_ctx SSL_CTX;
typedef struct ssl SSL;
#endif

enum { READ_BYTES = 1 << 18, EVENTS = 1024, MAX_CONNS = 19000, LINE = 1024 };
#define LISTENER UINT32_MAX
#define STDIN (UINT32_MAX - 1)
static const uint64_t SECOND = 1000000000ull, MS = 1000000ull, PATIENCE = 5000000000ull;

typedef struct {
    _Atomic uint64_t received; /* bytes after the upgrade, all connections */
    _Atomic uint64_t ready;    /* connections that are upgraded */
    _Atomic uint64_t lost;     /* and those that ended */
    _Atomic uint64_t on;       /* a round is under way */
    _Atomic uint64_t busy_ns;  /* drain's time with something to read */
} Memo;

typedef struct {
    bool up; /* upgraded */
    uint16_t head;
    char *line; /* until then: what came of it */
} Conn;

/* Apart, and dense: a fan-out touches nothing else. */
static int *fds;
static SSL **ssls;
static Conn *conns;
static char buffer[READ_BYTES];

static void die(const char *what) __attribute__((noreturn));
static void die(const char *what) {
    fprintf(stderr, "floor: %s: %s\n", what, errno ? strerror(errno) : "failed");
    exit(2);
}

static uint64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}
static uint64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }
static uint64_t cpu_ns(void) { return clock_ns(CLOCK_PROCESS_CPUTIME_ID); }

static void make_room(int n) {
    if (n < 1 || n > MAX_CONNS) errno = 0, die("CONNS is out of range");
    conns = calloc((size_t)n, sizeof *conns);
    fds = calloc((size_t)n, sizeof *fds);
    ssls = calloc((size_t)n, sizeof *ssls);
}

static Memo *share(const char *path) {
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, 4096) < 0) die(path);
    Memo *memo = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memo == MAP_FAILED) die("mmap");
    close(fd);
    return memo;
}

static void tune(int fd) {
    int one = 1, size = 65536;
    const char *congestion = getenv("FLOOR_CONGESTION");
    if (congestion == NULL) congestion = "cubic";
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    if (*congestion) setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion, (socklen_t)strlen(congestion));
}

static struct sockaddr_in loopback(uint32_t host, int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK + host);
    return a;
}

static void watch(int poll, int fd, uint32_t events, uint32_t number) {
    struct epoll_event e = {.events = events, .data.u32 = number};
    if (epoll_ctl(poll, EPOLL_CTL_ADD, fd, &e) < 0) epoll_ctl(poll, EPOLL_CTL_MOD, fd, &e);
}

/* ------------------------------------------------------------------------------------------------- bytes */

#ifdef FLOOR_TLS
/* 0: the peer left; -1 with errno: EAGAIN or the end. */
static int tls_error(SSL *ssl, int result) {
    int why = SSL_get_error(ssl, result);
    ERR_clear_error();
    errno = why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? EAGAIN : ECONNRESET;
    return why == SSL_ERROR_ZERO_RETURN ? 0 : -1;
}
static ssize_t tls_read(SSL *ssl, void *p, size_t n) {
    int got = SSL_read(ssl, p, (int)n);
    return got > 0 ? got : tls_error(ssl, got);
}
static ssize_t tls_write(SSL *ssl, const void *p, size_t n) {
    int sent = SSL_write(ssl, p, (int)n);
    return sent > 0 ? sent : tls_error(ssl, sent);
}
static int tls_shake(SSL *ssl) { /* 1: done */
    int done = SSL_do_handshake(ssl);
    return done == 1 ? 1 : tls_error(ssl, done);
}
static SSL *tls_start(SSL_CTX *tls, int fd, bool server) {
    SSL *ssl = SSL_new(tls);
    SSL_set_fd(ssl, fd);
    SSL_set_mode(ssl, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ENABLE_PARTIAL_WRITE);
    if (server) SSL_set_accept_state(ssl);
    else SSL_set_connect_state(ssl);
    return ssl;
}
static SSL_CTX *server_tls(const char *cert, const char *key) {
    SSL_CTX *tls = SSL_CTX_new(TLS_server_method());
    SSL_CTX_set_min_proto_version(tls, TLS1_3_VERSION);
    SSL_CTX_set_num_tickets(tls, 0);
    if (SSL_CTX_use_certificate_chain_file(tls, cert) != 1 ||
        SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) != 1)
        die("certificate");
    return tls;
}
static SSL_CTX *client_tls(void) {
    SSL_CTX *tls = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_min_proto_version(tls, TLS1_3_VERSION);
    return tls;
}
static const char *cipher_of(SSL *ssl) { return ssl ? SSL_get_cipher(ssl) : ""; }
static void tls_end(SSL *ssl) { SSL_free(ssl); }
#else
static void no_tls(void) __attribute__((noreturn));
static void no_tls(void) { errno = 0, die("built without TLS"); }
static ssize_t tls_read(SSL *ssl, void *p, size_t n) { (void)ssl, (void)p, (void)n, no_tls(); }
static ssize_t tls_write(SSL *ssl, const void *p, size_t n) { (void)ssl, (void)p, (void)n, no_tls(); }
static int tls_shake(SSL *ssl) { (void)ssl, no_tls(); }
static SSL *tls_start(SSL_CTX *tls, int fd, bool server) { (void)tls, (void)fd, (void)server, no_tls(); }
static SSL_CTX *server_tls(const char *cert, const char *key) { (void)cert, (void)key, no_tls(); }
static SSL_CTX *client_tls(void) { no_tls(); }
static const char *cipher_of(SSL *ssl) { return (void)ssl, ""; }
static void tls_end(SSL *ssl) { (void)ssl; }
#endif

static ssize_t get(int i, void *p, size_t n) {
    return ssls[i] == NULL ? recv(fds[i], p, n, MSG_DONTWAIT) : tls_read(ssls[i], p, n);
}

/* All of it, waiting for room: our own peers always make some. */
static void put(int i, const void *p, size_t n) {
    for (const char *at = p; n > 0;) {
        ssize_t sent = ssls[i] == NULL ? send(fds[i], at, n, MSG_DONTWAIT | MSG_NOSIGNAL) : tls_write(ssls[i], at, n);
        if (sent > 0) at += sent, n -= (size_t)sent;
        else if (sent == 0 || errno != EAGAIN) return; /* who reads next will see the end */
    }
}

/* Gather what came of an HTTP head; true when its blank line is there. False with errno 0: the peer left. */
static bool gathered(int i) {
    Conn *c = &conns[i];
    if (c->line == NULL) c->line = malloc(LINE);
    ssize_t got = get(i, c->line + c->head, LINE - 1u - c->head);
    if (got <= 0) {
        if (got == 0 || errno != EAGAIN) errno = 0;
        return false;
    }
    c->head = (uint16_t)(c->head + got);
    c->line[c->head] = 0;
    errno = EAGAIN;
    return strstr(c->line, "\r\n\r\n") != NULL;
}

static void forget_line(Conn *c) {
    free(c->line);
    c->line = NULL;
    c->head = 0;
}

/* A command from stdin, "" when there is none yet, NULL at its end. Whoever asks waits for the answer. */
static char *command(void) {
    static char line[256];
    static size_t used;
    ssize_t got = read(STDIN_FILENO, line + used, sizeof line - 1 - used);
    if (got <= 0) return NULL;
    used += (size_t)got;
    line[used] = 0;
    char *end = strchr(line, '\n');
    if (end == NULL) return "";
    *end = 0;
    used = 0;
    return line;
}

/* ----------------------------------------------------------------------------------------------- servers */

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_in a = loopback(0, port);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    tune(fd); /* accepted sockets inherit it */
    if (bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(fd, 4096) < 0) die("listen");
    return fd;
}

static const char UPGRADED[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                               "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

static void take(int poll, int i, int fd, SSL_CTX *tls) {
    fds[i] = fd;
    conns[i].up = false;
    if (tls != NULL) ssls[i] = tls_start(tls, fd, true);
    watch(poll, fd, EPOLLIN, (uint32_t)i);
}

static bool upgraded(int i) {
    if (!gathered(i)) return false;
    put(i, UPGRADED, sizeof UPGRADED - 1);
    forget_line(&conns[i]);
    return conns[i].up = true;
}

/* Accept n connections and finish their upgrades. */
static void gather(int port, int n, SSL_CTX *tls) {
    int poll = epoll_create1(0), listener = listen_on(port), up = 0, count = 0;
    struct epoll_event found[EVENTS];
    watch(poll, listener, EPOLLIN, LISTENER);
    while (up < n) {
        int ready = epoll_wait(poll, found, EVENTS, 60000);
        if (ready <= 0) errno = 0, die("clients did not come");
        for (int e = 0; e < ready; e++) {
            uint32_t i = found[e].data.u32;
            if (i != LISTENER) {
                if (upgraded((int)i)) up++, epoll_ctl(poll, EPOLL_CTL_DEL, fds[i], NULL);
                else if (errno == 0) die("a client left in its handshake");
                continue;
            }
            int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
            if (fd < 0) continue;
            if (count == n) errno = 0, die("more clients than asked for");
            take(poll, count++, fd, tls);
        }
    }
    close(listener);
    close(poll);
}

/* One WebSocket frame of `bytes` in all, header included. */
static void frame(char *p, size_t bytes) {
    memset(p, 'x', bytes);
    p[0] = (char)0x82;
    p[1] = bytes <= 127 ? (char)(bytes - 2) : 126;
    if (bytes > 127) p[2] = (char)((bytes - 4) >> 8), p[3] = (char)((bytes - 4) & 255);
}

/* From `start` on, round: a fair server begins with another one each time. */
static void send_all(int n, int start, const char *packet, size_t size, bool tls) {
    for (int i = 0, at = start; i < n; i++, at = at + 1 == n ? 0 : at + 1) {
        ssize_t sent = tls ? 0 : send(fds[at], packet, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent != (ssize_t)size) put(at, packet + (sent > 0 ? sent : 0), size - (size_t)(sent > 0 ? sent : 0));
    }
}

static bool arrived(Memo *memo, uint64_t wanted) {
    for (uint64_t since = now_ns(); memo->received < wanted; usleep(50))
        if (now_ns() - since > PATIENCE) return false;
    return true;
}

static int by_size(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void fanout(int port, int n, size_t bytes, Memo *memo, SSL_CTX *tls) {
    int rounds, k, pause_us;
    uint64_t turn = 0;
    gather(port, n, tls);
    while (memo->ready < (uint64_t)n) usleep(1000);
    printf("{\"conns\":%d,\"cipher\":\"%s\"}\n", n, cipher_of(ssls[0]));
    for (char *line; (line = command()) != NULL;) {
        bool paced = sscanf(line, "paced %d %d %d", &rounds, &k, &pause_us) == 3;
        if (!paced && sscanf(line, "rounds %d %d", &rounds, &k) != 2) continue;
        size_t size = (size_t)k * bytes;
        char *packet = malloc(size);
        uint64_t *took = calloc((size_t)rounds, sizeof *took); /* until the last connection had it */
        for (int i = 0; i < k; i++) frame(packet + (size_t)i * bytes, bytes);
        uint64_t base = memo->received, each = (uint64_t)n * size, cpu = 0, behind = 0;
        memo->on = 1;
        uint64_t begin = now_ns(), all = cpu_ns();
        for (int round = 0; round < rounds; round++) {
            uint64_t before = cpu_ns(), since = now_ns();
            send_all(n, (int)(turn++ * 2048 % (uint64_t)n), packet, size, tls != NULL);
            cpu += cpu_ns() - before;
            if (paced) {
                uint64_t next = begin + (uint64_t)(round + 1) * (uint64_t)pause_us * 1000, now = now_ns();
                if (next > now) usleep((useconds_t)((next - now) / 1000));
                else behind++;
            } else if (!arrived(memo, base + (uint64_t)(round + 1) * each)) {
                behind++;
            }
            took[round] = now_ns() - since;
        }
        qsort(took, (size_t)rounds, sizeof *took, by_size);
        if (paced) cpu = cpu_ns() - all;
        uint64_t wall = now_ns() - begin;
        bool drained = arrived(memo, base + (uint64_t)rounds * each);
        memo->on = 0;
        free(packet);
        printf("{\"cpu_us_per_send\":%.4f,\"cpu_us_per_delivery\":%.4f,\"wall_s\":%.4f,\"behind\":%llu,\"drained\":%s,"
               "\"p50_ms\":%.3f,\"p99_ms\":%.3f}\n",
               (double)cpu / 1e3 / rounds / n, (double)cpu / 1e3 / rounds / n / k, (double)wall / 1e9,
               (unsigned long long)behind, drained ? "true" : "false", (double)took[rounds / 2] / 1e6,
               (double)took[(rounds - 1) * 99 / 100] / 1e6);
        free(took);
    }
}

/* Unmask and send back what came, whole frames; the header of a server's frame is 4 bytes shorter. */
static uint64_t echo_frames(int i, size_t got) {
    uint8_t *p = (uint8_t *)buffer, *out = p;
    uint64_t count = 0;
    for (size_t at = 0; at < got; count++) {
        size_t header = 2, size = p[at + 1] & 127;
        uint8_t mask[4];
        if (size == 126) size = (size_t)p[at + 2] << 8 | p[at + 3], header = 4;
        if (at + header + 4 + size > got) errno = 0, die("a frame came in two parts");
        memcpy(mask, p + at + header, 4);
        memmove(out, p + at, header);
        out[1] &= 127;
        for (size_t b = 0; b < size; b++) out[header + b] = p[at + header + 4 + b] ^ mask[b & 3];
        out += header + size;
        at += header + 4 + size;
    }
    put(i, buffer, (size_t)(out - (uint8_t *)buffer));
    return count;
}

static void echo(int port, SSL_CTX *tls) {
    int poll = epoll_create1(0), listener = listen_on(port), *unused = calloc(MAX_CONNS, sizeof *unused), left = 0;
    uint64_t accepted = 0, upgrades = 0, echoes = 0;
    struct epoll_event found[EVENTS];
    make_room(MAX_CONNS);
    for (; left < MAX_CONNS; left++) unused[left] = MAX_CONNS - 1 - left;
    watch(poll, listener, EPOLLIN, LISTENER);
    watch(poll, STDIN_FILENO, EPOLLIN, STDIN);
    printf("{\"ready\":true}\n");
    while (true) {
        int ready = epoll_wait(poll, found, EVENTS, -1);
        for (int e = 0; e < ready; e++) {
            uint32_t i = found[e].data.u32;
            if (i == STDIN) {
                if (command() == NULL) return;
                printf("{\"cpu_s\":%.6f,\"accepted\":%llu,\"upgraded\":%llu,\"echoes\":%llu,\"open\":%d}\n",
                       (double)cpu_ns() / 1e9, (unsigned long long)accepted, (unsigned long long)upgrades,
                       (unsigned long long)echoes, MAX_CONNS - left);
                continue;
            }
            if (i == LISTENER) {
                for (int fd; left > 0 && (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0; accepted++)
                    take(poll, unused[--left], fd, tls);
                continue;
            }
            if (!conns[i].up) {
                if (upgraded((int)i)) upgrades++;
                if (conns[i].up || errno != 0) continue;
            }
            ssize_t got = conns[i].up ? get((int)i, buffer, sizeof buffer) : 0;
            if (got > 0) {
                echoes += echo_frames((int)i, (size_t)got);
            } else if (got == 0 || errno != EAGAIN) {
                close(fds[i]);
                if (ssls[i]) tls_end(ssls[i]), ssls[i] = NULL;
                forget_line(&conns[i]);
                unused[left++] = (int)i;
            }
        }
    }
}

/* ----------------------------------------------------------------------------------- clients of a fan-out */

static size_t request(char *out, int port) {
    return (size_t)snprintf(out, LINE,
                            "GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
                            "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: fastim.v1\r\n\r\n", port);
}

/* Dial one after the other, each until its upgrade was answered. */
static int dial(int port, int n, bool tls) {
    SSL_CTX *context = tls ? client_tls() : NULL;
    char hello[LINE];
    size_t size = request(hello, port);
    int poll = epoll_create1(0);
    struct sockaddr_in a = loopback(0, port);
    for (int i = 0; i < n; i++) {
        fds[i] = socket(AF_INET, SOCK_STREAM, 0);
        tune(fds[i]);
        for (int tries = 0; connect(fds[i], (struct sockaddr *)&a, sizeof a) < 0; tries++) {
            if (tries == 1000) die("connect");
            usleep(10000);
        }
        fcntl(fds[i], F_SETFL, O_NONBLOCK);
        if (context) ssls[i] = tls_start(context, fds[i], false);
        put(i, hello, size);
        for (uint64_t since = now_ns(); !gathered(i);)
            if (errno == 0 || now_ns() - since > PATIENCE) errno = 0, die("the upgrade was not answered");
        if (strncmp(conns[i].line, "HTTP/1.1 101", 12) != 0) errno = 0, die("the upgrade was refused");
        forget_line(&conns[i]);
        watch(poll, fds[i], EPOLLIN, (uint32_t)i);
    }
    return poll;
}

static void drain(int port, int n, Memo *memo, bool tls) {
    struct epoll_event found[EVENTS];
    int poll = dial(port, n, tls);
    watch(poll, STDIN_FILENO, EPOLLIN, STDIN);
    memo->ready = (uint64_t)n;
    while (true) {
        int ready = epoll_wait(poll, found, EVENTS, memo->on ? 0 : 2);
        uint64_t sum = 0, since = ready > 0 ? now_ns() : 0;
        for (int e = 0; e < ready; e++) {
            uint32_t i = found[e].data.u32;
            if (i == STDIN) {
                if (command() == NULL) return;
                continue;
            }
            ssize_t got;
            do {
                got = get((int)i, buffer, sizeof buffer);
                if (got > 0) sum += (uint64_t)got;
            } while (got > 0 && tls);
            if (got == 0) epoll_ctl(poll, EPOLL_CTL_DEL, fds[i], NULL), memo->lost++;
        }
        if (sum) memo->received += sum;
        if (since) memo->busy_ns += now_ns() - since;
    }
}

static void pound(int port, int n, double seconds, size_t bytes, bool tls) {
    struct epoll_event found[EVENTS];
    int poll = dial(port, n, tls);
    char message[4096];
    size_t header = bytes < 126 ? 2 : 4, size = header + 4 + bytes;
    if (size > sizeof message) errno = 0, die("BYTES is out of range");
    memset(message, 'x', sizeof message);
    message[0] = (char)0x82;
    message[1] = (char)(0x80 | (bytes < 126 ? bytes : 126));
    if (bytes >= 126) message[2] = (char)(bytes >> 8), message[3] = (char)(bytes & 255);
    memset(message + header, 0, 4); /* a mask of zeros */
    uint64_t answers = 0, busy = 0, begin = now_ns(), end = begin + (uint64_t)(seconds * 1e9);
    for (int i = 0; i < n; i++) put(i, message, size);
    while (now_ns() < end) {
        int ready = epoll_wait(poll, found, EVENTS, 0);
        uint64_t since = now_ns();
        for (int e = 0; e < ready; e++) {
            int i = (int)found[e].data.u32;
            ssize_t got = get(i, buffer, sizeof buffer);
            if (got == 0) errno = 0, die("the server closed a connection");
            if (got < 0) continue;
            conns[i].head = (uint16_t)(conns[i].head + got);
            if (conns[i].head < header + bytes) continue;
            conns[i].head = 0;
            answers++;
            put(i, message, size);
        }
        if (ready > 0) busy += now_ns() - since;
    }
    double wall = (double)(now_ns() - begin) / 1e9;
    printf("{\"answers\":%llu,\"per_s\":%.0f,\"busy\":%.3f}\n", (unsigned long long)answers, (double)answers / wall,
           (double)busy / 1e9 / wall);
}

/* --------------------------------------------------------------------------- clients that log in and sit */

enum { ENTRY_S = 60, RETRY_S = 1, STEPS = 64, HISTOGRAM = STEPS * 64 };
enum { AUTH = 1, PING = 2, ACK = 3, SEND = 5, MSG = 32, SENT = 33, SKIP = 34, HELLO = 35, PONG = 36, ERROR = 37, LEVEL = 38,
       PROBE = 43, HEAD = 44 };

typedef struct {
    enum { AWAY, DIALING, SHAKING, UPGRADING, ENTERING, IN } state;
    bool silent;
    uint16_t auth_bytes, kept_bytes;
    uint8_t *auth, *kept; /* kept: the beginning of a frame */
    char session[65], *conv;
    uint32_t tag, acked;
    uint64_t cursor, dialed_ns, sent_ns, ping_ns;
    int next; /* who beats in the same millisecond */
} Sitter;

static Sitter *sitters;
static struct {
    int count, port, beat_ms, sources, window, poll, first;
    bool echo;
    SSL_CTX *tls;
    int *queue, head, queued; /* who is to be dialed, in order */
    uint64_t *queued_until;
    int in, on_the_way;
    bool connecting;
    uint64_t begin_ns;
    int speaker; /* the last who spoke */
    uint64_t speak_every_ns, speak_at_ns;
} room;
static struct {
    uint64_t beats, pongs, probes, errors, evicted, lost, retries, fresh, hot, cold, spoken, heard;
    double evicted_min_s, evicted_max_s;
    uint32_t rtt[HISTOGRAM], entry[HISTOGRAM], msg[HISTOGRAM];
} seen;

static void note(uint32_t *histogram, uint64_t us) {
    int octave = us < STEPS ? 0 : 63 - __builtin_clzll(us) - 5;
    uint64_t bucket = us < STEPS ? us : (uint64_t)octave * STEPS + ((us >> (octave - 1)) & (STEPS - 1));
    histogram[bucket < HISTOGRAM ? bucket : HISTOGRAM - 1]++;
}

static double quantile_ms(const uint32_t *histogram, double share) {
    uint64_t all = 0, sum = 0;
    for (int i = 0; i < HISTOGRAM; i++) all += histogram[i];
    for (int i = 0; i < HISTOGRAM && all; i++) {
        if ((double)(sum += histogram[i]) < share * (double)all) continue;
        int octave = i / STEPS;
        uint64_t us = octave == 0 ? (uint64_t)i : ((uint64_t)STEPS + (uint64_t)(i % STEPS)) << (octave - 1);
        return (double)us / 1e3;
    }
    return 0;
}

/* msgpack, as far as what a server says to somebody who sits needs it. */
typedef struct {
    const uint8_t *at, *end;
} Reader;

static uint64_t big(Reader *r, int bytes) {
    uint64_t value = 0;
    if (r->end - r->at < bytes) errno = 0, die("a frame ends early");
    while (bytes--) value = value << 8 | *r->at++;
    return value;
}

/* Step over one value: its number, its length, or how many follow; `*bytes` of it stand at the reader. */
static uint64_t value(Reader *r, uint64_t *bytes, uint64_t *inside) {
    uint8_t lead = (uint8_t)big(r, 1);
    uint64_t n = lead;
    *bytes = *inside = 0;
    if (lead < 0x80 || lead >= 0xe0 || lead == 0xc0) return n;
    if ((lead & 0xf0) == 0x90) return *inside = lead & 15;
    if ((lead & 0xf0) == 0x80) return (*inside = 2u * (lead & 15)) / 2;
    if ((lead & 0xe0) == 0xa0) return *bytes = lead & 31;
    if (lead == 0xc2 || lead == 0xc3) return lead & 1;
    if (lead >= 0xcc && lead <= 0xd3) return big(r, 1 << (lead & 3));
    if (lead == 0xca || lead == 0xcb) return big(r, lead == 0xca ? 4 : 8);
    if (lead >= 0xc4 && lead <= 0xc6) return *bytes = big(r, 1 << (lead - 0xc4));
    if (lead >= 0xd9 && lead <= 0xdb) return *bytes = big(r, 1 << (lead - 0xd9));
    n = big(r, (lead & 1) ? 4 : 2); /* dc, dd: array; de, df: map */
    *inside = lead < 0xde ? n : 2 * n;
    return n;
}

static uint64_t number(Reader *r) {
    uint64_t bytes, inside, n = value(r, &bytes, &inside);
    if (bytes || inside) errno = 0, die("a number is something else");
    return n;
}

static void step_over(Reader *r) {
    for (uint64_t left = 1, bytes, inside; left > 0; left += inside - 1) {
        value(r, &bytes, &inside);
        if ((uint64_t)(r->end - r->at) < bytes) errno = 0, die("a frame ends early");
        r->at += bytes;
    }
}

static uint8_t *put_number(uint8_t *at, uint64_t n) {
    *at++ = 0xcf;
    for (int shift = 56; shift >= 0; shift -= 8) *at++ = (uint8_t)(n >> shift);
    return at;
}

/* One packet, under a mask of zeros. */
static void say(int i, const uint8_t *packet, size_t n) {
    uint8_t out[4096], *at = out;
    if (n + 8 > sizeof out) errno = 0, die("the packet is too large");
    *at++ = 0x82;
    if (n < 126) *at++ = (uint8_t)(0x80 | n);
    else *at++ = 0x80 | 126, *at++ = (uint8_t)(n >> 8), *at++ = (uint8_t)n;
    memset(at, 0, 4);
    memcpy(at + 4, packet, n);
    put(i, out, (size_t)(at + 4 - out) + n);
    sitters[i].sent_ns = now_ns();
}

static void say_auth(int i) {
    Sitter *s = &sitters[i];
    uint8_t packet[4096], *at = packet;
    size_t n = strlen(s->session);
    *at++ = 0x99; /* op, versions, token, device and class are in the plan */
    memcpy(at, s->auth, s->auth_bytes);
    at += s->auth_bytes;
    *at++ = 0xd9, *at++ = (uint8_t)n;
    memcpy(at, s->session, n);
    at = put_number(at + n, s->acked);
    at = put_number(at, s->cursor);
    say(i, packet, (size_t)(at - packet));
}

static uint8_t *put_bytes(uint8_t *at, const void *p, size_t n) {
    *at++ = 0xc4, *at++ = (uint8_t)n;
    memcpy(at, p, n);
    return at + n;
}

/* One message of eight bytes: when it was meant to leave. */
static void speak(int i, uint64_t due_ns) {
    Sitter *s = &sitters[i];
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    uint64_t ms = (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000, body = due_ns;
    uint8_t packet[256], *at = packet, id[16] = {0};
    size_t n = strlen(s->conv);
    for (int b = 0; b < 6; b++) id[b] = (uint8_t)(ms >> (40 - 8 * b));
    id[6] = 0x70, id[8] = 0x80; /* a UUIDv7, told apart by who and when */
    memcpy(id + 9, &i, 3);
    memcpy(id + 12, &seen.spoken, 4);
    *at++ = 0x93, *at++ = SEND, *at++ = 0xd9, *at++ = (uint8_t)n;
    memcpy(at, s->conv, n);
    at += n;
    *at++ = 0x91, *at++ = 0x93;
    at = put_bytes(at, id, sizeof id);
    *at++ = 1;
    at = put_bytes(at, &body, sizeof body);
    say(i, packet, (size_t)(at - packet));
    seen.spoken++;
}

static void speak_up(uint64_t now_ns) {
    for (; room.speak_every_ns && room.speak_at_ns <= now_ns; room.speak_at_ns += room.speak_every_ns) {
        for (int tried = 0; tried < room.count; tried++) {
            room.speaker = (room.speaker + 1) % room.count;
            if (sitters[room.speaker].conv == NULL || sitters[room.speaker].state != IN) continue;
            speak(room.speaker, room.speak_at_ns);
            break;
        }
    }
}

static void heard(Reader *r) {
    uint64_t bytes, fields, due_ns;
    bool dup = number(r) != 0;
    for (int field = 0; field < 11; field++) step_over(r); /* id, conv, seq, cseq, epoch, from, ... flags */
    value(r, &bytes, &fields);
    if (bytes != sizeof due_ns) return;
    memcpy(&due_ns, r->at, sizeof due_ns);
    if (dup) return;
    seen.heard++;
    note(seen.msg, (now_ns() - due_ns) / 1000);
}

static void leave(int i) {
    Sitter *s = &sitters[i];
    if (s->state == IN) room.in--;
    else if (s->state != AWAY) room.on_the_way--;
    s->state = AWAY;
    if (ssls[i]) tls_end(ssls[i]), ssls[i] = NULL;
    close(fds[i]);
    forget_line(&conns[i]);
    free(s->kept);
    s->kept = NULL;
    s->kept_bytes = 0;
    s->ping_ns = 0;
}

static void enqueue(int i, uint64_t until_ns) {
    int at = (room.head + room.queued++) % room.count;
    room.queue[at] = i;
    room.queued_until[at] = until_ns;
}

/* The connection has ended, with this close code or none. */
static void ended(int i, int code) {
    Sitter *s = &sitters[i];
    double silence_s = (double)(now_ns() - s->sent_ns) / 1e9;
    if (s->state == IN && code == 4000) {
        if (seen.evicted == 0 || silence_s < seen.evicted_min_s) seen.evicted_min_s = silence_s;
        if (silence_s > seen.evicted_max_s) seen.evicted_max_s = silence_s;
        seen.evicted++;
        if (!s->silent) seen.lost++;
    } else if (s->state == IN) {
        if (seen.lost++ < 5 && code != 1012) fprintf(stderr, "floor: sitter %d was closed with %d\n", room.first + i, code);
    } else if (s->state != AWAY) {
        seen.retries++;
        enqueue(i, now_ns() + RETRY_S * SECOND);
    }
    leave(i);
}

static void entered(int i) {
    Sitter *s = &sitters[i];
    if (s->state != ENTERING) return;
    s->state = IN;
    room.on_the_way--;
    room.in++;
    note(seen.entry, (now_ns() - room.begin_ns) / 1000);
}

static void told(int i, const uint8_t *packet, size_t n) {
    Sitter *s = &sitters[i];
    for (Reader r = {packet, packet + n}; r.at < r.end;) {
        Reader whole = r;
        step_over(&r);
        uint64_t bytes, fields;
        value(&whole, &bytes, &fields);
        uint64_t op = number(&whole);
        if (op == HELLO) {
            number(&whole);
            value(&whole, &bytes, &fields);
            if (bytes > 64) errno = 0, die("the session's name is too long");
            bool same = strlen(s->session) == bytes && memcmp(s->session, whole.at, bytes) == 0;
            memcpy(s->session, whole.at, bytes);
            s->session[bytes] = 0;
            whole.at += bytes;
            step_over(&whole), step_over(&whole), step_over(&whole); /* user, device, time */
            uint64_t resumed = number(&whole);
            *(resumed == 0 ? &seen.fresh : resumed == 1 ? &seen.hot : &seen.cold) += 1;
            if (!same || resumed != 1) s->tag = s->acked = 0;
        } else if (op == MSG || op == SENT || op == SKIP || op == LEVEL || op == HEAD) {
            uint64_t tag = number(&whole);
            if (tag > s->tag) s->tag = (uint32_t)tag;
            if (op == MSG) heard(&whole);
            if (op == LEVEL) {
                s->cursor = number(&whole);
                entered(i);
            }
        } else if (op == PONG || (op == PING && room.echo)) {
            seen.pongs++;
            if (s->ping_ns) note(seen.rtt, (now_ns() - s->ping_ns) / 1000);
            s->ping_ns = 0;
        } else if (op == AUTH && room.echo) {
            entered(i);
        } else if (op == PROBE) {
            seen.probes++;
        } else if (op == ERROR) {
            if (seen.errors++ < 5) fprintf(stderr, "floor: sitter %d was refused something\n", room.first + i);
        }
    }
    if (s->tag > s->acked) {
        uint8_t ack[11] = {0x92, ACK};
        s->acked = s->tag;
        say(i, ack, (size_t)(put_number(ack + 2, s->tag) - ack));
    }
}

/* Everything that has come; -1 when the connection has ended. */
static int listen_to(int i) {
    Sitter *s = &sitters[i];
    size_t used = s->kept_bytes;
    if (used) memcpy(buffer, s->kept, used);
    ssize_t got = get(i, buffer + used, sizeof buffer - used);
    if (got == 0 || (got < 0 && errno != EAGAIN)) return ended(i, 0), -1;
    if (got < 0) return 0;
    used += (size_t)got;
    size_t at = 0;
    while (used - at >= 2) {
        const uint8_t *p = (const uint8_t *)buffer + at;
        size_t header = 2, size = p[1] & 127;
        if (size == 126) header = 4;
        if (size == 127) errno = 0, die("a packet of 65,536 bytes for somebody who sits");
        if (used - at < header) break;
        if (size == 126) size = (size_t)p[2] << 8 | p[3];
        if (used - at < header + size) break;
        at += header + size;
        if ((p[0] & 15) == 8) return ended(i, size >= 2 ? p[header] << 8 | p[header + 1] : 1005), -1;
        if ((p[0] & 15) == 2) told(i, p + header, size);
    }
    free(s->kept);
    s->kept = NULL;
    s->kept_bytes = (uint16_t)(used - at);
    if (used > at) s->kept = malloc(used - at), memcpy(s->kept, buffer + at, used - at);
    return got > 0;
}

static void start_dial(int i) {
    struct sockaddr_in to = loopback(0, room.port), from = loopback(1 + (uint32_t)(i % room.sources), 0);
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0) die("socket");
    tune(fd);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&from, sizeof from) < 0) die("bind");
    fds[i] = fd;
    sitters[i].state = DIALING;
    sitters[i].dialed_ns = now_ns();
    room.on_the_way++;
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS) {
        ended(i, 0);
        return;
    }
    watch(room.poll, fd, EPOLLOUT, (uint32_t)i);
}

/* Go on as far as what has come allows. */
static void advance(int i, uint32_t events) {
    Sitter *s = &sitters[i];
    char hello[LINE];
    if (s->state == DIALING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(fds[i], SOL_SOCKET, SO_ERROR, &error, &size);
        if (error || (events & EPOLLHUP)) {
            ended(i, 0);
            return;
        }
        watch(room.poll, fds[i], EPOLLIN, (uint32_t)i);
        if (room.tls) ssls[i] = tls_start(room.tls, fds[i], false);
        s->state = SHAKING;
    }
    if (s->state == SHAKING) {
        int done = ssls[i] ? tls_shake(ssls[i]) : 1;
        if (done != 1) {
            if (done == 0 || errno != EAGAIN) ended(i, 0);
            return;
        }
        put(i, hello, request(hello, room.port));
        s->state = UPGRADING;
        return;
    }
    if (s->state == UPGRADING) {
        if (!gathered(i)) {
            if (errno == 0) ended(i, 0);
            return;
        }
        bool taken = strncmp(conns[i].line, "HTTP/1.1 101", 12) == 0;
        forget_line(&conns[i]);
        if (!taken) {
            ended(i, 0);
            return;
        }
        s->state = ENTERING;
        say_auth(i);
        return;
    }
    /* TLS may hold more than the socket shows. */
    while (listen_to(i) > 0 && room.tls) {}
}

static void answer_connect(void) {
    printf("{\"in\":%d,\"of\":%d,\"retries\":%llu,\"fresh\":%llu,\"hot\":%llu,\"cold\":%llu,\"seconds\":%.3f,"
           "\"p50_s\":%.3f,\"p99_s\":%.3f,\"cpu_s\":%.4f}\n",
           room.in, room.count, (unsigned long long)seen.retries, (unsigned long long)seen.fresh,
           (unsigned long long)seen.hot, (unsigned long long)seen.cold, (double)(now_ns() - room.begin_ns) / 1e9,
           quantile_ms(seen.entry, 0.5) / 1e3, quantile_ms(seen.entry, 0.99) / 1e3, (double)cpu_ns() / 1e9);
    room.connecting = false;
}

static void answer_report(void) {
    int silent = 0;
    for (int i = 0; i < room.count; i++) silent += sitters[i].silent && sitters[i].state == IN;
    printf("{\"in\":%d,\"of\":%d,\"silent\":%d,\"beats\":%llu,\"pongs\":%llu,\"probes\":%llu,\"errors\":%llu,"
           "\"evicted\":%llu,\"evicted_min_s\":%.3f,\"evicted_max_s\":%.3f,\"lost\":%llu,\"rtt_p50_ms\":%.3f,"
           "\"rtt_p99_ms\":%.3f,\"rtt_max_ms\":%.3f,\"spoken\":%llu,\"heard\":%llu,\"msg_p50_ms\":%.3f,"
           "\"msg_p99_ms\":%.3f,\"msg_max_ms\":%.3f,\"cpu_s\":%.4f}\n",
           room.in, room.count, silent, (unsigned long long)seen.beats, (unsigned long long)seen.pongs,
           (unsigned long long)seen.probes, (unsigned long long)seen.errors, (unsigned long long)seen.evicted,
           seen.evicted_min_s, seen.evicted_max_s, (unsigned long long)seen.lost, quantile_ms(seen.rtt, 0.5),
           quantile_ms(seen.rtt, 0.99), quantile_ms(seen.rtt, 1.0), (unsigned long long)seen.spoken,
           (unsigned long long)seen.heard, quantile_ms(seen.msg, 0.5), quantile_ms(seen.msg, 0.99),
           quantile_ms(seen.msg, 1.0), (double)cpu_ns() / 1e9);
    memset(&seen, 0, sizeof seen);
}

static bool obey(void) {
    char *line = command();
    int k;
    if (line == NULL) return false;
    if (strcmp(line, "connect") == 0) {
        memset(&seen, 0, sizeof seen);
        room.connecting = true;
        room.begin_ns = now_ns();
        for (int i = 0; i < room.count; i++)
            if (sitters[i].state == AWAY) enqueue(i, 0);
    } else if (sscanf(line, "silence %d", &k) == 1) {
        for (int i = 0; i < room.count && i < k; i++) sitters[i].silent = true;
        printf("{\"silent\":%d}\n", k < room.count ? k : room.count);
    } else if (sscanf(line, "talk %d", &k) == 1) {
        room.speak_every_ns = k > 0 ? SECOND / (uint64_t)k : 0;
        room.speak_at_ns = now_ns();
        printf("{\"talk\":%d}\n", k);
    } else if (strcmp(line, "drop") == 0) {
        for (int i = 0; i < room.count; i++)
            if (sitters[i].state != AWAY) leave(i);
        printf("{\"in\":%d}\n", room.in);
    } else if (strcmp(line, "report") == 0) {
        answer_report();
    }
    return true;
}

static void read_plan(const char *path, int first, int count) {
    static char line[8192];
    FILE *plan = fopen(path, "r");
    if (plan == NULL) die(path);
    for (int i = -first; i < count; i++) {
        if (fgets(line, sizeof line, plan) == NULL) errno = 0, die("PLAN has too few lines");
        if (i < 0) continue;
        size_t n = strspn(line, "0123456789abcdef") / 2;
        sitters[i].auth = malloc(n);
        sitters[i].auth_bytes = (uint16_t)n;
        for (size_t b = 0; b < n; b++) sscanf(line + 2 * b, "%2hhx", &sitters[i].auth[b]);
        char *conv = line + 2 * n;
        if (*conv == ' ') sitters[i].conv = strndup(conv + 1, strcspn(conv + 1, "\n"));
    }
    fclose(plan);
}

static void sit(int port, const char *path, int first, int count, int beat_ms, int sources, int window, SSL_CTX *tls,
                bool echo_only) {
    static const uint8_t ping[] = {0x91, PING};
    struct epoll_event found[EVENTS];
    make_room(count);
    sitters = calloc((size_t)count, sizeof *sitters);
    read_plan(path, first, count);
    room.count = count, room.first = first, room.port = port, room.beat_ms = beat_ms, room.sources = sources;
    room.window = window, room.tls = tls, room.echo = echo_only, room.poll = epoll_create1(0);
    room.queue = calloc((size_t)count, sizeof *room.queue);
    room.queued_until = calloc((size_t)count, sizeof *room.queued_until);
    int *beats = malloc((size_t)beat_ms * sizeof *beats); /* by millisecond of the period */
    for (int ms = 0; ms < beat_ms; ms++) beats[ms] = -1;
    uint64_t dice = 0x9e3779b97f4a7c15ull;
    for (int i = 0; i < count; i++) {
        dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
        int ms = (int)(dice % (uint64_t)beat_ms);
        sitters[i].next = beats[ms];
        beats[ms] = i;
    }
    watch(room.poll, STDIN_FILENO, EPOLLIN, STDIN);
    printf("{\"ready\":true}\n");
    for (uint64_t beaten_ms = now_ns() / MS;;) {
        int ready = epoll_wait(room.poll, found, EVENTS, room.in || room.connecting ? 1 : -1);
        for (int e = 0; e < ready; e++) {
            uint32_t i = found[e].data.u32;
            if (i != STDIN) {
                if (sitters[i].state != AWAY) advance((int)i, found[e].events);
            } else if (!obey()) {
                return;
            }
        }
        uint64_t now = now_ns(), now_ms = now / MS;
        if (now_ms - beaten_ms > (uint64_t)beat_ms) beaten_ms = now_ms - (uint64_t)beat_ms;
        for (; beaten_ms < now_ms; beaten_ms++) {
            for (int i = beats[beaten_ms % (uint64_t)beat_ms]; i >= 0; i = sitters[i].next) {
                Sitter *s = &sitters[i];
                if (s->state != IN || s->silent) continue;
                if (s->ping_ns == 0) s->ping_ns = now_ns();
                say(i, ping, sizeof ping);
                seen.beats++;
            }
        }
        speak_up(now);
        if (!room.connecting) continue;
        while (room.queued > 0 && room.on_the_way < room.window && room.queued_until[room.head] <= now) {
            int i = room.queue[room.head];
            room.head = (room.head + 1) % room.count;
            room.queued--;
            start_dial(i);
        }
        if (room.in == room.count || now - room.begin_ns > ENTRY_S * SECOND) answer_connect();
    }
}

/* -------------------------------------------------------------------------------------------------- roles */

int main(int argc, char **argv) {
    const char *role = argc > 2 ? argv[1] : "";
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, NULL, _IOLBF, 0);
    int port = argc > 2 ? atoi(argv[2]) : 0;
    if (strcmp(role, "fanout") == 0 && argc >= 6) {
        make_room(atoi(argv[3]));
        fanout(port, atoi(argv[3]), (size_t)atoi(argv[4]), share(argv[5]),
               argc > 7 ? server_tls(argv[6], argv[7]) : NULL);
    } else if (strcmp(role, "echo") == 0) {
        echo(port, argc > 4 ? server_tls(argv[3], argv[4]) : NULL);
    } else if (strcmp(role, "drain") == 0 && argc >= 5) {
        make_room(atoi(argv[3]));
        drain(port, atoi(argv[3]), share(argv[4]), argc > 5);
    } else if (strcmp(role, "pound") == 0 && argc >= 6) {
        make_room(atoi(argv[3]));
        pound(port, atoi(argv[3]), atof(argv[4]), (size_t)atoi(argv[5]), argc > 6);
    } else if (strcmp(role, "sit") == 0 && argc >= 9) {
        bool tls = false, echo_only = false;
        for (int i = 9; i < argc; i++) {
            tls = tls || strcmp(argv[i], "tls") == 0;
            echo_only = echo_only || strcmp(argv[i], "echo") == 0;
        }
        sit(port, argv[3], atoi(argv[4]), atoi(argv[5]), atoi(argv[6]), atoi(argv[7]), atoi(argv[8]),
            tls ? client_tls() : NULL, echo_only);
    } else {
        fprintf(stderr, "floor: unknown role or missing arguments, see the comment at the top of floor.c\n");
        return 2;
    }
    return 0;
}
