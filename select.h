// select.h: which pairs of a scored context stay. Arithmetic on scores alone: no cache, no model.
#ifndef SELECT_H
#define SELECT_H
#include <stdbool.h>
#include <stdint.h>

// Who competes with whom. A pool is all pairs (PAIR), those of a layer (LAYER), or those of a head
// (UNIFORM: every head as many; BUDGET: each as many as it is given). HEAD: heads compete with
// their largest score and stay or go as a whole. TOKEN: tokens compete with the sum of their scores
// and stay or go in all heads. THRESHOLD: no pair competes, each is judged by its own score.
typedef enum {
    LEVEL_PAIR,
    LEVEL_LAYER,
    LEVEL_UNIFORM,
    LEVEL_BUDGET,
    LEVEL_HEAD,
    LEVEL_TOKEN,
    LEVEL_THRESHOLD
} SelectLevel;

// For how many places. Of a pool of n pairs exactly floor(n * ratio) stay, or BUDGET's number; of
// equal scores the first ones by layer, head, position. HEAD: floor(heads * ratio) heads stay;
// TOKEN: floor(n_ctx * ratio) tokens.
typedef struct {
    int n_layers, n_kv_heads, n_ctx;  // scored layers, heads and pairs
    double ratio;                     // share that stays, 1 = all
    SelectLevel level;
    // PAIR, LAYER, HEAD: score > sorted[floor(n * ratio) - 1], the rule of KVzip's authors.
    bool ref_ties;
    // PAIR, LAYER: this share of a UNIFORM budget is sure for every head (Ada-KV, arXiv
    // 2407.11550).
    double safeguard;
    const int *budget;  // BUDGET: [n_layers][n_kv_heads] pairs that stay, each 0 to n_ctx
    double least;       // THRESHOLD: of a score that stays
    int newest;         // THRESHOLD: the last pairs of each head, which stay
} Selection;

// keep[i] = 1 for the pairs that stay, 0 for those that go; keep and score
// [n_layers][n_kv_heads][n_ctx], larger scores stay. Returns the number kept, or -1 with err
// (memory, a NaN score, ref_ties together with a safeguard).
long select_pairs(uint8_t *keep, const float *score, const Selection *s, char *err);
#endif
