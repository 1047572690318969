// Each method against its formula, computed here a second time, in double and without any care for
// speed, from the pairs that the cache holds; and worked examples.
#include "fixture.h"
#include "kernels/matmul.h"
#include "policies.h"
#include "policies/fitting.h"
#include "policies/methods.h"

enum { CTX = 150, ROOM = 1024, SEEN = 256, ASKED = 5 };

static const int question[ASKED] = {11, 5, 42, 17, 8};

// A context that has been scored, and its sequence.
typedef struct {
    Fixture *f;
    Context c;
    int ids[ROOM], n, heads;  // pairs of a list: prefix and context
    float *score;
} Scored;

static bool ask_all;  // methods that may are asked a question, too

// Scores a context of n_ctx ids by "policy" or "wrapper:policy", its first n_prefix protected.
static void scored_open(Scored *s, Fixture *f, const char *policy, const char *set, int n_prefix,
                        int n_ctx) {
    int own[ROOM];
    *s = (Scored){.f = f, .c = fixture_context(f, own, 64)};
    int n_own = s->c.n_prefix + s->c.n_ctx;
    for (int i = 0; i < n_prefix + n_ctx; i++) s->ids[i] = own[i < n_own ? i : i * 7 % n_own];
    s->c.ids = s->ids, s->c.n_prefix = n_prefix, s->c.n_ctx = n_ctx;
    if (policy_find(policy)->asks >= ASKS_ALWAYS || ask_all)
        s->c.question = question, s->c.n_question = ASKED;
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

// ---- attention ----

// Queries and keys as they pass, by position, and what they make of each other.
typedef struct {
    Fixture *f;
    float *q, *k;  // [n_layers][SEEN][q_dim], [kv_dim]
    double *w;     // [scored heads][SEEN][SEEN] weights of rows, mean over the group
    int n;         // positions seen
} Seen;

static void record(void *arg, int layer, int n) {
    Seen *s = arg;
    const RunState *run = &s->f->state;
    size_t q_dim = (size_t)s->f->model.config.n_heads * s->f->model.config.head_dim;
    size_t kv_dim = (size_t)s->f->model.config.n_kv_heads * s->f->model.config.head_dim;
    for (int i = 0; i < n; i++) {
        size_t at = (size_t)layer * SEEN + run->pos[i];
        memcpy(s->q + at * q_dim, run->q + i * q_dim, q_dim * sizeof(float));
        memcpy(s->k + at * kv_dim, run->k + i * kv_dim, kv_dim * sizeof(float));
        s->n = run->pos[i] + 1 > s->n ? run->pos[i] + 1 : s->n;
    }
}

static double *weights_of(const Seen *s, int h, int row) {
    return s->w + ((size_t)h * SEEN + row) * SEEN;
}

// softmax(scale q . k) of every row over all positions up to its own, and the head's sink.
static void attend_all(Seen *s) {
    const KVShape *shape = &s->f->kv.shape;
    int group = shape->n_heads / shape->n_kv_heads, d = shape->head_dim;
    int heads = kvcache_scored_layers(shape, NULL) * shape->n_kv_heads;
    s->w = calloc((size_t)heads * SEEN * SEEN, sizeof *s->w);
    for (int i = 0; i < heads * group * s->n; i++) {
        int row = i % s->n, h = i / s->n / group, g = h % shape->n_kv_heads;
        int layer = kvcache_scored_layer(shape, h / shape->n_kv_heads);
        size_t at = (size_t)layer * SEEN;
        double z[SEEN], sum = exp(kvshape_sink(shape, layer, g * group + i / s->n % group));
        for (int t = 0; t <= row; t++) {
            const float *q =
                s->q + ((at + row) * shape->n_heads + g * group + i / s->n % group) * d;
            const float *k = s->k + ((at + t) * shape->n_kv_heads + g) * d;
            z[t] = 0;
            for (int j = 0; j < d; j++) z[t] += (double)q[j] * k[j];
            sum += z[t] = exp(shape->scale * z[t]);
        }
        for (int t = 0; t <= row; t++) weights_of(s, h, row)[t] += z[t] / sum / group;
    }
}

// Scores as scored_open, and records what passes.
static void seen_open(Seen *seen, Scored *s, Fixture *f, const char *policy, const char *set,
                      int n_prefix) {
    const Config *m = &f->model.config;
    size_t rows = (size_t)m->n_layers * SEEN * m->head_dim;
    *seen = (Seen){.f = f,
                   .q = malloc(rows * m->n_heads * sizeof(float)),
                   .k = malloc(rows * m->n_kv_heads * sizeof(float))};
    f->state.watch = record, f->state.watch_arg = seen;
    scored_open(s, f, policy, set, n_prefix, CTX);
    CHECK(f->state.watch == record);  // whoever watched as well has left
    f->state.watch = NULL;
    attend_all(seen);
}

static void seen_close(Seen *seen, Scored *s) {
    free(seen->q), free(seen->k), free(seen->w);
    scored_close(s);
}

// Sum of the weights that rows [from, to) pay to pair t.
static double paid(const Seen *s, int h, int from, int to, int t) {
    double sum = 0;
    for (int i = from > t ? from : t; i < to; i++) sum += weights_of(s, h, i)[t];
    return sum;
}

// The last n pairs beat all others of their layer, and the newer the older.
static void check_recent(const Scored *s, int n) {
    int g = s->f->kv.shape.n_kv_heads;
    for (int h = 0; h < s->heads; h++) {
        for (int t = s->n - n; t < s->n; t++) {
            if (t > s->n - n) CHECK(score_at(s, h, t) > score_at(s, h, t - 1));
            for (int other = h / g * g; other < h / g * g + g; other++)
                CHECK(score_at(s, h, t) > score_at(s, other, s->n - n - 1));
        }
    }
}

static void test_h2o(Fixture *f, int n_prefix) {
    Seen seen;
    Scored s;
    seen_open(&seen, &s, f, "h2o", NULL, n_prefix);
    double want[ROOM];
    for (int h = 0; h < s.heads; h++) {
        for (int t = 0; t < s.n; t++)
            want[t] = t < s.n - CTX / 10 ? paid(&seen, h, 0, s.n, t) : score_at(&s, h, t);
        check_head(&s, h, want, 1e-4);
    }
    check_recent(&s, CTX / 10);
    seen_close(&seen, &s);
}

static void test_scissorhands(Fixture *f, int n_prefix) {
    Seen seen;
    Scored s;
    seen_open(&seen, &s, f, "scissorhands", "history=40,recent=7", n_prefix);
    int off = 0;
    for (int h = 0; h < s.heads; h++) {
        for (int t = n_prefix; t < s.n - 7; t++) {
            int low = 0;
            for (int i = s.n - 40 > t ? s.n - 40 : t; i < s.n; i++)
                low += weights_of(&seen, h, i)[t] < 1.0 / (i + 1);
            CHECK(fabs(score_at(&s, h, t) + low) <= 1), off += score_at(&s, h, t) != -low;
        }
    }
    CHECK(off <= s.heads);  // a weight may be its share to the last digit
    check_recent(&s, 7);
    seen_close(&seen, &s);
}

// finch and task: rows of the question, each times the number of pairs before it.
static void test_finch(Fixture *f, const char *policy, int n_prefix) {
    Seen seen;
    Scored s;
    seen_open(&seen, &s, f, policy, NULL, n_prefix);
    double want[ROOM];
    CHECK(seen.n == s.n + ASKED);
    for (int h = 0; h < s.heads; h++) {
        for (int t = 0; t < s.n; t++) {
            want[t] = 0;
            for (int i = s.n; i < s.n + ASKED; i++)
                want[t] += i * weights_of(&seen, h, i)[t] / ASKED;
        }
        check_head(&s, h, want, 1e-4);
    }
    CHECK(s.c.kv->seqs[s.c.seq].next_pos == s.n);  // the question has left no trace
    seen_close(&seen, &s);
}

// snapkv with a question: its rows in the place of the last ones, and no pair is protected.
static void test_asked_snapkv(Fixture *f, int n_prefix) {
    Seen seen;
    Scored s;
    ask_all = true;
    seen_open(&seen, &s, f, "snapkv", "kernel=3", n_prefix);
    ask_all = false;
    double want[ROOM];
    for (int h = 0; h < s.heads; h++) {
        for (int t = n_prefix; t < s.n; t++) {
            want[t] = 0;
            for (int i = t > n_prefix ? t - 1 : t; i <= t + 1 && i < s.n; i++)
                want[t] += paid(&seen, h, s.n, s.n + ASKED, i) / ASKED / 3;
        }
        check_head(&s, h, want, 1e-5);
    }
    seen_close(&seen, &s);
}

static void test_pyramidinfer(Fixture *f, int n_prefix) {
    Seen seen;
    Scored s;
    seen_open(&seen, &s, f, "pyramidinfer", NULL, n_prefix);
    int rows = CTX / 5, from = s.n - rows, g = f->kv.shape.n_kv_heads;
    for (int h = 0; h < s.heads; h++) {
        double want[ROOM] = {0};
        for (int t = 0; t < s.n; t++) {
            for (int i = from; i < s.n && t < from; i++) {
                for (int k = h / g * g; k < h / g * g + g; k++)
                    want[t] +=
                        (1 + 0.2 * (i - from) / (rows - 1)) * weights_of(&seen, k, i)[t] / g / rows;
            }
            if (t < 4 || t >= from) want[t] = t < s.c.n_prefix ? 0 : score_at(&s, h, t);
            for (int o = 4 > n_prefix ? 4 : n_prefix;
                 o < from && (t < 4 || t >= from) && t >= n_prefix; o++)
                CHECK(want[t] > score_at(&s, h, o));
        }
        check_head(&s, h, want, 1e-5);
    }
    seen_close(&seen, &s);
}

static void test_infinipot(Fixture *f, int n_prefix) {
    Seen seen;
    Scored s;
    seen_open(&seen, &s, f, "infinipot", "window=9", n_prefix);
    double want[ROOM];
    CHECK(seen.n > s.n + 5);
    for (int h = 0; h < s.heads; h++) {
        for (int t = 0; t < s.n; t++)
            want[t] =
                t < s.n - 9 ? paid(&seen, h, s.n, seen.n, t) / (seen.n - s.n) : score_at(&s, h, t);
        check_head(&s, h, want, 1e-5);
        CHECK(score_at(&s, h, s.n - 9) > score_at(&s, h, s.n - 10));
    }
    seen_close(&seen, &s);
}

// dcp: all weights, mean over all heads of the layer. ltp: over the rows that see the pair, the
// least of the layers so far.
static void test_layers(Fixture *f, int n_prefix) {
    Seen seen;
    Scored s, ltp;
    seen_open(&seen, &s, f, "dcp", NULL, n_prefix);
    scored_open(&ltp, f, "ltp", NULL, n_prefix, CTX);
    int g = f->kv.shape.n_kv_heads;
    double want[ROOM], least[ROOM];
    for (int h = 0; h < s.heads; h++) {
        for (int t = 0; t < s.n; t++) {
            want[t] = 0;
            for (int k = h / g * g; k < h / g * g + g; k++)
                want[t] += paid(&seen, k, 0, s.n, t) / g;
            double mean = want[t] / (s.n - t);
            if (h % g == 0) least[t] = h == 0 || mean < least[t] ? mean : least[t];
        }
        check_head(&s, h, want, 1e-4), check_head(&ltp, h, least, 1e-5);
    }
    scored_close(&ltp);
    seen_close(&seen, &s);
}

// ---- classes ----

static void test_duo(Fixture *f, int n_prefix) {
    Scored s;
    scored_open(&s, f, "duo", "sink=9,recent=12", n_prefix, CTX);
    for (int h = 0; h < s.heads; h++) {
        for (int t = n_prefix; t < s.n; t++) {
            bool ends = t < 9 || t >= s.n - 12;
            CHECK(ends ? score_at(&s, h, t) >= 2 : score_at(&s, h, t) == f->profile.head_max[h]);
        }
    }
    scored_close(&s);
}

// A layer that looks elsewhere more comes first; --threshold 0.15 keeps layers that pay 0.85 or
// less to the ends.
static void test_simlayerkv(Fixture *f, int n_prefix) {
    Seen seen;
    Scored s;
    seen_open(&seen, &s, f, "simlayerkv", "sink=4,recent=30", n_prefix);
    int g = f->kv.shape.n_kv_heads, row = s.n - 1;
    for (int h = 0; h < s.heads; h++) {
        double mass = 0;
        for (int k = h / g * g; k < h / g * g + g; k++)
            for (int t = 0; t < row; t++)
                if (t < 4 || t >= row - 30) mass += weights_of(&seen, k, row)[t] / g;
        for (int t = n_prefix; t < s.n; t++) {
            if (t < 4 || t >= s.n - 30)
                CHECK(score_at(&s, h, t) >= 2);
            else
                CHECK_NEAR(score_at(&s, h, t), 1 - mass, 1e-5);
        }
    }
    seen_close(&seen, &s);
}

// Of each head the smallest set that holds the mass; with these numbers sets of several kinds
// occur.
static void test_fastgen(Fixture *f, const char *set, double mass, int n_prefix) {
    enum { WINDOW = 20, FEW = CTX / 10, NEW = CTX / 5 };
    Seen seen;
    Scored s;
    seen_open(&seen, &s, f, "fastgen", set, n_prefix);
    for (int h = 0; h < s.heads; h++) {
        int class[ROOM], chosen = 0, best = 0;
        double a[ROOM], lost;
        for (int t = n_prefix; t < s.n; t++) {
            int n;
            const char *text = tokenizer_piece(f->tok, s.ids[t], &n);
            bool mark = false, other = false;
            for (int b = 0; b < n; b++) {
                mark = mark ||
                       (text[b] > ' ' && strchr("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", text[b]));
                other = other || (text[b] & 128) || (text[b] >= '0' && text[b] <= '9') ||
                        ((text[b] | 32) >= 'a' && (text[b] | 32) <= 'z' && text[b] != '@' &&
                         text[b] != '[');
            }
            mark = mark && !other;
            class[t] = tokenizer_is_special(f->tok, s.ids[t]) ? 0 : mark ? 1 : 4;
            a[t] = paid(&seen, h, s.n - WINDOW, s.n, t) / WINDOW;
        }
        for (int i = 0; i < FEW; i++) {
            best = -1;
            for (int t = n_prefix; t < s.n; t++)
                if (class[t] == 4 && (best < 0 || a[t] > a[best])) best = t;
            class[best] = 2;
        }
        for (int t = s.n - NEW; t < s.n; t++) class[t] = class[t] == 4 ? 3 : class[t];
        for (chosen = 0; chosen < 4; chosen++) {
            lost = 0;
            for (int t = n_prefix; t < s.n; t++) lost += class[t] > chosen ? a[t] : 0;
            if (1 - lost >= mass) break;
        }
        for (int t = n_prefix; t < s.n; t++)
            CHECK_NEAR(score_at(&s, h, t), a[t] + (class[t] <= chosen), 1e-5);
    }
    seen_close(&seen, &s);
}

// ---- wrapped ----

static void test_chunkkv(Fixture *f, int n_prefix) {
    Scored s, inner;
    scored_open(&s, f, "chunkkv:knorm", "tokens=7", n_prefix, CTX);
    scored_open(&inner, f, "knorm", NULL, n_prefix, CTX);
    int g = f->kv.shape.n_kv_heads;
    for (int h = 0; h < s.heads; h++) {
        for (int t = 0; t < CTX; t++) {
            double sum = 0;
            int from = t / 7 * 7, m = CTX - from < 7 ? CTX - from : 7;
            for (int k = h / g * g; k < h / g * g + g; k++)
                for (int i = from; i < from + m; i++) sum += inner.score[(size_t)k * CTX + i] / m;
            CHECK_NEAR(s.score[(size_t)h * CTX + t], sum, 1e-4);
        }
    }
    scored_close(&s), scored_close(&inner);
}

// The k largest of score [n].
static void best_of(const double *score, int n, int k, bool *in) {
    for (int t = 0; t < n; t++) {
        int above = 0;
        for (int i = 0; i < n; i++) above += score[i] > score[t] || (score[i] == score[t] && i < t);
        in[t] = above < k;
    }
}

// mean over the group of |Wo_h v|_1
static double value_norm(const Fixture *f, int layer, int g, const double *v) {
    const Config *m = &f->model.config;
    int group = m->n_heads / m->n_kv_heads, d = m->head_dim;
    double sum = 0;
    for (int h = g * group; h < (g + 1) * group; h++) {
        for (int r = 0; r < m->dim; r++) {
            double y = 0;
            for (int j = 0; j < d; j++)
                y += matrix_at(&f->model.layers[layer].wo, r, h * d + j) * v[j];
            sum += fabs(y) / group;
        }
    }
    return sum;
}

// For any number k that stays: floor(k / 2), at least one, by the inner scores, the others by those
// times the norms; as kvpress has it for one k.
static void test_criticalkv(Fixture *f, int n_prefix) {
    Scored s, inner;
    scored_open(&s, f, "criticalkv:expected", NULL, n_prefix, CTX);
    scored_open(&inner, f, "expected", NULL, n_prefix, CTX);
    int d = f->model.config.head_dim, g = f->kv.shape.n_kv_heads, off = 0;
    double *k = malloc(sizeof *k * s.n * d), *v = malloc(sizeof *v * s.n * d);
    for (int h = 0; h < s.heads; h++) {
        double first[CTX], second[CTX], have[CTX];
        bool a[CTX], b[CTX], got[CTX];
        pairs_of(&s, h, false, k, v);
        for (int t = 0; t < CTX; t++) {
            first[t] = inner.score[(size_t)h * CTX + t], have[t] = s.score[(size_t)h * CTX + t];
            second[t] = (first[t] + 1e-4) *
                        value_norm(f, at_head(&s, h).layer, h % g, v + (n_prefix + t) * d);
        }
        for (int stay = 1; stay <= CTX; stay += stay < 9 ? 1 : 20) {
            double rest[CTX];
            best_of(first, CTX, stay / 2 > 1 ? stay / 2 : 1, a);
            for (int t = 0; t < CTX; t++) rest[t] = a[t] ? INFINITY : second[t];
            best_of(rest, CTX, stay, b), best_of(have, CTX, stay, got);
            for (int t = 0; t < CTX; t++) off += b[t] != got[t];
        }
    }
    CHECK(off <= 2);  // two that are equal but for a last digit
    free(k), free(v), scored_close(&s), scored_close(&inner);
}

// NACL: without lots the order is that of the scores; lots at a low temperature are the scores
// themselves; at a high one anything is drawn, and the best still stay.
static void test_nacl(Fixture *f) {
    Scored s[3];
    static const char *const set[] = {"random=0", "random=1,temperature=0.000001",
                                      "temperature=1000"};
    int moved = 0, lost = 0;
    for (int i = 0; i < 3; i++) scored_open(&s[i], f, "nacl", set[i], 0, CTX);
    for (int h = 0; h < s[0].heads; h++) {
        double x[3][CTX];
        bool in[3][CTX], best[CTX];
        for (int t = 0; t < 3 * CTX; t++)
            x[t / CTX][t % CTX] = s[t / CTX].score[(size_t)h * CTX + t % CTX];
        for (int i = 0; i < 3; i++) best_of(x[i], CTX, 100, in[i]);
        best_of(x[0], CTX, 70, best);
        for (int t = 0; t < CTX; t++) {
            moved += in[0][t] != in[2][t], lost += best[t] && !in[2][t];
            CHECK(in[0][t] == in[1][t]);
        }
    }
    CHECK(lost == 0 && moved > s[0].heads);
    for (int i = 0; i < 3; i++) scored_close(&s[i]);
}

// ---- centres ----

// Re(conj(E[q]) k e^(i w t)), pair of channels by pair, from queries and keys before their
// rotation.
static void test_triattention(Fixture *f, int n_prefix) {
    Seen seen;
    Scored s;
    const Config *m = &f->model.config;
    int d = m->head_dim, group = m->n_heads / m->n_kv_heads, half = m->rotary_dim / 2;
    seen_open(&seen, &s, f, "triattention", "furthest=16", n_prefix);
    double *k = malloc(sizeof *k * s.n * d), *v = malloc(sizeof *v * s.n * d);
    for (int h = 0; h < s.heads && half * 2 == d; h++) {
        double want[ROOM];
        int layer = at_head(&s, h).layer;
        pairs_of(&s, h, true, k, v);
        for (int t = 0; t < s.n; t++) want[t] = -INFINITY;
        for (int i = 0; i < group; i++) {
            double x[ROOM] = {0}, mean = 0, squared = 0;
            int q_head = h % m->n_kv_heads * group + i;
            for (int j = 0; j < half; j++) {
                double re = 0, im = 0, length = 0;
                for (int p = 0; p < s.n; p++) {
                    const float *q =
                        seen.q + (((size_t)layer * SEEN + p) * m->n_heads + q_head) * d;
                    float rope[MAX_HEAD_DIM];
                    model_rope(&f->model, layer, p, rope);
                    double c = rope[2 * j], n = rope[2 * j + 1];
                    re += (q[j] * c + q[j + half] * n) / s.n,
                        im += (q[j + half] * c - q[j] * n) / s.n;
                    length += sqrt(q[j] * q[j] + q[j + half] * q[j + half]) / s.n;
                }
                for (int t = n_prefix; t < s.n; t++) {
                    double a = k[t * d + j], b = k[t * d + j + half];
                    for (int far_off = 1; far_off <= 16; far_off *= 2) {
                        float rope[MAX_HEAD_DIM];
                        model_rope(&f->model, layer, s.n - 1 - t + far_off, rope);
                        double c = rope[2 * j], n = rope[2 * j + 1];  // of the distance
                        x[t] += ((re * a + im * b) * c + (re * b - im * a) * n) / 5;
                    }
                    x[t] += (length - hypot(re, im)) * hypot(a, b);
                }
            }
            for (int t = n_prefix; t < s.n; t++) mean += x[t] / CTX;
            for (int t = n_prefix; t < s.n; t++) squared += (x[t] - mean) * (x[t] - mean) / CTX;
            for (int t = n_prefix; t < s.n; t++)
                want[t] = fmax(want[t], (x[t] - mean) / sqrt(squared));
        }
        check_head(&s, h, want, 2e-3);
    }
    free(k), free(v), seen_close(&seen, &s);
}

// ---- Q-Filters ----

// v [d] = the first right singular vector of a [n][d], by turning its columns against each other
// until all are orthogonal (one-sided Jacobi), with the sign of 1^T u. a is overwritten.
static void naive_first_singular(double *a, int n, int d, double *v) {
    double *turn = calloc((size_t)d * d, sizeof *turn), longest = -1;
    int first = 0;
    for (int i = 0; i < d; i++) turn[i * d + i] = 1;
    for (int round = 0; round < 30; round++) {
        for (int i = 0; i < d; i++) {
            for (int j = i + 1; j < d; j++) {
                double ii = 0, jj = 0, ij = 0;
                for (int r = 0; r < n; r++) {
                    ii += a[r * d + i] * a[r * d + i], jj += a[r * d + j] * a[r * d + j];
                    ij += a[r * d + i] * a[r * d + j];
                }
                double angle = 0.5 * atan2(2 * ij, ii - jj), c = cos(angle), s = sin(angle);
                for (int r = 0; r < n + d; r++) {
                    double *x = r < n ? a + r * d : turn + (r - n) * d, xi = x[i], xj = x[j];
                    x[i] = c * xi + s * xj, x[j] = c * xj - s * xi;
                }
            }
        }
    }
    for (int i = 0; i < d; i++) {
        double length = 0;
        for (int r = 0; r < n; r++) length += a[r * d + i] * a[r * d + i];
        if (length > longest) longest = length, first = i;
    }
    double sum = 0;
    for (int r = 0; r < n; r++) sum += a[r * d + first];
    for (int j = 0; j < d; j++) v[j] = turn[j * d + first] * (sum < 0 ? -1 : 1);
    free(turn);
}

static void test_qfilters(Fixture *f, int n_prefix) {
    Seen seen;
    Scored s;
    const Config *m = &f->model.config;
    int d = m->head_dim, group = m->n_heads / m->n_kv_heads;
    seen_open(&seen, &s, f, "qfilters", NULL, n_prefix);
    double *k = malloc(sizeof *k * s.n * d), *v = malloc(sizeof *v * s.n * d);
    double *q = malloc(sizeof *q * s.n * d);
    for (int h = 0; h < s.heads; h++) {
        double want[ROOM] = {0}, direction[MAX_HEAD_DIM];
        int layer = at_head(&s, h).layer;
        pairs_of(&s, h, false, k, v);
        for (int i = 0; i < group; i++) {
            int q_head = h % m->n_kv_heads * group + i;
            for (int x = 0; x < s.n * d; x++)
                q[x] = seen.q[(((size_t)layer * SEEN + x / d) * m->n_heads + q_head) * d + x % d];
            naive_first_singular(q, s.n, d, direction);
            for (int x = 0; x < s.n * d; x++) want[x / d] += direction[x % d] * k[x] / group;
        }
        check_head(&s, h, want, 1e-4);
    }
    free(k), free(v), free(q), seen_close(&seen, &s);
}

// Queries (2, 1) and (1, 2): Q^T Q = (5 4; 4 5), whose first vector is (1, 1) / sqrt 2. Their
// negatives have the same products and the other sign. Of (3, 0), (0, -2) it is (1, 0), of none 0.
static void test_first_direction(void) {
    float f[2];
    first_direction(f, (float[]){5, 4, 4, 5}, (float[]){3, 3}, 2);
    CHECK_NEAR(f[0], sqrt(0.5), 1e-6), CHECK_NEAR(f[1], sqrt(0.5), 1e-6);
    first_direction(f, (float[]){5, 4, 4, 5}, (float[]){-3, -3}, 2);
    CHECK_NEAR(f[0], -sqrt(0.5), 1e-6), CHECK_NEAR(f[1], -sqrt(0.5), 1e-6);
    first_direction(f, (float[]){9, 0, 0, 4}, (float[]){3, -2}, 2);
    CHECK_NEAR(f[0], 1, 1e-6), CHECK_NEAR(f[1], 0, 1e-6);
    first_direction(f, (float[]){0, 0, 0, 0}, (float[]){0, 0}, 2);
    CHECK(f[0] == 0 && f[1] == 0);
}

// ---- kvpress ----

// How far scores are from kvpress' (tests/fixtures/make_methods.py), relative to 1 or more; of the
// tokens [from, to) of each head.
static double from_kvpress(const Scored *s, const TensorFile *t, const char *name, int from,
                           int to) {
    const Tensor *x = tensors_find(t, name);
    double worst = x ? 0 : INFINITY;
    for (int i = 0; x && i < s->heads * s->n; i++) {
        double want = ((const float *)x->data)[i], off = fabs(s->score[i] - want);
        if (i % s->n >= from && i % s->n < to) worst = fmax(worst, off / fmax(1, fabs(want)));
    }
    if (getenv("VERBOSE")) printf("%s %s: %.1e from kvpress\n", s->f->name, name, worst);
    return worst;
}

// Pairs whose fate at 0.5, as many in every head, is another than kvpress'; per_head 0: it has one
// set of tokens for all heads of a layer.
static int fates_apart(const Scored *s, const TensorFile *t, const char *name, bool per_head) {
    const uint8_t *want = tensors_find(t, name)->data;
    uint8_t *keep = malloc(context_scores(&s->c));
    Context c = s->c;
    int apart = 0, g = s->f->kv.shape.n_kv_heads;
    c.level = level_find("uniform");
    CHECK(context_select(&c, s->score, 0.5, keep, err) == (long)s->heads * s->n / 2);
    for (int h = 0; h < s->heads; h++)
        for (int i = 0; i < s->n; i++)
            apart += keep[h * s->n + i] != want[(per_head ? h : h / g) * s->n + i];
    free(keep);
    return apart;
}

// How far values of the pairs that stay by knorm at 0.25, as many in every head, are from those of
// kvpress' MergingPress, [head][40][head_dim].
static double merged_apart(Scored *s, const TensorFile *t) {
    int d = s->f->model.config.head_dim, n_kept = s->n / 4;
    const float *want = tensors_find(t, "merging")->data;
    uint8_t *keep = malloc(context_scores(&s->c));
    double worst = 0;
    Fitting fitting;
    s->c.level = level_find("uniform");
    CHECK(context_select(&s->c, s->score, 0.25, keep, err) == (long)s->heads * n_kept);
    CHECK(fitting_open(&fitting, FIT_MERGE, &s->c, err) == 0);
    s->c.fitting = &fitting;
    CHECK(context_evict(&s->c, keep, false, err) == 0);
    for (int i = 0; i < s->heads * n_kept; i++) {
        float v[MAX_HEAD_DIM];
        kvcache_pair(&s->f->kv, at_head(s, i / n_kept), i % n_kept, NULL, v);
        for (int j = 0; j < d; j++) worst = fmax(worst, fabs(v[j] - want[(size_t)i * d + j]));
    }
    s->c.fitting = NULL, fitting_close(&fitting), free(keep);
    if (getenv("VERBOSE")) printf("%s merging: %.1e from kvpress\n", s->f->name, worst);
    return worst;
}

static void test_kvpress(const char *family) {
    enum { N = 160 };
    static const struct {
        const char *name, *policy, *set;
        int from, to;
        double within;
    } all[] = {{"curdkv", "curdkv", NULL, 0, N, 1e-5},
               {"leverage", "leverage", "sketch=0", 0, N, 2e-3},
               {"compactor", "compactor", "sketch=0,block=74", 8, N - 4, 2e-3},
               {"capkv", "capkv", NULL, 4, N, 1e-4},
               {"finch", "finch", NULL, 0, N, 1e-4},
               {"qfilters", "qfilters", NULL, 0, N, 1e-4},
               {"lagkv", "lagkv", "lag=16", 0, N, 1.01 / 16}};
    char path[128];
    Fixture f;
    Scored s;
    TensorFile t;
    snprintf(path, sizeof path, "%s.kvz", family);
    if (!fixture_open(&f, family, path, KV_F32, 2)) return;
    snprintf(path, sizeof path, "tests/fixtures/%s/methods.safetensors", family);
    if (!CHECK(tensors_open(&t, path, err) == 0)) return;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        scored_open(&s, &f, all[i].policy, all[i].set, 0, N);
        double off = from_kvpress(&s, &t, all[i].name, all[i].from, all[i].to);
        if (!CHECK(off <= all[i].within)) printf("%s %s: %g off\n", family, all[i].name, off);
        scored_close(&s);
    }
    scored_open(&s, &f, "chunkkv:knorm", NULL, 0, N);
    CHECK(fates_apart(&s, &t, "chunkkv", false) == 0);
    scored_close(&s), scored_open(&s, &f, "criticalkv:expected", NULL, 0, N);
    CHECK(fates_apart(&s, &t, "criticalkv", true) <= 2);
    scored_close(&s), scored_open(&s, &f, "simlayerkv", "recent=30", 0, N);
    const float *mass = tensors_find(&t, "simlayerkv")->data;
    for (int h = 0; h < s.heads; h++)
        CHECK_NEAR(1 - score_at(&s, h, 60), mass[h / f.kv.shape.n_kv_heads], 1e-5);
    scored_close(&s), scored_open(&s, &f, "knorm", NULL, 0, N);
    CHECK(merged_apart(&s, &t) < 1e-5);
    scored_close(&s), tensors_close(&t), fixture_close(&f);
}

// Names of wrapped methods.
static void test_names(void) {
    const Policy *p = policy_find("chunkkv:kvzap");
    CHECK(p && strcmp(p->name, "chunkkv:kvzap") == 0 && strcmp(p->inner, "kvzap") == 0);
    CHECK(p == policy_find("chunkkv:kvzap") && p->score == policy_find("chunkkv")->score);
    CHECK(param_find(p->params, "expected", 8) == 0 && param_find(p->params, "tokens", 6) > 0);
    CHECK(param_find(p->params, "kernel", 6) == -1);
    CHECK(policy_find("criticalkv:kvzip")->repeats &&
          policy_find("chunkkv:task")->asks == ASKS_TASK);
    CHECK(!policy_find("chunkkv:chunkkv") && !policy_find("chunkkv:") &&
          !policy_find("snapkv:knorm"));
    CHECK(!policy_find("chunkkv:nothing") && !policy_find(":knorm") && !policy_find(""));
}

int main(int argc, char **argv) {
    static const char *const families[] = {"smol", "qwen3"};
    test_names();
    test_first_direction();
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
            test_h2o(&f, n_prefix), test_scissorhands(&f, n_prefix);
            test_finch(&f, "finch", n_prefix), test_finch(&f, "task", n_prefix);
            test_asked_snapkv(&f, n_prefix);
            test_pyramidinfer(&f, n_prefix), test_infinipot(&f, n_prefix);
            test_layers(&f, n_prefix);
            test_duo(&f, n_prefix), test_simlayerkv(&f, n_prefix);
            test_fastgen(&f, "window=20,frequent=0.1,local=0.2,mass=0.5", 0.5, n_prefix);
            test_fastgen(&f, "window=20,frequent=0.1,local=0.2,mass=0.3", 0.3, n_prefix);
            test_chunkkv(&f, n_prefix), test_criticalkv(&f, n_prefix);
            test_triattention(&f, n_prefix);
            test_qfilters(&f, n_prefix);
        }
        test_nacl(&f);
        fixture_close(&f);
    }
    Fixture f;
    if (fixture_open(&f, "gptoss", "gptoss.kvz", KV_F32, 2)) {  // heads with sinks
        test_h2o(&f, 0), test_h2o(&f, 6), test_simlayerkv(&f, 0);
        fixture_close(&f);
    }
    test_kvpress("llama"), test_kvpress("qwen3");
    return test_end("test_methods");
}
