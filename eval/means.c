// means.c: one figure for all tasks together.
//
// Tasks weigh the same, however many questions they have. A task that the full cache cannot do says
// nothing about what compressing costs, so that only those count of which it gets a fair part
// right; which these are does not depend on any method.
#include "eval/results.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

bool eval_row_is_value(const EvalRow *r) {
    return strcmp(r->metric, "same") != 0 && strcmp(r->metric, "kl") != 0 &&
           strcmp(r->metric, "nll") != 0 && strcmp(r->metric, "mean") != 0;
}

bool eval_row_same_task(const EvalRow *a, const EvalRow *b) {
    return strcmp(a->task, b->task) == 0 && strcmp(a->metric, b->metric) == 0;
}

bool eval_row_same_line(const EvalRow *a, const EvalRow *b) {
    return strcmp(a->policy, b->policy) == 0 && strcmp(a->level, b->level) == 0 &&
           strcmp(a->fit, b->fit) == 0 && strcmp(a->kv, b->kv) == 0;
}

// How many rows the task of rows[i] has, one for each method and ratio.
static int task_rows(const EvalRow *rows, int n, int i) {
    int count = 0;
    for (int j = 0; j < n; j++) count += eval_row_same_task(&rows[j], &rows[i]);
    return count;
}

// Whether the full cache does the task of rows[i]: the first one where there are several page
// types.
static bool is_done(const EvalRow *rows, int n, int i) {
    static const double FAIR = 0.3;
    for (int j = 0; j < n; j++)
        if (eval_row_same_task(&rows[j], &rows[i]) && strcmp(rows[j].policy, "full") == 0)
            return rows[j].value >= FAIR;
    return false;
}

// Marks the rows of the tasks that count: all methods must have the same ones, in results that are
// not complete, too. Returns how many tasks those are.
static int mark_tasks(EvalRow *rows, int n) {
    int most = 0, n_tasks = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < n; i++) {
            int first = 0;
            while (!eval_row_same_task(&rows[first], &rows[i])) first++;
            if (first < i) {
                rows[i].counts = rows[first].counts;
                continue;
            }
            int size = eval_row_is_value(&rows[i]) ? task_rows(rows, n, i) : 0;
            most = max_int(most, size);
            rows[i].counts = pass == 1 && size > 0 && size == most && is_done(rows, n, i);
            n_tasks += rows[i].counts;
        }
    }
    return n_tasks;
}

int eval_row_ratios(const EvalRow *rows, int n, double *ratio, int most) {
    int count = 0;
    for (double last = INFINITY, next; count < most; ratio[count++] = last = next) {
        next = -1;
        for (int i = 0; i < n; i++)
            if (rows[i].ratio < last && rows[i].ratio > next) next = rows[i].ratio;
        if (next < 0) break;
    }
    return count;
}

// Whether an earlier task has a row of the same method and ratio.
static bool was_seen(const EvalRow *rows, int i) {
    for (int j = 0; j < i; j++)
        if (rows[j].counts && rows[j].ratio == rows[i].ratio &&
            eval_row_same_line(&rows[j], &rows[i]))
            return true;
    return false;
}

// The mean of all rows of the method and ratio of rows[first]. Its interval comes from those of the
// tasks, which are independent: squared distances add up, below and above (Zou and Donner 2008).
static EvalRow mean_of(const EvalRow *rows, int n, int first) {
    EvalRow m = rows[first];
    double below = 0, above = 0, n_tasks = 0, n_bytes = 0, n_speeds = 0;
    m.value = m.kept = m.bytes = m.speed = m.n = 0;
    for (int i = first; i < n; i++) {
        const EvalRow *r = &rows[i];
        if (!r->counts || r->ratio != m.ratio || !eval_row_same_line(r, &m)) continue;
        n_tasks++, n_bytes += r->bytes > 0, n_speeds += r->speed > 0;
        m.value += r->value, m.kept += r->kept, m.n += r->n;
        m.bytes += r->bytes, m.speed += r->speed;
        below += (r->value - r->low) * (r->value - r->low);
        above += (r->high - r->value) * (r->high - r->value);
    }
    m.task = "all tasks", m.metric = "mean", m.counts = false;
    m.value /= n_tasks, m.kept /= n_tasks;
    m.bytes /= fmax(n_bytes, 1), m.speed /= fmax(n_speeds, 1);
    m.low = m.value - sqrt(below) / n_tasks, m.high = m.value + sqrt(above) / n_tasks;
    return m;
}

int eval_means(EvalRow **rows, int *n, char *err) {
    EvalRow *more = realloc(*rows, (2 * (size_t)*n + 1) * sizeof *more);
    if (!more) return fail(err, "out of memory");
    *rows = more;
    int end = *n, n_tasks = mark_tasks(more, end);
    for (int i = 0; i < end && n_tasks > 1; i++)
        if (more[i].counts && !was_seen(more, i)) more[(*n)++] = mean_of(more, end, i);
    return 0;
}

// The next larger depth of a cell, or -1.
static double next_depth(const EvalResults *r, double depth) {
    double next = -1;
    for (const EvalCell *c = r->cell; c < r->cell + r->n; c++)
        if (c->depth > depth && (next < 0 || c->depth < next)) next = c->depth;
    return next;
}

int eval_depths(const EvalResults *r, EvalRow **rows, int *n, char *err) {
    EvalResults at = {.cell = malloc(((size_t)r->n + 1) * sizeof *at.cell)};
    int status = at.cell ? 0 : fail(err, "out of memory");
    *rows = malloc((EVAL_COLUMNS * (size_t)r->n + 1) * sizeof **rows), *n = 0;
    if (status == 0 && !*rows) status = fail(err, "out of memory");
    for (double d = next_depth(r, -1); status == 0 && d >= 0; d = next_depth(r, d)) {
        EvalRow *some = NULL;
        int n_some = 0;
        at.n = 0;
        for (int i = 0; i < r->n; i++)
            if (r->cell[i].depth == d) at.cell[at.n++] = r->cell[i];
        status = eval_rows(&at, &some, &n_some, err);
        for (int i = 0; i < n_some && status == 0; i++) {
            if (strcmp(some[i].metric, "mean") == 0) continue;
            (*rows)[*n] = some[i];
            (*rows)[(*n)++].depth = d;
        }
        free(some);
    }
    free(at.cell);
    return status;
}
