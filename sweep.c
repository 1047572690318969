// sweep.c: the scoring rows raise the scores of the pairs they look at.
//
// While the context is repeated (KVzip, arXiv 2505.23416), a pair's score is the largest attention
// weight it receives. Attention has left the log-sum-exp of each scoring row in kv->lse, so the
// weight of pair t in row i is exp(q_i . k_t - lse_i). Because exp rises, the largest weight needs
// no exp at all: the sweep over the scored pages is a product and a maximum, and scores are
// logarithms. Methods that add weights up take the exp. What must stay true: one unit owns a page's
// scores, and takes its rows in order, so that any number of threads gives the same bits.
#include "attend.h"

#include <math.h>
#include <stdlib.h>

// ---- switching scoring on ----

int kvcache_score_begin(KVCache *kv, KVScoring *s, char *err) {
    free(kv->lse);
    kv->lse = malloc((size_t)s->max_rows * kv->shape.n_heads * sizeof *kv->lse);
    if (!kv->lse) return fail(err, "out of memory for scoring %d rows", s->max_rows);
    kv->scoring = s;
    return 0;
}

void kvcache_score_end(KVCache *kv) { kv->scoring = NULL; }

bool scores_run(const AttendBatch *batch, int seq) {
    const KVCache *kv = batch->kv;
    return kv->scoring && kv->scoring->seq == seq && kv->shape.window[batch->layer] == 0;
}

// ---- the sweep ----

typedef struct {
    const AttendBatch *batch;
    const AttendRun *run;  // whose rows score
} Sweep;

int scoring_held(const AttendBatch *batch, int g) {
    const KVScoring *s = batch->kv->scoring;
    const KVShape *shape = &batch->kv->shape;
    if (!s->held) return 0;
    return s->held[kvcache_scored_index(shape, batch->layer) * shape->n_kv_heads + g];
}

// The scored pairs of a kv head that are there already.
static Range scored_pairs(const AttendBatch *batch, const AttendRun *run, int g) {
    const KVScoring *s = batch->kv->scoring;
    int held = scoring_held(batch, g),
        len = kvcache_head(batch->kv, run->seq, batch->layer, g)->len;
    return (Range){s->t0 + held, min_int(s->t1 + held, len)};
}

// Takes the weights of the tile's rows, whose scores are in t->s, into swept [group][64]: their
// largest logarithm, or their sum. base is the page's first pair, lse that of the tile's first row.
static void sweep_rows(Tile *t, const float *lse, int base, float (*swept)[PAGE]) {
    int n_heads = t->kv->shape.n_heads;
    for (int i = 0; i < t->n; i++) {
        float *row = t->s + i * PAGE, b = lse[(size_t)(i / t->group) * n_heads + i % t->group];
        int after = t->first + i / t->group + 1 - base;  // pairs that the row does not see
        for (int c = max_int(after, 0); c < PAGE; c++) row[c] = -INFINITY;
        if (!t->kv->scoring->sum) {
            kern.max_into(swept[i % t->group], row, -b);
        } else {
            kern.exp64(row, b);
            kern.add(swept[i % t->group], row, PAGE);
        }
    }
}

// Raises the scores of one page's pairs, from pair base on, by swept [group][64].
static void raise_scores(const AttendBatch *batch, int g, Range pairs, int base,
                         float (*swept)[PAGE]) {
    const KVScoring *s = batch->kv->scoring;
    const KVShape *shape = &batch->kv->shape;
    int group = batch->group;
    size_t l = (size_t)kvcache_scored_index(shape, batch->layer),
           reader = (size_t)kvcache_reader_index(shape, batch->layer);
    float *score = s->score + (l * shape->n_kv_heads + g) * s->n_ctx;  // of pair n_prefix on
    int first = s->n_prefix + scoring_held(batch, g);
    for (int t = max_int(base, pairs.lo); t < min_int(base + PAGE, pairs.hi); t++) {
        int at = t - first;
        for (int i = 0; i < group; i++) {
            float v = swept[i][t - base];
            if (s->pair_log)
                v += s->pair_log[(reader * shape->n_heads + g * group + i) * s->n_ctx + at];
            score[at] = s->sum ? score[at] + v : fmaxf(score[at], v);
        }
    }
}

// Units of SWEEP_PAGES pages of one kv head: the rows are loaded once for all of them.
static void sweep_unit(void *ctx, int unit) {
    const Sweep *w = ctx;
    const AttendRun *run = w->run;
    const KVCache *kv = w->batch->kv;
    int group = w->batch->group;
    int g = unit % kv->shape.n_kv_heads;
    Range pairs = scored_pairs(w->batch, run, g);
    int lo = pairs.lo / PAGE + unit / kv->shape.n_kv_heads * SWEEP_PAGES;
    int hi = min_int(lo + SWEEP_PAGES, pages_for(pairs.hi));
    const KVHead *h = kvcache_head(kv, run->seq, w->batch->layer, g);
    Tile t;
    for (int p = 0; p < hi - lo; p++) {
        for (int i = 0; i < group * PAGE; i++)
            t.swept[p][i / PAGE][i % PAGE] = kv->scoring->sum ? 0.0f : -INFINITY;
    }
    for (int i = 0; i < run->n; i += tokens_per_tile(group)) {
        const float *lse = kv->lse + (size_t)(run->row + i) * kv->shape.n_heads + g * group;
        tile_load(&t, w->batch, run, g, i);
        tile_pack(&t);
        int last = t.first + (t.n - 1) / group;
        for (t.page = lo; t.page < hi && t.page * PAGE <= last; t.page++) {
            const KVPage *p = &kv->pages[h->page[t.page]];
            tile_scores(&t, p, p);
            sweep_rows(&t, lse, t.page * PAGE, t.swept[t.page - lo]);
        }
    }
    for (int p = lo; p < hi; p++) raise_scores(w->batch, g, pairs, p * PAGE, t.swept[p - lo]);
}

void sweep(const AttendBatch *batch, const AttendRun *run) {
    const KVCache *kv = batch->kv;
    Sweep w = {batch, run};
    int pages = 0;  // of the head whose scored pairs lie in most
    for (int g = 0; g < kv->shape.n_kv_heads; g++) {
        Range pairs = scored_pairs(batch, run, g);
        if (pairs.lo < pairs.hi) pages = max_int(pages, pages_for(pairs.hi) - pairs.lo / PAGE);
    }
    int n_parts = (pages + SWEEP_PAGES - 1) / SWEEP_PAGES;
    parallel_for(kv->pool, n_parts * kv->shape.n_kv_heads, sweep_unit, &w);
}
