// fields.h: the fields of a request's JSON: known ones are checked, what is wrong is refused by
// name, unknown ones mean nothing.
#ifndef FIELDS_H
#define FIELDS_H
#include <stdbool.h>

#include "json.h"
#include "serve/http.h"
#include "serve/outlet.h"

enum { FIELDS_VALUES = 1 << 20 };  // of a body, at most

// An object, and the first thing that is wrong with it. After that all functions give defaults.
typedef struct {
    const JsonNode *object;
    JsonNode *nodes;  // of the whole body
    int status;       // 0: nothing is wrong
    char message[320];
    char param[64];
    const char *code;
} Fields;

// A bound of the values in a JSON text; those of a body's strings count among the body's.
size_t fields_most(const char *s, size_t n);

// Reads the body, which must be an object. *f may be asked in any case.
void fields_open(Fields *f, Http *h);
void fields_close(Fields *f);

// What is wrong: returns false. The first counts.
bool fields_refuse(Fields *f, int status, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
// Answers with what is wrong and releases o, if anything is: true.
bool fields_answer(const Fields *f, Outlet *o);

// The member, NULL where it is absent or null.
const JsonNode *fields_get(const Fields *f, const char *name);

double fields_number(Fields *f, const char *name, double lo, double hi, double otherwise);
long fields_count(Fields *f, const char *name, long lo, long hi, long otherwise);
bool fields_bool(Fields *f, const char *name, bool otherwise);
const char *fields_text(Fields *f, const char *name, const char *otherwise);

// Fields that are known and not there yet, or not with every value: 501 by name.
void fields_refuse_others(Fields *f);
#endif
