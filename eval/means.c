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

// The full cache's row, the first one where there are several page types, decides.
bool eval_row_counts(const EvalRow *rows, int n, int i) {
    static const double FAIR = 0.3;
    if (!eval_row_is_value(&rows[i])) return false;
    for (int j = 0; j < n; j++)
        if (eval_row_same_task(&rows[j], &rows[i]) && strcmp(rows[j].policy, "full") == 0)
            return rows[j].value >= FAIR;
    return false;
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
static bool was_seen(const EvalRow *rows, int i, const bool *counted) {
    for (int j = 0; j < i; j++)
        if (counted[j] && rows[j].ratio == rows[i].ratio && eval_row_same_line(&rows[j], &rows[i]))
            return true;
    return false;
}

// The mean of all rows of the method and ratio of rows[first]. Its interval comes from those of the
// tasks, which are independent: squared distances add up, below and above (Zou and Donner 2008).
static EvalRow mean_of(const EvalRow *rows, int n, int first, const bool *counted) {
    EvalRow m = rows[first];
    double below = 0, above = 0, n_tasks = 0, n_bytes = 0, n_speeds = 0;
    m.value = m.kept = m.bytes = m.speed = m.n = 0;
    for (int i = first; i < n; i++) {
        const EvalRow *r = &rows[i];
        if (!counted[i] || r->ratio != m.ratio || !eval_row_same_line(r, &m)) continue;
        n_tasks++, n_bytes += r->bytes > 0, n_speeds += r->speed > 0;
        m.value += r->value, m.kept += r->kept, m.n += r->n;
        m.bytes += r->bytes, m.speed += r->speed;
        below += (r->value - r->low) * (r->value - r->low);
        above += (r->high - r->value) * (r->high - r->value);
    }
    m.metric = "mean";
    m.value /= n_tasks, m.kept /= n_tasks;
    m.bytes /= fmax(n_bytes, 1), m.speed /= fmax(n_speeds, 1);
    m.low = m.value - sqrt(below) / n_tasks, m.high = m.value + sqrt(above) / n_tasks;
    return m;
}

// A row for each method and ratio behind the other ones, for which there is room.
static void add_means(EvalRow *rows, int *n, const bool *counted) {
    int end = *n;
    for (int i = 0; i < end; i++) {
        if (!counted[i] || was_seen(rows, i, counted)) continue;
        EvalRow *m = &rows[(*n)++];
        *m = mean_of(rows, end, i, counted);
        m->task = "all tasks";
    }
}

int eval_means(EvalRow **rows, int *n, char *err) {
    EvalRow *more = realloc(*rows, (2 * (size_t)*n + 1) * sizeof *more);
    bool *counted = calloc((size_t)*n + 1, sizeof *counted);
    const EvalRow *first = NULL;
    bool several = false;
    if (more) *rows = more;
    if (!more || !counted) return free(counted), fail(err, "out of memory");
    for (int i = 0; i < *n; i++) {
        counted[i] = eval_row_counts(more, *n, i);
        if (!counted[i]) continue;
        if (!first) first = &more[i];
        several = several || !eval_row_same_task(first, &more[i]);
    }
    if (several) add_means(more, n, counted);
    free(counted);
    return 0;
}
