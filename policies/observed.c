// observed.c: the attention of the first pass, watched while the context is read.
//
// Nothing is computed twice: attention weights that the pass needs anyway are summed as it goes
// (KVScoring.sum). policy observed watches all tokens; others watch the last few.
#include <math.h>
#include <string.h>

#include "policies/methods.h"
#include "util.h"

int read_watched(Context *c, int rows, float *score, char *err) {
    double start = now();
    int first = c->held ? c->n_prefix : 0, n = c->n_prefix + c->n_ctx - first;
    int from = max_int(n - rows, 0);
    KVScoring s = {.seq = c->seq,
                   .max_rows = c->state->max_rows,
                   .n_prefix = c->n_prefix,
                   .t0 = c->n_prefix,
                   .t1 = c->n_prefix + c->n_ctx,
                   .sum = true,
                   .n_ctx = c->n_ctx,
                   .held = c->held,
                   .score = score};
    Feed before = {.seq = c->seq, .ids = c->ids + first, .n = from, .what = "read", .total = n};
    Feed watched = before;
    watched.ids += from, watched.n = n - from, watched.done = from;
    memset(score, 0, context_scores(c) * sizeof *score);
    if (context_feed(c, &before, err) != 0) return -1;
    if (kvcache_score_begin(c->kv, &s, err) != 0) return -1;
    int status = context_feed(c, &watched, err);
    kvcache_score_end(c->kv);
    c->prefill_s = now() - start;
    return status;
}

void protect(const Context *c, float *score, int from, int to) {
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

// H2O for a prompt: all weights a pair receives, over the number of tokens that could see it, since
// the plain sum favours old pairs.
int score_observed(Context *c, float *score, char *err) {
    int window = min_int((int)context_param(c, "window"), c->n_ctx);
    if (read_watched(c, c->n_prefix + c->n_ctx, score, err) != 0) return -1;
    for (size_t i = 0; i < context_scores(c); i++) {
        score[i] /= (float)(context_group(c) * (c->n_ctx - (int)(i % (size_t)c->n_ctx)));
    }
    protect(c, score, c->n_ctx - window, c->n_ctx);
    return 0;
}
