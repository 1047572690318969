// fuzz_files.c: libFuzzer target for what is read beside models: caches, with attention over them,
// profiles, tasks, results and their merging. Run in the project's directory.
//
// The first byte picks the kind; what follows is the file, or for a cache and a profile a list of
// changes to a valid one, three bytes of place and one of value each, so that most of them pass the
// checks and are computed with.
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "eval/results.h"
#include "eval/tasks.h"
#include "fixture.h"
#include "kvfile.h"

static Fixture tiny;
static uint8_t *valid[3];  // a cache of exact pages, one of settled and demoted ones, a profile
static size_t valid_bytes[3];
static int valid_file[3];
static char valid_path[3][32], file_path[32];
static int file = -1;     // of tasks and results
static const char *path;  // of the file at hand

static void must(bool ok) {
    if (!ok) abort();
}

static int open_memory(char name[32]) {
    int fd = memfd_create("fuzz", 0);
    snprintf(name, 32, "/proc/self/fd/%d", fd);
    return fd;
}

static void put_file(const void *data, size_t n) {
    path = file_path;
    must(ftruncate(file, 0) == 0 && pwrite(file, data, n, 0) == (ssize_t)n);
}

// Reads a context of 200 tokens into a cache of these types, evicts or demotes, and saves it.
static void make_cache(int i, KVTypes types) {
    static uint8_t keep[64 * 200];
    int ids[200], seq;
    KVShape shape = model_kv_shape(&tiny.model);
    KVCache kv;
    must(kvcache_open(&kv, &shape, types, NULL, err) == 0);
    seq = kvcache_new(&kv, err);
    for (int t = 0; t < 200; t++) {
        ids[t] = t % 300;
        must(forward(&tiny.state, &kv, &(Row){seq, ids[t], false}, 1, err) == 0);
    }
    for (size_t t = 0; t < sizeof keep; t++) keep[t] = t % 3 == 0;
    must((i ? kvcache_demote : kvcache_evict)(&kv, seq, 0, 200, keep, err) == 0);
    must(kvcache_settle(&kv, seq, err) == 0);
    KVInfo info = {.fingerprint = tiny.model.fingerprint,
                   .model = "m",
                   .policy = "kvzip",
                   .n_ctx = 200,
                   .ratio = 0.3,
                   .ids = ids,
                   .n_ids = 200};
    must(kvfile_save(&kv, seq, path, &info, err) == 0);
    kvcache_close(&kv);
    valid[i] = (uint8_t *)file_read(path, &valid_bytes[i], err);
}

static void begin(void) {
    CalibrateResult r;
    char made[64];
    snprintf(made, sizeof made, "/tmp/fuzz_files.%ld", (long)getpid());
    path = made;
    kernels_init(NULL);
    must(fixture_open(&tiny, "smol", "smol-q8.kvz", KV_F16, 1));
    make_cache(0, kvcache_both(KV_F16));
    make_cache(1, (KVTypes){KV_Q8, KV_Q4});
    must(fixture_calibrate(&tiny, path, false, &r) == 0);
    valid[2] = (uint8_t *)file_read(path, &valid_bytes[2], err);
    unlink(path);
    file = open_memory(file_path);
    for (int i = 0; i < 3; i++) {
        valid_file[i] = open_memory(valid_path[i]);
        must(pwrite(valid_file[i], valid[i], valid_bytes[i], 0) == (ssize_t)valid_bytes[i]);
    }
}

// The valid file `which` with changes [n], or as it was again; half of the places lie in the header
// and the lists at the end, where meaning is.
static void put_changes(int which, const uint8_t *p, size_t n, bool undo) {
    size_t bytes = valid_bytes[which];
    path = valid_path[which];
    for (; n >= 4; p += 4, n -= 4) {
        size_t at = (size_t)(p[0] | p[1] << 8 | p[2] << 16);
        at = p[0] & 1 ? at % bytes : p[0] & 2 ? bytes - 1 - at % 4096 : at % 4096;
        must(pwrite(valid_file[which], undo ? &valid[which][at] : &p[3], 1, (off_t)at) == 1);
    }
}

// Attention over what was loaded, new tokens after it, and what comes of it saved.
static void use_cache(void) {
    KVModel model = {model_kv_shape(&tiny.model), tiny.model.fingerprint};
    KVCache kv;
    KVInfo info;
    if (kvfile_load(&kv, path, &model, NULL, &info, err) != 0) return;
    int seq = kvcache_fork(&kv, 0, err);
    Row rows[] = {{seq, 1, false}, {seq, 2, true}};
    if (seq >= 0 && forward(&tiny.state, &kv, rows, 2, err) == 0 &&
        kvcache_settle(&kv, seq, err) == 0)
        must(kvcache_bytes(&kv, seq) > 0);
    kvcache_close(&kv);
}

static void fuzz_cache(void) {
    TensorFile f;
    CacheFacts facts;
    if (tensors_open(&f, path, err) != 0) return;
    if (kvfile_facts(&facts, &f, err) == 0) kvfile_facts_free(&facts);
    tensors_close(&f);
    use_cache();
}

static void fuzz_profile(void) {
    Profile profile;
    int budget[256];
    if (profile_open(&profile, &tiny.model, path, err) != 0) return;
    long sum = 0, heads = profile.n_layers * profile.n_kv_heads;
    must(heads <= 256 && profile_budget(&profile, 0.3, 100, budget, err) == 0);
    for (int i = 0; i < heads; i++) sum += budget[i];
    must(sum == (long)((double)heads * 100 * 0.3));
    profile_close(&profile);
}

static void fuzz_tasks(const uint8_t *p, size_t n) {
    EvalTasks t;
    put_file(p, n);
    if (eval_tasks_open(&t, path, err) != 0) return;
    char answer[64] = "The seven (b) geese, 12.";
    double v;
    must(eval_answer(&t.task[0], &t.task[0].questions[0], answer, &v, err) == 0);
    must(v >= 0 && v <= 1);
    eval_tasks_close(&t);
}

// A file twice, as shards are merged: the second time adds nothing.
static void fuzz_results(const uint8_t *p, size_t n) {
    EvalResults r = {0};
    EvalRow *rows;
    int n_rows;
    put_file(p, n);
    if (eval_results_read(&r, path, err) == 0) {
        int once = r.n;
        must(eval_results_read(&r, path, err) == 0 && r.n == once);
        if (eval_rows(&r, &rows, &n_rows, err) == 0) free(rows);
    }
    eval_results_close(&r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (file < 0) begin();
    if (n == 0) return 0;
    int kind = data[0] % 6, which = kind == 3 ? 2 : kind % 2;
    if (kind == 4) {
        fuzz_tasks(data + 1, n - 1);
    } else if (kind == 5) {
        fuzz_results(data + 1, n - 1);
    } else {
        put_changes(which, data + 1, n - 1, false);
        (which == 2 ? fuzz_profile : fuzz_cache)();
        put_changes(which, data + 1, n - 1, true);
    }
    return 0;
}
