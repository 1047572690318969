// fixture.h: one tiny model of tests/fixtures, converted, with the values it must produce.
#ifndef FIXTURE_H
#define FIXTURE_H
#include "../policies.h"
#include "test.h"

typedef struct {
    Model model;
    TensorFile want;
    Tokenizer *tok;
    ThreadPool *pool;
    RunState state;
    KVCache kv;
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
    ok = ok && kvcache_open(&f->kv, &shape, type, f->pool, err) == 0;
    if (!ok) printf("%s: %s\n", weights, err);
    return CHECK(ok);
}

static inline void fixture_close(Fixture *f) {
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
                     .postfix = tokenizer_chat(f->tok)->kvzip_postfix};
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
