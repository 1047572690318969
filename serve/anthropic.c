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
    int block;  // of the content, which comes next or is being told
    bool open;  // its text is being told
    Callable calls;
    char names[];
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
               : p->n_calls   ? "tool_use"
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

// "id": .., "name": .. of the last call of a part.
static void put_call(FILE *f, const Wrap *w, const Part *p, const Found *call) {
    fprintf(f, "\"id\": \"toolu_%s_%d\", ", w->id + strlen("msg_"), p->n_calls - 1);
    json_print(f, "'name': %s", call->name);
}

static void open_text(FILE *f, Wrap *w) {
    json_print(f,
               "event: content_block_start\ndata: {'type': 'content_block_start', 'index': %d, "
               "'content_block': {'type': 'text', 'text': ''}}\n\n",
               w->block);
    w->open = true;
}

static void end_block(FILE *f, Wrap *w) {
    json_print(f,
               "event: content_block_stop\ndata: {'type': 'content_block_stop', 'index': %d}\n\n",
               w->block++);
    w->open = false;
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
    fputs("}}\n\n", page.f);
    if (!w->calls.form) open_text(page.f, w);
    json_print(page.f, "event: ping\ndata: {'type': 'ping'}\n\n");
    page_event(&page, job->outlet);
}

static void tell_text(FILE *f, Wrap *w, const Part *p, size_t from, size_t to) {
    if (!w->open) open_text(f, w);
    json_print(f,
               "event: content_block_delta\ndata: {'type': 'content_block_delta', 'index': %d, "
               "'delta': {'type': 'text_delta', 'text': ",
               w->block);
    put_text(f, p, from, to);
    fputs("}}\n\n", f);
}

static void tell_call(FILE *f, Wrap *w, const Part *p, const Found *call) {
    if (w->open) end_block(f, w);
    json_print(f,
               "event: content_block_start\ndata: {'type': 'content_block_start', 'index': %d, "
               "'content_block': {'type': 'tool_use', ",
               w->block);
    put_call(f, w, p, call);
    json_print(f,
               ", 'input': {}}}\n\nevent: content_block_delta\n"
               "data: {'type': 'content_block_delta', 'index': %d, "
               "'delta': {'type': 'input_json_delta', 'partial_json': %s}}\n\n",
               w->block, call->arguments);
    end_block(f, w);
}

static void tell_calls(Page *page, Wrap *w, Part *p) {
    Found found;
    while (tools_next(&w->calls, p, &found)) {
        if (found.name)
            tell_call(page->f, w, p, &found);
        else
            tell_text(page->f, w, p, found.from, found.to);
        found_free(&found);
    }
    if (p->n_calls == w->calls.most && !p->ended) part_end(p);
}

static void told(Job *job, Part *p) {
    Page page;
    Wrap *w = job->door;
    size_t n = part_visible(p);
    if (!w->stream) {
        tools_enough(&w->calls, p);
        return;
    }
    begin_stream(job, p);
    p->told = true;
    if ((n <= p->n_told && !p->ended) || !page_open(&page)) return;
    if (w->calls.form)
        tell_calls(&page, w, p);
    else if (n > p->n_told)
        tell_text(page.f, w, p, p->n_told, n), p->n_told = n;
    page_event(&page, job->outlet);
}

// The blocks of a whole answer.
static void put_blocks(FILE *f, const Wrap *w, Part *p) {
    Found found;
    int n = 0;
    while (w->calls.form && tools_next(&w->calls, p, &found)) {
        fputs(n++ ? ", " : "", f);
        if (found.name) {
            fputs("{\"type\": \"tool_use\", ", f);
            put_call(f, w, p, &found);
            fprintf(f, ", \"input\": %s}", found.arguments);
        } else {
            fputs("{\"type\": \"text\", \"text\": ", f);
            put_text(f, p, found.from, found.to);
            fputs("}", f);
        }
        found_free(&found);
    }
    if (n > 0) return;
    fputs("{\"type\": \"text\", \"text\": ", f);
    put_text(f, p, 0, w->calls.form ? 0 : part_visible(p));
    fputs("}", f);
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
    Wrap *w = job->door;
    Part *p = &job->parts[0];
    bool ok = page_open(&page);
    if (ok && !w->stream) {
        put_start(page.f, w);
        put_blocks(page.f, w, p);
        fputs("], ", page.f);
        put_reason(page.f, p);
        fputs(", ", page.f);
        put_usage(page.f, p, p->reply.ids.n);
        fputs("}\n", page.f);
    } else if (ok) {
        if (!w->open && w->block == 0) open_text(page.f, w);
        if (w->open) end_block(page.f, w);
        json_print(page.f, "event: message_delta\ndata: {'type': 'message_delta', 'delta': {");
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
    Tools tools;
    if (door_loading(d, o)) return;
    fields_open(&f, h);
    tools_read(&tools, &f, d->engine->tok, true);
    Job *job = f.status ? NULL : job_new(o, 1);
    Wrap *w = job ? calloc(1, sizeof *w + tools_names_bytes(&tools)) : NULL;
    if (!f.status && !w) fields_refuse(&f, 503, "", "out of memory");
    if (w) {
        w->d = d;
        w->calls = tools_callable(&tools, w->names);
        door_id(d, w->id, "msg_");
        job->door = w;
        job->told = told, job->waits = waits, job->done = done, job->failed = failed;
        w->stream = fields_bool(&f, "stream", false);
        job->limit = (int)fields_count(&f, "max_tokens", 1, 1 << 28, 0);
        if (job->limit == 0) fields_refuse(&f, 400, "max_tokens", "max_tokens is missing");
        door_sampling(d, &f, "stop_sequences", job);
        door_call_form(d, &f, &tools, job);
        char *system = read_system(&f);
        door_messages(d, &f, &(ChatWith){system, job->document != NULL, &tools}, &job->parts[0]);
        free(system);
    }
    tools_close(&tools);
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
    Tools tools;
    if (door_loading(d, o)) return;
    fields_open(&f, h);
    tools_read(&tools, &f, d->engine->tok, true);
    char *system = read_system(&f);
    door_messages(d, &f, &(ChatWith){system, false, &tools}, &part);
    free(system);
    tools_close(&tools);
    if (!refused(&f, o)) {
        if (page_open(&page)) json_print(page.f, "{'input_tokens': %d}\n", part.prompt.n);
        page_answer(&page, o);
    }
    fields_close(&f);
    ids_free(&part.prompt);
}
