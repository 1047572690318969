// reading.h: reading less: for each token and kv head a reader chooses the pages that attention
// reads. Nothing is deleted: the next token chooses anew.
//
// A reader is a function that marks pages, beside the filter that sliding windows are. It may also
// choose pairs within them, by numbers that are added to their scores, -inf for those left out.
// What it knows of a page without reading it is the page's digest, made when a token first looks
// past the page and again once its keys have changed, so that appending, evicting, demoting,
// forking, rewinding and loading need not know of readers. The methods are in readers.c, the work
// around them in reading.c. What must stay true: a choice depends on the token's query and on the
// pairs before it alone, never on the tokens that come after it or beside it (except in runs of
// READER_PROMPT tokens and more, which readers that watch choose for as a whole), so that an answer
// is the same, bit for bit, in any batch, with drafts, and for any number of threads.
#ifndef READING_H
#define READING_H
#include "kvcache.h"

enum {
    READER_PROMPT = 256,  // tokens of a run at least that readers which watch choose for
    READER_WATCHED = 64,  // last ones of such a run, whose attention is watched
    READER_GROUP = 64,    // query heads of a kv head at most, as attend_open has it
};

// Runs that a reader chooses for. STEPS are runs of fewer than KV_LONG_RUN tokens: longer ones,
// what is read and not written, see all.
typedef enum { READS_STEPS, READS_PROMPTS, READS_ALL } ReaderRuns;

// One choice: the pages that a token reads of one kv head.
typedef struct {
    const KVCache *kv;
    const KVHead *head;
    int layer, g, group;  // group: query heads of the kv head
    int own;              // the token's own pair, the last one that it sees
    int page;             // its page: the token sees [0, page], those before it are full
    const float *q;       // [group][head_dim], not yet times the attention scale
    // Of readers that watch [page + 1]: the attention that the last tokens of the run pay to a
    // page, and to the page so many before their own; added up over them.
    const float *column, *diagonal;
    float *scratch;  // [page + 1]
    // Out: the pages that are read; zeros before. The token's own is read whatever stands there.
    uint8_t *read;  // [page + 1]
    // Out, of readers of pairs, else NULL: what is added to the scores of the pairs [64 (page + 1)]
    // of query head h, at h * pair_step; in pages that are read alone. Before, with `scores`, the
    // scores themselves, scaled and capped, -inf behind the token's own.
    float *pair;
    size_t pair_step;
} KVChoice;

// A full page whose digest is to be made.
typedef struct {
    const KVCache *kv;
    const KVPage *page, *first;  // first: of the same head
    uint8_t *to;                 // digest_bytes of it, behind a number
} KVDigest;

struct KVReader {
    ReaderRuns runs;
    bool by_page;  // tokens of the same page choose alike
    bool watches;  // the attention of the last tokens of a run; by_page as well
    bool pairs;    // chooses pairs, too; reads STEPS
    bool scores;   // pair begins as the scores of all pairs
    bool centred;  // digests depend on the head's first page as well
    // Layers that are read in full; NULL: none.
    bool (*skips)(const double *param, int layer);
    // Numbers that are drawn once: how many, and they; NULL: none.
    size_t (*n_fixed)(const KVShape *shape, const double *param);
    void (*draw)(const KVShape *shape, const double *param, float *fixed);
    // Bytes of a digest, and making it; NULL: none.
    size_t (*digest_bytes)(const KVShape *shape, const double *param);
    void (*digest)(const KVDigest *d);
    void (*choose)(const KVChoice *c);
};

// Bytes that digests take for each pair of a head.
double reader_pair_bytes(const KVReader *reader, const KVShape *shape, const double *param);

// ---- for readers ----

// The digest of page p of the choice's head, p < c->page.
const void *choice_digest(const KVChoice *c, int p);
// What a product q . k of page p scores at most, its largest bias being `bias`.
float choice_score(const KVChoice *c, float product, float bias);
#endif
