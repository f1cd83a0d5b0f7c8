/* What the kernel itself costs: the floors beside which every fan-out, echo and connection figure stands.
 *
 *   floor fanout PORT CONNS ROUNDS K BYTES MEMO [cert key]  a server: per round, one send of K frames to each
 *   floor echo   PORT CONNS SECONDS [cert key]              a server: what comes goes back
 *   floor accept PORT CONNS [cert key]                      a server: accept, upgrade, keep
 *   floor drain  PORT CONNS MEMO [PATH] [tls]               a client: upgrade CONNS sockets, read and count
 *   floor pound  PORT CONNS SECONDS BYTES [PATH] [tls]      a client: one message under way per connection
 *
 * MEMO is a file of 4 KiB that server and drain share: what was received, so that a round begins only when the last
 * one has arrived and no send meets a full buffer. Clients spin. Each role prints one JSON object; CPU is that of
 * the role's own process (getrusage) over its measured window. With `cert key` (server) or `tls` (client) over TLS 1.3.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
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
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { READ_BYTES = 1 << 18, EVENTS = 1024, MAX_FDS = 20000 };

typedef struct {
    _Atomic uint64_t received; /* bytes after the upgrade, all connections */
    _Atomic uint64_t ready;    /* connections that are upgraded */
    _Atomic uint64_t stop;
} Memo;

typedef struct {
    int fd;
    SSL *ssl;
    bool up; /* handshake and upgrade are done */
    uint32_t head;
    char line[1024];
} Conn;

static Conn *conns;
static char buffer[READ_BYTES];

static void die(const char *what) {
    fprintf(stderr, "floor: %s: %s\n", what, errno ? strerror(errno) : "failed");
    exit(2);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static double cpu_s(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)u.ru_utime.tv_sec + (double)u.ru_stime.tv_sec +
           ((double)u.ru_utime.tv_usec + (double)u.ru_stime.tv_usec) / 1e6;
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
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
}

/* ------------------------------------------------------------------------------------------------- bytes */

static ssize_t get(Conn *c, void *p, size_t n) {
    if (c->ssl == NULL) return recv(c->fd, p, n, MSG_DONTWAIT);
    int got = SSL_read(c->ssl, p, (int)n);
    if (got > 0) return got;
    int why = SSL_get_error(c->ssl, got);
    errno = why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? EAGAIN : ECONNRESET;
    return why == SSL_ERROR_ZERO_RETURN ? 0 : -1;
}

static void put(Conn *c, const void *p, size_t n) {
    const char *at = p;
    while (n > 0) {
        ssize_t sent = c->ssl == NULL ? send(c->fd, at, n, MSG_DONTWAIT | MSG_NOSIGNAL) : SSL_write(c->ssl, at, (int)n);
        if (sent > 0) {
            at += sent;
            n -= (size_t)sent;
        } else if (c->ssl == NULL && errno != EAGAIN) {
            die("send");
        }
    }
}

static SSL_CTX *server_tls(const char *cert, const char *key) {
    SSL_CTX *tls = SSL_CTX_new(TLS_server_method());
    SSL_CTX_set_min_proto_version(tls, TLS1_3_VERSION);
    SSL_CTX_set_num_tickets(tls, 0);
    if (SSL_CTX_use_certificate_chain_file(tls, cert) != 1 || SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) != 1)
        die("certificate");
    return tls;
}

static int listen_on(int port, int backlog) {
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    inet_pton(AF_INET, "127.0.0.1", &a.sin_addr);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    tune(fd);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(fd, backlog) < 0) die("listen");
    return fd;
}

static const char UPGRADED[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/* Read until the blank line of the request; true when it is there. */
static bool upgraded(Conn *c) {
    ssize_t got = get(c, c->line + c->head, sizeof c->line - 1 - c->head);
    if (got <= 0) {
        if (got == 0 || errno != EAGAIN) die("a peer left in its handshake");
        return false;
    }
    c->head += (uint32_t)got;
    c->line[c->head] = 0;
    if (strstr(c->line, "\r\n\r\n") == NULL) return false;
    put(c, UPGRADED, sizeof UPGRADED - 1);
    return c->up = true;
}

/* Accept n connections and finish their upgrades. */
static int serve(int listener, int n, SSL_CTX *tls) {
    int poll = epoll_create1(0), up = 0, count = 0;
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = UINT32_MAX}, found[EVENTS];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &e);
    while (up < n) {
        int ready = epoll_wait(poll, found, EVENTS, 10000);
        if (ready <= 0) die("clients did not come");
        for (int i = 0; i < ready; i++) {
            if (found[i].data.u32 == UINT32_MAX) {
                int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (fd < 0) continue;
                if (count == n) die("more clients than asked for");
                Conn *c = &conns[count];
                c->fd = fd;
                int one = 1;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                if (tls != NULL) {
                    c->ssl = SSL_new(tls);
                    SSL_set_fd(c->ssl, fd);
                    SSL_set_accept_state(c->ssl);
                    SSL_set_mode(c->ssl, SSL_MODE_RELEASE_BUFFERS);
                }
                struct epoll_event mine = {.events = EPOLLIN, .data.u32 = (uint32_t)count++};
                epoll_ctl(poll, EPOLL_CTL_ADD, fd, &mine);
            } else if (!conns[found[i].data.u32].up) {
                up += upgraded(&conns[found[i].data.u32]);
            }
        }
    }
    return poll;
}

/* ------------------------------------------------------------------------------------------------- servers */

/* One WebSocket frame of `bytes` in all, header included. */
static size_t frame(char *p, size_t bytes) {
    memset(p, 'x', bytes);
    p[0] = (char)0x82;
    if (bytes <= 127) {
        p[1] = (char)(bytes - 2);
    } else {
        p[1] = 126;
        p[2] = (char)((bytes - 4) >> 8);
        p[3] = (char)((bytes - 4) & 255);
    }
    return bytes;
}

static void fanout(int port, int n, int rounds, int k, int bytes, Memo *memo, SSL_CTX *tls) {
    int listener = listen_on(port, 4096);
    serve(listener, n, tls);
    char *packet = malloc((size_t)k * (size_t)bytes);
    for (int i = 0; i < k; i++) frame(packet + i * bytes, (size_t)bytes);
    size_t size = (size_t)k * (size_t)bytes;
    uint64_t waited = 0, behind = 0;
    while (memo->ready < (uint64_t)n) usleep(1000);
    uint64_t base = memo->received;
    double cpu = 0;
    uint64_t begin = now_ns();
    for (int round = 0; round < rounds; round++) {
        double before = cpu_s();
        for (int i = 0; i < n; i++) {
            /* Rotate where it starts, as a fair server does. */
            put(&conns[(i + round) % n], packet, size);
        }
        cpu += cpu_s() - before;
        uint64_t wanted = base + (uint64_t)(round + 1) * (uint64_t)n * size, since = now_ns();
        while (memo->received < wanted && now_ns() - since < 5000000000ull) usleep(200);
        if (memo->received < wanted) behind++;
        waited += now_ns() - since;
    }
    double wall = (double)(now_ns() - begin) / 1e9;
    memo->stop = 1;
    double deliveries = (double)rounds * n * k;
    printf("{\"role\":\"fanout\",\"tls\":%s,\"conns\":%d,\"rounds\":%d,\"k\":%d,\"bytes\":%d,\"cpu_us_per_send\":%.4f,"
           "\"cpu_us_per_delivery\":%.4f,\"wall_s\":%.3f,\"waited_s\":%.3f,\"rounds_behind\":%llu}\n",
           tls ? "true" : "false", n, rounds, k, bytes, cpu * 1e6 / ((double)rounds * n), cpu * 1e6 / deliveries, wall,
           (double)waited / 1e9, (unsigned long long)behind);
}

static void echo(int port, int n, double seconds, SSL_CTX *tls) {
    int listener = listen_on(port, 4096), poll = serve(listener, n, tls);
    struct epoll_event found[EVENTS];
    uint64_t count = 0, mark = 0, begin = now_ns(), half = begin + (uint64_t)(seconds * 0.2e9);
    uint64_t end = begin + (uint64_t)(seconds * 1e9);
    double cpu = 0;
    while (now_ns() < end) {
        int ready = epoll_wait(poll, found, EVENTS, 100);
        for (int i = 0; i < ready; i++) {
            if (found[i].data.u32 == UINT32_MAX) continue;
            Conn *c = &conns[found[i].data.u32];
            ssize_t got = get(c, buffer, sizeof buffer);
            if (got <= 0) continue;
            /* Unmask and answer in place: the header of a server's frame is 4 bytes shorter. */
            uint8_t *p = (uint8_t *)buffer;
            size_t size = p[1] & 127, header = 2;
            if (size == 126) size = (size_t)p[2] << 8 | p[3], header = 4;
            for (size_t b = 0; b < size; b++) p[header + 4 + b] ^= p[header + (b & 3)];
            memmove(p + 4, p, header);
            p[5] &= 127;
            put(c, p + 4, header + size);
            count++;
        }
        if (mark == 0 && now_ns() >= half) mark = count, cpu = cpu_s(), begin = now_ns();
    }
    double wall = (double)(now_ns() - begin) / 1e9;
    cpu = cpu_s() - cpu;
    printf("{\"role\":\"echo\",\"tls\":%s,\"conns\":%d,\"echoes\":%llu,\"per_s\":%.0f,\"cpu_us\":%.4f,\"busy\":%.3f}\n",
           tls ? "true" : "false", n, (unsigned long long)(count - mark), (double)(count - mark) / wall,
           cpu * 1e6 / (double)(count - mark), cpu / wall);
}

static long slab_kb(void) {
    FILE *f = fopen("/proc/meminfo", "r");
    char line[256];
    long slab = 0, value;
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "Slab: %ld", &value) == 1) slab = value;
    if (f) fclose(f);
    return slab;
}

static void accept_only(int port, int n, SSL_CTX *tls) {
    long before = slab_kb();
    int listener = listen_on(port, 4096);
    double cpu = cpu_s();
    serve(listener, n, tls);
    cpu = cpu_s() - cpu;
    /* Both ends of a loopback connection are in this kernel. */
    printf("{\"role\":\"accept\",\"tls\":%s,\"conns\":%d,\"cpu_us\":%.3f,\"kernel_kb_per_socket\":%.2f}\n",
           tls ? "true" : "false", n, cpu * 1e6 / n, (double)(slab_kb() - before) / n / 2);
    fflush(stdout);
    sleep(1);
}

/* ------------------------------------------------------------------------------------------------- clients */

static void dial(int port, int n, const char *path, bool tls, int *poll) {
    char request[1024];
    int size = snprintf(request, sizeof request,
                        "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n", path, port);
    SSL_CTX *context = tls ? SSL_CTX_new(TLS_client_method()) : NULL;
    if (context) SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    *poll = epoll_create1(0);
    for (int i = 0; i < n; i++) {
        Conn *c = &conns[i];
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
        inet_pton(AF_INET, "127.0.0.1", &a.sin_addr);
        c->fd = socket(AF_INET, SOCK_STREAM, 0);
        tune(c->fd);
        for (int tries = 0; connect(c->fd, (struct sockaddr *)&a, sizeof a) < 0; tries++) {
            if (tries == 500) die("connect");
            usleep(10000);
        }
        if (context) {
            c->ssl = SSL_new(context);
            SSL_set_fd(c->ssl, c->fd);
            if (SSL_connect(c->ssl) != 1) die("tls");
        }
        put(c, request, (size_t)size);
        c->head = 0;
        while (true) { /* the answer, whole: nothing is sent behind it yet */
            ssize_t got = c->ssl ? SSL_read(c->ssl, c->line + c->head, (int)(sizeof c->line - 1 - c->head))
                                 : recv(c->fd, c->line + c->head, sizeof c->line - 1 - c->head, 0);
            if (got <= 0) die("the upgrade was not answered");
            c->head += (uint32_t)got;
            c->line[c->head] = 0;
            if (strstr(c->line, "\r\n\r\n")) break;
        }
        if (strncmp(c->line, "HTTP/1.1 101", 12) != 0) die("the upgrade was refused");
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
        epoll_ctl(*poll, EPOLL_CTL_ADD, c->fd, &e);
    }
}

static void drain(int port, int n, Memo *memo, const char *path, bool tls) {
    int poll;
    struct epoll_event found[EVENTS];
    dial(port, n, path, tls, &poll);
    memo->ready = (uint64_t)n;
    uint64_t gone = 0, last = now_ns();
    while (!memo->stop && gone < (uint64_t)n && now_ns() - last < 120000000000ull) {
        int ready = epoll_wait(poll, found, EVENTS, 0);
        uint64_t sum = 0;
        for (int i = 0; i < ready; i++) {
            Conn *c = &conns[found[i].data.u32];
            ssize_t got;
            do {
                got = get(c, buffer, sizeof buffer);
                if (got > 0) sum += (uint64_t)got;
            } while (got > 0 && c->ssl != NULL);
            if (got == 0) epoll_ctl(poll, EPOLL_CTL_DEL, c->fd, NULL), gone++;
        }
        if (sum) memo->received += sum, last = now_ns();
    }
    printf("{\"role\":\"drain\",\"conns\":%d,\"received\":%llu,\"lost_connections\":%llu}\n", n,
           (unsigned long long)memo->received, (unsigned long long)gone);
}

static void pound(int port, int n, double seconds, int bytes, const char *path, bool tls) {
    int poll;
    struct epoll_event found[EVENTS];
    char message[4096];
    size_t header = bytes < 126 ? 2 : 4, size = header + 4 + (size_t)bytes;
    dial(port, n, path, tls, &poll);
    memset(message, 'x', sizeof message);
    message[0] = (char)0x82;
    message[1] = (char)(0x80 | (bytes < 126 ? bytes : 126));
    if (bytes >= 126) message[2] = (char)(bytes >> 8), message[3] = (char)(bytes & 255);
    memset(message + header, 0, 4); /* a mask of zeros */
    uint64_t answers = 0, end = now_ns() + (uint64_t)(seconds * 1e9);
    double cpu = cpu_s();
    for (int i = 0; i < n; i++) put(&conns[i], message, size);
    while (now_ns() < end) {
        int ready = epoll_wait(poll, found, EVENTS, 0);
        for (int i = 0; i < ready; i++) {
            Conn *c = &conns[found[i].data.u32];
            ssize_t got = get(c, buffer, sizeof buffer);
            if (got == 0) die("the server closed a connection");
            if (got < 0) continue;
            c->head += (uint32_t)got;
            if (c->head < (uint32_t)(header + (size_t)bytes)) continue;
            c->head = 0;
            answers++;
            put(c, message, size);
        }
    }
    printf("{\"role\":\"pound\",\"conns\":%d,\"answers\":%llu,\"per_s\":%.0f,\"cpu_us\":%.4f}\n", n,
           (unsigned long long)answers, (double)answers / seconds, (cpu_s() - cpu) * 1e6 / (double)(answers ? answers : 1));
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "floor: see the comment at the top of floor.c\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    const char *role = argv[1];
    int port = atoi(argv[2]), n = atoi(argv[3]);
    if (n < 1 || n > MAX_FDS) die("CONNS is out of range");
    conns = calloc((size_t)n, sizeof *conns);
    if (strcmp(role, "fanout") == 0 && argc >= 8) {
        fanout(port, n, atoi(argv[4]), atoi(argv[5]), atoi(argv[6]), share(argv[7]),
               argc > 9 ? server_tls(argv[8], argv[9]) : NULL);
    } else if (strcmp(role, "echo") == 0 && argc >= 5) {
        echo(port, n, atof(argv[4]), argc > 6 ? server_tls(argv[5], argv[6]) : NULL);
    } else if (strcmp(role, "accept") == 0) {
        accept_only(port, n, argc > 5 ? server_tls(argv[4], argv[5]) : NULL);
    } else if (strcmp(role, "drain") == 0 && argc >= 5) {
        drain(port, n, share(argv[4]), argc > 5 ? argv[5] : "/v1/ws", argc > 6);
    } else if (strcmp(role, "pound") == 0 && argc >= 6) {
        pound(port, n, atof(argv[4]), atoi(argv[5]), argc > 6 ? argv[6] : "/v1/ws", argc > 7);
    } else {
        fprintf(stderr, "floor: unknown role or missing arguments\n");
        return 2;
    }
    return 0;
}
