// test_state.c: layers that keep a state instead of pairs, beside layers that attend: states go on
// bit for bit however a text is cut, through forks, marks, files and other caches; they are never
// cut back; KVzip scores the layers with pairs, by a repeat pass that leaves the state as it was.
// And layers that see a chunk alone, beside layers whose queries grow with their position: cut and
// scored in the same way.
#include "fixture.h"
#include "kvfile.h"
#include "policies/methods.h"

enum { VOCAB = 640 };

static void feed(Fixture *f, KVCache *kv, int seq, const int *ids, int n, float *out) {
    Row rows[MAX_ROWS];
    for (int i = 0; i < n; i++) rows[i] = (Row){seq, ids[i], true};
    if (!CHECK(forward(&f->state, kv, rows, n, err) == 0)) printf("%s\n", err);
    if (out) memcpy(out, f->state.logits, (size_t)n * VOCAB * sizeof *out);
}

static float *logits[2];  // [96][VOCAB] each

static bool same_logits(int n) {
    return memcmp(logits[0], logits[1], (size_t)n * VOCAB * sizeof **logits) == 0;
}

static size_t state_bytes(const Fixture *f) { return kvcache_state_bytes(&f->kv.shape); }

static bool same_state(const Fixture *f, const KVCache *a, int s, const KVCache *b, int t) {
    if (state_bytes(f) == 0) return !a->seqs[s].state && !b->seqs[t].state;
    return memcmp(a->seqs[s].state->x, b->seqs[t].state->x, state_bytes(f)) == 0;
}

// Runs of nine rows and more: the same bits, in state and logits, wherever the text is cut.
static void test_cuts(Fixture *f) {
    const int *ids = want(f, "prefill.ids")->data;
    int whole = kvcache_new(&f->kv, err);
    CHECK(!f->kv.seqs[whole].state);
    feed(f, &f->kv, whole, ids, 96, logits[0]);
    for (int cut = 9; cut <= 87; cut += 13) {
        int seq = kvcache_new(&f->kv, err);
        feed(f, &f->kv, seq, ids, cut, logits[1]);
        feed(f, &f->kv, seq, ids + cut, 96 - cut, logits[1] + (size_t)cut * VOCAB);
        CHECK(same_logits(96) && same_state(f, &f->kv, whole, &f->kv, seq));
        kvcache_drop(&f->kv, seq);
    }
    int single = kvcache_new(&f->kv, err);
    for (int i = 0; i < 96; i++) feed(f, &f->kv, single, ids + i, 1, logits[1] + (size_t)i * VOCAB);
    CHECK_NEAR(far(logits[0], logits[1], (size_t)96 * VOCAB), 0, 1e-4);
    kvcache_drop(&f->kv, single), kvcache_drop(&f->kv, whole);
}

// A fork shares the state until one of the two reads on; a mark brings it back, more than once.
static void test_marks(Fixture *f) {
    const int *ids = want(f, "prefill.ids")->data;
    int seq = kvcache_new(&f->kv, err);
    feed(f, &f->kv, seq, ids, 40, NULL);
    int mark = kvcache_mark(&f->kv, seq, err), fork = kvcache_fork(&f->kv, seq, err);
    CHECK(f->kv.seqs[mark].state == f->kv.seqs[seq].state && f->kv.seqs[seq].state->refs == 3);
    feed(f, &f->kv, fork, ids + 40, 20, logits[0]);
    CHECK(f->kv.seqs[seq].state->refs == 2 && !same_state(f, &f->kv, seq, &f->kv, fork));
    for (int pass = 0; pass < 3; pass++) {
        feed(f, &f->kv, seq, ids + 40, 20, logits[1]);
        CHECK(same_logits(20) && same_state(f, &f->kv, seq, &f->kv, fork));
        feed(f, &f->kv, seq, ids, 9 + pass, NULL);  // an answer that is forgotten
        CHECK(kvcache_rewind(&f->kv, seq, mark, err) == 0);
        CHECK(same_state(f, &f->kv, seq, &f->kv, mark) && f->kv.seqs[seq].next_pos == 40);
    }
    kvcache_drop(&f->kv, mark), kvcache_drop(&f->kv, fork);
    CHECK(f->kv.seqs[seq].state->refs == 1);
    kvcache_drop(&f->kv, seq);
}

// Back to a position is refused, and nothing has changed; so there is no room for drafts.
static void test_no_cut(Fixture *f) {
    const int *ids = want(f, "prefill.ids")->data;
    int seq = kvcache_new(&f->kv, err), fork;
    feed(f, &f->kv, seq, ids, 40, NULL);
    fork = kvcache_fork(&f->kv, seq, err);
    CHECK(kvcache_slack(&f->kv, seq) == 0);
    for (int pos = 0; pos < 40; pos += 13) CHECK(!kvcache_cut(&f->kv, seq, pos));
    CHECK(kvcache_cut(&f->kv, seq, 40) && f->kv.seqs[seq].next_pos == 40);
    feed(f, &f->kv, seq, ids + 40, 20, logits[0]);
    feed(f, &f->kv, fork, ids + 40, 20, logits[1]);
    CHECK(same_logits(20));
    kvcache_drop(&f->kv, seq), kvcache_drop(&f->kv, fork);
}

// Layers that keep a state have no lists and no pages; the bytes are those of the states.
static void test_bytes(Fixture *f) {
    const KVShape *shape = &f->kv.shape;
    const int *ids = want(f, "prefill.ids")->data;
    int seq = kvcache_new(&f->kv, err), pages = 0;
    feed(f, &f->kv, seq, ids, 70, NULL);
    CHECK(f->kv.n_heads == kvcache_scored_layers(shape, NULL) * shape->n_kv_heads);
    for (int i = 0; i < f->kv.n_heads; i++) {
        const KVHead *h = &f->kv.seqs[seq].head[i];
        CHECK(shape->window[f->kv.layer[i]] != NO_PAIRS && h->len == 70);
        pages += h->n_pages;
    }
    CHECK(pages == 2 * kvcache_scored_layers(shape, NULL) * shape->n_kv_heads);
    CHECK(kvcache_bytes(&f->kv, seq) > state_bytes(f) &&
          kvcache_window_bytes(shape, f->kv.types) == 0);
    kvcache_drop(&f->kv, seq);
}

// ---- files and other caches ----

static void damage(const char *path, const char *name, const void *bytes, size_t n) {
    TensorFile t;
    CHECK(tensors_open(&t, path, err) == 0);
    const Tensor *state = tensors_find(&t, name);
    long at = (long)((const uint8_t *)state->data - t.map);
    tensors_close(&t);
    FILE *file = fopen(path, "r+b");
    fseek(file, at, SEEK_SET);
    CHECK(fwrite(bytes, 1, n, file) == n);
    fclose(file);
}

static void test_file(Fixture *f) {
    char path[64];
    const int *ids = want(f, "prefill.ids")->data;
    KVModel model = {model_kv_shape(&f->model), f->model.fingerprint};
    KVInfo got, info = {.fingerprint = f->model.fingerprint,
                        .model = "tiny",
                        .policy = "kvzip",
                        .n_prefix = 10,
                        .n_ctx = 40,
                        .ratio = 1,
                        .ids = ids,
                        .n_ids = 50};
    KVCache back, other;
    test_path(path, "state.kvc");
    int seq = kvcache_new(&f->kv, err), empty = kvcache_new(&f->kv, err);
    feed(f, &f->kv, seq, ids, 50, NULL);
    CHECK(kvfile_save(&f->kv, seq, path, &info, err) == 0);
    CHECK(kvfile_load(&back, path, &model, f->pool, &got, err) == 0);
    CHECK(strcmp(tensors_meta(&back.file, "format"), "kvzip.c cache 5") == 0);
    CHECK(same_state(f, &f->kv, seq, &back, 0));
    CacheFacts facts;
    CHECK(kvfile_facts(&facts, &back.file, err) == 0 &&
          facts.state_bytes == (double)state_bytes(f));
    CHECK(facts.n_scored ==
          40.0 * kvcache_scored_layers(&model.shape, NULL) * f->model.config.n_kv_heads);
    for (int i = 0; i < facts.n_layers * facts.n_kv_heads; i++)
        CHECK(facts.kept_pairs[i] == (model.shape.window[i / facts.n_kv_heads] == 0 ? 40 : 0));
    kvfile_facts_free(&facts);

    CHECK(kvcache_open(&other, &model.shape, kvcache_both(KV_F32), f->pool, err) == 0);
    int taken = kvcache_take(&other, &back, 0, err);
    int mark = kvcache_mark(&back, 0, err);
    feed(f, &f->kv, seq, ids + 50, 40, logits[0]);
    for (int pass = 0; pass < 2; pass++) {
        feed(f, &back, 0, ids + 50, 40, logits[1]);
        CHECK(same_logits(40) && same_state(f, &f->kv, seq, &back, 0));
        CHECK(kvcache_rewind(&back, 0, mark, err) == 0);
    }
    kvcache_close(&back);
    feed(f, &other, taken, ids + 50, 40, logits[1]);
    CHECK(same_logits(40) && same_state(f, &f->kv, seq, &other, taken));
    kvcache_close(&other);

    const float broken = NAN;
    const int32_t pairs = 0;
    damage(path, "state", &broken, sizeof broken);
    CHECK(kvfile_load(&back, path, &model, NULL, &got, err) == -1 && strstr(err, "no number"));
    CHECK(kvfile_save(&f->kv, seq, path, &info, err) == 0);
    damage(path, "window", &pairs, sizeof pairs);  // one state too many
    CHECK(kvfile_load(&back, path, &model, NULL, &got, err) == -1 && strstr(err, "state"));
    info.n_ctx = 0, info.n_prefix = 0, info.n_ids = 0;
    CHECK(kvfile_save(&f->kv, empty, path, &info, err) == 0);  // nothing has been read
    CHECK(kvfile_load(&back, path, &model, f->pool, &got, err) == 0);
    feed(f, &back, 0, ids, 50, NULL);
    feed(f, &f->kv, empty, ids, 50, NULL);
    CHECK(same_state(f, &f->kv, empty, &back, 0));
    kvcache_close(&back);
    remove(path);
    kvcache_drop(&f->kv, seq), kvcache_drop(&f->kv, empty);
}

// ---- KVzip ----

// What a tap sees of the scored layers: queries of all rows.
typedef struct {
    Fixture *f;
    float *q;  // [scored layers][MAX_ROWS][q_dim]
} Seen;

static void see(void *arg, int layer, int n) {
    const Seen *seen = arg;
    const Config *c = &seen->f->model.config;
    if (c->window[layer] > 0) return;
    size_t at = (size_t)kvcache_scored_index(&seen->f->kv.shape, layer) * MAX_ROWS * c->q_dim;
    CHECK(c->window[layer] == 0);
    memcpy(seen->q + at, seen->f->state.q, (size_t)n * c->q_dim * sizeof *seen->q);
}

// Raises best [hi - lo] by the weights of one query over prefix, [lo, hi), the pairs from own on
// and the sink of its head, query head `head`.
static void brute_query(const Fixture *f, KVHeadAt at, const float *q, const int span[4], int seen,
                        int head, float *best) {
    const Config *c = &f->model.config;
    double s[512], sum = 0, max = -INFINITY;
    double sink = c->sinks ? c->sinks[at.layer * c->n_heads + head] : -INFINITY;
    float k[MAX_HEAD_DIM];
    for (int t = 0; t < seen; t++) {
        s[t] = -INFINITY;
        if (!(t < span[0] || (t >= span[1] && t < span[2]) || t >= span[3])) continue;
        kvcache_pair(&f->kv, at, t, k, NULL);
        s[t] = 0;
        for (int i = 0; i < f->model.config.head_dim; i++) s[t] += (double)q[i] * k[i];
        s[t] *= f->model.config.attn_scale;
        max = fmax(max, s[t]);
    }
    max = fmax(max, sink), sum = exp(sink - max);
    for (int t = 0; t < seen; t++) sum += s[t] = exp(s[t] - max);
    for (int t = span[1]; t < span[2]; t++)
        best[t - span[1]] = fmaxf(best[t - span[1]], (float)(s[t] / sum));
}

// The repeat pass over [a, b) of the context by itself: score [scored heads][n_ctx].
static void brute_chunk(Context *c, Fixture *f, int a, int b, const Seen *seen, float *score) {
    const Config *m = &f->model.config;
    Ids in = {0};
    CHECK(kvzip_repeat_input(c, a, b, &in) == 0 && in.n <= MAX_ROWS);
    int seq = kvcache_fork(&f->kv, c->seq, err), group = m->n_heads / m->n_kv_heads;
    Row rows[MAX_ROWS];
    for (int i = 0; i < in.n; i++) rows[i] = (Row){seq, in.id[i], false};
    f->state.tap = see, f->state.tap_arg = (void *)seen;
    CHECK(forward(&f->state, &f->kv, rows, in.n, err) == 0);
    f->state.tap = NULL;
    int own = c->n_prefix + c->n_ctx, span[] = {c->n_prefix, c->n_prefix + a, c->n_prefix + b, own};
    for (int h = 0; h < kvcache_scored_layers(&f->kv.shape, NULL) * m->n_kv_heads; h++) {
        int s = h / m->n_kv_heads, g = h % m->n_kv_heads;
        KVHeadAt at = {seq, kvcache_scored_layer(&f->kv.shape, s), g};
        for (int i = 0; i < in.n * group; i++) {
            const float *q = seen->q + ((size_t)s * MAX_ROWS + i / group) * m->q_dim +
                             (g * group + i % group) * m->head_dim;
            brute_query(f, at, q, span, own + i / group + 1, g * group + i % group,
                        score + (size_t)h * c->n_ctx + a);
        }
    }
    kvcache_drop(&f->kv, seq), ids_free(&in);
}

// Scores equal the brute force, in chunks; the context goes on as if it had never been scored.
static void test_kvzip(Fixture *f) {
    int ids[512], query[12], chunk = 32;
    Context c = fixture_context(f, ids, chunk);
    size_t n = context_scores(&c);
    float *score = malloc(n * sizeof *score), *want_score = calloc(n, sizeof *want_score);
    Seen seen = {f, malloc((size_t)f->model.config.n_layers * MAX_ROWS * f->model.config.q_dim *
                           sizeof(float))};
    int plain = kvcache_new(&f->kv, err);
    feed(f, &f->kv, plain, ids, c.n_prefix + c.n_ctx, NULL);
    CHECK(context_score(&c, policy_find("kvzip"), score, err) == 0);
    CHECK(same_state(f, &f->kv, plain, &f->kv, c.seq));
    for (int a = 0; a < c.n_ctx; a += chunk)
        brute_chunk(&c, f, a, a + chunk < c.n_ctx ? a + chunk : c.n_ctx, &seen, want_score);
    CHECK_NEAR(far(score, want_score, n), 0, 1e-4);

    uint8_t *keep = malloc(n);
    for (int i = 0; i < 12; i++) query[i] = ids[i * 3];
    for (int evicts = 0; evicts < 2; evicts++) {
        for (size_t i = 0; i < n; i++) keep[i] = !evicts || i % 3 == 0;
        CHECK(kvcache_evict(&f->kv, c.seq, c.n_prefix, c.n_ctx, keep, err) == 0);
        CHECK(same_state(f, &f->kv, plain, &f->kv, c.seq));
        int a = kvcache_fork(&f->kv, plain, err), b = kvcache_fork(&f->kv, c.seq, err);
        feed(f, &f->kv, a, query, 12, logits[0]), feed(f, &f->kv, b, query, 12, logits[1]);
        CHECK(same_logits(12) == !evicts);
        kvcache_drop(&f->kv, a), kvcache_drop(&f->kv, b);
    }
    kvcache_drop(&f->kv, plain), kvcache_drop(&f->kv, c.seq);
    free(score), free(want_score), free(keep), free(seen.q);
}

int main(int argc, char **argv) {
    static const char *const names[] = {"qwen35", "qwen35moe", "llama4"};
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) {
        printf("test_state: no %s on this machine\n", argv[1]);
        return 0;
    }
    for (int i = 0; i < 2; i++) logits[i] = malloc((size_t)96 * VOCAB * sizeof *logits[i]);
    for (int i = 0; i < 3; i++) {
        Fixture f;
        char weights[64];
        snprintf(weights, sizeof weights, "%s.kvz", names[i]);
        if (!fixture_open(&f, names[i], weights, KV_F32, 2)) continue;
        bool states = state_bytes(&f) > 0;
        test_cuts(&f);
        if (states) test_marks(&f), test_no_cut(&f), test_bytes(&f), test_file(&f);
        test_kvzip(&f);
        fixture_close(&f);
    }
    Fixture f;
    if (fixture_open(&f, "gptoss", "gptoss.kvz", KV_F32, 2))  // no states, but sinks
        test_kvzip(&f), fixture_close(&f);
    for (int i = 0; i < 2; i++) free(logits[i]);
    return test_end("test_state");
}
