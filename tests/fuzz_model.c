// fuzz_model.c: a damaged model is refused or computes three tokens. The input is a list of changes
// to a valid one (fuzz.h).
#include "fuzz.h"

#include "model.h"

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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static FuzzValid valid;
    char err[ERR_LEN];
    size_t bytes;
    Model m;
    if (!valid.map) {
        kernels_init(NULL);
        uint8_t *file = (uint8_t *)file_read("tests/fixtures/smol-q4.kvz", &bytes, err);
        valid = fuzz_valid(file, bytes);
    }
    fuzz_change(&valid, data, n, false);
    if (model_open(&m, valid.file.path, err) == 0) {
        compute(&m);
        model_close(&m);
    }
    fuzz_change(&valid, data, n, true);
    return 0;
}
