// expected.c: expected attention (arXiv 2510.00636), what later queries will ask, judged by those
// seen.
//
// q before RoPE is taken as normal with mean m and covariance C, its rotation as R, the average
// over the next `future` positions. Then pair j is expected to weigh exp(z_j),
//
//   z_j = s k_j.(R m) + s^2/2 k_j.(R C R^T) k_j,   s = 1/sqrt(head_dim)
//
// (that s also where the model's own scale is another), and to matter by that times |v_j|. The
// first `sink` tokens are outliers: their queries do not count, and they stay.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "util.h"

struct Expected {
    const Context *c;
    int sink;
    int from;  // position of the first query that counts
    // [n_layers][n_heads][d] the first query that counts, taken off all: large means cancel
    float *shift;
    float *sum;         // [n_layers][n_heads][d] of the queries
    float *products;    // [n_layers][n_heads][d][d] sum of their products
    float *mean;        // [n_layers][n_heads][d] s R m
    float *cov;         // [n_layers][n_heads][d][d] s^2/2 R C R^T
    float *rope;        // [n_layers][rotary_dim / 2][2] R
    int layer, n_rows;  // at work: the layer, and rows of a forward call
    bool failed;        // out of memory while scoring
};

// ---- queries that pass ----

float *query_part(float *base, const Context *c, int layer, int h, int size) {
    return base + ((size_t)layer * c->kv->shape.n_heads + h) * size;
}

void add_products(float *products, float *sum, const float *rows, int n, int d) {
    float columns[MAX_HEAD_DIM * PAGE];
    for (int r = 0; r < n; r++)
        for (int j = 0; j < d; j++)
            columns[j * PAGE + r] = rows[r * d + j], sum[j] += rows[r * d + j];
    kern.gemm_f32(&(Gemm){.c = products,
                          .ldc = (size_t)d,
                          .a = columns,
                          .lda = PAGE,
                          .b = rows,
                          .n = d,
                          .inner = n,
                          .cols = d,
                          .add = true});
}

// Adds the rows of one forward call to the sums of query head h.
static void add_queries(void *ctx, int h) {
    const Expected *e = ctx;
    const RunState *s = e->c->state;
    int d = s->model->config.head_dim, n;
    float rows[PAGE * MAX_HEAD_DIM];
    float *shift = query_part(e->shift, e->c, e->layer, h, d);
    float *sum = query_part(e->sum, e->c, e->layer, h, d),
          *products = query_part(e->products, e->c, e->layer, h, d * d);
    for (int i = max_int(e->from - s->pos[0], 0); i < e->n_rows; i += n) {
        n = min_int(e->n_rows - i, PAGE);
        for (int r = 0; r < n; r++) {
            float *q = rows + r * d;
            memcpy(q, s->q + ((size_t)(i + r) * s->model->config.n_heads + h) * d,
                   (size_t)d * sizeof *q);
            model_unrotate(s, e->layer, i + r, q);
            if (s->pos[i + r] == e->from) memcpy(shift, q, (size_t)d * sizeof *q);
            for (int j = 0; j < d; j++) q[j] -= shift[j];
        }
        add_products(products, sum, rows, n, d);
    }
}

void expected_watch(void *expected, int layer, int n) {
    Expected *e = expected;
    const KVShape *shape = &e->c->kv->shape;
    e->layer = layer, e->n_rows = n;
    if (shape->window[layer] == 0) parallel_for(e->c->state->pool, shape->n_heads, add_queries, e);
}

// ---- their moments ----

// m [d][d] = m^T
static void transpose(float *m, int d) {
    for (int i = 0; i < d; i++) {
        for (int j = i + 1; j < d; j++) {
            float swap = m[i * d + j];
            m[i * d + j] = m[j * d + i], m[j * d + i] = swap;
        }
    }
}

// s R m and s^2/2 R C R^T from the sums. C is symmetric, so R from the right and R from the left
// are both a rotation of its rows.
static void finish_moments(void *ctx, int i) {
    const Expected *e = ctx;
    const Model *m = e->c->state->model;
    int d = m->config.head_dim, layer = i / m->config.n_heads, h = i % m->config.n_heads;
    float count = (float)max_int(e->c->kv->seqs[e->c->seq].next_pos - e->from, 1);
    float s = 1.0f / sqrtf((float)d);
    float *mean = query_part(e->mean, e->c, layer, h, d),
          *cov = query_part(e->cov, e->c, layer, h, d * d);
    const float *shift = query_part(e->shift, e->c, layer, h, d),
                *sum = query_part(e->sum, e->c, layer, h, d);
    const float *products = query_part(e->products, e->c, layer, h, d * d);
    const float *rope = e->rope + (size_t)layer * m->config.rotary_dim;
    for (int j = 0; j < d; j++) mean[j] = sum[j] / count;
    for (int j = 0; j < d * d; j++)
        cov[j] = 0.5f * s * s * (products[j] / count - mean[j / d] * mean[j % d]);
    for (int j = 0; j < d; j++) mean[j] = s * (mean[j] + shift[j]);
    model_rotate(m, mean, rope);
    for (int side = 0; side < 2; side++) {
        for (int j = 0; j < d; j++) model_rotate(m, cov + j * d, rope);
        transpose(cov, d);
    }
}

// rope [n_layers][rotary_dim] becomes the average rotation of the positions to come.
static void mean_rotation(const Context *c, int future, float *rope) {
    const Config *m = &c->state->model->config;
    float at[MAX_HEAD_DIM];
    int n = c->kv->seqs[c->seq].next_pos;
    memset(rope, 0, (size_t)m->n_layers * m->rotary_dim * sizeof *rope);
    for (int l = 0, same; l < m->n_layers; l++) {
        for (same = 0; m->rope[same] != m->rope[l];) same++;  // layers share a few rotations
        if (same < l) {
            memcpy(rope + l * m->rotary_dim, rope + same * m->rotary_dim,
                   (size_t)m->rotary_dim * sizeof *rope);
            continue;
        }
        for (int p = 0; p < future; p++) {
            model_rope(c->state->model, l, n + p, at);
            for (int j = 0; j < m->rotary_dim; j++)
                rope[l * m->rotary_dim + j] += at[j] / (float)future;
        }
    }
}

// What the sums say about queries after those seen so far.
static void find_moments(Expected *e) {
    const KVShape *shape = &e->c->kv->shape;
    mean_rotation(e->c, (int)context_param(e->c, "future"), e->rope);
    parallel_for(e->c->state->pool, shape->n_layers * shape->n_heads, finish_moments, e);
}

// ---- scores ----

// |x| of x [d], in sixteen sums at a time.
static float length_of(const float *x, int d) {
    float sum[16] = {0};
    for (int i = 0; i < d; i += 16)
        for (int j = 0; j < min_int(d - i, 16); j++) sum[j] += x[i + j] * x[i + j];
    for (int j = 1; j < 16; j++) sum[0] += sum[j];
    return sqrtf(sum[0]);
}

// z [group][n] and |v| [n] of the 64 pairs from 64 b on.
static void expect_block(const Head *h, int b, float *z, float *v_norm, int n) {
    const Expected *e = h->arg;
    int d = h->c->kv->shape.head_dim, group = context_group(h->c);
    float k[MAX_HEAD_DIM * PAGE], v[PAGE * MAX_HEAD_DIM], ck[MAX_HEAD_DIM * PAGE], dots[PAGE];
    int pairs = head_block(h, b, k, v);
    for (int i = 0; i < group; i++) {
        int q = h->g * group + i;
        const float *mean = query_part(e->mean, e->c, h->layer, q, d);
        kern.gemm_f32(&(Gemm){.c = ck,
                              .ldc = PAGE,
                              .a = query_part(e->cov, e->c, h->layer, q, d * d),
                              .lda = (size_t)d,
                              .b = k,
                              .n = d,
                              .inner = d,
                              .cols = PAGE});
        for (int x = 0; x < d; x++)
            for (int j = 0; j < PAGE; j++) ck[x * PAGE + j] += mean[x];
        dot_columns(dots, ck, k, d);
        memcpy(z + (size_t)i * n + b * PAGE, dots, (size_t)pairs * sizeof *z);
    }
    for (int j = 0; j < pairs; j++) v_norm[b * PAGE + j] = length_of(v + j * d, d);
}

// Turns z [n] into weights, over the pairs from `first` on and the head's sink, -inf: none.
static void softmax_from(float *z, int first, int n, float sink) {
    float max = sink, sum = 0.0f;
    for (int t = first; t < n; t++) max = fmaxf(max, z[t]);
    if (sink > -INFINITY) sum = expf(sink - max);
    for (int t = first; t < n; t++) sum += z[t] = expf(z[t] - max);
    for (int t = first; t < n; t++) z[t] /= sum;
}

// score = (mean weight over the group + epsilon) |v|
static void expect_head(const Head *h) {
    Expected *e = h->arg;
    int n = h->first + h->n, group = context_group(h->c);
    float epsilon = (float)context_param(h->c, "epsilon");
    float *z = malloc(((size_t)n * (group + 1) + 1) * sizeof *z);
    if (!z) {
        e->failed = true;
        return;
    }
    float *v_norm = z + (size_t)n * group;
    for (int b = 0; b < head_blocks(h); b++) expect_block(h, b, z, v_norm, n);
    memset(h->score, 0, (size_t)h->n * sizeof *h->score);
    for (int i = 0; i < group; i++) {
        float sink = kvshape_sink(&h->c->kv->shape, h->layer, h->g * group + i);
        softmax_from(z + (size_t)i * n, e->sink, n, sink);
        for (int t = max_int(e->sink, h->first); t < n; t++)
            h->score[t - h->first] += z[(size_t)i * n + t] / (float)group;
    }
    for (int t = h->first; t < n; t++)
        h->score[t - h->first] = (h->score[t - h->first] + epsilon) * v_norm[t];
    free(z);
}

// The first tokens stay.
static void keep_sink(const Expected *e, Live *v) {
    const Context *c = v->c;
    int n = max_int(e->sink - context_pos(c), 0);
    if (v->whole && v->n_heads > 0) protect(c, v->score[0], 0, min_int(n, c->n_ctx));
    for (int h = 0; h < v->n_heads && !v->whole; h++)
        for (int t = 0; t < min_int(n, live_pairs(v, h)); t++) v->score[h][t] = INFINITY;
}

int expected_fill(Expected *e, Live *v, char *err) {
    find_moments(e);
    live_each_head(v, expect_head, e);
    keep_sink(e, v);
    return e->failed ? fail(err, "out of memory for expected attention") : 0;
}

// ---- the method ----

void expected_close(Expected *e) {
    if (!e) return;
    free(e->shift), free(e->sum), free(e->products), free(e->mean), free(e->cov), free(e->rope);
    free(e);
}

// How many of the first tokens do not count: of a whole context fewer than there are.
static int sink_of(const Live *v) {
    int sink = (int)context_param(v->c, "sink"), n = context_pos(v->c) + v->c->n_ctx;
    return v->whole ? max_int(min_int(sink, n - 1), 0) : sink;
}

Expected *expected_open(const Live *v, char *err) {
    const Config *m = &v->c->state->model->config;
    size_t d = (size_t)m->head_dim, heads = (size_t)m->n_layers * m->n_heads;
    Expected *e = calloc(1, sizeof *e);
    if (e) {
        *e = (Expected){.c = v->c, .sink = sink_of(v)};
        e->from = max_int(e->sink, v->c->kv->seqs[v->c->seq].next_pos);
        e->shift = calloc(heads * d, sizeof *e->shift);
        e->sum = calloc(heads * d, sizeof *e->sum);
        e->mean = malloc(heads * d * sizeof *e->mean);
        e->products = calloc(heads * d * d, sizeof *e->products);
        e->cov = malloc(heads * d * d * sizeof *e->cov);
        e->rope = malloc((size_t)m->n_layers * (m->rotary_dim + 1) * sizeof *e->rope);
        if (e->shift && e->sum && e->mean && e->products && e->cov && e->rope) return e;
    }
    expected_close(e);
    fail(err, "out of memory for the moments of %zu query heads", heads);
    return NULL;
}

static int method_open(Live *v, char *err) {
    if (!(v->own = expected_open(v, err))) return -1;
    v->c->state->tap = expected_watch, v->c->state->tap_arg = v->own;
    return 0;
}

static int method_score(Live *v, char *err) { return expected_fill(v->own, v, err); }

static void method_close(Live *v) {
    v->c->state->tap = NULL;
    expected_close(v->own);
    v->own = NULL;
}

const LiveMethod expected_method = {
    .open = method_open, .score = method_score, .close = method_close};
