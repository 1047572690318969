// 2_online.c: the same result from one pass over the pairs: the online softmax of arXiv 1805.02867.
//
// Step 1 had to know the largest score before its first exp. Here the largest score so far is
// enough: when a larger one comes, what has been summed up is multiplied by exp(old - new), after
// which it is what it would have been with the new maximum from the start. No room for weights is
// needed, and results of two parts of the pairs can be merged.
#include "tutorial.h"

enum { PAIRS = 1000 };

typedef struct {
    float max;          // largest score so far, -inf before the first
    float sum;          // sum of exp(score - max)
    float o[HEAD_DIM];  // sum of exp(score - max) v
    int raised;         // how often max has risen
} Online;

static Online online_start(void) { return (Online){.max = -INFINITY}; }

// What is subtracted before exp: the maximum, or nothing while all scores have been -inf, because
// -inf - -inf is not a number.
static float shift(float max) { return max == -INFINITY ? 0.0f : max; }

// The sums become what they would be with the maximum `max`, which is not below their own.
static void raise_max(Online *a, float max) {
    float shrink = expf(a->max - shift(max));  // exp(-inf) = 0: nothing has been summed up yet
    a->sum *= shrink;
    for (int i = 0; i < HEAD_DIM; i++) a->o[i] *= shrink;
    a->max = max;
}

static void online_add(Online *a, float score, const float *v) {
    if (score > a->max) {
        raise_max(a, score);
        a->raised++;
    }
    float weight = expf(score - shift(a->max));  // 0 for a score of -inf
    a->sum += weight;
    for (int i = 0; i < HEAD_DIM; i++) a->o[i] += weight * v[i];
}

// a becomes the result of its own pairs and b's.
static void online_merge(Online *a, Online b) {
    float max = fmaxf(a->max, b.max);
    raise_max(a, max);
    raise_max(&b, max);
    a->sum += b.sum;
    for (int i = 0; i < HEAD_DIM; i++) a->o[i] += b.o[i];
}

// Pairs [from, to); visible may be NULL. A hidden pair gets the score -inf.
static void attend(Online *a, const float *q, const float *k, const float *v, int from, int to,
                   const uint8_t *visible) {
    for (int t = from; t < to; t++) {
        float score = dot(q, k + t * HEAD_DIM) / sqrtf(HEAD_DIM);
        if (visible && !visible[t]) score = -INFINITY;
        online_add(a, score, v + t * HEAD_DIM);
    }
}

static void check_online(const char *what, const Online *a, const float *want) {
    float out[HEAD_DIM];
    for (int i = 0; i < HEAD_DIM; i++) out[i] = a->o[i] / a->sum;
    check(what, out, want, HEAD_DIM, 1e-5);
}

int main(void) {
    static float q[HEAD_DIM], k[PAIRS * HEAD_DIM], v[PAIRS * HEAD_DIM], want[HEAD_DIM];
    static uint8_t visible[PAIRS];
    random_fill(q, HEAD_DIM);
    random_fill(k, PAIRS * HEAD_DIM);
    random_fill(v, PAIRS * HEAD_DIM);

    Online all = online_start();
    attend(&all, q, k, v, 0, PAIRS, NULL);
    definition(want, q, k, v, PAIRS, NULL);
    printf("the maximum rose %d times in %d pairs\n", all.raised, PAIRS);
    check_online("one pass", &all, want);

    Online first = online_start(), second = online_start();
    attend(&first, q, k, v, 0, 400, NULL);
    attend(&second, q, k, v, 400, PAIRS, NULL);
    online_merge(&first, second);
    check_online("two parts, merged", &first, want);

    for (int t = 400; t < PAIRS; t++) visible[t] = 1;
    definition(want, q, k, v, PAIRS, visible);
    Online hidden = online_start(), rest = online_start();
    attend(&hidden, q, k, v, 0, 400, visible);  // sees nothing at all: max -inf, sum 0
    attend(&rest, q, k, v, 400, PAIRS, visible);
    online_merge(&hidden, rest);
    check_online("the first 400 hidden", &hidden, want);
    return 0;
}
