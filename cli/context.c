// context.c: compress, score and map: a context is read, its pairs are scored, and the scores
// decide which pairs stay, are saved, or are drawn.
//
// Of several documents, or of one more for a saved cache, each is read with those before it in
// view, as far as they have stayed, then scored on its own and evicted before the next one comes.
// So the whole cache of all of them is never needed, and adding to a cache later gives the same
// bits as reading all at once.
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

// One document: ids [first, first + n) of what is read.
typedef struct {
    const char *name;
    int first, n;
} Part;

enum { MAX_PARTS = MAX_STOPS };

// What score, compress and map begin with: prefix and documents as ids, and how they are read and
// scored.
typedef struct {
    Session s;
    Ids ids;      // prefix and documents, with what separates them; those of --append as well
    int n_saved;  // ids that --append's cache has read
    Part part[MAX_PARTS];
    int n_parts;
    int *held;  // what c->held points to, once there are earlier documents
    Progress progress;
    Context c;
} Reading;

// Between two documents stands an empty line, which belongs to neither: it is never evicted.
static const char SEPARATOR[] = "\n\n";

// Whether what stays is fitted; new values alone cannot be drawn.
static bool wants_fit(const Options *o) {
    bool fits = o->bit == COMPRESS ? o->fit != FIT_NONE : o->bit == MAP && o->fit == FIT_BOTH;
    return fits && (wants_stream(o) || o->ratio < 1);
}

// Of the i-th document, when those before it have been evicted. While it is repeated a context is
// longer by what is repeated at a time.
static MemoryNeed part_need(const Reading *r, int i) {
    const Options *o = r->s.o;
    int from = i > 0 ? r->part[i - 1].first + r->part[i - 1].n : r->n_saved;
    int n_prefix = r->part[i].first - from;
    double n = n_prefix + r->part[i].n, chunk = fmin((double)o->chunk, n);
    bool scored = !wants_stream(o) && (o->ratio < 1 || o->bit == SCORE);
    double ratio = wants_threshold(o) ? 1 : o->ratio;
    int stay = n_prefix + (int)(ratio * n), threads = pool_threads(r->s.pool);
    double before = o->budget > 0 ? (double)(o->budget * i) : ratio * (from - r->n_saved);
    return (MemoryNeed){
        .tokens = n,
        .loaded = (double)r->s.kv.file.map_bytes +
                  before * (double)kvcache_token_bytes(&r->s.kv.shape, r->s.kv.types),
        .more = wants_fit(o) ? (double)fitting_bytes(&r->s.kv.shape, (int)n, stay, threads) : 0,
        .forked = scored ? chunk : 0,
        .n_prefix = n_prefix,
        .scores = scored ? memory_scores(&r->s, r->c.policy) : 0,
        .evicts = o->bit == COMPRESS,
        .whole = scored};
}

// For the document that needs most.
static void check_memory(const Reading *r) {
    MemoryNeed most = part_need(r, 0);
    double token = (double)kvcache_token_bytes(&r->s.kv.shape, kvcache_both(r->s.kv.type));
    for (int i = 1; i < r->n_parts; i++) {
        MemoryNeed need = part_need(r, i);
        if (need.tokens * token + need.loaded > most.tokens * token + most.loaded) most = need;
    }
    memory_check(&r->s, &most);
}

// Whether a saved cache can go on: a document's pairs are found by what lies before them.
static void check_extends(const Session *s, int seq) {
    const KVShape *shape = &s->kv.shape;
    int n_heads = shape->n_kv_heads * kvcache_scored_layers(shape, NULL);
    for (int h = 0; h < n_heads; h++) {
        KVHeadAt at = {seq, kvcache_scored_layer(shape, h / shape->n_kv_heads),
                       h % shape->n_kv_heads};
        bool first = kvcache_scored_head(&s->kv, seq, h)->len >= s->info.n_prefix;
        for (int t = 0; first && t < s->info.n_prefix; t++)
            first = kvcache_pair(&s->kv, at, t, NULL, NULL) == t;
        if (!first)
            die("%s: its prefix does not come first in all heads, as after --demote: nothing can "
                "follow",
                s->o->append);
    }
}

// The texts of -p, -f or --ids, all of them before any work. Returns how many.
static int read_texts(const Options *o, Buffer *text) {
    int n = 1;
    text[0] = read_text(o, NULL);
    for (; o->files[0] && o->files[n]; n++) text[n] = read_all(o, o->files[n]);
    return n;
}

// The i-th document behind what is there. The first --n-prefix ids of --ids are no part of it.
static void add_part(Reading *r, const Buffer *text, int i) {
    const Options *o = r->s.o;
    int own = o->n_prefix < 0 ? 0 : (int)o->n_prefix;
    const char *name = o->ids ? o->ids : o->files[i] ? o->files[i] : "-p";
    bool behind = i > 0 || o->append;
    if (behind && !o->ids) encode(r->s.tok, SEPARATOR, strlen(SEPARATOR), 0, &r->ids);
    int from = r->ids.n;
    input_ids(&r->s, text, 0, &r->ids);
    if (own > r->ids.n - from)
        die_usage(o->command, "--n-prefix %d: %s has only %d ids", own, o->ids, r->ids.n - from);
    r->part[i] = (Part){name, from + own, r->ids.n - from - own};
    if (r->ids.n == 0 || (behind && r->part[i].n == 0)) die("%s: nothing to read", name);
    show_prompt(&r->s, "context", r->ids.id + from + own, r->part[i].n);
}

// What stands before the first document.
static void open_prefix(Reading *r) {
    Session *s = &r->s;
    Context *c = &r->c;
    if (s->o->append) {
        c->seq = 0, c->n_prefix = s->info.n_prefix, r->n_saved = s->info.n_ids;
        check_extends(s, c->seq);
        for (int i = 0; i < r->n_saved; i++)
            if (ids_push(&r->ids, s->info.ids[i]) != 0) die_memory();
        return;
    }
    c->seq = new_sequence(s);
    if (!s->o->ids) prefix_ids(s, &r->ids);
    c->n_prefix = s->o->n_prefix < 0 ? r->ids.n : (int)s->o->n_prefix;
}

static void open_reading(Reading *r, const Options *o) {
    Session *s = &r->s;
    Buffer text[MAX_PARTS];
    *r = (Reading){0};
    check_output(o);
    if (!o->ids && o->n_prefix >= 0) die_usage(o->command, "--n-prefix goes with --ids");
    r->n_parts = read_texts(o, text);
    catch_signals();
    open_session(s, o, o->append, 1);
    Context *c = &r->c;
    *c = chosen_method(s);
    open_prefix(r);
    show_prompt(s, "prefix", r->ids.id, c->n_prefix);
    for (int i = 0; i < r->n_parts; i++) {
        add_part(r, &text[i], i);
        free(text[i].s);
    }
    warn_length(s, r->ids.n);
    check_memory(r);
    r->progress = progress_begin(s);
    c->state = &s->state, c->kv = &s->kv, c->tok = s->tok;
    c->ids = r->ids.id, c->n_ctx = r->part[0].n;
    c->postfix = repeat_postfix(s);
    c->progress = progress_step, c->progress_arg = &r->progress;
    r->held = allocate((size_t)context_heads(c) + 1, sizeof *r->held);
}

// The i-th document becomes the context; what separates it from earlier ones is read.
static void begin_part(Reading *r, int i) {
    char err[ERR_LEN];
    Context *c = &r->c;
    const Part *p = &r->part[i];
    int from = i > 0 ? p[-1].first + p[-1].n : r->n_saved;
    if (from == 0) return;
    Feed gap = {.seq = c->seq,
                .ids = r->ids.id + from,
                .n = p->first - from,
                .what = "read",
                .total = p->first - from};
    if (context_feed(c, &gap, err) != 0) die_failed(err);
    for (int h = 0; h < context_heads(c); h++)
        r->held[h] = kvcache_scored_head(c->kv, c->seq, h)->len - c->n_prefix;
    c->held = r->held, c->n_held = c->kv->seqs[c->seq].next_pos - c->n_prefix;
    c->ids = r->ids.id + p->first - c->n_prefix, c->n_ctx = p->n;
}

static void close_reading(Reading *r) {
    free(r->held);
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

// How one document came out.
typedef struct {
    int n_ctx;
    double prefill_s, score_s, fit_s;
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
    r->full = kvcache_unevicted_bytes(&s->kv, c->seq, s->kv.seqs[c->seq].next_pos);
    r->memory = private_memory();
    r->n_ctx = c->n_ctx;
    r->prefill_s = c->prefill_s, r->score_s = c->score_s, r->fit_s = c->fit_s;
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
    stream_close(&s->stream);
    c->after = NULL;
    shrunk(s, c, &r, err);
    return r;
}

// Evicts by the scores, which are freed before memory for new pages is needed; NULL: all stay.
static Shrunk shrink(Session *s, Context *c, float *score, const Progress *progress) {
    char err[ERR_LEN];
    Shrunk r = {.n_pairs = (long)context_scores(c),
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

// Adds to what KVInfo.documents says: which ids a document has, and how it was compressed.
static void note_part(Buffer *b, int first, int n, const KVInfo *how) {
    char text[256], choice[64];
    if (n == 0) return;
    if (how->budget)
        snprintf(choice, sizeof choice, "budget %s", how->budget);
    else
        snprintf(choice, sizeof choice, "ratio %g", how->ratio);
    snprintf(text, sizeof text, "%s%d-%d %.60s/%.60s %s%s%.20s", b->n > 0 ? "; " : "", first,
             first + n - 1, how->policy, how->level ? how->level : "?", choice,
             how->fit ? " fit " : "", how->fit ? how->fit : "");
    add_text(b, text, strlen(text));
}

// What is known of the whole cache: how the last document was compressed, and in a list all.
static void save_context(Reading *r, double kept) {
    char err[ERR_LEN], budget[24];
    Session *s = &r->s;
    const Context *c = &r->c;
    const Options *o = s->o;
    KVInfo info = method_info(s, c), *old = &s->info;
    Buffer documents = {0};
    snprintf(budget, sizeof budget, "%ld", o->budget);
    if (o->budget > 0) info.budget = budget;
    info.ratio = o->budget > 0 || wants_threshold(o) ? kept : o->ratio;
    if (old->documents)
        add_text(&documents, old->documents, strlen(old->documents));
    else if (o->append)
        note_part(&documents, old->n_prefix, old->n_ctx, old);
    for (int i = 0; i < r->n_parts; i++)
        note_part(&documents, r->part[i].first, r->part[i].n, &info);
    if (o->append || r->n_parts > 1) info.documents = documents.s;
    info.n_prefix = c->n_prefix, info.n_ctx = r->ids.n - c->n_prefix;
    info.ids = r->ids.id, info.n_ids = r->ids.n;
    if (kvfile_save(&s->kv, c->seq, o->out, &info, err) != 0) die_file(o->out, err);
    free(documents.s);
}

static void compress_json(const Reading *in, const Shrunk *r, const char *name) {
    const Context *c = &in->c;
    const KVInfo how = method_info(&in->s, c);
    json_print(stdout, "{'n_ctx': %d, 'kept': %g, 'bytes': %zu, 'full_bytes': %zu, ", r->n_ctx,
               r->ratio, r->bytes, r->full);
    json_print(stdout,
               "'prefill_s': %g, 'score_s': %g, 'fit_s': %g, 'n_prefix': %d, 'n_kept': %ld, ",
               r->prefill_s, r->score_s, r->fit_s, c->n_prefix, r->n_kept);
    json_print(stdout, "'n_pairs': %ld, 'peak_bytes': %zu, 'resident_full': %zu, 'resident': %zu, ",
               r->n_pairs, r->peak, r->memory_full, r->memory);
    json_print(stdout, "'policy': %s, 'level': %s, 'profile': %s, 'set': %s, 'fit': %s, ",
               how.policy, how.level, how.profile, how.set, how.fit);
    json_print(stdout, "'document': %s, 'path': %s}\n", name, in->s.o->out);
}

static void compress_notes(const Reading *in, const Shrunk *r, const Part *p) {
    const Options *o = in->s.o;
    const KVInfo how = method_info(&in->s, &in->c);
    char a[32], b[32];
    int n_prefix = in->n_parts > 1 || o->append ? 0 : in->c.n_prefix, n = n_prefix + r->n_ctx;
    if (in->n_parts > 1) note("[%s]\n", p->name);
    note("[%d + %d tokens read in %.2f s, %.1f/s; scored in %.2f s", n_prefix, r->n_ctx,
         r->prefill_s, r->prefill_s > 0 ? n / r->prefill_s : 0, r->score_s);
    if (r->fit_s > 0) note(", fitted in %.2f s", r->fit_s);
    note("]\n");
    note("[policy %s, level %s", how.policy, how.level);
    if (how.profile) note(", profile %s", how.profile);
    if (how.set) note(", %s", how.set);
    if (how.fit) note(", fitted %s", how.fit);
    if (wants_threshold(o))
        note("]\n");
    else
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

// What only a single document can be.
static void check_single(const Options *o) {
    bool several = o->append || (o->files[0] && o->files[1]);
    if (several && o->demote >= 0)
        die_usage(o->command, "--demote: nothing can follow a document whose pairs were demoted");
    if (several && o->fit != FIT_NONE)
        die_usage(o->command, "--fit: of several documents none can be fitted");
}

int cmd_compress(const Options *o) {
    Reading in;
    Shrunk r[MAX_PARTS];
    if (wants_stream(o) && o->demote >= 0)
        die_usage(o->command, "--demote keeps what --stream and --budget evict: choose one");
    check_single(o);
    open_reading(&in, o);
    Session *s = &in.s;
    Context *c = &in.c;
    if (c->n_ctx == 0) warn(s, "the context is empty: only the prefix is saved");
    open_fitting(s, c);
    for (int i = 0; i < in.n_parts; i++) {
        begin_part(&in, i);
        bool scored = o->ratio < 1 && c->n_ctx > 0;
        if (wants_stream(o))
            r[i] = read_and_shrink(s, c, &in.progress);
        else
            r[i] = shrink(s, c, read_context(c, scored, &in.progress), &in.progress);
    }
    save_context(&in, r[in.n_parts - 1].ratio);
    for (int i = 0; o->json && i < in.n_parts; i++) compress_json(&in, &r[i], in.part[i].name);
    out_flush();
    for (int i = 0; !o->quiet && i < in.n_parts; i++) compress_notes(&in, &r[i], &in.part[i]);
    close_reading(&in);
    return 0;
}

// What the cache holds of the context's tokens [n]: keep [scored heads][n] and, where bias is not
// NULL, their biases. Returns how many pairs.
static long held_pairs(const Context *c, int n, uint8_t *keep, float *bias) {
    const KVShape *shape = &c->kv->shape;
    long kept = 0;
    for (int h = 0; h < context_heads(c); h++) {
        KVHeadAt at = {c->seq, kvcache_scored_layer(shape, h / shape->n_kv_heads),
                       h % shape->n_kv_heads};
        for (int t = c->n_prefix; t < kvcache_scored_head(c->kv, c->seq, h)->len; t++) {
            size_t i = (size_t)h * n + kvcache_pair(c->kv, at, t, NULL, NULL) - c->n_prefix;
            keep[i] = 1, kept++;
            if (bias) bias[i] = kvcache_bias(c->kv, at, t);
        }
    }
    return kept;
}

static void map_figures(const Reading *in, const ChartMap *m) {
    const Options *o = in->s.o;
    long n_pairs = (long)m->n_layers * m->n_kv_heads * m->n_ctx;
    double stands_for = chart_stands_for(m);
    if (o->json) {
        json_print(stdout, "{'n_ctx': %d, 'kept': %g, 'n_kept': %ld, 'n_pairs': %ld, ", m->n_ctx,
                   (double)m->n_kept / n_pairs, m->n_kept, n_pairs);
        json_print(stdout, "'fit': %s, 'stands_for': %g, 'documents': [", m->fit, stands_for);
        for (int i = 0; i < in->n_parts; i++)
            json_print(stdout, i ? ", [%d, %d]" : "[%d, %d]", in->part[i].first - in->c.n_prefix,
                       in->part[i].n);
        json_print(stdout, "], 'path': %s}\n", o->out);
    }
    if (o->quiet) return;
    note("[%ld of %ld pairs stay", m->n_kept, n_pairs);
    if (m->bias) note(", each stands for %.2f", stands_for);
    note("; open %s]\n", o->out);
}

// Which pairs of all documents stay, in the cache that compress would save.
static void compress_parts(Reading *in) {
    char err[ERR_LEN];
    Context *c = &in->c;
    for (int i = 0; i < in->n_parts; i++) {
        begin_part(in, i);
        float *score = read_context(c, in->s.o->ratio < 1, &in->progress);
        if (!score) continue;
        uint8_t *keep = allocate(context_scores(c), 1);
        bool failed = context_select(c, score, in->s.o->ratio, keep, err) < 0 ||
                      context_evict(c, keep, false, err) != 0;
        progress_end(&in->progress);
        if (failed) die_failed(err);
        free(keep);
        free(score);
    }
}

int cmd_map(const Options *o) {
    Reading in;
    char err[ERR_LEN];
    check_single(o);
    open_reading(&in, o);
    Session *s = &in.s;
    Context *c = &in.c;
    int n = in.ids.n - c->n_prefix;
    size_t n_pairs = (size_t)context_heads(c) * (size_t)n;
    if (c->n_ctx == 0) die("the context is empty: there is nothing to show");
    if (n_pairs == 0) die("this model evicts from no layer: there is nothing to show");
    open_fitting(s, c);
    compress_parts(&in);
    uint8_t *keep = allocate(n_pairs, 1);
    float *bias = c->fitting ? allocate(n_pairs, sizeof *bias) : NULL;
    memset(keep, 0, n_pairs);
    for (size_t i = 0; bias && i < n_pairs; i++) bias[i] = 0;
    long kept = held_pairs(c, n, keep, bias);
    int *layers = allocate(s->model.config.n_layers, sizeof *layers);
    ChartMap map = {
        .model = s->model.name,
        .policy = c->policy->name,
        .level = c->level->name,
        .fit = o->ratio < 1 && o->fit != FIT_NONE ? fit_kind_name((FitKind)o->fit) : NULL,
        .tok = s->tok,
        .ids = in.ids.id + c->n_prefix,
        .layer = layers,
        .keep = keep,
        .bias = bias,
        .n_ctx = n,
        .n_layers = kvcache_scored_layers(&s->kv.shape, layers),
        .n_kv_heads = s->kv.shape.n_kv_heads,
        .n_kept = kept};
    if (chart_map(&map, o->out, err) != 0) die_file(o->out, err);
    map_figures(&in, &map);
    free(bias);
    free(layers);
    free(keep);
    close_reading(&in);
    return 0;
}
