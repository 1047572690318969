// kvfile.c: saved caches: writing, loading, and what they say of themselves.
//
// Every tensor of the file stands in one of two tables, page_spec and list_spec, which writing and
// reading share. Whoever reads a file goes through read_cache: it checks everything that can be
// wrong, and loading then only hands out what was found. What must stay true: the same cache gives
// the same bytes, and a file whose pages are all exact is one of the first version.
#include "kvfile.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvpages.h"

static const char format_start[] = "kvzip.c cache ";
// The first version knows exact pages alone, the second pages of fewer bits, the third biases, the
// fourth mixed keys, the fifth states, the sixth layers with other heads than the rest, or with
// those of another. A file is of the first that it can be.
typedef enum { PLAIN, CODES, BIASES, MIXED, STATES, UNEVEN, FORMATS } Format;
static const char *const formats[FORMATS] = {"kvzip.c cache 1", "kvzip.c cache 2",
                                             "kvzip.c cache 3", "kvzip.c cache 4",
                                             "kvzip.c cache 5", "kvzip.c cache 6"};

// ---- the tensors ----

typedef struct {
    char name[24];
    DType type;
    int n_dims, size[4];
} TensorSpec;

// Lengths of heads: as long as in layers without a window, or otherwise.
typedef enum { FULL, SLIDING, LENGTHS } Length;

// Pages whose keys, or values, are of one type and length: they share up to three tensors.
typedef struct {
    Side side;
    KVType type;
    Length length;
    int n;
} Group;

typedef enum { DATA, SCALES, MINIMA, GROUP_PARTS } GroupPart;
enum { GROUPS = LENGTHS * 2 * KV_TYPES };

static int group_index(KVType type, Side side, Length length) {
    return ((int)length * KV_TYPES + (int)type) * 2 + (int)side;
}

// All groups in the order of the file, without pages.
static void groups_start(Group *groups) {
    for (int i = 0; i < GROUPS; i++)
        groups[i] =
            (Group){(Side)(i % 2), (KVType)(i / 2 % KV_TYPES), (Length)(i / 2 / KV_TYPES), 0};
}

static bool has_part(const Group *g, GroupPart part) {
    return part == DATA || (part == SCALES && is_codes(g->type)) ||
           (part == MINIMA && has_minima(g->type, g->side));
}

// One of a group's tensors.
static TensorSpec page_spec(const Group *g, GroupPart part, int head_dim) {
    static const char *const ends[GROUP_PARTS] = {"", ".scale", ".min"};
    bool codes = is_codes(g->type);
    TensorSpec s = {.n_dims = 0};
    snprintf(s.name, sizeof s.name, "%s%c%s%s%s", g->length == SLIDING ? "sliding." : "",
             g->side == KEYS ? 'k' : 'v', codes ? "_" : "", codes ? kvcache_type_name(g->type) : "",
             ends[part]);
    s.type = part != DATA || g->type == KV_F16 ? T_F16 : g->type == KV_F32 ? T_F32 : T_U8;
    s.size[s.n_dims++] = g->n;
    if (codes && g->side == VALUES) s.size[s.n_dims++] = n_blocks(head_dim, VALUES);
    int rows = code_rows(head_dim, g->side);
    s.size[s.n_dims++] = codes && part == DATA ? rows / 4 : rows;
    if (part != DATA) return s;
    s.size[s.n_dims++] = codes ? (int)code_bytes(code_type(g->type), 4, code_cols(g->side))
                               : side_cols(head_dim, g->side);
    return s;
}

// Bytes of one page in such a tensor.
static size_t page_part_bytes(const Group *g, GroupPart part, int head_dim) {
    return part == DATA ? data_bytes(head_dim, g->type, g->side)
                        : n_scales(head_dim, g->type, g->side) * sizeof(uint16_t);
}

// The other tensors are lists, with sizes that they share.
typedef enum { N_PAGES, N_PAIRS, N_LAYERS, N_KV_HEADS, N_IDS, N_STATES, N_FLOATS, SIZES } Size;
typedef enum { POS, LEN, DROPPED, WINDOW, HEADS, IDS, CLASSES, BIAS, STATE, LISTS } List;

static TensorSpec list_spec(List list, const int sizes[SIZES]) {
    static const struct {
        const char *name;
        DType type;
        int n_dims;
        Size size[2];
    } lists[LISTS] = {
        [POS] = {"pos", T_I32, 2, {N_PAGES, N_PAIRS}},
        [LEN] = {"len", T_I32, 2, {N_LAYERS, N_KV_HEADS}},
        [DROPPED] = {"dropped", T_I32, 2, {N_LAYERS, N_KV_HEADS}},
        [WINDOW] = {"window", T_I32, 1, {N_LAYERS}},
        [HEADS] = {"kv_heads", T_I32, 1, {N_LAYERS}},
        [IDS] = {"ids", T_I32, 1, {N_IDS}},
        [CLASSES] = {"page_class", T_U8, 1, {N_PAGES}},
        [BIAS] = {"bias", T_F32, 2, {N_PAGES, N_PAIRS}},
        [STATE] = {"state", T_F32, 2, {N_STATES, N_FLOATS}},
    };
    TensorSpec s = {.type = lists[list].type, .n_dims = lists[list].n_dims};
    snprintf(s.name, sizeof s.name, "%s", lists[list].name);
    for (int i = 0; i < s.n_dims; i++) s.size[i] = sizes[lists[list].size[i]];
    return s;
}

// ---- writing ----

typedef struct {
    const KVCache *kv;
    int seq;
    const KVInfo *info;
    TensorWriter *w;
    char *err;
    bool plain;   // all pages are exact
    bool mixed;   // some are of the classes that 4-bit keys settle to
    bool biased;  // some pages have biases
    bool uneven;  // layers have other heads than the rest
    int n_pages;
    Group groups[GROUPS];
    const Group *group;  // whose part is being written
    GroupPart part;
} Save;

// Calls fn for every page of the sequence, in the order of the file; stops where it returns
// nonzero.
static int each_page(Save *save, int (*fn)(Save *save, KVPage *p)) {
    const KVCache *kv = save->kv;
    for (int i = 0; i < kv->n_heads; i++) {
        const KVHead *h = &kv->seqs[save->seq].head[i];
        for (int j = 0; j < pages_used(h); j++) {
            if (fn(save, &kv->pages[h->page[j]]) != 0) return -1;
        }
    }
    return 0;
}

static Length length_of(const KVShape *shape, int head_dim) {
    return head_dim == shape->head_dim ? FULL : SLIDING;
}

// Whether layers differ in heads, or some read those of another.
static bool is_uneven(const KVShape *s) {
    bool uneven = kvshape_other_dim(s) != s->head_dim;
    for (int l = 0; l < s->n_layers; l++)
        uneven = uneven || kvshape_owner(s, l) != l || kvshape_heads(s, l) != s->n_kv_heads;
    return uneven;
}

// Heads that a layer has of its own.
static int own_heads(const KVShape *s, int l) {
    return kvshape_owns(s, l) ? kvshape_heads(s, l) : 0;
}

static int count_page(Save *save, KVPage *p) {
    save->n_pages++, save->plain = save->plain && p->class == PAGE_EXACT;
    save->mixed = save->mixed || p->class == PAGE_MIXED || p->class == PAGE_FIRST;
    for (Side side = KEYS; side <= VALUES; side++)
        save->groups[group_index(part_of(p, side)->type, side,
                                 length_of(&save->kv->shape, p->k.head_dim))]
            .n++;
    return 0;
}

static int put_part(Save *save, KVPage *p) {
    const Group *g = save->group;
    const KVPart *part = part_of(p, g->side);
    const void *const data[GROUP_PARTS] = {part->data, part->scale, part->min};
    if (part->type != g->type || length_of(&save->kv->shape, part->head_dim) != g->length) return 0;
    size_t bytes = page_part_bytes(g, save->part, part->head_dim);
    return tensors_write_put(save->w, data[save->part], bytes, save->err);
}

static int put_pos(Save *save, KVPage *p) {
    return tensors_write_put(save->w, p->pos, PAGE * sizeof(int32_t), save->err);
}

static int put_bias(Save *save, KVPage *p) {
    static const float none[PAGE];
    return tensors_write_put(save->w, p->biased ? p->bias : none, sizeof none, save->err);
}

static int put_class(Save *save, KVPage *p) {
    uint8_t class = (uint8_t)p->class;
    return tensors_write_put(save->w, &class, 1, save->err);
}

static int put_head_list(Save *save, List list) {
    const KVShape *shape = &save->kv->shape;
    int most = kvshape_most_heads(shape);
    for (int i = 0; i < shape->n_layers * most; i++) {
        int l = i / most, g = i % most;
        bool there = g < own_heads(shape, l);  // those that are not have no pairs
        const KVHead *h = there ? kvcache_head(save->kv, save->seq, l, g) : NULL;
        int32_t n = !there ? 0 : list == LEN ? h->len : h->dropped;
        if (tensors_write_put(save->w, &n, sizeof n, save->err) != 0) return -1;
    }
    return 0;
}

static int put_heads(Save *save) {
    for (int l = 0; l < save->kv->shape.n_layers; l++) {
        int32_t n = own_heads(&save->kv->shape, l);
        if (tensors_write_put(save->w, &n, sizeof n, save->err) != 0) return -1;
    }
    return 0;
}

static int put_state(Save *save) {
    const KVState *state = save->kv->seqs[save->seq].state;
    static const float none[PAGE];
    size_t bytes = kvcache_state_bytes(&save->kv->shape);
    if (state) return tensors_write_put(save->w, state->x, bytes, save->err);
    for (size_t n; bytes > 0; bytes -= n) {  // nothing has been read
        n = bytes < sizeof none ? bytes : sizeof none;
        if (tensors_write_put(save->w, none, n, save->err) != 0) return -1;
    }
    return 0;
}

static int put_list(Save *save, List list) {
    const KVInfo *info = save->info;
    const KVShape *shape = &save->kv->shape;
    size_t n_layers = (size_t)shape->n_layers, n_ids = (size_t)info->n_ids;
    if (list == POS) return each_page(save, put_pos);
    if (list == CLASSES) return each_page(save, put_class);
    if (list == BIAS) return each_page(save, put_bias);
    if (list == STATE) return put_state(save);
    if (list == LEN || list == DROPPED) return put_head_list(save, list);
    if (list == HEADS) return put_heads(save);
    return list == WINDOW
               ? tensors_write_put(save->w, shape->window, n_layers * sizeof(int32_t), save->err)
               : tensors_write_put(save->w, info->ids, n_ids * sizeof(int32_t), save->err);
}

static Format format_of(const Save *save) {
    if (save->uneven) return UNEVEN;
    if (kvcache_state_bytes(&save->kv->shape) > 0) return STATES;
    if (save->mixed) return MIXED;
    return save->biased ? BIASES : save->plain ? PLAIN : CODES;
}

static int put_meta(const Save *save) {
    const KVInfo *info = save->info;
    char ratio[32], n_prefix[16], n_ctx[16], next_pos[16], types[KV_NAME];
    snprintf(ratio, sizeof ratio, "%.17g", info->ratio);
    snprintf(n_prefix, sizeof n_prefix, "%d", info->n_prefix);
    snprintf(n_ctx, sizeof n_ctx, "%d", info->n_ctx);
    snprintf(next_pos, sizeof next_pos, "%d", save->kv->seqs[save->seq].next_pos);
    const Meta meta[] = {{"format", formats[format_of(save)]},
                         {"fingerprint", info->fingerprint},
                         {"model", info->model},
                         {"policy", info->policy},
                         {"ratio", ratio},
                         {"n_prefix", n_prefix},
                         {"n_ctx", n_ctx},
                         {"next_pos", next_pos},
                         {"kv", kvcache_types_name(save->kv->types, types)},
                         {"level", info->level},
                         {"profile", info->profile},
                         {"set", info->set},
                         {"budget", info->budget},
                         {"fit", info->fit},
                         {"documents", info->documents}};
    for (size_t i = 0; i < sizeof meta / sizeof *meta; i++) {
        if (!meta[i].value) continue;
        if (tensors_write_meta(save->w, meta[i].key, meta[i].value, save->err) != 0) return -1;
    }
    return 0;
}

static int declare(Save *save, TensorSpec s) {
    size_t sizes[4] = {0};
    for (int i = 0; i < s.n_dims; i++) sizes[i] = (size_t)s.size[i];
    return tensors_write_declare(save->w, s.name, s.type, s.n_dims, sizes, save->err);
}

// Groups without pages are left out, but for that of exact pages. The class of each page is left
// out where all are exact, biases where there are none, heads where all layers have as many.
static bool group_in_file(const Save *save, const Group *g) {
    const KVShape *shape = &save->kv->shape;
    bool length = g->length == FULL || kvshape_other_dim(shape) != shape->head_dim;
    return g->n > 0 || (length && g->type == save->kv->type);
}

static bool list_in_file(const Save *save, List list) {
    if (list == STATE) return kvcache_state_bytes(&save->kv->shape) > 0;
    return list == CLASSES ? !save->plain
           : list == BIAS  ? save->biased
           : list == HEADS ? save->uneven
                           : true;
}

static int length_dim(const KVShape *shape, Length length) {
    return length == FULL ? shape->head_dim : kvshape_other_dim(shape);
}

static int declare_all(Save *save) {
    const KVShape *shape = &save->kv->shape;
    const int sizes[SIZES] = {
        [N_PAGES] = save->n_pages,    [N_PAIRS] = PAGE,
        [N_LAYERS] = shape->n_layers, [N_KV_HEADS] = kvshape_most_heads(shape),
        [N_IDS] = save->info->n_ids,  [N_STATES] = n_states(shape),
        [N_FLOATS] = shape->state};
    for (const Group *g = save->groups; g < save->groups + GROUPS; g++) {
        for (GroupPart part = DATA; group_in_file(save, g) && part < GROUP_PARTS; part++) {
            if (!has_part(g, part)) continue;
            if (declare(save, page_spec(g, part, length_dim(shape, g->length))) != 0) return -1;
        }
    }
    for (int list = 0; list < LISTS; list++) {
        if (list_in_file(save, (List)list) && declare(save, list_spec((List)list, sizes)) != 0)
            return -1;
    }
    return 0;
}

// The data, in the order of the declarations.
static int put_all(Save *save) {
    for (const Group *g = save->groups; g < save->groups + GROUPS; g++) {
        for (GroupPart part = DATA; part < GROUP_PARTS; part++) {
            save->group = g, save->part = part;
            if (has_part(g, part) && each_page(save, put_part) != 0) return -1;
        }
    }
    for (int list = 0; list < LISTS; list++) {
        if (list_in_file(save, (List)list) && put_list(save, (List)list) != 0) return -1;
    }
    return 0;
}

int kvfile_save(const KVCache *kv, int seq, const char *path, const KVInfo *info, char *err) {
    TensorWriter w = {0};
    Save save = {.kv = kv,
                 .seq = seq,
                 .info = info,
                 .w = &w,
                 .err = err,
                 .plain = true,
                 .biased = kvcache_biased(kv, seq),
                 .uneven = is_uneven(&kv->shape)};
    if (tensors_write_begin(&w, path, err) != 0) return -1;
    groups_start(save.groups);
    each_page(&save, count_page);
    if (put_meta(&save) == 0 && declare_all(&save) == 0 && put_all(&save) == 0 &&
        tensors_write_commit(&w, err) == 0)
        return 0;
    tensors_write_abort(&w);
    return -1;
}

// ---- reading ----

// What a file says, once read_cache has checked it. Pointers go into its map.
typedef struct {
    const TensorFile *file;
    KVInfo info;
    int next_pos;
    KVTypes types;          // what pages settle to
    int sizes[SIZES];       // -1: not known yet
    int head_dim[LENGTHS];  // of SLIDING heads -1 where no page has other ones
    const int32_t *pos, *len, *dropped, *window;
    const int32_t *heads;                   // [layers] heads of their own; NULL: N_KV_HEADS all
    const uint8_t *class;                   // [pages], NULL: all exact
    const float *bias;                      // [pages][64], NULL: none
    const float *state;                     // [N_STATES][N_FLOATS], NULL: none
    Group groups[GROUPS];                   // n: how many pages there are of each
    const void *data[GROUPS][GROUP_PARTS];  // NULL where a group has no pages
} Saved;

// Of all layers, also those that are not there.
static int n_saved_heads(const Saved *s) { return s->sizes[N_LAYERS] * s->sizes[N_KV_HEADS]; }

static PageClass class_of(const Saved *s, int page) {
    return s->class ? (PageClass)s->class[page] : PAGE_EXACT;
}

// Whether the head is there; heads are counted over all layers, as many in each.
static bool has_head(const Saved *s, int head) {
    int l = head / s->sizes[N_KV_HEADS], g = head % s->sizes[N_KV_HEADS];
    return s->window[l] != NO_PAIRS && (!s->heads || g < s->heads[l]);
}

static Length saved_length(const Saved *s, int head) {
    bool slides = s->window[head / s->sizes[N_KV_HEADS]] > 0;
    return slides && s->head_dim[SLIDING] > 0 ? SLIDING : FULL;
}

// Pages of a head.
static int head_pages(const Saved *s, int head) {
    return pages_for(s->len[head] - s->dropped[head]);
}

static const Tensor *get(const Saved *s, TensorSpec spec, char *err) {
    const int *n = spec.size;
    return tensors_get(s->file, err, spec.name, spec.type, spec.n_dims, n[0], n[1], n[2], n[3]);
}

// A list, of the sizes that are known so far. NULL with err.
static const Tensor *get_list(const Saved *s, List list, char *err) {
    const Tensor *t = get(s, list_spec(list, s->sizes), err);
    for (int i = 0; t && i < t->n_dims; i++) {
        if (t->shape[i] <= MAX_PAIRS) continue;
        fail(err, "tensor %s is too long", t->name);
        return NULL;
    }
    return t;
}

// Numbers of the metadata and the ids.
static int read_info(Saved *s, char *err) {
    const TensorFile *f = s->file;
    const Tensor *ids = get_list(s, IDS, err);
    KVInfo *info = &s->info;
    const int most = MAX_PAIRS;
    if (!ids || tensors_meta_int(f, "n_prefix", 0, most, &info->n_prefix, err) != 0 ||
        tensors_meta_int(f, "n_ctx", 0, most, &info->n_ctx, err) != 0 ||
        tensors_meta_int(f, "next_pos", 0, most, &s->next_pos, err) != 0)
        return -1;
    info->ids = ids->data, info->n_ids = (int)ids->shape[0];
    if (info->n_prefix + info->n_ctx != info->n_ids) {
        return fail(err, "%d ids, but a prefix of %d and a context of %d", info->n_ids,
                    info->n_prefix, info->n_ctx);
    }
    return 0;
}

// Whether this is a cache, and of this model (NULL: of any).
static int read_origin(Saved *s, const KVModel *model, char *err) {
    const TensorFile *f = s->file;
    const char *format = tensors_meta(f, "format"), *ratio = tensors_meta(f, "ratio");
    s->info = (KVInfo){.fingerprint = tensors_meta(f, "fingerprint"),
                       .model = tensors_meta(f, "model"),
                       .policy = tensors_meta(f, "policy"),
                       .level = tensors_meta(f, "level"),
                       .profile = tensors_meta(f, "profile"),
                       .set = tensors_meta(f, "set"),
                       .budget = tensors_meta(f, "budget"),
                       .fit = tensors_meta(f, "fit"),
                       .documents = tensors_meta(f, "documents"),
                       .ratio = ratio ? strtod(ratio, NULL) : 0.0};
    int version = 0;
    while (format && version < FORMATS && strcmp(format, formats[version]) != 0) version++;
    if (!format || version == FORMATS)
        return tensors_wrong_format(f, "a saved cache", formats[PLAIN], err);
    if (!s->info.fingerprint || !s->info.model || !s->info.policy)
        return fail(err, "the cache does not name its model");
    if (model && strcmp(model->fingerprint, s->info.fingerprint) != 0) {
        return fail(err, "made with another model: \"%s\", fingerprint %.12s, not %.12s",
                    s->info.model, s->info.fingerprint, model->fingerprint);
    }
    return 0;
}

// The types of the metadata; files of the first version may have none, and their keys say it. And
// the size of the keys.
static int read_keys(Saved *s, char *err) {
    const Tensor *k = tensors_find(s->file, "k");
    const char *name = tensors_meta(s->file, "kv");
    s->types = kvcache_both(k && k->dtype == T_F32 ? KV_F32 : KV_F16);
    if (name && kvcache_types_parse(name, &s->types) != 0)
        return fail(err, "its pages are of unknown type \"%s\"", name);
    for (Length length = FULL; length < LENGTHS; length++) {
        Group exact = {KEYS, class_types(s->types, PAGE_EXACT).k, length, -1};
        TensorSpec spec = page_spec(&exact, DATA, s->head_dim[length]);
        bool wanted = length == FULL || s->head_dim[length] > 0;  // the model has such heads
        if (!wanted && !tensors_find(s->file, spec.name)) continue;
        if (!(k = get(s, spec, err))) return -1;
        if (k->shape[1] > MAX_HEAD_DIM)
            return fail(err, "keys of %zu numbers, more than %d", k->shape[1], MAX_HEAD_DIM);
        s->head_dim[length] = (int)k->shape[1];
    }
    return 0;
}

// How many heads each layer has of its own: as many as the model's layers, where that is known.
static int read_head_counts(Saved *s, const KVModel *model, char *err) {
    int most = s->sizes[N_KV_HEADS];
    if (tensors_find(s->file, list_spec(HEADS, s->sizes).name)) {
        const Tensor *heads = get_list(s, HEADS, err);
        if (!heads) return -1;
        s->heads = heads->data;
    }
    for (int l = 0; l < s->sizes[N_LAYERS]; l++) {
        bool keeps = s->window[l] == NO_PAIRS;
        int n = s->heads ? s->heads[l] : keeps ? 0 : most;
        if (model && keeps != (model->shape.window[l] == NO_PAIRS))
            return fail(err, "layer %d %s a state, unlike the model's", l,
                        keeps ? "keeps" : "does not keep");
        if (keeps && n != 0) return fail(err, "layer %d keeps a state, but has %d heads", l, n);
        if (n < 0 || n > most || (model && n != own_heads(&model->shape, l)))
            return fail(err, "layer %d has %d heads of %d", l, n, most);
    }
    return 0;
}

// Lengths of all heads, and with them the number of pages.
static int read_heads(Saved *s, const KVModel *model, char *err) {
    long n = 0;
    const Tensor *len = get_list(s, LEN, err), *dropped, *window;
    if (!len) return -1;
    s->sizes[N_LAYERS] = (int)len->shape[0], s->sizes[N_KV_HEADS] = (int)len->shape[1];
    if (len->bytes == 0 || len->bytes / sizeof(int32_t) > MAX_PAIRS)
        return fail(err, "%zu layers of %zu heads", len->shape[0], len->shape[1]);
    if (!(dropped = get_list(s, DROPPED, err)) || !(window = get_list(s, WINDOW, err))) return -1;
    s->len = len->data, s->dropped = dropped->data, s->window = window->data;
    if (read_head_counts(s, model, err) != 0) return -1;
    for (int i = 0; i < n_saved_heads(s); i++) {
        int pairs = s->len[i], gone = s->dropped[i];
        if (gone < 0 || gone % PAGE || pairs < gone || pairs > s->next_pos)
            return fail(err, "a head of %d pairs less %d, after %d tokens", pairs, gone,
                        s->next_pos);
        int layer = i / s->sizes[N_KV_HEADS];
        if (pairs > 0 && !has_head(s, i))
            return fail(err, "layer %d %s, but has pairs", layer,
                        s->window[layer] == NO_PAIRS ? "keeps a state" : "lacks a head");
        if (gone > 0 && s->window[layer] == 0)
            return fail(err, "layer %d has no window, but %d of its pairs left one", layer, gone);
        if (model && model->shape.chunks && s->window[layer] > 0 && has_head(s, i) &&
            pairs != s->next_pos)  // chunks go by positions
            return fail(err, "layer %d: %d pairs after %d tokens", layer, pairs, s->next_pos);
        n += head_pages(s, i);
    }
    if (n > MAX_PAIRS) return fail(err, "heads of %ld pages", n);
    s->sizes[N_PAGES] = (int)n;
    return 0;
}

// Positions and classes of all pages.
static int read_pages(Saved *s, char *err) {
    bool classes = tensors_find(s->file, list_spec(CLASSES, s->sizes).name) != NULL;
    const Tensor *pos = get_list(s, POS, err), *class = NULL;
    if (!pos || (classes && !(class = get_list(s, CLASSES, err)))) return -1;
    bool biased = tensors_find(s->file, list_spec(BIAS, s->sizes).name) != NULL;
    const Tensor *bias = biased ? get_list(s, BIAS, err) : NULL;
    if (biased && !bias) return -1;
    s->bias = bias ? bias->data : NULL;
    for (size_t i = 0; bias && i < bias->bytes / sizeof(float); i++)
        if (!isfinite(s->bias[i])) return fail(err, "the bias of a pair is no number");
    s->pos = pos->data, s->class = class ? class->data : NULL;
    for (int i = 0; i < s->sizes[N_PAGES]; i++) {
        if (class_of(s, i) >= PAGE_CLASSES)
            return fail(err, "page %d is of unknown class %d", i, class_of(s, i));
    }
    return 0;
}

// The states of the layers that keep one: as many as there are such layers.
static int read_states(Saved *s, char *err) {
    int n = 0;
    for (int l = 0; l < s->sizes[N_LAYERS]; l++) n += s->window[l] == NO_PAIRS;
    if (n == 0) return 0;
    s->sizes[N_STATES] = n;
    const Tensor *t = get_list(s, STATE, err);
    if (!t) return -1;
    s->state = t->data;
    s->sizes[N_FLOATS] = (int)t->shape[1];
    for (size_t i = 0; i < t->bytes / sizeof(float); i++)
        if (!isfinite(s->state[i])) return fail(err, "a state holds what is no number");
    return 0;
}

// The last page of a head may be part full, and then it is a new one.
static int check_last_pages(const Saved *s, char *err) {
    for (int i = 0, page = 0; i < n_saved_heads(s); i++) {
        page += head_pages(s, i);
        if ((s->len[i] - s->dropped[i]) % PAGE != 0 && class_of(s, page - 1) != PAGE_EXACT)
            return fail(err, "a page that is not full has settled");
    }
    return 0;
}

// Finds the tensors of every group that has pages; they have as many.
static int read_groups(Saved *s, char *err) {
    groups_start(s->groups);
    for (int i = 0, page = 0; i < n_saved_heads(s); i++) {
        Length length = saved_length(s, i);
        for (int end = page + head_pages(s, i); page < end; page++) {
            KVTypes t = class_types(s->types, class_of(s, page));
            s->groups[group_index(t.k, KEYS, length)].n++;
            s->groups[group_index(t.v, VALUES, length)].n++;
        }
    }
    for (int i = 0; i < GROUPS; i++) {
        const Group *g = &s->groups[i];
        for (GroupPart part = DATA; g->n > 0 && part < GROUP_PARTS; part++) {
            if (!has_part(g, part)) continue;
            const Tensor *t = get(s, page_spec(g, part, s->head_dim[g->length]), err);
            if (!t) return -1;
            s->data[i][part] = t->data;
        }
    }
    return 0;
}

// Everything a saved cache says; model NULL: of whatever model. 0, or -1 with err.
static int read_cache(Saved *s, const TensorFile *f, const KVModel *model, char *err) {
    *s = (Saved){.file = f,
                 .sizes = {[N_PAGES] = -1,
                           [N_PAIRS] = PAGE,
                           [N_LAYERS] = model ? model->shape.n_layers : -1,
                           [N_KV_HEADS] = model ? kvshape_most_heads(&model->shape) : -1,
                           [N_IDS] = -1,
                           [N_FLOATS] = model ? model->shape.state : -1},
                 .head_dim = {-1, -1}};
    if (model) {
        int other = kvshape_other_dim(&model->shape);
        s->head_dim[FULL] = model->shape.head_dim;
        if (other != model->shape.head_dim) s->head_dim[SLIDING] = other;
    }
    if (read_origin(s, model, err) != 0 || read_info(s, err) != 0 || read_keys(s, err) != 0)
        return -1;
    if (read_heads(s, model, err) != 0 || read_states(s, err) != 0 || read_pages(s, err) != 0 ||
        read_groups(s, err) != 0)
        return -1;
    return check_last_pages(s, err);
}

// ---- loading ----

// One side of the next page: used counts the pages of each group that were handed out.
static KVPart load_part(const Saved *s, int used[GROUPS], int i) {
    const Group *g = &s->groups[i];
    int d = s->head_dim[g->length];
    uint8_t *at[GROUP_PARTS] = {NULL};
    for (GroupPart part = DATA; part < GROUP_PARTS; part++) {
        size_t offset = (size_t)used[i] * page_part_bytes(g, part, d);
        if (has_part(g, part)) at[part] = (uint8_t *)s->data[i][part] + offset;
    }
    used[i]++;
    return (KVPart){g->type, d, at[DATA], (uint16_t *)at[SCALES], (uint16_t *)at[MINIMA]};
}

// Hands the file's pages out to the heads of sequence 0. The extra reference keeps mapped pages
// from being written.
static int load_pages(KVCache *kv, const Saved *s, char *err) {
    int used[GROUPS] = {0}, page = 0;
    for (int i = 0; i < n_saved_heads(s); i++) {
        int most = s->sizes[N_KV_HEADS], n = head_pages(s, i);
        if (!has_head(s, i)) continue;
        KVHead *h = kvcache_head(kv, 0, i / most, i % most);
        Length length = saved_length(s, i);
        h->len = s->len[i], h->dropped = s->dropped[i];
        if (head_room(h, n, err) != 0 || pages_grow(kv, kv->n_pages + n, err) != 0) return -1;
        for (; h->n_pages < n; page++) {
            PageClass class = class_of(s, page);
            KVTypes t = class_types(s->types, class);
            KVPage *p = &kv->pages[kv->n_pages];
            *p = (KVPage){.pos = (int *)s->pos + (size_t)page * PAGE, .refs = 2, .class = class};
            p->bias = s->bias ? (float *)s->bias + (size_t)page * PAGE : NULL;
            for (int c = 0; p->bias && c < PAGE; c++) p->biased |= p->bias[c] != 0;
            p->k = load_part(s, used, group_index(t.k, KEYS, length));
            p->v = load_part(s, used, group_index(t.v, VALUES, length));
            h->page[h->n_pages++] = kv->n_pages++;
        }
    }
    return 0;
}

int kvfile_load(KVCache *kv, const char *path, const KVModel *model, ThreadPool *pool, KVInfo *info,
                char *err) {
    TensorFile f = {0};
    Saved s;
    *kv = (KVCache){0};
    if (tensors_open(&f, path, err) != 0) return -1;
    if (read_cache(&s, &f, model, err) != 0 ||
        kvcache_open(kv, &model->shape, s.types, pool, err) != 0) {
        tensors_close(&f);
        kvcache_close(kv);
        return -1;
    }
    kv->file = f;
    if (kvcache_new(kv, err) != 0 || load_pages(kv, &s, err) != 0 ||
        (s.state && state_own(kv, &kv->seqs[0], s.state, err) != 0)) {
        kvcache_close(kv);
        return -1;
    }
    kv->seqs[0].next_pos = s.next_pos;
    *info = s.info;
    return 0;
}

// ---- facts ----

bool kvfile_is(const TensorFile *f) {
    const char *format = tensors_meta(f, "format");
    return format && strncmp(format, format_start, sizeof format_start - 1) == 0;
}

// Adds up one head, whose first page is number `page` of the file; returns the page after its last.
static int count_head(CacheFacts *c, const Saved *s, int head, int page) {
    int d = s->head_dim[saved_length(s, head)];
    bool slides = s->window[head / c->n_kv_heads] > 0;  // nothing is evicted there
    int live = s->len[head] - s->dropped[head], demoted = 0, end = page + head_pages(s, head);
    int full = slides ? live : s->info.n_ids;
    size_t pos = PAGE * sizeof(int32_t);
    for (; page < end; page++) {
        PageClass class = class_of(s, page), shown = is_settled(class) ? PAGE_SETTLED : class;
        c->bytes[shown] += (double)(kvcache_page_bytes(d, c->types[class]) + pos);
        if (s->bias) c->bytes[shown] += PAGE * sizeof *s->bias;
        if (class == PAGE_DEMOTED) demoted += PAGE;
    }
    size_t exact_page = kvcache_page_bytes(d, c->types[PAGE_EXACT]) + pos;
    c->pairs += live, c->full_pairs += full;
    c->full_bytes += (double)pages_for(full) * (double)exact_page;
    c->kept_pairs[head] = s->len[head] - demoted - s->info.n_prefix;
    if (!slides)
        c->n_scored += s->info.n_ctx, c->kept += c->kept_pairs[head], c->demoted += demoted;
    return end;
}

int kvfile_facts(CacheFacts *facts, const TensorFile *f, char *err) {
    Saved s;
    *facts = (CacheFacts){0};
    if (read_cache(&s, f, NULL, err) != 0) return -1;
    facts->info = s.info, facts->next_pos = s.next_pos;
    if (s.state) facts->state_bytes = sizeof(float) * (double)s.sizes[N_STATES] * s.sizes[N_FLOATS];
    for (int i = 0; i < PAGE_CLASSES; i++) facts->types[i] = class_types(s.types, (PageClass)i);
    facts->n_layers = s.sizes[N_LAYERS], facts->n_kv_heads = s.sizes[N_KV_HEADS];
    facts->kept_pairs = malloc(((size_t)n_saved_heads(&s) + 1) * sizeof *facts->kept_pairs);
    if (!facts->kept_pairs) return fail(err, "out of memory for %d heads", n_saved_heads(&s));
    for (int i = 0, page = 0; i < n_saved_heads(&s); i++) {
        facts->kept_pairs[i] = 0;
        if (has_head(&s, i)) page = count_head(facts, &s, i, page);
    }
    return 0;
}

void kvfile_facts_free(CacheFacts *facts) {
    free(facts->kept_pairs);
    *facts = (CacheFacts){0};
}
