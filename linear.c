// linear.c: the little linear algebra that fitting needs.
//
// Everything of order n^3 is a product of 64 by 64 blocks by the kernels' gemm; what is left is the
// Cholesky factor of single blocks and triangles of 64. One thread does all of it, in one order.
#include "linear.h"

#include <math.h>
#include <string.h>

// ---- blocks ----

enum { AREA = BLOCK * BLOCK };

// to = sign * from^T of one block each. What is read in columns lies together, for rows that are a
// power of two apart push each other out of the cache.
static void transpose_block(float *to, int ld_to, const float *from, int ld, float sign) {
    float block[AREA];
    for (int i = 0; i < BLOCK; i++)
        memcpy(block + (size_t)i * BLOCK, from + (size_t)i * ld, BLOCK * sizeof *block);
    for (int j = 0; j < BLOCK; j++)
        for (int i = 0; i < BLOCK; i++) to[(size_t)j * ld_to + i] = sign * block[i * BLOCK + j];
}

// ---- Gram ----

void transpose(float *to, const float *x, int rows, int cols) {
    for (int i = 0; i < rows; i += BLOCK)
        for (int j = 0; j < cols; j += BLOCK)
            transpose_block(to + (size_t)j * rows + i, rows, x + (size_t)i * cols + j, cols, 1);
}

void split_columns(float *to, const float *x, int rows, int cols) {
    for (int j = 0; j < cols; j += BLOCK)
        for (int i = 0; i < rows; i++, to += BLOCK)
            memcpy(to, x + (size_t)i * cols + j, BLOCK * sizeof *x);
}

void gram(float *g, const float *xt, const float *xb, int rows, int n) {
    for (int i = 0; i < n; i += BLOCK) {
        for (int j = 0; j <= i; j += BLOCK) {
            kern.gemm_f32(&(Gemm){.c = g + (size_t)i * n + j,
                                  .ldc = (size_t)n,
                                  .a = xt + (size_t)i * rows,
                                  .lda = (size_t)rows,
                                  .b = xb + (size_t)j * rows,
                                  .n = BLOCK,
                                  .inner = rows,
                                  .cols = BLOCK});
        }
    }
}

// ---- Cholesky ----

// L of one block in place of A's lower half, column by column: each is taken from all that follow.
static void factor_block(float *a, int ld, float least) {
    float column[BLOCK];
    for (int k = 0; k < BLOCK; k++) {
        float pivot = sqrtf(fmaxf(a[(size_t)k * ld + k], least)), inverse = 1.0f / pivot;
        a[(size_t)k * ld + k] = pivot;
        for (int i = k + 1; i < BLOCK; i++) {
            float *ai = a + (size_t)i * ld;
            float x = column[i] = ai[k] *= inverse;
            for (int j = k + 1; j <= i; j++) ai[j] -= x * column[j];
        }
    }
}

// inverse [64][64] = L^-1 of a factored block, row by row: L L^-1 = I.
static void invert_block(float *inverse, const float *l, int ld) {
    memset(inverse, 0, AREA * sizeof *inverse);
    for (int i = 0; i < BLOCK; i++) {
        float *to = inverse + (size_t)i * BLOCK, scale = 1.0f / l[(size_t)i * ld + i];
        to[i] = 1;
        for (int k = 0; k < i; k++) {
            float w = l[(size_t)i * ld + k];
            for (int j = 0; j <= k; j++) to[j] -= w * inverse[(size_t)k * BLOCK + j];
        }
        for (int j = 0; j <= i; j++) to[j] *= scale;
    }
}

// Blocks below the factored one at akk: A becomes A L^-T.
static void solve_below(float *akk, const float *inverse, int ld, int blocks) {
    float transposed[AREA], x[AREA];
    transpose_block(transposed, BLOCK, inverse, BLOCK, 1);
    for (int i = 1; i <= blocks; i++) {
        float *to = akk + (size_t)i * BLOCK * ld;
        kern.gemm_f32(&(Gemm){.c = x,
                              .ldc = BLOCK,
                              .a = to,
                              .lda = (size_t)ld,
                              .b = transposed,
                              .n = BLOCK,
                              .inner = BLOCK,
                              .cols = BLOCK});
        for (int r = 0; r < BLOCK; r++)
            memcpy(to + (size_t)r * ld, x + (size_t)r * BLOCK, BLOCK * sizeof *x);
    }
}

// The blocks of column k, transposed and negated, are what all later blocks multiply by.
void cholesky(float *a, float *inverse, int n, float least) {
    float below[AREA];
    for (int k = 0; k < n; k += BLOCK) {
        float *akk = a + (size_t)k * n + k;
        factor_block(akk, n, least);
        invert_block(inverse + (size_t)k * BLOCK, akk, n);
        solve_below(akk, inverse + (size_t)k * BLOCK, n, (n - k) / BLOCK - 1);
        for (int j = k + BLOCK; j < n; j += BLOCK) {
            transpose_block(below, BLOCK, a + (size_t)j * n + k, n, -1);
            kern.gemm_f32(&(Gemm){.c = a + (size_t)j * n + j,
                                  .ldc = (size_t)n,
                                  .a = a + (size_t)j * n + k,
                                  .lda = (size_t)n,
                                  .b = below,
                                  .n = n - j,
                                  .inner = BLOCK,
                                  .cols = BLOCK,
                                  .add = true});
        }
    }
}

// ---- solving ----

// x [64][cols] = m x, m [64][64]; room [64][cols].
static void multiply_block(float *x, const float *m, float *room, int cols) {
    kern.gemm_f32(&(Gemm){.c = room,
                          .ldc = (size_t)cols,
                          .a = m,
                          .lda = BLOCK,
                          .b = x,
                          .n = BLOCK,
                          .inner = BLOCK,
                          .cols = cols});
    memcpy(x, room, (size_t)BLOCK * cols * sizeof *x);
}

// Forward, a block that is solved is taken from all below it; backward, all below from each block.
void cholesky_solve(const float *l, const float *inverse, float *b, int n, int cols, float *room) {
    float transposed[AREA];
    for (int k = 0; k < n; k += BLOCK) {
        float *x = b + (size_t)k * cols;
        multiply_block(x, inverse + (size_t)k * BLOCK, room, cols);
        if (k + BLOCK == n) break;
        for (int i = 0; i < BLOCK * cols; i++) room[i] = -x[i];
        kern.gemm_f32(&(Gemm){.c = x + (size_t)BLOCK * cols,
                              .ldc = (size_t)cols,
                              .a = l + (size_t)(k + BLOCK) * n + k,
                              .lda = (size_t)n,
                              .b = room,
                              .n = n - k - BLOCK,
                              .inner = BLOCK,
                              .cols = cols,
                              .add = true});
    }
    for (int k = n - BLOCK; k >= 0; k -= BLOCK) {
        float *x = b + (size_t)k * cols;
        for (int j = k + BLOCK; j < n; j += BLOCK) {
            transpose_block(transposed, BLOCK, l + (size_t)j * n + k, n, -1);
            kern.gemm_f32(&(Gemm){.c = x,
                                  .ldc = (size_t)cols,
                                  .a = transposed,
                                  .lda = BLOCK,
                                  .b = b + (size_t)j * cols,
                                  .n = BLOCK,
                                  .inner = BLOCK,
                                  .cols = cols,
                                  .add = true});
        }
        transpose_block(transposed, BLOCK, inverse + (size_t)k * BLOCK, BLOCK, 1);
        multiply_block(x, transposed, room, cols);
    }
}
