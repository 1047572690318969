// test_fit.c: fitting what stays, against the definition in double precision.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fit.h"
#include "merge.h"
#include "test.h"
#include "util.h"

static uint64_t state = 7;

static float normal(void) {  // nearly: a sum of twelve uniform numbers (central limit)
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += (double)(random_next(&state) >> 11) * 0x1p-53;
    return (float)sum;
}

static float *normals(size_t n, float scale) {
    float *x = malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = scale * normal();
    return x;
}

// ---- the definition ----

typedef struct {
    double *p, *x, *w;  // [rows][pairs], [rows][kept], [kept]
    double *alpha;
} Naive;

static double *doubles(size_t n) { return calloc(n + 1, sizeof(double)); }

static double key(const FitHead *h, int j, int c) {
    return h->k[((size_t)(j / PAGE) * h->head_dim + c) * PAGE + j % PAGE];
}

static void naive_weights(const FitHead *h, Naive *f) {
    for (int i = 0; i < h->n_rows; i++) {
        double *p = f->p + (size_t)i * h->n_pairs, all = h->own ? exp(h->own[i]) : 0, sum = 0;
        for (int j = 0; j < h->n_pairs; j++) {
            double s = 0;
            for (int c = 0; c < h->head_dim; c++)
                s += h->q[(size_t)i * h->head_dim + c] * key(h, j, c);
            if (h->softcap > 0) s = h->softcap * tanh(s / h->softcap);
            all += p[j] = exp(s + (h->was ? h->was[j] : 0));
        }
        for (int j = 0; j < h->n_pairs; j++) sum += p[j] /= all;
        f->alpha[i] = sum;
    }
}

static void naive_biases(const FitHead *h, Naive *f) {
    double *m = doubles((size_t)h->n_kept), *c = doubles((size_t)h->n_kept);
    for (int a = 0; a < h->n_kept; a++) f->w[a] = 1;
    for (int step = 0; h->biases && step < h->steps; step++) {
        for (int a = 0; a < h->n_kept; a++) m[a] = c[a] = 0;
        for (int i = 0; i < h->n_rows; i++) {
            const double *p = f->p + (size_t)i * h->n_pairs;
            double y = 0;
            for (int a = 0; a < h->n_kept; a++) y += p[h->kept[a]] * f->w[a];
            for (int a = 0; a < h->n_kept; a++)
                m[a] += p[h->kept[a]] * y, c[a] += p[h->kept[a]] * f->alpha[i];
        }
        for (int a = 0; a < h->n_kept; a++)
            f->w[a] *= (c[a] + h->floor) / (m[a] + h->floor * f->w[a]);
    }
    for (int a = 0; a < h->n_kept && h->biases; a++) {
        double was = h->was ? h->was[h->kept[a]] : 0;
        f->w[a] = exp(fmin(fmax(was + log(f->w[a]), -4), 4) - was);
    }
    free(m), free(c);
}

// x = A^-1 x by Gauss, A [n][n] symmetric, x [n][d].
static void naive_solve(double *a, double *x, int n, int d) {
    for (int k = 0; k < n; k++) {
        for (int i = k + 1; i < n; i++) {
            double r = a[(size_t)i * n + k] / a[(size_t)k * n + k];
            for (int j = k; j < n; j++) a[(size_t)i * n + j] -= r * a[(size_t)k * n + j];
            for (int c = 0; c < d; c++) x[(size_t)i * d + c] -= r * x[(size_t)k * d + c];
        }
    }
    for (int k = n - 1; k >= 0; k--) {
        for (int c = 0; c < d; c++) {
            for (int j = k + 1; j < n; j++)
                x[(size_t)k * d + c] -= a[(size_t)k * n + j] * x[(size_t)j * d + c];
            x[(size_t)k * d + c] /= a[(size_t)k * n + k];
        }
    }
}

static void naive_fit(const FitHead *h, double *values, double *bias) {
    int n = h->n_kept, d = h->head_dim;
    Naive f = {doubles((size_t)h->n_rows * h->n_pairs), doubles((size_t)h->n_rows * n),
               doubles((size_t)n), doubles((size_t)h->n_rows)};
    double *g = doubles((size_t)n * n), *y = doubles((size_t)n * d);
    naive_weights(h, &f);
    naive_biases(h, &f);
    for (int i = 0; i < h->n_rows; i++) {
        const double *p = f.p + (size_t)i * h->n_pairs;
        double *x = f.x + (size_t)i * n, sum = 0;
        for (int a = 0; a < n; a++) sum += x[a] = p[h->kept[a]] * f.w[a];
        for (int a = 0; a < n; a++) x[a] *= f.alpha[i] / sum;
        for (int c = 0; c < d; c++) {
            double r = 0;
            for (int j = 0; j < h->n_pairs; j++) r += p[j] * h->v[(size_t)j * d + c];
            for (int a = 0; a < n; a++) r -= x[a] * h->v[(size_t)h->kept[a] * d + c];
            for (int a = 0; a < n; a++) y[(size_t)a * d + c] += x[a] * r;
        }
        for (int a = 0; a < n; a++)
            for (int b = 0; b < n; b++) g[(size_t)a * n + b] += x[a] * x[b];
    }
    for (int a = 0; a < n; a++) g[(size_t)a * n + a] += h->ridge;
    naive_solve(g, y, n, d);
    for (int a = 0; a < n; a++) {
        bias[a] = log(f.w[a]) + (h->was ? h->was[h->kept[a]] : 0);
        for (int c = 0; c < d; c++)
            values[(size_t)a * d + c] = h->v[(size_t)h->kept[a] * d + c] + y[(size_t)a * d + c];
    }
    free(f.p), free(f.x), free(f.w), free(f.alpha), free(g), free(y);
}

// ---- against it ----

typedef struct {
    int d, pairs, rows, every;
    bool biases, own;
    float softcap;
    bool was;
} Case;

static void test_case(const Case *t) {
    int pages = (t->pairs + PAGE - 1) / PAGE, n = 0;
    size_t all = (size_t)pages * PAGE * t->d;
    float *k = normals(all, 1), *v = normals(all, 1),
          *q = normals((size_t)t->rows * t->d, 2 / sqrtf((float)t->d));
    float *own = normals((size_t)t->rows, 1), *was = normals((size_t)t->pairs, 1);
    int *kept = malloc((size_t)t->pairs * sizeof *kept);
    for (int j = 0; j < t->pairs; j++)
        if (j % t->every == 0) kept[n++] = j;
    FitHead h = {.head_dim = t->d,
                 .n_pairs = t->pairs,
                 .k = k,
                 .v = v,
                 .n_kept = n,
                 .kept = kept,
                 .n_rows = t->rows,
                 .q = q,
                 .softcap = t->softcap,
                 .own = t->own ? own : NULL,
                 .was = t->was ? was : NULL,
                 .biases = t->biases,
                 .ridge = 0.1,
                 .floor = 0.1,
                 .steps = 30};
    float *values = malloc((size_t)n * t->d * sizeof *values),
          *bias = malloc((size_t)n * sizeof *bias);
    double *values_is = doubles((size_t)n * t->d), *bias_is = doubles((size_t)n), off = 0, size = 0,
           worst = 0;
    FitRoom room = {0};
    CHECK(fit_head(&h, &room, values, bias) == 0);
    // what another head left in the room does not matter
    memset(room.block, 0xff, room.floats * sizeof *room.block);
    CHECK(fit_head(&h, &room, values, bias) == 0);
    fit_room_free(&room);
    naive_fit(&h, values_is, bias_is);
    for (int i = 0; i < n * t->d; i++) {
        off += (values[i] - values_is[i]) * (values[i] - values_is[i]);
        size += values_is[i] * values_is[i];
    }
    for (int a = 0; a < n; a++)
        if (fabs(bias[a] - bias_is[a]) > worst) worst = fabs(bias[a] - bias_is[a]);
    CHECK(sqrt(off / size) < 1e-4);
    CHECK(worst < 1e-4);
    if (!(sqrt(off / size) < 1e-4 && worst < 1e-4))
        printf("d %d, %d of %d pairs, %d rows: values off by %g, biases by %g\n", t->d, n, t->pairs,
               t->rows, sqrt(off / size), worst);
    free(k), free(v), free(q), free(own), free(was), free(kept), free(values), free(bias),
        free(values_is), free(bias_is);
}

// ---- merging ----

static double squared(const float *x, int d) {
    double sum = 0;
    for (int c = 0; c < d; c++) sum += (double)x[c] * x[c];
    return sum;
}

static double cosine(const FitHead *h, int i, int j) {
    double ij = 0, ii = 0, jj = 0;
    for (int c = 0; c < h->head_dim; c++) {
        ij += key(h, i, c) * key(h, j, c);
        ii += key(h, i, c) * key(h, i, c), jj += key(h, j, c) * key(h, j, c);
    }
    return ij / sqrt(ii * jj);
}

// values [n_kept][head_dim] by the formula of merge.h, pair by pair.
static void naive_merge(const FitHead *h, MergeWay way, double *values) {
    int d = h->head_dim;
    double *weight = doubles((size_t)h->n_kept);
    for (int a = 0; a < h->n_kept; a++)
        for (int c = 0; c < d; c++) values[a * d + c] = h->v[(size_t)h->kept[a] * d + c];
    for (int i = 0; i < h->n_pairs; i++) {
        int to = 0;
        bool stays = false;
        for (int a = 0; a < h->n_kept; a++) {
            stays = stays || h->kept[a] == i;
            bool nearer = abs(h->kept[a] - i) < abs(h->kept[to] - i);
            bool liker = cosine(h, i, h->kept[a]) > cosine(h, i, h->kept[to]);
            if (way == MERGE_NEAR ? nearer : liker) to = a;
        }
        double v = sqrt(squared(h->v + (size_t)i * d, d));
        double its = sqrt(squared(h->v + (size_t)h->kept[to] * d, d));
        double w = way == MERGE_NEAR ? 1 : fmax(cosine(h, i, h->kept[to]), 0) * v / (v + its);
        weight[to] += stays ? 0 : w;
        for (int c = 0; c < d && !stays; c++) values[to * d + c] += w * h->v[(size_t)i * d + c];
    }
    for (int a = 0; a < h->n_kept * d; a++) values[a] /= 1 + weight[a / d];
    free(weight);
}

static void test_merge(int d, int n_pairs, int every, MergeWay way) {
    size_t all = (size_t)(n_pairs + PAGE - 1) / PAGE * PAGE * d;
    float *k = normals(all, 1), *v = normals(all, 1), *values = normals(all, 1);
    int kept[512], n = 0;
    for (int j = every / 2; j < n_pairs; j++)
        if (j % every == 0 || j % 7 == 1) kept[n++] = j;
    FitHead h = {.head_dim = d, .n_pairs = n_pairs, .k = k, .v = v, .n_kept = n, .kept = kept};
    double *is = doubles(all), worst = 0;
    CHECK(merge_head(&h, way, values) == 0);
    naive_merge(&h, way, is);
    for (int i = 0; i < n * d; i++) worst = fmax(worst, fabs(values[i] - is[i]));
    if (!CHECK(worst < 1e-5)) printf("merge, d %d, %d pairs: off by %g\n", d, n_pairs, worst);
    free(k), free(v), free(values), free(is);
}

// Keys (1, 0) and (0, 1) stay with the values (2, 0) and (0, 1); (3, 4), whose value is (3, 0),
// goes. It is more like the second, cos .8, so that w = .8 * 3 / (3 + 1) = .6 and the second
// becomes
// ((0, 1) + .6 (3, 0)) / 1.6. It stands between them, so that the first is as near: (2.5, 0).
static void test_merge_example(void) {
    float k[2 * PAGE] = {[0] = 1, [1] = 3, [PAGE + 1] = 4, [PAGE + 2] = 1}, values[4];
    const float v[2 * PAGE] = {2, 0, 3, 0, 0, 1};
    FitHead h = {.head_dim = 2, .n_pairs = 3, .k = k, .v = v, .n_kept = 2, .kept = (int[]){0, 2}};
    CHECK(merge_head(&h, MERGE_SIMILAR, values) == 0);
    CHECK_NEAR(values[0], 2, 1e-6), CHECK_NEAR(values[1], 0, 1e-6);
    CHECK_NEAR(values[2], 1.125, 1e-6), CHECK_NEAR(values[3], 0.625, 1e-6);
    CHECK(merge_head(&h, MERGE_NEAR, values) == 0);
    CHECK_NEAR(values[0], 2.5, 1e-6), CHECK_NEAR(values[1], 0, 1e-6);
    CHECK_NEAR(values[2], 0, 1e-6), CHECK_NEAR(values[3], 1, 1e-6);
    k[1] = -3, k[PAGE + 1] = -4;  // a key that is like none adds nothing
    CHECK(merge_head(&h, MERGE_SIMILAR, values) == 0);
    CHECK(values[0] == 2 && values[1] == 0 && values[2] == 0 && values[3] == 1);
    h.n_kept = 3, h.kept = (int[]){0, 1, 2};
    float same[6];
    CHECK(merge_head(&h, MERGE_SIMILAR, same) == 0 && memcmp(same, v, sizeof same) == 0);
}

int main(int argc, char **argv) {
    if (kernels_init(argc > 1 ? argv[1] : getenv("ISA")) != 0) return 2;
    const Case cases[] = {
        {64, 300, 192, 5, true, false, 0, false}, {64, 300, 192, 5, false, false, 0, false},
        {64, 300, 100, 2, true, false, 0, false}, {64, 640, 64, 2, true, true, 0, false},
        {80, 257, 200, 3, true, true, 30, false}, {256, 130, 150, 10, true, false, 0, false},
        {16, 70, 9, 2, true, false, 0, false},    {64, 65, 64, 64, true, false, 0, false},
        {64, 300, 192, 5, true, false, 0, true},  {32, 200, 90, 3, false, true, 20, true}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) test_case(&cases[i]);
    test_merge_example();
    for (int way = MERGE_SIMILAR; way <= MERGE_NEAR; way++) {
        test_merge(64, 300, 5, (MergeWay)way), test_merge(16, 65, 9, (MergeWay)way);
        test_merge(80, 257, 200, (MergeWay)way);
    }
    return test_end("test_fit");
}
