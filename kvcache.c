// kvcache.c: sequences of pairs, how they grow, and which pairs leave them.
//
// A sequence is a list of pages for every (layer, kv head). Tokens are appended page by page; pages
// that are old enough settle to fewer bits; evicting drops pairs and the survivors slide left into
// fewer pages, so that from then on every head has its own length. A fork is another list of the
// same pages. What must stay true: keys are stored after RoPE and never rotated again; a page that
// more than one head lists is never written; only a page of 64 pairs is ever other than
// PAGE_EXACT; the position counter knows nothing of evictions.
#include "kvcache.h"

#include <stdlib.h>
#include <string.h>

#include "attend.h"
#include "kvpages.h"

// ---- sequences ----

int head_room(KVHead *h, int n_pages, char *err) {
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
    for (int i = 0; s->head && i < kv->n_heads; i++) head_free(kv, &s->head[i]);
    free(s->head);
    state_unref(s->state);
    *s = (KVSeq){0};
}

// to becomes another list of from's pages; to is overwritten, not freed.
static int seq_copy(KVCache *kv, KVSeq *to, const KVSeq *from, char *err) {
    *to =
        (KVSeq){.head = calloc((size_t)kv->n_heads, sizeof *to->head), .next_pos = from->next_pos};
    if (!to->head) return fail(err, "out of memory for a sequence");
    to->state = from->state;
    if (to->state) to->state->refs++;
    for (int i = 0; i < kv->n_heads; i++) {
        const KVHead *src = &from->head[i];
        KVHead *dst = &to->head[i];
        int n = pages_used(src);
        if (head_room(dst, n, err) != 0) {
            seq_free(kv, to);
            return -1;
        }
        if (n > 0) memcpy(dst->page, src->page, (size_t)n * sizeof *dst->page);
        for (int j = 0; j < n; j++) kv->pages[src->page[j]].refs++;
        dst->n_pages = n, dst->len = src->len;
        dst->dropped = src->dropped, dst->settled = src->settled;
    }
    return 0;
}

// A free slot for a sequence, or -1.
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
    kv->seqs[i].head = calloc((size_t)kv->n_heads, sizeof *kv->seqs[i].head);
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
    return &kv->seqs[seq].head[kv->first[layer] + g];
}

static bool is_scored(const KVShape *shape, int l) {
    return shape->window[l] == 0 && kvshape_owns(shape, l);
}

int kvcache_scored_layers(const KVShape *shape, int *layers) {
    int n = 0;
    for (int l = 0; l < shape->n_layers; l++) {
        if (!is_scored(shape, l)) continue;
        if (layers) layers[n] = l;
        n++;
    }
    return n;
}

int kvcache_scored_index(const KVShape *shape, int layer) {
    int n = 0;
    for (int l = 0; l < kvshape_owner(shape, layer); l++) n += is_scored(shape, l);
    return n;
}

int kvcache_scored_layer(const KVShape *shape, int s) {
    int l = 0;
    while (!is_scored(shape, l) || s-- > 0) l++;
    return l;
}

int kvcache_readers(const KVShape *shape, int *readers) {
    int n = 0;
    for (int l = 0; l < shape->n_layers; l++) {
        if (shape->window[l] != 0) continue;
        if (readers) readers[n] = l;
        n++;
    }
    return n;
}

int kvcache_reader_index(const KVShape *shape, int layer) {
    int n = 0;
    for (int l = 0; l < layer; l++) n += shape->window[l] == 0;
    return n;
}

KVHead *kvcache_scored_head(const KVCache *kv, int seq, int h) {
    int n = kv->shape.n_kv_heads;
    return kvcache_head(kv, seq, kvcache_scored_layer(&kv->shape, h / n), h % n);
}

// ---- open and close ----

// Where the heads of each layer stand in the lists of a sequence.
static int place_heads(KVCache *kv, char *err) {
    const KVShape *s = &kv->shape;
    int n = 0;
    for (int l = 0; l < s->n_layers; l++) n += kvshape_owns(s, l) ? kvshape_heads(s, l) : 0;
    kv->layer = malloc(((size_t)n + 1) * sizeof *kv->layer);
    kv->first = malloc((size_t)s->n_layers * sizeof *kv->first);
    if (!kv->layer || !kv->first) return fail(err, "out of memory for %d heads", n);
    for (int l = 0; l < s->n_layers; l++) {
        int owner = kvshape_owner(s, l), own = kvshape_owns(s, l) ? kvshape_heads(s, l) : 0;
        kv->first[l] = owner == l ? kv->n_heads : kv->first[owner];
        for (int g = 0; g < own; g++) kv->layer[kv->n_heads++] = l;
    }
    return 0;
}

int kvcache_open(KVCache *kv, const KVShape *shape, KVTypes types, ThreadPool *pool, char *err) {
    *kv = (KVCache){.shape = *shape, .types = types, .pool = pool, .settling = true};
    kv->type = class_types(types, PAGE_EXACT).k;
    const int dims[2] = {shape->head_dim, kvshape_other_dim(shape)};
    for (int i = 0; i < 2 * PAGE_CLASSES; i++) {
        int d = dims[i / PAGE_CLASSES];
        if (d > MAX_HEAD_DIM || d % 8)
            return fail(err, "head_dim %d: the cache takes multiples of 8 up to %d", d,
                        MAX_HEAD_DIM);
        KVTypes stored = class_types(types, (PageClass)(i % PAGE_CLASSES));
        kv->store[i] = (KVStore){.types = stored, .page_bytes = kvcache_page_bytes(d, stored)};
    }
    if (place_heads(kv, err) == 0 && attend_open(kv, err) == 0) return 0;
    kvcache_close(kv);
    return -1;
}

void kvcache_close(KVCache *kv) {
    for (int i = 0; i < kv->n_seqs; i++) seq_free(kv, &kv->seqs[i]);
    pages_close(kv);
    attend_close(kv);
    reading_close(kv);
    tensors_close(&kv->file);
    free(kv->seqs);
    free(kv->layer);
    free(kv->first);
    *kv = (KVCache){0};
}

void kvcache_trim(KVCache *kv) {
    attend_trim(kv);
    pages_trim(kv);
}

// ---- settling ----

// A page that is to settle: its place in a head's list, and the id of the page it becomes.
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
    page_copy_list(to, from);
    for (Side side = KEYS; side <= VALUES; side++) {
        part_read(part_of(from, side), side, x);
        part_write(part_of(to, side), side, x);
    }
}

// Pages of 64 pairs with 64 pairs or more after them.
static int pages_ripe(const KVHead *h) { return max_int((h->len - h->dropped) / PAGE - 1, 0); }

static bool settles(const KVCache *kv, const KVHead *h, int page) {
    return kv->pages[h->page[page]].class == PAGE_EXACT;
}

// What an exact page of a head settles to. A first page is one that none but demoted pages come
// before, in the list and ever.
static PageClass settled_class(const KVCache *kv, const KVHead *h, int page) {
    int before = 0;
    if (kv->types.k != KV_Q4) return PAGE_SETTLED;
    while (before < page && kv->pages[h->page[before]].class == PAGE_DEMOTED) before++;
    return before == page && h->dropped == 0 ? PAGE_FIRST : PAGE_MIXED;
}

// Gives each of n pages that are to settle a page to become. On failure there are none.
static int settle_plan(KVCache *kv, KVSeq *s, Settle *pages, char *err) {
    int n = 0;
    for (KVHead *h = s->head; h < s->head + kv->n_heads; h++) {
        for (int i = h->settled; i < pages_ripe(h); i++) {
            if (!settles(kv, h, i)) continue;
            int d = kv->pages[h->page[i]].k.head_dim;
            int id = page_take(kv, d, settled_class(kv, h, i), err);
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
    for (const KVHead *h = s->head; h < s->head + kv->n_heads; h++) {
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
    for (KVHead *h = s->head; status == 0 && h < s->head + kv->n_heads; h++)
        h->settled = max_int(h->settled, pages_ripe(h));
    free(pages);
    return status;
}

int kvcache_settle(KVCache *kv, int seq, char *err) {
    if (seq_settle(kv, &kv->seqs[seq], err) != 0) return -1;
    kvcache_trim(kv);
    return 0;
}

// ---- appending ----

// An exact page becomes a copy of another.
static void page_copy(KVPage *to, const KVPage *from) {
    size_t half = data_bytes(from->k.head_dim, from->k.type, KEYS);
    memcpy(to->k.data, from->k.data, half);
    memcpy(to->v.data, from->v.data, half);
    page_copy_list(to, from);
}

// Exact page i of a head becomes a copy, which no other head lists.
static int own_page(KVCache *kv, KVHead *h, int i, char *err) {
    int id = page_take(kv, kv->pages[h->page[i]].k.head_dim, PAGE_EXACT, err);
    if (id < 0) return -1;
    page_copy(&kv->pages[id], &kv->pages[h->page[i]]);
    page_unref(kv, h->page[i]);
    h->page[i] = id;
    return 0;
}

// The last, partly filled page of a head is about to be written: if others list it too, take a
// copy.
static int own_last_page(KVCache *kv, KVHead *h, char *err) {
    int last = pages_used(h) - 1;
    if ((h->len - h->dropped) % PAGE == 0 || kv->pages[h->page[last]].refs == 1) return 0;
    return own_page(kv, h, last, err);
}

// Pages for n more pairs of head i.
static int head_reserve(KVCache *kv, KVSeq *s, int i, int n, char *err) {
    KVHead *h = &s->head[i];
    int need = pages_for(h->len - h->dropped + n), d = kvshape_dim(&kv->shape, kv->layer[i]);
    if (own_last_page(kv, h, err) != 0 || head_room(h, need, err) != 0) return -1;
    while (h->n_pages < need) {
        int id = page_new(kv, d, err);
        if (id < 0) return -1;
        h->page[h->n_pages++] = id;
    }
    return 0;
}

int kvcache_reserve(KVCache *kv, int seq, int n, char *err) {
    if (n > MAX_PAIRS - kv->seqs[seq].next_pos)
        return fail(err, "a sequence of more than %d tokens", MAX_PAIRS);
    bool due = n >= KV_LONG_RUN || kv->seqs[seq].next_pos % KV_SETTLE_STEP == 0;
    if (kv->settling && due && seq_settle(kv, &kv->seqs[seq], err) != 0) return -1;
    if (state_own(kv, &kv->seqs[seq], NULL, err) != 0) return -1;
    for (int i = 0; i < kv->n_heads; i++) {
        if (head_reserve(kv, &kv->seqs[seq], i, n, err) != 0) return -1;
    }
    return attend_reserve(kv, seq, n, err) == 0 ? reading_reserve(kv, seq, n, err) : -1;
}

// Row c of a page's values becomes v [head_dim].
static void write_value(const KVPage *p, int c, const float *v, int head_dim) {
    if (p->v.type == KV_F32)
        memcpy((float *)p->v.data + c * head_dim, v, (size_t)head_dim * sizeof(float));
    else
        kern.f32_to_f16((uint16_t *)p->v.data + c * head_dim, v, (size_t)head_dim);
}

// Pair t of a head becomes k, v [head_dim] at position pos; its page is the head's own.
static void write_pair(const KVCache *kv, const KVHead *h, int t, const float *k, const float *v,
                       int pos) {
    int i = t - h->dropped, c = i % PAGE;
    KVPage *p = &kv->pages[h->page[i / PAGE]];
    int d = p->k.head_dim;
    p->pos[c] = pos, p->digest = 0;
    if (p->biased) p->bias[c] = 0;
    if (kv->type == KV_F32) {
        float *keys = (float *)p->k.data;
        for (int j = 0; j < d; j++) keys[j * PAGE + c] = k[j];
    } else {
        uint16_t half[MAX_HEAD_DIM], *keys = (uint16_t *)p->k.data;
        kern.f32_to_f16(half, k, (size_t)d);
        for (int j = 0; j < d; j++) keys[j * PAGE + c] = half[j];
    }
    write_value(p, c, v, d);
}

typedef struct {
    KVCache *kv;
    int layer;
    const KVRun *runs;
    const float *k, *v;
} Append;

// One kv head of one run.
static void append_unit(void *ctx, int unit) {
    const Append *a = ctx;
    int n_kv_heads = kvshape_heads(&a->kv->shape, a->layer);
    int g = unit % n_kv_heads, d = kvshape_dim(&a->kv->shape, a->layer), row0 = 0;
    const KVRun *run = &a->runs[unit / n_kv_heads];
    KVHead *h = kvcache_head(a->kv, run->seq, a->layer, g);
    for (const KVRun *before = a->runs; before < run; before++) row0 += before->n;
    for (int i = 0; i < run->n; i++) {
        size_t at = ((size_t)(row0 + i) * n_kv_heads + g) * d;
        write_pair(a->kv, h, h->len + i, a->k + at, a->v + at, a->kv->seqs[run->seq].next_pos + i);
    }
    h->len += run->n;
}

void kvcache_append(KVCache *kv, int layer, const KVRun *runs, int n_runs, const float *k,
                    const float *v) {
    Append a = {kv, layer, runs, k, v};
    for (int r = 0; r < n_runs; r++) kv->seqs[runs[r].seq].appended = runs[r].n;
    bool many = n_runs > 1 || runs[0].n > SPLIT_TOKENS;  // few are done before a thread wakes
    int n_kv_heads = kvshape_heads(&kv->shape, layer);
    parallel_for(many ? kv->pool : NULL, n_runs * n_kv_heads, append_unit, &a);
}

// Whole pages that the next token can no longer see are let go.
static void drop_window(KVCache *kv, KVHead *h, int layer) {
    int n = (kvshape_first(&kv->shape, layer, h->len) - h->dropped) / PAGE;
    if (n <= 0) return;
    for (int i = 0; i < n; i++) page_unref(kv, h->page[i]);
    memmove(h->page, h->page + n, (size_t)(h->n_pages - n) * sizeof *h->page);
    h->n_pages -= n;
    h->dropped += n * PAGE;
    h->settled = max_int(h->settled - n, 0);
}

void kvcache_advance(KVCache *kv, const KVRun *runs, int n_runs) {
    kv->packed_wanted = kv->reading.wanted = 0;
    for (int r = 0; r < n_runs; r++) {
        kv->seqs[runs[r].seq].next_pos += runs[r].n;
        for (int i = 0; i < kv->n_heads; i++) {
            int layer = kv->layer[i];
            if (kv->shape.window[layer] > 0) drop_window(kv, &kv->seqs[runs[r].seq].head[i], layer);
        }
    }
}

// ---- evicting ----

// What goes of a head: of the pairs in the span those with keep [span.n] = 0. Or, with demote, what
// becomes 2 bits.
typedef struct {
    KVSpan span;
    const uint8_t *keep;
    bool demote;
} Evict;

static bool goes(const Evict *e, int t) {
    int i = t - e->span.first;
    return i >= 0 && i < e->span.n && !e->keep[i];
}

// One head's way from its old list of pages to the new one.
typedef struct {
    const KVCache *kv;
    const KVHead *old;
    KVHead next;
    int *from;      // [next.len] which old pair each new one is; rising in each of the two parts
    int n_demoted;  // the first new pairs, whole pages of them
} Eviction;

static void list_pair(Eviction *v, int t) { v->from[v->next.len++] = t; }

// The survivors slide left.
static void order_evicted(Eviction *v, const Evict *e) {
    for (int t = 0; t < v->old->len; t++) {
        if (goes(e, t)) continue;  // the pair is dropped
        list_pair(v, t);
    }
}

// Those that go come first, after the ones that were demoted before; less than a page of them stays
// among the others:
//
//   old   D D D D | k x k x x k x ..       D demoted before, x goes, k is kept
//   new   D D D D | x x x x | k k k x ..   whole pages of x become 2 bits
//                 before    n_demoted
static void order_demoted(Eviction *v, const Evict *e) {
    const KVHead *h = v->old;
    int before = 0, going = 0;
    while (before < h->len && v->kv->pages[h->page[before / PAGE]].class == PAGE_DEMOTED)
        before += PAGE;
    for (int t = before; t < h->len; t++) going += goes(e, t);
    int n = going / PAGE * PAGE;
    for (int t = 0; t < before; t++) list_pair(v, t);
    for (int t = before, left = n; left > 0; t++) {
        if (goes(e, t)) list_pair(v, t), left--;
    }
    v->n_demoted = before + n;
    for (int t = before, left = n; t < h->len; t++) {
        if (!goes(e, t) || left-- <= 0) list_pair(v, t);
    }
}

static KVPage *old_page(const Eviction *v, int t) { return &v->kv->pages[v->old->page[t / PAGE]]; }

// Whether new page i is an old page in which nothing moves: it is listed again, not copied.
static bool page_stays(const Eviction *v, int i) {
    const int *from = v->from + i * PAGE;
    int n = min_int(v->next.len - i * PAGE, PAGE), last = from[n - 1];
    if (from[0] % PAGE != 0 || last != from[0] + n - 1) return false;
    if (i * PAGE < v->n_demoted) return old_page(v, from[0])->class == PAGE_DEMOTED;
    return n == PAGE || last == v->old->len - 1;
}

// The new list of a head, its new pages still empty.
static int plan_pages(KVCache *kv, Eviction *v, char *err) {
    int n = pages_used(&v->next);
    if (head_room(&v->next, n, err) != 0) return -1;
    for (int i = 0; i < n; i++) {
        bool stays = page_stays(v, i);
        PageClass class = i * PAGE < v->n_demoted ? PAGE_DEMOTED : PAGE_EXACT;
        int d = kv->pages[v->old->page[0]].k.head_dim;
        int id = stays ? v->old->page[v->from[i * PAGE] / PAGE] : page_take(kv, d, class, err);
        if (id < 0) return -1;
        if (stays) kv->pages[id].refs++;
        v->next.page[v->next.n_pages++] = id;
    }
    return 0;
}

// Pairs from [n] of an old page, which become those from `to` on of a new one.
typedef struct {
    const int *from;
    int n, to;
} Move;

// Keys or values x of the old page become columns, or rows, of y.
static void move_pairs(float *y, const float *x, const Move *m, int head_dim, Side side) {
    for (int row = 0; side == KEYS && row < head_dim * PAGE; row += PAGE) {
        for (int i = 0; i < m->n; i++) y[row + m->to + i] = x[row + m->from[i] % PAGE];
    }
    for (int i = 0; side == VALUES && i < m->n; i++) {
        memcpy(y + (m->to + i) * head_dim, x + m->from[i] % PAGE * head_dim,
               (size_t)head_dim * sizeof *y);
    }
}

// One side of a new page, its pairs from [n]. Exact pages do not change a bit; what had settled is
// read back.
static void fill_side(const Eviction *v, const KVPart *to, Side side, const int *from, int n) {
    int d = to->head_dim;
    float x[MAX_HEAD_DIM * PAGE], y[MAX_HEAD_DIM * PAGE];
    if (n < PAGE) memset(y, 0, (size_t)d * PAGE * sizeof *y);
    for (Move m = {from, 0, 0}; m.to < n; m.to += m.n, m.from += m.n) {
        for (m.n = 1; m.to + m.n < n && m.from[m.n] / PAGE == m.from[0] / PAGE;) m.n++;
        part_read(part_of(old_page(v, m.from[0]), side), side, x);
        move_pairs(y, x, &m, d, side);
    }
    part_write(to, side, y);
}

static void fill_page(void *ctx, int page) {
    const Eviction *v = ctx;
    if (page_stays(v, page)) return;
    KVPage *to = &v->kv->pages[v->next.page[page]];
    const int *from = v->from + page * PAGE, n = min_int(v->next.len - page * PAGE, PAGE);
    for (Side side = KEYS; side <= VALUES; side++) fill_side(v, part_of(to, side), side, from, n);
    for (int i = 0; i < PAGE; i++) {
        const KVPage *old = i < n ? old_page(v, from[i]) : NULL;
        to->pos[i] = old ? old->pos[from[i] % PAGE] : -1;
        if (old && old->biased && !to->biased) {
            to->biased = true;
            memset(to->bias, 0, PAGE * sizeof *to->bias);
        }
        if (to->biased) to->bias[i] = old && old->biased ? old->bias[from[i] % PAGE] : 0;
    }
}

// On failure the head has not changed.
static int evict_head(KVCache *kv, KVHead *h, const Evict *e, char *err) {
    Eviction v = {.kv = kv, .old = h, .from = malloc(((size_t)h->len + 1) * sizeof *v.from)};
    if (!v.from) return fail(err, "out of memory for evicting from %d pairs", h->len);
    if (e->demote)
        order_demoted(&v, e);
    else
        order_evicted(&v, e);
    int status = plan_pages(kv, &v, err);
    if (status == 0) {
        parallel_for(kv->pool, v.next.n_pages, fill_page, &v);
        KVHead old = *h;
        *h = v.next, v.next = old;
    }
    head_free(kv, &v.next);
    free(v.from);
    return status;
}

int kvcache_evict_head(KVCache *kv, KVHeadAt at, KVSpan span, const uint8_t *keep, char *err) {
    KVHead *h = kvcache_head(kv, at.seq, at.layer, at.g);
    return evict_head(kv, h, &(Evict){span, keep, .demote = false}, err);
}

// Head by head, so that memory for one head's new pages is enough.
static int evict_layers(KVCache *kv, int seq, Evict e, char *err) {
    attend_trim(kv);  // before new pages are taken
    for (int i = 0; i < kv->n_heads; i++) {
        if (kv->shape.window[kv->layer[i]] != 0) continue;
        if (evict_head(kv, &kv->seqs[seq].head[i], &e, err) != 0) return -1;
        e.keep += e.span.n;
    }
    kvcache_trim(kv);
    return 0;
}

int kvcache_evict(KVCache *kv, int seq, int n_prefix, int n_ctx, const uint8_t *keep, char *err) {
    return evict_layers(kv, seq, (Evict){{n_prefix, n_ctx}, keep, .demote = false}, err);
}

int kvcache_demote(KVCache *kv, int seq, int n_prefix, int n_ctx, const uint8_t *keep, char *err) {
    return evict_layers(kv, seq, (Evict){{n_prefix, n_ctx}, keep, .demote = true}, err);
}

// ---- fitting ----

int kvcache_own(KVCache *kv, int seq, char *err) {
    for (int i = 0; i < kv->n_heads; i++) {
        KVHead *h = &kv->seqs[seq].head[i];
        if (kv->shape.window[kv->layer[i]] != 0) continue;
        for (int j = 0; j < pages_used(h); j++) {
            const KVPage *p = &kv->pages[h->page[j]];
            bool writable = p->refs == 1 || p->class != PAGE_EXACT;
            if (!writable && own_page(kv, h, j, err) != 0) return -1;
        }
    }
    return 0;
}

void kvcache_refit(KVCache *kv, KVHeadAt at, const KVFitted *fit) {
    const KVHead *h = kvcache_head(kv, at.seq, at.layer, at.g);
    int d = kvshape_dim(&kv->shape, at.layer);
    for (int i = 0; i < fit->n; i++) {
        KVPage *p = &kv->pages[h->page[fit->kept[i] / PAGE]];
        int c = fit->kept[i] % PAGE;
        p->digest = 0;
        write_value(p, c, fit->v + (size_t)i * d, d);
        if (!fit->bias) continue;
        if (!p->biased) memset(p->bias, 0, PAGE * sizeof *p->bias);
        p->biased = true;
        p->bias[c] = fit->bias[i];
    }
}

bool kvcache_biased(const KVCache *kv, int seq) {
    for (int i = 0; i < kv->n_heads; i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        for (int j = 0; j < pages_used(h); j++)
            if (kv->pages[h->page[j]].biased) return true;
    }
    return false;
}

// ---- looking inside ----

static float number_at(const KVPart *p, int i) {
    return p->type == KV_F32 ? ((const float *)p->data)[i] : f16_f32(((uint16_t *)p->data)[i]);
}

// One pair's key or value: every 64th number from c on, or row c.
static void part_pair(const KVPart *p, Side side, int c, float *out) {
    float x[MAX_HEAD_DIM * PAGE];
    int d = p->head_dim, at = side == KEYS ? c : c * d, step = side == KEYS ? PAGE : 1;
    if (is_codes(p->type)) part_read(p, side, x);
    for (int i = 0; i < d; i++, at += step) out[i] = is_codes(p->type) ? x[at] : number_at(p, at);
}

int kvcache_pair(const KVCache *kv, KVHeadAt at, int t, float *k, float *v) {
    const KVHead *h = kvcache_head(kv, at.seq, at.layer, at.g);
    const KVPage *p = &kv->pages[h->page[(t - h->dropped) / PAGE]];
    int c = (t - h->dropped) % PAGE;
    if (k) part_pair(&p->k, KEYS, c, k);
    if (v) part_pair(&p->v, VALUES, c, v);
    return p->pos[c];
}

float kvcache_bias(const KVCache *kv, KVHeadAt at, int t) {
    const KVHead *h = kvcache_head(kv, at.seq, at.layer, at.g);
    const KVPage *p = &kv->pages[h->page[(t - h->dropped) / PAGE]];
    return p->biased ? p->bias[(t - h->dropped) % PAGE] : 0;
}

int kvcache_block(const KVCache *kv, KVHeadAt at, int b, float *k, float *v) {
    const KVHead *h = kvcache_head(kv, at.seq, at.layer, at.g);
    const KVPage *p = &kv->pages[h->page[b - h->dropped / PAGE]];
    if (k) part_read(&p->k, KEYS, k);
    if (v) part_read(&p->v, VALUES, v);
    return min_int(h->len - b * PAGE, PAGE);
}

// Of a page of head i, its positions and its place in the head's list.
static size_t listed_bytes(const KVCache *kv, int i, PageClass class) {
    KVTypes types = class_types(kv->types, class);
    return kvcache_page_bytes(kvshape_dim(&kv->shape, kv->layer[i]), types) +
           (PAGE + 1) * sizeof(int);
}

static size_t bias_bytes(const KVPage *p) { return p->biased ? PAGE * sizeof *p->bias : 0; }

size_t kvcache_bytes(const KVCache *kv, int seq) {
    size_t bytes = kvcache_state_bytes(&kv->shape);
    for (int i = 0; i < kv->n_heads; i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        bytes += sizeof *h;
        for (int j = 0; j < pages_used(h); j++)
            bytes += listed_bytes(kv, i, kv->pages[h->page[j]].class) +
                     bias_bytes(&kv->pages[h->page[j]]);
    }
    return bytes;
}

size_t kvcache_full_bytes(const KVCache *kv, int seq) {
    size_t bytes = kvcache_state_bytes(&kv->shape);
    for (int i = 0; i < kv->n_heads; i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        bytes += sizeof *h + pages_used(h) * listed_bytes(kv, i, PAGE_EXACT);
    }
    return bytes;
}

size_t kvcache_unevicted_bytes(const KVCache *kv, int seq, int n) {
    size_t bytes = kvcache_full_bytes(kv, seq);
    for (int i = 0; i < kv->n_heads; i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        if (kv->shape.window[kv->layer[i]] == 0)
            bytes += (size_t)(pages_for(n) - pages_used(h)) * listed_bytes(kv, i, PAGE_EXACT);
    }
    return bytes;
}

// Of one head's pair and its position.
static size_t pair_bytes(int head_dim, KVTypes types) {
    return kvcache_page_bytes(head_dim, types) / PAGE + sizeof(int);
}

size_t kvcache_token_bytes(const KVShape *shape, KVTypes types) {
    size_t heads = (size_t)shape->n_kv_heads * kvcache_scored_layers(shape, NULL);
    return pair_bytes(shape->head_dim, types) * heads;
}

size_t kvcache_first_bytes(const KVShape *shape, KVTypes types) {
    size_t heads = (size_t)shape->n_kv_heads * kvcache_scored_layers(shape, NULL);
    return heads * (kvcache_page_bytes(shape->head_dim, class_types(types, PAGE_FIRST)) -
                    kvcache_page_bytes(shape->head_dim, types));
}

size_t kvcache_window_bytes(const KVShape *shape, KVTypes types) {
    size_t bytes = 0;
    for (int l = 0; l < shape->n_layers; l++) {
        int window = shape->window[l];
        size_t heads = (size_t)kvshape_heads(shape, l);
        if (window > 0 && kvshape_owns(shape, l))
            bytes += heads * ((size_t)window + PAGE) * pair_bytes(kvshape_dim(shape, l), types);
    }
    return bytes;
}
