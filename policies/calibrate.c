// calibrate.c: measures a model's profile: how many pairs each head keeps at a ratio, the largest
// score of each head, and a linear probe per head for the log of a pair's score.
//
// Each text is scored by KVzip, then read once more with a tap that adds every pair's features to
// the normal equations of ridge regression: nothing but sums is kept, however long the texts are.
// The heads of a layer share one sum of products G = X^T X over the features of all of them; a
// head's own equations are rows and columns of it. They are solved by a Cholesky factor whose first
// rows, those of the layer's input, serve all heads. Where the sums of all layers would take too
// much memory, the texts are read again for each group of layers.
#define _POSIX_C_SOURCE 200809L
#include "policies/calibrate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/profile.h"
#include "util.h"

// Ratios at which head shares are stored.
static const float grid[] = {0.02f, 0.05f, 0.1f, 0.15f, 0.2f, 0.25f, 0.3f, 0.35f,
                             0.4f,  0.5f,  0.6f, 0.7f,  0.8f, 0.9f,  0.95f};
enum { N_GRID = sizeof grid / sizeof *grid, BLOCK = 64, Y_COLS = 16 };
static const size_t SUMS_BYTES = (size_t)768 << 20;  // for the sums of a group of layers
static const float LEAST_SCORE = 1e-7f;              // added before the log

typedef struct {
    const int *ids;  // [n_prefix + n_ctx]
    int n_ctx;
    float *score;  // [scored layers][n_kv_heads][n_ctx]
} Text;

typedef struct {
    const Calibrate *c;
    const Config *m;
    int n_layers, n_heads;  // scored layers; all their kv heads
    Ids ids;                // of all texts, each with its prefix
    Text *text;             // [n_texts]
    int n_texts;
    float *share, *head_max;  // as in Profile
    float *probe;             // [n_heads][probe_features]
    double *explained;        // [n_heads]
    // sums of the layers [layer0, layer0 + group)
    int layer0, group;
    int n_features;     // row_features
    float *products;    // [group][n_features][n_features] lower blocks
    float *targets;     // [group][n_features][y_cols] sums of feature times log score
    double *squares;    // [n_heads] sum of squared log scores
    double *sums;       // [n_heads] sum of log scores
    int y_cols;         // n_kv_heads rounded up to 16
    const Text *now;    // being read for its features
    float *x, *xt, *y;  // rows of a call: [rows][n_features]; transposed; log scores [rows][y_cols]
    float *xb;          // x in blocks of 64 features, [n_features / 64][rows][64]
    int rows;           // of them in the context
    long done, total;   // tokens, for progress
} Run;

static int on_context(void *arg, const char *what, long done, long total) {
    Run *r = arg;
    (void)what, (void)total;
    return r->c->progress
               ? r->c->progress(r->c->progress_arg, "calibrate", r->done + done, r->total)
               : 0;
}

// ---- texts ----

// The end of the part that begins at s, and in *next where the following one begins.
static const char *part_end(const char *s, const char *end, const char **next) {
    for (const char *line = s; line < end;) {
        const char *stop = memchr(line, '\n', (size_t)(end - line));
        size_t n = (size_t)((stop ? stop : end) - line), i = 0;
        while (i < n && line[i] == '=') i++;
        if (i == n && n >= 4) {
            *next = stop ? stop + 1 : end;
            return line;
        }
        line = stop ? stop + 1 : end;
    }
    return *next = end;
}

static int push_text(Run *r, const int *ids, int n, char *err) {
    Text *text = realloc(r->text, (size_t)(r->n_texts + 1) * sizeof *text);
    if (!text) return fail(err, "out of memory for %d texts", r->n_texts + 1);
    r->text = text;
    r->text[r->n_texts++] = (Text){NULL, n, NULL};
    for (int i = 0; i < r->c->prefix->n; i++)
        if (ids_push(&r->ids, r->c->prefix->id[i]) != 0) return fail(err, "out of memory");
    for (int i = 0; i < n; i++)
        if (ids_push(&r->ids, ids[i]) != 0) return fail(err, "out of memory");
    return 0;
}

// All parts as texts, then all of them joined, as far as positions were trained.
static int cut_texts(Run *r, const Ids *parts, const int *part_n, int n_parts, char *err) {
    int room = r->m->seq_len - r->c->prefix->n - 2 * r->c->context.chunk, at = 0;
    for (int i = 0; i < n_parts; at += part_n[i++])
        if (push_text(r, parts->id + at, min_int(part_n[i], r->m->seq_len), err) != 0) return -1;
    int joined = min_int(parts->n, room);
    if (n_parts > 1 && joined > part_n[0] && push_text(r, parts->id, joined, err) != 0) return -1;
    const int *ids = r->ids.id;
    for (int i = 0; i < r->n_texts; i++) {
        r->text[i].ids = ids;
        ids += r->c->prefix->n + r->text[i].n_ctx;
    }
    return 0;
}

static int read_texts(Run *r, const char *text, size_t n, char *err) {
    Ids parts = {0};
    int *part_n = NULL, n_parts = 0, status = 0;
    for (const char *s = text, *end = text + n, *next; s < end && status == 0; s = next) {
        const char *stop = part_end(s, end, &next);
        int before = parts.n, *more = realloc(part_n, (size_t)(n_parts + 1) * sizeof *part_n);
        if (more) part_n = more;
        if (!more || tokenizer_encode(r->c->context.tok, s, (size_t)(stop - s), 0, &parts) != 0) {
            status = fail(err, "out of memory for the sample text");
        } else if (parts.n > before) {
            part_n[n_parts++] = parts.n - before;
        }
    }
    if (status == 0 && parts.n < BLOCK)
        status = fail(err, "%d tokens: too little text to learn from", parts.n);
    if (status == 0) status = cut_texts(r, &parts, part_n, n_parts, err);
    free(part_n);
    ids_free(&parts);
    return status;
}

static Context context_of(Run *r, const Text *t, int seq) {
    Context c = r->c->context;
    c.seq = seq, c.ids = t->ids, c.n_prefix = r->c->prefix->n, c.n_ctx = t->n_ctx;
    c.progress = on_context, c.progress_arg = r;
    return c;
}

// ---- shares and maxima ----

// Adds what the heads keep of one text at each ratio of the grid.
static int add_shares(Run *r, const Context *c, const float *score, char *err) {
    size_t n = context_scores(c), n_ctx = (size_t)c->n_ctx;
    uint8_t *keep = malloc(n + 1);
    int status = keep ? 0 : fail(err, "out of memory for selecting");
    for (int i = 0; i < N_GRID && status == 0; i++) {
        if (context_select(c, score, grid[i], keep, err) < 0) status = -1;
        for (int h = 0; h < r->n_heads && status == 0; h++) {
            int kept = 0;
            for (size_t t = 0; t < n_ctx; t++) kept += keep[(size_t)h * n_ctx + t];
            float *share = &r->share[(size_t)i * r->n_heads + h];
            *share = fminf(1.0f, *share + (float)kept / ((float)n_ctx * (float)r->n_texts));
        }
    }
    for (size_t j = 0; j < n; j++) r->head_max[j / n_ctx] = fmaxf(r->head_max[j / n_ctx], score[j]);
    free(keep);
    return status;
}

static int score_text(Run *r, Text *t, char *err) {
    int seq = kvcache_new(r->c->context.kv, err);
    if (seq < 0) return -1;
    Context c = context_of(r, t, seq);
    t->score = malloc((context_scores(&c) + 1) * sizeof *t->score);
    if (!t->score) return fail(err, "out of memory for the scores of %d tokens", t->n_ctx);
    if (context_set(&c, policy_find("kvzip"), level_find("pair"), NULL, err) != 0 ||
        context_score(&c, c.policy, t->score, err) != 0 || add_shares(r, &c, t->score, err) != 0)
        return -1;
    kvcache_drop(c.kv, seq);
    for (size_t i = 0; i < context_scores(&c); i++) {
        double y = logf(t->score[i] + LEAST_SCORE);
        size_t h = i / (size_t)t->n_ctx;
        t->score[i] = (float)y;
        r->squares[h] += y * y, r->sums[h] += y;
    }
    r->done += 2 * t->n_ctx;
    return 0;
}

// ---- the sums ----

typedef struct {
    Run *r;
    int at;  // the layer's place in the group
} Sums;

// Row i of x to a column of xt and a row of each block.
static void spread_row(void *ctx, int i) {
    const Run *r = ((const Sums *)ctx)->r;
    const float *x = r->x + (size_t)i * r->n_features;
    for (int j = 0; j < r->n_features; j++) r->xt[(size_t)j * r->rows + i] = x[j];
    for (int b = 0; b < r->n_features / BLOCK; b++)
        memcpy(r->xb + ((size_t)b * r->rows + i) * BLOCK, x + b * BLOCK, BLOCK * sizeof *x);
}

// One 64 by 64 block of X^T X on or below the diagonal, or, where the column is past it, 64 rows of
// X^T y.
static void sum_block(void *ctx, int unit) {
    const Sums *s = ctx;
    const Run *r = s->r;
    int i = 0, n = r->n_features;
    while (unit > i + 1) unit -= ++i + 1;  // row i has i + 2 units: its blocks and its targets
    const float *a = r->xt + (size_t)i * BLOCK * r->rows;
    if (unit <= i) {
        float *c = r->products + ((size_t)s->at * n + (size_t)i * BLOCK) * n + unit * BLOCK;
        kern.gemm_f32(c, (size_t)n, a, (size_t)r->rows, r->xb + (size_t)unit * r->rows * BLOCK,
                      BLOCK, r->rows, BLOCK, true);
    } else {
        float *c = r->targets + ((size_t)s->at * n + (size_t)i * BLOCK) * r->y_cols;
        kern.gemm_f32(c, (size_t)r->y_cols, a, (size_t)r->rows, r->y, BLOCK, r->rows, r->y_cols,
                      true);
    }
}

// The rows of the context among those that forward is computing go into the layer's sums.
static void tap_features(void *arg, int layer, int n) {
    Run *r = arg;
    const RunState *s = r->c->context.state;
    int scored = kvcache_scored_index(&r->c->context.kv->shape, layer), at = scored - r->layer0;
    int skip = min_int(max_int(r->c->prefix->n - s->pos[0], 0), n), blocks = r->n_features / BLOCK;
    if (r->m->window[layer] != 0 || at < 0 || at >= r->group || skip == n) return;
    float *x = r->x;
    profile_rows(s, layer, n, r->x);
    r->x += (size_t)skip * r->n_features;
    r->rows = n - skip;
    for (int i = 0; i < r->rows; i++) {
        int t = s->pos[skip + i] - r->c->prefix->n;
        for (int g = 0; g < r->m->n_kv_heads; g++)
            r->y[(size_t)i * r->y_cols + g] =
                r->now->score[((size_t)scored * r->m->n_kv_heads + g) * r->now->n_ctx + t];
    }
    parallel_for(s->pool, r->rows, spread_row, &(Sums){r, at});
    parallel_for(s->pool, blocks * (blocks + 3) / 2, sum_block, &(Sums){r, at});
    r->x = x;
}

static int sum_text(Run *r, const Text *t, char *err) {
    int seq = kvcache_new(r->c->context.kv, err);
    if (seq < 0) return -1;
    Context c = context_of(r, t, seq);
    r->now = t;
    c.state->tap = tap_features, c.state->tap_arg = r;
    int status = context_read(&c, err);
    c.state->tap = NULL;
    kvcache_drop(c.kv, seq);
    r->done += t->n_ctx;
    return status;
}

// ---- the regression ----

static double dot(const double *a, const double *b, int n) {
    double s[4] = {0};
    int i = 0;
    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; j++) s[j] += a[i + j] * b[i + j];
    for (; i < n; i++) s[0] += a[i] * b[i];
    return s[0] + s[1] + s[2] + s[3];
}

// Rows [from, n) of the Cholesky factor L, in place of those of the symmetric a; l [n][n], of which
// the lower half is used.
static void factor_rows(double *l, int from, int n, int ld) {
    for (int i = from; i < n; i++) {
        double *li = l + (size_t)i * ld;
        for (int j = 0; j < i; j++) {
            const double *lj = l + (size_t)j * ld;
            li[j] = (li[j] - dot(li, lj, j)) / lj[j];
        }
        li[i] = sqrt(fmax(li[i] - dot(li, li, i), 1e-12));
    }
}

// x = (L L^T)^-1 x
static void solve_rows(const double *l, double *x, int n, int ld) {
    for (int i = 0; i < n; i++)
        x[i] = (x[i] - dot(l + (size_t)i * ld, x, i)) / l[(size_t)i * ld + i];
    for (int i = n - 1; i >= 0; i--) {
        x[i] /= l[(size_t)i * ld + i];
        for (int j = 0; j < i; j++) x[j] -= l[(size_t)i * ld + j] * x[i];
    }
}

// Rows [from, to) of head g's own products.
static void own_products(const Run *r, int at, int g, int from, int to, double *l) {
    const float *p = r->products + (size_t)at * r->n_features * r->n_features;
    int n = probe_features(r->m);
    for (int i = from; i < to; i++) {
        int fi = probe_feature(r->m, g, i);
        for (int j = 0; j <= i; j++) {
            int fj = probe_feature(r->m, g, j);
            l[(size_t)i * n + j] = p[(size_t)max_int(fi, fj) * r->n_features + min_int(fi, fj)];
        }
        l[(size_t)i * n + i] *= 1 + r->c->lambda;
    }
}

// 1 - the sum of squared errors over that about the mean; w solves (G + lambda diag G) w = b.
static double explained(const Run *r, int at, int g, const double *w, const double *b,
                        double count) {
    int n = probe_features(r->m), h = (r->layer0 + at) * r->m->n_kv_heads + g;
    const float *p = r->products + (size_t)at * r->n_features * r->n_features;
    double about_mean = r->squares[h] - r->sums[h] * r->sums[h] / count;
    double errors = r->squares[h] - dot(w, b, n);
    for (int i = 0; i < n; i++) {
        size_t f = (size_t)probe_feature(r->m, g, i);
        errors -= r->c->lambda * p[f * r->n_features + f] * w[i] * w[i];
    }
    return about_mean > 0 ? fmax(1 - errors / about_mean, 0) : 1;
}

typedef struct {
    Run *r;
    double count;  // pairs a head has in all texts
    bool *failed;  // [group]
} Solve;

static void solve_layer(void *ctx, int at) {
    const Solve *s = ctx;
    Run *r = s->r;
    int n = probe_features(r->m), shared = 1 + r->m->dim;
    double *l = malloc((size_t)n * n * sizeof *l), *w = malloc((size_t)n * sizeof *w);
    double *b = malloc((size_t)n * sizeof *b);
    s->failed[at] = !l || !w || !b;
    for (int g = 0; g < r->m->n_kv_heads && !s->failed[at]; g++) {
        int h = (r->layer0 + at) * r->m->n_kv_heads + g, from = g == 0 ? 0 : shared;
        own_products(r, at, g, from, n, l);
        factor_rows(l, from, n, n);
        for (int i = 0; i < n; i++) {
            size_t row = (size_t)at * r->n_features + probe_feature(r->m, g, i);
            w[i] = b[i] = r->targets[row * r->y_cols + g];
        }
        solve_rows(l, w, n, n);
        for (int i = 0; i < n; i++) r->probe[(size_t)h * n + i] = (float)w[i];
        r->explained[h] = explained(r, at, g, w, b, s->count);
    }
    free(l), free(w), free(b);
}

static int solve_group(Run *r, char *err) {
    Solve s = {.r = r, .failed = calloc((size_t)r->group, sizeof *s.failed)};
    if (!s.failed) return fail(err, "out of memory for the regression");
    for (int i = 0; i < r->n_texts; i++) s.count += r->text[i].n_ctx;
    parallel_for(r->c->context.state->pool, r->group, solve_layer, &s);
    int failed = 0;
    for (int i = 0; i < r->group; i++) failed |= s.failed[i];
    free(s.failed);
    return failed ? fail(err, "out of memory for the regression") : 0;
}

// ---- the file ----

static int declare(TensorWriter *w, const Run *r, char *err) {
    size_t layers = (size_t)r->n_layers, heads = (size_t)r->m->n_kv_heads;
    size_t features = (size_t)probe_features(r->m);
    size_t share[] = {N_GRID, layers, heads}, probe[] = {layers, heads, features};
    return tensors_write_declare(w, "profile.ratio", T_F32, 1, share, err) != 0 ||
                   tensors_write_declare(w, "profile.share", T_F32, 3, share, err) != 0 ||
                   tensors_write_declare(w, "profile.head_max", T_F32, 2, probe, err) != 0 ||
                   tensors_write_declare(w, "profile.probe", T_F32, 3, probe, err) != 0
               ? -1
               : 0;
}

static int put_profile(TensorWriter *w, const Run *r, char *err) {
    size_t heads = (size_t)r->n_heads;
    return tensors_write_put(w, grid, sizeof grid, err) != 0 ||
                   tensors_write_put(w, r->share, N_GRID * heads * sizeof(float), err) != 0 ||
                   tensors_write_put(w, r->head_max, heads * sizeof(float), err) != 0 ||
                   tensors_write_put(w, r->probe, heads * probe_features(r->m) * sizeof(float),
                                     err) != 0
               ? -1
               : 0;
}

// What a tensor of the model file is copied for: not padding, nor a profile it had before.
static bool copied(const Tensor *t) {
    return strncmp(t->name, "pad.", 4) != 0 && strncmp(t->name, "profile.", 8) != 0;
}

// All that the model's file holds, and the profile behind it.
static int put_model(TensorWriter *w, const Model *m, const Run *r, char *err) {
    const TensorFile *f = &m->file;
    for (int i = 0; i < f->n_meta; i++)
        if (tensors_write_meta(w, f->meta[i].key, f->meta[i].value, err) != 0) return -1;
    for (int i = 0; i < f->n_tensors; i++) {
        const Tensor *t = &f->tensors[i];
        if (copied(t) && tensors_write_declare(w, t->name, t->dtype, t->n_dims, t->shape, err) != 0)
            return -1;
    }
    if (declare(w, r, err) != 0) return -1;
    for (int i = 0; i < f->n_tensors; i++) {
        const Tensor *t = &f->tensors[i];
        if (copied(t) && tensors_write_put(w, t->data, t->bytes, err) != 0) return -1;
    }
    return put_profile(w, r, err);
}

static int put_alone(TensorWriter *w, const Model *m, const Run *r, char *err) {
    if (tensors_write_meta(w, "format", "kvzip.c profile 1", err) != 0 ||
        tensors_write_meta(w, "fingerprint", m->fingerprint, err) != 0 ||
        tensors_write_meta(w, "model", m->name, err) != 0 || declare(w, r, err) != 0)
        return -1;
    return put_profile(w, r, err);
}

static int write_profile(const Run *r, const char *path, bool into, char *err) {
    const Model *m = r->c->context.state->model;
    TensorWriter w = {0};
    if (tensors_write_begin(&w, path, err) != 0) return -1;
    if ((into ? put_model(&w, m, r, err) : put_alone(&w, m, r, err)) == 0 &&
        tensors_write_commit(&w, err) == 0)
        return 0;
    tensors_write_abort(&w);
    return -1;
}

// ---- all of it ----

static int open_sums(Run *r, char *err) {
    size_t n = (size_t)r->n_features, rows = (size_t)r->c->context.state->max_rows;
    size_t layer = n * (n + (size_t)r->y_cols) * sizeof(float);
    r->group = max_int(1, min_int(r->n_layers, (int)(SUMS_BYTES / layer)));
    r->products = malloc((size_t)r->group * n * n * sizeof(float));
    r->targets = malloc((size_t)r->group * n * (size_t)r->y_cols * sizeof(float));
    r->x = malloc(rows * n * sizeof(float)), r->xt = malloc(rows * n * sizeof(float));
    r->xb = malloc(rows * n * sizeof(float));
    r->y = calloc(rows * (size_t)r->y_cols, sizeof(float));
    return r->products && r->targets && r->x && r->xt && r->xb && r->y
               ? 0
               : fail(err, "out of memory for the sums of %d layers", r->group);
}

static int fit_probes(Run *r, char *err) {
    size_t n = (size_t)r->n_features;
    int most = r->group;
    for (r->layer0 = 0; r->layer0 < r->n_layers; r->layer0 += most) {
        r->group = min_int(most, r->n_layers - r->layer0);
        memset(r->products, 0, (size_t)r->group * n * n * sizeof(float));
        memset(r->targets, 0, (size_t)r->group * n * (size_t)r->y_cols * sizeof(float));
        for (int i = 0; i < r->n_texts; i++)
            if (sum_text(r, &r->text[i], err) != 0) return -1;
        if (solve_group(r, err) != 0) return -1;
    }
    return 0;
}

static int run_all(Run *r, const char *text, size_t n, char *err) {
    size_t heads = (size_t)r->n_heads;
    r->share = calloc(N_GRID * heads + 1, sizeof(float));
    r->head_max = calloc(heads + 1, sizeof(float));
    r->probe = calloc(heads * probe_features(r->m) + 1, sizeof(float));
    r->explained = calloc(heads + 1, sizeof(double));
    r->squares = calloc(heads + 1, sizeof(double)), r->sums = calloc(heads + 1, sizeof(double));
    if (!r->share || !r->head_max || !r->probe || !r->explained || !r->squares || !r->sums)
        return fail(err, "out of memory for the profile of %zu heads", heads);
    if (read_texts(r, text, n, err) != 0 || open_sums(r, err) != 0) return -1;
    int passes = (r->n_layers + r->group - 1) / r->group;
    for (int i = 0; i < r->n_texts; i++) r->total += (2 + passes) * (long)r->text[i].n_ctx;
    for (int i = 0; i < r->n_texts; i++)
        if (score_text(r, &r->text[i], err) != 0) return -1;
    return fit_probes(r, err);
}

static void close_run(Run *r) {
    for (int i = 0; i < r->n_texts; i++) free(r->text[i].score);
    free(r->text), free(r->share), free(r->head_max), free(r->probe), free(r->explained);
    free(r->squares), free(r->sums), free(r->products), free(r->targets);
    free(r->x), free(r->xt), free(r->xb), free(r->y);
    ids_free(&r->ids);
}

int calibrate_run(const Calibrate *c, const char *text, size_t n, const char *path, bool into,
                  CalibrateResult *result, char *err) {
    const Config *m = &c->context.state->model->config;
    double start = now();
    Run r = {.c = c,
             .m = m,
             .n_layers = kvcache_scored_layers(&c->context.kv->shape, NULL),
             .n_features = row_features(m),
             .y_cols = (m->n_kv_heads + Y_COLS - 1) / Y_COLS * Y_COLS};
    r.n_heads = r.n_layers * m->n_kv_heads;
    int status = run_all(&r, text, n, err);
    if (status == 0) status = write_profile(&r, path, into, err);
    *result = (CalibrateResult){.n_texts = r.n_texts, .seconds = now() - start};
    for (int i = 0; i < r.n_texts; i++) {
        result->n_tokens += r.text[i].n_ctx;
        result->longest = max_int(result->longest, r.text[i].n_ctx);
    }
    for (int h = 0; h < r.n_heads && status == 0; h++)
        result->explained += r.explained[h] / r.n_heads;
    close_run(&r);
    return status;
}
