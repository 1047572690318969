// kvzip.c: KVzip (arXiv 2505.23416), and KVzip+ (arXiv 2601.07891).
//
// What must a cache hold so that any later question can be answered? All that the model needs to
// say the context again. So the model is made to repeat it, with the answer forced, and watched:
//
//   read the context once                                                        context_read
//   cut it into chunks of 2,000 ids, and for each chunk
//       fork the cache, so that the pass leaves no trace                         repeat_chunk
//       feed "Repeat the previous context exactly." and then the chunk itself    repeat_input
//       for each pair of the chunk, in each kv head:
//           score = the largest attention weight it receives from any row of the pass
//                   and any query head of its group                              kvcache_attend
//   keep the pairs with the best scores                                          select_pairs
//
// The softmax behind a weight covers the protected prefix, the chunk and the pass's own pairs, not
// the rest of the context, which the pass sees but is not asked about. No question is involved. The
// price is the second pass, which takes as long as the first one or longer.
// KVzip+ multiplies each weight by what the pair's value adds to the output, |Wo_h v_j| / |x_t|.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/fitting.h"
#include "policies/methods.h"
#include "util.h"

// The requests of the authors' code (snu-mllab/KVzip), byte for byte; the second one ends in a
// space and is followed by the last ids of the chunk before.
static const char ASK_FIRST[] = "\n\nRepeat the previous context exactly.";
static const char ASK_NEXT[] =
    "\n\nRepeat the part of the previous context exactly, starting with ";
enum { TAIL = 8 };

// ---- the repeat passes ----

int kvzip_repeat_input(const Context *c, int a, int b, Ids *in) {
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
    if (kvzip_repeat_input(c, a, b, &in) != 0) {
        fail(err, "out of memory for a repeat pass of %d tokens", b - a);
    } else if ((s->seq = kvcache_fork(c->kv, c->seq, err)) >= 0) {
        Feed pass = {
            .seq = s->seq, .ids = in.id, .n = in.n, .what = "score", .done = a, .total = c->n_ctx};
        // Fitted to these rows: the one at position from + i says token i of the context again.
        int from = context_pos(c) + c->n_ctx + in.n - b;
        if (c->fitting)
            fitting_watch(c->fitting, c, (FitPass){s->seq, from, a, c->n_ctx, .repeats = true});
        s->t0 = c->n_prefix + a, s->t1 = c->n_prefix + b;
        if (kvcache_score_begin(c->kv, s, err) == 0) status = context_feed(c, &pass, err);
        kvcache_score_end(c->kv);
        kvcache_drop(c->kv, s->seq);
    }
    if (c->fitting) fitting_rest(c->fitting);
    ids_free(&in);
    return status;
}

// Repeats the context that has been read; pair_log as in KVScoring. Scores are logs of weights
// while they rise, and come out as weights in [0, 1] (times |Wo v| / |x| with pair_log).
static int repeat_all(Context *c, float *score, const float *pair_log, char *err) {
    KVScoring s = {.max_rows = c->state->max_rows,
                   .n_prefix = c->n_prefix,
                   .own = c->n_prefix + c->n_ctx,
                   .subset = true,
                   .local = c->local,
                   .n_ctx = c->n_ctx,
                   .held = c->held,
                   .score = score,
                   .pair_log = pair_log};
    for (size_t i = 0; i < context_scores(c); i++) score[i] = -INFINITY;
    for (int a = 0, b; a < c->n_ctx; a = b) {
        b = min_int(c->n_ctx - a, c->chunk) + a;
        if (repeat_chunk(c, &s, a, b, err) != 0) return -1;
    }
    for (size_t i = 0; i < context_scores(c); i++) score[i] = expf(score[i]);
    return 0;
}

int score_kvzip(Context *c, float *score, char *err) {
    if (context_read(c, err) != 0) return -1;
    return repeat_all(c, score, NULL, err);
}

// ---- KVzip+ ----

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
    int n_kv_heads = w->c->kv->shape.n_kv_heads;
    int first =
        context_first(w->c, kvcache_scored_index(&w->c->kv->shape, w->layer) * n_kv_heads + g);
    for (int t = 0; t < w->c->n_ctx; t++) {
        kvcache_pair(w->c->kv, (KVHeadAt){w->c->seq, w->layer, g}, first + t, NULL, v);
        kern.gemm_f32(&(Gemm){.c = gv,
                              .ldc = (size_t)d,
                              .a = v,
                              .lda = (size_t)d,
                              .b = gram,
                              .n = 1,
                              .inner = d,
                              .cols = d});
        double sum = 0.0;
        for (int i = 0; i < d; i++) sum += (double)gv[i] * v[i];
        w->out[(size_t)h * w->c->n_ctx + t] = 0.5f * (float)log(fmax(sum, 1e-30));
    }
}

// pair_log [readers][n_heads][n_ctx] = ln |Wo_h v_t|, by way of v^T (Wo_h^T Wo_h) v. layers
// [n_layers] and gram [n_heads][head_dim][head_dim] are scratch.
static void all_value_logs(const Context *c, float *pair_log, int *layers, float *gram) {
    int n = kvcache_readers(&c->kv->shape, layers), n_heads = c->kv->shape.n_heads;
    for (int s = 0; s < n; s++) {
        ValueLogs w = {c, layers[s], gram, pair_log + (size_t)s * n_heads * c->n_ctx};
        model_wo_gram(c->state->model, c->state->pool, layers[s], gram);
        parallel_for(c->state->pool, n_heads, value_logs, &w);
    }
}

int score_kvzip_plus(Context *c, float *score, char *err) {
    if (context_read(c, err) != 0) return -1;
    const Config *m = &c->state->model->config;
    size_t layers_n = (size_t)m->n_layers, heads = (size_t)m->n_heads, d = (size_t)m->head_dim;
    int *layers = malloc(layers_n * sizeof *layers);
    float *gram = malloc(heads * d * d * sizeof *gram);
    float *pair_log = malloc(layers_n * heads * (size_t)(c->n_ctx + 1) * sizeof *pair_log);
    int status = -1;
    if (!layers || !gram || !pair_log) {
        fail(err, "out of memory for the norms of %d values", c->n_ctx);
    } else {
        all_value_logs(c, pair_log, layers, gram);
        status = repeat_all(c, score, pair_log, err);
    }
    free(layers);
    free(gram);
    free(pair_log);
    return status;
}
