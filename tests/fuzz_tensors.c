// fuzz_tensors.c: any bytes are refused as a container or give tensors inside the map.
#include "fuzz.h"

#include "tensors.h"

static volatile uint8_t sink;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static FuzzFile file;
    char err[ERR_LEN];
    TensorFile f;
    if (!file.path[0]) file = fuzz_file();
    fuzz_put(&file, data, n);
    if (tensors_open(&f, file.path, err) != 0) return 0;
    for (int i = 0; i < f.n_tensors; i++) {
        const Tensor *t = &f.tensors[i];
        MUST(tensors_find(&f, t->name) == t);
        for (size_t b = 0; b < t->bytes; b++) sink ^= ((const uint8_t *)t->data)[b];
    }
    for (int i = 0; i < f.n_meta; i++) {
        float x;
        tensors_meta_float(&f, f.meta[i].key, -1e9, 1e9, &x, err);
    }
    tensors_close(&f);
    return 0;
}
