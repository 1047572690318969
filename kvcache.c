// kvcache.c: keys and values of past tokens, how much each pair matters, and which ones stay.
//
// A context is read once, then repeated by the model with the answer forced (KVzip, arXiv
// 2505.23416). The largest attention a pair receives during the repeat is its score. Low pairs go,
// the prefix never does, and the survivors slide left into fewer pages: from then on every (layer,
// kv head) has its own length. Attention runs page by page with an online softmax, so it needs no
// more than the list of pages. Invariants: keys are stored after RoPE and never rotated again; a
// page with more than one reference is never written; work is cut by the data, not by the number of
// threads, so the bits are always the same.
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include "kvcache.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    SLAB_PAGES = 64,
    TILE_ROWS = 64,    // query rows (tokens times group) that share one pass over the pages
    MANY_TOKENS = 9,   // runs from this length on read packed pages
    SPLIT_TOKENS = 8,  // runs up to this length are split over page ranges as well
    SPLIT_ROWS = 64,   // tokens of such runs, and runs, that are worked on together
    SPLITS = 32,       // ranges at most
    SPLIT_PAGES = 4,   // pages in a range at least
    MAX_RANGES = 5,
};

size_t kvcache_type_size(KVType t) { return t == KV_F32 ? 4 : 2; }
const char *kvcache_type_name(KVType t) { return t == KV_F32 ? "f32" : "f16"; }

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int n_heads_total(const KVCache *kv) {
    return kv->shape.n_layers * kv->shape.n_kv_heads;
}

// ---- pages ----

static uint8_t *slab_map(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static size_t slab_bytes(const KVCache *kv) {
    return SLAB_PAGES * (kv->page_bytes + PAGE * sizeof(int));
}

static int pages_grow(KVCache *kv, int n, char *err) {
    if (n > kv->pages_cap) {
        int cap = max_int(n, kv->pages_cap * 2);
        KVPage *pages = realloc(kv->pages, (size_t)cap * sizeof *pages);
        if (pages) kv->pages = pages;
        int *free_page = realloc(kv->free_page, (size_t)cap * sizeof *free_page);
        if (free_page) kv->free_page = free_page;
        if (!pages || !free_page)
            return fail(err, "out of memory for a table of %d cache pages", cap);
        kv->pages_cap = cap;
    }
    return 0;
}

// A slab is 64 pages and, after them, their positions.
static int slab_new(KVCache *kv, char *err) {
    if (pages_grow(kv, kv->n_pages + SLAB_PAGES, err) != 0) return -1;
    uint8_t **slab = realloc(kv->slab, (size_t)(kv->n_slabs + 1) * sizeof *slab);
    if (slab) kv->slab = slab;
    uint8_t *memory = slab ? slab_map(slab_bytes(kv)) : NULL;
    if (!memory) {
        size_t used = (size_t)kv->n_slabs * slab_bytes(kv);
        return fail(err, "out of memory: the cache needs more than the %zu MB it has", used >> 20);
    }
    kv->slab[kv->n_slabs++] = memory;
    int *pos = (int *)(memory + SLAB_PAGES * kv->page_bytes);
    for (int i = SLAB_PAGES - 1; i >= 0; i--) kv->free_page[kv->n_free++] = kv->n_pages + i;
    for (int i = 0; i < SLAB_PAGES; i++) {
        uint8_t *k = memory + (size_t)i * kv->page_bytes;
        kv->pages[kv->n_pages++] = (KVPage){k, k + kv->page_bytes / 2, pos + i * PAGE, 0};
    }
    return 0;
}

// An empty page with one reference, or -1. Zeroed: attention multiplies unused values by weights of
// 0.
static int page_new(KVCache *kv, char *err) {
    if (kv->n_free == 0 && slab_new(kv, err) != 0) return -1;
    int id = kv->free_page[--kv->n_free];
    KVPage *p = &kv->pages[id];
    p->refs = 1;
    memset(p->k, 0, kv->page_bytes);
    for (int i = 0; i < PAGE; i++) p->pos[i] = -1;
    return id;
}

static void page_unref(KVCache *kv, int id) {
    if (--kv->pages[id].refs == 0) kv->free_page[kv->n_free++] = id;
}

void kvcache_trim(KVCache *kv) {
    size_t unit = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < kv->n_free; i++) {
        uintptr_t at = (uintptr_t)kv->pages[kv->free_page[i]].k, end = at + kv->page_bytes;
        at = (at + unit - 1) / unit * unit, end = end / unit * unit;
        if (at < end) madvise((void *)at, end - at, MADV_DONTNEED);
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
        b->n_pages = n, b->len = a->len, b->dropped = a->dropped;
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

// ---- open and close ----

int kvcache_open(KVCache *kv, const KVShape *shape, KVType type, ThreadPool *pool, char *err) {
    *kv = (KVCache){.shape = *shape, .type = type, .pool = pool};
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
    kv->page_bytes = 2 * (size_t)PAGE * (size_t)shape->head_dim * kvcache_type_size(type);
    kv->partial = malloc((size_t)SPLIT_ROWS * shape->n_heads * SPLITS * (shape->head_dim + 2) *
                         sizeof(float));
    if (!kv->partial) return fail(err, "out of memory for attention scratch");
    return 0;
}

void kvcache_close(KVCache *kv) {
    for (int i = 0; i < kv->n_seqs; i++) seq_free(kv, &kv->seqs[i]);
    for (int i = 0; i < kv->n_slabs; i++) munmap(kv->slab[i], slab_bytes(kv));
    tensors_close(&kv->file);
    free(kv->seqs);
    free(kv->slab);
    free(kv->pages);
    free(kv->free_page);
    free(kv->partial);
    free(kv->lse);
    *kv = (KVCache){0};
}

// ---- appending ----

// The last, partly filled page of a head is about to be written: if others list it too, take a
// copy.
static int own_last_page(KVCache *kv, KVHead *h, char *err) {
    int last = pages_used(h) - 1;
    if ((h->len - h->dropped) % PAGE == 0 || kv->pages[h->page[last]].refs == 1) return 0;
    int id = page_new(kv, err);
    if (id < 0) return -1;
    const KVPage *from = &kv->pages[h->page[last]], *to = &kv->pages[id];
    memcpy(to->k, from->k, kv->page_bytes / 2);
    memcpy(to->v, from->v, kv->page_bytes / 2);
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

int kvcache_reserve(KVCache *kv, int seq, int n, char *err) {
    for (int i = 0; i < n_heads_total(kv); i++) {
        if (head_reserve(kv, &kv->seqs[seq].head[i], n, err) != 0) return -1;
    }
    return 0;
}

// Pair t of a head becomes k, v [head_dim] at position pos; its page is the head's own.
static void write_pair(const KVCache *kv, const KVHead *h, int t, const float *k, const float *v,
                       int pos) {
    int d = kv->shape.head_dim, i = t - h->dropped, c = i % PAGE;
    const KVPage *p = &kv->pages[h->page[i / PAGE]];
    p->pos[c] = pos;
    if (kv->type == KV_F32) {
        float *pk = (float *)p->k;
        for (int j = 0; j < d; j++) pk[j * PAGE + c] = k[j];
        memcpy((float *)p->v + c * d, v, (size_t)d * sizeof(float));
    } else {
        uint16_t half[MAX_HEAD_DIM], *pk = (uint16_t *)p->k;
        kern.f32_to_f16(half, k, (size_t)d);
        for (int j = 0; j < d; j++) pk[j * PAGE + c] = half[j];
        kern.f32_to_f16((uint16_t *)p->v + c * d, v, (size_t)d);
    }
}

typedef struct {
    KVCache *kv;
    int layer, row0;
    KVRun run;
    const float *k, *v;
} Append;

static void append_head(void *ctx, int g) {
    const Append *a = ctx;
    KVHead *h = kvcache_head(a->kv, a->run.seq, a->layer, g);
    int d = a->kv->shape.head_dim, next_pos = a->kv->seqs[a->run.seq].next_pos;
    for (int i = 0; i < a->run.n; i++) {
        size_t at = ((size_t)(a->row0 + i) * a->kv->shape.n_kv_heads + g) * d;
        write_pair(a->kv, h, h->len + i, a->k + at, a->v + at, next_pos + i);
    }
    h->len += a->run.n;
}

void kvcache_append(KVCache *kv, int layer, const KVRun *runs, int n_runs, const float *k,
                    const float *v) {
    Append a = {kv, layer, 0, {0, 0}, k, v};
    for (int i = 0; i < n_runs; a.row0 += runs[i++].n) {
        a.run = runs[i];
        parallel_for(a.run.n > SPLIT_TOKENS ? kv->pool : NULL, kv->shape.n_kv_heads, append_head,
                     &a);
    }
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
}

void kvcache_advance(KVCache *kv, const KVRun *runs, int n_runs) {
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
    int slot[SPLIT_ROWS];    // of a run with more than one: where its partial results begin
} Attend;

// Query rows of one kv head that pass over the pages together; row i is token i / group.
typedef struct {
    const KVCache *kv;
    const KVHead *head;
    int n, group, window;
    int first;  // pair of the first token's own key; the token after it owns the next pair
    bool many;  // part of a long run
    float q[TILE_ROWS * MAX_HEAD_DIM];  // [n][head_dim], times the attention scale
    float o[TILE_ROWS * MAX_HEAD_DIM];  // [n][head_dim] sum of exp(s - max) v
    float max[TILE_ROWS], sum[TILE_ROWS];
    float s[TILE_ROWS * PAGE];
    float page[MAX_HEAD_DIM * PAGE];  // keys or values as f32
} Tile;

// c (+)= a page. Half-precision pages are packed once for the many rows of a long run, and
// converted on the fly for the few of a short one. The length of the run alone decides, so that
// company changes no bit.
static void tile_product(Tile *t, float *c, size_t ldc, const float *a, size_t lda,
                         const uint8_t *page, int inner, int cols, bool add) {
    if (t->kv->type == KV_F32) {
        kern.gemm_f32(c, ldc, a, lda, page, t->n, inner, cols, add);
    } else if (t->many) {
        kern.pack_f16(t->page, (const uint16_t *)page, inner, cols);
        kern.gemm_packed(c, ldc, a, lda, t->page, t->n, inner, cols, add);
    } else {
        kern.gemm_f16(c, ldc, a, lda, page, t->n, inner, cols, add);
    }
}

// s [n][64] = q . k, scaled and capped.
static void tile_scores(Tile *t, const KVPage *p) {
    int d = t->kv->shape.head_dim;
    float cap = t->kv->shape.softcap;
    tile_product(t, t->s, PAGE, t->q, (size_t)d, p->k, d, PAGE, false);
    for (int i = 0; cap > 0.0f && i < t->n * PAGE; i++) t->s[i] = cap * tanhf(t->s[i] / cap);
}

// Folds one row's 64 scores into its running maximum and sum (arXiv 1805.02867), of which only
// columns [lo, hi) are seen; s becomes the weights.
static void online_softmax(Tile *t, int i, int lo, int hi) {
    float *s = t->s + i * PAGE;
    if (lo >= hi) {
        memset(s, 0, PAGE * sizeof *s);
        return;
    }
    for (int c = 0; c < lo; c++) s[c] = -INFINITY;
    for (int c = hi; c < PAGE; c++) s[c] = -INFINITY;
    float m = kern.max64(s);
    if (m > t->max[i]) {
        float shrink = expf(t->max[i] - m);
        t->sum[i] *= shrink;
        kern.scale(t->o + i * t->kv->shape.head_dim, shrink, t->kv->shape.head_dim);
        t->max[i] = m;
    }
    t->sum[i] += kern.exp64(s, t->max[i]);
}

static void attend_page(Tile *t, int page, Range r) {
    const KVPage *p = &t->kv->pages[t->head->page[page]];
    int base = t->head->dropped + page * PAGE, d = t->kv->shape.head_dim;
    tile_scores(t, p);
    for (int i = 0; i < t->n; i++) {
        int own = t->first + i / t->group;
        int lo = max_int(r.lo, t->window ? own - t->window + 1 : 0), hi = min_int(r.hi, own + 1);
        online_softmax(t, i, max_int(lo - base, 0), min_int(hi - base, PAGE));
    }
    tile_product(t, t->o, (size_t)d, t->s, PAGE, p->v, PAGE, d, true);
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
    t->kv = a->kv, t->head = kvcache_head(a->kv, run->seq, a->layer, g),
    t->many = run->n >= MANY_TOKENS;
    t->n = 0, t->group = shape->n_heads / shape->n_kv_heads, t->window = shape->window[a->layer];
    t->first = t->head->len - run->n + token;
    tile_add(t, a, g, r, token, min_int(tokens_per_tile(a->kv), run->n - token));
}

static void tile_start(Tile *t) {
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

// The runs whose rows one tile takes in this range: those from the result's lo to hi, r among them.
static Range split_group(const Attend *a, int g, int split, int r) {
    int group = a->kv->shape.n_heads / a->kv->shape.n_kv_heads, rows = 0;
    Range runs = {0, 0};
    while (runs.hi <= r || (runs.hi < a->n_runs && runs.hi > runs.lo)) {
        int more = a->runs[runs.hi].n * group;
        bool joins =
            runs.hi > runs.lo && rows + more <= TILE_ROWS && shares_split(a, g, split, runs.hi);
        if (!joins && runs.hi > r) break;
        if (!joins) runs.lo = runs.hi, rows = 0;
        rows += more, runs.hi++;
    }
    return runs;
}

static void attend_split(const Attend *a, int r, int g, int split) {
    Range runs = split_group(a, g, split, r);
    if (runs.lo != r) return;
    Tile t;
    tile_load(&t, a, g, r, 0);
    Range pairs = split_range(t.head, split);
    for (int i = r + 1; i < runs.hi; i++) tile_add(&t, a, g, i, 0, a->runs[i].n);
    if (runs.hi > r + 1) t.first = pairs.hi;  // before every row's own pair
    tile_start(&t);
    attend_range(&t, pairs);
    for (int i = r, from = 0; i < runs.hi; from += a->runs[i++].n * t.group)
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
// whole job.
static void attend_unit(void *ctx, int unit) {
    const Attend *a = ctx;
    int r = unit % a->n_runs, i = unit / a->n_runs, n_kv_heads = a->kv->shape.n_kv_heads;
    if (i >= run_units(a, r)) return;
    if (a->splits[r] > 1)
        attend_split(a, r, i % n_kv_heads, i / n_kv_heads);
    else
        attend_block(a, r, i % n_kv_heads, i / n_kv_heads * tokens_per_tile(a->kv));
}

// out of one (token, query head) from its page ranges, in their order.
static void merge_splits(const Attend *a, int r, int token, int h) {
    int d = a->kv->shape.head_dim, splits = a->splits[r], slot = a->slot[r] + token;
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
    int r;           // the run whose rows score
    int first_page;  // of the scored pairs
} Sweep;

static int scored_index(const KVShape *shape, int layer) {
    int n = 0;
    for (int l = 0; l < layer; l++) n += shape->window[l] == 0;
    return n;
}

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
        l = scored_index(&a->kv->shape, a->layer);
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

static void sweep_unit(void *ctx, int unit) {
    const Sweep *w = ctx;
    const KVCache *kv = w->a->kv;
    const KVRun *run = &w->a->runs[w->r];
    int g = unit % kv->shape.n_kv_heads, page = w->first_page + unit / kv->shape.n_kv_heads,
        base = page * PAGE;
    const KVHead *h = kvcache_head(kv, run->seq, w->a->layer, g);
    Tile t;
    float acc[TILE_ROWS][PAGE];
    int group = kv->shape.n_heads / kv->shape.n_kv_heads, step = tokens_per_tile(kv);
    for (int i = 0; i < group; i++) {
        for (int c = 0; c < PAGE; c++) acc[i][c] = kv->scoring->sum ? 0.0f : -INFINITY;
    }
    for (int i = 0; i < run->n; i += step) {
        tile_load(&t, w->a, g, w->r, i);
        tile_scores(&t, &kv->pages[h->page[page]]);
        const float *lse = kv->lse + (size_t)(w->a->row[w->r] + i) * kv->shape.n_heads + g * group;
        sweep_rows(&t, kv->scoring, lse, kv->shape.n_heads, base, acc);
    }
    raise_scores(w->a, g, base, acc);
}

static void sweep(const Attend *a, int r) {
    const KVScoring *s = a->kv->scoring;
    int len = kvcache_head(a->kv, a->runs[r].seq, a->layer, 0)->len, t1 = min_int(s->t1, len);
    if (s->t0 >= t1) return;
    Sweep w = {a, r, s->t0 / PAGE};
    int n_pages = (t1 + PAGE - 1) / PAGE - w.first_page;
    parallel_for(a->kv->pool, n_pages * a->kv->shape.n_kv_heads, sweep_unit, &w);
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
    int n_units = 0, n_heads = a->kv->shape.n_heads;
    for (int r = 0; r < a->n_runs; r++) {
        n_units = max_int(n_units, run_units(a, r));
        a->kv->ops += run_ops(a, r);
    }
    parallel_for(a->kv->pool, n_units * a->n_runs, attend_unit, a);
    for (int r = 0; r < a->n_runs; r++) {
        for (int i = 0; a->splits[r] > 1 && i < a->runs[r].n * n_heads; i++)
            merge_splits(a, r, i / n_heads, i % n_heads);
        if (scores_run(a, &a->runs[r])) sweep(a, r);
    }
}

void kvcache_attend(KVCache *kv, int layer, const KVRun *runs, int n_runs, const KVQuery *query) {
    Attend a = {.kv = kv, .layer = layer, .query = query};
    for (int r = 0, row = 0; r < n_runs;) {  // as many runs at a time as there is room for
        int slots = 0;
        a.runs = runs + r;
        for (a.n_runs = 0; r < n_runs && a.n_runs < SPLIT_ROWS; row += runs[r++].n) {
            int i = a.n_runs, splits = count_splits(&a, &runs[r]);
            if (splits > 1 && slots + runs[r].n > SPLIT_ROWS) break;
            a.row[i] = row, a.splits[i] = splits, a.slot[i] = slots;
            if (splits > 1) slots += runs[r].n;
            a.n_runs++;
        }
        attend_runs(&a);
    }
}

// ---- selecting ----

// Order-preserving map of floats to integers: larger score, larger key.
static uint32_t score_key(float f) {
    uint32_t u;
    f += 0.0f;  // -0 and 0 are equal
    memcpy(&u, &f, 4);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// The key that stands at `rank` (0 = largest) among n scores: two passes over a histogram of 16
// bits each.
static uint32_t key_at_rank(const float *score, size_t n, size_t rank, size_t *hist) {
    uint32_t top = 0, low = 65535;
    memset(hist, 0, 65536 * sizeof *hist);
    for (size_t i = 0; i < n; i++) hist[score_key(score[i]) >> 16]++;
    for (top = 65535; rank >= hist[top]; top--) rank -= hist[top];
    memset(hist, 0, 65536 * sizeof *hist);
    for (size_t i = 0; i < n; i++) {
        uint32_t key = score_key(score[i]);
        if (key >> 16 == top) hist[key & 65535]++;
    }
    for (; rank >= hist[low]; low--) rank -= hist[low];
    return top << 16 | low;
}

// Exactly k of n scores, the first of equals first.
static void keep_best(uint8_t *keep, const float *score, size_t n, size_t k, size_t *hist) {
    memset(keep, 0, n);
    if (k == 0) return;
    uint32_t last = key_at_rank(score, n, k - 1, hist);
    size_t above = 0;
    for (size_t i = 0; i < n; i++) above += score_key(score[i]) > last;
    size_t ties = k - above;
    for (size_t i = 0; i < n; i++) {
        uint32_t key = score_key(score[i]);
        if (key > last || (key == last && ties > 0)) {
            ties -= key == last;
            keep[i] = 1;
        }
    }
}

// The authors' rule: above the score at rank floor(n ratio) - 1, so that one pair fewer than that
// stays, and fewer still on ties. Kept as it is: our mask equals theirs pair for pair.
static void keep_above(uint8_t *keep, const float *score, size_t n, size_t k, size_t *hist) {
    uint32_t last = key_at_rank(score, n, k > 0 ? k - 1 : 0, hist);
    for (size_t i = 0; i < n; i++) keep[i] = score_key(score[i]) > last;
}

// Heads compete with their maximum: keep and score by head, then spread over the pairs.
static int keep_heads(uint8_t *keep, const float *score, size_t n_heads, size_t n_ctx, double ratio,
                      bool ref_ties, size_t *hist) {
    float *best = malloc(n_heads * sizeof *best);
    uint8_t *keep_head = malloc(n_heads);
    if (best && keep_head) {
        for (size_t h = 0; h < n_heads; h++) {
            best[h] = -INFINITY;
            for (size_t t = 0; t < n_ctx; t++) best[h] = fmaxf(best[h], score[h * n_ctx + t]);
        }
        // Spread over pairs, rank floor(N ratio) - 1 falls on head floor((floor(N ratio) - 1) /
        // n_ctx).
        size_t k = (size_t)((double)(n_heads * n_ctx) * ratio);
        if (ref_ties)
            keep_above(keep_head, best, n_heads, (k > 0 ? k - 1 : 0) / n_ctx + 1, hist);
        else
            keep_best(keep_head, best, n_heads, k / n_ctx, hist);
        for (size_t h = 0; h < n_heads; h++) memset(keep + h * n_ctx, keep_head[h], n_ctx);
    }
    int failed = !best || !keep_head;
    free(best);
    free(keep_head);
    return failed;
}

static int check_scores(const float *score, const KVSelect *s, char *err) {
    size_t n = (size_t)s->n_layers * s->n_kv_heads * s->n_ctx;
    for (size_t i = 0; i < n; i++) {
        if (isnan(score[i])) {
            return fail(err, "the score of pair %zu of layer %zu, head %zu is not a number",
                        i % s->n_ctx, i / s->n_ctx / s->n_kv_heads, i / s->n_ctx % s->n_kv_heads);
        }
    }
    return 0;
}

// A copy of the scores in which the best floor(safeguard * floor(n_ctx * ratio)) pairs of every
// head cannot lose.
static float *safeguarded(const float *score, const KVSelect *s, uint8_t *keep, size_t *hist) {
    size_t n_ctx = (size_t)s->n_ctx, n = (size_t)s->n_layers * s->n_kv_heads * n_ctx;
    size_t safe = (size_t)(floor((double)n_ctx * s->ratio) * s->safeguard);
    float *copy = malloc(n * sizeof *copy);
    for (size_t i = 0; copy && i < n; i += n_ctx) keep_best(keep + i, score + i, n_ctx, safe, hist);
    for (size_t i = 0; copy && i < n; i++) copy[i] = keep[i] ? INFINITY : score[i];
    return copy;
}

static void keep_pools(uint8_t *keep, const float *score, const KVSelect *s, size_t *hist) {
    size_t n_ctx = (size_t)s->n_ctx, n = (size_t)s->n_layers * s->n_kv_heads * n_ctx;
    size_t pool = s->level == LEVEL_PAIR    ? n
                  : s->level == LEVEL_LAYER ? s->n_kv_heads * n_ctx
                                            : n_ctx;
    bool above = s->ref_ties && (s->level == LEVEL_PAIR || s->level == LEVEL_LAYER);
    for (size_t i = 0; i < n; i += pool) {
        size_t k = s->level == LEVEL_BUDGET ? (size_t)s->budget[i / n_ctx]
                                            : (size_t)((double)pool * s->ratio);
        if (above)
            keep_above(keep + i, score + i, pool, k, hist);
        else
            keep_best(keep + i, score + i, pool, k, hist);
    }
}

long kvcache_select(uint8_t *keep, const float *score, const KVSelect *s, char *err) {
    size_t n_heads = (size_t)s->n_layers * s->n_kv_heads, n = n_heads * s->n_ctx;
    if (check_scores(score, s, err) != 0) return -1;
    if (s->ratio >= 1.0 || n == 0) {
        memset(keep, 1, n);
        return (long)n;
    }
    size_t *hist = malloc(65536 * sizeof *hist);
    float *raised = NULL;
    int failed = !hist;
    if (hist && s->level == LEVEL_HEAD) {
        failed = keep_heads(keep, score, n_heads, (size_t)s->n_ctx, s->ratio, s->ref_ties, hist);
    } else if (hist) {
        if (s->safeguard > 0.0) failed = !(raised = safeguarded(score, s, keep, hist));
        if (!failed) keep_pools(keep, raised ? raised : score, s, hist);
    }
    free(raised);
    free(hist);
    if (failed) return fail(err, "out of memory for selecting");
    long kept = 0;
    for (size_t i = 0; i < n; i++) kept += keep[i];
    return kept;
}

// ---- evicting ----

// One head's way from its old list of pages to the new one.
typedef struct {
    KVHead *h, to;
    int *from;  // [to.len] which old pair each new one is, rising
} Compact;

// Whether new page i is an old page in which nothing moves: it is listed again, not copied.
static bool page_stays(const Compact *c, int i) {
    const int *from = c->from + i * PAGE;
    int n = min_int(c->to.len - i * PAGE, PAGE), last = from[n - 1];
    return from[0] % PAGE == 0 && last == from[0] + n - 1 && (n == PAGE || last == c->h->len - 1);
}

// The new list of a head, its new pages still empty.
static int compact_plan(KVCache *kv, Compact *c, int first, int n, const uint8_t *keep, char *err) {
    c->from = malloc(((size_t)c->h->len + 1) * sizeof *c->from);
    if (!c->from) return fail(err, "out of memory for evicting from %d pairs", c->h->len);
    for (int t = 0; t < c->h->len; t++) {
        if (t < first || t >= first + n || keep[t - first]) c->from[c->to.len++] = t;
    }
    if (head_room(&c->to, pages_used(&c->to), err) != 0) return -1;
    for (int i = 0; i < pages_used(&c->to); i++) {
        bool stays = page_stays(c, i);
        int id = stays ? c->h->page[c->from[i * PAGE] / PAGE] : page_new(kv, err);
        if (id < 0) return -1;
        if (stays) kv->pages[id].refs++;
        c->to.page[c->to.n_pages++] = id;
    }
    return 0;
}

// Pairs from [n], all of page src, become the pairs of dst from column `to` on, bits unchanged.
static void copy_pairs(const KVCache *kv, const KVPage *dst, int to, const KVPage *src,
                       const int *from, int n) {
    size_t size = kvcache_type_size(kv->type), d = (size_t)kv->shape.head_dim;
    for (size_t row = 0; row < d * PAGE; row += PAGE) {
        const uint16_t *half = (const uint16_t *)src->k + row;
        const float *whole = (const float *)src->k + row;
        for (int i = 0; i < n; i++) {
            size_t at = row + (size_t)(to + i), c = (size_t)from[i] % PAGE;
            if (kv->type == KV_F32) ((float *)dst->k)[at] = whole[c];
            else ((uint16_t *)dst->k)[at] = half[c];
        }
    }
    for (int i = 0; i < n; i++) {
        size_t at = (size_t)(to + i), c = (size_t)from[i] % PAGE;
        memcpy(dst->v + at * d * size, src->v + c * d * size, d * size);
        dst->pos[at] = src->pos[c];
    }
}

typedef struct {
    const KVCache *kv;
    const Compact *c;  // [n_heads]
    int n_heads;
} CompactJob;

// Fills one new page of one head.
static void compact_page(void *ctx, int unit) {
    const CompactJob *job = ctx;
    const Compact *c = &job->c[unit % job->n_heads];
    int page = unit / job->n_heads;
    if (page >= c->to.n_pages || page_stays(c, page)) return;
    const KVPage *dst = &job->kv->pages[c->to.page[page]];
    const int *from = c->from + page * PAGE;
    for (int i = 0, n = min_int(c->to.len - page * PAGE, PAGE), m; i < n; i += m) {
        int old = from[i] / PAGE;
        for (m = 1; i + m < n && from[i + m] / PAGE == old;) m++;
        copy_pairs(job->kv, dst, i, &job->kv->pages[c->h->page[old]], from + i, m);
    }
}

// Evicts from heads h [n_heads]; keep [n_heads][n]. On failure none of them has changed.
static int compact_heads(KVCache *kv, KVHead *h, int n_heads, int first, int n, const uint8_t *keep,
                         char *err) {
    Compact *c = calloc((size_t)n_heads, sizeof *c);
    if (!c) return fail(err, "out of memory for evicting from %d heads", n_heads);
    int status = 0, n_pages = 0;
    for (int i = 0; i < n_heads && status == 0; i++) {
        c[i].h = h + i;
        status = compact_plan(kv, &c[i], first, n, keep + (size_t)i * n, err);
        n_pages = max_int(n_pages, c[i].to.n_pages);
    }
    if (status == 0)
        parallel_for(kv->pool, n_pages * n_heads, compact_page, &(CompactJob){kv, c, n_heads});
    for (int i = 0; i < n_heads; i++) {
        if (status == 0) {
            KVHead old = h[i];
            h[i] = c[i].to, c[i].to = old;
        }
        head_free(kv, &c[i].to);
        free(c[i].from);
    }
    free(c);
    return status;
}

int kvcache_compact_head(KVCache *kv, int seq, int layer, int g, int first, int n,
                         const uint8_t *keep, char *err) {
    return compact_heads(kv, kvcache_head(kv, seq, layer, g), 1, first, n, keep, err);
}

int kvcache_compact(KVCache *kv, int seq, int n_prefix, int n_ctx, const uint8_t *keep, char *err) {
    for (int l = 0; l < kv->shape.n_layers; l++) {
        if (kv->shape.window[l] != 0) continue;
        KVHead *h = kvcache_head(kv, seq, l, 0);
        if (compact_heads(kv, h, kv->shape.n_kv_heads, n_prefix, n_ctx, keep, err) != 0) return -1;
        keep += (size_t)kv->shape.n_kv_heads * n_ctx;
    }
    kvcache_trim(kv);
    return 0;
}

// ---- looking inside ----

int kvcache_pair(const KVCache *kv, int seq, int layer, int g, int t, float *k, float *v) {
    const KVHead *h = kvcache_head(kv, seq, layer, g);
    const KVPage *p = &kv->pages[h->page[(t - h->dropped) / PAGE]];
    int d = kv->shape.head_dim, c = (t - h->dropped) % PAGE;
    for (int i = 0; i < d; i++) {
        int ik = i * PAGE + c, iv = c * d + i;
        if (k) k[i] = kv->type == KV_F32 ? ((float *)p->k)[ik] : f16_f32(((uint16_t *)p->k)[ik]);
        if (v) v[i] = kv->type == KV_F32 ? ((float *)p->v)[iv] : f16_f32(((uint16_t *)p->v)[iv]);
    }
    return p->pos[c];
}

static void to_float(const KVCache *kv, float *out, const uint8_t *in, size_t n) {
    if (kv->type == KV_F32)
        memcpy(out, in, n * sizeof *out);
    else
        kern.f16_to_f32(out, (const uint16_t *)in, n);
}

int kvcache_block(const KVCache *kv, int seq, int layer, int g, int b, float *k, float *v) {
    const KVHead *h = kvcache_head(kv, seq, layer, g);
    const KVPage *p = &kv->pages[h->page[b - h->dropped / PAGE]];
    size_t n = (size_t)kv->shape.head_dim * PAGE;
    if (k) to_float(kv, k, p->k, n);
    if (v) to_float(kv, v, p->v, n);
    return min_int(h->len - b * PAGE, PAGE);
}

size_t kvcache_bytes(const KVCache *kv, int seq) {
    size_t page = kv->page_bytes + PAGE * sizeof(int) + sizeof(int), bytes = 0;
    for (int i = 0; i < n_heads_total(kv); i++)
        bytes += sizeof(KVHead) + page * (size_t)pages_used(&kv->seqs[seq].head[i]);
    return bytes;
}

// ---- files ----

typedef enum { PART_K, PART_V, PART_POS } PagePart;

static size_t count_pages(const KVCache *kv, int seq) {
    size_t n = 0;
    for (int i = 0; i < n_heads_total(kv); i++) n += (size_t)pages_used(&kv->seqs[seq].head[i]);
    return n;
}

static int put_pages(TensorWriter *w, const KVCache *kv, int seq, PagePart part, char *err) {
    for (int i = 0; i < n_heads_total(kv); i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        for (int j = 0; j < pages_used(h); j++) {
            const KVPage *p = &kv->pages[h->page[j]];
            const void *data = part == PART_K   ? (void *)p->k
                               : part == PART_V ? (void *)p->v
                                                : (void *)p->pos;
            size_t bytes = part == PART_POS ? PAGE * sizeof(int) : kv->page_bytes / 2;
            if (tensors_write_put(w, data, bytes, err) != 0) return -1;
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

static int put_meta(TensorWriter *w, const KVCache *kv, int seq, const KVInfo *info, char *err) {
    char ratio[32], n_prefix[16], n_ctx[16], next_pos[16];
    snprintf(ratio, sizeof ratio, "%.17g", info->ratio);
    snprintf(n_prefix, sizeof n_prefix, "%d", info->n_prefix);
    snprintf(n_ctx, sizeof n_ctx, "%d", info->n_ctx);
    snprintf(next_pos, sizeof next_pos, "%d", kv->seqs[seq].next_pos);
    const Meta meta[] = {{"format", "kvzip.c cache 1"},
                         {"fingerprint", info->fingerprint},
                         {"model", info->model},
                         {"policy", info->policy},
                         {"ratio", ratio},
                         {"n_prefix", n_prefix},
                         {"n_ctx", n_ctx},
                         {"next_pos", next_pos}};
    for (size_t i = 0; i < sizeof meta / sizeof *meta; i++) {
        if (tensors_write_meta(w, meta[i].key, meta[i].value, err) != 0) return -1;
    }
    return 0;
}

static int put_cache(TensorWriter *w, const KVCache *kv, int seq, const KVInfo *info, char *err) {
    size_t n = count_pages(kv, seq), d = (size_t)kv->shape.head_dim;
    size_t heads[] = {(size_t)kv->shape.n_layers, (size_t)kv->shape.n_kv_heads};
    DType type = kv->type == KV_F32 ? T_F32 : T_F16;
    if (put_meta(w, kv, seq, info, err) != 0 ||
        tensors_write_declare(w, "k", type, 3, (size_t[]){n, d, PAGE}, err) != 0 ||
        tensors_write_declare(w, "v", type, 3, (size_t[]){n, PAGE, d}, err) != 0 ||
        tensors_write_declare(w, "pos", T_I32, 2, (size_t[]){n, PAGE}, err) != 0 ||
        tensors_write_declare(w, "len", T_I32, 2, heads, err) != 0 ||
        tensors_write_declare(w, "dropped", T_I32, 2, heads, err) != 0 ||
        tensors_write_declare(w, "window", T_I32, 1, heads, err) != 0 ||
        tensors_write_declare(w, "ids", T_I32, 1, (size_t[]){(size_t)info->n_ids}, err) != 0)
        return -1;
    if (put_pages(w, kv, seq, PART_K, err) != 0 || put_pages(w, kv, seq, PART_V, err) != 0 ||
        put_pages(w, kv, seq, PART_POS, err) != 0 || put_heads(w, kv, seq, false, err) != 0 ||
        put_heads(w, kv, seq, true, err) != 0 ||
        tensors_write_put(w, kv->shape.window, heads[0] * sizeof(int32_t), err) != 0)
        return -1;
    return tensors_write_put(w, info->ids, (size_t)info->n_ids * sizeof(int32_t), err);
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
    if (!format || strcmp(format, "kvzip.c cache 1") != 0) {
        return fail(err, "not a saved cache: its format is \"%s\", not \"kvzip.c cache 1\"",
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

// One page per 64 pairs, in the file's order. The extra reference keeps mapped pages from being
// written.
static int load_head(KVCache *kv, KVHead *h, int len, int dropped, const Tensor *part[3],
                     size_t *page, char *err) {
    if (dropped < 0 || dropped % PAGE || len < dropped || len > 1 << 30)
        return fail(err, "a head of %d pairs less %d", len, dropped);
    h->len = len, h->dropped = dropped;
    int n = pages_used(h);
    if ((size_t)n > part[0]->shape[0] - *page)
        return fail(err, "fewer pages than the heads' lengths need");
    if (head_room(h, n, err) != 0 || pages_grow(kv, kv->n_pages + n, err) != 0) return -1;
    for (; h->n_pages < n; ++*page) {
        uint8_t *k = (uint8_t *)part[0]->data + *page * (kv->page_bytes / 2);
        uint8_t *v = (uint8_t *)part[1]->data + *page * (kv->page_bytes / 2);
        kv->pages[kv->n_pages] = (KVPage){k, v, (int *)part[2]->data + *page * PAGE, 2};
        h->page[h->n_pages++] = kv->n_pages++;
    }
    return 0;
}

static int load_pages(KVCache *kv, char *err) {
    const TensorFile *f = &kv->file;
    DType type = kv->type == KV_F32 ? T_F32 : T_F16;
    int d = kv->shape.head_dim, page_size = PAGE;
    const Tensor *k = tensors_get(f, err, "k", type, 3, -1, d, page_size);
    if (!k) return -1;
    int n = (int)k->shape[0], n_layers = kv->shape.n_layers, n_kv_heads = kv->shape.n_kv_heads;
    const Tensor *v = tensors_get(f, err, "v", type, 3, n, page_size, d);
    const Tensor *pos = v ? tensors_get(f, err, "pos", T_I32, 2, n, page_size) : NULL;
    const Tensor *len = pos ? tensors_get(f, err, "len", T_I32, 2, n_layers, n_kv_heads) : NULL;
    const Tensor *dropped =
        len ? tensors_get(f, err, "dropped", T_I32, 2, n_layers, n_kv_heads) : NULL;
    if (!dropped) return -1;
    size_t page = 0;
    for (int i = 0; i < n_heads_total(kv); i++) {
        int li = ((const int32_t *)len->data)[i], di = ((const int32_t *)dropped->data)[i];
        if (load_head(kv, &kv->seqs[0].head[i], li, di, (const Tensor *[]){k, v, pos}, &page,
                      err) != 0)
            return -1;
    }
    return page == k->shape[0]
               ? 0
               : fail(err, "%zu pages, but the heads' lengths need %zu", k->shape[0], page);
}

int kvcache_load(KVCache *kv, const KVShape *shape, const char *fingerprint, ThreadPool *pool,
                 const char *path, KVInfo *info, char *err) {
    TensorFile f = {0};
    *kv = (KVCache){0};
    if (tensors_open(&f, path, err) != 0) return -1;
    int next_pos = 0;
    const Tensor *k = tensors_find(&f, "k");
    if (load_info(&f, fingerprint, info, &next_pos, err) != 0 ||
        kvcache_open(kv, shape, k && k->dtype == T_F32 ? KV_F32 : KV_F16, pool, err) != 0) {
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
