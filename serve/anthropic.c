// anthropic.c: /v1/messages and /v1/messages/count_tokens, whole or as a stream of events.
//
// Source: the Anthropic API reference, "Messages" and "Streaming messages".
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <string.h>

#include "serve/door.h"

typedef struct {
    Door *d;
    char id[48];
    bool stream, begun;
} Wrap;

// ---- errors ----

static const char *error_type(int status) {
    return status == 404   ? "not_found_error"
           : status == 413 ? "request_too_large"
           : status == 503 ? "overloaded_error"
           : status >= 500 ? "api_error"
                           : "invalid_request_error";
}

static void put_error(FILE *f, int status, const char *message) {
    json_print(f, "{'type': 'error', 'error': {'type': %s, 'message': %s}}", error_type(status),
               message);
}

static void send_error(Outlet *o, int status, const char *message) {
    Page page;
    if (page_open(&page)) put_error(page.f, status, message);
    page_send(&page, o, status);
}

static void failed(Job *job, int status, const char *message, const char *param, const char *code) {
    Page page;
    (void)param, (void)code;
    if (!outlet_begun(job->outlet)) {
        send_error(job->outlet, status, message);
        return;
    }
    if (page_open(&page)) {
        fputs("event: error\ndata: ", page.f);
        put_error(page.f, status, message);
        fputs("\n\n", page.f);
        page_event(&page, job->outlet);
    }
    outlet_end(job->outlet);
}

// ---- answers ----

static void put_usage(FILE *f, const Part *p, int written) {
    json_print(f, "'usage': {'input_tokens': %d, 'cache_creation_input_tokens': 0, ",
               part_prompt_tokens(p) - p->n_cached);
    json_print(f, "'cache_read_input_tokens': %d, 'output_tokens': %d}", p->n_cached, written);
}

// "stop_reason": .., "stop_sequence": ..
static void put_reason(FILE *f, const Part *p) {
    const char *stop = NULL;
    bool stopped = part_stopped(p, &stop);
    json_print(f, "'stop_reason': %s, 'stop_sequence': ",
               stopped        ? "stop_sequence"
               : p->reply.cut ? "max_tokens"
                              : "end_turn");
    if (stopped)
        json_put_string(f, stop, strlen(stop));
    else
        fputs("null", f);
}

static void put_start(FILE *f, const Wrap *w) {
    json_print(f, "{'id': %s, 'type': 'message', 'role': 'assistant', 'model': %s, 'content': [",
               w->id, w->d->id);
}

static void put_text(FILE *f, const Part *p, size_t from, size_t to) {
    json_put_string(f, p->reply.text.s ? p->reply.text.s + from : "", to - from);
}

static void begin_stream(Job *job, const Part *p) {
    Page page;
    Wrap *w = job->door;
    if (!w->begun) outlet_begin(job->outlet, 200, "text/event-stream; charset=utf-8");
    w->begun = true;
    if (!p || p->told || !page_open(&page)) return;
    fputs("event: message_start\ndata: {\"type\": \"message_start\", \"message\": ", page.f);
    put_start(page.f, w);
    json_print(page.f, "], 'stop_reason': null, 'stop_sequence': null, ");
    put_usage(page.f, p, 0);
    json_print(
        page.f,
        "}}\n\nevent: content_block_start\ndata: {'type': 'content_block_start', 'index': 0, "
        "'content_block': {'type': 'text', 'text': ''}}\n\n"
        "event: ping\ndata: {'type': 'ping'}\n\n");
    page_event(&page, job->outlet);
}

static void told(Job *job, Part *p) {
    Page page;
    const Wrap *w = job->door;
    size_t n = part_visible(p);
    if (!w->stream) return;
    begin_stream(job, p);
    p->told = true;
    if (n <= p->n_told || !page_open(&page)) return;
    json_print(page.f,
               "event: content_block_delta\ndata: {'type': 'content_block_delta', 'index': 0, "
               "'delta': {'type': 'text_delta', 'text': ");
    put_text(page.f, p, p->n_told, n);
    fputs("}}\n\n", page.f);
    page_event(&page, job->outlet);
    p->n_told = n;
}

static void waits(Job *job) {
    const Wrap *w = job->door;
    static const char comment[] = ": still at it\n\n";
    if (!w->stream) return;
    begin_stream(job, NULL);
    outlet_add(job->outlet, comment, sizeof comment - 1);
}

static void done(Job *job) {
    Page page;
    const Wrap *w = job->door;
    const Part *p = &job->parts[0];
    bool ok = page_open(&page);
    if (ok && !w->stream) {
        put_start(page.f, w);
        fputs("{\"type\": \"text\", \"text\": ", page.f);
        put_text(page.f, p, 0, part_visible(p));
        fputs("}], ", page.f);
        put_reason(page.f, p);
        fputs(", ", page.f);
        put_usage(page.f, p, p->reply.ids.n);
        fputs("}\n", page.f);
    } else if (ok) {
        json_print(page.f,
                   "event: content_block_stop\ndata: {'type': 'content_block_stop', 'index': 0}\n\n"
                   "event: message_delta\ndata: {'type': 'message_delta', 'delta': {");
        put_reason(page.f, p);
        json_print(page.f, "}, 'usage': {'output_tokens': %d}}\n\n", p->reply.ids.n);
        json_print(page.f, "event: message_stop\ndata: {'type': 'message_stop'}\n\n");
    }
    if (!w->stream) {
        page_send(&page, job->outlet, 200);
        return;
    }
    page_event(&page, job->outlet);
    outlet_end(job->outlet);
}

// ---- requests ----

// The system text, a string or a list of text parts; malloc'ed, NULL where there is none.
static char *read_system(Fields *f) {
    const JsonNode *v = fields_get(f, "system");
    if (!v) return NULL;
    JsonNode content = *v, message = {.kind = JSON_OBJECT, .n = 1, .child = &content};
    content.key = "content", content.next = NULL;
    char *text = door_content(f, &message, 0);
    if (!text && f->status == 400) snprintf(f->param, sizeof f->param, "system");
    return text;
}

// Answers what is wrong: true.
static bool refused(const Fields *f, Outlet *o) {
    if (!f->status) return false;
    send_error(o, f->status, f->message);
    outlet_release(o);
    return true;
}

void anthropic_messages(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Fields f;
    if (door_loading(d, o)) return;
    fields_open(&f, h);
    Job *job = f.status ? NULL : job_new(o, 1);
    Wrap *w = job ? calloc(1, sizeof *w) : NULL;
    if (!f.status && !w) fields_refuse(&f, 503, "", "out of memory");
    if (w) {
        w->d = d;
        door_id(d, w->id, "msg_");
        job->door = w;
        job->told = told, job->waits = waits, job->done = done, job->failed = failed;
        w->stream = fields_bool(&f, "stream", false);
        job->limit = (int)fields_count(&f, "max_tokens", 1, 1 << 28, 0);
        if (job->limit == 0) fields_refuse(&f, 400, "max_tokens", "max_tokens is missing");
        door_sampling(d, &f, "stop_sequences", job);
        char *system = read_system(&f);
        door_messages(d, &f, system, job->document != NULL, &job->parts[0]);
        free(system);
    }
    bool is_refused = refused(&f, o);
    fields_close(&f);
    if (is_refused)
        job_free(job);
    else
        door_ask(d, job);
}

void anthropic_count(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Fields f;
    Part part = {0};
    Page page;
    if (door_loading(d, o)) return;
    fields_open(&f, h);
    char *system = read_system(&f);
    door_messages(d, &f, system, false, &part);
    free(system);
    if (!refused(&f, o)) {
        if (page_open(&page)) json_print(page.f, "{'input_tokens': %d}\n", part.prompt.n);
        page_answer(&page, o);
    }
    fields_close(&f);
    ids_free(&part.prompt);
}
