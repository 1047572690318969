// context.c: feeds a context to the model, and keeps the numbers that its policy and level were
// given.
//
// It lies below the methods: they include it, and it knows none of them. Whoever evicts while
// tokens come, or wants to stop, hears of every forward call through `after` and `progress`.
#include "policies/context.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

// ---- reading ----

static int report(const Context *c, const char *what, long done, long total, char *err) {
    if (c->progress && c->progress(c->progress_arg, what, done, total) != 0)
        return fail(err, "interrupted");
    return 0;
}

int context_feed(Context *c, const Feed *f, char *err) {
    Row rows[MAX_ROWS];
    for (int i = 0; i < f->n;) {
        int m = min_int(min_int(c->state->max_rows, MAX_ROWS), f->n - i);
        for (int j = 0; j < m; j++) rows[j] = (Row){f->seq, f->ids[i + j], false};
        if (forward(c->state, c->kv, rows, m, err) != 0) return -1;
        i += m;
        if (c->after && c->after(c->after_arg, err) != 0) return -1;
        if (report(c, f->what, f->done + i, f->total, err) != 0) return -1;
    }
    return 0;
}

int context_read(Context *c, char *err) {
    double start = now();
    int first = c->held ? c->n_prefix : 0, n = c->n_prefix + c->n_ctx - first;
    Feed all = {.seq = c->seq, .ids = c->ids + first, .n = n, .what = "read", .total = n};
    if (context_feed(c, &all, err) != 0) return -1;
    c->prefill_s = now() - start;
    return 0;
}

// ---- what there is ----

int context_heads(const Context *c) {
    return kvcache_scored_layers(&c->kv->shape, NULL) * c->kv->shape.n_kv_heads;
}

int context_group(const Context *c) { return c->kv->shape.n_heads / c->kv->shape.n_kv_heads; }

size_t context_scores(const Context *c) { return (size_t)context_heads(c) * (size_t)c->n_ctx; }

int context_pos(const Context *c) { return c->n_prefix + c->n_held; }

int context_first(const Context *c, int h) { return c->n_prefix + (c->held ? c->held[h] : 0); }

int context_need_profile(const Context *c, const char *what, char *err) {
    if (c->profile) return 0;
    return fail(err, "%s needs the model's profile: `run calibrate` makes one", what);
}

// ---- parameters ----

int param_find(const Param *params, const char *key, size_t n) {
    for (int i = 0; i < MAX_PARAMS && params[i].name; i++) {
        if (strlen(params[i].name) == n && memcmp(params[i].name, key, n) == 0) return i;
    }
    return -1;
}

static double value_of(const double *value, const Param *params, const char *name) {
    int i = param_find(params, name, strlen(name));
    assert(i >= 0);  // else the function and its row disagree about the name
    return value[i];
}

double context_param(const Context *c, const char *name) {
    return value_of(c->policy_param, c->policy->params, name);
}

double context_level_param(const Context *c, const char *name) {
    return value_of(c->level_param, c->level->params, name);
}

static void set_defaults(double *value, const Param *params) {
    for (int i = 0; i < MAX_PARAMS; i++) value[i] = params[i].value;
}

// Sets the parameter called key [n] if there is one. Returns 1, 0 when there is none, or -1.
static int set_param(double *value, const Param *params, const char *key, size_t n, double x,
                     char *err) {
    int i = param_find(params, key, n);
    if (i < 0) return 0;
    const Param *p = &params[i];
    if (!(x >= p->lo && x <= p->hi) || (!p->real && x != floor(x))) {
        const char *kind = p->real ? "number" : "whole number";
        return fail(err, "%s needs a %s from %g to %g", p->name, kind, p->lo, p->hi);
    }
    value[i] = x;
    return 1;
}

// Whether the key [n] at `at` stands in the list before it, too.
static bool is_given(const char *list, const char *at, size_t n) {
    for (const char *s = list; s < at; s += strcspn(s, ","), s += *s == ',')
        if (strcspn(s, "=,") == n && memcmp(s, at, n) == 0) return true;
    return false;
}

int context_set(Context *c, const Policy *p, const Level *l, const char *key_values, char *err) {
    c->policy = p, c->level = l;
    set_defaults(c->policy_param, p->params);
    set_defaults(c->level_param, l->params);
    for (const char *s = key_values; s && *s; s += *s == ',') {
        size_t n = strcspn(s, "=,");
        if (n == 0 || s[n] != '=') return fail(err, "needs key=value,..");
        double x = number_read(s + n + 1, strcspn(s + n + 1, ","));
        if (is_given(key_values, s, n)) return fail(err, "%.*s is given twice", (int)n, s);
        int a = set_param(c->policy_param, p->params, s, n, x, err);
        int b = a < 0 ? -1 : set_param(c->level_param, l->params, s, n, x, err);
        if (b < 0) return -1;
        if (a + b == 0) {
            return fail(err, "policy %s and level %s have no parameter '%.*s'", p->name, l->name,
                        (int)n, s);
        }
        s += strcspn(s, ",");
    }
    return 0;
}

void context_set_policy(Context *c, const Policy *p) {
    c->policy = p;
    set_defaults(c->policy_param, p->params);
}
