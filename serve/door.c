// door.c: how requests become prompts, and what answers are written with.
#define _POSIX_C_SOURCE 200809L
#include "serve/door.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// ---- answers ----

bool page_open(Page *p) {
    *p = (Page){0};
    p->f = open_memstream(&p->s, &p->n);
    return p->f != NULL;
}

void page_close(Page *p) {
    if (p->f) fclose(p->f);
    free(p->s);
    *p = (Page){0};
}

bool page_whole(Page *p) {
    bool ok = p->f && !ferror(p->f);
    if (p->f) ok = fclose(p->f) == 0 && ok;
    p->f = NULL;
    return ok && p->s;
}

static void send_page(Page *p, Outlet *o, int status, const char *type) {
    static const char sorry[] = "{\"error\": {\"message\": \"out of memory\"}}\n";
    bool ok = page_whole(p);
    outlet_send(o, ok ? status : 500, ok ? type : "application/json", "", ok ? p->s : sorry,
                ok ? p->n : sizeof sorry - 1);
    page_close(p);
}

void page_send(Page *p, Outlet *o, int status) { send_page(p, o, status, "application/json"); }

void page_answer(Page *p, Outlet *o) {
    page_send(p, o, 200);
    outlet_release(o);
}

void page_send_as(Page *p, Outlet *o, const char *type) { send_page(p, o, 200, type); }

void page_event(Page *p, Outlet *o) {
    if (page_whole(p)) outlet_add(o, p->s, p->n);
    page_close(p);
}

static bool is_utf8(const char *s, int n) {
    const uint8_t *p = (const uint8_t *)s, *end = p + n;
    uint32_t c;
    for (int len; p < end; p += len)
        if ((len = utf8_get(p, end, &c)) <= 0) return false;
    return true;
}

void put_token(FILE *f, const Tokenizer *tok, int id) {
    int n;
    const char *piece = tokenizer_piece(tok, id, &n);
    if (is_utf8(piece, n)) {
        json_put_string(f, piece, (size_t)n);
        return;
    }
    fputs("\"bytes:", f);
    for (int i = 0; i < n; i++) fprintf(f, "\\\\x%02x", (unsigned)(unsigned char)piece[i]);
    fputs("\"", f);
}

void put_bytes(FILE *f, const Tokenizer *tok, int id) {
    int n;
    const char *piece = tokenizer_piece(tok, id, &n);
    putc('[', f);
    for (int i = 0; i < n; i++) fprintf(f, i ? ", %u" : "%u", (unsigned)(unsigned char)piece[i]);
    putc(']', f);
}

void door_id(Door *d, char id[48], const char *start) {
    snprintf(id, 48, "%s%016llx", start, (unsigned long long)random_next(&d->random));
}

int part_prompt_tokens(const Part *p) { return p->n_base + p->prompt.n - p->n_head_skipped; }

bool door_ids(Door *d, Fields *f, const char *name, const JsonNode *list, Ids *ids) {
    int vocab = tokenizer_n_vocab(d->engine->tok);
    if (!list || list->kind != JSON_LIST)
        return fields_refuse(f, 400, name, "%s must be a list of ids", name);
    for (const JsonNode *v = list->child; v; v = v->next) {
        double x = v->kind == JSON_NUMBER ? json_number(v) : -1;
        if (!(x >= 0 && x < vocab && x == floor(x)))
            return fields_refuse(f, 400, name, "%s: ids are whole numbers from 0 to %d", name,
                                 vocab - 1);
        if (ids_push(ids, (int)x) != 0) return fields_refuse(f, 503, "", "out of memory");
    }
    return true;
}

void door_ask(Door *d, Job *job) {
    if (engine_ask(d->engine, job) == 0) return;
    serve_error(job->outlet, 503, "too many requests wait: try again", NULL, "queue_full");
    job_free(job);
}

int door_copy_prompt(Part *to, const Part *from) {
    to->n_head = from->n_head, to->n_head_prefix = from->n_head_prefix;
    for (int i = 0; i < from->prompt.n; i++)
        if (ids_push(&to->prompt, from->prompt.id[i]) != 0) return -1;
    return 0;
}

// ---- messages ----

static bool is_of(const JsonNode *part, const char *kind) {
    const JsonNode *type = part->kind == JSON_OBJECT ? json_member(part, "type") : NULL;
    return type && type->kind == JSON_STRING && strcmp(type->text, kind) == 0;
}

static bool add_part(Fields *f, Buffer *text, const JsonNode *part, const char *param) {
    const JsonNode *s = part->kind == JSON_OBJECT ? json_member(part, "text") : NULL;
    bool is_text = is_of(part, "text") || is_of(part, "input_text");
    if (!is_text || !s || s->kind != JSON_STRING)
        return fields_refuse(f, 400, param, "%s: only parts of type text are known", param);
    return buffer_add(text, s->text, (size_t)s->n) == 0 ||
           fields_refuse(f, 503, "", "out of memory");
}

// Parts of the type `passed` are passed over; NULL: none.
static char *read_content(Fields *f, const JsonNode *message, int index, const char *passed) {
    char param[64];
    Buffer text = {0};
    const JsonNode *content = json_member(message, "content");
    snprintf(param, sizeof param, "messages[%d].content", index);
    bool ok = buffer_add(&text, "", 0) == 0 || fields_refuse(f, 503, "", "out of memory");
    if (content && content->kind == JSON_STRING)
        ok = ok && buffer_add(&text, content->text, (size_t)content->n) == 0;
    else if (content && content->kind == JSON_LIST)
        for (const JsonNode *part = content->child; part && ok; part = part->next)
            ok = (passed && is_of(part, passed)) || add_part(f, &text, part, param);
    else
        ok = fields_refuse(f, 400, param, "%s must be a text or a list of text parts", param);
    if (ok) return text.s;
    free(text.s);
    return NULL;
}

char *door_content(Fields *f, const JsonNode *message, int index) {
    return read_content(f, message, index, NULL);
}

// A conversation that is being written down.
typedef struct {
    Door *d;
    Fields *f;
    Part *p;
    bool on_document;
    Buffer system;  // texts of system messages
    bool has_system;
    Talk talk;  // on a document
    int n_users, n_turns;
    bool open;  // the last turn is an answer that goes on
    const Tools *tools;
    PastCalls calls;  // of the last answer
    char **result;    // [n_results] of them, not written down yet
    int n_results;
} Chat;

static bool shows_tools(const Chat *c) { return c->tools->n > 0; }

// The system text before what follows it; with tools it stands in the first question's turn.
static int begin_chat(Chat *c) {
    if (c->n_turns++ > 0 || !c->has_system || c->on_document || shows_tools(c)) return 0;
    return tokenizer_turn(c->d->engine->tok, 's', c->system.s, true, false, &c->p->prompt);
}

// A question on a document. The document has its own beginning: a system text goes before the first
// question.
static int ask_document(Chat *c, const char *text) {
    char err[ERR_LEN];
    Buffer all = {0};
    bool first = c->n_users == 0;
    int status = 0;
    if (first && c->has_system)
        status = buffer_add(&all, c->system.s, c->system.n) || buffer_add(&all, "\n\n", 2);
    if (status == 0) status = buffer_add(&all, text, strlen(text));
    if (status == 0) status = talk_ask(&c->talk, all.s, "", &c->p->prompt, err);
    c->talk.n_turns++;
    free(all.s);
    return status;
}

// The end of a past answer, as the template has it.
static int end_turn(const Tokenizer *tok, Ids *ids) {
    const char *end = tokenizer_chat(tok)->assistant_suffix;
    return tokenizer_encode(tok, end, strlen(end), TOK_SPECIAL, ids);
}

// An answer; the last message is one that goes on.
static int add_answer(Chat *c, const char *text, bool last) {
    const Tokenizer *tok = c->d->engine->tok;
    Ids *ids = &c->p->prompt;
    int status = 0;
    c->open = last;
    if (!last && !c->on_document)
        return tokenizer_turn(tok, 'a', text, c->n_turns == 1 && !c->has_system, false, ids);
    if (!c->on_document) status = tokenizer_generation(tok, ids);
    if (status == 0) status = tokenizer_encode(tok, text, strlen(text), 0, ids);
    return status == 0 && !last ? end_turn(tok, ids) : status;
}

static int add_user(Chat *c, const char *text) {
    Part *p = c->p;
    bool begins = c->n_turns == 1 && !c->has_system, after = c->n_turns == 1 && c->has_system;
    int before = p->prompt.n, wanted = c->d->engine->compress_prompts;
    if (c->on_document) return ask_document(c, text);
    if (c->n_turns == 1 && shows_tools(c))
        return tools_begin(c->tools, c->d->engine->tok, c->has_system ? c->system.s : NULL, text,
                           &p->prompt);
    if (tokenizer_turn(c->d->engine->tok, 'u', text, begins, after, &p->prompt) != 0) return -1;
    if (c->n_users == 0 && wanted > 0) {  // which beginning is long enough to be kept
        if (before >= wanted)
            p->n_head = before;
        else if (p->prompt.n >= wanted)
            p->n_head = p->prompt.n;
    }
    return 0;
}

static bool is_role(const JsonNode *role, const char *a, const char *b) {
    return strcmp(role->text, a) == 0 || strcmp(role->text, b) == 0;
}

static bool add_system(Chat *c, const char *text, const char *param) {
    const char *refused = tokenizer_chat(c->d->engine->tok)->system_refused;
    if (c->n_turns > 0)
        return fields_refuse(c->f, 400, param, "%s: a system message stands before all others",
                             param);
    if (refused[0] && !c->on_document)
        return fields_refuse(c->f, 400, param, "the model's chat template takes no system text: %s",
                             refused);
    bool ok = (!c->has_system || buffer_add(&c->system, "\n\n", 2) == 0) &&
              buffer_add(&c->system, text, strlen(text)) == 0;
    c->has_system = true;
    return ok || fields_refuse(c->f, 503, "", "out of memory");
}

// ---- calls and results ----

static bool no_memory(Chat *c) { return fields_refuse(c->f, 503, "", "out of memory"); }

// Writes down the results that came in a row.
static bool end_results(Chat *c) {
    int n = c->n_results;
    if (n == 0) return true;
    bool ok = tools_results(c->tools, c->d->engine->tok, c->result, n, &c->p->prompt) == 0 ||
              no_memory(c);
    while (c->n_results > 0) free(c->result[--c->n_results]);
    return ok;
}

// What the function gave that was called by the answer before, under the id that `key` names.
static bool add_result(Chat *c, const JsonNode *m, const char *key, int index) {
    char param[64];
    const JsonNode *id = json_member(m, key);
    int i = 0;
    snprintf(param, sizeof param, "messages[%d].%s", index, key);
    if (!id || id->kind != JSON_STRING)
        return fields_refuse(c->f, 400, param, "%s is missing, or no string", param);
    while (i < c->calls.n && strcmp(c->calls.call[i].id, id->text) != 0) i++;
    if (i == c->calls.n)
        return fields_refuse(c->f, 400, param, "%s: the answer before has no call of this id",
                             param);
    if (c->n_results == c->calls.n)
        return fields_refuse(c->f, 400, param, "%s: there are more results than calls", param);
    // Anthropic's may have no content.
    bool empty = c->tools->anthropic && !json_member(m, "content");
    char *text = empty ? strdup("") : door_content(c->f, m, index);
    if (!text) return no_memory(c);
    c->result[c->n_results++] = text;
    return true;
}

// The calls of an answer that is in the history, with its text.
static bool add_calls(Chat *c, const char *text, const JsonNode *m, int index) {
    char param[64];
    snprintf(param, sizeof param, "messages[%d].%s", index,
             c->tools->anthropic ? "content" : "tool_calls");
    if (m->next == NULL)
        return fields_refuse(c->f, 400, param, "%s: the results of these calls are missing", param);
    if (c->n_turns == 1)
        return fields_refuse(c->f, 400, param, "%s: a question must stand before it", param);
    free(c->result);
    c->result = calloc((size_t)c->calls.n, sizeof *c->result);
    return (c->result &&
            tools_answer(c->tools, c->d->engine->tok, text, &c->calls, &c->p->prompt) == 0) ||
           no_memory(c);
}

// Results among the parts of a user's message of Anthropic's; *texts: how many parts are others.
static bool add_results(Chat *c, const JsonNode *m, int index, int *texts) {
    const JsonNode *content = json_member(m, "content");
    *texts = 1;
    if (!c->tools->anthropic || !content || content->kind != JSON_LIST) return true;
    bool ok = true;
    *texts = content->n;
    for (const JsonNode *part = content->child; part && ok; part = part->next) {
        if (!is_of(part, "tool_result")) continue;
        ok = add_result(c, part, "tool_use_id", index);
        --*texts;
    }
    if (*texts == content->n) *texts = 1;
    return ok;
}

// A message without its calls and results, which have been read.
static char *text_of(Chat *c, const JsonNode *m, int index, bool user) {
    if (c->calls.n > 0 && !json_member(m, "content")) return strdup("");
    const char *passed = !c->tools->anthropic ? NULL : user ? "tool_result" : "tool_use";
    return read_content(c->f, m, index, passed);
}

// ---- one message after the other ----

// Of a system, a user or an assistant.
static bool add_turn(Chat *c, const JsonNode *m, int index, const char *param) {
    const JsonNode *role = json_member(m, "role");
    bool system = is_role(role, "system", "developer"), user = is_role(role, "user", "user"), ok;
    char *text = text_of(c, m, index, user);
    if (!text) return c->f->status ? false : no_memory(c);
    if (system)
        ok = add_system(c, text, param);
    else if (c->n_turns == 0 && shows_tools(c) && !user)
        ok = fields_refuse(c->f, 400, param, "%s: with tools a user has the first word", param);
    else if (begin_chat(c) != 0)
        ok = no_memory(c);
    else if (c->calls.n > 0 && !user)
        ok = add_calls(c, text, m, index);
    else
        ok = (user ? add_user(c, text) : add_answer(c, text, m->next == NULL)) == 0 || no_memory(c);
    c->n_users += user;
    free(text);
    return ok;
}

static bool add_message(Chat *c, const JsonNode *m, int index) {
    char param[64];
    int texts = 1;
    const JsonNode *role = m->kind == JSON_OBJECT ? json_member(m, "role") : NULL;
    snprintf(param, sizeof param, "messages[%d].role", index);
    if (!role || role->kind != JSON_STRING)
        return fields_refuse(c->f, 400, param, "%s is missing, or no string", param);
    if (is_role(role, "tool", "tool") && !c->tools->anthropic)
        return add_result(c, m, "tool_call_id", index);
    bool system = is_role(role, "system", "developer"), user = is_role(role, "user", "user");
    if (!system && !user && !is_role(role, "assistant", "assistant"))
        return fields_refuse(c->f, 400, param,
                             "%s: there are system, developer, user, assistant, tool", param);
    if (user && !add_results(c, m, index, &texts)) return false;
    if (!end_results(c)) return false;
    if (texts == 0) return true;
    tools_forget(&c->calls);
    if (!user && !system && !tools_past(c->tools, c->f, m, index, &c->calls)) return false;
    if (c->calls.n > 0 && c->on_document)
        return fields_refuse(c->f, 501, param, "%s: calls about a document are not supported",
                             param);
    return add_turn(c, m, index, param);
}

// How many ids of the head stand before its text, whatever it says: they are never evicted.
static int head_prefix(const Chat *c) {
    Ids a = {0}, b = {0};
    const Tokenizer *tok = c->d->engine->tok;
    int n = 0, status = 0;
    bool of_system = c->has_system;
    for (int i = 0; i < 2 && status == 0; i++)
        status =
            tokenizer_turn(tok, of_system ? 's' : 'u', i ? "1" : "a", true, false, i ? &b : &a);
    while (status == 0 && n < a.n && n < b.n && a.id[n] == b.id[n]) n++;
    ids_free(&a), ids_free(&b);
    return max_int(n, min_int(4, c->p->n_head));
}

// What can be told before the first message.
static bool check_chat(const Chat *c, const JsonNode *list) {
    Fields *f = c->f;
    if (f->status) return false;
    if (!list || list->kind != JSON_LIST || list->n == 0)
        return fields_refuse(f, 400, "messages", "messages must be a list of at least one message");
    if (!c->on_document && !tokenizer_chat(c->d->engine->tok)->present)
        return fields_refuse(
            f, 400, "messages",
            "this model has no chat template: ask /v1/completions, or about a document");
    return !c->on_document || !shows_tools(c) ||
           fields_refuse(f, 501, "tools", "tools beside a document are not supported");
}

// What follows the last message.
static bool end_chat(Chat *c) {
    Ids *ids = &c->p->prompt;
    const Tokenizer *tok = c->d->engine->tok;
    if (!end_results(c)) return false;
    if (shows_tools(c) && c->n_users == 0)
        return fields_refuse(c->f, 400, "messages", "messages has no question that tools are for");
    if (c->n_users == 0 && c->has_system && begin_chat(c) != 0) return no_memory(c);
    if (c->on_document && c->n_users == 0)
        return fields_refuse(c->f, 400, "messages", "messages has no question about the document");
    if (c->on_document) return true;
    if (c->open && c->tools->must)
        return fields_refuse(c->f, 400, "tool_choice",
                             "tool_choice asks for a call, but the last message goes on");
    if (!c->open && tokenizer_generation(tok, ids) != 0) return no_memory(c);
    return !c->tools->must || tools_invite(c->tools, tok, ids) == 0 || no_memory(c);
}

void door_messages(Door *d, Fields *f, const ChatWith *with, Part *p) {
    Chat c = {.d = d, .f = f, .p = p, .on_document = with->on_document, .tools = with->tools};
    const JsonNode *list = fields_get(f, "messages");
    int index = 0;
    c.talk = (Talk){.tok = d->engine->tok, .on_context = true};
    bool ok = check_chat(&c, list);
    if (ok && with->system) ok = add_system(&c, with->system, "system");
    for (const JsonNode *m = ok ? list->child : NULL; m && ok; m = m->next)
        ok = add_message(&c, m, index++);
    if (ok) end_chat(&c);
    if (p->n_head > 0) p->n_head_prefix = head_prefix(&c);
    while (c.n_results > 0) free(c.result[--c.n_results]);
    free(c.result);
    tools_forget(&c.calls);
    talk_free(&c.talk);
    free(c.system.s);
}
