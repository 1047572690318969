// profile.c: head budgets and probes out of a file, and what they say about a context.
//
// All probes of a layer are one matrix over the features of all heads, so that judging the rows of
// a forward call is a single product, small beside those of the layer.
#include "policies/profile.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

// ---- the file ----

bool profile_carried(const Model *m) { return tensors_find(&m->file, "profile.share") != NULL; }

static int check_numbers(const Tensor *t, double lo, double hi, char *err) {
    const float *x = t->data;
    for (size_t i = 0; i < t->bytes / sizeof *x; i++) {
        if (!(x[i] >= lo && x[i] <= hi))
            return fail(err, "%s: number %zu is %g, not from %g to %g", t->name, i, x[i], lo, hi);
    }
    return 0;
}

static int find_tensors(Profile *p, const TensorFile *f, const Config *c, char *err) {
    const Tensor *ratio = tensors_get(f, err, "profile.ratio", T_F32, 1, -1);
    if (!ratio) return -1;
    p->n_ratios = (int)ratio->shape[0];
    const Tensor *share =
        tensors_get(f, err, "profile.share", T_F32, 3, p->n_ratios, p->n_layers, p->n_kv_heads);
    const Tensor *max =
        share ? tensors_get(f, err, "profile.head_max", T_F32, 2, p->n_layers, p->n_kv_heads)
              : NULL;
    const Tensor *probe = max ? tensors_get(f, err, "profile.probe", T_F32, 3, p->n_layers,
                                            p->n_kv_heads, probe_features(c))
                              : NULL;
    if (!probe || check_numbers(ratio, 1e-9, 1, err) != 0 || check_numbers(share, 0, 1, err) != 0 ||
        check_numbers(max, 0, 1e30, err) != 0 || check_numbers(probe, -1e30, 1e30, err) != 0)
        return -1;
    p->ratio = ratio->data, p->share = share->data, p->head_max = max->data, p->probe = probe->data;
    for (int i = 0; i < p->n_ratios; i++) {
        if ((i > 0 && p->ratio[i] <= p->ratio[i - 1]) || p->ratio[i] >= 1)
            return fail(err, "profile.ratio does not rise from 0 to 1");
    }
    return p->n_ratios > 0 ? 0 : fail(err, "profile.ratio is empty");
}

static int check_file(const TensorFile *f, const Model *m, char *err) {
    const char *format = tensors_meta(f, "format"), *made = tensors_meta(f, "fingerprint");
    const char *model = tensors_meta(f, "model");
    if (!format || strcmp(format, "kvzip.c profile 1") != 0)
        return tensors_wrong_format(f, "a profile", "kvzip.c profile 1", err);
    if (!made || strcmp(made, m->fingerprint) != 0) {
        return fail(err, "made for another model: \"%s\", fingerprint %.12s, not %.12s",
                    model ? model : "", made ? made : "", m->fingerprint);
    }
    return 0;
}

int profile_open(Profile *p, const Model *m, const char *path, char *err) {
    KVShape shape = model_kv_shape(m);
    *p = (Profile){.n_layers = kvcache_scored_layers(&shape, NULL), .n_kv_heads = shape.n_kv_heads};
    if (path && tensors_open(&p->file, path, err) != 0) return -1;
    if ((!path || check_file(&p->file, m, err) == 0) &&
        find_tensors(p, path ? &p->file : &m->file, &m->config, err) == 0)
        return 0;
    profile_close(p);
    return -1;
}

void profile_close(Profile *p) {
    tensors_close(&p->file);
    *p = (Profile){0};
}

// ---- budgets ----

void profile_shares(const Profile *p, double ratio, double *share) {
    int i = 0, n_heads = p->n_layers * p->n_kv_heads;
    while (i < p->n_ratios && p->ratio[i] < ratio) i++;
    double lo = i > 0 ? p->ratio[i - 1] : 0, hi = i < p->n_ratios ? p->ratio[i] : 1;
    double w = (ratio - lo) / (hi - lo);
    for (int h = 0; h < n_heads; h++) {
        double a = i > 0 ? p->share[(size_t)(i - 1) * n_heads + h] : 0;
        double b = i < p->n_ratios ? p->share[(size_t)i * n_heads + h] : 1;
        share[h] = a + w * (b - a);
    }
}

static double sum_capped(const double *share, int n_heads, double factor) {
    double sum = 0;
    for (int h = 0; h < n_heads; h++) sum += fmin(1, factor * share[h]);
    return sum;
}

// The factor by which shares must grow, none above 1, so that they sum to `total`.
static double fit_factor(const double *share, int n_heads, double total) {
    double lo = 0, hi = 1;
    while (hi < 1e12 && sum_capped(share, n_heads, hi) < total) hi *= 2;
    for (int i = 0; i < 100; i++) {
        double mid = 0.5 * (lo + hi);
        *(sum_capped(share, n_heads, mid) < total ? &lo : &hi) = mid;
    }
    return hi;
}

// Rounds n_ctx * share down, then gives what is missing to `total` to the largest remainders.
static void round_budgets(double *share, int n_heads, int n_ctx, long total, int *budget) {
    long sum = 0;
    for (int h = 0; h < n_heads; h++) {
        double exact = share[h] * n_ctx;
        budget[h] = min_int((int)exact, n_ctx);
        share[h] = exact - budget[h];
        sum += budget[h];
    }
    for (; sum < total; sum++) {
        int best = -1;
        for (int h = 0; h < n_heads; h++)
            if (budget[h] < n_ctx && (best < 0 || share[h] > share[best])) best = h;
        budget[best]++;
        share[best] -= 1;
    }
}

int profile_budget(const Profile *p, double ratio, int n_ctx, int *budget, char *err) {
    int n_heads = p->n_layers * p->n_kv_heads;
    long total = (long)((double)n_heads * n_ctx * ratio);
    double *share = malloc((size_t)(n_heads + 1) * sizeof *share);
    if (!share) return fail(err, "out of memory for the budgets of %d heads", n_heads);
    profile_shares(p, ratio, share);
    double factor = n_ctx > 0 ? fit_factor(share, n_heads, (double)total / n_ctx) : 0;
    for (int h = 0; h < n_heads; h++) share[h] = fmin(1, factor * share[h]);
    round_budgets(share, n_heads, n_ctx, total, budget);
    free(share);
    return 0;
}

// ---- features and probes ----

enum { LINE = 16 };  // columns of a product come in sixteens

static int round_up(int n, int to) { return (n + to - 1) / to * to; }

int row_features(const Config *c) { return round_up(1 + c->dim + 2 * c->kv_dim, 4 * LINE); }

typedef struct {
    const RunState *s;
    int layer;
    float *x;
} Rows;

static void feature_row(void *ctx, int i) {
    const Rows *r = ctx;
    const RunState *s = r->s;
    const Config *c = &s->model->config;
    int n = row_features(c), used = 1 + c->dim + 2 * c->kv_dim;
    float *x = r->x + (size_t)i * n, *k = x + 1 + c->dim;
    x[0] = 1.0f;
    memcpy(x + 1, s->xb.x + (size_t)i * s->xb.stride, (size_t)c->dim * sizeof *x);
    memcpy(k, s->k + (size_t)i * c->kv_dim, (size_t)c->kv_dim * sizeof *x);
    for (int g = 0; g < c->n_kv_heads; g++) model_unrotate(s, r->layer, i, k + g * c->head_dim);
    memcpy(k + c->kv_dim, s->v + (size_t)i * c->kv_dim, (size_t)c->kv_dim * sizeof *x);
    memset(x + used, 0, (size_t)(n - used) * sizeof *x);
}

void profile_rows(const RunState *s, int layer, int n, float *x) {
    parallel_for(n >= LINE ? s->pool : NULL, n, feature_row, &(Rows){s, layer, x});
}

// A probe's weights into column g of a layer's matrix.
static void put_probe(float *w, const float *probe, int g, int cols, const Config *c) {
    for (int i = 0; i < probe_features(c); i++)
        w[(size_t)probe_feature(c, g, i) * cols + g] = probe[i];
}

int probes_open(Probes *b, const Profile *p, const RunState *s, char *err) {
    const Config *c = &s->model->config;
    int n = row_features(c), cols = round_up(p->n_kv_heads, LINE);
    *b = (Probes){.n_layers = p->n_layers, .cols = cols};
    b->w = calloc((size_t)p->n_layers * n * cols + 1, sizeof *b->w);
    b->x = malloc((size_t)s->max_rows * n * sizeof *b->x);
    b->y = malloc((size_t)s->max_rows * cols * sizeof *b->y);
    if (!b->w || !b->x || !b->y) {
        probes_close(b);
        return fail(err, "out of memory for the probes of %d layers", p->n_layers);
    }
    for (int i = 0; i < p->n_layers * p->n_kv_heads; i++) {
        put_probe(b->w + (size_t)(i / p->n_kv_heads) * n * cols,
                  p->probe + (size_t)i * probe_features(c), i % p->n_kv_heads, cols, c);
    }
    return 0;
}

void probes_close(Probes *b) {
    free(b->w);
    free(b->x);
    free(b->y);
    *b = (Probes){0};
}

typedef struct {
    const Probes *b;
    const float *w;
    int n, n_features;
} Apply;

static void apply_rows(void *ctx, int i) {
    const Apply *a = ctx;
    int row = i * LINE, n = min_int(LINE, a->n - row), cols = a->b->cols;
    kern.gemm_f32(&(Gemm){.c = a->b->y + (size_t)row * cols,
                          .ldc = (size_t)cols,
                          .a = a->b->x + (size_t)row * a->n_features,
                          .lda = (size_t)a->n_features,
                          .b = a->w,
                          .n = n,
                          .inner = a->n_features,
                          .cols = cols});
}

void probes_apply(const Probes *b, RunState *s, int layer, int scored, int n) {
    int n_features = row_features(&s->model->config);
    Apply a = {b, b->w + (size_t)scored * n_features * b->cols, n, n_features};
    profile_rows(s, layer, n, b->x);
    parallel_for(s->pool, (n + LINE - 1) / LINE, apply_rows, &a);
}
