// centres.c: where queries gather before their rotation, and what that says of keys to come.
//
// TriAttention (arXiv 2604.04921). Before its rotation a query head's queries lie around a centre.
// Of each frequency f of the rotation, a pair of channels, two numbers are known: the mean query
// E[q_f] and the mean length E|q_f|. A key at distance t is then expected to score, up to a factor,
//
//   sum over f  Re(conj(E[q_f] e^(i w_f t)) k_f)  +  (E|q_f| - |E[q_f]|) |k_f|
//
// the first part averaged over distances 1, 2, 4, .. from the newest token on, the second one for
// what the centre does not say. Scores of a query head get mean 0 and deviation 1; the largest of
// the group counts. Centres are those of the queries seen so far, not of a calibration text.
//
// CapKV (arXiv 2604.25975). With m the centre after the average rotation of the next 512 positions,
// a pair weighs w_j = e^(5 (cos(k_j, m) - the largest one)); it is worth w_j v_j^T M^-1 v_j, where
// M = I + sum of w v v^T: what its value adds to those that queries will look at as well. The first
// 4 tokens take no part, neither as queries nor as pairs, and stay.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "util.h"

typedef struct {
    const Context *c;
    float *sum;     // [n_layers][n_heads][head_dim] of the queries
    float *length;  // [n_layers][n_heads][head_dim] of |q_f|, at both channels of f
    int from;       // position of the first query that counts
    long count;     // such rows of the first scored layer
    int layer, n_rows;
    float *rope;  // [n_layers][rotary_dim] averaged over the distances
    bool failed;
} Centres;

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
    float *sum = query_part(e->sum, e->c, e->layer, h, m->head_dim);
    float *all = query_part(e->length, e->c, e->layer, h, m->head_dim);
    for (int i = max_int(e->from - s->pos[0], 0); i < e->n_rows; i++) {
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
    int skipped = min_int(max_int(e->from - e->c->state->pos[0], 0), n);
    if (kvcache_scored_index(shape, layer) == 0) e->count += n - skipped;
    e->layer = layer, e->n_rows = n;
    parallel_for(e->c->state->pool, shape->n_heads, add_queries, e);
}

// The rotation averaged over distances 1, 2, 3, .., or doubling 1, 2, 4, .., up to `furthest` from
// the newest token on.
static void mean_rotation(const Centres *e, int layer, int furthest, bool doubling, float *rope) {
    const Model *m = e->c->state->model;
    float at[MAX_HEAD_DIM];
    int newest = e->c->kv->seqs[e->c->seq].next_pos - 1, n = 0;
    memset(rope, 0, (size_t)m->config.rotary_dim * sizeof *rope);
    for (int t = 1; t <= furthest; t = doubling ? 2 * t : t + 1, n++) {
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
    const float *sum = query_part(e->sum, e->c, h->layer, q, d);
    const float *all = query_part(e->length, e->c, h->layer, q, d);
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

// ---- CapKV ----

static int cap_sink(const Head *h) { return (int)context_param(h->c, "sink"); }

// w [n] of all pairs of the list behind the first ones, for query head q.
static void cap_weights(const Head *h, int q, float *w) {
    const Centres *e = h->arg;
    const Config *m = &e->c->state->model->config;
    int d = m->head_dim, n = h->first + h->n;
    float mean[MAX_HEAD_DIM], k[MAX_HEAD_DIM], length = 0, best = -INFINITY;
    float sharp = (float)context_param(h->c, "sharp");
    memcpy(mean, query_part(e->sum, e->c, h->layer, q, d), (size_t)d * sizeof *mean);
    if (m->rope[h->layer] >= 0)
        model_rotate(e->c->state->model, mean, e->rope + (size_t)h->layer * m->rotary_dim);
    for (int j = 0; j < d; j++) length += mean[j] * mean[j];
    for (int t = cap_sink(h); t < n; t++) {
        float dot = 0, norm = 0;
        head_pair(h, t, k, NULL);
        for (int j = 0; j < d; j++) dot += mean[j] * k[j], norm += k[j] * k[j];
        w[t] = sharp * dot / fmaxf(sqrtf(length) * sqrtf(norm), 1e-12f);
        best = fmaxf(best, w[t]);
    }
    for (int t = cap_sink(h); t < n; t++) w[t] = expf(w[t] - best);
}

// Adds to the head's scores what query head q makes of its pairs; w [n], g [d][d] are scratch.
static void cap_pairs(const Head *h, int q, float *w, double *g) {
    int d = h->c->kv->shape.head_dim, n = h->first + h->n;
    float v[MAX_HEAD_DIM];
    cap_weights(h, q, w);
    memset(g, 0, (size_t)d * d * sizeof *g);
    for (int t = cap_sink(h); t < n; t++) {
        head_pair(h, t, NULL, v);
        for (int i = 0; i < d; i++)
            for (int j = 0; j <= i; j++) g[i * d + j] += (w[t] + 1e-6) * v[i] * v[j];
    }
    factorize(g, d, 1);
    for (int t = max_int(cap_sink(h), h->first); t < n; t++) {
        head_pair(h, t, NULL, v);
        h->score[t - h->first] += w[t] * leverage_of(g, v, d) / (float)context_group(h->c);
    }
}

static void cap_head(const Head *h) {
    Centres *e = h->arg;
    int d = h->c->kv->shape.head_dim, n = h->first + h->n, group = context_group(h->c);
    float *w = malloc((size_t)n * sizeof *w);
    double *g = malloc((size_t)d * d * sizeof *g);
    if (!w || !g) e->failed = true;
    for (int t = 0; t < h->n; t++) h->score[t] = 0;
    for (int i = 0; w && g && i < group; i++) cap_pairs(h, h->g * group + i, w, g);
    free(w), free(g);
}

// ---- the methods ----

static int centres_open(Live *v, int from, char *err) {
    const Config *m = &v->c->state->model->config;
    size_t n = (size_t)m->n_layers * m->n_heads * m->head_dim;
    Centres *e = v->own = calloc(1, sizeof *e);
    if (e) {
        e->c = v->c, e->from = from;
        e->sum = calloc(n, sizeof *e->sum);
        e->length = calloc(n, sizeof *e->length);
        e->rope = malloc(((size_t)m->n_layers * m->rotary_dim + 1) * sizeof *e->rope);
    }
    if (!e || !e->sum || !e->length || !e->rope)
        return fail(err, "out of memory for the centres of %d query heads", m->n_heads);
    v->c->state->tap = watch_centres, v->c->state->tap_arg = e;
    return 0;
}

static int tri_open(Live *v, char *err) { return centres_open(v, 0, err); }
static int cap_open(Live *v, char *err) {
    return centres_open(v, (int)context_param(v->c, "sink"), err);
}

static int fill(Live *v, void (*fn)(const Head *h), int furthest, bool doubling, char *err) {
    Centres *e = v->own;
    const Config *m = &v->c->state->model->config;
    for (int l = 0; l < m->n_layers; l++)
        mean_rotation(e, l, furthest, doubling, e->rope + (size_t)l * m->rotary_dim);
    live_each_head(v, fn, e);
    return e->failed ? fail(err, "out of memory for the centres of queries") : 0;
}

static int tri_score(Live *v, char *err) {
    return fill(v, centre_head, (int)context_param(v->c, "furthest"), true, err);
}

static int cap_score(Live *v, char *err) {
    int n = max_int((int)context_param(v->c, "sink") - context_pos(v->c), 0);
    if (fill(v, cap_head, (int)context_param(v->c, "future"), false, err) != 0) return -1;
    if (v->whole && v->n_heads > 0) protect(v->c, v->score[0], 0, min_int(n, v->c->n_ctx));
    for (int h = 0; h < v->n_heads && !v->whole; h++)
        for (int t = 0; t < min_int(n, live_pairs(v, h)); t++) v->score[h][t] = INFINITY;
    return 0;
}

static void centres_close(Live *v) {
    Centres *e = v->own;
    v->c->state->tap = NULL;
    if (!e) return;
    free(e->sum), free(e->length), free(e->rope);
    free(e);
    v->own = NULL;
}

const LiveMethod triattention_method = {
    .open = tri_open, .score = tri_score, .close = centres_close};
const LiveMethod capkv_method = {.open = cap_open, .score = cap_score, .close = centres_close};
