// settings.c: how a request wants its answer written: sampling, form, where it ends.
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <string.h>

#include "serve/door.h"

enum { STOP_MOST = 1000 };  // bytes of a stop text

// ---- where it ends ----

static void read_stops(Fields *f, const char *name, Job *job) {
    const JsonNode *v = fields_get(f, name);
    const JsonNode *one = !v || v->kind != JSON_LIST ? v : v->child;
    for (int n = 0; one; one = v->kind == JSON_LIST ? one->next : NULL, n++) {
        if (one->kind != JSON_STRING || one->n == 0 || one->n > STOP_MOST || n == ENGINE_STOPS) {
            fields_refuse(f, 400, name, "%s must be a text or up to %d of them, of 1 to %d bytes",
                          name, ENGINE_STOPS, STOP_MOST);
            return;
        }
        if (!(job->stop[n] = strdup(one->text))) fields_refuse(f, 503, "", "out of memory");
    }
}

// ---- sampling ----

// {"128": -100, ..} or, as llama.cpp has it, [[128, -100], ..].
static void read_biases(Fields *f, Job *job, Sampling *s) {
    const JsonNode *v = fields_get(f, "logit_bias");
    if (!v) return;
    bool list = v->kind == JSON_LIST;
    if (!list && v->kind != JSON_OBJECT) {
        fields_refuse(f, 400, "logit_bias", "logit_bias must be an object of numbers by id");
        return;
    }
    if (v->n > MAX_BIASES) {
        fields_refuse(f, 400, "logit_bias", "logit_bias has more than %d tokens", MAX_BIASES);
        return;
    }
    if (!(job->bias = malloc(((size_t)v->n + 1) * sizeof *job->bias))) {
        fields_refuse(f, 503, "", "out of memory");
        return;
    }
    for (const JsonNode *one = v->child; one; one = one->next) {
        const JsonNode *id = list && one->kind == JSON_LIST && one->n == 2 ? one->child : NULL;
        const JsonNode *value = list ? (id ? id->next : NULL) : one;
        char *end = NULL;
        double x =
            list ? (id && id->kind == JSON_NUMBER ? json_number(id) : -1) : strtod(one->key, &end);
        if (!value || value->kind != JSON_NUMBER || !(x >= 0 && x < 1 << 30) || x != (int)x ||
            (end && (end == one->key || *end))) {
            fields_refuse(f, 400, "logit_bias", "logit_bias: a token's id and a number are needed");
            return;
        }
        job->bias[s->n_bias++] = (Bias){(int)x, (float)json_number(value)};
    }
    s->bias = job->bias;
}

static Sampling read_sampling(Door *d, Fields *f, Job *job) {
    char err[ERR_LEN];
    long seed = fields_count(f, "seed", -(1L << 53), 1L << 53, -1);
    if (seed < 0) seed = (long)(random_next(&d->random) >> 12);
    long top_k = fields_count(f, "top_k", -1, 1 << 30, 0);
    Sampling s = {.temp = fields_number(f, "temperature", 0, 100, d->temp),
                  .top_p = fields_number(f, "top_p", 0, 1, d->top_p),
                  .random = (uint64_t)seed,
                  .top_k = top_k > 0 ? (int)top_k : 0,
                  .min_p = fields_number(f, "min_p", 0, 1, 0),
                  .last_n = (int)fields_count(f, "repeat_last_n", -1, 1 << 30, 64),
                  .repeat_penalty = fields_number(f, "repeat_penalty", 0, 100, 1),
                  .frequency_penalty = fields_number(f, "frequency_penalty", -2, 2, 0),
                  .presence_penalty = fields_number(f, "presence_penalty", -2, 2, 0)};
    read_biases(f, job, &s);
    if (!f->status && sampling_check(&s, d->engine->model->config.vocab_size, err) != 0)
        fields_refuse(f, 400, "logit_bias", "%s", err);
    return s;
}

// ---- form ----

static bool is(const JsonNode *v, const char *text) {
    return v && v->kind == JSON_STRING && strcmp(v->text, text) == 0;
}

// The schema text [n], NULL: any object, which the field `name` asks for.
static void read_schema(Door *d, Fields *f, const char *name, const Buffer *text, Job *job) {
    char err[ERR_LEN];
    if (!d->pieces)
        d->pieces = pieces_open(d->engine->tok, d->engine->model->config.vocab_size, err);
    if (!d->pieces)
        fields_refuse(f, 501, name, "%s", err);
    else if (!(job->schema = schema_open(text->s, text->n, d->pieces, err)))
        fields_refuse(f, 400, name, "%s: %s", name, err);
}

// schema NULL: any object.
static void open_form(Door *d, Fields *f, const JsonNode *schema, Job *job) {
    Buffer text = {0};
    if (schema && json_dump(&text, schema, JSON_COMPACT) != 0)
        fields_refuse(f, 503, "", "out of memory");
    else
        read_schema(d, f, "response_format", &text, job);
    free(text.s);
}

void door_call_form(Door *d, Fields *f, const Tools *t, Job *job) {
    Buffer text = {0};
    if (!t->must || f->status || !(text.s = tools_schema(t, f))) return;
    text.n = strlen(text.s);
    read_schema(d, f, "tools", &text, job);
    free(text.s);
}

static const JsonNode *member(const JsonNode *v, const char *name) {
    return v && v->kind == JSON_OBJECT ? json_member(v, name) : NULL;
}

// {"type": "text"}, "json_object" or "json_schema". The schema is in "json_schema" as OpenAI has it
// or beside the type as llama.cpp and Anthropic do, whose requests name the form otherwise.
static void read_form(Door *d, Fields *f, Job *job) {
    const JsonNode *v = fields_get(f, "response_format"), *bare = fields_get(f, "json_schema");
    if (!v) v = member(fields_get(f, "output_config"), "format");
    const JsonNode *type = member(v, "type"), *schema = member(member(v, "json_schema"), "schema");
    if (!schema) schema = member(v, "schema");
    if (!v && bare)
        open_form(d, f, bare, job);
    else if (!v || is(type, "text"))
        return;
    else if (is(type, "json_object") || (is(type, "json_schema") && schema))
        open_form(d, f, schema, job);
    else if (is(type, "json_schema"))
        fields_refuse(f, 400, "response_format", "response_format: json_schema.schema is missing");
    else
        fields_refuse(f, 400, "response_format",
                      "response_format: type must be text, json_object or json_schema");
}

// ---- all of it ----

int door_choices(Door *d, Fields *f) { return (int)fields_count(f, "n", 1, d->engine->n_slots, 1); }

void door_sampling(Door *d, Fields *f, const char *stop, Job *job) {
    const char *document = fields_text(f, "document", NULL);
    fields_refuse_others(f);
    Sampling s = read_sampling(d, f, job);
    read_stops(f, stop, job);
    if (!f->status) read_form(d, f, job);
    for (int i = 0; i < job->n_parts; i++) job->parts[i].sampling = sampling_nth(&s, i);
    job->ignore_eos = fields_bool(f, "ignore_eos", false);
    if (document && !(job->document = strdup(document))) fields_refuse(f, 503, "", "out of memory");
}
