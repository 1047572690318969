// fuzz_tensors.c: libFuzzer target for the file layer: any bytes are refused or give tensors inside
// the map.
//   clang -g -fsanitize=fuzzer,address,undefined tests/fuzz_tensors.c tensors.c && ./a.out
#define _POSIX_C_SOURCE 200809L
#include "tensors.h"

#include <stdlib.h>
#include <unistd.h>

static volatile uint8_t sink;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static char path[] = "/tmp/fuzz_tensors.XXXXXX";
    static int fd = -1;
    char err[ERR_LEN];
    TensorFile f;
    if (fd < 0) fd = mkstemp(path);
    if (fd < 0 || ftruncate(fd, 0) != 0 || pwrite(fd, data, n, 0) != (ssize_t)n) abort();
    if (tensors_open(&f, path, err) != 0) return 0;
    for (int i = 0; i < f.n_tensors; i++) {
        const Tensor *t = &f.tensors[i];
        if (tensors_find(&f, t->name) != t) abort();
        for (size_t b = 0; b < t->bytes; b++) sink ^= ((const uint8_t *)t->data)[b];
    }
    for (int i = 0; i < f.n_meta; i++) {
        float x;
        tensors_meta_float(&f, f.meta[i].key, -1e9, 1e9, &x, err);
    }
    tensors_close(&f);
    return 0;
}
