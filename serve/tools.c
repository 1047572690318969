// tools.c: functions that a request offers to the model: read, and written down for it.
#define _POSIX_C_SOURCE 200809L
#include "serve/tools.h"

#include <stdlib.h>
#include <string.h>

#include "schema.h"

static bool no_memory(Fields *f) { return fields_refuse(f, 503, "", "out of memory"); }

static bool is(const JsonNode *v, const char *text) {
    return v && v->kind == JSON_STRING && strcmp(v->text, text) == 0;
}

// A member of an object that is none itself; NULL when it is not there.
static const JsonNode *member(const JsonNode *v, const char *key) {
    return v && v->kind == JSON_OBJECT ? json_member(v, key) : NULL;
}

// ---- what a request offers ----

static bool is_name(const JsonNode *v) {
    static const char letters[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.";
    return v && v->kind == JSON_STRING && v->n > 0 && v->n <= TOOL_NAME &&
           strspn(v->text, letters) == (size_t)v->n;
}

static int index_of(const Tools *t, const char *name) {
    for (int i = 0; i < t->n; i++)
        if (strcmp(t->tool[i].name, name) == 0) return i;
    return -1;
}

// The function whose name, description and parameters `from` has, as OpenAI's interface writes it,
// of six nodes.
static const JsonNode *as_function(JsonNode *node, const JsonNode *from) {
    static const char *const keys[][2] = {
        {"name", "name"}, {"description", "description"}, {"input_schema", "parameters"}};
    static char kind[] = "function";
    JsonNode *top = node, *type = node + 1, *function = node + 2;
    const JsonNode **end = &function->child;
    *function = (JsonNode){.kind = JSON_OBJECT, .key = "function"};
    *type = (JsonNode){.kind = JSON_STRING, .n = 8, .key = "type", .text = kind, .next = function};
    *top = (JsonNode){.kind = JSON_OBJECT, .n = 2, .child = type};
    for (int i = 0; i < 3; i++) {
        const JsonNode *v = json_member(from, keys[i][0]);
        if (!v) continue;
        node[3 + i] = *v;
        node[3 + i].key = keys[i][1], node[3 + i].next = NULL;
        *end = &node[3 + i];
        end = &node[3 + i].next;
        function->n++;
    }
    return top;
}

static bool read_tool(Tools *t, Fields *f, const JsonNode *v, int i) {
    char param[64];
    const char *place = t->anthropic ? "" : ".function";
    const JsonNode *function = t->anthropic ? v : member(v, "function");
    const JsonNode *type = member(v, "type"), *name = member(function, "name");
    const JsonNode *text = member(function, "description");
    const JsonNode *schema = member(function, t->anthropic ? "input_schema" : "parameters");
    const JsonNode *strict = member(function, "strict");
    snprintf(param, sizeof param, "tools[%d].type", i);
    if (v->kind != JSON_OBJECT ||
        (t->anthropic ? type && !is(type, "custom") : !is(type, "function")))
        return fields_refuse(f, 400, param, "%s: there are tools of type %s alone", param,
                             t->anthropic ? "custom" : "function");
    snprintf(param, sizeof param, "tools[%d]%s.name", i, place);
    if (!is_name(name))
        return fields_refuse(f, 400, param,
                             "%s must be 1 to %d of the characters a-z, A-Z, 0-9, _, - and .",
                             param, TOOL_NAME);
    if (index_of(t, name->text) >= 0)
        return fields_refuse(f, 400, param, "%s: there are two of that name", param);
    snprintf(param, sizeof param, "tools[%d]%s.description", i, place);
    if (text && text->kind != JSON_STRING)
        return fields_refuse(f, 400, param, "%s must be a string", param);
    snprintf(param, sizeof param, "tools[%d]%s.strict", i, place);
    if (strict && strict->kind != JSON_BOOL)
        return fields_refuse(f, 400, param, "%s must be true or false", param);
    snprintf(param, sizeof param, "tools[%d]%s", i,
             t->anthropic ? ".input_schema" : ".function.parameters");
    if (schema && schema->kind != JSON_OBJECT)
        return fields_refuse(f, 400, param, "%s must be a JSON Schema, an object", param);
    const JsonNode *shown = t->anthropic ? as_function(t->own + 6 * i, v) : v;
    t->tool[t->n++] = (Tool){name->text, shown, schema};
    return true;
}

static void read_list(Tools *t, Fields *f, const JsonNode *list) {
    if (list->kind != JSON_LIST || list->n > TOOLS_MOST) {
        fields_refuse(f, 400, "tools", "tools must be a list of at most %d functions", TOOLS_MOST);
        return;
    }
    t->tool = calloc((size_t)list->n + 1, sizeof *t->tool);
    t->own = calloc((size_t)list->n * 6 + 1, sizeof *t->own);
    if (!t->tool || !t->own) {
        no_memory(f);
        return;
    }
    const JsonNode *v = list->child;
    for (int i = 0; v && read_tool(t, f, v, i); i++) v = v->next;
}

// Whether the model must call, none, or may. OpenAI: "none", "auto", "required" or {"type":
// "function", "function": {"name"}}; Anthropic: {"type": "none", "auto", "any" or "tool", "name"}.
static void read_choice(Tools *t, Fields *f, bool *none) {
    const JsonNode *v = fields_get(f, "tool_choice");
    const JsonNode *type = v && v->kind == JSON_OBJECT ? json_member(v, "type") : v;
    bool one = is(type, t->anthropic ? "tool" : "function") && type != v;
    const JsonNode *name = one ? member(t->anthropic ? v : member(v, "function"), "name") : NULL;
    t->only = -1;
    if (!v || (t->anthropic && type == v) || (!t->anthropic && type != v && !one)) type = NULL;
    *none = is(type, "none");
    t->must = one || is(type, t->anthropic ? "any" : "required");
    if (v && !*none && !t->must && !is(type, "auto"))
        fields_refuse(f, 400, "tool_choice", "tool_choice must be %s",
                      t->anthropic ? "an object of type auto, any, none, or tool with a name"
                                   : "none, auto, required, or {\"type\": \"function\", "
                                     "\"function\": {\"name\": ..}}");
    if (t->must && t->n == 0)
        fields_refuse(f, 400, "tool_choice", "tool_choice asks for a call, but there are no tools");
    if (!one || f->status) return;
    if (!name || name->kind != JSON_STRING || (t->only = index_of(t, name->text)) < 0)
        fields_refuse(f, 400, "tool_choice", "tool_choice names none of the tools");
}

static void read_several(Tools *t, Fields *f) {
    const JsonNode *choice = fields_get(f, "tool_choice");
    const JsonNode *v = t->anthropic ? member(choice, "disable_parallel_tool_use") : NULL;
    if (v && v->kind != JSON_BOOL)
        fields_refuse(f, 400, "tool_choice", "disable_parallel_tool_use must be true or false");
    t->several = t->anthropic ? !(v && v->n) : fields_bool(f, "parallel_tool_calls", true);
}

void tools_read(Tools *t, Fields *f, const Tokenizer *tok, bool anthropic) {
    const ToolForm *form = &tokenizer_chat(tok)->tools;
    const JsonNode *list = fields_get(f, "tools");
    bool none;
    *t = (Tools){.form = form->present ? form : NULL, .anthropic = anthropic};
    t->why = form->refused[0]
                 ? form->refused
                 : "its chat template has none, or it was converted before there were tools here";
    if (list) read_list(t, f, list);
    read_choice(t, f, &none);
    read_several(t, f);
    if (none) t->n = 0;
    if (t->n > 0 && !t->form)
        fields_refuse(f, 501, "tools", "the model file has no tools: %s", t->why);
    const JsonNode *format = fields_get(f, "response_format");
    if (t->n > 0 && format && !is(member(format, "type"), "text"))
        fields_refuse(f, 501, "response_format", "response_format beside tools is not supported");
}

void tools_close(Tools *t) {
    free(t->tool), free(t->own);
    *t = (Tools){0};
}

// ---- the form of a call ----

static int add(Buffer *b, const char *s) { return buffer_add(b, s, strlen(s)); }

static int add_string(Buffer *b, const char *s) { return json_dump_string(b, s, strlen(s)); }

// Parameters as a schema of their own: what "#" means in them is they.
static int add_parameters(Buffer *b, const JsonNode *v) {
    int rc = add(b, "{\"$id\":\"parameters\"");
    if (!v) return rc == 0 ? add(b, ",\"type\":\"object\",\"additionalProperties\":false}") : -1;
    if (v->n == 0) return rc == 0 ? add(b, ",\"type\":\"object\"}") : -1;
    for (const JsonNode *m = v->child; m && rc == 0; m = m->next) {
        if (strcmp(m->key, "$id") == 0) continue;
        rc = add(b, ",") || add_string(b, m->key) || add(b, ":") || json_dump(b, m, JSON_COMPACT);
    }
    return rc == 0 ? add(b, "}") : -1;
}

// Whether the parameters can be kept to; else says which, where and why.
static bool check_parameters(const Tools *t, Fields *f, int i) {
    char param[64], err[ERR_LEN];
    Buffer text = {0};
    Rules rules = {0};
    const JsonNode *v = t->tool[i].parameters;
    snprintf(param, sizeof param, "tools[%d]%s", i,
             t->anthropic ? ".input_schema" : ".function.parameters");
    if (v && v->n > 0 && !is(json_member(v, "type"), "object"))
        return fields_refuse(f, 400, param, "%s: type must be object", param);
    bool ok = add_parameters(&text, v) == 0 || no_memory(f);
    if (ok && rules_read(&rules, text.s, text.n, err) != 0)
        ok = fields_refuse(f, 400, param, "%s: %s", param, err);
    rules_free(&rules);
    free(text.s);
    return ok;
}

// {"type":"object","properties":{"name":{"const":..},"arguments":{..}},"required":[..]}
static int add_call(Buffer *b, const Tools *t, int i) {
    const ToolForm *form = t->form;
    return add(b, "{\"type\":\"object\",\"properties\":{") || add_string(b, form->call_name) ||
           add(b, ":{\"const\":") || add_string(b, t->tool[i].name) || add(b, "},") ||
           add_string(b, form->call_arguments) || add(b, ":") ||
           add_parameters(b, t->tool[i].parameters) || add(b, "},\"required\":[") ||
           add_string(b, form->call_name) || add(b, ",") || add_string(b, form->call_arguments) ||
           add(b, "]}");
}

char *tools_schema(const Tools *t, Fields *f) {
    Buffer b = {0};
    bool any = false;
    int rc = add(&b, "{\"anyOf\":[");
    for (int i = 0; i < t->n && !f->status && rc == 0; i++) {
        if (t->only >= 0 && t->only != i) continue;
        if (!check_parameters(t, f, i)) break;
        rc = (any ? add(&b, ",") : 0) || add_call(&b, t, i);
        any = true;
    }
    if (rc == 0) rc = add(&b, "]}");
    if (rc != 0) no_memory(f);
    if (!f->status) return b.s;
    free(b.s);
    return NULL;
}

// ---- conversations ----

// Parts that grow.
typedef struct {
    TextPart *part;
    int n, cap;
    bool failed;
} Parts;

static void put(Parts *p, PartKind kind, const char *s, size_t n) {
    if (p->n == p->cap) {
        int cap = 2 * p->cap + 16;
        TextPart *grown = realloc(p->part, (size_t)cap * sizeof *grown);
        if (!grown) {
            p->failed = true;
            return;
        }
        p->part = grown, p->cap = cap;
    }
    p->part[p->n++] = (TextPart){kind, s, n};
}

static void put_piece(Parts *p, const char *s) { put(p, PART_TEMPLATE, s, strlen(s)); }

static int read_parts(Parts *p, const Tokenizer *tok, bool first, Ids *ids) {
    int rc = p->failed ? -1 : tokenizer_parts(tok, p->part, p->n, first, ids);
    free(p->part);
    return rc;
}

// The tools as JSON; where each one ends in ends [n].
static int print_tools(const Tools *t, Buffer *text, size_t *ends) {
    for (int i = 0; i < t->n; i++) {
        const JsonNode *v = t->tool[i].shown;
        if (t->form->bare) v = json_member(v, "function");
        if (json_dump(text, v, t->form->indent) != 0) return -1;
        ends[i] = text->n;
    }
    return 0;
}

int tools_begin(const Tools *t, const Tokenizer *tok, const char *system, const char *question,
                Ids *ids) {
    const ToolForm *form = t->form;
    Parts p = {0};
    Buffer text = {0};
    size_t ends[TOOLS_MOST];
    p.failed = print_tools(t, &text, ends) != 0;
    put_piece(&p, system ? form->system_prefix : form->begin);
    if (system) put(&p, PART_SYSTEM, system, strlen(system)), put_piece(&p, form->system_suffix);
    for (int i = 0; i < t->n && !p.failed; i++) {
        size_t from = i ? ends[i - 1] : 0;
        if (i > 0) put_piece(&p, form->separator);
        put(&p, PART_TEXT, text.s + from, ends[i] - from);
    }
    put_piece(&p, form->end);
    put(&p, PART_MESSAGE, question, strlen(question));
    put_piece(&p, tokenizer_chat(tok)->user_suffix);
    int rc = read_parts(&p, tok, true, ids);
    free(text.s);
    return rc;
}

int tools_answer(const Tools *t, const Tokenizer *tok, const char *text, const PastCalls *calls,
                 Ids *ids) {
    const ToolForm *form = t->form;
    const ChatTemplate *chat = tokenizer_chat(tok);
    Parts p = {0};
    size_t n = strlen(text);
    if (chat->trim) text = stripped(text, n, &n);
    put_piece(&p, chat->assistant_prefix);
    if (n > 0 && form->call_text) put(&p, PART_MESSAGE, text, n), put_piece(&p, form->call_text);
    for (int i = 0; i < calls->n; i++) {
        const PastCall *c = &calls->call[i];
        if (i > 0) put_piece(&p, form->call_separator);
        put_piece(&p, form->call_begin);
        put(&p, PART_TEXT, c->name, strlen(c->name));
        put_piece(&p, form->call_middle);
        put(&p, PART_TEXT, c->arguments, strlen(c->arguments));
        put_piece(&p, form->call_end);
    }
    put_piece(&p, chat->assistant_suffix);
    return read_parts(&p, tok, false, ids);
}

int tools_results(const Tools *t, const Tokenizer *tok, char *const *text, int n, Ids *ids) {
    const ToolForm *form = t->form;
    Parts p = {0};
    Buffer json = {0};
    for (int i = 0; i < n && form->result_json && !p.failed; i++)
        p.failed = add_string(&json, text[i]) != 0 || buffer_add(&json, "", 1) != 0;
    const char *at = json.s;
    for (int i = 0; i < n && !p.failed; i++) {
        const char *s = form->result_json ? at : text[i];
        put_piece(&p, i ? form->result_separator : form->result_begin);
        put(&p, PART_TEXT, s, strlen(s));
        if (form->result_json) at += strlen(at) + 1;
    }
    put_piece(&p, form->result_end);
    int rc = read_parts(&p, tok, false, ids);
    free(json.s);
    return rc;
}

int tools_invite(const Tools *t, const Tokenizer *tok, Ids *ids) {
    const char *s = t->form->call_begin;
    TextPart part = {PART_TEMPLATE, s, strcspn(s, "{")};
    return tokenizer_parts(tok, &part, 1, false, ids);
}

// ---- calls of the history ----

// Arguments as the template prints them: of OpenAI's interface JSON in a string, of Anthropic's an
// object. NULL: noted in f.
static char *read_arguments(const Tools *t, Fields *f, const JsonNode *v, const char *param) {
    char err[ERR_LEN] = "";
    Buffer out = {0};
    char *copy = NULL;
    JsonNode *nodes = NULL;
    if (!t->anthropic && v && v->kind == JSON_STRING) {
        size_t n = (size_t)v->n, most = fields_most(v->text, n);
        copy = malloc(n + 1), nodes = malloc(most * sizeof *nodes);
        if (copy && nodes) memcpy(copy, v->text, n);
        if (!copy || !nodes)
            no_memory(f);
        else
            v = json_read(nodes, most, copy, n, err);
    }
    if (!v || v->kind != JSON_OBJECT)
        fields_refuse(f, 400, param, "%s must be %s%s%s", param,
                      t->anthropic ? "an object" : "a JSON object in a string", err[0] ? ": " : "",
                      err);
    else if (json_dump(&out, v, 0) != 0)
        no_memory(f);
    free(copy), free(nodes);
    if (!f->status) return out.s;
    free(out.s);
    return NULL;
}

static bool read_call(const Tools *t, Fields *f, const JsonNode *v, const char *place,
                      PastCall *call) {
    char param[64];
    const JsonNode *function = t->anthropic ? v : member(v, "function");
    const JsonNode *name = member(function, "name"), *id = member(v, "id");
    snprintf(param, sizeof param, "%s.id", place);
    if (!id || id->kind != JSON_STRING)
        return fields_refuse(f, 400, param, "%s is missing, or no string", param);
    snprintf(param, sizeof param, "%s.name", place);
    if (!is_name(name))
        return fields_refuse(f, 400, param, "%s is missing, or no name of a function", param);
    snprintf(param, sizeof param, "%s.%s", place, t->anthropic ? "input" : "arguments");
    const JsonNode *arguments = member(function, t->anthropic ? "input" : "arguments");
    *call = (PastCall){id->text, name->text, read_arguments(t, f, arguments, param)};
    return call->arguments != NULL;
}

bool tools_past(const Tools *t, Fields *f, const JsonNode *message, int index, PastCalls *calls) {
    char param[64], place[48];
    const char *key = t->anthropic ? "content" : "tool_calls";
    const JsonNode *list = json_member(message, key);
    *calls = (PastCalls){0};
    snprintf(param, sizeof param, "messages[%d].%s", index, key);
    if (!list || (t->anthropic && list->kind != JSON_LIST)) return true;
    if (list->kind != JSON_LIST || (!t->anthropic && list->n > TOOLS_MOST))
        return fields_refuse(f, 400, param, "%s must be a list of at most %d calls", param,
                             TOOLS_MOST);
    calls->call = calloc((size_t)list->n + 1, sizeof *calls->call);
    if (!calls->call) return no_memory(f);
    int i = 0;
    bool ok = true;
    for (const JsonNode *v = list->child; v && ok; v = v->next, i++) {
        if (t->anthropic && !is(member(v, "type"), "tool_use")) continue;
        snprintf(place, sizeof place, "messages[%d].%s[%d]", index, key, i);
        ok = read_call(t, f, v, place, &calls->call[calls->n]);
        calls->n += ok;
    }
    if (ok && calls->n > 0 && !t->form)
        ok = fields_refuse(f, 501, param, "the model file has no tools: %s", t->why);
    if (ok && calls->n > 1 && t->form->call_one)
        ok = fields_refuse(f, 400, param, "%s: the model's chat template takes one call at a time",
                           param);
    return ok;
}

void tools_forget(PastCalls *calls) {
    for (int i = 0; i < calls->n; i++) free(calls->call[i].arguments);
    free(calls->call);
    *calls = (PastCalls){0};
}
