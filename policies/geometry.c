// geometry.c: methods that look at keys, values and positions alone. No query is asked, so that
// they work on any pages, whole contexts or sequences that are evicted while they grow.
//
// Places are counted in the head's list: of a whole context they are positions.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "util.h"

// Of a counter, so that neither threads nor other heads change a head's numbers.
static uint64_t mix(uint64_t x) { return random_next(&x); }

// ---- norms ----

// Keys with a small norm stay (arXiv 2406.11430).
void knorm_head(const Head *h) {
    float k[MAX_HEAD_DIM * PAGE], norm[PAGE];
    for (int b = 0; b < head_blocks(h); b++) {
        head_block(h, b, k, NULL);
        dot_columns(norm, k, k, h->c->kv->shape.head_dim);
        for (int j = 0; j < PAGE; j++) norm[j] = -sqrtf(norm[j]);
        head_put(h, b, norm);
    }
}

// CurDKV (arXiv 2509.15038): |k|^2 |v|^2, each as a share of its 16 neighbours', the products then
// shares of the head's. The first ones are worth 1.
void curdkv_head(const Head *h) {
    int n = h->first + h->n, d = h->c->kv->shape.head_dim,
        local = (int)context_param(h->c, "local");
    int sink = (int)context_param(h->c, "sink");
    double sum = 0;
    for (int from = 0; from < n; from += local) {
        float k[MAX_HEAD_DIM], v[MAX_HEAD_DIM], k2[MAX_LOCAL] = {0}, v2[MAX_LOCAL] = {0};
        float k_sum = 0, v_sum = 0;
        int m = min_int(n - from, local);
        for (int i = 0; i < m; i++) {
            head_pair(h, from + i, k, v);
            for (int j = 0; j < d; j++) k2[i] += k[j] * k[j], v2[i] += v[j] * v[j];
            k_sum += k2[i], v_sum += v2[i];
        }
        for (int i = 0; i < m; i++) {
            float s = k_sum * v_sum > 0 ? k2[i] / k_sum * (v2[i] / v_sum) : 0;
            sum += s;
            if (from + i >= h->first) h->score[from + i - h->first] = s;
        }
    }
    for (int t = h->first; t < n; t++) {
        float *s = &h->score[t - h->first];
        *s = t < sink ? 1.0f : *s / (float)fmax(sum, 1e-30);
    }
}

// ---- directions ----

// The keys of a block over their norms; columns after the last pair are zero.
static void unit_keys(const Head *h, int b, float *k) {
    float norm[PAGE];
    int d = h->c->kv->shape.head_dim, n = head_block(h, b, k, NULL);
    dot_columns(norm, k, k, d);
    for (int j = 0; j < PAGE; j++) norm[j] = j < n ? 1.0f / fmaxf(sqrtf(norm[j]), 1e-12f) : 0.0f;
    for (int i = 0; i < d * PAGE; i++) k[i] *= norm[i % PAGE];
}

// KeyDiff (arXiv 2504.15364): keys that point away from the mean direction stay: minus the cosine
// of the angle between the two.
void keydiff_head(const Head *h) {
    float k[MAX_HEAD_DIM * PAGE], mean[MAX_HEAD_DIM] = {0}, cosine[PAGE], length = 0.0f;
    int d = h->c->kv->shape.head_dim;
    for (int b = 0; b < head_blocks(h); b++) {
        unit_keys(h, b, k);
        for (int i = 0; i < d * PAGE; i++) mean[i / PAGE] += k[i];
    }
    for (int i = 0; i < d; i++) length += mean[i] * mean[i];
    length = fmaxf(sqrtf(length), 1e-12f);
    for (int b = 0; b < head_blocks(h); b++) {
        unit_keys(h, b, k);
        memset(cosine, 0, sizeof cosine);
        for (int i = 0; i < d * PAGE; i++) cosine[i % PAGE] -= k[i] * (mean[i / PAGE] / length);
        head_put(h, b, cosine);
    }
}

// ---- LagKV (arXiv 2504.04704): pairs judged by those that follow ----

// Channels of a pair: keys, then values.
typedef struct {
    float x[2][MAX_HEAD_DIM];
} Channels;

// Smallest and largest of each channel in pairs [from, from + lag).
static void lag_range(const Head *h, int from, int lag, Channels *lo, Channels *hi) {
    int d = h->c->kv->shape.head_dim;
    Channels p;
    for (int i = 0; i < lag; i++) {
        head_pair(h, from + i, p.x[0], p.x[1]);
        for (int j = 0; j < 2 * d; j++) {
            float x = p.x[j / d][j % d], *a = &lo->x[j / d][j % d], *b = &hi->x[j / d][j % d];
            *a = i == 0 ? x : fminf(*a, x), *b = i == 0 ? x : fmaxf(*b, x);
        }
    }
}

// The deviation (n - 1) of x [d] over its channels, each measured by the range that follows.
static float lag_deviation(const float *x, const float *lo, const float *hi, int d) {
    double sum = 0, squares = 0;
    for (int j = 0; j < d; j++) {
        double u = hi[j] > lo[j] ? (x[j] - lo[j]) / (hi[j] - lo[j]) : 0;
        sum += u, squares += u * u;
    }
    return (float)sqrt(fmax(squares - sum * sum / d, 0) / (d - 1));
}

// Pairs [from, from + lag): worth [lag] the mean of two softmaxes over them, of the keys'
// deviations and of the values'.
static void lag_worth(const Head *h, int from, int lag, float *worth) {
    int d = h->c->kv->shape.head_dim;
    Channels lo, hi, p;
    float x[2][MAX_LOCAL], max[2] = {0}, sum[2] = {0};
    lag_range(h, from + lag, lag, &lo, &hi);
    for (int i = 0; i < 2 * lag; i++) {
        int s = i % 2;
        if (s == 0) head_pair(h, from + i / 2, p.x[0], p.x[1]);
        x[s][i / 2] = lag_deviation(p.x[s], lo.x[s], hi.x[s], d);
        max[s] = fmaxf(max[s], x[s][i / 2]);
    }
    for (int i = 0; i < 2 * lag; i++)
        sum[i % 2] += x[i % 2][i / 2] = expf(x[i % 2][i / 2] - max[i % 2]);
    for (int i = 0; i < lag; i++) worth[i] = (x[0][i] / sum[0] + x[1][i] / sum[1]) / 2;
}

// A pair's rank within its part; 1 for the first ones, the last whole part and what follows it.
// Where there are not two parts the newest stay.
void lagkv_head(const Head *h) {
    int n = h->first + h->n, sink = (int)context_param(h->c, "sink");
    int lag = (int)context_param(h->c, "lag"), parts = (n - sink) / lag;
    float worth[MAX_LOCAL];
    for (int t = h->first; t < n; t++)
        h->score[t - h->first] =
            t < sink || parts >= 2 ? 1.0f : (float)(t - sink) / (float)(n - sink);
    for (int from = sink; from + 2 * lag <= n; from += lag) {
        lag_worth(h, from, lag, worth);
        for (int i = max_int(h->first - from, 0); i < lag; i++) {
            int rank = 0;
            for (int j = 0; j < lag; j++)
                rank += worth[j] < worth[i] || (worth[j] == worth[i] && j < i);
            h->score[from + i - h->first] = (float)rank / (float)lag;
        }
    }
}

// ---- leverage (Compactor, arXiv 2507.08143): keys that others do not explain ----

typedef struct {
    int sink, recent;  // pairs at both ends of the list that are left out
    bool failed;       // no memory
} Leverage;

// What a head is worked on with: its sketch, the products of sketched keys, and the mean key.
typedef struct {
    const Head *h;
    int k;
    float *phi;  // [head_dim][k]
    double *g;   // [k][k]
    float mean[MAX_HEAD_DIM];
} Sketch;

// phi [d][k]: normal numbers over sqrt(k), of a seed and the place alone; or `whole`, ones on the
// diagonal.
static void sketch_of(float *phi, int d, int k, bool whole, uint64_t seed) {
    const double turn = 6.283185307179586;
    for (int i = 0; i < d * k; i++) {
        uint64_t r = mix(seed + (uint64_t)i);
        double u = ((double)(r >> 40) + 1) * 0x1p-24, angle = (double)(r & 0xffffff) * 0x1p-24;
        phi[i] = (float)(sqrt(-2 * log(u)) * cos(turn * angle) / sqrt(k));
        if (whole) phi[i] = i / k == i % k ? 1.0f : 0.0f;
    }
}

// The key before its rotation.
static void plain_key(const Head *h, int t, float *k) {
    head_unrotate(h, head_pair(h, t, k, NULL), k);
}

// x [k] = the key before its rotation, less the mean, in the sketch.
static void sketch_key(const Sketch *s, int t, float *x) {
    float key[MAX_HEAD_DIM];
    plain_key(s->h, t, key);
    memset(x, 0, (size_t)s->k * sizeof *x);
    for (int i = 0; i < s->h->c->kv->shape.head_dim; i++)
        for (int j = 0; j < s->k; j++) x[j] += (key[i] - s->mean[i]) * s->phi[i * s->k + j];
}

// g [k][k] = L, in place, where g + ridge = L L^T; the upper half means nothing.
void factorize(double *g, int k, double ridge) {
    for (int i = 0; i < k; i++) {
        for (int j = 0; j <= i; j++) {
            double s = g[i * k + j] + (i == j ? ridge : 0);
            for (int m = 0; m < j; m++) s -= g[i * k + m] * g[j * k + m];
            g[i * k + j] = i == j ? sqrt(fmax(s, 1e-12)) : s / g[j * k + j];
        }
    }
}

// x^T (L L^T)^-1 x: the squares of what L y = x gives.
float leverage_of(const double *l, const float *x, int k) {
    double y[MAX_HEAD_DIM], sum = 0;
    for (int i = 0; i < k; i++) {
        double s = x[i];
        for (int j = 0; j < i; j++) s -= l[i * k + j] * y[j];
        y[i] = s / l[i * k + i];
        sum += y[i] * y[i];
    }
    return (float)sum;
}

static void sketch_products(Sketch *s, int from, int to) {
    float x[MAX_HEAD_DIM];
    for (int t = from; t < to; t++) {
        sketch_key(s, t, x);
        for (int i = 0; i < s->k; i++)
            for (int j = 0; j <= i; j++) s->g[i * s->k + j] += (double)x[i] * x[j];
    }
}

// diag(X (X^T X + 0.01)^-1 X^T) of the centred keys X, sketched.
static void leverage_head(const Head *h) {
    Leverage *a = h->arg;
    int d = h->c->kv->shape.head_dim, n = h->first + h->n, to = n - a->recent,
        k = (int)context_param(h->c, "sketch");
    float x[MAX_HEAD_DIM];
    Sketch s = {.h = h, .k = k > 0 ? k : d};
    s.phi = malloc((size_t)d * s.k * sizeof *s.phi);
    s.g = calloc((size_t)s.k * s.k, sizeof *s.g);
    if (!s.phi || !s.g) {
        a->failed = true;
    } else {
        sketch_of(s.phi, d, s.k, k == 0, mix((uint64_t)h->layer * 4096 + (uint64_t)h->g));
        for (int t = a->sink; t < to; t++) {
            plain_key(h, t, x);
            for (int j = 0; j < d; j++) s.mean[j] += (x[j] - s.mean[j]) / (float)(t - a->sink + 1);
        }
        sketch_products(&s, a->sink, to);
        factorize(s.g, s.k, 1e-2);
        for (int t = h->first; t < n; t++) h->score[t - h->first] = 0;
        for (int t = max_int(h->first, a->sink); t < to; t++) {
            sketch_key(&s, t, x);
            h->score[t - h->first] = leverage_of(s.g, x, s.k);
        }
    }
    free(s.phi);
    free(s.g);
}

// Pairs of head h's context that lie at least `sink` and `recent` from the ends of its list.
static void inner_pairs(const Live *v, int h, int sink, int recent, int *from, int *to) {
    *from = max_int(sink - context_first(v->c, h), 0);
    *to = live_pairs(v, h) - recent;
}

void standardize_layers(Live *v, float **x, int sink, int recent) {
    int n_kv_heads = v->c->kv->shape.n_kv_heads, from, to;
    for (int h = 0; h < v->n_heads; h += n_kv_heads) {
        double n = 0, sum = 0, squares = 0;
        for (int g = h; g < h + n_kv_heads; g++) {
            inner_pairs(v, g, sink, recent, &from, &to);
            for (int t = from; t < to; t++) n++, sum += x[g][t];
        }
        double mean = sum / fmax(n, 1);
        for (int g = h; g < h + n_kv_heads; g++) {
            inner_pairs(v, g, sink, recent, &from, &to);
            for (int t = from; t < to; t++) squares += (x[g][t] - mean) * (x[g][t] - mean);
        }
        double deviation = fmax(sqrt(squares / fmax(n - 1, 1)), 1e-6);
        for (int g = h; g < h + n_kv_heads; g++) {
            inner_pairs(v, g, sink, recent, &from, &to);
            for (int t = from; t < to; t++) x[g][t] = (float)((x[g][t] - mean) / deviation);
        }
    }
}

int leverage_fill(Live *v, int sink, int recent, char *err) {
    Leverage a = {sink, recent, false};
    live_each_head(v, leverage_head, &a);
    if (a.failed) return fail(err, "out of memory for the leverage of keys");
    standardize_layers(v, v->score, sink, recent);
    return 0;
}

static int leverage_score(Live *v, char *err) { return leverage_fill(v, 0, 0, err); }

const LiveMethod leverage_method = {.score = leverage_score};

// ---- positions ----

// The newest pairs stay, and the very first, where the model looks when nothing else fits (arXiv
// 2309.17453).
void streaming_head(const Head *h) {
    int sink = (int)context_param(h->c, "sink");
    for (int i = 0; i < h->n; i++) {
        int t = h->first + i;
        h->score[i] = (float)(t < sink ? h->first + h->n : t);
    }
}

void random_head(const Head *h) {
    uint64_t seed =
        mix(mix(mix((uint64_t)context_param(h->c, "seed")) + (uint64_t)h->layer) + (uint64_t)h->g);
    for (int i = 0; i < h->n; i++) {
        uint64_t t = (uint64_t)(head_pos(h, i) - context_pos(h->c));
        h->score[i] = (float)(mix(seed + t) >> 40) * 0x1p-24f;
    }
}
