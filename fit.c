// fit.c: new values and biases for the pairs of a head that stay.
//
// Evicting takes attention away from every query that looked at what went. What stays can carry it:
//
//   P [rows][pairs]   softmax of the known queries over all pairs         arXiv 1706.03762
//   A = P[:, kept], alpha = what of a row's mass lies on pairs            weights before
//   w >= 0            A w = alpha as well as it can be: how many pairs    Lee, Seung 2001, with mu
//                     each kept one stands for; bias = log w
//   X                 softmax over the kept pairs with their biases       weights after
//   V'                X V' = P V as well as it can be, near the old V     ridge regression
//
// Both are least squares over the known queries alone, so that V' stays near V where they do not
// say much. What must stay true: with nothing evicted, nothing changes, to the bit.
#define _POSIX_C_SOURCE 200809L
#include "fit.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "util.h"

enum { ROWS = 64 };              // queries at work together
static const float MOST = 4.0f;  // of a bias

typedef struct {
    const FitHead *h;
    int n, rows;       // kept pairs and queries, both in whole blocks
    float *p;          // [64][pages * 64] weights of the queries at work
    float *a;          // [rows][n] of the kept pairs, before; then after
    float *xt, *xb;    // [n][rows] a transposed; one of the two split (linear.h)
    float *target;     // [rows][head_dim] P V, then what is left of it
    float *alpha;      // [rows]
    float *g;          // [n][n] or, where rows are fewer, [rows][rows]
    float *most;       // [pages] of a row's logits
    float *inverse;    // of g's diagonal blocks, once factored
    float *room;       // [64][head_dim]
    float *w, *c, *m;  // [n]
    float *reach;      // [rows] A w
    float *v;          // [n][head_dim] values of the kept pairs
} Fit;

// ---- weights ----

// Row of logits [n] becomes weights; own: log of the sum beside them. Returns their sum. most
// [pages] is scratch.
static float softmax(float *s, int n, float own, float *most) {
    int pages = (n + PAGE - 1) / PAGE;
    float max = own, sum = 0;
    for (int j = n; j < pages * PAGE; j++) s[j] = -INFINITY;
    kern.max_rows(most, s, pages);
    for (int p = 0; p < pages; p++) max = most[p] > max ? most[p] : max;
    for (int p = 0; p < pages; p++) sum += kern.exp64(s + p * PAGE, softmax_shift(max));
    float all = sum + expf(own - max), scale = all > 0 ? 1 / all : 0;
    kern.scale(s, scale, pages * PAGE);
    return sum * scale;
}

// Weights of queries [first, first + n) over all pairs, of which a keeps the kept ones' and target
// the sum of values.
static void weigh(Fit *f, int first, int n) {
    const FitHead *h = f->h;
    int d = h->head_dim, pages = (h->n_pairs + PAGE - 1) / PAGE, ld = pages * PAGE;
    for (int p = 0; p < pages; p++) {
        kern.gemm_f32(&(Gemm){.c = f->p + p * PAGE,
                              .ldc = (size_t)ld,
                              .a = h->q + (size_t)first * d,
                              .lda = (size_t)d,
                              .b = h->k + (size_t)p * d * PAGE,
                              .n = n,
                              .inner = d,
                              .cols = PAGE});
    }
    for (int i = 0; i < n; i++) {
        float *s = f->p + (size_t)i * ld, *a = f->a + (size_t)(first + i) * f->n;
        for (int j = 0; h->softcap > 0 && j < h->n_pairs; j++)
            s[j] = h->softcap * tanhf(s[j] / h->softcap);
        for (int j = 0; h->was && j < h->n_pairs; j++) s[j] += h->was[j];
        f->alpha[first + i] =
            softmax(s, h->n_pairs, h->own ? h->own[first + i] : -INFINITY, f->most);
        for (int j = 0; j < h->n_kept; j++) a[j] = s[h->kept[j]];
        for (int j = h->n_kept; j < f->n; j++) a[j] = 0;
    }
    kern.gemm_f32(&(Gemm){.c = f->target + (size_t)first * d,
                          .ldc = (size_t)d,
                          .a = f->p,
                          .lda = (size_t)ld,
                          .b = h->v,
                          .n = n,
                          .inner = ld,
                          .cols = d});
}

// ---- biases ----

// y [cols] = x [inner] b, b [inner][cols].
static void multiply(float *y, const float *x, const float *b, int inner, int cols) {
    kern.gemm_f32(&(Gemm){.c = y,
                          .ldc = (size_t)cols,
                          .a = x,
                          .lda = (size_t)inner,
                          .b = b,
                          .n = 1,
                          .inner = inner,
                          .cols = cols});
}

// w >= 0, from 1 on, with A w near alpha: multiplicative steps that never change a sign.
static void fit_biases(Fit *f, float *bias) {
    const FitHead *h = f->h;
    float mu = (float)h->floor;
    multiply(f->c, f->alpha, f->a, f->rows, f->n);
    for (int step = 0; step < h->steps; step++) {
        multiply(f->reach, f->w, f->xt, f->n, f->rows);
        multiply(f->m, f->reach, f->a, f->rows, f->n);
        for (int j = 0; j < f->n; j++) f->w[j] *= (f->c[j] + mu) / (f->m[j] + mu * f->w[j]);
    }
    for (int j = 0; j < h->n_kept; j++) {
        float was = bias[j];
        bias[j] = fminf(fmaxf(was + logf(f->w[j]), -MOST), MOST);
        f->w[j] = expf(bias[j] - was);
    }
}

// ---- values ----

// A becomes X: each row's weights over the kept pairs alone, with their biases, times alpha. The
// transposed copy follows.
static void reweigh(Fit *f) {
    float *scale = f->reach;
    multiply(f->reach, f->w, f->xt, f->n, f->rows);
    for (int i = 0; i < f->rows; i++) scale[i] = f->reach[i] > 0 ? f->alpha[i] / f->reach[i] : 0;
    for (int i = 0; i < f->rows; i++)
        for (int j = 0; j < f->n; j++) f->a[(size_t)i * f->n + j] *= scale[i] * f->w[j];
    for (int j = 0; j < f->n; j++)
        for (int i = 0; i < f->rows; i++) f->xt[(size_t)j * f->rows + i] *= scale[i] * f->w[j];
}

// target -= X V: what the old values leave over.
static void leave_over(Fit *f) {
    int d = f->h->head_dim;
    for (size_t i = 0; i < (size_t)f->n * d; i++) f->v[i] = -f->v[i];
    kern.gemm_f32(&(Gemm){.c = f->target,
                          .ldc = (size_t)d,
                          .a = f->a,
                          .lda = (size_t)f->n,
                          .b = f->v,
                          .n = f->h->n_rows,
                          .inner = f->n,
                          .cols = d,
                          .add = true});
}

// (X^T X + lambda)^-1 X^T R, or where queries are fewer than pairs X^T (X X^T + lambda)^-1 R, to
// f->v.
static void solve_values(Fit *f) {
    int d = f->h->head_dim, size = min_int(f->n, f->rows);
    bool dual = f->rows < f->n;
    if (dual) {  // xt is X^T: its own Gram matrix is X X^T
        split_columns(f->xb, f->xt, f->n, f->rows);
        gram(f->g, f->a, f->xb, f->n, f->rows);
    } else {
        split_columns(f->xb, f->a, f->rows, f->n);
        gram(f->g, f->xt, f->xb, f->rows, f->n);
    }
    for (int i = 0; i < size; i++) f->g[(size_t)i * size + i] += (float)f->h->ridge;
    cholesky(f->g, f->inverse, size, 1e-12f);
    if (dual) cholesky_solve(f->g, f->inverse, f->target, f->rows, d, f->room);
    kern.gemm_f32(&(Gemm){.c = f->v,
                          .ldc = (size_t)d,
                          .a = f->xt,
                          .lda = (size_t)f->rows,
                          .b = f->target,
                          .n = f->n,
                          .inner = f->rows,
                          .cols = d});
    if (!dual) cholesky_solve(f->g, f->inverse, f->v, f->n, d, f->room);
}

// ---- all of it ----

// Room for n floats out of the block, of which *used are taken; with block NULL only counted.
static float *take(float *block, size_t *used, size_t n) {
    float *p = block ? block + *used : NULL;
    *used += (n + 15) / 16 * 16;
    return p;
}

static size_t lay_out(Fit *f, float *block) {
    const FitHead *h = f->h;
    size_t used = 0, d = (size_t)h->head_dim, rows = (size_t)f->rows, n = (size_t)f->n;
    size_t size = (size_t)min_int(f->rows, f->n),
           pairs = (size_t)(h->n_pairs + PAGE - 1) / PAGE * PAGE;
    f->p = take(block, &used, ROWS * pairs);
    f->a = take(block, &used, rows * n);
    f->xt = take(block, &used, rows * n);
    f->xb = take(block, &used, rows * n);
    f->target = take(block, &used, rows * d);
    f->alpha = take(block, &used, rows);
    f->g = take(block, &used, size * size);
    f->inverse = take(block, &used, size * BLOCK);
    f->room = take(block, &used, BLOCK * d);
    f->w = take(block, &used, n), f->c = take(block, &used, n), f->m = take(block, &used, n);
    f->reach = take(block, &used, rows);
    f->v = take(block, &used, n * d);
    f->most = take(block, &used, pairs / PAGE);
    return used;
}

// What products read but nobody writes: rows and pairs that fill the last block.
static void pad(Fit *f) {
    size_t n = (size_t)f->n, d = (size_t)f->h->head_dim, rows = (size_t)f->h->n_rows;
    size_t more = (size_t)f->rows - rows, kept = (size_t)f->h->n_kept;
    memset(f->a + rows * n, 0, more * n * sizeof *f->a);
    memset(f->alpha + rows, 0, more * sizeof *f->alpha);
    memset(f->target + rows * d, 0, more * d * sizeof *f->target);
    memset(f->v + kept * d, 0, (n - kept) * d * sizeof *f->v);
    for (int j = 0; j < f->n; j++) f->w[j] = 1;
}

// The room is as large as the largest head that was fitted in it. -1: no memory.
static int grow(FitRoom *room, size_t floats) {
    if (floats <= room->floats) return 0;
    fit_room_free(room);
    if (posix_memalign((void **)&room->block, 64, floats * sizeof *room->block) != 0) {
        room->block = NULL;
        return -1;
    }
    room->floats = floats;
    return 0;
}

void fit_room_free(FitRoom *room) {
    free(room->block);
    *room = (FitRoom){0};
}

int fit_head(const FitHead *h, FitRoom *room, float *values, float *bias) {
    int d = h->head_dim;
    for (int j = 0; j < h->n_kept; j++) {
        memcpy(values + (size_t)j * d, h->v + (size_t)h->kept[j] * d, (size_t)d * sizeof *values);
        bias[j] = h->was ? h->was[h->kept[j]] : 0;
    }
    if (h->n_kept == h->n_pairs || h->n_kept == 0 || h->n_rows == 0) return 0;
    Fit f = {.h = h, .n = whole_blocks(h->n_kept), .rows = whole_blocks(h->n_rows)};
    if (grow(room, lay_out(&f, NULL)) != 0) return -1;
    lay_out(&f, room->block);
    pad(&f);
    for (int i = 0; i < h->n_rows; i += ROWS) weigh(&f, i, min_int(h->n_rows - i, ROWS));
    transpose(f.xt, f.a, f.rows, f.n);
    if (h->biases) fit_biases(&f, bias);
    memcpy(f.v, values, (size_t)h->n_kept * d * sizeof *values);
    reweigh(&f);
    leave_over(&f);
    solve_values(&f);
    kern.add(values, f.v, h->n_kept * d);
    return 0;
}
