// methods.h: the methods that have a file of their own, for the tables in policies.c, and what
// methods share.
#ifndef METHODS_H
#define METHODS_H
#include "policies/live.h"

// ---- for the tables: Policy.score and Policy.live ----

int score_kvzip(Context *c, float *score, char *err);         // arXiv 2505.23416, kvzip.c
int score_kvzip_plus(Context *c, float *score, char *err);    // arXiv 2601.07891, kvzip.c
int score_observed(Context *c, float *score, char *err);      // arXiv 2306.14048, observed.c
int score_snapkv(Context *c, float *score, char *err);        // arXiv 2404.14469, observed.c
int score_nacl(Context *c, float *score, char *err);          // arXiv 2408.03675, observed.c
int score_dcp(Context *c, float *score, char *err);           // arXiv 2305.15805, observed.c
int score_ltp(Context *c, float *score, char *err);           // arXiv 2107.00910, observed.c
int score_finch(Context *c, float *score, char *err);         // arXiv 2408.00167, attended.c
int score_pyramidinfer(Context *c, float *score, char *err);  // arXiv 2405.12532, attended.c
int score_infinipot(Context *c, float *score, char *err);     // arXiv 2410.01518, attended.c
int score_duo(Context *c, float *score, char *err);           // arXiv 2410.10819, classes.c
int score_simlayerkv(Context *c, float *score, char *err);    // arXiv 2410.13846, classes.c
int score_fastgen(Context *c, float *score, char *err);       // arXiv 2310.01801, classes.c
int score_chunkkv(Context *c, float *score, char *err);       // arXiv 2502.00299, wrapped.c
int score_criticalkv(Context *c, float *score, char *err);    // arXiv 2502.03805, wrapped.c
extern const LiveMethod expected_method;                      // arXiv 2510.00636, expected.c
extern const LiveMethod kvzap_method;                         // arXiv 2601.07891, kvzap.c
extern const LiveMethod h2o_method;                           // arXiv 2306.14048, attended.c
extern const LiveMethod scissorhands_method;                  // arXiv 2305.17118, attended.c
extern const LiveMethod tova_method;                          // arXiv 2401.06104, attended.c
extern const LiveMethod triattention_method;                  // arXiv 2604.04921, centres.c
extern const LiveMethod capkv_method;                         // arXiv 2604.25975, centres.c
extern const LiveMethod compactor_method;                     // arXiv 2507.08143, compactor.c
extern const LiveMethod qfilters_method;                      // arXiv 2503.02812, qfilters.c

// ---- for the tables: Policy.head, and its like (geometry.c) ----

enum { MAX_LOCAL = 1024 };  // pairs that are compared with each other at most

void knorm_head(const Head *h);      // arXiv 2406.11430
void keydiff_head(const Head *h);    // arXiv 2504.15364
void curdkv_head(const Head *h);     // arXiv 2509.15038
void lagkv_head(const Head *h);      // arXiv 2504.04704
void streaming_head(const Head *h);  // arXiv 2309.17453
void random_head(const Head *h);
extern const LiveMethod leverage_method;  // arXiv 2507.08143

// The leverage of every key as scores of mean 0 and deviation 1 in each layer, but for `sink` and
// `recent` pairs at the ends of each head's list. Returns 0, or -1 with err: no memory.
int leverage_fill(Live *v, int sink, int recent, char *err);

// x [n_heads][its pairs] gets mean 0 and deviation 1 (n - 1) in each layer, but for those at the
// ends.
void standardize_layers(Live *v, float **x, int sink, int recent);

// g [k][k] = L, in place, where g + ridge = L L^T; the upper half means nothing.
void factorize(double *g, int k, double ridge);

// x^T (L L^T)^-1 x, x [k], k <= MAX_HEAD_DIM.
float leverage_of(const double *l, const float *x, int k);

// Of base [n_layers][n_heads][size] the part of query head h. (expected.c)
float *query_part(float *base, const Context *c, int layer, int h, int size);

// Adds rows [n][d], n <= PAGE, to their sum [d] and to the sum of their products [d][d].
// (expected.c)
void add_products(float *products, float *sum, const float *rows, int n, int d);

// f [d] = the first right singular vector of rows whose products sum up to `products` [d][d] and
// which sum up to `sum` [d], as a unit vector with the sign by which it points along that sum. 0
// where the sum is 0. (qfilters.c)
void first_direction(float *f, const float *products, const float *sum, int d);

// ---- repeating (kvzip.c) ----

// in = what the model is fed to repeat ids [a, b) of the context: request, turn change, and the ids
// themselves. Returns 0, or -1: no memory.
int kvzip_repeat_input(const Context *c, int a, int b, Ids *in);

// ---- the attention of the first pass (observed.c) ----

// Reads the context; the last `rows` of the tokens read are watched: score [context_scores(c)]
// becomes the sum of the weights that each pair receives from them, over all query heads of the
// group. Returns 0, or -1 with err.
int read_watched(Context *c, int rows, float *score, char *err);

// The same of the last `window` tokens of the context, or of c's question where it has one, which
// leaves no trace. *own: how many of the context's last pairs are those that were asked. Returns
// how many rows were watched, or -1 with err.
int read_window(Context *c, int window, int *own, float *score, char *err);

// Pairs [from, to) of the context must stay: they get 1 more than the best other score of their
// layer. (Not the best itself: with equals the earlier pair wins.)
void protect(const Context *c, float *score, int from, int to);

// ---- wrapped methods (wrapped.c) ----

// Reads c's context and scores it by the method that c's policy wraps. Returns 0, or -1 with err.
int score_inner(Context *c, float *score, char *err);

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
