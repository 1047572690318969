// rows.c: attention row by row.
//
// Each kv head of a layer is a unit of work: its query rows meet its pages as they are by then,
// a few tokens at a time, and the softmax of each is handed to the method. So any number of threads
// gives the same bits.
#include "policies/rows.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

enum { TOKENS = 8 };  // whose rows pass over the pages together

// ---- one kv head ----

// z [rows of m tokens][room] = the scaled, capped and biased products with all pairs of the head.
static void products(const Rows *r, KVHeadAt at, int token, int m, float *z, size_t room) {
    const RunState *s = r->c->state;
    const KVCache *kv = r->c->kv;
    const KVShape *shape = &kv->shape;
    const KVHead *head = kvcache_head(kv, at.seq, at.layer, at.g);
    int d = shape->head_dim, group = shape->n_heads / shape->n_kv_heads;
    float k[MAX_HEAD_DIM * PAGE];
    for (size_t b = 0; b * PAGE < room; b++) {
        const KVPage *page = &kv->pages[head->page[b]];
        kvcache_block(kv, at, (int)b, k, NULL);
        for (int t = 0; t < m; t++) {
            const float *q = s->q + ((size_t)(token + t) * shape->n_heads + at.g * group) * d;
            kern.gemm_f32(&(Gemm){.c = z + (size_t)t * group * room + b * PAGE,
                                  .ldc = room,
                                  .a = q,
                                  .lda = (size_t)d,
                                  .b = k,
                                  .n = group,
                                  .inner = d,
                                  .cols = PAGE});
        }
        for (int i = 0; i < m * group * PAGE; i++) {
            float *x = &z[(size_t)(i / PAGE) * room + b * PAGE + i % PAGE];
            *x *= shape->scale;
            if (shape->softcap > 0) *x = shape->softcap * tanhf(*x / shape->softcap);
            if (page->biased) *x += page->bias[i % PAGE];
        }
    }
}

// z [room] becomes the softmax of its first n and a sink, -inf: none.
static void softmax_row(float *z, int n, size_t room, float sink) {
    float max = sink, sum = 0;
    for (int t = 0; t < n; t++) max = fmaxf(max, z[t]);
    for (size_t t = (size_t)n; t < room; t++) z[t] = -INFINITY;
    if (sink > -INFINITY) sum = expf(sink - max);
    for (size_t b = 0; b < room; b += PAGE) sum += kern.exp64(z + b, max);
    for (int t = 0; t < n; t++) z[t] /= sum;
}

// The rows that count, from r->from on or the last one, of kv head g.
static void pass_head(void *ctx, int g) {
    Rows *r = ctx;
    const Context *c = r->c;
    const KVShape *shape = &c->kv->shape;
    int group = shape->n_heads / shape->n_kv_heads;
    int len = kvcache_head(c->kv, r->seq, r->layer, g)->len;
    int h = kvcache_scored_index(shape, r->layer) * shape->n_kv_heads + g;
    size_t room = (size_t)(len + PAGE - 1) / PAGE * PAGE;
    int begin = r->last ? r->n_rows - 1 : max_int(r->from - c->state->pos[0], 0);
    float *z = begin < r->n_rows ? malloc(TOKENS * group * room * sizeof *z) : NULL;
    if (!z) {
        if (begin < r->n_rows) r->failed = true;
        return;
    }
    for (int i = begin, m; i < r->n_rows; i += m) {
        m = min_int(TOKENS, r->n_rows - i);
        products(r, (KVHeadAt){r->seq, r->layer, g}, i, m, z, room);
        for (int t = 0; t < m; t++) {
            float *w = z + (size_t)t * group * room;
            int n = len - (r->n_rows - 1 - (i + t));
            for (int q = 0; q < group; q++)
                softmax_row(w + q * room, n, room, kvshape_sink(shape, r->layer, g * group + q));
            for (int j = 0; j < n; j++) {
                for (int q = 1; q < group; q++) w[j] += w[q * room + j];
                w[j] /= (float)group;
            }
            r->take(r->arg, h, c->state->pos[i + t], w, n);
        }
    }
    free(z);
}

// ---- watching ----

static void watch_rows(void *arg, int layer, int n) {
    Rows *r = arg;
    const KVShape *shape = &r->c->kv->shape;
    if (r->next) r->next(r->next_arg, layer, n);
    if (shape->window[layer] != 0 || n == 0) return;
    r->layer = layer, r->n_rows = n;
    parallel_for(r->c->state->pool, shape->n_kv_heads, pass_head, r);
}

void rows_begin(Rows *r) {
    RunState *s = r->c->state;
    r->next = s->watch, r->next_arg = s->watch_arg;
    s->watch = watch_rows, s->watch_arg = r;
}

void rows_end(Rows *r) {
    RunState *s = r->c ? r->c->state : NULL;
    if (s && s->watch == watch_rows && s->watch_arg == r)
        s->watch = r->next, s->watch_arg = r->next_arg;
}

// ---- reading ----

static int feed_watched(Rows *r, const Feed *f, char *err) {
    rows_begin(r);
    int status = context_feed(r->c, f, err);
    rows_end(r);
    if (status == 0 && r->failed) return fail(err, "out of memory for rows of attention");
    return status;
}

int rows_behind(Context *c, const int *ids, int n, TakeRow take, void *arg, char *err) {
    int fork = kvcache_fork(c->kv, c->seq, err);
    if (fork < 0) return -1;
    Rows r = {.c = c, .seq = fork, .take = take, .arg = arg};
    Feed f = {.seq = fork, .ids = ids, .n = n, .what = "score", .total = n};
    int status = feed_watched(&r, &f, err);
    kvcache_drop(c->kv, fork);
    return status;
}

int rows_read(Context *c, int rows, TakeRow take, void *arg, char *err) {
    double start = now();
    int first = c->held ? c->n_prefix : 0, n = c->n_prefix + c->n_ctx - first;
    int from = max_int(n - rows, 0);
    Rows r = {.c = c, .seq = c->seq, .take = take, .arg = arg};
    Feed before = {.seq = c->seq, .ids = c->ids + first, .n = from, .what = "read", .total = n};
    Feed watched = before;
    watched.ids += from, watched.n = n - from, watched.done = from;
    if (context_feed(c, &before, err) != 0 || feed_watched(&r, &watched, err) != 0) return -1;
    c->prefill_s = now() - start;
    if (rows > 0) return 0;
    return rows_behind(c, c->question, c->n_question, take, arg, err);
}
