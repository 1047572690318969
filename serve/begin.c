// begin.c: how a part of a job begins: what of its ids is there already, and whether there is
// memory for the rest.
#include "serve/begin.h"

#include <stdio.h>
#include <string.h>

enum { WORTHWHILE = 16 };  // ids more that are worth waiting for

// ---- memory ----

size_t cache_bytes(const KVCache *kv) {
    size_t n = kv->packed_room;
    for (int i = 0; i < 2 * PAGE_CLASSES; i++)
        n += ((size_t)kv->store[i].n_slabs * 64 - (size_t)kv->store[i].n_free) *
             kv->store[i].page_bytes;
    return n;
}

static size_t bytes_of(const Engine *e, int tokens) {
    KVTypes exact = kvcache_both(e->kv->type);
    return (size_t)tokens * kvcache_token_bytes(&e->kv->shape, exact) +
           kvcache_window_bytes(&e->kv->shape, exact);
}

// What parts at work may still add.
static size_t promised(const Engine *e) {
    size_t n = 0;
    for (int i = 0; i < e->n_slots; i++) {
        const Part *p = e->at_work[i];
        if (p) n += bytes_of(e, p->reply.n_prompt + p->reply.limit - p->reply.n_fed);
    }
    return n;
}

bool make_room(Engine *e, int tokens) {
    size_t need = bytes_of(e, tokens) + promised(e);
    while (e->most_bytes > 0 && cache_bytes(e->kv) + need > e->most_bytes) {
        Document *old = NULL;
        if (past_forget(&e->past)) continue;
        for (int i = 0; i < e->docs.n; i++) {
            Document *d = e->docs.doc[i];
            if (d->seq >= 0 && d->path && (!old || d->used < old->used)) old = d;
        }
        if (!old) return false;
        documents_unload(&e->docs, old);
    }
    return true;
}

// ---- beginning ----

// The document that the part stands on: *doc NULL where there is none.
static Beginning find_base(Engine *e, Part *p, Document **doc) {
    char name[DOC_NAME + 1], message[ERR_LEN], err[ERR_LEN];
    const char *wanted = p->job->document;
    *doc = NULL;
    if (!wanted) {
        if (e->compress_prompts == 0 || p->n_head < e->compress_prompts || p->job->echo)
            return BEGUN;
        documents_hash(p->prompt.id, p->n_head, name);
        wanted = name;
    }
    *doc = documents_find(&e->docs, wanted);
    if (!*doc && !p->job->document) return NEEDS_DOCUMENT;
    if (!*doc) {
        snprintf(message, sizeof message, "there is no document %.80s", wanted);
        engine_fail(e, p->job, 404, message, "document_not_found");
        return OVER;
    }
    if (!p->job->document &&
        ((*doc)->ids.n != p->n_head ||
         memcmp((*doc)->ids.id, p->prompt.id, (size_t)p->n_head * sizeof(int)) != 0)) {
        *doc = NULL;  // another prompt with this hash
        return BEGUN;
    }
    if (documents_load(&e->docs, *doc, err) == 0) return BEGUN;
    snprintf(message, sizeof message, "document %.80s: %.300s", wanted, err);
    engine_fail(e, p->job, 500, message, "document_unreadable");
    return OVER;
}

// Ids of p's prompt that are not its document's.
static Ids behind_document(const Part *p) {
    return (Ids){p->prompt.id + p->n_head_skipped, p->prompt.n - p->n_head_skipped, 0};
}

// Of the parts at work the one that has most of p's ids, *length of them; NULL: none has more than
// `least`.
static const Part *find_twin(const Engine *e, const Part *p, const Ids *rest, int least,
                             int *length) {
    const Part *best = NULL;
    *length = least;
    for (int i = 0; i < e->n_slots; i++) {
        const Part *q = e->at_work[i];
        if (!q || q->base != p->base || q->job->echo) continue;
        Ids theirs = behind_document(q);
        int n = ids_common(rest, &theirs, rest->n - 1);
        if (n > *length) best = q, *length = n;
    }
    return best;
}

// A fork of q's sequence with the first n ids of its prompt, or -1: it does not go back there.
static int fork_twin(Engine *e, const Part *q, int n) {
    char err[ERR_LEN];
    int seq = kvcache_fork(e->kv, q->reply.seq, err);
    int held = q->n_skipped - q->n_head_skipped + q->reply.n_fed;
    if (seq < 0 || held == n) return seq;
    if (kvcache_cut(e->kv, seq, e->kv->seqs[seq].next_pos - (held - n))) return seq;
    kvcache_drop(e->kv, seq);
    return -1;
}

// The part at work that is best to begin from, *length of whose ids p begins with; NULL: past
// sequences have as many, or it does not go back so far.
static const Part *find_source(const Engine *e, const Part *p, const Ids *rest, int *length) {
    int least = past_common(&e->past, p->base, rest, rest->n - 1) + WORTHWHILE;
    const Part *twin = p->job->echo ? NULL : find_twin(e, p, rest, least, length);
    // Where sequences go back only a little, prompts must be the same.
    if (twin && past_is_stiff(e->kv) && *length + 1 < behind_document(twin).n) return NULL;
    return twin;
}

static bool awaits(const Engine *e, const Part *p) {
    int length;
    Ids rest = behind_document(p);
    const Part *source = find_source(e, p, &rest, &length);
    return source && part_reads(source);
}

// The part's sequence, with as much of its ids as is there already. -1 with err.
static int find_sequence(Engine *e, Part *p, const Document *doc, char *err) {
    Ids rest = behind_document(p);
    int length, seq = -1;
    const Part *source = find_source(e, p, &rest, &length);
    if (source) seq = fork_twin(e, source, length);
    if (seq < 0) length = 0;
    if (seq < 0 && !p->job->echo) seq = past_fork(&e->past, p->base, &rest, rest.n - 1, &length);
    if (seq < 0 && doc) seq = kvcache_fork(e->kv, doc->seq, err);
    if (seq < 0 && !doc) seq = kvcache_new(e->kv, err);
    p->n_skipped = p->n_head_skipped + length;
    p->n_cached = p->n_base + length;
    return seq;
}

Beginning begin_part(Engine *e, Part *p, int slot) {
    char err[ERR_LEN];
    Document *doc;
    Job *job = p->job;
    Beginning found = find_base(e, p, &doc);
    if (found != BEGUN) return found;
    p->n_base = doc ? doc->ids.n : 0;
    p->base = doc ? doc->serial : 0;
    p->n_head_skipped = doc && !job->document ? doc->ids.n : 0;
    int n = p->n_base + p->prompt.n - p->n_head_skipped, room = e->most_positions - n;
    if (room < (job->limit > 0)) {
        char message[160];
        snprintf(message, sizeof message, "%d tokens are more than the %d that this model takes%s",
                 n, e->most_positions, job->limit > 0 ? ", with one for the answer" : "");
        engine_fail(e, job, 400, message, "context_length_exceeded");
        return OVER;
    }
    if (awaits(e, p)) return AWAITS;
    if (!make_room(e, n - p->n_base + min_int(job->limit, room))) {
        if (promised(e) > 0) return LATER;
        engine_fail(e, job, 503, "the cache has no room for this many tokens: --mem",
                    "out_of_memory");
        return OVER;
    }
    if (doc && documents_load(&e->docs, doc, err) != 0) doc = NULL;  // it made room for itself
    int seq = p->base && !doc ? -1 : find_sequence(e, p, doc, err);
    if (seq >= 0 && doc && e->draft > 0 && sampling_is_plain(&p->sampling))
        for (int i = 0; i < doc->ids.n; i++)
            if (ids_push(&p->source, doc->ids.id[i]) != 0) break;  // drafts have less to go by
    if (seq >= 0) {
        int from = job->echo ? p->prompt.n - 1 : p->n_skipped;
        p->reply = (Reply){.seq = seq,
                           .prompt = p->prompt.id + from,
                           .n_prompt = p->prompt.n - from,
                           .limit = min_int(job->limit, room),
                           .stop = (const char *const *)job->stop,
                           .ignore_stop = job->ignore_eos,
                           .sampling = &p->sampling,
                           .source = p->source.id,
                           .n_source = p->source.n,
                           .draft = e->draft,
                           .schema = job->schema};
        p->begun = true;
        p->began = now();
    }
    if (seq < 0 || reply_begin(&p->reply, "", err) != 0) {
        engine_fail(e, job, 500, err, NULL);
        return OVER;
    }
    e->at_work[slot] = p;
    job->n_begun++;
    return BEGUN;
}
