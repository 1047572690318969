// test_limits.c: sizes and counts at the edge of their types, and numbers that are garbage. Most of
// it means something under the sanitizers (make asan), where a sum that wraps ends the test.
#include <limits.h>

#include "eval/results.h"
#include "kernels/simd.h"
#include "kvcache.h"
#include "test.h"

static char err[ERR_LEN];

// A window may be as long as an int can say.
static void test_windows(void) {
    const int window[] = {INT_MAX, 0, 64};
    KVShape shape = {
        .n_layers = 3, .n_heads = 4, .n_kv_heads = 2, .head_dim = 64, .scale = 1, .window = window};
    size_t pair = kvcache_page_bytes(shape.head_dim, kvcache_both(KV_F16)) / PAGE + sizeof(int);
    size_t pairs = 2 * ((size_t)INT_MAX + PAGE) + 2 * (64 + PAGE);
    CHECK(kvcache_window_bytes(&shape, kvcache_both(KV_F16)) == pairs * pair);
}

// A sequence ends before its positions would; forks of an empty one copy nothing.
static void test_sequences(void) {
    const int window[] = {0};
    KVShape shape = {
        .n_layers = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = 8, .scale = 1, .window = window};
    KVCache kv;
    CHECK(kvcache_open(&kv, &shape, kvcache_both(KV_F16), NULL, err) == 0);
    int seq = kvcache_new(&kv, err), fork = kvcache_fork(&kv, seq, err);
    CHECK(fork >= 0 && kvcache_rewind(&kv, seq, fork, err) == 0);
    kv.seqs[seq].next_pos = MAX_PAIRS - 1;
    CHECK(kvcache_reserve(&kv, seq, 1, err) == 0);
    CHECK(kvcache_reserve(&kv, seq, 2, err) == -1);
    CHECK(strstr(err, "a sequence of more than") != NULL);
    CHECK(kvcache_reserve(&kv, seq, INT_MAX, err) == -1);
    kvcache_close(&kv);
}

// Products with codes of numbers that are none: any result, but no sum of codes that wraps.
static void test_garbage(CodeType type, float x) {
    enum { INNER = 64, COLS = 64 };
    uint8_t data[INNER * COLS];
    uint16_t scale[INNER], min[INNER] = {0};
    float a[INNER], c[COLS];
    memset(data, 0xff, sizeof data);
    for (int i = 0; i < INNER; i++) a[i] = i % 3 == 0 ? 1.0f : x, scale[i] = f32_f16(1.0f);
    Codes b = {type, INNER, COLS, data, scale, type == C_U8 ? NULL : min, data};
    CodeGemm g = {.c = c, .ldc = COLS, .a = a, .lda = INNER, .b = &b, .n = 1};
    kern.gemm_codes(&g);
    scale[1] = 0x7e00, scale[2] = 0x7c00;  // NaN and infinity
    kern.gemm_codes(&g);
    CHECK(true);
}

// A line of results whose numbers no context has.
static void test_results(void) {
    static const char line[] =
        "{\"settings\": \"s\"}\n{\"task\": \"t\", \"metric\": \"m\", \"policy\": \"p\", \"level\": "
        "\"l\", \"kv\": \"f16\", \"context\": %s, \"ratio\": 1, \"kept\": 1, \"value\": [1], "
        "\"same\": [1], \"kl\": [0], \"nll\": [0]}\n";
    static const char *const wrong[] = {"1e300", "-1", "2147483648", "-1e999"};
    char path[64];
    test_path(path, "limits.results");
    for (int i = 0; i < 4; i++) {
        EvalResults r = {0};
        FILE *f = fopen(path, "w");
        fprintf(f, line, wrong[i]), fclose(f);
        CHECK(eval_results_read(&r, path, err) == -1);
        CHECK(strstr(err, "\"context\" is not a line's number") != NULL);
        eval_results_close(&r);
    }
    remove(path);
}

int main(int argc, char **argv) {
    const char *isa = argc > 1 ? argv[1] : NULL;
    static const char *const sets[] = {"scalar",     "avx2", "avx2vnni", "avx512",
                                       "avx512bf16", "amx",  "neon"};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        if (kernels_init(isa ? isa : sets[i]) != 0) continue;
        for (CodeType type = C_U8; type <= C_U2; type++) {
            test_garbage(type, NAN);
            test_garbage(type, INFINITY);
            test_garbage(type, 3e38f);
        }
    }
    kernels_init(isa);
    test_windows();
    test_sequences();
    test_results();
    return test_end("test_limits");
}
