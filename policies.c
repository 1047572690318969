// policies.c: how a context is compressed. To try an idea, write one function and add one row.
//
// A method only says how much each pair matters, higher = keep. Most look at one head at a time and
// need nothing but the pages: such a function is given a Head, fills head->score, and is a row's
// `.head`; the rest follows, whole contexts and sequences that are evicted while they grow. One
// shared routine turns scores and a ratio into a keep set and evicts (select_pairs, kvcache_evict).
// Methods with more to them are files in policies/; KVzip's, policies/kvzip.c, is the one to read
// first. Formulas are those of NVIDIA's kvpress, whose scores the fixtures hold; pairs of the
// protected prefix take part in every sum and softmax.
#include "policies.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/fitting.h"
#include "policies/methods.h"
#include "util.h"

// ---- the attention of the last tokens ----

// out[t] = sum of x over the `kernel` places around t; what lies beyond the ends counts as 0.
static void smooth(float *out, const float *x, int n, int kernel) {
    for (int t = 0; t < n; t++) {
        int lo = max_int(t - kernel / 2, 0), hi = min_int(t - kernel / 2 + kernel, n);
        float sum = 0.0f;
        for (int j = lo; j < hi; j++) sum += x[j];
        out[t] = sum;
    }
}

// Mean over the last tokens, smoothed along the context.
static int score_snapkv(Context *c, float *score, char *err) {
    int rows = min_int((int)context_param(c, "window"), c->n_ctx), n = c->n_ctx - rows;
    int kernel = (int)context_param(c, "kernel");
    float scale = 1.0f / ((float)rows * (float)context_group(c) * (float)kernel);
    float *raw = malloc((size_t)(n + 1) * sizeof *raw);
    if (!raw) return fail(err, "out of memory for smoothing %d scores", n);
    int status = read_watched(c, rows, score, err);
    for (size_t i = 0; status == 0 && i < context_scores(c); i += (size_t)c->n_ctx) {
        memcpy(raw, score + i, (size_t)n * sizeof *raw);
        smooth(score + i, raw, n, kernel);
        for (int t = 0; t < n; t++) score[i + (size_t)t] *= scale;
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

// ---- what the model's profile says ----

// The largest score that calibrating saw in the pair's head: KVzip's head level without a repeat
// pass.
static int score_heads_profile(Context *c, float *score, char *err) {
    if (context_need_profile(c, "policy heads", err) != 0 || context_read(c, err) != 0) return -1;
    for (size_t i = 0; i < context_scores(c); i++)
        score[i] = c->profile->head_max[i / (size_t)c->n_ctx];
    return 0;
}

// ---- budgets ----

// As many pairs in each head as KVzip kept there in other texts.
static int budget_profile(const Context *c, double ratio, int *budget, char *err) {
    if (context_need_profile(c, "level profile", err) != 0) return -1;
    return profile_budget(c->profile, ratio, c->n_ctx, budget, err);
}

// PyramidKV (arXiv 2406.02069): lower layers keep more. A line over the layers from max down to
// min, whose mean is an equal budget and min a beta-th of that, if it fits between SnapKV's window
// and the context.
static int budget_pyramid(const Context *c, double ratio, int *budget, char *err) {
    (void)err;
    int n_layers = kvcache_scored_layers(&c->kv->shape, NULL), n_kv_heads = c->kv->shape.n_kv_heads;
    double n = c->n_ctx, equal = n * ratio, window = context_level_param(c, "window");
    double min = equal / context_level_param(c, "beta"), max = 2 * equal - min;
    if (max >= n - window) max = n - window, min = 2 * equal - max;
    if (!(n >= max && max >= min && min >= window) || n_layers == 1) min = max = equal;
    for (int i = 0; i < n_layers * n_kv_heads; i++) {
        budget[i] =
            (int)rint(max - i / n_kv_heads * (max - min) / (n_layers > 1 ? n_layers - 1 : 1));
    }
    return 0;
}

// ---- the tables ----

// Parameters of several rows. What a row leaves out is 0, as its default and its limits are.
// clang-format off
#define EXPECTED_PARAMS                                                          \
    {.name = "future", .value = 512, .lo = 1, .hi = 1e6,                         \
     .help = "positions to come that queries are expected at"},                  \
    {.name = "sink", .value = 4, .hi = 1e6,                                      \
     .help = "first tokens: they stay, and their queries do not count"},         \
    {.name = "epsilon", .hi = 1, .real = true,                                   \
     .help = "added to the attention before it is multiplied by |v|"}

#define SKETCH_PARAM                                                             \
    {.name = "sketch", .value = 48, .hi = MAX_HEAD_DIM,                          \
     .help = "random directions that keys are seen in; 0: as they are"}

#define SAFEGUARD                                                                \
    {.name = "safeguard", .hi = 1, .real = true,                                 \
     .help = "share of an equal budget that is sure for every head"}
// clang-format on

const Policy policies[] = {
    {.name = "kvzip",
     .score = score_kvzip,
     .repeats = true,
     .help = "largest attention while the context is repeated (arXiv 2505.23416)"},
    {.name = "kvzip+",
     .score = score_kvzip_plus,
     .repeats = true,
     .help = "the same times |Wo v| / |x|, its share of the output (arXiv 2601.07891)"},
    {.name = "kvzap",
     .live = &kvzap_method,
     .help = "KVzip's score as a probe of the profile predicts it (arXiv 2601.07891)",
     .params = {{.name = "expected",
                 .hi = 1e3,
                 .real = true,
                 .help = "weight of expected attention's rank beside the probe's; 0: none"},
                EXPECTED_PARAMS}},
    {.name = "heads",
     .score = score_heads_profile,
     .help = "the largest score of the pair's head in the profile; for level head"},
    {.name = "expected",
     .live = &expected_method,
     .help = "attention that later queries will likely pay, times |v| (arXiv 2510.00636)",
     .params = {EXPECTED_PARAMS}},
    {.name = "observed",
     .score = score_observed,
     .help = "mean attention from all tokens that follow (H2O, arXiv 2306.14048)",
     .params = {{.name = "window", .hi = 1e6, .help = "last tokens, which stay"}}},
    {.name = "snapkv",
     .score = score_snapkv,
     .help = "mean attention from the last tokens, smoothed (arXiv 2404.14469)",
     .params =
         {{.name = "window",
           .value = 64,
           .lo = 1,
           .hi = 1e6,
           .help = "last tokens: they are asked, and stay"},
          {.name = "kernel", .value = 5, .lo = 1, .hi = 1e6, .help = "width of the smoothing"}}},
    {.name = "tova",
     .score = score_tova,
     .help = "attention from the last token, one set for all heads of a layer (arXiv 2401.06104)"},
    {.name = "keydiff",
     .head = keydiff_head,
     .help = "keys that point away from their mean (arXiv 2504.15364)"},
    {.name = "knorm", .head = knorm_head, .help = "keys with a small norm (arXiv 2406.11430)"},
    {.name = "lagkv",
     .head = lagkv_head,
     .help = "pairs that stand out from the range of those that follow (arXiv 2504.04704)",
     .params = {{.name = "lag",
                 .value = 128,
                 .lo = 2,
                 .hi = MAX_LOCAL,
                 .help = "pairs that are compared with as many that follow"},
                {.name = "sink", .value = 4, .hi = 1e6, .help = "first tokens, which stay"}}},
    {.name = "leverage",
     .live = &leverage_method,
     .help = "keys that the others do not explain (Compactor, arXiv 2507.08143)",
     .params = {SKETCH_PARAM}},
    {.name = "curdkv",
     .head = curdkv_head,
     .help = "|k|^2 |v|^2 as a share of their neighbours' (arXiv 2509.15038)",
     .params = {{.name = "local",
                 .value = 16,
                 .lo = 1,
                 .hi = MAX_LOCAL,
                 .help = "pairs that are neighbours"},
                {.name = "sink", .value = 4, .hi = 1e6, .help = "first tokens, which stay"}}},
    {.name = "streaming",
     .head = streaming_head,
     .help = "the newest pairs and the very first (arXiv 2309.17453)",
     .params = {{.name = "sink",
                 .value = 4,
                 .hi = 1e6,
                 .help = "first tokens, the template's among them, which stay"}}},
    {.name = "random",
     .head = random_head,
     .help = "any pairs: what every method must beat",
     .params = {{.name = "seed", .value = 1, .hi = 1e9, .help = "of the numbers"}}},
    {0},
};

const Level levels[] = {
    {.name = "pair",
     .pool = LEVEL_PAIR,
     .help = "the best pairs of all heads",
     .params = {SAFEGUARD}},
    {.name = "layer",
     .pool = LEVEL_LAYER,
     .help = "the best pairs of each layer (Ada-KV, arXiv 2407.11550)",
     .params = {SAFEGUARD}},
    {.name = "uniform", .pool = LEVEL_UNIFORM, .help = "as many pairs in every head"},
    {.name = "token",
     .pool = LEVEL_TOKEN,
     .help = "the best tokens: one set for all layers and heads, by the sum of their scores"},
    {.name = "pyramid",
     .pool = LEVEL_BUDGET,
     .budget = budget_pyramid,
     .help = "more pairs in lower layers (PyramidKV, arXiv 2406.02069)",
     .params = {{.name = "beta",
                 .value = 20,
                 .lo = 1,
                 .hi = 1e6,
                 .real = true,
                 .help = "the last layer keeps the mean divided by this"},
                {.name = "window",
                 .value = 64,
                 .hi = 1e6,
                 .help = "pairs that every head needs at least"}}},
    {.name = "head", .pool = LEVEL_HEAD, .help = "whole heads, those with the best pairs"},
    {.name = "profile",
     .pool = LEVEL_BUDGET,
     .budget = budget_profile,
     .help =
         "as many pairs in each head as KVzip kept there in other texts (the profile's shares)"},
    {0},
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

// ---- defaults ----

const char *default_policy(bool has_profile, bool streams) {
    return has_profile || streams ? "expected" : "kvzip";
}

const char *default_level(const char *policy, bool has_profile) {
    return has_profile && strcmp(policy, "expected") == 0 ? "profile" : "pair";
}

bool uses_profile(const Context *c) {
    static const char *const users[] = {"kvzap", "heads"};
    bool uses = strcmp(c->level->name, "profile") == 0;
    for (int i = 0; i < 2; i++) uses = uses || strcmp(c->policy->name, users[i]) == 0;
    return uses;
}

// ---- scoring and selecting ----

int context_score(Context *c, const Policy *p, float *score, char *err) {
    double start = now();
    c->prefill_s = 0.0;
    if (c->policy != p) context_set_policy(c, p);
    bool reading = c->fitting && !p->repeats;  // what repeats has its own queries caught
    int n = c->n_prefix + c->n_ctx;
    if (reading) fitting_watch(c->fitting, c, (FitPass){.seq = c->seq, .n_tokens = n});
    int rc = p->score ? p->score(c, score, err) : live_whole(c, score, err);
    if (reading) fitting_rest(c->fitting);
    if (rc != 0) return -1;
    c->score_s = now() - start - c->prefill_s;
    return 0;
}

long context_select(const Context *c, const float *score, double ratio, uint8_t *keep, char *err) {
    const Level *l = c->level ? c->level : level_find("pair");
    int n_heads = context_heads(c), status = 0;
    int safeguard = param_find(l->params, "safeguard", strlen("safeguard"));
    int *budget = malloc(((size_t)n_heads + 1) * sizeof *budget);
    if (!budget) return fail(err, "out of memory for the budgets of %d heads", n_heads);
    if (l->budget) status = l->budget(c, ratio, budget, err);
    Selection s = {.n_layers = kvcache_scored_layers(&c->kv->shape, NULL),
                   .n_kv_heads = c->kv->shape.n_kv_heads,
                   .n_ctx = c->n_ctx,
                   .ratio = ratio,
                   .level = l->pool,
                   .ref_ties = c->ref_ties,
                   .safeguard = safeguard >= 0 ? c->level_param[safeguard] : 0,
                   .budget = budget};
    long kept = status == 0 ? select_pairs(keep, score, &s, err) : -1;
    free(budget);
    return kept;
}

int context_evict(Context *c, const uint8_t *keep, bool demote, char *err) {
    double start = now();
    if (c->fitting && fitting_apply_whole(c->fitting, c, keep, err) != 0) return -1;
    c->fit_s = c->fitting ? now() - start : 0;
    if (demote) return kvcache_demote(c->kv, c->seq, c->n_prefix, c->n_ctx, keep, err);
    const KVShape *shape = &c->kv->shape;
    kvcache_trim(c->kv);  // before new pages are taken
    for (int h = 0; h < context_heads(c); h++, keep += c->n_ctx) {
        KVHeadAt at = {c->seq, kvcache_scored_layer(shape, h / shape->n_kv_heads),
                       h % shape->n_kv_heads};
        if (kvcache_evict_head(c->kv, at, (KVSpan){context_first(c, h), c->n_ctx}, keep, err) != 0)
            return -1;
    }
    kvcache_trim(c->kv);
    return 0;
}
