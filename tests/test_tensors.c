// test_tensors.c: the file layer takes nothing on trust, and writes all or nothing.
#define _POSIX_C_SOURCE 200809L
#include "tensors.h"

#include <dirent.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <signal.h>
#include <unistd.h>

#include "test.h"

static char dir[64], path[128], err[ERR_LEN];

// Writes bytes to `path` and opens them as a tensor file.
static int open_bytes(TensorFile *f, const void *bytes, size_t n) {
    FILE *file = fopen(path, "wb");
    if (file == NULL || fwrite(bytes, 1, n, file) != n || fclose(file) != 0) exit(2);
    err[0] = 0;
    return tensors_open(f, path, err);
}

// A file of this header and `data` zero bytes behind it.
static int open_header(TensorFile *f, const char *header, size_t data) {
    size_t n = strlen(header);
    uint8_t *bytes = calloc(1, 8 + n + data);
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)((uint64_t)n >> 8 * i);
    memcpy(bytes + 8, header, n);
    int status = open_bytes(f, bytes, 8 + n + data);
    free(bytes);
    return status;
}

static int n_files(void) {
    int n = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d)) != NULL;) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static int write_sample(TensorWriter *w) {
    const size_t shape_a[] = {3}, shape_b[] = {2, 5}, shape_c[] = {0, 7};
    const float a[] = {1.5f, -2.0f, 3.25f};
    uint8_t b[10];
    for (int i = 0; i < 10; i++) b[i] = (uint8_t)(i * 7);
    if (tensors_write_begin(w, path, err) != 0) return -1;
    if (tensors_write_meta(w, "name", "\"quoted\" \\ line\nend \x01 caf\xc3\xa9", err) != 0)
        return -1;
    if (tensors_write_meta(w, "dim", "64", err) != 0) return -1;
    if (tensors_write_meta(w, "eps", "1e-05", err) != 0) return -1;
    if (tensors_write_declare(w, "a", T_F32, 1, shape_a, err) != 0) return -1;
    if (tensors_write_declare(w, "empty", T_F16, 2, shape_c, err) != 0) return -1;
    if (tensors_write_declare(w, "b", T_U8, 2, shape_b, err) != 0) return -1;
    if (tensors_write_declare(w, "scalar", T_I32, 0, NULL, err) != 0) return -1;
    if (tensors_write_put(w, a, sizeof a, err) != 0) return -1;
    for (int i = 0; i < 10; i++)  // in pieces
        if (tensors_write_put(w, b + i, 1, err) != 0) return -1;
    return tensors_write_put(w, &(int32_t){-5}, 4, err);
}

static void test_round_trip(void) {
    TensorWriter w;
    TensorFile f;
    CHECK(write_sample(&w) == 0);
    CHECK(tensors_write_commit(&w, err) == 0);
    tensors_write_abort(&w);  // safe after a commit
    CHECK(n_files() == 1);
    CHECK(tensors_open(&f, path, err) == 0);
    CHECK_STR(tensors_meta(&f, "name"), "\"quoted\" \\ line\nend \x01 caf\xc3\xa9");
    CHECK(tensors_meta(&f, "absent") == NULL);
    const Tensor *a = tensors_get(&f, err, "a", T_F32, 1, 3), *b = tensors_find(&f, "b");
    CHECK(a != NULL && ((const float *)a->data)[2] == 3.25f);
    CHECK(b != NULL && b->n_dims == 2 && b->shape[1] == 5 && ((const uint8_t *)b->data)[9] == 63);
    CHECK(tensors_get(&f, err, "empty", T_F16, 2, 0, 7) != NULL);
    const Tensor *scalar = tensors_get(&f, err, "scalar", T_I32, 0);
    CHECK(scalar != NULL && *(const int32_t *)scalar->data == -5);
    for (int i = 0; i < f.n_tensors; i++)
        if (strncmp(f.tensors[i].name, "pad.", 4) != 0)
            CHECK((uintptr_t)f.tensors[i].data % TENSOR_ALIGN == 0);
    tensors_close(&f);
    tensors_close(&f);
}

static void test_get_says_what_is_wrong(void) {
    TensorWriter w;
    TensorFile f;
    CHECK(write_sample(&w) == 0 && tensors_write_commit(&w, err) == 0);
    CHECK(tensors_open(&f, path, err) == 0);
    CHECK(tensors_get(&f, err, "c", T_F32, 2, 4, -1) == NULL);
    CHECK_STR(err, "tensor c is missing, expected F32 [4, any]");
    CHECK(tensors_get(&f, err, "a", T_F16, 1, 3) == NULL);
    CHECK_STR(err, "tensor a: expected F16 [3], found F32 [3]");
    CHECK(tensors_get(&f, err, "b", T_U8, 2, 5, 2) == NULL);
    CHECK_STR(err, "tensor b: expected U8 [5, 2], found U8 [2, 5]");
    CHECK(tensors_get(&f, err, "b", T_U8, 1, 10) == NULL);
    CHECK(tensors_get(&f, err, "b", T_U8, 2, -1, 5) != NULL);
    tensors_close(&f);
}

static void test_meta_numbers(void) {
    TensorFile f;
    int n;
    float x;
    CHECK(open_header(
              &f,
              "{\"__metadata__\":{\"a\":\"12\",\"b\":\"12x\",\"c\":\"\",\"d\":\"99999999999\","
              "\"e\":\"nan\",\"f\":\"0.25\",\"g\":\"-3\",\"h\":\"1e999\"}}",
              0) == 0);
    CHECK(tensors_meta_int(&f, "a", 1, 12, &n, err) == 0 && n == 12);
    CHECK(tensors_meta_int(&f, "g", -3, 0, &n, err) == 0 && n == -3);
    CHECK(tensors_meta_int(&f, "a", 13, 20, &n, err) != 0);
    CHECK_STR(err, "metadata a: expected a whole number from 13 to 20, found \"12\"");
    for (const char *key = "bcdef"; *key; key++)
        CHECK(tensors_meta_int(&f, (char[]){*key, 0}, -1000, 1000, &n, err) != 0);
    CHECK(tensors_meta_int(&f, "absent", 0, 1, &n, err) != 0);
    CHECK_STR(err, "metadata absent is missing");
    CHECK(tensors_meta_float(&f, "f", 0, 1, &x, err) == 0 && x == 0.25f);
    CHECK(tensors_meta_float(&f, "a", 0, 100, &x, err) == 0 && x == 12.0f);
    for (const char *key = "bcegh"; *key; key++)
        CHECK(tensors_meta_float(&f, (char[]){*key, 0}, 0, 1000, &x, err) != 0);
    CHECK(tensors_meta_float(&f, "absent", 0, 1, &x, err) != 0);
    tensors_close(&f);
}

#define T(name, dtype, shape, from, to)                                                          \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" from "," to \
    "]}"

// Headers that must be refused, each with the number of data bytes behind it.
static const struct {
    const char *header;
    size_t data;
} broken[] = {
    {"", 0},
    {"{", 0},
    {"[]", 0},
    {"{}x", 0},
    {"{}", 1},
    {"{,}", 0},
    {"{\"a\"}", 0},
    {"{\"a\":1}", 0},
    {"{\"a\":{}}", 0},
    {"{" T("a", "F32", "1", "0", "4"), 4},
    {"{" T("a", "F32", "1", "0", "4") ",}", 4},
    {"{" T("a", "F32", "1", "0", "4") "}", 3},
    {"{" T("a", "F32", "1", "0", "4") "}", 5},
    {"{" T("a", "F32", "2", "0", "4") "}", 4},
    {"{" T("a", "F99", "1", "0", "4") "}", 4},
    {"{" T("a", "F32", "1", "4", "0") "}", 4},
    {"{" T("a", "F32", "1", "4", "8") "}", 8},
    {"{" T("a", "F32", "-1", "0", "4") "}", 4},
    {"{" T("a", "F32", "1.0", "0", "4") "}", 4},
    {"{" T("a", "F32", "01", "0", "4") "}", 4},
    {"{" T("a", "F32", "1,", "0", "4") "}", 4},
    {"{" T("a", "F32", "1 1", "0", "4") "}", 4},
    {"{" T("a", "U8", "1,1,1,1,1,1,1,1,1", "0", "1") "}", 1},
    {"{" T("a", "U8", "1", "0,0", "1") "}", 1},
    {"{" T("a", "U8", "18446744073709551617", "0", "1") "}", 1},
    {"{" T("a", "F32", "4611686018427387905", "0", "4") "}", 4},
    {"{" T("a", "U8", "4294967296,4294967297", "0", "4") "}", 4},
    {"{" T("a", "U8", "4", "18446744073709551612", "18446744073709551615") "}", 4},
    {"{" T("a", "U8", "4", "0", "4") "," T("a", "U8", "4", "4", "8") "}", 8},
    {"{" T("a", "U8", "4", "0", "4") "," T("b", "U8", "4", "2", "6") "}", 6},
    {"{" T("a", "U8", "4", "0", "4") "," T("b", "U8", "4", "6", "10") "}", 10},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"shape\":[1]}}", 1},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"other\":[1]}}", 1},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[[1]],\"data_offsets\":[0,1]}}", 1},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1]}}", 1},
    {"{\"__metadata__\":{\"a\":1}}", 0},
    {"{\"__metadata__\":{\"a\":{}}}", 0},
    {"{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"1\"},\"__metadata__\":{\"b\":\"2\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"\\x\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"\\u12\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"\\u12G4\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"\\u0000\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"\\ud83d\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"\\ud83d\\u0041\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"\\ude00\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"\n\"}}", 0},
    {"{\"__metadata__\":{\"a\":\"\\", 0},
    {"{\"__metadata__\":{\"a\":\"\\u", 0},
};

static void test_broken_headers(void) {
    TensorFile f;
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        bool refused = open_header(&f, broken[i].header, broken[i].data) != 0;
        if (!CHECK(refused && err[0] != 0)) printf("  accepted: %s\n", broken[i].header);
        CHECK(f.map == NULL && f.tensors == NULL && f.strings == NULL);
        tensors_close(&f);
    }
}

static void test_odd_but_right(void) {
    TensorFile f;
    CHECK(open_header(&f, "{}", 0) == 0 && f.n_tensors == 0);
    CHECK(tensors_find(&f, "a") == NULL && tensors_meta(&f, "a") == NULL);
    tensors_close(&f);
    CHECK(open_header(&f,
                      " { \"__metadata__\" : { } , \n" T("a", "U8", " 2 , 2 ", " 0 ", " 4 ") " }  ",
                      4) == 0);
    CHECK(tensors_get(&f, err, "a", T_U8, 2, 2, 2) != NULL);
    tensors_close(&f);
    CHECK(open_header(&f, "{\"__metadata__\":{\"\\u00e9\":\"\\ud83d\\ude00 \\t\\\\\\/ \\u20AC\"}}",
                      0) == 0);
    CHECK_STR(tensors_meta(&f, "\xc3\xa9"), "\xf0\x9f\x98\x80 \t\\/ \xe2\x82\xac");
    tensors_close(&f);
    // A foreign file's float that lies on an odd byte can be read as bytes, not used in place.
    CHECK(open_header(&f, "{" T("b", "F32", "1", "1", "5") "," T("a", "U8", "1", "0", "1") "}",
                      5) == 0);
    const Tensor *b = tensors_find(&f, "b"), *in_place = tensors_get(&f, err, "b", T_F32, 1, 1);
    CHECK(b != NULL && b->bytes == 4 && ((uintptr_t)b->data % 4 == 0) == (in_place != NULL));
    tensors_close(&f);
    CHECK(open_header(&f, "{" T("a", "F32", "0,18446744073709551615", "0", "0") "}", 0) == 0);
    tensors_close(&f);
}

static uint8_t *read_file(size_t *n) {
    FILE *file = fopen(path, "rb");
    fseek(file, 0, SEEK_END);
    *n = (size_t)ftell(file);
    rewind(file);
    uint8_t *bytes = malloc(*n);
    if (fread(bytes, 1, *n, file) != *n) exit(2);
    fclose(file);
    return bytes;
}

// Cut at every length: refused. One byte changed anywhere in the header: refused or still
// consistent.
static void test_cut_and_corrupt(void) {
    TensorWriter w;
    TensorFile f;
    size_t n;
    CHECK(write_sample(&w) == 0 && tensors_write_commit(&w, err) == 0);
    uint8_t *bytes = read_file(&n);
    for (size_t i = 0; i < n; i++) CHECK(open_bytes(&f, bytes, i) != 0 && err[0] != 0);
    for (size_t i = 0; i < 512 && i < n; i++) {
        uint8_t was = bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            bytes[i] = (uint8_t)(was ^ 1 << bit);
            if (open_bytes(&f, bytes, n) != 0) continue;
            for (int t = 0; t < f.n_tensors; t++) {
                const uint8_t *from = f.tensors[t].data;
                CHECK(from >= f.map && from + f.tensors[t].bytes <= f.map + f.map_bytes);
            }
            tensors_close(&f);
        }
        bytes[i] = was;
    }
    free(bytes);
}

static void test_unopenable(void) {
    TensorFile f;
    char name[2000];
    CHECK(tensors_open(&f, "/nonexistent/file", err) != 0);
    CHECK_STR(err, "cannot open: No such file or directory");
    CHECK(tensors_open(&f, dir, err) != 0);
    CHECK_STR(err, "not a regular file");
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = 0;
    CHECK(tensors_open(&f, name, err) != 0);
    CHECK(open_bytes(&f, "\xff\xff\xff\xff\xff\xff\xff\xff", 8) != 0);
    tensors_close(&(TensorFile){0});
}

// A name as long as a header allows does not overrun the message.
static void test_long_name(void) {
    TensorFile f;
    size_t n = 100000;
    char *header = malloc(n + 100);
    strcpy(header, "{\"");
    memset(header + 2, 'n', n);
    strcpy(header + 2 + n, "\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,1]}}");
    CHECK(open_header(&f, header, 1) != 0 && strlen(err) < ERR_LEN);
    free(header);
}

static void test_abort_leaves_nothing(void) {
    TensorWriter w = {0};
    tensors_write_abort(&w);  // zeroed
    unlink(path);
    CHECK(write_sample(&w) == 0 && n_files() == 1);
    tensors_write_abort(&w);
    tensors_write_abort(&w);
    CHECK(n_files() == 0);
    CHECK(tensors_write_begin(&w, "/nonexistent/file", err) != 0);
    CHECK_STR(err, "cannot be written: No such file or directory");
    CHECK(tensors_write_begin(&w, dir, err) != 0);  // a rename must not replace what is no file
    CHECK(tensors_write_begin(&w, "/dev/null", err) != 0);
    CHECK_STR(err, "cannot be written: not a regular file");
}

static void test_misuse_aborts(void) {
    const size_t shape[] = {4}, huge[] = {SIZE_MAX / 2, 3};
    TensorWriter w;
    unlink(path);
    CHECK(write_sample(&w) == 0 && tensors_write_put(&w, "x", 1, err) != 0);  // too much
    CHECK(tensors_write_commit(&w, err) != 0 && n_files() == 0);
    CHECK(tensors_write_begin(&w, path, err) == 0);
    CHECK(tensors_write_declare(&w, "a", T_U8, 1, shape, err) == 0);
    CHECK(tensors_write_put(&w, "xyz", 3, err) == 0);
    CHECK(tensors_write_commit(&w, err) != 0 && n_files() == 0);  // too little
    CHECK_STR(err, "data is missing: tensor a");
    CHECK(tensors_write_begin(&w, path, err) == 0);
    CHECK(tensors_write_declare(&w, "a", T_U8, 1, shape, err) == 0);
    CHECK(tensors_write_declare(&w, "a", T_U8, 1, shape, err) != 0 && n_files() == 0);
    CHECK(tensors_write_begin(&w, path, err) == 0);
    CHECK(tensors_write_declare(&w, "a", T_F64, 2, huge, err) != 0 && n_files() == 0);
    CHECK(tensors_write_begin(&w, path, err) == 0);
    CHECK(tensors_write_declare(&w, "a", T_U8, 1, shape, err) == 0);
    CHECK(tensors_write_put(&w, "abcd", 4, err) == 0);
    CHECK(tensors_write_meta(&w, "late", "x", err) != 0 && n_files() == 0);
}

static void test_commit_replaces(void) {
    TensorWriter w;
    TensorFile old, new;
    CHECK(write_sample(&w) == 0 && tensors_write_commit(&w, err) == 0);
    CHECK(tensors_open(&old, path, err) == 0);
    CHECK(tensors_write_begin(&w, path, err) == 0 && tensors_write_commit(&w, err) == 0);  // empty
    CHECK(tensors_find(&old, "a") != NULL);  // the map outlives the name
    CHECK(tensors_open(&new, path, err) == 0 && new.n_tensors == 0);
    tensors_close(&old);
    tensors_close(&new);
}

// A disk that is full, played by a limit on the size of files.
static void test_full_disk(void) {
    struct rlimit was, small;
    TensorWriter w;
    const size_t shape[] = {1 << 20};
    char *block = calloc(1, 1 << 20);
    unlink(path);
    getrlimit(RLIMIT_FSIZE, &was);
    small = was;
    signal(SIGXFSZ, SIG_IGN);
    for (rlim_t limit = 0; limit < 1 << 20; limit += 100000) {
        small.rlim_cur = limit;
        setrlimit(RLIMIT_FSIZE, &small);
        int status = tensors_write_begin(&w, path, err);
        if (status == 0) status = tensors_write_declare(&w, "a", T_U8, 1, shape, err);
        if (status == 0) status = tensors_write_put(&w, block, 1 << 20, err);
        if (status == 0) status = tensors_write_commit(&w, err);
        setrlimit(RLIMIT_FSIZE, &was);
        CHECK(status != 0 && n_files() == 0);
        CHECK_STR(err, "cannot write: File too large");
    }
    free(block);
}

int main(void) {
    strcpy(dir, "/tmp/test_tensors.XXXXXX");
    if (mkdtemp(dir) == NULL) return 2;
    snprintf(path, sizeof path, "%s/file", dir);
    test_round_trip();
    test_get_says_what_is_wrong();
    test_meta_numbers();
    test_broken_headers();
    test_odd_but_right();
    test_cut_and_corrupt();
    test_unopenable();
    test_long_name();
    test_abort_leaves_nothing();
    test_misuse_aborts();
    test_commit_replaces();
    test_full_disk();
    unlink(path);
    rmdir(dir);
    return test_end("test_tensors");
}
