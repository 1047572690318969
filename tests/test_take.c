// Sequences that are taken from another cache or cut short go on as the ones they stand for.
#include "fixture.h"
#include "kvfile.h"

enum { LONG = 300, NEXT = 20 };

static int ids[LONG];

static void feed(Fixture *f, KVCache *kv, int seq, const int *id, int n, float *logits) {
    Row rows[LONG];
    for (int i = 0; i < n; i++) rows[i] = (Row){seq, id[i], logits && i == n - 1};
    CHECK(forward(&f->state, kv, rows, n, err) == 0);
    size_t vocab = (size_t)f->model.config.vocab_size;
    if (logits) memcpy(logits, f->state.logits, vocab * sizeof *logits);
}

// What follows after pos tokens and NEXT others: of a sequence that was cut there, and of a new
// one. Returns whether it could be cut.
static bool cut_at(Fixture *f, int seq, int pos) {
    size_t vocab = (size_t)f->model.config.vocab_size;
    float *logits = malloc(2 * vocab * sizeof *logits);
    int cut = kvcache_fork(&f->kv, seq, err), fresh = kvcache_new(&f->kv, err);
    bool can = kvcache_cut(&f->kv, cut, pos);
    CHECK(f->kv.seqs[cut].next_pos == (can ? pos : LONG));
    feed(f, &f->kv, fresh, ids, pos, NULL);
    if (can) {
        feed(f, &f->kv, cut, ids + 3, NEXT, logits);
        feed(f, &f->kv, fresh, ids + 3, NEXT, logits + vocab);
        CHECK(memcmp(logits, logits + vocab, vocab * sizeof *logits) == 0);
        CHECK(kvcache_bytes(&f->kv, cut) == kvcache_bytes(&f->kv, fresh));
    }
    feed(f, &f->kv, seq, ids, NEXT, logits);  // what was forked goes on
    CHECK(kvcache_cut(&f->kv, seq, LONG));
    kvcache_drop(&f->kv, cut), kvcache_drop(&f->kv, fresh);
    free(logits);
    return can;
}

static void test_cut(const char *name, const char *weights, KVTypes types) {
    Fixture f;
    if (!fixture_open(&f, name, weights, types.k == KV_F32 ? KV_F32 : KV_F16, 2)) return;
    KVShape shape = model_kv_shape(&f.model);
    kvcache_close(&f.kv);
    CHECK(kvcache_open(&f.kv, &shape, types, f.pool, err) == 0);
    int seq = kvcache_new(&f.kv, err), slides = 0, can = 0;
    for (int i = 0; i < LONG; i++) ids[i] = (5 + 7 * i) % f.model.config.vocab_size;
    for (int l = 0; l < shape.n_layers; l++) slides += shape.window[l] > 0;
    feed(&f, &f.kv, seq, ids, LONG, NULL);
    for (int pos = 30; pos <= LONG; pos += 30) can += cut_at(&f, seq, pos);
    CHECK(slides || types.k >= KV_Q8 ? can > 0 && can < LONG / 30 : can == LONG / 30);
    fixture_close(&f);
}

// A saved context beside another one: both go on as they did before.
static void test_take(void) {
    Fixture f;
    KVCache saved;
    KVInfo info;
    char path[64];
    if (!fixture_open(&f, "smol", "smol.kvz", KV_F16, 2)) return;
    KVShape shape = model_kv_shape(&f.model);
    size_t vocab = (size_t)f.model.config.vocab_size;
    float *logits = malloc(2 * vocab * sizeof *logits);
    int seq = kvcache_new(&f.kv, err), n_heads = kvcache_scored_layers(&shape, NULL) * 3;
    for (int i = 0; i < LONG; i++) ids[i] = (5 + 7 * i) % f.model.config.vocab_size;
    feed(&f, &f.kv, seq, ids, LONG, NULL);
    uint8_t *keep = malloc((size_t)n_heads * LONG);
    for (int i = 0; i < n_heads * LONG; i++) keep[i] = i % 5 < 2 || i % 7 == 0;
    CHECK(kvcache_demote(&f.kv, seq, 0, LONG, keep, err) == 0);
    test_path(path, "take.kvc");
    KVInfo how = {
        .fingerprint = f.model.fingerprint, .model = "smol", .policy = "none", .ratio = 1};
    how.n_ctx = how.n_ids = LONG, how.ids = ids;
    CHECK(kvfile_save(&f.kv, seq, path, &how, err) == 0);
    KVModel model = {shape, f.model.fingerprint};
    CHECK(kvfile_load(&saved, path, &model, f.pool, &info, err) == 0);
    int taken = kvcache_take(&f.kv, &saved, 0, err);
    CHECK(taken >= 0 && taken != seq);
    kvcache_close(&saved);
    CHECK(kvcache_bytes(&f.kv, taken) == kvcache_bytes(&f.kv, seq));
    feed(&f, &f.kv, taken, ids + 3, NEXT, logits),
        feed(&f, &f.kv, seq, ids + 3, NEXT, logits + vocab);
    CHECK(memcmp(logits, logits + vocab, vocab * sizeof *logits) == 0);
    KVCache other;
    CHECK(kvcache_open(&other, &shape, kvcache_both(KV_F32), f.pool, err) == 0);
    CHECK(kvcache_take(&other, &f.kv, seq, err) == -1 && strstr(err, "f16") && strstr(err, "f32"));
    CHECK(kvcache_new(&other, err) == 0);  // nothing is left of what could not be taken
    kvcache_close(&other);
    remove(path);
    free(keep), free(logits);
    fixture_close(&f);
}

int main(int argc, char **argv) {
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) return 1;
    test_cut("smol", "smol.kvz", kvcache_both(KV_F16));
    test_cut("smol", "smol.kvz", kvcache_both(KV_F32));
    test_cut("smol", "smol.kvz", (KVTypes){KV_Q8, KV_Q4});
    test_cut("gemma3", "gemma3.kvz", kvcache_both(KV_F16));
    test_take();
    return test_end("test_take");
}
