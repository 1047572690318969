// test_weights.c: weights that are copied stay what and where they were, whatever becomes of the
// file.
#define _POSIX_C_SOURCE 200809L
#include "weights.h"

#include <fcntl.h>
#include <math.h>
#include <unistd.h>

#include "test.h"

static char path[] = "/tmp/test_weights.XXXXXX", err[ERR_LEN];

// A file of n numbers that differ, in one tensor.
static void write_numbers(size_t n) {
    TensorWriter w;
    CHECK(tensors_write_begin(&w, path, err) == 0);
    CHECK(tensors_write_declare(&w, "x", T_I32, 1, &n, err) == 0);
    for (size_t i = 0; i < n; i++) {
        int32_t x = (int32_t)(i * 2654435761u);
        if (tensors_write_put(&w, &x, sizeof x, err) != 0) break;
    }
    CHECK(tensors_write_commit(&w, err) == 0);
}

static bool are_whole(const TensorFile *f, size_t n) {
    const Tensor *t = tensors_get(f, err, "x", T_I32, 1, -1);
    if (!t || t->shape[0] != n) return false;
    for (size_t i = 0; i < n; i++)
        if (((const int32_t *)t->data)[i] != (int32_t)(i * 2654435761u)) return false;
    return true;
}

// Of a few bytes, of whole large pages and of some more.
static void test_copy(size_t n, double seconds) {
    TensorFile f;
    write_numbers(n);
    CHECK(tensors_open(&f, path, err) == 0);
    weights_advise(&f);
    const Tensor *t = tensors_find(&f, "x");
    const void *was = t ? t->data : NULL;
    CHECK(are_whole(&f, n) && weights_copy(&f, seconds, err) == 0);
    CHECK(tensors_find(&f, "x")->data == was && are_whole(&f, n));
    double large = weights_large(&f);
    CHECK(large == -1 || (large >= 0 && large <= 1.5));
    CHECK(!weights_should_copy(&f));  // too small to matter
    if (isinf(seconds)) CHECK(truncate(path, 1) == 0 && are_whole(&f, n));
    tensors_close(&f);
}

// What is cold is not copied: it still is what the file has.
static void test_cold(void) {
    enum { N = 3 << 20, FROM = 1 << 18, COLD = 2 << 20 };  // of numbers
    TensorFile f;
    int32_t new = 5, seen[2];
    write_numbers(N);
    CHECK(tensors_open(&f, path, err) == 0);
    const int32_t *x = tensors_find(&f, "x")->data;
    weights_cold(&f, x + FROM, COLD * sizeof *x);
    CHECK(are_whole(&f, N) && weights_copy(&f, INFINITY, err) == 0 && are_whole(&f, N));
    int fd = open(path, O_WRONLY);
    size_t at = (size_t)((const uint8_t *)x - f.map);
    for (int i = 0; i < 2; i++) {
        size_t n = i ? FROM + COLD / 2 : 10;
        CHECK(pwrite(fd, &new, sizeof new, (off_t)(at + n * sizeof *x)) == sizeof new);
        seen[i] = x[n];
    }
    CHECK(seen[0] == (int32_t)(10 * 2654435761u) && seen[1] == new);
    close(fd);
    tensors_close(&f);
}

int main(void) {
    int fd = mkstemp(path);
    if (fd < 0) return 2;
    close(fd);
    test_copy(10, INFINITY);
    test_copy(1 << 19, INFINITY);
    test_copy((3 << 19) + 777, INFINITY);
    test_copy((3 << 19) + 777, 0);  // no time for any of it
    test_cold();
    unlink(path);
    return test_end("test_weights");
}
