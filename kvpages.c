// kvpages.c: pages of the cache, and what they hold.
//
// Memory comes in slabs of 64 pages, mapped straight from the system, so that a free page's memory
// can go back to it alone (kvcache_trim). A page is known by its number in KVCache.pages, which
// never changes. It is in use while a head lists it and free when the last head lets go. What must
// stay true: a page that more than one head lists is never written.
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include "kvpages.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SLAB_PAGES = 64 };

// ---- types ----

static const char *const type_names[KV_TYPES] = {"f16", "f32", "q8", "q4", "q2", "m4"};

const char *kvcache_type_name(KVType t) { return type_names[t]; }

static int type_parse(const char *name, size_t n, KVType *t) {
    for (int i = 0; i < KV_M4; i++) {
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

KVTypes class_types(KVTypes types, PageClass class) {
    bool f32 = types.k == KV_F32 || types.v == KV_F32;
    if (class == PAGE_EXACT) return kvcache_both(f32 ? KV_F32 : KV_F16);
    if (class == PAGE_DEMOTED) return kvcache_both(KV_Q2);
    if (class != PAGE_SETTLED && types.k == KV_Q4) types.k = class == PAGE_MIXED ? KV_M4 : KV_Q8;
    return types;
}

// ---- bytes ----

size_t data_bytes(int head_dim, KVType t, Side side) {
    if (!is_codes(t)) return (size_t)head_dim * PAGE * (t == KV_F32 ? 4 : 2);
    return n_blocks(head_dim, side) *
           code_bytes(code_type(t), code_rows(head_dim, side), code_cols(side));
}

static size_t part_bytes(int head_dim, KVType t, Side side) {
    size_t lists = has_minima(t, side) ? 2 : 1;
    return data_bytes(head_dim, t, side) + n_scales(head_dim, t, side) * lists * sizeof(uint16_t);
}

size_t kvcache_page_bytes(int head_dim, KVTypes types) {
    return part_bytes(head_dim, types.k, KEYS) + part_bytes(head_dim, types.v, VALUES);
}

// ---- pages ----

uint8_t *memory_map(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

void memory_unmap(uint8_t *memory, size_t bytes) {
    if (memory) munmap(memory, bytes);
}

// From one page of a slab to the next.
static size_t page_step(const KVStore *store) { return (store->page_bytes + 63) / 64 * 64; }

static size_t slab_bytes(const KVStore *store) {
    return SLAB_PAGES * (page_step(store) + PAGE * (sizeof(int) + sizeof(float)));
}

int pages_grow(KVCache *kv, int n, char *err) {
    if (n <= kv->pages_cap) return 0;
    if (n > INT_MAX / 2) return fail(err, "the cache needs more than %d pages", INT_MAX / 2);
    int cap = max_int(n, kv->pages_cap * 2);
    KVPage *pages = realloc(kv->pages, (size_t)cap * sizeof *pages);
    if (!pages) return fail(err, "out of memory for a table of %d cache pages", cap);
    kv->pages = pages;
    kv->pages_cap = cap;
    return 0;
}

KVStore *store_of(KVCache *kv, int head_dim, PageClass class) {
    return &kv->store[(head_dim != kv->shape.head_dim) * PAGE_CLASSES + (int)class];
}

static KVStore *page_store(KVCache *kv, const KVPage *p) {
    return store_of(kv, p->k.head_dim, p->class);
}

// One side of a page in the memory at `at`.
static KVPart part_at(int d, KVType t, Side side, uint8_t *at) {
    KVPart p = {t, d, at, NULL, NULL};
    if (!is_codes(t)) return p;
    p.scale = (uint16_t *)(at + data_bytes(d, t, side));
    if (has_minima(t, side)) p.min = p.scale + n_scales(d, t, side);
    return p;
}

// A slab is 64 pages and, after them, their positions and biases, which the system gives no memory
// as long as none is written.
static int slab_new(KVCache *kv, int head_dim, PageClass class, char *err) {
    KVStore *store = store_of(kv, head_dim, class);
    size_t n_slabs = (size_t)store->n_slabs + 1, used = 0;
    if (pages_grow(kv, kv->n_pages + SLAB_PAGES, err) != 0) return -1;
    uint8_t **slab = realloc(store->slab, n_slabs * sizeof *slab);
    if (slab) store->slab = slab;
    int *free_page = realloc(store->free_page, n_slabs * SLAB_PAGES * sizeof *free_page);
    if (free_page) store->free_page = free_page;
    uint8_t *memory = slab && free_page ? memory_map(slab_bytes(store)) : NULL;
    for (int i = 0; i < 2 * PAGE_CLASSES; i++)
        used += (size_t)kv->store[i].n_slabs * slab_bytes(&kv->store[i]);
    if (!memory)
        return fail(err, "out of memory: the cache needs more than the %zu MB it has", used >> 20);
    store->slab[store->n_slabs++] = memory;
    int *pos = (int *)(memory + SLAB_PAGES * page_step(store));
    float *bias = (float *)(pos + SLAB_PAGES * PAGE);
    for (int i = SLAB_PAGES - 1; i >= 0; i--) store->free_page[store->n_free++] = kv->n_pages + i;
    for (int i = 0; i < SLAB_PAGES; i++) {
        uint8_t *at = memory + (size_t)i * page_step(store);
        KVPart k = part_at(head_dim, store->types.k, KEYS, at);
        at += part_bytes(head_dim, store->types.k, KEYS);
        KVPart v = part_at(head_dim, store->types.v, VALUES, at);
        kv->pages[kv->n_pages++] = (KVPage){
            .k = k, .v = v, .pos = pos + i * PAGE, .bias = bias + i * PAGE, .class = class};
    }
    return 0;
}

int page_take(KVCache *kv, int head_dim, PageClass class, char *err) {
    KVStore *store = store_of(kv, head_dim, class);
    if (store->n_free == 0 && slab_new(kv, head_dim, class, err) != 0) return -1;
    int id = store->free_page[--store->n_free];
    kv->pages[id].refs = 1, kv->pages[id].biased = false, kv->pages[id].digest = 0;
    return id;
}

int page_new(KVCache *kv, int head_dim, char *err) {
    int id = page_take(kv, head_dim, PAGE_EXACT, err);
    if (id < 0) return -1;
    KVPage *p = &kv->pages[id];
    memset(p->k.data, 0, page_store(kv, p)->page_bytes);
    for (int i = 0; i < PAGE; i++) p->pos[i] = -1;
    return id;
}

void page_copy_list(KVPage *to, const KVPage *from) {
    memcpy(to->pos, from->pos, PAGE * sizeof *to->pos);
    to->biased = from->biased;
    if (from->biased) memcpy(to->bias, from->bias, PAGE * sizeof *to->bias);
}

void page_unref(KVCache *kv, int id) {
    KVPage *p = &kv->pages[id];
    KVStore *store = page_store(kv, p);
    if (--p->refs == 0) store->free_page[store->n_free++] = id;
}

void pages_close(KVCache *kv) {
    for (KVStore *store = kv->store; store < kv->store + 2 * PAGE_CLASSES; store++) {
        for (int i = 0; i < store->n_slabs; i++) memory_unmap(store->slab[i], slab_bytes(store));
        free(store->slab);
        free(store->free_page);
    }
    free(kv->pages);
}

void pages_trim(KVCache *kv) {
    size_t unit = (size_t)sysconf(_SC_PAGESIZE);
    for (const KVStore *store = kv->store; store < kv->store + 2 * PAGE_CLASSES; store++) {
        for (int i = 0; i < store->n_free; i++) {
            uintptr_t at = (uintptr_t)kv->pages[store->free_page[i]].k.data;
            uintptr_t end = (at + store->page_bytes) / unit * unit;
            at = (at + unit - 1) / unit * unit;
            if (at < end) madvise((void *)at, end - at, MADV_DONTNEED);
        }
    }
}

// ---- mixing ----

// One step of to [n][cols] = H from: sums and differences of rows n / 2 apart, side by side (Pease
// 1968), so that both ends of every step lie in order.
static inline void hadamard_step(float *restrict to, const float *restrict from, int n,
                                 const int cols) {
    const float *restrict half = from + n / 2 * cols;
    for (int i = 0; i < n / 2 * cols; i += cols) {
        for (int c = 0; c < cols; c++) {
            float a = from[i + c], b = half[i + c];
            to[2 * i + c] = a + b, to[2 * i + cols + c] = a - b;
        }
    }
}

// H x [n][cols], in x or room: returns where.
static inline float *hadamard(float *room, float *x, int n, const int cols) {
    for (int step = 1; step < n; step *= 2) {
        hadamard_step(room, x, n, cols);
        float *done = room;
        room = x, x = done;
    }
    return x;
}

static int log2_group(int head_dim) { return __builtin_ctz((unsigned)head_dim); }

void mix_queries(float *q, int n, int head_dim) {
    int m = log2_group(head_dim), group = 1 << m;
    float room[MAX_HEAD_DIM], scale = 1.0f / (float)(1 << (m - m / 2));
    for (float *x = q; x < q + n * head_dim; x += group) {
        const float *mixed = hadamard(room, x, group, 1);
        for (int i = 0; i < group; i++) x[i] = mixed[i] * scale;
    }
}

// Mixes the channels of keys [head_dim][64], or takes that back, some pairs at a time: in the
// first-level cache.
static void mix_keys(float *keys, int head_dim, bool back) {
    enum { COLS = 16 };
    int m = log2_group(head_dim), group = 1 << m;
    float room[2][MAX_HEAD_DIM * COLS], scale = 1.0f / (float)(1 << (back ? m - m / 2 : m / 2));
    for (int first = 0; first < head_dim; first += group) {
        for (int c0 = 0; c0 < PAGE; c0 += COLS) {
            float *at = keys + first * PAGE + c0;
            for (int i = 0; i < group; i++)
                memcpy(room[0] + i * COLS, at + i * PAGE, COLS * sizeof *at);
            float *mixed = hadamard(room[1], room[0], group, COLS);
            for (int i = 0; i < group * COLS; i++) mixed[i] *= scale;
            for (int i = 0; i < group; i++)
                memcpy(at + i * PAGE, mixed + i * COLS, COLS * sizeof *at);
        }
    }
}

// ---- what a page holds ----

Codes part_codes(const KVPart *p, Side side, int block) {
    CodeType type = code_type(p->type);
    int d = p->head_dim, rows = code_rows(d, side), cols = code_cols(side);
    uint8_t *data = p->data + block * code_bytes(type, rows, cols);
    size_t scales = (size_t)block * rows;
    return (Codes){.type = type,
                   .rows = rows,
                   .cols = side == KEYS ? cols : min_int(cols, d - block * cols),
                   .data = data,
                   .scale = p->scale + scales,
                   .min = p->min ? p->min + scales : NULL,
                   .ahead = data};
}

void part_read(const KVPart *p, Side side, float *out) {
    int d = p->head_dim;
    size_t n = (size_t)d * PAGE, ld = (size_t)side_cols(d, side);
    if (p->type == KV_F32)
        memcpy(out, p->data, n * sizeof *out);
    else if (p->type == KV_F16)
        kern.f16_to_f32(out, (const uint16_t *)p->data, n);
    for (int b = 0; is_codes(p->type) && b < n_blocks(d, side); b++) {
        Codes codes = part_codes(p, side, b);
        kern.unpack_codes(out + b * CODE_COLS, ld, &codes);
    }
    if (p->type == KV_M4) mix_keys(out, d, true);
}

void part_write(const KVPart *p, Side side, float *x) {
    int d = p->head_dim;
    size_t n = (size_t)d * PAGE, ld = (size_t)side_cols(d, side);
    if (p->type == KV_M4) mix_keys(x, d, false);
    if (p->type == KV_F32)
        memcpy(p->data, x, n * sizeof *x);
    else if (p->type == KV_F16)
        kern.f32_to_f16((uint16_t *)p->data, x, n);
    for (int b = 0; is_codes(p->type) && b < n_blocks(d, side); b++) {
        Codes codes = part_codes(p, side, b);
        codes_round(&codes, x + b * CODE_COLS, ld);
    }
}
