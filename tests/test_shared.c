// Layers that differ: heads of two lengths, caches that several layers read, layers whose work is
// left out where nobody asks for it (Gemma 4). The cache against a brute force in double, the model
// against transformers' values, and both against themselves: what is saved, forked, rewound or read
// in other blocks gives the same bits.
#include "fixture.h"
#include "kvfile.h"
#include "policies/fitting.h"
#include "readers.h"

// ---- the cache against a brute force ----

enum { LAYERS = 4, HEADS = 4, MOST = 64, TOKENS = 150, WINDOW = 70 };
static const int windows[LAYERS] = {0, WINDOW, 0, WINDOW}, owners[LAYERS] = {0, 1, 0, 1};

// All that passed: [layer][token][head][head_dim], of keys and values the owners' alone.
static float q[LAYERS][TOKENS][HEADS * MOST], k[LAYERS][TOKENS][2 * MOST],
    v[LAYERS][TOKENS][2 * MOST];

static float rnd(void) { return (float)rand() / RAND_MAX * 2 - 1; }

static KVShape two_lengths(void) {
    return (KVShape){.n_layers = LAYERS,
                     .n_heads = HEADS,
                     .n_kv_heads = 1,
                     .head_dim = 64,
                     .scale = 0.4f,
                     .window = windows,
                     .window_kv_heads = 2,
                     .window_head_dim = 16,
                     .owner = owners};
}

static double product(const KVShape *s, int l, int h, int i, int t) {
    int d = kvshape_dim(s, l), group = HEADS / kvshape_heads(s, l);
    double sum = 0;
    for (int j = 0; j < d; j++)
        sum += (double)q[l][i][h * d + j] * k[owners[l]][t][h / group * d + j];
    return s->scale * sum;
}

// What token i's head h of layer l must get.
static void attend_brute(const KVShape *s, int l, int h, int i, double *out) {
    int d = kvshape_dim(s, l), group = HEADS / kvshape_heads(s, l);
    double sum = 0;
    for (int j = 0; j < d; j++) out[j] = 0;
    for (int t = windows[l] && i >= windows[l] ? i - windows[l] + 1 : 0; t <= i; t++) {
        double w = exp(product(s, l, h, i, t));
        sum += w;
        for (int j = 0; j < d; j++) out[j] += w * v[owners[l]][t][h / group * d + j];
    }
    for (int j = 0; j < d; j++) out[j] /= sum;
}

// Tokens [a, b) in every layer; returns how far attention is from the brute force.
static double step(KVCache *kv, int seq, int a, int b) {
    static float out[TOKENS * HEADS * MOST];
    const KVShape *s = &kv->shape;
    KVRun run = {seq, b - a};
    double want[MOST], worst = 0;
    CHECK(kvcache_reserve(kv, seq, b - a, err) == 0);
    for (int l = 0; l < LAYERS; l++) {
        int d = kvshape_dim(s, l), heads = kvshape_heads(s, l);
        float rows[TOKENS * HEADS * MOST], keys[TOKENS * 2 * MOST], values[TOKENS * 2 * MOST];
        for (int i = a; i < b; i++) {
            memcpy(rows + (i - a) * HEADS * d, q[l][i], (size_t)(HEADS * d) * sizeof *rows);
            memcpy(keys + (i - a) * heads * d, k[l][i], (size_t)(heads * d) * sizeof *keys);
            memcpy(values + (i - a) * heads * d, v[l][i], (size_t)(heads * d) * sizeof *values);
        }
        if (kvshape_owns(s, l)) kvcache_append(kv, l, &run, 1, keys, values);
        kvcache_attend(kv, l, &run, 1, &(KVQuery){rows, out, HEADS * d, NULL});
        for (int i = a; i < b; i++) {
            for (int h = 0; h < HEADS; h++) {
                attend_brute(s, l, h, i, want);
                for (int j = 0; j < d; j++)
                    worst = fmax(worst, fabs(out[((i - a) * HEADS + h) * d + j] - want[j]));
            }
        }
    }
    kvcache_advance(kv, &run, 1);
    return worst;
}

static void test_attention(KVType type, double tolerance) {
    KVCache kv;
    KVShape s = two_lengths();
    CHECK(kvcache_open(&kv, &s, kvcache_both(type), NULL, err) == 0);
    int seq = kvcache_new(&kv, err), at = 0;
    static const int steps[] = {40, 1, 9, 7, 60, 1, 32};
    for (int i = 0; i < 7; at += steps[i++])
        CHECK_NEAR(step(&kv, seq, at, at + steps[i]), 0, tolerance);
    CHECK(kvcache_head(&kv, seq, 0, 0) == kvcache_head(&kv, seq, 2, 0));
    CHECK(kvcache_head(&kv, seq, 3, 1)->dropped == 64 &&
          kvcache_head(&kv, seq, 2, 0)->len == TOKENS);
    CHECK(kv.n_heads == 3 && kvcache_scored_layers(&s, NULL) == 1 &&
          kvcache_readers(&s, NULL) == 2);
    kvcache_close(&kv);
}

// The largest weight of pair t, in its softmax over prefix, [t0, t1) and own pairs, of all rows
// from `first` on, all heads, and both layers that read it.
static double score_brute(const KVShape *s, const KVScoring *how, int first, int t) {
    double best = 0;
    for (int l = 0; l < LAYERS; l += 2) {
        for (int i = first; i < TOKENS; i++) {
            for (int h = 0; h < HEADS; h++) {
                double sum = 0;
                for (int u = 0; u <= i; u++) {
                    bool in = u < how->n_prefix || (u >= how->t0 && u < how->t1) || u >= how->own;
                    sum += in ? exp(product(s, l, h, i, u)) : 0;
                }
                double w = exp(product(s, l, h, i, t)) / sum;
                if (how->pair_log)
                    w *= exp(how->pair_log[(l / 2 * HEADS + h) * how->n_ctx + t - how->n_prefix]);
                best = fmax(best, w);
            }
        }
    }
    return best;
}

static void test_scores(bool plus) {
    enum { PREFIX = 5, CTX = 110, ROWS = TOKENS - PREFIX - CTX };
    KVCache kv;
    KVShape s = two_lengths();
    CHECK(kvcache_open(&kv, &s, kvcache_both(KV_F32), NULL, err) == 0);
    int seq = kvcache_new(&kv, err);
    step(&kv, seq, 0, PREFIX + CTX);
    float score[CTX], logs[2 * HEADS * CTX], x_norm[ROWS];
    for (int i = 0; i < CTX; i++) score[i] = -INFINITY;
    for (int i = 0; i < 2 * HEADS * CTX; i++) logs[i] = rnd();
    for (int i = 0; i < ROWS; i++) x_norm[i] = 1;
    KVScoring how = {.seq = seq,
                     .max_rows = ROWS,
                     .n_prefix = PREFIX,
                     .t0 = PREFIX + 10,
                     .t1 = PREFIX + 90,
                     .own = PREFIX + CTX,
                     .subset = true,
                     .n_ctx = CTX,
                     .score = score,
                     .pair_log = plus ? logs : NULL};
    CHECK(kvcache_score_begin(&kv, &how, err) == 0);
    CHECK(kvcache_reserve(&kv, seq, ROWS, err) == 0);
    KVRun run = {seq, ROWS};
    for (int l = 0; l < LAYERS; l++) {
        int d = kvshape_dim(&s, l), heads = kvshape_heads(&s, l);
        static float rows[ROWS * HEADS * MOST], keys[ROWS * 2 * MOST], values[ROWS * 2 * MOST];
        for (int i = 0; i < ROWS; i++) {
            int t = PREFIX + CTX + i;
            memcpy(rows + i * HEADS * d, q[l][t], (size_t)(HEADS * d) * sizeof *rows);
            memcpy(keys + i * heads * d, k[l][t], (size_t)(heads * d) * sizeof *keys);
            memcpy(values + i * heads * d, v[l][t], (size_t)(heads * d) * sizeof *values);
        }
        if (kvshape_owns(&s, l)) kvcache_append(&kv, l, &run, 1, keys, values);
        kvcache_attend(&kv, l, &run, 1, &(KVQuery){rows, NULL, 0, x_norm});
    }
    kvcache_score_end(&kv);
    double worst = 0;
    for (int t = how.t0; t < how.t1; t++)
        worst = fmax(worst, fabs(expf(score[t - PREFIX]) - score_brute(&s, &how, PREFIX + CTX, t)));
    CHECK_NEAR(worst, 0, 2e-6);
    CHECK(isinf(score[0]) && isinf(score[CTX - 1]));
    kvcache_close(&kv);
}

// ---- the model ----

static float *logits_of(Fixture *f, int seq, const int *ids, int n, int block, bool last_alone) {
    int vocab = f->model.config.vocab_size;
    float *out = malloc((size_t)n * vocab * sizeof *out);
    for (int i = 0, m; i < n; i += m) {
        Row rows[MAX_ROWS];
        m = n - i < block ? n - i : block;
        for (int j = 0; j < m; j++) rows[j] = (Row){seq, ids[i + j], !last_alone || i + j == n - 1};
        if (!CHECK(forward(&f->state, &f->kv, rows, m, err) == 0)) printf("%s\n", err);
        memcpy(out + (size_t)(last_alone ? 0 : i) * vocab, f->state.logits,
               (size_t)f->state.n_logits * vocab * sizeof *out);
    }
    return out;
}

static void check_keys(Fixture *f, int seq, int layer) {
    char name[2][32];
    const KVShape *s = &f->kv.shape;
    int d = kvshape_dim(s, layer);
    float got[2][MAX_HEAD_DIM];
    for (int i = 0; i < 2; i++) snprintf(name[i], sizeof name[i], "prefill.%c.%d", "kv"[i], layer);
    const Tensor *wanted[2] = {want(f, name[0]), want(f, name[1])};
    int n = (int)wanted[0]->shape[1];
    CHECK((int)wanted[0]->shape[0] == kvshape_heads(s, layer) && (int)wanted[0]->shape[2] == d);
    for (int g = 0; g < kvshape_heads(s, layer); g++) {
        for (int t = kvcache_head(&f->kv, seq, layer, g)->dropped; t < n; t++) {
            CHECK(kvcache_pair(&f->kv, (KVHeadAt){seq, layer, g}, t, got[0], got[1]) == t);
            for (int i = 0; i < 2; i++)
                CHECK_NEAR(far(got[i], (const float *)wanted[i]->data + ((size_t)g * n + t) * d,
                               (size_t)d),
                           0, 5e-5);
        }
    }
}

static void test_prefill(Fixture *f) {
    const Tensor *ids = want(f, "prefill.ids"), *rows = want(f, "prefill.rows");
    int n = (int)ids->shape[0], vocab = f->model.config.vocab_size, seq = kvcache_new(&f->kv, err);
    float *all = logits_of(f, seq, ids->data, n, n, false);
    for (size_t i = 0; i < rows->shape[0]; i++)
        CHECK_NEAR(far(all + (size_t)((const int *)rows->data)[i] * vocab,
                       (const float *)want(f, "prefill.logits")->data + i * vocab, (size_t)vocab),
                   0, 3e-4);
    check_keys(f, seq, 1), check_keys(f, seq, 2);
    kvcache_drop(&f->kv, seq);
    // One by one, and in other blocks.
    for (int block = 1; block < n; block = block * 7 + 1) {
        seq = kvcache_new(&f->kv, err);
        float *have = logits_of(f, seq, ids->data, n, block, false);
        CHECK_NEAR(far(have, all, (size_t)n * vocab), 0, 1e-4);
        kvcache_drop(&f->kv, seq);
        free(have);
    }
    free(all);
}

// Where the last row alone is asked for, most rows stop at the last layer that has keys of its own:
// the same bits, and less work.
static void test_left_out(Fixture *f) {
    const Tensor *ids = want(f, "prefill.ids");
    int n = (int)ids->shape[0], vocab = f->model.config.vocab_size;
    for (int block = 5; block <= n; block = block == 5 ? 40 : block == 40 ? n : n + 1) {
        double before = f->state.ops[W_F32];
        int a = kvcache_new(&f->kv, err), b = kvcache_new(&f->kv, err);
        float *all = logits_of(f, a, ids->data, n, block, false);
        double whole = f->state.ops[W_F32] - before;
        before = f->state.ops[W_F32];
        float *last = logits_of(f, b, ids->data, n, block, true);
        CHECK(memcmp(last, all + (size_t)(n - 1) * vocab, (size_t)vocab * sizeof *all) == 0);
        CHECK(f->state.ops[W_F32] - before < 0.7 * whole);
        // Rows in the middle, of two sequences in one batch.
        const int *id = ids->data;
        Row rows[16];
        for (int i = 0; i < 16; i++) rows[i] = (Row){i < 8 ? a : b, id[i % 8], i == 3 || i == 15};
        CHECK(forward(&f->state, &f->kv, rows, 16, err) == 0);
        float *some = malloc((size_t)2 * vocab * sizeof *some);
        memcpy(some, f->state.logits, (size_t)2 * vocab * sizeof *some);
        int c = kvcache_new(&f->kv, err);
        free(logits_of(f, c, id, n, block, true));
        for (int i = 0; i < 8; i++) rows[i] = (Row){c, id[i], i == 3 || i == 7};
        CHECK(forward(&f->state, &f->kv, rows, 8, err) == 0);
        CHECK_NEAR(far(f->state.logits, some, (size_t)2 * vocab), 0, 1e-5);
        kvcache_drop(&f->kv, a), kvcache_drop(&f->kv, b), kvcache_drop(&f->kv, c);
        free(all), free(last), free(some);
    }
}

// A reader chooses by how long a run is, or by its last rows: the last row's bits do not depend on
// who else is asked for.
static void test_readers(Fixture *f) {
    static const struct {
        const char *name, *set;
    } how[] = {{"quest", "budget=64,layers=0"},
               {"bigbird", "last=1,random=0"},
               {"minference", "vertical=1,slash=1"}};
    enum { LONG = 500, FEW = 8, ASKED = 90 };
    int vocab = f->model.config.vocab_size, lengths[3] = {FEW, LONG, FEW};
    size_t bytes = (size_t)vocab * sizeof(float);
    float *last = malloc(bytes);
    for (int i = 0; i < 3; i++) {
        Reads reads;
        CHECK(reader_set(&reads, reader_find(how[i].name), how[i].set, err) == 0);
        CHECK(reader_begin(&reads, &f->kv, err) == 0);
        int seq[2] = {kvcache_new(&f->kv, err), kvcache_new(&f->kv, err)};
        for (int step = 0; step < 3; step++) {
            int n = lengths[step];
            for (int all = 0; all < 2; all++) {
                Row rows[LONG];
                for (int j = 0; j < n; j++)
                    rows[j] = (Row){seq[all], 5 + j * 37 % 400, j >= n - (all ? ASKED : 1)};
                CHECK(forward(&f->state, &f->kv, rows, n, err) == 0);
                const float *have = f->state.logits + (size_t)(f->state.n_logits - 1) * vocab;
                if (all) CHECK(memcmp(last, have, bytes) == 0);
                memcpy(last, have, bytes);
            }
        }
        CHECK(kvcache_read_share(&f->kv) < 1);
        kvcache_drop(&f->kv, seq[0]), kvcache_drop(&f->kv, seq[1]);
    }
    CHECK(kvcache_read_by(&f->kv, NULL, NULL, err) == 0);
    free(last);
}

static void test_kvzip(Fixture *f) {
    int ids[1024], vocab = f->model.config.vocab_size;
    Context c = fixture_context(f, ids, 64);
    size_t n = context_scores(&c);
    float *score = malloc(n * sizeof *score);
    CHECK(want(f, "kvzip.score")->bytes == n * sizeof *score);
    CHECK(context_score(&c, policy_find("kvzip"), score, err) == 0);
    CHECK_NEAR(far(score, want(f, "kvzip.score")->data, n), 0, 1e-4);
    CHECK(kvcache_evict(&f->kv, c.seq, c.n_prefix, c.n_ctx, want(f, "mask.pair.r30")->data, err) ==
          0);
    const Tensor *query = want(f, "kvzip.query");
    int n_query = (int)query->shape[0];
    float *have = logits_of(f, c.seq, query->data, n_query, n_query, false);
    CHECK_NEAR(far(have, want(f, "evict.r30.logits")->data, (size_t)n_query * vocab), 0, 3e-4);
    kvcache_drop(&f->kv, c.seq);
    c.seq = kvcache_new(&f->kv, err);
    CHECK(context_score(&c, policy_find("kvzip+"), score, err) == 0);
    CHECK_NEAR(far(score, want(f, "kvzip.score_plus")->data, n), 0, 1e-4);
    kvcache_drop(&f->kv, c.seq);
    free(score), free(have);
}

// Saved and loaded, forked, marked and rewound: the next logits are the same bits.
static void test_files(KVTypes types) {
    Fixture f;
    int ids[1024];
    char path[64], what[KV_NAME];
    test_path(path, "shared.kvc");
    if (!fixture_open(&f, "gemma4", "gemma4.kvz", KV_F32, 1)) return;
    kvcache_close(&f.kv);
    KVModel model = {model_kv_shape(&f.model), f.model.fingerprint};
    CHECK(kvcache_open(&f.kv, &model.shape, types, f.pool, err) == 0);
    Context c = fixture_context(&f, ids, 64);
    const Tensor *query = want(&f, "kvzip.query");
    int n = (int)query->shape[0], vocab = f.model.config.vocab_size;
    CHECK(context_read(&c, err) == 0);
    CHECK(kvcache_evict(&f.kv, c.seq, c.n_prefix, c.n_ctx, want(&f, "mask.pair.r30")->data, err) ==
          0);
    if (types.k == KV_F16) CHECK(kvcache_demote(&f.kv, c.seq, c.n_prefix, 0, NULL, err) == 0);
    CHECK(kvcache_settle(&f.kv, c.seq, err) == 0);
    KVInfo info = {.fingerprint = f.model.fingerprint,
                   .model = "gemma4",
                   .policy = "kvzip",
                   .n_prefix = c.n_prefix,
                   .n_ctx = c.n_ctx,
                   .ratio = 0.3,
                   .ids = ids,
                   .n_ids = c.n_prefix + c.n_ctx};
    if (!CHECK(kvfile_save(&f.kv, c.seq, path, &info, err) == 0)) printf("%s\n", err);
    int fork = kvcache_fork(&f.kv, c.seq, err), mark = kvcache_mark(&f.kv, fork, err);
    float *first = logits_of(&f, c.seq, query->data, n, 7, false);
    for (int i = 0; i < 2; i++) {
        float *again = logits_of(&f, fork, query->data, n, 7, false);
        CHECK(memcmp(again, first, (size_t)n * vocab * sizeof *first) == 0);
        CHECK(kvcache_rewind(&f.kv, fork, mark, err) == 0);
        free(again);
    }
    kvcache_close(&f.kv);
    if (!CHECK(kvfile_load(&f.kv, path, &model, f.pool, &info, err) == 0)) printf("%s\n", err);
    float *loaded = logits_of(&f, 0, query->data, n, 7, false);
    if (!CHECK(memcmp(loaded, first, (size_t)n * vocab * sizeof *first) == 0))
        printf("%s: loaded, logits differ\n", kvcache_types_name(types, what));
    CacheFacts facts;
    TensorFile file;
    CHECK(tensors_open(&file, path, err) == 0);
    CHECK(strcmp(tensors_meta(&file, "format"), "kvzip.c cache 6") == 0);
    if (!CHECK(kvfile_facts(&facts, &file, err) == 0)) printf("%s\n", err);
    CHECK(facts.n_scored == 2 * c.n_ctx && facts.n_layers == 7 && facts.n_kv_heads == 2);
    kvfile_facts_free(&facts);
    tensors_close(&file);
    remove(path);
    free(first), free(loaded);
    fixture_close(&f);
}

// A layer with a state among layers whose heads differ: no list holds heads of it, and a saved
// cache has all of them.
static void test_state_beside(void) {
    enum { STATE = 24, FIVE = LAYERS + 1 };
    static const int window[FIVE] = {0, WINDOW, 0, WINDOW, NO_PAIRS}, owner[FIVE] = {0, 1, 0, 1, 4};
    char path[64];
    KVCache kv, back;
    KVShape s = two_lengths();
    s.n_layers = FIVE, s.window = window, s.owner = owner, s.state = STATE;
    CHECK(kvcache_open(&kv, &s, kvcache_both(KV_F16), NULL, err) == 0);
    CHECK(kv.n_heads == 3 && !kvshape_owns(&s, 4) && kvcache_scored_layers(&s, NULL) == 1);
    int seq = kvcache_new(&kv, err), ids[TOKENS] = {0};
    step(&kv, seq, 0, TOKENS);
    for (int i = 0; i < STATE; i++) kvcache_state(&kv, seq, 4)[i] = rnd();
    int fork = kvcache_fork(&kv, seq, err);
    CHECK(kvcache_state(&kv, fork, 4) == kvcache_state(&kv, seq, 4));
    KVInfo info = {.fingerprint = "f",
                   .model = "m",
                   .policy = "none",
                   .n_ctx = TOKENS,
                   .ids = ids,
                   .n_ids = TOKENS};
    KVModel model = {s, "f"};
    test_path(path, "beside.kvc");
    CHECK(kvfile_save(&kv, seq, path, &info, err) == 0);
    if (!CHECK(kvfile_load(&back, path, &model, NULL, &info, err) == 0)) printf("%s\n", err);
    CHECK(strcmp(tensors_meta(&back.file, "format"), "kvzip.c cache 6") == 0);
    CHECK(kvcache_bytes(&back, 0) == kvcache_bytes(&kv, seq));
    CHECK(memcmp(kvcache_state(&back, 0, 4), kvcache_state(&kv, seq, 4), STATE * sizeof(float)) ==
          0);
    for (int i = 0; i < kv.n_heads; i++) {
        const KVHead *x = &kv.seqs[seq].head[i], *y = &back.seqs[0].head[i];
        CHECK(x->len == y->len && x->dropped == y->dropped && x->len == TOKENS);
        const KVPage *a = &kv.pages[x->page[0]], *b = &back.pages[y->page[0]];
        size_t bytes = (size_t)a->k.head_dim * 64 * sizeof(uint16_t);
        CHECK(a->k.head_dim == b->k.head_dim && memcmp(a->k.data, b->k.data, bytes) == 0);
    }
    kvcache_close(&kv), kvcache_close(&back);
    remove(path);
}

// A cache whose layers have other heads than the model's is refused.
static void test_refusals(Fixture *f) {
    char path[64];
    test_path(path, "uneven.kvc");
    int ids[4] = {2, 5, 6, 7}, seq = kvcache_new(&f->kv, err);
    free(logits_of(f, seq, ids, 4, 4, false));
    KVInfo info = {.fingerprint = f->model.fingerprint,
                   .model = "m",
                   .policy = "none",
                   .n_ctx = 4,
                   .ids = ids,
                   .n_ids = 4};
    CHECK(kvfile_save(&f->kv, seq, path, &info, err) == 0);
    KVModel model = {model_kv_shape(&f->model), f->model.fingerprint};
    KVCache kv;
    model.shape.owner = NULL;
    CHECK(kvfile_load(&kv, path, &model, NULL, &info, err) == -1 &&
          strstr(err, "layer 5 has 0 heads"));
    model = (KVModel){model_kv_shape(&f->model), f->model.fingerprint};
    model.shape.window_head_dim = 24;
    CHECK(kvfile_load(&kv, path, &model, NULL, &info, err) == -1 && strstr(err, "sliding.k"));
    kvcache_drop(&f->kv, seq);
    remove(path);
    Context c = fixture_context(f, (int[1024]){0}, 64);
    Fitting fitting;
    CHECK(fitting_open(&fitting, FIT_VALUES, &c, err) == -1 && strstr(err, "several layers"));
    CHECK(fitting_open(&fitting, FIT_NONE, &c, err) == 0);
    fitting_close(&fitting);
    kvcache_drop(&f->kv, c.seq);
}

int main(int argc, char **argv) {
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) return 0;
    for (size_t i = 0; i < sizeof q / sizeof(float); i++) ((float *)q)[i] = rnd();
    for (size_t i = 0; i < sizeof k / sizeof(float); i++) ((float *)k)[i] = rnd();
    for (size_t i = 0; i < sizeof v / sizeof(float); i++) ((float *)v)[i] = rnd();
    test_attention(KV_F32, 1e-5);
    test_attention(KV_F16, 5e-3);
    test_scores(false);
    test_scores(true);
    test_state_beside();
    Fixture f;
    if (fixture_open(&f, "gemma4", "gemma4.kvz", KV_F32, 2)) {
        test_prefill(&f);
        test_left_out(&f);
        test_readers(&f);
        test_kvzip(&f);
        test_refusals(&f);
    }
    fixture_close(&f);
    if (fixture_open(&f, "gemma4moe", "gemma4moe.kvz", KV_F32, 2)) test_prefill(&f), test_kvzip(&f);
    fixture_close(&f);
    test_files(kvcache_both(KV_F32));
    test_files(kvcache_both(KV_F16));
    test_files((KVTypes){KV_Q8, KV_Q4});
    return test_end("test_shared");
}
