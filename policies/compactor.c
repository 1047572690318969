// compactor.c: Compactor (arXiv 2507.08143): the leverage of keys (geometry.c) plus attention that
// sees both ways inside blocks.
//
// The context is cut into blocks of 256 tokens, the first 8 and the last 4 tokens left out, which
// stay. In a block each query pays all keys of it, later ones too, by a softmax without the scale;
// a pair gets the sum, mean over the group, times |v|, then the mean of itself and its neighbours.
// Queries wait in a buffer until their block is complete.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "util.h"

enum { SINK = 8, RECENT = 4 };

typedef struct {
    Live *live;
    int block;        // tokens
    int origin, end;  // positions of the first token in a block, and behind the last
    float *q;         // [n_layers][n_heads][block][head_dim] of the block at hand
    float *edge;      // [scored heads] what the last pair before the context got
    int layer, n_rows;
    bool failed;
    void (*next)(void *arg, int layer, int n);  // who watches as well
    void *next_arg;
} Compactor;

static float *queries_of(const Compactor *w, int layer, int h) {
    const KVShape *shape = &w->live->c->kv->shape;
    return w->q + ((size_t)layer * shape->n_heads + h) * w->block * shape->head_dim;
}

// The block of n tokens from position `first` on is complete: kv head g's pairs get their sums.
static void close_block(Compactor *w, int g, int first, int n) {
    const Context *c = w->live->c;
    const KVShape *shape = &c->kv->shape;
    int d = shape->head_dim, group = shape->n_heads / shape->n_kv_heads;
    int h = kvcache_scored_index(shape, w->layer) * shape->n_kv_heads + g;
    int begin = context_first(c, h), at = c->held ? first - context_pos(c) + begin : first;
    float *k = malloc(((size_t)n * (d + 2) + 1) * sizeof *k);
    if (!k) {
        w->failed = true;
        return;
    }
    float *z = k + (size_t)n * d, *sum = z + n, v[MAX_HEAD_DIM];
    for (int t = 0; t < n; t++)
        kvcache_pair(c->kv, (KVHeadAt){c->seq, w->layer, g}, at + t, k + (size_t)t * d, NULL);
    memset(sum, 0, (size_t)n * sizeof *sum);
    for (int i = 0; i < group * n; i++) {
        const float *q = queries_of(w, w->layer, g * group + i / n) + (size_t)(i % n) * d;
        float max = -INFINITY, all = 0;
        for (int t = 0; t < n; t++) {
            z[t] = 0;
            for (int j = 0; j < d; j++) z[t] += q[j] * k[(size_t)t * d + j];
            max = fmaxf(max, z[t]);
        }
        for (int t = 0; t < n; t++) all += z[t] = expf(z[t] - max);
        for (int t = 0; t < n; t++) sum[t] += z[t] / all / (float)group;
    }
    for (int t = 0; t < n; t++) {
        float norm = 0;
        kvcache_pair(c->kv, (KVHeadAt){c->seq, w->layer, g}, at + t, NULL, v);
        for (int j = 0; j < d; j++) norm += v[j] * v[j];
        if (at + t >= begin) w->live->noted[h][at + t - begin] = sum[t] * sqrtf(norm);
        if (at + t == begin - 1) w->edge[h] = sum[t] * sqrtf(norm);
    }
    free(k);
}

// The call's rows of kv head g, and the blocks that end with them.
static void pass_head(void *ctx, int g) {
    Compactor *w = ctx;
    const RunState *s = w->live->c->state;
    const KVShape *shape = &w->live->c->kv->shape;
    int d = shape->head_dim, group = shape->n_heads / shape->n_kv_heads;
    for (int i = 0; i < w->n_rows; i++) {
        int at = s->pos[i] - w->origin, last = at % w->block == w->block - 1;
        if (at < 0 || s->pos[i] >= w->end) continue;
        for (int h = g * group; h < (g + 1) * group; h++)
            memcpy(queries_of(w, w->layer, h) + (size_t)(at % w->block) * d,
                   s->q + ((size_t)i * shape->n_heads + h) * d, (size_t)d * sizeof(float));
        if (last || s->pos[i] == w->end - 1)
            close_block(w, g, s->pos[i] - at % w->block, at % w->block + 1);
    }
}

static void watch_blocks(void *arg, int layer, int n) {
    Compactor *w = arg;
    const KVShape *shape = &w->live->c->kv->shape;
    if (w->next) w->next(w->next_arg, layer, n);
    if (shape->window[layer] != 0 || n == 0) return;
    w->layer = layer, w->n_rows = n;
    parallel_for(w->live->c->state->pool, shape->n_kv_heads, pass_head, w);
}

// ---- the method ----

static int method_open(Live *v, char *err) {
    const Context *c = v->c;
    RunState *s = c->state;
    const KVShape *shape = &c->kv->shape;
    Compactor *w = v->own = calloc(1, sizeof *w);
    if (w) {
        *w = (Compactor){.live = v,
                         .block = (int)context_param(c, "block"),
                         .origin = c->held ? context_pos(c) : SINK,
                         .end = context_pos(c) + c->n_ctx - RECENT,
                         .next = s->watch,
                         .next_arg = s->watch_arg};
        w->q = malloc(((size_t)shape->n_layers * shape->n_heads * w->block * shape->head_dim + 1) *
                      sizeof *w->q);
        w->edge = calloc((size_t)v->n_heads + 1, sizeof *w->edge);
    }
    if (!w || !w->q || !w->edge) return fail(err, "out of memory for blocks of queries");
    for (int h = 0; h < v->n_heads; h++) memset(v->noted[h], 0, (size_t)c->n_ctx * sizeof(float));
    s->watch = watch_blocks, s->watch_arg = w;
    return 0;
}

// noted [n]: each the mean of itself and both neighbours, edge before the first; nothing lies
// behind the last.
static void smooth(float *noted, int n, float edge) {
    for (int t = 0; t < n; t++) {
        float here = noted[t], after = t + 1 < n ? noted[t + 1] : 0;
        noted[t] = (edge + here + after) / 3;
        edge = here;
    }
}

static int method_score(Live *v, char *err) {
    const Compactor *w = v->own;
    const Context *c = v->c;
    float blend = (float)context_param(c, "blend");
    int sink = c->held ? 0 : SINK, own = max_int(sink - c->n_prefix, 0);
    int recent = min_int(RECENT, c->n_ctx);
    if (w->failed) return fail(err, "out of memory for blocks of queries");
    if (own + recent >= c->n_ctx) {  // all of it is protected
        for (size_t i = 0; i < context_scores(c); i++) v->score[0][i] = 1;
        return 0;
    }
    if (leverage_fill(v, sink, recent, err) != 0) return -1;
    for (int h = 0; h < v->n_heads; h++) smooth(v->noted[h], c->n_ctx, w->edge[h]);
    standardize_layers(v, v->noted, sink, recent);
    for (int h = 0; h < v->n_heads; h++)
        for (int t = 0; t < c->n_ctx; t++) v->score[h][t] = blend * v->score[h][t] + v->noted[h][t];
    if (v->n_heads == 0) return 0;
    protect(c, v->score[0], c->n_ctx - recent, c->n_ctx);
    protect(c, v->score[0], 0, own);
    return 0;
}

static void method_close(Live *v) {
    Compactor *w = v->own;
    if (!w) return;
    if (v->c->state->watch == watch_blocks)
        v->c->state->watch = w->next, v->c->state->watch_arg = w->next_arg;
    free(w->q), free(w->edge);
    free(w);
    v->own = NULL;
}

const LiveMethod compactor_method = {
    .open = method_open, .score = method_score, .close = method_close};
