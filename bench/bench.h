// bench.h: how fast this machine runs a model: prefill, decode, scoring and loading, row by row,
// beside the most that the machine could do.
#ifndef BENCH_H
#define BENCH_H
#include "policies.h"
#include "readers.h"

enum { BENCH_LIST = 16 };

// Values of a flag.
typedef struct {
    double v[BENCH_LIST];  // [n]
    int n;
} BenchList;

enum { BENCH_READ_BYTES = 256 << 20 };  // in memory while its speed is measured

// What this machine can do at most, with the threads in use: the best of many short stretches.
typedef struct {
    double gb_per_s;              // reading memory
    double gflop_per_s[W_TYPES];  // matrix products, by type of the weights
    double attention;             // GFLOP/s of attention over pages of the cache's full type
} BenchPeaks;

// A figure: the work, how long it took, and how that stands beside the peaks.
typedef struct {
    const char *work;        // prefill, decode, score, load
    const char *score_attn;  // full or local for score, else NULL
    int n;                   // tokens computed (load: tokens the cache has read)
    int depth;               // tokens read before the work starts
    double ratio;            // share of their pairs that is still there
    int batch;               // sequences decoding together, on one shared context
    double tokens_per_s;     // of all sequences together
    double seconds;          // median of the repetitions
    double gb_per_s;         // decode: weights and the shared cache, read once a step; else 0
    double gflop_per_s;      // of matrices and attention together; else 0
    // Time the work takes at the peaks / time it took; over 1 when caches hold all.
    double share;
    const char *bound;   // "memory" or "compute", whichever asks for more; NULL for load
    double to_prefill;   // score: seconds / seconds of the prefill it stands on; else 0
    size_t cache_bytes;  // of one sequence when the work starts
    const char *reader;  // who chose the pages that were read, NULL: all were
    double pages_read;   // share of those that tokens saw
} BenchRow;

// What is to be measured.
typedef struct {
    RunState *state;  // max_logits at least the largest batch
    const Tokenizer *tok;
    KVTypes kv;
    Context method;  // policy, level, chunk (0: the defaults); the rest is filled in
    int n;           // tokens of a decode run
    BenchList prompts, depths, ratios, batches;
    // [n_reads] prefill and decode are measured with each that has a choice there; 0: all is read.
    const Reads *reads;
    int n_reads;
    void (*peaks)(void *arg, const BenchPeaks *peaks);  // called once, first
    void (*row)(void *arg, const BenchRow *row);        // called as rows are done
    void *arg;
} Bench;

// Bytes of weights that one decode step reads: every matrix once, the embedding only as the head.
size_t bench_weight_bytes(const Model *m);

// Measures the peaks, then a prefill per prompt, then for each depth scoring and, for each ratio,
// decoding in every batch size and loading. Returns 0, or -1 with err.
int bench_run(const Bench *b, char *err);
#endif
