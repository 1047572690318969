// handles.h: what stands behind the handles of kvzip.h.
//
// A model is a file, threads and scratch. What was read lies in a store, a KVCache with what is
// known of it; caches and chats are sequences of a store. Models and stores count who uses them, so
// that handles may go in any order.
#ifndef HANDLES_H
#define HANDLES_H
#include <stdbool.h>

#include "answer.h"
#include "kvfile.h"
#include "lib/kvzip.h"
#include "model.h"

enum { LOGITS_BLOCK = 64 };  // rows of logits in memory, as `run logits` has them

struct kvzip_model {
    ThreadPool *pool;
    Model model;
    Tokenizer *tok;
    RunState state;
    Answerer answerer;
    Pieces *pieces;  // for answers of a form; NULL: none was wanted yet
    int refs;        // the handle, until it is closed, and stores
};

// One user less; the last one closes it.
void model_drop(kvzip_model *m);

typedef struct {
    kvzip_model *model;
    KVCache kv;
    int refs;     // caches and chats
    KVInfo info;  // of a loaded cache it points into the file, else at what follows
    char *words;  // set and profile, one after the other, each with its NUL
    char budget[24];
    Ids ids;       // what was read
    float *score;  // NULL: not kept
    double prefill_s, score_s;
} Store;

struct kvzip_cache {
    Store *store;
    int seq;
    bool masked;  // the caller has chosen pairs, too
};

// A store that has no KVCache yet and one user; NULL with err.
Store *store_new(kvzip_model *m, char *err);
// Opens its KVCache, empty; kv names the type of pairs, NULL: f16. 0, or -1 with err.
int store_open(Store *s, const char *kv, char *err);
void store_drop(Store *s);

// A handle of the store's sequence seq (-1: there is none, which is an error that err already
// names). Takes the caller's use of the store, also when it fails and returns NULL.
kvzip_cache *cache_new(Store *s, int seq, char *err);

// ---- what callers give ----

// Moves *text behind a mark in front. 0, or -1 with err, which begins with the text's name.
int check_text(const char *name, const char **text, size_t *n, char *err);
// The same for texts that end with a NUL, mark or not; NULL is fine.
int check_string(const char *name, const char *text, char *err);
int check_ids(const kvzip_model *m, const int *ids, int n, char *err);
#endif
