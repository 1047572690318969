// past.h: sequences that were read, kept for requests that begin alike.
//
// Ids are compared, never names. What stands on a document has pairs of its own, so only sequences
// on the same one are alike.
#ifndef PAST_H
#define PAST_H
#include "kvcache.h"
#include "tokenizer.h"

enum { PAST_MOST = 64 };

typedef struct {
    int seq;
    unsigned long base;  // Document.serial, 0: none
    Ids ids;             // [ids.n] the last of the sequence's, behind the document
    double used;
} PastOne;

typedef struct {
    KVCache *kv;
    int most;                // sequences that are kept, up to PAST_MOST
    PastOne one[PAST_MOST];  // [n]
    int n;
} Past;

int ids_common(const Ids *a, const Ids *b, int most);  // that both begin with

// Whether kv's sequences go back only a little (kvcache_cut): windows leave pairs, pages settle.
bool past_is_stiff(const KVCache *kv);

// The longest beginning of ids [n] that a sequence on the base has, up to `most` ids of it: a fork
// of its own, *length of it. -1: there is none (*length 0).
int past_fork(Past *p, unsigned long base, const Ids *ids, int most, int *length);

// How many that are.
int past_common(const Past *p, unsigned long base, const Ids *ids, int most);

// Takes a sequence over that ends with ids, whose list it takes as well.
void past_keep(Past *p, int seq, unsigned long base, Ids *ids);

bool past_forget(Past *p);  // the one that was used longest ago; false: none is left
void past_forget_base(Past *p, unsigned long base);  // those that stand on it
void past_close(Past *p);
#endif
