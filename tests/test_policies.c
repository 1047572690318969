// The methods against the reference: for each tiny model the scores of kvpress, its keep sets, its
// budgets. Then what every row of the two tables promises: real numbers for any context, the same
// bits for any number of threads, the same scores for any block size, the exact count at any ratio;
// and what --set refuses.
#include "fixture.h"

static int n_scored(const Fixture *f) { return kvcache_scored_layers(&f->kv.shape, NULL); }

// The fixture's prefix and context, with the first n_prefix ids protected. ids [1024]
static Context whole_context(Fixture *f, int *ids, int n_prefix) {
    Context c = fixture_context(f, ids, 64);
    c.n_ctx += c.n_prefix - n_prefix, c.n_prefix = n_prefix;
    return c;
}

// What methods that need a question are asked.
static const int question[] = {11, 5, 42, 17, 8};

static float *scores_of(Context *c, const char *policy, const char *set) {
    float *score = malloc((context_scores(c) + 1) * sizeof *score);
    CHECK(context_set(c, policy_find(policy), level_find("pair"), set, err) == 0);
    if (c->policy->asks >= ASKS_ALWAYS) c->question = question, c->n_question = 5;
    if (!CHECK(context_score(c, c->policy, score, err) == 0)) printf("%s: %s\n", policy, err);
    kvcache_drop(c->kv, c->seq);
    return score;
}

// ---- the reference's values ----

static void check_scores(const Fixture *f, const char *policy, const float *have) {
    char name[32];
    snprintf(name, sizeof name, "base.%s", policy);
    const Tensor *t = want(f, name);
    const float *x = t->data;
    double worst = 0, worst_share = 0;  // the share of the tolerance 1e-4 + 1e-3 |x|
    for (size_t i = 0; i < t->bytes / sizeof *x; i++) {
        double d = isnan(have[i]) ? INFINITY : fabs((double)have[i] - x[i]);
        worst = fmax(worst, d), worst_share = fmax(worst_share, d / (1e-4 + 1e-3 * fabs(x[i])));
    }
    if (!CHECK(worst_share <= 1)) printf("%s: %s is %g off\n", f->name, name, worst);
    if (getenv("VERBOSE"))
        printf("%-8s %-14s %.1e, %4.1f%% of the tolerance\n", f->name, name, worst,
               100 * worst_share);
}

static void test_scores(Fixture *f) {
    static const struct {
        const char *policy, *set;
    } all[] = {{"snapkv", "window=16,kernel=5"},
               {"tova", NULL},
               {"observed", NULL},
               {"knorm", NULL},
               {"keydiff", NULL},
               {"expected", NULL}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        int ids[1024];
        Context c = whole_context(f, ids, 0);
        CHECK(context_scores(&c) * sizeof(float) == want(f, "base.knorm")->bytes);
        float *score = scores_of(&c, all[i].policy, all[i].set);
        check_scores(f, all[i].policy, score);
        free(score);
    }
}

// A protected prefix changes what is scored, not the scores: its pairs still take part in sums and
// softmaxes.
static void test_prefix(Fixture *f) {
    static const char *const same[] = {"tova",    "observed", "knorm",
                                       "keydiff", "expected", "streaming"};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        int ids[1024];
        Context none = whole_context(f, ids, 0), some = whole_context(f, ids, 7);
        float *a = scores_of(&none, same[i], NULL), *b = scores_of(&some, same[i], NULL);
        for (size_t h = 0; h < context_scores(&some) / some.n_ctx; h++) {
            const float *all = a + h * none.n_ctx + 7, *ctx = b + h * some.n_ctx;
            int n = some.n_ctx -
                    (strcmp(same[i], "tova") == 0);  // its protected pair depends on what competes
            CHECK_NEAR(far(ctx, all, (size_t)n), 0, 1e-5);
        }
        free(a), free(b);
    }
}

static void check_keep(const Fixture *f, const char *name, int percent, const uint8_t *keep,
                       size_t rows) {
    char full[32];
    snprintf(full, sizeof full, "base.%s.r%d", name, percent);
    const Tensor *t = want(f, full);
    for (size_t i = 0; i < rows; i++) {
        if (!CHECK(memcmp(keep + i * t->bytes, t->data, t->bytes) == 0))
            printf("%s: %s differs\n", f->name, full);
    }
}

static void test_streaming(Fixture *f, int percent) {
    int ids[1024];
    Context c = whole_context(f, ids, 0);
    float *score = scores_of(&c, "streaming", NULL);
    uint8_t *keep = malloc(context_scores(&c));
    CHECK(context_set(&c, policy_find("streaming"), level_find("uniform"), NULL, err) == 0);
    CHECK(context_select(&c, score, percent / 100.0, keep, err) > 0);
    check_keep(f, "streaming", percent, keep, context_scores(&c) / c.n_ctx);
    free(score), free(keep);
}

// Ada-KV keeps n_kv_heads * floor(n * ratio) pairs of a layer, ours floor(n_kv_heads * n * ratio):
// the same when n * ratio is whole.
static void test_adakv(Fixture *f, int percent) {
    int ids[1024];
    Context c = whole_context(f, ids, 0);
    double ratio = (c.n_ctx * percent / 100 + 1e-6) / c.n_ctx;
    uint8_t *keep = malloc(context_scores(&c));
    CHECK(context_set(&c, policy_find("snapkv"), level_find("layer"), "safeguard=0.2", err) == 0);
    CHECK(context_select(&c, want(f, "base.snapkv")->data, ratio, keep, err) > 0);
    check_keep(f, "adakv", percent, keep, 1);
    kvcache_drop(&f->kv, c.seq);
    free(keep);
}

static void test_pyramid(Fixture *f, int percent) {
    char name[32];
    snprintf(name, sizeof name, "base.pyramid.r%d", percent);
    const Tensor *t = want(f, name);
    int ids[1024], lengths[4] = {0, 256, 1024, 4096}, n_kv_heads = f->kv.shape.n_kv_heads;
    Context c = whole_context(f, ids, 0);
    lengths[0] = c.n_ctx;
    if (n_scored(f) != f->model.config.n_layers)
        return;  // the fixture counts layers that never evict
    for (int i = 0; i < 4; i++) {
        c.n_ctx = lengths[i];
        size_t n = context_scores(&c);
        float *score = calloc(n, sizeof *score);
        uint8_t *keep = malloc(n);
        CHECK(context_set(&c, policy_find("snapkv"), level_find("pyramid"), "window=16,beta=4",
                          err) == 0);
        CHECK(context_select(&c, score, percent / 100.0, keep, err) > 0);
        for (int h = 0; h < n_scored(f) * n_kv_heads; h++) {
            int kept = 0;
            for (int j = 0; j < c.n_ctx; j++) kept += keep[(size_t)h * c.n_ctx + j];
            CHECK(kept == ((const int *)t->data)[i * n_scored(f) + h / n_kv_heads]);
        }
        free(score), free(keep);
    }
    kvcache_drop(&f->kv, c.seq);
}

// ---- what every method promises ----

// Contexts of no token, one, a few and many, with and without a prefix: real numbers, and a count
// that is exact.
static void test_lengths(Fixture *f, const Policy *p) {
    for (int i = 0; i < 12; i++) {
        int ids[1024], n_ctx = (int[]){0, 1, 2, 5, 17, 70}[i % 6];
        Context c = whole_context(f, ids, i < 6 ? 0 : 3);
        c.n_ctx = n_ctx;
        size_t n = context_scores(&c);
        float *score = scores_of(&c, p->name, NULL);
        for (size_t j = 0; j < n; j++) CHECK(!isnan(score[j]));
        uint8_t *keep = malloc(n + 1);
        for (const Level *l = levels; l->name; l++) {
            if (strcmp(l->name, "profile") == 0 && !c.profile) continue;
            CHECK(context_set(&c, p, l, NULL, err) == 0);
            long kept = context_select(&c, score, 0.3, keep, err);
            if (l->pool == LEVEL_PAIR || l->budget == level_find("profile")->budget)
                CHECK(kept == (long)((double)n * 0.3));
            CHECK(kept >= 0 && kept <= (long)n);
        }
        free(score), free(keep);
    }
}

// Blocks of 7 rows instead of 512; three threads instead of two.
static void test_blocks_and_threads(Fixture *f, const Policy *p) {
    int ids[1024];
    float *score[3];
    Context c = {0};
    for (int i = 0; i < 3; i++) {
        ThreadPool *two = f->pool, *three = i == 1 ? pool_open(3) : NULL;
        if (three) f->pool = f->state.pool = f->kv.pool = three;
        f->state.max_rows = i == 2 ? 7 : MAX_ROWS;
        c = fixture_context(f, ids, 64);
        score[i] = scores_of(&c, p->name, NULL);
        f->pool = f->state.pool = f->kv.pool = two;
        pool_close(three);
    }
    f->state.max_rows = MAX_ROWS;
    size_t n = context_scores(&c);
    CHECK(memcmp(score[0], score[1], n * sizeof *score[0]) == 0);
    if (!CHECK(far(score[2], score[0], n) < 1e-4))
        printf("%s: %g apart\n", p->name, far(score[2], score[0], n));
    for (int i = 0; i < 3; i++) free(score[i]);
}

// What must stay beats everything else in its layer, whatever the scores are.
static void test_protected(Fixture *f) {
    int ids[1024];
    Context c = whole_context(f, ids, 0);
    float *score = scores_of(&c, "snapkv", "window=20");
    for (size_t h = 0; h < context_scores(&c) / c.n_ctx; h++) {
        for (int t = 0; t < c.n_ctx - 20; t++)
            CHECK(score[h * c.n_ctx + t] < score[h * c.n_ctx + c.n_ctx - 1]);
    }
    free(score);
    c = whole_context(f, ids, 2);
    score = scores_of(&c, "expected", "sink=6");
    for (size_t h = 0; h < context_scores(&c) / c.n_ctx; h++) {
        for (int t = 4; t < c.n_ctx; t++) CHECK(score[h * c.n_ctx + t] < score[h * c.n_ctx + 3]);
    }
    free(score);
}

static void test_random(Fixture *f) {
    int ids[1024];
    Context c = fixture_context(f, ids, 64);
    float *score[3];
    static const char *const set[] = {"seed=3", "seed=3", "seed=4"};
    for (int i = 0; i < 3; i++) {
        c.seq = kvcache_new(&f->kv, err);
        score[i] = scores_of(&c, "random", set[i]);
    }
    size_t n = context_scores(&c);
    double mean = 0;
    for (size_t i = 0; i < n; i++)
        mean += score[0][i] / (double)n, CHECK(score[0][i] >= 0 && score[0][i] < 1);
    CHECK_NEAR(mean, 0.5, 0.05);
    CHECK(memcmp(score[0], score[1], n * sizeof(float)) == 0 &&
          memcmp(score[0], score[2], n * sizeof(float)) != 0);
    for (int i = 0; i < 3; i++) free(score[i]);
}

static void refuses(const char *policy, const char *level, const char *set, const char *says) {
    Context c = {0};
    CHECK(context_set(&c, policy_find(policy), level_find(level), set, err) == -1);
    CHECK_STR(err, says);
}

static void test_params(void) {
    Context c = {0};
    CHECK(policy_find("best") == NULL && level_find("best") == NULL);
    CHECK(context_set(&c, policy_find("snapkv"), level_find("pyramid"), "kernel=7,window=12",
                      err) == 0);
    CHECK(c.policy_param[0] == 12 && c.policy_param[1] == 7);  // window, kernel
    CHECK(c.level_param[0] == 20 &&
          c.level_param[1] == 12);  // beta keeps its default, window is shared
    CHECK(context_set(&c, policy_find("expected"), level_find("pair"), "epsilon=0.02", err) == 0 &&
          c.policy_param[2] == 0.02);
    refuses("kvzip", "pair", "x", "needs key=value,..");
    refuses("kvzip", "pair", "=3", "needs key=value,..");
    refuses("kvzip", "pair", "window=3", "policy kvzip and level pair have no parameter 'window'");
    refuses("snapkv", "pair", "window=", "window needs a whole number from 1 to 1e+06");
    refuses("snapkv", "pair", "window=3x", "window needs a whole number from 1 to 1e+06");
    refuses("snapkv", "pair", "window=3.5", "window needs a whole number from 1 to 1e+06");
    refuses("snapkv", "pair", "window=0", "window needs a whole number from 1 to 1e+06");
    refuses("expected", "pair", "epsilon=nan", "epsilon needs a number from 0 to 1");
}

// Where no level is set pairs of all heads compete, wherever that row stands.
static void test_no_level(Fixture *f) {
    int ids[1024];
    Context c = whole_context(f, ids, 0);
    float *score = scores_of(&c, "knorm", NULL);
    size_t n = context_scores(&c);
    uint8_t *none = malloc(n), *pair = malloc(n);
    CHECK(context_set(&c, policy_find("knorm"), level_find("pair"), NULL, err) == 0);
    long kept = context_select(&c, score, 0.3, pair, err);
    c.level = NULL;
    CHECK(context_select(&c, score, 0.3, none, err) == kept && memcmp(none, pair, n) == 0);
    free(score), free(none), free(pair);
}

// ---- a second document ----

// Scores of the fixture's context behind an earlier document: itself, or with `other` another one
// of that length. All of its pairs stay, or with `thin` fewer in some heads than in others: held
// [64].
static float *second_scores(Fixture *f, const char *policy, bool other, bool thin, int *held) {
    int ids[1024], earlier[1024];
    Context c = fixture_context(f, ids, 24);
    int n = c.n_ctx, n_heads = context_heads(&c);
    for (int i = 0; i < n; i++)
        earlier[i] = other ? (ids[c.n_prefix + i] + 7) % 500 + 3 : ids[c.n_prefix + i];
    Feed feed = {.seq = c.seq, .ids = ids, .n = c.n_prefix};
    CHECK(context_feed(&c, &feed, err) == 0);
    feed.ids = earlier, feed.n = n;
    CHECK(context_feed(&c, &feed, err) == 0);
    for (int h = 0; h < n_heads; h++) {
        uint8_t keep[1024];
        held[h] = 0;
        for (int t = 0; t < n; t++) held[h] += keep[t] = !thin || (t * 7 + h * 5) % 10 > h % 4 * 3;
        KVHeadAt at = {c.seq, kvcache_scored_layer(&f->kv.shape, h / f->kv.shape.n_kv_heads),
                       h % f->kv.shape.n_kv_heads};
        CHECK(kvcache_evict_head(&f->kv, at, (KVSpan){c.n_prefix, n}, keep, err) == 0);
    }
    c.held = held, c.n_held = n;
    return scores_of(&c, policy, NULL);
}

// What scores over all that is there takes an earlier document for a part of the prefix.
static void test_second_as_prefix(Fixture *f) {
    static const char *const same[] = {"snapkv", "observed", "tova",
                                       "knorm",  "keydiff",  "streaming"};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        int ids[1024], held[64];
        Context c = fixture_context(f, ids, 24);
        memcpy(ids + c.n_prefix + c.n_ctx, ids + c.n_prefix, c.n_ctx * sizeof *ids);
        c.n_prefix += c.n_ctx;
        float *a = scores_of(&c, same[i], NULL), *b = second_scores(f, same[i], false, false, held);
        for (size_t j = 0; strcmp(same[i], "streaming") != 0 && j < context_scores(&c); j++)
            CHECK_NEAR(b[j], a[j], 1e-4 + 1e-4 * fabs(a[j]));
        free(a), free(b);
    }
}

// KVzip's softmax knows the prefix, the chunk and the repeated text, not what other documents left:
// in the first layer, where a key depends on its token and position alone, scores of a document are
// the same to the bit behind any other one, whole or evicted.
static void test_second_alone(Fixture *f) {
    int held[64], ids[1024];
    Context c = fixture_context(f, ids, 24);
    size_t layer = (size_t)c.n_ctx * f->kv.shape.n_kv_heads, all = context_scores(&c);
    kvcache_drop(&f->kv, c.seq);
    for (int thin = 0; thin < 2; thin++) {
        float *a = second_scores(f, "kvzip", false, thin, held),
              *b = second_scores(f, "kvzip", true, thin, held);
        CHECK(memcmp(a, b, layer * sizeof *a) == 0);
        CHECK(memcmp(a, b, all * sizeof *a) != 0);  // later layers have read the other
        free(a), free(b);
        a = second_scores(f, "observed", false, thin, held);
        b = second_scores(f, "observed", true, thin, held);
        CHECK(memcmp(a, b, layer * sizeof *a) != 0);
        free(a), free(b);
    }
}

// Every policy gives real numbers behind heads of different lengths.
static void test_second_lengths(Fixture *f, const Policy *p) {
    int held[64], ids[1024];
    Context c = fixture_context(f, ids, 24);
    kvcache_drop(&f->kv, c.seq);
    float *score = second_scores(f, p->name, false, true, held);
    for (size_t i = 0; i < context_scores(&c); i++) CHECK(!isnan(score[i]));
    CHECK(held[0] != held[1]);
    free(score);
}

static void test_tables(Fixture *f) {
    for (const Policy *p = policies; p->name; p++) {
        CHECK(policy_find(p->name) == p && p->help);
        CHECK((p->head != NULL) + (p->live != NULL) + (p->score != NULL) == 1);
        test_lengths(f, p);
        test_blocks_and_threads(f, p);
        test_second_lengths(f, p);
    }
    for (const Level *l = levels; l->name; l++) CHECK(level_find(l->name) == l && l->help);
}

int main(int argc, char **argv) {
    static const char *const families[] = {"smol", "llama", "qwen2", "qwen3", "gemma3", "mistral"};
    bool quick = getenv("QUICK") != NULL;  // under valgrind: one family
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) {
        printf("test_policies: no %s on this machine\n", argv[1]);
        return 0;
    }
    test_params();
    for (size_t i = 0; i < (quick ? 1 : sizeof families / sizeof *families); i++) {
        Fixture f;
        char weights[64];
        snprintf(weights, sizeof weights, "%s.kvz", families[i]);
        if (!fixture_open(&f, families[i], weights, KV_F32, 2)) continue;
        if (strcmp(families[i], "mistral") == 0) {
            test_lengths(&f,
                         policy_find("expected"));  // every layer has a window: nothing to score
            window_off(&f);
        }
        test_scores(&f);
        test_prefix(&f);
        for (int percent = 30; percent <= 60; percent += 30) {
            test_streaming(&f, percent);
            test_adakv(&f, percent);
            test_pyramid(&f, percent);
        }
        if (i == 0) {
            fixture_profile(&f);
            test_tables(&f), test_protected(&f), test_random(&f), test_no_level(&f);
            test_second_as_prefix(&f), test_second_alone(&f);
        }
        fixture_close(&f);
    }
    return test_end("test_policies");
}
