// fuzz.h: what the tests/fuzz_*.c stand on, for libFuzzer under the sanitizers, run in the
// project's directory: what must hold, files in memory, and code that may end the program.
//
// A container of hundreds of kilobytes is not made up by a fuzzer: where one is read, the input is
// a list of changes to a valid one, three bytes of place and one of value each, so that most of
// them pass the checks and are computed with.
#ifndef FUZZ_H
#define FUZZ_H
#define _GNU_SOURCE  // memfd_create
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tokenizer.h"

// Ends the run where it does not hold, and says which line that is.
#define MUST(cond) fuzz_must((cond), __FILE__, __LINE__, #cond)

static inline void fuzz_must(bool ok, const char *file, int line, const char *what) {
    if (ok) return;
    fprintf(stderr, "%s:%d: %s\n", file, line, what);
    abort();
}

// Less of what costs time and finds nothing in runs of a millisecond.
const char *__asan_default_options(void);
const char *__asan_default_options(void) {
    return "malloc_context_size=6:max_malloc_fill_size=0:quarantine_size_mb=4";
}

// ---- files in memory ----

typedef struct {
    int fd;
    char path[32];
} FuzzFile;

static inline FuzzFile fuzz_file(void) {
    FuzzFile f = {.fd = memfd_create("fuzz", MFD_CLOEXEC)};
    MUST(f.fd >= 0);
    snprintf(f.path, sizeof f.path, "/proc/self/fd/%d", f.fd);
    return f;
}

// From here on the file is data [n].
static inline void fuzz_put(const FuzzFile *f, const void *data, size_t n) {
    MUST(ftruncate(f->fd, 0) == 0 && pwrite(f->fd, data, n, 0) == (ssize_t)n);
}

// ---- changes to a valid container (tensors.h) ----

typedef struct {
    FuzzFile file;
    uint8_t *map;    // [bytes] of the file
    uint8_t *valid;  // [bytes] as it was
    size_t bytes, header;
} FuzzValid;

// Takes valid [bytes], malloc'ed, over.
static inline FuzzValid fuzz_valid(uint8_t *valid, size_t bytes) {
    FuzzValid v = {.file = fuzz_file(), .valid = valid, .bytes = bytes};
    uint64_t header;
    MUST(valid && bytes > 4096);
    memcpy(&header, valid, sizeof header);
    v.header = sizeof header + (size_t)header;
    fuzz_put(&v.file, valid, bytes);
    v.map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, v.file.fd, 0);
    MUST(v.map != MAP_FAILED && v.header < bytes);
    return v;
}

// The valid file with changes [n], or with undo as it was again; half of the places lie in the
// header, a quarter in the lists at the end.
static inline void fuzz_change(FuzzValid *v, const uint8_t *p, size_t n, bool undo) {
    for (; n >= 4; p += 4, n -= 4) {
        size_t at = (size_t)(p[0] | p[1] << 8 | p[2] << 16);
        at = p[0] & 1 ? at % v->header : p[0] & 2 ? v->bytes - 1 - at % 4096 : at % v->bytes;
        v->map[at] = undo ? v->valid[at] : p[3];
    }
}

// ---- vocabularies ----

// The tokenizer of tests/fixtures/FAMILY.kvz, which stays open as *file.
static inline Tokenizer *fuzz_tokenizer(const char *family, TensorFile *file) {
    char path[64], err[ERR_LEN];
    snprintf(path, sizeof path, "tests/fixtures/%s.kvz", family);
    MUST(tensors_open(file, path, err) == 0);
    Tokenizer *tok = tokenizer_open(file, err);
    MUST(tok != NULL);
    return tok;
}

// ---- code that may end the program ----

static jmp_buf fuzz_ending;
static bool fuzz_may_end;
void __real_exit(int code);
void __wrap_exit(int code);

// The linker puts it in the place of exit (--wrap).
void __wrap_exit(int code) {
    if (!fuzz_may_end) __real_exit(code);
    MUST(code == 1);  // what is read is wrong, not how the program is used
    longjmp(fuzz_ending, 1);
}

// Calls fn(arg); false: it ended the program, with status 1.
static inline bool fuzz_survives(void (*fn)(void *arg), void *arg) {
    fuzz_may_end = true;
    bool ended = setjmp(fuzz_ending) != 0;
    if (!ended) fn(arg);
    fuzz_may_end = false;
    return !ended;
}
#endif
