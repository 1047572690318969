// routes.c: which function answers which request, and the small ones: health, models, tokens,
// figures.
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "serve/door.h"

// ---- health and models ----

bool door_loading(Door *d, Outlet *o) {
    if (d->ready) return false;
    serve_error(o, 503, "the model is being loaded", NULL, "loading");
    return true;
}

static void get_health(void *arg, Http *h, Outlet *o) {
    static const char fine[] = "{\"status\": \"ok\"}\n";
    (void)h;
    if (door_loading(arg, o)) return;
    outlet_send(o, 200, "application/json", "", fine, sizeof fine - 1);
    outlet_release(o);
}

static void put_model(FILE *f, const Door *d) {
    const Config *c = &d->engine->model->config;
    json_print(f, "{'id': %s, 'object': 'model', 'created': %ld, 'owned_by': 'kvzip.c', ", d->id,
               d->started);
    json_print(f, "'max_model_len': %d, 'meta': {'n_vocab': %d, 'n_ctx_train': %d, 'n_embd': %d}}",
               d->engine->most_positions, c->vocab_size, c->seq_len, c->dim);
}

static void get_models(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Page page;
    const char *name = strlen(h->path) > 11 ? h->path + 11 : NULL;  // behind /v1/models/
    if (door_loading(d, o)) return;
    if (name && strcmp(name, d->id) != 0) {
        serve_error(o, 404, "there is no such model", "model", "model_not_found");
        return;
    }
    if (page_open(&page)) {
        if (!name) fputs("{\"object\": \"list\", \"data\": [", page.f);
        put_model(page.f, d);
        fputs(name ? "\n" : "]}\n", page.f);
    }
    page_answer(&page, o);
}

// ---- tokens ----

static void put_ids(FILE *f, const Ids *ids) {
    putc('[', f);
    for (int i = 0; i < ids->n; i++) fprintf(f, i ? ", %d" : "%d", ids->id[i]);
    putc(']', f);
}

static void put_pieces(FILE *f, const Tokenizer *tok, const Ids *ids) {
    putc('[', f);
    for (int i = 0; i < ids->n; i++) {
        fprintf(f, i ? ", {\"id\": %d, \"piece\": " : "{\"id\": %d, \"piece\": ", ids->id[i]);
        put_token(f, tok, ids->id[i]);
        putc('}', f);
    }
    putc(']', f);
}

// A chat's messages and tools, in OpenAI's language.
static void read_chat(Door *d, Fields *f, Part *part) {
    Tools tools;
    tools_read(&tools, f, d->engine->tok, false);
    door_messages(d, f, &(ChatWith){NULL, false, &tools}, part);
    tools_close(&tools);
}

// {content} as llama.cpp asks, {prompt} or {messages} as vLLM does, whose prompts get what the
// model's tokenizer adds.
static void post_tokenize(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Fields f;
    Part part = {0};
    Page page;
    const Tokenizer *tok = d->engine->tok;
    if (door_loading(d, o)) return;
    fields_open(&f, h);
    const char *prompt = fields_text(&f, "prompt", NULL),
               *text = fields_text(&f, "content", prompt);
    bool add = fields_bool(&f, "add_special_tokens", prompt != NULL);
    add = fields_bool(&f, "add_special", add);
    bool special = fields_bool(&f, "parse_special", true);
    bool pieces = fields_bool(&f, "with_pieces", false);
    unsigned how = (add ? TOK_BOS : 0) | (special ? TOK_SPECIAL : 0);
    if (!text && fields_get(&f, "messages"))
        read_chat(d, &f, &part);
    else if (!text)
        fields_refuse(&f, 400, "prompt", "prompt or content is missing");
    else if (tokenizer_encode(tok, text, strlen(text), how, &part.prompt) != 0)
        fields_refuse(&f, 503, "", "out of memory");
    if (!fields_answer(&f, o)) {
        if (page_open(&page)) {
            json_print(page.f, "{'count': %d, 'max_model_len': %d, 'tokens': ", part.prompt.n,
                       d->engine->most_positions);
            if (pieces)
                put_pieces(page.f, tok, &part.prompt);
            else
                put_ids(page.f, &part.prompt);
            fputs("}\n", page.f);
        }
        page_answer(&page, o);
    }
    fields_close(&f);
    ids_free(&part.prompt);
}

static void post_detokenize(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Fields f;
    Ids ids = {0};
    Page page;
    if (door_loading(d, o)) return;
    fields_open(&f, h);
    door_ids(d, &f, "tokens", fields_get(&f, "tokens"), &ids);
    if (!fields_answer(&f, o)) {
        size_t n = 0;
        char *text = tokenizer_decode(d->engine->tok, ids.id, ids.n, &n);
        if (text && page_open(&page)) {
            fputs("{\"content\": ", page.f), json_put_string(page.f, text, n);
            fputs(", \"prompt\": ", page.f), json_put_string(page.f, text, n);
            fputs("}\n", page.f);
        }
        page_answer(&page, o);
        free(text);
    }
    fields_close(&f);
    ids_free(&ids);
}

// The text of a token, or null where id is -1.
static void put_token_or_null(FILE *f, const Tokenizer *tok, int id) {
    if (id < 0)
        fputs("null", f);
    else
        put_token(f, tok, id);
}

static void get_tokenizer_info(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Page page;
    Ids begin = {0};
    (void)h;
    if (door_loading(d, o)) return;
    const Tokenizer *tok = d->engine->tok;
    int stop = 0, n = tokenizer_n_vocab(tok);
    while (stop < n && !tokenizer_is_stop(tok, stop)) stop++;
    if (tokenizer_encode(tok, "", 0, TOK_BOS, &begin) != 0) begin.n = 0;
    if (page_open(&page)) {
        fputs("{\"bos_token\": ", page.f);
        put_token_or_null(page.f, tok, begin.n > 0 ? begin.id[0] : -1);
        fputs(", \"eos_token\": ", page.f);
        put_token_or_null(page.f, tok, stop < n ? stop : -1);
        json_print(page.f, ", 'pad_token': null, 'chat_template': null, 'vocab_size': %d, ", n);
        json_print(page.f, "'model_max_length': %d}\n", d->engine->most_positions);
    }
    page_answer(&page, o);
    ids_free(&begin);
}

// What a chat becomes, with special tokens as their texts.
static void post_template(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Fields f;
    Part part = {0};
    Page page;
    if (door_loading(d, o)) return;
    fields_open(&f, h);
    read_chat(d, &f, &part);
    if (!fields_answer(&f, o)) {
        Buffer text = {0};
        for (int i = 0; i < part.prompt.n; i++) {
            int n;
            const char *piece = tokenizer_piece(d->engine->tok, part.prompt.id[i], &n);
            if (buffer_add(&text, piece, (size_t)n) != 0) break;
        }
        if (page_open(&page)) {
            fputs("{\"prompt\": ", page.f);
            json_put_string(page.f, text.s ? text.s : "", text.n);
            fputs("}\n", page.f);
        }
        page_answer(&page, o);
        free(text.s);
    }
    fields_close(&f);
    ids_free(&part.prompt);
}

// ---- figures ----

static void get_slots(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Page page;
    SlotView slots[64];
    (void)h;
    if (door_loading(d, o)) return;
    engine_slots(d->engine, slots);
    if (page_open(&page)) {
        for (int i = 0; i < d->engine->n_slots; i++) {
            const SlotView *s = &slots[i];
            json_print(page.f, i ? ", {'id': %d, 'n_ctx': %d, " : "[{'id': %d, 'n_ctx': %d, ", i,
                       d->engine->most_positions);
            fputs(s->busy ? "\"is_processing\": true, " : "\"is_processing\": false, ", page.f);
            json_print(page.f, "'state': %s, 'n_prompt': %d, 'n_past': %d, ",
                       !s->busy     ? "idle"
                       : s->reading ? "reading"
                                    : "writing",
                       s->n_prompt, s->n_fed);
            json_print(page.f, "'n_decoded': %d, 'n_limit': %d}", s->n_written, s->limit);
        }
        fputs("]\n", page.f);
    }
    page_answer(&page, o);
}

static void get_props(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Page page;
    (void)h;
    if (door_loading(d, o)) return;
    const Engine *e = d->engine;
    char kv[KV_NAME];
    if (page_open(&page)) {
        json_print(page.f, "{'default_generation_settings': {'n_ctx': %d, 'params': {",
                   e->most_positions);
        json_print(page.f, "'temperature': %g, 'top_p': %g, 'n_predict': %d}}, ", d->temp, d->top_p,
                   d->limit);
        json_print(page.f, "'total_slots': %d, 'model_alias': %s, 'model_name': %s, ", e->n_slots,
                   d->id, e->model->name);
        json_print(page.f, "'chat_template': %s, 'kv': %s, 'ratio': %g, 'policy': %s, ",
                   tokenizer_chat(e->tok)->present ? "built in" : "",
                   kvcache_types_name(e->kv->types, kv), e->ratio, e->method.policy->name);
        json_print(page.f, "'level': %s, 'fit': %s, 'cache_limit': %zu, 'connections': %d, ",
                   e->method.level->name, fit_kind_name(e->fit), e->most_bytes,
                   serve_connections(d->server));
        fputs("\"policies\": [", page.f);
        for (const Policy *p = policies; p->name; p++)
            json_print(page.f, p > policies ? ", %s" : "%s", p->name);
        fputs("], \"levels\": [", page.f);
        for (const Level *l = levels; l->name; l++)
            json_print(page.f, l > levels ? ", %s" : "%s", l->name);
        fputs("]}\n", page.f);
    }
    page_answer(&page, o);
}

static void put_figure(FILE *f, const char *name, const char *type, double value) {
    fprintf(f, "# TYPE llamacpp:%s %s\nllamacpp:%s %.17g\n", name, type, name, value);
}

// As Prometheus reads it, under the names that llama.cpp's dashboards know.
static void get_metrics(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Page page;
    (void)h;
    if (door_loading(d, o)) return;
    EngineCounts c = engine_counts(d->engine);
    if (!page_open(&page)) {
        serve_error(o, 503, "out of memory", NULL, NULL);
        return;
    }
    FILE *f = page.f;
    put_figure(f, "prompt_tokens_total", "counter", (double)c.prompt_tokens);
    put_figure(f, "prompt_seconds_total", "counter", c.prompt_s);
    put_figure(f, "tokens_predicted_total", "counter", (double)c.predicted_tokens);
    put_figure(f, "tokens_predicted_seconds_total", "counter", c.predicted_s);
    put_figure(f, "n_decode_total", "counter", (double)c.decodes);
    put_figure(f, "prompt_tokens_seconds", "gauge",
               c.prompt_s > 0 ? (double)c.prompt_tokens / c.prompt_s : 0);
    put_figure(f, "predicted_tokens_seconds", "gauge",
               c.predicted_s > 0 ? (double)c.predicted_tokens / c.predicted_s : 0);
    put_figure(f, "requests_processing", "gauge", c.processing);
    put_figure(f, "requests_deferred", "gauge", c.deferred);
    put_figure(f, "requests_total", "counter", (double)c.requests);
    put_figure(f, "cached_tokens_total", "counter", (double)c.cached_tokens);
    put_figure(f, "documents", "gauge", c.n_documents);
    put_figure(f, "documents_read_total", "counter", (double)c.documents_read);
    put_figure(f, "document_bytes", "gauge", (double)c.document_bytes);
    put_figure(f, "document_full_bytes", "gauge", (double)c.document_full_bytes);
    page_send_as(&page, o, "text/plain; version=0.0.4");
    outlet_release(o);
}

// ---- routes ----

const char *const door_open[] = {"/", "/health", NULL};

const Route door_routes[] = {{"GET", "/", page_get},
                             {"GET", "/health", get_health},
                             {"GET", "/v1/health", get_health},
                             {"GET", "/v1/models", get_models},
                             {"GET", "/v1/models/", get_models},
                             {"POST", "/v1/chat/completions", openai_chat},
                             {"POST", "/chat/completions", openai_chat},
                             {"POST", "/v1/completions", openai_completions},
                             {"POST", "/completions", openai_completions},
                             {"POST", "/v1/documents", documents_post},
                             {"GET", "/v1/documents", documents_get},
                             {"GET", "/v1/documents/", documents_get},
                             {"DELETE", "/v1/documents/", documents_delete},
                             {"POST", "/v1/messages", anthropic_messages},
                             {"POST", "/v1/messages/count_tokens", anthropic_count},
                             {"POST", "/tokenize", post_tokenize},
                             {"POST", "/v1/tokenize", post_tokenize},
                             {"POST", "/detokenize", post_detokenize},
                             {"POST", "/v1/detokenize", post_detokenize},
                             {"GET", "/tokenizer_info", get_tokenizer_info},
                             {"GET", "/v1/tokenizer_info", get_tokenizer_info},
                             {"POST", "/apply-template", post_template},
                             {"GET", "/slots", get_slots},
                             {"GET", "/props", get_props},
                             {"GET", "/metrics", get_metrics},
                             {0}};
