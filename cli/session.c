// session.c: what is open while a command runs.
//
// Commands open what they need in one line and close all of it in another; what cannot be opened is
// the end of the program, so that none of them has to ask.
#define _POSIX_C_SOURCE 200809L
#include "cli/session.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cli/input.h"
#include "cli/output.h"
#include "text.h"
#include "weights.h"

enum { DRAFT = 4 };  // where nothing is said: longer ones lose in company

void warn(const Session *s, const char *fmt, ...) {
    va_list ap;
    if (s->o->quiet) return;
    va_start(ap, fmt);
    warning_list(fmt, ap);
    va_end(ap);
}

void open_model(Session *s, const Options *o) {
    char err[ERR_LEN];
    *s = (Session){.o = o};
    if (model_open(&s->model, o->args[0], err) != 0) die("%s: %s", o->args[0], err);
    s->tok = tokenizer_open(&s->model.file, err);
    if (!s->tok) die("%s: %s", o->args[0], err);
}

// As many threads as wanted, but no more than can run: the others would only be waited for.
static ThreadPool *open_pool(const Session *s, long wanted) {
    int n = wanted > 0 ? min_int((int)wanted, cores_allowed()) : cores_default();
    if (wanted > n)
        warn(s, "-j %ld: this process may use %d processor%s, so %d thread%s", wanted, n,
             n == 1 ? "" : "s", n, n == 1 ? "" : "s");
    ThreadPool *pool = pool_open(n);
    if (!pool) die("-j %d: the threads cannot be made", n);
    return pool;
}

KVTypes get_kv(const Options *o, const char *name) {
    KVTypes types;
    if (kvcache_types_parse(name, &types) == 0) return types;
    die_usage(o->command, "--kv %s: needs f16, f32, q8, q4, q2 or keys/values, as in q8/q4", name);
}

static void open_cache(Session *s, const char *path) {
    char err[ERR_LEN];
    KVShape shape = model_kv_shape(&s->model);
    KVTypes types = get_kv(s->o, s->o->kv ? s->o->kv : "f16");
    if (!path) {
        if (kvcache_open(&s->kv, &shape, types, s->pool, err) != 0) die("%s", err);
        return;
    }
    KVModel model = {shape, s->model.fingerprint};
    if (kvfile_load(&s->kv, path, &model, s->pool, &s->info, err) != 0) die("%s: %s", path, err);
    char name[KV_NAME];
    if (s->o->kv && (s->kv.types.k != types.k || s->kv.types.v != types.v))
        warn(s, "%s holds %s pairs, --kv does not change that", path,
             kvcache_types_name(s->kv.types, name));
}

// Where the weights lie, by --weights.
static void place_weights(Session *s) {
    char err[ERR_LEN], size[32];
    enum { MAPPED, COPIED, AUTO };
    int how = s->o->weights;
    TensorFile *file = &s->model.file;
    if (how < 0) how = s->o->bit & (CHAT | SERVE | EVAL | CALIBRATE | BENCH) ? AUTO : MAPPED;
    bool sparse = s->model.config.n_experts > 0;  // what no token uses is to stay on the disk
    if (how == MAPPED || (how == AUTO && (sparse || !weights_should_copy(file)))) return;
    double start = now();
    if (weights_copy(file, how == COPIED ? INFINITY : 3, err) != 0) die("%s: %s", file->path, err);
    if (!s->o->quiet)
        note("[weights of %s copied in %.2f s, %.0f%% in large pages]\n",
             size_text(size, (double)file->map_bytes), now() - start,
             100 * fmax(weights_large(file), 0));
}

void open_session(Session *s, const Options *o, const char *path, int max_logits) {
    char err[ERR_LEN];
    if (kernels_init(o->isa) != 0)
        die_usage(o->command, "--isa %s: this machine or this program has no such set",
                  o->isa ? o->isa : "");
    open_model(s, o);
    place_weights(s);
    const char *refused = tokenizer_chat(s->tok)->system_refused;
    if (o->system && !o->raw && refused[0])
        die("--system: the chat template of %s takes none: %s", o->args[0], refused);
    s->pool = open_pool(s, o->threads);
    if (state_open(&s->state, &s->model, s->pool, MAX_ROWS, max_logits, err) != 0) die("%s", err);
    open_cache(s, path);
}

void close_session(Session *s) {
    answer_close(&s->answerer);
    stream_close(&s->stream);
    free(s->held);
    schema_close(s->schema);
    pieces_close(s->pieces);
    fitting_close(&s->fitting);
    ids_free(&s->question);
    profile_close(&s->profile);
    kvcache_close(&s->kv);
    state_close(&s->state);
    tokenizer_close(s->tok);
    model_close(&s->model);
    pool_close(s->pool);
}

int new_sequence(Session *s) {
    char err[ERR_LEN];
    int seq = kvcache_new(&s->kv, err);
    if (seq < 0) die("%s", err);
    return seq;
}

// The form of --json-object or --json-schema.
static void open_form(Session *s) {
    char err[ERR_LEN];
    const Options *o = s->o;
    const char *given = o->json_schema;
    size_t n = given ? strlen(given) : 0;
    bool is_file = given && given[strspn(given, " \t\r\n")] != '{';
    char *text = is_file ? file_read(given, &n, err) : NULL;
    if (is_file && !text) die("--json-schema %s: %s", given, err);
    s->pieces = pieces_open(s->tok, s->model.config.vocab_size, err);
    if (!s->pieces) die("%s: %s", o->args[0], err);
    s->schema = schema_open(is_file ? text : given, n, s->pieces, err);
    if (!s->schema) die("--json-schema%s%s: %s", is_file ? " " : "", is_file ? given : "", err);
    free(text);
}

int draft_length(const Options *o) { return o->draft < 0 ? DRAFT : (int)o->draft; }

// Where --draft says nothing.
static void warn_draft(Session *s) {
    const char *why = NULL;
    if (s->o->draft <= 0) return;
    if (s->schema || !sampling_is_plain(&s->sampling)) why = "tokens are not always the likeliest";
    if (wants_stream(s->o)) why = "pairs are evicted as tokens come";
    if (why) warn(s, "--draft has no effect: %s", why);
}

void open_answers(Session *s, double temp) {
    char err[ERR_LEN];
    const Options *o = s->o;
    uint64_t clock = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    s->seed = o->seed >= 0 ? o->seed : (long)(random_next(&clock) % 1000000000u);
    s->sampling = (Sampling){.temp = o->temp < 0 ? temp : o->temp,
                             .top_p = o->top_p,
                             .random = (uint64_t)s->seed,
                             .top_k = (int)o->top_k,
                             .min_p = o->min_p,
                             .last_n = (int)o->last_n,
                             .repeat_penalty = o->repeat_penalty,
                             .frequency_penalty = o->frequency_penalty,
                             .presence_penalty = o->presence_penalty,
                             .bias = o->biases.v,
                             .n_bias = o->biases.n,
                             .temp_last = o->temp_last};
    if (sampling_check(&s->sampling, s->model.config.vocab_size, err) != 0) die("%s", err);
    if (o->json_object || o->json_schema) open_form(s);
    if (answer_open(&s->answerer, &s->state, &s->kv, s->tok, err) != 0) die("%s", err);
    warn_draft(s);
}

void warn_length(Session *s, long positions) {
    if (s->warned || positions <= s->model.config.seq_len) return;
    s->warned = true;
    warn(s, "%ld positions, but the model was trained for %d", positions, s->model.config.seq_len);
}

// ---- progress ----

Progress progress_begin(const Session *s) {
    return (Progress){.on = !s->o->quiet && moves_cursor(), .last = now()};
}

int progress_step(void *arg, const char *what, long done, long total) {
    static const char full[] = "##############################";
    enum { WIDTH = sizeof full - 1 };
    Progress *p = arg;
    double t = now();
    if (p->what != what) p->start = p->last;
    p->what = what;
    p->last = t;
    double elapsed = t - p->start;
    if (done > total) done = total;
    if (p->on && done > 0 && elapsed >= 0.5 && t - p->shown >= 0.1) {
        int bar = (int)(WIDTH * done / total), left = (int)(elapsed / done * (total - done) + 0.5);
        fprintf(stderr, "\r%-8s [%.*s%*s] %3ld%%  %.0f %s/s  %d:%02d left \033[K", what, bar, full,
                WIDTH - bar, "", 100 * done / total, done / elapsed, p->unit ? p->unit : "tokens",
                left / 60, left % 60);
        p->shown = t;
    }
    return interrupted != 0;
}

void progress_end(const Progress *p) {
    if (p->on && p->shown > 0) fputs("\r\033[K", stderr);
}

// ---- texts ----

void input_ids(const Session *s, const Buffer *text, unsigned how, Ids *ids) {
    if (s->o->ids)
        parse_ids(text, s->o->ids, s->model.config.vocab_size, ids);
    else
        encode(s->tok, text->s, text->n, how, ids);
}

void prefix_ids(const Session *s, Ids *ids) {
    char err[ERR_LEN];
    const Options *o = s->o;
    TalkOpening opening = {.tok = s->tok, .system = o->system, .task = o->task, .raw = o->raw};
    if (talk_opening(&opening, ids, err) != 0) die("%s%s", o->system ? "--system: " : "", err);
}

const char *repeat_postfix(const Session *s) {
    return s->o->raw ? "\n" : tokenizer_chat(s->tok)->kvzip_postfix;
}

void show_prompt(const Session *s, const char *what, const int *id, int n) {
    if (!s->o->verbose_prompt) return;
    note("[%s: %d tokens]\n", what, n);
    for (int i = 0; i < n; i++) {
        int bytes;
        const char *piece = tokenizer_piece(s->tok, id[i], &bytes);
        note("%8d '%.*s'%s\n", id[i], bytes, piece,
             tokenizer_is_special(s->tok, id[i]) ? " special" : "");
    }
}

// ---- the method: who scores, and who competes with whom ----

static void add_name(Buffer *names, const char *name) {
    add_text(names, " ", 1);
    add_text(names, name, strlen(name));
}

const Policy *get_policy(const Options *o, const char *name) {
    const Policy *policy = policy_find(name);
    if (policy) return policy;
    const char *why = policy_why_not(name);
    if (why) die_usage(o->command, "--policy %s is not one of them: it %s", name, why);
    Buffer names = {0};
    for (const Policy *p = policies; p->name; p++) add_name(&names, p->name);
    die_usage(o->command, "--policy %s: there are%s", name, names.s);
}

const Level *get_level(const Options *o, const char *name) {
    const Level *level = level_find(name);
    if (level) return level;
    Buffer names = {0};
    for (const Level *l = levels; l->name; l++) add_name(&names, l->name);
    die_usage(o->command, "--level %s: there are%s", name, names.s);
}

// ---- readers ----

const char *reader_name(const Reads *reads) { return reads->row ? reads->row->name : "none"; }

static const Reader *get_reader(const Options *o, const char *name) {
    const Reader *reader = reader_find(name);
    if (reader || strcmp(name, "none") == 0) return reader;
    Buffer names = {0};
    add_name(&names, "none");
    for (const Reader *r = readers; r->name; r++) add_name(&names, r->name);
    die_usage(o->command, "--reader %s: there are%s", name, names.s);
}

// Whether one of the readers has the parameter key [n].
static bool is_readers(const Session *s, const char *key, size_t n) {
    for (int i = 0; i < s->n_reads; i++)
        if (s->reads[i].row && param_find(s->reads[i].row->params, key, n) >= 0) return true;
    return false;
}

void choose_readers(Session *s) {
    char err[ERR_LEN];
    const Options *o = s->o;
    const char *list = o->reader ? o->reader : "";
    bool compares = o->reader && (o->bit & (BENCH | EVAL));
    int most = compares ? BENCH_LIST : 1;
    if (compares) s->n_reads = 1;  // all pages, first
    for (const char *at = list; *at; at += *at == ',') {
        size_t n = strcspn(at, ",");
        if (s->n_reads == most)
            die_usage(o->command, "--reader %s: needs %s", list, most > 1 ? "fewer" : "one name");
        char *name = copy_text(at, n);
        const Reader *reader = get_reader(o, name);
        free(name);
        at += n;
        if (!reader) continue;
        if (reader_set(&s->reads[s->n_reads++], reader, o->set, err) != 0)
            die_usage(o->command, "--set %s: %s", o->set, err);
    }
    if (!*list && o->reader) die_usage(o->command, "--reader: needs a name");
}

// No policy takes what the reader does not know.
static void check_reader_set(const Session *s) {
    const Options *o = s->o;
    for (const char *at = o->set; at && *at; at += strcspn(at, ","), at += *at == ',') {
        size_t n = strcspn(at, "=,");
        if (!is_readers(s, at, n))
            die_usage(o->command, "--set %s: reader %s has no parameter '%.*s'", o->set,
                      reader_name(&s->reads[0]), (int)n, at);
    }
}

void open_reader(Session *s) {
    char err[ERR_LEN];
    choose_readers(s);
    if (!wants_stream(s->o)) check_reader_set(s);
    if (s->n_reads > 0 && reader_begin(&s->reads[0], &s->kv, err) != 0) die("%s", err);
}

const char *reading_text(const Session *s, char text[64]) {
    text[0] = '\0';
    if (s->n_reads > 0 && s->reads[0].row)
        snprintf(text, 64, "; %s read %.3f of the pages", s->reads[0].row->name,
                 kvcache_read_share(&s->kv));
    return text;
}

// What of --set is for policy and level: what they know, and what no reader does. To be freed.
static char *method_set(const Session *s, const Policy *p, const Level *l) {
    Buffer known = {0};
    if (s->n_reads == 0) return s->o->set ? copy_text(s->o->set, strlen(s->o->set)) : NULL;
    for (const char *at = s->o->set; at && *at; at += *at == ',') {
        size_t n = strcspn(at, ","), key = strcspn(at, "=,");
        bool theirs = param_find(p->params, at, key) >= 0 || param_find(l->params, at, key) >= 0;
        if (theirs || !is_readers(s, at, key)) {
            if (known.n > 0) add_text(&known, ",", 1);
            add_text(&known, at, n);
        }
        at += n;
    }
    return known.s;
}

// ---- profiles and defaults ----

void open_profile(Session *s) {
    char err[ERR_LEN];
    const char *path = s->o->profile;
    if (!path && !profile_carried(&s->model)) return;
    if (profile_open(&s->profile, &s->model, path, err) != 0)
        die("%s: %s", path ? path : s->o->args[0], err);
    s->has_profile = true;
}

const char *chosen_policy(const Session *s) {
    if (s->o->policy) return s->o->policy;
    return default_policy(s->has_profile, wants_stream(s->o));
}

const char *chosen_level(const Session *s) {
    return s->o->level ? s->o->level : default_level(chosen_policy(s), s->has_profile);
}

void give_question(Session *s, Context *c, const Policy *p) {
    char err[ERR_LEN];
    const Options *o = s->o;
    size_t n;
    bool by_task = p->asks == ASKS_TASK && o->bit != EVAL;
    const char *text = by_task && !o->question ? o->task : o->question;
    const char *also = by_task ? " or --task" : o->bit == EVAL ? " or --question-each" : "";
    if (o->each && o->question)
        die_usage(o->command, "--question and --question-each are two questions: choose one");
    if (!text && !o->each && p->asks >= ASKS_ALWAYS)
        die_usage(o->command, "policy %s needs --question TEXT%s: it scores by what will be asked",
                  p->name, also);
    if (!text || p->asks == ASKS_NOTHING || s->question.n > 0) return;
    Talk talk = {.tok = s->tok, .raw = o->raw, .on_context = true};
    stripped(text, strlen(text), &n);
    if (n == 0) die_usage(o->command, "--question%s: there is no question in it", also);
    if (talk_ask(&talk, text, "", &s->question, err) != 0) die("%s", err);
    show_prompt(s, "question", s->question.id, s->question.n);
    c->question = s->question.id, c->n_question = s->question.n;
}

Context chosen_method(Session *s) {
    char err[ERR_LEN];
    const Options *o = s->o;
    open_profile(s);
    Context c = {.chunk = (int)o->chunk,
                 .local = o->score_attn == 1,
                 .ref_ties = o->ref_ties,
                 .profile = s->has_profile ? &s->profile : NULL};
    const Policy *policy = get_policy(o, chosen_policy(s));
    const Level *level = get_level(o, chosen_level(s));
    char *set = method_set(s, policy, level);
    if (context_set(&c, policy, level, set, err) != 0)
        die_usage(o->command, "--set %s: %s", o->set, err);
    free(set);
    give_question(s, &c, policy);
    if (o->question && policy->asks == ASKS_NOTHING)
        warn(s, "--question has no effect: policy %s asks none", policy->name);
    if (o->profile && !uses_profile(&c))
        warn(s, "--profile has no effect: policy %s and level %s do not use it", policy->name,
             level->name);
    return c;
}

void start_stream(Session *s, Context *c) {
    char err[ERR_LEN];
    const Options *o = s->o;
    if (stream_open(&s->stream, c, o->ratio, o->budget, (int)o->window, err) != 0) die("%s", err);
    s->streams = true;
    s->answerer.after = stream_after, s->answerer.after_arg = &s->stream;
}

// The pairs of a saved cache stay, whatever comes behind them.
static void hold_saved(Session *s, Context *c) {
    int n = context_heads(c);
    c->n_prefix = s->info.n_prefix;
    c->n_held = s->kv.seqs[c->seq].next_pos - c->n_prefix;
    c->held = s->held = allocate((size_t)n + 1, sizeof *s->held);
    for (int h = 0; h < n; h++)
        s->held[h] = kvcache_scored_head(&s->kv, c->seq, h)->len - c->n_prefix;
}

// The first tokens stay because models look there when nothing else fits (arXiv 2309.17453).
void stream_sequence(Session *s, int seq, int n_prefix) {
    enum { SINK = 4 };
    Context *c = &s->context;
    if (!wants_stream(s->o)) return;
    *c = chosen_method(s);
    c->state = &s->state, c->kv = &s->kv, c->tok = s->tok;
    c->seq = seq, c->n_prefix = max_int(n_prefix, SINK);
    if (s->info.n_ids > 0) hold_saved(s, c);
    start_stream(s, c);
    if (!s->o->quiet)
        fprintf(stderr, "[evicting: policy %s, level %s]\n", s->context.policy->name,
                s->context.level->name);
}
