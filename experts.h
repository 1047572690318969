// experts.h: a feed-forward block that is a mixture of experts (arXiv 1701.06538, 2101.03961), its
// weights and its scratch. experts.c computes it.
#ifndef EXPERTS_H
#define EXPERTS_H
#include "kernels/kernels.h"
#include "kernels/matmul.h"

enum { MAX_EXPERTS = 1024 };

// Of a layer that has w1, w2 and w3 as well (Gemma 4): the router and the experts read norms of
// their own of the residual stream, and what they and the dense block give is normed before it is
// added up. NULL where a layer has only experts.
typedef struct {
    const float *router, *in;  // [dim]
    const float *dense, *out;  // [dim] of what the dense block and the experts give
    const float *scale;        // [n_experts] factors of their parts in the sum
} ExpertNorms;

// Weights of one layer. Those of all experts stand one after the other in one matrix, each on
// panels of its own: a stack.
typedef struct {
    Matrix router;  // [n_experts] x [dim]; without data: the layer has no experts
    Matrix w1, w3;  // stacks of [expert_dim] x [dim], gate and up
    Matrix w2;      // stack of [dim] x [expert_dim]
    // Biases of those that clamp, each NULL where there are none: of the router [n_experts], of
    // each expert's gate and up [n_experts][expert_dim] and down [n_experts][dim].
    const float *router_bias, *b1, *b3, *b2;
    Matrix shared[3];           // w1, w2, w3 of the expert that all tokens use, or without data
    const float *shared_scale;  // [dim], its part is sigmoid(shared_scale . x); NULL: 1
    ExpertNorms norms;          // of experts beside a dense block
} Experts;

// Scratch for one layer of one batch. A slot is one row at one of its experts; slots of one expert
// stand together.
typedef struct {
    float *probs;               // [max_rows][n_experts] softmax of what the router gives
    int *chosen;                // [max_rows][n_used] a row's experts, rising
    float *weight;              // [max_rows][n_used] their parts in the sum
    int *slot;                  // [max_rows][n_used] where the row stands among each one's rows
    int *first;                 // [n_experts + 1] slot of an expert's first row
    int *row;                   // [slots] which row of the batch it is
    int *expert;                // [slots] and whose
    float *up;                  // [slots][expert_dim] of experts that clamp
    float *factor;              // [slots] of its input, where that is weighted
    bool *tiled;                // [slots] whether that one is multiplied by tiles
    Activations in;             // [slots] x [dim]
    Activations hidden;         // [slots] x [expert_dim]
    float *out;                 // [slots][dim]
    float *beside;              // [max_rows][dim] what the dense block beside them gives
    Activations shared_hidden;  // [max_rows] x [shared_dim]
    float *shared_out;          // [max_rows][dim]
    // Products of the experts that have rows, and of the shared one.
    Matrix (*w)[3];           // [n_experts] w1, w2, w3
    Activations (*rows)[2];   // [n_experts] in and hidden from the expert's first slot on
    Product (*p)[3];          // [n_experts + 1] down, gate, and up of experts that clamp
    Products *gates, *downs;  // [n_experts + 1]
} ExpertRows;

// Expert e of a stack of n, `rows` rows each.
Matrix expert_of(const Matrix *stack, int n, int e, int rows);
#endif
