/* What loadgen.c and relay.c know of fastim's wire: as much msgpack as its frames need (docs/protocol.md). */
#ifndef FASTIM_BENCH_WIRE_H
#define FASTIM_BENCH_WIRE_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { AUTH = 1, PING = 2, ACK = 3, SEND = 5, MSG = 32, SENT = 33, SKIP = 34, HELLO = 35, ERROR = 37, LEVEL = 38,
       PROBE = 43, HEAD = 44 };

static const uint64_t SECOND = 1000000000ull;

static inline uint64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

/* Reading never goes beyond the end; `bad` stays set. */
typedef struct {
    const uint8_t *at, *end;
    bool bad;
} Reader;

static inline uint64_t take(Reader *r, int bytes)
{
    uint64_t value = 0;
    if (r->end - r->at < bytes) {
        r->bad = true;
        r->at = r->end;
        return 0;
    }
    while (bytes--)
        value = value << 8 | *r->at++;
    return value;
}

static inline uint64_t read_uint(Reader *r)
{
    uint64_t lead = take(r, 1);
    if (lead < 0x80)
        return lead;
    if (lead >= 0xcc && lead <= 0xcf)
        return take(r, 1 << (lead - 0xcc));
    if (lead == 0xc2 || lead == 0xc3)
        return lead == 0xc3;
    r->bad = true;
    return 0;
}

static inline uint32_t read_array(Reader *r)
{
    uint64_t lead = take(r, 1);
    if ((lead & 0xf0) == 0x90)
        return lead & 0x0f;
    if (lead == 0xdc)
        return (uint32_t)take(r, 2);
    if (lead == 0xdd)
        return (uint32_t)take(r, 4);
    r->bad = true;
    return 0;
}

static inline const uint8_t *read_bytes(Reader *r, uint32_t *length)
{
    uint64_t lead = take(r, 1), n = 0;
    if ((lead & 0xe0) == 0xa0)
        n = lead & 0x1f;
    else if (lead == 0xc4 || lead == 0xd9)
        n = take(r, 1);
    else if (lead == 0xc5 || lead == 0xda)
        n = take(r, 2);
    else if (lead == 0xc6 || lead == 0xdb)
        n = take(r, 4);
    else
        r->bad = true;
    if ((uint64_t)(r->end - r->at) < n) {
        r->bad = true;
        n = 0;
    }
    const uint8_t *bytes = r->at;
    r->at += n;
    *length = (uint32_t)n;
    return bytes;
}

static inline void skip_value(Reader *r, int depth)
{
    if (r->at >= r->end || depth > 8) {
        r->bad = true;
        return;
    }
    uint8_t lead = *r->at;
    uint32_t n = 0;
    if (lead < 0x80 || lead >= 0xe0 || lead == 0xc0 || lead == 0xc2 || lead == 0xc3) {
        r->at++;
    } else if ((lead & 0xf0) == 0x90 || lead == 0xdc || lead == 0xdd) {
        n = read_array(r);
        while (n-- && !r->bad)
            skip_value(r, depth + 1);
    } else if ((lead & 0xf0) == 0x80) {
        r->at++;
        for (n = 2u * (lead & 0x0f); n-- && !r->bad;)
            skip_value(r, depth + 1);
    } else if ((lead >= 0xcc && lead <= 0xcf) || (lead >= 0xd0 && lead <= 0xd3)) {
        r->at++;
        take(r, 1 << (lead & 3));
    } else if (lead == 0xca || lead == 0xcb) {
        r->at++;
        take(r, lead == 0xca ? 4 : 8);
    } else {
        read_bytes(r, &n);
    }
}

static inline uint8_t *put_uint(uint8_t *at, uint64_t value)
{
    if (value < 0x80) {
        *at++ = (uint8_t)value;
        return at;
    }
    int bytes = value <= 0xff ? 1 : value <= 0xffff ? 2 : value <= 0xffffffffull ? 4 : 8;
    *at++ = (uint8_t)(0xcc + __builtin_ctz((unsigned)bytes));
    while (bytes--)
        *at++ = (uint8_t)(value >> (8 * bytes));
    return at;
}

static inline uint8_t *put_text(uint8_t *at, const char *text, size_t length)
{
    if (length < 32) {
        *at++ = (uint8_t)(0xa0 | length);
    } else if (length < 256) {
        *at++ = 0xd9;
        *at++ = (uint8_t)length;
    } else {
        *at++ = 0xda;
        *at++ = (uint8_t)(length >> 8);
        *at++ = (uint8_t)length;
    }
    memcpy(at, text, length);
    return at + length;
}

static inline uint8_t *put_bin_head(uint8_t *at, size_t length)
{
    if (length < 256) {
        *at++ = 0xc4;
    } else {
        *at++ = 0xc5;
        *at++ = (uint8_t)(length >> 8);
    }
    *at++ = (uint8_t)length;
    return at;
}

#endif
