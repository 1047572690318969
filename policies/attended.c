// attended.c: methods that look at single rows of attention (rows.h): what each token pays to those
// before it.
//
// Some work while tokens come. What they know of a pair stays beside it (Live.noted), so that what
// they need does not grow with the text.
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "policies/rows.h"
#include "util.h"

// ---- while tokens come ----

typedef struct {
    Rows rows;
    Live *live;
} Watch;

static int watch_open(Live *v, TakeRow take, int from, bool last, char *err) {
    Watch *w = v->own = calloc(1, sizeof *w);
    if (!w) return fail(err, "out of memory for watching attention");
    w->live = v;
    w->rows =
        (Rows){.c = v->c, .seq = v->c->seq, .from = from, .last = last, .take = take, .arg = v};
    for (int h = 0; h < v->n_heads && v->whole; h++)
        memset(v->noted[h], 0, (size_t)v->c->n_ctx * sizeof **v->noted);
    rows_begin(&w->rows);
    return 0;
}

static void watch_close(Live *v) {
    Watch *w = v->own;
    if (!w) return;
    rows_end(&w->rows);
    free(w);
    v->own = NULL;
}

// Scores become what was noted, times sign.
static int watch_score(Live *v, float sign, char *err) {
    const Watch *w = v->own;
    if (w->rows.failed) return fail(err, "out of memory for rows of attention");
    for (int h = 0; h < v->n_heads; h++)
        for (int t = 0; t < live_pairs(v, h); t++) v->score[h][t] = sign * v->noted[h][t];
    return 0;
}

static int tokens_seen(const Live *v) {
    return v->c->kv->seqs[v->c->seq].next_pos - context_pos(v->c);
}

// The last n pairs of each head stay: they get 1 more than the best other score of their layer, and
// the newer the more on top.
static void keep_recent(const Live *v, int n) {
    int g = v->c->kv->shape.n_kv_heads;
    for (int l = 0; l < v->n_heads && n > 0; l += g) {
        float best = 0;
        for (int h = l; h < l + g; h++)
            for (int t = 0; t < live_pairs(v, h) - n; t++) best = fmaxf(best, v->score[h][t]);
        for (int h = l; h < l + g; h++) {
            int pairs = live_pairs(v, h);
            for (int t = max_int(pairs - n, 0); t < pairs; t++)
                v->score[h][t] = best + 1 + (float)(t - (pairs - n)) / (float)n;
        }
    }
}

// The row's own pair is new; those of the context get what the row pays them.
static void take_sum(void *arg, int h, int pos, const float *w, int n) {
    const Live *v = arg;
    int first = context_first(v->c, h);
    float *noted = v->noted[h];
    (void)pos;
    if (n > first) noted[n - 1 - first] = 0;
    for (int t = first; t < n; t++) noted[t - first] += w[t];
}

// ---- H2O (arXiv 2306.14048): all attention so far, and a share of newest pairs ----

static int h2o_open(Live *v, char *err) { return watch_open(v, take_sum, 0, false, err); }

static int h2o_score(Live *v, char *err) {
    if (watch_score(v, 1, err) != 0) return -1;
    keep_recent(v, (int)(context_param(v->c, "recent") * tokens_seen(v)));
    return 0;
}

const LiveMethod h2o_method = {.open = h2o_open, .score = h2o_score, .close = watch_close};

// ---- Scissorhands (arXiv 2305.17118): how often a pair got less than its share ----

static void take_low(void *arg, int h, int pos, const float *w, int n) {
    const Live *v = arg;
    int first = context_first(v->c, h);
    float *noted = v->noted[h];
    (void)pos;
    if (n > first) noted[n - 1 - first] = 0;
    for (int t = first; t < n; t++) noted[t - first] += w[t] < 1.0f / (float)n;
}

// Counts the last `history` tokens of a whole context.
static int scissorhands_open(Live *v, char *err) {
    int last = context_pos(v->c) + v->c->n_ctx, history = (int)context_param(v->c, "history");
    return watch_open(v, take_low, v->whole ? last - history : 0, false, err);
}

// While tokens come the history is what came since the last look.
static int scissorhands_score(Live *v, char *err) {
    if (watch_score(v, -1, err) != 0) return -1;
    for (int h = 0; h < v->n_heads && !v->whole; h++)
        for (int t = 0; t < live_pairs(v, h); t++) v->noted[h][t] = 0;
    keep_recent(v, (int)context_param(v->c, "recent"));
    return 0;
}

const LiveMethod scissorhands_method = {
    .open = scissorhands_open, .score = scissorhands_score, .close = watch_close};

// ---- TOVA (arXiv 2401.06104): the last token's weights, mean over all heads of the layer ----

static void take_last(void *arg, int h, int pos, const float *w, int n) {
    const Live *v = arg;
    int first = context_first(v->c, h);
    (void)pos;
    for (int t = first; t < n; t++) v->noted[h][t - first] = w[t];
}

static int tova_open(Live *v, char *err) { return watch_open(v, take_last, 0, true, err); }

static int position_at(const Live *v, int h, int t) {
    const KVShape *shape = &v->c->kv->shape;
    KVHeadAt at = {v->c->seq, kvcache_scored_layer(shape, h / shape->n_kv_heads),
                   h % shape->n_kv_heads};
    return kvcache_pair(v->c->kv, at, context_first(v->c, h) + t, NULL, NULL);
}

// Scores of heads [h, h + n) of a layer become the mean over the heads, position by position: heads
// need not hold the same. at [n] is scratch.
static void mean_of_layer(const Live *v, int h, int n, int *at) {
    for (int g = 0; g < n; g++) at[g] = 0;
    for (;;) {
        int pos = INT_MAX;
        float sum = 0;
        for (int g = 0; g < n; g++)
            if (at[g] < live_pairs(v, h + g)) pos = min_int(pos, position_at(v, h + g, at[g]));
        if (pos == INT_MAX) return;
        for (int g = 0; g < n; g++) {
            bool holds = at[g] < live_pairs(v, h + g) && position_at(v, h + g, at[g]) == pos;
            if (holds)
                sum += v->score[h + g][at[g]++];
            else
                at[g] = -at[g] - 1;  // not this one's
        }
        for (int g = 0; g < n; g++) {
            if (at[g] < 0)
                at[g] = -at[g] - 1;
            else
                v->score[h + g][at[g] - 1] = sum / (float)n;
        }
    }
}

static int tova_score(Live *v, char *err) {
    int n = v->c->kv->shape.n_kv_heads, *at = malloc((size_t)n * sizeof *at);
    int status = at ? watch_score(v, 1, err) : fail(err, "out of memory for %d heads", n);
    for (int h = 0; h < v->n_heads && status == 0; h += n) mean_of_layer(v, h, n, at);
    free(at);
    if (status == 0) keep_recent(v, 1);
    return status;
}

const LiveMethod tova_method = {.open = tova_open, .score = tova_score, .close = watch_close};

// ---- rows that weigh more or less ----

// Adds the weighted rows of one reading: weight = from + slope * (pos - first).
typedef struct {
    const Context *c;
    float *score;
    double from, slope;
    int first;  // position of the first row
} Weighted;

static void take_weighted(void *arg, int h, int pos, const float *w, int n) {
    const Weighted *a = arg;
    const Context *c = a->c;
    int first = context_first(c, h);
    float *score = a->score + (size_t)h * c->n_ctx,
          by = (float)(a->from + a->slope * (pos - a->first));
    for (int t = first; t < min_int(n, first + c->n_ctx); t++) score[t - first] += by * w[t];
}

// FINCH (arXiv 2408.00167), and Beyond RAG (arXiv 2503.04973) with a task's description in the
// question's place: the mean over the rows of the question, each times the number of pairs before
// it, as later rows spread their weights over more.
int score_finch(Context *c, float *score, char *err) {
    int before = context_pos(c) + c->n_ctx;
    Weighted a = {.c = c, .score = score, .from = before, .slope = 1, .first = before};
    memset(score, 0, context_scores(c) * sizeof *score);
    if (rows_read(c, 0, take_weighted, &a, err) != 0) return -1;
    for (size_t i = 0; i < context_scores(c); i++) score[i] /= (float)c->n_question;
    return 0;
}

// Scores of a layer become the mean over its heads.
static void one_set(const Context *c, float *score) {
    size_t n = (size_t)c->n_ctx, g = (size_t)c->kv->shape.n_kv_heads;
    for (size_t at = 0; at < context_scores(c); at += n * g) {
        for (size_t t = 0; t < n; t++) {
            float sum = 0;
            for (size_t h = 0; h < g; h++) sum += score[at + h * n + t];
            for (size_t h = 0; h < g; h++) score[at + h * n + t] = sum / (float)g;
        }
    }
}

// PyramidInfer (arXiv 2405.12532): the mean weight from the newest tokens, the newer the more, up
// to 1.2 of the oldest one's; one set for all heads of a layer. They stay, and the first ones.
int score_pyramidinfer(Context *c, float *score, char *err) {
    int rows = max_int((int)(context_param(c, "recent") * c->n_ctx), min_int(1, c->n_ctx));
    int end = context_pos(c) + c->n_ctx;
    Weighted a = {.c = c, .score = score, .from = 1, .first = end - rows};
    a.slope = rows > 1 ? 0.2 / (rows - 1) : 0;
    memset(score, 0, context_scores(c) * sizeof *score);
    if (rows_read(c, rows, take_weighted, &a, err) != 0) return -1;
    for (size_t i = 0; i < context_scores(c); i++) score[i] /= (float)max_int(rows, 1);
    one_set(c, score);
    int sink = min_int(max_int((int)context_param(c, "sink") - context_pos(c), 0), c->n_ctx - rows);
    protect(c, score, c->n_ctx - rows, c->n_ctx);
    protect(c, score, 0, sink);
    return 0;
}

// InfiniPot (arXiv 2410.01518): what a request that fits any context, put behind it, looks at. The
// last ones stay.
int score_infinipot(Context *c, float *score, char *err) {
    static const char request[] =
        "\n\nSummarize the most important information of the text above, word for word.";
    Ids ids = {0};
    Weighted a = {.c = c, .score = score, .from = 1};
    int status = context_read(c, err), own = min_int((int)context_param(c, "window"), c->n_ctx);
    memset(score, 0, context_scores(c) * sizeof *score);
    if (status == 0 && tokenizer_encode(c->tok, request, strlen(request), 0, &ids) != 0)
        status = fail(err, "out of memory for a request");
    if (status == 0) status = rows_behind(c, ids.id, ids.n, take_weighted, &a, err);
    for (size_t i = 0; i < context_scores(c) && status == 0; i++) score[i] /= (float)ids.n;
    ids_free(&ids);
    if (status == 0) protect(c, score, c->n_ctx - own, c->n_ctx);
    return status;
}
