// kvcache.h: keys and values of past tokens, in pages, for any number of sequences.
//
// A pair is one token's key and value in one (layer, kv head). A page holds 64 pairs of ONE (layer,
// kv head): keys after RoPE, transposed, [head_dim][64]; values row by row, [64][head_dim]; and the
// pairs' positions. A head is a list of page ids and a length, so heads may have different lengths,
// evicting frees memory, and forks share pages until one of them writes. The position counter of a
// sequence is independent of lengths: eviction never rotates a key.
//
// New pairs are stored in full, f16 or f32. Once 64 newer ones follow it, a page may settle to
// fewer bits (KIVI, arXiv 2402.02750): keys with a scale per channel of the page, values with one
// per pair and 32 channels. Keys of 4 bits are mixed before they are rounded (kvpages.h), and those
// of a head's first page, on which every token leans, get 8. Pairs that would be evicted may be
// demoted to 2 bits instead (No Token Left Behind, arXiv 2402.18096). Pages of all kinds may follow
// one another in a head.
//
//   kvcache.c  sequences: append, settle, fork, evict      attend.c  attention of a batch
//   kvpages.c  pages and what they hold                    tile.c    one tile over one head's pages
//   kvfile.c   saved caches (kvfile.h)                     sweep.c   scoring
//   kvtake.c   sequences of other caches, shorter sequences
//   kvstate.c  states of layers without pairs
#ifndef KVCACHE_H
#define KVCACHE_H
#include "kernels/kernels.h"
#include "tensors.h"

enum { MAX_HEAD_DIM = 512 };

// ---- types of pairs ----

// M4: q4 of mixed channels, what keys settle to that are to be q4. It has no name of its own.
typedef enum { KV_F16, KV_F32, KV_Q8, KV_Q4, KV_Q2, KV_M4, KV_TYPES } KVType;

// Of keys and of values. Where neither is f32, new pairs are f16.
typedef struct {
    KVType k, v;
} KVTypes;

enum { KV_NAME = 16 };  // room for a name of KVTypes

static inline KVTypes kvcache_both(KVType t) { return (KVTypes){t, t}; }

// "f16", "f32", "q8", "q4" or "q2"; "m4" in names of tensors alone.
const char *kvcache_type_name(KVType t);
// Such a name, or two of them, keys first, "q8/q4"; f16 and f32 do not mix. 0 or -1.
int kvcache_types_parse(const char *name, KVTypes *types);
// The way back: writes name [KV_NAME] and returns it.
const char *kvcache_types_name(KVTypes types, char *name);

// ---- the cache ----

// Tokens of a sequence, and pairs of a head, at most: sums of two or three of them are ints.
enum { MAX_PAIRS = 1 << 28 };

// What the cache must know of a model.
typedef struct {
    // n_kv_heads and head_dim are those of the layers without a window.
    int n_layers, n_heads, n_kv_heads, head_dim;
    float scale;    // multiplies q . k
    float softcap;  // c tanh(x / c) on the scaled products, 0 = none (Gemma 2)
    // [n_layers] pairs a token sees in this layer, itself included; 0 = all; NO_PAIRS: none, the
    // layer keeps a state.
    const int *window;
    // Windows do not slide: a token sees the pairs of its own chunk of so many positions (Llama 4).
    bool chunks;
    int state;                             // floats of such a layer's state
    int window_kv_heads, window_head_dim;  // of the layers with one; 0: as the others (Gemma 4)
    // [n_layers] whose pairs a layer reads: its own, or those of a layer before it that has the
    // same heads and window (Gemma 4); NULL: all their own.
    const int *owner;
    // [n_layers][n_heads] logit of a head's sink, which takes part in each softmax and has no value
    // (gpt-oss); NULL: none.
    const float *sinks;
} KVShape;

enum { NO_PAIRS = -1 };

// Of one layer: kv heads, the length of each, and whose pairs they are.
static inline int kvshape_heads(const KVShape *s, int l) {
    return s->window[l] > 0 && s->window_kv_heads ? s->window_kv_heads : s->n_kv_heads;
}
static inline int kvshape_dim(const KVShape *s, int l) {
    return s->window[l] > 0 && s->window_head_dim ? s->window_head_dim : s->head_dim;
}
// The first pair that the token of pair t sees in layer l. Where there is a window nothing is
// evicted, so that t is a position.
static inline int kvshape_first(const KVShape *s, int l, int t) {
    int window = s->window[l];
    if (window <= 0) return 0;
    if (s->chunks) return t - t % window;
    return t < window ? 0 : t - window + 1;
}
static inline int kvshape_owner(const KVShape *s, int l) { return s->owner ? s->owner[l] : l; }
// Logit of query head h's sink there, -inf: it has none.
static inline float kvshape_sink(const KVShape *s, int l, int h) {
    return s->sinks ? s->sinks[(size_t)l * s->n_heads + h] : -INFINITY;
}
// Whether it has pairs of its own.
static inline bool kvshape_owns(const KVShape *s, int l) {
    return s->window[l] != NO_PAIRS && kvshape_owner(s, l) == l;
}
// Most kv heads of a layer; the length of heads in layers with a window; the longest heads.
static inline int kvshape_most_heads(const KVShape *s) {
    return s->window_kv_heads > s->n_kv_heads ? s->window_kv_heads : s->n_kv_heads;
}
static inline int kvshape_other_dim(const KVShape *s) {
    return s->window_head_dim ? s->window_head_dim : s->head_dim;
}
static inline int kvshape_most_dim(const KVShape *s) {
    return s->window_head_dim > s->head_dim ? s->window_head_dim : s->head_dim;
}

// Keys or values of a page: [head_dim][64] or [64][head_dim] numbers, or codes (kvpages.h).
typedef struct {
    KVType type;
    int head_dim;
    uint8_t *data;
    uint16_t *scale, *min;  // NULL where there are none
} KVPart;

// Keys that are to be q4 settle to a page of mixed ones, or to the first page of their head, in q8;
// PAGE_SETTLED has them as they are only in files that know of neither.
typedef enum {
    PAGE_EXACT,
    PAGE_SETTLED,
    PAGE_DEMOTED,
    PAGE_MIXED,
    PAGE_FIRST,
    PAGE_CLASSES
} PageClass;

// 64 pairs of one (layer, kv head).
typedef struct {
    KVPart k, v;
    int *pos;     // [64] absolute token positions
    float *bias;  // [64] added to scale q . k, where the page is biased (fit.h)
    bool biased;
    int refs;  // heads that list it; a page of a mapped file has one more and is never written
    PageClass class;
    uint64_t digest;  // number of the reader's digest of its keys (reading.h); 0: there is none
} KVPage;

// Memory of one class's pages.
typedef struct {
    KVTypes types;
    size_t page_bytes;  // k and v of one page
    uint8_t **slab;     // [n_slabs] 64 pages each
    int n_slabs;
    int *free_page;  // [n_free] ids of pages that hold nothing
    int n_free;
} KVStore;

// The pairs of one (layer, kv head) of a sequence, oldest first.
typedef struct {
    int *page;  // [n_pages] ids into KVCache.pages
    int n_pages, cap;
    int len;      // pairs appended so far, less the evicted ones
    int dropped;  // the first ones of them, left behind by a sliding window; a multiple of 64
    int settled;  // pages at the start that have settled, or were never to
} KVHead;

// The states of a sequence, in the order of the layers that keep one.
typedef struct {
    int refs;  // sequences that share it; one that shares it does not write
    _Alignas(64) float x[];
} KVState;

typedef struct {
    KVHead *head;    // [n_heads] of the cache; NULL: this slot is free
    int next_pos;    // position of the next token
    int appended;    // tokens of the run that was appended last
    KVState *state;  // NULL: nothing has been read, or no layer keeps a state
} KVSeq;

typedef struct KVScoring KVScoring;
typedef struct KVReader KVReader;

enum { KV_READER_PARAMS = 4 };

// Reading less than all pages: who chooses, and what has been read (reading.h).
typedef struct {
    const KVReader *reader;  // NULL: every token reads all that it sees
    double param[KV_READER_PARAMS];
    float *fixed;      // numbers that the reader draws once, or NULL
    uint8_t **digest;  // [n_slabs] what the reader knows of pages, by their ids
    int n_slabs;
    size_t digest_bytes;  // of a page
    uint64_t n_digests;   // made so far
    uint8_t *room;        // choices of the runs of a batch
    size_t room_bytes, wanted;
    // Pages that tokens saw so far in the layers without a window, and those of them they read: one
    // for each token and kv head, in the runs that the reader is for.
    double seen, read;
} KVReading;

// All sequences of one model. The only state that outlives a forward call.
typedef struct {
    KVShape shape;
    KVTypes types;  // what pages settle to; f16 or f32 both: they never do
    KVType type;    // of new pairs: f16 or f32
    bool settling;  // pages settle as a sequence grows; off where exact keys are still needed
    ThreadPool *pool;
    int n_heads;  // lists of a sequence: kv heads of the layers that own pairs
    int *layer;   // [n_heads] whose head it is
    int *first;   // [n_layers] the first head of the layer whose pairs a layer reads
    KVStore store[2 * PAGE_CLASSES];  // of heads as long as shape.head_dim; of other ones
    KVPage *pages;                    // [n_pages]
    int n_pages, pages_cap;
    KVSeq *seqs;  // [n_seqs]
    int n_seqs;
    TensorFile file;  // a loaded cache; its pages stay in the map
    float *partial;   // decode scratch: (max, sum, out [head_dim]) of page ranges
    // Pages of one layer, as long runs read them: for each run of a batch [n_kv_heads][its pages].
    uint8_t *packed;
    size_t packed_room, packed_wanted;  // bytes; wanted by the runs reserved since the last batch
    KVScoring *scoring;                 // while switched on, else NULL
    KVReading reading;
    float *lse;  // [scoring rows][n_heads] log-sum-exp of each query row's softmax subset
    double ops;  // multiplications and additions of attention and scoring so far
} KVCache;

// An empty cache; pool may be NULL. 0, or -1 with err.
int kvcache_open(KVCache *kv, const KVShape *shape, KVTypes types, ThreadPool *pool, char *err);
void kvcache_close(KVCache *kv);  // safe on a zeroed struct, and twice

// ---- sequences ----

int kvcache_new(KVCache *kv, char *err);            // an empty sequence; its number, or -1
int kvcache_fork(KVCache *kv, int seq, char *err);  // another sequence on the same pages, or -1
void kvcache_drop(KVCache *kv, int seq);            // frees the pages no other sequence lists

// A question and its answer leave no trace: mark remembers lengths and position, rewind goes back
// to them. The mark is a fork, so pages that a sliding window left behind come back too. Rewind may
// be repeated; kvcache_drop ends the mark. mark returns the mark or -1 with err, rewind 0 or -1.
int kvcache_mark(KVCache *kv, int seq, char *err);
int kvcache_rewind(KVCache *kv, int seq, int mark, char *err);

// A copy of another cache's sequence, which that cache may then forget: saved contexts of one model
// side by side. Its number, or -1 with err: no memory, or pages of types that kv's are not of.
int kvcache_take(KVCache *kv, const KVCache *from, int seq, char *err);

// The sequence forgets its pairs at position pos and behind, if it can: not where pairs that a
// sliding window has left behind would be seen again, nor within a page that has settled, nor where
// layers keep states, which only a mark brings back. Positions
// of what was read since the last eviction only. false: it is as it was.
bool kvcache_cut(KVCache *kv, int seq, int pos);

// How many tokens beyond the next one the sequence can read in the same short run, each with the
// bits that it would have read alone, and forget again by kvcache_cut. 0 where layers keep states.
int kvcache_slack(const KVCache *kv, int seq);

// The state of a layer that keeps one: [shape.state] floats, all 0 before the first token. Valid
// and the sequence's own from kvcache_reserve to the next fork.
float *kvcache_state(const KVCache *kv, int seq, int layer);

// One head's list. The pointer is valid until a sequence is made.
KVHead *kvcache_head(const KVCache *kv, int seq, int layer, int g);

// ---- one forward call ----

// Consecutive rows of a batch that belong to one sequence. Runs of KV_LONG_RUN rows and more give
// the same bits however a sequence is cut into them; shorter ones are spread over page ranges,
// whose sums come in another order.
typedef struct {
    int seq, n;
} KVRun;
enum { KV_LONG_RUN = 9 };

// Room for n more tokens in every layer: the only step that allocates, so the only one that can
// fail. Before that, with kv->settling, full pages that 64 or more pairs follow settle: before long
// runs, and before shorter ones only at every KV_SETTLE_STEP-th position. The lists of heads are
// full at different times; so that tokens can be read together that might as well come one by one
// (kvcache_slack), it is the position that says when all of them settle. 0, or -1 with err.
enum { KV_SETTLE_STEP = 16 };
int kvcache_reserve(KVCache *kv, int seq, int n, char *err);

// Settles such pages now, whatever kv->settling says: after scoring and evicting. Each becomes a
// page of its own, so that forks keep theirs. 0, or -1 with err, and then none has settled.
int kvcache_settle(KVCache *kv, int seq, char *err);

// k, v [rows][n_kv_heads][head_dim], rows = sum of the runs' n, at positions next_pos, next_pos +
// 1, ...
void kvcache_append(KVCache *kv, int layer, const KVRun *runs, int n_runs, const float *k,
                    const float *v);

// What attention reads and where it goes, for all rows of the runs.
typedef struct {
    const float *q;  // [rows][n_heads][head_dim] after RoPE
    // [rows] of out_stride floats, n_heads x head_dim of them written; NULL: scores alone.
    float *out;
    int out_stride;
    const float *x_norm;  // [rows] |x| of the attention's input, for KVScoring.pair_log alone
} KVQuery;

// out = softmax(scale q . k) v over the pairs each row may see: all kept pairs of its sequence, its
// own included, none after it (arXiv 1706.03762, 2205.14135). A run may leave out the first of the
// rows that were appended: the others get the same bits. While scoring is on, rows of the
// scored sequence also raise scores.
void kvcache_attend(KVCache *kv, int layer, const KVRun *runs, int n_runs, const KVQuery *query);

// Ends the call: positions move on, pages that fell out of a sliding window go.
void kvcache_advance(KVCache *kv, const KVRun *runs, int n_runs);

// ---- reading less ----

// From now on tokens read the pages that the reader chooses by its numbers param
// [KV_READER_PARAMS], and counting starts again; reader NULL: all pages. Nothing is deleted. 0, or
// -1 with err and all pages are read.
int kvcache_read_by(KVCache *kv, const KVReader *reader, const double *param, char *err);
// Share of the pages seen that were read so far, 1 where no reader had a choice.
double kvcache_read_share(const KVCache *kv);

// ---- scoring ----

// Every attend of `seq` raises score[] between begin and end. A policy is a choice of rows, softmax
// subset and reduction. Pairs are counted from 0 within a head, which is their position as long as
// nothing was evicted:
//
//   0 .. n_prefix ..... t0 ######## t1 ..... own ....
//     prefix       context  scored  context      the scoring rows' own pairs
//
// Earlier documents may lie between prefix and context. They were evicted, so that heads hold
// different numbers of their pairs, which none of the other fields counts: a pair t >= n_prefix is
// pair t + held of a head's list.
struct KVScoring {
    int seq;       // whose query rows score (the context's fork while it is repeated)
    int max_rows;  // rows of one forward call at most
    int n_prefix;  // pairs [0, n_prefix) are protected and not scored, but in every softmax
    int t0, t1;    // the pairs to score, n_prefix <= t0 <= t1
    int own;       // subset only: pairs from here on are the scoring rows' own
    bool subset;   // softmax over prefix, [t0, t1) and own pairs (arXiv 2505.23416), else over all
    bool local;    // the layer's output is computed over the subset too
    bool sum;      // a score is the sum of weights over rows and group, else the largest one's log
    int n_ctx;     // pairs per head in score[] and pair_log
    const int
        *held;  // [scored layers][n_kv_heads] pairs of earlier documents; NULL: there are none
    // [scored layers][n_kv_heads][n_ctx], pair t at t - n_prefix; weights are in [0, 1]. The caller
    // sets it to 0 (sum) or -INFINITY (log) at the start.
    float *score;
    // [readers][n_heads][n_ctx] added before the maximum over the group, less the log of the row's
    // x_norm (KVzip+); or NULL. Readers as kvcache_readers has them.
    const float *pair_log;
};

// s must stay until score_end. 0, or -1 with err.
int kvcache_score_begin(KVCache *kv, KVScoring *s, char *err);
void kvcache_score_end(KVCache *kv);

// Layers that are scored and evicted: those without a window that own pairs. layers [n_layers] may
// be NULL; returns how many.
int kvcache_scored_layers(const KVShape *shape, int *layers);
int kvcache_scored_index(const KVShape *shape, int layer);       // which of them a layer reads
int kvcache_scored_layer(const KVShape *shape, int s);           // the s-th of them
KVHead *kvcache_scored_head(const KVCache *kv, int seq, int h);  // the h-th head in them

// Layers whose rows score: all without a window, also those that read another layer's pairs.
// readers [n_layers] may be NULL; returns how many.
int kvcache_readers(const KVShape *shape, int *readers);
int kvcache_reader_index(const KVShape *shape, int layer);  // how many of them come before it

// ---- evicting ----

// One head of a sequence.
typedef struct {
    int seq, layer, g;
} KVHeadAt;

// Pairs [first, first + n) of a head's list.
typedef struct {
    int first, n;
} KVSpan;

// Evicts for real: of the pairs [n_prefix, n_prefix + n_ctx) in the scored layers those with keep =
// 0 go, the others slide left. All other pairs, and the position counter, stay. keep [scored
// layers][n_kv_heads][n_ctx]. 0, or -1 with err, and then some heads may have changed.
int kvcache_evict(KVCache *kv, int seq, int n_prefix, int n_ctx, const uint8_t *keep, char *err);

// The same, but pairs with keep = 0 are demoted to 2 bits instead: they move to the front of their
// head, in pages of 64; the last ones that do not fill a page stay as they are.
int kvcache_demote(KVCache *kv, int seq, int n_prefix, int n_ctx, const uint8_t *keep, char *err);

// The ragged form of evict: of one head's pairs in the span those with keep [span.n] = 0 go. For
// layers without a window. 0, or -1 with err, and then none has gone.
int kvcache_evict_head(KVCache *kv, KVHeadAt at, KVSpan span, const uint8_t *keep, char *err);

// Freed pages serve later tokens; this hands their memory back to the system, and that of packed
// pages.
void kvcache_trim(KVCache *kv);

// ---- fitting ----

// Gives pairs of a head new values and biases (fit.h): pair i of `kept`, rising, becomes v
// [n][head_dim] and bias [n]; all others, which are about to be evicted, stay. Pages must be exact
// and the head's own (kvcache_own). For layers without a window.
typedef struct {
    const int *kept;  // [n]
    int n;
    const float *v, *bias;  // bias NULL: none
} KVFitted;
void kvcache_refit(KVCache *kv, KVHeadAt at, const KVFitted *fit);

// Makes the exact pages of the scored layers the sequence's own, so that they can be written: forks
// keep theirs. 0, or -1 with err.
int kvcache_own(KVCache *kv, int seq, char *err);

// Whether any of its pages has biases.
bool kvcache_biased(const KVCache *kv, int seq);

// ---- looking inside ----

// k, v [head_dim] (each may be NULL) of pair t as float; returns its position. For
// methods that look at norms and geometry.
int kvcache_pair(const KVCache *kv, KVHeadAt at, int t, float *k, float *v);
// What is added to scale q . k of pair t: 0 where it has no bias.
float kvcache_bias(const KVCache *kv, KVHeadAt at, int t);
// The same for the 64 pairs from 64 b on, of which a window must have left none behind: k
// [head_dim][64], one pair a column, and v [64][head_dim]. Returns how many of them there are; the
// other columns mean nothing.
int kvcache_block(const KVCache *kv, KVHeadAt at, int b, float *k, float *v);

// ---- bytes ----

// Pages, positions and page tables of one sequence.
size_t kvcache_bytes(const KVCache *kv, int seq);
// The same, had no page settled or been demoted.
size_t kvcache_full_bytes(const KVCache *kv, int seq);
// And had the heads in scored layers n pairs each.
size_t kvcache_unevicted_bytes(const KVCache *kv, int seq, int n);

// Keys and values of one page.
size_t kvcache_page_bytes(int head_dim, KVTypes types);
// What a cache will need, with positions: for every further token, in the layers without a window;
// and for the layers with one, at most (the window and a page that it is leaving).
size_t kvcache_token_bytes(const KVShape *shape, KVTypes types);
// Once a sequence: what the first pages of the heads in those layers take beyond other settled
// ones.
size_t kvcache_first_bytes(const KVShape *shape, KVTypes types);
size_t kvcache_window_bytes(const KVShape *shape, KVTypes types);
// The states of a sequence, whatever its length.
size_t kvcache_state_bytes(const KVShape *shape);
// Beside that, for each token while a long run reads it: its pairs of one layer, packed. Not for
// f32.
size_t kvcache_read_bytes(const KVShape *shape);
#endif
