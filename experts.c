// experts.c: a feed-forward block of many experts, of which a token uses few.
//
// A router gives every row of the batch a probability for each expert; the row goes to the n_used
// likeliest, and what they give is added up by those probabilities. Rows are sorted by expert, so
// that each expert's weights are read once for all of its rows, and those of experts without rows
// not at all: in a mapped file they stay on the disk. Llama 4 weighs an expert's input instead of
// what it gives, by the sigmoid of the router's number. What must stay true: a row's sum runs over
// its experts in rising order, so that its bits do not depend on the other rows.
#include "layers.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

// ---- opening ----

Matrix expert_of(const Matrix *stack, int n, int e, int rows) {
    Matrix m = *stack;
    m.rows = rows, m.panels = stack->panels / n;
    size_t first = (size_t)e * m.panels, lines = first * m.cols_padded / wtype_k(m.type);
    size_t groups = first * (m.cols_padded / QGROUP) * PANEL;
    m.data += lines * 64;
    if (m.scale) m.scale += groups;
    if (m.offset) m.offset += groups;
    return m;
}

static int open_stack(Model *m, Matrix *stack, int l, const char *name, int rows, int cols,
                      char *err) {
    char full[64];
    long all = (long)m->config.n_experts * ((rows + PANEL - 1) / PANEL * PANEL);
    snprintf(full, sizeof full, "layers.%d.experts.%s", l, name);
    if (all > INT_MAX) return fail(err, "tensor %s: %ld rows are too many", full, all);
    if (open_matrix(stack, &m->file, full, (int)all, cols, err) != 0) return -1;
    m->has[stack->type] = true;
    return 0;
}

int experts_config(Config *c, const TensorFile *f, char *err) {
    if (!tensors_meta(f, "swiglu_limit")) return 0;
    if (c->shared_dim > 0 || c->act_gelu)
        return fail(err, "experts that clamp have no GELU and none that all tokens use");
    return tensors_meta_float(f, "swiglu_alpha", 1e-6, 1e6, &c->swiglu_alpha, err) != 0 ||
                   tensors_meta_float(f, "swiglu_limit", 1e-6, 1e6, &c->swiglu_limit, err) != 0
               ? -1
               : 0;
}

static int open_biases(Model *m, int l, char *err) {
    const Config *c = &m->config;
    Experts *e = &m->layers[l].experts;
    long n = c->n_experts;
    const LayerVector biases[] = {{"router_bias", &e->router_bias, n, true},
                                  {"experts.b1", &e->b1, n * c->expert_dim, true},
                                  {"experts.b2", &e->b2, n * c->dim, true},
                                  {"experts.b3", &e->b3, n * c->expert_dim, true}};
    return open_vectors(biases, sizeof biases / sizeof *biases, &m->file, l, err);
}

static int open_shared(Model *m, int l, char *err) {
    static const char *const names[] = {"w1", "w2", "w3"};
    const Config *c = &m->config;
    Experts *e = &m->layers[l].experts;
    char name[64];
    for (int i = 0; i < 3; i++) {
        int rows = i == 1 ? c->dim : c->shared_dim, cols = i == 1 ? c->shared_dim : c->dim;
        snprintf(name, sizeof name, "layers.%d.shared.%s", l, names[i]);
        if (open_matrix(&e->shared[i], &m->file, name, rows, cols, err) != 0) return -1;
        m->has[e->shared[i].type] = true;
    }
    const LayerVector scale = {"shared_scale", &e->shared_scale, c->dim, true};
    return open_vectors(&scale, 1, &m->file, l, err);
}

static int open_norms(Model *m, int l, char *err) {
    const Config *c = &m->config;
    ExpertNorms *e = &m->layers[l].experts.norms;
    const LayerVector norms[] = {{"rms_router", &e->router, c->dim, false},
                                 {"rms_experts", &e->in, c->dim, false},
                                 {"rms_dense_post", &e->dense, c->dim, false},
                                 {"rms_experts_post", &e->out, c->dim, false},
                                 {"experts.scale", &e->scale, c->n_experts, false}};
    return open_vectors(norms, sizeof norms / sizeof *norms, &m->file, l, err);
}

int experts_open(Model *m, int l, char *err) {
    const Config *c = &m->config;
    Experts *e = &m->layers[l].experts;
    char name[64];
    snprintf(name, sizeof name, "layers.%d.router", l);
    if (open_matrix(&e->router, &m->file, name, c->n_experts, c->dim, err) != 0) return -1;
    m->has[e->router.type] = true;
    if (open_stack(m, &e->w1, l, "w1", c->expert_dim, c->dim, err) != 0 ||
        open_stack(m, &e->w3, l, "w3", c->expert_dim, c->dim, err) != 0 ||
        open_stack(m, &e->w2, l, "w2", c->dim, c->expert_dim, err) != 0 ||
        (c->dense_beside && open_norms(m, l, err) != 0))
        return -1;
    if (c->swiglu_limit > 0 && open_biases(m, l, err) != 0) return -1;
    return c->shared_dim > 0 ? open_shared(m, l, err) : 0;
}

// ---- scratch ----

void experts_take(RunState *s) {
    const Config *c = &s->model->config;
    ExpertRows *e = &s->experts;
    size_t n = (size_t)s->max_rows, used = (size_t)c->n_used, experts = (size_t)c->n_experts;
    if (experts == 0) return;
    e->probs = take(s, n * experts, sizeof *e->probs);
    e->chosen = take(s, n * used, sizeof *e->chosen);
    e->weight = take(s, n * used, sizeof *e->weight);
    e->slot = take(s, n * used, sizeof *e->slot);
    e->first = take(s, experts + 1, sizeof *e->first);
    e->row = take(s, n * used, sizeof *e->row);
    e->expert = take(s, n * used, sizeof *e->expert);
    if (c->swiglu_limit > 0) e->up = take(s, n * used * (size_t)c->expert_dim, sizeof *e->up);
    if (c->route_input) e->factor = take(s, n * used, sizeof *e->factor);
    e->in = take_activations(s, s->max_rows * c->n_used, c->dim);
    e->hidden = take_activations(s, s->max_rows * c->n_used, c->expert_dim);
    e->in.tiled = e->hidden.tiled = e->tiled = take(s, n * used, sizeof *e->tiled);
    e->out = take(s, n * used * (size_t)c->dim, sizeof *e->out);
    if (c->dense_beside) e->beside = take(s, n * (size_t)c->dim, sizeof *e->beside);
    e->w = take(s, experts, sizeof *e->w);
    e->rows = take(s, experts, sizeof *e->rows);
    e->p = take(s, experts + 1, sizeof *e->p);
    e->gates = take(s, experts + 1, sizeof *e->gates);
    e->downs = take(s, experts + 1, sizeof *e->downs);
    if (c->shared_dim == 0) return;
    e->shared_hidden = take_activations(s, s->max_rows, c->shared_dim);
    e->shared_out = take(s, n * (size_t)c->dim, sizeof *e->shared_out);
}

// ---- routing ----

typedef struct {
    RunState *s;
    int l;
    const float *w;  // [dim] of a norm
} Step;

static void softmax(float *p, int n) {
    float max = p[0], sum = 0;
    for (int i = 1; i < n; i++) max = p[i] > max ? p[i] : max;
    for (int i = 0; i < n; i++) sum += p[i] = expf(p[i] - max);
    for (int i = 0; i < n; i++) p[i] /= sum;
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static bool is_chosen(const int *chosen, int n, int e) {
    for (int i = 0; i < n; i++)
        if (chosen[i] == e) return true;
    return false;
}

// The likeliest expert that is not chosen yet; of equal ones the first.
static int likeliest(const float *p, int n_experts, const int *chosen, int n) {
    int best = -1;
    for (int e = 0; e < n_experts; e++)
        if ((best < 0 || p[e] > p[best]) && !is_chosen(chosen, n, e)) best = e;
    return best;
}

static void route_row(void *ctx, int i) {
    const Step *st = ctx;
    RunState *s = st->s;
    const Config *c = &s->model->config;
    ExpertRows *e = &s->experts;
    float *p = e->probs + (size_t)i * c->n_experts, *w = e->weight + (size_t)i * c->n_used, sum = 0;
    int *chosen = e->chosen + (size_t)i * c->n_used;
    const float *bias = s->model->layers[st->l].experts.router_bias;
    if (bias) kern.add(p, bias, c->n_experts);
    check_row(s, i, st->l, p, c->n_experts);
    if (!c->route_input) softmax(p, c->n_experts);
    for (int j = 0; j < c->n_used; j++) {
        int at = j, best = likeliest(p, c->n_experts, chosen, j);
        for (; at > 0 && chosen[at - 1] > best; at--) chosen[at] = chosen[at - 1];
        chosen[at] = best, sum += p[best];
    }
    for (int j = 0; j < c->n_used; j++)
        w[j] = c->route_input ? sigmoid(p[chosen[j]]) : p[chosen[j]] / (c->norm_topk ? sum : 1.0f);
    const float *scale = s->model->layers[st->l].experts.norms.scale;
    for (int j = 0; scale && j < c->n_used; j++) w[j] *= scale[chosen[j]];
}

// xb = norm(x) by w, rounded to what the products read.
static void norm_row(void *ctx, int i) {
    const Step *st = ctx;
    RunState *s = st->s;
    const Config *c = &s->model->config;
    float *xb = s->xb.x + (size_t)i * s->xb.stride;
    kern.rmsnorm(xb, s->x + (size_t)i * c->dim, st->w, c->dim, c->norm_eps);
    check_row(s, i, st->l, xb, c->dim);
    activations_round(&s->xb, i);
}

// beside = norm(add), what the dense block gives.
static void set_aside_row(void *ctx, int i) {
    const Step *st = ctx;
    RunState *s = st->s;
    const Config *c = &s->model->config;
    size_t at = (size_t)i * c->dim;
    kern.rmsnorm(s->experts.beside + at, s->add + at, st->w, c->dim, c->norm_eps);
}

// Which experts each row goes to, and with which weight. Where a dense block stands beside them,
// what it gives is set aside, and xb becomes what the experts read.
static void route(RunState *s, int l, int n) {
    const Product p = {&s->model->layers[l].experts.router, s->experts.probs,
                       s->model->config.n_experts};
    const ExpertNorms *norms = &s->model->layers[l].experts.norms;
    if (norms->dense) each_row(s, n, set_aside_row, &(Step){s, l, norms->dense});
    if (norms->router) each_row(s, n, norm_row, &(Step){s, l, norms->router});
    multiply(s, &s->xb, n, &p, 1);
    each_row(s, n, route_row, &(Step){.s = s, .l = l});
    if (norms->in) each_row(s, n, norm_row, &(Step){s, l, norms->in});
}

// Gives every row a slot at each of its experts.
static void sort_rows(RunState *s, int n) {
    const Config *c = &s->model->config;
    ExpertRows *e = &s->experts;
    memset(e->first, 0, ((size_t)c->n_experts + 1) * sizeof *e->first);
    for (int i = 0; i < n * c->n_used; i++) e->first[e->chosen[i] + 1]++;
    for (int x = 0; x < c->n_experts; x++) e->first[x + 1] += e->first[x];
    for (int i = 0; i < n * c->n_used; i++) {
        e->slot[i] = e->first[e->chosen[i]]++;
        e->row[e->slot[i]] = i / c->n_used;
        e->expert[e->slot[i]] = e->chosen[i];
        if (c->route_input) e->factor[e->slot[i]] = e->weight[i], e->weight[i] = 1;
    }
    for (int x = c->n_experts; x > 0; x--) e->first[x] = e->first[x - 1];
    e->first[0] = 0;
}

// ---- the products ----

static void gather_slot(void *ctx, int slot) {
    RunState *s = ctx;
    ExpertRows *e = &s->experts;
    const float *x = s->xb.x + (size_t)e->row[slot] * s->xb.stride;
    float *in = e->in.x + (size_t)slot * e->in.stride;
    memcpy(in, x, (size_t)e->in.cols * sizeof *x);
    if (e->factor) kern.scale(in, e->factor[slot], e->in.cols);
    e->tiled[slot] = s->tiled[e->row[slot]];
    activations_round(&e->in, slot);
}

// hidden = (up + 1) gate sigmoid(alpha gate) of experts that clamp, from the two products. What is
// no number stays none.
static void clamp_slot(const Step *st, int slot) {
    RunState *s = st->s;
    const Config *c = &s->model->config;
    const Experts *w = &s->model->layers[st->l].experts;
    const ExpertRows *e = &s->experts;
    float *gate = e->hidden.x + (size_t)slot * e->hidden.stride, most = c->swiglu_limit;
    float *up = e->up + (size_t)slot * c->expert_dim;
    size_t first = (size_t)e->expert[slot] * c->expert_dim;
    if (w->b1) kern.add(gate, w->b1 + first, c->expert_dim);
    if (w->b3) kern.add(up, w->b3 + first, c->expert_dim);
    for (int i = 0; i < c->expert_dim; i++) {
        float x = gate[i] > most ? most : gate[i];
        float y = up[i] > most ? most : up[i] < -most ? -most : up[i];
        gate[i] = c->swiglu_alpha * x;
        up[i] = (y + 1.0f) / c->swiglu_alpha;
    }
    kern.silu_mul(gate, up, c->expert_dim);
}

static void hidden_slot(void *ctx, int slot) {
    const Step *st = ctx;
    RunState *s = st->s;
    if (s->model->config.swiglu_limit > 0) clamp_slot(st, slot);
    if (activations_rounded(&s->experts.hidden)) activations_round(&s->experts.hidden, slot);
}

// The products of expert x, number `at` of those with rows.
static void plan_expert(RunState *s, int l, int x, int at) {
    const Config *c = &s->model->config;
    const Experts *w = &s->model->layers[l].experts;
    ExpertRows *e = &s->experts;
    int first = e->first[x], n = e->first[x + 1] - first;
    Matrix *m = e->w[at];
    Activations *rows = e->rows[at];
    Product *p = e->p[at];
    m[0] = expert_of(&w->w1, c->n_experts, x, c->expert_dim);
    m[1] = expert_of(&w->w2, c->n_experts, x, c->dim);
    m[2] = expert_of(&w->w3, c->n_experts, x, c->expert_dim);
    rows[0] = activations_from(&e->in, first), rows[1] = activations_from(&e->hidden, first);
    p[0] = (Product){&m[1], e->out + (size_t)first * c->dim, c->dim};
    p[1] = (Product){&m[0], rows[1].x, rows[1].stride};
    e->gates[at] = (Products){&rows[0], n, &p[1], 1, &m[2], &rows[0], gated_act(c)};
    e->downs[at] = (Products){&rows[1], n, &p[0], 1, NULL, NULL, NULL};
    if (c->swiglu_limit == 0) return;
    p[2] = (Product){&m[2], e->up + (size_t)first * c->expert_dim, c->expert_dim};
    e->gates[at] = (Products){&rows[0], n, &p[1], 2, NULL, NULL, NULL};
}

static void plan_shared(RunState *s, int l, int n, int at) {
    const Config *c = &s->model->config;
    const Matrix *m = s->model->layers[l].experts.shared;
    ExpertRows *e = &s->experts;
    Activations *hidden = &e->shared_hidden;
    Product *p = e->p[at];
    p[0] = (Product){&m[1], e->shared_out, c->dim};
    p[1] = (Product){&m[0], hidden->x, hidden->stride};
    e->gates[at] = (Products){&s->xb, n, &p[1], 1, &m[2], &s->xb, gated_act(c)};
    e->downs[at] = (Products){hidden, n, &p[0], 1, NULL, NULL, NULL};
}

// ---- the sum ----

static float dot(const float *x, const float *y, int n) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static void sum_row(void *ctx, int i) {
    const Step *st = ctx;
    RunState *s = st->s;
    const Config *c = &s->model->config;
    const ExpertRows *e = &s->experts;
    const float *bias = s->model->layers[st->l].experts.b2;
    float *add = s->add + (size_t)i * c->dim;
    memset(add, 0, (size_t)c->dim * sizeof *add);
    for (int j = 0; j < c->n_used; j++) {
        size_t slot = (size_t)e->slot[(size_t)i * c->n_used + j];
        const float *y = e->out + slot * c->dim;
        check_row(s, i, st->l, e->hidden.x + slot * e->hidden.stride, c->expert_dim);
        float w = e->weight[(size_t)i * c->n_used + j];
        for (int k = 0; k < c->dim; k++) add[k] += w * y[k];
        if (!bias) continue;
        const float *b = bias + (size_t)e->expert[slot] * c->dim;
        for (int k = 0; k < c->dim; k++) add[k] += w * b[k];
    }
    const float *norm = s->model->layers[st->l].experts.norms.out;
    if (norm) {
        kern.rmsnorm(add, add, norm, c->dim, c->norm_eps);
        kern.add(add, e->beside + (size_t)i * c->dim, c->dim);
    }
    if (c->shared_dim == 0) return;
    const float *x = s->xb.x + (size_t)i * s->xb.stride, *y = e->shared_out + (size_t)i * c->dim;
    const float *scale = s->model->layers[st->l].experts.shared_scale;
    float w = scale ? sigmoid(dot(scale, x, c->dim)) : 1.0f;
    for (int k = 0; k < c->dim; k++) add[k] += w * y[k];
}

void experts_ffn(RunState *s, int l, int n) {
    const Config *c = &s->model->config;
    ExpertRows *e = &s->experts;
    int jobs = 0, slots = n * c->n_used;
    route(s, l, n);
    sort_rows(s, n);
    for (int x = 0; x < c->n_experts; x++)
        if (e->first[x + 1] > e->first[x]) plan_expert(s, l, x, jobs++);
    if (c->shared_dim > 0) plan_shared(s, l, n, jobs++);
    each_row(s, slots, gather_slot, s);
    matmul_all(s->pool, s->ops, e->gates, jobs);  // hidden = act(w1 in) * w3 in
    if (c->swiglu_limit > 0 || activations_rounded(&e->hidden))
        each_row(s, slots, hidden_slot, &(Step){.s = s, .l = l});
    if (c->shared_dim > 0) quantize(s, &e->shared_hidden, n, l);
    matmul_all(s->pool, s->ops, e->downs, jobs);  // out = w2 hidden
    each_row(s, n, sum_row, &(Step){.s = s, .l = l});
}
