// calls.c: calls of functions in the text of an answer.
//
// A call is the JSON object of a name and arguments behind the form's marker, in a fence of three
// backticks, or alone. Text goes out as it comes, but for what may be the beginning of a call, and
// white space before it; a call goes out when its object is complete. What turns out to be none,
// since it is no JSON, or names no function of the request, is text like any other.
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <string.h>

#include "serve/tools.h"

size_t tools_names_bytes(const Tools *t) {
    size_t n = 1;
    for (int i = 0; i < t->n; i++) n += strlen(t->tool[i].name) + 1;
    return n;
}

Callable tools_callable(const Tools *t, char *names) {
    Callable c = {.form = t->n > 0 ? t->form : NULL, .must = t->must, .names = names};
    c.most = t->several && t->n > 0 && !t->form->call_one ? TOOLS_MOST : 1;
    for (int i = 0; i < t->n; i++) {
        size_t n = strlen(t->tool[i].name) + 1;
        memcpy(names, t->tool[i].name, n);
        names += n;
    }
    *names = '\0';
    return c;
}

void found_free(Found *found) {
    free(found->name), free(found->arguments);
    *found = (Found){0};
}

static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

static size_t skip_space(const char *s, size_t at, size_t n) {
    while (at < n && is_space(s[at])) at++;
    return at;
}

// How many bytes at the end of s [n] what begins with may be; all of `what` is not among them.
static size_t beginning(const char *s, size_t n, const char *what) {
    size_t most = strlen(what);
    size_t k = most == 0 ? 0 : n < most - 1 ? n : most - 1;
    while (k > 0 && memcmp(s + n - k, what, k) != 0) k--;
    return k;
}

// Where `what` is in s [n] from at on; n: nowhere.
static size_t find(const char *s, size_t at, size_t n, const char *what) {
    size_t len = strlen(what);
    for (; at + len <= n; at++)
        if (memcmp(s + at, what, len) == 0) return at;
    return n;
}

// Where the object that begins at s[at] ends; 0: not before n.
static size_t object_end(const char *s, size_t at, size_t n) {
    int depth = 0;
    bool quoted = false;
    for (; at < n; at++) {
        if (quoted && s[at] == '\\')
            at++;
        else if (s[at] == '"')
            quoted = !quoted;
        else if (!quoted && (s[at] == '{' || s[at] == '['))
            depth++;
        else if (!quoted && (s[at] == '}' || s[at] == ']') && --depth == 0)
            return at + 1;
    }
    return 0;
}

static bool is_known(const Callable *c, const char *name) {
    for (const char *known = c->names; *known; known += strlen(known) + 1)
        if (strcmp(known, name) == 0) return true;
    return false;
}

// Whether s [n] is a call; then its name and arguments go to *found.
static bool read_call(const Callable *c, const char *s, size_t n, Found *found) {
    char err[ERR_LEN];
    char *copy = malloc(n + 1);
    size_t cap = n / 2 + 2;
    JsonNode *nodes = malloc(cap * sizeof *nodes);
    const JsonNode *v = NULL, *name = NULL, *arguments = NULL;
    Buffer text = {0};
    if (copy && nodes) memcpy(copy, s, n), v = json_read(nodes, cap, copy, n, err);
    if (v && v->kind == JSON_OBJECT) {
        name = json_member(v, c->form->call_name);
        arguments = json_member(v, c->form->call_arguments);
    }
    bool ok = name && name->kind == JSON_STRING && is_known(c, name->text) &&
              (!arguments || arguments->kind == JSON_OBJECT);
    if (ok)
        ok = (arguments ? json_dump(&text, arguments, 0) : buffer_add(&text, "{}", 2)) == 0 &&
             (found->name = strdup(name->text)) != NULL;
    if (ok) found->arguments = text.s;
    if (!ok) free(text.s);
    free(copy), free(nodes);
    return ok;
}

// Past the text from..to, or nothing where that is empty.
static bool show(Part *p, Found *found, size_t from, size_t to) {
    found->from = from, found->to = to;
    p->n_told = to;
    p->behind_call = false;
    return to > from;
}

// The answer is the JSON of a call and nothing else.
static bool next_forced(const Callable *c, Part *p, Found *found) {
    size_t n = part_visible(p);
    if (!p->ended || p->n_told == n) return false;
    show(p, found, 0, n);
    if (read_call(c, p->reply.text.s, n, found)) p->n_calls++;
    return true;
}

// What a call stands between: the form's own, and fences, which small models like better.
enum { MARKS = 3 };
typedef struct {
    const char *open, *close;
    size_t n_close;
} Mark;

static Mark mark_of(const Callable *c, int i) {
    static const char fence[] = "```";
    const char *brace = strchr(c->form->call_end, '}');
    Mark m = {i == 1 ? "```json" : fence, fence, sizeof fence - 1};
    if (i > 0) return m;
    m.open = c->form->call_marker, m.n_close = 0;
    if (brace) m.close = stripped(brace + 1, strlen(brace + 1), &m.n_close);
    return m;
}

// Moves p behind what closes the last call, and the white space around it. false: more must come to
// tell where that ends.
static bool close_call(const Callable *c, Part *p, size_t n) {
    const char *s = p->reply.text.s;
    size_t at = skip_space(s, p->n_told, n);
    if (p->close > 0) {
        Mark m = mark_of(c, p->close - 1);
        if (n - at < m.n_close && !p->ended && memcmp(s + at, m.close, n - at) == 0) return false;
        if (n - at >= m.n_close && memcmp(s + at, m.close, m.n_close) == 0) {
            at = skip_space(s, at + m.n_close, n);
            p->close = 0;
        }
    }
    p->n_told = at;
    return at < n;
}

// Where the next call may begin in s [n] from at on, n: nowhere; *json: where its object would.
// Without a mark it stands where the answer begins, or behind another one.
typedef struct {
    size_t start, json;
    int close;  // 1 + the mark that ends it; 0: none
} Start;

static Start find_start(const Callable *c, const Part *p, size_t at, size_t n) {
    const char *s = p->reply.text.s;
    Start best = {n, n, 0};
    size_t bare = skip_space(s, at, n);
    if ((at == 0 || p->behind_call) && bare < n && s[bare] == '{')
        return (Start){bare, bare, p->behind_call ? p->close : 0};
    for (int i = 0; i < MARKS; i++) {
        const char *open = mark_of(c, i).open;
        size_t found = *open ? find(s, at, n, open) : n;
        if (found < best.start) best = (Start){found, found + strlen(open), i + 1};
    }
    return best;
}

// Bytes at the end of s [n] that may begin a mark.
static size_t held_back(const Callable *c, const char *s, size_t n) {
    size_t most = 0;
    for (int i = 0; i < MARKS; i++) {
        size_t k = beginning(s, n, mark_of(c, i).open);
        if (k > most) most = k;
    }
    return most;
}

bool tools_next(const Callable *c, Part *p, Found *found) {
    const char *s = p->reply.text.s;
    size_t n = part_visible(p);
    *found = (Found){0};
    if (c->must) return next_forced(c, p, found);
    if (p->n_calls >= c->most) return false;
    if (p->behind_call && !close_call(c, p, n)) return false;
    size_t at = p->n_told;
    Start start = find_start(c, p, at, n);
    bool begins = start.start < n;
    size_t end = begins || p->ended ? start.start : n - held_back(c, s + at, n - at);
    while ((begins || !p->ended) && end > at && is_space(s[end - 1])) end--;
    if (end > at) return show(p, found, at, end);
    if (!begins) return false;
    size_t json = skip_space(s, start.json, n);
    // A fence may still become one of JSON.
    if (!p->ended &&
        (json == n || held_back(c, s + start.start, n - start.start) == n - start.start))
        return false;
    if (json == n || s[json] != '{') return show(p, found, at, start.json);
    size_t behind = object_end(s, json, n);
    if (behind == 0) return p->ended && show(p, found, at, n);
    show(p, found, at, behind);
    if (!read_call(c, s + json, behind - json, found)) return true;
    p->n_calls++;
    p->behind_call = true;
    p->close = start.close;
    return true;
}

void tools_enough(const Callable *c, Part *p) {
    Found found;
    Part all = *p;
    if (!c->form || c->must || c->most > 1 || p->ended) return;
    all.n_told = 0;
    while (tools_next(c, &all, &found)) found_free(&found);
    if (all.n_calls == c->most) part_end(p);
}
