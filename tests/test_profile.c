// What a profile promises: head budgets that add up, probes that solve their ridge regression and
// predict the same score whatever the block size and the number of threads, shares that are those
// of KVzip's own selection, layer shares by effect that are the least sum of effects and are used
// only where texts set aside say so, a file that is refused when it is another model's, cut or
// nonsense, and a model that carries its profile and is still the same model.
#define _POSIX_C_SOURCE 200809L
#include "fixture.h"
#include "policies/effects.h"
#include "policies/methods.h"

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

// ---- layer shares by effect ----

// The convex hull of group g's effects at ratio r: the lowest line between any two points.
static double hull(const Effects *e, int g, double r) {
    double x[EFFECT_POINTS + 1], y[EFFECT_POINTS + 1], low = INFINITY;
    for (int i = 0; i < EFFECT_POINTS; i++) x[i] = effect_ratio[i], y[i] = e->effect[g][i];
    x[EFFECT_POINTS] = 1, y[EFFECT_POINTS] = 0;
    for (int i = 0; i <= EFFECT_POINTS; i++) {
        for (int j = i; j <= EFFECT_POINTS; j++) {
            if (r < x[i] - 1e-9 || r > x[j] + 1e-9) continue;
            double w = i < j ? (r - x[i]) / (x[j] - x[i]) : 0;
            low = fmin(low, y[i] + w * (y[j] - y[i]));
        }
    }
    return low;
}

// No shares on a lattice have a lower sum of effects than those that are chosen.
static void test_allocation(void) {
    static const int sizes[][4] = {{0, 1, 2, 3}, {0, 2, 3, 6}};
    uint64_t seed = 3;
    for (int i = 0; i < 60; i++) {
        Effects e = {.n = 3};
        memcpy(e.first, sizes[i % 2], sizeof sizes[0]);
        for (int g = 0; g < 3; g++) {
            double y = 0, big = (double)(random_next(&seed) % 1000) / 500;
            for (int j = EFFECT_POINTS - 1; j >= 0; j--)
                e.effect[g][j] = y += big * (double)(random_next(&seed) % 1000) / 1000;
        }
        int n = e.first[3], total = n + i % 49 * n;  // in steps of .02, of all layers
        double share[3], best = INFINITY, sum = 0, pairs = 0;
        effects_share(&e, total * 0.02 / n, share);
        for (int g = 0; g < 3; g++) {
            CHECK(share[g] >= 0.02 - 1e-7 && share[g] <= 1 + 1e-9);
            pairs += share[g] * (e.first[g + 1] - e.first[g]), sum += hull(&e, g, share[g]);
        }
        CHECK_NEAR(pairs, total * 0.02, 1e-6);
        for (int a = 1; a <= 50; a++) {
            for (int b = 1; b <= 50; b++) {
                int rest = total - a * e.first[1] - b * (e.first[2] - e.first[1]);
                double c = rest * 0.02 / (e.first[3] - e.first[2]);
                if (c < 0.02 - 1e-9 || c > 1 + 1e-9) continue;
                best = fmin(best, hull(&e, 0, a * 0.02) + hull(&e, 1, b * 0.02) + hull(&e, 2, c));
            }
        }
        CHECK(sum <= best + 1e-6);
    }
    // A layer that matters gets what the other does not need; below the first ratio all are alike.
    Effects e = {.first = {0, 1, 2}, .n = 2, .effect = {{0}, {2, 1.5, 1, 0.7, 0.4}}};
    double share[2];
    effects_share(&e, 0.3, share);
    CHECK_NEAR(share[0], 0.02, 1e-6), CHECK_NEAR(share[1], 0.58, 1e-6);
    effects_share(&e, 0.01, share);
    CHECK_NEAR(share[0], 0.01, 1e-6), CHECK_NEAR(share[1], 0.01, 1e-6);
    e = effects_groups(30);
    CHECK(e.n == EFFECT_GROUPS && e.first[0] == 0 && e.first[e.n] == 30);
    for (int g = 0; g < e.n; g++)
        CHECK(e.first[g + 1] - e.first[g] >= 3 && e.first[g + 1] - e.first[g] <= 4);
}

static void test_pays(void) {
    double less[4][2] = {{1, 0.5}, {1, 0.6}, {1, 0.7}, {1, 1.1}};
    double little[4][2] = {{1, 0.85}, {1, 0.8}, {1, 0.75}, {1, 0.8}};
    double one[4][2] = {{9, 0.5}, {1, 1.1}, {1, 1.1}, {1, 0.9}};
    CHECK(effects_pay(less, 4) && !effects_pay(little, 4) && !effects_pay(one, 4));
    CHECK(!effects_pay(less, 0));
}

// Groups get what effects_share says, and inside a group heads keep what they kept where the group
// had as much.
static void test_moved(const Profile *p) {
    int n_heads = p->n_layers * p->n_kv_heads;
    Effects e = effects_groups(p->n_layers);
    float *share = malloc((size_t)p->n_ratios * n_heads * sizeof *share);
    double group[EFFECT_GROUPS], *at = malloc(n_heads * sizeof *at);
    for (int g = 0; g < e.n; g++)
        for (int i = 0; i < EFFECT_POINTS; i++) e.effect[g][i] = (g + 1) * (1 - effect_ratio[i]);
    CHECK(effects_move(&e, p, share, err) == 0);
    for (int i = 0; i < p->n_ratios; i++) {
        effects_share(&e, p->ratio[i], group);
        for (int g = 0; g < e.n; g++) {
            double sum = 0;
            for (int h = 0; h < p->n_kv_heads; h++)
                sum += share[i * n_heads + g * p->n_kv_heads + h];
            CHECK_NEAR(sum / p->n_kv_heads, group[g], 1e-5);
        }
    }
    for (int i = 1; i < 100; i++) {  // one group of all layers: p's own
        Effects all = {.first = {0, p->n_layers}, .n = 1};
        profile_shares(p, p->ratio[i % p->n_ratios], at);
        double mean = 0;
        for (int h = 0; h < n_heads; h++) mean += at[h] / n_heads;
        float ratio = (float)mean;
        Profile here = *p;
        here.ratio = &ratio, here.n_ratios = 1;
        here.share = p->share + (size_t)(i % p->n_ratios) * n_heads;
        CHECK(effects_move(&all, &here, share, err) == 0);
        for (int h = 0; h < n_heads; h++) CHECK_NEAR(share[h], at[h], 1e-5);
    }
    free(share), free(at);
}

// Layers 1 and 4 of the fixture are evicted, the others have a window; those in `silent` add
// nothing to what the model says.
static void make_hybrid(Fixture *f, const char *silent) {
    static const int window[16] = {8, 0, 8, 8, 0, 8, 8};
    static const float zero[64 * 128];
    const Config *m = &f->model.config;
    CHECK(m->n_layers == 7 && m->dim * m->q_dim <= 64 * 128);
    f->model.config.window = f->kv.shape.window = window;
    for (const char *l = silent; *l; l++) f->model.layers[*l - '0'].wo.data = (const uint8_t *)zero;
}

// Calls of progress, and the one at which the work is stopped.
static long n_steps, stop_at;

static int count_step(void *arg, const char *what, long done, long total) {
    (void)arg, (void)what;
    if (!CHECK(done <= total)) printf("%ld of %ld\n", done, total);
    if (++n_steps != stop_at) return 0;
    fail(err, "interrupted");
    return 1;
}

static int most_tokens;  // as in Calibrate, of the following

static int calibrate_many(Fixture *f, const char *to, bool in, CalibrateResult *r) {
    static const char *const texts[] = {
        "The miller kept three dogs and a heron that would not leave; he fed all of them.\n",
        "First the dough is folded, then it rests, then it is folded again until it holds.\n",
        "def total(xs):\n    s = 0\n    for x in xs:\n        s += x\n    return s  # of all\n",
        "Seven boats left the harbour on Monday, and by Thursday six of them were back.\n",
        "Mara asked for the key. Nobody had it. The door, it turned out, was open anyway.\n"};
    Ids prefix = {0};
    Buffer text = {0};
    for (int i = 0; i < 5; i++) {
        for (int j = 0; j < 2; j++) buffer_add(&text, texts[i], strlen(texts[i]));
        buffer_add(&text, "=====\n", 6);
    }
    CHECK(tokenizer_encode(f->tok, "Read this. ", 11, TOK_BOS, &prefix) == 0);
    Calibrate c = {.context = {.state = &f->state,
                               .kv = &f->kv,
                               .tok = f->tok,
                               .chunk = 100,
                               .local = true,
                               .postfix = tokenizer_chat(f->tok)->kvzip_postfix},
                   .prefix = &prefix,
                   .lambda = LAMBDA,
                   .path = to,
                   .into = in,
                   .most_tokens = most_tokens,
                   .progress = count_step};
    n_steps = 0;
    int rc = calibrate_run(&c, text.s, text.n, r, err);
    ids_free(&prefix);
    free(text.s);
    return rc;
}

static uint64_t file_hash(const char *name) {
    uint64_t h = 1;
    FILE *in = fopen(name, "rb");
    for (int c; in && (c = fgetc(in)) != EOF;) h = (h ^ (uint64_t)c) * 0x100000001b3u;
    CHECK(in != NULL);
    if (in) fclose(in);
    return h;
}

// A layer that adds nothing keeps nearly nothing; where no layer adds anything KVzip's shares stay,
// and nothing is said. The same file for any number of threads.
static void test_trial(void) {
    static const char *const silent[] = {"1", "4", "14"};
    for (int i = 0; i < 3; i++) {
        uint64_t hash[2];
        for (int j = 0; j < 2; j++) {
            Fixture f;
            CalibrateResult r;
            Profile p;
            if (!fixture_open(&f, "gemma3", "gemma3.kvz", KV_F32, j == 0 ? 1 : 3)) return;
            make_hybrid(&f, silent[i]);
            CHECK(calibrate_many(&f, path, false, &r) == 0);
            CHECK(r.trial.n_texts == 2 && r.trial.used == (i < 2));
            CHECK(i == 2 ? r.trial.kl[0] == 0 : r.trial.kl[1] < 0.75 * r.trial.kl[0]);
            if (!CHECK(profile_open(&p, &f.model, path, err) == 0)) printf("%s\n", err), exit(1);
            const char *said = tensors_meta(&p.file, PROFILE_LAYER_SHARES);
            CHECK((said != NULL) == (i < 2));
            if (said) CHECK(strncmp(said, "by effect: held-out KL ", 23) == 0);
            int at = 0;
            while (p.ratio[at] != 0.3f) at++;
            double share[2] = {0};
            for (int h = 0; h < 4; h++) share[h / 2] += p.share[at * 4 + h] / 2;
            if (i < 2) CHECK_NEAR(share[i], 0.02, 0.005), CHECK_NEAR(share[1 - i], 0.58, 0.005);
            hash[j] = file_hash(path);
            profile_close(&p);
            fixture_close(&f);
        }
        CHECK(hash[0] == hash[1]);
    }
    remove(path);
}

// Parts that are cut try nothing: shares stay KVzip's.
static void test_no_trial(void) {
    Fixture f;
    CalibrateResult all, cut;
    Profile p;
    if (!fixture_open(&f, "gemma3", "gemma3.kvz", KV_F32, 2)) return;
    make_hybrid(&f, "1");
    CHECK(calibrate_many(&f, path, false, &all) == 0 && all.trial.used);
    most_tokens = (all.n_tokens - all.longest) * 9 / 10;
    CHECK(calibrate_many(&f, path, false, &cut) == 0 && cut.n_tokens < all.n_tokens);
    CHECK(cut.n_texts == all.n_texts && cut.trial.n_texts == 0 && !cut.trial.used);
    if (!CHECK(profile_open(&p, &f.model, path, err) == 0)) printf("%s\n", err), exit(1);
    CHECK(tensors_meta(&p.file, PROFILE_LAYER_SHARES) == NULL);
    profile_close(&p);
    most_tokens = 0;
    fixture_close(&f);
    remove(path);
}

// The state of the test's own, for one call: 0, or -1 where it was stopped at call `stop` of
// progress.
static int calibrate_once(KVType type, long stop, CalibrateResult *r) {
    Fixture f;
    if (!fixture_open(&f, "gemma3", "gemma3.kvz", type, 2)) return -1;
    stop_at = stop;
    int rc = calibrate_many(&f, path, false, r);
    stop_at = 0;
    fixture_close(&f);
    return rc;
}

// Work that is stopped goes on where it was, to the same bits; what belongs to other work, or is no
// such file, is not read, and a stranger's file is not replaced.
static void test_unfinished(bool quick) {
    CalibrateResult r;
    char unfinished[300];
    snprintf(unfinished, sizeof unfinished, "%s.unfinished", path);
    CHECK(calibrate_once(KV_F32, 0, &r) == 0 && r.n_found == 0);
    long all = n_steps;
    uint64_t want = file_hash(path);
    CHECK(fopen(unfinished, "rb") == NULL);
    for (int part = 1; part < 8; part += quick ? 3 : 1) {
        remove(path);
        CHECK(calibrate_once(KV_F32, all * part / 8, &r) == -1 && fopen(path, "rb") == NULL);
        CHECK(calibrate_once(KV_F32, 0, &r) == 0);
        CHECK(r.n_found <= r.n_texts && (part < 4 || r.n_found > 1));
        CHECK(n_steps < all - all * (part - 3) / 8 && file_hash(path) == want);
        CHECK(fopen(unfinished, "rb") == NULL);
    }
    CHECK(calibrate_once(KV_F32, all / 2, &r) == -1);
    CHECK(calibrate_once(KV_F16, 0, &r) == 0 && r.n_found == 0);
    CHECK(calibrate_once(KV_F32, all / 2, &r) == -1);
    FILE *f = fopen(unfinished, "r+b");
    CHECK(f && fseek(f, -64, SEEK_END) == 0 && ftruncate(fileno(f), ftell(f)) == 0);
    if (f) fclose(f);
    CHECK(calibrate_once(KV_F32, 0, &r) == -1 && strstr(err, unfinished));
    f = fopen(unfinished, "wb");
    CHECK(f && fputs("a letter", f) >= 0 && fclose(f) == 0);
    uint64_t letter = file_hash(unfinished);
    CHECK(calibrate_once(KV_F32, 0, &r) == -1 && file_hash(unfinished) == letter);
    remove(unfinished), remove(path);
}

// A model that carries its profile says so as well, and no longer once that is another one.
static void test_trial_into(void) {
    static const char *const silent[] = {"1", "14"};
    char weights[96] = "gemma3.kvz";
    for (int i = 0; i < 2; i++) {
        Fixture f;
        CalibrateResult r;
        Model m;
        if (!fixture_open(&f, "gemma3", weights, KV_F32, 2)) return;
        make_hybrid(&f, silent[i]);
        CHECK(calibrate_many(&f, into, true, &r) == 0 && model_open(&m, into, err) == 0);
        CHECK_STR(m.fingerprint, f.model.fingerprint);
        CHECK((tensors_meta(&m.file, PROFILE_LAYER_SHARES) != NULL) == (i == 0));
        model_close(&m);
        fixture_close(&f);
        snprintf(weights, sizeof weights, "../../%s", into);
    }
    remove(into);
}

// Logits [vocab_size] after one more token, in a new array.
static float *logits_after(Fixture *f, int seq, int token) {
    size_t bytes = f->model.config.vocab_size * sizeof(float);
    CHECK(forward(&f->state, &f->kv, &(Row){seq, token, true}, 1, err) == 0);
    return memcpy(malloc(bytes), f->state.logits, bytes);
}

static double divergence(const float *full, const float *x, int n) {
    double a = 0, b = 0, sum = 0;
    for (int i = 0; i < n; i++) a += exp(full[i]), b += exp(x[i]);
    for (int i = 0; i < n; i++) sum += exp(full[i]) / a * (full[i] - log(a) - x[i] + log(b));
    return sum;
}

// Mean KL of `seq` from c's words while the pieces at the two ends are repeated, token by token.
static double plain_words(Fixture *f, const Context *c, int seq) {
    const int at[] = {EFFECT_SPAN, c->n_ctx - EFFECT_SPAN};
    double sum = 0;
    for (int p = 0; p < 2; p++) {
        Ids in = {0};
        int full = kvcache_fork(&f->kv, c->seq, err), fork = kvcache_fork(&f->kv, seq, err);
        CHECK(kvzip_repeat_input(c, at[p], at[p] + EFFECT_SPAN, &in) == 0);
        for (int i = 0; i < in.n - 1; i++) {
            float *a = logits_after(f, full, in.id[i]), *b = logits_after(f, fork, in.id[i]);
            if (i + 1 >= in.n - EFFECT_SPAN)
                sum += divergence(a, b, f->model.config.vocab_size) / (2 * EFFECT_SPAN);
            free(a), free(b);
        }
        kvcache_drop(&f->kv, full), kvcache_drop(&f->kv, fork);
        ids_free(&in);
    }
    return sum;
}

// A fork that is whole says the same to the bit, one that lacks pairs what it says plainly, alone
// or among as many as are more than one call takes.
static void test_words(Fixture *f) {
    enum { MANY = EFFECT_BATCH + 2 };
    int ids[1024], seq[2], many[MANY];
    double kl[2], kl_many[MANY];
    Context c = fixture_context(f, ids, 64);
    CHECK(trial_fits(c.n_ctx) && context_read(&c, err) == 0);
    Trial t = {.c = &c, .seq = seq, .n = 2, .kl = kl};
    for (int i = 0; i < 2; i++) seq[i] = kvcache_fork(&f->kv, c.seq, err);
    uint8_t *keep = calloc(context_scores(&c), 1);
    CHECK(kvcache_evict(&f->kv, seq[1], c.n_prefix, c.n_ctx, keep, err) == 0);
    CHECK(trial_run(&t, err) == 0);
    CHECK(kl[0] == 0 && kl[1] > 0 && t.fed > 0);
    CHECK_NEAR(plain_words(f, &c, seq[1]), kl[1], 1e-3 * kl[1] + 1e-6);
    for (int i = 0; i < MANY; i++) many[i] = seq[i % 3 == 1];
    t = (Trial){.c = &c, .seq = many, .n = MANY, .kl = kl_many};
    CHECK(trial_run(&t, err) == 0);
    for (int i = 0; i < MANY; i++) CHECK(kl_many[i] == kl[i % 3 == 1]);
    for (int i = 0; i < 2; i++) kvcache_drop(&f->kv, seq[i]);
    kvcache_drop(&f->kv, c.seq);
    free(keep);
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
    test_allocation();
    test_pays();
    test_trial();
    test_no_trial();
    test_trial_into();
    test_unfinished(quick);
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
        test_moved(&p);
        profile_close(&p);
        test_words(&f);
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
