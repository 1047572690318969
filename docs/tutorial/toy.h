// toy.h: the context that step 6 compresses, and the questions that are asked later.
//
// A fact is a pair with a key and a value like no other. All other pairs are filler: they say
// nearly the same as a hundred more of their topic. The first head holds many facts, the second
// few, so that a good choice keeps more of the first.
#ifndef TOY_H
#define TOY_H
#include "tutorial.h"

enum { N_KV_HEADS = 2, GROUP = 2, PAIRS = 512, ALL = N_KV_HEADS * PAIRS };
enum { ROWS = PAIRS * GROUP, TOPICS = 4, QUESTIONS = 200 };

typedef struct {
    float k[N_KV_HEADS][PAIRS][HEAD_DIM], v[N_KV_HEADS][PAIRS][HEAD_DIM];
    uint8_t is_fact[ALL];
    float repeat[N_KV_HEADS][ROWS][HEAD_DIM];  // queries of the repetition: each pair, GROUP times
    float question[QUESTIONS][HEAD_DIM];       // later queries; question i goes to question_head(i)
} Toy;

static inline int question_head(int i) { return i % N_KV_HEADS; }

// A query for a pair: its key and some noise.
static inline void ask_for(float *q, const float *key) {
    random_fill(q, HEAD_DIM);
    for (int i = 0; i < HEAD_DIM; i++) q[i] = 1.5f * key[i] + 0.5f * q[i];
}

// Makes a key or value nearly its topic's.
static inline void blend(float *x, const float *topic) {
    for (int i = 0; i < HEAD_DIM; i++) x[i] = topic[i] + 0.3f * x[i];
}

static inline void toy_make(Toy *toy) {
    static float key[N_KV_HEADS][TOPICS][HEAD_DIM], value[N_KV_HEADS][TOPICS][HEAD_DIM];
    random_fill(key[0][0], N_KV_HEADS * TOPICS * HEAD_DIM);
    random_fill(value[0][0], N_KV_HEADS * TOPICS * HEAD_DIM);
    random_fill(toy->k[0][0], ALL * HEAD_DIM);
    random_fill(toy->v[0][0], ALL * HEAD_DIM);
    for (int i = 0; i < ALL; i++) {
        int g = i / PAIRS, t = i % PAIRS;
        toy->is_fact[i] = random_float() < (g == 0 ? -0.4f : -0.9f);  // of [-1, 1): 30% and 5%
        if (!toy->is_fact[i]) {
            blend(toy->k[g][t], key[g][t % TOPICS]);
            blend(toy->v[g][t], value[g][t % TOPICS]);
        }
        for (int r = 0; r < GROUP; r++) ask_for(toy->repeat[g][t * GROUP + r], toy->k[g][t]);
    }
    // In turn, two questions (one a head) ask for facts and two for filler.
    for (int i = 0; i < QUESTIONS; i++) {
        int g = question_head(i), fact = i / N_KV_HEADS % 2, t;
        do {
            t = (int)((random_float() + 1.0f) / 2.0f * PAIRS);
        } while (toy->is_fact[g * PAIRS + t] != fact);
        ask_for(toy->question[i], toy->k[g][t]);
    }
}

// Compares with the largest weight of each pair by the definition, over all rows that repeat it.
static inline void toy_check_scores(const Toy *toy, const float *score) {
    static float want[ALL];
    double weight[PAIRS];
    for (int i = 0; i < N_KV_HEADS * ROWS; i++) {
        int g = i / ROWS;
        definition_weights(weight, toy->repeat[g][i % ROWS], toy->k[g][0], PAIRS, NULL);
        for (int t = 0; t < PAIRS; t++)
            want[g * PAIRS + t] = fmaxf(want[g * PAIRS + t], (float)weight[t]);
    }
    check("scores", score, want, ALL, 1e-5);
}

// |got - want| / |want|
static inline double relative_error(const float *got, const float *want) {
    float difference[HEAD_DIM];
    for (int i = 0; i < HEAD_DIM; i++) difference[i] = got[i] - want[i];
    return sqrt(dot(difference, difference) / dot(want, want));
}
#endif
