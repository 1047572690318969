// sampling.c: how a token is drawn from logits: biases, penalties, cuts, temperature, chance.
#include "sampling.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>

#include "util.h"

int likeliest(const float *logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

static bool penalizes(const Sampling *s) {
    bool repeats = s->repeat_penalty != 0 && s->repeat_penalty != 1;
    return s->last_n != 0 && (repeats || s->frequency_penalty != 0 || s->presence_penalty != 0);
}

bool sampling_is_plain(const Sampling *s) {
    return !s || (s->temp == 0 && s->n_bias == 0 && !penalizes(s));
}

// In [0, 1).
static double random_share(uint64_t *state) { return (double)(random_next(state) >> 11) * 0x1p-53; }

// ---- logits ----

// The formula of llama.cpp (llama_sampler_penalties_apply). A token is met as often as it came; the
// last time it has been counted whole, so each is changed once.
static void penalize(const Sampling *s, const Draw *d, Choice *c) {
    int total = d->n_past[0] + d->n_past[1];
    int from = s->last_n < 0 || s->last_n > total ? 0 : total - s->last_n;
    float repeat = s->repeat_penalty != 0 ? (float)s->repeat_penalty : 1;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = from; i < total; i++) {
            Choice *at = &c[i < d->n_past[0] ? d->past[0][i] : d->past[1][i - d->n_past[0]]];
            if (pass == 0) at->p++;
            if (pass == 0 || at->p == 0) continue;
            at->logit = at->logit <= 0 ? at->logit * repeat : at->logit / repeat;
            at->logit -= at->p * (float)s->frequency_penalty + (float)s->presence_penalty;
            at->p = 0;
        }
    }
}

// All that may be drawn, in the order of their ids, with the logits that count; returns how many.
static int fill_choices(const Sampling *s, const Draw *d, Choice *c) {
    int n = 0;
    for (int i = 0; i < d->n; i++) c[i] = (Choice){.logit = d->logits[i], .id = i};
    for (int i = 0; s && i < s->n_bias; i++) c[s->bias[i].id].logit += s->bias[i].value;
    if (s && penalizes(s)) penalize(s, d, c);
    if (!d->allowed) return d->n;
    for (int i = 0; i < d->n; i++)
        if (d->allowed[i / 64] >> (i % 64) & 1) c[n++] = c[i];
    return n;
}

// ---- cuts ----

static bool before(const Choice *x, const Choice *y) {
    return x->logit != y->logit ? x->logit > y->logit : x->id < y->id;
}

// Moves c[i] down to its place in a heap [n] whose first is the least likely.
static void sift(Choice *c, int i, int n) {
    for (int low; (low = 2 * i + 1) < n; i = low) {
        if (low + 1 < n && before(&c[low], &c[low + 1])) low++;
        if (!before(&c[i], &c[low])) return;
        Choice moved = c[i];
        c[i] = c[low], c[low] = moved;
    }
}

// Moves the k likeliest to the front; returns how many there are. Time O(n log k).
static int cut_top_k(Choice *c, int n, int k) {
    if (k == 0 || k >= n) return n;
    for (int i = k / 2; i >= 0; i--) sift(c, i, k);
    for (int i = k; i < n; i++) {
        if (!before(&c[i], &c[0])) continue;
        c[0] = c[i];
        sift(c, 0, k);
    }
    return k;
}

static int by_share(const void *a, const void *b) {
    const Choice *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->id - y->id;
}

// Keeps the likeliest choices that together reach top_p (nucleus sampling, arXiv 1904.09751);
// returns how many. What is below an even share of the rest cannot be among them, so that few are
// sorted (llama2.c).
static int cut_top_p(Choice *c, int n, double sum, double top_p) {
    double least = n > 1 ? (1 - top_p) / (n - 1) * sum : 0, reached = 0;
    int kept = 0, taken = 0;
    for (int i = 0; i < n; i++)
        if (c[i].p >= least) c[kept++] = c[i];
    qsort(c, (size_t)kept, sizeof *c, by_share);
    while (taken < kept && (taken == 0 || reached < top_p * sum)) reached += c[taken++].p;
    return taken;
}

// Keeps those with a share of at least min_p of the likeliest one's, which is 1 (arXiv 2407.01082);
// returns how many.
static int cut_min_p(Choice *c, int n, double min_p) {
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (c[i].p >= min_p) c[kept++] = c[i];
    return kept;
}

// ---- drawing ----

// Weights at a temperature, that of a choice with logit `best` being 1; returns their sum.
static double weigh(Choice *c, int n, float best, double temp) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        c[i].p = expf((c[i].logit - best) / (float)temp);
        sum += c[i].p;
    }
    return sum;
}

int sampling_draw(Sampling *s, const Draw *d) {
    Choice *c = d->scratch;
    int n = fill_choices(s, d, c);
    if (n == 0) return -1;
    Choice best = c[0];
    for (int i = 1; i < n; i++)
        if (c[i].logit > best.logit) best = c[i];
    if (!s || s->temp == 0) return best.id;
    n = cut_top_k(c, n, s->top_k);
    double sum = weigh(c, n, best.logit, s->temp_last ? 1 : s->temp);
    if (s->top_p < 1) n = cut_top_p(c, n, sum, s->top_p);
    if (s->min_p > 0) n = cut_min_p(c, n, s->min_p);
    sum = weigh(c, n, best.logit, s->temp);
    double at = random_share(&s->random) * sum;
    for (int i = 0; i < n; i++)
        if ((at -= c[i].p) < 0) return c[i].id;
    return best.id;
}

Sampling sampling_nth(const Sampling *s, int i) {
    Sampling own = *s;
    if (i > 0) own.random = hash_bytes(own.random ^ HASH_START, &i, sizeof i);
    return own;
}

int sampling_check(const Sampling *s, int vocab, char *err) {
    const struct {
        const char *name;
        double value, lo, hi;
    } settings[] = {{"temperature", s->temp, 0, 100},
                    {"top_p", s->top_p, 0, 1},
                    {"top_k", s->top_k, 0, INT_MAX},
                    {"min_p", s->min_p, 0, 1},
                    {"repeat_last_n", s->last_n, -1, INT_MAX},
                    {"repeat_penalty", s->repeat_penalty, 0, 100},
                    {"frequency_penalty", s->frequency_penalty, -2, 2},
                    {"presence_penalty", s->presence_penalty, -2, 2}};
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        if (!(settings[i].value >= settings[i].lo && settings[i].value <= settings[i].hi))
            return fail(err, "%s is %.10g, it goes from %.10g to %.10g", settings[i].name,
                        settings[i].value, settings[i].lo, settings[i].hi);
    if (s->n_bias > MAX_BIASES)
        return fail(err, "logit_bias: %d tokens, %d are the most", s->n_bias, MAX_BIASES);
    for (int i = 0; i < s->n_bias; i++) {
        Bias b = s->bias[i];
        if (b.id < 0 || b.id >= vocab)
            return fail(err, "logit_bias: token %d is not in the vocabulary of %d", b.id, vocab);
        if (!(b.value >= -100 && b.value <= 100))
            return fail(err, "logit_bias: token %d has %g, it goes from -100 to 100", b.id,
                        b.value);
    }
    return 0;
}
