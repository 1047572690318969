// eval.c: what compressing costs, in perplexity and in answers.
//
// Everything here is one operation. A row of questions is fed to forks of one cache together with
// the answer that the full cache gave, and every row of logits is judged where it stands: which
// token is the likeliest, how likely the full cache's token is, how far the distribution is from
// the full cache's. An answer is the full cache's own when no row disagrees, so decoding is needed
// only from the first disagreement on. Perplexity is the same thing with the second half of a
// window as the answer. Tasks and results are JSON Lines; results are appended as cells are done,
// so that a run that was interrupted goes on where it stopped and shards are joined by reading all
// their files.
#define _POSIX_C_SOURCE 200809L
#include "eval/eval.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "policies/stream.h"
#include "util.h"

static const size_t LOGITS_BYTES = (size_t)256 << 20;  // of the full cache, held at a time
enum { RESAMPLES = 1000 };

// ---- JSON ----

typedef enum { J_NULL, J_BOOL, J_NUMBER, J_STRING, J_LIST, J_OBJECT } JsonKind;

typedef struct {
    JsonKind kind;
    const char *key;  // of a member of an object
    char *text;       // of a string
    double number;    // of a number, 0 or 1 of a bool
    int child, next;  // indices of nodes, 0: none
} JsonNode;

// One line at a time. Strings are unescaped in place, which never makes them longer.
typedef struct {
    JsonNode *node;  // [n], the line's value is node 1
    int n, cap;
    char *p;
    char *err;
    int line;
} Json;

enum { JSON_DEPTH = 32 };

static int json_fail(const Json *j, const char *what) {
    return fail(j->err, "line %d: %s", j->line, what);
}

static void json_space(Json *j) { j->p += strspn(j->p, " \t\r"); }

static int json_node(Json *j) {
    if (j->n == j->cap) {
        int cap = 2 * j->cap + 64;
        JsonNode *node = realloc(j->node, (size_t)cap * sizeof *node);
        if (!node) return json_fail(j, "out of memory");
        j->node = node, j->cap = cap;
    }
    j->node[j->n] = (JsonNode){0};
    return j->n++;
}

// One UTF-16 unit, four hexadecimal digits at p; -1 when they are not.
static long json_hex(const char *p) {
    long v = 0;
    for (int i = 0; i < 4; i++) {
        if (!isxdigit((unsigned char)p[i])) return -1;
        v = 16 * v +
            (isdigit((unsigned char)p[i]) ? p[i] - '0' : tolower((unsigned char)p[i]) - 'a' + 10);
    }
    return v;
}

// \uXXXX or a surrogate pair, p on the u; appends UTF-8 to *out.
static int json_unicode(Json *j, char **out) {
    long c = json_hex(j->p + 1), low = 0;
    bool pair = c >= 0xd800 && c < 0xdc00;
    if (pair && j->p[5] == '\\' && j->p[6] == 'u') low = json_hex(j->p + 7);
    if (c <= 0 || (c >= 0xdc00 && c < 0xe000) || (pair && (low < 0xdc00 || low > 0xdfff)))
        return json_fail(j, "\\u without four hexadecimal digits, half a surrogate pair or a zero");
    j->p += pair ? 11 : 5;
    if (pair) c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
    int more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    static const unsigned char lead[] = {0, 0xc0, 0xe0, 0xf0};
    *(*out)++ = (char)(lead[more] | c >> 6 * more);
    while (more-- > 0) *(*out)++ = (char)(0x80 | (c >> 6 * more & 0x3f));
    return 0;
}

static int json_string(Json *j, char **text) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    char *out = ++j->p;
    *text = out;
    while (*j->p != '"') {
        if ((unsigned char)*j->p < 0x20) return json_fail(j, "a string without end");
        if (*j->p != '\\') {
            *out++ = *j->p++;
            continue;
        }
        const char *at = *++j->p ? strchr(names, *j->p) : NULL;
        if (at)
            *out++ = values[at - names], j->p++;
        else if (*j->p != 'u')
            return json_fail(j, "an unknown escape in a string");
        else if (json_unicode(j, &out) != 0)
            return -1;
    }
    j->p++;
    *out = '\0';
    return 0;
}

static int json_value(Json *j, int depth);

// Members of a list or an object up to `close`, as children of node `parent`.
static int json_members(Json *j, int parent, char close, int depth) {
    int last = 0;
    j->p++;
    for (json_space(j); *j->p != close; json_space(j)) {
        char *key = NULL;
        if (last && *j->p++ != ',') return json_fail(j, "a comma or the end of a list is missing");
        json_space(j);
        if (close == '}') {
            if (*j->p != '"') return json_fail(j, "a member has no name in quotes");
            if (json_string(j, &key) != 0) return -1;
            json_space(j);
            if (*j->p++ != ':') return json_fail(j, "a member has no colon after its name");
        }
        int node = json_value(j, depth + 1);
        if (node < 0) return -1;
        j->node[node].key = key;
        if (last)
            j->node[last].next = node;
        else
            j->node[parent].child = node;
        last = node;
    }
    j->p++;
    return parent;
}

static int json_number(Json *j, int node) {
    static const char chars[] = "+-.0123456789Ee";
    char *end;
    size_t n = strspn(j->p, chars);
    j->node[node].kind = J_NUMBER;
    j->node[node].number = strtod(j->p, &end);
    if (n == 0 || end != j->p + n || *j->p == '+' || *j->p == '.')
        return json_fail(j, "not a JSON value");
    j->p = end;
    return node;
}

static int json_value(Json *j, int depth) {
    static const struct {
        const char *word;
        JsonKind kind;
        double number;
    } words[] = {{"null", J_NULL, 0}, {"false", J_BOOL, 0}, {"true", J_BOOL, 1}};
    int node = json_node(j);
    if (node < 0) return -1;
    json_space(j);
    if (depth > JSON_DEPTH) return json_fail(j, "lists or objects nested too deep");
    if (*j->p == '{' || *j->p == '[') {
        j->node[node].kind = *j->p == '{' ? J_OBJECT : J_LIST;
        return json_members(j, node, *j->p == '{' ? '}' : ']', depth);
    }
    if (*j->p == '"') {
        j->node[node].kind = J_STRING;
        return json_string(j, &j->node[node].text) == 0 ? node : -1;
    }
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(words[i].word);
        if (strncmp(j->p, words[i].word, n) != 0) continue;
        j->node[node].kind = words[i].kind, j->node[node].number = words[i].number;
        j->p += n;
        return node;
    }
    return json_number(j, node);
}

// Parses the object at p, a NUL-terminated line; node 0 stands for "none".
static int json_line(Json *j) {
    j->n = 0;
    if (json_node(j) < 0) return -1;
    int top = json_value(j, 0);
    if (top < 0) return -1;
    json_space(j);
    if (*j->p != '\0') return json_fail(j, "something follows the JSON value");
    return j->node[top].kind == J_OBJECT ? top : json_fail(j, "not a JSON object");
}

// Member `key` of an object; NULL when it is absent or null.
static const JsonNode *json_member(const Json *j, int object, const char *key) {
    for (int i = j->node[object].child; i; i = j->node[i].next)
        if (strcmp(j->node[i].key, key) == 0) return j->node[i].kind == J_NULL ? NULL : &j->node[i];
    return NULL;
}

// The same, of one kind; NULL when it is absent. An absent one that is needed or one of another
// kind is an error in *status.
static const JsonNode *json_get(const Json *j, int object, const char *key, JsonKind kind,
                                bool needed, int *status) {
    static const char *const kinds[] = {"",         "true or false", "a number",
                                        "a string", "a list",        "an object"};
    const JsonNode *m = json_member(j, object, key);
    if (*status != 0) return NULL;
    if (!m && needed) *status = fail(j->err, "line %d: \"%s\" is missing", j->line, key);
    if (!m || m->kind == kind) return m;
    *status = fail(j->err, "line %d: \"%s\" is not %s", j->line, key, kinds[kind]);
    return NULL;
}

static const char *json_text(const Json *j, int object, const char *key, bool needed, int *status) {
    const JsonNode *m = json_get(j, object, key, J_STRING, needed, status);
    return m ? m->text : NULL;
}

static void put_json(FILE *f, const char *s) {
    fputc('"', f);
    for (; *s; s++) {
        if (*s == '"' || *s == '\\')
            fprintf(f, "\\%c", *s);
        else if ((unsigned char)*s < 0x20)
            fprintf(f, "\\u%04x", *s);
        else
            fputc(*s, f);
    }
    fputc('"', f);
}

// The whole file, or stdin for "-", NUL-terminated. NULL with err; errno says whether it exists.
static char *read_file(const char *path, size_t *n, char *err) {
    bool is_stdin = strcmp(path, "-") == 0;
    FILE *f = is_stdin ? stdin : fopen(path, "rb");
    char *text = NULL;
    size_t cap = 0, got = 1;
    errno = f ? 0 : errno;
    for (*n = 0; f && got > 0; *n += got) {
        if (*n + 1 >= cap) {
            char *more = realloc(text, cap = 2 * cap + 65536);
            if (!more) break;
            text = more;
        }
        got = fread(text + *n, 1, cap - 1 - *n, f);
    }
    int why = !f || ferror(f) || got > 0 ? errno : 0;
    if (f && !is_stdin) fclose(f);
    if (f && why == 0) return text[*n] = '\0', text;
    free(text);
    fail(err, "%s", strerror(why ? why : ENOMEM));
    errno = why;
    return NULL;
}

// Cuts the next line, blank ones left out, off *p and ends it with a NUL; false at the end.
static bool next_line(Json *j, char **p) {
    while (**p) {
        j->p = *p;
        char *end = j->p + strcspn(j->p, "\n");
        *p = *end ? end + 1 : end;
        *end = '\0';
        j->line++;
        json_space(j);
        if (*j->p) return true;
    }
    return false;
}

// FNV-1a, http://www.isthe.com/chongo/tech/comp/fnv/
static uint64_t hash_bytes(uint64_t h, const void *data, size_t n) {
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

// ---- how good an answer is ----

// Lower case, no punctuation, no articles, number words as digits, single spaces (as KVzip's
// authors and SQuAD's script compare, arXiv 1606.05250). In place: a word never gets longer.
static void normalize(char *s) {
    static const char *const articles[] = {"a", "an", "the"};
    static const char *const digits[] = {"zero", "one", "two",   "three", "four",
                                         "five", "six", "seven", "eight", "nine"};
    char *start = s, *out = s, *word = s;
    for (;; s++) {
        unsigned char c = (unsigned char)*s;
        if (c && !isspace(c)) {
            if (!ispunct(c)) *out++ = (char)tolower(c);
            continue;
        }
        *out = '\0';
        for (int i = 0; i < 3; i++)
            if (strcmp(word, articles[i]) == 0) out = word;
        for (int i = 0; i < 10; i++)
            if (strcmp(word, digits[i]) == 0) *word = (char)('0' + i), out = word + 1;
        if (!c) break;
        if (out > word) *out++ = ' ';
        word = out;
    }
    if (out > start && out[-1] == ' ') out--;
    *out = '\0';
}

// A number matches whole numbers only: 12 is not in 312.
static bool contained(const char *text, const char *want) {
    size_t n = strlen(want);
    if (n == 0) return false;
    for (const char *at = text; (at = strstr(at, want)) != NULL; at++) {
        bool before =
            at > text && isdigit((unsigned char)at[-1]) && isdigit((unsigned char)want[0]);
        bool after = isdigit((unsigned char)want[n - 1]) && isdigit((unsigned char)at[n]);
        if (!before && !after) return true;
    }
    return false;
}

// How often the word [n] stands in text before `end` (NULL: anywhere).
static int count_word(const char *text, const char *end, const char *word, size_t n) {
    int count = 0;
    for (size_t len; (len = strcspn(text, " ")) > 0; text += len + (text[len] == ' ')) {
        if (end && text >= end) break;
        count += len == n && memcmp(text, word, n) == 0;
    }
    return count;
}

static int count_words(const char *s) {
    int n = *s != '\0';
    for (; *s; s++) n += *s == ' ';
    return n;
}

// F1 of the words in common, counted with multiplicity.
static double word_f1(const char *text, const char *want) {
    int n_text = count_words(text), n_want = count_words(want), common = 0;
    if (n_text == 0 || n_want == 0) return n_text == n_want;
    const char *p = want;
    for (size_t len; (len = strcspn(p, " ")) > 0; p += len + (p[len] == ' '))
        common += count_word(want, p, p, len) < count_word(text, NULL, p, len);
    return 2.0 * common / (n_text + n_want);
}

// The first letter that stands alone, "(b)" and "B." too, as a capital; 0 when there is none.
static int choice_letter(const char *s) {
    for (bool inside = false; *s; s++) {
        unsigned char c = (unsigned char)s[0], after = (unsigned char)s[1];
        bool ends = !isalnum(after) && after < 0x80 && after != '\'';
        if (!inside && isalpha(c) && ends) return toupper(c);
        inside = isalnum(c) || c >= 0x80 || c == '\'';
    }
    return 0;
}

static double metric_value(EvalMetric metric, const char *answer, const char *want) {
    int letter;
    switch (metric) {
    case METRIC_EXACT:
        return strcmp(answer, want) == 0;
    case METRIC_F1:
        return word_f1(answer, want);
    case METRIC_CHOICE:
        return (letter = choice_letter(answer)) && letter == choice_letter(want);
    default:
        return contained(answer, want);
    }
}

double eval_answer(const EvalTask *t, const EvalQuestion *q, char *answer) {
    double best = 0, sum = 0;
    if (t->metric != METRIC_CHOICE) normalize(answer);
    for (int i = 0; i < q->n_answers; i++) {
        double v = metric_value(t->metric, answer, q->answers[i]);
        best = fmax(best, v);
        sum += v;
    }
    return t->all && t->metric == METRIC_CONTAINED ? sum / q->n_answers : best;
}

// ---- tasks ----

static const char *const metric_names[METRICS] = {"contained", "exact", "f1", "choice"};

static int task_question(const Json *j, int object, bool as_is, EvalQuestion *q, char **answers) {
    int status = 0;
    q->question = json_text(j, object, "question", true, &status);
    q->answer_prefix = json_text(j, object, "answer_prefix", false, &status);
    if (!q->answer_prefix) q->answer_prefix = "";
    const JsonNode *list = json_get(j, object, "answers", J_LIST, true, &status);
    q->answers = answers;
    if (status != 0) return -1;
    for (int i = list->child; i; i = j->node[i].next) {
        if (j->node[i].kind != J_STRING)
            return fail(j->err, "line %d: an answer is not a string", j->line);
        answers[q->n_answers++] = j->node[i].text;
        if (!as_is) normalize(j->node[i].text);
    }
    return q->n_answers > 0 ? 0 : fail(j->err, "line %d: a question without answers", j->line);
}

static int task_questions(const Json *j, const JsonNode *list, EvalTask *t) {
    int n = 0;
    for (int i = list->child; i; i = j->node[i].next) {
        if (j->node[i].kind != J_OBJECT)
            return fail(j->err, "line %d: a question is not an object", j->line);
        n++;
    }
    if (n == 0) return fail(j->err, "line %d: a context without questions", j->line);
    t->questions = calloc((size_t)n, sizeof *t->questions);
    t->answers = calloc((size_t)j->n, sizeof *t->answers);  // a node each, at most
    if (!t->questions || !t->answers) return fail(j->err, "line %d: out of memory", j->line);
    char **answers = t->answers;
    for (int i = list->child; i; i = j->node[i].next) {
        EvalQuestion *q = &t->questions[t->n_questions++];
        if (task_question(j, i, t->metric == METRIC_CHOICE, q, answers) != 0) return -1;
        answers += q->n_answers;
    }
    return 0;
}

static int task_line(Json *j, EvalTask *t) {
    int top = json_line(j), status = 0;
    if (top < 0) return -1;
    t->context = json_text(j, top, "context", true, &status);
    const char *metric = json_text(j, top, "metric", false, &status);
    const char *name = json_text(j, top, "task", false, &status);
    t->stop = json_text(j, top, "stop", false, &status);
    const JsonNode *all = json_get(j, top, "all", J_BOOL, false, &status);
    const JsonNode *most = json_get(j, top, "max_tokens", J_NUMBER, false, &status);
    const JsonNode *questions = json_get(j, top, "questions", J_LIST, true, &status);
    if (status != 0) return -1;
    t->task = name ? name : "task";
    t->all = all && all->number > 0;
    t->metric = METRIC_CONTAINED;
    if (metric) {
        t->metric = 0;
        while (t->metric < METRICS && strcmp(metric, metric_names[t->metric]) != 0) t->metric++;
        if (t->metric == METRICS) return fail(j->err, "line %d: no metric \"%s\"", j->line, metric);
    }
    if (most && !(most->number >= 1 && most->number <= 65536))
        return fail(j->err, "line %d: \"max_tokens\" is not from 1 to 65536", j->line);
    t->max_tokens = most ? (int)most->number : 0;
    return task_questions(j, questions, t);
}

static int read_tasks(EvalTasks *t, Json *j, size_t bytes) {
    int cap = 0;
    char *p = t->text;
    if (memchr(t->text, 0, bytes)) return fail(j->err, "a zero byte in the file");
    t->hash = hash_bytes(0xcbf29ce484222325u, t->text, bytes);
    while (next_line(j, &p)) {
        if (t->n == cap) {
            EvalTask *task = realloc(t->task, (size_t)(cap = 2 * cap + 16) * sizeof *task);
            if (!task) return json_fail(j, "out of memory");
            t->task = task;
        }
        t->task[t->n] = (EvalTask){.line = j->line};
        if (task_line(j, &t->task[t->n++]) != 0) return -1;
    }
    return t->n > 0 ? 0 : fail(j->err, "no tasks in it");
}

int eval_tasks_open(EvalTasks *t, const char *path, char *err) {
    Json j = {.err = err};
    size_t bytes;
    *t = (EvalTasks){0};
    t->text = read_file(path, &bytes, err);
    int rc = t->text ? read_tasks(t, &j, bytes) : -1;
    free(j.node);
    if (rc != 0) eval_tasks_close(t);
    return rc;
}

void eval_tasks_close(EvalTasks *t) {
    for (int i = 0; i < t->n; i++) {
        free(t->task[i].questions);
        free(t->task[i].answers);
    }
    free(t->task);
    free(t->text);
    *t = (EvalTasks){0};
}

// ---- rows of logits, judged where they stand ----

typedef struct {
    int best, full;  // the likeliest token, here and in the full cache, computed alike
    float nll, kl;   // of the token wanted here; KL(full || here)
} Step;

// A question, or a window of text, on its way through a cache.
typedef struct {
    const EvalQuestion *q;
    Ids ask;   // what is read first
    Ids full;  // the answer that is judged: the full cache's own, with the stop token that ended it
    float *logits;  // [full.n][vocab] of the full cache, while its group is at work
    Step *step;     // [full.n]
    int seq;
    Ids answer;  // the answer of the cache at hand
    char *text;  // [n_text] what it prints, NUL-terminated
    size_t n_text, text_cap;
    double full_value;  // of the full cache's answer, in the task's metric
    bool done;
} Item;

typedef struct {
    RunState *state;
    KVCache *kv;
    bool keep;  // logits go into the items, else they are compared with those there
    Row row[MAX_ROWS];
    int n;
    Item *item[MAX_ROWS];  // of the rows with logits, in their order
    int at[MAX_ROWS];      // which token of the answer they predict
    int n_logits;
} Batch;

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

// Sum of exp(x - max); where y is given also *diff = sum of exp(x - max) (x - y).
static double exp_sum(const float *x, float max, const float *y, int n, double *diff) {
    double sum = 0;
    float e[64];
    for (int i = 0; i < n; i += 64) {
        int m = n - i < 64 ? n - i : 64;
        memcpy(e, x + i, (size_t)m * sizeof *e);
        for (int j = m; j < 64; j++) e[j] = -INFINITY;
        sum += kern.exp64(e, max);
        if (!y) continue;
        float d = 0;
        for (int j = 0; j < m; j++) d += e[j] * (x[i + j] - y[i + j]);
        *diff += d;
    }
    return sum;
}

static void judge_row(void *ctx, int i) {
    const Batch *b = ctx;
    Item *it = b->item[i];
    int vocab = b->state->model->config.vocab_size, at = b->at[i];
    const float *x = b->state->logits + (size_t)i * vocab;
    Step *s = &it->step[at];
    s->best = argmax(x, vocab);
    if (at >= it->full.n) return;
    double log_sum = x[s->best] + log(exp_sum(x, x[s->best], NULL, vocab, NULL));
    s->nll = (float)(log_sum - x[it->full.id[at]]);
    s->kl = 0;
    if (!it->logits) return;
    float *full = it->logits + (size_t)at * vocab;
    if (b->keep) {
        s->full = s->best;
        memcpy(full, x, (size_t)vocab * sizeof *x);
    } else {
        float max = full[s->full];
        double diff = 0, sum = exp_sum(full, max, x, vocab, &diff);
        s->kl = (float)fmax(diff / sum + log_sum - max - log(sum), 0);
    }
}

static int flush(Batch *b, char *err) {
    if (b->n > 0 && forward(b->state, b->kv, b->row, b->n, err) != 0) return -1;
    parallel_for(b->state->pool, b->n_logits, judge_row, b);
    b->n = b->n_logits = 0;
    return 0;
}

// One more row; `at` is the token of the answer it predicts, -1: none that matters.
static int add_row(Batch *b, Item *it, int token, int at, char *err) {
    if (b->n == b->state->max_rows || (at >= 0 && b->n_logits == b->state->max_logits))
        if (flush(b, err) != 0) return -1;
    if (at >= 0) b->item[b->n_logits] = it, b->at[b->n_logits++] = at;
    b->row[b->n++] = (Row){it->seq, token, at >= 0};
    return 0;
}

// Feeds items [n] what they ask and the answers that are judged, and judges every token of these.
static int force(Batch *b, Item *it, int n, char *err) {
    for (Item *end = it + n; it < end; it++) {
        for (int i = 0; i < it->ask.n; i++)
            if (add_row(b, it, it->ask.id[i], i == it->ask.n - 1 ? 0 : -1, err) != 0) return -1;
        for (int i = 1; i < it->full.n; i++)
            if (add_row(b, it, it->full.id[i - 1], i, err) != 0) return -1;
    }
    return flush(b, err);
}

// ---- perplexity ----

typedef struct {
    const Perplexity *p;
    KVCache kv;
    Batch batch;
    Item item;
    double sum, squares;  // of -ln p
} Windows;

// ids [window], the first half of which is read for context alone.
static int score_window(Windows *w, int *ids, PerplexityResult *out, char *err) {
    int half = w->p->window / 2;
    Item *it = &w->item;
    it->ask = (Ids){ids, half + 1, 0};
    it->full = (Ids){ids + half + 1, w->p->window - half - 1, 0};
    it->seq = kvcache_new(&w->kv, err);
    if (it->seq < 0 || force(&w->batch, it, 1, err) != 0) return -1;
    kvcache_drop(&w->kv, it->seq);
    for (int i = 0; i < it->full.n; i++) {
        w->sum += it->step[i].nll;
        w->squares += (double)it->step[i].nll * it->step[i].nll;
    }
    out->n += it->full.n;
    double mean = w->sum / out->n, variance = w->squares / out->n - mean * mean;
    double error = out->n > 1 && variance > 0 ? sqrt(variance / (out->n - 1)) : 0;
    out->value = exp(mean);
    out->error = error * out->value;
    out->low = exp(mean - 1.96 * error);
    out->high = exp(mean + 1.96 * error);
    return 0;
}

static int score_windows(Windows *w, const Ids *ids, PerplexityResult *out, char *err) {
    const Perplexity *p = w->p;
    KVShape shape = model_kv_shape(p->state->model);
    Ids bos = {0};
    int n_windows = ids->n / p->window, rc = tokenizer_encode(p->tok, "", 0, TOK_BOS, &bos);
    if (n_windows == 0)
        rc = fail(err, "the text has %d tokens, a window needs %d", ids->n, p->window);
    else if (rc != 0 || !(w->item.step = malloc((size_t)p->window * sizeof *w->item.step)))
        rc = fail(err, "out of memory");
    else
        rc = kvcache_open(&w->kv, &shape, p->kv, p->state->pool, err);
    for (int i = 0; i < n_windows && rc == 0; i++) {
        int *window = ids->id + (size_t)i * p->window;
        if (bos.n > 0) window[0] = bos.id[0];
        rc = score_window(w, window, out, err);
        if (rc == 0 && p->progress && p->progress(p->arg, i + 1, n_windows, out->value) != 0)
            rc = fail(err, "interrupted");
    }
    ids_free(&bos);
    return rc;
}

int eval_perplexity(const Perplexity *p, const char *text, size_t n, PerplexityResult *out,
                    char *err) {
    Windows w = {.p = p, .batch = {.state = p->state}};
    w.batch.kv = &w.kv;
    Ids ids = {0};
    *out = (PerplexityResult){0};
    if (n > 0 && text[n - 1] == '\n') n--;
    int rc = tokenizer_encode(p->tok, text, n, TOK_BOS, &ids);
    rc = rc != 0 ? fail(err, "out of memory") : score_windows(&w, &ids, out, err);
    kvcache_close(&w.kv);
    free(w.item.step);
    ids_free(&ids);
    return rc;
}

// ---- results ----

static int results_settings(EvalResults *r, const char *settings, char *err) {
    if (!r->settings) {
        r->settings = malloc(strlen(settings) + 1);
        if (!r->settings) return fail(err, "out of memory");
        strcpy(r->settings, settings);
    } else if (strcmp(r->settings, settings) != 0) {
        return fail(err, "results of other tasks, another model or other settings (%s, not %s)",
                    settings, r->settings);
    }
    return 0;
}

static bool same_cell(const EvalCell *a, const EvalCell *b) {
    return a->context == b->context && a->ratio == b->ratio && strcmp(a->policy, b->policy) == 0 &&
           strcmp(a->level, b->level) == 0 && strcmp(a->kv, b->kv) == 0;
}

static EvalCell *find_cell(const EvalResults *r, const EvalCell *like) {
    for (int i = 0; i < r->n; i++)
        if (same_cell(&r->cell[i], like)) return &r->cell[i];
    return NULL;
}

static int alloc_cell(EvalCell *c, int n) {
    c->n = n;
    c->value = calloc((size_t)n, 4 * sizeof *c->value);
    if (!c->value) return -1;
    c->same = c->value + n, c->kl = c->same + n, c->nll = c->kl + n;
    return 0;
}

// Takes the cell over, numbers and all.
static int add_cell(EvalResults *r, EvalCell c, char *err) {
    if (r->n == r->cap) {
        EvalCell *cell = realloc(r->cell, (size_t)(2 * r->cap + 64) * sizeof *cell);
        if (!cell) return fail(err, "out of memory");
        r->cell = cell, r->cap = 2 * r->cap + 64;
    }
    r->cell[r->n++] = c;
    return 0;
}

static void put_numbers(FILE *f, const char *key, const float *v, int n) {
    fprintf(f, ", \"%s\": [", key);
    for (int i = 0; i < n; i++) fprintf(f, i ? ", %.9g" : "%.9g", v[i]);
    fputc(']', f);
}

static int put_cell(FILE *f, const EvalCell *c, char *err) {
    const char *const texts[][2] = {{"task", c->task},
                                    {"metric", c->metric},
                                    {"policy", c->policy},
                                    {"level", c->level},
                                    {"kv", c->kv}};
    for (int i = 0; i < 5; i++) {
        fprintf(f, i ? ", \"%s\": " : "{\"%s\": ", texts[i][0]);
        put_json(f, texts[i][1]);
    }
    fprintf(f, ", \"context\": %d, \"ratio\": %.17g, \"kept\": %.17g", c->context, c->ratio,
            c->kept);
    put_numbers(f, "value", c->value, c->n);
    put_numbers(f, "same", c->same, c->n);
    put_numbers(f, "kl", c->kl, c->n);
    put_numbers(f, "nll", c->nll, c->n);
    fputs("}\n", f);
    return fflush(f) == 0 ? 0 : fail(err, "the results cannot be written: %s", strerror(errno));
}

static int read_numbers(const Json *j, int object, const char *key, float *v, int n) {
    int status = 0, i = 0;
    const JsonNode *list = json_get(j, object, key, J_LIST, true, &status);
    for (int at = list ? list->child : 0; at && i < n; at = j->node[at].next)
        v[i++] = (float)j->node[at].number;
    if (status == 0 && i < n)
        status = fail(j->err, "line %d: \"%s\" has %d numbers, not %d", j->line, key, i, n);
    return status;
}

static int read_cell(Json *j, int top, EvalResults *r) {
    int status = 0, n = 0;
    EvalCell c = {.task = json_text(j, top, "task", true, &status)};
    c.metric = json_text(j, top, "metric", true, &status);
    c.policy = json_text(j, top, "policy", true, &status);
    c.level = json_text(j, top, "level", true, &status);
    c.kv = json_text(j, top, "kv", true, &status);
    const JsonNode *context = json_get(j, top, "context", J_NUMBER, true, &status);
    const JsonNode *ratio = json_get(j, top, "ratio", J_NUMBER, true, &status);
    const JsonNode *kept = json_get(j, top, "kept", J_NUMBER, true, &status);
    const JsonNode *value = json_get(j, top, "value", J_LIST, true, &status);
    if (status != 0) return -1;
    c.context = (int)context->number, c.ratio = ratio->number, c.kept = kept->number;
    if (find_cell(r, &c)) return 0;
    for (int i = value->child; i; i = j->node[i].next) n++;
    if (n == 0 || alloc_cell(&c, n) != 0)
        return json_fail(j, n ? "out of memory" : "a cell of no questions");
    if (read_numbers(j, top, "value", c.value, n) != 0 ||
        read_numbers(j, top, "same", c.same, n) != 0 || read_numbers(j, top, "kl", c.kl, n) != 0 ||
        read_numbers(j, top, "nll", c.nll, n) != 0 || add_cell(r, c, j->err) != 0) {
        free(c.value);
        return -1;
    }
    return 0;
}

// The first line holds the settings, the others a cell each.
static int read_results(EvalResults *r, Json *j, char *text) {
    for (char *p = text; next_line(j, &p);) {
        int top = json_line(j), status = 0;
        if (top < 0) return -1;
        const char *settings = json_text(j, top, "settings", j->line == 1, &status);
        if (status != 0 || (settings && results_settings(r, settings, j->err) != 0)) return -1;
        if (!settings && read_cell(j, top, r) != 0) return -1;
    }
    return 0;
}

int eval_results_open(EvalResults *r, const char *path, bool append, char *err) {
    Json j = {.err = err};
    size_t n = 0;
    char *text = read_file(path, &n, err), **texts;
    if (!text && !(append && errno == ENOENT)) return -1;
    while (text && n > 0 && text[n - 1] != '\n') text[--n] = '\0';  // a line that was cut off
    if (append) {
        r->log = fopen(path, "ab");
        if (!r->log || ftruncate(fileno(r->log), (off_t)n) != 0) {
            free(text);
            return fail(err, "cannot be written: %s", strerror(errno));
        }
    }
    if (!text) return 0;
    texts = realloc(r->text, (size_t)(r->n_texts + 1) * sizeof *texts);
    if (!texts) return free(text), fail(err, "out of memory");
    r->text = texts;
    r->text[r->n_texts++] = text;
    int rc = read_results(r, &j, text);
    free(j.node);
    return rc;
}

static int put_settings(FILE *f, const char *settings, char *err) {
    fputs("{\"settings\": ", f);
    put_json(f, settings);
    fputs("}\n", f);
    return fflush(f) == 0 ? 0 : fail(err, "the results cannot be written: %s", strerror(errno));
}

int eval_results_save(const EvalResults *r, const char *path, char *err) {
    NewFile out;
    if (file_begin(&out, path, err) != 0) return -1;
    int rc = r->settings ? put_settings(out.file, r->settings, err) : 0;
    for (int i = 0; i < r->n && rc == 0; i++) rc = put_cell(out.file, &r->cell[i], err);
    if (rc == 0) return file_commit(&out, err);
    file_abort(&out);
    return -1;
}

void eval_results_close(EvalResults *r) {
    for (int i = 0; i < r->n; i++) free(r->cell[i].value);
    for (int i = 0; i < r->n_texts; i++) free(r->text[i]);
    if (r->log) fclose(r->log);
    free(r->cell);
    free(r->text);
    free(r->settings);
    *r = (EvalResults){0};
}

// ---- figures ----

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Mean of v [n] and the middle 95% of the means of as many questions drawn from it again (Efron
// 1979).
static void summarize(EvalRow *row, const float *v, int n) {
    double mean[RESAMPLES], sum = 0;
    uint64_t random = 1;
    for (int i = 0; i < n; i++) sum += v[i];
    row->n = n;
    row->value = sum / n;
    for (int k = 0; k < RESAMPLES; k++) {
        mean[k] = 0;
        for (int i = 0; i < n; i++) mean[k] += v[random_next(&random) % (unsigned)n];
        mean[k] /= n;
    }
    qsort(mean, RESAMPLES, sizeof *mean, by_size);
    row->low = mean[RESAMPLES / 40];
    row->high = mean[RESAMPLES - 1 - RESAMPLES / 40];
}

// The same task under the same policy, level, ratio and page type.
static bool same_figure(const EvalCell *a, const EvalCell *b) {
    EvalCell c = *b;
    c.context = a->context;
    return strcmp(a->task, b->task) == 0 && strcmp(a->metric, b->metric) == 0 && same_cell(a, &c);
}

// Cells [first, r->n) that belong to the figure of cell `first`, as four rows. v [4][room].
static void figure_rows(const EvalResults *r, int first, bool *done, EvalRow *row, float *v,
                        int room) {
    const EvalCell *c = &r->cell[first];
    const char *const names[] = {c->metric, "same", "kl", "nll"};
    int n = 0;
    double kept = 0;
    for (int i = first; i < r->n; i++) {
        const EvalCell *d = &r->cell[i];
        if (done[i] || !same_figure(c, d)) continue;
        for (int m = 0; m < 4; m++)
            memcpy(v + (size_t)m * room + n, d->value + m * d->n, d->n * sizeof *v);
        kept += d->kept * d->n;
        n += d->n;
        done[i] = true;
    }
    for (int m = 0; m < 4; m++) {
        row[m] = (EvalRow){.task = c->task,
                           .policy = c->policy,
                           .level = c->level,
                           .kv = c->kv,
                           .metric = names[m],
                           .ratio = c->ratio,
                           .kept = kept / n};
        summarize(&row[m], v + (size_t)m * room, n);
    }
}

int eval_rows(const EvalResults *r, EvalRow **rows, int *n, char *err) {
    int room = 1;
    for (int i = 0; i < r->n; i++) room += r->cell[i].n;
    bool *done = calloc((size_t)r->n + 1, sizeof *done);
    float *v = malloc(4 * (size_t)room * sizeof *v);
    *rows = malloc((4 * (size_t)r->n + 1) * sizeof **rows);
    *n = 0;
    bool ok = done && v && *rows;
    for (int i = 0; ok && i < r->n; i++) {
        if (done[i]) continue;
        figure_rows(r, i, done, *rows + *n, v, room);
        *n += 4;
    }
    free(done);
    free(v);
    return ok ? 0 : fail(err, "out of memory");
}

// ---- policies and ratios ----

enum { GROUP = 32 };  // questions at work together: each has a fork of the cache

typedef struct {
    const Eval *e;
    EvalResults *results;
    const EvalTask *task;   // at hand
    Ids ids;                // prefix and context
    KVCache kv[EVAL_LIST];  // one of each page type
    int full[EVAL_LIST];    // the sequence in each that holds the context, nothing settled yet
    int yardstick;          // the first of them, settled
    Item *item;             // [task->n_questions]
    int group, group_end;   // items whose full logits are there
    Batch batch;
    float *score;  // of the policy at hand
    uint8_t *keep;
    long done, total;  // questions times cells
} Run;

static int report(const Run *r, char *err) {
    const Eval *e = r->e;
    if (e->progress && e->progress(e->progress_arg, r->done, r->total) != 0)
        return fail(err, "interrupted");
    return 0;
}

static int on_context(void *arg, const char *what, long done, long total) {
    char err[ERR_LEN];
    (void)what, (void)done, (void)total;
    return report(arg, err);
}

// ---- parameters ----

static bool has_param(const Param *params, const char *key, size_t n) {
    for (int i = 0; i < MAX_PARAMS && params[i].name; i++)
        if (strlen(params[i].name) == n && memcmp(params[i].name, key, n) == 0) return true;
    return false;
}

// One --set serves several policies: each takes the keys that it or its level knows.
static int set_method(const Eval *e, Context *c, const Policy *p, const Level *l, char *err) {
    char known[ERR_LEN];
    size_t used = 0;
    *known = '\0';
    for (const char *s = e->set; s && *s; s += *s == ',') {
        size_t n = strcspn(s, ","), key = strcspn(s, "=,");
        if (has_param(p->params, s, key) || has_param(l->params, s, key)) {
            if (used + n + 2 > sizeof known) return fail(err, "too many parameters");
            used += (size_t)sprintf(known + used, "%s%.*s", used ? "," : "", (int)n, s);
        }
        s += n;
    }
    return context_set(c, p, l, known, err);
}

int eval_check_set(const Eval *e, char *err) {
    Context c = e->context;
    for (const char *s = e->set; s && *s; s += *s == ',') {
        size_t key = strcspn(s, "=,");
        bool known = false;
        for (int i = 0; i < e->n_policies; i++)
            known = known || has_param(e->policy[i]->params, s, key);
        for (int i = 0; i < e->n_levels; i++)
            known = known || has_param(e->level[i]->params, s, key);
        if (!known) return fail(err, "no policy or level here has a parameter '%.*s'", (int)key, s);
        s += strcspn(s, ",");
    }
    for (int i = 0; i < e->n_policies * e->n_levels; i++)
        if (set_method(e, &c, e->policy[i / e->n_levels], e->level[i % e->n_levels], err) != 0)
            return -1;
    return 0;
}

// ---- greedy answers ----

static int add_text(Item *it, const char *bytes, int n) {
    if (it->n_text + (size_t)n + 1 > it->text_cap) {
        size_t cap = 2 * (it->n_text + (size_t)n) + 64;
        char *text = realloc(it->text, cap);
        if (!text) return -1;
        it->text = text, it->text_cap = cap;
    }
    memcpy(it->text + it->n_text, bytes, (size_t)n);
    it->text[it->n_text += (size_t)n] = '\0';
    return 0;
}

static int limit_of(const Run *r) {
    return r->task->max_tokens ? r->task->max_tokens : r->e->max_tokens;
}

// One more token of an answer. A stop token is one of its ids, but prints nothing.
static int take(const Run *r, Item *it, int id, char *err) {
    const Tokenizer *tok = r->e->context.tok;
    const char *stop = r->task->stop ? r->task->stop : r->e->stop;
    int n = 0;
    const char *piece = tokenizer_piece(tok, id, &n);
    size_t len = stop ? strlen(stop) : 0, from = it->n_text >= len ? it->n_text - len + 1 : 0;
    if (tokenizer_is_special(tok, id)) n = 0;
    if (ids_push(&it->answer, id) != 0 || add_text(it, piece, n) != 0)
        return fail(err, "out of memory");
    it->done = tokenizer_is_stop(tok, id) || it->answer.n >= limit_of(r);
    char *at = len ? strstr(it->text + from, stop) : NULL;
    if (!at) return 0;
    at[len] = '\0';
    it->n_text = (size_t)(at + len - it->text);
    it->done = true;
    return 0;
}

// Goes on with the answers [n] that are not done, each on its own fork of seq, as one batch.
static int generate(Run *r, int seq, Item *items, int n, char *err) {
    Batch *b = &r->batch;
    int live = 0;
    for (Item *it = items; it < items + n; it++) {
        if (it->done) continue;
        int last = it->ask.n + it->answer.n - 1;
        if ((it->seq = kvcache_fork(b->kv, seq, err)) < 0) return -1;
        for (int i = 0; i <= last; i++) {
            int id = i < it->ask.n ? it->ask.id[i] : it->answer.id[i - it->ask.n];
            if (add_row(b, it, id, i == last ? it->full.n : -1, err) != 0) return -1;
        }
    }
    do {
        if (flush(b, err) != 0 || report(r, err) != 0) return -1;
        live = 0;
        for (Item *it = items; it < items + n; it++) {
            if (it->done) continue;
            int id = it->step[it->full.n].best;
            if (take(r, it, id, err) != 0) return -1;
            if (it->done)
                kvcache_drop(b->kv, it->seq);
            else if (live++, add_row(b, it, id, it->full.n, err) != 0)
                return -1;
        }
    } while (live > 0);
    return 0;
}

// ---- one context ----

static void free_items(Run *r) {
    for (int i = 0; r->item && i < r->task->n_questions; i++) {
        Item *it = &r->item[i];
        ids_free(&it->ask);
        ids_free(&it->full);
        ids_free(&it->answer);
        free(it->logits);
        free(it->step);
        free(it->text);
    }
    free(r->item);
    r->item = NULL;
}

static int open_items(Run *r, char *err) {
    r->item = calloc((size_t)r->task->n_questions, sizeof *r->item);
    if (!r->item) return fail(err, "out of memory");
    for (int i = 0; i < r->task->n_questions; i++) {
        Item *it = &r->item[i];
        it->q = &r->task->questions[i];
        it->step = malloc(((size_t)limit_of(r) + 1) * sizeof *it->step);
        if (!it->step || r->e->ask(r->e->ask_arg, it->q, &it->ask) != 0)
            return fail(err, "out of memory");
        if (it->ask.n == 0) return fail(err, "line %d: an empty question", r->task->line);
    }
    return 0;
}

static Context context_of(Run *r, int kv, int seq) {
    Context c = r->e->context;
    c.state = r->e->state, c.kv = &r->kv[kv], c.seq = seq, c.ids = r->ids.id;
    c.n_prefix = r->e->prefix->n, c.n_ctx = r->ids.n - c.n_prefix;
    c.progress = on_context, c.progress_arg = r;
    return c;
}

// The full cache's answers: by them all others are judged.
static int answer_full(Run *r, char *err) {
    int n = r->task->n_questions;
    r->batch.kv = &r->kv[0];
    for (int i = 0; i < n; i += GROUP)
        if (generate(r, r->yardstick, r->item + i, n - i < GROUP ? n - i : GROUP, err) != 0)
            return -1;
    for (Item *it = r->item; it < r->item + n; it++) {
        it->full = it->answer;
        it->answer = (Ids){0};
        it->full_value = eval_answer(r->task, it->q, it->text);
    }
    return 0;
}

static int read_context(Run *r, char *err) {
    const Eval *e = r->e;
    r->ids.n = 0;
    for (int i = 0; i < e->prefix->n; i++)
        if (ids_push(&r->ids, e->prefix->id[i]) != 0) return fail(err, "out of memory");
    if (tokenizer_encode(e->context.tok, r->task->context, strlen(r->task->context), 0, &r->ids) !=
        0)
        return fail(err, "out of memory");
    if (r->ids.n == e->prefix->n) return fail(err, "line %d: an empty context", r->task->line);
    for (int k = 0; k < e->n_kvs; k++) {
        if ((r->full[k] = kvcache_new(&r->kv[k], err)) < 0) return -1;
        Context c = context_of(r, k, r->full[k]);
        if (context_read(&c, err) != 0) return -1;
    }
    r->yardstick = kvcache_fork(&r->kv[0], r->full[0], err);
    if (r->yardstick < 0 || kvcache_settle(&r->kv[0], r->yardstick, err) != 0) return -1;
    return open_items(r, err) == 0 ? answer_full(r, err) : -1;
}

// ---- one cell ----

// Where the answers [n] differ from the full cache's they are decoded from there on.
static int answer_items(Run *r, int seq, Item *items, int n, char *err) {
    for (Item *it = items; it < items + n; it++) {
        int same = 0;
        while (same < it->full.n && it->step[same].best == it->step[same].full) same++;
        it->answer.n = 0, it->n_text = 0, it->done = same == it->full.n;
        if (it->done) continue;
        for (int i = 0; i < same; i++)
            if (take(r, it, it->full.id[i], err) != 0) return -1;
        if (take(r, it, it->step[same].best, err) != 0) return -1;
    }
    return generate(r, seq, items, n, err);
}

// Feeds forks of seq the questions and the full cache's answers, and judges these.
static int force_items(Run *r, KVCache *kv, int seq, bool keep, Item *items, int n, char *err) {
    r->batch.kv = kv;
    r->batch.keep = keep;
    for (int i = 0; i < n; i++)
        if ((items[i].seq = kvcache_fork(kv, seq, err)) < 0) return -1;
    int rc = force(&r->batch, items, n, err);
    for (int i = 0; i < n; i++) kvcache_drop(kv, items[i].seq);
    return rc;
}

// Puts the group's questions to the cache seq and writes their numbers into c.
static int ask_group(Run *r, KVCache *kv, int seq, EvalCell *c, char *err) {
    Item *items = r->item + r->group;
    int n = r->group_end - r->group;
    if (force_items(r, kv, seq, false, items, n, err) != 0) return -1;
    for (int i = 0; i < n; i++) {
        const Item *it = &items[i];
        bool same = true;
        double kl = 0, nll = 0;
        for (int t = 0; t < it->full.n; t++) {
            same = same && it->step[t].best == it->step[t].full;
            kl += it->step[t].kl, nll += it->step[t].nll;
        }
        c->same[r->group + i] = same;
        c->kl[r->group + i] = (float)(kl / it->full.n);
        c->nll[r->group + i] = (float)(nll / it->full.n);
    }
    if (answer_items(r, seq, items, n, err) != 0) return -1;
    for (int i = 0; i < n; i++) {
        int q = r->group + i;
        c->value[q] = (float)(c->same[q] > 0 ? items[i].full_value
                                             : eval_answer(r->task, items[i].q, items[i].text));
    }
    r->done += n;
    return report(r, err);
}

// The next group: as many questions as LOGITS_BYTES hold the full cache's logits of. Computes
// these.
static int next_group(Run *r, int begin, char *err) {
    size_t row = (size_t)r->e->state->model->config.vocab_size * sizeof(float), bytes = 0;
    if (r->group == begin && r->group_end > begin) return 0;
    for (int i = r->group; i < r->group_end; i++) {
        free(r->item[i].logits);
        r->item[i].logits = NULL;
    }
    r->group = r->group_end = begin;
    while (r->group_end < r->task->n_questions && r->group_end - begin < GROUP) {
        Item *it = &r->item[r->group_end];
        bytes += it->full.n * row;
        if (r->group_end > begin && bytes > LOGITS_BYTES) break;
        it->logits = malloc(it->full.n * row);
        if (!it->logits)
            return fail(err, "out of memory for the logits of an answer of %d tokens", it->full.n);
        r->group_end++;
    }
    return force_items(r, &r->kv[0], r->yardstick, true, r->item + begin, r->group_end - begin,
                       err);
}

typedef struct {
    EvalCell c;
    const Policy *policy;  // NULL: full
    const Level *level;
    int kv;
} Cell;

// Evicts from the context as it was read, or demotes. Returns the pairs that stay, or -1.
static long shrink_context(Run *r, const Context *c, const Cell *cell, char *err) {
    long kept = context_select(c, r->score, cell->c.ratio, r->keep, err);
    if (kept < 0) return -1;
    int (*evict)(KVCache *, int, int, int, const uint8_t *, char *) =
        r->e->kv[cell->kv].demote ? kvcache_demote : kvcache_evict;
    return evict(c->kv, c->seq, c->n_prefix, c->n_ctx, r->keep, err) == 0 ? kept : -1;
}

// Reads the context and evicts meanwhile. Returns the pairs that stay, or -1.
static long stream_context(Run *r, Context *c, double ratio, char *err) {
    Stream s;
    if (stream_open(&s, c, ratio, 0, r->e->window, err) != 0) return -1;
    c->after = stream_after, c->after_arg = &s;
    c->kv->settling = true;
    long kept = context_read(c, err) == 0 ? stream_finish(&s, err) : -1;
    c->kv->settling = false;
    stream_close(&s);
    return kept;
}

// The cell's cache, settled; or -1. A fork of the full one from which all but the best pairs are
// gone, or demoted; with stream, a sequence that was evicted while it grew.
static int evicted(Run *r, Cell *cell, char *err) {
    KVCache *kv = &r->kv[cell->kv];
    Context c = context_of(r, cell->kv, -1);
    size_t n_pairs = context_scores(&c);
    bool evicts = cell->c.ratio < 1 && n_pairs > 0;
    bool streams = evicts && r->e->stream;
    c.seq = streams ? kvcache_new(kv, err) : kvcache_fork(kv, r->full[cell->kv], err);
    if (c.seq < 0) return -1;
    cell->c.kept = 1;
    if (evicts) {
        if (set_method(r->e, &c, cell->policy, cell->level, err) != 0) return -1;
        long kept =
            streams ? stream_context(r, &c, cell->c.ratio, err) : shrink_context(r, &c, cell, err);
        if (kept < 0) return -1;
        cell->c.kept = (double)kept / (double)n_pairs;
    }
    return kvcache_settle(kv, c.seq, err) == 0 ? c.seq : -1;
}

// Hands a cell to the results, which own its numbers from then on.
static int done_cell(EvalResults *r, EvalCell *c, char *err) {
    if (r->log && put_cell(r->log, c, err) != 0) return -1;
    if (add_cell(r, *c, err) != 0) return -1;
    c->value = NULL;
    return 0;
}

// Runs all cells of one policy, group by group.
static int run_cells(Run *r, Cell *cells, int n, char *err) {
    int n_questions = r->task->n_questions;
    for (int begin = 0; begin < n_questions; begin = r->group_end) {
        if (next_group(r, begin, err) != 0) return -1;
        for (Cell *cell = cells; cell < cells + n; cell++) {
            int seq = evicted(r, cell, err);
            if (seq < 0 || ask_group(r, &r->kv[cell->kv], seq, &cell->c, err) != 0) return -1;
            kvcache_drop(&r->kv[cell->kv], seq);
            if (r->group_end == n_questions && done_cell(r->results, &cell->c, err) != 0) return -1;
        }
    }
    return 0;
}

// ---- all of them ----

static int cells_per_context(const Eval *e) {
    return e->n_kvs * (1 + e->n_policies * e->n_levels * e->n_ratios);
}

// Adds a cell to the plan unless the results have it, or have it under the name "full".
static int plan_cell(Run *r, Cell *plan, int *n, Cell cell, char *err) {
    EvalCell *c = &cell.c, like;
    c->task = r->task->task, c->metric = metric_names[r->task->metric], c->context = r->task->line;
    c->kv = r->e->kv[cell.kv].name;
    if (find_cell(r->results, c)) {
        r->done += r->task->n_questions;
        return 0;
    }
    if (alloc_cell(c, r->task->n_questions) != 0) return fail(err, "out of memory");
    like = *c, like.policy = "full", like.level = "";
    const EvalCell *full = c->ratio >= 1 ? find_cell(r->results, &like) : NULL;
    if (!full) {
        plan[(*n)++] = cell;
        return 0;
    }
    memcpy(c->value, full->value, 4 * (size_t)c->n * sizeof *c->value);
    c->kept = 1;
    r->done += c->n;
    return done_cell(r->results, c, err);
}

// What a policy has yet to do in this context, [n] cells; p NULL: the full caches.
static int plan_cells(Run *r, const Policy *p, Cell *plan, int *n, char *err) {
    const Eval *e = r->e;
    for (int k = 0; k < e->n_kvs; k++) {
        Cell full = {.c = {.policy = "full", .level = "", .ratio = 1}, .kv = k};
        if (!p && plan_cell(r, plan, n, full, err) != 0) return -1;
        for (int i = 0; p && i < e->n_levels * e->n_ratios; i++) {
            const Level *l = e->level[i / e->n_ratios];
            Cell c = {
                .c = {.policy = p->name, .level = l->name, .ratio = e->ratio[i % e->n_ratios]},
                .policy = p,
                .level = l,
                .kv = k};
            if (plan_cell(r, plan, n, c, err) != 0) return -1;
        }
    }
    return 0;
}

// Scores the context, unless no cell needs that, on a sequence of its own.
static int score_context(Run *r, const Policy *p, const Cell *plan, int n, char *err) {
    bool needed = false;
    for (int i = 0; i < n; i++) needed = needed || plan[i].c.ratio < 1;
    if (!p || !needed || r->e->stream) return 0;
    int seq = kvcache_new(&r->kv[0], err);
    if (seq < 0) return -1;
    Context c = context_of(r, 0, seq);
    free(r->score);
    free(r->keep);
    r->score = malloc((context_scores(&c) + 1) * sizeof *r->score);
    r->keep = malloc(context_scores(&c) + 1);
    if (!r->score || !r->keep)
        return fail(err, "out of memory for the scores of %d tokens", c.n_ctx);
    int rc = set_method(r->e, &c, p, r->e->level[0], err);
    if (rc == 0) rc = context_score(&c, p, r->score, err);
    kvcache_drop(&r->kv[0], seq);
    return rc;
}

static int run_policy(Run *r, const Policy *p, bool *read, Cell *plan, char *err) {
    int n = 0, rc = plan_cells(r, p, plan, &n, err);
    if (n > 0 && rc == 0 && !*read) {
        rc = read_context(r, err);
        *read = true;
    }
    if (n > 0 && rc == 0) rc = score_context(r, p, plan, n, err);
    if (n > 0 && rc == 0) rc = run_cells(r, plan, n, err);
    for (int i = 0; i < n; i++) free(plan[i].c.value);
    return rc == 0 ? report(r, err) : -1;
}

static int run_context(Run *r, const EvalTask *task, Cell *plan, char *err) {
    bool read = false;
    r->task = task;
    r->group = r->group_end = 0;
    int rc = run_policy(r, NULL, &read, plan, err);
    for (int i = 0; i < r->e->n_policies && rc == 0; i++)
        rc = run_policy(r, r->e->policy[i], &read, plan, err);
    for (int k = 0; read && rc == 0 && k < r->e->n_kvs; k++) kvcache_drop(&r->kv[k], r->full[k]);
    if (read && rc == 0) kvcache_drop(&r->kv[0], r->yardstick);
    free_items(r);
    return rc;
}

static uint64_t profile_hash(const Profile *p, const Config *m, uint64_t h) {
    size_t heads = (size_t)p->n_layers * p->n_kv_heads;
    h = hash_bytes(h, p->share, p->n_ratios * heads * sizeof *p->share);
    return hash_bytes(h, p->probe, heads * probe_features(m) * sizeof *p->probe);
}

// What all cells of one file of results share.
static int begin_results(const Eval *e, const EvalTasks *tasks, EvalResults *r, char *err) {
    const Context *c = &e->context;
    char text[ERR_LEN];
    int most = e->max_tokens, local = c->local;
    uint64_t h =
        hash_bytes(e->settings, e->prefix->id, (size_t)e->prefix->n * sizeof *e->prefix->id);
    h = hash_bytes(hash_bytes(h, &most, sizeof most), e->stop ? e->stop : "",
                   e->stop ? strlen(e->stop) : 0);
    h = hash_bytes(hash_bytes(h, &c->chunk, sizeof c->chunk), &local, sizeof local);
    h = hash_bytes(hash_bytes(h, c->postfix, strlen(c->postfix)), e->kv[0].name,
                   strlen(e->kv[0].name));
    h = hash_bytes(h, e->set ? e->set : "", e->set ? strlen(e->set) : 0);
    if (e->stream) h = hash_bytes(h, &e->window, sizeof e->window);
    if (c->profile) h = profile_hash(c->profile, &e->state->model->config, h);
    snprintf(text, sizeof text, "%s %s, tasks %016" PRIx64 ", settings %016" PRIx64,
             e->state->model->name, e->state->model->fingerprint, tasks->hash, h);
    bool fresh = !r->settings;
    if (results_settings(r, text, err) != 0) return -1;
    if (!fresh || !r->log) return 0;
    return put_settings(r->log, text, err);
}

static int run_all(Run *r, const EvalTasks *tasks, char *err) {
    const Eval *e = r->e;
    KVShape shape = model_kv_shape(e->state->model);
    int n_cells = cells_per_context(e), rc = begin_results(e, tasks, r->results, err);
    Cell *plan = malloc((size_t)n_cells * sizeof *plan);
    if (rc == 0 && !plan) rc = fail(err, "out of memory");
    for (int k = 0; k < e->n_kvs && rc == 0; k++) {
        rc = kvcache_open(&r->kv[k], &shape, e->kv[k].types, e->state->pool, err);
        r->kv[k].settling = false;  // exact keys are scored; evicted() settles what it leaves
    }
    for (int i = e->shard; i < tasks->n; i += e->n_shards)
        r->total += (long)n_cells * tasks->task[i].n_questions;
    for (int i = e->shard; i < tasks->n && rc == 0; i += e->n_shards)
        rc = run_context(r, &tasks->task[i], plan, err);
    free(plan);
    return rc;
}

int eval_run(const Eval *e, const EvalTasks *tasks, EvalResults *results, char *err) {
    Run *r = calloc(1, sizeof *r);
    if (!r) return fail(err, "out of memory");
    r->e = e, r->results = results, r->batch.state = e->state;
    int rc = run_all(r, tasks, err);
    for (int k = 0; k < EVAL_LIST; k++) kvcache_close(&r->kv[k]);
    ids_free(&r->ids);
    free(r->score);
    free(r->keep);
    free(r);
    return rc;
}
