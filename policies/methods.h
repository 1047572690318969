// methods.h: the methods that have a file of their own, for the tables in policies.c, and what
// methods share.
#ifndef METHODS_H
#define METHODS_H
#include "policies/live.h"

// ---- for the tables ----

int score_kvzip(Context *c, float *score, char *err);       // kvzip.c
int score_kvzip_plus(Context *c, float *score, char *err);  // kvzip.c
int score_observed(Context *c, float *score, char *err);    // observed.c
extern const LiveMethod expected_method;                    // expected.c
extern const LiveMethod kvzap_method;                       // kvzap.c

// ---- the attention of the first pass (observed.c) ----

// Reads the context; the last `rows` of its tokens are watched: score [context_scores(c)] becomes
// the sum of the weights that each pair receives from them, over all query heads of the group.
// Returns 0, or -1 with err.
int read_watched(Context *c, int rows, float *score, char *err);

// Pairs [from, to) of the context must stay: they get 1 more than the best other score of their
// layer. (Not the best itself: with equals the earlier pair wins.)
void protect(const Context *c, float *score, int from, int to);

// ---- expected attention (expected.c), also beside probes ----

// Moments of the queries that passed so far. expected_open is for a Live that is about to grow;
// expected_watch is a tap (RunState.tap); expected_fill scores what is live now.
typedef struct Expected Expected;
Expected *expected_open(const Live *v, char *err);  // NULL with err: no memory
void expected_watch(void *expected, int layer, int n);
int expected_fill(Expected *e, Live *v, char *err);
void expected_close(Expected *e);  // NULL allowed
#endif
