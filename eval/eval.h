// eval.h: what compressing costs. Perplexity of a text; and questions of which every one is asked
// of the same compressed cache, for each policy, level, ratio and page type, beside the full cache.
#ifndef EVAL_H
#define EVAL_H
#include "policies.h"

enum { EVAL_LIST = 16 };

// ---- perplexity ----

typedef struct {
    RunState *state;  // as many rows as it has room for logits are scored at a time
    const Tokenizer *tok;
    KVTypes kv;
    int window;  // tokens per window, at least 4
    int (*progress)(void *arg, int window, int n_windows, double ppl);  // nonzero stops
    void *arg;
} Perplexity;

typedef struct {
    double value, error;  // exp(mean), and its standard error
    double low, high;     // 95% interval, from the standard error of the mean
    int n;                // tokens scored
} PerplexityResult;

// The windowing of llama.cpp's llama-perplexity, so that figures can be compared: the text, less
// one newline at its end, is cut into windows that do not overlap; where the tokenizer adds a
// beginning token it takes the place of each window's first one; what the second half's tokens say
// about their successors in the window is scored; what is left at the end of the text is not.
// Returns 0, or -1 with err.
int eval_perplexity(const Perplexity *p, const char *text, size_t n, PerplexityResult *out,
                    char *err);

// ---- tasks ----

typedef enum { METRIC_CONTAINED, METRIC_EXACT, METRIC_F1, METRIC_CHOICE, METRICS } EvalMetric;

typedef struct {
    const char *question, *answer_prefix;  // answer_prefix "" when there is none
    char **answers;                        // [n_answers] at least one; normalized, but for a choice
    int n_answers;
} EvalQuestion;

typedef struct {
    int line;          // in the file, from 1
    const char *task;  // its name in the results
    const char *context;
    const char *stop;  // an answer ends after this text; NULL: as Eval has it
    EvalMetric metric;
    bool all;        // contained: the share of the answers found, not whether one of them is
    int max_tokens;  // of an answer; 0: as Eval has it
    EvalQuestion *questions;
    int n_questions;
    char **answers;  // of all questions
} EvalTask;

typedef struct {
    EvalTask *task;  // [n] in the order of the file
    int n;
    uint64_t hash;  // of the file's bytes
    char *text;     // the file; every string above points in here, unescaped in place
} EvalTasks;

// Reads JSON Lines, one context a line: {"context": "..", "metric": "contained|exact|f1|choice",
// "questions": [{"question": "..", "answer_prefix": "..", "answers": [".."]}]} and, where wanted,
// "task", "stop", "max_tokens", "all". Unknown members are left alone. Returns 0, or -1 with err,
// which names the line.
int eval_tasks_open(EvalTasks *t, const char *path, char *err);
void eval_tasks_close(EvalTasks *t);  // safe on a zeroed struct, and twice

// How good an answer is, 0 to 1. Texts are compared in lower case without punctuation and articles,
// number words as digits: answer is changed in place.
double eval_answer(const EvalTask *t, const EvalQuestion *q, char *answer);

// ---- results ----

// The questions of one context, asked of one cache. Policy "full" is the yardstick.
typedef struct {
    const char *task, *metric, *policy, *level, *kv;
    int context;      // the line of the task file, from 1
    double ratio;     // asked for
    double kept;      // achieved: share of the context's pairs, in the layers that evict
    int n;            // questions
    float *value;     // [n] the task's metric
    float *same;      // [n] 1: the answer is the full cache's, token for token
    float *kl, *nll;  // [n] nat per token of the full cache's answer
} EvalCell;

typedef struct {
    EvalCell *cell;  // [n]
    int n, cap;
    char *settings;  // what all cells share: model, tasks and the like; NULL: not known yet
    FILE *log;       // where new cells are added, or NULL
    char *
        *text;  // [n_texts] the files read: cells' strings point in here, or into tasks and tables
    int n_texts;
} EvalResults;

// Reads cells from a file of results, if there is one; `append` keeps it open, so that eval_run
// adds each cell as it is done. A last line that was cut off is dropped. Cells that are there
// already are left out, cells of another model or other settings refused. Returns 0, or -1 with
// err.
int eval_results_open(EvalResults *r, const char *path, bool append, char *err);
int eval_results_save(const EvalResults *r, const char *path,
                      char *err);         // all of them, as a new file
void eval_results_close(EvalResults *r);  // safe on a zeroed struct, and twice

// A figure over all contexts of a task.
typedef struct {
    const char *task, *policy, *level, *kv;
    const char *metric;  // contained, exact, f1, choice; same, kl, nll
    double ratio, kept;
    double value, low, high;  // mean over questions; 95% bootstrap interval, fixed seed
    int n;                    // questions
} EvalRow;

// rows is malloc'ed. In the order in which tasks and cells were done. Returns 0, or -1 with err.
int eval_rows(const EvalResults *r, EvalRow **rows, int *n, char *err);

// ---- policies and ratios ----

// What becomes of a compressed cache's pairs: pages settle, and evicted pairs may be demoted.
typedef struct {
    KVTypes types;
    bool demote;
    const char *name;  // in the results: "q8/q4", "f16+q2"
} EvalKV;

typedef struct {
    RunState *state;    // max_logits: answers that decode together
    Context context;    // tok, chunk, local, postfix; the rest is filled in per context
    const Ids *prefix;  // protected ids before every context
    const Policy *policy[EVAL_LIST];
    const Level *level[EVAL_LIST];
    const char *set;  // "key=value,..": each takes the parameters it knows; or NULL
    double ratio[EVAL_LIST];
    EvalKV kv[EVAL_LIST];  // the full cache of the first one is the yardstick
    int n_policies, n_levels, n_ratios, n_kvs;
    bool stream;       // evict while a context is read: policies that score live, no level of whole
                       // heads, nothing demoted
    int window;        // with stream: newest pairs of each head, which stay meanwhile
    int max_tokens;    // of an answer, where the task does not say
    const char *stop;  // an answer ends after this text, where the task does not say; or NULL
    int shard, n_shards;  // contexts shard, shard + n_shards, .. (from 0)
    uint64_t settings;    // hash of whatever else changes the answers
    // Appends what follows the context: question, turn change, start of the answer. 0, or -1: no
    // memory.
    int (*ask)(void *arg, const EvalQuestion *q, Ids *ids);
    void *ask_arg;
    int (*progress)(void *arg, long done, long total);  // questions times cells; nonzero stops
    void *progress_arg;
} Eval;

// Whether e->set makes sense: every key is one that a policy or a level of e knows. 0, or -1 with
// err.
int eval_check_set(const Eval *e, char *err);

// Every question of every context, for each policy, level, ratio and page type that r does not have
// yet. A policy scores a context once; its scores serve all ratios, levels and page types. With
// stream every cell reads the context for itself, once per group of questions that decode together.
// Pages settle once pairs have been evicted, as in compressing. Answers are greedy and leave no
// trace. Returns 0, or -1 with err.
int eval_run(const Eval *e, const EvalTasks *tasks, EvalResults *r, char *err);
#endif
