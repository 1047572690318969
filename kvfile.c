#include "kvpages.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

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
             codes ? kvcache_type_name(g->type) : "", ends[part]);
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
