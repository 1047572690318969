// kvcache.c: keys and values of past tokens, how much each pair matters, and which ones stay.
//
// A context is read once, then repeated by the model with the answer forced (KVzip, arXiv
// 2505.23416). The largest attention a pair receives during the repeat is its score. Low pairs go,
// the prefix never does, and the survivors slide left into fewer pages: from then on every (layer,
// kv head) has its own length. Attention runs page by page with an online softmax, so it needs no
// more than the list of pages. Older pages may hold 8, 4 or 2 bits a number; one function
// multiplies by a page of any kind, one reads and one writes it. Invariants: keys are stored after
// RoPE and never rotated again; a page with more than one reference is never written; only a full
// page is ever other than PAGE_FULL; work is cut by the data, not by the number of threads, so the
// bits are always the same.
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include "kvcache.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "util.h"

enum {
    SLAB_PAGES = 64,
    TILE_ROWS = 64,    // query rows (tokens times group) that share one pass over the pages
    MANY_TOKENS = 9,   // runs from this length on read packed pages
    SPLIT_TOKENS = 8,  // runs up to this length are split over page ranges as well
    SPLIT_ROWS = 64,   // tokens of such runs, and runs, that are worked on together
    SPLITS = 32,       // ranges at most
    SPLIT_PAGES = 4,   // pages in a range at least
    MAX_RANGES = 5,
    SWEEP_PAGES = 4,           // whose scores one load of the rows raises
    PAGES_AHEAD = 1,           // the page whose lines are fetched during the products of one
    PACKED_BESIDE = 32 << 20,  // bytes of packed pages for the other runs of a batch
};

static const char *const type_names[KV_TYPES] = {"f16", "f32", "q8", "q4", "q2"};
static const KVTypes demoted_types = {KV_Q2, KV_Q2};

static inline int n_heads_total(const KVCache *kv) {
    return kv->shape.n_layers * kv->shape.n_kv_heads;
}

// ---- types ----

const char *kvcache_type_name(KVType t) { return type_names[t]; }

static bool is_codes(KVType t) { return t >= KV_Q8; }

static int type_parse(const char *name, size_t n, KVType *t) {
    for (int i = 0; i < KV_TYPES; i++) {
        if (strlen(type_names[i]) != n || memcmp(name, type_names[i], n) != 0) continue;
        *t = (KVType)i;
        return 0;
    }
    return -1;
}

int kvcache_types_parse(const char *name, KVTypes *types) {
    size_t n = strcspn(name, "/");
    const char *v = name[n] ? name + n + 1 : name;
    if (type_parse(name, n, &types->k) != 0 || type_parse(v, strlen(v), &types->v) != 0) return -1;
    return types->k != types->v && !is_codes(types->k) && !is_codes(types->v) ? -1 : 0;
}

const char *kvcache_types_name(KVTypes types, char *name) {
    const char *k = type_names[types.k], *v = type_names[types.v];
    snprintf(name, KV_NAME, types.k == types.v ? "%s" : "%s/%s", k, v);
    return name;
}

typedef enum { KEYS, VALUES } Side;

static inline KVPart *part_of(KVPage *p, Side side) { return side == KEYS ? &p->k : &p->v; }

// Matrices of codes in one side of a page.
static inline int n_blocks(int head_dim, Side side) {
    return side == KEYS ? 1 : (head_dim + CODE_COLS - 1) / CODE_COLS;
}

static inline int code_rows(int head_dim, Side side) { return side == KEYS ? head_dim : PAGE; }
static inline int code_cols(Side side) { return side == KEYS ? PAGE : CODE_COLS; }

// Bytes of one side's numbers, and how many scales it has.
static size_t data_bytes(int head_dim, KVType t, Side side) {
    if (!is_codes(t)) return (size_t)head_dim * PAGE * (t == KV_F32 ? 4 : 2);
    CodeType code = (CodeType)(t - KV_Q8);
    return n_blocks(head_dim, side) * code_bytes(code, code_rows(head_dim, side), code_cols(side));
}

static size_t n_scales(int head_dim, KVType t, Side side) {
    return is_codes(t) ? (size_t)n_blocks(head_dim, side) * code_rows(head_dim, side) : 0;
}

// Whether there are minima as well: all but q8 values, which lie around 0.
static bool has_minima(KVType t, Side side) { return is_codes(t) && (t != KV_Q8 || side == KEYS); }

static size_t part_bytes(int head_dim, KVType t, Side side) {
    size_t lists = has_minima(t, side) ? 2 : 1;
    return data_bytes(head_dim, t, side) + n_scales(head_dim, t, side) * lists * sizeof(uint16_t);
}

size_t kvcache_page_bytes(const KVShape *shape, KVTypes types) {
    return part_bytes(shape->head_dim, types.k, KEYS) +
           part_bytes(shape->head_dim, types.v, VALUES);
}

// ---- pages ----

static uint8_t *slab_map(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

// From one page of a slab to the next.
static size_t page_step(const KVStore *store) { return (store->page_bytes + 63) / 64 * 64; }

static size_t slab_bytes(const KVStore *store) {
    return SLAB_PAGES * (page_step(store) + PAGE * sizeof(int));
}

static int pages_grow(KVCache *kv, int n, char *err) {
    if (n <= kv->pages_cap) return 0;
    int cap = max_int(n, kv->pages_cap * 2);
    KVPage *pages = realloc(kv->pages, (size_t)cap * sizeof *pages);
    if (!pages) return fail(err, "out of memory for a table of %d cache pages", cap);
    kv->pages = pages;
    kv->pages_cap = cap;
    return 0;
}

// One side of a page in the memory at `at`.
static KVPart part_at(const KVCache *kv, KVType t, Side side, uint8_t *at) {
    int d = kv->shape.head_dim;
    KVPart p = {t, at, NULL, NULL};
    if (!is_codes(t)) return p;
    p.scale = (uint16_t *)(at + data_bytes(d, t, side));
    if (has_minima(t, side)) p.min = p.scale + n_scales(d, t, side);
    return p;
}

// A slab is 64 pages and, after them, their positions.
static int slab_new(KVCache *kv, PageClass class, char *err) {
    KVStore *store = &kv->store[class];
    size_t n_slabs = (size_t)store->n_slabs + 1, used = 0;
    if (pages_grow(kv, kv->n_pages + SLAB_PAGES, err) != 0) return -1;
    uint8_t **slab = realloc(store->slab, n_slabs * sizeof *slab);
    if (slab) store->slab = slab;
    int *free_page = realloc(store->free_page, n_slabs * SLAB_PAGES * sizeof *free_page);
    if (free_page) store->free_page = free_page;
    uint8_t *memory = slab && free_page ? slab_map(slab_bytes(store)) : NULL;
    for (int i = 0; i < PAGE_CLASSES; i++)
        used += (size_t)kv->store[i].n_slabs * slab_bytes(&kv->store[i]);
    if (!memory)
        return fail(err, "out of memory: the cache needs more than the %zu MB it has", used >> 20);
    store->slab[store->n_slabs++] = memory;
    int *pos = (int *)(memory + SLAB_PAGES * page_step(store));
    for (int i = SLAB_PAGES - 1; i >= 0; i--) store->free_page[store->n_free++] = kv->n_pages + i;
    for (int i = 0; i < SLAB_PAGES; i++) {
        uint8_t *at = memory + (size_t)i * page_step(store);
        KVPart k = part_at(kv, store->types.k, KEYS, at);
        at += part_bytes(kv->shape.head_dim, store->types.k, KEYS);
        KVPart v = part_at(kv, store->types.v, VALUES, at);
        kv->pages[kv->n_pages++] = (KVPage){k, v, pos + i * PAGE, 0, class};
    }
    return 0;
}

// A page with one reference and old contents, or -1.
static int page_take(KVCache *kv, PageClass class, char *err) {
    KVStore *store = &kv->store[class];
    if (store->n_free == 0 && slab_new(kv, class, err) != 0) return -1;
    int id = store->free_page[--store->n_free];
    kv->pages[id].refs = 1;
    return id;
}

// An empty page, or -1. Zeroed: attention multiplies unused values by weights of 0.
static int page_new(KVCache *kv, char *err) {
    int id = page_take(kv, PAGE_FULL, err);
    if (id < 0) return -1;
    KVPage *p = &kv->pages[id];
    memset(p->k.data, 0, kv->store[PAGE_FULL].page_bytes);
    for (int i = 0; i < PAGE; i++) p->pos[i] = -1;
    return id;
}

static void page_unref(KVCache *kv, int id) {
    KVPage *p = &kv->pages[id];
    KVStore *store = &kv->store[p->class];
    if (--p->refs == 0) store->free_page[store->n_free++] = id;
}

static void free_packed(KVCache *kv) {
    if (kv->packed) munmap(kv->packed, kv->packed_room);
    kv->packed = NULL, kv->packed_room = 0;
}

void kvcache_trim(KVCache *kv) {
    free_packed(kv);
    size_t unit = (size_t)sysconf(_SC_PAGESIZE);
    for (const KVStore *store = kv->store; store < kv->store + PAGE_CLASSES; store++) {
        for (int i = 0; i < store->n_free; i++) {
            uintptr_t at = (uintptr_t)kv->pages[store->free_page[i]].k.data;
            uintptr_t end = (at + store->page_bytes) / unit * unit;
            at = (at + unit - 1) / unit * unit;
            if (at < end) madvise((void *)at, end - at, MADV_DONTNEED);
        }
    }
}

// ---- what a page holds ----

// Matrix `block` of a side that holds codes.
static Codes part_codes(const KVCache *kv, const KVPart *p, Side side, int block) {
    CodeType type = (CodeType)(p->type - KV_Q8);
    int d = kv->shape.head_dim, rows = code_rows(d, side), cols = code_cols(side);
    size_t step = code_bytes(type, rows, cols), scales = (size_t)block * rows;
    return (Codes){type,
                   rows,
                   side == KEYS ? cols : min_int(cols, d - block * cols),
                   p->data + block * step,
                   p->scale + scales,
                   p->min ? p->min + scales : NULL,
                   p->data + block * step};
}

// Keys [head_dim][64] or values [64][head_dim] of a page as floats.
static void part_read(const KVCache *kv, const KVPart *p, Side side, float *out) {
    int d = kv->shape.head_dim;
    size_t n = (size_t)d * PAGE, ld = side == KEYS ? PAGE : (size_t)d;
    if (p->type == KV_F32)
        memcpy(out, p->data, n * sizeof *out);
    else if (p->type == KV_F16)
        kern.f16_to_f32(out, (const uint16_t *)p->data, n);
    for (int b = 0; is_codes(p->type) && b < n_blocks(d, side); b++) {
        Codes codes = part_codes(kv, p, side, b);
        kern.unpack_codes(out + b * CODE_COLS, ld, &codes);
    }
}

// The way back; 16 bits and fewer round.
static void part_write(const KVCache *kv, const KVPart *p, Side side, const float *in) {
    int d = kv->shape.head_dim;
    size_t n = (size_t)d * PAGE, ld = side == KEYS ? PAGE : (size_t)d;
    if (p->type == KV_F32)
        memcpy(p->data, in, n * sizeof *in);
    else if (p->type == KV_F16)
        kern.f32_to_f16((uint16_t *)p->data, in, n);
    for (int b = 0; is_codes(p->type) && b < n_blocks(d, side); b++) {
        Codes codes = part_codes(kv, p, side, b);
        codes_round(&codes, in + b * CODE_COLS, ld);
    }
}

// ---- sequences ----

static int pages_used(const KVHead *h) { return (h->len - h->dropped + PAGE - 1) / PAGE; }

static int head_room(KVHead *h, int n_pages, char *err) {
    if (n_pages <= h->cap) return 0;
    int cap = max_int(n_pages, h->cap * 2);
    int *page = realloc(h->page, (size_t)cap * sizeof *page);
    if (!page) return fail(err, "out of memory for a list of %d cache pages", cap);
    h->page = page;
    h->cap = cap;
    return 0;
}

static void head_free(KVCache *kv, KVHead *h) {
    for (int i = 0; i < h->n_pages; i++) page_unref(kv, h->page[i]);
    free(h->page);
    *h = (KVHead){0};
}

static void seq_free(KVCache *kv, KVSeq *s) {
    for (int i = 0; s->head && i < n_heads_total(kv); i++) head_free(kv, &s->head[i]);
    free(s->head);
    *s = (KVSeq){0};
}

// to becomes another list of from's pages; to is overwritten, not freed.
static int seq_copy(KVCache *kv, KVSeq *to, const KVSeq *from, char *err) {
    *to = (KVSeq){calloc((size_t)n_heads_total(kv), sizeof *to->head), from->next_pos};
    if (!to->head) return fail(err, "out of memory for a sequence");
    for (int i = 0; i < n_heads_total(kv); i++) {
        const KVHead *a = &from->head[i];
        KVHead *b = &to->head[i];
        int n = pages_used(a);
        if (head_room(b, n, err) != 0) {
            seq_free(kv, to);
            return -1;
        }
        for (int j = 0; j < n; j++) kv->pages[b->page[j] = a->page[j]].refs++;
        b->n_pages = n, b->len = a->len, b->dropped = a->dropped, b->settled = a->settled;
    }
    return 0;
}

static int seq_slot(KVCache *kv, char *err) {
    for (int i = 0; i < kv->n_seqs; i++) {
        if (!kv->seqs[i].head) return i;
    }
    KVSeq *seqs = realloc(kv->seqs, (size_t)(kv->n_seqs + 1) * sizeof *seqs);
    if (!seqs) return fail(err, "out of memory for sequence %d", kv->n_seqs);
    kv->seqs = seqs;
    kv->seqs[kv->n_seqs] = (KVSeq){0};
    return kv->n_seqs++;
}

int kvcache_new(KVCache *kv, char *err) {
    int i = seq_slot(kv, err);
    if (i < 0) return -1;
    kv->seqs[i].head = calloc((size_t)n_heads_total(kv), sizeof *kv->seqs[i].head);
    if (!kv->seqs[i].head) return fail(err, "out of memory for sequence %d", i);
    return i;
}

int kvcache_fork(KVCache *kv, int seq, char *err) {
    int i = seq_slot(kv, err);
    if (i < 0 || seq_copy(kv, &kv->seqs[i], &kv->seqs[seq], err) != 0) return -1;
    return i;
}

void kvcache_drop(KVCache *kv, int seq) { seq_free(kv, &kv->seqs[seq]); }

int kvcache_mark(KVCache *kv, int seq, char *err) { return kvcache_fork(kv, seq, err); }

int kvcache_rewind(KVCache *kv, int seq, int mark, char *err) {
    KVSeq back;
    if (seq_copy(kv, &back, &kv->seqs[mark], err) != 0) return -1;
    seq_free(kv, &kv->seqs[seq]);
    kv->seqs[seq] = back;
    return 0;
}

KVHead *kvcache_head(const KVCache *kv, int seq, int layer, int g) {
    return &kv->seqs[seq].head[layer * kv->shape.n_kv_heads + g];
}

int kvcache_scored_index(const KVShape *shape, int layer) {
    int n = 0;
    for (int l = 0; l < layer; l++) n += shape->window[l] == 0;
    return n;
}

int kvcache_scored_layer(const KVShape *shape, int s) {
    int l = 0;
    while (shape->window[l] != 0 || s-- > 0) l++;
    return l;
}

KVHead *kvcache_scored_head(const KVCache *kv, int seq, int h) {
    int n = kv->shape.n_kv_heads;
    return kvcache_head(kv, seq, kvcache_scored_layer(&kv->shape, h / n), h % n);
}

// ---- open and close ----

// What new pairs are stored in.
static KVType full_type(KVTypes t) { return t.k == KV_F32 || t.v == KV_F32 ? KV_F32 : KV_F16; }

int kvcache_open(KVCache *kv, const KVShape *shape, KVTypes types, ThreadPool *pool, char *err) {
    *kv = (KVCache){.shape = *shape, .types = types, .type = full_type(types), .pool = pool};
    kv->settling = true;
    int group = shape->n_heads / shape->n_kv_heads;
    if (shape->head_dim > MAX_HEAD_DIM || shape->head_dim % 8) {
        return fail(err, "head_dim %d: the cache takes multiples of 8 up to %d", shape->head_dim,
                    MAX_HEAD_DIM);
    }
    if (group * shape->n_kv_heads != shape->n_heads || group > TILE_ROWS) {
        return fail(err,
                    "%d query heads do not share %d kv heads evenly, or more than %d share one",
                    shape->n_heads, shape->n_kv_heads, TILE_ROWS);
    }
    const KVTypes stored[PAGE_CLASSES] = {kvcache_both(kv->type), types, demoted_types};
    for (int i = 0; i < PAGE_CLASSES; i++)
        kv->store[i] = (KVStore){stored[i], .page_bytes = kvcache_page_bytes(shape, stored[i])};
    kv->partial = malloc((size_t)SPLIT_ROWS * shape->n_heads * SPLITS * (shape->head_dim + 2) *
                         sizeof(float));
    if (!kv->partial) return fail(err, "out of memory for attention scratch");
    return 0;
}

void kvcache_close(KVCache *kv) {
    for (int i = 0; i < kv->n_seqs; i++) seq_free(kv, &kv->seqs[i]);
    for (KVStore *store = kv->store; store < kv->store + PAGE_CLASSES; store++) {
        for (int i = 0; i < store->n_slabs; i++) munmap(store->slab[i], slab_bytes(store));
        free(store->slab);
        free(store->free_page);
    }
    tensors_close(&kv->file);
    free(kv->seqs);
    free(kv->pages);
    free(kv->partial);
    free_packed(kv);
    free(kv->lse);
    *kv = (KVCache){0};
}

// ---- appending ----

// The last, partly filled page of a head is about to be written: if others list it too, take a
// copy.
static int own_last_page(KVCache *kv, KVHead *h, char *err) {
    int last = pages_used(h) - 1;
    if ((h->len - h->dropped) % PAGE == 0 || kv->pages[h->page[last]].refs == 1) return 0;
    int id = page_take(kv, PAGE_FULL, err);
    if (id < 0) return -1;
    const KVPage *from = &kv->pages[h->page[last]], *to = &kv->pages[id];
    size_t half = kv->store[PAGE_FULL].page_bytes / 2;
    memcpy(to->k.data, from->k.data, half);
    memcpy(to->v.data, from->v.data, half);
    memcpy(to->pos, from->pos, PAGE * sizeof(int));
    page_unref(kv, h->page[last]);
    h->page[last] = id;
    return 0;
}

static int head_reserve(KVCache *kv, KVHead *h, int n, char *err) {
    int need = (h->len - h->dropped + n + PAGE - 1) / PAGE;
    if (own_last_page(kv, h, err) != 0 || head_room(h, need, err) != 0) return -1;
    while (h->n_pages < need) {
        int id = page_new(kv, err);
        if (id < 0) return -1;
        h->page[h->n_pages++] = id;
    }
    return 0;
}

// A page of a head that is to settle, and the page it becomes.
typedef struct {
    int *listed, id;
} Settle;

typedef struct {
    const KVCache *kv;
    const Settle *pages;  // [n]
} SettleJob;

static void settle_page(void *ctx, int unit) {
    const SettleJob *job = ctx;
    const Settle *s = &job->pages[unit];
    KVPage *from = &job->kv->pages[*s->listed], *to = &job->kv->pages[s->id];
    float x[MAX_HEAD_DIM * PAGE];
    memcpy(to->pos, from->pos, PAGE * sizeof(int));
    for (Side side = KEYS; side <= VALUES; side++) {
        part_read(job->kv, part_of(from, side), side, x);
        part_write(job->kv, part_of(to, side), side, x);
    }
}

// Full pages with 64 pairs or more after them.
static int pages_ripe(const KVHead *h) { return max_int((h->len - h->dropped) / PAGE - 1, 0); }

static bool settles(const KVCache *kv, const KVHead *h, int page) {
    return kv->pages[h->page[page]].class == PAGE_FULL;
}

// Gives each of n pages that are to settle a page to become. On failure there are none.
static int settle_plan(KVCache *kv, KVSeq *s, Settle *pages, char *err) {
    int n = 0;
    for (KVHead *h = s->head; h < s->head + n_heads_total(kv); h++) {
        for (int i = h->settled; i < pages_ripe(h); i++) {
            if (!settles(kv, h, i)) continue;
            int id = page_take(kv, PAGE_SETTLED, err);
            if (id >= 0) pages[n++] = (Settle){&h->page[i], id};
            while (id < 0 && n > 0) page_unref(kv, pages[--n].id);
            if (id < 0) return -1;
        }
    }
    return 0;
}

// Settles the pages of a sequence that are ripe, from each head's `settled` on.
static int seq_settle(KVCache *kv, KVSeq *s, char *err) {
    int n = 0;
    if (!is_codes(kv->types.k) && !is_codes(kv->types.v)) return 0;
    for (const KVHead *h = s->head; h < s->head + n_heads_total(kv); h++) {
        for (int i = h->settled; i < pages_ripe(h); i++) n += settles(kv, h, i);
    }
    if (n == 0) return 0;
    Settle *pages = malloc((size_t)n * sizeof *pages);
    if (!pages) return fail(err, "out of memory for settling %d pages", n);
    int status = settle_plan(kv, s, pages, err);
    if (status == 0) parallel_for(kv->pool, n, settle_page, &(SettleJob){kv, pages});
    for (int i = 0; i < n && status == 0; i++) {
        page_unref(kv, *pages[i].listed);
        *pages[i].listed = pages[i].id;
    }
    for (KVHead *h = s->head; status == 0 && h < s->head + n_heads_total(kv); h++)
        h->settled = max_int(h->settled, pages_ripe(h));
    free(pages);
    return status;
}

int kvcache_settle(KVCache *kv, int seq, char *err) {
    if (seq_settle(kv, &kv->seqs[seq], err) != 0) return -1;
    kvcache_trim(kv);
    return 0;
}

// The many rows of a long run read pages that were packed once for all of them, whatever the page's
// type. One layer's are kept at a time; f32 pages stay as they are.
static size_t packed_bytes(const KVShape *shape, Side side) {
    int d = shape->head_dim;
    return side == KEYS ? kern.packed_bytes(d, PAGE) : kern.packed_bytes(PAGE, d);
}

size_t kvcache_packed_page(const KVShape *shape) {
    return packed_bytes(shape, KEYS) + packed_bytes(shape, VALUES);
}

static bool reads_packed(const KVCache *kv, int n_tokens) {
    return n_tokens >= MANY_TOKENS && kv->type == KV_F16;
}

// Room for the pages of one layer when seq will have n tokens more; beside those of the other runs
// reserved for the batch, so that they are worked on together, as long as that costs little.
static int reserve_packed(KVCache *kv, int seq, int n, char *err) {
    int pages = 0;
    for (int i = 0; i < n_heads_total(kv); i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        pages = max_int(pages, (h->len - h->dropped + n + PAGE - 1) / PAGE);
    }
    size_t run = kvcache_packed_page(&kv->shape) * (size_t)pages * kv->shape.n_kv_heads;
    kv->packed_wanted += run;
    size_t need = kv->packed_wanted < run + PACKED_BESIDE ? kv->packed_wanted : run + PACKED_BESIDE;
    if (need <= kv->packed_room) return 0;
    free_packed(kv);
    kv->packed = slab_map(need + need / 4);
    if (!kv->packed) return fail(err, "out of memory for %d packed pages", pages);
    kv->packed_room = need + need / 4;
    return 0;
}

int kvcache_reserve(KVCache *kv, int seq, int n, char *err) {
    if (kv->settling && seq_settle(kv, &kv->seqs[seq], err) != 0) return -1;
    for (int i = 0; i < n_heads_total(kv); i++) {
        if (head_reserve(kv, &kv->seqs[seq].head[i], n, err) != 0) return -1;
    }
    return reads_packed(kv, n) ? reserve_packed(kv, seq, n, err) : 0;
}

// Pair t of a head becomes k, v [head_dim] at position pos; its page is the head's own.
static void write_pair(const KVCache *kv, const KVHead *h, int t, const float *k, const float *v,
                       int pos) {
    int d = kv->shape.head_dim, i = t - h->dropped, c = i % PAGE;
    const KVPage *p = &kv->pages[h->page[i / PAGE]];
    p->pos[c] = pos;
    if (kv->type == KV_F32) {
        float *pk = (float *)p->k.data;
        for (int j = 0; j < d; j++) pk[j * PAGE + c] = k[j];
        memcpy((float *)p->v.data + c * d, v, (size_t)d * sizeof(float));
    } else {
        uint16_t half[MAX_HEAD_DIM], *pk = (uint16_t *)p->k.data;
        kern.f32_to_f16(half, k, (size_t)d);
        for (int j = 0; j < d; j++) pk[j * PAGE + c] = half[j];
        kern.f32_to_f16((uint16_t *)p->v.data + c * d, v, (size_t)d);
    }
}

typedef struct {
    KVCache *kv;
    int layer;
    const KVRun *runs;
    const float *k, *v;
} Append;

static void append_unit(void *ctx, int unit) {
    const Append *a = ctx;
    int g = unit % a->kv->shape.n_kv_heads, d = a->kv->shape.head_dim, row0 = 0;
    const KVRun *run = &a->runs[unit / a->kv->shape.n_kv_heads];
    KVHead *h = kvcache_head(a->kv, run->seq, a->layer, g);
    for (const KVRun *before = a->runs; before < run; before++) row0 += before->n;
    for (int i = 0; i < run->n; i++) {
        size_t at = ((size_t)(row0 + i) * a->kv->shape.n_kv_heads + g) * d;
        write_pair(a->kv, h, h->len + i, a->k + at, a->v + at, a->kv->seqs[run->seq].next_pos + i);
    }
    h->len += run->n;
}

void kvcache_append(KVCache *kv, int layer, const KVRun *runs, int n_runs, const float *k,
                    const float *v) {
    Append a = {kv, layer, runs, k, v};
    bool many = n_runs > 1 || runs[0].n > SPLIT_TOKENS;
    parallel_for(many ? kv->pool : NULL, n_runs * kv->shape.n_kv_heads, append_unit, &a);
}

// Whole pages that the next token can no longer see are let go.
static void drop_window(KVCache *kv, KVHead *h, int window) {
    int n = (h->len - window + 1 - h->dropped) /
            PAGE;  // the next token sees itself and window - 1 before
    if (n <= 0) return;
    for (int i = 0; i < n; i++) page_unref(kv, h->page[i]);
    memmove(h->page, h->page + n, (size_t)(h->n_pages - n) * sizeof *h->page);
    h->n_pages -= n;
    h->dropped += n * PAGE;
    h->settled = max_int(h->settled - n, 0);
}

void kvcache_advance(KVCache *kv, const KVRun *runs, int n_runs) {
    kv->packed_wanted = 0;
    for (int r = 0; r < n_runs; r++) {
        kv->seqs[runs[r].seq].next_pos += runs[r].n;
        for (int l = 0; l < kv->shape.n_layers; l++) {
            for (int g = 0; kv->shape.window[l] && g < kv->shape.n_kv_heads; g++) {
                drop_window(kv, kvcache_head(kv, runs[r].seq, l, g), kv->shape.window[l]);
            }
        }
    }
}

// ---- attention ----

// Pairs [lo, hi) of a head.
typedef struct {
    int lo, hi;
} Range;

typedef struct {
    KVCache *kv;
    int layer;
    const KVRun *runs;
    int n_runs;
    const KVQuery *query;
    int row[SPLIT_ROWS];     // of each run's first token in the batch
    int splits[SPLIT_ROWS];  // page ranges of each run
    int tile_runs;           // of runs with more than one: as many as fit one tile
    int slot[SPLIT_ROWS];    // of a run with more than one: where its partial results begin
    int pages[SPLIT_ROWS];   // packed for each kv head of each run; 0: it reads them as they are
    uint8_t *packed[SPLIT_ROWS];
} Attend;

// Query rows of one kv head that pass over the pages together; row i is token i / group.
typedef struct {
    const KVCache *kv;
    const KVHead *head;
    int n, group, window;
    int first;  // pair of the first token's own key; the token after it owns the next pair
    const uint8_t *packed;  // the head's pages, packed, or NULL; the page at hand is number page
    int page;
    const void *q_packed;               // q by kern.pack_rows
    float q[TILE_ROWS * MAX_HEAD_DIM];  // [n][head_dim], times the attention scale
    float o[TILE_ROWS * MAX_HEAD_DIM];  // [n][head_dim] sum of exp(s - max) v
    float max[TILE_ROWS], sum[TILE_ROWS];
    float s[TILE_ROWS * PAGE];
    uint16_t q_room[TILE_ROWS * MAX_HEAD_DIM], s_room[TILE_ROWS * PAGE];
} Tile;

static void pack_side(const KVCache *kv, void *packed, const KVPart *p, Side side) {
    int d = kv->shape.head_dim, inner = code_rows(d, side), cols = side == KEYS ? PAGE : d;
    float x[MAX_HEAD_DIM * PAGE];
    if (p->type == KV_F16) {
        kern.pack_f16(packed, (const uint16_t *)p->data, inner, cols);
    } else {
        part_read(kv, p, side, x);
        kern.pack_f32(packed, x, inner, cols);
    }
}

static const void *packed_side(const Tile *t, Side side) {
    const KVShape *shape = &t->kv->shape;
    const uint8_t *page = t->packed + kvcache_packed_page(shape) * (size_t)t->page;
    return side == KEYS ? page : page + packed_bytes(shape, KEYS);
}

// ahead: the same side of a page that will be read later, which is fetched meanwhile.
static void codes_product(Tile *t, float *c, const float *a, const KVPart *p, const KVPart *ahead,
                          Side side) {
    int d = t->kv->shape.head_dim, inner = code_rows(d, side), cols = side == KEYS ? PAGE : d;
    for (int b = 0; b < n_blocks(d, side); b++) {
        Codes codes = part_codes(t->kv, p, side, b);
        if (ahead->type == p->type) codes.ahead = ahead->data + (codes.data - p->data);
        kern.gemm_codes(&(CodeGemm){.c = c + b * CODE_COLS,
                                    .ldc = (size_t)cols,
                                    .a = a,
                                    .lda = (size_t)inner,
                                    .b = &codes,
                                    .n = t->n,
                                    .add = side == VALUES});
    }
}

// Whether a product takes its rows packed.
static bool packs_rows(const Tile *t, const KVPart *p) { return t->packed || p->type == KV_F16; }

// Scores [n][64] = rows . keys, or out [n][head_dim] += rows . values. Pages are packed for the
// many rows of a long run, and converted on the fly for the few of a short one; f32 pages always
// count in f32. The length of the run alone decides, so that company changes no bit.
static void tile_product(Tile *t, float *c, const void *rows, const KVPart *p, const KVPart *ahead,
                         Side side) {
    int d = t->kv->shape.head_dim, inner = code_rows(d, side), cols = side == KEYS ? PAGE : d;
    const Gemm g = {.c = c,
                    .ldc = (size_t)cols,
                    .a = rows,
                    .lda = (size_t)inner,
                    .b = t->packed ? packed_side(t, side) : p->data,
                    .n = t->n,
                    .inner = inner,
                    .cols = cols,
                    .add = side == VALUES,
                    .ahead = ahead->type == KV_F16 ? ahead->data : p->data};
    if (t->packed)
        kern.gemm_packed(&g);
    else if (p->type == KV_F32)
        kern.gemm_f32(&g);
    else if (p->type == KV_F16)
        kern.gemm_f16(&g);
    else
        codes_product(t, c, rows, p, ahead, side);
}

// s [n][64] = q . k, scaled and capped.
static void tile_scores(Tile *t, const KVPage *p, const KVPage *ahead) {
    float cap = t->kv->shape.softcap;
    const void *rows = packs_rows(t, &p->k) ? t->q_packed : t->q;
    tile_product(t, t->s, rows, &p->k, &ahead->k, KEYS);
    for (int i = 0; cap > 0.0f && i < t->n * PAGE; i++) t->s[i] = cap * tanhf(t->s[i] / cap);
}

// Of the page whose first pair is base, rows see the pairs in r up to their own, a window back. The
// scores of all others become -inf.
static void hide_unseen(Tile *t, int base, Range r) {
    int last = t->first + (t->n - 1) / t->group;
    bool whole = r.lo <= base && min_int(r.hi, t->first + 1) >= base + PAGE;
    if (whole && (!t->window || last - t->window < base)) return;
    for (int i = 0; i < t->n; i++) {
        int own = t->first + i / t->group;
        int lo = max_int(r.lo, t->window ? own - t->window + 1 : 0) - base;
        int hi = max_int(min_int(r.hi, own + 1) - base, 0);
        for (int c = 0; c < min_int(lo, PAGE); c++) t->s[i * PAGE + c] = -INFINITY;
        for (int c = hi; c < PAGE; c++) t->s[i * PAGE + c] = -INFINITY;
    }
}

// Raises the rows' running maxima to those of their scores.
static void raise_max(Tile *t) {
    int d = t->kv->shape.head_dim;
    float max[TILE_ROWS];
    kern.max_rows(max, t->s, t->n);
    for (int i = 0; i < t->n; i++) {
        if (!(max[i] > t->max[i])) continue;
        float shrink = expf(t->max[i] - max[i]);
        t->sum[i] *= shrink;
        kern.scale(t->o + i * d, shrink, d);
        t->max[i] = max[i];
    }
}

// The weights of the scores, as rows for a product, and added to the rows' sums.
static const void *exp_scores(Tile *t, bool packed) {
    int d = t->kv->shape.head_dim;
    if (packed && kern.exp_packed) return kern.exp_packed(t->s_room, t->s, t->max, t->sum, t->n, d);
    for (int i = 0; i < t->n; i++)
        t->sum[i] += kern.exp64(t->s + i * PAGE, softmax_shift(t->max[i]));
    return packed ? kern.pack_rows(t->s_room, t->s, t->n, PAGE, d) : t->s;
}

static void prefetch_scales(const KVCache *kv, const KVPart *p, Side side) {
    size_t bytes = n_scales(kv->shape.head_dim, p->type, side) * sizeof *p->scale;
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const uint8_t *)p->scale + i);
    for (size_t i = 0; p->min && i < bytes; i += 64)
        __builtin_prefetch((const uint8_t *)p->min + i);
}

// One page with the online softmax of arXiv 1805.02867.
static void attend_page(Tile *t, int page, Range r) {
    const int *list = t->head->page, last = pages_used(t->head) - 1;
    const KVPage *p = &t->kv->pages[list[page]];
    const KVPage *ahead = &t->kv->pages[list[min_int(page + PAGES_AHEAD, last)]];
    const KVPage *next = &t->kv->pages[list[min_int(page + PAGES_AHEAD + 1, last)]];
    __builtin_prefetch(&next->k), __builtin_prefetch(&next->v);
    prefetch_scales(t->kv, &ahead->k, KEYS), prefetch_scales(t->kv, &ahead->v, VALUES);
    int base = t->head->dropped + page * PAGE;
    t->page = page;
    tile_scores(t, p, ahead);
    hide_unseen(t, base, r);
    raise_max(t);
    const void *weights = exp_scores(t, packs_rows(t, &p->v));
    tile_product(t, t->o, weights, &p->v, &ahead->v, VALUES);
}

static void attend_range(Tile *t, Range r) {
    int last = t->first + (t->n - 1) / t->group;
    r.lo = max_int(max_int(r.lo, t->head->dropped), t->window ? t->first - t->window + 1 : 0);
    r.hi = min_int(r.hi, last + 1);
    if (r.lo >= r.hi) return;
    for (int p = (r.lo - t->head->dropped) / PAGE; p * PAGE + t->head->dropped < r.hi; p++)
        attend_page(t, p, r);
}

static int tokens_per_tile(const KVCache *kv) {
    return TILE_ROWS / (kv->shape.n_heads / kv->shape.n_kv_heads);
}

// Puts the query heads of kv head g of tokens [token, token + n) of run r under those that the tile
// has.
static void tile_add(Tile *t, const Attend *a, int g, int r, int token, int n) {
    const KVShape *shape = &a->kv->shape;
    int d = shape->head_dim;
    for (int i = 0; i < n; i++, t->n += t->group) {
        const float *q =
            a->query->q +
            ((size_t)(a->row[r] + token + i) * shape->n_heads + (size_t)g * t->group) * d;
        memcpy(t->q + t->n * d, q, (size_t)t->group * d * sizeof(float));
        kern.scale(t->q + t->n * d, shape->scale, t->group * d);
    }
}

// A tile of as many tokens of run r as fit, from token `token` on.
static void tile_load(Tile *t, const Attend *a, int g, int r, int token) {
    const KVShape *shape = &a->kv->shape;
    const KVRun *run = &a->runs[r];
    t->kv = a->kv, t->head = kvcache_head(a->kv, run->seq, a->layer, g);
    t->packed =
        a->pages[r] ? a->packed[r] + kvcache_packed_page(shape) * (size_t)g * a->pages[r] : NULL;
    t->n = 0, t->group = shape->n_heads / shape->n_kv_heads, t->window = shape->window[a->layer];
    t->first = t->head->len - run->n + token;
    tile_add(t, a, g, r, token, min_int(tokens_per_tile(a->kv), run->n - token));
}

// Once the tile has all its rows.
static void tile_pack(Tile *t) {
    t->q_packed = kern.pack_rows(t->q_room, t->q, t->n, t->kv->shape.head_dim, PAGE);
}

static void tile_start(Tile *t) {
    tile_pack(t);
    memset(t->o, 0, (size_t)t->n * t->kv->shape.head_dim * sizeof(float));
    for (int i = 0; i < t->n; i++) t->max[i] = -INFINITY, t->sum[i] = 0.0f;
}

static float *out_row(const Attend *a, int row, int h) {
    return a->query->out + (size_t)row * a->query->out_stride + h * a->kv->shape.head_dim;
}

static void tile_store(const Tile *t, const Attend *a, int g, int row) {
    int d = t->kv->shape.head_dim;
    for (int i = 0; i < t->n; i++) {
        float *out = out_row(a, row + i / t->group, g * t->group + i % t->group),
              r = 1.0f / t->sum[i];
        for (int j = 0; j < d; j++) out[j] = t->o[i * d + j] * r;
    }
}

// ---- attention while scoring ----

static bool scores_run(const Attend *a, const KVRun *run) {
    return a->kv->scoring && a->kv->scoring->seq == run->seq && a->kv->shape.window[a->layer] == 0;
}

// The pairs a run attends over, those of the scoring softmax first: *n_subset says how many ranges
// they are.
static int attend_ranges(const Attend *a, const KVRun *run, Range *r, int *n_subset) {
    const KVScoring *s = scores_run(a, run) ? a->kv->scoring : NULL;
    const int end = 1 << 30;
    if (!s || !s->subset) {
        r[0] = (Range){0, end};
        return *n_subset = 1;
    }
    r[0] = (Range){0, s->n_prefix}, r[1] = (Range){s->t0, s->t1}, r[2] = (Range){s->own, end};
    *n_subset = 3;
    if (s->local || !a->query->out) return 3;
    r[3] = (Range){s->n_prefix, s->t0}, r[4] = (Range){s->t1, s->own};
    return 5;
}

// Whether run r reads this page of a head.
static bool reads_page(const Attend *a, int r, const KVHead *h, int page) {
    const KVRun *run = &a->runs[r];
    int window = a->kv->shape.window[a->layer], lo = h->dropped + page * PAGE, hi = lo + PAGE;
    if (window && hi <= h->len - run->n - window + 1) return false;
    Range range[MAX_RANGES];
    int n_subset, n = attend_ranges(a, run, range, &n_subset);
    for (int i = 0; i < n; i++) {
        if (range[i].lo < hi && range[i].hi > lo) return true;
    }
    return false;
}

// Units as attend_unit's.
static void pack_unit(void *ctx, int unit) {
    const Attend *a = ctx;
    int r = unit % a->n_runs, i = unit / a->n_runs, n_kv_heads = a->kv->shape.n_kv_heads;
    int g = i % n_kv_heads, page = i / n_kv_heads;
    const KVHead *h = kvcache_head(a->kv, a->runs[r].seq, a->layer, g);
    if (page >= a->pages[r] || page >= pages_used(h) || !reads_page(a, r, h, page)) return;
    const KVPage *p = &a->kv->pages[h->page[page]];
    const KVShape *shape = &a->kv->shape;
    uint8_t *packed = a->packed[r] + kvcache_packed_page(shape) * ((size_t)g * a->pages[r] + page);
    pack_side(a->kv, packed, &p->k, KEYS);
    pack_side(a->kv, packed + packed_bytes(shape, KEYS), &p->v, VALUES);
}

// lse [rows][n_heads]
static void store_lse(const Tile *t, const Attend *a, int g, int row) {
    const KVScoring *s = a->kv->scoring;
    for (int i = 0; i < t->n; i++) {
        int token = i / t->group;
        float *lse =
            &a->kv->lse[(size_t)(row + token) * a->kv->shape.n_heads + g * t->group + i % t->group];
        *lse = t->max[i] + logf(t->sum[i]);
        if (s->pair_log) *lse += logf(a->query->x_norm[row + token]);
    }
}

// ---- cutting attention into work ----

// Work of one run: blocks of tokens x kv heads x page ranges. Long runs have many blocks and one
// range each; a few tokens have one block, whose pages are cut into ranges and merged afterwards.
// Where the sequences of a batch are forks that list the same pages in a range, the first one's
// tile takes the rows of all of them, so that those pages are read once. Cuts follow from a
// sequence alone and a row's bits do not depend on its neighbours: an answer is the same in any
// company.
static int run_blocks(const Attend *a, int r) {
    return (a->runs[r].n + tokens_per_tile(a->kv) - 1) / tokens_per_tile(a->kv);
}

static float *partial_at(const Attend *a, int slot, int h, int split) {
    size_t i = ((size_t)slot * a->kv->shape.n_heads + h) * SPLITS + split;
    return a->kv->partial + i * (a->kv->shape.head_dim + 2);
}

// The tile's rows from row `from` on are tokens of run r.
static void store_partial(const Tile *t, const Attend *a, int g, int r, int from, int split) {
    int d = t->kv->shape.head_dim;
    for (int i = 0; i < a->runs[r].n * t->group; i++) {
        float *p = partial_at(a, a->slot[r] + i / t->group, g * t->group + i % t->group, split);
        p[0] = t->max[from + i], p[1] = t->sum[from + i];
        memcpy(p + 2, t->o + (from + i) * d, (size_t)d * sizeof(float));
    }
}

// Pages in a range: enough for SPLITS of them, doubled rather than fitted, so that forks of nearly
// the same length are cut at the same places.
static int split_pages(const KVHead *h) {
    int pages = SPLIT_PAGES;
    while (pages * SPLITS < pages_used(h)) pages *= 2;
    return pages;
}

static Range split_range(const KVHead *h, int split) {
    int pages = split_pages(h), lo = h->dropped + split * pages * PAGE;
    return (Range){lo, min_int(lo + pages * PAGE, h->len)};
}

// In pages.
static int longest_head(const Attend *a, const KVRun *run) {
    int pages = 0;
    for (int g = 0; g < a->kv->shape.n_kv_heads; g++)
        pages = max_int(pages, pages_used(kvcache_head(a->kv, run->seq, a->layer, g)));
    return pages;
}

// Splits of a run: enough for its longest head.
static int count_splits(const Attend *a, const KVRun *run) {
    int splits = 1;
    if (run->n > min_int(SPLIT_TOKENS, tokens_per_tile(a->kv)) || scores_run(a, run)) return 1;
    for (int g = 0; g < a->kv->shape.n_kv_heads; g++) {
        const KVHead *h = kvcache_head(a->kv, run->seq, a->layer, g);
        splits = max_int(splits, (pages_used(h) + split_pages(h) - 1) / split_pages(h));
    }
    return splits;
}

// Whether run r reads the same pages as the run before it in this range, before either's own
// tokens.
static bool shares_split(const Attend *a, int g, int split, int r) {
    Range range[2];
    const KVHead *h[2];
    if (a->kv->shape.window[a->layer] || a->splits[r - 1] == 1 || a->splits[r] == 1) return false;
    for (int i = 0; i < 2; i++) {
        const KVRun *run = &a->runs[r - 1 + i];
        h[i] = kvcache_head(a->kv, run->seq, a->layer, g), range[i] = split_range(h[i], split);
        if (range[i].hi > h[i]->len - run->n || range[i].lo >= range[i].hi) return false;
    }
    if (range[0].lo != range[1].lo || range[0].hi != range[1].hi) return false;
    int first = range[0].lo / PAGE, n = (range[0].hi - range[0].lo + PAGE - 1) / PAGE;
    return memcmp(h[0]->page + first, h[1]->page + first, (size_t)n * sizeof *h[0]->page) == 0;
}

// Whether run r's rows go into the tile of the run before it in this range.
static bool joins_tile(const Attend *a, int g, int split, int r) {
    return r < a->n_runs && r % a->tile_runs > 0 && shares_split(a, g, split, r);
}

static void attend_split(const Attend *a, int r, int g, int split) {
    if (joins_tile(a, g, split, r)) return;
    Tile t;
    int end = r + 1;
    tile_load(&t, a, g, r, 0);
    Range pairs = split_range(t.head, split);
    for (; joins_tile(a, g, split, end); end++) tile_add(&t, a, g, end, 0, a->runs[end].n);
    if (end > r + 1) t.first = pairs.hi;  // before every row's own pair
    tile_start(&t);
    attend_range(&t, pairs);
    for (int i = r, from = 0; i < end; from += a->runs[i++].n * t.group)
        store_partial(&t, a, g, i, from, split);
}

static void attend_block(const Attend *a, int r, int g, int token) {
    const KVRun *run = &a->runs[r];
    Tile t;
    Range ranges[MAX_RANGES];
    int n_subset, n_ranges = attend_ranges(a, run, ranges, &n_subset);
    tile_load(&t, a, g, r, token);
    tile_start(&t);
    for (int i = 0; i < n_ranges; i++) {
        attend_range(&t, ranges[i]);
        if (i == n_subset - 1 && scores_run(a, run)) store_lse(&t, a, g, a->row[r] + token);
    }
    if (a->query->out) tile_store(&t, a, g, a->row[r] + token);
}

static int run_units(const Attend *a, int r) {
    return a->kv->shape.n_kv_heads * (a->splits[r] > 1 ? a->splits[r] : run_blocks(a, r));
}

// Unit i of run r stands at i * n_runs + r: what one tile does for all runs is spread over the
// whole job. The ranges of a head follow each other, so that a thread mostly goes on to the pages
// that the range before had fetched.
static void attend_unit(void *ctx, int unit) {
    const Attend *a = ctx;
    int r = unit % a->n_runs, i = unit / a->n_runs, n_kv_heads = a->kv->shape.n_kv_heads;
    if (i >= run_units(a, r)) return;
    if (a->splits[r] > 1)
        attend_split(a, r, i / a->splits[r], i % a->splits[r]);
    else
        attend_block(a, r, i % n_kv_heads, i / n_kv_heads * tokens_per_tile(a->kv));
}

// out of one (token, query head) from its page ranges, in their order. Units as attend_unit's, and
// a token's heads follow each other.
static void merge_unit(void *ctx, int unit) {
    const Attend *a = ctx;
    int r = unit % a->n_runs, token = unit / a->n_runs / a->kv->shape.n_heads,
        h = unit / a->n_runs % a->kv->shape.n_heads;
    int d = a->kv->shape.head_dim, splits = a->splits[r], slot = a->slot[r] + token;
    if (splits == 1 || token >= a->runs[r].n) return;
    float max = -INFINITY, sum = 0.0f, *out = out_row(a, a->row[r] + token, h);
    for (int i = 0; i < splits; i++) max = fmaxf(max, partial_at(a, slot, h, i)[0]);
    memset(out, 0, (size_t)d * sizeof *out);
    for (int i = 0; i < splits; i++) {
        const float *p = partial_at(a, slot, h, i);
        if (p[1] == 0.0f) continue;
        float w = expf(p[0] - max);
        sum += w * p[1];
        for (int j = 0; j < d; j++) out[j] += w * p[2 + j];
    }
    kern.scale(out, 1.0f / sum, d);
}

// ---- the scoring sweep ----

// Once the log-sum-exp of each row is known, the weight of pair j in row t is exp(q_t . k_j -
// lse_t), so the largest weight needs no exp at all: the sweep over the scored pages is a product
// and a maximum.
typedef struct {
    const Attend *a;
    int r;        // the run whose rows score
    Range pages;  // of the scored pairs
} Sweep;

// Folds the tile's rows into acc [group][64].
static void sweep_rows(Tile *t, const KVScoring *s, const float *lse, int n_heads, int base,
                       float (*acc)[PAGE]) {
    for (int i = 0; i < t->n; i++) {
        float *row = t->s + i * PAGE, b = lse[(size_t)(i / t->group) * n_heads + i % t->group];
        for (int c = max_int(t->first + i / t->group + 1 - base, 0); c < PAGE; c++)
            row[c] = -INFINITY;
        if (!s->sum) {
            kern.max_into(acc[i % t->group], row, -b);
        } else {
            kern.exp64(row, b);
            kern.add(acc[i % t->group], row, PAGE);
        }
    }
}

// Raises the scores of one page's pairs by acc [group][64].
static void raise_scores(const Attend *a, int g, int base, float (*acc)[PAGE]) {
    const KVScoring *s = a->kv->scoring;
    int group = a->kv->shape.n_heads / a->kv->shape.n_kv_heads,
        l = kvcache_scored_index(&a->kv->shape, a->layer);
    float *score = s->score + ((size_t)l * a->kv->shape.n_kv_heads + g) * s->n_ctx - s->n_prefix;
    for (int t = max_int(base, s->t0); t < min_int(base + PAGE, s->t1); t++) {
        for (int i = 0; i < group; i++) {
            float v = acc[i][t - base];
            if (s->pair_log) {
                v += s->pair_log[((size_t)l * a->kv->shape.n_heads + g * group + i) * s->n_ctx + t -
                                 s->n_prefix];
            }
            score[t] = s->sum ? score[t] + v : fmaxf(score[t], v);
        }
    }
}

// Units of SWEEP_PAGES pages of one kv head: the rows are loaded once for all of them.
static void sweep_unit(void *ctx, int unit) {
    const Sweep *w = ctx;
    const KVCache *kv = w->a->kv;
    const KVRun *run = &w->a->runs[w->r];
    int g = unit % kv->shape.n_kv_heads,
        lo = w->pages.lo + unit / kv->shape.n_kv_heads * SWEEP_PAGES,
        hi = min_int(lo + SWEEP_PAGES, w->pages.hi);
    int group = kv->shape.n_heads / kv->shape.n_kv_heads, step = tokens_per_tile(kv);
    const KVHead *h = kvcache_head(kv, run->seq, w->a->layer, g);
    Tile t;
    float acc[SWEEP_PAGES][TILE_ROWS][PAGE];
    for (int p = lo; p < hi; p++) {
        for (int i = 0; i < group * PAGE; i++)
            acc[p - lo][i / PAGE][i % PAGE] = kv->scoring->sum ? 0.0f : -INFINITY;
    }
    for (int i = 0; i < run->n; i += step) {
        const float *lse = kv->lse + (size_t)(w->a->row[w->r] + i) * kv->shape.n_heads + g * group;
        tile_load(&t, w->a, g, w->r, i);
        tile_pack(&t);
        int last = t.first + (t.n - 1) / group;
        for (t.page = lo; t.page < hi && t.page * PAGE <= last; t.page++) {
            const KVPage *p = &kv->pages[h->page[t.page]];
            tile_scores(&t, p, p);
            sweep_rows(&t, kv->scoring, lse, kv->shape.n_heads, t.page * PAGE, acc[t.page - lo]);
        }
    }
    for (int p = lo; p < hi; p++) raise_scores(w->a, g, p * PAGE, acc[p - lo]);
}

static void sweep(const Attend *a, int r) {
    const KVScoring *s = a->kv->scoring;
    int len = kvcache_head(a->kv, a->runs[r].seq, a->layer, 0)->len, t1 = min_int(s->t1, len);
    if (s->t0 >= t1) return;
    Sweep w = {a, r, {s->t0 / PAGE, (t1 + PAGE - 1) / PAGE}};
    int n_parts = (w.pages.hi - w.pages.lo + SWEEP_PAGES - 1) / SWEEP_PAGES;
    parallel_for(a->kv->pool, n_parts * a->kv->shape.n_kv_heads, sweep_unit, &w);
}

int kvcache_score_begin(KVCache *kv, KVScoring *s, char *err) {
    free(kv->lse);
    kv->lse = malloc((size_t)s->max_rows * kv->shape.n_heads * sizeof *kv->lse);
    if (!kv->lse) return fail(err, "out of memory for scoring %d rows", s->max_rows);
    kv->scoring = s;
    return 0;
}

void kvcache_score_end(KVCache *kv) { kv->scoring = NULL; }

int kvcache_scored_layers(const KVShape *shape, int *layers) {
    int n = 0;
    for (int l = 0; l < shape->n_layers; l++) {
        if (shape->window[l] != 0) continue;
        if (layers) layers[n] = l;
        n++;
    }
    return n;
}

// Multiplications and additions that run r asks for: q . k and p v of every pair a row sees, and
// q . k of the scoring sweep.
static double run_ops(const Attend *a, int r) {
    const KVRun *run = &a->runs[r];
    const KVShape *shape = &a->kv->shape;
    const KVScoring *s = scores_run(a, run) ? a->kv->scoring : NULL;
    Range range[MAX_RANGES];
    int n_subset, n_ranges = attend_ranges(a, run, range, &n_subset);
    int window = shape->window[a->layer], group = shape->n_heads / shape->n_kv_heads;
    double pairs = 0.0;
    for (int i = 0; i < run->n * shape->n_kv_heads; i++) {
        const KVHead *h = kvcache_head(a->kv, run->seq, a->layer, i % shape->n_kv_heads);
        int end = h->len - run->n + i / shape->n_kv_heads + 1;  // its own pair is the last
        int begin = max_int(h->dropped, window ? end - window : 0);
        for (int j = 0; j < n_ranges; j++)
            pairs += max_int(min_int(range[j].hi, end) - max_int(range[j].lo, begin), 0);
        if (s) pairs += 0.5 * max_int(min_int(s->t1, end) - s->t0, 0);
    }
    return 4.0 * shape->head_dim * group * pairs;
}

static void attend_runs(Attend *a) {
    int n_units = 0, n_pages = 0, n_merged = 0, n_heads = a->kv->shape.n_heads;
    for (int r = 0; r < a->n_runs; r++) {
        n_units = max_int(n_units, run_units(a, r));
        if (a->splits[r] > 1) n_merged = max_int(n_merged, a->runs[r].n);
        n_pages = max_int(n_pages, a->pages[r]);
        a->kv->ops += run_ops(a, r);
    }
    parallel_for(a->kv->pool, n_pages * a->kv->shape.n_kv_heads * a->n_runs, pack_unit, a);
    parallel_for(a->kv->pool, n_units * a->n_runs, attend_unit, a);
    parallel_for(a->n_runs > 1 ? a->kv->pool : NULL, n_merged * n_heads * a->n_runs, merge_unit, a);
    for (int r = 0; r < a->n_runs; r++) {
        if (scores_run(a, &a->runs[r])) sweep(a, r);
    }
}

void kvcache_attend(KVCache *kv, int layer, const KVRun *runs, int n_runs, const KVQuery *query) {
    Attend a = {.kv = kv, .layer = layer, .query = query};
    for (int r = 0, row = 0; r < n_runs;) {  // as many runs at a time as there is room for
        int slots = 0, most = 1;
        size_t packed = 0;
        a.runs = runs + r;
        for (a.n_runs = 0; r < n_runs && a.n_runs < SPLIT_ROWS; row += runs[r++].n) {
            int i = a.n_runs, splits = count_splits(&a, &runs[r]);
            int pages = reads_packed(kv, runs[r].n) ? longest_head(&a, &runs[r]) : 0;
            size_t more = kvcache_packed_page(&kv->shape) * (size_t)pages * kv->shape.n_kv_heads;
            if (splits > 1 && slots + runs[r].n > SPLIT_ROWS) break;
            if (packed + more > kv->packed_room && a.n_runs > 0) break;
            if (more > kv->packed_room) pages = 0, more = 0;  // not reserved: read as they are
            a.row[i] = row, a.splits[i] = splits, a.slot[i] = slots;
            a.pages[i] = pages, a.packed[i] = pages ? kv->packed + packed : NULL;
            if (splits > 1) slots += runs[r].n, most = max_int(most, runs[r].n);
            packed += more;
            a.n_runs++;
        }
        a.tile_runs = tokens_per_tile(kv) / most;
        attend_runs(&a);
    }
}

// ---- evicting ----

// One head's way from its old list of pages to the new one.
typedef struct {
    KVHead *h, to;
    int *from;      // [to.len] which old pair each new one is; rising in each of the two parts
    int n_demoted;  // the first new pairs, whole pages of them
} Eviction;

// Whether new page i is an old page in which nothing moves: it is listed again, not copied.
static bool page_stays(const KVCache *kv, const Eviction *c, int i) {
    const int *from = c->from + i * PAGE;
    int n = min_int(c->to.len - i * PAGE, PAGE), last = from[n - 1];
    if (from[0] % PAGE != 0 || last != from[0] + n - 1) return false;
    if (i * PAGE < c->n_demoted) return kv->pages[c->h->page[from[0] / PAGE]].class == PAGE_DEMOTED;
    return n == PAGE || last == c->h->len - 1;
}

// Which pairs stay, and in which order. With demote, those with keep = 0 come first, after the ones
// that were demoted before; less than a page of them stays among the others.
static void order_pairs(const KVCache *kv, Eviction *c, int first, int n, const uint8_t *keep,
                        bool demote) {
    const KVHead *h = c->h;
    int len = h->len, before = 0, gone = 0;
    while (demote && before < len && kv->pages[h->page[before / PAGE]].class == PAGE_DEMOTED)
        before += PAGE;
    for (int t = max_int(first, before); t < first + n; t++) gone += !keep[t - first];
    for (int t = 0; t < before; t++) c->from[c->to.len++] = t;
    int quota = demote ? gone / PAGE * PAGE : 0;
    for (int t = max_int(first, before), left = quota; left > 0; t++) {
        if (!keep[t - first]) c->from[c->to.len++] = t, left--;
    }
    c->n_demoted = c->to.len;
    for (int t = before, left = quota; t < len; t++) {
        bool out = t >= first && t < first + n && !keep[t - first];
        if (!out || (demote && left-- <= 0)) c->from[c->to.len++] = t;
    }
}

// The new list of a head, its new pages still empty.
static int plan_pages(KVCache *kv, Eviction *c, char *err) {
    if (head_room(&c->to, pages_used(&c->to), err) != 0) return -1;
    for (int i = 0; i < pages_used(&c->to); i++) {
        bool stays = page_stays(kv, c, i);
        PageClass class = i * PAGE < c->n_demoted ? PAGE_DEMOTED : PAGE_FULL;
        int id = stays ? c->h->page[c->from[i * PAGE] / PAGE] : page_take(kv, class, err);
        if (id < 0) return -1;
        if (stays) kv->pages[id].refs++;
        c->to.page[c->to.n_pages++] = id;
    }
    return 0;
}

// Keys or values x of an old page become columns, or rows, of y: pairs from [n] go to `to` and
// after it.
static void move_pairs(float *y, int to, const float *x, const int *from, int n, int d, Side side) {
    for (int row = 0; side == KEYS && row < d * PAGE; row += PAGE) {
        for (int i = 0; i < n; i++) y[row + to + i] = x[row + from[i] % PAGE];
    }
    for (int i = 0; side == VALUES && i < n; i++)
        memcpy(y + (to + i) * d, x + from[i] % PAGE * d, (size_t)d * sizeof *y);
}

typedef struct {
    const KVCache *kv;
    const Eviction *c;
} EvictionJob;

// Fills one new page. Full pages do not change a bit; what had settled is read back.
static void fill_page(void *ctx, int page) {
    const KVCache *kv = ((EvictionJob *)ctx)->kv;
    const Eviction *c = ((EvictionJob *)ctx)->c;
    int d = kv->shape.head_dim;
    if (page_stays(kv, c, page)) return;
    KVPage *dst = &kv->pages[c->to.page[page]];
    const int *from = c->from + page * PAGE, n = min_int(c->to.len - page * PAGE, PAGE);
    float x[MAX_HEAD_DIM * PAGE], y[MAX_HEAD_DIM * PAGE];
    for (Side side = KEYS; side <= VALUES; side++) {
        if (n < PAGE) memset(y, 0, (size_t)d * PAGE * sizeof *y);
        for (int i = 0, m; i < n; i += m) {
            int old = from[i] / PAGE;
            for (m = 1; i + m < n && from[i + m] / PAGE == old;) m++;
            part_read(kv, part_of(&kv->pages[c->h->page[old]], side), side, x);
            move_pairs(y, i, x, from + i, m, d, side);
        }
        part_write(kv, part_of(dst, side), side, y);
    }
    for (int i = 0; i < PAGE; i++)
        dst->pos[i] = i < n ? kv->pages[c->h->page[from[i] / PAGE]].pos[from[i] % PAGE] : -1;
}

// What to keep of a head's pairs [first, first + n), and whether the others are demoted.
typedef struct {
    int first, n;
    const uint8_t *keep;  // [n]
    bool demote;
} Evict;

// On failure the head has not changed.
static int evict_head(KVCache *kv, KVHead *h, const Evict *e, char *err) {
    int stay = h->len;
    for (int i = 0; i < e->n && !e->demote; i++) stay -= !e->keep[i];
    Eviction c = {.h = h, .from = malloc(((size_t)stay + 1) * sizeof *c.from)};
    if (!c.from) return fail(err, "out of memory for evicting from %d pairs", h->len);
    order_pairs(kv, &c, e->first, e->n, e->keep, e->demote);
    int status = plan_pages(kv, &c, err);
    if (status == 0) {
        parallel_for(kv->pool, c.to.n_pages, fill_page, &(EvictionJob){kv, &c});
        KVHead old = *h;
        *h = c.to, c.to = old;
    }
    head_free(kv, &c.to);
    free(c.from);
    return status;
}

int kvcache_evict_head(KVCache *kv, int seq, int layer, int g, int first, int n,
                       const uint8_t *keep, char *err) {
    return evict_head(kv, kvcache_head(kv, seq, layer, g), &(Evict){first, n, keep, false}, err);
}

// Head by head, so that memory for one head's new pages is enough.
static int evict_layers(KVCache *kv, int seq, Evict e, char *err) {
    free_packed(kv);  // before new pages are taken
    for (int l = 0; l < kv->shape.n_layers; l++) {
        for (int g = 0; kv->shape.window[l] == 0 && g < kv->shape.n_kv_heads; g++) {
            if (evict_head(kv, kvcache_head(kv, seq, l, g), &e, err) != 0) return -1;
            e.keep += e.n;
        }
    }
    kvcache_trim(kv);
    return 0;
}

int kvcache_evict(KVCache *kv, int seq, int n_prefix, int n_ctx, const uint8_t *keep, char *err) {
    return evict_layers(kv, seq, (Evict){n_prefix, n_ctx, keep, false}, err);
}

int kvcache_demote(KVCache *kv, int seq, int n_prefix, int n_ctx, const uint8_t *keep, char *err) {
    return evict_layers(kv, seq, (Evict){n_prefix, n_ctx, keep, true}, err);
}

// ---- looking inside ----

static float number_at(const KVPart *p, int i) {
    return p->type == KV_F32 ? ((const float *)p->data)[i] : f16_f32(((uint16_t *)p->data)[i]);
}

// One pair's key or value: every 64th number from c on, or row c.
static void part_pair(const KVCache *kv, const KVPart *p, Side side, int c, float *out) {
    float x[MAX_HEAD_DIM * PAGE];
    int d = kv->shape.head_dim, at = side == KEYS ? c : c * d, step = side == KEYS ? PAGE : 1;
    if (is_codes(p->type)) part_read(kv, p, side, x);
    for (int i = 0; i < d; i++, at += step) out[i] = is_codes(p->type) ? x[at] : number_at(p, at);
}

int kvcache_pair(const KVCache *kv, int seq, int layer, int g, int t, float *k, float *v) {
    const KVHead *h = kvcache_head(kv, seq, layer, g);
    const KVPage *p = &kv->pages[h->page[(t - h->dropped) / PAGE]];
    int c = (t - h->dropped) % PAGE;
    if (k) part_pair(kv, &p->k, KEYS, c, k);
    if (v) part_pair(kv, &p->v, VALUES, c, v);
    return p->pos[c];
}

int kvcache_block(const KVCache *kv, int seq, int layer, int g, int b, float *k, float *v) {
    const KVHead *h = kvcache_head(kv, seq, layer, g);
    const KVPage *p = &kv->pages[h->page[b - h->dropped / PAGE]];
    if (k) part_read(kv, &p->k, KEYS, k);
    if (v) part_read(kv, &p->v, VALUES, v);
    return min_int(h->len - b * PAGE, PAGE);
}

static size_t seq_bytes(const KVCache *kv, int seq, bool all_full) {
    size_t bytes = 0;
    for (int i = 0; i < n_heads_total(kv); i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        bytes += sizeof *h;
        for (int j = 0; j < pages_used(h); j++) {
            PageClass class = all_full ? PAGE_FULL : kv->pages[h->page[j]].class;
            bytes += kv->store[class].page_bytes + (PAGE + 1) * sizeof(int);
        }
    }
    return bytes;
}

size_t kvcache_bytes(const KVCache *kv, int seq) { return seq_bytes(kv, seq, false); }

size_t kvcache_full_bytes(const KVCache *kv, int seq) { return seq_bytes(kv, seq, true); }

// ---- files ----

// Calls fn for every page of a sequence, in the order of the file; stops where it returns nonzero.
static int each_page(const KVCache *kv, int seq, int (*fn)(void *arg, KVPage *p), void *arg) {
    for (int i = 0; i < n_heads_total(kv); i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        for (int j = 0; j < pages_used(h); j++) {
            if (fn(arg, &kv->pages[h->page[j]]) != 0) return -1;
        }
    }
    return 0;
}

// The tensors of the pages' numbers: for each side and type its data and, for codes, scales and
// minima. n pages have that type.
typedef struct {
    Side side;
    KVType type;
    int n;
} Group;

typedef enum { DATA, SCALES, MINIMA, GROUP_PARTS } GroupPart;
enum { GROUPS = 2 * KV_TYPES };

static Group group_at(int i) { return (Group){(Side)(i % 2), (KVType)(i / 2), 0}; }

static bool has_part(KVType t, Side side, GroupPart part) {
    return part == DATA || (part == SCALES && is_codes(t)) ||
           (part == MINIMA && has_minima(t, side));
}

// Name, type and dimensions of one of a group's tensors; returns how many dimensions.
static int group_tensor(const Group *g, GroupPart part, int d, char name[16], DType *type,
                        int shape[4]) {
    static const char *const ends[GROUP_PARTS] = {"", ".scale", ".min"};
    bool codes = is_codes(g->type), blocks = codes && g->side == VALUES;
    int n = 0, width = g->side == KEYS ? PAGE : d;
    snprintf(name, 16, "%c%s%s%s", g->side == KEYS ? 'k' : 'v', codes ? "_" : "",
             codes ? type_names[g->type] : "", ends[part]);
    shape[n++] = g->n;
    if (blocks) shape[n++] = n_blocks(d, VALUES);
    shape[n++] = code_rows(d, g->side);
    *type = part != DATA || g->type == KV_F16 ? T_F16 : g->type == KV_F32 ? T_F32 : T_U8;
    if (part != DATA) return n;
    if (codes) shape[n - 1] /= 4;
    shape[n++] =
        codes ? (int)code_bytes((CodeType)(g->type - KV_Q8), 4, code_cols(g->side)) : width;
    return n;
}

// Bytes of one page in such a tensor.
static size_t group_bytes(const Group *g, GroupPart part, int d) {
    return part == DATA ? data_bytes(d, g->type, g->side)
                        : n_scales(d, g->type, g->side) * sizeof(uint16_t);
}

// What a cache has to write: how many pages of each class, and of each group.
typedef struct {
    const KVCache *kv;
    TensorWriter *w;
    const Group *group;  // whose part is being written
    GroupPart part;
    char *err;
    int n_pages, n_class[PAGE_CLASSES];
    Group groups[GROUPS];
} Put;

static int count_page(void *arg, KVPage *p) {
    Put *put = arg;
    put->n_pages++, put->n_class[p->class]++;
    for (Group *g = put->groups; g < put->groups + GROUPS; g++)
        g->n += part_of(p, g->side)->type == g->type;
    return 0;
}

static int put_part(void *arg, KVPage *p) {
    const Put *put = arg;
    const KVPart *part = part_of(p, put->group->side);
    const void *const data[] = {part->data, part->scale, part->min};
    if (part->type != put->group->type) return 0;
    size_t bytes = group_bytes(put->group, put->part, put->kv->shape.head_dim);
    return tensors_write_put(put->w, data[put->part], bytes, put->err);
}

static int put_pos(void *arg, KVPage *p) {
    const Put *put = arg;
    return tensors_write_put(put->w, p->pos, PAGE * sizeof(int), put->err);
}

static int put_class(void *arg, KVPage *p) {
    const Put *put = arg;
    uint8_t class = (uint8_t)p->class;
    return tensors_write_put(put->w, &class, 1, put->err);
}

// Groups without pages are left out, but for that of full pages.
static bool in_file(const Put *put, const Group *g) { return g->n > 0 || g->type == put->kv->type; }

static int declare_groups(const Put *put) {
    for (const Group *g = put->groups; g < put->groups + GROUPS; g++) {
        for (int part = DATA; in_file(put, g) && part < GROUP_PARTS; part++) {
            char name[16];
            DType type;
            int shape[4];
            size_t sizes[4];
            if (!has_part(g->type, g->side, part)) continue;
            int n = group_tensor(g, part, put->kv->shape.head_dim, name, &type, shape);
            for (int i = 0; i < n; i++) sizes[i] = (size_t)shape[i];
            if (tensors_write_declare(put->w, name, type, n, sizes, put->err) != 0) return -1;
        }
    }
    return 0;
}

static int put_groups(Put *put, int seq) {
    for (const Group *g = put->groups; g < put->groups + GROUPS; g++) {
        for (int part = DATA; part < GROUP_PARTS; part++) {
            put->group = g, put->part = (GroupPart)part;
            if (!has_part(g->type, g->side, part)) continue;
            if (each_page(put->kv, seq, put_part, put) != 0) return -1;
        }
    }
    return 0;
}

// len or dropped of every head.
static int put_heads(TensorWriter *w, const KVCache *kv, int seq, bool dropped, char *err) {
    for (int i = 0; i < n_heads_total(kv); i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        int32_t n = dropped ? h->dropped : h->len;
        if (tensors_write_put(w, &n, sizeof n, err) != 0) return -1;
    }
    return 0;
}

// A file whose pages are all full is one that the first version reads.
static int put_meta(const Put *put, int seq, const KVInfo *info) {
    const KVCache *kv = put->kv;
    bool plain = put->n_class[PAGE_FULL] == put->n_pages;
    char ratio[32], n_prefix[16], n_ctx[16], next_pos[16], types[KV_NAME];
    snprintf(ratio, sizeof ratio, "%.17g", info->ratio);
    snprintf(n_prefix, sizeof n_prefix, "%d", info->n_prefix);
    snprintf(n_ctx, sizeof n_ctx, "%d", info->n_ctx);
    snprintf(next_pos, sizeof next_pos, "%d", kv->seqs[seq].next_pos);
    const Meta meta[] = {{"format", plain ? "kvzip.c cache 1" : "kvzip.c cache 2"},
                         {"fingerprint", info->fingerprint},
                         {"model", info->model},
                         {"policy", info->policy},
                         {"ratio", ratio},
                         {"n_prefix", n_prefix},
                         {"n_ctx", n_ctx},
                         {"next_pos", next_pos},
                         {"kv", kvcache_types_name(kv->types, types)}};
    for (size_t i = 0; i < sizeof meta / sizeof *meta; i++) {
        if (tensors_write_meta(put->w, meta[i].key, meta[i].value, put->err) != 0) return -1;
    }
    return 0;
}

static int put_cache(TensorWriter *w, const KVCache *kv, int seq, const KVInfo *info, char *err) {
    Put put = {.kv = kv, .w = w, .err = err};
    for (int i = 0; i < GROUPS; i++) put.groups[i] = group_at(i);
    each_page(kv, seq, count_page, &put);
    size_t n = (size_t)put.n_pages;
    size_t heads[] = {(size_t)kv->shape.n_layers, (size_t)kv->shape.n_kv_heads};
    bool plain = put.n_class[PAGE_FULL] == put.n_pages;
    if (put_meta(&put, seq, info) != 0 || declare_groups(&put) != 0 ||
        tensors_write_declare(w, "pos", T_I32, 2, (size_t[]){n, PAGE}, err) != 0 ||
        tensors_write_declare(w, "len", T_I32, 2, heads, err) != 0 ||
        tensors_write_declare(w, "dropped", T_I32, 2, heads, err) != 0 ||
        tensors_write_declare(w, "window", T_I32, 1, heads, err) != 0 ||
        tensors_write_declare(w, "ids", T_I32, 1, (size_t[]){(size_t)info->n_ids}, err) != 0 ||
        (!plain && tensors_write_declare(w, "page_class", T_U8, 1, &n, err) != 0))
        return -1;
    if (put_groups(&put, seq) != 0 || each_page(kv, seq, put_pos, &put) != 0 ||
        put_heads(w, kv, seq, false, err) != 0 || put_heads(w, kv, seq, true, err) != 0 ||
        tensors_write_put(w, kv->shape.window, heads[0] * sizeof(int32_t), err) != 0 ||
        tensors_write_put(w, info->ids, (size_t)info->n_ids * sizeof(int32_t), err) != 0)
        return -1;
    return plain ? 0 : each_page(kv, seq, put_class, &put);
}

int kvcache_save(const KVCache *kv, int seq, const char *path, const KVInfo *info, char *err) {
    TensorWriter w = {0};
    if (tensors_write_begin(&w, path, err) != 0) return -1;
    if (put_cache(&w, kv, seq, info, err) == 0 && tensors_write_commit(&w, err) == 0) return 0;
    tensors_write_abort(&w);
    return -1;
}

static int load_info(const TensorFile *f, const char *fingerprint, KVInfo *info, int *next_pos,
                     char *err) {
    const char *format = tensors_meta(f, "format"), *ratio = tensors_meta(f, "ratio");
    *info = (KVInfo){tensors_meta(f, "fingerprint"),
                     tensors_meta(f, "model"),
                     tensors_meta(f, "policy"),
                     0,
                     0,
                     ratio ? strtod(ratio, NULL) : 0.0,
                     NULL,
                     0};
    if (!format || (strcmp(format, "kvzip.c cache 1") && strcmp(format, "kvzip.c cache 2"))) {
        return fail(err, "not a saved cache: its format is \"%s\", not \"kvzip.c cache 1\" or 2",
                    format ? format : "");
    }
    if (!info->fingerprint || !info->model || !info->policy)
        return fail(err, "the cache does not name its model");
    if (fingerprint && strcmp(fingerprint, info->fingerprint) != 0) {
        return fail(err, "made with another model: \"%s\", fingerprint %.12s, not %.12s",
                    info->model, info->fingerprint, fingerprint);
    }
    const Tensor *ids = tensors_get(f, err, "ids", T_I32, 1, -1);
    if (!ids) return -1;
    info->ids = ids->data, info->n_ids = (int)ids->shape[0];
    const int most = 1 << 30;
    if (tensors_meta_int(f, "n_prefix", 0, most, &info->n_prefix, err) != 0 ||
        tensors_meta_int(f, "n_ctx", 0, most, &info->n_ctx, err) != 0 ||
        tensors_meta_int(f, "next_pos", 0, most, next_pos, err) != 0)
        return -1;
    if (info->n_prefix + info->n_ctx != info->n_ids) {
        return fail(err, "%d ids, but a prefix of %d and a context of %d", info->n_ids,
                    info->n_prefix, info->n_ctx);
    }
    return 0;
}

// The pages of a file, as they are handed out to the heads.
typedef struct {
    KVCache *kv;
    const int32_t *pos;    // [n_pages][64]
    const uint8_t *class;  // [n_pages], NULL: all full
    int n_pages, page;     // page: the next one
    Group groups[GROUPS];  // n: the next one of each
    const Tensor *tensor[GROUPS][GROUP_PARTS];
} Load;

static KVPart load_part(Load *in, KVType type, Side side) {
    int i = (int)type * 2 + (int)side;
    Group *g = &in->groups[i];
    const void *at[GROUP_PARTS] = {NULL};
    for (int part = DATA; part < GROUP_PARTS; part++) {
        size_t offset = (size_t)g->n * group_bytes(g, part, in->kv->shape.head_dim);
        if (has_part(type, side, part))
            at[part] = (const uint8_t *)in->tensor[i][part]->data + offset;
    }
    g->n++;
    return (KVPart){type, (uint8_t *)at[DATA], (uint16_t *)at[SCALES], (uint16_t *)at[MINIMA]};
}

// One page per 64 pairs, in the file's order. The extra reference keeps mapped pages from being
// written.
static int load_head(Load *in, KVHead *h, char *err) {
    KVCache *kv = in->kv;
    int n = pages_used(h);
    if (head_room(h, n, err) != 0 || pages_grow(kv, kv->n_pages + n, err) != 0) return -1;
    for (; h->n_pages < n; in->page++) {
        PageClass class = in->class ? (PageClass)in->class[in->page] : PAGE_FULL;
        KVTypes types = kv->store[class].types;
        if (class != PAGE_FULL && h->n_pages == n - 1 && (h->len - h->dropped) % PAGE != 0)
            return fail(err, "a page that is not full has settled");
        KVPart k = load_part(in, types.k, KEYS), v = load_part(in, types.v, VALUES);
        int *pos = (int *)in->pos + (size_t)in->page * PAGE;
        kv->pages[kv->n_pages] = (KVPage){k, v, pos, 2, class};
        h->page[h->n_pages++] = kv->n_pages++;
    }
    return 0;
}

// Finds the tensors of every group that has pages, and checks that they have as many.
static int load_groups(Load *in, char *err) {
    for (int i = 0; i < in->n_pages; i++) {
        int class = in->class ? in->class[i] : PAGE_FULL;
        if (class >= PAGE_CLASSES) return fail(err, "page %d is of unknown class %d", i, class);
        KVTypes t = in->kv->store[class].types;
        in->groups[(int)t.k * 2 + KEYS].n++, in->groups[(int)t.v * 2 + VALUES].n++;
    }
    for (int i = 0; i < GROUPS; i++) {
        Group *g = &in->groups[i];
        for (int part = DATA; part < GROUP_PARTS; part++) {
            char name[16];
            DType type;
            int s[4];
            if (g->n == 0 || !has_part(g->type, g->side, part)) continue;
            int n = group_tensor(g, part, in->kv->shape.head_dim, name, &type, s);
            in->tensor[i][part] =
                tensors_get(&in->kv->file, err, name, type, n, s[0], s[1], s[2], s[3]);
            if (!in->tensor[i][part]) return -1;
        }
        g->n = 0;
    }
    return 0;
}

// Lengths of all heads; returns how many pages they need, or -1.
static int load_lengths(KVCache *kv, char *err) {
    int n_layers = kv->shape.n_layers, n_kv_heads = kv->shape.n_kv_heads;
    long n = 0;
    const Tensor *len = tensors_get(&kv->file, err, "len", T_I32, 2, n_layers, n_kv_heads);
    const Tensor *dropped =
        len ? tensors_get(&kv->file, err, "dropped", T_I32, 2, n_layers, n_kv_heads) : NULL;
    if (!dropped) return -1;
    for (int i = 0; i < n_heads_total(kv); i++) {
        KVHead *h = &kv->seqs[0].head[i];
        int li = ((const int32_t *)len->data)[i], di = ((const int32_t *)dropped->data)[i];
        if (di < 0 || di % PAGE || li < di || li > 1 << 30)
            return fail(err, "a head of %d pairs less %d", li, di);
        h->len = li, h->dropped = di;
        n += pages_used(h);
    }
    return n > INT_MAX ? fail(err, "heads of %ld pages", n) : (int)n;
}

static int load_pages(KVCache *kv, char *err) {
    int page_size = PAGE, n = load_lengths(kv, err);
    const Tensor *pos = n < 0 ? NULL : tensors_get(&kv->file, err, "pos", T_I32, 2, n, page_size);
    const Tensor *class = pos ? tensors_find(&kv->file, "page_class") : NULL;
    if (class) class = tensors_get(&kv->file, err, "page_class", T_U8, 1, n);
    if (!pos || (!class && tensors_find(&kv->file, "page_class"))) return -1;
    Load in = {.kv = kv, .pos = pos->data, .class = class ? class->data : NULL, .n_pages = n};
    for (int i = 0; i < GROUPS; i++) in.groups[i] = group_at(i);
    if (load_groups(&in, err) != 0) return -1;
    for (int i = 0; i < n_heads_total(kv); i++) {
        if (load_head(&in, &kv->seqs[0].head[i], err) != 0) return -1;
    }
    return 0;
}

// The types of the metadata; files of the first version have none, and their keys say it.
static int load_types(const TensorFile *f, KVTypes *types, char *err) {
    const Tensor *k = tensors_find(f, "k");
    const char *name = tensors_meta(f, "kv");
    *types = kvcache_both(k && k->dtype == T_F32 ? KV_F32 : KV_F16);
    if (name && kvcache_types_parse(name, types) != 0)
        return fail(err, "its pages are of unknown type \"%s\"", name);
    return 0;
}

int kvcache_load(KVCache *kv, const KVShape *shape, const char *fingerprint, ThreadPool *pool,
                 const char *path, KVInfo *info, char *err) {
    TensorFile f = {0};
    *kv = (KVCache){0};
    if (tensors_open(&f, path, err) != 0) return -1;
    int next_pos = 0;
    KVTypes types;
    if (load_info(&f, fingerprint, info, &next_pos, err) != 0 || load_types(&f, &types, err) != 0 ||
        kvcache_open(kv, shape, types, pool, err) != 0) {
        tensors_close(&f);
        kvcache_close(kv);
        return -1;
    }
    kv->file = f;
    if (kvcache_new(kv, err) != 0 || load_pages(kv, err) != 0) {
        kvcache_close(kv);
        return -1;
    }
    kv->seqs[0].next_pos = next_pos;
    return 0;
}
