// fields.c: the fields of a request's JSON.
#define _POSIX_C_SOURCE 200809L
#include "serve/fields.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "serve/serve.h"

bool fields_refuse(Fields *f, int status, const char *param, const char *fmt, ...) {
    va_list args;
    if (f->status) return false;
    f->status = status;
    snprintf(f->param, sizeof f->param, "%s", param);
    va_start(args, fmt);
    vsnprintf(f->message, sizeof f->message, fmt, args);
    va_end(args);
    f->message[utf8_whole(f->message, strlen(f->message))] = '\0';
    return false;
}

bool fields_answer(const Fields *f, Outlet *o) {
    if (!f->status) return false;
    serve_error(o, f->status, f->message, f->param[0] ? f->param : NULL, f->code);
    return true;
}

// Each but the first stands behind one of these.
size_t fields_most(const char *s, size_t n) {
    size_t most = 1;
    for (size_t i = 0; i < n; i++) most += s[i] == ',' || s[i] == '[' || s[i] == '{';
    return most;
}

void fields_open(Fields *f, Http *h) {
    static const JsonNode none = {.kind = JSON_OBJECT};
    char err[ERR_LEN];
    *f = (Fields){.object = &none};
    size_t n = h->body.n, most = fields_most(h->body.s, n);
    if (n == 0) {
        fields_refuse(f, 400, "", "the body is empty: a JSON object is needed");
        return;
    }
    if (most > FIELDS_VALUES) {
        fields_refuse(f, 413, "", "more than %d values in the body", FIELDS_VALUES);
        return;
    }
    f->nodes = malloc(most * sizeof *f->nodes);
    const JsonNode *top = f->nodes ? json_read(f->nodes, most, h->body.s, n, err) : NULL;
    if (!f->nodes)
        fields_refuse(f, 503, "", "out of memory for the body");
    else if (!top)
        fields_refuse(f, 400, "", "the body is no JSON: %s", err);
    else if (top->kind != JSON_OBJECT)
        fields_refuse(f, 400, "", "the body is no JSON object");
    else
        f->object = top;
}

void fields_close(Fields *f) { free(f->nodes); }

const JsonNode *fields_get(const Fields *f, const char *name) {
    return json_member(f->object, name);
}

double fields_number(Fields *f, const char *name, double lo, double hi, double otherwise) {
    const JsonNode *v = fields_get(f, name);
    if (!v) return otherwise;
    double x = v->kind == JSON_NUMBER ? json_number(v) : NAN;
    if (x >= lo && x <= hi) return x;
    fields_refuse(f, 400, name, "%s must be a number from %g to %g", name, lo, hi);
    return otherwise;
}

long fields_count(Fields *f, const char *name, long lo, long hi, long otherwise) {
    const JsonNode *v = fields_get(f, name);
    if (!v) return otherwise;
    double x = v->kind == JSON_NUMBER ? json_number(v) : NAN;
    if (x >= (double)lo && x <= (double)hi && x == floor(x)) return (long)x;
    fields_refuse(f, 400, name, "%s must be a whole number from %ld to %ld", name, lo, hi);
    return otherwise;
}

bool fields_bool(Fields *f, const char *name, bool otherwise) {
    const JsonNode *v = fields_get(f, name);
    if (!v) return otherwise;
    if (v->kind == JSON_BOOL) return v->n;
    fields_refuse(f, 400, name, "%s must be true or false", name);
    return otherwise;
}

const char *fields_text(Fields *f, const char *name, const char *otherwise) {
    const JsonNode *v = fields_get(f, name);
    if (!v) return otherwise;
    if (v->kind == JSON_STRING) return v->text;
    fields_refuse(f, 400, name, "%s must be a string", name);
    return otherwise;
}

// ---- what is not there yet ----

static bool is_number(const JsonNode *v, double x) {
    return v->kind == JSON_NUMBER && json_number(v) == x;
}

static bool is_text(const JsonNode *v, const char *text) {
    return v->kind == JSON_STRING && strcmp(v->text, text) == 0;
}

// Whether a field that is not there yet says nothing but what happens without it.
static bool is_neutral(const char *name, const JsonNode *v) {
    if (strcmp(name, "typical_p") == 0 || strcmp(name, "best_of") == 0) return is_number(v, 1);
    return is_number(v, 0) || ((v->kind == JSON_LIST || v->kind == JSON_OBJECT) && v->n == 0) ||
           is_text(v, "");
}

void fields_refuse_others(Fields *f) {
    static const char *const others[] = {"typical_p", "best_of",   "suffix",
                                         "grammar",   "functions", "function_call"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        const JsonNode *v = fields_get(f, others[i]);
        if (v && !is_neutral(others[i], v))
            fields_refuse(f, 501, others[i], "%s is not supported", others[i]);
    }
}
