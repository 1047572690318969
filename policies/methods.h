// methods.h: the methods that have a file of their own, for the tables in policies.c, and what
// methods share.
#ifndef METHODS_H
#define METHODS_H
#include "policies/live.h"

// ---- for the tables: Policy.score and Policy.live ----

int score_kvzip(Context *c, float *score, char *err);       // arXiv 2505.23416, kvzip.c
int score_kvzip_plus(Context *c, float *score, char *err);  // arXiv 2601.07891, kvzip.c
int score_observed(Context *c, float *score, char *err);    // arXiv 2306.14048, observed.c
extern const LiveMethod expected_method;                    // arXiv 2510.00636, expected.c
extern const LiveMethod kvzap_method;                       // arXiv 2601.07891, kvzap.c

// ---- for the tables: Policy.head, and its like (geometry.c) ----

enum { MAX_LOCAL = 1024 };  // pairs that are compared with each other at most

void knorm_head(const Head *h);      // arXiv 2406.11430
void keydiff_head(const Head *h);    // arXiv 2504.15364
void curdkv_head(const Head *h);     // arXiv 2509.15038
void lagkv_head(const Head *h);      // arXiv 2504.04704
void streaming_head(const Head *h);  // arXiv 2309.17453
void random_head(const Head *h);
extern const LiveMethod leverage_method;  // arXiv 2507.08143

// The leverage of every key as scores of mean 0 and deviation 1 in each layer. Returns 0, or -1
// with err: no memory.
int leverage_fill(Live *v, char *err);

// Scores get mean 0 and deviation 1 (n - 1) in each layer.
void standardize_layers(Live *v);

// ---- repeating (kvzip.c) ----

// in = what the model is fed to repeat ids [a, b) of the context: request, turn change, and the ids
// themselves. Returns 0, or -1: no memory.
int kvzip_repeat_input(const Context *c, int a, int b, Ids *in);

// ---- the attention of the first pass (observed.c) ----

// Reads the context; the last `rows` of the tokens read are watched: score [context_scores(c)]
// becomes the sum of the weights that each pair receives from them, over all query heads of the
// group. Returns 0, or -1 with err.
int read_watched(Context *c, int rows, float *score, char *err);

// Pairs [from, to) of the context must stay: they get 1 more than the best other score of their
// layer. (Not the best itself: with equals the earlier pair wins.)
void protect(const Context *c, float *score, int from, int to);

// ---- expected attention (expected.c), also beside probes ----

// Moments of the queries that passed so far.
typedef struct Expected Expected;

// For a Live that is about to grow, by the parameters of its policy (EXPECTED_PARAMS in
// policies.c). NULL with err: no memory.
Expected *expected_open(const Live *v, char *err);
void expected_close(Expected *e);  // NULL allowed

// A tap (RunState.tap), or a part of one: adds the queries of the layer's n rows.
void expected_watch(void *expected, int layer, int n);

// Fills v->score, of what is live now. Returns 0, or -1 with err: no memory.
int expected_fill(Expected *e, Live *v, char *err);
#endif
