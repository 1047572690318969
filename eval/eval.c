// eval.c: what compressing costs, for each policy, level, fit, ratio and page type.
//
// A context is read once per page type; a policy scores it once, on exact keys, and its scores
// serve all ratios, levels, fits and page types: each of these evicts from a fork. What results
// there are already is planned first, so that nothing is read or scored for cells that are known.
// The full cache is planned like a policy, before all others, and ratio 1 is the full cache under
// another name. Cells go to the results as they are done.
#define _POSIX_C_SOURCE 200809L
#include "eval/eval.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "eval/ask.h"
#include "policies/stream.h"
#include "util.h"

typedef struct {
    const Eval *e;
    EvalResults *results;
    Asking asking;          // of the context at hand
    Ids ids;                // prefix and context
    Ids question;           // that the policy at hand sees, with Eval.each
    KVCache kv[EVAL_LIST];  // one of each page type
    int full[EVAL_LIST];    // the sequence in each that holds the context, nothing settled yet
    int yardstick;          // the first of them, settled
    Fitting fitting;        // to queries that passed while the policy at hand scored
    float *score;           // of the policy at hand
    uint8_t *keep;
    long done, total;  // questions times cells
    long known;        // of those done, what the results had
} Run;

static int report(const Run *r, char *err) {
    const Eval *e = r->e;
    if (e->progress && e->progress(e->progress_arg, r->done - r->known, r->total - r->known) != 0)
        return fail(err, "interrupted");
    return 0;
}

static int on_step(void *arg) {
    char err[ERR_LEN];
    return report(arg, err);
}

static int on_context(void *arg, const char *what, long done, long total) {
    (void)what, (void)done, (void)total;
    return on_step(arg);
}

// ---- parameters ----

// One --set serves several policies: each takes the keys that it or its level knows.
static int set_method(const Eval *e, Context *c, const Policy *p, const Level *l, char *err) {
    char known[ERR_LEN];
    size_t used = 0;
    *known = '\0';
    for (const char *s = e->set; s && *s; s += *s == ',') {
        size_t n = strcspn(s, ","), key = strcspn(s, "=,");
        if (param_find(p->params, s, key) >= 0 || param_find(l->params, s, key) >= 0) {
            if (used + n + 2 > sizeof known) return fail(err, "too many parameters");
            used += (size_t)sprintf(known + used, "%s%.*s", used ? "," : "", (int)n, s);
        }
        s += n;
    }
    return context_set(c, p, l, known, err);
}

int eval_check_set(const Eval *e, char *err) {
    Context c = e->context;
    for (const char *s = e->set; s && *s; s += *s == ',') {
        size_t key = strcspn(s, "=,");
        bool known = false;
        for (int i = 0; i < e->n_policies; i++)
            known = known || param_find(e->policy[i]->params, s, key) >= 0;
        for (int i = 0; i < e->n_levels; i++)
            known = known || param_find(e->level[i]->params, s, key) >= 0;
        for (int i = 0; i < e->n_kvs; i++)
            known = known ||
                    (e->kv[i].reads.row && param_find(e->kv[i].reads.row->params, s, key) >= 0);
        if (!known)
            return fail(err, "no policy, level or reader here has a parameter '%.*s'", (int)key, s);
        s += strcspn(s, ",");
    }
    for (int i = 0; i < e->n_policies * e->n_levels; i++)
        if (set_method(e, &c, e->policy[i / e->n_levels], e->level[i % e->n_levels], err) != 0)
            return -1;
    return 0;
}

// ---- one context ----

// The context at hand in sequence seq of cache kv, no method chosen yet.
static Context context_of(Run *r, int kv, int seq) {
    Context c = r->e->context;
    c.state = r->e->state, c.kv = &r->kv[kv], c.seq = seq, c.ids = r->ids.id;
    c.n_prefix = r->e->prefix->n, c.n_ctx = r->ids.n - c.n_prefix;
    c.progress = on_context, c.progress_arg = r;
    if (r->question.n > 0) c.question = r->question.id, c.n_question = r->question.n;
    return c;
}

// Reads prefix and context into each cache, and asks the full one.
static int read_context(Run *r, char *err) {
    const Eval *e = r->e;
    const EvalTask *task = r->asking.task;
    r->ids.n = 0;
    for (int i = 0; i < e->prefix->n; i++)
        if (ids_push(&r->ids, e->prefix->id[i]) != 0) return fail(err, "out of memory");
    if (tokenizer_encode(e->context.tok, task->context, strlen(task->context), 0, &r->ids) != 0)
        return fail(err, "out of memory");
    if (r->ids.n == e->prefix->n)
        return fail(err, "task %s, line %d: an empty context", task->task, task->line);
    for (int k = 0; k < e->n_kvs; k++) {
        if ((r->full[k] = kvcache_new(&r->kv[k], err)) < 0) return -1;
        Context c = context_of(r, k, r->full[k]);
        if (context_read(&c, err) != 0) return -1;
    }
    r->yardstick = kvcache_fork(&r->kv[0], r->full[0], err);
    if (r->yardstick < 0 || kvcache_settle(&r->kv[0], r->yardstick, err) != 0) return -1;
    r->asking.full_seq = r->yardstick;
    return asking_open(&r->asking, err);
}

// ---- one cell ----

typedef struct {
    EvalCell c;
    const Policy *policy;  // NULL: full
    const Level *level;
    FitKind fit;
    int kv;
} Cell;

// Evicts from the context as it was read, or demotes. Returns the pairs that stay, or -1.
static long shrink_context(Run *r, Context *c, const Cell *cell, char *err) {
    long kept = context_select(c, r->score, cell->c.ratio, r->keep, err);
    if (kept < 0) return -1;
    r->fitting.kind = cell->fit, c->fitting = &r->fitting;
    return context_evict(c, r->keep, r->e->kv[cell->kv].demote, err) == 0 ? kept : -1;
}

// Reads the context and evicts meanwhile. Returns the pairs that stay, or -1.
static long stream_context(Run *r, Context *c, const Cell *cell, char *err) {
    Stream s;
    if (cell->fit != FIT_NONE) {
        fitting_close(&r->fitting);
        if (fitting_open(&r->fitting, cell->fit, c, err) != 0) return -1;
        c->fitting = &r->fitting;
    }
    if (stream_open(&s, c, cell->c.ratio, 0, r->e->window, err) != 0) return -1;
    c->after = stream_after, c->after_arg = &s;
    c->kv->settling = cell->fit == FIT_NONE;
    long kept = context_read(c, err) == 0 ? stream_finish(&s, err) : -1;
    c->kv->settling = false;
    stream_close(&s);
    return kept;
}

// The cell's cache, settled; or -1. A fork of the full one from which all but the best pairs are
// gone, or demoted; with stream, a sequence that was evicted while it grew.
static int evicted(Run *r, Cell *cell, char *err) {
    KVCache *kv = &r->kv[cell->kv];
    Context c = context_of(r, cell->kv, -1);
    size_t n_pairs = context_scores(&c);
    bool evicts = cell->c.ratio < 1 && n_pairs > 0;
    bool streams = evicts && r->e->stream;
    c.seq = streams ? kvcache_new(kv, err) : kvcache_fork(kv, r->full[cell->kv], err);
    if (c.seq < 0) return -1;
    cell->c.kept = 1;
    if (evicts) {
        if (set_method(r->e, &c, cell->policy, cell->level, err) != 0) return -1;
        long kept = streams ? stream_context(r, &c, cell, err) : shrink_context(r, &c, cell, err);
        if (kept < 0) return -1;
        cell->c.kept = (double)kept / (double)n_pairs;
    }
    return kvcache_settle(kv, c.seq, err) == 0 ? c.seq : -1;
}

// ---- how fast answers come ----

static bool same_method(const EvalCell *a, const EvalCell *b) {
    return a->ratio == b->ratio && strcmp(a->policy, b->policy) == 0 &&
           strcmp(a->level, b->level) == 0 && strcmp(a->fit, b->fit) == 0 &&
           strcmp(a->kv, b->kv) == 0;
}

// Whether there are few measurements of the cell's method yet.
static bool needs_speed(const Run *r, const EvalCell *c) {
    enum { ENOUGH = 3 };
    int n = 0;
    for (int i = 0; i < r->results->n && n < ENOUGH; i++)
        n += r->results->cell[i].speed > 0 && same_method(&r->results->cell[i], c);
    return r->e->timed && n < ENOUGH;
}

// Tokens/s of one sequence that goes on after seq, on a fork, with tokens of the context.
static int measure_speed(Run *r, KVCache *kv, int seq, double *speed, char *err) {
    enum { WARM = 2, TOKENS = 16 };
    int fork = kvcache_fork(kv, seq, err);
    if (fork < 0) return -1;
    double start = 0;
    for (int i = 0; i < WARM + TOKENS; i++) {
        if (i == WARM) start = now();
        Row row = {fork, r->ids.id[i % r->ids.n], true};
        if (forward(r->e->state, kv, &row, 1, err) != 0) return -1;
    }
    *speed = TOKENS / fmax(now() - start, 1e-9);
    kvcache_drop(kv, fork);
    return 0;
}

// Asks the cell's cache the questions of the group.
static int run_cell(Run *r, Cell *cell, char *err) {
    KVCache *kv = &r->kv[cell->kv];
    int seq = evicted(r, cell, err);
    if (seq < 0) return -1;
    cell->c.bytes = kvcache_bytes(kv, seq);
    if (cell->c.speed == 0 && needs_speed(r, &cell->c) &&
        measure_speed(r, kv, seq, &cell->c.speed, err) != 0)
        return -1;
    if (asking_put(&r->asking, kv, seq, &cell->c, err) != 0) return -1;
    kvcache_drop(kv, seq);
    r->done += r->asking.end - r->asking.begin;
    return report(r, err);
}

// Scores the context, unless no cell needs that, on a sequence of its own.
static int score_context(Run *r, const Policy *p, const Cell *plan, int n, char *err) {
    bool needed = false, fits = false;
    for (int i = 0; i < n; i++) {
        needed = needed || plan[i].c.ratio < 1;
        fits = fits || (plan[i].c.ratio < 1 && plan[i].fit != FIT_NONE);
    }
    if (!p || !needed || r->e->stream) return 0;
    int seq = kvcache_new(&r->kv[0], err);
    if (seq < 0) return -1;
    Context c = context_of(r, 0, seq);
    free(r->score);
    free(r->keep);
    r->score = malloc((context_scores(&c) + 1) * sizeof *r->score);
    r->keep = malloc(context_scores(&c) + 1);
    if (!r->score || !r->keep)
        return fail(err, "out of memory for the scores of %d tokens", c.n_ctx);
    int rc = set_method(r->e, &c, p, r->e->level[0], err);
    fitting_close(&r->fitting);
    if (rc == 0 && fits) {  // each cell says what its queries serve for
        rc = fitting_open(&r->fitting, FIT_NONE, &c, err);
        c.fitting = &r->fitting;
    }
    if (rc == 0) rc = context_score(&c, p, r->score, err);
    kvcache_drop(&r->kv[0], seq);
    return rc;
}

// Whether p sees each question that is asked.
static bool sees_each(const Eval *e, const Policy *p) {
    return e->each && p && p->asks != ASKS_NOTHING;
}

// The question of the group, of which it is the only one, becomes what the policy sees: without the
// start of its answer, as --question is.
static int take_question(Run *r, char *err) {
    EvalQuestion q = *r->asking.asked[r->asking.begin].q;
    q.answer_prefix = "";
    r->question.n = 0;
    return r->e->ask(r->e->ask_arg, &q, &r->question) == 0 ? 0 : fail(err, "out of memory");
}

// Runs all cells of policy p, group by group. Scores serve all groups, or each question has its
// own.
static int run_cells(Run *r, const Policy *p, Cell *cells, int n, char *err) {
    Asking *a = &r->asking;
    int n_questions = a->task->n_questions;
    a->single = sees_each(r->e, p);
    if (!a->single && score_context(r, p, cells, n, err) != 0) return -1;
    for (int begin = 0; begin < n_questions; begin = a->end) {
        if (asking_group(a, begin, err) != 0) return -1;
        if (a->single && (take_question(r, err) != 0 || score_context(r, p, cells, n, err) != 0))
            return -1;
        for (Cell *cell = cells; cell < cells + n; cell++) {
            if (run_cell(r, cell, err) != 0) return -1;
            if (a->end == n_questions && eval_results_add(r->results, &cell->c, err) != 0)
                return -1;
        }
    }
    return 0;
}

// ---- all of them ----

static int cells_per_context(const Eval *e) {
    return e->n_kvs * (1 + e->n_policies * e->n_levels * e->n_fits * e->n_ratios);
}

// Adds a cell to the plan unless the results have it, or have it under the name "full".
static int plan_cell(Run *r, Cell *plan, int *n, Cell cell, char *err) {
    const EvalTask *task = r->asking.task;
    EvalCell *c = &cell.c, like;
    c->task = task->task, c->metric = eval_metric_name(task->metric), c->context = task->place,
    c->depth = task->depth;
    c->kv = r->e->kv[cell.kv].name, c->fit = fit_kind_name(cell.fit);
    if (eval_results_find(r->results, c)) {
        r->done += task->n_questions;
        r->known += task->n_questions;
        return 0;
    }
    if (eval_cell_alloc(c, task->n_questions) != 0) return fail(err, "out of memory");
    like = *c, like.policy = "full", like.level = "", like.fit = fit_kind_name(FIT_NONE);
    const EvalCell *full = c->ratio >= 1 ? eval_results_find(r->results, &like) : NULL;
    if (!full) {
        plan[(*n)++] = cell;
        return 0;
    }
    memcpy(c->value, full->value, EVAL_COLUMNS * (size_t)c->n * sizeof *c->value);
    c->kept = 1, c->bytes = full->bytes, c->speed = full->speed;
    r->done += c->n, r->known += c->n;
    return eval_results_add(r->results, c, err);
}

// What a policy has yet to do in this context, [n] cells; p NULL: the full caches.
static int plan_cells(Run *r, const Policy *p, Cell *plan, int *n, char *err) {
    const Eval *e = r->e;
    int lines = e->n_levels * e->n_fits;
    for (int k = 0; k < e->n_kvs; k++) {
        Cell full = {.c = {.policy = "full", .level = "", .ratio = 1}, .kv = k};
        if (!p && plan_cell(r, plan, n, full, err) != 0) return -1;
        for (int i = 0; p && i < lines * e->n_ratios; i++) {
            const Level *l = e->level[i / e->n_ratios / e->n_fits];
            Cell c = {
                .c = {.policy = p->name, .level = l->name, .ratio = e->ratio[i % e->n_ratios]},
                .policy = p,
                .level = l,
                .fit = e->fit[i / e->n_ratios % e->n_fits],
                .kv = k};
            if (plan_cell(r, plan, n, c, err) != 0) return -1;
        }
    }
    return 0;
}

// What p, or the full caches (NULL), have yet to do in this context; *read: it has been read.
static int run_policy(Run *r, const Policy *p, bool *read, Cell *plan, char *err) {
    int n = 0, rc = plan_cells(r, p, plan, &n, err);
    if (n > 0 && rc == 0 && !*read) {
        rc = read_context(r, err);
        *read = true;
    }
    if (n > 0 && rc == 0) rc = run_cells(r, p, plan, n, err);
    r->question.n = 0;
    for (int i = 0; i < n; i++) free(plan[i].c.value);
    return rc == 0 ? report(r, err) : -1;
}

static int run_context(Run *r, const EvalTask *task, Cell *plan, char *err) {
    const Eval *e = r->e;
    bool read = false;
    const char *const stop[] = {task->stop, NULL};
    r->asking = (Asking){.task = task,
                         .state = e->state,
                         .tok = e->context.tok,
                         .full_kv = &r->kv[0],
                         .limit = task->max_tokens ? task->max_tokens : e->max_tokens,
                         .stop = task->stop ? stop : e->stop,
                         .ids = e->ask,
                         .ids_arg = e->ask_arg,
                         .progress = on_step,
                         .progress_arg = r,
                         .show = e->show,
                         .show_arg = e->show_arg};
    int rc = run_policy(r, NULL, &read, plan, err);
    for (int i = 0; i < e->n_policies && rc == 0; i++)
        rc = run_policy(r, e->policy[i], &read, plan, err);
    for (int k = 0; read && rc == 0 && k < e->n_kvs; k++) kvcache_drop(&r->kv[k], r->full[k]);
    if (read && rc == 0) kvcache_drop(&r->kv[0], r->yardstick);
    asking_close(&r->asking);
    return rc;
}

static uint64_t hash_text(uint64_t h, const char *s) { return hash_bytes(h, s, strlen(s)); }

static uint64_t profile_hash(const Profile *p, const Config *m, uint64_t h) {
    size_t heads = (size_t)p->n_layers * p->n_kv_heads;
    h = hash_bytes(h, p->share, p->n_ratios * heads * sizeof *p->share);
    return hash_bytes(h, p->probe, heads * probe_features(m) * sizeof *p->probe);
}

// Of all that changes answers and is neither the model, the tasks nor a cell's own.
static uint64_t settings_hash(const Eval *e) {
    const Context *c = &e->context;
    int local = c->local;
    uint64_t h = e->settings;
    h = hash_bytes(h, e->prefix->id, (size_t)e->prefix->n * sizeof *e->prefix->id);
    h = hash_bytes(h, &e->max_tokens, sizeof e->max_tokens);
    for (const char *const *stop = e->stop; *stop; stop++) {
        if (stop > e->stop) h = hash_bytes(h, "", 1);
        h = hash_text(h, *stop);
    }
    h = hash_bytes(h, &c->chunk, sizeof c->chunk);
    h = hash_bytes(h, &local, sizeof local);
    h = hash_text(h, c->postfix);
    h = hash_text(h, e->kv[0].name);
    h = hash_text(h, e->set ? e->set : "");
    if (e->stream) h = hash_bytes(h, &e->window, sizeof e->window);
    if (e->each) h = hash_text(h, "each question");
    if (c->n_question > 0)
        h = hash_bytes(h, c->question, (size_t)c->n_question * sizeof *c->question);
    return c->profile ? profile_hash(c->profile, &e->state->model->config, h) : h;
}

// Says what all cells of one file of results share.
static int begin_results(const Eval *e, const EvalTasks *tasks, EvalResults *r, char *err) {
    char text[ERR_LEN];
    snprintf(text, sizeof text, "%s %s, tasks %016" PRIx64 ", settings %016" PRIx64,
             e->state->model->name, e->state->model->fingerprint, tasks->hash, settings_hash(e));
    return eval_results_begin(r, text, err);
}

// Opens the caches, one of each page type, and runs the contexts of this shard.
static int run_all(Run *r, const EvalTasks *tasks, char *err) {
    const Eval *e = r->e;
    KVShape shape = model_kv_shape(e->state->model);
    int n_cells = cells_per_context(e), rc = begin_results(e, tasks, r->results, err);
    Cell *plan = malloc((size_t)n_cells * sizeof *plan);
    if (rc == 0 && !plan) rc = fail(err, "out of memory");
    for (int k = 0; k < e->n_kvs && rc == 0; k++) {
        rc = kvcache_open(&r->kv[k], &shape, e->kv[k].types, e->state->pool, err);
        r->kv[k].settling = false;  // exact keys are scored; evicted() settles what it leaves
        if (rc == 0) rc = reader_begin(&e->kv[k].reads, &r->kv[k], err);
    }
    for (int i = e->shard; i < tasks->n; i += e->n_shards)
        r->total += (long)n_cells * tasks->task[i].n_questions;
    for (int i = e->shard; i < tasks->n && rc == 0; i += e->n_shards)
        rc = run_context(r, &tasks->task[i], plan, err);
    for (int k = 0; k < e->n_kvs && rc == 0 && e->read; k++)
        e->read(e->read_arg, &e->kv[k], kvcache_read_share(&r->kv[k]));
    free(plan);
    return rc;
}

int eval_run(const Eval *e, const EvalTasks *tasks, EvalResults *results, char *err) {
    Run *r = calloc(1, sizeof *r);
    if (!r) return fail(err, "out of memory");
    r->e = e, r->results = results;
    int rc = run_all(r, tasks, err);
    for (int k = 0; k < EVAL_LIST; k++) kvcache_close(&r->kv[k]);
    ids_free(&r->ids);
    ids_free(&r->question);
    fitting_close(&r->fitting);
    free(r->score);
    free(r->keep);
    free(r);
    return rc;
}
