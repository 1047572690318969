// measure.c: bench, eval and calibrate: their flags become the structs of bench/, eval/ and
// policies/calibrate.h, and their results tables or JSON.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/bench.h"
#include "cli/commands.h"
#include "cli/input.h"
#include "cli/memory.h"
#include "cli/output.h"
#include "cli/session.h"
#include "eval/chart.h"
#include "eval/eval.h"
#include "eval/page.h"
#include "json.h"
#include "policies/calibrate.h"
#include "policies/effects.h"
#include "policies/ridge.h"
#include "weights.h"

// ---- bench ----

static void print_peaks(void *arg, const BenchPeaks *p) {
    const Session *s = arg;
    const double *g = p->gflop_per_s;
    if (s->o->json) {
        json_print(stdout, "{'work': 'peak', 'isa': %s, 'threads': %d, 'gb_per_s': %g, ", kern.name,
                   pool_threads(s->pool), p->gb_per_s);
        json_print(stdout, "'f32_gflop_per_s': %g, 'q8_gflop_per_s': %g, ", g[W_F32], g[W_Q8]);
        json_print(stdout, "'q4_gflop_per_s': %g, 'attention_gflop_per_s': %g}\n", g[W_Q4],
                   p->attention);
    } else {
        out("peaks: %.1f GB/s read; GFLOP/s: %.0f f32, %.0f q8, %.0f q4, %.0f attention\n\n",
            p->gb_per_s, g[W_F32], g[W_Q8], g[W_Q4], p->attention);
        out("work              n  depth  ratio batch   tokens/s   seconds    GB/s  GFLOP/s");
        out("  share of peak  cache\n");
    }
    out_flush();
}

static void print_bench(void *arg, const BenchRow *r) {
    const Session *s = arg;
    char size[32] = "", what[32];
    if (s->o->json) {
        json_print(stdout,
                   "{'work': %s, 'n': %d, 'depth': %d, 'ratio': %g, 'batch': %d, 'threads': %d, ",
                   r->work, r->n, r->depth, r->ratio, r->batch, pool_threads(s->pool));
        json_print(stdout, "'tokens_per_s': %g, 'seconds': %g, 'gb_per_s': %g, 'gflop_per_s': %g, ",
                   r->tokens_per_s, r->seconds, r->gb_per_s, r->gflop_per_s);
        json_print(stdout, "'share': %g, 'bound': %s, 'to_prefill': %g, ", r->share, r->bound,
                   r->to_prefill);
        json_print(stdout, "'cache_bytes': %zu, 'score_attn': %s", r->cache_bytes, r->score_attn);
        if (s->n_reads > 0)
            json_print(stdout, ", 'reader': %s, 'pages_read': %g", r->reader, r->pages_read);
        out("}\n");
    } else {
        snprintf(what, sizeof what, "%s %s", r->work, r->score_attn ? r->score_attn : "");
        if (r->cache_bytes > 0) size_text(size, r->cache_bytes);
        out("%-12s %6d %6d %6.3g %5d %10.1f %9.4f", what, r->n, r->depth, r->ratio, r->batch,
            r->tokens_per_s, r->seconds);
        if (r->gb_per_s > 0)
            out(" %7.2f", r->gb_per_s);
        else
            out(" %7s", "");
        if (r->bound)
            out(" %8.1f   %3.0f%% %-7s", r->gflop_per_s, 100 * r->share, r->bound);
        else
            out("%22s", "");
        out("  %s", size);
        if (r->to_prefill > 0) out("  %.2f x prefill", r->to_prefill);
        if (r->reader) out("  %s read %.3f of the pages", r->reader, r->pages_read);
        out("\n");
    }
    out_flush();
}

static double longest(const BenchList *list) {
    double most = 0;
    for (int i = 0; i < list->n; i++) most = fmax(most, list->v[i]);
    return most;
}

// The scored context and the part of it that a ratio keeps, with forks that decode.
static void bench_memory(const Session *s, int batch) {
    const Options *o = s->o;
    memory_check(s, &(MemoryNeed){.tokens = fmax(longest(&o->depths), longest(&o->prompts)),
                                  .copies = 1 + fmin(1, longest(&o->ratios)),
                                  .forked = batch * (o->n < 0 ? 32.0 : (double)o->n),
                                  .more = BENCH_READ_BYTES,
                                  .scores = 5,
                                  .whole = true});
}

// How much of the weights lies in large pages (weights.h), read through first: "" is not known.
static const char *large_text(const Session *s, char text[40]) {
    const TensorFile *f = &s->model.file;
    for (size_t i = 0; i < f->map_bytes; i += 4096) (void)*(const volatile uint8_t *)(f->map + i);
    double share = weights_large(f);
    if (share >= 0) snprintf(text, 40, ", %.0f%% in large pages", 100 * share);
    return text;
}

int cmd_bench(const Options *o) {
    Session s;
    char err[ERR_LEN], size[32], large[40] = "";
    int most = 1;
    for (int i = 0; i < o->batches.n; i++)
        if (o->batches.v[i] > most) most = (int)o->batches.v[i];
    char kv_name[KV_NAME];
    open_session(&s, o, NULL, most);
    choose_readers(&s);
    Context method = chosen_method(&s);
    bench_memory(&s, most);
    Bench b = {.state = &s.state,
               .tok = s.tok,
               .kv = s.kv.types,
               .method = method,
               .n = o->n < 0 ? 32 : (int)o->n,
               .prompts = o->prompts,
               .depths = o->depths,
               .ratios = o->ratios,
               .batches = o->batches,
               .reads = s.reads,
               .n_reads = s.n_reads,
               .peaks = print_peaks,
               .row = print_bench,
               .arg = &s};
    if (!o->json) {
        out("%s, %s of weights a token, %d threads, %s, %s cache%s\n", s.model.name,
            size_text(size, bench_weight_bytes(&s.model)), pool_threads(s.pool), kern.name,
            kvcache_types_name(s.kv.types, kv_name), large_text(&s, large));
    }
    out_flush();
    if (bench_run(&b, err) != 0) die("%s", err);
    close_session(&s);
    return 0;
}

// ---- eval ----

static int perplexity_step(void *arg, int window, int n_windows, double ppl) {
    Progress *p = arg;
    if (p->on) fprintf(stderr, "\rwindow %d of %d: %.4f \033[K", window, n_windows, ppl);
    p->shown = now();
    return interrupted != 0;
}

static int eval_text(const Options *o) {
    Session s;
    char err[ERR_LEN];
    PerplexityResult r;
    if (o->n_args != 1) die_usage(o->command, "--ppl needs MODEL alone, not '%s'", o->args[1]);
    char kv_name[KV_NAME];
    KVTypes kv = get_kv(o, o->kvs);
    Buffer text = read_all(o, o->ppl);
    catch_signals();
    open_session(&s, o, NULL, MAX_BATCH);
    memory_check(&s, &(MemoryNeed){.tokens = o->n < 0 ? 512.0 : (double)o->n});
    Progress progress = progress_begin(&s);
    Perplexity p = {.state = &s.state,
                    .tok = s.tok,
                    .kv = kv,
                    .window = o->n < 0 ? 512 : (int)o->n,
                    .progress = perplexity_step,
                    .arg = &progress};
    double start = now();
    int rc = eval_perplexity(&p, text.s, text.n, &r, err);
    progress_end(&progress);
    if (rc != 0) die_file(o->ppl, err);
    if (o->json) {
        json_print(stdout,
                   "{'task': %s, 'kv': %s, 'window': %d, 'metric': 'ppl', 'value': %g, 'low': %g, ",
                   o->ppl, kvcache_types_name(kv, kv_name), p.window, r.value, r.low);
        json_print(stdout, "'high': %g, 'error': %g, 'n': %d, 'seconds': %g}\n", r.high, r.error,
                   r.n, now() - start);
    } else {
        out("perplexity %.4f +- %.5f over %d tokens in windows of %d\n", r.value, r.error, r.n,
            p.window);
    }
    out_flush();
    free(text.s);
    close_session(&s);
    return 0;
}

// Of the same task and metric, and on the same line.
static bool same_row(const EvalRow *a, const EvalRow *b) {
    return eval_row_same_task(a, b) && eval_row_same_line(a, b);
}

// The first row that is in the same table, or on the same line of it, as rows[i] is i itself.
static bool is_first(const EvalRow *rows, int i, bool (*same)(const EvalRow *a, const EvalRow *b)) {
    int first = 0;
    while (!same(&rows[first], &rows[i])) first++;
    return first == i;
}

static void print_cell(const EvalRow *row, bool share) {
    char text[64];
    snprintf(text, sizeof text, share ? "%.1f ±%.1f" : "%.4f ±%.4f", (share ? 100 : 1) * row->value,
             (share ? 50 : 0.5) * (row->high - row->low));
    out("%16s", text);
}

// One line per policy, level, page type and fit, one column per ratio; ± is half the width of the
// 95% interval.
static void print_table(const EvalRow *rows, int n, int first, const double *column,
                        int n_columns) {
    const EvalRow *head = &rows[first];
    bool share = strcmp(head->metric, "kl") != 0 && strcmp(head->metric, "nll") != 0;
    char name[64];
    snprintf(name, sizeof name, "%s, %s, %d answers", head->metric, share ? "%" : "nat/token",
             head->n);
    out("%s\n%-30s", head->task, name);
    for (int k = 0; k < n_columns; k++) out("%16g", column[k]);
    out_bytes("\n", 1);
    for (int i = first; i < n; i++) {
        if (!eval_row_same_task(&rows[i], head) || !is_first(rows, i, same_row)) continue;
        bool fitted = strcmp(rows[i].fit, "none") != 0;
        snprintf(name, sizeof name, "  %s %s %s%s%s", rows[i].policy, rows[i].level, rows[i].kv,
                 fitted ? " " : "", fitted ? rows[i].fit : "");
        out("%-30s", name);
        for (int k = 0; k < n_columns; k++) {
            int j = i;
            while (j < n && !(same_row(&rows[j], &rows[i]) && rows[j].ratio == column[k])) j++;
            if (j < n)
                print_cell(&rows[j], share);
            else
                out("%16s", "");
        }
        out_bytes("\n", 1);
    }
}

static void print_rows(const Options *o, const EvalResults *results) {
    enum { COLUMNS = 16 };
    char err[ERR_LEN];
    double column[COLUMNS];
    EvalRow *rows;
    int n;
    if (eval_rows(results, &rows, &n, err) != 0) die("%s", err);
    for (int i = 0; i < n; i++)  // the share that a threshold left stands for one that was asked
        if (strcmp(rows[i].level, "threshold") == 0) rows[i].ratio = rint(rows[i].kept * 1e3) / 1e3;
    int n_columns = eval_row_ratios(rows, n, column, COLUMNS);
    for (int i = 0; i < n; i++) {
        const EvalRow *r = &rows[i];
        if (o->json) {
            json_print(
                stdout,
                "{'task': %s, 'policy': %s, 'level': %s, 'ratio': %g, 'kept': %g, 'kv': %s, ",
                r->task, r->policy, r->level, r->ratio, r->kept, r->kv);
            json_print(stdout,
                       "'fit': %s, 'metric': %s, 'value': %g, 'low': %g, 'high': %g, 'n': %d, ",
                       r->fit, r->metric, r->value, r->low, r->high, r->n);
            json_print(stdout, "'bytes': %g, 'tokens_per_s': %g}\n", r->bytes, r->speed);
        } else if (is_first(rows, i, eval_row_same_task)) {
            print_table(rows, n, i, column, n_columns);
        }
    }
    out_flush();
    if (o->chart && chart_curves(rows, n, o->chart, err) != 0) die_file(o->chart, err);
    if (o->page && page_write(rows, n, results, o->page, err) != 0) die_file(o->page, err);
    free(rows);
}

static void check_outputs(const Options *o) {
    if (o->out) check_output(o);
    if (o->chart) check_writable(o, o->chart);
    if (o->page) check_writable(o, o->page);
}

static int eval_merge(const Options *o) {
    EvalResults results = {0};
    char err[ERR_LEN];
    check_outputs(o);
    for (int i = 0; i < o->n_args; i++)
        if (eval_results_read(&results, o->args[i], err) != 0) die("%s: %s", o->args[i], err);
    if (eval_results_order(&results, err) != 0) die("%s", err);
    if (o->out && eval_results_save(&results, o->out, err) != 0) die_file(o->out, err);
    print_rows(o, &results);
    eval_results_close(&results);
    return 0;
}

// The next of the names between commas, or NULL. The result is malloc'ed.
static char *next_name(const char **list) {
    if (!*list || !**list) return NULL;
    size_t n = strcspn(*list, ",");
    char *name = copy_text(*list, n);
    *list += n + ((*list)[n] == ',');
    return name;
}

// "q8/q4", or with "+q2" for demoting; the name is kept.
static EvalKV get_eval_kv(const Options *o, const char *name) {
    static const char demote[] = "+q2";
    size_t n = strlen(name), end = sizeof demote - 1;
    EvalKV kv = {.demote = n > end && strcmp(name + n - end, demote) == 0, .name = name};
    char *types = copy_text(name, kv.demote ? n - end : n);
    kv.types = get_kv(o, types);
    free(types);
    return kv;
}

// Whether all that is compared can be evicted while a context is read.
static void check_live(const Options *o, const Eval *e) {
    for (int i = 0; i < e->n_policies; i++)
        if (!policy_is_live(e->policy[i]))
            die_usage(o->command, "--stream: policy %s looks back at the whole context",
                      e->policy[i]->name);
    for (int i = 0; i < e->n_levels; i++)
        if (e->level[i]->pool == LEVEL_HEAD)
            die_usage(o->command, "--stream: level %s keeps whole heads", e->level[i]->name);
    for (int i = 0; i < e->n_kvs; i++)
        if (e->kv[i].demote)
            die_usage(o->command, "--kv %s keeps what --stream evicts: choose one", e->kv[i].name);
}

// --shard I/N, I from 1; without it all contexts are one shard.
static void set_shard(const Options *o, Eval *e) {
    e->n_shards = 1;
    if (!o->shard) return;
    size_t n = strcspn(o->shard, "/");
    double i = number_read(o->shard, n), all = NAN;
    if (o->shard[n]) all = number_read(o->shard + n + 1, strlen(o->shard + n + 1));
    if (!(i >= 1 && i <= all && all <= 1 << 30) || i != floor(i) || all != floor(all))
        die_usage(o->command, "--shard %s: needs I/N, I from 1 to N", o->shard);
    e->shard = (int)i - 1, e->n_shards = (int)all;
}

// A list has names, and all of them were taken.
static void check_list(const Options *o, const char *flag, int n, const char *rest) {
    if (n == 0 || *rest) die_usage(o->command, "%s needs 1 to %d names", flag, EVAL_LIST);
}

static FitKind get_fit(const Options *o, const char *name) {
    int kind = fit_kind(name);
    if (kind < 0) die_usage(o->command, "--fit %s: needs one of none|values|both|merge|pool", name);
    return (FitKind)kind;
}

static bool eval_fits(const Eval *e) {
    bool fits = false;
    for (int i = 0; i < e->n_fits; i++) fits = fits || e->fit[i] != FIT_NONE;
    return fits;
}

// Every page type once more for each reader: "f16+quest".
static void add_readers(const Session *s, Eval *e) {
    int n_kvs = e->n_kvs;
    for (int i = 1; i < s->n_reads; i++) {
        for (int k = 0; k < n_kvs; k++) {
            Buffer name = {0};
            if (e->n_kvs == EVAL_LIST)
                die_usage(s->o->command, "--reader and --kv: needs %d of them together at most",
                          EVAL_LIST);
            add_text(&name, e->kv[k].name, strlen(e->kv[k].name));
            add_text(&name, "+", 1);
            add_text(&name, reader_name(&s->reads[i]), strlen(reader_name(&s->reads[i])));
            e->kv[e->n_kvs] = e->kv[k];
            e->kv[e->n_kvs].name = name.s, e->kv[e->n_kvs++].reads = s->reads[i];
        }
    }
}

// What is compared with what, from the flags.
static void eval_lists(const Session *s, Eval *e) {
    const Options *o = s->o;
    const char *policy = chosen_policy(s);
    const char *level = chosen_level(s), *kv = o->kvs, *fit = o->fits;
    char *name;
    char err[ERR_LEN];
    for (; e->n_policies < EVAL_LIST && (name = next_name(&policy)); free(name))
        e->policy[e->n_policies++] = get_policy(o, name);
    for (; e->n_levels < EVAL_LIST && (name = next_name(&level)); free(name))
        e->level[e->n_levels++] = get_level(o, name);
    for (; e->n_kvs < EVAL_LIST && (name = next_name(&kv)); e->n_kvs++)
        e->kv[e->n_kvs] = get_eval_kv(o, name);
    for (; e->n_fits < EVAL_LIST && (name = next_name(&fit)); free(name))
        e->fit[e->n_fits++] = get_fit(o, name);
    for (; e->n_ratios < o->shares.n; e->n_ratios++)
        e->ratio[e->n_ratios] = o->shares.v[e->n_ratios];
    add_readers(s, e);
    check_list(o, "--policy", e->n_policies, policy);
    check_list(o, "--level", e->n_levels, level);
    check_list(o, "--kv", e->n_kvs, kv);
    check_list(o, "--fit", e->n_fits, fit);
    if (e->stream) check_live(o, e);
    for (int i = 0; i < e->n_kvs && eval_fits(e); i++)
        if (e->kv[i].demote)
            die_usage(o->command, "--kv %s keeps what --fit replaces: choose one", e->kv[i].name);
    if (eval_check_set(e, err) != 0) die_usage(o->command, "--set %s: %s", o->set, err);
    set_shard(o, e);
}

// What eval's questions are put with.
typedef struct {
    Session *s;
    Talk talk;
} Asker;

static int ask_ids(void *arg, const EvalQuestion *q, Ids *ids) {
    char err[ERR_LEN];
    Asker *a = arg;
    int before = ids->n;
    if (talk_ask(&a->talk, q->question, q->answer_prefix, ids, err) != 0) return -1;
    show_prompt(a->s, "question", ids->id + before, ids->n - before);
    return 0;
}

static int eval_step(void *arg, long done, long total) {
    return progress_step(arg, "eval", done, total);
}

typedef struct {
    bool json;
    const Progress *progress;  // makes room on the terminal
} Showing;

static void show_answer(void *arg, const EvalCell *c, const EvalQuestion *q, const EvalMark *mark) {
    const Showing *how = arg;
    progress_end(how->progress);
    if (how->json) {
        json_print(stdout, "{'task': %s, 'context': %d, 'policy': %s, 'level': %s, ", c->task,
                   c->context, c->policy, c->level);
        json_print(stdout, "'ratio': %g, 'kv': %s, 'fit': %s, 'question': %s, 'wanted': [",
                   c->ratio, c->kv, c->fit, q->question);
        for (int i = 0; i < q->n_answers; i++) json_print(stdout, i ? ", %s" : "%s", q->answers[i]);
        json_print(stdout, "], 'answer': %s, 'metric': %s, 'value': %g}\n", mark->answer, c->metric,
                   mark->value);
        return;
    }
    bool fitted = strcmp(c->fit, "none") != 0;
    out("%s, context %d, %s %s %g %s%s%s: %s\n  wanted  ", c->task, c->context, c->policy, c->level,
        c->ratio, c->kv, fitted ? " " : "", fitted ? c->fit : "", q->question);
    for (int i = 0; i < q->n_answers; i++) out(i ? " | %s" : "%s", q->answers[i]);
    out("\n  %.2f    %s%s\n", mark->value, q->answer_prefix, mark->answer);
}

// How much of what they saw the tokens of a cache read.
static void show_read(void *arg, const EvalKV *kv, double share) {
    const Session *s = arg;
    if (!kv->reads.row) return;
    if (s->o->json)
        json_print(stdout, "{'kv': %s, 'reader': %s, 'pages_read': %g}\n", kv->name,
                   kv->reads.row->name, share);
    else if (!s->o->quiet)
        note("[%s: read %.3f of the pages]\n", kv->name, share);
}

// Runs e, of which lists and limits are there, on the session's model.
static int run_eval(Session *s, Eval *e, const EvalTasks *tasks, EvalResults *results, char *err) {
    Ids prefix = {0};
    Asker asker = {s, {.tok = s->tok, .raw = s->o->raw, .on_context = true}};
    prefix_ids(s, &prefix);
    show_prompt(s, "prefix", prefix.id, prefix.n);
    Progress progress = progress_begin(s);
    progress.unit = "answers";
    e->state = &s->state, e->prefix = &prefix, e->ask = ask_ids, e->ask_arg = &asker;
    e->progress = eval_step, e->progress_arg = &progress, e->each = s->o->each;
    Showing how = {s->o->json, &progress};
    if (s->n_reads > 0) e->read = show_read, e->read_arg = s;
    if (s->o->show) e->show = show_answer, e->show_arg = &how;
    e->context = (Context){.tok = s->tok,
                           .chunk = (int)s->o->chunk,
                           .local = s->o->score_attn == 1,
                           .profile = s->has_profile ? &s->profile : NULL,
                           .postfix = repeat_postfix(s)};
    bool asks = false;
    for (int i = 0; i < e->n_policies; i++) {
        give_question(s, &e->context, e->policy[i]);
        asks = asks || e->policy[i]->asks != ASKS_NOTHING;
    }
    if (!asks && (s->o->question || s->o->each))
        warn(s, "--question%s has no effect: no policy here looks at one",
             s->o->each ? "-each" : "");
    int rc = eval_run(e, tasks, results, err);
    progress_end(&progress);
    ids_free(&prefix);
    return rc;
}

// Of the longest context, in tokens, and of the questions of any that are at work together: a cache
// of each page type, one that is scored and one that is evicted from; the questions' forks, each
// with the full cache's logits.
static void eval_memory(const Session *s, const Eval *e, const EvalTasks *tasks) {
    enum { GROUP = 32, LOGITS_BYTES = 256 << 20, QUESTION = 64 };  // as eval/ask.c has them
    double answers = 0;
    int most = 0;
    for (int i = 0; i < tasks->n; i++) {
        const EvalTask *t = &tasks->task[i];
        int limit = t->max_tokens ? t->max_tokens : e->max_tokens;
        Ids ids = {0};
        encode(s->tok, t->context, strlen(t->context), 0, &ids);
        most = max_int(most, ids.n);
        answers = fmax(answers, (double)min_int(GROUP, t->n_questions) * (limit + QUESTION));
        ids_free(&ids);
    }
    double logits = answers * s->model.config.vocab_size * sizeof(float), fits = 0;
    KVShape shape = model_kv_shape(&s->model);
    for (int i = 0; i < e->n_ratios && eval_fits(e); i++) {
        int stay = 64 + (int)(e->ratio[i] * most);
        if (e->ratio[i] < 1)
            fits = fmax(fits, (double)fitting_bytes(&shape, most, stay, pool_threads(s->pool)));
    }
    memory_check(s, &(MemoryNeed){.tokens = (double)most + 64,
                                  .copies = e->n_kvs + 2,
                                  .forked = answers,
                                  .more = fmin(logits, LOGITS_BYTES) + fits,
                                  .scores = 5,
                                  .whole = true});
}

// The tasks of a set, made once for all models and runs; path [4096].
static const char *suite_path(const Options *o, char *path) {
    long length = o->length > 0 ? o->length : 4000;
    if (snprintf(path, 4096, "tasks/%s-%ld", o->suite, length) >= 4096 || access(path, R_OK) != 0)
        die("%s: not there: python3 eval/make_tasks.py suite %s --tokens %ld makes it", path,
            o->suite, length);
    return path;
}

// Where the page goes: with a set there is one, beside the results.
static const char *page_path(const Options *o, const char *tasks, char *path) {
    if (o->page || !o->suite || o->shard) return o->page;
    if (snprintf(path, 4096, "%s.html", o->out ? o->out : tasks) >= 4096)
        die_usage(o->command, "-o: the name is too long");
    return path;
}

// Answers the questions of a file, or of a folder's.
static int eval_tasks(const Options *given) {
    Session s;
    EvalTasks tasks;
    EvalResults results = {0};
    char err[ERR_LEN], suite[4096], page[4096];
    Options with_page = *given, *o = &with_page;
    if (o->n_args != (o->suite ? 1 : 2))
        die_usage(o->command, o->suite ? "--suite needs MODEL alone" : "needs MODEL TASKS.jsonl");
    const char *path = o->suite ? suite_path(o, suite) : o->args[1];
    o->page = page_path(o, path, page);
    Eval e = {.max_tokens = o->n < 0 ? 96 : (int)o->n,
              .stop = o->stop,
              .set = o->set,
              .stream = o->stream,
              .window = (int)o->window,
              .timed = o->page != NULL,
              .settings = o->raw};
    check_outputs(o);
    if (eval_tasks_open(&tasks, path, err) != 0) die("%s: %s", path, err);
    for (int i = 0; i < tasks.n_files; i++) not_an_output(o, tasks.file[i].path);
    catch_signals();
    open_session(&s, o, NULL, MAX_BATCH);
    open_profile(&s);
    choose_readers(&s);
    eval_lists(&s, &e);
    eval_memory(&s, &e, &tasks);
    if (o->out && eval_results_open(&results, o->out, err) != 0) die("%s: %s", o->out, err);
    int rc = run_eval(&s, &e, &tasks, &results, err);
    if (rc != 0) die_failed(err);
    print_rows(o, &results);
    if (o->page && !o->quiet) note("[page: %s]\n", o->page);
    eval_results_close(&results);
    for (int k = 0; k < e.n_kvs; k++) free((char *)e.kv[k].name);
    eval_tasks_close(&tasks);
    close_session(&s);
    return 0;
}

int cmd_eval(const Options *o) {
    if (o->merge) return eval_merge(o);
    if (o->ppl) return eval_text(o);
    return eval_tasks(o);
}

// ---- calibrate ----

// Whether the file that folder [n] and `rest` name can be read; path [4096] is its name.
static bool lies_in(char *path, const char *folder, size_t n, const char *rest) {
    int len = snprintf(path, 4096, "%.*s%s", (int)n, folder, rest);
    return len < 4096 && access(path, R_OK) == 0;
}

// The sample text that ships with the program lies beside it, or where `make install` puts it; a
// program without a folder is one of PATH.
static Buffer sample_text(const Options *o) {
    static const char beside[] = "/eval/calibration.txt",
                      installed[] = "/../share/kvzip/calibration.txt";
    const char *slash = strrchr(o->program, '/'), *folders = slash ? o->program : getenv("PATH");
    char path[4096];
    if (o->file) return read_all(o, o->file);
    for (const char *f = folders; f; f += *f == ':') {
        size_t n = slash ? (size_t)(slash - f) : strcspn(f, ":");
        if (lies_in(path, f, n, beside) || lies_in(path, f, n, installed)) {
            not_the_same(o->out, path, "read");
            return read_all(o, path);
        }
        if (slash || !*(f += n)) break;
    }
    die("the sample text %s is not beside the program: -f gives one", beside + 1);
}

static void trial_figures(const Options *o, const ShareTrial *t) {
    if (t->n_texts > 0 && !o->quiet)
        note("[layer shares by effect: held-out KL %.3g -> %.3g at 0.3 on %d texts, %s]\n",
             t->kl[0], t->kl[1], t->n_texts, t->used ? "used" : "not used");
}

static void calibrate_figures(const Options *o, const CalibrateResult *r) {
    if (o->json) {
        json_print(stdout, "{'n_texts': %d, 'n_tokens': %d, 'longest': %d, ", r->n_texts,
                   r->n_tokens, r->longest);
        json_print(stdout, "'held_out': %d, 'kl_by_kvzip': %g, 'kl_by_effect': %g, ",
                   r->trial.n_texts, r->trial.kl[0], r->trial.kl[1]);
        json_print(stdout, "'layer_shares': %s, ", r->trial.used ? "effect" : "kvzip");
        json_print(stdout, "'explained': %g, 'seconds': %g, 'path': %s}\n", r->explained,
                   r->seconds, o->out);
        out_flush();
    }
    trial_figures(o, &r->trial);
    if (!o->quiet && r->n_found > 0)
        note("[went on after %d text%s of %s.unfinished]\n", r->n_found, r->n_found == 1 ? "" : "s",
             o->out);
    if (!o->quiet)
        note(
            "[%d texts, %d tokens, %d in the longest; probes explain %.1f%% of the variance of "
            "log scores; %.1f s; saved as %s]\n",
            r->n_texts, r->n_tokens, r->longest, 100 * r->explained, r->seconds, o->out);
}

// As if the texts were one, so never too little for them; and the sums of the regression, and the
// words of a trial.
static void calibrate_memory(const Session *s, const Buffer *text) {
    Ids ids = {0};
    encode(s->tok, text->s, text->n, 0, &ids);
    KVShape shape = model_kv_shape(&s->model);
    double logits = (double)EFFECT_SPAN * s->model.config.vocab_size * sizeof(float);
    double ridge = ridge_bytes(&s->state, kvcache_scored_layers(&shape, NULL));
    memory_check(s, &(MemoryNeed){.tokens = ids.n,
                                  .forked = fmin((double)s->o->chunk, ids.n),
                                  .more = ridge + logits,
                                  .scores = 5,
                                  .whole = true});
    ids_free(&ids);
}

int cmd_calibrate(const Options *o) {
    Session s;
    Ids prefix = {0};
    char err[ERR_LEN];
    CalibrateResult r;
    check_output(o);
    Buffer text = sample_text(o);
    catch_signals();
    open_session(&s, o, NULL, EFFECT_BATCH * EFFECT_SPAN);
    prefix_ids(&s, &prefix);
    calibrate_memory(&s, &text);
    Progress progress = progress_begin(&s);
    Calibrate c = {.context = {.state = &s.state,
                               .kv = &s.kv,
                               .tok = s.tok,
                               .chunk = (int)o->chunk,
                               .local = true,
                               .postfix = repeat_postfix(&s)},
                   .prefix = &prefix,
                   .lambda = o->lambda,
                   .most_tokens = (int)o->most_tokens,
                   .path = o->out,
                   .into = o->into,
                   .save_seconds = 5,
                   .progress = progress_step,
                   .progress_arg = &progress};
    int rc = calibrate_run(&c, text.s, text.n, &r, err);
    progress_end(&progress);
    if (rc != 0) die_failed(err);
    calibrate_figures(o, &r);
    free(text.s);
    ids_free(&prefix);
    close_session(&s);
    return 0;
}
