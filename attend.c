// attend.c: attention of a batch of runs over the pages of their sequences.
//
// A run is some tokens of one sequence. Its rows are cut into units of work that threads take one
// by one: a tile of tokens of one kv head (tile.c), and for the few tokens of a decode step a range
// of pages as well, because there are too few tokens to go round. What must stay true: cuts follow
// from a sequence alone, never from its company or from the number of threads, so that an answer is
// the same, bit for bit, in any batch and on any machine with the same instruction set.
//
//   long run     tokens ....|....|....      one unit: a block of tokens x one kv head
//   short run    pages  [0 4)[4 8)[8 ..     one unit: all tokens x one kv head x one range;
//                                           partial results (max, sum, out) are merged after
#include "attend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    SPLITS = 32,               // ranges at most
    SPLIT_PAGES = 4,           // pages in a range at least
    PACKED_BESIDE = 32 << 20,  // bytes of packed pages for the other runs of a batch
};

// ---- scratch ----

int attend_open(KVCache *kv, char *err) {
    const KVShape *shape = &kv->shape;
    for (int l = 0; l < shape->n_layers; l++) {
        int heads = kvshape_heads(shape, l);
        if (shape->n_heads % heads == 0 && shape->n_heads / heads <= TILE_ROWS) continue;
        return fail(err,
                    "%d query heads do not share %d kv heads evenly, or more than %d share one",
                    shape->n_heads, heads, TILE_ROWS);
    }
    size_t n_partial = (size_t)SPLIT_ROWS * shape->n_heads * SPLITS;
    kv->partial = malloc(n_partial * (kvshape_most_dim(shape) + 2) * sizeof(float));
    return kv->partial ? 0 : fail(err, "out of memory for attention scratch");
}

void attend_trim(KVCache *kv) {
    memory_unmap(kv->packed, kv->packed_room);
    kv->packed = NULL, kv->packed_room = 0;
}

void attend_close(KVCache *kv) {
    attend_trim(kv);
    free(kv->partial);
    free(kv->lse);
}

// Long runs read their pages packed, one layer's at a time; f32 pages stay as they are.
static bool reads_packed(const KVCache *kv, int n_tokens) {
    return n_tokens >= KV_LONG_RUN && kv->type == KV_F16;
}

// Of all kv heads of a layer, with so many pages each.
static size_t packed_layer_bytes(const KVShape *shape, int layer, int pages) {
    return packed_page_bytes(kvshape_dim(shape, layer)) * (size_t)pages *
           kvshape_heads(shape, layer);
}

// The same of the layer that takes most, of heads with a page.
static size_t most_packed_bytes(const KVShape *shape) {
    size_t most = 0;
    for (int l = 0; l < shape->n_layers; l++) {
        size_t bytes = packed_layer_bytes(shape, l, 1);
        if (bytes > most) most = bytes;
    }
    return most;
}

size_t kvcache_read_bytes(const KVShape *shape) {
    return (most_packed_bytes(shape) + PAGE - 1) / PAGE;
}

int attend_reserve(KVCache *kv, int seq, int n, char *err) {
    int pages = 0;
    size_t run = 0;
    if (!reads_packed(kv, n)) return 0;
    for (int i = 0; i < kv->n_heads; i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        pages = pages_for(h->len - h->dropped + n);
        size_t bytes = packed_layer_bytes(&kv->shape, kv->layer[i], pages);
        if (bytes > run) run = bytes;
    }
    // Beside this run's there is room for those of the others, as long as that costs little.
    size_t most = run + PACKED_BESIDE;
    kv->packed_wanted += run;
    size_t need = kv->packed_wanted < most ? kv->packed_wanted : most;
    if (need <= kv->packed_room) return 0;
    attend_trim(kv);
    kv->packed = memory_map(need + need / 4);
    if (!kv->packed) return fail(err, "out of memory for %zu MB of packed pages", need >> 20);
    kv->packed_room = need + need / 4;
    return 0;
}

// ---- which pairs a run reads ----

// The pairs of a kv head that a run attends over, those of the scoring softmax first: *n_subset
// says how many ranges they are.
static int attend_ranges(const AttendBatch *batch, const AttendRun *run, int g, Range *r,
                         int *n_subset) {
    const KVScoring *s = scores_run(batch, run->seq) ? batch->kv->scoring : NULL;
    const int end = 1 << 30;
    if (!s || !s->subset) {
        r[0] = (Range){0, end};
        return *n_subset = 1;
    }
    int held = scoring_held(batch, g), t0 = s->t0 + held, t1 = s->t1 + held, own = s->own + held;
    r[0] = (Range){0, s->n_prefix}, r[1] = (Range){t0, t1}, r[2] = (Range){own, end};
    *n_subset = 3;
    if (s->local || !batch->query->out) return 3;
    r[3] = (Range){s->n_prefix, t0}, r[4] = (Range){t1, own};
    return 5;
}

// Whether some row of the run sees a pair of the page.
static bool reads_page(const AttendBatch *batch, const AttendRun *run, int g, int page) {
    const KVHead *h = kvcache_head(batch->kv, run->seq, batch->layer, g);
    int lo = h->dropped + page * PAGE, hi = lo + PAGE;
    if (hi <= kvshape_first(&batch->kv->shape, batch->layer, h->len - run->n)) return false;
    Range range[MAX_RANGES];
    int n_subset, n = attend_ranges(batch, run, g, range, &n_subset);
    for (int i = 0; i < n; i++) {
        if (range[i].lo < hi && range[i].hi > lo) return true;
    }
    return false;
}

// Units as attend_unit's: page i / n_kv_heads of kv head i % n_kv_heads.
static void pack_unit(void *ctx, int unit) {
    const AttendBatch *batch = ctx;
    const KVCache *kv = batch->kv;
    const AttendRun *run = &batch->run[unit % batch->n_runs];
    int i = unit / batch->n_runs, g = i % batch->n_kv_heads, page = i / batch->n_kv_heads;
    const KVHead *h = kvcache_head(kv, run->seq, batch->layer, g);
    if (page >= run->pages || page >= pages_used(h) || !reads_page(batch, run, g, page)) return;
    size_t at = packed_page_bytes(batch->head_dim) * ((size_t)g * run->pages + page);
    page_pack(&kv->pages[h->page[page]], run->packed + at);
}

// ---- long runs: blocks of tokens ----

// out [head_dim] of a row's query head.
static float *out_row(const AttendBatch *batch, int row, int h) {
    return batch->query->out + (size_t)row * batch->query->out_stride + h * batch->head_dim;
}

// out = o / sum. The tile's first row is token 0 of the query's rows from `row` on.
static void store_out(const Tile *t, const AttendBatch *batch, int g, int row) {
    int d = t->head_dim;
    for (int i = 0; i < t->n; i++) {
        float *out = out_row(batch, row + i / t->group, g * t->group + i % t->group);
        float r = 1.0f / t->sum[i];
        for (int j = 0; j < d; j++) out[j] = t->o[i * d + j] * r;
    }
}

// kv->lse [rows][n_heads]: log-sum-exp of the rows' scores so far, for the sweep.
static void store_lse(const Tile *t, const AttendBatch *batch, int g, int row) {
    const KVCache *kv = batch->kv;
    for (int i = 0; i < t->n; i++) {
        int token = row + i / t->group, h = g * t->group + i % t->group;
        float *lse = &kv->lse[(size_t)token * kv->shape.n_heads + h];
        *lse = t->max[i] + logf(t->sum[i]);
        if (kv->scoring->pair_log) *lse += logf(batch->query->x_norm[token]);
    }
}

// Blocks of tokens, one tile each.
static int run_blocks(const AttendBatch *batch, const AttendRun *run) {
    int tokens = tokens_per_tile(batch->group);
    return (run->n + tokens - 1) / tokens;
}

// The tokens from `token` on that fit a tile, over all the pairs they see.
static void attend_block(const AttendBatch *batch, const AttendRun *run, int g, int token) {
    Tile t;
    Range ranges[MAX_RANGES];
    int n_subset, n_ranges = attend_ranges(batch, run, g, ranges, &n_subset);
    tile_load(&t, batch, run, g, token);
    tile_start(&t);
    tile_sink(&t, batch, g);
    for (int i = 0; i < n_ranges; i++) {
        tile_attend(&t, ranges[i]);
        if (i == n_subset - 1 && scores_run(batch, run->seq))
            store_lse(&t, batch, g, run->row + token);
    }
    if (batch->query->out) store_out(&t, batch, g, run->row + token);
}

// ---- short runs: page ranges ----

// Where the sequences of a batch are forks that list the same pages in a range, the first one's
// tile takes the rows of all of them, so that those pages are read once.

// Pages in a range: enough for SPLITS of them, doubled rather than fitted, so that forks of nearly
// the same length are cut at the same places.
static int split_pages(const KVHead *h) {
    int pages = SPLIT_PAGES;
    while (pages * SPLITS < pages_used(h)) pages *= 2;
    return pages;
}

// Its pairs; empty beyond the head's last page.
static Range split_range(const KVHead *h, int split) {
    int pages = split_pages(h), lo = h->dropped + split * pages * PAGE;
    return (Range){lo, min_int(lo + pages * PAGE, h->len)};
}

int kvcache_slack(const KVCache *kv, int seq) {
    int slack = SPLIT_TOKENS - 1;
    if (kv->seqs[seq].state) return 0;
    if (is_codes(kv->types.k) || is_codes(kv->types.v))
        slack = min_int(slack, KV_SETTLE_STEP - 1 - kv->seqs[seq].next_pos % KV_SETTLE_STEP);
    for (int i = 0; i < kv->n_heads; i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        int layer = kv->layer[i];
        slack = min_int(slack,
                        tokens_per_tile(kv->shape.n_heads / kvshape_heads(&kv->shape, layer)) - 1);
        int room = split_pages(h) * SPLITS * PAGE - (h->len - h->dropped);  // in these ranges
        slack = min_int(slack, room - 1);
        // No page may be left behind by the last of them, nor before.
        while (slack > 0 &&
               kvshape_first(&kv->shape, layer, h->len + slack + 1) >= h->dropped + PAGE)
            slack--;
    }
    return max_int(slack, 0);
}

// Tokens of a run, also those whose rows were left out.
static int run_tokens(const KVCache *kv, KVRun run) {
    return max_int(run.n, kv->seqs[run.seq].appended);
}

// Ranges of a run: enough for its longest head; 1: it is cut into blocks of tokens instead.
static int count_splits(const AttendBatch *batch, KVRun run) {
    const KVCache *kv = batch->kv;
    int splits = 1;
    if (run_tokens(kv, run) > min_int(SPLIT_TOKENS, tokens_per_tile(batch->group)) ||
        scores_run(batch, run.seq))
        return 1;
    for (int g = 0; g < batch->n_kv_heads; g++) {
        const KVHead *h = kvcache_head(kv, run.seq, batch->layer, g);
        splits = max_int(splits, (pages_used(h) + split_pages(h) - 1) / split_pages(h));
    }
    return splits;
}

// Whether run r reads the same pages as the run before it in this range, before either's own
// tokens.
static bool shares_split(const AttendBatch *batch, int g, int split, int r) {
    const AttendRun *runs = &batch->run[r - 1];
    Range range[2];
    const KVHead *h[2];
    if (batch->kv->shape.window[batch->layer] || runs[0].splits == 1 || runs[1].splits == 1)
        return false;
    if (runs[0].chosen || runs[1].chosen) return false;
    for (int i = 0; i < 2; i++) {
        h[i] = kvcache_head(batch->kv, runs[i].seq, batch->layer, g);
        range[i] = split_range(h[i], split);
        if (range[i].hi > h[i]->len - runs[i].n || range[i].lo >= range[i].hi) return false;
    }
    if (range[0].lo != range[1].lo || range[0].hi != range[1].hi) return false;
    int first = range[0].lo / PAGE, n = pages_for(range[0].hi - range[0].lo);
    return memcmp(h[0]->page + first, h[1]->page + first, (size_t)n * sizeof *h[0]->page) == 0;
}

// Whether run r's rows go into the tile of the run before it in this range.
static bool joins_tile(const AttendBatch *batch, int g, int split, int r) {
    return r < batch->n_runs && r % batch->tile_runs > 0 && shares_split(batch, g, split, r);
}

// max, sum, out [head_dim] of one token's query head over one range.
static float *partial_at(const AttendBatch *batch, int slot, int h, int split) {
    size_t i = ((size_t)slot * batch->kv->shape.n_heads + h) * SPLITS + split;
    return batch->kv->partial + i * (batch->head_dim + 2);
}

// The tile's rows from row `from` on are the run's. Returns the row after them.
static int store_partial(const Tile *t, const AttendBatch *batch, const AttendRun *run, int g,
                         int split, int from) {
    int d = t->head_dim, n = run->n * t->group;
    for (int i = 0; i < n; i++) {
        int h = g * t->group + i % t->group;
        float *p = partial_at(batch, run->slot + i / t->group, h, split);
        p[0] = t->max[from + i], p[1] = t->sum[from + i];
        memcpy(p + 2, t->o + (from + i) * d, (size_t)d * sizeof(float));
    }
    return from + n;
}

// All tokens of run r, and of the runs that join it, over one range of pages.
static void attend_split(const AttendBatch *batch, int r, int g, int split) {
    if (joins_tile(batch, g, split, r)) return;
    const AttendRun *run = batch->run;
    Tile t;
    int end = r + 1;
    tile_load(&t, batch, &run[r], g, 0);
    Range pairs = split_range(t.head, split);
    for (; joins_tile(batch, g, split, end); end++)
        tile_add(&t, batch, &run[end], g, 0, run[end].n);
    if (end > r + 1) t.first = pairs.hi;  // before every row's own pair
    tile_start(&t);
    tile_attend(&t, pairs);
    for (int i = r, from = 0; i < end; i++)
        from = store_partial(&t, batch, &run[i], g, split, from);
}

// out of one (token, query head) from its page ranges, in their order. Units as attend_unit's, and
// a token's heads follow each other.
static void merge_unit(void *ctx, int unit) {
    const AttendBatch *batch = ctx;
    const AttendRun *run = &batch->run[unit % batch->n_runs];
    int d = batch->head_dim, n_heads = batch->kv->shape.n_heads;
    int token = unit / batch->n_runs / n_heads, h = unit / batch->n_runs % n_heads;
    if (run->splits == 1 || token >= run->n) return;
    float sink = kvshape_sink(&batch->kv->shape, batch->layer, h);
    float max = sink, sum = 0.0f, *out = out_row(batch, run->row + token, h);
    const float *partial = partial_at(batch, run->slot + token, h, 0);
    for (int i = 0; i < run->splits; i++) max = fmaxf(max, partial[i * (d + 2)]);
    if (batch->kv->shape.sinks) sum = expf(sink - max);
    memset(out, 0, (size_t)d * sizeof *out);
    for (int i = 0; i < run->splits; i++) {
        const float *p = partial + i * (d + 2);
        if (p[1] == 0.0f) continue;
        float w = expf(p[0] - max);
        sum += w * p[1];
        for (int j = 0; j < d; j++) out[j] += w * p[2 + j];
    }
    kern.scale(out, 1.0f / sum, d);
}

// ---- a batch ----

// Units of work of a run: kv heads times ranges or blocks.
static int run_units(const AttendBatch *batch, const AttendRun *run) {
    int parts = run->splits > 1 ? run->splits : run_blocks(batch, run);
    return batch->n_kv_heads * parts;
}

// Unit i of run r stands at i * n_runs + r: what one tile does for all runs is spread over the
// whole job. The ranges of a head follow each other, so that a thread mostly goes on to the pages
// that the range before had fetched.
static void attend_unit(void *ctx, int unit) {
    const AttendBatch *batch = ctx;
    int r = unit % batch->n_runs, i = unit / batch->n_runs;
    int n_kv_heads = batch->n_kv_heads;
    const AttendRun *run = &batch->run[r];
    if (i >= run_units(batch, run)) return;
    if (run->splits > 1)
        attend_split(batch, r, i / run->splits, i % run->splits);
    else
        attend_block(batch, run, i % n_kv_heads, i / n_kv_heads * tokens_per_tile(batch->group));
}

// Multiplications and additions that a run asks for: q . k and p v of every pair a row sees, and
// q . k of the scoring sweep.
static double run_ops(const AttendBatch *batch, const AttendRun *run) {
    const KVShape *shape = &batch->kv->shape;
    const KVScoring *s = scores_run(batch, run->seq) ? batch->kv->scoring : NULL;
    Range range[MAX_RANGES];
    double pairs = 0.0;
    for (int i = 0; i < run->n * batch->n_kv_heads; i++) {
        int g = i % batch->n_kv_heads, held = s ? scoring_held(batch, g) : 0;
        int n_subset, n_ranges = attend_ranges(batch, run, g, range, &n_subset);
        const KVHead *h = kvcache_head(batch->kv, run->seq, batch->layer, g);
        int end = h->len - run->n + i / batch->n_kv_heads + 1;  // its own pair is the last
        int begin = max_int(h->dropped, kvshape_first(shape, batch->layer, end - 1));
        for (int j = 0; j < n_ranges; j++)
            pairs += max_int(min_int(range[j].hi, end) - max_int(range[j].lo, begin), 0);
        if (s) pairs += 0.5 * max_int(min_int(s->t1 + held, end) - s->t0 - held, 0);
    }
    return 4.0 * batch->head_dim * batch->group * pairs;
}

static void attend_batch(AttendBatch *batch) {
    KVCache *kv = batch->kv;
    int n_runs = batch->n_runs, n_units = 0, n_pages = 0, n_merged = 0;
    for (const AttendRun *run = batch->run; run < batch->run + n_runs; run++) {
        n_units = max_int(n_units, run_units(batch, run));
        if (run->splits > 1) n_merged = max_int(n_merged, run->n);
        n_pages = max_int(n_pages, run->pages);
        if (!run->chosen) kv->ops += run_ops(batch, run);
    }
    parallel_for(kv->pool, n_pages * batch->n_kv_heads * n_runs, pack_unit, batch);
    choose_pages(batch);
    parallel_for(kv->pool, n_units * n_runs, attend_unit, batch);
    ThreadPool *pool = n_runs > 1 ? kv->pool : NULL;  // one run's merge is too little to share
    parallel_for(pool, n_merged * kv->shape.n_heads * n_runs, merge_unit, batch);
    for (const AttendRun *run = batch->run; run < batch->run + n_runs; run++) {
        if (scores_run(batch, run->seq)) sweep(batch, run);
    }
}

// Pages of a run's longest head.
static int run_pages(const AttendBatch *batch, KVRun run) {
    const KVCache *kv = batch->kv;
    int pages = 0;
    for (int g = 0; g < batch->n_kv_heads; g++)
        pages = max_int(pages, pages_used(kvcache_head(kv, run.seq, batch->layer, g)));
    return pages;
}

// Those that it would have packed; 0: it reads pages as they are.
static int count_packed(const AttendBatch *batch, KVRun run) {
    return reads_packed(batch->kv, run_tokens(batch->kv, run)) ? run_pages(batch, run) : 0;
}

// Fills the batch with as many of the runs as there is room for, at least one; their rows begin at
// `row`. Returns the row after them.
static int fill_batch(AttendBatch *batch, const KVRun *runs, int n_runs, int row) {
    const KVCache *kv = batch->kv;
    int n = 0, slots = 0, most = 1;  // slots taken; of one run at most
    size_t packed = 0, chosen = 0;   // bytes taken
    for (; n < min_int(n_runs, SPLIT_ROWS); n++) {
        int splits = count_splits(batch, runs[n]), pages = count_packed(batch, runs[n]);
        int own_slots = splits > 1 ? runs[n].n : 0;
        size_t own_packed = packed_layer_bytes(&kv->shape, batch->layer, pages);
        int longest = run_pages(batch, runs[n]);
        size_t own_chosen = choice_bytes(batch, runs[n], longest);
        if (slots + own_slots > SPLIT_ROWS) break;
        if (n > 0 && chosen + own_chosen > kv->reading.room_bytes) break;
        if (n > 0 && own_chosen > 0 && kv->reading.reader->centred) break;
        if (packed + own_packed > kv->packed_room && n > 0) break;
        if (own_packed > kv->packed_room) pages = 0, own_packed = 0;  // was not reserved
        batch->run[n] = (AttendRun){.seq = runs[n].seq,
                                    .n = runs[n].n,
                                    .row = row,
                                    .splits = splits,
                                    .slot = slots,
                                    .pages = pages,
                                    .packed = pages ? kv->packed + packed : NULL};
        if (own_chosen > 0) choice_place(batch, &batch->run[n], longest, kv->reading.room + chosen);
        slots += own_slots, packed += own_packed, chosen += own_chosen, row += runs[n].n;
        most = max_int(most, own_slots);
    }
    batch->n_runs = n;
    batch->tile_runs = tokens_per_tile(batch->group) / most;
    return row;
}

void kvcache_attend(KVCache *kv, int layer, const KVRun *runs, int n_runs, const KVQuery *query) {
    int n_kv_heads = kvshape_heads(&kv->shape, layer);
    AttendBatch batch = {.kv = kv,
                         .layer = layer,
                         .n_kv_heads = n_kv_heads,
                         .head_dim = kvshape_dim(&kv->shape, layer),
                         .group = kv->shape.n_heads / n_kv_heads,
                         .query = query};
    for (int done = 0, row = 0; done < n_runs; done += batch.n_runs) {
        row = fill_batch(&batch, runs + done, n_runs - done, row);
        attend_batch(&batch);
    }
}
