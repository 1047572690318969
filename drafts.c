// drafts.c: looking the last tokens up in what came before.
#include "drafts.h"

#include "util.h"

enum { SHORTEST = 2, LONGEST = 8 };  // ends that are looked up

static int id_at(const DraftText *t, int i) {
    int part = 0;
    while (i >= t->n[part]) i -= t->n[part++];
    return t->id[part][i];
}

// How many tokens up to place i are those up to the end.
static int matched(const DraftText *t, int i, int n) {
    int m = 0;
    while (m < LONGEST && m <= i && id_at(t, i - m) == id_at(t, n - 1 - m)) m++;
    return m;
}

int draft_guess(const DraftText *t, int most, int *guess) {
    int n = t->n[0] + t->n[1] + t->n[2], best = -1, longest = SHORTEST - 1, n_guess = 0;
    if (n <= SHORTEST) return 0;
    int last = id_at(t, n - 1), end = n - 1;  // the end itself is no earlier place
    for (int part = 2, before = t->n[0] + t->n[1]; part >= 0 && longest < LONGEST; part--) {
        for (int i = min_int(t->n[part], end - before) - 1; i >= 0 && longest < LONGEST; i--) {
            if (t->id[part][i] != last) continue;
            int m = matched(t, before + i, n);
            if (m > longest) longest = m, best = before + i;
        }
        before -= part > 0 ? t->n[part - 1] : 0;
    }
    for (int i = best + 1; best >= 0 && i < n && n_guess < most; i++)
        guess[n_guess++] = id_at(t, i);
    return n_guess;
}
