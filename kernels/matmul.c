// matmul.c: how a product of matrices is cut and shared among threads.
//
// A job is cut twice: into blocks of tokens whose input stays in the second-level cache, and into
// units of a few panels of weights. Units of all matrices of a job stand in one line, so that the
// threads meet once for q, k and v. The fact that must stay true: a unit computes whole rows of its
// panels, so that no cut passes through a sum and the bits are those of one thread and one token at
// a time.
#include "kernels/matmul.h"

#include <string.h>

#include "kernels/blas.h"
#include "util.h"

enum {
    PAIR_FROM = 16,     // tokens; with fewer, reading weights takes longer than multiplying
    TOKEN_BLOCK = 264,  // tokens whose activations, of small models, stay in the second-level cache
    TILED_BLOCK = 512,  // the same where weights are unpacked for tiles
    UNIT_MAX = HAS_BLAS ? BLAS_PANELS : 2,  // panels of a unit
    RUN_MAX = 32,  // panels of a unit when tokens are few: as many as multiply_unit has room for
};

// ---- one unit ----

typedef struct {
    const Products *j;
    int unit, n_units;  // panels that are multiplied at once, and how many such units there are
    int block;          // tokens of a unit
    int first;          // of its units, counted over all jobs and blocks of tokens
    bool blas;          // by OpenBLAS
} Job;

Activations activations_from(const Activations *a, int first) {
    Activations b = *a;
    size_t at = (size_t)first * a->stride, group = at / QGROUP;
    b.x += at, b.q += at, b.q16 += at;
    if (b.tiled) b.tiled += first;
    b.unit += first, b.unit16 += first, b.scale += group, b.sum += group, b.shift += group;
    return b;
}

bool activations_rounded(const Activations *x) {
    return x->for_q8 || x->for_q4 || (x->for_halves && x->tiled && kern.round_tiles);
}

void activations_round(const Activations *x, int t) {
    if (kern.round_tiles && x->tiled && x->tiled[t])
        kern.round_tiles(x, t, t + 1);
    else if (x->for_q8 || x->for_q4)
        kern.quantize(x, t, t + 1);
}

static int units_of(const Matrix *w, int unit) { return (w->panels + unit - 1) / unit; }

// The padded rows of the last panel must not reach the next output row.
static void last_panel(PanelProduct p, int rows) {
    for (int t = p.t0; t < p.t1; t++) {
        float row[PANEL];
        PanelProduct one = p;
        one.out = row, one.ld = 0, one.t0 = t, one.t1 = t + 1;
        kern.matmul[p.w->type](&one);
        memcpy(p.out + t * p.ld, row, (size_t)rows * sizeof *row);
    }
}

// Whether a row's products with the weights are of tiles.
static bool is_tiled(const Matrix *w, const Activations *x, int t) {
    return x->tiled && x->tiled[t] && kern.matmul_tiles[w->type];
}

// The panels of a unit, p's and those after it, for p's tokens, which are tiled or are not.
static void multiply_tokens(const Job *job, PanelProduct p) {
    const Matrix *w = p.w;
    if (job->blas) {
        matmul_blas(&p);
        return;
    }
    if (is_tiled(w, p.x, p.t0)) {
        for (int end = min_int(p.panel + job->unit, w->panels); p.panel < end; p.panel += 2) {
            kern.matmul_tiles[w->type](&p, min_int(2, end - p.panel));
            p.out += 2 * PANEL;
        }
        return;
    }
    if (job->unit == 2 && (p.panel + 2) * PANEL <= w->rows && kern.matmul_pair[w->type]) {
        kern.matmul_pair[w->type](&p);
        return;
    }
    for (int end = min_int(p.panel + job->unit, w->panels); p.panel < end; p.panel++) {
        int rows = min_int(PANEL, w->rows - p.panel * PANEL);
        if (rows == PANEL)
            kern.matmul[w->type](&p);
        else
            last_panel(p, rows);
        p.out += PANEL;
    }
}

// The same for all of p's tokens: those of long runs and those of short ones in turn, while the
// panels are in the cache.
static void multiply_panels(const Job *job, PanelProduct p) {
    for (int end = p.t1; p.t0 < end; p.t0 = p.t1) {
        bool tiled = is_tiled(p.w, p.x, p.t0);
        p.t1 = p.t0 + 1;
        while (p.t1 < end && is_tiled(p.w, p.x, p.t1) == tiled) p.t1++;
        multiply_tokens(job, p);
    }
}

static void multiply_unit(const Job *job, int i) {
    const Products *j = job->j;
    const Product *p = j->p;
    int first = i / job->n_units * job->block, u = i % job->n_units;
    int n = min_int(job->block, j->n - first);
    while (u >= units_of(p->w, job->unit)) u -= units_of(p++->w, job->unit);
    const Activations x = activations_from(j->x, first);
    PanelProduct w = {.out = p->out + (size_t)first * p->ld + u * job->unit * PANEL,
                      .ld = (size_t)p->ld,
                      .w = p->w,
                      .panel = u * job->unit,
                      .x = &x,
                      .t1 = n};
    multiply_panels(job, w);
    if (!j->up) return;
    float room[TILED_BLOCK * UNIT_MAX * PANEL];
    int rows = min_int(job->unit * PANEL, w.w->rows - w.panel * PANEL);
    const Activations up_x = activations_from(j->up_x, first);
    PanelProduct up = w;
    up.out = room, up.ld = (size_t)rows, up.w = j->up, up.x = &up_x;
    multiply_panels(job, up);
    for (int t = 0; t < n; t++) j->act(w.out + t * w.ld, room + t * rows, rows);
}

// ---- a job ----

// What one call of OpenBLAS computes does not depend on the number of threads, but its sums change
// with the number of rows.
static bool asks_blas(const Products *j) {
    bool ints = j->up && wtype_ints(j->up->type);
    for (int i = 0; i < j->n_products; i++) ints |= wtype_ints(j->p[i].w->type);
    return HAS_BLAS && j->n >= BLAS_FROM && !ints && !kern.round_tiles;
}

// Panels that are multiplied at once. With few tokens reading takes longest, and of two matrices in
// turn the long runs are read faster: a quarter of what a thread reads.
static int unit_of(const ThreadPool *pool, const Products *j, bool blas) {
    if (j->n >= PAIR_FROM) return blas ? UNIT_MAX : 2;
    int run = j->up && j->up != j->p->w ? j->up->panels / (4 * pool_threads(pool)) : 1;
    return max_int(1, min_int(run, RUN_MAX));
}

static void count_ops(double *ops, const Matrix *w, int n) {
    ops[w->type] += 2.0 * n * w->rows * w->cols;
}

// Returns how many units the job has.
static int plan_job(Job *job, const ThreadPool *pool, double *ops, const Products *j) {
    bool blas = asks_blas(j);
    *job = (Job){.j = j,
                 .unit = unit_of(pool, j, blas),
                 .block = kern.round_tiles ? TILED_BLOCK : TOKEN_BLOCK,
                 .blas = blas};
    for (int i = 0; i < j->n_products; i++) {
        job->n_units += units_of(j->p[i].w, job->unit);
        count_ops(ops, j->p[i].w, j->n);
    }
    if (j->up) count_ops(ops, j->up, j->n);
    return (j->n + job->block - 1) / job->block * job->n_units;
}

static void one_unit(void *ctx, int i) { multiply_unit(ctx, i); }

void matmul(ThreadPool *pool, double *ops, const Products *j) {
    Job job;
    int n = plan_job(&job, pool, ops, j);
    parallel_for(pool, n, one_unit, &job);
}

// Jobs one after the other; the last is followed by one that begins where all units end.
static void unit_of_all(void *ctx, int i) {
    const Job *job = ctx;
    while (i >= job[1].first) job++;
    multiply_unit(job, i - job->first);
}

void matmul_all(ThreadPool *pool, double *ops, const Products *jobs, int n_jobs) {
    Job job[MAX_JOBS + 1];
    int n = 0;
    for (int k = 0; k < n_jobs; k++) {
        int units = plan_job(&job[k], pool, ops, &jobs[k]);
        job[k].first = n, n += units;
    }
    job[n_jobs].first = n;
    parallel_for(pool, n, unit_of_all, job);
}

// ---- one entry ----

float matrix_at(const Matrix *w, int r, int c) {
    size_t panel = (size_t)(r / PANEL), k = (size_t)wtype_k(w->type), i = (size_t)(r % PANEL);
    size_t line = (panel * w->cols_padded / k + c / k) * PANEL + i, j = c % k;
    size_t group = (panel * w->cols_padded / QGROUP + c / QGROUP) * PANEL + i;
    switch (w->type) {
    case W_F32:
        return ((const float *)w->data)[line];
    case W_F16:
        return f16_f32(((const uint16_t *)w->data)[line * 2 + j]);
    case W_BF16:
        return bits_float((uint32_t)((const uint16_t *)w->data)[line * 2 + j] << 16);
    case W_Q8:
        return f16_f32(w->scale[group]) * (float)((const int8_t *)w->data)[line * 4 + j];
    default: {
        int byte = w->data[line * 4 + j % 4], nibble = j < 4 ? byte & 15 : byte >> 4;
        float scale = f16_f32(w->scale[group]);
        return w->offset ? scale * (float)nibble + f16_f32(w->offset[group])
                         : scale * (float)(nibble - 8);
    }
    }
}
