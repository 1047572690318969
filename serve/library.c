// library.c: /v1/documents: contexts that are read once, compressed, asked by name and looked at.
//
// All of it is work for the engine's thread, which owns the documents. A text is turned into ids
// here, so that what is wrong with it is said at once.
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <string.h>

#include "serve/door.h"
#include "text.h"

// What a job of this file carries.
typedef struct {
    Door *d;
    char name[DOC_NAME + 1];
    Ids ids;
    double ratio;
    const Policy *policy;
    const Level *level;
    FitKind fit;
    DocumentMap map;  // what of it is wanted
} Errand;

static void put_document(FILE *f, const Document *doc) {
    json_print(f, "{'object': 'document', 'name': %s, 'created': %ld, 'tokens': %d, ", doc->name,
               doc->created, doc->ids.n);
    json_print(f, "'prefix_tokens': %d, 'ratio': %g, 'policy': %s, 'fit': %s, 'kv': %s, ",
               doc->n_prefix, doc->ratio, doc->policy, doc->fit, doc->kv);
    json_print(f, "'bytes': %zu, 'full_bytes': %zu, 'file_bytes': %zu", doc->bytes, doc->full_bytes,
               doc->file_bytes);
    fputs(doc->automatic ? ", \"automatic\": true" : ", \"automatic\": false", f);
    fputs(doc->seq >= 0 ? ", \"loaded\": true" : ", \"loaded\": false", f);
}

static void close_errand(Job *job) {
    Errand *x = job->door;
    ids_free(&x->ids);
}

// A job whose work this is; NULL: it has been answered that there is no memory.
static Job *errand(Door *d, Outlet *o, void (*work)(Engine *e, Job *job)) {
    Job *job = job_new(o, 0);
    Errand *x = job ? calloc(1, sizeof *x) : NULL;
    if (!x) {
        job_free(job);
        serve_error(o, 503, "out of memory", NULL, NULL);
        return NULL;
    }
    x->d = d;
    job->door = x;
    job->work = work, job->failed = door_failed, job->close = close_errand;
    return job;
}

// ---- reading one ----

static void read_document(Engine *e, Job *job) {
    char err[ERR_LEN];
    Page page;
    Errand *x = job->door;
    double start = now();
    Compress c = {.name = x->name,
                  .ids = x->ids,
                  .n_prefix = e->prefix->n,
                  .ratio = x->ratio,
                  .policy = x->policy,
                  .level = x->level,
                  .fit = x->fit};
    e->docs.full = false;
    int status = engine_compress(e, job, &c, err);
    if (status != 0) {
        int code = *e->stop ? 503 : e->docs.full ? 507 : 500;
        door_failed(job, code, *e->stop ? "the server is stopping" : err, NULL, NULL);
        return;
    }
    if (page_open(&page)) {
        put_document(page.f, documents_find(&e->docs, x->name));
        json_print(page.f, ", 'seconds': %g, 'read_s': %g, 'score_s': %g, 'fit_s': %g}\n",
                   now() - start, c.read_s, c.score_s, c.fit_s);
    }
    page_send(&page, job->outlet, 200);
}

// What a request says of a new document, from its query or from its JSON.
typedef struct {
    const char *name, *policy, *level, *fit, *kv, *text;
    size_t n_text;
    double ratio;
} Wanted;

// Checks what is wanted and fills x. What is wrong is noted in f.
static void prepare(const Door *d, Fields *f, const Wanted *w, Errand *x) {
    char err[ERR_LEN], kv[KV_NAME];
    const Engine *e = d->engine;
    int fit = w->fit ? fit_kind(w->fit) : (int)e->fit;
    size_t mark = text_mark(w->text, w->n_text);
    x->policy = w->policy ? policy_find(w->policy) : e->method.policy;
    x->level = w->level ? level_find(w->level) : e->method.level;
    x->ratio = w->ratio;
    kvcache_types_name(e->kv->types, kv);
    if (!w->name || !documents_name_ok(w->name))
        fields_refuse(f, 400, "name",
                      "name must be up to %d letters, digits, '-', '_' and '.', the first no '.'",
                      DOC_NAME);
    if (!(w->ratio > 0 && w->ratio <= 1))
        fields_refuse(f, 400, "ratio", "ratio must be above 0 and at most 1");
    if (!x->policy) fields_refuse(f, 400, "policy", "there is no policy %.40s", w->policy);
    if (!x->level) fields_refuse(f, 400, "level", "there is no level %.40s", w->level);
    if (fit < 0) fields_refuse(f, 400, "fit", "fit %.40s: there are none, values and both", w->fit);
    x->fit = (FitKind)max_int(fit, 0);
    if (w->kv && strcmp(w->kv, kv) != 0)
        fields_refuse(f, 400, "kv", "kv: this server keeps %s: start it with --kv %.20s", kv,
                      w->kv);
    if (f->status) return;
    if (text_check(w->text + mark, w->n_text - mark, err) != TEXT_FINE) {
        fields_refuse(f, 400, "text", "the text: %s", err);
        return;
    }
    snprintf(x->name, sizeof x->name, "%s", w->name);
    int failed = 0;
    for (int i = 0; i < e->prefix->n && !failed; i++) failed = ids_push(&x->ids, e->prefix->id[i]);
    if (!failed) failed = tokenizer_encode(e->tok, w->text + mark, w->n_text - mark, 0, &x->ids);
    if (failed) fields_refuse(f, 503, "", "out of memory");
    if (!failed && x->ids.n == e->prefix->n) fields_refuse(f, 400, "text", "the text is empty");
    if (x->ids.n >= e->most_positions) {
        f->code = "context_length_exceeded";
        fields_refuse(f, 400, "text", "%d tokens leave no room for a question: the model takes %d",
                      x->ids.n, e->most_positions);
    }
}

// POST /v1/documents?name=town&ratio=0.3, the body being the text.
static void prepare_text(const Door *d, Fields *f, Http *h, char *name, Errand *x) {
    char *ratio = http_query(h, "ratio"), *policy = http_query(h, "policy");
    char *level = http_query(h, "level"), *fit = http_query(h, "fit"), *kv = http_query(h, "kv");
    Wanted w = {
        .name = name, .policy = policy, .level = level, .fit = fit, .kv = kv, .text = h->body.s};
    w.n_text = h->body.n;
    w.ratio = ratio ? number_read(ratio, strlen(ratio)) : d->engine->ratio;
    if (!w.text) w.text = "";
    prepare(d, f, &w, x);
    free(ratio), free(policy), free(level), free(fit), free(kv);
}

static void prepare_json(const Door *d, Fields *f, Http *h, Errand *x) {
    Wanted w = {0};
    fields_open(f, h);
    w.name = fields_text(f, "name", NULL);
    w.policy = fields_text(f, "policy", NULL), w.level = fields_text(f, "level", NULL);
    w.fit = fields_text(f, "fit", NULL), w.kv = fields_text(f, "kv", NULL);
    w.text = fields_text(f, "text", "");
    w.n_text = strlen(w.text);
    w.ratio = fields_number(f, "ratio", 0, 1, d->engine->ratio);
    prepare(d, f, &w, x);
}

void documents_post(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Fields f = {0};
    if (door_loading(d, o)) return;
    Job *job = errand(d, o, read_document);
    if (!job) return;
    Errand *x = job->door;
    char *name = http_query(h, "name");
    if (name)
        prepare_text(d, &f, h, name, x);
    else
        prepare_json(d, &f, h, x);
    free(name);
    bool refused = fields_answer(&f, o);
    fields_close(&f);
    if (refused)
        job_free(job);
    else
        door_ask(d, job);
}

// ---- looking and ending ----

static void list_documents(Engine *e, Job *job) {
    Page page;
    if (page_open(&page)) {
        fputs("{\"object\": \"list\", \"data\": [", page.f);
        for (int i = 0; i < e->docs.n; i++) {
            fputs(i ? ", " : "", page.f);
            put_document(page.f, e->docs.doc[i]);
            putc('}', page.f);
        }
        fputs("]}\n", page.f);
    }
    page_send(&page, job->outlet, 200);
}

static Document *find(Engine *e, Job *job) {
    const Errand *x = job->door;
    Document *doc = documents_find(&e->docs, x->name);
    if (!doc) door_failed(job, 404, "there is no such document", "name", "document_not_found");
    return doc;
}

static void show_document(Engine *e, Job *job) {
    Page page;
    const Document *doc = find(e, job);
    if (!doc) return;
    if (page_open(&page)) {
        put_document(page.f, doc);
        fputs("}\n", page.f);
    }
    page_send(&page, job->outlet, 200);
}

static void put_numbers(FILE *f, const int *x, int n) {
    putc('[', f);
    for (int i = 0; i < n; i++) fprintf(f, i ? ", %d" : "%d", x[i]);
    putc(']', f);
}

// The tokens' texts: together they are the document's. One that only begins a character is empty,
// the one that completes it has it.
static void put_texts(FILE *f, const Engine *e, const Document *doc, const DocumentMap *m) {
    TokStream stream = {0};
    char text[TOK_STREAM_MAX];
    const int *ids = doc->ids.id + doc->n_prefix;
    putc('[', f);
    for (int i = 0; i < m->from + m->n; i++) {
        int n = tokenizer_stream(e->tok, &stream, ids[i], text);
        if (i < m->from) continue;
        if (i > m->from) fputs(", ", f);
        json_put_string(f, text, (size_t)n);
    }
    putc(']', f);
}

static void put_map(FILE *f, const Engine *e, const Document *doc, const DocumentMap *m) {
    int n_ctx = doc->ids.n - doc->n_prefix, n_heads = e->kv->shape.n_kv_heads;
    json_print(f, "{'object': 'document.map', 'name': %s, 'ratio': %g, 'policy': %s, ", doc->name,
               doc->ratio, doc->policy);
    json_print(f, "'n_ctx': %d, 'n_pairs': %.17g, 'n_kept': %.17g, 'n_demoted': %.17g, ", n_ctx,
               (double)n_ctx * m->n_layers * n_heads, m->n_kept, m->n_demoted);
    json_print(f, "'kv_heads': %d, 'layers': ", n_heads);
    put_numbers(f, m->layers, m->n_layers);
    fputs(", \"kept_pairs\": [", f);
    for (int l = 0; l < m->n_layers; l++) {
        if (l > 0) fputs(", ", f);
        put_numbers(f, m->pairs + l * n_heads, n_heads);
    }
    json_print(f, "], 'heads': %d, 'from': %d, 'kept': ", m->n_heads, m->from);
    put_numbers(f, m->kept, m->n);
    fputs(", \"text\": ", f);
    put_texts(f, e, doc, m);
    if (m->from + m->n < n_ctx)
        json_print(f, ", 'next': %d}\n", m->from + m->n);
    else
        fputs(", \"next\": null}\n", f);
}

static void show_map(Engine *e, Job *job) {
    char err[ERR_LEN];
    Page page;
    Errand *x = job->door;
    DocumentMap *m = &x->map;
    const Document *doc = find(e, job);
    if (!doc) return;
    int n_ctx = doc->ids.n - doc->n_prefix;
    m->from = min_int(m->from, n_ctx), m->n = min_int(m->n, n_ctx - m->from);
    if (documents_map(&e->docs, doc, m, err) != 0) {
        door_failed(job, 500, err, NULL, NULL);
    } else {
        if (page_open(&page)) put_map(page.f, e, doc, m);
        page_send(&page, job->outlet, 200);
    }
    documents_map_free(m);
}

static void remove_document(Engine *e, Job *job) {
    char err[ERR_LEN];
    Page page;
    const Errand *x = job->door;
    Document *doc = find(e, job);
    if (!doc) return;
    past_forget_base(&e->past, doc->serial);
    if (documents_remove(&e->docs, doc, err) != 0) {
        door_failed(job, 500, err, NULL, NULL);
        return;
    }
    if (page_open(&page))
        json_print(page.f, "{'object': 'document.deleted', 'name': %s, 'deleted': true}\n",
                   x->name);
    page_send(&page, job->outlet, 200);
}

// The name behind "/v1/documents/" and before `end`; "" where none stands there.
static void name_of(const Http *h, const char *end, char name[DOC_NAME + 1]) {
    static const char start[] = "/v1/documents/";
    size_t n = strlen(h->path), n_end = strlen(end), n_start = sizeof start - 1;
    n = n > n_start + n_end ? n - n_start - n_end : 0;
    snprintf(name, DOC_NAME + 1, "%.*s", n > DOC_NAME ? 0 : (int)n, n ? h->path + n_start : "");
}

static void ask_about(Door *d, Http *h, Outlet *o, void (*work)(Engine *e, Job *job)) {
    if (door_loading(d, o)) return;
    Job *job = errand(d, o, work);
    if (!job) return;
    Errand *x = job->door;
    name_of(h, "", x->name);
    door_ask(d, job);
}

// A whole number of the query.
static int query_count(Fields *f, const Http *h, const char *key, int lo, int hi, int otherwise) {
    char *text = http_query(h, key);
    double x = text ? number_read(text, strlen(text)) : otherwise;
    bool fine = !text || (x >= lo && x <= hi && x == (int)x);
    free(text);
    if (fine) return (int)x;
    fields_refuse(f, 400, key, "%s must be a whole number from %d to %d", key, lo, hi);
    return otherwise;
}

// GET /v1/documents/NAME/map?layer=&head=&from=&tokens=
static void ask_map(Door *d, Http *h, Outlet *o) {
    enum { MAP_TOKENS = 16384 };  // of an answer
    Fields f = {0};
    if (door_loading(d, o)) return;
    const KVShape *shape = &d->engine->kv->shape;
    DocumentMap m = {.layer = query_count(&f, h, "layer", 0, shape->n_layers - 1, -1),
                     .head = query_count(&f, h, "head", 0, shape->n_kv_heads - 1, -1),
                     .from = query_count(&f, h, "from", 0, MAX_PAIRS, 0),
                     .n = query_count(&f, h, "tokens", 1, MAP_TOKENS, MAP_TOKENS)};
    if (m.layer >= 0 && shape->window[m.layer] != 0)
        fields_refuse(&f, 400, "layer", "layer %d has a %s: nothing is evicted there", m.layer,
                      shape->window[m.layer] > 0 ? "window" : "state");
    if (fields_answer(&f, o)) return;
    Job *job = errand(d, o, show_map);
    if (!job) return;
    Errand *x = job->door;
    x->map = m;
    name_of(h, "/map", x->name);
    door_ask(d, job);
}

void documents_get(void *arg, Http *h, Outlet *o) {
    const char *slash = strrchr(h->path, '/');
    if (strcmp(h->path, "/v1/documents") == 0)
        ask_about(arg, h, o, list_documents);
    else if (strcmp(slash, "/map") == 0 && slash > h->path + strlen("/v1/documents"))
        ask_map(arg, h, o);
    else
        ask_about(arg, h, o, show_document);
}

void documents_delete(void *arg, Http *h, Outlet *o) { ask_about(arg, h, o, remove_document); }
