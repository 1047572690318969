// policies.h: how a context is compressed. One table of methods; a new idea is one function and one row.
#ifndef POLICIES_H
#define POLICIES_H
#include "kvcache.h"
#include "model.h"
#include "tokenizer.h"

// Everything a method may look at. The sequence is empty when its score function starts; the function reads
// the context itself (read_context), so that it can switch scoring on before, during or after.
typedef struct Context {
    RunState *state;
    KVCache *kv;
    const Tokenizer *tok;
    int seq;
    const int *ids;          // [n_prefix + n_ctx]
    int n_prefix, n_ctx;     // the prefix (template, task text) is protected
    int chunk;               // ids per repeat pass
    bool local;              // --score-attn local
    const char *postfix;     // turn change between the repeat request and the repeated text
    // called as work goes on; total counts tokens of prefill and scoring. Nonzero stops with an error.
    int (*progress)(void *arg, const char *what, long done, long total);
    void *progress_arg;
    double prefill_s, score_s;  // out: seconds
} Context;

typedef struct {
    const char *name;
    // Fills score [scored layers][n_kv_heads][n_ctx], higher = keep, and leaves seq holding the context.
    int (*score)(Context *c, float *score, char *err);
    const char *help;
} Policy;

extern const Policy policies[];  // ends with a NULL name
const Policy *policy_find(const char *name);

// Prefill alone: seq receives the prefix and the context.
int context_read(Context *c, char *err);
// Reads and scores; score as above.
int context_score(Context *c, const Policy *p, float *score, char *err);
size_t context_scores(const Context *c);  // number of floats in score
#endif
