// fuzz_cache.c: damaged caches are refused, or attention runs over them, and what is saved of them
// again gives the same bits.
//
// The first byte picks a valid one of a layer with a window and one without: exact pages after
// evicting, fitted with biases; exact, settled and demoted pages; pages of f32. The changes to it
// follow (fuzz.h). A saved cache is small, so that thousands are tried in a second.
#include "fuzz.h"

#include "kvfile.h"

enum { L = 2, HEADS = 4, KV = 1, D = 16, PAIRS = 230, KEPT = 32, CACHES = 3 };
enum { OUT = 2 * HEADS * D };  // floats of attention's output in one layer

static char err[ERR_LEN], folder[64], path[96];  // what is saved goes to path
static FuzzValid valid[CACHES];
static const int window[L] = {0, 70};
static const KVModel model = {.shape = {.n_layers = L,
                                        .n_heads = HEADS,
                                        .n_kv_heads = KV,
                                        .head_dim = D,
                                        .scale = 0.7f,
                                        .window = window},
                              .fingerprint = "fingerprint"};
static float numbers[PAIRS * HEADS * D + 1];  // queries, keys and values

// Reads n tokens in all layers; attention's output goes to out [L][n][HEADS][D].
static void read_tokens(KVCache *kv, int seq, int n, float *out) {
    KVRun run = {seq, n};
    MUST(kvcache_reserve(kv, seq, n, err) == 0);
    for (int l = 0; l < L; l++) {
        KVQuery query = {.q = numbers, .out = out + l * n * HEADS * D, .out_stride = HEADS * D};
        kvcache_append(kv, l, &run, 1, numbers, numbers + 1);
        kvcache_attend(kv, l, &run, 1, &query);
    }
    kvcache_advance(kv, &run, 1);
}

// ---- valid caches ----

static void fit(KVCache *kv, int seq) {
    float bias[KEPT];
    int kept[KEPT];
    for (int i = 0; i < KEPT; i++) kept[i] = 2 * i, bias[i] = (float)i / KEPT;
    MUST(kvcache_own(kv, seq, err) == 0);
    kvcache_refit(kv, (KVHeadAt){seq, 0, 0}, &(KVFitted){kept, KEPT, numbers, bias});
}

static FuzzValid make(KVTypes types, bool demote) {
    static float out[L * PAIRS * HEADS * D];
    uint8_t keep[KV * PAIRS];
    int ids[PAIRS];
    KVCache kv;
    MUST(kvcache_open(&kv, &model.shape, types, NULL, err) == 0);
    int seq = kvcache_new(&kv, err);
    read_tokens(&kv, seq, PAIRS, out);
    for (int t = 0; t < PAIRS; t++) ids[t] = t, keep[t] = t % 3 == 0;
    if (!demote) fit(&kv, seq);
    MUST((demote ? kvcache_demote : kvcache_evict)(&kv, seq, 0, PAIRS, keep, err) == 0);
    MUST(kvcache_settle(&kv, seq, err) == 0);
    KVInfo info = {.fingerprint = model.fingerprint,
                   .model = "m",
                   .policy = "kvzip",
                   .level = "pair",
                   .set = "a=1",
                   .budget = "80",
                   .fit = demote ? NULL : "both",
                   .n_ctx = PAIRS,
                   .ratio = 0.3,
                   .ids = ids,
                   .n_ids = PAIRS};
    MUST(kvfile_save(&kv, seq, path, &info, err) == 0);
    kvcache_close(&kv);
    size_t bytes;
    uint8_t *data = (uint8_t *)file_read(path, &bytes, err);
    return fuzz_valid(data, bytes);
}

static void leave(void) {
    unlink(path);
    rmdir(folder);
}

static void begin(void) {
    bool memory = access("/dev/shm", W_OK) == 0;
    snprintf(folder, sizeof folder, "%s/fuzz_cache.XXXXXX", memory ? "/dev/shm" : "/tmp");
    MUST(mkdtemp(folder) != NULL && atexit(leave) == 0);
    snprintf(path, sizeof path, "%s/cache", folder);
    kernels_init(NULL);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        numbers[i] = (float)(i * 2654435761u % 1024) / 512 - 1;
    valid[0] = make(kvcache_both(KV_F16), false);
    valid[1] = make((KVTypes){KV_Q8, KV_Q4}, true);
    valid[2] = make(kvcache_both(KV_F32), false);
}

// ---- damaged ones ----

// What `run info` shows: of a loaded cache (must_be) all is known, another one's is refused or not.
static void show(const TensorFile *f, bool must_be) {
    CacheFacts facts;
    bool known = kvfile_facts(&facts, f, err) == 0;
    MUST(known || !must_be);
    if (known) kvfile_facts_free(&facts);
}

static void show_refused(const char *from) {
    TensorFile f;
    if (tensors_open(&f, from, err) != 0) return;
    show(&f, false);
    tensors_close(&f);
}

// Two tokens after the cache at `from`, in a fork; saves it at `to`, unless NULL. False: refused.
static bool use(const char *from, const char *to, float *out) {
    KVCache kv;
    KVInfo info;
    if (kvfile_load(&kv, from, &model, NULL, &info, err) != 0) return false;
    show(&kv.file, true);
    int fork = kvcache_fork(&kv, 0, err);
    MUST(fork >= 0);
    read_tokens(&kv, fork, 2, out);
    MUST(kvcache_settle(&kv, fork, err) == 0 && kvcache_bytes(&kv, fork) > 0);
    kvcache_drop(&kv, fork);
    if (to) MUST(kvfile_save(&kv, 0, to, &info, err) == 0);
    kvcache_close(&kv);
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static float once[L * OUT], again[L * OUT];
    if (!folder[0]) begin();
    if (n == 0) return 0;
    FuzzValid *v = &valid[data[0] % CACHES];
    fuzz_change(v, data + 1, n - 1, false);
    if (use(v->file.path, path, once))
        MUST(use(path, NULL, again) && memcmp(once, again, sizeof once) == 0);
    else
        show_refused(v->file.path);
    fuzz_change(v, data + 1, n - 1, true);
    return 0;
}
