// live.c: runs methods that score what is live now, one head at a time.
//
// While tokens come, stream.c owns the arrays of scores and lets them grow. For a whole context
// they are the caller's: what lies before the context is never scored, so pair t of a head's
// context is entry t in both.
#include "policies/live.h"

#include <stdlib.h>

#include "util.h"

int live_open(Live *v, char *err) {
    const LiveMethod *m = v->c->policy->live;
    return m && m->open ? m->open(v, err) : 0;
}

int live_score(Live *v, char *err) {
    const Policy *p = v->c->policy;
    if (p->live) return p->live->score(v, err);
    live_each_head(v, p->head, NULL);
    return 0;
}

void live_close(Live *v) {
    const LiveMethod *m = v->c->policy->live;
    if (m && m->close) m->close(v);
}

int live_whole(Context *c, float *score, char *err) {
    Live v = {.c = c, .whole = true, .n_heads = context_heads(c)};
    size_t n = context_scores(c);
    int status = -1;
    float *noted = malloc((c->policy->live ? n : 0) * sizeof *noted + 1);
    v.score = malloc(((size_t)v.n_heads * 2 + 1) * sizeof *v.score);
    if (!noted || !v.score) {
        fail(err, "out of memory for the scores of %d pairs", c->n_ctx);
    } else {
        v.noted = v.score + v.n_heads;
        for (int h = 0; h < v.n_heads; h++) {
            v.score[h] = score + (size_t)h * c->n_ctx;
            v.noted[h] = c->policy->live ? noted + (size_t)h * c->n_ctx : NULL;
        }
        status = live_open(&v, err);
        if (status == 0) status = context_read(c, err);
        if (status == 0) status = live_score(&v, err);
        live_close(&v);
    }
    free(v.score);
    free(noted);
    return status;
}

// ---- for methods ----

int live_pairs(const Live *v, int h) {
    int len = kvcache_scored_head(v->c->kv, v->c->seq, h)->len;
    return max_int(len - context_first(v->c, h), 0);
}

typedef struct {
    const Live *v;
    void (*fn)(const Head *h);
    void *arg;
} Each;

static void call_head(void *ctx, int i) {
    const Each *e = ctx;
    const Context *c = e->v->c;
    const KVShape *shape = &c->kv->shape;
    Head head = {.c = c,
                 .layer = kvcache_scored_layer(shape, i / shape->n_kv_heads),
                 .g = i % shape->n_kv_heads,
                 .first = context_first(c, i),
                 .n = live_pairs(e->v, i),
                 .score = e->v->score[i],
                 .arg = e->arg};
    if (head.n > 0) e->fn(&head);
}

void live_each_head(const Live *v, void (*fn)(const Head *h), void *arg) {
    parallel_for(v->c->state->pool, v->n_heads, call_head, &(Each){v, fn, arg});
}

int head_blocks(const Head *h) { return (h->first + h->n + PAGE - 1) / PAGE; }

static KVHeadAt head_at(const Head *h) { return (KVHeadAt){h->c->seq, h->layer, h->g}; }

int head_block(const Head *h, int b, float *k, float *v) {
    return kvcache_block(h->c->kv, head_at(h), b, k, v);
}

int head_pos(const Head *h, int i) {
    return kvcache_pair(h->c->kv, head_at(h), h->first + i, NULL, NULL);
}

int head_pair(const Head *h, int t, float *k, float *v) {
    return kvcache_pair(h->c->kv, head_at(h), t, k, v);
}

void head_unrotate(const Head *h, int pos, float *k) {
    const Model *m = h->c->state->model;
    const Config *c = &m->config;
    float rope[MAX_HEAD_DIM];
    if (c->rope[h->layer] < 0) return;
    float scale = c->rope_mscale[c->rope[h->layer]], back = 1.0f / (scale * scale);
    model_rope(m, h->layer, pos, rope);
    for (int j = 0; j < c->rotary_dim; j++) rope[j] *= j % 2 ? -back : back;
    model_rotate(m, k, rope);
}

void head_put(const Head *h, int b, const float *x) {
    int first = h->first - b * PAGE, end = min_int(first + h->n, PAGE);
    for (int j = max_int(first, 0); j < end; j++) h->score[j - first] = x[j];
}

void dot_columns(float *out, const float *x, const float *y, int d) {
    for (int j = 0; j < PAGE; j++) out[j] = 0.0f;
    for (int i = 0; i < d; i++, x += PAGE, y += PAGE)
        for (int j = 0; j < PAGE; j++) out[j] += x[j] * y[j];
}
