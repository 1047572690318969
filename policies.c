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
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policies/fitting.h"
#include "policies/methods.h"
#include "util.h"

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

#define SNAPKV_PARAMS                                                            \
    {.name = "window", .value = 64, .lo = 1, .hi = 1e6,                          \
     .help = "last tokens: they are asked, and stay"},                           \
    {.name = "kernel", .value = 5, .lo = 1, .hi = 1e6,                           \
     .help = "width of the smoothing"}

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
     .asks = ASKS_IF_GIVEN,
     .help = "mean attention from the last tokens or the question, smoothed (arXiv 2404.14469)",
     .params = {SNAPKV_PARAMS}},
    {.name = "tova",
     .live = &tova_method,
     .help = "attention from the last token, one set for all heads of a layer (arXiv 2401.06104)"},
    {.name = "h2o",
     .live = &h2o_method,
     .help = "all attention so far, and the newest pairs (arXiv 2306.14048)",
     .params = {{.name = "recent",
                 .value = 0.1,
                 .hi = 1,
                 .real = true,
                 .help = "share of a whole context: its newest pairs stay"}}},
    {.name = "scissorhands",
     .live = &scissorhands_method,
     .help = "pairs that seldom got less than an equal share of attention (arXiv 2305.17118)",
     .params = {{.name = "history",
                 .value = 400,
                 .lo = 1,
                 .hi = 1e6,
                 .help = "last tokens of a whole context: they are counted"},
                {.name = "recent", .value = 10, .hi = 1e6, .help = "last tokens, which stay"}}},
    {.name = "nacl",
     .score = score_nacl,
     .asks = ASKS_IF_GIVEN,
     .help = "attention from the last tokens, a part drawn by it (arXiv 2408.03675)",
     .params = {{.name = "window",
                 .value = 64,
                 .lo = 1,
                 .hi = 1e6,
                 .help = "last tokens: they are asked, and stay"},
                {.name = "random",
                 .value = 0.3,
                 .hi = 1,
                 .real = true,
                 .help = "share of what stays that is drawn"},
                {.name = "temperature",
                 .value = 1,
                 .lo = 1e-6,
                 .hi = 1e6,
                 .real = true,
                 .help = "divides the scores that lots are drawn by"},
                {.name = "seed", .value = 1, .hi = 1e9, .help = "of the lots"}}},
    {.name = "finch",
     .score = score_finch,
     .asks = ASKS_ALWAYS,
     .help = "attention from the question, --question TEXT (arXiv 2408.00167)"},
    {.name = "task",
     .score = score_finch,
     .asks = ASKS_TASK,
     .help = "the same of a task's description, --question or --task (arXiv 2503.04973)"},
    {.name = "pyramidinfer",
     .score = score_pyramidinfer,
     .help = "attention from the newest tokens, one set for all heads of a layer; later layers "
             "read all tokens, which the method's own do not (arXiv 2405.12532)",
     .params = {{.name = "recent",
                 .value = 0.2,
                 .hi = 1,
                 .real = true,
                 .help = "share of the context: its last tokens are asked, and stay"},
                {.name = "sink", .value = 4, .hi = 1e6, .help = "first tokens, which stay"}}},
    {.name = "infinipot",
     .score = score_infinipot,
     .help = "attention from a request that fits any context; without the novelty of tokens "
             "(arXiv 2410.01518)",
     .params = {{.name = "window", .value = 64, .hi = 1e6, .help = "last tokens, which stay"}}},
    {.name = "triattention",
     .live = &triattention_method,
     .help = "what queries around their centres look at, at distances to come (arXiv 2604.04921)",
     .params = {{.name = "furthest",
                 .value = 65536,
                 .lo = 1,
                 .hi = 1 << 20,
                 .help = "distances 1, 2, 4, .. up to this one count alike"}}},
    {.name = "qfilters",
     .live = &qfilters_method,
     .help = "keys along the direction that the queries so far have in common (arXiv 2503.02812)"},
    {.name = "duo",
     .score = score_duo,
     .help = "retrieving heads by the profile's largest scores; of others the ends (arXiv "
             "2410.10819)",
     .params = {{.name = "sink", .value = 128, .hi = 1e6, .help = "first tokens of all heads"},
                {.name = "recent", .value = 256, .hi = 1e6, .help = "last tokens of all heads"}}},
    {.name = "simlayerkv",
     .score = score_simlayerkv,
     .help = "layers whose last token looks beyond the ends; of others the ends (arXiv 2410.13846)",
     .params = {{.name = "sink", .value = 4, .hi = 1e6, .help = "first tokens of all layers"},
                {.name = "recent", .value = 1024, .hi = 1e6, .help = "last tokens of all layers"}}},
    {.name = "fastgen",
     .score = score_fastgen,
     .help = "of each head special tokens, marks, what is looked at most, the newest, or all, as "
             "many of these as needed (arXiv 2310.01801)",
     .params = {{.name = "mass",
                 .value = 0.95,
                 .hi = 1,
                 .real = true,
                 .help = "share of the last tokens' attention that must be held"},
                {.name = "frequent", .value = 0.3, .hi = 1, .real = true, .help = "share of pairs"},
                {.name = "local", .value = 0.3, .hi = 1, .real = true, .help = "share of pairs"},
                {.name = "window", .value = 64, .lo = 1, .hi = 1e6, .help = "last tokens"}}},
    {.name = "dcp",
     .score = score_dcp,
     .help = "all attention that a token gathers in a layer: what is left of Dynamic Context "
             "Pruning without its gates (arXiv 2305.15805)"},
    {.name = "ltp",
     .score = score_ltp,
     .help = "the mean of it, the least of the layers so far: Learned Token Pruning with nothing "
             "learned (arXiv 2107.00910)"},
    {.name = "chunkkv",
     .score = score_chunkkv,
     .inner = "snapkv",
     .asks = ASKS_IF_GIVEN,
     .help = "neighbours stay or go as one, by snapkv; chunkkv:NAME by another (arXiv 2502.00299)",
     .params = {SNAPKV_PARAMS,
                {.name = "tokens", .value = 20, .lo = 1, .hi = 1e6, .help = "of a chunk"}}},
    {.name = "criticalkv",
     .score = score_criticalkv,
     .inner = "snapkv",
     .asks = ASKS_IF_GIVEN,
     .help = "half by snapkv, half by that times |Wo v|; criticalkv:NAME by another (arXiv "
             "2502.03805)",
     .params = {SNAPKV_PARAMS,
                {.name = "first",
                 .value = 0.5,
                 .hi = 1,
                 .real = true,
                 .help = "share of what stays that the other method chooses"}}},
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
    {.name = "compactor",
     .live = &compactor_method,
     .whole = true,
     .help = "leverage, and attention inside blocks that sees both ways (arXiv 2507.08143)",
     .params = {SKETCH_PARAM,
                {.name = "blend",
                 .value = 0.35,
                 .hi = 1,
                 .real = true,
                 .help = "weight of the leverage beside the attention"},
                {.name = "block", .value = 256, .lo = 1, .hi = 4096, .help = "tokens of a block"}}},
    {.name = "capkv",
     .live = &capkv_method,
     .help = "values that the others do not explain, where queries look (arXiv 2604.25975)",
     .params = {{.name = "future",
                 .value = 512,
                 .lo = 1,
                 .hi = 1e6,
                 .help = "positions to come that queries are expected at"},
                {.name = "sharp",
                 .value = 5,
                 .hi = 100,
                 .real = true,
                 .help = "how much a key's direction counts"},
                {.name = "sink", .value = 4, .hi = 1e6, .help = "first tokens, which stay"}}},
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
    {.name = "threshold",
     .pool = LEVEL_THRESHOLD,
     .help = "each pair by its own score, --threshold T: how many stay follows from the text "
             "(arXiv 2601.07891)",
     .params = {{.name = "least",
                 .lo = -1e30,
                 .hi = 1e30,
                 .real = true,
                 .help = "score of pairs that stay"},
                {.name = "newest", .value = 128, .hi = 1e6, .help = "last pairs, which stay"}}},
    {.name = "profile",
     .pool = LEVEL_BUDGET,
     .budget = budget_profile,
     .help =
         "as many pairs in each head as KVzip kept there in other texts (the profile's shares)"},
    {0},
};

static const Policy *row_find(const char *name, size_t n) {
    for (const Policy *p = policies; p->name; p++)
        if (strlen(p->name) == n && memcmp(p->name, name, n) == 0) return p;
    return NULL;
}

const char *policy_why_not(const char *name) {
    static const char *const left_out[][2] = {
        {"think", "drops channels of keys, not pairs: a type of page, not a policy"},
        {"dms", "has trained gates; its rule is --threshold"},
        {"fastkvzip", "has trained gates"},
        {"restorekv", "has trained embeddings; --fit makes up for what went in closed form"},
        {"adakv", "is --level layer --set safeguard=0.2, of any policy"},
        {"pyramidkv", "is --level pyramid, of any policy"}};
    for (size_t i = 0; i < sizeof left_out / sizeof *left_out; i++)
        if (strcmp(left_out[i][0], name) == 0) return left_out[i][1];
    return NULL;
}

// ---- wrapped methods: "chunkkv:kvzip" ----

enum { N_WRAPPED = 4 * sizeof policies / sizeof *policies, WRAPPED_NAME = 40 };

static Policy wrapped[N_WRAPPED];
static int n_wrapped;
static char wrapped_names[N_WRAPPED][WRAPPED_NAME];
static pthread_once_t wrapped_once = PTHREAD_ONCE_INIT;

// A row for the wrapper `by` around p: p's parameters first, where p finds them as its own.
static void wrap(const Policy *by, const Policy *p) {
    const Policy *usual = row_find(by->inner, strlen(by->inner));
    Policy *w = &wrapped[n_wrapped];
    int n = 0;
    *w = *by;
    snprintf(wrapped_names[n_wrapped], WRAPPED_NAME, "%s:%s", by->name, p->name);
    w->name = wrapped_names[n_wrapped++];
    w->inner = p->name, w->asks = p->asks, w->repeats = p->repeats;
    memcpy(w->params, p->params, sizeof w->params);
    while (n < MAX_PARAMS && w->params[n].name) n++;
    for (const Param *own = by->params; own < by->params + MAX_PARAMS && own->name; own++) {
        bool is_usual = param_find(usual->params, own->name, strlen(own->name)) >= 0;
        if (!is_usual && n < MAX_PARAMS) w->params[n++] = *own;
    }
}

static void wrap_all(void) {
    for (const Policy *by = policies; by->name; by++)
        for (const Policy *p = policies; by->inner && p->name; p++)
            if (!p->inner && n_wrapped < N_WRAPPED) wrap(by, p);
}

const Policy *policy_find(const char *name) {
    const Policy *p = row_find(name, strlen(name));
    if (p) return p;
    pthread_once(&wrapped_once, wrap_all);
    for (int i = 0; i < n_wrapped; i++)
        if (strcmp(wrapped[i].name, name) == 0) return &wrapped[i];
    return NULL;
}

// p, or the method that it wraps.
static const Policy *innermost(const Policy *p) {
    return p->inner ? row_find(p->inner, strlen(p->inner)) : p;
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
    static const char *const users[] = {"kvzap", "heads", "duo"};
    bool uses = strcmp(c->level->name, "profile") == 0;
    for (int i = 0; i < 3; i++) uses = uses || strcmp(innermost(c->policy)->name, users[i]) == 0;
    return uses;
}

// ---- scoring and selecting ----

static int score_by(Context *c, const Policy *p, float *score, char *err) {
    return p->score ? p->score(c, score, err) : live_whole(c, score, err);
}

int score_inner(Context *c, float *score, char *err) {
    const Policy *outer = c->policy;
    c->policy = innermost(outer);
    int status = score_by(c, c->policy, score, err);
    c->policy = outer;
    return status;
}

int context_score(Context *c, const Policy *p, float *score, char *err) {
    double start = now();
    c->prefill_s = 0.0;
    if (c->policy != p) context_set_policy(c, p);
    if (p->asks >= ASKS_ALWAYS && c->n_question == 0)
        return fail(err, "policy %s needs the question that will be asked", p->name);
    bool reading = c->fitting && !p->repeats;  // what repeats has its own queries caught
    int n = c->n_prefix + c->n_ctx;
    if (reading) fitting_watch(c->fitting, c, (FitPass){.seq = c->seq, .n_tokens = n});
    int rc = score_by(c, p, score, err);
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
    if (l->pool == LEVEL_THRESHOLD) {
        s.least = context_level_param(c, "least");
        s.newest = (int)context_level_param(c, "newest");
    }
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
