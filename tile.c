// tile.c: one tile of query rows passes over the pages of its head.
//
// This is attention itself: scores = q . k, weights = exp(scores - max), out += weights . v, page
// by page with an online softmax (arXiv 1805.02867, 2205.14135), so that it needs no more memory
// than one page's scores and no more order than the list of pages. Pages hold f16, f32 or codes of
// 8, 4 or 2 bits in any mixture; one function, tile_product, multiplies by a page of any kind. What
// must stay true: a row's bits depend on its run's length and its head's pages alone, never on the
// rows beside it (batch invariance).
#include "attend.h"

#include <math.h>
#include <string.h>

enum { PAGES_AHEAD = 1 };  // the page whose lines are fetched during the products of one

// ---- packed pages ----

// The many rows of a long run read pages that were packed once for all of them, whatever the page's
// type: keys, then values.
static size_t packed_bytes(int d, Side side) {
    return kern.packed_bytes(code_rows(d, side), side_cols(d, side));
}

size_t packed_page_bytes(int head_dim) {
    return packed_bytes(head_dim, KEYS) + packed_bytes(head_dim, VALUES);
}

static void pack_side(void *packed, const KVPart *p, Side side) {
    int d = p->head_dim, inner = code_rows(d, side), cols = side_cols(d, side);
    float x[MAX_HEAD_DIM * PAGE];
    if (p->type == KV_F16) {
        kern.pack_f16(packed, (const uint16_t *)p->data, inner, cols);
    } else {
        part_read(p, side, x);
        kern.pack_f32(packed, x, inner, cols);
    }
}

void page_pack(const KVPage *page, uint8_t *packed) {
    pack_side(packed, &page->k, KEYS);
    pack_side(packed + packed_bytes(page->k.head_dim, KEYS), &page->v, VALUES);
}

// ---- a tile's rows ----

void tile_add(Tile *t, const AttendBatch *batch, const AttendRun *run, int g, int token, int n) {
    const KVShape *shape = &batch->kv->shape;
    int d = t->head_dim;
    for (int i = 0; i < n; i++, t->n += t->group) {
        size_t head = (size_t)(run->row + token + i) * shape->n_heads + (size_t)g * t->group;
        memcpy(t->q + t->n * d, batch->query->q + head * d, (size_t)t->group * d * sizeof(float));
        kern.scale(t->q + t->n * d, shape->scale, t->group * d);
    }
}

void tile_load(Tile *t, const AttendBatch *batch, const AttendRun *run, int g, int token) {
    const KVShape *shape = &batch->kv->shape;
    size_t packed = packed_page_bytes(batch->head_dim) * (size_t)g * run->pages;
    t->kv = batch->kv, t->head = kvcache_head(batch->kv, run->seq, batch->layer, g);
    t->packed = run->pages ? run->packed + packed : NULL;
    t->choice_pages = run->choice_pages, t->chosen = NULL, t->pairs = NULL;
    if (run->chosen) t->chosen = run->chosen + ((size_t)g * run->n + token) * run->choice_pages;
    if (run->pairs)
        t->pairs =
            run->pairs + ((size_t)token * shape->n_heads + g * shape->n_heads / shape->n_kv_heads) *
                             run->choice_pages * PAGE;
    t->mixed = false;
    t->n = 0, t->group = batch->group, t->head_dim = batch->head_dim;
    t->layer = batch->layer;
    t->first = t->head->len - run->n + token;
    tile_add(t, batch, run, g, token, min_int(tokens_per_tile(t->group), run->n - token));
}

void tile_pack(Tile *t) { t->q_packed = kern.pack_rows(t->q_room, t->q, t->n, t->head_dim, PAGE); }

void tile_start(Tile *t) {
    tile_pack(t);
    memset(t->o, 0, (size_t)t->n * t->head_dim * sizeof(float));
    for (int i = 0; i < t->n; i++) t->max[i] = -INFINITY, t->sum[i] = 0.0f;
}

void tile_sink(Tile *t, const AttendBatch *batch, int g) {
    const KVShape *shape = &batch->kv->shape;
    for (int i = 0; shape->sinks && i < t->n; i++) {
        t->max[i] = kvshape_sink(shape, batch->layer, g * t->group + i % t->group);
        t->sum[i] = 1.0f;
    }
}

// ---- products with a page ----

// The packed side of the page at hand.
static const void *packed_side(const Tile *t, Side side) {
    const uint8_t *page = t->packed + packed_page_bytes(t->head_dim) * (size_t)t->page;
    return side == KEYS ? page : page + packed_bytes(t->head_dim, KEYS);
}

// ahead: the same side of a page that will be read later, which is fetched meanwhile.
static void codes_product(Tile *t, float *c, const float *a, const KVPart *p, const KVPart *ahead,
                          Side side) {
    int d = t->head_dim, inner = code_rows(d, side), cols = side_cols(d, side);
    for (int b = 0; b < n_blocks(d, side); b++) {
        Codes codes = part_codes(p, side, b);
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
static bool packs_rows(const Tile *t, const KVPart *p) {
    return t->packed || (p->type == KV_F16 && kern.halves_packed);
}

// Scores [n][64] = rows . keys, or out [n][head_dim] += rows . values. Pages are packed for the
// many rows of a long run, and converted on the fly for the few of a short one; f32 pages always
// count in f32. The length of the run alone decides, so that company changes no bit.
static void tile_product(Tile *t, float *c, const void *rows, const KVPart *p, const KVPart *ahead,
                         Side side) {
    int d = t->head_dim, inner = code_rows(d, side), cols = side_cols(d, side);
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

// The queries as the keys of a page take them.
static const void *query_rows(Tile *t, const KVPart *keys) {
    int d = t->head_dim;
    if (packs_rows(t, keys)) return t->q_packed;
    if (keys->type != KV_M4) return t->q;
    if (!t->mixed) {
        memcpy(t->q_mixed, t->q, (size_t)t->n * d * sizeof *t->q);
        mix_queries(t->q_mixed, t->n, d);
        t->mixed = true;
    }
    return t->q_mixed;
}

void tile_scores(Tile *t, const KVPage *p, const KVPage *ahead) {
    float cap = t->kv->shape.softcap;
    const void *rows = query_rows(t, &p->k);
    tile_product(t, t->s, rows, &p->k, &ahead->k, KEYS);
    for (int i = 0; cap > 0.0f && i < t->n * PAGE; i++) t->s[i] = cap * tanhf(t->s[i] / cap);
    for (int i = 0; p->biased && i < t->n; i++) kern.add(t->s + i * PAGE, p->bias, PAGE);
}

// ---- the online softmax ----

// The first pair that the row with its own pair at `own` sees.
static int first_seen(const Tile *t, int own) {
    return kvshape_first(&t->kv->shape, t->layer, own);
}

// A row sees the pairs of r up to its own one, and with a window no further back than that. On the
// page whose first pair is base the scores of all others become -inf, so that their weights are 0.
static void hide_unseen(Tile *t, int base, Range r) {
    int last = t->first + (t->n - 1) / t->group;
    bool whole = r.lo <= base && min_int(r.hi, t->first + 1) >= base + PAGE;
    if (whole && first_seen(t, last) <= base) return;
    for (int i = 0; i < t->n; i++) {
        int own = t->first + i / t->group;
        int lo = max_int(r.lo, first_seen(t, own)) - base;
        int hi = max_int(min_int(r.hi, own + 1) - base, 0);
        for (int c = 0; c < min_int(lo, PAGE); c++) t->s[i * PAGE + c] = -INFINITY;
        for (int c = hi; c < PAGE; c++) t->s[i * PAGE + c] = -INFINITY;
    }
}

// Whether some row of the tile reads the page.
static bool tile_reads(const Tile *t, int page) {
    bool reads = !t->chosen;
    for (int i = 0; i < t->n / t->group && !reads; i++)
        reads = t->chosen[(size_t)i * t->choice_pages + page];
    return reads;
}

// The same for pairs that a row does not read; others get what their choice adds.
static void hide_unread(Tile *t, int page) {
    for (int i = 0; t->chosen && i < t->n; i++) {
        float *row = t->s + i * PAGE;
        size_t token = (size_t)(i / t->group), step = (size_t)t->choice_pages;
        size_t head = token * t->kv->shape.n_heads + i % t->group;
        if (!t->chosen[token * step + page])
            for (int c = 0; c < PAGE; c++) row[c] = -INFINITY;
        else if (t->pairs)
            kern.add(row, t->pairs + (head * step + page) * PAGE, PAGE);
    }
}

// Raises the rows' running maxima to those of their scores.
static void raise_max(Tile *t) {
    int d = t->head_dim;
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
    int d = t->head_dim;
    if (packed && kern.exp_packed) return kern.exp_packed(t->s_room, t->s, t->max, t->sum, t->n, d);
    for (int i = 0; i < t->n; i++)
        t->sum[i] += kern.exp64(t->s + i * PAGE, softmax_shift(t->max[i]));
    return packed ? kern.pack_rows(t->s_room, t->s, t->n, PAGE, d) : t->s;
}

// Scales and minima of a side that will be read later; the products fetch its codes.
static void prefetch_scales(const KVPart *p, Side side) {
    size_t bytes = n_scales(p->head_dim, p->type, side) * sizeof *p->scale;
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const uint8_t *)p->scale + i);
    for (size_t i = 0; p->min && i < bytes; i += 64)
        __builtin_prefetch((const uint8_t *)p->min + i);
}

// The first page from this one on that the tile reads; the last one where there is none.
static int page_ahead(const Tile *t, int page) {
    int last = pages_used(t->head) - 1;
    while (page < last && !tile_reads(t, page)) page++;
    return min_int(page, last);
}

// One page with the online softmax of arXiv 1805.02867.
static void attend_page(Tile *t, int page, Range r) {
    const int *list = t->head->page;
    int later = page_ahead(t, page + PAGES_AHEAD);
    const KVPage *p = &t->kv->pages[list[page]];
    const KVPage *ahead = &t->kv->pages[list[later]];
    const KVPage *next = &t->kv->pages[list[page_ahead(t, later + 1)]];
    __builtin_prefetch(&next->k), __builtin_prefetch(&next->v);
    prefetch_scales(&ahead->k, KEYS), prefetch_scales(&ahead->v, VALUES);
    int base = t->head->dropped + page * PAGE;
    t->page = page;
    tile_scores(t, p, ahead);
    hide_unseen(t, base, r);
    hide_unread(t, page);
    raise_max(t);
    const void *weights = exp_scores(t, packs_rows(t, &p->v));
    tile_product(t, t->o, weights, &p->v, &ahead->v, VALUES);
}

void tile_attend(Tile *t, Range r) {
    int last = t->first + (t->n - 1) / t->group;
    r.lo = max_int(max_int(r.lo, t->head->dropped), first_seen(t, t->first));
    r.hi = min_int(r.hi, last + 1);
    if (r.lo >= r.hi) return;
    for (int p = (r.lo - t->head->dropped) / PAGE; p * PAGE + t->head->dropped < r.hi; p++)
        if (tile_reads(t, p)) attend_page(t, p, r);
}
