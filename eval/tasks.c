// tasks.c: tasks from JSON Lines.
//
// A task is a context and questions about it, each with the answers that are right. The file's text
// stays in memory and every string points into it.
#include "eval/tasks.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "text.h"
#include "util.h"

// ---- how good an answer is ----

int eval_answer(const EvalTask *t, const EvalQuestion *q, const char *answer, double *value,
                char *err) {
    double best = 0, sum = 0;
    for (int i = 0; i < q->n_answers; i++) {
        double v = mark_answer(t->metric, answer, q->answers[i]);
        if (v < 0) return fail(err, "out of memory");
        best = fmax(best, v);
        sum += v;
    }
    *value = t->all && t->metric == METRIC_CONTAINED ? sum / q->n_answers : best;
    return 0;
}

// ---- tasks ----

static const char *const metric_names[METRICS] = {"contained", "exact",  "f1",   "choice", "qa",
                                                  "rouge",     "number", "code", "edit"};

const char *eval_metric_name(EvalMetric metric) { return metric_names[metric]; }

// An answer that nothing could say would be marked wrong, or right, whatever comes.
static int check_answer(EvalMetric metric, const char *answer, char *err) {
    if (metric == METRIC_CHOICE && mark_answer(metric, answer, answer) != 1)
        return fail(err, "metric choice: answer \"%s\" has no letter that stands alone", answer);
    if (metric == METRIC_NUMBER && mark_answer(metric, answer, answer) != 1)
        return fail(err, "metric number: answer \"%s\" has no number", answer);
    char *words = mark_words(answer, true);
    if (!words) return fail(err, "out of memory");
    bool none = !*words;
    free(words);
    return none ? fail(err, "an empty answer") : 0;
}

static int take_question(EvalQuestion *q, EvalMetric metric, const JsonNode *object, char *err) {
    if (object->kind != JSON_OBJECT) return fail(err, "a question is not an object");
    JsonFields f = {.object = object, .err = err};
    q->question = json_need_text(&f, "question");
    q->answer_prefix = json_may_text(&f, "answer_prefix");
    if (!q->answer_prefix) q->answer_prefix = "";
    const JsonNode *list = json_need(&f, "answers", JSON_LIST);
    if (f.failed) return -1;
    if (list->n == 0) return fail(err, "a question without answers");
    q->answers = calloc((size_t)list->n, sizeof *q->answers);
    if (!q->answers) return fail(err, "out of memory");
    for (const JsonNode *m = list->child; m; m = m->next) {
        if (m->kind != JSON_STRING) return fail(err, "an answer is not a string");
        if (check_answer(metric, m->text, err) != 0) return -1;
        q->answers[q->n_answers++] = m->text;
    }
    return 0;
}

static int take_questions(EvalTask *t, const JsonNode *list, char *err) {
    if (list->n == 0) return fail(err, "a context without questions");
    t->questions = calloc((size_t)list->n, sizeof *t->questions);
    if (!t->questions) return fail(err, "out of memory");
    for (const JsonNode *m = list->child; m; m = m->next) {
        EvalQuestion *q = &t->questions[t->n_questions++];
        if (take_question(q, t->metric, m, err) != 0) return -1;
    }
    return 0;
}

static int take_metric(EvalTask *t, const char *name, char *err) {
    t->metric = METRIC_CONTAINED;
    if (!name) return 0;
    t->metric = 0;
    while (t->metric < METRICS && strcmp(name, metric_names[t->metric]) != 0) t->metric++;
    return t->metric < METRICS ? 0 : fail(err, "no metric \"%s\"", name);
}

static int take_task(EvalTask *t, const JsonNode *top, char *err) {
    JsonFields f = {.object = top, .err = err};
    t->context = json_need_text(&f, "context");
    const char *metric = json_may_text(&f, "metric");
    const char *name = json_may_text(&f, "task");
    t->stop = json_may_text(&f, "stop");
    const JsonNode *all = json_may(&f, "all", JSON_BOOL);
    const JsonNode *most = json_may(&f, "max_tokens", JSON_NUMBER);
    const JsonNode *questions = json_need(&f, "questions", JSON_LIST);
    if (f.failed || take_metric(t, metric, err) != 0) return -1;
    if (!*t->context) return fail(err, "an empty context");
    t->task = name ? name : "task";
    t->all = all && all->n;
    double limit = most ? json_number(most) : 1;
    if (!(limit >= 1 && limit <= 65536)) return fail(err, "\"max_tokens\" is not from 1 to 65536");
    t->max_tokens = most ? (int)limit : 0;
    return take_questions(t, questions, err);
}

// Room for one more task.
static int grow(EvalTasks *t, int *cap) {
    if (t->n < *cap) return 0;
    *cap = 2 * *cap + 16;
    EvalTask *task = realloc(t->task, (size_t)*cap * sizeof *task);
    if (task) t->task = task;
    return task ? 0 : -1;
}

static int read_lines(EvalTasks *t, JsonLines *lines, char *err) {
    const JsonNode *top;
    for (int cap = 0; json_lines_next(lines, &top, err) == 0;) {
        if (!top) return 0;
        if (grow(t, &cap) != 0) return fail(err, "out of memory");
        t->task[t->n] = (EvalTask){.line = lines->line};
        if (take_task(&t->task[t->n++], top, err) != 0) return -1;
    }
    return -1;
}

// The file's n bytes, of which a mark comes first.
static int read_tasks(EvalTasks *t, size_t mark, size_t n, char *err) {
    JsonLines lines = {.rest = t->text + mark};
    char why[ERR_LEN];
    t->hash = hash_bytes(HASH_START, t->text, n);
    int rc = read_lines(t, &lines, why);
    if (rc != 0) fail(err, "line %d: %s", lines.line, why);
    json_lines_close(&lines);
    return rc == 0 && t->n == 0 ? fail(err, "no tasks in it") : rc;
}

int eval_tasks_open(EvalTasks *t, const char *path, char *err) {
    Buffer text;
    *t = (EvalTasks){0};
    int rc = text_read(&text, path, err) == TEXT_FINE ? 0 : -1;
    t->text = text.s;
    size_t mark = rc == 0 ? text_mark(text.s, text.n) : 0;
    if (rc == 0) rc = read_tasks(t, mark, text.n, err);
    if (rc != 0) eval_tasks_close(t);
    return rc;
}

void eval_tasks_close(EvalTasks *t) {
    for (int i = 0; i < t->n; i++) {
        for (int q = 0; q < t->task[i].n_questions; q++) free(t->task[i].questions[q].answers);
        free(t->task[i].questions);
    }
    free(t->task);
    free(t->text);
    *t = (EvalTasks){0};
}
