// weights.c: where the weights of an open model lie.
#define _GNU_SOURCE  // MADV_HUGEPAGE
#define _DARWIN_C_SOURCE
#include "weights.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LARGE_PAGE = 2 << 20 };
static const size_t SMALL_MODEL = (size_t)256 << 20;  // copying it would save nothing to speak of

#ifdef MADV_HUGEPAGE
static void want_large(void *at, size_t n) { madvise(at, n, MADV_HUGEPAGE); }
#else
static void want_large(void *at, size_t n) { (void)at, (void)n; }
#endif

void weights_advise(const TensorFile *f) {
    if (f->map_bytes >= LARGE_PAGE) want_large((void *)f->map, f->map_bytes);
}

// Large pages would be read from the disk as a whole for one row.
void weights_cold(TensorFile *f, const void *at, size_t n) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = (uintptr_t)at;
    uintptr_t first = (from + page - 1) / page * page, end = (from + n) / page * page;
    f->cold = at, f->cold_bytes = n;
    if (first >= end) return;
#ifdef MADV_NOHUGEPAGE
    madvise((void *)first, end - first, MADV_NOHUGEPAGE);
#endif
    madvise((void *)first, end - first, MADV_RANDOM);
}

// ---- copying ----

// The bytes [from, from + n) of the map, by way of room.
static int copy_block(const TensorFile *f, size_t from, size_t n, uint8_t *room, char *err) {
    uint8_t *at = (uint8_t *)f->map + from;
    memcpy(room, at, n);
    void *new = mmap(at, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_FIXED, -1, 0);
    if (new == MAP_FAILED) return fail(err, "no memory for a copy: %s", strerror(errno));
    want_large(at, n);
    memcpy(at, room, n);
    return 0;
}

int weights_copy(TensorFile *f, double seconds, char *err) {
    double start = now();
    // Up to the next place where a large page may begin; then whole ones.
    size_t first = LARGE_PAGE - (uintptr_t)f->map % LARGE_PAGE;
    uint8_t *room = malloc(LARGE_PAGE);
    int status = room ? 0 : fail(err, "out of memory");
    for (size_t at = 0, n; at < f->map_bytes && status == 0 && now() - start < seconds; at += n) {
        n = at == 0 ? first : LARGE_PAGE;
        if (n > f->map_bytes - at) n = f->map_bytes - at;
        const uint8_t *block = f->map + at;
        if (block >= f->cold && block + n <= f->cold + f->cold_bytes) continue;
        status = copy_block(f, at, n, room, err);
    }
    free(room);
    if (status == 0) mprotect((void *)f->map, f->map_bytes, PROT_READ);
    return status;
}

// ---- what there is ----

// Adds up the large pages that /proc/self/smaps tells of the maps within [from, to).
double weights_large(const TensorFile *f) {
    FILE *maps = fopen("/proc/self/smaps", "r");
    char line[512];
    unsigned long long from, to, kb, begin = (uintptr_t)f->map, end = begin + f->map_bytes;
    double large = 0;
    bool inside = false;
    if (!maps) return -1;
    while (fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%llx-%llx ", &from, &to) == 2)
            inside = from >= begin && from < end;
        else if (inside && (sscanf(line, "AnonHugePages: %llu", &kb) == 1 ||
                            sscanf(line, "FilePmdMapped: %llu", &kb) == 1))
            large += (double)kb * 1024;
    }
    fclose(maps);
    return large / (double)f->map_bytes;
}

// Bytes that can be had without swapping; 0: this system does not say.
static double memory_available(void) {
    FILE *f = fopen("/proc/meminfo", "r");
    char line[128];
    double kb = 0;
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lf", &kb) == 1) break;
    if (f) fclose(f);
    return kb * 1024;
}

bool weights_should_copy(const TensorFile *f) {
    enum { PLACES = 64 };
    if (f->map_bytes < SMALL_MODEL || memory_available() < 3.0 * (double)f->map_bytes) return false;
    for (size_t i = 0; i < PLACES; i++)  // only what was read has pages
        (void)*(const volatile uint8_t *)(f->map + f->map_bytes / PLACES * i);
    double large = weights_large(f) * (double)f->map_bytes;
    return large >= 0 && large < PLACES / 2 * (double)LARGE_PAGE;
}
