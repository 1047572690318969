// observed.c: attention of the first pass or of the question, summed while it passes.
//
// Nothing is computed twice: attention weights that the pass needs anyway are summed as it goes
// (KVScoring.sum). policy observed watches all tokens; others watch the last few of the context,
// or the question behind it where there is one. Methods that look at single rows are in attended.c.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "policies/ranks.h"
#include "util.h"

// ---- reading ----

// Feeds f while the weights that it pays to the context are added to score.
static int feed_scored(Context *c, const Feed *f, float *score, char *err) {
    KVScoring s = {.seq = f->seq,
                   .max_rows = c->state->max_rows,
                   .n_prefix = c->n_prefix,
                   .t0 = c->n_prefix,
                   .t1 = c->n_prefix + c->n_ctx,
                   .sum = true,
                   .n_ctx = c->n_ctx,
                   .held = c->held,
                   .score = score};
    if (kvcache_score_begin(c->kv, &s, err) != 0) return -1;
    int status = context_feed(c, f, err);
    kvcache_score_end(c->kv);
    return status;
}

int read_watched(Context *c, int rows, float *score, char *err) {
    double start = now();
    int first = c->held ? c->n_prefix : 0, n = c->n_prefix + c->n_ctx - first;
    int from = max_int(n - rows, 0);
    Feed before = {.seq = c->seq, .ids = c->ids + first, .n = from, .what = "read", .total = n};
    Feed watched = before;
    watched.ids += from, watched.n = n - from, watched.done = from;
    memset(score, 0, context_scores(c) * sizeof *score);
    if (context_feed(c, &before, err) != 0 || feed_scored(c, &watched, score, err) != 0) return -1;
    c->prefill_s = now() - start;
    return 0;
}

// Reads the context, then puts the question behind it, which leaves no trace.
static int read_asked(Context *c, float *score, char *err) {
    memset(score, 0, context_scores(c) * sizeof *score);
    if (context_read(c, err) != 0) return -1;
    int fork = kvcache_fork(c->kv, c->seq, err);
    if (fork < 0) return -1;
    Feed f = {.seq = fork, .ids = c->question, .n = c->n_question, .what = "score"};
    f.total = f.n;
    int status = feed_scored(c, &f, score, err);
    kvcache_drop(c->kv, fork);
    return status;
}

int read_window(Context *c, int window, int *own, float *score, char *err) {
    *own = c->n_question > 0 ? 0 : min_int(window, c->n_ctx);
    int rows = c->n_question > 0 ? c->n_question : *own;
    int status = c->n_question > 0 ? read_asked(c, score, err) : read_watched(c, rows, score, err);
    return status == 0 ? rows : -1;
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

// ---- from the last tokens, or from the question ----

// out[t] = sum of x over the `kernel` places around t; what lies beyond the ends counts as 0.
static void smooth(float *out, const float *x, int n, int kernel) {
    for (int t = 0; t < n; t++) {
        int lo = max_int(t - kernel / 2, 0), hi = min_int(t - kernel / 2 + kernel, n);
        float sum = 0.0f;
        for (int j = lo; j < hi; j++) sum += x[j];
        out[t] = sum;
    }
}

// SnapKV: the mean over the last tokens, smoothed along the context.
int score_snapkv(Context *c, float *score, char *err) {
    int kernel = (int)context_param(c, "kernel"), own;
    int rows = read_window(c, (int)context_param(c, "window"), &own, score, err);
    if (rows < 0) return -1;
    float scale = 1.0f / ((float)rows * (float)context_group(c) * (float)kernel);
    int n = c->n_ctx - own;
    float *raw = malloc((size_t)(n + 1) * sizeof *raw);
    if (!raw) return fail(err, "out of memory for smoothing %d scores", n);
    for (size_t i = 0; i < context_scores(c); i += (size_t)c->n_ctx) {
        memcpy(raw, score + i, (size_t)n * sizeof *raw);
        smooth(score + i, raw, n, kernel);
        for (int t = 0; t < n; t++) score[i + (size_t)t] *= scale;
    }
    free(raw);
    protect(c, score, n, c->n_ctx);
    return 0;
}

// NACL: of those that stay in a head a share is drawn, the likelier the more the last tokens look
// at a pair, exp(score / temperature); the others are the best. To draw without replacement is to
// order by score / temperature plus a Gumbel number.
int score_nacl(Context *c, float *score, char *err) {
    double drawn = context_param(c, "random"), temperature = context_param(c, "temperature");
    int own, n = c->n_ctx;
    uint64_t seed = (uint64_t)context_param(c, "seed") << 32;
    int rows = read_window(c, (int)context_param(c, "window"), &own, score, err);
    if (rows < 0) return -1;
    for (size_t i = 0; i < context_scores(c); i++) score[i] /= (float)(rows * context_group(c));
    protect(c, score, n - own, n);
    float *lots = malloc(((size_t)n + 1) * sizeof *lots);
    bool ok = lots != NULL;
    for (size_t i = 0; ok && i < context_scores(c); i++) {
        uint64_t at = seed + i;
        double u = ((double)(random_next(&at) >> 40) + 0.5) * 0x1p-24;
        lots[i % (size_t)n] = (float)(score[i] / temperature - log(-log(u)));
        if (i % (size_t)n == (size_t)n - 1) {
            float *head = score + i + 1 - n;
            ok = ranks_two_stages(head, head, lots, n, 1 - drawn);
        }
    }
    free(lots);
    return ok ? 0 : fail(err, "out of memory for drawing among %d pairs", n);
}

// ---- from all tokens ----

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

// All weights a token receives in a layer, mean over its heads, one number for all of them.
static int read_layers(Context *c, float *score, char *err) {
    size_t n = (size_t)c->n_ctx, g = (size_t)c->kv->shape.n_kv_heads;
    if (read_watched(c, c->n_prefix + c->n_ctx, score, err) != 0) return -1;
    for (size_t at = 0; at < context_scores(c); at += n * g) {
        for (size_t t = 0; t < n; t++) {
            float sum = 0;
            for (size_t h = 0; h < g; h++) sum += score[at + h * n + t];
            for (size_t h = 0; h < g; h++)
                score[at + h * n + t] = sum / (float)c->kv->shape.n_heads;
        }
    }
    return 0;
}

// Dynamic Context Pruning drops a token of a layer by gates that are learned; without them what is
// left of the rule is a threshold on the attention that it has gathered.
int score_dcp(Context *c, float *score, char *err) { return read_layers(c, score, err); }

// Learned Token Pruning drops a token from a layer on where the mean weight it receives falls under
// the layer's threshold: what counts is the least of the layers so far.
int score_ltp(Context *c, float *score, char *err) {
    size_t layer = (size_t)c->n_ctx * c->kv->shape.n_kv_heads;
    if (read_layers(c, score, err) != 0) return -1;
    for (size_t i = 0; i < context_scores(c); i++) {
        score[i] /= (float)(c->n_ctx - (int)(i % (size_t)c->n_ctx));
        if (i >= layer) score[i] = fminf(score[i], score[i - layer]);
    }
    return 0;
}
