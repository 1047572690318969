// layerembed.c: per-layer embeddings (Gemma 4): what a layer adds of its own for each token.
//
//   own = (norm(mix embedding) + table[token][layer]) / sqrt(2)       [embed_dim]
//   x  += norm(up (act(gate x) * own))
//
// The table is the largest part of a small model, and a token reads one row of it. So that the row
// lies together in the file, whose panels are of 16 rows, a row of the table is a panel: element j
// of it stands in row j / columns of the panel. What must stay true: nothing reads the table but
// the rows of tokens, so that all others stay on the disk.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "layers.h"
#include "weights.h"

int layer_embed_open_table(Model *m, char *err) {
    const Config *c = &m->config;
    long row = (long)c->n_layers * c->embed_dim;
    if (row % PANEL || row > 1 << 24)
        return fail(err, "%d layers with embeddings of %d", c->n_layers, c->embed_dim);
    if (open_matrix(&m->embed_table, &m->file, "embed_table", c->vocab_size * PANEL,
                    (int)row / PANEL, err) != 0)
        return -1;
    const Tensor *t = tensors_find(&m->file, "embed_table");
    weights_cold(&m->file, t->data, t->bytes);
    return open_vector(&m->rms_embed, &m->file, "rms_embed", c->embed_dim, false, err);
}

int layer_embed_open(Model *m, int l, char *err) {
    const Config *c = &m->config;
    LayerEmbed *e = &m->layers[l].embed;
    char name[64];
    const struct {
        const char *name;
        Matrix *m;
        int rows, cols;
    } matrices[] = {{"gate", &e->gate, c->embed_dim, c->dim},
                    {"mix", &e->mix, c->embed_dim, c->dim},
                    {"up", &e->up, c->dim, c->embed_dim}};
    for (int i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "layers.%d.embed.%s", l, matrices[i].name);
        if (open_matrix(matrices[i].m, &m->file, name, matrices[i].rows, matrices[i].cols, err) !=
            0)
            return -1;
        m->has[matrices[i].m->type] = true;
    }
    const LayerVector norm = {"rms_embed", &e->rms, c->dim, false};
    return open_vectors(&norm, 1, &m->file, l, err);
}

void layer_embed_take(RunState *s) {
    const Config *c = &s->model->config;
    s->embed = take_activations(s, s->max_rows, c->dim);
    s->embed_h = take_activations(s, s->max_rows, c->embed_dim);
    s->mix = take(s, (size_t)s->max_rows * c->embed_dim, sizeof *s->mix);
}

void layer_embed_begin(RunState *s, int n) {
    size_t dim = (size_t)s->model->config.dim;
    for (size_t i = 0; i < (size_t)n; i++)
        memcpy(s->embed.x + i * s->embed.stride, s->x + i * dim, dim * sizeof *s->x);
    quantize(s, &s->embed, n, -1);
}

typedef struct {
    RunState *s;
    int l;
} Own;

// h = act(h) * own, h = gate x and mix = mix embedding of one row.
static void own_row(void *ctx, int i) {
    const Own *o = ctx;
    RunState *s = o->s;
    const Model *m = s->model;
    const Config *c = &m->config;
    int cols = m->embed_table.cols, first = o->l * c->embed_dim;
    float *own = s->mix + (size_t)i * c->embed_dim;
    kern.scale(own, c->mix_scale, c->embed_dim);
    kern.rmsnorm(own, own, m->rms_embed, c->embed_dim, c->norm_eps);
    for (int j = 0; j < c->embed_dim; j++) {
        int row = s->rows[i].token * PANEL + (first + j) / cols;
        own[j] += c->table_scale * matrix_at(&m->embed_table, row, (first + j) % cols);
    }
    kern.scale(own, sqrtf(0.5f), c->embed_dim);
    gated_act(c)(s->embed_h.x + (size_t)i * s->embed_h.stride, own, c->embed_dim);
}

void layer_embed(RunState *s, int l, int n) {
    const Config *c = &s->model->config;
    const LayerEmbed *e = &s->model->layers[l].embed;
    const Product gate = {&e->gate, s->embed_h.x, s->embed_h.stride};
    const Product mix = {&e->mix, s->mix, c->embed_dim}, up = {&e->up, s->add, c->dim};
    multiply(s, &s->xb, n, &gate, 1);
    multiply(s, &s->embed, n, &mix, 1);
    each_row(s, n, own_row, &(Own){s, l});
    quantize(s, &s->embed_h, n, l);
    multiply(s, &s->embed_h, n, &up, 1);
}
