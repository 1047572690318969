// cache.c: the library's caches: reading a text and evicting, files, and looking inside.
//
// The steps are those of `run compress`: ids, a method, scores, a choice of pairs. A call that was
// stopped leaves the model's scratch as it found it.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvpages.h"
#include "lib/handles.h"
#include "policies.h"
#include "policies/fitting.h"
#include "policies/stream.h"

// ---- stores: what was read ----

Store *store_new(kvzip_model *m, char *err) {
    Store *s = calloc(1, sizeof *s);
    if (!s) return fail(err, "out of memory"), NULL;
    s->model = m;
    s->refs = 1;
    m->refs++;
    return s;
}

void store_drop(Store *s) {
    if (--s->refs > 0) return;
    kvcache_close(&s->kv);
    ids_free(&s->ids);
    free(s->words);
    free(s->score);
    model_drop(s->model);
    free(s);
}

int store_open(Store *s, const char *kv, char *err) {
    KVTypes types = kvcache_both(KV_F16);
    KVShape shape = model_kv_shape(&s->model->model);
    if (kv && kvcache_types_parse(kv, &types) != 0)
        return fail(err, "kv %s: needs f16, f32, q8, q4, q2 or keys/values, as in q8/q4", kv);
    return kvcache_open(&s->kv, &shape, types, s->model->pool, err);
}

kvzip_cache *cache_new(Store *s, int seq, char *err) {
    kvzip_cache *c = seq < 0 ? NULL : malloc(sizeof *c);
    if (c) return *c = (kvzip_cache){.store = s, .seq = seq}, c;
    if (seq >= 0) {
        fail(err, "out of memory");
        kvcache_drop(&s->kv, seq);
    }
    store_drop(s);
    return NULL;
}

kvzip_cache *kvzip_load(kvzip_model *m, const char *path, char *err) {
    char why[ERR_LEN];
    KVModel model = {model_kv_shape(&m->model), m->model.fingerprint};
    Store *s = store_new(m, err);
    if (!s) return NULL;
    if (kvfile_load(&s->kv, path, &model, m->pool, &s->info, why) == 0) return cache_new(s, 0, err);
    fail(err, "%s: %s", path, why);
    store_drop(s);
    return NULL;
}

kvzip_cache *kvzip_fork(const kvzip_cache *c, char *err) {
    c->store->refs++;
    kvzip_cache *fork = cache_new(c->store, kvcache_fork(&c->store->kv, c->seq, err), err);
    if (fork) fork->masked = c->masked;
    return fork;
}

void kvzip_free(kvzip_cache *c) {
    if (!c) return;
    kvcache_drop(&c->store->kv, c->seq);
    kvcache_trim(&c->store->kv);
    store_drop(c->store);
    free(c);
}

// ---- what a cache holds ----

void kvzip_kept(const kvzip_cache *c, uint8_t *kept) {
    const Store *s = c->store;
    int n_ctx = s->info.n_ctx, n_kv_heads = s->kv.shape.n_kv_heads;
    int n_heads = kvcache_scored_layers(&s->kv.shape, NULL) * n_kv_heads;
    memset(kept, 0, (size_t)n_heads * (size_t)n_ctx);
    for (int h = 0; h < n_heads; h++, kept += n_ctx) {
        const KVHead *head = kvcache_scored_head(&s->kv, c->seq, h);
        for (int t = 0; t < head->len; t++) {
            const KVPage *page = &s->kv.pages[head->page[t / PAGE]];
            int i = page->pos[t % PAGE] - s->info.n_prefix;
            if (i >= 0 && i < n_ctx) kept[i] = page->class == PAGE_DEMOTED ? 2 : 1;
        }
    }
}

// Pairs of the context: all, those that are there in full, and with two bits.
static void count_pairs(const kvzip_cache *c, kvzip_facts *f) {
    const Store *s = c->store;
    int n_heads = kvcache_scored_layers(&s->kv.shape, NULL) * s->kv.shape.n_kv_heads;
    f->n_pairs = (long)n_heads * s->info.n_ctx;
    for (int h = 0; h < n_heads; h++) {
        const KVHead *head = kvcache_scored_head(&s->kv, c->seq, h);
        for (int t = 0; t < head->len; t++) {
            const KVPage *page = &s->kv.pages[head->page[t / PAGE]];
            bool prefix = page->pos[t % PAGE] < s->info.n_prefix;
            *(page->class == PAGE_DEMOTED ? &f->n_demoted : &f->n_kept) += !prefix;
        }
    }
}

// What is known of one cache: of a mask that its caller chose no more than the share it leaves.
static KVInfo info_of(const kvzip_cache *c) {
    KVInfo info = c->store->info;
    if (!c->masked) return info;
    kvzip_facts f = {0};
    count_pairs(c, &f);
    info.policy = "mask";
    info.level = info.profile = info.set = info.budget = NULL;
    info.ratio = f.n_pairs > 0 ? (double)f.n_kept / (double)f.n_pairs : 1;
    return info;
}

int kvzip_save(const kvzip_cache *c, const char *path, char *err) {
    char why[ERR_LEN];
    KVInfo info = info_of(c);
    if (kvfile_save(&c->store->kv, c->seq, path, &info, why) == 0) return 0;
    return fail(err, "%s: %s", path, why);
}

void kvzip_info(const kvzip_cache *c, kvzip_facts *facts) {
    const Store *s = c->store;
    const KVInfo known = info_of(c), *info = &known;
    *facts = (kvzip_facts){.n_prefix = info->n_prefix,
                           .n_ctx = info->n_ctx,
                           .n_tokens = s->kv.seqs[c->seq].next_pos,
                           .ratio = info->ratio,
                           .bytes = kvcache_bytes(&s->kv, c->seq),
                           .full_bytes = kvcache_unevicted_bytes(&s->kv, c->seq, info->n_ids),
                           .prefill_s = s->prefill_s,
                           .score_s = s->score_s,
                           .policy = info->policy,
                           .level = info->level,
                           .profile = info->profile,
                           .set = info->set,
                           .budget = info->budget,
                           .fit = info->fit,
                           .ids = info->ids,
                           .scores = s->score};
    kvcache_types_name(s->kv.types, facts->kv);
    count_pairs(c, facts);
}

int kvzip_evict(kvzip_cache *c, const uint8_t *keep, char *err) {
    Store *s = c->store;
    KVCache *kv = &s->kv;
    int n_ctx = s->info.n_ctx, n_kv_heads = kv->shape.n_kv_heads, rc = 0;
    int n_heads = kvcache_scored_layers(&kv->shape, NULL) * n_kv_heads;
    c->masked = true;
    for (int h = 0; h < n_heads && rc == 0; h++, keep += n_ctx) {
        KVHeadAt at = {c->seq, kvcache_scored_layer(&kv->shape, h / n_kv_heads), h % n_kv_heads};
        int len = kvcache_scored_head(kv, c->seq, h)->len;
        uint8_t *stays = malloc((size_t)len + 1);
        if (!stays) return fail(err, "out of memory for a head of %d pairs", len);
        for (int t = 0; t < len; t++) {
            int i = kvcache_pair(kv, at, t, NULL, NULL) - s->info.n_prefix;
            stays[t] = i < 0 || i >= n_ctx || keep[i];
        }
        rc = kvcache_evict_head(kv, at, (KVSpan){0, len}, stays, err);
        free(stays);
    }
    if (rc == 0) rc = kvcache_settle(kv, c->seq, err);
    kvcache_trim(kv);
    return rc;
}

// ---- reading ----

// Everything that is open while a text is read.
typedef struct {
    const kvzip_reading *how;
    Store *store;
    double ratio;
    bool streams, scored;
    FitKind fit;
    Profile profile;
    bool has_profile;
    Fitting fitting;
    Stream stream;
    Context c;
} Reading;

static int check_reading(Reading *r, char *err) {
    const kvzip_reading *how = r->how;
    int fit = fit_kind(how->fit ? how->fit : "none");
    r->ratio = how->ratio == 0 ? 0.3 : how->ratio;
    r->streams = how->stream || how->budget > 0;
    r->scored = !r->streams && (r->ratio < 1 || how->keep_scores);
    if (!(r->ratio >= 1e-6 && r->ratio <= 1))
        return fail(err, "ratio %g: needs a number above 0, at most 1", how->ratio);
    if (how->budget < 0 || how->window < 0 || how->chunk < 0)
        return fail(err, "budget, window and chunk need whole numbers from 0");
    if (fit < 0) return fail(err, "fit %s: there are none, values and both", how->fit);
    if (fit != FIT_NONE && how->demote)
        return fail(err, "fit %s: not with demote, which keeps all pairs", how->fit);
    if (r->streams && (how->demote || how->keep_scores))
        return fail(err, "%s: not with stream or budget", how->demote ? "demote" : "scores");
    r->fit = r->streams || r->ratio < 1 ? (FitKind)fit : FIT_NONE;
    return 0;
}

// Prefix and context.
static int read_ids(Reading *r, char *err) {
    const kvzip_reading *how = r->how;
    Ids *ids = &r->store->ids;
    const Tokenizer *tok = r->store->model->tok;
    const char *text = how->text;
    size_t n = how->n_text;
    TalkOpening opening = {tok, how->system, how->task, how->raw};
    if (text) {
        if (check_text("text", &text, &n, err) != 0) return -1;
        if (check_string("system", how->system, err) != 0) return -1;
        if (check_string("task", how->task, err) != 0) return -1;
        if (talk_opening(&opening, ids, err) != 0) return -1;
        r->c.n_prefix = ids->n;
        if (tokenizer_encode(tok, text, n, 0, ids) != 0) return fail(err, "out of memory");
    } else {
        if (check_ids(r->store->model, how->ids, how->n_ids, err) != 0) return -1;
        if (how->n_prefix < 0 || how->n_prefix > how->n_ids)
            return fail(err, "n_prefix %d: there are %d ids", how->n_prefix, how->n_ids);
        r->c.n_prefix = how->n_prefix;
        for (int i = 0; i < how->n_ids; i++)
            if (ids_push(ids, how->ids[i]) != 0) return fail(err, "out of memory");
    }
    r->c.ids = ids->id, r->c.n_ctx = ids->n - r->c.n_prefix;
    return r->c.n_ctx > 0 ? 0 : fail(err, "the context is empty: there is nothing to read");
}

// For a name that is in no row of a table: name is that of the first row, whose size is `row`.
static int unknown(const char *what, const char *wanted, const char *const *name, size_t row,
                   char *err) {
    char names[ERR_LEN] = "";
    for (size_t n = 0; *name && n + 1 < sizeof names;
         name = (const char *const *)((const char *)name + row))
        n += (size_t)snprintf(names + n, sizeof names - n, " %s", *name);
    return fail(err, "%s %s: there are%s", what, wanted, names);
}

// Who scores, and who competes with whom.
static int choose_method(Reading *r, char *err) {
    char why[ERR_LEN];
    const kvzip_reading *how = r->how;
    const Model *model = &r->store->model->model;
    if (how->profile || profile_carried(model)) {
        if (profile_open(&r->profile, model, how->profile, why) != 0)
            return fail(err, "%s: %s", how->profile ? how->profile : "the model's profile", why);
        r->has_profile = true;
        r->c.profile = &r->profile;
    }
    const char *policy = how->policy ? how->policy : default_policy(r->has_profile, r->streams);
    const char *level = how->level ? how->level : default_level(policy, r->has_profile);
    const Policy *p = policy_find(policy);
    const Level *l = level_find(level);
    if (!p) return unknown("policy", policy, &policies[0].name, sizeof *policies, err);
    if (!l) return unknown("level", level, &levels[0].name, sizeof *levels, err);
    if (context_set(&r->c, p, l, how->set, why) != 0) return fail(err, "set %s: %s", how->set, why);
    return 0;
}

static int open_reading(Reading *r, char *err) {
    const kvzip_reading *how = r->how;
    kvzip_model *m = r->store->model;
    bool local = how->local != 0;
    r->c = (Context){.state = &m->state,
                     .kv = &r->store->kv,
                     .tok = m->tok,
                     .chunk = how->chunk > 0 ? how->chunk : default_chunk(local),
                     .local = local,
                     .postfix = how->raw ? "\n" : tokenizer_chat(m->tok)->kvzip_postfix,
                     .ref_ties = how->ref_ties != 0,
                     .progress = how->progress,
                     .progress_arg = how->arg};
    if (check_reading(r, err) != 0 || store_open(r->store, how->kv, err) != 0) return -1;
    if (read_ids(r, err) != 0 || choose_method(r, err) != 0) return -1;
    if ((r->c.seq = kvcache_new(&r->store->kv, err)) < 0) return -1;
    if (r->fit == FIT_NONE) return 0;
    if (fitting_open(&r->fitting, r->fit, &r->c, err) != 0) return -1;
    r->c.fitting = &r->fitting;
    return 0;
}

static void close_reading(Reading *r) {
    RunState *state = &r->store->model->state;
    stream_close(&r->stream);
    fitting_close(&r->fitting);
    profile_close(&r->profile);
    state->tap = NULL, state->watch = NULL;  // of a method that was stopped
}

// Evicts while it reads.
static int read_streaming(Reading *r, char *err) {
    Context *c = &r->c;
    int window = r->how->window > 0 ? r->how->window : 128;
    if (stream_open(&r->stream, c, r->ratio, r->how->budget, window, err) != 0) return -1;
    c->after = stream_after, c->after_arg = &r->stream;
    int rc = context_read(c, err) == 0 && stream_finish(&r->stream, err) >= 0 ? 0 : -1;
    c->kv->settling = true;
    return rc;
}

static int evict(Reading *r, const float *score, char *err) {
    Context *c = &r->c;
    uint8_t *keep = malloc(context_scores(c) + 1);
    if (!keep) return fail(err, "out of memory for %zu pairs", context_scores(c));
    int rc = context_select(c, score, r->ratio, keep, err) < 0 ? -1 : 0;
    if (rc == 0) rc = context_evict(c, keep, r->how->demote != 0, err);
    free(keep);
    return rc;
}

static int read_and_evict(Reading *r, char *err) {
    Context *c = &r->c;
    c->kv->settling = !r->scored && !c->fitting;  // exact keys are scored, exact values fitted
    if (r->streams) return read_streaming(r, err);
    if (!r->scored) return context_read(c, err);
    float *score = malloc((context_scores(c) + 1) * sizeof *score);
    if (!score) return fail(err, "out of memory for %zu scores", context_scores(c));
    int rc = context_score(c, c->policy, score, err);
    if (rc == 0 && r->ratio < 1) rc = evict(r, score, err);
    c->kv->settling = true;
    if (rc == 0 && r->how->keep_scores)
        r->store->score = score;
    else
        free(score);
    return rc;
}

// What is known of the cache from now on.
static int note_method(Reading *r, char *err) {
    Store *s = r->store;
    const Context *c = &r->c;
    const char *set = r->how->set ? r->how->set : "";
    const char *profile = r->how->profile ? r->how->profile : "model";
    size_t n = strlen(set) + 1, m = strlen(profile) + 1;
    s->words = malloc(n + m);
    if (!s->words) return fail(err, "out of memory");
    memcpy(s->words, set, n);
    memcpy(s->words + n, profile, m);
    s->info = (KVInfo){.fingerprint = s->model->model.fingerprint,
                       .model = s->model->model.name,
                       .policy = c->policy->name,
                       .level = c->level->name,
                       .profile = uses_profile(c) ? s->words + n : NULL,
                       .set = r->how->set ? s->words : NULL,
                       .fit = c->fitting ? fit_kind_name(c->fitting->kind) : NULL,
                       .n_prefix = c->n_prefix,
                       .n_ctx = c->n_ctx,
                       .ratio = r->ratio,
                       .ids = c->ids,
                       .n_ids = c->n_prefix + c->n_ctx};
    s->prefill_s = c->prefill_s, s->score_s = c->score_s;
    if (r->how->budget <= 0) return 0;
    snprintf(s->budget, sizeof s->budget, "%ld", r->how->budget);
    s->info.budget = s->budget;
    return 0;
}

kvzip_cache *kvzip_compress(kvzip_model *m, const kvzip_reading *how, char *err) {
    Store *s = store_new(m, err);
    if (!s) return NULL;
    Reading r = {.how = how, .store = s};
    int rc = open_reading(&r, err);
    if (rc == 0) rc = read_and_evict(&r, err);
    if (rc == 0) rc = kvcache_settle(&s->kv, r.c.seq, err);
    if (rc == 0) rc = note_method(&r, err);
    close_reading(&r);
    if (rc == 0) {
        kvzip_cache *c = cache_new(s, r.c.seq, err);
        kvzip_facts facts;
        if (!c || how->budget <= 0) return c;
        kvzip_info(c, &facts);
        s->info.ratio = facts.n_pairs > 0 ? (double)facts.n_kept / (double)facts.n_pairs : 1;
        return c;
    }
    store_drop(s);
    return NULL;
}
