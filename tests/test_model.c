// The runtime against the reference: for each tiny model of tests/fixtures its converted weights
// must give the stored logits, keys, values, greedy ids, KVzip scores, keep sets and logits after
// eviction. Then the laws that need a model: blocks of any size agree, threads change no bit, ratio
// 1 changes no bit.
#include "fixture.h"

// Feeds ids in blocks of `block`, all with logits when out is given: out [n][vocab].
static void feed(Fixture *f, int seq, const int *ids, int n, int block, float *out) {
    Row rows[MAX_ROWS];
    int vocab = f->model.config.vocab_size;
    for (int i = 0; i < n;) {
        int m = n - i < block ? n - i : block;
        if (out && m > f->state.max_logits) m = f->state.max_logits;
        for (int j = 0; j < m; j++) rows[j] = (Row){seq, ids[i + j], out != NULL};
        if (!CHECK(forward(&f->state, &f->kv, rows, m, err) == 0)) printf("%s: %s\n", f->name, err);
        if (out) memcpy(out + (size_t)i * vocab, f->state.logits, (size_t)m * vocab * sizeof *out);
        i += m;
    }
}

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) best = x[i] > x[best] ? i : best;
    return best;
}

static float *logits_of(Fixture *f, int seq, const int *ids, int n, int block) {
    float *out = malloc((size_t)n * f->model.config.vocab_size * sizeof *out);
    feed(f, seq, ids, n, block, out);
    return out;
}

static void check_greedy(Fixture *f, int seq, const float *last, const char *name) {
    const Tensor *t = want(f, name);
    int vocab = f->model.config.vocab_size, id = argmax(last, vocab);
    float *logits = malloc((size_t)vocab * sizeof *logits);
    for (size_t i = 0; i < t->shape[0]; i++) {
        CHECK(id == ((const int *)t->data)[i]);
        feed(f, seq, &id, 1, 1, logits);
        id = argmax(logits, vocab);
    }
    free(logits);
}

// ---- the reference's values ----

static void check_cache(Fixture *f, int seq, int layer) {
    char name[2][32];
    snprintf(name[0], sizeof name[0], "prefill.k.%d", layer),
        snprintf(name[1], sizeof name[1], "prefill.v.%d", layer);
    const Tensor *kt = tensors_find(&f->want, name[0]), *vt = tensors_find(&f->want, name[1]);
    if (!kt || !vt) return;
    int d = kvshape_dim(&f->kv.shape, layer), n = (int)kt->shape[1];
    float k[MAX_HEAD_DIM], v[MAX_HEAD_DIM];
    for (int g = 0; g < kvshape_heads(&f->kv.shape, layer); g++) {
        for (int t = kvcache_head(&f->kv, seq, layer, g)->dropped; t < n; t++) {
            CHECK(kvcache_pair(&f->kv, (KVHeadAt){seq, layer, g}, t, k, v) == t);
            CHECK_NEAR(far(k, (const float *)kt->data + ((size_t)g * n + t) * d, (size_t)d), 0,
                       5e-5);
            CHECK_NEAR(far(v, (const float *)vt->data + ((size_t)g * n + t) * d, (size_t)d), 0,
                       5e-5);
        }
    }
}

static void test_prefill(Fixture *f) {
    const Tensor *ids = want(f, "prefill.ids"), *rows = want(f, "prefill.rows"),
                 *logits = want(f, "prefill.logits");
    int n = (int)ids->shape[0], vocab = f->model.config.vocab_size, seq = kvcache_new(&f->kv, err);
    float *have = logits_of(f, seq, ids->data, n, n);
    for (size_t i = 0; i < rows->shape[0]; i++) {
        const float *row = (const float *)logits->data + i * vocab;
        CHECK_NEAR(far(have + (size_t)((const int *)rows->data)[i] * vocab, row, (size_t)vocab), 0,
                   3e-4);
    }
    for (int i = 0; i < n; i++)
        CHECK(argmax(have + (size_t)i * vocab, vocab) ==
              ((const int *)want(f, "prefill.argmax")->data)[i]);
    for (int l = 0; l < f->model.config.n_layers; l++) check_cache(f, seq, l);
    check_greedy(f, seq, have + (size_t)(n - 1) * vocab, "prefill.greedy");
    kvcache_drop(&f->kv, seq);
    free(have);
}

static void check_mask(const Fixture *f, const float *score, const char *level, int percent,
                       SelectLevel kv_level, bool ref_ties) {
    char name[64];
    snprintf(name, sizeof name, "mask.%s.r%d", level, percent);
    const Tensor *t = want(f, name);
    int n_layers = (int)t->shape[0], n_kv_heads = (int)t->shape[1], n_ctx = (int)t->shape[2];
    uint8_t *keep = malloc(t->bytes);
    Selection how = {.n_layers = n_layers,
                     .n_kv_heads = n_kv_heads,
                     .n_ctx = n_ctx,
                     .ratio = percent / 100.0,
                     .level = kv_level,
                     .ref_ties = ref_ties};
    CHECK(select_pairs(keep, score, &how, err) >= 0);
    if (!CHECK(memcmp(keep, t->data, t->bytes) == 0)) printf("%s: %s differs\n", f->name, name);
    free(keep);
}

static void check_masks(const Fixture *f, const float *score, const float *plus) {
    for (int percent = 30; percent <= 60; percent += 30) {
        check_mask(f, score, "pair", percent, LEVEL_PAIR, true);
        check_mask(f, score, "pair_exact", percent, LEVEL_PAIR, false);
        check_mask(f, score, "pair_uniform", percent, LEVEL_UNIFORM, false);
        check_mask(f, score, "head", percent, LEVEL_HEAD, true);
        if (plus) check_mask(f, plus, "plus_pair", percent, LEVEL_PAIR, true);
    }
}

// The query after evicting what the stored mask evicts: logits and greedy ids.
static void check_evicted(Fixture *f, const Context *c, int percent) {
    char mask[32], logits[32], greedy[32];
    snprintf(mask, sizeof mask, "mask.pair.r%d", percent);
    snprintf(logits, sizeof logits, "evict.r%d.logits", percent);
    snprintf(greedy, sizeof greedy, "evict.r%d.greedy", percent);
    int seq = kvcache_fork(&f->kv, c->seq, err), vocab = f->model.config.vocab_size;
    if (percent < 100)
        CHECK(kvcache_evict(&f->kv, seq, c->n_prefix, c->n_ctx, want(f, mask)->data, err) == 0);
    const Tensor *query = want(f, "kvzip.query"), *t = want(f, logits);
    int n = (int)query->shape[0];
    float *have = logits_of(f, seq, query->data, n, n);
    CHECK_NEAR(far(have, t->data, (size_t)n * vocab), 0, 3e-4);
    check_greedy(f, seq, have + (size_t)(n - 1) * vocab, greedy);
    kvcache_drop(&f->kv, seq);
    free(have);
}

static void test_kvzip(Fixture *f) {
    int ids[1024];
    Context c = fixture_context(f, ids, 64);
    size_t n = context_scores(&c);
    float *score = malloc(n * sizeof *score), *plus = malloc(n * sizeof *plus);
    CHECK(want(f, "kvzip.score")->bytes == n * sizeof *score);
    CHECK(context_score(&c, policy_find("kvzip"), score, err) == 0);
    CHECK_NEAR(far(score, want(f, "kvzip.score")->data, n), 0, 1e-4);
    check_masks(f, want(f, "kvzip.score")->data, want(f, "kvzip.score_plus")->data);
    check_masks(f, score, NULL);  // the fixture's margins exceed our noise
    for (int percent = 30; percent <= 100; percent += percent == 60 ? 40 : 30)
        check_evicted(f, &c, percent);

    int full = c.seq;
    c.seq = kvcache_new(&f->kv, err);
    CHECK(context_score(&c, policy_find("kvzip+"), plus, err) == 0);
    CHECK_NEAR(far(plus, want(f, "kvzip.score_plus")->data, n), 0, 1e-4);
    kvcache_drop(&f->kv, c.seq);

    // With one chunk over the whole context the local pass sees what the full one sees.
    float *local = malloc(n * sizeof *local);
    c.chunk = c.n_ctx;
    for (int i = 0; i < 2; i++) {
        c.seq = kvcache_new(&f->kv, err), c.local = i == 1;
        CHECK(context_score(&c, policy_find("kvzip"), i ? local : score, err) == 0);
        kvcache_drop(&f->kv, c.seq);
    }
    CHECK_NEAR(far(score, local, n), 0, 1e-5);
    kvcache_drop(&f->kv, full);
    free(score), free(plus), free(local);
}

// ---- laws ----

// OpenBLAS adds up in another order for each number of rows, and a recurrence carries that along.
#ifdef BLAS
static const double BLOCKS_NEAR = 3e-4;
#else
static const double BLOCKS_NEAR = 1e-4;
#endif

static void test_blocks(Fixture *f) {
    const Tensor *ids = want(f, "prefill.ids");
    int n = (int)ids->shape[0], vocab = f->model.config.vocab_size;
    float *first = NULL;
    for (int block = 512; block > 0; block = block == 512  ? 64
                                             : block == 64 ? 7
                                             : block == 7  ? 1
                                                           : 0) {
        int seq = kvcache_new(&f->kv, err);
        float *have = logits_of(f, seq, ids->data, n, block);
        if (first) CHECK_NEAR(far(have, first, (size_t)n * vocab), 0, BLOCKS_NEAR);
        kvcache_drop(&f->kv, seq);
        if (first)
            free(have);
        else
            first = have;
    }
    free(first);
}

// Rows of several sequences in one call, in any mixture, give what they give alone.
static void test_mixed_batch(Fixture *f) {
    const int *ids = want(f, "prefill.ids")->data;
    int vocab = f->model.config.vocab_size, a = kvcache_new(&f->kv, err);
    feed(f, a, ids, 40, 40, NULL);
    int b = kvcache_fork(&f->kv, a, err), c = kvcache_fork(&f->kv, a, err);
    Row rows[] = {{a, ids[40], true}, {b, ids[50], false}, {b, ids[51], true}};
    CHECK(forward(&f->state, &f->kv, rows, 3, err) == 0);
    float *both = malloc((size_t)2 * vocab * sizeof *both);
    memcpy(both, f->state.logits, (size_t)2 * vocab * sizeof *both);
    CHECK(forward(&f->state, &f->kv, &(Row){c, ids[40], true}, 1, err) == 0);
    CHECK_NEAR(far(f->state.logits, both, (size_t)vocab), 0, 1e-5);
    int alone[] = {ids[50], ids[51]};
    kvcache_drop(&f->kv, c);
    c = kvcache_new(&f->kv, err);
    feed(f, c, ids, 40, 40, NULL);
    float *have = logits_of(f, c, alone, 2, 2);
    CHECK_NEAR(far(have + vocab, both + vocab, (size_t)vocab), 0, 1e-5);
    kvcache_drop(&f->kv, a), kvcache_drop(&f->kv, b), kvcache_drop(&f->kv, c);
    free(have), free(both);
}

// Everything a context's compression yields, as one block of bytes.
static float *compress_bits(const char *weights, KVType type, int threads, double ratio,
                            size_t *n) {
    Fixture f;
    int ids[1024];
    if (!fixture_open(&f, "smol", weights, type, threads)) exit(1);
    Context c = fixture_context(&f, ids, 64);
    size_t n_score = context_scores(&c);
    const Tensor *query = want(&f, "kvzip.query");
    *n = n_score + query->shape[0] * (size_t)f.model.config.vocab_size;
    float *out = malloc(*n * sizeof *out);
    uint8_t *keep = malloc(n_score);
    CHECK(context_score(&c, policy_find("kvzip"), out, err) == 0);
    int n_layers = kvcache_scored_layers(&f.kv.shape, NULL);
    Selection how = {.n_layers = n_layers,
                     .n_kv_heads = f.kv.shape.n_kv_heads,
                     .n_ctx = c.n_ctx,
                     .ratio = ratio,
                     .level = LEVEL_PAIR};
    CHECK(select_pairs(keep, out, &how, err) >= 0);
    if (ratio > 0) CHECK(kvcache_evict(&f.kv, c.seq, c.n_prefix, c.n_ctx, keep, err) == 0);
    feed(&f, c.seq, query->data, (int)query->shape[0], 20, out + n_score);
    free(keep);
    fixture_close(&f);
    return out;
}

static void test_bits(void) {
    static const char *const weights[] = {"smol.kvz", "smol-q8.kvz", "smol-q4.kvz", "smol-bf16.kvz",
                                          "smol-f16.kvz"};
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
        size_t n;
        float *one = compress_bits(weights[i], KV_F16, 1, 0.3, &n);
        for (int threads = 2; threads <= 4; threads += 2) {
            float *more = compress_bits(weights[i], KV_F16, threads, 0.3, &n);
            CHECK(memcmp(one, more, n * sizeof *one) == 0);
            free(more);
        }
        free(one);
        float *none = compress_bits(weights[i], KV_F16, 2, 0.0, &n),
              *all = compress_bits(weights[i], KV_F16, 2, 1.0, &n);
        CHECK(memcmp(none, all, n * sizeof *all) == 0);  // ratio 1 changes no bit
        free(none), free(all);
    }
}

// An entry of a q8 matrix.
static double q8_at(const Matrix *w, int r, int c) {
    size_t panel = (size_t)(r / 16), i = (size_t)(r % 16);
    int code = ((const int8_t *)w->data)[(panel * w->cols_padded / 4 + c / 4) * 64 + i * 4 + c % 4];
    return code * (double)f16_f32(w->scale[(panel * w->cols_padded / 32 + c / 32) * 16 + i]);
}

// Logits are the output matrix times its input in 16 bits; 8 would be off by 0.05 here.
static void test_logits_input(void) {
    static const char *const weights[] = {"smol-q8.kvz", "smol-q4.kvz"};
    for (int i = 0; i < 2; i++) {
        Fixture f;
        if (!fixture_open(&f, "smol", weights[i], KV_F32, 2)) exit(1);
        const int *ids = want(&f, "prefill.ids")->data;
        const Config *c = &f.model.config;
        for (int n = 1; n <= 33; n += 16) {
            float *logits = logits_of(&f, kvcache_new(&f.kv, err), ids, n, n);
            int wrong = 0;
            for (int j = 0; j < n * c->vocab_size; j++) {
                const float *x = f.state.xb.x + (size_t)(j / c->vocab_size) * f.state.xb.stride;
                double sum = 0;
                for (int k = 0; k < c->dim; k++)
                    sum += q8_at(&f.model.wcls, j % c->vocab_size, k) * x[k];
                wrong += !(fabs(sum - logits[j]) < 1e-3);
            }
            CHECK(wrong == 0);
            free(logits);
        }
        fixture_close(&f);
    }
}

// Logits of 40 tokens in blocks.
static float *logits_by(const char *isa, const char *weights, int block, size_t *n) {
    enum { TOKENS = 40 };
    Fixture f;
    if (kernels_init(isa) != 0 || !fixture_open(&f, "smol", weights, KV_F32, 2)) exit(1);
    *n = (size_t)TOKENS * f.model.config.vocab_size;
    float *out =
        logits_of(&f, kvcache_new(&f.kv, err), want(&f, "prefill.ids")->data, TOKENS, block);
    fixture_close(&f);
    return out;
}

// Runs of which some are multiplied by tiles and some are not: each has the logits that it has
// alone.
static void test_tiled_company(const char *weights) {
    enum { RUNS = 5 };
    static const int length[RUNS] = {3, 20, 1, KV_LONG_RUN, 8};
    Fixture f;
    Row all[MAX_ROWS];
    int n = 0;
    if (kernels_init("amx-emulated") != 0 || !fixture_open(&f, "smol", weights, KV_F16, 2)) exit(1);
    int vocab = f.model.config.vocab_size;
    float *alone = malloc((size_t)RUNS * vocab * sizeof *alone);
    for (int r = 0; r < RUNS; r++) {
        Row *own = all + n;
        for (int i = 0, seq = kvcache_new(&f.kv, err); i < length[r]; i++)
            all[n++] = (Row){seq, (5 + 11 * i * (r + 1)) % vocab, i == length[r] - 1};
        CHECK(forward(&f.state, &f.kv, own, length[r], err) == 0);
        memcpy(alone + (size_t)r * vocab, f.state.logits, (size_t)vocab * sizeof *alone);
        for (int i = 0, seq = kvcache_new(&f.kv, err); i < length[r]; i++) own[i].seq = seq;
    }
    CHECK(forward(&f.state, &f.kv, all, n, err) == 0);
    CHECK(memcmp(alone, f.state.logits, (size_t)RUNS * vocab * sizeof *alone) == 0);
    free(alone);
    fixture_close(&f);
}

// By tiles of bf16 logits are near those by other products, and only runs of KV_LONG_RUN tokens or
// more are multiplied so: shorter ones have the bits of the set without tiles.
static void test_tiled(const char *isa) {
    static const char *const weights[] = {"smol-q8.kvz", "smol-q4.kvz", "smol-bf16.kvz",
                                          "smol-f16.kvz"};
    const char *base = kernels_init("avx512bf16") == 0 ? "avx512bf16" : "scalar";
    for (int i = 0; i < 4; i++) {
        size_t n;
        float *slow = logits_by(base, weights[i], 40, &n),
              *tiled = logits_by("amx-emulated", weights[i], 40, &n),
              *nine = logits_by("amx-emulated", weights[i], 20, &n);
        double d = far(slow, tiled, n);
        CHECK(d > 1e-3 && d < (i < 2 ? 1.0 : 0.3));  // of logits up to 11
        CHECK_NEAR(far(tiled, nine, n), 0, 1e-4);
        free(slow), free(nine);
        slow = logits_by(base, weights[i], KV_LONG_RUN - 1, &n);
        nine = logits_by("amx-emulated", weights[i], KV_LONG_RUN - 1, &n);
        CHECK(memcmp(slow, nine, n * sizeof *slow) == 0);
        free(slow), free(tiled), free(nine);
        test_tiled_company(weights[i]);
    }
    kernels_init(isa);
}

// Contexts with no token, one token, and a last chunk of one.
static void test_small_contexts(Fixture *f) {
    for (int n_ctx = 0; n_ctx <= 5; n_ctx++) {
        int ids[1024];
        Context c = fixture_context(f, ids, 2);
        c.n_ctx = n_ctx;
        float score[1024];
        CHECK(context_score(&c, policy_find("kvzip"), score, err) == 0);
        for (size_t i = 0; i < context_scores(&c); i++) CHECK(score[i] > 0 && score[i] <= 1);
        kvcache_drop(&f->kv, c.seq);
    }
}

// The operations counted for run bench are those the shapes ask for; in the last layer, without
// logits, that is q, k and v alone.
static void test_ops(Fixture *f) {
    const Config *c = &f->model.config;
    const Tensor *ids = want(f, "prefill.ids");
    int n = (int)ids->shape[0], seq = kvcache_new(&f->kv, err);
    double qkv = (double)c->dim * (c->q_dim + 2 * c->kv_dim), matrix = 0, pairs = 0;
    double rest = (double)c->dim * (c->q_dim + 3 * c->hidden_dim), attention = f->kv.ops;
    for (int l = 0; l < c->n_layers; l++) {
        bool last = l == c->n_layers - 1;
        matrix += 2.0 * n * (qkv + (last ? 0 : rest));
        for (int i = 0; i < n && !last; i++)
            pairs += c->window[l] && i + 1 > c->window[l] ? c->window[l] : i + 1;
    }
    for (int t = 0; t < W_TYPES; t++) matrix += f->state.ops[t];
    feed(f, seq, ids->data, n, 7, NULL);
    for (int t = 0; t < W_TYPES; t++) matrix -= f->state.ops[t];
    CHECK(matrix == 0.0);
    CHECK(f->kv.ops - attention == 4.0 * c->head_dim * c->n_heads * pairs);
    kvcache_drop(&f->kv, seq);
}

static void test_refusals(Fixture *f) {
    int seq = kvcache_new(&f->kv, err);
    CHECK(forward(&f->state, &f->kv, &(Row){seq, f->model.config.vocab_size, false}, 1, err) == -1);
    CHECK(forward(&f->state, &f->kv, &(Row){seq, -1, false}, 1, err) == -1);
    CHECK(forward(&f->state, &f->kv, &(Row){99, 1, false}, 1, err) == -1);
    CHECK(kvcache_head(&f->kv, seq, 0, 0)->len == 0);
    kvcache_drop(&f->kv, seq);
    Model m;
    CHECK(model_open(&m, "tests/fixtures/smol/expected.safetensors", err) == -1);
    CHECK(strstr(err, "not a converted model") != NULL);
}

// Of an expert that no token goes to nothing is read: garbage there changes no bit.
static void test_untouched_experts(const char *name) {
    Fixture f;
    char weights[64];
    snprintf(weights, sizeof weights, "%s.kvz", name);
    if (!fixture_open(&f, name, weights, KV_F32, 2)) exit(1);
    const Config *c = &f.model.config;
    const int *ids = want(&f, "prefill.ids")->data;
    float *before = logits_of(&f, kvcache_new(&f.kv, err), ids, 1, 1);
    int last = c->n_layers - 1, touched = 0;
    const ExpertRows *rows = &f.state.experts;
    Matrix *stack[] = {&f.model.layers[last].experts.w1, &f.model.layers[last].experts.w2,
                       &f.model.layers[last].experts.w3};
    float *copy[3];
    for (int i = 0; i < 3; i++) {
        size_t n = (size_t)stack[i]->panels * PANEL * stack[i]->cols_padded, one = n / c->n_experts;
        copy[i] = malloc(n * sizeof *copy[i]);
        memcpy(copy[i], stack[i]->data, n * sizeof *copy[i]);
        for (int e = 0; e < c->n_experts; e++) {
            if (e == rows->chosen[0] || e == rows->chosen[1]) {
                touched++;
                continue;
            }
            for (size_t j = 0; j < one; j++) copy[i][e * one + j] = NAN;
        }
        stack[i]->data = (const uint8_t *)copy[i];
    }
    CHECK(touched == 3 * c->n_used && rows->chosen[0] < rows->chosen[1]);
    float *after = logits_of(&f, kvcache_new(&f.kv, err), ids, 1, 1);
    CHECK(memcmp(before, after, (size_t)c->vocab_size * sizeof *after) == 0);
    for (int i = 0; i < 3; i++) free(copy[i]);
    free(before), free(after);
    fixture_close(&f);
}

// A layer kind of its own: the reference's logits, in blocks of any size and in any batch.
static void test_layer_kind(const char *name) {
    Fixture f;
    char weights[64];
    snprintf(weights, sizeof weights, "%s.kvz", name);
    if (!fixture_open(&f, name, weights, KV_F32, 2)) return;
    test_prefill(&f);
    test_blocks(&f);
    test_mixed_batch(&f);
    fixture_close(&f);
}

int main(int argc, char **argv) {
    static const char *const kinds[] = {"qwen35moe", "gptoss", "llama4",    "gemma4moe",
                                        "qwen3moe",  "qwen35", "qwen3next", "ministral"};
    static const char *const families[] = {"smol", "llama", "qwen2", "qwen3", "gemma3", "mistral"};
    // Under valgrind: one family, the four kinds that the others are parts of, and not the bits of
    // every weight type.
    bool quick = getenv("QUICK") != NULL;
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) {
        printf("test_model: no %s on this machine\n", argv[1]);
        return 0;
    }
    for (size_t i = 0; i < (quick ? 1 : sizeof families / sizeof *families); i++) {
        Fixture f;
        char weights[64];
        snprintf(weights, sizeof weights, "%s.kvz", families[i]);
        if (!fixture_open(&f, families[i], weights, KV_F32, 2)) continue;
        test_prefill(&f);
        test_blocks(&f);
        test_mixed_batch(&f);
        test_ops(&f);
        if (strcmp(families[i], "mistral") == 0) window_off(&f);
        test_kvzip(&f);
        if (i == 0) test_small_contexts(&f), test_refusals(&f);
        fixture_close(&f);
    }
    for (size_t i = 0; i < (quick ? 4 : sizeof kinds / sizeof *kinds); i++)
        test_layer_kind(kinds[i]);
    if (!quick) {
        test_bits(), test_logits_input(), test_tiled(argc > 1 ? argv[1] : NULL);
        test_untouched_experts("qwen3moe"), test_untouched_experts("gemma4moe");
    }
    return test_end("test_model");
}
