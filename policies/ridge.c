// ridge.c: sums of features and targets, and the regression that needs nothing else.
//
// The heads of a layer share one sum of products G = X^T X over the features of all of them; a
// head's own equations are rows and columns of it (probe_feature). They are solved by a Cholesky
// factor whose first rows, those of the layer's input, serve all heads. Each 64 by 64 block of G is
// one thread's work and is summed in the order of the rows: the same bits for any number of
// threads.
#include "policies/ridge.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

enum { BLOCK = 64, Y_COLS = 16 };
static const size_t SUMS_BYTES = (size_t)768 << 20;  // for the sums of a group of layers

static int target_cols(const Config *c) { return (c->n_kv_heads + Y_COLS - 1) / Y_COLS * Y_COLS; }

// Of one layer's sums.
static size_t layer_bytes(const Config *c) {
    size_t n = (size_t)row_features(c);
    return n * (n + (size_t)target_cols(c)) * sizeof(float);
}

static int layers_at_once(const Config *c, int n_layers) {
    return max_int(1, min_int(n_layers, (int)(SUMS_BYTES / layer_bytes(c))));
}

size_t ridge_bytes(const RunState *s, int n_layers) {
    const Config *c = &s->model->config;
    size_t rows = (size_t)s->max_rows * sizeof(float);
    return (size_t)layers_at_once(c, n_layers) * layer_bytes(c) +
           rows * (3 * (size_t)row_features(c) + (size_t)target_cols(c));
}

int ridge_open(Ridge *r, const RunState *s, int n_layers, double lambda, char *err) {
    const Config *c = &s->model->config;
    size_t n = (size_t)row_features(c), rows = (size_t)s->max_rows;
    *r = (Ridge){.config = c, .pool = s->pool, .lambda = lambda, .n_features = (int)n};
    r->y_cols = target_cols(c);
    r->layers = layers_at_once(c, n_layers);
    r->products = malloc((size_t)r->layers * n * n * sizeof(float));
    r->targets = malloc((size_t)r->layers * n * (size_t)r->y_cols * sizeof(float));
    r->x = malloc(rows * n * sizeof(float)), r->xt = malloc(rows * n * sizeof(float));
    r->xb = malloc(rows * n * sizeof(float));
    r->y = calloc(rows * (size_t)r->y_cols, sizeof(float));
    if (r->products && r->targets && r->x && r->xt && r->xb && r->y) return 0;
    int layers = r->layers;
    ridge_close(r);
    return fail(err, "out of memory for the sums of %d layers", layers);
}

void ridge_close(Ridge *r) {
    free(r->products), free(r->targets), free(r->x), free(r->xt), free(r->xb), free(r->y);
    *r = (Ridge){0};
}

// ---- the sums ----

void ridge_clear(Ridge *r) {
    size_t rows = (size_t)r->layers * r->n_features;
    memset(r->products, 0, rows * r->n_features * sizeof(float));
    memset(r->targets, 0, rows * r->y_cols * sizeof(float));
}

typedef struct {
    const Ridge *r;
    int layer, first, n;
} Rows;

// Row i to a column of xt and a row of each block.
static void spread_row(void *ctx, int i) {
    const Rows *rows = ctx;
    const Ridge *r = rows->r;
    size_t n = (size_t)rows->n;
    const float *x = r->x + (size_t)(rows->first + i) * r->n_features;
    for (int j = 0; j < r->n_features; j++) r->xt[j * n + i] = x[j];
    for (int b = 0; b < r->n_features / BLOCK; b++)
        memcpy(r->xb + (b * n + i) * BLOCK, x + b * BLOCK, BLOCK * sizeof *x);
}

// One 64 by 64 block of X^T X on or below the diagonal, or, where the column is past it, 64 rows of
// X^T y.
static void sum_block(void *ctx, int unit) {
    const Rows *rows = ctx;
    const Ridge *r = rows->r;
    int i = 0;
    while (unit > i + 1) unit -= ++i + 1;  // row i has i + 2 units: its blocks and its targets
    size_t n = (size_t)rows->n, row = (size_t)rows->layer * r->n_features + (size_t)i * BLOCK;
    Gemm g = {
        .a = r->xt + (size_t)i * BLOCK * n, .lda = n, .n = BLOCK, .inner = rows->n, .add = true};
    if (unit <= i) {
        g.c = r->products + row * r->n_features + unit * BLOCK, g.ldc = (size_t)r->n_features;
        g.b = r->xb + (size_t)unit * n * BLOCK, g.cols = BLOCK;
    } else {
        g.c = r->targets + row * r->y_cols, g.ldc = (size_t)r->y_cols;
        g.b = r->y, g.cols = r->y_cols;
    }
    kern.gemm_f32(&g);
}

void ridge_add(Ridge *r, int layer, int first, int n) {
    Rows rows = {r, layer, first, n};
    int blocks = r->n_features / BLOCK;
    parallel_for(r->pool, n, spread_row, &rows);
    parallel_for(r->pool, blocks * (blocks + 3) / 2, sum_block, &rows);
}

// ---- Cholesky ----

static double dot(const double *a, const double *b, int n) {
    double s[4] = {0};
    int i = 0;
    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; j++) s[j] += a[i + j] * b[i + j];
    for (; i < n; i++) s[0] += a[i] * b[i];
    return s[0] + s[1] + s[2] + s[3];
}

// Rows [from, n) of the Cholesky factor L, in place of those of a symmetric matrix whose first rows
// are factored; l [n][n], of which the lower half is used.
static void factor_rows(double *l, int from, int n) {
    for (int i = from; i < n; i++) {
        double *li = l + (size_t)i * n;
        for (int j = 0; j < i; j++) {
            const double *lj = l + (size_t)j * n;
            li[j] = (li[j] - dot(li, lj, j)) / lj[j];
        }
        li[i] = sqrt(fmax(li[i] - dot(li, li, i), 1e-12));
    }
}

// x = (L L^T)^-1 x
static void solve_rows(const double *l, double *x, int n) {
    for (int i = 0; i < n; i++) x[i] = (x[i] - dot(l + (size_t)i * n, x, i)) / l[(size_t)i * n + i];
    for (int i = n - 1; i >= 0; i--) {
        x[i] /= l[(size_t)i * n + i];
        for (int j = 0; j < i; j++) x[j] -= l[(size_t)i * n + j] * x[i];
    }
}

// ---- the regression ----

// Rows [from, n) of head g's own equations: its products with the ridge on the diagonal, l [n][n].
static void own_products(const Ridge *r, int layer, int g, int from, double *l) {
    const float *p = r->products + (size_t)layer * r->n_features * r->n_features;
    int n = probe_features(r->config);
    for (int i = from; i < n; i++) {
        int fi = probe_feature(r->config, g, i);
        for (int j = 0; j <= i; j++) {
            int fj = probe_feature(r->config, g, j);
            l[(size_t)i * n + j] = p[(size_t)max_int(fi, fj) * r->n_features + min_int(fi, fj)];
        }
        l[(size_t)i * n + i] *= 1 + r->lambda;
    }
}

// 1 - the sum of squared errors over that about the mean; w solves (G + lambda diag G) w = b.
static double explained(const Ridge *r, const RidgeFit *fit, int layer, int g, const double *w,
                        const double *b) {
    int n = probe_features(r->config), h = layer * r->config->n_kv_heads + g;
    const float *p = r->products + (size_t)layer * r->n_features * r->n_features;
    double about_mean = fit->squares[h] - fit->sums[h] * fit->sums[h] / fit->count;
    double errors = fit->squares[h] - dot(w, b, n);
    for (int i = 0; i < n; i++) {
        size_t f = (size_t)probe_feature(r->config, g, i);
        errors -= r->lambda * p[f * r->n_features + f] * w[i] * w[i];
    }
    return about_mean > 0 ? fmax(1 - errors / about_mean, 0) : 1;
}

typedef struct {
    const Ridge *r;
    const RidgeFit *fit;
    bool *failed;  // [n_layers]
} Solve;

static void solve_layer(void *ctx, int layer) {
    const Solve *s = ctx;
    const Ridge *r = s->r;
    int n = probe_features(r->config), shared = 1 + r->config->dim;
    double *l = malloc((size_t)n * n * sizeof *l), *w = malloc((size_t)n * sizeof *w);
    double *b = malloc((size_t)n * sizeof *b);
    s->failed[layer] = !l || !w || !b;
    for (int g = 0; g < r->config->n_kv_heads && !s->failed[layer]; g++) {
        int h = layer * r->config->n_kv_heads + g, from = g == 0 ? 0 : shared;
        own_products(r, layer, g, from, l);
        factor_rows(l, from, n);
        for (int i = 0; i < n; i++) {
            size_t row = (size_t)layer * r->n_features + probe_feature(r->config, g, i);
            w[i] = b[i] = r->targets[row * r->y_cols + g];
        }
        solve_rows(l, w, n);
        for (int i = 0; i < n; i++) s->fit->probe[(size_t)h * n + i] = (float)w[i];
        s->fit->explained[h] = explained(r, s->fit, layer, g, w, b);
    }
    free(l), free(w), free(b);
}

int ridge_solve(const Ridge *r, const RidgeFit *fit, char *err) {
    Solve s = {r, fit, calloc((size_t)fit->n_layers + 1, sizeof *s.failed)};
    bool failed = !s.failed;
    if (s.failed) parallel_for(r->pool, fit->n_layers, solve_layer, &s);
    for (int i = 0; i < fit->n_layers && s.failed; i++) failed |= s.failed[i];
    free(s.failed);
    return failed ? fail(err, "out of memory for the regression") : 0;
}
