// The cache's laws, on random keys and values: attention and scores equal a brute-force softmax,
// forks and rewinds leave no trace, evicting removes exactly what it should.
#include <unistd.h>

#include "kvfile.h"
#include "kvtest.h"

// ---- attention ----

static void test_attention(KVTypes types, const int *window, float softcap) {
    double exact = types.k > KV_F32 || types.v > KV_F32 ? 3e-5 : 2e-6;  // 16 bits of q and p
    KVCache kv;
    KVShape shape = shape_with(window);
    shape.softcap = softcap;
    CHECK(kvcache_open(&kv, &shape, types, NULL, err) == 0);
    int a = kvcache_new(&kv, err), b = kvcache_new(&kv, err);
    const int na[] = {1, 63, 1, 2, 100, 9, 1, 200, 30}, nb[] = {5, 1, 70, 3, 1, 1, 64, 2, 40};
    for (int i = 0; i < 9; i++) {
        KVRun runs[2] = {{a, na[i]}, {b, nb[i]}};
        int n = na[i] + nb[i];
        float *q = randoms((size_t)n * HEADS * D), *k = randoms((size_t)n * KV * D),
              *v = randoms((size_t)n * KV * D);
        float *out = malloc((size_t)n * HEADS * D * sizeof *out);
        for (int r = 0; r < 2; r++) CHECK(kvcache_reserve(&kv, runs[r].seq, runs[r].n, err) == 0);
        for (int l = 0; l < L; l++) {
            kvcache_append(&kv, l, runs, 2, k, v);
            kvcache_attend(&kv, l, runs, 2, &(KVQuery){q, out, HEADS * D, NULL});
            for (int row = 0; row < n; row += row < 4 ? 1 : 31) {
                int r = row >= na[i],
                    hi = kv.seqs[runs[r].seq].next_pos + row - (r ? na[i] : 0) + 1;
                for (int h = 0; h < HEADS; h++) {
                    double want[D];
                    int lo = window[l] && hi > window[l] ? hi - window[l] : 0;
                    if (shape.chunks && window[l]) lo = (hi - 1) / window[l] * window[l];
                    brute(&kv, runs[r].seq, l, h, q + (row * HEADS + h) * D, lo, hi, want, NULL);
                    for (int j = 0; j < D; j++)
                        CHECK_NEAR(out[(row * HEADS + h) * D + j], want[j], allowed(&kv, exact));
                }
            }
        }
        kvcache_advance(&kv, runs, 2);
        free(q), free(k), free(v), free(out);
    }
    KVHead *h = kvcache_head(&kv, a, 1, 0);
    if (window[1])
        CHECK(h->dropped == (shape.chunks ? 407 / 70 * 70 : 407 - 69) / 64 * 64 &&
              h->n_pages < 5);  // a window of pages, not the whole past
    kvcache_close(&kv);
    kvcache_close(&kv);
}

// Rows of the last layer after n more tokens against the brute force.
static void check_rows(KVCache *kv, int seq, int n, double exact) {
    float *q = randoms((size_t)n * HEADS * D), *k = randoms((size_t)n * KV * D),
          *v = randoms((size_t)n * KV * D), *out = malloc((size_t)n * HEADS * D * sizeof *out);
    KVRun run = {seq, n};
    CHECK(kvcache_reserve(kv, seq, n, err) == 0);
    for (int l = 0; l < L; l++) {
        kvcache_append(kv, l, &run, 1, k, v);
        kvcache_attend(kv, l, &run, 1, &(KVQuery){q, out, HEADS * D, NULL});
    }
    int len = kvcache_head(kv, seq, L - 1, 0)->len;
    for (int row = 0; row < n; row += 7) {
        for (int h = 0; h < HEADS; h++) {
            double want[D];
            int own = kvcache_head(kv, seq, L - 1, h / GROUP)->len - n + row + 1;
            brute(kv, seq, L - 1, h, q + (row * HEADS + h) * D, 0, own, want, NULL);
            for (int j = 0; j < D; j++)
                CHECK_NEAR(out[(row * HEADS + h) * D + j], want[j], allowed(kv, exact));
        }
    }
    CHECK(len > 0);
    kvcache_advance(kv, &run, 1);
    free(q), free(k), free(v), free(out);
}

// Biases and new values: in attention of short and long runs, in pages of every kind, after
// evicting, in forks and in files; a fork made before them keeps what it had.
static void test_fitted(KVTypes types, float softcap) {
    enum { N = 300 };
    double exact = types.k > KV_F32 || types.v > KV_F32 ? 1e-4 : 4e-6;
    KVShape shape = shape_with(no_window);
    KVCache kv, loaded;
    KVInfo info;
    char path[64];
    uint8_t keep[L * KV * N];
    int kept[N], n = 0;
    float bias[N], *value = randoms(N * D), before[D], after[D];
    shape.softcap = softcap;
    CHECK(kvcache_open(&kv, &shape, types, NULL, err) == 0);
    int seq = kvcache_new(&kv, err);
    kv.settling = false;
    append_random(&kv, seq, N, NULL);
    int fork = kvcache_fork(&kv, seq, err);
    CHECK(!kvcache_biased(&kv, seq) && kvcache_own(&kv, seq, err) == 0);
    for (int t = 0; t < N; t++)
        if (t % 3 == 0) bias[n] = 3 * rnd(), kept[n++] = t;
    kvcache_pair(&kv, (KVHeadAt){fork, 1, 1}, 3, NULL, before);
    for (int i = 0; i < L * KV; i++)
        kvcache_refit(&kv, (KVHeadAt){seq, i / KV, i % KV}, &(KVFitted){kept, n, value, bias});
    kvcache_pair(&kv, (KVHeadAt){fork, 1, 1}, 3, NULL, after);
    CHECK(memcmp(before, after, sizeof before) == 0 && !kvcache_biased(&kv, fork));
    kvcache_pair(&kv, (KVHeadAt){seq, 1, 1}, 3, NULL, after);
    for (int j = 0; j < D; j++) CHECK_NEAR(after[j], value[D + j], 1e-3);
    CHECK(kvcache_bias(&kv, (KVHeadAt){seq, 1, 1}, 3) == bias[1]);
    for (int i = 0; i < L * KV * N; i++) keep[i] = i % N % 3 == 0;
    CHECK(kvcache_evict(&kv, seq, 0, N, keep, err) == 0);
    for (int t = 0; t < n; t++) CHECK(kvcache_bias(&kv, (KVHeadAt){seq, 0, 1}, t) == bias[t]);
    CHECK(kvcache_settle(&kv, seq, err) == 0);
    for (int t = 0; t < n; t++) CHECK(kvcache_bias(&kv, (KVHeadAt){seq, 1, 0}, t) == bias[t]);
    test_path(path, "fitted.kvc");
    int ids[N] = {0};
    KVInfo of = {.fingerprint = "f",
                 .model = "m",
                 .policy = "p",
                 .n_ctx = N,
                 .ratio = 0.3,
                 .ids = ids,
                 .n_ids = N};
    CHECK(kvfile_save(&kv, seq, path, &of, err) == 0);
    CHECK(kvfile_load(&loaded, path, &(KVModel){shape, "f"}, NULL, &info, err) == 0);
    CHECK(kvcache_bytes(&loaded, 0) == kvcache_bytes(&kv, seq));
    int again = kvcache_fork(&kv, seq, err);
    for (int run = 1; run <= 128; run *= 4) {
        check_rows(&kv, seq, run, exact);
        check_rows(&loaded, 0, run, exact);
    }
    CHECK(kvcache_bias(&kv, (KVHeadAt){seq, 1, 0}, n + 5) == 0);
    check_rows(&kv, again, 3, exact);
    check_rows(&kv, fork, 3, exact);
    kvcache_close(&loaded);
    kvcache_close(&kv);
    free(value);
    unlink(path);
}

// The same bits from 1, 2 and 4 threads.
static void test_thread_bits(KVTypes types) {
    float *first = NULL;
    for (int threads = 1; threads <= 4; threads *= 2) {
        KVCache kv;
        KVShape shape = shape_with(no_window);
        ThreadPool *pool = pool_open(threads);
        seed = 99;
        CHECK(kvcache_open(&kv, &shape, types, pool, err) == 0);
        int s = kvcache_new(&kv, err);
        float *out = calloc(1500 * HEADS * D, sizeof *out);
        append_random(&kv, s, 1400, out);
        append_random(&kv, s, 1, out + 1400 * HEADS * D);
        append_random(&kv, s, 3, out + 1401 * HEADS * D);
        if (first) CHECK(memcmp(first, out, 1500 * HEADS * D * sizeof *out) == 0);
        if (!first)
            first = out;
        else
            free(out);
        kvcache_close(&kv);
        pool_close(pool);
    }
    free(first);
}

// Forks that read the same pages together, and sequences that share nothing, get the bits they get
// alone.
static void test_company(KVTypes types, const int *window) {
    enum { FORKS = 26, STEPS = 5 };
    KVCache kv;
    KVShape shape = shape_with(window);
    CHECK(kvcache_open(&kv, &shape, types, NULL, err) == 0);
    int base = kvcache_new(&kv, err), seq[FORKS], alone[FORKS];
    append_random(&kv, base, 64 * 4 * 33 + 17, NULL);  // past the first doubling of page ranges
    for (int i = 0; i < FORKS; i++) {
        seq[i] = i % 9 == 8 ? kvcache_new(&kv, err) : kvcache_fork(&kv, base, err);
        append_random(&kv, seq[i], 1 + i * 13, NULL);
        alone[i] = kvcache_fork(&kv, seq[i], err);
    }
    for (int s = 0; s < STEPS; s++) {
        KVRun runs[FORKS];
        int rows = 0, wrong = 0;
        for (int i = 0; i < FORKS; i++)
            runs[i] = (KVRun){seq[i], 1 + (i + s) % 4 * (s > 1)}, rows += runs[i].n;
        size_t width = HEADS * D;
        float *q = randoms(rows * width), *k = randoms((size_t)rows * KV * D),
              *v = randoms((size_t)rows * KV * D);
        float *together = malloc(rows * width * sizeof *q), *one = malloc(rows * width * sizeof *q);
        step(&kv, runs, FORKS, together, q, k, v);
        for (int i = 0, row = 0; i < FORKS; row += runs[i++].n) {
            step(&kv, &(KVRun){alone[i], runs[i].n}, 1, one, q + row * width,
                 k + (size_t)row * KV * D, v + (size_t)row * KV * D);
            wrong += memcmp(one, together + row * width, runs[i].n * width * sizeof *one) != 0;
        }
        CHECK(wrong == 0);
        free(q), free(k), free(v), free(together), free(one);
    }
    kvcache_close(&kv);
}

// As many tokens as kvcache_slack allows, read together, get the bits that they get one by one.
static void test_slack(const int *window) {
    KVCache kv;
    KVShape shape = shape_with(window);
    int none = 0, most = 0;
    size_t width = HEADS * D;
    CHECK(kvcache_open(&kv, &shape, kvcache_both(KV_F16), NULL, err) == 0);
    int seq = kvcache_new(&kv, err);
    append_random(&kv, seq, 530, NULL);
    for (int i = 0; i < 140; i++) {
        int n = 1 + kvcache_slack(&kv, seq), fork = kvcache_fork(&kv, seq, err);
        float *q = randoms((size_t)n * width), *k = randoms((size_t)n * KV * D),
              *v = randoms((size_t)n * KV * D), *out = malloc(2 * (size_t)n * width * sizeof *out);
        step(&kv, &(KVRun){fork, n}, 1, out, q, k, v);
        kvcache_drop(&kv, fork), fork = kvcache_fork(&kv, seq, err);
        for (size_t t = 0; t < (size_t)n; t++)
            step(&kv, &(KVRun){fork, 1}, 1, out + (n + t) * width, q + t * width, k + t * KV * D,
                 v + t * KV * D);
        CHECK(memcmp(out, out + n * width, (size_t)n * width * sizeof *out) == 0);
        kvcache_drop(&kv, fork);
        append_random(&kv, seq, 1, NULL);
        none += n == 1, most += n == KV_LONG_RUN - 1;
        free(q), free(k), free(v), free(out);
    }
    CHECK(none <= (window[1] ? 4 : 0) && most > 100);
    kvcache_close(&kv);
}

// Back to a position: not where a window has left behind what would be seen again.
static void test_cut(const int *window) {
    KVCache kv;
    KVShape shape = shape_with(window);
    CHECK(kvcache_open(&kv, &shape, kvcache_both(KV_F16), NULL, err) == 0);
    int seq = kvcache_new(&kv, err);
    append_random(&kv, seq, 360, NULL);
    int gone = kvcache_head(&kv, seq, 1, 0)->dropped;
    CHECK(gone == (shape.chunks ? 320 : 256));
    for (int pos = 359; pos > 300; pos--) {
        int first = shape.chunks ? pos / 70 * 70 : pos - 69, fork = kvcache_fork(&kv, seq, err);
        CHECK(kvcache_cut(&kv, fork, pos) == (first >= gone));
        kvcache_drop(&kv, fork);
    }
    kvcache_close(&kv);
}

// ---- sequences ----

static void test_fork_and_rewind(void) {
    KVCache kv;
    KVShape shape = shape_with(one_window);
    CHECK(kvcache_open(&kv, &shape, kvcache_both(KV_F16), NULL, err) == 0);
    int a = kvcache_new(&kv, err), n, m;
    append_random(&kv, a, 100, NULL);
    float *before = snapshot(&kv, a, &n);
    int mark = kvcache_mark(&kv, a, err), b = kvcache_fork(&kv, a, err);
    append_random(&kv, a, 150, NULL);  // rolls the window past the marked pages
    append_random(&kv, b, 30, NULL);
    float *after_b = snapshot(&kv, b, &m);
    CHECK(kvcache_rewind(&kv, a, mark, err) == 0);
    check_same(&kv, a, before, n);
    CHECK(kv.seqs[a].next_pos == 100 && kv.seqs[b].next_pos == 130);
    append_random(&kv, a, 77, NULL);
    CHECK(kvcache_rewind(&kv, a, mark, err) == 0);
    check_same(&kv, a, before, n);
    check_same(&kv, b, after_b, m);  // a's steps never touched b
    kvcache_drop(&kv, mark);
    kvcache_drop(&kv, b);
    kvcache_drop(&kv, a);
    CHECK(n_free(&kv) == kv.n_pages);  // every page came back
    free(before), free(after_b);
    kvcache_close(&kv);
}

// ---- scoring ----

// Every (row, head, pair) weight of the definition, then maximum or sum.
static void brute_scores(const KVCache *kv, const KVScoring *s, int layer, const float *q,
                         const float *x_norm, int n, float *score) {
    double out[D], lse[2];
    KVCache pairs = *kv;  // without sinks
    pairs.shape.sinks = NULL;
    for (int row = 0; row < n; row++) {
        for (int h = 0; h < HEADS; h++) {
            const float *qh = q + (row * HEADS + h) * D;
            int held = s->held ? s->held[layer * KV + h / GROUP] : 0;
            int own = kvcache_head(kv, s->seq, layer, h / GROUP)->len - n + row;
            brute(kv, s->seq, layer, h, qh, 0, own + 1, out, lse);
            if (s->subset) {
                const int range[3][2] = {
                    {0, s->n_prefix}, {s->t0 + held, s->t1 + held}, {s->own + held, own + 1}};
                double sum = exp(kvshape_sink(&kv->shape, layer, h));
                for (int i = 0; i < 3; i++) {
                    if (range[i][0] == range[i][1]) continue;
                    brute(&pairs, s->seq, layer, h, qh, range[i][0], range[i][1], out, lse + 1);
                    sum += exp(lse[1]);
                }
                lse[0] = log(sum);
            }
            for (int t = s->t0; t < s->t1 && t + held <= own; t++) {
                double z;
                brute(&pairs, s->seq, layer, h, qh, t + held, t + held + 1, out, &z);
                double w = exp(z - lse[0]);
                int at = ((layer * KV + h / GROUP) * s->n_ctx) + t - s->n_prefix;
                if (s->pair_log)
                    w *= exp(s->pair_log[(layer * HEADS + h) * s->n_ctx + t - s->n_prefix]) /
                         x_norm[row];
                score[at] = s->sum ? score[at] + (float)w : fmaxf(score[at], (float)w);
            }
        }
    }
}

// With earlier: behind the prefix lie 0 to 150 pairs of an earlier document.
static void test_scores(bool subset, bool local, bool sum, bool plus, bool earlier, int rows) {
    enum { PREFIX = 9, EARLIER = 150, N_CTX = 100 };
    KVCache kv;
    KVShape shape = shape_with(no_window);
    CHECK(kvcache_open(&kv, &shape, kvcache_both(KV_F32), NULL, err) == 0);
    int seq = kvcache_new(&kv, err), held[L * KV];
    append_random(&kv, seq, earlier ? PREFIX + EARLIER : PREFIX, NULL);
    for (int h = 0; h < L * KV && earlier; h++) {
        KVHeadAt at = {seq, h / KV, h % KV};
        uint8_t keep[EARLIER];
        held[h] = 0;
        for (int t = 0; t < EARLIER; t++)
            held[h] += keep[t] = h == 1 ? 0 : h == 2 ? 1 : rnd() > 0.1f * (float)h;
        CHECK(kvcache_evict_head(&kv, at, (KVSpan){PREFIX, EARLIER}, keep, err) == 0);
    }
    append_random(&kv, seq, N_CTX, NULL);
    size_t n_scores = L * KV * N_CTX;
    float *score = calloc(n_scores, sizeof *score), *want = calloc(n_scores, sizeof *want);
    float *pair_log = randoms(L * HEADS * N_CTX), *q = randoms((size_t)rows * HEADS * D),
          *x_norm = randoms((size_t)rows);
    float *k = randoms((size_t)rows * KV * D), *v = randoms((size_t)rows * KV * D),
          *out = calloc((size_t)rows * HEADS * D, 4);
    for (int i = 0; i < rows; i++) x_norm[i] = 2 + x_norm[i];
    for (size_t i = 0; !sum && i < n_scores; i++) score[i] = -INFINITY;
    KVScoring s = {.max_rows = rows,
                   .n_prefix = PREFIX,
                   .t0 = PREFIX + 40,
                   .t1 = PREFIX + 90,
                   .own = PREFIX + N_CTX,
                   .subset = subset,
                   .local = local,
                   .sum = sum,
                   .n_ctx = N_CTX,
                   .held = earlier ? held : NULL,
                   .score = score,
                   .pair_log = plus ? pair_log : NULL};
    s.seq = kvcache_fork(&kv, seq, err);
    CHECK(kvcache_score_begin(&kv, &s, err) == 0);
    KVRun run = {s.seq, rows};
    CHECK(kvcache_reserve(&kv, s.seq, rows, err) == 0);
    for (int l = 0; l < L; l++) {
        kvcache_append(&kv, l, &run, 1, k, v);
        kvcache_attend(
            &kv, l, &run, 1,
            &(KVQuery){q, l == 1 ? NULL : out, HEADS * D, x_norm});  // last layer: no output
        brute_scores(&kv, &s, l, q, x_norm, rows, want);
        double full[D];
        for (int h = 0; l == 0 && !local && h < HEADS;
             h++) {  // the output still sees the whole cache
            brute(&kv, s.seq, l, h, q + ((rows - 1) * HEADS + h) * D, 0,
                  kvcache_head(&kv, s.seq, l, h / GROUP)->len, full, NULL);
            for (int j = 0; j < D; j++)
                CHECK_NEAR(out[((rows - 1) * HEADS + h) * D + j], full[j], 2e-6);
        }
    }
    kvcache_score_end(&kv);
    for (size_t i = 0; i < n_scores; i++)
        CHECK_NEAR(sum ? score[i] : expf(score[i]), want[i], sum ? 1e-5 : 1e-6);
    free(score), free(want), free(pair_log), free(q), free(x_norm), free(k), free(v), free(out);
    kvcache_close(&kv);
}

// The worked example: one dimension, two query heads on one kv head, prefix key ln 2, block ln 1,
// ln 4, ln 3, own keys ln 2, ln 8; queries 1, 2 of head 0 and -1, 0 of head 1.
static void test_worked_example(void) {
    KVCache kv;
    const int window[1] = {0};
    KVShape shape = one_layer(2, 1, 8, window);
    const float keys[6] = {2, 1, 4, 3, 2, 8}, queries[4] = {1, -1, 2, 0};
    const float want[3] = {0.387097f, 0.333333f, 0.25f},
                want_plus[3] = {0.387097f, 0.5f, 0.666667f};
    const float x_norm[2] = {2, 1}, wo_v[6] = {1, 3, 2, 2, 1, 4};
    float k[6 * 8] = {0}, v[6 * 8] = {0}, q[4 * 8] = {0}, score[3], pair_log[6];
    for (int i = 0; i < 6; i++) k[i * 8] = logf(keys[i]), pair_log[i] = logf(wo_v[i]);
    for (int i = 0; i < 4; i++) q[i * 8] = queries[i];
    for (int plus = 0; plus < 2; plus++) {
        CHECK(kvcache_open(&kv, &shape, kvcache_both(KV_F32), NULL, err) == 0);
        KVScoring s = {.max_rows = 2,
                       .n_prefix = 1,
                       .t0 = 1,
                       .t1 = 4,
                       .own = 4,
                       .subset = true,
                       .n_ctx = 3,
                       .score = score,
                       .pair_log = plus ? pair_log : NULL};
        s.seq = kvcache_new(&kv, err);
        KVRun context = {s.seq, 4}, repeat = {s.seq, 2};
        CHECK(kvcache_reserve(&kv, s.seq, 6, err) == 0);
        kvcache_append(&kv, 0, &context, 1, k, v);
        kvcache_advance(&kv, &context, 1);
        for (int i = 0; i < 3; i++) score[i] = -INFINITY;
        CHECK(kvcache_score_begin(&kv, &s, err) == 0);
        kvcache_append(&kv, 0, &repeat, 1, k + 4 * 8, v);
        kvcache_attend(&kv, 0, &repeat, 1, &(KVQuery){q, NULL, 0, x_norm});
        kvcache_score_end(&kv);
        for (int i = 0; i < 3; i++) CHECK_NEAR(expf(score[i]), (plus ? want_plus : want)[i], 1e-6);
        kvcache_close(&kv);
    }
}

// ---- evicting ----

// After evicting, attention equals a softmax over the kept pairs of the untouched cache.
static void test_evict(void) {
    enum { PREFIX = 5, N_CTX = 300 };
    KVCache kv;
    KVShape shape = shape_with(no_window);
    CHECK(kvcache_open(&kv, &shape, kvcache_both(KV_F32), NULL, err) == 0);
    int full = kvcache_new(&kv, err);
    append_random(&kv, full, PREFIX + N_CTX, NULL);
    int seq = kvcache_fork(&kv, full, err), n;
    float *before = snapshot(&kv, full, &n);
    uint8_t keep[L * KV * N_CTX];
    for (int i = 0; i < L * KV * N_CTX; i++)
        keep[i] = i / N_CTX == 2 ? 0 : rnd() > 0.4f;  // one head loses all
    CHECK(kvcache_evict(&kv, seq, PREFIX, N_CTX, keep, err) == 0);
    check_same(&kv, full, before, n);
    CHECK(kvcache_head(&kv, seq, 1, 0)->len == PREFIX);
    CHECK(kv.seqs[seq].next_pos == PREFIX + N_CTX);
    CHECK(kvcache_bytes(&kv, seq) < kvcache_bytes(&kv, full) * 6 / 10);

    float *q = randoms(HEADS * D), *k = randoms(KV * D), *v = randoms(KV * D), out[HEADS * D];
    KVRun run = {seq, 1};
    CHECK(kvcache_reserve(&kv, seq, 1, err) == 0);
    for (int l = 0; l < L; l++) {
        kvcache_append(&kv, l, &run, 1, k, v);
        kvcache_attend(&kv, l, &run, 1, &(KVQuery){q, out, HEADS * D, NULL});
        for (int h = 0; h < HEADS; h++) {
            double want[D] = {0}, sum = 0;
            int g = h / GROUP, kept = 0;
            for (int t = 0; t <= PREFIX + N_CTX; t++) {
                float kt[D], vt[D];
                double z = 0;
                bool own = t == PREFIX + N_CTX;
                if (!own && t >= PREFIX && !keep[(l * KV + g) * N_CTX + t - PREFIX]) continue;
                if (own)
                    memcpy(kt, k + g * D, sizeof kt), memcpy(vt, v + g * D, sizeof vt);
                else
                    CHECK(kvcache_pair(&kv, (KVHeadAt){full, l, g}, t, kt, vt) == t);
                if (!own)
                    CHECK(kvcache_pair(&kv, (KVHeadAt){seq, l, g}, kept, NULL, NULL) ==
                          t);  // positions slide along
                kept++;
                for (int i = 0; i < D; i++) z += (double)q[h * D + i] * kt[i];
                double w = exp(z * shape.scale);
                sum += w;
                for (int i = 0; i < D; i++) want[i] += w * vt[i];
            }
            CHECK(kept == kvcache_head(&kv, seq, l, g)->len);
            for (int i = 0; i < D; i++) CHECK_NEAR(out[h * D + i], want[i] / sum, 2e-6);
        }
    }
    kvcache_drop(&kv, seq);
    kvcache_drop(&kv, full);
    CHECK(n_free(&kv) == kv.n_pages);
    free(before), free(q), free(k), free(v);
    kvcache_close(&kv);
}

// Heads evicted one by one, each its own range and more than once, hold the pairs that remain;
// where nothing moves pages are shared, and threads change nothing.
static void test_evict_head(KVTypes types, int threads) {
    enum { N = 333 };
    KVCache kv;
    KVShape shape = shape_with(no_window);
    ThreadPool *pool = pool_open(threads);
    CHECK(kvcache_open(&kv, &shape, types, pool, err) == 0);
    int full = kvcache_new(&kv, err), n;
    append_random(&kv, full, N, NULL);
    float *before = snapshot(&kv, full, &n);
    for (int i = 0; i < L * KV; i++) {
        int seq = kvcache_fork(&kv, full, err), l = i / KV, g = i % KV, left[N], n_left = N;
        KVHead *h = kvcache_head(&kv, seq, l, g);
        for (int t = 0; t < N; t++) left[t] = t;
        for (int round = 0; round < 3; round++) {
            uint8_t keep[N];
            int first = round * 70 + i, m = n_left - first - round, kept = first;
            for (int t = 0; t < m; t++) keep[t] = rnd() > -0.5f;
            for (int t = first; t < n_left; t++) {
                if (t - first >= m || keep[t - first]) left[kept++] = left[t];
            }
            n_left = kept;
            CHECK(kvcache_evict_head(&kv, (KVHeadAt){seq, l, g}, (KVSpan){first, m}, keep, err) ==
                  0);
            CHECK(h->len == n_left && h->n_pages == (n_left + PAGE - 1) / PAGE);
        }
        for (int t = 0; t < n_left; t++) {
            float k[2 * D], v[2 * D];
            CHECK(kvcache_pair(&kv, (KVHeadAt){seq, l, g}, t, k, v) == left[t]);
            kvcache_pair(&kv, (KVHeadAt){full, l, g}, left[t], k + D, v + D);
            CHECK(memcmp(k, k + D, D * sizeof *k) == 0 && memcmp(v, v + D, D * sizeof *v) == 0);
        }
        CHECK(kvcache_head(&kv, seq, 1 - l, g)->len == N);
        uint8_t all[N], none[N] = {0};
        memset(all, 1, N);
        int used = n_free(&kv), page = h->page[0];
        CHECK(kvcache_evict_head(&kv, (KVHeadAt){seq, l, g}, (KVSpan){0, n_left}, all, err) == 0);
        CHECK(n_free(&kv) == used && h->page[0] == page);
        CHECK(kvcache_evict_head(&kv, (KVHeadAt){seq, l, g}, (KVSpan){0, n_left}, none, err) == 0);
        CHECK(h->len == 0 && h->n_pages == 0);
        append_random(&kv, seq, 3, NULL);
        CHECK(h->len == 3 && kvcache_pair(&kv, (KVHeadAt){seq, l, g}, 0, NULL, NULL) == N);
        kvcache_drop(&kv, seq);
    }
    check_same(&kv, full, before, n);
    kvcache_drop(&kv, full);
    CHECK(n_free(&kv) == kv.n_pages);
    free(before);
    kvcache_close(&kv);
    pool_close(pool);
}

// ---- pages of fewer bits ----

// What full page `page` of a head settles to, nothing having been demoted.
static PageClass settled_as(KVTypes types, const KVHead *h, int page) {
    if (types.k != KV_Q4) return PAGE_SETTLED;
    return page == 0 && h->dropped == 0 ? PAGE_FIRST : PAGE_MIXED;
}

static int steps_of(KVType t) { return t == KV_Q8 ? 254 : t == KV_Q2 ? 3 : 15; }

// The channels of keys [D][64] mixed by a Hadamard matrix, in groups of the largest power of two,
// by its definition.
static void mix_naively(float *mixed, const float *k) {
    int p = D & -D;
    for (int i = 0; i < D * PAGE; i++) {
        int channel = i / PAGE, group = channel / p * p;
        double sum = 0;
        for (int j = 0; j < p; j++) {
            double x = (double)k[(group + j) * PAGE + i % PAGE];
            sum += __builtin_parity((unsigned)(channel % p & j)) ? -x : x;
        }
        mixed[i] = (float)(sum / sqrt(p));
    }
}

// How far a number of x [n] may be after rounding: half a step of the range they
// span, and what half precision does to it.
static double rounding(KVType t, const float *x, int n) {
    float low = x[0], high = x[0];
    if (t <= KV_F32) return 0;
    for (int i = 1; i < n; i++) {
        if (x[i] < low) low = x[i];
        if (x[i] > high) high = x[i];
    }
    double most = fmax(fabs(low), fabs(high)), range = t == KV_Q8 ? 2 * most : high - low;
    return 0.501 * range / steps_of(t) + most * 0x1p-10;
}

// Pages of two sequences hold the same pairs, but for the rounding of codes.
static void check_rounded(const KVCache *kv, const KVPage *exact, const KVPage *p, int seq[2],
                          int l, int g, int block[2]) {
    float k[D * PAGE], v[PAGE * D], rk[D * PAGE], rv[PAGE * D];
    kvcache_block(kv, (KVHeadAt){seq[0], l, g}, block[0], k, v);
    kvcache_block(kv, (KVHeadAt){seq[1], l, g}, block[1], rk, rv);
    if (p->k.type == KV_M4) {
        float mixed[D * PAGE];
        mix_naively(mixed, k), memcpy(k, mixed, sizeof k);
        mix_naively(mixed, rk), memcpy(rk, mixed, sizeof rk);
    }
    for (int i = 0; i < D * PAGE; i++) {
        CHECK_NEAR(k[i], rk[i], rounding(p->k.type, k + i / PAGE * PAGE, PAGE));
        CHECK_NEAR(v[i], rv[i], rounding(p->v.type, v + i / D * D, D));
    }
    CHECK(memcmp(exact->pos, p->pos, PAGE * sizeof(int)) == 0);
}

// Settling rounds full pages that 64 pairs follow, in copies: the sequence it forked from keeps its
// own. Bytes shrink by what the types say.
static void test_settle(KVTypes types, const int *window) {
    KVCache kv;
    KVShape shape = shape_with(window);
    CHECK(kvcache_open(&kv, &shape, types, NULL, err) == 0);
    kv.settling = false;
    int full = kvcache_new(&kv, err), n, used = 0;
    for (int i = 0; i < 10; i++) append_random(&kv, full, 33, NULL);
    int seq = kvcache_fork(&kv, full, err), pair[2] = {full, seq};
    float *before = snapshot(&kv, full, &n);
    for (int pass = 0; pass < 2; pass++) {  // the second time there is nothing to do
        CHECK(kvcache_settle(&kv, seq, err) == 0);
        check_same(&kv, full, before, n);
        if (pass) CHECK(n_free(&kv) == used);
        used = n_free(&kv);
    }
    size_t want = kvcache_bytes(&kv, full);
    CHECK(want == kvcache_full_bytes(&kv, seq) && want == kvcache_full_bytes(&kv, full));
    for (int i = 0; i < L * KV; i++) {
        KVHead *h = kvcache_head(&kv, seq, i / KV, i % KV);
        for (int p = 0, left = h->len - h->dropped; left > 0; p++, left -= PAGE) {
            bool settled = left >= 2 * PAGE;
            PageClass class = settled ? settled_as(types, h, p) : PAGE_EXACT;
            CHECK(class_of(&kv, h, p) == class);
            int b = p + h->dropped / PAGE, at[2] = {b, b};
            const KVPage *exact = &kv.pages[kvcache_head(&kv, full, i / KV, i % KV)->page[p]];
            if (left >= PAGE)
                check_rounded(&kv, exact, &kv.pages[h->page[p]], pair, i / KV, i % KV, at);
            want -= kv.store[PAGE_EXACT].page_bytes - kv.store[class].page_bytes;
        }
    }
    CHECK(kvcache_bytes(&kv, seq) == want);
    kvcache_drop(&kv, full);
    kvcache_drop(&kv, seq);
    CHECK(n_free(&kv) == kv.n_pages);
    free(before);
    kvcache_close(&kv);
}

// A sequence that grows settles page by page, before long runs and at every 16th position; forks
// share settled pages, settle the later ones each for itself, and a rewind brings back what was.
static void test_settle_as_it_goes(void) {
    KVCache kv;
    KVShape shape = shape_with(one_window);
    CHECK(kvcache_open(&kv, &shape, types_of("q8/q4"), NULL, err) == 0);
    int a = kvcache_new(&kv, err), n, m;
    for (int i = 0; i < 20; i++) {
        KVHead *h = kvcache_head(&kv, a, i % L, i % KV);
        int more = 1 + i * 3 % 29, ripe = (h->len - h->dropped) / PAGE - 1, wrong = 0;
        int first = h->page && ripe > 0 ? h->page[0] : -1;
        if (more < KV_LONG_RUN && kv.seqs[a].next_pos % KV_SETTLE_STEP != 0) ripe = h->settled;
        append_random(&kv, a, more, NULL);
        for (int p = 0; first == h->page[0] && p < h->n_pages; p++)
            wrong += class_of(&kv, h, p) != (p < ripe ? PAGE_SETTLED : PAGE_EXACT);
        CHECK(wrong == 0);
    }
    for (int i = 0; i < 2 * PAGE; i++) {  // token by token
        const KVHead *h = kvcache_head(&kv, a, 0, i % KV);
        int n_settled = (h->len - kv.seqs[a].next_pos % KV_SETTLE_STEP) / PAGE - 1;
        append_random(&kv, a, 1, NULL);
        CHECK(class_of(&kv, h, n_settled - 1) == PAGE_SETTLED);
        CHECK(class_of(&kv, h, n_settled) == PAGE_EXACT);
    }
    float *before = snapshot(&kv, a, &n);
    int b = kvcache_fork(&kv, a, err), mark = kvcache_mark(&kv, a, err);
    CHECK(kvcache_head(&kv, a, 0, 0)->page[0] == kvcache_head(&kv, b, 0, 0)->page[0]);
    append_random(&kv, a, 190, NULL), append_random(&kv, a, KV_LONG_RUN, NULL);
    check_same(&kv, b, before, n);
    append_random(&kv, b, 100, NULL), append_random(&kv, b, KV_LONG_RUN, NULL);
    float *after = snapshot(&kv, b, &m);
    CHECK(kvcache_rewind(&kv, a, mark, err) == 0);
    check_same(&kv, a, before, n);
    check_same(&kv, b, after, m);
    kvcache_drop(&kv, mark), kvcache_drop(&kv, b), kvcache_drop(&kv, a);
    CHECK(n_free(&kv) == kv.n_pages);
    free(before), free(after);
    kvcache_close(&kv);
}

// Evicting after settling, settling after evicting, and once more: survivors are what was read back
// when they moved, nothing else moves, and attention goes over pages of all kinds.
static void test_settle_and_evict(KVTypes types) {
    enum { PREFIX = 5, N_CTX = 380 };
    KVCache kv;
    KVShape shape = shape_with(no_window);
    CHECK(kvcache_open(&kv, &shape, types, NULL, err) == 0);
    int seq = kvcache_new(&kv, err);
    for (int i = 0; i < 5; i++) append_random(&kv, seq, 77, NULL);
    CHECK(kvcache_settle(&kv, seq, err) == 0);
    for (int round = 0, n_ctx = N_CTX; round < 2; round++) {
        uint8_t keep[L * KV * N_CTX];
        int old = kvcache_fork(&kv, seq, err), wrong = 0, kept[L * KV];
        for (int i = 0; i < L * KV; i++) {
            kept[i] = 0;
            for (int t = 0; t < n_ctx; t++)
                kept[i] += keep[i * n_ctx + t] = t < 130 ? t >= 3 : t % 4 > 1 - round;
        }
        CHECK(kvcache_evict(&kv, seq, PREFIX, n_ctx, keep, err) == 0);
        for (int i = 0; i < L * KV; i++) {
            CHECK(kvcache_head(&kv, seq, i / KV, i % KV)->len == PREFIX + kept[i]);
            for (int t = 0, to = 0; t < PREFIX + n_ctx; t++) {
                float k[2][D], v[2][D];
                if (t >= PREFIX && !keep[i * n_ctx + t - PREFIX]) continue;
                int pos = kvcache_pair(&kv, (KVHeadAt){old, i / KV, i % KV}, t, k[0], v[0]);
                wrong +=
                    kvcache_pair(&kv, (KVHeadAt){seq, i / KV, i % KV}, to++, k[1], v[1]) != pos;
                for (int j = 0; j < D; j++)
                    wrong +=
                        !(fabs(k[0][j] - k[1][j]) <= 0x1p-11 && fabs(v[0][j] - v[1][j]) <= 0x1p-11);
            }
        }
        CHECK(wrong == 0);
        check_attention(&kv, seq);
        CHECK(kvcache_settle(&kv, seq, err) == 0);
        CHECK(kvcache_bytes(&kv, seq) < kvcache_bytes(&kv, old));
        check_attention(&kv, seq);
        kvcache_drop(&kv, old);
        n_ctx = kept[0];
    }
    kvcache_drop(&kv, seq);
    CHECK(n_free(&kv) == kv.n_pages);
    kvcache_close(&kv);
}

// Demoting loses no pair: those with keep = 0 come first, rounded to 2 bits, the others as they
// were. Twice, so that demoted pages of the first time stay as they are.
static void test_demote(KVTypes types) {
    enum { PREFIX = 9, N_CTX = 390 };
    KVCache kv;
    KVShape shape = shape_with(no_window);
    CHECK(kvcache_open(&kv, &shape, types, NULL, err) == 0);
    kv.settling = false;
    int full = kvcache_new(&kv, err), n;
    append_random(&kv, full, PREFIX + N_CTX, NULL);
    float *before = snapshot(&kv, full, &n);
    int seq = kvcache_fork(&kv, full, err), first = PREFIX, n_keep = N_CTX, n_before = 0;
    for (int round = 0; round < 2; round++) {
        uint8_t keep[L * KV * N_CTX];
        for (int i = 0; i < L * KV * n_keep; i++) keep[i] = (i * 7 + i / 13) % 10 < 3;
        CHECK(kvcache_demote(&kv, seq, first, n_keep, keep, err) == 0);
        for (int i = 0; i < L * KV; i++) {
            KVHead *h = kvcache_head(&kv, seq, i / KV, i % KV);
            int seen[PREFIX + N_CTX] = {0}, wrong = 0, demoted = 0, last = -1;
            while (class_of(&kv, h, demoted) == PAGE_DEMOTED) demoted++;
            CHECK(h->len == PREFIX + N_CTX && demoted > n_before);
            for (int t = 0; t < h->len; t++) {
                float k[2][D], v[2][D];
                int pos = kvcache_pair(&kv, (KVHeadAt){seq, i / KV, i % KV}, t, k[0], v[0]);
                kvcache_pair(&kv, (KVHeadAt){full, i / KV, i % KV}, pos, k[1], v[1]);
                seen[pos]++;
                bool exact =
                    memcmp(k[0], k[1], sizeof k[0]) == 0 && memcmp(v[0], v[1], sizeof v[0]) == 0;
                if (t >= demoted * PAGE)
                    wrong += !exact || pos <= last, last = pos;
                else
                    wrong += pos < PREFIX || !(fabs(k[0][0] - k[1][0]) <= 0.34);
            }
            for (int t = 0; t < h->len; t++) wrong += seen[t] != 1;
            CHECK(wrong == 0);
        }
        check_attention(&kv, seq);
        n_before = 4, first = PREFIX + 4 * PAGE, n_keep = N_CTX - 4 * PAGE;
    }
    CHECK(kvcache_settle(&kv, seq, err) == 0);
    CHECK(kvcache_bytes(&kv, seq) < kvcache_bytes(&kv, full) * 7 / 10);
    check_attention(&kv, seq);
    check_same(&kv, full, before, n);
    kvcache_drop(&kv, seq), kvcache_drop(&kv, full);
    CHECK(n_free(&kv) == kv.n_pages);
    free(before);
    kvcache_close(&kv);
}

// Every head_dim, whole blocks of 32 channels or not.
static void test_head_dims(KVTypes types) {
    const int dims[] = {8, 24, 40, 64, 80, 96, 128, 256}, window[1] = {0};
    for (int i = 0; i < 8; i++) {
        int d = dims[i], n = 200, runs[] = {n, 1, 10};
        KVCache kv;
        KVShape shape = one_layer(2, 1, d, window);
        shape.scale = 0.2f;
        CHECK(kvcache_open(&kv, &shape, types, NULL, err) == 0);
        int seq = kvcache_new(&kv, err);
        float *q = randoms((size_t)n * 2 * d), *k = randoms((size_t)n * d),
              *v = randoms((size_t)n * d), *out = malloc((size_t)n * 2 * d * sizeof *out);
        for (int r = 0; r < 3; r++) {
            KVRun run = {seq, runs[r]};
            CHECK(kvcache_reserve(&kv, seq, run.n, err) == 0);
            kvcache_append(&kv, 0, &run, 1, k, v);
            kvcache_attend(&kv, 0, &run, 1, &(KVQuery){q, out, 2 * d, NULL});
            kvcache_advance(&kv, &run, 1);
        }
        KVHead *h = kvcache_head(&kv, seq, 0, 0);
        CHECK(class_of(&kv, h, 0) == settled_as(types, h, 0));
        CHECK(class_of(&kv, h, 1) == settled_as(types, h, 1));
        CHECK(class_of(&kv, h, 2) == PAGE_EXACT);
        double want[2 * MAX_HEAD_DIM], sum = 0;
        memset(want, 0, sizeof want);
        for (int t = 0; t < h->len; t++) {  // the last token's second head
            float key[MAX_HEAD_DIM], value[MAX_HEAD_DIM];
            double s = 0;
            kvcache_pair(&kv, (KVHeadAt){seq, 0, 0}, t, key, value);
            for (int j = 0; j < d; j++) s += (double)q[19 * d + j] * key[j];
            sum += s = exp(s * (double)shape.scale);
            for (int j = 0; j < d; j++) want[j] += s * value[j];
        }
        int wrong = 0;
        for (int j = 0; j < d; j++)
            wrong += !(fabs(out[19 * d + j] - want[j] / sum) <= allowed(&kv, 3e-5));
        CHECK(wrong == 0);
        free(q), free(k), free(v), free(out);
        kvcache_close(&kv);
    }
}

static void test_types(void) {
    const char *const names[] = {"f16", "f32", "q8", "q4", "q2", "q8/q4", "f16/q4", "q8/f32"};
    char name[KV_NAME];
    KVTypes t;
    for (int i = 0; i < 8; i++) {
        CHECK(kvcache_types_parse(names[i], &t) == 0);
        CHECK_STR(kvcache_types_name(t, name), names[i]);
    }
    CHECK(kvcache_types_parse("q8/q8", &t) == 0 && t.k == KV_Q8 && t.v == KV_Q8);
    const char *const wrong[] = {"",        "q9",  "q8/", "/q8", "q8/q4/q4",
                                 "f16/f32", "q8 ", "q",   "m4",  "m4/q4"};
    for (int i = 0; i < 10; i++) CHECK(kvcache_types_parse(wrong[i], &t) == -1);
}

static void test_refusals(void) {
    KVCache kv;
    KVShape odd = one_layer(4, 3, 16, no_window), wide = one_layer(1, 1, 1024, no_window);
    CHECK(kvcache_open(&kv, &odd, kvcache_both(KV_F16), NULL, err) == -1);
    CHECK(kvcache_open(&kv, &wide, kvcache_both(KV_F16), NULL, err) == -1);
}

// Heads with sinks: attention, scores, pages of all kinds, and company.
static void test_sinks(bool quick) {
    with_sinks = some_sinks;
    test_attention(types_of("f16"), one_window, 0);
    test_fitted(types_of("f32"), 0);
    for (int i = 0; i < 32; i += quick ? 5 : 1)
        test_scores(i & 1, (i & 2) && (i & 1), i & 4, (i & 8) && !(i & 4), i & 16, i % 3 ? 26 : 1);
    if (!quick) {
        test_attention(types_of("f32"), one_window, 0.5f);
        test_attention(types_of("q8/q4"), no_window, 0);
        test_demote(types_of("f16"));
        test_thread_bits(types_of("f16")), test_company(types_of("f16"), one_window);
    }
    with_sinks = NULL;
}

int main(int argc, char **argv) {
    bool quick = getenv("QUICK") != NULL;  // under valgrind: one case of each kind
    const char *const types[] = {"q8/q4", "f16", "f32", "q8", "q4", "q2", "f16/q8", "q4/f32"};
    kernels_init(argc > 1 ? argv[1] : NULL);
    test_types();
    for (int i = 0; i < (quick ? 1 : 8); i++) {
        KVTypes t = types_of(types[i]);
        bool codes = t.k > KV_F32 || t.v > KV_F32;
        test_attention(t, no_window, 0);
        test_attention(t, one_window, 0), test_attention(t, one_chunk, 0);
        test_demote(t);
        test_fitted(t, i % 2 ? 0.5f : 0);
        if (codes) test_settle(t, no_window), test_settle(t, one_window);
        if (codes) test_settle_and_evict(t), test_head_dims(t);
    }
    test_settle_as_it_goes();
    const char *const others[] = {"avx2", "avx512bf16", "amx-emulated"};
    for (int i = 0; i < 3; i++)  // attention in f32, in bf16, by tiles
        if (kernels_init(others[i]) == 0)
            test_attention(types_of("f16"), one_window, 0), test_head_dims(types_of("q4"));
    kernels_init(NULL);
    if (!quick) test_attention(types_of("f32"), one_window, 0.5f);
    if (!quick) test_attention(types_of("q8"), one_window, 0.5f);
    for (int i = 0; i < 3 && !quick; i += 2) {
        test_thread_bits(types_of(types[i]));
        test_company(types_of(types[i]), no_window), test_company(types_of(types[i]), one_window);
        test_company(types_of(types[i]), one_chunk);
    }
    if (!quick) test_thread_bits(types_of("f16")), test_company(types_of("f16"), no_window);
    test_slack(no_window), test_slack(wide_window), test_slack(wide_chunk);
    test_cut(one_window), test_cut(one_chunk);
    test_fork_and_rewind();
    test_worked_example();
    for (int i = 0; i < 32; i += quick ? 5 : 1) {
        bool subset = i & 1, local = (i & 2) && subset, sum = i & 4, plus = (i & 8) && !sum;
        test_scores(subset, local, sum, plus, i & 16, 1);
        test_scores(subset, local, sum, plus, i & 16, 26);
    }
    test_sinks(quick);
    test_evict();
    test_evict_head(types_of("f32"), 1), test_evict_head(types_of("f16"), 3);
    test_refusals();
    return test_end("test_kvcache");
}
