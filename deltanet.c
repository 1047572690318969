// deltanet.c: a layer that remembers the past in a state of fixed size instead of pairs.
//
// Each head has a matrix S, in which keys lead to values. A token lets S decay, reads what its key
// leads to, moves that towards its own value, and reads what its query leads to; q, k and v come
// out of a short convolution over the last tokens. So a sequence's state is S and the convolution's
// last inputs (kvcache_state), and no step can be undone: who wants to go back keeps a mark.
//
// The recurrence runs token by token in long prompts as well. Chunks of tokens as matrix products
// (arXiv 2406.06484) are how a GPU keeps busy; here a head's columns are independent and stay in
// the first-level cache, the chunks' products would take more operations than they save, and how a
// prompt is cut into blocks would change its bits. What must stay true: it does not.
#include "deltanet.h"

#include <stdio.h>
#include <string.h>

#include "layers.h"

static int up_16(int n) { return (n + 15) / 16 * 16; }

// Floats before the first S.
static int conv_floats(const DeltaShape *d) { return up_16((d->conv - 1) * delta_channels(d)); }

static int head_floats(const DeltaShape *d) { return up_16(d->v_dim) * d->k_dim; }

int delta_state(const DeltaShape *d) { return conv_floats(d) + d->v_heads * head_floats(d); }

// ---- opening ----

int deltanet_config(Config *c, const TensorFile *f, char *err) {
    DeltaShape *d = &c->delta;
    if (!tensors_meta(f, "delta_k_heads")) return 0;
    if (tensors_meta_int(f, "delta_k_heads", 1, 1 << 10, &d->k_heads, err) != 0 ||
        tensors_meta_int(f, "delta_v_heads", 1, 1 << 10, &d->v_heads, err) != 0 ||
        tensors_meta_int(f, "delta_k_dim", 4, 1 << 10, &d->k_dim, err) != 0 ||
        tensors_meta_int(f, "delta_v_dim", 1, 1 << 10, &d->v_dim, err) != 0 ||
        tensors_meta_int(f, "delta_conv", 2, MAX_CONV, &d->conv, err) != 0)
        return -1;
    d->tiled = tensors_meta(f, "delta_tiled") != NULL;
    if (d->v_heads % d->k_heads || d->k_dim % 4)
        return fail(err, "delta nets of %d key heads of %d and %d value heads do not fit together",
                    d->k_heads, d->k_dim, d->v_heads);
    if ((long)head_floats(d) * d->v_heads > 1 << 26)
        return fail(err, "a state of %ld floats a layer", (long)head_floats(d) * d->v_heads);
    return 0;
}

int deltanet_open(Model *m, int l, char *err) {
    const DeltaShape *d = &m->config.delta;
    Delta *w = &m->layers[l].delta;
    int dim = m->config.dim, v = delta_v_total(d), heads = d->v_heads;
    char name[64];
    const struct {
        const char *name;
        Matrix *m;
        int rows, cols;
    } matrices[] = {{"qkv", &w->qkv, delta_channels(d), dim},
                    {"z", &w->z, v, dim},
                    {"a", &w->a, heads, dim},
                    {"b", &w->b, heads, dim},
                    {"out", &w->out, dim, v}};
    if (d->k_heads == 0)
        return fail(err, "layer %d keeps a state, and the file has no shape of it", l);
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) {
        snprintf(name, sizeof name, "layers.%d.delta.%s", l, matrices[i].name);
        if (open_matrix(matrices[i].m, &m->file, name, matrices[i].rows, matrices[i].cols, err) !=
            0)
            return -1;
        m->has[matrices[i].m->type] = true;
    }
    snprintf(name, sizeof name, "layers.%d.delta.conv", l);
    const Tensor *conv = tensors_get(&m->file, err, name, T_F32, 2, d->conv, delta_channels(d));
    if (!conv) return -1;
    w->conv = conv->data;
    const LayerVector vectors[] = {{"delta.decay", &w->decay, heads, false},
                                   {"delta.dt", &w->dt, heads, false},
                                   {"delta.norm", &w->norm, d->v_dim, false}};
    return open_vectors(vectors, sizeof vectors / sizeof *vectors, &m->file, l, err);
}

void deltanet_take(RunState *s) {
    const DeltaShape *d = &s->model->config.delta;
    DeltaRows *r = &s->delta;
    size_t n = (size_t)s->max_rows;
    if (d->k_heads == 0) return;
    r->qkv = take(s, n * (size_t)delta_channels(d), sizeof *r->qkv);
    r->z = take(s, n * (size_t)delta_v_total(d), sizeof *r->z);
    r->a = take(s, n * (size_t)d->v_heads, sizeof *r->a);
    r->b = take(s, n * (size_t)d->v_heads, sizeof *r->b);
    r->out = take_activations(s, s->max_rows, delta_v_total(d));
}

// ---- the steps ----

typedef struct {
    RunState *s;
    KVCache *kv;
    int l;
} Step;

// A run of the batch, the row it begins at and its sequence's state in the layer.
typedef struct {
    int row, n;
    float *state;
} Stretch;

static Stretch stretch_of(const Step *st, int r) {
    const KVRun *runs = st->s->runs;
    int row = 0;
    for (int i = 0; i < r; i++) row += runs[i].n;
    return (Stretch){row, runs[r].n, kvcache_state(st->kv, runs[r].seq, st->l)};
}

enum { BLOCK_CHANNELS = 64 };

static int conv_blocks(const DeltaShape *d) {
    return (delta_channels(d) + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
}

// Each channel becomes the silu of a weighted sum of its last inputs, in place: the rows of a run,
// some channels of them.
static void conv_unit(void *ctx, int unit) {
    const Step *st = ctx;
    const DeltaShape *d = &st->s->model->config.delta;
    const Delta *w = &st->s->model->layers[st->l].delta;
    int channels = delta_channels(d), first = unit % conv_blocks(d) * BLOCK_CHANNELS;
    int n = min_int(BLOCK_CHANNELS, channels - first), old = d->conv - 1;
    Stretch r = stretch_of(st, unit / conv_blocks(d));
    float past[MAX_CONV][BLOCK_CHANNELS], ones[BLOCK_CHANNELS];
    for (int j = 0; j < n; j++) ones[j] = 1;
    for (int i = 0; i < old; i++)
        memcpy(past[i], r.state + i * channels + first, (size_t)n * sizeof(float));
    for (int t = 0; t < r.n; t++) {
        float *x = st->s->delta.qkv + (size_t)(r.row + t) * channels + first;
        memcpy(past[old], x, (size_t)n * sizeof *x);
        memset(x, 0, (size_t)n * sizeof *x);
        for (int i = 0; i < d->conv; i++)
            for (int j = 0; j < n; j++) x[j] += w->conv[i * channels + first + j] * past[i][j];
        kern.silu_mul(x, ones, n);
        memmove(past[0], past[1], (size_t)old * sizeof *past);
    }
    for (int i = 0; i < old; i++)
        memcpy(r.state + i * channels + first, past[i], (size_t)n * sizeof(float));
}

// x [n] = factor * x / |x|
static void unit_length(float *x, int n, float factor) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    kern.scale(x, factor / sqrtf(sum + 1e-6f), n);
}

static float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// q and k of a row to the length they are used in, its decays and betas.
static void gates_row(void *ctx, int i) {
    const Step *st = ctx;
    const DeltaShape *d = &st->s->model->config.delta;
    const Delta *w = &st->s->model->layers[st->l].delta;
    DeltaRows *r = &st->s->delta;
    float *q = r->qkv + (size_t)i * delta_channels(d), *k = q + delta_k_total(d);
    for (int h = 0; h < d->k_heads; h++, q += d->k_dim, k += d->k_dim) {
        unit_length(q, d->k_dim, 1.0f / sqrtf((float)d->k_dim));
        unit_length(k, d->k_dim, 1.0f);
    }
    float *a = r->a + (size_t)i * d->v_heads, *b = r->b + (size_t)i * d->v_heads;
    for (int h = 0; h < d->v_heads; h++) {
        a[h] = expf(w->decay[h] * softplus(a[h] + w->dt[h]));
        b[h] = 1.0f / (1.0f + expf(-b[h]));
    }
}

// One head over the rows of a run.
static void head_unit(void *ctx, int unit) {
    const Step *st = ctx;
    const DeltaShape *d = &st->s->model->config.delta;
    DeltaRows *rows = &st->s->delta;
    int h = unit % d->v_heads, channels = delta_channels(d);
    Stretch r = stretch_of(st, unit / d->v_heads);
    float *qkv = rows->qkv + (size_t)r.row * channels;
    int k_head = d->tiled ? h % d->k_heads : h / (d->v_heads / d->k_heads);
    float *q = qkv + k_head * d->k_dim;
    size_t gate = (size_t)r.row * d->v_heads + h, stride = (size_t)rows->out.stride;
    kern.delta_rule(&(DeltaRule){.s = r.state + conv_floats(d) + h * head_floats(d),
                                 .n = r.n,
                                 .k_dim = d->k_dim,
                                 .v_dim = d->v_dim,
                                 .q = q,
                                 .k = q + delta_k_total(d),
                                 .v = qkv + 2 * delta_k_total(d) + h * d->v_dim,
                                 .decay = rows->a + gate,
                                 .beta = rows->b + gate,
                                 .out = rows->out.x + r.row * stride + h * d->v_dim,
                                 .ld = (size_t)channels,
                                 .ld_gate = (size_t)d->v_heads,
                                 .ld_out = stride});
}

// out = norm(out) * silu(z), head by head.
static void out_row(void *ctx, int i) {
    const Step *st = ctx;
    const Config *c = &st->s->model->config;
    const DeltaShape *d = &c->delta;
    DeltaRows *r = &st->s->delta;
    float *out = r->out.x + (size_t)i * r->out.stride, *z = r->z + (size_t)i * delta_v_total(d);
    for (int h = 0; h < d->v_heads; h++, out += d->v_dim, z += d->v_dim) {
        kern.rmsnorm(out, out, st->s->model->layers[st->l].delta.norm, d->v_dim, c->norm_eps);
        kern.silu_mul(z, out, d->v_dim);
        memcpy(out, z, (size_t)d->v_dim * sizeof *out);
    }
}

void deltanet(RunState *s, KVCache *kv, int l, int n_runs, int n) {
    const DeltaShape *d = &s->model->config.delta;
    const Delta *w = &s->model->layers[l].delta;
    const Product p[] = {{&w->qkv, s->delta.qkv, delta_channels(d)},
                         {&w->z, s->delta.z, delta_v_total(d)},
                         {&w->a, s->delta.a, d->v_heads},
                         {&w->b, s->delta.b, d->v_heads}};
    Step st = {s, kv, l};
    multiply(s, &s->xb, n, p, 4);
    parallel_for(s->pool, n_runs * conv_blocks(d), conv_unit, &st);
    each_row(s, n, gates_row, &st);
    parallel_for(s->pool, n_runs * d->v_heads, head_unit, &st);
    each_row(s, n, out_row, &st);
}
