// begin.h: how a part of a job begins: on a document, on what another part has read, or is reading
// at the moment, or on nothing.
#ifndef BEGIN_H
#define BEGIN_H
#include "serve/engine.h"

// AWAITS: another part is reading ids that this one begins with as well. LATER: there is no memory
// yet, and what waits behind it waits, too. OVER: the job has failed and is gone.
typedef enum { BEGUN, AWAITS, LATER, NEEDS_DOCUMENT, OVER } Beginning;

// Gives p, which has not begun, the free slot.
Beginning begin_part(Engine *e, Part *p, int slot);

size_t cache_bytes(const KVCache *kv);  // that all pages in use take

// Lets go of what only saves time until `tokens` more fit. false: they do not.
bool make_room(Engine *e, int tokens);

// Whether the part judges ids of its prompt (Job.echo) or reads it.
static inline bool part_scores(const Part *p) {
    return p->job->echo && p->n_scored < p->prompt.n - 1;
}
static inline bool part_reads(const Part *p) { return p->reply.n_fed < p->reply.n_prompt; }

// The engine's: the job ends with this error.
void engine_fail(Engine *e, Job *job, int status, const char *message, const char *code);
#endif
