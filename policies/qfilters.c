// qfilters.c: Q-Filters (arXiv 2503.02812): one direction per kv head says which keys are looked
// at.
//
// Queries and keys of a head lie along a common axis, so that the projection of a key on it stands
// for the attention that the key will get. The axis of a query head is the first right singular
// vector of its queries Q [n][head_dim], as they are after their rotation:
//
//   Q = U S V^T,   f = v_1 sign(1^T u_1),   score of a pair = (mean of f over the group) . k
//
// v_1 is also the first eigenvector of Q^T Q, the sum of q q^T, which is all that is kept of them;
// and 1^T u_1 has the sign of v_1 . (sum of q). Power iteration from that sum therefore ends at f,
// sign and all. Queries are those seen so far, where the authors take some of a calibration text.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "util.h"

typedef struct {
    const Context *c;
    float *sum;       // [n_layers][n_heads][d] of the queries
    float *products;  // [n_layers][n_heads][d][d] sum of q q^T
    int layer, n_rows;
} Filters;

// Adds the rows of one forward call to the sums of query head h.
static void add_queries(void *ctx, int h) {
    const Filters *e = ctx;
    const RunState *s = e->c->state;
    int d = s->model->config.head_dim, n;
    float rows[PAGE * MAX_HEAD_DIM];
    for (int i = 0; i < e->n_rows; i += n) {
        n = min_int(e->n_rows - i, PAGE);
        for (int r = 0; r < n; r++)
            memcpy(rows + r * d, s->q + ((size_t)(i + r) * s->model->config.n_heads + h) * d,
                   (size_t)d * sizeof *rows);
        add_products(query_part(e->products, e->c, e->layer, h, d * d),
                     query_part(e->sum, e->c, e->layer, h, d), rows, n, d);
    }
}

static void watch_queries(void *arg, int layer, int n) {
    Filters *e = arg;
    const KVShape *shape = &e->c->kv->shape;
    e->layer = layer, e->n_rows = n;
    if (shape->window[layer] == 0) parallel_for(e->c->state->pool, shape->n_heads, add_queries, e);
}

// ---- the direction ----

// x [d] over its length, in place; 0 stays 0. Returns the length.
static double normalize(double *x, int d) {
    double length = 0;
    for (int i = 0; i < d; i++) length += x[i] * x[i];
    length = sqrt(length);
    for (int i = 0; i < d && length > 0; i++) x[i] /= length;
    return length;
}

void first_direction(float *f, const float *products, const float *sum, int d) {
    enum { STEPS = 2000 };
    double x[MAX_HEAD_DIM], next[MAX_HEAD_DIM], moved = 1;
    for (int i = 0; i < d; i++) x[i] = sum[i];
    normalize(x, d);
    for (int step = 0; step < STEPS && moved > 1e-22; step++) {
        for (int i = 0; i < d; i++) {
            next[i] = 0;
            for (int j = 0; j < d; j++) next[i] += products[i * d + j] * x[j];
        }
        moved = 0;
        if (normalize(next, d) == 0) break;
        for (int i = 0; i < d; i++) {
            moved += (next[i] - x[i]) * (next[i] - x[i]);
            x[i] = next[i];
        }
    }
    for (int i = 0; i < d; i++) f[i] = (float)x[i];
}

static void filter_head(const Head *h) {
    Filters *e = h->arg;
    int d = h->c->kv->shape.head_dim, group = context_group(h->c);
    float k[MAX_HEAD_DIM * PAGE], score[PAGE], f[MAX_HEAD_DIM], mean[MAX_HEAD_DIM] = {0};
    for (int q = h->g * group; q < (h->g + 1) * group; q++) {
        first_direction(f, query_part(e->products, e->c, h->layer, q, d * d),
                        query_part(e->sum, e->c, h->layer, q, d), d);
        for (int j = 0; j < d; j++) mean[j] += f[j] / (float)group;
    }
    for (int b = 0; b < head_blocks(h); b++) {
        head_block(h, b, k, NULL);
        memset(score, 0, sizeof score);
        for (int i = 0; i < d * PAGE; i++) score[i % PAGE] += mean[i / PAGE] * k[i];
        head_put(h, b, score);
    }
}

// ---- the method ----

static int method_open(Live *v, char *err) {
    const Config *m = &v->c->state->model->config;
    size_t d = (size_t)m->head_dim, heads = (size_t)m->n_layers * m->n_heads;
    Filters *e = v->own = calloc(1, sizeof *e);
    if (e) {
        e->c = v->c;
        e->sum = calloc(heads * d, sizeof *e->sum);
        e->products = calloc(heads * d * d, sizeof *e->products);
    }
    if (!e || !e->sum || !e->products)
        return fail(err, "out of memory for the directions of %zu query heads", heads);
    v->c->state->tap = watch_queries, v->c->state->tap_arg = e;
    return 0;
}

static int method_score(Live *v, char *err) {
    (void)err;
    live_each_head(v, filter_head, v->own);
    return 0;
}

static void method_close(Live *v) {
    Filters *e = v->own;
    v->c->state->tap = NULL;
    if (!e) return;
    free(e->sum), free(e->products);
    free(e);
    v->own = NULL;
}

const LiveMethod qfilters_method = {
    .open = method_open, .score = method_score, .close = method_close};
