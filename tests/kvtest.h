// kvtest.h: caches of random keys and values, and what they hold, for the tests of the cache and of
// its files.
#ifndef KVTEST_H
#define KVTEST_H
#include <math.h>

#include "kvcache.h"
#include "test.h"

enum { L = 2, HEADS = 6, KV = 2, GROUP = HEADS / KV, D = 16, MAX_N = 400 };

static uint32_t seed = 7;

static inline float rnd(void) {
    seed = seed * 1664525u + 1013904223u;
    return (float)(int32_t)seed / 2147483648.0f;
}

static inline float *randoms(size_t n) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = rnd();
    return x;
}

static char err[ERR_LEN];
static const int no_window[L] = {0, 0}, one_window[L] = {0, 70}, wide_window[L] = {0, 300};
static const int one_chunk[L] = {0, 70}, wide_chunk[L] = {0, 300};  // windows that are chunks

// Logits of the sinks of shape_with's heads: that some hardly count, and some take nearly all.
static const float some_sinks[L * HEADS] = {0.5f, -3, 2, 0, -60, 1, 3, 12, -1, 0.2f, 1, -0.5f};
static const float *with_sinks;  // NULL: they have none

static inline int n_free(const KVCache *kv) {
    int n = 0;
    for (int i = 0; i < PAGE_CLASSES; i++) n += kv->store[i].n_free;
    return n;
}

static inline KVShape shape_with(const int *window) {
    return (KVShape){.n_layers = L,
                     .n_heads = HEADS,
                     .n_kv_heads = KV,
                     .head_dim = D,
                     .scale = 0.7f,
                     .window = window,
                     .chunks = window == one_chunk || window == wide_chunk,
                     .sinks = with_sinks};
}

static inline KVShape one_layer(int n_heads, int n_kv_heads, int head_dim, const int *window) {
    return (KVShape){.n_layers = 1,
                     .n_heads = n_heads,
                     .n_kv_heads = n_kv_heads,
                     .head_dim = head_dim,
                     .scale = 1,
                     .window = window};
}

// One forward call's worth for every layer: append and attend n random rows of each run.
static inline void step(KVCache *kv, const KVRun *runs, int n_runs, float *out, const float *q,
                        const float *k, const float *v) {
    KVQuery query = {q, out, HEADS * D, NULL};
    for (int r = 0; r < n_runs; r++) CHECK(kvcache_reserve(kv, runs[r].seq, runs[r].n, err) == 0);
    for (int l = 0; l < L; l++) {
        kvcache_append(kv, l, runs, n_runs, k, v);
        kvcache_attend(kv, l, runs, n_runs, &query);
    }
    kvcache_advance(kv, runs, n_runs);
}

static inline void append_random(KVCache *kv, int seq, int n, float *out) {
    float *q = randoms((size_t)n * HEADS * D), *k = randoms((size_t)n * KV * D),
          *v = randoms((size_t)n * KV * D);
    float *sink = out ? out : malloc((size_t)n * HEADS * D * sizeof *sink);
    step(kv, &(KVRun){seq, n}, 1, sink, q, k, v);
    free(q), free(k), free(v);
    if (!out) free(sink);
}

// What query head h sees of pairs [lo, hi) of a head's list, with its sink, in double; lse may be
// NULL.
static inline void brute(const KVCache *kv, int seq, int layer, int h, const float *q, int lo,
                         int hi, double *out, double *lse) {
    double max = -INFINITY, sum = 0, *s = malloc((size_t)(hi + 1) * sizeof *s);
    float k[D], v[D];
    for (int t = lo; t < hi; t++) {
        kvcache_pair(kv, (KVHeadAt){seq, layer, h / GROUP}, t, k, NULL);
        s[t] = 0;
        for (int i = 0; i < D; i++) s[t] += (double)q[i] * k[i];
        s[t] *= kv->shape.scale;
        if (kv->shape.softcap > 0) s[t] = kv->shape.softcap * tanh(s[t] / kv->shape.softcap);
        s[t] += kvcache_bias(kv, (KVHeadAt){seq, layer, h / GROUP}, t);
        max = fmax(max, s[t]);
    }
    double sink = kvshape_sink(&kv->shape, layer, h);
    max = fmax(max, sink);
    sum = exp(sink - max);
    for (int i = 0; i < D; i++) out[i] = 0;
    for (int t = lo; t < hi; t++) {
        double w = exp(s[t] - max);
        kvcache_pair(kv, (KVHeadAt){seq, layer, h / GROUP}, t, NULL, v);
        sum += w;
        for (int i = 0; i < D; i++) out[i] += w * v[i];
    }
    for (int i = 0; i < D; i++) out[i] /= sum;
    if (lse) *lse = max + log(sum);
    free(s);
}

// How far results may be from the brute force: unless pairs are f32, both products of a long run
// may be computed in bf16.
static inline double allowed(const KVCache *kv, double exact) {
    return exact + (kv->type == KV_F16 ? 2.0 * (double)kern.packed_error : 0.0);
}

static inline KVTypes types_of(const char *name) {
    KVTypes t = {KV_F16, KV_F16};
    CHECK(kvcache_types_parse(name, &t) == 0);
    return t;
}

static inline float *snapshot(const KVCache *kv, int seq, int *n) {
    size_t at = 0;
    float *all = malloc((size_t)L * KV * MAX_N * (2 * D + 1) * sizeof *all);
    for (int l = 0; l < L; l++) {
        for (int g = 0; g < KV; g++) {
            KVHead *h = kvcache_head(kv, seq, l, g);
            for (int t = h->dropped; t < h->len; t++, at += 2 * D + 1) {
                all[at] = (float)kvcache_pair(kv, (KVHeadAt){seq, l, g}, t, all + at + 1,
                                              all + at + 1 + D);
            }
        }
    }
    *n = (int)at;
    return all;
}

static inline void check_same(const KVCache *kv, int seq, const float *want, int n) {
    int m;
    float *have = snapshot(kv, seq, &m);
    CHECK(m == n && memcmp(have, want, (size_t)n * sizeof *have) == 0);
    free(have);
}

static inline PageClass class_of(const KVCache *kv, const KVHead *h, int page) {
    return kv->pages[h->page[page]].class;
}

// One token and a long run over whatever pages a sequence has, against the brute force.
static inline void check_attention(KVCache *kv, int seq) {
    for (int n = 1; n <= 12; n += 11) {
        int fork = kvcache_fork(kv, seq, err), wrong = 0;
        float *q = randoms((size_t)n * HEADS * D), *k = randoms((size_t)n * KV * D),
              *v = randoms((size_t)n * KV * D), out[12 * HEADS * D];
        KVRun run = {fork, n};
        CHECK(kvcache_reserve(kv, fork, n, err) == 0);
        for (int l = 0; l < L; l++) {
            kvcache_append(kv, l, &run, 1, k, v);
            kvcache_attend(kv, l, &run, 1, &(KVQuery){q, out, HEADS * D, NULL});
            for (int i = 0; i < n * HEADS; i++) {
                double want[D];
                int hi = kvcache_head(kv, fork, l, i % HEADS / GROUP)->len - n + i / HEADS + 1;
                brute(kv, fork, l, i % HEADS, q + i * D, 0, hi, want, NULL);
                for (int j = 0; j < D; j++)
                    wrong += !(fabs(out[i * D + j] - want[j]) <= allowed(kv, 3e-5));
            }
        }
        CHECK(wrong == 0);
        kvcache_drop(kv, fork);
        free(q), free(k), free(v);
    }
}
#endif
