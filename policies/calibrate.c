// calibrate.c: measures a model's profile: how many pairs each head keeps at a ratio, the largest
// score of each head, and a linear probe per head for the log of a pair's score.
//
// Each text is scored by KVzip, then read once more with a tap that adds every pair's features to
// the normal equations of ridge regression (ridge.c): nothing but sums is kept, however long the
// texts are. Where a trial on texts set aside says that it pays, the shares of layers follow from
// what evicting them does to the model's words instead (effects.c). Where the sums of all layers
// would take too much memory, the texts are read again for each group of layers.
#include "policies/calibrate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policies/effects.h"
#include "policies/ridge.h"
#include "policies/unfinished.h"
#include "util.h"

// Ratios at which head shares are stored.
static const float grid[] = {0.02f, 0.05f, 0.1f, 0.15f, 0.2f, 0.25f, 0.3f, 0.35f,
                             0.4f,  0.5f,  0.6f, 0.7f,  0.8f, 0.9f,  0.95f};
enum { N_GRID = sizeof grid / sizeof *grid, LEAST_TOKENS = 64 };
static const double MOST_PRODUCTS = 5e12;  // of weights and tokens of the parts
enum { LEAST_BY_COST = 2000, LEAST_TRIALS = 4 };
static const double TRIAL_RATIO = 0.3;   // of shares against shares
static const float LEAST_SCORE = 1e-7f;  // added before the log

// A context to learn from.
typedef struct {
    const int *ids;  // [n_prefix + n_ctx]
    int n_ctx;
    int trial;     // its number among those that try shares, or -1
    float *score;  // [scored layers][n_kv_heads][n_ctx]
} Text;

// What has been learned from the texts so far, which goes into the file of unfinished work.
enum { LEARNED = 5 };

// A calibration at work.
typedef struct {
    const Calibrate *c;
    const Config *m;
    int n_layers, n_heads;  // scored layers; all their kv heads
    Ids ids;                // of all texts, each with its prefix
    Text *text;             // [n_texts], the last one all others joined if n_texts > n_parts
    int n_texts, n_parts, n_trials;
    bool is_cut;              // the parts are
    float *share, *head_max;  // as in Profile
    float *probe;             // [n_heads][probe_features]
    double *explained;        // [n_heads]
    double *squares, *sums;   // [n_heads] sums of squared log scores and of log scores
    Ridge ridge;              // sums of the layers [layer0, layer0 + group)
    int layer0, group;
    Effects effects;             // of evicting layers of the texts that are measured
    ShareTrial trial;            // of layer shares
    const Text *now;             // being read for its features
    char *unfinished, work[20];  // the file of unfinished work, and what it calls this one
    double saved;                // when it was written
    bool is_there;
    int n_found;       // texts of an earlier call
    long done, total;  // tokens, for progress
} Run;

static int on_context(void *arg, const char *what, long done, long total) {
    const Run *r = arg;
    (void)what, (void)total;
    done += r->done;  // repeated pieces are counted about
    if (done > r->total) done = r->total;
    return r->c->progress ? r->c->progress(r->c->progress_arg, "calibrate", done, r->total) : 0;
}

// ---- texts ----

// The end of the part that begins at s, and in *next where the following one begins.
static const char *part_end(const char *s, const char *end, const char **next) {
    for (const char *line = s; line < end;) {
        const char *stop = memchr(line, '\n', (size_t)(end - line));
        size_t n = (size_t)((stop ? stop : end) - line), i = 0;
        while (i < n && line[i] == '=') i++;
        if (i == n && n >= 4) {
            *next = stop ? stop + 1 : end;
            return line;
        }
        line = stop ? stop + 1 : end;
    }
    return *next = end;
}

static int push_text(Run *r, const int *ids, int n, char *err) {
    Text *text = realloc(r->text, (size_t)(r->n_texts + 1) * sizeof *text);
    if (!text) return fail(err, "out of memory for %d texts", r->n_texts + 1);
    r->text = text;
    r->text[r->n_texts++] = (Text){.n_ctx = n, .trial = -1};
    for (int i = 0; i < r->c->prefix->n; i++)
        if (ids_push(&r->ids, r->c->prefix->id[i]) != 0) return fail(err, "out of memory");
    for (int i = 0; i < n; i++)
        if (ids_push(&r->ids, ids[i]) != 0) return fail(err, "out of memory");
    return 0;
}

// All parts as texts, then all of them joined, as far as positions were trained.
static int cut_texts(Run *r, const Ids *parts, const int *part_n, int n_parts, char *err) {
    int chunk = min_int(r->c->context.chunk, r->m->seq_len);
    int room = r->m->seq_len - r->c->prefix->n - 2 * chunk, at = 0;
    for (int i = 0; i < n_parts; at += part_n[i++])
        if (push_text(r, parts->id + at, min_int(part_n[i], r->m->seq_len), err) != 0) return -1;
    r->n_parts = r->n_texts;
    int joined = min_int(parts->n, room);
    if (n_parts > 1 && joined > part_n[0] && push_text(r, parts->id, joined, err) != 0) return -1;
    const int *ids = r->ids.id;
    for (int i = 0; i < r->n_texts; i++) {
        r->text[i].ids = ids;
        ids += r->c->prefix->n + r->text[i].n_ctx;
    }
    return 0;
}

// Tokens of all parts, where the caller leaves it to us: as many as take a few minutes.
static int tokens_by_cost(const Config *m) {
    double layer = 2.0 * m->dim * (m->q_dim + m->kv_dim) + 3.0 * m->dim * m->hidden_dim;
    return (int)fmax(MOST_PRODUCTS / (layer * m->n_layers), LEAST_BY_COST);
}

// Cuts each part to the same share of its tokens, so that `most` remain of all, about.
static void shorten(Ids *parts, int *part_n, int n_parts, int most) {
    int to = 0, from = 0;
    double share = (double)most / parts->n;
    for (int i = 0; i < n_parts; i++) {
        int n = max_int((int)(part_n[i] * share), 1);
        memmove(parts->id + to, parts->id + from, (size_t)n * sizeof *parts->id);
        from += part_n[i], to += n, part_n[i] = n;
    }
    parts->n = to;
}

static int read_texts(Run *r, const char *text, size_t n, char *err) {
    Ids parts = {0};
    int *part_n = NULL, n_parts = 0, status = 0;
    for (const char *s = text, *end = text + n, *next; s < end && status == 0; s = next) {
        const char *stop = part_end(s, end, &next);
        int before = parts.n, *more = realloc(part_n, (size_t)(n_parts + 1) * sizeof *part_n);
        if (more) part_n = more;
        if (!more || tokenizer_encode(r->c->context.tok, s, (size_t)(stop - s), 0, &parts) != 0) {
            status = fail(err, "out of memory for the sample text");
        } else if (parts.n > before) {
            part_n[n_parts++] = parts.n - before;
        }
    }
    if (status == 0 && parts.n < LEAST_TOKENS)
        status = fail(err, "%d tokens: too little text to learn from", parts.n);
    int most = r->c->most_tokens > 0 ? r->c->most_tokens : tokens_by_cost(r->m);
    r->is_cut = parts.n > most;
    if (status == 0 && r->is_cut) shorten(&parts, part_n, n_parts, most);
    if (status == 0) status = cut_texts(r, &parts, part_n, n_parts, err);
    free(part_n);
    ids_free(&parts);
    return status;
}

static Context context_of(Run *r, const Text *t, int seq) {
    Context c = r->c->context;
    c.seq = seq, c.ids = t->ids, c.n_prefix = r->c->prefix->n, c.n_ctx = t->n_ctx;
    c.progress = on_context, c.progress_arg = r;
    return c;
}

// ---- shares and maxima ----

// Adds what the heads keep of one text at each ratio of the grid.
static int add_shares(Run *r, const Context *c, const float *score, char *err) {
    size_t n = context_scores(c), n_ctx = (size_t)c->n_ctx;
    uint8_t *keep = malloc(n + 1);
    int status = keep ? 0 : fail(err, "out of memory for selecting");
    for (int i = 0; i < N_GRID && status == 0; i++) {
        if (context_select(c, score, grid[i], keep, err) < 0) status = -1;
        for (int h = 0; h < r->n_heads && status == 0; h++) {
            int kept = 0;
            for (size_t t = 0; t < n_ctx; t++) kept += keep[(size_t)h * n_ctx + t];
            float *share = &r->share[(size_t)i * r->n_heads + h];
            *share = fminf(1.0f, *share + (float)kept / ((float)n_ctx * (float)r->n_texts));
        }
    }
    for (size_t j = 0; j < n; j++) r->head_max[j / n_ctx] = fmaxf(r->head_max[j / n_ctx], score[j]);
    free(keep);
    return status;
}

// ---- trials of layer shares ----

// Numbers the texts that try shares: the long enough ones but the joined one. Every second one is
// measured, the others are set aside to judge what follows from them. None where there are no
// layers to move pairs between, too few texts for both halves, or only their beginnings: what
// evicting does to a short text says little about a long one.
static void number_trials(Run *r) {
    int fit = 0;
    for (int i = 0; i < r->n_parts; i++) fit += trial_fits(r->text[i].n_ctx);
    if (r->n_layers < 2 || fit < LEAST_TRIALS || r->is_cut) return;
    for (int i = 0; i < r->n_parts; i++)
        if (trial_fits(r->text[i].n_ctx)) r->text[i].trial = r->n_trials++;
}

static bool measured(const Text *t) { return t->trial >= 0 && t->trial % 2 == 0; }

// Adds the effects of evicting text t, which c holds, if it is one of those that are measured.
static int measure_text(Run *r, Context *c, const Text *t, char *err) {
    int n = (r->n_trials + 1) / 2;
    if (!measured(t)) return 0;
    if (effects_add(&r->effects, c, t->score, 1.0 / n, err) != 0) return -1;
    r->done += trial_tokens(r->effects.n * EFFECT_POINTS);
    return 0;
}

// ---- scores ----

static int score_text(Run *r, Text *t, char *err) {
    int seq = kvcache_new(r->c->context.kv, err);
    if (seq < 0) return -1;
    Context c = context_of(r, t, seq);
    if (context_set(&c, policy_find("kvzip"), level_find("pair"), NULL, err) != 0 ||
        context_score(&c, c.policy, t->score, err) != 0 || add_shares(r, &c, t->score, err) != 0)
        return -1;
    for (size_t i = 0; i < context_scores(&c); i++) {
        double y = logf(t->score[i] + LEAST_SCORE);
        size_t h = i / (size_t)t->n_ctx;
        t->score[i] = (float)y;
        r->squares[h] += y * y, r->sums[h] += y;
    }
    r->done += 2 * t->n_ctx;
    if (measure_text(r, &c, t, err) != 0) return -1;
    kvcache_drop(c.kv, seq);
    return 0;
}

// ---- unfinished work ----

// What there is after n_done texts: kept [LEARNED + n_done].
static void list_kept(Run *r, Kept *kept, int n_done) {
    size_t heads = (size_t)r->n_heads;
    const Kept learned[LEARNED] = {{"shares", r->share, N_GRID * heads * sizeof(float)},
                                   {"maxima", r->head_max, heads * sizeof(float)},
                                   {"effects", r->effects.effect, sizeof r->effects.effect},
                                   {"squares", r->squares, heads * sizeof(double)},
                                   {"sums", r->sums, heads * sizeof(double)}};
    memcpy(kept, learned, sizeof learned);
    for (int i = 0; i < n_done; i++) {
        Kept *k = &kept[LEARNED + i];
        *k = (Kept){.data = r->text[i].score,
                    .bytes = heads * (size_t)r->text[i].n_ctx * sizeof(float)};
        snprintf(k->name, sizeof k->name, "scores.%d", i);
    }
}

// All that the numbers depend on: the model, the texts, and how they are read.
static uint64_t hash_work(const Run *r) {
    const Context *c = &r->c->context;
    const char *words[] = {c->state->model->fingerprint, kern.name, c->postfix};
    int numbers[] = {r->c->prefix->n, r->n_texts, c->chunk, c->kv->types.k, c->kv->types.v};
    uint64_t h = hash_bytes(HASH_START, numbers, sizeof numbers);
    for (int i = 0; i < 3; i++) h = hash_bytes(h, words[i], strlen(words[i]) + 1);
    for (int i = 0; i < r->n_texts; i++) h = hash_bytes(h, &r->text[i].n_ctx, sizeof(int));
    return hash_bytes(h, r->ids.id, (size_t)r->ids.n * sizeof *r->ids.id);
}

// Whether work of an earlier call is there: how many texts of it are done, or -1 with err.
static int find_unfinished(Run *r, Kept *kept, char *err) {
    size_t n = strlen(r->c->path) + sizeof ".unfinished";
    r->unfinished = malloc(n);
    if (!r->unfinished) return fail(err, "out of memory");
    snprintf(r->unfinished, n, "%s.unfinished", r->c->path);
    snprintf(r->work, sizeof r->work, "%016llx", (unsigned long long)hash_work(r));
    list_kept(r, kept, r->n_texts);
    int found = unfinished_load(r->unfinished, r->work, kept, LEARNED + r->n_texts, err);
    if (found > 0 && found < LEARNED) return fail(err, "%s: it ends early", r->unfinished);
    return found > 0 ? found - LEARNED : found;
}

static int save_unfinished(Run *r, Kept *kept, int n_done, char *err) {
    if (now() - r->saved < r->c->save_seconds) return 0;
    list_kept(r, kept, n_done);
    if (unfinished_save(r->unfinished, r->work, kept, LEARNED + n_done, err) != 0) return -1;
    r->saved = now(), r->is_there = true;
    return 0;
}

// What a text costs to score, in tokens of progress.
static long scoring_tokens(const Run *r, int i) {
    const Text *t = &r->text[i];
    return 2 * t->n_ctx + (measured(t) ? trial_tokens(r->effects.n * EFFECT_POINTS) : 0);
}

static int score_texts(Run *r, char *err) {
    Kept *kept = calloc(LEARNED + (size_t)r->n_texts, sizeof *kept);
    int status = kept ? 0 : fail(err, "out of memory for %d texts", r->n_texts), done = 0;
    for (int i = 0; i < r->n_texts && status == 0; i++) {
        size_t n = (size_t)r->n_heads * (size_t)r->text[i].n_ctx;
        if (!(r->text[i].score = malloc((n + 1) * sizeof(float))))
            status = fail(err, "out of memory for the scores of %d tokens", r->text[i].n_ctx);
    }
    if (status == 0 && (done = find_unfinished(r, kept, err)) < 0) status = -1;
    r->n_found = max_int(done, 0), r->is_there = done > 0, r->saved = now();
    for (int i = 0; i < done; i++) r->done += scoring_tokens(r, i);
    for (int i = r->n_found; i < r->n_texts && status == 0; i++) {
        status = score_text(r, &r->text[i], err);
        if (status == 0) status = save_unfinished(r, kept, i + 1, err);
    }
    free(kept);
    return status;
}

// ---- the probes ----

// The rows of the context among those that forward is computing go into the layer's sums.
static void tap_features(void *arg, int layer, int n) {
    Run *r = arg;
    const RunState *s = r->c->context.state;
    int scored = kvcache_scored_index(&r->c->context.kv->shape, layer), at = scored - r->layer0;
    int skip = min_int(max_int(r->c->prefix->n - s->pos[0], 0), n), n_kv_heads = r->m->n_kv_heads;
    if (r->m->window[layer] != 0 || at < 0 || at >= r->group || skip == n) return;
    profile_rows(s, layer, n, r->ridge.x);
    for (int i = 0; i < n - skip; i++) {
        int t = s->pos[skip + i] - r->c->prefix->n;
        const float *score = r->now->score + (size_t)scored * n_kv_heads * r->now->n_ctx + t;
        for (int g = 0; g < n_kv_heads; g++)
            r->ridge.y[(size_t)i * r->ridge.y_cols + g] = score[(size_t)g * r->now->n_ctx];
    }
    ridge_add(&r->ridge, at, skip, n - skip);
}

static int sum_text(Run *r, const Text *t, char *err) {
    int seq = kvcache_new(r->c->context.kv, err);
    if (seq < 0) return -1;
    Context c = context_of(r, t, seq);
    r->now = t;
    c.state->tap = tap_features, c.state->tap_arg = r;
    int status = context_read(&c, err);
    c.state->tap = NULL;
    kvcache_drop(c.kv, seq);
    r->done += t->n_ctx;
    return status;
}

static int fit_group(Run *r, char *err) {
    size_t h = (size_t)r->layer0 * r->m->n_kv_heads;
    RidgeFit fit = {.n_layers = r->group,
                    .squares = r->squares + h,
                    .sums = r->sums + h,
                    .probe = r->probe + h * probe_features(r->m),
                    .explained = r->explained + h};
    ridge_clear(&r->ridge);
    for (int i = 0; i < r->n_texts; i++) {
        if (sum_text(r, &r->text[i], err) != 0) return -1;
        fit.count += r->text[i].n_ctx;
    }
    return ridge_solve(&r->ridge, &fit, err);
}

static int fit_probes(Run *r, char *err) {
    for (r->layer0 = 0; r->layer0 < r->n_layers; r->layer0 += r->group) {
        r->group = min_int(r->ridge.layers, r->n_layers - r->layer0);
        if (fit_group(r, err) != 0) return -1;
    }
    return 0;
}

// ---- layer shares by effect ----

static int read_again(Run *r, const Text *t, Context *c, char *err) {
    int seq = kvcache_new(r->c->context.kv, err);
    if (seq < 0) return -1;
    *c = context_of(r, t, seq);
    if (context_read(c, err) != 0) return -1;
    r->done += t->n_ctx;
    return 0;
}

// A profile of these shares alone.
static Profile profile_of(const Run *r, const float *share) {
    return (Profile){.n_layers = r->n_layers,
                     .n_kv_heads = r->m->n_kv_heads,
                     .n_ratios = N_GRID,
                     .ratio = grid,
                     .share = share};
}

// A fork of c evicted at the trial's ratio by KVzip's scores within these shares, or -1 with err.
static int evict_by(const Run *r, Context *c, const float *score, const float *share, char *err) {
    Profile p = profile_of(r, share);
    uint8_t *keep = malloc(context_scores(c) + 1);
    int seq = keep ? kvcache_fork(c->kv, c->seq, err) : fail(err, "out of memory for selecting");
    c->profile = &p, c->level = level_find("profile");
    if (seq >= 0 && (context_select(c, score, TRIAL_RATIO, keep, err) < 0 ||
                     kvcache_evict(c->kv, seq, c->n_prefix, c->n_ctx, keep, err) != 0))
        seq = -1;
    c->profile = NULL, c->level = NULL;
    free(keep);
    return seq;
}

// kl [2]: of KVzip's shares, and of the other ones.
static int judge_text(Run *r, const Text *t, const float *share, double *kl, char *err) {
    Context c;
    int seq[2];
    if (read_again(r, t, &c, err) != 0 || (seq[0] = evict_by(r, &c, t->score, r->share, err)) < 0 ||
        (seq[1] = evict_by(r, &c, t->score, share, err)) < 0)
        return -1;
    Trial trial = {.c = &c, .seq = seq, .n = 2, .kl = kl};
    if (trial_run(&trial, err) != 0) return -1;
    for (int i = 0; i < 2; i++) kvcache_drop(c.kv, seq[i]);
    kvcache_drop(c.kv, c.seq);
    r->done += trial_tokens(2);
    return 0;
}

// Replaces the shares by `share` where the texts that were not measured say so.
static int judge_shares(Run *r, const float *share, char *err) {
    int n = 0;
    double(*kl)[2] = calloc((size_t)r->n_parts, sizeof *kl);
    if (!kl) return fail(err, "out of memory for %d texts", r->n_parts);
    int status = 0;
    for (int i = 0; i < r->n_parts && status == 0; i++)
        if (r->text[i].trial >= 0 && !measured(&r->text[i]))
            status = judge_text(r, &r->text[i], share, kl[n++], err);
    r->trial = (ShareTrial){.n_texts = n, .used = status == 0 && effects_pay(kl, n)};
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 2; j++) r->trial.kl[j] += kl[i][j] / n;
    if (r->trial.used) memcpy(r->share, share, N_GRID * (size_t)r->n_heads * sizeof *share);
    free(kl);
    return status;
}

static int try_shares(Run *r, char *err) {
    Profile p = profile_of(r, r->share);
    if (r->n_trials == 0) return 0;
    float *share = malloc(N_GRID * (size_t)r->n_heads * sizeof *share);
    if (!share) return fail(err, "out of memory for the shares of %d heads", r->n_heads);
    int status = effects_move(&r->effects, &p, share, err);
    if (status == 0) status = judge_shares(r, share, err);
    free(share);
    return status;
}

// Tokens that all of it feeds, for progress.
static long trial_total(const Run *r) {
    int points = r->effects.n * EFFECT_POINTS;
    long total = 0;
    for (const Text *t = r->text; t < r->text + r->n_parts; t++)
        if (t->trial >= 0) total += measured(t) ? trial_tokens(points) : t->n_ctx + trial_tokens(2);
    return total;
}

// ---- the file ----

static int declare(TensorWriter *w, const Run *r, char *err) {
    size_t layers = (size_t)r->n_layers, heads = (size_t)r->m->n_kv_heads;
    size_t features = (size_t)probe_features(r->m);
    size_t share[] = {N_GRID, layers, heads}, probe[] = {layers, heads, features};
    return tensors_write_declare(w, "profile.ratio", T_F32, 1, share, err) != 0 ||
                   tensors_write_declare(w, "profile.share", T_F32, 3, share, err) != 0 ||
                   tensors_write_declare(w, "profile.head_max", T_F32, 2, probe, err) != 0 ||
                   tensors_write_declare(w, "profile.probe", T_F32, 3, probe, err) != 0
               ? -1
               : 0;
}

static int put_profile(TensorWriter *w, const Run *r, char *err) {
    size_t heads = (size_t)r->n_heads;
    return tensors_write_put(w, grid, sizeof grid, err) != 0 ||
                   tensors_write_put(w, r->share, N_GRID * heads * sizeof(float), err) != 0 ||
                   tensors_write_put(w, r->head_max, heads * sizeof(float), err) != 0 ||
                   tensors_write_put(w, r->probe, heads * probe_features(r->m) * sizeof(float),
                                     err) != 0
               ? -1
               : 0;
}

// What a tensor of the model file is copied for: not padding, nor a profile it had before.
static bool copied(const Tensor *t) {
    return strncmp(t->name, "pad.", 4) != 0 && strncmp(t->name, "profile.", 8) != 0;
}

// What a trial has changed is said; else the file is as if there had been none.
static int put_trial(TensorWriter *w, const Run *r, char *err) {
    char text[96];
    if (!r->trial.used) return 0;
    snprintf(text, sizeof text, "by effect: held-out KL %.3g -> %.3g at %g", r->trial.kl[0],
             r->trial.kl[1], TRIAL_RATIO);
    return tensors_write_meta(w, PROFILE_LAYER_SHARES, text, err);
}

// All that the model's file holds, and the profile behind it.
static int put_model(TensorWriter *w, const Model *m, const Run *r, char *err) {
    const TensorFile *f = &m->file;
    for (int i = 0; i < f->n_meta; i++)
        if (strcmp(f->meta[i].key, PROFILE_LAYER_SHARES) != 0 &&
            tensors_write_meta(w, f->meta[i].key, f->meta[i].value, err) != 0)
            return -1;
    for (int i = 0; i < f->n_tensors; i++) {
        const Tensor *t = &f->tensors[i];
        if (copied(t) && tensors_write_declare(w, t->name, t->dtype, t->n_dims, t->shape, err) != 0)
            return -1;
    }
    if (put_trial(w, r, err) != 0 || declare(w, r, err) != 0) return -1;
    for (int i = 0; i < f->n_tensors; i++) {
        const Tensor *t = &f->tensors[i];
        if (copied(t) && tensors_write_put(w, t->data, t->bytes, err) != 0) return -1;
    }
    return put_profile(w, r, err);
}

static int put_alone(TensorWriter *w, const Model *m, const Run *r, char *err) {
    if (tensors_write_meta(w, "format", "kvzip.c profile 1", err) != 0 ||
        tensors_write_meta(w, "fingerprint", m->fingerprint, err) != 0 ||
        tensors_write_meta(w, "model", m->name, err) != 0 || put_trial(w, r, err) != 0 ||
        declare(w, r, err) != 0)
        return -1;
    return put_profile(w, r, err);
}

static int write_profile(const Run *r, char *err) {
    const Model *m = r->c->context.state->model;
    TensorWriter w = {0};
    char why[ERR_LEN];
    int rc = tensors_write_begin(&w, r->c->path, why);
    if (rc == 0) rc = r->c->into ? put_model(&w, m, r, why) : put_alone(&w, m, r, why);
    if (rc == 0) rc = tensors_write_commit(&w, why);
    tensors_write_abort(&w);
    return rc == 0 ? 0 : fail(err, "%s: %s", r->c->path, why);
}

// ---- all of it ----

static int run_all(Run *r, const char *text, size_t n, char *err) {
    size_t heads = (size_t)r->n_heads;
    r->share = calloc(N_GRID * heads + 1, sizeof(float));
    r->head_max = calloc(heads + 1, sizeof(float));
    r->probe = calloc(heads * probe_features(r->m) + 1, sizeof(float));
    r->explained = calloc(heads + 1, sizeof(double));
    r->squares = calloc(heads + 1, sizeof(double)), r->sums = calloc(heads + 1, sizeof(double));
    if (!r->share || !r->head_max || !r->probe || !r->explained || !r->squares || !r->sums)
        return fail(err, "out of memory for the profile of %zu heads", heads);
    if (read_texts(r, text, n, err) != 0 ||
        ridge_open(&r->ridge, r->c->context.state, r->n_layers, r->c->lambda, err) != 0)
        return -1;
    number_trials(r);
    int passes = (r->n_layers + r->ridge.layers - 1) / r->ridge.layers;
    for (int i = 0; i < r->n_texts; i++) r->total += (2 + passes) * (long)r->text[i].n_ctx;
    r->total += trial_total(r);
    if (score_texts(r, err) != 0) return -1;
    return fit_probes(r, err) != 0 || try_shares(r, err) != 0 ? -1 : 0;
}

static void close_run(Run *r) {
    for (int i = 0; i < r->n_texts; i++) free(r->text[i].score);
    free(r->text), free(r->share), free(r->head_max), free(r->probe), free(r->explained);
    free(r->squares), free(r->sums), free(r->unfinished);
    ridge_close(&r->ridge);
    ids_free(&r->ids);
}

int calibrate_run(const Calibrate *c, const char *text, size_t n, CalibrateResult *result,
                  char *err) {
    const Config *m = &c->context.state->model->config;
    double start = now();
    Run r = {.c = c, .m = m, .n_layers = kvcache_scored_layers(&c->context.kv->shape, NULL)};
    r.n_heads = r.n_layers * m->n_kv_heads;
    r.effects = effects_groups(r.n_layers);
    int status = run_all(&r, text, n, err);
    if (status == 0) status = write_profile(&r, err);
    if (status == 0 && r.is_there) remove(r.unfinished);
    *result = (CalibrateResult){
        .n_texts = r.n_texts, .n_found = r.n_found, .trial = r.trial, .seconds = now() - start};
    for (int i = 0; i < r.n_texts; i++) {
        result->n_tokens += r.text[i].n_ctx;
        result->longest = max_int(result->longest, r.text[i].n_ctx);
    }
    for (int h = 0; h < r.n_heads && status == 0; h++)
        result->explained += r.explained[h] / r.n_heads;
    close_run(&r);
    return status;
}
