// tiles.h: the tile instructions of Intel's AMX in plain C: their definition, and what runs in
// their place where there are none (the set amx-emulated).
//
// Eight tiles have 16 rows of 64 bytes each; how many of both count is what LDTILECFG reads:
//
//   byte   0        1          16                 48
//          palette  start row  bytes a row [8]    rows [8]      of tiles 0 to 7
//          1        0          16 bits each       8 bits each
//
// A product takes pairs along the inner dimension, as panels of 16-bit weights and packed pages
// have them:
//
//   c [m][n] f32 += a [m][k][2] bf16 times b [k][n][2] bf16, m, n and k at most 16
//
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, under the instructions'
// names, which stand beside the functions. What the processor answers with an exception is an
// assertion here. Nothing but this depends on where a tile's rows come from: a row of c has the
// same bits in a tile of any height.
#ifndef TILES_H
#define TILES_H
#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/half.h"

enum { TILES = 8, TILE_HEIGHT = 16, TILE_WIDTH = 64 };  // rows, bytes of a row

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row, of each tile; [8] and on are 0, and so is rows
    uint8_t rows[16];
} TileConfig;

typedef struct {
    TileConfig config;
    uint8_t tile[TILES][TILE_HEIGHT][TILE_WIDTH];
} Tiles;

// LDTILECFG
static inline void tiles_configure(Tiles *t, const TileConfig *c) {
    assert(c->palette == 1 && c->start_row == 0);
    for (int n = 0; n < TILES; n++) {
        assert(c->bytes[n] <= TILE_WIDTH && c->rows[n] <= TILE_HEIGHT);
        assert((c->bytes[n] > 0) == (c->rows[n] > 0) && c->bytes[n] % 4 == 0);
        assert(c->bytes[TILES + n] == 0 && c->rows[TILES + n] == 0);
    }
    t->config = *c;
    memset(t->tile, 0, sizeof t->tile);
}

// TILERELEASE: no tile is left.
static inline void tiles_release(Tiles *t) { memset(&t->config, 0, sizeof t->config); }

// TILEZERO
static inline void tiles_zero(Tiles *t, int n) {
    assert(t->config.rows[n] > 0);
    memset(t->tile[n], 0, sizeof t->tile[n]);
}

// TILELOADD: rows lie stride bytes apart; what the tile has beyond them becomes 0.
static inline void tiles_load(Tiles *t, int n, const void *from, size_t stride) {
    tiles_zero(t, n);
    for (int r = 0; r < t->config.rows[n]; r++)
        memcpy(t->tile[n][r], (const uint8_t *)from + r * stride, t->config.bytes[n]);
}

// TILESTORED
static inline void tiles_store(const Tiles *t, int n, void *to, size_t stride) {
    assert(t->config.rows[n] > 0);
    for (int r = 0; r < t->config.rows[n]; r++)
        memcpy((uint8_t *)to + r * stride, t->tile[n][r], t->config.bytes[n]);
}

// A number of the product: what is below 2^-126 counts as 0, of factors and of sums.
static inline float flushed(uint32_t bits) {
    return bits_float(bits & 0x7f800000 ? bits : bits & 0x80000000);
}

// sum + a b, rounded once.
static inline float fused(float sum, float a, float b) {
    return flushed(float_bits(fmaf(a, b, sum)));
}

// TDPBF16PS: the first and the second numbers of the pairs have sums of their own, from 0 on, which
// are added to each other and then to c.
static inline __attribute__((always_inline)) void tiles_dot(Tiles *t, int c, int a, int b) {
    enum { N = TILE_WIDTH / 4 };
    const TileConfig *f = &t->config;
    assert(c != a && c != b && a != b && f->rows[c] > 0);
    assert(f->rows[c] == f->rows[a] && f->bytes[c] == f->bytes[b] && f->bytes[a] == 4 * f->rows[b]);
    for (int m = 0; m < f->rows[c]; m++) {
        float even[N] = {0}, odd[N] = {0}, sum[N];
        uint32_t pair[N], other[N];
        memcpy(pair, t->tile[a][m], sizeof pair);
        for (int k = 0; k < f->rows[b]; k++) {
            float a0 = flushed(pair[k] << 16), a1 = flushed(pair[k] & 0xffff0000);
            memcpy(other, t->tile[b][k], sizeof other);
            for (int n = 0; n < N; n++) {
                even[n] = fused(even[n], a0, flushed(other[n] << 16));
                odd[n] = fused(odd[n], a1, flushed(other[n] & 0xffff0000));
            }
        }
        memcpy(sum, t->tile[c][m], sizeof sum);
        for (int n = 0; n < N; n++) {
            float both = flushed(float_bits(even[n] + odd[n]));
            sum[n] = flushed(float_bits(flushed(float_bits(sum[n])) + both));
        }
        memcpy(t->tile[c][m], sum, f->bytes[c]);
    }
}
#endif
