// util.c: errors, the clock, random numbers, hashes, UTF-8, text that grows and whole files.
#define _POSIX_C_SOURCE 200809L
#include "util.h"

#include <math.h>
#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

int fail(char *err, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(err, ERR_LEN, fmt, args);
    va_end(args);
    if (n >= ERR_LEN) err[utf8_whole(err, ERR_LEN - 1)] = '\0';
    return -1;
}

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

uint64_t random_next(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t hash_bytes(uint64_t h, const void *data, size_t n) {
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

int utf8_put(uint8_t *out, uint32_t c) {
    if (c < 0x80) return out[0] = (uint8_t)c, 1;
    int len = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = len - 1; i > 0; i--, c >>= 6) out[i] = (uint8_t)(0x80 | (c & 63));
    out[0] = (uint8_t)((0xf00 >> len & 0xf0) | c);
    return len;
}

int utf8_get(const uint8_t *p, const uint8_t *end, uint32_t *c) {
    uint8_t a = p[0];
    if (a < 0x80) return *c = a, 1;
    if (a < 0xc2 || a > 0xf4) return 0;
    if (end - p < 2) return -1;
    uint8_t lo = a == 0xe0 ? 0xa0 : a == 0xf0 ? 0x90 : 0x80;
    uint8_t hi = a == 0xed ? 0x9f : a == 0xf4 ? 0x8f : 0xbf;
    if (p[1] < lo || p[1] > hi) return 0;
    if (a < 0xe0) return *c = (a & 31u) << 6 | (p[1] & 63u), 2;
    if (end - p < 3) return -1;
    if ((p[2] & 0xc0) != 0x80) return 0;
    if (a < 0xf0) return *c = (a & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u), 3;
    if (end - p < 4) return -1;
    if ((p[3] & 0xc0) != 0x80) return 0;
    *c = (a & 7u) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
    return 4;
}

int utf8_broken(const uint8_t *p, const uint8_t *end) {
    uint32_t c;
    int n = 1;
    while (p + n < end && utf8_get(p, p + n + 1, &c) < 0) n++;
    return n;
}

size_t utf8_whole(const char *s, size_t n) {
    const uint8_t *p = (const uint8_t *)s, *end = p + n;
    uint32_t c;
    for (size_t back = 1; back <= 3 && back <= n; back++)
        if (end[-(ptrdiff_t)back] >= 0xc0) return utf8_get(end - back, end, &c) < 0 ? n - back : n;
    return n;
}

// Room for cap bytes, the NUL among them.
static int buffer_reserve(Buffer *b, size_t cap) {
    char *grown = realloc(b->s, cap);
    if (!grown) return -1;
    b->s = grown, b->cap = cap;
    return 0;
}

int buffer_add(Buffer *b, const char *s, size_t n) {
    if (b->n + n + 1 > b->cap && buffer_reserve(b, 2 * (b->n + n) + 256) != 0) return -1;
    memcpy(b->s + b->n, s, n);
    b->s[b->n += n] = '\0';
    return 0;
}

const char *stripped(const char *s, size_t n, size_t *length) {
    while (n > 0 && isspace((unsigned char)s[n - 1])) n--;
    while (n > 0 && isspace((unsigned char)*s)) s++, n--;
    *length = n;
    return s;
}

double number_read(const char *text, size_t n) {
    char copy[64], *end;
    if (n == 0 || n >= sizeof copy || *text == '+') return NAN;
    memcpy(copy, text, n);
    copy[n] = '\0';
    if (strspn(copy, "0123456789.eE+-") != n)
        return NAN;  // strtod takes " 5", "0x10" and "nan", too
    double x = strtod(copy, &end);
    return end == copy + n && isfinite(x) ? x : NAN;
}

// Bytes of a regular file and one more, else of a first block. *most: what may be read of it.
static size_t size_of(FILE *f, size_t *most) {
    struct stat st;
    bool regular = fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode);
    *most = regular ? SIZE_MAX : STREAM_MOST;
    return regular && st.st_size > 0 ? (size_t)st.st_size + 1 : 256;
}

char *file_read(const char *path, size_t *n, char *err) {
    bool is_stdin = strcmp(path, "-") == 0;
    FILE *f = is_stdin ? stdin : fopen(path, "rb");
    Buffer text = {0};
    char block[16384];
    size_t most = 0;
    int why = f ? 0 : errno, rc = buffer_reserve(&text, f ? size_of(f, &most) : 1);
    if (rc == 0) rc = buffer_add(&text, "", 0);
    for (size_t got;
         f && rc == 0 && text.n <= most && (got = fread(block, 1, sizeof block, f)) > 0;)
        rc = buffer_add(&text, block, got);
    if (f && ferror(f)) why = errno;
    if (f && text.n > most) why = EFBIG;
    if (f && !is_stdin) fclose(f);
    if (rc != 0) why = ENOMEM;
    if (why == 0) return *n = text.n, text.s;
    free(text.s);
    if (why == EFBIG)
        fail(err, "more than %d MB and no end", STREAM_MOST >> 20);
    else
        fail(err, "%s", why == EBADF ? "it is closed" : strerror(why));
    errno = why;
    return NULL;
}
