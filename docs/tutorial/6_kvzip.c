// 6_kvzip.c: scoring and eviction of KVzip (arXiv 2505.23416) on a toy context.
//
// The context is repeated: every pair is asked for once, by queries like those of a model that
// writes the context down again. A pair's score is the largest weight that any of them gives it.
// The best pairs of all heads together stay, so heads end up with different lengths. No later
// question is known when the scores are taken.
#include "toy.h"

enum { PAGE = 64 };

typedef struct {
    float k[HEAD_DIM][PAGE], v[PAGE][HEAD_DIM];
} Page;

typedef struct {
    Page *page[PAIRS / PAGE];
    int len;
} Head;

static Toy toy;  // its keys, values and queries

// ---- pages and attention (step 4) ----

static int pages_used(const Head *h) { return (h->len + PAGE - 1) / PAGE; }

static void append(Head *h, const float *key, const float *value) {
    Page **last = &h->page[h->len / PAGE];
    int c = h->len++ % PAGE;
    if (c == 0) require((*last = calloc(1, sizeof **last)) != NULL, "memory for a page");
    for (int i = 0; i < HEAD_DIM; i++) (*last)->k[i][c] = key[i];
    memcpy((*last)->v[c], value, sizeof(*last)->v[c]);
}

// s [PAGE] = q . k / sqrt(HEAD_DIM) for the pairs of page p, -inf where there is none.
static void page_scores(float *s, const float *q, const Head *h, int p) {
    memset(s, 0, PAGE * sizeof *s);
    for (int i = 0; i < HEAD_DIM; i++) {
        for (int c = 0; c < PAGE; c++) s[c] += q[i] / sqrtf(HEAD_DIM) * h->page[p]->k[i][c];
    }
    for (int c = h->len - p * PAGE; c < PAGE; c++) s[c] = -INFINITY;
}

// out [HEAD_DIM]; returns the log-sum-exp of the scores: a pair of score s weighs exp(s - lse).
static float attend(float *out, const float *q, const Head *h) {
    float s[PAGE], max = -INFINITY, sum = 0.0f;
    memset(out, 0, HEAD_DIM * sizeof *out);
    for (int p = 0; p < pages_used(h); p++) {
        float old = max;
        page_scores(s, q, h, p);
        for (int c = 0; c < PAGE; c++) max = fmaxf(max, s[c]);
        sum *= expf(old - max);
        for (int i = 0; i < HEAD_DIM; i++) out[i] *= expf(old - max);
        for (int c = 0; c < PAGE; c++) {
            float weight = expf(s[c] - max);
            sum += weight;
            for (int i = 0; i < HEAD_DIM; i++) out[i] += weight * h->page[p]->v[c][i];
        }
    }
    for (int i = 0; i < HEAD_DIM; i++) out[i] /= sum;
    return max + logf(sum);
}

// ---- scoring, selecting, evicting ----

// score [PAIRS]: the largest weight of each pair over all rows of the repetition. The first pass is
// attention as ever and leaves one number a row; the sweep over the pages then needs no exp.
static void score_pairs(float *score, float (*q)[HEAD_DIM], const Head *h) {
    float lse[ROWS], out[HEAD_DIM], s[PAGE];
    for (int r = 0; r < ROWS; r++) lse[r] = attend(out, q[r], h);
    for (int p = 0; p < pages_used(h); p++) {
        float best[PAGE];
        for (int c = 0; c < PAGE; c++) best[c] = -INFINITY;
        for (int r = 0; r < ROWS; r++) {
            page_scores(s, q[r], h, p);
            for (int c = 0; c < PAGE; c++) best[c] = fmaxf(best[c], s[c] - lse[r]);
        }
        for (int c = 0; c < PAGE; c++) score[p * PAGE + c] = expf(best[c]);
    }
}

typedef struct {
    float score;
    int pair;  // head * PAIRS + its number in the head
} Ranked;

static int larger_first(const void *a, const void *b) {
    const Ranked *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    return x->pair - y->pair;
}

// keep [ALL] = 1 for the n_keep pairs with the largest scores of all heads together.
static void select_best(uint8_t *keep, const float *score, int n_keep) {
    static Ranked rank[ALL];
    for (int i = 0; i < ALL; i++) rank[i] = (Ranked){score[i], i};
    qsort(rank, ALL, sizeof *rank, larger_first);
    for (int i = 0; i < ALL; i++) keep[rank[i].pair] = i < n_keep;
}

// The first len pairs stay; pages that are left over are freed.
static void cut(Head *h, int len) {
    int pages = pages_used(h);
    h->len = len;
    for (int p = pages_used(h); p < pages; p++) free(h->page[p]);
}

// Pairs with keep = 0 go, the others slide left, into places that have been read already.
static void evict(Head *h, const uint8_t *keep) {
    int n = 0;
    for (int t = 0; t < h->len; t++) {
        if (!keep[t]) continue;
        const Page *from = h->page[t / PAGE];
        Page *to = h->page[n / PAGE];
        for (int i = 0; i < HEAD_DIM; i++) to->k[i][n % PAGE] = from->k[i][t % PAGE];
        memmove(to->v[n % PAGE], from->v[t % PAGE], sizeof to->v[0]);
        n++;
    }
    cut(h, n);
}

// ---- what it is worth ----

static void read_context(Head *head) {
    for (int i = 0; i < ALL; i++)
        append(&head[i / PAIRS], toy.k[i / PAIRS][i % PAIRS], toy.v[i / PAIRS][i % PAIRS]);
}

static long bytes_of(const Head *head) {
    long pages = 0;
    for (int g = 0; g < N_KV_HEADS; g++) pages += pages_used(&head[g]);
    return pages * (long)sizeof(Page);
}

// Mean relative error of the answers to the later questions, against answers from the whole cache.
// They must be what the definition says of the pairs that were kept.
static double ask(const Head *head, const uint8_t *keep) {
    static float answer[QUESTIONS][HEAD_DIM], want[QUESTIONS][HEAD_DIM], whole[HEAD_DIM];
    double error = 0.0;
    for (int i = 0; i < QUESTIONS; i++) {
        int g = question_head(i);
        const float *q = toy.question[i], *k = toy.k[g][0], *v = toy.v[g][0];
        attend(answer[i], q, &head[g]);
        definition(want[i], q, k, v, PAIRS, keep + g * PAIRS);
        definition(whole, q, k, v, PAIRS, NULL);
        error += relative_error(answer[i], whole) / QUESTIONS;
    }
    check("answers over what is left", answer[0], want[0], QUESTIONS * HEAD_DIM, 1e-5);
    return error;
}

// Evicts all but 30% of the pairs, those with the largest scores; returns the error of answers.
static double compress(const char *name, const float *score) {
    uint8_t keep[ALL];
    Head head[N_KV_HEADS] = {{{0}, 0}};
    int facts = 0, kept = 0;
    read_context(head);
    long before = bytes_of(head);
    select_best(keep, score, ALL * 3 / 10);
    for (int g = 0; g < N_KV_HEADS; g++) evict(&head[g], keep + g * PAIRS);
    for (int i = 0; i < ALL; i++) facts += toy.is_fact[i], kept += toy.is_fact[i] && keep[i];
    printf("%s: heads of %d and %d pairs, %d of %d facts, %ld KB instead of %ld KB\n", name,
           head[0].len, head[1].len, kept, facts, bytes_of(head) >> 10, before >> 10);
    double error = ask(head, keep);
    printf("%s: answers are off by %.1f%%\n", name, 100.0 * error);
    for (int g = 0; g < N_KV_HEADS; g++) cut(&head[g], 0);
    return error;
}

int main(void) {
    float score[ALL], any[ALL];
    Head head[N_KV_HEADS] = {{{0}, 0}};
    toy_make(&toy);
    read_context(head);
    for (int g = 0; g < N_KV_HEADS; g++) score_pairs(score + g * PAIRS, toy.repeat[g], &head[g]);
    for (int g = 0; g < N_KV_HEADS; g++) cut(&head[g], 0);
    toy_check_scores(&toy, score);
    for (int i = 0; i < ALL; i++) any[i] = random_float();
    double kvzip = compress("KVzip", score), chance = compress("chance", any);
    require(kvzip < chance / 4, "KVzip's answers are closer than those of chance");
    return 0;
}
