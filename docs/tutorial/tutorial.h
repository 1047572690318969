// tutorial.h: what the six programs share: random numbers, a clock, the definition of attention,
// and checks against it.
//
// The definition is the formula softmax(q . k / sqrt(head_dim)) v, word for word and in double.
// Every faster way in this folder has to agree with it up to the rounding of floats.
#ifndef TUTORIAL_H
#define TUTORIAL_H
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { HEAD_DIM = 64 };  // numbers in a query, a key or a value

// A number in [-1, 1), the same ones in every run: splitmix64 (Steele, Lea, Flood, 2014).
static inline float random_float(void) {
    static uint64_t state;
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (float)((z ^ z >> 31) >> 40) / (1 << 23) - 1.0f;
}

// n random numbers of mean 0 and variance 1, so that scores have about mean 0 and variance 1.
static inline void random_fill(float *x, int n) {
    for (int i = 0; i < n; i++) x[i] = sqrtf(3.0f) * random_float();
}

static inline double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline float dot(const float *a, const float *b) {
    float sum = 0.0f;
    for (int i = 0; i < HEAD_DIM; i++) sum += a[i] * b[i];
    return sum;
}

// Ends the program with status 1 unless ok.
static inline void require(bool ok, const char *what) {
    if (ok) return;
    printf("FAILED: %s\n", what);
    exit(1);
}

// weight[t] = exp(q . k_t / sqrt(HEAD_DIM)), divided by the sum of all; k [n][HEAD_DIM]. Only pairs
// with visible[t] take part, the others weigh 0; visible may be NULL: all do.
static inline void definition_weights(double *weight, const float *q, const float *k, int n,
                                      const uint8_t *visible) {
    double sum = 0.0;
    for (int t = 0; t < n; t++) {
        double s = 0.0;
        for (int i = 0; i < HEAD_DIM; i++) s += (double)q[i] * k[t * HEAD_DIM + i];
        weight[t] = !visible || visible[t] ? exp(s / sqrt(HEAD_DIM)) : 0.0;
        sum += weight[t];
    }
    for (int t = 0; t < n; t++) weight[t] /= sum;
}

// out [HEAD_DIM] = sum of weight[t] v_t; v [n][HEAD_DIM].
static inline void definition(float *out, const float *q, const float *k, const float *v, int n,
                              const uint8_t *visible) {
    double *weight = malloc((size_t)n * sizeof *weight);
    require(weight != NULL, "out of memory");
    definition_weights(weight, q, k, n, visible);
    for (int i = 0; i < HEAD_DIM; i++) {
        double sum = 0.0;
        for (int t = 0; t < n; t++) sum += weight[t] * v[t * HEAD_DIM + i];
        out[i] = (float)sum;
    }
    free(weight);
}

// Prints how far got is from want, both [n], at most; ends the program when that is above limit.
static inline void check(const char *what, const float *got, const float *want, int n,
                         double limit) {
    double worst = 0.0;
    bool ok = true;
    for (int i = 0; i < n; i++) {
        double difference = fabs((double)got[i] - want[i]);
        worst = fmax(worst, difference);
        ok &= difference <= limit;  // false for a NaN, which fmax passes over
    }
    printf("%s: differs from the definition by %.1e at most\n", what, worst);
    require(ok, what);
}
#endif
