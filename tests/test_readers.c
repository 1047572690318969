// test_readers.c: a token reads what its reader chooses and nothing else: choices beside naive
// ones, attention beside a naive one over the chosen pairs, whatever became of the pages before.
#include <unistd.h>

#include "kvfile.h"
#include "kvpages.h"
#include "kvtest.h"
#include "readers.h"

enum { PAGES = MAX_N / PAGE + 1 };

// What a token's query heads read: what is added to the score of each pair, -inf: not read.
typedef struct {
    double add[HEADS][MAX_N];
} Naive;

// The pairs of a kv head.
typedef struct {
    float k[MAX_N][D], v[MAX_N][D], bias[MAX_N];
} Pairs;

// A token at work, and a kv head.
typedef struct {
    int own;  // its pair
    float scale;
    const float *q;       // [HEADS][D]
    const double *param;  // of the reader
    const float *fixed;
    const Pairs *pairs;
    const float *sinks;  // [HEADS] of the layer, or NULL
} Token;

static double sink_of(const Token *t, int h) { return t->sinks ? exp(t->sinks[h]) : 0; }

static void load_pairs(const KVCache *kv, KVHeadAt at, Pairs *p) {
    int n = kvcache_head(kv, at.seq, at.layer, at.g)->len;
    float k[D * PAGE], v[PAGE * D];
    for (int t = 0; t < n; t++) {
        if (t % PAGE == 0) kvcache_block(kv, at, t / PAGE, k, v);
        for (int i = 0; i < D; i++) p->k[t][i] = k[i * PAGE + t % PAGE];
        memcpy(p->v[t], v + t % PAGE * D, sizeof p->v[t]);
        p->bias[t] = kvcache_bias(kv, at, t);
    }
}

// ---- naive choices ----

static double product(const float *a, const float *b) {
    double s = 0;
    for (int i = 0; i < D; i++) s += (double)a[i] * b[i];
    return s;
}

static void none(Naive *n) {
    for (int i = 0; i < HEADS * MAX_N; i++) n->add[i / MAX_N][i % MAX_N] = -INFINITY;
}

static void add_page(Naive *n, int g, int page) {
    for (int h = g * GROUP; h < (g + 1) * GROUP; h++)
        for (int i = page * PAGE; i < min_int((page + 1) * PAGE, MAX_N); i++) n->add[h][i] = 0;
}

// The n best of [0, count) by score are added.
static void add_best(Naive *n, int g, const double *score, int count, int most) {
    bool taken[PAGES] = {false};
    for (int i = 0; i < min_int(most, count); i++) {
        int best = -1;
        for (int p = 0; p < count; p++)
            if (!taken[p] && (best < 0 || score[p] > score[best])) best = p;
        taken[best] = true;
        add_page(n, g, best);
    }
}

static double bias_of(const Token *t, int page) {
    double most = -INFINITY;
    for (int i = page * PAGE; i < (page + 1) * PAGE; i++) most = fmax(most, t->pairs->bias[i]);
    return most;
}

// The score of a pair for query head h.
static double score_of(const Token *t, int h, int pair) {
    return product(t->q + h * D, t->pairs->k[pair]) * t->scale + t->pairs->bias[pair];
}

static void naive_quest(const Token *t, int g, Naive *n) {
    double score[PAGES];
    int pages = t->own / PAGE;
    for (int p = 0; p < pages; p++) {
        score[p] = -INFINITY;
        for (int h = g * GROUP; h < (g + 1) * GROUP; h++) {
            double sum = 0;
            for (int c = 0; c < D; c++) {
                double best = -INFINITY;
                for (int i = 0; i < PAGE; i++)
                    best = fmax(best, (double)t->q[h * D + c] * t->pairs->k[p * PAGE + i][c]);
                sum += best;
            }
            score[p] = fmax(score[p], sum * t->scale + bias_of(t, p));
        }
    }
    add_best(n, g, score, pages, max_int(3, (int)t->param[0] / PAGE));
    add_page(n, g, pages);
}

static void naive_topk(const Token *t, int g, Naive *n) {
    int first = (int)t->param[2], last = t->own + 1 - max_int((int)t->param[3], 1);
    for (int h = g * GROUP; h < (g + 1) * GROUP; h++) {
        double s[MAX_N];
        for (int i = 0; i <= t->own; i++) s[i] = score_of(t, h, i);
        for (int i = 0; i <= t->own; i++) {
            int better = 0;
            for (int j = first; j < last; j++) better += s[j] > s[i];
            if (i < first || i >= last || better < t->param[0]) n->add[h][i] = 0;
        }
    }
}

static void naive_infinigen(const Token *t, int g, Naive *n) {
    int pages = t->own / PAGE, channels = (int)ceil(t->param[0] * D);
    for (int h = g * GROUP; h < (g + 1) * GROUP; h++) {
        double s[MAX_N], best = -INFINITY;
        const float *q = t->q + h * D;
        for (int i = 0; i < pages * PAGE; i++) {
            s[i] = 0;
            for (int c = 0; c < D; c++) {
                int larger = 0;
                for (int j = 0; j < D; j++) larger += fabsf(q[j]) > fabsf(q[c]);
                if (larger < channels) s[i] += (double)q[c] * t->pairs->k[i][c];
            }
            s[i] = s[i] * t->scale + t->pairs->bias[i];
            best = fmax(best, s[i]);
        }
        for (int i = 0; i < pages * PAGE; i++) {
            int better = 0;
            for (int j = 0; j < pages * PAGE; j++) better += s[j] > s[i];
            if (s[i] >= best - t->param[1] && better < (int)(t->param[2] * pages * PAGE))
                n->add[h][i] = 0;
        }
        for (int i = pages * PAGE; i <= t->own; i++) n->add[h][i] = 0;
    }
}

static void naive_strided(const Token *t, int g, Naive *n) {
    int own = t->own / PAGE;
    for (int p = 0; p <= own; p++)
        if (own - p <= t->param[0] || (own - p) % (int)t->param[1] == 0) add_page(n, g, p);
}

// In how many tables the hashes of a and b [D] are the same.
static int same_hashes(const Token *t, const double *a, const double *b) {
    int bits = (int)t->param[0], same = 0;
    for (int i = 0; i < (int)t->param[1]; i++) {
        bool differ = false;
        for (int j = 0; j < bits; j++) {
            const float *plane = t->fixed + ((size_t)i * bits + j) * D;
            double x = 0, y = 0;
            for (int c = 0; c < D; c++) x += plane[c] * a[c], y += plane[c] * b[c];
            differ = differ || (x > 0) != (y > 0);
        }
        same += !differ;
    }
    return same;
}

// The chance that at least two tables have the same hashes of a and b.
static double hash_chance(const Token *t, const double *a, const double *b) {
    double ab = 0, aa = 0, bb = 0, n = t->param[1];
    for (int c = 0; c < D; c++) ab += a[c] * b[c], aa += a[c] * a[c], bb += b[c] * b[c];
    double u = pow(1 - acos(ab / sqrt(aa * bb)) / acos(-1), t->param[0]);
    return 1 - pow(1 - u, n) - n * u * pow(1 - u, n - 1);
}

static void naive_magicpig(const Token *t, int g, Naive *n) {
    double mean[D] = {0}, q[D], k[D];
    for (int i = 0; i < PAGE * D; i++) mean[i % D] += (double)t->pairs->k[i / D][i % D] / PAGE;
    for (int h = g * GROUP; h < (g + 1) * GROUP; h++) {
        for (int c = 0; c < D; c++) q[c] = t->q[h * D + c];
        for (int i = 0; i <= t->own; i++) {
            for (int c = 0; c < D; c++) k[c] = t->pairs->k[i][c] - mean[c];
            if (i < 4 || i > t->own - PAGE || i / PAGE == t->own / PAGE)
                n->add[h][i] = 0;
            else if (same_hashes(t, q, k) >= 2)
                n->add[h][i] = -log(hash_chance(t, q, k) + 1e-4);
        }
    }
}

// Lloyd's steps over the keys of one page, as many and from where the reader begins.
static void naive_centres(const Token *t, int page, int k, double centre[16][D]) {
    for (int j = 0; j < k * D; j++)
        centre[j / D][j % D] = t->pairs->k[page * PAGE + j / D * PAGE / k][j % D];
    for (int step = 0; step < 4; step++) {
        double sum[16][D] = {{0}};
        int count[16] = {0};
        for (int i = page * PAGE; i < (page + 1) * PAGE; i++) {
            double least = INFINITY;
            int at = 0;
            for (int j = 0; j < k; j++) {
                double far = 0;
                for (int c = 0; c < D; c++) far += pow(t->pairs->k[i][c] - centre[j][c], 2);
                if (far < least) least = far, at = j;
            }
            count[at]++;
            for (int c = 0; c < D; c++) sum[at][c] += t->pairs->k[i][c];
        }
        for (int j = 0; j < k * D; j++)
            if (count[j / D] > 0) centre[j / D][j % D] = sum[j / D][j % D] / count[j / D];
    }
    for (int j = 0; j < k * D; j++)  // the reader keeps halves
        centre[j / D][j % D] = f16_f32(f32_f16((float)centre[j / D][j % D]));
}

static void naive_clusters(const Token *t, int g, Naive *n) {
    double score[PAGES] = {0}, centre[16][D];
    int pages = t->own / PAGE, k = (int)t->param[1];
    for (int p = 0; p < pages; p++) {
        score[p] = -INFINITY;
        naive_centres(t, p, k, centre);
        for (int i = 0; i < k * GROUP; i++) {
            double sum = 0;
            for (int c = 0; c < D; c++) sum += t->q[(g * GROUP + i / k) * D + c] * centre[i % k][c];
            score[p] = fmax(score[p], sum * t->scale + bias_of(t, p));
        }
    }
    add_best(n, g, score, pages, pages_for((int)t->param[0]));
    for (int p = 0; p <= pages; p++)
        if (p < pages_for((int)t->param[2]) || p >= pages - pages_for((int)t->param[3]))
            add_page(n, g, p);
}

typedef void NaiveChoice(const Token *t, int g, Naive *n);

// ---- naive attention ----

// out [D] of query head h over what n leaves it, with the token's scores.
static void masked(const Token *t, const Naive *n, int h, double *out) {
    double sum = sink_of(t, h);
    for (int i = 0; i < D; i++) out[i] = 0;
    for (int i = 0; i <= t->own; i++) {
        double w = exp(score_of(t, h, i) + n->add[h][i]);
        sum += w;
        for (int j = 0; j < D; j++) out[j] += w * t->pairs->v[i][j];
    }
    for (int i = 0; i < D; i++) out[i] /= sum;
}

// Pages with a pair that some query head of kv head g reads.
static int count_naive(const Token *t, const Naive *n, int g) {
    int pages = 0;
    for (int p = 0; p <= t->own / PAGE; p++) {
        bool read = false;
        for (int h = g * GROUP; h < (g + 1) * GROUP; h++)
            for (int i = p * PAGE; i <= min_int(t->own, p * PAGE + PAGE - 1); i++)
                read = read || n->add[h][i] > -INFINITY;
        pages += read;
    }
    return pages;
}

// How many numbers of out [HEADS][D], in the heads of kv head g, are not what n leaves.
static int count_wrong(const KVCache *kv, const Token *t, const Naive *n, int g, const float *out) {
    int wrong = 0;
    for (int h = g * GROUP; h < (g + 1) * GROUP; h++) {
        double want[D];
        masked(t, n, h, want);
        for (int j = 0; j < D; j++)
            wrong += !(fabs(out[h * D + j] - want[j]) <=
                       allowed(kv, kv->types.k > KV_F32 ? 2e-3 : 2e-4));
    }
    return wrong;
}

static const float *layer_sinks(int l) { return with_sinks ? with_sinks + l * HEADS : NULL; }

// n more tokens of the sequence in one run, beside the naive reader; the pages read are counted.
static void check_run(KVCache *kv, int seq, int n, NaiveChoice *choose) {
    static Pairs pairs;
    float *q = randoms((size_t)n * HEADS * D), *k = randoms((size_t)n * KV * D),
          *v = randoms((size_t)n * KV * D), *out = malloc((size_t)n * HEADS * D * sizeof *out);
    double seen = kv->reading.seen, read = kv->reading.read;
    const KVReader *reader = kv->reading.reader;
    int wrong = 0;
    KVRun run = {seq, n};
    CHECK(kvcache_reserve(kv, seq, n, err) == 0);
    for (int l = 0; l < L; l++) {
        kvcache_append(kv, l, &run, 1, k, v);
        kvcache_attend(kv, l, &run, 1, &(KVQuery){q, out, HEADS * D, NULL});
        for (int g = 0; g < KV; g++) {  // heads may differ in length
            load_pairs(kv, (KVHeadAt){seq, l, g}, &pairs);
            for (int i = 0; i < n; i++) {
                Naive naive;
                Token t = {kvcache_head(kv, seq, l, g)->len - n + i,
                           kv->shape.scale,
                           q + i * HEADS * D,
                           kv->reading.param,
                           kv->reading.fixed,
                           &pairs,
                           layer_sinks(l)};
                none(&naive);
                if (reader->skips && reader->skips(t.param, l))
                    for (int p = 0; p <= t.own / PAGE; p++) add_page(&naive, g, p);
                else
                    choose(&t, g, &naive);
                seen += t.own / PAGE + 1, read += count_naive(&t, &naive, g);
                wrong += count_wrong(kv, &t, &naive, g, out + i * HEADS * D);
            }
        }
    }
    kvcache_advance(kv, &run, 1);
    CHECK(wrong == 0);
    CHECK(kv->reading.seen == seen && kv->reading.read == read);
    free(q), free(k), free(v), free(out);
}

// ---- caches and readers ----

static KVCache open_with(const char *types, const int *window, ThreadPool *pool) {
    KVCache kv;
    KVShape shape = shape_with(window);
    CHECK(kvcache_open(&kv, &shape, types_of(types), pool, err) == 0);
    return kv;
}

static void read_with(KVCache *kv, const char *name, const char *set) {
    Reads reads;
    CHECK(reader_find(name) && reader_set(&reads, reader_find(name), set, err) == 0);
    CHECK(reader_begin(&reads, kv, err) == 0);
}

static uint8_t *random_keep(int n) {
    uint8_t *keep = malloc((size_t)L * KV * n);
    for (int i = 0; i < L * KV * n; i++) keep[i] = rnd() > -0.3f;
    return keep;
}

// Biases for some pairs of a head, as fitting gives them.
static void give_biases(KVCache *kv, int seq, float most) {
    CHECK(kvcache_own(kv, seq, err) == 0);
    int kept[2] = {20, 90};
    float v[2 * D], bias[2] = {most, 0.4f};
    for (int i = 0; i < 2 * D; i++) v[i] = rnd();
    for (int i = 0; i < L * KV; i++)
        kvcache_refit(kv, (KVHeadAt){seq, i / KV, i % KV}, &(KVFitted){kept, 2, v, bias});
}

// What may become of a sequence, and after each event the choices of a token: pages that change
// have new digests.
static void check_life(KVCache *kv, NaiveChoice *choose) {
    bool codes = kv->types.k > KV_F32;
    int seq = kvcache_new(kv, err);
    append_random(kv, seq, 220, NULL);
    for (int i = 0; i < 3; i++) check_run(kv, seq, 1, choose);
    check_run(kv, seq, 4, choose);
    int fork = kvcache_fork(kv, seq, err), mark = kvcache_mark(kv, seq, err);
    check_run(kv, fork, 1, choose);
    append_random(kv, fork, 70, NULL);  // the page that the two share is another one from here on
    append_random(kv, seq, 70, NULL);
    check_run(kv, fork, 1, choose);
    check_run(kv, seq, 1, choose);
    CHECK(kvcache_rewind(kv, seq, mark, err) == 0);
    check_run(kv, seq, 1, choose);
    append_random(kv, seq, 50, NULL);
    check_run(kv, seq, 1, choose);
    if (kvcache_cut(kv, seq, 200)) {  // its last pages are written anew
        append_random(kv, seq, 80, NULL);
        check_run(kv, seq, 1, choose);
    }
    for (int i = 0; i < 2 && !codes; i++) {
        give_biases(kv, seq, i == 0 ? 0.1f : 6.0f);
        check_run(kv, seq, 1, choose);
    }
    uint8_t *keep = random_keep(200);
    CHECK(kvcache_evict(kv, seq, 10, 200, keep, err) == 0);
    check_run(kv, seq, 1, choose);
    append_random(kv, seq, 60, NULL);
    check_run(kv, seq, 1, choose);
    CHECK(kvcache_demote(kv, fork, 10, 200, keep, err) == 0);
    check_run(kv, fork, 1, choose);
    CHECK(kvcache_settle(kv, fork, err) == 0);
    check_run(kv, fork, 1, choose);
    for (int i = 0; i < 3; i++) check_run(kv, fork, 8, choose);
    if (kv->reading.reader->runs == READS_ALL) check_run(kv, fork, 12, choose);
    free(keep);
    kvcache_drop(kv, fork), kvcache_drop(kv, mark), kvcache_drop(kv, seq);
    int next = kvcache_new(kv, err);  // on pages of those that are gone
    append_random(kv, next, 300, NULL);
    check_run(kv, next, 1, choose);
    kvcache_drop(kv, next);
}

static void test_life(const char *types, const char *name, const char *set, NaiveChoice *choose) {
    KVCache kv = open_with(types, no_window, NULL);
    read_with(&kv, name, set);
    check_life(&kv, choose);
    if (!kv.reading.reader->pairs) CHECK(kvcache_read_share(&kv) < 0.95);
    kvcache_close(&kv);
}

// A cache that was saved, evicted from before; and its sequence in another cache.
static void test_files(const char *types) {
    KVCache kv = open_with(types, no_window, NULL), back, other = open_with(types, no_window, NULL);
    KVModel model = {kv.shape, "f1f2"};
    KVInfo got;
    char path[64];
    int seq = kvcache_new(&kv, err), ids[MAX_N] = {0};
    append_random(&kv, seq, 390, NULL);
    uint8_t *keep = random_keep(300);
    CHECK(kvcache_evict(&kv, seq, 10, 300, keep, err) == 0);
    CHECK(kvcache_settle(&kv, seq, err) == 0);
    KVInfo info = {.fingerprint = "f1f2", .model = "tiny", .policy = "none", .ratio = 1};
    info.n_ctx = info.n_ids = 390, info.ids = ids;
    test_path(path, "readers.kvc");
    CHECK(kvfile_save(&kv, seq, path, &info, err) == 0);
    if (CHECK(kvfile_load(&back, path, &model, NULL, &got, err) == 0)) {
        read_with(&back, "quest", "budget=128,layers=0");
        check_run(&back, 0, 1, naive_quest);
        read_with(&other, "quest", "budget=128,layers=0");
        check_run(&other, kvcache_take(&other, &back, 0, err), 1, naive_quest);
        kvcache_close(&back);
    }
    remove(path);
    free(keep);
    kvcache_close(&kv), kvcache_close(&other);
}

// ---- the same bits ----

// Runs of several lengths, one of them a prompt, over the same random numbers. out [n][HEADS * D].
enum { REPLAY = 12 + 256 + 1 + 4 + 1 + 12 + 1 };

static void replay(KVCache *kv, float *out) {
    static const int lengths[] = {12, 256, 1, 4, 1, 12, 1};
    int seq = kvcache_new(kv, err);
    seed = 99;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; out += lengths[i++] * HEADS * D)
        append_random(kv, seq, lengths[i], out);
    kvcache_drop(kv, seq);
}

// With everything chosen a reader is no reader; and threads change nothing.
static void test_whole(const char *types, const char *name, const char *set) {
    size_t n = (size_t)REPLAY * HEADS * D;
    float *full = malloc(n * sizeof *full), *read = malloc(n * sizeof *read);
    for (int window = 0; window < 2; window++) {
        KVCache kv = open_with(types, window ? one_window : no_window, NULL);
        replay(&kv, full);
        CHECK(kvcache_read_share(&kv) == 1 && kv.reading.seen == 0);
        read_with(&kv, name, set);
        replay(&kv, read);
        CHECK(memcmp(full, read, n * sizeof *full) == 0);
        CHECK(kvcache_read_share(&kv) == 1 && kv.reading.seen > 0);
        kvcache_close(&kv);
    }
    free(full), free(read);
}

// Threads change nothing.
static void test_threads(const char *types, const char *name, const char *set) {
    size_t n = (size_t)REPLAY * HEADS * D;
    float *one = malloc(n * sizeof *one), *three = malloc(n * sizeof *three);
    ThreadPool *pool = pool_open(3);
    KVCache a = open_with(types, no_window, NULL), b = open_with(types, no_window, pool);
    replay(&a, three);
    read_with(&a, name, set), read_with(&b, name, set);
    replay(&a, one);
    CHECK(memcmp(one, three, n * sizeof *one) != 0);  // it does leave something out
    replay(&b, three);
    CHECK(memcmp(one, three, n * sizeof *one) == 0);
    CHECK(kvcache_read_share(&a) == kvcache_read_share(&b));
    kvcache_close(&a), kvcache_close(&b);
    pool_close(pool);
    free(one), free(three);
}

// A token reads the same alone, beside other sequences, and before the tokens of a draft that are
// forgotten again: at every distance from the end of a page.
static void test_company(const char *name, const char *set) {
    enum { WIDE = HEADS * D, BASE = 270 };  // forks share a range of pages, and a tile
    KVCache kv = open_with("f16", no_window, NULL);
    int seq = kvcache_new(&kv, err), wrong = 0;
    append_random(&kv, seq, BASE, NULL);
    read_with(&kv, name, set);
    for (int i = 0; i < 60; i++) {
        float *q = randoms(9 * WIDE), *k = randoms(9 * KV * D), *v = randoms(9 * KV * D);
        const float *q5 = q + 5 * WIDE, *k5 = k + 5 * KV * D, *v5 = v + 5 * KV * D;
        float alone[WIDE], out[6 * WIDE];
        int fork = kvcache_fork(&kv, seq, err), other = kvcache_fork(&kv, seq, err);
        append_random(&kv, other, 70, NULL);
        step(&kv, &(KVRun){fork, 1}, 1, alone, q5, k5, v5);
        kvcache_drop(&kv, fork);
        fork = kvcache_fork(&kv, seq, err);
        step(&kv, (KVRun[]){{other, 5}, {fork, 1}}, 2, out, q, k, v);
        wrong += memcmp(alone, out + 5 * WIDE, sizeof alone) != 0;
        kvcache_drop(&kv, fork), kvcache_drop(&kv, other);
        step(&kv, &(KVRun){seq, 4}, 1, out, q5, k5, v5);
        wrong += memcmp(alone, out, sizeof alone) != 0;
        wrong += !kvcache_cut(&kv, seq, BASE + i + 1);
        free(q), free(k), free(v);
    }
    CHECK(wrong == 0);
    kvcache_close(&kv);
}

// ---- MInference ----

// column and diagonal [PAGES]: the attention that the last 64 of n tokens pay to pages and to
// distances; t is the first of the n.
static void naive_mass(Token t, int g, int n, double *column, double *diagonal) {
    for (int p = 0; p < PAGES; p++) column[p] = diagonal[p] = 0;
    for (int i = n - 64; i < n; i++) {
        for (int h = g * GROUP; h < (g + 1) * GROUP; h++) {
            Token row = {t.own + i, t.scale, t.q + i * HEADS * D, t.param, NULL, t.pairs, t.sinks};
            double sum = sink_of(&t, h);
            for (int j = 0; j <= row.own; j++) sum += exp(score_of(&row, h, j));
            for (int j = 0; j <= row.own; j++) {
                double w = exp(score_of(&row, h, j)) / sum;
                column[j / PAGE] += w, diagonal[row.own / PAGE - j / PAGE] += w;
            }
        }
    }
}

// Whether fewer than `most` of x [n] are larger than x[i].
static bool is_among(const double *x, int n, int i, double most) {
    int larger = 0;
    for (int j = 0; j < n; j++) larger += x[j] > x[i];
    return larger < most;
}

// A prompt of n tokens behind others.
static void test_minference(const char *types, int before, int n) {
    static Pairs pairs;
    KVCache kv = open_with(types, no_window, NULL);
    float *q = randoms((size_t)n * HEADS * D), *k = randoms((size_t)n * KV * D),
          *v = randoms((size_t)n * KV * D), *out = malloc((size_t)n * HEADS * D * sizeof *out);
    int seq = kvcache_new(&kv, err), wrong = 0;
    double seen = 0, read = 0;
    if (before > 0) append_random(&kv, seq, before, NULL);
    read_with(&kv, "minference", "vertical=2,slash=2");
    step(&kv, &(KVRun){seq, n}, 1, out, q, k, v);  // out is the last layer's
    for (int g = 0; g < KV; g++) {
        double column[PAGES], diagonal[PAGES];
        load_pairs(&kv, (KVHeadAt){seq, L - 1, g}, &pairs);
        Token first = {before, kv.shape.scale,    q, kv.reading.param, NULL,
                       &pairs, layer_sinks(L - 1)};
        naive_mass(first, g, n, column, diagonal);
        for (int i = 0; i < n; i++) {
            Naive naive;
            Token t = {before + i, kv.shape.scale, q + i * HEADS * D, kv.reading.param,
                       NULL,       &pairs,         first.sinks};
            int own = t.own / PAGE;
            none(&naive);
            for (int p = 0; p <= own; p++)
                if (p == 0 || own - p < 2 || is_among(column, own + 1, p, 2) ||
                    is_among(diagonal, own + 1, own - p, 2))
                    add_page(&naive, g, p);
            seen += own + 1, read += count_naive(&t, &naive, g);
            if (i % 5 == 0) wrong += count_wrong(&kv, &t, &naive, g, out + i * HEADS * D);
        }
    }
    CHECK(wrong == 0 && read < seen);
    CHECK(kv.reading.seen == 2 * seen);
    kvcache_close(&kv);
    free(q), free(k), free(v), free(out);
}

// ---- MagicPIG ----

// Two sequences that share pages but not the first one, whose mean is what hashes are centred by:
// together they read what each reads alone.
static void test_centres(void) {
    enum { WIDE = HEADS * D };
    KVCache kv = open_with("f16", no_window, NULL);
    int a = kvcache_new(&kv, err);
    append_random(&kv, a, 250, NULL);
    int b = kvcache_fork(&kv, a, err);
    uint8_t keep[L * KV * PAGE] = {0};
    CHECK(kvcache_evict(&kv, b, 0, PAGE, keep, err) == 0);
    CHECK(kvcache_head(&kv, b, 0, 0)->page[0] == kvcache_head(&kv, a, 0, 0)->page[1]);
    read_with(&kv, "magicpig", "bits=3,tables=6");
    float *q = randoms(2 * WIDE), *k = randoms(2 * KV * D), *v = randoms(2 * KV * D);
    float alone[2 * WIDE], both[2 * WIDE];
    for (int i = 0; i < 2; i++) {
        int fork = kvcache_fork(&kv, i ? b : a, err);
        step(&kv, &(KVRun){fork, 1}, 1, alone + i * WIDE, q + i * WIDE, k + i * KV * D,
             v + i * KV * D);
        kvcache_drop(&kv, fork);
    }
    step(&kv, (KVRun[]){{a, 1}, {b, 1}}, 2, both, q, k, v);
    CHECK(memcmp(alone, both, sizeof both) == 0);
    free(q), free(k), free(v);
    kvcache_close(&kv);
}

// The weights of all pairs that are sampled, over those that are always read: values are 1 in the
// pairs before the last 64 and behind the sinks, else 0, so that an output is S / (S + A).
static double sampled_sum(KVCache *kv, int seq, const float *q, const float *k) {
    float v[KV * D] = {0}, out[HEADS * D];
    int fork = kvcache_fork(kv, seq, err);
    step(kv, &(KVRun){fork, 1}, 1, out, q, k, v);
    kvcache_drop(kv, fork);
    return out[0] / (1 - out[0]);
}

static void test_magicpig(void) {
    enum { N = 250, SEEDS = 400 };
    KVCache kv = open_with("f32", no_window, NULL);
    int seq = kvcache_new(&kv, err);
    float *q = randoms((size_t)N * HEADS * D), *k = randoms((size_t)N * KV * D),
          *v = malloc((size_t)N * KV * D * sizeof *v), *out = malloc((size_t)N * HEADS * D * 4);
    for (int i = 0; i < N * KV * D; i++) v[i] = i / KV / D >= 4 && i / KV / D < N + 1 - PAGE;
    step(&kv, &(KVRun){seq, N}, 1, out, q, k, v);
    double want = sampled_sum(&kv, seq, q, k), sum = 0, squares = 0;
    for (int s = 0; s < SEEDS; s++) {
        char set[64];
        snprintf(set, sizeof set, "bits=3,tables=9,every=1000,seed=%d", s);
        read_with(&kv, "magicpig", set);
        double x = sampled_sum(&kv, seq, q, k);  // of the last layer: the first one is read in full
        sum += x, squares += x * x;
    }
    double mean = sum / SEEDS, error = sqrt((squares / SEEDS - mean * mean) / SEEDS);
    CHECK(fabs(mean - want) < 4 * error && error < 0.03 * want);
    free(q), free(k), free(v), free(out);
    kvcache_close(&kv);
}

int main(int argc, char **argv) {
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) return 1;
    const char *const types[] = {"f16", "f32", "q8", "q8/q4", "q4"};
    for (int i = 0; i < 5; i++) {
        test_life(types[i], "quest", "budget=128,layers=0", naive_quest);
        test_life(types[i], "strided", "last=1,stride=3", naive_strided);
        test_life(types[i], "topk", "clusters=3,budget=64,first=1,last=1", naive_clusters);
        test_life(types[i], "infinigen", "alpha=0.7,most=0.15,layers=0", naive_infinigen);
    }
    test_life("f16", "magicpig", "bits=4,tables=12", naive_magicpig);
    test_life("q8", "magicpig", "bits=4,tables=12", naive_magicpig);
    test_life("f32", "topk", "budget=20,first=5,last=30", naive_topk);
    test_files("f16"), test_files("q8/q4");
    static const struct {
        const char *name, *whole, *less;
    } sets[] = {{"quest", "budget=100000", "budget=64,layers=0"},
                {"topk", "budget=100000", "budget=9,first=3,last=10"},
                {"topk", "budget=100000,clusters=4", "budget=64,first=1,last=1,clusters=4"},
                {"infinigen", "alpha=1000,most=1,layers=0", "layers=0,alpha=0.5"},
                {"magicpig", "every=1", "bits=4,tables=8,every=16"},
                {"minference", "vertical=1000", "vertical=1,slash=1"},
                {"bigbird", "last=1000", "last=1,random=1"},
                {"strided", "stride=1", "last=1,stride=5"}};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        for (int t = 0; t < 4; t++) test_whole(types[t], sets[i].name, sets[i].whole);
        test_threads("f16", sets[i].name, sets[i].less);
        test_threads("q8/q4", sets[i].name, sets[i].less);
        if (strcmp(sets[i].name, "minference") != 0) test_company(sets[i].name, sets[i].less);
    }
    test_minference("f32", 0, 390);
    test_minference("f32", 100, 290);
    test_minference("f16", 37, 300);
    test_magicpig();
    test_centres();
    with_sinks = some_sinks;
    test_life("f16", "quest", "budget=128,layers=0", naive_quest);
    test_life("q8/q4", "topk", "clusters=3,budget=64,first=1,last=1", naive_clusters);
    test_life("f32", "magicpig", "bits=4,tables=12", naive_magicpig);
    test_minference("f32", 100, 290);
    with_sinks = NULL;
    return test_end("test_readers");
}
