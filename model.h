// model.h: the nouns of a transformer. Config and Weights come from the file, RunState is scratch.
//
// Families differ by Config fields and by which optional weights are there, never by name.
#ifndef MODEL_H
#define MODEL_H
#include "deltanet.h"
#include "experts.h"
#include "kernels/kernels.h"
#include "kvcache.h"
#include "tensors.h"

// Queries that grow with their position (temperature.c): a factor of 1 + growth log(1 + floor((pos
// + first) / step)).
typedef struct {
    float growth;  // 0: no query grows
    int first, step;
    const int *layers;  // [n_layers] whether the layer's do, NULL: all
} Temperature;

// What the file says about the architecture; never changes after opening.
typedef struct {
    int dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size;
    int seq_len;        // longest sequence seen in training
    int q_dim, kv_dim;  // n_heads * head_dim, n_kv_heads * head_dim
    int rotary_dim;     // leading dimensions of a head that rotate, in halves (i, i + rotary_dim/2)
    // Of the layers with a window, where they have other heads than the rest, of which the above
    // tells (Gemma 4); else the same.
    int window_kv_heads, window_head_dim;
    const int
        *owner;      // [n_layers] whose keys and values a layer reads, as in KVShape; NULL: its own
    int last_owner;  // no layer behind it has keys and values of its own
    const int *hidden;  // [n_layers] rows of w1 and w3 in each layer; NULL: hidden_dim
    // Per-layer embeddings (layerembed.c): how many numbers, 0 = none; factors of their table and
    // of what the embedding gives.
    int embed_dim;
    float table_scale, mix_scale;
    float norm_eps;
    float attn_scale;     // multiplies q . k
    float embed_scale;    // multiplies the embedding (Gemma)
    float attn_softcap;   // c tanh(x / c) on attention scores, 0 = none (Gemma 2)
    float final_softcap;  // the same on logits
    bool act_gelu;        // GELU (tanh form) instead of SiLU
    // Of layers whose feed-forward block is a mixture: experts, how many a token uses, how wide
    // they and the one that all tokens use are (0: none is); whether the weights of those used sum
    // to 1.
    int n_experts, n_used, expert_dim, shared_dim;
    bool norm_topk;
    bool route_input;  // an expert's input is weighted instead of what it gives (Llama 4)
    // Where these experts clamp (gpt-oss), else 0: (up + 1) gate sigmoid(alpha gate), with gate at
    // most the limit and up within it.
    float swiglu_alpha, swiglu_limit;
    bool dense_beside;  // such a block has a dense one beside it (ExpertNorms)
    DeltaShape delta;   // of the layers that keep a state
    // [n_layers] sliding window in tokens, 0 = whole past, NO_PAIRS = the layer keeps a state
    const int *window;
    bool chunks;         // windows are chunks (KVShape)
    const float *sinks;  // [n_layers][n_heads] as in KVShape, NULL = none (gpt-oss)
    const int *rope;     // [n_layers] which table rotates q and k, -1 = none (SmolLM3)
    int n_ropes;
    int rope_size;             // numbers of a table: cos and sin, as many as the longest one has
    const int *rope_dims;      // [n_ropes] rotary_dim of each; NULL: all that
    const float *inv_freq;     // [n_ropes][rope_size / 2] after any scaling (llama3, linear, yarn)
    bool att_gate;             // what attention gives is gated (Layer.wg)
    Temperature temperature;   // of queries that grow with their position
    const float *rope_mscale;  // [n_ropes] factor of cos and sin (yarn), 1 otherwise
} Config;

// What a layer adds of its own for each token (layerembed.c); without data: nothing.
typedef struct {
    Matrix gate, mix;  // [embed_dim] x [dim]
    Matrix up;         // [dim] x [embed_dim]
    const float *rms;  // [dim]
} LayerEmbed;

// Weights of one layer, in the mapped file.
typedef struct {
    int n_kv_heads, head_dim, q_dim, kv_dim, hidden_dim;  // its own, where layers differ
    const float *rms_att, *rms_ffn;                       // [dim] before attention, before the ffn
    // [dim] norms of what a block adds, NULL = none (Gemma)
    const float *rms_att_post, *rms_ffn_post;
    // [head_dim] before RoPE, NULL = none (Qwen3, Gemma 3; of values Gemma 4)
    const float *q_norm, *k_norm, *v_norm;
    const float *bq, *bk, *bv;  // [q_dim], [kv_dim], [kv_dim] or NULL (Qwen2)
    const float *bo;            // [dim] or NULL (gpt-oss)
    // [q_dim], [kv_dim], [kv_dim] x [dim]; without wv values are what keys are before norm and
    // RoPE, without both the layer reads another one's pairs
    Matrix wq, wk, wv;
    Matrix wo;           // [dim] x [q_dim]
    Matrix wg;           // [q_dim] x [dim] gate of what attention gives, or without data
    Delta delta;         // instead of all of these, or without data
    Matrix w1, w3;       // gate and up, [hidden_dim] x [dim]
    Matrix w2;           // down, [dim] x [hidden_dim]
    Experts experts;     // instead of w1, w2 and w3 or beside them, or without data
    const float *scale;  // [1] multiplies what the layer gives, NULL = none (Gemma 4)
    LayerEmbed embed;    // Gemma 4
} Layer;

// An open file: read-only, shared by any number of RunStates.
typedef struct {
    TensorFile file;
    Config config;
    Layer *layers;           // [n_layers]
    Matrix tok_embed;        // [vocab_size] x [dim]
    Matrix wcls;             // [vocab_size] x [dim]; tok_embed itself when the two are tied
    const float *rms_final;  // [dim]
    Matrix embed_table;      // of per-layer embeddings: a panel is a token
    const float *rms_embed;  // [embed_dim]
    bool has[W_TYPES];       // types of the matrices that are multiplied
    const char *fingerprint, *name;
} Model;

// One token to compute: which sequence it continues, and whether its logits are wanted.
typedef struct {
    int seq, token;
    bool logits;
} Row;

// Scratch of forward(), sized when it is opened.
typedef struct {
    const Model *model;
    ThreadPool *pool;
    int max_rows, max_logits;
    float *x;             // [max_rows][dim] the residual stream
    Activations xb;       // [max_rows] x [dim] its norm, input of wq, wk, wv, w1, w3 and wcls
    float *q, *k, *v;     // [max_rows][q_dim], [max_rows][kv_dim]
    float *gate;          // [max_rows][q_dim], where a model has gates
    DeltaRows delta;      // of layers that keep a state
    Activations att_out;  // [max_rows] x [q_dim] what attention gives, input of wo
    Activations hb;       // [max_rows] x [hidden_dim] act(gate) * up, input of w2
    ExpertRows experts;   // rows sorted by expert
    float *add;           // [max_rows][dim] what a block adds to x
    // Of per-layer embeddings: the token's embedding, what of it a layer takes, and its input.
    Activations embed;    // [max_rows] x [dim]
    float *mix;           // [max_rows][embed_dim]
    Activations embed_h;  // [max_rows] x [embed_dim]
    Activations rest;     // [max_logits] x [dim] what the rounding of xb has lost, for the logits
    float *rope;          // [n_ropes][max_rows][rope_size / 2][2] cos, sin
    float *x_norm;        // [max_rows] |xb|, for KVzip+
    int *pos;             // [max_rows]
    // [max_rows] whether layers multiply the row by tiles: it is of a long run (KV_LONG_RUN), so
    // that company changes no bit
    bool *tiled;
    int *broken;  // [max_rows] the first step that gave the row what is no number
    KVRun *runs;  // [max_rows]
    // Rows that are still computed, which become fewer, and the runs that they are of.
    Row *rows;       // [max_rows]
    KVRun *reading;  // [max_rows]
    int n_reading;
    float *logits;        // [max_logits][vocab_size], in the order of the rows that asked
    int n_logits;         // of the last call
    void *block;          // memory of all of the above
    size_t bytes;         // of block
    double ops[W_TYPES];  // multiplications and additions of matrix products so far
    // When set, called in every layer that has keys of its own, once its n rows are ready: the
    // layer's input in xb.x, q and k (both rotated), v and pos. For policies that learn from what
    // passes.
    void (*tap)(void *arg, int layer, int n);
    void *tap_arg;
    // The same, once the rows' own pairs are in the cache: for fitting (policies/fitting.h).
    void (*watch)(void *arg, int layer, int n);
    void *watch_arg;
} RunState;

enum { MAX_ROWS = 512 };  // of one call: blocks of prefill

// Maps the file and checks every tensor against the config. Returns 0, or -1 with err.
int model_open(Model *m, const char *path, char *err);
void model_close(Model *m);  // safe on a zeroed struct, and twice

// The matrices of a layer, those that it has: returns how many.
enum { LAYER_MATRICES = 23 };
int layer_matrices(const Layer *w, const Matrix *all[LAYER_MATRICES]);

// What a cache for this model has to hold.
KVShape model_kv_shape(const Model *m);

// Scratch for at most max_rows rows a call, max_logits of them with logits. Returns 0, or -1 with
// err: no memory.
int state_open(RunState *s, const Model *m, ThreadPool *pool, int max_rows, int max_logits,
               char *err);
void state_close(RunState *s);  // safe on a zeroed struct, and twice

// Computes rows [n], n <= max_rows, at most max_logits of them with logits: appends to the rows'
// sequences and attends over them. Rows of one sequence stand together, in order, and continue at
// its next position. Allocates nothing but cache pages and room to pack them in. Returns 0, or -1
// with err, and then no sequence has grown.
int forward(RunState *s, KVCache *kv, const Row *rows, int n, char *err);

// The rotation of layer l at an absolute position (RoPE, arXiv 2104.09864): cos and sin go to
// rope [rotary_dim/2][2], 1 and 0 where the layer does not rotate.
void model_rope(const Model *m, int l, int pos, float *rope);

// Rotates v [head_dim] by such a rotation of a layer without a window, in place.
void model_rotate(const Model *m, float *v, const float *rope);

// Turns q or k [head_dim] of a row that forward is computing back to what it was before its
// rotation, in place. For taps.
void model_unrotate(const RunState *s, int l, int row, float *v);

// gram [n_heads][head_dim][head_dim] = Wo_h^T Wo_h of layer l, one without a window, so that |Wo_h
// v|^2 = v^T gram_h v.
void model_wo_gram(const Model *m, ThreadPool *pool, int l, float *gram);
#endif
