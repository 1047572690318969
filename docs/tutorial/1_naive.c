// 1_naive.c: attention of one query over the pairs of all past tokens, as it is defined.
//
// Each past token has left a pair: a key, which says what it can be found by, and a value, which
// is what it has to tell. The query of the token at hand is compared with every key; the better a
// key fits, the more its value weighs in the result. Step 1 does this in three loops over the
// pairs and needs room for one number of each of them.
#include "tutorial.h"

enum { PAIRS = 1000 };

// out [HEAD_DIM] = softmax(q . k / sqrt(HEAD_DIM)) v; k, v [n][HEAD_DIM]; the weights go to
// weight [n].
static void attend(float *out, float *weight, const float *q, const float *k, const float *v,
                   int n) {
    float max = -INFINITY, sum = 0.0f;
    for (int t = 0; t < n; t++) {
        weight[t] = dot(q, k + t * HEAD_DIM) / sqrtf(HEAD_DIM);
        max = fmaxf(max, weight[t]);
    }
    for (int t = 0; t < n; t++) {
        weight[t] = expf(weight[t] - max);
        sum += weight[t];
    }
    memset(out, 0, HEAD_DIM * sizeof *out);
    for (int t = 0; t < n; t++) {
        weight[t] /= sum;
        for (int i = 0; i < HEAD_DIM; i++) out[i] += weight[t] * v[t * HEAD_DIM + i];
    }
}

static void describe(const float *weight) {
    float largest = 0.0f, sum = 0.0f;
    for (int t = 0; t < PAIRS; t++) {
        largest = fmaxf(largest, weight[t]);
        sum += weight[t];
    }
    printf("weights: they sum to %.4f, the largest is %.4f, the average %.4f\n", sum, largest,
           1.0 / PAIRS);
}

int main(void) {
    static float q[HEAD_DIM], k[PAIRS * HEAD_DIM], v[PAIRS * HEAD_DIM], weight[PAIRS];
    float out[HEAD_DIM], want[HEAD_DIM];
    random_fill(q, HEAD_DIM);
    random_fill(k, PAIRS * HEAD_DIM);
    random_fill(v, PAIRS * HEAD_DIM);

    attend(out, weight, q, k, v, PAIRS);
    definition(want, q, k, v, PAIRS, NULL);
    describe(weight);
    check("one query, 1000 pairs", out, want, HEAD_DIM, 1e-5);

    // Scores beyond 100: exp of one would be too large for a float, exp(score - max) is not.
    for (int i = 0; i < HEAD_DIM; i++) q[i] *= 50.0f;
    attend(out, weight, q, k, v, PAIRS);
    definition(want, q, k, v, PAIRS, NULL);
    describe(weight);
    check("a query 50 times as long", out, want, HEAD_DIM, 1e-3);
    return 0;
}
