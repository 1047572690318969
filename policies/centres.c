// centres.c: TriAttention (arXiv 2604.04921): where queries gather before their rotation, and what
// that says of the distances at which they look.
//
// Before its rotation a query head's queries lie around a centre. Of each frequency f of the
// rotation, a pair of channels, two numbers are known: the mean query E[q_f] and the mean length
// E|q_f|. A key at distance t is then expected to score, up to a factor,
//
//   sum over f  Re(conj(E[q_f] e^(i w_f t)) k_f)  +  (E|q_f| - |E[q_f]|) |k_f|
//
// the first part averaged over distances 1, 2, 4, .. from the newest token on, the second one for
// what the centre does not say. Scores of a query head get mean 0 and deviation 1; the largest of
// the group counts. Centres are those of the queries seen so far, not of a calibration text.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "util.h"

typedef struct {
    const Context *c;
    float *sum;     // [n_layers][n_heads][head_dim] of the queries
    float *length;  // [n_layers][n_heads][head_dim] of |q_f|, at both channels of f
    long count;     // rows of the first scored layer
    int layer, n_rows;
    float *rope;  // [n_layers][rotary_dim] averaged over the distances
    bool failed;
} Centres;

static float *of_head(float *base, const Centres *e, int layer, int h) {
    const KVShape *shape = &e->c->kv->shape;
    return base + ((size_t)layer * shape->n_heads + h) * shape->head_dim;
}

// out [d] = |x_f| at both channels of each rotated pair, 0 elsewhere.
static void lengths(float *out, const float *x, int d, int rotary) {
    int half = rotary / 2;
    memset(out, 0, (size_t)d * sizeof *out);
    for (int j = 0; j < half; j++)
        out[j] = out[j + half] = sqrtf(x[j] * x[j] + x[j + half] * x[j + half]);
}

static void add_queries(void *ctx, int h) {
    const Centres *e = ctx;
    const RunState *s = e->c->state;
    const Config *m = &s->model->config;
    float q[MAX_HEAD_DIM], length[MAX_HEAD_DIM];
    float *sum = of_head(e->sum, e, e->layer, h), *all = of_head(e->length, e, e->layer, h);
    for (int i = 0; i < e->n_rows; i++) {
        memcpy(q, s->q + ((size_t)i * m->n_heads + h) * m->head_dim,
               (size_t)m->head_dim * sizeof *q);
        model_unrotate(s, e->layer, i, q);
        lengths(length, q, m->head_dim, m->rotary_dim);
        for (int j = 0; j < m->head_dim; j++) sum[j] += q[j], all[j] += length[j];
    }
}

static void watch_centres(void *arg, int layer, int n) {
    Centres *e = arg;
    const KVShape *shape = &e->c->kv->shape;
    if (shape->window[layer] != 0) return;
    if (kvcache_scored_index(shape, layer) == 0) e->count += n;
    e->layer = layer, e->n_rows = n;
    parallel_for(e->c->state->pool, shape->n_heads, add_queries, e);
}

// The rotation averaged over distances 1, 2, 4, .. up to `furthest` from the newest token on.
static void mean_rotation(const Centres *e, int layer, int furthest, float *rope) {
    const Model *m = e->c->state->model;
    float at[MAX_HEAD_DIM];
    int newest = e->c->kv->seqs[e->c->seq].next_pos - 1, n = 0;
    memset(rope, 0, (size_t)m->config.rotary_dim * sizeof *rope);
    for (int t = 1; t <= furthest; t *= 2, n++) {
        model_rope(m, layer, newest + t, at);
        for (int j = 0; j < m->config.rotary_dim; j++) rope[j] += at[j];
    }
    for (int j = 0; j < m->config.rotary_dim; j++) rope[j] /= (float)n;
}

// x [n] gets mean 0 and deviation 1.
static void standardize(float *x, int n) {
    double sum = 0, squares = 0;
    for (int t = 0; t < n; t++) sum += x[t];
    for (int t = 0; t < n; t++) squares += (x[t] - sum / n) * (x[t] - sum / n);
    double deviation = fmax(sqrt(squares / n), 1e-6);
    for (int t = 0; t < n; t++) x[t] = (float)((x[t] - sum / n) / deviation);
}

// x [n] = what query head q, seen at its centre, expects of the pairs.
static void expect_pairs(const Head *h, int q, float *x) {
    const Centres *e = h->arg;
    const Config *m = &e->c->state->model->config;
    int d = m->head_dim;
    float mean[MAX_HEAD_DIM], spread[MAX_HEAD_DIM], k[MAX_HEAD_DIM], length[MAX_HEAD_DIM];
    const float *sum = of_head(e->sum, e, h->layer, q), *all = of_head(e->length, e, h->layer, q);
    float count = (float)(e->count > 0 ? e->count : 1);
    for (int j = 0; j < d; j++) mean[j] = sum[j] / count;
    lengths(spread, mean, d, m->rotary_dim);
    // each length stands at both channels of its pair: half of it counts
    int r = m->rope[h->layer];
    float half = r >= 0 ? 0.5f * m->rope_mscale[r] : 0.5f;
    for (int j = 0; j < d; j++) spread[j] = half * (all[j] / count - spread[j]);
    if (r >= 0) model_rotate(e->c->state->model, mean, e->rope + (size_t)h->layer * m->rotary_dim);
    for (int t = 0; t < h->n; t++) {
        head_pair(h, h->first + t, k, NULL);
        lengths(length, k, d, m->rotary_dim);
        x[t] = 0;
        for (int j = 0; j < d; j++) x[t] += mean[j] * k[j] + spread[j] * length[j];
    }
    standardize(x, h->n);
}

static void centre_head(const Head *h) {
    Centres *e = h->arg;
    int group = context_group(h->c);
    float *x = malloc((size_t)h->n * sizeof *x);
    if (!x) {
        e->failed = true;
        return;
    }
    for (int i = 0; i < group; i++) {
        expect_pairs(h, h->g * group + i, x);
        for (int t = 0; t < h->n; t++) h->score[t] = i == 0 ? x[t] : fmaxf(h->score[t], x[t]);
    }
    free(x);
}

// ---- the method ----

static int method_open(Live *v, char *err) {
    const Config *m = &v->c->state->model->config;
    size_t n = (size_t)m->n_layers * m->n_heads * m->head_dim;
    Centres *e = v->own = calloc(1, sizeof *e);
    if (e) {
        e->c = v->c;
        e->sum = calloc(n, sizeof *e->sum);
        e->length = calloc(n, sizeof *e->length);
        e->rope = malloc(((size_t)m->n_layers * m->rotary_dim + 1) * sizeof *e->rope);
    }
    if (!e || !e->sum || !e->length || !e->rope)
        return fail(err, "out of memory for the centres of %d query heads", m->n_heads);
    v->c->state->tap = watch_centres, v->c->state->tap_arg = e;
    return 0;
}

static int method_score(Live *v, char *err) {
    Centres *e = v->own;
    const Config *m = &v->c->state->model->config;
    for (int l = 0; l < m->n_layers; l++)
        mean_rotation(e, l, (int)context_param(v->c, "furthest"),
                      e->rope + (size_t)l * m->rotary_dim);
    live_each_head(v, centre_head, e);
    return e->failed ? fail(err, "out of memory for the centres of queries") : 0;
}

static void method_close(Live *v) {
    Centres *e = v->own;
    v->c->state->tap = NULL;
    if (!e) return;
    free(e->sum), free(e->length), free(e->rope);
    free(e);
    v->own = NULL;
}

const LiveMethod triattention_method = {
    .open = method_open, .score = method_score, .close = method_close};
