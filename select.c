// select.c: scores become the set of pairs that stay.
//
// Of a pool of n scores the k largest stay. No pool is sorted: floats map to integers of the same
// order, and two passes over a histogram of 16 bits each find the one at rank k. What must stay
// true: exactly k stay, of equals the first ones by layer, head and position, so that the same
// scores always keep the same pairs; only the authors' own rule (ref_ties) may keep fewer.
#include "select.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

// Order-preserving map of floats to integers: larger score, larger key.
static uint32_t score_key(float f) {
    uint32_t u;
    f += 0.0f;  // -0 and 0 are equal
    memcpy(&u, &f, 4);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// The key that stands at `rank` (0 = largest) among n scores: two passes over a histogram of 16
// bits each.
static uint32_t key_at_rank(const float *score, size_t n, size_t rank, size_t *hist) {
    uint32_t top = 0, low = 65535;
    memset(hist, 0, 65536 * sizeof *hist);
    for (size_t i = 0; i < n; i++) hist[score_key(score[i]) >> 16]++;
    for (top = 65535; rank >= hist[top]; top--) rank -= hist[top];
    memset(hist, 0, 65536 * sizeof *hist);
    for (size_t i = 0; i < n; i++) {
        uint32_t key = score_key(score[i]);
        if (key >> 16 == top) hist[key & 65535]++;
    }
    for (; rank >= hist[low]; low--) rank -= hist[low];
    return top << 16 | low;
}

// Exactly k of n scores, the first of equals first.
static void keep_best(uint8_t *keep, const float *score, size_t n, size_t k, size_t *hist) {
    memset(keep, 0, n);
    if (k == 0) return;
    uint32_t last = key_at_rank(score, n, k - 1, hist);
    size_t above = 0;
    for (size_t i = 0; i < n; i++) above += score_key(score[i]) > last;
    size_t ties = k - above;
    for (size_t i = 0; i < n; i++) {
        uint32_t key = score_key(score[i]);
        if (key > last || (key == last && ties > 0)) {
            ties -= key == last;
            keep[i] = 1;
        }
    }
}

// The authors' rule: above the score at rank floor(n ratio) - 1, so that one pair fewer than that
// stays, and fewer still on ties. Kept as it is: our mask equals theirs pair for pair.
static void keep_above(uint8_t *keep, const float *score, size_t n, size_t k, size_t *hist) {
    uint32_t last = key_at_rank(score, n, k > 0 ? k - 1 : 0, hist);
    for (size_t i = 0; i < n; i++) keep[i] = score_key(score[i]) > last;
}

// The best heads stay whole. 0, or -1 without memory.
static int keep_heads(uint8_t *keep, const float *score, const Selection *s, size_t *hist) {
    size_t n_heads = (size_t)s->n_layers * s->n_kv_heads, n_ctx = (size_t)s->n_ctx;
    float *best = malloc(n_heads * sizeof *best);
    uint8_t *keep_head = malloc(n_heads);
    if (best && keep_head) {
        for (size_t h = 0; h < n_heads; h++) {
            best[h] = -INFINITY;
            for (size_t t = 0; t < n_ctx; t++) best[h] = fmaxf(best[h], score[h * n_ctx + t]);
        }
        // The authors spread a head's best score over its pairs: rank k - 1 of all pairs falls on
        // head floor((k - 1) / n_ctx).
        size_t k = (size_t)((double)(n_heads * n_ctx) * s->ratio);
        if (s->ref_ties)
            keep_above(keep_head, best, n_heads, (k > 0 ? k - 1 : 0) / n_ctx + 1, hist);
        else
            keep_best(keep_head, best, n_heads, k / n_ctx, hist);
        for (size_t h = 0; h < n_heads; h++) memset(keep + h * n_ctx, keep_head[h], n_ctx);
    }
    int status = best && keep_head ? 0 : -1;
    free(best);
    free(keep_head);
    return status;
}

// The best tokens stay in all heads. 0, or -1 without memory.
static int keep_tokens(uint8_t *keep, const float *score, const Selection *s, size_t *hist) {
    size_t n_heads = (size_t)s->n_layers * s->n_kv_heads, n_ctx = (size_t)s->n_ctx;
    float *sum = malloc(n_ctx * sizeof *sum);
    for (size_t t = 0; sum && t < n_ctx; t++) {
        double x = 0;
        for (size_t h = 0; h < n_heads && !isinf(x); h++) x += score[h * n_ctx + t];
        sum[t] = (float)x;
    }
    if (sum) {
        keep_best(keep, sum, n_ctx, (size_t)((double)n_ctx * s->ratio), hist);
        for (size_t h = 1; h < n_heads; h++) memcpy(keep + h * n_ctx, keep, n_ctx);
    }
    free(sum);
    return sum ? 0 : -1;
}

// Whatever scores enough stays, and the newest pairs (DMS, arXiv 2506.05345).
static void keep_enough(uint8_t *keep, const float *score, const Selection *s) {
    size_t n_ctx = (size_t)s->n_ctx, n = (size_t)s->n_layers * s->n_kv_heads * n_ctx;
    for (size_t i = 0; i < n; i++)
        keep[i] = score[i] >= s->least || (long)(i % n_ctx) >= (long)s->n_ctx - s->newest;
}

// Infinite scores compete like others; one that is not a number cannot.
static int check_scores(const float *score, const Selection *s, char *err) {
    size_t n = (size_t)s->n_layers * s->n_kv_heads * s->n_ctx;
    for (size_t i = 0; i < n; i++) {
        if (isnan(score[i])) {
            return fail(err, "the score of pair %zu of layer %zu, head %zu is not a number",
                        i % s->n_ctx, i / s->n_ctx / s->n_kv_heads, i / s->n_ctx % s->n_kv_heads);
        }
    }
    return 0;
}

// A copy of the scores in which the best floor(safeguard * floor(n_ctx * ratio)) pairs of every
// head cannot lose, or NULL without memory; keep is scratch.
static float *safeguarded(const float *score, const Selection *s, uint8_t *keep, size_t *hist) {
    size_t n_ctx = (size_t)s->n_ctx, n = (size_t)s->n_layers * s->n_kv_heads * n_ctx;
    size_t safe = (size_t)(floor((double)n_ctx * s->ratio) * s->safeguard);
    float *copy = malloc(n * sizeof *copy);
    for (size_t i = 0; copy && i < n; i += n_ctx) keep_best(keep + i, score + i, n_ctx, safe, hist);
    for (size_t i = 0; copy && i < n; i++) copy[i] = keep[i] ? INFINITY : score[i];
    return copy;
}

// Pools of one size follow each other: all pairs, a layer's or a head's.
static void keep_pools(uint8_t *keep, const float *score, const Selection *s, size_t *hist) {
    size_t n_ctx = (size_t)s->n_ctx, n = (size_t)s->n_layers * s->n_kv_heads * n_ctx;
    size_t pool = s->level == LEVEL_PAIR    ? n
                  : s->level == LEVEL_LAYER ? s->n_kv_heads * n_ctx
                                            : n_ctx;
    bool above = s->ref_ties && (s->level == LEVEL_PAIR || s->level == LEVEL_LAYER);
    for (size_t i = 0; i < n; i += pool) {
        size_t k = s->level == LEVEL_BUDGET ? (size_t)s->budget[i / n_ctx]
                                            : (size_t)((double)pool * s->ratio);
        if (above)
            keep_above(keep + i, score + i, pool, k, hist);
        else
            keep_best(keep + i, score + i, pool, k, hist);
    }
}

long select_pairs(uint8_t *keep, const float *score, const Selection *s, char *err) {
    size_t n = (size_t)s->n_layers * s->n_kv_heads * s->n_ctx;
    if (check_scores(score, s, err) != 0) return -1;
    if (s->ref_ties && s->safeguard > 0.0)
        return fail(err, "the authors' rule for ties knows no safeguard: choose one of them");
    if (s->ratio >= 1.0 || n == 0) {
        memset(keep, 1, n);
        return (long)n;
    }
    size_t *hist = malloc(65536 * sizeof *hist);
    float *raised = NULL;
    bool failed = !hist;
    if (hist && s->level == LEVEL_HEAD) {
        failed = keep_heads(keep, score, s, hist) != 0;
    } else if (hist && s->level == LEVEL_TOKEN) {
        failed = keep_tokens(keep, score, s, hist) != 0;
    } else if (hist && s->level == LEVEL_THRESHOLD) {
        keep_enough(keep, score, s);
    } else if (hist) {
        if (s->safeguard > 0.0) failed = !(raised = safeguarded(score, s, keep, hist));
        if (!failed) keep_pools(keep, raised ? raised : score, s, hist);
    }
    free(raised);
    free(hist);
    if (failed) return fail(err, "out of memory for selecting");
    long kept = 0;
    for (size_t i = 0; i < n; i++) kept += keep[i];
    return kept;
}
