// results.h: files of results, and the figures that tables and charts are made of. Knows nothing of
// models.
#ifndef RESULTS_H
#define RESULTS_H
#include <stdbool.h>
#include <sys/types.h>

enum { EVAL_COLUMNS = 4 };  // numbers of a question: value, same, kl, nll

// The questions of one context, asked of one cache. Policy "full" is the yardstick.
typedef struct {
    const char *task, *metric, *policy, *level, *kv;
    const char *fit;  // a name of policies/fitting.h; of the full cache "none"
    int context;      // the line of the task file, from 1
    double ratio;     // asked for
    double kept;      // achieved: share of the context's pairs, in the layers that evict
    size_t bytes;     // of the context's pairs in memory; 0: not known
    double speed;     // tokens/s of one answer after them; 0: not measured
    double depth;     // where in the context the answers stand, 0 to 1; -1: not said
    int n;            // questions
    // One block of EVAL_COLUMNS x n numbers, which begins with value.
    float *value;     // [n] the task's metric
    float *same;      // [n] 1: the answer is the full cache's, token for token
    float *kl, *nll;  // [n] nat per token of the full cache's answer
} EvalCell;

// What was said to a question, and how good that is.
typedef struct {
    const char *answer;
    double value;
} EvalMark;

typedef struct {
    EvalCell *cell;  // [n]
    int n, cap;
    char *settings;  // what all cells share: model, tasks and the like; NULL: not known yet
    bool logs;       // whether new cells are added to a file,
    int log;         // which is open and locked
    off_t log_end;   // bytes of whole lines in it
    // [n_texts] the files read: cells' strings point in here, or into tasks and tables.
    char **text;
    int n_texts;
} EvalResults;

// ---- files ----

// Reads cells from a file of results. A last line that was cut off is dropped. Cells that are there
// already are left out, cells of another model or other settings refused. Returns 0, or -1 with
// err.
int eval_results_read(EvalResults *r, const char *path, char *err);

// The same, and keeps the file, which is made where there is none, open and locked, so that
// eval_run adds each cell as it is done; nothing is cut or written before eval_results_begin.
int eval_results_open(EvalResults *r, const char *path, char *err);

// Orders cells by context, those of one as they came: as one run has them, whatever shards they are
// from. Returns 0, or -1 with err: no memory.
int eval_results_order(EvalResults *r, char *err);

// Writes all of them as a new file. Returns 0, or -1 with err and the old file as it was.
int eval_results_save(const EvalResults *r, const char *path, char *err);

// Frees them and closes the log. Safe on a zeroed struct, and twice.
void eval_results_close(EvalResults *r);

// ---- adding ----

// Makes sure that what is there was made with these settings; a new log begins with them. Returns
// 0, or -1 with err.
int eval_results_begin(EvalResults *r, const char *settings, char *err);

// The cell of the same context, ratio, policy, level, fit and page type; NULL when there is none.
const EvalCell *eval_results_find(const EvalResults *r, const EvalCell *like);

// Room for the numbers of n questions, zeros; free(c->value) frees it. 0, or -1: no memory.
int eval_cell_alloc(EvalCell *c, int n);

// Adds a cell, also to the log, and takes its numbers over. Returns 0, or -1 with err.
int eval_results_add(EvalResults *r, EvalCell *c, char *err);

// ---- figures ----

// A figure over all contexts of a task.
typedef struct {
    const char *task, *policy, *level, *kv, *fit;
    const char *metric;  // as marks.h has them, or same, kl, nll
    double ratio, kept;
    double bytes;  // mean over contexts; 0: not known
    double speed;  // tokens/s, the median of those measured; 0: there are none
    // Mean over questions and its 95% interval, of shares that are 0 or 1 each Wilson's, else
    // Student's; high is infinite where one question says nothing about the others.
    double value, low, high;
    int n;         // questions
    double depth;  // of eval_depths alone
    bool counts;   // of a task's metric, and in the mean of all tasks
} EvalRow;

// *rows [*n] is malloc'ed; its strings are the cells'. In the order in which tasks and cells were
// done, four rows each, with its metric first; behind them the means. Returns 0, or -1 with err.
int eval_rows(const EvalResults *r, EvalRow **rows, int *n, char *err);

// The same of the contexts that say a depth, for each depth on its own, from 0 on; without means.
int eval_depths(const EvalResults *r, EvalRow **rows, int *n, char *err);

// Where there are several tasks of which the full cache gets 30% at least and that all methods have
// done, adds for each method and ratio a row of task "all tasks" and metric "mean", their mean.
// Part of eval_rows.
int eval_means(EvalRow **rows, int *n, char *err);

// The different ratios of all rows, `most` at most, from the largest down; returns how many.
int eval_row_ratios(const EvalRow *rows, int n, double *ratio, int most);

bool eval_row_is_value(const EvalRow *r);                     // whether it is of a task's metric
bool eval_row_same_task(const EvalRow *a, const EvalRow *b);  // and of the same metric
bool eval_row_same_line(const EvalRow *a, const EvalRow *b);  // but for the ratio the same method
#endif
