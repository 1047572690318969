// linear.c: the little linear algebra that fitting needs.
//
// Everything of order n^3 is a product of 64 by 64 blocks by the kernels' gemm; what is left is the
// Cholesky factor of single blocks and triangles of 64. One thread does all of it, in one order.
#include "linear.h"

#include <math.h>
#include <string.h>

// ---- blocks ----

// to = -from^T, blocks with rows ld apart and 64 apart.
static void negate_transposed(float *to, const float *from, int ld) {
    for (int i = 0; i < BLOCK; i++)
        for (int j = 0; j < BLOCK; j++) to[j * BLOCK + i] = -from[(size_t)i * ld + j];
}

static void negate(float *to, const float *from, int ld) {
    for (int i = 0; i < BLOCK; i++)
        for (int j = 0; j < BLOCK; j++) to[i * BLOCK + j] = -from[(size_t)i * ld + j];
}

// ---- Gram ----

void gram_spread(float *xt, float *xb, const float *x, int rows, int n) {
    for (int b = 0; b < n; b += BLOCK) {
        float *to = xb + (size_t)b * rows;
        for (int i = 0; i < rows; i++)
            memcpy(to + (size_t)i * BLOCK, x + (size_t)i * n + b, BLOCK * sizeof *x);
        for (int i = 0; i < rows; i += BLOCK)  // 64 by 64 at a time, which stay in the cache
            for (int j = 0; j < BLOCK; j++)
                for (int k = i; k < i + BLOCK; k++)
                    xt[(size_t)(b + j) * rows + k] = to[(size_t)k * BLOCK + j];
    }
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

static void factor_block(float *a, int ld, float least) {
    for (int i = 0; i < BLOCK; i++) {
        float *ai = a + (size_t)i * ld;
        for (int j = 0; j <= i; j++) {
            const float *aj = a + (size_t)j * ld;
            float sum = ai[j];
            for (int k = 0; k < j; k++) sum -= ai[k] * aj[k];
            ai[j] = i == j ? sqrtf(fmaxf(sum, least)) : sum / aj[j];
        }
    }
}

// Row by row x of the block below the factored block l: x = x L^-T.
static void solve_below(float *a, const float *l, int ld) {
    for (int i = 0; i < BLOCK; i++) {
        float *x = a + (size_t)i * ld;
        for (int j = 0; j < BLOCK; j++) {
            const float *lj = l + (size_t)j * ld;
            float sum = x[j];
            for (int k = 0; k < j; k++) sum -= x[k] * lj[k];
            x[j] = sum / lj[j];
        }
    }
}

// The blocks of column k, transposed and negated, are what all later blocks multiply by.
void cholesky(float *a, int n, float least) {
    float below[BLOCK * BLOCK];
    for (int k = 0; k < n; k += BLOCK) {
        float *akk = a + (size_t)k * n + k;
        factor_block(akk, n, least);
        for (int i = k + BLOCK; i < n; i += BLOCK) solve_below(a + (size_t)i * n + k, akk, n);
        for (int j = k + BLOCK; j < n; j += BLOCK) {
            negate_transposed(below, a + (size_t)j * n + k, n);
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

// x [64][cols] = L^-1 x of a factored block, or L^-T x.
static void solve_triangle(const float *l, int ld, float *x, int cols, bool transposed) {
    for (int step = 0; step < BLOCK; step++) {
        int i = transposed ? BLOCK - 1 - step : step;
        float *xi = x + (size_t)i * cols, inverse = 1.0f / l[(size_t)i * ld + i];
        for (int c = 0; c < cols; c++) xi[c] *= inverse;
        int from = transposed ? 0 : i + 1, to = transposed ? i : BLOCK;
        for (int j = from; j < to; j++) {
            float w = transposed ? l[(size_t)i * ld + j] : l[(size_t)j * ld + i];
            float *xj = x + (size_t)j * cols;
            for (int c = 0; c < cols; c++) xj[c] -= w * xi[c];
        }
    }
}

void cholesky_solve(const float *l, float *b, int n, int cols) {
    float block[BLOCK * BLOCK];
    Gemm g = {.ldc = (size_t)cols,
              .a = block,
              .lda = BLOCK,
              .n = BLOCK,
              .inner = BLOCK,
              .cols = cols,
              .add = true};
    for (int i = 0; i < n; i += BLOCK) {
        for (int j = 0; j < i; j += BLOCK) {
            negate(block, l + (size_t)i * n + j, n);
            g.c = b + (size_t)i * cols, g.b = b + (size_t)j * cols;
            kern.gemm_f32(&g);
        }
        solve_triangle(l + (size_t)i * n + i, n, b + (size_t)i * cols, cols, false);
    }
    for (int i = n - BLOCK; i >= 0; i -= BLOCK) {
        for (int j = i + BLOCK; j < n; j += BLOCK) {
            negate_transposed(block, l + (size_t)j * n + i, n);
            g.c = b + (size_t)i * cols, g.b = b + (size_t)j * cols;
            kern.gemm_f32(&g);
        }
        solve_triangle(l + (size_t)i * n + i, n, b + (size_t)i * cols, cols, true);
    }
}
