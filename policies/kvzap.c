// kvzap.c: KVzap with linear probes (arXiv 2601.07891): the log of KVzip's score, as each pair's
// features predict it while the context is read.
//
// A tap of forward multiplies the features of each row with the probes of the model's profile
// (profile.c), and the product stays beside the pair. With parameter `expected` the pairs of a head
// are ordered by the sum of two ranks instead: the probe's, and that of expected attention.
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "policies/ranks.h"
#include "util.h"

typedef struct {
    Live *live;
    Probes probes;
    Expected *expected;  // NULL: by probes alone
} Zap;

// ---- what passes ----

static void watch_probes(void *arg, int layer, int n) {
    const Zap *z = arg;
    const Context *c = z->live->c;
    const KVShape *shape = &c->kv->shape;
    if (shape->window[layer] != 0) return;
    if (z->expected) expected_watch(z->expected, layer, n);
    int scored = kvcache_scored_index(shape, layer);
    probes_apply(&z->probes, c->state, layer, scored, n);
    for (int g = 0; g < shape->n_kv_heads; g++) {
        // the first row's pair in the head; negative: it belongs to the prefix
        int h = scored * shape->n_kv_heads + g;
        int at = kvcache_head(c->kv, c->seq, layer, g)->len - context_first(c, h);
        float *noted = z->live->noted[h];
        for (int i = max_int(-at, 0); i < n; i++)
            noted[at + i] = z->probes.y[(size_t)i * z->probes.cols + g];
    }
}

// ---- ranks ----

// out[t] += weight times the rank of score[t] among n, the largest n - 1. Returns false: no memory.
static bool add_ranks(float *out, const float *score, int n, float weight) {
    int *order = malloc(((size_t)n + 1) * sizeof *order);
    bool ok = order && ranks_order(order, score, n);
    for (int i = 0; ok && i < n; i++) out[order[i]] += weight * (float)(n - 1 - i);
    free(order);
    return ok;
}

// Of one head: both kinds of scores become the sum of their ranks, in `expected`.
static int mix_ranks(const Context *c, float *expected, const float *probe, int n, char *err) {
    float *sum = calloc((size_t)n + 1, sizeof *sum);
    bool ok = sum && add_ranks(sum, probe, n, 1.0f) &&
              add_ranks(sum, expected, n, (float)context_param(c, "expected"));
    if (ok) memcpy(expected, sum, (size_t)n * sizeof *sum);
    free(sum);
    return ok ? 0 : fail(err, "out of memory for ranking %d pairs", n);
}

// ---- the method ----

static int method_open(Live *v, char *err) {
    Context *c = v->c;
    Zap *z = v->own = calloc(1, sizeof *z);
    if (!z) return fail(err, "out of memory for the probes");
    z->live = v;
    if (context_need_profile(c, "policy kvzap", err) != 0) return -1;
    if (context_param(c, "expected") > 0 && !(z->expected = expected_open(v, err))) return -1;
    if (probes_open(&z->probes, c->profile, c->state, err) != 0) return -1;
    c->state->tap = watch_probes, c->state->tap_arg = z;
    return 0;
}

static int method_score(Live *v, char *err) {
    Zap *z = v->own;
    if (z->expected && expected_fill(z->expected, v, err) != 0) return -1;
    for (int h = 0; h < v->n_heads; h++) {
        int n = live_pairs(v, h);
        if (!z->expected) memcpy(v->score[h], v->noted[h], (size_t)n * sizeof **v->score);
        if (z->expected && mix_ranks(v->c, v->score[h], v->noted[h], n, err) != 0) return -1;
    }
    return 0;
}

static void method_close(Live *v) {
    Zap *z = v->own;
    v->c->state->tap = NULL;
    if (!z) return;
    expected_close(z->expected);
    probes_close(&z->probes);
    free(z);
    v->own = NULL;
}

const LiveMethod kvzap_method = {.open = method_open, .score = method_score, .close = method_close};
