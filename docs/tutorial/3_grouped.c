// 3_grouped.c: query heads that share a kv head pass over its pairs together (arXiv 2305.13245).
//
// A layer has several query heads, each with a query of its own. In grouped-query attention a few
// of them, here four, share one kv head, that is one list of keys and values. Taken one by one they
// read that list four times. Taken together they read it once: a pair is fetched and used by all
// four before the next one.
#include "tutorial.h"

enum { PAIRS = 4000, N_HEADS = 8, N_KV_HEADS = 2, GROUP = N_HEADS / N_KV_HEADS };

static float q[N_HEADS][HEAD_DIM];
static float k[N_KV_HEADS][PAIRS][HEAD_DIM], v[N_KV_HEADS][PAIRS][HEAD_DIM];
static long bytes_read;  // of keys and values

typedef struct {
    float max, sum, o[HEAD_DIM];
} Online;

// Step 2's online softmax.
static void online_add(Online *a, float score, const float *value) {
    if (score > a->max) {
        float shrink = expf(a->max - score);
        a->sum *= shrink;
        for (int i = 0; i < HEAD_DIM; i++) a->o[i] *= shrink;
        a->max = score;
    }
    float weight = expf(score - a->max);
    a->sum += weight;
    for (int i = 0; i < HEAD_DIM; i++) a->o[i] += weight * value[i];
}

// Counts the bytes of pair t of kv head g as it is fetched.
static void fetch_pair(int g, int t) { bytes_read += (long)(sizeof k[g][t] + sizeof v[g][t]); }

// Query head after query head: a kv head is read GROUP times.
static void attend_each(Online *a) {
    for (int h = 0; h < N_HEADS; h++) {
        int g = h / GROUP;
        for (int t = 0; t < PAIRS; t++) {
            fetch_pair(g, t);
            online_add(&a[h], dot(q[h], k[g][t]) / sqrtf(HEAD_DIM), v[g][t]);
        }
    }
}

// kv head after kv head: it is read once, for the GROUP query heads that share it.
static void attend_grouped(Online *a) {
    for (int g = 0; g < N_KV_HEADS; g++) {
        for (int t = 0; t < PAIRS; t++) {
            fetch_pair(g, t);
            for (int h = g * GROUP; h < (g + 1) * GROUP; h++)
                online_add(&a[h], dot(q[h], k[g][t]) / sqrtf(HEAD_DIM), v[g][t]);
        }
    }
}

// Runs one of the two, checks all heads and returns how many bytes it read.
static long measure(const char *what, void (*attend)(Online *a)) {
    static Online a[N_HEADS];
    static float out[N_HEADS][HEAD_DIM], want[N_HEADS][HEAD_DIM];
    for (int h = 0; h < N_HEADS; h++) a[h] = (Online){.max = -INFINITY};
    bytes_read = 0;
    attend(a);
    for (int h = 0; h < N_HEADS; h++) {
        for (int i = 0; i < HEAD_DIM; i++) out[h][i] = a[h].o[i] / a[h].sum;
        definition(want[h], q[h], k[h / GROUP][0], v[h / GROUP][0], PAIRS, NULL);
    }
    check(what, out[0], want[0], N_HEADS * HEAD_DIM, 1e-5);
    return bytes_read;
}

int main(void) {
    long cache = (long)(sizeof k + sizeof v);
    random_fill(q[0], N_HEADS * HEAD_DIM);
    random_fill(k[0][0], N_KV_HEADS * PAIRS * HEAD_DIM);
    random_fill(v[0][0], N_KV_HEADS * PAIRS * HEAD_DIM);
    long each = measure("head by head", attend_each);
    long grouped = measure("group by group", attend_grouped);
    printf("%d query heads, %d tokens: the cache is %ld KB with %d kv heads, %ld KB with %d\n",
           N_HEADS, PAIRS, cache / 1000, N_KV_HEADS, GROUP * cache / 1000, N_HEADS);
    printf("read for one more token: %ld KB head by head, %ld KB group by group\n", each / 1000,
           grouped / 1000);
    require(grouped == cache && each == GROUP * cache, "every pair is read once for its group");
    return 0;
}
