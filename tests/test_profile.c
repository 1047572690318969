// What a profile promises: head budgets that add up, probes that solve their ridge regression and
// predict the same score whatever the block size and the number of threads, shares that are those
// of KVzip's own selection, a file that is refused when it is another model's, cut or nonsense, and
// a model that carries its profile and is still the same model.
#define _POSIX_C_SOURCE 200809L
#include "fixture.h"

#include <unistd.h>

static char path[64], into[64], bad[64];
static const double LAMBDA = 1e-3;

// ---- budgets ----

static void test_budgets(const Profile *p) {
    int n_heads = p->n_layers * p->n_kv_heads, budget[64], before[64] = {0};
    CHECK(n_heads <= 64);
    for (int i = 1; i <= 200; i++) {
        double ratio = i / 200.0;
        for (int n_ctx = 0; n_ctx < 3000; n_ctx = 3 * n_ctx + 1) {
            long sum = 0;
            CHECK(profile_budget(p, ratio, n_ctx, budget, err) == 0);
            for (int h = 0; h < n_heads; h++)
                sum += budget[h], CHECK(budget[h] >= 0 && budget[h] <= n_ctx);
            CHECK(sum == (long)((double)n_heads * n_ctx * ratio));
        }
        CHECK(profile_budget(p, ratio, 100000, budget, err) == 0);
        for (int h = 0; h < n_heads; h++) CHECK(budget[h] >= before[h] - 1), before[h] = budget[h];
    }
    for (int i = 0; i < p->n_ratios; i++) {  // at a measured ratio: the measured shares
        double sum = 0;
        for (int h = 0; h < n_heads; h++) sum += p->share[i * n_heads + h];
        CHECK(profile_budget(p, p->ratio[i], 100000, budget, err) == 0);
        CHECK_NEAR(sum / n_heads, p->ratio[i], 0.01);
        for (int h = 0; h < n_heads; h++)
            CHECK_NEAR(budget[h] / 1e5, p->share[i * n_heads + h], 0.02);
    }
}

// ---- against KVzip ----

// A text alone, without a prefix, in one chunk: its KVzip scores [context_scores] in a new array,
// and the profile that calibrating on it gives, whatever method its context names.
static Context calibrate_alone(Fixture *f, const char *text, Ids *ids, float **score, Profile *p) {
    CalibrateResult r;
    CHECK(tokenizer_encode(f->tok, text, strlen(text), 0, ids) == 0);
    Context c = {.state = &f->state,
                 .kv = &f->kv,
                 .tok = f->tok,
                 .ids = ids->id,
                 .n_ctx = ids->n,
                 .chunk = 1000,
                 .seq = kvcache_new(&f->kv, err),
                 .postfix = tokenizer_chat(f->tok)->kvzip_postfix};
    *score = malloc(context_scores(&c) * sizeof **score);
    CHECK(context_set(&c, policy_find("kvzip"), level_find("pair"), NULL, err) == 0);
    CHECK(context_score(&c, policy_find("kvzip"), *score, err) == 0);
    kvcache_drop(&f->kv, c.seq);
    Calibrate cal = {.context = c, .prefix = &(Ids){0}, .lambda = LAMBDA, .path = path};
    CHECK(context_set(&cal.context, policy_find("knorm"), level_find("uniform"), NULL, err) == 0);
    CHECK(calibrate_run(&cal, text, strlen(text), &r, err) == 0);
    CHECK(r.n_texts == 1 && r.n_tokens == ids->n && r.longest == ids->n);
    CHECK(r.explained > 0.05 && r.explained <= 1);
    if (!CHECK(profile_open(p, &f->model, path, err) == 0)) {
        printf("%s: %s\n", f->name, err);
        exit(1);
    }
    return c;
}

// One text alone: its shares and maxima are those of KVzip's scores.
static void test_shares(Fixture *f) {
    static const char text[] =
        "Beans like to climb, pumpkins like to travel, and both of them are "
        "easily offended by a late frost in the second week of May.";
    Ids ids = {0};
    Profile p;
    float *score;
    Context c = calibrate_alone(f, text, &ids, &score, &p);
    uint8_t *keep = malloc(context_scores(&c));
    for (int i = 0; i < p.n_ratios; i++) {
        CHECK(context_select(&c, score, p.ratio[i], keep, err) >= 0);
        for (int h = 0; h < p.n_layers * p.n_kv_heads; h++) {
            double kept = 0, max = 0;
            for (int t = 0; t < c.n_ctx; t++)
                kept += keep[h * c.n_ctx + t], max = fmax(max, score[h * c.n_ctx + t]);
            CHECK_NEAR(p.share[i * p.n_layers * p.n_kv_heads + h], kept / c.n_ctx, 1e-6);
            CHECK_NEAR(p.head_max[h], max, 1e-6);
        }
    }
    profile_close(&p);
    free(score), free(keep);
    ids_free(&ids);
}

// ---- probes ----

// Features and log scores of all texts of a calibration, collected without any of its code.
typedef struct {
    Fixture *f;
    int n_prefix, rows;
    float *x;  // [4096][row_features]
    int layer;
} Collect;

static void collect(void *arg, int layer, int n) {
    Collect *c = arg;
    const RunState *s = &c->f->state;
    const Config *m = &c->f->model.config;
    if (layer != c->layer) return;
    for (int i = 0; i < n; i++) {
        if (s->pos[i] < c->n_prefix) continue;
        float *x = c->x + (size_t)c->rows++ * row_features(m), *k = x + 1 + m->dim;
        x[0] = 1;
        memcpy(x + 1, s->xb.x + (size_t)i * s->xb.stride, m->dim * sizeof *x);
        memcpy(k, s->k + (size_t)i * m->kv_dim, m->kv_dim * sizeof *x);
        for (int g = 0; g < m->n_kv_heads; g++) model_unrotate(s, layer, i, k + g * m->head_dim);
        memcpy(k + m->kv_dim, s->v + (size_t)i * m->kv_dim, m->kv_dim * sizeof *x);
    }
}

static const float *feature(const Config *m, const float *x, int g, int i) {
    int d = m->head_dim, shared = 1 + m->dim;
    if (i < shared) return x + i;
    return i < shared + d ? x + i + g * d : x + i - d + m->kv_dim + g * d;
}

// The gradient of the squared errors and the ridge is nothing beside its own terms.
static void test_gradient(const Config *m, const float *w, const float *x, const float *y, int rows,
                          int g) {
    int n = probe_features(m);
    for (int i = 0; i < n; i++) {
        double gradient = 0, size = 0;
        for (int r = 0; r < rows; r++) {
            const float *row = x + (size_t)r * row_features(m);
            double error = -y[r], fi = *feature(m, row, g, i);
            for (int j = 0; j < n; j++) error += (double)w[j] * *feature(m, row, g, j);
            gradient += fi * error + LAMBDA * fi * fi * w[i], size += fabs(fi * y[r]);
        }
        CHECK_NEAR(gradient / (size + 1e-9), 0, 2e-4);
    }
}

// One text, one layer at a time: the probe solves the normal equations of what a tap sees, and
// policy kvzap gives each pair the probe's product with its features.
static void test_probes(Fixture *f) {
    const Config *m = &f->model.config;
    int ids[1024];
    Profile p;
    if (!CHECK(profile_open(&p, &f->model, path, err) == 0)) {
        printf("%s: %s\n", f->name, err);
        exit(1);
    }
    Context c = fixture_context(f, ids, 64);
    c.profile = &p;
    size_t n = context_scores(&c);
    float *score = malloc(n * sizeof *score);
    CHECK(context_set(&c, policy_find("kvzap"), level_find("pair"), NULL, err) == 0);
    CHECK(context_score(&c, c.policy, score, err) == 0);
    kvcache_drop(&f->kv, c.seq);
    for (int l = 0, s = 0; l < m->n_layers; l++) {
        if (m->window[l] != 0) continue;
        Collect have = {f, c.n_prefix, 0, malloc(4096 * sizeof(float) * row_features(m)), l};
        c.seq = kvcache_new(&f->kv, err);
        f->state.tap = collect, f->state.tap_arg = &have;
        CHECK(context_read(&c, err) == 0 && have.rows == c.n_ctx);
        f->state.tap = NULL;
        kvcache_drop(&f->kv, c.seq);
        for (int g = 0; g < m->n_kv_heads; g++) {
            const float *w = p.probe + (size_t)(s * m->n_kv_heads + g) * probe_features(m);
            for (int t = 0; t < c.n_ctx; t++) {
                double sum = 0;
                for (int i = 0; i < probe_features(m); i++)
                    sum += (double)w[i] * *feature(m, have.x + (size_t)t * row_features(m), g, i);
                CHECK_NEAR(score[(size_t)(s * m->n_kv_heads + g) * c.n_ctx + t], sum,
                           1e-3 * (1 + fabs(sum)));
            }
        }
        s++;
        free(have.x);
    }
    profile_close(&p);
    free(score);
}

static void test_regression(Fixture *f) {
    static const char text[] =
        "In a vegetable garden the paths matter more than the beds. Beds can "
        "be moved every year, and they should be, but a path that has been "
        "walked for twenty summers is as firm as a floor.";
    const Config *m = &f->model.config;
    Ids ids = {0};
    Profile p;
    float *score;
    Context c = calibrate_alone(f, text, &ids, &score, &p);
    for (size_t i = 0; i < context_scores(&c); i++) score[i] = logf(score[i] + 1e-7f);
    int l = kvcache_scored_layer(&f->kv.shape, 0);
    Collect have = {f, 0, 0, malloc(4096 * sizeof(float) * row_features(m)), l};
    c.seq = kvcache_new(&f->kv, err);
    f->state.tap = collect, f->state.tap_arg = &have;
    CHECK(context_read(&c, err) == 0 && have.rows == ids.n);
    f->state.tap = NULL;
    kvcache_drop(&f->kv, c.seq);
    for (int g = 0; g < m->n_kv_heads; g++)
        test_gradient(m, p.probe + (size_t)g * probe_features(m), have.x, score + (size_t)g * ids.n,
                      ids.n, g);
    profile_close(&p);
    free(have.x), free(score);
    ids_free(&ids);
}

// The same bits for one thread and three.
static void test_threads(Fixture *f) {
    Profile p[2];
    CalibrateResult r;
    ThreadPool *two = f->pool;
    for (int i = 0; i < 2; i++) {
        ThreadPool *pool = pool_open(i == 0 ? 1 : 3);
        f->pool = f->state.pool = f->kv.pool = pool;
        CHECK(fixture_calibrate(f, path, false, &r) == 0);
        CHECK(profile_open(&p[i], &f->model, path, err) == 0);
        f->pool = f->state.pool = f->kv.pool = two;
        pool_close(pool);
    }
    size_t heads = (size_t)p[0].n_layers * p[0].n_kv_heads;
    CHECK(memcmp(p[0].probe, p[1].probe,
                 heads * probe_features(&f->model.config) * sizeof(float)) == 0);
    CHECK(memcmp(p[0].share, p[1].share, p[0].n_ratios * heads * sizeof(float)) == 0);
    for (int i = 0; i < 2; i++) profile_close(&p[i]);
}

// The sum of ranks: how many scores are below, equals in the order of the context.
static void test_mixed(Fixture *f) {
    static const char *const policy[] = {"kvzap", "expected", "kvzap"};
    static const char *const set[] = {NULL, NULL, "expected=2"};
    int ids[1024];
    float *score[3];
    Context c = {0};
    for (int i = 0; i < 3; i++) {
        c = fixture_context(f, ids, 64);
        score[i] = malloc(context_scores(&c) * sizeof(float));
        CHECK(context_set(&c, policy_find(policy[i]), level_find("pair"), set[i], err) == 0);
        CHECK(context_score(&c, c.policy, score[i], err) == 0);
        kvcache_drop(&f->kv, c.seq);
    }
    for (size_t at = 0; at < context_scores(&c); at += c.n_ctx) {
        for (int t = 0; t < c.n_ctx; t++) {
            int rank[2] = {0};
            for (int i = 0; i < 2; i++) {
                const float *x = score[i] + at;
                for (int u = 0; u < c.n_ctx; u++) rank[i] += x[u] < x[t] || (x[u] == x[t] && u > t);
            }
            CHECK(score[2][at + t] == (float)(rank[0] + 2 * rank[1]));
        }
    }
    for (int i = 0; i < 3; i++) free(score[i]);
}

// ---- files ----

static void test_into(Fixture *f) {
    Model m = {0};
    Profile p, alone;
    CalibrateResult r;
    CHECK(!profile_carried(&f->model));
    CHECK(fixture_calibrate(f, path, false, &r) == 0 && fixture_calibrate(f, into, true, &r) == 0);
    CHECK(r.n_texts == 3);
    if (!CHECK(model_open(&m, into, err) == 0)) return;
    CHECK_STR(m.fingerprint, f->model.fingerprint);
    CHECK(profile_carried(&m) && profile_open(&p, &m, NULL, err) == 0);
    CHECK(profile_open(&alone, &m, path, err) == 0);
    CHECK(memcmp(p.share, alone.share, p.n_ratios * p.n_layers * p.n_kv_heads * sizeof(float)) ==
          0);
    for (int i = 0; i < f->model.file.n_tensors; i++) {
        const Tensor *a = &f->model.file.tensors[i], *b = tensors_find(&m.file, a->name);
        if (strncmp(a->name, "pad.", 4) == 0) continue;
        CHECK(b && a->bytes == b->bytes && memcmp(a->data, b->data, a->bytes) == 0);
    }
    profile_close(&p), profile_close(&alone);
    model_close(&m);
    remove(into);
}

static void test_refused(const Fixture *f, const Fixture *other) {
    Profile p = {0};
    CHECK(profile_open(&p, &f->model, "build/none.kvp", err) == -1);
    CHECK(profile_open(&p, &other->model, path, err) == -1);
    CHECK(strstr(err, "made for another model") != NULL);
    CHECK(profile_open(&p, &f->model, "tests/fixtures/smol.kvz", err) == -1);
    CHECK(strstr(err, "not a profile") != NULL);
    CHECK(profile_open(&p, &f->model, NULL, err) == -1);  // the model carries none
    Context c = {.profile = NULL};
    int budget[1];
    CHECK(level_find("profile")->budget(&c, 0.5, budget, err) == -1);
    CHECK_STR(err, "level profile needs the model's profile: `run calibrate` makes one");
    profile_close(&p), profile_close(&p);
}

// A number that cannot be, in each tensor.
static void test_nonsense(const Fixture *f) {
    TensorFile file = {0};
    static const char *const names[] = {"profile.ratio", "profile.share", "profile.head_max",
                                        "profile.probe"};
    CHECK(tensors_open(&file, path, err) == 0);
    for (int i = 0; i < 4; i++) {
        const Tensor *t = tensors_find(&file, names[i]);
        FILE *in = fopen(path, "rb"), *out = fopen(bad, "wb");
        long at = (long)((const uint8_t *)t->data - file.map);
        for (long j = 0; j < (long)file.map_bytes; j++) {
            int c = fgetc(in);
            fputc(j >= at && j < at + 4 ? 0xff : c, out);  // a NaN
        }
        fclose(in), fclose(out);
        Profile p;
        CHECK(profile_open(&p, &f->model, bad, err) == -1);
        CHECK(strstr(err, names[i]) != NULL);
    }
    tensors_close(&file);
    CHECK(truncate(bad, 3000) == 0);
    Profile p;
    CHECK(profile_open(&p, &f->model, bad, err) == -1);
    remove(bad);
}

int main(int argc, char **argv) {
    static const char *const families[] = {"smol", "qwen3", "gemma3"};
    bool quick = getenv("QUICK") != NULL;
    setvbuf(stdout, NULL, _IONBF, 0);
    kernels_init(argc > 1 ? argv[1] : NULL);
    test_path(path, "test.kvp"), test_path(into, "test-into.kvz"), test_path(bad, "test-bad.kvp");
    for (int i = 0; i < (quick ? 1 : 3); i++) {
        Fixture f, other;
        char weights[64];
        CalibrateResult r;
        snprintf(weights, sizeof weights, "%s.kvz", families[i]);
        if (!fixture_open(&f, families[i], weights, KV_F32, 2)) continue;
        if (!fixture_open(&other, "llama", "llama.kvz", KV_F32, 1)) continue;
        test_shares(&f);
        test_regression(&f);
        test_threads(&f);
        CHECK(fixture_calibrate(&f, path, false, &r) == 0);
        Profile p;
        CHECK(profile_open(&p, &f.model, path, err) == 0);
        test_budgets(&p);
        profile_close(&p);
        test_probes(&f);
        test_into(&f);
        test_refused(&f, &other);
        test_nonsense(&f);
        remove(path);
        fixture_profile(&f);
        test_mixed(&f);
        fixture_close(&f), fixture_close(&other);
    }
    return test_end("test_profile");
}
