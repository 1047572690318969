// serve.c: the command that answers over HTTP: what the flags say becomes a server and an engine.
//
// Connections are accepted before the model is there, so that a client hears "loading" instead of
// nothing. This thread owns the model; the network has a thread of its own (serve/).
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cli/commands.h"
#include "cli/input.h"
#include "cli/memory.h"
#include "cli/output.h"
#include "cli/session.h"
#include "json.h"
#include "serve/door.h"

enum { SCORE_ROWS = 32 };  // ids of a prompt that are judged together
static const size_t BODY = (size_t)64 << 20;

// The keys of a file, one a line; the list ends with NULL.
static char **read_keys(const Options *o) {
    Buffer text = read_all(o, o->key_file);
    size_t n_lines = 1, n_keys = 0, n;
    for (size_t i = 0; i < text.n; i++) n_lines += text.s[i] == '\n';
    char **keys = allocate(n_lines + 1, sizeof *keys);
    for (const char *line = text.s; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        const char *key = stripped(line, strcspn(line, "\n"), &n);
        if (n > 0 && key[0] != '#') keys[n_keys++] = copy_text(key, n);
    }
    if (n_keys == 0) die("%s: no key in it", o->key_file);
    free(text.s);
    return keys;
}

static void free_keys(char **keys) {
    for (char **key = keys; key && *key; key++) free(*key);
    free(keys);
}

static Server *listen_to(const Options *o, Door *door, char **keys, int *port) {
    char err[ERR_LEN];
    ServeOptions options = {.host = o->host,
                            .port = (int)o->port,
                            .keys = keys,
                            .cors = o->cors,
                            .body_most = BODY,
                            .connections = 256,
                            .head_s = 10,
                            .idle_s = 60,
                            .routes = door_routes,
                            .open = door_open,
                            .arg = door};
    Server *server = serve_open(&options, port, err);
    if (!server) die("%s", err);
    door->server = server;
    if (serve_start(server, err) != 0) die("%s", err);
    if (o->json) json_print(stdout, "{'host': %s, 'port': %d}\n", o->host, *port);
    out_flush();
    if (!o->quiet) note("[http://%s:%d: loading]\n", o->host, *port);
    return server;
}

// The documents of the folder, and those of -c.
static void open_documents(const Options *o, Engine *e) {
    char err[ERR_LEN], name[DOC_NAME + 1];
    int skipped;
    e->docs = (Documents){
        .kv = e->kv, .model = e->model, .folder = o->docs, .most_bytes = (size_t)o->docs_size};
    if (documents_open(&e->docs, &skipped, err) != 0) die("%s", err);
    if (skipped > 0 && !o->quiet)
        warning("%s: %d files are no saved caches of this model", o->docs, skipped);
    for (const char *const *at = o->caches; *at; at++) {
        const char *path = strchr(*at, '=');
        size_t n = path ? (size_t)(path - *at) : 0;
        snprintf(name, sizeof name, "%.*s", (int)(n < sizeof name ? n : 0), *at);
        if (!path || !documents_name_ok(name))
            die_usage(o->command,
                      "-c %s: needs NAME=CACHE, with a name of up to %d letters, digits, "
                      "'-', '_' and '.'",
                      *at, DOC_NAME);
        if (documents_borrow(&e->docs, name, path + 1, err) != 0) die("%s: %s", path + 1, err);
        if (documents_load(&e->docs, documents_find(&e->docs, name), err) != 0)
            die("%s: %s", path + 1, err);
    }
}

// Bytes that the cache may take: of --mem, or half of what is here, what model and scratch leave.
static size_t cache_limit(const Session *s) {
    const char *who;
    double all = s->o->mem > 0 ? s->o->mem : memory_here(&who) / 2;
    double taken = (double)s->state.bytes + (s->o->mem > 0 ? (double)s->model.file.map_bytes : 0);
    if (s->o->mem > 0 && all <= taken)
        die("--mem %.0f: the model and its scratch alone take %.0f bytes", all, taken);
    return all - taken < 1e18 ? (size_t)(all - taken) : 0;
}

static void open_engine(Engine *e, Session *s, const Ids *prefix) {
    char err[ERR_LEN];
    const Options *o = s->o;
    *e = (Engine){.state = &s->state,
                  .kv = &s->kv,
                  .tok = s->tok,
                  .model = &s->model,
                  .method = chosen_method(s),
                  .ratio = o->ratio,
                  .fit = (FitKind)o->fit,
                  .draft = draft_length(o),
                  .n_slots = (int)o->slots,
                  .n_queue = (int)o->queue,
                  .most_positions = s->model.config.seq_len,
                  .most_bytes = cache_limit(s),
                  .compress_prompts = (int)o->compress_prompts,
                  .prefix = prefix};
    e->method.postfix = repeat_postfix(s);
    if (engine_open(e, err) != 0) die("%s", err);
    open_documents(o, e);
}

// The model's name without folders and ending.
static char *model_id(const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    const char *dot = strrchr(name, '.');
    return copy_text(name, dot && dot > name ? (size_t)(dot - name) : strlen(name));
}

int cmd_serve(const Options *o) {
    Session s;
    Engine e;
    Ids prefix = {0};
    int port;
    char **keys = o->key_file ? read_keys(o) : NULL;
    if (o->compress_prompts > 0 && !o->docs)
        die_usage(o->command, "--compress-prompts needs --docs, where they are kept");
    Door door = {.engine = &e,
                 .id = model_id(o->args[0]),
                 .started = (long)time(NULL),
                 .limit = o->n < 0 ? 512 : (int)o->n,
                 .temp = o->temp < 0 ? 0.7 : o->temp,
                 .top_p = o->top_p,
                 .random = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid()};
    catch_signals();
    Server *server = listen_to(o, &door, keys, &port);
    int most = (int)o->slots * (1 + draft_length(o));  // logits of a step
    open_session(&s, o, NULL, max_int(most, SCORE_ROWS));
    prefix_ids(&s, &prefix);
    open_engine(&e, &s, &prefix);
    door.ready = 1;
    if (!o->quiet) note("[http://%s:%d: ready, %d documents]\n", o->host, port, e.docs.n);
    engine_run(&e, &interrupted);
    door.ready = 0;
    engine_close(&e);
    serve_close(server);
    pieces_close(door.pieces);
    ids_free(&prefix);
    free((char *)door.id);
    free_keys(keys);
    close_session(&s);
    if (!o->quiet) note("[ended]\n");
    return 0;
}
