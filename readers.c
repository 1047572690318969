// readers.c: the methods that choose pages, one row each.
//
// Heads are looked at one kv head at a time, for a page is read for all query heads that share it:
// a page's score is the largest of theirs. What the papers do with blocks of 16 pairs is done with
// pages of 64 here; the token's own page, which is not full yet, is always read.
#include "readers.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvpages.h"
#include "util.h"

// ---- what readers share ----

// Eight sums side by side, always in this order.
static float dot(const float *a, const float *b, int n) {
    float s[8] = {0};
    for (int i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) s[j] += a[i + j] * b[i + j];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

// Floats in an order of integers: -0 comes before 0.
static int32_t rank_of(float x) {
    int32_t i;
    memcpy(&i, &x, sizeof i);
    return i ^ ((i >> 31) & 0x7fffffff);
}

// The rank of the k-th largest of x [n], 1 <= k <= n, found bit by bit.
static int32_t kth_rank(const float *x, int n, int k) {
    uint32_t found = 0;  // of the rank, moved up so that it is not negative
    for (int bit = 31; bit >= 0; bit--) {
        uint32_t next = found | 1u << bit;
        int32_t least = (int32_t)(next ^ 0x80000000u);
        int above = 0;
        for (int i = 0; i < n; i++) above += rank_of(x[i]) >= least;
        if (above >= k) found = next;
    }
    return (int32_t)(found ^ 0x80000000u);
}

// Marks the k largest of x [n]; of equal ones the first.
static void mark_largest(uint8_t *marks, const float *x, int n, int k) {
    if (k > n) k = n;
    if (k <= 0) return;
    int32_t least = kth_rank(x, n, k);
    int equal = k;
    for (int i = 0; i < n; i++) equal -= rank_of(x[i]) > least;
    for (int i = 0; i < n; i++) {
        int32_t rank = rank_of(x[i]);
        if (rank > least || (rank == least && equal-- > 0)) marks[i] = 1;
    }
}

// Marks the first and the last n pages before the token's own.
static void mark_first(const KVChoice *c, int n) {
    memset(c->read, 1, (size_t)min_int(n, c->page));
}

static void mark_last(const KVChoice *c, int n) {
    n = min_int(n, c->page);
    memset(c->read + c->page - n, 1, (size_t)n);
}

static int pages_of(double pairs) { return pages_for((int)pairs); }

static float largest_bias(const KVPage *p) {
    float most = p->biased ? p->bias[0] : 0;
    for (int i = 1; p->biased && i < PAGE; i++) most = fmaxf(most, p->bias[i]);
    return most;
}

// ---- Quest (arXiv 2406.10774) ----

// Digest: least and largest number of each channel of the keys, then the largest bias.
enum { QUEST_BUDGET, QUEST_LAYERS, QUEST_PAGES = 3 };

static size_t quest_bytes(const KVShape *shape, const double *param) {
    (void)param;
    return (2 * (size_t)shape->head_dim + 1) * sizeof(float);
}

static void quest_digest(const KVDigest *d) {
    int n = d->kv->shape.head_dim;
    float x[MAX_HEAD_DIM * PAGE], *least = (float *)d->to, *most = least + n;
    part_read(&d->page->k, KEYS, x);
    for (int c = 0; c < n; c++) {
        least[c] = most[c] = x[c * PAGE];
        for (int i = 1; i < PAGE; i++) {
            least[c] = fminf(least[c], x[c * PAGE + i]);
            most[c] = fmaxf(most[c], x[c * PAGE + i]);
        }
    }
    most[n] = largest_bias(d->page);
}

// No key between least and most has a larger product with q.
static float upper_bound(const float *q, const float *least, const float *most, int n) {
    float s[8] = {0};
    for (int i = 0; i < n; i += 8) {
        for (int j = 0; j < 8; j++) {
            float a = q[i + j] * least[i + j], b = q[i + j] * most[i + j];
            s[j] += a > b ? a : b;
        }
    }
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

static void quest_choose(const KVChoice *c) {
    int n = c->kv->shape.head_dim;
    for (int p = 0; p < c->page; p++) {
        const float *least = choice_digest(c, p), *most = least + n;
        float best = -INFINITY;
        for (int h = 0; h < c->group; h++)
            best = fmaxf(best, upper_bound(c->q + h * n, least, most, n));
        c->scratch[p] = choice_score(c, best, most[n]);
    }
    int pages = pages_of(c->kv->reading.param[QUEST_BUDGET]);
    mark_largest(c->read, c->scratch, c->page, max_int(pages, QUEST_PAGES));
}

static bool quest_skips(const double *param, int layer) { return layer < param[QUEST_LAYERS]; }

static const KVReader quest = {.runs = READS_STEPS,
                               .skips = quest_skips,
                               .digest_bytes = quest_bytes,
                               .digest = quest_digest,
                               .choose = quest_choose};

// ---- the largest products (RetrievalAttention, arXiv 2409.10516) ----

enum { TOPK_BUDGET, TOPK_CLUSTERS, TOPK_FIRST, TOPK_LAST };

// Of each query head those with the largest scores: what an index could find at best.
static void topk_choose(const KVChoice *c) {
    const double *param = c->kv->reading.param;
    int first = min_int((int)param[TOPK_FIRST], c->own);
    int last = max_int(c->own + 1 - max_int((int)param[TOPK_LAST], 1), first);
    for (int h = 0; h < c->group; h++) {
        float *x = c->pair + h * c->pair_step;
        int n = last - first, k = min_int((int)param[TOPK_BUDGET], n), equal = k;
        int32_t least = k > 0 ? kth_rank(x + first, n, k) : INT32_MAX;
        for (int t = first; t < last; t++) equal -= rank_of(x[t]) > least;
        for (int t = 0; t < (c->page + 1) * PAGE; t++) {
            bool ends = t < first || t >= last;
            bool reads = ends || rank_of(x[t]) > least || (rank_of(x[t]) == least && equal-- > 0);
            if (reads && t <= c->own) c->read[t / PAGE] = 1;
            x[t] = reads ? 0.0f : -INFINITY;
        }
    }
}

static const KVReader topk = {
    .runs = READS_STEPS, .pairs = true, .scores = true, .choose = topk_choose};

// The approximation: each page has an index, the centres of N clusters of its keys. Digest: the
// largest bias, then centres as columns of halves [head_dim][N rounded up to 16], the first one
// again in those that are left.
enum { MOST_CLUSTERS = 16, CLUSTER_STEPS = 4 };

static size_t clusters_bytes(const KVShape *shape, const double *param) {
    (void)param;
    return sizeof(float) + (size_t)MOST_CLUSTERS * shape->head_dim * sizeof(uint16_t);
}

// Keys x [n][64] of a page and k centres among them.
typedef struct {
    int k, n;
    float x[MAX_HEAD_DIM * PAGE], centre[MOST_CLUSTERS][MAX_HEAD_DIM];
} Clusters;

// near [64]: the centre that is nearest to each key.
static void find_nearest(const Clusters *c, int *near) {
    float product[MOST_CLUSTERS * PAGE], least[PAGE];
    kern.gemm_f32(&(Gemm){.c = product,
                          .ldc = PAGE,
                          .a = c->centre[0],
                          .lda = MAX_HEAD_DIM,
                          .b = c->x,
                          .n = c->k,
                          .inner = c->n,
                          .cols = PAGE,
                          .ahead = c->x});
    for (int i = 0; i < PAGE; i++) least[i] = INFINITY, near[i] = 0;
    for (int j = 0; j < c->k; j++) {
        float square = dot(c->centre[j], c->centre[j], c->n);
        for (int i = 0; i < PAGE; i++) {
            float far = square - 2 * product[j * PAGE + i];
            if (far < least[i]) least[i] = far, near[i] = j;
        }
    }
}

// A step of Lloyd's; a cluster that is empty keeps its centre.
static void move_centres(Clusters *c) {
    int near[PAGE], count[MOST_CLUSTERS] = {0};
    find_nearest(c, near);
    for (int i = 0; i < PAGE; i++) count[near[i]]++;
    for (int l = 0; l < c->n; l++) {
        float sum[MOST_CLUSTERS] = {0};
        for (int i = 0; i < PAGE; i++) sum[near[i]] += c->x[l * PAGE + i];
        for (int j = 0; j < c->k; j++)
            if (count[j] > 0) c->centre[j][l] = sum[j] / (float)count[j];
    }
}

// From pairs that lie evenly.
static void clusters_digest(const KVDigest *d) {
    enum { COLS = MOST_CLUSTERS };
    Clusters c = {.k = (int)d->kv->reading.param[TOPK_CLUSTERS], .n = d->kv->shape.head_dim};
    float columns[MAX_HEAD_DIM * COLS];
    part_read(&d->page->k, KEYS, c.x);
    for (int i = 0; i < c.n * c.k; i++)
        c.centre[i % c.k][i / c.k] = c.x[i / c.k * PAGE + i % c.k * PAGE / c.k];
    for (int step = 0; step < CLUSTER_STEPS; step++) move_centres(&c);
    for (int i = 0; i < c.n * COLS; i++)
        columns[i] = c.centre[i % COLS < c.k ? i % COLS : 0][i / COLS];
    *(float *)d->to = largest_bias(d->page);
    kern.f32_to_f16((uint16_t *)(d->to + sizeof(float)), columns, (size_t)c.n * COLS);
}

static void clusters_choose(const KVChoice *c) {
    enum { COLS = MOST_CLUSTERS };
    const double *param = c->kv->reading.param;
    int n = c->kv->shape.head_dim;
    float product[READER_GROUP * COLS], columns[MAX_HEAD_DIM * COLS];
    for (int p = 0; p < c->page; p++) {
        const float *bias = choice_digest(c, p);
        float best = -INFINITY;
        kern.f16_to_f32(columns, (const uint16_t *)(bias + 1), (size_t)n * COLS);
        kern.gemm_f32(&(Gemm){.c = product,
                              .ldc = COLS,
                              .a = c->q,
                              .lda = (size_t)n,
                              .b = columns,
                              .n = c->group,
                              .inner = n,
                              .cols = COLS,
                              .ahead = columns});
        for (int i = 0; i < c->group * COLS; i++) best = product[i] > best ? product[i] : best;
        c->scratch[p] = choice_score(c, best, *bias);
    }
    mark_largest(c->read, c->scratch, c->page, pages_of(param[TOPK_BUDGET]));
    mark_first(c, pages_of(param[TOPK_FIRST]));
    mark_last(c, pages_of(param[TOPK_LAST]));
}

static const KVReader clusters = {.runs = READS_STEPS,
                                  .digest_bytes = clusters_bytes,
                                  .digest = clusters_digest,
                                  .choose = clusters_choose};

static const KVReader *topk_pick(const double *param) {
    return param[TOPK_CLUSTERS] > 0 ? &clusters : &topk;
}

// ---- MagicPIG (arXiv 2410.16179) ----

// A table's code of a key is the signs of its products with the table's planes, bits of them; keys
// are centred by the mean of the head's first full page, the queries are not, for which softmax
// does not care. Pairs whose codes are the query's in two tables are read, each with the weight
// that makes up for the chance of that. Digest: uint16_t [tables][64].
enum { PIG_BITS, PIG_TABLES, PIG_EVERY, PIG_SEED, PIG_SINK = 4, PIG_MOST = 512 };

static size_t pig_planes(const KVShape *shape, const double *param) {
    return (size_t)(param[PIG_BITS] * param[PIG_TABLES]) * (size_t)shape->head_dim;
}

// Two numbers of a normal distribution at a time (Box and Muller 1958).
static void pig_draw(const KVShape *shape, const double *param, float *planes) {
    size_t n = pig_planes(shape, param);
    uint64_t x = (uint64_t)param[PIG_SEED] + 1;
    for (size_t i = 0; i < n; i += 2) {
        double a = ((double)(random_next(&x) >> 11) + 0.5) / 9007199254740992.0;
        double b = ((double)(random_next(&x) >> 11) + 0.5) / 9007199254740992.0;
        double r = sqrt(-2 * log(a)), angle = 2 * 3.14159265358979323846 * b;
        planes[i] = (float)(r * cos(angle));
        if (i + 1 < n) planes[i + 1] = (float)(r * sin(angle));
    }
}

static size_t pig_bytes(const KVShape *shape, const double *param) {
    (void)shape;
    return (size_t)param[PIG_TABLES] * PAGE * sizeof(uint16_t);
}

// mean [head_dim] of the keys of a full page.
static void page_mean(const KVCache *kv, const KVPage *p, float *mean) {
    float x[MAX_HEAD_DIM * PAGE];
    part_read(&p->k, KEYS, x);
    for (int c = 0; c < kv->shape.head_dim; c++) {
        mean[c] = 0;
        for (int i = 0; i < PAGE; i++) mean[c] += x[c * PAGE + i] / PAGE;
    }
}

// Keys of a page less the mean: x [head_dim][64].
static void centred_keys(const KVCache *kv, const KVPage *p, const float *mean, float *x) {
    part_read(&p->k, KEYS, x);
    for (int i = 0; i < kv->shape.head_dim * PAGE; i++) x[i] -= mean[i / PAGE];
}

static void pig_digest(const KVDigest *d) {
    const KVReading *r = &d->kv->reading;
    int n = d->kv->shape.head_dim, bits = (int)r->param[PIG_BITS];
    float mean[MAX_HEAD_DIM], x[MAX_HEAD_DIM * PAGE], product[16 * PAGE];
    page_mean(d->kv, d->first, mean);
    centred_keys(d->kv, d->page, mean, x);
    uint16_t *code = (uint16_t *)d->to;
    for (int t = 0; t < (int)r->param[PIG_TABLES]; t++, code += PAGE) {
        const Gemm g = {.c = product,
                        .ldc = PAGE,
                        .a = r->fixed + (size_t)t * bits * n,
                        .lda = (size_t)n,
                        .b = x,
                        .n = bits,
                        .inner = n,
                        .cols = PAGE,
                        .ahead = x};
        kern.gemm_f32(&g);
        memset(code, 0, PAGE * sizeof *code);
        for (int i = 0; i < bits * PAGE; i++) code[i % PAGE] |= (product[i] > 0) << (i / PAGE);
    }
}

// code [tables] of a query.
static void query_codes(const KVChoice *c, const float *q, uint16_t *code) {
    const KVReading *r = &c->kv->reading;
    int n = c->kv->shape.head_dim, bits = (int)r->param[PIG_BITS];
    for (int t = 0; t < (int)r->param[PIG_TABLES]; t++) {
        code[t] = 0;
        for (int b = 0; b < bits; b++) {
            float x = dot(q, r->fixed + ((size_t)t * bits + b) * n, n);
            code[t] = (uint16_t)(code[t] | (x > 0) << b);
        }
    }
}

// How many tables agree about each pair of page p, two at most counted: count [64]. Returns whether
// two do about some pair.
static bool count_tables(const KVChoice *c, int p, const uint16_t *query, uint16_t *count) {
    const uint16_t *code = choice_digest(c, p);
    bool any = false;
    memset(count, 0, PAGE * sizeof *count);
    for (int t = 0; t < (int)c->kv->reading.param[PIG_TABLES]; t++, code += PAGE)
        for (int i = 0; i < PAGE; i++) count[i] = (uint16_t)(count[i] + (code[i] == query[t]));
    for (int i = 0; i < PAGE; i++) any = any || count[i] >= 2;
    return any;
}

// add [64] for the pairs that were sampled: less the log of the chance that at least two of the
// tables agree, given the angle between q and the key x [head_dim][64].
static void pig_weights(const KVChoice *c, const float *q, const float *x, float *add) {
    const double *param = c->kv->reading.param;
    int n = c->kv->shape.head_dim;
    double bits = param[PIG_BITS], tables = param[PIG_TABLES];
    float product[PAGE] = {0}, square[PAGE] = {0}, length = sqrtf(dot(q, q, n));
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < PAGE; i++) {
            product[i] += q[j] * x[j * PAGE + i];
            square[i] += x[j * PAGE + i] * x[j * PAGE + i];
        }
    }
    for (int i = 0; i < PAGE; i++) {
        if (add[i] != 0.0f) continue;
        double cosine = product[i] / fmax((double)length * sqrt((double)square[i]), 1e-30);
        double u = pow(1 - acos(fmax(-1, fmin(1, cosine))) / 3.14159265358979323846, bits);
        double p = 1 - pow(1 - u, tables) - tables * u * pow(1 - u, tables - 1);
        add[i] = (float)-log(p + 1e-4);
    }
}

// Of one query head and page; the first pairs are read with their own weight.
static void pig_page(const KVChoice *c, int h, int p, const uint16_t *query, const float *mean) {
    float *add = c->pair + h * c->pair_step + p * PAGE, x[MAX_HEAD_DIM * PAGE];
    uint16_t count[PAGE];
    if (count_tables(c, p, query, count)) {
        const float *q = c->q + h * c->kv->shape.head_dim;
        for (int i = 0; i < PAGE; i++) add[i] = count[i] >= 2 ? 0.0f : -INFINITY;
        centred_keys(c->kv, &c->kv->pages[c->head->page[p]], mean, x);
        pig_weights(c, q, x, add);
        c->read[p] = 1;
    } else {
        for (int i = 0; i < PAGE; i++) add[i] = -INFINITY;
    }
    for (int i = 0; p == 0 && i < PIG_SINK; i++) add[i] = 0.0f, c->read[0] = 1;
}

static void pig_choose(const KVChoice *c) {
    uint16_t query[PIG_MOST];
    float mean[MAX_HEAD_DIM];
    if (c->page > 0) page_mean(c->kv, &c->kv->pages[c->head->page[0]], mean);
    for (int h = 0; h < c->group; h++) {
        float *pair = c->pair + h * c->pair_step;
        query_codes(c, c->q + h * c->kv->shape.head_dim, query);
        for (int p = 0; p < c->page; p++) pig_page(c, h, p, query, mean);
        for (int i = 0; i < PAGE; i++) pair[c->page * PAGE + i] = 0.0f;
        // The last 64 pairs, of which some are on the page before.
        for (int t = max_int(c->own - PAGE + 1, 0); t < c->page * PAGE; t++)
            pair[t] = 0.0f, c->read[t / PAGE] = 1;
    }
}

static bool pig_skips(const double *param, int layer) { return layer % (int)param[PIG_EVERY] == 0; }

static const KVReader magicpig = {.runs = READS_STEPS,
                                  .pairs = true,
                                  .centred = true,
                                  .skips = pig_skips,
                                  .n_fixed = pig_planes,
                                  .draw = pig_draw,
                                  .digest_bytes = pig_bytes,
                                  .digest = pig_digest,
                                  .choose = pig_choose};

// ---- InfiniGen (arXiv 2406.19707) ----

// Scores are guessed from the few channels in which the query is largest; pairs near the largest
// guess are read.
enum { INFINI_CHANNELS, INFINI_ALPHA, INFINI_MOST, INFINI_LAYERS };

// x [64] = channel j of a page's keys; of pages of codes all [head_dim][64] have been read before.
static const float *channel(const KVPage *p, const float *read, int j, float *x) {
    if (is_codes(p->k.type)) return read + j * PAGE;
    if (p->k.type == KV_F32) return (const float *)p->k.data + j * PAGE;
    kern.f16_to_f32(x, (const uint16_t *)p->k.data + j * PAGE, PAGE);
    return x;
}

// guess [64]: the scores of page p by the channels that are marked.
static void guess_page(const KVChoice *c, int p, const float *q, const uint8_t *marked,
                       float *guess) {
    const KVPage *page = &c->kv->pages[c->head->page[p]];
    float read[MAX_HEAD_DIM * PAGE], room[PAGE];
    if (is_codes(page->k.type)) part_read(&page->k, KEYS, read);
    memset(guess, 0, PAGE * sizeof *guess);
    for (int j = 0; j < c->kv->shape.head_dim; j++) {
        if (!marked[j]) continue;
        const float *x = channel(page, read, j, room);
        for (int i = 0; i < PAGE; i++) guess[i] += q[j] * x[i];
    }
    for (int i = 0; i < PAGE; i++)
        guess[i] = choice_score(c, guess[i], page->biased ? page->bias[i] : 0);
}

static void infini_choose(const KVChoice *c) {
    const double *param = c->kv->reading.param;
    int d = c->kv->shape.head_dim, n = c->page * PAGE;
    int channels = max_int((int)ceil(param[INFINI_CHANNELS] * d), 1);
    int most = max_int((int)(param[INFINI_MOST] * n), 1);
    for (int h = 0; h < c->group; h++) {
        const float *q = c->q + h * d;
        float *x = c->pair + h * c->pair_step, size[MAX_HEAD_DIM], best = -INFINITY;
        uint8_t marked[MAX_HEAD_DIM] = {0};
        for (int j = 0; j < d; j++) size[j] = fabsf(q[j]);
        mark_largest(marked, size, d, channels);
        for (int p = 0; p < c->page; p++) guess_page(c, p, q, marked, x + p * PAGE);
        for (int t = 0; t < n; t++) best = fmaxf(best, x[t]);
        int32_t least = rank_of(best - (float)param[INFINI_ALPHA]);
        if (n > 0) least = max_int(least, kth_rank(x, n, min_int(most, n)));
        for (int t = 0; t < n + PAGE; t++) {
            bool reads = t >= n || rank_of(x[t]) >= least;
            if (reads) c->read[t / PAGE] = 1;
            x[t] = reads ? 0.0f : -INFINITY;
        }
    }
}

static bool infini_skips(const double *param, int layer) { return layer < param[INFINI_LAYERS]; }

static const KVReader infinigen = {
    .runs = READS_STEPS, .pairs = true, .skips = infini_skips, .choose = infini_choose};

// ---- MInference (arXiv 2407.02490) ----

enum { INFER_VERTICAL, INFER_SLASH, INFER_NEAREST = 2 };

// Vertical: the pages with the most attention from the last tokens of the run. Slash: the distances
// with the most, in pages. The first page and the nearest distances are read in any case.
static void infer_choose(const KVChoice *c) {
    const double *param = c->kv->reading.param;
    int pages = c->page + 1;
    uint8_t *slash = (uint8_t *)c->scratch;  // [page + 1]
    memset(slash, 0, (size_t)pages);
    mark_largest(slash, c->diagonal, pages, (int)param[INFER_SLASH]);
    mark_largest(c->read, c->column, pages, (int)param[INFER_VERTICAL]);
    for (int p = 0; p < pages; p++)
        if (slash[c->page - p] || c->page - p < INFER_NEAREST) c->read[p] = 1;
    c->read[0] = 1;
}

static const KVReader minference = {
    .runs = READS_PROMPTS, .by_page = true, .watches = true, .choose = infer_choose};

// ---- fixed patterns ----

// Big Bird (arXiv 2007.14062): the first pages, the last ones, and some drawn for the token's page.
enum { BIRD_FIRST, BIRD_LAST, BIRD_RANDOM, BIRD_SEED };

static void bird_choose(const KVChoice *c) {
    const double *param = c->kv->reading.param;
    const int where[] = {c->layer, c->g, c->page};
    uint64_t x = hash_bytes(HASH_START ^ (uint64_t)param[BIRD_SEED], where, sizeof where);
    mark_first(c, (int)param[BIRD_FIRST]);
    mark_last(c, (int)param[BIRD_LAST]);
    for (int i = 0; c->page > 0 && i < (int)param[BIRD_RANDOM]; i++)
        c->read[random_next(&x) % (unsigned)c->page] = 1;
}

static const KVReader bigbird = {.runs = READS_ALL, .by_page = true, .choose = bird_choose};

// Sparse Transformer (arXiv 1904.10509): the last pages, and every so many before.
enum { STRIDED_LAST, STRIDED_STRIDE };

static void strided_choose(const KVChoice *c) {
    const double *param = c->kv->reading.param;
    mark_last(c, (int)param[STRIDED_LAST]);
    for (int p = c->page; p >= 0; p -= (int)param[STRIDED_STRIDE]) c->read[p] = 1;
}

static const KVReader strided = {.runs = READS_ALL, .by_page = true, .choose = strided_choose};

// ---- the table ----

#define LAYERS(n) \
    { .name = "layers", .value = (n), .hi = 1e6, .help = "first layers, which read all" }
const Reader readers[] = {
    {.name = "quest",
     .how = &quest,
     .help = "pages by the most that a key in them could score (Quest, arXiv 2406.10774)",
     .params = {{.name = "budget",
                 .value = 1024,
                 .hi = 1e8,
                 .help = "pairs in the pages that are read, 3 pages at least"},
                LAYERS(2)}},
    {.name = "topk",
     .how = &topk,
     .pick = topk_pick,
     .help = "pairs with the largest scores, looked for in all (RetrievalAttention, arXiv "
             "2409.10516, without its index)",
     .params = {{.name = "budget", .value = 512, .hi = 1e8, .help = "such pairs"},
                {.name = "clusters",
                 .value = 0,
                 .hi = MOST_CLUSTERS,
                 .help = "an index: pages by the centres of N clusters of their keys; 0: none"},
                {.name = "first", .value = 128, .hi = 1e8, .help = "first pairs, which are read"},
                {.name = "last", .value = 512, .hi = 1e8, .help = "last pairs, which are read"}}},
    {.name = "magicpig",
     .how = &magicpig,
     .help = "pairs drawn by hashes, weighed by their chance (MagicPIG, arXiv 2410.16179)",
     .params = {{.name = "bits", .value = 10, .lo = 1, .hi = 16, .help = "of a hash"},
                {.name = "tables",
                 .value = 150,
                 .lo = 2,
                 .hi = PIG_MOST,
                 .help = "of hashes; two must agree"},
                {.name = "every", .value = 16, .lo = 1, .hi = 1e6, .help = "N-th layer reads all"},
                {.name = "seed", .value = 1, .hi = 1e9, .help = "of the planes"}}},
    {.name = "infinigen",
     .how = &infinigen,
     .help = "pairs whose score, guessed from few channels, is near the largest (InfiniGen, arXiv "
             "2406.19707)",
     .params = {{.name = "channels",
                 .value = 0.25,
                 .lo = 0,
                 .hi = 1,
                 .real = true,
                 .help = "share of them that is looked at"},
                {.name = "alpha",
                 .value = 5,
                 .hi = 1e6,
                 .real = true,
                 .help = "how far below the largest guess"},
                {.name = "most",
                 .value = 0.2,
                 .hi = 1,
                 .real = true,
                 .help = "share of the pairs that is read at most"},
                LAYERS(1)}},
    {.name = "minference",
     .how = &minference,
     .help = "prompts: the pages and the distances that a block's last 64 tokens look at most "
             "(MInference, arXiv 2407.02490, vertical-slash)",
     .params = {{.name = "vertical", .value = 16, .hi = 1e6, .help = "pages"},
                {.name = "slash", .value = 16, .hi = 1e6, .help = "distances, in pages"}}},
    {.name = "bigbird",
     .how = &bigbird,
     .help = "first, last and random pages (Big Bird, arXiv 2007.14062)",
     .params = {{.name = "first", .value = 1, .hi = 1e6, .help = "pages"},
                {.name = "last", .value = 8, .hi = 1e6, .help = "pages before the token's own"},
                {.name = "random", .value = 8, .hi = 1e6, .help = "pages drawn, some twice"},
                {.name = "seed", .value = 1, .hi = 1e9, .help = "of the numbers"}}},
    {.name = "strided",
     .how = &strided,
     .help = "the last pages and every so many before (Sparse Transformer, arXiv 1904.10509)",
     .params = {{.name = "last", .value = 8, .hi = 1e6, .help = "pages before the token's own"},
                {.name = "stride", .value = 8, .lo = 1, .hi = 1e6, .help = "pages"}}},
    {0},
};

const Reader *reader_find(const char *name) {
    const Reader *r = readers;
    while (r->name && strcmp(r->name, name) != 0) r++;
    return r->name ? r : NULL;
}

// ---- its numbers ----

// Whether the key [n] at `at` stands in the list before it, too.
static bool is_given(const char *list, const char *at, size_t n) {
    for (const char *s = list; s < at; s += strcspn(s, ","), s += *s == ',')
        if (strcspn(s, "=,") == n && memcmp(s, at, n) == 0) return true;
    return false;
}

int reader_set(Reads *reads, const Reader *row, const char *key_values, char *err) {
    reads->row = row;
    for (int i = 0; i < KV_READER_PARAMS; i++) reads->param[i] = row->params[i].value;
    for (const char *s = key_values; s && *s; s += strcspn(s, ","), s += *s == ',') {
        size_t n = strcspn(s, "=,");
        int i = param_find(row->params, s, n);
        if (i < 0) continue;
        if (is_given(key_values, s, n)) return fail(err, "%.*s is given twice", (int)n, s);
        const Param *p = &row->params[i];
        double x = s[n] == '=' ? number_read(s + n + 1, strcspn(s + n + 1, ",")) : NAN;
        if (!(x >= p->lo && x <= p->hi) || (!p->real && x != floor(x)))
            return fail(err, "%s needs a %s from %g to %g", p->name,
                        p->real ? "number" : "whole number", p->lo, p->hi);
        reads->param[i] = x;
    }
    return 0;
}

static const KVReader *how_of(const Reads *reads) {
    const Reader *row = reads->row;
    return row->pick ? row->pick(reads->param) : row->how;
}

int reader_begin(const Reads *reads, KVCache *kv, char *err) {
    if (!reads->row) return kvcache_read_by(kv, NULL, NULL, err);
    return kvcache_read_by(kv, how_of(reads), reads->param, err);
}

double reader_bytes(const Reads *reads, const KVShape *shape) {
    return reads->row ? reader_pair_bytes(how_of(reads), shape, reads->param) : 0;
}
