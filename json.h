// json.h: the one JSON reader and the one JSON writer (RFC 8259), and JSON Lines.
//
// Headers of files, tasks, results and whatever a stranger sends are read with it. A document costs
// at most the nodes it is given room for and JSON_DEPTH stack frames, and time linear in its bytes.
#ifndef JSON_H
#define JSON_H
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "util.h"

// Lists and objects inside each other, at most.
enum { JSON_DEPTH = 32 };

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_LIST, JSON_OBJECT } JsonKind;

// A value of a document. All pointers lead into the text it was read from, or to its other nodes.
typedef struct JsonNode {
    JsonKind kind;
    // Bytes of a string or of a number's digits; members of a list or an object; 0 or 1 of a bool.
    int n;
    const char *key;  // its name, where it is a member of an object; else NULL
    union {
        char *text;  // [n] string: unescaped, a NUL behind it; number: as written, no NUL
        const struct JsonNode *child;  // list or object: the first member, NULL when there is none
    };
    const struct JsonNode *next;  // the member behind it, NULL at the end
} JsonNode;

// ---- reading ----

// Reads the document text [n]; text has room for n + 1 bytes and is changed: strings are unescaped
// in place. Its values go to node [cap], parents before members. What strings hold is valid UTF-8
// without a zero byte. A member may come twice. Returns the document's value, or NULL with err, a
// sentence that begins with the byte: "byte 12: expected ':'".
const JsonNode *json_read(JsonNode *node, size_t cap, char *text, size_t n, char *err);

// A member of an object, the first of that name; NULL when it is absent or null.
const JsonNode *json_member(const JsonNode *object, const char *key);

// A number as a double: one too large for it is an infinity.
double json_number(const JsonNode *v);

// A number without sign, point and exponent. Returns 0, or -1 when it is not one or does not fit.
int json_size(const JsonNode *v, size_t *size);

// Members of an object by name and kind. The first that is missing, given twice or of another kind
// is an error: it is noted in err and `failed`, and from then on all are NULL.
typedef struct {
    const JsonNode *object;
    char *err;  // [ERR_LEN]
    int failed;
} JsonFields;

// The member called key, which must be of that kind; with `may` it may be absent, which gives NULL.
const JsonNode *json_need(JsonFields *f, const char *key, JsonKind kind);
const JsonNode *json_may(JsonFields *f, const char *key, JsonKind kind);

// The same for strings; the result is NUL-terminated.
char *json_need_text(JsonFields *f, const char *key);
char *json_may_text(JsonFields *f, const char *key);

// ---- JSON Lines ----

// A document a line, blank ones left out; lines end with \n, \r\n or \r. Zeroed but for rest at the
// start.
typedef struct {
    char *rest;      // what is not read yet, NUL-terminated; changed as by json_read
    int line;        // of the document last read, from 1
    JsonNode *node;  // [cap] its nodes
    size_t cap;
} JsonLines;

// The next line's object goes to *top, NULL at the end of the text; it stays until the next call,
// its strings as long as the text. Returns 0, or -1 with err, which does not name the line.
int json_lines_next(JsonLines *l, const JsonNode **top, char *err);
void json_lines_close(JsonLines *l);  // safe on a zeroed struct, and twice

// ---- writing ----
// To a FILE; whether that worked ferror and fflush tell.

// A printf for JSON: ' stands for the double quote, %s and %.*s print escaped strings in quotes
// (NULL: null), %g a number of up to 9 digits and %.17g of up to 17 (not finite: null); %d, %ld and
// %zu as ever. Nothing else is known.
void json_print(FILE *f, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

// A value as it was read.
void json_put(FILE *f, const JsonNode *v);

enum { JSON_COMPACT = -1 };
// A value as Python's json.dumps writes it with ensure_ascii off, which is how chat templates print
// JSON, numbers as they were written; indent: blanks a level, 0: all in one line, JSON_COMPACT: and
// no blanks at all. Returns 0, or -1: no memory.
int json_dump(Buffer *b, const JsonNode *v, int indent);
int json_dump_string(Buffer *b, const char *s, size_t n);

// s [n] in quotes, escaped, all that steers a terminal as well (text_steers); what is not valid
// UTF-8 becomes U+FFFD.
void json_put_string(FILE *f, const char *s, size_t n);
#endif
