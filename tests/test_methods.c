// Each method against its formula, computed here a second time, in double and without any care for
// speed, from the pairs that the cache holds; and worked examples.
#include "fixture.h"
#include "policies.h"

enum { CTX = 150, ROOM = 1024 };

// A context that has been scored, and its sequence.
typedef struct {
    Fixture *f;
    Context c;
    int ids[ROOM], n, heads;  // pairs of a list: prefix and context
    float *score;
} Scored;

// Scores a context of n_ctx ids by "policy" or "wrapper:policy", its first n_prefix protected.
static void scored_open(Scored *s, Fixture *f, const char *policy, const char *set, int n_prefix,
                        int n_ctx) {
    int own[ROOM];
    *s = (Scored){.f = f, .c = fixture_context(f, own, 64)};
    int n_own = s->c.n_prefix + s->c.n_ctx;
    for (int i = 0; i < n_prefix + n_ctx; i++) s->ids[i] = own[i < n_own ? i : i * 7 % n_own];
    s->c.ids = s->ids, s->c.n_prefix = n_prefix, s->c.n_ctx = n_ctx;
    s->n = n_prefix + n_ctx, s->heads = context_heads(&s->c);
    s->score = malloc((context_scores(&s->c) + 1) * sizeof *s->score);
    if (!CHECK(context_set(&s->c, policy_find(policy), level_find("pair"), set, err) == 0))
        printf("%s: %s\n", policy, err), exit(1);
    if (!CHECK(context_score(&s->c, s->c.policy, s->score, err) == 0))
        printf("%s: %s\n", policy, err);
}

static void scored_close(Scored *s) {
    kvcache_drop(s->c.kv, s->c.seq);
    free(s->score);
}

static KVHeadAt at_head(const Scored *s, int h) {
    int n = s->f->kv.shape.n_kv_heads;
    return (KVHeadAt){s->c.seq, kvcache_scored_layer(&s->f->kv.shape, h / n), h % n};
}

// Keys and values of head h [n][d]; keys before their rotation with `plain`.
static void pairs_of(const Scored *s, int h, bool plain, double *k, double *v) {
    const Config *m = &s->f->model.config;
    int d = m->head_dim;
    KVHeadAt at = at_head(s, h);
    for (int t = 0; t < s->n; t++) {
        float key[MAX_HEAD_DIM], value[MAX_HEAD_DIM], rope[MAX_HEAD_DIM];
        int pos = kvcache_pair(&s->f->kv, at, t, key, value);
        model_rope(&s->f->model, at.layer, pos, rope);
        for (int j = 0; j < d; j++) k[t * d + j] = key[j], v[t * d + j] = value[j];
        for (int j = 0; j < m->rotary_dim / 2 && plain; j++) {
            double a = key[j], b = key[j + m->rotary_dim / 2], cosine = rope[2 * j];
            double sine = rope[2 * j + 1];
            k[t * d + j] = (a * cosine + b * sine) / (cosine * cosine + sine * sine);
            k[t * d + j + m->rotary_dim / 2] =
                (b * cosine - a * sine) / (cosine * cosine + sine * sine);
        }
    }
}

static double score_at(const Scored *s, int h, int t) {
    return s->score[(size_t)h * s->c.n_ctx + t - s->c.n_prefix];
}

// want [n] of head h, counted from the prefix on.
static void check_head(const Scored *s, int h, const double *want, double within) {
    for (int t = s->c.n_prefix; t < s->n; t++) {
        if (!CHECK(fabs(score_at(s, h, t) - want[t]) <= within * fmax(1, fabs(want[t])))) {
            printf("%s, head %d, pair %d: %g, not %g\n", s->c.policy->name, h, t, score_at(s, h, t),
                   want[t]);
            return;
        }
    }
}

// ---- geometry ----

static double squares(const double *x, int d) {
    double sum = 0;
    for (int j = 0; j < d; j++) sum += x[j] * x[j];
    return sum;
}

// Shares of |k|^2 and of |v|^2 among 16 neighbours, their product over the sum of all.
static void test_curdkv(Fixture *f, int n_prefix) {
    Scored s;
    scored_open(&s, f, "curdkv", NULL, n_prefix, CTX);
    int d = f->model.config.head_dim, n = s.n;
    double *k = malloc(sizeof *k * n * d), *v = malloc(sizeof *v * n * d), want[ROOM], all;
    for (int h = 0; h < s.heads; h++) {
        pairs_of(&s, h, false, k, v);
        all = 0;
        for (int t = 0; t < n; t++) {
            double k_sum = 0, v_sum = 0;
            for (int i = t / 16 * 16; i < t / 16 * 16 + 16 && i < n; i++)
                k_sum += squares(k + i * d, d), v_sum += squares(v + i * d, d);
            all += want[t] = squares(k + t * d, d) / k_sum * squares(v + t * d, d) / v_sum;
        }
        for (int t = 0; t < n; t++) want[t] = t < 4 ? 1 : want[t] / all;
        check_head(&s, h, want, 1e-5);
    }
    free(k), free(v), scored_close(&s);
}

// softmax over a part's pairs of the deviation of x in the range of the part that follows.
static void lag_softmax(const double *x, int from, int lag, int d, double *out) {
    double sum = 0;
    for (int i = 0; i < lag; i++) {
        double u[MAX_HEAD_DIM], mean = 0, squared = 0;
        for (int j = 0; j < d; j++) {
            double lo = INFINITY, hi = -INFINITY;
            for (int t = from + lag; t < from + 2 * lag; t++)
                lo = fmin(lo, x[t * d + j]), hi = fmax(hi, x[t * d + j]);
            u[j] = (x[(from + i) * d + j] - lo) / (hi - lo);
            mean += u[j] / d;
        }
        for (int j = 0; j < d; j++) squared += (u[j] - mean) * (u[j] - mean);
        sum += out[i] = exp(sqrt(squared / (d - 1)));
    }
    for (int i = 0; i < lag; i++) out[i] /= sum;
}

static void test_lagkv(Fixture *f, int n_prefix) {
    enum { LAG = 16 };
    Scored s;
    scored_open(&s, f, "lagkv", "lag=16", n_prefix, CTX);
    int d = f->model.config.head_dim, n = s.n, swapped = 0;
    double *k = malloc(sizeof *k * n * d), *v = malloc(sizeof *v * n * d);
    for (int h = 0; h < s.heads; h++) {
        double a[LAG], b[LAG], want[ROOM];
        pairs_of(&s, h, false, k, v);
        for (int t = 0; t < n; t++) want[t] = 1;
        for (int from = 4; from + 2 * LAG <= n; from += LAG) {
            lag_softmax(k, from, LAG, d, a), lag_softmax(v, from, LAG, d, b);
            for (int i = 0; i < LAG; i++) {
                int rank = 0;
                for (int j = 0; j < LAG; j++) rank += a[j] + b[j] < a[i] + b[i];
                want[from + i] = rank / (double)LAG;
            }
        }
        for (int t = n_prefix; t < n; t++) {  // in float two neighbours may change places
            double off = fabs(score_at(&s, h, t) - want[t]);
            CHECK(off < 1.5 / LAG), swapped += off > 1e-6;
        }
    }
    CHECK(swapped <= s.heads * n / 100);
    scored_close(&s);
    scored_open(&s, f, "lagkv", NULL, 0, CTX);  // shorter than 4 + 2 * 128: the newest stay
    for (int t = 0; t < CTX; t++)
        CHECK_NEAR(score_at(&s, 0, t), t < 4 ? 1 : (t - 4) / (CTX - 4.0), 1e-6);
    free(k), free(v), scored_close(&s);
}

// x^T (X^T X + 0.01)^-1 x by elimination, of all rows of X [n][d].
static void naive_leverage(const double *x, int n, int d, double *out) {
    double *m = calloc((size_t)d * (d + n), sizeof *m);
    int cols = d + n;
    for (int i = 0; i < d; i++) {
        for (int j = 0; j < d; j++) {
            for (int t = 0; t < n; t++) m[i * cols + j] += x[t * d + i] * x[t * d + j];
            m[i * cols + j] += i == j ? 0.01 : 0;
        }
        for (int t = 0; t < n; t++) m[i * cols + d + t] = x[t * d + i];
    }
    for (int p = 0; p < d; p++) {
        for (int i = 0; i < d; i++) {
            double factor = i == p ? 0 : m[i * cols + p] / m[p * cols + p];
            for (int j = p; j < cols && factor != 0; j++)
                m[i * cols + j] -= factor * m[p * cols + j];
        }
    }
    for (int t = 0; t < n; t++) {
        out[t] = 0;
        for (int i = 0; i < d; i++) out[t] += x[t * d + i] * m[i * cols + d + t] / m[i * cols + i];
    }
    free(m);
}

// want [heads][n] gets mean 0 and deviation 1 in each layer, over the context's pairs.
static void standardize(const Scored *s, double *want) {
    int g = s->f->kv.shape.n_kv_heads, n = s->n, n_ctx = s->c.n_ctx;
    for (int h = 0; h < s->heads; h += g) {
        double mean = 0, squared = 0;
        for (int i = 0; i < g * n; i++)
            if (i % n >= s->c.n_prefix) mean += want[h * n + i] / (g * n_ctx);
        for (int i = 0; i < g * n; i++)
            if (i % n >= s->c.n_prefix)
                squared += (want[h * n + i] - mean) * (want[h * n + i] - mean);
        for (int i = 0; i < g * n; i++)
            want[h * n + i] = (want[h * n + i] - mean) / sqrt(squared / (g * n_ctx - 1));
    }
}

static void test_leverage(Fixture *f, int n_prefix) {
    Scored s, sketched;
    scored_open(&s, f, "leverage", "sketch=0", n_prefix, CTX);
    int d = f->model.config.head_dim, n = s.n;
    double *k = malloc(sizeof *k * n * d), *v = malloc(sizeof *v * n * d);
    double *want = malloc(sizeof *want * s.heads * n), same = 0;
    for (int h = 0; h < s.heads; h++) {
        pairs_of(&s, h, true, k, v);
        for (int j = 0; j < d; j++) {
            double mean = 0;
            for (int t = 0; t < n; t++) mean += k[t * d + j] / n;
            for (int t = 0; t < n; t++) k[t * d + j] -= mean;
        }
        naive_leverage(k, n, d, want + h * n);
    }
    standardize(&s, want);
    for (int h = 0; h < s.heads; h++) check_head(&s, h, want + h * n, 2e-3);
    scored_open(&sketched, f, "leverage", NULL, n_prefix, CTX);  // an approximation of the same
    for (size_t i = 0; i < context_scores(&s.c); i++)
        same += s.score[i] * sketched.score[i] / (double)context_scores(&s.c);
    CHECK(same > 0.5 && same < 0.9999);
    if (getenv("VERBOSE")) printf("sketched and whole leverage correlate by %g\n", same);
    free(k), free(v), free(want), scored_close(&s), scored_close(&sketched);
}

int main(int argc, char **argv) {
    static const char *const families[] = {"smol", "qwen3"};
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) {
        printf("test_methods: no %s on this machine\n", argv[1]);
        return 0;
    }
    for (int i = 0; i < (getenv("QUICK") ? 1 : 2); i++) {
        Fixture f;
        char weights[64];
        snprintf(weights, sizeof weights, "%s.kvz", families[i]);
        if (!fixture_open(&f, families[i], weights, KV_F32, 2)) continue;
        fixture_profile(&f);
        for (int n_prefix = 0; n_prefix <= 6; n_prefix += 6) {
            test_curdkv(&f, n_prefix);
            test_lagkv(&f, n_prefix);
            test_leverage(&f, n_prefix);
        }
        fixture_close(&f);
    }
    return test_end("test_methods");
}
