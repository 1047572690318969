// profile.h: what is learned about a model once, so that compressing a context needs no second
// pass.
//
// KVzip lets the model repeat every context. But how many pairs each head keeps hardly depends on
// the text, and how much a pair matters can be read off the layer's input by a linear probe (KVzap,
// arXiv 2601.07891). A profile holds both, measured by `run calibrate` on sample text. It is a file
// of its own or part of the converted model.
#ifndef PROFILE_H
#define PROFILE_H
#include "model.h"

// Metadata of a profile whose layer shares follow from measured effects (effects.h): what that was
// worth. Absent where they are KVzip's.
#define PROFILE_LAYER_SHARES "profile.layer_shares"

// An open profile; its numbers lie in the mapped file.
typedef struct {
    TensorFile file;           // a profile of its own; unused where the model carries one
    int n_layers, n_kv_heads;  // layers that are scored and evicted
    int n_ratios;
    const float *ratio;     // [n_ratios] rising, in (0, 1)
    const float *share;     // [n_ratios][n_layers][n_kv_heads] of a head's pairs that stay
    const float *head_max;  // [n_layers][n_kv_heads] the largest score a pair of the head had
    const float *probe;     // [n_layers][n_kv_heads][probe_features(config)]
} Profile;

// Features of a pair in a probe's order: 1, the layer's normed input [dim], its head's key before
// RoPE and its value [head_dim].
static inline int probe_features(const Config *c) { return 1 + c->dim + 2 * c->head_dim; }

// Where feature i of kv head g's probe stands in a row of the features of all heads (profile_rows).
static inline int probe_feature(const Config *c, int g, int i) {
    int d = c->head_dim, shared = 1 + c->dim;
    if (i < shared) return i;
    return i < shared + d ? i + g * d : i - d + c->kv_dim + g * d;
}

bool profile_carried(const Model *m);  // whether the model's own file holds a profile

// Opens the profile at path, or the model's own where path is NULL; refuses another model's.
// Returns 0, or -1 with err.
int profile_open(Profile *p, const Model *m, const char *path, char *err);
void profile_close(Profile *p);  // safe on a zeroed struct, and twice

// Shares of the heads at a ratio, share [n_layers][n_kv_heads]: linear between the measured ratios,
// between none and the first one, and between the last one and all.
void profile_shares(const Profile *p, double ratio, double *share);

// How many of its n_ctx pairs each head keeps, budget [n_layers][n_kv_heads]: the heads' shares at
// this ratio, together exactly floor(n_layers * n_kv_heads * n_ctx * ratio). Returns 0, or -1: no
// memory.
int profile_budget(const Profile *p, double ratio, int n_ctx, int *budget, char *err);

// ---- features and probes, for taps of forward ----

// Features of a row of forward, of all heads together:
//
//   | 1 | layer's normed input [dim] | keys before RoPE [kv_dim] | values [kv_dim] | zeros |
//
// row_features is its length, a multiple of 64.
int row_features(const Config *c);

// x [n][row_features(config)]: features of the n rows that forward is computing.
void profile_rows(const RunState *s, int layer, int n, float *x);

// The probes of all heads as one matrix per layer.
typedef struct {
    int n_layers, cols;  // cols: n_kv_heads rounded up to 16
    float *w;            // [n_layers][row_features][cols]
    float *x;            // [max_rows][row_features]
    float *y;            // [max_rows][cols]
} Probes;

// Room for s->max_rows rows. Returns 0, or -1 with err: no memory.
int probes_open(Probes *b, const Profile *p, const RunState *s, char *err);
void probes_close(Probes *b);  // safe on a zeroed struct, and twice

// y [n][cols]: the log of the score that KVzip would give each row's pair, in every kv head. For
// taps; `scored` counts the layers that are scored.
void probes_apply(const Probes *b, RunState *s, int layer, int scored, int n);
#endif
