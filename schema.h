// schema.h: what a JSON Schema becomes, for schema.c, which reads one, and constrain.c, which
// follows it. Others include constrain.h.
#ifndef SCHEMA_H
#define SCHEMA_H
#include <stdbool.h>

#include "json.h"
#include "util.h"

// LISTED: one of the texts; MAP: an object with any names; EITHER: one of several nodes, none of
// which is an EITHER.
typedef enum { OBJECT, MAP, ARRAY, STRING, LISTED, INTEGER, NUMBER, EITHER } NodeKind;

// A kind of values. Indices lead into the rules' node and member.
typedef struct {
    NodeKind kind;
    int height;              // how many lists and objects its flattest value nests
    int min, max;            // items of an ARRAY, characters of a STRING; max -1: any number. min
                             // of a LISTED: how deep the deepest value nests
    int child;               // what an ARRAY's items and a MAP's values are; 0: anything
    int first, n;            // members of an OBJECT, a LISTED, an EITHER
    const JsonNode *source;  // where a "$ref" leads, while a schema is read
    const JsonNode *top;     // and what "#" is there
} Node;

typedef struct {
    int node;    // of a property's value, or one of an EITHER
    size_t at;   // in text: a property's name or a listed value, as JSON
    int length;  // of it
    bool required;
} Member;

typedef struct {
    Node *node;
    Member *member;
    int n, cap, n_members, cap_members;
    Buffer text;
    int root;
} Rules;

// Nodes that are there before any schema is read.
enum { ANYTHING, ANY_OBJECT, ANY_ARRAY, ANY_STRING, ANY_NUMBER, ANY_BOOL, ANY_NULL, ANY_INTEGER };
enum { MAX_NODES = 4096, MAX_ALTERNATIVES = 256, MAX_LISTED = 4096, MAX_SCHEMA = 1 << 20 };

// The rules of the schema text [n]; NULL: any object. Returns 0, or -1 with err, which says where
// in the schema: "#/properties/age: \"minimum\" is not supported".
int rules_read(Rules *r, const char *text, size_t n, char *err);
void rules_free(Rules *r);  // safe on a zeroed struct, and twice
#endif
