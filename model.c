// model.c: the converted file as a transformer, and forward(), its table of contents.
//
// A batch is a list of rows, each one token that continues some sequence: prefill in blocks, one
// token of decoding and eight questions at once take the same path. Weights are used where the file
// is mapped. The fact that must stay true: a row's result depends on its own sequence alone, never
// on which other rows share the batch, so blocks of any size give the same bits in every matrix
// product (OpenBLAS's, when built with it, differ in their last bits from block to block).
#define _POSIX_C_SOURCE 200809L
#include "model.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layers.h"
#include "weights.h"

// ---- opening the file ----

// Experts, which most models do not have.
static int open_experts(Config *c, const TensorFile *f, char *err) {
    int norm = 0;
    if (!tensors_meta(f, "n_experts")) return 0;
    if (tensors_meta_int(f, "n_experts", 1, MAX_EXPERTS, &c->n_experts, err) != 0 ||
        tensors_meta_int(f, "n_used", 1, c->n_experts, &c->n_used, err) != 0 ||
        tensors_meta_int(f, "expert_dim", 1, 1 << 24, &c->expert_dim, err) != 0 ||
        tensors_meta_int(f, "shared_dim", 0, 1 << 24, &c->shared_dim, err) != 0 ||
        tensors_meta_int(f, "norm_topk", 0, 1, &norm, err) != 0)
        return -1;
    c->norm_topk = norm == 1, c->dense_beside = tensors_meta(f, "dense_beside") != NULL;
    return experts_config(c, f, err);
}

// The heads of layers with a window, where they are others, and per-layer embeddings: what most
// models do not have.
static int open_window_heads(Config *c, const TensorFile *f, char *err) {
    c->window_kv_heads = c->n_kv_heads, c->window_head_dim = c->head_dim;
    if (tensors_meta(f, "window_head_dim") &&
        (tensors_meta_int(f, "window_kv_heads", 1, c->n_heads, &c->window_kv_heads, err) != 0 ||
         tensors_meta_int(f, "window_head_dim", 2, 1 << 20, &c->window_head_dim, err) != 0))
        return -1;
    if (c->n_heads % c->window_kv_heads || (long)c->n_heads * c->window_head_dim > 1 << 20)
        return fail(err, "%d heads, %d kv heads of %d in layers with a window", c->n_heads,
                    c->window_kv_heads, c->window_head_dim);
    if (!tensors_meta(f, "embed_dim")) return 0;
    return tensors_meta_int(f, "embed_dim", 1, 1 << 16, &c->embed_dim, err) != 0 ||
                   tensors_meta_float(f, "table_scale", 0.0, 1e6, &c->table_scale, err) != 0 ||
                   tensors_meta_float(f, "mix_scale", 0.0, 1e6, &c->mix_scale, err) != 0
               ? -1
               : 0;
}

// Leading dimensions that table r rotates.
static int rope_dim(const Config *c, int r) {
    return c->rope_dims ? c->rope_dims[r] : c->rotary_dim;
}

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
    c->att_gate = tensors_meta(f, "att_gate") != NULL;
    c->chunks = tensors_meta(f, "window_chunks") != NULL;
    c->route_input = tensors_meta(f, "route_input") != NULL;
    if (open_experts(c, f, err) != 0 || deltanet_config(c, f, err) != 0) return -1;
    return open_window_heads(c, f, err);
}

int open_list(const int **list, const TensorFile *f, const char *name, int n, char *err) {
    *list = NULL;
    if (!tensors_find(f, name)) return 0;
    const Tensor *t = tensors_get(f, err, name, T_I32, 1, n);
    if (!t) return -1;
    *list = t->data;
    return 0;
}

// Whose keys and values each layer reads: its own, or those of a layer before it with the same
// heads. One that keeps a state reads its own, and counts for last_owner, because it needs all
// rows.
static int open_owners(Config *c, const TensorFile *f, char *err) {
    if (open_list(&c->owner, f, "layer.owner", c->n_layers, err) != 0 ||
        open_list(&c->hidden, f, "layer.hidden", c->n_layers, err) != 0)
        return -1;
    c->last_owner = c->n_layers - 1;
    for (int l = 0; l < c->n_layers; l++) {
        int owner = c->owner ? c->owner[l] : l;
        if (owner < 0 || owner > l || (c->owner && c->owner[owner] != owner) ||
            c->window[owner] != c->window[l] || (owner != l && c->window[l] == NO_PAIRS))
            return fail(err, "layer %d cannot read the keys of layer %d", l, owner);
        if (owner == l) c->last_owner = l;
        if (c->hidden && (c->hidden[l] < 1 || c->hidden[l] > 1 << 24))
            return fail(err, "layer %d: a hidden_dim of %d", l, c->hidden[l]);
    }
    return 0;
}

// The table that rotates layer l has to fit its heads, and in layers without a window to be as long
// as rotary_dim says.
static int check_rope(const Config *c, int l, char *err) {
    bool slides = c->window[l] > 0;
    if (c->rope[l] < -1 || c->rope[l] >= c->n_ropes)
        return fail(err, "layer %d: no rope table %d", l, c->rope[l]);
    if (c->rope[l] < 0) return 0;
    int d = slides ? c->window_head_dim : c->head_dim, n = rope_dim(c, c->rope[l]);
    if (n < 0 || n % 2 || n > d || n > c->rope_size || (!slides && n != c->rotary_dim))
        return fail(err, "layer %d: a rope table of %d for heads of %d", l, n, d);
    return 0;
}

static int open_rope(Config *c, const TensorFile *f, char *err) {
    const Tensor *freq = tensors_get(f, err, "rope.inv_freq", T_F32, 2, -1, -1);
    if (!freq) return -1;
    if (freq->shape[0] > (size_t)c->n_layers || freq->shape[1] > 1 << 16)
        return fail(err, "%zu rope tables of %zu for %d layers", freq->shape[0], freq->shape[1],
                    c->n_layers);
    c->n_ropes = (int)freq->shape[0], c->rope_size = 2 * (int)freq->shape[1];
    if (open_list(&c->rope_dims, f, "rope.dims", c->n_ropes, err) != 0) return -1;
    if (!c->rope_dims && c->rope_size != c->rotary_dim)
        return fail(err, "rope tables of %d, expected %d", c->rope_size, c->rotary_dim);
    const Tensor *scale = tensors_get(f, err, "rope.scale", T_F32, 1, c->n_ropes);
    const Tensor *rope = scale ? tensors_get(f, err, "layer.rope", T_I32, 1, c->n_layers) : NULL;
    const Tensor *window = rope ? tensors_get(f, err, "layer.window", T_I32, 1, c->n_layers) : NULL;
    if (!window) return -1;
    c->inv_freq = freq->data, c->rope_mscale = scale->data, c->rope = rope->data,
    c->window = window->data;
    if (tensors_find(f, "layer.sinks")) {
        const Tensor *sinks = tensors_get(f, err, "layer.sinks", T_F32, 2, c->n_layers, c->n_heads);
        if (!sinks) return -1;
        c->sinks = sinks->data;
    }
    for (int l = 0; l < c->n_layers; l++) {
        if (check_rope(c, l, err) != 0) return -1;
        if (c->window[l] < NO_PAIRS) return fail(err, "layer %d: a window of %d", l, c->window[l]);
    }
    return open_owners(c, f, err) != 0 ? -1 : temperature_open(c, f, err);
}

static WType weight_type(DType t) {
    return t == T_F32    ? W_F32
           : t == T_F16  ? W_F16
           : t == T_BF16 ? W_BF16
           : t == T_I8   ? W_Q8
           : t == T_U8   ? W_Q4
                         : W_TYPES;
}

int open_matrix(Matrix *m, const TensorFile *f, const char *name, int rows, int cols, char *err) {
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

int open_vector(const float **v, const TensorFile *f, const char *name, int n, bool optional,
                char *err) {
    *v = NULL;
    if (optional && !tensors_find(f, name)) return 0;
    const Tensor *t = tensors_get(f, err, name, T_F32, 1, n);
    if (!t) return -1;
    *v = t->data;
    return 0;
}

int open_vectors(const LayerVector *v, size_t n, const TensorFile *f, int l, char *err) {
    for (size_t i = 0; i < n; i++) {
        char name[64];
        snprintf(name, sizeof name, "layers.%d.%s", l, v[i].name);
        if (v[i].n > INT_MAX) return fail(err, "tensor %s: %ld numbers are too many", name, v[i].n);
        if (open_vector(v[i].v, f, name, (int)v[i].n, v[i].optional, err) != 0) return -1;
    }
    return 0;
}

// Sizes of a layer's matrices.
static void size_layer(Layer *w, const Config *c, int l) {
    bool slides = c->window[l] > 0;
    w->n_kv_heads = slides ? c->window_kv_heads : c->n_kv_heads;
    w->head_dim = slides ? c->window_head_dim : c->head_dim;
    w->q_dim = c->n_heads * w->head_dim, w->kv_dim = w->n_kv_heads * w->head_dim;
    w->hidden_dim = c->hidden ? c->hidden[l] : c->hidden_dim;
}

// Whether a layer has no such matrix: one that reads another's keys and values has neither; where
// values are normed, they may be the keys.
static bool lacks(const Model *m, int l, const Matrix *x, const char *name) {
    const Config *c = &m->config;
    const Layer *w = &m->layers[l];
    if (c->owner && c->owner[l] != l && (x == &w->wk || x == &w->wv)) return true;
    return x == &w->wv && w->v_norm && !tensors_find(&m->file, name);
}

static int open_layer(Model *m, int l, char *err) {
    const TensorFile *f = &m->file;
    const Config *c = &m->config;
    Layer *w = &m->layers[l];
    char name[64];
    size_layer(w, c, l);
    const LayerVector vectors[] = {{"rms_att", &w->rms_att, c->dim, false},
                                   {"rms_ffn", &w->rms_ffn, c->dim, false},
                                   {"rms_att_post", &w->rms_att_post, c->dim, true},
                                   {"rms_ffn_post", &w->rms_ffn_post, c->dim, true},
                                   {"q_norm", &w->q_norm, w->head_dim, true},
                                   {"k_norm", &w->k_norm, w->head_dim, true},
                                   {"v_norm", &w->v_norm, w->head_dim, true},
                                   {"bq", &w->bq, w->q_dim, true},
                                   {"bk", &w->bk, w->kv_dim, true},
                                   {"bv", &w->bv, w->kv_dim, true},
                                   {"bo", &w->bo, c->dim, true},
                                   {"scale", &w->scale, 1, true}};
    if (open_vectors(vectors, sizeof vectors / sizeof *vectors, f, l, err) != 0) return -1;
    snprintf(name, sizeof name, "layers.%d.router", l);
    bool mixture = c->n_experts > 0 && tensors_find(f, name), attends = c->window[l] != NO_PAIRS;
    const struct {
        const char *name;
        Matrix *m;
        int rows, cols;
        bool of_attention;
    } matrices[] = {
        {"wq", &w->wq, w->q_dim, c->dim, true},       {"wk", &w->wk, w->kv_dim, c->dim, true},
        {"wv", &w->wv, w->kv_dim, c->dim, true},      {"wo", &w->wo, c->dim, w->q_dim, true},
        {"w1", &w->w1, w->hidden_dim, c->dim, false}, {"w2", &w->w2, c->dim, w->hidden_dim, false},
        {"w3", &w->w3, w->hidden_dim, c->dim, false}, {"wg", &w->wg, w->q_dim, c->dim, true}};
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) {
        if (matrices[i].of_attention ? !attends : mixture && !c->dense_beside) continue;
        if (matrices[i].m == &w->wg && !c->att_gate) continue;
        snprintf(name, sizeof name, "layers.%d.%s", l, matrices[i].name);
        if (lacks(m, l, matrices[i].m, name)) continue;
        if (open_matrix(matrices[i].m, f, name, matrices[i].rows, matrices[i].cols, err) != 0)
            return -1;
        m->has[matrices[i].m->type] = true;
    }
    if (!attends && deltanet_open(m, l, err) != 0) return -1;
    if (mixture && experts_open(m, l, err) != 0) return -1;
    return c->embed_dim > 0 ? layer_embed_open(m, l, err) : 0;
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
    if (c->embed_dim > 0 && layer_embed_open_table(m, err) != 0) return -1;
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
    if (check_format(m, err) == 0 && open_config(&m->config, &m->file, err) == 0) {
        // Large pages of experts would bring their neighbours' weights along.
        if (m->config.n_experts == 0) weights_advise(&m->file);
        if (open_rope(&m->config, &m->file, err) == 0 && open_weights(m, err) == 0) return 0;
    }
    model_close(m);
    return -1;
}

void model_close(Model *m) {
    tensors_close(&m->file);
    free(m->layers);
    *m = (Model){0};
}

int layer_matrices(const Layer *w, const Matrix *all[LAYER_MATRICES]) {
    const Experts *e = &w->experts;
    const Delta *d = &w->delta;
    const Matrix *may[] = {
        &d->qkv,       &d->z,         &d->a,          &d->b,         &d->out,     &w->wq,
        &w->wk,        &w->wv,        &w->wo,         &w->wg,        &w->w1,      &w->w2,
        &w->w3,        &e->w1,        &e->w2,         &e->w3,        &e->router,  &e->shared[0],
        &e->shared[1], &e->shared[2], &w->embed.gate, &w->embed.mix, &w->embed.up};
    int n = 0;
    for (size_t i = 0; i < sizeof may / sizeof *may; i++)
        if (may[i]->data) all[n++] = may[i];
    return n;
}

KVShape model_kv_shape(const Model *m) {
    const Config *c = &m->config;
    return (KVShape){.n_layers = c->n_layers,
                     .n_heads = c->n_heads,
                     .n_kv_heads = c->n_kv_heads,
                     .head_dim = c->head_dim,
                     .scale = c->attn_scale,
                     .softcap = c->attn_softcap,
                     .window = c->window,
                     .chunks = c->chunks,
                     .state = c->delta.k_heads > 0 ? delta_state(&c->delta) : 0,
                     .window_kv_heads = c->window_kv_heads,
                     .window_head_dim = c->window_head_dim,
                     .owner = c->owner,
                     .sinks = c->sinks};
}

// ---- scratch ----

void *take(RunState *s, size_t n, size_t size) {
    void *p = s->block ? (uint8_t *)s->block + s->bytes : NULL;
    s->bytes += (n * size + 63) / 64 * 64;
    return p;
}

Activations take_activations(RunState *s, int max_rows, int cols) {
    Activations a = {.cols = cols,
                     .stride = (cols + QGROUP - 1) / QGROUP * QGROUP,
                     .for_q8 = s->model->has[W_Q8],
                     .for_q4 = s->model->has[W_Q4],
                     .for_halves = s->model->has[W_F16] || s->model->has[W_BF16],
                     .tiled = s->tiled};
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

// The largest sizes of a layer.
static Layer most_of(const Model *m) {
    Layer most = m->layers[0];
    for (const Layer *w = m->layers; w < m->layers + m->config.n_layers; w++) {
        most.q_dim = max_int(most.q_dim, w->q_dim), most.kv_dim = max_int(most.kv_dim, w->kv_dim);
        most.hidden_dim = max_int(most.hidden_dim, w->hidden_dim);
    }
    return most;
}

static void take_all(RunState *s) {
    const Config *c = &s->model->config;
    size_t n = (size_t)s->max_rows;
    const Layer most = most_of(s->model);
    s->bytes = 0;
    s->x = take(s, n * c->dim, sizeof *s->x);
    s->q = take(s, n * most.q_dim, sizeof *s->q);
    s->k = take(s, n * most.kv_dim, sizeof *s->k);
    s->v = take(s, n * most.kv_dim, sizeof *s->v);
    s->add = take(s, n * c->dim, sizeof *s->add);
    s->tiled = take(s, n, sizeof *s->tiled);
    s->xb = take_activations(s, s->max_rows, c->dim);
    s->att_out = take_activations(s, s->max_rows, most.q_dim);
    s->hb = take_activations(s, s->max_rows, most.hidden_dim);
    if (c->att_gate) s->gate = take(s, n * most.q_dim, sizeof *s->gate);
    deltanet_take(s);
    experts_take(s);
    s->rest = take_activations(s, s->max_logits, c->dim);
    s->rope = take(s, n * c->n_ropes * c->rope_size, sizeof *s->rope);
    s->x_norm = take(s, n, sizeof *s->x_norm);
    s->pos = take(s, n, sizeof *s->pos);
    s->broken = take(s, n, sizeof *s->broken);
    s->runs = take(s, n, sizeof *s->runs);
    s->rows = take(s, n, sizeof *s->rows);
    s->reading = take(s, n, sizeof *s->reading);
    if (c->embed_dim > 0) layer_embed_take(s);
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

void multiply(RunState *s, const Activations *x, int n, const Product *p, int n_products) {
    multiply_job(s, (Products){.x = x, .n = n, .p = p, .n_products = n_products});
}

// ---- the steps of forward ----

enum { NOT_BROKEN = INT_MAX };  // of RunState.broken

typedef struct {
    RunState *s;
    int l;
} Step;

// Fewer than four rows take less time than a word to the threads.
void each_row(RunState *s, int n, void (*fn)(void *ctx, int i), void *ctx) {
    parallel_for(n >= 4 ? s->pool : NULL, n, fn, ctx);
}

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

void check_row(RunState *s, int i, int l, const float *x, int n) {
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
    activations_round(r->x, i);
}

void quantize(RunState *s, Activations *x, int n, int l) {
    if (activations_rounded(x)) each_row(s, n, quantize_row, &(Rounding){s, x, l});
}

static void embed_row(void *ctx, int i) {
    const Step *st = ctx;
    const Model *m = st->s->model;
    float *x = st->s->x + (size_t)i * m->config.dim;
    for (int j = 0; j < m->config.dim; j++)
        x[j] = m->config.embed_scale * matrix_at(&m->tok_embed, st->s->rows[i].token, j);
}

// x = embed_scale * tok_embed[token]
static void embed(RunState *s, int n) {
    each_row(s, n, embed_row, &(Step){s, 0});
    if (s->model->config.embed_dim > 0) layer_embed_begin(s, n);
}

// cos and sin of a position (arXiv 2104.09864). In float32, as transformers.
static void rope_table(const Config *c, int r, int pos, float *table) {
    for (int j = 0; j < rope_dim(c, r) / 2; j++) {
        float angle = (float)pos * c->inv_freq[r * (c->rope_size / 2) + j];
        table[2 * j] = cosf(angle) * c->rope_mscale[r];
        table[2 * j + 1] = sinf(angle) * c->rope_mscale[r];
    }
}

// Every row's position, one table per rope base.
static void rope_row(void *ctx, int i) {
    RunState *s = ctx;
    const Config *c = &s->model->config;
    for (int r = 0; r < c->n_ropes; r++) {
        rope_table(c, r, s->pos[i], s->rope + ((size_t)r * s->max_rows + i) * c->rope_size);
    }
}

static void rope_tables(RunState *s, int n) { each_row(s, n, rope_row, s); }

// The table of a row in layer l, or NULL where the layer does not rotate.
static const float *rope_of(const RunState *s, int l, int row) {
    const Config *c = &s->model->config;
    return c->rope[l] < 0 ? NULL
                          : s->rope + ((size_t)c->rope[l] * s->max_rows + row) * c->rope_size;
}

static void rotate(float *v, const float *table, int half) {
    for (int j = 0; j < half; j++) {
        float a = v[j], b = v[j + half], cosine = table[2 * j], sine = table[2 * j + 1];
        v[j] = a * cosine - b * sine;
        v[j + half] = b * cosine + a * sine;
    }
}

// What is done to q, k or v of a row: bias, norm and rotation, each where there is one.
typedef struct {
    int n, head_dim;
    const float *bias, *norm, *rope;
    int half;  // dimensions that rotate, halved
} Heads;

static void heads_row(float *v, const Heads *h, float norm_eps) {
    for (int i = 0; h->bias && i < h->n * h->head_dim; i++) v[i] += h->bias[i];
    for (int i = 0; i < h->n; i++, v += h->head_dim) {
        if (h->norm) kern.rmsnorm(v, v, h->norm, h->head_dim, norm_eps);
        if (h->rope) rotate(v, h->rope, h->half);
    }
}

static void qkv_row(void *ctx, int i) {
    const Step *st = ctx;
    RunState *s = st->s;
    const Config *c = &s->model->config;
    const Layer *w = &s->model->layers[st->l];
    const float *rope = rope_of(s, st->l, i);
    int half = rope ? rope_dim(c, c->rope[st->l]) / 2 : 0, d = w->head_dim, n = w->n_kv_heads;
    float *k = s->k + (size_t)i * w->kv_dim, *v = s->v + (size_t)i * w->kv_dim;
    heads_row(s->q + (size_t)i * w->q_dim, &(Heads){c->n_heads, d, w->bq, w->q_norm, rope, half},
              c->norm_eps);
    temperature_apply(s->model, st->l, s->pos[i], s->q + (size_t)i * w->q_dim);
    if (!w->wk.data) return;
    if (!w->wv.data) memcpy(v, k, (size_t)w->kv_dim * sizeof *v);
    heads_row(k, &(Heads){n, d, w->bk, w->k_norm, rope, half}, c->norm_eps);
    heads_row(v, &(Heads){n, d, w->bv, w->v_norm, NULL, 0}, c->norm_eps);
    check_row(s, i, st->l, k, w->kv_dim);  // the cache rounds them
    check_row(s, i, st->l, v, w->kv_dim);
}

// q, k, v of layer l from the normed residual stream, rotated to their positions.
static void project_qkv(RunState *s, int l, int n) {
    const Layer *w = &s->model->layers[l];
    const Product all[] = {{&w->wq, s->q, w->q_dim},
                           {&w->wk, s->k, w->kv_dim},
                           {&w->wv, s->v, w->kv_dim},
                           {&w->wg, s->gate, w->q_dim}};
    Product there[4];
    int n_there = 0;
    for (int i = 0; i < 4; i++)
        if (all[i].w->data) there[n_there++] = all[i];
    multiply(s, &s->xb, n, there, n_there);
    each_row(s, n, qkv_row, &(Step){s, l});
}

typedef struct {
    RunState *s;
    const float *w;       // [dim] of the norm from x to xb; NULL: xb = x
    bool add;             // before it, x += add,
    const float *w_post;  // or x += norm(add) where a model has such a norm (Gemma), else NULL
    const float *scale;   // [1] and x *= scale, or NULL
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
        if (n->scale) kern.scale(x, *n->scale, c->dim);
    }
    if (n->w)
        kern.rmsnorm(xb, x, n->w, c->dim, c->norm_eps);
    else
        memcpy(xb, x, (size_t)c->dim * sizeof *x);
    check_row(s, i, n->l, xb, c->dim);
    activations_round(&s->xb, i);
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

// The same at the end of layer l, which may have an embedding and a scale of its own; w: the next
// norm.
static void end_layer(RunState *s, int n, int l, const float *w) {
    const Layer *layer = &s->model->layers[l];
    const float *w_post = layer->rms_ffn_post;
    if (layer->embed.gate.data) {
        add_norm(s, n, l, w_post, NULL);  // xb = x
        layer_embed(s, l, n);
        w_post = layer->embed.rms;
    }
    // Logits take more bits of their input.
    if (l == s->model->config.n_layers - 1) memset(s->tiled, false, (size_t)n);
    each_row(s, n, norm_row,
             &(Norm){.s = s, .w = w, .w_post = w_post, .scale = layer->scale, .l = l, .add = true});
}

// |xb|, which KVzip+ divides by.
static void x_norm_row(void *ctx, int i) {
    RunState *s = ctx;
    const float *x = s->xb.x + (size_t)i * s->xb.stride;
    double sum = 0.0;
    for (int j = 0; j < s->model->config.dim; j++) sum += (double)x[j] * x[j];
    s->x_norm[i] = (float)sqrt(sum);
}

static void gate_row(void *ctx, int i) {
    RunState *s = ctx;
    int q_dim = s->att_out.cols;
    float *out = s->att_out.x + (size_t)i * s->att_out.stride;
    const float *gate = s->gate + (size_t)i * q_dim;
    for (int j = 0; j < q_dim; j++) out[j] /= 1.0f + expf(-gate[j]);
}

// Gives an input of products the columns of the layer at hand.
static void resize(const RunState *s, Activations *x, int cols) {
    if (x->cols == cols) return;
    x->cols = cols, x->stride = (cols + QGROUP - 1) / QGROUP * QGROUP;
    for (size_t i = 0; cols < x->stride && i < (size_t)s->max_rows; i++)
        memset(x->x + i * x->stride + cols, 0, (size_t)(x->stride - cols) * sizeof *x->x);
}

// att_out = softmax(scale q . k) v over what each row may see; with want_out false only the scores
// that are switched on are raised.
static void attention(RunState *s, KVCache *kv, int l, int n, bool want_out) {
    if (!want_out && !kv->scoring) return;
    if (kv->scoring && kv->scoring->pair_log) each_row(s, n, x_norm_row, s);
    resize(s, &s->att_out, s->model->layers[l].q_dim);
    KVQuery query = {s->q, want_out ? s->att_out.x : NULL, s->att_out.stride, s->x_norm};
    kvcache_attend(kv, l, s->reading, s->n_reading, &query);
    if (want_out && s->model->layers[l].wg.data) each_row(s, n, gate_row, s);
}

// What the block of layer l that looks at the past gives: attention, or a delta net.
static Activations *looked_up(RunState *s, int l) {
    return s->model->layers[l].delta.qkv.data ? &s->delta.out : &s->att_out;
}

static void bias_row(void *ctx, int i) {
    const Step *st = ctx;
    int dim = st->s->model->config.dim;
    kern.add(st->s->add + (size_t)i * dim, st->s->model->layers[st->l].bo, dim);
}

// add = wo att_out + bo
static void project_att(RunState *s, int l, int n) {
    const Layer *w = &s->model->layers[l];
    const Product p = {w->delta.qkv.data ? &w->delta.out : &w->wo, s->add, s->model->config.dim};
    quantize(s, looked_up(s, l), n, l);
    multiply(s, looked_up(s, l), n, &p, 1);
    if (w->bo) each_row(s, n, bias_row, &(Step){s, l});
}

// add = w2 (act(w1 xb) * w3 xb), arXiv 2002.05202
static void dense_ffn(RunState *s, int l, int n) {
    const Config *c = &s->model->config;
    const Layer *w = &s->model->layers[l];
    resize(s, &s->hb, w->hidden_dim);
    const Product gate = {&w->w1, s->hb.x, s->hb.stride}, down = {&w->w2, s->add, c->dim};
    multiply_job(s, (Products){.x = &s->xb,
                               .p = &gate,
                               .n_products = 1,
                               .n = n,
                               .up = &w->w3,
                               .up_x = &s->xb,
                               .act = gated_act(c)});
    quantize(s, &s->hb, n, l);
    multiply(s, &s->hb, n, &down, 1);
}

// The same, or a sum of such experts, or both
static void ffn(RunState *s, int l, int n) {
    const Layer *w = &s->model->layers[l];
    if (w->w1.data) dense_ffn(s, l, n);
    if (w->experts.router.data) experts_ffn(s, l, n);
}

// Consecutive rows of one sequence make a run; returns how many, and fills in positions.
static int find_runs(RunState *s, const KVCache *kv, const Row *rows, int n) {
    int n_runs = 0;
    for (int i = 0; i < n; i++) {
        if (i == 0 || rows[i].seq != rows[i - 1].seq) s->runs[n_runs++] = (KVRun){rows[i].seq, 0};
        s->pos[i] = kv->seqs[rows[i].seq].next_pos + s->runs[n_runs - 1].n++;
    }
    for (int r = 0, i = 0; r < n_runs; i += s->runs[r++].n)
        memset(s->tiled + i, s->runs[r].n >= KV_LONG_RUN, (size_t)s->runs[r].n);
    memcpy(s->rows, rows, (size_t)n * sizeof *rows);
    memcpy(s->reading, s->runs, (size_t)n_runs * sizeof *s->runs);
    s->n_reading = n_runs;
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

// Row i takes the place of row `to`, after the block of layer l that looks at the past.
static void move_row(RunState *s, int l, size_t to, size_t i) {
    const Activations *out = looked_up(s, l);
    size_t dim = (size_t)s->model->config.dim, stride = (size_t)out->stride;
    if (to == i) return;
    memmove(s->x + to * dim, s->x + i * dim, dim * sizeof *s->x);
    memmove(out->x + to * stride, out->x + i * stride, stride * sizeof *s->x);
    s->rows[to] = s->rows[i], s->pos[to] = s->pos[i], s->tiled[to] = s->tiled[i];
    if (s->embed.x)
        memcpy(s->embed.x + to * s->embed.stride, s->embed.x + i * s->embed.stride,
               dim * sizeof *s->x);
}

// After that block of layer l only rows that want logits matter: they move to the front. Where l is
// not the last layer those behind them in their runs stay too, for which layers that write no pairs
// are still to come: rows at a run's end find theirs. Returns how many stay.
static int keep_rows(RunState *s, int l) {
    bool behind = l < s->model->config.n_layers - 1;
    int m = 0, n_reading = 0, i = 0;
    for (int r = 0; r < s->n_reading; r++) {
        KVRun run = s->reading[r], kept = {run.seq, 0};
        for (int end = i + run.n; i < end; i++) {
            if (!s->rows[i].logits && !(behind && kept.n > 0)) continue;
            move_row(s, l, (size_t)m++, (size_t)i);
            kept.n++;
        }
        if (kept.n > 0) s->reading[n_reading++] = kept;
    }
    s->n_reading = n_reading;
    return m;
}

// Once no layer is to come that writes pairs, nor rows score: the rest is computed for the rows
// alone that want logits, and those behind them.
static int keep_asked(RunState *s, int l, int n) {
    int m = keep_rows(s, l);
    if (m == n) return n;
    rope_tables(s, m);
    if (s->embed.x) quantize(s, &s->embed, m, -1);
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
    const int last = m->config.n_layers - 1, last_owner = m->config.last_owner;
    int n_runs = begin(s, kv, rows, n, err), n_logits = count_logits(rows, n), n_rows = n;
    if (n_runs < 0) return -1;
    embed(s, n);                       // x = tok_embed[token]
    rope_tables(s, n);                 // arXiv 2104.09864
    norm(s, n, m->layers[0].rms_att);  // xb = norm(x), arXiv 1910.07467
    for (int l = 0; l <= last; l++) {
        const Layer *w = &m->layers[l];
        // Few rows go on, if any; all do where rows score, or a reader chooses by them.
        bool whole = kv->scoring || kv->reading.reader;
        bool ends = l == last || (l == last_owner && !whole);
        if (w->delta.qkv.data) {
            deltanet(s, kv, l, n_runs, n);  // delta.out, arXiv 2412.06464
        } else {
            project_qkv(s, l, n);  // q, k, v = wq xb, wk xb, wv xb, rotated
            if (w->wk.data) {      // else the layer reads another one's keys
                if (s->tap) s->tap(s->tap_arg, l, n);
                kvcache_append(kv, l, s->runs, n_runs, s->k, s->v);
                if (s->watch) s->watch(s->watch_arg, l, n);
            }
            attention(s, kv, l, n, !ends || n_logits > 0);  // att_out, arXiv 2305.13245
        }
        if (ends) n = l == last ? keep_rows(s, l) : keep_asked(s, l, n);
        if (n == 0) break;
        project_att(s, l, n);                            // add = wo att_out
        add_norm(s, n, l, w->rms_att_post, w->rms_ffn);  // x += add, xb = norm(x)
        ffn(s, l, n);                                    // add = w2 (act(w1 xb) * w3 xb)
        end_layer(s, n, l, l == last ? m->rms_final : m->layers[l + 1].rms_att);  // x += add, ..
    }
    s->n_logits = 0;
    if (n > 0) classify(s, n);  // logits = wcls xb
    kvcache_advance(kv, s->runs, n_runs);
    return check_numbers(s, n_rows, err);
}

// ---- for policies ----

void model_rope(const Model *m, int l, int pos, float *rope) {
    const Config *c = &m->config;
    int n = c->rope[l] < 0 ? c->rotary_dim : rope_dim(c, c->rope[l]);
    for (int j = 0; j < n; j++) rope[j] = j % 2 ? 0.0f : 1.0f;
    if (c->rope[l] >= 0) rope_table(c, c->rope[l], pos, rope);
}

void model_rotate(const Model *m, float *v, const float *rope) {
    rotate(v, rope, m->config.rotary_dim / 2);
}

void model_unrotate(const RunState *s, int l, int row, float *v) {
    const float *table = rope_of(s, l, row);
    if (!table) return;
    int half = rope_dim(&s->model->config, s->model->config.rope[l]) / 2;
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
