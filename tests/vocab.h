// vocab.h: small vocabularies made up in memory, and byte-pair encoding as it is defined, for the
// tokenizer's tests and its fuzzer.
#ifndef VOCAB_H
#define VOCAB_H
#include <stdlib.h>
#include <string.h>

#include "tokenizer.h"

enum { MAX_TOKENS = 700, MAX_MERGES = 400 };

// A file in memory: tok.* and tokenizer.*, to be changed before opening.
typedef struct {
    uint8_t bytes[32 * MAX_TOKENS], kind[MAX_TOKENS], flags[MAX_TOKENS];
    int32_t offsets[MAX_TOKENS + 1], merges[MAX_MERGES][3];
    int n, n_merges;
    Tensor tensors[5];
    Meta meta[11];
    int n_meta;
    TensorFile file;
} Vocab;

static inline int add_token(Vocab *v, const char *text, int bytes, int kind) {
    memcpy(v->bytes + v->offsets[v->n], text, (size_t)bytes);
    v->offsets[v->n + 1] = v->offsets[v->n] + bytes;
    v->kind[v->n] = (uint8_t)kind;
    return v->n++;
}

static inline void set_meta(Vocab *v, const char *key, const char *value) {
    for (int i = 0; i < v->n_meta; i++)
        if (strcmp(v->meta[i].key, key) == 0) v->meta[i].value = value;
}

// All 256 bytes as tokens (as byte-fallback tokens with spm), nothing else.
static inline Vocab *vocab_new(const char *model, const char *split) {
    static const char *const keys[] = {"tokenizer.add_bos",  "tokenizer.bos_id",       "tokenizer.ignore_merges",
                                       "tokenizer.model",    "tokenizer.nfc",          "tokenizer.space_prefix",
                                       "tokenizer.split",    "tokenizer.stop_ids",     "tokenizer.unk_id"};
    Vocab *v = calloc(1, sizeof *v);
    v->n_meta = 9;
    for (int i = 0; i < 9; i++) v->meta[i] = (Meta){keys[i], "0"};
    set_meta(v, "tokenizer.model", model);
    set_meta(v, "tokenizer.split", split);
    set_meta(v, "tokenizer.bos_id", "-1");
    set_meta(v, "tokenizer.unk_id", "-1");
    set_meta(v, "tokenizer.stop_ids", "");
    for (int b = 0; b < 256; b++) {
        char c = (char)b;
        add_token(v, &c, 1, strcmp(model, "spm") == 0 ? 3 : 0);
    }
    return v;
}

static inline Tokenizer *vocab_open(Vocab *v, char *err) {
    size_t n = (size_t)v->n;
    v->tensors[0] = (Tensor){"tok.bytes", T_U8, 1, {(size_t)v->offsets[n]}, v->bytes, (size_t)v->offsets[n]};
    v->tensors[1] = (Tensor){"tok.flags", T_U8, 1, {n}, v->flags, n};
    v->tensors[2] = (Tensor){"tok.kind", T_U8, 1, {n}, v->kind, n};
    v->tensors[3] = (Tensor){"tok.merges", T_I32, 2, {(size_t)v->n_merges, 3}, v->merges, 12 * (size_t)v->n_merges};
    v->tensors[4] = (Tensor){"tok.offsets", T_I32, 1, {n + 1}, v->offsets, 4 * (n + 1)};
    v->file = (TensorFile){.tensors = v->tensors, .n_tensors = 5, .meta = v->meta, .n_meta = v->n_meta};
    return tokenizer_open(&v->file, err);
}

static inline int find_token(const Vocab *v, const uint8_t *p, int n) {
    for (int id = 0; id < v->n; id++)
        if (v->offsets[id + 1] - v->offsets[id] == n && memcmp(v->bytes + v->offsets[id], p, (size_t)n) == 0) return id;
    return -1;
}

static inline int rank_of(const Vocab *v, const int *ids, int i, int n) {
    for (int r = 0; i >= 0 && i + 1 < n && r < v->n_merges; r++)
        if (v->merges[r][0] == ids[i] && v->merges[r][1] == ids[i + 1]) return r;
    return v->n_merges;
}

// Byte-pair encoding as it is defined: the lowest rank in the text, the leftmost of it, again and
// again. Returns how many of ids[n] are left.
static inline int merge_plainly(const Vocab *v, int *ids, int n) {
    int *rank = malloc((size_t)(n + 1) * sizeof *rank);
    for (int i = 0; i < n; i++) rank[i] = rank_of(v, ids, i, n);
    for (;;) {
        int at = 0;
        for (int i = 1; i < n; i++)
            if (rank[i] < rank[at]) at = i;
        if (n == 0 || rank[at] == v->n_merges) break;
        ids[at] = v->merges[rank[at]][2];
        n--;
        memmove(ids + at + 1, ids + at + 2, (size_t)(n - at - 1) * sizeof *ids);
        memmove(rank + at + 1, rank + at + 2, (size_t)(n - at - 1) * sizeof *rank);
        rank[at] = rank_of(v, ids, at, n);
        if (at > 0) rank[at - 1] = rank_of(v, ids, at - 1, n);
    }
    free(rank);
    return n;
}
#endif
