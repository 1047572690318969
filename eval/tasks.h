// tasks.h: reading tasks, contexts with questions whose answers are known; and how good an answer
// is. Knows nothing of models.
#ifndef TASKS_H
#define TASKS_H
#include <stdbool.h>
#include <stdint.h>

#include "eval/marks.h"

typedef struct {
    const char *question, *answer_prefix;  // answer_prefix "" when there is none
    char **answers;                        // [n_answers] at least one, none of them empty
    int n_answers;
} EvalQuestion;

typedef struct {
    int line;          // in its file, from 1
    int place;         // its number in the results: the line, or in a folder the place in the set
    const char *task;  // its name in the results
    const char *context;
    const char *stop;  // an answer ends after this text; NULL: as Eval has it
    EvalMetric metric;
    bool all;        // contained: the share of the answers found, not whether one of them is
    int max_tokens;  // of an answer; 0: as Eval has it
    double depth;    // where in the context the answer stands, 0 to 1; -1: not said
    EvalQuestion *questions;  // [n_questions]
    int n_questions;
} EvalTask;

typedef struct {
    char *path;
    char *text;  // every string of a task points in here, unescaped in place
    int first;   // of its tasks, as they are read
} EvalFile;

typedef struct {
    EvalTask *task;  // [n] in the order of the file; of a folder's files one after another in turn
    int n, cap;
    uint64_t hash;   // of the files' bytes
    EvalFile *file;  // [n_files] by name
    int n_files;
} EvalTasks;

// As it is called in task files and results: "contained".
const char *eval_metric_name(EvalMetric metric);

// Reads JSON Lines, one context a line: {"context": "..", "metric": "contained|exact|f1|choice|qa|
// rouge|number|code|edit", "questions": [{"question": "..", "answer_prefix": "..", "answers":
// [".."]}]} and, where wanted, "task", "stop", "max_tokens", "all", "depth". Unknown members are
// left alone. The file "-" is stdin. Returns 0, or -1 with err, which names the line.
int eval_tasks_open(EvalTasks *t, const char *path, char *err);

// Frees it, strings included. Safe on a zeroed struct, and twice.
void eval_tasks_close(EvalTasks *t);

// How good an answer is, 0 to 1, goes to *value: as good as by the best of those that are right, or
// with `all` the share of them that it has. Code that is more similar to what another question of
// the context wants is wrong (RepoQA, arXiv 2406.06025). Returns 0, or -1 with err: no memory.
int eval_answer(const EvalTask *t, const EvalQuestion *q, const char *answer, double *value,
                char *err);
#endif
