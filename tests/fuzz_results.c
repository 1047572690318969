// fuzz_results.c: files of results that are resumed, merged, saved and drawn.
//
// The input is two files, a zero byte between them. The first is resumed: a cell is added to it as
// `run eval -o` does, and both are found again. Both together are merged: a second time adds
// nothing, what is saved is read back as it was, and its chart is XML.
#include "fuzz.h"

#include <ctype.h>

#include "eval/chart.h"
#include "util.h"

static char err[ERR_LEN], folder[64], path[96];
static FuzzFile first, second;

static void leave(void) {
    unlink(path);
    rmdir(folder);
}

static void begin(void) {
    bool memory = access("/dev/shm", W_OK) == 0;
    snprintf(folder, sizeof folder, "%s/fuzz_results.XXXXXX", memory ? "/dev/shm" : "/tmp");
    MUST(mkdtemp(folder) != NULL && atexit(leave) == 0);
    snprintf(path, sizeof path, "%s/out", folder);
    first = fuzz_file(), second = fuzz_file();
}

// ---- resuming ----

static void resume(void) {
    EvalResults r = {0};
    EvalCell c = {
        .task = "t", .metric = "f1", .policy = "new", .level = "l", .kv = "f16", .fit = "none"};
    c.context = 1, c.ratio = c.kept = 0.5;
    bool added = false;
    if (eval_results_open(&r, first.path, err) == 0) {
        char *settings = strdup(r.settings ? r.settings : "s");
        MUST(eval_results_begin(&r, settings, err) == 0);
        added = eval_results_find(&r, &c) == NULL;
        MUST(eval_cell_alloc(&c, 2) == 0);
        if (added) MUST(eval_results_add(&r, &c, err) == 0);
        free(settings);
        free(c.value);
    }
    int n = r.n;
    eval_results_close(&r);
    if (!added) return;
    MUST(eval_results_read(&r, first.path, err) == 0 && r.n == n);
    MUST(eval_results_find(&r, &c) == &r.cell[n - 1]);
    eval_results_close(&r);
}

// ---- merging ----

// Names in it open, end and refer to nothing.
static void check_xml(void) {
    size_t n;
    bool tag = false;
    char *text = file_read(path, &n, err);
    MUST(text != NULL && strlen(text) == n && !strstr(text, "]]>"));
    for (const char *p = text; *p; p++) {
        MUST((uint8_t)*p >= ' ' || *p == '\n');
        if (*p == '<') {
            MUST(!tag && (isalpha((uint8_t)p[1]) || p[1] == '/'));
            tag = true;
        }
        if (*p == '>') tag = false;
        if (*p == '&') MUST(p[strcspn(p, "; <>")] == ';');
    }
    MUST(!tag);
    free(text);
}

static bool same_rows(const EvalRow *a, const EvalRow *b) {
    return strcmp(a->task, b->task) == 0 && strcmp(a->metric, b->metric) == 0 &&
           strcmp(a->policy, b->policy) == 0 && a->ratio == b->ratio && a->kept == b->kept &&
           a->n == b->n && memcmp(&a->value, &b->value, sizeof a->value) == 0;
}

// What all cells together give, saved and read again.
static void save(const EvalResults *r, const EvalRow *rows, int n_rows) {
    EvalResults again = {0};
    EvalRow *same;
    int n = 0;
    MUST(eval_results_save(r, path, err) == 0 && eval_results_read(&again, path, err) == 0);
    MUST(again.n == r->n && eval_rows(&again, &same, &n, err) == 0 && n == n_rows);
    for (int i = 0; i < n; i++) MUST(same_rows(&same[i], &rows[i]));
    free(same);
    eval_results_close(&again);
}

static void merge(void) {
    EvalResults r = {0};
    EvalRow *rows;
    int n;
    if (eval_results_read(&r, first.path, err) == 0 &&
        eval_results_read(&r, second.path, err) == 0) {
        int once = r.n;
        MUST(eval_results_read(&r, first.path, err) == 0 && r.n == once);
        MUST(eval_rows(&r, &rows, &n, err) == 0);
        if (n > 0) {
            save(&r, rows, n);
            MUST(chart_curves(rows, n, path, err) == 0);
            check_xml();
        }
        free(rows);
    }
    eval_results_close(&r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (!folder[0]) begin();
    const uint8_t *zero = n > 0 ? memchr(data, 0, n) : NULL;
    size_t n_first = zero ? (size_t)(zero - data) : n;
    fuzz_put(&first, data, n_first);
    fuzz_put(&second, zero ? zero + 1 : data, zero ? n - n_first - 1 : n);
    merge();
    resume();
    return 0;
}
