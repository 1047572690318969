// policies.c: how a context is compressed. To try an idea, write one score function and add one row.
//
// A method only says how much each pair matters: it fills score [layer][kv head][pair], higher = keep. One
// shared routine turns scores and a ratio into a keep set and evicts (kvcache_select, kvcache_compact). KVzip
// (arXiv 2505.23416) asks the model to repeat the context, chunk by chunk, with the answer forced, and takes
// the largest attention weight each pair receives. No question is involved, so the result serves any.
#define _POSIX_C_SOURCE 200809L
#include "policies.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// The requests of the authors' code (snu-mllab/KVzip), byte for byte; the second one ends in a space and is
// followed by the last ids of the chunk before.
static const char ASK_FIRST[] = "\n\nRepeat the previous context exactly.";
static const char ASK_NEXT[] = "\n\nRepeat the part of the previous context exactly, starting with ";
enum { TAIL = 8 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int report(const Context *c, const char *what, long done, long total, char *err) {
    if (c->progress && c->progress(c->progress_arg, what, done, total) != 0) return fail(err, "interrupted");
    return 0;
}

// Feeds ids to a sequence in blocks, wanting no logits.
static int feed(Context *c, int seq, const int *ids, int n, const char *what, long done, long total, char *err) {
    Row rows[MAX_ROWS];
    for (int i = 0; i < n;) {
        int m = 0;
        for (; m < c->state->max_rows && m < MAX_ROWS && i + m < n; m++) rows[m] = (Row){seq, ids[i + m], false};
        if (forward(c->state, c->kv, rows, m, err) != 0) return -1;
        i += m;
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

// ---- KVzip ----

// What the model is fed while it repeats ids [a, b) of the context: request, turn change, the ids themselves.
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

// Reads the context, then repeats it; pair_log as in KVScoring. Scores come out as weights in [0, 1]
// (times |Wo v| / |x| with pair_log).
static int repeat_all(Context *c, float *score, const float *pair_log, char *err) {
    int n = c->n_prefix + c->n_ctx;
    KVScoring s = {.max_rows = c->state->max_rows, .n_prefix = c->n_prefix, .own = n, .subset = true, .local = c->local,
                   .n_ctx = c->n_ctx, .score = score, .pair_log = pair_log};
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
    float v[256], gv[256];
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
    float *pair_log = malloc((size_t)m->n_layers * m->n_heads * (size_t)(c->n_ctx + 1) * sizeof *pair_log);
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

// ---- the table ----

const Policy policies[] = {
    {"kvzip", score_kvzip, "largest attention while the context is repeated (arXiv 2505.23416)"},
    {"kvzip+", score_kvzip_plus, "the same times |Wo v| / |x|, the pair's share of the output (arXiv 2601.07891)"},
    {NULL, NULL, NULL},
};

const Policy *policy_find(const char *name) {
    for (const Policy *p = policies; p->name; p++) {
        if (!strcmp(p->name, name)) return p;
    }
    return NULL;
}

size_t context_scores(const Context *c) {
    return (size_t)kvcache_scored_layers(&c->kv->shape, NULL) * c->kv->shape.n_kv_heads * (size_t)c->n_ctx;
}

int context_score(Context *c, const Policy *p, float *score, char *err) {
    double start = now();
    c->prefill_s = 0.0;
    if (p->score(c, score, err) != 0) return -1;
    c->score_s = now() - start - c->prefill_s;
    return 0;
}
