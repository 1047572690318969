// page.c: results as one page for a browser: what `run eval --page` writes.
//
// First the mean of all tasks, then a curve per task, then the figures behind them. A table has a
// line per method and a column per ratio, whatever its cells say.
#include "eval/page.h"

#include <stdlib.h>
#include <string.h>

#include "eval/chart.h"
#include "newfile.h"
#include "util.h"

enum { COLUMNS = 16 };

typedef struct {
    FILE *f;
    const EvalRow *rows, *deep;  // [n], and by depth [n_deep]
    int n, n_deep;
    EvalRow *some;  // [n or n_deep] room for those of a picture
    double ratio[COLUMNS];
    int n_ratios;
} Page;

static const char head[] =
    "<!DOCTYPE html>\n<html lang='en' xmlns='http://www.w3.org/1999/xhtml'><head>"
    "<meta charset='utf-8'/><title>What compressing costs</title>\n"
    "<style>body{font:15px/1.5 sans-serif;max-width:76em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}"
    "th,td{padding:.2em .7em;text-align:right;font-weight:normal;border-bottom:1px solid #ddd}"
    "th:first-child{text-align:left}thead th{border-color:#444}small{color:#666}"
    ".row{display:flex;flex-wrap:wrap}.row svg{flex:1;min-width:22em}</style></head>\n<body>\n"
    "<h1>What compressing costs</h1>\n";

// ---- tables ----

static void put_text(FILE *f, const char *s) { chart_text(f, s, strlen(s)); }

static void cell_share(FILE *f, const EvalRow *r) {
    fprintf(f, "%.1f <small>±%.1f</small>", 100 * r->value, 50 * (r->high - r->low));
}

static void cell_kl(FILE *f, const EvalRow *r) { fprintf(f, "%.4f", r->value); }

static void cell_bytes(FILE *f, const EvalRow *r) {
    if (r->bytes > 0) fprintf(f, "%.2f", r->bytes / (1 << 20));
}

static void cell_speed(FILE *f, const EvalRow *r) {
    if (r->speed > 0) fprintf(f, "%.1f", r->speed);
}

// The row of the same task, metric and method as `like` at a ratio, or NULL.
static const EvalRow *row_at(const Page *p, const EvalRow *like, double ratio) {
    for (const EvalRow *r = p->rows; r < p->rows + p->n; r++)
        if (r->ratio == ratio && eval_row_same_task(r, like) && eval_row_same_line(r, like))
            return r;
    return NULL;
}

static bool begins_line(const Page *p, int i) {
    for (int j = 0; j < i; j++)
        if (eval_row_same_task(&p->rows[j], &p->rows[i]) &&
            eval_row_same_line(&p->rows[j], &p->rows[i]))
            return false;
    return true;
}

static bool begins_task(const Page *p, int i) {
    for (int j = 0; j < i; j++)
        if (eval_row_same_task(&p->rows[j], &p->rows[i])) return false;
    return true;
}

// All methods of the task and metric of rows[first].
static void put_table(const Page *p, int first, const char *title,
                      void (*cell)(FILE *f, const EvalRow *r)) {
    fprintf(p->f, "<table><thead><tr><th>%s</th>", title);
    for (int k = 0; k < p->n_ratios; k++) fprintf(p->f, "<th>%g</th>", p->ratio[k]);
    fputs("</tr></thead><tbody>\n", p->f);
    for (int i = first; i < p->n; i++) {
        if (!eval_row_same_task(&p->rows[i], &p->rows[first]) || !begins_line(p, i)) continue;
        fputs("<tr><th>", p->f);
        chart_method(p->f, &p->rows[i]);
        fputs("</th>", p->f);
        for (int k = 0; k < p->n_ratios; k++) {
            const EvalRow *r = row_at(p, &p->rows[i], p->ratio[k]);
            fputs("<td>", p->f);
            if (r) cell(p->f, r);
            fputs("</td>", p->f);
        }
        fputs("</tr>\n", p->f);
    }
    fputs("</tbody></table>\n", p->f);
}

// ---- chapters ----

static bool is_mean(const EvalRow *r) { return strcmp(r->metric, "mean") == 0; }

// Takes the rows that a picture shows; returns how many.
static int take_rows(const Page *p, bool (*is)(const EvalRow *r)) {
    int n = 0;
    for (int i = 0; i < p->n; i++)
        if (is(&p->rows[i])) p->some[n++] = p->rows[i];
    return n;
}

static void put_means(const Page *p) {
    int n = take_rows(p, is_mean), first = 0;
    while (first < p->n && !is_mean(&p->rows[first])) first++;
    if (n == 0) return;
    fputs(
        "<h2>All tasks</h2>\n<p>The mean of the tasks of which the full cache gets 30% at least "
        "and that every method has done, each with the same weight; a bar is a 95% interval. "
        "Counted are:",
        p->f);
    for (int i = 0; i < p->n; i++) {
        if (!begins_task(p, i) || !p->rows[i].counts) continue;
        fputs(" <em>", p->f);
        put_text(p->f, p->rows[i].task);
        fputs("</em>", p->f);
    }
    fputs(".</p>\n<div class='row'>\n", p->f);
    for (int axis = CHART_KEPT; axis <= CHART_SPEED; axis++)
        chart_svg(p->f, p->some, n, (ChartAxis)axis);
    fputs("</div>\n", p->f);
    put_table(p, first, "mean, %", cell_share);
    put_table(p, first, "MiB of a context in memory", cell_bytes);
    put_table(p, first, "tokens/s of one answer, where measured", cell_speed);
}

static void put_tasks(const Page *p) {
    int n = take_rows(p, eval_row_is_value);
    fputs("<h2>Each task</h2>\n", p->f);
    chart_svg(p->f, p->some, n, CHART_KEPT);
    for (int i = 0; i < p->n; i++) {
        const EvalRow *r = &p->rows[i];
        bool value = eval_row_is_value(r), kl = strcmp(r->metric, "kl") == 0;
        if ((!value && !kl) || !begins_task(p, i)) continue;
        if (value) {
            fputs("<h3>", p->f);
            put_text(p->f, r->task);
            fprintf(p->f, " <small>%d answers</small></h3>\n", r->n);
            fputs("<p>Metric: ", p->f);
            put_text(p->f, r->metric);
            fputs("</p>\n", p->f);
            put_table(p, i, "right, %", cell_share);
        } else {
            put_table(p, i, "KL of the full cache's answers, nat per token", cell_kl);
        }
    }
}

static void put_depths(const Page *p) {
    int n = 0;
    for (int i = 0; i < p->n_deep; i++)
        if (eval_row_is_value(&p->deep[i])) p->some[n++] = p->deep[i];
    if (n == 0) return;
    fputs("<h2>By depth</h2>\n<p>Where in the context the answer stands: 0 is its beginning.</p>\n",
          p->f);
    chart_svg(p->f, p->some, n, CHART_DEPTH);
}

static void put_page(const Page *p, const char *settings) {
    fputs(head, p->f);
    fputs(
        "<p>A context is compressed once, without its questions, and every question is asked of "
        "what stays. Columns: share of the pairs asked for.</p>\n<p><small>",
        p->f);
    if (settings) put_text(p->f, settings);
    fputs("</small></p>\n", p->f);
    put_means(p);
    put_depths(p);
    put_tasks(p);
    fputs("</body></html>\n", p->f);
}

// Writes the file, with room for the rows of a picture.
static int write_file(Page *p, const char *settings, const char *path, char *err) {
    NewFile out;
    if (newfile_begin(&out, path, err) != 0) return -1;
    p->f = out.file;
    p->some = malloc(((size_t)max_int(p->n, p->n_deep) + 1) * sizeof *p->some);
    if (!p->some) return newfile_abort(&out), fail(err, "out of memory");
    p->n_ratios = eval_row_ratios(p->rows, p->n, p->ratio, COLUMNS);
    put_page(p, settings);
    free(p->some);
    return newfile_commit(&out, err);
}

int page_write(const EvalRow *rows, int n, const EvalResults *r, const char *path, char *err) {
    EvalRow *deep = NULL;
    int n_deep = 0, status = eval_depths(r, &deep, &n_deep, err);
    Page p = {.rows = rows, .deep = deep, .n = n, .n_deep = n_deep};
    if (status == 0) status = write_file(&p, r->settings, path, err);
    free(deep);
    return status;
}
