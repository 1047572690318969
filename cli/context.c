// context.c: compress, score and map: a context is read, its pairs are scored, and the scores
// decide which pairs stay, are saved, or are drawn.
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/commands.h"
#include "cli/input.h"
#include "cli/memory.h"
#include "cli/output.h"
#include "cli/session.h"
#include "eval/chart.h"
#include "json.h"
#include "kvfile.h"

// ---- reading ----

// What score, compress and map begin with: prefix and context as ids, and how they are read and
// scored.
typedef struct {
    Session s;
    Buffer text;
    Ids ids;  // prefix and context
    Progress progress;
    Context c;
} Reading;

// Whether what stays is fitted; new values alone cannot be drawn.
static bool wants_fit(const Options *o) {
    bool fits = o->bit == COMPRESS ? o->fit != FIT_NONE : o->bit == MAP && o->fit == FIT_BOTH;
    return fits && (wants_stream(o) || o->ratio < 1);
}

// A score is a float, and whether its pair stays a byte. While it is repeated a context is longer
// by what is repeated at a time; KVzip+ has a float for each query head as well.
static MemoryNeed reading_need(const Reading *r, int n_prefix) {
    const Options *o = r->s.o;
    const Config *m = &r->s.model.config;
    double n = r->ids.n, chunk = fmin((double)o->chunk, n);
    bool scored = !wants_stream(o) && (o->ratio < 1 || o->bit == SCORE);
    bool logs = strcmp(r->c.policy->name, "kvzip+") == 0;
    int stay = n_prefix + (int)(o->ratio * n), threads = pool_threads(r->s.pool);
    return (MemoryNeed){
        .tokens = n,
        .more = wants_fit(o) ? (double)fitting_bytes(&r->s.kv.shape, (int)n, stay, threads) : 0,
        .forked = scored ? chunk : 0,
        .n_prefix = n_prefix,
        .scores = scored ? 5 + 4.0 * logs * m->n_heads / m->n_kv_heads : 0,
        .evicts = o->bit == COMPRESS,
        .whole = scored};
}

static void open_reading(Reading *r, const Options *o) {
    Session *s = &r->s;
    int n_prefix = o->n_prefix < 0 ? 0 : (int)o->n_prefix;
    check_output(o);
    r->text = read_text(o, NULL);
    r->ids = (Ids){0};
    catch_signals();
    open_session(s, o, NULL, 1);
    r->c = chosen_method(s);
    if (!o->ids && o->n_prefix >= 0) die_usage(o->command, "--n-prefix goes with --ids");
    if (!o->ids) {
        prefix_ids(s, &r->ids);
        n_prefix = r->ids.n;
    }
    input_ids(s, &r->text, 0, &r->ids);
    if (n_prefix > r->ids.n)
        die_usage(o->command, "--n-prefix %d: %s has only %d ids", n_prefix, o->ids, r->ids.n);
    if (r->ids.n == 0) die("%s: nothing to read", o->ids ? o->ids : o->file ? o->file : "-p");
    warn_length(s, r->ids.n);
    show_prompt(s, "prefix", r->ids.id, n_prefix);
    show_prompt(s, "context", r->ids.id + n_prefix, r->ids.n - n_prefix);
    MemoryNeed need = reading_need(r, n_prefix);
    memory_check(s, &need);
    r->progress = progress_begin(s);
    Context *c = &r->c;
    c->state = &s->state, c->kv = &s->kv, c->tok = s->tok, c->seq = new_sequence(s);
    c->ids = r->ids.id, c->n_prefix = n_prefix, c->n_ctx = r->ids.n - n_prefix;
    c->postfix = repeat_postfix(s);
    c->progress = progress_step, c->progress_arg = &r->progress;
}

static void close_reading(Reading *r) {
    free(r->text.s);
    ids_free(&r->ids);
    close_session(&r->s);
}

// Prefill, and scores [context_scores(c)] if wanted. The result is malloc'ed, or NULL.
static float *read_context(Context *c, bool scored, const Progress *progress) {
    char err[ERR_LEN];
    c->kv->settling = !scored && !c->fitting;  // exact keys are scored, exact values fitted
    float *score = scored ? allocate(context_scores(c), sizeof *score) : NULL;
    int rc = scored ? context_score(c, c->policy, score, err) : context_read(c, err);
    progress_end(progress);
    if (rc != 0) die_failed(err);
    return score;
}

static void write_tensors(const char *path, const Meta *meta, int n_meta, const Tensor *t, int n) {
    char err[ERR_LEN];
    TensorWriter w;
    int rc = tensors_write_begin(&w, path, err);
    for (int i = 0; i < n_meta && rc == 0; i++)
        rc = tensors_write_meta(&w, meta[i].key, meta[i].value, err);
    for (int i = 0; i < n && rc == 0; i++)
        rc = tensors_write_declare(&w, t[i].name, t[i].dtype, t[i].n_dims, t[i].shape, err);
    for (int i = 0; i < n && rc == 0; i++) rc = tensors_write_put(&w, t[i].data, t[i].bytes, err);
    if (rc == 0) rc = tensors_write_commit(&w, err);
    if (rc != 0) die_file(path, err);
}

int cmd_score(const Options *o) {
    Reading in;
    char n_prefix[16];
    open_reading(&in, o);
    Session *s = &in.s;
    Context *c = &in.c;
    if (c->n_ctx == 0) die("the context is empty: there is nothing to score");
    float *score = read_context(c, true, &in.progress);
    int *layers = allocate(s->model.config.n_layers, sizeof *layers);
    size_t n_scored = kvcache_scored_layers(&s->kv.shape, layers), n_heads = s->kv.shape.n_kv_heads;
    snprintf(n_prefix, sizeof n_prefix, "%d", c->n_prefix);
    Meta meta[] = {{"format", "kvzip.c scores 1"},
                   {"fingerprint", s->model.fingerprint},
                   {"model", s->model.name},
                   {"policy", c->policy->name},
                   {"n_prefix", n_prefix}};
    size_t bytes = context_scores(c) * sizeof *score;
    Tensor tensors[] = {{"scores", T_F32, 3, {n_scored, n_heads, c->n_ctx}, score, bytes},
                        {"ids", T_I32, 1, {in.ids.n}, in.ids.id, in.ids.n * sizeof(int32_t)},
                        {"layers", T_I32, 1, {n_scored}, layers, n_scored * sizeof(int32_t)}};
    write_tensors(o->out, meta, sizeof meta / sizeof *meta, tensors, 3);
    if (o->json)
        json_print(stdout,
                   "{'n_prefix': %d, 'n_ctx': %d, 'prefill_s': %g, 'score_s': %g, 'path': %s}\n",
                   c->n_prefix, c->n_ctx, c->prefill_s, c->score_s, o->out);
    if (!o->quiet)
        note("[%d tokens read in %.2f s, scored in %.2f s]\n", in.ids.n, c->prefill_s, c->score_s);
    free(score);
    free(layers);
    close_reading(&in);
    return 0;
}

// Memory of this process alone, without files that are mapped; 0 where the system does not say.
static size_t private_memory(void) {
    long size, resident, shared;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f) return 0;
    int n = fscanf(f, "%ld %ld %ld", &size, &resident, &shared);
    fclose(f);
    return n == 3 ? (size_t)(resident - shared) * (size_t)sysconf(_SC_PAGESIZE) : 0;
}

typedef struct {
    long n_pairs, n_kept;  // of the context, in the layers that evict
    double ratio;          // n_kept / n_pairs
    size_t full, bytes;    // the cache before and after
    size_t peak;           // the cache at most
    size_t memory_full, memory;
} Shrunk;

// What is left once evicting is done; err is of the step before, which may have failed.
static void shrunk(Session *s, const Context *c, Shrunk *r, char *err) {
    if (r->n_kept < 0 || kvcache_settle(&s->kv, c->seq, err) != 0) die_failed(err);
    r->ratio = r->n_pairs > 0 ? (double)r->n_kept / r->n_pairs : 1;
    r->bytes = kvcache_bytes(&s->kv, c->seq);
    r->memory = private_memory();
}

// Reads the context and evicts meanwhile.
static Shrunk read_and_shrink(Session *s, Context *c, const Progress *progress) {
    char err[ERR_LEN];
    Shrunk r = {.n_pairs = (long)context_scores(c)};
    start_stream(s, c);
    c->after = stream_after, c->after_arg = &s->stream;
    free(read_context(c, false, progress));
    r.memory_full = private_memory();
    r.n_kept = stream_finish(&s->stream, err);
    r.peak = s->stream.peak;
    shrunk(s, c, &r, err);
    r.full = kvcache_unevicted_bytes(&s->kv, c->seq, c->n_prefix + c->n_ctx);
    return r;
}

// Evicts by the scores, which are freed before memory for new pages is needed; NULL: all stay.
static Shrunk shrink(Session *s, Context *c, float *score, const Progress *progress) {
    char err[ERR_LEN];
    Shrunk r = {.n_pairs = (long)context_scores(c),
                .full = kvcache_full_bytes(&s->kv, c->seq),
                .peak = kvcache_bytes(&s->kv, c->seq),
                .memory_full = private_memory()};
    r.n_kept = r.n_pairs;
    if (score) {
        uint8_t *keep = allocate(r.n_pairs, 1);
        r.n_kept = context_select(c, score, s->o->ratio, keep, err);
        free(score);
        if (r.n_kept >= 0 && context_evict(c, keep, s->o->demote >= 0, err) != 0) r.n_kept = -1;
        progress_end(progress);
        free(keep);
    }
    shrunk(s, c, &r, err);
    return r;
}

// What the context is compressed by, as flags would say it.
static KVInfo method_info(const Session *s, const Context *c) {
    const Options *o = s->o;
    const char *profile = o->profile ? o->profile : "model";
    return (KVInfo){.fingerprint = s->model.fingerprint,
                    .model = s->model.name,
                    .policy = c->policy->name,
                    .level = c->level->name,
                    .profile = uses_profile(c) ? profile : NULL,
                    .set = o->set,
                    .fit = c->fitting ? fit_kind_name(c->fitting->kind) : NULL};
}

// kept: the share achieved.
static void save_context(Session *s, const Context *c, double kept) {
    char err[ERR_LEN];
    char budget[24];
    KVInfo info = method_info(s, c);
    info.n_prefix = c->n_prefix, info.n_ctx = c->n_ctx;
    info.ids = c->ids, info.n_ids = c->n_prefix + c->n_ctx;
    info.ratio = s->o->budget > 0 ? kept : s->o->ratio;
    snprintf(budget, sizeof budget, "%ld", s->o->budget);
    if (s->o->budget > 0) info.budget = budget;
    if (kvfile_save(&s->kv, c->seq, s->o->out, &info, err) != 0) die_file(s->o->out, err);
}

static void compress_figures(const Session *s, const Context *c, const Shrunk *r) {
    const Options *o = s->o;
    const KVInfo how = method_info(s, c);
    char a[32], b[32];
    if (o->json) {
        json_print(stdout, "{'n_ctx': %d, 'kept': %g, 'bytes': %zu, 'full_bytes': %zu, ", c->n_ctx,
                   r->ratio, r->bytes, r->full);
        json_print(stdout,
                   "'prefill_s': %g, 'score_s': %g, 'fit_s': %g, 'n_prefix': %d, 'n_kept': %ld, ",
                   c->prefill_s, c->score_s, c->fit_s, c->n_prefix, r->n_kept);
        json_print(stdout,
                   "'n_pairs': %ld, 'peak_bytes': %zu, 'resident_full': %zu, 'resident': %zu, ",
                   r->n_pairs, r->peak, r->memory_full, r->memory);
        json_print(stdout, "'policy': %s, 'level': %s, 'profile': %s, 'set': %s, 'fit': %s, ",
                   how.policy, how.level, how.profile, how.set, how.fit);
        json_print(stdout, "'path': %s}\n", o->out);
    }
    out_flush();
    if (o->quiet) return;
    int n = c->n_prefix + c->n_ctx;
    note("[%d + %d tokens read in %.2f s, %.1f/s; scored in %.2f s", c->n_prefix, c->n_ctx,
         c->prefill_s, c->prefill_s > 0 ? n / c->prefill_s : 0, c->score_s);
    if (c->fit_s > 0) note(", fitted in %.2f s", c->fit_s);
    note("]\n");
    note("[policy %s, level %s", how.policy, how.level);
    if (how.profile) note(", profile %s", how.profile);
    if (how.set) note(", %s", how.set);
    if (how.fit) note(", fitted %s", how.fit);
    note(o->budget > 0 ? ", budget %.0f]\n" : ", ratio %g]\n",
         o->budget > 0 ? (double)o->budget : o->ratio);
    note("[kept %ld of %ld pairs, %.4f; cache %s -> %s", r->n_kept, r->n_pairs, r->ratio,
         size_text(a, r->full), size_text(b, r->bytes));
    if (r->peak < r->full) note(", %s at most", size_text(a, r->peak));
    if (r->memory_full > 0)
        note("; private memory %s -> %s", size_text(a, r->memory_full), size_text(b, r->memory));
    note("; saved as %s]\n", o->out);
}

// From here on c's queries are caught, where --fit asks for it.
static void open_fitting(Session *s, Context *c) {
    char err[ERR_LEN];
    if (!wants_fit(s->o) || c->n_ctx == 0) return;
    if (fitting_open(&s->fitting, (FitKind)s->o->fit, c, err) != 0) die("%s", err);
    c->fitting = &s->fitting;
}

int cmd_compress(const Options *o) {
    Reading in;
    if (wants_stream(o) && o->demote >= 0)
        die_usage(o->command, "--demote keeps what --stream and --budget evict: choose one");
    open_reading(&in, o);
    Session *s = &in.s;
    Context *c = &in.c;
    if (c->n_ctx == 0) warn(s, "the context is empty: only the prefix is saved");
    bool scored = o->ratio < 1 && c->n_ctx > 0;
    open_fitting(s, c);
    Shrunk r;
    if (wants_stream(o))
        r = read_and_shrink(s, c, &in.progress);
    else
        r = shrink(s, c, read_context(c, scored, &in.progress), &in.progress);
    save_context(s, c, r.ratio);
    compress_figures(s, c, &r);
    close_reading(&in);
    return 0;
}

// The biases [as keep] that what stays gets by fitting it, 0 where nothing stays. To be freed.
static float *fitted_biases(const Context *c, const uint8_t *keep, const Progress *progress) {
    char err[ERR_LEN];
    const KVShape *shape = &c->kv->shape;
    float *bias = allocate(context_scores(c), sizeof *bias);
    int rc = fitting_apply_whole(c->fitting, c, keep, err);
    progress_end(progress);
    if (rc != 0) die_failed(err);
    for (size_t i = 0; i < context_scores(c); i++) {
        int h = (int)(i / c->n_ctx), t = c->n_prefix + (int)(i % c->n_ctx);
        KVHeadAt at = {c->seq, kvcache_scored_layer(shape, h / shape->n_kv_heads),
                       h % shape->n_kv_heads};
        bias[i] = keep[i] ? kvcache_bias(c->kv, at, t) : 0;
    }
    return bias;
}

static void map_figures(const Options *o, const ChartMap *m) {
    long n_pairs = (long)m->n_layers * m->n_kv_heads * m->n_ctx;
    double stands_for = chart_stands_for(m);
    if (o->json) {
        json_print(stdout, "{'n_ctx': %d, 'kept': %g, 'n_kept': %ld, 'n_pairs': %ld, ", m->n_ctx,
                   (double)m->n_kept / n_pairs, m->n_kept, n_pairs);
        json_print(stdout, "'fit': %s, 'stands_for': %g, 'path': %s}\n", m->fit, stands_for,
                   o->out);
    }
    if (o->quiet) return;
    note("[%ld of %ld pairs stay", m->n_kept, n_pairs);
    if (m->bias) note(", each stands for %.2f", stands_for);
    note("; open %s]\n", o->out);
}

int cmd_map(const Options *o) {
    Reading in;
    char err[ERR_LEN];
    open_reading(&in, o);
    Session *s = &in.s;
    Context *c = &in.c;
    size_t n_pairs = context_scores(c);
    if (c->n_ctx == 0) die("the context is empty: there is nothing to show");
    if (n_pairs == 0) die("this model evicts from no layer: there is nothing to show");
    bool scored = o->ratio < 1;
    open_fitting(s, c);
    float *score = read_context(c, scored, &in.progress);
    uint8_t *keep = allocate(n_pairs, 1);
    memset(keep, 1, n_pairs);
    long kept = score ? context_select(c, score, o->ratio, keep, err) : (long)n_pairs;
    if (kept < 0) die("%s", err);
    int *layers = allocate(s->model.config.n_layers, sizeof *layers);
    float *bias = c->fitting ? fitted_biases(c, keep, &in.progress) : NULL;
    ChartMap map = {.model = s->model.name,
                    .policy = c->policy->name,
                    .level = c->level->name,
                    .fit = scored && o->fit != FIT_NONE ? fit_kind_name((FitKind)o->fit) : NULL,
                    .tok = s->tok,
                    .ids = c->ids + c->n_prefix,
                    .layer = layers,
                    .keep = keep,
                    .bias = bias,
                    .n_ctx = c->n_ctx,
                    .n_layers = kvcache_scored_layers(&s->kv.shape, layers),
                    .n_kv_heads = s->kv.shape.n_kv_heads,
                    .n_kept = kept};
    if (chart_map(&map, o->out, err) != 0) die_file(o->out, err);
    map_figures(o, &map);
    free(bias);
    free(layers);
    free(keep);
    free(score);
    close_reading(&in);
    return 0;
}
