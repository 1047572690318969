// model.c: the converted file as a transformer, and forward(), its table of contents.
//
// A batch is a list of rows, each one token that continues some sequence: prefill in blocks, one
// token of decoding and eight questions at once take the same path. Weights are used where the file
// is mapped. The fact that must stay true: a row's result depends on its own sequence alone, never
// on which other rows share the batch, so blocks of any size give the same bits in every matrix
// product (OpenBLAS's, when built with it, differ in their last bits from block to block).
#define _POSIX_C_SOURCE 200809L
#include "model.h"

#include "kernels/matmul.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "weights.h"

// ---- opening the file ----

static int open_config(Config *c, const TensorFile *f, char *err) {
    const struct {
        const char *key;
        int *out, lo;
    } ints[] = {{"dim", &c->dim, 1},
                {"hidden_dim", &c->hidden_dim, 1},
                {"n_layers", &c->n_layers, 1},
                {"n_heads", &c->n_heads, 1},
                {"n_kv_heads", &c->n_kv_heads, 1},
                {"head_dim", &c->head_dim, 2},
                {"rotary_dim", &c->rotary_dim, 0},
                {"vocab_size", &c->vocab_size, 1},
                {"seq_len", &c->seq_len, 1}};
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) {
        if (tensors_meta_int(f, ints[i].key, ints[i].lo, 1 << 24, ints[i].out, err) != 0) return -1;
    }
    const struct {
        const char *key;
        float *out;
    } floats[] = {{"norm_eps", &c->norm_eps},
                  {"attn_scale", &c->attn_scale},
                  {"embed_scale", &c->embed_scale},
                  {"attn_softcap", &c->attn_softcap},
                  {"final_softcap", &c->final_softcap}};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) {
        if (tensors_meta_float(f, floats[i].key, 0.0, 1e6, floats[i].out, err) != 0) return -1;
    }
    const char *act = tensors_meta(f, "act");
    if (!act || (strcmp(act, "silu") != 0 && strcmp(act, "gelu_tanh") != 0)) {
        return fail(err, "act is \"%s\", not \"silu\" or \"gelu_tanh\"", act ? act : "");
    }
    c->act_gelu = strcmp(act, "gelu_tanh") == 0;
    if (c->n_heads % c->n_kv_heads || c->rotary_dim % 2 || c->rotary_dim > c->head_dim) {
        return fail(err, "%d heads, %d kv heads, head_dim %d and rotary_dim %d do not fit together",
                    c->n_heads, c->n_kv_heads, c->head_dim, c->rotary_dim);
    }
    if ((long)c->n_heads * c->head_dim > 1 << 20)
        return fail(err, "%d heads of %d", c->n_heads, c->head_dim);
    c->q_dim = c->n_heads * c->head_dim;
    c->kv_dim = c->n_kv_heads * c->head_dim;
    return 0;
}

static int open_rope(Config *c, const TensorFile *f, char *err) {
    const Tensor *freq = tensors_get(f, err, "rope.inv_freq", T_F32, 2, -1, c->rotary_dim / 2);
    if (!freq) return -1;
    if (freq->shape[0] > (size_t)c->n_layers)
        return fail(err, "%zu rope tables for %d layers", freq->shape[0], c->n_layers);
    c->n_ropes = (int)freq->shape[0];
    const Tensor *scale = tensors_get(f, err, "rope.scale", T_F32, 1, c->n_ropes);
    const Tensor *rope = scale ? tensors_get(f, err, "layer.rope", T_I32, 1, c->n_layers) : NULL;
    const Tensor *window = rope ? tensors_get(f, err, "layer.window", T_I32, 1, c->n_layers) : NULL;
    if (!window) return -1;
    c->inv_freq = freq->data, c->rope_mscale = scale->data, c->rope = rope->data,
    c->window = window->data;
    for (int l = 0; l < c->n_layers; l++) {
        if (c->rope[l] < -1 || c->rope[l] >= c->n_ropes)
            return fail(err, "layer %d: no rope table %d", l, c->rope[l]);
        if (c->window[l] < 0) return fail(err, "layer %d: a window of %d", l, c->window[l]);
    }
    return 0;
}

static WType weight_type(DType t) {
    return t == T_F32    ? W_F32
           : t == T_F16  ? W_F16
           : t == T_BF16 ? W_BF16
           : t == T_I8   ? W_Q8
           : t == T_U8   ? W_Q4
                         : W_TYPES;
}

// A matrix of rows x cols in panels, see kernels.h.
static int open_matrix(Matrix *m, const TensorFile *f, const char *name, int rows, int cols,
                       char *err) {
    char scale_name[160], offset_name[160];
    const Tensor *t = tensors_find(f, name);
    if (!t) return fail(err, "tensor %s is missing", name);
    WType type = weight_type(t->dtype);
    if (type == W_TYPES)
        return fail(err, "tensor %s: weights of type %s are not supported", name,
                    dtype_name(t->dtype));
    int k = wtype_k(type), unit = type == W_Q8 || type == W_Q4 ? QGROUP : k;
    *m = (Matrix){type,    rows, cols, (rows + PANEL - 1) / PANEL, (cols + unit - 1) / unit * unit,
                  t->data, NULL, NULL};
    if (!tensors_get(f, err, name, t->dtype, 4, m->panels, m->cols_padded / k, PANEL,
                     type == W_Q4 ? 4 : k))
        return -1;
    if (unit != QGROUP) return 0;
    snprintf(scale_name, sizeof scale_name, "%s.scale", name);
    snprintf(offset_name, sizeof offset_name, "%s.offset", name);
    t = tensors_get(f, err, scale_name, T_F16, 3, m->panels, m->cols_padded / QGROUP, PANEL);
    if (!t) return -1;
    m->scale = t->data;
    if (type != W_Q4 || !tensors_find(f, offset_name)) return 0;
    t = tensors_get(f, err, offset_name, T_F16, 3, m->panels, m->cols_padded / QGROUP, PANEL);
    if (!t) return -1;
    m->offset = t->data;
    return 0;
}

static int open_vector(const float **v, const TensorFile *f, const char *name, int n, bool optional,
                       char *err) {
    *v = NULL;
    if (optional && !tensors_find(f, name)) return 0;
    const Tensor *t = tensors_get(f, err, name, T_F32, 1, n);
    if (!t) return -1;
    *v = t->data;
    return 0;
}

static int open_layer(Model *m, int l, char *err) {
    const TensorFile *f = &m->file;
    const Config *c = &m->config;
    Layer *w = &m->layers[l];
    char name[64];
    const struct {
        const char *name;
        const float **v;
        int n;
        bool optional;
    } vectors[] = {{"rms_att", &w->rms_att, c->dim, false},
                   {"rms_ffn", &w->rms_ffn, c->dim, false},
                   {"rms_att_post", &w->rms_att_post, c->dim, true},
                   {"rms_ffn_post", &w->rms_ffn_post, c->dim, true},
                   {"q_norm", &w->q_norm, c->head_dim, true},
                   {"k_norm", &w->k_norm, c->head_dim, true},
                   {"bq", &w->bq, c->q_dim, true},
                   {"bk", &w->bk, c->kv_dim, true},
                   {"bv", &w->bv, c->kv_dim, true}};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        snprintf(name, sizeof name, "layers.%d.%s", l, vectors[i].name);
        if (open_vector(vectors[i].v, f, name, vectors[i].n, vectors[i].optional, err) != 0)
            return -1;
    }
    const struct {
        const char *name;
        Matrix *m;
        int rows, cols;
    } matrices[] = {{"wq", &w->wq, c->q_dim, c->dim},      {"wk", &w->wk, c->kv_dim, c->dim},
                    {"wv", &w->wv, c->kv_dim, c->dim},     {"wo", &w->wo, c->dim, c->q_dim},
                    {"w1", &w->w1, c->hidden_dim, c->dim}, {"w2", &w->w2, c->dim, c->hidden_dim},
                    {"w3", &w->w3, c->hidden_dim, c->dim}};
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) {
        snprintf(name, sizeof name, "layers.%d.%s", l, matrices[i].name);
        if (open_matrix(matrices[i].m, f, name, matrices[i].rows, matrices[i].cols, err) != 0)
            return -1;
        m->has[matrices[i].m->type] = true;
    }
    return 0;
}

static int open_weights(Model *m, char *err) {
    const Config *c = &m->config;
    const TensorFile *f = &m->file;
    m->layers = calloc((size_t)c->n_layers, sizeof *m->layers);
    if (!m->layers) return fail(err, "out of memory for %d layers", c->n_layers);
    if (open_matrix(&m->tok_embed, f, "tok_embed", c->vocab_size, c->dim, err) != 0 ||
        open_vector(&m->rms_final, f, "rms_final", c->dim, false, err) != 0)
        return -1;
    m->wcls = m->tok_embed;
    if (tensors_find(f, "wcls") &&
        open_matrix(&m->wcls, f, "wcls", c->vocab_size, c->dim, err) != 0)
        return -1;
    m->has[m->wcls.type] = true;
    for (int l = 0; l < c->n_layers; l++) {
        if (open_layer(m, l, err) != 0) return -1;
    }
    return 0;
}

static int check_format(Model *m, char *err) {
    const char *format = tensors_meta(&m->file, "format"), *name = tensors_meta(&m->file, "name");
    if (!format || strcmp(format, "kvzip.c model 1") != 0)
        return tensors_wrong_format(&m->file, "a converted model", "kvzip.c model 1", err);
    m->fingerprint = tensors_meta(&m->file, "fingerprint");
    m->name = name ? name : "";
    return m->fingerprint ? 0 : fail(err, "the model has no fingerprint");
}

int model_open(Model *m, const char *path, char *err) {
    *m = (Model){0};
    if (tensors_open(&m->file, path, err) != 0) return -1;
    weights_advise(&m->file);
    if (check_format(m, err) == 0 && open_config(&m->config, &m->file, err) == 0 &&
        open_rope(&m->config, &m->file, err) == 0 && open_weights(m, err) == 0)
        return 0;
    model_close(m);
    return -1;
}

void model_close(Model *m) {
    tensors_close(&m->file);
    free(m->layers);
    *m = (Model){0};
}

KVShape model_kv_shape(const Model *m) {
    const Config *c = &m->config;
    return (KVShape){.n_layers = c->n_layers,
                     .n_heads = c->n_heads,
                     .n_kv_heads = c->n_kv_heads,
                     .head_dim = c->head_dim,
                     .scale = c->attn_scale,
                     .softcap = c->attn_softcap,
                     .window = c->window};
}

// ---- scratch ----

// Hands out 64-byte aligned pieces of one block; with no block yet it only counts.
static void *take(RunState *s, size_t n, size_t size) {
    void *p = s->block ? (uint8_t *)s->block + s->bytes : NULL;
    s->bytes += (n * size + 63) / 64 * 64;
    return p;
}

static Activations take_activations(RunState *s, int max_rows, int cols) {
    Activations a = {.cols = cols,
                     .stride = (cols + QGROUP - 1) / QGROUP * QGROUP,
                     .for_q8 = s->model->has[W_Q8],
                     .for_q4 = s->model->has[W_Q4]};
    size_t n = (size_t)max_rows * a.stride;
    a.x = take(s, n, sizeof *a.x);
    a.q = take(s, n, sizeof *a.q);
    a.unit = take(s, (size_t)max_rows, sizeof *a.unit);
    a.scale = take(s, n / QGROUP, sizeof *a.scale);
    a.sum = take(s, n / QGROUP, sizeof *a.sum);
    a.shift = take(s, n / QGROUP, sizeof *a.shift);
    a.q16 = take(s, n, sizeof *a.q16);
    a.unit16 = take(s, (size_t)max_rows, sizeof *a.unit16);
    return a;
}

static void take_all(RunState *s) {
    const Config *c = &s->model->config;
    size_t n = (size_t)s->max_rows;
    s->bytes = 0;
    s->x = take(s, n * c->dim, sizeof *s->x);
    s->q = take(s, n * c->q_dim, sizeof *s->q);
    s->k = take(s, n * c->kv_dim, sizeof *s->k);
    s->v = take(s, n * c->kv_dim, sizeof *s->v);
    s->add = take(s, n * c->dim, sizeof *s->add);
    s->xb = take_activations(s, s->max_rows, c->dim);
    s->att_out = take_activations(s, s->max_rows, c->q_dim);
    s->hb = take_activations(s, s->max_rows, c->hidden_dim);
    s->rest = take_activations(s, s->max_logits, c->dim);
    s->rope = take(s, n * c->n_ropes * c->rotary_dim, sizeof *s->rope);
    s->x_norm = take(s, n, sizeof *s->x_norm);
    s->pos = take(s, n, sizeof *s->pos);
    s->broken = take(s, n, sizeof *s->broken);
    s->runs = take(s, n, sizeof *s->runs);
    s->logits = take(s, (size_t)s->max_logits * c->vocab_size, sizeof *s->logits);
}

int state_open(RunState *s, const Model *m, ThreadPool *pool, int max_rows, int max_logits,
               char *err) {
    *s = (RunState){.model = m, .pool = pool, .max_rows = max_rows, .max_logits = max_logits};
    take_all(s);  // counts
    if (posix_memalign(&s->block, 64, s->bytes) != 0) {
        s->block = NULL;
        return fail(err, "out of memory: %zu MB of scratch for %d rows", s->bytes >> 20, max_rows);
    }
    memset(s->block, 0, s->bytes);  // columns after the last one stay zero
    take_all(s);
    return 0;
}

void state_close(RunState *s) {
    free(s->block);
    *s = (RunState){0};
}

// ---- matrix products ----

static void multiply_job(RunState *s, Products j) { matmul(s->pool, s->ops, &j); }

// Several matrices that read the same input, of n rows.
static void multiply(RunState *s, const Activations *x, int n, const Product *p, int n_products) {
    multiply_job(s, (Products){.x = x, .n = n, .p = p, .n_products = n_products});
}

// ---- the steps of forward ----

enum { NOT_BROKEN = INT_MAX };  // of RunState.broken

typedef struct {
    RunState *s;
    const Row *rows;
    int l;
} Step;

// fn for each of n rows; fewer than four take less time than a word to the threads.
static void each_row(RunState *s, int n, void (*fn)(void *ctx, int i), void *ctx) {
    parallel_for(n >= 4 ? s->pool : NULL, n, fn, ctx);
}

static bool is_rounded(const Activations *x) { return x->for_q8 || x->for_q4; }

// Whether none of x [n] is infinite or no number, which have all bits of the exponent set. One that
// is makes all that follows wrong, as a rule without a sign of it.
static bool all_finite(const float *x, int n) {
    const uint32_t exponent = 0x7f800000;
    uint32_t broken = 0;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        broken |= (bits & exponent) == exponent;
    }
    return !broken;
}

// Notes that layer l gave row i what is no number, unless an earlier one had. Asked before anything
// is rounded to whole numbers, which hides it.
static void check_row(RunState *s, int i, int l, const float *x, int n) {
    if (s->broken[i] == NOT_BROKEN && !all_finite(x, n)) s->broken[i] = l;
}

typedef struct {
    RunState *s;
    Activations *x;
    int l;
} Rounding;

static void quantize_row(void *ctx, int i) {
    const Rounding *r = ctx;
    check_row(r->s, i, r->l, r->x->x + (size_t)i * r->x->stride, r->x->cols);
    kern.quantize(r->x, i, i + 1);
}

// An input of products of layer l, before the first of them.
static void quantize(RunState *s, Activations *x, int n, int l) {
    if (is_rounded(x)) each_row(s, n, quantize_row, &(Rounding){s, x, l});
}

static void embed_row(void *ctx, int i) {
    const Step *st = ctx;
    const Model *m = st->s->model;
    float *x = st->s->x + (size_t)i * m->config.dim;
    for (int j = 0; j < m->config.dim; j++)
        x[j] = m->config.embed_scale * matrix_at(&m->tok_embed, st->rows[i].token, j);
}

// x = embed_scale * tok_embed[token]
static void embed(RunState *s, const Row *rows, int n) {
    each_row(s, n, embed_row, &(Step){s, rows, 0});
}

// cos and sin of a position (arXiv 2104.09864). In float32, as transformers.
static void rope_table(const Config *c, int r, int pos, float *table) {
    int half = c->rotary_dim / 2;
    for (int j = 0; j < half; j++) {
        float angle = (float)pos * c->inv_freq[r * half + j];
        table[2 * j] = cosf(angle) * c->rope_mscale[r];
        table[2 * j + 1] = sinf(angle) * c->rope_mscale[r];
    }
}

// Every row's position, one table per rope base.
static void rope_row(void *ctx, int i) {
    RunState *s = ctx;
    const Config *c = &s->model->config;
    for (int r = 0; r < c->n_ropes; r++) {
        rope_table(c, r, s->pos[i], s->rope + ((size_t)r * s->max_rows + i) * c->rotary_dim);
    }
}

static void rope_tables(RunState *s, int n) { each_row(s, n, rope_row, s); }

// The table of a row in layer l, or NULL where the layer does not rotate.
static const float *rope_of(const RunState *s, int l, int row) {
    const Config *c = &s->model->config;
    return c->rope[l] < 0 ? NULL
                          : s->rope + ((size_t)c->rope[l] * s->max_rows + row) * c->rotary_dim;
}

static void rotate(float *v, const float *table, int half) {
    for (int j = 0; j < half; j++) {
        float a = v[j], b = v[j + half], cosine = table[2 * j], sine = table[2 * j + 1];
        v[j] = a * cosine - b * sine;
        v[j + half] = b * cosine + a * sine;
    }
}

static void heads_row(float *v, int n_heads, const float *bias, const float *norm,
                      const float *rope, const Config *c) {
    for (int i = 0; bias && i < n_heads * c->head_dim; i++) v[i] += bias[i];
    for (int h = 0; h < n_heads; h++, v += c->head_dim) {
        if (norm) kern.rmsnorm(v, v, norm, c->head_dim, c->norm_eps);
        if (rope) rotate(v, rope, c->rotary_dim / 2);
    }
}

static void qkv_row(void *ctx, int i) {
    const Step *st = ctx;
    RunState *s = st->s;
    const Config *c = &s->model->config;
    const Layer *w = &s->model->layers[st->l];
    const float *rope = rope_of(s, st->l, i);
    heads_row(s->q + (size_t)i * c->q_dim, c->n_heads, w->bq, w->q_norm, rope, c);
    heads_row(s->k + (size_t)i * c->kv_dim, c->n_kv_heads, w->bk, w->k_norm, rope, c);
    heads_row(s->v + (size_t)i * c->kv_dim, c->n_kv_heads, w->bv, NULL, NULL, c);
    check_row(s, i, st->l, s->k + (size_t)i * c->kv_dim, c->kv_dim);  // the cache rounds them
    check_row(s, i, st->l, s->v + (size_t)i * c->kv_dim, c->kv_dim);
}

// q, k, v of layer l from the normed residual stream, rotated to their positions.
static void project_qkv(RunState *s, int l, int n) {
    const Config *c = &s->model->config;
    const Layer *w = &s->model->layers[l];
    const Product qkv[] = {
        {&w->wq, s->q, c->q_dim}, {&w->wk, s->k, c->kv_dim}, {&w->wv, s->v, c->kv_dim}};
    multiply(s, &s->xb, n, qkv, 3);
    each_row(s, n, qkv_row, &(Step){s, NULL, l});
}

typedef struct {
    RunState *s;
    const float *w;       // [dim] of the norm from x to xb
    bool add;             // before it, x += add,
    const float *w_post;  // or x += norm(add) where a model has such a norm (Gemma), else NULL
    int l;                // the layer that gave x; -1: the embedding
} Norm;

static void norm_row(void *ctx, int i) {
    const Norm *n = ctx;
    RunState *s = n->s;
    const Config *c = &s->model->config;
    float *x = s->x + (size_t)i * c->dim, *xb = s->xb.x + (size_t)i * s->xb.stride,
          *add = s->add + (size_t)i * c->dim;
    if (n->add) {
        if (n->w_post) kern.rmsnorm(add, add, n->w_post, c->dim, c->norm_eps);
        kern.add(x, add, c->dim);
    }
    kern.rmsnorm(xb, x, n->w, c->dim, c->norm_eps);
    check_row(s, i, n->l, xb, c->dim);
    if (is_rounded(&s->xb)) kern.quantize(&s->xb, i, i + 1);
}

// xb = norm(x), rounded to what the products read.
static void norm(RunState *s, int n, const float *w) {
    for (int i = 0; i < n; i++) s->broken[i] = NOT_BROKEN;
    each_row(s, n, norm_row, &(Norm){.s = s, .w = w, .l = -1});
}

// x += what a block of layer l gave, itself normed by w_post in models that have that; xb =
// norm(x).
static void add_norm(RunState *s, int n, int l, const float *w_post, const float *w) {
    each_row(s, n, norm_row, &(Norm){.s = s, .w = w, .w_post = w_post, .l = l, .add = true});
}

// |xb|, which KVzip+ divides by.
static void x_norm_row(void *ctx, int i) {
    RunState *s = ctx;
    const float *x = s->xb.x + (size_t)i * s->xb.stride;
    double sum = 0.0;
    for (int j = 0; j < s->model->config.dim; j++) sum += (double)x[j] * x[j];
    s->x_norm[i] = (float)sqrt(sum);
}

// att_out = softmax(scale q . k) v over what each row may see; with want_out false only the scores
// that are switched on are raised.
static void attention(RunState *s, KVCache *kv, int l, int n_runs, int n, bool want_out) {
    if (!want_out && !kv->scoring) return;
    if (kv->scoring && kv->scoring->pair_log) each_row(s, n, x_norm_row, s);
    KVQuery query = {s->q, want_out ? s->att_out.x : NULL, s->att_out.stride, s->x_norm};
    kvcache_attend(kv, l, s->runs, n_runs, &query);
}

// add = wo att_out
static void project_att(RunState *s, int l, int n) {
    const Product p = {&s->model->layers[l].wo, s->add, s->model->config.dim};
    quantize(s, &s->att_out, n, l);
    multiply(s, &s->att_out, n, &p, 1);
}

// add = w2 (act(w1 xb) * w3 xb), arXiv 2002.05202
static void ffn(RunState *s, int l, int n) {
    const Config *c = &s->model->config;
    const Layer *w = &s->model->layers[l];
    const Product gate = {&w->w1, s->hb.x, s->hb.stride}, down = {&w->w2, s->add, c->dim};
    multiply_job(s, (Products){.x = &s->xb,
                               .p = &gate,
                               .n_products = 1,
                               .n = n,
                               .up = &w->w3,
                               .up_x = &s->xb,
                               .act = c->act_gelu ? kern.gelu_mul : kern.silu_mul});
    quantize(s, &s->hb, n, l);
    multiply(s, &s->hb, n, &down, 1);
}

// Consecutive rows of one sequence make a run; returns how many, and fills in positions.
static int find_runs(RunState *s, const KVCache *kv, const Row *rows, int n) {
    int n_runs = 0;
    for (int i = 0; i < n; i++) {
        if (i == 0 || rows[i].seq != rows[i - 1].seq) s->runs[n_runs++] = (KVRun){rows[i].seq, 0};
        s->pos[i] = kv->seqs[rows[i].seq].next_pos + s->runs[n_runs - 1].n++;
    }
    return n_runs;
}

static int count_logits(const Row *rows, int n) {
    int n_logits = 0;
    for (int i = 0; i < n; i++) n_logits += rows[i].logits;
    return n_logits;
}

static int check_rows(const RunState *s, const KVCache *kv, const Row *rows, int n, char *err) {
    for (int i = 0; i < n; i++) {
        if (rows[i].token < 0 || rows[i].token >= s->model->config.vocab_size) {
            return fail(err, "token %d is not in the vocabulary of %d", rows[i].token,
                        s->model->config.vocab_size);
        }
        if (rows[i].seq < 0 || rows[i].seq >= kv->n_seqs)
            return fail(err, "no sequence %d", rows[i].seq);
    }
    int n_logits = count_logits(rows, n);
    if (n < 1 || n > s->max_rows)
        return fail(err, "%d rows, the state has room for 1 to %d", n, s->max_rows);
    if (n_logits > s->max_logits)
        return fail(err, "%d rows want logits, at most %d can", n_logits, s->max_logits);
    return 0;
}

// After the last layer's attention only rows that want logits matter: they move to the front of x
// and of att_out. Returns how many they are.
static int keep_logit_rows(RunState *s, const Row *rows, int n) {
    size_t dim = (size_t)s->model->config.dim, stride = (size_t)s->att_out.stride;
    int m = 0;
    for (size_t i = 0; i < (size_t)n; i++) {
        if (!rows[i].logits) continue;
        memmove(s->x + m * dim, s->x + i * dim, dim * sizeof *s->x);
        memmove(s->att_out.x + m * stride, s->att_out.x + i * stride, stride * sizeof *s->x);
        m++;
    }
    return m;
}

// What 8 bits have lost of xb, in 8 bits.
static void rest_row(void *ctx, int i) {
    RunState *s = ctx;
    const Activations x = activations_from(&s->xb, i);
    float *rest = s->rest.x + (size_t)i * s->rest.stride;
    for (int j = 0; j < x.cols; j++)
        rest[j] = x.x[j] - x.unit[0] * x.scale[j / QGROUP] * (float)x.q[j];
    kern.quantize(&s->rest, i, i + 1);
}

// logits = wcls xb. Logits take 16 bits of their input where layers take 8, because rounding it to
// 8 bits was the largest single error of quantized weights (docs/speed.md): as 8 bits and 8 bits of
// the rest, whose two products read a panel while it is in the cache.
static void classify(RunState *s, int n) {
    const Config *c = &s->model->config;
    const Matrix *w = &s->model->wcls;
    Product p = {w, s->logits, c->vocab_size};
    Products j = {.x = &s->xb, .p = &p, .n_products = 1, .n = n};
    if (wtype_ints(w->type) && !(kern.wide && w->type == W_Q8)) {
        each_row(s, n, rest_row, s);
        j.up = w, j.up_x = &s->rest, j.act = kern.add;
    }
    multiply_job(s, j);
    for (size_t i = 0; c->final_softcap > 0.0f && i < (size_t)n * c->vocab_size; i++)
        s->logits[i] = c->final_softcap * tanhf(s->logits[i] / c->final_softcap);
    s->n_logits = n;
}

static void logits_row(void *ctx, int i) {
    RunState *s = ctx;
    int vocab = s->model->config.vocab_size;
    check_row(s, i, s->model->config.n_layers, s->logits + (size_t)i * vocab, vocab);
}

// Whether the step of n rows gave numbers; else err names the first layer that did not.
static int check_numbers(RunState *s, int n, char *err) {
    int first = NOT_BROKEN;
    each_row(s, s->n_logits, logits_row, s);
    for (int i = 0; i < n; i++) first = min_int(first, s->broken[i]);
    if (first == NOT_BROKEN) return 0;
    char where[32];
    snprintf(where, sizeof where, "layer %d", first);
    return fail(err,
                "%s gave infinity or what is no number: damaged weights or pairs, or pairs too "
                "large for the cache's type (--kv f32)",
                first < 0                            ? "the embedding"
                : first == s->model->config.n_layers ? "the classifier"
                                                     : where);
}

// Checks the rows, groups them into runs and takes the cache pages that all layers will write.
// Returns how many runs there are, or -1 with err.
static int begin(RunState *s, KVCache *kv, const Row *rows, int n, char *err) {
    if (check_rows(s, kv, rows, n, err) != 0) return -1;
    int n_runs = find_runs(s, kv, rows, n);
    for (int r = 0; r < n_runs; r++) {
        if (kvcache_reserve(kv, s->runs[r].seq, s->runs[r].n, err) == 0) continue;
        kvcache_advance(kv, NULL, 0);  // what was reserved is wanted no more
        return -1;
    }
    return n_runs;
}

// x = x + attention(norm(x)), then x = x + ffn(norm(x)), layer by layer. Each norm stands at the
// end of the step before it: add_norm adds what a block gave and norms the sum for the block that
// comes next, while the row is in the first-level cache.
int forward(RunState *s, KVCache *kv, const Row *rows, int n, char *err) {
    const Model *m = s->model;
    const int last = m->config.n_layers - 1;
    int n_runs = begin(s, kv, rows, n, err), n_logits = count_logits(rows, n), n_rows = n;
    if (n_runs < 0) return -1;
    embed(s, rows, n);                 // x = tok_embed[token]
    rope_tables(s, n);                 // arXiv 2104.09864
    norm(s, n, m->layers[0].rms_att);  // xb = norm(x), arXiv 1910.07467
    for (int l = 0; l <= last; l++) {
        const Layer *w = &m->layers[l];
        bool scores_only = l == last && n_logits == 0;  // nothing reads what the layer gives
        project_qkv(s, l, n);                           // q, k, v = wq xb, wk xb, wv xb, rotated
        if (s->tap) s->tap(s->tap_arg, l, n);
        kvcache_append(kv, l, s->runs, n_runs, s->k, s->v);
        if (s->watch) s->watch(s->watch_arg, l, n);
        attention(s, kv, l, n_runs, n, !scores_only);  // att_out, arXiv 2305.13245
        if (l == last) n = keep_logit_rows(s, rows, n);
        if (n == 0) break;
        project_att(s, l, n);                            // add = wo att_out
        add_norm(s, n, l, w->rms_att_post, w->rms_ffn);  // x += add, xb = norm(x)
        ffn(s, l, n);                                    // add = w2 (act(w1 xb) * w3 xb)
        add_norm(s, n, l, w->rms_ffn_post, l == last ? m->rms_final : m->layers[l + 1].rms_att);
    }
    s->n_logits = 0;
    if (n > 0) classify(s, n);  // logits = wcls xb
    kvcache_advance(kv, s->runs, n_runs);
    return check_numbers(s, n_rows, err);
}

// ---- for policies ----

void model_rope(const Model *m, int l, int pos, float *rope) {
    const Config *c = &m->config;
    for (int j = 0; j < c->rotary_dim; j++) rope[j] = j % 2 ? 0.0f : 1.0f;
    if (c->rope[l] >= 0) rope_table(c, c->rope[l], pos, rope);
}

void model_rotate(const Model *m, float *v, const float *rope) {
    rotate(v, rope, m->config.rotary_dim / 2);
}

void model_unrotate(const RunState *s, int l, int row, float *v) {
    const float *table = rope_of(s, l, row);
    int half = s->model->config.rotary_dim / 2;
    if (!table) return;
    float m = s->model->config.rope_mscale[s->model->config.rope[l]], back = 1.0f / (m * m);
    for (int j = 0; j < half; j++) {
        float a = v[j], b = v[j + half], cosine = table[2 * j] * back,
              sine = table[2 * j + 1] * back;
        v[j] = a * cosine + b * sine;
        v[j + half] = b * cosine - a * sine;
    }
}

typedef struct {
    const Matrix *wo;
    int head_dim;
    float *gram;
} Gram;

static void gram_head(void *ctx, int h) {
    const Gram *g = ctx;
    int d = g->head_dim;
    float *out = g->gram + (size_t)h * d * d, row[MAX_HEAD_DIM];
    memset(out, 0, (size_t)d * d * sizeof *out);
    for (int r = 0; r < g->wo->rows; r++) {
        for (int i = 0; i < d; i++) row[i] = matrix_at(g->wo, r, h * d + i);
        for (int i = 0; i < d; i++) {
            for (int j = 0; j < d; j++) out[i * d + j] += row[i] * row[j];
        }
    }
}

void model_wo_gram(const Model *m, ThreadPool *pool, int l, float *gram) {
    Gram g = {&m->layers[l].wo, m->config.head_dim, gram};
    parallel_for(pool, m->config.n_heads, gram_head, &g);
}
