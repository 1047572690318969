// kvpages.h: what a page of the cache is made of. Private to the cache's own files: kvpages.c,
// kvstate.c, tile.c, attend.c, sweep.c, kvcache.c, kvtake.c and kvfile.c.
//
// A page has two sides, keys and values. A side holds plain numbers, f16 or f32, or codes of 8, 4
// or 2 bits. Codes are matrices whose rows have a scale and, but for q8 values, a minimum each:
//
//   keys    one matrix  [head_dim][64]    a row is a channel of the page
//   values  one matrix  [64][32]          a row is a pair and 32 of its channels;
//           for each 32 channels, one after the other
//
//   memory of one side:  data | scales | minima
//
// The channels of a page's keys differ in range, and the largest, where rounding is coarsest, are
// those that queries are large in. In M4 pages they are mixed by a Hadamard matrix H first (QuaRot,
// arXiv 2404.00456), in groups of p = 2^m, the largest power of two that divides head_dim: each
// channel becomes a sum of all p with signs. H H = p, so q . k = (2^-(m - m/2) H q) . (2^-(m/2) H
// k), and all scaling is exact.
#ifndef KVPAGES_H
#define KVPAGES_H
#include "kvcache.h"
#include "util.h"

typedef enum { KEYS, VALUES } Side;

static inline KVPart *part_of(KVPage *p, Side side) { return side == KEYS ? &p->k : &p->v; }

// ---- heads ----

static inline int pages_for(int n_pairs) { return (n_pairs + PAGE - 1) / PAGE; }

// Pages that hold live pairs; a head may have reserved more.
static inline int pages_used(const KVHead *h) { return pages_for(h->len - h->dropped); }

// Room in a head's list for n_pages in all. 0, or -1 with err.
int head_room(KVHead *h, int n_pages, char *err);

// ---- states (kvstate.c) ----

// Layers that keep one.
int n_states(const KVShape *shape);
// One sequence less that has it; NULL is allowed.
void state_unref(KVState *state);
// The sequence's states become its own, so that they can be written: a copy of those it shares, of
// `from` (NULL: none), or all 0. Nothing where no layer keeps one. 0, or -1 with err.
int state_own(const KVCache *kv, KVSeq *s, const float *from, char *err);

// ---- bytes of a side ----

static inline bool is_codes(KVType t) { return t >= KV_Q8; }
static inline CodeType code_type(KVType t) { return t == KV_M4 ? C_U4 : (CodeType)(t - KV_Q8); }

// Rows and columns of one matrix of codes, and how many a side has.
static inline int code_rows(int head_dim, Side side) { return side == KEYS ? head_dim : PAGE; }
static inline int code_cols(Side side) { return side == KEYS ? PAGE : CODE_COLS; }
static inline int n_blocks(int head_dim, Side side) {
    return side == KEYS ? 1 : (head_dim + CODE_COLS - 1) / CODE_COLS;
}

// Columns of a side as floats: keys [head_dim][64], values [64][head_dim].
static inline int side_cols(int head_dim, Side side) { return side == KEYS ? PAGE : head_dim; }

// Whether there are minima beside the scales: in all codes but q8 values, which lie around 0.
static inline bool has_minima(KVType t, Side side) {
    return is_codes(t) && (t != KV_Q8 || side == KEYS);
}

static inline size_t n_scales(int head_dim, KVType t, Side side) {
    return is_codes(t) ? (size_t)n_blocks(head_dim, side) * code_rows(head_dim, side) : 0;
}

// Bytes of a side's numbers or codes, scales and minima not counted.
size_t data_bytes(int head_dim, KVType t, Side side);

// What pages of a class hold in a cache of these types.
KVTypes class_types(KVTypes types, PageClass class);
// Whether pages of the class have settled.
static inline bool is_settled(PageClass class) {
    return class == PAGE_SETTLED || class == PAGE_MIXED || class == PAGE_FIRST;
}

// ---- pages ----

// The memory of pages of a class with heads of that length.
KVStore *store_of(KVCache *kv, int head_dim, PageClass class);
// A page of the class with one reference and old contents; its id, or -1 with err.
int page_take(KVCache *kv, int head_dim, PageClass class, char *err);
// An empty exact page, zeroed: attention multiplies unused values by weights of 0. Its id, or -1.
int page_new(KVCache *kv, int head_dim, char *err);
// One reference less; with the last one the page is free.
void page_unref(KVCache *kv, int id);
// Positions and biases of one page become those of another.
void page_copy_list(KVPage *to, const KVPage *from);
// Room in the table for n pages in all. 0, or -1 with err.
int pages_grow(KVCache *kv, int n, char *err);
// Hands the memory of free pages back to the system; they stay usable.
void pages_trim(KVCache *kv);
// Unmaps all pages but those of a mapped file.
void pages_close(KVCache *kv);

// Zeroed memory straight from the system, or NULL; and back to it (NULL allowed).
uint8_t *memory_map(size_t bytes);
void memory_unmap(uint8_t *memory, size_t bytes);

// Matrix `block` of a side that holds codes.
Codes part_codes(const KVPart *p, Side side, int block);
// A side as floats, keys [head_dim][64] or values [64][head_dim], no longer mixed.
void part_read(const KVPart *p, Side side, float *out);
// The way back; 16 bits and fewer round. x is overwritten.
void part_write(const KVPart *p, Side side, float *x);

// Mixes the channels of queries [n][head_dim] for a product with mixed keys.
void mix_queries(float *q, int n, int head_dim);

#endif
