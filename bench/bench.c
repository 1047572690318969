// bench.c: how fast this machine runs a model, without judging the answers.
//
// Every figure is a median of a few repetitions over pseudo-random ids, always the same ones. For
// depth D the context is really read and scored, and for ratio R really evicted by these scores,
// so that heads have the uneven lengths they have in use. Decode steps compute logits and feed the
// next pseudo-random id: what is timed is a step, not the sampling. The machine's own peaks are
// measured first: reading a buffer that no cache holds, and the instructions of the products alone.
// The model and the cache count the operations they are asked for, so a row's share of the peaks is
// what the work needs, without what tiles and pages compute in vain.
#define _POSIX_C_SOURCE 200809L
#define _DARWIN_C_SOURCE  // mkdtemp
#include "bench/bench.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kvfile.h"
#include "util.h"

enum { REPEATS = 3 };
static const double LONG_RUN = 4.0;  // seconds after which a figure is not repeated

// Multiplications and additions.
typedef struct {
    double matrix[W_TYPES], attention;
} Work;

typedef struct {
    const Bench *b;
    const Model *model;
    BenchPeaks peaks;
    KVCache kv;
    int *ids;      // [max_depth or longest prompt] the synthetic context
    float *score;  // [scored layers][n_kv_heads][depth]
    uint8_t *keep;
    size_t weights;      // bytes a decode step reads
    const Reads *reads;  // at work, NULL: all is read
} Run;

static double median(double *v, int n) {
    for (int i = 1; i < n; i++)
        for (int j = i; j > 0 && v[j] < v[j - 1]; j--) {
            double swap = v[j];
            v[j] = v[j - 1];
            v[j - 1] = swap;
        }
    return n % 2 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

static size_t matrix_bytes(const Matrix *w) {
    size_t numbers = (size_t)w->panels * PANEL * w->cols_padded;
    size_t groups = numbers / QGROUP * sizeof(uint16_t);
    return numbers * 4 / wtype_k(w->type) + (w->scale ? groups : 0) + (w->offset ? groups : 0);
}

// Of a stack of experts a token reads those it uses.
static bool is_stack(const Layer *w, const Matrix *m) {
    return m == &w->experts.w1 || m == &w->experts.w2 || m == &w->experts.w3;
}

size_t bench_weight_bytes(const Model *m) {
    size_t sum = matrix_bytes(&m->wcls);
    for (int l = 0; l < m->config.n_layers; l++) {
        const Layer *w = &m->layers[l];
        const Matrix *all[LAYER_MATRICES];
        int n = layer_matrices(w, all);
        for (int i = 0; i < n; i++) {
            size_t bytes = matrix_bytes(all[i]);
            if (is_stack(w, all[i])) bytes = bytes / m->config.n_experts * m->config.n_used;
            sum += bytes;
        }
    }
    return sum;
}

// ids [n]: a fixed pseudo-random sequence without control tokens.
static void fill_ids(int *ids, int n, const Tokenizer *tok, int vocab) {
    int known = min_int(tokenizer_n_vocab(tok), vocab);
    uint64_t x = 1;
    for (int i = 0; i < n; i++) {
        int id = 0;
        for (int tries = 0; tries < 100; tries++) {
            id = (int)(random_next(&x) % (unsigned)known);
            if (!tokenizer_is_special(tok, id)) break;
        }
        ids[i] = id;
    }
}

static Context context_of(Run *r, int seq, int depth, bool local) {
    Context c = r->b->method;
    c.state = r->b->state, c.kv = &r->kv, c.tok = r->b->tok, c.seq = seq;
    c.ids = r->ids, c.n_ctx = depth, c.local = local;
    if (c.chunk == 0) c.chunk = default_chunk(local);
    c.postfix = tokenizer_chat(r->b->tok)->kvzip_postfix;
    return c;
}

// ---- peaks ----

static const double PEAK_SECONDS = 0.1;  // for each

static void run_peak(void *ctx, int i) {
    volatile float keep = ((const Peak *)ctx)->run(4000);
    (void)i, (void)keep;
}

static double peak_gflop_per_s(ThreadPool *pool, const Peak *p) {
    int n = 16 * pool_threads(pool);
    double best = 0.0;
    for (double begin = now(), start = begin; start - begin < PEAK_SECONDS;) {
        parallel_for(pool, n, run_peak, (void *)p);
        double end = now();
        best = fmax(best, 1e-9 * n * 4000 * p->ops / (end - start));
        start = end;
    }
    return best;
}

enum { READ_CHUNK = 1 << 20 };  // several times what caches hold

static void touch_chunk(void *ctx, int i) {
    memset((uint8_t *)ctx + i * (size_t)READ_CHUNK, 1, READ_CHUNK);
}

static void read_chunk(void *ctx, int i) {
    const uint64_t *p = (const uint64_t *)ctx + i * (size_t)READ_CHUNK / sizeof *p;
    uint64_t sum[8] = {0};
    for (size_t j = 0; j < READ_CHUNK / sizeof *p; j += 8)
        for (int k = 0; k < 8; k++) sum[k] += p[j + k];
    volatile uint64_t keep = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
    (void)keep;
}

static int peak_gb_per_s(ThreadPool *pool, double *best, char *err) {
    void *buffer = malloc(BENCH_READ_BYTES);
    if (!buffer) return fail(err, "out of memory: %d MB to read", BENCH_READ_BYTES >> 20);
    parallel_for(pool, BENCH_READ_BYTES / READ_CHUNK, touch_chunk, buffer);
    for (double begin = now(), start = begin; start - begin < PEAK_SECONDS;) {
        parallel_for(pool, BENCH_READ_BYTES / READ_CHUNK, read_chunk, buffer);
        double end = now();
        *best = fmax(*best, 1e-9 * BENCH_READ_BYTES / (end - start));
        start = end;
    }
    free(buffer);
    return 0;
}

static int measure_peaks(Run *r, char *err) {
    ThreadPool *pool = r->b->state->pool;
    BenchPeaks *p = &r->peaks;
    for (int i = 0; i < W_TYPES; i++) {
        int same = 0;  // the first type that has the same peak
        while (kern.peak[same] != kern.peak[i]) same++;
        p->gflop_per_s[i] = same < i ? p->gflop_per_s[same] : peak_gflop_per_s(pool, kern.peak[i]);
    }
    bool f32 = r->b->kv.k == KV_F32 || r->b->kv.v == KV_F32 || kern.peak_packed == kern.peak[W_F32];
    p->attention = f32 ? p->gflop_per_s[W_F32] : peak_gflop_per_s(pool, kern.peak_packed);
    if (peak_gb_per_s(pool, &p->gb_per_s, err) != 0) return -1;
    r->b->peaks(r->b->arg, p);
    return 0;
}

// ---- rows ----

static Work work_so_far(const Run *r) {
    Work w = {.attention = r->kv.ops};
    memcpy(w.matrix, r->b->state->ops, sizeof w.matrix);
    return w;
}

static Work work_between(Work before, Work after) {
    after.attention -= before.attention;
    for (int i = 0; i < W_TYPES; i++) after.matrix[i] -= before.matrix[i];
    return after;
}

// Hands out a row of work w.
static void emit(const Run *r, BenchRow row, const Work *w) {
    const BenchPeaks *p = &r->peaks;
    double ops = w->attention, at_peak = ops / p->attention;
    for (int i = 0; i < W_TYPES; i++)
        ops += w->matrix[i], at_peak += w->matrix[i] / p->gflop_per_s[i];
    double memory = row.gb_per_s / p->gb_per_s, compute = 1e-9 * at_peak / row.seconds;
    row.gflop_per_s = 1e-9 * ops / row.seconds;
    row.share = fmax(memory, compute);
    if (r->reads) row.reader = r->reads->row->name;
    row.pages_read = kvcache_read_share(&r->kv);
    row.bound = ops == 0.0 ? NULL : memory > compute ? "memory" : "compute";
    r->b->row(r->b->arg, &row);
}

// ---- readers ----

static int n_readers(const Run *r) { return max_int(r->b->n_reads, 1); }

// From now on reader i is at work; i -1: none.
static int read_by(Run *r, int i, char *err) {
    const Reads all = {NULL, {0}}, *reads = i >= 0 && i < r->b->n_reads ? &r->b->reads[i] : &all;
    r->reads = reads->row ? reads : NULL;
    return reader_begin(reads, &r->kv, err);
}

// ---- prefill ----

static int prefill_row(Run *r, int n, char *err) {
    double t[REPEATS], begin = now();
    int done = 0;
    Work work = {.attention = 0};
    while (done < REPEATS && (done == 0 || now() - begin < LONG_RUN)) {
        int seq = kvcache_new(&r->kv, err);
        if (seq < 0) return -1;
        Context c = context_of(r, seq, n, false);
        Work before = work_so_far(r);
        double start = now();
        if (context_read(&c, err) != 0) return -1;
        t[done++] = now() - start;
        work = work_between(before, work_so_far(r));
        kvcache_drop(&r->kv, seq);
    }
    double s = median(t, done);
    BenchRow row = {
        .work = "prefill", .n = n, .ratio = 1, .batch = 1, .tokens_per_s = n / s, .seconds = s};
    emit(r, row, &work);
    return 0;
}

// Readers of steps alone change nothing here.
static int bench_prefill(Run *r, int n, char *err) {
    for (int i = 0; i < n_readers(r); i++) {
        if (read_by(r, i, err) != 0) return -1;
        if (r->reads && r->reads->row->how->runs == READS_STEPS) continue;
        if (prefill_row(r, n, err) != 0) return -1;
    }
    return read_by(r, -1, err);
}

// ---- scoring ----

// Notes the work done when the last token of a context has been read.
typedef struct {
    const Run *run;
    Work read;
} Reading;

static int note_read(void *arg, const char *what, long done, long total) {
    Reading *n = arg;
    if (strcmp(what, "read") == 0) n->read = work_so_far(n->run);
    (void)done, (void)total;
    return 0;
}

// Reads and scores the first depth ids. Returns a sequence that holds them, or -1. The prefill that
// scoring stands on gives a row of its own, so that the two can be compared.
static int bench_score(Run *r, int depth, bool local, char *err) {
    int seq = kvcache_new(&r->kv, err);
    if (seq < 0) return -1;
    Context c = context_of(r, seq, depth, local);
    Work begin = work_so_far(r);
    Reading reading = {.run = r};
    c.progress = note_read, c.progress_arg = &reading;
    r->kv.settling = false;  // exact keys are scored
    if (context_score(&c, c.policy, r->score, err) != 0) return -1;
    Work prefill = work_between(begin, reading.read),
         scoring = work_between(reading.read, work_so_far(r));
    BenchRow read = {.work = "prefill",
                     .n = depth,
                     .ratio = 1,
                     .batch = 1,
                     .tokens_per_s = depth / c.prefill_s,
                     .seconds = c.prefill_s};
    BenchRow score = {.work = "score",
                      .score_attn = local ? "local" : "full",
                      .n = depth,
                      .depth = depth,
                      .ratio = 1,
                      .batch = 1,
                      .tokens_per_s = depth / c.score_s,
                      .seconds = c.score_s,
                      .to_prefill = c.score_s / c.prefill_s,
                      .cache_bytes = kvcache_bytes(&r->kv, seq)};
    if (!local) emit(r, read, &prefill);
    emit(r, score, &scoring);
    r->kv.settling = true;
    return seq;
}

// ---- decode ----

// Seconds of n steps of `batch` forks of seq.
static int decode_once(Run *r, int seq, int batch, int n, double *seconds, char *err) {
    Row *rows = calloc(batch, sizeof *rows);
    if (!rows) return fail(err, "out of memory");
    int made = 0, rc = 0;
    for (; made < batch && rc == 0; made++) {
        rows[made] = (Row){.seq = kvcache_fork(&r->kv, seq, err), .logits = true};
        if (rows[made].seq < 0) rc = -1;
    }
    double start = now();
    for (int i = 0; i < n && rc == 0; i++) {
        for (int j = 0; j < batch; j++) rows[j].token = r->ids[i * batch + j];
        rc = forward(r->b->state, &r->kv, rows, batch, err);
    }
    *seconds = now() - start;
    for (int j = 0; j < made; j++)
        if (rows[j].seq >= 0) kvcache_drop(&r->kv, rows[j].seq);
    free(rows);
    return rc;
}

static int decode_rows(Run *r, int seq, int depth, double ratio, char *err) {
    size_t cache = kvcache_bytes(&r->kv, seq);
    for (int i = 0; i < r->b->batches.n; i++) {
        int batch = (int)r->b->batches.v[i], n = r->b->n, done = 0;
        double t[REPEATS], begin = now();
        Work work = {.attention = 0};
        while (done < REPEATS && (done == 0 || now() - begin < LONG_RUN)) {
            Work before = work_so_far(r);
            if (decode_once(r, seq, batch, n, &t[done++], err) != 0) return -1;
            work = work_between(before, work_so_far(r));
        }
        double s = median(t, done), share = kvcache_read_share(&r->kv);
        BenchRow row = {.work = "decode",
                        .n = n,
                        .depth = depth,
                        .ratio = ratio,
                        .batch = batch,
                        .tokens_per_s = n * batch / s,
                        .seconds = s,
                        .cache_bytes = cache,
                        .gb_per_s = 1e-9 * ((double)r->weights + share * (double)cache) * n / s};
        emit(r, row, &work);
    }
    return 0;
}

// Readers of prompts alone change nothing here.
static int bench_decode(Run *r, int seq, int depth, double ratio, char *err) {
    for (int i = 0; i < n_readers(r); i++) {
        if (read_by(r, i, err) != 0) return -1;
        if (r->reads && r->reads->row->how->runs == READS_PROMPTS) continue;
        if (decode_rows(r, seq, depth, ratio, err) != 0) return -1;
    }
    return read_by(r, -1, err);
}

// ---- loading ----

static int load_once(const Run *r, const char *path, double *seconds, char *err) {
    KVCache kv = {0};
    KVInfo info;
    KVModel model = {model_kv_shape(r->model), r->model->fingerprint};
    double start = now();
    int rc = kvfile_load(&kv, path, &model, r->b->state->pool, &info, err);
    *seconds = now() - start;
    kvcache_close(&kv);
    return rc;
}

// Saves the cache in a folder of its own, whose name nobody can foresee, loads it several times and
// removes both.
static int time_loads(Run *r, int seq, const KVInfo *info, double *seconds, char *err) {
    const char *tmp = getenv("TMPDIR");
    char dir[1024], path[1040];
    snprintf(dir, sizeof dir, "%s/run-bench.XXXXXX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(dir)) return fail(err, "%s: %s", dir, strerror(errno));
    snprintf(path, sizeof path, "%s/cache", dir);
    int rc = kvfile_save(&r->kv, seq, path, info, err);
    for (int i = 0; i < REPEATS && rc == 0; i++) rc = load_once(r, path, &seconds[i], err);
    unlink(path);
    rmdir(dir);
    return rc;
}

static int bench_load(Run *r, int seq, int depth, double ratio, char *err) {
    KVInfo info = {.fingerprint = r->model->fingerprint,
                   .model = r->model->name,
                   .policy = r->b->method.policy->name,
                   .n_ctx = depth,
                   .ratio = ratio,
                   .ids = r->ids,
                   .n_ids = depth};
    double t[REPEATS];
    if (time_loads(r, seq, &info, t, err) != 0) return -1;
    double s = median(t, REPEATS);
    BenchRow row = {.work = "load",
                    .n = depth,
                    .depth = depth,
                    .ratio = ratio,
                    .batch = 1,
                    .tokens_per_s = depth / s,
                    .seconds = s,
                    .cache_bytes = kvcache_bytes(&r->kv, seq)};
    emit(r, row, &(Work){.attention = 0});
    return 0;
}

// ---- all of it ----

// A fork of seq from which all but the best `ratio` of the pairs are gone and whose pages have
// settled, or -1.
static int evicted_fork(Run *r, int seq, int depth, double ratio, char *err) {
    int fork = kvcache_fork(&r->kv, seq, err);
    if (fork < 0) return -1;
    Context c = context_of(r, fork, depth, false);
    if (ratio < 1 && context_scores(&c) > 0) {
        if (context_select(&c, r->score, ratio, r->keep, err) < 0) return -1;
        if (kvcache_evict(&r->kv, fork, 0, depth, r->keep, err) != 0) return -1;
    }
    return kvcache_settle(&r->kv, fork, err) == 0 ? fork : -1;
}

static int bench_depth(Run *r, int depth, char *err) {
    if (depth == 0) {
        int seq = kvcache_new(&r->kv, err);
        if (seq < 0 || bench_decode(r, seq, 0, 1, err) != 0) return -1;
        kvcache_drop(&r->kv, seq);
        return 0;
    }
    int local = bench_score(r, depth, true, err);
    if (local < 0) return -1;
    kvcache_drop(&r->kv, local);
    int full = bench_score(r, depth, false, err);
    if (full < 0) return -1;
    for (int i = 0; i < r->b->ratios.n; i++) {
        double ratio = r->b->ratios.v[i];
        int seq = evicted_fork(r, full, depth, ratio, err);
        if (seq < 0) return -1;
        if (bench_decode(r, seq, depth, ratio, err) != 0) return -1;
        if (bench_load(r, seq, depth, ratio, err) != 0) return -1;
        kvcache_drop(&r->kv, seq);
    }
    kvcache_drop(&r->kv, full);
    return 0;
}

static int largest(const BenchList *list) {
    double most = 0;
    for (int i = 0; i < list->n; i++) most = fmax(most, list->v[i]);
    return (int)most;
}

static int run_all(Run *r, char *err) {
    const Bench *b = r->b;
    KVShape shape = model_kv_shape(r->model);
    int depth = largest(&b->depths), prompt = largest(&b->prompts);
    int n_ids = max_int(b->n * largest(&b->batches), max_int(depth, prompt));
    size_t pairs = (size_t)kvcache_scored_layers(&shape, NULL) * shape.n_kv_heads * depth + 1;
    r->ids = malloc((size_t)n_ids * sizeof *r->ids);
    r->score = malloc(pairs * sizeof *r->score);
    r->keep = malloc(pairs);
    if (!r->ids || !r->score || !r->keep) return fail(err, "out of memory");
    fill_ids(r->ids, n_ids, b->tok, r->model->config.vocab_size);
    if (kvcache_open(&r->kv, &shape, b->kv, b->state->pool, err) != 0) return -1;
    for (int i = 0; i < b->prompts.n; i++)
        if (bench_prefill(r, (int)b->prompts.v[i], err) != 0) return -1;
    for (int i = 0; i < b->depths.n; i++)
        if (bench_depth(r, (int)b->depths.v[i], err) != 0) return -1;
    return 0;
}

int bench_run(const Bench *b, char *err) {
    Run r = {.b = b, .model = b->state->model, .weights = bench_weight_bytes(b->state->model)};
    int rc = measure_peaks(&r, err) == 0 ? run_all(&r, err) : -1;
    kvcache_close(&r.kv);
    free(r.ids);
    free(r.score);
    free(r.keep);
    return rc;
}
