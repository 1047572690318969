// ranks.c: orders of scores.
#include "policies/ranks.h"

#include <stdlib.h>
#include <string.h>

#include "util.h"

typedef struct {
    float score;
    int t;
} Ranked;

static int by_score(const void *a, const void *b) {
    const Ranked *x = a, *y = b;
    return x->score != y->score ? (x->score > y->score ? -1 : 1) : x->t - y->t;
}

bool ranks_order(int *order, const float *score, int n) {
    Ranked *r = malloc(((size_t)n + 1) * sizeof *r);
    for (int t = 0; r && t < n; t++) r[t] = (Ranked){score[t], t};
    if (r) qsort(r, (size_t)n, sizeof *r, by_score);
    for (int i = 0; r && i < n; i++) order[i] = r[i].t;
    free(r);
    return r != NULL;
}

bool ranks_two_stages(float *out, const float *first, const float *second, int n, double share) {
    int *a = malloc(((size_t)n + 1) * 3 * sizeof *a), *b = a + n, *taken = b + n;
    float *value = malloc(((size_t)n + 1) * sizeof *value);
    bool ok = a && value && ranks_order(a, first, n) && ranks_order(b, second, n);
    for (int i = 0; ok && i < n; i++) value[i] = second[b[i]], taken[i] = 0;
    for (int k = 1, i = 0, j = 0; ok && k <= n; k++) {
        int best = share > 0 ? max_int((int)(share * k), 1) : 0, at = -1;
        if (i < best && !taken[a[i]]) at = a[i];
        if (i < best) i++;
        while (at < 0 && taken[b[j]]) j++;
        if (at < 0) at = b[j];
        taken[at] = 1;
        out[at] = value[k - 1];
    }
    free(a);
    free(value);
    return ok;
}
