// kvstate.c: states of layers that keep no pairs.
//
// Such a layer has a state of fixed size for each sequence (deltanet.c). All of a sequence's states
// are one block of memory, which forks and marks share until one of them is about to read a token:
// then it takes a copy, so that going back to a mark is exact.
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <string.h>

#include "kvpages.h"

int n_states(const KVShape *shape) {
    int n = 0;
    for (int l = 0; l < shape->n_layers; l++) n += shape->window[l] == NO_PAIRS;
    return n;
}

size_t kvcache_state_bytes(const KVShape *shape) {
    return (size_t)n_states(shape) * (size_t)shape->state * sizeof(float);
}

float *kvcache_state(const KVCache *kv, int seq, int layer) {
    size_t before = 0;
    for (int l = 0; l < layer; l++) before += kv->shape.window[l] == NO_PAIRS;
    return kv->seqs[seq].state->x + before * (size_t)kv->shape.state;
}

void state_unref(KVState *state) {
    if (state && --state->refs == 0) free(state);
}

int state_own(const KVCache *kv, KVSeq *s, const float *from, char *err) {
    size_t bytes = kvcache_state_bytes(&kv->shape);
    void *room;
    if (bytes == 0 || (!from && s->state && s->state->refs == 1)) return 0;
    if (posix_memalign(&room, 64, sizeof(KVState) + bytes) != 0)
        return fail(err, "out of memory: %zu MB for the state of a sequence", bytes >> 20);
    KVState *own = room;
    own->refs = 1;
    if (!from && s->state) from = s->state->x;
    if (from)
        memcpy(own->x, from, bytes);
    else
        memset(own->x, 0, bytes);
    state_unref(s->state);
    s->state = own;
    return 0;
}
