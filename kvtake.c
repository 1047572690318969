// kvtake.c: sequences that come from another cache, and sequences that become shorter.
//
// A server holds many saved contexts in one cache, so that questions about all of them decode as
// one batch; and it forgets the end of a conversation where the next one goes another way. Neither
// computes anything: pages are copied, or let go.
#include <string.h>

#include "kvpages.h"

// ---- taking ----

static void part_copy(const KVPart *to, const KVPart *from, Side side) {
    int d = from->head_dim;
    size_t scales = n_scales(d, from->type, side) * sizeof *from->scale;
    memcpy(to->data, from->data, data_bytes(d, from->type, side));
    if (scales > 0) memcpy(to->scale, from->scale, scales);
    if (from->min) memcpy(to->min, from->min, scales);
}

// Head h of a new sequence becomes a copy of a head of another cache.
static int take_head(KVCache *kv, KVHead *h, const KVCache *from, const KVHead *old, char *err) {
    char theirs[KV_NAME], ours[KV_NAME];
    int n = pages_used(old);
    if (head_room(h, n, err) != 0) return -1;
    for (int i = 0; i < n; i++) {
        const KVPage *page = &from->pages[old->page[i]];
        KVTypes have = {page->k.type, page->v.type}, want = class_types(kv->types, page->class);
        if (have.k != want.k || have.v != want.v)
            return fail(err, "its pairs are %s, this cache's are %s",
                        kvcache_types_name(have, theirs), kvcache_types_name(want, ours));
        int id = page_take(kv, page->k.head_dim, page->class, err);
        if (id < 0) return -1;
        h->page[h->n_pages++] = id;
        KVPage *to = &kv->pages[id];
        part_copy(&to->k, &page->k, KEYS), part_copy(&to->v, &page->v, VALUES);
        page_copy_list(to, page);
    }
    h->len = old->len, h->dropped = old->dropped, h->settled = old->settled;
    return 0;
}

int kvcache_take(KVCache *kv, const KVCache *from, int seq, char *err) {
    int taken = kvcache_new(kv, err);
    if (taken < 0) return -1;
    for (int i = 0; i < kv->n_heads; i++) {
        if (take_head(kv, &kv->seqs[taken].head[i], from, &from->seqs[seq].head[i], err) == 0)
            continue;
        kvcache_drop(kv, taken);
        return -1;
    }
    const KVState *state = from->seqs[seq].state;
    if (state && state_own(kv, &kv->seqs[taken], state->x, err) != 0) {
        kvcache_drop(kv, taken);
        return -1;
    }
    kv->seqs[taken].next_pos = from->seqs[seq].next_pos;
    return taken;
}

// ---- cutting ----

// How many pairs of a head stand before position pos, -1: it cannot be cut there, because a window
// has left pairs behind that are seen again, or pages have settled that would not have yet.
static int pairs_before(const KVCache *kv, const KVHead *h, int layer, int pos) {
    int n = h->len - h->dropped;
    while (n > 0 && kv->pages[h->page[(n - 1) / PAGE]].pos[(n - 1) % PAGE] >= pos) n--;
    if (h->dropped > 0 && h->dropped > kvshape_first(&kv->shape, layer, pos)) return -1;
    if (n % PAGE != 0 && kv->pages[h->page[n / PAGE]].class != PAGE_EXACT) return -1;
    for (int i = max_int(n / PAGE - 1, 0); i < pages_for(n) && n < h->len - h->dropped; i++)
        if (kv->pages[h->page[i]].class == PAGE_SETTLED) return -1;
    return h->dropped + n;
}

bool kvcache_cut(KVCache *kv, int seq, int pos) {
    KVSeq *s = &kv->seqs[seq];
    if (s->state && pos < s->next_pos) return false;
    for (int i = 0; i < kv->n_heads; i++)
        if (pairs_before(kv, &s->head[i], kv->layer[i], pos) < 0) return false;
    for (int i = 0; i < kv->n_heads; i++) {
        KVHead *h = &s->head[i];
        h->len = pairs_before(kv, h, kv->layer[i], pos);
        while (h->n_pages > pages_used(h)) page_unref(kv, h->page[--h->n_pages]);
        h->settled = min_int(h->settled, h->n_pages);
    }
    s->next_pos = pos;
    return true;
}
