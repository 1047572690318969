// fuzz_model.c: libFuzzer target for models: a valid one with a list of changes, three bytes of
// place and one of value each, is refused or computes three tokens. Run in the project's directory.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "model.h"

static void must(int ok) {
    if (!ok) abort();
}

static void compute(Model *m) {
    char err[ERR_LEN];
    RunState state;
    KVCache kv;
    KVShape shape = model_kv_shape(m);
    Row rows[] = {{0, 1, false}, {0, 2, false}, {0, 0, true}};
    if (state_open(&state, m, NULL, 4, 2, err) == 0) {
        if (kvcache_open(&kv, &shape, kvcache_both(KV_F16), NULL, err) == 0 &&
            kvcache_new(&kv, err) == 0)
            forward(&state, &kv, rows, 3, err);
        kvcache_close(&kv);
    }
    state_close(&state);
}

// The valid file with changes [n], three of four in its header; or as it was again.
static void put_changes(int file, const uint8_t *valid, size_t bytes, const uint8_t *p, size_t n,
                        bool undo) {
    for (; n >= 4; p += 4, n -= 4) {
        size_t at = (size_t)(p[0] | p[1] << 8 | p[2] << 16);
        at = p[0] & 3 ? at % 8192 : at % bytes;
        must(pwrite(file, undo ? &valid[at] : &p[3], 1, (off_t)at) == 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    static uint8_t *valid;
    static size_t bytes;
    static int file;
    static char path[32], err[ERR_LEN];
    Model m;
    if (!valid) {
        kernels_init(NULL);
        valid = (uint8_t *)file_read("tests/fixtures/smol-q4.kvz", &bytes, err);
        must(valid && (file = memfd_create("fuzz", 0)) >= 0);
        must(pwrite(file, valid, bytes, 0) == (ssize_t)bytes);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    put_changes(file, valid, bytes, p, n, false);
    if (model_open(&m, path, err) == 0) {
        compute(&m);
        model_close(&m);
    }
    put_changes(file, valid, bytes, p, n, true);
    return 0;
}
