// live.h: scoring one head at a time, of a whole context or of a sequence that grows.
//
// A method that is written once, for what is live now, serves both: a whole context is a sequence
// from which nothing was evicted.
#ifndef LIVE_H
#define LIVE_H
#include "policies/context.h"

// Some pairs of one kv head of one scored layer: [first, first + n) of its list, n > 0.
struct Head {
    const Context *c;
    int layer, g, first, n;
    float *score;  // [n]
    void *arg;     // of the method
};

// The scores of a sequence: of each head the pairs after the prefix, in the order of its list.
typedef struct {
    Context *c;
    bool whole;     // the context is read at once and nothing goes until it is scored
    int n_heads;    // scored layers * n_kv_heads
    float **score;  // [n_heads][at least the pairs it has, and the rows of a forward call more]
    float **noted;  // of the same size: what a tap says of a pair as it passes, which stays with it
    void *own;      // of the method
} Live;

// A method that watches tokens pass. `open` switches its tap on (RunState.tap) and keeps what it
// needs in v->own; `score` fills v->score from what is live now; `close` undoes `open`, also where
// that has failed or never ran. Return 0, or -1 with err. Both may be NULL: nothing passes that
// matters.
struct LiveMethod {
    int (*open)(Live *v, char *err);
    int (*score)(Live *v, char *err);
    void (*close)(Live *v);
};

// From here on the method of v->c->policy watches forward calls of v->c->seq. Returns 0, or -1 with
// err, and then live_close is still due.
int live_open(Live *v, char *err);

// Fills v->score, of what is live now, by the policy's `live` or `head`. Returns 0, or -1 with err.
int live_score(Live *v, char *err);
void live_close(Live *v);

// Reads c's context and scores it by such a method; score [context_scores(c)]. Returns 0, or -1
// with err.
int live_whole(Context *c, float *score, char *err);

// ---- for methods ----

// Pairs of head h of the context.
int live_pairs(const Live *v, int h);

// Calls fn for each head that has some, over all threads; arg becomes Head.arg.
void live_each_head(const Live *v, void (*fn)(const Head *h), void *arg);

// How many blocks of 64 pairs, the prefix included, reach to the end of h's pairs.
int head_blocks(const Head *h);

// Keys k [head_dim][64], one pair a column, and values v [64][head_dim] of the list's block b; each
// may be NULL. Returns how many pairs there are; the other columns mean nothing.
int head_block(const Head *h, int b, float *k, float *v);

// Position of the i-th of h's pairs.
int head_pos(const Head *h, int i);

// Pair t of the list, the prefix's included: key k [head_dim] and value v [head_dim], either may be
// NULL. Returns its position.
int head_pair(const Head *h, int t, float *k, float *v);

// Turns a key [head_dim] of this position back to what it was before its rotation, in place.
void head_unrotate(const Head *h, int pos, float *k);

// The scores x [64] of block b: those of h's own pairs go to h->score.
void head_put(const Head *h, int b, const float *x);

// out[j] = sum over i of x[i][j] y[i][j]; out [64], x and y [d][64].
void dot_columns(float *out, const float *x, const float *y, int d);
#endif
