// constrain.h: answers that are JSON, and of a form that a JSON Schema gives: which tokens may come
// next.
//
// After every token the vocabulary is gone over for the pieces that keep the text a beginning of a
// valid value; only these may be drawn. Where the value is complete the text ends. So an answer
// that is not cut by its limit parses and is valid, whatever the model wants.
//
// Keywords: type, properties, required, additionalProperties, items, minItems, maxItems, minLength,
// maxLength, enum, const, anyOf, $ref to "#", $defs or definitions; notes (title, description,
// default and the like) are passed over. Anything else is refused by name.
// (https://json-schema.org/draft/2020-12/json-schema-validation)
#ifndef CONSTRAIN_H
#define CONSTRAIN_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tokenizer.h"

// The vocabulary sorted by what its tokens print: built once for a model, for all schemas.
// Read-only after opening, so threads may share it.
typedef struct Pieces Pieces;

// Of ids below vocab, as many as the model has logits; tok must stay open. Returns NULL with err:
// no memory, or a vocabulary that cannot spell every text.
Pieces *pieces_open(const Tokenizer *tok, int vocab, char *err);
void pieces_close(Pieces *p);  // NULL allowed

// A schema ready to be followed by any number of texts, one thread at a time: it remembers which
// tokens may come where.
typedef struct Schema Schema;

// The schema text [n]; NULL: any object (json_object). p must stay. Returns NULL with err, which
// says where in the schema: "#/properties/age: \"minimum\" is not supported".
Schema *schema_open(const char *text, size_t n, const Pieces *p, char *err);
void schema_close(Schema *s);  // NULL allowed

// Bytes that the pieces of so many ids and the masks of one schema take, nearly.
size_t constrain_bytes(int vocab);

// How far a text has come; {0} before form_begin.
typedef struct {
    Schema *schema;
    struct Reading *reading;  // [n] every way to read it so far
    int n;
} Form;

// At the start of a text. Returns 0, or -1 with err: no memory.
int form_begin(Form *f, Schema *s, char *err);
void form_free(Form *f);  // safe on a zeroed struct, and twice

// A bit for each id below the vocabulary that may come next, stop tokens where the value may be
// over; valid until the next call for the same schema. NULL with err: no memory.
const uint64_t *form_allowed(const Form *f, char *err);

// Goes on by what id prints. Returns 0, or -1 with err when it may not come; then f is as it was.
int form_take(Form *f, int id, char *err);

bool form_may_end(const Form *f);  // whether the value may be over
bool form_is_over(const Form *f);  // and nothing can follow
#endif
