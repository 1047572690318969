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
    page_send(&page, o, 200);
    outlet_release(o);
}

// ---- routes ----

const Route door_routes[] = {{"GET", "/health", get_health},
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
                             {0}};
