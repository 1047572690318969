// test_sinks.c: logits that take part in each softmax of a head and have no value. What the methods
// and fitting make of them: sinks that do not count change no bit, and where they take all, nothing
// is left to the pairs. (Attention, scores and readers: test_kvcache, test_readers, test_state.)
#include "fixture.h"
#include "policies/fitting.h"

enum { MOST = 64 };  // query heads of all layers

// Sinks of all heads: `others`, and in the last layer `last`.
static void give_sinks(Fixture *f, float *sinks, float others, float last) {
    const Config *c = &f->model.config;
    int n = c->n_layers * c->n_heads;
    CHECK(n <= MOST);
    for (int i = 0; i < n; i++) sinks[i] = i / c->n_heads < c->n_layers - 1 ? others : last;
    f->kv.shape.sinks = sinks;
}

static Context scored(Fixture *f, int *ids, const char *policy, Fitting *fitting, float *score) {
    Context c = fixture_context(f, ids, 64);
    c.fitting = fitting;
    CHECK(context_set(&c, policy_find(policy), level_find("pair"), NULL, err) == 0);
    CHECK(context_score(&c, c.policy, score, err) == 0);
    return c;
}

static void test_none(Fixture *f, const char *policy) {
    int ids[1024];
    float sinks[MOST], *score[2];
    for (int i = 0; i < 2; i++) {
        score[i] = malloc((size_t)1 << 20);
        if (i == 1) give_sinks(f, sinks, -1e30f, -1e30f);
        Context c = scored(f, ids, policy, NULL, score[i]);
        if (i == 1) CHECK(memcmp(score[0], score[1], context_scores(&c) * sizeof(float)) == 0);
        kvcache_drop(&f->kv, c.seq);
    }
    f->kv.shape.sinks = NULL;
    free(score[0]), free(score[1]);
}

// |v| of pair t of scored head h.
static float length_of(Fixture *f, const Context *c, int h, int t) {
    int n = f->kv.shape.n_kv_heads, d = f->model.config.head_dim;
    KVHeadAt at = {c->seq, kvcache_scored_layer(&f->kv.shape, h / n), h % n};
    float v[MAX_HEAD_DIM], sum = 0;
    kvcache_pair(&f->kv, at, t, NULL, v);
    for (int j = 0; j < d; j++) sum += v[j] * v[j];
    return sqrtf(sum);
}

// Where the last layer's sinks take all, its pairs get no weight.
static void test_all(Fixture *f, const char *policy) {
    int ids[1024];
    float sinks[MOST], *score = malloc((size_t)1 << 20);
    give_sinks(f, sinks, -1e30f, 1e4f);
    Context c = scored(f, ids, policy, NULL, score);
    int heads = context_heads(&c), n_kv_heads = f->kv.shape.n_kv_heads;
    float epsilon = strcmp(policy, "expected") == 0 ? (float)context_param(&c, "epsilon") : 0;
    for (int h = 0; h < heads; h++) {
        float most = 0;
        for (int t = 0; t < c.n_ctx; t++) {
            float x = score[(size_t)h * c.n_ctx + t];
            if (h < heads - n_kv_heads)
                most = fmaxf(most, x);
            else
                CHECK_NEAR(x, epsilon * length_of(f, &c, h, c.n_prefix + t), 1e-6);
        }
        CHECK(h >= heads - n_kv_heads || most > 1e-3f);
    }
    kvcache_drop(&f->kv, c.seq);
    f->kv.shape.sinks = NULL;
    free(score);
}

// Fitting knows it as well: values and biases of the last layer stay as they are, others do not.
static void test_fitted(Fixture *f, const char *policy) {
    int ids[1024], d = f->model.config.head_dim;
    float sinks[MOST], *score = malloc((size_t)1 << 20);
    Fitting fitting;
    Context c = fixture_context(f, ids, 64);
    kvcache_drop(&f->kv, c.seq);
    CHECK(fitting_open(&fitting, FIT_BOTH, &c, err) == 0);
    give_sinks(f, sinks, -1e30f, 1e4f);
    c = scored(f, ids, policy, &fitting, score);
    int heads = context_heads(&c), n_kv_heads = f->kv.shape.n_kv_heads;
    size_t n = (size_t)heads * c.n_ctx;
    float *before = malloc(n * d * sizeof *before), v[MAX_HEAD_DIM];
    uint8_t *keep = malloc(n);
    for (size_t i = 0; i < n; i++) {
        int h = (int)(i / c.n_ctx);
        KVHeadAt at = {c.seq, kvcache_scored_layer(&f->kv.shape, h / n_kv_heads), h % n_kv_heads};
        keep[i] = i % 3 == 0;
        kvcache_pair(&f->kv, at, c.n_prefix + (int)(i % c.n_ctx), NULL, before + i * d);
    }
    CHECK(fitting_apply_whole(&fitting, &c, keep, err) == 0);
    for (size_t i = 0, changed = 0; i < n; i++) {
        int h = (int)(i / c.n_ctx), t = c.n_prefix + (int)(i % c.n_ctx);
        KVHeadAt at = {c.seq, kvcache_scored_layer(&f->kv.shape, h / n_kv_heads), h % n_kv_heads};
        kvcache_pair(&f->kv, at, t, NULL, v);
        bool same = memcmp(v, before + i * d, (size_t)d * sizeof *v) == 0;
        changed = (i % c.n_ctx ? changed : 0) + !same;
        if (h >= heads - n_kv_heads)
            CHECK(same && kvcache_bias(&f->kv, at, t) == 0);
        else if (i % c.n_ctx == (size_t)c.n_ctx - 1)
            CHECK(changed > 0);
    }
    kvcache_drop(&f->kv, c.seq);
    f->kv.shape.sinks = NULL;
    fitting_close(&fitting);
    free(score), free(before), free(keep);
}

int main(int argc, char **argv) {
    Fixture f;
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) {
        printf("test_sinks: no %s on this machine\n", argv[1]);
        return 0;
    }
    if (!fixture_open(&f, "smol", "smol.kvz", KV_F32, 2)) return 1;
    static const char *const all[] = {"kvzip",  "kvzip+", "expected", "observed",
                                      "snapkv", "tova",   "h2o"};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) test_none(&f, all[i]);
    test_all(&f, "kvzip"), test_all(&f, "expected"), test_all(&f, "observed");
    test_fitted(&f, "knorm"), test_fitted(&f, "kvzip");
    fixture_close(&f);
    return test_end("test_sinks");
}
