// merge.c: values of pairs that go, added to those of pairs that stay.
#include "merge.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvcache.h"
#include "util.h"

static const float LEAST = 1e-6f;  // of lengths that are divided by

typedef struct {
    const FitHead *h;
    float *keys;    // [blocks][head_dim][64] keys of the pairs that stay, over their lengths
    float *weight;  // [n_kept] what was added so far
    float *values;  // [n_kept][head_dim] and its sum
} Merge;

static float length_of(const float *x, int d) {
    float sum = 0;
    for (int i = 0; i < d; i++) sum += x[i] * x[i];
    return sqrtf(sum);
}

// x [d] = the key of pair t over its length.
static void unit_key(const FitHead *h, int t, float *x) {
    int d = h->head_dim;
    const float *k = h->k + (size_t)(t / PAGE) * d * PAGE + t % PAGE;
    for (int i = 0; i < d; i++) x[i] = k[(size_t)i * PAGE];
    float length = fmaxf(length_of(x, d), LEAST);
    for (int i = 0; i < d; i++) x[i] /= length;
}

// Pair t goes to the j-th of those that stay.
static void add_pair(Merge *m, int t, int j, float w) {
    int d = m->h->head_dim;
    const float *v = m->h->v + (size_t)t * d;
    for (int i = 0; i < d; i++) m->values[(size_t)j * d + i] += w * v[i];
    m->weight[j] += w;
}

// ---- the most similar key ----

// Of n pairs going [n], whose unit keys are rows [n][head_dim]: the key most alike, best [n], and
// where, at [n].
static void find_similar(const Merge *m, const float *rows, int n, float *best, int *at) {
    int d = m->h->head_dim;
    float dots[PAGE * PAGE];
    for (int i = 0; i < n; i++) best[i] = -INFINITY, at[i] = 0;
    for (int from = 0; from < m->h->n_kept; from += PAGE) {
        kern.gemm_f32(&(Gemm){.c = dots,
                              .ldc = PAGE,
                              .a = rows,
                              .lda = (size_t)d,
                              .b = m->keys + (size_t)from * d,
                              .n = n,
                              .inner = d,
                              .cols = PAGE});
        for (int i = 0; i < n; i++)
            for (int j = 0; j < min_int(m->h->n_kept - from, PAGE); j++)
                if (dots[i * PAGE + j] > best[i]) best[i] = dots[i * PAGE + j], at[i] = from + j;
    }
}

static void merge_similar(Merge *m, const int *going, int n) {
    const FitHead *h = m->h;
    int d = h->head_dim, at[PAGE];
    float rows[PAGE * MAX_HEAD_DIM], best[PAGE];
    for (int i = 0; i < n; i++) unit_key(h, going[i], rows + (size_t)i * d);
    find_similar(m, rows, n, best, at);
    for (int i = 0; i < n; i++) {
        float v = length_of(h->v + (size_t)going[i] * d, d);
        float its = length_of(h->v + (size_t)h->kept[at[i]] * d, d);
        add_pair(m, going[i], at[i], fmaxf(best[i], 0) * v / (v + its + LEAST));
    }
}

// Of all pairs that go, 64 at a time.
static void merge_all_similar(Merge *m) {
    const FitHead *h = m->h;
    int d = h->head_dim, going[PAGE], n = 0;
    float x[MAX_HEAD_DIM];
    for (int j = 0; j < h->n_kept; j++) {
        float *to = m->keys + (size_t)(j / PAGE) * d * PAGE + j % PAGE;
        unit_key(h, h->kept[j], x);
        for (int i = 0; i < d; i++) to[(size_t)i * PAGE] = x[i];
    }
    for (int t = 0, j = 0; t < h->n_pairs; t++) {
        if (j < h->n_kept && h->kept[j] == t) {
            j++;
            continue;
        }
        going[n++] = t;
        if (n == PAGE) merge_similar(m, going, n), n = 0;
    }
    merge_similar(m, going, n);
}

// ---- the nearest pair ----

static void merge_all_near(Merge *m) {
    const FitHead *h = m->h;
    for (int t = 0, j = 0; t < h->n_pairs; t++) {  // j: the first that stays from t on
        while (j < h->n_kept && h->kept[j] < t) j++;
        if (j < h->n_kept && h->kept[j] == t) continue;
        bool before = j == h->n_kept || (j > 0 && t - h->kept[j - 1] <= h->kept[j] - t);
        add_pair(m, t, before ? j - 1 : j, 1);
    }
}

// ---- all of it ----

int merge_head(const FitHead *h, MergeWay way, float *values) {
    int d = h->head_dim, blocks = (h->n_kept + PAGE - 1) / PAGE;
    for (int j = 0; j < h->n_kept; j++)
        memcpy(values + (size_t)j * d, h->v + (size_t)h->kept[j] * d, (size_t)d * sizeof *values);
    if (h->n_kept == h->n_pairs || h->n_kept == 0) return 0;
    Merge m = {.h = h, .values = values};
    m.keys = calloc((size_t)blocks * d * PAGE, sizeof *m.keys);
    m.weight = calloc((size_t)h->n_kept, sizeof *m.weight);
    int status = m.keys && m.weight ? 0 : -1;
    if (status == 0) {
        if (way == MERGE_SIMILAR)
            merge_all_similar(&m);
        else
            merge_all_near(&m);
        for (int j = 0; j < h->n_kept; j++)
            for (int i = 0; i < d && m.weight[j] > 0; i++)
                values[(size_t)j * d + i] /= 1 + m.weight[j];
    }
    free(m.keys), free(m.weight);
    return status;
}
