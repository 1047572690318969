// json.c: the one JSON reader and the one JSON writer.
//
// The reader goes over the text once and unescapes strings where they stand, which never makes them
// longer. Text comes from strangers: a NUL is set behind it, and as JSON has no zero bytes, reading
// one byte ahead is always safe and none is read behind the NUL. Lists and objects are followed by
// recursion, no deeper than JSON_DEPTH. Strings that pass are valid UTF-8 without a zero byte, so
// that they can be printed, compared and written again without loss.
#include "json.h"

#include <assert.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "text.h"
#include "util.h"

// ---- reading ----

typedef struct {
    char *start, *p, *end;  // the text; p is the next unread byte, *end a NUL
    JsonNode *node;         // [cap], n of them in use
    size_t n, cap;
    char *err;
} Reader;

static int bad(const Reader *r, const char *what) {
    return fail(r->err, "byte %zu: %s", (size_t)(r->p - r->start), what);
}

static void skip_space(Reader *r) {
    while (*r->p == ' ' || *r->p == '\n' || *r->p == '\t' || *r->p == '\r') r->p++;
}

static bool accept(Reader *r, char c) {
    skip_space(r);
    if (*r->p != c) return false;
    r->p++;
    return true;
}

static int expect(Reader *r, char c) {
    char what[] = "expected '?'";
    what[sizeof what - 3] = c;
    return accept(r, c) ? 0 : bad(r, what);
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static int read_hex4(Reader *r, uint32_t *code) {
    *code = 0;
    for (int i = 0; i < 4; i++, r->p++) {
        uint32_t c = (unsigned char)*r->p, low = c | 0x20;
        uint32_t digit = c - '0' < 10 ? c - '0' : low - 'a' < 6 ? low - 'a' + 10 : 16;
        if (digit == 16) return bad(r, "\\u needs four hexadecimal digits");
        *code = *code * 16 + digit;
    }
    return 0;
}

// \uXXXX, p behind the u: a character, or the first half of a surrogate pair and its second.
static int read_unicode(Reader *r, uint8_t **out) {
    uint32_t c, low;
    if (read_hex4(r, &c) != 0) return -1;
    if (c >= 0xd800 && c < 0xdc00 && r->p[0] == '\\' && r->p[1] == 'u') {
        r->p += 2;
        if (read_hex4(r, &low) != 0) return -1;
        if (low < 0xdc00 || low > 0xdfff) return bad(r, "half a surrogate pair");
        c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
    }
    if (c >= 0xd800 && c < 0xe000) return bad(r, "half a surrogate pair");
    if (c == 0) return bad(r, "a string holds a zero byte");
    *out += utf8_put(*out, c);
    return 0;
}

static int read_escape(Reader *r, uint8_t **out) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *at = *r->p ? strchr(names, *r->p) : NULL;
    if (*r->p != 'u' && !at) return bad(r, r->p == r->end ? "cut escape" : "unknown escape");
    r->p++;
    if (!at) return read_unicode(r, out);
    *(*out)++ = (uint8_t)values[at - names];
    return 0;
}

// A character as it stands, of one to four bytes.
static int read_character(Reader *r, uint8_t **out) {
    uint32_t c;
    int n = utf8_get((uint8_t *)r->p, (uint8_t *)r->end, &c);
    if (n <= 0) return bad(r, "not UTF-8");
    memmove(*out, r->p, (size_t)n);
    r->p += n, *out += n;
    return 0;
}

// Unescapes from behind the opening quote on; the closing one makes room for the NUL.
static int read_string(Reader *r, char **text, int *n) {
    if (expect(r, '"') != 0) return -1;
    uint8_t *out = (uint8_t *)r->p;
    *text = r->p;
    while (*r->p != '"') {
        if (r->p == r->end) return bad(r, "string without end");
        if ((unsigned char)*r->p < 0x20) return bad(r, "control character in a string");
        int status = *r->p == '\\' ? (r->p++, read_escape(r, &out)) : read_character(r, &out);
        if (status != 0) return -1;
    }
    r->p++;
    *out = 0;
    if (n) *n = (int)((char *)out - *text);
    return 0;
}

// One digit or more.
static int read_digits(Reader *r) {
    if (!is_digit(*r->p)) return bad(r, "expected a digit");
    while (is_digit(*r->p)) r->p++;
    return 0;
}

static int read_number(Reader *r, JsonNode *v) {
    v->kind = JSON_NUMBER;
    v->text = r->p;
    if (*r->p == '-') r->p++;
    if (r->p[0] == '0' && is_digit(r->p[1])) return bad(r, "number with a leading zero");
    if (read_digits(r) != 0) return -1;
    if (*r->p == '.') {
        r->p++;
        if (read_digits(r) != 0) return -1;
    }
    if (*r->p == 'e' || *r->p == 'E') {
        r->p++;
        if (*r->p == '+' || *r->p == '-') r->p++;
        if (read_digits(r) != 0) return -1;
    }
    v->n = (int)(r->p - v->text);
    return 0;
}

static int read_word(Reader *r, JsonNode *v) {
    static const struct {
        const char *word;
        JsonKind kind;
        int n;
    } words[] = {{"null", JSON_NULL, 0}, {"false", JSON_BOOL, 0}, {"true", JSON_BOOL, 1}};
    for (int i = 0; i < 3; i++) {
        size_t len = strlen(words[i].word);
        if (strncmp(r->p, words[i].word, len) != 0) continue;
        v->kind = words[i].kind, v->n = words[i].n;
        r->p += len;
        return 0;
    }
    return bad(r, "expected a value");
}

static JsonNode *read_value(Reader *r, int depth);

// Members up to the closing bracket, linked as children of v.
static int read_members(Reader *r, JsonNode *v, int depth) {
    bool object = *r->p++ == '{';
    char close = object ? '}' : ']';
    const JsonNode **link = &v->child;
    v->kind = object ? JSON_OBJECT : JSON_LIST;
    if (depth == JSON_DEPTH) return bad(r, "lists or objects nested too deep");
    if (accept(r, close)) return 0;
    do {
        char *key = NULL;
        if (object && (read_string(r, &key, NULL) != 0 || expect(r, ':') != 0)) return -1;
        JsonNode *member = read_value(r, depth + 1);
        if (!member) return -1;
        member->key = key;
        *link = member, link = &member->next;
        v->n++;
    } while (accept(r, ','));
    return expect(r, close);
}

// The value at p, inside `depth` lists and objects; NULL with err.
static JsonNode *read_value(Reader *r, int depth) {
    skip_space(r);
    if (r->n == r->cap) return bad(r, "too many values"), NULL;
    JsonNode *v = &r->node[r->n++];
    *v = (JsonNode){.kind = JSON_NULL};
    int status;
    if (*r->p == '{' || *r->p == '[')
        status = read_members(r, v, depth);
    else if (*r->p == '"')
        v->kind = JSON_STRING, status = read_string(r, &v->text, &v->n);
    else if (*r->p == '-' || is_digit(*r->p))
        status = read_number(r, v);
    else
        status = read_word(r, v);
    return status == 0 ? v : NULL;
}

const JsonNode *json_read(JsonNode *node, size_t cap, char *text, size_t n, char *err) {
    Reader r = {text, text, text + n, node, 0, cap, err};
    if (n > INT_MAX) return fail(err, "%zu bytes are too many", n), NULL;
    text[n] = 0;
    const JsonNode *v = read_value(&r, 0);
    if (!v) return NULL;
    skip_space(&r);
    return r.p == r.end ? v : (bad(&r, "something follows the value"), NULL);
}

// ---- what was read ----

const JsonNode *json_member(const JsonNode *object, const char *key) {
    for (const JsonNode *m = object->child; m; m = m->next)
        if (strcmp(m->key, key) == 0) return m->kind == JSON_NULL ? NULL : m;
    return NULL;
}

double json_number(const JsonNode *v) { return strtod(v->text, NULL); }

int json_size(const JsonNode *v, size_t *size) {
    if (v->kind != JSON_NUMBER) return -1;
    *size = 0;
    for (int i = 0; i < v->n; i++) {
        size_t digit = (size_t)v->text[i] - '0';
        if (digit > 9 || *size > (SIZE_MAX - digit) / 10) return -1;
        *size = *size * 10 + digit;
    }
    return 0;
}

// Whether an object says key more than once, of which readers take the first or the last.
static bool is_twice(const JsonNode *object, const char *key) {
    int n = 0;
    for (const JsonNode *m = object->child; m; m = m->next) n += strcmp(m->key, key) == 0;
    return n > 1;
}

const JsonNode *json_may(JsonFields *f, const char *key, JsonKind kind) {
    static const char *const kinds[] = {"null",     "true or false", "a number",
                                        "a string", "a list",        "an object"};
    const JsonNode *m = f->failed ? NULL : json_member(f->object, key);
    if (!f->failed && is_twice(f->object, key)) {
        f->failed = fail(f->err, "\"%s\" is given twice", key);
        return NULL;
    }
    if (!m || m->kind == kind) return m;
    f->failed = fail(f->err, "\"%s\" is not %s", key, kinds[kind]);
    return NULL;
}

const JsonNode *json_need(JsonFields *f, const char *key, JsonKind kind) {
    const JsonNode *m = json_may(f, key, kind);
    if (!m && !f->failed) f->failed = fail(f->err, "\"%s\" is missing", key);
    return m;
}

char *json_need_text(JsonFields *f, const char *key) {
    const JsonNode *m = json_need(f, key, JSON_STRING);
    return m ? m->text : NULL;
}

char *json_may_text(JsonFields *f, const char *key) {
    const JsonNode *m = json_may(f, key, JSON_STRING);
    return m ? m->text : NULL;
}

// ---- JSON Lines ----

// A bound of the values in a text: each but the first stands behind one of these.
static size_t most_values(const char *s) {
    size_t n = 1;
    for (; *s; s++) n += *s == ',' || *s == '[' || *s == '{';
    return n;
}

static int make_room(JsonLines *l, size_t n) {
    if (n <= l->cap) return 0;
    JsonNode *node = n < SIZE_MAX / sizeof *node ? realloc(l->node, n * sizeof *node) : NULL;
    if (!node) return -1;
    l->node = node, l->cap = n;
    return 0;
}

int json_lines_next(JsonLines *l, const JsonNode **top, char *err) {
    *top = NULL;
    while (*l->rest) {
        char *line = l->rest, *end = line + strcspn(line, "\r\n");
        size_t ends = *end == 0 ? 0 : end[0] == '\r' && end[1] == '\n' ? 2 : 1;
        l->rest = end + ends;
        *end = 0;
        l->line++;
        if (line[strspn(line, " \t\r")] == 0) continue;
        if (make_room(l, most_values(line)) != 0) return fail(err, "out of memory");
        *top = json_read(l->node, l->cap, line, (size_t)(end - line), err);
        if (!*top) return -1;
        return (*top)->kind == JSON_OBJECT ? 0 : fail(err, "not a JSON object");
    }
    return 0;
}

void json_lines_close(JsonLines *l) {
    free(l->node);
    *l = (JsonLines){0};
}

// ---- writing ----

void json_put_string(FILE *f, const char *s, size_t n) {
    const uint8_t *p = (const uint8_t *)s, *end = p + n;
    uint32_t c;
    putc('"', f);
    for (int len; p < end; p += len) {
        len = utf8_get(p, end, &c);
        if (len <= 0)
            len = utf8_broken(p, end), fputs("\xef\xbf\xbd", f);
        else if (c == '"' || c == '\\')
            putc('\\', f), putc((int)c, f);
        else if (c == '\n')
            fputs("\\n", f);
        else if (text_steers(c))
            fprintf(f, "\\u%04x", (unsigned)c);
        else
            fwrite(p, 1, (size_t)len, f);
    }
    putc('"', f);
}

void json_put(FILE *f, const JsonNode *v) {
    if (v->kind == JSON_NULL) fputs("null", f);
    if (v->kind == JSON_BOOL) fputs(v->n ? "true" : "false", f);
    if (v->kind == JSON_NUMBER) fwrite(v->text, 1, (size_t)v->n, f);
    if (v->kind == JSON_STRING) json_put_string(f, v->text, (size_t)v->n);
    if (v->kind != JSON_LIST && v->kind != JSON_OBJECT) return;
    putc(v->kind == JSON_LIST ? '[' : '{', f);
    for (const JsonNode *one = v->child; one; one = one->next) {
        if (one != v->child) fputs(", ", f);
        if (one->key) json_put_string(f, one->key, strlen(one->key)), fputs(": ", f);
        json_put(f, one);
    }
    putc(v->kind == JSON_LIST ? ']' : '}', f);
}

int json_dump_string(Buffer *b, const char *s, size_t n) {
    static const char names[] = "\"\"\\\\\bb\ff\nn\rr\tt";
    int rc = buffer_add(b, "\"", 1);
    for (size_t i = 0; i < n && rc == 0; i++) {
        char escaped[8] = {s[i]};
        for (const char *name = names; *name; name += 2)
            if (*name == s[i]) escaped[0] = '\\', escaped[1] = name[1];
        if ((unsigned char)escaped[0] < 0x20) snprintf(escaped, 8, "\\u%04x", (unsigned)s[i]);
        rc = buffer_add(b, escaped, strlen(escaped));
    }
    return rc == 0 ? buffer_add(b, "\"", 1) : -1;
}

static int add_text(Buffer *b, const char *s) { return buffer_add(b, s, strlen(s)); }

static int new_line(Buffer *b, int blanks) {
    int rc = add_text(b, "\n");
    while (blanks-- > 0 && rc == 0) rc = add_text(b, " ");
    return rc;
}

// depth: lists and objects around the value.
static int dump(Buffer *b, const JsonNode *v, int indent, int depth) {
    static const char *const words[] = {"null", "false", "true"};
    int rc = 0;
    if (v->kind == JSON_STRING) return json_dump_string(b, v->text, (size_t)v->n);
    if (v->kind == JSON_NUMBER) return buffer_add(b, v->text, (size_t)v->n);
    if (v->kind != JSON_LIST && v->kind != JSON_OBJECT)
        return add_text(b, words[v->kind == JSON_NULL ? 0 : 1 + v->n]);
    bool object = v->kind == JSON_OBJECT, lines = indent > 0 && v->child;
    rc = add_text(b, object ? "{" : "[");
    for (const JsonNode *m = v->child; m && rc == 0; m = m->next) {
        if (m != v->child) rc = add_text(b, indent == 0 ? ", " : ",");
        if (rc == 0 && lines) rc = new_line(b, indent * (depth + 1));
        if (rc == 0 && object) rc = json_dump_string(b, m->key, strlen(m->key));
        if (rc == 0 && object) rc = add_text(b, indent < 0 ? ":" : ": ");
        if (rc == 0) rc = dump(b, m, indent, depth + 1);
    }
    if (rc == 0 && lines) rc = new_line(b, indent * depth);
    return rc == 0 ? add_text(b, object ? "}" : "]") : -1;
}

int json_dump(Buffer *b, const JsonNode *v, int indent) { return dump(b, v, indent, 0); }

static void put_number(FILE *f, double v, int digits) {
    if (isfinite(v))
        fprintf(f, "%.*g", digits, v);
    else
        fputs("null", f);
}

static void put_text(FILE *f, const char *s) {
    if (s)
        json_put_string(f, s, strlen(s));
    else
        fputs("null", f);
}

// Prints what the conversion `spec`, behind its %, says. Returns the conversion's length.
static size_t put_converted(FILE *f, const char *spec, va_list *args) {
    static const char *const known[] = {"s", ".*s", "d", "ld", "zu", "g", ".17g"};
    enum { TEXT, BYTES, INT, LONG, SIZE, NUMBER, EXACT, N_KNOWN };
    int k = 0, n;
    while (k < N_KNOWN && strncmp(spec, known[k], strlen(known[k])) != 0) k++;
    switch (k) {
    case TEXT:
        put_text(f, va_arg(*args, const char *));
        break;
    case BYTES:
        n = va_arg(*args, int);
        json_put_string(f, va_arg(*args, const char *), n > 0 ? (size_t)n : 0);
        break;
    case INT:
        fprintf(f, "%d", va_arg(*args, int));
        break;
    case LONG:
        fprintf(f, "%ld", va_arg(*args, long));
        break;
    case SIZE:
        fprintf(f, "%zu", va_arg(*args, size_t));
        break;
    case NUMBER:
        put_number(f, va_arg(*args, double), 9);
        break;
    case EXACT:
        put_number(f, va_arg(*args, double), 17);
        break;
    default:
        assert(!"json_print: unknown conversion");
        return 0;
    }
    return strlen(known[k]);
}

void json_print(FILE *f, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    for (const char *p = fmt; *p; p++) {
        if (*p == '%')
            p += put_converted(f, p + 1, &args);
        else
            putc(*p == '\'' ? '"' : *p, f);
    }
    va_end(args);
}
