// kvfile.h: saved caches. A cache that was compressed once answers questions later, without the
// model reading its context again.
//
// A file of tensors.h. Pages stand in the order layer, kv head, page of the head; n of them are of
// the type that a tensor's name says, d = head_dim, B = ceil(d / 32):
//
//   k           f16 or f32 [n][d][64]        keys of exact pages, after RoPE
//   v           f16 or f32 [n][64][d]        their values
//   k_q8        u8  [n][d / 4][64 * 4]       codes of settled and demoted pages, four rows together
//   v_q8        u8  [n][B][64 / 4][32 * 4]   as in kernels.h; k_q4, v_q4: half as many bytes,
//                                            k_q2, v_q2: a quarter; k_m4: as k_q4, of mixed
//                                            channels (kvpages.h)
//   k_q8.scale  f16 [n][d]                   of each row of codes
//   v_q8.scale  f16 [n][B][64]
//   k_q8.min    f16, as .scale               not for v_q8
//   pos         i32 [pages][64]              absolute positions, -1: no pair
//   len         i32 [layers][kv heads]       pairs of each head, as KVHead.len
//   dropped     i32 [layers][kv heads]       of them left behind by a sliding window
//   window      i32 [layers]                 0: all pairs are seen, and evicted from; -1: no pairs
//   kv_heads    i32 [layers]                 heads with pairs of their own, 0 where a layer reads
//                                            those of another or keeps a state; absent: kv heads in
//                                            all others
//   ids         i32 [n_prefix + n_ctx]       the tokens that were read
//   page_class  u8  [pages]                  PageClass of each page; absent: all are exact
//   bias        f32 [pages][64]              of each pair, added to scale q . k; absent: none
//   state       f32 [state layers][floats]   of the layers whose window is -1, as the model has
//   them
//                                            (deltanet.h); absent: there are no such layers
//
// Where heads of layers with a window are of another length, their pages are in tensors of the same
// names after "sliding.".
//
// Metadata: format ("kvzip.c cache 1", 2 with page_class, 3 with bias, 4 with mixed keys, 5 with
// states, 6 with kv_heads or pages of two lengths),
// fingerprint and model (keys mean nothing to another model), policy, ratio, n_prefix, n_ctx,
// next_pos, and kv, the types that pages settle to; where they are known level, profile, set,
// budget, fit and documents, as in KVInfo.
#ifndef KVFILE_H
#define KVFILE_H
#include "kvcache.h"

// What is known of a saved cache beside its pages. Strings and ids of a loaded one point into its
// map.
typedef struct {
    const char *fingerprint, *model;  // of the model file
    const char *policy;               // who scored
    // How else pairs were chosen; NULL: not known, or nothing was said. Level, file of the profile
    // ("model": the model's own), parameters, pairs a head.
    const char *level, *profile, *set, *budget;
    const char *fit;  // how what stays was fitted; NULL: not at all
    // Of several documents, whose last one the above is about: "24-131 kvzip/pair ratio 0.3;
    // 133-..", from which of the ids to which, and how each was compressed. NULL: there is one.
    const char *documents;
    int n_prefix, n_ctx;
    double ratio;    // asked for
    const int *ids;  // [n_ids = n_prefix + n_ctx] what was read
    int n_ids;
} KVInfo;

// The model that a cache must come from.
typedef struct {
    KVShape shape;
    const char *fingerprint;
} KVModel;

// Writes a sequence to path, which is the old file or the whole new one, never half. 0, or -1 with
// err.
int kvfile_save(const KVCache *kv, int seq, const char *path, const KVInfo *info, char *err);

// Opens a saved cache as sequence 0 of kv; pages stay in the map and are copied when written.
// Refuses another model's and whatever kvfile_facts refuses. 0, or -1 with err.
int kvfile_load(KVCache *kv, const char *path, const KVModel *model, ThreadPool *pool, KVInfo *info,
                char *err);

// What `run info` shows of a saved cache. Bytes count pages and their positions.
typedef struct {
    KVInfo info;
    int next_pos;
    KVTypes types[PAGE_CLASSES];
    double bytes[PAGE_CLASSES];     // of the pages of each class; all that settled are one
    double state_bytes;             // of layers that keep states
    double pairs;                   // in all heads
    double full_pairs, full_bytes;  // had nothing been evicted, settled or demoted
    // Pairs of the context in layers without a window: all; kept as they were; demoted.
    double n_scored, kept, demoted;
    int n_layers, n_kv_heads;  // the most of a layer
    int *kept_pairs;  // [n_layers][n_kv_heads] of the context, demoted ones not counted; allocated
} CacheFacts;

bool kvfile_is(const TensorFile *f);  // whether its metadata says that f is a saved cache
// Checks a saved cache as kvfile_load does, for whatever model. 0, or -1 with err.
int kvfile_facts(CacheFacts *facts, const TensorFile *f, char *err);
void kvfile_facts_free(CacheFacts *facts);
#endif
