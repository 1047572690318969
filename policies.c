// policies.c: how a context is compressed. To try an idea, write one score function and add one
// row.
//
// A method only says how much each pair matters: it fills score [layer][kv head][pair], higher =
// keep. One shared routine turns scores and a ratio into a keep set and evicts (select_pairs,
// kvcache_evict). KVzip (arXiv 2505.23416) asks the model to repeat the context, chunk by chunk,
// with the answer forced, and takes the largest attention weight each pair receives. No question is
// involved, so the result serves any. The others need no second pass: they watch the attention of
// the first one, or look at keys and values. Their formulas are those of NVIDIA's kvpress, whose
// scores the fixtures hold; pairs of the protected prefix take part in every sum and softmax.
#define _POSIX_C_SOURCE 200809L
#include "policies.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

// The requests of the authors' code (snu-mllab/KVzip), byte for byte; the second one ends in a
// space and is followed by the last ids of the chunk before.
static const char ASK_FIRST[] = "\n\nRepeat the previous context exactly.";
static const char ASK_NEXT[] =
    "\n\nRepeat the part of the previous context exactly, starting with ";
enum { TAIL = 8 };

static int report(const Context *c, const char *what, long done, long total, char *err) {
    if (c->progress && c->progress(c->progress_arg, what, done, total) != 0)
        return fail(err, "interrupted");
    return 0;
}

// Feeds ids to a sequence in blocks, wanting no logits.
static int feed(Context *c, int seq, const int *ids, int n, const char *what, long done, long total,
                char *err) {
    Row rows[MAX_ROWS];
    for (int i = 0; i < n;) {
        int m = min_int(min_int(c->state->max_rows, MAX_ROWS), n - i);
        for (int j = 0; j < m; j++) rows[j] = (Row){seq, ids[i + j], false};
        if (forward(c->state, c->kv, rows, m, err) != 0) return -1;
        i += m;
        if (c->after && c->after(c->after_arg, err) != 0) return -1;
        if (report(c, what, done + i, total, err) != 0) return -1;
    }
    return 0;
}

int context_read(Context *c, char *err) {
    double start = now();
    int n = c->n_prefix + c->n_ctx;
    if (feed(c, c->seq, c->ids, n, "read", 0, n, err) != 0) return -1;
    c->prefill_s = now() - start;
    return 0;
}

// The number of the parameter called key [n], or -1.
static int find_param(const Param *params, const char *key, size_t n) {
    for (int i = 0; i < MAX_PARAMS && params[i].name; i++) {
        if (strlen(params[i].name) == n && memcmp(params[i].name, key, n) == 0) return i;
    }
    return -1;
}

// A parameter of the policy, or of the level, by the name it has in the table.
static double param(const Context *c, const char *name) {
    return c->policy_param[find_param(c->policy->params, name, strlen(name))];
}

static double level_param(const Context *c, const char *name) {
    return c->level_param[find_param(c->level->params, name, strlen(name))];
}

// ---- KVzip ----

// What the model is fed while it repeats ids [a, b) of the context: request, turn change, the ids
// themselves.
static int repeat_input(const Context *c, int a, int b, Ids *in) {
    const int *ctx = c->ids + c->n_prefix;
    const char *ask = a == 0 ? ASK_FIRST : ASK_NEXT;
    in->n = 0;
    if (tokenizer_encode(c->tok, ask, strlen(ask), 0, in) != 0) return -1;
    for (int i = a < TAIL ? 0 : a - TAIL; i < a; i++) {
        if (ids_push(in, ctx[i]) != 0) return -1;
    }
    if (tokenizer_encode(c->tok, c->postfix, strlen(c->postfix), TOK_SPECIAL, in) != 0) return -1;
    for (int i = a; i < b; i++) {
        if (ids_push(in, ctx[i]) != 0) return -1;
    }
    return 0;
}

// One repeat pass over a fork of the context, so that it leaves no trace: pairs [a, b) are scored.
static int repeat_chunk(Context *c, KVScoring *s, int a, int b, char *err) {
    Ids in = {0};
    int status = -1;
    if (repeat_input(c, a, b, &in) != 0) {
        fail(err, "out of memory for a repeat pass of %d tokens", b - a);
    } else if ((s->seq = kvcache_fork(c->kv, c->seq, err)) >= 0) {
        s->t0 = c->n_prefix + a, s->t1 = c->n_prefix + b;
        if (kvcache_score_begin(c->kv, s, err) == 0) {
            status = feed(c, s->seq, in.id, in.n, "score", a, c->n_ctx, err);
        }
        kvcache_score_end(c->kv);
        kvcache_drop(c->kv, s->seq);
    }
    ids_free(&in);
    return status;
}

// Reads the context, then repeats it; pair_log as in KVScoring. Scores come out as weights in [0,
// 1] (times |Wo v| / |x| with pair_log).
static int repeat_all(Context *c, float *score, const float *pair_log, char *err) {
    int n = c->n_prefix + c->n_ctx;
    KVScoring s = {.max_rows = c->state->max_rows,
                   .n_prefix = c->n_prefix,
                   .own = n,
                   .subset = true,
                   .local = c->local,
                   .n_ctx = c->n_ctx,
                   .score = score,
                   .pair_log = pair_log};
    for (size_t i = 0; i < context_scores(c); i++) score[i] = -INFINITY;
    for (int a = 0; a < c->n_ctx; a += c->chunk) {
        int b = c->n_ctx - a < c->chunk ? c->n_ctx : a + c->chunk;
        if (repeat_chunk(c, &s, a, b, err) != 0) return -1;
    }
    for (size_t i = 0; i < context_scores(c); i++) score[i] = expf(score[i]);
    return 0;
}

static int score_kvzip(Context *c, float *score, char *err) {
    if (context_read(c, err) != 0) return -1;
    return repeat_all(c, score, NULL, err);
}

typedef struct {
    const Context *c;
    int layer;
    const float *gram;  // [n_heads][head_dim][head_dim] Wo_h^T Wo_h
    float *out;         // [n_heads][n_ctx]
} ValueLogs;

// ln |Wo_h v_t| of the context's pairs, for query head h.
static void value_logs(void *ctx, int h) {
    const ValueLogs *w = ctx;
    const Config *m = &w->c->state->model->config;
    int d = m->head_dim, g = h / (m->n_heads / m->n_kv_heads);
    const float *gram = w->gram + (size_t)h * d * d;
    float v[MAX_HEAD_DIM], gv[MAX_HEAD_DIM];
    for (int t = 0; t < w->c->n_ctx; t++) {
        kvcache_pair(w->c->kv, w->c->seq, w->layer, g, w->c->n_prefix + t, NULL, v);
        kern.gemm_f32(gv, (size_t)d, v, (size_t)d, gram, 1, d, d, false);
        double sum = 0.0;
        for (int i = 0; i < d; i++) sum += (double)gv[i] * v[i];
        w->out[(size_t)h * w->c->n_ctx + t] = 0.5f * (float)log(fmax(sum, 1e-30));
    }
}

// KVzip+ (from arXiv 2601.07891, code in kvpress): each weight times |Wo_h v_j| / |x_t|.
static int score_kvzip_plus(Context *c, float *score, char *err) {
    if (context_read(c, err) != 0) return -1;
    const Config *m = &c->state->model->config;
    int *layers = malloc((size_t)m->n_layers * sizeof *layers);
    float *gram = malloc((size_t)m->n_heads * m->head_dim * m->head_dim * sizeof *gram);
    float *pair_log =
        malloc((size_t)m->n_layers * m->n_heads * (size_t)(c->n_ctx + 1) * sizeof *pair_log);
    int status = -1;
    if (!layers || !gram || !pair_log) {
        fail(err, "out of memory for the norms of %d values", c->n_ctx);
    } else {
        int n = kvcache_scored_layers(&c->kv->shape, layers);
        for (int s = 0; s < n; s++) {
            model_wo_gram(c->state->model, c->state->pool, layers[s], gram);
            ValueLogs w = {c, layers[s], gram, pair_log + (size_t)s * m->n_heads * c->n_ctx};
            parallel_for(c->state->pool, m->n_heads, value_logs, &w);
        }
        status = repeat_all(c, score, pair_log, err);
    }
    free(layers);
    free(gram);
    free(pair_log);
    return status;
}

// ---- the attention of the first pass ----

static int group_of(const Context *c) { return c->kv->shape.n_heads / c->kv->shape.n_kv_heads; }

// Reads the context; the last `rows` of its tokens are watched: score becomes the sum of the
// weights that each pair receives from them, over all query heads of the group.
static int read_watched(Context *c, int rows, float *score, char *err) {
    double start = now();
    int n = c->n_prefix + c->n_ctx, from = n - rows;
    KVScoring s = {.seq = c->seq,
                   .max_rows = c->state->max_rows,
                   .n_prefix = c->n_prefix,
                   .t0 = c->n_prefix,
                   .t1 = n,
                   .sum = true,
                   .n_ctx = c->n_ctx,
                   .score = score};
    memset(score, 0, context_scores(c) * sizeof *score);
    if (feed(c, c->seq, c->ids, from, "read", 0, n, err) != 0) return -1;
    if (kvcache_score_begin(c->kv, &s, err) != 0) return -1;
    int status = feed(c, c->seq, c->ids + from, rows, "read", from, n, err);
    kvcache_score_end(c->kv);
    c->prefill_s = now() - start;
    return status;
}

// Pairs [from, to) of the context must stay: they get 1 more than the best other score of their
// layer. (Not the best itself: with equals the earlier pair wins.)
static void protect(const Context *c, float *score, int from, int to) {
    int n_kv_heads = c->kv->shape.n_kv_heads, n_layers = kvcache_scored_layers(&c->kv->shape, NULL);
    for (int l = 0; l < n_layers; l++, score += (size_t)n_kv_heads * c->n_ctx) {
        float best = -INFINITY;
        for (int i = 0; i < n_kv_heads * c->n_ctx; i++) {
            if (i % c->n_ctx < from || i % c->n_ctx >= to) best = fmaxf(best, score[i]);
        }
        for (int g = 0; g < n_kv_heads; g++) {
            for (int t = from; t < to; t++)
                score[g * c->n_ctx + t] = best > -INFINITY ? best + 1.0f : 1.0f;
        }
    }
}

// Mean over the last tokens, smoothed along the context; what lies beyond its ends counts as 0.
static int score_snapkv(Context *c, float *score, char *err) {
    int rows = min_int((int)param(c, "window"), c->n_ctx), kernel = (int)param(c, "kernel");
    int n = c->n_ctx - rows;
    float scale = 1.0f / ((float)rows * (float)group_of(c) * (float)kernel);
    float *raw = malloc((size_t)(n + 1) * sizeof *raw);
    if (!raw) return fail(err, "out of memory for smoothing %d scores", n);
    int status = read_watched(c, rows, score, err);
    for (size_t i = 0; status == 0 && i < context_scores(c); i += (size_t)c->n_ctx) {
        memcpy(raw, score + i, (size_t)n * sizeof *raw);
        for (int t = 0; t < n; t++) {
            int lo = max_int(t - kernel / 2, 0), hi = min_int(t - kernel / 2 + kernel, n);
            float sum = 0.0f;
            for (int j = lo; j < hi; j++) sum += raw[j];
            score[i + (size_t)t] = sum * scale;
        }
    }
    free(raw);
    if (status == 0) protect(c, score, n, c->n_ctx);
    return status;
}

// The last token's weights, mean over all heads of the layer: one set of tokens for all of them.
static int score_tova(Context *c, float *score, char *err) {
    int rows = min_int(1, c->n_ctx), n_kv_heads = c->kv->shape.n_kv_heads;
    if (read_watched(c, rows, score, err) != 0) return -1;
    size_t n = (size_t)c->n_ctx, layer = n * (size_t)n_kv_heads;
    for (size_t at = 0; at < context_scores(c); at += layer) {
        for (size_t t = 0; t < n; t++) {
            float sum = 0.0f;
            for (int g = 0; g < n_kv_heads; g++) sum += score[at + (size_t)g * n + t];
            sum /= (float)c->kv->shape.n_heads;
            for (int g = 0; g < n_kv_heads; g++) score[at + (size_t)g * n + t] = sum;
        }
    }
    protect(c, score, c->n_ctx - rows, c->n_ctx);
    return 0;
}

// H2O for a prompt: all weights a pair receives, over the number of tokens that could see it, since
// the plain sum favours old pairs.
static int score_observed(Context *c, float *score, char *err) {
    int window = min_int((int)param(c, "window"), c->n_ctx);
    if (read_watched(c, c->n_prefix + c->n_ctx, score, err) != 0) return -1;
    for (size_t i = 0; i < context_scores(c); i++) {
        score[i] /= (float)(group_of(c) * (c->n_ctx - (int)(i % (size_t)c->n_ctx)));
    }
    protect(c, score, c->n_ctx - window, c->n_ctx);
    return 0;
}

// ---- positions, norms and geometry ----

typedef struct {
    const Context *c;
    float *score;  // [scored layers][n_kv_heads][n_ctx]
    HeadScore *fn;
    void *arg;
} Heads;

static void call_head(void *ctx, int i) {
    const Heads *h = ctx;
    const KVShape *shape = &h->c->kv->shape;
    Head head = {h->c,
                 kvcache_scored_layer(shape, i / shape->n_kv_heads),
                 i % shape->n_kv_heads,
                 h->c->n_prefix,
                 h->c->n_ctx,
                 h->score + (size_t)i * h->c->n_ctx,
                 h->arg};
    h->fn(&head);
}

static int n_scored_heads(const KVShape *shape) {
    return kvcache_scored_layers(shape, NULL) * shape->n_kv_heads;
}

// Reads the context, then lets fn fill in one head at a time.
static int score_heads(Context *c, float *score, HeadScore *fn, char *err) {
    if (context_read(c, err) != 0) return -1;
    parallel_for(c->state->pool, n_scored_heads(&c->kv->shape), call_head,
                 &(Heads){c, score, fn, NULL});
    return 0;
}

static void call_live(void *ctx, int i) {
    const Live *v = ctx;
    const KVShape *shape = &v->c->kv->shape;
    int layer = kvcache_scored_layer(shape, i / shape->n_kv_heads), g = i % shape->n_kv_heads;
    int n = kvcache_head(v->c->kv, v->c->seq, layer, g)->len;
    Head head = {v->c, layer, g, 0, n, v->score[i], v->own};
    v->c->policy->live->fn(&head);
}

static int live_heads(Live *v, char *err) {
    (void)err;
    parallel_for(v->c->state->pool, v->n_heads, call_live, v);
    return 0;
}

static int n_blocks(const Head *h) { return (h->first + h->n + PAGE - 1) / PAGE; }

// Scores of those of the head's pairs that are among the 64 from 64 b on.
static void put_block(const Head *h, int b, const float *x) {
    int first = h->first - b * PAGE, end = min_int(first + h->n, PAGE);
    for (int j = max_int(first, 0); j < end; j++) h->score[j - first] = x[j];
}

// out[j] = sum over i of x[i][j] y[i][j]
static void dot_columns(float *out, const float *x, const float *y, int d) {
    for (int j = 0; j < PAGE; j++) out[j] = 0.0f;
    for (int i = 0; i < d; i++, x += PAGE, y += PAGE)
        for (int j = 0; j < PAGE; j++) out[j] += x[j] * y[j];
}

static void knorm_head(const Head *h) {
    float k[MAX_HEAD_DIM * PAGE], norm[PAGE];
    for (int b = 0; b < n_blocks(h); b++) {
        kvcache_block(h->c->kv, h->c->seq, h->layer, h->g, b, k, NULL);
        dot_columns(norm, k, k, h->c->kv->shape.head_dim);
        for (int j = 0; j < PAGE; j++) norm[j] = -sqrtf(norm[j]);
        put_block(h, b, norm);
    }
}

static int score_knorm(Context *c, float *score, char *err) {
    return score_heads(c, score, knorm_head, err);
}

// The keys of a block over their norms; columns after the last pair are zero.
static void unit_keys(const Head *h, int b, float *k) {
    float norm[PAGE];
    int d = h->c->kv->shape.head_dim,
        n = kvcache_block(h->c->kv, h->c->seq, h->layer, h->g, b, k, NULL);
    dot_columns(norm, k, k, d);
    for (int j = 0; j < PAGE; j++) norm[j] = j < n ? 1.0f / fmaxf(sqrtf(norm[j]), 1e-12f) : 0.0f;
    for (int i = 0; i < d * PAGE; i++) k[i] *= norm[i % PAGE];
}

// Keys that point away from the mean direction stay: minus the cosine of the angle between the two.
static void keydiff_head(const Head *h) {
    float k[MAX_HEAD_DIM * PAGE], mean[MAX_HEAD_DIM] = {0}, cosine[PAGE], length = 0.0f;
    int d = h->c->kv->shape.head_dim;
    for (int b = 0; b < n_blocks(h); b++) {
        unit_keys(h, b, k);
        for (int i = 0; i < d * PAGE; i++) mean[i / PAGE] += k[i];
    }
    for (int i = 0; i < d; i++) length += mean[i] * mean[i];
    length = fmaxf(sqrtf(length), 1e-12f);
    for (int b = 0; b < n_blocks(h); b++) {
        unit_keys(h, b, k);
        memset(cosine, 0, sizeof cosine);
        for (int i = 0; i < d * PAGE; i++) cosine[i % PAGE] -= k[i] * (mean[i / PAGE] / length);
        put_block(h, b, cosine);
    }
}

static int score_keydiff(Context *c, float *score, char *err) {
    return score_heads(c, score, keydiff_head, err);
}

// The newest pairs stay, and the very first, where the model looks when nothing else fits.
static void streaming_head(const Head *h) {
    int sink = (int)param(h->c, "sink");
    for (int i = 0; i < h->n; i++) {
        int t = h->first + i;
        h->score[i] = (float)(t < sink ? h->first + h->n : t);
    }
}

static int score_streaming(Context *c, float *score, char *err) {
    return score_heads(c, score, streaming_head, err);
}

// Of a counter, so that neither threads nor other heads change a head's numbers.
static uint64_t mix(uint64_t x) { return random_next(&x); }

static void random_head(const Head *h) {
    uint64_t seed =
        mix(mix(mix((uint64_t)param(h->c, "seed")) + (uint64_t)h->layer) + (uint64_t)h->g);
    for (int i = 0; i < h->n; i++) {
        int pos = kvcache_pair(h->c->kv, h->c->seq, h->layer, h->g, h->first + i, NULL, NULL);
        h->score[i] = (float)(mix(seed + (uint64_t)(pos - h->c->n_prefix)) >> 40) * 0x1p-24f;
    }
}

static int score_random(Context *c, float *score, char *err) {
    return score_heads(c, score, random_head, err);
}

// ---- expected attention ----

// What later queries will ask, judged by those seen: q before RoPE is taken as normal with mean m
// and covariance C, its rotation as R, the average over the next `future` positions. Then pair j is
// expected to weigh exp(z_j), z_j = s k_j.(R m) + s^2/2 k_j.(R C R^T) k_j, s = 1/sqrt(head_dim)
// (arXiv 2510.00636; that s also where the model's own scale is another). The first `sink` tokens
// are outliers: their queries do not count, and they stay.
typedef struct {
    const Context *c;
    int sink;
    float *shift;  // [n_layers][n_heads][d] the first query that counts, taken off all: large means
                   // cancel
    float *sum;    // [n_layers][n_heads][d] of the queries
    float *products;    // [n_layers][n_heads][d][d] sum of their products
    float *mean;        // [n_layers][n_heads][d] s R m
    float *cov;         // [n_layers][n_heads][d][d] s^2/2 R C R^T
    float *rope;        // [n_layers][rotary_dim / 2][2] R
    int layer, n_rows;  // at work: the layer, and rows of a forward call
    bool failed;        // out of memory while scoring
} Expected;

static float *of_head(float *base, const Expected *e, int layer, int h, int size) {
    return base + ((size_t)layer * e->c->kv->shape.n_heads + h) * size;
}

// Adds the rows of one forward call to the sums of query head h.
static void add_queries(void *ctx, int h) {
    const Expected *e = ctx;
    const RunState *s = e->c->state;
    int d = s->model->config.head_dim, n;
    float rows[PAGE * MAX_HEAD_DIM], columns[MAX_HEAD_DIM * PAGE];
    float *shift = of_head(e->shift, e, e->layer, h, d);
    float *sum = of_head(e->sum, e, e->layer, h, d),
          *products = of_head(e->products, e, e->layer, h, d * d);
    for (int i = max_int(e->sink - s->pos[0], 0); i < e->n_rows; i += n) {
        n = min_int(e->n_rows - i, PAGE);
        for (int r = 0; r < n; r++) {
            float *q = rows + r * d;
            memcpy(q, s->q + ((size_t)(i + r) * s->model->config.n_heads + h) * d,
                   (size_t)d * sizeof *q);
            model_unrotate(s, e->layer, i + r, q);
            if (s->pos[i + r] == e->sink) memcpy(shift, q, (size_t)d * sizeof *q);
            for (int j = 0; j < d; j++) columns[j * PAGE + r] = q[j] -= shift[j], sum[j] += q[j];
        }
        kern.gemm_f32(products, (size_t)d, columns, PAGE, rows, d, n, d, true);
    }
}

static void tap_queries(void *arg, int layer, int n) {
    Expected *e = arg;
    const KVShape *shape = &e->c->kv->shape;
    e->layer = layer, e->n_rows = n;
    if (shape->window[layer] == 0) parallel_for(e->c->state->pool, shape->n_heads, add_queries, e);
}

// s R m and s^2/2 R C R^T from the sums. C is symmetric, so R from the right and R from the left
// are both a rotation of its rows.
static void finish_moments(void *ctx, int i) {
    const Expected *e = ctx;
    const Model *m = e->c->state->model;
    int d = m->config.head_dim, layer = i / m->config.n_heads, h = i % m->config.n_heads;
    float count = (float)max_int(e->c->kv->seqs[e->c->seq].next_pos - e->sink, 1);
    float s = 1.0f / sqrtf((float)d);
    float *mean = of_head(e->mean, e, layer, h, d), *cov = of_head(e->cov, e, layer, h, d * d);
    const float *shift = of_head(e->shift, e, layer, h, d), *sum = of_head(e->sum, e, layer, h, d);
    const float *products = of_head(e->products, e, layer, h, d * d);
    const float *rope = e->rope + (size_t)layer * m->config.rotary_dim;
    for (int j = 0; j < d; j++) mean[j] = sum[j] / count;
    for (int j = 0; j < d * d; j++)
        cov[j] = 0.5f * s * s * (products[j] / count - mean[j / d] * mean[j % d]);
    for (int j = 0; j < d; j++) mean[j] = s * (mean[j] + shift[j]);
    model_rotate(m, mean, rope);
    for (int side = 0; side < 2; side++) {
        for (int j = 0; j < d; j++) model_rotate(m, cov + j * d, rope);
        for (int j = 0; j < d * d; j++) {
            int t = j % d * d + j / d;
            if (t > j) {
                float swap = cov[j];
                cov[j] = cov[t], cov[t] = swap;
            }
        }
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
    Expected *e = h->arg;
    const KVCache *kv = h->c->kv;
    int d = kv->shape.head_dim, group = group_of(h->c);
    float k[MAX_HEAD_DIM * PAGE], v[PAGE * MAX_HEAD_DIM], ck[MAX_HEAD_DIM * PAGE], dots[PAGE];
    int pairs = kvcache_block(kv, h->c->seq, h->layer, h->g, b, k, v);
    for (int i = 0; i < group; i++) {
        int q = h->g * group + i;
        const float *mean = of_head(e->mean, e, h->layer, q, d);
        kern.gemm_f32(ck, PAGE, of_head(e->cov, e, h->layer, q, d * d), (size_t)d, k, d, d, PAGE,
                      false);
        for (int x = 0; x < d; x++)
            for (int j = 0; j < PAGE; j++) ck[x * PAGE + j] += mean[x];
        dot_columns(dots, ck, k, d);
        memcpy(z + (size_t)i * n + b * PAGE, dots, (size_t)pairs * sizeof *z);
    }
    for (int j = 0; j < pairs; j++) v_norm[b * PAGE + j] = length_of(v + j * d, d);
}

// Turns z [n] into weights, over the pairs from sink on.
static void softmax_from(float *z, int sink, int n) {
    float max = -INFINITY, sum = 0.0f;
    for (int t = sink; t < n; t++) max = fmaxf(max, z[t]);
    for (int t = sink; t < n; t++) sum += z[t] = expf(z[t] - max);
    for (int t = sink; t < n; t++) z[t] /= sum;
}

// score = (mean weight over the group + epsilon) |v|
static void expect_head(const Head *h) {
    Expected *e = h->arg;
    int n = h->first + h->n, group = group_of(h->c);
    float epsilon = (float)param(h->c, "epsilon");
    float *z = malloc(((size_t)n * (group + 1) + 1) * sizeof *z), *v_norm = z + (size_t)n * group;
    if (!z) {
        e->failed = true;
        return;
    }
    for (int b = 0; b < n_blocks(h); b++) expect_block(h, b, z, v_norm, n);
    memset(h->score, 0, (size_t)h->n * sizeof *h->score);
    for (int i = 0; i < group; i++) {
        softmax_from(z + (size_t)i * n, e->sink, n);
        for (int t = max_int(e->sink, h->first); t < n; t++)
            h->score[t - h->first] += z[(size_t)i * n + t] / (float)group;
    }
    for (int t = h->first; t < n; t++)
        h->score[t - h->first] = (h->score[t - h->first] + epsilon) * v_norm[t];
    free(z);
}

static void expected_close(Expected *e) {
    free(e->shift), free(e->sum), free(e->products), free(e->mean), free(e->cov), free(e->rope);
    *e = (Expected){0};
}

static int expected_open(Expected *e, const Context *c, int sink, char *err) {
    const Config *m = &c->state->model->config;
    size_t d = (size_t)m->head_dim, heads = (size_t)m->n_layers * m->n_heads;
    *e = (Expected){.c = c, .sink = sink};
    e->shift = calloc(heads * d, sizeof *e->shift);
    e->sum = calloc(heads * d, sizeof *e->sum), e->mean = malloc(heads * d * sizeof *e->mean);
    e->products = calloc(heads * d * d, sizeof *e->products);
    e->cov = malloc(heads * d * d * sizeof *e->cov);
    e->rope = malloc((size_t)m->n_layers * (m->rotary_dim + 1) * sizeof *e->rope);
    if (e->shift && e->sum && e->mean && e->products && e->cov && e->rope) return 0;
    expected_close(e);
    return fail(err, "out of memory for the moments of %zu query heads", heads);
}

static int live_expected_open(Live *v, char *err) {
    Expected *e = v->own = calloc(1, sizeof *e);
    if (!e) return fail(err, "out of memory for expected attention");
    if (expected_open(e, v->c, (int)param(v->c, "sink"), err) != 0) return -1;
    v->c->state->tap = tap_queries, v->c->state->tap_arg = e;
    return 0;
}

static void live_expected_close(Live *v) {
    if (v->own) expected_close(v->own);
    free(v->own);
    v->c->state->tap = NULL;
}

// What the sums say about queries after those seen so far.
static void expected_moments(Expected *e) {
    const KVShape *shape = &e->c->kv->shape;
    mean_rotation(e->c, (int)param(e->c, "future"), e->rope);
    parallel_for(e->c->state->pool, shape->n_layers * shape->n_heads, finish_moments, e);
}

static int live_expectation(Live *v, Expected *e, char *err) {
    expected_moments(e);
    live_heads(v, err);
    for (int h = 0; h < v->n_heads; h++)  // the first tokens stay
        for (int t = 0; t < e->sink; t++) v->score[h][t] = INFINITY;
    return e->failed ? fail(err, "out of memory for expected attention") : 0;
}

static int live_expected(Live *v, char *err) { return live_expectation(v, v->own, err); }

// Scores of a context that has been read while tap_queries looked on.
static int expected_scores(Expected *e, Context *c, float *score, char *err) {
    expected_moments(e);
    parallel_for(c->state->pool, n_scored_heads(&c->kv->shape), call_head,
                 &(Heads){c, score, expect_head, e});
    protect(c, score, 0, max_int(min_int(e->sink - c->n_prefix, c->n_ctx), 0));
    return e->failed ? fail(err, "out of memory for the scores of %d pairs", c->n_ctx) : 0;
}

// The first tokens that do not count, fewer than there are.
static int expected_sink(const Context *c) {
    return max_int(min_int((int)param(c, "sink"), c->n_prefix + c->n_ctx - 1), 0);
}

static int score_expected(Context *c, float *score, char *err) {
    Expected e;
    if (expected_open(&e, c, expected_sink(c), err) != 0) return -1;
    c->state->tap = tap_queries, c->state->tap_arg = &e;
    int status = context_read(c, err);
    c->state->tap = NULL;
    if (status == 0) status = expected_scores(&e, c, score, err);
    expected_close(&e);
    return status;
}

// ---- what the model's profile says ----

static int need_profile(const Context *c, const char *what, char *err) {
    if (c->profile) return 0;
    return fail(err, "%s needs the model's profile: `run calibrate` makes one", what);
}

// The largest score that calibrating saw in the pair's head: KVzip's head level without a repeat
// pass.
static int score_heads_profile(Context *c, float *score, char *err) {
    if (need_profile(c, "policy heads", err) != 0 || context_read(c, err) != 0) return -1;
    for (size_t i = 0; i < context_scores(c); i++)
        score[i] = c->profile->head_max[i / (size_t)c->n_ctx];
    return 0;
}

// Probes, and expected attention beside them where parameter `expected` wants it.
typedef struct {
    Expected expected;  // first, so that a Zap can stand for one
    Probes probes;
    bool mixed;
    float *score;  // [scored layers][n_kv_heads][n_ctx] of a whole context
    Live *live;    // or what grows
} Zap;

static void tap_probes(void *arg, int layer, int n) {
    Zap *z = arg;
    const Context *c = z->expected.c;
    const RunState *s = c->state;
    const KVShape *shape = &c->kv->shape;
    if (shape->window[layer] != 0) return;
    if (z->mixed) tap_queries(&z->expected, layer, n);
    int scored = kvcache_scored_index(shape, layer);
    probes_apply(&z->probes, c->state, layer, scored, n);
    for (int g = 0; g < shape->n_kv_heads; g++) {
        int h = scored * shape->n_kv_heads + g, from = 0;
        float *score = z->live ? z->live->noted[h] + kvcache_head(c->kv, c->seq, layer, g)->len
                               : z->score + (size_t)h * c->n_ctx - c->n_prefix + s->pos[0];
        if (!z->live) from = max_int(c->n_prefix - s->pos[0], 0);
        for (int i = from; i < n; i++) score[i] = z->probes.y[(size_t)i * z->probes.cols + g];
    }
}

static int zap_open(Zap *z, Context *c, int sink, char *err) {
    *z = (Zap){.expected = {.c = c}};
    z->mixed = param(c, "expected") > 0;
    if (need_profile(c, "policy kvzap", err) != 0 ||
        (z->mixed && expected_open(&z->expected, c, sink, err) != 0) ||
        probes_open(&z->probes, c->profile, c->state, err) != 0)
        return -1;
    c->state->tap = tap_probes, c->state->tap_arg = z;
    return 0;
}

static void zap_close(Zap *z) {
    if (z->expected.c) z->expected.c->state->tap = NULL;
    expected_close(&z->expected);
    probes_close(&z->probes);
}

typedef struct {
    float score;
    int t;
} Ranked;

static int by_score(const void *a, const void *b) {
    const Ranked *x = a, *y = b;
    return x->score != y->score ? (x->score < y->score ? -1 : 1) : y->t - x->t;
}

// out[t] += weight times the rank of score[t] among n, the largest n - 1. Returns false: no memory.
static bool add_ranks(float *out, const float *score, int n, float weight) {
    Ranked *r = malloc(((size_t)n + 1) * sizeof *r);
    for (int t = 0; r && t < n; t++) r[t] = (Ranked){score[t], t};
    if (r) qsort(r, (size_t)n, sizeof *r, by_score);
    for (int i = 0; r && i < n; i++) out[r[i].t] += weight * (float)i;
    free(r);
    return r != NULL;
}

// Of one head: both kinds of scores become the sum of their ranks, in `expected`.
static int mix_ranks(const Context *c, float *expected, const float *probe, int n, char *err) {
    float *sum = calloc((size_t)n + 1, sizeof *sum);
    bool ok = sum && add_ranks(sum, probe, n, 1.0f) &&
              add_ranks(sum, expected, n, (float)param(c, "expected"));
    if (ok) memcpy(expected, sum, (size_t)n * sizeof *sum);
    free(sum);
    return ok ? 0 : fail(err, "out of memory for ranking %d pairs", n);
}

static int mix_context(Zap *z, Context *c, float *score, char *err) {
    size_t n = context_scores(c);
    float *expected = malloc((n + 1) * sizeof *expected);
    int status = expected ? expected_scores(&z->expected, c, expected, err)
                          : fail(err, "out of memory for the scores of %d pairs", c->n_ctx);
    for (size_t i = 0; i < n && status == 0; i += (size_t)c->n_ctx)
        status = mix_ranks(c, expected + i, score + i, c->n_ctx, err);
    if (status == 0) memcpy(score, expected, n * sizeof *score);
    free(expected);
    return status;
}

// KVzap with linear probes (arXiv 2601.07891): the log of KVzip's score, as each pair's features
// predict it while the context is read.
static int score_kvzap(Context *c, float *score, char *err) {
    Zap z;
    int status = zap_open(&z, c, expected_sink(c), err);
    z.score = score;
    if (status == 0) status = context_read(c, err);
    if (status == 0 && z.mixed) status = mix_context(&z, c, score, err);
    zap_close(&z);
    return status;
}

static int live_zap_open(Live *v, char *err) {
    Zap *z = v->own = calloc(1, sizeof *z);
    if (!z) return fail(err, "out of memory for the probes");
    int status = zap_open(z, v->c, (int)param(v->c, "sink"), err);
    z->live = v;
    return status;
}

static void live_zap_close(Live *v) {
    if (v->own) zap_close(v->own);
    free(v->own);
}

static int live_zap(Live *v, char *err) {
    Zap *z = v->own;
    if (z->mixed && live_expectation(v, &z->expected, err) != 0) return -1;
    for (int h = 0; h < v->n_heads; h++) {
        int first = v->c->n_prefix, n = kvcache_scored_head(v->c->kv, v->c->seq, h)->len - first;
        float *score = v->score[h] + first, *noted = v->noted[h] + first;
        if (n <= 0) continue;
        if (!z->mixed) memcpy(score, noted, (size_t)n * sizeof *score);
        if (z->mixed && mix_ranks(v->c, score, noted, n, err) != 0) return -1;
    }
    return 0;
}

// ---- budgets ----

// As many pairs in each head as KVzip kept there in other texts.
static int budget_profile(const Context *c, double ratio, int *budget, char *err) {
    if (need_profile(c, "level profile", err) != 0) return -1;
    return profile_budget(c->profile, ratio, c->n_ctx, budget, err);
}

// PyramidKV (arXiv 2406.02069): lower layers keep more. A line over the layers from max down to
// min, whose mean is an equal budget and min a beta-th of that, if it fits between SnapKV's window
// and the context.
static int budget_pyramid(const Context *c, double ratio, int *budget, char *err) {
    (void)err;
    int n_layers = kvcache_scored_layers(&c->kv->shape, NULL), n_kv_heads = c->kv->shape.n_kv_heads;
    double n = c->n_ctx, equal = n * ratio, window = level_param(c, "window");
    double min = equal / level_param(c, "beta"), max = 2 * equal - min;
    if (max >= n - window) max = n - window, min = 2 * equal - max;
    if (!(n >= max && max >= min && min >= window) || n_layers == 1) min = max = equal;
    for (int i = 0; i < n_layers * n_kv_heads; i++) {
        budget[i] =
            (int)rint(max - i / n_kv_heads * (max - min) / (n_layers > 1 ? n_layers - 1 : 1));
    }
    return 0;
}

// ---- the tables ----

static const LiveMethod live_kvzap = {live_zap_open, live_zap, live_zap_close, expect_head};
static const LiveMethod live_expecting = {live_expected_open, live_expected, live_expected_close,
                                          expect_head};
static const LiveMethod live_knorm = {NULL, live_heads, NULL, knorm_head};
static const LiveMethod live_keydiff = {NULL, live_heads, NULL, keydiff_head};
static const LiveMethod live_streaming = {NULL, live_heads, NULL, streaming_head};
static const LiveMethod live_random = {NULL, live_heads, NULL, random_head};

#define EXPECTED_PARAMS                                                                          \
    {"future", 512, 1, 1e6, false, "positions to come that queries are expected at"},            \
        {"sink", 4, 0, 1e6, false, "first tokens: they stay, and their queries do not count"}, { \
        "epsilon", 0, 0, 1, true, "added to the attention before it is multiplied by |v|"        \
    }

const Policy policies[] = {
    {"kvzip",
     score_kvzip,
     NULL,
     "largest attention while the context is repeated (arXiv 2505.23416)",
     {{0}}},
    {"kvzip+",
     score_kvzip_plus,
     NULL,
     "the same times |Wo v| / |x|, its share of the output (arXiv 2601.07891)",
     {{0}}},
    {"kvzap",
     score_kvzap,
     &live_kvzap,
     "KVzip's score as a probe of the profile predicts it (arXiv 2601.07891)",
     {{"expected", 0, 0, 1e3, true,
       "weight of expected attention's rank beside the probe's; 0: none"},
      EXPECTED_PARAMS}},
    {"heads",
     score_heads_profile,
     NULL,
     "the largest score of the pair's head in the profile; for level head",
     {{0}}},
    {"expected",
     score_expected,
     &live_expecting,
     "attention that later queries will likely pay, times |v| (arXiv 2510.00636)",
     {EXPECTED_PARAMS}},
    {"observed",
     score_observed,
     NULL,
     "mean attention from all tokens that follow (H2O, arXiv 2306.14048)",
     {{"window", 0, 0, 1e6, false, "last tokens, which stay"}}},
    {"snapkv",
     score_snapkv,
     NULL,
     "mean attention from the last tokens, smoothed (arXiv 2404.14469)",
     {{"window", 64, 1, 1e6, false, "last tokens: they are asked, and stay"},
      {"kernel", 5, 1, 1e6, false, "width of the smoothing"}}},
    {"tova",
     score_tova,
     NULL,
     "attention from the last token, one set for all heads of a layer (arXiv 2401.06104)",
     {{0}}},
    {"keydiff",
     score_keydiff,
     &live_keydiff,
     "keys that point away from their mean (arXiv 2504.15364)",
     {{0}}},
    {"knorm", score_knorm, &live_knorm, "keys with a small norm (arXiv 2406.11430)", {{0}}},
    {"streaming",
     score_streaming,
     &live_streaming,
     "the newest pairs and the very first (arXiv 2309.17453)",
     {{"sink", 4, 0, 1e6, false, "first tokens, which stay"}}},
    {"random",
     score_random,
     &live_random,
     "any pairs: what every method must beat",
     {{"seed", 1, 0, 1e9, false, "of the numbers"}}},
    {NULL, NULL, NULL, NULL, {{0}}},
};

#define SAFEGUARD \
    { "safeguard", 0, 0, 1, true, "share of an equal budget that is sure for every head" }
const Level levels[] = {
    {"pair", LEVEL_PAIR, NULL, "the best pairs of all heads", {SAFEGUARD}},
    {"layer",
     LEVEL_LAYER,
     NULL,
     "the best pairs of each layer (Ada-KV, arXiv 2407.11550)",
     {SAFEGUARD}},
    {"uniform", LEVEL_UNIFORM, NULL, "as many pairs in every head", {{0}}},
    {"pyramid",
     LEVEL_BUDGET,
     budget_pyramid,
     "more pairs in lower layers (PyramidKV, arXiv 2406.02069)",
     {{"beta", 20, 1, 1e6, true, "the last layer keeps the mean divided by this"},
      {"window", 64, 0, 1e6, false, "pairs that every head needs at least"}}},
    {"head", LEVEL_HEAD, NULL, "whole heads, those with the best pairs", {{0}}},
    {"profile",
     LEVEL_BUDGET,
     budget_profile,
     "as many pairs in each head as KVzip kept there in other texts (the profile's shares)",
     {{0}}},
    {NULL, LEVEL_PAIR, NULL, NULL, {{0}}},
};

const Policy *policy_find(const char *name) {
    const Policy *p = policies;
    while (p->name && strcmp(p->name, name) != 0) p++;
    return p->name ? p : NULL;
}

const Level *level_find(const char *name) {
    const Level *l = levels;
    while (l->name && strcmp(l->name, name) != 0) l++;
    return l->name ? l : NULL;
}

// ---- contexts ----

static void set_defaults(double *value, const Param *params) {
    for (int i = 0; i < MAX_PARAMS; i++) value[i] = params[i].value;
}

// Sets the parameter called key [n] if there is one. Returns 1, 0 when there is none, or -1.
static int set_param(double *value, const Param *params, const char *key, size_t n, double x,
                     char *err) {
    int i = find_param(params, key, n);
    if (i < 0) return 0;
    const Param *p = &params[i];
    if (!(x >= p->lo && x <= p->hi) || (!p->real && x != floor(x))) {
        const char *kind = p->real ? "number" : "whole number";
        return fail(err, "%s needs a %s from %g to %g", p->name, kind, p->lo, p->hi);
    }
    value[i] = x;
    return 1;
}

int context_set(Context *c, const Policy *p, const Level *l, const char *key_values, char *err) {
    c->policy = p, c->level = l;
    set_defaults(c->policy_param, p->params);
    set_defaults(c->level_param, l->params);
    for (const char *s = key_values; s && *s; s += *s == ',') {
        size_t n = strcspn(s, "=,");
        if (n == 0 || s[n] != '=') return fail(err, "needs key=value,..");
        char *end;
        double x = strtod(s + n + 1, &end);
        if (end == s + n + 1 || (*end && *end != ',')) x = NAN;
        int a = set_param(c->policy_param, p->params, s, n, x, err);
        int b = a < 0 ? -1 : set_param(c->level_param, l->params, s, n, x, err);
        if (b < 0) return -1;
        if (a + b == 0) {
            return fail(err, "policy %s and level %s have no parameter '%.*s'", p->name, l->name,
                        (int)n, s);
        }
        s += strcspn(s, ",");
    }
    return 0;
}

size_t context_scores(const Context *c) {
    return (size_t)kvcache_scored_layers(&c->kv->shape, NULL) * c->kv->shape.n_kv_heads *
           (size_t)c->n_ctx;
}

int context_score(Context *c, const Policy *p, float *score, char *err) {
    double start = now();
    c->prefill_s = 0.0;
    if (c->policy != p) {
        c->policy = p;
        set_defaults(c->policy_param, p->params);
    }
    if (p->score(c, score, err) != 0) return -1;
    c->score_s = now() - start - c->prefill_s;
    return 0;
}

long context_select(const Context *c, const float *score, double ratio, uint8_t *keep, char *err) {
    const Level *l = c->level ? c->level : levels;
    Selection s = {.n_layers = kvcache_scored_layers(&c->kv->shape, NULL),
                   .n_kv_heads = c->kv->shape.n_kv_heads,
                   .n_ctx = c->n_ctx,
                   .ratio = ratio,
                   .level = l->pool,
                   .ref_ties = c->ref_ties};
    int safeguard = find_param(l->params, "safeguard", strlen("safeguard")), status = 0;
    if (safeguard >= 0) s.safeguard = c->level_param[safeguard];
    int *budget = malloc(((size_t)s.n_layers * s.n_kv_heads + 1) * sizeof *budget);
    if (!budget)
        return fail(err, "out of memory for the budgets of %d heads", s.n_layers * s.n_kv_heads);
    if (l->budget) status = l->budget(c, ratio, budget, err);
    s.budget = budget;
    long kept = status == 0 ? select_pairs(keep, score, &s, err) : -1;
    free(budget);
    return kept;
}
