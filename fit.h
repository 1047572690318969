// fit.h: the pairs that stay are fitted, so that attention over them gives what attention over all
// pairs gave (after Attention Matching, arXiv 2602.16284; here without training and for every head
// of a cache that is evicted).
#ifndef FIT_H
#define FIT_H
#include "kernels/kernels.h"

// One kv head and the queries of its group that are known.
typedef struct {
    int head_dim, n_pairs;
    const float *k;    // [pages][head_dim][64] keys, transposed, as a page has them
    const float *v;    // [pages * 64][head_dim]
    const float *was;  // [n_pairs] biases that they have already; NULL: none
    int n_kept;
    const int *kept;  // [n_kept] rising
    int n_rows;       // queries: positions times query heads of the group
    const float *q;   // [n_rows][head_dim] after RoPE, times the attention scale
    float softcap;    // as KVShape
    // [n_rows] log of the sum of exp over what each query sees beside the pairs, its head's sink
    // included; NULL: nothing.
    const float *own;
    bool biases;   // fit them as well
    double ridge;  // lambda: towards the original values
    double floor;  // mu: of the biases' sums, which keeps small ones apart from 0
    int steps;     // of the biases' iteration
} FitHead;

// Memory to work in, zeroed at first, for one head after the other; each thread has its own.
typedef struct {
    float *block;
    size_t floats;
} FitRoom;

void fit_room_free(FitRoom *room);

// values [n_kept][head_dim]; bias [n_kept], which is added to scale q . k: without biases what it
// was, or 0. Where all pairs are kept: all as it is. Returns 0, or -1: no memory.
int fit_head(const FitHead *h, FitRoom *room, float *values, float *bias);
#endif
