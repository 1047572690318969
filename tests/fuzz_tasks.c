// fuzz_tasks.c: tasks are read or refused, and an answer to each question is worth between 0 and 1.
#include "fuzz.h"

#include "eval/tasks.h"
#include "util.h"

static void mark(const EvalTask *t) {
    char err[ERR_LEN];
    double v;
    MUST(t->n_questions > 0 && t->context[0]);
    for (int i = 0; i < t->n_questions; i++) {
        const EvalQuestion *q = &t->questions[i];
        MUST(eval_answer(t, q, "The seven (b) geese, 12.", &v, err) == 0 && v >= 0 && v <= 1);
        MUST(eval_answer(t, q, q->answers[0], &v, err) == 0 && v > 0 && v <= 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static FuzzFile file;
    char err[ERR_LEN];
    EvalTasks t;
    if (!file.path[0]) file = fuzz_file();
    fuzz_put(&file, data, n);
    if (eval_tasks_open(&t, file.path, err) != 0) return 0;
    for (int i = 0; i < t.n; i++) mark(&t.task[i]);
    eval_tasks_close(&t);
    return 0;
}
