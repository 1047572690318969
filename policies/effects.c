// effects.c: evicts a group of layers at a time and watches the words (effects.h).
#include "policies/effects.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "util.h"

const float effect_ratio[EFFECT_POINTS] = {0.02f, 0.1f, 0.2f, 0.3f, 0.5f};

// ---- shares ----

Effects effects_groups(int n_layers) {
    Effects e = {.n = min_int(n_layers, EFFECT_GROUPS)};
    for (int i = 0; i <= e.n; i++) e.first[i] = (int)((long)n_layers * i / max_int(e.n, 1));
    return e;
}

// Where the lower hull of effect [EFFECT_POINTS] goes on from point i: the point that the steepest
// line leads to, and that line's slope. Point EFFECT_POINTS is (1, 0).
static int hull_next(const double *effect, int i, double *slope) {
    int best = -1;
    for (int j = i + 1; j <= EFFECT_POINTS; j++) {
        double r = j < EFFECT_POINTS ? effect_ratio[j] : 1, y = j < EFFECT_POINTS ? effect[j] : 0;
        double s = (y - effect[i]) / (r - effect_ratio[i]);
        if (best < 0 || s <= *slope) best = j, *slope = s;
    }
    return best;
}

static int layers_of(const Effects *e, int i) { return e->first[i + 1] - e->first[i]; }

// Slopes only rise along a hull, so the steepest line of all groups is always the next to follow.
void effects_share(const Effects *e, double ratio, double *share) {
    int at[EFFECT_GROUPS] = {0}, n_layers = e->first[e->n];
    double left = n_layers * (ratio - fmin(ratio, effect_ratio[0]));
    for (int i = 0; i < e->n; i++) share[i] = fmin(ratio, effect_ratio[0]);
    while (left > 0) {
        int best = -1, next = 0;
        double steepest = 0;
        for (int i = 0; i < e->n; i++) {
            double slope = 0;
            int to = at[i] < EFFECT_POINTS ? hull_next(e->effect[i], at[i], &slope) : -1;
            if (to >= 0 && (best < 0 || slope / layers_of(e, i) < steepest))
                best = i, next = to, steepest = slope / layers_of(e, i);
        }
        if (best < 0) return;
        double end = next < EFFECT_POINTS ? effect_ratio[next] : 1;
        double step = fmin(end - share[best], left / layers_of(e, best));
        share[best] += step, left -= step * layers_of(e, best), at[best] = next;
    }
}

// The ratio at which p's heads [lo, hi) keep `mean` of their pairs. share [heads] is scratch, and
// holds all heads' shares there.
static void shares_where(const Profile *p, int lo, int hi, double mean, double *share) {
    double from = 0, to = 1;
    for (int i = 0; i < 50; i++) {
        double mid = 0.5 * (from + to), sum = 0;
        profile_shares(p, mid, share);
        for (int h = lo; h < hi; h++) sum += share[h];
        *(sum < mean * (hi - lo) ? &from : &to) = mid;
    }
    profile_shares(p, to, share);
}

int effects_move(const Effects *e, const Profile *p, float *share, char *err) {
    int n_heads = p->n_layers * p->n_kv_heads;
    double group[EFFECT_GROUPS], *at = malloc(((size_t)n_heads + 1) * sizeof *at);
    if (!at) return fail(err, "out of memory for the shares of %d heads", n_heads);
    for (int i = 0; i < p->n_ratios; i++) {
        effects_share(e, p->ratio[i], group);
        for (int g = 0; g < e->n; g++) {
            int lo = e->first[g] * p->n_kv_heads, hi = e->first[g + 1] * p->n_kv_heads;
            shares_where(p, lo, hi, group[g], at);
            for (int h = lo; h < hi; h++) share[(size_t)i * n_heads + h] = (float)at[h];
        }
    }
    free(at);
    return 0;
}

// ---- words ----

enum { PIECES = 2, SPAN = EFFECT_SPAN };  // repeated pieces of a context, and tokens of each

// Forks that repeat a piece, their words beside those of the full cache.
typedef struct {
    const RunState *state;
    bool keep;                       // it is the full cache: its logits are the yardstick
    float *full;                     // [SPAN][vocab_size] logits of the full cache
    double kl[EFFECT_BATCH * SPAN];  // of the tokens, fork after fork
} Words;

// ln of the sum of exp(x).
static double log_sum(const float *x, int n) {
    double sum = 0;
    float max = x[0];
    for (int i = 1; i < n; i++) max = fmaxf(max, x[i]);
    for (int i = 0; i < n; i++) sum += expf(x[i] - max);
    return log(sum) + max;
}

// Logits i of the last forward call: kept, or judged by those that were.
static void judge_words(void *ctx, int i) {
    Words *w = ctx;
    int n = w->state->model->config.vocab_size;
    const float *x = w->state->logits + (size_t)i * n;
    float *full = w->full + (size_t)(i % SPAN) * n;
    if (w->keep) {
        memcpy(full, x, (size_t)n * sizeof *x);
        return;
    }
    double own = log_sum(full, n), other = log_sum(x, n), sum = 0;
    for (int j = 0; j < n; j++) sum += expf((float)(full[j] - own)) * (full[j] - x[j]);
    w->kl[i] = fmax(sum - own + other, 0);
}

// Feeds ids [n_ids] to each of n sequences in one call.
static int feed_all(Context *c, const int *seq, int n, const int *ids, int n_ids, bool logits,
                    char *err) {
    Row row[MAX_ROWS];
    for (int i = 0; i < n * n_ids; i++) row[i] = (Row){seq[i / n_ids], ids[i % n_ids], logits};
    return forward(c->state, c->kv, row, n * n_ids, err);
}

// Feeds forks of seq [n] the ids but the last one; the last SPAN are foretold and judged.
static int say(Context *c, Words *w, const int *seq, int n, const Ids *in, char *err) {
    int fork[EFFECT_BATCH], n_forks = 0, status = 0;
    int first = in->n - 1 - SPAN, most = min_int(c->state->max_rows, MAX_ROWS) / n;
    while (n_forks < n && (fork[n_forks] = kvcache_fork(c->kv, seq[n_forks], err)) >= 0) n_forks++;
    if (n_forks < n) status = -1;
    for (int i = 0, some; i < first && status == 0; i += some) {
        some = min_int(first - i, most);
        status = feed_all(c, fork, n, in->id + i, some, false, err);
    }
    if (status == 0) status = feed_all(c, fork, n, in->id + first, SPAN, true, err);
    if (status == 0) parallel_for(c->state->pool, n * SPAN, judge_words, w);
    while (n_forks > 0) kvcache_drop(c->kv, fork[--n_forks]);
    return status;
}

// The context itself and then all forks, some at a time, repeat the piece of SPAN tokens at a.
static int try_piece(Trial *t, Words *w, int a, char *err) {
    Context *c = t->c;
    Ids in = {0};
    int batch = min_int(c->state->max_logits / SPAN, EFFECT_BATCH);
    int status = kvzip_repeat_input(c, a, a + SPAN, &in) == 0 ? 0 : fail(err, "out of memory");
    for (int i = -1, n; i < t->n && status == 0; i += n) {
        w->keep = i < 0;
        n = i < 0 ? 1 : min_int(t->n - i, batch);
        status = say(c, w, i < 0 ? &c->seq : t->seq + i, n, &in, err);
        t->fed += (long)n * (in.n - 1);
        if (status == 0 && c->progress && c->progress(c->progress_arg, "effects", t->fed, 0) != 0)
            status = fail(err, "interrupted");
        for (int j = 0; j < n * SPAN && i >= 0; j++) t->kl[i + j / SPAN] += w->kl[j];
    }
    ids_free(&in);
    return status;
}

bool trial_fits(int n_ctx) { return n_ctx >= 4 * SPAN; }

long trial_tokens(int n) { return (n + 1L) * PIECES * (SPAN + 24); }

int trial_run(Trial *t, char *err) {
    Context *c = t->c;
    Words w = {.state = c->state};
    int room = c->n_ctx - 2 * SPAN, status = 0;
    w.full = malloc((size_t)SPAN * c->state->model->config.vocab_size * sizeof *w.full);
    if (!w.full) return fail(err, "out of memory for the logits of %d tokens", SPAN);
    for (int i = 0; i < t->n; i++) t->kl[i] = 0;
    for (int p = 0; p < PIECES && status == 0; p++) {
        int a = SPAN + (int)((long)room * p / (PIECES - 1));
        status = try_piece(t, &w, a, err);
    }
    for (int i = 0; i < t->n; i++) t->kl[i] /= PIECES * SPAN;
    free(w.full);
    return status;
}

// ---- effects ----

// A context of which groups are evicted.
typedef struct {
    const Effects *e;
    const Context *c;
    const float *score;  // [context_scores(c)]
    uint8_t *keep;       // [context_scores(c)] scratch
} Evicting;

// A fork in which group g keeps the best of its pairs at this ratio, and the others all; or -1 with
// err.
static int evict_group(const Evicting *v, int g, double ratio, char *err) {
    const KVShape *shape = &v->c->kv->shape;
    int n_kv_heads = shape->n_kv_heads, n_ctx = v->c->n_ctx, first = v->e->first[g];
    Selection s = {.n_layers = layers_of(v->e, g),
                   .n_kv_heads = n_kv_heads,
                   .n_ctx = n_ctx,
                   .ratio = ratio,
                   .level = LEVEL_PAIR};
    if (select_pairs(v->keep, v->score + (size_t)first * n_kv_heads * n_ctx, &s, err) < 0)
        return -1;
    int seq = kvcache_fork(v->c->kv, v->c->seq, err);
    for (int h = 0; seq >= 0 && h < s.n_layers * n_kv_heads; h++) {
        KVHeadAt at = {seq, kvcache_scored_layer(shape, first + h / n_kv_heads), h % n_kv_heads};
        KVSpan span = {v->c->n_prefix, n_ctx};
        if (kvcache_evict_head(v->c->kv, at, span, v->keep + (size_t)h * n_ctx, err) != 0)
            return -1;
    }
    return seq;
}

int effects_add(Effects *e, Context *c, const float *score, double weight, char *err) {
    Evicting v = {e, c, score, malloc(context_scores(c) + 1)};
    int seq[EFFECT_GROUPS * EFFECT_POINTS], status = 0;
    double kl[EFFECT_GROUPS * EFFECT_POINTS];
    Trial t = {.c = c, .seq = seq, .n = e->n * EFFECT_POINTS, .kl = kl};
    if (!v.keep) return fail(err, "out of memory for selecting");
    for (int i = 0; i < t.n && status == 0; i++) {
        seq[i] = evict_group(&v, i / EFFECT_POINTS, effect_ratio[i % EFFECT_POINTS], err);
        if (seq[i] < 0) status = -1;
    }
    if (status == 0) status = trial_run(&t, err);
    for (int i = 0; i < t.n && status == 0; i++) {
        e->effect[i / EFFECT_POINTS][i % EFFECT_POINTS] += weight * kl[i];
        kvcache_drop(c->kv, seq[i]);
    }
    free(v.keep);
    return status;
}

bool effects_pay(double (*kl)[2], int n) {
    double sum[2] = {0};
    int less = 0;
    for (int i = 0; i < n; i++) {
        sum[0] += kl[i][0], sum[1] += kl[i][1];
        less += kl[i][1] < kl[i][0];
    }
    return sum[1] < 0.75 * sum[0] && 4 * less >= 3 * n;
}
