// large_cache.c: a cache of one long head, beyond 2^31 bytes, is saved and comes back to the bit.
// Part of `make sizes SIZES=long`: 2.3 GB of memory, and as much on disk until it ends.
#include "kvfile.h"
#include "test.h"
#include "util.h"

enum { D = 256, BLOCK = 512, N = 2100 * BLOCK };  // 2 KB a pair

static char err[ERR_LEN];
static const int no_window[1] = {0};
static const KVModel model = {{1, 1, 1, D, 0.1f, 0.0f, no_window}, "large"};

// What token t has in its key and in its value.
static float key_of(int t, int i) { return i == t % D ? (float)t / N : 0; }
static float value_of(int t, int i) { return (float)((t + 31 * i) % 1021); }

static void append(KVCache *kv, int seq, int first, int n) {
    static float k[BLOCK * D], v[BLOCK * D];
    KVRun run = {seq, n};
    for (int t = 0; t < n; t++)
        for (int i = 0; i < D; i++)
            k[t * D + i] = key_of(first + t, i), v[t * D + i] = value_of(first + t, i);
    CHECK(kvcache_reserve(kv, seq, n, err) == 0);
    kvcache_append(kv, 0, &run, 1, k, v);
    kvcache_advance(kv, &run, 1);
}

// One more token, in a fork.
static void attend(KVCache *kv, int seq, float out[D]) {
    float q[D], k[D] = {0};
    int fork = kvcache_fork(kv, seq, err);
    KVRun run = {fork, 1};
    for (int i = 0; i < D; i++) q[i] = (float)(i % 5);
    CHECK(fork >= 0 && kvcache_reserve(kv, fork, 1, err) == 0);
    kvcache_append(kv, 0, &run, 1, k, k);
    kvcache_attend(kv, 0, &run, 1, &(KVQuery){.q = q, .out = out, .out_stride = D});
    kvcache_advance(kv, &run, 1);
    kvcache_drop(kv, fork);
}

static void check_pairs(const KVCache *kv) {
    float k[D], v[D];
    for (int t = 0; t < N; t += t < N - 4300 ? 4099 : 1) {
        CHECK(kvcache_pair(kv, (KVHeadAt){0, 0, 0}, t, k, v) == t);
        bool same = true;
        for (int i = 0; i < D; i++) same = same && k[i] == key_of(t, i) && v[i] == value_of(t, i);
        CHECK(same);
    }
}

static void make(const char *path, float out[D]) {
    KVCache kv;
    CHECK(kvcache_open(&kv, &model.shape, kvcache_both(KV_F32), NULL, err) == 0);
    int seq = kvcache_new(&kv, err);
    for (int first = 0; first < N; first += BLOCK) append(&kv, seq, first, BLOCK);
    check_pairs(&kv);
    attend(&kv, seq, out);
    KVInfo info = {.fingerprint = model.fingerprint, .model = "m", .policy = "none", .ratio = 1};
    CHECK(kvcache_bytes(&kv, seq) > (size_t)1 << 31);
    CHECK(kvfile_save(&kv, seq, path, &info, err) == 0);
    kvcache_close(&kv);
}

int main(int argc, char **argv) {
    float before[D], after[D];
    KVCache kv;
    KVInfo info;
    if (argc != 2) return 2;
    kernels_init(NULL);
    make(argv[1], before);
    if (CHECK(kvfile_load(&kv, argv[1], &model, NULL, &info, err) == 0)) {
        CHECK(kv.file.map_bytes > (size_t)1 << 31);
        check_pairs(&kv);
        attend(&kv, 0, after);
        CHECK(memcmp(before, after, sizeof after) == 0);
        kvcache_close(&kv);
    } else {
        printf("%s\n", err);
    }
    remove(argv[1]);
    return test_end("large_cache");
}
