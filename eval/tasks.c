// tasks.c: tasks from JSON Lines.
//
// A task is a context and questions about it, each with the answers that are right. The files' text
// stays in memory and every string points into it.
#define _POSIX_C_SOURCE 200809L
#include "eval/tasks.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "text.h"
#include "util.h"

// ---- how good an answer is ----

// The similarity of an answer to the nearest code that q wants, or -1.
static double similarity(const EvalQuestion *q, const char *answer) {
    double best = 0;
    for (int i = 0; i < q->n_answers; i++) {
        double v = mark_similar(answer, q->answers[i]);
        if (v < 0) return -1;
        best = fmax(best, v);
    }
    return best;
}

// Whether the answer's code is nearer to what another question wants than to what q does: 0, 1, or
// -1.
static int wants_other(const EvalTask *t, const EvalQuestion *q, const char *answer) {
    double own = similarity(q, answer), other = 0;
    for (int i = 0; i < t->n_questions && other >= 0 && other <= own; i++)
        if (&t->questions[i] != q) other = similarity(&t->questions[i], answer);
    return own < 0 || other < 0 ? -1 : other > own;
}

int eval_answer(const EvalTask *t, const EvalQuestion *q, const char *answer, double *value,
                char *err) {
    double best = 0, sum = 0;
    for (int i = 0; i < q->n_answers; i++) {
        double v = mark_answer(t->metric, answer, q->answers[i]);
        if (v < 0) return fail(err, "out of memory");
        best = fmax(best, v);
        sum += v;
    }
    if (t->metric == METRIC_CODE && best > 0) {
        int other = wants_other(t, q, answer);
        if (other < 0) return fail(err, "out of memory");
        if (other) best = 0;
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
    static const char *const why[METRICS] = {
        [METRIC_CHOICE] = "has no letter that stands alone", [METRIC_NUMBER] = "has no number"};
    char *words = mark_words(answer, true);
    if (!words) return fail(err, "out of memory");
    bool none = !*words;
    free(words);
    if (none && metric != METRIC_CHOICE) return fail(err, "an empty answer");
    double value = mark_answer(metric, answer, answer);
    if (value < 0) return fail(err, "out of memory");
    if (value > 0) return 0;
    return fail(err, "metric %s: answer \"%s\" %s", metric_names[metric], answer,
                why[metric] ? why[metric] : "would be marked wrong itself");
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
    const JsonNode *depth = json_may(&f, "depth", JSON_NUMBER);
    const JsonNode *questions = json_need(&f, "questions", JSON_LIST);
    if (f.failed || take_metric(t, metric, err) != 0) return -1;
    if (!*t->context) return fail(err, "an empty context");
    t->task = name ? name : "task";
    t->all = all && all->n;
    double limit = most ? json_number(most) : 1;
    if (!(limit >= 1 && limit <= 65536)) return fail(err, "\"max_tokens\" is not from 1 to 65536");
    t->max_tokens = most ? (int)limit : 0;
    t->depth = depth ? json_number(depth) : -1;
    if (depth && !(t->depth >= 0 && t->depth <= 1))
        return fail(err, "\"depth\" is not from 0 to 1");
    return take_questions(t, questions, err);
}

// Room for one more task.
static int grow(EvalTasks *t) {
    if (t->n < t->cap) return 0;
    int cap = 2 * t->cap + 16;
    EvalTask *task = realloc(t->task, (size_t)cap * sizeof *task);
    if (!task) return -1;
    t->task = task, t->cap = cap;
    return 0;
}

static int read_lines(EvalTasks *t, JsonLines *lines, char *err) {
    const JsonNode *top;
    while (json_lines_next(lines, &top, err) == 0) {
        if (!top) return 0;
        if (grow(t) != 0) return fail(err, "out of memory");
        t->task[t->n] = (EvalTask){.line = lines->line, .place = lines->line};
        if (take_task(&t->task[t->n++], top, err) != 0) return -1;
    }
    return -1;
}

// A file's n bytes, of which a mark comes first.
static int read_tasks(EvalTasks *t, char *text, size_t n, char *err) {
    JsonLines lines = {.rest = text + text_mark(text, n)};
    char why[ERR_LEN];
    int before = t->n;
    t->hash = hash_bytes(t->hash, text, n);
    int rc = read_lines(t, &lines, why);
    if (rc != 0) fail(err, "line %d: %s", lines.line, why);
    json_lines_close(&lines);
    return rc == 0 && t->n == before ? fail(err, "no tasks in it") : rc;
}

// Takes the path over.
static int add_file(EvalTasks *t, char *path, char *err) {
    EvalFile *file = path ? realloc(t->file, (size_t)(t->n_files + 1) * sizeof *file) : NULL;
    if (!file) return free(path), fail(err, "out of memory");
    t->file = file, file += t->n_files++;
    *file = (EvalFile){.path = path, .first = t->n};
    Buffer text;
    int rc = text_read(&text, path, err) == TEXT_FINE ? 0 : -1;
    file->text = text.s;
    return rc == 0 ? read_tasks(t, text.s, text.n, err) : -1;
}

// ---- folders ----

static int is_task_file(const struct dirent *e) {
    static const char end[] = ".jsonl";
    size_t n = strlen(e->d_name), n_end = sizeof end - 1;
    return n > n_end && e->d_name[0] != '.' && strcmp(e->d_name + n - n_end, end) == 0;
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

// The paths of the folder's files of tasks, *path [*n] with room for one more. 0, or -1: no memory.
static int list_folder(DIR *dir, const char *folder, char ***path, int *n) {
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        if (!is_task_file(e)) continue;
        char **more = realloc(*path, (size_t)(*n + 1) * sizeof *more);
        if (!more) return -1;
        *path = more;
        size_t room = strlen(folder) + strlen(e->d_name) + 2;
        if (!(more[*n] = malloc(room))) return -1;
        snprintf(more[(*n)++], room, "%s/%s", folder, e->d_name);
    }
    if (*n > 0) qsort(*path, (size_t)*n, sizeof **path, by_name);
    return 0;
}

// Deals the files' tasks out in turn, so that whatever is done first has something of each.
static int deal(EvalTasks *t, char *err) {
    EvalTask *dealt = malloc(((size_t)t->n + 1) * sizeof *dealt);
    if (!dealt) return fail(err, "out of memory");
    for (int turn = 0, n = 0; n < t->n; turn++) {
        for (int i = 0; i < t->n_files; i++) {
            int end = i + 1 < t->n_files ? t->file[i + 1].first : t->n;
            if (t->file[i].first + turn >= end) continue;
            dealt[n] = t->task[t->file[i].first + turn];
            dealt[n].place = n + 1;
            n++;
        }
    }
    free(t->task);
    t->task = dealt;
    return 0;
}

static int read_folder(EvalTasks *t, DIR *dir, const char *folder, char *err) {
    char **path = NULL, why[ERR_LEN];
    int n = 0, rc = list_folder(dir, folder, &path, &n);
    if (rc != 0) fail(err, "out of memory");
    if (rc == 0 && n == 0) rc = fail(err, "a folder without a .jsonl file");
    for (int i = 0; i < n; i++) {
        if (rc != 0) {
            free(path[i]);
        } else if ((rc = add_file(t, path[i], why)) != 0) {
            const char *name = t->n_files > i ? t->file[i].path + strlen(folder) + 1 : "";
            fail(err, "%s: %s", name, why);
        }
    }
    free(path);
    return rc == 0 ? deal(t, err) : -1;
}

int eval_tasks_open(EvalTasks *t, const char *path, char *err) {
    *t = (EvalTasks){.hash = HASH_START};
    DIR *dir = strcmp(path, "-") == 0 ? NULL : opendir(path);
    char *copy = dir ? NULL : malloc(strlen(path) + 1);
    if (copy) strcpy(copy, path);
    int rc = dir ? read_folder(t, dir, path, err) : add_file(t, copy, err);
    if (dir) closedir(dir);
    if (rc != 0) eval_tasks_close(t);
    return rc;
}

void eval_tasks_close(EvalTasks *t) {
    for (int i = 0; i < t->n; i++) {
        for (int q = 0; q < t->task[i].n_questions; q++) free(t->task[i].questions[q].answers);
        free(t->task[i].questions);
    }
    for (int i = 0; i < t->n_files; i++) {
        free(t->file[i].path);
        free(t->file[i].text);
    }
    free(t->file);
    free(t->task);
    *t = (EvalTasks){0};
}
