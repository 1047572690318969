// reading.c: what happens around a reader's choice.
//
//   reserve   memory for choices and digests, before the forward call
//   attend    digests  of full pages that have none, or whose keys have changed since
//             mass     that the last rows of a prompt give to pages, for readers that watch
//             choices  one unit for each token and kv head, or for the tokens of a page together
//             count    pages seen and read
//
// Then tile.c passes over the pages that some row of a tile reads, and hides them from the others.
#include "reading.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attend.h"

enum {
    SLAB_DIGESTS = 1024,      // pages of a slab of digests; what is not written takes no memory
    DIGEST_HEAD = 16,         // bytes in front of each: the number of the first page's digest
    DIGEST_JOBS = 256,        // that are made together
    CHOSEN_BESIDE = 8 << 20,  // bytes of choices for the other runs of a batch
};

// ---- memory ----

// Choices of n tokens that share one.
static int choice_units(const KVReader *reader, int n) {
    return reader->by_page ? n / PAGE + 2 : n;
}

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes of the parts of a run's choices, as choice_place lays them out.
typedef struct {
    size_t chosen, pairs, mass, scratch;
} ChoiceParts;

static ChoiceParts choice_parts(const KVCache *kv, int n, int pages) {
    const KVReader *reader = kv->reading.reader;
    size_t heads = (size_t)kv->shape.n_kv_heads, all = (size_t)kv->shape.n_heads, p = (size_t)pages;
    size_t units = (size_t)choice_units(reader, n);
    if (reader->watches && units < TILE_ROWS) units = TILE_ROWS;
    return (ChoiceParts){
        .chosen = aligned(heads * (size_t)n * p),
        .pairs = reader->pairs ? aligned((size_t)n * all * p * PAGE * sizeof(float)) : 0,
        .mass = reader->watches ? aligned(heads * 2 * p * sizeof(float)) : 0,
        .scratch = aligned(heads * units * p * sizeof(float))};
}

static size_t parts_bytes(ChoiceParts p) { return p.chosen + p.pairs + p.mass + p.scratch; }

// Whether the reader has a choice in runs of n tokens.
static bool chooses(const KVReader *reader, int n) {
    if (!reader || (reader->watches && n < READER_PROMPT)) return false;
    return reader->runs == READS_ALL || (reader->runs == READS_STEPS) == (n < KV_LONG_RUN);
}

size_t choice_bytes(const AttendBatch *batch, KVRun run, int pages) {
    const KVCache *kv = batch->kv;
    const KVReading *r = &kv->reading;
    if (!chooses(r->reader, run.n) || kv->shape.window[batch->layer] != 0) return 0;
    if (scores_run(batch, run.seq)) return 0;
    return parts_bytes(choice_parts(kv, run.n, pages));
}

void choice_place(const AttendBatch *batch, AttendRun *run, int pages, uint8_t *room) {
    const KVCache *kv = batch->kv;
    const KVReader *reader = kv->reading.reader;
    ChoiceParts p = choice_parts(kv, run->n, pages);
    run->choice_pages = pages;
    run->chosen = room;
    run->pairs = reader->pairs ? (float *)(room + p.chosen) : NULL;
    run->mass = reader->watches ? (float *)(room + p.chosen + p.pairs) : NULL;
    run->scratch = (float *)(room + p.chosen + p.pairs + p.mass);
    if (!reader->skips || !reader->skips(kv->reading.param, batch->layer)) return;
    // A layer that is read in full is counted, but has no choice.
    memset(run->chosen, 1, p.chosen);
    run->full = true;
}

static int reserve_digests(KVCache *kv, char *err) {
    KVReading *r = &kv->reading;
    int need = (kv->n_pages + SLAB_DIGESTS - 1) / SLAB_DIGESTS;
    if (r->digest_bytes == 0 || need <= r->n_slabs) return 0;
    uint8_t **slabs = realloc(r->digest, (size_t)need * sizeof *slabs);
    if (!slabs) return fail(err, "out of memory for digests of %d pages", kv->n_pages);
    r->digest = slabs;
    while (r->n_slabs < need) {
        uint8_t *slab = memory_map(SLAB_DIGESTS * r->digest_bytes);
        if (!slab) return fail(err, "out of memory for digests of %d pages", kv->n_pages);
        r->digest[r->n_slabs++] = slab;
    }
    return 0;
}

int reading_reserve(KVCache *kv, int seq, int n, char *err) {
    KVReading *r = &kv->reading;
    int pages = 0;
    if (!chooses(r->reader, n)) return 0;
    if (reserve_digests(kv, err) != 0) return -1;
    for (int i = 0; i < kv->n_heads; i++) {
        const KVHead *h = &kv->seqs[seq].head[i];
        pages = max_int(pages, pages_for(h->len - h->dropped + n));
    }
    size_t run = parts_bytes(choice_parts(kv, n, pages)), most = run + CHOSEN_BESIDE;
    r->wanted += run;
    size_t need = r->wanted < most ? r->wanted : most;
    if (need <= r->room_bytes) return 0;
    memory_unmap(r->room, r->room_bytes);
    r->room_bytes = 0;
    r->room = memory_map(need + need / 4);
    if (!r->room) return fail(err, "out of memory for the choice among %d pages", pages);
    r->room_bytes = need + need / 4;
    return 0;
}

void reading_close(KVCache *kv) {
    KVReading *r = &kv->reading;
    for (int i = 0; i < r->n_slabs; i++) memory_unmap(r->digest[i], SLAB_DIGESTS * r->digest_bytes);
    memory_unmap(r->room, r->room_bytes);
    free(r->digest);
    free(r->fixed);
    *r = (KVReading){0};
}

int kvcache_read_by(KVCache *kv, const KVReader *reader, const double *param, char *err) {
    KVReading *r = &kv->reading;
    reading_close(kv);
    for (int i = 0; i < kv->n_pages; i++) kv->pages[i].digest = 0;
    if (!reader) return 0;
    if (reader->n_fixed) {
        size_t n = reader->n_fixed(&kv->shape, param);
        r->fixed = malloc(n * sizeof *r->fixed);
        if (!r->fixed) return fail(err, "out of memory for %zu numbers of a reader", n);
        reader->draw(&kv->shape, param, r->fixed);
    }
    if (reader->digest_bytes)
        r->digest_bytes = aligned(DIGEST_HEAD + reader->digest_bytes(&kv->shape, param));
    memcpy(r->param, param, sizeof r->param);
    r->reader = reader;
    return 0;
}

double kvcache_read_share(const KVCache *kv) {
    return kv->reading.seen > 0 ? kv->reading.read / kv->reading.seen : 1;
}

double reader_pair_bytes(const KVReader *reader, const KVShape *shape, const double *param) {
    if (!reader->digest_bytes) return 0;
    return (double)aligned(DIGEST_HEAD + reader->digest_bytes(shape, param)) / PAGE;
}

// ---- digests ----

static uint8_t *digest_at(const KVCache *kv, int id) {
    const KVReading *r = &kv->reading;
    return r->digest[id / SLAB_DIGESTS] + (size_t)(id % SLAB_DIGESTS) * r->digest_bytes;
}

const void *choice_digest(const KVChoice *c, int p) {
    return digest_at(c->kv, c->head->page[p]) + DIGEST_HEAD;
}

float choice_score(const KVChoice *c, float product, float bias) {
    float cap = c->kv->shape.softcap, s = c->kv->shape.scale * product;
    return (cap > 0.0f ? cap * tanhf(s / cap) : s) + bias;
}

typedef struct {
    KVDigest job[DIGEST_JOBS];
    int n;
} DigestJobs;

static void digest_unit(void *ctx, int unit) {
    const KVDigest *d = &((const DigestJobs *)ctx)->job[unit];
    d->kv->reading.reader->digest(d);
}

static void make_digests(const KVCache *kv, DigestJobs *jobs) {
    parallel_for(kv->pool, jobs->n, digest_unit, jobs);
    jobs->n = 0;
}

// Lists the pages of a head, of [0, end), whose digests are missing or of other keys.
static void list_digests(KVCache *kv, const KVHead *h, int end, DigestJobs *jobs) {
    KVReading *r = &kv->reading;
    KVPage *first = &kv->pages[h->page[0]];
    for (int i = 0; i < end; i++) {
        KVPage *p = &kv->pages[h->page[i]];
        uint8_t *at = digest_at(kv, h->page[i]);
        uint64_t of = i > 0 && r->reader->centred ? first->digest : 0;
        if (p->digest != 0 && memcmp(at, &of, sizeof of) == 0) continue;
        if (jobs->n == DIGEST_JOBS) make_digests(kv, jobs);
        p->digest = ++r->n_digests;
        memcpy(at, &of, sizeof of);
        jobs->job[jobs->n++] = (KVDigest){kv, p, first, at + DIGEST_HEAD};
    }
}

static void digest_batch(const AttendBatch *batch) {
    KVCache *kv = batch->kv;
    DigestJobs jobs = {.n = 0};
    for (const AttendRun *run = batch->run; run < batch->run + batch->n_runs; run++) {
        for (int g = 0; run->chosen && !run->full && g < kv->shape.n_kv_heads; g++) {
            const KVHead *h = kvcache_head(kv, run->seq, batch->layer, g);
            list_digests(kv, h, (h->len - 1) / PAGE, &jobs);
        }
    }
    make_digests(kv, &jobs);
}

// ---- mass ----

// mass [rows of the tile][pages]: log of the sum of exp(s) over the pairs of a page that a row
// sees.
static void tile_mass(Tile *t, float *mass, int pages) {
    int last = t->first + t->n / t->group - 1;
    for (int page = 0; page <= last / PAGE; page++) {
        const KVPage *p = &t->kv->pages[t->head->page[page]];
        float max[TILE_ROWS];
        t->page = page;
        tile_scores(t, p, p);
        for (int i = 0; i < t->n; i++)
            for (int c = max_int(t->first + i / t->group + 1 - page * PAGE, 0); c < PAGE; c++)
                t->s[i * PAGE + c] = -INFINITY;
        kern.max_rows(max, t->s, t->n);
        for (int i = 0; i < t->n; i++) {
            float sum = kern.exp64(t->s + i * PAGE, softmax_shift(max[i]));
            mass[(size_t)i * pages + page] = sum > 0 ? max[i] + logf(sum) : -INFINITY;
        }
    }
}

// Adds a row's attention to columns and diagonals, given its logs of sums and its head's sink.
static void add_mass(const float *log_sum, int own_page, float sink, float *column,
                     float *diagonal) {
    float max = sink, sum = 0;
    for (int p = 0; p <= own_page; p++) max = fmaxf(max, log_sum[p]);
    if (sink > -INFINITY) sum = expf(sink - max);
    for (int p = 0; p <= own_page; p++) sum += expf(log_sum[p] - max);
    for (int p = 0; p <= own_page; p++) {
        float w = expf(log_sum[p] - max) / sum;
        column[p] += w, diagonal[own_page - p] += w;
    }
}

// Units: run i % n_runs, kv head i / n_runs.
static void mass_unit(void *ctx, int unit) {
    const AttendBatch *batch = ctx;
    const AttendRun *run = &batch->run[unit % batch->n_runs];
    int g = unit / batch->n_runs, pages = run->choice_pages;
    if (!run->chosen || run->full) return;
    float *column = run->mass + (size_t)g * 2 * pages, *diagonal = column + pages;
    float *log_sum = run->scratch + (size_t)g * TILE_ROWS * pages;
    Tile t;
    memset(column, 0, 2 * (size_t)pages * sizeof *column);
    for (int i = max_int(run->n - READER_WATCHED, 0); i < run->n;
         i += tokens_per_tile(batch->group)) {
        tile_load(&t, batch, run, g, i);
        tile_pack(&t);
        tile_mass(&t, log_sum, pages);
        for (int j = 0; j < t.n; j++) {
            float sink = kvshape_sink(&batch->kv->shape, batch->layer, g * t.group + j % t.group);
            add_mass(log_sum + (size_t)j * pages, (t.first + j / t.group) / PAGE, sink, column,
                     diagonal);
        }
    }
}

// ---- choices ----

// The tokens [first, first + n) of a run that unit u chooses for; n 0: none.
typedef struct {
    int first, n;
} Tokens;

static Tokens unit_tokens(const AttendBatch *batch, const AttendRun *run, int g, int u) {
    const KVReader *reader = batch->kv->reading.reader;
    if (!reader->by_page) return (Tokens){u, u < run->n};
    int own = kvcache_head(batch->kv, run->seq, batch->layer, g)->len - run->n;  // of token 0
    int first = max_int((own / PAGE + u) * PAGE - own, 0);
    int end = min_int((own / PAGE + u + 1) * PAGE - own, run->n);
    return (Tokens){first, max_int(end - first, 0)};
}

// Scores of all pairs that the token sees, for a reader that begins with them.
static void fill_scores(const AttendBatch *batch, const AttendRun *run, int token, KVChoice *c) {
    Tile t;
    tile_load(&t, batch, run, c->g, token);
    t.n = t.group;
    tile_pack(&t);
    for (t.page = 0; t.page <= c->page; t.page++) {
        const KVPage *p = &t.kv->pages[t.head->page[t.page]];
        tile_scores(&t, p, p);
        for (int h = 0; h < c->group; h++)
            memcpy(c->pair + h * c->pair_step + t.page * PAGE, t.s + h * PAGE, PAGE * sizeof *t.s);
    }
    for (int h = 0; h < c->group; h++)
        for (int i = c->own + 1; i < (c->page + 1) * PAGE; i++)
            c->pair[h * c->pair_step + i] = -INFINITY;
}

// Units: run i % n_runs; of it unit i / n_runs / n_kv_heads of kv head i / n_runs % n_kv_heads.
static void choose_unit(void *ctx, int unit) {
    const AttendBatch *batch = ctx;
    const KVCache *kv = batch->kv;
    const KVShape *shape = &kv->shape;
    const KVReader *reader = kv->reading.reader;
    const AttendRun *run = &batch->run[unit % batch->n_runs];
    int i = unit / batch->n_runs, g = i % shape->n_kv_heads, u = i / shape->n_kv_heads;
    if (!run->chosen || run->full || u >= choice_units(reader, run->n)) return;
    Tokens tokens = unit_tokens(batch, run, g, u);
    if (tokens.n == 0) return;
    const KVHead *h = kvcache_head(kv, run->seq, batch->layer, g);
    size_t pages = (size_t)run->choice_pages, group = (size_t)(shape->n_heads / shape->n_kv_heads);
    size_t head = (size_t)(run->row + tokens.first) * shape->n_heads + g * group;
    KVChoice c = {.kv = kv,
                  .head = h,
                  .layer = batch->layer,
                  .g = g,
                  .group = (int)group,
                  .own = h->len - run->n + tokens.first,
                  .q = batch->query->q + head * shape->head_dim,
                  .scratch = run->scratch + ((size_t)u * shape->n_kv_heads + g) * pages,
                  .read = run->chosen + ((size_t)g * run->n + tokens.first) * pages,
                  .pair_step = pages * PAGE};
    c.page = c.own / PAGE;
    if (run->mass) c.column = run->mass + g * 2 * pages, c.diagonal = c.column + pages;
    if (run->pairs)
        c.pair = run->pairs + ((size_t)tokens.first * shape->n_heads + g * group) * c.pair_step;
    memset(c.read, 0, pages);
    if (reader->scores) fill_scores(batch, run, tokens.first, &c);
    reader->choose(&c);
    c.read[c.page] = 1;
    for (int j = 1; j < tokens.n; j++) memcpy(c.read + j * pages, c.read, pages);
}

// ---- counting ----

// Pages that the tokens of a unit saw and read, and what they asked for: q . k and p v.
static void count_unit(AttendBatch *batch, const AttendRun *run, int g, int u) {
    KVCache *kv = batch->kv;
    const KVShape *shape = &kv->shape;
    Tokens tokens = unit_tokens(batch, run, g, u);
    if (tokens.n == 0) return;
    int own = kvcache_head(kv, run->seq, batch->layer, g)->len - run->n + tokens.first, read = 0;
    const uint8_t *chosen = run->chosen + ((size_t)g * run->n + tokens.first) * run->choice_pages;
    for (int p = 0; p <= own / PAGE; p++) read += chosen[p];
    double pairs = (double)read * PAGE * tokens.n;
    for (int i = 0; i < tokens.n; i++) pairs -= PAGE - 1 - (own + i) % PAGE;
    kv->reading.seen += (double)(own / PAGE + 1) * tokens.n;
    kv->reading.read += (double)read * tokens.n;
    kv->ops += 4.0 * shape->head_dim * (shape->n_heads / shape->n_kv_heads) * pairs;
}

static void count_run(AttendBatch *batch, const AttendRun *run) {
    for (int g = 0; g < batch->kv->shape.n_kv_heads; g++)
        for (int u = 0; u < choice_units(batch->kv->reading.reader, run->n); u++)
            count_unit(batch, run, g, u);
}

void choose_pages(AttendBatch *batch) {
    KVCache *kv = batch->kv;
    const KVReader *reader = kv->reading.reader;
    int n_runs = batch->n_runs, n_kv_heads = kv->shape.n_kv_heads, units = 0;
    for (const AttendRun *run = batch->run; run < batch->run + n_runs; run++)
        if (run->chosen && !run->full) units = max_int(units, choice_units(reader, run->n));
    if (units > 0) {
        if (reader->digest) digest_batch(batch);
        if (reader->watches) parallel_for(kv->pool, n_kv_heads * n_runs, mass_unit, batch);
        parallel_for(kv->pool, units * n_kv_heads * n_runs, choose_unit, batch);
    }
    for (AttendRun *run = batch->run; run < batch->run + n_runs; run++) {
        if (run->chosen) count_run(batch, run);
        if (run->full) run->chosen = NULL, run->pairs = NULL;
    }
}
