// openai.c: /v1/chat/completions and /v1/completions, whole or as a stream of events.
//
// Both are a job whose parts are the choices; what differs is how the prompt comes about and how a
// piece of text is wrapped. Source: the OpenAI API reference, "Chat" and "Completions".
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "serve/door.h"

// What an answer is wrapped in.
typedef struct {
    Door *d;
    char id[48];
    long created;
    bool chat, stream, usage, begun;
    int n;  // choices of each prompt
    Callable calls;
    char names[];
} Wrap;

static const Tokenizer *tok_of(const Job *job) {
    const Wrap *w = job->door;
    return w->d->engine->tok;
}

// ---- pieces ----

static void put_start(FILE *f, const Wrap *w, const char *object) {
    json_print(f, "{'id': %s, 'object': %s, 'created': %ld, 'model': %s, ", w->id, object,
               w->created, w->d->id);
    json_print(f, "'system_fingerprint': %s, 'choices': [", w->d->engine->model->fingerprint);
}

static void put_usage(FILE *f, const Job *job) {
    const Wrap *w = job->door;
    int prompt = 0, cached = 0, written = 0;
    for (int i = 0; i < job->n_parts; i++) {
        const Part *p = &job->parts[i];
        written += p->reply.ids.n;
        if (i % w->n > 0) continue;  // choices of one prompt
        prompt += part_prompt_tokens(p), cached += p->n_cached;
    }
    json_print(f, "'usage': {'prompt_tokens': %d, 'completion_tokens': %d, 'total_tokens': %d, ",
               prompt, written, prompt + written);
    json_print(f, "'prompt_tokens_details': {'cached_tokens': %d}}", cached);
}

static const char *finish_reason(const Part *p) {
    return p->reply.cut ? "length" : p->n_calls > 0 ? "tool_calls" : "stop";
}

static void put_reason(FILE *f, const Part *p, bool last) {
    json_print(f, "'finish_reason': %s", last ? finish_reason(p) : NULL);
}

static void put_text(FILE *f, const char *s, size_t n) { json_put_string(f, s ? s : "", n); }

// The part's n-th call, in a stream with its place. Ids differ between the answers of a server.
static void put_call(FILE *f, const Part *p, const Found *call) {
    const Wrap *w = p->job->door;
    int n = p->n_calls - 1;
    putc('{', f);
    if (w->stream) json_print(f, "'index': %d, ", n);
    fprintf(f, "\"id\": \"call_%s_%d_%d\", ", w->id + strlen("chatcmpl-"), p->index, n);
    json_print(f, "'type': 'function', 'function': {'name': %s, 'arguments': %s}}", call->name,
               call->arguments);
}

// The scores [from, to) as chat has them: {"content": [{token, logprob, bytes, top_logprobs}]}.
static void put_chat_scores(FILE *f, const Part *p, int from, int to) {
    const Tokenizer *tok = tok_of(p->job);
    if (p->job->n_tops < 0) {
        fputs("\"logprobs\": null, ", f);
        return;
    }
    fputs("\"logprobs\": {\"content\": [", f);
    for (int i = from; i < to; i++) {
        const TokenScore *s = &p->scores[i];
        for (int k = -1; k < p->job->n_tops; k++) {
            int id = k < 0 ? s->id : s->top[k];
            fputs(k < 0 && i == from ? "{" : k == 0 ? "{" : ", {", f);
            fputs("\"token\": ", f), put_token(f, tok, id);
            json_print(
                f, ", 'logprob': %g, 'bytes': ", (double)(k < 0 ? s->logprob : s->top_logprob[k]));
            put_bytes(f, tok, id);
            fputs(k < 0 ? ", \"top_logprobs\": [" : "}", f);
        }
        fputs("]}", f);
    }
    fputs("], \"refusal\": null}, ", f);
}

// {" token": -0.5, ...}; the token itself is among them.
static void put_tops(FILE *f, const Tokenizer *tok, const TokenScore *s, int n_tops) {
    bool has = false;
    putc('{', f);
    for (int k = 0; k < n_tops; k++) {
        fputs(k ? ", " : "", f);
        put_token(f, tok, s->top[k]);
        json_print(f, ": %g", (double)s->top_logprob[k]);
        has = has || s->top[k] == s->id;
    }
    if (!has) {
        fputs(n_tops > 0 ? ", " : "", f);
        put_token(f, tok, s->id);
        json_print(f, ": %g", (double)s->logprob);
    }
    putc('}', f);
}

// A list of something about the prompt's first id, where it is echoed, and about the scores [from,
// to).
typedef struct {
    const Part *p;
    bool first;  // the prompt's first id goes first
    int from, to;
} Scores;

static int bytes_of(const Tokenizer *tok, int id) {
    int n;
    tokenizer_piece(tok, id, &n);
    return n;
}

// {tokens, token_logprobs, top_logprobs, text_offset}, as completions have it.
static void put_scores(FILE *f, const Scores *s) {
    const Tokenizer *tok = tok_of(s->p->job);
    const TokenScore *score = s->p->scores;
    int n_tops = s->p->job->n_tops, offset = 0, all = s->to - s->from + s->first;
    if (n_tops < 0) {
        fputs("\"logprobs\": null, ", f);
        return;
    }
    fputs("\"logprobs\": {\"tokens\": [", f);
    for (int i = 0; i < all; i++) {
        fputs(i ? ", " : "", f);
        put_token(f, tok, i < s->first ? s->p->prompt.id[0] : score[s->from + i - s->first].id);
    }
    fputs("], \"token_logprobs\": [", f);
    for (int i = 0; i < all; i++) {
        double x = i < s->first ? NAN : (double)score[s->from + i - s->first].logprob;
        fputs(i ? ", " : "", f);
        json_print(f, "%g", x);  // the first one's has none: null
    }
    fputs("], \"top_logprobs\": [", f);
    for (int i = 0; i < all; i++) {
        fputs(i ? ", " : "", f);
        if (i < s->first)
            fputs("null", f);
        else
            put_tops(f, tok, &score[s->from + i - s->first], n_tops);
    }
    fputs("], \"text_offset\": [", f);
    for (int i = 0; i < all; i++) {
        int id = i < s->first ? s->p->prompt.id[0] : score[s->from + i - s->first].id;
        fprintf(f, i ? ", %d" : "%d", offset);
        offset += bytes_of(tok, id);
    }
    fputs("]}, ", f);
}

static bool echoes(const Part *p) { return p->job->echo; }

// ---- whole answers ----

// "content": .., "tool_calls": [..]; content is null where there are calls alone.
static void put_message(FILE *f, Part *p) {
    const Wrap *w = p->job->door;
    Found found;
    Buffer text = {0};
    Page calls;
    if (!page_open(&calls)) return;
    while (tools_next(&w->calls, p, &found)) {
        if (!found.name &&
            buffer_add(&text, p->reply.text.s + found.from, found.to - found.from) != 0)
            break;
        if (found.name) fputs(p->n_calls > 1 ? ", " : "", calls.f), put_call(calls.f, p, &found);
        found_free(&found);
    }
    fputs("\"content\": ", f);
    if (text.n == 0 && p->n_calls > 0)
        fputs("null", f);
    else
        put_text(f, text.s, text.n);
    if (p->n_calls > 0 && page_whole(&calls)) fprintf(f, ", \"tool_calls\": [%s]", calls.s);
    page_close(&calls);
    free(text.s);
}

static void put_choice(FILE *f, Part *p) {
    const Wrap *w = p->job->door;
    size_t n = part_visible(p), n_prompt = 0;
    json_print(f, "{'index': %d, ", p->index);
    if (w->chat) {
        fputs("\"message\": {\"role\": \"assistant\", ", f);
        if (w->calls.form)
            put_message(f, p);
        else
            fputs("\"content\": ", f), put_text(f, p->reply.text.s, n);
        fputs(", \"refusal\": null}, ", f);
        put_chat_scores(f, p, 0, p->n_scores);
    } else {
        Buffer all = {0};
        char *prompt = NULL;
        if (echoes(p))
            prompt = tokenizer_decode(tok_of(p->job), p->prompt.id, p->prompt.n, &n_prompt);
        if (prompt) buffer_add(&all, prompt, n_prompt);
        if (p->reply.text.s) buffer_add(&all, p->reply.text.s, n);
        fputs("\"text\": ", f);
        put_text(f, all.s, all.n);
        fputs(", ", f);
        put_scores(f, &(Scores){p, echoes(p), 0, p->n_scores});
        free(prompt);
        free(all.s);
    }
    put_reason(f, p, true);
    putc('}', f);
}

static void send_whole(Job *job) {
    Page page;
    const Wrap *w = job->door;
    if (page_open(&page)) {
        put_start(page.f, w, w->chat ? "chat.completion" : "text_completion");
        for (int i = 0; i < job->n_parts; i++) {
            fputs(i ? ", " : "", page.f);
            put_choice(page.f, &job->parts[i]);
        }
        fputs("], ", page.f);
        put_usage(page.f, job);
        fputs("}\n", page.f);
    }
    page_send(&page, job->outlet, 200);
}

// ---- streams ----

static const char *chunk_object(const Wrap *w) {
    return w->chat ? "chat.completion.chunk" : "text_completion";
}

static void begin_stream(Job *job) {
    Wrap *w = job->door;
    if (w->begun) return;
    w->begun = true;
    outlet_begin(job->outlet, 200, "text/event-stream; charset=utf-8");
}

// What an event brings: text [n], or a call; the scores up to n_scores; the last one says why.
typedef struct {
    const char *text;
    size_t n;
    const Found *call;
    int n_scores;
    bool last;
} Piece;

// The role comes first where the part has said nothing yet.
static void put_delta(FILE *f, const Part *p, const Piece *piece) {
    fputs("\"delta\": {", f);
    if (!p->told) fputs("\"role\": \"assistant\"", f);
    if (piece->call) {
        fputs(p->told ? "\"tool_calls\": [" : ", \"content\": null, \"tool_calls\": [", f);
        put_call(f, p, piece->call);
        putc(']', f);
    } else if (!p->told || piece->n > 0) {
        fputs(p->told ? "\"content\": " : ", \"content\": ", f);
        put_text(f, piece->text, piece->n);
    }
    fputs("}, ", f);
}

static void send_piece(Part *p, const Piece *piece) {
    Page page;
    Wrap *w = p->job->door;
    if (!page_open(&page)) return;
    FILE *f = page.f;
    fputs("data: ", f);
    put_start(f, w, chunk_object(w));
    json_print(f, "{'index': %d, ", p->index);
    if (w->chat) {
        put_delta(f, p, piece);
        put_chat_scores(f, p, p->n_told_scores, piece->n_scores);
    } else {
        fputs("\"text\": ", f);
        put_text(f, piece->text, piece->n);
        fputs(", ", f);
        put_scores(f, &(Scores){p, echoes(p) && !p->told, p->n_told_scores, piece->n_scores});
    }
    put_reason(f, p, piece->last);
    fputs(w->usage ? "}], \"usage\": null}\n\n" : "}]}\n\n", f);
    page_event(&page, p->job->outlet);
    p->told = true;
    p->n_told_scores = piece->n_scores;
}

// Calls and the text beside them.
static void tell_calls(const Wrap *w, Part *p) {
    Found found;
    while (tools_next(&w->calls, p, &found)) {
        Piece piece = {p->reply.text.s + found.from, found.to - found.from, NULL, p->n_scores,
                       false};
        if (found.name) piece.call = &found;
        send_piece(p, &piece);
        found_free(&found);
    }
    if (p->ended || !p->told) send_piece(p, &(Piece){"", 0, NULL, p->n_scores, p->ended});
    if (p->n_calls == w->calls.most && !p->ended) part_end(p);
}

static void told(Job *job, Part *p) {
    Wrap *w = job->door;
    if (!w->stream) {
        tools_enough(&w->calls, p);
        return;
    }
    size_t n = part_visible(p);
    const char *text = p->reply.text.s ? p->reply.text.s : "";
    begin_stream(job);
    if (w->calls.form) {
        tell_calls(w, p);
        return;
    }
    if (echoes(p) && !p->told) {
        size_t n_prompt = 0;
        char *prompt = tokenizer_decode(tok_of(job), p->prompt.id, p->prompt.n, &n_prompt);
        if (prompt) send_piece(p, &(Piece){prompt, n_prompt, NULL, p->prompt.n - 1, false});
        p->told = true;
        free(prompt);
    }
    if (n > p->n_told || p->ended || !p->told)
        send_piece(p, &(Piece){text + p->n_told, n - p->n_told, NULL, p->n_scores, p->ended});
    p->n_told = n;
}

static void waits(Job *job) {
    const Wrap *w = job->door;
    static const char comment[] = ": still at it\n\n";
    if (!w->stream) return;
    begin_stream(job);
    outlet_add(job->outlet, comment, sizeof comment - 1);
}

static void done(Job *job) {
    Page page;
    Wrap *w = job->door;
    if (!w->stream) {
        send_whole(job);
        return;
    }
    if (w->usage && page_open(&page)) {
        fputs("data: ", page.f);
        put_start(page.f, w, chunk_object(w));
        fputs("], ", page.f);
        put_usage(page.f, job);
        fputs("}\n\n", page.f);
        page_event(&page, job->outlet);
    }
    static const char end[] = "data: [DONE]\n\n";
    outlet_add(job->outlet, end, sizeof end - 1);
    outlet_end(job->outlet);
}

void door_failed(Job *job, int status, const char *message, const char *param, const char *code) {
    Page page;
    if (!outlet_begun(job->outlet)) {
        pthread_mutex_lock(&job->outlet->lock);
        job->outlet->holders++;  // serve_error lets go of one
        pthread_mutex_unlock(&job->outlet->lock);
        serve_error(job->outlet, status, message, param, code);
        return;
    }
    if (page_open(&page)) {
        json_print(page.f,
                   "data: {'error': {'message': %s, 'type': 'server_error', 'code': %d}}\n\n",
                   message, status);
        page_event(&page, job->outlet);
    }
    outlet_end(job->outlet);
}

// ---- requests ----

// tools NULL: answers have no calls.
static Wrap *wrap(Door *d, Job *job, const char *start, const Tools *tools) {
    Wrap *w = calloc(1, sizeof *w + (tools ? tools_names_bytes(tools) : 0));
    if (!w) return NULL;
    w->d = d;
    if (tools) w->calls = tools_callable(tools, w->names);
    w->created = (long)time(NULL);
    w->n = 1;
    door_id(d, w->id, start);
    job->door = w;
    job->told = told, job->waits = waits, job->done = done, job->failed = door_failed;
    return w;
}

// Fields that both have. n: choices of each prompt.
static void read_common(Door *d, Fields *f, Job *job, int n) {
    Wrap *w = job->door;
    const JsonNode *options = fields_get(f, "stream_options");
    const JsonNode *usage =
        options && options->kind == JSON_OBJECT ? json_member(options, "include_usage") : NULL;
    fields_text(f, "model", NULL);
    w->n = n;
    w->stream = fields_bool(f, "stream", false);
    w->usage = usage && usage->kind == JSON_BOOL && usage->n;
    door_sampling(d, f, "stop", job);
}

// An answer is written in memory: its logprobs must not be more than a client can want.
static void check_scores(Fields *f, const Job *job) {
    enum { SCORES = 1 << 21 };
    double n = 0;
    for (int i = 0; i < job->n_parts; i++)
        n += (job->echo ? job->parts[i].prompt.n : 0) + (double)job->limit;
    if (job->n_tops >= 0 && n * (job->n_tops + 1) > SCORES)
        fields_refuse(f, 400, "logprobs", "more than %d logprobs in one answer", SCORES);
}

// Answers what is wrong, or hands the job over.
static void ask(Door *d, Fields *f, Job *job, Outlet *o) {
    if (!f->status && !job) fields_refuse(f, 503, "", "out of memory");
    bool refused = fields_answer(f, o);
    fields_close(f);
    if (refused)
        job_free(job);
    else
        door_ask(d, job);
}

void openai_chat(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Fields f;
    Tools tools;
    if (door_loading(d, o)) return;
    fields_open(&f, h);
    int n = door_choices(d, &f);
    tools_read(&tools, &f, d->engine->tok, false);
    Job *job = f.status ? NULL : job_new(o, n);
    Wrap *w = job ? wrap(d, job, "chatcmpl-", &tools) : NULL;
    if (w) {
        w->chat = true;
        read_common(d, &f, job, n);
        long limit = fields_count(&f, "max_tokens", 1, 1 << 28, d->limit);
        job->limit = (int)fields_count(&f, "max_completion_tokens", 1, 1 << 28, limit);
        bool scores = fields_bool(&f, "logprobs", false);
        int n_tops = (int)fields_count(&f, "top_logprobs", 0, ENGINE_TOPS, 0);
        if (n_tops > 0 && !scores)
            fields_refuse(&f, 400, "top_logprobs", "top_logprobs needs logprobs: true");
        if (scores) job->n_tops = n_tops;
        check_scores(&f, job);
        door_call_form(d, &f, &tools, job);
        door_messages(d, &f, &(ChatWith){NULL, job->document != NULL, &tools}, &job->parts[0]);
        for (int i = 1; i < n; i++)
            if (door_copy_prompt(&job->parts[i], &job->parts[0]) != 0)
                fields_refuse(&f, 503, "", "out of memory");
    }
    tools_close(&tools);
    ask(d, &f, w ? job : NULL, o);
    if (job && !w) job_free(job);
}

// ---- completions ----

static bool read_prompt(Door *d, Fields *f, const JsonNode *v, Ids *ids) {
    if (v->kind == JSON_LIST) {
        if (!door_ids(d, f, "prompt", v, ids)) return false;
    } else if (v->kind != JSON_STRING) {
        return fields_refuse(f, 400, "prompt",
                             "prompt must be a text, a list of ids, or a list of these");
    } else if (tokenizer_encode(d->engine->tok, v->text, (size_t)v->n, TOK_BOS, ids) != 0) {
        return fields_refuse(f, 503, "", "out of memory");
    }
    return ids->n > 0 || fields_refuse(f, 400, "prompt", "prompt is empty");
}

// The first prompt of the request; *n of them, one behind the other.
static const JsonNode *prompts(Fields *f, int *n) {
    const JsonNode *v = fields_get(f, "prompt");
    *n = 1;
    if (!v) return fields_refuse(f, 400, "prompt", "prompt is missing"), NULL;
    bool several = v->kind == JSON_LIST && v->n > 0 && v->child->kind != JSON_NUMBER;
    if (!several) return v;
    *n = v->n;
    return v->child;
}

static void read_completion(Door *d, Fields *f, Job *job, const JsonNode *prompt, int n) {
    read_common(d, f, job, n);
    long limit = fields_count(f, "max_tokens", 0, 1 << 28, 16);
    job->limit = (int)fields_count(f, "max_completion_tokens", 0, 1 << 28, limit);
    const JsonNode *logprobs = fields_get(f, "logprobs");
    if (logprobs && logprobs->kind == JSON_BOOL)
        job->n_tops = logprobs->n ? 0 : -1;
    else
        job->n_tops = (int)fields_count(f, "logprobs", 0, ENGINE_TOPS, -1);
    job->echo = fields_bool(f, "echo", false);
    for (int i = 0; i < job->n_parts && !f->status; i += n, prompt = prompt->next) {
        if (!read_prompt(d, f, prompt, &job->parts[i].prompt)) break;
        for (int k = 1; k < n; k++)
            if (door_copy_prompt(&job->parts[i + k], &job->parts[i]) != 0)
                fields_refuse(f, 503, "", "out of memory");
    }
    check_scores(f, job);
}

void openai_completions(void *arg, Http *h, Outlet *o) {
    Door *d = arg;
    Fields f;
    int n_prompts;
    if (door_loading(d, o)) return;
    fields_open(&f, h);
    int n = door_choices(d, &f);
    const JsonNode *prompt = prompts(&f, &n_prompts);
    if (n_prompts * (long)n > ENGINE_PARTS)
        fields_refuse(&f, 400, "prompt", "more than %d prompts and choices", ENGINE_PARTS);
    Job *job = f.status ? NULL : job_new(o, n_prompts * n);
    Wrap *w = job ? wrap(d, job, "cmpl-", NULL) : NULL;
    if (w) read_completion(d, &f, job, prompt, n);
    ask(d, &f, w ? job : NULL, o);
    if (job && !w) job_free(job);
}
