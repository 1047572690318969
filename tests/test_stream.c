// Evicting while tokens come: the scores of what is live are those of a whole context, a context
// that fits in one call keeps exactly the pairs that the usual way keeps, no head ever holds more
// than its budget, the window and a call's rows, a budget of everything changes no bit, and threads
// change none.
#include "policies/stream.h"
#include "fixture.h"

enum { CTX = 300 };

// A context of `n` ids, longer than the fixture's own, in a new sequence.
static Context long_context(Fixture *f, int *ids, int n, const char *policy, const char *level,
                            const char *set) {
    int own[1024];
    Context c = fixture_context(f, own, 64);
    int n_prefix = c.n_prefix, n_own = c.n_ctx;
    for (int i = 0; i < n_prefix + n; i++)
        ids[i] = i < n_prefix ? own[i] : own[n_prefix + (i - n_prefix) * 7 % n_own];
    c.ids = ids, c.n_ctx = n;
    CHECK(context_set(&c, policy_find(policy), level_find(level), set, err) == 0);
    return c;
}

static int n_heads(const Fixture *f) {
    return kvcache_scored_layers(&f->kv.shape, NULL) * f->kv.shape.n_kv_heads;
}

static const KVHead *head_at(const Fixture *f, int seq, int h) {
    return kvcache_scored_head(&f->kv, seq, h);
}

static int position(const Fixture *f, int seq, int h, int t) {
    int n = f->kv.shape.n_kv_heads, layer = kvcache_scored_layer(&f->kv.shape, h / n);
    return kvcache_pair(&f->kv, (KVHeadAt){seq, layer, h % n}, t, NULL, NULL);
}

// Read in one call, then finished: the pairs that scoring and selecting the whole context keep.
static void test_one_call(Fixture *f, const Policy *p, const char *set, const char *level,
                          double ratio) {
    int ids[1024];
    Context c = long_context(f, ids, CTX, p->name, level, set);
    size_t n = context_scores(&c);
    float *score = malloc(n * sizeof *score);
    uint8_t *keep = malloc(n);
    CHECK(context_score(&c, p, score, err) == 0);
    long kept = context_select(&c, score, ratio, keep, err);
    kvcache_drop(&f->kv, c.seq);
    c.seq = kvcache_new(&f->kv, err);
    Stream s;
    CHECK(stream_open(&s, &c, ratio, 0, 10, err) == 0);
    CHECK(context_read(&c, err) == 0);
    CHECK(stream_finish(&s, err) == kept);
    for (int h = 0; h < n_heads(f); h++) {
        const KVHead *head = head_at(f, c.seq, h);
        int t = c.n_prefix;
        for (int i = 0; i < CTX; i++) {
            if (!keep[(size_t)h * CTX + i]) continue;
            CHECK(t < head->len && position(f, c.seq, h, t) == c.n_prefix + i);
            t++;
        }
        CHECK(t == head->len);
    }
    stream_close(&s);
    kvcache_drop(&f->kv, c.seq);
    free(score), free(keep);
}

// Calls of 32 rows: lengths, order and the prefix at each step and at the end.
static void test_bounds(Fixture *f, const Policy *p, const char *set, const char *level,
                        long budget) {
    int ids[1024], window = 20, rows = 32, per_head[64];
    Context c = long_context(f, ids, CTX, p->name, level, set);
    bool own_budget = level_find(level)->pool == LEVEL_BUDGET;
    Stream s;
    f->state.max_rows = rows;
    CHECK(stream_open(&s, &c, 0, budget, window, err) == 0);
    for (int done = 0; done < c.n_prefix + CTX;) {
        Row row[32];
        int m = c.n_prefix + CTX - done < rows ? c.n_prefix + CTX - done : rows;
        for (int i = 0; i < m; i++) row[i] = (Row){c.seq, ids[done + i], false};
        CHECK(forward(&f->state, &f->kv, row, m, err) == 0 && stream_step(&s, err) == 0);
        done += m;
        long all = 0;
        for (int h = 0; h < n_heads(f); h++) {
            const KVHead *head = head_at(f, c.seq, h);
            all += head->len - c.n_prefix;
            for (int t = 0; t < head->len; t++) {
                int pos = position(f, c.seq, h, t);
                CHECK(t < c.n_prefix ? pos == t : pos > position(f, c.seq, h, t - 1));
            }
            CHECK(position(f, c.seq, h, head->len - 1) == done - 1);
        }
        CHECK(all <= n_heads(f) * (budget + window + PAGE + rows));
    }
    CHECK(f->kv.seqs[c.seq].next_pos == c.n_prefix + CTX);
    long left = stream_finish(&s, err);
    CHECK(left >= 0 && left <= n_heads(f) * budget && c.n_ctx == CTX);
    if (own_budget) CHECK(c.level->budget(&c, (double)budget / CTX, per_head, err) == 0);
    if (!own_budget) CHECK(left == n_heads(f) * budget);
    for (int h = 0; h < n_heads(f) && own_budget; h++)
        CHECK(head_at(f, c.seq, h)->len - c.n_prefix <= per_head[h]);
    stream_close(&s), stream_close(&s);
    kvcache_drop(&f->kv, c.seq);
    f->state.max_rows = MAX_ROWS;
}

// Logits of the last token after reading, evicting on the way, with `threads`.
static void read_logits(Fixture *f, const Policy *p, double ratio, bool streams, int threads,
                        float *logits) {
    int ids[1024];
    ThreadPool *two = f->pool, *pool = pool_open(threads);
    f->pool = f->state.pool = f->kv.pool = pool;
    f->state.max_rows = 48;
    Context c = long_context(f, ids, CTX, p->name, f->profile.n_ratios ? "profile" : "pair", NULL);
    Stream s = {0};
    if (streams) {
        CHECK(stream_open(&s, &c, ratio, 0, 16, err) == 0);
        c.after = stream_after, c.after_arg = &s;
    }
    CHECK(context_read(&c, err) == 0);
    Row last = {c.seq, ids[3], true};
    CHECK(forward(&f->state, &f->kv, &last, 1, err) == 0);
    memcpy(logits, f->state.logits, (size_t)f->model.config.vocab_size * sizeof *logits);
    stream_close(&s);
    kvcache_drop(&f->kv, c.seq);
    f->state.max_rows = MAX_ROWS;
    f->pool = f->state.pool = f->kv.pool = two;
    pool_close(pool);
}

static void test_bits(Fixture *f, const Policy *p) {
    size_t bytes = (size_t)f->model.config.vocab_size * sizeof(float);
    float *a = malloc(bytes), *b = malloc(bytes);
    read_logits(f, p, 1, false, 2, a), read_logits(f, p, 1, true, 2, b);
    CHECK(memcmp(a, b, bytes) == 0);
    read_logits(f, p, 0.3, true, 1, a), read_logits(f, p, 0.3, true, 3, b);
    CHECK(memcmp(a, b, bytes) == 0);
    read_logits(f, p, 1, false, 2, b);
    CHECK(memcmp(a, b, bytes) != 0);  // something was evicted
    free(a), free(b);
}

// A long text, token by token: after the first pages neither lists nor memory grow, so that a step
// reads as many pages at its end as at its beginning.
static void test_decoding(Fixture *f, const char *policy) {
    enum { TOKENS = 2000, BUDGET = 64, WINDOW = 32, WARM = 300 };
    int ids[1024], longest = 0;
    Context c = long_context(f, ids, 32, policy, "uniform", NULL);
    Stream s;
    size_t bytes = 0, room = 0;
    c.n_prefix = 4, c.n_ctx = 0;
    CHECK(stream_open(&s, &c, 0, BUDGET, WINDOW, err) == 0);
    for (int i = 0; i < TOKENS; i++) {
        Row row = {c.seq, ids[i * i % 31], false};
        CHECK(forward(&f->state, &f->kv, &row, 1, err) == 0 && stream_step(&s, err) == 0);
        size_t all = 0, now_bytes = kvcache_bytes(&f->kv, c.seq);
        for (int h = 0; h < n_heads(f); h++) {
            int len = head_at(f, c.seq, h)->len;
            all += (size_t)s.room[h];
            longest = len > longest ? len : longest;
        }
        if (i < WARM) bytes = now_bytes > bytes ? now_bytes : bytes, room = all;
        CHECK(now_bytes <= bytes && (i < WARM || all == room));
    }
    CHECK(longest <= 4 + BUDGET + WINDOW + PAGE);
    CHECK(f->kv.seqs[c.seq].next_pos == TOKENS);
    long left = stream_finish(&s, err);  // shares are rounded down
    CHECK(left <= n_heads(f) * BUDGET && left >= n_heads(f) * (BUDGET - 1));
    stream_close(&s);
    kvcache_drop(&f->kv, c.seq);
}

static void test_refused(Fixture *f) {
    int ids[1024];
    Stream s;
    Context c = long_context(f, ids, CTX, "snapkv", "pair", NULL);
    CHECK(stream_open(&s, &c, 0.3, 0, 16, err) == -1);
    CHECK_STR(err,
              "policy snapkv looks back at the whole context: it cannot evict before all of it "
              "is there");
    kvcache_drop(&f->kv, c.seq);
    c = long_context(f, ids, CTX, "knorm", "head", NULL);
    CHECK(stream_open(&s, &c, 0.3, 0, 16, err) == 0 && context_read(&c, err) == 0);
    CHECK(stream_finish(&s, err) == -1);
    stream_close(&s);
    kvcache_drop(&f->kv, c.seq);
    c = long_context(f, ids, CTX, "kvzap", "pair", NULL);
    c.profile = NULL;
    CHECK(stream_open(&s, &c, 0.3, 0, 16, err) == -1);
    kvcache_drop(&f->kv, c.seq);
}

int main(int argc, char **argv) {
    static const char *const families[] = {"smol", "qwen3", "gemma3"};
    static const char *const by[] = {"pair", "layer", "uniform", "profile", "token"};
    bool quick = getenv("QUICK") != NULL;
    kernels_init(argc > 1 ? argv[1] : NULL);
    for (int i = 0; i < (quick ? 1 : 3); i++) {
        Fixture f;
        char weights[64];
        snprintf(weights, sizeof weights, "%s.kvz", families[i]);
        if (!fixture_open(&f, families[i], weights, KV_F32, 2)) continue;
        fixture_profile(&f);
        for (const Policy *p = policies; p->name; p++) {
            if (!policy_is_live(p) || (quick && strcmp(p->name, "expected") != 0)) continue;
            for (int l = 0; l < 5; l++) {
                test_one_call(&f, p, NULL, by[l], 0.3);
                test_bounds(&f, p, NULL, by[l], 40);
            }
            test_one_call(&f, p, "newest=10,least=0.01", "threshold", 0.3);
            test_bits(&f, p);
        }
        for (int l = 0; l < 5; l++) {
            test_one_call(&f, policy_find("kvzap"), "expected=1", by[l], 0.3);
            test_bounds(&f, policy_find("kvzap"), "expected=0.5", by[l], 40);
        }
        test_bounds(&f, policy_find("expected"), "sink=5000", "layer", 40);  // more than there are
        if (i == 0) {
            static const char *const decode[] = {"h2o",     "tova",         "scissorhands",
                                                 "keydiff", "triattention", "expected"};
            for (int d = 0; d < 6; d++) test_decoding(&f, decode[d]);
        }
        test_refused(&f);
        fixture_close(&f);
    }
    return test_end("test_stream");
}
