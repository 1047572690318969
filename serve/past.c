// past.c: sequences that were read, kept for requests that begin alike.
#include "serve/past.h"

#include "util.h"

int ids_common(const Ids *a, const Ids *b, int most) {
    int n = 0;
    while (n < most && n < a->n && n < b->n && a->id[n] == b->id[n]) n++;
    return n;
}

bool past_is_stiff(const KVCache *kv) {
    bool slides = kvcache_scored_layers(&kv->shape, NULL) < kv->shape.n_layers;
    return slides || kv->types.k >= KV_Q8 || kv->types.v >= KV_Q8;
}

static void forget(Past *p, int i) {
    kvcache_drop(p->kv, p->one[i].seq);
    ids_free(&p->one[i].ids);
    p->one[i] = p->one[--p->n];
}

int past_fork(Past *p, unsigned long base, const Ids *ids, int most, int *length) {
    char err[ERR_LEN];
    bool tried[PAST_MOST] = {false};
    for (;;) {
        PastOne *best = NULL;
        *length = 0;
        for (int i = 0; i < p->n; i++) {
            int n = p->one[i].base == base && !tried[i] ? ids_common(&p->one[i].ids, ids, most) : 0;
            if (n > *length) best = &p->one[i], *length = n;
        }
        if (!best) return -1;
        int seq = kvcache_fork(p->kv, best->seq, err);
        int behind = best->ids.n - *length;
        if (seq >= 0 &&
            (behind == 0 || kvcache_cut(p->kv, seq, p->kv->seqs[seq].next_pos - behind))) {
            best->used = now();
            return seq;
        }
        if (seq >= 0) kvcache_drop(p->kv, seq);
        tried[best - p->one] = true;  // its end cannot be forgotten
    }
}

int past_common(const Past *p, unsigned long base, const Ids *ids, int most) {
    int best = 0;
    for (int i = 0; i < p->n; i++)
        if (p->one[i].base == base) best = max_int(best, ids_common(&p->one[i].ids, ids, most));
    return best;
}

bool past_forget(Past *p) {
    int old = 0;
    for (int i = 1; i < p->n; i++)
        if (p->one[i].used < p->one[old].used) old = i;
    if (p->n == 0) return false;
    forget(p, old);
    return true;
}

void past_keep(Past *p, int seq, unsigned long base, Ids *ids) {
    for (int i = 0; i < p->n; i++) {  // one with the same ids is of no more use
        const PastOne *one = &p->one[i];
        if (one->base != base || one->ids.n != ids->n ||
            ids_common(&one->ids, ids, ids->n) < ids->n)
            continue;
        forget(p, i);
        break;
    }
    while (p->n >= p->most && past_forget(p)) continue;
    p->one[p->n++] = (PastOne){seq, base, *ids, now()};
    *ids = (Ids){0};
}

void past_forget_base(Past *p, unsigned long base) {
    for (int i = p->n - 1; i >= 0; i--)
        if (p->one[i].base == base) forget(p, i);
}

void past_close(Past *p) {
    while (past_forget(p)) continue;
}
