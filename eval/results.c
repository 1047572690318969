// results.c: files of results, and what they say taken together.
//
// A file is JSON Lines: first the settings that all cells share, then a cell a line, appended as it
// is done. So a run that was interrupted goes on where it stopped, and shards are joined by reading
// all their files. Numbers are written with as many digits as bring back the same bits.
#define _POSIX_C_SOURCE 200809L
#include "eval/results.h"

#include <errno.h>
#include <limits.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json.h"
#include "kinds.h"
#include "text.h"
#include "newfile.h"
#include "util.h"

// The numbers of a cell, as they are called in a file; the first one is the task's metric.
static const char *const columns[EVAL_COLUMNS] = {"value", "same", "kl", "nll"};

// ---- cells ----

static int take_settings(EvalResults *r, const char *settings, char *err) {
    if (!r->settings) {
        r->settings = malloc(strlen(settings) + 1);
        if (!r->settings) return fail(err, "out of memory");
        strcpy(r->settings, settings);
    } else if (strcmp(r->settings, settings) != 0) {
        return fail(err, "results of other tasks, another model or other settings (%s, not %s)",
                    settings, r->settings);
    }
    return 0;
}

static bool same_cell(const EvalCell *a, const EvalCell *b) {
    return a->context == b->context && a->ratio == b->ratio && strcmp(a->policy, b->policy) == 0 &&
           strcmp(a->level, b->level) == 0 && strcmp(a->fit, b->fit) == 0 &&
           strcmp(a->kv, b->kv) == 0;
}

const EvalCell *eval_results_find(const EvalResults *r, const EvalCell *like) {
    for (int i = 0; i < r->n; i++)
        if (same_cell(&r->cell[i], like)) return &r->cell[i];
    return NULL;
}

int eval_cell_alloc(EvalCell *c, int n) {
    c->n = n;
    c->value = calloc((size_t)n, EVAL_COLUMNS * sizeof *c->value);
    if (!c->value) return -1;
    c->same = c->value + n, c->kl = c->same + n, c->nll = c->kl + n;
    return 0;
}

// Takes the cell over, numbers and all.
static int add_cell(EvalResults *r, EvalCell c, char *err) {
    if (r->n == r->cap) {
        EvalCell *cell = realloc(r->cell, (size_t)(2 * r->cap + 64) * sizeof *cell);
        if (!cell) return fail(err, "out of memory");
        r->cell = cell, r->cap = 2 * r->cap + 64;
    }
    r->cell[r->n++] = c;
    return 0;
}

// ---- writing ----

static void put_settings(FILE *f, const char *settings) {
    json_print(f, "{'settings': %s}\n", settings);
}

static void put_cell(FILE *f, const EvalCell *c) {
    json_print(f, "{'task': %s, 'metric': %s, 'policy': %s, 'level': %s, 'kv': %s", c->task,
               c->metric, c->policy, c->level, c->kv);
    json_print(f, ", 'fit': %s, 'context': %d, 'ratio': %.17g, 'kept': %.17g", c->fit, c->context,
               c->ratio, c->kept);
    if (c->bytes > 0) json_print(f, ", 'bytes': %zu", c->bytes);
    if (c->speed > 0) json_print(f, ", 'tokens_per_s': %.17g", c->speed);
    if (c->depth >= 0) json_print(f, ", 'depth': %.17g", c->depth);
    for (int m = 0; m < EVAL_COLUMNS; m++) {
        const float *v = c->value + (size_t)m * c->n;
        json_print(f, ", %s: [", columns[m]);
        for (int i = 0; i < c->n; i++) json_print(f, i ? ", %g" : "%g", v[i]);
        fputc(']', f);
    }
    fputs("}\n", f);
}

// Writes line [n] behind the log's last whole line. One that does not fit, on a full disk, is taken
// back.
static int append(EvalResults *r, const char *line, size_t n, char *err) {
    size_t done = 0;
    int why = ftruncate(r->log, r->log_end) == 0 ? 0 : errno;
    while (why == 0 && done < n) {
        ssize_t got = pwrite(r->log, line + done, n - done, r->log_end + (off_t)done);
        if (got > 0)
            done += (size_t)got;
        else if (got == 0 || errno != EINTR)
            why = got == 0 ? EIO : errno;
    }
    if (why == 0) return r->log_end += (off_t)n, 0;
    fail(err, "the results cannot be written: %s", strerror(why));
    return ftruncate(r->log, r->log_end), -1;
}

// Adds the settings, or where c is given the cell, to the log.
static int log_line(EvalResults *r, const char *settings, const EvalCell *c, char *err) {
    char *line = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&line, &n);
    if (f && c) put_cell(f, c);
    if (f && !c) put_settings(f, settings);
    bool whole = f && !ferror(f);
    int rc = f && fclose(f) == 0 && whole ? append(r, line, n, err) : fail(err, "out of memory");
    free(line);
    return rc;
}

int eval_results_begin(EvalResults *r, const char *settings, char *err) {
    bool fresh = !r->settings;
    if (take_settings(r, settings, err) != 0) return -1;
    return fresh && r->logs ? log_line(r, settings, NULL, err) : 0;
}

int eval_results_add(EvalResults *r, EvalCell *c, char *err) {
    if (r->logs && log_line(r, NULL, c, err) != 0) return -1;
    if (add_cell(r, *c, err) != 0) return -1;
    c->value = NULL;
    return 0;
}

static int by_context(const void *a, const void *b) {
    const EvalCell *x = *(const EvalCell *const *)a, *y = *(const EvalCell *const *)b;
    return x->context != y->context ? (x->context < y->context ? -1 : 1) : x < y ? -1 : x > y;
}

int eval_results_order(EvalResults *r, char *err) {
    size_t n = (size_t)r->n;
    if (n == 0) return 0;
    const EvalCell **order = malloc((n + 1) * sizeof *order);
    EvalCell *cell = malloc((n + 1) * sizeof *cell);
    for (size_t i = 0; order && i < n; i++) order[i] = &r->cell[i];
    if (order && cell) {
        qsort(order, n, sizeof *order, by_context);
        for (size_t i = 0; i < n; i++) cell[i] = *order[i];
        memcpy(r->cell, cell, n * sizeof *cell);
    }
    int status = order && cell ? 0 : fail(err, "out of memory for %d results", r->n);
    free(order);
    free(cell);
    return status;
}

int eval_results_save(const EvalResults *r, const char *path, char *err) {
    NewFile out;
    if (newfile_begin(&out, path, err) != 0) return -1;
    if (r->settings) put_settings(out.file, r->settings);
    for (int i = 0; i < r->n; i++) put_cell(out.file, &r->cell[i]);
    return newfile_commit(&out, err);
}

// ---- reading ----

// A column's numbers: shares from 0 to 1, or others, of which one that was not finite is null.
static int read_column(float *v, int n, JsonFields *f, const char *key) {
    bool share = strcmp(key, "value") == 0 || strcmp(key, "same") == 0;
    const JsonNode *list = json_need(f, key, JSON_LIST);
    if (!list) return -1;
    if (list->n != n) return fail(f->err, "\"%s\" has %d numbers, not %d", key, list->n, n);
    for (const JsonNode *m = list->child; m; m = m->next) {
        if (m->kind != JSON_NUMBER && m->kind != JSON_NULL)
            return fail(f->err, "\"%s\" holds what is no number", key);
        *v = m->kind == JSON_NUMBER ? (float)json_number(m) : NAN;
        if (share ? !(*v >= 0 && *v <= 1) : isinf(*v))
            return fail(f->err, "\"%s\" holds %g, %s", key, *v,
                        share ? "not a share from 0 to 1" : "not a finite number");
        v++;
    }
    return 0;
}

// Whether both marked the same answers alike; the distance to the full cache may differ by the
// instruction set.
static bool same_values(const EvalCell *a, const EvalCell *b) {
    return a->n == b->n && memcmp(a->value, b->value, (size_t)a->n * sizeof *a->value) == 0;
}

// What a cell may say of its cache.
static int read_costs(EvalCell *c, JsonFields *f) {
    static const double MOST = 1e15;
    const JsonNode *bytes = json_may(f, "bytes", JSON_NUMBER);
    const JsonNode *speed = json_may(f, "tokens_per_s", JSON_NUMBER);
    const JsonNode *depth = json_may(f, "depth", JSON_NUMBER);
    if (f->failed) return -1;
    c->depth = depth ? json_number(depth) : -1;
    if (depth && !(c->depth >= 0 && c->depth <= 1))
        return fail(f->err, "\"depth\" %g is not from 0 to 1", c->depth);
    double n = bytes ? json_number(bytes) : 0;
    c->speed = speed ? json_number(speed) : 0;
    if (!(n >= 0 && n <= MOST && c->speed >= 0 && c->speed <= MOST))
        return fail(f->err, "\"bytes\" %g, \"tokens_per_s\" %g: below 0 or too large", n, c->speed);
    c->bytes = (size_t)n;
    return 0;
}

static int read_cell(EvalResults *r, const JsonNode *top, char *err) {
    JsonFields f = {.object = top, .err = err};
    EvalCell c = {.task = json_need_text(&f, "task")};
    c.metric = json_need_text(&f, "metric");
    c.policy = json_need_text(&f, "policy");
    c.level = json_need_text(&f, "level");
    c.kv = json_need_text(&f, "kv");
    c.fit = json_may_text(&f, "fit");
    if (!c.fit) c.fit = "none";
    const JsonNode *context = json_need(&f, "context", JSON_NUMBER);
    const JsonNode *ratio = json_need(&f, "ratio", JSON_NUMBER);
    const JsonNode *kept = json_need(&f, "kept", JSON_NUMBER);
    const JsonNode *value = json_need(&f, columns[0], JSON_LIST);
    if (f.failed) return -1;
    double line = json_number(context);
    if (!(line >= 0 && line <= INT_MAX)) return fail(err, "\"context\" is not a line's number");
    c.context = (int)line;
    c.ratio = json_number(ratio), c.kept = json_number(kept);
    if (!(c.ratio > 0 && c.ratio <= 1 && c.kept >= 0 && c.kept <= 1))
        return fail(err, "\"ratio\" %g, \"kept\" %g: not shares from 0 to 1", c.ratio, c.kept);
    if (read_costs(&c, &f) != 0) return -1;
    if (value->n == 0) return fail(err, "a cell of no questions");
    if (eval_cell_alloc(&c, value->n) != 0) return fail(err, "out of memory");
    int rc = 0;
    for (int m = 0; m < EVAL_COLUMNS && rc == 0; m++)
        rc = read_column(c.value + (size_t)m * c.n, c.n, &f, columns[m]);
    const EvalCell *known = eval_results_find(r, &c);
    if (rc == 0 && known && !same_values(known, &c))
        rc = fail(err, "context %d, policy %s, ratio %g is there already with other values, fit %s",
                  c.context, c.policy, c.ratio, c.fit);
    if (rc == 0 && !known) return add_cell(r, c, err) == 0 ? 0 : (free(c.value), -1);
    free(c.value);
    return rc;
}

// The first line holds the settings, the others a cell each.
static int read_results(EvalResults *r, JsonLines *lines, char *err) {
    char why[ERR_LEN];
    const JsonNode *top;
    for (bool first = true; json_lines_next(lines, &top, why) == 0; first = false) {
        if (!top) return 0;
        JsonFields f = {.object = top, .err = why};
        const char *settings = (first ? json_need_text : json_may_text)(&f, "settings");
        if (settings && take_settings(r, settings, err) != 0) return -1;
        if (f.failed || (!settings && read_cell(r, top, why) != 0)) break;
    }
    return fail(err, "line %d: %s", lines->line, why);
}

// Takes the file's text over, to which cells will point.
static int add_text(EvalResults *r, char *text, char *err) {
    char **texts = realloc(r->text, (size_t)(r->n_texts + 1) * sizeof *texts);
    if (!texts) return free(text), fail(err, "out of memory");
    r->text = texts;
    r->text[r->n_texts++] = text;
    JsonLines lines = {.rest = text + text_mark(text, strlen(text))};
    int rc = read_results(r, &lines, err);
    json_lines_close(&lines);
    return rc;
}

// Reads cells out of a file's text [n], which is taken over. Returns the bytes of its whole lines,
// or -1 with err.
static off_t take_text(EvalResults *r, char *text, size_t n, char *err) {
    static const char start[] = "{\"settings\": ";
    size_t mark = text_mark(text, n), seen = n - mark;
    if (seen >= sizeof start) seen = sizeof start - 1;
    bool ours = memcmp(text + mark, start, seen) == 0;  // or the beginning of one of ours
    const FileKind *kind = ours ? NULL : file_kind(text, n);
    while (n > 0 && text[n - 1] != '\n') text[--n] = '\0';  // a line that was cut off
    if (kind) {
        free(text);
        return kind_fail(err, kind, "a file of results");
    }
    if (n == 0 && !ours) {
        free(text);
        return fail(err, "not a file of results: it has no line of them");
    }
    const char *zero = memchr(text, 0, n);
    if (zero) {
        int line = 1;
        for (const char *p = text; p < zero; p++) line += *p == '\n';
        free(text);
        return fail(err, "line %d: a zero byte", line);
    }
    return add_text(r, text, err) == 0 ? (off_t)n : -1;
}

int eval_results_read(EvalResults *r, const char *path, char *err) {
    size_t n;
    char *text = file_read(path, &n, err);
    return text && take_text(r, text, n, err) >= 0 ? 0 : -1;
}

// Locked only once it has been read, because closing any descriptor of a file ends its lock; what
// another process has added in between shows in its size.
int eval_results_open(EvalResults *r, const char *path, char *err) {
    size_t n;
    struct stat st;
    r->log = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (r->log < 0) return fail(err, "cannot be written: %s", strerror(errno));
    r->logs = true;
    char *text = file_read(path, &n, err);
    if (!text) return -1;
    if (!file_lock(r->log) || fstat(r->log, &st) != 0 || (size_t)st.st_size != n) {
        free(text);
        return fail(err, "another process is adding results to it");
    }
    r->log_end = take_text(r, text, n, err);
    return r->log_end < 0 ? -1 : 0;
}

void eval_results_close(EvalResults *r) {
    for (int i = 0; i < r->n; i++) free(r->cell[i].value);
    for (int i = 0; i < r->n_texts; i++) free(r->text[i]);
    if (r->logs) close(r->log);
    free(r->cell);
    free(r->text);
    free(r->settings);
    *r = (EvalResults){0};
}

// ---- figures ----

// The 97.5% quantile of Student's t (Abramowitz and Stegun, 26.7.5, but for few degrees of
// freedom).
static double student(int freedom) {
    static const double few[] = {0, 12.7062, 4.3027, 3.1824, 2.7764, 2.5706};
    double z = 1.959964, z3 = z * z * z, z5 = z3 * z * z, n = freedom;
    if (freedom <= 5) return few[freedom];
    return z + (z3 + z) / (4 * n) + (5 * z5 + 16 * z3 + 3 * z) / (96 * n * n);
}

// Of n answers that are right or wrong (Wilson 1927): eight right ones of eight are no proof that
// all will be, the interval is [0.68, 1].
static void wilson(EvalRow *row) {
    double z = 1.959964, n = row->n, p = row->value, z2n = z * z / n;
    double middle = (p + z2n / 2) / (1 + z2n);
    double half = z / (1 + z2n) * sqrt(p * (1 - p) / n + z2n / (4 * n));
    row->low = fmin(fmax(middle - half, 0), p);
    row->high = fmax(fmin(middle + half, 1), p);
}

// Mean of v [n] and its 95% interval: Wilson's for shares that are 0 or 1 each, else Student's. A
// figure is never below 0, a share never above 1.
static void summarize(EvalRow *row, const float *v, int n, bool share) {
    double sum = 0, squares = 0, most = share ? 1 : INFINITY;
    bool counted = share;
    for (int i = 0; i < n; i++) sum += v[i], counted = counted && (v[i] == 0 || v[i] == 1);
    row->n = n;
    row->value = sum / n;
    for (int i = 0; i < n; i++) squares += (v[i] - row->value) * (v[i] - row->value);
    if (counted) {
        wilson(row);
        return;
    }
    double half = n > 1 ? student(n - 1) * sqrt(squares / (n - 1) / n) : INFINITY;
    row->low = fmax(row->value - half, 0);
    row->high = fmin(row->value + half, most);
}

// The same task under the same policy, level, fit, ratio and page type.
static bool same_figure(const EvalCell *a, const EvalCell *b) {
    EvalCell c = *b;
    c.context = a->context;
    return strcmp(a->task, b->task) == 0 && strcmp(a->metric, b->metric) == 0 && same_cell(a, &c);
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Adds up what the figure's cells say of their caches; `first` is one of them.
static void figure_costs(const EvalResults *r, int first, EvalRow *row, double *speed) {
    double bytes = 0;
    int n_bytes = 0, n_speeds = 0;
    for (int i = first; i < r->n; i++) {
        const EvalCell *c = &r->cell[i];
        if (!same_figure(&r->cell[first], c)) continue;
        if (c->bytes > 0) bytes += (double)c->bytes, n_bytes++;
        if (c->speed > 0) speed[n_speeds++] = c->speed;
    }
    if (n_speeds > 0) qsort(speed, (size_t)n_speeds, sizeof *speed, by_size);
    row->bytes = n_bytes ? bytes / n_bytes : 0;
    row->speed = n_speeds ? speed[n_speeds / 2] : 0;
}

// Cells [first, r->n) that belong to the figure of cell `first`, as a row for each of its columns;
// these go together in v [EVAL_COLUMNS][room].
static void figure_rows(const EvalResults *r, int first, bool *done, EvalRow *row, float *v,
                        size_t room) {
    const EvalCell *c = &r->cell[first];
    int n = 0;
    double kept = 0;
    for (int i = first; i < r->n; i++) {
        const EvalCell *d = &r->cell[i];
        if (done[i] || !same_figure(c, d)) continue;
        for (int m = 0; m < EVAL_COLUMNS; m++)
            memcpy(v + m * room + n, d->value + (size_t)m * d->n, (size_t)d->n * sizeof *v);
        kept += d->kept * d->n;
        n += d->n;
        done[i] = true;
    }
    for (int m = 0; m < EVAL_COLUMNS; m++) {
        row[m] = (EvalRow){.task = c->task,
                           .policy = c->policy,
                           .level = c->level,
                           .kv = c->kv,
                           .fit = c->fit,
                           .metric = m == 0 ? c->metric : columns[m],
                           .ratio = c->ratio,
                           .kept = kept / n};
        summarize(&row[m], v + m * room, n, m < 2);
    }
}

int eval_rows(const EvalResults *r, EvalRow **rows, int *n, char *err) {
    size_t room = 1;
    for (int i = 0; i < r->n; i++) room += (size_t)r->cell[i].n;
    bool *done = calloc((size_t)r->n + 1, sizeof *done);
    float *v = malloc(EVAL_COLUMNS * room * sizeof *v);
    double *speed = malloc(((size_t)r->n + 1) * sizeof *speed);
    *rows = malloc((EVAL_COLUMNS * (size_t)r->n + 1) * sizeof **rows);
    *n = 0;
    bool ok = done && v && speed && *rows;
    for (int i = 0; ok && i < r->n; i++) {
        if (done[i]) continue;
        EvalRow *row = *rows + *n, costs;
        figure_rows(r, i, done, row, v, room);
        figure_costs(r, i, &costs, speed);
        for (int m = 0; m < EVAL_COLUMNS; m++)
            row[m].bytes = costs.bytes, row[m].speed = costs.speed;
        *n += EVAL_COLUMNS;
    }
    free(done);
    free(v);
    free(speed);
    return ok ? eval_means(rows, n, err) : fail(err, "out of memory");
}
