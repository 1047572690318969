// deltanet.h: a layer that remembers the past in a state of fixed size instead of pairs (gated
// delta net, arXiv 2412.06464): its shape, weights and scratch. deltanet.c computes it.
#ifndef DELTANET_H
#define DELTANET_H
#include "kernels/kernels.h"

enum { MAX_CONV = 8 };

typedef struct {
    int k_heads, v_heads, k_dim, v_dim;  // v_heads a multiple of k_heads; no k_heads: no such layer
    int conv;                            // tokens that the convolution sees
    bool tiled;  // value head h reads key head h % k_heads, not h / (v_heads / k_heads)
} DeltaShape;

static inline int delta_k_total(const DeltaShape *d) { return d->k_heads * d->k_dim; }
static inline int delta_v_total(const DeltaShape *d) { return d->v_heads * d->v_dim; }
// Channels of q, k and v, which stand in this order.
static inline int delta_channels(const DeltaShape *d) {
    return 2 * delta_k_total(d) + delta_v_total(d);
}

// Weights of one layer.
typedef struct {
    Matrix qkv;          // [channels] x [dim]; without data: the layer attends
    Matrix z;            // [v_total] x [dim], gate of the output
    Matrix a, b;         // [v_heads] x [dim], of the decay and of beta
    Matrix out;          // [dim] x [v_total]
    const float *conv;   // [conv][channels] oldest token first
    const float *decay;  // [v_heads] below 0: how fast a head forgets
    const float *dt;     // [v_heads] added to a
    const float *norm;   // [v_dim] of each head's output
} Delta;

// Scratch for one layer of one batch.
typedef struct {
    float *qkv, *z;   // [max_rows][channels], [max_rows][v_total]
    float *a, *b;     // [max_rows][v_heads], which become the decays and betas
    Activations out;  // [max_rows] x [v_total]
} DeltaRows;

// Floats of a sequence's state in one layer: the last conv - 1 rows of channels, then S of each
// head as DeltaRule has it; both in multiples of 16.
int delta_state(const DeltaShape *d);
#endif
