// schema.c: a JSON Schema becomes rules, or is refused by the name of what is not supported.
//
// What passes is never stricter on paper than in the answers: each keyword is either kept to the
// letter or refused. A value may be written in fewer ways than the schema allows (properties in its
// order, none that it does not name, listed values spelled one way), so all that is written is
// valid. $ref makes rules recursive; a node's height, how deep its flattest value nests, is what
// keeps an answer from entering a value that it could not leave.
#include "schema.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { ENDLESS = JSON_DEPTH + 1 };  // a height that nothing fits

typedef struct {
    Rules *rules;
    const JsonNode *top;
    Buffer path;  // of the part that is read, "/properties/a"
    char *err;
} Reader;

__attribute__((format(printf, 2, 3))) static int refuse(const Reader *r, const char *fmt, ...) {
    char what[ERR_LEN];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    return fail(r->err, "#%.200s: %s", r->path.n > 0 ? r->path.s : "", what);
}

static int no_memory(char *err) { return fail(err, "out of memory for a schema"); }

// Goes on with the part called name; returns what leave takes to come back.
static size_t enter(Reader *r, const char *name) {
    size_t n = r->path.n;
    if (buffer_add(&r->path, "/", 1) != 0 || buffer_add(&r->path, name, strlen(name)) != 0)
        r->path.n = n;  // only messages suffer
    return n;
}

static void leave(Reader *r, size_t n) {
    r->path.n = n;
    if (r->path.s) r->path.s[n] = '\0';
}

// ---- rules that grow ----

// Returns the new node's index, or -1 with err.
static int add_node(Reader *r, Node node) {
    Rules *u = r->rules;
    if (u->n == MAX_NODES) return refuse(r, "the schema has more than %d parts", MAX_NODES);
    if (u->n == u->cap) {
        int cap = 2 * u->cap + 16;
        Node *grown = realloc(u->node, (size_t)cap * sizeof *grown);
        if (!grown) return no_memory(r->err);
        u->node = grown, u->cap = cap;
    }
    node.height = ENDLESS;
    u->node[u->n] = node;
    return u->n++;
}

// Room for n members, all zero; returns the first one's index, or -1 with err.
static int add_members(Reader *r, int n) {
    Rules *u = r->rules;
    if (u->cap_members - u->n_members < n) {
        int cap = 2 * u->cap_members + n;
        Member *grown = realloc(u->member, (size_t)cap * sizeof *grown);
        if (!grown) return no_memory(r->err);
        u->member = grown, u->cap_members = cap;
    }
    memset(u->member + u->n_members, 0, (size_t)n * sizeof *u->member);
    u->n_members += n;
    return u->n_members - n;
}

// Member i's text begins at byte `at` and is complete, unless rc says that memory is out.
static int set_text(Reader *r, int i, size_t at, int rc) {
    if (rc != 0) return no_memory(r->err);
    r->rules->member[i].at = at, r->rules->member[i].length = (int)(r->rules->text.n - at);
    return 0;
}

// ---- keywords ----

// What a keyword says something about; a schema has one of ABOUT_* at most, besides notes.
enum { NOTE, ABOUT_TYPE, ABOUT_OBJECTS, ABOUT_ARRAYS, ABOUT_STRINGS, LISTS, ALTERNATES, REFERS };

static int about(const char *key) {
    static const struct {
        const char *name;
        int about;
    } known[] = {{"type", ABOUT_TYPE},
                 {"properties", ABOUT_OBJECTS},
                 {"required", ABOUT_OBJECTS},
                 {"additionalProperties", ABOUT_OBJECTS},
                 {"items", ABOUT_ARRAYS},
                 {"minItems", ABOUT_ARRAYS},
                 {"maxItems", ABOUT_ARRAYS},
                 {"minLength", ABOUT_STRINGS},
                 {"maxLength", ABOUT_STRINGS},
                 {"enum", LISTS},
                 {"const", LISTS},
                 {"anyOf", ALTERNATES},
                 {"$ref", REFERS},
                 {"$defs", NOTE},
                 {"definitions", NOTE},
                 {"title", NOTE},
                 {"description", NOTE},
                 {"default", NOTE},
                 {"examples", NOTE},
                 {"$schema", NOTE},
                 {"$id", NOTE},
                 {"$comment", NOTE},
                 {"deprecated", NOTE},
                 {"readOnly", NOTE},
                 {"writeOnly", NOTE}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(known[i].name, key) == 0) return known[i].about;
    return -1;
}

// The member of that name, null or not; NULL when there is none.
static const JsonNode *find(const JsonNode *object, const char *key) {
    for (const JsonNode *m = object->child; m; m = m->next)
        if (strcmp(m->key, key) == 0) return m;
    return NULL;
}

static int check_once(const Reader *r, const JsonNode *object) {
    if (object->n > 2 * MAX_ALTERNATIVES) return refuse(r, "%d names are too many", object->n);
    for (const JsonNode *m = object->child; m; m = m->next)
        if (find(object, m->key) != m) return refuse(r, "\"%.100s\" is given twice", m->key);
    return 0;
}

// Which keywords the schema has, a bit for each about(); -1 with err where one is not supported or
// two do not go together.
static int keywords(const Reader *r, const JsonNode *v) {
    int has = 0;
    const char *alone = NULL, *other = NULL;
    if (check_once(r, v) != 0) return -1;
    for (const JsonNode *m = v->child; m; m = m->next) {
        int what = about(m->key);
        if (what < 0) return refuse(r, "\"%.100s\" is not supported", m->key);
        if (what == NOTE) continue;
        if (what >= LISTS && !alone)
            alone = m->key;
        else
            other = !other || what != ABOUT_TYPE ? m->key : other;
        has |= 1 << what;
    }
    bool typed = has == (1 << LISTS | 1 << ABOUT_TYPE);
    if (alone && other && !(typed && strcmp(other, "type") == 0))
        return refuse(r, "\"%s\" beside \"%s\" is not supported", other, alone);
    return has;
}

static int count_of(const Reader *r, const JsonNode *v, const char *key, int none, int *out) {
    size_t n;
    const JsonNode *m = find(v, key);
    *out = none;
    if (!m) return 0;
    if (json_size(m, &n) != 0 || n > INT_MAX / 2)
        return refuse(r, "\"%s\" needs a whole number", key);
    *out = (int)n;
    return 0;
}

// "minItems" and "maxItems", say, into min and max.
static int limits_of(const Reader *r, const JsonNode *v, const char *least, const char *most,
                     Node *node) {
    if (count_of(r, v, least, 0, &node->min) != 0 || count_of(r, v, most, -1, &node->max) != 0)
        return -1;
    if (node->max >= 0 && node->max < node->min)
        return refuse(r, "\"%s\" %d is more than \"%s\" %d", least, node->min, most, node->max);
    return 0;
}

// ---- schemas ----

static const char *const types[] = {"object",  "array", "string", "number",
                                    "boolean", "null",  "integer"};  // in the order of ANY_OBJECT
enum { N_TYPES = sizeof types / sizeof *types };

static int read_schema(Reader *r, const JsonNode *v);

// The schema that v has as `key`; what is not there allows anything.
static int read_part(Reader *r, const JsonNode *v, const char *key) {
    const JsonNode *part = find(v, key);
    if (!part) return ANYTHING;
    size_t n = enter(r, key);
    int node = read_schema(r, part);
    if (node >= 0) leave(r, n);
    return node;
}

static int read_required(Reader *r, const JsonNode *v, const Node *object) {
    const JsonNode *list = find(v, "required");
    if (list && list->kind != JSON_LIST) return refuse(r, "\"required\" is not a list of names");
    for (const JsonNode *name = list ? list->child : NULL; name; name = name->next) {
        const JsonNode *property = find(v, "properties") ? find(v, "properties")->child : NULL;
        if (name->kind != JSON_STRING) return refuse(r, "\"required\" is not a list of names");
        int i = object->first;
        for (; property && strcmp(property->key, name->text) != 0; property = property->next) i++;
        if (!property)
            return refuse(r, "\"required\" names \"%.100s\", which \"properties\" lacks",
                          name->text);
        r->rules->member[i].required = true;
    }
    return 0;
}

static int read_object(Reader *r, const JsonNode *v) {
    const JsonNode *properties = find(v, "properties"), *extra = find(v, "additionalProperties");
    bool closed = extra && extra->kind == JSON_BOOL && extra->n == 0;
    Node node = {.kind = OBJECT, .n = properties ? properties->n : 0};
    if (properties && properties->kind != JSON_OBJECT)
        return refuse(r, "\"properties\" is not an object");
    if (node.n > MAX_ALTERNATIVES)
        return refuse(r, "%d properties, %d are the most", node.n, MAX_ALTERNATIVES);
    if (node.n > 0 && extra && extra->kind == JSON_OBJECT)
        return refuse(r,
                      "\"additionalProperties\" as a schema beside \"properties\" is not "
                      "supported");
    if (node.n == 0 && !closed) {
        node.kind = MAP;
        node.child = read_part(r, v, "additionalProperties");
        return node.child < 0 || read_required(r, v, &node) != 0 ? -1 : add_node(r, node);
    }
    if ((node.first = add_members(r, node.n)) < 0) return -1;
    size_t n = enter(r, "properties");
    if (properties && check_once(r, properties) != 0) return -1;
    const JsonNode *p = properties ? properties->child : NULL;
    for (int i = node.first; p; p = p->next, i++) {
        size_t inside = enter(r, p->key);
        int value = read_schema(r, p);
        if (value < 0) return -1;
        size_t at = r->rules->text.n;
        int rc = json_dump_string(&r->rules->text, p->key, strlen(p->key));
        if (set_text(r, i, at, rc) != 0) return -1;
        r->rules->member[i].node = value;
        leave(r, inside);
    }
    leave(r, n);
    return read_required(r, v, &node) == 0 ? add_node(r, node) : -1;
}

static int read_array(Reader *r, const JsonNode *v) {
    Node node = {.kind = ARRAY};
    if (limits_of(r, v, "minItems", "maxItems", &node) != 0) return -1;
    return (node.child = read_part(r, v, "items")) < 0 ? -1 : add_node(r, node);
}

// Values of one type, or an alternative of several.
static int read_type(Reader *r, const JsonNode *v, const char *type) {
    Node text = {.kind = STRING};
    int i = 0;
    while (i < N_TYPES && strcmp(types[i], type) != 0) i++;
    if (i == N_TYPES) return refuse(r, "there is no type \"%.100s\"", type);
    if (i == 0) return read_object(r, v);
    if (i == 1) return read_array(r, v);
    if (i > 2) return ANY_OBJECT + i;
    return limits_of(r, v, "minLength", "maxLength", &text) == 0 ? add_node(r, text) : -1;
}

static int read_types(Reader *r, const JsonNode *v, const JsonNode *type) {
    if (type->kind == JSON_STRING) return read_type(r, v, type->text);
    Node node = {.kind = EITHER, .n = type->n};
    if (type->kind != JSON_LIST || type->n == 0 || type->n > N_TYPES)
        return refuse(r, "\"type\" is not a name or a list of names");
    if ((node.first = add_members(r, node.n)) < 0) return -1;
    int i = node.first;
    for (const JsonNode *t = type->child; t; t = t->next, i++) {
        if (t->kind != JSON_STRING) return refuse(r, "\"type\" is not a list of names");
        int one = read_type(r, v, t->text);
        if (one < 0) return -1;
        r->rules->member[i].node = one;
    }
    return add_node(r, node);
}

static bool has_type(const JsonNode *v, const char *type) {
    static const char *const names[] = {"null", "boolean", "number", "string", "array", "object"};
    if (v->kind == JSON_NUMBER && strcmp(type, "integer") == 0)
        return json_number(v) == floor(json_number(v));
    return strcmp(names[v->kind], type) == 0;
}

// Whether v is of the type, or one of the types, that a schema names; NULL: any.
static bool is_of(const JsonNode *v, const JsonNode *type) {
    if (!type) return true;
    if (type->kind == JSON_STRING) return has_type(v, type->text);
    for (const JsonNode *t = type->child; type->kind == JSON_LIST && t; t = t->next)
        if (t->kind == JSON_STRING && has_type(v, t->text)) return true;
    return false;
}

static int by_text(const Rules *u, const Member *a, const Member *b) {
    int shorter = min_int(a->length, b->length);
    int order = memcmp(u->text.s + a->at, u->text.s + b->at, (size_t)shorter);
    return order != 0 ? order : a->length - b->length;
}

// Member i goes to its place among those from `first` on, which are sorted.
static void sort_in(Rules *u, int first, int i) {
    Member moved = u->member[i];
    for (; i > first && by_text(u, &moved, &u->member[i - 1]) < 0; i--)
        u->member[i] = u->member[i - 1];
    u->member[i] = moved;
}

// How many lists and objects a value nests.
static int nesting(const JsonNode *v) {
    int most = 0;
    if (v->kind != JSON_LIST && v->kind != JSON_OBJECT) return 0;
    for (const JsonNode *m = v->child; m; m = m->next) most = max_int(most, nesting(m));
    return most + 1;
}

// "enum" or "const", of which those of another type fall out.
static int read_listed(Reader *r, const JsonNode *v) {
    const JsonNode *list = find(v, "enum"), *type = find(v, "type"), *one = find(v, "const");
    Node node = {.kind = LISTED, .first = r->rules->n_members};
    if (list && (list->kind != JSON_LIST || list->n > MAX_LISTED))
        return refuse(r, "\"enum\" is not a list of at most %d values", MAX_LISTED);
    for (const JsonNode *m = list ? list->child : one; m; m = list ? m->next : NULL) {
        if (!is_of(m, type)) continue;
        int i = add_members(r, 1);
        size_t at = r->rules->text.n;
        if (i < 0 || set_text(r, i, at, json_dump(&r->rules->text, m, JSON_COMPACT)) != 0)
            return -1;
        sort_in(r->rules, node.first, i);
        node.min = max_int(node.min, nesting(m));
        node.n++;
    }
    return node.n > 0 ? add_node(r, node) : refuse(r, "no value is allowed");
}

static int read_any_of(Reader *r, const JsonNode *list) {
    Node node = {.kind = EITHER, .n = list->n};
    char name[32];
    size_t n = enter(r, "anyOf");
    if (list->kind != JSON_LIST || list->n == 0 || list->n > MAX_ALTERNATIVES)
        return refuse(r, "not a list of 1 to %d schemas", MAX_ALTERNATIVES);
    if ((node.first = add_members(r, node.n)) < 0) return -1;
    int i = 0;
    for (const JsonNode *m = list->child; m; m = m->next, i++) {
        snprintf(name, sizeof name, "%d", i);
        size_t inside = enter(r, name);
        int one = read_schema(r, m);
        if (one < 0) return -1;
        r->rules->member[node.first + i].node = one;
        leave(r, inside);
    }
    leave(r, n);
    return add_node(r, node);
}

// The schema that "#", "#/$defs/NAME" or "#/definitions/NAME" names. It is read later (read_refs),
// so that it may name itself.
static int read_ref(Reader *r, const JsonNode *ref) {
    static const char *const places[] = {"$defs", "definitions"};
    Node node = {.kind = EITHER, .n = 1};
    if (ref->kind != JSON_STRING) return refuse(r, "\"$ref\" is not a text");
    if (strcmp(ref->text, "#") == 0) node.source = r->top;
    for (int i = 0; i < 2 && !node.source; i++) {
        size_t len = strlen(places[i]);
        const JsonNode *defs = find(r->top, places[i]);
        if (strncmp(ref->text, "#/", 2) != 0 || strncmp(ref->text + 2, places[i], len) != 0)
            continue;
        if (ref->text[2 + len] == '/' && defs && defs->kind == JSON_OBJECT)
            node.source = find(defs, ref->text + 3 + len);
    }
    node.top = r->top;
    if (!node.source) return refuse(r, "\"$ref\": there is no \"%.100s\"", ref->text);
    if ((node.first = add_members(r, 1)) < 0) return -1;
    r->rules->member[node.first].node = -1;
    return add_node(r, node);
}

static int read_keywords(Reader *r, const JsonNode *v) {
    if (v->kind == JSON_BOOL && v->n == 1) return ANYTHING;
    if (v->kind == JSON_BOOL) return refuse(r, "false allows nothing");
    if (v->kind != JSON_OBJECT) return refuse(r, "not a schema");
    int has = keywords(r, v);
    if (has <= 0) return has < 0 ? -1 : ANYTHING;
    if (has >> REFERS & 1) return read_ref(r, find(v, "$ref"));
    if (has >> ALTERNATES & 1) return read_any_of(r, find(v, "anyOf"));
    if (has >> LISTS & 1) return read_listed(r, v);
    if (has >> ABOUT_TYPE & 1) return read_types(r, v, find(v, "type"));
    if (has == 1 << ABOUT_OBJECTS) return read_object(r, v);
    if (has == 1 << ABOUT_ARRAYS) return read_array(r, v);
    return has == 1 << ABOUT_STRINGS ? read_type(r, v, "string") : refuse(r, "\"type\" is missing");
}

// Returns the index of the node that v becomes, or -1 with err. One with an "$id" is a schema of
// its own: "#" in it is itself (https://json-schema.org/draft/2020-12/json-schema-core, 9.1).
static int read_schema(Reader *r, const JsonNode *v) {
    const JsonNode *top = r->top;
    if (v->kind == JSON_OBJECT && find(v, "$id")) r->top = v;
    int node = read_keywords(r, v);
    r->top = top;
    return node;
}

// ---- the whole ----

// Reads what references name, each schema once; those that name others add to the list.
static int read_refs(Reader *r) {
    Rules *u = r->rules;
    for (int i = 0; i < u->n; i++) {
        if (!u->node[i].source) continue;
        int target = -1;
        for (int j = 0; j < i && target < 0; j++)
            if (u->node[j].source == u->node[i].source) target = u->member[u->node[j].first].node;
        leave(r, 0);
        r->top = u->node[i].top;
        if (u->node[i].source != r->top) enter(r, "$defs"), enter(r, u->node[i].source->key);
        if (target < 0) target = read_schema(r, u->node[i].source);
        if (target < 0) return -1;
        u->member[u->node[i].first].node = target;
    }
    return 0;
}

// Puts the nodes that are no EITHER in the place of those that are.
static int flatten(Reader *r, int i) {
    Rules *u = r->rules;
    bool seen[MAX_NODES] = {false};
    int list[MAX_NODES], n = 1, leaves = 0;
    list[0] = i;
    seen[i] = true;
    for (int at = 0; at < n; at++) {
        const Node *v = &u->node[list[at]];
        leaves += v->kind != EITHER;
        for (int m = v->first; v->kind == EITHER && m < v->first + v->n; m++) {
            int next = u->member[m].node;
            if (!seen[next]) list[n++] = next;
            seen[next] = true;
        }
    }
    if (leaves > MAX_ALTERNATIVES)
        return refuse(r, "%d alternatives, %d are the most", leaves, MAX_ALTERNATIVES);
    int first = add_members(r, leaves);
    if (first < 0) return -1;
    u->node[i].first = first, u->node[i].n = leaves;
    for (int at = 0; at < n; at++)
        if (u->node[list[at]].kind != EITHER) u->member[first++].node = list[at];
    return 0;
}

static int height_of(const Rules *u, const Node *v) {
    int height = v->kind == EITHER ? ENDLESS : v->kind == LISTED ? v->min : v->kind <= ARRAY;
    for (int i = v->first; i < v->first + v->n; i++) {
        const Member *m = &u->member[i];
        if (v->kind == EITHER) height = min_int(height, u->node[m->node].height);
        if (v->kind == OBJECT && m->required) height = max_int(height, 1 + u->node[m->node].height);
    }
    if (v->kind == ARRAY && v->min > 0) height = max_int(height, 1 + u->node[v->child].height);
    return min_int(height, ENDLESS);
}

static int finish(Reader *r) {
    Rules *u = r->rules;
    leave(r, 0);
    for (int i = 0; i < u->n; i++)
        if (u->node[i].kind == EITHER && flatten(r, i) != 0) return -1;
    for (bool changed = true; changed;) {
        changed = false;
        for (int i = 0; i < u->n; i++) {
            int height = height_of(u, &u->node[i]);
            changed = changed || height != u->node[i].height;
            u->node[i].height = height;
        }
    }
    return u->node[u->root].height < ENDLESS
               ? 0
               : refuse(r, "no value nests %d deep at most", JSON_DEPTH);
}

// ANYTHING and what it may be.
static int add_anything(Reader *r) {
    static const char *const words[] = {"false", "true", "null"};
    int first = add_members(r, 9);
    if (first < 0 || buffer_add(&r->rules->text, "falsetruenull", 13) != 0)
        return no_memory(r->err);
    Node node[] = {{.kind = EITHER, .n = 6, .first = first},
                   {.kind = MAP},
                   {.kind = ARRAY, .max = -1},
                   {.kind = STRING, .max = -1},
                   {.kind = NUMBER},
                   {.kind = LISTED, .first = first + 6, .n = 2},
                   {.kind = LISTED, .first = first + 8, .n = 1},
                   {.kind = INTEGER}};
    for (int i = 0; i < 6; i++) r->rules->member[first + i].node = ANY_OBJECT + i;
    size_t at = 0;
    for (int i = 0; i < 3; i++) {
        int length = (int)strlen(words[i]);
        r->rules->member[first + 6 + i] = (Member){.at = at, .length = length};
        at += (size_t)length;
    }
    for (size_t i = 0; i < sizeof node / sizeof *node; i++)
        if (add_node(r, node[i]) < 0) return -1;
    return 0;
}

int rules_read(Rules *rules, const char *text, size_t n, char *err) {
    *rules = (Rules){.root = ANY_OBJECT};
    Reader r = {.rules = rules, .err = err};
    if (text && n > MAX_SCHEMA)
        return fail(err, "a schema of %zu bytes, %d are the most", n, MAX_SCHEMA);
    size_t cap = text ? n / 2 + 2 : 1;
    char *copy = malloc(n + 1);
    JsonNode *node = malloc(cap * sizeof *node);
    int rc = copy && node ? add_anything(&r) : no_memory(err);
    if (rc == 0 && text) {
        memcpy(copy, text, n);
        rc = (r.top = json_read(node, cap, copy, n, err)) ? 0 : -1;
        if (rc == 0) rc = (rules->root = read_schema(&r, r.top)) < 0 ? -1 : read_refs(&r);
    }
    if (rc == 0) rc = finish(&r);
    free(r.path.s), free(copy), free(node);
    if (rc != 0) rules_free(rules);
    return rc;
}

void rules_free(Rules *r) {
    free(r->node), free(r->member), free(r->text.s);
    *r = (Rules){0};
}
