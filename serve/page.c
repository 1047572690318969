// page.c: GET /: the page for people, serve/page.html, which the Makefile turns into an array.
//
// It may be seen without a key: it holds nothing, and what it asks needs one. A browser is told to
// run the style and the script that stand in it and no others, by their hashes, and to talk to
// nobody but this server, so that a text that it shows cannot become part of it.
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <string.h>

#include "serve/door.h"

extern const unsigned char page_html[];
extern const unsigned long page_html_size;

// ---- hashes ----

// SHA-256 (FIPS 180-4), which browsers ask for. Its constants are the first 32 bits of the
// fractions of the cube roots of the first 64 primes, and of the square roots of the first 8.
static const uint32_t sha_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotated(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha_block(uint32_t h[8], const uint8_t *p) {
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 |
               (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) + w[i - 7] +
               (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
    }
    memcpy(s, h, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t a = s[0], e = s[4];
        uint32_t t = s[7] + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) +
                     ((e & s[5]) ^ (~e & s[6])) + sha_k[i] + w[i];
        uint32_t u = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) +
                     ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t;
        s[0] = t + u;
    }
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

enum { HASH_TEXT = 45 };

// The hash of data [n] in base64, and a NUL.
static void hash_text(const unsigned char *data, size_t n, char text[HASH_TEXT]) {
    static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t end[128] = {0};  // the last bytes, a bit 1, zeros, the length in bits
    size_t rest = n % 64, n_end = rest < 56 ? 64 : 128;
    for (size_t i = 0; i + 64 <= n; i += 64) sha_block(h, data + i);
    memcpy(end, data + n - rest, rest);
    end[rest] = 0x80;
    for (int i = 0; i < 8; i++) end[n_end - 1 - (size_t)i] = (uint8_t)((uint64_t)n * 8 >> 8 * i);
    for (size_t i = 0; i < n_end; i += 64) sha_block(h, end + i);
    for (int i = 0; i < 43; i++) {  // digit i has bits 6 i and on
        int bits = 0;
        for (int b = 6 * i; b < 6 * i + 6; b++)
            bits = bits * 2 + (b < 256 ? (int)(h[b / 32] >> (31 - b % 32) & 1) : 0);
        text[i] = digit[bits];
    }
    memcpy(text + 43, "=", 2);
}

// ---- the page ----

// The hash of what stands between two tags, the first such, or of nothing.
static void hash_between(const char *open, const char *close, char text[HASH_TEXT]) {
    const char *page = (const char *)page_html;
    size_t n = page_html_size, n_open = strlen(open), n_close = strlen(close), from = 0;
    while (from + n_open < n && memcmp(page + from, open, n_open) != 0) from++;
    size_t to = from = min_int((int)(from + n_open), (int)n);
    while (to + n_close < n && memcmp(page + to, close, n_close) != 0) to++;
    hash_text(page_html + from, to - from, text);
}

void page_get(void *arg, Http *h, Outlet *o) {
    char style[HASH_TEXT], script[HASH_TEXT], whole[HASH_TEXT], headers[1000];
    const char *have = http_header(h, "if-none-match");
    (void)arg;
    hash_between("<style>", "</style>", style);
    hash_between("<script>", "</script>", script);
    hash_text(page_html, page_html_size, whole);
    snprintf(headers, sizeof headers,
             "Content-Security-Policy: default-src 'none'; style-src 'sha256-%s'; "
             "script-src 'sha256-%s'; connect-src 'self'; img-src data:; base-uri 'none'; "
             "form-action 'none'; frame-ancestors 'none'\r\n"
             "Referrer-Policy: no-referrer\r\nCache-Control: no-cache\r\nETag: \"%s\"\r\n",
             style, script, whole);
    bool same = have && strstr(have, whole);
    outlet_send(o, same ? 304 : 200, "text/html; charset=utf-8", headers, (const char *)page_html,
                same ? 0 : page_html_size);
    outlet_release(o);
}
