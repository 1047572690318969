// fixture.h: one tiny model of tests/fixtures, converted, with the values it must produce.
#ifndef FIXTURE_H
#define FIXTURE_H
#include "policies/calibrate.h"
#include "policies/profile.h"
#include "test.h"

typedef struct {
    Model model;
    TensorFile want;
    Tokenizer *tok;
    ThreadPool *pool;
    RunState state;
    KVCache kv;
    Profile profile;  // none until fixture_profile
    char name[32];
} Fixture;

static char err[ERR_LEN];

static inline bool fixture_open(Fixture *f, const char *name, const char *weights, KVType type, int threads) {
    char path[256];
    *f = (Fixture){0};
    snprintf(f->name, sizeof f->name, "%s", name);
    snprintf(path, sizeof path, "tests/fixtures/%s", weights);
    bool ok = model_open(&f->model, path, err) == 0;
    snprintf(path, sizeof path, "tests/fixtures/%s/expected.safetensors", name);
    ok = ok && tensors_open(&f->want, path, err) == 0;
    ok = ok && (f->tok = tokenizer_open(&f->model.file, err)) != NULL;
    f->pool = pool_open(threads);
    KVShape shape = model_kv_shape(&f->model);
    ok = ok && state_open(&f->state, &f->model, f->pool, MAX_ROWS, 96, err) == 0;
    ok = ok && kvcache_open(&f->kv, &shape, kvcache_both(type), f->pool, err) == 0;
    if (!ok) printf("%s: %s\n", weights, err);
    return CHECK(ok);
}

static inline void fixture_close(Fixture *f) {
    profile_close(&f->profile);
    kvcache_close(&f->kv);
    state_close(&f->state);
    pool_close(f->pool);
    tokenizer_close(f->tok);
    tensors_close(&f->want);
    model_close(&f->model);
}

static inline const Tensor *want(const Fixture *f, const char *name) {
    const Tensor *t = tensors_find(&f->want, name);
    if (!t) printf("%s: no %s\n", f->name, name), exit(1);
    return t;
}

// prefix + context of the fixture, and its postfix text from the fixture's ids.
static inline Context fixture_context(Fixture *f, int *ids, int chunk) {
    const Tensor *prefix = want(f, "kvzip.prefix"), *ctx = want(f, "kvzip.ctx");
    memcpy(ids, prefix->data, prefix->bytes);
    memcpy(ids + prefix->shape[0], ctx->data, ctx->bytes);
    return (Context){.state = &f->state,
                     .kv = &f->kv,
                     .tok = f->tok,
                     .seq = kvcache_new(&f->kv, err),
                     .ids = ids,
                     .n_prefix = (int)prefix->shape[0],
                     .n_ctx = (int)ctx->shape[0],
                     .chunk = chunk,
                     .postfix = tokenizer_chat(f->tok)->kvzip_postfix,
                     .profile = f->profile.n_ratios > 0 ? &f->profile : NULL};
}

// Two texts, of which the second one is short.
static const char fixture_sample[] =
    "A river never hurries in the plain. It has done its hard work in the hills, and now it "
    "spreads, turns, and leaves behind whatever it carried. Fishermen say that the slow water is "
    "the honest one, because it shows you what lies on the bottom.\n"
    "=====\n"
    "def area(width, height):\n    return width * height  # in square metres, 42 of them\n";

// Calibrates on the sample; `into`: to is a model.
static inline int fixture_calibrate(Fixture *f, const char *to, bool into, CalibrateResult *r) {
    Ids prefix = {0};
    CHECK(tokenizer_encode(f->tok, "Read this. ", 11, TOK_BOS, &prefix) == 0);
    Calibrate c = {.context = {.state = &f->state,
                               .kv = &f->kv,
                               .tok = f->tok,
                               .chunk = 16,
                               .local = true,
                               .postfix = tokenizer_chat(f->tok)->kvzip_postfix},
                   .prefix = &prefix,
                   .lambda = 1e-3,
                   .path = to,
                   .into = into};
    int rc = calibrate_run(&c, fixture_sample, sizeof fixture_sample - 1, r, err);
    if (rc != 0) printf("%s: %s\n", f->name, err);
    ids_free(&prefix);
    return rc;
}

// Gives the fixture a profile, through a file that is removed again: it stays mapped.
static inline void fixture_profile(Fixture *f) {
    char path[64];
    CalibrateResult r;
    test_path(path, "fixture.kvp");
    CHECK(fixture_calibrate(f, path, false, &r) == 0);
    CHECK(profile_open(&f->profile, &f->model, path, err) == 0);
    remove(path);
}

// Mistral's scores are those of the model with its window off.
static inline void window_off(Fixture *f) {
    static const int none[16];
    f->model.config.window = f->kv.shape.window = none;
}

// Largest difference; a NaN among a counts as one.
static inline double far(const float *a, const float *b, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++)
        worst = fabs((double)a[i] - b[i]) > worst || isnan(a[i]) ? fabs((double)a[i] - b[i]) : worst;
    return worst;
}
#endif
