// test_fitting.c: fitting a whole context against the reference (tests/fixtures/make_fits.py, in
// double precision): after it the tiny models give the stored logits, whether it is fitted to the
// queries of reading or of repeating, values alone or biases as well.
#include "fixture.h"
#include "policies.h"
#include "policies/fitting.h"

// Logits: of the largest one; biases: logs. A query that differs in the seventh digit is rounded to
// another half in 3 of 1,000 numbers: in the reference alone that moves logits by 5e-5 and biases
// by 1e-4. Single precision moves them by 3e-5 and 5e-4.
static const double LOGITS = 1e-4, BIASES = 1e-3;

typedef struct {
    const char *name, *policy;
    int times;  // the context, repeated
    int every;  // of what stays one in so many
} Case;

static const Case cases[] = {{"read", "knorm", 1, 1},
                             {"long", "knorm", 4, 1},
                             {"few", "knorm", 4, 3},
                             {"repeat", "kvzip", 1, 1}};

static const Tensor *stored(const TensorFile *fits, const char *a, const char *b) {
    char name[64];
    snprintf(name, sizeof name, "%s.%s", a, b);
    const Tensor *t = tensors_find(fits, name);
    if (!t) printf("no %s\n", name), exit(1);
    return t;
}

static double worst(double a, double b) { return b > a || isnan(b) ? b : a; }

// Of the kept pairs, before the others go.
static double bias_difference(const Fixture *f, int seq, const Tensor *is) {
    int n_kv_heads = f->kv.shape.n_kv_heads, n = (int)is->shape[2];
    double off = 0;
    for (int h = 0; h < (int)is->shape[0] * n_kv_heads; h++) {
        KVHeadAt at = {seq, kvcache_scored_layer(&f->kv.shape, h / n_kv_heads), h % n_kv_heads};
        for (int t = 0; t < n; t++) {
            float bias = ((const float *)is->data)[(size_t)h * n + t];
            off = worst(off, fabs(kvcache_bias(&f->kv, at, t) - bias));
        }
    }
    return off;
}

// Of the last logits of the fixture's query, over the largest.
static double logit_difference(Fixture *f, int seq, const Tensor *is) {
    const Tensor *query = want(f, "kvzip.query");
    int n = (int)query->shape[0], rows = (int)is->shape[0];
    Row row[64];
    for (int i = 0; i < n; i++) row[i] = (Row){seq, ((const int *)query->data)[i], i >= n - rows};
    CHECK(forward(&f->state, &f->kv, row, n, err) == 0);
    size_t n_logits = is->bytes / sizeof(float);
    double largest = 0;
    for (size_t i = 0; i < n_logits; i++) {
        double x = fabs(((const float *)is->data)[i]);
        if (x > largest) largest = x;
    }
    return far(f->state.logits, is->data, n_logits) / largest;
}

// Of what stays in each row one in `every`.
static void thin_out(uint8_t *keep, int rows, int n, int every) {
    for (int h = 0; h < rows; h++)
        for (int i = 0, k = 0; i < n; i++)
            if (keep[h * n + i]) keep[h * n + i] = k++ % every == 0;
}

static void test_case(Fixture *f, const TensorFile *fits, const Case *t, FitKind kind) {
    int ids[1024];
    Context c = fixture_context(f, ids, 64);
    const Tensor *mask = want(f, "mask.pair.r30");
    int once = c.n_ctx, heads = context_heads(&c);
    for (int i = once; i < t->times * once; i++) ids[c.n_prefix + i] = ids[c.n_prefix + i - once];
    c.n_ctx = t->times * once;
    uint8_t *keep = malloc(context_scores(&c));
    float *score = malloc(context_scores(&c) * sizeof *score);
    for (int i = 0; i < heads * t->times; i++)
        memcpy(keep + (size_t)i * once, (const uint8_t *)mask->data + (size_t)(i / t->times) * once,
               once);
    thin_out(keep, heads, c.n_ctx, t->every);
    Fitting fitting;
    CHECK(fitting_open(&fitting, kind, &c, err) == 0);
    c.fitting = &fitting;
    CHECK(context_score(&c, policy_find(t->policy), score, err) == 0);
    CHECK(fitting_apply_whole(&fitting, &c, keep, err) == 0);
    double biases = 0;
    if (kind == FIT_BOTH && t->times == 1)
        biases = bias_difference(f, c.seq, stored(fits, t->name, "bias"));
    CHECK(kvcache_evict(&f->kv, c.seq, c.n_prefix, c.n_ctx, keep, err) == 0);
    char name[32];
    snprintf(name, sizeof name, "%s.logits", fit_kind_name(kind));
    double logits = logit_difference(f, c.seq, stored(fits, t->name, name));
    if (!CHECK(logits < LOGITS) | !CHECK(biases < BIASES))
        printf("%s, %s, %s: logits off by %g, biases by %g\n", f->name, t->name,
               fit_kind_name(kind), logits, biases);
    kvcache_drop(&f->kv, c.seq);
    fitting_close(&fitting);
    free(keep), free(score);
}

// Pairs that stay keep their values and biases, so that evicting twice leaves what evicting at once
// does: of what a context was fitted to, every second pair goes.
static void test_again(Fixture *f) {
    int ids[1024];
    Context c = fixture_context(f, ids, 64);
    const Tensor *mask = want(f, "mask.pair.r30");
    const uint8_t *keep = mask->data;
    int n_kv_heads = f->kv.shape.n_kv_heads;
    uint8_t *half = calloc(mask->bytes, 1), *rest = malloc(mask->bytes);
    float *score = malloc(context_scores(&c) * sizeof *score);
    Fitting fitting;
    CHECK(fitting_open(&fitting, FIT_BOTH, &c, err) == 0);
    c.fitting = &fitting;
    CHECK(context_score(&c, policy_find("knorm"), score, err) == 0);
    CHECK(fitting_apply_whole(&fitting, &c, keep, err) == 0);
    int twice = kvcache_fork(&f->kv, c.seq, err);
    CHECK(kvcache_evict(&f->kv, twice, c.n_prefix, c.n_ctx, keep, err) == 0);
    for (int h = 0; h < context_heads(&c); h++) {
        KVHeadAt at = {twice, kvcache_scored_layer(&f->kv.shape, h / n_kv_heads), h % n_kv_heads};
        int n = 0;
        for (int t = h * c.n_ctx; t < (h + 1) * c.n_ctx; t++)
            if (keep[t]) half[t] = rest[n] = n % 2 == 0, n++;
        CHECK(kvcache_evict_head(&f->kv, at, (KVSpan){c.n_prefix, n}, rest, err) == 0);
    }
    CHECK(kvcache_evict(&f->kv, c.seq, c.n_prefix, c.n_ctx, half, err) == 0);
    CHECK(kvcache_biased(&f->kv, twice));
    const Tensor *query = want(f, "kvzip.query");
    float *logits[2];
    int seq[] = {c.seq, twice}, vocab = f->model.config.vocab_size;
    for (int i = 0; i < 2; i++) {
        Row row = {seq[i], ((const int *)query->data)[0], true};
        logits[i] = malloc((size_t)vocab * sizeof **logits);
        CHECK(forward(&f->state, &f->kv, &row, 1, err) == 0);
        memcpy(logits[i], f->state.logits, (size_t)vocab * sizeof **logits);
        kvcache_drop(&f->kv, seq[i]);
    }
    CHECK(memcmp(logits[0], logits[1], (size_t)vocab * sizeof **logits) == 0);
    fitting_close(&fitting);
    free(half), free(rest), free(score), free(logits[0]), free(logits[1]);
}

static void test_family(const char *family) {
    Fixture f;
    TensorFile fits;
    char path[64];
    snprintf(path, sizeof path, "%s.kvz", family);
    if (!fixture_open(&f, family, path, KV_F32, 2)) return;
    if (strcmp(family, "mistral") == 0) window_off(&f);
    snprintf(path, sizeof path, "tests/fixtures/%s/fits.safetensors", family);
    if (!CHECK(tensors_open(&fits, path, err) == 0)) printf("%s\n", err), exit(1);
    const char *positions = tensors_meta(&fits, "positions");
    const char *few = tensors_meta(&fits, "few");
    if (!CHECK(positions && atoi(positions) == FIT_POSITIONS && few && atoi(few) == FIT_FEW))
        printf("%s: made for %s positions, and all where one in %s stays\n", path, positions, few);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int kind = FIT_VALUES; kind <= FIT_BOTH; kind++)
            test_case(&f, &fits, &cases[i], (FitKind)kind);
    test_again(&f);
    tensors_close(&fits);
    fixture_close(&f);
}

int main(int argc, char **argv) {
    static const char *const families[] = {"smol", "llama", "qwen2", "qwen3", "gemma3", "mistral"};
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) {
        printf("test_fitting: no %s on this machine\n", argv[1]);
        return 0;
    }
    for (size_t i = 0; i < (getenv("QUICK") ? 1 : sizeof families / sizeof *families); i++)
        test_family(families[i]);
    return test_end("test_fitting");
}
