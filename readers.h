// readers.h: the table of readers: which pages of the cache a token reads, where not all.
#ifndef READERS_H
#define READERS_H
#include "policies/context.h"
#include "reading.h"

// A row: what --reader calls it, and what it does (reading.h).
typedef struct {
    const char *name;
    const KVReader *how;
    // Where the parameters decide which of two: how it reads by them; or NULL.
    const KVReader *(*pick)(const double *param);
    const char *help;
    Param params[MAX_PARAMS];
} Reader;

// Ends with a NULL name. Nothing depends on the order of the rows: it is that of `run -h`.
extern const Reader readers[];

// A reader and its numbers; row NULL: all pages are read.
typedef struct {
    const Reader *row;
    double param[KV_READER_PARAMS];
} Reads;

// The row of that name, or NULL.
const Reader *reader_find(const char *name);

// Gives reads the defaults of the row, then of key_values "budget=512,layers=0" (or NULL) those
// that the row knows; others are not its own. Returns 0, or -1 with err: a value out of its range.
int reader_set(Reads *reads, const Reader *row, const char *key_values, char *err);

// From now on kv is read so. Returns 0, or -1 with err: no memory.
int reader_begin(const Reads *reads, KVCache *kv, char *err);

// Bytes that its digests take for each pair of a head.
double reader_bytes(const Reads *reads, const KVShape *shape);
#endif
