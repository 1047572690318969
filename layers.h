// layers.h: what the blocks of a layer share. Private to model.c, which calls them in order, and to
// the blocks that have files of their own.
//
//   deltanet.c    a layer that keeps a state of fixed size
//   experts.c     a feed-forward block of many experts, of which a token uses few
//   layerembed.c  per-layer embeddings: what a layer adds of its own for each token
//   temperature.c queries that grow with their position
#ifndef LAYERS_H
#define LAYERS_H
#include "kernels/matmul.h"
#include "model.h"

// ---- opening ----

// A matrix of rows x cols in panels, see kernels.h. 0, or -1 with err.
int open_matrix(Matrix *m, const TensorFile *f, const char *name, int rows, int cols, char *err);
// A list of whole numbers, one for each of n, which may be left out: then it is NULL. 0, or -1 with
// err.
int open_list(const int **list, const TensorFile *f, const char *name, int n, char *err);
// A vector [n]; NULL where it is optional and absent. 0, or -1 with err.
int open_vector(const float **v, const TensorFile *f, const char *name, int n, bool optional,
                char *err);

// layers.L.NAME of a layer, a vector [n].
typedef struct {
    const char *name;
    const float **v;
    long n;
    bool optional;
} LayerVector;

// All of v [n] of layer l. 0, or -1 with err.
int open_vectors(const LayerVector *v, size_t n, const TensorFile *f, int l, char *err);

// ---- scratch ----

// Hands out 64-byte aligned pieces of one block; with no block yet it only counts.
void *take(RunState *s, size_t n, size_t size);
Activations take_activations(RunState *s, int max_rows, int cols);

// ---- steps ----

// fn for each of n rows, on all threads where that pays.
void each_row(RunState *s, int n, void (*fn)(void *ctx, int i), void *ctx);
// Notes that layer l gave row i what is no number, unless an earlier one had. Asked before anything
// is rounded to whole numbers, which hides it.
void check_row(RunState *s, int i, int l, const float *x, int n);
// Several matrices that read the same input, of n rows.
void multiply(RunState *s, const Activations *x, int n, const Product *p, int n_products);
// Rounds the n rows of an input of layer l, before the first of its products.
void quantize(RunState *s, Activations *x, int n, int l);
// act(x) * y of the model's feed-forward blocks.
static inline void (*gated_act(const Config *c))(float *x, const float *y, int n) {
    return c->act_gelu ? kern.gelu_mul : kern.silu_mul;
}

// ---- deltanet.c ----

// The shape of the layers that keep a state, where the file has such. 0, or -1 with err.
int deltanet_config(Config *c, const TensorFile *f, char *err);
// The weights of layer l, which is one. 0, or -1 with err.
int deltanet_open(Model *m, int l, char *err);
void deltanet_take(RunState *s);
// delta.out of layer l from xb of n rows, whose runs' states go on.
void deltanet(RunState *s, KVCache *kv, int l, int n_runs, int n);

// ---- experts.c ----

// How experts clamp, where they do. 0, or -1 with err.
int experts_config(Config *c, const TensorFile *f, char *err);
// The experts of layer l, where the file has them. 0, or -1 with err.
int experts_open(Model *m, int l, char *err);
void experts_take(RunState *s);
// add = the sum of what each row's experts give for xb; where a dense block stands beside them, for
// norms of x, and what that one gave, which stands in add, comes to it.
void experts_ffn(RunState *s, int l, int n);

// ---- layerembed.c ----

// The table that all layers share, and what layer l has. 0, or -1 with err.
int layer_embed_open_table(Model *m, char *err);
int layer_embed_open(Model *m, int l, char *err);
void layer_embed_take(RunState *s);
// Keeps the embeddings of n rows, which stand in x.
void layer_embed_begin(RunState *s, int n);
// add = what layer l gives for the rows' tokens, asked by xb, which is x itself.
void layer_embed(RunState *s, int l, int n);

// ---- temperature.c ----

// How queries grow, where the file says that they do. 0, or -1 with err.
int temperature_open(Config *c, const TensorFile *f, char *err);
// Query q [n_heads][head_dim] of layer l at an absolute position, rotated, in place.
void temperature_apply(const Model *m, int l, int pos, float *q);
#endif
